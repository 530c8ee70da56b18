// inputs.cu: inputs and skips on a GPU, naive and tiled. Read inputs.c first: it says what is
// computed, and its loops are the naive kernels', with a thread per value. The tiled ones are
// templates on the activations and serve `tiled` (float32) and `tensor` (bf16).
//
// All of these move arrays and compute little: memory is the bound. At 32768 rows of 256 channels
// an array is 16.8 MB in bf16, 5.7 us to read or to write (layers.cu). No kernel adds floats
// atomically: sums over rows go through partial sums, at places fixed by the shape, added in order.
// Run by:  ./train --device cuda --kernels naive|tiled|tensor --units "smear bigrams conv:2:1"
#include "support/device.cuh"

// W neighbours, 8 or 1.
template <int W, typename T>
static inline __device__ void load_some(float v[W], const T *p) {
    if constexpr (W == 8) load_eight(v, p);
    else v[0] = (float)*p;
}
template <int W, typename T>
static inline __device__ void store_some(T *p, const float v[W]) {
    if constexpr (W == 8) store_eight(p, v);
    else *p = (T)v[0];
}

// ---- Smear and skip: one kernel for both, as both weigh another row's channels ------------------
//
//   smear   out[n] = x[n] + g (x[n-1] - x[n])    g = sigmoid(w), x[n-1] = 0 where a window begins
//   skip    out[n] = x[n] + w from[n]            out may be x

template <bool SMEAR>
static inline __device__ float blend(float x, float other, float g) {  // g: skip's w
    return SMEAR ? x + g * (other - x) : x + g * other;
}

template <bool SMEAR>
__global__ void blend_naive(float *out, const float *x, const float *from, const float *w, size_t N,
                            int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    float other = !SMEAR ? from[i] : i / C % T ? x[i - C] : 0;
    out[i] = blend<SMEAR>(x[i], other, SMEAR ? smear_gate(w[i % C]) : w[i % C]);
}

// tiled: a warp takes a row, or four neighbouring ones to smear; a lane W neighbouring channels of
// each, neighbouring lanes next to each other. All loads come before the first use, and a gate's
// exponential serves four rows. Bytes: smear x once, as the row before is in registers but for the
// first, and out, 33.6 MB; skip x, from and out, 50 MB.
// Bound before: 4 bytes a thread and load, an exponential a value.
// Measured, 32768 rows of 256 in bf16 (gpu_time, 2026-11-25): smear 15.5 us with a row a warp, now
// 10.1; skip 12.0, more than a copy's rate, as L2 has some of it.
template <bool SMEAR>
constexpr int rows_at_once = SMEAR ? 4 : 1;

template <bool SMEAR, int W, typename A>
__global__ void blend_rows(A *out, const A *x, const A *from, const float *w, size_t N, int T,
                           int C) {
    begin_dependent();
    constexpr int ROWS = rows_at_once<SMEAR>;
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    for (int c = W * (threadIdx.x % 32); c < C && n0 < N; c += 32 * W) {
        float v[ROWS][W], other[W] = {};  // of the first row
        if (!SMEAR || (unsigned)n0 % (unsigned)T > 0)
            load_some<W>(other, SMEAR ? x + (n0 - 1) * C + c : from + n0 * C + c);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (n0 + r < N) load_some<W>(v[r], x + (n0 + r) * C + c);
        float g[W], y[W];
        for (int j = 0; j < W; j++) g[j] = SMEAR ? smear_gate(w[c + j]) : w[c + j];
#pragma unroll
        for (int r = 0; r < ROWS && n0 + r < N; r++) {
            const bool begins = SMEAR && (unsigned)(n0 + r) % (unsigned)T == 0;
            for (int j = 0; j < W; j++) y[j] = blend<SMEAR>(v[r][j], begins ? 0 : other[j], g[j]);
            store_some<W>(out + (n0 + r) * C + c, y);
            for (int j = 0; j < W; j++) other[j] = v[r][j];
        }
    }
}

