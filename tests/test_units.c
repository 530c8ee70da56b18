// test_units.c: what must hold of every mixer, whichever it is. All that this file knows of one is
// its row (model.h, Mixer): a new row of mixers/list.h is tested by being there.
//
// From the row's declared numbers it writes units as text, puts each into four stacks, so that
// units with and without a norm, a tail and an activation of its own stand above and below it
// (above an input, which stands first), and gives every stack an ugly shape and options in turn,
// skips among them. Then
//   text        it parses, prints, and parses as the same unit; what the row forbids is refused;
//   causality   byte t changes no output before t, nor another row; the row's reach is measured, on
//               both sides of its edge;
//   dropout     no two of a model draw the same numbers;
//   streaming   byte by byte gives the bits of model_forward, on rings that wrap;
//   scoring     a text in windows costs what it costs in one pass;
//   checkpoint  configuration and parameters come back;
//   backends    loss, gradients and steps of `plain` and of every GPU backend are those of `cpu`;
//   gradients   of every tensor, against finite differences. They need double: test_units_f64, this
//               file and the model built with -DREAL=double, must stand beside the program.
//   ./test_units
#define _POSIX_C_SOURCE 200809L
#ifdef REAL  // built with -DREAL=double
#define IN_DOUBLE 1
#else
#define IN_DOUBLE 0
#endif
#include <string.h>
#include <unistd.h>

#include "support/checkpoint.h"
#include "support/gpu.h"
#include "support/stream.h"
#include "tests/gradients.h"

// ---- Cases: a unit, the stack it stands in, a shape and options ---------------------------------

enum { VARIETIES = 11, STACKS = 4, BEYOND = 70, MOST_CASES = 4096, WORD = 400 };

typedef struct {
    int number;
    char unit[WORD];  // "conv:2:70:lrelu2"
    Config config;
    int B, T, stack;
    bool beyond;  // one of its numbers lies beyond every window
    float dropout;
    int passes;
} Case;

static Case cases[MOST_CASES];
static int n_cases;

