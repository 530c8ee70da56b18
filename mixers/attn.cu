// attn.cu: attention on a GPU, naive and tiled. Read attn.c first: it says what is computed, and
// its loops are the naive kernels'. The tiled ones are templates on the activations and serve
// `tiled` (float32) and `tensor` (bf16) where fast/attention_mma.cu does not take the shape.
//
// Count, with P pairs of a byte and one that it attends to (attention_pairs: B H T^2/2 where W =
// T): forward 4 P d operations, backward 10 P d (all kernels here compute a and dp twice: 14).
// Arrays are read once and written once: N (2H + 2G) d values forward. At 32 x 1024 with 4 heads of
// 64 that is 17 GFLOP and 67 MB in bf16: 23 us of memory and 270 us of float32 arithmetic at 63
// TFLOP/s. So arithmetic is the bound, and no array of T x T values is ever in memory. Run by:
// ./train --device cuda --kernels naive|tiled|tensor --units "2x(attn mlp)"
#include "mixers/attn.cuh"

// ---- Turning ------------------------------------------------------------------------------------

// Bytes: q and k read and written, N (H+G) d values.
static double turn_bytes(AttentionShape s, size_t size, int times) {
    return times * array_bytes(size, (size_t)s.B * s.T, (s.H + s.G) * s.d);
}

// Channels a and b that pair p of a head consists of: two that are turned together, or two of the
// rest. b may lie beyond the head.
static __device__ int2 pair_of(int p, int R) {
    return p < R / 2 ? make_int2(p, p + R / 2) : make_int2(2 * p, 2 * p + 1);
}
// Cosine and sine of pair p at position t; 1 and 0 of what is not turned.
static __device__ float2 angle_of(uint64_t t, int p, int R) {
    float2 a = make_float2(1, 0);
    if (p < R / 2) sincospif(2 * (float)turn_of(t, turn_step(p, R)), &a.y, &a.x);
    return a;
}

// One warp a row of qkv: a lane owns pairs lane and lane + 32 of every head, so a row's angles are
// computed once for all heads, and neighbours read neighbours.
// Bound: memory, turn_bytes.
enum { LANE_PAIRS = MAX_HEAD / 64 };

template <typename T>
__global__ void turn_forward_rows(T *qkv, float *rms, AttentionShape s) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32, heads = s.H + s.G;
    if (n >= (size_t)s.B * s.T) return;
    float2 turn[LANE_PAIRS];
    for (int i = 0; i < LANE_PAIRS; i++) turn[i] = angle_of(n % s.T, lane + 32 * i, s.R);
    for (int h = 0; h < heads; h++) {
        T *x = qkv + n * row_width(s) + (size_t)h * s.d;
        float2 v[LANE_PAIRS];
        float squares = 0;
        for (int i = 0; i < LANE_PAIRS; i++) {
            int2 at = pair_of(lane + 32 * i, s.R);
            v[i].x = at.x < s.d ? (float)x[at.x] : 0;
            v[i].y = at.y < s.d ? (float)x[at.y] : 0;
            squares += v[i].x * v[i].x + v[i].y * v[i].y;
        }
        float r = s.raw ? 1 : rsqrtf(warp_sum(squares) / s.d + (float)NORM_EPS);
        if (rms && lane == 0) rms[n * heads + h] = r;
        for (int i = 0; i < LANE_PAIRS; i++) {
            int2 at = pair_of(lane + 32 * i, s.R);
            float a = r * v[i].x, b = r * v[i].y;
            if (at.x < s.d) x[at.x] = (T)(a * turn[i].x - b * turn[i].y);
            if (at.y < s.d) x[at.y] = (T)(a * turn[i].y + b * turn[i].x);
        }
    }
}

// forward:  y = r x, turned.     Back: dx = r (dy - y average(dy * y)), both turned back.
template <typename T>
__global__ void turn_backward_rows(T *dqkv, const T *qkv, const float *rms, AttentionShape s) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32, heads = s.H + s.G;
    if (n >= (size_t)s.B * s.T) return;
    float2 turn[LANE_PAIRS];
    for (int i = 0; i < LANE_PAIRS; i++) turn[i] = angle_of(n % s.T, lane + 32 * i, s.R);
    for (int h = 0; h < heads; h++) {
        size_t row = n * row_width(s) + (size_t)h * s.d;
        float2 g[LANE_PAIRS], y[LANE_PAIRS];
        float dot = 0;
        for (int i = 0; i < LANE_PAIRS; i++) {
            int2 at = pair_of(lane + 32 * i, s.R);
            float2 dv = make_float2(at.x < s.d ? (float)dqkv[row + at.x] : 0,
                                    at.y < s.d ? (float)dqkv[row + at.y] : 0);
            float2 v = make_float2(at.x < s.d ? (float)qkv[row + at.x] : 0,
                                   at.y < s.d ? (float)qkv[row + at.y] : 0);
            g[i] = make_float2(dv.x * turn[i].x + dv.y * turn[i].y,
                               dv.y * turn[i].x - dv.x * turn[i].y);
            y[i] = make_float2(v.x * turn[i].x + v.y * turn[i].y,
                               v.y * turn[i].x - v.x * turn[i].y);
            dot += g[i].x * y[i].x + g[i].y * y[i].y;
        }
        float r = rms[n * heads + h], mean = s.raw ? 0 : warp_sum(dot) / s.d;
        for (int i = 0; i < LANE_PAIRS; i++) {
            int2 at = pair_of(lane + 32 * i, s.R);
            if (at.x < s.d) dqkv[row + at.x] = (T)(r * (g[i].x - y[i].x * mean));
            if (at.y < s.d) dqkv[row + at.y] = (T)(r * (g[i].y - y[i].y * mean));
        }
    }
}

