// test_causality.c: does an output depend on the bytes before it, and on nothing else?
//
// Bit for bit, for every option, for blocks, for pre-norm convs and for both in one stack:
//   forward   changing byte t changes no latent, logit or loss before t, and no other row of the
//             batch; it does change t itself. NaN in a later byte's embedding reaches nothing.
//   reach     the receptive field is measured, and is the formula's on both sides of its edge.
//   backward  the gradient of one output by later inputs, by those beyond the receptive field and
//             by other rows is exactly zero; by the input at the edge it is not.
// Written over the table of operations: the same checks run for plain, cpu and every backend of a
// GPU that is found. Other mixers: tests/test_units.c.
//   ./test_causality
#include "support/arithmetic.h"
#include "support/gpu.h"
#include "tests/test.h"

enum {
    B = 3,
    ROW = 1,     // the row of the batch that is changed; the others watch
    LONG = 128,  // longer than any receptive field below
};

typedef struct {
    const char *name;
    const char *units[2];  // blocks, and the same convs as units of their own; or one stack alone
    Config config;
    float dropout, byte_dropout;
    int T;
} Case;

#define SMALL .channels = 16, .latent = 12, .activation = ACT_gelu
#define SQUARE .channels = 16, .latent = 16, .activation = ACT_gelu
// receptive field 29
#define UNITS {"2x(block:3:1:2:4)", "2x(conv:3:1 conv:3:2 conv:3:4)"}

static const Case cases[] = {
    {"plain", UNITS, {SMALL}, 0, 0, 37},
    {"tied", UNITS, {SQUARE, .tie = true}, 0, 0, 37},
    {"softcap", UNITS, {SMALL, .softcap = 5}, 0, 0, 37},
    {"dropout", UNITS, {SMALL}, 0.2f, 0, 37},
    {"byte dropout", UNITS, {SMALL}, 0, 0.2f, 37},
    {"everything", UNITS, {SQUARE, .tie = true, .softcap = 5}, 0.2f, 0.2f, 37},
    {"K=1", {"2x(block:1:1:9)", "2x(conv:1:1 conv:1:9)"},
     {.channels = 33, .latent = 5, .activation = ACT_gelu}, 0, 0, 9},
    {"K=2, unsorted", {"2x(block:2:7:1:3)", "2x(conv:2:7 conv:2:1 conv:2:3)"},
     {.channels = 33, .latent = 33, .activation = ACT_gelu}, 0, 0, 31},
    {"dil>T", {"block:3:2:40", "conv:3:2 conv:3:40"}, {SQUARE}, 0, 0, 20},
    {"T=1", UNITS, {SMALL}, 0, 0, 1},
    {"the paper's", {"3x(block:3:1:2:4)", "3x(conv:3:1 conv:3:2 conv:3:4)"},
     {.channels = 256, .latent = 256, .activation = ACT_gelu}, 0, 0, 45},
    // Squares of squares soon leave what bf16 can tell apart: two convs to the block.
    {"lrelu2", {"block:3:1:2", "2x(conv:3:1 conv:3:2 conv:3:4)"},
     {.channels = 16, .latent = 12, .activation = ACT_lrelu2}, 0.2f, 0, 37},
    {"no activation", UNITS, {.channels = 16, .latent = 12}, 0.2f, 0, 37},
    {"mixed", {"conv:3:5:lrelu2 block:2:1:4 conv:4:3:none block:3:2:1:lrelu2"},
     {SQUARE, .tie = true}, 0.2f, 0.2f, 37},
};
enum { CASES = sizeof cases / sizeof *cases };

// What a forward pass leaves behind, on the host.
typedef struct {
    real *latents, *logits, *losses;  // (N,D), (N,V), (N)
} Outputs;

// A model and the bytes it reads.
typedef struct {
    Model m;
    char name[160];
    int T, D, N;
    int64_t reach;  // the formula's receptive field
    int *ids, *targets;
    Outputs base, now;
} Run;

