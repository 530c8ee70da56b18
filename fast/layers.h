// layers.h: what fast/cpu.c and streaming share with the plain loops of layers.c, whose functions
// these are but for conv_rows, act_row and cpu_note (fast/cpu.c) and attention (below).
#ifndef LAYERS_H
#define LAYERS_H

#include <string.h>

#include "support/backend.h"

// A row through LayerNorm: out, x, gain, bias (C); and backward, as norm_backward is for one row.
void norm_row(real *out, const real *x, const real *gain, const real *bias, int C);
void norm_row_backward(real *dx, real *dgain, real *dbias, const real *dout, const real *x,
                       const real *gain, int C, bool accumulate);

// The tile of sums that stays in registers, see cpu.c.
#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_COLS = 128 / sizeof(real) };
#else
enum { TILE_ROWS = 6, TILE_COLS = 64 / sizeof(real) };
#endif
// out[r][j] += sum_k sum_c x[k*TILE_ROWS + r][c*step] * w[(k*depth + c)*stride + j], in this order.
void multiply_tile(real out[TILE_ROWS][TILE_COLS], const real *const *x, size_t step,
                   const real *w, size_t stride, int K, int depth);
// a*b + c, rounded once where the hardware can. gcc is asked by name, because tuned for some CPUs
// it would fuse in one loop and not in another, and their bits would differ. clang always fuses
// under -ffp-contract=fast; asked by name, clang 14 spills the tile (61 instead of 223 GFLOP/s).
static inline real muladd(real a, real b, real c) {
#if defined __FMA__ && !defined __clang__ && !defined PORTABLE
    return sizeof(real) == 4 ? (real)__builtin_fmaf((float)a, (float)b, (float)c)
                             : (real)__builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}


// out[j][0..O-1] = b + sum_k sum_c w[k,c,:] rows[k*n + j][c] for j in 0..n-1: the inner kernel of
// every conv on the CPU. A row may lie anywhere, e.g. in a ring; one that lies before the text is
// a row of zeros. An output's bits do not depend on n nor on the other rows.
void conv_rows(real *const *out, const real *const *rows, int n, const real *w, const real *b,
               int K, int C, int O);
// out = residual + scale * f(pre), n values; residual may be NULL, out may be pre or residual.
void act_row(Activation f, real *out, const real *pre, const real *residual, real scale, int n);

// ---- Attention: mixers/attn.c, and fast/attention.c

// Values of a row of qkv; the first row that row n, of all B*T, attends to.
static inline size_t qkv_width(AttentionShape s) { return (size_t)(s.H + 2 * s.G) * (size_t)s.d; }
static inline size_t window_start_of(AttentionShape s, size_t n) {
    size_t t = n % (size_t)s.T, W = (size_t)s.W;
    return n - (t < W ? t : W - 1);
}
// The heads of q and k of a row of qkv at position t, as turn_forward; rms (H+G) may be NULL.
void turn_row(real *qk, real *rms, AttentionShape s, uint64_t t);
// a[i] = q . k[i] for n keys; channel c of key i lies at k[c*ld + i].
void attention_scores(real *a, const real *q, const real *k, size_t ld, size_t n, int d);
// a[i] = exp(scale * a[i] - top), top being the largest exponent (NULL: not wanted); the sum of
// them. Writes zeros up to a[attention_padded(n) - 1].
real attention_softmax(real *a, size_t n, real scale, real *top);
// o[c] += sum_i e[i] v[i*ld + c], in the order of i
void attention_values(real *o, const real *e, const real *v, size_t ld, size_t n, int d);
static inline size_t attention_padded(int n) { return ((size_t)n + 15) / 16 * 16; }

void plain_turn_forward(act *qkv, real *rms, AttentionShape s);
void plain_turn_backward(act *dqkv, const act *qkv, const real *rms, AttentionShape s);
void plain_attention_forward(act *out, real *lse, const act *qkv, const real *gain,
                             AttentionShape s, void *work);
void plain_attention_backward(act *dqkv, real *dgain, const act *dout, const act *out,
                              const real *lse, real *delta, const act *qkv, const real *gain,
                              AttentionShape s, void *work);
size_t plain_attention_work(AttentionShape s);
void cpu_attention_forward(act *out, real *lse, const act *qkv, const real *gain,
                           AttentionShape s, void *work);
void cpu_attention_backward(act *dqkv, real *dgain, const act *dout, const act *out,
                            const real *lse, real *delta, const act *qkv, const real *gain,
                            AttentionShape s, void *work);
size_t cpu_attention_work(AttentionShape s);

// ---- Inputs and skips (mixers/inputs.c): both backends have the plain loops.
void skip_row(real *x, const real *from, const real *scale, int C);  // x += scale * from
static inline double lookup_bytes(LookupShape s, size_t size) {
    return array_bytes(size, (size_t)s.B * (size_t)s.T, s.D) + 4.0 * s.B * s.T;
}
void plain_smear_forward(act *out, const act *x, const real *gate, int B, int T, int C);
void plain_smear_backward(act *dx, real *dgate, const act *dout, const act *x, const real *gate,
                          int B, int T, int C, void *work);
void plain_skip_forward(act *x, const act *from, const real *scale, size_t N, int C);
void plain_skip_backward(act *kept, real *dscale, const act *dx, const act *from, size_t N, int C,
                         void *work);
void plain_lookup_forward(act *out, const int *ids, const real *table, LookupShape s);
void plain_lookup_backward(real *dtable, const act *dout, const int *ids, LookupShape s,
                           void *work);
void plain_positions(act *out, const act *x, const uint64_t *starts, int B, int T, int C);
size_t plain_input_work(size_t N, int rows, int D);
#define PLAIN_INPUTS                                                                            \
    {plain_smear_forward, plain_smear_backward, plain_skip_forward, plain_skip_backward,        \
     plain_lookup_forward, plain_lookup_backward, plain_positions, plain_input_work}

// ---- Entries of the plain backend that `cpu` has, too.
void plain_norm_forward(act *out, const act *x, const real *gain, const real *bias, size_t N,
                        int C);
void plain_dropout_backward(act *dy, const act *dout, Dropout d, size_t N, int C);
void plain_cross_entropy(real *losses, act *logits, const int *targets, float cap, float scale,
                         size_t N);
void plain_add_losses(StepState *state, const real *losses, size_t N, void *work);
void plain_draw_batch(int *ids, int *targets, Corpus c, const StepState *state, uint64_t seed,
                      uint32_t byte_threshold, uint64_t first, int B, int T);
size_t cpu_available(void);
void *cpu_alloc(size_t bytes);
void cpu_zero(void *p, size_t bytes);
void cpu_copy(void *dst, const void *src, size_t bytes);
void cpu_write_acts(act *dst, const real *src, size_t n);
void cpu_read_acts(real *dst, const act *src, size_t n);
const char *cpu_error(void);
#define CPU_MEMORY                                                                              \
    .available = cpu_available, .alloc = cpu_alloc, .free = free, .zero = cpu_zero,             \
    .upload = cpu_copy, .download = cpu_copy, .write_acts = cpu_write_acts,                     \
    .read_acts = cpu_read_acts, .error = cpu_error

// At the end of an operation on the CPU: notes its time and what it had to do (cpu_trace).
#define CPU_DONE(name, flops, bytes)                    \
    do {                                                \
        if (cpu_tracing) cpu_note(name, flops, bytes);  \
    } while (0)
extern bool cpu_tracing;
void cpu_note(const char *name, double flops, double bytes);

#endif
