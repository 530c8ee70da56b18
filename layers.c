// layers.c: every operation of the model as the obvious loops, forward and under it backward: the
// backend `plain`, which is the definition of all others. ./train --kernels plain trains with it.
//
// Read model.h and the contracts in support/backend.h first. An operation here is what it computes
// and nothing else: no tiles, no vectors. OpenMP shares loops whose turns do not meet. Where these
// loops are fast enough the backend `cpu` (fast/cpu.c) uses them as they are.
#include "fast/layers.h"

#include <stdio.h>
#include <stdlib.h>

#include "support/arithmetic.h"

// ---- LayerNorm
//
// Ba, Kiros and Hinton, arXiv:1607.06450. A row x of C values is shifted to mean 0 and stretched to
// deviation 1, then every channel gets a gain and a bias of its own:
//     xhat = (x - mean) * rstd          rstd = 1 / sqrt(average((x - mean)^2) + eps)
//     out  = xhat * gain + bias

// Mean and rstd of a row. In double and in two passes: squares minus the squared mean would cancel.
static void row_moments(const real *x, int C, real *mean, real *rstd) {
    double sum = 0, squares = 0;
    for (int c = 0; c < C; c++) sum += x[c];
    double mu = sum / C;
    for (int c = 0; c < C; c++) squares += (x[c] - mu) * (x[c] - mu);
    *mean = (real)mu;
    *rstd = (real)(1 / sqrt(squares / C + NORM_EPS));
}

void norm_row(real *out, const real *x, const real *gain, const real *bias, int C) {
    real mean, rstd;
    row_moments(x, C, &mean, &rstd);
    for (int c = 0; c < C; c++) out[c] = (x[c] - mean) * rstd * gain[c] + bias[c];
}

void plain_norm_forward(act *out, const act *x, const real *gain, const real *bias, size_t N,
                        int C) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        norm_row((real *)out + n * C, (const real *)x + n * C, gain, bias, C);
    CPU_DONE("norm_forward", 0, 2 * array_bytes(sizeof(real), N, C));
}

// The gradient, in steps. Let g = dout * gain, the gradient by xhat. x[c] reaches the loss by three
// ways: by its own xhat[c], by the mean, and by rstd.
//   own xhat    dxhat[c]/dx[c] = rstd                               gives  rstd * g[c]
//   mean        raising x[c] by e raises the mean by e/C and lowers every xhat by rstd * e/C
//                                                                   gives -rstd * average(g)
//   rstd        rstd = (v + eps)^(-1/2), v = average((x - mean)^2), dv/dx[c] = 2 (x[c] - mean) / C
//               (what the mean's change adds to dv cancels: the deviations sum to 0), so
//               drstd/dx[c] = -rstd^3 (x[c] - mean) / C = -rstd^2 xhat[c] / C; and every
//               xhat[j] = (x[j] - mean) * rstd moves by (x[j] - mean) = xhat[j] / rstd of that
//                                                         gives -rstd * xhat[c] * average(g * xhat)
//   dx[c] = rstd * (g[c] - average(g) - xhat[c] * average(g * xhat))
// Read: g without its parts along 1 and along xhat. To shift or to stretch a row does not move out.
// One row; dgain and dbias are added to. dx may be x.
void norm_row_backward(real *dx, real *dgain, real *dbias, const real *dout, const real *x,
                       const real *gain, int C, bool accumulate) {
    real mean, rstd;
    row_moments(x, C, &mean, &rstd);
    double g_sum = 0, gx_sum = 0;
    for (int c = 0; c < C; c++) {
        real xhat = (x[c] - mean) * rstd, g = dout[c] * gain[c];
        g_sum += g;
        gx_sum += g * xhat;
    }
    real g_mean = (real)(g_sum / C), gx_mean = (real)(gx_sum / C);
    for (int c = 0; c < C; c++) {
        real xhat = (x[c] - mean) * rstd, g = dout[c] * gain[c];
        // forward:  out[c] = xhat[c] * gain[c] + bias[c]
        dgain[c] += dout[c] * xhat;
        dbias[c] += dout[c];
        real d = rstd * (g - g_mean - xhat * gx_mean);
        dx[c] = accumulate ? dx[c] + d : d;
    }
}

static void plain_norm_backward(act *again, real *dgain, real *dbias, const act *dout,
                                const act *x, const real *gain, const real *bias, Epilogue e,
                                size_t N, int C, void *work) {
    (void)work;
    for (size_t n = 0; n < N; n++) {
        const real *x_n = (const real *)x + n * C;
        real *dx_n = (real *)e.dx + n * C, *pre_n = e.pre ? (real *)e.pre + n * C : NULL;
        norm_row_backward(dx_n, dgain, dbias, (const real *)dout + n * C, x_n, gain, C,
                          e.accumulate);
        if (again) norm_row((real *)again + n * C, x_n, gain, bias, C);  // only now: it may be x
        // forward, below:  x = residual + scale * f(pre)
        for (int c = 0; pre_n && c < C; c++)
            pre_n[c] = dx_n[c] * (e.drop.scale * act_slope(e.activation, pre_n[c]));
    }
    CPU_DONE("norm_backward", 0, norm_arrays(again, e) * array_bytes(sizeof(real), N, C));
}

