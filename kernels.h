// kernels.h: what the GPU files offer the programs (first part, plain C), and what the .cu files
// share among themselves (second part). Read model.h first.
//
// Built without CUDA what train, bench and the tests call still exists and says so in one line, so
// that no program needs an #ifdef: gpu_open fails, and there are no kernels.
#ifndef KERNELS_H
#define KERNELS_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

// One row of the kernel table, which drives dispatch, --help, the tests and ./bench.
// A backend takes, for every entry of Backend, the LAST row of that entry that names it.
// To try a kernel of one's own: write a launcher with the entry's signature, add one row
//     KERNEL(float, conv_forward, my_launcher, "", "what it tries")
// to the table at the end of its file, and run `make check-kernels`. With "tiled" for "" it also
// trains.
typedef struct {
    const char *op;       // the entry of Backend that it implements
    const char *name;     // of its launcher
    const char *used_by;  // "naive", "tiled", "naive tiled" ...; "" = a rung of the ladder only
    const char *idea;
    size_t act_bytes;      // of the activations it works on: 4 float32, 2 bf16
    size_t entry;          // offsetof(Backend, op)
    void (*launch)(void);  // cast to the type of the entry
} Kernel;

typedef struct {
    char name[96];
    int capability;  // 90 = sm_90
    int sms;         // multiprocessors
    size_t bytes, free_bytes;
    int driver, runtime;  // CUDA versions, 13000 = 13.0
} GpuInfo;

// What the launches of one kernel took, and what they had to do (LAUNCHED, below, counts it).
typedef struct {
    const char *name;
    int launches;
    double seconds, flops, bytes;
} KernelTime;
enum { MOST_KERNEL_TIMES = 64 };  // more than there are names

// What a check of one kernel found.
typedef struct {
    double error;        // worst over the outputs: |out - cpu| / |cpu|, norms over a tensor
    char where[64];      // the output that it was found in
    bool exact, passed;  // exact: small integers, compared bit for bit
    int compared;        // outputs; 0 where the operation has none that can be exact
} KernelCheck;

#if defined WITH_CUDA || defined __CUDACC__

// Takes the first GPU. 0, or -1 with one line: no driver, no device, driver too old, a GPU that
// this build has no code for. info may be NULL. To be called, or gpu_backend, before anything else
// that uses the GPU.
int gpu_open(GpuInfo *info, Error *e);

// "naive", "tiled" or "tensor"; NULL with the reason.
const Backend *gpu_backend(const char *name, Error *e);
// Their names; the last is the one to take where nobody asks: "tensor", or "tiled" on a GPU that
// has no bf16 tensor cores (gpu_open has been tried).
const char *const *gpu_backend_names(int *n);

// Bytes that the program holds on the device now. (The driver's own context is not counted.)
size_t gpu_allocated_bytes(void);

// The kernel table; works without a GPU. kernel_install puts a row into a backend.
const Kernel *gpu_kernels(int *n);
void kernel_install(Backend *b, const Kernel *k);
// Whether the convolutions' last rung (wgmma) runs this shape itself on this GPU, or hands it down.
bool tensor_supported(ConvShape s);

// Seconds on the GPU of one f(arg), which queues work, among several in a row: 1 to 50 of them, for
// 1 ms or so, recorded into a graph and replayed; the median, divided. So the host's launches are
// not in it, and dependent launches overlap as in a step. All calls work on the same arrays: what
// L2 can hold of them it has from the call before. What cannot be recorded is called in a row
// without. -1 where the device reported an error.
double gpu_time(void (*f)(void *), void *arg);
// Runs f(arg), and adds what each of its launches took to the row of its name: one of the n that
// are there, or a new one, in the order of first launches. Returns how many rows there are now, at
// most MOST_KERNEL_TIMES. Only what f launches itself is seen, not what it records or replays, and
// of that the first 1024. Each runs by itself, because its clock is read before the next one may
// start: together they take longer than where dependent launches overlap. f may queue no branches:
// there is one clock, of one stream.
int gpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n);

