// embedding.cu: the embedding and its LayerNorm on a GPU, from naive over tiled to a product on
// tensor cores. The naive kernels are the loops of layers.c with a thread per value; the tiled ones
// serve `tiled` (float32) and `tensor` (bf16).
//
// Read first: layers.cu (LayerNorm, and how its rungs and figures are meant), fast/rows.cuh.
// Run by:  ./train --device cuda --kernels naive|tiled|tensor
//
// Measured as there (B x T = 32 x 1024, C = 256; ./bench --only ladder), naive -> tiled, then in
// bf16; us, 2026-11-22:
//   embed          191 -> 13, 10    backward 2050 -> 34, 32 (40 as a product: see there)
#include "fast/rows.cuh"

// ---- Forward ------------------------------------------------------------------------------------
//
// Naive normalises the V rows of the table, not the N rows of the batch, as layers.c does. Backward
// does so in every kernel. A dropped byte's row is what LayerNorm makes of zeros: its bias.
// The table is V*C*4 = 262 KB, which the caches keep. Forward writes x, 16.8 MB in bf16 for 32768
// rows, 5.7 us; backward reads dx once, as many.

// naive: one thread per output, neighbours next to each other in x and in the table's row
__global__ void gather_naive(float *x, const int *ids, const float *rows, const float *bias,
                             size_t N, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    int id = ids[i / C], c = (int)(i % C);
    x[i] = id == BYTE_DROPPED ? bias[c] : rows[(size_t)id * C + c];
}

static void embed_forward_naive(act *x, const int *ids, const real *table, const real *gain,
                                const real *bias, size_t N, int C, void *work) {
    norm_forward_naive(work, table, gain, bias, V, C);
    gather_naive<<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)x, ids, (const float *)work, bias, N, C);
    LAUNCHED("gather_naive", 0, array_bytes(sizeof(float), N + V, C) + 4.0 * N);
}

// tiled: one warp per row, which normalises the table's row again: a few instructions a value, on
// what lies in cache, and a launch less.
// Bound before: one block normalised the table, a row to a thread, while all others waited.
// Bytes: x written once. Neighbouring lanes: four neighbouring channels each, 512 bytes of the
// table at a time, 256 of x in bf16.
// Measured: alone in float32 0.20 -> 0.021 ms; in a step in bf16 14.3 us for 32768 rows, 2.5 times
// what the writing takes. A row waits for its id, then for the table's row, then for two sums over
// the warp.
template <bool VEC, typename T>
__global__ void embed_rows_tiled(T *x, const int *ids, const float *table, const float *gain,
                                 const float *bias, size_t N, int C) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    bool dropped = ids[n] == BYTE_DROPPED;
    // One id for the whole warp. Row 0 stands in for a dropped one: an address that exists.
    const float *row = table + (dropped ? 0 : (size_t)ids[n] * C);
    warp_norm_row<VEC>(x + n * C, row, gain, bias, C, lane, dropped);
}

// registers: as in norm_rows_registers. Gain and bias, which draw_batch before us does not write,
// come ahead of the wait; then ids, and four rows of the table at a time.
// Bound before: a row's waits one after the other. Bytes: the same. Cost: 78 registers.
// Measured: 32768 rows 9.6 us in bf16, 13.3 in float32; two calls in a step of 32x1024 22.8 -> 20.
template <int ROWS, typename T>
__global__ void embed_rows_registers(T *x, const int *ids, const float *table, const float *gain,
                                     const float *bias, size_t N, int C) {
    const int lane = threadIdx.x % 32;
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    float v[ROWS][8], g[8], b[8];
    int id[ROWS];
    load_row(g, gain, C, lane);
    load_row(b, bias, C, lane);
    begin_dependent();
#pragma unroll
    for (int r = 0; r < ROWS; r++) id[r] = n0 + r < N ? ids[n0 + r] : BYTE_DROPPED;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        load_row(v[r], table + (id[r] == BYTE_DROPPED ? 0 : (size_t)id[r] * C), C, lane);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float2 m = register_moments(v[r], C, lane);
        if (id[r] == BYTE_DROPPED) m.y = 0;  // of this row only the bias remains
        for (int j = 0; j < 8; j++) v[r][j] = (v[r][j] - m.x) * m.y * g[j] + b[j];
        store_row(x + (n0 + r) * C, v[r], n0 + r < N ? C : 0, lane);
    }
}

