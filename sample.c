// sample.c: what one does with a trained model: write text, score a file, see where the model
// stumbles, take its latents, compress a file with it. One byte at a time, on the CPU.
//
// Refuses: a model file that is damaged or of another program, an output that exists (without
// --force) or is an input, a compressed file of another model. Data goes to stdout, all else to
// stderr.
// Read stream.h first. Run:  ./sample out/model.safetensors --prompt "The "      ./sample --help
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <signal.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "support/checkpoint.h"
#include "support/describe.h"
#include "support/heat.h"
#include "support/options.h"
#include "support/range_coder.h"
#include "support/stream.h"

typedef struct {
    const char *prompt, *prompt_file, *stop, *score, *windows, *heat, *latents;
    int64_t bytes, top_k, streams, threads;
    double temperature, top_p;
    uint64_t seed;
    bool compress, decompress, info, force;
} Options;

static Options opt = {.bytes = 400, .streams = 1, .temperature = 0.8, .top_p = 1, .seed = 1};

static Option table[] = {
    {.kind = OPT_SECTION, .help = "write text (the default)"},
    {.name = "prompt", .kind = OPT_TEXT, .value = &opt.prompt, .arg = "TEXT",
     .help = "how it begins"},
    {.name = "prompt-file", .kind = OPT_TEXT, .value = &opt.prompt_file, .arg = "FILE",
     .help = "the same from a file, - is standard input"},
    {.name = "bytes", .kind = OPT_INT, .value = &opt.bytes, .max = 1e15, .arg = "N",
     .help = "bytes to write after it, 0 = until stopped"},
    {.name = "stop", .kind = OPT_TEXT, .value = &opt.stop, .arg = "TEXT",
     .help = "end before TEXT; \\n, \\t and \\\\ are understood"},
    {.name = "temperature", .kind = OPT_REAL, .value = &opt.temperature, .max = 100, .arg = "X",
     .help = "below 1 plays safe, 0 takes the likeliest byte"},
    {.name = "top-k", .kind = OPT_INT, .value = &opt.top_k, .max = V, .arg = "K",
     .help = "draw from the K likeliest bytes, 0 = all"},
    {.name = "top-p", .kind = OPT_REAL, .value = &opt.top_p, .max = 1, .arg = "P",
     .help = "draw from the likeliest that reach P together"},
    {.name = "seed", .kind = OPT_SEED, .value = &opt.seed, .arg = "N",
     .help = "the same seed writes the same text"},
    {.name = "streams", .kind = OPT_INT, .value = &opt.streams, .min = 1, .max = MAX_STREAMS,
     .arg = "N", .help = "texts written side by side, printed one after the other"},
    {.kind = OPT_SECTION, .help = "measure a file (- is standard input)"},
    {.name = "score", .kind = OPT_TEXT, .value = &opt.score, .arg = "FILE",
     .help = "nats and bits per byte, perplexity"},
    {.name = "windows", .kind = OPT_TEXT, .value = &opt.windows, .arg = "T:S",
     .help = "with --score: T bytes in, a target behind each; again every S, for new targets"},
    {.name = "heat", .kind = OPT_PAGE, .value = &opt.heat, .arg = "[OUT.html]",
     .help = "with --score: every byte by its surprise, in colour, as TSV or a page"},
    {.name = "latents", .kind = OPT_TEXT, .value = &opt.latents, .arg = "OUT.npy FILE",
     .help = "write z of every byte, float32 (bytes, D)"},
    {.kind = OPT_SECTION, .help = "compress a file with the model as the statistics"},
    {.name = "compress", .kind = OPT_FLAG, .value = &opt.compress, .arg = "IN OUT",
     .help = "in about the bits that --score says"},
    {.name = "decompress", .kind = OPT_FLAG, .value = &opt.decompress, .arg = "IN OUT",
     .help = "same model, build and machine"},
    {.kind = OPT_SECTION, .help = "in general (an output - is standard output)"},
    {.name = "info", .kind = OPT_FLAG, .value = &opt.info,
     .help = "what the model is, and how it was trained"},
    {.name = "force", .kind = OPT_FLAG, .value = &opt.force, .help = "overwrite outputs"},
    {.name = "threads", .kind = OPT_INT, .value = &opt.threads, .max = 1024, .arg = "N",
     .help = "0 = all; the bits do not depend on it"},
};

static Cli cli = {
    .program = "sample",
    .usage = "usage: ./sample MODEL [options]      MODEL: model.safetensors, or its folder",
    .about = "Writes text with a trained model, or measures or compresses a file with it.",
    .options = table,
    .n_options = sizeof table / sizeof *table,
};

