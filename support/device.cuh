// device.cuh: what the .cu files share among themselves: the stream, launches and their counts, the
// table's macros, bf16, wide loads and stores, sums over a warp and a block, the activations as the
// GPU computes them. Read backend.h, arithmetic.h and gpu.h first. Its host functions: device.cu.
#ifndef DEVICE_CUH
#define DEVICE_CUH

#include <cuda_bf16.h>

#include "support/arithmetic.h"
#include "support/gpu.h"

// bf16: the upper half of a float32, 8 bits of mantissa. Tensor cores multiply it; activations of
// the tensor backend are stored in it, which halves their bytes. All other arithmetic is float32.
typedef __nv_bfloat16 bf16;

// Everything runs on this stream, in order. Between fork and end_fork it names the side stream
// (device.cu). Of a Backend's functions download, read_acts, error and free wait.
extern cudaStream_t gpu_stream;

// Notes an error. The first one stays until Backend.error() has reported it.
void gpu_note(cudaError_t code, const char *what);
bool gpu_has_error(void);
void gpu_forget_error(void);  // and CUDA's own note of it
#define CHECK(call) gpu_note(call, #call)
// After every launch, because a launch returns nothing to CHECK. What goes wrong while the kernel
// runs is noted by a later call. flops and bytes are what the launch has to do, counted as in
// backend.h; gpu_trace compares them with the limits. Partial sums count wherever they lie, so a
// kernel that finds its bytes in L2 may beat a copy in memory. Both are computed only while
// gpu_trace runs.
#define LAUNCHED(name, flops, bytes)                            \
    do {                                                        \
        gpu_note(cudaGetLastError(), name);                     \
        if (gpu_tracing) gpu_note_launch(name, flops, bytes);   \
    } while (0)
extern bool gpu_tracing;
void gpu_note_launch(const char *name, double flops, double bytes);

// A conv's forward epilogue as the kernels take it: scale is 1 where nothing is dropped. A plain
// linear map becomes pre alone: its sums are stored, and nothing is computed from them.
static inline Epilogue forward_epilogue(Epilogue e) {
    if (e.drop.threshold != 0) return e;
    e.drop.scale = 1;
    if (e.activation == ACT_none && !e.residual && !e.pre) e.pre = e.out, e.out = NULL;
    return e;
}
// Bytes of a conv's launch: x (or dy), the weights, and what the epilogue moves.
static inline double forward_bytes(const Epilogue &e, ConvShape s, size_t size) {
    return conv_bytes(s, size, 1, forward_arrays(e));
}
static inline double backward_bytes(const Epilogue &e, ConvShape s, size_t size) {
    return conv_bytes(s, size, backward_arrays(e), 1);
}
// Bytes of a weight gradient: x, dy, and the partial sums of every split, or dw read and written
// where there is only one split; and of the kernel that adds the splits to dw.
static inline double sums_bytes(ConvShape s) { return sizeof(float) * (double)s.K * s.C * s.O; }
static inline double weight_bytes(ConvShape s, size_t size, int splits) {
    double N = (double)s.B * s.T;
    return (double)size * N * (s.C + s.O) + (splits > 1 ? splits : 2) * sums_bytes(s);
}
static inline double splits_bytes(ConvShape s, int splits) { return (splits + 2) * sums_bytes(s); }

enum { THREADS = 256, WARPS = THREADS / 32 };  // of a block, where a file has no reason for others

// Launches that overlap (Hopper's programmatic dependent launch): a kernel's blocks may start as
// soon as all blocks of the kernel before run and are past their own wait. They wait in
// begin_dependent until that kernel is done. The overlap hides a launch, 1 to 2 us, of which a step
// has 39 (1x128) or some 90 (two passes). sync_params is launched without it; fast/conv_wgmma.cu
// says why a conv may fetch its weights early.
#if CUDART_VERSION >= 12030
#define LAUNCH(kernel, grid, block, ...)                             \
    do {                                                             \
        cudaLaunchConfig_t config = dependent_launch(grid, block);   \
        (void)cudaLaunchKernelEx(&config, kernel, __VA_ARGS__);      \
    } while (0)
