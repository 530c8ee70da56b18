// run.c: the folder of a training run: model, state, log, and how a run goes on. Read run.h first.
//
// Refuses: a state of another text, stack or setting than what is asked for, a folder that it
// cannot write. A file is whole or not there (output.h); a model is saved before the state that
// names it.
#define _POSIX_C_SOURCE 200809L
#include "support/run.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// The folder's file `name`, in buffer.
static const char *path_in(const Run *r, char *buffer, size_t size, const char *name) {
    snprintf(buffer, size, "%s/%s", r->folder, name);
    return buffer;
}

int run_save_model(Run *r, Error *e) {
    char path[4096], loss[32], step[32];
    snprintf(loss, sizeof loss, "%.6f", r->best);
    snprintf(step, sizeof step, "%lld", (long long)r->best_step);
    Pair pairs[] = {{"step", step}, {"held_out_nats_per_byte", loss}};
    Role role = {"", r->best_params};
    if (checkpoint_save(path_in(r, path, sizeof path, "model.safetensors"), &r->model, &role, 1,
                        pairs, 2, e))
        return -1;
    r->best_unsaved = false;
    return 0;
}

// The metadata's key of option i; stays until the program ends, as a Pair needs.
static const char *saved_key(const Cli *cli, int i) {
    static char keys[MAX_PAIRS][64];
    snprintf(keys[i], sizeof keys[i], "option.%s", cli->options[i].name);
    return keys[i];
}

// All that resuming needs: the training arrays, the step, and every option that makes the run what
// it is. Random numbers need nothing: they are a function of seed and step.
static int save_state(Run *r, Error *e) {
    const Model *m = &r->model;
    const struct { const char *name; const real *from; } arrays[] = {
        {"params", m->params}, {"m", m->m}, {"v", m->v}, {"ema", m->ema}};
    char path[4096], numbers[4][32];
    // Not on the stack, 4096 bytes to an option. 1 << 16: what checkpoint.c reads back at most.
    static char values[MAX_PAIRS][4096], files[1 << 16];
    Pair pairs[MAX_PAIRS];
    Role roles[4];
    int n_pairs = 0, n_roles = 0;
    snprintf(numbers[0], 32, "%lld", (long long)r->step);
    // %a: hexadecimal, so that the best comes back to the bit.
    snprintf(numbers[1], 32, "%a", r->best);
    snprintf(numbers[2], 32, "%lld", (long long)r->best_step);
    snprintf(numbers[3], 32, "%016llx", (unsigned long long)r->text);
    pairs[n_pairs++] = (Pair){"step", numbers[0]};
    pairs[n_pairs++] = (Pair){"best", numbers[1]};
    pairs[n_pairs++] = (Pair){"best_step", numbers[2]};
    pairs[n_pairs++] = (Pair){"text", numbers[3]};
    // One name a line: what take_saved_files takes apart.
    files[0] = 0;
    for (int i = 0; i < r->cli.n_files; i++) {
        size_t used = strlen(files);
        snprintf(files + used, sizeof files - used, "%s\n", r->cli.files[i]);
    }
    pairs[n_pairs++] = (Pair){"files", files};
    for (int i = 0; i < r->cli.n_options; i++) {
        const Option *o = &r->cli.options[i];
        if (o->saved)
            pairs[n_pairs++] = (Pair){saved_key(&r->cli, i), option_text(o, values[i], 4096)};
    }
    for (int i = 0; i < 4; i++) {
        // Without --ema there is no average.
        if (!arrays[i].from) continue;
        real *host = r->host + (size_t)n_roles * m->n_params;
        model_read(m, host, arrays[i].from);
        roles[n_roles++] = (Role){arrays[i].name, host};
    }
    return checkpoint_save(path_in(r, path, sizeof path, "state.safetensors"), m, roles, n_roles,
                           pairs, n_pairs, e);
}

