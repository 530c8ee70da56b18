// model.c: the model as one graph of units: its tensors, its memory, forward, backward and steps.
//
// Read model.h first. Layers are called only through the table of operations (support/backend.h),
// so this same code runs on every backend; what they compute stands in layers.c. What a unit does
// in its middle is its mixer's business: this file never asks which mixer that is.
#include "model.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mixers/list.h"
#include "support/arithmetic.h"
#include "support/weight_queue.h"

int fail(Error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    return -1;
}

// ---- Configuration -----------------------------------------------------------------------------

Config config_paper(void) {
    return (Config){.channels = 256, .latent = 256, .activation = ACT_gelu,
                    .units = "3x(block:3:1:2:4)"};
}

int config_check(const Config *c, Error *e) {
    // The bounds keep every product of three sizes inside 63 bits and every size inside an int.
    if (c->channels < 1 || c->channels > MAX_CHANNELS)
        return fail(e, "channels is %d, expected 1 to %d", c->channels, MAX_CHANNELS);
    if (c->latent < 1 || c->latent > MAX_CHANNELS)
        return fail(e, "latent is %d, expected 1 to %d", c->latent, MAX_CHANNELS);
    if (c->window < 0 || c->window > MAX_WINDOW)
        return fail(e, "window is %d, expected 0 (which is 512) to %d", c->window, MAX_WINDOW);
    if ((int)c->activation < 0 || c->activation >= N_ACTIVATIONS)
        return fail(e, "activation is number %d, expected below %d", (int)c->activation,
                    N_ACTIVATIONS);
    // Asked as "not within", which refuses a NaN, too.
    if (!(c->softcap >= 0 && c->softcap <= 1e6f))
        return fail(e, "softcap is %g, expected 0 (none) to 1e6", (double)c->softcap);
    if (c->tie && c->latent != c->channels)
        return fail(e, "a tied head needs latent = channels, got %d and %d: leave --latent out or "
                       "add --no-tie", c->latent, c->channels);
    if (c->tie && c->no_norm_out)
        return fail(e, "a tied head needs the last LayerNorm: leave --no-norm-out out or add "
                       "--no-tie");
    if (!memchr(c->units, 0, sizeof c->units))
        return fail(e, "units is longer than %d characters: use groups, Nx(...)", UNITS_TEXT - 1);
    Unit *units = malloc(MAX_UNITS * sizeof *units);
    if (!units) return fail(e, "out of host memory");
    int n = units_parse(c->units, c->channels, c->activation, c->window, units, e), others = n;
    while (others > 0 && units[n - others].mixer->input) others--;
    free(units);
    if (n < 0) return -1;
    // A lone layer has none to mirror it.
    if (c->skips < 0 || (c->skips > 0 && others % c->skips) || c->skips > others / 2)
        return fail(e, "skips is %d, expected 0 (none) or a divisor of the %d units that are no "
                       "inputs, at most half of them", c->skips, others);
    return 0;
}

// ---- The table of tensors ----------------------------------------------------------------------

void add_tensor(Model *m, const Unit *u, size_t *where, const char *name, int ndim, int d0, int d1,
                int d2) {
    enum { ROOM = 64 };
    if (m->n_tensors % ROOM == 0) {
        Tensor *more = realloc(m->tensors, (size_t)(m->n_tensors + ROOM) * sizeof *more);
        if (!more) {
            m->n_params = SIZE_MAX;  // place_tensors sees it and fails
            return;
        }
        m->tensors = more;
    }
    Tensor *t = &m->tensors[m->n_tensors++];
    *t = (Tensor){.dims = {d0, d1, d2}, .ndim = ndim, .dil = 1, .decay = ndim > 1,
                  .where = where};
    size_t length = strlen(name);
    // Of vectors only gains are named so. They are 1 in a fresh model, biases 0.
    t->start = length > 7 && strcmp(name + length - 7, ".weight") == 0;
    if (u)
        snprintf(t->name, sizeof t->name, "units.%d.%s", u->index, name);
    else
        snprintf(t->name, sizeof t->name, "%s", name);
    t->size = (size_t)d0 * (ndim > 1 ? (size_t)d1 : 1) * (ndim > 2 ? (size_t)d2 : 1);
}

