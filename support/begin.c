// begin.c: how a training run begins: from options to an open model, from weights that are there
// already (--init), with a size and a schedule for the time that there is (--minutes), or where it
// stopped (--resume). Read train.h first.
#define _POSIX_C_SOURCE 200809L
#include "support/stream.h"
#include "support/train.h"

static real *init_params;  // (n_params) of --init, or NULL

// What a budget of operations buys with --minutes, where no size is given: from so many on this
// row. Measured on TinyShakespeare, nats per byte held out. Small batches win while a text is seen
// only a few times. The first row at 4e11 operations gave 2.018, 1.888 and 1.832 with batches of
// 16, 8 and 4 windows (lr 1e-2, 8e-3, 6e-3); the second at 2.4e13, five minutes of two cores, 1.513
// with 16 windows (1,150 steps, lr 6e-3) and 1.495 with 8 (2,250 steps). 9e12 lies between: nobody
// has sought it.
static const struct {
    double from;
    const char *units, *options;
} sizes[] = {
    {0, "2x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 64 --batch 4 --seq 256 --lr 6e-3 --weight-decay 1 --dropout 0 "
     "--byte-dropout 0.02 --no-at-once"},
    {9e12, "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 128 --batch 8 --seq 512 --lr 5e-3 --weight-decay 1 --dropout 0.02 "
     "--byte-dropout 0.05 --no-at-once"},
};
enum { N_SIZES = sizeof sizes / sizeof *sizes, MIDDLE_SIZE = 1, LEAST_SEQ = 16 };

// ---- From options to models ---------------------------------------------------------------------

bool given(const Cli *cli, const char *name) {
    return find_option(cli, name, strlen(name))->given;
}

void apply_row(const Cli *cli, const char *units, const char *options) {
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
                  .window = (int)(opt.window ? opt.window : opt.seq),
                  .softcap = (float)opt.softcap, .no_norm_in = !opt.norm_in,
                  .no_norm_out = !opt.norm_out, .no_bias = !opt.bias, .skips = (int)opt.skips};
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
                       "(with --accum) or --seq, or --units that reach less far back",
                    (long long)N, (long long)T);
    if (model_open(&r->model, r->backend, &r->config, (int)opt.batch, (int)opt.seq, &training, e))
        return -1;
    Error why;
    if (model_open(&scorer, r->backend, &r->config, (int)B, (int)T, NULL, &why))
        return fail(e, "to evaluate: %.400s, or --units that reach less than %lld bytes back",
                    why.text, (long long)context - 1);
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

// ---- --minutes: size and schedule from the time -------------------------------------------------

typedef struct {
    double operations;          // of a step
    double step, pass, sample;  // seconds: of a step, of a pass of the scorer, of a sample
    double pass_bytes, rows;    // that a pass of the scorer scores; its B
} Pace;

// Seconds of a sample: some of its bytes, as stream.c writes them.
static int measure_sample(Run *r, double *seconds, Error *e) {
    enum { BYTES = 32 };
    Stream s;
    real logits[V];
    int id = '\n';
    *seconds = 0;
    if (opt.sample_bytes == 0) return 0;
    if (stream_open(&s, &r->config, r->host, 1, e)) return -1;
    stream_begin(&s, 1);
    double before = now();
    for (int i = 0; i < BYTES; i++) stream_push(&s, &id, NULL, logits);
    *seconds = (now() - before) / BYTES * (double)opt.sample_bytes;
    stream_free(&s);
    return 0;
}

// Seconds of an evaluation that scores one pass: the second, as the first warms the caches.
static int measure_pass(Run *r, Pace *p, Error *e) {
    const Text *t = data.texts;
    p->rows = (double)scorer.B;
    p->pass_bytes = (double)score_part_pass(&scorer);
    for (int i = 0; i < 2; i++) {
        double before = now(), nats = 0;
        size_t n = t->n - 1 < (size_t)p->pass_bytes ? t->n : (size_t)p->pass_bytes + 1;
        model_read(&r->model, r->host, r->model.params);
        model_write(&scorer, scorer.params, r->host);
        if (model_score(&scorer, t->bytes, n, 1, &nats, NULL, e)) return -1;
        p->pass = now() - before;
    }
    return 0;
}

