// conv_kernels.cu: the causal dilated convolution on a GPU, from the plain loops to register tiles.
//
// Three operations (forward, backward to the input, backward to the weights) on three rungs of a
// ladder: naive, tile, block. All have the signature of their entry in Backend and take any B, T,
// C, O, K, dil. Read first: model.h (the letters), support/backend.h (the contracts), and layers.c:
// the naive kernels are its plain_conv_forward, plain_conv_backward_input and
// plain_conv_backward_weight with a thread per output. Sizes are the caller's to check. The
// rungs on tensor cores are in fast/. The rungs of this file are the table at its end; run
//   make check-kernels            # every rung against the CPU, then timed, side by side
//
//   forward looks back:    sum[t] = b + sum_k x[t - k*dil] w[k]         zero where t - k*dil < 0
//   backward looks ahead:  dx[t]  =     sum_k dy[t + k*dil] w[k]^T      zero where t + k*dil >= T
//
//     dil = 4, K = 3        x   o-------o-------o            dy  o-------o-------o
//                                        \   \   \               /   /   /
//                        sum                    t           dx  t
//                 a tile reads [ halo (K-1)*dil | TILE ]         [ TILE | halo (K-1)*dil ]
//
// Both are matrix products over K*C (or K*O) terms, whose left operand is x (or dy) moved by whole
// rows: a tap costs no copy, only another row address. The weight gradient is the third product,
// summed over time:  dw[k] = sum_t x[t - k*dil]^T dy[t].
//
// The count, for the paper's layer at B x T = 32 x 1024, C = O = 256, K = 3 (N = B*T = 32768):
//   2*N*K*C*O = 12.9 GFLOP;   x, pre, out, weights once each = 101 MB.
// The H100 measured here does 64 TFLOP/s of float32 multiply-adds and copies at 3 TB/s: 0.20 ms
// against 0.03 ms, so arithmetic is the floor, and every rung is about keeping the multiply-adders
// fed. Times below: that GPU, that layer with dil = 4, bias and GELU included, no dropout.
//                    forward            to the input       to the weights
//   naive       3.86 ms   3.3 TFLOP/s   25.5 ms   0.5      14.1 ms   0.9
//   tile        1.49 ms   8.6           1.47 ms   8.8      2.92 ms   4.4
//   block       0.336 ms  38.3          0.410 ms  31.4     0.311 ms  41.4
//   cuBLAS on the bare product of that size: 43 to 47 TFLOP/s
//
// Words of CUDA: a kernel is launched as a grid of blocks of threads. A block runs on one of the
// GPU's multiprocessors (SMs). Its threads share fast memory there (__shared__) and can wait for
// one another (__syncthreads). 32 threads with neighbouring threadIdx.x are a warp: they run the
// same instruction at the same time. Where they read 32 neighbouring float32, memory moves one line
// of 128 bytes instead of 32 lines.
#include "support/device.cuh"

// ---- The epilogue: what a kernel does with its sums ---------------------------------------------
//
// Every rung ends in these functions, so the activations need no pass over memory of their own. T:
// what activations are stored as, float or bf16. `width`: channels of a row of all arrays in e.

// Row n, channel o:  pre = sum + b, or what dropout leaves;  out = residual + scale * f(pre)
template <typename T>
static __device__ void epilogue_forward(const Epilogue &e, const float *b, float sum, size_t n,
                                        int o, int width) {
    size_t i = n * width + o;
    bool dropped = e.drop.threshold != 0 &&
                   dropout_takes(e.drop, dropout_word(e.drop, n, o, width), o % 4);
    // Rounded as it is stored first, so that backward differentiates what forward computed.
    T stored = (T)(dropped ? act_dropped(e.activation) : sum + (b ? b[o] : 0));
    if (e.pre) ((T *)e.pre)[i] = stored;
    if (!e.out) return;
    float y = dropped ? 0 : e.drop.scale * act_value(e.activation, stored);
    ((T *)e.out)[i] = (T)(e.residual ? (float)((const T *)e.residual)[i] + y : y);
}

// forward, of the layer below:  x = residual + scale * f(pre)
// The sum is dx, so by the chain rule dpre = dx * scale * f'(pre). out, scale * f(pre), is
// recomputed for the layer's weight gradient.
template <typename T>
static __device__ void epilogue_backward(const Epilogue &e, float sum, size_t n, int c,
                                         int width) {
    size_t i = n * width + c;
    T *dx = (T *)e.dx, *pre = (T *)e.pre, *out = (T *)e.out;
    if (e.accumulate) sum += (float)dx[i];
    if (dx) dx[i] = (T)sum;
    if (!pre) return;
    float value, slope;
    value_and_slope(e.activation, pre[i], &value, &slope);
    if (out) out[i] = (T)(e.drop.scale * value);
    pre[i] = (T)(sum * e.drop.scale * slope);
}

// ---- Rung 1: naive ------------------------------------------------------------------------------
//
// The loops of layers.c, whose two outer ones, over rows n and channels o, have become threads: one
// thread per output. Neighbouring threads have neighbouring channels o. So a warp reads 32
// neighbouring weights, one line of 128 bytes, and one input value, the same for all its threads.
// Cost: two loads for every multiply-add. Every input is fetched by O threads, every weight by N:
// 2*4*N*K*C*O = 52 GB through the caches for 0.1 GB of data, so the load units are the bound.
// Measured: 3.86 ms, 5 % of the multiply-adders' rate.

