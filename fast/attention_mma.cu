// attention_mma.cu: attention on tensor cores, bf16 with float32 sums, by mma.sync (sm_80 and
// newer). Read mixers/attn.c and the tiled kernels in mixers/attn.cu first: these walk over the
// same tiles.
//
// Bound before: float32 multiply-adds, which read most of their operands from shared memory. An mma
// multiplies 16 x 16 by 16 x 8 values from registers. What makes attention fit: the layout in which
// an mma leaves 16 x 8 sums in a warp is that in which it wants 16 x 16 factors, two sums side by
// side. So scores become p, and p goes into the next product, without leaving their registers.
// Queries (or, in backward, keys) of a warp stay in registers as well; only what the block walks
// over lies in shared memory, two tiles of it: one is multiplied while the next is on its way.
//
// Measured on an H100, 4 heads of 64, W = T, many calls in a row, 2026-11-25, us (TFLOP/s: 4 P d
// operations forward, 10 P d backward, though its kernels do 14); FlashAttention-2 as PyTorch 2.11
// ships it, in the same run:
//     B x T      forward          FA2      backward          FA2
//     64x512      59.9 (144)      67.2      224  (96)        291
//     32x1024     91.6 (188)      97.5      350 (123)        378
//     64x2048    540   (255)     526       2125 (162)       1973
// Tried and dropped: 16 queries a warp (forward; 57.4, 93.0, 590), tiles of 32 queries for a block
// of keys (255, 401, 2471 us backward). Counts: mixers/attn.cu. Heads of up to 128 channels, a
// multiple of 8; others go to the tiled kernels. Exponentials are of base 2, the factor log2(e) is
// in the scale.
#include "mixers/attn.cuh"
#include "fast/tensor.cuh"

enum { MMA_WARPS = 4, ATTENTION_THREADS = MMA_WARPS * 32, KEYS = 64, QUERIES = 64 };

typedef struct {
    AttentionShape s;
    const bf16 *qkv, *dout;
    const float *gain;
    bf16 *out;    // forward: (N,H*d)      backward: dqkv
    float *lse, *delta;
} AttentionArgs;

#ifdef HAVE_MMA
// ---- Tiles: rows x D values in shared memory ----------------------------------------------------

// Where 8 channels of a row lie. ldmatrix reads 8 rows at once: the chunks are exchanged within a
// row such that those 8 pieces of 16 bytes lie in different banks.
template <int D>
INLINE uint32_t chunk_at(int row, int chunk) {
    const int swap = D >= 64 ? row % 8 : D == 32 ? row / 2 % 4 : row / 4 % 2;
    return (uint32_t)(row * D * 2 + (chunk ^ swap) * 16);
}

// Rows of d channels, `stride` apart, into a tile; zeros from row `left` and channel d on.
template <int D, int ROWS>
INLINE void copy_tile(uint32_t to, const bf16 *from, size_t stride, int left, int d) {
#pragma unroll
    for (int i = 0; i < ROWS * D / 8 / ATTENTION_THREADS; i++) {
        int at = threadIdx.x + i * ATTENTION_THREADS, r = at / (D / 8), c = at % (D / 8);
        bool inside = r < left && c * 8 < d;
        copy16(to + chunk_at<D>(r, c), inside ? from + r * stride + c * 8 : from, inside);
    }
}

// Keys and behind them values of head h, 64 rows from x on.
template <int D>
INLINE void copy_keys(uint32_t to, const bf16 *x, const Head &h, size_t wide, int left, int d) {
    copy_tile<D, KEYS>(to, x + h.k, wide, left, d);
    copy_tile<D, KEYS>(to + KEYS * D * 2, x + h.v, wide, left, d);
}

// Second factors of two mma: rows n0..n0+15 of a tile are columns, 16 channels from k0 on are
// summed.
template <int D>
INLINE void rows_as_columns(uint32_t b[4], uint32_t tile, int n0, int k0) {
    const int lane = threadIdx.x % 32;
    ldmatrix<false>(b, tile + chunk_at<D>(n0 + lane % 8 + lane / 16 * 8, k0 / 8 + lane / 8 % 2));
}
// The same with 16 rows from k0 on summed, and 16 channels from n0 on as columns.
template <int D>
INLINE void channels_as_columns(uint32_t b[4], uint32_t tile, int k0, int n0) {
    const int lane = threadIdx.x % 32;
    ldmatrix<true>(b, tile + chunk_at<D>(k0 + lane % 8 + lane / 8 % 2 * 8, n0 / 8 + lane / 16));
}

