// run.c: the folder of a training run: model, state, log, and how a run goes on. Read run.h first.
//
// Refuses: a folder that another process trains in or that it cannot write; a state that is damaged
// or of another text, stack or setting than what is asked for. A file is whole or not there
// (output.h); a model is saved before the state that names it.
#define _XOPEN_SOURCE 700  // realpath
#define _DARWIN_C_SOURCE   // flock on macOS
#include "support/run.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/file.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static const char *const run_files[] = {"model.safetensors", "state.safetensors", "log.tsv"};

// The folder's file `name`, in buffer.
static const char *path_in(const Run *r, char *buffer, size_t size, const char *name) {
    // 4000: find_folder has seen that it is not longer.
    snprintf(buffer, size, "%.4000s/%.80s", r->folder, name);
    return buffer;
}

char *copy_text(const char *text) {
    char *copy = malloc(strlen(text) + 1);
    if (!copy) abort();
    return strcpy(copy, text);
}

// ---- The folder ---------------------------------------------------------------------------------

// r->folder: the name without slashes at its end, because "run/" cannot be renamed; and a link, "."
// or ".." as what it stands for.
static int find_folder(Run *r, const char *name, Error *e) {
    char plain[4096];
    struct stat st;
    size_t n = strlen(name);
    // 96: for the names that are added to it
    if (n == 0 || n > sizeof plain - 96)
        return fail(e, "the name of the folder has %zu bytes, expected 1 to %zu", n,
                    sizeof plain - 96);
    while (n > 1 && name[n - 1] == '/') n--;
    snprintf(plain, sizeof plain, "%.*s", (int)n, name);
    const char *slash = strrchr(plain, '/'), *last = slash ? slash + 1 : plain;
    bool link = lstat(plain, &st) == 0 && S_ISLNK(st.st_mode);
    if (!link && strcmp(last, ".") != 0 && strcmp(last, "..") != 0) {
        snprintf(r->folder, sizeof r->folder, "%s", plain);
        return 0;
    }
    char *real_path = realpath(plain, NULL);
    if (!real_path || strlen(real_path) > sizeof plain - 96) {
        fail(e, "the folder %s leads nowhere: %s", plain, strerror(errno));
        free(real_path);
        return -1;
    }
    snprintf(r->folder, sizeof r->folder, "%s", real_path);
    free(real_path);
    return 0;
}

static int cannot_write(const Run *r, Error *e) {
    return fail(e, "cannot write into %s: %s; expected a folder: choose another --out", r->folder,
                strerror(errno));
}

// "process 17 since 2026-11-25 09:00:00", as the lock's holder has written it.
static void read_holder(int lock, char *who, size_t size) {
    ssize_t n = pread(lock, who, size - 1, 0);
    who[n > 0 ? n : 0] = 0;
    // Anybody may have written the file: nothing but text reaches the terminal.
    for (char *s = who; *s; s++)
        if (*s < ' ' || *s > '~') *s = 0;
    if (!*who) snprintf(who, size, "another process");
}

static void write_holder(int lock) {
    char since[32] = "";
    time_t t = time(NULL);
    struct tm *local = localtime(&t);
    if (local) strftime(since, sizeof since, "%Y-%m-%d %H:%M:%S", local);
    // Where the disk is full the next one is told less: no error.
    if (ftruncate(lock, 0) == 0) dprintf(lock, "process %ld since %s\n", (long)getpid(), since);
}

static int foreign_lock(const char *path, Error *e) {
    return fail(e, "%s is no trainer's lock: choose another --out, or move it away", path);
}

