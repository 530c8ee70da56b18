// conv_tensor.cu: the causal dilated convolution on tensor cores. bf16 operands, float32 sums.
//
// Two more rungs of the ladder that conv_kernels.cu begins (read that first, for the three products
// and how a tap is only another row address; then kernels.h for bf16 and its weights):
//   mma     sm_80 and up: any B, T, K, dil
//   wgmma   Hopper (sm_90a): K <= 3, (K-1)*dil <= 192, and shared memory for the weights and three
//           stages: C = 256, K = 3 up to dil 56
// Both want C and O in multiples of 8 and pointers in multiples of 16 bytes. Nothing is refused:
// what a rung does not take it hands down, wgmma to mma, mma to conv_kernels.cu's block. Needs CUDA
// 12 to build. The rungs are the last table of this file:
//   make check-kernels            # every rung against the CPU, then timed, side by side
//
// Measured on an H100 80GB HBM3, 2026-11-22 (./bench --only ladder --batch B --seq T: many calls in
// a row, the median); C = O = 256, K = 3, dil = 4. Microseconds, then TFLOP/s; two runs differed by
// up to 3 %, at 1x128 by up to 8 %.
//   B x T                      1x128 1x1024    16x512    16x1024     32x1024     64x2048
//   wgmma forward, bias, GELU    2.4    3.8  7.5 (427) 12.0 (535)  23.3 (554)  85.4 (604)
//     to the input, gelu'        2.5    3.7  8.6 (373) 13.9 (462)  27.6 (467) 104.4 (494)
//     to the weights, one layer  3.9    7.1   17 (192)   29 (221)  31.8 (406)  77.5 (665)
//   mma, forward                20.5   21.4   28 (113)   63 (103)   104 (124)   380 (136)
// For comparison: block in float32 takes 336 us for the forward of 32x1024; cuBLAS reaches 720 to
// 796 TFLOP/s on 8192^3 in bf16, and 389 and 493 on the bare products of 32x1024 and 64x2048. (A
// step makes the weight gradients of six layers at a time; one alone gets narrow tiles up to
// 16x1024.)
#include "kernels.h"

#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#if CUDART_VERSION < 12000
#error "conv_tensor.cu needs CUDA 12 or newer: it is the first that knows tensor maps and wgmma"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for sm_90a, not sm_90 (make ARCH=90 does): the matrix instructions need the a"
#endif

// What the architecture being compiled has. (In the host's pass: all, for its checks of syntax.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAVE_MMA 1
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAVE_WGMMA 1
#endif

// Arrays handed to these functions stay in registers only if the functions are inlined.
#define INLINE static __device__ __forceinline__

// ---- What becomes of the sums, on both rungs
//
// Eight channels of two rows that lie 8 apart at a time, which is where both rungs' matrix
// instructions leave them: 16 bytes of bf16 each, and one draw of dropout for both.

// (Elsewhere called the epilogue.)
//   forward:   pre = sums + bias, or DROPPED      out = side + scale * gelu(pre)     side: res
//   backward:  dx = sums, or dx + sums            out = scale * gelu(side)           side: pre
//              pre = dx * scale * gelu'(side)
typedef struct {
    bf16 *pre;          // forward: written      backward: becomes its own gradient, or NULL
    bf16 *out;          // forward: or NULL      backward: what the contract calls a, or NULL
    bf16 *dx;           // backward; or NULL
    const bf16 *side;   // read beside the sums. forward: the residual;  backward: pre, or without
                        // it the dx to add to;  NULL: nothing
    const float *bias;  // forward; or NULL
    Dropout drop;       // forward: threshold 0 and scale 1 where nothing is dropped
                        // backward: the scale alone
    bool accumulate;    // backward: dx += sums
} ConvEnd;

static ConvEnd forward_end(act *out, act *pre, const real *b, const act *res, Dropout drop) {
    if (!out) res = NULL, drop.threshold = 0;
    if (drop.threshold == 0) drop.scale = 1;
    ConvEnd e = {(bf16 *)pre, (bf16 *)out, NULL, (const bf16 *)res, b, drop, false};
    return e;
}
static ConvEnd backward_end(act *dx, act *pre, act *a, float scale, bool accumulate) {
    Dropout drop = Dropout();
    drop.scale = scale;
    const act *side = pre ? pre : accumulate ? dx : NULL;
    ConvEnd e = {(bf16 *)pre, (bf16 *)a, (bf16 *)dx, (const bf16 *)side, NULL, drop, accumulate};
    return e;
}

// A launch's bytes: x (or dy), the weights in bf16, and what the end moves. Backward side is pre,
// changed in place, or the dx that is added to.
static double forward_bytes(const ConvEnd &e, ConvShape s) {
    return conv_bytes(s, sizeof(bf16), 1, 1 + (e.out != NULL) + (e.side != NULL));
}
static double backward_bytes(const ConvEnd &e, ConvShape s) {
    int arrays = 2 * (e.pre != NULL) + (e.out != NULL) + (e.dx != NULL) + e.accumulate;
    return conv_bytes(s, sizeof(bf16), arrays, 1);
}

#ifdef HAVE_MMA
INLINE uint32_t pack(float lo, float hi) {  // rounded to nearest, ties to even
    __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
    return *(uint32_t *)&p;
}
// A bf16 is the upper half of a float32: to widen it takes a shift or a mask, no conversion.
INLINE float low(uint32_t w) { return __uint_as_float(w << 16); }
INLINE float high(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
INLINE void unpack8(uint4 v, float f[8]) {
    f[0] = low(v.x), f[1] = high(v.x), f[2] = low(v.y), f[3] = high(v.y);
    f[4] = low(v.z), f[5] = high(v.z), f[6] = low(v.w), f[7] = high(v.w);
}
INLINE uint4 pack8(const float f[8]) {
    return make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
}

// Which values dropout keeps of the two rows that share draws with row `row` of the step's batch,
// the lower one first, in GROUPS groups of 8 channels, of which the first begins at `col` and each
// 32 after the one before: channel 4w + j of group g is kept if bit 8j + 2g + w is set.
template <int GROUPS>
INLINE void draw_kept(uint32_t kept[2], const Dropout *d, uint32_t step, uint64_t row, int col,
                      int width) {
    static_assert(GROUPS <= 4, "a byte of kept has two bits a group");
    const uint32_t thresholds = d->threshold * 0x01010101u;  // one in each byte
    kept[0] = kept[1] = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        Philox r = dropout_draw(d->seed, d->purpose, step, row, col + 32 * g, width);
#pragma unroll
        for (int w = 0; w < 4; w++)
            // Compares four bytes at a time, 0xFF where kept; words 0 and 1 are the lower row's.
            kept[w / 2] |= __vcmpgeu4(r.v[w], thresholds) & 0x01010101u << (2 * g + w % 2);
    }
}
// The same of rows `row` and row + 8. These are such a pair where row % 16 < 8: for all of a warp,
// if T is a multiple of 16.
template <int GROUPS>
INLINE void draw_kept_rows(uint32_t kept[2], const Dropout *d, uint32_t step, uint64_t row,
                           int col, int width) {
    draw_kept<GROUPS>(kept, d, step, row, col, width);
    if (row % 16 < 8) return;
    uint32_t next[2];  // row is the upper of its draw, and row + 8 the lower of the next
    draw_kept<GROUPS>(next, d, step, row + 8, col, width);
    kept[0] = kept[1], kept[1] = next[0];
}

// Halves of a word become ones where the byte chosen from `bytes` has its uppermost bit, zeros
// where not: bytes 0 and 1, or 2 and 3.
template <int FIRST>
INLINE uint32_t spread(uint32_t bytes) {
    uint32_t mask;  // 8 + i: the sign of byte i, eight times
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bytes), "n"(FIRST == 0 ? 0x9988 : 0xBBAA));
    return mask;
}
// v, with DROPPED for what is not kept of group g.
INLINE uint4 drop8(uint4 v, uint32_t kept, int g) {
    const uint32_t dropped = (__float_as_uint(DROPPED) >> 16) * 0x10001u;  // bf16, twice
    const uint32_t lo = kept << (7 - 2 * g), hi = kept << (6 - 2 * g);
    const uint32_t keep[4] = {spread<0>(lo), spread<2>(lo), spread<0>(hi), spread<2>(hi)};
    v.x = (v.x & keep[0]) | (dropped & ~keep[0]);
    v.y = (v.y & keep[1]) | (dropped & ~keep[1]);
    v.z = (v.z & keep[2]) | (dropped & ~keep[2]);
    v.w = (v.w & keep[3]) | (dropped & ~keep[3]);
    return v;
}

// From here to finish_backward8: v[h], h = 0, 1, are eight sums each, as bf16, of row r and of row
// r + 8. i: element of v[0]; inside[h]: that row exists; side[h]: what end->side holds there, or
// zeros.
INLINE void store2(bf16 *dst, const uint4 v[2], const bool inside[2], size_t i, int width) {
    // An ordinary store each; written as one nvcc makes some of them four of 4 bytes.
    if (inside[0]) __stwb((uint4 *)(dst + i), v[0]);
    if (inside[1]) __stwb((uint4 *)(dst + i + 8 * (size_t)width), v[1]);
}
INLINE void load2(uint4 v[2], const bf16 *src, const bool inside[2], size_t i, int width) {
    v[0] = v[1] = make_uint4(0, 0, 0, 0);
    if (inside[0]) v[0] = *(const uint4 *)(src + i);
    if (inside[1]) v[1] = *(const uint4 *)(src + i + 8 * (size_t)width);
}

// pre = sum, or DROPPED;  out = res + scale * gelu(pre), of pre as it is stored: what backward will
// read. kept: of draw_kept_rows, whose group g this is.
INLINE void finish_forward8(const ConvEnd *end, uint4 v[2], const uint4 side[2],
                            const uint32_t kept[2], int g, const bool inside[2], size_t i,
                            int width) {
    if (end->drop.threshold != 0)
        for (int h = 0; h < 2; h++) v[h] = drop8(v[h], kept[h], g);
    store2(end->pre, v, inside, i, width);
    if (!end->out) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float y[8], res[8];
        unpack8(v[h], y);
        unpack8(side[h], res);
        for (int j = 0; j < 8; j++) y[j] = res[j] + scaled_gelu(y[j], end->drop.scale);
        v[h] = pack8(y);
    }
    store2(end->out, v, inside, i, width);
}

// forward:  a = scale * gelu(pre)      dpre = da * scale * gelu'(pre), and a once more
// side is pre, and the dx to add to is read only here; or, without pre, side is that dx. All are
// read and written by this thread alone, so dx and pre may change in place without a barrier.
// Bytes a value: 2 for each of dx read, dx, pre read, pre, a that is there.
INLINE void finish_backward8(const ConvEnd *end, uint4 v[2], uint4 side[2], const bool inside[2],
                             size_t i, int width) {
    const bool on = end->pre != NULL;
    uint4 old[2] = {side[0], side[1]};
    if (end->accumulate && on) load2(old, end->dx, inside, i, width);
    uint4 dpre[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float g[8], y[8];
        unpack8(v[h], g);
        if (end->accumulate) {
            unpack8(old[h], y);
            for (int j = 0; j < 8; j++) g[j] += y[j];
            v[h] = pack8(g);
        }
        if (!on) continue;
        unpack8(side[h], y);
        for (int j = 0; j < 8; j++) {
            float slope;
            y[j] = scaled_gelu_and_slope(y[j], end->drop.scale, &slope);
            g[j] *= slope;
        }
        side[h] = pack8(y);
        dpre[h] = pack8(g);
    }
    if (end->dx) store2(end->dx, v, inside, i, width);
    if (on) store2(end->pre, dpre, inside, i, width);
    if (on && end->out) store2(end->out, side, inside, i, width);
}

// The address of p in this block's shared memory, as instructions take it. (volatile, because nvcc
// would otherwise compute it anew in every loop.)
INLINE uint32_t shared_addr(const void *p) {
    uint64_t a;
    asm volatile("cvta.to.shared.u64 %0, %1;" : "=l"(a) : "l"(p));
    return (uint32_t)a;
}
#endif