// ---- Standard output, and leaving ---------------------------------------------------------------

// The output that is being written; a signal removes its temporary file.
static Output output;

static void on_signal(int number) {
    if (output.temporary) unlink(output.temporary);
    signal(number, SIG_DFL);
    raise(number);
}

static void put(const void *bytes, size_t n) {
    if (n && fwrite(bytes, 1, n, stdout) != n) stdout_failed(&cli);  // bytes may be NULL then
}

static void flush(void) { flush_stdout(&cli); }

static void stop(const Error *e) {
    output_abandon(&output);
    die(&cli, e);
}

// A line that redraws itself, on a terminal only.
static void progress(const char *what, uint64_t done) {
    static double last;
    if (!isatty(2) || now() - last < 0.5) return;
    if (last > 0) fprintf(stderr, "\r%s %llu bytes ", what, (unsigned long long)done);
    last = now();
}

static void progress_end(void) {
    if (isatty(2)) fprintf(stderr, "\r%40s\r", "");
}

// ---- The model ----------------------------------------------------------------------------------

// Opens the model for as many streams as asked for, or as many as fit into a gigabyte of rings when
// `capacity` is 0. Returns the hash of the parameters: the model's name in a compressed file.
static uint64_t open_model(Stream *s, const char *path, int capacity) {
    Error e;
    Checkpoint ck;
    if (checkpoint_open(&ck, path, &e)) stop(&e);
    real *params = malloc(ck.n_params * sizeof *params);
    if (!params) fail(&e, "%.200s: out of memory", path);
    if (!params || checkpoint_read(&ck, "", params, &e)) stop(&e);
    if (capacity == 0) {
        double rows = (double)config_receptive_field(&ck.config);
        double ring = rows * ck.config.channels * sizeof(real);
        capacity = ring * MAX_STREAMS < 1e9 ? MAX_STREAMS : ring < 1e9 ? (int)(1e9 / ring) : 1;
    }
    if (stream_open(s, &ck.config, params, capacity, &e)) stop(&e);
    uint64_t hash = checksum_add(CHECKSUM_START, params, ck.n_params * sizeof *params);
    free(params);
    checkpoint_close(&ck);
#ifdef _OPENMP
    if (!s->parallel) omp_set_num_threads(1);  // too small a model for threads to gain anything
#endif
    return hash;
}

// ---- Write text ---------------------------------------------------------------------------------

static void read_prompt(uint8_t **bytes, size_t *n) {
    Error e;
    *n = opt.prompt ? strlen(opt.prompt) : 0;
    if (opt.prompt_file && read_whole(opt.prompt_file, bytes, n, &e)) stop(&e);
    if (opt.prompt_file) return;
    *bytes = malloc(*n + 1);
    if (!*bytes) stop((fail(&e, "out of memory"), &e));
    if (*n) memcpy(*bytes, opt.prompt, *n);
}

// Feeds the prompt to all streams. Only its last RF bytes can be seen. Without a prompt the text
// begins as after the end of a line, which is not printed.
static void feed_prompt(Stream *s, const uint8_t *prompt, size_t n, real *logits) {
    size_t field = (size_t)config_receptive_field(&s->table.config);
    int ids[MAX_STREAMS];
    for (size_t i = n > field ? n - field : 0; i < (n ? n : 1); i++) {
        for (int j = 0; j < s->S; j++) ids[j] = n ? prompt[i] : '\n';
        stream_push(s, ids, NULL, logits);
    }
}

// --stop: where this text comes up, generation ends.
static struct {
    uint8_t *text;
    size_t n;        // 0: no such text
    size_t *border;  // border[i]: the longest text that text[0..i-1] both begins and ends with
} ending;

// `held`: how many bytes of the ending the text ends with. The same after one more byte. (Knuth,
// Morris and Pratt, "Fast Pattern Matching in Strings", 1977.)
static size_t follow(size_t held, uint8_t byte) {
    while (held > 0 && ending.text[held] != byte) held = ending.border[held];
    return held + (ending.n > 0 && ending.text[held] == byte);
}

static void read_ending(const char *from) {
    size_t most = strlen(from) + 1;
    ending.text = calloc(most, 1);
    ending.border = calloc(most + 1, sizeof *ending.border);
    Error e;
    if (!ending.text || !ending.border) stop((fail(&e, "out of memory"), &e));
    for (; *from; from++) {
        bool escape = *from == '\\';
        if (escape && (!from[1] || !strchr("nt\\", from[1])))
            usage_error(&cli, "--stop has '%.2s'%s, expected \\n, \\t or \\\\", from, "");
        from += escape;
        ending.text[ending.n++] = (uint8_t)(escape && *from == 'n'   ? '\n'
                                            : escape && *from == 't' ? '\t' : *from);
    }
    if (ending.n == 0) usage_error(&cli, "--stop is empty, expected a text%s%s", "", "");
    for (size_t i = 1; i < ending.n; i++)
        ending.border[i + 1] = follow(ending.border[i], ending.text[i]);
}

