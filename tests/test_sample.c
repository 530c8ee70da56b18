// test_sample.c: a trained model in use: streaming, files good and bad.
//
// Streamed logits are the full forward pass's bits; what is saved comes back bit for bit; over a
// hundred malformed headers, every cut and every flipped byte end in an error that names the file
// and the fault (run it under ASan and UBSan). The program ./sample: test_program.c.
//   ./test_sample
#define _POSIX_C_SOURCE 200809L
#include "support/stream.h"
#include "tests/files.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

// ---- Streaming ----------------------------------------------------------------------------------

enum { STREAM_T = 70, STREAM_MOST = 11 };

// What streams are held against: texts, and what the full forward pass makes of them.
typedef struct {
    Config config;
    int ids[STREAM_MOST * STREAM_T];
    real *logits, *z, *params;
} Reference;

static Reference reference(const Config *c) {
    size_t rows = STREAM_MOST * STREAM_T, D = (size_t)c->latent;
    Reference r = {.config = *c, .logits = new_reals(rows * V), .z = new_reals(rows * D)};
    Model m;
    open_or_die(&m, cpu, c, STREAM_MOST, STREAM_T, NULL);
    fill_params(&m, 77);
    for (size_t i = 0; i < rows; i++)
        r.ids[i] = (int)(philox(5, (uint32_t)i, 0, 0, RNG_TEST).v[0] % V);
    cpu->upload(m.ids, r.ids, sizeof r.ids);
    model_forward(&m, NULL);
    cpu->read_acts(r.logits, m.logits, rows * V);
    cpu->read_acts(r.z, model_latents(&m), rows * D);
    r.params = new_reals(m.n_params);
    model_read(&m, r.params, m.params);
    model_free(&m);
    return r;
}

// S streams with different texts: -1, or the first position at which a bit differs.
static int first_difference(const Reference *r, int S, int threads) {
    size_t D = (size_t)r->config.latent;
    int at[STREAM_MOST], wrong = -1;
    real *logits = new_reals((size_t)S * V), *z = new_reals((size_t)S * D);
    Stream s;
    Error e;
    set_threads(threads);
    if (stream_open(&s, &r->config, r->params, STREAM_MOST, &e)) need(false, e.text);
    s.parallel = threads > 1;  // however small
    for (int pass = 0; pass < 2 && wrong < 0; pass++) {  // the second finds no trace of the first
        stream_begin(&s, S);
        for (int t = 0; t < STREAM_T && wrong < 0; t++) {
            for (int j = 0; j < S; j++) at[j] = r->ids[j * STREAM_T + t];
            stream_push(&s, at, z, logits);
            for (int j = 0; j < S; j++) {
                size_t row = (size_t)j * STREAM_T + (size_t)t;
                bool same = same_bits(logits + (size_t)j * V, r->logits + row * V, V) &&
                            same_bits(z + (size_t)j * D, r->z + row * D, D);
                if (!same && wrong < 0) wrong = t;
            }
        }
    }
    stream_free(&s);
    free(logits);
    free(z);
    set_threads(2);
    return wrong;
}

static void test_streaming(void) {
    static const struct {
        const char *what;
        Config c;
    } cases[] = {
        {"blocks", {.channels = 32, .latent = 32, .activation = ACT_gelu,
                    .units = "2x(block:3:1:2:4)"}},
        {"blocks, odd sizes", {.channels = 33, .latent = 7, .activation = ACT_gelu,
                               .units = "3x(block:4:3:1)", .softcap = 5}},
        {"a block, tied", {.channels = 130, .latent = 130, .activation = ACT_gelu,
                           .units = "block:2:5", .tie = true}},
        {"convs", {.channels = 64, .latent = 48, .activation = ACT_gelu,
                   .units = "conv:3:1 conv:3:2 conv:3:4"}},
        {"convs, tied, softcap", {.channels = 257, .latent = 257, .activation = ACT_gelu,
                                  .units = "2x(conv:2:1 conv:2:2 conv:2:8)", .tie = true,
                                  .softcap = 30}},
        {"one tap, one channel", {.channels = 1, .latent = 3, .activation = ACT_gelu,
                                  .units = "2x(block:1:4)"}},
        {"dilation beyond the text", {.channels = 16, .latent = 16, .activation = ACT_gelu,
                                      .units = "conv:3:200 conv:3:1"}},
        {"paper's sizes", {.channels = 256, .latent = 256, .activation = ACT_gelu,
                           .units = "3x(block:3:1:2:4)"}},
        {"lrelu2", {.channels = 40, .latent = 40, .activation = ACT_lrelu2,
                    .units = "conv:3:1 block:2:1:3", .tie = true}},
        {"no activation", {.channels = 40, .latent = 9, .units = "conv:3:1 block:2:1:3"}},
        {"mixed", {.channels = 65, .latent = 40, .activation = ACT_gelu,
                   .units = "conv:3:5:lrelu2 2x(block:2:1:9:2:none conv:1:3) block:4:7"}},
    };
    static const int streams[] = {1, 3, STREAM_MOST}, threads[] = {1, 2, 5};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Reference r = reference(&cases[i].c);
        for (int k = 0; k < 3; k++) {
            int wrong = first_difference(&r, streams[k], threads[k]);
            check(wrong < 0, "streamed = full forward, bit for bit: %s, %d streams, %d threads",
                  cases[i].what, streams[k], threads[k]);
            if (wrong >= 0) printf("     first at position %d\n", wrong);
        }
        free(r.logits);
        free(r.z);
        free(r.params);
    }
    Error e;
    Stream s;
    Config vast = config_paper();
    snprintf(vast.units, sizeof vast.units, "1024x(block:256:1048576:1048576:1048576)");
    vast.channels = vast.latent = MAX_CHANNELS;
    real nothing = 0;  // sizes are refused before anything is read
    check(stream_open(&s, &vast, &nothing, MAX_STREAMS, &e) && strstr(e.text, "memory"),
          "rings beyond the memory are refused: %s", e.text);
}