// wide: heads of D channels that are turned as a whole, D = 32, 64 or 128. D/16 lanes share a head,
// and a lane owns 8 channels of each half: two loads of 16 bytes. A row's D/2 angles are computed
// once, one or two a lane, and handed round.
// Bound before: loads of two bytes, one head after the other. Measured: 32768 rows of 8 heads of 64
// in bf16 54 -> 27 us forward, 69 -> 37 back, 84 and 92 % of a copy.

// turn[j]: of pair 8 * (lane % (D/16)) + j.
template <int D>
static __device__ void share_angles(float2 turn[8], uint64_t t) {
    const int lane = threadIdx.x % 32, first = lane % (D / 16) * 8;
    const float2 own = angle_of(t, lane, D), next = angle_of(t, lane + 32, D);
    for (int j = 0; j < 8; j++) {
        const int from = (first + j) % 32;
        turn[j] = make_float2(__shfl_sync(~0u, own.x, from), __shfl_sync(~0u, own.y, from));
        if (D <= 64) continue;
        float2 v = make_float2(__shfl_sync(~0u, next.x, from), __shfl_sync(~0u, next.y, from));
        if (first >= 32) turn[j] = v;
    }
}
// The sum over the lanes of a head.
template <int D>
static __device__ float head_sum(float v) {
    for (int m = 1; m < D / 16; m *= 2) v += __shfl_xor_sync(~0u, v, m);
    return v;
}
// Both halves of a lane's 16 channels of a head; zeros where there is no head.
template <int D, typename T>
static __device__ void load_halves(float v[2][8], const T *x, bool has) {
    for (int j = 0; j < 8; j++) v[0][j] = v[1][j] = 0;
    if (has) load_eight(v[0], x), load_eight(v[1], x + D / 2);
}

template <int D, typename T>
__global__ void turn_forward_wide(T *qkv, float *rms, AttentionShape s) {
    begin_dependent();
    enum { LANES = D / 16, HEADS_AT_ONCE = 32 / LANES };
    const size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, heads = s.H + s.G;
    if (n >= (size_t)s.B * s.T) return;
    float2 turn[8];
    share_angles<D>(turn, n % s.T);
    for (int h0 = 0; h0 < heads; h0 += HEADS_AT_ONCE) {
        const int h = h0 + lane / LANES;
        T *x = qkv + n * row_width(s) + (size_t)h * D + lane % LANES * 8;
        float v[2][8], squares = 0;
        load_halves<D>(v, x, h < heads);
        for (int j = 0; j < 8; j++) squares += v[0][j] * v[0][j] + v[1][j] * v[1][j];
        squares = head_sum<D>(squares);
        if (h >= heads) continue;
        const float r = s.raw ? 1 : rsqrtf(squares / D + (float)NORM_EPS);
        if (rms && lane % LANES == 0) rms[n * heads + h] = r;
        for (int j = 0; j < 8; j++) {
            float a = r * v[0][j], b = r * v[1][j];
            v[0][j] = a * turn[j].x - b * turn[j].y;
            v[1][j] = a * turn[j].y + b * turn[j].x;
        }
        store_eight(x, v[0]), store_eight(x + D / 2, v[1]);
    }
}

template <int D, typename T>
__global__ void turn_backward_wide(T *dqkv, const T *qkv, const float *rms, AttentionShape s) {
    begin_dependent();
    enum { LANES = D / 16, HEADS_AT_ONCE = 32 / LANES };
    const size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, heads = s.H + s.G;
    if (n >= (size_t)s.B * s.T) return;
    float2 turn[8];
    share_angles<D>(turn, n % s.T);
    for (int h0 = 0; h0 < heads; h0 += HEADS_AT_ONCE) {
        const int h = h0 + lane / LANES;
        const size_t at = n * row_width(s) + (size_t)h * D + lane % LANES * 8;
        float g[2][8], y[2][8], dot = 0;
        load_halves<D>(g, dqkv + at, h < heads);
        load_halves<D>(y, qkv + at, h < heads);
        for (int j = 0; j < 8; j++) {
            const float2 dv = make_float2(g[0][j], g[1][j]), v = make_float2(y[0][j], y[1][j]);
            g[0][j] = dv.x * turn[j].x + dv.y * turn[j].y;
            g[1][j] = dv.y * turn[j].x - dv.x * turn[j].y;
            y[0][j] = v.x * turn[j].x + v.y * turn[j].y;
            y[1][j] = v.y * turn[j].x - v.x * turn[j].y;
            dot += g[0][j] * y[0][j] + g[1][j] * y[1][j];
        }
        dot = head_sum<D>(dot);
        if (h >= heads) continue;
        const float r = rms[n * heads + h], mean = s.raw ? 0 : dot / D;
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 8; j++) g[i][j] = r * (g[i][j] - y[i][j] * mean);
        store_eight(dqkv + at, g[0]), store_eight(dqkv + at + D / 2, g[1]);
    }
}