// The gradients. d = dout[n]:
//   smear   dx[n] = d + g (dout[n+1] - d)       dw += d (x[n-1] - x[n]) g (1-g)
//   skip    kept[n] = d                         dw += d from[n]
template <bool SMEAR>
__global__ void blend_rows_backward_naive(float *dx, const float *dout, const float *w, size_t N,
                                          int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    float d = dout[i], next = SMEAR && i / C % T + 1 < T ? dout[i + C] : 0;
    dx[i] = SMEAR ? d + smear_gate(w[i % C]) * (next - d) : d;
}
template <bool SMEAR>
__global__ void blend_columns_naive(float *dw, const float *dout, const float *x, const float *w,
                                    size_t N, int T, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0, g = SMEAR ? smear_gate(w[c]) : 0;
    for (size_t n = 0; n < N; n++) {
        float other = x[n * C + c];
        if (SMEAR) other = (n % T ? x[(n - 1) * C + c] : 0) - other;
        sum += dout[n * C + c] * other;
    }
    dw[c] += SMEAR ? sum * g * (1 - g) : sum;
}

// tiled: a block takes BLEND_ROWS rows and 32 W channels, its eight warps a row each in turn; a
// lane sums its own channels, and the warps' sums meet in shared memory. Bytes: smear dout and x
// once (their neighbours are in L1), dx: 50 MB; skip the same. Partial sums: 512 blocks * C floats.
// Measured: smear 24.0 us (30.7 with 48 rows a block, one at a time), skip 21.9; 72 and 79 % of a
// copy's rate. 64 rows leave 32768 of them to one wave of blocks, four to a multiprocessor.
enum { BLEND_ROWS = 8 * WARPS, MANY = 8192 };
static int blend_rows_of(size_t N) { return N < MANY ? (int)WARPS : (int)BLEND_ROWS; }

template <bool SMEAR, int W, typename A>
__global__ void __launch_bounds__(THREADS, 4)
blend_backward(A *__restrict__ dx, float *part, const A *__restrict__ dout,
               const A *__restrict__ x, const float *w, size_t N, int T, int C, int rows) {
    begin_dependent();
    __shared__ float sums[WARPS][32 * W];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int c0 = blockIdx.y * 32 * W, c = c0 + W * lane;
    const size_t begin = (size_t)blockIdx.x * rows, end = begin + rows < N ? begin + rows : N;
    float g[W] = {}, sum[W] = {};
    for (int j = 0; SMEAR && j < W && c < C; j++) g[j] = smear_gate(w[c + j]);
#pragma unroll 2
    for (size_t n = begin + warp; n < end && c < C; n += WARPS) {
        const unsigned t = (unsigned)n % (unsigned)T;
        float d[W], next[W] = {}, v[W], before[W] = {};
        load_some<W>(d, dout + n * C + c);
        load_some<W>(v, x + n * C + c);
        if (SMEAR && t > 0) load_some<W>(before, x + (n - 1) * C + c);
        if (SMEAR && t + 1 < T) load_some<W>(next, dout + (n + 1) * C + c);
        for (int j = 0; j < W; j++) {
            sum[j] += d[j] * (SMEAR ? before[j] - v[j] : v[j]);
            if (SMEAR) d[j] += g[j] * (next[j] - d[j]);
        }
        store_some<W>(dx + n * C + c, d);
    }
    for (int j = 0; j < W; j++) sums[warp][W * lane + j] = sum[j];
    __syncthreads();  // all eight warps' sums are there
    int i = threadIdx.x;
    if (i >= 32 * W || c0 + i >= C) return;
    float all = 0;
    for (int u = 0; u < WARPS; u++) all += sums[u][i];
    part[(size_t)blockIdx.x * C + c0 + i] = all;
}

// dw[c] += the blocks' sums of column c. A block takes 32 columns; 32 lines of threads add every
// 32nd block's sum, then halves are added to halves.
template <bool SMEAR>
__global__ void blend_columns(float *dw, const float *part, const float *w, size_t blocks, int C) {
    begin_dependent();
    __shared__ float sums[32][32];
    const int tx = threadIdx.x, ty = threadIdx.y, c = blockIdx.x * 32 + tx;
    float sum = 0;
#pragma unroll 4
    for (size_t b = ty; b < blocks; b += 32)
        if (c < C) sum += part[b * C + c];
    sums[ty][tx] = sum;
    for (int half = 16; half > 0; half /= 2) {
        __syncthreads();  // the sums of the round before are there
        if (ty < half) sums[ty][tx] += sums[ty + half][tx];
    }
    if (ty > 0 || c >= C) return;
    float g = SMEAR ? smear_gate(w[c]) : 0;
    dw[c] += SMEAR ? sums[0][tx] * g * (1 - g) : sums[0][tx];
}

