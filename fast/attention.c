// attention.c: attention on the CPU's second rung. The definition is mixers/attn.c; read that
// first.
//
// The heads of a group of one text are a task. Their keys are transposed once, so that the scores
// of a query with many keys are sums of vectors, one for each channel; values lie as they are.
// Forward keeps one row of scores, backward QUERIES rows and their gradients. Streaming calls the
// same three functions and so gives the same bits: every sum counts from the window's first byte.
#include <math.h>

#include "fast/layers.h"
#include "support/arithmetic.h"

enum { LANES = 16, QUERIES = 8, COLUMNS = 64 };

// ---- A query's row ------------------------------------------------------------------------------

// Vectors run over keys, not channels: every score is summed in the order of its channels, so that
// the bits do not depend on how many keys there are.
static inline void scores_block(real *a, const real *q, const real *k, size_t ld, int columns,
                                int d) {
    real sum[COLUMNS] = {0};
    for (int c = 0; c < d; c++)
        for (int i = 0; i < columns; i++) sum[i] += q[c] * k[(size_t)c * ld + (size_t)i];
    for (int i = 0; i < columns; i++) a[i] = sum[i];
}

void attention_scores(real *a, const real *q, const real *k, size_t ld, size_t n, int d) {
    size_t i = 0;
    for (; i + COLUMNS <= n; i += COLUMNS) scores_block(a + i, q, k + i, ld, COLUMNS, d);
    for (; i + LANES <= n; i += LANES) scores_block(a + i, q, k + i, ld, LANES, d);
    if (i < n) scores_block(a + i, q, k + i, ld, (int)(n - i), d);
}