// plain_conv_forward (layers.c), but that b is added after the sum, in the epilogue.
__global__ void forward_naive(const float *x, const float *w, const float *b, Epilogue e,
                              ConvShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)s.B * s.T * s.O) return;
    int n = (int)(i / s.O), o = (int)(i % s.O), t = n % s.T;  // n: row of all B*T;  t: its time
    float sum = 0;
    for (int k = 0; k < s.K && t - k * s.dil >= 0; k++) {
        const float *x_s = x + (size_t)(n - k * s.dil) * s.C;  // the row k*dil before row n
        const float *w_k = w + (size_t)k * s.C * s.O;
        for (int c = 0; c < s.C; c++) sum += x_s[c] * w_k[(size_t)c * s.O + o];
    }
    epilogue_forward<float>(e, b, sum, n, o, s.O);
}

// plain_conv_backward_input (layers.c): x[s,c] went into sum[t,o] of every later t = s + k*dil.
// forward:  sum[t,o] += x[t - k*dil, c] * w[k,c,o]
// Neighbouring threads have neighbouring c, so a warp's weights lie O values apart: 32 lines for 32
// values, and 25.5 ms. A row past the sequence's end belongs to the next sequence, or to nobody:
// the loop over k ends before it.
__global__ void backward_input_naive(const float *dy, const float *w, Epilogue e, ConvShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)s.B * s.T * s.C) return;
    int n = (int)(i / s.C), c = (int)(i % s.C), t = n % s.T;
    float sum = 0;
    for (int k = 0; k < s.K && t + k * s.dil < s.T; k++) {
        const float *dy_t = dy + (size_t)(n + k * s.dil) * s.O;  // the row k*dil after row n
        const float *w_kc = w + ((size_t)k * s.C + c) * s.O;
        for (int o = 0; o < s.O; o++) sum += dy_t[o] * w_kc[o];
    }
    epilogue_backward<float>(e, sum, n, c, s.C);
}

// plain_conv_backward_weight (layers.c), one layer, a thread per weight:
// forward:  sum[t,o] += x[t - k*dil, c] * w[k,c,o],   sum[t,o] += b[o]
// Each thread walks all rows; the last O threads compute the bias' gradient. Neighbouring threads
// have neighbouring o: dy is read in whole lines, x at one address. C = O = 256 make 196,864
// threads, each with 32768 additions in a row: 14.1 ms.
__global__ void backward_weight_naive(float *dw, float *db, const float *x, const float *dy,
                                      ConvShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, weights = (size_t)s.K * s.C * s.O;
    int N = s.B * s.T, o = (int)(i % s.O);
    float sum = 0;
    if (i >= weights + (db ? s.O : 0)) return;
    if (i >= weights) {
        for (int n = 0; n < N; n++) sum += dy[(size_t)n * s.O + o];
        db[o] += sum;
        return;
    }
    int c = (int)(i / s.O % s.C), back = (int)(i / s.O / s.C) * s.dil;
    for (int n = 0; n < N; n++)
        if (n % s.T >= back) sum += x[(size_t)(n - back) * s.C + c] * dy[(size_t)n * s.O + o];
    dw[i] += sum;
}

static void conv_forward_naive(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                               void *work) {
    (void)work;
    size_t n = (size_t)s.B * s.T * s.O;
    e = forward_epilogue(e);
    forward_naive<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>((const float *)x, w, b, e, s);
    LAUNCHED("forward_naive", conv_flops(s), forward_bytes(e, s, sizeof(float)));
}

static void conv_backward_input_naive(const act *dy, const real *w, Epilogue e, ConvShape s,
                                      void *work) {
    (void)work;
    size_t n = (size_t)s.B * s.T * s.C;
    backward_input_naive<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>((const float *)dy, w,
                                                                             e, s);
    LAUNCHED("backward_input_naive", conv_flops(s), backward_bytes(e, s, sizeof(float)));
}

static void conv_backward_weight_naive(const WeightJob *jobs, int n_jobs, ConvShape s,
                                       void *work) {
    (void)work;
    size_t n = (size_t)s.K * s.C * s.O + (size_t)s.O;
    for (const WeightJob *j = jobs; j < jobs + n_jobs; j++) {
        s.dil = j->dil;
        backward_weight_naive<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>(
            j->dw, j->db, (const float *)j->x, (const float *)j->dy, s);
        LAUNCHED("backward_weight_naive", conv_flops(s), weight_bytes(s, sizeof(float), 1));
    }
}

// ---- Rung 2: tile, the paper's 2D channel tiling ------------------------------------------------
//
// Bound before: every operand of every multiply-add was fetched from the caches.
// Idea: a block owns TILE times x TILE output channels. It brings TILE x TILE inputs and TILE x
// TILE weights into shared memory together and uses each of them TILE times.
// Saved: 32 times fewer loads from the caches, 1.6 GB instead of 52.
// Cost: two barriers per tile, and still two shared-memory loads for every multiply-add: shared
// memory serves one warp's load per cycle where the SM could start four multiply-adds.
// Measured: 3.86 -> 1.49 ms forward, 25.5 -> 1.47 ms to the input, whose weight tile is
// transposed on its way.
// Where a tap's source row lies outside the sequence, row 0 of the sequence is addressed, which
// exists, and zero is taken instead of its value: no address outside the arrays is ever formed.
// A block's tile is (b, channel tile, time tile) as in the paper. b and the time tile share
// blockIdx.x, because blockIdx.y and z end at 65535.

enum { TILE = 32 };  // a warp's width: a row of a tile is one line of 128 bytes