// The launchers of both, from naive to the kernel that a shape and its addresses allow.
template <bool SMEAR, typename A>
static void launch_blend(act *out, const act *x, const act *from, const real *w, size_t N, int T,
                         int C) {
    const char *name = SMEAR ? "smear_forward_tiled" : "skip_forward_tiled";
    const unsigned blocks = blocks_for(N, WARPS * rows_at_once<SMEAR>);
    if (C % 8 == 0 && aligned16(out) && aligned16(x) && aligned16(from))
        LAUNCH((blend_rows<SMEAR, 8, A>), blocks, THREADS, (A *)out, (const A *)x,
               (const A *)from, w, N, T, C);
    else
        LAUNCH((blend_rows<SMEAR, 1, A>), blocks, THREADS, (A *)out, (const A *)x,
               (const A *)from, w, N, T, C);
    LAUNCHED(name, 0, (SMEAR ? 2 : 3) * array_bytes(sizeof(A), N, C));
}

template <bool SMEAR, typename A>
static void launch_backward(act *dx, real *dw, const act *dout, const act *x, const real *w,
                            size_t N, int T, int C, void *work) {
    const int rows = blend_rows_of(N);
    const size_t blocks = ceil_div(N, rows);
    float *part = (float *)work;
    if (C % 8 == 0 && aligned16(dx) && aligned16(dout) && aligned16(x))
        LAUNCH((blend_backward<SMEAR, 8, A>), dim3((unsigned)blocks, blocks_for(C, 256)), THREADS,
               (A *)dx, part, (const A *)dout, (const A *)x, w, N, T, C, rows);
    else
        LAUNCH((blend_backward<SMEAR, 1, A>), dim3((unsigned)blocks, blocks_for(C, 32)), THREADS,
               (A *)dx, part, (const A *)dout, (const A *)x, w, N, T, C, rows);
    LAUNCHED(SMEAR ? "smear_backward_tiled" : "skip_backward_tiled", 0,
             3 * array_bytes(sizeof(A), N, C) + 4.0 * blocks * C);
    LAUNCH(blend_columns<SMEAR>, blocks_for(C, 32), dim3(32, 32), dw, part, w, blocks, C);
    LAUNCHED("blend_columns", 0, 4.0 * (blocks + 2) * C);
}

template <bool SMEAR>
static void launch_backward_naive(act *dx, real *dw, const act *dout, const act *x, const real *w,
                                  size_t N, int T, int C) {
    blend_rows_backward_naive<SMEAR><<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)dx, (const float *)dout, w, N, T, C);
    LAUNCHED("blend_rows_backward_naive", 0, 2 * array_bytes(sizeof(float), N, C));
    blend_columns_naive<SMEAR><<<blocks_for(C, THREADS), THREADS, 0, gpu_stream>>>(
        dw, (const float *)dout, (const float *)x, w, N, T, C);
    LAUNCHED("blend_columns_naive", 0, 2 * array_bytes(sizeof(float), N, C));
}

static void smear_forward_naive(act *out, const act *x, const real *gate, int B, int T, int C) {
    size_t N = (size_t)B * T;
    blend_naive<true><<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)out, (const float *)x, NULL, gate, N, T, C);
    LAUNCHED("smear_forward_naive", 0, 2 * array_bytes(sizeof(float), N, C));
}
static void skip_forward_naive(act *x, const act *from, const real *scale, size_t N, int C) {
    blend_naive<false><<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)x, (const float *)x, (const float *)from, scale, N, 1, C);
    LAUNCHED("skip_forward_naive", 0, 3 * array_bytes(sizeof(float), N, C));
}
static void smear_backward_naive(act *dx, real *dgate, const act *dout, const act *x,
                                 const real *gate, int B, int T, int C, void *work) {
    (void)work;
    launch_backward_naive<true>(dx, dgate, dout, x, gate, (size_t)B * T, T, C);
}
static void skip_backward_naive(act *kept, real *dscale, const act *dx, const act *from, size_t N,
                                int C, void *work) {
    (void)work;
    launch_backward_naive<false>(kept, dscale, dx, from, NULL, N, 1, C);
}
template <typename A>
static void smear_forward_tiled(act *out, const act *x, const real *gate, int B, int T, int C) {
    launch_blend<true, A>(out, x, NULL, gate, (size_t)B * T, T, C);
}
template <typename A>
static void skip_forward_tiled(act *x, const act *from, const real *scale, size_t N, int C) {
    launch_blend<false, A>(x, x, from, scale, N, 1, C);
}
template <typename A>
static void smear_backward_tiled(act *dx, real *dgate, const act *dout, const act *x,
                                 const real *gate, int B, int T, int C, void *work) {
    launch_backward<true, A>(dx, dgate, dout, x, gate, (size_t)B * T, T, C, work);
}
template <typename A>
static void skip_backward_tiled(act *kept, real *dscale, const act *dx, const act *from, size_t N,
                                int C, void *work) {
    launch_backward<false, A>(kept, dscale, dx, from, NULL, N, 1, C, work);
}

