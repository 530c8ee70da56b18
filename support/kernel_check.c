// kernel_check.c: one GPU kernel at a time against the CPU: what tests/test_kernels.c calls for
// every row of the kernel table, what the self-test before training calls, and what times a row.
//
// Read first: backend.h (the contracts that are checked here), gpu.h (the table).
//
// Every entry of Backend has one function below that lays out its operands and calls it, written
// once and run on both sides: the CPU's table and one with the row under test. Inputs are the same
// numbers on both. Outputs and workspaces are full of NaN before every launch, except those that
// are added to: these start from the same numbers on both sides.
//
// A row on bf16 activations rounds what it is given, weights of convolutions included. So it is
// compared twice: with the CPU on the numbers as they were, and, more closely, with the CPU on the
// same numbers rounded first. What then is left is the rounding of what the kernel stores, at most
// 2^-8 of a value and about 1.6e-3 of a tensor, once or, through an activation, twice.
#include "support/gpu.h"

#include <stdio.h>
#include <stdlib.h>

#include "model.h"
#include "support/arithmetic.h"

enum { MOST_BUFFERS = 24 };

typedef enum { IN, OUT, ADD, WORKSPACE } Role;  // ADD: read and written
// WEIGHTS: of a convolution, which bf16 rounds. PRE: activations as a forward with dropout stores
// them, every seventh dropped.
typedef enum { REALS, WEIGHTS, ACTS, PRE } Kind;

typedef struct {
    const char *name;
    Role role;
    bool is_act, is_int, exact;  // exact: with integer inputs, the result has no rounding
    size_t n;                    // values
    void *p;                     // in the backend's memory
} Buffer;

// A backend with the operands of one call.
typedef struct Side {
    const Backend *be;
    void (*run)(struct Side *);  // lays out the operands and makes the call
    bool rounded;                // activations and weights are made such as bf16 holds
    ConvShape s;
    Activation activation;
    int variant;  // 0 to CHECK_VARIANTS - 1
    bool exact, failed;
    bool fill;   // operands are (re)set on their way; otherwise they stay
    bool timed;  // as the paper's configuration runs it: no dropout in an epilogue
    uint64_t seed;
    Buffer buffers[MOST_BUFFERS];
    int count, next;
} Side;

// ---- Operands ----------------------------------------------------------------------------------

// A value as bf16 holds it: the upper half of a float32, rounded to nearest, ties to even.
static real as_bf16(real v) {
    float f = (float)v;
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    u = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&f, &u, sizeof f);
    return f;
}

// Input i of buffer `salt`: -1, 0 or 1 where sums must be exact, also in the 8 bits of bf16; else
// uniform in (-1,1).
static real input_value(const Side *s, int salt, size_t i) {
    Philox r = philox(s->seed, (uint32_t)i, (uint32_t)(i >> 32), (uint32_t)salt, RNG_TEST);
    if (s->exact) return (real)(int)(r.v[0] % 3) - 1;
    return (real)(((double)r.v[0] + 0.5) / 2147483648.0 - 1);
}

// n zeroed values of that size on the host, or NULL, and the side has failed.
static void *host_values(Side *s, size_t n, size_t size) {
    void *p = calloc(n, size);
    if (!p) s->failed = true;
    return p;
}

// The bits of a NaN, and no valid byte or index either.
static void fill_with_nan(void *host, size_t n) {
    const uint32_t nan_bits = 0x7FC00000u;
    for (size_t i = 0; i < n; i++) memcpy((char *)host + i * 4, &nan_bits, 4);
}

// The next operand: made on the first run, found again on later ones.
static void *operand(Side *s, const char *name, Role role, Kind kind, size_t n) {
    bool is_act = kind == ACTS || kind == PRE;
    int salt = s->next++;
    if (s->failed || salt >= MOST_BUFFERS) {
        s->failed = true;
        return NULL;
    }
    Buffer *b = &s->buffers[salt];
    size_t size = is_act ? s->be->act_bytes : sizeof(real);
    if (salt >= s->count) {
        *b = (Buffer){.name = name, .role = role, .is_act = is_act, .n = n};
        b->p = s->be->alloc(n * size);
        s->failed = !b->p;
        if (s->failed) return NULL;
        s->count++;
    }
    real *host = s->fill ? host_values(s, n, sizeof *host) : NULL;
    if (!host) return s->failed ? NULL : b->p;
    if (role == OUT || role == WORKSPACE)
        fill_with_nan(host, n);
    else
        for (size_t i = 0; i < n; i++) {
            host[i] = input_value(s, salt, i);
            if (kind == PRE && i % 7 == 3) host[i] = act_dropped(s->activation);
            if (s->rounded && kind != REALS) host[i] = as_bf16(host[i]);
        }
    if (is_act)
        s->be->write_acts(b->p, host, n);
    else
        s->be->upload(b->p, host, n * sizeof *host);
    free(host);
    return b->p;
}