// Opens r->folder's file .lock, which may be somebody's own: no link, pipe or folder is taken.
// 1: the folder has been moved away meanwhile.
static int open_lock(Run *r, const char *path, Error *e) {
    struct stat before, after, lock;
    if (stat(r->folder, &before)) return errno == ENOENT ? 1 : cannot_write(r, e);
    // O_NONBLOCK: a pipe must not make this wait.
    r->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (r->lock >= 0) {
        if (fstat(r->lock, &lock) == 0 && S_ISREG(lock.st_mode)) return 0;
        close(r->lock);
    } else if (errno == ENOENT) {
        // The folder was moved; or it is there still and takes no file, as /proc/1.
        if (stat(r->folder, &after) || before.st_dev != after.st_dev ||
            before.st_ino != after.st_ino)
            return 1;
        errno = ENOENT;
        return cannot_write(r, e);
    } else if (errno != ELOOP && errno != EISDIR && errno != ENXIO) {
        return cannot_write(r, e);
    }
    return foreign_lock(path, e);
}

// Removes what trainers that were killed while they wrote have left in r->folder.
static void remove_temporaries(const Run *r) {
    DIR *folder = opendir(r->folder);
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        for (int i = 0; i < 3; i++)
            if (output_is_temporary(entry->d_name, run_files[i]))
                unlinkat(dirfd(folder), entry->d_name, 0);
    if (folder) closedir(folder);
}

// Locks r->folder by its file .lock; the kernel releases it when the process ends, however it does.
// 1: the folder has been moved away meanwhile.
static int lock_folder(Run *r, Error *e) {
    char path[4096], who[64], word[8];
    struct stat there, ours;
    path_in(r, path, sizeof path, ".lock");
    int status = open_lock(r, path, e);
    if (status) return status;
    bool locked = flock(r->lock, LOCK_EX | LOCK_NB) == 0;
    if (!locked) {
        if (errno == EWOULDBLOCK) {
            read_holder(r->lock, who, sizeof who);
            return fail(e, "%s trains in %s: choose another --out, or wait until it has ended", who,
                        r->folder);
        }
        fprintf(stderr, "note: %s cannot be locked (%s): start no second trainer in it\n",
                r->folder, strerror(errno));
    }
    // Between open and flock the holder of before may have moved the folder, and the lock with it.
    if (stat(path, &there) == 0 && fstat(r->lock, &ours) == 0 && there.st_dev == ours.st_dev &&
        there.st_ino == ours.st_ino) {
        // Refused now, not when the first save would have to be given up; not before it is locked,
        // because another may be moving it.
        if (access(r->folder, W_OK)) return cannot_write(r, e);
        // Not before it is locked: a trainer may be writing it.
        ssize_t n = pread(r->lock, word, sizeof word, 0);
        if (n != 0 && (n != sizeof word || memcmp(word, "process ", sizeof word) != 0)) {
            close(r->lock);
            return foreign_lock(path, e);
        }
        write_holder(r->lock);
        if (locked) remove_temporaries(r);
        return 0;
    }
    close(r->lock);
    return 1;
}

// Whether the file or folder `name` is r->folder or lies in it.
static bool lies_in(const Run *r, const char *name) {
    char *here = realpath(name, NULL), *there = realpath(r->folder, NULL);
    size_t n = there ? strlen(there) : 0;
    bool inside = here && there && strncmp(here, there, n) == 0 &&
                  (here[n] == 0 || here[n] == '/' || n == 1);
    free(here);
    free(there);
    return inside;
}

// What of this run lies in r->folder, which therefore stays where it is: the name, or NULL.
static const char *needed_there(const Run *r) {
    static const char *const inputs[] = {"val", "init"};
    if (lies_in(r, ".")) return "the current folder";
    for (int i = 0; i < r->cli.n_files; i++)
        if (lies_in(r, r->cli.files[i])) return r->cli.files[i];
    for (int i = 0; i < 2; i++) {
        const Option *o = find_option(&r->cli, inputs[i], strlen(inputs[i]));
        const char *name = o ? *(const char **)o->value : NULL;
        if (name && lies_in(r, name)) return name;
    }
    return NULL;
}