// First factors: 16 rows of a warp from `from` on, all D channels.
template <int D>
INLINE void load_factors(uint32_t a[D / 16][4], const bf16 *from, size_t stride, int left, int d) {
    const int r = threadIdx.x % 32 / 4, c = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        for (int i = 0; i < 4; i++) {
            int row = r + i % 2 * 8, col = 16 * k + c + i / 2 * 8;
            a[k][i] = row < left && col < d ? *(const uint32_t *)(from + row * stride + col) : 0;
        }
}

// Two neighbouring tiles of 16 x 8 sums, as a first factor of 16 x 16.
INLINE void sums_as_factor(uint32_t a[4], const float left[4], const float right[4]) {
    a[0] = pack(left[0], left[1]), a[1] = pack(left[2], left[3]);
    a[2] = pack(right[0], right[1]), a[3] = pack(right[2], right[3]);
}

// sums (M times 16 rows x 8N columns) = first factors times rows n of a tile.
template <int D, int M, int N>
INLINE void row_products(float (&sums)[M][N][4], const uint32_t (&a)[M][D / 16][4], uint32_t tile) {
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int e = 0; e < 4; e++) sums[m][n][e] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            rows_as_columns<D>(b, tile, 8 * n, 16 * k);
            for (int m = 0; m < M; m++) {
                mma(sums[m][n], a[m][k], b[0], b[1]);
                mma(sums[m][n + 1], a[m][k], b[2], b[3]);
            }
        }
}
// sums (M times 16 x D) += factors (M times 16 x 8N, as sums) times the rows of a tile.
template <int D, int M, int N>
INLINE void add_channel_products(float (&sums)[M][D / 8][4], const float (&factors)[M][N][4],
                                 uint32_t tile) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        uint32_t a[M][4];
        for (int m = 0; m < M; m++) sums_as_factor(a[m], factors[m][k], factors[m][k + 1]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            channels_as_columns<D>(b, tile, 8 * k, 8 * n);
            for (int m = 0; m < M; m++) {
                mma(sums[m][n], a[m], b[0], b[1]);
                mma(sums[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Two values of bf16 for each of D/8 tiles of sums into a row.
template <int D>
INLINE void store_sums(bf16 *row, const float (&sums)[D / 8][4], int half, float scale, int d) {
#pragma unroll
    for (int n = 0; n < D / 8; n++)
        if (8 * n < d)
            *(uint32_t *)(row + 8 * n + 2 * (threadIdx.x % 4)) =
                pack(scale * sums[n][2 * half], scale * sums[n][2 * half + 1]);
}

// ---- Forward ------------------------------------------------------------------------------------

// Scores a of keys m0..m0+63 become exponentials; what rows r0..r0+15 had before is scaled to them.
template <int D>
INLINE void join_keys(float (&o)[D / 8][4], float (&top)[2], float (&sum)[2],
                      float (&a)[KEYS / 8][4], float scale, AttentionShape s, int r0, int m0) {
    const int r = r0 + threadIdx.x % 32 / 4, c = m0 + 2 * (threadIdx.x % 4);
    if (m0 + KEYS - 1 > r0 || r0 + 15 - m0 >= s.W)  // some row does not see all keys
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            for (int e = 0; e < 4; e++) {
                int back = r + e / 2 * 8 - (c + 8 * n + e % 2);
                if (back < 0 || back >= s.W) a[n][e] = -INFINITY;
            }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = -INFINITY, row = 0;
        for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(a[n][2 * h], a[n][2 * h + 1]));
        most = fmaxf(top[h], scale * quad_most(most));
        // No key of this row so far: there is nothing to scale, and -inf - -inf is no number.
        float base = most == -INFINITY ? 0 : most, shrink = exp2_of(top[h] - base);
        for (int n = 0; n < KEYS / 8; n++)
            for (int e = 2 * h; e < 2 * h + 2; e++) {
                a[n][e] = exp2_of(scale * a[n][e] - base);
                row += a[n][e];
            }
        sum[h] = shrink * sum[h] + row;
        top[h] = most;
        for (int n = 0; n < D / 8; n++) o[n][2 * h] *= shrink, o[n][2 * h + 1] *= shrink;
    }
}

// A block owns 64 M queries of a head, a warp 16 M of them: with M = 2 a piece of a tile that it
// reads from shared memory serves two mma. The last queries, which have the most keys, begin first.
template <int D, int M>
__global__ void __launch_bounds__(ATTENTION_THREADS) attention_forward_mma_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char smem[];
    constexpr int TILE = KEYS * D * 2;
    const AttentionShape s = a.s;
    const Head h(s, (int)blockIdx.y);
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T;
    const bf16 *x = a.qkv + text * wide;
    const int t0 = (int)(gridDim.x - 1 - blockIdx.x) * 16 * M * MMA_WARPS;
    const int r0 = t0 + threadIdx.x / 32 * 16 * M, last = min(s.T, t0 + 16 * M * MMA_WARPS);
    const int first = t0 - s.W + 1 > 0 ? (t0 - s.W + 1) / KEYS * KEYS : 0;
    // Not 0, which times the -inf of what is masked is no number.
    const float gain = a.gain[h.h];
    const float scale = fmaxf(fabsf(gain) * rsqrtf((float)s.d) * LOG2_E, 1e-30f);
    const uint32_t tiles = shared_addr(smem);
    uint32_t q[M][D / 16][4];
    float o[M][D / 8][4] = {}, top[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int r = r0 + 16 * m;
        top[m][0] = top[m][1] = -INFINITY;
        load_factors<D>(q[m], x + (size_t)r * wide + h.q, wide, s.T - r, s.d);
        // The largest score is scale times the largest product only where scale is not negative.
        for (int k = 0; k < D / 16; k++)
            for (int i = 0; i < 4; i++) q[m][k][i] ^= gain < 0 ? 0x80008000u : 0;
    }
    for (int m0 = first - KEYS; m0 < last; m0 += KEYS) {
        const int next = m0 + KEYS, slot = (next - first) / KEYS % 2;
        if (next < last)
            copy_keys<D>(tiles + slot * 2 * TILE, x + next * wide, h, wide, s.T - next, s.d);
        copy_commit();
        if (m0 < first) continue;
        copy_wait<1>();
        __syncthreads();  // this slot's keys and values are whole, for all warps
        const uint32_t k_tile = tiles + (slot ^ 1) * 2 * TILE;
        if (m0 < r0 + 16 * M && m0 + KEYS - 1 > r0 - s.W) {  // some row sees some key
            float scores[M][KEYS / 8][4];
            row_products<D>(scores, q, k_tile);
#pragma unroll
            for (int m = 0; m < M; m++)
                join_keys<D>(o[m], top[m], sum[m], scores[m], scale, s, r0 + 16 * m, m0);
            add_channel_products<D>(o, scores, k_tile + TILE);
        }
        __syncthreads();  // all warps are done with the slot that the next copy overwrites
    }
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int m = i / 2, half = i % 2, t = r0 + threadIdx.x % 32 / 4 + 8 * i;
        const float all = quad_sum(sum[m][half]);
        if (t >= s.T) continue;
        const size_t row = (text + t) * s.H + h.h;
        store_sums<D>(a.out + row * s.d, o[m], half, 1 / all, s.d);
        if (a.lse && threadIdx.x % 4 == 0) a.lse[row] = LN_2 * (top[m][half] + log2f(all));
    }
}