static Outputs new_outputs(const Run *r) {
    size_t N = (size_t)r->N;
    return (Outputs){new_reals(N * (size_t)r->D), new_reals(N * V), new_reals(N)};
}

// Position n of the batch reads byte 83*n + 5 mod 256: all different while N <= 256.
static int byte_at(int n) { return (83 * n + 5) % V; }

static void open_run(Run *r, const Backend *be, const Case *c, const char *units) {
    Config config = c->config;
    snprintf(config.units, sizeof config.units, "%s", units);
    const Training training = {.dropout = c->dropout, .byte_dropout = c->byte_dropout, .seed = 9,
                               .passes = 1, .hyper = {.steps = 1}};
    *r = (Run){.T = c->T, .D = config.latent, .N = B * c->T};
    r->reach = config_receptive_field(&config);
    snprintf(r->name, sizeof r->name, "%s, %s, %s", be->name, c->name, units);
    open_or_die(&r->m, be, &config, B, c->T, &training);
    fill_params(&r->m, 100);
    r->ids = malloc((size_t)r->N * sizeof *r->ids);
    r->targets = malloc((size_t)r->N * sizeof *r->targets);
    need(r->ids && r->targets, "out of memory");
    for (int n = 0; n < r->N; n++) {
        bool dropped = byte_dropped(9, 0, (uint32_t)(c->byte_dropout * 65536), (uint64_t)n);
        r->ids[n] = dropped ? BYTE_DROPPED : byte_at(n);
        r->targets[n] = byte_at(n + 1);
    }
    r->base = new_outputs(r);
    r->now = new_outputs(r);
}

static void close_run(Run *r) {
    real *all[] = {r->base.latents, r->base.logits, r->base.losses,
                   r->now.latents, r->now.logits, r->now.losses};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(r->ids);
    free(r->targets);
    model_free(&r->m);
}

// The training forward, so that dropout takes part, and the losses.
static void forward(Run *r, Outputs *out) {
    Model *m = &r->m;
    const Backend *be = m->backend;
    const Pass pass = {0};
    size_t N = (size_t)r->N;
    be->upload(m->ids, r->ids, N * sizeof *r->ids);
    be->upload(m->targets, r->targets, N * sizeof *r->targets);
    model_forward(m, &pass);
    be->read_acts(out->latents, model_latents(m), N * (size_t)r->D);
    be->read_acts(out->logits, m->logits, N * V);
    be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
    be->download(out->losses, m->losses, N * sizeof(real));
}

// Whether position n puts out what it did in the base run.
static bool unchanged(const Run *r, int n) {
    size_t D = (size_t)r->D, at = (size_t)n;
    return same_bits(r->now.latents + at * D, r->base.latents + at * D, D) &&
           same_bits(r->now.logits + at * V, r->base.logits + at * V, V) &&
           same_bits(&r->now.losses[n], &r->base.losses[n], 1);
}

// How far back the output at time t reads: the largest sum of one tap's offset per conv that does
// not leave the text. Where the text is long enough, receptive field - 1. Units conv and block:
// their numbers are the taps, then a dilation for each conv.
static int farthest(const Model *m, int t) {
    bool reached[LONG] = {true};  // [offset]
    for (int u = 0; u < m->U; u++)
        for (int i = 1; i < m->units[u].n_numbers; i++)
            for (int at = t; at >= 0; at--)
                for (int k = 0; reached[at] && k < m->units[u].numbers[0]; k++) {
                    int further = at + k * m->units[u].numbers[i];
                    if (further <= t) reached[further] = true;
                }
    while (!reached[t]) t--;
    return t;
}

// ---- Forward -----------------------------------------------------------------------------------