// What is below these rungs: conv_kernels.cu's rows for bf16, which take everything.
static const Backend *block_rung(void) {
    static Backend b;
    if (!b.conv_forward)
        for (int i = 0; i < n_conv_kernels; i++)
            if (conv_kernels[i].act_bytes == sizeof(bf16)) kernel_install(&b, &conv_kernels[i]);
    return &b;
}

// The GPU, asked once; gpu_open has been called.
static const GpuInfo *gpu(void) {
    static GpuInfo g;
    Error e;
    if (g.sms == 0) gpu_open(&g, &e);
    return &g;
}
// For which architecture the code was written that this GPU runs: 80 where the driver made it from
// PTX for sm_80, whatever the GPU is.
static int compiled_for(const void *kernel) {
    struct cudaFuncAttributes a = {};
    CHECK(cudaFuncGetAttributes(&a, kernel));
    return a.ptxVersion;
}

static bool all_aligned(const ConvEnd *e, const void *x, const void *w) {
    return aligned16(e->pre) && aligned16(e->out) && aligned16(e->dx) && aligned16(e->side) &&
           aligned16(e->bias) && aligned16(x) && aligned16(w);
}

// ---- Rung 4: mma, tensor cores from registers
//
// Bound before: the multiply-adders; 63 TFLOP/s is all that an H100 has of them in float32.
// Idea: a warp multiplies 16 x 16 by 16 x 8 matrices of bf16 in one instruction, mma.sync. Copies
// go from memory into shared memory without passing registers (cp.async), two steps ahead.
// Count: a block of 64 x 64 sums takes 2*64*64*32 = 262,144 operations and 8192 bytes a step, 32
// operations for a byte, so 124 TFLOP/s are 3.9 TB/s out of the L2 cache.
// Cost: operands still pass through registers, loaded again by every warp that needs them.
// Measured, forward, 32768 rows: 104 us, a third of block's 336.
//
// All three products are sum over r of A[m,r] B[r,n], and differ in what lies side by side:
//               m         n    r             A                       B
//   FORWARD     row       o    tap, c        x[row - k*dil, c]  r    w[k,c,o]   n
//   BACKWARD    row       c    tap, o        dy[row + k*dil, o] r    w[k,c,o]   r
//   WEIGHTS     c         o    row of slab   x[row - k*dil, c]  m    dy[row,o]  n
//
//   shared memory   | step 0: A, B | step 1: A, B | step 2: A, B |        3 x 10,240 bytes
//   an operand      r side by side: 64 lines of 32 values;  else: 32 lines of 64, which ldmatrix
//                   turns. A line is 16 bytes longer than its data, so that the eight lines that
//                   ldmatrix reads at a time begin in eight different groups of four banks.
//   step i          | copy i + 2 |
//                   | wait for i | multiply i |
//
// PTX ISA: cp.async, ldmatrix, "Multiply-and-Accumulate Instruction: mma".

enum MmaMode { FORWARD, BACKWARD, WEIGHTS };
enum {
    MMA_TILE = 64,
    MMA_STEP = 32,
    MMA_STAGES = 3,
    MMA_THREADS = 128,
    MMA_LINE_R = MMA_STEP * 2 + 16,  // bytes of a line, r side by side
    MMA_LINE = MMA_TILE * 2 + 16,    // otherwise
    MMA_OPERAND = MMA_TILE * MMA_LINE_R,
    MMA_PIECES = MMA_TILE * MMA_STEP / 8,  // of 16 bytes, in an operand
    MMA_BLOCKS = 4 * 132,                  // that a large GPU needs to be busy
};
static_assert(MMA_OPERAND >= MMA_STEP * MMA_LINE, "both forms fit");
static_assert(MMA_PIECES % MMA_THREADS == 0, "each thread copies a whole number of pieces");

typedef struct {
    const bf16 *x, *w;  // BACKWARD: dy, w;  WEIGHTS: x, dy
    ConvEnd end;
    float *part;  // WEIGHTS: (slabs, K*C*O + O)
    ConvShape s;
    int slabs;
} MmaArgs;

