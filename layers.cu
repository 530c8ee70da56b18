// layers.cu: LayerNorm, dropout, the loss and the draw of a batch on a GPU, naive and tiled next to
// each other. The naive kernels are the loops of layers.c with a thread per row or value. The tiled
// ones are templates on the activations and serve two backends: `tiled` (float32) and `tensor`
// (bf16). fast/embedding.cu and fast/optimizer.cu (AdamW) are written the same way.
//
// Read first: backend.h (the contracts), layers.c (the same layers as plain loops), then
// conv_kernels.cu, where the time goes. Refuses: machines without a usable GPU (gpu_open says why).
// Run by:  ./train --device cuda --kernels naive|tiled|tensor
//
// None of these layers computes much: their bound is memory. A naive kernel gives every row to one
// thread. Its neighbours then read addresses a whole row apart, 32 lines for 32 values. A tiled
// kernel gives a row to a warp: 16 bytes a lane, neighbours next to each other, sums by shuffles.
// The count at B x T = 32 x 1024, C = 256: one activation array is N*C*4 = 33.5 MB, 11 us of an
// H100's 3 TB/s to read or write once. No kernel adds floats atomically: blocks end in any order,
// and the bits of a sum of floats depend on the order. Every sum over rows goes through partial
// sums at places fixed by the shape, which are added in order.
// Measured there, many calls in a row (./bench --only ladder), naive -> tiled, then in bf16, half
// the bytes; us, 2026-11-22:
//   LayerNorm      233 -> 24,  9    backward 6750 -> 52, 29
//   cross-entropy  218 -> 21, 14
// Counts and times before a kernel in bf16 are those within a step of --preset shakespeare, by a
// trace of all launches (CUPTI; from the end of the kernel before to the end of this one): 32768
// rows of 256 channels, 16.8 MB an array (16384 rows: 8.4 MB). A large copy reaches 2.95 TB/s on
// that GPU, so to read or write one such array takes 5.7 us (2.8) at the least.
#include "fast/rows.cuh"

#include <cuda_pipeline.h>

// ---- LayerNorm ----------------------------------------------------------------------------------
//
//   mean = average(x),   rstd = 1 / sqrt(average((x - mean)^2) + eps)
//   out  = (x - mean) * rstd * gain + bias
//
// Bytes: x once, out once: 33.6 MB in bf16 for 32768 rows, 11.4 us. Some ten operations for each of
// the 8.4 million values would be 1.3 us at the 64 TFLOP/s of conv_kernels.cu: memory is the bound.
// A row's two sums come one after the other, and each needs the whole row. The kernels differ in
// where the row waits meanwhile: naive and tiled read it again, from cache; registers keep it.

// Mean and 1/standard deviation of a row by one thread, in layers.c's order and precision. Two
// passes: average(x^2) - mean^2 in one would cancel where the mean is large beside the deviation.
static __device__ float2 row_moments(const float *x, int C) {
    double sum = 0, squares = 0;
    for (int c = 0; c < C; c++) sum += x[c];
    double mean = sum / C;
    for (int c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
    return make_float2((float)mean, (float)(1 / sqrt(squares / C + NORM_EPS)));
}

// naive: one thread per row, which reads the row three times. Neighbouring threads are a row apart,
// 1 KB with C = 256, so every load of a warp touches 32 lines of cache for 32 values: 0.23 ms.
__global__ void norm_rows_naive(float *out, const float *x, const float *gain, const float *bias,
                                size_t N, int C) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const float *row = x + n * C;
    float2 m = row_moments(row, C);
    for (int c = 0; c < C; c++) out[n * C + c] = (row[c] - m.x) * m.y * gain[c] + bias[c];
}

void norm_forward_naive(act *out, const act *x, const real *gain, const real *bias, size_t N,
                        int C) {
    norm_rows_naive<<<blocks_for(N, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)out, (const float *)x, gain, bias, N, C);
    LAUNCHED("norm_forward_naive", 0, 2 * array_bytes(sizeof(float), N, C));
}

// tiled: one warp per row.
// Bound before: the load units, 32 lines for each load. Now a load's lanes share their lines.
// Bytes: x read once from memory and twice from L1, out written once, 67 MB in float32. Cost: gain
// and bias for every row, 2 KB from L1. Nothing is shared between warps, so there is no barrier.
// Measured: float32 0.24 -> 0.030 ms; bf16, 16384 rows in a step: 8.2 us, 16.8 MB, 2.0 TB/s.
template <bool VEC, typename T>
__global__ void norm_rows_tiled(T *out, const T *x, const float *gain, const float *bias, size_t N,
                                int C) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    warp_norm_row<VEC>(out + n * C, x + n * C, gain, bias, C, lane, false);
}

