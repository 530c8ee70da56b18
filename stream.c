// stream.c: the forward pass of model.c for one new byte at a time, and the drawing of the next.
//
// The same layers in the same order on single rows (conv_rows, norm_row, gelu), so the logits are
// those of model_forward bit for bit; test_sample.c holds the two together. Weights are read once
// a byte: their reading is the limit for one stream, so several streams cost little more than one.
// Read stream.h first. Run:  ./sample out/model.safetensors --prompt "The "
#include "stream.h"

#include <stdlib.h>

enum {
    // Output channels of a panel: as many as conv_rows takes of a lone row, or of several rows.
    PANEL_ONE = 128,
    PANEL_MANY = 32,
    // Weights of an average layer from which threads gain more by sharing it than they lose by
    // waiting for each other.
    WORTH_THREADS = 1 << 16,
};

// ---- Memory: all weights in one allocation, all that changes in another -------------------------

// Hands out pieces of an allocation, each at a multiple of 64 bytes; with base NULL it only counts.
typedef struct {
    real *base;
    size_t used;
    double bytes;  // the same as a double: no overflow goes unseen
} Pieces;

static real *piece(Pieces *p, size_t a, size_t b, size_t c) {
    enum { STEP = 64 / sizeof(real) };
    real *at = p->base ? p->base + p->used : NULL;
    p->used += (a * b * c + STEP - 1) / STEP * STEP;
    p->bytes += ((double)a * (double)b * (double)c + STEP) * sizeof(real);
    return at;
}

// w (K,C,O) as panels, each (K,C,width): panel o0 starts at K*C*o0.
// Counting, it copies nothing and does not read w.
static Panels cut(Pieces *p, const real *w, const real *b, int K, int C, int O, int panel) {
    real *weight = piece(p, (size_t)K * (size_t)C, (size_t)O, 1);
    real *bias = b ? piece(p, (size_t)O, 1, 1) : NULL;
    for (int o0 = 0; weight && o0 < O; o0 += panel) {
        size_t KC = (size_t)K * (size_t)C, width = (size_t)(O - o0 < panel ? O - o0 : panel);
        for (size_t kc = 0; kc < KC; kc++)
            memcpy(weight + KC * (size_t)o0 + kc * width, w + kc * (size_t)O + o0,
                   width * sizeof *w);
    }
    if (bias) memcpy(bias, b, (size_t)O * sizeof *b);
    return (Panels){.K = K, .C = C, .O = O, .weight = weight, .bias = bias};
}

static const real *copy(Pieces *p, const real *x, int n) {
    real *to = piece(p, (size_t)n, 1, 1);
    if (to) memcpy(to, x, (size_t)n * sizeof *x);
    return to;
}

// LayerNorm(E), so that the first layer is a look-up.
// LayerNorm looks at one row alone, so normalising V rows once does for all bytes to come.
static const real *normalised(Pieces *p, const real *table, const real *gain, const real *bias,
                              int C) {
    real *to = piece(p, V, (size_t)C, 1);
    for (int v = 0; to && v < V; v++)
        norm_row(to + (size_t)v * (size_t)C, table + (size_t)v * (size_t)C, gain, bias, C);
    return to;
}

// The tied head as a linear map (C,V): the embedding (V,C), transposed.
static Panels tied_head(Pieces *p, const real *table, int C, int panel) {
    real *w = p->base ? malloc((size_t)V * (size_t)C * sizeof *w) : NULL;
    for (int v = 0; w && v < V; v++)
        for (int c = 0; c < C; c++) w[c * V + v] = table[(size_t)v * (size_t)C + (size_t)c];
    Panels head = cut(p, w, NULL, 1, C, V, panel);
    // build() sees it and fails.
    if (p->base && !w) head.weight = NULL;
    free(w);
    return head;
}