#ifdef HAVE_MMA
INLINE void copy16(uint32_t dst, const void *src, bool inside) {  // zeros where not inside
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
INLINE void copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
INLINE void copy_wait(void) {  // for all but the last PENDING groups
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Four 8 x 8 matrices, whose lines begin where lanes 0-7, 8-15, 16-23 and 24-31 point. TURN: each
// is turned on its way.
template <bool TURN>
INLINE void ldmatrix(uint32_t r[4], uint32_t addr) {
    if (TURN)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(addr)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(addr)
                     : "memory");
}
INLINE void mma(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
        " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sends for A and B of a step, 4096 bytes each, two pieces of 16 bytes of either for every thread;
// neighbouring lanes copy neighbouring 16 bytes of a line, 4 or 8 lanes to a line. `begin`:
// first row of the slab. What lies outside is not addressed: its copy reads nothing and writes 0.
template <MmaMode MODE>
INLINE void mma_copy(const MmaArgs *a, uint32_t at, int m0, int n0, int step, int begin, int tap) {
    const ConvShape s = a->s;
    const int N = s.B * s.T, width = MODE == BACKWARD ? s.O : s.C;
    const int chunks = (width + MMA_STEP - 1) / MMA_STEP;
    const int k = MODE == WEIGHTS ? tap : step / chunks, r0 = step % chunks * MMA_STEP;
    const int shift = (MODE == BACKWARD ? 1 : -1) * k * s.dil;
#pragma unroll
    for (int i = threadIdx.x; i < MMA_PIECES; i += MMA_THREADS) {
        int line = MODE == WEIGHTS ? i / 8 : i / 4, piece = MODE == WEIGHTS ? i % 8 : i % 4;
        int col = (MODE == WEIGHTS ? m0 : r0) + piece * 8;
        int n = (MODE == WEIGHTS ? begin + step * MMA_STEP : m0) + line, t = n % s.T + shift;
        bool inside = n < N && t >= 0 && t < s.T && col < width;
        copy16(at + line * (MODE == WEIGHTS ? MMA_LINE : MMA_LINE_R) + piece * 16,
               inside ? a->x + ((int64_t)n + shift) * width + col : a->x, inside);
    }
#pragma unroll
    for (int i = threadIdx.x; i < MMA_PIECES; i += MMA_THREADS) {
        int line = MODE == BACKWARD ? i / 4 : i / 8, piece = MODE == BACKWARD ? i % 4 : i % 8;
        int col = (MODE == BACKWARD ? r0 : n0) + piece * 8;
        int row = line + (MODE == WEIGHTS ? begin + step * MMA_STEP : MODE == FORWARD ? r0 : n0);
        bool inside = col < s.O && row < (MODE == WEIGHTS ? N : s.C);
        size_t from = (MODE == WEIGHTS ? (size_t)row : (size_t)k * s.C + row) * s.O + col;
        copy16(at + MMA_OPERAND + line * (MODE == BACKWARD ? MMA_LINE_R : MMA_LINE) + piece * 16,
               inside ? a->w + from : a->w, inside);
    }
    copy_commit();
}

// A step's products: the warp's 32 x 32 sums from row wm, column wn of the tile. For 16 values of r
// that is 4 ldmatrix and 8 mma: a fragment of A serves four mma, one of B two.
template <MmaMode MODE>
INLINE void mma_multiply(float acc[2][4][4], uint32_t stage, int wm, int wn) {
    const int lane = threadIdx.x % 32;
    // Where this lane points ldmatrix: mma wants A as [rows 0-7 | rows 8-15] of r 0-7, then of r
    // 8-15, and B as r 0-7, then r 8-15, of columns 0-7, then of columns 8-15.
    const uint32_t a_at =
        MODE == WEIGHTS ? (lane % 8 + lane / 16 * 8) * MMA_LINE + (wm + lane / 8 % 2 * 8) * 2
                        : (wm + lane % 16) * MMA_LINE_R + lane / 16 * 16;
    const uint32_t b_at =
        MODE == BACKWARD ? (wn + lane % 8 + lane / 16 * 8) * MMA_LINE_R + lane / 8 % 2 * 16
                         : lane % 16 * MMA_LINE + (wn + lane / 16 * 8) * 2;
    const int a_r = MODE == WEIGHTS ? MMA_LINE : 2, b_r = MODE == BACKWARD ? 2 : MMA_LINE;
    const int a_16 = MODE == WEIGHTS ? 32 : 16 * MMA_LINE_R;  // bytes from 16 rows to the next
    const int b_16 = MODE == BACKWARD ? 16 * MMA_LINE_R : 32;
#pragma unroll
    for (int h = 0; h < MMA_STEP; h += 16) {
        uint32_t fa[2][4], fb[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            ldmatrix<MODE == WEIGHTS>(fa[j], stage + a_at + h * a_r + j * a_16);
            ldmatrix<MODE != BACKWARD>(fb[j], stage + MMA_OPERAND + b_at + h * b_r + j * b_16);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(acc[j][n], fa[j], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
    }
}

// The sums go through shared memory as bf16, so that each thread finishes eight channels at a time:
// mma leaves a lane two neighbours of a row, 4 bytes, where a store should have 16. Then eight
// neighbouring lanes have the 128 bytes of a row of the tile. Its 64 lines of 144 bytes fit into
// stage 0.
template <MmaMode MODE>
INLINE void mma_finish(const MmaArgs *a, char *smem, float acc[2][4][4], int m0, int n0, int wm,
                       int wn) {
    const int N = a->s.B * a->s.T, width = MODE == FORWARD ? a->s.O : a->s.C;
    const int lane = threadIdx.x % 32, r = wm + lane / 4, c = wn + 2 * (lane % 4);
    for (int n = 0; n < 4; n++) {
        int col = n0 + c + 8 * n;
        float2 bias = {0, 0};
        if (MODE == FORWARD && a->end.bias && col < width)
            bias = *(const float2 *)(a->end.bias + col);
        for (int j = 0; j < 2; j++)
            for (int h = 0; h < 2; h++)
                *(uint32_t *)(smem + (r + 16 * j + 8 * h) * MMA_LINE + (c + 8 * n) * 2) =
                    pack(acc[j][n][2 * h] + bias.x, acc[j][n][2 * h + 1] + bias.y);
    }
    __syncthreads();  // all sums are written before they are read by others
    const Dropout *drop = &a->end.drop;
    const uint32_t step_number = drop->threshold ? drop->state->step : 0;
    for (int i = threadIdx.x; i < MMA_TILE * 8 / 2; i += MMA_THREADS) {
        int row = i / 64 * 16 + i / 8 % 8, col = n0 + i % 8 * 8;  // and row + 8
        if (col >= width) continue;
        const bool inside[2] = {m0 + row < N, m0 + row + 8 < N};
        size_t first = (size_t)(m0 + row) * width + col;
        uint4 v[2], side[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        for (int h = 0; h < 2; h++)
            v[h] = *(uint4 *)(smem + (row + 8 * h) * MMA_LINE + i % 8 * 16);
        if (a->end.side) load2(side, a->end.side, inside, first, width);
        uint32_t kept[2] = {0, 0};
        if (MODE == FORWARD && drop->threshold)
            draw_kept_rows<1>(kept, drop, step_number, drop->first + m0 + row, col, width);
        if (MODE == FORWARD)
            finish_forward8(&a->end, v, side, kept, 0, inside, first, width);
        else
            finish_backward8(&a->end, v, side, inside, first, width);
    }
}

// A slab's share of dw[tap] as it stands in the accumulators, and of db: two threads summed a
// column of dy. Four neighbouring lanes write 32 bytes of a row, a sector.
INLINE void mma_store_weights(const MmaArgs *a, char *smem, float acc[2][4][4], float dy_sum,
                              float *part, int tap, int m0, int n0, int wm, int wn) {
    const ConvShape s = a->s;
    const int lane = threadIdx.x % 32, r = m0 + wm + lane / 4, c = n0 + wn + 2 * (lane % 4);
    for (int j = 0; j < 2; j++)
        for (int n = 0; n < 4; n++)
            for (int h = 0; h < 2; h++) {
                int row = r + 16 * j + 8 * h, col = c + 8 * n;
                if (row < s.C && col < s.O)
                    *(float2 *)(part + ((size_t)tap * s.C + row) * s.O + col) =
                        make_float2(acc[j][n][2 * h], acc[j][n][2 * h + 1]);
            }
    if (tap > 0 || m0 > 0) return;
    float *other = (float *)smem;
    if (threadIdx.x >= MMA_TILE) other[threadIdx.x - MMA_TILE] = dy_sum;
    __syncthreads();  // the odd rows' sums are there before they are added
    int col = n0 + threadIdx.x;
    if (threadIdx.x < MMA_TILE && col < s.O)
        part[(size_t)s.K * s.C * s.O + col] = dy_sum + other[threadIdx.x];
}
#endif

// Grid: x tiles of m, y tiles of n, z (WEIGHTS) tap + K*slab. y <= 1024 and z <= 528 + K. Four
// warps share a tile's 64 x 64 sums, 32 x 32 each: 32 registers a thread.
template <MmaMode MODE>
__global__ void __launch_bounds__(MMA_THREADS) conv_mma(MmaArgs a) {
#ifdef HAVE_MMA
    __shared__ __align__(16) char smem[MMA_STAGES * 2 * MMA_OPERAND];
    const ConvShape s = a.s;
    const int N = s.B * s.T, warp = threadIdx.x / 32, width = MODE == BACKWARD ? s.O : s.C;
    const int tap = MODE == WEIGHTS ? blockIdx.z % s.K : 0, slab = blockIdx.z / s.K;
    const int m0 = blockIdx.x * MMA_TILE, n0 = blockIdx.y * MMA_TILE;
    const int per_slab = MODE == WEIGHTS ? (N + a.slabs * MMA_STEP - 1) / (a.slabs * MMA_STEP) : 0;
    const int begin = slab * per_slab * MMA_STEP;
    const int steps = MODE == WEIGHTS ? per_slab : s.K * ((width + MMA_STEP - 1) / MMA_STEP);
    const int wm = warp / 2 * 32, wn = warp % 2 * 32;
    const uint32_t at = shared_addr(smem);
    const bool with_bias = MODE == WEIGHTS && tap == 0 && m0 == 0;
    float acc[2][4][4] = {}, dy_sum = 0;
    for (int i = 0; i < MMA_STAGES - 1; i++)
        if (i < steps)
            mma_copy<MODE>(&a, at + i * 2 * MMA_OPERAND, m0, n0, i, begin, tap);
        else
            copy_commit();  // an empty group: the waits below count groups
    for (int i = 0; i < steps; i++) {
        copy_wait<MMA_STAGES - 2>();
        // All threads' copies of step i are here, not only this one's; and all have multiplied step
        // i - 1, and added up its dy, before the next copies overwrite it.
        __syncthreads();
        int next = i + MMA_STAGES - 1, now = i % MMA_STAGES * 2 * MMA_OPERAND;
        if (next < steps)
            mma_copy<MODE>(&a, at + next % MMA_STAGES * 2 * MMA_OPERAND, m0, n0, next, begin, tap);
        else
            copy_commit();
        mma_multiply<MODE>(acc, at + now, wm, wn);
        if (with_bias) {  // two threads a column, one for even rows and one for odd
            const char *dy = smem + now + MMA_OPERAND + threadIdx.x % MMA_TILE * 2;
            for (int row = threadIdx.x / MMA_TILE; row < MMA_STEP; row += 2)
                dy_sum += __bfloat162float(*(const bf16 *)(dy + row * MMA_LINE));
        }
    }
    copy_wait<0>();
    __syncthreads();  // all have multiplied their last step: the stages may be written over
    if (MODE == WEIGHTS)
        mma_store_weights(&a, smem, acc, dy_sum,
                          a.part + slab * ((size_t)s.K * s.C * s.O + s.O), tap, m0, n0, wm, wn);
    else
        mma_finish<MODE>(&a, smem, acc, m0, n0, wm, wn);
#endif
}

// dw += the slabs' sums, db likewise, slab by slab: the same order, and bits, every time. A thread
// per weight, neighbours next to each other.
static __global__ void mma_add_slabs(float *dw, float *db, const float *part, size_t weights, int O,
                                     int slabs) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= weights + (db ? O : 0)) return;
    float sum = 0;
    for (int slab = 0; slab < slabs; slab++) sum += part[slab * (weights + O) + i];
    if (i < weights)
        dw[i] += sum;
    else
        db[i - weights] += sum;
}

static bool have_mma(void) {
    static int known = -1;
    if (known < 0)
        known = gpu()->capability >= 80 && compiled_for((const void *)conv_mma<FORWARD>) >= 80;
    return known;
}
static bool mma_takes(ConvShape s) { return have_mma() && s.C % 8 == 0 && s.O % 8 == 0; }

template <MmaMode MODE>
static void mma_launch(const MmaArgs &a, size_t m, int n, int z) {
    dim3 grid((unsigned)ceil_div(m, MMA_TILE), (unsigned)ceil_div(n, MMA_TILE), (unsigned)z);
    conv_mma<MODE><<<grid, MMA_THREADS, 0, gpu_stream>>>(a);
    LAUNCHED(MODE == FORWARD    ? "conv_mma forward"
             : MODE == BACKWARD ? "conv_mma backward"
                                : "conv_mma weights",
             conv_flops(a.s),
             MODE == FORWARD    ? forward_bytes(a.end, a.s)
             : MODE == BACKWARD ? backward_bytes(a.end, a.s)
                                : weight_bytes(a.s, sizeof(bf16), a.slabs));
}

static void conv_forward_mma(act *out, act *pre, const act *x, const real *w, const real *b,
                             const act *res, Dropout drop, ConvShape s, void *work) {
    MmaArgs a = {(const bf16 *)x, NULL, forward_end(out, pre, b, res, drop), NULL, s, 1};
    if (mma_takes(s)) a.w = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (a.w && all_aligned(&a.end, x, a.w))
        mma_launch<FORWARD>(a, (size_t)s.B * s.T, s.O, 1);
    else
        block_rung()->conv_forward(out, pre, x, w, b, res, drop, s, work);
}

static void conv_backward_input_mma(act *dx, act *pre, act *da, const act *dy, const real *w,
                                    float scale, ConvShape s, bool accumulate, void *work) {
    MmaArgs a = {(const bf16 *)dy, NULL, backward_end(dx, pre, da, scale, accumulate), NULL, s, 1};
    if (mma_takes(s)) a.w = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (a.w && all_aligned(&a.end, dy, a.w))
        mma_launch<BACKWARD>(a, (size_t)s.B * s.T, s.C, 1);
    else
        block_rung()->conv_backward_input(dx, pre, da, dy, w, scale, s, accumulate, work);
}

// Tiles of dw, and slabs of at least 256 rows: enough blocks to be busy.
static size_t mma_tiles(int K, int C, int O) {
    return K * ceil_div(C, MMA_TILE) * ceil_div(O, MMA_TILE);
}
static int mma_slabs(ConvShape s) {
    size_t slabs = MMA_BLOCKS / mma_tiles(s.K, s.C, s.O);
    size_t most = ceil_div((size_t)s.B * s.T, 8 * MMA_STEP);
    return slabs < 1 ? 1 : (int)(slabs < most ? slabs : most);
}

static void conv_backward_weight_mma(const WeightJob *jobs, int n, ConvShape s, void *work) {
    bool takes = mma_takes(s) && aligned16(work);
    for (int i = 0; i < n; i++)
        takes = takes && aligned16(jobs[i].x) && aligned16(jobs[i].dy);
    if (!takes) {
        block_rung()->conv_backward_weight(jobs, n, s, work);
        return;
    }
    size_t weights = (size_t)s.K * s.C * s.O;
    for (int i = 0; i < n; i++) {  // one after the other in the same scratch
        MmaArgs a = {(const bf16 *)jobs[i].x, (const bf16 *)jobs[i].dy, ConvEnd(), (float *)work, s,
                     mma_slabs(s)};
        a.s.dil = jobs[i].dil;
        mma_launch<WEIGHTS>(a, (size_t)s.C, s.O, s.K * a.slabs);
        mma_add_slabs<<<(unsigned)ceil_div(weights + s.O, 256), 256, 0, gpu_stream>>>(
            jobs[i].dw, jobs[i].db, a.part, weights, s.O, a.slabs);
        LAUNCHED("mma_add_slabs", 0, slabs_bytes(s, a.slabs));
    }
}

// ---- Hopper's instructions, one wrapper each
//
// PTX ISA: mbarrier, griddepcontrol, cp.async.bulk.tensor, setmaxnreg, and the chapter
// "Asynchronous Warpgroup Level Matrix Instructions" with its "Matrix Descriptor Format".

#ifdef HAVE_WGMMA
// A barrier in shared memory counts arrivals and bytes still to come; when both are zero its phase
// flips. wait(parity) returns once the phase of that parity is over.
INLINE void mbarrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
INLINE void mbarrier_expect(uint32_t bar, int bytes) {  // one arrival, and `bytes` to come
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
INLINE void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
INLINE void mbarrier_wait(uint32_t bar, int parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(bar),
        "r"(parity)
        : "memory");
}
// Barriers that were set up become visible to the copy engine.
INLINE void mbarrier_init_fence(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Dependent launches: blocks of the next kernel may take the places of ours that are done, and set
// up; wait_for_previous returns when all of the kernel before is done and its writes are visible.
INLINE void let_next_start(void) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
INLINE void wait_for_previous(void) { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The copy engine: a box of a tensor map goes to shared memory, zeros where the box leaves the
// tensor; `bar` hears of its bytes. c0 counts values, c1 rows.
INLINE void tensor_copy(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0, int c1,
                        int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// The copy engine reads a map before it first copies by it; read ahead, it costs no wait then.
INLINE void map_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// `bytes`, a multiple of 16, as they lie.
INLINE void bulk_copy(uint32_t dst, const void *src, int bytes, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst),
        "l"(src), "r"(bytes), "r"(bar)
        : "memory");
}

// Registers move from warpgroups that need few to those that need many.
template <int N>
INLINE void registers_down(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
INLINE void registers_up(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// wgmma: the four warps of a warpgroup multiply A (64 x 16) by B (16 x N), both in shared memory.
// A descriptor says where an operand lies. With SWIZZLE_x, rows of x bytes follow each other, and
// the 16-byte units of a row are permuted by the row's number, so that units of one column lie in
// different banks. The hardware permutes by bits of the address (7 and up into 4 and up), as the
// copy engine does when it writes; so an operand may start at any row of what was copied, which
// is what makes a tap free.
//   stride: bytes from 8 rows to the next 8.   lead: only for an operand with its summed index
//   outside: bytes from one column of x-byte rows to the next.
#define SWIZZLE_128 (1u << 30)
#define SWIZZLE_64 (2u << 30)
typedef struct {
    uint32_t lo, hi;  // of the descriptor; lo holds the address in units of 16 bytes
} Operand;
INLINE Operand operand(uint32_t swizzle, uint32_t addr, int lead, int stride) {
    Operand o = {addr >> 4 | (uint32_t)(lead >> 4) << 16, (uint32_t)(stride >> 4) | swizzle};
    return o;
}
INLINE Operand operand_at(Operand o, int bytes) {  // the same operand, bytes further on
    o.lo += bytes >> 4;
    return o;
}
INLINE void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
INLINE void wgmma_wait(void) {  // for all but the last PENDING groups
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// clang-format off
#define ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                   "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC32(d, i) ACC8(d, i), ACC8(d, i + 8), ACC8(d, i + 16), ACC8(d, i + 24)
#define REGS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGS32 REGS16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS64                                                                                   \
    REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"   \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS128                                                                                  \
    REGS64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"   \
    "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,"  \
    "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122," \
    "%123,%124,%125,%126,%127"
// The text of an asm calls its operands by number. The N/2 accumulators are the first: regs is
// their list in the text, the arguments after turn_b are those themselves. The seven between are
// the numbers of what follows them.
#define WGMMA(N, regs, a_lo, a_hi, b_lo, b_hi, accumulate, turn_a, turn_b, ...)                  \
    asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %" #accumulate ", 0;\n"         \
                 "mov.b64 a, {%" #a_lo ", %" #a_hi "}; mov.b64 b, {%" #b_lo ", %" #b_hi "};\n"   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" regs               \
                 "}, a, b, p, 1, 1, %" #turn_a ", %" #turn_b "; }"                               \
                 : __VA_ARGS__                                                                   \
                 : "r"(a.lo), "r"(a.hi), "r"(b.lo), "r"(b.hi), "r"(add), "n"(TURN_A), "n"(TURN_B))
// clang-format on

// acc (64 x N) += A B, or = A B where !add. Thread i of the warpgroup holds of rows
// r = i/32*16 + i%32/4 and r + 8 the columns 8j + 2(i%4) and the next, j = 0..N/8-1:
// acc[4j], acc[4j+1] of row r, acc[4j+2], acc[4j+3] of row r + 8.
// TURN_x: operand x has its summed index outside.
template <int N, int TURN_A, int TURN_B>
INLINE void wgmma(float *acc, Operand a, Operand b, int add) {
    static_assert(N == 32 || N == 64 || N == 128 || N == 256, "those written out here");
    if (N == 32) WGMMA(32, REGS16, 16, 17, 18, 19, 20, 21, 22, ACC8(acc, 0), ACC8(acc, 8));
    if (N == 64) WGMMA(64, REGS32, 32, 33, 34, 35, 36, 37, 38, ACC32(acc, 0));
    if (N == 128)
        WGMMA(128, REGS64, 64, 65, 66, 67, 68, 69, 70, ACC32(acc, 0), ACC32(acc, 32));
    if (N == 256)
        WGMMA(256, REGS128, 128, 129, 130, 131, 132, 133, 134, ACC32(acc, 0), ACC32(acc, 32),
              ACC32(acc, 64), ACC32(acc, 96));
}

// A ring of stages in shared memory, filled by copies and emptied by products in the same order.
typedef struct {
    int slot, phase;  // phase: parity of the barriers' phase to wait for
} Ring;
INLINE void ring_skip(Ring *r, int n, int slots) {
    r->slot += n;
    while (r->slot >= slots) {
        r->slot -= slots;
        r->phase ^= 1;
    }
}
// Waits until this warp's products are done, all but those of the last PENDING stages: then the
// slot that `empty` belongs to has a reader less.
template <int PENDING>
INLINE void free_slot(uint32_t empty) {
    wgmma_wait<PENDING>();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}
#endif

enum {
    SHARED_BYTES = 227 * 1024,  // all that a block can have on Hopper
    MAX_SLOTS = 16,
    BARRIER_BYTES = 1024,  // and a block's 128 biases
    MAX_HALO = 192,  // rows: with a tile of 64, all that a box of a tensor map can have
    SUM_TILE = 64,   // rows of a tile; a wgmma has 64
};

// ---- Rung 5: wgmma, forward and backward to the input
//
//   sums (64 rows, TILE_O) = sum over taps k and channels of  x[rows moved by k*dil] w[k]
//
// Bound before: operands on their way to the tensor cores, from L2 and through registers.
// Count for C = O = 256, K = 3, a tile of 64 rows x 128 channels: 64*128*768*2 = 12.6 MFLOP, 3072
// cycles of a multiprocessor's tensor cores. It needs 72 rows of 512 bytes and 196,608 bytes of
// weights. These are the problem: fetched for every tile they would be 64 bytes a cycle, where L2
// gives some 30.
// Idea: a block keeps the weights of its 128 output channels in shared memory for its whole life,
// one block to a multiprocessor, and lets the rows pass by. They come through a ring of stages of
// 32 channels; a tap is the same stage from another row on, so three taps cost one copy and a halo
// of (K-1)*dil rows. Tensor cores read shared memory themselves.
// Saved: L2 traffic falls to 12 bytes a cycle, and no operand passes a register.
// Cost: 196,608 bytes before the first product: up to some 1000 rows a layer's time is mostly that.
// So there are two tiles, a wide one of 128 channels and, where all its blocks run at a time, a
// small one of 32: a quarter of the weights, all fetched while the kernel before still runs. That
// leaves room for stages of 64 channels, the same bytes in half as many rows for the copy engine.
// Measured: 32768 rows forward 104 -> 23.3 us. At 131072 rows forward and backward through GELU
// move 201 and 268 MB at 2.4 and 2.6 TB/s: device memory is nearly their bound.
//
//   shared memory   | weights: chunk 0 (taps 0, 1, 2) | chunk 1 | ..  192 KB, small tile 48 KB
//   (dil = 4)       | ring: stage 0 | stage 1 | .. 7 of 4.5 KB, small tile 16 of 9 KB | barriers |
//   a chunk         64 summed channels x TILE_O made, per tap; rows of 128 bytes, swizzled (of the
//                   small tile forward 64)
//   a stage         64 + (K-1)*dil rows x 32 channels (of the small tile 64); rows of 64 bytes
//                   (128), swizzled
//   forward reads   [ halo = (K-1)*dil | 64 rows ]    tap k starts at row (K-1-k)*dil
//   backward reads  [ 64 rows | halo = (K-1)*dil ]    tap k starts at row k*dil
//
// Rows before a sequence's first, and after its last, are zeros by the tensor map, which has a
// dimension for time and one for the sequence: no tap ever sees another sequence.
//
//   one thread   copies weights, then stages, as slots become free
//   group 0      | multiply tile 0 | finish tile 0 . . . . . . . | multiply tile 3 | finish ..
//   group 1                        | multiply tile 1 | finish tile 1 . . . . . . . | multiply 4
//   group 2                                          | multiply tile 2 | finish tile 2 . . . .
//
// Three warpgroups take turns at the tensor cores: while one multiplies, the others finish theirs:
// bias, GELU, dropout, residual, 16-byte stores.
//
// Barriers:    waits, for                                              prevents
//   full       group, until a stage's bytes have come                  multiplying what lay there
//   empty      the copying thread, until 4 warps multiplied a stage    overwriting it before
//   weights    group, until a tap of a chunk has come                  multiplying garbage
//   bias       group, before its first tile is finished                adding garbage
//   order      group, until the group before queued its last product   all three multiplying at a
//              time, and then all finishing at a time with idle tensor cores; no data depends on it
//
// Dependent launches, and why the weights may be fetched before wait_for_previous: weights and
// their bf16 copy are written by sync_params and optimize. The kernel after those is draw_batch or
// embed_forward, never a conv, and lets the next one start only when its own wait is over: so the
// weights are whole before any block of ours can run. Weights that are not in that copy are
// converted by the kernel right before ours: then ours is launched plainly (`settled` false).
// Biases are parameters like them. All else waits: x, side, dx and the step's number may come from
// the kernel before, and what is written may still be read there. The next one may come when our
// own wait is over: earlier, its blocks and those of the one after it would fill the GPU with
// waiting, and a branch's kernel would find no place. A kernel that is not launched in this way
// needs neither call, and loses only the overlap.
//
// Tried and dropped (us, before and after, each pair at one shape): clusters of 2 and of 4 blocks
// that share copies of weights, 12.1 -> 13.5 and 15.1; two warpgroups for three, 23.9 -> 27.0;
// several layers in one launch, at 128 rows 3.1 -> 4.6 a layer, at 16384 13.1 to 14.2 -> 13.7 to
// 14.3; reading side late, 29.2 -> 34.5; finishing all 128 columns at once, 14.1 -> 15.0.

enum {
    CHUNK_C = 64,               // channels of a chunk of weights
    CHUNK_BYTES = CHUNK_C * 2,  // of a chunk's tap, for each channel of TILE_O
    MAX_WEIGHTS = 12,           // taps of chunks in shared memory
    CONV_GROUPS = 3,
    CONV_THREADS = CONV_GROUPS * 128 + 128,  // setmaxnreg gives registers to whole warpgroups
    GROUP_REGISTERS = 160,
    COPY_REGISTERS = 32,
    BIAS_AT = 512,       // bytes behind the barriers' first
};
static_assert(128 * (CONV_GROUPS * GROUP_REGISTERS + COPY_REGISTERS) <= 65536, "registers");
static_assert(8 * (MAX_WEIGHTS + 2 * MAX_SLOTS + CONV_GROUPS + 1) <= BIAS_AT, "barriers");
static_assert(BIAS_AT + 128 * sizeof(float) <= BARRIER_BYTES, "biases");
// Channels of a stage of rows: half a chunk of weights, as those leave room for no more; beside the
// small tile's, a whole one, of which the copy engine has half as many rows to fetch.
static constexpr __host__ __device__ int step_channels(int tile_o) {
    return tile_o < 128 ? CHUNK_C : CHUNK_C / 2;
}

typedef struct {
    CUtensorMap x, w;  // x: (C,T,B), innermost first;  w: (O,C,K)
    ConvEnd end;
    int T, n_in, n_out, dil, tiles_per_seq, tiles, slots, stage_bytes, stage_rows;
} ConvArgs;

#ifdef HAVE_WGMMA
// Where the barriers lie behind the ring.
typedef struct {
    uint32_t weights, full, empty, order, bias;
} ConvBarriers;
INLINE ConvBarriers conv_barriers(uint32_t at) {
    ConvBarriers b = {at, at + 8 * MAX_WEIGHTS, at + 8 * (MAX_WEIGHTS + MAX_SLOTS),
                      at + 8 * (MAX_WEIGHTS + 2 * MAX_SLOTS),
                      at + 8 * (MAX_WEIGHTS + 2 * MAX_SLOTS + CONV_GROUPS)};
    return b;
}

// All taps of a chunk: 64 summed channels by the block's TILE_O. A swizzled row holds 64 channels
// and a box is no longer than that: 128 come as two boxes.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void copy_weights(const ConvArgs *a, uint32_t weights, uint32_t bar, int chunk, int out0) {
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, BOXES = TILE_O > 64 ? 2 : 1 };
    const int o = BACKWARD ? chunk * CHUNK_C : out0, c = BACKWARD ? out0 : chunk * CHUNK_C;
    for (int k = 0; k < TAPS; k++) {
        uint32_t dst = weights + (chunk * TAPS + k) * TAP_BYTES;
        uint32_t full = bar + 8 * (chunk * TAPS + k);
        mbarrier_expect(full, TAP_BYTES);
        for (int p = 0; p < BOXES; p++)
            tensor_copy(dst + p * TAP_BYTES / 2, &a->w, full, o + p * 64 * !BACKWARD,
                        c + p * 64 * BACKWARD, k);
    }
}

// One thread's work: the biases and weights once, two chunks ahead of the products or, for the
// small tile, all ahead of the wait; and the stages in the order of the block's tiles.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void conv_copy(const ConvArgs *a, uint32_t weights, uint32_t ring, ConvBarriers bar,
                      int first, int stride, int out0) {
    enum { STEP = step_channels(TILE_O), STEPS = CHUNK_C / STEP };
    const int chunks = (a->n_in + CHUNK_C - 1) / CHUNK_C, ahead = TILE_O < 128 ? chunks : 2;
    int chunk = 0;
    map_prefetch(&a->x);
    if (!BACKWARD && a->end.bias) {
        int bytes = (a->n_out - out0 < TILE_O ? a->n_out - out0 : TILE_O) * (int)sizeof(float);
        mbarrier_expect(bar.bias, bytes);
        bulk_copy(bar.weights + BIAS_AT, a->end.bias + out0, bytes, bar.bias);
    }
    for (; chunk < ahead && chunk < chunks; chunk++)
        copy_weights<BACKWARD, TAPS, TILE_O>(a, weights, bar.weights, chunk, out0);
    wait_for_previous();  // before x is read: the kernel before may have made it
    let_next_start();
    Ring r = {0, 1};      // the first wait for each slot falls through: it is empty
    for (int tile = first; tile < a->tiles; tile += stride) {
        int b = tile / a->tiles_per_seq, t0 = tile % a->tiles_per_seq * SUM_TILE;
        if (!BACKWARD) t0 -= (TAPS - 1) * a->dil;
        for (int step = 0; step < STEPS * chunks; step++) {
            mbarrier_wait(bar.empty + 8 * r.slot, r.phase);
            mbarrier_expect(bar.full + 8 * r.slot, a->stage_rows * STEP * 2);
            tensor_copy(ring + r.slot * a->stage_bytes, &a->x, bar.full + 8 * r.slot,
                        step * STEP, t0, b);
            ring_skip(&r, 1, a->slots);
            if (chunk < chunks && step % STEPS == STEPS - 1)
                copy_weights<BACKWARD, TAPS, TILE_O>(a, weights, bar.weights, chunk++, out0);
        }
    }
}

// Four neighbouring lanes exchange four words each: lane q ends with word q of all four, in the
// order of lanes. Accumulators have 2 columns of four groups of 8 in a lane; afterwards a lane has
// 8 columns of one group: one 16-byte store, and half of a draw of dropout. Two rounds, with the
// neighbour and then with the one after it: four shuffles, no shared memory and no barrier.
INLINE void transpose_quad(uint32_t w[4]) {
    const unsigned all = 0xFFFFFFFFu;
    int q = threadIdx.x;
    uint32_t send0 = q & 1 ? w[0] : w[1], send1 = q & 1 ? w[2] : w[3];
    send0 = __shfl_xor_sync(all, send0, 1);
    send1 = __shfl_xor_sync(all, send1, 1);
    if (q & 1)
        w[0] = send0, w[2] = send1;
    else
        w[1] = send0, w[3] = send1;
    send0 = q & 2 ? w[0] : w[2], send1 = q & 2 ? w[1] : w[3];
    send0 = __shfl_xor_sync(all, send0, 2);
    send1 = __shfl_xor_sync(all, send1, 2);
    if (q & 2)
        w[0] = send0, w[1] = send1;
    else
        w[2] = send0, w[3] = send1;
}

// What end.side holds beside a lane's sums, as finish_tile takes it: side[2g] and side[2g + 1] are
// its eight columns of group g of 32, in its row and 8 rows on.
// Four neighbouring lanes: 64 bytes of a row; a warp: eight rows at a time.
template <int TILE_O>
INLINE void load_side(uint4 side[TILE_O / 16], const ConvArgs *a, const bool inside[2], size_t i0,
                      int left) {
#pragma unroll
    for (int j = 0; j < TILE_O / 16; j++) {
        side[j] = make_uint4(0, 0, 0, 0);
        if (a->end.side && inside[j % 2] && 32 * (j / 2) < left)
            side[j] = *(const uint4 *)(a->end.side + i0 + 32 * (j / 2) +
                                       j % 2 * 8 * (size_t)a->n_out);
    }
}

// A tile's sums become activations, 32 columns of two rows at a time: more would not fit into
// registers beside the sums. i0: element of the lane's first eight, `left` columns from there on;
// bias: in shared memory; kept: of draw_kept_rows.
template <bool BACKWARD, int TILE_O>
INLINE void finish_tile(const ConvArgs *a, const float *acc, const float *bias, uint4 *side,
                        const uint32_t *kept, const bool *inside, size_t i0, int left) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int g = 0; g < TILE_O / 32; g++) {
        uint32_t w[2][4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            int j = 4 * g + m;
            float2 b = {0, 0};  // columns past n_out get what lies there, and are not stored
            if (!BACKWARD && a->end.bias) b = *(const float2 *)(bias + 8 * j + 2 * q);
            w[0][m] = pack(acc[4 * j] + b.x, acc[4 * j + 1] + b.y);
            w[1][m] = pack(acc[4 * j + 2] + b.x, acc[4 * j + 3] + b.y);
        }
        transpose_quad(w[0]);
        transpose_quad(w[1]);
        uint4 v[2] = {make_uint4(w[0][0], w[0][1], w[0][2], w[0][3]),
                      make_uint4(w[1][0], w[1][1], w[1][2], w[1][3])};
        if (32 * g >= left) continue;
        if (BACKWARD)
            finish_backward8(&a->end, v, side + 2 * g, inside, i0 + 32 * g, a->n_out);
        else
            finish_forward8(&a->end, v, side + 2 * g, kept, g, inside, i0 + 32 * g, a->n_out);
    }
}

// The products of one stage, `part` of its chunk.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void multiply_stage(float *acc, Operand x, Operand w, int part, int shift, bool add) {
    enum { STEP = step_channels(TILE_O) };
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, ROW_BYTES = BACKWARD || TILE_O >= 64 ? 128 : 64 };
    const int w_step = BACKWARD ? 2 : ROW_BYTES;  // bytes from one summed channel to the next
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int i = 0; i < STEP / 16; i++) {
            Operand x_k = operand_at(x, (BACKWARD ? k : TAPS - 1 - k) * shift + i * 32);
            Operand w_k = operand_at(w, k * TAP_BYTES + (part * STEP + i * 16) * w_step);
            wgmma<TILE_O, 0, !BACKWARD>(acc, x_k, w_k, add | k | i);
        }
    wgmma_commit();
}