// ---- Embedding and its LayerNorm
//
// x[n] = norm(table[ids[n]]). A dropped byte is a row of zeros, of which the norm leaves the bias.

static void plain_embed_forward(act *x, const int *ids, const real *table, const real *gain,
                                const real *bias, size_t N, int C, void *work) {
    (void)work;
    for (size_t n = 0; n < N; n++) {
        real *x_n = (real *)x + n * C;
        if (ids[n] == BYTE_DROPPED)
            memcpy(x_n, bias, (size_t)C * sizeof *x_n);
        else
            norm_row(x_n, table + (size_t)ids[n] * C, gain, bias, C);
    }
    CPU_DONE("embed_forward", 0, array_bytes(sizeof(real), N, C) + 4.0 * (double)N);
}

static void plain_embed_backward(real *dtable, real *dgain, real *dbias, const act *dx,
                                 const int *ids, const real *table, const real *gain, size_t N,
                                 int C, void *work) {
    (void)work;
    for (size_t n = 0; n < N; n++) {
        const real *dx_n = (const real *)dx + n * C;
        // forward:  x[n] = norm(table[ids[n]]), or bias
        if (ids[n] == BYTE_DROPPED)
            for (int c = 0; c < C; c++) dbias[c] += dx_n[c];
        else
            norm_row_backward(dtable + (size_t)ids[n] * C, dgain, dbias, dx_n,
                              table + (size_t)ids[n] * C, gain, C, true);
    }
    CPU_DONE("embed_backward", 0, array_bytes(sizeof(real), N, C) + 4.0 * (double)N);
}

// ---- Convolution, and with one tap the linear layer
//
//   sum[t] looks back:   b + sum_k x[t - k*dil] w[k]       zero where t - k*dil < 0
//   dx[t]  looks ahead:      sum_k dy[t + k*dil] w[k]^T    zero where t + k*dil >= T
//   dil = 4, K = 3    o-------o-------o      forward reads t-8, t-4, t;  backward reads t, t+4, t+8
// Each of the three products, forward and the two gradients, is 2 N K C O operations.

// What follows the sum of row n, channel o of O: out = residual + scale * f(pre).
static void epilogue_forward(Epilogue e, real sum, size_t n, int o, int O) {
    size_t i = n * (size_t)O + (size_t)o;
    if (e.drop.threshold) {
        uint64_t row = e.drop.first + n;
        Philox r = dropout_draw(e.drop.seed, e.drop.purpose, e.drop.state->step, row, o, O);
        if (is_dropped(r, e.drop.threshold, row, o)) sum = act_dropped(e.activation);
    }
    if (e.pre) ((real *)e.pre)[i] = sum;
    if (!e.out) return;
    real y = (e.drop.threshold ? e.drop.scale : 1) * act_value(e.activation, sum);
    ((real *)e.out)[i] = e.residual ? ((const real *)e.residual)[i] + y : y;
}

// forward, below:  x = residual + scale * f(pre)
static void epilogue_backward(Epilogue e, real sum, size_t i) {
    real *dx = e.dx, *pre = e.pre, *out = e.out;
    if (e.accumulate) sum += dx[i];
    if (dx) dx[i] = sum;
    if (pre && out) out[i] = e.drop.scale * act_value(e.activation, pre[i]);
    if (pre) pre[i] = sum * (e.drop.scale * act_slope(e.activation, pre[i]));
}

static void plain_conv_forward(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                               void *work) {
    (void)work;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++) {  // n: row of all B*T;  t: its time
        int t = n % s.T;
        for (int o = 0; o < s.O; o++) {
            real sum = b ? b[o] : 0;
            for (int k = 0; k < s.K && t >= (int64_t)k * s.dil; k++) {
                const real *x_s = (const real *)x + (size_t)(n - k * s.dil) * s.C;
                const real *w_k = w + (size_t)k * s.C * s.O;
                for (int c = 0; c < s.C; c++) sum += x_s[c] * w_k[(size_t)c * s.O + o];
            }
            epilogue_forward(e, sum, (size_t)n, o, s.O);
        }
    }
    CPU_DONE("conv_forward", conv_flops(s), conv_bytes(s, sizeof(real), 1, forward_arrays(e)));
}