static bool finite_outputs(const Run *r, const Outputs *out) {
    double sum = 0;  // a NaN or an infinity anywhere stays
    for (int i = 0; i < r->N * r->D; i++) sum += 0 * (double)out->latents[i];
    for (int i = 0; i < r->N * V; i++) sum += 0 * (double)out->logits[i];
    for (int i = 0; i < r->N; i++) sum += 0 * (double)out->losses[i];
    return sum == 0;
}

// Changes the bytes of one row, one at a time. Of the largest model only some: the first, on both
// sides of the edge, and every eleventh.
static void test_changes(Run *r) {
    int before = 0, others = 0, beyond = 0, blind = 0, first = r->T;
    for (int t = 0; t < r->T; t++) {
        if (r->m.config.channels > 64 && t > 2 && t % 11 != 0) continue;
        int *id = &r->ids[ROW * r->T + t], old = *id;
        *id = old == BYTE_DROPPED ? 7 : (old + 100) % V;
        forward(r, &r->now);
        *id = old;
        for (int n = 0; n < r->N; n++) {
            int s = n - ROW * r->T;  // the time that n is at, in the changed row
            bool same = unchanged(r, n);
            if (s < 0 || s >= r->T)
                others += !same;
            else if (s < t)
                before += !same;
            else if (s - t >= r->reach)
                beyond += !same;
            else if (s == t)
                blind += same;
        }
        if (first == r->T && !unchanged(r, ROW * r->T + r->T - 1)) first = t;
    }
    check(before == 0, "%s: a changed byte changes nothing before it", r->name);
    check(others == 0, "%s: a changed byte changes no other row", r->name);
    check(beyond == 0, "%s: nor anything beyond the receptive field", r->name);
    check(blind == 0, "%s: it does change its own position", r->name);
    const Model *m = &r->m;
    int measured = r->T - first;
    check(measured == farthest(m, r->T - 1) + 1, "%s: with T=%d the last output sees %d bytes",
          r->name, r->T, measured);
    check(r->reach == farthest(m, LONG - 1) + 1, "%s: by the formula it can see %lld", r->name,
          (long long)r->reach);
}

// A later byte is poison: NaN in its row of the embedding, which no other position reads.
static void test_poison(Run *r) {
    Model *m = &r->m;
    int t = r->T / 2, C = m->config.channels, spread = 0, stopped = 0;
    while (r->ids[ROW * r->T + t] == BYTE_DROPPED) t++;
    real *host = new_reals(m->n_params);
    model_read(m, host, m->params);
    real *row = host + m->embedding + (size_t)r->ids[ROW * r->T + t] * (size_t)C;
    for (int c = 0; c < C; c++) row[c] = (real)NAN;
    model_write(m, m->params, host);
    forward(r, &r->now);
    // A tied head reads every row of the embedding, so that only the latents tell.
    for (int n = 0; n < r->N; n++) {
        const real *z = r->now.latents + (size_t)n * (size_t)r->D;
        bool same = same_bits(z, r->base.latents + (size_t)n * (size_t)r->D, (size_t)r->D);
        if (n < ROW * r->T + t || n >= (ROW + 1) * r->T) spread += !same;
        if (n == ROW * r->T + t) stopped += z[0] == z[0];
    }
    check(spread == 0 && stopped == 0, "%s: NaN in byte %d stays behind it", r->name, t);
    fill_params(m, 100);
    free(host);
}

// ---- Backward ----------------------------------------------------------------------------------

// The gradient of one position's loss alone: by the embedded input (N,C) and by the parameters.
static void gradient_of(Run *r, int position, real *dx, real *grads) {
    Model *m = &r->m;
    const Backend *be = m->backend;
    const Pass pass = {0};
    size_t N = (size_t)r->N;
    int *scored = malloc(N * sizeof *scored);
    need(scored != NULL, "out of memory");
    for (int n = 0; n < r->N; n++) scored[n] = n == position ? r->targets[n] : -1;
    be->upload(m->ids, r->ids, N * sizeof *r->ids);
    be->upload(m->targets, scored, N * sizeof *scored);
    be->zero(m->grads, m->n_params * sizeof(real));
    model_forward(m, &pass);
    be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 1, N);
    model_backward(m, &pass);
    // The residual stream's gradient was carried down in place: it is the embedded input's now.
    be->read_acts(dx, m->dx, N * (size_t)m->config.channels);
    model_read(m, grads, m->grads);
    free(scored);
}

