// test_model.c: the model as a whole, in float32, as the programs run it.
//
// Known sizes and known random numbers; units as text; what a fresh model says and what a step
// learns; that the order of the batch, the passes, the threads and the side stream change nothing;
// the data, the dropout and what is refused. Gradients are test_gradcheck's business, causality is
// test_causality's, and what must hold of every mixer is test_units'.
//   ./test_model
#include "fast/layers.h"
#include "support/arithmetic.h"
#include "tests/test.h"

static const Backend *const cpu = &cpu_backend;

static const Config small_paper = {.channels = 33, .latent = 40, .activation = ACT_gelu,
                                   .units = "2x(block:3:1:3)"};
static const Config small_prenorm = {.channels = 33, .latent = 33, .activation = ACT_gelu,
                                     .units = "2x(conv:3:1 conv:3:3)", .tie = true, .softcap = 30};

static Training training_of(int passes, float dropout) {
    return (Training){.dropout = dropout, .byte_dropout = dropout, .seed = 21, .passes = passes,
                      .hyper = {.steps = 100, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.99,
                                .eps = 1e-8, .weight_decay = 0.1, .clip = 1, .ema = 0.9}};
}

enum { TEXT = 3000 };
static uint8_t text[TEXT];  // bytes of all values

static void give_text(Model *m) {
    const uint64_t length[] = {1000, 20, 1980};  // the second is too short for most windows
    Error e;
    if (model_set_corpus(m, text, length, 3, &e)) need(false, e.text);
}

// One step, whose gradients stay in m->grads: with a loss of NaN the optimizer leaves everything as
// it is.
static void step_for_gradients(Model *m) {
    m->state->loss_sum = (double)NAN;
    model_train_step(m);
}

static real *copy_of(const Model *m, const real *role) {
    real *host = new_reals(m->n_params);
    model_read(m, host, role);
    return host;
}

static size_t offset_of(const Model *m, const char *name) {
    for (int i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0) return m->tensors[i].offset;
    need(false, name);
    return 0;
}

// ---- Sizes and random numbers ------------------------------------------------------------------

static void test_sizes(void) {
    Config paper = config_paper();
    Model m;
    open_or_die(&m, cpu, &paper, 1, 1, NULL);
    check(m.n_params == 1969920, "the paper's configuration has 1969920 parameters: %zu",
          m.n_params);
    check(config_receptive_field(&paper) == 43, "its receptive field is 43: %lld",
          (long long)config_receptive_field(&paper));
    size_t at = 0, decayed = 0;
    bool packed = true, named = true;
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        packed = packed && t->offset == at && t->decay == (t->ndim > 1) &&
                 t->decay == (t->offset < m.n_decay);
        at += t->size;
        if (t->decay) decayed += t->size;
        for (int j = 0; j < i; j++) named = named && strcmp(t->name, m.tensors[j].name) != 0;
    }
    check(packed && at == m.n_params && decayed == m.n_decay,
          "the tensors fill the parameters without a gap, matrices first");
    check(named, "no two tensors share a name");
    model_free(&m);
}

