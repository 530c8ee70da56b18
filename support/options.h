// options.h: what the programs (train, sample, bench) share on the command line: one table of
// options that both parses and explains, whole files into memory, the clock. Included once each.
//
//   Option table[] = {{"steps", OPT_INT, &steps, 1, 1e9, "N", "optimizer steps"}, ...};
//   parse_options(&cli, argc, argv);     exits with status 2 and one line on wrong usage
#ifndef OPTIONS_H
#define OPTIONS_H

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "model.h"
#include "support/gpu.h"
#include "support/heat.h"

typedef enum {
    OPT_SECTION,  // a heading in --help; nothing to parse
    OPT_FLAG,     // bool, no value: --NAME sets it, --no-NAME clears it
    OPT_INT,      // int64_t within [min, max]
    OPT_SEED,     // uint64_t, all of it
    OPT_REAL,     // double within [min, max]
    OPT_TEXT,     // const char *
    OPT_PAGE,     // const char *: "" without a value. The next argument is one if it ends in .html
    OPT_CHOICE,   // int: an index into choices
} OptionKind;

typedef struct {
    const char *name;  // without the leading --
    OptionKind kind;
    void *value;  // holds the default before, the value after
    double min, max;
    const char *arg;  // what --help calls the value
    const char *help;
    const char *const *choices;  // OPT_CHOICE: NULL-terminated
    bool saved;                  // part of what a training run is: kept in its state
    bool given;                  // on this command line
} Option;

// Rows of a table of options. SAVED: part of what a training run is.
enum { NOT_SAVED, SAVED };
#define SECTION(help) {NULL, OPT_SECTION, NULL, 0, 0, NULL, help, NULL, 0, 0}
#define FLAG(name, saved, p, help) {name, OPT_FLAG, p, 0, 0, NULL, help, NULL, saved, 0}
#define INT(name, saved, p, min, max, arg, help) \
    {name, OPT_INT, p, min, max, arg, help, NULL, saved, 0}
#define SEED(name, saved, p, arg, help) {name, OPT_SEED, p, 0, 0, arg, help, NULL, saved, 0}
#define NUMBER(name, saved, p, min, max, arg, help) \
    {name, OPT_REAL, p, min, max, arg, help, NULL, saved, 0}
#define TEXT(name, saved, p, arg, help) {name, OPT_TEXT, p, 0, 0, arg, help, NULL, saved, 0}
#define CHOICE(name, saved, p, choices, arg, help) \
    {name, OPT_CHOICE, p, 0, 0, arg, help, choices, saved, 0}

typedef struct {
    const char *program, *usage, *about;
    Option *options;
    int n_options;
    const char **files;  // what is left: argv entries, in order
    int n_files;
} Cli;

// Wrong usage: one line, status 2.
static inline void usage_error(const Cli *cli, const char *format, const char *a, const char *b) {
    char line[2 * ERROR_LEN];
    snprintf(line, sizeof line, format, a, b);
    fprintf(stderr, "%s: ", cli->program);
    put_clean(stderr, line);
    fprintf(stderr, "; see %s --help\n", cli->program);
    exit(2);
}

// Anything else that ends a program: one line, status 1.
static inline void die(const Cli *cli, const Error *e) {
    fprintf(stderr, "%s: ", cli->program);
    put_clean(stderr, e->text);  // it may hold the name of a file
    fprintf(stderr, "\n");
    exit(1);
}

// A write to standard output failed: one line, status 1. Somebody who reads only the beginning
// (| head) is content, so with EPIPE quietly and status 0, also where a shell has set pipefail.
static inline void stdout_failed(const Cli *cli) {
    Error e;
    if (errno == EPIPE) _exit(0);
    fail(&e, "cannot write to standard output: %s",
         errno ? strerror(errno) : "the disk is full or failing");
    die(cli, &e);
}

// To be called after the last line on standard output, which may still be in memory.
static inline void flush_stdout(const Cli *cli) {
    errno = 0;
    if (fflush(stdout) || ferror(stdout)) stdout_failed(cli);
}

