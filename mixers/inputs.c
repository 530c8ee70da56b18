// inputs.c: what is added to the stream before the first unit that reads more than a byte or two,
// and skips between units. Inputs are mixers, so they are units of a stack, its first ones:
//     smear              (1-g) x[t] + g x[t-1], g = sigmoid of a learned vector
//     bigrams:R:D        x + W table[hash(previous byte, byte)], a table of R rows of D numbers
//     positions          x + sines and cosines of the place in the text
// A skip (--skips N) adds to the stream what it was at the mirrored place further down. Read
// model.h and layers.c first; the same on a GPU: inputs.cu.
#include <stdio.h>
#include <string.h>

#include "fast/layers.h"
#include "mixers/list.h"
#include "support/arithmetic.h"
#include "support/stream.h"

// ---- SmearGate (Jordan et al., modded-nanogpt): a byte's row takes part of the row before -------

// before NULL: the text begins here.
static void smear_row(real *out, const real *x, const real *before, const real *gate, int C) {
    for (int c = 0; c < C; c++)
        out[c] = muladd(smear_gate(gate[c]), (before ? before[c] : 0) - x[c], x[c]);
}

void plain_smear_forward(act *out, const act *x, const real *gate, int B, int T, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < B * T; n++) {
        const real *x_n = (const real *)x + (size_t)n * C;
        smear_row((real *)out + (size_t)n * C, x_n, n % T ? x_n - C : NULL, gate, C);
    }
    CPU_DONE("smear_forward", 0, 2 * array_bytes(sizeof(real), (size_t)B * T, C));
}

// x[t] reaches out[t] by 1-g and out[t+1] by g. g' = g (1-g), as of every sigmoid.
void plain_smear_backward(act *dx, real *dgate, const act *dout, const act *x, const real *gate,
                          int B, int T, int C, void *work) {
    (void)work;
    for (int n = 0; n < B * T; n++) {
        size_t at = (size_t)n * C;
        const real *x_n = (const real *)x + at, *d_n = (const real *)dout + at;
        real *dx_n = (real *)dx + at;
        bool first = n % T == 0, last = n % T == T - 1;
        for (int c = 0; c < C; c++) {
            real g = smear_gate(gate[c]);
            // forward:  out[t] = x[t] + g (x[t-1] - x[t])
            dx_n[c] = d_n[c] + g * ((last ? 0 : d_n[c + C]) - d_n[c]);
            dgate[c] += d_n[c] * ((first ? 0 : x_n[c - C]) - x_n[c]) * (g * (1 - g));
        }
    }
    CPU_DONE("smear_backward", 0, 3 * array_bytes(sizeof(real), (size_t)B * T, C));
}

// ---- Skips: the stream gets back what it was at the mirrored place ------------------------------

void skip_row(real *x, const real *from, const real *scale, int C) {
    for (int c = 0; c < C; c++) x[c] = muladd(scale[c], from[c], x[c]);
}

void plain_skip_forward(act *x, const act *from, const real *scale, size_t N, int C) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        skip_row((real *)x + n * C, (const real *)from + n * C, scale, C);
    CPU_DONE("skip_forward", 0, 3 * array_bytes(sizeof(real), N, C));
}

void plain_skip_backward(act *kept, real *dscale, const act *dx, const act *from, size_t N, int C,
                         void *work) {
    (void)work;
    memcpy(kept, dx, N * (size_t)C * sizeof(real));
    // forward:  x += scale * from
    for (size_t i = 0; i < N * (size_t)C; i++)
        dscale[i % (size_t)C] += ((const real *)dx)[i] * ((const real *)from)[i];
    CPU_DONE("skip_backward", 0, 3 * array_bytes(sizeof(real), N, C));
}

// ---- Look-ups -----------------------------------------------------------------------------------

void plain_lookup_forward(act *out, const int *ids, const real *table, LookupShape s) {
    size_t D = (size_t)s.D;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++) {
        int key = lookup_key(ids, (size_t)n, s);
        real *to = (real *)out + (size_t)n * D;
        if (key < 0)
            memset(to, 0, D * sizeof *to);
        else
            memcpy(to, table + (size_t)key * D, D * sizeof *to);
    }
    CPU_DONE("lookup_forward", 0, lookup_bytes(s, sizeof(real)));
}

void plain_lookup_backward(real *dtable, const act *dout, const int *ids, LookupShape s,
                           void *work) {
    (void)work;
    for (int n = 0; n < s.B * s.T; n++) {
        int key = lookup_key(ids, (size_t)n, s);
        const real *d_n = (const real *)dout + (size_t)n * s.D;
        // forward:  out[n] = table[key]
        for (int c = 0; c < s.D && key >= 0; c++) dtable[(size_t)key * s.D + c] += d_n[c];
    }
    CPU_DONE("lookup_backward", 0, lookup_bytes(s, sizeof(real)));
}

