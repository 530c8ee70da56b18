// test_kernels.c: every GPU kernel against the CPU, then the whole model, then 50 steps.
//
//   make check-kernels                          # all rows, then how fast each is
//   ./test_kernels --kernel conv_forward_mine   # one row of the kernel table, checked and timed
//   ./test_kernels --small                      # small shapes only, for compute-sanitizer
//
// Without a GPU every test is skipped, by name, and the exit status is 0. Read kernel_check.c for
// what a check does. Exit status 1: a test failed. 2: wrong usage, a kernel that is not there.
#include "support/arithmetic.h"
#include "support/gpu.h"
#include "tests/test.h"

typedef struct {
    bool small, time, check;
    const char *kernel;  // NULL = all
    uint64_t seed;
    ConvShape shape;  // of the timings
} Options;

#ifdef WITH_CUDA

static void report(bool ok, const char *name, const char *detail) {
    check(ok, "%s%s%s", name, *detail ? ": " : "", detail);
    fflush(stdout);
}

// ---- Kernels -----------------------------------------------------------------------------------

// B T C O K dil. Tiles are 32, 64 and 128 wide and long, kernels choose by size: these cross every
// edge. The first SMALL are what the sanitizers run.
enum { SMALL = 7 };  // the last one: several splits of the rows
static const ConvShape ugly[] = {
    {2, 70, 64, 64, 3, 4},      {1, 40, 16, 24, 5, 3},  // for wgmma, for mma
    {1, 1, 1, 1, 1, 1},         {3, 37, 33, 31, 3, 4},      {2, 66, 36, 68, 2, 100},
    {1, 130, 8, 132, 3, 2},     {1, 513, 4, 4, 7, 5},       {3, 5, 100, 32, 7, 3},
    {1, 31, 32, 32, 3, 1},      {1, 32, 32, 33, 2, 1},      {1, 33, 31, 32, 1, 1},
    {3, 127, 127, 129, 3, 4},   {1, 128, 128, 128, 3, 4},   {3, 129, 129, 127, 2, 128},
    {3, 63, 64, 65, 3, 62},     {1, 64, 65, 63, 3, 64},     {1, 65, 63, 64, 7, 11},
    {3, 1, 33, 100, 3, 1},      {3, 2, 100, 33, 3, 2},      {1, 100, 1, 100, 3, 7},
    {1, 100, 100, 1, 3, 7},     {3, 50, 32, 32, 7, 1 << 20},
    // long enough for the largest tiles: vectors, single values, channels over one tile's edge
    {1, 12737, 8, 12, 3, 4},    {3, 4247, 5, 7, 2, 9},      {3, 2140, 4, 132, 2, 6},
    {2, 3201, 132, 4, 3, 17},   {1, 6337, 12, 20, 1, 1},    {2, 1301, 100, 68, 3, 5},
    {1, 6400, 256, 5, 1, 1},
    // the tensor cores' own edges: rows of a tile, channels of a box, the farthest tap
    {3, 130, 256, 256, 3, 4},   {2, 200, 64, 192, 3, 30},   {1, 1, 256, 256, 3, 4},
    {4, 513, 256, 256, 3, 56},  {2, 130, 256, 256, 3, 57},  {3, 100, 40, 72, 2, 9},
    {7, 63, 8, 256, 1, 1},      {2, 4100, 256, 128, 1, 1},  {130, 65, 64, 64, 3, 2},
    // more channels than a warp's registers hold at first, at most, and not at all
    {2, 37, 264, 264, 2, 3},    {3, 70, 512, 512, 3, 4},    {1, 50, 520, 16, 3, 2},
};
// Of one operation, which takes another way only where there is much to do; at one variant.
typedef struct {
    const char *op;
    int variant;
    ConvShape shape;
} LargeShape;
static const LargeShape large[] = {
    // wgmma's weight gradients for K = 3, 2, 1: narrow tiles in several splits, wide tiles in
    // several, so long that their rings come round; the narrow of K = 1 are among the ugly
    {"conv_backward_weight", 0, {2, 2050, 256, 256, 3, 4}},
    {"conv_backward_weight", 2, {2, 2500, 256, 256, 3, 90}},
    {"conv_backward_weight", 0, {2, 2050, 256, 256, 2, 4}},
    {"conv_backward_weight", 2, {2, 2500, 256, 256, 2, 150}},
    {"conv_backward_weight", 2, {2, 5000, 256, 256, 1, 1}},
    // linear layers of more summed channels than shared memory holds: tiles of 64, 128 and 256
    // channels, several a block; and the last rows alone in a cluster
    {"conv_forward", 1, {1, 300, 1032, 264, 1, 1}},
    {"conv_forward", 3, {1, 8200, 776, 384, 1, 1}},
    {"conv_forward", 2, {1, 33100, 520, 512, 1, 1}},
    {"conv_forward", 2, {5, 130, 1544, 40, 1, 1}},
    {"conv_forward", 2, {1, 130, 8, 8440, 1, 1}},
    {"conv_forward", 2, {1, 130, 8, 16888, 1, 1}},
    {"conv_backward_input", 3, {1, 300, 264, 1032, 1, 1}},
    {"conv_backward_input", 1, {1, 8200, 384, 776, 1, 1}},
    {"conv_backward_input", 2, {1, 33100, 512, 520, 1, 1}},
    {"conv_backward_input", 0, {5, 130, 40, 1544, 1, 1}},
    {"conv_backward_input", 0, {1, 130, 8440, 8, 1, 1}},
    // of linear layers, with and without clusters
    {"conv_backward_weight", 0, {1, 3000, 264, 520, 1, 1}},
    {"conv_backward_weight", 0, {1, 20000, 1024, 264, 1, 1}},
    // wide tiles in one split: so many that there is no place for two
    {"conv_backward_weight", 2, {1, 330, 1088, 512, 3, 60}},
    // more rows than are made one-hot at a time
    {"embed_backward", 2, {1, 16500, 136, 8, 1, 1}},
    // wgmma's attention, heads of 64: more tiles than its rings hold, windows that end amid tiles
    {"attention.forward", 0, {1, 1500, 64, 8, 1, 1}},
    {"attention.forward", 1, {2, 700, 64, 8, 90, 1}},
    {"attention.forward", 2, {1, 611, 64, 8, 100, 3}},
    {"attention.forward", 3, {40, 449, 64, 8, 1, 1}},
    {"attention.backward", 0, {1, 1500, 64, 8, 1, 1}},
    {"attention.backward", 1, {2, 700, 64, 8, 90, 1}},
    {"attention.backward", 2, {1, 611, 64, 8, 100, 3}},
    {"attention.backward", 3, {40, 449, 64, 8, 1, 1}},
};
enum { UGLY = sizeof ugly / sizeof *ugly, LARGE = sizeof large / sizeof *large, RANDOM = 200 };