// ---- Look-ups -----------------------------------------------------------------------------------

static double lookup_bytes(LookupShape s, size_t size) {
    return array_bytes(size, (size_t)s.B * s.T, s.D) + 4.0 * s.B * s.T;
}

// A thread per W values, neighbours next to each other in out and in the table's row: 2.1 MB of
// out for 32768 rows of 32 in bf16, 2.0 us. naive is the same with W = 1.
template <int W, typename A>
__global__ void lookup_values(A *out, const int *ids, const float *table, LookupShape s) {
    begin_dependent();
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, per_row = s.D / W;
    const size_t n = i / per_row;
    if (n >= (size_t)s.B * s.T) return;
    const int key = lookup_key(ids, n, s), c = W * (int)(i % per_row);
    float v[W] = {};
    if (key >= 0) load_some<W>(v, table + (size_t)key * s.D + c);
    store_some<W>(out + n * s.D + c, v);
}

template <int W, typename A>
static void launch_lookup(const char *name, act *out, const int *ids, const real *table,
                          LookupShape s) {
    size_t threads = (size_t)s.B * s.T * (s.D / W);
    LAUNCH((lookup_values<W, A>), blocks_for(threads, THREADS), THREADS, (A *)out, ids, table, s);
    LAUNCHED(name, 0, lookup_bytes(s, sizeof(A)));
}
static void lookup_forward_naive(act *out, const int *ids, const real *table, LookupShape s) {
    launch_lookup<1, float>("lookup_forward_naive", out, ids, table, s);
}
template <typename A>
static void lookup_forward_tiled(act *out, const int *ids, const real *table, LookupShape s) {
    if (s.D % 8 == 0 && aligned16(out) && aligned16(table))
        launch_lookup<8, A>("lookup_forward_tiled", out, ids, table, s);
    else
        launch_lookup<1, A>("lookup_forward_tiled", out, ids, table, s);
}

// forward:  out[n] = table[key of n]
// naive: a thread per value of the table looks through all keys: 4096 * 32 threads at 32768 keys.
__global__ void lookup_sums_naive(float *dtable, const float *dout, const int *ids, LookupShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)s.rows * s.D) return;
    int row = (int)(i / s.D), c = (int)(i % s.D);
    float sum = 0;
    for (size_t n = 0; n < (size_t)s.B * s.T; n++)
        if (lookup_key(ids, n, s) == row) sum += dout[n * s.D + c];
    dtable[i] += sum;
}
static void lookup_backward_naive(real *dtable, const act *dout, const int *ids, LookupShape s,
                                  void *work) {
    (void)work;
    lookup_sums_naive<<<blocks_for((size_t)s.rows * s.D, THREADS), THREADS, 0, gpu_stream>>>(
        dtable, (const float *)dout, ids, s);
    LAUNCHED("lookup_backward_naive", 0, lookup_bytes(s, sizeof(float)));
}

// tiled: a warp owns GROUP neighbouring rows of the table and 32 columns, a lane each. It looks at
// 32 keys at a time, a lane each; a ballot says which are its own, and these rows of dout are added
// in order, four loads on their way together. Rows of the batch are cut into splits, so that a
// common pair's rows are many warps' work; add_parts adds their sums.
// Bound before: as many looks at all keys as the table has values; now rows / GROUP * D / 32.
// Count for 4096 rows of 32 and 32768 keys: 128 warps * 1024 rounds of some 40 instructions, spread
// over 32 splits, some 6 us of all multiprocessors; 2.1 MB of dout, 16.8 MB of partial sums, L2's.
// Measured: 27 us (39 with 16 rows a warp and a remainder in 64 bits); 1 % of a step.
enum { GROUP = 32, SPLIT_ROWS = 512, MOST_SUMS = 1 << 22 };