static void add_norm(Model *m, const Unit *u, Norm *n, const char *name) {
    char full[40];
    snprintf(full, sizeof full, "%s.weight", name);
    add_tensor(m, u, &n->gain, full, 1, m->config.channels, 0, 0);
    snprintf(full, sizeof full, "%s.bias", name);
    add_tensor(m, u, &n->bias, full, 1, m->config.channels, 0, 0);
}

void add_linear(Model *m, const Unit *u, Linear *l, const char *name, bool linear) {
    char full[40];
    snprintf(full, sizeof full, "%s.weight", name);
    if (linear)
        add_tensor(m, u, &l->weight, full, 2, l->C, l->O, 0);
    else
        add_tensor(m, u, &l->weight, full, 3, l->K, l->C, l->O);
    if (m->n_tensors > 0) m->tensors[m->n_tensors - 1].dil = l->dil;
    snprintf(full, sizeof full, "%s.bias", name);
    l->bias = NO_BIAS;
    if (!m->config.no_bias) add_tensor(m, u, &l->bias, full, 1, l->O, 0, 0);
}

void add_table(Model *m, const Unit *u, size_t *where, const char *name, int rows, int D) {
    add_tensor(m, u, where, name, 2, rows, D, 0);
    if (m->n_tensors > 0) m->tensors[m->n_tensors - 1].table = true;
}

// Sorts the tensors, matrices first, each kind in the order in which forward uses them, and gives
// them their offsets: "is it decayed" is then one comparison of offsets, and names and offsets of a
// model follow from its configuration alone.
static int place_tensors(Model *m) {
    Tensor *sorted = malloc((size_t)m->n_tensors * sizeof *sorted);
    int n = 0;
    if (!sorted || m->n_params) {
        free(sorted);
        return -1;
    }
    for (int matrices = 1; matrices >= 0; matrices--)
        for (int i = 0; i < m->n_tensors; i++) {
            if (m->tensors[i].decay != matrices) continue;
            Tensor *t = &sorted[n++];
            *t = m->tensors[i];
            *t->where = t->offset = m->n_params;
            m->n_params += t->size;
            if (matrices) m->n_decay = m->n_params;
        }
    free(m->tensors);
    m->tensors = sorted;
    return 0;
}

// Units with their data, from the configuration's text.
static int make_units(Model *m, Error *e) {
    const Config *c = &m->config;
    Unit *units = calloc(MAX_UNITS, sizeof *units), *fitting;
    if (!units) return fail(e, "out of host memory");
    m->U = units_parse(c->units, c->channels, c->activation, c->window, units, e);
    if (m->U < 0) m->U = 0;
    fitting = m->U ? realloc(units, (size_t)m->U * sizeof *units) : NULL;
    if (!fitting) {
        free(units);
        m->U = 0;
        return -1;
    }
    m->units = fitting;
    for (int u = 0; u < m->U; u++) {
        m->units[u].data = calloc(1, m->units[u].mixer->data_bytes);
        if (!m->units[u].data) return fail(e, "out of host memory");
    }
    return 0;
}

