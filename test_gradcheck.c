// test_gradcheck.c: is every forward what its formula says, and every backward its derivative?
//
// The same sources compiled in double. Each operation alone, on both CPU backends and with every
// activation; then the whole model, blocks and pre-norm convs, with every option:
//   forward   against its definition, written a second time here, slow and plain;
//   backward  against central differences (tests/gradients.h).
// Last, float32 against double: test_gradcheck_f32, the same in float32, must stand beside the
// program; it is asked for its gradients of the same models.
//   ./test_gradcheck
#define _POSIX_C_SOURCE 200809L  // popen
#include "tests/gradients.h"

enum { WIDEST = 256 };
#define EXACT_BOUND 1e-12  // double against double, in another order of summation
#define FLOAT_BOUND 2e-5   // float32 against double, worst value of a tensor to its largest

static const Backend *be;  // that is tested
static StepState state = {.step = 5};

// ---- Small helpers ------------------------------------------------------------------------------

static double dot(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// What a layer added to q, which stood there before: parameter gradients are +=.
static void subtract(real *sum, const real *q, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] -= q[i];
}

static void *new_work(size_t N, int K, int width, size_t n) {
    size_t bytes = be->work_bytes(N, K, width, n);
    void *p = malloc(bytes);
    need(p != NULL, "out of memory");
    memset(p, 0xff, bytes);  // NaN
    return p;
}

static void free_all(real **p, size_t n) {
    for (size_t i = 0; i < n; i++) free(p[i]);
}
#define FREE_ALL(...) \
    free_all((real *[]){__VA_ARGS__}, sizeof((real *[]){__VA_ARGS__}) / sizeof(real *))

// ---- The definitions, a second time ------------------------------------------------------------

static void define_norm(real *out, const real *x, const real *gain, const real *bias, size_t N,
                        int C) {
    for (size_t n = 0; n < N; n++, x += C, out += C) {
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += (double)x[c] / C;
        for (int c = 0; c < C; c++) variance += pow((double)x[c] - mean, 2) / C;
        for (int c = 0; c < C; c++)
            out[c] = (real)(((double)x[c] - mean) / sqrt(variance + 1e-5)) * gain[c] + bias[c];
    }
}

// pre[t,o] = b[o] + sum_k sum_c w[k,c,o] x[t - k*dil, c]; b may be NULL.
static void define_conv(real *pre, const real *x, const real *w, const real *b, ConvShape s) {
    for (int n = 0; n < s.B * s.T; n++)
        for (int o = 0; o < s.O; o++) {
            double sum = b ? (double)b[o] : 0;
            for (int k = 0; k < s.K && k * s.dil <= n % s.T; k++)
                for (int c = 0; c < s.C; c++)
                    sum += (double)w[(k * s.C + c) * s.O + o] *
                           (double)x[(n - k * s.dil) * s.C + c];
            pre[n * s.O + o] = (real)sum;
        }
}

// f(x), and f'(x) in *slope. GELU in its tanh form is x/2 (1 + t), t = tanh(u), and
// dt/dx = (1-t^2) du/dx; lrelu2 is the square of a leaky ReLU.
static double define_function(Activation f, double x, double *slope) {
    double a = sqrt(2 / acos(-1)), t = tanh(a * (x + 0.044715 * x * x * x));
    double leak = x > 0 ? 1 : 0.5;
    switch (f) {
        case ACT_gelu:
            *slope = (1 + t) / 2 + x / 2 * (1 - t * t) * a * (1 + 3 * 0.044715 * x * x);
            return x / 2 * (1 + t);
        case ACT_lrelu2: *slope = 2 * (leak * x) * leak; return pow(leak * x, 2);
        case ACT_none: *slope = 1; return x;
        default: need(false, "a new activation: define it here"); return NAN;
    }
}

// What stands where dropout took a value.
static real define_mark(Activation f) { return f == ACT_lrelu2 ? 0 : -16384; }

static bool define_dropped(const Dropout *d, size_t n, int o, int O) {
    Philox r = dropout_draw(d->seed, d->purpose, d->state->step, d->first + n, o, O);
    return is_dropped(r, d->threshold, d->first + n, o);
}

// Marks which of (N,O) pre-activations dropout takes.
static void define_dropout(real *pre, Activation f, Dropout d, size_t N, int O) {
    for (size_t n = 0; n < N; n++)
        for (int o = 0; o < O; o++)
            if (define_dropped(&d, n, o, O)) pre[n * (size_t)O + o] = define_mark(f);
}

// scale * f(pre), nothing where pre is the mark. out may be pre.
static void define_act(real *out, const real *pre, Activation f, float scale, size_t n) {
    double slope;
    for (size_t i = 0; i < n; i++) {
        double y = define_function(f, (double)pre[i], &slope) * (double)scale;
        out[i] = pre[i] == define_mark(f) ? 0 : (real)y;
    }
}

// forward:  out = scale * f(pre)
static void define_act_backward(real *dpre, const real *dout, const real *pre, Activation f,
                                float scale, size_t n) {
    double slope;
    for (size_t i = 0; i < n; i++) {
        define_function(f, (double)pre[i], &slope);
        dpre[i] = pre[i] == define_mark(f) ? 0 : (real)((double)dout[i] * slope * (double)scale);
    }
}

// As relative_error, of what a conv stores: marks must stand in the same places, and beside the
// size of -16384 no other value would count.
static double stored_error(const real *a, const real *b, Activation f, size_t n) {
    real *x = new_reals(n), *y = new_reals(n), mark = define_mark(f);
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        same = same && (a[i] == mark) == (b[i] == mark);
        x[i] = a[i] == mark ? 0 : a[i];
        y[i] = b[i] == mark ? 0 : b[i];
    }
    double error = same ? relative_error(x, y, n) : INFINITY;
    free(x), free(y);
    return error;
}

static double define_loss(const real *logits, int target, double cap) {
    double capped[V], top = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) {
        capped[v] = cap > 0 ? cap * tanh((double)logits[v] / cap) : (double)logits[v];
        top = fmax(top, capped[v]);
    }
    for (int v = 0; v < V; v++) sum += exp(capped[v] - top);
    return top + log(sum) - capped[target];
}

// ---- The conv, its epilogue and their backward -------------------------------------------------

typedef struct {
    ConvShape s;
    bool linear, residual, bias;  // linear: the sums alone
    Activation f;
    Dropout drop;
    real *x, *w, *b, *res, *pre, *out;
    real *r;  // loss = sum(r * out), so r is the output's gradient
    // test_conv_through only: x = scale * f(below), and loss += sum(q * x)
    real *below, *q;
    float scale;
    void *work;
} ConvTest;

static Dropout test_dropout(float p, uint32_t number) {
    uint32_t threshold = (uint32_t)(p * 256);
    // The first row lies beyond 2^32 draws and is no multiple of the 16 that share theirs.
    return (Dropout){.threshold = threshold, .scale = 256.0f / (float)(256 - threshold),
                     .seed = 77, .purpose = RNG_DROPOUT + number, .first = ((uint64_t)1 << 36) + 7,
                     .state = &state};
}

