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

#include "data/language.h"
#include "support/run.h"
#include "support/stream.h"

// ---- Options: the one table that parses, explains, is saved with a run and compared on resuming

typedef struct {
    int preset;
    // windows of seq bytes, batch to a pass, accum passes to a step; *_every and warmup in steps
    int64_t steps, batch, seq, accum, warmup, channels, latent, eval_every, threads;
    int64_t sample_bytes, sample_every;
    double lr, min_lr, beta1, beta2, weight_decay, clip, ema, dropout, byte_dropout, softcap;
    // val_frac of each text; save_every in seconds
    double val_frac, save_every;
    uint64_t seed;
    int activation, device;
    bool tie, at_once, no_selftest, tensors;
    const char *units, *val, *out, *resume, *kernels;
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
    SECTION("training"),
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
    INT("eval-every", SAVED, &opt.eval_every, 1, 2e9, "N", "steps between evaluations"),
    INT("sample-bytes", NOT_SAVED, &opt.sample_bytes, 0, 1e6, "N", "length of a sample"),
    INT("sample-every", NOT_SAVED, &opt.sample_every, 0, 2e9, "N", "steps between, 0 = at the end"),
    SECTION("the run"),
    TEXT("out", NOT_SAVED, &opt.out, "DIR", "where model, state and log go"),
    TEXT("resume", NOT_SAVED, &opt.resume, "DIR", "go on with the run in DIR"),
    NUMBER("save-every", NOT_SAVED, &opt.save_every, 0, 1e9, "S", "seconds between savings"),
    INT("threads", NOT_SAVED, &opt.threads, 0, 4096, "N", "CPU threads, 0 = all cores"),
    CHOICE("device", NOT_SAVED, &opt.device, device_names, "NAME", "where to compute"),
    TEXT("kernels", NOT_SAVED, &opt.kernels, "NAME", "who computes"),
    FLAG("tensors", NOT_SAVED, &opt.tensors, "list every tensor at the start"),
    FLAG("no-selftest", NOT_SAVED, &opt.no_selftest, "skip the GPU kernels' check"),
};

enum { N_OPTIONS = sizeof table / sizeof *table };

// ---- Texts -------------------------------------------------------------------------------------

typedef struct {
    const char *name;
    uint8_t *bytes;
    size_t n, n_train;  // bytes[n_train..] are held out
} Text;

typedef struct {
    Text *texts;  // the last one is --val, wholly held out, where that is given
    int n;
    uint8_t *train;  // the training parts, back to back
    uint64_t *lengths;
    size_t n_train, n_held_out;
    double floor;   // entropy in bits per byte, where it is known; else 0
    uint64_t hash;  // of all bytes and where they are split: what a resumed run must find again
} Data;

// 1 MiB, about the size of TinyShakespeare.
enum { BUILT_IN_BYTES = 1 << 20, BUILT_IN_SEED = 1 };

// The file of that name, or with NULL the built-in corpus; the part `held_out` at its end is not
// for training.
static int load_text(Text *t, const char *name, double held_out, Error *e) {
    t->name = name;
    if (name) {
        if (read_whole(name, &t->bytes, &t->n, e)) return -1;
        if (t->n == 0) return fail(e, "%s is empty, expected text", name);
    } else {
        t->name = "the built-in corpus";
        t->n = BUILT_IN_BYTES;
        t->bytes = malloc(t->n);
        if (!t->bytes) return fail(e, "out of memory for the built-in corpus");
        language_write(t->bytes, t->n, BUILT_IN_SEED, NULL);
    }
    t->n_train = (size_t)((double)t->n * (1 - held_out));
    return 0;
}