int model_describe(Model *m, Error *e) {
    const Config *c = &m->config;
    int C = c->channels, D = c->latent;
    if (make_units(m, e)) {
        model_free(m);
        return -1;
    }
    add_table(m, NULL, &m->embedding, "embedding.weight", V, C);
    if (!c->no_norm_in) add_norm(m, NULL, &m->norm_in, "norm_in");
    for (int i = 0; i < m->U; i++) {
        Unit *u = &m->units[i];
        if (u->mixer->norm) add_norm(m, u, &u->norm, "norm");
        if (u->mixer->describe) u->mixer->describe(m, u);
        u->dropout = m->dropouts;
        m->dropouts += u->dropouts;
    }
    skips_describe(m);
    if (!c->no_norm_out) add_norm(m, NULL, &m->norm_out, "norm_out");
    // A tied head is the embedding read backwards, and the latents are the last norm's output.
    m->proj = (Linear){.K = 1, .C = C, .O = D, .dil = 1};
    m->head = (Linear){.K = 1, .C = D, .O = V, .dil = 1};
    if (!c->tie) {
        add_linear(m, NULL, &m->proj, "proj", true);
        add_linear(m, NULL, &m->head, "head", true);
    }
    m->x = calloc((size_t)m->U + 1, sizeof *m->x);
    if (place_tensors(m) || !m->x) {
        model_free(m);
        return fail(e, "out of host memory");
    }
    return 0;
}

// ---- Memory ------------------------------------------------------------------------------------

// Lays one activation array after another into m->activations; with base NULL it only counts.
struct Arena {
    char *base;
    size_t used;
};

void *place(Arena *a, size_t bytes) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 255) / 256 * 256;  // every array starts on a 256-byte line: wide loads
    return p;
}

size_t rows_bytes(const Model *m, int channels) {
    return (size_t)m->B * (size_t)m->T * (size_t)channels * m->backend->act_bytes;
}

act *place_waiting(Model *m, Arena *a) {
    size_t bytes = rows_bytes(m, m->config.channels);
    if (m->side_stream) return place(a, bytes);
    int i = m->n_waiting++;
    if (i == 2 || i == 3) m->spare[i - 2] = place(a, bytes);
    return i % 4 == 0 ? m->h : i % 4 == 1 ? m->z : m->spare[i % 4 - 2];
}

// Channels of z: of the latents, and of what the widest mixer needs.
static int width_of_z(const Model *m) {
    size_t most = (size_t)m->config.latent;
    if (m->config.channels > m->config.latent) most = (size_t)m->config.channels;
    for (int u = 0; u < m->U; u++) {
        const Mixer *mixer = m->units[u].mixer;
        if (mixer->width && mixer->width(&m->units[u]) > most) most = mixer->width(&m->units[u]);
    }
    return (int)most;
}

// Gives every activation array its place in a; returns the bytes that all take.
static size_t place_activations(Model *m, Arena a, bool training) {
    size_t N = (size_t)m->B * (size_t)m->T, C = rows_bytes(m, m->config.channels);
    size_t wide = rows_bytes(m, width_of_z(m));
    m->n_waiting = 0;
    bool bare = false;  // a unit that does not end in an activation
    // Inference keeps nothing but what a skip adds later: the stream alternates between two arrays.
    act *two[2];
    for (int u = 0, n = 0; u <= m->U; u++) {
        bool kept = training || (u < m->U && m->units[u].skip.to);
        m->x[u] = kept || n < 2 ? place(&a, C) : two[n % 2];
        if (!kept) two[n++ % 2] = m->x[u];
    }
    m->h = place(&a, C);
    m->z = place(&a, wide);
    // The side stream may read what it was given to the end of a pass: dh and dz then lie apart.
    m->dh = m->side_stream ? place(&a, C) : m->h;
    m->dz = m->side_stream ? place(&a, wide) : m->z;
    for (int i = 0; i < m->U && training; i++) {
        Unit *u = &m->units[i];
        if (u->mixer->place) u->mixer->place(m, u, &a);
        u->dtail = u->tail;
        u->h = m->x[i];
        bare = bare || (!u->has_tail && u->dropouts > 0);
        if (u->skip.from) u->skip.kept = place(&a, C);
    }
    m->dx = m->x[m->U];
    if (bare && m->training.dropout > 0) m->dy = place(&a, C);
    m->logits = m->dlogits = place(&a, rows_bytes(m, V));
    m->ids = place(&a, N * sizeof *m->ids);
    m->targets = place(&a, N * sizeof *m->targets);
    m->losses = place(&a, N * sizeof *m->losses);
    m->starts = place(&a, (size_t)m->B * sizeof *m->starts);
    m->ones = place(&a, (size_t)m->n_ones * sizeof *m->ones);
    m->sink = place(&a, (size_t)m->n_ones * sizeof *m->sink);
    return a.used;
}