// What one stream writes.
typedef struct {
    uint8_t *bytes;  // NULL: goes to standard output as it is made
    size_t n, held;  // bytes, without the ending; how many of the last may be part of one
    bool ended;
} Text;

static void add_byte(Text *t, uint8_t byte) {
    size_t held = follow(t->held, byte), out = t->held + 1 - held;
    if (t->bytes) {
        t->bytes[t->n] = byte;
    } else {  // what was held back is the ending's beginning; the byte follows where none is held
        put(ending.text, out < t->held ? out : t->held);
        put(&byte, out > t->held);
        flush();
    }
    t->ended = ending.n && held == ending.n;
    t->n = t->ended ? t->n + 1 - held : t->n + 1;
    t->held = held;
}

// One more byte for each text that has not ended; how many have not.
static int add_bytes(Stream *s, const Sampler *sampler, Text *texts, int *ids, const real *logits) {
    int running = 0;
    for (int j = 0; j < s->S; j++) {
        if (texts[j].ended) continue;
        ids[j] = stream_sample(s, sampler, logits + (size_t)j * V, j);
        add_byte(&texts[j], (uint8_t)ids[j]);
        running += !texts[j].ended;
    }
    return running;
}

// The first stream's text is printed as it is made, the others' when all are done.
static void generate(const char *model) {
    Stream s;
    Sampler sampler = {.temperature = opt.temperature, .top_k = (int)opt.top_k,
                       .top_p = opt.top_p, .seed = opt.seed};
    Error e;
    uint8_t *prompt;
    size_t n_prompt, total = 0, room = (size_t)opt.bytes;
    int S = (int)opt.streams, ids[MAX_STREAMS];
    static real logits[MAX_STREAMS * V];
    static Text texts[MAX_STREAMS];
    char what[96];
    snprintf(what, sizeof what, "keeping %d text%s of %zu bytes until the first is printed", S - 1,
             S > 2 ? "s" : "", room);
    if (memory_for((double)(S - 1) * (double)room, what, &e)) stop(&e);
    open_model(&s, model, S);
    read_prompt(&prompt, &n_prompt);
    uint8_t *space = S > 1 ? malloc((size_t)(S - 1) * room) : NULL;
    if (S > 1 && !space) stop((fail(&e, "out of memory for %d texts: fewer --bytes", S), &e));
    for (int j = 1; j < S; j++) texts[j].bytes = space + (size_t)(j - 1) * room;
    put(prompt, n_prompt);
    flush();
    feed_prompt(&s, prompt, n_prompt, logits);
    double start = now();
    int running = add_bytes(&s, &sampler, texts, ids, logits);
    for (int64_t made = 1; running && (opt.bytes == 0 || made < opt.bytes); made++) {
        stream_push(&s, ids, NULL, logits);
        running = add_bytes(&s, &sampler, texts, ids, logits);
    }
    double seconds = now() - start;
    if (!texts[0].ended) put(ending.text, texts[0].held);
    flush();
    for (int j = 0; j < S; j++) {
        total += texts[j].n;
        if (j == 0) continue;
        fprintf(stderr, "\n--- text %d of %d\n", j + 1, S);
        put(prompt, n_prompt);
        put(texts[j].bytes, texts[j].n);
        flush();
    }
    fprintf(stderr, "\n%zu bytes, %.0f bytes/s\n", total, (double)total / seconds);
    free(space);
    free(prompt);
    stream_free(&s);
}

// ---- Pass over a file ---------------------------------------------------------------------------
//
// A file is cut into windows, and as many windows as there are streams are fed side by side. An
// output sees RF bytes, so a window's first RF-1 outputs are left to the window before it, and all
// others are exact. Only the first window has nothing before it: there every output counts.
//
//   window 0   [RF-1 | SEGMENT ]
//   window 1           [RF-1 | SEGMENT ]        reads RF-1 + SEGMENT bytes, gives SEGMENT outputs
//   window 2                     [RF-1 | SEGMENT ]
//
// --windows T:S is the same with S for SEGMENT and T - S for RF-1: now outputs may lack some of
// what the model would see, as where a text is scored by a model that holds T bytes and no more.