// The value of o as the user would type it; of a flag yes or no.
static inline const char *option_text(const Option *o, char *buffer, size_t size) {
    buffer[0] = 0;
    switch (o->kind) {
        case OPT_SECTION: break;
        case OPT_FLAG: snprintf(buffer, size, "%s", *(bool *)o->value ? "yes" : "no"); break;
        case OPT_INT: snprintf(buffer, size, "%lld", (long long)*(int64_t *)o->value); break;
        case OPT_SEED:
            snprintf(buffer, size, "%llu", (unsigned long long)*(uint64_t *)o->value);
            break;
        case OPT_REAL:  // the fewest digits, 15 to 17, that are read back as the same number
            for (int digits = 15; digits < 18; digits++) {
                snprintf(buffer, size, "%.*g", digits, *(double *)o->value);
                if (strtod(buffer, NULL) == *(double *)o->value) break;
            }
            break;
        case OPT_TEXT:
        case OPT_PAGE:
            if (*(const char **)o->value) snprintf(buffer, size, "%s", *(const char **)o->value);
            break;
        case OPT_CHOICE: snprintf(buffer, size, "%s", o->choices[*(int *)o->value]); break;
    }
    return buffer;
}

// The backends of this build by name: the CPU's, then the GPU's.
static const Backend *const cpu_backends[] = {&plain_backend, &cpu_backend};
static inline const char *kernel_names(char *buffer, size_t size) {
    int n;
    const char *const *names = gpu_backend_names(&n);
    snprintf(buffer, size, "%s %s", cpu_backends[0]->name, cpu_backends[1]->name);
    for (int j = 0; j < n; j++) {
        size_t used = strlen(buffer);
        snprintf(buffer + used, size - used, " %s", names[j]);
    }
    return buffer;
}

static inline void print_help(const Cli *cli) {
    printf("%s\n\n%s\n", cli->usage, cli->about);
    for (int i = 0; i < cli->n_options; i++) {
        const Option *o = &cli->options[i];
        char left[64], value[256];
        if (o->kind == OPT_SECTION) {
            printf("\n%s\n", o->help);
            continue;
        }
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->arg ? " " : "", o->arg ? o->arg : "");
        printf("  %-24s %s", left, o->help);
        if (o->choices) {
            printf(":");
            for (int j = 0; o->choices[j]; j++) printf(" %s", o->choices[j]);
        } else if (strcmp(o->name, "kernels") == 0) {  // its choices depend on the build
            char names[128];
            printf(": %s", kernel_names(names, sizeof names));
        }
        bool off = o->kind == OPT_FLAG && !*(bool *)o->value;  // not worth a word
        if (!off && *option_text(o, value, sizeof value)) printf(" [%s]", value);
        printf("\n");
    }
    printf("  %-24s %s\n", "--no-NAME", "switches off an option that takes no value");
    printf("  %-24s %s\n", "--help", "this text");
}

// One number, all of text, within o's range. (strtod and strtoll would skip leading blanks.)
static inline double parse_number(const Cli *cli, const Option *o, const char *text) {
    char expected[160], *end;
    bool fraction = o->kind == OPT_REAL;
    errno = 0;
    double x = fraction ? strtod(text, &end) : (double)strtoll(text, &end, 10);
    bool lead = isspace((unsigned char)*text) || *text == '+';
    if (fraction) errno = 0;  // too large is HUGE_VAL, beyond max; too small means 0
    if (lead || end == text || errno || *end || !(x >= o->min && x <= o->max)) {
        snprintf(expected, sizeof expected, "'%.60s', expected %s from %.15g to %.15g", text,
                 fraction ? "a number" : "a whole number", o->min, o->max);
        usage_error(cli, "--%s is %s", o->name, expected);
    }
    return x;
}

