// cpu.c: the CPU's second rung, the backend `cpu`: what layers.c defines, with tiles that stay in
// registers, packed weights, vectors and threads. The first rung is layers.c; read that first.
//
// Every loop that threads share runs over outputs that one thread computes alone, in an order that
// does not depend on how many threads there are: 1, 2 or 5 threads give the same bits.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "fast/layers.h"
#include "support/arithmetic.h"

enum { ROW_BLOCK = 64 };  // rows per partial sum of a column reduction; part of the result's bits

static size_t blocks_of(size_t N) { return (N + ROW_BLOCK - 1) / ROW_BLOCK; }

// sum[c] += the partial sums part[blk*stride + c], in the order of the blocks.
// Threads share the columns, not the blocks: each sum keeps its order.
static void add_partials(real *sum, const real *part, size_t blocks, size_t stride, int C) {
#pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c++)
        for (size_t blk = 0; blk < blocks; blk++) sum[c] += part[blk * stride + (size_t)c];
}

// ---- Activations and dropout

enum { PIECE = 256, CALLS = 16 };  // values at a time; Philox calls side by side in vectors

// Stores `mark` where dropout takes a value of pre, channels 0..O-1 of row `row` of the batch.
static void drop_row(real *pre, const Dropout *d, real mark, uint64_t row, int O) {
    uint32_t step = d->state->step;
    for (int o0 = 0; o0 < O; o0 += 8 * CALLS) {
        uint32_t words[2][CALLS], draws[8 * CALLS];
        // Draws past O decide about nothing: a fixed count lets compilers make vectors of them.
        for (int i = 0; i < CALLS; i++) {
            // 8 of the 16 numbers; the other 8 are drawn again when row ^ 8 has its turn.
            Philox r = dropout_draw(d->seed, d->purpose, step, row, o0 + 8 * i, O);
            for (int w = 0; w < 2; w++) words[w][i] = dropout_bits(r, row, w);
        }
        for (int i = 0; i < CALLS; i++)
            for (int j = 0; j < 8; j++) draws[8 * i + j] = words[j / 4][i] >> 8 * (j % 4) & 0xFF;
        int n = O - o0 < 8 * CALLS ? O - o0 : 8 * CALLS;
        for (int j = 0; j < n; j++) pre[o0 + j] = draws[j] < d->threshold ? mark : pre[o0 + j];
    }
}

// One loop for each activation: the question which it is stays outside, and compilers make vectors.
#define VALUE_LOOP(name) \
    case ACT_##name:     \
        for (int j = 0; j < n; j++) a[j] = scale * name##_value(pre[j]); \
        break;
