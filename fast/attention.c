// attention.c: attention on the CPU's second rung. The definition is mixers/attn.c; read that
// first.
//
// The heads of a group of one text are a task. Its products, some hundred operations for each value
// read, are made in the convolution's tiles (multiply_tile): scores from queries and transposed
// keys, what is attended to from scores and values, the gradients likewise. QUERIES rows are taken
// together, and what one of them does not attend to counts as zero. Streaming has a row at a time,
// in functions of its own: every sum has the same terms in the same order, and so the same bits.
// Measured: 67 GFLOP/s forward and 63 backward where a conv makes 107 (MEASURED.md).
#include <math.h>

#include "fast/layers.h"
#include "support/arithmetic.h"

enum { LANES = 16, QUERIES = 4 * TILE_ROWS };

// ---- One row, for streaming ---------------------------------------------------------------------

// Vectors run over keys, not channels: every score is summed in the order of its channels, so that
// the bits do not depend on how many keys there are. (So in multiply_tile, too.)
void attention_scores(real *a, const real *q, const real *k, size_t ld, size_t n, int d) {
    enum { BLOCK = 64 };
    for (size_t i0 = 0; i0 < n; i0 += BLOCK) {
        real sum[BLOCK] = {0};
        int m = n - i0 < BLOCK ? (int)(n - i0) : BLOCK;
        for (int c = 0; c < d; c++)
#pragma omp simd
            for (int i = 0; i < m; i++)
                sum[i] = muladd(q[c], k[(size_t)c * ld + i0 + (size_t)i], sum[i]);
        memcpy(a + i0, sum, (size_t)m * sizeof *a);
    }
}