template <typename T>
static void turn_forward_by(void (*kernel)(T *, float *, AttentionShape), act *qkv, real *rms,
                            AttentionShape s) {
    LAUNCH(kernel, blocks_for((size_t)s.B * s.T, WARPS), THREADS, (T *)qkv, rms, s);
    LAUNCHED("turn_forward", 0, turn_bytes(s, sizeof(T), 2));
}
template <typename T>
static void turn_backward_by(void (*kernel)(T *, const T *, const float *, AttentionShape),
                             act *dqkv, const act *qkv, const real *rms, AttentionShape s) {
    LAUNCH(kernel, blocks_for((size_t)s.B * s.T, WARPS), THREADS, (T *)dqkv, (const T *)qkv, rms,
           s);
    LAUNCHED("turn_backward", 0, turn_bytes(s, sizeof(T), 3));
}
static void turn_forward_naive(act *qkv, real *rms, AttentionShape s) {
    turn_forward_by(turn_forward_rows<float>, qkv, rms, s);
}
static void turn_backward_naive(act *dqkv, const act *qkv, const real *rms, AttentionShape s) {
    turn_backward_by(turn_backward_rows<float>, dqkv, qkv, rms, s);
}
// Channels of a head where a wide kernel takes it, else 0.
static int turned_whole(AttentionShape s, const act *qkv, const act *dqkv) {
    return s.R == s.d && aligned16(qkv) && aligned16(dqkv) ? s.d : 0;
}
template <typename T>
static void turn_forward_tiled(act *qkv, real *rms, AttentionShape s) {
    switch (turned_whole(s, qkv, NULL)) {
    case 32: turn_forward_by(turn_forward_wide<32, T>, qkv, rms, s); break;
    case 64: turn_forward_by(turn_forward_wide<64, T>, qkv, rms, s); break;
    case 128: turn_forward_by(turn_forward_wide<128, T>, qkv, rms, s); break;
    default: turn_forward_by(turn_forward_rows<T>, qkv, rms, s);
    }
}
template <typename T>
static void turn_backward_tiled(act *dqkv, const act *qkv, const real *rms, AttentionShape s) {
    switch (turned_whole(s, qkv, dqkv)) {
    case 32: turn_backward_by(turn_backward_wide<32, T>, dqkv, qkv, rms, s); break;
    case 64: turn_backward_by(turn_backward_wide<64, T>, dqkv, qkv, rms, s); break;
    case 128: turn_backward_by(turn_backward_wide<128, T>, dqkv, qkv, rms, s); break;
    default: turn_backward_by(turn_backward_rows<T>, dqkv, qkv, rms, s);
    }
}

// ---- naive: the plain loops, a thread for each row and head -------------------------------------

static __device__ float dot_of(const float *a, const float *b, int d) {
    float sum = 0;
    for (int c = 0; c < d; c++) sum += a[c] * b[c];
    return sum;
}
static __device__ size_t first_row(AttentionShape s, size_t n) {
    size_t t = n % s.T;
    return n - (t < (size_t)s.W ? t : (size_t)s.W - 1);
}

__global__ void attention_rows_naive(float *out, float *lse, const float *qkv, const float *gain,
                                     AttentionShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / s.H;
    if (n >= (size_t)s.B * s.T) return;
    Head h(s, (int)(i % s.H));
    const float *q = qkv + n * row_width(s) + h.q;
    float scale = gain[h.h] * rsqrtf((float)s.d), top = -INFINITY, sum = 0, o[MAX_HEAD];
    for (size_t m = first_row(s, n); m <= n; m++)
        top = fmaxf(top, scale * dot_of(q, qkv + m * row_width(s) + h.k, s.d));
    for (int c = 0; c < s.d; c++) o[c] = 0;
    for (size_t m = first_row(s, n); m <= n; m++) {
        const float *row = qkv + m * row_width(s);
        float e = expf(scale * dot_of(q, row + h.k, s.d) - top);
        sum += e;
        for (int c = 0; c < s.d; c++) o[c] += e * row[h.v + c];
    }
    for (int c = 0; c < s.d; c++) out[i * s.d + c] = o[c] / sum;
    if (lse) lse[i] = top + logf(sum);
}