// A warpgroup's work: every CONV_GROUPS-th of the block's tiles.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void conv_multiply(const ConvArgs *a, uint32_t weights, uint32_t ring, ConvBarriers bar,
                          const float *bias, int first, int stride, int out0, int group) {
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, ROW_BYTES = BACKWARD || TILE_O >= 64 ? 128 : 64 };
    enum { STEP = step_channels(TILE_O), STEPS = CHUNK_C / STEP };
    const int chunks = (a->n_in + CHUNK_C - 1) / CHUNK_C;
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row0 + 8, as wgmma has them
    const int left = a->n_out - out0 - 8 * q;
    const Operand x_op = operand(STEP == 64 ? SWIZZLE_128 : SWIZZLE_64, ring, 16, 8 * STEP * 2);
    // Backward the summed channels of w lie side by side, forward those that are made.
    const Operand w_op = operand(ROW_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_64, weights,
                                 TAP_BYTES / 2, 8 * ROW_BYTES);
    const int shift = a->dil * STEP * 2;  // bytes from a tap's rows to the next tap's
    const Dropout *drop = &a->end.drop;
    float acc[TILE_O / 2];
    wait_for_previous();  // before side or the step is read and anything is written
    const uint32_t step_number = !BACKWARD && drop->threshold ? drop->state->step : 0;
    Ring r = {0, 0};
    ring_skip(&r, group * STEPS * chunks, a->slots);
    int n = group;  // the tile's number in the block
    for (int tile = first + group * stride; tile < a->tiles; tile += CONV_GROUPS * stride) {
        const int b = tile / a->tiles_per_seq, t0 = tile % a->tiles_per_seq * SUM_TILE;
        const size_t row = (size_t)b * a->T + t0 + row0, i0 = row * a->n_out + out0 + 8 * q;
        const bool inside[2] = {t0 + row0 < a->T, t0 + row0 + 8 < a->T};
        uint4 side[TILE_O / 16];  // read now: the products hide how long it takes
        load_side<TILE_O>(side, a, inside, i0, left);
        uint32_t kept[2] = {0, 0};  // drawn now: a group waits for its turn anyway
        if (!BACKWARD && drop->threshold)
            draw_kept_rows<TILE_O / 32>(kept, drop, step_number, drop->first + row, out0 + 8 * q,
                                        a->n_out);
        // Few instructions from here: the tensor cores take 64 cycles for a wgmma, and a warp needs
        // 4 or 5 for each of its instructions.
        if (n > 0) mbarrier_wait(bar.order + 8 * group, (n - 1) / CONV_GROUPS & 1);
        Operand x = operand_at(x_op, r.slot * a->stage_bytes), w = w_op;
        uint32_t full = bar.full + 8 * r.slot, before = 0;
        for (int c = 0; c < chunks; c++) {
            if (n < CONV_GROUPS)  // this group's first tile; for its next ones they are there
                for (int k = 0; k < TAPS; k++) mbarrier_wait(bar.weights + 8 * (c * TAPS + k), 0);
#pragma unroll
            for (int part = 0; part < STEPS; part++) {
                mbarrier_wait(full, r.phase);
                multiply_stage<BACKWARD, TAPS, TILE_O>(acc, x, w, part, shift, c | part);
                if (part > 0 || c > 0) free_slot<1>(before);  // the stage before is multiplied
                before = full + 8 * MAX_SLOTS;  // the slot's `empty`
                full += 8;
                x = operand_at(x, a->stage_bytes);
                if (++r.slot == a->slots) {
                    r.slot = 0;
                    r.phase ^= 1;
                    full = bar.full;
                    x = x_op;
                }
            }
            w = operand_at(w, TAPS * TAP_BYTES);
        }
        // The next group's products may queue behind our last.
        if (lane == 0) mbarrier_arrive(bar.order + 8 * ((group + 1) % CONV_GROUPS));
        free_slot<0>(before);
        ring_skip(&r, (CONV_GROUPS - 1) * STEPS * chunks, a->slots);  // the others' stages
        n += CONV_GROUPS;
        if (!BACKWARD && a->end.bias) mbarrier_wait(bar.bias, 0);
        finish_tile<BACKWARD, TILE_O>(a, acc, bias, side, kept, inside, i0, left);
    }
}
#endif