static int between(uint64_t seed, int i, int what, int low, int high) {
    Philox r = philox(seed, (uint32_t)i, (uint32_t)what, 0, RNG_TEST);
    return low + (int)(r.v[0] % (uint32_t)(high - low + 1));
}

static ConvShape random_shape(uint64_t seed, int i) {
    ConvShape s = {.B = between(seed, i, 0, 1, 3), .T = between(seed, i, 1, 1, 200),
                   .C = between(seed, i, 2, 1, 130), .O = between(seed, i, 3, 1, 130),
                   .K = between(seed, i, 4, 1, 7)};
    s.dil = between(seed, i, 5, 1, s.T + 5);
    // Every other shape has whole vectors, as real models do: of float32, of bf16.
    if (i % 4 == 1) s.C = (s.C + 3) / 4 * 4, s.O = (s.O + 3) / 4 * 4;
    if (i % 4 == 3) s.C = (s.C + 7) / 8 * 8, s.O = (s.O + 7) / 8 * 8, s.K = (s.K + 1) / 2;
    // LayerNorm of two values is +-1 whatever they are: its gradient is all cancellation.
    if (s.C == 2) s.C = 3;
    return s;
}

// Whether an operation is checked on this ugly shape with this variant.
static bool choose_ugly(const char *op, int shape, int variant) {
    enum { MANY_ROWS = 4096, MANY_VALUES = 1 << 16 };
    const ConvShape s = ugly[shape];
    // One block or thread adds all losses: many only take long.
    if (strcmp(op, "add_losses") == 0 && s.B * s.T * s.C > MANY_VALUES) return false;
    const bool other = variant >= CHECK_VARIANTS;  // another activation than GELU
    // Most of the time goes to many rows: of two such neighbours one has the even variants, the
    // other the odd ones, and of other activations half of these.
    if (s.B * s.T > MANY_ROWS && (shape + variant) % (other ? 4 : 2) != 0) return false;
    // Other activations differ from GELU in a few lines of a kernel: a third of the shapes for each
    // of their variants, another for the next: four variants meet all shapes but the longest.
    return !other || (shape + variant) % 3 == 0;
}