// Outputs at n consecutive bytes, the first of which is byte `first` of the file.
typedef struct {
    uint64_t first;
    size_t n, scored;      // scored = n, but n - 1 at the end: nothing follows the last byte
    const uint8_t *bytes;  // (n, and one more where scored = n)
    const real *losses;    // (scored) of the byte that follows: losses[i] is that of bytes[i+1]
    const real *latents;   // (n,D), NULL if not asked for
} Part;
typedef void (*Visit)(void *arg, const Part *part);

typedef struct {
    size_t context, segment;  // RF-1, SEGMENT; T - S, S
    uint8_t *bytes;           // of the windows in hand
    size_t have;
    real *losses, *latents, *logits, *z;
} Windows;

// Whether text is T:S as --windows has it.
static bool read_windows(const char *text, size_t *T, size_t *S) {
    int used = 0;
    return strspn(text, "0123456789:") == strlen(text) &&
           sscanf(text, "%9zu:%9zu%n", T, S, &used) == 2 && text[used] == 0 && *S >= 1 &&
           *S <= *T && *T <= MAX_WINDOW;
}

static void open_windows(Windows *w, const Stream *s, bool latents) {
    size_t D = (size_t)s->table.config.latent, S = (size_t)s->capacity;
    *w = (Windows){.context = (size_t)config_receptive_field(&s->table.config) - 1};
    // Long enough that the context costs little, short enough for 64 MB of latents.
    size_t most = ((size_t)1 << 24) / (S * D);
    w->segment = 16 * w->context > 1024 ? 16 * w->context : 1024;
    size_t T, stride;
    if (opt.windows && read_windows(opt.windows, &T, &stride))
        w->context = T - stride, w->segment = stride;
    if (latents && w->segment > most) w->segment = most ? most : 1;
    size_t outputs = w->context + S * w->segment;
    double need = (double)outputs * (1 + sizeof(real) * (latents ? 1. + (double)D : 1.));
    double weights, rings, there = (double)cpu_backend.available();
    Error e;
    // The rings grow into their memory, so that it still counts as free.
    if (stream_memory(&s->table.config, s->capacity, &weights, &rings, &e)) stop(&e);
    if (need + rings > there)
        stop((fail(&e, "windows of %zu bytes, %zu of them context, need %.3g GB of memory beside "
                       "%.3g GB for what the units keep of the past, and %.3g GB are free",
                   w->context + w->segment, w->context, need / 1e9, rings / 1e9, there / 1e9), &e));
    w->bytes = malloc(outputs + 1);
    w->losses = malloc(outputs * sizeof(real));
    w->logits = malloc(S * V * sizeof(real));
    w->z = malloc(S * D * sizeof(real));
    if (latents) w->latents = malloc(outputs * D * sizeof(real));
    if (!w->bytes || !w->losses || !w->logits || !w->z || (latents && !w->latents))
        stop((fail(&e, "out of memory for windows of %zu bytes: %.3g GB", w->context + w->segment,
                   need / 1e9), &e));
}

// All outputs of the windows in hand. `skip`: outputs of the first window that are not wanted.
// base: where they begin in the file; with --windows each is a text of its own.
static void run_windows(Windows *w, Stream *s, uint64_t base, size_t skip) {
    size_t D = (size_t)s->table.config.latent, end = w->context + w->segment;
    size_t windows = w->have > end ? (w->have - w->context + w->segment - 1) / w->segment : 1;
    int ids[MAX_STREAMS], targets[MAX_STREAMS];
    real losses[MAX_STREAMS];
    if (windows > (size_t)s->capacity) windows = (size_t)s->capacity;
    stream_begin(s, (int)windows);
    for (size_t j = 0; j < windows && !opt.windows; j++) s->starts[j] = base + j * w->segment;
    for (size_t i = 0; i < end && i < w->have; i++) {
        for (size_t j = 0; j < windows; j++) {
            size_t at = j * w->segment + i;
            bool wanted = i >= (j ? w->context : skip);
            ids[j] = at < w->have ? w->bytes[at] : 0;
            targets[j] = wanted && at + 1 < w->have ? w->bytes[at + 1] : -1;
        }
        stream_push(s, ids, w->latents ? w->z : NULL, w->logits);
        cpu_backend.cross_entropy(losses, w->logits, targets, s->table.config.softcap, 0, windows);
        for (size_t j = 0; j < windows; j++) {
            size_t at = j * w->segment + i;
            if (i < (j ? w->context : skip) || at >= w->have) continue;
            w->losses[at] = losses[j];
            if (w->latents) memcpy(w->latents + at * D, w->z + j * D, D * sizeof(real));
        }
    }
}

