// train.c: trains the model on a text and leaves it in a folder. It reads the options, splits the
// text, takes steps, evaluates on what was held out, keeps the best, and goes on where it stopped.
//
// Refuses: unknown options, texts shorter than a window, sizes beyond the memory, a folder it
// cannot write. Read model.h first. Run:  ./train --preset small      ./train --help
#define _POSIX_C_SOURCE 200809L
#include <signal.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "support/progress.h"
#include "support/run.h"
#include "support/stream.h"
#include "support/texts.h"

// ---- Options: the one table that parses, explains, is saved with a run and compared on resuming

typedef struct {
    int preset;
    // windows of seq bytes, batch to a pass, accum passes to a step; *_every and warmup in steps
    int64_t steps, batch, seq, accum, warmup, channels, latent, eval_every, threads;
    int64_t val_bytes, sample_bytes, sample_every;
    double lr, min_lr, beta1, beta2, weight_decay, clip, ema, dropout, byte_dropout, softcap;
    // val_frac of each text; save_every in seconds
    double val_frac, save_every, minutes;
    uint64_t seed;
    int activation, device;
    bool tie, at_once, no_selftest, tensors;
    const char *units, *val, *out, *resume, *init, *kernels;
} Options;

// The defaults: the recipe sought on TinyShakespeare, where it does not depend on that text.
static Options opt = {
    .channels = 256, .units = "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)", .activation = ACT_gelu,
    .tie = true, .softcap = 30,
    .steps = 1500, .batch = 16, .seq = 512, .accum = 1, .lr = 4e-3, .warmup = 100, .beta1 = 0.9,
    .beta2 = 0.95, .weight_decay = 1, .clip = 1, .dropout = 0.1, .byte_dropout = 0.1, .seed = 1,
    .val_frac = 0.1, .eval_every = 250, .sample_bytes = 400, .save_every = 10, .out = "out",
};

static const char *const preset_names[] = {"default", "paper", "small", "shakespeare", NULL};
// What a preset sets, as it would be typed, and its units. Options on the command line win. All but
// `default` leave nothing to the defaults: those may move, the figures of these shall not.
static const struct {
    const char *units, *options;
} presets[] = {
    {NULL, ""},
    {"3x(block:3:1:2:4)",
     "--channels 256 --latent 0 --activation gelu --no-tie --softcap 0 --steps 1500 --batch 16 "
     "--seq 512 --accum 1 --no-at-once --lr 2e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.99 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0 --byte-dropout 0 --eval-every 250"},
    {"2x(conv:3:1 conv:3:2 conv:3:4)",
     "--channels 128 --latent 0 --activation gelu --tie --softcap 30 --steps 1200 --batch 16 "
     "--seq 256 --accum 1 --no-at-once --lr 4e-3 --min-lr 0 --warmup 50 --beta1 0.9 --beta2 0.99 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0.05 --byte-dropout 0.05 --eval-every 200"},
    {"3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 256 --latent 0 --activation gelu --tie --softcap 30 --steps 2900 --batch 64 "
     "--seq 512 --accum 1 --at-once --lr 6e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.95 "
     "--weight-decay 4 --clip 1 --ema 0 --dropout 0.2 --byte-dropout 0.15 --eval-every 500"},
};
// What a budget of operations buys with --minutes: from so many on this row, where no size is
// given.
static const struct {
    double from;
    const char *units, *options;
} sizes[] = {
    {0, "2x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 64 --batch 16 --seq 256 --lr 1e-2 --weight-decay 1 --dropout 0 "
     "--byte-dropout 0.02 --no-at-once"},
    {9e12, "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 128 --batch 16 --seq 512 --lr 6e-3 --weight-decay 1 --dropout 0.02 "
     "--byte-dropout 0.05 --no-at-once"},
};
enum { N_SIZES = sizeof sizes / sizeof *sizes, MIDDLE_SIZE = 1 };
static const char *const device_names[] = {"auto", "cpu", "cuda", NULL};