static void test_sampling(void) {
    Config c = {.channels = 2, .latent = 2, .activation = ACT_gelu, .units = "block:1:1"};
    Model m;
    Stream s;
    Error e;
    open_or_die(&m, cpu, &c, 1, 1, NULL);
    if (stream_open(&s, &c, m.params, 1, &e)) need(false, e.text);
    model_free(&m);
    // Bytes 10, 20, 30 with probabilities 1/2, 1/3, 1/6, all others with none.
    real logits[V];
    for (int v = 0; v < V; v++) logits[v] = -1000;
    logits[10] = (real)log(3);
    logits[20] = (real)log(2);
    logits[30] = 0;
    static const struct {
        const char *what;
        Sampler sampler;
        double want[3];
    } cases[] = {
        {"all", {.temperature = 1, .top_p = 1}, {1 / 2.0, 1 / 3.0, 1 / 6.0}},
        {"temperature 1/2", {.temperature = 0.5, .top_p = 1}, {9 / 14.0, 4 / 14.0, 1 / 14.0}},
        {"temperature 0", {.top_p = 1}, {1, 0, 0}},
        {"temperature 1e-300", {.temperature = 1e-300, .top_p = 1}, {1, 0, 0}},
        {"top-k 2", {.temperature = 1, .top_k = 2, .top_p = 1}, {3 / 5.0, 2 / 5.0, 0}},
        {"top-p 0.6", {.temperature = 1, .top_p = 0.6}, {3 / 5.0, 2 / 5.0, 0}},
        {"top-p 0.4", {.temperature = 1, .top_p = 0.4}, {1, 0, 0}},
        {"top-p 0", {.temperature = 1}, {1, 0, 0}},
    };
    enum { DRAWS = 20000 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int seen[V] = {0};
        for (int d = 0; d < DRAWS; d++) {
            s.position = (uint64_t)d;
            seen[stream_sample(&s, &cases[i].sampler, logits, 0)]++;
        }
        double worst = seen[10] + seen[20] + seen[30] == DRAWS ? 0 : 1;
        for (int k = 0; k < 3; k++) {
            double error = fabs((double)seen[10 + 10 * k] / DRAWS - cases[i].want[k]);
            if (!(error <= worst)) worst = error;
        }
        check_error(worst, 0.015, "20000 draws have the right shares: %s", cases[i].what);
    }
    s.table.config.softcap = 1e-3f;  // every logit is squeezed to nearly 0
    int low = 0;
    for (int d = 0; d < DRAWS; d++) {
        s.position = (uint64_t)d;
        low += stream_sample(&s, &cases[0].sampler, logits, 0) < 128;
    }
    check_error(fabs((double)low / DRAWS - 0.5), 0.015, "the softcap is applied before drawing");
    stream_free(&s);
}

// ---- Good files ---------------------------------------------------------------------------------

static const Config tiny = {.channels = 2, .latent = 2, .activation = ACT_gelu,
                            .units = "conv:2:1", .tie = true};

// Field by field: what pads a struct may differ.
static bool same_config(const Config *a, const Config *b) {
    return a->channels == b->channels && a->latent == b->latent &&
           a->activation == b->activation && a->tie == b->tie && a->softcap == b->softcap &&
           strcmp(a->units, b->units) == 0;
}

static void test_round_trip(const Config *c, const char *what) {
    Model m, back;
    open_filled(&m, c, 3);
    Error e = {""};
    const char *path = in_folder("model.safetensors");
    save_or_die(path, &m);
    bool ok = checkpoint_load_model(&back, path, cpu, 2, 5, &e) == 0;
    check(ok && same_bits(back.params, m.params, m.n_params) &&
              same_config(&back.config, &m.config),
          "a model comes back bit for bit: %s %s", what, e.text);
    Checkpoint ck = {0};
    ok = ok && checkpoint_open(&ck, path, &e) == 0;
    const char *text = ok ? checkpoint_get(&ck, "text") : NULL;
    check(text && strcmp(text, "a \"quoted\" \\ one,\nwith \xC3\xA9 and \xEF\xBF\xBD") == 0,
          "metadata come back, what is not UTF-8 as U+FFFD: %s", what);
    checkpoint_close(&ck);
    model_free(&back);
    model_free(&m);
}

static size_t offset_of(const Model *m, const char *name) {
    for (int i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0) return m->tensors[i].offset;
    need(false, name);
    return 0;
}

