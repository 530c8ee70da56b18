// model.c: the model as one graph of layers (first half), and the layers in plain C (second half).
//
// Read model.h first. The graph calls layers only through the table of operations, so this same
// code runs on every backend; the second half is the CPU's table, and the reference that every
// other backend is tested against. Files, options and training runs are train.c's business.
#include "model.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

int fail(Error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    return -1;
}

// ---- Configuration -----------------------------------------------------------------------------

Config config_paper(void) {
    return (Config){.channels = 256, .latent = 256, .taps = 3, .blocks = 3,
                    .n_dilations = 3, .dilations = {1, 2, 4}, .form = BLOCK_PAPER};
}

int config_check(const Config *c, Error *e) {
    // The bounds keep every product of three sizes inside 63 bits and every size inside an int.
    if (c->channels < 1 || c->channels > MAX_CHANNELS)
        return fail(e, "channels is %d, expected 1 to %d", c->channels, MAX_CHANNELS);
    if (c->latent < 1 || c->latent > MAX_CHANNELS)
        return fail(e, "latent is %d, expected 1 to %d", c->latent, MAX_CHANNELS);
    if (c->taps < 1 || c->taps > MAX_TAPS)
        return fail(e, "taps is %d, expected 1 to %d", c->taps, MAX_TAPS);
    if (c->blocks < 1 || c->blocks > 1024)
        return fail(e, "blocks is %d, expected 1 to 1024", c->blocks);
    if (c->n_dilations < 1 || c->n_dilations > MAX_DILATIONS)
        return fail(e, "%d dilations, expected 1 to %d", c->n_dilations, MAX_DILATIONS);
    for (int i = 0; i < c->n_dilations; i++)
        if (c->dilations[i] < 1 || c->dilations[i] > 1 << 20)
            return fail(e, "dilation %d is %d, expected 1 to %d", i, c->dilations[i], 1 << 20);
    if (c->form != BLOCK_PAPER && c->form != BLOCK_PRENORM)
        return fail(e, "block form is %d, expected paper or prenorm", (int)c->form);
    // Asked as "not within", which refuses a NaN, too.
    if (!(c->softcap >= 0 && c->softcap <= 1e6f))
        return fail(e, "softcap is %g, expected 0 (none) to 1e6", (double)c->softcap);
    if (c->tie && c->latent != c->channels)
        return fail(e, "a tied head needs latent = channels, got %d and %d: leave --latent out or "
                       "add --no-tie", c->latent, c->channels);
    return 0;
}

// A tap more reaches `dil` bytes further, and layers add up. Within config_check's bounds the sum
// stays below 2^43.
int64_t config_receptive_field(const Config *c) {
    int64_t sum = 0;
    for (int i = 0; i < c->n_dilations; i++) sum += c->dilations[i];
    return 1 + (int64_t)c->blocks * (c->taps - 1) * sum;
}

// ---- The table of tensors ----------------------------------------------------------------------

// Appends a tensor and tells its user the offset. Two passes list the same tensors: the first
// takes the matrices, the second the rest, so that "is it decayed" is one comparison of offsets.
static void add_tensor(Model *m, bool matrices, size_t *offset, const char *name, int ndim, int d0,
                       int d1, int d2) {
    if (matrices != (ndim > 1)) return;
    Tensor *t = &m->tensors[m->n_tensors++];
    *t = (Tensor){.dims = {d0, d1, d2}, .ndim = ndim, .decay = matrices, .offset = m->n_params};
    snprintf(t->name, sizeof t->name, "%s", name);
    t->size = (size_t)d0 * (ndim > 1 ? (size_t)d1 : 1) * (ndim > 2 ? (size_t)d2 : 1);
    m->n_params += t->size;
    if (matrices) m->n_decay = m->n_params;
    *offset = t->offset;
}

// A gain is named .weight, as PyTorch names it: with one dimension, that tells it from a bias.
static void add_norm(Model *m, bool matrices, Norm *n, const char *name) {
    char full[56];
    snprintf(full, sizeof full, "%s.weight", name);
    add_tensor(m, matrices, &n->gain, full, 1, m->config.channels, 0, 0);
    snprintf(full, sizeof full, "%s.bias", name);
    add_tensor(m, matrices, &n->bias, full, 1, m->config.channels, 0, 0);
}

// Lists all matrices or all vectors, in the order in which forward uses them: names and offsets of
// a model follow from its configuration alone.
static void list_tensors(Model *m, bool matrices) {
    const Config *c = &m->config;
    char name[56];
    add_tensor(m, matrices, &m->embedding, "embedding.weight", 2, V, c->channels, 0);
    add_norm(m, matrices, &m->norm_in, "norm_in");
    for (int l = 0; l < m->L; l++) {
        Conv *v = &m->convs[l];
        if (c->form == BLOCK_PRENORM) {
            snprintf(name, sizeof name, "blocks.%d.norm.%d", v->block, v->index);
            add_norm(m, matrices, &v->norm, name);
        }
        snprintf(name, sizeof name, "blocks.%d.conv.%d.weight", v->block, v->index);
        add_tensor(m, matrices, &v->weight, name, 3, c->taps, c->channels, c->channels);
        snprintf(name, sizeof name, "blocks.%d.conv.%d.bias", v->block, v->index);
        add_tensor(m, matrices, &v->bias, name, 1, c->channels, 0, 0);
    }
    add_norm(m, matrices, &m->norm_out, "norm_out");
    // A tied head is the embedding read backwards, and the latents are the last norm's output.
    if (c->tie) return;
    add_tensor(m, matrices, &m->proj, "proj.weight", 2, c->channels, c->latent, 0);
    add_tensor(m, matrices, &m->proj_bias, "proj.bias", 1, c->latent, 0, 0);
    add_tensor(m, matrices, &m->head, "head.weight", 2, c->latent, V, 0);
    add_tensor(m, matrices, &m->head_bias, "head.bias", 1, V, 0, 0);
}

int model_describe(Model *m, Error *e) {
    const Config *c = &m->config;
    m->L = c->blocks * c->n_dilations;
    bool prenorm = c->form == BLOCK_PRENORM;
    // What one residual spans: a conv, or the paper's whole block.
    m->U = prenorm ? m->L : c->blocks;
    m->convs = calloc((size_t)m->L, sizeof *m->convs);
    m->units = calloc((size_t)m->U, sizeof *m->units);
    // At most 4 to a conv (gain, bias, weight, bias) and 9 round them: the embedding, two norms,
    // and weight and bias of projection and head.
    m->tensors = calloc((size_t)m->L * 4 + 16, sizeof *m->tensors);
    m->x = calloc((size_t)m->U + 1, sizeof *m->x);
    if (!m->convs || !m->units || !m->tensors || !m->x) {
        model_free(m);
        return fail(e, "out of host memory");
    }
    for (int l = 0; l < m->L; l++) {
        m->convs[l].block = l / c->n_dilations;
        m->convs[l].index = l % c->n_dilations;
        m->convs[l].dil = c->dilations[l % c->n_dilations];
    }
    int per_unit = m->L / m->U;
    for (int u = 0; u < m->U; u++) m->units[u] = (Unit){.first = u * per_unit, .count = per_unit};
    // Matrices first: params[0 .. n_decay-1] are what weight decay acts on.
    list_tensors(m, true);
    list_tensors(m, false);
    return 0;
}

// ---- Memory ------------------------------------------------------------------------------------

// Lays one activation array after another into m->activations; with base NULL it only counts.
typedef struct {
    char *base;
    size_t used;
} Arena;

static void *place(Arena *a, size_t bytes) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 255) / 256 * 256;  // every array starts on a 256-byte line: wide loads
    return p;
}

