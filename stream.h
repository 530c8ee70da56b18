// stream.h: a trained model one byte at a time, on the CPU: generation, scoring, compression.
//
// A causal conv needs of the past only its last (K-1)*dil inputs. Each layer keeps them in a ring,
// so that a byte costs the same at position 10 and at 10 million and memory does not grow:
//   dil = 2, K = 3       ring of 5 rows, row of time t at t % 5      | t-4 |  .  | t-2 |  .  |  t |
// Several streams run side by side, at the same position; they share every weight that is read.
// The logits are those of model_forward over the same bytes, bit for bit. Read model.h first.
#ifndef STREAM_H
#define STREAM_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

// More share no more: by then arithmetic is the limit, not the reading of weights.
enum { MAX_STREAMS = 48 };

// A linear map or a conv, its weights cut into panels of output channels: each is read from one
// end to the other, and threads share panels.
typedef struct {
    int K, C, O;
    const real *weight, *bias;  // bias NULL: none
} Panels;

typedef struct {
    Panels panels;
    int dil;
    bool unit_end;            // the residual is added after this conv
    const real *gain, *beta;  // of the norm at its door; NULL in the paper's form
    size_t ring_rows;         // (K-1)*dil + 1: the current input, too
    real *ring;               // (ring_rows, capacity, C)
    const real **rows;        // (K, S): where the inputs of this byte lie
} StreamConv;

typedef struct {
    Config config;
    int capacity, S;    // streams there is room for; streams that run
    uint64_t position;  // bytes pushed since the text began
    int panel;          // width of the panels of weights
    StreamConv *convs;
    int L;
    Panels proj, head;
    const real *table;  // (V,C) the embedding, normalised
    const real *gain_out, *beta_out;
    real *x, *pre, *h, *z;  // (capacity,C), (capacity,C), (capacity,C), (capacity,D)
    const real *zero_row;   // (C): what lies before the text
    const real **h_rows, **z_rows;
    size_t layer_weights;   // on average
    bool parallel;          // worth the threads' waiting for each other
    real *weights, *state;  // the allocations that all of the above lie in
    const real **row_space;
} Stream;

// Copies what it needs of params (host, in the layout of the model's table): they may go
// afterwards, and the model may live on any backend. -1 when there is not enough memory; nothing is
// then held.
int stream_open(Stream *s, const Config *config, const real *params, int capacity, Error *e);
// Takes a Stream in any state after stream_open, also a zeroed one.
void stream_free(Stream *s);
// The text begins: before it there is nothing but zeros. S streams run, 1 to capacity.
void stream_begin(Stream *s, int S);
// Feeds one byte to every stream: ids (S). logits (S,V) are for the byte that follows, before the
// softcap; latents (S,D) may be NULL.
void stream_push(Stream *s, const int *ids, real *latents, real *logits);

// How to draw a byte from logits.
typedef struct {
    double temperature;  // 0: always the likeliest byte
    int top_k;           // only among the k likeliest; 0 = all
    double top_p;        // only among the likeliest that reach p together; 1 = all
    uint64_t seed;
} Sampler;
// The next byte of stream j, after its logits (V) of the last push. The same seed, position and j
// draw the same random number.
int stream_sample(const Stream *s, const Sampler *sampler, const real *logits, int j);

#ifdef __cplusplus
}
#endif
#endif