template <typename T>
static void embed_forward_tiled(act *x, const int *ids, const real *table, const real *gain,
                                const real *bias, size_t N, int C, void *work) {
    (void)work;
    bool aligned = aligned16(x) && aligned16(table) && aligned16(gain) && aligned16(bias);
    if (aligned && C % 8 == 0 && C <= WARP_C && N <= FEW_ROWS)
        LAUNCH((embed_rows_registers<1, T>), blocks_for(N, WARPS), THREADS, (T *)x, ids, table,
               gain, bias, N, C);
    else if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH((embed_rows_registers<ROWS_AT_ONCE, T>), blocks_for(N, WARPS * ROWS_AT_ONCE),
               THREADS, (T *)x, ids, table, gain, bias, N, C);
    else if (aligned && C % 4 == 0)
        LAUNCH((embed_rows_tiled<true, T>), blocks_for(N, WARPS), THREADS,
               (T *)x, ids, table, gain, bias, N, C);
    else
        LAUNCH((embed_rows_tiled<false, T>), blocks_for(N, WARPS), THREADS,
               (T *)x, ids, table, gain, bias, N, C);
    LAUNCHED("embed_forward_tiled", 0,
             array_bytes(sizeof(T), N, C) + array_bytes(sizeof(float), V, C) + 4.0 * N);
}

// ---- Backward -----------------------------------------------------------------------------------
//
// forward:  x[n] = rows[ids[n]],  rows[v] = norm(table[v]),  rows[BYTE_DROPPED] = bias
// First drows[v] = sum of dx over the n with ids[n] == v, in order; then LayerNorm's backward on V
// rows; then what the dropped rows add to the bias.

// naive: a thread per (v,c) looks through all ids. Neighbours have the same v mostly: an id is one
// address for the warp, a row of dx whole lines. But 257 * 256 threads look at 32768 ids each, for
// 8.4 million values to be added: 2.05 ms.
__global__ void segment_sums_naive(float *drows, const float *dx, const int *ids, size_t N,
                                   int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)(V + 1) * C) return;
    int v = (int)(i / C), c = (int)(i % C);
    float sum = 0;
    for (size_t n = 0; n < N; n++)
        if (ids[n] == v) sum += dx[n * C + c];
    drows[i] = sum;
}
// LayerNorm's gradient by the table is added to dtable; no activation lies below.
static Epilogue into_table(real *dtable) {
    Epilogue e = {};
    e.dx = dtable;
    e.accumulate = true;
    e.drop.scale = 1;
    return e;
}
__global__ void add_row(float *to, const float *from, int C) {
    begin_dependent();
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) to[c] += from[c];
}

static void embed_backward_naive(real *dtable, real *dgain, real *dbias, const act *dx,
                                 const int *ids, const real *table, const real *gain, size_t N,
                                 int C, void *work) {
    size_t values = (size_t)(V + 1) * C;
    float *drows = (float *)work, *rest = drows + values / 4 * 4 + 4;  // float2 wants 8 bytes
    segment_sums_naive<<<blocks_for(values, THREADS), THREADS, 0, gpu_stream>>>(
        drows, (const float *)dx, ids, N, C);
    LAUNCHED("segment_sums_naive", 0, array_bytes(sizeof(float), N + V + 1, C) + 4.0 * N);
    norm_backward_naive(NULL, dgain, dbias, drows, table, gain, NULL, into_table(dtable), V, C,
                        rest);
    LAUNCH(add_row, blocks_for(C, THREADS), THREADS, dbias, drows + (size_t)V * C, C);
    LAUNCHED("add_row", 0, 12.0 * C);
}

