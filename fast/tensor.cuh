// tensor.cuh: what the convolutions on tensor cores share (conv_mma.cu, conv_wgmma.cu,
// weight_wgmma.cu): bf16 in registers, dropout's bits and the epilogue for eight channels of two
// rows, the questions which rung runs here, and a launch. Read conv_kernels.cu first, for the three
// products and how a tap is only another row address, then support/device.cuh.
//
// A rung that cannot take a shape calls the rung below it: wgmma calls mma, mma calls block
// (conv_kernels.cu), which takes everything.
#ifndef TENSOR_CUH
#define TENSOR_CUH

#include "support/device.cuh"

// What the architecture being compiled has. (In the host's pass: all, for its checks of syntax.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAVE_MMA 1
#endif

// Arrays that are arguments of these functions stay in registers only if the functions are inlined.
#define INLINE static __device__ __forceinline__

// ---- The rungs' launchers, for the rungs above them and for the table in conv_wgmma.cu ----------

bool have_mma(void);  // this GPU has tensor cores for bf16, and code for them was built
bool mma_takes(ConvShape s);
void conv_forward_mma(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                      void *work);
void conv_backward_input_mma(const act *dy, const real *w, Epilogue e, ConvShape s, void *work);
void conv_backward_weight_mma(const WeightJob *jobs, int n, ConvShape s, void *work);
bool linear_wgmma_takes(ConvShape s);
void conv_forward_linear(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                         void *work);
void conv_backward_input_linear(const act *dy, const real *w, Epilogue e, ConvShape s, void *work);
void conv_backward_weight_wgmma(const WeightJob *jobs, int n, ConvShape s, void *work);
// Bytes of workspace for the partial sums of the two rungs' weight gradients, on N rows with at
// most K taps and `width` channels.
size_t mma_work_bytes(size_t N, int K, int width);
size_t weight_wgmma_work_bytes(size_t N, int K, int width);

// ---- bf16 in registers --------------------------------------------------------------------------

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

// ---- Dropout for eight channels of two rows -----------------------------------------------------

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
// v, with `value` for what is not kept of group g.
INLINE uint4 drop8(uint4 v, uint32_t kept, int g, float value) {
    const uint32_t dropped = (__float_as_uint(value) >> 16) * 0x10001u;  // bf16, twice
    const uint32_t lo = kept << (7 - 2 * g), hi = kept << (6 - 2 * g);
    const uint32_t keep[4] = {spread<0>(lo), spread<2>(lo), spread<0>(hi), spread<2>(hi)};
    v.x = (v.x & keep[0]) | (dropped & ~keep[0]);
    v.y = (v.y & keep[1]) | (dropped & ~keep[1]);
    v.z = (v.z & keep[2]) | (dropped & ~keep[2]);
    v.w = (v.w & keep[3]) | (dropped & ~keep[3]);
    return v;
}

// ---- The epilogue on eight channels of two rows -------------------------------------------------
//
// Eight channels of two rows that lie 8 apart: so both rungs' matrix instructions leave the sums in
// a thread. They are 16 bytes of bf16 each, and one draw of dropout serves both rows. In all
// functions here:
//   v[h], h = 0, 1   eight sums of row r and of row r + 8, rounded to bf16, the bias included
//   i                element of v[0] in an array (N, width)
//   inside[h]        whether that row exists
//   input[h]         what the array epilogue_input holds there, or zeros
//   f                the activation. The kernels ask for it once a tile (conv_wgmma.cu) or once for
//                    the eight channels (conv_mma.cu); in the loops over them it is a constant.

// The array that the epilogue reads beside the sums. It is read before the sums are there: while
// they are computed its values come from memory. NULL: none.
template <bool BACKWARD>
INLINE const bf16 *epilogue_input(const Epilogue *e) {
    const act *input = e->residual;
    if (BACKWARD) input = e->pre ? e->pre : e->accumulate ? e->dx : NULL;
    return (const bf16 *)input;
}

INLINE void store2(act *array, const uint4 v[2], const bool inside[2], size_t i, int width) {
    bf16 *dst = (bf16 *)array;
    // An ordinary store each; written as one nvcc makes some of them four of 4 bytes.
    if (inside[0]) __stwb((uint4 *)(dst + i), v[0]);
    if (inside[1]) __stwb((uint4 *)(dst + i + 8 * (size_t)width), v[1]);
}
INLINE void load2(uint4 v[2], const act *array, const bool inside[2], size_t i, int width) {
    const bf16 *src = (const bf16 *)array;
    v[0] = v[1] = make_uint4(0, 0, 0, 0);
    if (inside[0]) v[0] = *(const uint4 *)(src + i);
    if (inside[1]) v[1] = *(const uint4 *)(src + i + 8 * (size_t)width);
}

// out = residual + scale * f(pre), of pre as it is stored: backward will read the same.
template <Activation f>
INLINE void outputs8(uint4 v[2], const uint4 residual[2], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float y[8], r[8];
        unpack8(v[h], y);
        unpack8(residual[h], r);
        for (int j = 0; j < 8; j++) y[j] = r[j] + scaled_value(f, y[j], scale, bf16());
        v[h] = pack8(y);
    }
}

