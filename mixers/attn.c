// attn.c: causal multi-head attention over the last W bytes, its own included.
//     attn:H[:W][:kvG][:rR][:nN]     x + Wo attention(Wqkv norm(x))
// H heads of d = C/H channels, window W (where it is left out: --seq), G heads of k and v (H: every
// head its own), the first R channels of a head rotated (all), q and k normalised and weighed by a
// gain (N = 1) or as they are (n0). Read model.h and mlp.c first.
//
// A conv reads fixed bytes before its own; attention chooses them by what they are. A byte at t
// asks with a query q[t]; every byte s of its window offers a key k[s] and a value v[s]:
//     a[s] = gain / sqrt(d) * q[t] . k[s]       p = softmax(a)       out[t] = sum_s p[s] v[s]
// (Vaswani et al., arXiv:1706.03762.) q and k are divided by their root mean square, so that a lies
// within gain * sqrt(d) whatever the weights do; gain is learned, one for each head.
//
// Attention alone does not know the order of what it reads. So channels j and j + R/2 of q and k
// are turned, as a point in the plane, by an angle that grows with the position (Su et al.,
// arXiv:2104.09864):
//     angle(t, j) = t * 10000^(-2j/R)
// In q[t] . k[s] only the difference of two angles is left, that of t - s. Angles are kept as
// fractions of a turn in 64-bit integers, which wrap as angles do: no digit is lost however long
// the text is.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fast/layers.h"
#include "mixers/list.h"
#include "support/arithmetic.h"
#include "support/stream.h"

// ---- Turning: positions, and the root mean square -----------------------------------------------

typedef struct {
    real cos[MAX_HEAD / 2], sin[MAX_HEAD / 2];
} Angles;

static Angles angles_at(uint64_t t, int R) {
    Angles a;
    for (int j = 0; j < R / 2; j++) {
        double angle = 6.283185307179586 * turn_of(t, turn_step(j, R));
        a.cos[j] = (real)cos(angle);
        a.sin[j] = (real)sin(angle);
    }
    return a;
}

// Channels j and j + R/2 of a head, by the angles of its position; or back.
static void turn(real *x, const Angles *angles, int R, bool back) {
    for (int j = 0; j < R / 2; j++) {
        real c = angles->cos[j], s = back ? -angles->sin[j] : angles->sin[j];
        real a = x[j], b = x[j + R / 2];
        x[j] = a * c - b * s;
        x[j + R / 2] = a * s + b * c;
    }
}

void turn_row(real *qk, real *rms, AttentionShape s, uint64_t t) {
    const Angles angles = angles_at(t, s.R);
    for (int h = 0; h < s.H + s.G; h++) {
        real *x = qk + (size_t)h * s.d;
        double squares = 0;
        for (int c = 0; c < s.d; c++) squares += (double)x[c] * x[c];
        real r = s.raw ? 1 : (real)(1 / sqrt(squares / s.d + NORM_EPS));
        for (int c = 0; c < s.d; c++) x[c] *= r;
        if (rms) rms[h] = r;
        turn(x, &angles, s.R, false);
    }
}

void plain_turn_forward(act *qkv, real *rms, AttentionShape s) {
    int heads = s.H + s.G;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++)
        turn_row((real *)qkv + (size_t)n * qkv_width(s), rms ? rms + (size_t)n * heads : NULL,
                 s, (uint64_t)(n % s.T));
    CPU_DONE("turn_forward", 0, 2 * array_bytes(sizeof(real), (size_t)s.B * s.T, heads * s.d));
}