cudaLaunchConfig_t dependent_launch(dim3 grid, dim3 block);
#else
#define LAUNCH(kernel, grid, block, ...) kernel<<<grid, block, 0, gpu_stream>>>(__VA_ARGS__)
#endif

// Such a kernel calls this, mostly first. Before it the kernel reads nothing that the kernel before
// writes, and itself writes nothing at all. The wait comes first, then the leave for the next
// kernel's blocks: so once those run, every kernel before this one is done. What was written two
// kernels back or earlier may therefore be read before the wait. fast/conv_wgmma.cu does so
// (weights, biases), and embed_rows_registers (gain, bias), segment_sums_tiled (ids) and begin_step
// (the step's number).
static __device__ __forceinline__ void begin_dependent() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#define NAMED_KERNEL(act_type, op, name, launcher, used_by, idea)                   \
    {#op, name, used_by, idea, sizeof(act_type), offsetof(Backend, op),             \
     (void (*)(void))static_cast<decltype(Backend::op)>(launcher)}
#define KERNEL(act_type, op, launcher, used_by, idea)                               \
    NAMED_KERNEL(act_type, op, #launcher, launcher, used_by, idea)
// Two rows of a launcher that is a template on the activations: float32 tiled, bf16 tensor.
#define KERNEL_PAIR(op, launcher, idea)                                             \
    NAMED_KERNEL(float, op, #launcher, launcher<float>, "tiled", idea),             \
    NAMED_KERNEL(bf16, op, #launcher "_bf16", launcher<bf16>, "tensor", idea ", bf16")

// The tables of the files with kernels. Each file says how much workspace its launchers take; all
// sizes in bytes, N rows of at most `width` channels, n parameters.
extern const Kernel conv_kernels[], tensor_kernels[], layer_kernels[], embed_kernels[],
    optimizer_kernels[], attention_kernels[], attention_mma_kernels[], attention_wgmma_kernels[],
    input_kernels[];
extern const int n_conv_kernels, n_tensor_kernels, n_layer_kernels, n_embed_kernels,
    n_optimizer_kernels, n_attention_kernels, n_attention_mma_kernels, n_attention_wgmma_kernels,
    n_input_kernels;
size_t attention_wgmma_work_bytes(AttentionShape s);
size_t conv_work_bytes(size_t N, int K, int width);
size_t tensor_work_bytes(size_t N, int K, int width);
size_t norm_work_bytes(size_t N, int width);
size_t embed_work_bytes(size_t N, int width);
size_t embed_product_work_bytes(size_t N, int width);  // of the backend tensor
size_t optimizer_work_bytes(size_t n);
size_t input_work_bytes(size_t N, int rows, int D);

// What a Backend does without kernels of the table: memory, the side stream, graphs, errors. Its
// activations are float32; store_bf16 changes that.
extern const Backend gpu_memory;
void store_bf16(Backend *b);

// n weights in bf16. A model's parameters have a copy in bf16, which sync_params made and optimize
// keeps up to date. Other weights (a kernel test's) are converted into work (n values) first.
const bf16 *bf16_weights(const real *w, size_t n, void *work);
// The place of *p in such a copy; NULL where there is none.
bf16 *bf16_copy(const real *p);
static_assert(sizeof(real) == sizeof(float), "the GPU computes in float32");

static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
// A grid that covers n: the last block's threads beyond n return at once.
static inline unsigned blocks_for(size_t n, size_t per_block) {
    return (unsigned)ceil_div(n, per_block);
}
static inline bool aligned16(const void *p) { return (uintptr_t)p % 16 == 0; }  // NULL is aligned

// Four neighbours as one access: 16 bytes of float32, 8 of bf16.
static inline __device__ float4 four(const float *p) { return *(const float4 *)p; }
static inline __device__ float4 four(const bf16 *p) {
    uint2 w = *(const uint2 *)p;  // the value of a bf16 is that of its bits with 16 zeros after
    return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xFFFF0000u),
                       __uint_as_float(w.y << 16), __uint_as_float(w.y & 0xFFFF0000u));
}
static inline __device__ void put_four(float *p, float4 v) { *(float4 *)p = v; }
static inline __device__ void put_four(bf16 *p, float4 v) {  // rounded to nearest, ties to even
    __nv_bfloat162 lo = __floats2bfloat162_rn(v.x, v.y), hi = __floats2bfloat162_rn(v.z, v.w);
    *(uint2 *)p = make_uint2(*(uint32_t *)&lo, *(uint32_t *)&hi);
}

// VEC: four at once, for rows whose length and address are multiples of four values. Otherwise one
// by one, and only the first `left` exist. left <= 0: none, zeros.
template <bool VEC, typename T>
static inline __device__ float4 load4(const T *p, int left) {
    if (VEC) return left > 0 ? four(p) : make_float4(0, 0, 0, 0);
    return make_float4(left > 0 ? (float)p[0] : 0, left > 1 ? (float)p[1] : 0,
                       left > 2 ? (float)p[2] : 0, left > 3 ? (float)p[3] : 0);
}
template <bool VEC, typename T>
static inline __device__ void store4(T *p, float4 v, int left) {
    if (VEC) {
        if (left > 0) put_four(p, v);
        return;
    }
    if (left > 0) p[0] = (T)v.x;
    if (left > 1) p[1] = (T)v.y;
    if (left > 2) p[2] = (T)v.z;
    if (left > 3) p[3] = (T)v.w;
}

// Eight neighbours at an address of 16 bytes.
static inline __device__ void load_eight(float v[8], const float *p) {
    *(float4 *)v = four(p);
    *(float4 *)(v + 4) = four(p + 4);
}
static inline __device__ void load_eight(float v[8], const bf16 *p) {
    uint4 w = *(const uint4 *)p;
    v[0] = __uint_as_float(w.x << 16), v[1] = __uint_as_float(w.x & 0xFFFF0000u);
    v[2] = __uint_as_float(w.y << 16), v[3] = __uint_as_float(w.y & 0xFFFF0000u);
    v[4] = __uint_as_float(w.z << 16), v[5] = __uint_as_float(w.z & 0xFFFF0000u);
    v[6] = __uint_as_float(w.w << 16), v[7] = __uint_as_float(w.w & 0xFFFF0000u);
}
static inline __device__ void store_eight(float *p, const float v[8]) {
    put_four(p, *(const float4 *)v);
    put_four(p + 4, *(const float4 *)(v + 4));
}
static inline __device__ void store_eight(bf16 *p, const float v[8]) {
    __nv_bfloat162 w[4];
    for (int j = 0; j < 4; j++) w[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
    *(uint4 *)p = *(const uint4 *)w;
}

// The sum over a warp, the same bits in every lane: in each of the five rounds both partners add
// the same two values.
static inline __device__ float warp_sum(float v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}
static inline __device__ double warp_sum(double v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

// The sum of one double per thread over a block, in thread 0: always the same tree of additions.
static inline __device__ double block_sum(double v) {
    __shared__ double warps[32];
    v = warp_sum(v);
    // In a kernel's first call this prevents nothing. In a later one: the first warp has read the
    // call before's sums before another warp writes over them.
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();  // every warp's sum is there before the first warp adds them
    return warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0);
}

// ---- The activations ----------------------------------------------------------------------------

// gelu(x) and gelu'(x) as in arithmetic.h, with one exponential and one division for both.
static inline __device__ void gelu_and_grad(float x, float *value, float *grad) {
    float clamped = fminf(fmaxf(x, -10.0f), 10.0f), square = clamped * clamped;
    float e = exp_real(-GELU_A * clamped * (1 + GELU_B * square)), s = x < -10 ? 0 : 1 / (1 + e);
    *value = x * s;
    *grad = s + clamped * s * (s * e) * (GELU_A * (1 + 3 * GELU_B * square));
}

// The same, as precise as bf16 needs it. With u = sqrt(2/pi) (x + 0.044715 x^3) of arithmetic.h:
//   scale * gelu(x) = x * s,   s = scale * sigmoid(2u) = scale/2 + scale/2 * tanh(u)
// tanh is one instruction here, right to 2^-11, which leaves the sigmoid within 2^-12; bf16 rounds
// to 2^-9. The exponential and division of gelu_value are some 25 instructions. Where x is DROPPED,
// u is -1.6e11, its tanh is -1 here, too (a check of PRE in kernel_check.c fails otherwise), and s
// is 0.
#define HALF_A (GELU_A / 2)
static inline __device__ float gelu_tanh(float x) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * (HALF_A + HALF_A * GELU_B * x * x)));
    return t;
}
static inline __device__ float scaled_gelu(float x, float scale) {
    float half = scale / 2;
    return x * (half + half * gelu_tanh(x));
}
// And its slope. Not clamped as in arithmetic.h: x*x is finite up to 1e19.
static inline __device__ float scaled_gelu_and_slope(float x, float scale, float *slope) {
    float half = scale / 2, t = gelu_tanh(x), s = half + half * t, y = x * s;
    *slope = s + y * (0.5f - 0.5f * t) * (GELU_A + 3 * GELU_A * GELU_B * x * x);
    return y;
}