static act *acts(Side *s, const char *name, Role role, size_t n) {
    return operand(s, name, role, ACTS, n);
}
static act *stored_pre(Side *s, size_t n) { return operand(s, "pre", ADD, PRE, n); }
static real *reals(Side *s, const char *name, Role role, size_t n) {
    return operand(s, name, role, REALS, n);
}
// Timed as in training, where their copy in bf16 stands beside them.
static real *weights(Side *s, const char *name, size_t n) {
    real *w = operand(s, name, IN, WEIGHTS, n);
    if (w && s->fill && s->timed && s->be->sync_params) s->be->sync_params(w, n);
    return w;
}
static void *workspace(Side *s, size_t N, int K, int width, size_t n) {
    size_t bytes = s->be->work_bytes(N, K, width, n);
    return operand(s, "workspace", WORKSPACE, REALS, (bytes + 3) / 4);
}

// Integers; inputs are uniform in low..high.
static int *ints(Side *s, const char *name, Role role, size_t n, int low, int high) {
    int *p = operand(s, name, role, REALS, n);
    s->buffers[s->next - 1].is_int = true;
    int *host = p && role == IN && s->fill ? host_values(s, n, sizeof *host) : NULL;
    if (!host) return p;
    for (size_t i = 0; i < n; i++) {
        Philox r = philox(s->seed, (uint32_t)i, 0, (uint32_t)s->next, RNG_TEST);
        host[i] = low + (int)(r.v[1] % (uint32_t)(high - low + 1));
    }
    s->be->upload(p, host, n * sizeof *host);
    free(host);
    return p;
}

static void *bytes_in(Side *s, const char *name, const void *host, size_t bytes) {
    void *p = operand(s, name, IN, REALS, (bytes + 3) / 4);
    if (p && s->fill) s->be->upload(p, host, bytes);
    return p;
}

// The last operand's result is a sum of integers: with integer inputs it must agree bit for bit.
static void last_is_exact(Side *s) {
    if (s->next <= MOST_BUFFERS) s->buffers[s->next - 1].exact = true;
}

// The last operand's result is LayerNorm's gradient by its input. With one channel that is 0, and
// what stands there is how the compiler rounded: nothing to compare.
static void last_is_norm_gradient(Side *s) {
    if (s->s.C == 1 && s->next <= MOST_BUFFERS) s->buffers[s->next - 1].role = IN;
}

static StepState *state_in(Side *s, uint32_t step) {
    StepState *host = host_values(s, 1, sizeof *host);
    if (!host) return NULL;
    host->step = step;
    host->loss_sum = 3;
    StepState *p = operand(s, "state", ADD, REALS, sizeof *host / 4);
    s->buffers[s->next - 1].is_int = true;
    s->buffers[s->next - 1].role = IN;  // compared by those who read it back
    if (p && s->fill) s->be->upload(p, host, sizeof *host);
    free(host);
    return p;
}

// The rows start somewhere in a larger batch: in the middle of the 16 rows that share their draws,
// or, `far`, with them and beyond 2^32 draws. Sums that must be exact are not scaled.
static Dropout dropout_in(Side *s, bool drops, bool far) {
    Dropout d = {.seed = s->seed, .purpose = RNG_DROPOUT + 3, .first = 5, .scale = 1};
    d.state = state_in(s, 7);
    if (far) d.first = ((uint64_t)1 << 34) + 48;
    if (drops) d.threshold = 51, d.scale = s->exact ? 1 : 256 / 205.0f;
    return d;
}

// A backward's epilogue: the activation, and the scale with which its stored_pre was dropped out.
static Epilogue backward_epilogue(const Side *s) {
    return (Epilogue){.activation = s->activation, .drop.scale = s->variant % 2 ? 1.25f : 1};
}

// ---- One function per entry of Backend ---------------------------------------------------------

static size_t rows_of(const Side *s) { return (size_t)s->s.B * s->s.T; }
static int wider(int a, int b) { return a > b ? a : b; }

static void run_embed_forward(Side *s) {
    size_t N = rows_of(s);
    int C = s->s.C;
    act *x = acts(s, "x", OUT, N * C);
    const int *ids = ints(s, "ids", IN, N, 0, BYTE_DROPPED);
    const real *table = reals(s, "table", IN, (size_t)V * C), *gain = reals(s, "gain", IN, C);
    const real *bias = reals(s, "bias", IN, C);
    void *work = workspace(s, N, 1, wider(C, V), 1);
    if (!s->failed) s->be->embed_forward(x, ids, table, gain, bias, N, C, work);
}

static void run_embed_backward(Side *s) {
    size_t N = rows_of(s);
    int C = s->s.C;
    real *dtable = reals(s, "dtable", ADD, (size_t)V * C);
    last_is_norm_gradient(s);
    real *dgain = reals(s, "dgain", ADD, C);
    real *dbias = reals(s, "dbias", ADD, C);
    last_is_exact(s);
    const act *dx = acts(s, "dx", IN, N * C);
    // Variants 2 and 3: a few byte values only, so that each has many rows.
    const int *ids = ints(s, "ids", IN, N, s->variant < 2 ? 0 : BYTE_DROPPED - 2, BYTE_DROPPED);
    const real *table = reals(s, "table", IN, (size_t)V * C), *gain = reals(s, "gain", IN, C);
    void *work = workspace(s, N, 1, wider(C, V), 1);
    if (!s->failed)
        s->be->embed_backward(dtable, dgain, dbias, dx, ids, table, gain, N, C, work);
}