real attention_softmax(real *a, size_t n, real scale, real *top) {
    real most[LANES], sum[LANES] = {0};
    size_t padded = (n + LANES - 1) / LANES * LANES;
    for (size_t i = 0; i < n; i++) a[i] *= scale;
    for (size_t i = n; i < padded; i++) a[i] = a[0];  // changes no maximum
    for (int j = 0; j < LANES; j++) most[j] = a[0];
    for (size_t i = 0; i < padded; i += LANES)
        for (int j = 0; j < LANES; j++) most[j] = a[i + j] > most[j] ? a[i + j] : most[j];
    for (int j = 1; j < LANES; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
    for (size_t i = 0; i < padded; i++) a[i] = exp_real(a[i] - most[0]);
    for (size_t i = n; i < padded; i++) a[i] = 0;
    for (size_t i = 0; i < padded; i += LANES)
        for (int j = 0; j < LANES; j++) sum[j] += a[i + j];
    for (int j = 1; j < LANES; j++) sum[0] += sum[j];
    if (top) *top = most[0];
    return sum[0];
}

// n rows of `columns` channels, which a compiler keeps in registers.
static inline void values_block(real *o, const real *e, const real *v, size_t ld, size_t n,
                                int columns) {
    real sum[COLUMNS];
    for (int c = 0; c < columns; c++) sum[c] = o[c];
    for (size_t i = 0; i < n; i++)
        for (int c = 0; c < columns; c++) sum[c] += e[i] * v[i * ld + (size_t)c];
    for (int c = 0; c < columns; c++) o[c] = sum[c];
}

void attention_values(real *o, const real *e, const real *v, size_t ld, size_t n, int d) {
    int c = 0;
    for (; c + COLUMNS <= d; c += COLUMNS) values_block(o + c, e, v + c, ld, n, COLUMNS);
    for (; c + LANES <= d; c += LANES) values_block(o + c, e, v + c, ld, n, LANES);
    if (c < d) values_block(o + c, e, v + c, ld, n, d - c);
}

// ---- A head of a text ---------------------------------------------------------------------------

static size_t row_width(AttentionShape s) { return (size_t)(s.H + 2 * s.G) * (size_t)s.d; }

// to (d,T) = from (T,d), whose rows lie `ld` apart
static void transpose(real *to, const real *from, size_t ld, int T, int d) {
    for (int t0 = 0; t0 < T; t0 += LANES)
        for (int c = 0; c < d; c++)
            for (int t = t0; t < T && t < t0 + LANES; t++)
                to[(size_t)c * T + t] = from[(size_t)t * ld + c];
}

// The workspace: transposed keys and values of every group, (B,G,2,d,T); then the scores and their
// gradients of QUERIES rows for every text and group.
static real *keys_of(AttentionShape s, void *work, int b, int g) {
    return (real *)work + ((size_t)b * s.G + g) * 2 * s.d * s.T;
}
static real *scores_of(AttentionShape s, void *work, int b, int g) {
    size_t each = 2 * QUERIES * (attention_padded(s.T) + LANES);
    return (real *)work + (size_t)s.B * s.G * 2 * s.d * s.T + ((size_t)b * s.G + g) * each;
}
size_t cpu_attention_work(AttentionShape s) {
    size_t each = 2 * QUERIES * (attention_padded(s.T) + LANES) + 2 * (size_t)s.d * s.T;
    return (size_t)s.B * s.G * each * sizeof(real);
}

static int first_of(AttentionShape s, int t) { return t < s.W ? 0 : t - s.W + 1; }

void cpu_attention_forward(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s,
                           void *work) {
    size_t wide = row_width(s);
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < s.B; b++)
        for (int g = 0; g < s.G; g++) {
            const real *x = (const real *)qkv + (size_t)b * s.T * wide;
            const real *k = x + (size_t)(s.H + g) * s.d, *v = k + (size_t)s.G * s.d;
            real *k_t = keys_of(s, work, b, g), *e = scores_of(s, work, b, g);
            transpose(k_t, k, wide, s.T, s.d);
            for (int h = g * (s.H / s.G); h < (g + 1) * (s.H / s.G); h++)
                for (int t = 0; t < s.T; t++) {
                    size_t n = (size_t)b * s.T + t, first = (size_t)first_of(s, t);
                    const real *q = x + (size_t)t * wide + (size_t)h * s.d;
                    real *o = (real *)out + (n * s.H + h) * (size_t)s.d, top;
                    attention_scores(e, q, k_t + first, (size_t)s.T, t + 1 - first, s.d);
                    real sum = attention_softmax(e, t + 1 - first, gain[h] / (real)sqrt(s.d), &top);
                    for (int c = 0; c < s.d; c++) o[c] = 0;
                    attention_values(o, e, v + first * wide, wide, t + 1 - first, s.d);
                    for (int c = 0; c < s.d; c++) o[c] /= sum;
                    if (lse) lse[n * s.H + h] = top + (real)log((double)sum);
                }
        }
    CPU_DONE("attention_forward", 4 * attention_pairs(s) * s.d,
             array_bytes(sizeof(real), (size_t)s.B * s.T, (int)wide + s.H * s.d));
}

// p of a row with n keys, and da / sqrt(d) as in mixers/attn.c.
static void row_gradients(real *p, real *da, const real *k_t, const real *v_t, const real *q,
                          const real *go, real lse, real D, real gain, size_t ld, size_t n, int d) {
    real root = (real)sqrt(d), scale = gain / root;
    attention_scores(p, q, k_t, ld, n, d);
    attention_scores(da, go, v_t, ld, n, d);
    for (size_t i = 0; i < n; i++) p[i] = exp_real(scale * p[i] - lse);
    for (size_t i = 0; i < n; i++) da[i] = p[i] * (da[i] - D) / root;
}

// Rows t0 .. t1-1 of a head add to dk and dv of their keys: x (rows, d) times e[row][key].
static void add_to_keys(real *to, size_t wide, const real *e, size_t ld, const real *x, size_t step,
                        AttentionShape s, int t0, int t1) {
    int low = first_of(s, t0);
    for (int m = low; m < t1; m++) {
        real *to_m = to + (size_t)m * wide, sum[MAX_HEAD];
        for (int c = 0; c < s.d; c++) sum[c] = to_m[c];
        for (int t = m > t0 ? m : t0; t < t1 && first_of(s, t) <= m; t++) {
            real e_tm = e[(size_t)(t - t0) * ld + (size_t)(m - first_of(s, t))];
            const real *x_t = x + (size_t)t * step;
            for (int c = 0; c < s.d; c++) sum[c] += e_tm * x_t[c];
        }
        for (int c = 0; c < s.d; c++) to_m[c] = sum[c];
    }
}