static Epilogue epilogue_of(const ConvTest *c) {
    if (c->linear) return (Epilogue){.out = c->out};
    return (Epilogue){.out = c->out, .pre = c->pre, .residual = c->residual ? c->res : NULL,
                      .activation = c->f, .drop = c->drop};
}

static void conv_forward(const ConvTest *c, Epilogue e) {
    be->conv_forward(c->x, c->w, c->bias ? c->b : NULL, e, c->s, c->work);
}

static double conv_loss(void *arg) {
    ConvTest *c = arg;
    conv_forward(c, epilogue_of(c));
    return dot(c->out, c->r, (size_t)c->s.B * c->s.T * c->s.O);
}

// The epilogue's outputs, together and without one of them.
static void test_conv_forward(ConvTest *c, const char *name) {
    ConvShape s = c->s;
    size_t N = (size_t)s.B * s.T, n_out = N * s.O;
    real *pre = new_reals(n_out), *out = new_reals(n_out), *alone = new_reals(n_out);
    Epilogue e = epilogue_of(c);
    define_conv(pre, c->x, c->w, c->bias ? c->b : NULL, s);
    conv_loss(c);
    if (c->linear) {
        check_error(relative_error(c->out, pre, n_out), EXACT_BOUND, "%s: sums", name);
        FREE_ALL(pre, out, alone);
        return;
    }
    define_dropout(pre, c->f, c->drop, N, s.O);
    define_act(out, pre, c->f, c->drop.scale, n_out);
    for (size_t i = 0; i < n_out && c->residual; i++) out[i] += c->res[i];
    check_error(stored_error(c->pre, pre, c->f, n_out), EXACT_BOUND, "%s: pre", name);
    check_error(relative_error(c->out, out, n_out), EXACT_BOUND, "%s: out", name);
    e.pre = NULL;
    e.out = alone;
    conv_forward(c, e);
    check(same_bits(alone, c->out, n_out), "%s: out without pre, the same bits", name);
    if (c->residual) {
        memcpy(alone, c->res, n_out * sizeof *alone);
        e.pre = c->pre;
        e.residual = alone;
        conv_forward(c, e);
        check(same_bits(alone, c->out, n_out), "%s: out may be residual", name);
    }
    FREE_ALL(pre, out, alone);
}

static void conv_backward_input(const ConvTest *c, const real *dy, Epilogue e) {
    be->conv_backward_input(dy, c->w, e, c->s, c->work);
}

static void test_conv_backward(ConvTest *c, const char *name) {
    ConvShape s = c->s;
    size_t n_x = (size_t)s.B * s.T * s.C, n_out = (size_t)s.B * s.T * s.O;
    size_t n_w = (size_t)s.K * s.C * s.O;
    real *dpre = new_reals(n_out), *dx = new_reals(n_x);
    real *dx_sum = new_random(n_x, 8, 0, 1), *dx_before = new_random(n_x, 8, 0, 1);
    real *dw = new_random(n_w, 8, 0, 1), *dw_before = new_random(n_w, 8, 0, 1);
    real *db = new_random((size_t)s.O, 9, 0, 1), *db_before = new_random((size_t)s.O, 9, 0, 1);
    conv_loss(c);
    memcpy(dpre, c->r, n_out * sizeof *dpre);
    if (!c->linear) define_act_backward(dpre, c->r, c->pre, c->f, c->drop.scale, n_out);
    conv_backward_input(c, dpre, (Epilogue){.dx = dx});
    conv_backward_input(c, dpre, (Epilogue){.dx = dx_sum, .accumulate = true});
    const WeightJob job = {dw, c->bias ? db : NULL, c->x, dpre, s.dil};
    be->conv_backward_weight(&job, 1, s, c->work);
    subtract(dx_sum, dx_before, n_x);
    subtract(dw, dw_before, n_w);
    subtract(db, db_before, (size_t)s.O);
    check_error(relative_error(dx_sum, dx, n_x), EXACT_BOUND, "%s: dx accumulated", name);
    check_gradient(name, "x", c->x, n_x, dx, false, conv_loss, c);
    check_gradient(name, "w", c->w, n_w, dw, false, conv_loss, c);
    if (c->bias) check_gradient(name, "b", c->b, (size_t)s.O, db, false, conv_loss, c);
    if (c->residual) check_gradient(name, "res", c->res, n_out, c->r, false, conv_loss, c);
    FREE_ALL(dpre, dx, dx_sum, dx_before, dw, dw_before, db, db_before);
}

// On through the activation of the layer below.
static double through_loss(void *arg) {
    ConvTest *c = arg;
    size_t n_x = (size_t)c->s.B * c->s.T * c->s.C;
    define_act(c->x, c->below, c->f, c->scale, n_x);
    return conv_loss(c) + (c->q ? dot(c->q, c->x, n_x) : 0);
}

static void test_conv_through(ConvTest plain, const char *name) {
    ConvTest *c = &plain;
    size_t N = (size_t)c->s.B * c->s.T, n_x = N * c->s.C;
    real *x = new_reals(n_x), *below = new_random(n_x, 11, 0, 2), *q = new_random(n_x, 12, 0, 1);
    real *pre = new_reals(n_x), *pre2 = new_reals(n_x), *dx = new_reals(n_x), *dx2 = new_reals(n_x);
    real *a = new_reals(n_x), *a2 = new_reals(n_x), *sum = new_random(n_x, 12, 0, 1);
    real mark = define_mark(c->f);
    define_dropout(below, c->f, c->drop, N, c->s.C);
    c->scale = c->drop.scale;
    c->linear = true;
    c->residual = false;
    c->x = x;
    c->below = below;
    through_loss(c);
    // dx alone; pre and a alone; all three. What backward reads of `drop` is its scale.
    Epilogue e = {.activation = c->f, .drop = {.scale = c->scale}};
    e.dx = dx;
    conv_backward_input(c, c->r, e);
    memcpy(pre, below, n_x * sizeof *pre);
    e.dx = NULL, e.pre = pre, e.out = a;
    conv_backward_input(c, c->r, e);
    memcpy(pre2, below, n_x * sizeof *pre2);
    e.dx = dx2, e.pre = pre2, e.out = a2;
    conv_backward_input(c, c->r, e);
    check_error(relative_error(a, x, n_x), EXACT_BOUND, "%s: out, recomputed in backward", name);
    check(same_bits(dx2, dx, n_x) && same_bits(pre2, pre, n_x) && same_bits(a2, a, n_x),
          "%s: dx and pre, the same bits together", name);
    check_marked(name, "pre below", below, n_x, pre, mark, false, through_loss, c);
    // added to q, the gradient that comes down beside this layer
    c->q = q;
    memcpy(pre, below, n_x * sizeof *pre);
    e.dx = sum, e.pre = pre, e.out = NULL, e.accumulate = true;
    conv_backward_input(c, c->r, e);
    for (size_t i = 0; i < n_x; i++) dx[i] += q[i];
    check_error(relative_error(sum, dx, n_x), EXACT_BOUND, "%s: dx accumulated, with pre", name);
    check_marked(name, "pre below, accumulated", below, n_x, pre, mark, false, through_loss, c);
    FREE_ALL(x, below, q, pre, pre2, dx, dx2, a, a2, sum);
}