static const struct {
    int B, T, C;
} shapes[] = {{2, 9, 8}, {3, 2, 8}, {1, 37, 33}, {2, 1, 8}, {3, 9, 1}, {1, 2, 33}, {2, 37, 8}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

// format takes the value, or nothing.
static void append(char *text, size_t size, const char *format, int value) {
    size_t used = strlen(text);
    snprintf(text + used, size - used, format, value);
}

static void append_number(char *text, size_t size, const Number *n, int value) {
    append(text, size, n->prefix ? ":" : ":%d", value);
    if (n->prefix) append(text, size, n->prefix, 0), append(text, size, "%d", value);
}

static int declared_numbers(const Mixer *m) {
    int n = 0;
    while (n < MAX_DECLARED && m->numbers[n].name) n++;
    return n;
}

static int within(const Number *n, int value) { return value < n->high ? value : n->high; }

// A unit of mixer m without its activation; false where the row has no such variety.
//   0        nothing given: the defaults
//   1 to 3   every number at its lowest, one above, two above
//   4 to 7   one number BEYOND the windows, the others one above their lowest
//   8, 9     the last number three times, and seven times: more than there are places to wait in
//   10       as 3, but the last number at its lowest
static bool unit_of(const Mixer *m, int variety, char *text, size_t size) {
    int n = declared_numbers(m), beyond = variety - 4;
    snprintf(text, size, "%s", m->name);
    if (variety == 0) return true;
    bool again = variety == 8 || variety == 9;
    if (n == 0 || (again && !m->repeats)) return false;
    if (variety >= 4 && variety < 8 && (beyond >= n || m->numbers[beyond].high < BEYOND))
        return false;
    for (int i = 0; i < n; i++) {
        const Number *d = &m->numbers[i];
        int value = d->low + (variety < 4 ? variety - 1 : variety == 10 ? 2 * (i < n - 1) : 1);
        append_number(text, size, d, i == beyond ? BEYOND : within(d, value));
    }
    for (int i = 1; again && i < (variety == 8 ? 3 : 7); i++)
        append(text, size, ":%d", within(&m->numbers[n - 1], m->numbers[n - 1].low + i % 3));
    return true;
}

// Texts that the units allow but the channels do not (a width) are left out.
static void add_case(const Mixer *m, int variety, int stack, int activation, const char *unit) {
    static const char *const stacks[2][STACKS] = {
        {"%s", "%s %s", "conv:2:1 %s block:2:1:3", "block:2:1:3 %s conv:2:1"},
        {"%s", "%s %s conv:2:1 mlp:1", "%s conv:2:1 block:2:1:3", "%s block:2:1:3 conv:2:1"}};
    int i = variety * STACKS + stack, turn = variety + stack + activation;
    Case c = {.number = n_cases, .stack = stack, .beyond = variety >= 4 && variety < 8,
              .B = shapes[(i + 3 * activation) % SHAPES].B,
              .T = shapes[(i + 3 * activation) % SHAPES].T,
              .dropout = turn % 2 ? 0.25f : 0, .passes = 1 + (turn / 2) % 2};
    int C = shapes[(i + 3 * activation) % SHAPES].C;
    snprintf(c.unit, sizeof c.unit, "%s", unit);
    // What names no activation, the neighbours, has another one.
    c.config = (Config){.channels = c.beyond && C > 8 ? 8 : C, .tie = turn / 3 % 2,
                        .activation = (Activation)((activation + 1) % N_ACTIVATIONS),
                        .softcap = turn % 5 == 0 ? 5.0625f : 0, .skips = stack > 0 && i % 3 == 1,
                        // without a norm one channel is a difference of much larger numbers, and
                        // squares of squares grow
                        .no_norm_in = C > 1 && i % 5 == 2, .no_bias = i % 7 == 3};
    c.config.no_norm_out = !c.config.tie && C > 1 && activation == 0 && i % 4 == 3;
    c.config.latent = c.config.tie ? c.config.channels : c.config.channels + 3;
    snprintf(c.config.units, sizeof c.config.units, stacks[m->input][stack], unit,
             unit);
    Error e;
    bool unfit = config_check(&c.config, &e) != 0;
    if (unfit && variety == 0) {  // defaults must fit a usual width
        c.config.latent += 8 - c.config.channels;
        c.config.channels = 8;
        unfit = config_check(&c.config, &e) != 0;
    }
    if (unfit) {
        if (variety == 0) check(false, "%s with its defaults: %s", m->name, e.text);
        return;
    }
    need(n_cases < MOST_CASES, "more cases than there is room for");
    cases[n_cases++] = c;
}

static void make_cases(void) {
    char unit[WORD];
    for (int i = 0; i < n_mixers; i++)
        for (int a = 0; a < (mixers[i]->activation ? N_ACTIVATIONS : 1); a++)
            for (int v = 0; v < VARIETIES; v++) {
                if (!unit_of(mixers[i], v, unit, sizeof unit)) continue;
                // The square of a square .. seven deep leaves the range of numbers.
                if (v == 9 && act_value((Activation)a, 1000) > 2000) continue;
                size_t used = strlen(unit);
                if (mixers[i]->activation)
                    snprintf(unit + used, sizeof unit - used, ":%s", activation_names[a]);
                for (int s = 0; s < STACKS; s++) add_case(mixers[i], v, s, a, unit);
            }
}

// The case in words. The text lasts until the next call.
static const char *words(const char *who, const Case *c) {
    static char text[UNITS_TEXT + 128];
    const Config *k = &c->config;
    snprintf(text, sizeof text, "%s, %s%s%s%s%s%s, B %d T %d C %d%s%s", who, k->units,
             k->tie ? ", tied" : "", k->skips ? ", skips" : "", k->no_norm_in ? ", no norm_in" : "",
             k->no_norm_out ? ", no norm_out" : "", k->no_bias ? ", no bias" : "", c->B, c->T,
             k->channels, c->dropout > 0 ? ", dropout" : "", c->passes > 1 ? ", 2 passes" : "");
    return text;
}

static Training training_of(const Case *c) {
    return (Training){.dropout = c->dropout, .byte_dropout = c->dropout / 2, .seed = 4,
                      .passes = c->passes,
                      // a large eps: a step is then no sign of a gradient that is almost zero
                      .hyper = {.steps = 10, .lr = 1e-2, .min_lr = 1e-3, .beta1 = 0.9,
                                .beta2 = 0.99, .eps = 1e-2, .weight_decay = 0.1, .clip = 1,
                                .ema = 0.9}};
}

static void open_case(Model *m, const Backend *be, const Case *c) {
    enum { BYTES = 400 };
    const Training training = training_of(c);
    uint8_t text[BYTES];
    const uint64_t length[] = {BYTES / 4, BYTES - BYTES / 4};
    Error e;
    open_or_die(m, be, &c->config, c->B, c->T, &training);
    fill_params(m, 403);
    for (int i = 0; i < BYTES; i++) text[i] = (uint8_t)(random_value(60, (size_t)i) * 128 + 128);
    if (model_set_corpus(m, text, length, 2, &e)) need(false, e.text);
}

// The gradients (n_params, host) of a step. Its loss is made NaN: the optimizer then changes
// nothing, and leaves them where they are.
static real *step_gradients(Model *m) {
    const double nan = NAN;
    real *host = new_reals(m->n_params);
    m->backend->upload(&m->state->loss_sum, &nan, sizeof nan);
    model_train_step(m);
    model_read(m, host, m->grads);
    m->backend->zero(m->grads, m->n_params * sizeof(real));
    return host;
}

// Where nothing but norm_out's bias (LayerNorm of one channel is its bias) or nothing but a byte
// itself comes through, some tensors cannot count.
static bool may_be_dead(const Model *m) {
    bool alone = m->config.channels == 1 || m->T == 1;
    // What weighs the bytes of a window of one.
    for (int u = 0; u < m->U; u++) alone = alone || m->units[u].mixer->reach(&m->units[u]) == 0;
    return alone;
}

// |a - b| / |b|, norms over the array. NaN if there is one.
static double norm_error(const real *a, const real *b, size_t n) {
    double diff = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(diff) / sqrt(size);
}

// Every tensor's gradient against another backend's, in one line: the worst of them. The largest of
// all is the measure of what is zero but for rounding.
static void compare_gradients(const Model *m, const char *where, const real *grads,
                              const real *expected, double bound, double zero) {
    double worst = 0, most = largest_value(expected, m->n_params);
    const char *name = "none";
    check(most > 0, "%s: there are gradients", where);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        const real *a = grads + t->offset, *b = expected + t->offset;
        bool dead = may_be_dead(m) && largest_value(b, t->size) <= zero * most;
        // of a dead tensor: beside the largest gradient of all, on the scale of the bound
        double error = dead ? largest_value(a, t->size) / most / zero * bound
                            : norm_error(a, b, t->size);
        if (!(error <= worst)) worst = error, name = t->name;
    }
    check_error(worst, bound, "%s: gradients, the worst of %s", where, name);
}

#if !IN_DOUBLE
// ---- One backend against another ----------------------------------------------------------------

typedef struct {
    double loss, gradient;  // relative
    double steps;           // the loss of any of a few steps, nats per byte
} Bounds;

