// texts.h: what is trained on and what is held out: files or the built-in corpus, split and joined.
#ifndef TEXTS_H
#define TEXTS_H

#include "support/options.h"

typedef struct {
    const char *name;
    uint8_t *bytes;
    size_t n, n_train;  // bytes[n_train..] are held out
} Text;

typedef struct {
    Text *texts;  // the last one is --val, wholly held out, where that is given
    int n, n_files;
    uint8_t *train;  // the training parts, back to back, until the model has them
    uint64_t *lengths;
    size_t n_train, n_held_out;
    double floor;   // entropy in bits per byte, where it is known; else 0
    uint64_t hash;  // of all bytes and where they are split: what a resumed run must find again
} Texts;

// Reads all files (none: the built-in corpus), splits them and joins the training parts. The last
// part val_frac of each is held out, or the text `val` instead. A text without a window of seq + 1
// bytes is refused.
int texts_load(Texts *d, const Cli *cli, const char *val, double val_frac, size_t seq, Error *e);
// The names of what is trained on, without folders, cut where they are longer than `to`.
void texts_names(const Texts *d, char *to, size_t size);
// -1 where that much memory is not free. Linux grants memory that it does not have and kills the
// program later: so this comes before malloc.
int host_memory(size_t bytes, const char *what, Error *e);

#endif