// AHEAD false: forward. in = x, looks back, w_tile[c][o].
// AHEAD true: backward to the input. in = dy, looks ahead, and the weight tile is transposed as it
// is written, w_tile[o][c]: neighbouring threads then write down a column. Shared memory has 32
// banks, word i in bank i % 32, and serves one word of each at a time. Rows of TILE + 1 words put
// the words of a column into 32 different banks.
template <bool AHEAD>
__global__ void conv_tile(const float *in, const float *w, const float *bias, Epilogue e,
                          ConvShape s) {
    __shared__ float in_tile[TILE][TILE], w_tile[TILE][TILE + 1];
    int in_width = AHEAD ? s.O : s.C, out_width = AHEAD ? s.C : s.O;
    int time_tiles = (s.T + TILE - 1) / TILE, b = blockIdx.x / time_tiles;
    int t = blockIdx.x % time_tiles * TILE + threadIdx.y;  // this thread's output: row t of b,
    int j0 = blockIdx.y * TILE;                            // channel j0 + tx
    int tx = threadIdx.x, ty = threadIdx.y;                // a warp has one ty
    float sum = 0;
    for (int k = 0; k < s.K; k++) {
        int source = AHEAD ? t + k * s.dil : t - k * s.dil;
        bool inside = t < s.T && source >= 0 && source < s.T;
        const float *row = in + ((size_t)b * s.T + (inside ? source : 0)) * in_width;
        for (int i0 = 0; i0 < in_width; i0 += TILE) {
            // A warp reads 32 neighbouring values of one row, of `in` and of w.
            in_tile[ty][tx] = inside && i0 + tx < in_width ? row[i0 + tx] : 0;
            if (AHEAD) {
                int c = j0 + ty, o = i0 + tx;
                w_tile[tx][ty] = c < s.C && o < s.O ? w[((size_t)k * s.C + c) * s.O + o] : 0;
            } else {
                int c = i0 + ty, o = j0 + tx;
                w_tile[ty][tx] = c < s.C && o < s.O ? w[((size_t)k * s.C + c) * s.O + o] : 0;
            }
            __syncthreads();  // the tiles are whole before anyone reads them
            // A warp reads one value of in_tile, and of w_tile 32 neighbours, in 32 banks.
            for (int i = 0; i < TILE; i++) sum += in_tile[ty][i] * w_tile[i][tx];
            __syncthreads();  // everyone has read before the next tiles overwrite
        }
    }
    if (t >= s.T || j0 + tx >= out_width) return;
    if (AHEAD)
        epilogue_backward<float>(e, sum, (size_t)b * s.T + t, j0 + tx, out_width);
    else
        epilogue_forward<float>(e, bias, sum, (size_t)b * s.T + t, j0 + tx, out_width);
}

// dw[k,c,o] += sum_t x[t - k*dil, c] dy[t,o] for a tile of TILE c x TILE o; time is walked in steps
// of TILE rows. The block of tap 0 and channel tile 0 also sums the rows of dy that it has loaded.
// Neighbouring threads load neighbouring channels of a row. A warp multiplies one value of x by 32
// of dy.
// 8 * 8 * 3 = 192 blocks for C = O = 256, each of which walks all 32768 rows: 14.1 -> 2.92 ms.
__global__ void weight_tile(float *dw, float *db, const float *x, const float *dy, ConvShape s) {
    __shared__ float x_tile[TILE][TILE], dy_tile[TILE][TILE];
    int tx = threadIdx.x, ty = threadIdx.y, k = blockIdx.z, N = s.B * s.T, back = k * s.dil;
    int c0 = blockIdx.y * TILE, o = blockIdx.x * TILE + tx;
    float sum = 0, dy_sum = 0;
    for (int n0 = 0; n0 < N; n0 += TILE) {
        int n = n0 + ty;
        bool inside = n < N && n % s.T >= back;
        x_tile[ty][tx] = inside && c0 + tx < s.C ? x[(size_t)(n - back) * s.C + c0 + tx] : 0;
        dy_tile[ty][tx] = n < N && o < s.O ? dy[(size_t)n * s.O + o] : 0;
        dy_sum += dy_tile[ty][tx];
        __syncthreads();  // the tiles are whole before anyone reads them
        for (int i = 0; i < TILE; i++) sum += x_tile[i][ty] * dy_tile[i][tx];
        __syncthreads();  // everyone has read before the next tiles overwrite
    }
    int c = c0 + ty;
    if (c < s.C && o < s.O) dw[((size_t)k * s.C + c) * s.O + o] += sum;
    if (!db || k > 0 || c0 > 0) return;
    dy_tile[ty][tx] = dy_sum;
    __syncthreads();  // all TILE partial sums of a column are there before one thread adds them
    if (ty > 0 || o >= s.O) return;
    float total = 0;
    for (int i = 0; i < TILE; i++) total += dy_tile[i][tx];
    db[o] += total;
}

static dim3 tile_grid(ConvShape s, int width) {
    return dim3((unsigned)((size_t)s.B * ceil_div(s.T, TILE)), (unsigned)ceil_div(width, TILE));
}

static void conv_forward_tile(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                              void *work) {
    (void)work;
    e = forward_epilogue(e);
    conv_tile<false><<<tile_grid(s, s.O), dim3(TILE, TILE), 0, gpu_stream>>>((const float *)x, w, b,
                                                                             e, s);
    LAUNCHED("conv_tile forward", conv_flops(s), forward_bytes(e, s, sizeof(float)));
}

static void conv_backward_input_tile(const act *dy, const real *w, Epilogue e, ConvShape s,
                                     void *work) {
    (void)work;
    conv_tile<true><<<tile_grid(s, s.C), dim3(TILE, TILE), 0, gpu_stream>>>((const float *)dy, w,
                                                                            NULL, e, s);
    LAUNCHED("conv_tile backward", conv_flops(s), backward_bytes(e, s, sizeof(float)));
}