// To turn back is to multiply by the transpose, which is what the chain rule asks for. Then y = r x
// with r = (average(x^2) + eps)^(-1/2). x[c] reaches the loss by two ways:
//     own y[c]   dy[c]/dx[c] = r                                    gives  r dy[c]
//     r          dr/dx[c] = -r^3 x[c] / d = -r^2 y[c] / d, and every y[j] = r x[j] moves by
//                x[j] = y[j] / r of that                            gives -r y[c] average(dy * y)
//     dx[c] = r (dy[c] - y[c] average(dy * y))
void plain_turn_backward(act *dqkv, const act *qkv, const real *rms, AttentionShape s) {
    int heads = s.H + s.G;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++) {
        real *d_n = (real *)dqkv + (size_t)n * qkv_width(s), y[MAX_HEAD];
        const real *q_n = (const real *)qkv + (size_t)n * qkv_width(s);
        const Angles angles = angles_at((uint64_t)(n % s.T), s.R);
        for (int h = 0; h < heads; h++) {
            real *d = d_n + (size_t)h * s.d, r = rms[(size_t)n * heads + h];
            double dot = 0;
            memcpy(y, q_n + (size_t)h * s.d, (size_t)s.d * sizeof *y);
            turn(y, &angles, s.R, true);
            turn(d, &angles, s.R, true);
            for (int c = 0; c < s.d && !s.raw; c++) dot += (double)d[c] * y[c];
            for (int c = 0; c < s.d; c++) d[c] = r * (d[c] - y[c] * (real)(dot / s.d));
        }
    }
    CPU_DONE("turn_backward", 0, 3 * array_bytes(sizeof(real), (size_t)s.B * s.T, heads * s.d));
}

// ---- Attention as plain loops -------------------------------------------------------------------

static real dot(const real *a, const real *b, int d) {
    real sum = 0;
    for (int c = 0; c < d; c++) sum += a[c] * b[c];
    return sum;
}

// Where head h of row n finds its query, and its group's key and value.
typedef struct {
    size_t q, k, v;
} Places;
static Places places(AttentionShape s, size_t n, int h) {
    size_t row = n * qkv_width(s), g = (size_t)(h / (s.H / s.G));
    return (Places){row + (size_t)h * s.d, row + (size_t)(s.H + (int)g) * s.d,
                    row + (size_t)(s.H + s.G + (int)g) * s.d};
}

void plain_attention_forward(act *out, real *lse, const act *qkv, const real *gain,
                             AttentionShape s, void *work) {
    const real *x = qkv;
    (void)work;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++)
        for (int h = 0; h < s.H; h++) {
            const real *q = x + places(s, n, h).q, scale = gain[h] / (real)sqrt(s.d);
            real *o = (real *)out + ((size_t)n * s.H + h) * s.d, top = 0, sum = 0;
            size_t first = window_start_of(s, n);
            for (size_t m = first; m <= (size_t)n; m++) {
                real a = scale * dot(q, x + places(s, m, h).k, s.d);
                if (m == first || a > top) top = a;
            }
            for (int c = 0; c < s.d; c++) o[c] = 0;
            for (size_t m = first; m <= (size_t)n; m++) {
                real e = exp_real(scale * dot(q, x + places(s, m, h).k, s.d) - top);
                const real *v = x + places(s, m, h).v;
                sum += e;
                for (int c = 0; c < s.d; c++) o[c] += e * v[c];
            }
            for (int c = 0; c < s.d; c++) o[c] /= sum;
            if (lse) lse[(size_t)n * s.H + h] = top + (real)log((double)sum);
        }
    CPU_DONE("attention_forward", 4 * attention_pairs(s) * s.d,
             array_bytes(sizeof(real), (size_t)s.B * s.T, (int)qkv_width(s) + s.H * s.d));
}