static void plain_conv_backward_input(const act *dy, const real *w, Epilogue e, ConvShape s,
                                      void *work) {
    (void)work;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B * s.T; n++) {
        int t = n % s.T;
        for (int c = 0; c < s.C; c++) {
            real sum = 0;
            // forward:  sum[t,o] += x[t - k*dil, c] * w[k,c,o]
            for (int k = 0; k < s.K && (int64_t)k * s.dil < s.T - t; k++) {
                const real *dy_t = (const real *)dy + (size_t)(n + k * s.dil) * s.O;
                const real *w_kc = w + ((size_t)k * s.C + c) * s.O;
                for (int o = 0; o < s.O; o++) sum += dy_t[o] * w_kc[o];
            }
            epilogue_backward(e, sum, (size_t)n * s.C + c);
        }
    }
    CPU_DONE("conv_backward_input", conv_flops(s),
             conv_bytes(s, sizeof(real), backward_arrays(e), 1));
}

static void plain_conv_backward_weight(const WeightJob *jobs, int n_jobs, ConvShape s,
                                       void *work) {
    (void)work;
    for (const WeightJob *j = jobs; j < jobs + n_jobs; j++) {
        const real *x = j->x, *dy = j->dy;
#pragma omp parallel for collapse(2) schedule(static)
        for (int k = 0; k < s.K; k++)
            for (int c = 0; c < s.C; c++) {
                real *dw_kc = j->dw + ((size_t)k * s.C + c) * s.O;
                // forward:  sum[t,o] += x[t - k*dil, c] * w[k,c,o]
                for (int n = 0; n < s.B * s.T; n++) {
                    if (n % s.T < (int64_t)k * j->dil) continue;
                    real x_sc = x[(size_t)(n - k * j->dil) * s.C + c];
                    const real *dy_n = dy + (size_t)n * s.O;
                    for (int o = 0; o < s.O; o++) dw_kc[o] += x_sc * dy_n[o];
                }
            }
        // forward:  sum[t,o] += b[o]
        for (int n = 0; n < s.B * s.T && j->db; n++)
            for (int o = 0; o < s.O; o++) j->db[o] += dy[(size_t)n * s.O + o];
    }
    CPU_DONE("conv_backward_weight", n_jobs * conv_flops(s),
             n_jobs * (conv_bytes(s, sizeof(real), 1, 1) + (double)sizeof(real) * s.K * s.C * s.O));
}

// ---- Dropout where no activation follows

void plain_dropout_backward(act *dy, const act *dout, Dropout d, size_t N, int C) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        for (int c = 0; c < C; c++) {
            size_t i = n * (size_t)C + (size_t)c;
            uint64_t row = d.first + n;
            Philox r = dropout_draw(d.seed, d.purpose, d.state->step, row, c, C);
            bool dropped = d.threshold && is_dropped(r, d.threshold, row, c);
            // forward:  out = residual + scale * y where y is kept
            ((real *)dy)[i] = dropped ? 0 : d.scale * ((const real *)dout)[i];
        }
    CPU_DONE("dropout_backward", 0, 2 * array_bytes(sizeof(real), N, C));
}

// ---- Loss
//
// Of V numbers p, the softcapped logits, softmax makes probabilities q_v = exp(p_v) / S with
// S = sum_j exp(p_j), and the loss is the cost of the byte that came, -log q_target = log S -
// p_target. Its gradient: d log S / dp_v = exp(p_v) / S = q_v, and p_target has slope 1, so
//     dloss/dp_v = q_v - (1 if v is the target, else 0)
// what the model said minus what was true. Through the cap, p = cap * tanh(l / cap), whose slope is
// 1 - tanh^2.

// One row of V logits, in nats. With `scale` the row is overwritten by scale * dloss/dlogits.
static real cross_entropy_row(real *l, int target, real cap, real scale) {
    // p: softcapped logits, then exp(p - top), of which none overflows and one is 1.
    real p[V], slope[V], top = 0;
    for (int v = 0; v < V; v++) {
        real t = cap > 0 ? real_tanh(l[v] / cap) : 0;
        p[v] = cap > 0 ? cap * t : l[v];
        slope[v] = 1 - t * t;
        if (v == 0 || p[v] > top) top = p[v];
    }
    real at_target = p[target] - top;
    double sum = 0;
    for (int v = 0; v < V; v++) p[v] = exp_real(p[v] - top);
    for (int v = 0; v < V; v++) sum += p[v];
    if (scale != 0)
        // forward:  loss = log(sum_v exp(p_v)) - p_target
        for (int v = 0; v < V; v++)
            l[v] = scale * slope[v] * (p[v] / (real)sum - (v == target ? 1 : 0));
    return (real)(log(sum) - at_target);
}