// ---- Backward: two kernels, as in mixers/attn.cu ------------------------------------------------

// A block owns 64 keys, a warp 16 of them: rows of p and da here are keys, columns queries.
template <int D, int TILE_ROWS>
__global__ void __launch_bounds__(ATTENTION_THREADS) attention_keys_mma_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char smem[];
    constexpr int TILE = TILE_ROWS * D * 2, SLOT = 2 * TILE + 2 * TILE_ROWS * (int)sizeof(float);
    const AttentionShape s = a.s;
    const int heads = s.H / s.G, head0 = (int)blockIdx.y * heads;
    const Head own(s, head0);
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T, C = (size_t)s.H * s.d;
    const bf16 *x = a.qkv + text * wide;
    const int block0 = (int)blockIdx.x * 16 * MMA_WARPS, m0 = block0 + threadIdx.x / 32 * 16;
    // Queries before `last` see a key. (As it ran on a GPU: the sum is never below 0.)
    const int reach = block0 + 16 * MMA_WARPS - 1 + s.W, last = min(s.T, reach > 0 ? reach : s.T);
    const int steps = (last - block0 + TILE_ROWS - 1) / TILE_ROWS, all = steps * heads;
    const uint32_t slots = shared_addr(smem);
    const float root = rsqrtf((float)s.d);
    uint32_t k[1][D / 16][4], v[1][D / 16][4];
    float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
    load_factors<D>(k[0], x + (size_t)m0 * wide + own.k, wide, s.T - m0, s.d);
    load_factors<D>(v[0], x + (size_t)m0 * wide + own.v, wide, s.T - m0, s.d);
    for (int i = -1; i < all; i++) {
        if (i + 1 < all) {
            const Head h(s, head0 + (i + 1) / steps);
            const int t0 = block0 + (i + 1) % steps * TILE_ROWS, slot = (i + 1) % 2;
            copy_tile<D, TILE_ROWS>(slots + slot * SLOT, x + t0 * wide + h.q, wide, s.T - t0, s.d);
            copy_tile<D, TILE_ROWS>(slots + slot * SLOT + TILE, a.dout + (text + t0) * C + h.q, C,
                                    s.T - t0, s.d);
            float *rows = (float *)(smem + slot * SLOT + 2 * TILE);
            for (int j = threadIdx.x; j < 2 * TILE_ROWS; j += ATTENTION_THREADS) {
                int t = t0 + j % TILE_ROWS;
                const float *from = j < TILE_ROWS ? a.lse : a.delta;
                rows[j] = t < s.T ? from[(text + t) * s.H + h.h] : 0;
            }
        }
        copy_commit();
        if (i < 0) continue;
        copy_wait<1>();
        __syncthreads();  // this slot is whole, for all warps
        const int t0 = block0 + i % steps * TILE_ROWS, slot = i % 2;
        const uint32_t q_tile = slots + slot * SLOT, go_tile = q_tile + TILE;
        const float *lse = (const float *)(smem + slot * SLOT + 2 * TILE), *delta = lse + TILE_ROWS;
        if (t0 + TILE_ROWS - 1 >= m0 && t0 - (m0 + 15) < s.W) {
            const float scale = a.gain[head0 + i / steps] * root;
            float p[1][TILE_ROWS / 8][4], da[1][TILE_ROWS / 8][4];
            row_products<D>(p, k, q_tile);
            row_products<D>(da, v, go_tile);
            const bool whole = t0 >= m0 + 15 && t0 + TILE_ROWS - 1 - m0 < s.W;
#pragma unroll
            for (int n = 0; n < TILE_ROWS / 8; n++)
                for (int e = 0; e < 4; e++) {
                    int col = 8 * n + 2 * (threadIdx.x % 4) + e % 2;
                    int back = t0 + col - (m0 + (int)threadIdx.x % 32 / 4 + e / 2 * 8);
                    bool seen = whole || (back >= 0 && back < s.W);
                    float power = exp2_of(LOG2_E * (scale * p[0][n][e] - lse[col]));
                    p[0][n][e] = seen ? power : 0;
                    da[0][n][e] = p[0][n][e] * (da[0][n][e] - delta[col]) * scale;
                }
            add_channel_products<D>(dv, p, go_tile);
            add_channel_products<D>(dk, da, q_tile);
        }
        __syncthreads();  // all warps are done with the slot that the next copy overwrites
    }
    for (int half = 0; half < 2; half++) {
        const int m = m0 + threadIdx.x % 32 / 4 + 8 * half;
        if (m >= s.T) continue;
        store_sums<D>(a.out + (text + m) * wide + own.k, dk[0], half, 1, s.d);
        store_sums<D>(a.out + (text + m) * wide + own.v, dv[0], half, 1, s.d);
    }
}