// registers: a row of up to 256 channels stays in its warp's registers, channels 8*lane + j in lane
// `lane`, so that it is read once, 16 bytes of bf16 at a time. A warp takes several rows: all their
// loads are on their way together, and gain and bias, four times the bytes of a row of bf16, are
// read once for them.
// Bound before: a warp had one row's loads on their way, waited, and asked L1 twice more.
// Cost: 4 rows * 8 values + gain and bias = 48 registers a lane for data.
// Measured in bf16: 10.9 us for 32768 rows, 33.6 MB, 3.1 TB/s (8.2 us for half of them before).
template <int ROWS, typename T>
__global__ void norm_rows_registers(T *out, const T *x, const float *gain, const float *bias,
                                    size_t N, int C) {
    begin_dependent();
    const int lane = threadIdx.x % 32;
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    float v[ROWS][8], g[8], b[8];
    // All loads before the first use: 4 * 512 bytes of bf16 of each warp on their way at a time.
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        load_row(v[r], x + (n0 + r) * C, n0 + r < N ? C : 0, lane);
    load_row(g, gain, C, lane);
    load_row(b, bias, C, lane);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float2 m = register_moments(v[r], C, lane);
        for (int j = 0; j < 8; j++) v[r][j] = (v[r][j] - m.x) * m.y * g[j] + b[j];
        store_row(out + (n0 + r) * C, v[r], n0 + r < N ? C : 0, lane);
    }
}