// float32 differs by the order of its sums. bf16 activations keep 8 bits: a logit of 3 is rounded
// by up to 0.006, and what rounding does to a gradient falls only with the number of rows summed.
// Worst of 224 cases on an H100: 0.0007, 0.12 (the next 0.098), 0.006.
static Bounds bounds_of(const Backend *be) {
    if (be == &plain_backend) return (Bounds){1e-5, 1e-5, 1e-4};
    return be->act_bytes == 2 ? (Bounds){2e-3, 0.2, 1.5e-2} : (Bounds){1e-4, 1e-4, 1e-3};
}

// So backends in bf16 get more rows, and more channels than one.
static Case for_backend(const Backend *be, const Case *c) {
    Case larger = *c;
    if (be->act_bytes == 2) {
        larger.B = 4 * c->B, larger.T = c->T == 1 ? 1 : 4 * c->T + 1;
        if (c->config.channels == 1) larger.config.channels = 24;
        larger.config.latent += larger.config.channels - c->config.channels;
    }
    return larger;
}

enum { STEPS = 3 };

// Takes a few steps; their losses.
static void take_steps(Model *m, double losses[STEPS]) {
    StepFigures f[STEPS];
    for (int i = 0; i < STEPS; i++) model_train_step(m);
    m->backend->download(f, m->state->ring, sizeof f);
    for (int i = 0; i < STEPS; i++) losses[i] = (double)f[i].loss;
}

static void test_backend(const Backend *be, const Case *original) {
    Model m, cpu;
    const Case larger = for_backend(be, original), *c = &larger;
    const Bounds bounds = bounds_of(be);
    char where[UNITS_TEXT + 128];
    snprintf(where, sizeof where, "%s", words(be->name, c));
    open_case(&m, be, c);
    open_case(&cpu, &cpu_backend, c);
    real *grads = step_gradients(&m), *expected = step_gradients(&cpu);
    compare_gradients(&m, where, grads, expected, bounds.gradient, 1e-2);
    double losses[STEPS], expected_losses[STEPS], worst = 0;
    take_steps(&m, losses);
    take_steps(&cpu, expected_losses);
    for (int i = 0; i < STEPS; i++) {
        double error = fabs(losses[i] - expected_losses[i]);
        if (!(error <= worst)) worst = error;
    }
    check_error(fabs(losses[0] / expected_losses[0] - 1), bounds.loss, "%s: loss", where);
    check_error(worst, bounds.steps, "%s: losses of %d steps", where, STEPS);
    model_read(&m, grads, m.params);
    model_read(&cpu, expected, cpu.params);
    check_error(norm_error(grads, expected, m.n_params), bounds.gradient, "%s: parameters after",
                where);
    model_read(&m, grads, m.ema);
    model_read(&cpu, expected, cpu.ema);
    check_error(norm_error(grads, expected, m.n_params), bounds.gradient, "%s: their average",
                where);
    const char *error = be->error();
    if (error) check(false, "%s: %s", where, error);
    free(grads), free(expected);
    model_free(&m);
    model_free(&cpu);
}

// ---- Dropout ------------------------------------------------------------------------------------

enum { MOST_NOTED = 64 };
static uint32_t noted[MOST_NOTED];
static int n_noted;

static void noting_forward(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                           void *work) {
    if (e.drop.threshold && n_noted < MOST_NOTED) noted[n_noted++] = e.drop.purpose;
    cpu_backend.conv_forward(x, w, b, e, s, work);
}

// No two dropouts of a model draw the same numbers, nor two passes; inference drops nothing.
static void test_dropout(const Case *c) {
    Model m;
    Backend noting = cpu_backend;
    const Pass pass = {.first = 3};
    bool numbered = true, passes = true, inference = true, different = true;
    int before = 0;
    noting.conv_forward = noting_forward;
    open_case(&m, &noting, c);
    for (int i = 0; i < m.U; i++) {
        const Unit *u = &m.units[i];
        for (int j = 0; j < u->dropouts; j++) {
            Dropout d = unit_dropout(&m, u, j, &pass);
            numbered = numbered && d.purpose == RNG_DROPOUT + (uint32_t)before++;
            passes = passes && d.first == 3 * (uint64_t)m.T && d.threshold == 64;
            d = unit_dropout(&m, u, j, NULL);
            inference = inference && d.threshold == 0;
        }
    }
    for (int n = 0; n < m.B * m.T; n++) m.ids[n] = n % V;
    n_noted = 0;
    model_forward(&m, &pass);
    for (int i = 0; i < n_noted; i++) {
        different = different && noted[i] < RNG_DROPOUT + (uint32_t)before;
        for (int j = 0; j < i; j++) different = different && noted[i] != noted[j];
    }
    check(numbered, "dropout, %s: numbered one after the other", c->config.units);
    check(passes, "dropout, %s: a pass draws for rows of its own", c->config.units);
    check(inference, "dropout, %s: none in inference", c->config.units);
    check(different, "dropout, %s: no two draw the same", c->config.units);
    model_free(&m);
}

// ---- Causality and reach ------------------------------------------------------------------------

enum { ROWS = 3, CHANGED = 1, LONG = 128 };  // windows; the one that changes, the others watch

// Position n of the pass reads byte 83*n + 5: neighbours differ.
static int byte_at(size_t n) { return (int)((83 * n + 5) % V); }

// logits (N,V) with byte `at` of window CHANGED another one; -1: none.
static void forward_with(Model *m, int at, real *logits) {
    const Pass pass = {0};
    size_t N = (size_t)m->B * (size_t)m->T;
    int *ids = malloc(N * sizeof *ids);
    need(ids != NULL, "out of memory");
    for (size_t n = 0; n < N; n++) ids[n] = byte_at(n);
    if (at >= 0) ids[CHANGED * m->T + at] = (ids[CHANGED * m->T + at] + 101) % V;
    m->backend->upload(m->ids, ids, N * sizeof *ids);
    model_forward(m, &pass);
    m->backend->read_acts(logits, m->logits, N * V);
    free(ids);
}