// Reads float i of a tensor straight from the file.
static float raw_value(const uint8_t *file, const Entry *entry, uint64_t data, size_t i) {
    uint32_t bits = 0;
    for (int b = 0; b < 4; b++)
        bits |= (uint32_t)file[data + entry->begin + 4 * i + (size_t)b] << (8 * b);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// In PyTorch's order: conv (O,C,K) with the last tap the current byte, linear (O,C).
static void test_layout(void) {
    const Config c = {.channels = 5, .latent = 3, .activation = ACT_gelu, .units = "block:4:1:2"};
    Model m;
    open_filled(&m, &c, 4);
    size_t conv = offset_of(&m, "units.0.conv.1.weight");
    const char *path = in_folder("layout.safetensors");
    save_or_die(path, &m);
    size_t n;
    uint8_t *file = read_file(path, &n);
    Checkpoint ck;
    Error e;
    if (checkpoint_parse(&ck, path, file, n, &e)) need(false, e.text);
    int found = 0, wrong = 0;
    for (size_t i = 0; i < ck.n_entries; i++) {
        const Entry *t = &ck.entries[i];
        for (size_t j = 0; j < (t->end - t->begin) / 4; j++) {
            float x = raw_value(file, t, ck.data, j), want = NAN;
            size_t o = j / 20, c5 = j / 4 % 5, k = 3 - j % 4;
            if (!strcmp(t->name, "units.0.conv.1.weight"))
                want = (float)m.params[conv + (k * 5 + c5) * 5 + o];
            else if (!strcmp(t->name, "proj.weight"))  // file (3,5), ours (5,3)
                want = (float)m.params[m.proj.weight + j % 5 * 3 + j / 5];
            else if (!strcmp(t->name, "head.weight"))  // file (256,3), ours (3,256)
                want = (float)m.params[m.head.weight + j % 3 * 256 + j / 3];
            else if (!strcmp(t->name, "embedding.weight"))
                want = (float)m.params[m.embedding + j];
            else
                continue;
            found += j == 0;
            if (!(x == want)) wrong++;
        }
    }
    check(found == 4 && wrong == 0, "tensors lie as in PyTorch (%d wrong)", wrong);
    check(ck.data % 8 == 0 && file[8] == '{' && n == ck.size, "the data starts at a multiple of 8");
    check(strcmp(checkpoint_get(&ck, "format"), "pt") == 0, "the metadata says format pt");
    checkpoint_close(&ck);
    free(file);
    model_free(&m);
}

static void test_state(void) {
    Model m;
    open_filled(&m, &tiny, 5);
    real *arrays[3], *back = new_reals(m.n_params);
    Role roles[3] = {{"params", NULL}, {"m", NULL}, {"v", NULL}};
    for (int r = 0; r < 3; r++)
        roles[r].values = arrays[r] = new_random(m.n_params, 50 + (uint64_t)r, 0, 1e-20);
    const Pair pairs[] = {{"step", "123"}, {"best", "1.5"}};
    const char *path = in_folder("state.safetensors");
    Error e = {""};
    Checkpoint ck = {0};
    bool ok = checkpoint_save(path, &m, roles, 3, pairs, 2, &e) == 0 &&
              checkpoint_open(&ck, path, &e) == 0;
    check(ok && ck.is_state && checkpoint_has_role(&ck, "v") && !checkpoint_has_role(&ck, "ema"),
          "a training state has its roles %s", e.text);
    for (int r = 0; r < 3 && ok; r++)
        check(checkpoint_read(&ck, roles[r].name, back, &e) == 0 &&
                  same_bits(back, arrays[r], m.n_params),
              "role %s comes back bit for bit", roles[r].name);
    const char *step = ok ? checkpoint_get(&ck, "step") : NULL;
    check(step && strcmp(step, "123") == 0, "and so does the step");
    check(ok && checkpoint_read(&ck, "ema", back, &e) && strstr(e.text, "ema"),
          "a role that is not there: %s", e.text);
    Config other = tiny;
    check(ok && checkpoint_match(&ck, &other, &e) == 0, "the same configuration matches");
    other.activation = ACT_lrelu2;
    strcpy(other.units, "conv:3:7");
    check(ok && checkpoint_match(&ck, &other, &e) &&
              strstr(e.text, "units is conv:2:1 there and conv:3:7 here") &&
              strstr(e.text, "activation is gelu there and lrelu2 here"),
          "another one does not: %s", e.text);
    checkpoint_close(&ck);
    Model no;
    check(checkpoint_load_model(&no, path, cpu, 1, 1, &e) && strstr(e.text, "model.safetensors"),
          "a state is not a model: %s", e.text);
    for (int r = 0; r < 3; r++) free(arrays[r]);
    free(back);
    model_free(&m);
}

// ---- Writing that fails -------------------------------------------------------------------------

static bool loads(const char *path, const Model *want, Error *e) {
    Model m;
    if (checkpoint_load_model(&m, path, cpu, 1, 1, e)) return false;
    bool same = !want || same_bits(m.params, want->params, m.n_params);
    model_free(&m);
    return same;
}

static void test_failed_writes(void) {
    Model old, m;
    open_filled(&old, &tiny, 6);
    open_filled(&m, &tiny, 7);
    const char *path = in_folder("kept.safetensors");
    const Role role = {"", m.params};
    Error e = {""}, e2;
    save_or_die(path, &old);
    // A disk that is full after 1000 bytes.
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 1000;
    fflush(stdout);  // the limit holds for it, too
    setrlimit(RLIMIT_FSIZE, &limit);
    int status = checkpoint_save(path, &m, &role, 1, NULL, 0, &e);
    setrlimit(RLIMIT_FSIZE, &before);
    check(status && strstr(e.text, "untouched") && strstr(e.text, strerror(EFBIG)),
          "a full disk: %s", e.text);
    check(loads(path, &old, &e2), "leaves the old file whole");
    check(entries("kept.safetensors") == 1, "and no temporary file");
    char link[400];
    snprintf(link, sizeof link, "%s", in_folder("linked.safetensors"));
    need(symlink("kept.safetensors", link) == 0, "a link");
    struct stat st;
    // Somebody else's file by the name that ours would have.
    char other[440];
    snprintf(other, sizeof other, "%s.%ld-0.tmp", path, (long)getpid());
    write_bytes(other, "keep", 4);
    save_or_die(link, &m);
    check(lstat(other, &st) == 0 && st.st_size == 4, "no file that is there is taken for ours");
    unlink(other);
    check(loads(path, &m, &e2) && lstat(link, &st) == 0 && S_ISLNK(st.st_mode),
          "a link to a model stays, and the model is the new one");
    save_or_die(path, &old);
    m.params[3] = (real)INFINITY;
    check(checkpoint_save(path, &m, &role, 1, NULL, 0, &e) && strstr(e.text, "embedding.weight"),
          "what is not finite is not saved: %s", e.text);
    check(loads(path, &old, &e2) && entries("kept.safetensors") == 1, "and the old file stays");
    check(checkpoint_save(in_folder("no/such/folder"), &old, &role, 1, NULL, 0, &e) != 0,
          "a folder that is not there: %s", e.text);
    check(checkpoint_save(folder, &old, &role, 1, NULL, 0, &e) != 0, "a folder: %s", e.text);
    model_free(&old);
    model_free(&m);
}

// A process that does nothing but save is killed again and again: there is always a whole file.
static void test_killed_writes(void) {
    const Config c = {.channels = 64, .latent = 64, .activation = ACT_gelu,
                      .units = "2x(block:3:1)"};
    Model m;
    open_filled(&m, &c, 8);
    char path[400], temporary[440];
    snprintf(path, sizeof path, "%s", in_folder("killed.safetensors"));
    save_or_die(path, &m);
    int whole = 0, cut = 0;
    enum { KILLS = 200 };
    fflush(stdout);
    for (int i = 0; i < KILLS; i++) {
        pid_t child = fork();
        if (child == 0)
            for (;;) save_or_die(path, &m);
        struct timespec pause = {0, (long)(philox(9, (uint32_t)i, 0, 0, RNG_TEST).v[0] % 6000000)};
        nanosleep(&pause, NULL);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        Error e = {""};
        bool sound = loads(path, &m, &e);
        if (!sound) printf("     after kill %d: %s\n", i, e.text);
        whole += sound;
        // What a kill leaves is its own, by name: nothing else is ever overwritten.
        snprintf(temporary, sizeof temporary, "%s.%ld-0.tmp", path, (long)child);
        cut += unlink(temporary) == 0;
    }
    check(whole == KILLS, "after %d kills while saving, %d files were whole", KILLS, whole);
    check(cut > KILLS / 20, "%d of the kills hit a save that was half done", cut);
    model_free(&m);
}

// ---- Bad files ----------------------------------------------------------------------------------

// The error of a parse must name the file, hold the fault, be one line and free of control
// characters (a file must not be able to drive the terminal).
static bool says(const Error *e, const char *fault) {
    if (strncmp(e->text, "FILE: ", 6) || !strstr(e->text, fault)) return false;
    for (const char *s = e->text; *s; s++)
        if ((unsigned char)*s < ' ' || (unsigned char)*s > '~') return false;
    return true;
}

// Whether a file is refused, with `fault` in the message. Memory is exact, so that ASan sees the
// first byte too far.
static bool refused(const uint8_t *file, size_t n, const char *fault, Error *e) {
    uint8_t *exact = malloc(n ? n : 1);
    need(exact != NULL, "out of memory");
    memcpy(exact, file, n);
    Checkpoint ck;
    bool bad = checkpoint_parse(&ck, "FILE", exact, n, e) != 0;
    checkpoint_close(&ck);
    free(exact);
    return bad && says(e, fault);
}

static void test_cuts_and_flips(const uint8_t *good, size_t n) {
    Error e;
    size_t header = (size_t)good[8 - 8] + ((size_t)good[1] << 8), accepted = 0;
    for (size_t length = 0; length < n; length++) accepted += !refused(good, length, "", &e);
    check(accepted == 0, "a file cut at each of %zu lengths is refused", n);
    uint8_t *file = malloc(n + 1);
    need(file != NULL, "out of memory");
    memcpy(file, good, n);
    file[n] = 0;
    check(refused(file, n + 1, "data", &e), "a byte too many: %s", e.text);
    size_t bits = 0;
    for (size_t i = 0; i < 8 + header; i++) {
        file[i] ^= 0xFF;
        accepted += !refused(file, n, "", &e);
        file[i] ^= 0xFF;
    }
    check(accepted == 0, "each of %zu header bytes inverted is refused", 8 + header);
    // One bit in the word "checksum" makes it an unknown key, and the file one without a checksum.
    for (size_t i = 0; i < 8 * n; i++) {
        file[i / 8] ^= (uint8_t)(1 << i % 8);
        bits += !refused(file, n, "", &e);
        file[i / 8] ^= (uint8_t)(1 << i % 8);
    }
    check(bits <= 8 * 8, "of %zu single bits, in header and data, only %zu go unseen (at most 64: "
          "those of the word checksum)", 8 * n, bits);
    free(file);
}

#define TEN "aaaaaaaaaa"
#define HUNDRED TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN

// A good header with its first `find` replaced: what must be said about it. '\a' stands for NUL,
// find "" puts it at the end, `more` appends bytes of data.
static const struct {
    const char *find, *replace, *fault;
    int more;
} edits[] = {
    // the grammar
    {"{\"__m", " {\"__m", "expected '{'", 0},
    {"{\"__m", "[\"__m", "expected '{'", 0},
    {"_\":{\"f", "_\":[\"f", "expected '{'", 0},
    {"\"pt\"", "1", "expected '\"'", 0},
    {"\"pt\"", "null", "expected '\"'", 0},
    {"\"pt\"", "{}", "expected '\"'", 0},
    {"\"pt\"", "[\"pt\"]", "expected '\"'", 0},
    {"\"pt\",", "\"pt\",,", "expected '\"'", 0},
    {"\"pt\",", "\"pt\" ", "expected ','", 0},
    {"\"format\":", "\"format\" ", "expected ':'", 0},
    {"\"format\":", "format:", "expected '\"'", 0},
    {"\"norm_in.bias\":", "norm_in.bias:", "expected '\"'", 0},
    {"2136]}}", "2136]}", "expected ','", 0},
    {"2136]}}", "2136]},}", "expected '\"'", 0},
    {"2136]}}", "2136", "expected ','", 0},
    {"", "x", "nothing but spaces", 0},
    {"", "{}", "nothing but spaces", 0},
    {"", "\n", "nothing but spaces", 0},
    {"", "\a", "nothing but spaces", 0},
    // strings
    {"pt", "p\nt", "control character", 0},
    {"pt", "p\at", "control character", 0},
    {"pt", "\xFF", "valid UTF-8", 0},
    {"pt", "\x80", "valid UTF-8", 0},
    {"pt", "\xC0\xAF", "valid UTF-8", 0},
    {"pt", "\xE0\x80\xAF", "valid UTF-8", 0},
    {"pt", "\xF0\x80\x80\xAF", "valid UTF-8", 0},
    {"pt", "\xED\xA0\x80", "valid UTF-8", 0},
    {"pt", "\xF4\x90\x80\x80", "valid UTF-8", 0},
    {"pt", "\xF8\x88\x80\x80\x80", "valid UTF-8", 0},
    {"pt", "\xE2\x82", "valid UTF-8", 0},
    {"norm_in.bias", "norm_in\xFF" "bias", "valid UTF-8", 0},
    {"pt", "\\q", "valid escape", 0},
    {"pt", "\\", "expected ','", 0},
    {"pt", "\\u12", "hexadecimal", 0},
    {"pt", "\\u12G4", "hexadecimal", 0},
    {"pt", "\\u0000", "no NUL", 0},
    {"norm_in.bias", "norm_in\\u0000bias", "no NUL", 0},
    {"pt", "\\ud800", "surrogate", 0},
    {"pt", "\\udc00", "surrogate", 0},
    {"pt", "\\ud800\\u0041", "surrogate", 0},
    {"norm_in.bias", HUNDRED HUNDRED, "shorter string", 0},
    {"\"format", "\"" HUNDRED HUNDRED, "shorter string", 0},
    {"2136]}}", "2136]},\"no end", "end of a string", 0},
    // numbers
    {"[2048,2056]", "[-2048,2056]", "digits", 0},
    {"[2048,2056]", "[+2048,2056]", "digits", 0},
    {"[2048,2056]", "[2048.0,2056]", "expected ','", 0},
    {"[2048,2056]", "[2e3,2056]", "expected ','", 0},
    {"[2048,2056]", "[0x800,2056]", "expected ','", 0},
    {"[2048,2056]", "[02048,2056]", "leading zeros", 0},
    {"[2048,2056]", "[,2056]", "digits", 0},
    {"[2048,2056]", "[\"2048\",2056]", "digits", 0},
    {"[2048,2056]", "[true,2056]", "digits", 0},
    {"[2048,2056]", "[2048,18446744073709551616]", "below 2^64", 0},
    {"[2048,2056]", "[2048,99999999999999999999999999]", "below 2^64", 0},
    {"[2048,2056]", "[2048]", "two offsets", 0},
    {"[2048,2056]", "[2048,2056,2056]", "two offsets", 0},
    {"[2048,2056]", "[]", "two offsets", 0},
    {"[2048,2056]", "2048", "expected '['", 0},
    {"[256,2]", "[256,-2]", "digits", 0},
    {"[256,2]", "[256,2.0]", "expected ','", 0},
    {"[256,2]", "null", "expected '['", 0},
    {"[256,2]", "[[256,2]]", "digits", 0},
    {"[256,2]", "[[[[[[[[[[[[[[[[[[[[[[[[", "digits", 0},
    {"[256,2]", "{\"a\":{\"a\":{}}}", "expected '['", 0},
    {"[256,2]", "[256,2,1,1]", "at most 3 dimensions", 0},
    // shapes, spans, dtypes
    {"[256,2]", "[256,0]", "a dimension of 0", 0},
    {"[256,2]", "[18446744073709551615,2]", "overflows", 0},
    {"[256,2]", "[4294967296,4294967296]", "overflows", 0},
    {"[256,2]", "[4611686018427387904]", "overflows", 0},
    {"[256,2]", "[4611686018427388416]", "overflows", 0},
    {"[256,2]", "[256,3]", "its shape needs 3072", 0},
    {"[256,2]", "[]", "its shape needs 4", 0},
    {"[256,2]", "[2,256]", "has shape (2,256), expected (256,2)", 0},
    {"[256,2]", "[512]", "has shape (512), expected (256,2)", 0},
    {"[256,2]", "[256,1,2]", "has shape (256,1,2), expected (256,2)", 0},
    {"[2048,2056]", "[2052,2060]", "after a gap", 0},
    {"[2048,2056]", "[2040,2048]", "inside the one", 0},
    {"[2048,2056]", "[2056,2048]", "is said to be at", 0},
    {"[0,2048]", "[0,2049]", "its shape needs 2048", 0},
    {"[2128,2136]", "[2136,2144]", "is said to be at", 0},
    {"[2128,2136]", "[18446744073709551608,0]", "is said to be at", 0},
    {"[2128,2136]", "[2120,2128]", "inside the one", 0},
    {"[2128,2136]", "[2136,2144]", "after a gap", 8},
    {"pt", "pt", "the tensors end at byte 2136 of the data, which has 2137", 1},
    {"\"F32\"", "\"F64\"", "type F64", 0},
    {"\"F32\"", "\"BF16\"", "type BF16", 0},
    {"\"F32\"", "\"f32\"", "type f32", 0},
    {"\"F32\"", "\"\"", "type ,", 0},
    {"\"F32\"", "\"\\u001b[31m\"", "type ?[31m", 0},
    {"\"F32\"", "32", "expected '\"'", 0},
    {"\"F32\",", "\"F32\",\"extra\":1,", "unknown field 'extra'", 0},
    {"\"F32\",", "\"F32\",\"dtype\":\"F32\",", "twice the field 'dtype'", 0},
    {"\"dtype\":\"F32\",", "", "expected ','", 0},
    {",\"data_offsets\":[2048,2056]", "", "expected ','", 0},
    {"\"dtype\":\"F32\",\"shape\":[256,2],\"data_offsets\":[0,2048]", "", "expected '\"'", 0},
    // which tensors
    {"norm_in.bias", "norm_out.bias", "norm_out.bias is there twice", 0},
    {"norm_in.bias", "norm_out\\u002ebias", "norm_out.bias is there twice", 0},
    {"norm_in.bias", "norm_in.Bias", "norm_in.bias is missing", 0},
    {"norm_in.bias", "", "norm_in.bias is missing", 0},
    {"2136]}}", "2136]},\"zz\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[2136,2144]}}",
     "zz is not of this model", 8},
    // metadata
    {"__metadata__", "__Metadata__", "unknown field 'format'", 0},
    {"\"norm_in.bias\":", "\"__metadata__\":{},\"norm_in.bias\":", "two __metadata__", 0},
    {"\"pt\",", "\"pt\",\"format\":\"pt\",", "'format' twice", 0},
    {"\"fuzzytok\"", "\"llama\"", "another program (llama)", 0},
    {"\"model\":\"fuzzytok\",", "", "another program", 0},
    {"\"version\":\"2\"", "\"version\":\"1\"", "version '1'", 0},
    {"\"version\":\"2\"", "\"version\":\"3\"", "version '3'", 0},
    {"\"version\":\"2\",", "", "version ''", 0},
    {"\"channels\":\"2\"", "\"channels\":\"3\"", "a tied head needs", 0},
    {"\"channels\":\"2\",\"latent\":\"2\"", "\"channels\":\"3\",\"latent\":\"3\"",
     "has shape (256,2), expected (256,3)", 0},
    {"\"channels\":\"2\",\"latent\":\"2\"", "\"channels\":\"65536\",\"latent\":\"65536\"",
     "expected (256,65536)", 0},
    {"\"channels\":\"2\"", "\"channels\":\"0\"", "channels is 0", 0},
    {"\"channels\":\"2\"", "\"channels\":\"65537\"", "invalid value 65537 for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\"-2\"", "invalid value -2 for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\" 2\"", "invalid value  2 for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\"02\"", "invalid value 02 for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\"2.0\"", "invalid value 2.0 for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\"4294967298\"", "for channels", 0},
    {"\"channels\":\"2\"", "\"channels\":\"\"", "for channels", 0},
    {"\"channels\":\"2\",", "", "nothing for channels", 0},
    {"\"gelu\"", "\"relu\"", "invalid value relu for activation", 0},
    {"\"gelu\"", "\"\"", "for activation", 0},
    {"\"activation\":\"gelu\",", "", "nothing for activation", 0},
    {"\"units\":\"conv:2:1\",", "", "nothing for units", 0},
    {"conv:2:1", "conv:3:1", "has shape (2,2,2), expected (2,2,3)", 0},
    {"conv:2:1", "conv:257:1", "taps of conv is 257", 0},
    {"conv:2:1", "conv:0:1", "taps of conv is 0", 0},
    {"conv:2:1", "2x(conv:2:1)", "units.1.conv.weight is missing", 0},
    {"conv:2:1", "1024x(conv:2:1)", "too few for the 1024 units", 0},
    {"conv:2:1", "4096x(conv:2:1)", "too few for the 4096 units", 0},
    {"conv:2:1", "4097x(conv:2:1)", "too deep", 0},
    {"conv:2:1", "", "no unit", 0},
    {"conv:2:1", " ", "no unit", 0},
    {"conv:2:1", "conv:2:0", "dilation of conv is 0", 0},
    {"conv:2:1", "conv:2:1,", "expected a space", 0},
    {"conv:2:1", "conv:2:", "expected a number", 0},
    {"conv:2:1", "conv::2:1", "expected a number", 0},
    {"conv:2:1", "conv:2:-1", "expected a number", 0},
    {"conv:2:1", "conv:2:1048577", "dilation of conv is 1048577", 0},
    {"conv:2:1", "conv:2:4294967297", "nine digits", 0},
    {"conv:2:1", "conv:2:1:1", "at most 2 numbers", 0},
    {"conv:2:1", "conv:2:1:relu", "expected a number or an activation", 0},
    {"conv:2:1",
     "block:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1",
     "at most 33 numbers", 0},
    {"conv:2:1", "(conv:2:1", "without its ')'", 0},
    {"conv:2:1", "((((((((((((((((((((((((((((((((", "nested", 0},
    {"conv:2:1", "other:2:1", "expected a mixer", 0},
    {"conv:2:1", "\\u001b[31m", "expected a mixer", 0},
    {"conv:2:1", HUNDRED HUNDRED HUNDRED, "expected a mixer", 0},
    {"conv:2:1", HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED HUNDRED
     HUNDRED, "for units", 0},
    {"conv:2:1", "block:2:1", "units.0.conv.0.weight is missing", 0},
    {"units.0.norm.bias", "units.0.norm.bia5", "units.0.norm.bias is missing", 0},
    {"\"tie\":\"yes\"", "\"tie\":\"maybe\"", "invalid value maybe for tie", 0},
    {"\"tie\":\"yes\"", "\"tie\":\"no\"", "proj.weight is missing", 0},
    {"\"skips\":\"0\"", "\"skips\":\"2\"", "a divisor of the 1 units", 0},
    {"\"skips\":\"0\"", "\"skips\":\"-1\"", "skips is -1", 0},
    {"\"skips\":\"0\"", "\"skips\":\"\"", "for skips", 0},
    {"\"bias\":\"yes\"", "\"bias\":\"no\"", "units.0.conv.bias is not of this model", 0},
    {"\"norm_in\":\"yes\"", "\"norm_in\":\"\"", "for norm_in", 0},
    {"\"norm_out\":\"yes\"", "\"norm_out\":\"no\"", "a tied head needs the last LayerNorm", 0},
    {"\"softcap\":\"0\"", "\"softcap\":\"-1\"", "softcap is -1", 0},
    {"\"softcap\":\"0\"", "\"softcap\":\"nan\"", "softcap", 0},
    {"\"softcap\":\"0\"", "\"softcap\":\"inf\"", "softcap is inf", 0},
    {"\"softcap\":\"0\"", "\"softcap\":\"0x1\"", "for softcap", 0},
    {"\"softcap\":\"0\"", "\"softcap\":\"1e7\"", "softcap", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"params\"", "params/embedding.weight is missing", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"\"", "the roles are", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"a,a\"", "the roles are", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"../a\"", "the roles are", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"a,b,c,d,e,f,g,h,i\"", "the roles are", 0},
    {"\"pt\"", "\"pt\",\"roles\":\"" HUNDRED "\"", "too long", 0},
};

// Puts a length, a header and data together. Returns the bytes of the file.
static size_t assemble(uint8_t *file, const char *header, size_t n, const uint8_t *data,
                       size_t n_data) {
    for (int b = 0; b < 8; b++) file[b] = (uint8_t)((uint64_t)n >> (8 * b));
    memcpy(file + 8, header, n);
    memcpy(file + 8 + n, data, n_data);
    return 8 + n + n_data;
}

// A good file without checksum: so that nothing but the edit can be what is wrong.
static size_t without_checksum(uint8_t *file, const uint8_t *good, size_t n) {
    size_t header = (size_t)good[0] + ((size_t)good[1] << 8);
    char text[8192];
    need(header < sizeof text, "a header of the expected size");
    memcpy(text, good + 8, header);
    text[header] = 0;
    char *from = strstr(text, "\"checksum\""), *to = from ? strchr(from, ',') : NULL;
    need(to != NULL, "a checksum in the header");
    memmove(from, to + 1, strlen(to + 1) + 1);
    return assemble(file, text, strlen(text), good + 8 + header, n - 8 - header);
}

// A file that was made before there were skips and models without norms and biases.
static void test_older_file(const uint8_t *good, size_t n) {
    static const char later[] = "\"skips\":\"0\",\"norm_in\":\"yes\",\"norm_out\":\"yes\","
                                "\"bias\":\"yes\"";
    size_t header = (size_t)good[0] + ((size_t)good[1] << 8);
    char text[8192];
    uint8_t *file = malloc(n);
    Checkpoint ck;
    Error e = {""};
    need(file != NULL && header < sizeof text, "memory");
    memcpy(text, good + 8, header);
    text[header] = 0;
    char *from = strstr(text, later);
    need(from != NULL && from[-1] == ',', "the keys that are new");
    memmove(from - 1, from + sizeof later - 1, strlen(from + sizeof later - 1) + 1);
    size_t size = assemble(file, text, strlen(text), good + 8 + header, n - 8 - header);
    bool opened = checkpoint_parse(&ck, "older", file, size, &e) == 0;
    check(opened && ck.config.skips == 0 && !ck.config.no_norm_in && !ck.config.no_norm_out &&
              !ck.config.no_bias, "a file older than some keys: opened%s", e.text);
    if (opened) checkpoint_close(&ck);
    free(file);
}

static void test_edits(const uint8_t *good, size_t n) {
    size_t header = (size_t)good[0] + ((size_t)good[1] << 8);
    const char *text = (const char *)good + 8;
    uint8_t *file = malloc(n + 4096), data[4096] = {0};
    need(file != NULL && n - 8 - header + 8 <= sizeof data, "memory");
    memcpy(data, good + 8 + header, n - 8 - header);
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        char edited[8192];
        size_t find = strlen(edits[i].find), with = strlen(edits[i].replace), at = 0;
        while (find && at + find <= header && memcmp(text + at, edits[i].find, find)) at++;
        if (!find) at = header;
        need(at + find <= header, edits[i].find);
        memcpy(edited, text, at);
        memcpy(edited + at, edits[i].replace, with);
        memcpy(edited + at + with, text + at + find, header - at - find);
        for (size_t k = at; k < at + with; k++)
            if (edited[k] == '\a') edited[k] = 0;
        size_t size = assemble(file, edited, header + with - find, data,
                               n - 8 - header + (size_t)edits[i].more);
        Error e = {""};
        bool ok = refused(file, size, edits[i].fault, &e);
        check(ok, "refused: %s", e.text);
        if (!ok) printf("     edit %zu, expected '%s'\n", i, edits[i].fault);
    }
    free(file);
}