static void run_norm_forward(Side *s) {
    size_t N = rows_of(s);
    int C = s->s.C;
    act *out = acts(s, "out", OUT, N * C);
    const act *x = acts(s, "x", IN, N * C);
    const real *gain = reals(s, "gain", IN, C), *bias = reals(s, "bias", IN, C);
    if (!s->failed) s->be->norm_forward(out, x, gain, bias, N, C);
}

// Variant 0: dx. 1: accumulated, and forward's output recomputed (not timed). 2: dx over x, and on
// through the activation below, as under the head. 3: all of it, the output over x, as in a unit.
// With other activations than GELU 0 and 1, too, go on through it.
static void run_norm_backward(Side *s) {
    size_t N = rows_of(s);
    int C = s->s.C;
    Epilogue e = backward_epilogue(s);
    bool in_place = s->variant == 2, over = s->variant == 3;
    e.accumulate = s->variant % 2 == 1;
    e.dx = acts(s, "dx", e.accumulate || in_place ? ADD : OUT, N * C);
    last_is_norm_gradient(s);
    real *dgain = reals(s, "dgain", ADD, C), *dbias = reals(s, "dbias", ADD, C);
    last_is_exact(s);
    if (s->variant >= 2 || s->activation != ACT_gelu) {
        e.pre = stored_pre(s, N * C);
        last_is_norm_gradient(s);
    }
    const act *dout = acts(s, "dout", IN, N * C);
    act *x = in_place ? e.dx : acts(s, over ? "again" : "x", over ? ADD : IN, N * C);
    act *again = over ? x : e.accumulate && !s->timed ? acts(s, "again", OUT, N * C) : NULL;
    const real *gain = reals(s, "gain", IN, C), *bias = reals(s, "bias", IN, C);
    void *work = workspace(s, N, 1, wider(C, V), 1);
    if (!s->failed)
        s->be->norm_backward(again, dgain, dbias, dout, x, gain, bias, e, N, C, work);
}

// Beside x, w and b, and beside out:
//     variant   none, a linear layer          gelu             lrelu2 and any other
//        0      nothing                       nothing          out over residual      (inference)
//        1      residual, dropout: an MLP's   pre, dropout     pre, dropout
//        2      residual                      pre, residual    pre, residual
//        3      pre, dropout, out over residual: with each
// Exact: the sums as pre holds them, and out where there is no activation; 1 is without bias. Here
// every value that dropout takes or leaves shows, also where it leaves no DROPPED.
static void run_conv_forward(Side *s) {
    ConvShape c = s->s;
    size_t N = rows_of(s), n = N * c.O;
    int v = s->variant;
    bool linear = s->activation == ACT_none, gelu = s->activation == ACT_gelu;
    bool over = v == 3 || (v == 0 && !linear && !gelu), beside = v == 2 || (v == 1 && linear);
    Epilogue e = {.activation = s->activation};
    if (linear ? v == 3 : v > 0 || s->exact) {
        e.pre = acts(s, "pre", OUT, n);
        last_is_exact(s);
    }
    const act *x = acts(s, "x", IN, N * c.C);
    const real *w = weights(s, "w", (size_t)c.K * c.C * c.O), *b = reals(s, "b", IN, c.O);
    void *work = workspace(s, N, c.K, wider(wider(c.C, c.O), V), 1);
    e.drop = dropout_in(s, v % 2 && !s->timed, v == 3);
    e.out = acts(s, "out", over ? ADD : OUT, n);
    if (linear) last_is_exact(s);
    e.residual = over ? e.out : beside ? acts(s, "residual", IN, n) : NULL;
    if (s->exact && v == 1) b = NULL;
    if (!s->failed) s->be->conv_forward(x, w, b, e, c, work);
}

// With GELU.  Variant 0: dx. 1: on through the activation below, whose output is recomputed; dx is
// not wanted. 2: dx accumulated. 3: accumulated, and on through the activation.
// With other activations 0 goes on through it, 2 makes nothing but its gradient, 3 recomputes its
// output, too. Exact: the sums in dx, so that dx is always there.
static void run_conv_backward_input(Side *s) {
    ConvShape c = s->s;
    size_t N = rows_of(s), n = N * c.C;
    int v = s->variant;
    bool gelu = s->activation == ACT_gelu;
    bool without_dx = !s->exact && (v == 1 || (v == 2 && !gelu));
    Epilogue e = backward_epilogue(s);
    e.accumulate = v >= 2 && !without_dx;
    if (!without_dx) {
        e.dx = acts(s, "dx", e.accumulate ? ADD : OUT, n);
        last_is_exact(s);
    }
    if (without_dx || v == 3 || !gelu) e.pre = stored_pre(s, n);
    if (e.pre && (gelu ? without_dx : v % 2 == 1)) e.out = acts(s, "out", OUT, n);
    const act *dy = acts(s, "dy", IN, N * c.O);
    const real *w = weights(s, "w", (size_t)c.K * c.C * c.O);
    void *work = workspace(s, N, c.K, wider(wider(c.C, c.O), V), 1);
    if (!s->failed) s->be->conv_backward_input(dy, w, e, c, work);
}