static bool same_at(const real *a, const real *b, int n) {
    return same_bits(a + (size_t)n * V, b + (size_t)n * V, V);
}

// Changes byte t and looks at all outputs. reach: of the whole stack.
static void change_byte(Model *m, const char *where, int t, int64_t reach, const real *base,
                        real *now) {
    int T = m->T;
    bool others = true, before = true, after = true;
    forward_with(m, t, now);
    for (int n = 0; n < ROWS * T; n++) {
        bool same = same_at(base, now, n);
        if (n / T != CHANGED) others = others && same;
        if (n / T == CHANGED && n % T < t) before = before && same;
        if (n / T == CHANGED && n % T > t + reach) after = after && same;
    }
    check(others, "%s: byte %d changes no other row", where, t);
    check(before, "%s: byte %d changes nothing before it", where, t);
    check(!same_at(base, now, CHANGED * T + t), "%s: byte %d changes its own output", where, t);
    if (t + reach + 1 < T)
        check(after, "%s: byte %d changes nothing more than %lld later", where, t,
              (long long)reach);
    // Dropout may take the one way that leads there; and after seven taps in a row what is left of
    // a change may be less than bf16 can show.
    if (t + reach < T && m->training.dropout == 0 && m->backend->act_bytes >= 4)
        check(!same_at(base, now, CHANGED * T + t + (int)reach),
              "%s: byte %d changes the output %lld later", where, t, (long long)reach);
}

static void test_causality(const Backend *be, const Case *original) {
    Case c = *original;
    // Of one channel LayerNorm leaves the bias: nothing would reach the output.
    if (c.config.channels == 1) c.config.channels = 8;
    c.config.latent = c.config.channels;
    int64_t reach = config_receptive_field(&c.config) - 1;
    c.B = ROWS;
    c.T = reach + 4 <= LONG ? (int)reach + 4 : c.T;
    c.passes = 1;
    Model m;
    Training training = training_of(&c);
    char where[UNITS_TEXT + 128];
    snprintf(where, sizeof where, "%s", words(be->name, &c));
    open_or_die(&m, be, &c.config, c.B, c.T, &training);
    fill_params(&m, 100);
    size_t n = (size_t)c.B * (size_t)c.T * V;
    real *base = new_reals(n), *now = new_reals(n);
    forward_with(&m, -1, base);
    change_byte(&m, where, 0, reach, base, now);
    if (c.T > 1) change_byte(&m, where, 1, reach, base, now);
    if (c.T > 3) change_byte(&m, where, c.T / 2, reach, base, now);
    free(base), free(now);
    model_free(&m);
}

// ---- Streaming ----------------------------------------------------------------------------------

// S streams of the texts in m->ids, one a row, on a stream that has run before: -1, or the first
// position at which a bit differs from logits (N,V) or latents (N,D).
static int first_difference(Stream *s, int S, int T, const int *ids, const real *logits,
                            const real *latents) {
    int D = s->table.config.latent, at = -1;
    real *l = new_reals((size_t)S * V), *z = new_reals((size_t)S * (size_t)D);
    int bytes[MAX_STREAMS] = {0};
    stream_begin(s, S);
    for (int t = 0; t < 20; t++) stream_push(s, bytes, NULL, l);
    stream_begin(s, S);
    for (int t = 0; t < T && at < 0; t++) {
        for (int j = 0; j < S; j++) bytes[j] = ids[j * T + t];
        stream_push(s, bytes, z, l);
        for (int j = 0; j < S; j++) {
            size_t n = (size_t)(j * T + t);
            if (!same_bits(l + (size_t)j * V, logits + n * V, V) ||
                !same_bits(z + (size_t)j * (size_t)D, latents + n * (size_t)D, (size_t)D))
                at = t;
        }
    }
    free(l), free(z);
    return at;
}

static void test_streaming(const Case *c) {
    enum { STREAMS = 3 };
    // Longer than the rings: they wrap.
    int T = c->beyond ? 2 * BEYOND + 10 : 37, N = STREAMS * T;
    Model m;
    open_or_die(&m, &cpu_backend, &c->config, STREAMS, T, NULL);
    fill_params(&m, 77);
    for (int n = 0; n < N; n++)
        m.ids[n] = (int)(philox(5, (uint32_t)n, 0, 0, RNG_TEST).v[0] % V);
    model_forward(&m, NULL);
    for (int capacity = 1; capacity <= STREAMS; capacity += STREAMS - 1)
        for (int S = capacity; S > 0; S--) {
            Stream s;
            Error e;
            if (stream_open(&s, &c->config, m.params, capacity, &e)) need(false, e.text);
            int at = first_difference(&s, S, T, m.ids, m.logits, model_latents(&m));
            check(at < 0, "streaming, %s, C %d: %d of %d streams, %d bytes%s", c->config.units,
                  c->config.channels, S, capacity, T, at < 0 ? "" : ": a bit differs");
            stream_free(&s);
        }
    model_free(&m);
}

// The logits for the byte after a text of n, which begins at byte from + start of a longer one.
static void logits_after(const Case *c, const real *params, uint64_t from, uint64_t start, int n,
                         real *logits) {
    Stream s;
    Error e;
    if (stream_open(&s, &c->config, params, 1, &e)) need(false, e.text);
    s.position = from;
    s.starts[0] = start;
    for (int t = 0; t < n; t++) {
        int id = byte_at((size_t)t);
        stream_push(&s, &id, NULL, logits);
    }
    stream_free(&s);
}

