// backend.h: the contract between the model and whatever computes it. model.c calls layers only
// through the table `Backend`; a backend is one filled-in table: `plain` (layers.c, the obvious
// loops), `cpu` (fast/cpu.c), and on a GPU `naive`, `tiled` and `tensor` (support/kernel_table.cu).
//
// Read model.h first: it says what the letters B, T, N, C, O, K, D, V mean. Sizes are positive and
// checked by the caller; no operation fails but by running out of memory or on a device error,
// which `error` reports. Arithmetic that all backends share is in arithmetic.h.
#ifndef BACKEND_H
#define BACKEND_H

// Clang sets the last of these for -ffinite-math-only alone, as gcc does.
#if defined __FAST_MATH__ || defined __ASSOCIATIVE_MATH__ || \
    (defined __FINITE_MATH_ONLY__ && __FINITE_MATH_ONLY__ > 0)
#error "-Ofast and -ffast-math remove the tests for NaN and reorder sums: build with -O3 instead"
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// real: parameters, gradients and, on the CPU, activations. test_gradcheck compiles with
// -DREAL=double, because a finite difference in float32 cannot tell 1e-3 from right.
#ifndef REAL
#define REAL float
#endif
typedef REAL real;

// act: an activation in the backend's own format and memory (float32, float64 or bf16; host or
// device). Only the backend that made it looks inside.
typedef void act;

enum {
    V = 256,             // byte values, and logits
    BYTE_DROPPED = 256,  // the input id of a byte that byte dropout has zeroed
    MAX_TAPS = 256,
    MAX_CHANNELS = 65536,
    MAX_HEAD = 128,      // channels of an attention head
    MAX_WEIGHT_JOBS = 6,  // layers whose weight gradients are computed in one call
    ERROR_LEN = 512,
    RING = 1024,  // per-step figures kept on the backend until the host reads them
};
#define NORM_EPS 1e-5  // PyTorch's default for LayerNorm

typedef struct {
    char text[ERROR_LEN];  // one line: what was wrong, what was expected, what to do
} Error;

// Fills e (printf style) and returns -1, so that a failing function can end in one line.
int fail(Error *e, const char *format, ...);

// ---- The activations: a row here, and its value and slope in arithmetic.h ----------------------

//   none    z
//   gelu    z Phi(z), in its tanh form
//   lrelu2  the square of a leaky ReLU with slope 1/2: z^2, or z^2/4 below 0
#define ACTIVATIONS(ROW) ROW(none) ROW(gelu) ROW(lrelu2)
#define ACTIVATION_ENUM(name) ACT_##name,
typedef enum { ACTIVATIONS(ACTIVATION_ENUM) N_ACTIVATIONS } Activation;

// ---- What operations are given beside their data -----------------------------------------------

// A run's optimizer: AdamW (Loshchilov and Hutter, arXiv:1711.05101).
typedef struct {
    int64_t steps, warmup;
    double lr, min_lr;
    double beta1, beta2, eps;  // AdamW
    double weight_decay;       // decoupled: p -= lr * weight_decay * p, matrices only
    double clip;               // bound of the gradient's global norm; 0 = none
    double ema;                // decay of the weight average; 0 = none
} Hyper;

// A linear layer is a conv with K = 1: then B = 1, T = rows.
typedef struct {
    int B, T, C, O, K, dil;
} ConvShape;

// One layer's weight gradient: dw (K,C,O), db (O) or NULL, from x (B,T,C) and dy (B,T,O).
typedef struct {
    real *dw, *db;
    const act *x, *dy;
    int dil;
} WeightJob;

// Figures of one step, kept in a ring on the backend and read by the host when it prints.
typedef struct {
    float loss;       // nats per byte, mean over the step's targets
    float grad_norm;  // global L2 norm before clipping
    float lr;
} StepFigures;

// The training state that changes from step to step. It lives in the backend's memory, so that a
// GPU step needs nothing from the host.
typedef struct {
    uint32_t step;           // steps taken so far = the number of the step being taken
    double loss_sum;         // summed over the passes of this step
    StepFigures ring[RING];  // of step s at s % RING
} StepState;

// Dropout of one layer. A value is dropped where its 8 random bits are below `threshold`; what
// stays is multiplied by `scale`, so that the expectation stays. No mask is kept: a dropped
// value's pre-activation is stored as a number at which its activation and the slope are zero
// (act_dropped, arithmetic.h), or backward draws the same bits again.
typedef struct {
    uint32_t threshold;      // 0 = no dropout
    float scale;             // 256 / (256 - threshold)
    uint64_t seed;
    uint32_t purpose;        // RNG_DROPOUT + the number of this dropout in the model
    uint64_t first;          // row of the step's batch at which this pass starts
    const StepState *state;  // for the step number
} Dropout;