// Ceilings, measured: bytes/s of a large copy (read + written), FLOP/s of independent float32
// multiply-adds, FLOP/s of cuBLAS on (M,K)x(K,N) in float32 or bf16 (0 unless built WITH_CUBLAS).
double gpu_copy_rate(void);
double gpu_fma_rate(void);
double gpu_cublas_rate(int M, int N, int K, bool in_bf16);

// ---- kernel_check.c: one kernel against the CPU ---------------------------------------------

// Checks a few ugly shapes of every kernel of the backend. 0, or -1 with the kernel, the shape and
// the error found.
int gpu_selftest(const Backend *b, Error *e);

// One row on one shape: 0, or -1 where it could not run (no memory, a device error).
// `variant` picks among the op's options: residual or not, dropout or not, ...
enum { CHECK_VARIANTS = 4 };
int kernel_check(const Kernel *k, ConvShape s, int variant, bool exact, uint64_t seed,
                 KernelCheck *r, Error *e);

// Median seconds of a row at a shape (-1: could not run), and what that work is: operations (0 for
// what only moves data) and the bytes that must move, every operand once.
double kernel_seconds(const Kernel *k, ConvShape s, double *flops, double *bytes);

#else
static inline int gpu_open(GpuInfo *info, Error *e) {
    (void)info;
    return fail(e, "built without CUDA (no nvcc was found): install the CUDA toolkit, then make");
}
static inline const Backend *gpu_backend(const char *name, Error *e) {
    (void)name;
    gpu_open(NULL, e);
    return NULL;
}
static inline const char *const *gpu_backend_names(int *n) { return *n = 0, NULL; }
static inline size_t gpu_allocated_bytes(void) { return 0; }
static inline const Kernel *gpu_kernels(int *n) { return *n = 0, NULL; }
static inline int gpu_selftest(const Backend *b, Error *e) { return (void)b, (void)e, 0; }
static inline double gpu_copy_rate(void) { return 0; }
static inline double gpu_fma_rate(void) { return 0; }
static inline double gpu_cublas_rate(int M, int N, int K, bool in_bf16) {
    return (void)M, (void)N, (void)K, (void)in_bf16, 0;
}
static inline int gpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n) {
    return (void)f, (void)arg, (void)rows, n;
}
static inline double kernel_seconds(const Kernel *k, ConvShape s, double *flops, double *bytes) {
    (void)k, (void)s;
    return *flops = *bytes = -1;
}
#endif

#ifdef __cplusplus
}
#endif

// ---- Shared by the .cu files -------------------------------------------------------------------
#ifdef __CUDACC__
#include <cuda_bf16.h>

// bf16: the upper half of a float32, 8 bits of mantissa. Tensor cores multiply it; activations of
// the tensor backend are stored in it, which halves their bytes. All other arithmetic is float32.
typedef __nv_bfloat16 bf16;

// Everything runs on this stream, in order, but for branches (layers.cu), during which it names
// theirs. Of a Backend's functions download, read_acts, error and free wait.
extern cudaStream_t gpu_stream;

// Notes an error. The first one stays until Backend.error() has reported it.
void gpu_note(cudaError_t code, const char *what);
#define CHECK(call) gpu_note(call, #call)
// After every launch, which gives nothing to CHECK; what goes wrong while the kernel runs, a later
// call notes. With it stands the count of what the launch has to do, of which gpu_trace makes a
// share of the limit:
//   flops   operations of matrix products; of all else 0, because there bytes are the bound
//   bytes   the fewest that can be moved: every operand that is not NULL once, or twice where it
//           is changed in place; rows of gains and biases are left out. Partial sums count
//           wherever they lie: a kernel that finds its bytes in L2 may beat a copy in memory.
// Neither is worked out unless gpu_trace is running.
#define LAUNCHED(name, flops, bytes)                            \
    do {                                                        \
        gpu_note(cudaGetLastError(), name);                     \
        if (gpu_tracing) gpu_note_launch(name, flops, bytes);   \
    } while (0)
extern bool gpu_tracing;
void gpu_note_launch(const char *name, double flops, double bytes);