template <typename T>
static void norm_forward_tiled(act *out, const act *x, const real *gain, const real *bias,
                               size_t N, int C) {
    bool aligned = aligned16(out) && aligned16(x) && aligned16(gain) && aligned16(bias);
    unsigned warps = blocks_for(N, WARPS);
    if (aligned && C % 8 == 0 && C <= WARP_C && N <= FEW_ROWS)
        LAUNCH((norm_rows_registers<1, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    else if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH((norm_rows_registers<ROWS_AT_ONCE, T>), blocks_for(N, WARPS * ROWS_AT_ONCE), THREADS,
               (T *)out, (const T *)x, gain, bias, N, C);
    else if (aligned && C % 4 == 0)
        LAUNCH((norm_rows_tiled<true, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    else
        LAUNCH((norm_rows_tiled<false, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    LAUNCHED("norm_forward_tiled", 0, 2 * array_bytes(sizeof(T), N, C));
}

// forward:  xhat = (x - mean) * rstd;  out = xhat * gain + bias.    With g = dout * gain:
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
//   dgain[c] += sum_n dout[n,c] * xhat[n,c],   dbias[c] += sum_n dout[n,c]
// That is g without its parts along 1 and along xhat: to shift a row or to stretch it does not move
// out, so dx must have none. Averages go along rows, dgain and dbias down columns: a row belongs to
// a warp, and a column meets all rows of the batch, so blocks leave partial sums of columns.
// dx or again may be x, so the columns' sums come first.
// The epilogue:   again = out;   pre = dx * scale * f'(pre), f being its activation

// naive: one thread per row notes the moments; one per column sums; one per row writes dx. In the
// middle one neighbours read neighbouring columns, but there are only C threads for the whole GPU,
// each with N dependent additions. All three: 6.75 ms.
__global__ void moments_naive(float2 *moments, const float *x, size_t N, int C) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) moments[n] = row_moments(x + n * C, C);
}
__global__ void norm_columns_naive(float *dgain, float *dbias, const float2 *moments,
                                   const float *dout, const float *x, size_t N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float gain_sum = 0, bias_sum = 0;
    for (size_t n = 0; n < N; n++) {
        gain_sum += dout[n * C + c] * ((x[n * C + c] - moments[n].x) * moments[n].y);
        bias_sum += dout[n * C + c];
    }
    dgain[c] += gain_sum;
    dbias[c] += bias_sum;
}
__global__ void norm_dx_naive(float *dx, float *again, float *pre, const float2 *moments,
                              const float *dout, const float *x, const float *gain,
                              const float *bias, Activation f, float scale, size_t N, int C,
                              bool accumulate) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float2 m = moments[n];
    double g_sum = 0, gx_sum = 0;
    for (int c = 0; c < C; c++) {
        float g = dout[n * C + c] * gain[c];
        g_sum += g;
        gx_sum += g * ((x[n * C + c] - m.x) * m.y);
    }
    float g_mean = (float)(g_sum / C), gx_mean = (float)(gx_sum / C);
    for (int c = 0; c < C; c++) {
        // __fmul_rn: g is rounded as in the sum above, so that with C = 1 the difference is 0.
        float g = __fmul_rn(dout[n * C + c], gain[c]), xhat = (x[n * C + c] - m.x) * m.y;
        // x[c] has been read: from here on dx[c] or again[c] may take its place.
        float d = m.y * (g - g_mean - xhat * gx_mean);
        if (accumulate) d += dx[n * C + c];
        dx[n * C + c] = d;
        if (again) again[n * C + c] = xhat * gain[c] + bias[c];
        if (pre) pre[n * C + c] = d * (scale * act_slope(f, pre[n * C + c]));
    }
}

void norm_backward_naive(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                         const real *gain, const real *bias, Epilogue e, size_t N, int C,
                         void *work) {
    float2 *moments = (float2 *)work;
    unsigned rows = blocks_for(N, THREADS);
    moments_naive<<<rows, THREADS, 0, gpu_stream>>>(moments, (const float *)x, N, C);
    LAUNCHED("moments_naive", 0, array_bytes(sizeof(float), N, C) + 8.0 * N);
    norm_columns_naive<<<blocks_for(C, THREADS), THREADS, 0, gpu_stream>>>(
        dgain, dbias, moments, (const float *)dout, (const float *)x, N, C);
    LAUNCHED("norm_columns_naive", 0, 2 * array_bytes(sizeof(float), N, C) + 8.0 * N);
    norm_dx_naive<<<rows, THREADS, 0, gpu_stream>>>(
        (float *)e.dx, (float *)again, (float *)e.pre, moments, (const float *)dout,
        (const float *)x, gain, bias, e.activation, e.drop.scale, N, C, e.accumulate);
    LAUNCHED("norm_dx_naive", 0, norm_arrays(again, e) * array_bytes(sizeof(float), N, C));
}

// What a tiled kernel works on.
template <typename T>
struct NormBackward {
    T *dx, *again, *pre;
    float *part;  // (blocks, 2, C): a block's sums for dgain and dbias
    const T *dout, *x;
    const float *gain, *bias;
    Activation activation;
    float scale;
    size_t N;
    int C, rows;  // rows of a block
    bool accumulate;
};

// Rows of a block: several to a warp where that still leaves a large GPU busy. A block leaves 2*C
// floats: for 32768 rows 683 blocks of 48 write 1.4 MB, where 4096 blocks of 8 would write 8.4. Few
// rows (the table's 256, a small batch) get a warp each. Fixed by N alone: where the rows are cut
// is part of the bits of dgain and dbias.
enum { NORM_ROWS = 6 * WARPS, MANY_ROWS = 8192 };
static int norm_rows(size_t N) { return N < MANY_ROWS ? (int)WARPS : (int)NORM_ROWS; }
static size_t norm_blocks(size_t N) { return ceil_div(N, norm_rows(N)); }

// tiled: a block takes up to NORM_ROWS rows. First a warp per row finds the row's four averages,
// then a thread per column walks the rows, writes dx and sums the column; both read neighbours
// together, and the second reading finds the rows in L1. Bytes: x, dout, dx once, 101 MB instead of
// naive's 201 MB; a block's column sums go to part.
// Bound before: C threads for N rows, and rows 1 KB apart. Cost: 48 rows of x and dout are 98 KB of
// float32 that L1 has to keep between the readings, 49 KB of bf16; one barrier a block.
// Measured: float32, alone, 6.72 -> 0.058 ms. In bf16 20.3 us for 16384 rows when dx was all that
// it wrote, and 17.2 us for the pass over memory that then did what `pre` does here.
enum { AT_ONCE = 8 };

template <bool VEC, typename T>
__global__ void norm_backward_rows(NormBackward<T> a) {
    begin_dependent();
    __shared__ float4 row_figures[NORM_ROWS];  // mean, rstd, average g, average g*xhat
    const int C = a.C, lane = threadIdx.x % 32;
    size_t n0 = (size_t)blockIdx.x * a.rows;
    int rows = a.N - n0 < a.rows ? (int)(a.N - n0) : a.rows;
    for (int r = threadIdx.x / 32; r < rows; r += WARPS) {
        const T *x_r = a.x + (n0 + r) * C, *dout_r = a.dout + (n0 + r) * C;
        float2 m = warp_moments<VEC>(x_r, C, lane);
        float g_sum = 0, gx_sum = 0;
        // Neighbouring lanes: four neighbouring channels each. x_r is in L1 by now, dout_r is not.
        for (int c = 4 * lane; c < C; c += 128) {
            float4 v = load4<VEC>(x_r + c, C - c), d = load4<VEC>(dout_r + c, C - c);
            float4 w = load4<VEC>(a.gain + c, C - c);  // beyond C: d and w are 0
            float g[4] = {__fmul_rn(d.x, w.x), __fmul_rn(d.y, w.y), __fmul_rn(d.z, w.z),
                          __fmul_rn(d.w, w.w)};
            g_sum += (g[0] + g[1]) + (g[2] + g[3]);
            gx_sum += g[0] * ((v.x - m.x) * m.y) + g[1] * ((v.y - m.x) * m.y) +
                      g[2] * ((v.z - m.x) * m.y) + g[3] * ((v.w - m.x) * m.y);
        }
        g_sum = warp_sum(g_sum) / C;
        gx_sum = warp_sum(gx_sum) / C;
        if (lane == 0) row_figures[r] = make_float4(m.x, m.y, g_sum, gx_sum);
    }
    __syncthreads();  // all rows' figures are there before the columns use them; from here on x
                      // may be overwritten, each value by the thread that has just read it
    for (int c = threadIdx.x; c < C; c += THREADS) {
        float gain_sum = 0, bias_sum = 0, w = a.gain[c], b = a.again ? a.bias[c] : 0;
        for (int r0 = 0; r0 < rows; r0 += AT_ONCE) {
            // All loads before the first store: outputs may be x, so the compiler keeps the order.
            // Neighbouring lanes: neighbouring channels, one value each, 64 bytes of a row of bf16.
            float v[AT_ONCE], d[AT_ONCE], old[AT_ONCE], pre[AT_ONCE];
            for (int j = 0; j < AT_ONCE; j++) {
                size_t i = (n0 + r0 + j) * C + c;
                bool here = r0 + j < rows;
                v[j] = here ? (float)a.x[i] : 0;
                d[j] = here ? (float)a.dout[i] : 0;
                old[j] = here && a.accumulate ? (float)a.dx[i] : 0;
                pre[j] = here && a.pre ? (float)a.pre[i] : 0;
            }
            if (a.pre) scaled_slopes(pre, a.activation, a.scale, T());
            for (int j = 0; j < AT_ONCE && r0 + j < rows; j++) {
                size_t i = (n0 + r0 + j) * C + c;
                float4 f = row_figures[r0 + j];  // one address for all of a warp: one access
                float xhat = (v[j] - f.x) * f.y, g = __fmul_rn(d[j], w);
                gain_sum += d[j] * xhat;
                bias_sum += d[j];
                float dx = old[j] + f.y * (g - f.z - xhat * f.w);
                a.dx[i] = (T)dx;
                if (a.again) a.again[i] = (T)(xhat * w + b);
                if (a.pre) a.pre[i] = (T)(dx * pre[j]);
            }
        }
        // This thread has seen all of the block's rows in column c: nothing is left to add up here.
        a.part[((size_t)blockIdx.x * 2) * C + c] = gain_sum;
        a.part[((size_t)blockIdx.x * 2 + 1) * C + c] = bias_sum;
    }
}

// registers: as in norm_rows_registers. Everything is read once and written once: seven arrays at
// most. A lane sums its own columns over its warp's rows; the eight warps' sums meet in shared
// memory. Bound by how much is on its way from memory at a time, so while a warp works on a row its
// next one is copied into shared memory; every lane reads back just what it has copied.
// Bound before: every row twice, its second reading by other threads, and dx and pre once more in a
// pass of their own. Saved: that pass, and the norm_forward that recomputed `again`.
// Bytes: read x, dout, dx, pre; written dx, again, pre: 117 MB for 32768 rows of bf16, 40 us.
// Cost: a ring of 8 warps * 2 rows * 4 arrays * 512 bytes and 8 KB of sums, 40 KB of shared memory,
// and 80 registers a thread: these leave three blocks to a multiprocessor.
// Measured: 40.9 us, 2.88 TB/s, a copy's rate; before, 20.3 + 17.2 + 8.2 us for half as many
// rows.
// Tried and dropped: reading past L2 (evict first), 41.1 us.
enum { AHEAD = 2 };  // rows in a warp's ring, one at work and one on its way; of float32 only one

// Neighbouring lanes copy neighbouring 16 bytes (in float32 32, as two copies), with no register in
// between: a load into registers would hold eight of them until it arrives.
template <typename T>
static __device__ void copy_row(T *to, const T *row, int C, int lane) {
    for (int b = 0; b < (int)(8 * sizeof(T)) && 8 * lane < C; b += 16)
        __pipeline_memcpy_async((char *)(to + 8 * lane) + b, (const char *)(row + 8 * lane) + b,
                                16);
}
// The row of n, none where n is not before `end`, as the warp's next group of copies.
template <typename T>
static __device__ void copy_rows(T to[4][WARP_C], const NormBackward<T> &a, size_t n, size_t end,
                                 int lane) {
    if (n < end) {
        copy_row(to[0], a.x + n * a.C, a.C, lane);
        copy_row(to[1], a.dout + n * a.C, a.C, lane);
        if (a.accumulate) copy_row(to[2], a.dx + n * a.C, a.C, lane);
        if (a.pre) copy_row(to[3], a.pre + n * a.C, a.C, lane);
    }
    __pipeline_commit();  // an empty group, too: the wait below counts groups
}

template <typename T>
__global__ void __launch_bounds__(THREADS) norm_backward_registers(NormBackward<T> a) {
    begin_dependent();
    enum { SLOTS = AHEAD * sizeof(bf16) / sizeof(T) };
    __shared__ __align__(16) T ring[WARPS][SLOTS][4][WARP_C];
    __shared__ float warp_sums[WARPS][WARP_C];
    const int C = a.C, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t n = (size_t)blockIdx.x * a.rows + warp;
    size_t end = ((size_t)blockIdx.x + 1) * a.rows < a.N ? ((size_t)blockIdx.x + 1) * a.rows : a.N;
    // Rows n, n + 8, ..: the block's eight warps walk through memory side by side.
    float w[8], sums[2][8] = {};
    load_row(w, a.gain, C, lane);
    for (int i = 0; i < SLOTS - 1; i++) copy_rows(ring[warp][i], a, n + i * WARPS, end, lane);
    for (int i = 0; n < end; i++, n += WARPS) {
        copy_rows(ring[warp][(i + SLOTS - 1) % SLOTS], a, n + (SLOTS - 1) * WARPS, end, lane);
        // For row n. What a lane reads now it has copied itself, and what the next copies overwrite
        // it has read itself: no barrier, not even among the lanes.
        __pipeline_wait_prior(SLOTS - 1);
        T(*row)[WARP_C] = ring[warp][i % SLOTS];
        float v[8], d[8], dx[8] = {}, pre[8];
        load_row(v, row[0], C, lane);
        load_row(d, row[1], C, lane);
        if (a.accumulate) load_row(dx, row[2], C, lane);
        float2 m = register_moments(v, C, lane);
        float g_sum = 0, gx_sum = 0;
        for (int j = 0; j < 8; j++) {
            v[j] = (v[j] - m.x) * m.y;  // xhat
            sums[0][j] += d[j] * v[j];
            sums[1][j] += d[j];
            d[j] = __fmul_rn(d[j], w[j]);  // g
            g_sum += d[j];
            gx_sum += d[j] * v[j];
        }
        g_sum = warp_sum(g_sum) / C;
        gx_sum = warp_sum(gx_sum) / C;
        for (int j = 0; j < 8; j++) dx[j] += m.y * (d[j] - g_sum - v[j] * gx_sum);
        store_row(a.dx + n * C, dx, C, lane);
        if (a.again) {
            load_row(d, a.bias, C, lane);  // from L1; kept, it would take eight registers
            for (int j = 0; j < 8; j++) v[j] = v[j] * w[j] + d[j];
            store_row(a.again + n * C, v, C, lane);
        }
        if (a.pre) {
            load_row(pre, row[3], C, lane);
            scaled_slopes(pre, a.activation, a.scale, T());
            for (int j = 0; j < 8; j++) pre[j] *= dx[j];
            store_row(a.pre + n * C, pre, C, lane);
        }
    }
    // From a lane's eight columns in eight warps to a thread per column; first dgain, then dbias.
    // The stores meet eight lanes to a bank, but there are 16 of them for all of the block's rows.
    for (int i = 0; i < 2; i++) {
        if (i > 0) __syncthreads();  // the sums of the round before are read
        for (int j = 0; j < 8; j++) warp_sums[warp][8 * lane + j] = sums[i][j];
        __syncthreads();  // all eight warps' sums are there
        float sum = 0;
        for (int u = 0; u < WARPS; u++) sum += warp_sums[u][threadIdx.x];
        if (threadIdx.x < C) a.part[((size_t)blockIdx.x * 2 + i) * C + threadIdx.x] = sum;
    }
}
static_assert((int)THREADS == (int)WARP_C, "a thread per column");

// first[c], second[c] += the sums over rows of part (rows, 2, C). A block takes 8 columns of one of
// the two: 128 lines of threads each add every 128th row, then halves are added to halves. Eight
// neighbouring threads read 32 bytes, a sector. Wider blocks would be fewer: 2 * 256 / 8 = 64 are
// under half of the multiprocessors as it is. The order is fixed by rows, the number of blocks.
// Bytes: 1.4 MB for 32768 rows. Measured: 3.8 us; each line has five or six rows to add.
enum { PAIR_COLUMNS = 8, PAIR_LINES = 128 };
__global__ void add_pairs(float *first, float *second, const float *part, size_t rows, int C) {
    begin_dependent();
    __shared__ float sums[PAIR_LINES][PAIR_COLUMNS];  // a warp's four lines: all 32 banks, once
    int tx = threadIdx.x, ty = threadIdx.y, c = blockIdx.x * PAIR_COLUMNS + tx;
    float sum = 0;
#pragma unroll 4
    for (size_t r = ty; r < rows; r += PAIR_LINES)
        if (c < C) sum += part[(r * 2 + blockIdx.y) * C + c];
    sums[ty][tx] = sum;
    for (int half = PAIR_LINES / 2; half > 0; half /= 2) {
        __syncthreads();  // the sums of the round before are there
        if (ty < half) sums[ty][tx] += sums[ty + half][tx];
    }
    if (ty == 0 && c < C) (blockIdx.y ? second : first)[c] += sums[0][tx];
}

template <typename T>
void norm_backward_tiled(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                         const real *gain, const real *bias, Epilogue e, size_t N, int C,
                         void *work) {
    NormBackward<T> a = {(T *)e.dx, (T *)again, (T *)e.pre, (float *)work, (const T *)dout,
                         (const T *)x, gain, bias, e.activation, e.drop.scale, N, C, norm_rows(N),
                         e.accumulate};
    unsigned blocks = (unsigned)norm_blocks(N);
    // NULL counts as aligned: again, pre and, for the table of bytes, bias.
    bool aligned = aligned16(x) && aligned16(dout) && aligned16(gain) && aligned16(e.dx) &&
                   aligned16(again) && aligned16(e.pre) && aligned16(bias);
    if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH(norm_backward_registers<T>, blocks, THREADS, a);
    else if (aligned && C % 4 == 0)
        LAUNCH((norm_backward_rows<true, T>), blocks, THREADS, a);
    else
        LAUNCH((norm_backward_rows<false, T>), blocks, THREADS, a);
    LAUNCHED("norm_backward_tiled", 0,
             norm_arrays(again, e) * array_bytes(sizeof(T), N, C) + 8.0 * blocks * C);
    LAUNCH(add_pairs, dim3(blocks_for(C, PAIR_COLUMNS), 2), dim3(PAIR_COLUMNS, PAIR_LINES), dgain,
           dbias, a.part, (size_t)blocks, C);
    LAUNCHED("add_pairs", 0, 8.0 * (blocks + 2) * C);
}
// For fast/embedding.cu, which calls it on its table.
template void norm_backward_tiled<float>(act *, real *, real *, const act *, const act *,
                                         const real *, const real *, Epilogue, size_t, int,
                                         void *);

// What backward takes: the partial sums of dgain and dbias, or naive's two moments per row.
size_t norm_work_bytes(size_t N, int width) {
    size_t sums = norm_blocks(N) * 2 * (size_t)width, moments = 2 * N;
    return (sums > moments ? sums : moments) * sizeof(float);
}

// ---- Dropout ------------------------------------------------------------------------------------
//
// forward:  out = residual + scale * y where kept, else residual      (a conv's epilogue)
//           dy  = scale * dout           where kept, else 0
// No mask is stored: the same counters give the same bits again. One draw has the bits of eight
// neighbouring channels of a row (dropout_draw, arithmetic.h).
// Bytes: dout once, dy once, 33.6 MB in bf16 for 32768 rows.

// naive: a thread per value, neighbours next to each other. Each makes a whole draw for its 8 bits.
__global__ void dropout_values(float *dy, const float *dout, Dropout drop, size_t N, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    size_t n = i / C;
    int o = (int)(i % C);
    bool dropped = drop.threshold && dropout_takes(drop, dropout_word(drop, n, o, C), o % 4);
    dy[i] = dropped ? 0 : drop.scale * dout[i];
}

static void dropout_backward_naive(act *dy, const act *dout, Dropout drop, size_t N, int C) {
    dropout_values<<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)dy, (const float *)dout, drop, N, C);
    LAUNCHED("dropout_backward_naive", 0, 2 * array_bytes(sizeof(float), N, C));
}

// tiled: a warp per row. A lane takes eight neighbouring channels with one draw, neighbouring lanes
// neighbouring 16 bytes of bf16. Saved: seven of eight draws. Rows whose length is no multiple of 8
// or whose address is none of 16 go value by value (VEC false), neighbouring lanes next to each
// other. dy may be dout: every value is read by the thread that writes it.
// Measured, 32768 rows of 256 (gpu_time, 2026-11-25): float32 56 -> 24 us; bf16 8.9 us.
template <bool VEC, typename T>
__global__ void dropout_rows(T *dy, const T *dout, Dropout drop, size_t N, int C) {
    begin_dependent();
    const size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (n >= N) return;
    const uint64_t row = drop.first + n;
    dy += n * C, dout += n * C;
    for (int o = 8 * lane; VEC && o < C; o += 256) {
        float v[8];
        uint32_t words[2] = {};
        load_eight(v, dout + o);
        if (drop.threshold) {
            Philox r = dropout_draw(drop.seed, drop.purpose, drop.state->step, row, o, C);
            words[0] = dropout_bits(r, row, 0), words[1] = dropout_bits(r, row, 1);
        }
        for (int j = 0; j < 8; j++)  // threshold 0: no byte is below it
            v[j] = dropout_takes(drop, words[j / 4], j % 4) ? 0 : drop.scale * v[j];
        store_eight(dy + o, v);
    }
    for (int o = lane; !VEC && o < C; o += 32) {
        bool dropped = drop.threshold && dropout_takes(drop, dropout_word(drop, n, o, C), o % 4);
        dy[o] = (T)(dropped ? 0 : drop.scale * (float)dout[o]);
    }
}

template <typename T>
static void dropout_backward_tiled(act *dy, const act *dout, Dropout drop, size_t N, int C) {
    unsigned blocks = blocks_for(N, WARPS);
    if (C % 8 == 0 && aligned16(dy) && aligned16(dout))
        LAUNCH((dropout_rows<true, T>), blocks, THREADS, (T *)dy, (const T *)dout, drop, N, C);
    else
        LAUNCH((dropout_rows<false, T>), blocks, THREADS, (T *)dy, (const T *)dout, drop, N, C);
    LAUNCHED("dropout_backward_tiled", 0, 2 * array_bytes(sizeof(T), N, C));
}

// ---- Loss ---------------------------------------------------------------------------------------
//
// forward:  p = cap * tanh(l/cap);  loss = log(sum_v exp(p_v)) - p_target
//           dl_v = scale * (1 - tanh^2) * (softmax(p)_v - [v == target])
// The largest p is taken off before exp, which leaves p's softmax as it is and no exp above 1.

// naive: one thread per row, which goes over its row three times, tanh and all; neighbours are 1 KB
// apart: 0.22 ms
__global__ void cross_entropy_row(float *losses, float *logits, const int *targets, float cap,
                                  float scale, size_t N) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float *l = logits + n * V, top = 0;
    int target = targets[n];
    for (int v = 0; v < V; v++) {
        float p = cap > 0 ? cap * tanhf(l[v] / cap) : l[v];
        if (v == 0 || p > top) top = p;
    }
    double sum = 0;
    for (int v = 0; v < V; v++)
        sum += exp_real((cap > 0 ? cap * tanhf(l[v] / cap) : l[v]) - top);
    float at_target = target < 0 ? 0 : cap > 0 ? cap * tanhf(l[target] / cap) : l[target];
    losses[n] = target < 0 ? 0 : (float)(log(sum) - (at_target - top));
    for (int v = 0; v < V && scale != 0; v++) {
        float t = cap > 0 ? tanhf(l[v] / cap) : 0, p = cap > 0 ? cap * t : l[v];
        float q = exp_real(p - top) / (float)sum;
        l[v] = target < 0 ? 0 : scale * (1 - t * t) * (q - (v == target ? 1 : 0));
    }
}

