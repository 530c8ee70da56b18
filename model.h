// model.h: what the model is. Read this first, then model.c (forward, backward, steps), layers.c
// (every operation but attention as plain loops), mixers/ (a chapter each) and train.c.
//
// The model turns raw bytes into next-byte predictions; there is no token vocabulary:
//   bytes -> LayerNorm(Embedding) = x[0]
//         -> residual units  x[u+1] = x[u] + mixer(LayerNorm(x[u]))
//         -> LayerNorm = latents z -> the embedding, transposed -> 256 logits
// or, as in the paper, with a head of its own:
//         -> LayerNorm -> Linear = latents z -> Linear -> 256 logits
// What a unit does in its middle is its mixer: a row of one table (mixers/list.h).
//
// One alphabet, everywhere:
//   B batch    T time (bytes)    N = B*T rows    C channels in    O channels out
//   K taps     dil dilation      D latent width  V = 256 byte values     U units
//   d in front of a name is the gradient of the loss with respect to it: dx, dw
// All arrays are row-major with the last letter contiguous: x (B,T,C) is x[(b*T + t)*C + c].
#ifndef MODEL_H
#define MODEL_H

#include "support/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- Configuration: everything that fixes the model's shape and function -----------------------

enum {
    UNITS_TEXT = 1024,  // bytes of a configuration's units, NUL included
    MAX_UNITS = 4096,
    MAX_NUMBERS = 33,   // of one unit
    MAX_WINDOW = 1 << 24,
};

typedef struct {
    int channels;            // C
    int latent;              // D; with tie it must be C
    Activation activation;   // of units that name none
    int window;              // the same: bytes that attention looks at; 0 = 512
    bool tie;                // logits = LayerNorm(h) E^T: no projection, no head of its own
    float softcap;           // logits = s*tanh(logits/s); 0 = none
    bool no_norm_in;         // the first stream is the embedding as it is
    bool no_norm_out;        // no LayerNorm before the head, which then is not tied
    bool no_bias;            // linear layers and convs without
    int skips;               // units of a layer; before layer L-1-i the stream as it was before
                             // layer i, times a learned vector, is added to it. 0 = no skips
    char units[UNITS_TEXT];  // "3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)", see units_parse
} Config;

// The paper's configuration: C = D = 256, 3x(block:3:1:2:4), a head of its own.
Config config_paper(void);
// 0, or -1 with the reason: a size out of range, a text of units that is none (the message points
// at the character), a product that overflows.
int config_check(const Config *c, Error *e);

// ---- Mixers and units ---------------------------------------------------------------------------

typedef struct Model Model;
typedef struct Unit Unit;
typedef struct Arena Arena;
typedef struct Stream Stream;
typedef struct StreamUnit StreamUnit;

// A number of a unit's text: taps, dilation, width ...
typedef struct {
    const char *name;
    int low, high, fallback;  // fallback: where the text leaves it out; LEFT_OUT: see Mixer.fit
    const char *prefix;       // in the text: "kv" in attn:8:512:kv4; NULL: none
    const char *word;         // in --help: "H" of attn:H
} Number;
enum { LEFT_OUT = -1, MAX_DECLARED = 5 };

// What all passes of a training step share; NULL in inference, which keeps nothing for backward.
typedef struct {
    uint64_t first;  // window of the step's batch at which this pass starts
} Pass;