// The paper's form does not keep what a unit's later convs read: backward makes it again into their
// v->read, where it stays until their weight gradients have been made. Six jobs that wait are two
// of the paper's units, four of whose convs need such an array: h and z, free by then, and two
// more, in turn. Where one comes round too early (other dilations), paper_unit_backward runs the
// jobs first. With branches each conv has its own.
static void place_reads(Model *m, Arena *a, size_t bytes) {
    enum { SHARED = MAX_WEIGHT_JOBS * 2 / 3 };
    act *shared[SHARED] = {m->h, m->z};
    for (int i = 2; i < SHARED && !m->branches; i++) shared[i] = place(a, bytes);
    for (int l = m->L - 1, taken = 0; l >= 0; l--)
        if (l % m->config.n_dilations != 0)  // a unit's first conv has read its x
            m->convs[l].read = m->branches ? place(a, bytes) : shared[taken++ % SHARED];
}

// Gives every activation array its place in a; returns the bytes that all take. Of (N,C) arrays
// training keeps U+1 for x, L for pre and those of place_reads, inference 2 and 1.
static size_t place_activations(Model *m, Arena a, bool training) {
    const Config *c = &m->config;
    size_t N = (size_t)m->B * m->T, size = m->backend->act_bytes;
    size_t C = (size_t)c->channels, wide = C > (size_t)c->latent ? C : (size_t)c->latent;
    // Inference keeps nothing: the residual stream alternates between two arrays, and one array
    // serves as `pre` of all layers.
    for (int u = 0; u <= m->U; u++)
        m->x[u] = training || u < 2 ? place(&a, N * C * size) : m->x[u - 2];
    for (int l = 0; l < m->L; l++)
        m->convs[l].pre = training || l < 1 ? place(&a, N * C * size) : m->convs[0].pre;
    // h and z carry C channels between convs and D before the head: each is as wide as the wider.
    m->h = place(&a, N * wide * size);
    m->z = place(&a, N * wide * size);
    // A branch may read all that it was given to the end of a pass: then each has its own place.
    m->dh = m->branches ? place(&a, N * wide * size) : m->h;
    m->dz = m->branches ? place(&a, N * wide * size) : m->z;
    if (training && c->form == BLOCK_PAPER) place_reads(m, &a, N * C * size);
    m->logits = place(&a, N * V * size);
    m->ids = place(&a, N * sizeof *m->ids);
    m->targets = place(&a, N * sizeof *m->targets);
    m->losses = place(&a, N * sizeof *m->losses);
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

int model_open(Model *m, const Backend *backend, const Config *config, int B, int T,
               const Training *training, Error *e) {
    *m = (Model){.backend = backend, .config = *config, .B = B, .T = T};
    if (config_check(config, e)) return -1;
    // With the bounds of config_check and N at most 2^27 no sum of sizes leaves 63 bits.
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
        B = m->B;
        m->branches = (size_t)B * T <= backend->branch_rows;
    }
    if (model_describe(m, e)) return -1;
    size_t n = m->n_params * sizeof(real), N = (size_t)B * T;
    // Scratch is shared by all layers, which run one after another: it must do for the widest, and
    // the logits' V is one of the widths.
    int width = config->channels > config->latent ? config->channels : config->latent;
    plan(m, "parameters", n, &m->params);
    if (training) {
        plan(m, "gradients", n, &m->grads);
        plan(m, "first moments", n, &m->m);
        plan(m, "second moments", n, &m->v);
        if (training->hyper.ema > 0) plan(m, "average weights", n, &m->ema);
    }
    plan(m, "activations", place_activations(m, (Arena){NULL, 0}, training != NULL),
         &m->activations);
    size_t work = backend->work_bytes(N, config->taps, width > V ? width : V, m->n_params);
    plan(m, "scratch", work, &m->work);
    if (m->branches) plan(m, "scratch of branches", work, &m->branch_work);
    plan(m, "training state", sizeof *m->state, &m->state);
    if (allocate(m, e)) {
        model_free(m);
        return -1;
    }
    // The same walk again, now with memory under it.
    place_activations(m, (Arena){m->activations, 0}, training != NULL);
    if (!m->branches) m->branch_work = m->work;
    return 0;
}

