// sample.c: what one does with a trained model: write text, score a file, see where the model
// stumbles, take its latents, compress a file with it. One byte at a time, on the CPU.
//
// Refuses: a model file that is damaged or of another program, an output that exists (without
// --force), a compressed file of another model. Data goes to stdout, everything else to stderr.
// Read stream.h first. Run:  ./sample out/model.safetensors --prompt "The "      ./sample --help
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <signal.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "support/checkpoint.h"
#include "support/options.h"
#include "support/stream.h"

typedef struct {
    const char *prompt, *prompt_file, *score, *latents;
    int64_t bytes, top_k, streams, threads;
    double temperature, top_p;
    uint64_t seed;
    bool heat, compress, decompress, force;
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
    {.name = "heat", .kind = OPT_FLAG, .value = &opt.heat,
     .help = "with --score: every byte by its surprise, in colour or as TSV"},
    {.name = "latents", .kind = OPT_TEXT, .value = &opt.latents, .arg = "OUT.npy FILE",
     .help = "write z of every byte, float32 (bytes, D)"},
    {.kind = OPT_SECTION, .help = "compress a file with the model as the statistics"},
    {.name = "compress", .kind = OPT_FLAG, .value = &opt.compress, .arg = "IN OUT",
     .help = "in about the bits that --score says"},
    {.name = "decompress", .kind = OPT_FLAG, .value = &opt.decompress, .arg = "IN OUT",
     .help = "same model, build and machine"},
    {.kind = OPT_SECTION, .help = "in general"},
    {.name = "force", .kind = OPT_FLAG, .value = &opt.force, .help = "overwrite outputs"},
    {.name = "threads", .kind = OPT_INT, .value = &opt.threads, .max = 1024, .arg = "N",
     .help = "0 = all; the bits do not depend on it"},
};