// Dropout behind a map without an activation, which keeps no pre: backward draws the mask again.
static void test_dropout_backward(ConvTest *c, const char *name) {
    size_t N = (size_t)c->s.B * c->s.T, O = (size_t)c->s.O, n = N * O;
    size_t n_w = (size_t)c->s.K * c->s.C * O;
    Epilogue e = {.out = c->out, .residual = c->residual ? c->res : NULL, .drop = c->drop};
    real *y = new_reals(n), *out = new_reals(n), *dy = new_reals(n), *in_place = new_reals(n);
    real *defined = new_reals(n), *dw = new_random(n_w, 8, 0, 0);
    define_conv(y, c->x, c->w, c->bias ? c->b : NULL, c->s);
    for (size_t i = 0; i < n; i++) {
        bool dropped = define_dropped(&c->drop, i / O, (int)(i % O), (int)O);
        real scale = dropped ? 0 : (real)c->drop.scale;
        out[i] = scale * y[i] + (c->residual ? c->res[i] : 0);
        defined[i] = scale * c->r[i];
    }
    conv_forward(c, e);
    check_error(relative_error(c->out, out, n), EXACT_BOUND, "%s: out of a dropped map", name);
    be->dropout_backward(dy, c->r, c->drop, N, (int)O);
    check_error(relative_error(dy, defined, n), EXACT_BOUND, "%s: dropout_backward", name);
    int apart = 0;  // where one of the two drops and the other does not
    for (size_t i = 0; i < n; i++)
        apart += (dy[i] == 0) != (c->out[i] == (c->residual ? c->res[i] : 0));
    check(apart == 0, "%s: dropout_backward has forward's mask", name);
    memcpy(in_place, c->r, n * sizeof *in_place);
    be->dropout_backward(in_place, in_place, c->drop, N, (int)O);
    check(same_bits(in_place, dy, n), "%s: dropout_backward, dy may be dout", name);
    // The slope of that forward: its epilogue has activation none.
    const WeightJob job = {dw, NULL, c->x, dy, c->s.dil};
    be->conv_backward_weight(&job, 1, c->s, c->work);
    c->f = ACT_none;
    check_gradient(name, "w, through dropout_backward", c->w, n_w, dw, false, conv_loss, c);
    FREE_ALL(y, out, dy, in_place, defined, dw);
}

// f N_ACTIVATIONS: the sums alone.
static void test_conv(ConvShape s, Activation f, bool residual, bool bias, float p) {
    char name[128];
    bool linear = f == N_ACTIVATIONS;
    snprintf(name, sizeof name, "%s conv B=%d T=%d C=%d O=%d K=%d dil=%d%s %s%s%s", be->name, s.B,
             s.T, s.C, s.O, s.K, s.dil, bias ? " +b" : "", linear ? "linear" : activation_names[f],
             p > 0 ? " dropout" : "", residual ? " +res" : "");
    size_t n_x = (size_t)s.B * s.T * s.C, n_out = (size_t)s.B * s.T * s.O;
    double spread = sqrt(3 / ((double)s.K * s.C));
    ConvTest c = {.s = s, .linear = linear, .f = f, .residual = residual, .bias = bias};
    c.drop = test_dropout(p, 3);
    c.x = new_random(n_x, 1, 0, 2);
    c.w = new_random((size_t)s.K * s.C * s.O, 2, 0, spread);
    c.b = new_random((size_t)s.O, 3, 0, 1);
    c.res = new_random(n_out, 4, 0, 1);
    c.r = new_random(n_out, 5, 0, 1);
    c.pre = new_reals(n_out);
    c.out = new_reals(n_out);
    c.work = new_work((size_t)s.B * s.T, s.K, WIDEST, 1);
    test_conv_forward(&c, name);
    test_conv_backward(&c, name);
    if (!linear) test_conv_through(c, name);
    if (f == ACT_none) test_dropout_backward(&c, name);
    FREE_ALL(c.x, c.w, c.b, c.res, c.r, c.pre, c.out);
    free(c.work);
}

static void test_convs(void) {
    const ConvShape plain = {2, 9, 8, 6, 3, 2};
    const ConvShape ugly[] = {
        {3, 1, 33, 5, 3, 1},     // T = 1: one tap of three has anything to read
        {3, 5, 4, 33, 3, 7},     // T < dil
        {3, 8, 5, 7, 4, 3},      // the last tap lies outside the text, the one before inside
        {2, 7, 6, 9, 1, 1},      // K = 1
        {3, 11, 1, 1, 3, 2},     // one channel
        {1, 1, 1, 1, 1, 1},      // one of everything
        {3, 50, 33, 40, 3, 4},   // more rows than one piece of work, in pieces that cut texts
        {1, 130, 17, 65, 2, 70},  // a dilation longer than a piece of work
        {2, 300, 3, 140, 2, 150}, // more rows than backward_weight takes at a time
    };
    test_conv(plain, N_ACTIVATIONS, false, false, 0);
    test_conv(plain, N_ACTIVATIONS, false, true, 0);
    for (int f = 0; f < N_ACTIVATIONS; f++) {
        test_conv(plain, (Activation)f, false, true, 0);
        test_conv(plain, (Activation)f, true, true, 0);
        test_conv(plain, (Activation)f, true, true, 0.3f);
        for (size_t i = 0; i < sizeof ugly / sizeof *ugly; i++)
            test_conv(ugly[i], (Activation)f, true, true, i == 5 ? 0 : 0.25f);
    }
}

// ---- LayerNorm ---------------------------------------------------------------------------------

typedef struct {
    size_t N;
    int C;
    real *x, *gain, *bias, *out, *r;
    // embedding only: x is its output, `table` what is looked up
    real *table;
    int *ids;
    // test_norm_through only: x = scale * f(below), and loss += sum(q * x)
    Activation f;
    real *below, *q;
    float scale;
    void *work;
} NormTest;

static double norm_loss(void *arg) {
    NormTest *t = arg;
    be->norm_forward(t->out, t->x, t->gain, t->bias, t->N, t->C);
    return dot(t->out, t->r, t->N * (size_t)t->C);
}

static void norm_backward(const NormTest *t, act *again, real *dgain_dbias, const real *x,
                          Epilogue e) {
    be->norm_backward(again, dgain_dbias, dgain_dbias + t->C, t->r, x, t->gain, t->bias, e, t->N,
                      t->C, t->work);
}