// tiled: the rows are cut into splits. A block per (v, split) first lists the n that hold v, in
// order, LIST ids at a time (ballots would do for 32; a scan over the block does for all). Then a
// thread per column adds the listed rows. A common byte's rows are thus spread over the splits, and
// the loads of the list are independent. Bytes: dx once; ids once per v and split, from L2; the
// splits' partial sums, part (splits, V+1, C).
// Measured: float32 2.05 -> 0.034 ms on bytes drawn evenly; in bf16 50 us for 16384 rows of English
// text, whose commonest byte makes one list far longer than the others: see `product` below.
// What dropped bytes add to the bias is added by the kernel that knows the whole sum. With one
// split this is segment_sums_tiled, which then gets dbias; else it is sum_splits.
enum { LIST = 2048, PER_THREAD = LIST / THREADS, SPLITS = 64 };

// Splits of LIST rows, or of several times as many where that would take much workspace: splits * C
// is at most 65536 (or C), so part (splits, V+1, C) at most 67 MB.
static size_t embed_splits(size_t N, int C) {
    size_t most = 65536 / (size_t)C < 1 ? 1 : 65536 / (size_t)C > SPLITS ? SPLITS : 65536 / C;
    size_t lists = ceil_div(N, LIST);
    return ceil_div(lists, ceil_div(lists, most));
}

template <typename T>
__global__ void segment_sums_tiled(float *part, float *dbias, const T *dx, const int *ids, size_t N,
                                   int C, size_t split_rows) {
    __shared__ int list[LIST], warp_counts[WARPS];
    int v = blockIdx.x, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    size_t begin = blockIdx.y * split_rows, end = begin + split_rows < N ? begin + split_rows : N;
    float *to = part + ((size_t)blockIdx.y * (V + 1) + v) * C;
    for (size_t n0 = begin; n0 < end; n0 += LIST) {
        int left = end - n0 < LIST ? (int)(end - n0) : LIST, mine = 0;
        // Eight ids in a row for each thread: its finds follow those of the thread before.
        for (int j = 0; j < PER_THREAD; j++) {
            int i = tid * PER_THREAD + j;
            mine += i < left && ids[n0 + i] == v;
        }
        int upto = mine;  // inclusive count over the warp's lanes, then over the warps before
        for (int d = 1; d < 32; d *= 2) {
            int below = __shfl_up_sync(~0u, upto, d);
            if (lane >= d) upto += below;
        }
        __syncthreads();  // not in the first round: all are done with the list and counts before
        if (lane == 31) warp_counts[warp] = upto;
        __syncthreads();  // all counts are there
        // Where mine begin: after those of the lanes below and of the warps before.
        int at = upto - mine, total = 0;
        for (int u = 0; u < WARPS; u++) {
            if (u < warp) at += warp_counts[u];
            total += warp_counts[u];
        }
        for (int j = 0; j < PER_THREAD; j++) {
            int i = tid * PER_THREAD + j;
            if (i < left && ids[n0 + i] == v) list[at++] = i;
        }
        __syncthreads();  // the list is whole
        bool first = n0 == begin;
        // Only here: ids are draw_batch's, many kernels ago, so the first list could be made while
        // the kernel before still ran. dx is that kernel's.
        if (first) begin_dependent();
        for (int c = tid; c < C && (first || total > 0); c += THREADS) {
            float sum = first ? 0 : to[c];  // mine: no one else touches it
            // Neighbouring threads: neighbouring columns of a listed row; eight rows on their way.
#pragma unroll 8
            for (int i = 0; i < total; i++) sum += (float)dx[(n0 + list[i]) * C + c];
            to[c] = sum;
        }
    }
    for (int c = tid; dbias && v == BYTE_DROPPED && c < C; c += THREADS) dbias[c] += to[c];
}

// drows (V,C) = the sums over splits of part (splits, V+1, C), whose last row goes to dbias. A
// thread per column of a row, neighbours next to each other; splits in order.
__global__ void sum_splits(float *drows, float *dbias, const float *part, int C, size_t splits) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, values = (size_t)(V + 1) * C;
    if (i >= values) return;
    float sum = 0;