static inline void parse_value(const Cli *cli, Option *o, const char *text) {
    char *end;
    switch (o->kind) {
        case OPT_SECTION:
        case OPT_FLAG: break;
        case OPT_INT:
            parse_number(cli, o, text);
            *(int64_t *)o->value = strtoll(text, NULL, 10);  // exact above 2^53, too
            break;
        case OPT_SEED:
            errno = 0;
            *(uint64_t *)o->value = strtoull(text, &end, 10);
            if (*text < '0' || *text > '9' || *end || errno)
                usage_error(cli, "--%s is '%s', expected a whole number from 0 to 2^64-1", o->name,
                            text);
            break;
        case OPT_REAL: *(double *)o->value = parse_number(cli, o, text); break;
        case OPT_TEXT:
        case OPT_PAGE: *(const char **)o->value = text; break;
        case OPT_CHOICE: {
            char list[160] = "";
            for (int j = 0; o->choices[j]; j++) {
                if (strcmp(text, o->choices[j]) == 0) {
                    *(int *)o->value = j;
                    return;
                }
                size_t used = strlen(list);
                snprintf(list + used, sizeof list - used, "%s%s", j ? ", " : "", o->choices[j]);
            }
            snprintf(list + strlen(list), sizeof list - strlen(list), " (got '%.40s')", text);
            usage_error(cli, "--%s expects one of %s", o->name, list);
        }
    }
}

static inline Option *find_option(const Cli *cli, const char *name, size_t length) {
    for (int i = 0; i < cli->n_options; i++) {
        Option *o = &cli->options[i];
        if (o->kind != OPT_SECTION && strlen(o->name) == length && !strncmp(o->name, name, length))
            return o;
    }
    return NULL;
}

// The option that --name speaks of: one of that very name or, for no-FLAG, the flag. NULL where
// there is none. *on: what a flag becomes.
static inline Option *find_named(const Cli *cli, const char *name, size_t length, bool *on) {
    Option *o = find_option(cli, name, length);
    *on = o != NULL;
    if (o || length < 3 || strncmp(name, "no-", 3) != 0) return o;
    o = find_option(cli, name + 3, length - 3);
    return o && o->kind == OPT_FLAG ? o : NULL;
}

// How many letters a must change, gain or lose to become b, at most `most`; else more than that.
static inline int edits(const char *a, size_t n, const char *b, int most) {
    if (n == 0 || *b == 0) return (int)(n + strlen(b));
    if (*a == *b) return edits(a + 1, n - 1, b + 1, most);
    if (most == 0) return 1;
    int change = edits(a + 1, n - 1, b + 1, most - 1), lose = edits(a + 1, n - 1, b, most - 1),
        gain = edits(a, n, b + 1, most - 1), least = change < lose ? change : lose;
    return 1 + (gain < least ? gain : least);
}

// No option has this name. Says which one was meant, if one alone is within two letters of it, and
// within a third of its length.
static inline void unknown_option(const Cli *cli, const char *arg, const char *name, size_t n) {
    const char *best = NULL;
    char hint[80] = "";
    int least = n / 3 < 2 ? (int)(n / 3) + 1 : 3;
    for (int i = 0; i < cli->n_options; i++) {
        const Option *o = &cli->options[i];
        if (o->kind == OPT_SECTION) continue;
        int far = edits(name, n, o->name, 2);
        if (far < least)
            best = o->name, least = far;
        else if (far == least)
            best = NULL;
    }
    if (best) snprintf(hint, sizeof hint, " (did you mean --%.40s?)", best);
    usage_error(cli, "unknown option %s%s", arg, hint);
}

static inline bool is_page(const char *name) {
    size_t n = strlen(name);
    return n > 5 && strcmp(name + n - 5, ".html") == 0;
}

// --name VALUE and --name=VALUE, --flag and --no-flag; `--` ends the options; a lone `-` is a file
// (standard input).
static inline void parse_options(Cli *cli, int argc, char **argv) {
    bool options_end = false;
    cli->files = calloc((size_t)argc + 1, sizeof *cli->files);
    if (!cli->files) exit(1);
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (options_end || arg[0] != '-' || arg[1] == 0) {
            cli->files[cli->n_files++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            options_end = true;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(cli);
            flush_stdout(cli);
            exit(0);
        }
        const char *name = arg + 2, *equals = strchr(arg, '=');
        size_t length = equals ? (size_t)(equals - name) : strlen(arg) - 2;
        bool on;
        Option *o = arg[1] == '-' ? find_named(cli, name, length, &on) : NULL;
        if (!o) unknown_option(cli, arg, name, arg[1] == '-' ? length : 0);
        if (o->given) usage_error(cli, "--%s is given twice%s", o->name, "");
        o->given = true;
        if (o->kind == OPT_FLAG) {
            if (equals) usage_error(cli, "%s: this option takes no value%s", arg, "");
            *(bool *)o->value = on;
        } else if (equals) {
            parse_value(cli, o, equals + 1);
        } else if (o->kind == OPT_PAGE) {
            parse_value(cli, o, i + 1 < argc && is_page(argv[i + 1]) ? argv[++i] : "");
        } else if (i + 1 < argc) {
            parse_value(cli, o, argv[++i]);
        } else {
            usage_error(cli, "--%s needs a value: %s", o->name, o->arg);
        }
    }
}

