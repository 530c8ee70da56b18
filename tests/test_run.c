// test_run.c: what a training run leaves on disk and how it goes on: the folder and its lock, model
// and state and what is refused of them, names of any bytes, the log; and the scoring of texts,
// which decides what is kept. How ./train behaves as a program is test_train.sh's business.
//   ./test_run        works in a temporary folder that it removes
#define _XOPEN_SOURCE 700
#include "tests/test.h"

#include <ftw.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "support/output.h"
#include "support/progress.h"
#include "support/run.h"
#include "support/texts.h"

static const Config config = {.channels = 5, .latent = 5, .activation = ACT_gelu, .tie = true,
                              .units = "conv:2:1 conv:2:4"};  // reaches 5 back
enum { TEXT = 1000, FIELD = 6 };
static uint8_t text[TEXT];

// ---- Scoring ------------------------------------------------------------------------------------

// Every byte's cost, by one window over the whole text.
static void reference(double cost[TEXT]) {
    static int ids[TEXT], targets[TEXT];
    static real losses[TEXT];
    Model m;
    open_or_die(&m, &cpu_backend, &config, 1, TEXT, NULL);
    fill_params(&m, 3);
    for (int i = 0; i < TEXT; i++) ids[i] = text[i], targets[i] = i + 1 < TEXT ? text[i + 1] : -1;
    model_losses(&m, ids, targets, losses);
    cost[0] = log(V);
    for (int i = 1; i < TEXT; i++) cost[i] = (double)losses[i - 1];
    model_free(&m);
}

static double sum_of(const double *cost, size_t from, size_t n) {
    double sum = 0;
    for (size_t i = from; i < from + n; i++) sum += cost[i];
    return sum;
}

static size_t asked;
static bool stop_at_second(size_t scored) { return ++asked == 2 && scored > 0; }

static void test_scoring(void) {
    static double cost[TEXT];
    Model m;
    Error e;
    double nats;
    reference(cost);
    open_or_die(&m, &cpu_backend, &config, 3, 20, NULL);
    fill_params(&m, 3);
    // Windows of 20 that score 15 bytes, three to a pass.
    for (size_t from = 0; from < 3; from++) {
        double want = sum_of(cost, from, TEXT - from);
        need(model_score(&m, text, TEXT, from, &nats, NULL, &e) == 0, e.text);
        check_error(fabs(nats - want) / want, 1e-6, "a text from byte %zu costs what one window "
                                                    "over it says", from);
    }
    size_t scored = 0;
    nats = 0;
    // 200 of 900 bytes: passes of 45, so five spans of 40, 180 apart.
    need(model_score_part(&m, text, TEXT, 100, 200, &nats, &scored, NULL, &e) == 0, e.text);
    double want = 0;
    for (size_t k = 0; k < 5; k++) want += sum_of(cost, 100 + 180 * k, 40);
    check(scored == 200, "a part of a text: as many bytes as were asked for");
    check_error(fabs(nats - want) / want, 1e-6, "and they are spread evenly over it");
    scored = 0, nats = 0;
    need(model_score_part(&m, text, TEXT, 100, 900, &nats, &scored, NULL, &e) == 0, e.text);
    want = sum_of(cost, 100, 900);
    check(scored == 900 && fabs(nats - want) / want <= 1e-6, "a part can be the whole");
    scored = 0, nats = 0;
    check(model_score_part(&m, text, TEXT, 100, 0, &nats, &scored, NULL, &e) == 0 && scored == 0 &&
              nats == 0, "a part of no byte costs nothing");
    need(model_score_part(&m, text, TEXT, 0, 40, &nats, &scored, NULL, &e) == 0, e.text);
    want = sum_of(cost, 1, 40);
    check(scored == 40 && fabs(nats - want) / want <= 1e-6, "a part leaves out byte 0");
    check(model_score(&m, text, TEXT, 0, &nats, stop_at_second, &e) == 1 && asked == 2,
          "scoring stops between two passes when it is told");
    model_free(&m);
}

// ---- A run --------------------------------------------------------------------------------------

static int64_t steps = 9;
static double lr = 0.5;
static const char *val;
static Option table[] = {
    INT("steps", SAVED, &steps, 1, 1e9, "N", ""),
    NUMBER("lr", SAVED, &lr, 0, 1, "X", ""),
    TEXT("val", SAVED, &val, "FILE", ""),
};
static const char *names[3];