// Variant 2: two to MAX_WEIGHT_JOBS layers, of other dilations, in one call. 3: no bias gradient.
static void run_conv_backward_weight(Side *s) {
    ConvShape c = s->s;
    size_t N = rows_of(s);
    real *dw = reals(s, "dw", ADD, (size_t)c.K * c.C * c.O);
    last_is_exact(s);
    real *db = reals(s, "db", ADD, c.O);
    last_is_exact(s);
    const act *x = acts(s, "x", IN, N * c.C), *dy = acts(s, "dy", IN, N * c.O);
    void *work = workspace(s, N, c.K, wider(wider(c.C, c.O), V), 1);
    WeightJob jobs[MAX_WEIGHT_JOBS] = {{dw, s->variant == 3 ? NULL : db, x, dy, c.dil}};
    int n = s->variant == 2 ? 2 + c.T % (MAX_WEIGHT_JOBS - 1) : 1;
    for (int i = 1; i < n; i++) {
        real *dw_i = reals(s, "dw of another", ADD, (size_t)c.K * c.C * c.O);
        last_is_exact(s);
        real *db_i = reals(s, "db of another", ADD, c.O);
        last_is_exact(s);
        jobs[i] = (WeightJob){dw_i, db_i, x, dy, c.dil + i};
    }
    if (!s->failed) s->be->conv_backward_weight(jobs, n, c, work);
}

// Heads as wide as C or MAX_HEAD, and by variant   0: one, window T    1: two, window K
// 2: three that share k and v, half of a head rotated, window K*dil    3: four in two groups, q and
// k as they are
static AttentionShape attention_shape(const Side *s) {
    static const int heads[] = {1, 2, 3, 4}, groups[] = {1, 2, 1, 2};
    int d = s->s.C < MAX_HEAD ? s->s.C : MAX_HEAD, v = s->variant, far = s->s.K * s->s.dil;
    AttentionShape a = {.B = s->s.B, .T = s->s.T, .H = heads[v], .G = groups[v], .d = d,
                        .W = v == 1 ? s->s.K : v == 2 ? far : s->s.T,
                        .R = v == 2 ? d / 4 * 2 : d / 2 * 2, .raw = v == 3};
    if (s->timed) a.d = s->s.C / 4, a.H = a.G = 4, a.R = a.d / 2 * 2, a.W = s->s.T;
    return a;
}
static size_t qkv_values(AttentionShape a) {
    return (size_t)a.B * (size_t)a.T * (size_t)((a.H + 2 * a.G) * a.d);
}

static void run_turn_forward(Side *s) {
    AttentionShape a = attention_shape(s);
    act *qkv = acts(s, "qkv", ADD, qkv_values(a));
    real *rms = reals(s, "rms", OUT, rows_of(s) * (size_t)(a.H + a.G));
    if (!s->failed) s->be->attention.turn_forward(qkv, rms, a);
}
static void run_turn_backward(Side *s) {
    AttentionShape a = attention_shape(s);
    act *dqkv = acts(s, "dqkv", ADD, qkv_values(a));
    const act *qkv = acts(s, "qkv", IN, qkv_values(a));
    const real *rms = reals(s, "rms", IN, rows_of(s) * (size_t)(a.H + a.G));
    if (!s->failed) s->be->attention.turn_backward(dqkv, qkv, rms, a);
}
static void *attention_workspace(Side *s, AttentionShape a) {
    return operand(s, "workspace", WORKSPACE, REALS, (s->be->attention.work_bytes(a) + 3) / 4);
}
static void run_attention_forward(Side *s) {
    AttentionShape a = attention_shape(s);
    size_t rows = rows_of(s) * (size_t)a.H;
    act *out = acts(s, "out", OUT, rows * (size_t)a.d);
    real *lse = reals(s, "lse", OUT, rows);
    const act *qkv = acts(s, "qkv", IN, qkv_values(a));
    const real *gain = reals(s, "gain", IN, (size_t)a.H);
    void *work = attention_workspace(s, a);
    if (!s->failed) s->be->attention.forward(out, lse, qkv, gain, a, work);
}
// lse are any numbers: what is called p then has another sum than 1, and is compared the same.
static void run_attention_backward(Side *s) {
    AttentionShape a = attention_shape(s);
    size_t rows = rows_of(s) * (size_t)a.H;
    act *dqkv = acts(s, "dqkv", OUT, qkv_values(a));
    real *dgain = reals(s, "dgain", ADD, (size_t)a.H);
    const act *dout = acts(s, "dout", IN, rows * (size_t)a.d);
    const act *out = acts(s, "out", IN, rows * (size_t)a.d);
    const act *qkv = acts(s, "qkv", IN, qkv_values(a));
    const real *lse = reals(s, "lse", IN, rows), *gain = reals(s, "gain", IN, (size_t)a.H);
    real *delta = operand(s, "delta", WORKSPACE, REALS, rows);
    void *work = attention_workspace(s, a);
    if (!s->failed)
        s->be->attention.backward(dqkv, dgain, dout, out, lse, delta, qkv, gain, a, work);
}

