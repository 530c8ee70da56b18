// stream.c: the model one byte at a time: rings instead of windows. Read stream.h first.
#include "support/stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fast/layers.h"
#include "support/arithmetic.h"

enum {
    // Output channels of a panel: as many as conv_rows takes of a lone row, or of several rows.
    PANEL_ONE = 128,
    PANEL_MANY = 32,
    // Weights of an average layer from which threads gain more by sharing it than they lose by
    // waiting for each other.
    WORTH_THREADS = 1 << 16,
};

// ---- Memory: all weights in one allocation, all that changes in another -------------------------

// Every piece starts at a multiple of 64 bytes: conv_rows reads weights a line at a time.
static real *piece(Pieces *p, size_t a, size_t b, size_t c) {
    enum { STEP = 64 / sizeof(real) };
    real *at = p->base ? p->base + p->used : NULL;
    p->used += (a * b * c + STEP - 1) / STEP * STEP;
    p->bytes += ((double)a * (double)b * (double)c + STEP) * sizeof(real);
    return at;
}

real *stream_state(Stream *s, size_t rows, int C) {
    return piece(&s->state_pieces, rows, (size_t)s->capacity, (size_t)C);
}

// w (K,C,O) as panels, each (K,C,width): panel o0 starts at K*C*o0.
// Counting, it copies nothing and does not read w.
static Panels cut(Stream *s, const real *w, const real *b, int K, int C, int O) {
    Pieces *p = &s->weight_pieces;
    real *weight = piece(p, (size_t)K * (size_t)C, (size_t)O, 1);
    real *bias = b ? piece(p, (size_t)O, 1, 1) : NULL;
    for (int o0 = 0; weight && o0 < O; o0 += s->panel) {
        size_t KC = (size_t)K * (size_t)C, width = (size_t)(O - o0 < s->panel ? O - o0 : s->panel);
        for (size_t kc = 0; kc < KC; kc++)
            memcpy(weight + KC * (size_t)o0 + kc * width, w + kc * (size_t)O + o0,
                   width * sizeof *w);
    }
    if (bias) memcpy(bias, b, (size_t)O * sizeof *b);
    s->n_maps++;
    return (Panels){.K = K, .C = C, .O = O, .weight = weight, .bias = bias};
}

Panels stream_panels(Stream *s, const Linear *l) {
    const real *bias = l->bias == NO_BIAS ? NULL : s->params + l->bias;
    return cut(s, s->params + l->weight, bias, l->K, l->C, l->O);
}

void stream_taps(Stream *s, Taps *t, const Linear *l) {
    *t = (Taps){.K = l->K, .dil = l->dil, .C = l->C};
    // The furthest tap reads (K-1)*dil rows back; the row of now is one more.
    t->length = (size_t)(l->K - 1) * (size_t)l->dil + 1;
    t->ring = stream_state(s, t->length, l->C);
    if (s->taps) s->taps[s->n_taps] = t;
    s->n_taps++;
    s->n_rows += (size_t)l->K;
}

const real *stream_copy(Stream *s, size_t offset, size_t n) {
    real *to = piece(&s->weight_pieces, n, 1, 1);
    if (to) memcpy(to, s->params + offset, n * sizeof *to);
    return to;
}

// LayerNorm(E), or E where there is none, so that the first layer is a look-up. LayerNorm looks at
// one row alone, so normalising V rows once does for all bytes to come.
static const real *normalised(Stream *s) {
    const Model *m = &s->table;
    const real *P = s->params;
    size_t C = (size_t)m->config.channels;
    if (m->config.no_norm_in) return stream_copy(s, m->embedding, V * C);
    real *to = piece(&s->weight_pieces, V, C, 1);
    for (size_t v = 0; to && v < V; v++)
        norm_row(to + v * C, P + m->embedding + v * C, P + m->norm_in.gain, P + m->norm_in.bias,
                 (int)C);
    return to;
}