// A block owns 64 queries, a warp 16 of them. delta becomes what each row adds to dgain.
template <int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, D <= 64 ? 3 : 1)
    attention_queries_mma_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char smem[];
    constexpr int TILE = KEYS * D * 2;
    const AttentionShape s = a.s;
    const Head h(s, (int)blockIdx.y);
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T, C = (size_t)s.H * s.d;
    const bf16 *x = a.qkv + text * wide;
    const int t0 = (int)(gridDim.x - 1 - blockIdx.x) * 16 * MMA_WARPS;
    const int r0 = t0 + threadIdx.x / 32 * 16, last = min(s.T, t0 + 16 * MMA_WARPS);
    const int first = t0 - s.W + 1 > 0 ? (t0 - s.W + 1) / KEYS * KEYS : 0;
    const float root = rsqrtf((float)s.d), gain = a.gain[h.h];
    const uint32_t tiles = shared_addr(smem);
    uint32_t q[1][D / 16][4], go[1][D / 16][4];
    float dq[1][D / 8][4] = {}, lse[2], delta[2];
    load_factors<D>(q[0], x + (size_t)r0 * wide + h.q, wide, s.T - r0, s.d);
    load_factors<D>(go[0], a.dout + (text + r0) * C + h.q, C, s.T - r0, s.d);
    for (int half = 0; half < 2; half++) {
        const int t = r0 + threadIdx.x % 32 / 4 + 8 * half;
        lse[half] = t < s.T ? LOG2_E * a.lse[(text + t) * s.H + h.h] : 0;
        delta[half] = t < s.T ? a.delta[(text + t) * s.H + h.h] : 0;
    }
    for (int m0 = first - KEYS; m0 < last; m0 += KEYS) {
        const int next = m0 + KEYS, slot = (next - first) / KEYS % 2;
        if (next < last)
            copy_keys<D>(tiles + slot * 2 * TILE, x + next * wide, h, wide, s.T - next, s.d);
        copy_commit();
        if (m0 < first) continue;
        copy_wait<1>();
        __syncthreads();  // this slot's keys and values are whole, for all warps
        const uint32_t k_tile = tiles + (slot ^ 1) * 2 * TILE;
        if (m0 <= r0 + 15 && m0 + KEYS - 1 > r0 - s.W) {
            float p[1][KEYS / 8][4], da[1][KEYS / 8][4];
            row_products<D>(p, q, k_tile);
            row_products<D>(da, go, k_tile + TILE);
            const bool whole = m0 + KEYS - 1 <= r0 && r0 + 15 - m0 < s.W;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 0; e < 4; e++) {
                    int back = r0 + (int)threadIdx.x % 32 / 4 + e / 2 * 8 -
                               (m0 + 8 * n + 2 * ((int)threadIdx.x % 4) + e % 2);
                    bool seen = whole || (back >= 0 && back < s.W);
                    float power = exp2_of(gain * root * LOG2_E * p[0][n][e] - lse[e / 2]);
                    da[0][n][e] = (seen ? power : 0) * (da[0][n][e] - delta[e / 2]) * root;
                }
            add_channel_products<D>(dq, da, k_tile);
        }
        __syncthreads();  // all warps are done with the slot that the next copy overwrites
    }
    for (int half = 0; half < 2; half++) {
        const int t = r0 + threadIdx.x % 32 / 4 + 8 * half;
        float dot = 0;  // of dq and q, which lie in the same lanes
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            uint32_t q_n = q[0][n / 2][n % 2 * 2 + half];
            dot += dq[0][n][2 * half] * low(q_n) + dq[0][n][2 * half + 1] * high(q_n);
        }
        dot = quad_sum(dot);
        if (t >= s.T) continue;
        store_sums<D>(a.out + (text + t) * wide + h.q, dq[0], half, gain, s.d);
        if (threadIdx.x % 4 == 0) a.delta[(text + t) * s.H + h.h] = dot;
    }
}
#else
template <int D, int M>
__global__ void attention_forward_mma_kernel(AttentionArgs) {}
template <int D, int TILE_ROWS>
__global__ void attention_keys_mma_kernel(AttentionArgs) {}
template <int D>
__global__ void attention_queries_mma_kernel(AttentionArgs) {}
#endif