// A text that begins far on: byte by byte as in a window that is told where it begins. Where the
// place in the text does not count, positions do by their differences alone.
static void test_far_on(const Case *c) {
    enum { LONGEST = 1000, FAR = 10000019 };
    int64_t field = config_receptive_field(&c->config);
    if (field > LONGEST) return;
    Model m;
    real here[V], far[V];
    open_or_die(&m, &cpu_backend, &c->config, 1, (int)field, NULL);
    fill_params(&m, 91);
    logits_after(c, m.params, FAR, 0, (int)field, far);
    if (config_absolute(&c->config)) {
        for (int t = 0; t < field; t++) m.ids[t] = byte_at((size_t)t);
        model_forward(&m, NULL);
        const real *last = (const real *)m.logits + (size_t)(field - 1) * V;
        check(!same_bits(far, last, V), "streaming, %s: far on is another place", c->config.units);
        m.starts[0] = FAR;
        model_forward(&m, NULL);
        check(same_bits(far, last, V), "streaming, %s: 10 million bytes on, bit for bit",
              c->config.units);
        logits_after(c, m.params, 0, FAR, (int)field, here);
        check(same_bits(here, far, V), "streaming, %s: a part that begins there", c->config.units);
    } else {
        logits_after(c, m.params, 0, 0, (int)field, here);
        check_error(relative_error(far, here, V), 1e-5,
                    "streaming, %s: 10 million bytes further on", c->config.units);
    }
    model_free(&m);
}

// ---- Scoring ------------------------------------------------------------------------------------

// A text cut into windows costs what it costs in one pass.
static void test_scoring(const Case *c) {
    enum { LONGEST = 1000 };
    int64_t field = config_receptive_field(&c->config);
    int n = (int)field + 37;
    if (field > LONGEST) return;
    Model whole, windows;
    Error e;
    uint8_t *text = malloc((size_t)n);
    int *ids = malloc(2 * (size_t)n * sizeof *ids);
    need(text && ids, "out of memory");
    real *losses = new_reals((size_t)n);
    open_or_die(&whole, &cpu_backend, &c->config, 1, n, NULL);
    open_or_die(&windows, &cpu_backend, &c->config, 2, (int)field + 4, NULL);
    fill_params(&whole, 55), fill_params(&windows, 55);
    for (int i = 0; i < n; i++) ids[i] = text[i] = (uint8_t)byte_at((size_t)i);
    for (int i = 0; i < n; i++) ids[n + i] = i + 1 < n ? ids[i + 1] : -1;
    model_losses(&whole, ids, ids + n, losses);
    for (int from = 0; from < n; from += n / 2) {
        double nats, sum = from ? 0 : log(V);
        for (int i = from ? from : 1; i < n; i++) sum += (double)losses[i - 1];
        if (model_score(&windows, text, (size_t)n, (size_t)from, &nats, NULL, &e))
            need(false, e.text);
        // Nearly: a mixer may be told a byte's position in its window.
        check_error(fabs(nats / sum - 1), 1e-6, "scoring, %s: %d bytes from %d on",
                    c->config.units, n, from);
    }
    if (config_absolute(&c->config)) {  // as it is while training: windows like those begin anew
        Config trained = c->config;
        Model m;
        double anew, part = 0;
        size_t scored = 0;
        trained.window = 12;
        open_or_die(&m, &cpu_backend, &trained, 2, 40, NULL);
        fill_params(&m, 55);
        if (model_score_windows(&m, text, (size_t)n, 1, 7, 6, &anew, NULL, &e) ||
            model_score_part(&m, text, (size_t)n, 1, (size_t)n, &part, &scored, NULL, &e))
            need(false, e.text);
        check(anew == part && scored == (size_t)n - 1, "scoring, %s: in windows of 12 that begin "
              "anew", c->config.units);
        model_free(&m);
    }
    free(text), free(ids), free(losses);
    model_free(&whole);
    model_free(&windows);
}

// ---- Checkpoints --------------------------------------------------------------------------------

static char folder[] = "/tmp/test_units.XXXXXX";

static bool same_config(const Config *a, const Config *b) {
    return a->channels == b->channels && a->latent == b->latent && a->activation == b->activation &&
           a->tie == b->tie && a->window == b->window && a->softcap == b->softcap &&
           a->skips == b->skips && a->no_norm_in == b->no_norm_in &&
           a->no_norm_out == b->no_norm_out && a->no_bias == b->no_bias &&
           strcmp(a->units, b->units) == 0;
}

static void test_checkpoint(const Case *c) {
    char path[64], where[UNITS_TEXT + 32];
    Model m;
    Error e;
    Checkpoint ck;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    snprintf(where, sizeof where, "checkpoint, %s", c->config.units);
    open_or_die(&m, &cpu_backend, &c->config, 1, 1, NULL);
    fill_params(&m, 31);
    const Role role = {"", m.params};
    bool saved = checkpoint_save(path, &m, &role, 1, NULL, 0, &e) == 0;
    check(saved, "%s: saved%s%s", where, saved ? "" : ": ", saved ? "" : e.text);
    bool opened = saved && checkpoint_open(&ck, path, &e) == 0;
    check(opened, "%s: opened%s%s", where, !saved || opened ? "" : ": ",
          !saved || opened ? "" : e.text);
    if (opened) {
        real *back = new_reals(m.n_params);
        check(same_config(&ck.config, &c->config) && checkpoint_match(&ck, &c->config, &e) == 0,
              "%s: the configuration comes back", where);
        check(ck.n_params == m.n_params && checkpoint_read(&ck, "", back, &e) == 0 &&
                  same_bits(back, m.params, m.n_params),
              "%s: every parameter comes back", where);
        free(back);
        checkpoint_close(&ck);
    }
    unlink(path);
    model_free(&m);
}