// ---- Sinusoidal positions (Vaswani et al., arXiv:1706.03762) ------------------------------------
//
// channel 2j: sin(t * 10000^(-2j/C)), channel 2j+1: its cosine. Angles are kept as attn.c keeps
// them: none of their digits is lost at 10 million bytes.
static void position_row(real *out, const real *x, uint64_t t, int C) {
    for (int c = 0; c < C; c++) {
        double angle = 6.283185307179586 * turn_of(t, turn_step(c / 2, C));
        out[c] = x[c] + (real)(c % 2 ? cos(angle) : sin(angle));
    }
}

void plain_positions(act *out, const act *x, const uint64_t *starts, int B, int T, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < B * T; n++)
        position_row((real *)out + (size_t)n * C, (const real *)x + (size_t)n * C,
                     starts[n / T] + (uint64_t)(n % T), C);
    CPU_DONE("positions", 0, 2 * array_bytes(sizeof(real), (size_t)B * T, C));
}

size_t plain_input_work(size_t N, int rows, int D) { return (void)N, (void)rows, (void)D, 8; }

// ---- The mixers ---------------------------------------------------------------------------------
//
// They end in no activation and have no dropout. A gradient passes through the sum x + .. as it is:
// what m->dx holds stays there, but for smear, which needs the rows that it would overwrite.

static size_t work_of_sums(const Model *m, const Unit *u) {
    return m->backend->inputs.work_bytes((size_t)m->B * (size_t)m->T, 0, u->C);
}
static int64_t reach_0(const Unit *u) { return (void)u, 0; }
static int64_t reach_1(const Unit *u) { return (void)u, 1; }

typedef struct {
    size_t gate;  // (C)
} Smear;

static void describe_smear(Model *m, Unit *u) {
    add_tensor(m, u, &((Smear *)u->data)->gate, "gate", 1, u->C, 0, 0);  // 0: half of each row
}

static void smear_forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    (void)pass;
    m->backend->inputs.smear_forward(end.out, in, m->params + ((Smear *)u->data)->gate, m->B, m->T,
                                     u->C);
}

static void smear_backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                           const Pass *pass) {
    size_t gate = ((Smear *)u->data)->gate;
    // dx[t] needs dout[t+1]: it is written elsewhere. Two places in turn serve any number of these.
    act *to = m->dx == m->dh ? m->x[m->U] : m->dh;
    (void)end, (void)pass;
    before_write(m, to);
    m->backend->inputs.smear_backward(to, m->grads + gate, dy, in, m->params + gate, m->B, m->T,
                                      u->C, m->work);
    m->dx = to;
}

typedef struct {
    const real *gate;
    real *before;  // (capacity, C)
} SmearStream;

static void stream_place_smear(Stream *s, StreamUnit *u) {
    SmearStream *p = u->data;
    p->gate = stream_copy(s, ((Smear *)u->unit->data)->gate, (size_t)u->unit->C);
    p->before = stream_state(s, 1, u->unit->C);
}

static void stream_step_smear(const Stream *s, const StreamUnit *u) {
    const SmearStream *p = u->data;
    size_t C = (size_t)u->unit->C;
    stream_input(s, u, s->h);
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++) {
        const real *x = s->h + (size_t)j * C;
        real *before = p->before + (size_t)j * C;
        smear_row(s->x + (size_t)j * C, x, s->position ? before : NULL, p->gate, (int)C);
        memcpy(before, x, C * sizeof *before);
    }
}

enum { ROWS, WIDTH };  // places in Unit.numbers

typedef struct {
    Linear map;    // (D,C), without bias
    size_t table;  // (R,D)
    act *rows;     // (N,D) what was looked up
} Bigrams;

static LookupShape shape_of(const Unit *u, int B, int T) {
    return (LookupShape){B, T, u->numbers[ROWS], u->numbers[WIDTH], true};
}

static void describe_bigrams(Model *m, Unit *u) {
    Bigrams *d = u->data;
    d->map = (Linear){.K = 1, .C = u->numbers[WIDTH], .O = u->C, .dil = 1, .bias = NO_BIAS};
    add_table(m, u, &d->table, "table.weight", u->numbers[ROWS], u->numbers[WIDTH]);
    add_tensor(m, u, &d->map.weight, "map.weight", 2, d->map.C, d->map.O, 0);
}

static size_t width(const Unit *u) { return (size_t)u->numbers[WIDTH]; }

static size_t work(const Model *m, const Unit *u) {
    return m->backend->inputs.work_bytes((size_t)m->B * (size_t)m->T, u->numbers[ROWS],
                                         u->numbers[WIDTH]);
}

static void place_bigrams(Model *m, Unit *u, Arena *a) {
    ((Bigrams *)u->data)->rows = place(a, rows_bytes(m, u->numbers[WIDTH]));
}

static void bigrams_forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    const Bigrams *d = u->data;
    act *rows = d->rows ? d->rows : m->z;
    (void)in, (void)pass;
    m->backend->inputs.lookup_forward(rows, m->ids, m->params + d->table, shape_of(u, m->B, m->T));
    linear_forward(m, &d->map, rows, end);
}

