// weight_queue.h: what model.c asks of the queue of weight gradients. Only the optimizer waits for
// those. So they are put off, and several of one shape are computed in a call, which fills a GPU
// better. They run on the side stream where there is one, because with few rows in a pass a kernel
// leaves most of a GPU idle. weight_gradient and before_write, for mixers, stand in model.h.
#ifndef WEIGHT_QUEUE_H
#define WEIGHT_QUEUE_H

#include "model.h"

// Between the two, what is queued goes to the side stream; end_fork returns what to join, 0 where
// there is no side stream.
void queue_fork(const Model *m);
int queue_end_fork(const Model *m);
// Returns when everything on the side stream is done.
void queue_join(Model *m);
// Computes n weight gradients of one shape at once.
void queue_now(Model *m, const WeightJob *jobs, int n, ConvShape s);
// Computes the groups that are full; with `all` every group.
void queue_run(Model *m, bool all);

#endif