// Notes that a role needs `bytes` and where its address goes; allocate() then takes all at once.
static void plan(Model *m, const char *role, size_t bytes, void *address) {
    // At most ten: nine in model_open, and the training text.
    m->memory[m->n_memory++] = (MemoryRole){.role = role, .bytes = bytes, .address = address};
}

size_t model_memory(const Model *m) {
    size_t sum = 0;
    for (int i = 0; i < m->n_memory; i++) sum += m->memory[i].bytes;
    return sum;
}

// All planned roles, zeroed; or none, and what is missing.
static int allocate(Model *m, Error *e) {
    const Backend *be = m->backend;
    size_t need = model_memory(m), there = be->available();
    bool enough = need <= there;
    for (int i = 0; i < m->n_memory && enough; i++) {
        MemoryRole *r = &m->memory[i];
        // The field is a real *, a void * or a StepState *. To store through a void ** would break
        // C's aliasing rules; copying the pointer's bytes does not.
        void *p = be->alloc(r->bytes);
        memcpy(r->address, &p, sizeof p);
        enough = p != NULL;
        if (enough) be->zero(p, r->bytes);
    }
    if (enough) return 0;
    return fail(e, "needs %.3g GB of %s memory, and %.3g GB are free: use %sa smaller --batch "
                   "(with --accum), --seq or --channels",
                (double)need / 1e9, be->name, (double)there / 1e9,
                m->training.at_once ? "--no-at-once, or " : "");
}

// Workspace is shared by all layers, which run one after another: the largest need counts. Every
// matrix of the table is a layer, the embedding among them, but not what inputs look up.
static size_t work_needed(const Model *m) {
    size_t N = (size_t)m->B * (size_t)m->T, most = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (t->ndim < 2 || (t->table && t->offset != m->embedding)) continue;
        int K = t->ndim == 3 ? t->dims[0] : 1, C = t->dims[t->ndim - 2], O = t->dims[t->ndim - 1];
        size_t need = m->backend->work_bytes(N, K, C > O ? C : O, m->n_params);
        if (need > most) most = need;
    }
    for (int u = 0; u < m->U; u++) {
        const Mixer *mixer = m->units[u].mixer;
        size_t need = mixer->work ? mixer->work(m, &m->units[u]) : 0;
        if (need > most) most = need;
    }
    if (m->config.skips || m->config.no_norm_in) {
        int rows = m->config.no_norm_in ? V : 0;
        size_t need = m->backend->inputs.work_bytes(N, rows, m->config.channels);
        if (need > most) most = need;
    }
    return most;
}