// The tied head as a linear map (C,V): the embedding (V,C), transposed.
static Panels tied_head(Stream *s) {
    size_t C = (size_t)s->table.config.channels;
    const real *table = s->params + s->table.embedding;
    bool counting = !s->weight_pieces.base;
    real *w = counting ? NULL : malloc(V * C * sizeof *w);
    for (size_t v = 0; w && v < V; v++)
        for (size_t c = 0; c < C; c++) w[c * V + v] = table[v * C + c];
    if (!counting && !w) return (Panels){0};  // build() sees it and fails
    Panels head = cut(s, w, NULL, 1, (int)C, V);
    free(w);
    return head;
}

// Places everything; while the bases are NULL it only counts, and params are not read.
static void place_all(Stream *s) {
    const Model *m = &s->table;
    const Config *c = &m->config;
    int C = c->channels, wide = C > c->latent ? C : c->latent;
    s->n_taps = 0;
    s->n_rows = 2;  // the rows of h and those of z
    s->n_maps = 0;
    s->embedded = normalised(s);
    for (int i = 0; i < m->U; i++) {
        StreamUnit *u = &s->units[i];
        const Mixer *mixer = u->unit->mixer;
        if (mixer->norm) {
            u->gain = stream_copy(s, u->unit->norm.gain, (size_t)C);
            u->beta = stream_copy(s, u->unit->norm.bias, (size_t)C);
        }
        if (u->unit->skip.to) u->kept = stream_state(s, 1, C);
        if (u->unit->skip.from) {
            u->scale = stream_copy(s, u->unit->skip.scale, (size_t)C);
            u->kept = s->units[u->unit->skip.from->index].kept;
        }
        if (mixer->stream_place) mixer->stream_place(s, u);
        int width = mixer->width ? (int)mixer->width(u->unit) : C;
        if (width > wide) wide = width;
    }
    if (!c->no_norm_out) {
        s->gain_out = stream_copy(s, m->norm_out.gain, (size_t)C);
        s->beta_out = stream_copy(s, m->norm_out.bias, (size_t)C);
    }
    if (!c->tie) s->proj = stream_panels(s, &m->proj);
    s->head = c->tie ? tied_head(s) : stream_panels(s, &m->head);
    s->x = stream_state(s, 1, C);
    s->h = stream_state(s, 1, C);
    s->z = stream_state(s, 1, wide);
    s->pre = stream_state(s, 1, wide);
    real *zeros = piece(&s->state_pieces, (size_t)wide, 1, 1);
    if (zeros) memset(zeros, 0, (size_t)wide * sizeof *zeros);
    s->zero_row = zeros;
}

// Left unwritten: the system gives memory to what is written, so rings take as much as the text is
// long, and no row of a ring is read before it is written.
static real *aligned(size_t n) {
    return n <= SIZE_MAX / sizeof(real) - 1 ? aligned_alloc(64, n * sizeof(real)) : NULL;
}

// Lists tensors and units, and counts what all of them need.
static int count(Stream *s, Error *e) {
    const Model *m = &s->table;
    if (config_check(&m->config, e)) return -1;
    if (s->capacity < 1 || s->capacity > MAX_STREAMS)
        return fail(e, "%d streams, expected 1 to %d", s->capacity, MAX_STREAMS);
    // Its table of tensors alone says where in params each begins; no memory for parameters.
    if (model_describe(&s->table, e)) return -1;
    s->units = calloc((size_t)m->U, sizeof *s->units);
    if (!s->units) return fail(e, "out of memory");
    for (int i = 0; i < m->U; i++) {
        s->units[i].unit = &m->units[i];
        s->units[i].data = calloc(1, m->units[i].mixer->stream_bytes);
        if (!s->units[i].data) return fail(e, "out of memory");
    }
    place_all(s);
    s->state_pieces.bytes += (double)s->n_rows * s->capacity * sizeof *s->row_space;
    return 0;
}

// Allocates what count() found and fills it.
static int build(Stream *s, Error *e) {
    double weights = s->weight_pieces.bytes, state = s->state_pieces.bytes;
    double there = (double)cpu_backend.available();
    if (weights + state <= there) {
        s->weights = s->weight_pieces.base = aligned(s->weight_pieces.used);
        s->state = s->state_pieces.base = aligned(s->state_pieces.used);
        s->row_space = calloc(s->n_rows * (size_t)s->capacity, sizeof *s->row_space);
        s->taps = calloc((size_t)s->n_taps + 1, sizeof *s->taps);
    }
    if (!s->weights || !s->state || !s->row_space || !s->taps)
        return fail(e, "%d stream%s %.3g GB of memory (%.3g for weights, %.3g for what the units "
                       "keep of the past), and %.3g GB are free", s->capacity,
                    s->capacity > 1 ? "s need" : " needs", (weights + state) / 1e9, weights / 1e9,
                    state / 1e9, there / 1e9);
    // The same walk again, now with memory under it: the counts come out as before.
    s->weight_pieces.used = s->state_pieces.used = 0;
    place_all(s);
    return s->head.weight ? 0 : fail(e, "out of memory");
}