// The gradient, in steps. Of out = sum_s p[s] v[s]:
//     dv[s] += p[s] dout          dp[s] = dout . v[s]
// Softmax: p[s] = exp(a[s]) / S with S = sum_r exp(a[r]), so raising a[s] by e raises p[s] by
// e p[s], and S by e p[s] S, which lowers every p[r] by e p[s] p[r]. All effects together:
//     da[s] = p[s] dp[s] - p[s] sum_r p[r] dp[r] = p[s] (dp[s] - delta)
//     delta = sum_r p[r] dp[r] = dout . sum_r p[r] v[r] = dout . out
// delta needs no second walk over the window. And a = gain / sqrt(d) q . k gives
//     dq += gain / sqrt(d) da[s] k[s]     dk[s] += gain / sqrt(d) da[s] q
//     dgain += da[s] q . k[s] / sqrt(d)
// p is recomputed: exp(a - lse). One thread does it all, because the heads of a group add to the
// same dk and dv.
void plain_attention_backward(act *dqkv, real *dgain, const act *dout, const act *out,
                              const real *lse, real *delta, const act *qkv, const real *gain,
                              AttentionShape s, void *work) {
    const real *x = qkv;
    real *dx = dqkv, root = (real)sqrt(s.d);
    (void)work, (void)delta;
    memset(dx, 0, (size_t)s.B * s.T * qkv_width(s) * sizeof *dx);
    for (int h = 0; h < s.H; h++) {
        double gain_sum = 0;
        for (size_t n = 0; n < (size_t)s.B * s.T; n++) {
            size_t at = (n * s.H + h) * (size_t)s.d;
            const real *q = x + places(s, n, h).q, *go = (const real *)dout + at;
            real *dq = dx + places(s, n, h).q, D = dot(go, (const real *)out + at, s.d);
            for (size_t m = window_start_of(s, n); m <= n; m++) {
                Places j = places(s, m, h);
                real qk = dot(q, x + j.k, s.d) / root;
                real p = exp_real(gain[h] * qk - lse[n * s.H + h]);
                // forward:  out += p v
                real da = p * (dot(go, x + j.v, s.d) - D), scale = gain[h] * da / root;
                for (int c = 0; c < s.d; c++) dx[j.v + c] += p * go[c];
                // forward:  a = gain q . k / sqrt(d)
                for (int c = 0; c < s.d; c++) dq[c] += scale * x[j.k + c];
                for (int c = 0; c < s.d; c++) dx[j.k + c] += scale * q[c];
                gain_sum += (double)da * qk;
            }
        }
        dgain[h] += (real)gain_sum;
    }
    CPU_DONE("attention_backward", 10 * attention_pairs(s) * s.d,
             array_bytes(sizeof(real), (size_t)s.B * s.T, 2 * (int)(qkv_width(s)) + 2 * s.H * s.d));
}

size_t plain_attention_work(AttentionShape s) { return (void)s, 8; }

// ---- The mixer ----------------------------------------------------------------------------------

enum { HEADS, WINDOW, KV, ROTATED, NORMALISED };  // places in Unit.numbers

typedef struct {
    Linear qkv, out;
    size_t gain;
    act *kept_qkv, *kept_out;  // (N,(H+2G)d) after turn_forward; (N,C): what Wo reads
    real *rms, *lse, *delta;   // (N,H+G), (N,H), (N,H)
} Attn;

static AttentionShape shape_of(const Unit *u, int B, int T) {
    return (AttentionShape){.B = B, .T = T, .H = u->numbers[HEADS], .G = u->numbers[KV],
                            .d = u->C / u->numbers[HEADS], .W = u->numbers[WINDOW],
                            .R = u->numbers[ROTATED], .raw = !u->numbers[NORMALISED]};
}

// Whether turning changes anything.
static bool turns(AttentionShape s) { return !s.raw || s.R > 0; }

static int fit(Unit *u, int window, char *what) {
    int *n = u->numbers, d = u->C / n[HEADS];
    if (u->C % n[HEADS] || d > MAX_HEAD) {
        snprintf(what, 200, "%d heads of %d channels, expected heads that divide them into parts "
                 "of at most %d", n[HEADS], u->C, MAX_HEAD);
        return -1;
    }
    if (n[WINDOW] == LEFT_OUT) n[WINDOW] = window;
    if (n[KV] == LEFT_OUT) n[KV] = n[HEADS];
    if (n[ROTATED] == LEFT_OUT) n[ROTATED] = d / 2 * 2;
    if (n[HEADS] % n[KV]) {
        snprintf(what, 200, "%d heads share %d of keys and values, expected a divisor of %d",
                 n[HEADS], n[KV], n[HEADS]);
        return -1;
    }
    if (n[ROTATED] % 2 || n[ROTATED] > d) {
        snprintf(what, 200, "%d channels of a head of %d are rotated, expected an even number up "
                 "to that", n[ROTATED], d);
        return -1;
    }
    return 0;
}

static int64_t reach(const Unit *u) { return u->numbers[WINDOW] - 1; }