// spread 0.01 puts the variance near NORM_EPS: where that stands then matters.
static void test_norm(size_t N, int C, double spread) {
    size_t n = N * (size_t)C, width = (size_t)C;
    char name[64];
    snprintf(name, sizeof name, "%s norm N=%zu C=%d spread=%g", be->name, N, C, spread);
    NormTest t = {.N = N, .C = C, .x = new_random(n, 1, spread / 2, spread),
                  .r = new_random(n, 2, 0, 1),
                  .gain = new_random(width, 3, 1, 0.5), .bias = new_random(width, 4, 0, 0.5),
                  .out = new_reals(n), .work = new_work(N, 1, WIDEST, 1)};
    real *defined = new_reals(n), *dx = new_reals(n), *sum = new_random(n, 5, 0, 1);
    real *before = new_random(n, 5, 0, 1), *in_place = new_reals(n);
    real *grads = new_random(2 * width, 6, 0, 1), *rest = new_random(2 * width, 8, 0, 1);
    real *grads_before = new_random(2 * width, 6, 0, 1);

    define_norm(defined, t.x, t.gain, t.bias, N, C);
    norm_loss(&t);
    check_error(relative_error(t.out, defined, n), EXACT_BOUND, "%s: out", name);

    memcpy(in_place, t.x, n * sizeof *in_place);
    norm_backward(&t, NULL, grads, t.x, (Epilogue){.dx = dx});
    norm_backward(&t, NULL, rest, t.x, (Epilogue){.dx = sum, .accumulate = true});
    norm_backward(&t, NULL, rest, in_place, (Epilogue){.dx = in_place});
    check(same_bits(in_place, dx, n), "%s: dx may be x", name);
    subtract(grads, grads_before, 2 * width);
    bool dead = C == 1;  // one channel is its own mean: only the bias comes through
    for (size_t i = 0; i < n; i++) before[i] += dx[i];
    check_error(relative_error(sum, before, n), EXACT_BOUND, "%s: dx accumulated", name);
    check_gradient(name, "x", t.x, n, dx, dead, norm_loss, &t);
    check_gradient(name, "gain", t.gain, width, grads, dead, norm_loss, &t);
    check_gradient(name, "bias", t.bias, width, grads + C, false, norm_loss, &t);
    FREE_ALL(t.x, t.r, t.gain, t.bias, t.out, defined, dx, sum, before, in_place, grads,
             grads_before, rest);
    free(t.work);
}

static double norm_through_loss(void *arg) {
    NormTest *t = arg;
    size_t n = t->N * (size_t)t->C;
    define_act(t->x, t->below, t->f, t->scale, n);
    return norm_loss(t) + (t->q ? dot(t->q, t->x, n) : 0);
}

// What norm_backward does beside dx: forward's output again, and on through the activation below.
static void test_norm_through(size_t N, int C, Activation f, float p) {
    size_t n = N * (size_t)C, width = (size_t)C;
    char name[80];
    snprintf(name, sizeof name, "%s norm N=%zu C=%d, %s below%s", be->name, N, C,
             activation_names[f], p > 0 ? ", dropout" : "");
    Dropout drop = test_dropout(p, 3);
    NormTest t = {.N = N, .C = C, .x = new_reals(n), .r = new_random(n, 2, 0, 1),
                  .gain = new_random(width, 3, 1, 0.5), .bias = new_random(width, 4, 0, 0.5),
                  .f = f, .below = new_random(n, 5, 0, 2), .scale = drop.scale,
                  .out = new_reals(n), .work = new_work(N, 1, WIDEST, 1)};
    real *dx = new_reals(n), *x = new_reals(n), *pre = new_reals(n), *again = new_reals(n);
    real *q = new_random(n, 6, 0, 1), *sum = new_random(n, 6, 0, 1);
    real *plain = new_random(n, 6, 0, 1), mark = define_mark(f);
    real *rest = new_random(2 * width, 8, 0, 1), *rest2 = new_random(2 * width, 8, 0, 1);
    Epilogue e = {.pre = pre, .activation = f, .drop = {.scale = t.scale}};
    define_dropout(t.below, f, drop, N, C);
    norm_through_loss(&t);

    memcpy(pre, t.below, n * sizeof *pre);
    e.dx = dx;
    norm_backward(&t, again, rest, t.x, e);
    check(same_bits(again, t.out, n), "%s: again is forward's output", name);
    check_marked(name, "pre below", t.below, n, pre, mark, C == 1, norm_through_loss, &t);
    norm_through_loss(&t);  // the difference moved x
    memcpy(x, t.x, n * sizeof *x);
    memcpy(pre, t.below, n * sizeof *pre);
    norm_backward(&t, NULL, rest2, t.x, (Epilogue){.dx = plain, .accumulate = true});
    fill(rest, 2 * width, 8, 0, 1);
    e.dx = sum, e.accumulate = true;
    norm_backward(&t, x, rest, x, e);
    check(same_bits(x, t.out, n), "%s: again may be x", name);
    check(same_bits(sum, plain, n) && same_bits(rest, rest2, 2 * width),
          "%s: dx and the parameters' gradients do not depend on again and pre", name);
    t.q = q;
    check_marked(name, "pre below, accumulated", t.below, n, pre, mark, false, norm_through_loss,
                 &t);
    FREE_ALL(t.x, t.r, t.gain, t.bias, t.below, t.out, dx, x, pre, again, q, sum, plain, rest,
             rest2);
    free(t.work);
}

// ---- Embedding ---------------------------------------------------------------------------------

static double embed_loss(void *arg) {
    NormTest *t = arg;
    be->embed_forward(t->x, t->ids, t->table, t->gain, t->bias, t->N, t->C, t->work);
    return dot(t->x, t->r, t->N * (size_t)t->C);
}

static void test_embed(size_t N, int C) {
    size_t n = N * (size_t)C, width = (size_t)C, size = V * width;
    char name[64];
    snprintf(name, sizeof name, "%s embed N=%zu C=%d", be->name, N, C);
    NormTest t = {.N = N, .C = C, .x = new_reals(n), .r = new_random(n, 2, 0, 1),
                  .gain = new_random(width, 3, 1, 0.5), .bias = new_random(width, 4, 0, 0.5),
                  .table = new_random(size, 5, 0, 0.5), .work = new_work(N, 1, WIDEST, 1)};
    t.ids = malloc(N * sizeof *t.ids);
    need(t.ids != NULL, "out of memory");
    // Few bytes, so that they repeat; 255 and the dropped byte among them.
    for (size_t i = 0; i < N; i++) t.ids[i] = i % 5 == 3 ? BYTE_DROPPED : 255 - (int)(i * i % 7);
    real *looked_up = new_reals(n), *defined = new_reals(n);
    real *dtable = new_random(size, 6, 0, 1), *dtable_before = new_random(size, 6, 0, 1);
    real *dgain = new_random(width, 6, 0, 1), *dgain_before = new_random(width, 6, 0, 1);
    real *dbias = new_random(width, 7, 0, 1), *dbias_before = new_random(width, 7, 0, 1);

    for (size_t i = 0; i < n; i++) {
        int id = t.ids[i / width];
        looked_up[i] = id == BYTE_DROPPED ? 0 : t.table[(size_t)id * width + i % width];
    }
    define_norm(defined, looked_up, t.gain, t.bias, N, C);
    embed_loss(&t);
    check_error(relative_error(t.x, defined, n), EXACT_BOUND, "%s: x", name);
    be->embed_backward(dtable, dgain, dbias, t.r, t.ids, t.table, t.gain, N, C, t.work);
    subtract(dtable, dtable_before, size);
    subtract(dgain, dgain_before, width);
    subtract(dbias, dbias_before, width);
    check_gradient(name, "table", t.table, size, dtable, C == 1, embed_loss, &t);
    check_gradient(name, "gain", t.gain, width, dgain, C == 1, embed_loss, &t);
    check_gradient(name, "bias", t.bias, width, dbias, false, embed_loss, &t);
    FREE_ALL(t.x, t.r, t.gain, t.bias, t.table, looked_up, defined, dtable, dtable_before, dgain,
             dgain_before, dbias, dbias_before);
    free(t.ids);
    free(t.work);
}