static void *input_workspace(Side *s, size_t N, int rows, int D) {
    size_t bytes = s->be->inputs.work_bytes(N, rows, D);
    return operand(s, "workspace", WORKSPACE, REALS, (bytes + 3) / 4);
}
static void run_smear_forward(Side *s) {
    size_t n = rows_of(s) * s->s.C;
    act *out = acts(s, "out", OUT, n);
    const act *x = acts(s, "x", IN, n);
    const real *gate = reals(s, "gate", IN, s->s.C);
    if (!s->failed) s->be->inputs.smear_forward(out, x, gate, s->s.B, s->s.T, s->s.C);
}
static void run_smear_backward(Side *s) {
    size_t n = rows_of(s) * s->s.C;
    act *dx = acts(s, "dx", OUT, n);
    real *dgate = reals(s, "dgate", ADD, s->s.C);
    const act *dout = acts(s, "dout", IN, n), *x = acts(s, "x", IN, n);
    const real *gate = reals(s, "gate", IN, s->s.C);
    void *work = input_workspace(s, rows_of(s), 0, s->s.C);
    if (!s->failed)
        s->be->inputs.smear_backward(dx, dgate, dout, x, gate, s->s.B, s->s.T, s->s.C, work);
}
static void run_skip_forward(Side *s) {
    size_t n = rows_of(s) * s->s.C;
    act *x = acts(s, "x", ADD, n);
    last_is_exact(s);
    const act *from = acts(s, "from", IN, n);
    const real *scale = reals(s, "scale", IN, s->s.C);
    if (!s->failed) s->be->inputs.skip_forward(x, from, scale, rows_of(s), s->s.C);
}
static void run_skip_backward(Side *s) {
    size_t n = rows_of(s) * s->s.C;
    act *kept = acts(s, "kept", OUT, n);
    last_is_exact(s);
    real *dscale = reals(s, "dscale", ADD, s->s.C);
    last_is_exact(s);
    const act *dx = acts(s, "dx", IN, n), *from = acts(s, "from", IN, n);
    void *work = input_workspace(s, rows_of(s), 0, s->s.C);
    if (!s->failed) s->be->inputs.skip_backward(kept, dscale, dx, from, rows_of(s), s->s.C, work);
}
// Variants 0 and 1: bytes, 1 only the last of them, and dropped ones. 2 and 3: pairs, timed as in
// golf.
static LookupShape lookup_shape(const Side *s) {
    bool pairs = s->variant >= 2 || s->timed;
    return (LookupShape){s->s.B, s->s.T, s->timed ? 4096 : pairs ? 256 + 37 * s->variant : V,
                         s->timed ? 32 : s->s.C, pairs};
}
static const int *lookup_ids(Side *s) {
    return ints(s, "ids", IN, rows_of(s), s->variant % 2 && !s->timed ? BYTE_DROPPED - 3 : 0,
                BYTE_DROPPED);
}
static void run_lookup_forward(Side *s) {
    LookupShape l = lookup_shape(s);
    act *out = acts(s, "out", OUT, rows_of(s) * l.D);
    last_is_exact(s);
    const int *ids = lookup_ids(s);
    const real *table = reals(s, "table", IN, (size_t)l.rows * l.D);
    if (!s->failed) s->be->inputs.lookup_forward(out, ids, table, l);
}
static void run_lookup_backward(Side *s) {
    LookupShape l = lookup_shape(s);
    real *dtable = reals(s, "dtable", ADD, (size_t)l.rows * l.D);
    last_is_exact(s);
    const act *dout = acts(s, "dout", IN, rows_of(s) * l.D);
    const int *ids = lookup_ids(s);
    void *work = input_workspace(s, rows_of(s), l.rows, l.D);
    if (!s->failed) s->be->inputs.lookup_backward(dtable, dout, ids, l, work);
}
// Odd variants: windows that begin far on in a text.
static void run_positions(Side *s) {
    size_t n = rows_of(s) * s->s.C, bytes = (size_t)s->s.B * sizeof(uint64_t);
    uint64_t *far_on = host_values(s, s->s.B, sizeof *far_on);
    for (int b = 0; far_on && s->variant % 2 && b < s->s.B; b++) far_on[b] = 10000019u * (b + 1u);
    act *out = acts(s, "out", OUT, n);
    const act *x = acts(s, "x", IN, n);
    const uint64_t *starts = bytes_in(s, "starts", far_on, bytes);
    free(far_on);
    if (!s->failed) s->be->inputs.positions(out, x, starts, s->s.B, s->s.T, s->s.C);
}

// Variant 0: first in the middle of 16 rows. 1: beyond 2^32 draws. 2: over dout. 3: nothing drops.
// Exact: every value that is dropped or kept shows.
static void run_dropout_backward(Side *s) {
    size_t n = rows_of(s) * s->s.C;
    bool in_place = s->variant == 2;
    act *dy = acts(s, "dy", in_place ? ADD : OUT, n);
    last_is_exact(s);
    const act *dout = in_place ? dy : acts(s, "dout", IN, n);
    Dropout drop = dropout_in(s, s->variant != 3, s->variant == 1);
    if (!s->failed) s->be->dropout_backward(dy, dout, drop, rows_of(s), s->s.C);
}