void model_free(Model *m) {
    const Backend *be = m->backend;
    // A model that was only described (model_describe) has no backend and no memory.
    if (be) {
        if (m->recording) be->free_recording(m->recording);
        for (int i = 0; i < m->n_memory; i++) {
            // NULL where allocate() gave up before this role.
            void *p;
            memcpy(&p, m->memory[i].address, sizeof p);
            if (p) be->free(p);
        }
    }
    free(m->convs);
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
        size_t n = strlen(t->name);
        // 7 = strlen(".weight"). Of vectors only gains are named so: 1; all others are biases: 0.
        bool gain = t->ndim == 1 && n > 7 && strcmp(t->name + n - 7, ".weight") == 0;
        // Terms in the sum of one output: K*C of a conv (K,C,O), C of a linear layer (C,O).
        int fan_in = t->ndim == 3 ? t->dims[0] * t->dims[1] : t->dims[0];
        // Small where logits are made, so that a fresh model finds all bytes about equally likely.
        bool at_bytes = t->offset == m->embedding || (!m->config.tie && t->offset == m->head);
        double std = at_bytes ? 0.02 : 1 / sqrt((double)fan_in);
        for (size_t j = 0; j < t->size; j++) {
            size_t k = t->offset + j;
            // A draw gives two normal numbers, values k = 2i and 2i+1 of the parameters: each is a
            // function of seed and k.
            double pair[2] = {gain, gain};
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
        plan(m, "training text", index + bytes, &m->text);
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

// ---- The graph: forward ------------------------------------------------------------------------

// The bound below which a random number of so many values drops with probability p.
// values: 256 where dropout looks at 8 bits, 65536 where byte dropout looks at 16.
static uint32_t threshold_of(float p, int values) { return (uint32_t)(p * (float)values + 0.5f); }

// Dropout after conv l for a pass that starts at window `first` of the step's batch.
// Layers draw under different purposes, passes from different rows of the batch: no number is used
// twice, and how a batch is cut into passes does not change what is dropped.
static Dropout dropout_of(const Model *m, int l, bool train, uint64_t first) {
    uint32_t threshold = train ? threshold_of(m->training.dropout, 256) : 0;
    return (Dropout){.threshold = threshold, .scale = 256.0f / (float)(256 - threshold),
                     .seed = m->training.seed, .purpose = RNG_DROPOUT + (uint32_t)l,
                     .first = first * (uint64_t)m->T, .state = m->state};
}

static ConvShape conv_shape(const Model *m, int l) {
    int C = m->config.channels;
    return (ConvShape){m->B, m->T, C, C, m->config.taps, m->convs[l].dil};
}

// A linear layer from C to O channels over all rows of the pass: a conv with one tap.
// B and T do not matter to it: nothing reaches into another row, so B = 1 and T = N.
static ConvShape linear_shape(const Model *m, int C, int O) {
    return (ConvShape){1, m->B * m->T, C, O, 1, 1};
}

act *model_latents(const Model *m) { return m->config.tie ? m->h : m->z; }

// With f = dropout(gelu(..)), and the arrays that a unit goes through:
//   paper:    x[u+1] = x[u] + f(conv(.. f(conv(x[u]))))      x[u] -> h -> z -> .. + x[u] -> x[u+1]
//   prenorm:  x[u+1] = x[u] + f(conv(norm(x[u])))            x[u] -> norm -> h -> + x[u] -> x[u+1]
void model_forward(Model *m, bool train, uint64_t first) {
    const Backend *be = m->backend;
    const Config *c = &m->config;
    const real *P = m->params;
    const Dropout none = {0};
    size_t N = (size_t)m->B * m->T;
    int C = c->channels, D = c->latent;

    be->embed_forward(m->x[0], m->ids, P + m->embedding, P + m->norm_in.gain, P + m->norm_in.bias,
                      N, C, m->work);
    for (int u = 0; u < m->U; u++) {
        const act *in = m->x[u];
        for (int i = 0; i < m->units[u].count; i++) {
            int l = m->units[u].first + i;
            const Conv *v = &m->convs[l];
            if (c->form == BLOCK_PRENORM) {
                be->norm_forward(m->h, in, P + v->norm.gain, P + v->norm.bias, N, C);
                in = m->h;
            }
            // No conv writes what it reads: h and z take turns, and a unit's last goes into x[u+1].
            bool last = i == m->units[u].count - 1;
            act *out = last ? m->x[u + 1] : in == m->h ? m->z : m->h;
            be->conv_forward(out, v->pre, in, P + v->weight, P + v->bias, last ? m->x[u] : NULL,
                             dropout_of(m, l, train, first), conv_shape(m, l), m->work);
            in = out;
        }
    }
    // The head reads h (N,C); z (N,D) are the latents; out NULL: no activation follows.
    be->norm_forward(m->h, m->x[m->U], P + m->norm_out.gain, P + m->norm_out.bias, N, C);
    if (c->tie) {
        // logits[v] = sum_c E[v,c] h[c]: the embedding read backwards
        be->conv_backward_input(m->logits, NULL, NULL, m->h, P + m->embedding, 1,
                                linear_shape(m, V, C), false, m->work);
    } else {
        be->conv_forward(NULL, m->z, m->h, P + m->proj, P + m->proj_bias, NULL, none,
                         linear_shape(m, C, D), m->work);
        be->conv_forward(NULL, m->logits, m->z, P + m->head, P + m->head_bias, NULL, none,
                         linear_shape(m, D, V), m->work);
    }
}

// ---- The graph: backward, the same lines from the bottom up ------------------------------------

// Branches, where the step has them: what only the optimizer waits for, weight gradients above
// all, need not hold up the rest. With few rows in a pass a kernel leaves most of a GPU idle, and
// there is room for both. Branch 0: all in order, nothing to wait for.
static void begin_branch(const Model *m) {
    if (m->branches) m->backend->begin_branch();
}
static int end_branch(const Model *m) { return m->branches ? m->backend->end_branch() : 0; }
static void join(const Model *m, int branch) {
    if (branch) m->backend->join(branch);
}

// One layer's weight and bias gradient; bias NO_BIAS: none. Returns the branch that makes it, which
// must be joined before x or dy changes.
// (Not 0, which is a tensor's offset.)
#define NO_BIAS SIZE_MAX
static int weight_backward(const Model *m, size_t weight, size_t bias, const act *x, const act *dy,
                           ConvShape s) {
    real *db = bias == NO_BIAS ? NULL : m->grads + bias;
    const WeightJob job = {m->grads + weight, db, x, dy, s.dil};
    begin_branch(m);
    m->backend->conv_backward_weight(&job, 1, s, m->branch_work);
    return end_branch(m);
}

// Where the gradient of the residual stream goes on: through the activation of its last conv, whose
// dpre takes the place of pre. NULL: below the first unit there is none.
static act *top_pre(const Model *m, int u) {
    return u < 0 ? NULL : m->convs[m->units[u].first + m->units[u].count - 1].pre;
}

// Through head, projection and the last norm. dlogits stand in m->logits; the gradient of the
// residual stream takes the place of x[U], which nothing needs any more.
// Returns the branch that makes the weight gradients, a tied head's among the embedding's.
static int head_backward(Model *m, float scale) {
    const Backend *be = m->backend;
    const real *P = m->params;
    real *G = m->grads;
    size_t N = (size_t)m->B * m->T;
    int C = m->config.channels, D = m->config.latent, branch;
    if (m->config.tie) {
        // forward:  logits[v] = sum_c E[v,c] h[c]
        // As a conv it has dlogits (V channels) for its x and h for its dy:
        //   dE[v,c] += dlogits[v] h[c]          dh[c] = sum_v dlogits[v] E[v,c]
        branch = weight_backward(m, m->embedding, NO_BIAS, m->logits, m->h, linear_shape(m, V, C));
        be->conv_forward(NULL, m->dh, m->logits, P + m->embedding, NULL, NULL, (Dropout){0},
                         linear_shape(m, V, C), m->work);
    } else {
        // forward:  z = h proj + b;  logits = z head + b       (dz may replace z, dh may replace h)
        // Each weight gradient comes before the input gradient that overwrites what it reads.
        weight_backward(m, m->head, m->head_bias, m->z, m->logits, linear_shape(m, D, V));
        be->conv_backward_input(m->dz, NULL, NULL, m->logits, P + m->head, 1,
                                linear_shape(m, D, V), false, m->work);
        branch = weight_backward(m, m->proj, m->proj_bias, m->h, m->dz, linear_shape(m, C, D));
        be->conv_backward_input(m->dh, NULL, NULL, m->dz, P + m->proj, 1, linear_shape(m, C, D),
                                false, m->work);
    }
    // forward:  h = norm_out(x[U])        dx is written: nothing else has reached x[U] so far
    act *x = m->x[m->U];
    be->norm_backward(x, G + m->norm_out.gain, G + m->norm_out.bias, NULL, top_pre(m, m->U - 1),
                      m->dh, x, P + m->norm_out.gain, P + m->norm_out.bias, scale, N, C, false,
                      m->work);
    return branch;
}

// Weight gradients that wait to be made together, all of convs.
typedef struct {
    WeightJob jobs[MAX_WEIGHT_JOBS];
    int n;
    int branch;  // that makes those before
} WeightJobs;

// Makes what waits. The shape is any conv's, they differ in dil only, which stands in the job.
static void run_jobs(const Model *m, WeightJobs *w) {
    if (w->n == 0) return;
    begin_branch(m);
    m->backend->conv_backward_weight(w->jobs, w->n, conv_shape(m, 0), m->branch_work);
    w->branch = end_branch(m);
    w->n = 0;
}

// Of conv v, which has read x and whose dpre stands in v->pre.
static void add_job(const Model *m, WeightJobs *w, const Conv *v, const act *x) {
    w->jobs[w->n++] = (WeightJob){m->grads + v->weight, m->grads + v->bias, x, v->pre, v->dil};
    if (w->n == MAX_WEIGHT_JOBS) run_jobs(m, w);
}

// forward:  x[u+1] = x[u] + convs(x[u])     dx holds dx[u+1] and becomes dx[u].
// The last conv's pre holds its dpre already; every other's dpre takes the place of its pre here,
// the one of the unit below included. What a conv had read is made again from the pre before it
// (cheaper than having kept it) and waits in v->read for the weight gradients.
static void paper_unit_backward(Model *m, int u, act *dx, float scale, WeightJobs *waiting) {
    const Backend *be = m->backend;
    const real *P = m->params;
    int first = m->units[u].first, l = first + m->units[u].count - 1;

    for (; l > first; l--) {
        const Conv *v = &m->convs[l];
        // Without branches convs share these arrays: what waits may read this one.
        for (int i = 0; i < waiting->n; i++)
            if (waiting->jobs[i].x == v->read) run_jobs(m, waiting);
        // forward:  x_l = f(pre_{l-1}),  pre_l = conv(x_l)      dx_l goes on to dpre_{l-1} unkept
        be->conv_backward_input(NULL, m->convs[l - 1].pre, v->read, v->pre, P + v->weight, scale,
                                conv_shape(m, l), false, m->work);
        add_job(m, waiting, v, v->read);
    }
    const Conv *v = &m->convs[first];
    // The unit's first conv read the residual stream, which is still there: its weight gradient
    // need not wait for the rest.
    add_job(m, waiting, v, m->x[u]);
    // The stream's gradient also came by the residual itself: dx is added to. Complete, it goes on
    // to the unit below's dpre.
    be->conv_backward_input(dx, top_pre(m, u - 1), NULL, v->pre, P + v->weight, scale,
                            conv_shape(m, first), true, m->work);
}

// forward:  x[u+1] = x[u] + conv(norm(x[u]))          the same, with one conv to a unit
// What the conv had read takes the place of x[u], so these weight gradients can wait for others.
static void prenorm_unit_backward(Model *m, int u, act *dx, float scale, WeightJobs *waiting) {
    const Backend *be = m->backend;
    const real *P = m->params;
    const Conv *v = &m->convs[u];
    // dh = gradient of what norm gave: plain, as no activation lies between norm and conv.
    be->conv_backward_input(m->dh, NULL, NULL, v->pre, P + v->weight, 1, conv_shape(m, u), false,
                            m->work);
    // dx += what comes through the norm; the residual's own part stands in it already. x[u] is made
    // into norm(x[u]) once it has been read: the weight gradient wants it.
    be->norm_backward(dx, m->grads + v->norm.gain, m->grads + v->norm.bias, m->x[u],
                      top_pre(m, u - 1), m->dh, m->x[u], P + v->norm.gain, P + v->norm.bias, scale,
                      (size_t)m->B * m->T, m->config.channels, true, m->work);
    add_job(m, waiting, v, m->x[u]);
}

void model_backward(Model *m) {
    const real *P = m->params;
    real *G = m->grads;
    // All layers drop with one probability: the scale of forward is one number.
    const float scale = dropout_of(m, 0, true, 0).scale;
    bool prenorm = m->config.form == BLOCK_PRENORM;
    WeightJobs waiting = {.n = 0};
    const int head = head_backward(m, scale);
    // One array is the gradient of the residual stream all the way down: it ends as dx[0].
    act *dx = m->x[m->U];
    for (int u = m->U - 1; u >= 0; u--)
        (prenorm ? prenorm_unit_backward : paper_unit_backward)(m, u, dx, scale, &waiting);
    run_jobs(m, &waiting);
    // A tied head's branch has added to the embedding's gradient, too.
    if (m->config.tie) join(m, head);
    m->backend->embed_backward(G + m->embedding, G + m->norm_in.gain, G + m->norm_in.bias, dx,
                               m->ids, P + m->embedding, P + m->norm_in.gain,
                               (size_t)m->B * m->T, m->config.channels, m->work);
    join(m, waiting.branch);
}

// ---- Steps -------------------------------------------------------------------------------------

// Everything of one step, without a word to the host: a GPU records it once and replays it.
static void step_body(void *arg) {
    Model *m = arg;
    const Backend *be = m->backend;
    const Training *t = &m->training;
    size_t N = (size_t)m->B * m->T;
    // The loss is the mean over all the step's targets, so every pass adds its share.
    float scale = 1 / ((float)t->passes * (float)N);
    // Every layer adds to its gradients, pass after pass: the step before has left them zero.
    for (int p = 0; p < t->passes; p++) {
        // Windows of the batch that the passes before took.
        uint64_t first = (uint64_t)p * (uint64_t)m->B;
        be->draw_batch(m->ids, m->targets, m->corpus, m->state, t->seed,
                       threshold_of(t->byte_dropout, 65536), first, m->B, m->T);
        model_forward(m, true, first);
        // From here on the logits are dlogits.
        be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, scale, N);
        begin_branch(m);
        be->add_losses(m->state, m->losses, N, m->branch_work);
        end_branch(m);  // joined with the weight gradients, which come later
        model_backward(m);
    }
    // The factor makes the sum of the losses their mean, in nats per byte.
    be->optimize(m->params, m->grads, m->m, m->v, m->ema, m->n_params, m->n_decay, m->state,
                 1 / ((double)t->passes * (double)N), t->hyper, m->work);
}

void model_train_step(Model *m) {
    const Backend *be = m->backend;
    // A recording holds addresses and sizes, and none of them changes while a model is open. What
    // does change, the step's number, is read from m->state.
    if (be->record && !m->recording) m->recording = be->record(step_body, m);
    if (m->recording)
        be->replay(m->recording);
    else
        step_body(m);
}

void model_losses(Model *m, const int *ids, const int *targets, real *losses) {
    const Backend *be = m->backend;
    size_t N = (size_t)m->B * m->T;
    be->upload(m->ids, ids, N * sizeof *ids);
    be->upload(m->targets, targets, N * sizeof *targets);
    model_forward(m, false, 0);
    // Scale 0: the losses alone; the logits stay.
    be->cross_entropy(m->losses, m->logits, m->targets, m->config.softcap, 0, N);
    be->download(losses, m->losses, N * sizeof *losses);
}

// Window w scores text[from + w*stride ..]: `stride` bytes, the first of them at output `skip` of
// the window. It starts skip+1 bytes before, or with the text.
typedef struct {
    size_t start;         // first input byte
    size_t score, count;  // scored bytes: text[score .. score+count-1]
} Window;

static Window window_at(const Model *m, size_t n, size_t from, size_t w) {
    // Outputs context-1 .. T-1 of a window see all that they can reach: T - context + 1 of them,
    // the stride. In a window that starts with the text there is no more to be seen.
    size_t context = (size_t)config_receptive_field(&m->config), T = (size_t)m->T;
    size_t stride = T - context + 1, score = from + w * stride;
    Window r = {.score = score, .count = n - score < stride ? n - score : stride};
    // Then byte `score` is predicted by output context-1 of the window, the first to see enough.
    r.start = score > context ? score - context : 0;
    return r;
}

int model_score(Model *m, const uint8_t *text, size_t n, size_t from, double *nats, real *each,
                Error *e) {
    int64_t context = config_receptive_field(&m->config);
    if (context > m->T)
        return fail(e, "scoring needs windows of at least the receptive field, %lld bytes, not %d",
                    (long long)context, m->T);
    size_t N = (size_t)m->B * m->T, T = (size_t)m->T, stride = T - (size_t)context + 1;
    int *ids = calloc(2 * N, sizeof *ids), *targets = ids + N;
    real *losses = calloc(N, sizeof *losses);
    *nats = 0;
    if (!ids || !losses) {
        free(ids);
        free(losses);
        return fail(e, "out of host memory");
    }
    if (from == 0 && n > 0) {  // nothing stands before the first byte: all V are equally likely
        *nats = log(V);
        if (each) each[0] = (real)*nats;
        from = 1;
    }
    size_t windows = from < n ? (n - from + stride - 1) / stride : 0, base = from;
    for (size_t w0 = 0; w0 < windows; w0 += (size_t)m->B) {
        // What no window fills is not scored and, the model being causal, not seen by what is.
        for (size_t i = 0; i < N; i++) ids[i] = 0, targets[i] = -1;
        size_t here = windows - w0 < (size_t)m->B ? windows - w0 : (size_t)m->B;
        for (size_t b = 0; b < here; b++) {
            Window v = window_at(m, n, base, w0 + b);
            for (size_t i = v.start; i + 1 < v.score + v.count; i++) {
                // The output at byte i is for byte i+1.
                ids[b * T + i - v.start] = text[i];
                if (i + 1 >= v.score) targets[b * T + i - v.start] = text[i + 1];
            }
        }
        model_losses(m, ids, targets, losses);
        for (size_t b = 0; b < here; b++) {  // in the order of the text, whatever the batch
            Window v = window_at(m, n, base, w0 + b);
            for (size_t i = v.score; i < v.score + v.count; i++) {
                real loss = losses[b * T + i - 1 - v.start];
                *nats += loss;
                if (each) each[i] = loss;
            }
        }
    }
    free(ids);
    free(losses);
    return 0;
}

// ---- The layers in plain C: the CPU's half of the file -----------------------------------------
//
// Every loop that threads share runs over outputs that one thread computes alone, in an order that
// does not depend on how many threads there are: 1, 2 or 5 threads give the same bits.

enum { ROW_BLOCK = 64 };  // rows per partial sum of a column reduction; part of the result's bits

static size_t blocks_of(size_t N) { return (N + ROW_BLOCK - 1) / ROW_BLOCK; }

// sum[c] += the partial sums part[blk*stride + c], in the order of the blocks.
// Threads share the columns, not the blocks: each sum keeps its order.
static void add_partials(real *sum, const real *part, size_t blocks, size_t stride, int C) {
#pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c++)
        for (size_t blk = 0; blk < blocks; blk++) sum[c] += part[blk * stride + (size_t)c];
}

// ---- LayerNorm

// Mean and 1/standard deviation of a row of C.
// In double and in two passes: squares minus the squared mean would cancel. Over C, not C-1, as
// LayerNorm has it.
static void row_moments(const real *x, int C, real *mean, real *rstd) {
    double sum = 0, squares = 0;
    for (int c = 0; c < C; c++) sum += x[c];
    double mu = sum / C;
    for (int c = 0; c < C; c++) squares += (x[c] - mu) * (x[c] - mu);
    *mean = (real)mu;
    *rstd = (real)(1 / sqrt(squares / C + NORM_EPS));
}

void norm_row(real *out, const real *x, const real *gain, const real *bias, int C) {
    real mean, rstd;
    row_moments(x, C, &mean, &rstd);
    for (int c = 0; c < C; c++) out[c] = (x[c] - mean) * rstd * gain[c] + bias[c];
}

static void cpu_norm_forward(act *out, const act *x, const real *gain, const real *bias, size_t N,
                             int C) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        norm_row((real *)out + n * C, (const real *)x + n * C, gain, bias, C);
}

