// test_program.c: the program ./sample as its user meets it: text, scores, latents, compressed
// files, and every way to get it wrong. SAMPLE names another program than ./sample.
//   ./test_program
#define _POSIX_C_SOURCE 200809L
#include "support/stream.h"
#include "tests/files.h"

// read_whole on a machine with 100,000 bytes of free memory.
static size_t little(void) { return 100000; }
static const Backend small = {.name = "cpu", .available = little};
// And what choose_backend finds on a GPU without tensor cores for bf16.
#include "support/gpu.h"
static const char *const *old_names(int *n) {
    static const char *const names[] = {"naive", "tiled"};
    return *n = 2, names;
}
static const Backend *old_gpu(const char *name, Error *e) {
    static Backend gpu;
    (void)e, gpu.name = name;
    return &gpu;
}
#define cpu_backend small
#define gpu_backend_names old_names
#define gpu_backend old_gpu
#include "support/options.h"
#undef cpu_backend

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

static char program[1100];

// Runs ./sample in the folder of this test, output in `out`, messages in `err`; its exit status.
static int sample(const char *arguments) {
    char command[4096];
    snprintf(command, sizeof command, "cd %s && %s %s >out 2>err </dev/null", folder, program,
             arguments);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

// A command of the shell there, where $S is the program; its exit status.
static int shell(const char *text) {
    char command[8192];
    snprintf(command, sizeof command, "cd %s && S='%s'; %s", folder, program, text);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static bool same_files(const char *a, const char *b) {
    size_t n, k;
    uint8_t *x = read_file(in_folder(a), &n), *y = read_file(in_folder(b), &k);
    bool same = x && y && n == k && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

static long long file_size(const char *name) {
    struct stat st;
    return stat(in_folder(name), &st) ? -1 : (long long)st.st_size;
}

// That a command fails with `status` and one line on stderr that holds `fault`, and prints nothing.
static void check_fails(const char *arguments, int status, const char *fault) {
    size_t n;
    int got = sample(arguments);
    char *line = (char *)read_file(in_folder("err"), &n);
    bool one_line = line && n > 0 && strchr(line, '\n') == line + n - 1;
    check(got == status && one_line && strstr(line, fault) && file_size("out") == 0,
          "exit status %d: %.*s", got, line && n ? (int)n - 1 : 0, line ? line : "");
    free(line);
}

static const Config use = {.channels = 24, .latent = 20, .activation = ACT_gelu,
                           .units = "2x(block:3:1:3)", .softcap = 6};

enum { LONG_FILE = 110000 };  // more than two rounds of windows

static void make_files(void) {
    Model m, other;
    open_filled(&m, &use, 10);
    open_filled(&other, &use, 11);
    save_or_die(in_folder("m.safetensors"), &m);
    save_or_die(in_folder("other.safetensors"), &other);
    other.config.softcap = 0;
    for (size_t i = 0; i < V; i++) other.params[other.head.bias + i] = i % 2 ? 1000 : -1000;
    save_or_die(in_folder("sure.safetensors"), &other);
    for (size_t i = 0; i < V; i++)  // writes nothing but a and b
        other.params[other.head.bias + i] = i == 'a' || i == 'b' ? 1000 : -1000;
    save_or_die(in_folder("ab.safetensors"), &other);
    const Role role = {"params", m.params};
    Error e;
    const Pair pairs[] = {{"step", "30"}, {"best", "0x1.8p+0"}, {"best_step", "20"}};
    if (checkpoint_save(in_folder("state.safetensors"), &m, &role, 1, pairs, 3, &e))
        need(false, e.text);
    model_free(&m);
    model_free(&other);
    static uint8_t bytes[LONG_FILE];
    for (size_t i = 0; i < LONG_FILE; i++)
        bytes[i] = (uint8_t)philox(12, (uint32_t)i, 0, 0, RNG_TEST).v[0];
    write_bytes(in_folder("long"), bytes, LONG_FILE);
    write_bytes(in_folder("empty"), "", 0);
    write_bytes(in_folder("one"), "\xFF", 1);
    write_bytes(in_folder("two"), "\0\xFF", 2);
    write_bytes(in_folder("field"), bytes, (size_t)config_receptive_field(&use));
    write_bytes(in_folder("binary"), bytes, 3000);
    memset(bytes, 0xFF, 2000);
    write_bytes(in_folder("ones"), bytes, 2000);
    for (int i = 0; i < 2000; i++) bytes[i] = (uint8_t)"the cat sat on the mat. "[i % 24];
    write_bytes(in_folder("text"), bytes, 2000);
}

// Whether two files differ behind their first n bytes.
static bool differ_from(size_t n, const char *a, const char *b) {
    size_t sizes[2];
    uint8_t *bytes[2] = {read_file(in_folder(a), &sizes[0]), read_file(in_folder(b), &sizes[1])};
    bool same = sizes[0] == sizes[1] && memcmp(bytes[0] + n, bytes[1] + n, sizes[0] - n) == 0;
    free(bytes[0]), free(bytes[1]);
    return !same;
}

static void test_generate(void) {
    int status = sample("m.safetensors --prompt 'ab' --bytes 300 --seed 5");
    check(status == 0 && file_size("out") == 302,
          "the prompt and as many bytes as asked for go to stdout, nothing else");
    rename(in_folder("out"), in_folder("first"));
    sample("m.safetensors --prompt 'ab' --bytes 300 --seed 5 --threads 3");
    check(same_files("out", "first"), "the same seed writes the same text, whatever the threads");
    sample("m.safetensors --prompt 'ab' --bytes 300 --seed 6");
    check(!same_files("out", "first"), "another seed writes another");
    sample("m.safetensors --prompt 'aB' --bytes 300 --seed 5");
    check(differ_from(2, "out", "first"), "and so does another last byte of the prompt");
    sample("m.safetensors --prompt-file two --bytes 300 --seed 5");
    check(file_size("out") == 302, "a prompt from a file, NUL and all");
    check(sample("m.safetensors --prompt 'ab' --bytes 300 --seed 5 --streams 4") == 0 &&
              file_size("out") == 4 * 302, "four streams write four texts");
    size_t n, k;
    uint8_t *all = read_file(in_folder("out"), &n), *first = read_file(in_folder("first"), &k);
    check(n > k && memcmp(all, first, k) == 0, "of which the first is that of one stream");
    check(n > k && memcmp(all, all + 302, 302) != 0, "and the second another");
    free(all);
    free(first);
    sample("m.safetensors --prompt-file binary --bytes 100");
    uint8_t *long_prompt = read_file(in_folder("binary"), &n), *end = long_prompt + n;
    size_t field = (size_t)config_receptive_field(&use);
    write_bytes(in_folder("tail"), end - field, field);
    all = read_file(in_folder("out"), &n);
    sample("m.safetensors --prompt-file tail --bytes 100");
    first = read_file(in_folder("out"), &k);
    check(n == 3100 && k == field + 100 && memcmp(all + n - 100, first + k - 100, 100) == 0,
          "of a long prompt the last %zu bytes count", field);
    free(long_prompt);
    free(all);
    free(first);
    sample("m.safetensors --bytes 100 --temperature 0");
    rename(in_folder("out"), in_folder("first"));
    sample("m.safetensors --bytes 100 --top-k 1 --seed 9");
    check(same_files("out", "first") && file_size("out") == 100,
          "temperature 0 is the likeliest byte, and so is top-k 1");
    sample("m.safetensors --bytes 100 --temperature 7e-46");
    check(same_files("out", "first"), "and so is a temperature that no float holds");
    check(sample("m.safetensors --bytes 100 --temperature 1e-310") == 0 &&
              same_files("out", "first") &&
              sample("m.safetensors --bytes 100 --temperature 1e-400") == 0 &&
              same_files("out", "first"), "or no double");
    check(shell("$S --temperature 0.12345678901234567 --top-p 0.1 --help >out && grep -q "
                "'byte \\[0.12345678901234566\\]$' out && grep -q 'together \\[0.1\\]$' out") == 0,
          "numbers keep all their digits, and no more");
    char command[4096];
    snprintf(command, sizeof command,
             "cd %s && (%s m.safetensors --bytes 0 2>err; echo $? >status) | head -c 10 >out",
             folder, program);
    size_t size = 0;
    char *said = system(command) == 0 ? (char *)read_file(in_folder("status"), &size) : NULL;
    check(said && strcmp(said, "0\n") == 0 && file_size("err") == 0,
          "a closed pipe ends an endless text quietly, with status 0");
    free(said);
}

// The first text, up to the ending, must be that of the program without --stop.
static void test_stop(void) {
    static const char *const endings[] = {"a", "b", "aab", "aabaab", "abab", "bbabb", "aaaaaa",
                                          "abaababaab", "ac", "bc"};
    enum { BYTES = 200, STREAMS = 3 };
    static const char base[] = "ab.safetensors --prompt aaab --bytes 200 --streams 3 --top-k 2";
    char arguments[200];
    size_t n, k;
    sample(base);
    char *all = (char *)read_file(in_folder("out"), &n), want[STREAMS * (BYTES + 4) + 1];
    need(all && n == STREAMS * (BYTES + 4), "three texts");
    int found = 0, right = 0;
    for (int i = 0; i < 10; i++) {
        size_t at = 0;
        for (int j = 0; j < STREAMS; j++) {
            char text[BYTES + 5];
            snprintf(text, sizeof text, "%s", all + j * (BYTES + 4));
            char *end = strstr(text + 4, endings[i]);  // the prompt does not count
            found += end != NULL;
            if (end) *end = 0;
            at += (size_t)snprintf(want + at, sizeof want - at, "%s", text);
        }
        snprintf(arguments, sizeof arguments, "%s --stop %s", base, endings[i]);
        sample(arguments);
        char *got = (char *)read_file(in_folder("out"), &k);
        right += k == at && memcmp(got, want, k) == 0;
        if (k != at) printf("     --stop %s: %s, not %s\n", endings[i], got, want);
        free(got);
    }
    check(right == 10 && found > 15, "--stop ends a text before it, each of several by itself (%d)",
          found);
    free(all);
    sample("sure.safetensors --bytes 400 --seed 3");
    all = (char *)read_file(in_folder("out"), &n);
    sample("sure.safetensors --bytes 400 --seed 3 --stop '\\t'");
    char *got = (char *)read_file(in_folder("out"), &k), *tab = memchr(all, '\t', n);
    check(tab && k == (size_t)(tab - all) && memcmp(all, got, k) == 0, "\\t is understood");
    free(all);
    free(got);
    check_fails("m.safetensors --stop ''", 2, "--stop is empty");
    check_fails("m.safetensors --stop 'a\\q'", 2, "'\\q'");
    check_fails("m.safetensors --stop 'a\\'", 2, "expected \\n, \\t or");
}

// All that goes to standard output, when that is full or its reader has gone.
static void test_standard_output(void) {
    static const char *const modes[] = {
        "m.safetensors", "m.safetensors --streams 2", "m.safetensors --score text",
        "m.safetensors --score text --heat", "m.safetensors --score text --heat=-",
        "m.safetensors --latents - text", "m.safetensors --compress text -",
        "m.safetensors --decompress text.fz /dev/stdout", "m.safetensors --info", "--help"};
    char command[300];
    size_t n;
    sample("m.safetensors --compress text text.fz");
    for (int i = 0; i < 10; i++) {
        snprintf(command, sizeof command, "$S %s >/dev/full 2>err", modes[i]);
        int status = shell(command);
        char *said = (char *)read_file(in_folder("err"), &n);
        bool one_line = strchr(said, '\n') == said + n - 1;
        said[strcspn(said, "\n")] = 0;
        check(status == 1 && one_line && strstr(said, "standard output: No space left"),
              "a full disk: %s: %s", modes[i], said);
        free(said);
        snprintf(command, sizeof command, "(sleep 0.1; $S %s 2>err; echo $? >status) | :",
                 modes[i]);
        shell(command);
        said = (char *)read_file(in_folder("status"), &n);
        check(strcmp(said, "0\n") == 0 && shell("grep -q cannot err") == 1,
              "a reader that has gone is no error: %s", modes[i]);
        free(said);
    }
    check(shell("$S m.safetensors --compress text - 2>err >c && cmp c text.fz &&"
                "$S m.safetensors --decompress - - 2>err <c | cmp - text") == 0,
          "- is standard output");
    check(shell("$S m.safetensors --latents z1.npy text 2>err &&"
                "$S m.safetensors --latents /dev/stdout text 2>err >z2 && cmp z1.npy z2") == 0,
          "and so is /dev/stdout, also of what is written out of order");
    check(shell("head -c 60 text.fz >cut; $S m.safetensors --decompress cut - 2>err >c") == 1 &&
              file_size("c") == 0, "and gets nothing of what turns out to be damaged");
    shell("rm z1.npy z2 c text.fz");
}

// Where outputs go: never over what is not theirs.
static void test_outputs(void) {
    check(shell("cp text notes.tmp; $S m.safetensors --compress notes.tmp notes 2>err &&"
                "cmp -s text notes.tmp && $S m.safetensors --decompress notes copy 2>err &&"
                "cmp -s text copy") == 0, "an input with the name OUTPUT.tmp stays");
    check(shell("echo keep >w.tmp; $S m.safetensors --compress text w 2>err && grep -q keep w.tmp")
              == 0, "and so does another file of that name");
    check(shell("cp text l.npy.tmp; $S m.safetensors --latents l.npy l.npy.tmp 2>err") == 0 &&
              file_size("l.npy") == 128 + 2000 * 80, "which can be read as well");
    shell("umask 027; rm -f w; $S m.safetensors --compress text w 2>err");
    struct stat st;
    check(stat(in_folder("w"), &st) == 0 && (st.st_mode & 0777) == 0640 && entries("w") == 2,
          "an output has the mode that umask gives");
    shell("cp text same; ln same hard; ln -s same soft; mkdir sub");
    check_fails("m.safetensors --compress same same --force", 1, "same file as the input");
    check_fails("m.safetensors --compress same sub/../same --force", 1, "same file");
    check_fails("m.safetensors --compress same hard --force", 1, "same file");
    check_fails("m.safetensors --latents soft same --force", 1, "same file");
    check_fails("m.safetensors --score soft --heat=same --force", 1, "same file");
    check_fails("m.safetensors --compress text m.safetensors --force", 1, "m.safetensors is the");
    check(shell("$S m.safetensors --score same --heat >>same 2>err") == 1 &&
              same_files("same", "text"), "an output that is the input is refused, and both stay");
    shell("echo old >sub/target; ln -s sub/target link; ln -s nowhere dead");
    check_fails("m.safetensors --compress text link", 1, "exists");
    check_fails("m.safetensors --compress text dead --force", 1, "leads nowhere");
    check(shell("$S m.safetensors --compress text link --force 2>err && test -L link &&"
                "cmp -s w sub/target && test \"$(ls sub)\" = target") == 0,
          "a link to a file stays, and the file gets the new content");
    // As root a device of one's own, never the system's.
    bool device = shell("mknod null c 1 3 2>/dev/null") == 0;
    if (!device) skip("an output that is a device: only root can make one");
    shell("mkfifo pipe; ln -s pipe to_pipe");
    static const char *const names[] = {"pipe", "to_pipe", "null"};
    for (int i = 0; i < 2 + device; i++) {
        char arguments[100];
        snprintf(arguments, sizeof arguments, "m.safetensors --compress text %s --force", names[i]);
        check_fails(arguments, 1, "is a device, a pipe or a socket");
        snprintf(arguments, sizeof arguments, "m.safetensors --latents %s text", names[i]);
        check_fails(arguments, 1, "is a device, a pipe or a socket");
        check(shell("grep -q force err") == 1 && stat(in_folder(names[i]), &st) == 0 &&
                  !S_ISREG(st.st_mode),
              "%s stays what it is, and --force is not offered", names[i]);
    }
    static const char *const signals[] = {"TERM", "HUP", "HUP"};
    static const int want[] = {128 + SIGTERM, 128 + SIGHUP, 0};
    for (int i = 0; i < 3; i++) {  // (a shell ignores SIGINT for what runs beside it)
        char command[600];
        snprintf(command, sizeof command,
                 "exec 2>/dev/null; sleep %d >pipe & k=$!; %s;"
                 "$S m.safetensors --latents big - <pipe 2>err & p=$!;"
                 "while kill -0 $p && ! ls big.* >/dev/null; do sleep 0.01; done;"
                 "kill -%s $p; wait $p; s=$?; kill $k; exit $s",
                 i < 2 ? 20 : 1, i < 2 ? ":" : "trap '' HUP", signals[i]);
        int status = shell(command);
        check(status == want[i] && entries("big") == (i == 2), "SIG%s %s", signals[i],
              i < 2 ? "ends it and leaves nothing behind" : "under nohup does not end it");
    }
}

// Models that reach further than memory does.
static void test_memory(void) {
    Model m;
    Config c = {.channels = 1, .latent = 1, .activation = ACT_gelu, .tie = true,
                .units = "4096x(conv:256:1048576)"};
    open_filled(&m, &c, 3);
    save_or_die(in_folder("vast.safetensors"), &m);
    model_free(&m);
    check_fails("vast.safetensors", 1, "1 stream needs 4.38e+03 GB of memory");
    check_fails("vast.safetensors --score text", 1, "1 stream needs 4.38e+03 GB of memory");
    c.channels = c.latent = 16;
    strcpy(c.units, "640x(attn:1:16777216)");
    open_filled(&m, &c, 3);
    save_or_die(in_folder("vast.safetensors"), &m);
    check_fails("vast.safetensors", 1, "1 stream needs 1.42e+03 GB of memory");
    check_fails("vast.safetensors --score text --windows 8:8", 1, "1 stream needs");
    model_free(&m);
    c.channels = c.latent = 1;
    strcpy(c.units, "300x(conv:2:1048576)");
    open_filled(&m, &c, 3);
    save_or_die(in_folder("far.safetensors"), &m);
    model_free(&m);
    struct rusage used;
    int status = sample("far.safetensors --bytes 3");
    getrusage(RUSAGE_CHILDREN, &used);  // maxrss: kilobytes
    check(status == 0 && used.ru_maxrss < 600000,
          "rings of 1.26 GB take as much of it as the text is long: %ld MB", used.ru_maxrss / 1000);
#ifdef __SANITIZE_ADDRESS__
    skip("a limit of memory: AddressSanitizer needs more");
#else
    status = shell("ulimit -v 6000000; $S far.safetensors --score text >out 2>err");
    check(status == 1 && shell("grep -q 'windows of .* GB' err") == 0,
          "windows beyond the memory are refused");
#endif
    check_fails("m.safetensors --bytes 1000000000000000 --streams 3", 1,
                "2 texts of 1000000000000000 bytes until the first is printed needs 2e+06");
    uint8_t *bytes;
    size_t n;
    Error e;
    check(read_whole(in_folder("long"), &bytes, &n, &e) && strstr(e.text, "long needs 0.00011 GB"),
          "a file beyond the memory is refused: %s", e.text);
    check(read_whole("/dev/zero", &bytes, &n, &e) && strstr(e.text, "zero needs 0.000131 GB more"),
          "and so is one without an end");
    check(read_whole(in_folder("text"), &bytes, &n, &e) == 0 && n == 2000, "but no smaller one");
    free(bytes);
    shell("rm vast.safetensors far.safetensors");
}

// How a page shows bytes, and each character's colour: the mean of its bytes' bits, from the table.
static void test_page(void) {
    static const char ugly[] = "<b> & \"q\"\r\n\tx\0\x7F\xC3\xA9 \xFF\xE2\x82 \xE2\x80\xAE.\xC3";
    static const char *const shown[] = {
        "&lt;", "&gt;", "&amp;", "&quot;", "<i>&#9229;</i>", "<i>&#8629;</i>\n",
        "<i>&#8677;</i>\t", "<i>&#9216;</i>", "<i>&#9249;</i>", "\xC3\xA9", "<i>\\xFF</i>",
        "<i>\\xE2</i>", "<i>\\x82</i>", "<i>U+202E</i>", "<i>\\xC3</i></span></pre>",
        "&lt;ugly&gt;&amp;:", "27 bytes</p>"};
    size_t n, k;
    write_bytes(in_folder("<ugly>&"), ugly, sizeof ugly - 1);
    check(sample("m.safetensors --score '<ugly>&' --heat page.html") == 0 && file_size("out") > 0,
          "--heat PAGE.html writes a page, and the score to standard output");
    char *page = (char *)read_file(in_folder("page.html"), &n), line[100], *p;
    for (int i = 0; i < 17; i++) check(strstr(page, shown[i]), "the page shows %s", shown[i]);
    check(!strstr(page, "<script") && !strstr(page, "http") && !strstr(page, "src=") &&
              !strstr(page, "href") && strlen(page) == n, "and refers to nothing outside");
    free(page);
    static const char accents[] = "\xC3\xA9t\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80.xyz";
    write_bytes(in_folder("accents"), accents, 18);
    check_fails("m.safetensors --score text --heat page.html", 1, "--force");
    check(shell("$S m.safetensors --heat=page --score accents 2>err >out && "
                "$S m.safetensors --heat p.html --score accents 2>err >o2 &&"
                "cmp page p.html && cmp out o2 &&"
                "$S m.safetensors --heat --score accents 2>err >h1 &&"
                "$S m.safetensors --score accents --heat 2>err >h2 &&"
                "$S --heat m.safetensors --score accents 2>err >h3 && cmp h1 h2 && cmp h1 h3 &&"
                "head -1 h1 | grep -q bits") == 0,
          "in any order; what follows --heat is its page only where it ends in .html");
    sample("m.safetensors --score accents --heat");
    char *table = (char *)read_file(in_folder("out"), &k);
    sample("m.safetensors --score accents --heat=- --force");
    page = (char *)read_file(in_folder("out"), &n);
    double bits[18] = {0};
    p = table;
    for (int i = 0; i < 18 && (p = strchr(p, '\n')); i++) sscanf(++p, "%*d %*d %lf", &bits[i]);
    int colour = -1, at = 0, wrong = 0;
    for (p = strstr(page, "<pre>") + 5; strncmp(p, "</pre>", 6) != 0;) {
        if (*p == '<') {
            sscanf(p, "<span class=\"b%d", &colour);
            p = strchr(p, '>') + 1;
            continue;
        }
        int length = utf8_length((uint8_t *)p, (uint8_t *)page + n);
        double mean = 0;
        for (int i = 0; i < length; i++) mean += bits[at + i] / length;
        wrong += colour != (mean > 8 ? 8 : (int)mean);
        at += length, p += length;
    }
    check(at == 18 && wrong == 0, "and every character in its colour");
    snprintf(line, sizeof line, "%s", strstr(page, "<title>"));
    sample("m.safetensors --score accents");
    char *score = (char *)read_file(in_folder("out"), &k);
    double title, want;
    check(sscanf(line, "<title>accents: %lf bits", &title) == 1 &&
              sscanf(score, "%*f nats/byte %lf", &want) == 1 && fabs(title - want) < 1e-4 * want,
          "its title has name and score");
    free(page);
    free(table);
    free(score);
}

// Whether --heat shows these bytes so on a terminal, leaving its colours out.
static bool shows(const char *bytes, const char *want) {
    char text[HEAT_TEXT], got[64] = "";
    uint8_t before = 0;
    for (; *bytes; before = (uint8_t)*bytes++) {
        int n = heat_terminal(text, (uint8_t)*bytes, before, 1, 0);
        text[n] = 0;
        strcat(got, text[0] == '\033' ? strchr(text, 'm') + 1 : text);
    }
    return strcmp(got, want) == 0;
}

static void test_controls(void) {
    check(shows("a\x1B\x7F\x9B.", "a???.") && shows("\xC2\x9B.", "\xC2?."),
          "--heat shows no control, C1's included");
    check(shows("\xC2\xA0\xC3\x9B \xE2\x82\x9B \xF0\x9F\x98\x80",
                "\xC2\xA0\xC3\x9B \xE2\x82\x9B \xF0\x9F\x98\x80"), "and every character");
    check_fails("m.safetensors --score '\xC2\x9B\x9B\xE2\x80\xAE\033\xC3\x9B'", 1,
                "cannot read ????\xC3\x9B:");
    check_fails("m.safetensors --\xC2\x9B", 2, "unknown option --?;");
}

static void test_info(void) {
    size_t n;
    check(sample("m.safetensors --info") == 0 && file_size("err") == 0, "--info");
    char *text = (char *)read_file(in_folder("out"), &n);
    check(strstr(text, "2 times:\n  block:3:1:3 ") && strstr(text, "(3,24,24) (3,24,24)"),
          "names the stack");
    check(strstr(text, "receptive field 17 bytes") && strstr(text, "MB of memory to sample"),
          "its reach and memory");
    check(strstr(text, "\ntext                     a \"quoted\" \\ one,?with \xC3\xA9"),
          "what was noted on saving, without controls");
    check(strstr(text, "held_out_nats_per_byte   (the file does not say)") &&
              !strstr(text, "softcap") && !strstr(text, "checksum"), "and what was not");
    free(text);
    check(shell("mkdir run; cp m.safetensors run/model.safetensors;"
                "$S run --info | cmp - out") == 0,
          "a folder stands for the model in it");
    check(sample("state.safetensors --info") == 0 &&
              shell("grep -q '^the state of a run.*model.safetensors' out &&"
                    "grep -q '^step 30, best 1.500000 nats per byte at step 20$' out &&"
                    "! grep -q 'does not say' out") == 0,
          "of a state: its step and its best");
}

// Nats per byte of a file by one full forward pass over all of it.
static double reference_score(const char *name) {
    size_t n;
    uint8_t *bytes = read_file(in_folder(name), &n);
    Model m;
    Error e;
    if (checkpoint_load_model(&m, in_folder("m.safetensors"), cpu, 1, (int)n, &e))
        need(false, e.text);
    int *ids = malloc(2 * n * sizeof *ids), *targets = ids + n;
    real *losses = new_reals(n);
    need(ids != NULL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        ids[i] = bytes[i];
        targets[i] = i + 1 < n ? bytes[i + 1] : -1;
    }
    model_losses(&m, ids, targets, losses);
    double nats = log(256);
    for (size_t i = 0; i < n; i++) nats += losses[i];
    free(ids);
    free(losses);
    free(bytes);
    model_free(&m);
    return nats / (double)n;
}

static double printed_score(const char *name) {
    char arguments[200];
    snprintf(arguments, sizeof arguments, "m.safetensors --score %s", name);
    size_t n;
    char *line = sample(arguments) == 0 ? (char *)read_file(in_folder("out"), &n) : NULL;
    double nats = line ? strtod(line, NULL) : NAN;
    free(line);
    return nats;
}

static void test_score(void) {
    static const char *const files[] = {"one", "two", "field", "binary", "text", "long"};
    for (int i = 0; i < 6; i++) {
        double want = reference_score(files[i]);
        check_error(fabs(printed_score(files[i]) - want) / want, 2e-6,
                    "--score = the full forward pass over '%s', %.6f nats/byte", files[i], want);
    }
    check_fails("m.safetensors --score empty", 1, "empty");
    check_fails("m.safetensors --score missing", 1, "No such file");
    check_fails("m.safetensors --score .", 1, "directory");
    double want = printed_score("text") * 2000 / log(2), sum = 0;
    sample("m.safetensors --score text --heat");
    size_t n;
    char *table = (char *)read_file(in_folder("out"), &n), *row = table;
    int rows = 0, right = 0;
    while ((row = strchr(row, '\n')) && row[1]) {
        long offset, byte;
        double bits;
        row++;
        if (sscanf(row, "%ld\t%ld\t%lf", &offset, &byte, &bits) != 3) break;
        right += offset == rows && byte == "the cat sat on the mat. "[rows % 24];
        sum += bits;
        rows++;
    }
    check(rows == 2000 && right == 2000, "--heat has a row for each byte");
    check_error(fabs(sum - want) / want, 1e-4, "whose bits add up to the score");
    free(table);
}

// --windows T:S by hand: bits[i] of byte i, from the first window that has it as a target.
static void score_by_hand(Model *m, const uint8_t *text, size_t n, size_t S, double *bits) {
    size_t T = (size_t)m->T, scored = 1;
    int *ids = calloc(2 * T, sizeof *ids), *targets = ids + T;
    real *losses = new_reals(T);
    need(ids != NULL, "out of memory");
    bits[0] = 8;
    for (size_t start = 0; scored < n; start += S) {
        for (size_t i = 0; i < T; i++) {
            ids[i] = start + i < n ? text[start + i] : 0;
            targets[i] = start + i + 1 < n ? text[start + i + 1] : -1;
        }
        model_losses(m, ids, targets, losses);
        for (size_t i = 0; i < T && start + i + 1 < n; i++)
            if (start + i + 1 == scored) bits[scored++] = (double)losses[i] / log(2);
    }
    free(ids);
    free(losses);
}

// The same sum in nats by model_score_windows, as model.h says.
static double score_by_model(Model *m, const uint8_t *text, size_t n, size_t S) {
    size_t T = (size_t)m->T, first = n < T + 1 ? n : T + 1;
    double nats, rest = 0;
    Error e;
    if (model_score_windows(m, text, first, 0, 1, T, &nats, NULL, &e) ||
        model_score_windows(m, text, n, first, T - S + 1, S, &rest, NULL, &e))
        need(false, e.text);
    return nats + rest;
}

// Whether --score --windows T:S --heat prints each byte once, its bits within 1e-3 of those by
// hand, and their mean.
static bool windows_match(const char *model, const char *path, size_t n, size_t S) {
    char arguments[200];
    size_t k, rows = 0;
    double bits[1000], nats = NAN, sum = 0;
    Model m;
    Error e;
    uint8_t *text = read_file(in_folder("text"), &k);
    int T = atoi(path);
    if (checkpoint_load_model(&m, in_folder(model), cpu, 1, T, &e)) need(false, e.text);
    score_by_hand(&m, text, n, S, bits);
    double by_model = score_by_model(&m, text, n, S);
    write_bytes(in_folder("part"), text, n);
    snprintf(arguments, sizeof arguments, "%s --score part --heat --windows %s", model, path);
    bool right = sample(arguments) == 0;
    char *table = (char *)read_file(in_folder("out"), &k), *row = table;
    for (; right && (row = strchr(row, '\n')) && row[1]; rows++) {
        long offset, byte;
        double got;
        right = sscanf(++row, "%ld\t%ld\t%lf", &offset, &byte, &got) == 3 && rows < n &&
                offset == (long)rows && byte == text[rows] && fabs(got - bits[rows]) < 1e-3;
        sum += bits[rows] * log(2);
    }
    free(table);
    table = (char *)read_file(in_folder("err"), &k);
    sscanf(table, "%lf nats/byte", &nats);
    right = right && rows == n && fabs(nats - sum / (double)n) < 1e-5 &&
            fabs(by_model - sum) < 1e-5 * sum;
    free(table), free(text);
    model_free(&m);
    return right;
}

static void test_windows(void) {
    static const char *const windows[] = {"1:1", "8:8", "8:3", "8:1", "20:7", "40:40", "40:39"};
    static const char *const models[] = {"m.safetensors", "attention.safetensors",
                                         "places.safetensors"};
    static const char *const stacks[] = {"attn:3 conv:2:1 attn:2:5", "positions conv:2:1 attn:2:5"};
    Model m;
    for (int j = 0; j < 2; j++) {
        Config c = {.channels = 24, .latent = 24, .activation = ACT_gelu, .window = 12};
        c.tie = true;
        snprintf(c.units, sizeof c.units, "%s", stacks[j]);
        open_filled(&m, &c, 13);
        save_or_die(in_folder(models[j + 1]), &m);
        model_free(&m);
    }
    for (int j = 0; j < 3; j++)
        for (int i = 0; i < 7; i++) {
            size_t T = 0, S = 0;
            sscanf(windows[i], "%zu:%zu", &T, &S);
            // Shorter than a window; ends of the first and of later ones; and several passes.
            const size_t n[] = {1, 2, T, T + 1, T + 2, T + S, T + S + 1, 2 * T + 3 * S + 2, 999};
            int wrong = 0;
            for (int k = 0; k < 9; k++)
                if (!windows_match(models[j], windows[i], n[k], S)) {
                    printf("     a text of %zu bytes\n", n[k]);
                    wrong++;
                }
            check(wrong == 0, "--windows %s is the sum over windows made by hand: %s", windows[i],
                  models[j]);
        }
    // Where places count, training knew none beyond its windows.
    static const char *const notes[] = {"part", "text --windows 12:6", "text"};
    char arguments[200];
    open_filled(&m, &(Config){.channels = 24, .latent = 24, .window = 12, .units = "positions conv",
                              .tie = true}, 13);
    save_or_die(in_folder("places.safetensors"), &m);
    model_free(&m);
    write_bytes(in_folder("part"), (const uint8_t *)"twelve bytes", 12);
    for (int i = 0; i < 3; i++) {
        snprintf(arguments, sizeof arguments, "places.safetensors --score %s", notes[i]);
        bool noted = sample(arguments) == 0 &&
                     shell("grep -q 'beyond 12 were never trained.*--windows 12:6' err") == 0;
        check(noted == (i == 2), "a model with positions, --score %s: %s note", notes[i],
              i == 2 ? "a" : "no");
    }
    static const char *const bad[] = {"0:1", "8:0", "0:0", "8:9", "8", "8:", ":8", ":", "8:4:2",
                                      "8:-4", "+8:4", "\" 8:4\"", "\"8: 4\"", "8:4x", "8,4",
                                      "\"\"", "16777217:1", "1000000000:1",
                                      "99999999999999999999:1", "8:18446744073709551617"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(arguments, sizeof arguments, "m.safetensors --score text --windows %s", bad[i]);
        check_fails(arguments, 2, "expected T:S, whole numbers with 1 <= S <= T <= 16777216;");
    }
    check_fails("m.safetensors --windows 8:4", 2, "--windows goes with --score FILE");
    check_fails("m.safetensors --score text --mix cm --windows 8:4", 2,
                "--windows is for the network alone");
    check_fails("m.safetensors --latents z9 text --windows 8:4", 2, "--windows goes with --score");
#ifndef __SANITIZE_ADDRESS__
    check(shell("ulimit -v 2000000; $S m.safetensors --score text --windows 16777216:16777216 "
                "2>err") == 1 && shell("grep -q 'windows of .* GB' err") == 0,
          "windows beyond the memory are refused");
#endif
}

static void test_latents(void) {
    check(sample("m.safetensors --latents z.npy long") == 0, "--latents of a file");
    size_t n, k;
    uint8_t *npy = read_file(in_folder("z.npy"), &n), *bytes = read_file(in_folder("long"), &k);
    static const char want[] = "\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, "
                               "'shape': (110000, 20), }";
    need(npy != NULL && bytes != NULL, "the latents");
    check(n == 128 + (size_t)LONG_FILE * 80 && memcmp(npy, want, sizeof want - 1) == 0 &&
              npy[127] == '\n', "is an array that numpy reads");
    Stream s;
    Model m;
    Error e;
    if (checkpoint_load_model(&m, in_folder("m.safetensors"), cpu, 1, 1, &e) ||
        stream_open(&s, &use, m.params, 1, &e))
        need(false, e.text);
    real z[20], logits[V];
    size_t wrong = 0;
    for (size_t i = 0; i < LONG_FILE; i++) {
        int id = bytes[i];
        stream_push(&s, &id, z, logits);
        wrong += !same_bits(z, (real *)(void *)(npy + 128) + i * 20, 20);
    }
    check(wrong == 0, "and every one of its rows is that of a single stream, bit for bit");
    stream_free(&s);
    model_free(&m);
    free(npy);
    free(bytes);
    check_fails("m.safetensors --latents z.npy two", 1, "--force");
    check(sample("m.safetensors --latents z.npy two --force") == 0 &&
              file_size("z.npy") == 128 + 2 * 80, "--force overwrites");
    check(sample("m.safetensors --latents z.npy empty --force") == 0 && file_size("z.npy") == 128,
          "an empty file has no rows");
}

// Every way to predict: what comes after ./sample's --compress, and after its --decompress.
static const struct {
    const char *model, *with, *prime;
} ways[] = {{"m.safetensors", "--mix none", ""}, {"m.safetensors", "--mix ngram", ""},
            {"m.safetensors", "", "--prime two"}, {"", "", "--prime binary"},
            {"", "--mix ngram --blocks 2", ""}, {"m.safetensors", "--blocks 3", ""}};

static void test_compress(void) {
    static const char *const files[] = {"empty", "one", "two", "field", "binary", "ones", "text"};
    char arguments[300];
    for (int i = 0; i < 7 * 6; i++) {
        const char *model = ways[i % 6].model, *prime = ways[i % 6].prime, *file = files[i / 6];
        snprintf(arguments, sizeof arguments, "%s --compress %s z --force %s %s", model, file,
                 ways[i % 6].with, prime);
        int made = sample(arguments);
        rename(in_folder("z"), in_folder("z1"));
        strcat(arguments, " --threads 3");
        made += sample(arguments);
        bool same = same_files("z", "z1");
        snprintf(arguments, sizeof arguments, "%s --decompress z back --force --threads 2 %s",
                 model, prime);
        check(made == 0 && same && sample(arguments) == 0 && same_files("back", file),
              "'%s' compresses, whatever the threads, and comes back byte for byte: %s %s %s", file,
              model, ways[i % 6].with, prime);
    }
    for (int i = 0; i < 4; i++) {
        static const char *const how[] = {"m.safetensors --mix none", "--mix cm",
                                          "m.safetensors --mix ngram", "m.safetensors --mix cm"};
        snprintf(arguments, sizeof arguments, "%s --compress long z --force", how[i]);
        check(sample(arguments) == 0, "a long file compresses");
        double bits = 8 * (double)file_size("z") / LONG_FILE;
        snprintf(arguments, sizeof arguments, "%s --score long", how[i]);
        size_t n;
        char *line = sample(arguments) == 0 ? (char *)read_file(in_folder("out"), &n) : NULL;
        double score = line ? strtod(line, NULL) / log(2) : NAN;
        free(line);
        check_error(fabs(bits - score) / score, 1e-3, "to its score, %.4f bits/byte: %s", score,
                    how[i]);
    }
    check(sample("sure.safetensors --compress binary z --force --mix none") == 0 &&
              sample("sure.safetensors --decompress z back --force") == 0 &&
              same_files("back", "binary"),
          "what a model holds for impossible comes back, too (%.1f bits/byte)",
          8 * (double)file_size("z") / 3000);
    check(shell("$S --compress - - <text 2>err >z && $S --decompress - - <z 2>err | cmp - text") ==
              0,
          "from standard input to standard output");
    check_fails("m.safetensors --compress text z", 1, "--force");
    check_fails("m.safetensors --compress . z --force", 1, "directory");
    check_fails("--compress missing z --force", 1, "No such file");
    check_fails("--compress text z --force --prime missing", 1, "No such file");
    check_fails("--compress text z --force --prime .", 1, "directory");
}

// What an archive wants, and whoever has tampered with it.
static void test_archives(void) {
    sample("m.safetensors --compress binary z --force --prime text");
    check_fails("other.safetensors --decompress z new --prime text", 1, "another model");
    check_fails("m.safetensors --decompress z new --prime ones", 1, "another priming text");
    // Within a second of computing, where the counts would need ten to read them.
    int status = shell("head -c 4000000 /dev/zero >zeros; ulimit -t 1;"
                       "$S m.safetensors --decompress z new --prime zeros 2>err");
    check(status == 1 && shell("grep -q 'another priming text' err") == 0,
          "which the counts do not read");
    remove(in_folder("zeros"));
    check_fails("m.safetensors --decompress z new", 1, "with a priming text (");
    check_fails("--decompress z new --prime text", 1, "with a model (");
    sample("--compress binary z --force");
    check_fails("m.safetensors --decompress z new", 1, "without a model");
    check_fails("--decompress z new --prime text", 1, "without a priming text");
    check_fails("--decompress text new", 1, "not made by sample");
    check_fails("--decompress empty new", 1, "not made by sample");
    check_fails("--decompress . new", 1, "directory");
    check(shell("printf FZT1 >old; head -c 60 binary >>old") == 0, "an archive of version 1");
    check_fails("--decompress old new", 1, "earlier version");
    size_t n;
    uint8_t *file = read_file(in_folder("z"), &n);
    need(file != NULL && n > 200, "a compressed text");
    int refusals = 0, tries = 0;
    for (size_t at = 0, step; at < n; at += step) {  // the ends, and some between
        step = at < 48 || at + 24 >= n ? 1 : at + n / 9 + 24 < n ? n / 9 : n - 24 - at;
        file[at] ^= 0x10;
        write_bytes(in_folder("bad"), file, n);
        refusals += sample("--decompress bad new --force") == 1;
        tries++;
        file[at] ^= 0x10;
    }
    for (size_t cut = 0; cut < n; cut += n / 8, tries++) {
        write_bytes(in_folder("bad"), file, cut);
        refusals += sample("--decompress bad new --force") == 1;
    }
    file = realloc(file, n + 1);
    need(file != NULL, "out of memory");
    file[n] = 0;
    write_bytes(in_folder("bad"), file, n + 1);
    refusals += sample("--decompress bad new --force") == 1;
    check(refusals == tries + 1, "of %d damaged, cut or longer files, %d are refused", tries + 1,
          refusals);
    file[n - 1] ^= 1;
    write_bytes(in_folder("bad"), file, n);
    check_fails("--decompress bad new", 1, "checksum of the content");
    check(file_size("new") < 0 && entries("new") == 0, "and nothing is left of them");
    free(file);
}

// Scoring and writing with counts.
static void test_mix(void) {
    size_t n;
    check(sample("m.safetensors --score text --mix cm --prime two") == 0, "--score --mix cm");
    char *line = (char *)read_file(in_folder("out"), &n);
    double both = 0, network = 0, counts = 0;
    int got = sscanf(line, "%lf nats/byte %*f bits/byte perplexity %*f %*d bytes\n%lf with the "
                     "network alone, %lf with --mix cm alone", &both, &network, &counts);
    check(got == 3, "says what the network and the counts would pay alone");
    double want = printed_score("text");
    check_error(fabs(network - want) / want, 1e-4, "the network as without --mix");
    free(line);
    sample("--score text --mix cm --prime two");
    line = (char *)read_file(in_folder("out"), &n);
    check_error(fabs(strtod(line, NULL) - counts) / counts, 1e-5, "and the counts as without it");
    free(line);
    check(both < network && both < 0.5, "a text that repeats itself costs less with counts (%.3f)",
          both);
    sample("m.safetensors --score text --mix cm --heat");
    line = (char *)read_file(in_folder("out"), &n);
    double sum[2] = {0}, bits, alone;
    char *row = line;
    int rows = 0;
    while ((row = strchr(row, '\n')) && sscanf(++row, "%*d\t%*d\t%lf\t%lf", &bits, &alone) == 2)
        sum[0] += bits, sum[1] += alone, rows++;
    check(rows == 2000, "--heat has both for every byte");
    check_error(fabs(sum[1] * log(2) / 2000 - network) / network, 1e-4, "the network's");
    check(sum[0] * log(2) / 2000 < 0.6, "and the mixture's");
    free(line);
    check(sample("m.safetensors --score text --mix cm --heat page.html --force") == 0 &&
              shell("grep -q 'class=\"b0 u\"' page.html") == 0, "where counts help is underlined");
    check(sample("--mix cm --prime text --bytes 48 --temperature 0 --prompt 'the cat'") == 0 &&
              shell("grep -q '^the cat sat on the mat. the cat' out") == 0,
          "counts alone write what they have read");
    check(sample("m.safetensors --mix cm --bytes 60 --seed 3 --prompt ab --stop zzz") == 0 &&
              file_size("out") == 62, "and a network with counts writes, too");
    rename(in_folder("out"), in_folder("first"));
    sample("m.safetensors --mix cm --bytes 60 --seed 3 --prompt ab --threads 3");
    check(same_files("out", "first"), "the same seed the same text");
}

static void test_usage(void) {
    check_fails("", 2, "no model");
    check_fails("m.safetensors --unknown", 2, "--unknown");
    check_fails("m.safetensors --bytes -1", 2, "--bytes");
    check_fails("m.safetensors --bytes 1x", 2, "--bytes");
    check_fails("m.safetensors --temperature nan", 2, "--temperature");
    check_fails("m.safetensors --top-p 1.5", 2, "--top-p");
    check_fails("m.safetensors --streams 0", 2, "--streams");
    check_fails("m.safetensors --seed ' -3'", 2, "--seed");
    check_fails("m.safetensors --seed +3", 2, "--seed");
    check_fails("m.safetensors --seed ''", 2, "--seed");
    check_fails("m.safetensors --bytes ' 3'", 2, "--bytes");
    check_fails("m.safetensors --bytes '3 '", 2, "--bytes");
    check_fails("m.safetensors --temperature '\t1'", 2, "--temperature");
    check_fails("m.safetensors --temperature 1e999", 2, "--temperature");
    check_fails("m.safetensors --temperature -1e999", 2, "--temperature");
    static const char *const others[] = {"--prompt a", "--prompt-file one", "--bytes 5",
                                         "--stop x", "--seed 4", "--streams 2"},
                      *const modes[] = {"--score text", "--info", "--compress text z9",
                                        "--decompress text z9", "--latents z9 text"};
    char arguments[200];
    for (int i = 0; i < 30; i++) {
        snprintf(arguments, sizeof arguments, "m.safetensors %s %s", others[i % 6], modes[i / 6]);
        check_fails(arguments, 2, "is for writing text, which --");
    }
    check_fails("--mix cm --streams 2", 2, "--streams");
    check_fails("m.safetensors --decompress z z9 --mix cm", 2, "the archive says it");
    check_fails("m.safetensors --info --mix cm", 2, "--mix is not for --info");
    check_fails("m.safetensors --score text --prime two", 2, "--prime is for counts");
    check_fails("m.safetensors --prime two", 2, "--prime is for counts");
    check_fails("m.safetensors --compress text z9 --mix none --prime two", 2, "--prime is for");
    check_fails("--compress text z9 --mix none", 2, "with a model");
    check_fails("m.safetensors --score text --blocks 2", 2, "--blocks goes with");
    check_fails("--score text", 2, "no model");
    check_fails("--compress text text2 --force --prime text2", 1, "No such file");
    check_fails("--compress - z9 --prime -", 2, "both standard input");
    check_fails("m.safetensors --score - --mix cm --prime -", 2, "both standard input");
    check_fails("--mix cm --prompt-file - --prime -", 2, "both standard input");
    check_fails("m.safetensors --promt a", 2, "did you mean --prompt?");
    check_fails("m.safetensors --tempreature 1", 2, "did you mean --temperature?");
    check_fails("m.safetensors --fork", 2, "--fork; see");
    check_fails("m.safetensors --top-q 1", 2, "--top-q; see");
    check_fails("m.safetensors --heat page.html", 2, "--score");
    check_fails("m.safetensors --html page.html --score text", 2, "unknown option --html");
    check_fails("m.safetensors --info --compress text z", 2, "choose one");
    check_fails("m.safetensors --streams 2 --bytes 0", 2, "--bytes");
    check_fails("m.safetensors --compress", 2, "IN OUT");
    check_fails("m.safetensors --latents x.npy", 2, "FILE");
    check_fails("m.safetensors text", 2, "too many");
    check_fails("m.safetensors --heat", 2, "--score");
    check_fails("m.safetensors --prompt a --prompt-file text", 2, "--prompt");
    check_fails("m.safetensors --score text --compress text z", 2, "choose one");
    check_fails("missing.safetensors", 1, "No such file");
    check_fails(".", 1, "./model.safetensors: No such file");
    check_fails("text", 1, "not a safetensors file");
    check_fails("state.safetensors", 1, "model.safetensors");
    check_fails("m.safetensors --prompt-file missing", 1, "No such file");
    check_fails("m.safetensors --compress text no/folder/z", 1, "No such file");
    check(sample("--help") == 0 && file_size("out") > 500 && file_size("err") == 0, "--help");
}

// --kernels on a GPU without tensor cores: which backend, and what goes to stderr.
static void test_old_gpu(void) {
    static const struct {
        const char *kernels, *name, *said;
    } cases[] = {
        {NULL, "tiled", "--kernels tiled: this GPU has no tensor cores for bf16\n"},
        {"tiled", "tiled", ""},
        {"naive", "naive", ""},
    };
    const Backend *b;
    Error e = {""};
    for (int i = 0; i < 3; i++) {
        size_t n;
        int kept = dup(2), to = open(in_folder("err"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        need(kept >= 0 && to >= 0 && dup2(to, 2) == 2, "a file for stderr");
        bool chosen = choose_backend(&b, "auto", cases[i].kernels, &e) == 0;
        need(dup2(kept, 2) == 2 && close(kept) == 0 && close(to) == 0, "stderr again");
        char *said = (char *)read_file(in_folder("err"), &n);
        check(chosen && strcmp(b->name, cases[i].name) == 0 && n == strlen(cases[i].said) &&
                  memcmp(said, cases[i].said, n) == 0, "a GPU without bf16 takes %s and says: %.*s",
              cases[i].name, n ? (int)n - 1 : 0, said);
        free(said);
    }
    check(choose_backend(&b, "auto", "tensor", &e) == -1 &&
              strstr(e.text, "no kernels named 'tensor', expected one of: plain cpu naive tiled") ==
                  e.text, "asked for tensor: %s", e.text);
}

int main(void) {
    char here[1000];
    const char *other = getenv("SAMPLE");
    make_folder();
    need(getcwd(here, sizeof here) != NULL, "the name of this folder");
    snprintf(program, sizeof program, "%s%s", other ? "" : here, other ? other : "/sample");
    need(access(program, X_OK) == 0, "./sample is built here");
    make_files();
    test_generate();
    test_stop();
    test_score();
    test_windows();
    test_page();
    test_latents();
    test_compress();
    test_archives();
    test_mix();
    test_info();
    test_controls();
    test_standard_output();
    test_outputs();
    test_memory();
    test_usage();
    test_old_gpu();
    return remove_folder_and_finish();
}