// ---- Files and time

// -1 where that much memory is not free. Linux grants memory that it does not have and kills the
// program later: so this comes before malloc.
static inline int memory_for(double bytes, const char *what, Error *e) {
    double there = (double)cpu_backend.available();
    if (bytes <= there) return 0;
    return fail(e, "%.200s needs %.3g GB more memory, and %.3g GB are free", what, bytes / 1e9,
                there / 1e9);
}

// A whole file ("-": standard input) into *bytes, malloc'd, with its length. An empty file is 0
// bytes and no error.
static inline int read_whole(const char *path, uint8_t **bytes, size_t *n, Error *e) {
    bool standard = strcmp(path, "-") == 0;
    const char *name = standard ? "standard input" : path;
    *bytes = NULL;
    *n = 0;
    struct stat st = {0};
    if (!standard && stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return fail(e, "%s is a directory, expected a file", path);
    FILE *f = standard ? stdin : fopen(path, "rb");
    if (!f) return fail(e, "cannot read %s: %s", path, strerror(errno));
    // + 1: the end of a file of known size is seen without doubling.
    size_t room = 0, first = S_ISREG(st.st_mode) ? (size_t)st.st_size + 1 : 1 << 16;
    for (;;) {
        if (*n == room) {
            room = room ? room * 2 : first;
            if (memory_for((double)(room - *n), name, e)) break;
            uint8_t *more = realloc(*bytes, room);
            if (!more) {
                fail(e, "%s does not fit into memory (%zu bytes read so far)", name, *n);
                break;
            }
            *bytes = more;
        }
        size_t got = fread(*bytes + *n, 1, room - *n, f);
        *n += got;
        if (got > 0) continue;
        if (!ferror(f)) {
            if (!standard) fclose(f);
            return 0;
        }
        fail(e, "cannot read %s: %s", name, strerror(errno));
        break;
    }
    if (!standard) fclose(f);
    free(*bytes);
    *bytes = NULL;
    return -1;
}

// The backend for --device auto|cpu|cuda and --kernels NAME (NULL: the fastest). auto takes the GPU
// where there is one that works, and says why not where not; a name decides where it runs.
static inline int choose_backend(const Backend **backend, const char *device, const char *kernels,
                                 Error *e) {
    bool on_cpu = strcmp(device, "cpu") == 0, known = kernels == NULL;
    int n;
    const char *const *names = gpu_backend_names(&n);
    *backend = &cpu_backend;
    for (int i = 0; i < 2 && kernels; i++) {
        if (strcmp(kernels, cpu_backends[i]->name) != 0) continue;
        *backend = cpu_backends[i];
        return strcmp(device, "cuda") == 0
                   ? fail(e, "--kernels %s runs on the CPU: leave --device cuda out", kernels)
                   : 0;
    }
    for (int i = 0; i < n && !known; i++) known = strcmp(kernels, names[i]) == 0;
    if (!known) {
        char list[128];
        return fail(e, "no kernels named '%.40s'%s, expected one of: %s", kernels,
                    n ? "" : " in this build without CUDA", kernel_names(list, sizeof list));
    }
    if (on_cpu) return kernels ? fail(e, "--kernels %s is for --device cuda", kernels) : 0;
    const Backend *gpu = gpu_backend(kernels ? kernels : n ? names[n - 1] : "tiled", e);
    if (gpu) {
        *backend = gpu;
        if (!kernels && strcmp(gpu->name, "tensor") != 0)
            fprintf(stderr, "--kernels %s: this GPU has no tensor cores for bf16\n", gpu->name);
        return 0;
    }
    if (strcmp(device, "cuda") == 0 || kernels) return -1;
    fprintf(stderr, "on the CPU: %s\n", e->text);
    return 0;
}

// Seconds of a clock that only runs forward.
static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
