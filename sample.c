// sample.c: what one does with a trained model: write text, score a file, see where the model
// stumbles, take its latents, compress a file with it; with a model, with counts of what stood
// before (mix.c), or with both. One byte at a time, on the CPU.
//
// Refuses: a model file that is damaged or of another program, an output that exists (without
// --force) or is an input, an archive of another model. Data goes to stdout, all else to stderr.
// Read predictor.h first.  Run: ./sample out/model.safetensors --prompt "The "   ./sample --help
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <signal.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "support/archive.h"
#include "support/checkpoint.h"
#include "support/describe.h"
#include "support/heat.h"
#include "support/progress.h"
#include "support/scan.h"

typedef struct {
    const char *prompt, *prompt_file, *stop, *score, *windows, *heat, *latents, *prime;
    int64_t bytes, top_k, streams, threads, blocks;
    int mix;
    double temperature, top_p;
    uint64_t seed;
    bool compress, decompress, info, force;
} Options;

static Options opt = {.bytes = 400, .streams = 1, .blocks = 1, .temperature = 0.8, .top_p = 1,
                      .seed = 1};

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
    {.kind = OPT_SECTION, .help = "compress any file; MODEL may be left out"},
    {.name = "compress", .kind = OPT_FLAG, .value = &opt.compress, .arg = "IN OUT",
     .help = "to about the bits that --score says"},
    {.name = "decompress", .kind = OPT_FLAG, .value = &opt.decompress, .arg = "IN OUT",
     .help = "with the same model and --prime, on any machine"},
    {.name = "blocks", .kind = OPT_INT, .value = &opt.blocks, .min = 1, .max = MAX_LANES,
     .arg = "N", .help = "compress N parts side by side: faster; 2 are some 5 % larger"},
    {.kind = OPT_SECTION, .help = "what predicts, to write, score and compress"},
    {.name = "mix", .kind = OPT_CHOICE, .value = &opt.mix, .choices = mix_names, .arg = "KIND",
     .help = "counts beside the model; to compress cm"},
    {.name = "prime", .kind = OPT_TEXT, .value = &opt.prime, .arg = "FILE",
     .help = "the counts read this first, e.g. the training text"},
    {.kind = OPT_SECTION, .help = "in general (an output - is standard output)"},
    {.name = "info", .kind = OPT_FLAG, .value = &opt.info,
     .help = "what the model is, and how it was trained"},
    {.name = "force", .kind = OPT_FLAG, .value = &opt.force, .help = "overwrite outputs"},
    {.name = "threads", .kind = OPT_INT, .value = &opt.threads, .max = 1024, .arg = "N",
     .help = "0 = all; the bits do not depend on it"},
};

