// scan.h: a model over a file of any length: the loss and the latents of every byte.
#ifndef SCAN_H
#define SCAN_H

#include <stdio.h>

#include "support/stream.h"

// Outputs at n consecutive bytes, the first of which is byte `first` of the file.
typedef struct {
    uint64_t first;
    size_t n, scored;      // scored = n, but n - 1 at the end: nothing follows the last byte
    const uint8_t *bytes;  // (n, and one more where scored = n)
    const real *losses;    // (scored) of the byte that follows: losses[i] is that of bytes[i+1]
    const real *latents;   // (n,D), NULL if not asked for
} Part;
typedef void (*Visit)(void *arg, const Part *part);

// Shows `visit` every output of the rest of f in order; `progress` is told the bytes read. window
// 0: every output sees all that the model would see; else windows of so many bytes, each a text of
// its own, begin `stride` bytes after each other. Returns the number of bytes, or -1: there is no
// memory, or f cannot be read. name: of f, for messages.
int64_t scan(Stream *s, FILE *f, const char *name, size_t window, size_t stride, bool latents,
             Visit visit, void *arg, void (*progress)(uint64_t done), Error *e);

#endif