// Variant 1: softcap. 2: losses only. 3: every fourth row or so is not scored.
static void run_cross_entropy(Side *s) {
    size_t N = rows_of(s);
    real *losses = reals(s, "losses", OUT, N);
    act *logits = acts(s, "dlogits", ADD, N * V);
    const int *targets = ints(s, "targets", IN, N, s->variant == 3 ? -V / 3 : 0, V - 1);
    if (!s->failed)
        s->be->cross_entropy(losses, logits, targets, s->variant == 1 ? 0.5f : 0,
                             s->variant == 2 ? 0 : 0.125f, N);
}

// What the host would read of the state, laid out as reals for the comparison.
static void state_out(Side *s, const StepState *state, uint32_t step) {
    if (!s->fill) return;  // being timed
    real *figures = reals(s, "state", OUT, 5);
    StepState *host = malloc(sizeof *host);
    if (host && !s->failed) {
        s->be->download(host, state, sizeof *host);
        StepFigures f = host->ring[step % RING];
        if (!(f.loss - f.loss == 0)) f.loss = -1;  // not finite on both sides is agreement
        real v[5] = {(real)host->step, (real)host->loss_sum, f.loss, f.grad_norm, f.lr};
        s->be->upload(figures, v, sizeof v);
    }
    free(host);
}

static void run_add_losses(Side *s) {
    size_t N = rows_of(s) * (s->timed ? 1 : (size_t)s->s.C);
    StepState *state = state_in(s, 0);
    const real *losses = reals(s, "losses", IN, N);
    void *work = workspace(s, N, 1, V, 1);
    if (!s->failed) s->be->add_losses(state, losses, N, work);
    state_out(s, state, 0);
    last_is_exact(s);
}

static void run_draw_batch(Side *s) {
    enum { TEXT = 5000 };
    int T = s->s.T < 1000 ? s->s.T : 1000;
    uint8_t text[TEXT];
    for (int i = 0; i < TEXT; i++) text[i] = (uint8_t)(i * 7 + i / 256);
    uint64_t starts[2] = {0, 2000};
    uint64_t windows[3] = {0, (uint64_t)(2000 - T), (uint64_t)(2000 - T + 3000 - T)};
    size_t N = (size_t)s->s.B * T;
    int *ids = ints(s, "ids", OUT, N, 0, 0);
    last_is_exact(s);
    int *targets = ints(s, "targets", OUT, N, 0, 0);
    last_is_exact(s);
    Corpus c = {.n_windows = windows[2], .parts = 2};
    c.text = bytes_in(s, "text", text, sizeof text);
    c.starts = bytes_in(s, "starts", starts, sizeof starts);
    c.windows = bytes_in(s, "windows", windows, sizeof windows);
    const StepState *state = state_in(s, 11);
    if (!s->failed)
        s->be->draw_batch(ids, targets, c, state, s->seed, s->variant % 2 ? 20000 : 0, 3, s->s.B,
                          T);
}

// Variant 0: no average, no clipping. 2: a loss that is not finite: nothing may change.
static void run_optimize(Side *s) {
    size_t n = rows_of(s) * s->s.C, bytes = n * sizeof(real);
    Hyper h = {.steps = 100, .warmup = 3, .lr = 1e-2, .min_lr = 1e-3, .beta1 = 0.9, .beta2 = 0.99,
               .eps = 1e-8, .weight_decay = 0.1, .clip = s->variant ? 1 : 0, .ema = 0.9};
    real *params = reals(s, "params", ADD, n), *m = reals(s, "m", ADD, n);
    real *v = reals(s, "v", ADD, n), *ema = reals(s, "ema", ADD, n);
    real *grads = reals(s, "grads", ADD, n), *host = malloc(bytes);
    void *work = workspace(s, 1, 1, 1, n);
    StepState *state = state_in(s, 9);
    if (host && !s->failed && s->fill) {  // v is a mean of squares: not below 0
        for (size_t i = 0; i < n; i++) host[i] = (real)fabs((double)input_value(s, 99, i));
        s->be->upload(v, host, bytes);
    }
    free(host);
    double scale = s->variant == 2 ? INFINITY : 0.5;
    if (!s->failed)
        s->be->optimize(params, grads, m, v, s->variant ? ema : NULL, n, n / 2, state, scale, h,
                        work);
    state_out(s, state, 9);
}

typedef struct {
    const char *op;
    void (*run)(Side *);
    bool sums;       // has outputs that are exact for integers: sums of its inputs
    bool activates;  // its epilogue has an activation
    int slack;       // times the tolerance; 0: once
} Op;