template <bool BACKWARD, int TAPS, int TILE_O>
__global__ void __launch_bounds__(CONV_THREADS, 1)
    conv_wgmma(const __grid_constant__ ConvArgs a) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(1024) char smem[];  // swizzling goes by address
    // Through a shuffle, so that nvcc knows that it is the same in all of a warp.
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    const int chunks = (a.n_in + CHUNK_C - 1) / CHUNK_C, parts = (a.n_out + TILE_O - 1) / TILE_O;
    // Neighbouring blocks read the same rows, for other channels: the second finds them in L2.
    const int out0 = blockIdx.x % parts * TILE_O, first = blockIdx.x / parts;
    const int stride = gridDim.x / parts;
    const uint32_t weights = shared_addr(smem);
    const uint32_t ring = weights + chunks * TAPS * CHUNK_BYTES * TILE_O;
    const ConvBarriers bar = conv_barriers(ring + a.slots * a.stage_bytes);
    const float *bias = (const float *)(smem + (bar.weights + BIAS_AT - weights));
    if (threadIdx.x == 0) {
        for (int i = 0; i < chunks * TAPS; i++) mbarrier_init(bar.weights + 8 * i, 1);
        for (int i = 0; i < a.slots; i++) mbarrier_init(bar.full + 8 * i, 1);
        for (int i = 0; i < a.slots; i++) mbarrier_init(bar.empty + 8 * i, 4);
        for (int i = 0; i < CONV_GROUPS; i++) mbarrier_init(bar.order + 8 * i, 4);
        mbarrier_init(bar.bias, 1);
        mbarrier_init_fence();
    }
    __syncthreads();  // no copy and no arrival may reach a barrier that is not set up yet
    if (warp < 4 * CONV_GROUPS) {
        registers_up<GROUP_REGISTERS>();
        conv_multiply<BACKWARD, TAPS, TILE_O>(&a, weights, ring, bar, bias, first, stride, out0,
                                              warp / 4);
    } else {
        registers_down<COPY_REGISTERS>();
        if (threadIdx.x == 128 * CONV_GROUPS)
            conv_copy<BACKWARD, TAPS, TILE_O>(&a, weights, ring, bar, first, stride, out0);
    }
#endif
}