// Targets and losses; logits, and their gradient where it is wanted.
template <typename T>
static double loss_bytes(float scale, size_t N) {
    return 8.0 * N + (scale != 0 ? 2 : 1) * array_bytes(sizeof(T), N, V);
}

static void cross_entropy_naive(real *losses, act *logits, const int *targets, float cap,
                                float scale, size_t N) {
    cross_entropy_row<<<blocks_for(N, THREADS), THREADS, 0, gpu_stream>>>(
        losses, (float *)logits, targets, cap, scale, N);
    LAUNCHED("cross_entropy_naive", 0, loss_bytes<float>(scale, N));
}

// exp and tanh, as precise as the logits are stored. In bf16 by the GPU's own 2^x and 1/x, right to
// 2^-22 (PTX ISA) where bf16 rounds to 2^-9: one instruction each.
static __device__ float loss_exp(float x, float) { return exp_real(x); }
static __device__ float loss_exp(float x, bf16) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.44269504f));
    return e;
}
static __device__ float loss_tanh(float x, float) { return tanhf(x); }
static __device__ float loss_tanh(float x, bf16 type) {
    float r;  // 1/inf = 0 and 1/1 are the ends
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + loss_exp(2 * x, type)));
    return 1 - 2 * r;
}

// tiled: one warp per row, whose 256 values stay in the lanes' registers: lane i holds 8i..8i+7.
// Bytes: logits read once and written once, 67 MB.
// Bound before: three tanh a value and rows 1 KB apart. Now one tanh and one exp a value, and every
// load and store of a warp is a whole row: neighbouring lanes, neighbouring 16 bytes of bf16.
// Measured: float32 0.22 -> 0.021 ms; in bf16 13.9 us for 32768 rows, 33.6 MB, 2.4 TB/s.
template <typename T>
__global__ void cross_entropy_warp(float *losses, T *logits, const int *targets, float cap,
                                   float scale, size_t N) {
    begin_dependent();
    static_assert(V == 256, "eight values in each of 32 lanes");
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    const int target = targets[n], first = 8 * lane;
    T *l = logits + n * V + first;
    float p[8], slope[8], top = -INFINITY, sum = 0, at_target = 0;
    load_eight(p, l);
    const float per_cap = 1 / cap;
    for (int j = 0; j < 8; j++) {
        float t = cap > 0 ? loss_tanh(p[j] * per_cap, T()) : 0;
        if (cap > 0) p[j] = cap * t;
        slope[j] = 1 - t * t;  // kept, because p takes the place of l; 1 where cap is 0
        top = fmaxf(top, p[j]);
    }
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int j = 0; j < 8; j++) {
        p[j] -= top;
        if (first + j == target) at_target = p[j];
        p[j] = loss_exp(p[j], T());
        sum += p[j];
    }
    sum = warp_sum(sum);
    // From the lane that has it; without a target from some lane, for nothing.
    at_target = __shfl_sync(~0u, at_target, target / 8 & 31);
    if (lane == 0) losses[n] = target < 0 ? 0 : logf(sum) - at_target;
    if (scale == 0) return;  // only the losses are wanted
    const float per_sum = 1 / sum;
    for (int j = 0; j < 8; j++)
        // The lane's own eight logits are in registers: it overwrites what no other lane reads.
        p[j] = target < 0 ? 0 : scale * slope[j] * (p[j] * per_sum - (first + j == target));
    store_eight(l, p);
}