// Times steps of the model that the options describe, for about `most` seconds. The models are
// thrown away: the run begins anew with the schedule that follows.
static int measure(Run *r, double most, Pace *p, Error *e) {
    static StepState state;  // its download waits for the steps
    if (config_of_options(&r->config, e) || open_models(r, e)) return -1;
    p->operations = step_operations(r);
    // The first step warms the caches, and a GPU captures it: not counted. What is queued at a time
    // grows until waiting for it no longer counts.
    double first = now(), taken = 0;
    for (int64_t n = 1, steps = -1; steps < 1 || taken < most;) {
        double before = now();
        for (int64_t i = 0; i < n; i++) model_train_step(&r->model);
        r->backend->download(&state, r->model.state, sizeof state);
        if (steps < 0) first = now();
        steps = steps < 0 ? 0 : steps + n;
        taken = now() - first;
        p->step = taken / (double)steps;
        if (now() - before < 0.1 && steps > 0) n *= 2;
    }
    int failed = measure_pass(r, p, e) || measure_sample(r, &p->sample, e) ? -1 : 0;
    close_models(r);
    return failed;
}

// Passes of the scorer over `most` held-out bytes, of which every text gives its share.
static double passes(const Pace *p, size_t most) {
    double sum = 0;
    for (int i = 0; i < data.n; i++) {
        double held = (double)(data.texts[i].n - data.texts[i].n_train);
        sum += ceil((double)most / (double)data.n_held_out * held / p->pass_bytes);
    }
    return data.n_held_out ? sum : 0;
}

// Seconds of the last figure. Where they are more than `most`, --last-bytes, if not given, bounds
// them.
static double fit_last(const Cli *cli, const Pace *p, double most) {
    // Where evaluations score all of it, the last figure is another: in windows of WINDOW bytes.
    bool windows = middle_bytes() == data.n_held_out;
    double n = 0;
    for (int i = 0; i < data.n && windows; i++)
        n += ceil((double)(data.texts[i].n - data.texts[i].n_train) / WINDOW / p->rows);
    if (!windows) n = passes(p, last_bytes());
    if (n * p->pass <= most || given(cli, "last-bytes")) return n * p->pass;
    opt.last_bytes = (int64_t)fmax(1, floor(most / p->pass) * p->pass_bytes);
    if (!windows) return passes(p, last_bytes()) * p->pass;
    if (last_bytes() == data.n_held_out) opt.last_bytes--;
    return 0;  // none
}

// A row of sizes. A --seq that nobody chose fits the shortest text, of which texts_load has seen to
// LEAST_SEQ + 1 bytes.
static void take_size(const Cli *cli, int row) {
    apply_row(cli, sizes[row].units, sizes[row].options);
    for (int i = 0; i < data.n_files && !given(cli, "seq"); i++) {
        int64_t half = (int64_t)data.texts[i].n_train / 2;
        if (opt.seq > half) opt.seq = half > LEAST_SEQ ? half : LEAST_SEQ;
    }
}

static bool sized(const Cli *cli) {
    return given(cli, "channels") || given(cli, "units") || given(cli, "preset") || opt.init;
}