int model_open(Model *m, const Backend *backend, const Config *config, int B, int T,
               const Training *training, Error *e) {
    *m = (Model){.backend = backend, .config = *config, .B = B, .T = T};
    if (config_check(config, e)) return -1;
    // With the bounds of config_check and N at most 2^27 no sum of sizes leaves 64 bits.
    if (B < 1 || T < 1 || (int64_t)B * T > 1 << 27)
        return fail(e, "a pass of %d x %d bytes, expected 1 to %d bytes: use --accum", B, T,
                    1 << 27);
    if (training) {
        m->training = *training;
        // The step's batch stays passes * B windows, and half the windows in a pass need half the
        // activations. An odd B stays whole.
        bool halve = backend->pass_rows && !training->at_once;
        size_t most = halve ? backend->pass_rows((size_t)B * T) : SIZE_MAX;
        for (; m->B % 2 == 0 && (size_t)m->B * T > most; m->B /= 2) m->training.passes *= 2;
        m->side_stream = (size_t)m->B * T <= backend->side_rows;
    }
    if (model_describe(m, e)) return -1;
    size_t n = m->n_params * sizeof(real), work = work_needed(m);
    plan(m, "parameters", n, &m->params);
    if (training) {
        plan(m, "gradients", n, &m->grads);
        plan(m, "first moments", n, &m->m);
        plan(m, "second moments", n, &m->v);
        if (training->hyper.ema > 0) plan(m, "average weights", n, &m->ema);
    }
    plan(m, "activations", place_activations(m, (Arena){NULL, 0}, training != NULL),
         &m->activations);
    plan(m, "workspace", work, &m->work);
    if (m->side_stream) plan(m, "side stream's workspace", work, &m->side_work);
    plan(m, "training state", sizeof *m->state, &m->state);
    if (allocate(m, e)) {
        model_free(m);
        return -1;
    }
    // The same walk again, now with memory under it.
    place_activations(m, (Arena){m->activations, 0}, training != NULL);
    if (!m->side_stream) m->side_work = m->work;
    const real one = 1;
    for (int i = 0; i < m->n_ones; i++) backend->upload(m->ones + i, &one, sizeof one);
    return 0;
}

void model_free(Model *m) {
    const Backend *be = m->backend;
    // A model that was only described (model_describe) has no backend and no memory.
    if (be) {
        if (m->graph) be->free_graph(m->graph);
        for (int i = 0; i < m->n_memory; i++) {
            // NULL where allocate() gave up before this role.
            void *p;
            memcpy(&p, m->memory[i].address, sizeof p);
            if (p) be->free(p);
        }
    }
    for (int u = 0; u < m->U; u++) free(m->units[u].data);
    free(m->units);
    free(m->tensors);
    free(m->x);
    *m = (Model){0};
}

void model_read(const Model *m, real *host, const real *role) {
    m->backend->download(host, role, m->n_params * sizeof(real));
}

void model_write(Model *m, real *role, const real *host) {
    m->backend->upload(role, host, m->n_params * sizeof(real));
    if (role == m->params && m->backend->sync_params) m->backend->sync_params(role, m->n_params);
}

// ---- Forward -----------------------------------------------------------------------------------

// The bound below which a random number of so many values drops with probability p.
// values: 256 where dropout looks at 8 bits, 65536 where byte dropout looks at 16.
static uint32_t threshold_of(float p, int values) { return (uint32_t)(p * (float)values + 0.5f); }

// Every dropout of the model draws under a purpose of its own, every pass from other rows of the
// batch: no number is used twice, and how a batch is cut into passes does not change what is
// dropped.
Dropout unit_dropout(const Model *m, const Unit *u, int i, const Pass *pass) {
    uint32_t threshold = pass ? threshold_of(m->training.dropout, 256) : 0;
    return (Dropout){.threshold = threshold, .scale = 256.0f / (float)(256 - threshold),
                     .seed = m->training.seed,
                     .purpose = RNG_DROPOUT + (uint32_t)(u->dropout + i),
                     .first = pass ? pass->first * (uint64_t)m->T : 0, .state = m->state};
}

// With one tap nothing reaches into another row: then the whole pass is one long sequence.
ConvShape linear_shape(const Model *m, const Linear *l) {
    if (l->K == 1) return (ConvShape){1, m->B * m->T, l->C, l->O, 1, 1};
    return (ConvShape){m->B, m->T, l->C, l->O, l->K, l->dil};
}

real *bias_of(real *values, const Linear *l) {
    return l->bias == NO_BIAS ? NULL : values + l->bias;
}

void linear_forward(Model *m, const Linear *l, const act *x, Epilogue e) {
    m->backend->conv_forward(x, m->params + l->weight, bias_of(m->params, l), e, linear_shape(m, l),
                             m->work);
}