// A run of a few steps in the folder "run", to be saved.
static void begin(Run *r) {
    Training training = {.passes = 1, .hyper = {.steps = 9, .lr = 1e-2, .beta1 = 0.9,
                                                .beta2 = 0.99, .eps = 1e-8}};
    *r = (Run){.cli = {"test", "", "", table, 3, names, 2}, .config = config,
               .backend = &cpu_backend, .text = 7, .training_bytes = 900, .held_out_bytes = 100,
               .trained_on = "a, b", .step = 4, .evaluated = 3, .best = 2.5, .best_step = 2};
    snprintf(r->folder, sizeof r->folder, "run");
    open_or_die(&r->model, &cpu_backend, &config, 1, 4, &training);
    fill_params(&r->model, 3);
    r->host = new_reals(4 * r->model.n_params);
    r->best_params = new_random(r->model.n_params, 8, 0, 1);
    r->best_unsaved = true;
}

static void end(Run *r) {
    model_free(&r->model);
    free(r->host);
    free(r->best_params);
    if (r->lock > 0) close(r->lock);
}

// Opens the folder "run" as --resume does; -1 with the reason.
static int resume(Run *r, Error *e) {
    Checkpoint state;
    begin(r);
    r->step = r->evaluated = r->best_step = -1;
    int status = run_open_state(r, "run", &state, e);
    if (status == 0) status = run_load(r, &state, e);
    checkpoint_close(&state);
    return status;
}

static void test_saving(void) {
    Run r, again;
    Error e;
    // Any bytes but NUL, and what looks like an escape.
    names[0] = "new\nline \\x41 \xff\xc3\xa4";
    names[1] = "b";
    val = "tab\t\x80";
    lr = 0.1234567;
    begin(&r);
    need(run_take_folder(&r, "run///", &e) == 0, e.text);
    check(strcmp(r.folder, "run") == 0, "slashes at a folder's end are no part of its name");
    need(run_identify(&r, 0, &e) == 0 && run_save(&r, &e) == 0, e.text);
    check(!r.best_unsaved && r.saved_step == 4, "a run is saved");
    close(r.lock);
    const char *given[] = {names[0], names[1], val};
    val = NULL, lr = 0.5, names[0] = names[1] = NULL;
    begin(&again);
    again.cli.n_files = 0, again.cli.files = NULL;
    Checkpoint state;
    need(run_open_state(&again, "run", &state, &e) == 0, e.text);
    check(lr == 0.1234567 && val && strcmp(val, given[2]) == 0, "its options come back");
    check(again.cli.n_files == 2 && strcmp(again.cli.files[0], given[0]) == 0 &&
              strcmp(again.cli.files[1], given[1]) == 0, "and names of any bytes");
    need(run_load(&again, &state, &e) == 0, e.text);
    check(again.step == 4 && again.evaluated == 3 && again.best == 2.5 && again.best_step == 2 &&
              strcmp(again.id, r.id) == 0, "step, evaluation, best and id come back");
    check(same_bits(again.best_params, r.best_params, r.model.n_params), "and the best parameters");
    check(same_bits(again.model.params, r.model.params, r.model.n_params), "and the last ones");
    checkpoint_close(&state);
    close(again.lock);
    // What came back are copies that a program keeps to its end.
    free((char *)val);
    free((char *)again.cli.files[0]);
    free(again.cli.files);
    val = given[2];
    names[0] = "a", names[1] = "b";

    // Ids: what makes another computation makes another id.
    char before[17];
    memcpy(before, r.id, sizeof before);
    steps = 20;
    need(run_identify(&r, 0, &e) == 0, e.text);
    check(strcmp(before, r.id) != 0, "other steps: another id");
    steps = 9;
    need(run_identify(&r, 5, &e) == 0, e.text);
    check(strcmp(before, r.id) != 0, "other parameters at the start: another id");
    lr = 0.25;
    need(run_identify(&r, 0, &e) == 0, e.text);
    check(strcmp(before, r.id) != 0, "another option: another id");
    lr = 0.1234567;
    r.text++;
    need(run_identify(&r, 0, &e) == 0, e.text);
    check(strcmp(before, r.id) != 0, "another text: another id");
    steps = 9, val = NULL, lr = 0.5;
    static char long_name[70000];
    memset(long_name, 'a', sizeof long_name - 1);
    names[0] = long_name;
    check(run_identify(&r, 0, &e) < 0 && strstr(e.text, "65536 bytes"),
          "names that metadata cannot hold are refused: %s", e.text);
    names[0] = "a";
    end(&r);
    r.lock = 0;
    end(&again);
}