// One row of the table on one shape: random inputs, then integers. Notes the worst error. Returns
// how many outputs were compared, or -1 where one was wrong.
static int check_shape(const Kernel *k, ConvShape s, int variant, uint64_t seed, bool small,
                       double *worst) {
    int compared = 0;
    for (int exact = 0; exact < (small && variant ? 1 : 2); exact++) {
        KernelCheck r;
        Error e;
        int status = kernel_check(k, s, variant, exact, seed, &r, &e);
        if (status == 0 && r.compared == 0) continue;
        if (status == 0 && !exact && !(r.error <= *worst)) *worst = r.error;
        if (status == 0) compared += r.compared;
        if (status == 0 && r.passed) continue;
        char detail[ERROR_LEN + 256];
        snprintf(detail, sizeof detail, "B %d T %d C %d O %d K %d dil %d variant %d: %s %s %g", s.B,
                 s.T, s.C, s.O, s.K, s.dil, variant,
                 status ? e.text : exact ? "integers: bits differ in" : "random: relative error in",
                 status ? "" : r.where, status ? 0 : r.error);
        report(false, k->name, detail);
        return -1;
    }
    return compared;
}

// The rows of one operation.
enum { MOST_ROWS = 32 };
typedef struct {
    const Kernel *row[MOST_ROWS];
    double worst[MOST_ROWS];
    bool wrong[MOST_ROWS];
    int count, shapes;
} Ladder;

// All rows on one shape: the CPU's half is worked out once for all of them.
static void check_rows(Ladder *l, const Options *o, ConvShape s, int variant, int seed) {
    bool compared = false;
    for (int j = 0; j < l->count; j++) {
        if (l->wrong[j]) continue;
        int n = check_shape(l->row[j], s, variant, o->seed + (uint64_t)seed, o->small,
                            &l->worst[j]);
        l->wrong[j] = n < 0;
        compared = compared || n != 0;
    }
    l->shapes += compared;
}

// Multiply-adds of a conv. Large shapes with few of them are checked with --small, too.
#define CHEAP 3e7
static double products(ConvShape s) { return (double)s.B * s.T * s.C * s.O * s.K; }

static void check_operation(const Kernel *all, int n, const char *op, const Options *o) {
    // The other activations' variants begin at CHECK_VARIANTS.
    enum { VARIANTS = CHECK_VARIANTS * N_ACTIVATIONS, OTHERS = VARIANTS - CHECK_VARIANTS };
    Ladder l = {.count = 0};
    for (int i = 0; i < n && l.count < MOST_ROWS; i++)
        if (strcmp(all[i].op, op) == 0 && (!o->kernel || strcmp(o->kernel, all[i].name) == 0))
            l.row[l.count++] = &all[i];
    for (int i = 0; i < (o->small ? SMALL : UGLY) && l.count; i++)
        for (int v = 0; v < VARIANTS; v++)
            if (choose_ugly(op, i, v)) check_rows(&l, o, ugly[i], v, i * CHECK_VARIANTS + v);
    int seed = UGLY * CHECK_VARIANTS;
    for (int i = 0; i < LARGE; i++, seed++)
        if (strcmp(op, large[i].op) == 0 && (!o->small || products(large[i].shape) < CHEAP))
            check_rows(&l, o, large[i].shape, large[i].variant, seed);
    for (int i = 0; i < RANDOM && !o->small; i++, seed++) {
        const ConvShape s = random_shape(o->seed, i);
        check_rows(&l, o, s, i % CHECK_VARIANTS, seed);
        if (i % 5 != 0) continue;
        // The variants shift by one each time round: random_shape's kinds go by i % 4, and each
        // variant is to meet all four.
        check_rows(&l, o, s, CHECK_VARIANTS + (i / 5 + i / 5 / OTHERS) % OTHERS, seed);
    }
    for (int j = 0; j < l.count; j++) {
        char detail[96];
        snprintf(detail, sizeof detail, "%d shapes, worst relative error %.1e", l.shapes,
                 l.worst[j]);
        if (!l.wrong[j]) report(true, l.row[j]->name, detail);
    }
}