// Renames r->folder, which holds a run and is locked, to the first free of folder.1, folder.2 ..
static int move_aside(const Run *r, Error *e) {
    char aside[sizeof r->folder + 16];
    const char *needed = needed_there(r), *why = NULL;
    if (needed)
        return fail(e, "%s holds a run and cannot be moved aside, because %.200s lies "
                       "there: choose another --out", r->folder, needed);
    for (int i = 1; !why; i++) {
        struct stat st;
        snprintf(aside, sizeof aside, "%s.%d", r->folder, i);
        if (lstat(aside, &st) == 0) continue;
        if (rename(r->folder, aside) == 0) {
            fprintf(stderr, "note: the run that was in %s is now in %s\n", r->folder, aside);
            return 0;
        }
        // Taken since the lstat: the next one.
        if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR) why = strerror(errno);
    }
    return fail(e, "%s holds a run and cannot be moved aside (%s): choose another --out, or move "
                   "its model.safetensors, state.safetensors and log.tsv away", r->folder, why);
}

// Whether r->folder holds what a trainer writes; a log.tsv may as well be somebody's own.
static bool holds_run(const Run *r) {
    char path[4096];
    struct stat st;
    for (int i = 0; i < 3; i++)
        if (lstat(path_in(r, path, sizeof path, run_files[i]), &st) == 0) return true;
    return false;
}

int run_take_folder(Run *r, const char *name, Error *e) {
    if (find_folder(r, name, e)) return -1;
    // Two trainers may be here at the same time. Nothing is moved without its lock; whoever finds
    // that the folder under the name is not the one that it has locked begins again.
    for (int tries = 0; tries < 100; tries++) {
        if (mkdir(r->folder, 0777) && errno != EEXIST)
            return fail(e, "cannot make the folder %s: %s", r->folder, strerror(errno));
        int status = lock_folder(r, e);
        if (status < 0) return -1;
        if (status > 0) continue;
        if (!holds_run(r)) return 0;
        if (move_aside(r, e)) return -1;
        close(r->lock);
    }
    return fail(e, "others keep moving %s away: choose another --out", r->folder);
}

// ---- Names and numbers as metadata --------------------------------------------------------------

// Metadata in the making. There are fewer pairs than MAX_PAIRS: the options and eight more.
typedef struct {
    Pair pairs[MAX_PAIRS];
    int n;
} Metadata;

static void add(Metadata *d, const char *key, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    char *value = malloc((size_t)n + 1);
    if (!value) abort();
    vsnprintf(value, (size_t)n + 1, format, again);
    va_end(again);
    va_end(args);
    d->pairs[d->n++] = (Pair){copy_text(key), value};
}

static void free_metadata(Metadata *d) {
    for (; d->n > 0; d->n--) {
        free((char *)d->pairs[d->n - 1].key);
        free((char *)d->pairs[d->n - 1].value);
    }
}

// `from` as one line of ASCII, malloc'd: a name may hold any byte, and metadata only UTF-8. Other
// bytes than printable ones, and backslashes, become \xHH.
static char *escape(const char *from) {
    char *text = malloc(4 * strlen(from) + 1), *to = text;
    if (!text) abort();
    for (; *from; from++) {
        if (*from < ' ' || *from > '~' || *from == '\\')
            to += sprintf(to, "\\x%02x", (uint8_t)*from);
        else
            *to++ = *from;
    }
    *to = 0;
    return text;
}

// The inverse, in place.
static char *unescape(char *text) {
    char *to = text;
    for (const char *from = text; *from; from++) {
        unsigned byte;
        if (sscanf(from, "\\x%2x", &byte) == 1 && byte) {
            *to++ = (char)byte;
            from += 3;
        } else {
            *to++ = *from;
        }
    }
    *to = 0;
    return text;
}

// An option's value as metadata and log have it, malloc'd.
static char *saved_text(const Option *o) {
    char value[4096];
    return escape(option_text(o, value, sizeof value));
}

static const char *saved_key(const Option *o, char *key, size_t size) {
    snprintf(key, size, "option.%s", o->name);
    return key;
}

