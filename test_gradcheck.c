// test_gradcheck.c: is every forward what its formula says, and every backward its derivative?
//
// The same model.c compiled in double. Each layer alone, then the whole model in both block forms
// with every option:
//   forward   against its definition, written a second time here, slow and plain;
//   backward  against central differences along random directions u of one tensor p:
//               slope(h) = (loss(p + h u) - loss(p - h u)) / 2h  =  sum(gradient * u) + O(h^2),
//             of which (4 slope(h) - slope(2h)) / 3 leaves an O(h^4): h need not be so small that
//             the difference drowns in rounding.
// Last, float32 against double: test_gradcheck_f32, this file and model.c in float32, must stand
// beside the program; it is asked for its gradients of the same models.
//   ./test_gradcheck
#define _POSIX_C_SOURCE 200809L  // popen
#include "test.h"

enum { DIRECTIONS = 3, WIDEST = 256 };
#define STEP 3e-4            // h, relative to the largest value of the tensor
#define GRADIENT_BOUND 1e-7  // relative to the tensor's own gradient
#define EXACT_BOUND 1e-12    // double against double, in another order of summation
#define FLOAT_BOUND 2e-5     // float32 against double, worst value of a tensor to its largest

static const Backend *const cpu = &cpu_backend;
static StepState state = {.step = 5};

// ---- Central differences -----------------------------------------------------------------------

typedef double (*Loss)(void *arg);

// The slope of loss(arg) where value = saved, along the directions of a stream, 2h wide.
static double central_difference(real *value, const real *saved, size_t n, double h,
                                 uint64_t stream, Loss loss, void *arg) {
    double side[2];
    for (int s = 0; s < 2; s++) {
        for (size_t i = 0; i < n; i++)
            value[i] = saved[i] + (real)((s ? h : -h) * random_value(stream, i));
        side[s] = loss(arg);
    }
    return (side[1] - side[0]) / (2 * h);
}

// How far grad[n] is from the derivative of loss(arg) by value[n], relative to that derivative's
// size (its root mean square over the directions), so that an all-zero gradient is 100 % wrong.
static double gradient_error(real *value, size_t n, const real *grad, Loss loss, void *arg) {
    real *saved = new_reals(n);
    memcpy(saved, value, n * sizeof *saved);
    double h = 0, worst = 0, squares = 0;
    for (size_t i = 0; i < n; i++)  // around DROPPED nothing changes, however wide the step
        if (value[i] != (real)DROPPED) h = fmax(h, STEP * fabs((double)value[i]));
    for (int d = 0; d < DIRECTIONS; d++) {
        uint64_t stream = 900 + (uint64_t)d;
        double expected = 0;
        for (size_t i = 0; i < n; i++) expected += (double)grad[i] * random_value(stream, i);
        double near = central_difference(value, saved, n, h, stream, loss, arg);
        double far = central_difference(value, saved, n, 2 * h, stream, loss, arg);
        double slope = (4 * near - far) / 3, diff = fabs(slope - expected);
        if (!(diff <= worst)) worst = diff;
        squares += slope * slope;
    }
    memcpy(value, saved, n * sizeof *saved);
    free(saved);
    return worst / sqrt(squares / DIRECTIONS);
}

static double largest(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i]) <= most)) most = fabs((double)x[i]);
    return most;
}

// `dead`: nothing that this tensor says can reach the loss. Its gradient is 0 but for rounding.
static void check_gradient(const char *where, const char *tensor, real *value, size_t n,
                           const real *grad, bool dead, Loss loss, void *arg) {
    if (dead)
        check_error(largest(grad, n), EXACT_BOUND, "%s: d %s is zero", where, tensor);
    else
        check_error(gradient_error(value, n, grad, loss, arg), GRADIENT_BOUND, "%s: d %s", where,
                    tensor);
}

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
    size_t bytes = cpu->work_bytes(N, K, width, n);
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

// Which of (N,O) pre-activations dropout takes.
static void define_dropout(real *pre, Dropout d, size_t N, int O) {
    for (size_t n = 0; n < N; n++)
        for (int o = 0; o < O; o++) {
            Philox r = dropout_draw(d.seed, d.purpose, d.state->step, d.first + n, o, O);
            if (is_dropped(r, d.threshold, d.first + n, o)) pre[n * (size_t)O + o] = DROPPED;
        }
}

// scale * gelu(pre), nothing where pre is DROPPED. out may be pre.
static void define_act(real *out, const real *pre, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double x = (double)pre[i], tanh_u = tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x));
        out[i] = pre[i] == (real)DROPPED ? 0 : (real)(x / 2 * (1 + tanh_u) * (double)scale);
    }
}