// Places everything; with both bases NULL it only counts, and P is not read.
static void place(Stream *s, const Model *m, const real *P, Pieces *weights, Pieces *state) {
    const Config *c = &s->config;
    int C = c->channels;
    size_t n = (size_t)s->capacity;
    s->table = normalised(weights, P + m->embedding, P + m->norm_in.gain, P + m->norm_in.bias, C);
    for (int l = 0; l < s->L; l++) {
        StreamConv *v = &s->convs[l];
        const Conv *from = &m->convs[l];
        v->panels = cut(weights, P + from->weight, P + from->bias, c->taps, C, C, s->panel);
        v->dil = from->dil;
        // A pre-norm unit is one conv; the paper's is a block, which ends at the last dilation.
        v->unit_end = c->form == BLOCK_PRENORM || from->index == c->n_dilations - 1;
        if (c->form == BLOCK_PRENORM) {
            v->gain = copy(weights, P + from->norm.gain, C);
            v->beta = copy(weights, P + from->norm.bias, C);
        }
        // The furthest tap reads (K-1)*dil rows back; the row of now is one more.
        v->ring_rows = (size_t)(c->taps - 1) * (size_t)v->dil + 1;
        v->ring = piece(state, v->ring_rows, n, (size_t)C);
    }
    s->gain_out = copy(weights, P + m->norm_out.gain, C);
    s->beta_out = copy(weights, P + m->norm_out.bias, C);
    if (c->tie) {
        s->head = tied_head(weights, P + m->embedding, C, s->panel);
    } else {
        s->proj = cut(weights, P + m->proj, P + m->proj_bias, 1, C, c->latent, s->panel);
        s->head = cut(weights, P + m->head, P + m->head_bias, 1, c->latent, V, s->panel);
    }
    s->x = piece(state, n, (size_t)C, 1);
    s->pre = piece(state, n, (size_t)C, 1);
    s->h = piece(state, n, (size_t)C, 1);
    s->z = piece(state, n, (size_t)c->latent, 1);
    // Never written: aligned() has zeroed it.
    s->zero_row = piece(state, (size_t)C, 1, 1);
}

// Pieces start at a cache line: conv_rows reads weights a line at a time.
static real *aligned(size_t n) {
    real *p = n <= SIZE_MAX / sizeof *p - 1 ? aligned_alloc(64, n * sizeof *p) : NULL;
    if (p) memset(p, 0, n * sizeof *p);
    return p;
}

// Counts, allocates and fills, in this order.
static int build(Stream *s, const Model *m, const real *params, Error *e) {
    Pieces weights = {0}, state = {0};
    s->L = m->L;
    s->convs = calloc((size_t)m->L, sizeof *s->convs);
    if (!s->convs) return fail(e, "out of memory");
    place(s, m, params, &weights, &state);
    // Pointers: K*S for each conv, S for the rows of h and S for those of z.
    size_t rows = ((size_t)m->L * (size_t)s->config.taps + 2) * (size_t)s->capacity;
    double need = weights.bytes + state.bytes + (double)rows * sizeof *s->row_space;
    double there = (double)cpu_backend.available();
    if (need <= there) {
        s->weights = weights.base = aligned(weights.used);
        s->state = state.base = aligned(state.used);
        s->row_space = calloc(rows, sizeof *s->row_space);
    }
    if (!s->weights || !s->state || !s->row_space)
        return fail(e, "%d streams need %.3g GB of memory, and %.3g GB are free", s->capacity,
                    need / 1e9, there / 1e9);
    // The same walk again, now with memory under it: the counts come out as before.
    weights.used = state.used = 0;
    place(s, m, params, &weights, &state);
    // + 2: projection and head.
    s->layer_weights = weights.used / (size_t)(m->L + 2);
    return s->head.weight ? 0 : fail(e, "out of memory");
}

int stream_open(Stream *s, const Config *config, const real *params, int capacity, Error *e) {
    *s = (Stream){.config = *config, .capacity = capacity,
                  .panel = capacity == 1 ? PANEL_ONE : PANEL_MANY};
    if (config_check(config, e)) return -1;
    if (capacity < 1 || capacity > MAX_STREAMS)
        return fail(e, "%d streams, expected 1 to %d", capacity, MAX_STREAMS);
    // Its table of tensors alone says where in params each begins; no memory for parameters.
    Model m = {.config = *config};
    int status = model_describe(&m, e);
    if (status == 0) status = build(s, &m, params, e);
    model_free(&m);
    if (status)
        stream_free(s);
    else
        stream_begin(s, capacity);
    return status;
}