// forward:  xhat = (x - mean) * rstd;  out = xhat * gain + bias.    With g = dout * gain,
// mean and rstd being functions of x too (Ba, Kiros, Hinton, arXiv:1607.06450):
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
// (average(g) is what mean lets through, xhat * average(g * xhat) what rstd does)
// One row; dgain and dbias are added to. dx may be x.
static void norm_row_backward(real *dx, real *dgain, real *dbias, const real *dout, const real *x,
                              const real *gain, int C, bool accumulate) {
    real mean, rstd;
    row_moments(x, C, &mean, &rstd);
    double g_sum = 0, gx_sum = 0;
    // The averages need the whole row, the gradient needs the averages: two walks.
    for (int c = 0; c < C; c++) {
        real xhat = (x[c] - mean) * rstd, g = dout[c] * gain[c];
        g_sum += g;
        gx_sum += g * xhat;
    }
    real g_mean = (real)(g_sum / C), gx_mean = (real)(gx_sum / C);
    for (int c = 0; c < C; c++) {
        real xhat = (x[c] - mean) * rstd, g = dout[c] * gain[c];
        // forward:  out = xhat * gain + bias
        dgain[c] += dout[c] * xhat;
        dbias[c] += dout[c];
        real d = rstd * (g - g_mean - xhat * gx_mean);
        dx[c] = accumulate ? dx[c] + d : d;
    }
}

