// describe.c: what a model consists of, as lines to read. Read describe.h first.
#include "support/describe.h"

#include <string.h>

#include "support/gpu.h"

// name (a,b,c) decayed
void print_tensor(FILE *f, const Tensor *t) {
    fprintf(f, "  %-28s (%d", t->name, t->dims[0]);
    for (int j = 1; j < t->ndim; j++) fprintf(f, ",%d", t->dims[j]);
    fprintf(f, ")%s\n", t->decay ? " decayed" : "");
}

// " (K,C,O)" and, where that is not the tensor backend's fastest kernel, which one runs it.
static void print_matrix(FILE *f, const Model *m, const Tensor *t) {
    int K = t->ndim == 3 ? t->dims[0] : 1, C = t->dims[t->ndim - 2], O = t->dims[t->ndim - 1];
    fprintf(f, " (");
    if (t->ndim == 3) fprintf(f, "%d,", K);
    fprintf(f, "%d,%d)", C, O);
    if (!m->backend || strcmp(m->backend->name, "tensor") != 0) return;
    const char *rung = tensor_rung((ConvShape){m->B, m->T, C, O, K, t->dil});
    if (strcmp(rung, "wgmma") != 0) fprintf(f, " by %s", rung);
}

// One line: a unit's text, formula, matrices, parameters and reach; times: how many stand in a row.
static void print_unit(FILE *f, const Model *m, const Unit *u, int times) {
    char text[256], own[32], row[32] = "";
    size_t params = 0;
    int n = snprintf(own, sizeof own, "units.%d.", u->index);
    if (times > 1) snprintf(row, sizeof row, "%dx ", times);
    fprintf(f, "  %s%-14s %-26s", row, unit_text(u, m->config.activation, text, sizeof text),
            u->mixer->formula);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (strncmp(t->name, own, (size_t)n) != 0) continue;
        params += t->size;
        if (t->ndim > 1) print_matrix(f, m, t);
    }
    fprintf(f, "  %zu parameters, reaches %lld back\n", params,
            (long long)u->mixer->reach(u));
}

// How often the `period` units from u on repeat themselves, at least 1.
static int repeats(const Model *m, int u, int period) {
    int end = u + period;
    while (end < m->U && unit_same(&m->units[end], &m->units[end - period])) end++;
    return (end - u) / period;
}

// The stack, what is repeated once: at every place the period that covers most.
static void print_stack(FILE *f, const Model *m) {
    for (int u = 0; u < m->U;) {
        int best = 1, times = repeats(m, u, 1);
        for (int period = 2; period <= 16 && u + period <= m->U; period++) {
            int n = repeats(m, u, period);
            if (n > 1 && n * period > times * best) best = period, times = n;
        }
        if (times > 1) fprintf(f, "%d times:\n", times);
        for (int i = 0, n; i < best; i += n) {
            for (n = 1; i + n < best && unit_same(&m->units[u + i], &m->units[u + i + n]);) n++;
            print_unit(f, m, &m->units[u + i], n);
        }
        u += best * times;
    }
}

void print_layers(FILE *f, const Model *m) {
    const Config *c = &m->config;
    fprintf(f, c->no_norm_in ? "bytes -> Embedding (%d,%d) ->\n"
                             : "bytes -> LayerNorm(Embedding (%d,%d)) ->\n", V, c->channels);
    print_stack(f, m);
    if (c->skips) fprintf(f, "skips between layers of %d units\n", c->skips);
    fprintf(f, c->tie ? "-> LayerNorm = latents (%d) -> the embedding, transposed\n"
            : c->no_norm_out ? "-> Linear = latents (%d) -> Linear\n"
                             : "-> LayerNorm -> Linear = latents (%d) -> Linear\n", c->latent);
}