static const Op ops[] = {
    {"embed_forward", run_embed_forward, false, false, 0},
    {"embed_backward", run_embed_backward, true, false, 0},
    {"norm_forward", run_norm_forward, false, false, 0},
    {"norm_backward", run_norm_backward, true, true, 0},
    {"conv_forward", run_conv_forward, true, true, 0},
    {"conv_backward_input", run_conv_backward_input, true, true, 0},
    {"conv_backward_weight", run_conv_backward_weight, true, false, 0},
    {"dropout_backward", run_dropout_backward, true, false, 0},
    {"attention.turn_forward", run_turn_forward, false, false, 0},
    {"attention.turn_backward", run_turn_backward, false, false, 0},
    {"attention.forward", run_attention_forward, false, false, 0},
    // In bf16 p is rounded, then da; in dgain most of the terms cancel.
    {"attention.backward", run_attention_backward, false, false, 4},
    {"inputs.smear_forward", run_smear_forward, false, false, 0},
    {"inputs.smear_backward", run_smear_backward, false, false, 0},
    {"inputs.skip_forward", run_skip_forward, true, false, 0},
    {"inputs.skip_backward", run_skip_backward, true, false, 0},
    {"inputs.lookup_forward", run_lookup_forward, true, false, 0},
    {"inputs.lookup_backward", run_lookup_backward, true, false, 0},
    {"inputs.positions", run_positions, false, false, 0},
    {"cross_entropy", run_cross_entropy, false, false, 0},
    {"add_losses", run_add_losses, true, false, 0},
    {"draw_batch", run_draw_batch, true, false, 0},
    {"optimize", run_optimize, false, false, 0},
};

static const Op *find_op(const char *name) {
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (strcmp(ops[i].op, name) == 0) return &ops[i];
    return NULL;
}

// The first CHECK_VARIANTS variants are with GELU, so many again with every other activation.
static Activation activation_of_variant(int variant) {
    return (Activation)((ACT_gelu + variant / CHECK_VARIANTS) % N_ACTIVATIONS);
}

// ---- Comparing ---------------------------------------------------------------------------------

static void close_side(Side *s) {
    for (int i = 0; i < s->count; i++) s->be->free(s->buffers[i].p);
    s->count = 0;
}

static void read_buffer(const Side *s, const Buffer *b, real *host) {
    if (b->is_act)
        s->be->read_acts(host, b->p, b->n);
    else
        s->be->download(host, b->p, b->n * sizeof *host);
}

// What is DROPPED must be so on both sides, and counts no further: beside it nothing else would.
// (What an activation with another dropped value stores, 0, is a value like all others.)
static double relative_error(const Buffer *b, const real *out, const real *ref) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < b->n; i++) {
        if ((out[i] == DROPPED) != (ref[i] == DROPPED)) return INFINITY;
        if (ref[i] == DROPPED) continue;
        diff += ((double)out[i] - ref[i]) * ((double)out[i] - ref[i]);
        norm += (double)ref[i] * ref[i];
    }
    return diff == 0 ? 0 : sqrt(diff / norm);  // NaN stays NaN, x/0 is infinite: both fail
}

// Relative errors of a tensor with random inputs. For bf16 with two exceptions. LayerNorm of a few
// channels divides by their spread, which rounding moves far, or puts out its bias only. And of a
// few values each may have all of a rounding, or cancel. WRITTEN only finds what is NaN or absurd.
// A square doubles the relative error of what it is the square of.
#define FLOAT_TOLERANCE 1e-5
#define WRITTEN 100
enum { NARROW = 8, FEW = 256 };

static double tolerance_of(const Kernel *k, ConvShape s, Activation f, bool rounded) {
    int steeper = f == ACT_none || f == ACT_gelu ? 1 : 2;
    if (k->act_bytes != 2) return steeper * FLOAT_TOLERANCE;
    if (s.C < NARROW) return rounded ? steeper * 8e-3 : WRITTEN;
    return steeper * (rounded ? 3e-3 : 1e-2);
}

// All outputs of both sides. Integers always, and sums of integers where asked, bit for bit.
static int compare_sides(const Kernel *k, const Side *gpu, const Side *cpu, KernelCheck *r,
                         Error *e) {
    const int slack = find_op(k->op)->slack;
    const double tolerance = (slack ? slack : 1) *
                             tolerance_of(k, gpu->s, gpu->activation, cpu->rounded);
    for (int i = 0; i < gpu->count; i++) {
        const Buffer *b = &gpu->buffers[i];
        if (b->role != OUT && b->role != ADD) continue;
        bool bits = b->is_int || (gpu->exact && b->exact);
        if (gpu->exact && !bits) continue;  // not a sum of integers: random inputs check it
        real *out = malloc(b->n * sizeof *out), *ref = malloc(b->n * sizeof *ref);
        if (!out || !ref) {
            free(out), free(ref);
            return fail(e, "out of host memory");
        }
        read_buffer(gpu, b, out);
        read_buffer(cpu, &cpu->buffers[i], ref);
        r->compared++;
        double error = bits ? (double)(memcmp(out, ref, b->n * sizeof *out) != 0)
                            : relative_error(b, out, ref);
        bool few = b->n < FEW && k->act_bytes == 2;
        bool ok = error <= (bits ? 0 : few ? WRITTEN : tolerance);
        if (!ok || (!few && !(error <= r->error))) {
            bool other = gpu->activation != ACT_gelu;
            r->error = error;
            snprintf(r->where, sizeof r->where, "%s%s%s%s", b->name, other ? ", activation " : "",
                     other ? activation_names[gpu->activation] : "",
                     cpu->rounded ? ", operands rounded" : "");
        }
        if (!ok) r->passed = false;
        free(out);
        free(ref);
    }
    return 0;
}

// A backend that runs this row; for its operation nothing else is called.
static int backend_of(const Kernel *k, Backend *b, Error *e) {
    const Backend *base = gpu_backend(k->act_bytes == 2 ? "tensor" : "naive", e);
    if (!base) return -1;
    *b = *base;
    kernel_install(b, k);
    return 0;
}