static size_t lookup_splits(size_t N, int rows, int D) {
    size_t lists = ceil_div(N, SPLIT_ROWS), most = MOST_SUMS / ((size_t)rows * D);
    return most < 1 ? 1 : lists < most ? lists : most;
}

template <typename A>
__global__ void lookup_sums(float *to, const A *dout, const int *ids, LookupShape s,
                            size_t split_rows, bool add) {
    begin_dependent();
    __shared__ float sums[WARPS][GROUP][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = blockIdx.z * 32 + lane;
    const int first = (blockIdx.x * WARPS + warp) * GROUP;
    const size_t N = (size_t)s.B * s.T, begin = blockIdx.y * split_rows;
    const size_t end = begin + split_rows < N ? begin + split_rows : N;
    for (int g = 0; g < GROUP; g++) sums[warp][g][lane] = 0;  // a lane's own column: no barrier
    for (size_t n0 = begin; n0 < end; n0 += 32) {
        const int key = n0 + lane < end ? lookup_key(ids, n0 + lane, s) : -1;
        unsigned found = __ballot_sync(~0u, key >= first && key < first + GROUP);
        while (found) {  // the same in all lanes
            float v[4] = {};
            int row[4];
            for (int j = 0; j < 4; j++) {
                int from = __ffs((int)found) - 1;  // -1: none is left
                row[j] = __shfl_sync(~0u, key, from & 31) - first;
                if (from < 0) row[j] = -1;
                else if (c < s.D) v[j] = (float)dout[(n0 + from) * s.D + c];
                found &= found - 1;
            }
            for (int j = 0; j < 4; j++)
                if (row[j] >= 0) sums[warp][row[j]][lane] += v[j];
        }
    }
    for (int g = 0; g < GROUP && first + g < s.rows && c < s.D; g++) {
        size_t at = ((size_t)blockIdx.y * s.rows + first + g) * s.D + c;
        to[at] = sums[warp][g][lane] + (add ? to[at] : 0);
    }
}

// sum[i] += part[p][i], p in order; a thread each, neighbours next to each other.
__global__ void add_parts(float *sum, const float *part, size_t values, size_t parts) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= values) return;
    float all = 0;
#pragma unroll 8
    for (size_t p = 0; p < parts; p++) all += part[p * values + i];
    sum[i] += all;
}

template <typename A>
static void lookup_backward_tiled(real *dtable, const act *dout, const int *ids, LookupShape s,
                                  void *work) {
    size_t N = (size_t)s.B * s.T, values = (size_t)s.rows * s.D;
    size_t splits = lookup_splits(N, s.rows, s.D);
    size_t split_rows = ceil_div(ceil_div(N, SPLIT_ROWS), splits) * SPLIT_ROWS;
    bool one = splits == 1;
    dim3 grid(blocks_for(s.rows, WARPS * GROUP), (unsigned)splits, blocks_for(s.D, 32));
    LAUNCH(lookup_sums<A>, grid, THREADS, one ? dtable : (float *)work, (const A *)dout, ids, s,
           split_rows, one);
    LAUNCHED("lookup_sums", 0, lookup_bytes(s, sizeof(A)) + 4.0 * (one ? 2 : splits) * values);
    if (one) return;
    LAUNCH(add_parts, blocks_for(values, THREADS), THREADS, dtable, (const float *)work, values,
           splits);
    LAUNCHED("add_parts", 0, 4.0 * (splits + 2) * values);
}

// Partial sums: of rows 0 those of smear and skip, of columns D = C.
size_t input_work_bytes(size_t N, int rows, int D) {
    size_t parts = rows ? lookup_splits(N, rows, D) * rows : ceil_div(N, blend_rows_of(N));
    return parts * D * sizeof(float);
}

// ---- Positions ----------------------------------------------------------------------------------

// Sine and cosine of pair `step` at place t, an angle in half turns: the upper bits of a product
// that wraps where whole turns are complete (turn_of, arithmetic.h).
static __device__ float2 circle(uint64_t t, uint64_t step) {
    float2 p;
    sincospif((float)(int32_t)(t * step >> 32) * (1 / 2147483648.0f), &p.x, &p.y);
    return p;
}

