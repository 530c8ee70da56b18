// list.h: the table of mixers. To add one: a file here that ends in its row (copy mlp.c), and its
// name in this list. Tests, checkpoints, streaming and --help follow from the row.
#ifndef MIXERS_LIST_H
#define MIXERS_LIST_H

#include "model.h"

#define MIXERS(ROW) \
    ROW(conv) ROW(block) ROW(mlp) ROW(attn) ROW(smear) ROW(bigrams) ROW(positions)

#define MIXER_DECLARED(name) extern const Mixer name##_mixer;
MIXERS(MIXER_DECLARED)

// Skips (inputs.c), called by model.c. Their tensors; in forward, before u reads the stream; in
// backward, once m->dx is the gradient by what u read; and, before that, where what u read went up.
void skips_describe(Model *m);
void skip_forward(Model *m, const Unit *u);
void skip_backward(Model *m, const Unit *u);
void skip_gradient(Model *m, const Unit *u);

#endif