// The CPU's side of a check, kept: the next row is often the same operation on the same inputs.
static const Side *cpu_side(const Side *like, bool rounded) {
    static Side both[2];
    Side *kept = &both[rounded];
    if (kept->run == like->run && memcmp(&kept->s, &like->s, sizeof kept->s) == 0 &&
        kept->activation == like->activation && kept->variant == like->variant &&
        kept->exact == like->exact && kept->seed == like->seed && !kept->failed)
        return kept;
    close_side(kept);
    *kept = *like;
    kept->be = &cpu_backend;
    kept->rounded = rounded;
    kept->run(kept);
    return kept;
}

int kernel_check(const Kernel *k, ConvShape s, int variant, bool exact, uint64_t seed,
                 KernelCheck *r, Error *e) {
    Backend b;
    const Op *op = find_op(k->op);
    bool is_bf16 = k->act_bytes == 2;
    if (!op) return fail(e, "%s: no check for the operation %s", k->name, k->op);
    *r = (KernelCheck){.exact = exact, .passed = true};
    const Activation f = activation_of_variant(variant);
    if ((exact && !op->sums) || (f != ACT_gelu && !op->activates)) return 0;
    if (backend_of(k, &b, e)) return -1;
    Side gpu = {.be = &b, .run = op->run, .s = s, .activation = f,
                .variant = variant % CHECK_VARIANTS, .exact = exact, .fill = true, .seed = seed};
    const Side *cpu = cpu_side(&gpu, false);
    const Side *cpu_rounded = is_bf16 && !exact ? cpu_side(&gpu, true) : cpu;
    int status = 0;
    op->run(&gpu);
    const char *error = b.error();
    if (error)
        status = fail(e, "%s: %s", k->name, error);
    else if (gpu.failed || cpu->failed || cpu_rounded->failed)
        status = fail(e, "%s: not enough memory for the check", k->name);
    else
        status = compare_sides(k, &gpu, cpu, r, e);
    if (status == 0 && r->passed && cpu_rounded != cpu)
        status = compare_sides(k, &gpu, cpu_rounded, r, e);
    close_side(&gpu);
    return status;
}

int gpu_selftest(const Backend *b, Error *e) {
    static const ConvShape shapes[] = {
        {1, 1, 1, 1, 1, 1}, {3, 37, 33, 31, 3, 4},
        {2, 130, 64, 128, 2, 200}, {1, 257, 36, 132, 3, 2},
    };
    enum { CHECKS = 9 };  // random inputs, integers, and last another activation
    int n;
    const Kernel *all = gpu_kernels(&n);
    for (int i = 0; i < n; i++) {
        if (memcmp((const char *)b + all[i].entry, &all[i].launch, sizeof all[i].launch) != 0)
            continue;  // not what this backend runs
        for (int j = 0; j < CHECKS; j++) {
            bool last = j == CHECKS - 1, exact = j >= 4 && !last;
            ConvShape s = shapes[last ? 2 : j % 4];
            KernelCheck r;
            if (kernel_check(&all[i], s, last ? CHECK_VARIANTS + 3 : j % 4, exact, 1, &r, e))
                return -1;
            if (r.passed) continue;
            return fail(e, "self-test: %s is wrong in %s: %s %g (B %d T %d C %d O %d K %d dil %d); "
                           "do not train with this build, try another nvcc or --kernels naive",
                        all[i].name, r.where, exact ? "bits differ," : "relative error", r.error,
                        s.B, s.T, s.C, s.O, s.K, s.dil);
        }
    }
    return 0;
}

// ---- Timing ------------------------------------------------------------------------------------

// Into a graph, too: without `fill` an operation neither allocates nor copies from or to the host.
static void run_again(void *arg) {
    Side *s = arg;
    s->next = 0;
    s->run(s);
}

double kernel_seconds(const Kernel *k, ConvShape s, double *flops, double *bytes) {
    Backend b;
    Error e;
    const Op *op = find_op(k->op);
    if (!op || backend_of(k, &b, &e)) return -1;
    // Variant 1: conv_forward with bias and GELU, out and pre, without residual and dropout, as two
    // thirds of the paper's layers; to the input on through the activation; norm_backward
    // accumulated, without again and pre; dropout's own backward with dropout; averaged.
    Side gpu = {.be = &b, .s = s, .activation = ACT_gelu, .variant = 1, .fill = true,
                .timed = true, .seed = 1};
    gpu.run = op->run;
    gpu.run(&gpu);
    gpu.fill = false;
    // What one call has to do, as its launches count it: every launch of the operation, so that
    // partial sums that one writes and the next one reads are among the bytes.
    KernelTime launches[MOST_KERNEL_TIMES];
    int n = gpu.failed ? 0 : gpu_trace(run_again, &gpu, launches, 0);
    *flops = *bytes = 0;
    for (int i = 0; i < n; i++) *flops += launches[i].flops, *bytes += launches[i].bytes;
    double seconds = gpu.failed ? -1 : gpu_time(run_again, &gpu);
    close_side(&gpu);
    if (b.error()) seconds = -1;
    return seconds;
}