// ---- On the host --------------------------------------------------------------------------------

static bool attention_mma_takes(AttentionShape s, const void *a, const void *b, const void *c) {
    return have_mma() && s.d % 8 == 0 && aligned16(a) && aligned16(b) && aligned16(c);
}

// rows: of a block
static void launch_attention(void (*kernel)(AttentionArgs), AttentionArgs a, int rows, int heads,
                             int shared) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    dim3 grid(blocks_for(a.s.T, rows), heads, a.s.B);
    kernel<<<grid, ATTENTION_THREADS, shared, gpu_stream>>>(a);
}

void attention_forward_mma(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s,
                           void *work) {
    if (!attention_mma_takes(s, out, qkv, NULL)) {
        attention_forward_tiled<bf16>(out, lse, qkv, gain, s, work);
        return;
    }
    AttentionArgs a = {s, (const bf16 *)qkv, NULL, gain, (bf16 *)out, lse, NULL};
    const int tiles = 4 * KEYS * 2;  // two of keys, two of values: bytes for a channel
    if (s.d <= 16)
        launch_attention(attention_forward_mma_kernel<16, 2>, a, 128, s.H, tiles * 16);
    else if (s.d <= 32)
        launch_attention(attention_forward_mma_kernel<32, 2>, a, 128, s.H, tiles * 32);
    else if (s.d <= 64)
        launch_attention(attention_forward_mma_kernel<64, 2>, a, 128, s.H, tiles * 64);
    else
        launch_attention(attention_forward_mma_kernel<128, 1>, a, 64, s.H, tiles * 128);
    LAUNCHED("attention_forward_mma", 4 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(bf16), 1, 1));
}