// forward:  out = scale * gelu(pre);  gelu(x) = x/2 (1 + t), t = tanh(u), dt/dx = (1-t^2) du/dx
static void define_act_backward(real *dpre, const real *dout, const real *pre, float scale,
                                size_t n) {
    for (size_t i = 0; i < n; i++) {
        double x = (double)pre[i], a = sqrt(2 / acos(-1)), t = tanh(a * (x + 0.044715 * x * x * x));
        double slope = (1 + t) / 2 + x / 2 * (1 - t * t) * a * (1 + 3 * 0.044715 * x * x);
        dpre[i] = pre[i] == (real)DROPPED ? 0 : (real)((double)dout[i] * slope * (double)scale);
    }
}

// As relative_error, of what a conv stores: DROPPED must stand in the same places, and beside its
// size no other value would count.
static double stored_error(const real *a, const real *b, size_t n) {
    real *x = new_reals(n), *y = new_reals(n);
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        same = same && (a[i] == (real)DROPPED) == (b[i] == (real)DROPPED);
        x[i] = a[i] == (real)DROPPED ? 0 : a[i];
        y[i] = b[i] == (real)DROPPED ? 0 : b[i];
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

// ---- The conv, its activation and their backward -----------------------------------------------

typedef struct {
    ConvShape s;
    bool act, residual, bias;
    Dropout drop;
    real *x, *w, *b, *res, *pre, *out;
    real *r;  // loss = sum(r * output), so r is the output's gradient
    // test_conv_through only: x = scale * gelu(below), and loss += sum(q * x)
    real *below, *q;
    float scale;
    void *work;
} ConvTest;

static Dropout test_dropout(float p, uint32_t layer) {
    uint32_t threshold = (uint32_t)(p * 256);
    // The first row lies beyond 2^32 draws and is no multiple of the 16 that share theirs.
    return (Dropout){.threshold = threshold, .scale = 256.0f / (float)(256 - threshold),
                     .seed = 77, .purpose = RNG_DROPOUT + layer, .first = ((uint64_t)1 << 36) + 7,
                     .state = &state};
}

static double conv_loss(void *arg) {
    ConvTest *c = arg;
    cpu->conv_forward(c->act ? c->out : NULL, c->pre, c->x, c->w, c->bias ? c->b : NULL,
                      c->residual ? c->res : NULL, c->drop, c->s, c->work);
    return dot(c->act ? c->out : c->pre, c->r, (size_t)c->s.B * c->s.T * c->s.O);
}

static void test_conv_forward(ConvTest *c, const char *name) {
    ConvShape s = c->s;
    size_t N = (size_t)s.B * s.T, n_out = N * s.O;
    real *pre = new_reals(n_out), *out = new_reals(n_out), *in_place = new_reals(n_out);
    define_conv(pre, c->x, c->w, c->bias ? c->b : NULL, s);
    if (c->act) define_dropout(pre, c->drop, N, s.O);
    conv_loss(c);
    check_error(stored_error(c->pre, pre, n_out), EXACT_BOUND, "%s: pre", name);
    if (c->act) {
        define_act(out, pre, c->drop.scale, n_out);
        for (size_t i = 0; i < n_out; i++) out[i] += c->residual ? c->res[i] : 0;
        check_error(relative_error(c->out, out, n_out), EXACT_BOUND, "%s: out", name);
    }
    if (c->act && c->residual) {
        memcpy(in_place, c->res, n_out * sizeof *in_place);
        cpu->conv_forward(in_place, c->pre, c->x, c->w, c->bias ? c->b : NULL, in_place, c->drop, s,
                          c->work);
        check(same_bits(in_place, c->out, n_out), "%s: out may be res", name);
    }
    FREE_ALL(pre, out, in_place);
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
    if (c->act) define_act_backward(dpre, c->r, c->pre, c->drop.scale, n_out);
    cpu->conv_backward_input(dx, NULL, NULL, dpre, c->w, 1, s, false, c->work);
    cpu->conv_backward_input(dx_sum, NULL, NULL, dpre, c->w, 1, s, true, c->work);
    const WeightJob job = {dw, c->bias ? db : NULL, c->x, dpre, s.dil};
    cpu->conv_backward_weight(&job, 1, s, c->work);
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
    define_act(c->x, c->below, c->scale, n_x);
    return conv_loss(c) + (c->q ? dot(c->q, c->x, n_x) : 0);
}

static void test_conv_through(ConvTest plain, const char *name) {
    ConvTest *c = &plain;
    ConvShape s = c->s;
    size_t N = (size_t)s.B * s.T, n_x = N * s.C;
    real *x = new_reals(n_x), *below = new_random(n_x, 11, 0, 2), *q = new_random(n_x, 12, 0, 1);
    real *pre = new_reals(n_x), *pre2 = new_reals(n_x), *dx = new_reals(n_x), *dx2 = new_reals(n_x);
    real *a = new_reals(n_x), *a2 = new_reals(n_x), *sum = new_random(n_x, 12, 0, 1);
    define_dropout(below, c->drop, N, s.C);
    c->scale = c->drop.scale;
    c->act = c->residual = false;
    c->drop = (Dropout){0};
    c->x = x;
    c->below = below;
    through_loss(c);
    // dx alone; pre and a alone; all three
    cpu->conv_backward_input(dx, NULL, NULL, c->r, c->w, c->scale, s, false, c->work);
    memcpy(pre, below, n_x * sizeof *pre);
    cpu->conv_backward_input(NULL, pre, a, c->r, c->w, c->scale, s, false, c->work);
    memcpy(pre2, below, n_x * sizeof *pre2);
    cpu->conv_backward_input(dx2, pre2, a2, c->r, c->w, c->scale, s, false, c->work);
    check_error(relative_error(a, x, n_x), EXACT_BOUND, "%s: a, made again in backward", name);
    check(same_bits(dx2, dx, n_x) && same_bits(pre2, pre, n_x) && same_bits(a2, a, n_x),
          "%s: dx and pre, the same bits together", name);
    check_gradient(name, "pre below", below, n_x, pre, false, through_loss, c);
    // added to q, the gradient that comes down beside this layer
    c->q = q;
    memcpy(pre, below, n_x * sizeof *pre);
    cpu->conv_backward_input(sum, pre, NULL, c->r, c->w, c->scale, s, true, c->work);
    for (size_t i = 0; i < n_x; i++) dx[i] += q[i];
    check_error(relative_error(sum, dx, n_x), EXACT_BOUND, "%s: dx accumulated, with pre", name);
    check_gradient(name, "pre below, accumulated", below, n_x, pre, false, through_loss, c);
    FREE_ALL(x, below, q, pre, pre2, dx, dx2, a, a2, sum);
}

static void test_conv(ConvShape s, bool active, bool residual, bool bias, float p) {
    char name[128];
    snprintf(name, sizeof name, "conv B=%d T=%d C=%d O=%d K=%d dil=%d%s%s%s%s", s.B, s.T, s.C, s.O,
             s.K, s.dil, bias ? " +b" : "", active ? " gelu" : "", p > 0 ? " dropout" : "",
             residual ? " +res" : "");
    size_t n_x = (size_t)s.B * s.T * s.C, n_out = (size_t)s.B * s.T * s.O;
    double spread = sqrt(3 / ((double)s.K * s.C));
    ConvTest c = {.s = s, .act = active, .residual = residual, .bias = bias};
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
    if (active) test_conv_through(c, name);
    FREE_ALL(c.x, c.w, c.b, c.res, c.r, c.pre, c.out);
    free(c.work);
}

static void test_convs(void) {
    const ConvShape plain = {2, 9, 8, 6, 3, 2};
    test_conv(plain, false, false, false, 0);
    test_conv(plain, false, false, true, 0);
    test_conv(plain, true, false, true, 0);
    test_conv(plain, true, true, true, 0);
    test_conv(plain, true, true, true, 0.3f);
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
    for (size_t i = 0; i < sizeof ugly / sizeof *ugly; i++)
        test_conv(ugly[i], true, true, true, i == 5 ? 0 : 0.25f);
}

// ---- LayerNorm ---------------------------------------------------------------------------------

typedef struct {
    size_t N;
    int C;
    real *x, *gain, *bias, *out, *r;
    // embedding only: x is its output, `table` what is looked up
    real *table;
    int *ids;
    // test_norm_through only: x = scale * gelu(below), and loss += sum(q * x)
    real *below, *q;
    float scale;
    void *work;
} NormTest;

static double norm_loss(void *arg) {
    NormTest *t = arg;
    cpu->norm_forward(t->out, t->x, t->gain, t->bias, t->N, t->C);
    return dot(t->out, t->r, t->N * (size_t)t->C);
}

// spread 0.01 puts the variance near NORM_EPS: where that stands then matters.
static void test_norm(size_t N, int C, double spread) {
    size_t n = N * (size_t)C, width = (size_t)C;
    char name[64];
    snprintf(name, sizeof name, "norm N=%zu C=%d spread=%g", N, C, spread);
    NormTest t = {.N = N, .C = C, .x = new_random(n, 1, spread / 2, spread),
                  .r = new_random(n, 2, 0, 1),
                  .gain = new_random(width, 3, 1, 0.5), .bias = new_random(width, 4, 0, 0.5),
                  .out = new_reals(n), .work = new_work(N, 1, WIDEST, 1)};
    real *defined = new_reals(n), *dx = new_reals(n), *sum = new_random(n, 5, 0, 1);
    real *before = new_random(n, 5, 0, 1), *in_place = new_reals(n);
    real *dgain = new_random(width, 6, 0, 1), *dgain_before = new_random(width, 6, 0, 1);
    real *dbias = new_random(width, 7, 0, 1), *dbias_before = new_random(width, 7, 0, 1);
    real *rest = new_random(2 * width, 8, 0, 1);

    define_norm(defined, t.x, t.gain, t.bias, N, C);
    norm_loss(&t);
    check_error(relative_error(t.out, defined, n), EXACT_BOUND, "%s: out", name);

    memcpy(in_place, t.x, n * sizeof *in_place);
    cpu->norm_backward(dx, dgain, dbias, NULL, NULL, t.r, t.x, t.gain, t.bias, 1, N, C, false,
                       t.work);
    cpu->norm_backward(sum, rest, rest + C, NULL, NULL, t.r, t.x, t.gain, t.bias, 1, N, C, true,
                       t.work);
    cpu->norm_backward(in_place, rest, rest + C, NULL, NULL, t.r, in_place, t.gain, t.bias, 1, N, C,
                       false, t.work);
    check(same_bits(in_place, dx, n), "%s: dx may be x", name);
    subtract(dgain, dgain_before, width);
    subtract(dbias, dbias_before, width);
    bool dead = C == 1;  // one channel is its own mean: only the bias comes through
    for (size_t i = 0; i < n; i++) before[i] += dx[i];
    check_error(relative_error(sum, before, n), EXACT_BOUND, "%s: dx accumulated", name);
    check_gradient(name, "x", t.x, n, dx, dead, norm_loss, &t);
    check_gradient(name, "gain", t.gain, width, dgain, dead, norm_loss, &t);
    check_gradient(name, "bias", t.bias, width, dbias, false, norm_loss, &t);
    FREE_ALL(t.x, t.r, t.gain, t.bias, t.out, defined, dx, sum, before, in_place, dgain,
             dgain_before, dbias, dbias_before, rest);
    free(t.work);
}

static double norm_through_loss(void *arg) {
    NormTest *t = arg;
    size_t n = t->N * (size_t)t->C;
    define_act(t->x, t->below, t->scale, n);
    return norm_loss(t) + (t->q ? dot(t->q, t->x, n) : 0);
}

// What norm_backward does beside dx: forward's output again, and on through the activation below.
static void test_norm_through(size_t N, int C, float p) {
    size_t n = N * (size_t)C, width = (size_t)C;
    char name[64];
    snprintf(name, sizeof name, "norm N=%zu C=%d below%s", N, C, p > 0 ? ", dropout" : "");
    Dropout drop = test_dropout(p, 3);
    NormTest t = {.N = N, .C = C, .x = new_reals(n), .r = new_random(n, 2, 0, 1),
                  .gain = new_random(width, 3, 1, 0.5), .bias = new_random(width, 4, 0, 0.5),
                  .below = new_random(n, 5, 0, 2), .scale = drop.scale, .out = new_reals(n),
                  .work = new_work(N, 1, WIDEST, 1)};
    real *dx = new_reals(n), *x = new_reals(n), *pre = new_reals(n), *again = new_reals(n);
    real *q = new_random(n, 6, 0, 1), *sum = new_random(n, 6, 0, 1);
    real *plain = new_random(n, 6, 0, 1);
    real *rest = new_random(2 * width, 8, 0, 1), *rest2 = new_random(2 * width, 8, 0, 1);
    define_dropout(t.below, drop, N, C);
    norm_through_loss(&t);

    memcpy(pre, t.below, n * sizeof *pre);
    cpu->norm_backward(dx, rest, rest + C, again, pre, t.r, t.x, t.gain, t.bias, t.scale, N, C,
                       false, t.work);
    check(same_bits(again, t.out, n), "%s: again is forward's output", name);
    check_gradient(name, "pre below", t.below, n, pre, C == 1, norm_through_loss, &t);
    norm_through_loss(&t);  // the difference moved x
    memcpy(x, t.x, n * sizeof *x);
    memcpy(pre, t.below, n * sizeof *pre);
    cpu->norm_backward(plain, rest2, rest2 + C, NULL, NULL, t.r, t.x, t.gain, t.bias, 1, N, C, true,
                       t.work);
    fill(rest, 2 * width, 8, 0, 1);
    cpu->norm_backward(sum, rest, rest + C, x, pre, t.r, x, t.gain, t.bias, t.scale, N, C, true,
                       t.work);
    check(same_bits(x, t.out, n), "%s: again may be x", name);
    check(same_bits(sum, plain, n) && same_bits(rest, rest2, 2 * width),
          "%s: dx and the parameters' gradients do not depend on again and pre", name);
    t.q = q;
    check_gradient(name, "pre below, accumulated", t.below, n, pre, false, norm_through_loss, &t);
    FREE_ALL(t.x, t.r, t.gain, t.bias, t.below, t.out, dx, x, pre, again, q, sum, plain, rest,
             rest2);
    free(t.work);
}

// ---- Embedding ---------------------------------------------------------------------------------

static double embed_loss(void *arg) {
    NormTest *t = arg;
    cpu->embed_forward(t->x, t->ids, t->table, t->gain, t->bias, t->N, t->C, t->work);
    return dot(t->x, t->r, t->N * (size_t)t->C);
}

static void test_embed(size_t N, int C) {
    size_t n = N * (size_t)C, width = (size_t)C, size = V * width;
    char name[64];
    snprintf(name, sizeof name, "embed N=%zu C=%d", N, C);
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
    cpu->embed_backward(dtable, dgain, dbias, t.r, t.ids, t.table, t.gain, N, C, t.work);
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
    cpu->cross_entropy(t->losses, t->logits, loss_targets, t->cap, 0, LOSS_ROWS);
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
    snprintf(name, sizeof name, "cross_entropy cap=%g logits=%g", (double)cap, spread);
    LossTest t = {cap, new_random(n, 1, 0, spread), new_reals(LOSS_ROWS)};
    real *dlogits = new_random(n, 1, 0, spread), defined[LOSS_ROWS];
    cpu->cross_entropy(t.losses, dlogits, loss_targets, cap, 0, LOSS_ROWS);
    check(same_bits(dlogits, t.logits, n), "%s: scale 0 leaves the logits alone", name);
    for (int i = 0; i < LOSS_ROWS; i++) {
        int target = loss_targets[i];
        defined[i] = target < 0 ? 0 : (real)define_loss(t.logits + i * V, target, (double)cap);
    }
    check_error(relative_error(t.losses, defined, LOSS_ROWS), EXACT_BOUND, "%s: losses", name);
    cpu->cross_entropy(t.losses, dlogits, loss_targets, cap, LOSS_SCALE, LOSS_ROWS);
    check_error(relative_error(t.losses, defined, LOSS_ROWS), EXACT_BOUND,
                "%s: losses beside gradients", name);
    for (int i = 0; i < LOSS_ROWS; i++)
        if (loss_targets[i] < 0)
            check(largest(dlogits + i * V, V) == 0 && t.losses[i] == 0, "%s: row %d is not scored",
                  name, i);
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
    cpu->add_losses(&s, losses, N, work);
    check_error(fabs(s.loss_sum - sum) / sum, EXACT_BOUND, "add_losses: adds to what is there");
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

static void test_adamw(const char *name, Hyper h) {
    Adam a = new_adam(), defined = new_adam();
    void *work = new_work(1, 1, WIDEST, ADAM_N);
    StepState s = {0};
    double worst_figure = 0, left = 0;
    for (int step = 0; step < ADAM_STEPS; step++) {
        fill(a.g, ADAM_N, 50 + (uint64_t)step, 0, 0.02);  // norm about 1.1
        memcpy(defined.g, a.g, ADAM_N * sizeof *a.g);
        s.loss_sum = 12 + step;
        cpu->optimize(a.p, a.g, a.m, a.v, h.ema > 0 ? a.ema : NULL, ADAM_N, ADAM_DECAYED, &s, 0.25,
                      h, work);
        double lr = define_adamw(defined, &h, step), norm = sqrt(dot(defined.g, defined.g, ADAM_N));
        left += dot(a.g, a.g, ADAM_N);
        StepFigures f = s.ring[step];
        double wrong = fabs((double)f.loss - (12 + step) * 0.25) +
                       fabs((double)f.grad_norm - norm) + fabs((double)f.lr - lr) / h.lr;
        if (!(wrong <= worst_figure)) worst_figure = wrong;
    }
    check(s.step == ADAM_STEPS && s.loss_sum == 0, "adamw %s: counts its steps", name);
    check(left == 0, "adamw %s: leaves the gradients zero", name);
    check_error(worst_figure, 1e-6, "adamw %s: loss, norm and rate noted (in float)", name);
    check_error(relative_error(a.m, defined.m, ADAM_N), EXACT_BOUND, "adamw %s: m", name);
    check_error(relative_error(a.v, defined.v, ADAM_N), EXACT_BOUND, "adamw %s: v", name);
    check_error(relative_error(a.p, defined.p, ADAM_N), EXACT_BOUND, "adamw %s: p", name);
    if (h.ema > 0)
        check_error(relative_error(a.ema, defined.ema, ADAM_N), EXACT_BOUND, "adamw %s: ema", name);
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
    cpu->optimize(a.p, a.g, a.m, a.v, a.ema, ADAM_N, ADAM_DECAYED, &s, 1, h, work);
    check(s.step == 3 && same_bits(a.p, before.p, ADAM_N) && same_bits(a.m, before.m, ADAM_N) &&
              same_bits(a.v, before.v, ADAM_N) && same_bits(a.ema, before.ema, ADAM_N) &&
              same_bits(a.g, before.g, ADAM_N),
          "adamw: loss %g and a gradient of %g change nothing", loss, gradient);
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
    Config config;
    float dropout, byte_dropout;
    int B, T, passes;
} Case;

#define SMALL .channels = 8, .latent = 6, .taps = 3, .blocks = 2, .n_dilations = 2
#define SQUARE .channels = 8, .latent = 8, .taps = 3, .blocks = 2, .n_dilations = 2

static const Case cases[] = {
    {"plain", {SMALL, .dilations = {1, 2}}, 0, 0, 2, 9, 1},
    {"softcap", {SMALL, .dilations = {1, 2}, .softcap = 2}, 0, 0, 2, 9, 1},
    {"tied", {SQUARE, .dilations = {1, 2}, .tie = true}, 0, 0, 2, 9, 1},
    {"dropout", {SMALL, .dilations = {1, 2}}, 0.3f, 0, 2, 9, 1},
    {"byte dropout", {SMALL, .dilations = {1, 2}}, 0, 0.25f, 2, 9, 1},
    {"3 passes", {SMALL, .dilations = {1, 2}}, 0, 0, 2, 9, 3},
    {"everything", {SQUARE, .dilations = {2, 1}, .tie = true, .softcap = 3}, 0.2f, 0.2f, 2, 9, 3},
    {"T=1", {SMALL, .dilations = {1, 2}}, 0, 0, 3, 1, 1},
    {"T<dil", {SMALL, .dilations = {1, 6}}, 0, 0, 3, 5, 1},
    {"dil>T, T=2", {SMALL, .dilations = {3, 70}}, 0.2f, 0.2f, 3, 2, 2},
    {"one conv", {.channels = 8, .latent = 12, .taps = 2, .blocks = 1, .n_dilations = 1,
                  .dilations = {3}}, 0.2f, 0, 2, 9, 1},
    // more convs to a unit than arrays in which what they read can wait
    {"6 dilations", {.channels = 8, .latent = 6, .taps = 2, .blocks = 2, .n_dilations = 6,
                     .dilations = {1, 2, 3, 1, 2, 1}}, 0.1f, 0, 2, 9, 1},
    {"K=1", {.channels = 8, .latent = 6, .taps = 1, .blocks = 2, .n_dilations = 2,
             .dilations = {1, 2}}, 0, 0, 2, 9, 1},
    {"C=1", {.channels = 1, .latent = 3, .taps = 3, .blocks = 2, .n_dilations = 2,
             .dilations = {1, 2}}, 0, 0, 3, 9, 1},
    {"C=1 tied", {.channels = 1, .latent = 1, .taps = 3, .blocks = 1, .n_dilations = 1,
                  .dilations = {1}, .tie = true}, 0, 0, 3, 9, 1},
    {"C=33 D=40", {.channels = 33, .latent = 40, .taps = 3, .blocks = 2, .n_dilations = 3,
                   .dilations = {1, 2, 4}, .softcap = 9}, 0.1f, 0.1f, 3, 50, 2},
    {"C=33 tied", {.channels = 33, .latent = 33, .taps = 4, .blocks = 1, .n_dilations = 2,
                   .dilations = {3, 5}, .tie = true}, 0.1f, 0, 3, 70, 1},
};
enum { CASES = sizeof cases / sizeof *cases };
static const BlockForm forms[] = {BLOCK_PAPER, BLOCK_PRENORM};

// A model of the case with a corpus of two texts. lr 0: a training step leaves the parameters
// alone, and its gradients behind.
static void open_case(Model *m, const Case *c, BlockForm form) {
    enum { BYTES = 400 };
    Config config = c->config;
    config.form = form;
    Training training = {.dropout = c->dropout, .byte_dropout = c->byte_dropout, .seed = 4,
                         .passes = c->passes,
                         .hyper = {.steps = 10, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8}};
    open_or_die(m, cpu, &config, c->B, c->T, &training);
    fill_params(m, 403);
    uint8_t text[BYTES];
    for (int i = 0; i < BYTES; i++) text[i] = (uint8_t)(random_value(60, (size_t)i) * 128 + 128);
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
    cpu->draw_batch(m->ids, m->targets, m->corpus, m->state, m->training.seed, threshold, first,
                    m->B, m->T);
}

// The loss that model_train_step differentiates.
static double model_loss(void *arg) {
    Model *m = arg;
    size_t N = (size_t)m->B * m->T;
    double sum = 0;
    for (int p = 0; p < m->training.passes; p++) {
        uint64_t first = (uint64_t)p * (uint64_t)m->B;
        draw(m, first);
        model_forward(m, true, first);
        cpu->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
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

static const real *tensor(const Model *m, const char *format, int block, int conv) {
    char name[56];
    snprintf(name, sizeof name, format, block, conv);
    for (int i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0) return m->params + m->tensors[i].offset;
    need(false, name);
    return NULL;
}

// The graph, a second time: logits (N,V) for the ids and the dropout of m, from its parameters.
static void define_model(const Model *m, uint64_t first, real *logits) {
    const Config *c = &m->config;
    int C = c->channels, D = c->latent;
    size_t N = (size_t)m->B * m->T, n = N * (size_t)C;
    float p = m->training.dropout;
    Dropout drop = {.threshold = (uint32_t)(p * 256 + 0.5f), .seed = m->training.seed,
                    .first = first * (uint64_t)m->T, .state = m->state};
    drop.scale = 256.0f / (float)(256 - drop.threshold);
    ConvShape rows = {1, m->B * m->T, C, D, 1, 1}, head = {1, m->B * m->T, D, V, 1, 1};
    real *x = new_reals(n), *y = new_reals(n), *a = new_reals(n), *z = new_reals(N * (size_t)D);
    const real *E = tensor(m, "embedding.weight", 0, 0);

    for (size_t i = 0; i < n; i++) {
        int id = m->ids[i / (size_t)C];
        y[i] = id == BYTE_DROPPED ? 0 : E[(size_t)id * (size_t)C + i % (size_t)C];
    }
    define_norm(x, y, tensor(m, "norm_in.weight", 0, 0), tensor(m, "norm_in.bias", 0, 0), N, C);
    for (int u = 0; u < c->blocks; u++) {
        memcpy(y, x, n * sizeof *y);  // y runs through the block's convs
        for (int i = 0; i < c->n_dilations; i++) {
            if (c->form == BLOCK_PRENORM)
                define_norm(y, x, tensor(m, "blocks.%d.norm.%d.weight", u, i),
                            tensor(m, "blocks.%d.norm.%d.bias", u, i), N, C);
            ConvShape s = {m->B, m->T, C, C, c->taps, c->dilations[i]};
            define_conv(a, y, tensor(m, "blocks.%d.conv.%d.weight", u, i),
                        tensor(m, "blocks.%d.conv.%d.bias", u, i), s);
            drop.purpose = RNG_DROPOUT + (uint32_t)(u * c->n_dilations + i);
            define_dropout(a, drop, N, C);
            define_act(y, a, drop.scale, n);
            bool add = c->form == BLOCK_PRENORM || i == c->n_dilations - 1;
            for (size_t j = 0; add && j < n; j++) x[j] += y[j];
        }
    }
    define_norm(y, x, tensor(m, "norm_out.weight", 0, 0), tensor(m, "norm_out.bias", 0, 0), N, C);
    if (c->tie) {
        for (size_t i = 0; i < N * V; i++)
            logits[i] = (real)dot(y + i / V * (size_t)C, E + i % V * (size_t)C, (size_t)C);
    } else {
        define_conv(z, y, tensor(m, "proj.weight", 0, 0), tensor(m, "proj.bias", 0, 0), rows);
        define_conv(logits, z, tensor(m, "head.weight", 0, 0), tensor(m, "head.bias", 0, 0), head);
    }
    FREE_ALL(x, y, a, z);
}

// LayerNorm of one channel is its bias, whatever comes in: before the last one nothing counts.
static bool is_dead(const Model *m, const char *name) {
    return m->config.channels == 1 && strcmp(name, "norm_out.bias") != 0 &&
           strncmp(name, "proj.", 5) != 0 && strncmp(name, "head.", 5) != 0 &&
           !(m->config.tie && strcmp(name, "embedding.weight") == 0);
}

static void test_model(const Case *c, BlockForm form) {
    char name[96];
    snprintf(name, sizeof name, "%s, %s", form == BLOCK_PAPER ? "paper" : "prenorm", c->name);
    Model m;
    open_case(&m, c, form);
    size_t n_logits = (size_t)m.B * m.T * V;
    real *logits = new_reals(n_logits);
    uint64_t last = (uint64_t)((c->passes - 1) * c->B);
    model_train_step(&m);  // at a learning rate of 0
    double step_loss = (double)m.state->ring[5].loss;
    m.state->step--;
    const real *grads = step_gradients(&m);
    real *first_time = new_reals(m.n_params);
    memcpy(first_time, grads, m.n_params * sizeof *grads);
    check(same_bits(step_gradients(&m), first_time, m.n_params),
          "%s: the same step again, the same gradients", name);
    free(first_time);

    draw(&m, last);
    model_forward(&m, true, last);
    define_model(&m, last, logits);
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
    for (int i = 0; i < 2 * CASES; i++) {
        Model m;
        open_case(&m, &cases[i / 2], forms[i % 2]);
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

static void compare_with_float(FILE *pipe, const Case *c, BlockForm form) {
    const char *block = form == BLOCK_PAPER ? "paper" : "prenorm";
    Model m;
    open_case(&m, c, form);
    size_t n = results(&m, NULL), N = (size_t)m.B * m.T;
    double *here = malloc(2 * n * sizeof *here), *there = here + n;
    need(here != NULL, "out of memory");
    results(&m, here);
    size_t got = fread(there, sizeof *there, n, pipe);
    check(got == n, "float32, %s, %s: %zu of %zu numbers came", block, c->name, got, n);
    if (got == n)
        check_error(difference(there, here, N), FLOAT_BOUND, "float32, %s, %s: losses", block,
                    c->name);
    for (int i = 0; got == n && i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        const double *g = there + N + t->offset;
        double most = 0;
        for (size_t j = 0; j < t->size; j++) most = fmax(most, fabs(g[j]));
        if (is_dead(&m, t->name))
            check_error(most, FLOAT_BOUND, "float32, %s, %s: d %s is zero", block, c->name,
                        t->name);
        else
            check_error(difference(g, here + N + t->offset, t->size), FLOAT_BOUND,
                        "float32, %s, %s: d %s", block, c->name, t->name);
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
    for (int i = 0; i < 2 * CASES; i++) compare_with_float(pipe, &cases[i / 2], forms[i % 2]);
    check(pclose(pipe) == 0, "%s exits with 0", command);
}

int main(int argc, char **argv) {
    set_threads(1);  // a hundred thousand tiny calls; that threads change nothing: test_model
    if (argc == 2 && strcmp(argv[1], "--gradients") == 0) return write_gradients();
    if (argc != 1 || sizeof(real) != sizeof(double)) {
        fprintf(stderr, "usage: test_gradcheck (built with -DREAL=double), or --gradients\n");
        return 2;
    }
    test_convs();
    test_norm(1, 1, 1);
    test_norm(3, 33, 1);
    test_norm(3, 33, 0.01);
    test_norm(130, 5, 1);
    test_norm_through(3, 33, 0);
    test_norm_through(130, 5, 0.25f);
    test_norm_through(5, 1, 0.25f);
    test_embed(40, 5);
    test_embed(3, 33);
    test_embed(7, 1);
    test_cross_entropy(0, 3);
    test_cross_entropy(2, 3);
    test_cross_entropy(30, 90);
    test_cross_entropy(0, 900);
    test_add_losses();
    test_optimizer();
    for (int i = 0; i < 2 * CASES; i++) test_model(&cases[i / 2], forms[i % 2]);
    test_float(argv[0]);
    return finish();
}