static void attention_forward_naive(act *out, real *lse, const act *qkv, const real *gain,
                                    AttentionShape s, void *work) {
    (void)work;
    attention_rows_naive<<<blocks_for((size_t)s.B * s.T * s.H, 64), 64, 0, gpu_stream>>>(
        (float *)out, lse, (const float *)qkv, gain, s);
    LAUNCHED("attention_forward_naive", 4 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(float), 1, 1));
}

// delta = dout . out of every row and head, a warp each; 2 N H d values read. For all rungs.
template <typename T>
__global__ void attention_deltas(float *delta, const T *dout, const T *out, size_t rows, int d) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (i >= rows) return;
    float sum = 0;
    for (int c = lane; c < d; c += 32) sum += (float)dout[i * d + c] * (float)out[i * d + c];
    sum = warp_sum(sum);
    if (lane == 0) delta[i] = sum;
}

// dk, dv of row m, from all queries that see it: a thread for each row and group.
__global__ void attention_keys_naive(float *dqkv, const float *dout, const float *lse,
                                     const float *delta, const float *qkv, const float *gain,
                                     AttentionShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i / s.G;
    if (m >= (size_t)s.B * s.T) return;
    int g = (int)(i % s.G), shared = s.H / s.G, left = s.T - 1 - (int)(m % s.T);
    size_t last = m + (left < s.W - 1 ? left : s.W - 1);
    float dk[MAX_HEAD], dv[MAX_HEAD], root = rsqrtf((float)s.d);
    for (int c = 0; c < s.d; c++) dk[c] = dv[c] = 0;
    for (int j = g * shared; j < (g + 1) * shared; j++) {
        Head h(s, j);
        const float *row = qkv + m * row_width(s);
        for (size_t n = m; n <= last; n++) {
            const float *q = qkv + n * row_width(s) + h.q, *go = dout + (n * s.H + j) * s.d;
            float p = expf(gain[j] * root * dot_of(q, row + h.k, s.d) - lse[n * s.H + j]);
            float da = p * (dot_of(go, row + h.v, s.d) - delta[n * s.H + j]);
            for (int c = 0; c < s.d; c++) dv[c] += p * go[c];
            for (int c = 0; c < s.d; c++) dk[c] += gain[j] * root * da * q[c];
        }
    }
    Head h(s, g * shared);
    for (int c = 0; c < s.d; c++) dqkv[m * row_width(s) + h.k + c] = dk[c];
    for (int c = 0; c < s.d; c++) dqkv[m * row_width(s) + h.v + c] = dv[c];
}

// dq of row n; delta becomes what the row adds to dgain.
__global__ void attention_queries_naive(float *dqkv, const float *dout, const float *lse,
                                        float *delta, const float *qkv, const float *gain,
                                        AttentionShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / s.H;
    if (n >= (size_t)s.B * s.T) return;
    Head h(s, (int)(i % s.H));
    const float *q = qkv + n * row_width(s) + h.q, *go = dout + i * s.d;
    float dq[MAX_HEAD], root = rsqrtf((float)s.d);
    for (int c = 0; c < s.d; c++) dq[c] = 0;
    for (size_t m = first_row(s, n); m <= n; m++) {
        const float *row = qkv + m * row_width(s);
        float p = expf(gain[h.h] * root * dot_of(q, row + h.k, s.d) - lse[i]);
        float da = p * (dot_of(go, row + h.v, s.d) - delta[i]);
        for (int c = 0; c < s.d; c++) dq[c] += root * da * row[h.k + c];
    }
    delta[i] = dot_of(dq, q, s.d);
    for (int c = 0; c < s.d; c++) dqkv[n * row_width(s) + h.q + c] = gain[h.h] * dq[c];
}

// dgain += sums of the columns of delta (N,H), in a fixed order: a block for each head.
// wide: `lanes` lanes share a row of 8 * lanes channels, 16 bytes of bf16 each.
template <typename T>
__global__ void attention_deltas_wide(float *delta, const T *dout, const T *out, size_t rows,
                                      int lanes) {
    begin_dependent();
    const size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x, i = at / (unsigned)lanes;
    float sum = 0, a[8], b[8];
    if (i < rows) {
        load_eight(a, dout + 8 * at);
        load_eight(b, out + 8 * at);
        for (int j = 0; j < 8; j++) sum += a[j] * b[j];
    }
    for (int m = 1; m < lanes; m *= 2) sum += __shfl_xor_sync(~0u, sum, m);
    if (i < rows && at % (unsigned)lanes == 0) delta[i] = sum;
}
__global__ void attention_gains(float *dgain, const float *delta, size_t N, int H) {
    begin_dependent();
    double sum = 0;
#pragma unroll 8  // so many loads are on their way at a time
    for (size_t n = threadIdx.x; n < N; n += blockDim.x) sum += delta[n * H + blockIdx.x];
    sum = block_sum(sum);
    if (threadIdx.x == 0) dgain[blockIdx.x] += (float)sum;
}