// What the state's metadata says under a key, with a sound checksum; the rest as it should be.
static void write_state(Run *r, const char *key, const char *value) {
    Pair pairs[] = {{"run", r->id}, {"step", "4"}, {"evaluated", "3"}, {"best", "0x1.4p+1"},
                    {"best_step", "2"}, {"text", "0000000000000007"}, {"files", "a\n"},
                    {"option.steps", "9"}, {"option.lr", "0.5"}, {"option.val", ""}};
    Role roles[3];
    const char *role_names[] = {"params", "m", "v"};
    Error e;
    int n = sizeof pairs / sizeof *pairs;
    for (int i = 0; i < n; i++)
        if (strcmp(pairs[i].key, key) == 0) pairs[i].value = value;
    for (int i = 0; i < 3; i++) roles[i] = (Role){role_names[i], r->best_params};
    if (checkpoint_save("run/state.safetensors", &r->model, roles, 3, pairs, n, &e))
        need(false, e.text);
}

static void test_strictness(void) {
    Run r, again;
    Error e;
    begin(&r);
    need(run_take_folder(&r, "run", &e) == 0, e.text);
    need(run_identify(&r, 0, &e) == 0 && run_save(&r, &e) == 0, e.text);
    close(r.lock);
    r.lock = 0;
    write_state(&r, "", "");
    int status = resume(&again, &e);
    check(status == 0, "a state that is sound is taken");
    end(&again);
    steps = 20, table[0].given = true;
    status = resume(&again, &e);
    check(status == 0 && steps == 20 && strcmp(again.id, r.id) == 0,
          "with other steps, too, and they keep the id");
    end(&again);
    steps = 9, table[0].given = false;
    const struct { const char *key, *value, *says; } wrong[] = {
        {"best", "nan", "best is 'nan'"}, {"best", "", "best is ''"}, {"best", "inf", "a loss"},
        {"best", "-0x1p+0", "best"}, {"best", "0x1.4p+1 ", "best"}, {"best", "2.5", "best"},
        {"step", "", "step is ''"}, {"step", "4x", "step"}, {"step", " 4", "step"},
        {"step", "-1", "step"}, {"step", "4294967296", "step"},
        {"step", "99999999999999999999", "step"},
        {"evaluated", "5", "evaluated is '5'.*"}, {"best_step", "5", "best_step is '5'"},
        {"best_step", "0", "expected inf"}, {"run", "", "names no run"},
        {"run", "0123456789abcdef", "of another run"}, {"text", "8", "another text"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char says[64];
        snprintf(says, sizeof says, "%.*s", (int)strcspn(wrong[i].says, "."), wrong[i].says);
        write_state(&r, wrong[i].key, wrong[i].value);
        status = resume(&again, &e);
        check(status < 0 && strstr(e.text, says), "a state whose %s is '%s' is refused: %s",
              wrong[i].key, wrong[i].value, status ? e.text : "");
        end(&again);
    }
    // One that has been edited: without checksum nothing says that it is as it was saved.
    static char bytes[1 << 16];
    write_state(&r, "", "");
    FILE *f = fopen("run/state.safetensors", "r+");
    need(f && fread(bytes, 1, sizeof bytes - 1, f) > 400, "a state");
    char *word = strstr(bytes + 8, "checksum");
    need(word && fseek(f, word - bytes, SEEK_SET) == 0 && fputs("checksun", f) >= 0, "a checksum");
    fclose(f);
    status = resume(&again, &e);
    check(status < 0 && strstr(e.text, "without checksum"), "a state without checksum is refused");
    end(&again);
    // A model of an earlier step than the best that the state speaks of.
    write_state(&r, "", "");
    r.best_step = 1;
    need(run_save_model(&r, &e) == 0, e.text);
    status = resume(&again, &e);
    check(status < 0 && strstr(e.text, "step is '1'"), "and a model from before the best");
    end(&again);
    end(&r);
}

static void put(const char *path, const char *content) {
    FILE *f = fopen(path, "w");
    need(f != NULL, path);
    fputs(content, f);
    fclose(f);
}

static bool holds(const char *path, const char *content) {
    static char bytes[4096];
    FILE *f = fopen(path, "r");
    if (!f) return false;
    bytes[fread(bytes, 1, sizeof bytes - 1, f)] = 0;
    fclose(f);
    return strcmp(bytes, content) == 0;
}

// ---- The lock -----------------------------------------------------------------------------------

// Whether another process can take the folder.
static bool another_can(const char *name) {
    fflush(stdout);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        Run r = {0};
        Error e;
        _exit(run_take_folder(&r, name, &e) == 0 ? 0 : strstr(e.text, "trains in") ? 1 : 2);
    }
    int status;
    waitpid(child, &status, 0);
    need(WIFEXITED(status) && WEXITSTATUS(status) < 2, "a child that takes the folder or may not");
    return WEXITSTATUS(status) == 0;
}