static void test_philox(void) {
    // Known answers published with Random123 (kat_vectors, philox4x32).
    static const struct {
        uint64_t key;
        uint32_t counter[4], ten[4], seven[4];  // answers by rounds
    } known[] = {
        {0, {0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
         {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
        {0xffffffffffffffff, {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
         {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
        {0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
         {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const uint32_t *c = known[i].counter;
        Philox ten = philox(known[i].key, c[0], c[1], c[2], c[3]);
        Philox seven = philox_rounds(7, known[i].key, c[0], c[1], c[2], c[3]);
        check(memcmp(ten.v, known[i].ten, sizeof ten.v) == 0, "philox: known answer %zu", i);
        check(memcmp(seven.v, known[i].seven, sizeof seven.v) == 0,
              "philox of seven rounds: known answer %zu", i);
    }
    Philox r = {{0x22221111, 0x44443333, 0x66665555, 0x88887777}};
    bool ok = true;
    for (int lane = 0; lane < 8; lane++)
        ok = ok && philox_lane(r, lane) == 0x1111 * (uint32_t)(lane + 1);
    check(ok, "philox: eight lanes of 16 bits");
}

#define DILATIONS32 ":1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1"

// Every size at its bounds and one beyond.
static void test_refusals(void) {
    const struct {
        const char *what;
        Config c;
        bool ok;
    } tries[] = {
#define C0 .channels = 4, .latent = 4, .activation = ACT_gelu
#define U1 .units = "block:2:1"
        {"a good one", {C0, U1}, true},
        {"0 channels", {.latent = 4, U1}, false},
        {"no latent", {.channels = 4, U1}, false},
        {"65536 channels", {.channels = 65536, .latent = 4, U1}, true},
        {"65537 channels", {.channels = 65537, .latent = 4, U1}, false},
        {"latent 65537", {.channels = 4, .latent = 65537, U1}, false},
        {"256 taps", {C0, .units = "block:256:1"}, true},
        {"257 taps", {C0, .units = "block:257:1"}, false},
        {"no unit", {C0}, false},
        {"32 dilations", {C0, .units = "block:2" DILATIONS32}, true},
        {"33 dilations", {C0, .units = "block:2" DILATIONS32 ":1"}, false},
        {"dilation 0", {C0, .units = "block:2:1:0"}, false},
        {"a tied head of another width", {.channels = 4, .latent = 5, U1, .tie = true}, false},
        {"softcap NaN", {C0, U1, .softcap = NAN}, false},
        {"softcap -1", {C0, U1, .softcap = -1}, false},
        {"an activation too many", {.channels = 4, .latent = 4, U1, .activation = N_ACTIVATIONS},
         false},
        {"activation -1", {.channels = 4, .latent = 4, U1, .activation = (Activation)-1}, false},
    };
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        Error e = {""};
        bool ok = config_check(&tries[i].c, &e) == 0;
        check(ok == tries[i].ok && (ok || e.text[0]), "configuration with %s is %s", tries[i].what,
              tries[i].ok ? "taken" : e.text);
    }
    Model m;
    Error e = {""};
    check(model_open(&m, cpu, &tries[0].c, 1 << 14, 1 << 14, NULL, &e) == -1 && e.text[0],
          "batch*seq beyond 2^27: %s", e.text);
    Config long_text = tries[0].c;
    memset(long_text.units, ' ', sizeof long_text.units);
    memcpy(long_text.units, "conv", 4);
    check(config_check(&long_text, &e) == -1 && strstr(e.text, "longer than 1023"),
          "units that do not end: %s", e.text);
    long_text.units[UNITS_TEXT - 1] = 0;
    check(config_check(&long_text, &e) == 0, "a text of units of 1023 characters is taken");
    model_free(&m);
    check(model_open(&m, cpu, &tries[0].c, 0, 1, NULL, &e) == -1, "batch 0: %s", e.text);
    model_free(&m);
    open_or_die(&m, cpu, &tries[0].c, 1, 30, NULL);
    const uint64_t length[] = {30, 12};
    check(model_set_corpus(&m, text, length, 2, &e) == -1, "texts of 30 and 12: %s", e.text);
    model_free(&m);
}

// ---- Units as text ------------------------------------------------------------------------------

static Unit units[MAX_UNITS];

// What is refused, and what the message must say. Channels 300: a mixer may be too wide for them.
static void test_units(void) {
    static char long_group[UNITS_TEXT];
    static const struct {
        const char *text, *fault[3];
    } tries[] = {
        {"", {"no unit", "conv"}},
        {"   ", {"no unit"}},
        {"()", {"no unit"}},
        {"3x()", {"no unit"}},
        {"convolution:2", {"expected a mixer, one of", "character 1,"}},
        {"conv:2:1 attend", {"expected a mixer, one of", "character 10,", "'attend'"}},
        {"Conv:2:1", {"expected a mixer", "character 1,"}},
        {":2", {"expected a mixer", "character 1,"}},
        {"conv:2:1,conv:2:2", {"expected a space", "character 9,"}},
        {"conv:2:1(conv)", {"expected a space", "character 9,"}},
        {"conv:2x", {"expected a space", "character 7,"}},
        {"conv:0:1", {"taps of conv is 0, expected 1 to 256", "character 6,"}},
        {"conv:257", {"taps of conv is 257, expected 1 to 256", "character 6,"}},
        {"conv:2:0", {"dilation of conv is 0, expected 1 to 1048576", "character 8,"}},
        {"conv:2:1048577", {"dilation of conv is 1048577, expected 1 to 1048576"}},
        {"block:3:1:2:1048577", {"dilation of block is 1048577", "character 13,"}},
        {"conv:2:1:1", {"conv takes at most 2 numbers", "character 10,"}},
        {"block:2" DILATIONS32 ":1", {"block takes at most 33 numbers", "character 73,"}},
        {"conv:4294967298", {"more than nine digits", "character 6,"}},
        {"99999999999x(conv)", {"more than nine digits", "character 1,"}},
        {"conv:-1", {"expected a number or an activation: none gelu lrelu2", "character 6,"}},
        {"conv:2:", {"expected a number or an activation", "'the end'"}},
        {"conv:2:relu", {"expected a number or an activation", "character 8,"}},
        {"conv:gelu:2", {"expected a space", "character 10,"}},
        {"conv:2:1:gelu:gelu", {"expected a space", "character 14,"}},
        {"attn:0", {"heads of attn is 0, expected 1 to 4096", "character 6,"}},
        {"attn:4:0", {"window of attn is 0, expected 1 to 16777216", "character 8,"}},
        {"attn:4:16777217", {"window of attn is 16777217", "character 8,"}},
        {"attn:4:-1", {"expected a number or kvG or rR or nN at", "character 8,"}},
        {"attn:4:kv", {"expected a number or kvG or rR or nN at", "character 8, 'kv'"}},
        {"attn:4:kvx", {"expected a number or kvG or rR or nN at", "character 8, 'kvx'"}},
        {"attn:4:r", {"expected a number or kvG or rR or nN at", "character 8, 'r'"}},
        {"attn:4:kv-1", {"expected a number or kvG or rR or nN at", "character 8,"}},
        {"attn:4:gelu", {"expected a number or kvG or rR or nN at", "character 8,"}},
        {"attn:", {"expected a number or kvG or rR or nN at", "'the end'"}},
        {"attn:4:kv2:", {"expected a number or kvG or rR or nN at", "'the end'"}},
        {"attn:4:kv2x", {"expected a space", "character 11,"}},
        {"attn:4:16:8", {"attn takes at most 2 numbers without a letter", "character 11,"}},
        {"attn:kv2:4:16:8", {"attn takes at most 2 numbers without a letter", "character 15,"}},
        {"attn:4:kv2:kv2", {"heads of keys and values of attn given twice", "character 12,"}},
        {"attn:4:r8:16:r4", {"rotated channels of attn given twice", "character 14,"}},
        {"attn:4:kv0", {"heads of keys and values of attn is 0, expected 1 to", "character 8,"}},
        {"attn:4:kv3", {"4 heads share 3 of keys and values, expected a divisor of 4"}},
        {"attn:4:kv8", {"4 heads share 8 of keys and values, expected a divisor of 4"}},
        {"attn:4:r7", {"7 channels of a head of 75 are rotated, expected an even number up to"}},
        {"attn:4:r76", {"76 channels of a head of 75 are rotated", "character 1,"}},
        {"attn:4:r130", {"rotated channels of attn is 130, expected 0 to 128", "character 8,"}},
        {"attn:7", {"7 heads of 300 channels, expected heads that divide them into parts of at "
                    "most 128", "character 1,"}},
        {"conv attn:2", {"2 heads of 300 channels", "at most 128", "character 6,"}},
        {"2(conv)", {"expected x and a group", "character 1,"}},
        {"2 conv", {"expected x and a group", "character 1,"}},
        {"2x conv", {"expected '('", "character 4,"}},
        {"0x(conv)", {"repeated no times", "character 1,"}},
        {"conv 2x(conv:2:1 (conv)", {"a group without its ')'", "character 8,"}},
        {"2x(conv:2:1", {"a group without its ')'", "character 3,"}},
        {"(conv))", {"a ')' too many", "character 7,"}},
        {")", {"a ')' too many", "character 1,"}},
        {"4097x(conv)", {"a stack too deep: more than 4096 units", "character 1,"}},
        {"conv 64x(64x(conv))", {"a stack too deep", "character 6,"}},
        {"999999999x(999999999x(conv))", {"a stack too deep"}},
        {"4096x(conv) conv", {"a stack too deep", "character 13,"}},
        {"((((((((((((((((((conv))))))))))))))))))", {"nested more than 16 deep", "character 17,"}},
    };
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        Error e = {""};
        bool ok = units_parse(tries[i].text, 300, ACT_gelu, 0, units, &e) == -1;
        for (int j = 0; j < 3 && tries[i].fault[j]; j++)
            ok = ok && strstr(e.text, tries[i].fault[j]);
        check(ok && !strchr(e.text, '\n'), "refused: %s", e.text);
    }
    Error e = {""};
    units_parse("attend", 300, ACT_gelu, 0, units, &e);
    bool all = true;
    for (int i = 0; i < n_mixers; i++) all = all && strstr(e.text, mixers[i]->name);
    check(all, "the message for an unknown mixer names all that there are");
    memset(long_group, ' ', sizeof long_group - 1);
    memcpy(long_group + sizeof long_group - 8, "(attend", 7);
    check(units_parse(long_group, 300, ACT_gelu, 0, units, &e) == -1 &&
              strstr(e.text, "character 1018, 'attend'"), "far behind: %s", e.text);
    // Whatever mixer has a width of its own: as many channels as there may be are too many.
    for (int i = 0; i < n_mixers; i++) {
        Unit u;
        if (!mixers[i]->width || mixers[i]->input) continue;  // an input's is its own number
        if (units_parse(mixers[i]->name, 1, ACT_gelu, 0, &u, &e) != 1) continue;
        if (mixers[i]->width(&u) <= 1) continue;
        check(units_parse(mixers[i]->name, MAX_CHANNELS, ACT_gelu, 0, units, &e) == -1 &&
                  strstr(e.text, "channels wide"), "refused: %s", e.text);
    }
}

// Parses `from` and writes every unit with unit_text.
static int written(const char *from, Activation usual, char *out, size_t size) {
    Error e = {""};
    char buffer[256];
    int n = units_parse(from, 4, usual, 0, units, &e);
    *out = 0;
    for (int i = 0; i < n; i++) {
        size_t used = strlen(out);
        snprintf(out + used, size - used, "%s%s", i ? " " : "",
                 unit_text(&units[i], usual, buffer, sizeof buffer));
    }
    if (n < 0) printf("     %s\n", e.text);
    return n;
}

// What is written is parsed as the same.
static void test_unit_text(void) {
    static const struct {
        const char *text, *flat;
    } tries[] = {
        {"conv", "conv:2:1"},
        {"conv:5", "conv:5:1"},
        {"block:3", "block:3:1"},
        {"block:3:1:2:4", "block:3:1:2:4"},
        {"conv:gelu", "conv:2:1"},
        {"conv:2:4:lrelu2", "conv:2:4:lrelu2"},
        {"conv:none block:2:3:1:none", "conv:2:1:none block:2:3:1:none"},
        {"conv:256:1048576", "conv:256:1048576"},
        {"block:2" DILATIONS32, "block:2" DILATIONS32},
        {" \t\n conv:2:1 \n", "conv:2:1"},
        {"(conv:2:1)", "conv:2:1"},
        {"3x(conv:2:7)", "conv:2:7 conv:2:7 conv:2:7"},
        {"3 x ( conv:2:7 )", "conv:2:7 conv:2:7 conv:2:7"},
        {"2x(conv:2:1 2x(conv:2:2)block) conv", "conv:2:1 conv:2:2 conv:2:2 block:2:1 "
                                                "conv:2:1 conv:2:2 conv:2:2 block:2:1 conv:2:1"},
        {"() conv 5x()", "conv:2:1"},
        {"1x(1x(conv))", "conv:2:1"},
        {"((((((((((((((((conv))))))))))))))))", "conv:2:1"},
    };
    static char once[4096], twice[4096];
    static Unit before[MAX_UNITS];
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        int n = written(tries[i].text, ACT_gelu, once, sizeof once);
        memcpy(before, units, sizeof before);
        int again = written(once, ACT_gelu, twice, sizeof twice);
        bool same = n == again && n > 0;
        for (int u = 0; u < n; u++)
            same = same && unit_same(&units[u], &before[u]) && units[u].index == u;
        check(same && strcmp(once, tries[i].flat) == 0 && strcmp(twice, once) == 0,
              "'%.40s' is written as '%.60s', and that is the same", tries[i].text, once);
    }
    written("conv:2:1:gelu", ACT_lrelu2, once, sizeof once);
    check(strcmp(once, "conv:2:1:gelu") == 0, "an activation that is not the usual one is written");
    written("conv:2:1", ACT_lrelu2, once, sizeof once);
    check(strcmp(once, "conv:2:1") == 0 && units[0].activation == ACT_lrelu2,
          "and the usual one is not");
    static const char *const others[] = {"conv:3:1", "conv:2:2", "block:2:1", "block:2:1:1",
                                         "conv:2:1:none"};
    Unit one, other;
    Error e;
    need(units_parse("conv:2:1", 4, ACT_gelu, 0, &one, &e) == 1, "a unit");
    int equal = 0;
    for (int i = 0; i < 5; i++) {
        need(units_parse(others[i], 4, ACT_gelu, 0, &other, &e) == 1, e.text);
        equal += unit_same(&one, &other);
    }
    check(equal == 0, "units that differ in mixer, numbers or activation are not the same");
    check(units_parse("4096x(conv)", 4, ACT_gelu, 0, units, &e) == MAX_UNITS &&
              units[MAX_UNITS - 1].index == MAX_UNITS - 1, "4096 units are taken");
    const Config c = {.channels = 4, .latent = 4, .units = "2x(conv:3:5 block:2:1:9) conv:1:70"};
    check(config_receptive_field(&c) == 1 + 2 * (2 * 5 + 10), "reaches add up: %lld",
          (long long)config_receptive_field(&c));
}

// ---- Arithmetic --------------------------------------------------------------------------------

// The fast exponential, and GELU and its slope over it, against the C library in double.
static void test_arithmetic(void) {
    double exp_error = 0, gelu_error = 0, slope_error = 0;
    for (int i = -800000; i <= 800000; i += 7) {
        double x = (double)(real)(i * 1e-4), a = sqrt(2 / acos(-1)), b = 0.044715;
        double u = a * (x + b * x * x * x), t = tanh(u);
        double slope = (1 + t) / 2 + x / 2 * (1 - t * t) * a * (1 + 3 * b * x * x);
        exp_error = fmax(exp_error, fabs((double)exp_real((real)x) / exp(x) - 1));
        gelu_error = fmax(gelu_error, fabs((double)gelu_value((real)x) - x / 2 * (1 + t)) /
                                          fmax(1, fabs(x)));
        slope_error = fmax(slope_error, fabs((double)gelu_slope((real)x) - slope));
    }
    check_error(exp_error, 3e-7, "exp from -80 to 80, relative");
    check_error(gelu_error, 3e-7, "gelu from -80 to 80");
    check_error(slope_error, 1e-6, "the slope of gelu from -80 to 80");
    check(exp_real(0) == 1, "exp(0) is 1");
    check(exp_real(-1000) >= 0 && exp_real(-1000) < 1e-37f && exp_real(1000) > 1e37f,
          "exp far outside: %g and %g", (double)exp_real(-1000), (double)exp_real(1000));
    check(exp_real((real)NAN) != exp_real((real)NAN), "exp(NaN) is NaN");
    const real far[] = {-1e4f, 1e4f};
    for (int i = 0; i < 2; i++)
        check(fabs((double)gelu_value(far[i]) - fmax(0, (double)far[i])) < 1e-30 &&
                  fabs((double)gelu_slope(far[i]) - i) < 1e-30,
              "gelu(%g) is %g, its slope %g", (double)far[i], (double)gelu_value(far[i]),
              (double)gelu_slope(far[i]));
    for (int a = 0; a < N_ACTIVATIONS; a++) {
        Activation f = (Activation)a;
        real mark = act_dropped(f);
        uint32_t bits;
        float as_float = (float)mark;
        memcpy(&bits, &as_float, 4);
        check(act_value(f, mark) == 0 && act_slope(f, mark) == 0 && (bits & 0xFFFF) == 0,
              "%s: where a value is dropped, at %g, it and its slope are 0; bf16 has that number",
              activation_names[f], (double)mark);
        check(activation_of(activation_names[f]) == f, "%s: is found by its name",
              activation_names[f]);
    }
    check(activation_of("") == N_ACTIVATIONS && activation_of("GELU") == N_ACTIVATIONS,
          "no other name is an activation's");
    check(lrelu2_value(3) == 9 && lrelu2_value(-3) == 2.25f && lrelu2_slope(3) == 6 &&
              lrelu2_slope(-3) == -1.5f, "lrelu2 of 3 and -3, and its slope");
    check(none_value(-3) == -3 && none_slope(-3) == 1, "no activation leaves a value as it is");
}

// act_row is act_value of each value, whatever the length and wherever the output lies.
static void test_act_row(void) {
    enum { MOST = 600 };
    real *pre = new_random(MOST, 1, 0, 3), *res = new_random(MOST, 2, 0, 1);
    real *out = new_reals(MOST), *own = new_reals(MOST);
    for (int a = 0; a < N_ACTIVATIONS; a++) {
        Activation f = (Activation)a;
        int places = 0;
        double worst = 0;
        pre[7] = act_dropped(f);
        for (int n = 1; n <= MOST; n += n == 1 ? 254 : n < 257 ? 1 : MOST - 257) {
            act_row(f, out, pre, res, 1.25f, n);
            memcpy(own, pre, MOST * sizeof *own);
            act_row(f, own, own, res, 1.25f, n);
            places += !same_bits(own, out, (size_t)n) || !same_bits(own + n, pre + n, MOST - n);
            memcpy(own, res, MOST * sizeof *own);
            act_row(f, own, pre, own, 1.25f, n);
            places += !same_bits(own, out, (size_t)n) || !same_bits(own + n, res + n, MOST - n);
            act_row(f, own, pre, NULL, 1.25f, n);
            for (int i = 0; i < n; i++) {
                double y = 1.25 * (double)act_value(f, pre[i]);
                double wrong = fmax(fabs((double)own[i] - y),
                                    fabs((double)out[i] - y - (double)res[i]));
                if (!(wrong <= worst)) worst = wrong;
            }
        }
        check_error(worst, 2e-6, "act_row, %s", activation_names[f]);
        check(places == 0, "act_row, %s: out may be pre or residual", activation_names[f]);
    }
    free(pre), free(res), free(out), free(own);
}

// One byte at a time gives the bits that many give, in any company, at every width.
static void test_conv_rows(void) {
    enum { ROWS = 23, K = 3, MOST = 300 };
    const int widths[] = {1, 15, 16, 33, 64, 128, 161, 300};
    real *x = new_random(ROWS * K * 40, 1, 0, 1), *w = new_random(K * 40 * MOST, 2, 0, 1);
    real *b = new_random(MOST, 3, 0, 1);
    real *many = new_reals(ROWS * MOST), *one = new_reals(MOST);
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        int O = widths[i], C = i % 2 ? 40 : 7, bad = 0;
        double worst = 0;
        const real *rows[K * ROWS];
        real *out[ROWS];
        for (int j = 0; j < ROWS * K; j++) rows[j] = x + j * 40;
        for (int j = 0; j < ROWS; j++) out[j] = many + j * O;
        conv_rows(out, rows, ROWS, w, b, K, C, O);
        for (int j = 0; j < ROWS; j++) {
            const real *alone[K];
            for (int k = 0; k < K; k++) alone[k] = rows[k * ROWS + j];
            conv_rows(&one, alone, 1, w, b, K, C, O);
            bad += !same_bits(one, out[j], (size_t)O);
            for (int o = 0; o < O; o++) {
                double sum = (double)b[o];
                for (int k = 0; k < K; k++)
                    for (int c = 0; c < C; c++)
                        sum += (double)alone[k][c] * (double)w[(k * C + c) * O + o];
                if (!(fabs(sum - (double)one[o]) <= worst)) worst = fabs(sum - (double)one[o]);
            }
        }
        check_error(worst, 1e-5, "conv_rows, C=%d O=%d", C, O);
        check(bad == 0, "conv_rows, C=%d O=%d: a row alone has the bits of a row among others", C,
              O);
    }
    free(x), free(w), free(b), free(many), free(one);
}

// ---- Fresh and trained -------------------------------------------------------------------------

static double mean_loss(Model *m, const uint8_t *bytes, real *losses) {
    int N = m->B * m->T;
    int *ids = calloc(2 * (size_t)N, sizeof *ids), *targets = ids + N;
    need(ids != NULL, "out of memory");
    for (int n = 0; n < N; n++) {
        ids[n] = bytes[n / m->T * (m->T + 1) + n % m->T];
        targets[n] = bytes[n / m->T * (m->T + 1) + n % m->T + 1];
    }
    model_losses(m, ids, targets, losses);
    double sum = 0;
    for (int n = 0; n < N; n++) sum += (double)losses[n];
    free(ids);
    return sum / N;
}

static void test_fresh(const char *name, Config config) {
    enum { B = 8, T = 64 };
    Model m, again;
    Error e;
    real losses[B * T];
    open_or_die(&m, cpu, &config, B, T, NULL);
    open_or_die(&again, cpu, &config, B, T, NULL);
    need(model_init_params(&m, 1, &e) == 0 && model_init_params(&again, 1, &e) == 0, e.text);
    // Logits of a fresh model have a standard deviation of about 0.3, which costs 0.05 nats.
    check_error(fabs(mean_loss(&m, text, losses) - log(256)), 0.1,
                "%s: a fresh model's loss is near ln 256 nats", name);
    check(same_bits(m.params, again.params, m.n_params), "%s: one seed, one model", name);
    need(model_init_params(&again, 2, &e) == 0, e.text);
    double worst = 0;
    bool vectors = true, differ = true;
    size_t twins = 0;  // two equal floats in a row are rare
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        const real *p = m.params + t->offset;
        size_t length = strlen(t->name);
        real start = strcmp(t->name + length - 6, "weight") == 0;  // a gain
        double squares = 0, fan_in = t->ndim == 3 ? t->dims[0] * t->dims[1] : t->dims[0];
        bool at_bytes = strstr(t->name, "embedding") || strstr(t->name, "head");
        double std = at_bytes ? 0.02 : 1 / sqrt(fan_in);
        if (config.no_norm_in && !config.tie && strstr(t->name, "embedding")) std = 1;
        for (size_t j = 0; j < t->size; j++) {
            squares += (double)p[j] * (double)p[j];
            if (!t->decay) vectors = vectors && p[j] == start;
        }
        if (!t->decay) continue;
        worst = fmax(worst, fabs(sqrt(squares / (double)t->size) / std - 1) *
                                sqrt((double)t->size));
        for (size_t j = 1; j < t->size; j++) twins += p[j] == p[j - 1];
        differ = differ && !same_bits(p, again.params + t->offset, t->size);
    }
    // The standard deviation of n normal numbers is off by 1/sqrt(2n): 5 times that is the bound.
    check_error(worst, 3.5, "%s: matrices have the standard deviation that they should", name);
    check(twins < 10, "%s: neighbours differ: %zu do not", name, twins);
    check(vectors, "%s: gains are 1 and biases 0", name);
    check(differ, "%s: another seed, another model", name);
    model_free(&m);
    model_free(&again);
}

// Four texts of one window each: every batch is drawn from those four.
static void test_overfit(const char *name, Config config) {
    enum { B = 4, T = 32, PARTS = 4, STEPS = 400 };
    const uint64_t length[PARTS] = {T + 1, T + 1, T + 1, T + 1};
    Training training = {.seed = 3, .passes = 1,
                         .hyper = {.steps = STEPS, .warmup = 10, .lr = 3e-3, .beta1 = 0.9,
                                   .beta2 = 0.99, .eps = 1e-8, .clip = 1}};
    uint8_t bytes[B * (T + 1)];
    // Letters as text has them, few of them; first bytes differ, or nobody could tell the texts.
    for (int i = 0; i < B * (T + 1); i++)
        bytes[i] = (uint8_t)(i % (T + 1) ? 'e' + (int)(4 * random_value(8, (size_t)i))
                                         : 'A' + i / (T + 1));
    Model m;
    Error e;
    real losses[B * T];
    open_or_die(&m, cpu, &config, B, T, &training);
    need(model_init_params(&m, 1, &e) == 0, e.text);
    need(model_set_corpus(&m, bytes, length, PARTS, &e) == 0, e.text);
    for (int i = 0; i < STEPS; i++) model_train_step(&m);
    check(m.state->step == STEPS, "%s: counts %d steps", name, STEPS);
    check_error(mean_loss(&m, bytes, losses), 0.05, "%s: %d steps learn one batch by heart: nats",
                name, STEPS);
    model_free(&m);
}

// ---- What must not matter ----------------------------------------------------------------------

// Rows of a batch in another order, alone, or cut shorter: the same bits.
static void test_batch_order(const char *name, Config config) {
    enum { B = 5, T = 47, HALF = T / 2 };
    int ids[B * T], targets[B * T], ids2[B * T], targets2[B * T];
    real losses[B * T], losses2[B * T];
    Model m, one, half, train;
    Training training = training_of(1, 0.3f);
    open_or_die(&m, cpu, &config, B, T, NULL);
    open_or_die(&one, cpu, &config, 1, T, NULL);
    open_or_die(&half, cpu, &config, 1, HALF, NULL);
    open_or_die(&train, cpu, &config, B, T, &training);
    Model *all[] = {&m, &one, &half, &train};
    for (int i = 0; i < 4; i++) fill_params(all[i], 5);
    for (int n = 0; n < B * T; n++) {
        ids[n] = text[n];
        targets[n] = n % 7 == 3 ? -1 : text[n + 1];
        int from = (n / T * 3 + 2) % B * T + n % T;  // rows 2 0 3 1 4
        ids2[n] = text[from];
        targets2[n] = from % 7 == 3 ? -1 : text[from + 1];
    }
    model_losses(&m, ids, targets, losses);
    model_losses(&m, ids2, targets2, losses2);
    int moved = 0, alone = 0, cut = 0, scored = 0;
    for (int b = 0; b < B; b++)
        moved += !same_bits(losses2 + b * T, losses + (b * 3 + 2) % B * T, T);
    check(moved == 0, "%s: rows in another order have the same losses", name);
    for (int b = 0; b < B; b++) {
        model_losses(&one, ids + b * T, targets + b * T, losses2);
        alone += !same_bits(losses2, losses + b * T, T);
        model_losses(&half, ids + b * T, targets + b * T, losses2);
        cut += !same_bits(losses2, losses + b * T, HALF);
    }
    check(alone == 0, "%s: a row alone has the same losses", name);
    check(cut == 0, "%s: a shorter window has the same losses", name);
    for (int n = 0; n < B * T; n++) scored += (losses[n] != 0) == (targets[n] >= 0);
    check(scored == B * T, "%s: a target of -1 is not scored, every other is", name);
    real *before = copy_of(&train, train.params);
    model_losses(&train, ids, targets, losses2);
    check(same_bits(losses2, losses, B * T),
          "%s: a model in training gives the same losses: no dropout", name);
    check(same_bits(before, train.params, train.n_params), "%s: scoring changes nothing", name);
    free(before);
    for (int i = 0; i < 4; i++) model_free(all[i]);
}

// Two passes of two windows are one pass of four.
static void test_passes(const char *name, Config config) {
    enum { T = 50 };
    Training one = training_of(1, 0.2f), two = training_of(2, 0.2f);
    Model whole, halves;
    open_or_die(&whole, cpu, &config, 4, T, &one);
    open_or_die(&halves, cpu, &config, 2, T, &two);
    Model *both[] = {&whole, &halves};
    for (int i = 0; i < 2; i++) {
        fill_params(both[i], 5);
        give_text(both[i]);
        both[i]->state->step = 3;
        step_for_gradients(both[i]);
    }
    check_error(relative_error(halves.grads, whole.grads, whole.n_params), 5e-6,
                "%s: gradients of two half batches", name);
    for (int i = 0; i < 2; i++) {
        cpu->zero(both[i]->grads, both[i]->n_params * sizeof(real));
        model_train_step(both[i]);
    }
    StepFigures a = whole.state->ring[3], b = halves.state->ring[3];
    check_error(fabs((double)a.loss / (double)b.loss - 1), 1e-6, "%s: their loss", name);
    check_error(fabs((double)a.grad_norm / (double)b.grad_norm - 1), 1e-6, "%s: their norm", name);
    model_free(&whole);
    model_free(&halves);
}

// A backend that would rather take a batch in halves gets it so, unless it is to be taken at once.
static size_t half_of(size_t N) { return N / 2; }
static void test_halving(Config config) {
    enum { T = 50 };
    Backend halving = *cpu;
    halving.pass_rows = half_of;
    Training as_it_likes = training_of(1, 0.2f), at_once = training_of(1, 0.2f);
    at_once.at_once = true;
    Model halves, whole, odd;
    open_or_die(&halves, &halving, &config, 4, T, &as_it_likes);
    open_or_die(&whole, &halving, &config, 4, T, &at_once);
    open_or_die(&odd, &halving, &config, 3, T, &as_it_likes);
    check(halves.B == 2 && halves.training.passes == 2, "a batch of 4 is taken in halves");
    check(whole.B == 4 && whole.training.passes == 1, "and whole where it is to be at once");
    check(odd.B == 3 && odd.training.passes == 1, "a batch of 3 has no halves");
    Model *both[] = {&whole, &halves};
    for (int i = 0; i < 2; i++) {
        fill_params(both[i], 5);
        give_text(both[i]);
        step_for_gradients(both[i]);
    }
    check_error(relative_error(halves.grads, whole.grads, whole.n_params), 5e-6,
                "gradients of both halves");
    model_free(&halves);
    model_free(&whole);
    model_free(&odd);
}

// ---- The side stream: the graph under a backend that runs it as late as it may

// What was queued between fork and end_fork and has not run yet.
typedef struct {
    enum { WEIGHTS, LOSSES } what;
    WeightJob jobs[MAX_WEIGHT_JOBS];
    int n, fork;
    ConvShape s;
    StepState *state;
    const real *losses;
    size_t N;
    void *work;
} Late;
enum { MOST_LATE = 64 };
static Late late[MOST_LATE];
static int n_late, late_forks;  // forks so far
static bool on_side;
static size_t most_late;
static const void *side_workspace;  // what calls on the side stream were given
static bool shared_workspace;       // and the main line, too

static void late_fork(void) {
    need(!on_side, "a fork ends before the next one");
    late_forks++;
    on_side = true;
}
static int late_end_fork(void) {
    on_side = false;
    return late_forks;
}
static void run_late(const Late *l) {
    if (l->what == WEIGHTS)
        cpu->conv_backward_weight(l->jobs, l->n, l->s, l->work);
    else
        cpu->add_losses(l->state, l->losses, l->N, l->work);
}
static void late_join(int fork) {
    int done = 0;
    while (done < n_late && late[done].fork <= fork) run_late(&late[done++]);
    memmove(late, late + done, (size_t)(n_late -= done) * sizeof *late);
}
static void queue_late(Late l) {
    l.fork = late_forks;
    if (!on_side) {
        run_late(&l);
        return;
    }
    need(n_late < MOST_LATE, "too many calls on the side stream");
    shared_workspace = shared_workspace || (side_workspace && side_workspace != l.work);
    side_workspace = l.work;
    late[n_late++] = l;
    if ((size_t)n_late > most_late) most_late = (size_t)n_late;
}
static void late_weight(const WeightJob *jobs, int n, ConvShape s, void *work) {
    Late l = {.what = WEIGHTS, .n = n, .s = s, .work = work};
    memcpy(l.jobs, jobs, (size_t)n * sizeof *jobs);
    queue_late(l);
}
static void late_losses(StepState *state, const real *losses, size_t N, void *work) {
    queue_late((Late){.what = LOSSES, .state = state, .losses = losses, .N = N, .work = work});
}

// Layers of the main line, for a look at the workspace that they are given.
static void late_norm_backward(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                               const real *gain, const real *bias, Epilogue e, size_t N, int C,
                               void *work) {
    shared_workspace = shared_workspace || work == side_workspace;
    cpu->norm_backward(again, dgain, dbias, dout, x, gain, bias, e, N, C, work);
}
static void late_conv_backward_input(const act *dy, const real *w, Epilogue e, ConvShape s,
                                     void *work) {
    shared_workspace = shared_workspace || work == side_workspace;
    cpu->conv_backward_input(dy, w, e, s, work);
}

// Whatever the side stream reads must stay, and nobody may use what it writes, until it is joined:
// else the bits differ from those of a backend that does all in order.
static void test_side_stream(const char *name, Config config, float dropout) {
    enum { B = 2, T = 50 };
    Backend lazy = *cpu;
    lazy.side_rows = B * T;
    lazy.fork = late_fork;
    lazy.end_fork = late_end_fork;
    lazy.join = late_join;
    lazy.conv_backward_weight = late_weight;
    lazy.add_losses = late_losses;
    lazy.norm_backward = late_norm_backward;
    lazy.conv_backward_input = late_conv_backward_input;
    Training training = training_of(2, dropout);
    Model m[2];
    open_or_die(&m[0], cpu, &config, B, T, &training);
    open_or_die(&m[1], &lazy, &config, B, T, &training);
    most_late = 0;
    late_forks = 0;
    side_workspace = NULL;
    shared_workspace = false;
    for (int i = 0; i < 2; i++) {
        fill_params(&m[i], 5);
        give_text(&m[i]);
        for (int step = 0; step < 3; step++) model_train_step(&m[i]);
    }
    check(!m[0].side_stream && m[1].side_stream && most_late > 2 && n_late == 0 && !on_side,
          "%s: the side stream is used, and joined by the end of a step", name);
    check(side_workspace && !shared_workspace, "%s: it has a workspace of its own", name);
    check(same_bits(m[0].params, m[1].params, m[0].n_params) &&
              same_bits(m[0].v, m[1].v, m[0].n_params) &&
              memcmp(m[0].state->ring, m[1].state->ring, 3 * sizeof *m[0].state->ring) == 0,
          "%s: a side stream that runs as late as it may changes no bit", name);
    model_free(&m[0]);
    model_free(&m[1]);
    Model large;
    open_or_die(&large, &lazy, &config, B, T + 1, &training);
    check(!large.side_stream, "%s: no side stream where a pass has more rows", name);
    model_free(&large);
}

// The two CPU backends take the same steps, but for the order of their sums.
static void test_plain(const char *name, Config config) {
    enum { B = 3, T = 40, STEPS = 8 };
    const Backend *const both[] = {&plain_backend, cpu};
    Training training = training_of(2, 0.2f);
    double loss[2][STEPS], worst = 0, norms = 0;
    for (int i = 0; i < 2; i++) {
        Model m;
        open_or_die(&m, both[i], &config, B, T, &training);
        fill_params(&m, 5);
        give_text(&m);
        for (int step = 0; step < STEPS; step++) model_train_step(&m);
        for (int step = 0; step < STEPS; step++) {
            StepFigures f = m.state->ring[step];
            loss[i][step] = (double)f.loss;
            if (i == 0) norms += (double)f.grad_norm;
        }
        model_free(&m);
    }
    for (int step = 0; step < STEPS; step++) {
        double apart = fabs(loss[0][step] - loss[1][step]);
        if (!(apart <= worst)) worst = apart;
    }
    check_error(worst, 1e-5, "%s: %d steps on plain and on cpu: losses", name, STEPS);
    check(norms > 0 && fabs(loss[0][0] - loss[0][STEPS - 1]) > 1e-2,
          "%s: on which the loss moves from %.4f to %.4f", name, loss[0][0], loss[0][STEPS - 1]);
}

// Parameters, average and moments after three steps of everything.
static real *three_steps(Config config, int threads, size_t *n) {
    enum { B = 3, T = 110 };
    set_threads(threads);
    Training training = training_of(2, 0.2f);
    Model m;
    open_or_die(&m, cpu, &config, B, T, &training);
    fill_params(&m, 5);
    give_text(&m);
    for (int i = 0; i < 3; i++) model_train_step(&m);
    *n = 4 * m.n_params + RING;
    real *out = new_reals(*n);
    model_read(&m, out, m.params);
    model_read(&m, out + m.n_params, m.m);
    model_read(&m, out + 2 * m.n_params, m.v);
    model_read(&m, out + 3 * m.n_params, m.ema);
    for (int i = 0; i < RING; i++) out[4 * m.n_params + (size_t)i] = (real)m.state->ring[i].loss;
    model_free(&m);
    return out;
}

static void test_threads(const char *name, Config config) {
#ifdef _OPENMP
    const int counts[] = {1, 2, 5};
    size_t n;
    real *first = three_steps(config, 1, &n);
    for (int i = 0; i < 3; i++) {
        real *now = three_steps(config, counts[i], &n);
        check(same_bits(now, first, n), "%s: %d thread%s: the same bits", name, counts[i],
              i ? "s" : ", once more");
        free(now);
    }
    free(first);
    set_threads(1);
#else
    size_t n;
    real *first = three_steps(config, 1, &n), *again = three_steps(config, 1, &n);
    check(same_bits(again, first, n), "%s: a second run gives the same bits", name);
    free(first), free(again);
    skip("1, 2 and 5 threads give the same bits: built without OpenMP");
#endif
}

// ---- Data and dropout --------------------------------------------------------------------------

static void test_batches(void) {
    enum { B = 4, T = 21, FIRST = 979, SECOND = 1959, DRAWS = 20 * (FIRST + SECOND) };
    Training training = training_of(1, 0);
    Model m;
    open_or_die(&m, cpu, &small_paper, B, T, &training);
    give_text(&m);
    // Texts of 1000, 20 and 1980 bytes hold 979, 0 and 1959 windows of T+1 bytes.
    check(m.corpus.n_windows == FIRST + SECOND, "windows lie inside one text: %llu",
          (unsigned long long)m.corpus.n_windows);
    static int hits[TEXT];
    int strange = 0, missed = 0, wrong = 0;
    double chi2 = 0;  // sum of (hits - 20)^2 / 20: about its number of terms, give or take
    for (uint64_t i = 0; i < DRAWS; i++) {
        uint64_t start = window_start(&m.corpus, 5, 7, i);
        if (start < TEXT) hits[start]++;
        strange += start >= TEXT;
    }
    for (int i = 0; i < TEXT; i++) {
        bool allowed = i < FIRST || (i >= 1020 && i < 1020 + SECOND);
        if (!allowed) strange += hits[i];
        if (!allowed) continue;
        missed += hits[i] == 0;
        chi2 += (hits[i] - 20) * (hits[i] - 20) / 20.0;
    }
    check(strange == 0, "no window reaches from one text into the next");
    check(missed == 0, "every window is drawn");
    check_error(fabs(chi2 / (FIRST + SECOND) - 1), 0.15, "windows are drawn evenly");
    m.state->step = 7;
    cpu->draw_batch(m.ids, m.targets, m.corpus, m.state, 5, 0, 2, B, T);
    for (int n = 0; n < B * T; n++) {
        const uint8_t *window = text + window_start(&m.corpus, 5, 7, 2 + (uint64_t)(n / T));
        wrong += m.ids[n] != window[n % T] || m.targets[n] != window[n % T + 1];
    }
    check(wrong == 0, "a batch is its windows' bytes, the targets those that follow");
    model_free(&m);
}

// The kept share of n elements that each stay with probability keep, in standard deviations.
static double deviations(size_t kept, size_t n, double keep) {
    return fabs((double)kept / (double)n - keep) / sqrt(keep * (1 - keep) / (double)n);
}

static void test_byte_dropout(void) {
    enum { B = 6, T = 1000 };
    Training training = training_of(1, 0);
    Model m;
    open_or_die(&m, cpu, &small_paper, B, T, &training);
    const uint64_t length = TEXT;
    Error e;
    need(model_set_corpus(&m, text, &length, 1, &e) == 0, e.text);
    int whole[B * T], part[2 * T], targets[B * T], next[B * T];
    size_t kept = 0;
    const uint32_t threshold = 65536 / 4;
    cpu->draw_batch(whole, targets, m.corpus, m.state, 5, threshold, 0, B, T);
    bool as_defined = true;
    for (int n = 0; n < B * T; n++) {
        Philox r = philox(5, (uint32_t)n / 8, 0, m.state->step, RNG_BYTE_DROPOUT);
        bool dropped = whole[n] == BYTE_DROPPED;
        kept += !dropped;
        as_defined = as_defined && dropped == (philox_lane(r, n % 8) < threshold);
    }
    check(as_defined, "byte dropout draws lane i%%8 of (seed; i/8, step, RNG_BYTE_DROPOUT)");
    check_error(deviations(kept, B * T, 0.75), 4, "byte dropout 0.25 keeps %zu of %d: deviations",
                kept, B * T);
    bool same = true;
    for (int first = 0; first < B; first += 2) {
        cpu->draw_batch(part, targets, m.corpus, m.state, 5, threshold, (uint64_t)first, 2, T);
        same = same && memcmp(part, whole + first * T, sizeof part) == 0;
    }
    check(same, "bytes drawn and dropped do not depend on the passes");
    m.state->step++;
    cpu->draw_batch(next, targets, m.corpus, m.state, 5, threshold, 0, B, T);
    size_t both = 0;
    for (int n = 0; n < B * T; n++) both += whole[n] == BYTE_DROPPED && next[n] == BYTE_DROPPED;
    check_error(deviations(both, B * T, 0.0625), 4, "the next step drops others: deviations");
    model_free(&m);
}

// Byte of a draw that decides about (row, o), by the definition: draws are numbered along the 8
// channels that each serves, then along the rows, of which those 8 apart share one.
static uint32_t dropout_byte(const Dropout *d, uint64_t row, uint64_t o, uint64_t O) {
    uint64_t pair = row % 16 < 8 ? row : row - 8;  // the first of the two rows
    uint64_t before = pair / 16 * 8 + pair % 16, number = before * ((O + 7) / 8) + o / 8;
    Philox r = philox_rounds(7, d->seed, (uint32_t)number, (uint32_t)(number >> 32),
                             d->state->step, d->purpose);
    uint8_t bytes[16];  // least significant first
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(r.v[i / 4] >> i % 4 * 8);
    return bytes[o % 8 + (row == pair ? 0 : 8)];
}

static void test_dropout_definition(const Dropout *d) {
    const int widths[] = {1, 8, 33, 256};
    const uint64_t from[] = {0, 37, ((uint64_t)1 << 36) + 5};
    int wrong = 0;
    for (int i = 0; i < 12; i++)
        for (uint64_t row = from[i / 4]; row < from[i / 4] + 40; row++)
            for (int o = 0, O = widths[i % 4]; o < O; o++) {
                uint32_t byte = dropout_byte(d, row, (uint64_t)o, (uint64_t)O);
                Philox r = dropout_draw(d->seed, d->purpose, d->state->step, row, o, O);
                // dropped below a threshold beyond its byte, and only there
                wrong += is_dropped(r, byte, row, o) || !is_dropped(r, byte + 1, row, o);
            }
    check(wrong == 0, "dropout: every value has its own byte of (seed; draw, step, purpose)");
}

enum { ROWS = 300, WIDTH = 33, VALUES = ROWS * WIDTH };  // WIDTH: no multiple of a draw's 8

// Which values dropout keeps: a conv with one tap whose pre is 1 everywhere, added to a residual of
// 1. *wrong: values that are neither scale * f(1) beside a pre of 1 nor 0 beside the mark of f.
static void keep_mask(bool *kept, Activation f, Dropout d, int rows, int *wrong) {
    size_t n = (size_t)rows * WIDTH;
    real *x = new_random((size_t)rows, 1, 1, 0), *w = new_random(WIDTH, 1, 1, 0);
    real *res = new_random(n, 1, 1, 0);
    real *pre = new_reals(n), *out = new_reals(n), expected = 1 + act_value(f, 1) * (real)d.scale;
    real *work = new_reals(cpu->work_bytes((size_t)rows, 1, V, 1) / sizeof(real) + 1);
    const Epilogue e = {.out = out, .pre = pre, .residual = res, .activation = f, .drop = d};
    cpu->conv_forward(x, w, NULL, e, (ConvShape){1, rows, 1, WIDTH, 1, 1}, work);
    for (size_t i = 0; i < n; i++) {
        kept[i] = pre[i] == 1;
        *wrong += kept[i] ? !(fabs((double)out[i] - (double)expected) < 1e-6)
                          : !(pre[i] == act_dropped(f) && out[i] == 1);
    }
    free(x), free(w), free(res), free(pre), free(out), free(work);
}

// How far two masks are from knowing nothing of each other: what both keep is then keep^2 of all,
// give or take. The second is `shift` values further on in its array.
static double dependence(const bool *a, const bool *b, int shift, double keep) {
    size_t both = 0, n = (size_t)(VALUES - shift);
    for (size_t i = 0; i < n; i++) both += a[i] && b[i + (size_t)shift];
    return deviations(both, n, keep * keep);
}

static void test_dropout(void) {
    static bool kept[VALUES], other[VALUES];
    const double keep = 205 / 256.0;  // 1 - threshold/256
    StepState state = {.step = 2}, next = {.step = 3};
    const Dropout d = {.threshold = 51, .scale = 256 / 205.0f, .seed = 6,
                       .purpose = RNG_DROPOUT + 1, .state = &state};
    int wrong = 0, moved = 0, undefined = 0;
    size_t n_kept = 0;
    test_dropout_definition(&d);
    keep_mask(kept, ACT_gelu, d, ROWS, &wrong);
    for (int i = 0; i < VALUES; i++) {
        n_kept += kept[i];
        undefined += kept[i] != (dropout_byte(&d, i / WIDTH, i % WIDTH, WIDTH) >= d.threshold);
    }
    check(undefined == 0, "dropout takes what its definition says");
    check_error(deviations(n_kept, VALUES, keep), 4, "dropout 51/256 keeps %zu of %d: deviations",
                n_kept, VALUES);
    const int first[] = {1, 8, 16, 101};  // where a pass may start
    for (int i = 0; i < 4; i++) {
        Dropout part = d;
        part.first = (uint64_t)first[i];
        int rest = ROWS - first[i];
        keep_mask(other, ACT_gelu, part, rest, &wrong);
        moved += memcmp(other, kept + first[i] * WIDTH, (size_t)rest * WIDTH) != 0;
    }
    check(moved == 0, "masks do not depend on the passes");
    moved = 0;
    for (int f = 0; f < N_ACTIVATIONS; f++) {
        keep_mask(other, (Activation)f, d, ROWS, &wrong);
        moved += memcmp(other, kept, sizeof kept) != 0;
    }
    check(moved == 0, "nor on the activation");
    const Dropout changed[] = {
        {d.threshold, d.scale, d.seed, d.purpose + 1, 0, &state},
        {d.threshold, d.scale, d.seed, d.purpose, 0, &next},
        {d.threshold, d.scale, d.seed + 1, d.purpose, 0, &state},
    };
    const char *const what[] = {"layers", "steps", "seeds"};
    for (int i = 0; i < 3; i++) {
        keep_mask(other, ACT_gelu, changed[i], ROWS, &wrong);
        check_error(dependence(kept, other, 0, keep), 4,
                    "masks of two %s are independent: deviations", what[i]);
    }
    const struct {
        int rows, channels;
    } apart[] = {{8, 0}, {1, 0}, {16, 0}, {0, 1}, {0, 4}, {0, 8}};  // the first share their draw
    for (int i = 0; i < 6; i++)
        check_error(dependence(kept, kept, apart[i].rows * WIDTH + apart[i].channels, keep), 4,
                    "masks %d rows and %d channels apart are independent: deviations",
                    apart[i].rows, apart[i].channels);
    check(wrong == 0, "what dropout keeps is multiplied by 1/(1-p); the rest is stored as a mark");
}

// ---- Steps that go wrong, and the average ------------------------------------------------------

static void test_not_finite(void) {
    Training training = training_of(1, 0);
    Model m;
    open_or_die(&m, cpu, &small_paper, 2, 20, &training);
    fill_params(&m, 5);
    give_text(&m);
    model_train_step(&m);
    size_t bias = offset_of(&m, "units.0.conv.1.bias");
    m.params[bias] = (real)NAN;
    real *params = copy_of(&m, m.params), *first = copy_of(&m, m.m), *second = copy_of(&m, m.v);
    real *ema = copy_of(&m, m.ema);
    model_train_step(&m);
    check(m.state->step == 1, "a loss of NaN: the step is not counted");
    check(same_bits(params, m.params, m.n_params) && same_bits(ema, m.ema, m.n_params) &&
              same_bits(first, m.m, m.n_params) && same_bits(second, m.v, m.n_params),
          "a loss of NaN: parameters, average and moments stay");
    float noted = m.state->ring[1].loss;
    check(noted != noted, "a loss of NaN: noted for the host to see");
    bool found = false;
    for (size_t i = 0; i < m.n_params; i++) found = found || m.grads[i] != m.grads[i];
    check(found, "a loss of NaN: its gradients stay, to be looked at");
    m.params[bias] = 0;
    cpu->zero(m.grads, m.n_params * sizeof *m.grads);
    model_train_step(&m);
    check(m.state->step == 2 && m.state->ring[1].loss < 100, "after it, training can go on");
    free(params), free(first), free(second), free(ema);
    model_free(&m);
}

static void test_average(void) {
    Training training = training_of(1, 0);
    Model m;
    Error e;
    open_or_die(&m, cpu, &small_prenorm, 2, 20, &training);
    need(model_init_params(&m, 3, &e) == 0, e.text);
    check(same_bits(m.params, m.ema, m.n_params), "the average starts as the fresh parameters");
    model_free(&m);
    training.hyper.ema = 0;
    open_or_die(&m, cpu, &small_prenorm, 2, 20, &training);
    give_text(&m);
    model_train_step(&m);
    check(m.ema == NULL && m.state->step == 1, "a run without an average has none, and steps");
    model_free(&m);
}

// Every activation in one stack, blocks and convs side by side, more of them than wait together.
static void test_mixed(void) {
    Config mixed = {.channels = 33, .latent = 33, .activation = ACT_gelu, .tie = true,
                    .units = "2x(conv:3:1:lrelu2 block:2:1:3 4x(conv:2:4:none) block:1:1:1) conv"};
    test_side_stream("mixed", mixed, 0.2f);
    test_plain("mixed", mixed);
    test_passes("mixed", mixed);
    test_threads("mixed", mixed);
    test_batch_order("mixed", mixed);
}

// Every mixer with its defaults, above and below itself and the others, with and without what may
// still be read on the side stream when the units begin: a head of its own, dropout.
static void test_mixers(void) {
    for (int i = 0; i < 4 * n_mixers; i++) {
        const char *mixer = mixers[i / 4]->name;
        char name[100];
        Config c = {.channels = 20, .latent = i % 2 ? 20 : 25, .activation = ACT_gelu,
                    .tie = i % 2, .skips = 1 + i % 2, .no_norm_out = i % 4 == 2,
                    .no_norm_in = i % 4 == 3, .no_bias = i % 4 == 1};
        float dropout = i / 2 % 2 ? 0.2f : 0;
        snprintf(c.units, sizeof c.units,
                 mixers[i / 4]->input ? "%s 3x(%s) 2x(conv:3:1 block:2:1:3)"
                                      : "2x(conv:3:1 %s block:2:1:3 3x(%s))", mixer, mixer);
        snprintf(name, sizeof name, "%s%s%s", mixer, c.tie ? ", tied" : "",
                 dropout > 0 ? ", dropout" : "");
        test_side_stream(name, c, dropout);
    }
}

int main(void) {
    set_threads(1);  // small work: threads would mostly wait. test_threads sets its own number
    for (int i = 0; i < TEXT; i++) text[i] = (uint8_t)(random_value(60, (size_t)i) * 128 + 128);
    const struct {
        const char *name;
        Config config;
    } forms[] = {{"paper", small_paper}, {"prenorm, tied, softcap", small_prenorm}};
    test_sizes();
    test_philox();
    test_refusals();
    test_units();
    test_unit_text();
    test_arithmetic();
    test_act_row();
    test_conv_rows();
    test_batches();
    test_byte_dropout();
    test_dropout();
    test_not_finite();
    test_average();
    Config bare = small_paper;
    bare.no_norm_in = true;
    test_fresh("paper without its first norm", bare);
    test_mixed();
    test_mixers();
    for (int i = 0; i < 2; i++) {
        test_fresh(forms[i].name, forms[i].config);
        test_batch_order(forms[i].name, forms[i].config);
        test_passes(forms[i].name, forms[i].config);
        if (i == 0) test_halving(forms[i].config);
        test_threads(forms[i].name, forms[i].config);
        test_side_stream(forms[i].name, forms[i].config, 0.2f);
        test_plain(forms[i].name, forms[i].config);
        test_overfit(forms[i].name, forms[i].config);
    }
    return finish();
}