void attention_values(real *o, const real *e, const real *v, size_t ld, size_t n, int d) {
    for (size_t i = 0; i < n; i++)
#pragma omp simd
        for (int c = 0; c < d; c++) o[c] = muladd(e[i], v[i * ld + (size_t)c], o[c]);
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

// ---- A head of a text ---------------------------------------------------------------------------

// to (d,T) = from (T,d), whose rows lie `ld` apart
static void transpose(real *to, const real *from, size_t ld, int T, int d) {
    for (int t0 = 0; t0 < T; t0 += LANES)
        for (int c = 0; c < d; c++)
            for (int t = t0; t < T && t < t0 + LANES; t++)
                to[(size_t)c * T + t] = from[(size_t)t * ld + c];
}

// A row's scores. The softmax writes up to LANES - 1 zeros behind them, from wherever they begin.
static size_t row_buffer(AttentionShape s) { return attention_padded(s.T) + LANES; }

// The workspace: transposed keys and values of every group, (B,G,2,d,T); then the scores and their
// gradients of QUERIES rows for every text and group.
static real *keys_of(AttentionShape s, void *work, int b, int g) {
    return (real *)work + ((size_t)b * s.G + g) * 2 * s.d * s.T;
}
static real *scores_of(AttentionShape s, void *work, int b, int g) {
    size_t each = 2 * QUERIES * row_buffer(s);
    return (real *)work + (size_t)s.B * s.G * 2 * s.d * s.T + ((size_t)b * s.G + g) * each;
}
size_t cpu_attention_work(AttentionShape s) {
    size_t each = 2 * QUERIES * row_buffer(s) + 2 * (size_t)s.d * s.T;
    return (size_t)s.B * s.G * each * sizeof(real);
}

// The first byte of its text that byte t attends to.
static int first_of(AttentionShape s, int t) { return (int)window_start_of(s, (size_t)t); }

// Rows t0 .. t0+rows-1 of a head: together they attend to n keys from `low` on. What one of them
// does not attend to counts as zero, so that rows may be taken together.
typedef struct {
    int t0, rows, low;
    size_t n, ld;  // keys of all rows together; from row to row in a buffer
} Rows;
static Rows rows_at(AttentionShape s, int t0) {
    Rows r = {.t0 = t0, .rows = s.T - t0 < QUERIES ? s.T - t0 : QUERIES, .low = first_of(s, t0),
              .ld = row_buffer(s)};
    r.n = (size_t)(t0 + r.rows - r.low);
    return r;
}
static void zero_outside(AttentionShape s, Rows r, real *e) {
    for (int i = 0; i < r.rows; i++) {
        size_t first = (size_t)(first_of(s, r.t0 + i) - r.low), after = (size_t)(r.rows - 1 - i);
        real *row = e + (size_t)i * r.ld;
        for (size_t j = 0; j < first; j++) row[j] = 0;
        for (size_t j = r.n - after; j < r.n; j++) row[j] = 0;
    }
}

// to[r][j] = sum_c x[r*ldx + c*step] * w[c*ldw + j], or with `add` +=, r < rows, j < cols: in whole
// tiles, and what is left at the edges one by one. The order of a sum is that of c, either way.
static void multiply(real *to, size_t ldt, bool add, const real *x, size_t ldx, size_t step,
                     const real *w, size_t ldw, size_t rows, size_t cols, int depth) {
    for (size_t r0 = 0; r0 < rows; r0 += TILE_ROWS)
        for (size_t j0 = 0; j0 < cols; j0 += TILE_COLS) {
            int n = rows - r0 < TILE_ROWS ? (int)(rows - r0) : TILE_ROWS;
            int m = cols - j0 < TILE_COLS ? (int)(cols - j0) : TILE_COLS;
            real sums[TILE_ROWS][TILE_COLS] = {{0}};
            const real *from[TILE_ROWS];
            // A row too many is a copy of the last, and thrown away.
            for (int r = 0; r < TILE_ROWS; r++)
                from[r] = x + (r0 + (size_t)(r < n ? r : n - 1)) * ldx;
            for (int r = 0; r < n && add; r++)
                memcpy(sums[r], to + (r0 + (size_t)r) * ldt + j0, (size_t)m * sizeof *to);
            if (m == TILE_COLS)
                multiply_tile(sums, from, step, w + j0, ldw, 1, depth);
            else
                for (int r = 0; r < n; r++)
                    for (int c = 0; c < depth; c++)
                        for (int j = 0; j < m; j++)
                            sums[r][j] = muladd(from[r][(size_t)c * step],
                                                w[(size_t)c * ldw + j0 + (size_t)j], sums[r][j]);
            for (int r = 0; r < n; r++)
                memcpy(to + (r0 + (size_t)r) * ldt + j0, sums[r], (size_t)m * sizeof *to);
        }
}

// All rows of head h of text b, whose rows begin at x.
static void head_forward(real *out, real *lse, const real *x, real gain, AttentionShape s, int b,
                         int h, void *work) {
    size_t wide = qkv_width(s), C = (size_t)s.H * s.d;
    int g = h / (s.H / s.G);
    const real *v = x + (size_t)(s.H + s.G + g) * s.d;
    real *e = scores_of(s, work, b, g), *k_t = keys_of(s, work, b, g);
    for (int t0 = 0; t0 < s.T; t0 += QUERIES) {
        Rows r = rows_at(s, t0);
        real *o = out + (size_t)t0 * C + (size_t)h * s.d, sum[QUERIES];
        multiply(e, r.ld, false, x + (size_t)t0 * wide + (size_t)h * s.d, wide, 1, k_t + r.low,
                 (size_t)s.T, (size_t)r.rows, r.n, s.d);
        for (int i = 0; i < r.rows; i++) {
            int t = t0 + i, first = first_of(s, t);
            real top, *row = e + (size_t)i * r.ld + (first - r.low);
            sum[i] = attention_softmax(row, (size_t)(t + 1 - first), gain / (real)sqrt(s.d), &top);
            if (lse) lse[((size_t)b * s.T + t) * s.H + h] = top + (real)log((double)sum[i]);
        }
        zero_outside(s, r, e);
        multiply(o, C, false, e, r.ld, 1, v + (size_t)r.low * wide, wide, (size_t)r.rows,
                 (size_t)s.d, (int)r.n);
        for (int i = 0; i < r.rows; i++)
            for (int c = 0; c < s.d; c++) o[(size_t)i * C + c] /= sum[i];
    }
}

void cpu_attention_forward(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s,
                           void *work) {
    size_t wide = qkv_width(s), C = (size_t)s.H * s.d;
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < s.B; b++)
        for (int g = 0; g < s.G; g++) {
            const real *x = (const real *)qkv + (size_t)b * s.T * wide;
            transpose(keys_of(s, work, b, g), x + (size_t)(s.H + g) * s.d, wide, s.T, s.d);
            for (int h = g * (s.H / s.G); h < (g + 1) * (s.H / s.G); h++)
                head_forward((real *)out + (size_t)b * s.T * C, lse, x, gain[h], s, b, h, work);
        }
    CPU_DONE("attention_forward", 4 * attention_pairs(s) * s.d,
             array_bytes(sizeof(real), (size_t)s.B * s.T, (int)wide + s.H * s.d));
}