void plain_cross_entropy(real *losses, act *logits, const int *targets, float cap, float scale,
                         size_t N) {
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++) {
        real *l = (real *)logits + n * V;
        bool scored = targets[n] >= 0;
        losses[n] = scored ? cross_entropy_row(l, targets[n], cap, scale) : 0;
        // A row without a target must not reach backward: its logits are no gradient.
        if (!scored && scale != 0) memset(l, 0, V * sizeof *l);
    }
    CPU_DONE("cross_entropy", 0, (scale != 0 ? 2 : 1) * array_bytes(sizeof(real), N, V));
}

void plain_add_losses(StepState *state, const real *losses, size_t N, void *work) {
    // By one thread, in double, in the order of n: the same sum on every run.
    (void)work;
    for (size_t n = 0; n < N; n++) state->loss_sum += losses[n];
    CPU_DONE("add_losses", 0, 4.0 * (double)N);
}

// ---- Data

// Windows and bytes are numbered within the step's batch, from `first` windows on: what is drawn
// does not depend on how the batch is cut into passes. A target is never dropped.
void plain_draw_batch(int *ids, int *targets, Corpus c, const StepState *state, uint64_t seed,
                      uint32_t byte_threshold, uint64_t first, int B, int T) {
    for (int b = 0; b < B; b++) {
        const uint8_t *window = c.text + window_start(&c, seed, state->step, first + (uint64_t)b);
        for (int t = 0; t < T; t++) {
            size_t n = (size_t)b * T + t;
            bool dropped = byte_dropped(seed, state->step, byte_threshold,
                                        (first + (uint64_t)b) * (uint64_t)T + (uint64_t)t);
            ids[n] = dropped ? BYTE_DROPPED : window[t];
            targets[n] = window[t + 1];
        }
    }
    CPU_DONE("draw_batch", 0, 9.0 * B * T);  // a byte of text becomes an id and a target
}

// ---- AdamW: the update of one parameter is adamw_update in arithmetic.h

static void plain_optimize(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                           size_t n_decay, StepState *state, double loss_scale, Hyper h,
                           void *work) {
    (void)work;
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)grads[i] * grads[i];
    // One norm over all gradients: clipping scales them together and keeps their direction.
    AdamWStep a = adamw_schedule(&h, state->step);
    adamw_begin(&a, &h, state, sqrt(squares), state->loss_sum * loss_scale);
    state->loss_sum = 0;  // the ring has it by now
    if (!a.finite) return;
    for (size_t i = 0; i < n; i++) {
        adamw_update(&a, i < n_decay, &params[i], grads[i], &m[i], &v[i], ema ? &ema[i] : NULL);
        grads[i] = 0;  // for the next step's layers to add to
    }
    state->step++;
    CPU_DONE("optimize", 0, (ema ? 40.0 : 32.0) * (double)n);  // g, p, m, v and ema twice
}

// ---- Memory, and the table

// Linux grants memory that it does not have and kills the program later: so ask what there is.
size_t cpu_available(void) {
    unsigned long long kilobytes = 0;
    FILE *f = fopen("/proc/meminfo", "r");
    char line[256];
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
    if (f) fclose(f);
    return kilobytes ? (size_t)kilobytes * 1024 : SIZE_MAX;  // elsewhere malloc has the word
}
void *cpu_alloc(size_t bytes) { return malloc(bytes); }
void cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
void cpu_copy(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
// An act is a real here: the moves of activations are plain copies.
void cpu_write_acts(act *dst, const real *src, size_t n) { memcpy(dst, src, n * sizeof *src); }
void cpu_read_acts(real *dst, const act *src, size_t n) { memcpy(dst, src, n * sizeof *dst); }
const char *cpu_error(void) { return NULL; }
static size_t plain_work_bytes(size_t N, int K, int width, size_t n) {
    return (void)N, (void)K, (void)width, (void)n, 8;  // nothing but what malloc can give
}

// Left NULL: pass_rows (all rows at a time), sync_params (there is no copy of the parameters), the
// side stream and the capture of a graph (nothing is launched).
const Backend plain_backend = {
    .name = "plain",
    .idea = "the obvious loops in C, float32: the definition",
    .act_bytes = sizeof(real),
    CPU_MEMORY,
    .work_bytes = plain_work_bytes,
    .embed_forward = plain_embed_forward,
    .embed_backward = plain_embed_backward,
    .norm_forward = plain_norm_forward,
    .norm_backward = plain_norm_backward,
    .conv_forward = plain_conv_forward,
    .conv_backward_input = plain_conv_backward_input,
    .conv_backward_weight = plain_conv_backward_weight,
    .attention = {plain_turn_forward, plain_turn_backward, plain_attention_forward,
                  plain_attention_backward, plain_attention_work},  // mixers/attn.c
    .inputs = PLAIN_INPUTS,                                               // mixers/inputs.c
    .dropout_backward = plain_dropout_backward,
    .cross_entropy = plain_cross_entropy,
    .add_losses = plain_add_losses,
    .draw_batch = plain_draw_batch,
    .optimize = plain_optimize,
};
