// conv_mma.cu: rung 4 of the causal dilated convolution, on tensor cores from registers: bf16
// operands, float32 sums, all three products. For sm_80 and newer, and any B, T, K, dil; C and O in
// multiples of 8, pointers in multiples of 16 bytes. What it cannot take goes to block, the rung
// below it.
//
// Read first: conv_kernels.cu (the rungs below it), tensor.cuh (the epilogue).   Run:
//   make check-kernels            # every rung against the CPU, then timed, side by side
#include "fast/tensor.cuh"

// ---- Rung 4: mma, tensor cores from registers
//
// Bound before: the multiply-adders; 64 TFLOP/s is all that an H100 has of them in float32.
// Idea: a warp multiplies 16 x 16 by 16 x 8 matrices of bf16 in one instruction, mma.sync. Copies
// go from memory into shared memory without passing registers (cp.async), two steps ahead.
// Count: a block of 64 x 64 sums takes 2*64*64*32 = 262,144 operations and 8192 bytes a step, 32
// operations for a byte, so 124 TFLOP/s are 3.9 TB/s out of the L2 cache.
// Saved: for its 16 values of r a warp has 4 ldmatrix and 8 mma, 12 instructions for 16,384
// multiply-adds; block needs 544. 64 bytes out of shared memory serve 512 of a thread's
// multiply-adds, in block 64 of them.
// Cost: operands still pass through registers, loaded again by every warp that needs them.
// Measured, forward, 32768 rows: 104 us, a third of block's 336.
//
// All three products are sum over r of A[m,r] B[r,n], and differ in what lies side by side:
//               m         n    r             A                       B
//   FORWARD     row       o    tap, c        x[row - k*dil, c]  r    w[k,c,o]   n
//   BACKWARD    row       c    tap, o        dy[row + k*dil, o] r    w[k,c,o]   r
//   WEIGHTS     c         o    row of split  x[row - k*dil, c]  m    dy[row,o]  n
//
//   shared memory   | step 0: A, B | step 1: A, B | step 2: A, B |        3 x 10,240 bytes
//   an operand      r side by side: 64 lines of 32 values;  else: 32 lines of 64, which ldmatrix
//                   transposes. A line is 16 bytes longer than its data, so that the eight lines
//                   that ldmatrix reads at a time begin in eight different groups of four banks.
//   step i          | copy i + 2 |
//                   | wait for i | multiply i |
//
// PTX ISA: cp.async, ldmatrix, "Multiply-and-Accumulate Instruction: mma".

enum MmaMode { FORWARD, BACKWARD, WEIGHTS };
enum {
    MMA_TILE = 64,
    MMA_STEP = 32,
    MMA_STAGES = 3,
    MMA_THREADS = 128,
    MMA_LINE_R = MMA_STEP * 2 + 16,  // bytes of a line, r side by side
    MMA_LINE = MMA_TILE * 2 + 16,    // otherwise
    MMA_OPERAND = MMA_TILE * MMA_LINE_R,
    MMA_PIECES = MMA_TILE * MMA_STEP / 8,  // of 16 bytes, in an operand
    MMA_BLOCKS = 4 * 132,                  // that a large GPU needs to be busy
};
static_assert(MMA_OPERAND >= MMA_STEP * MMA_LINE, "both forms fit");
static_assert(MMA_PIECES % MMA_THREADS == 0, "each thread copies a whole number of pieces");

typedef struct {
    const bf16 *x, *w;  // BACKWARD: dy, w;  WEIGHTS: x, dy
    Epilogue e;
    const float *bias;  // FORWARD; or NULL
    float *part;        // WEIGHTS: (splits, K*C*O + O)
    ConvShape s;
    int splits;
} MmaArgs;