__global__ void positions_naive_values(float *out, const float *x, const uint64_t *starts, size_t N,
                                       int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / C;
    if (n >= N) return;
    int c = (int)(i % C);
    float2 p = circle(starts[n / T] + n % T, turn_step(c / 2, C));
    out[i] = x[i] + (c % 2 ? p.y : p.x);
}
static void positions_naive(act *out, const act *x, const uint64_t *starts, int B, int T, int C) {
    size_t N = (size_t)B * T;
    positions_naive_values<<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)out, (const float *)x, starts, N, T, C);
    LAUNCHED("positions_naive", 0, 2 * array_bytes(sizeof(float), N, C));
}

// tiled: a warp takes eight rows, a lane W neighbouring channels of each: their angular speeds, an
// exponential in double each, serve all eight. Bytes: x and out, 33.6 MB. Some 40 instructions for
// a sine and cosine leave memory the bound.
// Bound before: an exponential in double for every value. Measured: float32 74 -> 29 us, bf16 12.4.
enum { POSITION_ROWS = 8 };

template <int W, typename A>
__global__ void positions_rows(A *out, const A *x, const uint64_t *starts, size_t N, int T, int C) {
    begin_dependent();
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * POSITION_ROWS;
    for (int c = W * (threadIdx.x % 32); c < C; c += 32 * W) {
        uint64_t step[(W + 1) / 2];
        for (int j = 0; j < (W + 1) / 2; j++) step[j] = turn_step(c / 2 + j, C);
#pragma unroll 4
        for (int r = 0; r < POSITION_ROWS; r++) {
            const size_t n = n0 + r;
            if (n >= N) break;
            const uint64_t t = starts[(unsigned)n / (unsigned)T] + (unsigned)n % (unsigned)T;
            float v[W];
            load_some<W>(v, x + n * C + c);
            for (int j = 0; j < (W + 1) / 2; j++) {
                float2 p = circle(t, step[j]);
                if (W == 1) v[0] += c % 2 ? p.y : p.x;
                else v[2 * j] += p.x, v[(2 * j + 1) % W] += p.y;
            }
            store_some<W>(out + n * C + c, v);
        }
    }
}
template <typename A>
static void positions_tiled(act *out, const act *x, const uint64_t *starts, int B, int T, int C) {
    size_t N = (size_t)B * T;
    unsigned blocks = blocks_for(N, WARPS * POSITION_ROWS);
    if (C % 8 == 0 && aligned16(out) && aligned16(x))
        LAUNCH((positions_rows<8, A>), blocks, THREADS, (A *)out, (const A *)x, starts, N, T, C);
    else
        LAUNCH((positions_rows<1, A>), blocks, THREADS, (A *)out, (const A *)x, starts, N, T, C);
    LAUNCHED("positions_tiled", 0, 2 * array_bytes(sizeof(A), N, C));
}

// ---- The table ----------------------------------------------------------------------------------

#define NAIVE(op, launcher) KERNEL(float, inputs.op, launcher, "naive", "a thread per value")

const Kernel input_kernels[] = {
    NAIVE(smear_forward, smear_forward_naive),
    KERNEL_PAIR(inputs.smear_forward, smear_forward_tiled, "a warp per row, eight values a lane"),
    NAIVE(smear_backward, smear_backward_naive),
    KERNEL_PAIR(inputs.smear_backward, smear_backward_tiled, "the same, columns over a block"),
    NAIVE(skip_forward, skip_forward_naive),
    KERNEL_PAIR(inputs.skip_forward, skip_forward_tiled, "a warp per row, eight values a lane"),
    NAIVE(skip_backward, skip_backward_naive),
    KERNEL_PAIR(inputs.skip_backward, skip_backward_tiled, "the same, columns over a block"),
    NAIVE(lookup_forward, lookup_forward_naive),
    KERNEL_PAIR(inputs.lookup_forward, lookup_forward_tiled, "a thread per eight values"),
    NAIVE(lookup_backward, lookup_backward_naive),
    KERNEL_PAIR(inputs.lookup_backward, lookup_backward_tiled, "a warp finds its rows by ballots"),
    NAIVE(positions, positions_naive),
    KERNEL_PAIR(inputs.positions, positions_tiled, "a warp takes eight rows"),
};
const int n_input_kernels = sizeof input_kernels / sizeof *input_kernels;