// ---- Text ---------------------------------------------------------------------------------------

static Unit parsed[MAX_UNITS], again[MAX_UNITS];

static void test_text(const Case *c) {
    char one[WORD], all[8 * WORD] = "";
    Error e;
    const Config *config = &c->config;
    int n = units_parse(config->units, config->channels, config->activation, config->window,
                        parsed, &e);
    for (int i = 0; i < n; i++) {
        unit_text(&parsed[i], config->activation, one, sizeof one);
        snprintf(all + strlen(all), sizeof all - strlen(all), " %s", one);
    }
    int m = units_parse(all, config->channels, config->activation, config->window, again, &e);
    bool same = n > 0 && m == n;
    for (int i = 0; i < n && same; i++)
        same = unit_same(&parsed[i], &again[i]) && again[i].index == i &&
               parsed[i].activation == again[i].activation;
    check(same, "text, %s: printed as%s, the same units", config->units, all);
    if (c->stack != 0) return;
    // Whatever is not `usual` is printed: the text is the unit as it was given.
    unit_text(&parsed[0], config->activation, one, sizeof one);
    bool given = parsed[0].mixer->activation && strchr(c->unit, ':');
    size_t bare = strlen(parsed[0].mixer->name);
    check(!given || strcmp(one, c->unit) == 0 || c->unit[bare + 1] > '9', "text, %s: printed as %s",
          c->unit, one);
}

// Of units_parse: the number of units, or minus the character that the message points at.
static int parse(const char *text) {
    Error e;
    int n = units_parse(text, 8, ACT_gelu, 0, parsed, &e);
    if (n >= 0) return n;
    const char *at = strstr(e.text, "at character ");
    return at ? -atoi(at + strlen("at character ")) : -9999;
}

static void check_parse(int expected, const char *text) {
    int n = parse(text);
    check(n == expected, "text, '%.60s': %d, expected %d (units, or minus the character)", text, n,
          expected);
}

// The same of `base` and an ending.
static void check_ending(int expected, const char *base, const char *format, int value) {
    char text[2 * WORD];
    snprintf(text, sizeof text, "%s", base);
    append(text, sizeof text, format, value);
    check_parse(expected, text);
}

// What the row does not allow, and where the message points.
static void test_refusals(const Mixer *m) {
    char text[WORD], base[WORD];
    int n = declared_numbers(m), length = (int)strlen(m->name);
    snprintf(base, sizeof base, "%s", m->name);
    for (int i = 0; i < n; i++) {
        const Number *d = &m->numbers[i];
        int at = (int)strlen(base) + 2;
        if (d->low > 0) check_ending(-at, base, ":%d", d->low - 1);
        check_ending(-at, base, ":%d", d->high + 1);
        check_ending(-at, base, ":1234567890", 0);
        append_number(base, sizeof base, d, d->low);
    }
    for (int i = n; m->repeats && i < MAX_NUMBERS; i++)
        append(base, sizeof base, ":%d", m->numbers[n - 1].low);
    check_parse(1, base);  // as many numbers as the row takes
    check_ending(-(int)strlen(base) - 2, base, ":%d", n ? m->numbers[n - 1].low : 1);
    check_ending(-length - 2, m->name, ":nothing", 0);
    check_ending(-length - 2, m->name, ":", 0);
    check_ending(-length - 1, m->name, ", conv", 0);
    snprintf(text, sizeof text, "2x(%s 3x (%s) ) (%s)", m->name, m->name, m->name);
    check_parse(9, text);
    if (m->activation) {
        snprintf(text, sizeof text, "%s:lrelu2 %s:none %s", m->name, m->name, m->name);
        check_parse(3, text);
        check(parsed[0].activation == ACT_lrelu2 && parsed[1].activation == ACT_none &&
                  parsed[2].activation == ACT_gelu, "text, %s: each its activation", text);
        check(!unit_same(&parsed[0], &parsed[1]), "text, %s: no two the same", text);
    }
}

// Pairs of bytes spread over the buckets as random numbers would: of those with one byte in common
// almost all differ, and no bucket is left out or crowded. (Low bits of a byte alone fail this.)
static void test_hash(void) {
    enum { BUCKETS = 4096 };
    static int load[BUCKETS];
    const LookupShape s = {1, 2, BUCKETS, 1, true}, bytes = {1, 2, V, 1, false};
    int fewest = V, least = V * V, most = 0;
    memset(load, 0, sizeof load);
    for (int a = 0; a < V; a++) {
        int last[2][V], different[2] = {0, 0};
        for (int b = 0; b < V; b++) {
            last[0][b] = lookup_key((const int[]){a, b}, 1, s);
            last[1][b] = lookup_key((const int[]){b, a}, 1, s);
            load[last[0][b]]++;
        }
        for (int side = 0; side < 2; side++) {
            for (int b = 0; b < V; b++) {
                int twice = 0;
                for (int c = 0; c < b; c++) twice += last[side][c] == last[side][b];
                different[side] += !twice;
            }
            if (different[side] < fewest) fewest = different[side];
        }
    }
    for (int i = 0; i < BUCKETS; i++) {
        if (load[i] < least) least = load[i];
        if (load[i] > most) most = load[i];
    }
    check(fewest > V * 9 / 10, "bigrams: of 256 pairs with a byte in common at least %d differ",
          fewest);
    check(least > 0 && most < 3 * V * V / BUCKETS, "bigrams: a bucket holds %d to %d pairs", least,
          most);
    const int ids[] = {7, BYTE_DROPPED, 9, 11};
    bool none = lookup_key(ids, 0, s) < 0 && lookup_key(ids, 1, s) < 0;
    none = none && lookup_key(ids, 2, s) < 0 && lookup_key(ids + 1, 1, s) < 0;
    check(none, "bigrams: none with a dropped byte, none where a window begins");
    check(lookup_key(ids, 3, (LookupShape){1, 4, BUCKETS, 1, true}) >= 0 &&
              lookup_key(ids, 2, bytes) == 9 && lookup_key(ids, 1, bytes) < 0,
          "look-up: bytes are their own rows, dropped ones have none");
}