void stream_free(Stream *s) {
    free(s->convs);
    free(s->row_space);
    free(s->weights);
    free(s->state);
    *s = (Stream){0};
}

void stream_begin(Stream *s, int S) {
    s->S = S;
    // The rings keep their old rows: point_at_rows reads none from before position 0.
    s->position = 0;
    // One stream is limited by reading weights; from about six on, arithmetic is.
    s->parallel = s->layer_weights * (size_t)(S + 5) / 6 >= WORTH_THREADS;
    // h_rows and z_rows point where they do from here on; the convs' are set for every byte.
    const real **rows = s->row_space;
    for (int l = 0; l < s->L; l++) {
        s->convs[l].rows = rows;
        rows += s->config.taps * S;
    }
    for (int j = 0; j < S; j++) {
        rows[j] = s->h + (size_t)j * (size_t)s->config.channels;
        rows[S + j] = s->z + (size_t)j * (size_t)s->config.latent;
    }
    s->h_rows = rows;
    s->z_rows = rows + S;
}

// ---- One byte -----------------------------------------------------------------------------------

// Row of stream 0 at time t in a layer's ring; the other streams' rows follow it.
static real *ring_row(const Stream *s, const StreamConv *v, uint64_t t) {
    return v->ring + (size_t)(t % v->ring_rows) * (size_t)s->capacity * (size_t)s->config.channels;
}

// Points every layer at its inputs: rows[k*S + j] is that of stream j, k*dil bytes ago.
static void point_at_rows(const Stream *s) {
    for (int l = 0; l < s->L; l++) {
        const StreamConv *v = &s->convs[l];
        for (int k = 0; k < s->config.taps; k++) {
            uint64_t back = (uint64_t)k * (uint64_t)v->dil;
            bool inside = s->position >= back;
            const real *row = inside ? ring_row(s, v, s->position - back) : s->zero_row;
            for (int j = 0; j < s->S; j++)
                v->rows[k * s->S + j] = row + (inside ? (size_t)j * (size_t)s->config.channels : 0);
        }
    }
}

// What follows a conv, for channels o0.. of all streams: into the residual and the next ring.
static void activate(const Stream *s, int l, int o0, int width) {
    const StreamConv *v = &s->convs[l];
    // A next conv with a norm at its door gets that norm's rows instead, from norm_rows.
    bool feeds = l + 1 < s->L && !s->convs[l + 1].gain;
    real *ring = feeds ? ring_row(s, v + 1, s->position) : NULL;
    for (int j = 0; j < s->S; j++) {
        size_t at = (size_t)j * (size_t)s->config.channels + (size_t)o0;
        real *pre = s->pre + at, *x = s->x + at;
        // forward:  x[u+1] = x[u] + f(pre) at the end of a unit; f(pre) alone, in place, inside it
        real *out = v->unit_end ? x : pre;
        gelu_row(out, pre, v->unit_end ? x : NULL, width);
        if (feeds) memcpy(ring + at, out, (size_t)width * sizeof *x);
    }
}

// out (S,O) = the layer's map of rows, and for conv l >= 0 what follows it. Threads take panels;
// all are done when it returns. Called by every thread of the team, like the next two.
static void map_rows(const Stream *s, const Panels *p, real *out, const real *const *rows, int l) {
#pragma omp for schedule(static)
    for (int o0 = 0; o0 < p->O; o0 += s->panel) {
        real *to[MAX_STREAMS];
        int width = p->O - o0 < s->panel ? p->O - o0 : s->panel;
        for (int j = 0; j < s->S; j++) to[j] = out + (size_t)j * (size_t)p->O + o0;
        conv_rows(to, rows, s->S, p->weight + (size_t)p->K * (size_t)p->C * (size_t)o0,
                  p->bias ? p->bias + o0 : NULL, p->K, p->C, width);
        if (l >= 0) activate(s, l, o0, width);
    }
}

// The rows of the residual stream through a norm.
// All are done when it returns: the conv that follows reads what other threads wrote.
static void norm_rows(const Stream *s, real *out, const real *gain, const real *beta) {
    size_t C = (size_t)s->config.channels;
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++)
        norm_row(out + (size_t)j * C, s->x + (size_t)j * C, gain, beta, (int)C);
}