// The count of a convolution that moves so many arrays of C channels and of O, in values of `size`
// bytes, and its weights.
static inline double conv_flops(ConvShape s) { return 2.0 * s.B * s.T * s.K * s.C * s.O; }
static inline double conv_bytes(ConvShape s, size_t size, int of_C, int of_O) {
    double N = (double)s.B * s.T, C = s.C, O = s.O;
    return (double)size * (N * (of_C * C + of_O * O) + s.K * C * O);
}
// Of a weight gradient: x, dy, and the sums of every slab, or dw read and written where there is
// one; and of the kernel that adds slabs to dw.
static inline double sums_bytes(ConvShape s) { return sizeof(float) * (double)s.K * s.C * s.O; }
static inline double weight_bytes(ConvShape s, size_t size, int slabs) {
    double N = (double)s.B * s.T;
    return (double)size * N * (s.C + s.O) + (slabs > 1 ? slabs : 2) * sums_bytes(s);
}
static inline double slabs_bytes(ConvShape s, int slabs) { return (slabs + 2) * sums_bytes(s); }

#define NAMED_KERNEL(act_type, op, name, launcher, used_by, idea)                   \
    {#op, name, used_by, idea, sizeof(act_type), offsetof(Backend, op),             \
     (void (*)(void))static_cast<decltype(Backend::op)>(launcher)}
#define KERNEL(act_type, op, launcher, used_by, idea)                               \
    NAMED_KERNEL(act_type, op, #launcher, launcher, used_by, idea)
// Two rows of a launcher that is a template on the activations: float32 tiled, bf16 tensor.
#define KERNEL_PAIR(op, launcher, idea)                                             \
    NAMED_KERNEL(float, op, #launcher, launcher<float>, "tiled", idea),             \
    NAMED_KERNEL(bf16, op, #launcher "_bf16", launcher<bf16>, "tensor", idea ", bf16")

// The tables of the other files, and the memory half of a Backend (float32 activations).
extern const Kernel conv_kernels[], tensor_kernels[];
extern const int n_conv_kernels, n_tensor_kernels;
extern const Backend gpu_memory;
size_t conv_work_bytes(size_t N, int K, int width);
size_t tensor_work_bytes(size_t N, int K, int width);

// n weights in bf16. Of a model's parameters there is a copy, which sync_params made and optimize
// keeps; other weights (a kernel test's) are converted into work (n values) first.
const bf16 *bf16_weights(const real *w, size_t n, void *work);
static_assert(sizeof(real) == sizeof(float), "the GPU computes in float32");

static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
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

// gelu(x) and gelu'(x) as in model.h, with one exponential and one division for both.
static inline __device__ void gelu_and_grad(float x, float *value, float *grad) {
    float clamped = fminf(fmaxf(x, -10.0f), 10.0f), square = clamped * clamped;
    float e = exp_real(-GELU_A * clamped * (1 + GELU_B * square)), s = x < -10 ? 0 : 1 / (1 + e);
    *value = x * s;
    *grad = s + clamped * s * (s * e) * (GELU_A * (1 + 3 * GELU_B * square));
}

// The same, as precise as bf16 needs it. With u = sqrt(2/pi) (x + 0.044715 x^3) of model.h:
//   scale * gelu(x) = x * s,   s = scale * sigmoid(2u) = scale/2 + scale/2 * tanh(u)
// tanh is one instruction here, right to 2^-11, which leaves the sigmoid within 2^-12; bf16 rounds
// to 2^-9. The exponential and division of model.h are some 25 instructions. Where x is DROPPED u
// is -1.6e11, its tanh -1 here, too (a check of PRE in kernel_check.c fails otherwise), and s is 0.
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
// And its slope. Not clamped as in model.h: x*x is finite up to 1e19.
static inline __device__ float scaled_gelu_and_slope(float x, float scale, float *slope) {
    float half = scale / 2, t = gelu_tanh(x), s = half + half * t, y = x * s;
    *slope = s + y * (0.5f - 0.5f * t) * (GELU_A + 3 * GELU_A * GELU_B * x * x);
    return y;
}

// The random bits of channels o/4*4.. of row n of a pass (model.h: dropout_draw), a byte for each
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
#endif