// ---- Rung 5: wgmma, backward to the weights
//
//     dw[k] (C,O) = sum over rows of  x[row - k*dil]^T  dy[row]
//
// Both operands have the summed index, time, outside; wgmma turns them.
// Bound before: as above, operands on their way, from L2 and through registers.
// Idea: a block keeps a tile of sums, TAPS taps x CHUNKS*64 channels c x TILE_O channels o, in
// registers while its slab of rows passes by; a warpgroup owns one tap of 64 channels c. Thread 0
// copies between its products, because sums have all the registers.
// Count, the tile of 3 x 64 x 256: 196,608 bytes of float32, three quarters of the registers. A
// stage of 64 rows is 64*256*64*3*2 = 6.3 MFLOP, 1536 cycles of tensor cores, and 41 KB from L2,
// 27 bytes a cycle of some 30 that it gives: both nearly bind.
// Cost: C = O = 256, K = 3 are only 4 such tiles, so rows are cut into slabs, each with blocks of
// its own. Each writes its sums, 196,608 bytes a tile, and a second kernel reads and adds them.
// So a launch takes up to MAX_WEIGHT_JOBS layers: more tiles need fewer slabs.
// Few rows: the time is mostly dw's, read and written by as many blocks as there are tiles. A tile
// of 64 channels o makes four times as many, in one slab or few. A single slab adds to dw itself:
// no scratch, no second kernel. weight_plan below counts what is best.
// Measured: one layer of 32768 rows 115 -> 31.8 us. In a step of 32x1024, two passes of 16384 rows,
// all of them, linear layers and embedding included, 281 us and 94 for the second kernel.
//
//   shared memory   | stage 0 | stage 1 | .. 5 of 41 KB | barriers full, empty |
//   a stage         | dy: PARTS x [64 rows x 64 o] | x: CHUNKS x [64 + (K-1)*dil rows x 64 c] |
//                   rows of 128 bytes, swizzled;  tap k starts at row (K-1-k)*dil of x
//   step i          wait for stage i | queue its products | add up dy for db |
//                   wait for products i - 1 and free its stage | thread 0: refill that of i - 2
//
// Barriers: `full` as above. `empty`: thread 0 waits until all warps have multiplied a stage, and
// added it up, before the copy overwrites it.
// Every sum is added in an order that only the shape and the GPU decide.
// Tried and dropped: slabs as clusters that add their sums through distributed shared memory,
// training at 29.0 M bytes/s for 30.0 M (32x1024); copies of dy shared by a cluster, 67.3 -> 69.9
// us; a warpgroup that copies and hands its registers over, because ptxas then keeps to 128
// registers and m64n256 needs more.

enum {
    DY_PART = SUM_TILE * 128,  // bytes: 64 columns of dy in a stage
    MAX_TILE_O = 256,
    WEIGHT_LEAST_SLOTS = 3,  // one stage is multiplied, one freed, one on its way
    WEIGHT_LEAST_STEPS = 4,  // of a slab, where there are several
    ADD_COLUMNS = 64,        // float4 that a block of the second kernel makes
    ADD_WAYS = 4,            // threads that share the slabs of one
};

typedef struct {
    CUtensorMap x, dy;  // (C,T,B) and (O,T,B), innermost first
    float *dw, *db;
    int dil, x_rows;  // rows of x in a stage
} WeightSum;
typedef struct {
    WeightSum job[MAX_WEIGHT_JOBS];
    float4 *part;    // (job, o tile, group, slab, pieces, threads): the accumulators as they stand
    float *db_part;  // (job, slab, O)
    int C, O, K, steps_per_seq, steps, slabs, groups, o_tiles, slots, x_bytes;
} WeightArgs;
static_assert(sizeof(WeightArgs) <= 4096, "what a kernel's arguments may take before CUDA 12.1");

#ifdef HAVE_WGMMA
// Sends for step `step` of all, as the ring's `slot`.
template <int CHUNKS, int TILE_O>
INLINE void copy_step(const WeightArgs *a, const WeightSum *job, uint32_t ring, int stage_bytes,
                      int halo, int step, int slot, int group, int o_tile) {
    enum { PARTS = TILE_O / 64, DY_BYTES = PARTS * DY_PART };
    const uint32_t stage = ring + slot * stage_bytes;
    const uint32_t full = ring + a->slots * stage_bytes + 8 * slot;
    const int b = step / a->steps_per_seq, t0 = step % a->steps_per_seq * SUM_TILE;
    mbarrier_expect(full, DY_BYTES + CHUNKS * job->x_rows * 128);
    for (int c = 0; c < CHUNKS; c++)
        tensor_copy(stage + DY_BYTES + c * a->x_bytes, &job->x, full, (group * CHUNKS + c) * 64,
                    t0 - halo, b);
    for (int o = 0; o < PARTS; o++)
        tensor_copy(stage + o * DY_PART, &job->dy, full, o_tile * TILE_O + o * 64, t0, b);
}

// The products of one stage. x, dy: its operands.
template <int TILE_O>
INLINE void multiply_step(float *acc, Operand x, Operand dy, bool add) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < SUM_TILE / 16; s++) {
        Operand x_s = operand_at(x, s * 2048), dy_s = operand_at(dy, s * 2048);
        wgmma<TILE_O, 1, 1>(acc, x_s, dy_s, add | s);
    }
    wgmma_commit();
}

// db: the groups of a slab share out dy's parts of 64 columns; eight warps add 8 rows each, a lane
// two neighbouring columns. The copy engine has permuted a row's 16-byte units by its number.
template <int PARTS>
INLINE void sum_dy(float2 sum[PARTS], const char *stage, int group, int groups, int warp,
                   int lane) {
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
        if (warp >= 8 || group + n * groups >= PARTS) break;
        const char *dy = stage + (group + n * groups) * DY_PART + warp * 8 * 128;
#pragma unroll
        for (int row = 0; row < 8; row++) {
            uint32_t w = *(const uint32_t *)(dy + row * 128 + ((lane * 4) ^ (row * 16)));
            sum[n].x += low(w), sum[n].y += high(w);
        }
    }
}
// The eight warps' sums of a column meet in shared memory, where one warp a part adds them up: that
// is the slab's sum, for db or for the second kernel.
template <int PARTS>
INLINE void finish_dy_sum(const WeightArgs *a, float2 *sums, const float2 sum[PARTS], int job_n,
                          int o0, int group, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < PARTS; n++)
        if (warp < 8) sums[(n * 8 + warp) * 32 + lane] = sum[n];
    __syncthreads();  // all eight are written before one warp adds them
    const int part = group + warp * a->groups, o = o0 + part * 64 + 2 * lane;
    float *db = a->job[job_n].db;
    if (warp >= PARTS || part >= PARTS || o >= a->O || !db) return;
    float2 total = {0, 0};
    for (int i = 0; i < 8; i++) {
        total.x += sums[(warp * 8 + i) * 32 + lane].x;
        total.y += sums[(warp * 8 + i) * 32 + lane].y;
    }
    if (a->slabs > 1)
        *(float2 *)(a->db_part + ((size_t)job_n * a->slabs + blockIdx.y) * a->O + o) = total;
    else
        db[o] += total.x, db[o + 1] += total.y;
}

// Where in dw the first value of a thread's piece 0 lies, piece j being acc[4j..4j+3]; another two
// lie 8 rows further on, piece j 8*j columns. inside: whether those rows exist. o0: the tile's
// first column.
template <int TAPS, int CHUNKS>
INLINE float *weight_at(const WeightArgs *a, const WeightSum *job, int group, int o0, int thread,
                        bool inside[2]) {
    const int tap = thread / 128 % TAPS, chunk = thread / 128 / TAPS, lane = thread % 32;
    const int c = (group * CHUNKS + chunk) * 64 + thread % 128 / 32 * 16 + lane / 4;
    inside[0] = c < a->C, inside[1] = c + 8 < a->C;
    return job->dw + ((size_t)tap * a->C + c) * a->O + o0 + 2 * (lane % 4);
}
// dw += the sums. A batch, as large as registers allow, is read before any of it is written, so
// that not each waits for memory alone. left: columns of dw from the tile's first on.
template <int PIECES>
INLINE void add_to_weights(float *dw, const bool inside[2], size_t O, int left, const float *acc) {
    enum { BATCH = PIECES == 8 ? 8 : 4 };
    static_assert(PIECES % BATCH == 0, "batches are whole");
    float *dw8 = dw + 8 * O;
#pragma unroll
    for (int n = 0; n < PIECES; n += BATCH) {
        float2 old[BATCH], old8[BATCH];
#pragma unroll
        for (int j = n; j < n + BATCH; j++) {
            if (8 * j < left && inside[0]) old[j - n] = *(const float2 *)(dw + 8 * j);
            if (8 * j < left && inside[1]) old8[j - n] = *(const float2 *)(dw8 + 8 * j);
        }
#pragma unroll
        for (int j = n; j < n + BATCH; j++) {
            float2 v = make_float2(old[j - n].x + acc[4 * j], old[j - n].y + acc[4 * j + 1]);
            float2 v8 = make_float2(old8[j - n].x + acc[4 * j + 2], old8[j - n].y + acc[4 * j + 3]);
            if (8 * j < left && inside[0]) *(float2 *)(dw + 8 * j) = v;
            if (8 * j < left && inside[1]) *(float2 *)(dw8 + 8 * j) = v8;
        }
    }
}
#endif

// Grid: x groups of 64*CHUNKS channels c, y slabs, z (job, tile of TILE_O channels o).
template <int TAPS, int CHUNKS, int TILE_O>
__global__ void __launch_bounds__(TAPS *CHUNKS * 128, 1)
    weight_wgmma(const __grid_constant__ WeightArgs a) {
#ifdef HAVE_WGMMA
    enum { WARPS = TAPS * CHUNKS * 4, PARTS = TILE_O / 64, DY_BYTES = PARTS * DY_PART };
    enum { THREADS = WARPS * 32, PIECES = TILE_O / 8 };
    static_assert(WARPS >= 8, "so many add up dy");
    extern __shared__ __align__(1024) char smem[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    const int group = blockIdx.x, job_n = blockIdx.z / a.o_tiles, o_tile = blockIdx.z % a.o_tiles;
    const WeightSum *job = &a.job[job_n];
    const int stage_bytes = DY_BYTES + CHUNKS * a.x_bytes, halo = (a.K - 1) * job->dil;
    const uint32_t ring = shared_addr(smem), full = ring + a.slots * stage_bytes;
    const uint32_t empty = full + 8 * MAX_SLOTS;
    const int begin = (int)((int64_t)a.steps * blockIdx.y / a.slabs);
    const int end = (int)((int64_t)a.steps * (blockIdx.y + 1) / a.slabs);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.slots; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, WARPS);
        }
        mbarrier_init_fence();
    }
    if (threadIdx.x == 0) {
        map_prefetch(&job->x);
        map_prefetch(&job->dy);
    }
    __syncthreads();      // no copy and no arrival may reach a barrier that is not set up yet
    wait_for_previous();  // before x and dy are read, and dw or the scratch is written
    let_next_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < a.slots && begin + i < end; i++)
            copy_step<CHUNKS, TILE_O>(&a, job, ring, stage_bytes, halo, begin + i, i, group,
                                      o_tile);

    const int tap = warp / 4 % TAPS, chunk = warp / 4 / TAPS;
    // A tap is the same stage of x from another row on; every warpgroup reads all of dy.
    const Operand dy_op = operand(SWIZZLE_128, ring, DY_PART, 1024);
    const Operand x_op =
        operand_at(dy_op, DY_BYTES + chunk * a.x_bytes + (halo - tap * job->dil) * 128);
    float acc[TILE_O / 2];
    float2 sum[PARTS] = {};
    Ring r = {0, 0}, refill = {0, 0};  // refill: the slot of step i - 2
    for (int i = begin; i < end; i++) {
        mbarrier_wait(full + 8 * r.slot, r.phase);
        multiply_step<TILE_O>(acc, operand_at(x_op, r.slot * stage_bytes),
                              operand_at(dy_op, r.slot * stage_bytes), i > begin);
        sum_dy<PARTS>(sum, smem + r.slot * stage_bytes, group, a.groups, warp, lane);
        if (i > begin) {
            int before = r.slot ? r.slot - 1 : a.slots - 1;
            free_slot<1>(empty + 8 * before);
        }
        ring_skip(&r, 1, a.slots);
        if (i - begin < 2) continue;
        if (threadIdx.x == 0 && i - 2 + a.slots < end) {
            mbarrier_wait(empty + 8 * refill.slot, refill.phase);
            copy_step<CHUNKS, TILE_O>(&a, job, ring, stage_bytes, halo, i - 2 + a.slots,
                                      refill.slot, group, o_tile);
        }
        __syncwarp();  // wgmma wants its warps whole
        ring_skip(&refill, 1, a.slots);
    }
    wgmma_wait<0>();
    __syncthreads();  // the ring is free for db's sums: no warp reads or multiplies in it any more
    finish_dy_sum<PARTS>(&a, (float2 *)smem, sum, job_n, o_tile * TILE_O, group, warp, lane);
    if (a.slabs > 1) {
        // As they stand in the registers, not in dw's order: neighbouring threads write
        // neighbouring 16 bytes, and the second kernel knows whose they are.
        float4 *part = a.part + threadIdx.x + (((size_t)blockIdx.z * a.groups + group) * a.slabs +
                                               blockIdx.y) * PIECES * THREADS;
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            part[j * THREADS] =
                make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    } else {
        bool inside[2];
        float *dw = weight_at<TAPS, CHUNKS>(&a, job, group, o_tile * TILE_O, threadIdx.x, inside);
        add_to_weights<PIECES>(dw, inside, a.O, a.O - o_tile * TILE_O, acc);
    }