// All rows of one head of text b. delta (N,H) becomes what each row adds to dgain.
static void head_backward(real *dqkv, const real *dout, const real *out, const real *lse,
                          real *delta, const real *x, real gain, AttentionShape s, int b, int h,
                          void *work) {
    size_t wide = row_width(s), ld = attention_padded(s.T) + LANES, C = (size_t)s.H * s.d;
    int g = h / (s.H / s.G);
    size_t at_q = (size_t)h * s.d, at_k = (size_t)(s.H + g) * s.d, at_v = at_k + (size_t)s.G * s.d;
    real *p = scores_of(s, work, b, g), *da = p + QUERIES * ld;
    const real *k_t = keys_of(s, work, b, g), *v_t = k_t + (size_t)s.d * s.T;
    for (int t0 = 0; t0 < s.T; t0 += QUERIES) {
        int t1 = t0 + QUERIES < s.T ? t0 + QUERIES : s.T;
        for (int t = t0; t < t1; t++) {
            size_t first = (size_t)first_of(s, t), n = (size_t)b * s.T + t, count = t + 1 - first;
            const real *q = x + (size_t)t * wide + at_q, *go = dout + (size_t)t * C + at_q;
            const real *o = out + (size_t)t * C + at_q;
            real *dq = dqkv + (size_t)t * wide + at_q, D = 0, dot = 0;
            for (int c = 0; c < s.d; c++) D += go[c] * o[c];
            real *p_t = p + (size_t)(t - t0) * ld, *da_t = da + (size_t)(t - t0) * ld;
            row_gradients(p_t, da_t, k_t + first, v_t + first, q, go, lse[n * s.H + h], D, gain,
                          (size_t)s.T, count, s.d);
            // forward:  a = gain / sqrt(d) q . k
            for (int c = 0; c < s.d; c++) dq[c] = 0;
            attention_values(dq, da_t, x + first * wide + at_k, wide, count, s.d);
            for (int c = 0; c < s.d; c++) dot += dq[c] * q[c], dq[c] *= gain;
            for (size_t i = 0; i < count; i++) da_t[i] *= gain;
            delta[n * s.H + h] = dot;
        }
        add_to_keys(dqkv + at_k, wide, da, ld, x + at_q, wide, s, t0, t1);
        add_to_keys(dqkv + at_v, wide, p, ld, dout + at_q, C, s, t0, t1);
    }
}

void cpu_attention_backward(act *dqkv, real *dgain, const act *dout, const act *out,
                            const real *lse, real *delta, const act *qkv, const real *gain,
                            AttentionShape s, void *work) {
    size_t wide = row_width(s), C = (size_t)s.H * s.d, N = (size_t)s.B * s.T;
    memset(dqkv, 0, N * wide * sizeof(real));
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < s.B; b++)
        for (int g = 0; g < s.G; g++) {
            const real *x = (const real *)qkv + (size_t)b * s.T * wide;
            const real *k = x + (size_t)(s.H + g) * s.d;
            real *k_t = keys_of(s, work, b, g);
            transpose(k_t, k, wide, s.T, s.d);
            transpose(k_t + (size_t)s.d * s.T, k + (size_t)s.G * s.d, wide, s.T, s.d);
            for (int h = g * (s.H / s.G); h < (g + 1) * (s.H / s.G); h++)
                head_backward((real *)dqkv + (size_t)b * s.T * wide,
                              (const real *)dout + (size_t)b * s.T * C,
                              (const real *)out + (size_t)b * s.T * C, lse, delta, x, gain[h], s, b,
                              h, work);
        }
    for (int h = 0; h < s.H; h++) {
        double sum = 0;
        for (size_t n = 0; n < N; n++) sum += delta[n * s.H + h];
        dgain[h] += (real)sum;
    }
    CPU_DONE("attention_backward", 10 * attention_pairs(s) * s.d,
             array_bytes(sizeof(real), N, 2 * (int)wide + 2 * s.H * s.d));
}