// Files that are nothing of the kind.
static void test_no_files(void) {
    static const struct {
        const char *what;
        size_t n;
        const char *bytes, *fault;
    } cases[] = {
        {"an empty file", 0, "", "not a safetensors file"},
        {"seven bytes", 7, "1234567", "not a safetensors file"},
        {"eight zeros", 8, "\0\0\0\0\0\0\0\0", "expected '{'"},
        {"a text", 26, "Once upon a time there was", "not a safetensors file, or cut off"},
        {"a length of 2^64 - 1", 10, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", "cut off"},
        {"a length of 2^63", 10, "\0\0\0\0\0\0\0\x80{}", "cut off"},
        {"one byte too long", 10, "\3\0\0\0\0\0\0\0{}", "cut off"},
        {"no tensors at all", 10, "\2\0\0\0\0\0\0\0{}", "no __metadata__"},
        {"an array", 10, "\2\0\0\0\0\0\0\0[]", "expected '{'"},
        {"only a brace", 9, "\1\0\0\0\0\0\0\0{", "expected '\"'"},
        {"a byte of data", 11, "\2\0\0\0\0\0\0\0{}x", "no __metadata__"},
    };
    Error e;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check(refused((const uint8_t *)cases[i].bytes, cases[i].n, cases[i].fault, &e), "%s: %s",
              cases[i].what, e.text);
    Model m;
    check(checkpoint_load_model(&m, in_folder("missing"), cpu, 1, 1, &e) &&
              strstr(e.text, "No such file"), "%s", e.text);
    check(checkpoint_load_model(&m, folder, cpu, 1, 1, &e) && strstr(e.text, "a directory"), "%s",
          e.text);
}

// Values that are not finite, from a file that is sound otherwise.
static void test_values(const uint8_t *plain, size_t n) {
    static const uint32_t bad[] = {0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001};
    uint8_t *file = malloc(n);
    real host[1024];
    need(file != NULL, "out of memory");
    memcpy(file, plain, n);
    Checkpoint ck;
    Error e = {""};
    int refusals = 0;
    for (int i = 0; i < 4; i++) {
        for (int b = 0; b < 4; b++) file[n - 12 + (size_t)b] = (uint8_t)(bad[i] >> (8 * b));
        bool opens = checkpoint_parse(&ck, "FILE", file, n, &e) == 0;
        refusals += opens && checkpoint_read(&ck, "", host, &e) && says(&e, "units.0.norm.bias");
        checkpoint_close(&ck);
    }
    check(refusals == 4, "infinities and NaNs are refused: %s", e.text);
    memcpy(file, plain, n);
    bool opens = checkpoint_parse(&ck, "FILE", file, n, &e) == 0;
    check(opens && checkpoint_read(&ck, "", host, &e) == 0,
          "the same file without a checksum and unedited is accepted");
    checkpoint_close(&ck);
    free(file);
}

static void test_bad_files(void) {
    Model m;
    open_filled(&m, &tiny, 9);
    const char *path = in_folder("tiny.safetensors");
    const Role role = {"", m.params};
    Error e;
    if (checkpoint_save(path, &m, &role, 1, NULL, 0, &e)) need(false, e.text);
    size_t n;
    uint8_t *good = read_file(path, &n), *plain = malloc(n);
    need(good != NULL && plain != NULL, "a good file");
    size_t n_plain = without_checksum(plain, good, n);
    test_cuts_and_flips(good, n);
    test_older_file(plain, n_plain);
    test_edits(plain, n_plain);
    test_no_files();
    test_values(plain, n_plain);
    free(good);
    free(plain);
    model_free(&m);
}

int main(void) {
    make_folder();
    test_streaming();
    test_sampling();
    test_round_trip(&tiny, "a conv, tied");
    test_round_trip(&(Config){.channels = 24, .latent = 20, .activation = ACT_gelu,
                              .units = "2x(block:3:1:3)", .softcap = 6}, "blocks, softcap");
    test_round_trip(&(Config){.channels = 3, .latent = 5, .activation = ACT_lrelu2,
                              .units = "2x( conv:3:5 block:2:1:9:none )conv"}, "mixed");
    test_layout();
    test_state();
    test_failed_writes();
    test_killed_writes();
    test_bad_files();
    return remove_folder_and_finish();
}