int stream_open(Stream *s, const Config *config, const real *params, int capacity, Error *e) {
    *s = (Stream){.table = {.config = *config}, .capacity = capacity, .params = params,
                  .panel = capacity == 1 ? PANEL_ONE : PANEL_MANY};
    if (count(s, e) || build(s, e)) {
        stream_free(s);
        return -1;
    }
    stream_begin(s, capacity);
    return 0;
}

int stream_memory(const Config *config, int capacity, double *weights, double *state, Error *e) {
    const real nothing = 0;  // counting reads no parameters
    Stream s = {.table = {.config = *config}, .capacity = capacity, .params = &nothing,
                .panel = PANEL_MANY};
    int status = count(&s, e);
    *weights = s.weight_pieces.bytes;
    *state = s.state_pieces.bytes;
    stream_free(&s);
    return status;
}

void stream_free(Stream *s) {
    for (int i = 0; s->units && i < s->table.U; i++) free(s->units[i].data);
    free(s->units);
    free(s->taps);
    free(s->row_space);
    free(s->weights);
    free(s->state);
    model_free(&s->table);
    *s = (Stream){0};
}

void stream_begin(Stream *s, int S) {
    const Config *c = &s->table.config;
    s->S = S;
    // The rings keep their old rows: point_at_rows reads none from before position 0.
    s->position = 0;
    for (int j = 0; j < S; j++) s->before[j] = BYTE_DROPPED, s->starts[j] = 0;
    // One stream is limited by reading weights; from about six on, arithmetic is.
    size_t weights = s->weight_pieces.used / s->n_maps;
    s->parallel = weights * (size_t)(S + 5) / 6 >= WORTH_THREADS;
    // h_rows and z_rows point where they do from here on; the taps' are set for every byte.
    const real **rows = s->row_space;
    for (int i = 0; i < s->n_taps; i++) {
        s->taps[i]->rows = rows;
        rows += s->taps[i]->K * S;
    }
    for (int j = 0; j < S; j++) {
        rows[j] = s->h + (size_t)j * (size_t)c->channels;
        rows[S + j] = s->z + (size_t)j * (size_t)c->latent;
    }
    s->h_rows = rows;
    s->z_rows = rows + S;
}

// ---- One byte -----------------------------------------------------------------------------------

// Row of stream 0 at time t; the other streams' rows follow it.
static real *ring_row(const Stream *s, const Taps *t, uint64_t time) {
    return t->ring + (size_t)(time % t->length) * (size_t)s->capacity * (size_t)t->C;
}

real *taps_input(const Stream *s, const Taps *t) { return ring_row(s, t, s->position); }

// Points every tap at its inputs: rows[k*S + j] is that of stream j, k*dil bytes ago.
static void point_at_rows(const Stream *s) {
    for (int i = 0; i < s->n_taps; i++) {
        const Taps *t = s->taps[i];
        for (int k = 0; k < t->K; k++) {
            uint64_t back = (uint64_t)k * (uint64_t)t->dil;
            bool inside = s->position >= back;
            const real *row = inside ? ring_row(s, t, s->position - back) : s->zero_row;
            for (int j = 0; j < s->S; j++)
                t->rows[k * s->S + j] = row + (inside ? (size_t)j * (size_t)t->C : 0);
        }
    }
}