// The bounds judge one value at a time; how values go together is judged by config_check and
// model_open. The defaults that --help shows are those of opt.
static Option table[] = {
    SECTION("the model"),
    CHOICE("preset", NOT_SAVED, &opt.preset, preset_names, "NAME", "a set of options"),
    INT("channels", SAVED, &opt.channels, 1, MAX_CHANNELS, "C", "channels"),
    INT("latent", SAVED, &opt.latent, 0, MAX_CHANNELS, "D", "latent width, 0 = C, else --no-tie"),
    TEXT("units", SAVED, &opt.units, "STACK", "residual units, see below"),
    CHOICE("activation", SAVED, &opt.activation, activation_names, "F", "of units that name none"),
    FLAG("tie", SAVED, &opt.tie, "the head is the embedding, transposed"),
    NUMBER("softcap", SAVED, &opt.softcap, 0, 1e6, "S", "logits = S tanh(logits/S), 0 = off"),
    SECTION("training; on a CPU without --minutes, --steps and --preset: --minutes 5"),
    NUMBER("minutes", NOT_SAVED, &opt.minutes, 0, 1e6, "X", "fit steps and size to the time"),
    INT("steps", SAVED, &opt.steps, 1, 2e9, "N", "optimizer steps"),
    INT("batch", SAVED, &opt.batch, 1, 1 << 20, "B", "windows of a pass"),
    INT("seq", SAVED, &opt.seq, 1, 1 << 24, "T", "bytes of a window"),
    INT("accum", SAVED, &opt.accum, 1, 1 << 16, "N", "passes of `batch` windows per step"),
    FLAG("at-once", SAVED, &opt.at_once, "never half a batch on a GPU: faster, more memory"),
    NUMBER("lr", SAVED, &opt.lr, 0, 100, "X", "learning rate"),
    NUMBER("min-lr", SAVED, &opt.min_lr, 0, 100, "X", "where its cosine ends"),
    INT("warmup", SAVED, &opt.warmup, 0, 2e9, "N", "steps of linear warm-up"),
    NUMBER("beta1", SAVED, &opt.beta1, 0, 0.999999, "X", "AdamW's first decay"),
    NUMBER("beta2", SAVED, &opt.beta2, 0, 0.999999, "X", "AdamW's second decay"),
    NUMBER("weight-decay", SAVED, &opt.weight_decay, 0, 1000, "X", "of matrices: p -= lr*X*p"),
    NUMBER("clip", SAVED, &opt.clip, 0, 1e6, "X", "bound of the gradient norm, 0 = off"),
    NUMBER("ema", SAVED, &opt.ema, 0, 0.999999, "X", "decay of the weight average, 0 = off"),
    NUMBER("dropout", SAVED, &opt.dropout, 0, 0.99, "P", "after every activation, in 256ths"),
    NUMBER("byte-dropout", SAVED, &opt.byte_dropout, 0, 0.99, "P", "input bytes zeroed"),
    SEED("seed", SAVED, &opt.seed, "N", "of everything random"),
    SECTION("data and evaluation"),
    NUMBER("val-frac", SAVED, &opt.val_frac, 0, 0.9, "X", "last part of each text, held out"),
    TEXT("val", SAVED, &opt.val, "FILE", "hold out this text instead"),
    INT("val-bytes", SAVED, &opt.val_bytes, 0, 1e15, "N", "before the end, 0 = by eval-every"),
    INT("eval-every", SAVED, &opt.eval_every, 1, 2e9, "N", "steps between evaluations"),
    INT("sample-bytes", NOT_SAVED, &opt.sample_bytes, 0, 1e6, "N", "length of a sample"),
    INT("sample-every", NOT_SAVED, &opt.sample_every, 0, 2e9, "N", "steps between, 0 = at the end"),
    SECTION("the run"),
    TEXT("out", NOT_SAVED, &opt.out, "DIR", "where model, state and log go"),
    TEXT("resume", NOT_SAVED, &opt.resume, "DIR", "go on with the run in DIR"),
    TEXT("init", NOT_SAVED, &opt.init, "MODEL", "begin with its weights: a file, or a run's DIR"),
    NUMBER("save-every", NOT_SAVED, &opt.save_every, 0, 1e9, "S", "seconds between savings"),
    INT("threads", NOT_SAVED, &opt.threads, 0, 4096, "N", "CPU threads, 0 = all cores"),
    CHOICE("device", NOT_SAVED, &opt.device, device_names, "NAME", "where to compute"),
    TEXT("kernels", NOT_SAVED, &opt.kernels, "NAME", "who computes"),
    FLAG("tensors", NOT_SAVED, &opt.tensors, "list every tensor at the start"),
    FLAG("no-selftest", NOT_SAVED, &opt.no_selftest, "skip the GPU kernels' check"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

// ---- The run ------------------------------------------------------------------------------------

static Texts data;
static Model scorer;  // the same parameters as the run's model, planned for inference
static real *init_params;  // (n_params) of --init, or NULL
static Progress progress;
static struct {
    double began, started;    // this process; its first step
    double last_seen;
    double best_seconds;      // from the first step to the end of the best's evaluation
    int64_t first_step;       // of this process
    size_t scored, to_score;  // bytes of the evaluation under way
} watch;

// SIGINT or SIGTERM came: train() looks between steps, look() between the passes of an evaluation.
// A second one ends the program at once.
static volatile sig_atomic_t stop_signal;
static void on_signal(int s) {
    stop_signal = s;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

// Bytes of a step.
static double step_bytes(void) {
    return (double)opt.batch * (double)opt.seq * (double)opt.accum;
}

// A nat is 1/ln 2 bits.
static double bits(double nats) { return nats / 0.6931471805599453; }

// Operations of a step: 2 to a parameter and byte in forward, 4 in backward. The embedding is
// looked up, which costs none, unless the head, tied to it, multiplies by it.
static double step_operations(const Run *r) {
    size_t looked_up = r->config.tie ? 0 : (size_t)V * (size_t)r->config.channels;
    return 6.0 * (double)(r->model.n_params - looked_up) * step_bytes();
}

// The training figures of the last step, at most ten times a second on a terminal and every five
// seconds elsewhere.
static void print_progress(Run *r, const StepFigures *f, bool now_please) {
    if (!now_please && !progress_due(&progress, 0.1, 5)) return;
    // Of this process: a resumed run's earlier steps took other time.
    double pace = (double)(r->step - watch.first_step) / (now() - watch.started);
    char left[32];
    progress_line(&progress,
                  "step %lld/%lld  loss %.4f (%.3f bits/byte)  %.4g bytes/s  %.0f GFLOP/s  "
                  "lr %.2e  %s left",
                  (long long)r->step, (long long)opt.steps, (double)f->loss, bits(f->loss),
                  pace * step_bytes(), pace * step_operations(r) / 1e9, (double)f->lr,
                  duration(progress_left(&progress, r->step, opt.steps), left, sizeof left));
}

// ---- Evaluation ---------------------------------------------------------------------------------

// Asked between the passes of an evaluation: shows how far it is, and ends it on a signal.
static bool look(size_t scored) {
    if (progress_due(&progress, 1, 30))
        progress_line(&progress, "evaluating: %.0f %% of %zu bytes",
                      100 * (double)(watch.scored + scored) / (double)watch.to_score,
                      watch.to_score);
    return stop_signal != 0;
}

// How many held-out bytes an evaluation scores before the end of the run, where the last figure is
// of all. By default so many that evaluations cost at most a tenth of the training: forward is a
// third of a step's operations, and 3/10 of a third is a tenth. The count follows from the options
// and not from the clock, so that a resumed run scores the same bytes. At least 128 KiB, which is
// all of TinyShakespeare's held-out tenth.
static size_t middle_bytes(void) {
    double bytes = opt.val_bytes > 0 ? (double)opt.val_bytes
                                     : 0.3 * (double)opt.eval_every * step_bytes();
    if (opt.val_bytes == 0 && bytes < 1 << 17) bytes = 1 << 17;
    return bytes < (double)data.n_held_out ? (size_t)bytes : data.n_held_out;
}

// The scorer's loss in nats per byte on about `most` held-out bytes, of which every text gives its
// share, evenly spread; *scored: how many they were. 1: a signal came.
static int held_out_loss(Run *r, size_t most, double *loss, size_t *scored) {
    double sum = 0;
    Error e;
    watch.scored = 0;
    watch.to_score = most;
    for (int i = 0; i < data.n; i++) {
        const Text *t = &data.texts[i];
        size_t held = t->n - t->n_train;
        double share = (double)most / (double)data.n_held_out * (double)held;
        // What stands before n_train is context, as it would be in use.
        int status = model_score_part(&scorer, t->bytes, t->n, t->n_train,
                                      most < data.n_held_out ? (size_t)share : held, &sum,
                                      &watch.scored, look, &e);
        if (status < 0) die(&r->cli, &e);
        if (status > 0) return 1;
    }
    *scored = watch.scored;
    *loss = sum / (double)watch.scored;
    return 0;
}

enum { WINDOW = 256 };  // nanoGPT's block_size for TinyShakespeare

// The scorer's loss as nanoGPT counts: the held-out text in windows that do not overlap, each
// position judged by what stands before it in its window alone. The first byte of a text is only
// context, so n bytes make n - 1 positions; NAN where there are none, and after a signal.
static double loss_in_windows(Run *r) {
    double sum = 0, nats;
    size_t scored = 0;
    Error e;
    watch.scored = 0;
    watch.to_score = data.n_held_out;
    for (int i = 0; i < data.n; i++, watch.scored = scored) {
        const Text *t = &data.texts[i];
        size_t n = t->n - t->n_train;
        if (n < 2) continue;
        // The scorer's rows are at least WINDOW long: open_models has seen to that.
        int status = model_score_windows(&scorer, t->bytes + t->n_train, n, 1, 1, WINDOW, &nats,
                                         look, &e);
        if (status < 0) die(&r->cli, &e);
        if (status > 0) return NAN;
        sum += nats;
        scored += n - 1;
    }
    return sum / (double)scored;
}

// ---- Beginning, steps, end ----------------------------------------------------------------------

// A text that `params` write by themselves, on standard output.
static void print_sample(const Run *r, const real *params) {
    // On the CPU whatever the device: stream.c has no other form.
    Stream s;
    Error e;
    const Sampler sampler = {.temperature = 0.8, .top_p = 1, .seed = opt.seed};
    real logits[V];
    int id = '\n';  // as if a line had just ended
    if (opt.sample_bytes == 0) return;
    if (stream_open(&s, &r->config, params, 1, &e)) die(&r->cli, &e);
    stream_begin(&s, 1);
    for (int64_t i = 0; i < opt.sample_bytes && !stop_signal && !ferror(stdout); i++) {
        stream_push(&s, &id, NULL, logits);
        id = stream_sample(&s, &sampler, logits, 0);
        bool control = id < 32 && id != '\n' && id != '\t';
        putchar(control && isatty(1) ? '?' : id);  // a terminal would obey control bytes
    }
    printf("\n");
    stream_free(&s);
    // The reader of a pipe may go, and a disk be full: that ends the samples, not the training.
    if (fflush(stdout) == 0 && !ferror(stdout)) return;
    progress_end(&progress);
    fprintf(stderr, "note: standard output cannot be written: no more samples\n");
    opt.sample_bytes = 0;
}

static bool given(const Cli *cli, const char *name) {
    return find_option(cli, name, strlen(name))->given;
}

// Types a row of presets or sizes for the user. It comes after the command line, whose options it
// leaves.
static void apply(const Cli *cli, const char *units, const char *options) {
    char words[512], *rest;
    snprintf(words, sizeof words, "%s", options);
    if (units && !given(cli, "units")) opt.units = units;
    for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        bool on;
        // + 2: the "--". The words go with this function, so no row may set a text.
        Option *o = find_named(cli, word + 2, strlen(word + 2), &on);
        char *value = o->kind == OPT_FLAG ? NULL : strtok_r(NULL, " ", &rest);
        if (o->given) continue;
        if (value)
            parse_value(cli, o, value);
        else
            *(bool *)o->value = on;
    }
}

static int config_of_options(Config *c, Error *e) {
    *c = (Config){.channels = (int)opt.channels,
                  // 0: as wide as the model
                  .latent = (int)(opt.latent ? opt.latent : opt.channels),
                  .activation = (Activation)opt.activation, .tie = opt.tie,
                  .softcap = (float)opt.softcap};
    if (strlen(opt.units) >= sizeof c->units)
        return fail(e, "--units is %zu characters long, at most %d: use groups, Nx(...)",
                    strlen(opt.units), UNITS_TEXT - 1);
    snprintf(c->units, sizeof c->units, "%s", opt.units);
    return config_check(c, e);
}

// eps: PyTorch's default for AdamW.
static Training training_of_options(void) {
    return (Training){
        .dropout = (float)opt.dropout, .byte_dropout = (float)opt.byte_dropout, .seed = opt.seed,
        .passes = (int)opt.accum, .at_once = opt.at_once,
        .hyper = {.steps = opt.steps, .warmup = opt.warmup, .lr = opt.lr, .min_lr = opt.min_lr,
                  .beta1 = opt.beta1, .beta2 = opt.beta2, .eps = 1e-8,
                  .weight_decay = opt.weight_decay, .clip = opt.clip, .ema = opt.ema}};
}

// Plans, allocates and begins both models. The scorer's windows are long enough that little of one
// is only context, and hold nanoGPT's.
static int open_models(Run *r, Error *e) {
    Training training = training_of_options();
    int64_t context = config_receptive_field(&r->config), N = opt.batch * opt.seq;
    // At four times the receptive field, three quarters of a window are scored.
    int64_t T = opt.seq > 4 * context ? opt.seq : 4 * context, B;
    if (T < WINDOW) T = WINDOW;
    // As many bytes to a pass as in training, but one window at least.
    B = N / T > 1 ? N / T : 1;
    if (N > 1 << 27 || T > 1 << 27)
        return fail(e, "a pass of %lld bytes and windows of %lld to score: use a smaller --batch "
                       "(with --accum) or --seq, or fewer dilations", (long long)N, (long long)T);
    if (model_open(&r->model, r->backend, &r->config, (int)opt.batch, (int)opt.seq, &training, e))
        return -1;
    Error why;
    if (model_open(&scorer, r->backend, &r->config, (int)B, (int)T, NULL, &why))
        return fail(e, "to evaluate: %.400s", why.text);
    // 4: params, m, v and ema of a state file at once; and the best
    size_t bytes = r->model.n_params * sizeof(real);
    if (host_memory(5 * bytes, "copies of the parameters", e)) return -1;
    r->host = malloc(4 * bytes);
    r->best_params = malloc(bytes);
    if (!r->host || !r->best_params)
        return fail(e, "no memory for %.3g GB of copies of the parameters", 5e-9 * (double)bytes);
    const Texts *d = &data;
    if (model_set_corpus(&r->model, d->train, d->lengths, d->n - (opt.val != NULL), e)) return -1;
    if (!init_params) return model_init_params(&r->model, opt.seed, e);
    model_write(&r->model, r->model.params, init_params);
    if (r->model.ema) model_write(&r->model, r->model.ema, init_params);
    return 0;
}

static void close_models(Run *r) {
    model_free(&r->model);
    model_free(&scorer);
    free(r->host);
    free(r->best_params);
}

// name (a,b,c) decayed
static void print_tensor(const Tensor *t) {
    fprintf(stderr, "  %-28s (%d", t->name, t->dims[0]);
    for (int j = 1; j < t->ndim; j++) fprintf(stderr, ",%d", t->dims[j]);
    fprintf(stderr, ")%s\n", t->decay ? " decayed" : "");
}

// " (K,C,O)" and, where that is not the tensor backend's fastest kernel, which one runs it.
static void print_matrix(const Model *m, const Tensor *t) {
    int K = t->ndim == 3 ? t->dims[0] : 1, C = t->dims[t->ndim - 2], O = t->dims[t->ndim - 1];
    fprintf(stderr, " (");
    if (t->ndim == 3) fprintf(stderr, "%d,", K);
    fprintf(stderr, "%d,%d)", C, O);
    if (strcmp(m->backend->name, "tensor") != 0) return;
    const char *rung = tensor_rung((ConvShape){m->B, m->T, C, O, K, t->dil});
    if (strcmp(rung, "wgmma") != 0) fprintf(stderr, " by %s", rung);
}

// One line: a unit's text, formula, matrices, parameters and reach; times: how many stand in a row.
static void print_unit(const Model *m, const Unit *u, int times) {
    char text[256], own[32], row[32] = "";
    size_t params = 0;
    int n = snprintf(own, sizeof own, "units.%d.", u->index);
    if (times > 1) snprintf(row, sizeof row, "%dx ", times);
    fprintf(stderr, "  %s%-14s %-26s", row, unit_text(u, m->config.activation, text, sizeof text),
            u->mixer->formula);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (strncmp(t->name, own, (size_t)n) != 0) continue;
        params += t->size;
        if (t->ndim > 1) print_matrix(m, t);
    }
    fprintf(stderr, "  %zu parameters, reaches %lld back\n", params,
            (long long)u->mixer->reach(u));
}

// How often the `period` units from u on repeat themselves, at least 1.
static int repeats(const Model *m, int u, int period) {
    int end = u + period;
    while (end < m->U && unit_same(&m->units[end], &m->units[end - period])) end++;
    return (end - u) / period;
}

// The stack, what is repeated once: at every place the period that covers most.
static void print_stack(const Model *m) {
    for (int u = 0; u < m->U;) {
        int best = 1, times = repeats(m, u, 1);
        for (int period = 2; period <= 16 && u + period <= m->U; period++) {
            int n = repeats(m, u, period);
            if (n > 1 && n * period > times * best) best = period, times = n;
        }
        if (times > 1) fprintf(stderr, "%d times:\n", times);
        for (int i = 0, n; i < best; i += n) {
            for (n = 1; i + n < best && unit_same(&m->units[u + i], &m->units[u + i + n]);) n++;
            print_unit(m, &m->units[u + i], n);
        }
        u += best * times;
    }
}

// What will be trained, on what, and the memory it takes: on standard error, samples go to output.
static void print_plan(const Run *r) {
    const Model *m = &r->model;
    char name[128];
    fprintf(stderr, "fuzzytok.c on %s, %s backend, %d threads\n", machine_name(name, sizeof name),
            r->backend->name, threads_in_use());
    fprintf(stderr, "bytes -> LayerNorm(Embedding (%d,%d)) ->\n", V, m->config.channels);
    print_stack(m);
    fprintf(stderr, m->config.tie ? "-> LayerNorm = latents (%d) -> the embedding, transposed\n"
                                  : "-> LayerNorm -> Linear = latents (%d) -> Linear\n",
            m->config.latent);
    for (int i = 0; i < m->n_tensors && opt.tensors; i++) print_tensor(&m->tensors[i]);
    fprintf(stderr, "%zu parameters, receptive field %lld bytes\n", m->n_params,
            (long long)config_receptive_field(&r->config));
    for (int i = 0; i < m->n_memory; i++)
        fprintf(stderr, "  %-24s %10.2f MB\n", m->memory[i].role, (double)m->memory[i].bytes / 1e6);
    fprintf(stderr, "%.1f MB to train, %.1f MB to evaluate\n", (double)model_memory(m) / 1e6,
            (double)model_memory(&scorer) / 1e6);
    for (int i = 0; i < data.n; i++) {
        const Text *t = &data.texts[i];
        fprintf(stderr, "%s: %zu bytes, of them %zu held out\n", t->name, t->n, t->n - t->n_train);
    }
    if (data.floor > 0)
        fprintf(stderr, "its entropy is known: no model gets below %.4f bits/byte\n",
                data.floor);
}

static void save(Run *r) {
    Error e;
    if (run_save(r, &e)) die(&r->cli, &e);
}

// Ends a run that cannot go on, with the best of it on disk.
static void stop_run(Run *r, const Error *e) {
    progress_end(&progress);
    Error second;
    if (r->best_unsaved && run_save_model(r, &second)) fprintf(stderr, "%s\n", second.text);
    die(&r->cli, e);
}

// The first tensor whose gradient is not finite, or "the loss".
static const char *find_culprit(Run *r) {
    const Model *m = &r->model;
    model_read(m, r->host, m->grads);
    for (int i = 0; i < m->n_tensors; i++)
        for (size_t j = 0; j < m->tensors[i].size; j++)
            if (!isfinite(r->host[m->tensors[i].offset + j])) return m->tensors[i].name;
    return "the loss";
}

// A loss or gradient was not finite. The backend has changed nothing since, and its gradients are
// still that step's, added up as often as it was queued again.
static void stop_not_finite(Run *r, const StepFigures *f) {
    Error e;
    fail(&e, "step %lld: %s is not finite (loss %g). That step changed nothing%s%s. Try a lower "
             "--lr, more --warmup or --clip 1",
         (long long)r->step + 1, find_culprit(r), (double)f->loss,
         r->best_step ? "; the best before it stays in " : "", r->best_step ? r->folder : "");
    stop_run(r, &e);
}

// Fetches the figures of the steps queued so far into log and terminal.
static void see_steps(Run *r, int64_t queued) {
    static StepState state;
    // Waits for the steps queued; the host sees only here what they came to.
    r->backend->download(&state, r->model.state, sizeof state);
    const char *trouble = r->backend->error();
    if (trouble) {
        Error e;
        fail(&e, "step %lld: %s", (long long)r->step + 1, trouble);
        stop_run(r, &e);
    }
    for (; r->step < (int64_t)state.step; r->step++) {
        const StepFigures *f = &state.ring[r->step % RING];
        // The row of a step, without a held-out loss; the row of an evaluation has nothing else.
        run_log(r, "%lld\t%.9g\tnan\t%.9g\t%.9g\n", (long long)r->step + 1, (double)f->loss,
                (double)f->grad_norm, (double)f->lr);
    }
    run_flush_log(r);
    watch.last_seen = now();
    // The backend counts only steps that were taken. One that is missing was not finite, and those
    // queued behind it were the same one again: same step, same text, same parameters.
    if (r->step < queued) stop_not_finite(r, &state.ring[r->step % RING]);
    print_progress(r, &state.ring[(r->step - 1) % RING], queued == opt.steps);
}

// The averaged or the current parameters into r->host, and their held-out loss; INFINITY where
// nothing is held out. 1: a signal came first.
static int judge(Run *r, double *loss) {
    size_t scored;
    *loss = INFINITY;
    model_read(&r->model, r->host, r->model.ema ? r->model.ema : r->model.params);
    if (data.n_held_out == 0) return 0;
    model_write(&scorer, scorer.params, r->host);
    if (held_out_loss(r, middle_bytes(), loss, &scored)) return 1;
    if (!isfinite(*loss)) {
        Error e;
        fail(&e, "step %lld: the held-out loss is not finite. Try a lower --lr, more --warmup or "
                 "--clip 1", (long long)r->step);
        stop_run(r, &e);
    }
    progress_end(&progress);
    fprintf(stderr, "step %lld  held-out %.4f nats/byte = %.4f bits/byte, perplexity %.3f",
            (long long)r->step, *loss, bits(*loss), exp(*loss));
    if (data.floor > 0)
        fprintf(stderr, ", %.4f bits/byte above the floor", bits(*loss) - data.floor);
    if (scored < data.n_held_out)
        fprintf(stderr, ", on %zu of %zu held-out bytes", scored, data.n_held_out);
    fprintf(stderr, "  %.2f s%s\n", now() - watch.started,
            *loss < r->best ? "  (best so far)" : "");
    run_log(r, "%lld\tnan\t%.9g\tnan\tnan\n", (long long)r->step, *loss);
    run_flush_log(r);
    return 0;
}

// Held-out loss into terminal and log; the best parameters aside, and with the state into the
// folder when --save-every is over: 1.6 M parameters take 0.14 s to save, on a GPU many steps.
static void evaluate(Run *r) {
    double loss;
    if (judge(r, &loss)) return;
    // Without held-out text the last parameters are the best.
    if (loss < r->best || data.n_held_out == 0) {
        r->best = loss;
        r->best_step = r->step;
        r->whole = 0;
        memcpy(r->best_params, r->host, r->model.n_params * sizeof *r->host);
        r->best_unsaved = true;
        watch.best_seconds = now() - watch.started;
    }
    r->evaluated = r->step;
    r->saved_step = -1;
    // r->host holds what was just judged. After the last step main() prints a sample of the best.
    if (opt.sample_every && r->step % opt.sample_every == 0 && r->step < opt.steps)
        print_sample(r, r->host);
    if (now() - r->last_save >= opt.save_every) save(r);
}

// Whether an evaluation belongs after that step. A sample comes with one, which brings the
// parameters to the host.
static bool due(int64_t step) {
    return step % opt.eval_every == 0 || step == opt.steps ||
           (opt.sample_every && step % opt.sample_every == 0);
}

// Queues steps without waiting for them; sees them when an evaluation is due, before the ring of
// figures is full, on a signal, and ten times a second.
static void train(Run *r) {
    watch.first_step = r->step;
    watch.started = watch.last_seen = r->last_save = now();
    progress_begin(&progress, r->step);
    // A signal may have ended the evaluation after which this run goes on.
    if (r->step > 0 && due(r->step) && r->evaluated != r->step) evaluate(r);
    // r->step counts what the host has seen, queued what it has asked for.
    int64_t queued = r->step;
    while (queued < opt.steps && !stop_signal) {
        model_train_step(&r->model);
        queued++;
        if (due(queued) || stop_signal || queued - r->step >= RING / 2 ||
            now() - watch.last_seen > 0.1)
            see_steps(r, queued);
        if (due(queued)) evaluate(r);
    }
    if (queued > r->step) see_steps(r, queued);  // the signal came after the last look
    progress_end(&progress);
    // Also after a signal: no step that was taken is lost.
    if (r->step != r->saved_step) save(r);
}

// The best parameters' loss on the whole held-out text, where so far a part of it was scored, or
// else as nanoGPT counts: on the terminal and in the log.
static void print_last_figure(Run *r) {
    size_t scored;
    fprintf(stderr, "whole held-out text: %zu bytes", data.n_held_out);
    model_write(&scorer, scorer.params, r->best_params);
    if (middle_bytes() < data.n_held_out) {
        if (held_out_loss(r, data.n_held_out, &r->whole, &scored)) return;
        progress_end(&progress);
        fprintf(stderr, ", %.4f nats/byte", r->whole);
        run_log(r, "# best: step %lld, held out %.9g on a part, on all %zu bytes %.9g\n",
                (long long)r->best_step, r->best, scored, r->whole);
        Error e;
        if (run_save_model(r, &e)) die(&r->cli, &e);
    } else {
        double windows = loss_in_windows(r);
        // NAN: there was no position to judge, or a signal came.
        if (windows != windows) return;
        fprintf(stderr, "; in windows of %d that do not overlap, as nanoGPT counts: "
                        "%.4f nats/byte", WINDOW, windows);
        run_log(r, "# best: step %lld, held out %.9g, in windows of %d bytes that do not "
                   "overlap %.9g\n", (long long)r->best_step, r->best, WINDOW, windows);
    }
    run_flush_log(r);
}

// What the run came to: on the terminal, and without the time, which no two runs share, in the log.
static void print_result(Run *r) {
    double seconds = now() - watch.started;
    if (data.n_held_out > 0) {
        fprintf(stderr, "best held-out loss %.4f nats/byte at step %lld", r->best,
                (long long)r->best_step);
        if (r->best_step > watch.first_step)
            fprintf(stderr, ", %.2f s after %s began", watch.best_seconds,
                    watch.first_step ? "this part of the run" : "the first step");
        if (middle_bytes() < data.n_held_out) fprintf(stderr, ", on a part of the text");
        fprintf(stderr, "\n");
        print_last_figure(r);
        fprintf(stderr, "\n");
    }
    fprintf(stderr, "%.2f s with saving: %s/model.safetensors\n", seconds, r->folder);
}

static bool on_gpu(const Run *r) {
    return r->backend != &cpu_backend && r->backend != &plain_backend;
}

// ---- --minutes: size and schedule from the time -------------------------------------------------

typedef struct {
    double operations;    // of a step
    double step, scored;  // seconds: of a step, and of scoring a held-out byte
} Pace;

// Times steps of the model that the options describe, for about `most` seconds. The models are
// thrown away: the run begins anew with the schedule that follows.
static int measure(Run *r, double most, Pace *p, Error *e) {
    static StepState state;  // its download waits for the steps
    if (config_of_options(&r->config, e) || open_models(r, e)) return -1;
    p->operations = step_operations(r);
    // The first step warms the caches; on a GPU it captures the graph.
    double seconds = 0;
    for (int64_t n = 1, first = 1; seconds < most || first; n *= first ? 1 : 2, first = 0) {
        double t = now();
        for (int64_t i = 0; i < n; i++) model_train_step(&r->model);
        r->backend->download(&state, r->model.state, sizeof state);
        seconds = now() - t;
        p->step = seconds / (double)n;
    }
    // Forward is a third of a step's operations; of the scorer's windows the beginning is context.
    double context = (double)config_receptive_field(&r->config), T = (double)scorer.T;
    p->scored = p->step / step_bytes() / 3 * T / (T - context + 1);
    close_models(r);
    return 0;
}

// Takes the size and its hyper-parameters for the time, then steps, warm-up and evaluations.
static int fit_to_time(Run *r, Error *e) {
    const Cli *cli = &r->cli;
    Pace pace;
    double budget = 60 * opt.minutes, most = budget / 100 < 2 ? budget / 100 : 2;
    bool fixed = given(cli, "eval-every");
    bool sized = given(cli, "channels") || given(cli, "units") || given(cli, "preset") || opt.init;
    int row = MIDDLE_SIZE;
    if (!sized) apply(cli, sizes[row].units, sizes[row].options);
    if (measure(r, most, &pace, e)) return -1;
    double operations = pace.operations / pace.step * budget;
    for (row = 0; !sized && row + 1 < N_SIZES && operations >= sizes[row + 1].from;) row++;
    if (!sized && row != MIDDLE_SIZE) {
        apply(cli, sizes[row].units, sizes[row].options);
        if (measure(r, most, &pace, e)) return -1;
    }
    double left = budget - (now() - watch.began);
    // The last figure scores the held-out text once more.
    double last = pace.scored * (double)data.n_held_out, each = 0;
    int64_t rough = (int64_t)((left - last) / pace.step), evaluations = 6;
    for (; evaluations > 0; evaluations--) {
        if (fixed) evaluations = rough / opt.eval_every + 1;
        else opt.eval_every = rough > evaluations ? rough / evaluations : 1;
        each = pace.scored * (double)middle_bytes();
        if (fixed || evaluations == 1 || each * (double)evaluations < left / 10) break;
    }
    // 3 %: saving, and what the first seconds did not show.
    double for_steps = 0.97 * left - last - each * (double)evaluations;
    opt.steps = for_steps > 0 ? (int64_t)(for_steps / pace.step) : 0;
    if (opt.steps < 10)
        return fail(e, "--minutes %g is too short: a step takes %.2g s, the evaluations %.2g s: "
                       "give more time, or smaller --channels or --batch", opt.minutes, pace.step,
                    last + each * (double)evaluations);
    if (!fixed) opt.eval_every = (opt.steps + evaluations - 1) / evaluations;
    if (!given(cli, "warmup")) opt.warmup = opt.steps < 1429 ? (7 * opt.steps + 99) / 100 : 100;
    fprintf(stderr, "note: --minutes %g: --steps %lld (%.3g s each) --warmup %lld --eval-every "
                    "%lld\n", opt.minutes, (long long)opt.steps, pace.step,
            (long long)opt.warmup, (long long)opt.eval_every);
    return config_of_options(&r->config, e);
}

// Opens the model of --init, a file or a run's folder, and takes its stack where none is given.
static int open_init(Run *r, Checkpoint *ck, Error *e) {
    char path[4096];
    struct stat st;
    bool folder = stat(opt.init, &st) == 0 && S_ISDIR(st.st_mode);
    snprintf(path, sizeof path, "%s%s", opt.init, folder ? "/model.safetensors" : "");
    if (checkpoint_open(ck, path, e)) return -1;
    if (ck->is_state)
        return fail(e, "%s is the state of a run: go on with it by --resume, or give the "
                       "model.safetensors beside it", path);
    const Cli *cli = &r->cli;
    const Config *c = &ck->config;
    if (!given(cli, "channels")) opt.channels = c->channels;
    if (!given(cli, "latent")) opt.latent = c->latent == c->channels ? 0 : c->latent;
    if (!given(cli, "units")) opt.units = copy_text(c->units);
    if (!given(cli, "activation")) opt.activation = (int)c->activation;
    if (!given(cli, "tie")) opt.tie = c->tie;
    if (!given(cli, "softcap")) opt.softcap = (double)c->softcap;
    return 0;
}

// Its parameters, for open_models; *hash: their checksum.
static int read_init(const Run *r, const Checkpoint *ck, uint64_t *hash, Error *e) {
    if (checkpoint_match(ck, &r->config, e)) return -1;
    size_t bytes = ck->n_params * sizeof(real);
    if (host_memory(bytes, "the parameters of --init", e)) return -1;
    init_params = malloc(bytes);
    if (!init_params) return fail(e, "no memory for the parameters of --init");
    if (checkpoint_read(ck, "", init_params, e)) return -1;
    *hash = checksum_add(CHECKSUM_START, init_params, bytes);
    return 0;
}

// Reads what is to be read, plans and allocates; the folder and the log come last, so that a run
// which cannot start leaves no trace.
static int begin(Run *r, Error *e) {
    static Checkpoint ck;
    uint64_t start = 0;
    // The saved run's options first: the model, the texts and the backend follow from them.
    if (opt.resume && run_open_state(r, opt.resume, &ck, e)) return -1;
    if (opt.init && open_init(r, &ck, e)) return -1;
    r->best = INFINITY;
    r->saved_step = -1;  // nothing yet
    if (config_of_options(&r->config, e)) return -1;
    if (opt.init && read_init(r, &ck, &start, e)) return -1;
    if (choose_backend(&r->backend, device_names[opt.device], opt.kernels, e)) return -1;
    // A GPU's kernels are held against the CPU's before they are trusted with a run.
    if (on_gpu(r) && !opt.no_selftest && gpu_selftest(r->backend, e)) return -1;
    if (texts_load(&data, &r->cli, opt.val, opt.val_frac, (size_t)opt.seq, e)) return -1;
    r->text = data.hash;
    r->training_bytes = data.n_train;
    r->held_out_bytes = data.n_held_out;
    texts_names(&data, r->trained_on, sizeof r->trained_on);
    bool free_time = !opt.resume && !given(&r->cli, "steps") && !given(&r->cli, "preset");
    if (free_time && !given(&r->cli, "minutes") && !on_gpu(r)) opt.minutes = 5;
    if (opt.minutes > 0 && fit_to_time(r, e)) return -1;
    if (open_models(r, e)) return -1;
    free(data.train);  // the model has its own
    data.train = NULL;
    int failed = opt.resume ? run_load(r, &ck, e) : run_identify(r, start, e);
    checkpoint_close(&ck);
    if (failed || (!opt.resume && run_take_folder(r, opt.out, e))) return -1;
    if (opt.resume && r->step >= opt.steps) {
        fprintf(stderr, "nothing left to do: this run has taken %lld steps; to go on, give --steps "
                        "above that\n", (long long)r->step);
        if (r->step > opt.steps) exit(0);
    }
    return run_open_log(r, opt.resume != NULL, e);
}

// What --units may hold, for --help: a line for each mixer.
static void add_mixers(char *about, size_t size) {
    char *to = about + strlen(about);
    snprintf(to, size - strlen(about), "\nA stack of units, --units \"3x(conv:2:1 conv:2:2)\":");
    for (int i = 0; i < n_mixers; i++) {
        const Mixer *m = mixers[i];
        char line[160];
        snprintf(line, sizeof line, "%s", m->name);
        for (int j = 0; j < 4 && m->numbers[j].name; j++)
            snprintf(line + strlen(line), sizeof line - strlen(line), ":%s",
                     m->numbers[j].name);
        snprintf(line + strlen(line), sizeof line - strlen(line), "%s%s", m->repeats ? "..." : "",
                 m->activation ? "[:ACTIVATION]" : "");
        snprintf(about + strlen(about), size - strlen(about), "\n  %-34s %s", line, m->formula);
    }
}

int main(int argc, char **argv) {
    static Run run;
    Run *r = &run;
    Error e;
    static char about[2048] =
        "Trains a byte-level language model on the FILEs, or on a built-in corpus. Writes\n"
        "DIR/model.safetensors (the best on held-out text), DIR/state.safetensors (to go on\n"
        "with --resume DIR) and DIR/log.tsv.\n";
    add_mixers(about, sizeof about);
    r->cli = (Cli){"train", "usage: ./train [options] [FILE...]      FILE - is standard input",
                   about, table, N_OPTIONS, NULL, 0};
    parse_options(&r->cli, argc, argv);
    apply(&r->cli, presets[opt.preset].units, presets[opt.preset].options);
    if (opt.resume && given(&r->cli, "out"))
        usage_error(&r->cli, "--resume DIR goes on in DIR: leave --out out%s%s", "", "");
    static const char *const fixed[] = {"preset", "minutes", "init"};
    for (int i = 0; i < 3; i++)
        if (opt.resume && given(&r->cli, fixed[i]))
            usage_error(&r->cli, "--resume DIR goes on with that run's options: leave --%s out%s",
                        fixed[i], "");
    if (opt.minutes > 0 && given(&r->cli, "steps"))
        usage_error(&r->cli, "--minutes chooses the steps: leave --steps or --minutes out%s%s", "",
                    "");
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    // A progress line redraws itself only there; in a file each is a line of its own.
    progress.terminal = isatty(2);
    watch.began = now();
    signal(SIGPIPE, SIG_IGN);  // print_sample sees that its reader has gone
    if (begin(r, &e)) die(&r->cli, &e);
    print_plan(r);

    // From here on there is something to save: a signal ends the loop, not the program.
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    train(r);
    if (r->step < opt.steps || r->evaluated < r->step) {
        fprintf(stderr, "stopped after step %lld; go on with: ./train --resume %s\n",
                (long long)r->step, r->folder);
        return 0;
    }
    print_result(r);
    print_sample(r, r->best_params);
    return 0;
}