// Reads all files (none: the built-in corpus), splits them and joins the training parts.
static int load_data(Data *d, const Cli *cli, Error *e) {
    int n_files = cli->n_files ? cli->n_files : 1;
    *d = (Data){.n = n_files + (opt.val != NULL), .hash = CHECKSUM_START};
    d->texts = calloc((size_t)d->n, sizeof *d->texts);
    d->lengths = calloc((size_t)d->n, sizeof *d->lengths);
    if (!d->texts || !d->lengths) return fail(e, "out of memory");
    for (int i = 0; i < n_files; i++)
        // (files ends in NULL: without files, that is the one name.)
        if (load_text(&d->texts[i], cli->files[i], opt.val ? 0 : opt.val_frac, e)) return -1;
    if (opt.val && load_text(&d->texts[n_files], opt.val, 1, e)) return -1;
    // Known of the language that writes the built-in corpus, not of other texts.
    if (!cli->n_files && !opt.val) d->floor = language_entropy();
    for (int i = 0; i < d->n; i++) d->n_train += d->texts[i].n_train;
    // + 1: malloc(0) may give NULL
    d->train = malloc(d->n_train + 1);
    if (!d->train) return fail(e, "out of memory for %zu bytes of text", d->n_train);
    size_t at = 0;
    for (int i = 0; i < d->n; i++) {
        const Text *t = &d->texts[i];
        d->lengths[i] = t->n_train;
        memcpy(d->train + at, t->bytes, t->n_train);
        at += t->n_train;
        d->n_held_out += t->n - t->n_train;
        // With the sizes in it, another split of the same bytes is another hash.
        uint64_t sizes[2] = {t->n, t->n_train};
        d->hash = checksum_add(checksum_add(d->hash, sizes, sizeof sizes), t->bytes, t->n);
        if (i < n_files && t->n_train <= (size_t)opt.seq)
            return fail(e, "%s has %zu bytes for training, less than one window of --seq %lld + 1: "
                           "use a smaller --seq or more text",
                        t->name, t->n_train, (long long)opt.seq);
    }
    return 0;
}

// ---- The run -----------------------------------------------------------------------------------

static Data data;
static Model scorer;  // the same parameters as the run's model, planned for inference
static struct {
    double started, last_seen, last_print;
    double best_seconds;  // from this process's first step to the end of the best's evaluation
    int64_t first_step;   // of this process
    bool terminal, line_open;
} watch;

// SIGINT or SIGTERM came. All else is left to the loop in train(), which looks between steps.
static volatile sig_atomic_t stop_signal;
static void on_signal(int s) { stop_signal = s; }

// A nat is 1/ln 2 bits.
static double bits(double nats) { return nats / 0.6931471805599453; }

// Ends the line that redraws itself, before anything else is printed.
static void end_line(void) {
    if (watch.line_open) fputc('\n', stderr);
    watch.line_open = false;
}

// The training figures of the last step, at most ten times a second on a terminal and every five
// seconds elsewhere.
static void print_progress(Run *r, const StepFigures *f, bool now_please) {
    double t = now();
    if (!now_please && t - watch.last_print < (watch.terminal ? 0.1 : 5)) return;
    watch.last_print = t;
    double steps = (double)(r->step - watch.first_step), seconds = t - watch.started;
    // Of this process: a resumed run's earlier steps took other time.
    double bytes = steps * (double)opt.batch * (double)opt.seq * (double)opt.accum / seconds;
    // Operations per byte: 2 to a parameter in forward, 4 in backward. The embedding is looked up,
    // which costs none, unless the head, tied to it, multiplies by it.
    size_t looked_up = r->config.tie ? 0 : (size_t)V * (size_t)r->config.channels;
    double flops = 6.0 * (double)(r->model.n_params - looked_up);
    // Seconds, at this process's pace so far.
    int left = (int)((double)(opt.steps - r->step) * seconds / (steps > 0 ? steps : 1));
    fprintf(stderr, "%sstep %lld/%lld  loss %.4f (%.3f bits/byte)  %.4g bytes/s  %.0f GFLOP/s  "
                    "lr %.2e  %dm%02ds left%s",
            watch.terminal ? "\r" : "", (long long)r->step, (long long)opt.steps, (double)f->loss,
            bits(f->loss), bytes, flops * bytes / 1e9, (double)f->lr, left / 60, left % 60,
            watch.terminal ? "  " : "\n");
    watch.line_open = watch.terminal;
    fflush(stderr);
}

// Held-out loss of the averaged or the current parameters, nats per byte; leaves them in r->host.
static double held_out_loss(Run *r) {
    const Data *d = &data;
    double sum = 0, nats;
    Error e;
    model_read(&r->model, r->host, r->model.ema ? r->model.ema : r->model.params);
    model_write(&scorer, scorer.params, r->host);
    for (int i = 0; i < d->n; i++) {
        const Text *t = &d->texts[i];
        // From n_train on; what stands before is context, as it would be in use.
        if (model_score(&scorer, t->bytes, t->n, t->n_train, &nats, NULL, &e))
            die(&r->cli, &e);
        sum += nats;
    }
    return sum / (double)d->n_held_out;
}

enum { WINDOW = 256 };  // nanoGPT's block_size for TinyShakespeare