#ifdef HAVE_MMA
// Sends for A and B of a step, 4096 bytes each, two pieces of 16 bytes of either for every thread;
// neighbouring lanes copy neighbouring 16 bytes of a line, 4 or 8 lanes to a line. `begin`:
// first row of the split. What lies outside is not addressed: its copy reads nothing and writes 0.
template <MmaMode MODE>
INLINE void mma_copy(const MmaArgs *a, uint32_t at, int m0, int n0, int step, int begin, int tap) {
    const ConvShape s = a->s;
    const int N = s.B * s.T, width = MODE == BACKWARD ? s.O : s.C;
    const int chunks = (width + MMA_STEP - 1) / MMA_STEP;
    const int k = MODE == WEIGHTS ? tap : step / chunks, r0 = step % chunks * MMA_STEP;
    const int shift = (MODE == BACKWARD ? 1 : -1) * k * s.dil;
#pragma unroll
    for (int i = threadIdx.x; i < MMA_PIECES; i += MMA_THREADS) {
        int line = MODE == WEIGHTS ? i / 8 : i / 4, piece = MODE == WEIGHTS ? i % 8 : i % 4;
        int col = (MODE == WEIGHTS ? m0 : r0) + piece * 8;
        int n = (MODE == WEIGHTS ? begin + step * MMA_STEP : m0) + line, t = n % s.T + shift;
        bool inside = n < N && t >= 0 && t < s.T && col < width;
        copy16(at + line * (MODE == WEIGHTS ? MMA_LINE : MMA_LINE_R) + piece * 16,
               inside ? a->x + ((int64_t)n + shift) * width + col : a->x, inside);
    }
#pragma unroll
    for (int i = threadIdx.x; i < MMA_PIECES; i += MMA_THREADS) {
        int line = MODE == BACKWARD ? i / 4 : i / 8, piece = MODE == BACKWARD ? i % 4 : i % 8;
        int col = (MODE == BACKWARD ? r0 : n0) + piece * 8;
        int row = line + (MODE == WEIGHTS ? begin + step * MMA_STEP : MODE == FORWARD ? r0 : n0);
        bool inside = col < s.O && row < (MODE == WEIGHTS ? N : s.C);
        size_t from = (MODE == WEIGHTS ? (size_t)row : (size_t)k * s.C + row) * s.O + col;
        copy16(at + MMA_OPERAND + line * (MODE == BACKWARD ? MMA_LINE_R : MMA_LINE) + piece * 16,
               inside ? a->w + from : a->w, inside);
    }
    copy_commit();
}