// A row of the table of mixers: all that the rest of the program knows of one.
typedef struct Mixer {
    const char *name;     // as in a configuration's units
    const char *formula;  // printed at start-up and in --help
    Number numbers[MAX_DECLARED];  // the first without a name ends them
    bool repeats;         // the last number may be given again and again
    bool activation;      // the text may end in :ACTIVATION
    bool norm;            // a LayerNorm stands at the unit's door
    bool input;           // stands before all units that are none; has no dropout and no tail
    bool absolute;        // what it does depends on the place in the text
    bool bytes;           // its reach is counted from its own byte: it reads m->ids, not the stream
    size_t data_bytes;    // of Unit.data, the mixer's own struct
    // Gives what the text left out its value (window: the configuration's) and judges how the
    // numbers go together: 0, or -1 with the reason in `what` (200). NULL: nothing to do.
    int (*fit)(Unit *u, int window, char *what);
    // Bytes back that an output reads, 0 = its own byte alone. Valid after units_parse.
    int64_t (*reach)(const Unit *u);
    // Lists the unit's tensors with add_linear and add_tensor; sets u->dropouts and u->has_tail.
    // NULL: it has none of all these.
    void (*describe)(Model *m, Unit *u);
    // Channels of the widest array that forward or backward needs in m->z; NULL: C.
    size_t (*width)(const Unit *u);
    // For training: gives what forward keeps for backward its places; and u->tail, where the unit
    // ends in an activation. (In inference all those places are NULL.) NULL: nothing.
    void (*place)(Model *m, Unit *u, Arena *a);
    // Bytes of workspace that forward and backward need beside the linear layers'; NULL: none.
    size_t (*work)(const Model *m, const Unit *u);
    // in (N,C) -> end, whose out and residual are set; the mixer adds its own pre, activation and
    // dropout. Must not write `in`.
    void (*forward)(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass);
    // dy (N,C): the gradient by what the last operation summed, as u->tail says. in: what forward
    // was given. Its gradient goes into `end`, in one operation, but for inputs: see inputs.c.
    // Weight gradients are handed to weight_gradient.
    void (*backward)(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                     const Pass *pass);
    // One byte at a time (support/stream.h): lays out weights and state (NULL: none); takes a step.
    size_t stream_bytes;  // of StreamUnit.data
    void (*stream_place)(Stream *s, StreamUnit *u);
    void (*stream_step)(const Stream *s, const StreamUnit *u);
} Mixer;

extern const Mixer *const mixers[];
extern const int n_mixers;

// Offsets into params; the same offset in grads is the gradient.
typedef struct {
    size_t gain, bias;
} Norm;
// A conv, or with K = 1 a linear layer. Without a bias its offset is NO_BIAS.
#define NO_BIAS SIZE_MAX
typedef struct {
    size_t weight, bias;
    int K, C, O, dil;
} Linear;

// A residual unit: x[u+1] = x[u] + mixer(norm(x[u])), without the norm in the paper's block.
struct Unit {
    const Mixer *mixer;
    int numbers[MAX_NUMBERS], n_numbers;
    Activation activation;
    int index, C;  // its place in the stack; the model's channels
    Norm norm;     // where mixer->norm
    int dropouts;  // how many dropouts it has, the last one at its end
    int dropout;   // number of its first in the model
    bool has_tail;  // it ends in an activation ..
    act *tail;      // .. whose pre (N,C) this is
    act *dtail;     // the same place in backward: the gradient by that pre
    struct {
        Unit *from, *to;  // whose stream is added to this one's, and where this one's goes
        size_t scale;     // with `from`: the learned vector
        act *kept;        // with `from`, in training: (N,C) the gradient by this stream
    } skip;
    act *h;        // (N,C) the place of x[u] in backward, once it holds norm(x[u]) again
    void *data;
};

// The one place that reads units as text. A text is units and groups, spaces between them:
//   NAME[:NUMBER...][:ACTIVATION]       what is left out has a default; some numbers have a prefix,
//                                       which makes their place free: attn:8:kv4
//   Nx( ... )  or  ( ... )              groups may nest
// Fills units (MAX_UNITS) without data and returns how many, or -1 with the reason and the
// character. activation, window: of units that name none.
int units_parse(const char *text, int channels, Activation activation, int window, Unit *units,
                Error *e);
// The one place that writes one: "conv:2:4" with every number, and the activation where it is not
// `usual`. Returns buffer.
const char *unit_text(const Unit *u, Activation usual, char *buffer, size_t size);
// Whether two units are the same but for their place.
bool unit_same(const Unit *a, const Unit *b);
// 1 + the reach of all units: how many bytes, the current one included, an output can see.
int64_t config_receptive_field(const Config *c);
// Whether a unit depends on the place in the text.
bool config_absolute(const Config *c);
// none, gelu, ...; N_ACTIVATIONS where there is no such name.
Activation activation_of(const char *name);
extern const char *const activation_names[];  // NULL-terminated

// ---- The model ----------------------------------------------------------------------------------

// One row of the table of tensors. The table is the checkpoint, the gradient check's loop, the
// weight-decay mask (matrices come first) and what --tensors prints.
typedef struct {
    char name[56];     // as PyTorch would name it: units.3.conv.weight
    int dims[3];       // as stored here; a conv weight is (K,C,O), a linear one (C,O)
    int ndim;
    int dil;           // of a conv's weight; else 1
    bool decay;        // matrices are decayed, gains and biases are not
    bool table;        // rows to be looked up: no layer; in files as it is here
    size_t offset;     // of its first value in params, grads, m, v and ema alike
    size_t size;
    size_t *where;     // the field that gets the offset
    float start;       // of a vector: its values in a fresh model
} Tensor;