// ---- The whole model ---------------------------------------------------------------------------

typedef struct {
    const char *name;
    Config config;
    int B, T, passes;
    float dropout, byte_dropout;
    double clip, average;
} Case;

#define GELU .activation = ACT_gelu
#define SMALL .channels = 32, .latent = 32
#define BLOCKS .units = "2x(block:3:1:2:4)"
#define CONVS .units = "2x(conv:3:1 conv:3:2 conv:3:4)"

static const Case cases[] = {
    {"blocks", {SMALL, GELU, BLOCKS}, 2, 40, 1, 0, 0, 1, 0},
    {"convs, tied, softcap, dropout, byte dropout, average, two passes",
     {SMALL, GELU, CONVS, .tie = true, .softcap = 30}, 2, 40, 2, 0.2f, 0.1f, 1, 0.9},
    // the second pass starts amid rows that share their draws
    {"blocks, odd sizes, dropout, two passes",
     {.channels = 33, .latent = 21, GELU, .units = "2x(block:2:1:2:4)"}, 3, 37, 2, 0.1f, 0, 1, 0},
    {"blocks and convs, three activations, dropout, two passes",
     {SMALL, GELU, .tie = true,
      .units = "block:3:1:2 conv:2:4:lrelu2 block:2:3:1:none 2x(conv:3:2 conv:2:4)"},
     2, 37, 2, 0.1f, 0, 1, 0},
    {"convs, own head, softcap, no clipping",
     {.channels = 32, .latent = 48, GELU, CONVS, .softcap = 5}, 2, 40, 1, 0, 0, 0, 0},
    // (Squares upon squares would grow from conv to conv of a block, which has no norm.)
    {"convs, lrelu2, dropout", {SMALL, .activation = ACT_lrelu2, CONVS}, 2, 40, 1, 0.2f, 0, 1, 0},
    {"blocks, none, dropout", {SMALL, .activation = ACT_none, BLOCKS}, 2, 40, 1, 0.2f, 0, 1, 0},
};
enum { CASES = sizeof cases / sizeof *cases, SMALL_CASES = 4 };

static int open_model(Model *m, const Backend *be, const Case *k, Error *e) {
    uint8_t text[4000];
    for (int i = 0; i < 4000; i++)  // something to learn: words of a small alphabet
        text[i] = (uint8_t)('a' + (i / 5 * 7 + i % 5 * 3 + (i * 2654435761u >> 29)) % 26);
    uint64_t lengths[2] = {1500, 2500};
    const Training training = {
        .dropout = k->dropout, .byte_dropout = k->byte_dropout, .seed = 5, .passes = k->passes,
        .hyper = {.steps = 50, .warmup = 5, .lr = 2e-3, .min_lr = 2e-4, .beta1 = 0.9, .beta2 = 0.99,
                  .eps = 1e-8, .weight_decay = 0.1, .clip = k->clip, .ema = k->average}};
    if (model_open(m, be, &k->config, k->B, k->T, &training, e)) return -1;
    if (model_init_params(m, 1, e) == 0 && model_set_corpus(m, text, lengths, 2, e) == 0) return 0;
    model_free(m);
    return -1;
}

static double tensor_error(const real *out, const real *ref, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)out[i] - ref[i]) * ((double)out[i] - ref[i]);
        norm += (double)ref[i] * ref[i];
    }
    return diff == 0 ? 0 : sqrt(diff / norm);
}

