// optimizer.cu: AdamW on a GPU, naive and tiled: the norm of all gradients, the step's numbers, the
// update. Parameters, gradients and moments are float32 in every backend; update_four also writes
// the bf16 copy of the parameters that `tensor` multiplies with.
//
// Read first: arithmetic.h (adamw_schedule, adamw_begin, adamw_update: the arithmetic that all
// backends share), layers.cu (how rungs and figures are meant).
// Run by:  ./train --device cuda --kernels naive|tiled|tensor
//
// The first kernel sums squares in double, a partial sum for each piece of PIECE gradients. In the
// second one block adds the partial sums, notes the step's figures and prepares the update. In the
// third one thread per parameter, or per four, updates. The step's numbers lie in the workspace
// between the kernels, so the host is not asked.
// They are three, because no parameter may change before the norm of all gradients is known, and
// the end of a kernel is the barrier over all of the GPU. (One cooperative kernel with barriers of
// its own: 39.8 us against 22.7 for these three, 1.97 M parameters.)
// Bytes a parameter: 4 to square; 16 read and 16 written to update, 8 more with ema, 2 for the copy
// in bf16. Measured in a step of 1x128, 1.97 M, by the same kind of trace: squares 3.4 us (pieces
// of 4096 then), begin_step 2.5, update_four 16.6.
// ./bench --only ladder, naive -> tiled, us, 2026-11-22:   AdamW on 8.4 M parameters 685 -> 132
#include "support/device.cuh"

enum { PIECE = 8192 };