// The names of the texts, one a line, malloc'd. -1: longer than metadata can be.
static int file_names(const Cli *cli, char **names, Error *e) {
    enum { MOST = 1 << 16 };  // what checkpoint.c reads back
    size_t used = 0;
    *names = malloc(MOST);
    if (!*names) return fail(e, "out of memory");
    **names = 0;
    for (int i = 0; i < cli->n_files; i++) {
        char *name = escape(cli->files[i]);
        if (used < MOST)
            used += (size_t)snprintf(*names + used, MOST - used, "%s\n", name);
        free(name);
    }
    if (used < MOST) return 0;
    free(*names);
    return fail(e, "the names of the texts take more than %d bytes: use fewer or shorter ones",
                MOST);
}

// A whole number of the metadata from low to high, in the form in which it was written.
static int get_number(const Checkpoint *ck, const char *key, int64_t low, int64_t high, int64_t *x,
                      Error *e) {
    char again[32] = "";
    const char *text = checkpoint_get(ck, key);
    *x = text ? strtoll(text, NULL, 10) : 0;
    if (text) snprintf(again, sizeof again, "%lld", (long long)*x);
    if (text && strcmp(again, text) == 0 && *x >= low && *x <= high) return 0;
    return fail(e, "%s: %s is '%.40s' in the metadata, expected %lld to %lld", ck->name, key,
                text ? text : "", (long long)low, (long long)high);
}

// ---- Writing ------------------------------------------------------------------------------------

int run_identify(Run *r, uint64_t start, Error *e) {
    uint64_t parts[2] = {r->text, start};
    uint64_t hash = checksum_add(CHECKSUM_START, parts, sizeof parts);
    for (int i = 0; i < r->cli.n_options; i++) {
        const Option *o = &r->cli.options[i];
        if (!o->saved) continue;
        char *value = saved_text(o);
        hash = checksum_add(checksum_add(hash, o->name, strlen(o->name) + 1), value,
                            strlen(value) + 1);
        free(value);
    }
    snprintf(r->id, sizeof r->id, "%016llx", (unsigned long long)hash);
    // Refused now, not when the first save would have to be given up.
    char *names;
    if (file_names(&r->cli, &names, e)) return -1;
    free(names);
    return 0;
}

int run_save_model(Run *r, Error *e) {
    char path[4096];
    Metadata d = {.n = 0};
    add(&d, "run", "%s", r->id);
    add(&d, "step", "%lld", (long long)r->best_step);
    add(&d, "trained_on", "%s", r->trained_on);
    add(&d, "training_bytes", "%zu", r->training_bytes);
    // Without held-out text there is no such figure.
    if (isfinite(r->best))
        add(&d, "held_out_nats_per_byte", "%.6f", r->whole > 0 ? r->whole : r->best);
    Role role = {"", r->best_params};
    int status = checkpoint_save(path_in(r, path, sizeof path, "model.safetensors"), &r->model,
                                 &role, 1, d.pairs, d.n, e);
    free_metadata(&d);
    if (status == 0) r->best_unsaved = false;
    return status;
}

// All that resuming needs: the training arrays, the step, and every option that makes the run what
// it is. Random numbers need nothing: they are a function of seed and step.
static int save_state(Run *r, Error *e) {
    const Model *m = &r->model;
    const struct { const char *name; const real *from; } arrays[] = {
        {"params", m->params}, {"m", m->m}, {"v", m->v}, {"ema", m->ema}};
    char path[4096], key[64], *names;
    Metadata d = {.n = 0};
    Role roles[4];
    int n_roles = 0;
    if (file_names(&r->cli, &names, e)) return -1;
    add(&d, "run", "%s", r->id);
    add(&d, "step", "%lld", (long long)r->step);
    add(&d, "evaluated", "%lld", (long long)r->evaluated);
    // %a: hexadecimal, so that the best comes back to the bit.
    add(&d, "best", "%a", r->best);
    add(&d, "best_step", "%lld", (long long)r->best_step);
    add(&d, "text", "%016llx", (unsigned long long)r->text);
    add(&d, "files", "%s", names);
    free(names);
    for (int i = 0; i < r->cli.n_options; i++) {
        const Option *o = &r->cli.options[i];
        if (!o->saved) continue;
        char *value = saved_text(o);
        add(&d, saved_key(o, key, sizeof key), "%s", value);
        free(value);
    }
    for (int i = 0; i < 4; i++) {
        // Without --ema there is no average.
        if (!arrays[i].from) continue;
        real *host = r->host + (size_t)n_roles * m->n_params;
        model_read(m, host, arrays[i].from);
        roles[n_roles++] = (Role){arrays[i].name, host};
    }
    int status = checkpoint_save(path_in(r, path, sizeof path, "state.safetensors"), m, roles,
                                 n_roles, d.pairs, d.n, e);
    free_metadata(&d);
    return status;
}

