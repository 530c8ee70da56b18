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

#include "support/describe.h"
#include "support/progress.h"
#include "support/stream.h"
#include "support/train.h"

// ---- Options: the one table that parses, explains, is saved with a run and compared on resuming

// The defaults: the recipe sought on TinyShakespeare, where it does not depend on that text.
Options opt = {
    .channels = 256, .units = "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)", .activation = ACT_gelu,
    .tie = true, .norm_in = true, .norm_out = true, .bias = true, .softcap = 30,
    .steps = 1500, .batch = 16, .seq = 512, .accum = 1, .lr = 4e-3, .warmup = 100, .beta1 = 0.9,
    .beta2 = 0.95, .weight_decay = 1, .clip = 1, .dropout = 0.1, .byte_dropout = 0.1, .seed = 1,
    .val_frac = 0.1, .eval_every = 250, .sample_bytes = 400, .save_every = 10, .out = "out",
};

static const char *const preset_names[] = {"default", "paper", "small", "shakespeare",
                                           "hybrid", "transformer", "golf", NULL};
// What a preset sets, as it would be typed, and its units. Options on the command line win. All but
// `default` leave nothing to the defaults: those may move, the figures of these shall not.
static const struct {
    const char *units, *options;
} presets[] = {
    {NULL, ""},
    {"3x(block:3:1:2:4)",
     "--channels 256 --latent 0 --activation gelu --window 0 --no-tie --softcap 0 "
     "--norm-in --norm-out --bias --skips 0 --steps 1500 --batch 16 --seq 512 --accum 1 "
     "--no-at-once --lr 2e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.99 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0 --byte-dropout 0 --eval-every 250"},
    {"2x(conv:3:1 conv:3:2 conv:3:4)",
     "--channels 128 --latent 0 --activation gelu --window 0 --tie --softcap 30 "
     "--norm-in --norm-out --bias --skips 0 --steps 1200 --batch 16 --seq 256 --accum 1 "
     "--no-at-once --lr 4e-3 --min-lr 0 --warmup 50 --beta1 0.9 --beta2 0.99 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0.05 --byte-dropout 0.05 --eval-every 200"},
    {"3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)",
     "--channels 256 --latent 0 --activation gelu --window 0 --tie --softcap 30 "
     "--norm-in --norm-out --bias --skips 0 --steps 2900 --batch 64 --seq 512 --accum 1 "
     "--at-once --lr 6e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.95 "
     "--weight-decay 4 --clip 1 --ema 0 --dropout 0.2 --byte-dropout 0.15 --eval-every 500"},
    {"3x(conv:2:1 attn:4 mlp:2)",
     "--channels 256 --latent 0 --activation gelu --window 512 --tie --softcap 30 "
     "--norm-in --norm-out --bias --skips 0 --steps 2900 --batch 64 --seq 512 --accum 1 "
     "--at-once --lr 5e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.95 "
     "--weight-decay 1 --clip 1 --ema 0 --dropout 0.2 --byte-dropout 0.15 --eval-every 500"},
    {"positions 2x(attn:4:r0:n0 mlp:4)",
     "--channels 256 --latent 0 --activation gelu --window 0 --no-tie --softcap 0 "
     "--no-norm-in --no-norm-out --bias --skips 0 --steps 1500 --batch 16 --seq 512 --accum 1 "
     "--no-at-once --lr 1e-3 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.99 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0 --byte-dropout 0 --eval-every 250"},
    {"smear bigrams:4096:32 13x(attn:8:4096 mlp:2:lrelu2)",
     "--channels 512 --latent 0 --activation gelu --window 4096 --tie --softcap 30 "
     "--norm-in --norm-out --no-bias --skips 2 --steps 2000 --batch 8 --seq 4096 --accum 4 "
     "--no-at-once --lr 3e-3 --min-lr 0 --warmup 200 --beta1 0.9 --beta2 0.95 "
     "--weight-decay 0.1 --clip 1 --ema 0 --dropout 0 --byte-dropout 0 --eval-every 500"},
};
const char *const device_names[] = {"auto", "cpu", "cuda", NULL};