// Stands with its forward, under GELU.
static void act_row_backward(real *pre, real *a, const real *dout, real scale, int n);

// Blocks of rows share the work. What they have in common, dgain and dbias, each sums for itself;
// add_partials joins them.
static void cpu_norm_backward(act *dx, real *dgain, real *dbias, act *again, act *pre,
                              const act *dout, const act *x, const real *gain, const real *bias,
                              float scale, size_t N, int C, bool accumulate, void *work) {
    size_t blocks = blocks_of(N), stride = 2 * (size_t)C;
    real *part = work;  // (blocks, 2, C): gain, bias
#pragma omp parallel for schedule(static)
    for (size_t blk = 0; blk < blocks; blk++) {
        real *pg = part + blk * stride, *pb = pg + C;
        memset(pg, 0, stride * sizeof *pg);
        for (size_t n = blk * ROW_BLOCK; n < N && n < (blk + 1) * ROW_BLOCK; n++) {
            const real *x_n = (const real *)x + n * C;
            real *dx_n = (real *)dx + n * C;
            norm_row_backward(dx_n, pg, pb, (const real *)dout + n * C, x_n, gain, C, accumulate);
            // Only now: again may be x, dx has been made from it.
            if (again) norm_row((real *)again + n * C, x_n, gain, bias, C);
            // forward, below:  x = res + scale * gelu(pre)
            if (pre) act_row_backward((real *)pre + n * C, NULL, dx_n, scale, C);
        }
    }
    add_partials(dgain, part, blocks, stride, C);
    add_partials(dbias, part + C, blocks, stride, C);
}

// ---- Embedding and its LayerNorm
//
// LayerNorm works on one row at a time, so normalising the V rows of the table and looking them up
// equals looking them up and normalising N rows. Row BYTE_DROPPED of the normalised table is what
// LayerNorm makes of a row of zeros: its bias.

static void cpu_embed_forward(act *x, const int *ids, const real *table, const real *gain,
                              const real *bias, size_t N, int C, void *work) {
    real *rows = work;  // (V+1, C)
    for (int v = 0; v < V; v++)
        norm_row(rows + (size_t)v * C, table + (size_t)v * C, gain, bias, C);
    memcpy(rows + (size_t)BYTE_DROPPED * C, bias, (size_t)C * sizeof *bias);
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        memcpy((real *)x + n * C, rows + (size_t)ids[n] * C, (size_t)C * sizeof *rows);
}

static void cpu_embed_backward(real *dtable, real *dgain, real *dbias, const act *dx,
                               const int *ids, const real *table, const real *gain, size_t N,
                               int C, void *work) {
    enum { COLUMNS = 16 };  // each thread owns whole columns and walks the rows in order
    // drows (V+1,C): the gradient of each row of the normalised table; then one row (C) of dtable.
    real *drows = work, *dtable_row = drows + (size_t)(V + 1) * C;
    memset(drows, 0, (size_t)(V + 1) * C * sizeof *drows);
    // forward:  x[n] = rows[ids[n]]
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += COLUMNS)
        for (size_t n = 0; n < N; n++) {
            real *d = drows + (size_t)ids[n] * C;
            for (int c = c0; c < C && c < c0 + COLUMNS; c++) d[c] += ((const real *)dx)[n * C + c];
        }
    // forward:  rows[v] = norm(table[v]);  rows[BYTE_DROPPED] = bias
    for (int v = 0; v < V; v++) {
        // Written into a row of its own and then added: += is the contract for parameters.
        norm_row_backward(dtable_row, dgain, dbias, drows + (size_t)v * C, table + (size_t)v * C,
                          gain, C, false);
        for (int c = 0; c < C; c++) dtable[(size_t)v * C + c] += dtable_row[c];
    }
    for (int c = 0; c < C; c++) dbias[c] += drows[(size_t)BYTE_DROPPED * C + c];
}

// ---- GELU and dropout

enum { PIECE = 256, CALLS = 16 };  // values at a time; Philox calls side by side in vectors

// Stores DROPPED where dropout takes a value of pre, channels 0..O-1 of row `row` of the batch.
static void drop_row(real *pre, const Dropout *d, uint64_t row, int O) {
    uint32_t step = d->state->step;
    for (int o0 = 0; o0 < O; o0 += 8 * CALLS) {
        uint32_t words[2][CALLS], draws[8 * CALLS];
        // Draws past O decide about nothing: a fixed count lets compilers make vectors of them.
        for (int i = 0; i < CALLS; i++) {
            // 8 of the 16 numbers; the other 8 are drawn again when row ^ 8 has its turn.
            Philox r = dropout_draw(d->seed, d->purpose, step, row, o0 + 8 * i, O);
            for (int w = 0; w < 2; w++) words[w][i] = dropout_bits(r, row, w);
        }
        for (int i = 0; i < CALLS; i++)
            for (int j = 0; j < 8; j++) draws[8 * i + j] = words[j / 4][i] >> 8 * (j % 4) & 0xFF;
        int n = O - o0 < 8 * CALLS ? O - o0 : 8 * CALLS;
        for (int j = 0; j < n; j++) pre[o0 + j] = draws[j] < d->threshold ? DROPPED : pre[o0 + j];
    }
}

