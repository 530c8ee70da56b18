// arithmetic.h: the arithmetic that every backend shares, CPU and GPU, so that all compute the same
// numbers: Philox, dropout's bits, exp, the activations, the draw of a window, AdamW's update.
//
// Read backend.h first. A new activation: a name in ACTIVATIONS there, and its three lines here.
#ifndef ARITHMETIC_H
#define ARITHMETIC_H

#include <math.h>
#include <string.h>

#include "support/backend.h"
#ifdef PORTABLE
#include "support/portable.h"  // exp, tanh, sin and cos from here on
#endif

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
// Dropout number i of the model draws from RNG_DROPOUT + i.
enum { RNG_INIT, RNG_WINDOW, RNG_BYTE_DROPOUT, RNG_SAMPLE, RNG_TEST, RNG_DROPOUT = 1 << 16 };

// Bits 16*lane..16*lane+15 of one Philox draw: eight 16-bit numbers per call, lane = 0..7.
SHARED_FN uint32_t philox_lane(Philox r, int lane) {
    return (r.v[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}

// ---- exp, dropout ------------------------------------------------------------------------------

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

// ---- The activations: value f(z), slope f'(z), and what dropout leaves behind -------------------
//
// A dropped value's pre-activation is stored as f's `dropped`, where f and its slope are zero: so
// backward finds the mask in what forward has stored. Each is exact in bf16.
#define DROPPED (-16384.0f)

// f(z) = z, with a hole at DROPPED: no such place exists by itself.
SHARED_FN real none_value(real z) { return z == DROPPED ? 0 : z; }
SHARED_FN real none_slope(real z) { return z == DROPPED ? 0 : 1; }
#define none_dropped DROPPED

// GELU in its tanh form (Hendrycks and Gimpel, arXiv:1606.08415):
//   gelu(z) = z/2 (1 + tanh(u)) = z * sigmoid(2u),   u = sqrt(2/pi) (z + 0.044715 z^3)
#define GELU_A ((real)1.5957691216057308)  // 2 sqrt(2/pi)
#define GELU_B ((real)0.044715)
SHARED_FN real gelu_value(real z) { return z / (1 + exp_real(-GELU_A * (z + GELU_B * z * z * z))); }
// forward:  gelu(z) = z * s,  s = sigmoid(2u)         ds/dz = s (1-s) d(2u)/dz
// s(1-s) = s*s*exp(-2u) does not cancel. Beyond |z| = 10 the slope is 0 or 1 to within 1e-35; the
// clamps keep the exponential finite, and below -10 the slope is made exactly 0: DROPPED needs it.
SHARED_FN real gelu_slope(real z) {
    const real low = z < -10 ? 0 : 1;
    z = z < -10 ? -10 : z;
    z = z > 10 ? 10 : z;
    const real e = exp_real(-GELU_A * (z + GELU_B * z * z * z)), s = 1 / (1 + e);
    return low * (s + z * s * (s * e) * (GELU_A * (1 + 3 * GELU_B * z * z)));
}
#define gelu_dropped DROPPED

// The square of a leaky ReLU with slope 1/2, after the squared ReLU of So et al., "Primer",
// arXiv:2109.08668. Value and slope are 0 at 0.
SHARED_FN real lrelu2_value(real z) { return z < 0 ? z * z / 4 : z * z; }
SHARED_FN real lrelu2_slope(real z) { return z < 0 ? z / 2 : 2 * z; }
#define lrelu2_dropped 0.0f

// The same by name. Loops over many values ask once, outside them.
#define VALUE_CASE(name) case ACT_##name: return name##_value(z);
#define SLOPE_CASE(name) case ACT_##name: return name##_slope(z);
#define DROPPED_CASE(name) case ACT_##name: return name##_dropped;
SHARED_FN real act_value(Activation a, real z) {
    switch (a) { ACTIVATIONS(VALUE_CASE) default: return z; }
}
SHARED_FN real act_slope(Activation a, real z) {
    switch (a) { ACTIVATIONS(SLOPE_CASE) default: return 1; }
}
SHARED_FN float act_dropped(Activation a) {
    switch (a) { ACTIVATIONS(DROPPED_CASE) default: return 0; }
}

// ---- tanh, windows, AdamW -----------------------------------------------------------------------

SHARED_FN real real_tanh(real x) {
    return sizeof(real) == sizeof(double) ? (real)tanh((double)x) : (real)tanhf((float)x);
}

// ---- Rotary positions ---------------------------------------------------------------------------

// How far one position turns channels j and j + R/2, 10000^(-2j/R) radians, as a fraction of a turn
// times 2^64; and where position t has turned to, in turns, -1/2 to 1/2. The product wraps where
// whole turns are complete: the difference of two positions is exact.
SHARED_FN uint64_t turn_step(int j, int R) {
    double radians = exp(-9.210340371976184 * 2 * j / R);
    return (uint64_t)(radians / 6.283185307179586 * 18446744073709551616.0);
}
SHARED_FN double turn_of(uint64_t t, uint64_t step) {
    return (double)(int64_t)(t * step) / 18446744073709551616.0;
}

// ---- Inputs: SmearGate, hashed pairs of bytes, sinusoidal positions -----------------------------

SHARED_FN real smear_gate(real w) { return 1 / (1 + exp_real(-w)); }

// A hash in which every bit of x reaches every bit (Wellons' lowbias32, found by search).
SHARED_FN uint32_t mix_bits(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}
// The row of a table for row n of ids, -1: none. A dropped byte has none, nor has a pair with one,
// nor the first byte of a window, which is no pair.
SHARED_FN int lookup_key(const int *ids, size_t n, LookupShape s) {
    // n is below 2^27, and division in 64 bits takes a GPU several times as long.
    int id = ids[n], before = s.pairs && (uint32_t)n % (uint32_t)s.T ? ids[n - 1] : BYTE_DROPPED;
    if (id == BYTE_DROPPED || (s.pairs && before == BYTE_DROPPED)) return -1;
    if (!s.pairs) return id;
    return (int)((uint64_t)mix_bits((uint32_t)(before * V + id)) * (uint64_t)s.rows >> 32);
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

#endif
