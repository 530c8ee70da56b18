// bench.c: how fast every part is, beside the limit of the machine. Tables on standard output.
//
//   ./bench                      the default tables for the device that is here
//   ./bench --only step,layers   some of them            ./bench --tsv > bench.tsv
// Refuses: unknown tables, sizes beyond the memory. Read model.h first. Figures are medians; run it
// on an otherwise idle machine.
#define _POSIX_C_SOURCE 200809L
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdarg.h>

#include "support/arithmetic.h"
#include "support/options.h"
#include "support/stream.h"

typedef struct {
    int device;
    const char *kernels, *only, *units;
    int64_t batch, seq, threads;
    double seconds;
    bool tsv, at_once;
} Options;

static Options opt = {.seconds = 1};
static const char *const device_names[] = {"auto", "cpu", "cuda", NULL};
static Option table[] = {
    CHOICE("device", NOT_SAVED, &opt.device, device_names, "NAME", "where to compute"),
    TEXT("kernels", NOT_SAVED, &opt.kernels, "NAME", "who computes"),
    TEXT("only", NOT_SAVED, &opt.only, "LIST", "tables by name, commas between"),
    TEXT("units", NOT_SAVED, &opt.units, "TEXT",
         "of step, layers: this stack with a tied head in place of the paper's"),
    FLAG("at-once", NOT_SAVED, &opt.at_once, "a step's rows in one pass, as ./train --at-once"),
    INT("batch", NOT_SAVED, &opt.batch, 0, 1 << 20, "B",
        "of step, layers, ladder, linear; 0 = usual"),
    INT("seq", NOT_SAVED, &opt.seq, 0, 1 << 24, "T",
        "of step, layers, ladder, linear; 0 = usual"),
    INT("threads", NOT_SAVED, &opt.threads, 0, 4096, "N", "CPU threads, 0 = all cores"),
    NUMBER("seconds", NOT_SAVED, &opt.seconds, 0.01, 600, "S", "spent on each figure"),
    FLAG("tsv", NOT_SAVED, &opt.tsv, "tab-separated values instead of columns"),
};
enum { N_OPTIONS = sizeof table / sizeof *table };

static Cli cli = {"bench", "usage: ./bench [options]", "", table, N_OPTIONS, NULL, 0};
static const Backend *backend;
static bool on_cpu(void) { return backend == &cpu_backend || backend == &plain_backend; }

// ---- Printing and timing -----------------------------------------------------------------------

static char command[1024] = "./bench";  // as it was typed, but for --only and --tsv

// Every table says the command that makes it alone.
static void title(const char *name, const char *what) {
    printf(opt.tsv ? "# %s\t%s\t" : "\n%s: %s\n# ", name, what);
    printf("%s --only %s\n", command, name);
}

static void note_command(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        bool only = strncmp(argv[i], "--only", 6) == 0;
        if (only && !argv[i][6]) i++;  // its value is a word of its own
        if (only || strcmp(argv[i], "--tsv") == 0) continue;
        size_t used = strlen(command);
        snprintf(command + used, sizeof command - used, strchr(argv[i], ' ') ? " \"%s\"" : " %s",
                 argv[i]);
    }
}

// One line of cells, between which the format has tabs. They stay with --tsv; else they become
// columns, the first one wide.
static void row(const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *cell = line, *next; cell; cell = next) {
        next = opt.tsv ? NULL : strchr(cell, '\t');
        if (next) *next++ = 0;
        printf(opt.tsv ? "%s" : cell == line ? "%-30s" : "%14s", cell);
    }
    printf("\n");
    flush_stdout(&cli);
}