// out = res + scale * gelu(pre), n values; out may be pre or res. (0 + -0 is 0: no -0 comes out.)
static void act_row(real *out, const real *pre, const real *res, real scale, int n) {
    // a stands apart: out may be pre or res, and a loop that may write what it reads makes no
    // vectors.
    real a[PIECE];
    for (int j0 = 0; j0 < n; j0 += PIECE) {
        int m = n - j0 < PIECE ? n - j0 : PIECE;
        for (int j = 0; j < m; j++) a[j] = scale * gelu(pre[j0 + j]);
        for (int j = 0; j < m; j++) out[j0 + j] = (res ? res[j0 + j] : 0) + a[j];
    }
}

void gelu_row(real *out, const real *pre, const real *res, int n) { act_row(out, pre, res, 1, n); }

// forward:  a = scale * gelu(pre)          dpre = dout * scale * gelu'(pre), in the place of pre
// a once more where it is not NULL.
static void act_row_backward(real *pre, real *a, const real *dout, real scale, int n) {
    // First a: the next line overwrites pre.
    for (int j = 0; j < n && a; j++) a[j] = scale * gelu(pre[j]);
    for (int j = 0; j < n; j++) pre[j] = dout[j] * (scale * gelu_grad(pre[j]));
}

// ---- Loss

// Softcap, softmax and cross-entropy of one row of V logits, in nats. With `scale` the row is
// overwritten by scale * dloss/dlogits.
static real cross_entropy_row(real *l, int target, real cap, real scale) {
    // p: softcapped logits, then exp(p - top), of which none overflows and one is 1.
    real p[V], slope[V], top = 0;
    for (int v = 0; v < V; v++) {
        real t = cap > 0 ? real_tanh(l[v] / cap) : 0;
        p[v] = cap > 0 ? cap * t : l[v];
        slope[v] = 1 - t * t;  // of cap * tanh(l/cap)
        if (v == 0 || p[v] > top) top = p[v];
    }
    real at_target = p[target] - top;
    double sum = 0;
    for (int v = 0; v < V; v++) p[v] = exp_real(p[v] - top);
    for (int v = 0; v < V; v++) sum += p[v];
    if (scale != 0)
        // forward:  loss = log(sum_v exp(p_v)) - p_target
        // dloss/dp_v = softmax(p)_v - (v is the target);  dp_v/dl_v = slope_v
        for (int v = 0; v < V; v++)
            l[v] = scale * slope[v] * (p[v] / (real)sum - (v == target ? 1 : 0));
    return (real)(log(sum) - at_target);
}

static void cpu_cross_entropy(real *losses, act *logits, const int *targets, float cap,
                              float scale, size_t N) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++) {
        real *l = (real *)logits + n * V;
        bool scored = targets[n] >= 0;
        losses[n] = scored ? cross_entropy_row(l, targets[n], cap, scale) : 0;
        // A row without a target must not reach backward: its logits are no gradient.
        if (!scored && scale != 0) memset(l, 0, V * sizeof *l);
    }
}

static void cpu_add_losses(StepState *state, const real *losses, size_t N, void *work) {
    // By one thread, in double, in the order of n: the same sum on every run.
    (void)work;
    for (size_t n = 0; n < N; n++) state->loss_sum += losses[n];
}

// ---- Data

// Windows and bytes are numbered within the step's batch, from `first` windows on: what is drawn
// does not depend on how the batch is cut into passes. A target is never dropped.
static void cpu_draw_batch(int *ids, int *targets, Corpus c, const StepState *state, uint64_t seed,
                           uint32_t byte_threshold, uint64_t first, int B, int T) {
    for (int b = 0; b < B; b++) {
        const uint8_t *window = c.text + window_start(&c, seed, state->step, first + (uint64_t)b);
        for (int t = 0; t < T; t++) {
            size_t n = (size_t)b * T + t;
            bool dropped = byte_dropped(seed, state->step, byte_threshold,
                                        (first + (uint64_t)b) * (uint64_t)T + (uint64_t)t);
            ids[n] = dropped ? BYTE_DROPPED : window[t];
            targets[n] = window[t + 1];
        }
    }
}

// ---- AdamW

// The sum of squares of x (n) in double: blocks of fixed size, eight running sums in each.
static double sum_squares(const real *x, size_t n, double *part) {
    enum { BLOCK = 4096 };
    size_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (size_t blk = 0; blk < blocks; blk++) {
        // Eight, because one sum would be a chain of additions, each waiting for the last.
        double sum[8] = {0};
        size_t end = n < (blk + 1) * BLOCK ? n : (blk + 1) * BLOCK;
        for (size_t i = blk * BLOCK; i < end; i++) sum[i % 8] += (double)x[i] * x[i];
        part[blk] = 0;
        for (int j = 0; j < 8; j++) part[blk] += sum[j];
    }
    double total = 0;
    for (size_t blk = 0; blk < blocks; blk++) total += part[blk];
    return total;
}

static void cpu_optimize(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                         size_t n_decay, StepState *state, double loss_scale, Hyper h,
                         void *work) {
    // One norm over all gradients: clipping scales them together and keeps their direction.
    double norm = sqrt(sum_squares(grads, n, work));
    AdamWStep a = adamw_schedule(&h, state->step);
    adamw_begin(&a, &h, state, norm, state->loss_sum * loss_scale);
    // adamw_begin has put loss and norm into the ring, so the host can say what was not finite.
    state->loss_sum = 0;
    if (!a.finite) return;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        adamw_update(&a, i < n_decay, &params[i], grads[i], &m[i], &v[i], ema ? &ema[i] : NULL);
        grads[i] = 0;  // for the next step: a pass over them less than at its beginning
    }
    state->step++;
}

// ---- Convolution
//
//   out[t] looks back:   sum_k w[k]   x[t - k*dil]       zero where t - k*dil < 0
//   dx[s]  looks ahead:  sum_k w[k]^T dout[s + k*dil]    zero where s + k*dil >= T
//   dil = 4, K = 3    o-------o-------o      forward reads t-8, t-4, t;  backward reads s, s+4, s+8
//
// Each of the three products, forward and the two gradients, is 2 N K C O operations.
//
// One tile of outputs makes all three products: ROWS x COLS sums that stay in registers. Per c it
// loads COLS/16 vectors of weights and ROWS scalars of x for ROWS*COLS multiply-adds. AVX-512 has
// 32 vector registers, of which 16 or 24 accumulate; AVX2 has 16, of which 12 do. The geometry
// sets the speed and never the bits: an output is ONE chain of multiply-adds, over k, then c.
#ifdef __AVX512F__
enum { ROWS = 8, COLS = 128 / sizeof(real) };
#else
enum { ROWS = 6, COLS = 64 / sizeof(real) };
#endif
enum {
    WIDE = 4 * COLS,         // columns of a lone row: 8 vectors, so that no sum waits for itself
    TILES = 8,               // tiles of rows that share a panel of weights while L2 holds it
    CHUNK = TILES * ROWS,    // rows that a thread takes at a time
    SPAN = 256,              // rows of dy that backward_weight keeps in L1: SPAN*COLS*4 = 32 KB
    SHARE = 64,              // channels of dw that a thread takes at a time
};