static bool is_zero(const real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(x[i] == 0)) return false;
    return true;
}

static bool has_number(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i]) <= most)) most = fabs((double)x[i]);
    return most > 0 && most - most == 0;
}

static void test_gradients(Run *r, int t) {
    Model *m = &r->m;
    size_t C = (size_t)m->config.channels;
    real *dx = new_reals((size_t)r->N * C), *grads = new_reals(m->n_params);
    int later = 0, others = 0, beyond = 0, table = 0;
    gradient_of(r, ROW * r->T + t, dx, grads);
    for (int n = 0; n < r->N; n++) {
        int s = n - ROW * r->T;
        bool zero = is_zero(dx + (size_t)n * C, C), read = s >= 0 && s <= t;
        if (s < 0 || s >= r->T)
            others += !zero;
        else if (s > t)
            later += !zero;
        else if (t - s >= r->reach)
            beyond += !zero;
        const real *row = grads + m->embedding + (size_t)r->ids[n] * C;
        if (!m->config.tie && r->ids[n] != BYTE_DROPPED && !read) table += !is_zero(row, C);
    }
    check(later == 0, "%s: gradient of output %d by later inputs is 0", r->name, t);
    check(others == 0, "%s: gradient of output %d by other rows is 0", r->name, t);
    check(beyond == 0, "%s: gradient of output %d beyond its receptive field is 0", r->name, t);
    check(table == 0, "%s: gradient of output %d by unread bytes' embeddings is 0", r->name, t);
    const real *own = dx + (size_t)(ROW * r->T + t) * C;
    check(has_number(own, C) && has_number(own - (size_t)farthest(m, t) * C, C),
          "%s: gradient of output %d by its own and its farthest input is not", r->name, t);
    free(dx);
    free(grads);
}

// ---- Every case on every backend ---------------------------------------------------------------

static void test_backend(const Backend *be) {
    for (int i = 0; i < 2 * CASES; i++) {
        Run r;
        if (!cases[i / 2].units[i % 2]) continue;
        // The plain loops take half a minute for each form of the widest.
        if (be == &plain_backend && cases[i / 2].config.channels > 64) continue;
        open_run(&r, be, &cases[i / 2], cases[i / 2].units[i % 2]);
        forward(&r, &r.base);
        check(finite_outputs(&r, &r.base), "%s: every output is a number", r.name);
        test_changes(&r);
        test_poison(&r);
        test_gradients(&r, r.T - 1);
        if (r.T > 1) test_gradients(&r, 0);
        if (r.T > 2) test_gradients(&r, r.T / 2);
        const char *problem = be->error();
        check(problem == NULL, "%s: %s", r.name, problem ? problem : "no error on the device");
        close_run(&r);
    }
}

int main(void) {
    set_threads(1);  // small work: threads would mostly wait; that they change no bit: test_model
    test_backend(&plain_backend);
    test_backend(&cpu_backend);
    Error e;
    int n = 0;
    const char *const *names = gpu_backend_names(&n);
    if (gpu_open(NULL, &e)) {
        char why[ERROR_LEN + 32];
        snprintf(why, sizeof why, "causality on a GPU: %s", e.text);
        skip(why);
        return finish();
    }
    for (int i = 0; i < n; i++) {
        const Backend *be = gpu_backend(names[i], &e);
        check(be != NULL, "backend %s: %s", names[i], be ? "opens" : e.text);
        if (be) test_backend(be);
    }
    return finish();
}
