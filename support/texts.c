// texts.c: reads texts. Read texts.h first.
#define _POSIX_C_SOURCE 200809L
#include "support/texts.h"

#include "data/language.h"
#include "support/output.h"

// 1 MiB, about the size of TinyShakespeare.
enum { BUILT_IN_BYTES = 1 << 20, BUILT_IN_SEED = 1 };

int host_memory(size_t bytes, const char *what, Error *e) {
    size_t there = cpu_backend.available();
    if (bytes <= there) return 0;
    return fail(e, "needs %.3g GB of memory for %.200s, and %.3g GB are free", (double)bytes / 1e9,
                what, (double)there / 1e9);
}

// The file of that name, or with NULL the built-in corpus; the part `held_out` at its end is not
// for training.
static int load_text(Text *t, const char *name, double held_out, Error *e) {
    t->name = name;
    struct stat st;
    if (name) {
        if (stat(name, &st) == 0 && S_ISREG(st.st_mode) && host_memory((size_t)st.st_size, name, e))
            return -1;
        if (read_whole(name, &t->bytes, &t->n, e)) return -1;
        if (t->n == 0) return fail(e, "%s is empty, expected text", name);
    } else {
        t->name = "the built-in corpus";
        t->n = BUILT_IN_BYTES;
        t->bytes = malloc(t->n);
        if (!t->bytes) return fail(e, "out of memory for the built-in corpus");
        language_write(t->bytes, t->n, BUILT_IN_SEED);
    }
    t->n_train = (size_t)((double)t->n * (1 - held_out));
    return 0;
}

int texts_load(Texts *d, const Cli *cli, const char *val, double val_frac, size_t seq, Error *e) {
    int n_files = cli->n_files ? cli->n_files : 1;
    *d = (Texts){.n = n_files + (val != NULL), .n_files = n_files, .hash = CHECKSUM_START};
    d->texts = calloc((size_t)d->n, sizeof *d->texts);
    d->lengths = calloc((size_t)d->n, sizeof *d->lengths);
    if (!d->texts || !d->lengths) return fail(e, "out of memory");
    for (int i = 0; i < n_files; i++)
        // (files ends in NULL: without files, that is the one name.)
        if (load_text(&d->texts[i], cli->files[i], val ? 0 : val_frac, e)) return -1;
    if (val && load_text(&d->texts[n_files], val, 1, e)) return -1;
    // Known of the language that writes the built-in corpus, not of other texts.
    if (!cli->n_files && !val) d->floor = language_entropy();
    for (int i = 0; i < d->n; i++) d->n_train += d->texts[i].n_train;
    if (host_memory(d->n_train, "the training text", e)) return -1;
    // + 1: malloc(0) may give NULL
    d->train = malloc(d->n_train + 1);
    if (!d->train) return fail(e, "out of memory for %zu bytes of training text", d->n_train);
    size_t at = 0;
    for (int i = 0; i < d->n; i++) {
        const Text *t = &d->texts[i];
        d->lengths[i] = t->n_train;
        memcpy(d->train + at, t->bytes, t->n_train);
        at += t->n_train;
        d->n_held_out += t->n - t->n_train;
        // With the sizes in it, another split of the same bytes is another hash.
        uint64_t split[2] = {t->n, t->n_train};
        d->hash = checksum_add(checksum_add(d->hash, split, sizeof split), t->bytes, t->n);
        if (i < n_files && t->n_train <= seq)
            return fail(e, "%s has %zu bytes for training, less than one window of --seq %zu + 1: "
                           "use a smaller --seq or more text",
                        t->name, t->n_train, seq);
    }
    return 0;
}

void texts_names(const Texts *d, char *to, size_t size) {
    *to = 0;
    for (int i = 0; i < d->n_files; i++) {
        const char *name = d->texts[i].name, *slash = strrchr(name, '/');
        size_t used = strlen(to);
        if (strcmp(name, "-") == 0) name = "standard input";
        snprintf(to + used, size - used, "%s%s", used ? ", " : "", slash ? slash + 1 : name);
    }
}