#pragma unroll 8
    for (size_t s = 0; s < splits; s++) sum += part[s * values + i];
    if (i < (size_t)V * C)
        drows[i] = sum;
    else
        dbias[i - (size_t)V * C] += sum;
}

template <typename T>
static void embed_backward_tiled(real *dtable, real *dgain, real *dbias, const act *dx,
                                 const int *ids, const real *table, const real *gain, size_t N,
                                 int C, void *work) {
    size_t values = (size_t)(V + 1) * C, splits = embed_splits(N, C);
    size_t split_rows = ceil_div(ceil_div(N, LIST), splits) * LIST;
    float *drows = (float *)work, *part = drows + values / 4 * 4 + 4;  // both on 16 bytes
    bool one = splits == 1;
    LAUNCH(segment_sums_tiled<T>, dim3(V + 1, (unsigned)splits), THREADS,
           one ? drows : part, one ? dbias : NULL, (const T *)dx, ids, N, C, split_rows);
    LAUNCHED("segment_sums_tiled", 0,
             array_bytes(sizeof(T), N, C) + 4.0 * N + 4.0 * splits * values);
    if (!one) {
        LAUNCH(sum_splits, blocks_for(values, THREADS), THREADS, drows, dbias, part, C, splits);
        LAUNCHED("sum_splits", 0, 4.0 * (splits + 1) * values);
    }
    norm_backward_tiled<float>(NULL, dgain, dbias, drows, table, gain, NULL, into_table(dtable), V,
                               C, part);
}

// product, for many rows in bf16: drows = onehot^T dx, a linear layer's weight gradient, with one 1
// in each row of onehot (N,V) and none where the byte is dropped. Products are exact; sums round.
// Bound before: the longest list. One byte of seven of an English text is a space.
// Bytes: dx once, onehot once written and read, PRODUCT_ROWS of it at a time. dbias is the gradient
// of such a layer's bias: the sum of all rows.
// Count for 16384 rows: 2*16384*256*256 = 2.1 GFLOP, nearly all with zeros; tensor cores have them
// to spare. onehot is 8.4 MB, small enough to stay in L2 until the product reads it.
// Cost: the workspace for it, three launches. The time no longer depends on the text.
// Measured, 16384 rows of English: 50 -> 3.3 us for one_hot, 10 the product, 3 to 9 its sums.
enum { PRODUCT_LEAST = 4096, PRODUCT_ROWS = 16384 };

static size_t product_rows(size_t N) { return N < PRODUCT_ROWS ? N : (size_t)PRODUCT_ROWS; }

// onehot: a thread writes eight values, 16 bytes, next to its neighbours'; the 32 threads of a row
// read one id. drows: the first `zeros` become 0, the thread's share: the product adds to it.
// Measured: 3.3 us for 16384 rows, 8.4 MB, 2.5 TB/s.
__global__ void one_hot(bf16 *onehot, float *drows, const int *ids, size_t N, size_t zeros) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (size_t j = i; j < zeros; j += (size_t)gridDim.x * blockDim.x) drows[j] = 0;
    if (i >= N * (V / 8)) return;
    int at = ids[i / (V / 8)] - 8 * (int)(i % (V / 8));  // where the 1 is among the eight, if it is
    // 0x3F80 is 1 in bf16. BYTE_DROPPED = 256 leaves `at` at 8 or more: a row of zeros.
    uint32_t w[4];
    for (int j = 0; j < 4; j++) w[j] = at == 2 * j ? 0x3F80 : at == 2 * j + 1 ? 0x3F800000 : 0;
    *(uint4 *)(onehot + 8 * i) = make_uint4(w[0], w[1], w[2], w[3]);
}

// The convolutions of the backend `tensor`.
static const Backend *tensor_convs(void) {
    static Backend b;
    if (!b.conv_backward_weight)
        for (int i = 0; i < n_tensor_kernels; i++)
            if (tensor_kernels[i].used_by[0]) kernel_install(&b, &tensor_kernels[i]);
    return &b;
}