// The model first, so that the best which a state speaks of is there to go on with.
int run_save(Run *r, Error *e) {
    if ((r->best_unsaved && run_save_model(r, e)) || save_state(r, e)) return -1;
    r->saved_step = r->step;
    r->last_save = now();
    return 0;
}

// A copy that outlives the checkpoint: options and file names stay until the program ends.
static char *copy_text(const char *text) {
    char *copy = malloc(strlen(text) + 1);
    if (!copy) abort();
    return strcpy(copy, text);
}

// Takes a saved run's options for those not given; refuses one that is given and differs. Only
// --steps may change: it moves the end of the learning-rate schedule.
static int take_saved_options(const Cli *cli, const Checkpoint *ck, Error *e) {
    for (int i = 0; i < cli->n_options; i++) {
        char given[4096];
        Option *o = &cli->options[i];
        const char *saved = o->saved ? checkpoint_get(ck, saved_key(cli, i)) : NULL;
        if (!o->saved) continue;
        if (!saved)
            return fail(e, "%s: no %s in its metadata: another version of this program wrote it, "
                           "start anew", ck->name, saved_key(cli, i));
        if (o->given && strcmp(option_text(o, given, sizeof given), saved) != 0) {
            if (strcmp(o->name, "steps") != 0)
                return fail(e, "%s: that run has --%s %s, not %s; leave the option out to go on "
                               "with it", ck->name, o->name, *saved ? saved : "(none)", given);
            fprintf(stderr, "note: --steps was %s: the learning rate now falls until %s\n", saved,
                    given);
        } else if (o->kind == OPT_FLAG) {
            // Not given: what the run had. A text that was not set is saved as "".
            *(bool *)o->value = strcmp(saved, "yes") == 0;
        } else if (o->kind != OPT_TEXT || *saved) {
            parse_value(cli, o, o->kind == OPT_TEXT ? copy_text(saved) : saved);
        }
    }
    return 0;
}

// The texts of a saved run, one name a line, where none is given. (Standard input must be again.)
static int take_saved_files(Cli *cli, const Checkpoint *ck, Error *e) {
    const char *saved = checkpoint_get(ck, "files");
    if (!saved) return fail(e, "%s: no files in its metadata", ck->name);
    if (cli->n_files || !*saved) return 0;
    free(cli->files);
    char *names = copy_text(saved), *save;
    size_t most = 1;
    for (const char *p = names; *p; p++) most += *p == '\n';
    cli->files = calloc(most, sizeof *cli->files);
    if (!cli->files) return fail(e, "out of memory");
    for (char *name = strtok_r(names, "\n", &save); name; name = strtok_r(NULL, "\n", &save))
        cli->files[cli->n_files++] = name;
    return 0;
}

// All of text as a number; -1 if it is none.
static int parse_int64(const char *text, int64_t *x) {
    char *end;
    if (!text) return -1;
    *x = strtoll(text, &end, 10);
    return *text && !*end ? 0 : -1;
}

// Parameters, moments, average, step and best of the state file. (open_log cuts back the log.)
static int load_state(Run *r, const Checkpoint *ck, Error *e) {
    Model *m = &r->model;
    const struct { const char *name; real *to; } arrays[] = {
        {"params", m->params}, {"m", m->m}, {"v", m->v}, {"ema", m->ema}};
    char hash[32], *end;
    // The configuration first: r->host has room for this model's parameters, not for any other's.
    if (checkpoint_match(ck, &r->config, e)) return -1;
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->text);
    const char *text = checkpoint_get(ck, "text"), *best = checkpoint_get(ck, "best");
    if (!text || strcmp(text, hash) != 0)
        return fail(e, "%s: that run had another text (or another split of it): give the same "
                       "files in the same order", ck->name);
    if (!best || parse_int64(checkpoint_get(ck, "step"), &r->step) ||
        parse_int64(checkpoint_get(ck, "best_step"), &r->best_step) || r->step < 0 ||
        r->step > UINT32_MAX)
        return fail(e, "%s: step, best or best_step is missing or no number", ck->name);
    r->best = strtod(best, &end);
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
    if (r->best_step == 0) return 0;
    if (checkpoint_open(&ck, path_in(r, path, sizeof path, "model.safetensors"), e)) return -1;
    int status = checkpoint_match(&ck, &r->config, e);
    if (status == 0) status = checkpoint_read(&ck, "", r->best_params, e);
    checkpoint_close(&ck);
    return status;
}

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