// The best parameters' loss as nanoGPT counts: the held-out text in windows that do not overlap,
// each position judged by what stands before it in its window alone. The first byte of a text is
// only context, so n bytes make n - 1 positions; NAN where there are none.
static double loss_in_windows(Run *r) {
    double sum = 0, nats;
    size_t scored = 0;
    Error e;
    model_write(&scorer, scorer.params, r->best_params);
    for (int i = 0; i < data.n; i++) {
        const Text *t = &data.texts[i];
        size_t n = t->n - t->n_train;
        if (n < 2) continue;
        // The scorer's rows are at least WINDOW long: open_models has seen to that.
        if (model_score_windows(&scorer, t->bytes + t->n_train, n, 1, 1, WINDOW, &nats, NULL,
                                &e))
            die(&r->cli, &e);
        sum += nats;
        scored += n - 1;
    }
    return sum / (double)scored;
}

// ---- Beginning, steps, end ---------------------------------------------------------------------

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
    for (int64_t i = 0; i < opt.sample_bytes; i++) {
        stream_push(&s, &id, NULL, logits);
        id = stream_sample(&s, &sampler, logits, 0);
        bool control = id < 32 && id != '\n' && id != '\t';
        putchar(control && isatty(1) ? '?' : id);  // a terminal would obey control bytes
    }
    printf("\n");
    fflush(stdout);
    stream_free(&s);
}