// How far a backend may be from the CPU, whose arithmetic is float32 throughout. bf16 activations
// have 8 bits: measured on an H100 were at most 2.4e-5, 1.2e-2 and 1.2e-3.
typedef struct {
    double loss, gradient;  // of one step: relative, a tensor at a time
    double steps;           // the loss of any of 50 steps, nats per byte
} Bounds;
static Bounds bounds_of(const Backend *be) {
    return be->act_bytes == 2 ? (Bounds){1e-4, 3e-2, 3e-3} : (Bounds){1e-4, 1e-4, 1e-3};
}

// The gradients (n_params, host) and the loss of a first step. Where the loss is NaN the optimizer
// changes nothing and the gradients stay: so they come from such a step, the loss from another.
static double first_step(Model *m, real *gradients) {
    const Backend *be = m->backend;
    const double nan = NAN;
    StepFigures f;
    be->upload(&m->state->loss_sum, &nan, sizeof nan);
    model_train_step(m);
    model_read(m, gradients, m->grads);
    be->zero(m->grads, m->n_params * sizeof(real));
    model_train_step(m);
    be->download(&f, &m->state->ring[0], sizeof f);
    return f.loss;
}

// Loss and every gradient of one step.
static void test_gradients(const Backend *be, const Case *k, const char *name) {
    Model cpu, gpu;
    Error e;
    const Bounds bounds = bounds_of(be);
    if (open_model(&cpu, &cpu_backend, k, &e)) {
        report(false, name, e.text);
        return;
    }
    if (open_model(&gpu, be, k, &e)) {
        model_free(&cpu);
        report(false, name, e.text);
        return;
    }
    real *out = malloc(cpu.n_params * sizeof *out), *ref = malloc(cpu.n_params * sizeof *ref);
    char detail[ERROR_LEN] = "out of memory";
    double worst = 0, loss_error = 0;
    bool ok = out && ref;
    if (ok) {
        double loss = first_step(&gpu, out), expected = first_step(&cpu, ref);
        loss_error = fabs(loss - expected) / fabs(expected);
        if (!(loss_error <= bounds.loss)) {
            ok = false;
            snprintf(detail, sizeof detail, "loss %g, on the CPU %g", loss, expected);
        }
        for (int i = 0; i < cpu.n_tensors && ok; i++) {
            const Tensor *t = &cpu.tensors[i];
            double err = tensor_error(out + t->offset, ref + t->offset, t->size);
            if (!(err <= worst)) worst = err;
            if (!(err <= bounds.gradient)) {
                ok = false;
                snprintf(detail, sizeof detail, "gradient of %s: relative error %g", t->name, err);
            }
        }
    }
    const char *error = be->error();
    if (ok)
        snprintf(detail, sizeof detail, "relative error of the loss %.1e, of a gradient %.1e",
                 loss_error, worst);
    report(ok && !error, name, error ? error : detail);
    free(out);
    free(ref);
    model_free(&cpu);
    model_free(&gpu);
}

// A step whose launches do not overlap, because a trace stands between them.
static void queue_step(void *m) { model_train_step(m); }
static void traced_step(Model *m) {
    KernelTime rows[MOST_KERNEL_TIMES];
    gpu_trace(queue_step, m, rows, 0);
}

// steps figures of a run of 50 steps, and the parameters after it (n_params, caller frees).
static real *run_steps(const Backend *be, const Case *k, void (*step)(Model *),
                       StepFigures *figures, int steps, size_t *n, Error *e) {
    Model m;
    if (open_model(&m, be, k, e)) return NULL;
    for (int i = 0; i < steps; i++) step(&m);
    StepState *state = malloc(sizeof *state);
    real *params = malloc(m.n_params * sizeof *params);
    if (state && params) {
        be->download(state, m.state, sizeof *state);
        memcpy(figures, state->ring, (size_t)steps * sizeof *figures);
        model_read(&m, params, m.params);
    }
    const char *error = be->error();
    if (error) fail(e, "%s", error);
    *n = m.n_params;
    free(state);
    model_free(&m);
    if (!error) return params;
    free(params);
    return NULL;
}