#define SLOPE_LOOP(name) \
    case ACT_##name:     \
        for (int j = 0; j < n; j++) pre[j] = dout[j] * (scale * name##_slope(pre[j])); \
        break;

// a = scale * f(pre), n values
static void value_row(Activation f, real *a, const real *pre, real scale, int n) {
    switch (f) { ACTIVATIONS(VALUE_LOOP) default: break; }
}

// (0 + -0 is 0: no -0 comes out.)
void act_row(Activation f, real *out, const real *pre, const real *res, real scale, int n) {
    // a stands apart: out may be pre or res, and a loop that may write what it reads makes no
    // vectors.
    real a[PIECE];
    for (int j0 = 0; j0 < n; j0 += PIECE) {
        int m = n - j0 < PIECE ? n - j0 : PIECE;
        value_row(f, a, pre + j0, scale, m);
        for (int j = 0; j < m; j++) out[j0 + j] = (res ? res[j0 + j] : 0) + a[j];
    }
}

// forward:  a = scale * f(pre)          dpre = dout * scale * f'(pre), in the place of pre
// a once more where it is not NULL.
static void act_row_backward(Activation f, real *pre, real *a, const real *dout, real scale,
                             int n) {
    if (a) value_row(f, a, pre, scale, n);  // first: what follows overwrites pre
    switch (f) { ACTIVATIONS(SLOPE_LOOP) default: break; }
}

// ---- LayerNorm

// Blocks of rows share the work. What they have in common, dgain and dbias, each sums for itself;
// add_partials joins them.
static void cpu_norm_backward(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                              const real *gain, const real *bias, Epilogue e, size_t N, int C,
                              void *work) {
    size_t blocks = blocks_of(N), stride = 2 * (size_t)C;
    real *part = work;  // (blocks, 2, C): gain, bias
#pragma omp parallel for schedule(static)
    for (size_t blk = 0; blk < blocks; blk++) {
        real *pg = part + blk * stride, *pb = pg + C;
        memset(pg, 0, stride * sizeof *pg);
        for (size_t n = blk * ROW_BLOCK; n < N && n < (blk + 1) * ROW_BLOCK; n++) {
            const real *x_n = (const real *)x + n * C;
            real *dx_n = (real *)e.dx + n * C;
            norm_row_backward(dx_n, pg, pb, (const real *)dout + n * C, x_n, gain, C, e.accumulate);
            // Only now: again may be x, dx has been made from it.
            if (again) norm_row((real *)again + n * C, x_n, gain, bias, C);
            // forward, below:  x = res + scale * f(pre)
            if (e.pre)
                act_row_backward(e.activation, (real *)e.pre + n * C, NULL, dx_n, e.drop.scale, C);
        }
    }
    add_partials(dgain, part, blocks, stride, C);
    add_partials(dbias, part + C, blocks, stride, C);
    CPU_DONE("norm_backward", 0, norm_arrays(again, e) * array_bytes(sizeof(real), N, C));
}

// ---- Embedding and its LayerNorm
//
// LayerNorm works on one row at a time, so normalising the V rows of the table and looking them up
// equals looking them up and normalising N rows. Row BYTE_DROPPED of the normalised table is what
// LayerNorm makes of a row of zeros: its bias.

static void cpu_embed_forward(act *x, const int *ids, const real *table, const real *gain,
                              const real *bias, size_t N, int C, void *work) {
    real *rows = work;  // (V+1, C)
    for (int v = 0; v < V; v++)
        norm_row(rows + (size_t)v * C, table + (size_t)v * C, gain, bias, C);
    memcpy(rows + (size_t)BYTE_DROPPED * C, bias, (size_t)C * sizeof *bias);
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++)
        memcpy((real *)x + n * C, rows + (size_t)ids[n] * C, (size_t)C * sizeof *rows);
    CPU_DONE("embed_forward", 0, array_bytes(sizeof(real), N, C) + 4.0 * (double)N);
}

static void cpu_embed_backward(real *dtable, real *dgain, real *dbias, const act *dx,
                               const int *ids, const real *table, const real *gain, size_t N,
                               int C, void *work) {
    enum { COLUMNS = 16 };  // each thread owns whole columns and walks the rows in order
    // drows (V+1,C): the gradient of each row of the normalised table; then one row (C) of dtable.
    real *drows = work, *dtable_row = drows + (size_t)(V + 1) * C;
    memset(drows, 0, (size_t)(V + 1) * C * sizeof *drows);
    // forward:  x[n] = rows[ids[n]]
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += COLUMNS)
        for (size_t n = 0; n < N; n++) {
            real *d = drows + (size_t)ids[n] * C;
            for (int c = c0; c < C && c < c0 + COLUMNS; c++) d[c] += ((const real *)dx)[n * C + c];
        }
    // forward:  rows[v] = norm(table[v]);  rows[BYTE_DROPPED] = bias
    for (int v = 0; v < V; v++) {
        // Written into a row of its own and then added: += is the contract for parameters.
        norm_row_backward(dtable_row, dgain, dbias, drows + (size_t)v * C, table + (size_t)v * C,
                          gain, C, false);
        for (int c = 0; c < C; c++) dtable[(size_t)v * C + c] += dtable_row[c];
    }
    for (int c = 0; c < C; c++) dbias[c] += drows[(size_t)BYTE_DROPPED * C + c];
    CPU_DONE("embed_backward", 0, array_bytes(sizeof(real), N, C) + 4.0 * (double)N);
}

// ---- AdamW

// The sum of squares of x (n) in double: blocks of fixed size, eight running sums in each.
static double sum_squares(const real *x, size_t n, double *part) {
    enum { BLOCK = 4096 };
    size_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (size_t blk = 0; blk < blocks; blk++) {
        // Eight, because one sum would be a chain of additions, each waiting for the last.
        double sum[8] = {0};
        size_t end = n < (blk + 1) * BLOCK ? n : (blk + 1) * BLOCK;
        for (size_t i = blk * BLOCK; i < end; i++) sum[i % 8] += (double)x[i] * x[i];
        part[blk] = 0;
        for (int j = 0; j < 8; j++) part[blk] += sum[j];
    }
    double total = 0;
    for (size_t blk = 0; blk < blocks; blk++) total += part[blk];
    return total;
}