// kept: of draw_kept_rows, whose group g this is.
template <Activation f>
INLINE void epilogue_forward8(const Epilogue *e, uint4 v[2], const uint4 residual[2],
                              const uint32_t kept[2], int g, const bool inside[2], size_t i,
                              int width) {
    if (e->drop.threshold != 0)
        for (int h = 0; h < 2; h++) v[h] = drop8(v[h], kept[h], g, act_dropped(f));
    if (e->pre) store2(e->pre, v, inside, i, width);
    if (!e->out) return;
    outputs8<f>(v, residual, e->drop.scale);
    store2(e->out, v, inside, i, width);
}

// forward:  out = scale * f(pre)      dpre = dout * scale * f'(pre), and out is recomputed
// g is dout, eight channels of one row; *pre becomes out.
template <Activation f>
INLINE uint4 gradients8(float g[8], uint4 *pre, float scale) {
    float y[8];
    unpack8(*pre, y);
    for (int j = 0; j < 8; j++) {
        float slope;
        y[j] = scaled_value_and_slope(f, y[j], scale, &slope, bf16());
        g[j] *= slope;
    }
    *pre = pack8(y);
    return pack8(g);
}

// input is pre, and the dx to add to is read only here; or, without pre, input is that dx. All
// arrays are read and written by this thread alone, so dx and pre may change in place without a
// barrier. Bytes a value: 2 for each of dx read, dx, pre read, pre and out that is there.
template <Activation f>
INLINE void epilogue_backward8(const Epilogue *e, uint4 v[2], uint4 input[2],
                               const bool inside[2], size_t i, int width) {
    const bool on = e->pre != NULL;  // on through the activation below
    uint4 old[2] = {input[0], input[1]};
    if (e->accumulate && on) load2(old, e->dx, inside, i, width);
    uint4 dpre[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float g[8], y[8];
        unpack8(v[h], g);
        if (e->accumulate) {
            unpack8(old[h], y);
            for (int j = 0; j < 8; j++) g[j] += y[j];
            v[h] = pack8(g);
        }
        if (on) dpre[h] = gradients8<f>(g, &input[h], e->drop.scale);
    }
    if (e->dx) store2(e->dx, v, inside, i, width);
    if (on) store2(e->pre, dpre, inside, i, width);
    if (on && e->out) store2(e->out, input, inside, i, width);
}

// The address of p in this block's shared memory, as instructions take it. (volatile, because nvcc
// would otherwise compute it anew in every loop.)
INLINE uint32_t shared_addr(const void *p) {
    uint64_t a;
    asm volatile("cvta.to.shared.u64 %0, %1;" : "=l"(a) : "l"(p));
    return (uint32_t)a;
}

// ---- Ampere's instructions ----------------------------------------------------------------------

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
// Loads four 8 x 8 matrices, whose lines begin where lanes 0-7, 8-15, 16-23 and 24-31 point.
// TRANSPOSE: each is transposed on its way.
template <bool TRANSPOSE>
INLINE void ldmatrix(uint32_t r[4], uint32_t addr) {
    if (TRANSPOSE)
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
#endif

// ---- On the host: the GPU, a launch -------------------------------------------------------------

static inline bool all_aligned(const Epilogue &e, const void *in, const void *w,
                               const void *bias) {
    return aligned16(e.pre) && aligned16(e.out) && aligned16(e.dx) && aligned16(e.residual) &&
           aligned16(in) && aligned16(w) && aligned16(bias);
}

// The GPU, asked once; gpu_open has been called.
static inline const GpuInfo *gpu(void) {
    static GpuInfo g;
    Error e;
    if (g.sms == 0) gpu_open(&g, &e);
    return &g;
}
// For which architecture the code was written that this GPU runs: 80 where the driver made it from
// PTX for sm_80, whatever the GPU is.
static inline int compiled_for(const void *kernel) {
    struct cudaFuncAttributes a = {};
    CHECK(cudaFuncGetAttributes(&a, kernel));
    return a.ptxVersion;
}

// One launch of a kernel whose only argument is *args, with `shared` bytes of shared memory.
// overlap: as a dependent launch. In a CUDA graph such a launch becomes an edge of a kind that came
// with CUDA 12.3. cluster: how many neighbouring blocks (x) form one. The caller's LAUNCHED finds
// what went wrong.
static inline void launch(const void *kernel, dim3 grid, int threads, size_t shared, void *args,
                          bool overlap, int cluster = 1) {
    cudaLaunchAttribute attribute[2];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed =
        overlap && CUDART_VERSION >= 12030;
    attribute[1].id = cudaLaunchAttributeClusterDimension;
    attribute[1].val.clusterDim.x = (unsigned)cluster;
    attribute[1].val.clusterDim.y = attribute[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t c = cudaLaunchConfig_t();
    c.gridDim = grid;
    c.blockDim = dim3((unsigned)threads);
    c.dynamicSmemBytes = shared;
    c.stream = gpu_stream;
    c.attrs = attribute;
    c.numAttrs = cluster > 1 ? 2 : 1;
    void *argv[1] = {args};
    (void)cudaLaunchKernelExC(&c, kernel, argv);
}
#endif