// Attention: a row of qkv holds q (H,d), k (G,d) and v (G,d) of one byte. H is a multiple of G: the
// H/G heads of a group share k and v.
typedef struct {
    int B, T;
    int H, G, d;  // heads; heads of k and v; channels of a head, at most MAX_HEAD
    int W;        // window: a byte attends to the last W, itself included
    int R;        // the first R channels of a head are rotated, an even number
    bool raw;     // q and k are not divided by their root mean square
} AttentionShape;

// A look-up in a table (rows,D): by a byte, or by the bucket of a pair of bytes (lookup_key).
typedef struct {
    int B, T;
    int rows, D;
    bool pairs;
} LookupShape;

// The epilogue: what an operation does with its sums in the same pass over memory, f being the
// activation and scale drop.scale, 1 where nothing is dropped. All arrays (N, channels made).
//   forward:   pre = sum (where dropped: act_dropped)     out = residual + scale * f(pre)
//   backward:  dx  = sum, or dx + sum                     on through the activation below, whose
//              out = scale * f(pre)                       output x was, or was added to x
//              pre = dx * scale * f'(pre)
// A plain linear map: only out, and no activation. In backward drop.scale is all that is read of
// drop: with it pre was stored.
typedef struct {
    act *out;             // forward: the output               backward: recomputed, or NULL
    act *pre;             // forward: kept for backward, or NULL   backward: becomes dpre, or NULL
    const act *residual;  // forward: added, or NULL; may be out
    act *dx;              // backward: the gradient, or NULL where only pre wants it
    bool accumulate;      // backward: dx += sum; needs dx
    Activation activation;
    Dropout drop;
} Epilogue;

// The training text on the backend: windows of T+1 bytes are drawn from it.
typedef struct {
    const uint8_t *text;      // all training bytes, one text after the other
    const uint64_t *starts;   // (parts) first byte of each text in `text`
    const uint64_t *windows;  // (parts+1) running count of windows that lie inside one text
    uint64_t n_windows;       // windows[parts]
    int parts;
} Corpus;

// ---- The operations of attention (mixers/attn.c): a part of the table below
//
// qkv, dqkv (N,(H+2G)d), out, dout (N,H*d), rms (N,H+G),
// lse, delta (N,H), gain, dgain (H).
typedef struct {
    // Every head of q and k in place: divided by its root mean square, whose inverse goes into rms
    // (NULL: not wanted), and its channels j and j + R/2 turned by the angle of its position t.
    void (*turn_forward)(act *qkv, real *rms, AttentionShape s);
    // dqkv: the gradient by what turn_forward made, which is qkv; in place by what it was given
    void (*turn_backward)(act *dqkv, const act *qkv, const real *rms, AttentionShape s);
    // out = softmax over the window of gain / sqrt(d) q k^T, times v; lse = log of the sum of the
    // exponentials (NULL: not wanted)
    void (*forward)(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s,
                    void *work);
    // delta is overwritten.
    void (*backward)(act *dqkv, real *dgain, const act *dout, const act *out, const real *lse,
                     real *delta, const act *qkv, const real *gain, AttentionShape s, void *work);
    size_t (*work_bytes)(AttentionShape s);  // of `work`, never 0
} Attention;

// ---- The operations of inputs and skips (mixers/inputs.c): a part of the table below
//
// All activations (N,C), but for rows of a table, which are (N,D). Parameters (C), table (rows,D).
typedef struct {
    // out[t] = (1-g) x[t] + g x[t-1], where g = sigmoid(gate) and x[-1] = 0
    void (*smear_forward)(act *out, const act *x, const real *gate, int B, int T, int C);
    void (*smear_backward)(act *dx, real *dgate, const act *dout, const act *x, const real *gate,
                           int B, int T, int C, void *work);
    // x += scale * from
    void (*skip_forward)(act *x, const act *from, const real *scale, size_t N, int C);
    // dscale += .. and kept = dx, by which skip_forward later gets the gradient by `from`
    void (*skip_backward)(act *kept, real *dscale, const act *dx, const act *from, size_t N, int C,
                          void *work);
    // out[n] = table[lookup_key(n)], zeros where there is no key
    void (*lookup_forward)(act *out, const int *ids, const real *table, LookupShape s);
    void (*lookup_backward)(real *dtable, const act *dout, const int *ids, LookupShape s,
                            void *work);
    // out = x + sines and cosines of the place in the text; window b begins at byte starts[b] of it
    void (*positions)(act *out, const act *x, const uint64_t *starts, int B, int T, int C);
    // of `work`, never 0: of smear and skip (rows 0, D = C), and of a look-up
    size_t (*work_bytes)(size_t N, int rows, int D);
} InputOps;