// What a training run adds to the model.
typedef struct {
    float dropout, byte_dropout;
    uint64_t seed;
    int passes;    // a step's batch is passes * B windows, taken B at a time
    bool at_once;  // even where the backend would rather halve B: faster, and twice the memory
    Hyper hyper;
} Training;

// One allocation of the backend; `address` is the field of Model that holds it.
typedef struct {
    const char *role;
    size_t bytes;
    void *address;
} MemoryRole;

// Weight gradients that wait to be computed together, and what the side stream still reads.
enum { MAX_WAITING = 32, MAX_ON_SIDE = 64 };
typedef struct {
    WeightJob jobs[MAX_WAITING];
    ConvShape shapes[MAX_WAITING];
    int n;
    struct {
        const act *array;
        int fork;
    } on_side[MAX_ON_SIDE];
    int n_on_side;
    int fork;              // the last one; 0: none since the last join
    const act *not_ready;  // what this holds is not yet what the jobs that read it want
} WeightQueue;

struct Model {
    Config config;
    const Backend *backend;
    int B, T;  // windows of one pass, bytes of a window: N = B*T

    Tensor *tensors;
    int n_tensors;
    size_t n_params, n_decay;
    size_t embedding;
    Norm norm_in, norm_out;
    Linear proj, head;  // without tie
    Unit *units;
    int U, dropouts;

    // One allocation per role, all in the backend's memory.
    real *params, *grads, *m, *v, *ema;  // ema NULL without --ema; grads, m, v only in training
    void *activations;                   // x to losses, and what the units keep, lie inside
    act **x;                             // (U+1) x (N,C): the residual stream before each unit
    act *h, *z;                          // (N,C), (N,wide): layer outputs on their way
    act *dh, *dz;                        // their gradients: the same places, but with side stream
    act *dx;                             // (N,C) gradient of the residual stream: x[U]'s place at
                                         // first; below a SmearGate perhaps dh's
    act *dy;                             // (N,C) dx where dropout kept it, for units without tail
    act *spare[2];                       // (N,C) place_waiting's, without side stream
    int n_waiting;                       // how many it has given out
    act *logits, *dlogits;               // (N,V), one place
    int *ids, *targets;                  // (N)
    uint64_t *starts;                    // (B) where in its text a window begins: 0, but in scoring
    real *ones, *sink;                   // (n_ones) gains that are none, and their gradients
    int n_ones;
    real *losses;                        // (N)
    void *work, *side_work;              // workspaces; one without side stream
    StepState *state;
    void *text;  // the training text and its index
    Corpus corpus;

    Training training;
    bool side_stream;  // what only the optimizer waits for runs beside the rest
    WeightQueue queue;
    void *graph;  // a captured step
    MemoryRole memory[10];
    int n_memory;
};

// Plans and allocates; the Model must then stay where it is. B windows of T bytes are held at a
// time; `training` NULL plans for inference only: no gradients, no optimizer, and of what forward
// keeps for backward only what the next unit needs. Parameters are zero until model_init_params or
// a checkpoint fills them. On failure nothing is left allocated. model_free takes a model in any
// state after model_open, also a zeroed one.
int model_open(Model *m, const Backend *backend, const Config *config, int B, int T,
               const Training *training, Error *e);
void model_free(Model *m);

// The tables alone: units and tensors of a zeroed model's config, which has been checked. No
// backend and no parameters: what a checkpoint is compared with before anything large is allocated.
int model_describe(Model *m, Error *e);
// Bytes allocated on the backend; the roles are in m->memory.
size_t model_memory(const Model *m);

// Fresh parameters. Matrices: normal with standard deviation 1/sqrt(fan in), embedding and head
// 0.02 (an embedding that neither a LayerNorm nor the head follows: 1); gains 1,
// biases 0. The same seed gives the same values on every backend.
int model_init_params(Model *m, uint64_t seed, Error *e);

// Host copies of a parameter-like role (params, grads, m, v, ema), n_params values.
void model_read(const Model *m, real *host, const real *role);
void model_write(Model *m, real *role, const real *host);

// Gives the model its training text, once: `parts` texts of length[i] bytes, back to back in
// `text`. A text shorter than T+1 bytes gives no window; -1 if none gives any.
int model_set_corpus(Model *m, const uint8_t *text, const uint64_t *length, int parts, Error *e);

