// scan.c: a model over a file, in windows side by side. Read scan.h first.
//
// A file is cut into windows, and as many windows as there are streams are fed side by side. An
// output sees RF bytes, so a window's first RF-1 outputs are left to the window before it, and all
// others are exact. Only the first window has nothing before it: there every output counts.
//
//   window 0   [RF-1 | SEGMENT ]
//   window 1           [RF-1 | SEGMENT ]        reads RF-1 + SEGMENT bytes, gives SEGMENT outputs
//   window 2                     [RF-1 | SEGMENT ]
//
// Windows of T bytes, S apart, that each are a text of their own are the same with S for SEGMENT
// and T - S for RF-1: now outputs may lack some of what the model would see, as where a text is
// scored by a model that holds T bytes and no more.
#include "support/scan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    size_t context, segment;  // RF-1, SEGMENT; T - S, S
    bool own;                 // a window is a text of its own
    uint8_t *bytes;           // of the windows in hand
    size_t have;
    real *losses, *latents, *logits, *z;
} Windows;

static int open_windows(Windows *w, const Stream *s, size_t window, size_t stride, bool latents,
                        Error *e) {
    size_t D = (size_t)s->table.config.latent, S = (size_t)s->capacity;
    *w = (Windows){.context = (size_t)config_receptive_field(&s->table.config) - 1};
    // Long enough that the context costs little, short enough for 64 MB of latents.
    size_t most = ((size_t)1 << 24) / (S * D);
    w->segment = 16 * w->context > 1024 ? 16 * w->context : 1024;
    if (window) w->own = true, w->context = window - stride, w->segment = stride;
    if (latents && w->segment > most) w->segment = most ? most : 1;
    size_t outputs = w->context + S * w->segment;
    double need = (double)outputs * (1 + sizeof(real) * (latents ? 1. + (double)D : 1.));
    double weights, rings, there = (double)cpu_backend.available();
    // The rings grow into their memory, so that it still counts as free.
    if (stream_memory(&s->table.config, s->capacity, &weights, &rings, e)) return -1;
    if (need + rings > there)
        return fail(e, "windows of %zu bytes, %zu of them context, need %.3g GB of memory beside "
                       "%.3g GB for what the units keep of the past, and %.3g GB are free",
                    w->context + w->segment, w->context, need / 1e9, rings / 1e9, there / 1e9);
    w->bytes = malloc(outputs + 1);
    w->losses = malloc(outputs * sizeof(real));
    w->logits = malloc(S * V * sizeof(real));
    w->z = malloc(S * D * sizeof(real));
    if (latents) w->latents = malloc(outputs * D * sizeof(real));
    if (!w->bytes || !w->losses || !w->logits || !w->z || (latents && !w->latents))
        return fail(e, "out of memory for windows of %zu bytes: %.3g GB", w->context + w->segment,
                   need / 1e9);
    return 0;
}

// All outputs of the windows in hand, which begin at `base` of the file. `skip`: outputs of the
// first window that are not wanted.
static void run_windows(Windows *w, Stream *s, uint64_t base, size_t skip) {
    size_t D = (size_t)s->table.config.latent, end = w->context + w->segment;
    size_t windows = w->have > end ? (w->have - w->context + w->segment - 1) / w->segment : 1;
    int ids[MAX_STREAMS], targets[MAX_STREAMS];
    real losses[MAX_STREAMS];
    if (windows > (size_t)s->capacity) windows = (size_t)s->capacity;
    stream_begin(s, (int)windows);
    for (size_t j = 0; j < windows && !w->own; j++) s->starts[j] = base + j * w->segment;
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

int64_t scan(Stream *s, FILE *f, const char *name, size_t window, size_t stride, bool latents,
             Visit visit, void *arg, void (*progress)(uint64_t done), Error *e) {
    Windows w = {0};
    int status = open_windows(&w, s, window, stride, latents, e);
    size_t outputs = w.context + (size_t)s->capacity * w.segment, keep = 0;
    uint64_t base = 0;  // where w.bytes begins in the file
    while (!status) {
        w.have = keep + fread(w.bytes + keep, 1, outputs + 1 - keep, f);
        if (ferror(f)) status = fail(e, "cannot read %.200s: %s", name, strerror(errno));
        if (status) break;
        size_t skip = base ? w.context : 0, n = w.have < outputs ? w.have : outputs;
        if (n > skip) {
            run_windows(&w, s, base, skip);
            Part part = {.first = base + skip, .n = n - skip, .bytes = w.bytes + skip,
                         .losses = w.losses + skip,
                         .scored = n - skip - (w.have == n ? 1 : 0)};
            if (latents) part.latents = w.latents + skip * (size_t)s->table.config.latent;
            visit(arg, &part);
        }
        progress(base + w.have);
        if (w.have < outputs + 1) break;
        size_t done = outputs - w.context;
        keep = w.have - done;
        memmove(w.bytes, w.bytes + done, keep);
        base += done;
    }
    uint64_t total = base + w.have;
    free(w.bytes);
    free(w.losses);
    free(w.latents);
    free(w.logits);
    free(w.z);
    return status ? status : (int64_t)total;
}