// Feeds a file of any length through the model and shows `visit` every output in order. Returns the
// number of bytes.
static uint64_t scan(Stream *s, const char *path, bool latents, Visit visit, void *arg) {
    Error e;
    bool standard = strcmp(path, "-") == 0;
    struct stat st;
    bool folder = !standard && stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    FILE *f = standard ? stdin : fopen(path, "rb");
    if (!f || folder)
        stop((fail(&e, "cannot read %.200s: %s", path, strerror(folder ? EISDIR : errno)), &e));
    Windows w;
    open_windows(&w, s, latents);
    size_t outputs = w.context + (size_t)s->capacity * w.segment, keep = 0;
    uint64_t base = 0;  // where w.bytes begins in the file
    for (;;) {
        w.have = keep + fread(w.bytes + keep, 1, outputs + 1 - keep, f);
        if (ferror(f)) stop((fail(&e, "cannot read %.200s: %s", path, strerror(errno)), &e));
        size_t skip = base ? w.context : 0, n = w.have < outputs ? w.have : outputs;
        if (n > skip) {
            run_windows(&w, s, base, skip);
            Part part = {.first = base + skip, .n = n - skip, .bytes = w.bytes + skip,
                         .losses = w.losses + skip,
                         .scored = n - skip - (w.have == n ? 1 : 0)};
            if (latents) part.latents = w.latents + skip * (size_t)s->table.config.latent;
            visit(arg, &part);
        }
        progress("read", base + w.have);
        if (w.have < outputs + 1) break;
        size_t done = outputs - w.context;
        keep = w.have - done;
        memmove(w.bytes, w.bytes + done, keep);
        base += done;
    }
    uint64_t total = base + w.have;
    progress_end();
    if (!standard) fclose(f);
    free(w.bytes);
    free(w.losses);
    free(w.latents);
    free(w.logits);
    free(w.z);
    return total;
}

// ---- Score a file -------------------------------------------------------------------------------

// Of --heat, where it has one.
static const char *page_name(void) { return opt.heat && *opt.heat ? opt.heat : NULL; }

typedef struct {
    double nats;
    bool table, colour;  // --heat without a page: TSV, or in colour on a terminal
    uint8_t before;      // the byte before
    HeatPage page;
} Score;

static void show(Score *score, uint64_t offset, uint8_t byte, double nats) {
    double bits = nats / log(2);
    char row[64], text[HEAT_TEXT];
    score->nats += nats;
    if (page_name()) heat_page_byte(&score->page, byte, bits);
    if (score->colour) put(text, (size_t)heat_terminal(text, byte, score->before, bits));
    if (score->table)
        put(row, (size_t)snprintf(row, sizeof row, "%llu\t%d\t%.4f\n", (unsigned long long)offset,
                                  byte, bits));
    score->before = byte;
}

// Stops rather now than after hours.
static void check_output(void) {
    Error e;
    if (output.file && ferror(output.file)) stop((output_failed(&output, errno, &e), &e));
}

// The first byte of a file has no context: one of 256, ln 256 nats.
static void visit_score(void *arg, const Part *part) {
    Score *score = arg;
    if (part->first == 0) show(score, 0, part->bytes[0], log(V));
    for (size_t i = 0; i < part->scored; i++)
        show(score, part->first + i + 1, part->bytes[i + 1], part->losses[i]);
    check_output();
}

static void score_file(const char *model) {
    Stream s;
    Error e;
    Score score = {0};
    const char *page = page_name();
    static const char head[] = "offset\tbyte\tbits\n";
    bool standard = strcmp(opt.score, "-") == 0;
    if (opt.heat && !page) {
        score.colour = isatty(1) && !getenv("NO_COLOR");
        score.table = !score.colour;
    }
    open_model(&s, model, 0);
    if (page && output_open(&output, page, opt.force, &e)) stop(&e);
    if (page)
        heat_page_begin(&score.page, output.file, standard ? "standard input" : opt.score);
    if (score.table) put(head, sizeof head - 1);
    uint64_t n = scan(&s, opt.score, false, visit_score, &score);
    if (n == 0) stop((fail(&e, "%.200s is empty: there is nothing to score", opt.score), &e));
    if (score.colour) put("\033[0m\n", 5);
    flush();
    double nats = score.nats / (double)n;
    if (page && heat_page_end(&score.page, nats, n))
        stop((output_failed(&output, errno, &e), &e));
    if (page && output_commit(&output, &e)) stop(&e);
    // Standard output holds one thing: what was asked for by --heat, or the score.
    fprintf(score.table || score.colour || (page && output_is_standard(page)) ? stderr : stdout,
            "%.6f nats/byte  %.6f bits/byte  perplexity %.4f  %llu bytes\n", nats, nats / log(2),
            exp(nats), (unsigned long long)n);
    flush();
    const Config *c = &s.table.config;
    if (!opt.windows && config_absolute(c) && n > (uint64_t)c->window)
        fprintf(stderr, "note: places in the text beyond %d were never trained; as training "
                        "scores: --windows %d:%d\n", c->window, c->window, (c->window + 1) / 2);
    stream_free(&s);
}