static void test_lock(void) {
    Run r = {0}, s = {0};
    Error e;
    char want[32];
    struct stat st;
    snprintf(want, sizeof want, "process %ld since 2", (long)getpid());
    need(run_take_folder(&r, "run", &e) == 0, e.text);
    check(stat("run.1", &st) == 0 && stat("run.2", &st) == 0, "the runs of before are moved aside");
    check(run_take_folder(&s, "run/", &e) < 0 && strstr(e.text, want),
          "a folder that is trained in is refused: %s", e.text);
    check(!another_can("run"), "to another process, too");
    FILE *f = fopen("run/model.safetensors", "w");
    need(f != NULL, "a file");
    fclose(f);
    check(!another_can("run") && stat("run.3", &st) != 0, "and it is not moved aside");
    close(r.lock);
    check(another_can("run") && stat("run.3", &st) == 0, "until the lock is given up");
    check(symlink("run", "link") == 0 && run_take_folder(&r, "link", &e) == 0 &&
              lstat("link", &st) == 0 && S_ISLNK(st.st_mode) && strstr(r.folder, "/run"),
          "a link stays, and its folder is taken: %s", r.folder);
    close(r.lock);
    check(symlink("nowhere", "broken") == 0 && run_take_folder(&r, "broken", &e) < 0 &&
              strstr(e.text, "leads nowhere"), "one that leads nowhere is refused");
    f = fopen("run/model.safetensors", "w");
    need(f != NULL && chdir("run") == 0, "a file");
    fclose(f);
    check(run_take_folder(&r, ".", &e) < 0 && strstr(e.text, "the current folder") &&
              stat("model.safetensors", &st) == 0, "the current folder is not moved: %s", e.text);
    check(run_take_folder(&r, "../run", &e) < 0 && stat("model.safetensors", &st) == 0,
          "by whatever name");
    need(chdir("..") == 0, "chdir");
    static char deep[5000];
    memset(deep, 'a', sizeof deep - 1);
    check(run_take_folder(&r, deep, &e) < 0 && strstr(e.text, "4999 bytes"), "nor a long name cut");
}