static void conv_backward_weight_tile(const WeightJob *jobs, int n_jobs, ConvShape s,
                                      void *work) {
    (void)work;
    dim3 grid((unsigned)ceil_div(s.O, TILE), (unsigned)ceil_div(s.C, TILE), (unsigned)s.K);
    for (const WeightJob *j = jobs; j < jobs + n_jobs; j++) {
        s.dil = j->dil;
        weight_tile<<<grid, dim3(TILE, TILE), 0, gpu_stream>>>(j->dw, j->db, (const float *)j->x,
                                                               (const float *)j->dy, s);
        LAUNCHED("weight_tile", conv_flops(s), weight_bytes(s, sizeof(float), 1));
    }
}

// ---- Rung 3: block, a tile of outputs in the registers of every thread --------------------------
//
// Bound before: two shared-memory loads for every multiply-add.
// Idea: a thread owns R x R outputs. Per channel it loads R inputs and R weights and multiplies
// all pairs: 8 + 8 values, as four 16-byte loads, for 64 multiply-adds. The tiles of the next step
// are on their way from memory into registers while this one is computed, and go into the other of
// two shared buffers: one barrier per step.
// Saved: 32 times fewer shared-memory load instructions; tiles of 128 quarter the cache traffic.
// Cost: 64 sums, 16 operands, 8 values on their way and their addresses take the 128 registers that
// 16 warps per SM leave a thread; and a small N fills few blocks of 128 x 128, so there are smaller
// tiles for that. An output's sum runs over k, then c, in order, whatever the tile: its bits do not
// depend on the choice.
// Measured: 1.49 -> 0.336 ms forward, 1.47 -> 0.410 ms to the input: 60 % and 49 % of the rate.
// Where the rest goes: 512 of 618 instructions of a step are multiply-adds; the epilogue takes
// some 80 instructions a value, dropout included. Tried and dropped: transposing the sums in shared
// memory before the epilogue (forward, dropout on, 0.348 -> 0.414 ms); DEPTH 16 for the large tile
// (it spills; weights 0.315 -> 0.369 ms).
//
// T is what x, dy and the weights are stored as. With bf16 the tiles in shared memory and the sums
// stay float32 and half as many bytes move. Not faster (0.358, 0.382 and, to the weights, 0.364
// ms), but right for any shape on any GPU: what the tensor backend runs where no rung
// on tensor cores does.

// Geometry of a tile of SIZE x SIZE outputs. A step covers DEPTH channels (or rows, for the weight
// gradient), and each thread brings LOADS float4 of either operand.
//   SIZE   R x R   threads   DEPTH   LOADS   shared memory
//    128   8 x 8       256       8       1   16,896 bytes
//     64   4 x 4       256      16       1   17,408           weight gradient only
//     32   4 x 4        64      32       4   18,432
template <int SIZE>
struct Block {
    enum {
        R = SIZE == 128 ? 8 : 4,
        SIDE = SIZE / R,  // threads along either edge
        COUNT = SIDE * SIDE,  // threads
        DEPTH = SIZE == 128 ? 8 : SIZE == 64 ? 16 : 32,
        LOADS = SIZE * DEPTH / 4 / COUNT,
        PITCH = SIZE + 4,  // keeps 16-byte alignment, halves bank conflicts of transposed stores
    };
    static_assert(LOADS * COUNT * 4 == SIZE * DEPTH, "each thread brings whole float4s");
    float a[2][DEPTH][PITCH], b[2][DEPTH][PITCH];
};

// Which outputs are mine: groups of four rows from *row on, of four columns from *column on, each
// group 4*SIDE after the one before. A warp of 4 x 8 threads reads 64 bytes of one operand and 128
// of the other per load: no bank twice.
template <int SIZE>
static __device__ void my_corner(int *row, int *column) {
    constexpr int SIDE = Block<SIZE>::SIDE, ACROSS = SIDE / 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    *row = (warp / ACROSS * 4 + lane / 8) * 4;
    *column = (warp % ACROSS * 8 + lane % 8) * 4;
}

// sum[i][j] += a[d][row i] * b[d][column j] over the DEPTH channels in shared buffer `now`.
template <int SIZE>
static __device__ void multiply_step(float (&sum)[Block<SIZE>::R][Block<SIZE>::R],
                                     const Block<SIZE> &tile, int now, int row, int column) {
    constexpr int R = Block<SIZE>::R, SIDE = Block<SIZE>::SIDE, DEPTH = Block<SIZE>::DEPTH;
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        float a[R], b[R];
#pragma unroll
        for (int g = 0; g < R / 4; g++) {
            *(float4 *)&a[4 * g] = *(const float4 *)&tile.a[now][d][row + g * 4 * SIDE];
            *(float4 *)&b[4 * g] = *(const float4 *)&tile.b[now][d][column + g * 4 * SIDE];
        }
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++) sum[i][j] += a[i] * b[j];
    }
}

// The two ways of a float4 into a tile [DEPTH][SIZE]. Straight: its four values are neighbours
// along SIZE. Transposed: they are neighbours along DEPTH.
template <int SIZE>
static __device__ void put_straight(float (&tile)[Block<SIZE>::DEPTH][Block<SIZE>::PITCH], int l,
                                    float4 v) {
    int at = threadIdx.x + l * Block<SIZE>::COUNT;
    *(float4 *)&tile[at / (SIZE / 4)][at % (SIZE / 4) * 4] = v;
}
template <int SIZE>
static __device__ void put_transposed(float (&tile)[Block<SIZE>::DEPTH][Block<SIZE>::PITCH], int l,
                                      float4 v) {
    constexpr int ROW = Block<SIZE>::DEPTH / 4;
    int at = threadIdx.x + l * Block<SIZE>::COUNT, d = at % ROW * 4, j = at / ROW;
    tile[d][j] = v.x;
    tile[d + 1][j] = v.y;
    tile[d + 2][j] = v.z;
    tile[d + 3][j] = v.w;
}