void linear_backward(Model *m, const Linear *l, const act *dy, Epilogue e) {
    m->backend->conv_backward_input(dy, m->params + l->weight, e, linear_shape(m, l), m->work);
}

// The tied head as a layer: E (V,C) read as the weights (1,C=V,O=C) of a linear layer from logits
// to h, of which forward is then the backward:  logits[v] = sum_c E[v,c] h[c].
static Linear tied_head(const Model *m) {
    return (Linear){.weight = m->embedding, .bias = NO_BIAS, .K = 1, .C = V,
                    .O = m->config.channels, .dil = 1};
}

// The embedding as a table without a LayerNorm.
static LookupShape byte_rows(const Model *m) {
    return (LookupShape){m->B, m->T, V, m->config.channels, false};
}

act *model_latents(const Model *m) { return m->config.tie ? m->h : m->z; }

void model_forward(Model *m, const Pass *pass) {
    const Backend *be = m->backend;
    const real *P = m->params;
    size_t N = (size_t)m->B * (size_t)m->T;
    int C = m->config.channels;

    if (m->config.no_norm_in)
        be->inputs.lookup_forward(m->x[0], m->ids, P + m->embedding, byte_rows(m));
    else
        be->embed_forward(m->x[0], m->ids, P + m->embedding, P + m->norm_in.gain,
                          P + m->norm_in.bias, N, C, m->work);
    for (int i = 0; i < m->U; i++) {
        Unit *u = &m->units[i];
        skip_forward(m, u);
        const act *in = m->x[i];
        if (u->mixer->norm) {
            be->norm_forward(m->h, in, P + u->norm.gain, P + u->norm.bias, N, C);
            in = m->h;
        }
        // x[i+1] = x[i] + mixer(in)
        Epilogue end = {.out = m->x[i + 1], .residual = m->x[i]};
        u->mixer->forward(m, u, in, end, pass);
    }
    const act *h = m->config.no_norm_out ? m->x[m->U] : m->h;
    if (!m->config.no_norm_out)
        be->norm_forward(m->h, m->x[m->U], P + m->norm_out.gain, P + m->norm_out.bias, N, C);
    if (m->config.tie) {
        Linear E = tied_head(m);
        linear_backward(m, &E, m->h, (Epilogue){.dx = m->logits});
    } else {
        linear_forward(m, &m->proj, h, (Epilogue){.out = m->z});
        linear_forward(m, &m->head, m->z, (Epilogue){.out = m->logits});
    }
}

// ---- Backward ----------------------------------------------------------------------------------
//
// The chain rule, once. The loss is one number that depends on everything: change a value y by a
// little e, and the loss changes by e * dy, which defines dy. If y was computed from x, then a
// change of x reaches the loss through every y that x went into, and the effects add up:
//     dx  =  sum over those y of   (how much y changes when x does)  *  dy
// So backward walks the operations of forward in reverse. Each turns the gradient by its output
// into the gradient by its input, and needs to know its own formula and nothing else. Three cases
// are all that a unit is made of:
//     y = w x          dx += w dy   and   dw += x dy        a product passes the other factor on
//     y = a + b        da += dy     and   db += dy          a sum passes the gradient on as it is
//     y = f(z)         dz  = f'(z) dy                       a function passes its slope on
// The second is why a residual stream is easy to train: dx[u] is dx[u+1] as it is, plus what comes
// through unit u. It is also why `accumulate` exists.
//
// Which array holds what. Some change their meaning on the way and then have two names:
//     place            in forward              when                         then in backward
//     x[0..U-1]        the residual stream     after unit u's norm          h of unit u: norm(x[u])
//     x[U]             the residual stream     after norm_out's backward    dx, down to dx[0]
//     units' pre       before the activation   when dx above it is whole    dpre (a unit's: dtail)
//     logits           logits                  in cross_entropy             dlogits
//     h, z             norm's output; hidden   head, then every unit        dh, dz; recomputed
//     dy               -                       units without an activation  dx where dropout kept
// With the side stream dh and dz have places of their own.