// ---- The table of operations -------------------------------------------------------------------
//
// Contracts that hold for every entry:
//   - parameter gradients are ADDED to (+=). They are zero when a step begins: so they were
//     allocated, and so `optimize` leaves them;
//   - activation gradients are WRITTEN (=), but where an epilogue says `accumulate`;
//   - outputs do not alias inputs unless the entry says they may; in backward a pre is both: its
//     gradient takes its place;
//   - work is a workspace of at least work_bytes(...) whose contents do not matter;
//   - two calls with the same inputs give the same bits (no atomics on floats).
typedef struct Backend {
    const char *name;  // "plain", "cpu", "naive", "tiled", "tensor"
    const char *idea;  // one line for --help
    size_t act_bytes;  // bytes of one activation value

    // -- memory. available: bytes that can still be had (SIZE_MAX: unknown). alloc returns NULL
    //    when there is not enough; download waits for queued work.
    size_t (*available)(void);
    void *(*alloc)(size_t bytes);
    void (*free)(void *p);
    void (*zero)(void *p, size_t bytes);
    void (*upload)(void *dst, const void *host_src, size_t bytes);
    void (*download)(void *host_dst, const void *src, size_t bytes);
    void (*write_acts)(act *dst, const real *host_src, size_t n);
    void (*read_acts)(real *host_dst, const act *src, size_t n);
    // How many of a step's N rows are best taken at a time; NULL: all of them.
    size_t (*pass_rows)(size_t N);
    // Workspace of the layers below on N rows, with K taps, at most `width` channels in or out, n
    // parameters and as many CPU threads as there are now.
    size_t (*work_bytes)(size_t N, int K, int width, size_t n);

    // -- input. x (N,C) = LayerNorm(table[ids]); ids (N) in 0..256, where BYTE_DROPPED stands for
    //    a row of zeros. table (V,C), gain (C), bias (C).
    void (*embed_forward)(act *x, const int *ids, const real *table, const real *gain,
                          const real *bias, size_t N, int C, void *work);
    // dtable += ..., one row's contributions in the order of n
    void (*embed_backward)(real *dtable, real *dgain, real *dbias, const act *dx, const int *ids,
                           const real *table, const real *gain, size_t N, int C, void *work);

    // -- LayerNorm over the last axis. All activations (N,C).
    void (*norm_forward)(act *out, const act *x, const real *gain, const real *bias, size_t N,
                         int C);
    // The gradient by x goes into the epilogue e, whose `out` is not used here. dout is that by
    // forward's output, which `again` gets once more (recomputed; NULL: not wanted): the layer that
    // read it needs it for its weights. One of e.dx and again may be x.
    void (*norm_backward)(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                          const real *gain, const real *bias, Epilogue e, size_t N, int C,
                          void *work);

    // -- causal dilated convolution. x (B,T,C), w (K,C,O), b (O) or NULL; tap k looks k*dil back:
    //      sum[t,o] = b[o] + sum_k sum_c w[k,c,o] x[t - k*dil, c]     (B,T,O), 0 where t-k*dil < 0
    void (*conv_forward)(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                         void *work);
    // The mirror image, looking ahead. dy (B,T,O) is the gradient by forward's sums:
    //      sum[t,c] = sum_k sum_o w[k,c,o] dy[t + k*dil, o]         (B,T,C), 0 where t+k*dil >= T
    void (*conv_backward_input)(const act *dy, const real *w, Epilogue e, ConvShape s, void *work);
    //      dw[k,c,o] += sum_t x[t - k*dil, c] dy[t,o],  db[o] += sum_t dy[t,o]     (db may be NULL)
    //    for each of n layers (1 to MAX_WEIGHT_JOBS) that share a shape but for dil, which stands
    //    in the job: together they fill a GPU better than one after the other.
    void (*conv_backward_weight)(const WeightJob *jobs, int n, ConvShape s, void *work);

    Attention attention;
    InputOps inputs;

    // -- dropout of a layer that no activation follows. forward, in its epilogue:
    //    out = residual + scale * y where it is kept. dy (N,C) = scale * dout where y was kept,
    //    else 0: the same bits are drawn again. dy may be dout.
    void (*dropout_backward)(act *dy, const act *dout, Dropout drop, size_t N, int C);

    // -- loss. l = softcap(logits) (cap 0 = none); losses[n] = -log softmax(l)[targets[n]] in nats,
    //    0 where targets[n] < 0 (not scored). scale != 0: logits are overwritten by their own
    //    gradient times scale. logits (N,V).
    void (*cross_entropy)(real *losses, act *logits, const int *targets, float cap, float scale,
                          size_t N);
    // state->loss_sum += sum of losses (N), in a fixed order.
    void (*add_losses)(StepState *state, const real *losses, size_t N, void *work);

    // -- data. Rows first..first+B-1 of the batch of the step in `state`: each a random window of
    //    T+1 bytes; ids (B,T) are its first T bytes, some dropped; targets (B,T) its last T.
    void (*draw_batch)(int *ids, int *targets, Corpus corpus, const StepState *state,
                       uint64_t seed, uint32_t byte_threshold, uint64_t first, int B, int T);

    // -- optimizer. Clips by the global norm, AdamW on n parameters of which the first n_decay are
    //    decayed, ema (may be NULL), notes the figures in the ring, counts the step and leaves the
    //    gradients zero, for the next step's layers to add to. A loss or norm that is not finite
    //    changes nothing: the step is not counted, the gradients stay.
    void (*optimize)(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                     size_t n_decay, StepState *state, double loss_scale, Hyper hyper, void *work);
    // Parameters were written from outside: a backend that keeps a copy of them renews it here.
    // NULL where there is no copy.
    void (*sync_params)(const real *params, size_t n);

    // -- a side stream. What is queued between fork and end_fork starts when all before it is done,
    //    and runs beside what is queued after it, until join(what end_fork returned). Until then
    //    nobody may write what it reads, nor read what it writes; it needs a workspace of its own.
    //    One side stream serves all forks: to join one joins those before it. A step uses it while
    //    a pass has at most side_rows rows; 0: never, and then the three are NULL.
    size_t side_rows;
    void (*fork)(void);
    int (*end_fork)(void);
    void (*join)(int fork);

    // Captures what body(arg) launches as a CUDA graph, to be replayed without the host; NULL where
    // that does not apply. capture returns NULL when it could not.
    void *(*capture)(void (*body)(void *), void *arg);
    void (*replay)(void *graph);
    void (*free_graph)(void *graph);

    // What went wrong on the device since the last call, or NULL. Waits for queued work.
    const char *(*error)(void);
} Backend;