// a*b + c, rounded once where the hardware can. gcc is asked by name, because tuned for some CPUs
// it would fuse in one loop and not in another, and their bits would differ. clang always fuses
// under -ffp-contract=fast; asked by name, clang 14 spills the tile (61 instead of 223 GFLOP/s).
static inline real muladd(real a, real b, real c) {
#if defined __FMA__ && !defined __clang__
    return sizeof(real) == 4 ? (real)__builtin_fmaf((float)a, (float)b, (float)c)
                             : (real)__builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// out[r][j] += sum_k sum_c x[k*ROWS + r][c*step] * w[(k*depth + c)*stride + j], in this order.
// noinline: merged into a caller that knows K, gcc 12 takes acc out of the registers.
// step: from one term to the next, 1 along a row of x, C along time.
static __attribute__((noinline)) void tile(real out[ROWS][COLS], const real *const *x, size_t step,
                                           const real *w, size_t stride, int K, int depth) {
    // x moves on by ROWS pointers per tap, w by one row per tap and channel. The loop over r must
    // be unrolled whole (ROWS <= 16): registers cannot be indexed by a variable.
    real acc[ROWS][COLS];  // a local array: nothing else can point at it
    memcpy(acc, out, sizeof acc);
    for (int k = 0; k < K; k++, x += ROWS)
        for (int c = 0; c < depth; c++, w += stride)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma omp simd
                for (int j = 0; j < COLS; j++)
                    acc[r][j] = muladd(x[r][(size_t)c * step], w[j], acc[r][j]);
    memcpy(out, acc, sizeof acc);
}

// The same sums for a lone row. Every weight is used once: the time is that of reading them.
static __attribute__((noinline)) void wide_row(real *out, const real *const *x, const real *w,
                                               size_t stride, int K, int C) {
    real acc[WIDE];
    memcpy(acc, out, sizeof acc);
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++, w += stride)
#pragma omp simd
            for (int j = 0; j < WIDE; j++) acc[j] = muladd(x[k][c], w[j], acc[j]);
    memcpy(out, acc, sizeof acc);
}

static int at_most(int a, int b) { return a < b ? a : b; }
static size_t groups(size_t n, size_t size) { return (n + size - 1) / size; }

// One row of a tile in or out; the usual, full one becomes two vector moves.
static inline void copy_row(real *to, const real *from, int n) {
    memcpy(to, from, n == COLS ? COLS * sizeof(real) : (size_t)n * sizeof(real));
}

void conv_rows(real *const *out, const real *const *rows, int n, const real *w, const real *b,
               int K, int C, int O) {
    for (int j = 0; j < n; j++)
        for (int o = 0; o < O; o++) out[j][o] = b ? b[o] : 0;
    // WIDE columns while there is one row alone, then tiles, then what is left. Each continues the
    // chain that b begins, so which of them makes an output does not show in its bits.
    int o0 = 0;
    for (; n == 1 && O - o0 >= WIDE; o0 += WIDE)
        wide_row(out[0] + o0, rows, w + o0, (size_t)O, K, C);
    for (; O - o0 >= COLS; o0 += COLS)
        for (int j0 = 0; j0 < n; j0 += ROWS) {
            const real *from[ROWS * MAX_TAPS];
            real y[ROWS][COLS];
            for (int r = 0; r < ROWS; r++) {
                int j = at_most(j0 + r, n - 1);  // a row too many repeats the last
                memcpy(y[r], out[j] + o0, sizeof y[r]);
                for (int k = 0; k < K; k++) from[k * ROWS + r] = rows[k * n + j];
            }
            tile(y, from, 1, w + o0, (size_t)O, K, C);
            for (int r = 0; r < ROWS && j0 + r < n; r++)
                memcpy(out[j0 + r] + o0, y[r], sizeof y[r]);
        }
    for (int j = 0; j < n; j++)  // columns that fill no tile: the same chains
        for (int k = 0; k < K; k++)
            for (int c = 0; c < C; c++)
                for (int o = o0; o < O; o++)
                    out[j][o] = muladd(rows[k * n + j][c], w[((size_t)k * C + c) * O + o],
                                       out[j][o]);
}

// What lies before and after the text: a row of zeros, as wide as config_check allows.
static const real zeros[MAX_CHANNELS];

// Weights as panels of COLS columns, zeros where the last is not full: panels (width/COLS, K,
// depth, COLS), from w[k*depth*width + d*d_stride + j*j_stride]. Copied once per call, every tile
// then reads its weights as one stream; in place each line would lie in another page.
static void pack(real *panels, const real *w, int K, int depth, int width, size_t d_stride,
                 size_t j_stride) {
#pragma omp parallel for schedule(static)
    for (int j0 = 0; j0 < width; j0 += COLS) {
        int cols = at_most(COLS, width - j0);
        real *to = panels + (size_t)j0 * K * depth;
        for (int k = 0; k < K; k++)
            for (int d = 0; d < depth; d++, to += COLS) {
                const real *from = w + (size_t)k * depth * width + (size_t)d * d_stride;
                for (int j = 0; j < COLS; j++)
                    to[j] = j < cols ? from[(size_t)(j0 + j) * j_stride] : 0;
            }
    }
}

// Values, the last panel's zeros included.
static size_t panels_size(int K, int depth, int width) {
    return (size_t)K * depth * groups((size_t)width, COLS) * COLS;
}

// Where each row of each tile from row n0 on reads tap k: from[i][k*ROWS + r]. The address of a
// row outside the text is never formed. Returns the number of tiles.
static int point_at_rows(const real *from[TILES][ROWS * MAX_TAPS], const real *in, size_t n0,
                         size_t N, int T, int K, int shift, int depth) {
    int n = N - n0 < CHUNK ? (int)(N - n0) : CHUNK, tiles = (int)groups((size_t)n, ROWS);
    for (int i = 0; i < tiles * ROWS; i++) {
        size_t row = n0 + (size_t)i;
        int64_t t = (int64_t)(row % (size_t)T);
        for (int k = 0; k < K; k++) {
            int64_t at = t + (int64_t)k * shift;
            bool inside = row < N && at >= 0 && at < T;
            const real **p = &from[i / ROWS][k * ROWS + i % ROWS];
            // row - t is the window's first row. Added before t is taken off: nothing goes below 0.
            *p = inside ? in + (row + (size_t)at - (size_t)t) * (size_t)depth : zeros;
        }
    }
    return tiles;
}

// Rows n0 .. n0+CHUNK-1 (fewer at the end, N) of
//   out[t,j] = start[j] + sum_k sum_d panels[k,d,j] * in[t + k*shift, d]     zero outside 0..T-1
// `in` and `start` point at row 0 and column 0, `out` at row n0.
static void conv_chunk(real *out, const real *in, const real *start, const real *panels, size_t n0,
                       size_t N, int T, int K, int depth, int width, int shift) {
    const real *from[TILES][ROWS * MAX_TAPS];
    int tiles = point_at_rows(from, in, n0, N, T, K, shift, depth);
    for (int j0 = 0; j0 < width; j0 += COLS) {
        int cols = at_most(COLS, width - j0);
        real y[ROWS][COLS], first[COLS] = {0};
        if (start) copy_row(first, start + j0, cols);
        for (int i = 0; i < tiles; i++) {
            for (int r = 0; r < ROWS; r++) memcpy(y[r], first, sizeof first);
            tile(y, from[i], 1, panels + (size_t)j0 * K * depth, COLS, K, depth);
            for (int r = 0; r < ROWS && n0 + (size_t)(i * ROWS + r) < N; r++)
                copy_row(out + (size_t)(i * ROWS + r) * width + j0, y[r], cols);
        }
    }
}

static void cpu_conv_forward(act *out, act *pre, const act *x, const real *w, const real *b,
                             const act *res, Dropout drop, ConvShape s, void *work) {
    size_t N = (size_t)s.B * s.T, O = (size_t)s.O;
    real *panels = work;
    // A panel's columns are outputs, its depth the inputs: w (K,C,O) as it lies.
    pack(panels, w, s.K, s.C, s.O, O, 1);
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += CHUNK) {
        real *p = (real *)pre + n0 * O;
        int n = N - n0 < CHUNK ? (int)(N - n0) : CHUNK;
        // The activation follows chunk by chunk, while pre is in cache.
        conv_chunk(p, x, b, panels, n0, N, s.T, s.K, s.C, s.O, -s.dil);
        for (int i = 0; i < n && out && drop.threshold; i++)
            drop_row(p + (size_t)i * O, &drop, drop.first + n0 + (uint64_t)i, s.O);
        if (out)
            act_row((real *)out + n0 * O, p, res ? (const real *)res + n0 * O : NULL,
                    drop.threshold ? drop.scale : 1, n * s.O);
    }
}