// ---- Latents, as numpy reads them ---------------------------------------------------------------

enum { NPY_HEADER = 128 };  // with room for any shape; the data starts at a multiple of 64

static void write_npy_header(FILE *f, uint64_t rows, int columns) {
    char text[NPY_HEADER + 1];
    memcpy(text, "\x93NUMPY\x01\x00", 8);
    text[8] = NPY_HEADER - 10;
    text[9] = 0;
    int n = 10 + snprintf(text + 10, sizeof text - 10,
                          "{'descr': '<f4', 'fortran_order': False, 'shape': (%llu, %d), }",
                          (unsigned long long)rows, columns);
    memset(text + n, ' ', (size_t)(NPY_HEADER - n));
    text[NPY_HEADER - 1] = '\n';
    fwrite(text, 1, NPY_HEADER, f);
}

static void visit_latents(void *arg, const Part *part) {
    size_t n = part->n * (size_t)((const Stream *)arg)->table.config.latent;
    for (size_t i = 0; i < n; i++) {
        float x = (float)part->latents[i];
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint8_t bytes[4] = {(uint8_t)bits, (uint8_t)(bits >> 8), (uint8_t)(bits >> 16),
                                  (uint8_t)(bits >> 24)};
        fwrite(bytes, 1, 4, output.file);
    }
    check_output();
}

static void write_latents(const char *model, const char *in) {
    Stream s;
    Error e;
    open_model(&s, model, 0);
    if (output_open(&output, opt.latents, opt.force, &e)) stop(&e);
    write_npy_header(output.file, 0, s.table.config.latent);
    uint64_t n = scan(&s, in, true, visit_latents, &s);
    // The number of rows is known only now. (rewind would forget an error.)
    if (fseek(output.file, 0, SEEK_SET)) stop((output_failed(&output, errno, &e), &e));
    write_npy_header(output.file, n, s.table.config.latent);
    if (output_commit(&output, &e)) stop(&e);
    put_clean(stderr, opt.latents);
    fprintf(stderr, ": (%llu, %d) float32\n", (unsigned long long)n, s.table.config.latent);
    stream_free(&s);
}

// ---- Compress: 32 bytes of head, and the code of range_coder.h ----------------------------------
//
//   "FZT1", model, arithmetic, length, checksum of the content, checksum of these | code

enum { HEAD = 32 };

static uint32_t after(Stream *s, int byte, uint32_t freq[V]) {
    static real logits[V];
    stream_push(s, &byte, NULL, logits);
    return frequencies(freq, logits, s->table.config.softcap);
}

static uint32_t fold(uint64_t hash) { return (uint32_t)(hash ^ hash >> 32); }

// What this build and machine make of a fixed text. Another compiler may round otherwise, and then
// the decoder would lose its way: better to say so at once.
static uint32_t arithmetic(Stream *s) {
    uint64_t hash = CHECKSUM_START;
    uint32_t freq[V];
    stream_begin(s, 1);
    for (int i = 0; i < 64; i++) {
        after(s, (i * 37 + 11) & 255, freq);
        hash = checksum_add(hash, freq, sizeof freq);
    }
    return fold(hash);
}

static void put_number(uint8_t *to, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(x >> (8 * i));
}
static uint64_t get_number(const uint8_t *from, int bytes) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++) x |= (uint64_t)from[i] << (8 * i);
    return x;
}