static void cpu_optimize(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                         size_t n_decay, StepState *state, double loss_scale, Hyper h,
                         void *work) {
    // One norm over all gradients: clipping scales them together and keeps their direction.
    double norm = sqrt(sum_squares(grads, n, work));
    AdamWStep a = adamw_schedule(&h, state->step);
    adamw_begin(&a, &h, state, norm, state->loss_sum * loss_scale);
    // adamw_begin has put loss and norm into the ring, so the host can say what was not finite.
    state->loss_sum = 0;
    if (!a.finite) return;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        adamw_update(&a, i < n_decay, &params[i], grads[i], &m[i], &v[i], ema ? &ema[i] : NULL);
        grads[i] = 0;  // for the next step: a pass over them less than at its beginning
    }
    state->step++;
    CPU_DONE("optimize", 0, (ema ? 40.0 : 32.0) * (double)n);  // g, p, m, v and ema twice
}

// ---- Convolution
//
// One tile of outputs makes all three products: ROWS x COLS sums that stay in registers. Per c it
// loads COLS/16 vectors of weights and ROWS scalars of x for ROWS*COLS multiply-adds. AVX-512 has
// 32 vector registers, of which 16 or 24 accumulate; AVX2 has 16, of which 12 do. The geometry
// sets the speed and never the bits: an output is ONE chain of multiply-adds, over k, then c.
enum {
    ROWS = TILE_ROWS, COLS = TILE_COLS,
    WIDE = 4 * COLS,         // columns of a lone row: 8 vectors, so that no sum waits for itself
    TILES = 8,               // tiles of rows that share a panel of weights while L2 holds it
    CHUNK = TILES * ROWS,    // rows, or channels of dw, that a thread takes at a time
    SHARE = 4 * COLS,        // columns of dw that it takes with them, at most
    SPAN = 128,              // rows of dy that backward_weight keeps in L1: SPAN*COLS*4 = 16 KB
};

// noinline: merged into a caller that knows K, gcc 12 takes acc out of the registers.
// step: from one term to the next, 1 along a row of x, C along time.
__attribute__((noinline)) void multiply_tile(real out[ROWS][COLS], const real *const *x,
                                             size_t step, const real *w, size_t stride, int K,
                                             int depth) {
    // x moves on by ROWS pointers per tap, w by one row per tap and channel. The loop over r must
    // be unrolled whole (ROWS <= 16): registers cannot be indexed by a variable.
    real acc[ROWS][COLS];  // a local array: nothing else can point at it
    memcpy(acc, out, sizeof acc);
    for (int k = 0; k < K; k++, x += ROWS)
        for (int c = 0; c < depth; c++, w += stride)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma omp simd
                for (int j = 0; j < COLS; j++)
                    acc[r][j] = muladd(x[r][(size_t)c * step], w[j], acc[r][j]);
    memcpy(out, acc, sizeof acc);
}

// The same sums for a lone row. Every weight is used once: the time is that of reading them.
static __attribute__((noinline)) void wide_row(real *out, const real *const *x, const real *w,
                                               size_t stride, int K, int C) {
    real acc[WIDE];
    memcpy(acc, out, sizeof acc);
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++, w += stride)
#pragma omp simd
            for (int j = 0; j < WIDE; j++) acc[j] = muladd(x[k][c], w[j], acc[j]);
    memcpy(out, acc, sizeof acc);
}

static int at_most(int a, int b) { return a < b ? a : b; }
static size_t groups(size_t n, size_t size) { return (n + size - 1) / size; }

// One row of a tile in or out; the usual, full one becomes two vector moves. (Of a memcpy of either
// size gcc 12 makes one call.)
static inline void copy_row(real *to, const real *from, int n) {
    if (n == COLS)
        memcpy(to, from, COLS * sizeof *to);
    else
        for (int j = 0; j < n; j++) to[j] = from[j];
}