int run_open_log(Run *r, bool resumed, Error *e) {
    char path[4096], line[8192], name[128], value[4096];
    path_in(r, path, sizeof path, "log.tsv");
    FILE *old = resumed ? fopen(path, "r") : NULL;
    Output out;
    if (output_open(&out, path, true, e)) return -1;
    if (old) {
        while (fgets(line, sizeof line, old))
            // Comments and header stay; steps after the saved one will be taken and logged again.
            if (line[0] == '#' || line[0] == 's' || atoll(line) <= r->step) fputs(line, out.file);
        fclose(old);
        fprintf(out.file, "# resumed at step %lld\n", (long long)r->step);
    } else {
        fprintf(out.file, "# fuzzytok.c on %s, %s backend, %d threads\n",
                machine_name(name, sizeof name), r->backend->name, threads_in_use());
        fprintf(out.file, "# %zu parameters, receptive field %lld bytes\n#", r->model.n_params,
                (long long)config_receptive_field(&r->config));
        for (int i = 0; i < r->cli.n_options; i++) {  // as they would be typed
            const Option *o = &r->cli.options[i];
            if (!o->saved) continue;
            option_text(o, value, sizeof value);
            if (o->kind == OPT_FLAG)
                fprintf(out.file, " --%s%s", *(bool *)o->value ? "" : "no-", o->name);
            else if (*value)
                fprintf(out.file, strchr(value, ' ') ? " --%s \"%s\"" : " --%s %s", o->name, value);
        }
        fprintf(out.file, "\nstep\ttrain_loss\theld_out_loss\tgradient_norm\tlearning_rate\n");
    }
    // Whole under its name first; from now on rows are appended.
    if (output_commit(&out, e)) return -1;
    r->log = fopen(path, "a");
    return r->log ? 0 : fail(e, "cannot write %s: %s", path, strerror(errno));
}

int run_make_folder(const Run *r, Error *e) {
    char path[4096], aside[4096];
    struct stat st;
    bool there = stat(path_in(r, path, sizeof path, "state.safetensors"), &st) == 0 ||
                 stat(path_in(r, path, sizeof path, "model.safetensors"), &st) == 0;
    if (there) {
        for (int i = 1; i < 100000; i++) {
            snprintf(aside, sizeof aside, "%s.%d", r->folder, i);
            if (stat(aside, &st) != 0) break;
        }
        if (rename(r->folder, aside))
            return fail(e, "cannot move the earlier run %s aside: %s", r->folder, strerror(errno));
        fprintf(stderr, "note: the run that was in %s is now in %s\n", r->folder, aside);
    }
    if (mkdir(r->folder, 0777) && errno != EEXIST)
        return fail(e, "cannot make the folder %s: %s", r->folder, strerror(errno));
    // Refused now, not when the first save would have to be given up.
    if (stat(r->folder, &st) || !S_ISDIR(st.st_mode) || access(r->folder, W_OK))
        return fail(e, "cannot write into %s, expected a folder: choose another --out", r->folder);
    return 0;
}

int run_open_state(Run *r, Checkpoint *state, Error *e) {
    char path[4096];
    path_in(r, path, sizeof path, "state.safetensors");
    if (checkpoint_open(state, path, e)) return -1;
    if (!state->is_state) return fail(e, "%s is a model, not the state of a run", path);
    return take_saved_options(&r->cli, state, e) || take_saved_files(&r->cli, state, e) ? -1 : 0;
}

int run_load(Run *r, const Checkpoint *state, Error *e) {
    return load_state(r, state, e) || load_best(r, e) ? -1 : 0;
}