template <typename T>
static void launch_deltas(real *delta, const act *dout, const act *out, AttentionShape s) {
    size_t rows = (size_t)s.B * s.T * s.H;
    const int lanes = s.d / 8;
    const bool wide = s.d % 8 == 0 && (lanes & (lanes - 1)) == 0 && aligned16(dout) &&
                      aligned16(out);
    if (wide)
        LAUNCH(attention_deltas_wide<T>, blocks_for(rows * lanes, THREADS), THREADS, delta,
               (const T *)dout, (const T *)out, rows, lanes);
    else
        LAUNCH(attention_deltas<T>, blocks_for(rows, WARPS), THREADS, delta, (const T *)dout,
           (const T *)out, rows, s.d);
    LAUNCHED("attention_deltas", 0, 2 * array_bytes(sizeof(T), rows, s.d));
}
void attention_deltas_bf16(real *delta, const act *dout, const act *out, AttentionShape s) {
    launch_deltas<bf16>(delta, dout, out, s);
}
void attention_gains_sum(real *dgain, const real *delta, AttentionShape s) {
    LAUNCH(attention_gains, (unsigned)s.H, 1024, dgain, delta, (size_t)s.B * s.T, s.H);
    LAUNCHED("attention_gains", 0, array_bytes(sizeof(float), (size_t)s.B * s.T, s.H));
}

static void attention_backward_naive(act *dqkv, real *dgain, const act *dout, const act *out,
                                     const real *lse, real *delta, const act *qkv,
                                     const real *gain, AttentionShape s, void *work) {
    size_t N = (size_t)s.B * s.T;
    (void)work;
    launch_deltas<float>(delta, dout, out, s);
    attention_keys_naive<<<blocks_for(N * s.G, 64), 64, 0, gpu_stream>>>(
        (float *)dqkv, (const float *)dout, lse, delta, (const float *)qkv, gain, s);
    LAUNCHED("attention_keys_naive", 8 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(float), 2, 1));
    attention_queries_naive<<<blocks_for(N * s.H, 64), 64, 0, gpu_stream>>>(
        (float *)dqkv, (const float *)dout, lse, delta, (const float *)qkv, gain, s);
    LAUNCHED("attention_queries_naive", 6 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(float), 2, 1));
    attention_gains_sum(dgain, delta, s);
}

// ---- tiled: tiles of queries and keys in shared memory ------------------------------------------
//
// A block owns TILE queries of one head, and walks over the tiles of keys that their windows touch.
// It never needs a row's scores all at once (Dao et al., arXiv:2205.14135): with the largest score
// so far, `top`, the sum of exp(a - top) and the weighted values, a next tile that raises top by D
// only scales sum and values by exp(-D). Bound before: every score read 2 d values from L1 for d
// multiplications. Now 256 threads in 16 x 16 own M x M scores each, M = TILE/16, and read 2 M
// values from shared memory for M^2 products. Bytes: q once; k and v once for every tile of
// queries, from L2. Cost: q, k (then p in its place) and v in shared memory, 50 KB with TILE = 64
// and heads of 64.

enum { SIDE = 16 };  // of the square of threads

// rows x D values from `from` on into to (rows, D+1), zero from `left` rows and d channels on.
template <int D, typename T>
static __device__ void load_tile(float *to, const T *from, size_t stride, int rows, int left,
                                 int d) {
    for (int i = threadIdx.x; i < rows * D; i += SIDE * SIDE) {
        int r = i / D, c = i % D;
        to[r * (D + 1) + c] = r < left && c < d ? (float)from[r * stride + c] : 0;
    }
}

// a[i][j] = x[row ty*M + i] . y[row tx + SIDE*j]; rows of D+1 values: no two threads of a warp meet
// in a bank.
template <int D, int M>
static __device__ void products(float (&a)[M][M], const float *x, const float *y) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < M; j++) a[i][j] = 0;
    for (int c = 0; c < D; c++) {
        float xs[M], ys[M];
        for (int i = 0; i < M; i++) xs[i] = x[(ty * M + i) * (D + 1) + c];
        for (int j = 0; j < M; j++) ys[j] = y[(tx + SIDE * j) * (D + 1) + c];
        for (int i = 0; i < M; i++)
            for (int j = 0; j < M; j++) a[i][j] += xs[i] * ys[j];
    }
}