// The model first, so that the best which a state speaks of is there to go on with.
int run_save(Run *r, Error *e) {
    if ((r->best_unsaved && run_save_model(r, e)) || save_state(r, e)) return -1;
    r->saved_step = r->step;
    r->last_save = now();
    return 0;
}

// ---- Going on -----------------------------------------------------------------------------------

// Takes a saved run's options for those not given; refuses one that is given and differs. Only
// --steps may change: it moves the end of the learning-rate schedule.
static int take_saved_options(const Cli *cli, const Checkpoint *ck, Error *e) {
    for (int i = 0; i < cli->n_options; i++) {
        char key[64];
        Option *o = &cli->options[i];
        if (!o->saved) continue;
        const char *saved = checkpoint_get(ck, saved_key(o, key, sizeof key));
        if (!saved)
            return fail(e, "%s: no %s in its metadata: another version of this program wrote it, "
                           "start anew", ck->name, key);
        char *given = saved_text(o);
        if (o->given && strcmp(given, saved) != 0) {
            if (strcmp(o->name, "steps") != 0) {
                fail(e, "%s: that run has --%s %s, not %s; leave the option out to go on with it",
                     ck->name, o->name, *saved ? saved : "(none)", given);
                free(given);
                return -1;
            }
            // Where the saved run has taken as many steps already, begin_run says so.
            const char *taken = checkpoint_get(ck, "step");
            if (taken && atoll(taken) < atoll(given))
                fprintf(stderr, "note: --steps was %s: the learning rate now falls until %s\n",
                        saved, given);
        } else if (o->kind == OPT_FLAG) {
            // Not given: what the run had. A text that was not set is saved as "".
            *(bool *)o->value = strcmp(saved, "yes") == 0;
        } else if (o->kind != OPT_TEXT || *saved) {
            parse_value(cli, o, o->kind == OPT_TEXT ? unescape(copy_text(saved)) : saved);
        }
        free(given);
    }
    return 0;
}

// The texts of a saved run, one name a line, where none is given. (Standard input must be given
// again.)
static int take_saved_files(Cli *cli, const Checkpoint *ck, Error *e) {
    const char *saved = checkpoint_get(ck, "files");
    if (!saved) return fail(e, "%s: no files in its metadata", ck->name);
    if (cli->n_files || !*saved) return 0;
    free(cli->files);
    char *names = copy_text(saved), *rest;
    size_t most = 1;
    for (const char *p = names; *p; p++) most += *p == '\n';
    cli->files = calloc(most, sizeof *cli->files);
    if (!cli->files) return fail(e, "out of memory");
    for (char *name = strtok_r(names, "\n", &rest); name; name = strtok_r(NULL, "\n", &rest))
        cli->files[cli->n_files++] = unescape(name);
    return 0;
}

int run_open_state(Run *r, const char *name, Checkpoint *state, Error *e) {
    char path[4096];
    struct stat st;
    if (find_folder(r, name, e)) return -1;
    path_in(r, path, sizeof path, "state.safetensors");
    // Where there is no state, checkpoint_open says so, and no lock is left behind.
    int status = stat(path, &st) ? 0 : lock_folder(r, e);
    if (status) return status < 0 ? -1 : fail(e, "%s has just been moved away", r->folder);
    if (checkpoint_open(state, path, e)) return -1;
    if (!state->is_state) return fail(e, "%s is a model, not the state of a run", path);
    return take_saved_options(&r->cli, state, e) || take_saved_files(&r->cli, state, e) ? -1 : 0;
}

