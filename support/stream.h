// stream.h: a trained model one byte at a time, on the CPU: generation, scoring, compression.
//
// What a unit needs of the past it keeps in a ring, so that a byte costs the same at position 10
// and at 10 million and memory does not grow. A causal conv needs its last (K-1)*dil inputs:
//   dil = 2, K = 3       ring of 5 rows, row of time t at t % 5      | t-4 |  .  | t-2 |  .  |  t |
// Several streams run side by side, at the same position; they share every weight that is read.
// The logits are those of model_forward over the same bytes on the backend `cpu`, bit for bit.
// Read model.h first. The last part is for mixers.
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

// The last inputs of a conv, and where those that its taps read lie at this byte.
typedef struct {
    int K, dil, C;
    size_t length;      // (K-1)*dil + 1 rows: the current input, too
    real *ring;         // (length, capacity, C)
    const real **rows;  // (K, S): input of tap k of stream j at k*S + j
} Taps;

struct StreamUnit {
    const Unit *unit;
    const real *gain, *beta;  // of the norm at its door; NULL where there is none
    const real *scale;        // of the skip that comes to it
    real *kept;               // (capacity, C) the stream that a skip takes from here, or brings
    void *data;               // the mixer's own
};

// Hands out pieces of an allocation; with base NULL it only counts.
typedef struct {
    real *base;
    size_t used;
    double bytes;  // the same as a double: no overflow goes unseen
} Pieces;

struct Stream {
    Model table;        // described only: configuration, units, offsets
    int capacity, S;    // streams there is room for; streams that run
    uint64_t position;  // bytes pushed since the text began
    uint64_t starts[MAX_STREAMS];  // where each stream's text begins in one that it is a part of
    int panel;          // width of the panels of weights
    StreamUnit *units;
    Taps **taps;  // of all units
    int n_taps;
    Panels proj, head;
    const real *embedded;  // (V,C) the embedding, normalised
    const int *ids;        // (S) the bytes of this push, and those of the push before
    int before[MAX_STREAMS];
    const real *gain_out, *beta_out;
    real *x, *h, *z, *pre;         // (capacity, C), (capacity, C), (capacity, wide) twice
    const real *zero_row;          // (wide): what lies before the text
    const real **h_rows, **z_rows; // (S): the rows of h and of z
    bool parallel;                 // worth the threads' waiting for each other
    real *weights, *state;         // the allocations that all of the above lie in
    const real **row_space;
    // While it is opened:
    const real *params;
    Pieces weight_pieces, state_pieces;
    size_t n_rows, n_maps;
};

// Copies what it needs of params (host, in the layout of the model's table): they may go
// afterwards, and the model may live on any backend. -1 when there is not enough memory; nothing is
// then held.
int stream_open(Stream *s, const Config *config, const real *params, int capacity, Error *e);
// The bytes that stream_open takes: for weights, and for what the units keep of the past. (The
// latter is taken only as far as the texts are long.)
int stream_memory(const Config *config, int capacity, double *weights, double *state, Error *e);
// Takes a Stream in any state after stream_open, also a zeroed one.
void stream_free(Stream *s);
// The text begins: before it there is nothing but zeros. S streams run, 1 to capacity. What is a
// part of another text is told so by starts (then 0), after this call.
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
// The same of logits that are final, at a position.
int sample_byte(const Sampler *sampler, const real *logits, uint64_t position, int j);

// ---- For mixers ---------------------------------------------------------------------------------

// In stream_place, which runs twice, first to count: l's weights as panels; a conv's ring, which
// must stay where it is; `rows` x C numbers of state for every stream.
Panels stream_panels(Stream *s, const Linear *l);
void stream_taps(Stream *s, Taps *t, const Linear *l);
real *stream_state(Stream *s, size_t rows, int C);
// n parameters from `offset` on.
const real *stream_copy(Stream *s, size_t offset, size_t n);

// In stream_step, which every thread of a team runs; each of these shares the work among them and
// returns when all of it is done. Rows of stream j lie at j * width.
// to (S,C) = norm(x) of the unit, or x where it has no norm.
void stream_input(const Stream *s, const StreamUnit *u, real *to);
// Where the conv's input of this byte belongs.
real *taps_input(const Stream *s, const Taps *t);
// to (S,O) = f(map of rows), rows (K,S); to NULL: x += f(map of rows), which ends the unit.
void stream_map(const Stream *s, const Panels *p, real *to, const real *const *rows, Activation f);

#ifdef __cplusplus
}
#endif
#endif