template <typename T>
static void cross_entropy_tiled(real *losses, act *logits, const int *targets, float cap,
                                float scale, size_t N) {
    LAUNCH(cross_entropy_warp<T>, blocks_for(N, WARPS), THREADS,
           losses, (T *)logits, targets, cap, scale, N);
    LAUNCHED("cross_entropy_tiled", 0, loss_bytes<T>(scale, N));
}

// naive: one thread adds all losses, in layers.c's order
__global__ void add_losses_one(StepState *state, const float *losses, size_t N) {
    double sum = 0;
    for (size_t n = 0; n < N; n++) sum += losses[n];
    state->loss_sum += sum;
}
static void add_losses_naive(StepState *state, const real *losses, size_t N, void *work) {
    (void)work;
    add_losses_one<<<1, 1, 0, gpu_stream>>>(state, losses, N);
    LAUNCHED("add_losses_naive", 0, 4.0 * N);
}

// tiled: one block, each thread adds every 1024th loss, neighbours next to each other: 32 loads for
// 32768 rows, 131 KB in all. More blocks would need a second kernel to add up theirs.
__global__ void add_losses_block(StepState *state, const float *losses, size_t N) {
    begin_dependent();
    double sum = 0;
#pragma unroll 16
    for (size_t n = threadIdx.x; n < N; n += 1024) sum += losses[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) state->loss_sum += sum;
}
static void add_losses_tiled(StepState *state, const real *losses, size_t N, void *work) {
    (void)work;
    LAUNCH(add_losses_block, 1, 1024, state, losses, N);
    LAUNCHED("add_losses_tiled", 0, 4.0 * N);
}

