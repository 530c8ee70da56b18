// model.h: the whole vocabulary of fuzzytok.c. Read this first, then model.c (the graph and the
// plain-C layers), train.c, and for the same layers on a GPU kernels.h, conv_kernels.cu, layers.cu
// and conv_tensor.cu.
//
// The model turns raw bytes into next-byte predictions; there is no token vocabulary:
//   bytes -> LayerNorm(Embedding) -> residual blocks of causal dilated convolutions
//         -> LayerNorm = latents z -> the embedding, transposed -> 256 logits
// or with a head of its own, as in the paper:
//         -> LayerNorm -> Linear = latents z -> Linear -> 256 logits
//
// One alphabet, everywhere:
//   B batch    T time (bytes)    N = B*T rows    C channels in    O channels out
//   K taps     dil dilation      D latent width  V = 256 byte values
//   L conv layers    U residual units
//   d in front of a name is the gradient of the loss with respect to it: dx, dw
// All arrays are row-major with the last letter contiguous: x (B,T,C) is x[(b*T + t)*C + c].
#ifndef MODEL_H
#define MODEL_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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
    MAX_DILATIONS = 32,
    MAX_TAPS = 256,
    MAX_CHANNELS = 65536,
    MAX_WEIGHT_JOBS = 6,  // layers whose weight gradients are made together
    ERROR_LEN = 512,
    RING = 1024,  // per-step figures kept on the backend until the host reads them
};
#define NORM_EPS 1e-5  // PyTorch's default for LayerNorm

typedef struct {
    char text[ERROR_LEN];  // one line: what was wrong, what was expected, what to do
} Error;

// Fills e (printf style) and returns -1, so that a failing function can end in one line.
int fail(Error *e, const char *format, ...);

// ---- Functions that the CPU and the GPU share, so that both compute the same numbers ----------

#ifdef __CUDACC__
#define SHARED_FN static inline __host__ __device__
#else
#define SHARED_FN static inline
#endif

typedef struct {
    uint32_t v[4];
} Philox;

// Philox4x32, a counter-based generator: the same (key, counter) gives the same 128 random bits in
// any order on any machine. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
// Every random number of the project comes from here. Seven rounds are the fewest that pass all of
// BigCrush (the same paper); ten, the usual margin, are taken wherever they cost nothing.
SHARED_FN Philox philox_rounds(int rounds, uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                               uint32_t c3) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < rounds; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Philox r = {{c0, c1, c2, c3}};
    return r;
}
SHARED_FN Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    return philox_rounds(10, key, c0, c1, c2, c3);
}

// What a random number is for: the last counter word, so that no two purposes share a stream.
// Dropout of conv layer l draws from RNG_DROPOUT + l.
enum { RNG_INIT, RNG_WINDOW, RNG_BYTE_DROPOUT, RNG_SAMPLE, RNG_TEST, RNG_DROPOUT = 1 << 16 };