// ---- Loss --------------------------------------------------------------------------------------

enum { LOSS_ROWS = 6 };
#define LOSS_SCALE 0.125f  // exact in every format
static const int loss_targets[LOSS_ROWS] = {0, 255, -1, 17, 17, -1};

typedef struct {
    float cap;
    real *logits, *losses;
} LossTest;

static double cross_entropy_loss(void *arg) {
    LossTest *t = arg;
    be->cross_entropy(t->losses, t->logits, loss_targets, t->cap, 0, LOSS_ROWS);
    double sum = 0;
    for (int n = 0; n < LOSS_ROWS; n++) sum += (double)t->losses[n];
    return sum * (double)LOSS_SCALE;
}

// Spread 900, where exp of a raw logit overflows, is too rough for a difference: without a cap the
// gradient is softmax - 1 at the target, and softmax_v = exp(-loss if v were the target).
static double softmax_error(const real *dlogits, const real *logits) {
    real defined[LOSS_ROWS * V];
    for (int i = 0; i < LOSS_ROWS * V; i++) {
        int n = i / V, v = i % V, target = loss_targets[n];
        double p = exp(-define_loss(logits + n * V, v, 0));
        defined[i] = target < 0 ? 0 : (real)((double)LOSS_SCALE * (p - (v == target)));
    }
    return relative_error(dlogits, defined, LOSS_ROWS * V);
}

static void test_cross_entropy(float cap, double spread) {
    char name[64];
    size_t n = LOSS_ROWS * V;
    snprintf(name, sizeof name, "%s cross_entropy cap=%g logits=%g", be->name, (double)cap, spread);
    LossTest t = {cap, new_random(n, 1, 0, spread), new_reals(LOSS_ROWS)};
    real *dlogits = new_random(n, 1, 0, spread), defined[LOSS_ROWS];
    be->cross_entropy(t.losses, dlogits, loss_targets, cap, 0, LOSS_ROWS);
    check(same_bits(dlogits, t.logits, n), "%s: scale 0 leaves the logits alone", name);
    for (int i = 0; i < LOSS_ROWS; i++) {
        int target = loss_targets[i];
        defined[i] = target < 0 ? 0 : (real)define_loss(t.logits + i * V, target, (double)cap);
    }
    check_error(relative_error(t.losses, defined, LOSS_ROWS), EXACT_BOUND, "%s: losses", name);
    be->cross_entropy(t.losses, dlogits, loss_targets, cap, LOSS_SCALE, LOSS_ROWS);
    check_error(relative_error(t.losses, defined, LOSS_ROWS), EXACT_BOUND,
                "%s: losses beside gradients", name);
    for (int i = 0; i < LOSS_ROWS; i++)
        if (loss_targets[i] < 0)
            check(largest_value(dlogits + i * V, V) == 0 && t.losses[i] == 0,
                  "%s: row %d is not scored", name, i);
    if (cap > 0)
        check_gradient(name, "logits", t.logits, n, dlogits, false, cross_entropy_loss, &t);
    else
        check_error(softmax_error(dlogits, t.logits), EXACT_BOUND, "%s: d logits", name);
    FREE_ALL(t.logits, t.losses, dlogits);
}

static void test_add_losses(void) {
    enum { N = 300 };
    StepState s = {.loss_sum = 2.5};
    real *losses = new_random(N, 1, 3, 2);
    void *work = new_work(N, 1, WIDEST, 1);
    double sum = 2.5;
    for (int i = 0; i < N; i++) sum += (double)losses[i];
    be->add_losses(&s, losses, N, work);
    check_error(fabs(s.loss_sum - sum) / sum, EXACT_BOUND, "%s add_losses: adds to what is there",
                be->name);
    free(work);
    free(losses);
}

// ---- AdamW -------------------------------------------------------------------------------------

enum { ADAM_N = 9001, ADAM_DECAYED = 5000, ADAM_STEPS = 5 };  // more than one block of the norm

typedef struct {
    real *p, *g, *m, *v, *ema;
} Adam;

static Adam new_adam(void) {
    return (Adam){new_random(ADAM_N, 1, 0, 1), new_reals(ADAM_N), new_random(ADAM_N, 3, 0, 0),
                  new_random(ADAM_N, 4, 0, 0), new_random(ADAM_N, 1, 0, 1)};
}

// The paper's algorithm 2, with the learning rate, the clipping and the average around it.
static double define_adamw(Adam a, const Hyper *h, int step) {
    double norm = sqrt(dot(a.g, a.g, ADAM_N));
    double done = (double)(step - h->warmup) / (double)(h->steps - h->warmup);
    double lr = step < h->warmup ? h->lr * (step + 1) / (double)h->warmup
                                 : h->min_lr + (h->lr - h->min_lr) * (1 + cos(acos(-1) * done)) / 2;
    for (int i = 0; i < ADAM_N; i++) {
        double g = (double)a.g[i];
        if (h->clip > 0 && norm > h->clip) g *= h->clip / norm;
        double m = h->beta1 * (double)a.m[i] + (1 - h->beta1) * g;
        double v = h->beta2 * (double)a.v[i] + (1 - h->beta2) * g * g;
        double m_hat = m / (1 - pow(h->beta1, step + 1)), v_hat = v / (1 - pow(h->beta2, step + 1));
        double p = (double)a.p[i];
        double decay = i < ADAM_DECAYED ? lr * h->weight_decay * p : 0;
        p = p - lr * m_hat / (sqrt(v_hat) + h->eps) - decay;
        a.p[i] = (real)p, a.m[i] = (real)m, a.v[i] = (real)v;
        a.ema[i] = (real)(h->ema * (double)a.ema[i] + (1 - h->ema) * p);
    }
    return lr;
}