// Id, step and best.
static int load_numbers(Run *r, const Checkpoint *ck, Error *e) {
    char again[32];
    const char *id = checkpoint_get(ck, "run"), *best = checkpoint_get(ck, "best");
    if (!id || strlen(id) != sizeof r->id - 1)
        return fail(e, "%s: its metadata names no run, or another version of this program wrote "
                       "it: start anew", ck->name);
    memcpy(r->id, id, sizeof r->id);
    if (get_number(ck, "step", 0, UINT32_MAX, &r->step, e) ||
        get_number(ck, "evaluated", 0, r->step, &r->evaluated, e) ||
        get_number(ck, "best_step", 0, r->step, &r->best_step, e))
        return -1;
    // INFINITY before the first evaluation, and where nothing is held out.
    bool judged = r->best_step > 0 && r->held_out_bytes > 0;
    r->best = best ? strtod(best, NULL) : NAN;
    snprintf(again, sizeof again, "%a", r->best);
    if (best && strcmp(again, best) == 0 && r->best > 0 && !isnan(r->best) &&
        isfinite(r->best) == judged)
        return 0;
    return fail(e, "%s: best is '%.40s' in the metadata, expected %s", ck->name, best ? best : "",
                judged ? "a loss" : "inf");
}

// Parameters, moments, average, step and best of the state file. (run_open_log cuts back the log.)
static int load_state(Run *r, const Checkpoint *ck, Error *e) {
    Model *m = &r->model;
    const struct { const char *name; real *to; } arrays[] = {
        {"params", m->params}, {"m", m->m}, {"v", m->v}, {"ema", m->ema}};
    char hash[32];
    // The configuration first: r->host has room for this model's parameters, not for any other's.
    if (checkpoint_match(ck, &r->config, e)) return -1;
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->text);
    const char *text = checkpoint_get(ck, "text");
    if (!text || strcmp(text, hash) != 0)
        return fail(e, "%s: that run had another text (or another split of it): give the same "
                       "files in the same order", ck->name);
    if (load_numbers(r, ck, e)) return -1;
    for (int i = 0; i < 4; i++) {
        if (!arrays[i].to) continue;
        if (checkpoint_read(ck, arrays[i].name, r->host, e)) return -1;
        model_write(m, arrays[i].to, r->host);
    }
    // Random numbers and learning rate are functions of the step's number: nothing else is missing.
    StepState *state = calloc(1, sizeof *state);
    if (!state) return fail(e, "out of memory");
    state->step = (uint32_t)r->step;
    r->backend->upload(m->state, state, sizeof *state);
    free(state);
    r->saved_step = r->step;
    return 0;
}

// The best parameters of a run that goes on; before its first evaluation there are none.
static int load_best(Run *r, Error *e) {
    Checkpoint ck;
    char path[4096];
    int64_t step;
    if (r->best_step == 0) return 0;
    if (checkpoint_open(&ck, path_in(r, path, sizeof path, "model.safetensors"), e)) return -1;
    int status = checkpoint_match(&ck, &r->config, e);
    const char *id = checkpoint_get(&ck, "run");
    if (status == 0 && (!id || strcmp(id, r->id) != 0))
        status = fail(e, "%s is of another run (%.16s) than the state beside it (%s): put that "
                         "run's own model there, or start anew", path, id ? id : "it names none",
                      r->id);
    // A kill between the two savings leaves a later best than the state knows: it will be found
    // again.
    if (status == 0) status = get_number(&ck, "step", r->best_step, INT64_MAX, &step, e);
    if (status == 0) status = checkpoint_read(&ck, "", r->best_params, e);
    checkpoint_close(&ck);
    return status;
}

int run_load(Run *r, const Checkpoint *state, Error *e) {
    return load_state(r, state, e) || load_best(r, e) ? -1 : 0;
}

// ---- The log ------------------------------------------------------------------------------------

const char *machine_name(char *buffer, size_t size) {
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256];
    snprintf(buffer, size, "unknown CPU");
    while (f && fgets(line, sizeof line, f)) {
        char *name = strstr(line, "model name") == line ? strchr(line, ':') : NULL;
        if (!name) continue;
        name[strcspn(name, "\n")] = 0;
        snprintf(buffer, size, "%s", name + 2);
        break;
    }
    if (f) fclose(f);
    return buffer;
}