// Takes the steps and how often to evaluate, for `left` seconds.
static int fit_steps(const Cli *cli, const Pace *p, double left, Error *e) {
    bool fixed = given(cli, "eval-every");
    double most_steps = find_option(cli, "steps", 5)->max, each;
    double step = p->step + (opt.sample_every ? p->sample / (double)opt.sample_every : 0);
    // The last figure costs a fifth at most; exactly how much depends on the evaluations before.
    double last = fmin(left / 5, passes(p, last_bytes()) * p->pass);
    double rough = fmin(most_steps, (left - last - p->sample) / step);
    int evaluations = fixed ? 1 : 6;
    for (;; evaluations--) {
        if (!fixed) opt.eval_every = rough > evaluations ? (int64_t)(rough / evaluations) : 1;
        each = passes(p, middle_bytes()) * p->pass;
        if (evaluations == 1 || each * evaluations < left / 10) break;
    }
    if (!fixed && each > left / 10 && !given(cli, "val-bytes")) {
        opt.val_bytes = (int64_t)fmax(1, floor(left / 10 / p->pass) * p->pass_bytes);
        each = passes(p, middle_bytes()) * p->pass;
    }
    last = fit_last(cli, p, left / 5);
    if (fixed) step += each / (double)opt.eval_every;  // and one more, after the last step
    // 3 %: saving, and what the first seconds did not show.
    double steps = fmin(most_steps, (0.97 * left - last - p->sample - each * evaluations) / step);
    if (!(steps >= 10))
        return fail(e, "--minutes %g is too short: a step takes %.2g s, an evaluation %.2g s, the "
                       "last figure and a sample %.2g s: give more time, or smaller --channels or "
                       "--batch", opt.minutes, p->step, each, last + p->sample);
    opt.steps = (int64_t)steps;
    if (!fixed) opt.eval_every = (opt.steps + evaluations - 1) / evaluations;
    return 0;
}

// Takes the size and its hyper-parameters for the time, then steps, warm-up and evaluations.
static int fit_to_time(Run *r, double began, Error *e) {
    const Cli *cli = &r->cli;
    Pace pace;
    double budget = 60 * opt.minutes, most = budget / 50 < 6 ? budget / 50 : 6;
    if (!sized(cli)) {
        int row = 0;
        take_size(cli, MIDDLE_SIZE);
        if (measure(r, most / 6, &pace, e)) return -1;
        double operations = pace.operations / pace.step * budget;
        while (row + 1 < N_SIZES && operations >= sizes[row + 1].from) row++;
        take_size(cli, row);
    }
    if (measure(r, most, &pace, e) || fit_steps(cli, &pace, budget - (now() - began), e)) return -1;
    if (!given(cli, "warmup")) opt.warmup = opt.steps < 1429 ? (7 * opt.steps + 99) / 100 : 100;
    fprintf(stderr, "note: --minutes %g: --steps %lld (%.3g s each)", opt.minutes,
            (long long)opt.steps, pace.step);
    static const char *const chosen[] = {"warmup", "eval-every", "val-bytes", "last-bytes", "seq"};
    for (int i = 0; i < 5; i++) {
        const Option *o = find_option(cli, chosen[i], strlen(chosen[i]));
        long long value = *(int64_t *)o->value;
        if (!o->given && value > 0) fprintf(stderr, " --%s %lld", o->name, value);
    }
    fprintf(stderr, "\n");
    return config_of_options(&r->config, e);
}

// ---- --init -------------------------------------------------------------------------------------

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
    if (!given(cli, "window")) opt.window = c->window;
    if (!given(cli, "tie")) opt.tie = c->tie;
    if (!given(cli, "norm-in")) opt.norm_in = !c->no_norm_in;
    if (!given(cli, "norm-out")) opt.norm_out = !c->no_norm_out;
    if (!given(cli, "bias")) opt.bias = !c->no_bias;
    if (!given(cli, "skips")) opt.skips = c->skips;
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

// ---- All of it ----------------------------------------------------------------------------------

static bool on_gpu(const Run *r) {
    return r->backend != &cpu_backend && r->backend != &plain_backend;
}

int begin_run(Run *r, double began, Error *e) {
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
    bool free_time = !opt.resume && !given(&r->cli, "steps") && !given(&r->cli, "preset");
    if (free_time && !given(&r->cli, "minutes") && !on_gpu(r)) opt.minutes = 5;
    bool any_seq = opt.minutes > 0 && !sized(&r->cli) && !given(&r->cli, "seq");
    if (texts_load(&data, &r->cli, opt.val, opt.val_frac, any_seq ? LEAST_SEQ : (size_t)opt.seq, e))
        return -1;
    r->text = data.hash;
    r->training_bytes = data.n_train;
    r->held_out_bytes = data.n_held_out;
    texts_names(&data, r->trained_on, sizeof r->trained_on);
    if (opt.minutes > 0 && fit_to_time(r, began, e)) return -1;
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