static void bigrams_backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                             const Pass *pass) {
    const Bigrams *d = u->data;
    (void)in, (void)end, (void)pass;
    weight_gradient(m, &d->map, d->rows, dy);
    before_write(m, m->dz);
    linear_backward(m, &d->map, dy, (Epilogue){.dx = m->dz});
    m->backend->inputs.lookup_backward(m->grads + d->table, m->dz, m->ids,
                                       shape_of(u, m->B, m->T), m->work);
}

typedef struct {
    Panels map;
    const real *table;
} BigramsStream;

static void stream_place_bigrams(Stream *s, StreamUnit *u) {
    const Bigrams *d = u->unit->data;
    BigramsStream *p = u->data;
    p->map = stream_panels(s, &d->map);
    p->table = stream_copy(s, d->table, (size_t)u->unit->numbers[ROWS] * (size_t)d->map.C);
}

static void stream_step_bigrams(const Stream *s, const StreamUnit *u) {
    const BigramsStream *p = u->data;
    const real *rows[MAX_STREAMS];
    for (int j = 0; j < s->S; j++) {
        const int pair[] = {s->before[j], s->ids[j]};
        int key = lookup_key(pair, 1, shape_of(u->unit, 1, 2));
        rows[j] = key < 0 ? s->zero_row : p->table + (size_t)key * (size_t)p->map.C;
    }
    stream_map(s, &p->map, NULL, rows, ACT_none);
}

static void positions_forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    (void)pass;
    m->backend->inputs.positions(end.out, in, m->starts, m->B, m->T, u->C);
}

static void positions_backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                               const Pass *pass) {
    // forward:  out = x + something that depends on no parameter
    (void)m, (void)u, (void)in, (void)dy, (void)end, (void)pass;
}

static void stream_step_positions(const Stream *s, const StreamUnit *u) {
    size_t C = (size_t)u->unit->C;
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++)
        position_row(s->x + (size_t)j * C, s->x + (size_t)j * C, s->starts[j] + s->position,
                     (int)C);
}

const Mixer smear_mixer = {
    .name = "smear", .formula = "(1-g) x[t] + g x[t-1]; stands first", .input = true,
    .data_bytes = sizeof(Smear), .reach = reach_1, .describe = describe_smear,
    .forward = smear_forward, .backward = smear_backward, .work = work_of_sums,
    .stream_bytes = sizeof(SmearStream), .stream_place = stream_place_smear,
    .stream_step = stream_step_smear,
};
const Mixer bigrams_mixer = {
    .name = "bigrams", .formula = "x + W table[hash of two bytes]; stands first", .input = true,
    .bytes = true,
    .numbers = {{"rows", 256, 1 << 20, 4096, NULL, "R"}, {"width", 1, 1024, 32, NULL, "D"}},
    .data_bytes = sizeof(Bigrams), .reach = reach_1, .describe = describe_bigrams, .width = width,
    .work = work, .place = place_bigrams, .forward = bigrams_forward, .backward = bigrams_backward,
    .stream_bytes = sizeof(BigramsStream), .stream_place = stream_place_bigrams,
    .stream_step = stream_step_bigrams,
};
const Mixer positions_mixer = {
    .name = "positions", .formula = "x + sinusoids of the place; stands first", .input = true,
    .absolute = true, .data_bytes = 1, .reach = reach_0, .forward = positions_forward,
    .backward = positions_backward, .stream_bytes = 1, .stream_step = stream_step_positions,
};

// ---- Skips in the model ---------------------------------------------------------

static size_t rows_of(const Model *m) { return (size_t)m->B * (size_t)m->T; }

void skips_describe(Model *m) {
    int first = 0, n = m->config.skips;
    while (first < m->U && m->units[first].mixer->input) first++;
    int layers = n ? (m->U - first) / n : 0;
    for (int k = 0; k < layers / 2; k++) {
        Unit *from = &m->units[first + k * n], *to = &m->units[first + (layers - 1 - k) * n];
        char name[32];
        from->skip.to = to;
        to->skip.from = from;
        snprintf(name, sizeof name, "skips.%d.weight", k);
        add_tensor(m, NULL, &to->skip.scale, name, 1, to->C, 0, 0);  // a gain: 1 at first
    }
}

void skip_forward(Model *m, const Unit *u) {
    const Unit *from = u->skip.from;
    if (from)
        m->backend->inputs.skip_forward(m->x[u->index], m->x[from->index],
                                        m->params + u->skip.scale, rows_of(m), u->C);
}

void skip_backward(Model *m, const Unit *u) {
    const Unit *from = u->skip.from;
    if (from)
        m->backend->inputs.skip_backward(u->skip.kept, m->grads + u->skip.scale, m->dx,
                                         m->x[from->index], rows_of(m), u->C, m->work);
}

void skip_gradient(Model *m, const Unit *u) {
    const Unit *to = u->skip.to;
    before_write(m, m->dx);
    if (to)  // forward:  x[to] += scale * x[u]
        m->backend->inputs.skip_forward(m->dx, to->skip.kept, m->params + to->skip.scale,
                                        rows_of(m), u->C);
}