void conv_rows(real *const *out, const real *const *rows, int n, const real *w, const real *b,
               int K, int C, int O) {
    for (int j = 0; j < n; j++)
        for (int o = 0; o < O; o++) out[j][o] = b ? b[o] : 0;
    // WIDE columns while there is one row alone, then tiles, then what is left. Each continues the
    // chain that b begins, so which of them makes an output does not show in its bits.
    int o0 = 0;
    for (; n == 1 && O - o0 >= WIDE; o0 += WIDE)
        wide_row(out[0] + o0, rows, w + o0, (size_t)O, K, C);
    for (; O - o0 >= COLS; o0 += COLS)
        for (int j0 = 0; j0 < n; j0 += ROWS) {
            const real *from[ROWS * MAX_TAPS];
            real y[ROWS][COLS];
            for (int r = 0; r < ROWS; r++) {
                int j = at_most(j0 + r, n - 1);  // a row too many repeats the last
                memcpy(y[r], out[j] + o0, sizeof y[r]);
                for (int k = 0; k < K; k++) from[k * ROWS + r] = rows[k * n + j];
            }
            multiply_tile(y, from, 1, w + o0, (size_t)O, K, C);
            for (int r = 0; r < ROWS && j0 + r < n; r++)
                memcpy(out[j0 + r] + o0, y[r], sizeof y[r]);
        }
    for (int j = 0; j < n; j++)  // columns that fill no tile: the same chains
        for (int k = 0; k < K; k++)
            for (int c = 0; c < C; c++)
                for (int o = o0; o < O; o++)
                    out[j][o] = muladd(rows[k * n + j][c], w[((size_t)k * C + c) * O + o],
                                       out[j][o]);
}

// What lies before and after the text: a row of zeros, as wide as config_check allows.
static const real zeros[MAX_CHANNELS];

// Weights as panels of COLS columns, zeros where the last is not full: panels (width/COLS, K,
// depth, COLS), from w[k*depth*width + d*d_stride + j*j_stride]. Copied once per call, every tile
// then reads its weights as one stream; in place each line would lie in another page.
static void pack(real *panels, const real *w, int K, int depth, int width, size_t d_stride,
                 size_t j_stride) {
#pragma omp parallel for schedule(static)
    for (int j0 = 0; j0 < width; j0 += COLS) {
        int cols = at_most(COLS, width - j0);
        real *to = panels + (size_t)j0 * K * depth;
        for (int k = 0; k < K; k++)
            for (int d = 0; d < depth; d++, to += COLS) {
                const real *from = w + (size_t)k * depth * width + (size_t)d * d_stride;
                for (int j = 0; j < COLS; j++)
                    to[j] = j < cols ? from[(size_t)(j0 + j) * j_stride] : 0;
            }
    }
}

// Values, the last panel's zeros included.
static size_t panels_size(int K, int depth, int width) {
    return (size_t)K * depth * groups((size_t)width, COLS) * COLS;
}

// Where each row of each tile from row n0 on reads tap k: from[i][k*ROWS + r]. The address of a
// row outside the text is never formed. Returns the number of tiles.
static int point_at_rows(const real *from[TILES][ROWS * MAX_TAPS], const real *in, size_t n0,
                         size_t N, int T, int K, int shift, int depth) {
    int n = N - n0 < CHUNK ? (int)(N - n0) : CHUNK, tiles = (int)groups((size_t)n, ROWS);
    for (int i = 0; i < tiles * ROWS; i++) {
        size_t row = n0 + (size_t)i;
        int64_t t = (int64_t)(row % (size_t)T);
        for (int k = 0; k < K; k++) {
            int64_t at = t + (int64_t)k * shift;
            bool inside = row < N && at >= 0 && at < T;
            const real **p = &from[i / ROWS][k * ROWS + i % ROWS];
            // row - t is the window's first row. Added before t is taken off: nothing goes below 0.
            *p = inside ? in + (row + (size_t)at - (size_t)t) * (size_t)depth : zeros;
        }
    }
    return tiles;
}