// The gradient of the residual stream above unit i goes into dx; and on through the activation
// below, that of unit i-1, where there is one.
static Epilogue into_stream(const Model *m, int i, bool accumulate) {
    Epilogue e = {.dx = m->dx, .accumulate = accumulate};
    const Pass training = {0};
    if (i == 0 || !m->units[i - 1].has_tail) return e;
    const Unit *below = &m->units[i - 1];
    e.pre = below->tail;
    e.activation = below->activation;
    e.drop = unit_dropout(m, below, below->dropouts - 1, &training);
    return e;
}

// One layer's weight gradient by itself, for the head.
static int head_weight(Model *m, const Linear *l, const act *x, const act *dy) {
    const WeightJob job = {m->grads + l->weight, bias_of(m->grads, l), x, dy, 1};
    queue_now(m, &job, 1, linear_shape(m, l));
    return m->queue.fork;
}

// Through head, projection and the last norm: x[U] becomes dx. Returns the fork that computes the
// weight gradients.
static int head_backward(Model *m) {
    const real *P = m->params;
    real *G = m->grads;
    size_t N = (size_t)m->B * (size_t)m->T;
    int done;
    m->dx = m->x[m->U];
    if (m->config.tie) {
        // forward:  logits[v] = sum_c E[v,c] h[c]
        //   dE[v,c] += dlogits[v] h[c]          dh[c] = sum_v dlogits[v] E[v,c]
        Linear E = tied_head(m);
        done = head_weight(m, &E, m->dlogits, m->h);
        m->backend->conv_forward(m->dlogits, P + m->embedding, NULL, (Epilogue){.out = m->dh},
                                 linear_shape(m, &E), m->work);
    } else {
        // forward:  z = h proj + b;  logits = z head + b       (dz may replace z, dh may replace h)
        // Each weight gradient comes before the input gradient that overwrites what it reads.
        const bool norm = !m->config.no_norm_out;
        head_weight(m, &m->head, m->z, m->dlogits);
        linear_backward(m, &m->head, m->dlogits, (Epilogue){.dx = m->dz});
        done = head_weight(m, &m->proj, norm ? m->h : m->dx, m->dz);
        if (!norm) before_write(m, m->dx);  // x[U], which the projection has read
        linear_backward(m, &m->proj, m->dz,
                        norm ? (Epilogue){.dx = m->dh} : into_stream(m, m->U, false));
        if (!norm) return done;
    }
    // forward:  h = norm_out(x[U])        dx is written: nothing else has reached x[U] so far
    m->backend->norm_backward(NULL, G + m->norm_out.gain, G + m->norm_out.bias, m->dh,
                              m->x[m->U], P + m->norm_out.gain, P + m->norm_out.bias,
                              into_stream(m, m->U, false), N, m->config.channels, m->work);
    return done;
}

// forward:  x[i+1] = x[i] + mixer(norm(x[i]))       dx holds dx[i+1] and becomes dx[i]
static void unit_backward(Model *m, int i, const Pass *pass) {
    Unit *u = &m->units[i];
    const real *P = m->params;
    real *G = m->grads;
    size_t N = (size_t)m->B * (size_t)m->T;
    int C = m->config.channels;
    const act *dy = m->dx;  // the gradient by what the unit's last operation summed
    if (u->has_tail) {
        dy = u->dtail;  // made when dx[i+1] was whole
    } else if (m->training.dropout > 0 && u->dropouts > 0) {
        before_write(m, m->dy);
        m->backend->dropout_backward(m->dy, m->dx, unit_dropout(m, u, u->dropouts - 1, pass), N, C);
        dy = m->dy;
    }
    if (!u->mixer->norm) {
        if (!u->mixer->input) skip_gradient(m, u);  // dy is u's dtail, so that dx may change
        u->mixer->backward(m, u, m->x[i], dy, into_stream(m, i, true), pass);
        return;
    }
    before_write(m, m->dh);
    m->queue.not_ready = u->h;
    u->mixer->backward(m, u, u->h, dy, (Epilogue){.dx = m->dh}, pass);
    skip_gradient(m, u);
    // dx += what comes through the norm; the residual's own part stands in it already. x[i] becomes
    // h = norm(x[i]), recomputed in the same pass: the weight gradients want it.
    m->backend->norm_backward(u->h, G + u->norm.gain, G + u->norm.bias, m->dh, m->x[i],
                              P + u->norm.gain, P + u->norm.bias, into_stream(m, i, true), N, C,
                              m->work);
    m->queue.not_ready = NULL;
    queue_run(m, false);
}