// naive: one thread per piece, so neighbours are 32 KB apart; one thread adds all partial sums
__global__ void squares_naive(double *part, const float *x, size_t n) {
    size_t piece = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (piece * PIECE >= n) return;
    size_t end = n < (piece + 1) * PIECE ? n : (piece + 1) * PIECE;
    double sum = 0;
    for (size_t i = piece * PIECE; i < end; i++) sum += (double)x[i] * x[i];
    part[piece] = sum;
}
// tiled: one block of 1024 per piece, neighbours next to each other, eight loads a thread that do
// not wait for each other. 1.97 M parameters: 241 pieces, 7.9 MB: as many blocks as run at a time.
// Tried and dropped: the block that ends last begins the step, 9.8 us for 6.4 in two kernels.
__global__ void squares_tiled(double *part, const float *x, size_t n) {
    begin_dependent();
    double sum = 0;
#pragma unroll
    for (int j = 0; j < PIECE; j += 1024) {
        size_t i = (size_t)blockIdx.x * PIECE + j + threadIdx.x;
        if (i < n) sum += (double)x[i] * x[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

// One block of THREADS (tiled) or one thread (naive: blockDim.x is 1, and the loop is layers.c's).
// The schedule, a cosine and two powers in double, takes one thread longer than all the rest: it is
// worked out before the wait, while the kernel before still runs. What it reads, the step's number,
// only this kernel writes.
__global__ void begin_step(AdamWStep *a, StepState *state, const double *part, size_t pieces,
                           double loss_scale, const __grid_constant__ Hyper h) {
    AdamWStep next;
    if (threadIdx.x == 0) next = adamw_schedule(&h, state->step);
    begin_dependent();
    double sum = 0;
    for (size_t i = threadIdx.x; i < pieces; i += blockDim.x) sum += part[i];
    if (blockDim.x > 1) sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    adamw_begin(&next, &h, state, sqrt(sum), state->loss_sum * loss_scale);
    *a = next;
    state->loss_sum = 0;  // for the next step's passes, which add to it
    if (next.finite) state->step++;  // the next step's draws read it
}

// naive: one thread per parameter
__global__ void update_one(float *p, float *g, float *m, float *v, float *ema, size_t n,
                           size_t n_decay, const AdamWStep *a) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || !a->finite) return;
    adamw_update(a, i < n_decay, &p[i], g[i], &m[i], &v[i], ema ? &ema[i] : NULL);
    g[i] = 0;
}
// tiled: four, 16 bytes at a time; the last n % 4 one by one. Bytes: 8 arrays of n, 63 MB for the
// paper's 1.97 M parameters. copy: the new parameters in bf16, NULL where nobody keeps one.
// Neighbouring threads: neighbouring 16 bytes of every array. No sum crosses threads: no barrier.
// Measured: 8.4 M parameters 0.68 -> 0.13 ms. 1.97 M in a step, 67 MB with the copy: 16.6 us, 4.0
// TB/s, more than memory gives: some of it must still lie in L2.
// Tried and dropped: eight parameters a thread, and loads ahead of the wait: no gain.
// Moments are read and written past all others there (evict first): nothing else needs them before
// the next update, and 15.8 MB of the paper's would push out what does: parameters, gradients, the
// copy. A step of 1x128 takes 97 us instead of 105.
__global__ void update_four(float *p, float *g, float *m, float *v, float *ema, bf16 *copy,
                            size_t n, size_t n_decay, const AdamWStep *step) {
    begin_dependent();
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    AdamWStep a = *step;
    if (i >= n || !a.finite) return;  // every thread decides alike: all parameters or none
    if (i + 4 > n) {
        for (; i < n; i++) {
            adamw_update(&a, i < n_decay, &p[i], g[i], &m[i], &v[i], ema ? &ema[i] : NULL);
            g[i] = 0;
            if (copy) copy[i] = (bf16)p[i];
        }
        return;
    }
    // All loads before the first store, as the arrays might overlap for all the compiler knows.
    float p4[4], g4[4], m4[4], v4[4], e4[4];
    *(float4 *)p4 = *(float4 *)(p + i);
    *(float4 *)g4 = *(const float4 *)(g + i);
    *(float4 *)m4 = __ldcs((const float4 *)(m + i));
    *(float4 *)v4 = __ldcs((const float4 *)(v + i));
    if (ema) *(float4 *)e4 = *(float4 *)(ema + i);
    for (int j = 0; j < 4; j++)
        adamw_update(&a, i + j < n_decay, &p4[j], g4[j], &m4[j], &v4[j], ema ? &e4[j] : NULL);
    *(float4 *)(g + i) = make_float4(0, 0, 0, 0);
    *(float4 *)(p + i) = *(float4 *)p4;
    __stcs((float4 *)(m + i), *(float4 *)m4);
    __stcs((float4 *)(v + i), *(float4 *)v4);
    if (ema) *(float4 *)(ema + i) = *(float4 *)e4;
    if (copy) put_four(copy + i, *(float4 *)p4);
}

// The numbers of a step lie after the partial sums: those are doubles, so on 8 bytes.
static AdamWStep *step_numbers(void *work, size_t pieces) {
    return (AdamWStep *)((double *)work + pieces);
}

static void optimize_naive(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                           size_t n_decay, StepState *state, double loss_scale, Hyper hyper,
                           void *work) {
    size_t pieces = ceil_div(n, PIECE);
    AdamWStep *a = step_numbers(work, pieces);
    squares_naive<<<blocks_for(pieces, 32), 32, 0, gpu_stream>>>((double *)work, grads, n);
    LAUNCHED("squares_naive", 0, 4.0 * n + 8.0 * pieces);
    begin_step<<<1, 1, 0, gpu_stream>>>(a, state, (double *)work, pieces, loss_scale, hyper);
    LAUNCHED("begin_step", 0, 8.0 * pieces);
    update_one<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>(params, grads, m, v, ema, n,
                                                                   n_decay, a);
    LAUNCHED("update_one", 0, (ema ? 40.0 : 32.0) * n);
}

static void optimize_tiled(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                           size_t n_decay, StepState *state, double loss_scale, Hyper hyper,
                           void *work) {
    size_t pieces = ceil_div(n, PIECE);
    AdamWStep *a = step_numbers(work, pieces);
    LAUNCH(squares_tiled, (unsigned)pieces, 1024, (double *)work, grads, n);
    LAUNCHED("squares_tiled", 0, 4.0 * n + 8.0 * pieces);
    LAUNCH(begin_step, 1, THREADS, a, state, (const double *)work, pieces, loss_scale, hyper);
    LAUNCHED("begin_step", 0, 8.0 * pieces);
    LAUNCH(update_four, blocks_for(n, 4 * THREADS), THREADS, params, grads, m, v, ema,
           bf16_copy(params), n, n_decay, (const AdamWStep *)a);
    LAUNCHED("update_four", 0, ((ema ? 40.0 : 32.0) + (bf16_copy(params) ? 2 : 0)) * n);
}

// The partial sums, and the step's numbers.
size_t optimizer_work_bytes(size_t n) {
    return ceil_div(n, PIECE) * sizeof(double) + sizeof(AdamWStep);
}

// ---- The table of these kernels -----------------------------------------------------------------

const Kernel optimizer_kernels[] = {
    KERNEL(float, optimize, optimize_naive, "naive", "a thread per parameter"),
    KERNEL(float, optimize, optimize_tiled, "tiled tensor", "four parameters a thread"),
};
const int n_optimizer_kernels = sizeof optimizer_kernels / sizeof *optimizer_kernels;
