// score.c: what a text costs: the model's windows over it. Read model.h first.
#include <math.h>
#include <stdlib.h>

#include "model.h"

// Window w scores text[from + w*stride ..]: `stride` bytes, the first of which is given `context`
// bytes. It starts that many before, or with the text.
typedef struct {
    size_t start;         // first input byte
    size_t score, count;  // scored bytes: text[score .. score+count-1]
} Window;

static Window window_at(size_t n, size_t from, size_t w, size_t context, size_t stride) {
    size_t score = from + w * stride;
    Window r = {.score = score, .count = n - score < stride ? n - score : stride};
    r.start = score > context ? score - context : 0;
    return r;
}

// anew: every window is a text of its own. Else positions count from the beginning of `text`.
static int score_windows(Model *m, const uint8_t *text, size_t n, size_t from, size_t context,
                         size_t stride, bool anew, double *nats, ScoreStop stop, Error *e) {
    size_t N = (size_t)m->B * (size_t)m->T, T = (size_t)m->T;
    if (context < 1 || stride < 1 || context > T || stride > T || context + stride - 1 > T)
        return fail(e, "windows of %zu bytes and a stride of %zu need a model that holds %zu, not "
                       "%d", context, stride, context + stride - 1, m->T);
    int *ids = calloc(2 * N, sizeof *ids), *targets = ids + N;
    uint64_t *starts = calloc((size_t)m->B, sizeof *starts);
    real *losses = calloc(N, sizeof *losses);
    *nats = 0;
    if (!ids || !losses || !starts) {
        free(ids), free(losses), free(starts);
        return fail(e, "out of host memory");
    }
    if (from == 0 && n > 0) {  // nothing stands before the first byte: all V are equally likely
        *nats = log(V);
        from = 1;
    }
    size_t windows = from < n ? (n - from + stride - 1) / stride : 0, base = from;
    size_t w0 = 0;
    for (; w0 < windows && !(stop && stop(w0 * stride)); w0 += (size_t)m->B) {
        // What no window fills is not scored and, the model being causal, not seen by what is.
        for (size_t i = 0; i < N; i++) ids[i] = 0, targets[i] = -1;
        size_t here = windows - w0 < (size_t)m->B ? windows - w0 : (size_t)m->B;
        for (size_t b = 0; b < here; b++) {
            Window v = window_at(n, base, w0 + b, context, stride);
            starts[b] = anew ? 0 : v.start;
            for (size_t i = v.start; i + 1 < v.score + v.count; i++) {
                // The output at byte i is for byte i+1.
                ids[b * T + i - v.start] = text[i];
                if (i + 1 >= v.score) targets[b * T + i - v.start] = text[i + 1];
            }
        }
        m->backend->upload(m->starts, starts, (size_t)m->B * sizeof *starts);
        model_losses(m, ids, targets, losses);
        for (size_t b = 0; b < here; b++) {  // in the order of the text, whatever the batch
            Window v = window_at(n, base, w0 + b, context, stride);
            for (size_t i = v.score; i < v.score + v.count; i++)
                *nats += losses[b * T + i - 1 - v.start];
        }
    }
    m->backend->zero(m->starts, (size_t)m->B * sizeof *starts);
    free(ids), free(losses), free(starts);
    return w0 < windows ? 1 : 0;
}

int model_score_windows(Model *m, const uint8_t *text, size_t n, size_t from, size_t context,
                        size_t stride, double *nats, ScoreStop stop, Error *e) {
    return score_windows(m, text, n, from, context, stride, true, nats, stop, e);
}

int model_score(Model *m, const uint8_t *text, size_t n, size_t from, double *nats,
                ScoreStop stop, Error *e) {
    int64_t context = config_receptive_field(&m->config);
    if (context > m->T)
        return fail(e, "scoring needs windows of at least the receptive field, %lld bytes, not %d",
                    (long long)context, m->T);
    // Outputs context-1 .. T-1 of a window see all that they can reach: T - context + 1 of them.
    return score_windows(m, text, n, from, (size_t)context, (size_t)m->T - (size_t)context + 1,
                         false, nats, stop, e);
}

// Places in the text beyond the length of a training window (config.window, if it was not chosen
// otherwise) were never trained: where they count, windows of that length begin anew, half of each
// being context.
static size_t part_context(const Model *m, size_t *stride) {
    size_t context = (size_t)config_receptive_field(&m->config), T = (size_t)m->config.window;
    *stride = (size_t)m->T - context + 1;
    if (!config_absolute(&m->config)) return context;
    if (T == 0 || T > (size_t)m->T) T = (size_t)m->T;
    *stride = (T + 1) / 2;
    return T - *stride + 1;
}

size_t score_part_pass(const Model *m) {
    size_t stride;
    part_context(m, &stride);
    return (size_t)m->B * stride;
}

int model_score_part(Model *m, const uint8_t *text, size_t n, size_t from, size_t part,
                     double *nats, size_t *scored, ScoreStop stop, Error *e) {
    size_t pass = score_part_pass(m), stride, context = part_context(m, &stride);
    bool anew = config_absolute(&m->config);
    size_t all = n - from;
    if (part < all && from == 0) from = 1, all--;  // what byte 0 costs says nothing of the model
    size_t spans = part < all ? (part + pass - 1) / pass : 1;
    size_t length = part < all ? part / (spans ? spans : 1) : all;
    for (size_t k = 0; k < spans; k++) {
        size_t start = from + k * (all / spans);
        double sum;
        int status = score_windows(m, text, start + length, start, context, stride, anew, &sum,
                                   stop, e);
        if (status) return status;
        *nats += sum;
        *scored += length;
    }
    return 0;
}