// These values as they are stored: the activation is of pre as backward will find it.
static __device__ float4 stored(float4 v, float) { return v; }
static __device__ float4 stored(float4 v, bf16) {
    return make_float4((bf16)v.x, (bf16)v.y, (bf16)v.z, (bf16)v.w);
}

// The epilogue for four neighbours of a row at once, where rows are whole groups of four: VEC. The
// activation is asked for once for all four. Neighbouring lanes have neighbouring fours, eight of
// them to a row: 128 bytes of float32. One draw of dropout decides about all four.
template <Activation f, typename T>
static __device__ void put_outputs4(T *out, float4 pre, float4 residual, float4 scale) {
    put_four(out, make_float4(residual.x + scale.x * act_value(f, pre.x),
                              residual.y + scale.y * act_value(f, pre.y),
                              residual.z + scale.z * act_value(f, pre.z),
                              residual.w + scale.w * act_value(f, pre.w)));
}
#define OUTPUTS_CASE(name)                                          \
    case ACT_##name:                                                \
        put_outputs4<ACT_##name>((T *)e.out + i, p, residual, scale); \
        break;

template <bool VEC, typename T>
static __device__ void epilogue_forward4(const Epilogue &e, const float *b, float4 sum, size_t n,
                                         int o, int width) {
    if (!VEC) {
        float v[4] = {sum.x, sum.y, sum.z, sum.w};
        for (int j = 0; j < 4; j++)
            if (o + j < width) epilogue_forward<T>(e, b, v[j], n, o + j, width);
        return;
    }
    if (o >= width) return;
    size_t i = n * width + o;
    float4 bias = b ? four(b + o) : make_float4(0, 0, 0, 0);
    float4 p = stored(make_float4(sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w),
                      T());
    float4 scale = make_float4(e.drop.scale, e.drop.scale, e.drop.scale, e.drop.scale);
    if (e.drop.threshold) {
        uint32_t word = dropout_word(e.drop, n, o, width);
        float dropped = act_dropped(e.activation);
        if (dropout_takes(e.drop, word, 0)) p.x = dropped, scale.x = 0;
        if (dropout_takes(e.drop, word, 1)) p.y = dropped, scale.y = 0;
        if (dropout_takes(e.drop, word, 2)) p.z = dropped, scale.z = 0;
        if (dropout_takes(e.drop, word, 3)) p.w = dropped, scale.w = 0;
    }
    if (e.pre) put_four((T *)e.pre + i, p);
    if (!e.out) return;
    float4 residual = e.residual ? four((const T *)e.residual + i) : make_float4(0, 0, 0, 0);
    switch (e.activation) {
        ACTIVATIONS(OUTPUTS_CASE)
    default: break;
    }
}

// *pre becomes dpre. Its old value is read by the thread that overwrites it: no other needs it.
template <Activation f, typename T>
static __device__ void put_gradients4(T *out, T *pre, float4 dx, float scale) {
    float4 p = four(pre), value, slope;
    value_and_slope(f, p.x, &value.x, &slope.x);
    value_and_slope(f, p.y, &value.y, &slope.y);
    value_and_slope(f, p.z, &value.z, &slope.z);
    value_and_slope(f, p.w, &value.w, &slope.w);
    if (out)
        put_four(out, make_float4(scale * value.x, scale * value.y, scale * value.z,
                                  scale * value.w));
    put_four(pre, make_float4(dx.x * scale * slope.x, dx.y * scale * slope.y,
                              dx.z * scale * slope.z, dx.w * scale * slope.w));
}
#define GRADIENTS_CASE(name)                                                              \
    case ACT_##name:                                                                      \
        put_gradients4<ACT_##name>(e.out ? (T *)e.out + i : NULL, (T *)e.pre + i, sum,    \
                                   e.drop.scale);                                         \
        break;

template <bool VEC, typename T>
static __device__ void epilogue_backward4(const Epilogue &e, float4 sum, size_t n, int c,
                                          int width) {
    if (!VEC) {
        float v[4] = {sum.x, sum.y, sum.z, sum.w};
        for (int j = 0; j < 4; j++)
            if (c + j < width) epilogue_backward<T>(e, v[j], n, c + j, width);
        return;
    }
    if (c >= width) return;
    size_t i = n * width + c;
    float4 old = e.accumulate ? four((const T *)e.dx + i) : make_float4(0, 0, 0, 0);
    sum = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
    if (e.dx) put_four((T *)e.dx + i, sum);
    if (!e.pre) return;
    switch (e.activation) {
        ACTIVATIONS(GRADIENTS_CASE)
    default: break;
    }
}

// One step's share of the operands: tap k, input channels i0..i0+DEPTH-1, rows n0.., outputs j0..
// A source row outside the sequence is never addressed: its values are zeros.
template <int SIZE, bool AHEAD, bool VEC, typename T>
static __device__ void fetch_step(float4 *a, float4 *b, const T *in, const T *w,
                                  const ConvShape &s, int n0, int j0, int k, int i0) {
    typedef Block<SIZE> G;
    int in_width = AHEAD ? s.O : s.C;
#pragma unroll
    for (int l = 0; l < G::LOADS; l++) {
        int at = threadIdx.x + l * G::COUNT;
        // Neighbouring lanes: neighbouring channels of one row, DEPTH/4 lanes to a row.
        int i = i0 + at % (G::DEPTH / 4) * 4, n = n0 + at / (G::DEPTH / 4), t = n % s.T;
        int shift = AHEAD ? k * s.dil : -k * s.dil;
        bool inside = n < s.B * s.T && t + shift >= 0 && t + shift < s.T;
        a[l] = load4<VEC>(inside ? in + (size_t)(n + shift) * in_width + i : in,
                          inside ? in_width - i : 0);
        if (AHEAD) {  // w[k, c, o..o+3]
            int c = j0 + at / (G::DEPTH / 4);
            b[l] = load4<VEC>(w + ((size_t)k * s.C + (c < s.C ? c : 0)) * s.O + i,
                              c < s.C ? s.O - i : 0);
        } else {  // neighbouring lanes: neighbouring outputs; SIZE/4 lanes to a row of weights
            int c = i0 + at / (SIZE / 4), o = j0 + at % (SIZE / 4) * 4;
            b[l] = load4<VEC>(w + ((size_t)k * s.C + (c < s.C ? c : 0)) * s.O + o,
                              c < s.C ? s.O - o : 0);
        }
    }
}