// Bits 16*lane..16*lane+15 of one Philox draw: eight 16-bit numbers per call, lane = 0..7.
SHARED_FN uint32_t philox_lane(Philox r, int lane) {
    return (r.v[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}

// ---- What layers are given beside their data ---------------------------------------------------

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
    uint32_t step;    // steps taken so far = the number of the step being taken
    double loss_sum;  // summed over the passes of this step
    StepFigures ring[RING];  // of step s at s % RING
} StepState;

// Dropout of one layer. A value is dropped where its 8 random bits are below `threshold`; what
// stays is multiplied by `scale`, so that the expectation stays. A dropped value leaves no mask
// behind: its pre-activation is stored as DROPPED, where GELU and its slope are zero, and backward
// needs nothing but `scale`.
#define DROPPED (-16384.0f)  // exact in bf16
typedef struct {
    uint32_t threshold;      // 0 = no dropout
    float scale;             // 256 / (256 - threshold)
    uint64_t seed;
    uint32_t purpose;        // RNG_DROPOUT + layer
    uint64_t first;          // row of the step's batch at which this pass starts
    const StepState *state;  // for the step number
} Dropout;

// The training text on the backend: windows of T+1 bytes are drawn from it.
typedef struct {
    const uint8_t *text;     // all training bytes, one text after the other
    const uint64_t *starts;  // (parts) first byte of each text in `text`
    const uint64_t *windows; // (parts+1) running count of windows that lie inside one text
    uint64_t n_windows;      // windows[parts]
    int parts;
} Corpus;

// ---- Arithmetic that the CPU and the GPU share --------------------------------------------------

// exp(x). float: x = n ln2 + r with |r| <= ln2/2, a polynomial for exp(r) (Cephes' coefficients),
// then 2^n in two factors, so that overflow and gradual underflow come out as they should. No
// branch, no table, no conversion to int: adding 1.5*2^23 leaves n in the low bits of the sum, and
// compilers make vectors of it. The clamps let a NaN pass. Error: below 2 units in the last place.
SHARED_FN real exp_real(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    const float round = 12582912.0f;  // 1.5 * 2^23
    float v = (float)x;
    v = v < -104.0f ? -104.0f : v;  // exp(-104) rounds to 0
    v = v > 89.0f ? 89.0f : v;      // exp(89) overflows to infinity
    const float sum = v * 1.44269504f + round, n = sum - round;
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts: n*first exact
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits, half, rest;
    float low, high;
    memcpy(&bits, &sum, 4);
    bits = bits - 0x4B400000u + 256u;  // n + 256, positive for every n
    half = bits / 2;
    rest = bits - half;
    half = (half - 1u) << 23;  // 2^(n/2): the exponent field is n/2 + 127 = half - 1
    rest = (rest - 1u) << 23;
    memcpy(&low, &half, 4);
    memcpy(&high, &rest, 4);
    return (real)(p * low * high);
}

// One draw decides about 8 neighbouring channels of the rows r and r + 8, r % 16 < 8, as the matrix
// instructions of a GPU leave them in a thread: channels o/8*8.. of r in the lower half of its
// bits, of r + 8 in the upper. row: either of the two, counted in the step's batch: first + n.
// O: channels of a row.
SHARED_FN Philox dropout_draw(uint64_t seed, uint32_t purpose, uint32_t step, uint64_t row, int o,
                              int O) {
    uint64_t i = (row / 16 * 8 + row % 8) * (uint64_t)((O + 7) / 8) + (uint64_t)(o / 8);
    return philox_rounds(7, seed, (uint32_t)i, (uint32_t)(i >> 32), step, purpose);
}
// Eight 8-bit numbers of a draw, for the channels o/8*8.. of this row: four to a word.
SHARED_FN uint32_t dropout_bits(Philox r, uint64_t row, int word) {
    return row / 8 % 2 ? r.v[2 + word] : r.v[word];
}
SHARED_FN bool is_dropped(Philox r, uint32_t threshold, uint64_t row, int o) {
    return (dropout_bits(r, row, o % 8 / 4) >> 8 * (o % 4) & 0xFFu) < threshold;
}

// GELU in its tanh form (Hendrycks and Gimpel, arXiv:1606.08415):
//   gelu(x) = x/2 (1 + tanh(u)) = x * sigmoid(2u),   u = sqrt(2/pi) (x + 0.044715 x^3)
#define GELU_A ((real)1.5957691216057308)  // 2 sqrt(2/pi)
#define GELU_B ((real)0.044715)
SHARED_FN real gelu(real x) { return x / (1 + exp_real(-GELU_A * (x + GELU_B * x * x * x))); }

// forward:  gelu(x) = x * s,  s = sigmoid(2u)         ds/dx = s (1-s) d(2u)/dx
// s(1-s) = s*s*exp(-2u) does not cancel. Beyond |x| = 10 the slope is 0 or 1 to within 1e-35; the
// clamps keep the exponential finite, and below -10 the slope is made exactly 0, as DROPPED needs.
SHARED_FN real gelu_grad(real x) {
    const real low = x < -10 ? 0 : 1;
    x = x < -10 ? -10 : x;
    x = x > 10 ? 10 : x;
    const real e = exp_real(-GELU_A * (x + GELU_B * x * x * x)), s = 1 / (1 + e);
    return low * (s + x * s * (s * e) * (GELU_A * (1 + 3 * GELU_B * x * x)));
}

SHARED_FN real real_tanh(real x) {
    return sizeof(real) == sizeof(double) ? (real)tanh((double)x) : (real)tanhf((float)x);
}

// Where window `index` of a step's batch starts in the corpus: uniform over all windows that lie
// inside one text. (64 random bits modulo n: the bias is below n / 2^64.)
SHARED_FN uint64_t window_start(const Corpus *c, uint64_t seed, uint32_t step, uint64_t index) {
    Philox r = philox(seed, (uint32_t)index, (uint32_t)(index >> 32), step, RNG_WINDOW);
    uint64_t w = ((uint64_t)r.v[1] << 32 | r.v[0]) % c->n_windows;
    int part = 0;
    while (w >= c->windows[part + 1]) part++;
    return c->starts[part] + (w - c->windows[part]);
}

// Whether byte dropout zeroes byte i of the step's batch.
SHARED_FN bool byte_dropped(uint64_t seed, uint32_t step, uint32_t threshold, uint64_t i) {
    if (threshold == 0) return false;
    uint64_t group = i / 8;
    Philox r = philox(seed, (uint32_t)group, (uint32_t)(group >> 32), step, RNG_BYTE_DROPOUT);
    return philox_lane(r, (int)(i % 8)) < threshold;
}

// lr of a step (0-based): linear warm-up to lr, then a cosine down to min_lr after the last step.
SHARED_FN double learning_rate(const Hyper *h, int64_t step) {
    if (step < h->warmup) return h->lr * (double)(step + 1) / (double)h->warmup;
    if (step >= h->steps) return h->min_lr;
    double done = (double)(step - h->warmup) / (double)(h->steps - h->warmup);
    return h->min_lr + 0.5 * (h->lr - h->min_lr) * (1 + cos(3.141592653589793 * done));
}

// The numbers that one step's updates share.
typedef struct {
    bool finite;  // of loss and gradient; otherwise nothing may be updated
    real clip;    // factor on every gradient
    real lr, decay, beta1, beta2, correct1, correct2, eps, ema;
} AdamWStep;

// What is known before the gradients are.
SHARED_FN AdamWStep adamw_schedule(const Hyper *h, uint32_t step) {
    double lr = learning_rate(h, step);
    AdamWStep a;
    a.finite = false;
    a.clip = 1;
    a.lr = (real)lr;
    a.decay = (real)(1 - lr * h->weight_decay);
    a.beta1 = (real)h->beta1;
    a.beta2 = (real)h->beta2;
    // The moments start at zero; dividing by these undoes that (Kingma and Ba, arXiv:1412.6980).
    a.correct1 = (real)(1 / (1 - pow(h->beta1, step + 1.0)));
    a.correct2 = (real)(1 / (1 - pow(h->beta2, step + 1.0)));
    a.eps = (real)h->eps;
    a.ema = (real)h->ema;
    return a;
}
// And what is known with them: notes the step's figures in the ring, and whether and how far to go.
// norm: of all gradients.
SHARED_FN void adamw_begin(AdamWStep *a, const Hyper *h, StepState *state, double norm,
                           double loss) {
    StepFigures f = {(float)loss, (float)norm, (float)a->lr};
    state->ring[state->step % RING] = f;
    a->finite = loss - loss == 0 && norm - norm == 0;  // inf - inf and NaN - NaN are NaN
    a->clip = (real)(h->clip > 0 && norm > h->clip ? h->clip / norm : 1);
}

// One parameter's update. ema may be NULL.
SHARED_FN void adamw_update(const AdamWStep *a, bool decay, real *p, real grad, real *m, real *v,
                            real *ema) {
    real g = grad * a->clip;
    *m = a->beta1 * *m + (1 - a->beta1) * g;
    *v = a->beta2 * *v + (1 - a->beta2) * g * g;
    real step = *m * a->correct1 / ((real)sqrt(*v * a->correct2) + a->eps);
    *p = *p * (decay ? a->decay : 1) - a->lr * step;
    if (ema) *ema = a->ema * *ema + (1 - a->ema) * *p;
}

// ---- The table of operations: one per device and kernel set ------------------------------------
//
// The graph in model.c is written once over this table. Contracts that hold for every entry:
//   - parameter gradients are ADDED to (+=). They are zero when a step begins: so they were
//     allocated, and so optimize leaves them, without a pass over them for that alone;
//   - activation gradients are WRITTEN (=); the one exception is the gradient of the residual
//     stream, where `accumulate` says += ;
//   - outputs do not alias inputs unless the entry says they may; in backward a pre is both: its
//     gradient takes its place;
//   - work is scratch memory of at least work_bytes(...) whose contents do not matter;
//   - two calls with the same inputs give the same bits (no atomics on floats);
//   - sizes are positive and checked by the caller; indices are size_t inside.
typedef struct Backend {
    const char *name;  // "cpu", "naive", "tiled", "tensor"
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
    // Up to how many rows of a pass a step is faster with branches (below); 0: never.
    size_t branch_rows;
    // Scratch that the layers below need on N rows, with at most K taps, `width` channels in or
    // out, n parameters and as many CPU threads as there are now.
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
    // dx = the gradient of x, or dx += it where `accumulate`. Two things more that the same pass
    // over the rows can do, each NULL where not wanted:
    //   again = what forward gave (the conv that read it wants it for its weights)
    //   pre = dx * scale * gelu'(pre): on through the activation that x was the sum of; scale is
    //         that layer's Dropout.scale
    // One of dx and again may be x.
    void (*norm_backward)(act *dx, real *dgain, real *dbias, act *again, act *pre, const act *dout,
                          const act *x, const real *gain, const real *bias, float scale, size_t N,
                          int C, bool accumulate, void *work);

    // -- causal dilated convolution with what follows it. w (K,C,O), tap k looks k*dil back:
    //      pre[t,o] = b[o] + sum_k sum_c w[k,c,o] x[t - k*dil, c]      (B,T,O), 0 where t-k*dil < 0
    //      out      = res + dropout(gelu(pre))                        (B,T,O)
    //    pre is stored as DROPPED where dropout has taken the value.
    //    out NULL: a plain linear map into pre. res NULL: no residual. b NULL: no bias.
    //    out may be res.
    void (*conv_forward)(act *out, act *pre, const act *x, const real *w, const real *b,
                         const act *res, Dropout drop, ConvShape s, void *work);
    // The mirror image, looking ahead, and on through the activation of the layer before:
    //      g[t,c] = sum_k sum_o w[k,c,o] dy[t + k*dil, o]           (B,T,C), 0 where t+k*dil >= T
    //      dx     = g, or dx + g where `accumulate`
    //      a      = scale * gelu(pre)         what this layer had read, for its weight gradient
    //      pre    = dx * scale * gelu'(pre)   scale: the Dropout.scale with which pre was stored
    //    Each of dx, pre and a may be NULL: not wanted. accumulate needs dx, a needs pre.
    void (*conv_backward_input)(act *dx, act *pre, act *a, const act *dy, const real *w,
                                float scale, ConvShape s, bool accumulate, void *work);
    //      dw[k,c,o] += sum_t x[t - k*dil, c] dy[t,o],  db[o] += sum_t dy[t,o]     (db may be NULL)
    //    for each of n layers (1 to MAX_WEIGHT_JOBS) that share a shape but for dil, which stands
    //    in the job: together they fill a GPU better than one after the other.
    void (*conv_backward_weight)(const WeightJob *jobs, int n, ConvShape s, void *work);

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

    // -- branches: forks to a second queue (on a GPU a stream). What is queued between begin_branch
    //    and end_branch starts when all before it is done, and runs beside what is queued after it,
    //    until join(what end_branch returned). Until then nobody may write what it reads, nor read
    //    what it writes; it needs scratch of its own. One queue serves all branches: to join one
    //    joins those before it. NULL where branch_rows is 0.
    void (*begin_branch)(void);
    int (*end_branch)(void);
    void (*join)(int branch);

    // Records what body(arg) launches, to be replayed without the host; NULL where that does not
    // apply. record returns NULL when it could not.
    void *(*record)(void (*body)(void *), void *arg);
    void (*replay)(void *recording);
    void (*free_recording)(void *recording);

    // What went wrong on the device since the last call, or NULL. Waits for queued work.
    const char *(*error)(void);
} Backend;

extern const Backend cpu_backend;

// A row through LayerNorm: out, x, gain, bias (C).
void norm_row(real *out, const real *x, const real *gain, const real *bias, int C);

// ---- The model ---------------------------------------------------------------------------------

typedef enum { BLOCK_PAPER, BLOCK_PRENORM } BlockForm;

// Everything that fixes the model's shape and function: what a checkpoint must say to rebuild it.
typedef struct {
    int channels;  // C
    int latent;    // D; with tie it must be C
    int taps;      // K
    int blocks;    // how often the list of dilations is repeated
    int n_dilations;
    int dilations[MAX_DILATIONS];
    BlockForm form;
    bool tie;       // logits = LayerNorm(h) E^T: no projection, no head of its own
    float softcap;  // logits = s*tanh(logits/s); 0 = none
} Config;

// The paper's configuration: C = D = 256, K = 3, 3 blocks of dilations 1,2,4.
Config config_paper(void);
// 0, or -1 with the reason: a size out of range, or a product that overflows.
int config_check(const Config *c, Error *e);
// 1 + (K-1) * sum of all dilations: how many bytes, the current one included, an output can see.
int64_t config_receptive_field(const Config *c);

// One row of the table of tensors. The table is the checkpoint, the gradient check's loop, the
// weight-decay mask (matrices come first) and what start-up prints.
typedef struct {
    char name[56];  // as PyTorch would name it: blocks.0.conv.1.weight
    int dims[3];    // as stored here; a conv weight is (K,C,O)
    int ndim;
    bool decay;     // matrices are decayed, gains and biases are not
    size_t offset;  // of its first value in params, grads, m, v and ema alike
    size_t size;
} Tensor;

// Offsets into params; the same offset in grads is the gradient.
typedef struct {
    size_t gain, bias;
} Norm;
typedef struct {
    size_t weight, bias;
    int dil;
    int block, index;  // its name: blocks.<block>.conv.<index>
    act *pre;          // (N,C) before GELU: all that backward needs of this layer, and overwrites
                       // with dpre
    act *read;         // (N,C) paper's form: where backward makes again (recomputes) what the conv
                       // had read, unless that was a unit's x
    Norm norm;         // pre-norm form only
} Conv;

// A residual unit: x[u+1] = x[u] + convs(norm?(x[u])). The paper's block holds all its dilations;
// in the pre-norm form every conv is a unit of its own, with a norm at its door.
typedef struct {
    int first, count;  // its convs
} Unit;

// What a training run adds to the model.
typedef struct {
    float dropout, byte_dropout;
    uint64_t seed;
    int passes;  // a step's batch is passes * B windows, taken B at a time
    bool at_once;  // even where the backend would rather halve B: faster, and twice the memory
    Hyper hyper;
} Training;

// One allocation of the backend; `address` is the field of Model that holds it.
typedef struct {
    const char *role;
    size_t bytes;
    void *address;
} MemoryRole;

typedef struct {
    Config config;
    const Backend *backend;
    int B, T;  // rows of one pass: N = B*T

    Tensor *tensors;
    int n_tensors;
    size_t n_params, n_decay;
    size_t embedding, proj, proj_bias, head, head_bias;  // offsets
    Norm norm_in, norm_out;
    Conv *convs;
    int L;
    Unit *units;
    int U;

    // One allocation per role, all in the backend's memory.
    real *params, *grads, *m, *v, *ema;  // ema NULL without --ema; grads, m, v only in training
    void *activations;                   // x to losses, and every conv's pre and read, lie inside
    act **x;  // (U+1) x (N,C): the residual stream before each unit; the pre-norm form's backward
              // puts what the conv had read in its place
    act *h, *z;                          // (N,max(C,D)) each: layer outputs on their way
    act *dh, *dz;                        // their gradients: h and z, or with branches others
    act *logits;                         // (N,V), overwritten by their gradient in training
    int *ids, *targets;                  // (N)
    real *losses;                        // (N)
    void *work, *branch_work;            // scratch; the same without branches
    StepState *state;
    void *text;  // the training text and its index
    Corpus corpus;

    Training training;
    bool branches;  // a step queues what only its optimizer waits for in branches
    void *recording;
    MemoryRole memory[10];
    int n_memory;
} Model;

// Plans and allocates; the Model must then stay where it is. B windows of T bytes are held at a
// time; `training` NULL plans for inference only: no gradients, no optimizer, and of activations
// (N,C) three beside h and z. Training has U+1 of x and L of pre, four at most for what the paper's
// form makes again, and with branches one for each conv, dh and dz.
// Parameters are zero until model_init_params or a checkpoint fills them. On failure nothing is
// left allocated. model_free takes a model in any state after model_open, also a zeroed one.
int model_open(Model *m, const Backend *backend, const Config *config, int B, int T,
               const Training *training, Error *e);
void model_free(Model *m);

// The tables alone: convs, units and tensors of a zeroed model's config, which has been checked. No
// backend and no parameters: what a checkpoint is compared with before anything large is allocated.
int model_describe(Model *m, Error *e);
// Bytes allocated on the backend; the roles are in m->memory.
size_t model_memory(const Model *m);

// Fresh parameters. Matrices: normal with standard deviation 1/sqrt(fan in), embedding and head
// 0.02; gains 1, biases 0. The same seed gives the same values on every backend.
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

// The cost in nats of text[from..n-1] (host), every byte once and given all that the receptive
// field reaches of what stands before it in `text`; byte 0, which nothing precedes, costs log(256).
// *nats is their sum; each (n, may be NULL) gets every byte's. Neither depends on B and T of the
// model, which must hold at least one receptive field in T.
int model_score(Model *m, const uint8_t *text, size_t n, size_t from, double *nats, real *each,
                Error *e);

// The parts of the above, for tests and for latents. model_forward reads m->ids; with
// `train` it applies dropout of step state->step, for rows first.. of the step's batch.
void model_forward(Model *m, bool train, uint64_t first);
void model_backward(Model *m);  // after model_forward(m, true, ..) and cross_entropy; joins all
act *model_latents(const Model *m);             // z (N,D) of the last model_forward

// ---- Layers on single rows, for streaming ------------------------------------------------------

// out[j][0..O-1] = b + sum_k sum_c w[k,c,:] rows[k*n + j][c] for j in 0..n-1: the inner kernel of
// every conv on the CPU. A row may lie anywhere, e.g. in a ring; one that lies before the text is
// a row of zeros. An output's bits do not depend on n nor on the other rows.
void conv_rows(real *const *out, const real *const *rows, int n, const real *w, const real *b,
               int K, int C, int O);
// out = res + gelu(pre), n values; res NULL: gelu(pre) alone. out may be pre or res.
void gelu_row(real *out, const real *pre, const real *res, int n);

#ifdef __cplusplus
}
#endif
#endif