void stream_map(const Stream *s, const Panels *p, real *to, const real *const *rows, Activation f) {
    bool plain = to && f == ACT_none;
#pragma omp for schedule(static)
    for (int o0 = 0; o0 < p->O; o0 += s->panel) {
        real *sums[MAX_STREAMS];
        int width = p->O - o0 < s->panel ? p->O - o0 : s->panel;
        for (int j = 0; j < s->S; j++)
            sums[j] = (plain ? to : s->pre) + (size_t)j * (size_t)p->O + o0;
        conv_rows(sums, rows, s->S, p->weight + (size_t)p->K * (size_t)p->C * (size_t)o0,
                  p->bias ? p->bias + o0 : NULL, p->K, p->C, width);
        for (int j = 0; j < s->S && !plain; j++) {
            real *out = (to ? to : s->x) + (size_t)j * (size_t)p->O + o0;
            act_row(f, out, sums[j], to ? NULL : out, 1, width);
        }
    }
}

void stream_input(const Stream *s, const StreamUnit *u, real *to) {
    size_t C = (size_t)s->table.config.channels;
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++) {
        size_t at = (size_t)j * C;
        if (u->gain)
            norm_row(to + at, s->x + at, u->gain, u->beta, (int)C);
        else
            memcpy(to + at, s->x + at, C * sizeof *to);
    }
}

// The stream as it is before the unit, where a skip brings it up; and what one brings here.
static void skip(const Stream *s, const StreamUnit *u) {
    size_t C = (size_t)s->table.config.channels;
    if (!u->kept) return;
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++)
        if (u->scale)
            skip_row(s->x + (size_t)j * C, u->kept + (size_t)j * C, u->scale, (int)C);
        else
            memcpy(u->kept + (size_t)j * C, s->x + (size_t)j * C, C * sizeof *s->x);
}

// x (S,C) = normalised rows of the bytes.
static void embed(const Stream *s, const int *ids) {
    size_t C = (size_t)s->table.config.channels;
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++)
        memcpy(s->x + (size_t)j * C, s->embedded + (size_t)ids[j] * C, C * sizeof *s->x);
}

void stream_push(Stream *s, const int *ids, real *latents, real *logits) {
    const Config *c = &s->table.config;
    const StreamUnit last = {.gain = s->gain_out, .beta = s->beta_out};
    // Before the threads start: addresses depend on the position, not on what the layers compute.
    point_at_rows(s);
    s->ids = ids;
#pragma omp parallel if (s->parallel)
    {
        embed(s, ids);
        for (int i = 0; i < s->table.U; i++) {
            skip(s, &s->units[i]);
            s->units[i].unit->mixer->stream_step(s, &s->units[i]);
        }
        stream_input(s, &last, s->h);
        if (!c->tie) stream_map(s, &s->proj, s->z, s->h_rows, ACT_none);
        stream_map(s, &s->head, logits, c->tie ? s->h_rows : s->z_rows, ACT_none);
    }
    if (latents)
        memcpy(latents, c->tie ? s->h : s->z, (size_t)s->S * (size_t)c->latent * sizeof *latents);
    memcpy(s->before, ids, (size_t)s->S * sizeof *ids);
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

int sample_byte(const Sampler *sampler, const real *logits, uint64_t position, int j) {
    Candidate c[V];
    // As the logits are: what this type holds for 0 is 0.
    real l[V], heat = (real)sampler->temperature;
    int best = 0, n = V;
    for (int v = 0; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (heat == 0) return best;
    // The largest exponent becomes 0: nothing overflows, and the sum is at least 1.
    for (int v = 0; v < V; v++) l[v] = exp_real((logits[v] - logits[best]) / heat);
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
    Philox r = philox(sampler->seed, (uint32_t)position, (uint32_t)(position >> 32), (uint32_t)j,
                      RNG_SAMPLE);
    // 53 random bits: uniform in [0, kept). Rounding may leave it at `kept`: then the last one.
    double u = (double)((uint64_t)r.v[0] << 21 | r.v[1] >> 11) / 9007199254740992.0 * kept;
    // Walks along [0, kept) candidate by candidate until u lies within one.
    for (i = 0; i < n - 1 && u >= c[i].p; i++) u -= c[i].p;
    return c[i].byte;
}

int stream_sample(const Stream *s, const Sampler *sampler, const real *logits, int j) {
    real l[V], cap = s->table.config.softcap;
    for (int v = 0; v < V; v++) l[v] = cap > 0 ? cap * (real)tanh(logits[v] / cap) : logits[v];
    return sample_byte(sampler, l, s->position, j);
}