// Two blocks of 256 threads to a multiprocessor: up to 128 of its 65,536 registers for each thread.
template <int SIZE, bool AHEAD, bool VEC, typename T>
__global__ void __launch_bounds__(Block<SIZE>::COUNT, SIZE == 128 ? 2 : 1)
    conv_block(const T *in, const T *w, const float *bias, Epilogue e, ConvShape s, int across) {
    typedef Block<SIZE> G;
    __shared__ __align__(16) Block<SIZE> tile;
    // Blocks that share rows of `in` are neighbours, so that the second finds them in the L2 cache.
    int n0 = blockIdx.x / across * SIZE, j0 = blockIdx.x % across * SIZE;
    int in_width = AHEAD ? s.O : s.C, out_width = AHEAD ? s.C : s.O;
    int steps = s.K * ((in_width + G::DEPTH - 1) / G::DEPTH);
    int row, column, k = 0, i0 = 0;
    my_corner<SIZE>(&row, &column);
    float sum[G::R][G::R] = {};
    float4 a[G::LOADS], b[G::LOADS];
    fetch_step<SIZE, AHEAD, VEC>(a, b, in, w, s, n0, j0, 0, 0);
    for (int step = 0; step < steps; step++) {
        int now = step & 1;
#pragma unroll
        for (int l = 0; l < G::LOADS; l++) {
            put_transposed<SIZE>(tile.a[now], l, a[l]);
            if (AHEAD)
                put_transposed<SIZE>(tile.b[now], l, b[l]);
            else
                put_straight<SIZE>(tile.b[now], l, b[l]);
        }
        // The tiles are whole before anyone reads them. They are next written two steps on, after
        // the next barrier, which no one passes before having read them.
        __syncthreads();
        // Next: channels first, then taps, whose rows lie dil further on.
        i0 += G::DEPTH;
        if (i0 >= in_width) i0 = 0, k++;
        // Queued before the products, which then hide how long it takes.
        if (step + 1 < steps) fetch_step<SIZE, AHEAD, VEC>(a, b, in, w, s, n0, j0, k, i0);
        multiply_step<SIZE>(sum, tile, now, row, column);
    }
#pragma unroll
    for (int i = 0; i < G::R; i++) {
        int n = n0 + row + i / 4 * 4 * G::SIDE + i % 4;
        if (n >= s.B * s.T) continue;
#pragma unroll
        for (int g = 0; g < G::R / 4; g++) {
            float4 v = *(float4 *)&sum[i][4 * g];
            int j = j0 + column + g * 4 * G::SIDE;
            if (AHEAD)
                epilogue_backward4<VEC, T>(e, v, n, j, out_width);
            else
                epilogue_forward4<VEC, T>(e, bias, v, n, j, out_width);
        }
    }
}

// The blocks that a large GPU needs to be busy. A constant, so that a shape means the same work on
// every device.
enum { BUSY = 132 };

template <int SIZE, bool AHEAD, typename T>
static void launch_block(const T *in, const T *w, const float *bias, const Epilogue &e, ConvShape s,
                         bool vec) {
    int across = (int)ceil_div(AHEAD ? s.C : s.O, SIZE);
    unsigned blocks = (unsigned)(ceil_div((size_t)s.B * s.T, SIZE) * across);
    if (vec)
        conv_block<SIZE, AHEAD, true>
            <<<blocks, Block<SIZE>::COUNT, 0, gpu_stream>>>(in, w, bias, e, s, across);
    else
        conv_block<SIZE, AHEAD, false>
            <<<blocks, Block<SIZE>::COUNT, 0, gpu_stream>>>(in, w, bias, e, s, across);
    LAUNCHED(AHEAD ? "conv_block backward" : "conv_block forward", conv_flops(s),
             AHEAD ? backward_bytes(e, s, sizeof(T)) : forward_bytes(e, s, sizeof(T)));
}

template <bool AHEAD, typename T>
static void pick_block(const T *in, const T *w, const float *bias, const Epilogue &e,
                       ConvShape s) {
    size_t N = (size_t)s.B * s.T, width = AHEAD ? s.C : s.O;
    bool vec = s.C % 4 == 0 && s.O % 4 == 0 && aligned16(in) && aligned16(w) && aligned16(bias) &&
               aligned16(e.out) && aligned16(e.pre) && aligned16(e.dx) && aligned16(e.residual);
    // Large tiles where they reach three quarters of the multiprocessors: 6273 rows at C = 256.
    if (ceil_div(N, 128) * ceil_div(width, 128) >= BUSY * 3 / 4)
        launch_block<128, AHEAD>(in, w, bias, e, s, vec);
    else
        launch_block<32, AHEAD>(in, w, bias, e, s, vec);
}

// The weights as the activations are stored.
static const float *weights_for(float, const real *w, ConvShape, void *) { return w; }
static const bf16 *weights_for(bf16, const real *w, ConvShape s, void *work) {
    return bf16_weights(w, (size_t)s.K * s.C * s.O, work);
}

template <typename T>
static void conv_forward_block(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                               void *work) {
    pick_block<false>((const T *)x, weights_for(T(), w, s, work), b, forward_epilogue(e), s);
}