// The 16 threads of a row are half a warp: what they hold together.
static __device__ float row_most(float v) {
    for (int d = SIDE / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}
static __device__ float row_sum(float v) {
    for (int d = SIDE / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

static __device__ bool attends(AttentionShape s, int t, int m) {  // m: a byte of the text, or after
    return m <= t && t - m < s.W && t < s.T;
}

template <int D, int TILE>
constexpr int forward_shared() {
    return (TILE * (D + 1) * 2 + TILE * (D > TILE ? D + 1 : TILE + 1)) * (int)sizeof(float);
}

template <int D, int TILE, typename T>
__global__ void __launch_bounds__(SIDE * SIDE)
    attention_tiles(T *out, float *lse, const T *qkv, const float *gain, AttentionShape s) {
    constexpr int M = TILE / SIDE, COLS = D / SIDE;
    extern __shared__ float shared[];
    float *q = shared, *v = q + TILE * (D + 1), *k = v + TILE * (D + 1), *p = k;
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, t0 = blockIdx.x * TILE;
    Head h(s, (int)blockIdx.y);
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T;
    const T *x = qkv + text * wide;
    const float scale = gain[h.h] * rsqrtf((float)s.d);
    float o[M][COLS] = {}, top[M], sum[M] = {};
    for (int i = 0; i < M; i++) top[i] = -INFINITY;
    load_tile<D>(q, x + t0 * wide + h.q, wide, TILE, s.T - t0, s.d);
    int first = t0 - s.W + 1 > 0 ? (t0 - s.W + 1) / TILE * TILE : 0;
    for (int m0 = first; m0 < t0 + TILE && m0 < s.T; m0 += TILE) {
        __syncthreads();  // p and v of the tile before have been read
        load_tile<D>(k, x + m0 * wide + h.k, wide, TILE, s.T - m0, s.d);
        load_tile<D>(v, x + m0 * wide + h.v, wide, TILE, s.T - m0, s.d);
        __syncthreads();
        float a[M][M];
        products<D>(a, q, k);
        __syncthreads();  // k has been read: p takes its place
        for (int i = 0; i < M; i++) {
            int t = t0 + ty * M + i;
            float most = top[i], row = 0;
            for (int j = 0; j < M; j++) {
                a[i][j] = attends(s, t, m0 + tx + SIDE * j) ? scale * a[i][j] : -INFINITY;
                most = fmaxf(most, a[i][j]);
            }
            most = row_most(most);
            // No key of this row so far: there is nothing to scale, and -inf - -inf is no number.
            float shrink = most == -INFINITY ? 1 : expf(top[i] - most);
            for (int j = 0; j < M; j++) {
                float e = a[i][j] == -INFINITY ? 0 : expf(a[i][j] - most);
                p[(ty * M + i) * (TILE + 1) + tx + SIDE * j] = e;
                row += e;
            }
            sum[i] = shrink * sum[i] + row_sum(row);
            top[i] = most;
            for (int c = 0; c < COLS; c++) o[i][c] *= shrink;
        }
        __syncthreads();
        for (int m = 0; m < TILE; m++)
            for (int c = 0; c < COLS; c++) {
                float value = v[m * (D + 1) + tx + SIDE * c];
                for (int i = 0; i < M; i++) o[i][c] += p[(ty * M + i) * (TILE + 1) + m] * value;
            }
    }
    for (int i = 0; i < M; i++) {
        int t = t0 + ty * M + i;
        if (t >= s.T) break;
        size_t row = (text + t) * s.H + h.h;
        for (int c = 0; c < COLS; c++)
            if (tx + SIDE * c < s.d) out[row * s.d + tx + SIDE * c] = (T)(o[i][c] / sum[i]);
        if (lse && tx == 0) lse[row] = top[i] + logf(sum[i]);
    }
}

template <int D, int TILE, typename T>
static void run_tiles(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s) {
    constexpr int bytes = forward_shared<D, TILE>();
    auto kernel = attention_tiles<D, TILE, T>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    dim3 grid(blocks_for(s.T, TILE), s.H, s.B);
    kernel<<<grid, SIDE * SIDE, bytes, gpu_stream>>>((T *)out, lse, (const T *)qkv, gain, s);
}

template <typename T>
void attention_forward_tiled(act *out, real *lse, const act *qkv, const real *gain,
                             AttentionShape s, void *work) {
    (void)work;
    if (s.d <= 16) run_tiles<16, 64, T>(out, lse, qkv, gain, s);
    else if (s.d <= 32) run_tiles<32, 64, T>(out, lse, qkv, gain, s);
    else if (s.d <= 64) run_tiles<64, 64, T>(out, lse, qkv, gain, s);
    else run_tiles<128, 32, T>(out, lse, qkv, gain, s);
    LAUNCHED("attention_forward_tiled", 4 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(T), 1, 1));
}

// Backward, with p recomputed from lse, in two kernels of one form: what a block owns stays, what
// it walks over changes. Nobody adds to what another block adds to, so every sum has a fixed order.
//   keys      a block owns TILE keys, walks over the queries that see them, makes dk and dv
//   queries   a block owns TILE queries, walks over their keys, makes dq
// Cost: a and dp are computed in both, 14 P d operations for 10.

template <int D, int TILE>
constexpr int backward_shared() {
    return (4 * TILE * (D + 1) + 2 * TILE * (TILE + 1)) * (int)sizeof(float);
}

// Shared memory of a block: queries, gradients of out, keys, values; p and da of queries x keys.
template <int D, int TILE>
struct Tiles {
    float *q, *go, *k, *v, *p, *da;
    __device__ Tiles(float *shared) {
        constexpr int rows = TILE * (D + 1);
        q = shared, go = q + rows, k = go + rows, v = k + rows, p = v + rows;
        da = p + TILE * (TILE + 1);
    }
};

// p and da / sqrt(d) of queries t0.. and keys m0.., zero where a query does not see a key.
template <int D, int TILE>
static __device__ void score_gradients(const Tiles<D, TILE> &tiles, const float *lse,
                                       const float *delta, float gain, AttentionShape s, int t0,
                                       int m0) {
    constexpr int M = TILE / SIDE;
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    const float root = rsqrtf((float)s.d);
    float a[M][M], dp[M][M];
    products<D>(a, tiles.q, tiles.k);
    products<D>(dp, tiles.go, tiles.v);
    for (int i = 0; i < M; i++) {
        int t = t0 + ty * M + i;
        float lse_t = t < s.T ? lse[(size_t)t * s.H] : 0;
        float delta_t = t < s.T ? delta[(size_t)t * s.H] : 0;
        for (int j = 0; j < M; j++) {
            bool seen = attends(s, t, m0 + tx + SIDE * j);
            float p = seen ? expf(gain * root * a[i][j] - lse_t) : 0;
            int at = (ty * M + i) * (TILE + 1) + tx + SIDE * j;
            tiles.p[at] = p;
            tiles.da[at] = root * p * (dp[i][j] - delta_t);
        }
    }
}

// sum[i][c] += sum over r of e[r][row ty*M + i] x[r][column tx + SIDE*c]; BY_ROW: e transposed.
template <int D, int TILE, bool BY_ROW, int M, int COLS>
static __device__ void add_products(float (&sum)[M][COLS], const float *e, const float *x) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int r = 0; r < TILE; r++)
        for (int c = 0; c < COLS; c++) {
            float value = x[r * (D + 1) + tx + SIDE * c];
            for (int i = 0; i < M; i++) {
                int own = ty * M + i;
                sum[i][c] += e[BY_ROW ? own * (TILE + 1) + r : r * (TILE + 1) + own] * value;
            }
        }
}