// ---- Data ---------------------------------------------------------------------------------------

// One thread per byte; each finds its window's start for itself. Nothing to tile: a byte is read
// twice, by neighbours, and two ints are written. Neighbouring threads: neighbouring bytes of one
// window.
__global__ void draw_bytes(int *ids, int *targets, Corpus c, const StepState *state, uint64_t seed,
                           uint32_t byte_threshold, uint64_t first, int B, int T) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)B * T) return;
    uint64_t row = first + n / T, t = n % T;
    const uint8_t *at = c.text + window_start(&c, seed, state->step, row) + t;
    bool dropped = byte_dropped(seed, state->step, byte_threshold, row * (uint64_t)T + t);
    ids[n] = dropped ? BYTE_DROPPED : at[0];
    targets[n] = at[1];
}
static void draw_batch_each(int *ids, int *targets, Corpus corpus, const StepState *state,
                            uint64_t seed, uint32_t byte_threshold, uint64_t first, int B, int T) {
    LAUNCH(draw_bytes, blocks_for((size_t)B * T, THREADS), THREADS,
           ids, targets, corpus, state, seed, byte_threshold, first, B, T);
    LAUNCHED("draw_batch_each", 0, 9.0 * B * T);  // of a byte of text an id and a target
}

// ---- The table of these kernels -----------------------------------------------------------------

const Kernel layer_kernels[] = {
    KERNEL(float, norm_forward, norm_forward_naive, "naive", "a thread per row"),
    KERNEL_PAIR(norm_forward, norm_forward_tiled, "a warp per row, in registers up to C = 256"),
    KERNEL(float, norm_backward, norm_backward_naive, "naive", "a thread per row, then per column"),
    KERNEL_PAIR(norm_backward, norm_backward_tiled, "the same, columns added over a block"),
    KERNEL(float, dropout_backward, dropout_backward_naive, "naive", "a thread per value"),
    KERNEL_PAIR(dropout_backward, dropout_backward_tiled, "a warp per row, eight values a draw"),
    KERNEL(float, cross_entropy, cross_entropy_naive, "naive", "a thread per row"),
    KERNEL_PAIR(cross_entropy, cross_entropy_tiled, "a warp per row, in registers"),
    KERNEL(float, add_losses, add_losses_naive, "naive", "one thread"),
    KERNEL(float, add_losses, add_losses_tiled, "tiled tensor", "one block"),
    KERNEL(float, draw_batch, draw_batch_each, "naive tiled tensor", "a thread per byte"),
};
const int n_layer_kernels = sizeof layer_kernels / sizeof *layer_kernels;