// A step's products: the warp's 32 x 32 sums from row wm, column wn of the tile. For 16 values of r
// that is 4 ldmatrix and 8 mma: a fragment of A serves four mma, one of B two.
template <MmaMode MODE>
INLINE void mma_multiply(float acc[2][4][4], uint32_t stage, int wm, int wn) {
    const int lane = threadIdx.x % 32;
    // Where this lane points ldmatrix: mma wants A as [rows 0-7 | rows 8-15] of r 0-7, then of r
    // 8-15, and B as r 0-7, then r 8-15, of columns 0-7, then of columns 8-15.
    const uint32_t a_at =
        MODE == WEIGHTS ? (lane % 8 + lane / 16 * 8) * MMA_LINE + (wm + lane / 8 % 2 * 8) * 2
                        : (wm + lane % 16) * MMA_LINE_R + lane / 16 * 16;
    const uint32_t b_at =
        MODE == BACKWARD ? (wn + lane % 8 + lane / 16 * 8) * MMA_LINE_R + lane / 8 % 2 * 16
                         : lane % 16 * MMA_LINE + (wn + lane / 16 * 8) * 2;
    const int a_r = MODE == WEIGHTS ? MMA_LINE : 2, b_r = MODE == BACKWARD ? 2 : MMA_LINE;
    const int a_16 = MODE == WEIGHTS ? 32 : 16 * MMA_LINE_R;  // bytes from 16 rows to the next
    const int b_16 = MODE == BACKWARD ? 16 * MMA_LINE_R : 32;
#pragma unroll
    for (int h = 0; h < MMA_STEP; h += 16) {
        uint32_t fa[2][4], fb[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            ldmatrix<MODE == WEIGHTS>(fa[j], stage + a_at + h * a_r + j * a_16);
            ldmatrix<MODE != BACKWARD>(fb[j], stage + MMA_OPERAND + b_at + h * b_r + j * b_16);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(acc[j][n], fa[j], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
    }
}

#define MMA_EPILOGUE_CASE(name)                                                               \
    case ACT_##name:                                                                          \
        if (MODE == FORWARD)                                                                  \
            epilogue_forward8<ACT_##name>(&a->e, v, input, kept, 0, inside, first, width);    \
        else                                                                                  \
            epilogue_backward8<ACT_##name>(&a->e, v, input, inside, first, width);            \
        break;

// The sums go through shared memory as bf16, so that a thread has eight channels for its epilogue:
// mma leaves a lane two neighbours of a row, 4 bytes, where a store should have 16. Then eight
// neighbouring lanes have the 128 bytes of a row of the tile. Its 64 lines of 144 bytes fit into
// stage 0.
template <MmaMode MODE>
INLINE void mma_epilogue(const MmaArgs *a, char *smem, float acc[2][4][4], int m0, int n0, int wm,
                         int wn) {
    const int N = a->s.B * a->s.T, width = MODE == FORWARD ? a->s.O : a->s.C;
    const int lane = threadIdx.x % 32, r = wm + lane / 4, c = wn + 2 * (lane % 4);
    for (int n = 0; n < 4; n++) {
        int col = n0 + c + 8 * n;
        float2 bias = {0, 0};
        if (MODE == FORWARD && a->bias && col < width) bias = *(const float2 *)(a->bias + col);
        for (int j = 0; j < 2; j++)
            for (int h = 0; h < 2; h++)
                *(uint32_t *)(smem + (r + 16 * j + 8 * h) * MMA_LINE + (c + 8 * n) * 2) =
                    pack(acc[j][n][2 * h] + bias.x, acc[j][n][2 * h + 1] + bias.y);
    }
    __syncthreads();  // all sums are written before they are read by others
    const Dropout *drop = &a->e.drop;
    const bf16 *read = epilogue_input<MODE == BACKWARD>(&a->e);
    const uint32_t step_number = MODE == FORWARD && drop->threshold ? drop->state->step : 0;
    for (int i = threadIdx.x; i < MMA_TILE * 8 / 2; i += MMA_THREADS) {
        int row = i / 64 * 16 + i / 8 % 8, col = n0 + i % 8 * 8;  // and row + 8
        if (col >= width) continue;
        const bool inside[2] = {m0 + row < N, m0 + row + 8 < N};
        size_t first = (size_t)(m0 + row) * width + col;
        uint4 v[2], input[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        for (int h = 0; h < 2; h++)
            v[h] = *(uint4 *)(smem + (row + 8 * h) * MMA_LINE + i % 8 * 16);
        if (read) load2(input, read, inside, first, width);
        uint32_t kept[2] = {0, 0};
        if (MODE == FORWARD && drop->threshold)
            draw_kept_rows<1>(kept, drop, step_number, drop->first + m0 + row, col, width);
        switch (a->e.activation) {
            ACTIVATIONS(MMA_EPILOGUE_CASE)
        default: break;
        }
    }
}

// A split's sums of dw[tap] as they stand in the accumulators, and of db: two threads summed a
// column of dy. Four neighbouring lanes write 32 bytes of a row, a sector.
INLINE void mma_store_weights(const MmaArgs *a, char *smem, float acc[2][4][4], float dy_sum,
                              float *part, int tap, int m0, int n0, int wm, int wn) {
    const ConvShape s = a->s;
    const int lane = threadIdx.x % 32, r = m0 + wm + lane / 4, c = n0 + wn + 2 * (lane % 4);
    for (int j = 0; j < 2; j++)
        for (int n = 0; n < 4; n++)
            for (int h = 0; h < 2; h++) {
                int row = r + 16 * j + 8 * h, col = c + 8 * n;
                if (row < s.C && col < s.O)
                    *(float2 *)(part + ((size_t)tap * s.C + row) * s.O + col) =
                        make_float2(acc[j][n][2 * h], acc[j][n][2 * h + 1]);
            }
    if (tap > 0 || m0 > 0) return;
    float *other = (float *)smem;
    if (threadIdx.x >= MMA_TILE) other[threadIdx.x - MMA_TILE] = dy_sum;
    __syncthreads();  // the odd rows' sums are there before they are added
    int col = n0 + threadIdx.x;
    if (threadIdx.x < MMA_TILE && col < s.O)
        part[(size_t)s.K * s.C * s.O + col] = dy_sum + other[threadIdx.x];
}
#endif

// Grid: x tiles of m, y tiles of n, z (WEIGHTS) tap + K*split. y <= 1024 and z <= 528 + K. Four
// warps share a tile's 64 x 64 sums, 32 x 32 each: 32 registers a thread.
template <MmaMode MODE>
__global__ void __launch_bounds__(MMA_THREADS) conv_mma(MmaArgs a) {
#ifdef HAVE_MMA
    __shared__ __align__(16) char smem[MMA_STAGES * 2 * MMA_OPERAND];
    const ConvShape s = a.s;
    const int N = s.B * s.T, warp = threadIdx.x / 32, width = MODE == BACKWARD ? s.O : s.C;
    const int tap = MODE == WEIGHTS ? blockIdx.z % s.K : 0, split = blockIdx.z / s.K;
    const int m0 = blockIdx.x * MMA_TILE, n0 = blockIdx.y * MMA_TILE;
    const int together = a.splits * MMA_STEP;  // rows that a step of all splits takes
    const int per_split = MODE == WEIGHTS ? (N + together - 1) / together : 0;
    const int begin = split * per_split * MMA_STEP;
    const int steps = MODE == WEIGHTS ? per_split : s.K * ((width + MMA_STEP - 1) / MMA_STEP);
    const int wm = warp / 2 * 32, wn = warp % 2 * 32;
    const uint32_t at = shared_addr(smem);
    const bool with_bias = MODE == WEIGHTS && tap == 0 && m0 == 0;
    float acc[2][4][4] = {}, dy_sum = 0;
    for (int i = 0; i < MMA_STAGES - 1; i++)
        if (i < steps)
            mma_copy<MODE>(&a, at + i * 2 * MMA_OPERAND, m0, n0, i, begin, tap);
        else
            copy_commit();  // an empty group: the waits below count groups
    for (int i = 0; i < steps; i++) {
        copy_wait<MMA_STAGES - 2>();
        // All threads' copies of step i are here, not only this one's; and all have multiplied step
        // i - 1, and added up its dy, before the next copies overwrite it.
        __syncthreads();
        int next = i + MMA_STAGES - 1, now = i % MMA_STAGES * 2 * MMA_OPERAND;
        if (next < steps)
            mma_copy<MODE>(&a, at + next % MMA_STAGES * 2 * MMA_OPERAND, m0, n0, next, begin, tap);
        else
            copy_commit();
        mma_multiply<MODE>(acc, at + now, wm, wn);
        if (with_bias) {  // two threads a column, one for even rows and one for odd
            const char *dy = smem + now + MMA_OPERAND + threadIdx.x % MMA_TILE * 2;
            for (int row = threadIdx.x / MMA_TILE; row < MMA_STEP; row += 2)
                dy_sum += __bfloat162float(*(const bf16 *)(dy + row * MMA_LINE));
        }
    }
    copy_wait<0>();
    __syncthreads();  // all have multiplied their last step: the stages may be written over
    if (MODE == WEIGHTS)
        mma_store_weights(&a, smem, acc, dy_sum,
                          a.part + split * ((size_t)s.K * s.C * s.O + s.O), tap, m0, n0, wm, wn);
    else
        mma_epilogue<MODE>(&a, smem, acc, m0, n0, wm, wn);
#endif
}

// dw += the partial sums of all splits, db likewise, split by split: the same order, and bits,
// every time. A thread per weight; neighbouring threads have neighbouring weights.
static __global__ void mma_add_splits(float *dw, float *db, const float *part, size_t weights,
                                      int O, int splits) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= weights + (db ? O : 0)) return;
    float sum = 0;
    for (int split = 0; split < splits; split++) sum += part[split * (weights + O) + i];
    if (i < weights)
        dw[i] += sum;
    else
        db[i - weights] += sum;
}

bool have_mma(void) {
    static int known = -1;
    if (known < 0)
        known = gpu()->capability >= 80 && compiled_for((const void *)conv_mma<FORWARD>) >= 80;
    return known;
}
bool mma_takes(ConvShape s) { return have_mma() && s.C % 8 == 0 && s.O % 8 == 0; }

template <MmaMode MODE>
static void mma_launch(const MmaArgs &a, size_t m, int n, int z) {
    dim3 grid((unsigned)ceil_div(m, MMA_TILE), (unsigned)ceil_div(n, MMA_TILE), (unsigned)z);
    conv_mma<MODE><<<grid, MMA_THREADS, 0, gpu_stream>>>(a);
    LAUNCHED(MODE == FORWARD    ? "conv_mma forward"
             : MODE == BACKWARD ? "conv_mma backward"
                                : "conv_mma weights",
             conv_flops(a.s),
             MODE == FORWARD    ? forward_bytes(a.e, a.s, sizeof(bf16))
             : MODE == BACKWARD ? backward_bytes(a.e, a.s, sizeof(bf16))
                                : weight_bytes(a.s, sizeof(bf16), a.splits));
}

// The rung below this one: conv_kernels.cu's rows for bf16, which take every shape.
static const Backend *block_rung(void) {
    static Backend b;
    if (!b.conv_forward)
        for (int i = 0; i < n_conv_kernels; i++)
            if (conv_kernels[i].act_bytes == sizeof(bf16)) kernel_install(&b, &conv_kernels[i]);
    return &b;
}

void conv_forward_mma(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                      void *work) {
    MmaArgs a = {(const bf16 *)x, NULL, forward_epilogue(e), b, NULL, s, 1};
    if (mma_takes(s)) a.w = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (a.w && all_aligned(e, x, a.w, b))
        mma_launch<FORWARD>(a, (size_t)s.B * s.T, s.O, 1);
    else
        block_rung()->conv_forward(x, w, b, e, s, work);
}

void conv_backward_input_mma(const act *dy, const real *w, Epilogue e, ConvShape s, void *work) {
    MmaArgs a = {(const bf16 *)dy, NULL, e, NULL, NULL, s, 1};
    if (mma_takes(s)) a.w = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (a.w && all_aligned(e, dy, a.w, NULL))
        mma_launch<BACKWARD>(a, (size_t)s.B * s.T, s.C, 1);
    else
        block_rung()->conv_backward_input(dy, w, e, s, work);
}

// Tiles of dw, and the splits of the rows, of at least 256 each, that make enough blocks of them.
static size_t mma_tiles(int K, int C, int O) {
    return K * ceil_div(C, MMA_TILE) * ceil_div(O, MMA_TILE);
}
static int mma_splits(ConvShape s) {
    size_t splits = MMA_BLOCKS / mma_tiles(s.K, s.C, s.O);
    size_t most = ceil_div((size_t)s.B * s.T, 8 * MMA_STEP);
    return splits < 1 ? 1 : (int)(splits < most ? splits : most);
}

void conv_backward_weight_mma(const WeightJob *jobs, int n, ConvShape s, void *work) {
    bool takes = mma_takes(s) && aligned16(work);
    for (int i = 0; i < n; i++)
        takes = takes && aligned16(jobs[i].x) && aligned16(jobs[i].dy);
    if (!takes) {
        block_rung()->conv_backward_weight(jobs, n, s, work);
        return;
    }
    size_t weights = (size_t)s.K * s.C * s.O;
    for (int i = 0; i < n; i++) {  // one after the other: they share the workspace
        MmaArgs a = {(const bf16 *)jobs[i].x, (const bf16 *)jobs[i].dy, Epilogue(), NULL,
                     (float *)work, s, mma_splits(s)};
        a.s.dil = jobs[i].dil;
        mma_launch<WEIGHTS>(a, (size_t)s.C, s.O, s.K * a.splits);
        mma_add_splits<<<(unsigned)ceil_div(weights + s.O, 256), 256, 0, gpu_stream>>>(
            jobs[i].dw, jobs[i].db, a.part, weights, s.O, a.splits);
        LAUNCHED("mma_add_splits", 0, splits_bytes(s, a.splits));
    }
}

// At most MMA_BLOCKS tiles of partial sums, or one for each tile of dw.
size_t mma_work_bytes(size_t N, int K, int width) {
    size_t splits = ceil_div(N, 256), tiles = mma_tiles(K, width, width), blocks = tiles * splits;
    if (blocks > MMA_BLOCKS) blocks = tiles > MMA_BLOCKS ? tiles : (size_t)MMA_BLOCKS;
    return blocks * (MMA_TILE * MMA_TILE + MMA_TILE) * sizeof(float);
}