static void compress(const char *model, const char *in, const char *out) {
    Stream s;
    Error e;
    uint8_t *bytes, head[HEAD] = "FZT1";
    size_t n;
    uint32_t freq[V], total = no_context(freq);
    uint64_t hash = open_model(&s, model, 1);
    if (read_whole(in, &bytes, &n, &e) || output_open(&output, out, opt.force, &e)) stop(&e);
    put_number(head + 4, hash, 8);
    put_number(head + 12, arithmetic(&s), 4);
    put_number(head + 16, n, 8);
    put_number(head + 24, fold(checksum_add(CHECKSUM_START, bytes, n)), 4);
    put_number(head + 28, fold(checksum_add(CHECKSUM_START, head, 28)), 4);
    fwrite(head, 1, HEAD, output.file);
    Coder c = {.range = UINT64_MAX, .out = output.file};
    stream_begin(&s, 1);
    for (size_t i = 0; i < n; i++) {
        if (i > 0) total = after(&s, bytes[i - 1], freq);
        encode_byte(&c, freq, total, bytes[i]);
        progress("compressed", i);
    }
    for (int b = 0; b < 8; b++, c.low <<= 8) fputc((int)(c.low >> 56), c.out);
    progress_end();
    long long size = (long long)ftello(output.file);
    if (output_commit(&output, &e)) stop(&e);
    fprintf(stderr, "%zu bytes to %lld", n, size);
    if (n) fprintf(stderr, ", %.4f bits/byte", 8 * (double)size / (double)n);
    fprintf(stderr, "\n");
    free(bytes);
    stream_free(&s);
}

static int check_head(const uint8_t *head, size_t n, uint64_t model, uint32_t own, const char *in,
                      Error *e) {
    if (n < 4 || memcmp(head, "FZT1", 4))
        return fail(e, "%.200s was not made by sample --compress", in);
    if (n < HEAD + 8) return fail(e, "%.200s is cut off: %zu bytes long", in, n);
    if (get_number(head + 28, 4) != fold(checksum_add(CHECKSUM_START, head, 28)))
        return fail(e, "%.200s is damaged: the checksum of its header is wrong", in);
    if (get_number(head + 4, 8) != model)
        return fail(e, "%.200s was made with another model (%016llx, this one is %016llx)", in,
                    (unsigned long long)get_number(head + 4, 8), (unsigned long long)model);
    if (get_number(head + 12, 4) != own)
        return fail(e, "%.200s was made by a build or on a machine that rounds otherwise: "
                       "decompress it there", in);
    return 0;
}

static void decompress(const char *model, const char *in, const char *out) {
    Stream s;
    Error e;
    uint8_t *bytes;
    size_t n;
    uint32_t freq[V], total = no_context(freq);
    uint64_t hash = open_model(&s, model, 1), content = CHECKSUM_START;
    if (read_whole(in, &bytes, &n, &e) || check_head(bytes, n, hash, arithmetic(&s), in, &e) ||
        output_open(&output, out, opt.force, &e))
        stop(&e);
    uint64_t length = get_number(bytes + 16, 8);
    Coder c = {.range = UINT64_MAX, .in = bytes + HEAD, .left = n - HEAD};
    for (int b = 0; b < 8; b++) c.code = c.code << 8 | next_byte(&c);
    stream_begin(&s, 1);
    int byte = 0;
    for (uint64_t i = 0; i < length && byte >= 0 && !c.cut_off; i++) {
        if (i > 0) total = after(&s, byte, freq);
        byte = decode_byte(&c, freq, total);
        uint8_t b = (uint8_t)byte;
        content = checksum_add(content, &b, 1);
        fputc(b, output.file);
        progress("decompressed", i);
    }
    progress_end();
    // The encoder ended by writing `low`: anything else there is damage, too.
    bool whole = byte >= 0 && !c.cut_off && c.left == 0 && c.code == c.low;
    if (!whole || fold(content) != get_number(bytes + 24, 4))
        stop((fail(&e, "%.200s is damaged: %s", in,
                   c.cut_off ? "it is cut off" : whole ? "the checksum of the content is wrong"
                                                       : "its code leads nowhere"), &e));
    if (output_commit(&output, &e)) stop(&e);
    free(bytes);
    stream_free(&s);
}

// ---- The program --------------------------------------------------------------------------------

static void print_state(const Checkpoint *ck) {
    const char *step = checkpoint_get(ck, "step"), *best = checkpoint_get(ck, "best"),
               *best_step = checkpoint_get(ck, "best_step");
    printf("the state of a run, for ./train --resume; its model is model.safetensors\n");
    if (!step || !best || !best_step) return;
    printf("step %lld, best %.6f nats per byte at step %lld\n", atoll(step), strtod(best, NULL),
           atoll(best_step));
}