static Cli cli = {
    .program = "sample",
    .usage = "usage: ./sample [MODEL] [options]      MODEL: model.safetensors, or its folder\n"
             "       --compress and --mix do without",
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

// A line that redraws itself, on a terminal only.
static struct {
    Progress line;
    const char *what;
    FILE *in;
    double size, start;  // of the file, 0: not known; when it began
} shown;

static void begin_progress(const char *what, FILE *in) {
    struct stat st;
    bool known = fstat(fileno(in), &st) == 0 && S_ISREG(st.st_mode);
    shown.what = what;
    shown.in = in;
    shown.size = known ? (double)st.st_size : 0;
    shown.start = now();
    shown.line.terminal = isatty(2);
    progress_begin(&shown.line, 0);
}

static void progress(uint64_t done) {
    char left[32];
    if (!shown.line.terminal || !progress_due(&shown.line, 0.5, 0)) return;
    double seconds = now() - shown.start, at = (double)ftello(shown.in);
    bool known = at > 0 && at < shown.size;
    progress_line(&shown.line, "%s %llu bytes, %.0f bytes/s%s%s", shown.what,
                  (unsigned long long)done, (double)done / seconds, known ? ", time left " : "",
                  known ? duration(seconds * (shown.size - at) / at, left, sizeof left) : "");
}

static void stop(const Error *e) {
    progress_end(&shown.line);
    output_abandon(&output);
    die(&cli, e);
}

// ---- The model ----------------------------------------------------------------------------------

// Opens the model n times, each for as many streams as asked for, or as many as fit into a gigabyte
// of rings when `capacity` is 0. Returns the hash of the parameters: its name in an archive.
static uint64_t open_streams(Stream *s, int n, const char *path, int capacity) {
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
    for (int i = 0; i < n; i++)
        if (stream_open(&s[i], &ck.config, params, capacity, &e)) stop(&e);
    uint64_t hash = checksum_add(CHECKSUM_START, params, ck.n_params * sizeof *params);
    free(params);
    checkpoint_close(&ck);
#ifdef _OPENMP
    if (n == 1 && !s->parallel) omp_set_num_threads(1);  // too small a model to gain by threads
#endif
    return hash;
}

static void open_model(Stream *s, const char *path, int capacity) {
    open_streams(s, 1, path, capacity);
}

// ---- Predictors ---------------------------------------------------------------------------------

// Predictors of one kind with what they need.
typedef struct {
    int n;
    Stream streams[MAX_LANES];
    Predictor predictors[MAX_LANES];
    uint64_t model, text;  // checksums; 0: without
} Predictors;

static bool given(const char *name) { return find_option(&cli, name, strlen(name))->given; }

// Whether this model or text is the one that the archive was made with; what: its name.
static void check_source(const char *in, const char *what, const char *option, uint64_t theirs,
                         uint64_t ours) {
    Error e;
    if (theirs == ours) return;
    if (!theirs) fail(&e, "%.200s was made without a %s: leave it out", in, what);
    else if (!ours) fail(&e, "%.200s was made with a %s (%016llx): give it as %s", in, what,
                         (unsigned long long)theirs, option);
    else fail(&e, "%.200s was made with another %s (%016llx, this one is %016llx)", in, what,
              (unsigned long long)theirs, (unsigned long long)ours);
    stop(&e);
}

// model NULL: without. All have read --prime. Of an archive, NULL: none, its model and priming text
// are compared before the counts walk that text, which takes a while.
static void open_predictors(Predictors *p, int n, MixKind kind, const char *model,
                            const char *archive, const ArchiveHead *head) {
    Error e;
    uint8_t *text = NULL;
    size_t n_text = 0;
    char what[40];
    *p = (Predictors){.n = n};
    snprintf(what, sizeof what, "--mix %s%s", mix_names[kind], n > 1 ? " for all blocks" : "");
    if (memory_for(n * predictor_memory(kind), what, &e)) stop(&e);
    if (model) p->model = open_streams(p->streams, n, model, 1);
    if (opt.prime && read_whole(opt.prime, &text, &n_text, &e)) stop(&e);
    if (opt.prime) p->text = checksum_add(CHECKSUM_START, text, n_text);
    if (archive) check_source(archive, "model", "MODEL", head->model, p->model);
    if (archive) check_source(archive, "priming text", "--prime", head->text, p->text);
    for (int i = 0; i < n; i++)
        if (predictor_open(&p->predictors[i], kind, model ? &p->streams[i] : NULL, &e)) stop(&e);
#pragma omp parallel for schedule(static, 1) if (n > 1)
    for (int i = 0; i < n; i++) predictor_prime(&p->predictors[i], text, n_text);
    free(text);
}

static void close_predictors(Predictors *p) {
    for (int i = 0; i < p->n; i++) {
        predictor_free(&p->predictors[i]);
        stream_free(&p->streams[i]);
    }
}

// A file to be read from its beginning; "-" is standard input.
static FILE *open_input(const char *path) {
    Error e;
    struct stat st;
    bool standard = strcmp(path, "-") == 0;
    bool folder = !standard && stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    FILE *f = standard ? stdin : fopen(path, "rb");
    if (!f || folder)
        stop((fail(&e, "cannot read %.200s: %s", path, strerror(folder ? EISDIR : errno)), &e));
    return f;
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

// With counts beside the network, or alone: they learn from the prompt and from what is written.
static void generate_mixed(const char *model) {
    static Predictors all;
    Predictor *p = &all.predictors[0];
    Sampler sampler = {.temperature = opt.temperature, .top_k = (int)opt.top_k,
                       .top_p = opt.top_p, .seed = opt.seed};
    uint8_t *prompt;
    size_t n_prompt;
    uint32_t freq[V];
    real logits[V];
    Text text = {0};
    read_prompt(&prompt, &n_prompt);
    open_predictors(&all, 1, (MixKind)opt.mix, model, NULL, NULL);
    put(prompt, n_prompt);
    flush();
    for (size_t i = 0; i < n_prompt; i++) predictor_cost(p, prompt[i]);
    if (n_prompt == 0) predictor_cost(p, '\n');
    double start = now();
    for (int64_t made = 0; !text.ended && (opt.bytes == 0 || made < opt.bytes); made++) {
        predictor_bytes(p, freq);
        for (int v = 0; v < V; v++) logits[v] = (real)log(freq[v]);
        uint8_t byte = (uint8_t)sample_byte(&sampler, logits, (uint64_t)made + n_prompt, 0);
        add_byte(&text, byte);
        predictor_cost(p, byte);
    }
    double seconds = now() - start;
    if (!text.ended) put(ending.text, text.held);
    flush();
    fprintf(stderr, "\n%zu bytes, %.0f bytes/s\n", text.n, (double)text.n / seconds);
    free(prompt);
    close_predictors(&all);
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

// Whether text is T:S as --windows has it.
static bool read_windows(const char *text, size_t *T, size_t *S) {
    int used = 0;
    return strspn(text, "0123456789:") == strlen(text) &&
           sscanf(text, "%9zu:%9zu%n", T, S, &used) == 2 && text[used] == 0 && *S >= 1 &&
           *S <= *T && *T <= MAX_WINDOW;
}

// ---- Score a file -------------------------------------------------------------------------------

// Of --heat, where it has one.
static const char *page_name(void) { return opt.heat && *opt.heat ? opt.heat : NULL; }

typedef struct {
    double nats;
    bool table, colour;  // --heat without a page: TSV, or in colour on a terminal
    bool mixed;          // it can be said what the network alone would have paid
    uint8_t before;      // the byte before
    HeatPage page;
} Score;

// alone: what the network alone would have paid, where that is asked for.
static void show(Score *score, uint64_t offset, uint8_t byte, double nats, double alone) {
    double bits = nats / log(2), saved = score->mixed ? alone / log(2) - bits : 0;
    char row[80], text[HEAT_TEXT];
    score->nats += nats;
    if (page_name()) heat_page_byte(&score->page, byte, bits, saved);
    if (score->colour) put(text, (size_t)heat_terminal(text, byte, score->before, bits, saved));
    if (score->table) {
        int n = snprintf(row, sizeof row, "%llu\t%d\t%.4f", (unsigned long long)offset, byte, bits);
        if (score->mixed) n += snprintf(row + n, sizeof row - (size_t)n, "\t%.4f", bits + saved);
        row[n] = '\n';
        put(row, (size_t)n + 1);
    }
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
    if (part->first == 0) show(score, 0, part->bytes[0], log(V), 0);
    for (size_t i = 0; i < part->scored; i++)
        show(score, part->first + i + 1, part->bytes[i + 1], part->losses[i], 0);
    check_output();
}

// The whole file through a predictor, and what the network and the counts would pay alone.
static uint64_t score_mixed(Score *score, const char *model, double *network, double *counts) {
    static Predictors both, alone;
    Predictor *p = &both.predictors[0];
    Error e;
    FILE *f = open_input(opt.score);
    uint64_t n = 0;
    begin_progress("read", f);
    open_predictors(&both, 1, (MixKind)opt.mix, model, NULL, NULL);
    if (model) open_predictors(&alone, 1, (MixKind)opt.mix, NULL, NULL, NULL);
    for (int byte; (byte = fgetc(f)) != EOF; n++) {
        double said = predictor_network_cost(p, (uint8_t)byte);
        show(score, n, (uint8_t)byte, predictor_cost(p, (uint8_t)byte), said);
        *network += said;
        if (alone.n) *counts += predictor_cost(&alone.predictors[0], (uint8_t)byte);
        if (n % 1024 == 0) progress(n);
        if (n % 65536 == 0) check_output();
    }
    if (ferror(f)) stop((fail(&e, "cannot read %.200s: %s", opt.score, strerror(errno)), &e));
    progress_end(&shown.line);
    close_predictors(&both);
    close_predictors(&alone);
    if (f != stdin) fclose(f);
    return n;
}

static uint64_t scan_file(Stream *s, const char *path, bool latents, Visit visit, void *arg) {
    Error e;
    FILE *f = open_input(path);
    begin_progress("read", f);
    size_t T = 0, S = 0;
    if (opt.windows) read_windows(opt.windows, &T, &S);  // check_usage has judged it
    int64_t n = scan(s, f, path, T, S, latents, visit, arg, progress, &e);
    if (n < 0) stop(&e);
    progress_end(&shown.line);
    if (f != stdin) fclose(f);
    return (uint64_t)n;
}

static uint64_t score_network(Score *score, const char *model) {
    Stream s;
    open_model(&s, model, 0);
    uint64_t n = scan_file(&s, opt.score, false, visit_score, score);
    const Config *c = &s.table.config;
    if (!opt.windows && config_absolute(c) && n > (uint64_t)c->window)
        fprintf(stderr, "note: places in the text beyond %d were never trained; as training "
                        "scores: --windows %d:%d\n", c->window, c->window, (c->window + 1) / 2);
    stream_free(&s);
    return n;
}

static void score_file(const char *model) {
    Error e;
    Score score = {.mixed = model && opt.mix};
    const char *page = page_name();
    double network = 0, counts = 0;
    bool standard = strcmp(opt.score, "-") == 0;
    if (opt.heat && !page) {
        score.colour = isatty(1) && !getenv("NO_COLOR");
        score.table = !score.colour;
    }
    if (page && output_open(&output, page, opt.force, &e)) stop(&e);
    if (page)
        heat_page_begin(&score.page, output.file, standard ? "standard input" : opt.score);
    const char *head = score.mixed ? "offset\tbyte\tbits\tnetwork\n" : "offset\tbyte\tbits\n";
    if (score.table) put(head, strlen(head));
    uint64_t n = opt.mix ? score_mixed(&score, model, &network, &counts)
                         : score_network(&score, model);
    if (n == 0) stop((fail(&e, "%.200s is empty: there is nothing to score", opt.score), &e));
    if (score.colour) put("\033[0m\n", 5);
    flush();
    double nats = score.nats / (double)n;
    if (page && heat_page_end(&score.page, nats, n))
        stop((output_failed(&output, errno, &e), &e));
    if (page && output_commit(&output, &e)) stop(&e);
    // Standard output holds one thing: what was asked for by --heat, or the score.
    FILE *to = score.table || score.colour || (page && output_is_standard(page)) ? stderr : stdout;
    fprintf(to, "%.6f nats/byte  %.6f bits/byte  perplexity %.4f  %llu bytes\n", nats,
            nats / log(2), exp(nats), (unsigned long long)n);
    if (score.mixed)
        fprintf(to, "%.6f with the network alone, %.6f with --mix %s alone\n",
                network / (double)n, counts / (double)n, mix_names[opt.mix]);
    flush();
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
    uint64_t n = scan_file(&s, in, true, visit_latents, &s);
    // The number of rows is known only now. (rewind would forget an error.)
    if (fseek(output.file, 0, SEEK_SET)) stop((output_failed(&output, errno, &e), &e));
    write_npy_header(output.file, n, s.table.config.latent);
    if (output_commit(&output, &e)) stop(&e);
    put_clean(stderr, opt.latents);
    fprintf(stderr, ": (%llu, %d) float32\n", (unsigned long long)n, s.table.config.latent);
    stream_free(&s);
}

// ---- Compress -----------------------------------------------------------------------------------

static void compress(const char *model, const char *in, const char *out) {
    static Predictors p;
    Error e;
    struct stat st;
    MixKind mix = given("mix") ? (MixKind)opt.mix : MIX_CM;
    if (mix == MIX_NONE && !model)
        usage_error(&cli, "--mix none compresses with a model: name one%s%s", "", "");
    if (arithmetic_check(&e)) stop(&e);
    FILE *f = open_input(in);
    if (output_open(&output, out, opt.force, &e)) stop(&e);
    open_predictors(&p, (int)opt.blocks, mix, model, NULL, NULL);
    ArchiveHead head = {.mix = mix, .lanes = p.n, .piece = PIECE, .model = p.model, .text = p.text};
    // A small file has a piece for each lane, too.
    uint64_t size = fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode) ? (uint64_t)st.st_size : 0;
    uint64_t part = (size + (uint64_t)p.n - 1) / (uint64_t)p.n;
    if (p.n > 1 && part && part < PIECE) head.piece = (uint32_t)part;
    begin_progress("compressed", f);
    int64_t n = archive_write(&head, p.predictors, f, in, output.file, progress, &e);
    if (n < 0) stop(&e);
    progress_end(&shown.line);
    double seconds = now() - shown.start;
    long long made = (long long)ftello(output.file);
    if (output_commit(&output, &e)) stop(&e);
    fprintf(stderr, "%lld bytes to %lld", (long long)n, made);
    if (n)
        fprintf(stderr, ", %.4f bits/byte, %.0f bytes/s", 8 * (double)made / (double)n,
                (double)n / seconds);
    fprintf(stderr, "\n");
    if (f != stdin) fclose(f);
    close_predictors(&p);
}

static void decompress(const char *model, const char *in, const char *out) {
    static Predictors p;
    ArchiveHead head;
    Error e;
    if (arithmetic_check(&e)) stop(&e);
    FILE *f = open_input(in);
    if (archive_read_head(&head, f, in, &e)) stop(&e);
    if (output_open(&output, out, opt.force, &e)) stop(&e);
    open_predictors(&p, head.lanes, head.mix, model, in, &head);
    begin_progress("decompressed", f);
    if (archive_read(&head, p.predictors, f, in, output.file, progress, &e) < 0) stop(&e);
    progress_end(&shown.line);
    if (output_commit(&output, &e)) stop(&e);
    if (f != stdin) fclose(f);
    close_predictors(&p);
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

// A folder stands for the model in it.
static const char *model_in(const char *path) {
    static char inside[4096];
    struct stat st;
    if (stat(path, &st) || !S_ISDIR(st.st_mode)) return path;
    snprintf(inside, sizeof inside, "%s/model.safetensors", path);
    return inside;
}

// Of the command line: its model, NULL where there is none.
static const char *check_usage(void) {
    int modes = (opt.score != NULL) + (opt.latents != NULL) + opt.compress + opt.decompress +
                opt.info;
    int expected = 1 + (opt.latents ? 1 : opt.compress || opt.decompress ? 2 : 0);
    // Counts need no model.
    bool counts = opt.compress || opt.decompress || (opt.mix && !opt.info && !opt.latents);
    bool missing = counts && cli.n_files == expected - 1;
    int writing = modes ? 0 : opt.mix ? 1 : 0;
    if (modes > 1)
        usage_error(&cli, "choose one of --score, --latents, --compress, --decompress, --info%s%s",
                    "", "");
    // The first section of the table is for writing text.
    for (int i = 1; modes && table[i].kind != OPT_SECTION; i++)
        if (table[i].given)
            usage_error(&cli, "--%s is for writing text, which --%s does not do", table[i].name,
                        mode_name());
    if (cli.n_files == 0 && !missing) usage_error(&cli, "no model file%s%s", "", "");
    if (cli.n_files < expected && !missing)
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
    if (opt.windows && opt.mix)
        usage_error(&cli, "--windows is for the network alone: leave --mix out%s%s", "", "");
    if (opt.prompt && opt.prompt_file)
        usage_error(&cli, "choose one of --prompt and --prompt-file%s%s", "", "");
    if (opt.streams > 1 && opt.bytes == 0)
        usage_error(&cli, "--streams needs --bytes: the texts are printed one after the other%s%s",
                    "", "");
    if (writing && opt.streams > 1)
        usage_error(&cli, "--mix writes one text at a time: leave --streams out%s%s", "", "");
    if ((opt.info || opt.latents || opt.decompress) && given("mix"))
        usage_error(&cli, "--mix is not for --%s%s", mode_name(),
                    opt.decompress ? ": the archive says it" : "");
    if (opt.prime && (opt.info || opt.latents || (!opt.mix && (!modes || opt.score)) ||
                      (opt.compress && given("mix") && !opt.mix)))
        usage_error(&cli, "--prime is for counts: --mix cm or ngram%s%s", "", "");
    const char *in = opt.compress || opt.decompress ? cli.files[cli.n_files - 2]
                     : opt.score ? opt.score : opt.prompt_file;
    if (opt.prime && in && strcmp(opt.prime, "-") == 0 && strcmp(in, "-") == 0)
        usage_error(&cli, "--prime and the input are both standard input: name one as a file%s%s",
                    "", "");
    if (given("blocks") && !opt.compress)
        usage_error(&cli, "--blocks goes with --compress%s%s", "", "");
    if (opt.stop) read_ending(opt.stop);
    return missing ? NULL : model_in(cli.files[0]);
}

// No output may be one of the inputs, which it would destroy or grow while it is read.
static void check_outputs(const char *model, const char *const *files) {
    const char *ins[] = {opt.score ? opt.score : files[0], model, opt.prime};
    const char *outs[] = {opt.latents ? opt.latents : opt.compress || opt.decompress ? files[1]
                          : page_name(), opt.heat && !*opt.heat ? "-" : NULL};
    Error e;
    for (int i = 0; i < 6; i++)
        if (outs[i / 3] && ins[i % 3] && output_differs(outs[i / 3], ins[i % 3], &e)) stop(&e);
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);  // a write then fails with EPIPE, see stdout_failed
    parse_options(&cli, argc, argv);
    const char *model = check_usage();
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP};
    for (int i = 0; i < 3; i++)  // but not where it is ignored, as nohup does
        if (signal(ends[i], SIG_IGN) != SIG_IGN) signal(ends[i], on_signal);
    const char *const *files = cli.files + (model != NULL);
    check_outputs(model, files);
    if (opt.info)
        print_info(model);
    else if (opt.score)
        score_file(model);
    else if (opt.latents)
        write_latents(model, files[0]);
    else if (opt.compress)
        compress(model, files[0], files[1]);
    else if (opt.decompress)
        decompress(model, files[0], files[1]);
    else if (opt.mix)
        generate_mixed(model);
    else
        generate(model);
    free(cli.files);
    return 0;
}