static void test_adamw(const char *options, Hyper h) {
    char name[64];
    snprintf(name, sizeof name, "%s adamw %s", be->name, options);
    Adam a = new_adam(), defined = new_adam();
    void *work = new_work(1, 1, WIDEST, ADAM_N);
    StepState s = {0};
    double worst_figure = 0, left = 0;
    for (int step = 0; step < ADAM_STEPS; step++) {
        fill(a.g, ADAM_N, 50 + (uint64_t)step, 0, 0.02);  // norm about 1.1
        memcpy(defined.g, a.g, ADAM_N * sizeof *a.g);
        s.loss_sum = 12 + step;
        be->optimize(a.p, a.g, a.m, a.v, h.ema > 0 ? a.ema : NULL, ADAM_N, ADAM_DECAYED, &s, 0.25,
                      h, work);
        double lr = define_adamw(defined, &h, step), norm = sqrt(dot(defined.g, defined.g, ADAM_N));
        left += dot(a.g, a.g, ADAM_N);
        StepFigures f = s.ring[step];
        double wrong = fabs((double)f.loss - (12 + step) * 0.25) +
                       fabs((double)f.grad_norm - norm) + fabs((double)f.lr - lr) / h.lr;
        if (!(wrong <= worst_figure)) worst_figure = wrong;
    }
    check(s.step == ADAM_STEPS && s.loss_sum == 0, "%s: counts its steps", name);
    check(left == 0, "%s: leaves the gradients zero", name);
    check_error(worst_figure, 1e-6, "%s: loss, norm and rate noted (in float)", name);
    check_error(relative_error(a.m, defined.m, ADAM_N), EXACT_BOUND, "%s: m", name);
    check_error(relative_error(a.v, defined.v, ADAM_N), EXACT_BOUND, "%s: v", name);
    check_error(relative_error(a.p, defined.p, ADAM_N), EXACT_BOUND, "%s: p", name);
    if (h.ema > 0)
        check_error(relative_error(a.ema, defined.ema, ADAM_N), EXACT_BOUND, "%s: ema", name);
    FREE_ALL(a.p, a.g, a.m, a.v, a.ema, defined.p, defined.g, defined.m, defined.v, defined.ema);
    free(work);
}

// A loss or a gradient that is not finite: nothing moves, and the step is not counted.
static void test_adamw_not_finite(double loss, double gradient) {
    Adam a = new_adam(), before = new_adam();
    void *work = new_work(1, 1, WIDEST, ADAM_N);
    StepState s = {.step = 3, .loss_sum = loss};
    fill(a.g, ADAM_N, 5, 0, 1);
    a.g[ADAM_N - 1] = (real)gradient;
    memcpy(before.g, a.g, ADAM_N * sizeof *a.g);
    Hyper h = {.steps = 9, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 1,
               .clip = 1, .ema = 0.5};
    be->optimize(a.p, a.g, a.m, a.v, a.ema, ADAM_N, ADAM_DECAYED, &s, 1, h, work);
    check(s.step == 3 && same_bits(a.p, before.p, ADAM_N) && same_bits(a.m, before.m, ADAM_N) &&
              same_bits(a.v, before.v, ADAM_N) && same_bits(a.ema, before.ema, ADAM_N) &&
              same_bits(a.g, before.g, ADAM_N),
          "%s adamw: loss %g and a gradient of %g change nothing", be->name, loss, gradient);
    FREE_ALL(a.p, a.g, a.m, a.v, a.ema, before.p, before.g, before.m, before.v, before.ema);
    free(work);
}

static void test_optimizer(void) {
    const Hyper plain = {.steps = 100, .lr = 0.01, .min_lr = 0.001, .beta1 = 0.9, .beta2 = 0.99,
                         .eps = 1e-3};
    Hyper all = plain, ending = plain, loose = plain;
    test_adamw("plain", plain);
    all.warmup = 3, all.steps = 8, all.weight_decay = 2, all.clip = 0.5, all.ema = 0.9;
    test_adamw("warmup decay clip ema", all);
    loose.clip = 100;
    test_adamw("clip out of reach", loose);
    ending.steps = ADAM_STEPS;
    test_adamw("to the end of the cosine", ending);
    test_adamw_not_finite(NAN, 1);
    test_adamw_not_finite(INFINITY, 1);
    test_adamw_not_finite(1, NAN);
    test_adamw_not_finite(1, INFINITY);
}

// ---- The whole model ---------------------------------------------------------------------------

typedef struct {
    const char *name;
    const char *units[2];  // blocks, and the same convs as units of their own; or one stack alone
    Config config;
    float dropout, byte_dropout;
    int B, T, passes;
} Case;

#define SMALL .channels = 8, .latent = 6, .activation = ACT_gelu
#define SQUARE .channels = 8, .latent = 8, .activation = ACT_gelu
#define UNITS {"2x(block:3:1:2)", "2x(conv:3:1 conv:3:2)"}

static const Case cases[] = {
    {"plain", UNITS, {SMALL}, 0, 0, 2, 9, 1},
    {"softcap", UNITS, {SMALL, .softcap = 2}, 0, 0, 2, 9, 1},
    {"tied", UNITS, {SQUARE, .tie = true}, 0, 0, 2, 9, 1},
    {"dropout", UNITS, {SMALL}, 0.3f, 0, 2, 9, 1},
    {"byte dropout", UNITS, {SMALL}, 0, 0.25f, 2, 9, 1},
    {"3 passes", UNITS, {SMALL}, 0, 0, 2, 9, 3},
    {"everything", {"2x(block:3:2:1)", "2x(conv:3:2 conv:3:1)"},
     {SQUARE, .tie = true, .softcap = 3}, 0.2f, 0.2f, 2, 9, 3},
    {"T=1", UNITS, {SMALL}, 0, 0, 3, 1, 1},
    {"T<dil", {"2x(block:3:1:6)", "2x(conv:3:1 conv:3:6)"}, {SMALL}, 0, 0, 3, 5, 1},
    {"dil>T, T=2", {"2x(block:3:3:70)", "2x(conv:3:3 conv:3:70)"}, {SMALL}, 0.2f, 0.2f, 3, 2, 2},
    {"one conv", {"block:2:3", "conv:2:3"},
     {.channels = 8, .latent = 12, .activation = ACT_gelu}, 0.2f, 0, 2, 9, 1},
    // more convs to a unit than arrays in which what they read can wait
    {"6 dilations", {"2x(block:2:1:2:3:1:2:1)",
                     "2x(conv:2:1 conv:2:2 conv:2:3 conv:2:1 conv:2:2 conv:2:1)"},
     {SMALL}, 0.1f, 0, 2, 9, 1},
    {"K=1", {"2x(block:1:1:2)", "2x(conv:1:1 conv:1:2)"}, {SMALL}, 0, 0, 2, 9, 1},
    {"C=1", UNITS, {.channels = 1, .latent = 3, .activation = ACT_gelu}, 0, 0, 3, 9, 1},
    {"C=1 tied", {"block:3:1", "conv:3:1"},
     {.channels = 1, .latent = 1, .activation = ACT_gelu, .tie = true}, 0, 0, 3, 9, 1},
    {"C=33 D=40", {"2x(block:3:1:2:4)", "2x(conv:3:1 conv:3:2 conv:3:4)"},
     {.channels = 33, .latent = 40, .activation = ACT_gelu, .softcap = 9}, 0.1f, 0.1f, 3, 50, 2},
    {"C=33 tied", {"block:4:3:5", "conv:4:3 conv:4:5"},
     {.channels = 33, .latent = 33, .activation = ACT_gelu, .tie = true}, 0.1f, 0, 3, 70, 1},
    {"lrelu2", UNITS, {.channels = 8, .latent = 6, .activation = ACT_lrelu2}, 0, 0, 2, 9, 1},
    {"lrelu2 dropout, 3 passes", UNITS,
     {.channels = 8, .latent = 8, .activation = ACT_lrelu2, .tie = true}, 0.3f, 0.1f, 2, 9, 3},
    {"no activation", UNITS, {.channels = 8, .latent = 6}, 0, 0, 2, 9, 1},
    {"no activation, dropout, 3 passes", UNITS,
     {.channels = 8, .latent = 8, .tie = true, .softcap = 3}, 0.3f, 0.1f, 2, 9, 3},
    // what goes on from a unit into the one below has the activation of the one below
    {"mixed", {"conv:3:1:lrelu2 2x(block:2:1:3:none conv:2:2) block:1:1:1:1:lrelu2 conv:4:3:none"},
     {SMALL}, 0, 0, 2, 9, 1},
    {"mixed, everything",
     {"block:3:1:2 conv:2:1:none conv:2:4 block:2:5:1:3:lrelu2 conv:3:2:lrelu2"},
     {SQUARE, .tie = true, .softcap = 4}, 0.2f, 0.2f, 2, 9, 3},
    // more weight gradients of one shape than are computed together, others between them
    {"mixed, 18 convs", {"6x(conv:2:1 conv:2:3:lrelu2 conv:3:1)", "5x(conv:2:2 block:2:1:2:1)"},
     {SMALL}, 0.1f, 0, 2, 9, 1},
};
enum { CASES = sizeof cases / sizeof *cases };