// Any activation f, as precise as the values are stored: the last argument is only asked for its
// type. In float32 the value and slope of arithmetic.h; in bf16 the same but for gelu, which is the
// one above. A loop over many values asks for f once, outside: inside, with a constant for f,
// nothing of the switch is left.
//   forward:  scale * f(z)        backward:  scale * f(z) once more, and scale * f'(z)
static inline __device__ float scaled_value(Activation f, float z, float scale, float) {
    return scale * act_value(f, z);
}
static inline __device__ float scaled_value(Activation f, float z, float scale, bf16) {
    return f == ACT_gelu ? scaled_gelu(z, scale) : scale * act_value(f, z);
}
static inline __device__ float scaled_slope(Activation f, float z, float scale, float) {
    return scale * act_slope(f, z);
}
static inline __device__ void value_and_slope(Activation f, float z, float *value, float *slope) {
    if (f == ACT_gelu)
        gelu_and_grad(z, value, slope);
    else
        *value = act_value(f, z), *slope = act_slope(f, z);
}
static inline __device__ float scaled_value_and_slope(Activation f, float z, float scale,
                                                      float *slope, float) {
    float value;
    value_and_slope(f, z, &value, slope);
    *slope *= scale;
    return scale * value;
}
static inline __device__ float scaled_value_and_slope(Activation f, float z, float scale,
                                                      float *slope, bf16) {
    if (f == ACT_gelu) return scaled_gelu_and_slope(z, scale, slope);
    *slope = scale * act_slope(f, z);
    return scale * act_value(f, z);
}
static inline __device__ float scaled_slope(Activation f, float z, float scale, bf16 type) {
    float slope;
    scaled_value_and_slope(f, z, scale, &slope, type);
    return slope;
}
// z[j] becomes scale * f'(z[j]), for n values; f is asked for once for all of them.
template <int n, typename T>
static inline __device__ void scaled_slopes(float (&z)[n], Activation f, float scale, T type) {
    if (f == ACT_gelu)
        for (int j = 0; j < n; j++) z[j] = scaled_slope(ACT_gelu, z[j], scale, type);
    else
        for (int j = 0; j < n; j++) z[j] = scale * act_slope(f, z[j]);
}

// ---- Dropout ------------------------------------------------------------------------------------

// The random bits of channels o/4*4.. of row n of a pass (dropout_draw), a byte for each
// of four. (Selected, not indexed, which would send the draw through memory.)
static inline __device__ uint32_t dropout_word(const Dropout &d, size_t n, int o, int width) {
    uint64_t row = d.first + n;
    Philox r = dropout_draw(d.seed, d.purpose, d.state->step, row, o, width);
    uint32_t w0 = row & 8 ? r.v[2] : r.v[0], w1 = row & 8 ? r.v[3] : r.v[1];
    return o & 4 ? w1 : w0;
}
static inline __device__ bool dropout_takes(const Dropout &d, uint32_t word, int j) {  // byte j
    return (word >> 8 * j & 0xFF) < d.threshold;
}
#endif