// What the file says of the model, and everything that was noted when it was saved.
static void print_info(const char *model) {
    static const char *const expected[] = {"step", "held_out_nats_per_byte", "trained_on"};
    Checkpoint ck;
    Error e;
    double weights = 0, state = 0;
    if (checkpoint_open(&ck, model, &e) ||
        stream_memory(&ck.config, 1, &weights, &state, &e))
        stop(&e);
    if (ck.is_state) print_state(&ck);
    print_layers(stdout, &ck.table);
    printf("%zu parameters, receptive field %lld bytes\n%.2f MB of memory to sample: %.2f for "
           "weights, %.2f for what the units keep of the past\n", ck.n_params,
           (long long)config_receptive_field(&ck.config), (weights + state) / 1e6, weights / 1e6,
           state / 1e6);
    for (int i = 0; i < ck.n_pairs; i++) {
        if (checkpoint_own_key(ck.pairs[i].key)) continue;
        int n = put_clean(stdout, ck.pairs[i].key);
        printf("%*s ", n < 24 ? 24 - n : 0, "");
        put_clean(stdout, ck.pairs[i].value);
        printf("\n");
    }
    for (int i = 0; i < 3 && !ck.is_state; i++)
        if (!checkpoint_get(&ck, expected[i]))
            printf("%-24s (the file does not say)\n", expected[i]);
    flush();
    checkpoint_close(&ck);
}

static const char *mode_name(void) {
    return opt.score ? "score" : opt.latents ? "latents" : opt.compress ? "compress"
           : opt.decompress ? "decompress" : "info";
}

static void check_usage(void) {
    int modes = (opt.score != NULL) + (opt.latents != NULL) + opt.compress + opt.decompress +
                opt.info;
    int expected = 1 + (opt.latents ? 1 : opt.compress || opt.decompress ? 2 : 0);
    if (modes > 1)
        usage_error(&cli, "choose one of --score, --latents, --compress, --decompress, --info%s%s",
                    "", "");
    // The first section of the table is for writing text.
    for (int i = 1; modes && table[i].kind != OPT_SECTION; i++)
        if (table[i].given)
            usage_error(&cli, "--%s is for writing text, which --%s does not do", table[i].name,
                        mode_name());
    if (cli.n_files == 0) usage_error(&cli, "no model file%s%s", "", "");
    if (cli.n_files < expected)
        usage_error(&cli, "%s needs %s", opt.latents ? "--latents" : "(de)compressing",
                    opt.latents ? "OUT.npy FILE" : "IN OUT");
    if (cli.n_files > expected)
        usage_error(&cli, "one argument too many: %s%s", cli.files[expected], "");
    if ((opt.heat || opt.windows) && !opt.score)
        usage_error(&cli, "--%s goes with --score FILE%s", opt.heat ? "heat" : "windows", "");
    size_t T, S;
    char bound[16];
    snprintf(bound, sizeof bound, "%d", MAX_WINDOW);
    if (opt.windows && !read_windows(opt.windows, &T, &S))
        usage_error(&cli, "--windows is '%s', expected T:S, whole numbers with 1 <= S <= T <= %s",
                    opt.windows, bound);
    if (opt.prompt && opt.prompt_file)
        usage_error(&cli, "choose one of --prompt and --prompt-file%s%s", "", "");
    if (opt.streams > 1 && opt.bytes == 0)
        usage_error(&cli, "--streams needs --bytes: the texts are printed one after the other%s%s",
                    "", "");
    if (opt.stop) read_ending(opt.stop);
}

// A folder stands for the model in it.
static const char *model_in(const char *path) {
    static char inside[4096];
    struct stat st;
    if (stat(path, &st) || !S_ISDIR(st.st_mode)) return path;
    snprintf(inside, sizeof inside, "%s/model.safetensors", path);
    return inside;
}

// No output may be one of the inputs, which it would destroy or grow while it is read.
static void check_outputs(const char *model) {
    const char *in = opt.score ? opt.score : cli.files[1];
    const char *outs[] = {opt.latents ? opt.latents : opt.compress || opt.decompress ? cli.files[2]
                          : page_name(), opt.heat && !*opt.heat ? "-" : NULL};
    Error e;
    for (int i = 0; i < 2; i++)
        if (outs[i] && (output_differs(outs[i], in, &e) || output_differs(outs[i], model, &e)))
            stop(&e);
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);  // a write then fails with EPIPE, see stdout_failed
    parse_options(&cli, argc, argv);
    check_usage();
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP};
    for (int i = 0; i < 3; i++)  // but not where it is ignored, as nohup does
        if (signal(ends[i], SIG_IGN) != SIG_IGN) signal(ends[i], on_signal);
    const char *model = model_in(cli.files[0]);
    check_outputs(model);
    if (opt.info)
        print_info(model);
    else if (opt.score)
        score_file(model);
    else if (opt.latents)
        write_latents(model, cli.files[1]);
    else if (opt.compress)
        compress(model, cli.files[1], cli.files[2]);
    else if (opt.decompress)
        decompress(model, cli.files[1], cli.files[2]);
    else
        generate(model);
    free(cli.files);
    return 0;
}
