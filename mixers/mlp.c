// mlp.c: two linear layers with an activation f between them, every byte by itself.
//     mlp:M[:ACTIVATION]   x + W2 f(W1 norm(x))        hidden width M*C
// It combines the channels of one byte and reads no other: its reach is 0. Dropout stands at the
// end, where no activation follows: its mask is drawn again in backward. Read model.h and layers.c
// (conv) first.
#include "mixers/list.h"
#include "support/stream.h"

typedef struct {
    Linear up, down;
    act *pre;  // (N,M*C) before the activation; in backward dpre takes its place
} Mlp;

static size_t width(const Unit *u) { return (size_t)u->numbers[0] * (size_t)u->C; }

static int64_t reach(const Unit *u) { return (void)u, 0; }

static void describe(Model *m, Unit *u) {
    Mlp *d = u->data;
    d->up = (Linear){.K = 1, .C = u->C, .O = (int)width(u), .dil = 1};
    d->down = (Linear){.K = 1, .C = (int)width(u), .O = u->C, .dil = 1};
    add_linear(m, u, &d->up, "up", true);
    add_linear(m, u, &d->down, "down", true);
    u->dropouts = 1;
}

static void place_mlp(Model *m, Unit *u, Arena *a) {
    Mlp *d = u->data;
    d->pre = place(a, rows_bytes(m, d->up.O));
}

// in -> up, f -> z -> down -> end
static void forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    const Mlp *d = u->data;
    linear_forward(m, &d->up, in, (Epilogue){.out = m->z, .pre = d->pre,
                                             .activation = u->activation});
    end.drop = unit_dropout(m, u, 0, pass);
    linear_forward(m, &d->down, m->z, end);
}

// forward:  y = down(a),  a = f(pre),  pre = up(in)
static void backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                     const Pass *pass) {
    const Mlp *d = u->data;
    (void)pass;
    before_write(m, m->dz);
    // da goes on to dpre without being kept; a, which down had read, is recomputed into dz.
    linear_backward(m, &d->down, dy, (Epilogue){.pre = d->pre, .out = m->dz, .drop = {.scale = 1},
                                                .activation = u->activation});
    weight_gradient(m, &d->down, m->dz, dy);
    weight_gradient(m, &d->up, in, d->pre);
    linear_backward(m, &d->up, d->pre, end);
}

typedef struct {
    Panels up, down;
} MlpStream;

static void stream_place(Stream *s, StreamUnit *u) {
    const Mlp *d = u->unit->data;
    MlpStream *p = u->data;
    p->up = stream_panels(s, &d->up);
    p->down = stream_panels(s, &d->down);
}

static void stream_step(const Stream *s, const StreamUnit *u) {
    const MlpStream *p = u->data;
    const real *hidden[MAX_STREAMS];
    for (int j = 0; j < s->S; j++) hidden[j] = s->z + (size_t)j * (size_t)p->up.O;
    stream_input(s, u, s->h);
    stream_map(s, &p->up, s->z, s->h_rows, u->unit->activation);
    stream_map(s, &p->down, NULL, hidden, ACT_none);
}

const Mixer mlp_mixer = {
    .name = "mlp",
    .formula = "x + W2 f(W1 norm(x))",
    .numbers = {{"width in C", 1, 1024, 4, NULL, "M"}},
    .activation = true,
    .norm = true,
    .data_bytes = sizeof(Mlp),
    .reach = reach,
    .describe = describe,
    .width = width,
    .place = place_mlp,
    .forward = forward,
    .backward = backward,
    .stream_bytes = sizeof(MlpStream),
    .stream_place = stream_place,
    .stream_step = stream_step,
};