// A rate as a cell; a dash where there are no operations to count.
typedef struct {
    char text[32];
} Cell;
static Cell rate_cell(const char *format, double rate) {
    Cell c = {"-"};
    if (rate > 0) snprintf(c.text, sizeof c.text, format, rate);
    return c;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Median seconds of f(arg), which waits for its own work; spread: (9th tenth - 1st tenth) /
// median.
static double median_seconds(void (*f)(void *), void *arg, double *spread) {
    enum { MOST = 1000 };
    static double t[MOST];
    int n = 0;
    f(arg);  // warm-up
    for (double begin = now(); n < MOST && (n < 3 || now() - begin < opt.seconds); n++) {
        double t0 = now();
        f(arg);
        t[n] = now() - t0;
    }
    qsort(t, (size_t)n, sizeof *t, by_size);
    if (spread) *spread = (t[n * 9 / 10] - t[n / 10]) / t[n / 2];
    return t[n / 2];
}

// ---- A model that trains on random bytes -------------------------------------------------------

static Training training(void) {
    return (Training){.seed = 1, .passes = 1, .at_once = opt.at_once,
                      .hyper = {.steps = 1 << 30, .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.99,
                                .eps = 1e-8, .clip = 1}};
}

// A model at B x T on `be`; -1 where it does not fit.
static int open_config(Model *m, const Backend *be, const Config *c, int B, int T, Error *e) {
    Training t = training();
    size_t n = (size_t)4 * T + 65536;
    uint64_t length = n;
    uint8_t *text = malloc(n);
    if (!text) return fail(e, "out of memory");
    for (size_t i = 0; i < n; i++)
        text[i] = (uint8_t)philox(1, (uint32_t)i, 0, 0, RNG_TEST).v[0];
    int failed = model_open(m, be, c, B, T, &t, e);
    if (!failed && (model_init_params(m, 1, e) || model_set_corpus(m, text, &length, 1, e))) {
        model_free(m);
        failed = -1;
    }
    free(text);
    return failed;
}

// The paper's configuration, with --units in another stack.
static int open_model(Model *m, const Backend *be, int B, int T, Error *e) {
    Config c = config_paper();
    if (opt.units && snprintf(c.units, sizeof c.units, "%s", opt.units) >= UNITS_TEXT)
        return fail(e, "--units is longer than %d bytes", UNITS_TEXT - 1);
    if (opt.units) c.tie = true, c.window = T;  // attention sees the whole sequence
    return open_config(m, be, &c, B, T, e);
}

// Waits until everything queued is done.
static void finish(const Model *m) {
    StepFigures f;
    m->backend->download(&f, &m->state->ring[0], sizeof f);
}

static void one_step(void *m) {
    model_train_step(m);
    finish(m);
}

// As training does it: the host runs ahead of the GPU and waits now and then.
enum { QUEUED = 10 };
static void queued_steps(void *m) {
    for (int i = 0; i < QUEUED; i++) model_train_step(m);
    finish(m);
}

// Median seconds of a step. Slow kernels are timed step by step: they must not take minutes.
static double step_seconds(Model *m, double *spread) {
    if (m->backend->capture == NULL) return median_seconds(one_step, m, spread);
    one_step(m);  // loads the kernels, captures the step
    double t0 = now();
    one_step(m);
    if (now() - t0 > 0.05) return median_seconds(one_step, m, spread);
    return median_seconds(queued_steps, m, spread) / QUEUED;
}

// A training step's bytes/s of the paper's configuration; 0 where the shape does not fit.
static double step_rate(const Backend *be, int B, int T) {
    Model m;
    Error e;
    if (open_model(&m, be, B, T, &e)) return 0;
    double s = step_seconds(&m, NULL);
    model_free(&m);
    return (double)B * T / s;
}

// 6 operations per parameter outside the embedding and byte: a multiply and an add forward, the
// same twice backward.
static double flops_per_byte(const Model *m) {
    return 6.0 * (double)(m->n_params - (size_t)V * (size_t)m->config.channels);
}

static void step_row(const Backend *be, int B, int T) {
    Model m;
    Error e;
    if (open_model(&m, be, B, T, &e)) die(&cli, &e);
    double spread, s = step_seconds(&m, &spread), bytes = (double)B * T;
    row("%dx%d\t%.3f\t%.0f\t%.1f\t%.1f\t%.0f%%", B, T, s * 1e3, bytes / s,
        flops_per_byte(&m) * bytes / s / 1e9, (double)model_memory(&m) / 1e6, spread * 100);
    model_free(&m);
}

// The whole training step, and that its cost is linear in the bytes.
static void step_table(void) {
    bool cpu = on_cpu();
    title("step", "a training step of the paper's configuration (forward, backward, AdamW)");
    row("batch x seq\tms\tbytes/s\tGFLOP/s\tMB\tspread");
    if (opt.batch || opt.seq) {
        step_row(backend, opt.batch ? (int)opt.batch : 16, opt.seq ? (int)opt.seq : 512);
        return;
    }
    const int T[] = {128, 512, 2048};
    for (int i = 0; i < 3; i++) step_row(backend, cpu ? 16 : 32, T[i]);
}

// ---- Cost against length: as many bytes in a step, cut into fewer and longer windows ------------

// Stacks of nearly as many parameters. window: what attention looks at, 0 = T. A mixer more is a
// row more.
static const struct {
    const char *name, *units;
    int window;
} stacks[] = {
    {"conv", "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)", 0},
    {"attn:W=T", "2x(attn:4 mlp:4)", 0},
    {"attn:W=512", "2x(attn:4 mlp:4)", 512},
};
enum { N_STACKS = sizeof stacks / sizeof *stacks };

static void length_row(int stack, int channels, int B, int T) {
    Config c = {.channels = channels, .latent = channels, .activation = ACT_gelu, .tie = true};
    Model m;
    Error e;
    snprintf(c.units, sizeof c.units, "%s", stacks[stack].units);
    c.window = stacks[stack].window ? stacks[stack].window : T;
    if (open_config(&m, backend, &c, B, T, &e)) die(&cli, &e);
    double spread, s = step_seconds(&m, &spread);
    row("%s\t%d\t%.3f\t%.0f\t%.1f\t%zu\t%.0f%%", stacks[stack].name, T, s * 1e3, B * T / s,
        (double)model_memory(&m) / 1e6, m.n_params, spread * 100);
    model_free(&m);
}

static void length_table(void) {
    bool cpu = on_cpu();
    int bytes = cpu ? 4096 : 65536, first = cpu ? 128 : 512, last = bytes / (cpu ? 1 : 2);
    int channels = cpu ? 128 : 256;
    char what[96];
    snprintf(what, sizeof what, "a training step of %d bytes by the length T of its windows, C %d",
             bytes, channels);
    title("length", what);
    for (int i = 0; i < N_STACKS; i++) printf("# %s: %s\n", stacks[i].name, stacks[i].units);
    row("stack\tT\tms\tbytes/s\tMB\tparameters\tspread");
    for (int i = 0; i < N_STACKS; i++)
        for (int T = first; T <= last; T *= 2) length_row(i, channels, bytes / T, T);
}

// ---- Where a step's time goes: on the CPU by operation, on a GPU by kernel ----------------------

static void operation_rows(const KernelTime *k, int n, const KernelTime *all) {
    row("operation\tcalls\tms\tshare\tGFLOP/s\tGB/s");
    for (int i = 0; i < n; i++) {
        double s = k[i].seconds;
        row("%s\t%d\t%.3f\t%.1f%%\t%s\t%.1f", k[i].name, k[i].launches, s * 1e3,
            100 * s / all->seconds, rate_cell("%.1f", k[i].flops / s / 1e9).text,
            k[i].bytes / s / 1e9);
    }
    row("all\t\t%.3f", all->seconds * 1e3);
}

// What this GPU was measured to do in a second, in operations of matrix products and in bytes. 0:
// not known.
typedef struct {
    double flops, bytes;
} Limit;

static Limit measure_limit(void) {
    bool in_bf16 = backend->act_bytes < sizeof(real);
    Limit l = {in_bf16 ? gpu_cublas_rate(8192, 8192, 8192, true) : gpu_fma_rate(),
               gpu_copy_rate()};
    printf("# the limit: %.0f TFLOP/s (%s) or %.0f GB/s (a large copy), whichever binds\n",
           l.flops / 1e12, in_bf16 ? "cuBLAS, 8192^3 in bf16" : "float32 multiply-adds",
           l.bytes / 1e9);
    return l;
}

// Seconds that k's work takes at the least.
static double least_seconds(const KernelTime *k, Limit l) {
    double f = l.flops > 0 ? k->flops / l.flops : 0, b = l.bytes > 0 ? k->bytes / l.bytes : 0;
    return f > b ? f : b;
}

// One line. k: of one step; total: what its share is a share of; least: at the limit, seconds.
static void kernel_row(const KernelTime *k, double total, double least) {
    double s = k->seconds;
    row("%s\t%d\t%.1f\t%.1f%%\t%s\t%.0f\t%.0f%%", k->name, k->launches, s * 1e6, 100 * s / total,
        rate_cell("%.1f", k->flops / s / 1e12).text, k->bytes / s / 1e9, 100 * least / s);
}

// Every kernel, then what they come to, at a limit that is the sum of theirs: one after the other,
// as they were traced, and in `step` seconds, as training runs them.
static void kernel_rows(const KernelTime *k, int n, const KernelTime *all, double step) {
    double least = 0;
    Limit limit = measure_limit();
    KernelTime captured = *all;
    captured.name = "a step, captured";
    captured.seconds = step;
    printf("# launches one at a time; in a captured step they overlap, and it takes less\n");
    row("kernel\tlaunches\tus\tshare\tTFLOP/s\tGB/s\tof the limit");
    for (int i = 0; i < n; i++) {
        least += least_seconds(&k[i], limit);
        kernel_row(&k[i], all->seconds, least_seconds(&k[i], limit));
    }
    kernel_row(all, all->seconds, least);
    kernel_row(&captured, all->seconds, least);
}

// Makes n rows of so many steps those of one, and returns their sum.
static KernelTime average(KernelTime *k, int n, int steps) {
    KernelTime all = {.name = "all, one after the other"};
    for (int i = 0; i < n; i++) {
        all.launches += k[i].launches /= steps;
        all.seconds += k[i].seconds /= steps;
        all.flops += k[i].flops /= steps;
        all.bytes += k[i].bytes /= steps;
    }
    return all;
}

static void queue_step(void *m) { model_train_step(m); }

static void layers_table(void) {
    static KernelTime rows[MOST_KERNEL_TIMES];
    bool cpu = on_cpu();
    int B = opt.batch ? (int)opt.batch : cpu ? 16 : 32, n = 0, steps = 0;
    int T = opt.seq ? (int)opt.seq : cpu ? 512 : 1024;
    Model m;
    Error e;
    char what[96];
    Backend b = *backend;
    b.capture = NULL;  // launch by launch: a trace does not see into a graph
    b.side_rows = 0;   // and has one clock
    int (*trace)(void (*)(void *), void *, KernelTime *, int) = cpu ? cpu_trace : gpu_trace;
    double step = cpu ? 0 : (double)B * T / step_rate(backend, B, T);
    if (open_model(&m, &b, B, T, &e)) die(&cli, &e);
    trace(queue_step, &m, rows, 0);  // warm-up: the next begins again with no rows
    for (double begin = now(); steps < 3 || now() - begin < opt.seconds; steps++)
        n = trace(queue_step, &m, rows, n);
    model_free(&m);
    snprintf(what, sizeof what, "a step of %dx%d by %s", B, T, cpu ? "operation" : "kernel");
    title("layers", what);
    const KernelTime all = average(rows, n, steps);
    if (cpu)
        operation_rows(rows, n, &all);
    else
        kernel_rows(rows, n, &all, step);
}

// ---- Streaming: the limit is how fast the weights come from cache ------------------------------

static const float *read_buffer;
static size_t read_count;
static volatile float read_sink;

// Sums the buffer, 128 sums side by side in each thread: nothing but loads.
static void read_once(void *unused) {
    enum { PIECE = 1 << 15 };  // 128 KB: its last additions do not count
    (void)unused;
    float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (size_t piece = 0; piece < read_count / PIECE; piece++) {
        const float *p = read_buffer + piece * PIECE;
        float sum[128] = {0};
        for (int i = 0; i < PIECE; i += 128)
            for (int j = 0; j < 128; j++) sum[j] += p[i + j];
        for (int j = 0; j < 128; j++) total += sum[j];
    }
    read_sink = total;
}

typedef struct {
    Stream stream;
    int ids[MAX_STREAMS];
    real logits[MAX_STREAMS * V];
} Push;

// 100 bytes of every stream.
static void push_bytes(void *arg) {
    Push *p = arg;
    for (int i = 0; i < 100; i++) {
        stream_push(&p->stream, p->ids, NULL, p->logits);
        for (int j = 0; j < p->stream.S; j++) p->ids[j] = (p->ids[j] * 5 + 1) % V;
    }
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static int most_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// One line: the rate at which `threads` read as many bytes as a byte of text takes, and what
// streams make of it.
static void stream_row(Model *m, const real *params, int streams, int threads) {
    static Push p;
    Error e;
    double weights = (double)(m->n_params - (size_t)V * (size_t)m->config.channels) * sizeof(real);
    set_threads(threads);
    double rate = weights / median_seconds(read_once, NULL, NULL);
    memset(p.ids, 0, sizeof p.ids);
    if (stream_open(&p.stream, &m->config, params, streams, &e)) die(&cli, &e);
    stream_begin(&p.stream, streams);
    double s = median_seconds(push_bytes, &p, NULL) / 100;
    stream_free(&p.stream);
    row("%d stream%s, %d thread%s\t%.0f\t%.1f\t%.1f\t%.0f%%\t%.1f", streams,
        streams > 1 ? "s" : "", threads, threads > 1 ? "s" : "", streams / s, weights / s / 1e9,
        rate / 1e9, 100 * weights / s / rate, weights / 1e6);
}

static void stream_table(void) {
    Model m;
    Error e;
    Config config = config_paper();
    title("stream", "generating text with the paper's configuration, on the CPU");
    if (model_open(&m, &cpu_backend, &config, 1, 1, NULL, &e) || model_init_params(&m, 1, &e))
        die(&cli, &e);
    read_buffer = m.params;
    read_count = m.n_params - (size_t)V * (size_t)config.channels;
    row("streams\tbytes/s\tweights GB/s\tread GB/s\tshare\tMB a byte");
    int threads = most_threads();
    for (int n = 1; n <= threads; n += n == threads ? 1 : threads - 1) {
        stream_row(&m, m.params, 1, n);
        stream_row(&m, m.params, 8, n);
    }
    set_threads(threads);
    model_free(&m);
}

// ---- The GPU: the paper's tables, and every kernel beside the ceilings --------------------------

// The paper's Table 1: training bytes/s of each set of kernels, and the last over the first.
static void table1(void) {
    const int shapes[][2] = {{1, 128}, {8, 256}, {16, 512}, {32, 1024}, {64, 1024}, {32, 2048},
                             {64, 2048}};
    int n;
    Error e;
    const char *const *names = gpu_backend_names(&n);
    char line[256];
    title("table1", "training, bytes/s, the paper's configuration, by set of kernels");
    int used = snprintf(line, sizeof line, "batch x seq");
    for (int j = 0; j < n; j++)
        used += snprintf(line + used, sizeof line - (size_t)used, "\t%s", names[j]);
    row("%s\tlast/first", line);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int B = shapes[i][0], T = shapes[i][1];
        double first = 0, rate = 0;
        used = snprintf(line, sizeof line, "%dx%d", B, T);
        for (int j = 0; j < n; j++) {
            rate = step_rate(gpu_backend(names[j], &e), B, T);
            if (j == 0) first = rate;
            used += snprintf(line + used, sizeof line - (size_t)used, "\t%.0f", rate);
        }
        row("%s\t%.2f", line, rate / first);
    }
}

// The paper's memory table: what the program allocates on the device for a training step.
static void memory_table(void) {
    const int shapes[][2] = {{8, 512}, {16, 1024}, {32, 1024}, {32, 2048}};
    const char *paper[] = {"87.8", "144.0", "232.2", "392.7"};
    title("memory", "device memory of a training step, MB (10^6 bytes), the paper's configuration");
    row("batch x seq\t%s\tthe paper", backend->name);
    for (int i = 0; i < 4; i++) {
        Model m;
        Error e;
        if (open_model(&m, backend, shapes[i][0], shapes[i][1], &e)) die(&cli, &e);
        one_step(&m);
        row("%dx%d\t%.1f\t%s", shapes[i][0], shapes[i][1], (double)gpu_allocated_bytes() / 1e6,
            paper[i]);
        model_free(&m);
    }
}

// Every kernel of the table at one shape, as a share of what this device was measured to do. Small
// shapes work out of L2, where the same call just before has left what it read (gpu_time).
static void ladder_table(void) {
    int n;
    const Kernel *kernels = gpu_kernels(&n);
    ConvShape s = {opt.batch ? (int)opt.batch : 32, opt.seq ? (int)opt.seq : 1024, 256, 256, 3, 4};
    const Limit in_float = {gpu_fma_rate(), gpu_copy_rate()};
    const Limit in_bf16 = {gpu_cublas_rate(8192, 8192, 8192, true), in_float.bytes};
    double gemm = gpu_cublas_rate(s.B * s.T, 256, 768, false);
    double gemm_bf16 = gpu_cublas_rate(s.B * s.T, 256, 768, true);
    char what[160];
    snprintf(what, sizeof what, "every kernel at %dx%d, C = O = 256, K = 3, dil = 4", s.B, s.T);
    title("ladder", what);
    printf("# the limit: a large copy's %.0f GB/s; in float32 multiply-adds' %.1f TFLOP/s, in bf16 "
           "cuBLAS' %.0f on 8192^3. cuBLAS on this bare product: %.1f in float32, %.1f in bf16\n",
           in_float.bytes / 1e9, in_float.flops / 1e12, in_bf16.flops / 1e12, gemm / 1e12,
           gemm_bf16 / 1e12);
    printf("# calls in a row, captured, so without the host's launches; conv_forward with bias and "
           "GELU, without residual and dropout\n");
    row("kernel\tus\tTFLOP/s\tGB/s\tof the limit");
    for (int i = 0; i < n; i++) {
        KernelTime k = {.name = kernels[i].name};
        double t = kernel_seconds(&kernels[i], s, &k.flops, &k.bytes);
        double least = least_seconds(&k, kernels[i].act_bytes < sizeof(real) ? in_bf16 : in_float);
        row("%s\t%.1f\t%s\t%.0f\t%.0f%%", k.name, t * 1e6,
            rate_cell("%.2f", k.flops / t / 1e12).text, k.bytes / t / 1e9, 100 * least / t);
    }
}

// Linear layers of the widths that transformers have, beside cuBLAS on the bare product: what
// training calls, and the rung below it. Forward with bias, GELU and what backward needs; to the
// input on through the activation.
static void linear_table(void) {
    static const int widths[][2] = {{256, 256}, {256, 1024}, {1024, 256}, {512, 1536}, {1024, 512}};
    static const char *const ops[] = {"conv_forward", "conv_backward_input",
                                      "conv_backward_weight"};
    int n, N = (opt.batch ? (int)opt.batch : 32) * (opt.seq ? (int)opt.seq : 1024);
    const Kernel *k = gpu_kernels(&n);
    char what[80];
    snprintf(what, sizeof what, "linear layers on %d rows, bf16, beside cuBLAS", N);
    title("linear", what);
    row("C to O, kernel\tus\tTFLOP/s\tGB/s\tcuBLAS\tof cuBLAS");
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
        for (int op = 0; op < 3; op++) {
            int C = widths[w][0], O = widths[w][1];
            double bare = gpu_cublas_rate(op == 2 ? C : N, op == 1 ? C : O,
                                          op == 2 ? N : op == 1 ? O : C, true);
            for (int i = 0; i < n; i++) {
                double flops, bytes;
                if (strcmp(k[i].op, ops[op]) != 0 || k[i].act_bytes == sizeof(real)) continue;
                double t = kernel_seconds(&k[i], (ConvShape){1, N, C, O, 1, 1}, &flops, &bytes);
                row("%d to %d, %s\t%.1f\t%.0f\t%.0f\t%.0f\t%.0f%%", C, O, k[i].name, t * 1e6,
                    flops / t / 1e12, bytes / t / 1e9, bare / 1e12, 100 * flops / t / bare);
            }
        }
}

// ---- The tables --------------------------------------------------------------------------------

static const struct {
    const char *name, *what;
    void (*print)(void);
    bool cpu, gpu;  // printed there unless --only asks for others
} tables[] = {
    {"step", "a whole training step at several lengths", step_table, true, true},
    {"layers", "where its time goes: by operation, on a GPU by kernel", layers_table, true, true},
    {"length", "a step's time and memory by the length of its windows", length_table, true, true},
    {"stream", "generation on the CPU", stream_table, true, false},
    {"table1", "the paper's Table 1 on the GPU", table1, false, true},
    {"memory", "the paper's memory table", memory_table, false, true},
    {"ladder", "every GPU kernel, again and again", ladder_table, false, true},
    {"linear", "linear layers on tensor cores, beside cuBLAS", linear_table, false, false},
};
enum { N_TABLES = sizeof tables / sizeof *tables };

// Whether table i is in the list of --only, or of the device's own.
static bool wanted(int i) {
    const char *name = tables[i].name;
    if (!opt.only) return on_cpu() ? tables[i].cpu : tables[i].gpu;
    size_t n = strlen(name);
    for (const char *p = opt.only; p; p = strchr(p, ',')) {
        if (*p == ',') p++;
        if (strncmp(p, name, n) == 0 && (p[n] == 0 || p[n] == ',')) return true;
    }
    return false;
}

// Every kernel of the ladder, for --help.
static void add_kernels(char *about, size_t size) {
    int n;
    const Kernel *k = gpu_kernels(&n);
    if (n) snprintf(about + strlen(about), size - strlen(about), "\nKernels of the ladder:");
    for (int i = 0; i < n; i++)
        snprintf(about + strlen(about), size - strlen(about), "\n  %-30s %-13s %s", k[i].name,
                 k[i].used_by, k[i].idea);
}

int main(int argc, char **argv) {
    Error e;
    static char about[8192] = "Measures every part on this machine. Tables:";
    for (int i = 0; i < N_TABLES; i++)
        snprintf(about + strlen(about), sizeof about - strlen(about), "\n  %-24s %s",
                 tables[i].name, tables[i].what);
    add_kernels(about, sizeof about);
    cli.about = about;
    parse_options(&cli, argc, argv);
    note_command(argc, argv);
    if (cli.n_files) usage_error(&cli, "unexpected '%s'%s", cli.files[0], "");
    if (opt.threads) set_threads((int)opt.threads);
    if (choose_backend(&backend, device_names[opt.device], opt.kernels, &e)) die(&cli, &e);
    int printed = 0;
    printf("# %s backend, %d threads\n", backend->name, most_threads());
    for (int i = 0; i < N_TABLES; i++)
        if (wanted(i)) {
            if (!tables[i].cpu && on_cpu())
                usage_error(&cli, "--only %s needs a GPU%s", tables[i].name, "");
            tables[i].print();
            printed++;
        }
    if (!printed) usage_error(&cli, "--only %s names no table%s", opt.only, "");
    flush_stdout(&cli);
    return 0;
}
