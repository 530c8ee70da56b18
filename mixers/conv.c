// conv.c: two mixers of causal dilated convolutions, f an activation (GELU unless it is named).
//     conv:K:dil           x + f(conv(norm(x)))
//     block:K:dil:dil...   x + f(conv(.. f(conv(x))))         the paper's: one residual, no norm
// A conv of K taps reads its own byte and those dil, 2 dil .. (K-1) dil back, so the reach of a
// stack grows with the sum of its dilations and its cost only with the number of convs.
//
// Both keep only pre, what was before the activation. A conv's input is recomputed in backward: the
// norm's in norm_backward, an inner conv's from the pre before it, as the same pass over memory
// reads that anyway. Read model.h and layers.c (conv) first.
#include <stdio.h>

#include "mixers/list.h"
#include "support/stream.h"

enum { MAX_CONVS = MAX_NUMBERS - 1 };

typedef struct {
    int n;
    Linear conv[MAX_CONVS];
    act *pre[MAX_CONVS];   // (N,C) before the activation; in backward dpre takes its place
    act *read[MAX_CONVS];  // (N,C) what a block's conv had read, recomputed; the first reads x
} Convs;

static int64_t reach(const Unit *u) {
    int64_t sum = 0;
    for (int i = 1; i < u->n_numbers; i++) sum += u->numbers[i];
    return (u->numbers[0] - 1) * sum;
}

static void describe(Model *m, Unit *u) {
    Convs *d = u->data;
    char name[16];
    d->n = u->n_numbers - 1;
    for (int i = 0; i < d->n; i++) {
        d->conv[i] = (Linear){.K = u->numbers[0], .C = u->C, .O = u->C, .dil = u->numbers[1 + i]};
        snprintf(name, sizeof name, u->mixer->norm ? "conv" : "conv.%d", i);
        add_linear(m, u, &d->conv[i], name, false);
    }
    u->dropouts = d->n;
    u->has_tail = true;
}

// What an inner conv had read waits until its weight gradient has been computed.
static void place_convs(Model *m, Unit *u, Arena *a) {
    Convs *d = u->data;
    size_t bytes = rows_bytes(m, u->C);
    for (int i = 0; i < d->n; i++) d->pre[i] = place(a, bytes);
    for (int i = 1; i < d->n; i++) d->read[i] = place_waiting(m, a);
    u->tail = d->pre[d->n - 1];
}

// in -> conv, f -> h -> conv, f -> z -> .. -> end. No conv writes what it reads.
static void forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    const Convs *d = u->data;
    for (int i = 0; i < d->n; i++) {
        Epilogue e = i == d->n - 1 ? end : (Epilogue){.out = in == m->h ? m->z : m->h};
        e.pre = d->pre[i];
        e.activation = u->activation;
        e.drop = unit_dropout(m, u, i, pass);
        linear_forward(m, &d->conv[i], in, e);
        in = e.out;
    }
}

// forward:  y_i = f(pre_i),  pre_i = conv_i(y_{i-1}),  y_{-1} = in
static void backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                     const Pass *pass) {
    const Convs *d = u->data;
    for (int i = d->n - 1; i > 0; i--) {
        // dy_{i-1} goes on to dpre_{i-1} without being kept; y_{i-1} is recomputed on the way.
        before_write(m, d->read[i]);
        linear_backward(m, &d->conv[i], dy, (Epilogue){.pre = d->pre[i - 1], .out = d->read[i],
                        .activation = u->activation, .drop = unit_dropout(m, u, i - 1, pass)});
        weight_gradient(m, &d->conv[i], d->read[i], dy);
        dy = d->pre[i - 1];
    }
    weight_gradient(m, &d->conv[0], in, dy);
    linear_backward(m, &d->conv[0], dy, end);
}

typedef struct {
    Panels panels[MAX_CONVS];
    Taps taps[MAX_CONVS];
} ConvStream;

static void stream_place(Stream *s, StreamUnit *u) {
    const Convs *d = u->unit->data;
    ConvStream *c = u->data;
    for (int i = 0; i < d->n; i++) {
        c->panels[i] = stream_panels(s, &d->conv[i]);
        stream_taps(s, &c->taps[i], &d->conv[i]);
    }
}

// Each conv writes into the ring of the next: what a conv reads is what its ring must keep.
static void stream_step(const Stream *s, const StreamUnit *u) {
    const Convs *d = u->unit->data;
    const ConvStream *c = u->data;
    stream_input(s, u, taps_input(s, &c->taps[0]));
    for (int i = 0; i < d->n; i++)
        stream_map(s, &c->panels[i], i < d->n - 1 ? taps_input(s, &c->taps[i + 1]) : NULL,
                   c->taps[i].rows, u->unit->activation);
}

#define CONV_ROW(mixer_name, mixer_formula, with_norm, many)                                   \
    .name = mixer_name, .formula = mixer_formula,                                              \
    .numbers = {{"taps", 1, MAX_TAPS, 2, NULL, "K"}, {"dilation", 1, 1 << 20, 1, NULL, "dil"}}, \
    .repeats = many,                                                                           \
    .activation = true, .norm = with_norm, .data_bytes = sizeof(Convs), .reach = reach,        \
    .describe = describe, .place = place_convs, .forward = forward, .backward = backward,      \
    .stream_bytes = sizeof(ConvStream), .stream_place = stream_place, .stream_step = stream_step

const Mixer conv_mixer = {CONV_ROW("conv", "x + f(conv(norm(x)))", true, false)};
const Mixer block_mixer = {CONV_ROW("block", "x + f(conv(.. f(conv(x))))", false, true)};