template <int D, int TILE, typename T>
__global__ void __launch_bounds__(SIDE * SIDE)
    attention_key_tiles(T *dqkv, const T *dout, const float *lse, const float *delta, const T *qkv,
                        const float *gain, AttentionShape s) {
    constexpr int M = TILE / SIDE, COLS = D / SIDE;
    extern __shared__ float shared[];
    const Tiles<D, TILE> tiles(shared);
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, m0 = blockIdx.x * TILE;
    const int heads = s.H / s.G, first = (int)blockIdx.y * heads;
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T, C = (size_t)s.H * s.d;
    const T *x = qkv + text * wide;
    Head own(s, first);
    float dk[M][COLS] = {}, dv[M][COLS] = {};
    load_tile<D>(tiles.k, x + m0 * wide + own.k, wide, TILE, s.T - m0, s.d);
    load_tile<D>(tiles.v, x + m0 * wide + own.v, wide, TILE, s.T - m0, s.d);
    int last = s.W < s.T - m0 - TILE ? m0 + TILE + s.W - 1 : s.T;  // queries up to here see a key
    for (int j = first; j < first + heads; j++)
        for (int t0 = m0; t0 < last; t0 += TILE) {
            Head h(s, j);
            __syncthreads();
            load_tile<D>(tiles.q, x + t0 * wide + h.q, wide, TILE, s.T - t0, s.d);
            load_tile<D>(tiles.go, dout + (text + t0) * C + h.q, C, TILE, s.T - t0, s.d);
            __syncthreads();
            score_gradients<D, TILE>(tiles, lse + text * s.H + j, delta + text * s.H + j, gain[j],
                                     s, t0, m0);
            // forward:  a = gain / sqrt(d) q . k, and dk of all heads of the group in one sum
            for (int i = 0; i < M; i++)
                for (int k = 0; k < M; k++)
                    tiles.da[(ty * M + i) * (TILE + 1) + tx + SIDE * k] *= gain[j];
            __syncthreads();
            add_products<D, TILE, false>(dk, tiles.da, tiles.q);
            add_products<D, TILE, false>(dv, tiles.p, tiles.go);
        }
    for (int i = 0; i < M; i++) {
        int m = m0 + ty * M + i;
        if (m >= s.T) break;
        T *to = dqkv + (text + m) * wide + tx;
        for (int c = 0; c < COLS; c++) {
            if (tx + SIDE * c >= s.d) break;
            to[own.k + SIDE * c] = (T)dk[i][c];
            to[own.v + SIDE * c] = (T)dv[i][c];
        }
    }
}

