// start.c: what a model starts with: fresh parameters, and the text that it will be trained on.
// Read model.h first.
#include <math.h>
#include <stdlib.h>

#include "model.h"
#include "support/arithmetic.h"

// Two normal numbers of one Philox draw, by Box and Muller.
static void normal_pair(Philox r, double out[2]) {
    // In double, on the host: every backend is given the same values.
    double u = (r.v[0] + 1.0) / 4294967296.0;  // in (0,1]: the logarithm is finite
    double angle = 6.283185307179586 * r.v[1] / 4294967296.0, radius = sqrt(-2 * log(u));
    out[0] = radius * cos(angle);
    out[1] = radius * sin(angle);
}

int model_init_params(Model *m, uint64_t seed, Error *e) {
    real *host = calloc(m->n_params, sizeof *host);
    if (!host) return fail(e, "out of host memory");
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        // Terms in the sum of one output: K*C of a conv (K,C,O), C of a linear layer (C,O).
        int fan_in = t->ndim == 3 ? t->dims[0] * t->dims[1] : t->dims[0];
        // Small where logits are made, so that a fresh model finds all bytes about equally likely.
        bool at_bytes = t->offset == m->embedding ||
                        (!m->config.tie && t->offset == m->head.weight);
        double std = at_bytes ? 0.02 : 1 / sqrt((double)fan_in);
        // As PyTorch's: where neither a LayerNorm follows nor logits are made.
        if (t->offset == m->embedding && m->config.no_norm_in && !m->config.tie) std = 1;
        for (size_t j = 0; j < t->size; j++) {
            size_t k = t->offset + j;
            // A draw gives two normal numbers, values k = 2i and 2i+1 of the parameters: each is a
            // function of seed and k.
            double pair[2] = {t->start, t->start};
            if (t->decay)
                normal_pair(philox(seed, (uint32_t)(k / 2), (uint32_t)(k / 2 >> 32), 0, RNG_INIT),
                            pair);
            host[k] = (real)(pair[k % 2] * (t->decay ? std : 1));
        }
    }
    model_write(m, m->params, host);
    // The average begins at the parameters, not at 0: it needs no bias correction.
    if (m->ema) model_write(m, m->ema, host);
    free(host);
    return 0;
}

int model_set_corpus(Model *m, const uint8_t *text, const uint64_t *length, int parts, Error *e) {
    if (m->text) return fail(e, "this model has its training text already");
    // One allocation: starts (parts), windows (parts+1), then the bytes.
    size_t index = (2 * (size_t)parts + 1) * sizeof(uint64_t), bytes = 0;
    uint64_t *host = malloc(index);
    if (!host) return fail(e, "out of host memory");
    uint64_t *starts = host, *windows = host + parts;
    windows[0] = 0;
    for (int i = 0; i < parts; i++) {
        starts[i] = bytes;
        bytes += length[i];
        // A window is T+1 bytes, T inputs and the last one's target: it can start at bytes
        // 0 .. length-T-1 of its text, and so never spans two texts.
        uint64_t fit = length[i] > (uint64_t)m->T ? length[i] - (uint64_t)m->T : 0;
        windows[i + 1] = windows[i] + fit;
    }
    bool ok = windows[parts] > 0;
    if (!ok) {
        fail(e, "the training text is shorter than one window (--seq %d + 1 bytes): use a smaller "
                "--seq or more text", m->T);
    } else if (!(m->text = m->backend->alloc(index + bytes))) {
        ok = false;
        fail(e, "not enough %s memory for %zu bytes of training text", m->backend->name, bytes);
    } else {
        // Listed among the roles, so that model_free gives it back.
        m->memory[m->n_memory++] = (MemoryRole){"training text", index + bytes, &m->text};
        m->backend->upload(m->text, host, index);
        m->backend->upload((char *)m->text + index, text, bytes);
        m->corpus = (Corpus){.text = (const uint8_t *)m->text + index,
                             .starts = m->text,
                             .windows = (const uint64_t *)m->text + parts,
                             .n_windows = windows[parts], .parts = parts};
    }
    free(host);
    return ok ? 0 : -1;
}