template <typename T>
static void conv_backward_input_block(const act *dy, const real *w, Epilogue e, ConvShape s,
                                      void *work) {
    pick_block<true>((const T *)dy, weights_for(T(), w, s, work), NULL, e, s);
}

// The weight gradient on the same tiles. Both operands lie with time as their rows, so both go
// straight into shared memory. There are few outputs and many terms: K*C*O/128^2 = 12 blocks for
// 132 SMs. So time is cut into splits (split-K), every block sums one of them, and a second
// kernel adds the partial sums in order; no float atomics, the same bits every run. Cost:
// splits * K*C*O values written and read once, 17 MB that stay in the L2 cache, against 67 MB of
// operands. Measured: 2.92 -> 0.311 ms, 65 % of the rate.

typedef struct {
    int size, splits, rows;  // tile, splits of time, rows in each
} WeightPlan;

// Fixed by the shape alone, because the cut is part of the result's bits.
static WeightPlan weight_plan(ConvShape s) {
    enum { BLOCKS = 2 * BUSY, LEAST_ROWS = 256 };
    size_t N = (size_t)s.B * s.T, most = ceil_div(N, LEAST_ROWS), tiles = 0;
    WeightPlan p = {128, 1, 0};
    for (;; p.size /= 2) {
        tiles = (size_t)s.K * ceil_div(s.C, p.size) * ceil_div(s.O, p.size);
        if (p.size == 32 || tiles * most >= BUSY) break;  // the largest tile that keeps all busy
    }
    size_t splits = tiles < BLOCKS ? BLOCKS / tiles : 1;
    if (splits > most) splits = most;
    p.rows = (int)(ceil_div(ceil_div(N, splits), 32) * 32);
    p.splits = (int)ceil_div(N, (size_t)p.rows);
    return p;
}

// splits * tiles <= 2*BUSY, so the partial sums of all splits take at most 2*BUSY tiles, and where
// one split is enough, none.
size_t conv_work_bytes(size_t N, int K, int width) {
    size_t splits = ceil_div(N, 256), w = (size_t)width, all = splits * K * w * w;
    size_t tiles = (size_t)2 * BUSY * 128 * 128;
    if (splits > 2 * BUSY) splits = 2 * BUSY;
    return ((all < tiles ? all : tiles) + splits * w) * sizeof(float);
}

// Rows n0..n0+DEPTH-1 of x, moved `back` rows back, and of dy. Neighbouring lanes: neighbouring
// channels, four each; a row that looks back past its sequence's first gives zeros.
template <int SIZE, bool VEC, typename T>
static __device__ void fetch_rows(float4 *a, float4 *b, const T *x, const T *dy,
                                  const ConvShape &s, int n0, int n_end, int c0, int o0, int back) {
    typedef Block<SIZE> G;
#pragma unroll
    for (int l = 0; l < G::LOADS; l++) {
        int at = threadIdx.x + l * G::COUNT;
        int n = n0 + at / (SIZE / 4), j = at % (SIZE / 4) * 4;  // SIZE/4 lanes to a row
        bool here = n < n_end, inside = here && n % s.T >= back;
        a[l] = load4<VEC>(inside ? x + (size_t)(n - back) * s.C + c0 + j : x,
                          inside ? s.C - c0 - j : 0);
        b[l] = load4<VEC>(here ? dy + (size_t)n * s.O + o0 + j : dy, here ? s.O - o0 - j : 0);
    }
}

// sum over the block's threads of what each has of column j of dy: db, or a split's part of it.
template <int SIZE>
static __device__ void store_bias(float *db, bool add, float4 mine, float *shared, int o0, int O) {
    constexpr int ROWS = Block<SIZE>::COUNT / (SIZE / 4);
    static_assert(sizeof(Block<SIZE>) >= ROWS * SIZE * sizeof(float), "the sums fit");
    __syncthreads();  // the last tiles have been read before the sums overwrite them
    *(float4 *)&shared[threadIdx.x * 4] = mine;
    __syncthreads();  // all rows of partial sums are there before a column is added up
    for (int j = threadIdx.x; j < SIZE && o0 + j < O; j += Block<SIZE>::COUNT) {
        float total = 0;
        for (int r = 0; r < ROWS; r++) total += shared[r * SIZE + j];
        db[o0 + j] = add ? db[o0 + j] + total : total;
    }
}

