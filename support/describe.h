// describe.h: what a model consists of, as lines to read: for ./train and ./sample --info.
#ifndef DESCRIBE_H
#define DESCRIBE_H

#include <stdio.h>

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

// From the bytes to the logits: every unit with its formula, shapes, parameters and reach; units
// that repeat, once. A described model (model_describe) is enough.
void print_layers(FILE *f, const Model *m);
// name (a,b,c) decayed
void print_tensor(FILE *f, const Tensor *t);

#ifdef __cplusplus
}
#endif
#endif