// p and da / sqrt(d), as in mixers/attn.c, of rows whose scores p and products dout . v da holds.
static void row_gradients(Rows r, real *p, real *da, const real *lse, const real *D, real gain,
                          int H, int d) {
    real root = (real)sqrt(d), scale = gain / root;
    for (int i = 0; i < r.rows; i++) {
        real *p_i = p + (size_t)i * r.ld, *da_i = da + (size_t)i * r.ld, lse_i = lse[(size_t)i * H];
        for (size_t j = 0; j < r.n; j++) p_i[j] = exp_real(scale * p_i[j] - lse_i);
        for (size_t j = 0; j < r.n; j++) da_i[j] = p_i[j] * (da_i[j] - D[i]) / root;
    }
}

// All rows of one head of text b. delta (N,H) becomes what each row adds to dgain.
static void head_backward(real *dqkv, const real *dout, const real *out, const real *lse,
                          real *delta, const real *x, real gain, AttentionShape s, int b, int h,
                          void *work) {
    size_t wide = qkv_width(s), C = (size_t)s.H * s.d;
    int g = h / (s.H / s.G);
    size_t at_q = (size_t)h * s.d, at_k = (size_t)(s.H + g) * s.d, at_v = at_k + (size_t)s.G * s.d;
    real *p = scores_of(s, work, b, g), *da = p + QUERIES * row_buffer(s);
    const real *k_t = keys_of(s, work, b, g), *v_t = k_t + (size_t)s.d * s.T;
    for (int t0 = 0; t0 < s.T; t0 += QUERIES) {
        Rows r = rows_at(s, t0);
        const real *q = x + (size_t)t0 * wide + at_q, *go = dout + (size_t)t0 * C + at_q;
        const real *o = out + (size_t)t0 * C + at_q;
        real *dq = dqkv + (size_t)t0 * wide + at_q, D[QUERIES] = {0};
        size_t n = ((size_t)b * s.T + t0) * s.H + h, low = (size_t)r.low * wide;
        for (int i = 0; i < r.rows; i++)
            for (int c = 0; c < s.d; c++) D[i] += go[i * C + c] * o[i * C + c];
        const size_t rows = (size_t)r.rows, T = (size_t)s.T, d = (size_t)s.d;
        multiply(p, r.ld, false, q, wide, 1, k_t + r.low, T, rows, r.n, s.d);
        multiply(da, r.ld, false, go, C, 1, v_t + r.low, T, rows, r.n, s.d);
        row_gradients(r, p, da, lse + n, D, gain, s.H, s.d);
        zero_outside(s, r, p);
        zero_outside(s, r, da);
        // forward:  a = gain / sqrt(d) q . k
        multiply(dq, wide, false, da, r.ld, 1, x + low + at_k, wide, rows, d, (int)r.n);
        for (int i = 0; i < r.rows; i++) {
            real dot = 0;
            for (int c = 0; c < s.d; c++) dot += dq[i * wide + c] * q[i * wide + c];
            for (int c = 0; c < s.d; c++) dq[i * wide + c] *= gain;
            for (size_t j = 0; j < r.n; j++) da[(size_t)i * r.ld + j] *= gain;
            delta[n + (size_t)i * s.H] = dot;
        }
        // A key's gradient is a sum over the rows: down the columns of da and p.
        multiply(dqkv + low + at_k, wide, true, da, 1, r.ld, q, wide, r.n, d, r.rows);
        multiply(dqkv + low + at_v, wide, true, p, 1, r.ld, go, C, r.n, d, r.rows);
    }
}

void cpu_attention_backward(act *dqkv, real *dgain, const act *dout, const act *out,
                            const real *lse, real *delta, const act *qkv, const real *gain,
                            AttentionShape s, void *work) {
    size_t wide = qkv_width(s), C = (size_t)s.H * s.d, N = (size_t)s.B * s.T;
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