// One optimizer step: draws passes*B windows, forward, backward, clip, AdamW. Queued on a GPU;
// the figures appear in state->ring. On a loss or gradient that is not finite the parameters and
// state->step stay as they are, and the gradients stand in m->grads; otherwise that is zero again.
void model_train_step(Model *m);

// Forward and loss of ids, targets (B*T, host), scored where target >= 0: losses[n] in nats, 0
// elsewhere (host). Uses no dropout and changes no parameter.
void model_losses(Model *m, const int *ids, const int *targets, real *losses);

// The cost in nats of text[from..n-1] (host), every byte once, in windows that each score `stride`
// bytes and give the first of them `context` bytes (at least 1) of what stands before it in `text`;
// byte 0, which nothing precedes, costs log(256). *nats is their sum. The model must hold
// context + stride - 1 bytes in T. stop (may be NULL) is asked before every pass, with the bytes
// scored so far; where it says true, scoring ends with 1 instead of 0, and *nats is no sum.
// Windows that restart at 0, S, 2S .. (sample --windows T:S) are two calls: of the first T + 1
// bytes with context 1 and stride T; then of the rest, from T + 1, with T - S + 1 and S.
typedef bool (*ScoreStop)(size_t scored);
int model_score_windows(Model *m, const uint8_t *text, size_t n, size_t from, size_t context,
                        size_t stride, double *nats, ScoreStop stop, Error *e);
// There every window is a text of its own. The same of one text, with the whole receptive field as
// context: neither figure depends on B and T.
int model_score(Model *m, const uint8_t *text, size_t n, size_t from, double *nats,
                ScoreStop stop, Error *e);
// The same of about `part` of those bytes, never byte 0: in spans that fill a pass and lie evenly
// over them, or all in one span, with byte 0. Adds to *nats and, a span at a time, to *scored.
// Where the place in the text counts, windows as long as in training begin anew.
int model_score_part(Model *m, const uint8_t *text, size_t n, size_t from, size_t part,
                     double *nats, size_t *scored, ScoreStop stop, Error *e);
size_t score_part_pass(const Model *m);  // bytes that a pass of it scores

// The parts of a step, for tests and for latents. model_forward reads m->ids. pass NULL: inference;
// else dropout of step state->step, for rows from pass->first of the step's batch.
void model_forward(Model *m, const Pass *pass);
void model_backward(Model *m, const Pass *pass);  // after forward and cross_entropy; joins all
act *model_latents(const Model *m);               // z (N,D) of the last model_forward

// ---- For mixers ---------------------------------------------------------------------------------

// In describe: a tensor under units.<index>.<name>, or for u NULL under its name alone; ndim 1 to
// 3. A gain is named .weight, as PyTorch names it.
void add_tensor(Model *m, const Unit *u, size_t *where, const char *name, int ndim, int d0, int d1,
                int d2);
// Weight <name>.weight, (K,C,O) or with linear (C,O), and bias <name>.bias of l, whose sizes are
// set; no bias where the configuration says so.
void add_linear(Model *m, const Unit *u, Linear *l, const char *name, bool linear);
// A tensor of rows that are looked up.
void add_table(Model *m, const Unit *u, size_t *where, const char *name, int rows, int D);
// In place: `bytes` of the activations' memory, at a multiple of 256.
void *place(Arena *a, size_t bytes);
// The same, (N,C), for what waits to be read by a weight gradient: with the side stream one of its
// own; else one of four in turn, of which h and z are two. before_write it.
act *place_waiting(Model *m, Arena *a);
// (N, channels) activations of this model, in bytes.
size_t rows_bytes(const Model *m, int channels);

// l's bias in params or grads, or NULL. The shape of l on the rows of a pass; its dropout, number i
// of the unit's.
real *bias_of(real *values, const Linear *l);
ConvShape linear_shape(const Model *m, const Linear *l);
Dropout unit_dropout(const Model *m, const Unit *u, int i, const Pass *pass);
// sums of l on x into e; and backward, from the gradient dy of those sums, to x.
void linear_forward(Model *m, const Linear *l, const act *x, Epilogue e);
void linear_backward(Model *m, const Linear *l, const act *dy, Epilogue e);
// Queues l's weight and bias gradient. x and dy must stay as they are; whoever writes an array that
// a mixer may have queued calls before_write first, which waits for all that still reads it.
void weight_gradient(Model *m, const Linear *l, const act *x, const act *dy);
void before_write(Model *m, const act *array);

#ifdef __cplusplus
}
#endif
#endif