// Rows n0 .. n0+CHUNK-1 (fewer at the end, N) of
//   out[t,j] = start[j] + sum_k sum_d panels[k,d,j] * in[t + k*shift, d]     zero outside 0..T-1
// `in` and `start` point at row 0 and column 0, `out` at row n0.
static void conv_chunk(real *out, const real *in, const real *start, const real *panels, size_t n0,
                       size_t N, int T, int K, int depth, int width, int shift) {
    const real *from[TILES][ROWS * MAX_TAPS];
    int tiles = point_at_rows(from, in, n0, N, T, K, shift, depth);
    for (int j0 = 0; j0 < width; j0 += COLS) {
        int cols = at_most(COLS, width - j0);
        real y[ROWS][COLS], first[COLS] = {0};
        if (start) copy_row(first, start + j0, cols);
        for (int i = 0; i < tiles; i++) {
            for (int r = 0; r < ROWS; r++) memcpy(y[r], first, sizeof first);
            multiply_tile(y, from[i], 1, panels + (size_t)j0 * K * depth, COLS, K, depth);
            for (int r = 0; r < ROWS && n0 + (size_t)(i * ROWS + r) < N; r++)
                copy_row(out + (size_t)(i * ROWS + r) * width + j0, y[r], cols);
        }
    }
}

// Without OpenMP the pragmas are ignored and one thread does everything.
static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static void cpu_conv_forward(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                             void *work) {
    size_t N = (size_t)s.B * s.T, O = (size_t)s.O;
    bool drop = e.drop.threshold != 0;
    // A linear map's sums go where they are wanted. Else they go through pre or, where nobody keeps
    // that, through a chunk of the thread's own.
    bool linear = !e.pre && e.activation == ACT_none && !e.residual && !drop;
    real *panels = work, *chunks = panels + panels_size(s.K, s.C, s.O);
    real *sums = linear ? e.out : e.pre, mark = act_dropped(e.activation);
    // A panel's columns are outputs, its depth the inputs: w (K,C,O) as it lies.
    pack(panels, w, s.K, s.C, s.O, O, 1);
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += CHUNK) {
        real *p = sums ? sums + n0 * O : chunks + (size_t)thread_number() * CHUNK * O;
        int n = N - n0 < CHUNK ? (int)(N - n0) : CHUNK;
        // The activation follows chunk by chunk, while the sums are in cache.
        conv_chunk(p, x, b, panels, n0, N, s.T, s.K, s.C, s.O, -s.dil);
        for (int i = 0; i < n && drop; i++)
            drop_row(p + (size_t)i * O, &e.drop, mark, e.drop.first + n0 + (uint64_t)i, s.O);
        if (e.out && !linear)
            act_row(e.activation, (real *)e.out + n0 * O, p,
                    e.residual ? (const real *)e.residual + n0 * O : NULL,
                    drop ? e.drop.scale : 1, n * s.O);
    }
    CPU_DONE("conv_forward", conv_flops(s), conv_bytes(s, sizeof(real), 1, forward_arrays(e)));
}

// forward:  sum[t,o] += w[k,c,o] x[t - k*dil, c]       so  dx[s,c] += w[k,c,o] dy[s + k*dil, o]:
// a conv that looks ahead, with every tap's matrix transposed.
static void cpu_conv_backward_input(const act *dy, const real *w, Epilogue e, ConvShape s,
                                    void *work) {
    size_t N = (size_t)s.B * s.T, C = (size_t)s.C;
    real *panels = work, *chunks = panels + panels_size(s.K, s.O, s.C);
    // A panel's columns are inputs, its depth the outputs: each tap's (C,O), transposed.
    pack(panels, w, s.K, s.O, s.C, 1, (size_t)s.O);
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += CHUNK) {
        // Kept aside, because dpre needs the complete dx even where nobody keeps that.
        real *g = chunks + (size_t)thread_number() * CHUNK * C;
        real *d = e.dx ? (real *)e.dx + n0 * C : NULL;
        // n: values, not rows.
        size_t n = (N - n0 < CHUNK ? N - n0 : CHUNK) * C;
        conv_chunk(g, dy, NULL, panels, n0, N, s.T, s.K, s.O, s.C, +s.dil);
        for (size_t i = 0; i < n && e.accumulate; i++) g[i] += d[i];
        if (d) memcpy(d, g, n * sizeof *d);
        // forward, below:  x = [res +] scale * f(pre)
        if (e.pre)
            act_row_backward(e.activation, (real *)e.pre + n0 * C,
                             e.out ? (real *)e.out + n0 * C : NULL, g, e.drop.scale, (int)n);
    }
    CPU_DONE("conv_backward_input", conv_flops(s),
             conv_bytes(s, sizeof(real), backward_arrays(e), 1));
}