// Every case and stack: of number i case i/2, stack i%2. Whether there is one.
static bool there_is(int i) { return cases[i / 2].units[i % 2] != NULL; }
static void name_of(char *name, size_t size, int i) {
    snprintf(name, size, "%s, %s", cases[i / 2].name, cases[i / 2].units[i % 2]);
}

// A model of the case with a corpus of two texts. lr 0: a training step leaves the parameters
// alone, and its gradients behind.
static void open_case(Model *m, int i) {
    enum { BYTES = 400 };
    const Case *c = &cases[i / 2];
    Config config = c->config;
    snprintf(config.units, sizeof config.units, "%s", c->units[i % 2]);
    Training training = {.dropout = c->dropout, .byte_dropout = c->byte_dropout, .seed = 4,
                         .passes = c->passes,
                         .hyper = {.steps = 10, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8}};
    open_or_die(m, be, &config, c->B, c->T, &training);
    fill_params(m, 403);
    uint8_t text[BYTES];
    for (int j = 0; j < BYTES; j++) text[j] = (uint8_t)(random_value(60, (size_t)j) * 128 + 128);
    uint64_t length[] = {BYTES / 4, BYTES - BYTES / 4};
    Error e;
    if (model_set_corpus(m, text, length, 2, &e)) need(false, e.text);
    m->state->step = 5;
}

// The scale of a step's gradients, in float as the graph computes it.
static double step_scale(const Model *m) {
    return (double)(1 / ((float)m->training.passes * (float)(m->B * m->T)));
}

static void draw(Model *m, uint64_t first) {
    uint32_t threshold = (uint32_t)(m->training.byte_dropout * 65536 + 0.5f);
    be->draw_batch(m->ids, m->targets, m->corpus, m->state, m->training.seed, threshold, first,
                    m->B, m->T);
}

// The loss that model_train_step differentiates.
static double model_loss(void *arg) {
    Model *m = arg;
    size_t N = (size_t)m->B * m->T;
    double sum = 0;
    for (int p = 0; p < m->training.passes; p++) {
        const Pass pass = {(uint64_t)p * (uint64_t)m->B};
        draw(m, pass.first);
        model_forward(m, &pass);
        be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
        for (size_t n = 0; n < N; n++) sum += (double)m->losses[n];
    }
    return sum * step_scale(m);
}

// The gradients of one training step. Its loss is made NaN: the optimizer then changes nothing, and
// leaves them where they are.
static const real *step_gradients(Model *m) {
    memset(m->grads, 0, m->n_params * sizeof *m->grads);
    m->state->loss_sum = NAN;
    model_train_step(m);
    return m->grads;
}

// A tensor by its name, in which %d stand for the unit and the conv in it.
static const real *tensor(const Model *m, const char *format, int unit, int conv) {
    char name[56];
    snprintf(name, sizeof name, format, unit, conv);
    for (int i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0) return m->params + m->tensors[i].offset;
    need(false, name);
    return NULL;
}

// Units conv and block, a second time: x (N,C) becomes x + f(conv(norm(x))), or x + f(conv(.. x)).
// *number counts the model's dropouts.
static void define_unit(const Model *m, int u, Dropout drop, uint32_t *number, real *x) {
    const Unit *unit = &m->units[u];
    bool block = strcmp(unit->mixer->name, "block") == 0;
    need(block || strcmp(unit->mixer->name, "conv") == 0, "define_unit knows conv and block");
    int C = m->config.channels;
    size_t N = (size_t)m->B * m->T, n = N * (size_t)C;
    real *y = new_reals(n), *a = new_reals(n);
    memcpy(y, x, n * sizeof *y);
    if (!block)
        define_norm(y, x, tensor(m, "units.%d.norm.weight", u, 0),
                    tensor(m, "units.%d.norm.bias", u, 0), N, C);
    for (int i = 0; i < unit->n_numbers - 1; i++) {
        ConvShape s = {m->B, m->T, C, C, unit->numbers[0], unit->numbers[1 + i]};
        const char *w = block ? "units.%d.conv.%d.weight" : "units.%d.conv.weight";
        const char *b = block ? "units.%d.conv.%d.bias" : "units.%d.conv.bias";
        define_conv(a, y, tensor(m, w, u, i), tensor(m, b, u, i), s);
        drop.purpose = RNG_DROPOUT + (*number)++;
        define_dropout(a, unit->activation, drop, N, C);
        define_act(y, a, unit->activation, drop.scale, n);
    }
    for (size_t i = 0; i < n; i++) x[i] += y[i];
    FREE_ALL(y, a);
}

// The graph, a second time: logits (N,V) for the ids and the dropout of m, from its parameters.
static void define_model(const Model *m, uint64_t first, real *logits) {
    const Config *c = &m->config;
    int C = c->channels, D = c->latent;
    size_t N = (size_t)m->B * m->T, n = N * (size_t)C;
    float p = m->training.dropout;
    uint32_t number = 0;
    Dropout drop = {.threshold = (uint32_t)(p * 256 + 0.5f), .seed = m->training.seed,
                    .first = first * (uint64_t)m->T, .state = m->state};
    drop.scale = 256.0f / (float)(256 - drop.threshold);
    ConvShape rows = {1, m->B * m->T, C, D, 1, 1}, head = {1, m->B * m->T, D, V, 1, 1};
    real *x = new_reals(n), *y = new_reals(n), *z = new_reals(N * (size_t)D);
    const real *E = tensor(m, "embedding.weight", 0, 0);

    for (size_t i = 0; i < n; i++) {
        int id = m->ids[i / (size_t)C];
        y[i] = id == BYTE_DROPPED ? 0 : E[(size_t)id * (size_t)C + i % (size_t)C];
    }
    define_norm(x, y, tensor(m, "norm_in.weight", 0, 0), tensor(m, "norm_in.bias", 0, 0), N, C);
    for (int u = 0; u < m->U; u++) define_unit(m, u, drop, &number, x);
    define_norm(y, x, tensor(m, "norm_out.weight", 0, 0), tensor(m, "norm_out.bias", 0, 0), N, C);
    if (c->tie) {
        for (size_t i = 0; i < N * V; i++)
            logits[i] = (real)dot(y + i / V * (size_t)C, E + i % V * (size_t)C, (size_t)C);
    } else {
        define_conv(z, y, tensor(m, "proj.weight", 0, 0), tensor(m, "proj.bias", 0, 0), rows);
        define_conv(logits, z, tensor(m, "head.weight", 0, 0), tensor(m, "head.bias", 0, 0), head);
    }
    FREE_ALL(x, y, z);
}