// part (splits, K*C*O + O) takes every split's sums. One split alone adds to dw and db directly.
template <int SIZE, bool VEC, typename T>
__global__ void __launch_bounds__(Block<SIZE>::COUNT, SIZE == 128 ? 2 : 1)
    weight_block(float *dw, float *db, float *part, const T *x, const T *dy, ConvShape s,
                 WeightPlan p) {
    typedef Block<SIZE> G;
    __shared__ __align__(16) Block<SIZE> tile;
    int across = (s.O + SIZE - 1) / SIZE, down = (s.C + SIZE - 1) / SIZE, at = blockIdx.x;
    int o0 = at % across * SIZE, c0 = at / across % down * SIZE;
    int k = at / across / down % s.K, split = at / across / down / s.K;
    int n0 = split * p.rows, N = s.B * s.T, n_end = n0 + p.rows < N ? n0 + p.rows : N;
    int row, column, now = 0;
    my_corner<SIZE>(&row, &column);
    float sum[G::R][G::R] = {};
    // dy_sum: of four columns, over the rows that this thread brings, for db. The blocks of
    // tap 0 and of the first channels alone store it.
    float4 a[G::LOADS], b[G::LOADS], dy_sum = make_float4(0, 0, 0, 0);
    fetch_rows<SIZE, VEC>(a, b, x, dy, s, n0, n_end, c0, o0, k * s.dil);
    for (; n0 < n_end; n0 += G::DEPTH, now ^= 1) {
#pragma unroll
        for (int l = 0; l < G::LOADS; l++) {
            put_straight<SIZE>(tile.a[now], l, a[l]);
            put_straight<SIZE>(tile.b[now], l, b[l]);
            dy_sum.x += b[l].x, dy_sum.y += b[l].y, dy_sum.z += b[l].z, dy_sum.w += b[l].w;
        }
        __syncthreads();  // the tiles are whole; they are next written two steps on (conv_block)
        if (n0 + G::DEPTH < n_end)
            fetch_rows<SIZE, VEC>(a, b, x, dy, s, n0 + G::DEPTH, n_end, c0, o0, k * s.dil);
        multiply_step<SIZE>(sum, tile, now, row, column);
    }
    size_t weights = (size_t)s.K * s.C * s.O;
    bool add = p.splits == 1;
    float *to_w = add ? dw : part + (size_t)split * (weights + s.O);
    float *to_b = add ? db : to_w + weights;
#pragma unroll
    for (int i = 0; i < G::R; i++) {
        int c = c0 + row + i / 4 * 4 * G::SIDE + i % 4;
        if (c >= s.C) continue;
#pragma unroll
        for (int g = 0; g < G::R / 4; g++) {
            int o = o0 + column + g * 4 * G::SIDE, left = s.O - o;
            float *to = to_w + ((size_t)k * s.C + c) * s.O + o;
            float4 old = load4<VEC>(to, add ? left : 0);  // zeros where partial sums are written
            store4<VEC>(to, make_float4(old.x + sum[i][4 * g], old.y + sum[i][4 * g + 1],
                                        old.z + sum[i][4 * g + 2], old.w + sum[i][4 * g + 3]),
                        left);
        }
    }
    if (db && k == 0 && c0 == 0) store_bias<SIZE>(to_b, add, dy_sum, &tile.a[0][0][0], o0, s.O);
}

// dw += the partial sums of all splits, db likewise, split by split. A thread per weight;
// neighbouring threads have neighbouring weights. The loads of eight splits are on their way at a
// time, but they are added in order.
__global__ void add_splits(float *dw, float *db, const float *part, size_t weights, int O,
                           int splits) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= weights + (db ? O : 0)) return;
    float sum = 0;
#pragma unroll 8
    for (int split = 0; split < splits; split++) sum += part[split * (weights + O) + i];
    if (i < weights)
        dw[i] += sum;
    else
        db[i - weights] += sum;
}

template <int SIZE, typename T>
static void launch_weight(float *dw, float *db, float *part, const T *x, const T *dy, ConvShape s,
                          WeightPlan p) {
    unsigned blocks = (unsigned)(ceil_div(s.O, SIZE) * ceil_div(s.C, SIZE) * s.K * p.splits);
    if (s.C % 4 == 0 && s.O % 4 == 0 && aligned16(x) && aligned16(dy) && aligned16(dw))
        weight_block<SIZE, true>
            <<<blocks, Block<SIZE>::COUNT, 0, gpu_stream>>>(dw, db, part, x, dy, s, p);
    else
        weight_block<SIZE, false>
            <<<blocks, Block<SIZE>::COUNT, 0, gpu_stream>>>(dw, db, part, x, dy, s, p);
    LAUNCHED("weight_block", conv_flops(s), weight_bytes(s, sizeof(T), p.splits));
}

template <typename T>
static void one_weight_block(const WeightJob *j, ConvShape s, float *part) {
    WeightPlan p = weight_plan(s);
    const T *x = (const T *)j->x, *dy = (const T *)j->dy;
    if (p.size == 128)
        launch_weight<128>(j->dw, j->db, part, x, dy, s, p);
    else if (p.size == 64)
        launch_weight<64>(j->dw, j->db, part, x, dy, s, p);
    else
        launch_weight<32>(j->dw, j->db, part, x, dy, s, p);
    if (p.splits == 1) return;
    size_t weights = (size_t)s.K * s.C * s.O;
    add_splits<<<blocks_for(weights + s.O, THREADS), THREADS, 0, gpu_stream>>>(
        j->dw, j->db, part, weights, s.O, p.splits);
    LAUNCHED("add_splits", 0, splits_bytes(s, p.splits));
}

template <typename T>
static void conv_backward_weight_block(const WeightJob *jobs, int n, ConvShape s, void *work) {
    for (int i = 0; i < n; i++) {  // one after the other: they share the workspace
        s.dil = jobs[i].dil;
        one_weight_block<T>(&jobs[i], s, (float *)work);
    }
}

// ---- The table ----------------------------------------------------------------------------------

const Kernel conv_kernels[] = {
    KERNEL(float, conv_forward, conv_forward_naive, "naive", "plain loops, a thread per output"),
    KERNEL(float, conv_forward, conv_forward_tile, "", "32x32 tiles in shared memory"),
    KERNEL_PAIR(conv_forward, conv_forward_block, "8x8 outputs in a thread's registers"),
    KERNEL(float, conv_backward_input, conv_backward_input_naive, "naive", "a thread per input"),
    KERNEL(float, conv_backward_input, conv_backward_input_tile, "", "32x32 tiles, looking ahead"),
    KERNEL_PAIR(conv_backward_input, conv_backward_input_block,
                "8x8 inputs in a thread's registers"),
    KERNEL(float, conv_backward_weight, conv_backward_weight_naive, "naive", "a thread per weight"),
    KERNEL(float, conv_backward_weight, conv_backward_weight_tile, "", "32x32 tiles of weights"),
    KERNEL_PAIR(conv_backward_weight, conv_backward_weight_block,
                "8x8 weights in registers, splits of time"),
};
const int n_conv_kernels = sizeof conv_kernels / sizeof *conv_kernels;