// "Attention is all you need", a second time, near and far.
static void test_sinusoids(void) {
    enum { C = 33, T = 5 };
    const uint64_t starts[] = {0, 10000019};
    real x[2 * T * C], out[2 * T * C];
    double worst = 0;
    fill(x, 2 * T * C, 8, 0, 1);
    cpu_backend.inputs.positions(out, x, starts, 2, T, C);
    for (int n = 0; n < 2 * T; n++)
        for (int c = 0; c < C; c++) {
            double t = (double)(starts[n / T] + (uint64_t)(n % T));
            double angle = t / pow(10000, c / 2 * 2 / (double)C);
            double expected = (double)x[n * C + c] + (c % 2 ? cos(angle) : sin(angle));
            worst = fmax(worst, fabs((double)out[n * C + c] - expected));
        }
    check_error(worst, 3e-7, "positions: sines and cosines, at 0 and at 10 million");
}

// Which layers a skip goes from and to.
static void test_mirror(void) {
    static const int to[] = {-1, 9, -1, 7, -1, -1, -1, -1, -1, -1, -1};  // of unit 1 + i, L = 5
    Model m = {.config = {.channels = 8, .latent = 8, .units = "smear 10x(conv)", .skips = 2}};
    Error e;
    int wrong = 0;
    if (model_describe(&m, &e)) need(false, e.text);
    for (int i = 0; i < m.U; i++) {
        int up = m.units[i].skip.to ? m.units[i].skip.to->index : -1;
        wrong += up != to[i] || (up >= 0 && m.units[up].skip.from != &m.units[i]);
    }
    check(wrong == 0, "skips: 5 layers of 2 units behind an input: layer 0 to 4, layer 1 to 3");
    model_free(&m);
}

// Presets whose sizes are other systems': the paper's transformer, and golf (see README).
static void test_preset_sizes(void) {
    const Config both[] = {
        {.channels = 256, .latent = 256, .units = "positions 2x(attn:4:r0:n0 mlp:4)",
         .no_norm_in = true, .no_norm_out = true},
        {.channels = 512, .latent = 512, .units = "smear bigrams:4096:32 13x(attn:8:4096 mlp:2)",
         .tie = true, .no_bias = true, .skips = 2}};
    static const size_t sizes[] = {1776640, 27573864};
    for (int i = 0; i < 2; i++) {
        Model m = {.config = both[i]};
        Error e;
        if (model_describe(&m, &e)) need(false, e.text);
        check(m.n_params == sizes[i], "%s: %zu parameters, expected %zu", both[i].units, m.n_params,
              sizes[i]);
        model_free(&m);
    }
}

// Inputs stand first; a layer of --skips is a whole number of units, and one alone has no mirror.
static void test_order(void) {
    Error e;
    Config c = {.channels = 8, .latent = 8, .units = "smear 8x(conv)"};
    check_parse(4, "smear (bigrams positions) conv");
    check_parse(-6, "conv smear");
    check_parse(-7, "smear 2x(bigrams conv)");
    for (c.skips = -1; c.skips < 10; c.skips++) {
        // Two layers at least.
        bool divides = c.skips >= 0 && c.skips <= 4 && c.skips != 3;
        check((config_check(&c, &e) == 0) == divides, "skips %d of %s: %s", c.skips, c.units,
              divides ? "fits" : e.text);
    }
    c = (Config){.channels = 8, .latent = 8, .units = "conv", .tie = true, .no_norm_out = true};
    check(config_check(&c, &e) != 0, "no last LayerNorm and a tied head: %s", e.text);
}

static void test_grammar(void) {
    char text[2 * WORD];
    const char *groups = "2x(conv 2x(conv:3) )";
    const int taps[] = {2, 3, 3, 2, 3, 3};
    bool order = true;
    check_parse(6, groups);
    for (int i = 0; i < 6; i++)
        order = order && parsed[i].index == i && parsed[i].numbers[0] == taps[i];
    check(order, "text, '%s': the order of the groups", groups);
    check_parse(4096, "4096x(conv)");
    check_parse(-1, "4097x(conv)");
    check_parse(-14, "4095x(conv)  2x(conv)");
    check_parse(-13, "4096x(conv) conv");
    check_parse(-1, "0x(conv)");
    check_parse(-3, "3xconv");
    check_parse(-1, "3 conv");
    check_parse(-1, "1234567890x(conv)");
    check_parse(-3, "2x(conv");
    check_parse(-5, "conv)");
    check_parse(-1, "convolution");
    check_parse(-6, "conv\t?");
    check_parse(-9999, "");
    check_parse(-9999, " ( ) ");
    text[0] = 0;
    for (int i = 0; i < 16; i++) append(text, sizeof text, "(", 0);
    append(text, sizeof text, "conv", 0);
    for (int i = 0; i < 16; i++) append(text, sizeof text, ")", 0);
    check_parse(1, text);
    char deeper[2 * WORD + 2];
    snprintf(deeper, sizeof deeper, "(%s)", text);
    check_parse(-17, deeper);
}

#else
// ---- Gradients, in double -----------------------------------------------------------------------