// delta becomes what each row adds to dgain.
template <int D, int TILE, typename T>
__global__ void __launch_bounds__(SIDE * SIDE)
    attention_query_tiles(T *dqkv, const T *dout, const float *lse, float *delta, const T *qkv,
                          const float *gain, AttentionShape s) {
    constexpr int M = TILE / SIDE, COLS = D / SIDE;
    extern __shared__ float shared[];
    const Tiles<D, TILE> tiles(shared);
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, t0 = blockIdx.x * TILE;
    Head h(s, (int)blockIdx.y);
    const size_t wide = row_width(s), text = (size_t)blockIdx.z * s.T, C = (size_t)s.H * s.d;
    const T *x = qkv + text * wide;
    float dq[M][COLS] = {};
    load_tile<D>(tiles.q, x + t0 * wide + h.q, wide, TILE, s.T - t0, s.d);
    load_tile<D>(tiles.go, dout + (text + t0) * C + h.q, C, TILE, s.T - t0, s.d);
    int start = t0 - s.W + 1 > 0 ? (t0 - s.W + 1) / TILE * TILE : 0;
    for (int m0 = start; m0 < t0 + TILE && m0 < s.T; m0 += TILE) {
        __syncthreads();
        load_tile<D>(tiles.k, x + m0 * wide + h.k, wide, TILE, s.T - m0, s.d);
        load_tile<D>(tiles.v, x + m0 * wide + h.v, wide, TILE, s.T - m0, s.d);
        __syncthreads();
        score_gradients<D, TILE>(tiles, lse + text * s.H + h.h, delta + text * s.H + h.h, gain[h.h],
                                 s, t0, m0);
        __syncthreads();
        add_products<D, TILE, true>(dq, tiles.da, tiles.k);
    }
    for (int i = 0; i < M; i++) {
        int t = t0 + ty * M + i;
        float dot = 0;
        const float *q = tiles.q + (ty * M + i) * (D + 1) + tx;
        for (int c = 0; c < COLS; c++) dot += dq[i][c] * q[SIDE * c];
        dot = row_sum(dot);
        if (t >= s.T) continue;
        if (tx == 0) delta[(text + t) * s.H + h.h] = dot;
        for (int c = 0; c < COLS; c++)
            if (tx + SIDE * c < s.d)
                dqkv[(text + t) * wide + h.q + tx + SIDE * c] = (T)(gain[h.h] * dq[i][c]);
    }
}

template <int D, int TILE, typename T>
static void run_backward(act *dqkv, const act *dout, const real *lse, real *delta, const act *qkv,
                         const real *gain, AttentionShape s) {
    constexpr int bytes = backward_shared<D, TILE>();
    auto keys = attention_key_tiles<D, TILE, T>;
    auto queries = attention_query_tiles<D, TILE, T>;
    CHECK(cudaFuncSetAttribute(keys, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    CHECK(cudaFuncSetAttribute(queries, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    dim3 grid(blocks_for(s.T, TILE), s.G, s.B);
    keys<<<grid, SIDE * SIDE, bytes, gpu_stream>>>((T *)dqkv, (const T *)dout, lse, delta,
                                                   (const T *)qkv, gain, s);
    LAUNCHED("attention_keys_tiled", 8 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(T), 2, 1));
    grid.y = s.H;
    queries<<<grid, SIDE * SIDE, bytes, gpu_stream>>>((T *)dqkv, (const T *)dout, lse, delta,
                                                      (const T *)qkv, gain, s);
    LAUNCHED("attention_queries_tiled", 6 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(T), 2, 1));
}

template <typename T>
void attention_backward_tiled(act *dqkv, real *dgain, const act *dout, const act *out,
                              const real *lse, real *delta, const act *qkv, const real *gain,
                              AttentionShape s, void *work) {
    (void)work;
    launch_deltas<T>(delta, dout, out, s);
    if (s.d <= 16) run_backward<16, 32, T>(dqkv, dout, lse, delta, qkv, gain, s);
    else if (s.d <= 32) run_backward<32, 32, T>(dqkv, dout, lse, delta, qkv, gain, s);
    else if (s.d <= 64) run_backward<64, 32, T>(dqkv, dout, lse, delta, qkv, gain, s);
    else run_backward<128, 16, T>(dqkv, dout, lse, delta, qkv, gain, s);
    attention_gains_sum(dgain, delta, s);
}
template void attention_forward_tiled<bf16>(act *, real *, const act *, const real *,
                                            AttentionShape, void *);
template void attention_backward_tiled<bf16>(act *, real *, const act *, const act *, const real *,
                                             real *, const act *, const real *, AttentionShape,
                                             void *);

// ---- The table ----------------------------------------------------------------------------------

const Kernel attention_kernels[] = {
    KERNEL(float, attention.turn_forward, turn_forward_naive, "naive", "a warp a row"),
    KERNEL_PAIR(attention.turn_forward, turn_forward_tiled, "the same, 16 bytes at a time"),
    KERNEL(float, attention.turn_backward, turn_backward_naive, "naive", "a warp a row"),
    KERNEL_PAIR(attention.turn_backward, turn_backward_tiled, "the same, 16 bytes at a time"),
    KERNEL(float, attention.forward, attention_forward_naive, "naive", "a thread a row and head"),
    KERNEL_PAIR(attention.forward, attention_forward_tiled,
                "tiles of queries walk over tiles of keys, the softmax as they come"),
    KERNEL(float, attention.backward, attention_backward_naive, "naive",
           "a thread a row and head, for its query and for its key"),
    KERNEL_PAIR(attention.backward, attention_backward_tiled,
                "tiles of keys walk over queries, and of queries over keys"),
};
const int n_attention_kernels = sizeof attention_kernels / sizeof *attention_kernels;