// The CPU's loss at each of 50 steps, and two runs of the GPU bit for bit.
static void test_steps(const Backend *be, const Case *k, const char *name, const char *twice) {
    enum { STEPS = 50 };
    StepFigures cpu[STEPS] = {0}, one[STEPS] = {0}, two[STEPS] = {0};
    size_t n = 0;
    Error e = {"out of host memory"};
    real *ref = run_steps(&cpu_backend, k, model_train_step, cpu, STEPS, &n, &e);
    real *a = run_steps(be, k, model_train_step, one, STEPS, &n, &e);
    real *b = run_steps(be, k, model_train_step, two, STEPS, &n, &e);
    char detail[ERROR_LEN];
    double worst = 0;
    bool ok = ref && a && b;
    snprintf(detail, sizeof detail, "%s", e.text);
    for (int i = 0; i < STEPS && ok; i++) {
        double err = fabs((double)one[i].loss - cpu[i].loss);
        if (!(err <= worst)) worst = err;
    }
    if (ok)
        snprintf(detail, sizeof detail, "loss %.4f to %.4f, furthest from the CPU %.1e",
                 one[0].loss, one[STEPS - 1].loss, worst);
    report(ok && worst <= bounds_of(be).steps, name, detail);
    bool same = ok && memcmp(a, b, n * sizeof *a) == 0 && memcmp(one, two, sizeof one) == 0;
    report(same, twice, same ? "" : ok ? "two runs differ" : e.text);
    free(ref);
    free(a);
    free(b);
}

// A step's launches may overlap on the side stream, and each with the end of the one before. None
// of that may show: neither without a CUDA graph, nor without the side stream, nor where each
// launch waits for the one before.
static void test_overlap(const Backend *be, const Case *k, const char *name) {
    enum { STEPS = 20, WAYS = 4 };
    const char *const ways[WAYS] = {"", "without a graph", "without the side stream",
                                    "one after the other"};
    StepFigures figures[WAYS][STEPS] = {0};
    real *params[WAYS] = {NULL};
    Backend way = *be;
    Error e = {"out of host memory"};
    size_t n = 0;
    const char *wrong = (size_t)k->B * (size_t)k->T > be->side_rows ? "uses no side stream" : NULL;
    for (int i = 0; i < WAYS; i++) {
        if (i == 1) way.capture = NULL;
        if (i == 2) way.capture = be->capture, way.side_rows = 0;
        if (i == 3) way.capture = NULL;
        params[i] = run_steps(&way, k, i == 3 ? traced_step : model_train_step, figures[i], STEPS,
                              &n, &e);
        if (!wrong && !params[i]) wrong = e.text;
        if (!wrong && (memcmp(params[0], params[i], n * sizeof(real)) != 0 ||
                        memcmp(figures[0], figures[i], sizeof figures[0]) != 0))
            wrong = ways[i];
    }
    report(!wrong, name, wrong ? wrong : "");
    for (int i = 0; i < WAYS; i++) free(params[i]);
}

// Whatever a backend keeps beside the parameters follows them: after some steps the losses are the
// same bits as after the parameters were written anew.
static void test_copies(const Backend *be, const Case *k, const char *name) {
    Model m;
    Error e;
    if (open_model(&m, be, k, &e)) {
        report(false, name, e.text);
        return;
    }
    size_t N = (size_t)k->B * (size_t)k->T;
    real *params = malloc(m.n_params * sizeof *params), *one = malloc(N * sizeof *one);
    real *two = malloc(N * sizeof *two);
    int *ids = malloc(N * sizeof *ids);
    bool ok = params && one && two && ids;
    for (size_t i = 0; i < N && ok; i++) ids[i] = (int)(i * 7 % V);
    for (int i = 0; i < 3; i++) model_train_step(&m);
    if (ok) {
        model_losses(&m, ids, ids, one);
        model_read(&m, params, m.params);
        model_write(&m, m.params, params);
        model_losses(&m, ids, ids, two);
    }
    const char *error = be->error();
    report(ok && !error && memcmp(one, two, N * sizeof *one) == 0, name, error ? error : "");
    free(params);
    free(one);
    free(two);
    free(ids);
    model_free(&m);
}