static Cli cli = {
    .program = "sample",
    .usage = "usage: ./sample MODEL.safetensors [options]",
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

// Somebody who reads only the beginning (| head) is content: quietly done. SIGPIPE is ignored, so
// the write fails with EPIPE instead.
static void stdout_failed(void) {
    if (errno == EPIPE) _exit(0);
    Error e;
    fail(&e, "cannot write to standard output: %s", strerror(errno));
    die(&cli, &e);
}

static void put(const void *bytes, size_t n) {
    if (fwrite(bytes, 1, n, stdout) != n) stdout_failed();
}

static void flush(void) {
    if (fflush(stdout)) stdout_failed();
}

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

// The first stream's text is printed as it is made, the others' when all are done.
static void generate(const char *model) {
    Stream s;
    Sampler sampler = {.temperature = opt.temperature, .top_k = (int)opt.top_k,
                       .top_p = opt.top_p, .seed = opt.seed};
    Error e;
    uint8_t *prompt;
    size_t n_prompt;
    int S = (int)opt.streams, ids[MAX_STREAMS];
    static real logits[MAX_STREAMS * V];
    open_model(&s, model, S);
    read_prompt(&prompt, &n_prompt);
    uint8_t *texts = S > 1 ? malloc((size_t)S * (size_t)opt.bytes) : NULL;
    if (S > 1 && !texts) stop((fail(&e, "out of memory for %d texts: fewer --bytes", S), &e));
    put(prompt, n_prompt);
    flush();
    feed_prompt(&s, prompt, n_prompt, logits);
    double start = now();
    int64_t made = 0;
    for (; opt.bytes == 0 || made < opt.bytes; made++) {
        if (made > 0) stream_push(&s, ids, NULL, logits);
        for (int j = 0; j < S; j++) {
            ids[j] = stream_sample(&s, &sampler, logits + (size_t)j * V, j);
            if (texts) texts[(size_t)j * (size_t)opt.bytes + (size_t)made] = (uint8_t)ids[j];
        }
        uint8_t byte = (uint8_t)ids[0];
        put(&byte, 1);
        flush();
    }
    double seconds = now() - start;
    for (int j = 1; j < S; j++) {
        fprintf(stderr, "\n--- text %d of %d\n", j + 1, S);
        put(prompt, n_prompt);
        put(texts + (size_t)j * (size_t)opt.bytes, (size_t)opt.bytes);
        flush();
    }
    fprintf(stderr, "\n%lld bytes, %.0f bytes/s\n", (long long)made * S,
            (double)(made * S) / seconds);
    free(texts);
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
    size_t context, segment;  // RF-1, SEGMENT
    uint8_t *bytes;           // of the windows in hand
    size_t have;
    real *losses, *latents, *logits, *z;
} Windows;

static void open_windows(Windows *w, const Stream *s, bool latents) {
    size_t D = (size_t)s->table.config.latent, S = (size_t)s->capacity;
    *w = (Windows){.context = (size_t)config_receptive_field(&s->table.config) - 1};
    // Long enough that the context costs little, short enough for 64 MB of latents.
    size_t most = ((size_t)1 << 24) / (S * D);
    w->segment = 16 * w->context > 1024 ? 16 * w->context : 1024;
    if (latents && w->segment > most) w->segment = most ? most : 1;
    size_t outputs = w->context + S * w->segment;
    w->bytes = malloc(outputs + 1);
    w->losses = malloc(outputs * sizeof(real));
    w->logits = malloc(S * V * sizeof(real));
    w->z = malloc(S * D * sizeof(real));
    if (latents) w->latents = malloc(outputs * D * sizeof(real));
    Error e;
    if (!w->bytes || !w->losses || !w->logits || !w->z || (latents && !w->latents))
        stop((fail(&e, "out of memory for windows of %zu bytes", w->context + w->segment), &e));
}

// All outputs of the windows in hand. `skip`: outputs of the first window that are not wanted.
static void run_windows(Windows *w, Stream *s, size_t skip) {
    size_t D = (size_t)s->table.config.latent, end = w->context + w->segment;
    size_t windows = w->have > end ? (w->have - w->context + w->segment - 1) / w->segment : 1;
    int ids[MAX_STREAMS], targets[MAX_STREAMS];
    real losses[MAX_STREAMS];
    if (windows > (size_t)s->capacity) windows = (size_t)s->capacity;
    stream_begin(s, (int)windows);
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
            run_windows(&w, s, skip);
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

typedef struct {
    double nats;
    bool heat, colour;
} Score;

// One byte, coloured from white over yellow to red by its surprise; characters stay whole.
static void paint(uint8_t byte, double bits) {
    static const int colours[] = {15, 230, 229, 228, 221, 214, 208, 202, 196};
    bool inside = (byte & 0xC0) == 0x80, line = byte == '\n';
    char text[40];
    int step = bits < 0 ? 0 : bits > 8 ? 8 : (int)bits;
    int n = inside ? 0 : snprintf(text, sizeof text, "\033[38;5;%dm", colours[step]);
    text[n++] = (byte < ' ' && !line) || byte == 127 ? '?' : (char)byte;
    if (line) n += snprintf(text + n, sizeof text - (size_t)n, "\033[0m");
    put(text, (size_t)n);
}

static void show(const Score *score, uint64_t offset, uint8_t byte, double nats) {
    double bits = nats / log(2);
    char row[64];
    if (score->heat && score->colour) paint(byte, bits);
    if (score->heat && !score->colour)
        put(row, (size_t)snprintf(row, sizeof row, "%llu\t%d\t%.4f\n", (unsigned long long)offset,
                                  byte, bits));
}

// The first byte of a file has no context: one of 256, ln 256 nats.
static void visit_score(void *arg, const Part *part) {
    Score *score = arg;
    if (part->first == 0) {
        score->nats += log(V);
        show(score, 0, part->bytes[0], log(V));
    }
    for (size_t i = 0; i < part->scored; i++) {
        score->nats += part->losses[i];
        if (score->heat) show(score, part->first + i + 1, part->bytes[i + 1], part->losses[i]);
    }
}

static void score_file(const char *model) {
    Stream s;
    Score score = {.heat = opt.heat, .colour = isatty(1) && !getenv("NO_COLOR")};
    static const char head[] = "offset\tbyte\tbits\n";
    open_model(&s, model, 0);
    if (score.heat && !score.colour) put(head, sizeof head - 1);
    uint64_t n = scan(&s, opt.score, false, visit_score, &score);
    Error e;
    if (n == 0) stop((fail(&e, "%.200s is empty: there is nothing to score", opt.score), &e));
    if (score.heat && score.colour) put("\033[0m\n", 5);
    flush();
    double nats = score.nats / (double)n;
    fprintf(score.heat ? stderr : stdout,
            "%.6f nats/byte  %.6f bits/byte  perplexity %.4f  %llu bytes\n", nats, nats / log(2),
            exp(nats), (unsigned long long)n);
    flush();
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
    Error e;
    if (ferror(output.file))  // now rather than after hours
        stop((fail(&e, "cannot write %.200s: %s", output.path, strerror(errno)), &e));
}

static void write_latents(const char *model, const char *in) {
    Stream s;
    Error e;
    open_model(&s, model, 0);
    if (output_open(&output, opt.latents, opt.force, &e)) stop(&e);
    write_npy_header(output.file, 0, s.table.config.latent);
    uint64_t n = scan(&s, in, true, visit_latents, &s);
    rewind(output.file);  // the number of rows is known only now
    write_npy_header(output.file, n, s.table.config.latent);
    if (output_commit(&output, &e)) stop(&e);
    fprintf(stderr, "%s: (%llu, %d) float32\n", opt.latents, (unsigned long long)n,
            s.table.config.latent);
    stream_free(&s);
}

// ---- Compress -----------------------------------------------------------------------------------
//
// A range coder narrows an interval of whole numbers, byte after byte, to the part that the model
// gives the byte: n bits of surprise cost n bits. The decoder makes the same distributions from the
// bytes it has already, so a model that saw even one byte ahead could not be decoded. After
// Schindler and Subbotin: when the top bytes of both ends agree they are written; when the interval
// gets too small while they differ, it is cut off at the boundary.
//
//   32 bytes: "FZT1", model, arithmetic, length, checksum of the content, checksum of these | code

enum { HEAD = 32, SCALE = 1 << 24 };
#define TOP ((uint64_t)1 << 56)
#define BOTTOM ((uint64_t)1 << 48)

typedef struct {
    uint64_t low, range, code;  // code: the decoder's next 64 bits
    FILE *out;                  // of the encoder
    const uint8_t *in;          // of the decoder
    size_t left;
    bool cut_off;  // it wanted more than there is
} Coder;

static uint8_t next_byte(Coder *c) {
    if (c->left == 0) c->cut_off = true;
    if (c->cut_off) return 0;
    c->left--;
    return *c->in++;
}

// Narrows the interval to [from, from + freq) of total.
static void narrow(Coder *c, uint32_t from, uint32_t freq, uint32_t total) {
    c->range /= total;
    c->low += from * c->range;
    c->range *= freq;
    for (;;) {
        if ((c->low ^ (c->low + c->range)) >= TOP) {
            if (c->range >= BOTTOM) break;
            c->range = (0 - c->low) & (BOTTOM - 1);
        }
        if (c->out) fputc((int)(c->low >> 56), c->out);
        if (c->in) c->code = c->code << 8 | next_byte(c);
        c->low <<= 8;
        c->range <<= 8;
    }
}

static void encode_byte(Coder *c, const uint32_t *freq, uint32_t total, int byte) {
    uint32_t from = 0;
    for (int v = 0; v < byte; v++) from += freq[v];
    narrow(c, from, freq[byte], total);
}

// -1: no byte has this code, so the file is damaged.
static int decode_byte(Coder *c, const uint32_t *freq, uint32_t total) {
    uint64_t at = (c->code - c->low) / (c->range / total);
    uint32_t from = 0;
    int byte = 0;
    if (at >= total) return -1;
    while (at >= from + freq[byte]) from += freq[byte++];
    narrow(c, from, freq[byte], total);
    return byte;
}

// The model's distribution in whole numbers. None is 0, so that any byte can be coded.
static uint32_t frequencies(uint32_t freq[V], const real *logits, float cap) {
    double p[V], top = -INFINITY, sum = 0;
    uint32_t total = 0;
    for (int v = 0; v < V; v++) {
        p[v] = cap > 0 ? (double)cap * tanh((double)logits[v] / cap) : (double)logits[v];
        if (p[v] > top) top = p[v];
    }
    for (int v = 0; v < V; v++) sum += p[v] = exp(p[v] - top);
    for (int v = 0; v < V; v++) {
        double share = p[v] / sum;
        freq[v] = 1 + (share <= 1 ? (uint32_t)(share * SCALE) : 0);  // a NaN counts as 0
        total += freq[v];
    }
    return total;
}

// The distribution before the first byte: there is no context, so all are alike.
static uint32_t no_context(uint32_t freq[V]) {
    for (int v = 0; v < V; v++) freq[v] = 1;
    return V;
}

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

static void check_usage(void) {
    int modes = (opt.score != NULL) + (opt.latents != NULL) + opt.compress + opt.decompress;
    int expected = 1 + (opt.latents ? 1 : opt.compress || opt.decompress ? 2 : 0);
    if (modes > 1)
        usage_error(&cli, "choose one of --score, --latents, --compress, --decompress%s%s", "", "");
    if (cli.n_files == 0) usage_error(&cli, "no model file%s%s", "", "");
    if (cli.n_files < expected)
        usage_error(&cli, "%s needs %s", opt.latents ? "--latents" : "(de)compressing",
                    opt.latents ? "OUT.npy FILE" : "IN OUT");
    if (cli.n_files > expected)
        usage_error(&cli, "one argument too many: %s%s", cli.files[expected], "");
    if (opt.heat && !opt.score) usage_error(&cli, "--heat goes with --score FILE%s%s", "", "");
    if (opt.prompt && opt.prompt_file)
        usage_error(&cli, "choose one of --prompt and --prompt-file%s%s", "", "");
    if (opt.streams > 1 && opt.bytes == 0)
        usage_error(&cli, "--streams needs --bytes: the texts are printed one after the other%s%s",
                    "", "");
}

int main(int argc, char **argv) {
    parse_options(&cli, argc, argv);
    check_usage();
#ifdef _OPENMP
    if (opt.threads) omp_set_num_threads((int)opt.threads);
#endif
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    const char *model = cli.files[0];
    if (opt.score)
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