void model_backward(Model *m, const Pass *pass) {
    const real *P = m->params;
    real *G = m->grads;
    const int head = head_backward(m);
    for (int i = m->U - 1; i >= 0; i--) {
        unit_backward(m, i, pass);
        skip_backward(m, &m->units[i]);
    }
    queue_run(m, true);
    // A tied head's weight gradient has been added to the embedding's, too.
    if (head && m->config.tie) m->backend->join(head);
    if (m->config.no_norm_in)
        m->backend->inputs.lookup_backward(G + m->embedding, m->dx, m->ids, byte_rows(m), m->work);
    else
        m->backend->embed_backward(G + m->embedding, G + m->norm_in.gain, G + m->norm_in.bias,
                                   m->dx, m->ids, P + m->embedding, P + m->norm_in.gain,
                                   (size_t)m->B * (size_t)m->T, m->config.channels, m->work);
    queue_join(m);
}

// ---- Steps -------------------------------------------------------------------------------------

// Everything of one step, without a word to the host: a GPU captures it once and replays it.
static void step_body(void *arg) {
    Model *m = arg;
    const Backend *be = m->backend;
    const Training *t = &m->training;
    size_t N = (size_t)m->B * (size_t)m->T;
    // The loss is the mean over all the step's targets, so every pass adds its share.
    float scale = 1 / ((float)t->passes * (float)N);
    // Every layer adds to its gradients, pass after pass: the step before has left them zero.
    for (int p = 0; p < t->passes; p++) {
        // Windows of the batch that the passes before took.
        const Pass pass = {.first = (uint64_t)p * (uint64_t)m->B};
        be->draw_batch(m->ids, m->targets, m->corpus, m->state, t->seed,
                       threshold_of(t->byte_dropout, 65536), pass.first, m->B, m->T);
        model_forward(m, &pass);
        be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, scale, N);
        queue_fork(m);
        be->add_losses(m->state, m->losses, N, m->side_work);
        queue_end_fork(m);  // joined with the weight gradients, which come later
        model_backward(m, &pass);
    }
    // The factor makes the sum of the losses their mean, in nats per byte.
    be->optimize(m->params, m->grads, m->m, m->v, m->ema, m->n_params, m->n_decay, m->state,
                 1 / ((double)t->passes * (double)N), t->hyper, m->work);
}

void model_train_step(Model *m) {
    const Backend *be = m->backend;
    // A graph holds addresses and sizes, and none of them changes while a model is open. What does
    // change, the step's number, is read from m->state.
    if (be->capture && !m->graph) m->graph = be->capture(step_body, m);
    if (m->graph)
        be->replay(m->graph);
    else
        step_body(m);
}

void model_losses(Model *m, const int *ids, const int *targets, real *losses) {
    const Backend *be = m->backend;
    size_t N = (size_t)m->B * (size_t)m->T;
    be->upload(m->ids, ids, N * sizeof *ids);
    be->upload(m->targets, targets, N * sizeof *targets);
    model_forward(m, NULL);
    // Scale 0: the losses alone; the logits stay.
    be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
    be->download(losses, m->losses, N * sizeof *losses);
}