// x (S,C) = normalised rows of the bytes; also the first conv's input, where no norm comes between.
static void embed(const Stream *s, const int *ids) {
    size_t C = (size_t)s->config.channels;
    real *ring = s->convs[0].gain ? NULL : ring_row(s, &s->convs[0], s->position);
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++) {
        const real *row = s->table + (size_t)ids[j] * C;
        memcpy(s->x + (size_t)j * C, row, C * sizeof *row);
        if (ring) memcpy(ring + (size_t)j * C, row, C * sizeof *row);
    }
}

void stream_push(Stream *s, const int *ids, real *latents, real *logits) {
    // Before the threads start: addresses depend on the position, not on what the layers compute.
    point_at_rows(s);
#pragma omp parallel if (s->parallel)
    {
        embed(s, ids);
        for (int l = 0; l < s->L; l++) {
            const StreamConv *v = &s->convs[l];
            // Into the ring itself: what a conv reads is what its ring must keep.
            if (v->gain) norm_rows(s, ring_row(s, v, s->position), v->gain, v->beta);
            map_rows(s, &v->panels, s->pre, v->rows, l);
        }
        norm_rows(s, s->h, s->gain_out, s->beta_out);
        if (s->config.tie) {
            map_rows(s, &s->head, logits, s->h_rows, -1);
        } else {
            map_rows(s, &s->proj, s->z, s->h_rows, -1);
            map_rows(s, &s->head, logits, s->z_rows, -1);
        }
    }
    if (latents)
        memcpy(latents, s->config.tie ? s->h : s->z,
               (size_t)s->S * (size_t)s->config.latent * sizeof *latents);
    // Last: until here it is the time t of this byte, by which the rings are indexed.
    s->position++;
}

// ---- The next byte ------------------------------------------------------------------------------

// One of 256 places, its probability (times a constant) in p.
typedef struct {
    double p;
    int byte;
} Candidate;

// Likeliest first; of equals the smaller byte, so that the order is one on every machine.
static int by_likelihood(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return x->byte - y->byte;
}

int stream_sample(const Stream *s, const Sampler *sampler, const real *logits, int j) {
    Candidate c[V];
    real l[V], cap = s->config.softcap, heat = (real)sampler->temperature;
    int best = 0, n = V;
    for (int v = 0; v < V; v++) {
        l[v] = cap > 0 ? cap * (real)tanh(logits[v] / cap) : logits[v];
        if (l[v] > l[best]) best = v;
    }
    if (sampler->temperature == 0) return best;
    // The largest exponent becomes 0: nothing overflows, and the sum is at least 1.
    real top = l[best];
    for (int v = 0; v < V; v++) l[v] = exp_real((l[v] - top) / heat);
    double all = 0, kept = 0;
    for (int v = 0; v < V; v++) {
        c[v] = (Candidate){l[v], v};
        all += c[v].p;
    }
    // top_p is a share of all probability, not of what top_k leaves. One candidate always stays.
    int i = 0, most = sampler->top_k > 0 ? sampler->top_k : V;
    if (most < V || sampler->top_p < 1) {
        qsort(c, V, sizeof *c, by_likelihood);  // longer than all the rest: only where needed
        while (i < most && i < V && (i == 0 || kept < sampler->top_p * all)) kept += c[i++].p;
        n = i;
    } else {
        kept = all;
    }
    // Key and counter are seed, position and stream: what is drawn depends on nothing else.
    Philox r = philox(sampler->seed, (uint32_t)s->position, (uint32_t)(s->position >> 32),
                      (uint32_t)j, RNG_SAMPLE);
    // 53 random bits: uniform in [0, kept). Rounding may leave it at `kept`: then the last one.
    double u = (double)((uint64_t)r.v[0] << 21 | r.v[1] >> 11) / 9007199254740992.0 * kept;
    // Walks along [0, kept) candidate by candidate until u lies within one.
    for (i = 0; i < n - 1 && u >= c[i].p; i++) u -= c[i].p;
    return c[i].byte;
}