template <int D, int TILE_ROWS>
static void backward_kernels(AttentionArgs a) {
    launch_attention(attention_keys_mma_kernel<D, TILE_ROWS>, a, 64, a.s.G,
                     2 * (2 * TILE_ROWS * D * 2 + 2 * TILE_ROWS * (int)sizeof(float)));
    LAUNCHED("attention_keys_mma", 8 * attention_pairs(a.s) * a.s.d,
             attention_bytes(a.s, sizeof(bf16), 2, 1));
    launch_attention(attention_queries_mma_kernel<D>, a, 64, a.s.H, 4 * KEYS * 2 * D);
    LAUNCHED("attention_queries_mma", 6 * attention_pairs(a.s) * a.s.d,
             attention_bytes(a.s, sizeof(bf16), 2, 1));
}

void attention_backward_mma(act *dqkv, real *dgain, const act *dout, const act *out,
                            const real *lse, real *delta, const act *qkv, const real *gain,
                            AttentionShape s, void *work) {
    if (!attention_mma_takes(s, dqkv, dout, qkv)) {
        attention_backward_tiled<bf16>(dqkv, dgain, dout, out, lse, delta, qkv, gain, s, work);
        return;
    }
    AttentionArgs a = {s,   (const bf16 *)qkv, (const bf16 *)dout, gain, (bf16 *)dqkv,
                       (float *)lse, delta};
    attention_deltas_bf16(delta, dout, out, s);
    if (s.d <= 16) backward_kernels<16, QUERIES>(a);
    else if (s.d <= 32) backward_kernels<32, QUERIES>(a);
    else if (s.d <= 64) backward_kernels<64, QUERIES>(a);
    else backward_kernels<128, QUERIES / 2>(a);
    attention_gains_sum(dgain, delta, s);
}

const Kernel attention_mma_kernels[] = {
    KERNEL(bf16, attention.forward, attention_forward_mma, "",
           "scores stay in the registers of mma, keys and values come while others are multiplied"),
    KERNEL(bf16, attention.backward, attention_backward_mma, "",
           "the same, keys and queries in turn"),
};
const int n_attention_mma_kernels = sizeof attention_mma_kernels / sizeof *attention_mma_kernels;