static void embed_backward_product(real *dtable, real *dgain, real *dbias, const act *dx,
                                   const int *ids, const real *table, const real *gain, size_t N,
                                   int C, void *work) {
    if (N < PRODUCT_LEAST || C % 8 != 0 || !aligned16(dx) || !aligned16(work)) {
        embed_backward_tiled<bf16>(dtable, dgain, dbias, dx, ids, table, gain, N, C, work);
        return;
    }
    size_t values = (size_t)(V + 1) * C;
    float *drows = (float *)work;
    bf16 *onehot = (bf16 *)(drows + values);  // on 16 bytes, as C is a multiple of 8
    void *rest = onehot + product_rows(N) * V;
    for (size_t n = 0; n < N; n += PRODUCT_ROWS) {
        size_t rows = product_rows(N - n);
        LAUNCH(one_hot, blocks_for(rows * (V / 8), THREADS), THREADS,
               onehot, drows, ids + n, rows, n == 0 ? values : 0);
        LAUNCHED("one_hot", 0,
                 array_bytes(sizeof(bf16), rows, V) + 4.0 * (rows + (n == 0 ? values : 0)));
        // A linear layer from V to C channels on one sequence of `rows` rows: its dw is drows.
        const WeightJob job = {drows, dbias, onehot, (const bf16 *)dx + n * C, 1};
        const ConvShape s = {1, (int)rows, V, C, 1, 1};
        tensor_convs()->conv_backward_weight(&job, 1, s, rest);
    }
    // dbias is complete: what LayerNorm's backward would add to it goes where nobody reads.
    norm_backward_tiled<float>(NULL, dgain, drows + (size_t)V * C, drows, table, gain, NULL,
                               into_table(dtable), V, C, rest);
}

// ---- Workspace ----------------------------------------------------------------------------------
//
// What the launchers above lay out, so the two change together.

// drows, up to 4 values to lie on 16 bytes, and part, whose place LayerNorm's backward on the table
// takes over once part is read.
size_t embed_work_bytes(size_t N, int width) {
    size_t w = (size_t)width, rows = ((V + 1) * w + 4) * sizeof(float);
    // splits * C <= max(65536, C) (embed_splits), whatever C <= width is.
    size_t values = ceil_div(N, LIST) * w, most = w > 65536 ? w : 65536;
    if (values > most) values = most;
    size_t part = values * (V + 1) * sizeof(float), norm = norm_work_bytes(V, width);
    return rows + (part > norm ? part : norm);
}

// What embed_backward_product takes: drows, onehot, and what a linear layer of so many rows, or
// LayerNorm on the table, takes after them. It is for rows of 8 channels or more.
size_t embed_product_work_bytes(size_t N, int width) {
    if (N < PRODUCT_LEAST || width < 8) return 0;
    size_t rows = product_rows(N), rest = norm_work_bytes(V, width);
    size_t tensor = tensor_work_bytes(rows, 1, width), conv = conv_work_bytes(rows, 1, width);
    if (rest < tensor) rest = tensor;
    if (rest < conv) rest = conv;
    return (V + 1) * (size_t)width * sizeof(float) + rows * V * sizeof(bf16) + rest;
}

// ---- The table of these kernels -----------------------------------------------------------------

const Kernel embed_kernels[] = {
    KERNEL(float, embed_forward, embed_forward_naive, "naive", "a thread per value"),
    KERNEL_PAIR(embed_forward, embed_forward_tiled, "a warp per row, four values a lane"),
    KERNEL(float, embed_backward, embed_backward_naive, "naive", "a thread per (byte, channel)"),
    KERNEL_PAIR(embed_backward, embed_backward_tiled, "list each byte's rows, add them"),
    KERNEL(bf16, embed_backward, embed_backward_product, "tensor", "one-hot rows times dx, bf16"),
};
const int n_embed_kernels = sizeof embed_kernels / sizeof *embed_kernels;