#endif
}

// dw += the slabs' sums, always in the same order. ADD_WAYS threads share what one float4 of an
// accumulator holds: with few tiles there would else be too few loads on their way. Neighbouring
// threads read neighbouring float4.
// Bytes: slabs * 196,608 a tile of 3 x 64 x 256, written just before; then dw once read and once
// written, 786,432 bytes a layer of C = O = 256, K = 3.
// Grid: x the float4 of a tile's sums, and one more for db, y group, z (job, tile of o).
template <int TAPS, int CHUNKS, int TILE_O>
__global__ void __launch_bounds__(ADD_COLUMNS *ADD_WAYS)
    add_weight_slabs(const __grid_constant__ WeightArgs a) {
#ifdef HAVE_WGMMA
    enum { THREADS = TAPS * CHUNKS * 128, SUMS = TILE_O / 8 * THREADS };
    static_assert(SUMS % ADD_COLUMNS == 0, "no thread lies outside");
    static_assert(TILE_O <= ADD_COLUMNS * ADD_WAYS, "one block makes a tile's db");
    __shared__ float4 of_way[ADD_WAYS][ADD_COLUMNS];
    wait_for_previous();  // before the sums are read
    let_next_start();
    const int job_n = blockIdx.z / a.o_tiles, o_tile = blockIdx.z % a.o_tiles, group = blockIdx.y;
    const WeightSum *job = &a.job[job_n];
    if (blockIdx.x == SUMS / ADD_COLUMNS) {
        int o = o_tile * TILE_O + threadIdx.x;
        if (group > 0 || threadIdx.x >= TILE_O || o >= a.O || !job->db) return;
        float sum = 0;
        for (int s = 0; s < a.slabs; s++)
            sum += a.db_part[((size_t)job_n * a.slabs + s) * a.O + o];
        job->db[o] += sum;
        return;
    }
    const int column = threadIdx.x % ADD_COLUMNS, way = threadIdx.x / ADD_COLUMNS;
    const int i = blockIdx.x * ADD_COLUMNS + column, j = i / THREADS;
    bool inside[2];
    float *dw = weight_at<TAPS, CHUNKS>(&a, job, group, o_tile * TILE_O + 8 * j, i % THREADS,
                                        inside);
    if (way > 0 || o_tile * TILE_O + 8 * j >= a.O) inside[0] = inside[1] = false;
    float2 old[2] = {{0, 0}, {0, 0}};  // read now: the sums hide how long it takes
    for (int h = 0; h < 2; h++)
        if (inside[h]) old[h] = *(const float2 *)(dw + h * 8 * (size_t)a.O);
    const float4 *part = a.part + ((size_t)blockIdx.z * a.groups + group) * a.slabs * SUMS + i;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int s = way; s < a.slabs; s += ADD_WAYS) {
        float4 p = part[(size_t)s * SUMS];
        sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
    }
    of_way[way][column] = sum;
    __syncthreads();  // all ways' sums are there before the first adds them
    if (way > 0) return;
    for (int n = 1; n < ADD_WAYS; n++) {
        float4 p = of_way[n][column];
        sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
    }
    if (inside[0]) *(float2 *)dw = make_float2(old[0].x + sum.x, old[0].y + sum.y);
    dw += 8 * (size_t)a.O;
    if (inside[1]) *(float2 *)dw = make_float2(old[1].x + sum.z, old[1].y + sum.w);
#endif
}

// ---- Rung 5's launchers

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found through the runtime, so that programs start without libcuda. NULL:
// a driver from before CUDA 12.
static EncodeTiled encode_tiled(void) {
    static void *function;
    if (function) return (EncodeTiled)function;
    cudaDriverEntryPointQueryResult found;
    cudaError_t code;
#if CUDART_VERSION >= 12050
    code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                            cudaEnableDefault, &found);
#else
    code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (code != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();  // the rung below is the answer: no later launch must find this error
        function = NULL;
    }
    return (EncodeTiled)function;
}

static bool have_wgmma(void) {
    static int known = -1;
    if (known < 0)
        known = gpu()->capability == 90 &&
                compiled_for((const void *)conv_wgmma<false, 3, 128>) == 90 && encode_tiled();
    return known;
}

// A bf16 tensor (n2,n1,n0), of which boxes of b1 rows of b0 values are copied, b0 = 32 or 64.
// false where the driver refuses, which is noted.
static bool make_map(CUtensorMap *map, const void *base, size_t n0, size_t n1, size_t n2, int b0,
                     int b1) {
    cuuint64_t dims[3] = {n0, n1, n2}, strides[2] = {n0 * sizeof(bf16), n0 * n1 * sizeof(bf16)};
    cuuint32_t box[3] = {(cuuint32_t)b0, (cuuint32_t)b1, 1}, steps[3] = {1, 1, 1};
    CUresult r = encode_tiled()(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, dims, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        b0 == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    // The driver's codes for the errors that it has here are those of the runtime.
    if (r != CUDA_SUCCESS) gpu_note((cudaError_t)r, "a convolution's tensor map");
    return r == CUDA_SUCCESS;
}

// overlap: as a dependent launch. Recorded into a graph that is an edge, which CUDA 12.3 brought.
// The caller's LAUNCHED finds what went wrong.
static void launch(const void *kernel, dim3 grid, int threads, size_t shared, void *args,
                   bool overlap) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = overlap && CUDART_VERSION >= 12030;
    cudaLaunchConfig_t c = cudaLaunchConfig_t();
    c.gridDim = grid;
    c.blockDim = dim3((unsigned)threads);
    c.dynamicSmemBytes = shared;
    c.stream = gpu_stream;
    c.attrs = &attribute;
    c.numAttrs = 1;
    void *argv[1] = {args};
    (void)cudaLaunchKernelExC(&c, kernel, argv);
}

// Slots of the ring, 0 where the kernel does not apply. n_in: channels summed over. Fewer than
// three would leave nothing on its way while one stage is multiplied and one freed.
static int conv_slots(ConvShape s, int n_in, int n_out, int tile_o) {
    enum { LEAST_SLOTS = 3 };
    if (s.K > 3 || n_in % 8 || n_out % 8 || (s.K - 1) * s.dil > MAX_HALO) return 0;
    int weights = s.K * (int)ceil_div(n_in, CHUNK_C), rows = SUM_TILE + (s.K - 1) * s.dil;
    if (weights > MAX_WEIGHTS) return 0;
    int left = SHARED_BYTES - BARRIER_BYTES - weights * CHUNK_BYTES * tile_o;
    int slots = left / ((int)ceil_div(rows, 8) * 8 * step_channels(tile_o) * 2);
    return slots < LEAST_SLOTS ? 0 : slots > MAX_SLOTS ? MAX_SLOTS : slots;
}
static bool wgmma_takes(ConvShape s, int n_in, int n_out) {
    return have_wgmma() && conv_slots(s, n_in, n_out, 128) > 0;  // the tile with more weights
}

bool tensor_supported(ConvShape s) {
    return wgmma_takes(s, s.C, s.O) && wgmma_takes(s, s.O, s.C);
}

template <bool BACKWARD, int TAPS, int TILE_O>
static void conv_launch(const ConvEnd &end, const void *x, const bf16 *w, ConvShape s,
                        bool settled) {
    static bool prepared;
    const void *kernel = (const void *)conv_wgmma<BACKWARD, TAPS, TILE_O>;
    ConvArgs a;
    memset(&a, 0, sizeof a);
    a.end = end;
    a.T = s.T;
    a.dil = s.dil;
    a.n_in = BACKWARD ? s.O : s.C;
    a.n_out = BACKWARD ? s.C : s.O;
    a.tiles_per_seq = (int)ceil_div(s.T, SUM_TILE);
    a.tiles = s.B * a.tiles_per_seq;
    a.slots = conv_slots(s, a.n_in, a.n_out, TILE_O);
    a.stage_rows = SUM_TILE + (s.K - 1) * s.dil;
    const int step = step_channels(TILE_O);
    a.stage_bytes = (int)ceil_div(a.stage_rows, 8) * 8 * step * 2;  // swizzling: groups of 8 rows
    if (!make_map(&a.x, x, (size_t)a.n_in, (size_t)s.T, (size_t)s.B, step, a.stage_rows) ||
        !make_map(&a.w, w, (size_t)s.O, (size_t)s.C, (size_t)s.K,
                  !BACKWARD && TILE_O < 64 ? TILE_O : 64, BACKWARD && TILE_O < 64 ? TILE_O : 64))
        return;
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
    prepared = true;
    size_t shared = (size_t)s.K * ceil_div(a.n_in, CHUNK_C) * CHUNK_BYTES * TILE_O +
                    (size_t)a.slots * a.stage_bytes + BARRIER_BYTES;
    // One block to a multiprocessor; and no more than gives the busiest as many tiles as it has.
    // 16384 rows, two parts: 66 columns of blocks for 256 tiles give the busiest 4, so do 64.
    int parts = (int)ceil_div(a.n_out, TILE_O), most = gpu()->sms / parts;
    size_t busiest = ceil_div(a.tiles, most > 0 ? most : 1);
    launch(kernel, dim3((unsigned)(ceil_div(a.tiles, busiest) * parts)), CONV_THREADS, shared, &a,
           settled);
    LAUNCHED(BACKWARD ? "conv_wgmma backward" : "conv_wgmma forward", conv_flops(s),
             BACKWARD ? backward_bytes(end, s) : forward_bytes(end, s));
}

template <bool BACKWARD, int TILE_O>
static void conv_taps(const ConvEnd &end, const void *x, const bf16 *w, ConvShape s,
                      bool settled) {
    if (s.K == 1) conv_launch<BACKWARD, 1, TILE_O>(end, x, w, s, settled);
    if (s.K == 2) conv_launch<BACKWARD, 2, TILE_O>(end, x, w, s, settled);
    if (s.K == 3) conv_launch<BACKWARD, 3, TILE_O>(end, x, w, s, settled);
}
template <bool BACKWARD>
static void conv_tiles(const ConvEnd &end, const void *x, const bf16 *w, ConvShape s,
                       bool settled) {
    size_t tiles = s.B * ceil_div(s.T, SUM_TILE);
    // Where each block finds a multiprocessor: for C = 256 and 132 of them up to 16 tiles, 1024
    // rows. It fetches 49,152 bytes of weights, not 196,608.
    if (tiles * ceil_div(BACKWARD ? s.C : s.O, 32) <= (size_t)gpu()->sms)
        conv_taps<BACKWARD, 32>(end, x, w, s, settled);
    else
        conv_taps<BACKWARD, 128>(end, x, w, s, settled);
}