// Without OpenMP the pragmas are ignored and one thread does everything.
static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// forward:  pre[t,o] += w[k,c,o] x[t - k*dil, c]       so  dx[s,c] += w[k,c,o] dy[s + k*dil, o]:
// a conv that looks ahead, with every tap's matrix transposed.
static void cpu_conv_backward_input(act *dx, act *pre, act *a, const act *dy, const real *w,
                                    float scale, ConvShape s, bool accumulate, void *work) {
    size_t N = (size_t)s.B * s.T, C = (size_t)s.C;
    real *panels = work, *scratch = panels + panels_size(s.K, s.O, s.C);
    // A panel's columns are inputs, its depth the outputs: each tap's (C,O), transposed.
    pack(panels, w, s.K, s.O, s.C, 1, (size_t)s.O);
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += CHUNK) {
        // Kept aside, because dpre needs the complete dx even where nobody keeps that.
        real *g = scratch + (size_t)thread_number() * CHUNK * C;
        real *d = dx ? (real *)dx + n0 * C : NULL;
        // n: values, not rows.
        size_t n = (N - n0 < CHUNK ? N - n0 : CHUNK) * C;
        conv_chunk(g, dy, NULL, panels, n0, N, s.T, s.K, s.O, s.C, +s.dil);
        for (size_t i = 0; i < n && accumulate; i++) g[i] += d[i];
        if (d) memcpy(d, g, n * sizeof *d);
        // forward, below:  x = [res +] scale * gelu(pre)
        if (pre)
            act_row_backward((real *)pre + n0 * C, a ? (real *)a + n0 * C : NULL, g, scale, (int)n);
    }
}

// forward:  pre[t,o] += w[k,c,o] x[t - k*dil, c],  pre[t,o] += b[o]
// The same tile, whose rows are channels and whose sum runs over time: row r is channel c0+r, one
// step in time is C values on. Of taps that reach before the text nothing is read: the sum starts
// at t = k*dil. A block of COLS columns and up to SHARE channels of tap k is one thread's, for the
// whole batch, in the order of n.
static void weight_block(const WeightJob *job, bool with_bias, const ConvShape *s, int k,
                         int c_begin, int o0) {
    real *dw = job->dw, *db = with_bias ? job->db : NULL;
    const real *x = job->x, *dy = job->dy;
    real panel[SPAN][COLS], sums[ROWS][COLS];
    const real *from[ROWS];
    int cols = at_most(COLS, s->O - o0);
    int c_end = at_most(c_begin + SHARE, s->C);
    int64_t reach = (int64_t)k * job->dil;
    for (int n = 0; n < s->B; n++)
        for (int64_t t0 = reach; t0 < s->T; t0 += SPAN) {
            int span = s->T - t0 < SPAN ? (int)(s->T - t0) : SPAN;
            // dy0: dy[n, t0, o0]; x0: x[n, t0 - k*dil, 0]
            const real *dy0 = dy + ((size_t)n * s->T + (size_t)t0) * s->O + o0;
            const real *x0 = x + ((size_t)n * s->T + (size_t)(t0 - reach)) * s->C;
            // The panel is a dense copy: all channels read it from L1. Columns past O count as 0.
            if (cols < COLS) memset(panel, 0, sizeof panel);
            for (int t = 0; t < span; t++) copy_row(panel[t], dy0 + (size_t)t * s->O, cols);
            // forward:  pre[t,o] += b[o]
            for (int t = 0; t < span && db; t++)
                for (int j = 0; j < cols; j++) db[o0 + j] += panel[t][j];
            for (int c0 = c_begin; c0 < c_end; c0 += ROWS) {
                // dw itself is the running sum: read, continued by this span, written back.
                real *dw_k = dw + ((size_t)k * s->C + c0) * s->O + o0;
                int channels = at_most(ROWS, c_end - c0);
                memset(sums, 0, sizeof sums);
                // A channel too many repeats the last one of x; its sums are not written.
                for (int r = 0; r < ROWS; r++) from[r] = x0 + at_most(c0 + r, s->C - 1);
                for (int r = 0; r < channels; r++) copy_row(sums[r], dw_k + (size_t)r * s->O, cols);
                // dw[k,c,o] += sum_t x[t - k*dil, c] dy[t,o]
                tile(sums, from, (size_t)s->C, panel[0], COLS, 1, span);
                for (int r = 0; r < channels; r++) copy_row(dw_k + (size_t)r * s->O, sums[r], cols);
            }
        }
}

static void cpu_conv_backward_weight(const WeightJob *jobs, int n, ConvShape s, void *work) {
    // Job, tap, channels and columns name a piece of dw: no two threads write the same value.
    (void)work;
#pragma omp parallel for collapse(4) schedule(dynamic)
    for (int i = 0; i < n; i++)
        for (int k = 0; k < s.K; k++)
            for (int c0 = 0; c0 < s.C; c0 += SHARE)
                for (int o0 = 0; o0 < s.O; o0 += COLS)
                    // tap 0 sees every t: its first block also sums the bias
                    weight_block(&jobs[i], k == 0 && c0 == 0, &s, k, c0, o0);
}

// ---- The CPU's table

static void *cpu_alloc(size_t bytes) { return malloc(bytes); }
// Linux grants memory that it does not have and kills the program later: so ask what there is.
static size_t cpu_available(void) {
    unsigned long long kilobytes = 0;
    FILE *f = fopen("/proc/meminfo", "r");
    char line[256];
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
    if (f) fclose(f);
    return kilobytes ? (size_t)kilobytes * 1024 : SIZE_MAX;  // elsewhere malloc has the word
}
static void cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void cpu_copy(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
// An act is a real here: the moves of activations are plain copies.
static void cpu_write_acts(act *dst, const real *src, size_t n) {
    memcpy(dst, src, n * sizeof *src);
}
static void cpu_read_acts(real *dst, const act *src, size_t n) {
    memcpy(dst, src, n * sizeof *dst);
}
static const char *cpu_error(void) { return NULL; }

static size_t cpu_work_bytes(size_t N, int K, int width, size_t n) {
    // Layers run one after another and share: the most that one of them takes. In values: a conv's
    // panels and a chunk of dx per thread; LayerNorm's partial sums; the embedding's rows.
    size_t w = (size_t)width;
    size_t conv = panels_size(K, width, width) + (size_t)thread_count() * CHUNK * w;
    size_t norm = blocks_of(N) * 2 * w, embed = (V + 2) * w;
    size_t most = conv > norm ? conv : norm;
    if (embed > most) most = embed;
    most *= sizeof(real);
    // In bytes: sum_squares' blocks, 4096 values each.
    size_t optimizer = (n / 4096 + 1) * sizeof(double);
    return most > optimizer ? most : optimizer;
}

const Backend cpu_backend = {
    // Left NULL: pass_rows (all rows at a time), sync_params (there is no copy of the parameters),
    // record and what goes with it (nothing is launched).
    .name = "cpu",
    .idea = "plain C with OpenMP, float32: the reference",
    .act_bytes = sizeof(real),
    .available = cpu_available,
    .alloc = cpu_alloc,
    .free = free,
    .zero = cpu_zero,
    .upload = cpu_copy,
    .download = cpu_copy,
    .write_acts = cpu_write_acts,
    .read_acts = cpu_read_acts,
    .work_bytes = cpu_work_bytes,
    .embed_forward = cpu_embed_forward,
    .embed_backward = cpu_embed_backward,
    .norm_forward = cpu_norm_forward,
    .norm_backward = cpu_norm_backward,
    .conv_forward = cpu_conv_forward,
    .conv_backward_input = cpu_conv_backward_input,
    .conv_backward_weight = cpu_conv_backward_weight,
    .cross_entropy = cpu_cross_entropy,
    .add_losses = cpu_add_losses,
    .draw_batch = cpu_draw_batch,
    .optimize = cpu_optimize,
    .error = cpu_error,
};