// Types the preset's words for the user. It comes after the command line, whose options it leaves.
static void apply_preset(const Cli *cli) {
    char words[512], *save;
    snprintf(words, sizeof words, "%s", presets[opt.preset].options);
    if (presets[opt.preset].units && !find_option(cli, "units", 5)->given)
        opt.units = presets[opt.preset].units;
    for (char *word = strtok_r(words, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        bool on;
        // + 2: the "--". The words go with this function, so no preset may set a text.
        Option *o = find_named(cli, word + 2, strlen(word + 2), &on);
        char *value = o->kind == OPT_FLAG ? NULL : strtok_r(NULL, " ", &save);
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

// Plans both models. The scorer's windows are long enough that little of one is only context, and
// hold nanoGPT's.
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
    if (model_open(&r->model, r->backend, &r->config, (int)opt.batch, (int)opt.seq, &training, e) ||
        model_open(&scorer, r->backend, &r->config, (int)B, (int)T, NULL, e))
        return -1;
    // 4: params, m, v and ema of a state file at once
    r->host = malloc(4 * r->model.n_params * sizeof *r->host);
    r->best_params = malloc(r->model.n_params * sizeof *r->best_params);
    if (!r->host || !r->best_params) return fail(e, "out of memory");
    const Data *d = &data;
    return model_set_corpus(&r->model, d->train, d->lengths, d->n - (opt.val != NULL), e);
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
    end_line();
    Error second;  // the first is what is said
    if (r->best_unsaved) run_save_model(r, &second);
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
        fprintf(r->log, "%lld\t%.9g\tnan\t%.9g\t%.9g\n", (long long)r->step + 1, (double)f->loss,
                (double)f->grad_norm, (double)f->lr);
    }
    fflush(r->log);
    watch.last_seen = now();
    // The backend counts only steps that were taken. One that is missing was not finite, and those
    // queued behind it were the same one again: same step, same text, same parameters.
    if (r->step < queued) stop_not_finite(r, &state.ring[r->step % RING]);
    print_progress(r, &state.ring[(r->step - 1) % RING], queued == opt.steps);
}

// Held-out loss into terminal and log; the best parameters aside, and with the state into the
// folder when --save-every is over: 1.6 M parameters take 0.14 s to save, on a GPU many steps.
static void evaluate(Run *r) {
    // Without held-out text the last parameters are the best.
    bool better = true;
    double loss = NAN;
    if (data.n_held_out > 0) {
        loss = held_out_loss(r);
        if (!isfinite(loss)) {
            Error e;
            fail(&e, "step %lld: the held-out loss is not finite. Try a lower --lr, more "
                     "--warmup or --clip 1", (long long)r->step);
            stop_run(r, &e);
        }
        better = loss < r->best;
        end_line();
        fprintf(stderr, "step %lld  held-out %.4f nats/byte = %.4f bits/byte, perplexity %.3f",
                (long long)r->step, loss, bits(loss), exp(loss));
        if (data.floor > 0)
            fprintf(stderr, ", %.4f bits/byte above the floor", bits(loss) - data.floor);
        fprintf(stderr, "  %.2f s%s\n", now() - watch.started, better ? "  (best so far)" : "");
        fprintf(r->log, "%lld\tnan\t%.9g\tnan\tnan\n", (long long)r->step, loss);
        fflush(r->log);
    } else {
        model_read(&r->model, r->host, r->model.ema ? r->model.ema : r->model.params);
    }
    if (better) {
        r->best = loss;
        r->best_step = r->step;
        memcpy(r->best_params, r->host, r->model.n_params * sizeof *r->host);
        r->best_unsaved = true;
        watch.best_seconds = now() - watch.started;
    }
    // r->host holds what was just judged. After the last step main() prints a sample of the best.
    if (opt.sample_every && r->step % opt.sample_every == 0 && r->step < opt.steps)
        print_sample(r, r->host);
    if (now() - r->last_save >= opt.save_every) save(r);
}

// Queues steps without waiting for them; sees them when an evaluation is due, before the ring of
// figures is full, on a signal, and ten times a second.
static void train(Run *r) {
    watch.first_step = r->step;
    watch.started = watch.last_seen = r->last_save = now();
    // r->step counts what the host has seen, queued what it has asked for.
    int64_t queued = r->step;
    while (queued < opt.steps && !stop_signal) {
        model_train_step(&r->model);
        queued++;
        // A sample comes with an evaluation, which brings the parameters to the host.
        bool due = queued % opt.eval_every == 0 || queued == opt.steps ||
                   (opt.sample_every && queued % opt.sample_every == 0);
        if (due || stop_signal || queued - r->step >= RING / 2 || now() - watch.last_seen > 0.1)
            see_steps(r, queued);
        if (due) evaluate(r);
    }
    if (queued > r->step) see_steps(r, queued);  // the signal came after the last look
    end_line();
    // Also after a signal: no step that was taken is lost.
    if (r->step != r->saved_step) save(r);
}

// What the run came to: on the terminal, and without the time, which no two runs share, in the log.
static void print_result(Run *r) {
    double seconds = now() - watch.started;
    if (data.n_held_out > 0) {
        double windows = loss_in_windows(r);
        fprintf(stderr, "best held-out loss %.4f nats/byte at step %lld", r->best,
                (long long)r->best_step);
        if (r->best_step > watch.first_step)
            fprintf(stderr, ", %.2f s after %s began", watch.best_seconds,
                    watch.first_step ? "this part of the run" : "the first step");
        // Not NAN: there was a position to judge.
        if (windows == windows) {
            fprintf(stderr, "\nin windows of %d bytes that do not overlap, as nanoGPT counts: "
                            "%.4f nats/byte", WINDOW, windows);
            fprintf(r->log, "# best: step %lld, held out %.9g, in windows of %d bytes that do not "
                            "overlap %.9g\n", (long long)r->best_step, r->best, WINDOW, windows);
            fflush(r->log);
        }
        fprintf(stderr, "\n");
    }
    fprintf(stderr, "%.2f s with saving: %s/model.safetensors\n", seconds, r->folder);
}

static bool on_gpu(const Run *r) {
    return r->backend != &cpu_backend && r->backend != &plain_backend;
}

// Reads what is to be read, plans and allocates; the folder and the log come last, so that a run
// which cannot start leaves no trace.
static int begin(Run *r, Error *e) {
    static Checkpoint ck;
    r->folder = opt.resume ? opt.resume : opt.out;
    // The saved run's options first: the model, the texts and the backend follow from them.
    if (opt.resume && run_open_state(r, &ck, e)) return -1;
    r->best = INFINITY;
    r->saved_step = -1;  // nothing yet
    if (config_of_options(&r->config, e)) return -1;
    if (choose_backend(&r->backend, device_names[opt.device], opt.kernels, e)) return -1;
    // A GPU's kernels are held against the CPU's before they are trusted with a run.
    if (on_gpu(r) && !opt.no_selftest && gpu_selftest(r->backend, e)) return -1;
    if (load_data(&data, &r->cli, e) || open_models(r, e))
        return -1;
    r->text = data.hash;
    int failed = opt.resume ? run_load(r, &ck, e) : model_init_params(&r->model, opt.seed, e);
    checkpoint_close(&ck);
    if (failed || (!opt.resume && run_make_folder(r, e))) return -1;
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
    apply_preset(&r->cli);
    if (opt.resume && find_option(&r->cli, "out", 3)->given)
        usage_error(&r->cli, "--resume DIR goes on in DIR: leave --out out%s%s", "", "");
    if (opt.resume && find_option(&r->cli, "preset", 6)->given)
        usage_error(&r->cli, "--resume DIR goes on with that run's options: leave --preset out%s%s",
                    "", "");
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    // A progress line redraws itself only there; in a file each is a line of its own.
    watch.terminal = isatty(2);
    if (begin(r, &e)) die(&r->cli, &e);
    print_plan(r);

    // From here on there is something to save: a signal ends the loop, not the program.
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    train(r);
    if (r->step < opt.steps) {
        fprintf(stderr, "stopped after step %lld; go on with: ./train --resume %s\n",
                (long long)r->step, r->folder);
        return 0;
    }
    print_result(r);
    print_sample(r, r->best_params);
    return 0;
}