// What the ugly shapes are to test must not go to the rung below unnoticed.
static void test_last_rung(void) {
    GpuInfo g;
    Error e;
    const ConvShape paper = {8, 512, 256, 256, 3, 4};
    const ConvShape far = {4, 513, 256, 256, 3, 56}, too_far = {2, 130, 256, 256, 3, 57};
    if (gpu_open(&g, &e) || g.capability != 90) return;
    check(strcmp(tensor_rung(paper), "wgmma") == 0, "on Hopper the paper's convs run on wgmma");
    check(strcmp(tensor_rung(far), "wgmma") == 0 && strcmp(tensor_rung(too_far), "wgmma") != 0,
          "and so do all with room for three stages: at K = 3, C = 256 up to dilation 56");
}

static void test_models(const Options *o) {
    int n;
    const char *const *names = gpu_backend_names(&n);
    for (int j = 0; j < n; j++) {
        Error e;
        char name[256], twice[256];
        const Backend *be = gpu_backend(names[j], &e);
        snprintf(name, sizeof name, "self-test of %s", names[j]);
        if (!be) {
            report(false, name, e.text);
            continue;
        }
        int status = o->small ? 0 : gpu_selftest(be, &e);
        if (!o->small) report(status == 0, name, status ? e.text : "");
        for (int i = 0; i < CASES; i++) {
            const Case *k = &cases[i];
            snprintf(name, sizeof name, "%s, gradients, %s", names[j], k->name);
            if (i < SMALL_CASES || !o->small) test_gradients(be, k, name);
            snprintf(name, sizeof name, "%s, copies of parameters, %s", names[j], k->name);
            if (i < 1 || !o->small) test_copies(be, k, name);
            if (o->small) continue;
            snprintf(name, sizeof name, "%s, 50 steps, %s", names[j], k->name);
            snprintf(twice, sizeof twice, "%s, same bits twice, %s", names[j], k->name);
            test_steps(be, k, name, twice);
            snprintf(name, sizeof name, "%s, the same bits however launched, %s", names[j],
                     k->name);
            test_overlap(be, k, name);
        }
        // The smallest of the paper's, and as large as a pass with the side stream may be.
        const int sizes[][2] = {{1, 128}, {8, 256}};
        for (int i = 0; i < 2 && !o->small; i++) {
            Case k = cases[0];
            k.config = config_paper();
            k.B = sizes[i][0], k.T = sizes[i][1];
            snprintf(name, sizeof name, "%s, the same bits however launched, %dx%d", names[j], k.B,
                     k.T);
            test_overlap(be, &k, name);
        }
    }
}

// ---- How fast ----------------------------------------------------------------------------------

static void time_kernels(const Options *o) {
    ConvShape s = o->shape;
    double copy = gpu_copy_rate(), fma = gpu_fma_rate();
    double cublas = gpu_cublas_rate(s.B * s.T, s.O, s.K * s.C, false);
    GpuInfo g;
    Error e;
    gpu_open(&g, &e);
    printf("\n%s, B %d T %d C %d O %d K %d dil %d; ceilings measured here: copy %.0f GB/s, "
           "float32 FMA %.1f TFLOP/s", g.name, s.B, s.T, s.C, s.O, s.K, s.dil, copy / 1e9,
           fma / 1e12);
    if (cublas > 0) printf(", cuBLAS on the same product %.1f TFLOP/s", cublas / 1e12);
    printf("\n%-32s %10s %9s %7s %9s %7s  %s\n", "kernel", "ms", "TFLOP/s", "of FMA", "GB/s",
           "of copy", "idea");
    int n;
    const Kernel *k = gpu_kernels(&n);
    for (int i = 0; i < n; i++) {
        if (o->kernel && strcmp(o->kernel, k[i].name) != 0) continue;
        double flops = 0, bytes = 0, t = kernel_seconds(&k[i], s, &flops, &bytes);
        if (!(t > 0)) {
            printf("%-32s could not run\n", k[i].name);
            continue;
        }
        printf("%-32s %10.4f %9.2f %6.1f%% %9.1f %6.1f%%  %s\n", k[i].name, t * 1e3,
               flops / t / 1e12, 100 * flops / t / fma, bytes / t / 1e9, 100 * bytes / t / copy,
               k[i].idea);
    }
    printf("\n");
}