// forward:  sum[t,o] += w[k,c,o] x[t - k*dil, c],  sum[t,o] += b[o]
// The same tile, whose rows are channels and whose sum runs over time: row r is channel c0+r, one
// step in time is C values on. A block of CHUNK channels and up to SHARE columns, with all taps, is
// one thread's, for the whole batch, in the order of n.
//
// What a span of 128 rows costs a block of 64 x 128, K = 3, with AVX-512:
//   196,608 multiply-adds of 16 values, as many cycles; 10 loads to every 16 of them: these bind
//   x and dy from memory        96 KB, 0.5 bytes a cycle; asked for one span ahead
//   dy copied into panels       64 KB; blocks of one tap would copy it K times
//   x from L2                  768 KB, 4 bytes a cycle: a line per t and tile
//   dw read and written back   192 KB, 1 byte a cycle, between tiles

// Columns 0..cols-1 of `span` rows of dy as a dense panel: all channels and taps read it from L1.
// db += the sum of these rows, where it is not NULL.
static void dy_panel(real panel[SPAN][COLS], real *db, const real *dy, int span, int cols, int O) {
    if (cols < COLS) memset(panel, 0, SPAN * sizeof *panel);  // columns past O count as 0
    for (int t = 0; t < span; t++) copy_row(panel[t], dy + (size_t)t * O, cols);
    if (!db) return;
    real sum[COLS] = {0};
    copy_row(sum, db, cols);
    // forward:  sum[t,o] += b[o]
    for (int t = 0; t < span; t++)
#pragma omp simd
        for (int j = 0; j < COLS; j++) sum[j] += panel[t][j];
    copy_row(db, sum, cols);
}

// dw[r*O + j] += sum_t x[t*C + r] panel[t*COLS + j], r below `rows`, j below `cols`.
static void weight_tile(real *dw, const real *x, const real *panel, const ConvShape *s, int span,
                        int rows, int cols) {
    // dw itself is the running sum: read, continued by this span, written back.
    real sums[ROWS][COLS] = {{0}};
    const real *from[ROWS];
    // A channel too many repeats the last one of x; its sums are not written.
    for (int r = 0; r < ROWS; r++) from[r] = x + at_most(r, rows - 1);
    for (int r = 0; r < rows; r++) copy_row(sums[r], dw + (size_t)r * s->O, cols);
    multiply_tile(sums, from, (size_t)s->C, panel, COLS, 1, span);
    for (int r = 0; r < rows; r++) copy_row(dw + (size_t)r * s->O, sums[r], cols);
}

// Asks for n values to be brought into L2.
static inline void prefetch(const real *p, int n) {
    for (int i = 0; i < n; i += 64 / (int)sizeof *p) __builtin_prefetch(p + i, 0, 2);
}

static void weight_block(const WeightJob *job, const ConvShape *s, int c_begin, int o_begin,
                         int width) {
    _Alignas(64) real panel[SPAN][COLS];
    size_t N = (size_t)s->B * s->T, C = (size_t)s->C, O = (size_t)s->O;
    int channels = at_most(CHUNK, s->C - c_begin), o_end = at_most(o_begin + width, s->O);
    size_t tiles = s->K * groups((size_t)channels, ROWS) * groups((size_t)(o_end - o_begin), COLS);
    const real *x = (const real *)job->x + c_begin, *dy = job->dy;
    real *db = c_begin == 0 ? job->db : NULL;  // one block of a column sums the bias
    for (int n = 0; n < s->B; n++)
        for (int t0 = 0; t0 < s->T; t0 += SPAN) {
            int span = at_most(SPAN, s->T - t0);
            size_t row = (size_t)n * s->T + (size_t)t0, ahead = row + (size_t)span, done = 0;
            for (int o0 = o_begin; o0 < o_end; o0 += COLS) {
                int cols = at_most(COLS, o_end - o0);
                dy_panel(panel, db ? db + o0 : NULL, dy + row * O + o0, span, cols, s->O);
                for (int k = 0; k < s->K; k++) {
                    // Before t = k*dil tap k reads before the text: its span begins `skip` later.
                    int64_t reach = (int64_t)k * job->dil, skip = reach > t0 ? reach - t0 : 0;
                    if (skip >= span) break;
                    // x_k: x[n, t0 + skip - k*dil, c_begin]
                    const real *x_k = x + (row + (size_t)skip - (size_t)reach) * C;
                    real *dw_k = job->dw + ((size_t)k * C + (size_t)c_begin) * O + o0;
                    for (int c = 0; c < channels; c += ROWS) {
                        // The tiles of this span ask, each for its part, for the rows of the next.
                        size_t end = row + (size_t)span + SPAN * ++done / tiles;
                        for (; ahead < end && ahead < N; ahead++) {
                            prefetch(x + ahead * C, channels);
                            prefetch(dy + ahead * O + o_begin, o_end - o_begin);
                        }
                        weight_tile(dw_k + (size_t)c * O, x_k + c, panel[skip], s, span - (int)skip,
                                    at_most(ROWS, channels - c), cols);
                    }
                }
            }
        }
}