// The bounds judge one value at a time; how values go together is judged by config_check and
// model_open. The defaults that --help shows are those of opt.
static Option table[] = {
    SECTION("the model"),
    CHOICE("preset", NOT_SAVED, &opt.preset, preset_names, "NAME", "a set of options"),
    INT("channels", SAVED, &opt.channels, 1, MAX_CHANNELS, "C", "channels"),
    INT("latent", SAVED, &opt.latent, 0, MAX_CHANNELS, "D", "latent width, 0 = C, else --no-tie"),
    TEXT("units", SAVED, &opt.units, "STACK", "residual units, see below"),
    CHOICE("activation", SAVED, &opt.activation, activation_names, "F", "of units that name none"),
    INT("window", SAVED, &opt.window, 0, MAX_WINDOW, "W", "of attention, in bytes; 0 = --seq"),
    FLAG("tie", SAVED, &opt.tie, "the head is the embedding, transposed"),
    NUMBER("softcap", SAVED, &opt.softcap, 0, 1e6, "S", "logits = S tanh(logits/S), 0 = off"),
    INT("skips", SAVED, &opt.skips, 0, MAX_UNITS, "N", "N units are a layer; before layer L-1-i "
        "the stream from before layer i\n                           comes back, 0 = never"),
    FLAG("norm-in", SAVED, &opt.norm_in, "a LayerNorm after the embedding"),
    FLAG("norm-out", SAVED, &opt.norm_out, "and one before the head"),
    FLAG("bias", SAVED, &opt.bias, "linear layers and convs have biases"),
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
    NUMBER("dropout", SAVED, &opt.dropout, 0, 0.99, "P", "of what each unit makes, in 256ths"),
    NUMBER("byte-dropout", SAVED, &opt.byte_dropout, 0, 0.99, "P", "input bytes zeroed"),
    SEED("seed", SAVED, &opt.seed, "N", "of everything random"),
    SECTION("data and evaluation"),
    NUMBER("val-frac", SAVED, &opt.val_frac, 0, 0.9, "X", "last part of each text, held out"),
    TEXT("val", SAVED, &opt.val, "FILE", "hold out this text instead"),
    INT("val-bytes", SAVED, &opt.val_bytes, 0, 1e15, "N", "before the end, 0 = by eval-every"),
    INT("last-bytes", SAVED, &opt.last_bytes, 0, 1e15, "N", "at the end, 0 = all held-out bytes"),
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

Texts data;
Model scorer;
static Progress progress;
static struct {
    double started;           // the first step of this process
    double last_seen;         // the last download
    double best_seconds;      // from the first step to the end of the best's evaluation
    int64_t first_step;       // of this process
    size_t scored, to_score;  // bytes of the evaluation under way
} watch;

// One of these came: train() looks between steps, look() between the passes of an evaluation. A
// second SIGINT or SIGTERM ends the program at once; a closed terminal may send SIGHUP twice.
static const int stop_signals[] = {SIGINT, SIGTERM, SIGHUP};
static volatile sig_atomic_t stop_signal;
static void on_signal(int s) {
    stop_signal = s;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

// What nohup or a shell's & had ignored stays so.
static void catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal}, before;
    for (int i = 0; i < 3; i++)
        if (sigaction(stop_signals[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(stop_signals[i], &action, NULL);
}

double step_bytes(void) {
    return (double)opt.batch * (double)opt.seq * (double)opt.accum;
}

// A nat is 1/ln 2 bits.
static double bits(double nats) { return nats / 0.6931471805599453; }

// Operations of a step: 2 to a parameter and byte in forward, 4 in backward. Tables are looked up,
// which costs none, unless the head, tied to the embedding, multiplies by it.
double step_operations(const Run *r) {
    size_t looked_up = 0;
    for (int i = 0; i < r->model.n_tensors; i++) {
        const Tensor *t = &r->model.tensors[i];
        if (t->table && !(r->config.tie && t->offset == r->model.embedding)) looked_up += t->size;
    }
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

// How many held-out bytes an evaluation scores before the end of the run. By default so many that
// evaluations cost at most a tenth of the training: forward is a third of a step's operations, and
// 3/10 of a third is a tenth. The count follows from the options and not from the clock, so that a
// resumed run scores the same bytes. At least 128 KiB, which is all of TinyShakespeare's held-out
// tenth.
size_t middle_bytes(void) {
    double bytes = opt.val_bytes > 0 ? (double)opt.val_bytes
                                     : 0.3 * (double)opt.eval_every * step_bytes();
    if (opt.val_bytes == 0 && bytes < 1 << 17) bytes = 1 << 17;
    return bytes < (double)data.n_held_out ? (size_t)bytes : data.n_held_out;
}

size_t last_bytes(void) {
    size_t most = (size_t)opt.last_bytes;
    return most > 0 && most < data.n_held_out ? most : data.n_held_out;
}

// The scorer's loss in nats per byte on about `most` held-out bytes, of which every text gives its
// share, evenly spread; *scored: how many they were. 1: a signal came.
static int held_out_loss(Run *r, size_t most, double *loss, size_t *scored) {
    double sum = 0;
    Error e;
    // A pass at least: it costs as much as a part of one, and few bytes say little.
    size_t pass = score_part_pass(&scorer);
    if (most < pass) most = pass < data.n_held_out ? pass : data.n_held_out;
    watch.scored = 0;
    watch.to_score = most;
    for (int i = 0; i < data.n; i++) {
        const Text *t = &data.texts[i];
        size_t held = t->n - t->n_train;
        double share = (double)most / (double)data.n_held_out * (double)held;
        // What stands before n_train is context, as it would be in use.
        int status = model_score_part(&scorer, t->bytes, t->n, t->n_train,
                                      most < data.n_held_out ? (size_t)ceil(share) : held, &sum,
                                      &watch.scored, look, &e);
        if (status < 0) die(&r->cli, &e);
        if (status > 0) return 1;
    }
    *scored = watch.scored;
    *loss = sum / (double)watch.scored;
    return 0;
}

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
static bool samples_lost;  // to a disk, not to a reader who had enough: the exit status says so
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
    int samples_errno = errno;
    samples_lost = samples_errno != EPIPE;
    progress_end(&progress);
    fprintf(stderr, "note: cannot write to standard output: %s; no more samples\n",
            strerror(samples_errno));
    opt.sample_bytes = 0;
}

// What will be trained, on what, and the memory it takes: on standard error, samples go to output.
static void print_plan(const Run *r) {
    const Model *m = &r->model;
    char name[128];
    fprintf(stderr, "fuzzytok.c on %s, %s backend, %d threads\n", machine_name(name, sizeof name),
            r->backend->name, threads_in_use());
    print_layers(stderr, m);
    for (int i = 0; i < m->n_tensors && opt.tensors; i++) print_tensor(stderr, &m->tensors[i]);
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

// What is judged, sampled and kept: the averaged or else the current parameters, into r->host.
static void read_params(Run *r) {
    model_read(&r->model, r->host, r->model.ema ? r->model.ema : r->model.params);
}

// read_params, and their held-out loss; INFINITY where
// nothing is held out. 1: a signal came first.
static int judge(Run *r, double *loss) {
    size_t scored;
    *loss = INFINITY;
    read_params(r);
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
    if (now() - r->last_save >= opt.save_every) save(r);
}

// Whether an evaluation belongs after that step, or a sample. After the last step main() prints a
// sample of the best.
static bool due(int64_t step) { return step % opt.eval_every == 0 || step == opt.steps; }
static bool sample_due(int64_t step) {
    return opt.sample_every && step % opt.sample_every == 0 && step < opt.steps;
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
        if (due(queued) || sample_due(queued) || stop_signal || queued - r->step >= RING / 2 ||
            now() - watch.last_seen > 0.1)
            see_steps(r, queued);
        if (due(queued)) evaluate(r);
        if (sample_due(queued) && !stop_signal) {
            read_params(r);
            print_sample(r, r->host);
        }
    }
    if (queued > r->step) see_steps(r, queued);  // the signal came after the last look
    progress_end(&progress);
    // Also after a signal: no step that was taken is lost.
    if (r->step != r->saved_step) save(r);
}

// The best parameters' loss on the whole held-out text or --last-bytes of it, where so far a part
// was scored, or else as nanoGPT counts: on the terminal and in the log. 1: a signal came first.
static int print_last_figure(Run *r) {
    size_t scored = data.n_held_out;
    bool part = middle_bytes() < data.n_held_out;
    double windows = NAN;
    model_write(&scorer, scorer.params, r->best_params);
    if (part ? held_out_loss(r, last_bytes(), &r->whole, &scored) != 0
             : last_bytes() == data.n_held_out && (windows = loss_in_windows(r), stop_signal))
        return 1;
    progress_end(&progress);
    if (scored < data.n_held_out)
        fprintf(stderr, "%zu of %zu held-out bytes", scored, data.n_held_out);
    else
        fprintf(stderr, "whole held-out text: %zu bytes", data.n_held_out);
    if (part) {
        fprintf(stderr, ", %.4f nats/byte", r->whole);
        run_log(r, "# best: step %lld, held out %.9g on a part, on %s%zu bytes %.9g\n",
                (long long)r->best_step, r->best, scored < data.n_held_out ? "" : "all ", scored,
                r->whole);
        Error e;
        if (run_save_model(r, &e)) die(&r->cli, &e);
    } else if (!isnan(windows)) {  // NAN: there was no position to judge, or no time
        fprintf(stderr, "; in windows of %d that do not overlap, as nanoGPT counts: "
                        "%.4f nats/byte", WINDOW, windows);
        run_log(r, "# best: step %lld, held out %.9g, in windows of %d bytes that do not "
                   "overlap %.9g\n", (long long)r->best_step, r->best, WINDOW, windows);
    }
    fprintf(stderr, "\n");
    run_flush_log(r);
    return 0;
}

// What the run came to: on the terminal, and without the time, which no two runs share, in the log.
// 1: a signal came first.
static int print_result(Run *r) {
    double seconds = now() - watch.started;
    if (data.n_held_out > 0) {
        fprintf(stderr, "best held-out loss %.4f nats/byte at step %lld", r->best,
                (long long)r->best_step);
        if (r->best_step > watch.first_step)
            fprintf(stderr, ", %.2f s after %s began", watch.best_seconds,
                    watch.first_step ? "this part of the run" : "the first step");
        if (middle_bytes() < data.n_held_out) fprintf(stderr, ", on a part of the text");
        fprintf(stderr, "\n");
        if (print_last_figure(r)) return 1;
    }
    fprintf(stderr, "%.2f s with saving: %s/model.safetensors\n", seconds, r->folder);
    return 0;
}

// What --units may hold, for --help: a line for each mixer.
static void add_mixers(char *about, size_t size) {
    char *to = about + strlen(about);
    snprintf(to, size - strlen(about), "\nA stack of units, --units \"3x(conv:2:1 conv:2:2)\":");
    for (int i = 0; i < n_mixers; i++) {
        const Mixer *m = mixers[i];
        char line[160];
        snprintf(line, sizeof line, "%s", m->name);
        for (int j = 0; j < MAX_DECLARED && m->numbers[j].name; j++)
            snprintf(line + strlen(line), sizeof line - strlen(line), "[:%s]",
                     m->numbers[j].word);
        snprintf(line + strlen(line), sizeof line - strlen(line), "%s%s", m->repeats ? "..." : "",
                 m->activation ? "[:ACTIVATION]" : "");
        snprintf(about + strlen(about), size - strlen(about), "\n  %-34s %s", line, m->formula);
    }
}

int main(int argc, char **argv) {
    static Run run;
    double began = now();
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
    apply_row(&r->cli, presets[opt.preset].units, presets[opt.preset].options);
    if (opt.resume && given(&r->cli, "out"))
        usage_error(&r->cli, "--resume DIR goes on in DIR: leave --out out%s%s", "", "");
    static const char *const fixed[] = {"preset", "minutes", "init"};
    for (int i = 0; i < 3; i++)
        if (opt.resume && given(&r->cli, fixed[i]))
            usage_error(&r->cli, "--resume DIR goes on with that run's options: leave --%s out%s",
                        fixed[i], "");
    if (given(&r->cli, "minutes") && opt.minutes == 0)
        usage_error(&r->cli, "--minutes is 0, expected more than 0%s%s", "", "");
    if (opt.minutes > 0 && given(&r->cli, "steps"))
        usage_error(&r->cli, "--minutes chooses the steps: leave --steps or --minutes out%s%s", "",
                    "");
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    // A progress line redraws itself only there; in a file each is a line of its own.
    progress.terminal = isatty(2);
    signal(SIGPIPE, SIG_IGN);  // print_sample sees that its reader has gone
    if (begin_run(r, began, &e)) die(&r->cli, &e);
    print_plan(r);

    // From here on there is something to save: a signal ends the loop, not the program.
    catch_signals();
    train(r);
    if (r->step < opt.steps || r->evaluated < r->step || print_result(r)) {
        progress_end(&progress);
        fprintf(stderr, "stopped after step %lld; go on with: ./train --resume %s\n",
                (long long)r->step, r->folder);
        return 0;
    }
    print_sample(r, r->best_params);
    return samples_lost;
}