// What lies in a folder that is taken and is no run's.
static void test_foreign_files(void) {
    Run r = {0};
    Error e;
    struct stat st;
    char says[64];
    need(mkdir("U", 0777) == 0 && mkdir("W", 0777) == 0, "mkdir");
    put("U/log.tsv", "precious");
    need(run_take_folder(&r, "U", &e) == 0, e.text);
    check(holds("U.1/log.tsv", "precious"), "a log.tsv is moved aside, whoever wrote it");
    close(r.lock);
    put("victim", "process of law");
    need(symlink("../victim", "W/.lock") == 0, "a link");
    check(run_take_folder(&r, "W", &e) < 0 && strstr(e.text, "W/.lock is no trainer's lock") &&
              holds("victim", "process of law"), "a lock that is a link is refused: %s", e.text);
    need(unlink("W/.lock") == 0, "unlink");
    put("W/.lock", "precious words");
    check(run_take_folder(&r, "W", &e) < 0 && strstr(e.text, "no trainer's lock") &&
              holds("W/.lock", "precious words"), "and a file of other words");
    need(unlink("W/.lock") == 0 && mkfifo("W/.lock", 0666) == 0, "a pipe");
    check(run_take_folder(&r, "W", &e) < 0 && strstr(e.text, "no trainer's lock"), "and a pipe");
    need(unlink("W/.lock") == 0 && mkdir("W/.lock", 0777) == 0, "a folder");
    check(run_take_folder(&r, "W", &e) < 0 && strstr(e.text, "no trainer's lock"), "and a folder");
    need(rmdir("W/.lock") == 0, "rmdir");
    if (stat("/proc/1", &st) == 0)
        check(run_take_folder(&r, "/proc/1", &e) < 0 && strstr(e.text, "cannot write into /proc/1"),
              "a folder that takes no file is not one that others move: %s", e.text);
    else
        skip("a folder that takes no file: no /proc here");
    // Each in turn lies in a folder that holds a run: text, --val, --init.
    static const char *init;
    Option inputs[] = {TEXT("val", SAVED, &val, "FILE", ""), TEXT("init", 0, &init, "MODEL", "")};
    const char *files[] = {"victim", "W/../W/t.txt"};
    put("W/t.txt", "precious");
    put("W/log.tsv", "");
    for (int i = 0; i < 3; i++) {
        r.cli = (Cli){"test", "", "", inputs, 2, files, i == 0 ? 2 : 1};
        val = i == 1 ? "W/t.txt" : NULL;
        init = i == 2 ? "./W" : NULL;
        snprintf(says, sizeof says, "because %s lies there",
                 i == 0 ? files[1] : i == 1 ? val : init);
        check(run_take_folder(&r, "W", &e) < 0 && strstr(e.text, says) &&
                  holds("W/t.txt", "precious"),
              "a folder is not moved with what this run reads: %s", e.text);
        close(r.lock);
    }
    init = NULL;
    // What was left by trainers that were killed, and what only looks like it.
    static const char *const left[] = {"W/model.safetensors.17-0.tmp", "W/log.tsv.17-12.tmp",
                                       "W/state.safetensors.4194304-1.tmp"};
    static const char *const others[] = {
        "W/model.safetensors.tmp", "W/log.tsv.17-0.tmp2", "W/log.tsv.-0.tmp", "W/log.tsv.17-.tmp",
        "W/log.tsv.17.tmp", "W/log.tsv17-0.tmp", "W/my.log.tsv.17-0.tmp", "W/t.txt.17-0.tmp",
        "W/log.tsv.1a-0.tmp"};
    for (size_t i = 0; i < 3; i++) put(left[i], "");
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) put(others[i], "");
    need(unlink("W/log.tsv") == 0 && run_take_folder(&r, "W", &e) == 0, "a folder");
    int n = 0;
    for (size_t i = 0; i < 3; i++) n += stat(left[i], &st) != 0;
    check(n == 3, "what killed trainers left is removed: %d of 3", n);
    n = 0;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) n += stat(others[i], &st) == 0;
    check(n == sizeof others / sizeof *others, "and nothing else: %d stay", n);
    close(r.lock);
}

// ---- Outputs ------------------------------------------------------------------------------------

static void test_outputs(void) {
    char name[256];
    Output out;
    Error e;
    struct stat st;
    put("private", "old");
    need(chmod("private", 0600) == 0, "chmod");
    mode_t mask = umask(022);
    need(output_open(&out, "private", true, &e) == 0 && fputs("new", out.file) >= 0 &&
             output_commit(&out, &e) == 0, e.text);
    umask(mask);
    check(holds("private", "new") && stat("private", &st) == 0 && (st.st_mode & 07777) == 0600,
          "a file that is replaced keeps its mode");
    // 255 bytes, in characters of three bytes.
    for (int i = 0; i < 255; i++) name[i] = "\xe2\x82\xac"[i % 3];
    name[255] = 0;
    bool opened = output_open(&out, name, false, &e) == 0;
    check(opened, "the longest name can be written");
    const char *end = opened ? strstr(out.temporary, "\xe2\x82\xac.") : "";
    check(end && opened && output_commit(&out, &e) == 0 && stat(name, &st) == 0,
          "and its temporary name is cut between two characters");
}

// ---- The log ------------------------------------------------------------------------------------