static void cpu_conv_backward_weight(const WeightJob *jobs, int n, ConvShape s, void *work) {
    // Job, channels and columns name a block of dw: no two threads write the same value. Blocks are
    // halved until there are four for each thread; no bit depends on it.
    (void)work;
    int width = SHARE;
    size_t rows = (size_t)n * groups((size_t)s.C, CHUNK), enough = 4 * (size_t)thread_count();
    while (width > COLS && rows * groups((size_t)s.O, (size_t)width) < enough) width /= 2;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int i = 0; i < n; i++)
        for (int c0 = 0; c0 < s.C; c0 += CHUNK)
            for (int o0 = 0; o0 < s.O; o0 += width) weight_block(&jobs[i], &s, c0, o0, width);
    CPU_DONE("conv_backward_weight", n * conv_flops(s),
             n * (conv_bytes(s, sizeof(real), 1, 1) + (double)sizeof(real) * s.K * s.C * s.O));
}

// ---- Time by operation

bool cpu_tracing;
static struct {
    KernelTime *rows;
    int n;
    double last;  // when the operation before ended
} trace;

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cpu_note(const char *name, double flops, double bytes) {
    double now = seconds_now();
    int i = 0;
    while (i < trace.n && strcmp(trace.rows[i].name, name) != 0) i++;
    if (i == MOST_KERNEL_TIMES) return;
    if (i == trace.n) trace.rows[trace.n++] = (KernelTime){.name = name};
    trace.rows[i].launches++;
    trace.rows[i].seconds += now - trace.last;
    trace.rows[i].flops += flops;
    trace.rows[i].bytes += bytes;
    trace.last = seconds_now();
}

int cpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n) {
    trace.rows = rows;
    trace.n = n;
    trace.last = seconds_now();
    cpu_tracing = true;
    f(arg);
    cpu_tracing = false;
    return trace.n;
}

// ---- The table

static size_t cpu_work_bytes(size_t N, int K, int width, size_t n) {
    // Layers run one after another and share: the most that one of them takes. In values: a conv's
    // panels and a chunk of dx per thread; LayerNorm's partial sums; the embedding's rows.
    size_t w = (size_t)width;
    size_t conv = panels_size(K, width, width) + (size_t)thread_count() * CHUNK * w;
    size_t norm = blocks_of(N) * 2 * w, embed = (V + 2) * w;
    size_t most = conv > norm ? conv : norm;
    if (embed > most) most = embed;
    most *= sizeof(real);
    // In bytes: sum_squares' blocks, 4096 values each.
    size_t optimizer = (n / 4096 + 1) * sizeof(double);
    return most > optimizer ? most : optimizer;
}

const Backend cpu_backend = {
    // Left NULL: as in plain_backend.
    .name = "cpu",
    .idea = "tiles in registers, vectors and threads, float32",
    .act_bytes = sizeof(real),
    CPU_MEMORY,
    .work_bytes = cpu_work_bytes,
    .embed_forward = cpu_embed_forward,
    .embed_backward = cpu_embed_backward,
    .norm_forward = plain_norm_forward,
    .norm_backward = cpu_norm_backward,
    .conv_forward = cpu_conv_forward,
    .conv_backward_input = cpu_conv_backward_input,
    .conv_backward_weight = cpu_conv_backward_weight,
    .attention = {plain_turn_forward, plain_turn_backward, cpu_attention_forward,
                  cpu_attention_backward, cpu_attention_work},  // fast/attention.c
    .inputs = PLAIN_INPUTS,
    .dropout_backward = plain_dropout_backward,
    .cross_entropy = plain_cross_entropy,
    .add_losses = plain_add_losses,
    .draw_batch = plain_draw_batch,
    .optimize = cpu_optimize,
};