static void describe(Model *m, Unit *u) {
    Attn *d = u->data;
    AttentionShape s = shape_of(u, 1, 1);
    d->qkv = (Linear){.K = 1, .C = u->C, .O = (int)qkv_width(s), .dil = 1};
    d->out = (Linear){.K = 1, .C = u->C, .O = u->C, .dil = 1};
    add_linear(m, u, &d->qkv, "qkv", true);
    if (!s.raw) add_tensor(m, u, &d->gain, "gain", 1, s.H, 0, 0);
    // Sharper than 1 from the start (parameter-golf's pull request 705 begins so; not tuned here).
    if (!s.raw && m->n_tensors > 0) m->tensors[m->n_tensors - 1].start = 1.5f;
    if (s.raw && s.H > m->n_ones) m->n_ones = s.H;
    add_linear(m, u, &d->out, "out", true);
    u->dropouts = 1;
}

// Both linear layers' wide arrays, qkv and what attention makes, stand side by side in z.
static size_t width(const Unit *u) { return qkv_width(shape_of(u, 1, 1)) + (size_t)u->C; }

static size_t work(const Model *m, const Unit *u) {
    return m->backend->attention.work_bytes(shape_of(u, m->B, m->T));
}

static void place_attn(Model *m, Unit *u, Arena *a) {
    Attn *d = u->data;
    size_t N = (size_t)m->B * (size_t)m->T, H = (size_t)u->numbers[HEADS];
    d->kept_qkv = place(a, rows_bytes(m, d->qkv.O));
    d->kept_out = place(a, rows_bytes(m, u->C));
    d->rms = place(a, N * (H + (size_t)u->numbers[KV]) * sizeof(real));
    d->lse = place(a, N * H * sizeof(real));
    d->delta = place(a, N * H * sizeof(real));
}

// The second array in z or dz, behind one as wide as qkv.
static act *behind_qkv(const Model *m, const Attn *d, act *z) {
    return (char *)z + rows_bytes(m, d->qkv.O);
}

// in -> qkv -> turned -> out -> Wo -> end
static void forward(Model *m, Unit *u, const act *in, Epilogue end, const Pass *pass) {
    const Attn *d = u->data;
    const Attention *ops = &m->backend->attention;
    AttentionShape s = shape_of(u, m->B, m->T);
    act *qkv = d->kept_qkv ? d->kept_qkv : m->z;
    act *out = d->kept_out ? d->kept_out : behind_qkv(m, d, m->z);
    linear_forward(m, &d->qkv, in, (Epilogue){.out = qkv});
    if (turns(s)) ops->turn_forward(qkv, d->rms, s);
    ops->forward(out, d->lse, qkv, s.raw ? m->ones : m->params + d->gain, s, m->work);
    end.drop = unit_dropout(m, u, 0, pass);
    linear_forward(m, &d->out, out, end);
}

// forward:  y = Wo out,  out = attention(turned),  turned = turn(qkv),  qkv = Wqkv in
static void backward(Model *m, Unit *u, const act *in, const act *dy, Epilogue end,
                     const Pass *pass) {
    const Attn *d = u->data;
    const Attention *ops = &m->backend->attention;
    AttentionShape s = shape_of(u, m->B, m->T);
    act *dqkv = m->dz, *dout = behind_qkv(m, d, m->dz);
    (void)pass;
    before_write(m, m->dz);
    weight_gradient(m, &d->out, d->kept_out, dy);
    linear_backward(m, &d->out, dy, (Epilogue){.dx = dout});
    ops->backward(dqkv, s.raw ? m->sink : m->grads + d->gain, dout, d->kept_out, d->lse, d->delta,
                  d->kept_qkv, s.raw ? m->ones : m->params + d->gain, s, m->work);
    if (turns(s)) ops->turn_backward(dqkv, d->kept_qkv, d->rms, s);
    weight_gradient(m, &d->qkv, in, dqkv);
    linear_backward(m, &d->qkv, dqkv, end);
}

// ---- One byte at a time: a ring of W keys and values --------------------------------------------

typedef struct {
    Panels qkv, out;
    const real *gain;  // NULL: none
    real *k, *v;   // (capacity, G, d, W): a key's channels lie W apart; (capacity, G, W, d)
    real *scores;  // (capacity, H, W)
} AttnStream;