static void test_log(void) {
    Run r = {.step = 12, .folder = "log"};
    Error e;
    need(mkdir("log", 0777) == 0, "mkdir");
    const char head[] = "# note\nstep\ttrain_loss\theld_out_loss\tgradient_norm\tlearning_rate\n"
                        "11\t1\tnan\t1\t1\n12\t2\tnan\t1\t1\n12\tnan\t2\tnan\tnan\n";
    char before[512], after[512];
    snprintf(before, sizeof before, "%s13\t3\tnan\t1\t1\n12\t3\tnan\t1\t1", head);
    put("log/log.tsv", before);
    need(run_open_log(&r, true, &e) == 0, e.text);
    run_log(&r, "13\t%d\tnan\t1\t1\n", 4);
    run_flush_log(&r);
    snprintf(after, sizeof after, "%s# resumed at step 12\n13\t4\tnan\t1\t1\n", head);
    check(holds("log/log.tsv", after), "a log goes on after its last whole row of the past");
    fclose(r.log);
    // What is no row, among it a line with a NUL, between the same lines.
    FILE *f = fopen("log/log.tsv", "w");
    need(f != NULL, "a log");
    fputs(head, f);
    static const char junk[] = "junk\n12\n\nsteps\n12\t1\t2\t3\n12\t1\t2\t3\t4\t5\n-1\t1\t2\t3\t4\n"
                               "\t1\t2\t3\t4\n12x\t1\t2\t3\t4\n12\t1\t2\t3\t4\0\n\0\0\n";
    fwrite(junk, 1, sizeof junk - 1, f);
    fclose(f);
    need(run_open_log(&r, true, &e) == 0, e.text);
    run_flush_log(&r);
    snprintf(after, sizeof after, "%s# resumed at step 12\n", head);
    check(holds("log/log.tsv", after), "and without what is no row");
    FILE *disk = r.log, *full = fopen("/dev/full", "w");
    if (full) {
        r.log = full;
        run_log(&r, "14\t5\n");
        run_flush_log(&r);
        check(r.log == NULL, "a log that cannot be written ends");
        run_log(&r, "15\t6\n");
        run_flush_log(&r);
    } else {
        skip("a full disk: no /dev/full here");
    }
    fclose(disk);
    // A pipe is refused before it is waited for, and only a log that is not there begins anew.
    need(unlink("log/log.tsv") == 0 && mkfifo("log/log.tsv", 0666) == 0, "a pipe");
    alarm(20);
    check(run_open_log(&r, true, &e) < 0 && strstr(e.text, "a pipe"), "a log that is a pipe");
    alarm(0);
    need(unlink("log/log.tsv") == 0, "unlink");
    put("log/log.tsv", "mine");
    // One more open file is allowed: the new log. The old one cannot be opened.
    struct rlimit limit;
    int last = dup(0);
    need(last > 0 && close(last) == 0 && getrlimit(RLIMIT_NOFILE, &limit) == 0, "the limit");
    rlim_t usual = limit.rlim_cur;
    limit.rlim_cur = (rlim_t)last + 1;
    need(setrlimit(RLIMIT_NOFILE, &limit) == 0, "a limit");
    int status = run_open_log(&r, true, &e);
    limit.rlim_cur = usual;
    need(setrlimit(RLIMIT_NOFILE, &limit) == 0, "the usual limit");
    check(status < 0 && strstr(e.text, "cannot read log/log.tsv") && holds("log/log.tsv", "mine"),
          "one that cannot be read stays: %s", status ? e.text : "");
}

// ---- Texts and times ----------------------------------------------------------------------------

static void test_texts(void) {
    char name[16];
    Text list[] = {{.name = "folder/one"}, {.name = "-"}, {.name = "the third"}};
    Texts d = {.texts = list, .n = 3, .n_files = 2};
    texts_names(&d, name, sizeof name);
    check(strcmp(name, "one, standard i") == 0, "names of texts, short: %s", name);
    Error e;
    check(host_memory(SIZE_MAX, "this", &e) < 0 && strstr(e.text, "GB of memory for this"),
          "what does not fit into memory is refused: %s", e.text);
}

static void test_times(void) {
    char b[32];
    check(strcmp(duration(59.9, b, sizeof b), "0m59s") == 0 &&
              strcmp(duration(3599, b, sizeof b), "59m59s") == 0 &&
              strcmp(duration(3660, b, sizeof b), "1h01m") == 0 &&
              strcmp(duration(86399, b, sizeof b), "23h59m") == 0 &&
              strcmp(duration(3e9, b, sizeof b), "34722d05h") == 0,
          "durations, short and long: %s", b);
    // 100 steps in the first 1000 seconds, 100 in the last 20: 1000 more take 200.
    double t = now();
    Progress p = {.marks = {{t - 1000, 0}, {t - 20, 100}}};
    progress_left(&p, 200, 1200);
    check_error(fabs(progress_left(&p, 200, 1200) - 200), 1, "the time left, at the recent pace");
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at) {
    return (void)st, (void)type, (void)at, remove(path);
}

int main(void) {
    char folder[] = "/tmp/test_run.XXXXXX";
    set_threads(1);
    need(mkdtemp(folder) != NULL && chdir(folder) == 0, "a temporary folder");
    for (int i = 0; i < TEXT; i++) text[i] = (uint8_t)(random_value(60, (size_t)i) * 128 + 128);
    test_scoring();
    test_saving();
    test_strictness();
    test_lock();
    test_foreign_files();
    test_outputs();
    test_log();
    test_texts();
    test_times();
    need(chdir("/") == 0 && nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0, "removing");
    return finish();
}