// The loss that a training step differentiates.
static double step_loss(void *arg) {
    Model *m = arg;
    const Training *t = &m->training;
    size_t N = (size_t)m->B * (size_t)m->T;
    double sum = 0;
    for (int p = 0; p < t->passes; p++) {
        const Pass pass = {.first = (uint64_t)p * (uint64_t)m->B};
        m->backend->draw_batch(m->ids, m->targets, m->corpus, m->state, t->seed,
                               (uint32_t)(t->byte_dropout * 65536 + 0.5f), pass.first, m->B, m->T);
        model_forward(m, &pass);
        m->backend->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
        for (size_t n = 0; n < N; n++) sum += (double)m->losses[n];
    }
    return sum * (double)(1 / ((float)t->passes * (float)N));  // in float, as the step has it
}

// Finite differences of one CPU backend; the other one has the same gradients.
static void test_gradients(const Case *c) {
    Model m, other;
    bool swap = c->number / 2 % 2;
    const Backend *be = swap ? &plain_backend : &cpu_backend;
    char where[UNITS_TEXT + 128];
    open_case(&m, be, c);
    open_case(&other, swap ? &cpu_backend : &plain_backend, c);
    real *grads = step_gradients(&m), *others = step_gradients(&other);
    snprintf(where, sizeof where, "%s", words("cpu and plain", c));
    compare_gradients(&m, where, others, grads, 1e-10, 1e-10);
    snprintf(where, sizeof where, "%s", words(be->name, c));
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        check_gradient(where, t->name, m.params + t->offset, t->size, grads + t->offset,
                       may_be_dead(&m), step_loss, &m);
    }
    free(grads), free(others);
    model_free(&m);
    model_free(&other);
}

// A stack so deep that more weight gradients wait than there is room for. All parameters at once.
static void test_deep(const Mixer *mixer) {
    Case c = {.config = {.channels = 8, .latent = 11, .activation = ACT_gelu}, .B = 2, .T = 9,
              .dropout = 0.25f, .passes = 1};
    Model m;
    snprintf(c.config.units, sizeof c.config.units, "40x(%s)", mixer->name);
    open_case(&m, &cpu_backend, &c);
    real *grads = step_gradients(&m);
    check_gradient(words("cpu", &c), "every tensor", m.params, m.n_params, grads, false, step_loss,
                   &m);
    free(grads);
    model_free(&m);
}

#endif

// ---- All of them --------------------------------------------------------------------------------

#if IN_DOUBLE
int main(void) {
    set_threads(1);  // a hundred thousand tiny calls
    make_cases();
    for (int i = 0; i < n_mixers; i++) test_deep(mixers[i]);
    for (int i = 0; i < n_cases; i++) test_gradients(&cases[i]);
    return finish();
}
#else
// The program in double: its lines are taken over, and counted here.
static void run_in_double(const char *program) {
    char command[4096], line[4096];
    snprintf(command, sizeof command, "'%s_f64'", program);
    fflush(stdout);
    FILE *pipe = popen(command, "r");
    need(pipe != NULL, command);
    int before = passed;
    while (fgets(line, sizeof line, pipe)) {
        bool ok = strncmp(line, "ok ", 3) == 0, bad = strncmp(line, "FAIL", 4) == 0;
        if (ok || bad) {
            fputs(line, stdout);
            count_check(ok);
        }
    }
    check(pclose(pipe) == 0 && passed > before, "%s checks gradients and exits with 0", command);
}

static void test_gpu(void) {
    Error e;
    int n = 0;
    if (gpu_open(NULL, &e)) {
        skip("naive, tiled, tensor: every unit against the CPU (no GPU)");
        skip("naive, tiled, tensor: causality and reach of every unit (no GPU)");
        return;
    }
    const char *const *names = gpu_backend_names(&n);
    for (int i = 0; i < n; i++) {
        const Backend *be = gpu_backend(names[i], &e);
        if (!be) {
            printf("skip %s: %s\n", names[i], e.text);
            skipped++;
            continue;
        }
        for (int j = 0; j < n_cases; j++) test_backend(be, &cases[j]);
        for (int j = 0; j < n_cases; j++) test_causality(be, &cases[j]);
    }
}

int main(int argc, char **argv) {
    bool alone = argc == 2 && strcmp(argv[1], "--float") == 0;
    if (argc > 1 && !alone) {
        fprintf(stderr, "usage: test_units, or --float: without test_units_f64\n");
        return 2;
    }
    set_threads(1);  // a hundred thousand tiny calls; that threads change nothing: test_model
    make_cases();
    test_grammar();
    test_order();
    test_hash();
    test_sinusoids();
    test_mirror();
    test_preset_sizes();
    for (int i = 0; i < n_mixers; i++) test_refusals(mixers[i]);
    for (int i = 0; i < n_cases; i++) test_text(&cases[i]);
    for (int i = 0; i < n_cases; i++) test_backend(&plain_backend, &cases[i]);
    for (int i = 0; i < n_cases; i++)
        if (cases[i].dropout > 0) test_dropout(&cases[i]);
    for (int i = 0; i < n_cases; i++)
        test_causality(i % 2 ? &cpu_backend : &plain_backend, &cases[i]);
    for (int i = 0; i < n_cases; i++) test_streaming(&cases[i]);
    for (int i = 0; i < n_cases; i++) test_far_on(&cases[i]);
    for (int i = 0; i < n_cases; i++) test_scoring(&cases[i]);
    need(mkdtemp(folder) != NULL, "no folder for checkpoints");
    for (int i = 0; i < n_cases; i++)
        if (cases[i].stack == 2) test_checkpoint(&cases[i]);
    rmdir(folder);
    test_gpu();
    if (!alone) run_in_double(argv[0]);
    return finish();
}
#endif