int threads_in_use(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static const char log_header[] =
    "step\ttrain_loss\theld_out_loss\tgradient_norm\tlearning_rate\n";

// Whether a line of a log is a row: five fields, the first a step's number.
static bool is_row(const char *line) {
    size_t digits = strspn(line, "0123456789");
    int tabs = 0;
    for (const char *s = line; *s; s++) tabs += *s == '\t';
    return digits > 0 && line[digits] == '\t' && tabs == 4;
}

// What the old log says up to r->step. Comments and header stay; steps after the saved one will be
// taken and logged again. What is none of this goes. -1: it cannot be read.
static int copy_log(const Run *r, FILE *old, FILE *to) {
    char *line = NULL;
    size_t room = 0;
    ssize_t n;
    // A crash may have cut the last row: it ends in no newline.
    while ((n = getline(&line, &room, old)) > 0 && line[n - 1] == '\n') {
        if (strlen(line) != (size_t)n) continue;
        if (line[0] == '#' || strcmp(line, log_header) == 0 ||
            (is_row(line) && atoll(line) <= r->step))
            fputs(line, to);
    }
    free(line);
    fprintf(to, "# resumed at step %lld\n", (long long)r->step);
    return ferror(old) ? -1 : 0;
}

static void write_log_header(const Run *r, FILE *to) {
    char name[128];
    fprintf(to, "# fuzzytok.c on %s, %s backend, %d threads\n", machine_name(name, sizeof name),
            r->backend->name, threads_in_use());
    fprintf(to, "# %zu parameters, receptive field %lld bytes\n#", r->model.n_params,
            (long long)config_receptive_field(&r->config));
    for (int i = 0; i < r->cli.n_options; i++) {  // as they would be typed
        const Option *o = &r->cli.options[i];
        if (!o->saved) continue;
        char *value = saved_text(o);
        if (o->kind == OPT_FLAG)
            fprintf(to, " --%s%s", *(bool *)o->value ? "" : "no-", o->name);
        else if (*value)
            fprintf(to, strchr(value, ' ') ? " --%s \"%s\"" : " --%s %s", o->name, value);
        free(value);
    }
    fprintf(to, "\n%s", log_header);
}

int run_open_log(Run *r, bool resumed, Error *e) {
    char path[4096];
    path_in(r, path, sizeof path, "log.tsv");
    Output out;
    // Before the old log is opened: it refuses a pipe, for which fopen would wait.
    if (output_open(&out, path, true, e)) return -1;
    FILE *old = resumed ? fopen(path, "r") : NULL;
    bool unread = resumed && (old ? copy_log(r, old, out.file) != 0 : errno != ENOENT);
    if (unread) fail(e, "cannot read %s: %s", path, strerror(errno));
    if (!old && !unread) write_log_header(r, out.file);
    if (old) fclose(old);
    if (unread) return output_abandon(&out), -1;
    // Whole under its name first; from now on rows are appended.
    if (output_commit(&out, e)) return -1;
    r->log = fopen(path, "a");
    if (!r->log || fseek(r->log, 0, SEEK_END))
        return fail(e, "cannot write %s: %s", path, strerror(errno));
    r->log_end = ftell(r->log);
    return 0;
}

void run_log(Run *r, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (r->log) vfprintf(r->log, format, args);
    va_end(args);
}

void run_flush_log(Run *r) {
    char path[4096];
    if (!r->log) return;
    if (fflush(r->log) == 0 && !ferror(r->log)) {
        r->log_end = ftell(r->log);
        return;
    }
    path_in(r, path, sizeof path, "log.tsv");
    fprintf(stderr, "note: cannot write %s (%s): it ends here, the training goes on\n", path,
            strerror(errno));
    fclose(r->log);
    r->log = NULL;
    // No part of a row stays. Where that fails, too, resuming drops it.
    if (truncate(path, r->log_end)) return;
}