// LayerNorm of one channel is its bias, whatever comes in: before the last one nothing counts.
static bool is_dead(const Model *m, const char *name) {
    return m->config.channels == 1 && strcmp(name, "norm_out.bias") != 0 &&
           strncmp(name, "proj.", 5) != 0 && strncmp(name, "head.", 5) != 0 &&
           !(m->config.tie && strcmp(name, "embedding.weight") == 0);
}

static void test_model(int number) {
    char what[200], name[240];
    const Case *c = &cases[number / 2];
    name_of(what, sizeof what, number);
    snprintf(name, sizeof name, "%s, %s", be->name, what);
    Model m;
    open_case(&m, number);
    size_t n_logits = (size_t)m.B * m.T * V;
    real *logits = new_reals(n_logits);
    const Pass last = {(uint64_t)((c->passes - 1) * c->B)};
    model_train_step(&m);  // at a learning rate of 0
    double step_loss = (double)m.state->ring[5].loss;
    m.state->step--;
    const real *grads = step_gradients(&m);
    real *first_time = new_reals(m.n_params);
    memcpy(first_time, grads, m.n_params * sizeof *grads);
    check(same_bits(step_gradients(&m), first_time, m.n_params),
          "%s: the same step again, the same gradients", name);
    free(first_time);

    draw(&m, last.first);
    model_forward(&m, &last);
    define_model(&m, last.first, logits);
    check_error(relative_error(m.logits, logits, n_logits), EXACT_BOUND, "%s: logits", name);
    check_error(fabs(step_loss - model_loss(&m)) / model_loss(&m), 1e-6,
                "%s: loss that the step noted (in float)", name);
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        check_gradient(name, t->name, m.params + t->offset, t->size, grads + t->offset,
                       is_dead(&m, t->name), model_loss, &m);
    }
    free(logits);
    model_free(&m);
}

// ---- float32 against double --------------------------------------------------------------------

// What the two builds exchange for a case, as doubles: the losses (N), then the gradients.
static size_t results(Model *m, double *out) {
    size_t N = (size_t)m->B * m->T;
    if (!out) return N + m->n_params;
    const real *grads = step_gradients(m);
    for (size_t i = 0; i < N; i++) out[i] = (double)m->losses[i];
    for (size_t i = 0; i < m->n_params; i++) out[N + i] = (double)grads[i];
    return N + m->n_params;
}

static int write_gradients(void) {
    be = &cpu_backend;
    for (int i = 0; i < 2 * CASES; i++) {
        if (!there_is(i)) continue;
        Model m;
        open_case(&m, i);
        size_t n = results(&m, NULL);
        double *out = malloc(n * sizeof *out);
        need(out != NULL, "out of memory");
        results(&m, out);
        if (fwrite(out, sizeof *out, n, stdout) != n) return 1;
        free(out);
        model_free(&m);
    }
    return fflush(stdout) == 0 ? 0 : 1;
}

static double difference(const double *a, const double *b, size_t n) {
    double diff = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(fabs(a[i] - b[i]) <= diff)) diff = fabs(a[i] - b[i]);
        if (diff - diff != 0) return NAN;
        size = fmax(size, fabs(b[i]));
    }
    return diff / size;
}

static void compare_with_float(FILE *pipe, int number) {
    char name[200];
    name_of(name, sizeof name, number);
    Model m;
    open_case(&m, number);
    size_t n = results(&m, NULL), N = (size_t)m.B * m.T;
    double *here = malloc(2 * n * sizeof *here), *there = here + n;
    need(here != NULL, "out of memory");
    results(&m, here);
    size_t got = fread(there, sizeof *there, n, pipe);
    check(got == n, "float32, %s: %zu of %zu numbers came", name, got, n);
    if (got == n)
        check_error(difference(there, here, N), FLOAT_BOUND, "float32, %s: losses", name);
    for (int i = 0; got == n && i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        const double *g = there + N + t->offset;
        double most = 0;
        for (size_t j = 0; j < t->size; j++) most = fmax(most, fabs(g[j]));
        if (is_dead(&m, t->name))
            check_error(most, FLOAT_BOUND, "float32, %s: d %s is zero", name, t->name);
        else
            check_error(difference(g, here + N + t->offset, t->size), FLOAT_BOUND,
                        "float32, %s: d %s", name, t->name);
    }
    free(here);
    model_free(&m);
}

static void test_float(const char *program) {
    char command[4096];
    snprintf(command, sizeof command, "'%s_f32' --gradients", program);
    fflush(stdout);
    FILE *pipe = popen(command, "r");
    need(pipe != NULL, command);
    for (int i = 0; i < 2 * CASES; i++)
        if (there_is(i)) compare_with_float(pipe, i);
    check(pclose(pipe) == 0, "%s exits with 0", command);
}

static void test_operations(void) {
    test_convs();
    test_norm(1, 1, 1);
    test_norm(3, 33, 1);
    test_norm(3, 33, 0.01);
    test_norm(130, 5, 1);
    for (int f = 0; f < N_ACTIVATIONS; f++) {
        test_norm_through(3, 33, (Activation)f, 0);
        test_norm_through(130, 5, (Activation)f, 0.25f);
        test_norm_through(5, 1, (Activation)f, 0.25f);
    }
    test_embed(40, 5);
    test_embed(3, 33);
    test_embed(7, 1);
    test_cross_entropy(0, 3);
    test_cross_entropy(2, 3);
    test_cross_entropy(30, 90);
    test_cross_entropy(0, 900);
    test_add_losses();
    test_optimizer();
}

int main(int argc, char **argv) {
    set_threads(1);  // a hundred thousand tiny calls; that threads change nothing: test_model
    if (argc == 2 && strcmp(argv[1], "--gradients") == 0) return write_gradients();
    if (argc != 1 || sizeof(real) != sizeof(double)) {
        fprintf(stderr, "usage: test_gradcheck (built with -DREAL=double), or --gradients\n");
        return 2;
    }
    const Backend *const both[] = {&plain_backend, &cpu_backend};
    for (int b = 0; b < 2; b++) {
        be = both[b];
        test_operations();
        // `plain` takes most of a minute for the two large ones.
        for (int i = 0; i < 2 * CASES; i++)
            if (there_is(i) && (b == 1 || cases[i / 2].config.channels <= 8)) test_model(i);
    }
    test_float(argv[0]);
    return finish();
}