static void stream_place(Stream *s, StreamUnit *u) {
    const Attn *d = u->unit->data;
    AttnStream *p = u->data;
    AttentionShape a = shape_of(u->unit, 1, 1);
    p->qkv = stream_panels(s, &d->qkv);
    p->out = stream_panels(s, &d->out);
    p->gain = a.raw ? NULL : stream_copy(s, d->gain, (size_t)a.H);
    p->k = stream_state(s, (size_t)a.W, a.G * a.d);
    p->v = stream_state(s, (size_t)a.W, a.G * a.d);
    p->scores = stream_state(s, attention_padded(a.W), a.H);
}

// Head h of stream j: its window begins at slot `first` of the ring, and has n keys.
static void stream_head(const AttnStream *p, AttentionShape a, int j, int h, const real *q, real *o,
                        size_t first, size_t n) {
    size_t W = (size_t)a.W, g = (size_t)j * a.G + (size_t)(h / (a.H / a.G)), d = (size_t)a.d;
    const real *k = p->k + g * d * W, *v = p->v + g * W * d;
    real *e = p->scores + ((size_t)j * a.H + h) * attention_padded(a.W);
    size_t before = W - first < n ? W - first : n;  // then the ring wraps
    attention_scores(e, q, k + first, W, before, a.d);
    attention_scores(e + before, q, k, W, n - before, a.d);
    real gain = a.raw ? 1 : p->gain[h];
    real sum = attention_softmax(e, n, gain / (real)sqrt(a.d), NULL);
    for (int c = 0; c < a.d; c++) o[c] = 0;
    attention_values(o, e, v + first * d, d, before, a.d);
    attention_values(o, e + before, v, d, n - before, a.d);
    for (int c = 0; c < a.d; c++) o[c] /= sum;
}

static void stream_step(const Stream *s, const StreamUnit *u) {
    const AttnStream *p = u->data;
    AttentionShape a = shape_of(u->unit, 1, 1);
    size_t wide = qkv_width(a), W = (size_t)a.W, C = (size_t)a.H * a.d, d = (size_t)a.d;
    size_t now = (size_t)(s->position % W), n = s->position < W ? (size_t)s->position + 1 : W;
    stream_input(s, u, s->h);
    stream_map(s, &p->qkv, s->z, s->h_rows, ACT_none);
#pragma omp for schedule(static)
    for (int j = 0; j < s->S; j++) {
        real *q = s->z + (size_t)j * wide, *k = q + C, *v = k + (size_t)a.G * d;
        if (turns(a)) turn_row(q, NULL, a, s->position);
        for (int i = 0; i < a.G * a.d; i++) p->k[((size_t)j * a.G * d + i) * W + now] = k[i];
        for (int g = 0; g < a.G; g++)
            memcpy(p->v + (((size_t)j * a.G + g) * W + now) * d, v + (size_t)g * d,
                   d * sizeof *v);
    }
    // A stream has many heads: threads share those.
#pragma omp for schedule(static) collapse(2)
    for (int j = 0; j < s->S; j++)
        for (int h = 0; h < a.H; h++)
            stream_head(p, a, j, h, s->z + (size_t)j * wide + (size_t)h * d,
                        s->h + (size_t)j * C + (size_t)h * d, (now + 1 + W - n) % W, n);
    stream_map(s, &p->out, NULL, s->h_rows, ACT_none);
}

const Mixer attn_mixer = {
    .name = "attn",
    .formula = "x + Wo attention(Wqkv norm(x))",
    .numbers = {{"heads", 1, 4096, 4, NULL, "H"}, {"window", 1, MAX_WINDOW, LEFT_OUT, NULL, "W"},
                {"heads of keys and values", 1, 4096, LEFT_OUT, "kv", "kvG"},
                {"rotated channels", 0, MAX_HEAD, LEFT_OUT, "r", "rR"},
                {"normalisation of q and k", 0, 1, 1, "n", "nN"}},
    .norm = true,
    .data_bytes = sizeof(Attn),
    .fit = fit,
    .reach = reach,
    .describe = describe,
    .width = width,
    .place = place_attn,
    .work = work,
    .forward = forward,
    .backward = backward,
    .stream_bytes = sizeof(AttnStream),
    .stream_place = stream_place,
    .stream_step = stream_step,
};
