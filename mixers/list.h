// list.h: the table of mixers. To add one: a file here that ends in its row (copy mlp.c), and its
// name in this list. Tests, checkpoints, streaming and --help follow from the row.
#ifndef MIXERS_LIST_H
#define MIXERS_LIST_H

#include "model.h"

#define MIXERS(ROW) ROW(conv) ROW(block) ROW(mlp) ROW(attn)

#define MIXER_DECLARED(name) extern const Mixer name##_mixer;
MIXERS(MIXER_DECLARED)

#endif