static void run_all(const Options *o) {
    int n;
    const Kernel *k = gpu_kernels(&n);
    if (o->check) printf("# shapes drawn from seed %llu (--seed)\n", (unsigned long long)o->seed);
    for (int i = 0; i < n && o->check; i++) {
        bool first = true;  // row of its operation
        for (int j = 0; j < i; j++) first = first && strcmp(k[j].op, k[i].op) != 0;
        if (first) check_operation(k, n, k[i].op, o);
    }
    if (o->check && !o->kernel) {
        test_last_rung();
        test_models(o);
    }
    if (o->time) time_kernels(o);
}

static void skip_all(const Options *o, const char *why) {
    int n;
    const Kernel *k = gpu_kernels(&n);
    for (int i = 0; i < n; i++)
        if (!o->kernel || strcmp(o->kernel, k[i].name) == 0) skip(k[i].name);
    const char *const *names = gpu_backend_names(&n);
    for (int i = 0; i < n && !o->kernel; i++) {
        char name[96];
        snprintf(name, sizeof name, "the whole model on %s", names[i]);
        skip(name);
    }
    printf("# skipped because: %s\n", why);
}
#else
static void run_all(const Options *o) { (void)o; }
static void skip_all(const Options *o, const char *why) {
    (void)o;
    char line[ERROR_LEN + 32];
    snprintf(line, sizeof line, "all GPU kernels: %s", why);
    skip(line);
}
#endif

// Whether the table has the kernel that is asked for; if not, says what it has. It is there also
// where there is no GPU: a name that is wrong must not look like one that was skipped.
static bool has_kernel(const char *name) {
    int n;
    const Kernel *k = gpu_kernels(&n);
    for (int i = 0; i < n; i++)
        if (strcmp(name, k[i].name) == 0) return true;
    Error e;
    if (n == 0 && gpu_open(NULL, &e)) {
        fprintf(stderr, "test_kernels: no kernel named '%s': %s\n", name, e.text);
        return false;
    }
    fprintf(stderr, "test_kernels: no kernel named '%s'; the table has\n", name);
    for (int i = 0; i < n; i++) fprintf(stderr, "  %-32s %s\n", k[i].name, k[i].idea);
    return false;
}

static int usage(void) {
    fprintf(stderr, "usage: test_kernels [--small] [--time | --time-only] [--kernel NAME]\n"
                    "                    [--seed N] [--shape B,T,C,O,K,dil]   (of the timings)\n");
    return 2;
}

// Nothing but digits, and what else may be between them: strtoull and sscanf would skip blanks, and
// take a sign or what follows.
static bool made_of(const char *text, const char *characters) {
    return *text && strspn(text, characters) == strlen(text);
}

int main(int argc, char **argv) {
    Options o = {.check = true, .seed = 20240601, .shape = {32, 1024, 256, 256, 3, 4}};
    for (int i = 1; i < argc; i++) {
        ConvShape *s = &o.shape;
        if (strcmp(argv[i], "--small") == 0)
            o.small = true;
        else if (strcmp(argv[i], "--time") == 0)
            o.time = true;
        else if (strcmp(argv[i], "--time-only") == 0)
            o.time = true, o.check = false;
        else if (strcmp(argv[i], "--kernel") == 0 && i + 1 < argc)
            o.kernel = argv[++i];
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc &&
                 made_of(argv[i + 1], "0123456789"))
            o.seed = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--shape") == 0 && i + 1 < argc &&
                 made_of(argv[i + 1], "0123456789,") &&
                 sscanf(argv[++i], "%d,%d,%d,%d,%d,%d", &s->B, &s->T, &s->C, &s->O, &s->K,
                        &s->dil) == 6)
            continue;
        else
            return usage();
    }
    Error e;
    if (o.kernel && !has_kernel(o.kernel)) return 2;
    if (gpu_open(NULL, &e))
        skip_all(&o, e.text);
    else
        run_all(&o);
    return finish();
}