static void conv_forward_wgmma(act *out, act *pre, const act *x, const real *w, const real *b,
                               const act *res, Dropout drop, ConvShape s, void *work) {
    ConvEnd end = forward_end(out, pre, b, res, drop);
    const bf16 *weights = NULL;
    if (wgmma_takes(s, s.C, s.O)) weights = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (weights && all_aligned(&end, x, weights))
        conv_tiles<false>(end, x, weights, s, weights != work);
    else
        conv_forward_mma(out, pre, x, w, b, res, drop, s, work);
}

static void conv_backward_input_wgmma(act *dx, act *pre, act *da, const act *dy, const real *w,
                                      float scale, ConvShape s, bool accumulate, void *work) {
    ConvEnd end = backward_end(dx, pre, da, scale, accumulate);
    const bf16 *weights = NULL;
    if (wgmma_takes(s, s.O, s.C)) weights = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (weights && all_aligned(&end, dy, weights))
        conv_tiles<true>(end, dy, weights, s, weights != work);
    else
        conv_backward_input_mma(dx, pre, da, dy, w, scale, s, accumulate, work);
}

// Bytes of scratch that partial sums may take: those of a wide tile for every multiprocessor, but
// of fewer on few rows, where 26 MB would be more than all activations.
static size_t weight_scratch(size_t N, int K) {
    enum { FEW_ROWS = 4096, FEW_BLOCKS = 64 };
    size_t blocks = (size_t)gpu()->sms;
    if (N <= FEW_ROWS && blocks > FEW_BLOCKS) blocks = FEW_BLOCKS;
    return blocks * ((K < 3 ? 2 : 3) * 64 + 1) * MAX_TILE_O * sizeof(float);
}

// How n layers' weight gradients are made: with which tile, its ring, and in how many slabs.
typedef struct {
    int slots, x_bytes, slabs;
    size_t tiles, stage;  // stage: bytes
    double cycles;        // what the launch may take; infinite where the ring is too small
} WeightPlan;

// Cycles of a launch: products or copies, whichever is slower, then the sums' way into dw. These
// are estimates that rank plans. L2_RATE, bytes a cycle for a multiprocessor, is fitted so that
// they rank 5 to 64 slabs of 16384 and 32768 rows as an H100 does.
static double weight_cycles(const WeightPlan *p, size_t sums, size_t steps, size_t slabs) {
    enum { PRODUCTS = 2048, L2_RATE = 30, SECOND_KERNEL = 4000 };  // the first two: a cycle
    const size_t sms = (size_t)gpu()->sms, blocks = p->tiles * slabs;
    double bytes = (double)sums * sizeof(float), products = (double)sums * SUM_TILE / PRODUCTS;
    double copies = (double)(p->stage * (blocks < sms ? blocks : sms)) / (double)(L2_RATE * sms);
    double cycles = (double)ceil_div(steps, slabs) * (products > copies ? products : copies);
    if (slabs == 1) return (cycles + 2 * bytes / L2_RATE) * (double)ceil_div(blocks, sms);
    double second = SECOND_KERNEL + (double)blocks * bytes / (double)(L2_RATE * sms);
    return cycles + bytes / L2_RATE + second;
}

// The best number of slabs for a tile: all blocks run at a time, and no slab has few rows. Few are
// left to choose from (at most 132 / tiles on an H100), so all are counted.
static WeightPlan weight_plan(const WeightJob *jobs, int n, ConvShape s, int chunks, int tile_o) {
    WeightPlan p = {0, 0, 1, 0, 0, INFINITY};
    for (int i = 0; i < n; i++) {
        int bytes = (int)ceil_div(SUM_TILE + (s.K - 1) * jobs[i].dil, 8) * 8 * 128;
        if (bytes > p.x_bytes) p.x_bytes = bytes;
    }
    p.stage = (size_t)(SUM_TILE * 2 * tile_o + chunks * p.x_bytes);
    p.slots = (int)((SHARED_BYTES - BARRIER_BYTES) / p.stage);
    if (p.slots > MAX_SLOTS) p.slots = MAX_SLOTS;
    p.tiles = n * ceil_div(s.C, 64 * chunks) * ceil_div(s.O, tile_o);
    const size_t sums = (size_t)s.K * chunks * 64 * tile_o;
    const size_t steps = s.B * ceil_div(s.T, SUM_TILE);
    const size_t rows = (size_t)s.B * s.T;
    size_t most = rows / (WEIGHT_LEAST_STEPS * SUM_TILE);
    if (most > gpu()->sms / p.tiles) most = gpu()->sms / p.tiles;
    size_t slab = p.tiles * (sums + tile_o) * sizeof(float), scratch = weight_scratch(rows, s.K);
    if (most > scratch / slab) most = scratch / slab;
    if (p.slots < WEIGHT_LEAST_SLOTS) return p;
    for (size_t slabs = 1; slabs == 1 || slabs <= most; slabs++) {
        double cycles = weight_cycles(&p, sums, steps, slabs);
        if (cycles < p.cycles) p.slabs = (int)slabs, p.cycles = cycles;
    }
    return p;
}
static_assert((SHARED_BYTES - BARRIER_BYTES) / (DY_PART + (SUM_TILE + MAX_HALO) * 128) >=
                  WEIGHT_LEAST_SLOTS,
              "the narrow tile's ring always fits");

template <int TAPS, int CHUNKS, int TILE_O>
static void weight_launch(const WeightJob *jobs, int n, ConvShape s, const WeightPlan *plan,
                          void *work) {
    enum { THREADS = TAPS * CHUNKS * 128, SUMS = TILE_O / 8 * THREADS };  // float4 of a block
    static bool prepared;
    const void *kernel = (const void *)weight_wgmma<TAPS, CHUNKS, TILE_O>;
    WeightArgs a;
    memset(&a, 0, sizeof a);
    a.C = s.C, a.O = s.O, a.K = s.K, a.slabs = plan->slabs, a.x_bytes = plan->x_bytes;
    for (int i = 0; i < n; i++) {
        WeightSum *job = &a.job[i];
        job->dw = jobs[i].dw, job->db = jobs[i].db, job->dil = jobs[i].dil;
        job->x_rows = SUM_TILE + (s.K - 1) * job->dil;
        if (!make_map(&job->x, jobs[i].x, (size_t)s.C, (size_t)s.T, (size_t)s.B, 64,
                      job->x_rows) ||
            !make_map(&job->dy, jobs[i].dy, (size_t)s.O, (size_t)s.T, (size_t)s.B, 64, SUM_TILE))
            return;
    }
    a.steps_per_seq = (int)ceil_div(s.T, SUM_TILE);
    a.steps = s.B * a.steps_per_seq;
    a.groups = (int)ceil_div(s.C, 64 * CHUNKS);
    a.o_tiles = (int)ceil_div(s.O, TILE_O);
    a.part = (float4 *)work;
    a.db_part = (float *)(a.part + plan->tiles * a.slabs * SUMS);
    // No more slots than steps: what is left is the next kernel's, whose blocks may come early.
    int most = (int)ceil_div(a.steps, a.slabs);
    a.slots = plan->slots < most ? plan->slots : most;
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
    prepared = true;
    unsigned jobs_tiles = (unsigned)(n * a.o_tiles);
    launch(kernel, dim3((unsigned)a.groups, (unsigned)a.slabs, jobs_tiles), THREADS,
           a.slots * plan->stage + BARRIER_BYTES, &a, true);
    LAUNCHED("weight_wgmma", n * conv_flops(s), n * weight_bytes(s, sizeof(bf16), a.slabs));
    if (a.slabs == 1) return;
    launch((const void *)add_weight_slabs<TAPS, CHUNKS, TILE_O>,
           dim3(SUMS / ADD_COLUMNS + 1, (unsigned)a.groups, jobs_tiles), ADD_COLUMNS * ADD_WAYS, 0,
           &a, true);
    LAUNCHED("add_weight_slabs", 0, n * slabs_bytes(s, a.slabs));
}

// Launches with the wide tile, or with the narrow one of 64 channels o.
template <int TAPS, int NARROW_CHUNKS, int CHUNKS, int TILE_O>
static void weight_tile(const WeightJob *jobs, int n, ConvShape s, void *work) {
    WeightPlan narrow = weight_plan(jobs, n, s, NARROW_CHUNKS, 64);
    WeightPlan wide = weight_plan(jobs, n, s, CHUNKS, TILE_O);
    if (narrow.cycles < wide.cycles)
        weight_launch<TAPS, NARROW_CHUNKS, 64>(jobs, n, s, &narrow, work);
    else
        weight_launch<TAPS, CHUNKS, TILE_O>(jobs, n, s, &wide, work);
}

static void conv_backward_weight_wgmma(const WeightJob *jobs, int n, ConvShape s, void *work) {
    bool takes = have_wgmma() && s.K <= 3 && s.C % 8 == 0 && s.O % 8 == 0 && aligned16(work);
    for (int i = 0; i < n; i++)
        takes = takes && (s.K - 1) * jobs[i].dil <= MAX_HALO && aligned16(jobs[i].x) &&
                aligned16(jobs[i].dy) && aligned16(jobs[i].dw);
    if (!takes) {
        conv_backward_weight_mma(jobs, n, s, work);
        return;
    }
    // Layers that fill the GPU alone gain nothing from company. (256 channels: 4 tiles a layer.)
    size_t tiles = ceil_div(s.C, 64) * ceil_div(s.O, MAX_TILE_O);
    int at_once = n * tiles <= (size_t)gpu()->sms ? n : 1;
    for (int i = 0; i < n; i += at_once) {
        if (s.K == 1) weight_tile<1, 2, 2, 256>(jobs + i, at_once, s, work);
        if (s.K == 2) weight_tile<2, 1, 2, 128>(jobs + i, at_once, s, work);
        if (s.K == 3) weight_tile<3, 1, 1, 256>(jobs + i, at_once, s, work);
    }
}

// ---- Scratch, and the table

// The most that the launchers above take for N rows, at most K taps and `width` channels: partial
// sums, whose tiles, slabs and layers are at most `blocks` in product, or weights in bf16. Of wgmma
// `tiles` are as large as a block's registers hold; the narrow are more, but no more bytes.
size_t tensor_work_bytes(size_t N, int K, int width) {
    size_t w = (size_t)width, bytes = (size_t)K * w * w * sizeof(bf16);
    size_t slabs = ceil_div(N, 256), tiles = mma_tiles(K, width, width), blocks = tiles * slabs;
    if (blocks > MMA_BLOCKS) blocks = tiles > MMA_BLOCKS ? tiles : (size_t)MMA_BLOCKS;
    size_t mma_bytes = blocks * (MMA_TILE * MMA_TILE + MMA_TILE) * sizeof(float);
    if (bytes < mma_bytes) bytes = mma_bytes;
    slabs = N / (WEIGHT_LEAST_STEPS * SUM_TILE);
    if (!have_wgmma() || slabs < 2) return bytes;
    tiles = ceil_div(w, 64) * ceil_div(w, 128), blocks = tiles * slabs * MAX_WEIGHT_JOBS;
    size_t wgmma_bytes = blocks * ((K < 3 ? 2 : 3) * 64 + 1) * MAX_TILE_O * sizeof(float);
    if (wgmma_bytes > weight_scratch(N, K)) wgmma_bytes = weight_scratch(N, K);
    return bytes < wgmma_bytes ? wgmma_bytes : bytes;
}

const Kernel tensor_kernels[] = {
    KERNEL(bf16, conv_forward, conv_forward_mma, "", "mma.sync, tiles of 64x64, cp.async"),
    KERNEL(bf16, conv_forward, conv_forward_wgmma, "tensor", "weights stay in shared memory"),
    KERNEL(bf16, conv_backward_input, conv_backward_input_mma, "", "the same, looking ahead"),
    KERNEL(bf16, conv_backward_input, conv_backward_input_wgmma, "tensor",
           "weights stay in shared memory"),
    KERNEL(bf16, conv_backward_weight, conv_backward_weight_mma, "", "mma.sync, slabs of time"),
    KERNEL(bf16, conv_backward_weight, conv_backward_weight_wgmma, "tensor",
           "a warpgroup per tap, several layers at once"),
};
const int n_tensor_kernels = sizeof tensor_kernels / sizeof *tensor_kernels;