extern const Backend plain_backend;  // layers.c
extern const Backend cpu_backend;    // fast/cpu.c

// ---- What an operation has to do, for timing ----------------------------------------------------

// What the calls of one operation or kernel took, and the least that they had to do.
typedef struct {
    const char *name;
    int launches;
    double seconds, flops, bytes;
} KernelTime;
enum { MOST_KERNEL_TIMES = 64 };  // more than there are names

// Counts that CPU and GPU share:
//   flops   operations of matrix products; of all else 0, because there bytes are the bound
//   bytes   the fewest that can be moved: every operand that is there once, or twice where it is
//           changed in place; rows of gains and biases are left out
static inline double array_bytes(size_t size, size_t N, int C) {
    return (double)size * (double)N * C;
}
static inline double conv_flops(ConvShape s) { return 2.0 * s.B * s.T * s.K * s.C * s.O; }
// How many arrays of its own width an epilogue moves.
static inline int forward_arrays(Epilogue e) {
    return (e.out != NULL) + (e.pre != NULL) + (e.residual != NULL);
}
static inline int backward_arrays(Epilogue e) {
    return (e.dx != NULL) + e.accumulate + 2 * (e.pre != NULL) + (e.out != NULL);
}
// Arrays of C channels and of O, of `size` bytes a value, and the weights.
static inline double conv_bytes(ConvShape s, size_t size, int of_C, int of_O) {
    double N = (double)s.B * s.T, C = s.C, O = s.O;
    return (double)size * (N * (of_C * C + of_O * O) + s.K * C * O);
}
// Pairs of a byte and one that it attends to, over all rows and heads.
static inline double attention_pairs(AttentionShape s) {
    double T = s.T, W = s.W < s.T ? s.W : s.T;
    return (double)s.B * s.H * (W * (T - W) + W * (W + 1) / 2);
}
static inline int norm_arrays(const act *again, Epilogue e) {  // dout, x and the rest
    return 2 + (again != NULL) + backward_arrays(e);
}

// Runs f(arg) on the CPU and adds what each of its operations took to the row of its name: one of
// the n that are there, or a new one. Returns how many rows there are now.
int cpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n);

#ifdef __cplusplus
}
#endif
#endif
