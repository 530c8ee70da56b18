// layers.cu: every layer but the convolution on a GPU, naive and tiled next to each other, and the
// backends that are put together from the kernel table: `naive` and `tiled` (float32) and `tensor`
// (bf16 activations). The tiled kernels are templates on the activations and serve the last two.
//
// Read first: model.h (the contracts), model.c's second half (the same layers on the CPU), then
// conv_kernels.cu, where the time goes. Refuses: machines without a usable GPU (gpu_open says why).
// Run by:  ./train --device cuda --kernels naive|tiled|tensor
//
// None of these layers computes much: their bound is memory. A naive kernel gives every row to one
// thread, whose neighbours then read addresses a whole row apart, 32 lines for 32 values. A tiled
// one gives a row to a warp: 16 bytes a lane, neighbours next to each other, sums by shuffles.
// The count at B x T = 32 x 1024, C = 256: one activation array is N*C*4 = 33.5 MB, 11 us of an
// H100's 3 TB/s to read or write once. No kernel adds floats atomically: every sum over rows goes
// through partial sums at places fixed by the shape, added in order: blocks end in any order, and
// the bits of a sum of floats depend on it.
// Measured there, many calls in a row (./bench --only ladder), naive -> tiled, then in bf16, half
// the bytes; us, 2026-11-22:
//   embed          191 -> 13, 10    backward 2050 -> 34, 32 (40 as a product: see there)
//   LayerNorm      233 -> 24,  9    backward 6750 -> 52, 29
//   cross-entropy  218 -> 21, 14    AdamW on 8.4 M parameters 685 -> 132
// Counts and times before a kernel in bf16 are those within a step of --preset shakespeare, by a
// trace of all launches (CUPTI; from the end of the kernel before to the end of this one): 32768
// rows of 256 channels, 16.8 MB an array (16384 rows: 8.4 MB). A large copy reaches 2.95 TB/s on
// that GPU, so to read or write one such array takes 5.7 us (2.8) at the least.
#include "kernels.h"

#include <cuda_pipeline.h>

#include <stdio.h>
#include <stdlib.h>

// ---- The device, its memory, its errors ---------------------------------------------------------

cudaStream_t gpu_stream;

static char first_error[ERROR_LEN];  // "" = none since Backend.error() last reported

void gpu_note(cudaError_t code, const char *what) {
    if (code == cudaSuccess || first_error[0]) return;
    snprintf(first_error, sizeof first_error, "%s: %s (%s)", what, cudaGetErrorString(code),
             cudaGetErrorName(code));
}

// The bytes of an array (N,C) of T, for LAUNCHED.
template <typename T>
static double array_bytes(size_t N, int C) { return (double)sizeof(T) * N * C; }

// Asked about, never launched: does this build hold code that the GPU can run?
__global__ void does_nothing() {}

// The driver, the first device, and whether this build has code for it.
static int probe_gpu(GpuInfo *g, Error *e) {
    int devices = 0;
    cudaDriverGetVersion(&g->driver);
    cudaRuntimeGetVersion(&g->runtime);
    if (g->driver == 0)
        return fail(e, "no NVIDIA driver found: install it, or use --device cpu");
    cudaError_t code = cudaGetDeviceCount(&devices);
    if (code == cudaErrorInsufficientDriver)
        return fail(e, "the NVIDIA driver knows CUDA %d.%d, this build needs %d.%d: update the "
                       "driver, build with an older toolkit, or use --device cpu",
                    g->driver / 1000, g->driver % 1000 / 10, g->runtime / 1000,
                    g->runtime % 1000 / 10);
    if (code == cudaErrorNoDevice || (code == cudaSuccess && devices == 0))
        return fail(e, "no NVIDIA GPU found (is CUDA_VISIBLE_DEVICES set?): use --device cpu");
    if (code != cudaSuccess)
        return fail(e, "cannot reach the GPU: %s; use --device cpu", cudaGetErrorString(code));
    struct cudaDeviceProp p;
    code = cudaGetDeviceProperties(&p, 0);
    if (code == cudaSuccess) code = cudaSetDevice(0);
    if (code == cudaSuccess) code = cudaMemGetInfo(&g->free_bytes, &g->bytes);
    if (code != cudaSuccess)
        return fail(e, "cannot use the GPU: %s; is another program holding it? else --device cpu",
                    cudaGetErrorString(code));
    snprintf(g->name, sizeof g->name, "%.95s", p.name);
    g->capability = 10 * p.major + p.minor;
    g->sms = p.multiProcessorCount;
    struct cudaFuncAttributes a;
    code = cudaFuncGetAttributes(&a, does_nothing);
    if (code != cudaSuccess)
        return fail(e, "this build has no code for %s (sm_%d): %s; rebuild with make ARCH=%d",
                    g->name, g->capability, cudaGetErrorString(code), g->capability);
    // One of our own, because the default stream cannot be recorded into a graph.
    code = cudaStreamCreateWithFlags(&gpu_stream, cudaStreamNonBlocking);
    if (code != cudaSuccess)
        return fail(e, "cannot make a CUDA stream: %s", cudaGetErrorString(code));
    return 0;
}

int gpu_open(GpuInfo *info, Error *e) {
    static GpuInfo g;
    static Error reason;
    static int state;  // 0 = not tried, 1 = open, -1 = failed: `reason` says why
    if (state == 0) {
        state = probe_gpu(&g, &reason) ? -1 : 1;
        cudaGetLastError();  // a failed probe leaves no error behind for the first launch to find
    }
    if (info) *info = g;
    return state == 1 ? 0 : fail(e, "%s", reason.text);
}

// What has been allocated, so that free knows how much less there is, and whose parameters have a
// copy in bf16. Some ten arrays per model: a list is enough.
typedef struct Held {
    void *p;
    size_t bytes;
    bf16 *copy;  // of parameters, for the tensor backend
    struct Held *next;
} Held;
static Held *held;
static size_t held_bytes;

size_t gpu_allocated_bytes(void) { return held_bytes; }

static size_t gpu_available(void) {
    size_t free_bytes = 0, all = 0;
    CHECK(cudaMemGetInfo(&free_bytes, &all));
    return free_bytes;
}

static void *gpu_alloc(size_t bytes) {
    Held *h = (Held *)malloc(sizeof *h);
    if (!h || cudaMalloc(&h->p, bytes) != cudaSuccess) {
        cudaGetLastError();  // NULL is the report: no later launch must find this error
        free(h);
        return NULL;
    }
    h->bytes = bytes;
    h->copy = NULL;
    h->next = held;
    held = h;
    held_bytes += bytes;
    return h->p;
}

static void gpu_free(void *p) {
    for (Held **at = &held; *at; at = &(*at)->next) {
        Held *h = *at;
        if (h->p != p) continue;
        CHECK(cudaFree(p));  // waits for queued work
        held_bytes -= h->bytes;
        *at = h->next;
        bf16 *copy = h->copy;
        free(h);
        if (copy) gpu_free(copy);  // in the list like any other
        return;
    }
}

static void gpu_zero(void *p, size_t bytes) {
    (void)cudaMemsetAsync(p, 0, bytes, gpu_stream);
    LAUNCHED("zero", 0, (double)bytes);
}

// From ordinary host memory: host_src has been read when this returns.
static void gpu_upload(void *dst, const void *host_src, size_t bytes) {
    CHECK(cudaMemcpyAsync(dst, host_src, bytes, cudaMemcpyHostToDevice, gpu_stream));
}
static void gpu_download(void *host_dst, const void *src, size_t bytes) {
    CHECK(cudaMemcpyAsync(host_dst, src, bytes, cudaMemcpyDeviceToHost, gpu_stream));
    CHECK(cudaStreamSynchronize(gpu_stream));
}
// Activations in float32 are what the host has: real is float (kernels.h).
static void gpu_write_acts(act *dst, const real *src, size_t n) {
    gpu_upload(dst, src, n * sizeof *src);
}
static void gpu_read_acts(real *dst, const act *src, size_t n) {
    gpu_download(dst, src, n * sizeof *dst);
}

// ---- What bf16 adds to the memory half ----------------------------------------------------------
//
// Tensor cores multiply bf16 by bf16, so activations are stored in it. Parameters stay float32,
// because a step of a thousandth of a weight is lost in 8 bits, and have a bf16 copy beside them: 2
// bytes more per parameter, and no conversion on the way into a convolution.
enum { THREADS = 256, WARPS = THREADS / 32 };

// Launches that overlap (Hopper's programmatic dependent launch): the blocks of a kernel may take
// free places as soon as all of the one before are running and past their own wait, and wait in
// begin_dependent until it is done. That hides a launch, 1 to 2 us, of which a step has 39 (1x128)
// or some 90 (two passes).
// sync_params is launched plainly. conv_tensor.cu says why a conv may fetch its weights early.
#if CUDART_VERSION >= 12030
#define LAUNCH(kernel, grid, block, ...)                             \
    do {                                                             \
        cudaLaunchConfig_t config = dependent_launch(grid, block);   \
        (void)cudaLaunchKernelEx(&config, kernel, __VA_ARGS__);      \
    } while (0)
static cudaLaunchConfig_t dependent_launch(dim3 grid, dim3 block) {
    static GpuInfo gpu;
    static cudaLaunchAttribute overlap;
    Error e;
    if (gpu.capability == 0) gpu_open(&gpu, &e);
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = cudaLaunchConfig_t();
    c.gridDim = grid;
    c.blockDim = block;
    c.stream = gpu_stream;
    c.attrs = &overlap;
    c.numAttrs = gpu.capability >= 90;  // 0: older GPUs do not know it
    return c;
}
#else
#define LAUNCH(kernel, grid, block, ...) kernel<<<grid, block, 0, gpu_stream>>>(__VA_ARGS__)
#endif

// In such a kernel, mostly first: nothing of the kernel before is read, and nothing at all written,
// until it is done; only then may the next one's blocks come. In this order: once the next one's
// blocks run, all before this kernel is done. So what was written two kernels back or earlier may
// be read before the wait. conv_tensor.cu builds on that (weights, biases), and here
// embed_rows_registers (gain, bias), segment_sums_tiled (ids) and begin_step (the step's number).
static __device__ __forceinline__ void begin_dependent() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A grid that covers n: the last block's threads beyond n return at once.
static unsigned blocks_for(size_t n, size_t per_block) { return (unsigned)ceil_div(n, per_block); }

// Converted on the host: only tests and timings use these, no step does.
static void bf16_write_acts(act *dst, const real *src, size_t n) {
    bf16 *host = (bf16 *)malloc(n * sizeof *host);
    if (!host) {
        gpu_note(cudaErrorMemoryAllocation, "host memory for activations");
        return;
    }
    for (size_t i = 0; i < n; i++) host[i] = __float2bfloat16_rn(src[i]);
    gpu_upload(dst, host, n * sizeof *host);
    free(host);
}
static void bf16_read_acts(real *dst, const act *src, size_t n) {
    bf16 *host = (bf16 *)malloc(n * sizeof *host);
    if (!host) {
        gpu_note(cudaErrorMemoryAllocation, "host memory for activations");
        return;
    }
    gpu_download(host, src, n * sizeof *host);
    for (size_t i = 0; i < n; i++) dst[i] = __bfloat162float(host[i]);
    free(host);
}

// A thread per value, neighbours next to each other: 6 bytes a parameter, and only where parameters
// came from outside. In a step update_four writes the copy beside the parameter.
__global__ void round_values(bf16 *to, const float *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = __float2bfloat16_rn(from[i]);
}
static void round_to_bf16(bf16 *to, const float *from, size_t n) {
    round_values<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>(to, from, n);
    LAUNCHED("round_to_bf16", 0, 6.0 * n);
}

// The first call for these parameters makes the copy, which is freed with them. Without memory
// for it there is none, and every convolution converts for itself.
static void bf16_sync_params(const real *params, size_t n) {
    Held *h = held;
    while (h && h->p != (const void *)params) h = h->next;
    if (!h) return;
    if (!h->copy) h->copy = (bf16 *)gpu_alloc(h->bytes / sizeof(real) * sizeof(bf16));
    if (h->copy) round_to_bf16(h->copy, params, n);
}

// Where the copy of *p lies; NULL where there is none.
static bf16 *bf16_copy(const real *p) {
    for (Held *h = held; h; h = h->next) {
        size_t offset = (size_t)((uintptr_t)p - (uintptr_t)h->p);  // before h->p: wraps, huge
        if (h->copy && offset < h->bytes) return h->copy + offset / sizeof(real);
    }
    return NULL;
}
// The caller has to look which of the two it was: behind a conversion, which is the kernel right
// before its own, it must not fetch weights early (`settled` in conv_tensor.cu).
const bf16 *bf16_weights(const real *w, size_t n, void *work) {
    const bf16 *copy = bf16_copy(w);
    if (copy) return copy;
    round_to_bf16((bf16 *)work, w, n);
    return (const bf16 *)work;
}

// ---- Errors, and recording a step ---------------------------------------------------------------

static const char *gpu_error(void) {
    static char reported[ERROR_LEN];
    CHECK(cudaStreamSynchronize(gpu_stream));
    if (!first_error[0]) return NULL;
    // Told once. CUDA's own note goes, too: the next LAUNCHED would report it for its kernel.
    memcpy(reported, first_error, sizeof reported);
    first_error[0] = 0;
    cudaGetLastError();
    return reported;
}

// The launches of one step as a graph: replaying it is one call, with no gap between kernels.
// Relaxed mode, because the first launch of a kernel may have to load its code.
static void *gpu_record(void (*body)(void *), void *arg) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    if (cudaStreamBeginCapture(gpu_stream, cudaStreamCaptureModeRelaxed) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    body(arg);
    cudaError_t code = cudaStreamEndCapture(gpu_stream, &graph);
    if (code == cudaSuccess) code = cudaGraphInstantiate(&exec, graph, 0);
    // The executable graph has a copy of its own.
    if (graph) CHECK(cudaGraphDestroy(graph));
    gpu_note(code, "recording a step");
    return code == cudaSuccess ? exec : NULL;
}
static void gpu_replay(void *recording) {
    CHECK(cudaGraphLaunch((cudaGraphExec_t)recording, gpu_stream));
}
static void gpu_free_recording(void *recording) {
    CHECK(cudaGraphExecDestroy((cudaGraphExec_t)recording));
}

// Branches (forks, in CUDA's words): a second stream, which gpu_stream names while a branch is
// queued, so that every launcher serves there, too. Events order the two; recorded into a graph
// they are edges. To leave the main line costs nothing; a kernel that joins cannot be launched
// ahead, some 2 us.
static cudaStream_t other_stream;  // the one of the two that gpu_stream does not name
enum { BRANCH_EVENTS = 64 };       // one taken again stands for a later branch, which is safe
static cudaEvent_t branch_begin, branch_end[BRANCH_EVENTS];
static unsigned branches;

static void swap_streams() {
    cudaStream_t stream = gpu_stream;
    gpu_stream = other_stream;
    other_stream = stream;
}

static void gpu_begin_branch() {
    if (!other_stream) {
        CHECK(cudaStreamCreateWithFlags(&other_stream, cudaStreamNonBlocking));
        CHECK(cudaEventCreateWithFlags(&branch_begin, cudaEventDisableTiming));
        for (int i = 0; i < BRANCH_EVENTS; i++)
            CHECK(cudaEventCreateWithFlags(&branch_end[i], cudaEventDisableTiming));
    }
    CHECK(cudaEventRecord(branch_begin, gpu_stream));
    CHECK(cudaStreamWaitEvent(other_stream, branch_begin, 0));
    swap_streams();
}
static int gpu_end_branch() {
    int i = (int)(branches++ % BRANCH_EVENTS);
    CHECK(cudaEventRecord(branch_end[i], gpu_stream));
    swap_streams();
    return i + 1;
}
static void gpu_join(int branch) {
    CHECK(cudaStreamWaitEvent(gpu_stream, branch_end[branch - 1], 0));
}

// ---- LayerNorm ----------------------------------------------------------------------------------
//
//   mean = average(x),   rstd = 1 / sqrt(average((x - mean)^2) + eps)
//   out  = (x - mean) * rstd * gain + bias
//
// Bytes: x once, out once: 33.6 MB in bf16 for 32768 rows, 11.4 us. Some ten operations for each of
// the 8.4 million values would be 1.3 us at the 63 TFLOP/s of conv_kernels.cu: memory is the bound.
// A row's two sums come one after the other, and each needs the whole row: the question is where
// the row waits meanwhile. Naive and tiled read it again, from cache; registers keep it.

// Mean and 1/standard deviation of a row by one thread, in the CPU's order and precision. Two
// passes: average(x^2) - mean^2 in one would cancel where the mean is large beside the deviation.
static __device__ float2 row_moments(const float *x, int C) {
    double sum = 0, squares = 0;
    for (int c = 0; c < C; c++) sum += x[c];
    double mean = sum / C;
    for (int c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
    return make_float2((float)mean, (float)(1 / sqrt(squares / C + NORM_EPS)));
}

// naive: one thread per row, which reads it three times. Neighbouring threads are a row apart, 1 KB
// with C = 256, so every load of a warp touches 32 lines of cache for 32 values: 0.23 ms.
__global__ void norm_rows_naive(float *out, const float *x, const float *gain, const float *bias,
                                size_t N, int C) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const float *row = x + n * C;
    float2 m = row_moments(row, C);
    for (int c = 0; c < C; c++) out[n * C + c] = (row[c] - m.x) * m.y * gain[c] + bias[c];
}

static void norm_forward_naive(act *out, const act *x, const real *gain, const real *bias,
                               size_t N, int C) {
    norm_rows_naive<<<blocks_for(N, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)out, (const float *)x, gain, bias, N, C);
    LAUNCHED("norm_forward_naive", 0, 2 * array_bytes<float>(N, C));
}

// The same by a warp, which reads a row four values a lane; later passes find the row in L1.
// Neighbouring lanes: neighbouring 16 bytes of float32, or 8 of bf16. A load of the warp is 128
// channels, four whole lines, or two. warp_sum leaves the same bits in every lane.
template <bool VEC, typename T>
static __device__ float2 warp_moments(const T *x, int C, int lane) {
    float sum = 0, squares = 0;
    for (int c = 4 * lane; c < C; c += 128) {
        float4 v = load4<VEC>(x + c, C - c);
        sum += (v.x + v.y) + (v.z + v.w);
    }
    float mean = warp_sum(sum) / C;
    for (int c = 4 * lane; c < C; c += 128) {
        float4 v = load4<VEC>(x + c, C - c);
        float d[4] = {v.x - mean, v.y - mean, v.z - mean, v.w - mean};
        for (int j = 0; j < 4; j++)
            // Beyond C load4 gives 0, whose distance from the mean is not 0.
            if (VEC || c + j < C) squares += d[j] * d[j];
    }
    return make_float2(mean, 1 / sqrtf(warp_sum(squares) / C + (float)NORM_EPS));
}

// A row's LayerNorm by a warp. dropped: as if the row were zeros, of which only the bias remains.
template <bool VEC, typename T, typename Out>
static __device__ void warp_norm_row(Out *out, const T *row, const float *gain, const float *bias,
                                     int C, int lane, bool dropped) {
    float2 m = warp_moments<VEC>(row, C, lane);
    if (dropped) m.y = 0;
    for (int c = 4 * lane; c < C; c += 128) {
        float4 v = load4<VEC>(row + c, C - c);
        float4 g = load4<VEC>(gain + c, C - c), b = load4<VEC>(bias + c, C - c);
        store4<VEC>(out + c,
                    make_float4((v.x - m.x) * m.y * g.x + b.x, (v.y - m.x) * m.y * g.y + b.y,
                                (v.z - m.x) * m.y * g.z + b.z, (v.w - m.x) * m.y * g.w + b.w),
                    C - c);
    }
}

// tiled: one warp per row.
// Bound before: the load units, 32 lines for each load. Now a load's lanes share their lines.
// Bytes: x read once from memory and twice from L1, out written once, 67 MB in float32. Cost: gain
// and bias for every row, 2 KB from L1. Nothing is shared between warps, so there is no barrier.
// Measured: float32 0.24 -> 0.030 ms; bf16, 16384 rows in a step: 8.2 us, 16.8 MB, 2.0 TB/s.
template <bool VEC, typename T>
__global__ void norm_rows_tiled(T *out, const T *x, const float *gain, const float *bias, size_t N,
                                int C) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    warp_norm_row<VEC>(out + n * C, x + n * C, gain, bias, C, lane, false);
}

// registers: a row of up to 256 channels stays in its warp's registers, channels 8*lane + j in lane
// `lane`, so that it is read once, 16 bytes of bf16 at a time. A warp takes several rows: all their
// loads are on their way together, and gain and bias, four times the bytes of a row of bf16, are
// read once for them.
// Bound before: a warp had one row's loads on their way, waited, and asked L1 twice more.
// Cost: 4 rows * 8 values + gain and bias = 48 registers a lane for data.
// Measured in bf16: 10.9 us for 32768 rows, 33.6 MB, 3.1 TB/s (8.2 us for half of them before).
enum { WARP_C = 256, ROWS_AT_ONCE = 4, FEW_ROWS = 4096 };  // few: a warp takes one at a time

// Neighbouring lanes: neighbouring 16 bytes of bf16; 512 bytes, four whole lines, for C = 256. C is
// a multiple of 8, so a lane has eight channels or none, which are zeros. C = 0: no row.
template <typename T>
static __device__ void load_row(float v[8], const T *row, int C, int lane) {
    for (int j = 0; j < 8; j++) v[j] = 0;
    if (8 * lane < C) load_eight(v, row + 8 * lane);
}
template <typename T>
static __device__ void store_row(T *row, const float v[8], int C, int lane) {
    if (8 * lane < C) store_eight(row + 8 * lane, v);
}
static __device__ float2 register_moments(const float v[8], int C, int lane) {
    float sum = 0, squares = 0;
    for (int j = 0; j < 8; j++) sum += v[j];
    float mean = warp_sum(sum) / C;
    for (int j = 0; j < 8; j++)
        if (8 * lane < C) squares += (v[j] - mean) * (v[j] - mean);  // 0 - mean is not 0
    return make_float2(mean, 1 / sqrtf(warp_sum(squares) / C + (float)NORM_EPS));
}

template <int ROWS, typename T>
__global__ void norm_rows_registers(T *out, const T *x, const float *gain, const float *bias,
                                    size_t N, int C) {
    begin_dependent();
    const int lane = threadIdx.x % 32;
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    float v[ROWS][8], g[8], b[8];
    // All loads before the first use: 4 * 512 bytes of bf16 of each warp on their way at a time.
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        load_row(v[r], x + (n0 + r) * C, n0 + r < N ? C : 0, lane);
    load_row(g, gain, C, lane);
    load_row(b, bias, C, lane);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float2 m = register_moments(v[r], C, lane);
        for (int j = 0; j < 8; j++) v[r][j] = (v[r][j] - m.x) * m.y * g[j] + b[j];
        store_row(out + (n0 + r) * C, v[r], n0 + r < N ? C : 0, lane);
    }
}

template <typename T>
static void norm_forward_tiled(act *out, const act *x, const real *gain, const real *bias,
                               size_t N, int C) {
    bool aligned = aligned16(out) && aligned16(x) && aligned16(gain) && aligned16(bias);
    unsigned warps = blocks_for(N, WARPS);
    if (aligned && C % 8 == 0 && C <= WARP_C && N <= FEW_ROWS)
        LAUNCH((norm_rows_registers<1, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    else if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH((norm_rows_registers<ROWS_AT_ONCE, T>), blocks_for(N, WARPS * ROWS_AT_ONCE), THREADS,
               (T *)out, (const T *)x, gain, bias, N, C);
    else if (aligned && C % 4 == 0)
        LAUNCH((norm_rows_tiled<true, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    else
        LAUNCH((norm_rows_tiled<false, T>), warps, THREADS, (T *)out, (const T *)x, gain, bias, N,
               C);
    LAUNCHED("norm_forward_tiled", 0, 2 * array_bytes<T>(N, C));
}

// forward:  xhat = (x - mean) * rstd;  out = xhat * gain + bias.    With g = dout * gain:
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
//   dgain[c] += sum_n dout[n,c] * xhat[n,c],   dbias[c] += sum_n dout[n,c]
// That is g without its parts along 1 and along xhat: to shift a row or to stretch it does not move
// out, so dx must have none. Averages go along rows, dgain and dbias down columns: a row belongs to
// a warp, and a column meets all rows of the batch, so blocks leave partial sums of columns.
// dx or again may be x, so the columns' sums come first.
// On top of that:   again = out;   pre = dx * scale * gelu'(pre)

// naive: one thread per row notes the moments; one per column sums; one per row writes dx. In the
// middle one neighbours read neighbouring columns, but there are only C threads for the whole GPU,
// each with N dependent additions. All three: 6.75 ms.
__global__ void moments_naive(float2 *moments, const float *x, size_t N, int C) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) moments[n] = row_moments(x + n * C, C);
}
__global__ void norm_columns_naive(float *dgain, float *dbias, const float2 *moments,
                                   const float *dout, const float *x, size_t N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float gain_sum = 0, bias_sum = 0;
    for (size_t n = 0; n < N; n++) {
        gain_sum += dout[n * C + c] * ((x[n * C + c] - moments[n].x) * moments[n].y);
        bias_sum += dout[n * C + c];
    }
    dgain[c] += gain_sum;
    dbias[c] += bias_sum;
}
__global__ void norm_dx_naive(float *dx, float *again, float *pre, const float2 *moments,
                              const float *dout, const float *x, const float *gain,
                              const float *bias, float scale, size_t N, int C, bool accumulate) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float2 m = moments[n];
    double g_sum = 0, gx_sum = 0;
    for (int c = 0; c < C; c++) {
        float g = dout[n * C + c] * gain[c];
        g_sum += g;
        gx_sum += g * ((x[n * C + c] - m.x) * m.y);
    }
    float g_mean = (float)(g_sum / C), gx_mean = (float)(gx_sum / C);
    for (int c = 0; c < C; c++) {
        // __fmul_rn: g is rounded as in the sum above, so that with C = 1 the difference is 0.
        float g = __fmul_rn(dout[n * C + c], gain[c]), xhat = (x[n * C + c] - m.x) * m.y;
        // x[c] has been read: from here on dx[c] or again[c] may take its place.
        float d = m.y * (g - g_mean - xhat * gx_mean);
        if (accumulate) d += dx[n * C + c];
        dx[n * C + c] = d;
        if (again) again[n * C + c] = xhat * gain[c] + bias[c];
        if (pre) pre[n * C + c] = d * (scale * gelu_grad(pre[n * C + c]));
    }
}

// How many arrays move: dout, x, dx, which may be read, too, and what else is wanted.
static int norm_arrays(const act *again, const act *pre, bool accumulate) {
    return 3 + accumulate + (again != NULL) + 2 * (pre != NULL);
}

static void norm_backward_naive(act *dx, real *dgain, real *dbias, act *again, act *pre,
                                const act *dout, const act *x, const real *gain, const real *bias,
                                float scale, size_t N, int C, bool accumulate, void *work) {
    float2 *moments = (float2 *)work;
    unsigned rows = blocks_for(N, THREADS);
    moments_naive<<<rows, THREADS, 0, gpu_stream>>>(moments, (const float *)x, N, C);
    LAUNCHED("moments_naive", 0, array_bytes<float>(N, C) + 8.0 * N);
    norm_columns_naive<<<blocks_for(C, THREADS), THREADS, 0, gpu_stream>>>(
        dgain, dbias, moments, (const float *)dout, (const float *)x, N, C);
    LAUNCHED("norm_columns_naive", 0, 2 * array_bytes<float>(N, C) + 8.0 * N);
    norm_dx_naive<<<rows, THREADS, 0, gpu_stream>>>(
        (float *)dx, (float *)again, (float *)pre, moments, (const float *)dout, (const float *)x,
        gain, bias, scale, N, C, accumulate);
    LAUNCHED("norm_dx_naive", 0, norm_arrays(again, pre, accumulate) * array_bytes<float>(N, C));
}

// What a tiled kernel works on.
template <typename T>
struct NormBackward {
    T *dx, *again, *pre;
    float *part;  // (blocks, 2, C): a block's sums for dgain and dbias
    const T *dout, *x;
    const float *gain, *bias;
    float scale;
    size_t N;
    int C, rows;  // rows of a block
    bool accumulate;
};

// scale * gelu'(pre), as precise as the values are stored.
static __device__ float scaled_slope(float pre, float scale, float) {
    return scale * gelu_grad(pre);
}
static __device__ float scaled_slope(float pre, float scale, bf16) {
    float slope;
    scaled_gelu_and_slope(pre, scale, &slope);
    return slope;
}

// Rows of a block: several to a warp where that still leaves a large GPU busy. A block leaves 2*C
// floats: for 32768 rows 683 blocks of 48 write 1.4 MB, where 4096 blocks of 8 would write 8.4. Few
// rows (the table's 256, a small batch) get a warp each. Fixed by N alone: where the rows are cut
// is part of the bits of dgain and dbias.
enum { NORM_ROWS = 6 * WARPS, MANY_ROWS = 8192 };
static int norm_rows(size_t N) { return N < MANY_ROWS ? (int)WARPS : (int)NORM_ROWS; }
static size_t norm_blocks(size_t N) { return ceil_div(N, norm_rows(N)); }

// tiled: a block takes up to NORM_ROWS rows. First a warp per row finds the row's four averages,
// then a thread per column walks the rows, writes dx and sums the column; both read neighbours
// together, and the second reading finds the rows in L1. Bytes: x, dout, dx once, 101 MB instead of
// naive's 201 MB; a block's column sums go to part.
// Bound before: C threads for N rows, and rows 1 KB apart. Cost: 48 rows of x and dout are 98 KB of
// float32 that L1 has to keep between the readings, 49 KB of bf16; one barrier a block.
// Measured: float32, alone, 6.72 -> 0.058 ms. In bf16 20.3 us for 16384 rows when dx was all that
// it wrote, and 17.2 us for the pass over memory that then did what `pre` does here.
enum { AT_ONCE = 8 };

template <bool VEC, typename T>
__global__ void norm_backward_rows(NormBackward<T> a) {
    begin_dependent();
    __shared__ float4 row_figures[NORM_ROWS];  // mean, rstd, average g, average g*xhat
    const int C = a.C, lane = threadIdx.x % 32;
    size_t n0 = (size_t)blockIdx.x * a.rows;
    int rows = a.N - n0 < a.rows ? (int)(a.N - n0) : a.rows;
    for (int r = threadIdx.x / 32; r < rows; r += WARPS) {
        const T *x_r = a.x + (n0 + r) * C, *dout_r = a.dout + (n0 + r) * C;
        float2 m = warp_moments<VEC>(x_r, C, lane);
        float g_sum = 0, gx_sum = 0;
        // Neighbouring lanes: four neighbouring channels each. x_r is in L1 by now, dout_r is not.
        for (int c = 4 * lane; c < C; c += 128) {
            float4 v = load4<VEC>(x_r + c, C - c), d = load4<VEC>(dout_r + c, C - c);
            float4 w = load4<VEC>(a.gain + c, C - c);  // beyond C: d and w are 0
            float g[4] = {__fmul_rn(d.x, w.x), __fmul_rn(d.y, w.y), __fmul_rn(d.z, w.z),
                          __fmul_rn(d.w, w.w)};
            g_sum += (g[0] + g[1]) + (g[2] + g[3]);
            gx_sum += g[0] * ((v.x - m.x) * m.y) + g[1] * ((v.y - m.x) * m.y) +
                      g[2] * ((v.z - m.x) * m.y) + g[3] * ((v.w - m.x) * m.y);
        }
        g_sum = warp_sum(g_sum) / C;
        gx_sum = warp_sum(gx_sum) / C;
        if (lane == 0) row_figures[r] = make_float4(m.x, m.y, g_sum, gx_sum);
    }
    __syncthreads();  // all rows' figures are there before the columns use them; from here on x
                      // may be overwritten, each value by the thread that has just read it
    for (int c = threadIdx.x; c < C; c += THREADS) {
        float gain_sum = 0, bias_sum = 0, w = a.gain[c], b = a.again ? a.bias[c] : 0;
        for (int r0 = 0; r0 < rows; r0 += AT_ONCE) {
            // All loads before the first store: outputs may be x, so the compiler keeps the order.
            // Neighbouring lanes: neighbouring channels, one value each, 64 bytes of a row of bf16.
            float v[AT_ONCE], d[AT_ONCE], old[AT_ONCE], pre[AT_ONCE];
            for (int j = 0; j < AT_ONCE; j++) {
                size_t i = (n0 + r0 + j) * C + c;
                bool here = r0 + j < rows;
                v[j] = here ? (float)a.x[i] : 0;
                d[j] = here ? (float)a.dout[i] : 0;
                old[j] = here && a.accumulate ? (float)a.dx[i] : 0;
                pre[j] = here && a.pre ? (float)a.pre[i] : 0;
            }
            for (int j = 0; j < AT_ONCE && r0 + j < rows; j++) {
                size_t i = (n0 + r0 + j) * C + c;
                float4 f = row_figures[r0 + j];  // one address for all of a warp: one access
                float xhat = (v[j] - f.x) * f.y, g = __fmul_rn(d[j], w);
                gain_sum += d[j] * xhat;
                bias_sum += d[j];
                float dx = old[j] + f.y * (g - f.z - xhat * f.w);
                a.dx[i] = (T)dx;
                if (a.again) a.again[i] = (T)(xhat * w + b);
                if (a.pre) a.pre[i] = (T)(dx * scaled_slope(pre[j], a.scale, T()));
            }
        }
        // This thread has seen all of the block's rows in column c: nothing is left to add up here.
        a.part[((size_t)blockIdx.x * 2) * C + c] = gain_sum;
        a.part[((size_t)blockIdx.x * 2 + 1) * C + c] = bias_sum;
    }
}

// registers: as in norm_rows_registers. Everything is read once and written once: seven arrays at
// most. A lane sums its own columns over its warp's rows; the eight warps' sums meet in shared
// memory. Bound by how much is on its way from memory at a time, so while a warp works on a row its
// next one is copied into shared memory; every lane reads back just what it has copied.
// Bound before: every row twice, its second reading by other threads, and dx and pre once more in a
// pass of their own. Saved: that pass, and the norm_forward that made `again` anew.
// Bytes: read x, dout, dx, pre; written dx, again, pre: 117 MB for 32768 rows of bf16, 40 us.
// Cost: a ring of 8 warps * 2 rows * 4 arrays * 512 bytes and 8 KB of sums, 40 KB of shared memory,
// and 80 registers a thread: these leave three blocks to a multiprocessor.
// Measured: 40.9 us, 2.88 TB/s, a copy's rate; before, 20.3 + 17.2 + 8.2 us for half as many
// rows.
// Tried and dropped: reading past L2 (evict first), 41.1 us.
enum { AHEAD = 2 };  // rows in a warp's ring, one at work and one on its way; of float32 only one

// Neighbouring lanes copy neighbouring 16 bytes (in float32 32, as two copies), with no register in
// between: a load into registers would hold eight of them until it arrives.
template <typename T>
static __device__ void copy_row(T *to, const T *row, int C, int lane) {
    for (int b = 0; b < (int)(8 * sizeof(T)) && 8 * lane < C; b += 16)
        __pipeline_memcpy_async((char *)(to + 8 * lane) + b, (const char *)(row + 8 * lane) + b,
                                16);
}
// The row of n, none where n is not before `end`, as the warp's next group of copies.
template <typename T>
static __device__ void copy_rows(T to[4][WARP_C], const NormBackward<T> &a, size_t n, size_t end,
                                 int lane) {
    if (n < end) {
        copy_row(to[0], a.x + n * a.C, a.C, lane);
        copy_row(to[1], a.dout + n * a.C, a.C, lane);
        if (a.accumulate) copy_row(to[2], a.dx + n * a.C, a.C, lane);
        if (a.pre) copy_row(to[3], a.pre + n * a.C, a.C, lane);
    }
    __pipeline_commit();  // an empty group, too: the wait below counts groups
}

template <typename T>
__global__ void __launch_bounds__(THREADS) norm_backward_registers(NormBackward<T> a) {
    begin_dependent();
    enum { SLOTS = AHEAD * sizeof(bf16) / sizeof(T) };
    __shared__ __align__(16) T ring[WARPS][SLOTS][4][WARP_C];
    __shared__ float warp_sums[WARPS][WARP_C];
    const int C = a.C, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t n = (size_t)blockIdx.x * a.rows + warp;
    size_t end = ((size_t)blockIdx.x + 1) * a.rows < a.N ? ((size_t)blockIdx.x + 1) * a.rows : a.N;
    // Rows n, n + 8, ..: the block's eight warps walk through memory side by side.
    float w[8], sums[2][8] = {};
    load_row(w, a.gain, C, lane);
    for (int i = 0; i < SLOTS - 1; i++) copy_rows(ring[warp][i], a, n + i * WARPS, end, lane);
    for (int i = 0; n < end; i++, n += WARPS) {
        copy_rows(ring[warp][(i + SLOTS - 1) % SLOTS], a, n + (SLOTS - 1) * WARPS, end, lane);
        // For row n. What a lane reads now it has copied itself, and what the next copies overwrite
        // it has read itself: no barrier, not even among the lanes.
        __pipeline_wait_prior(SLOTS - 1);
        T(*row)[WARP_C] = ring[warp][i % SLOTS];
        float v[8], d[8], dx[8] = {}, pre[8];
        load_row(v, row[0], C, lane);
        load_row(d, row[1], C, lane);
        if (a.accumulate) load_row(dx, row[2], C, lane);
        float2 m = register_moments(v, C, lane);
        float g_sum = 0, gx_sum = 0;
        for (int j = 0; j < 8; j++) {
            v[j] = (v[j] - m.x) * m.y;  // xhat
            sums[0][j] += d[j] * v[j];
            sums[1][j] += d[j];
            d[j] = __fmul_rn(d[j], w[j]);  // g
            g_sum += d[j];
            gx_sum += d[j] * v[j];
        }
        g_sum = warp_sum(g_sum) / C;
        gx_sum = warp_sum(gx_sum) / C;
        for (int j = 0; j < 8; j++) dx[j] += m.y * (d[j] - g_sum - v[j] * gx_sum);
        store_row(a.dx + n * C, dx, C, lane);
        if (a.again) {
            load_row(d, a.bias, C, lane);  // from L1; kept, it would take eight registers
            for (int j = 0; j < 8; j++) v[j] = v[j] * w[j] + d[j];
            store_row(a.again + n * C, v, C, lane);
        }
        if (a.pre) {
            load_row(pre, row[3], C, lane);
            for (int j = 0; j < 8; j++) pre[j] = dx[j] * scaled_slope(pre[j], a.scale, T());
            store_row(a.pre + n * C, pre, C, lane);
        }
    }
    // From a lane's eight columns in eight warps to a thread per column; first dgain, then dbias.
    // The stores meet eight lanes to a bank, but there are 16 of them for all of the block's rows.
    for (int i = 0; i < 2; i++) {
        if (i > 0) __syncthreads();  // the sums of the round before are read
        for (int j = 0; j < 8; j++) warp_sums[warp][8 * lane + j] = sums[i][j];
        __syncthreads();  // all eight warps' sums are there
        float sum = 0;
        for (int u = 0; u < WARPS; u++) sum += warp_sums[u][threadIdx.x];
        if (threadIdx.x < C) a.part[((size_t)blockIdx.x * 2 + i) * C + threadIdx.x] = sum;
    }
}
static_assert((int)THREADS == (int)WARP_C, "a thread per column");

// first[c], second[c] += the sums over rows of part (rows, 2, C). A block takes 8 columns of one of
// the two: 128 lines of threads each add every 128th row, then halves are added to halves. Eight
// neighbouring threads read 32 bytes, a sector. Wider blocks would be fewer: 2 * 256 / 8 = 64 are
// under half of the multiprocessors as it is. The order is fixed by rows, the number of blocks.
// Bytes: 1.4 MB for 32768 rows. Measured: 3.8 us; each line has five or six rows to add.
enum { PAIR_COLUMNS = 8, PAIR_LINES = 128 };
__global__ void add_pairs(float *first, float *second, const float *part, size_t rows, int C) {
    begin_dependent();
    __shared__ float sums[PAIR_LINES][PAIR_COLUMNS];  // a warp's four lines: all 32 banks, once
    int tx = threadIdx.x, ty = threadIdx.y, c = blockIdx.x * PAIR_COLUMNS + tx;
    float sum = 0;
#pragma unroll 4
    for (size_t r = ty; r < rows; r += PAIR_LINES)
        if (c < C) sum += part[(r * 2 + blockIdx.y) * C + c];
    sums[ty][tx] = sum;
    for (int half = PAIR_LINES / 2; half > 0; half /= 2) {
        __syncthreads();  // the sums of the round before are there
        if (ty < half) sums[ty][tx] += sums[ty + half][tx];
    }
    if (ty == 0 && c < C) (blockIdx.y ? second : first)[c] += sums[0][tx];
}

template <typename T>
static void norm_backward_tiled(act *dx, real *dgain, real *dbias, act *again, act *pre,
                                const act *dout, const act *x, const real *gain, const real *bias,
                                float scale, size_t N, int C, bool accumulate, void *work) {
    NormBackward<T> a = {(T *)dx, (T *)again, (T *)pre, (float *)work, (const T *)dout,
                         (const T *)x, gain, bias, scale, N, C, norm_rows(N), accumulate};
    unsigned blocks = (unsigned)norm_blocks(N);
    // NULL counts as aligned: again, pre and, for the table of bytes, bias.
    bool aligned = aligned16(x) && aligned16(dout) && aligned16(gain) && aligned16(dx) &&
                   aligned16(again) && aligned16(pre) && aligned16(bias);
    if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH(norm_backward_registers<T>, blocks, THREADS, a);
    else if (aligned && C % 4 == 0)
        LAUNCH((norm_backward_rows<true, T>), blocks, THREADS, a);
    else
        LAUNCH((norm_backward_rows<false, T>), blocks, THREADS, a);
    LAUNCHED("norm_backward_tiled", 0,
             norm_arrays(again, pre, accumulate) * array_bytes<T>(N, C) + 8.0 * blocks * C);
    LAUNCH(add_pairs, dim3(blocks_for(C, PAIR_COLUMNS), 2), dim3(PAIR_COLUMNS, PAIR_LINES), dgain,
           dbias, a.part, (size_t)blocks, C);
    LAUNCHED("add_pairs", 0, 8.0 * (blocks + 2) * C);
}

// ---- Embedding and its LayerNorm ----------------------------------------------------------------
//
// As on the CPU, naive normalises the V rows of the table, not the N rows of the batch; so does
// backward everywhere. A dropped byte's row is what LayerNorm makes of zeros: its bias.
// The table is V*C*4 = 262 KB, which the caches keep. Forward writes x, 16.8 MB in bf16 for 32768
// rows, 5.7 us; backward reads dx once, as many.

// naive: one thread per output, neighbours next to each other in x and in the table's row
__global__ void gather_naive(float *x, const int *ids, const float *rows, const float *bias,
                             size_t N, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    int id = ids[i / C], c = (int)(i % C);
    x[i] = id == BYTE_DROPPED ? bias[c] : rows[(size_t)id * C + c];
}

static void embed_forward_naive(act *x, const int *ids, const real *table, const real *gain,
                                const real *bias, size_t N, int C, void *work) {
    norm_forward_naive(work, table, gain, bias, V, C);
    gather_naive<<<blocks_for(N * C, THREADS), THREADS, 0, gpu_stream>>>(
        (float *)x, ids, (const float *)work, bias, N, C);
    LAUNCHED("gather_naive", 0, array_bytes<float>(N + V, C) + 4.0 * N);
}

// tiled: one warp per row, which normalises the table's row anew: a few instructions a value, on
// what lies in cache, and a launch less.
// Bound before: one block normalised the table, a row to a thread, while all others waited.
// Bytes: x written once. Neighbouring lanes: four neighbouring channels each, 512 bytes of the
// table at a time, 256 of x in bf16.
// Measured: alone in float32 0.20 -> 0.021 ms; in a step in bf16 14.3 us for 32768 rows, 2.5 times
// what the writing takes. A row waits for its id, then for the table's row, then for two sums over
// the warp.
template <bool VEC, typename T>
__global__ void embed_rows_tiled(T *x, const int *ids, const float *table, const float *gain,
                                 const float *bias, size_t N, int C) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    bool dropped = ids[n] == BYTE_DROPPED;
    // One id for the whole warp. Row 0 stands in for a dropped one: an address that exists.
    const float *row = table + (dropped ? 0 : (size_t)ids[n] * C);
    warp_norm_row<VEC>(x + n * C, row, gain, bias, C, lane, dropped);
}

// registers: as in norm_rows_registers. Gain and bias, which draw_batch before us does not write,
// come ahead of the wait; then ids, and four rows of the table at a time.
// Bound before: a row's waits one after the other. Bytes: the same. Cost: 78 registers.
// Measured: 32768 rows 9.6 us in bf16, 13.3 in float32; two calls in a step of 32x1024 22.8 -> 20.
template <int ROWS, typename T>
__global__ void embed_rows_registers(T *x, const int *ids, const float *table, const float *gain,
                                     const float *bias, size_t N, int C) {
    const int lane = threadIdx.x % 32;
    const size_t n0 = ((size_t)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    float v[ROWS][8], g[8], b[8];
    int id[ROWS];
    load_row(g, gain, C, lane);
    load_row(b, bias, C, lane);
    begin_dependent();
#pragma unroll
    for (int r = 0; r < ROWS; r++) id[r] = n0 + r < N ? ids[n0 + r] : BYTE_DROPPED;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        load_row(v[r], table + (id[r] == BYTE_DROPPED ? 0 : (size_t)id[r] * C), C, lane);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float2 m = register_moments(v[r], C, lane);
        if (id[r] == BYTE_DROPPED) m.y = 0;  // of this row only the bias remains
        for (int j = 0; j < 8; j++) v[r][j] = (v[r][j] - m.x) * m.y * g[j] + b[j];
        store_row(x + (n0 + r) * C, v[r], n0 + r < N ? C : 0, lane);
    }
}

template <typename T>
static void embed_forward_tiled(act *x, const int *ids, const real *table, const real *gain,
                                const real *bias, size_t N, int C, void *work) {
    (void)work;
    bool aligned = aligned16(x) && aligned16(table) && aligned16(gain) && aligned16(bias);
    if (aligned && C % 8 == 0 && C <= WARP_C && N <= FEW_ROWS)
        LAUNCH((embed_rows_registers<1, T>), blocks_for(N, WARPS), THREADS, (T *)x, ids, table,
               gain, bias, N, C);
    else if (aligned && C % 8 == 0 && C <= WARP_C)
        LAUNCH((embed_rows_registers<ROWS_AT_ONCE, T>), blocks_for(N, WARPS * ROWS_AT_ONCE),
               THREADS, (T *)x, ids, table, gain, bias, N, C);
    else if (aligned && C % 4 == 0)
        LAUNCH((embed_rows_tiled<true, T>), blocks_for(N, WARPS), THREADS,
               (T *)x, ids, table, gain, bias, N, C);
    else
        LAUNCH((embed_rows_tiled<false, T>), blocks_for(N, WARPS), THREADS,
               (T *)x, ids, table, gain, bias, N, C);
    LAUNCHED("embed_forward_tiled", 0, array_bytes<T>(N, C) + array_bytes<float>(V, C) + 4.0 * N);
}

// forward:  x[n] = rows[ids[n]],  rows[v] = norm(table[v]),  rows[BYTE_DROPPED] = bias
// First drows[v] = sum of dx over the n with ids[n] == v, in order; then LayerNorm's backward on V
// rows; then what the dropped rows add to the bias.

// naive: a thread per (v,c) looks through all ids. Neighbours have the same v mostly: an id is one
// address for the warp, a row of dx whole lines. But 257 * 256 threads look at 32768 ids each, for
// 8.4 million values to be added: 2.05 ms.
__global__ void segment_sums_naive(float *drows, const float *dx, const int *ids, size_t N,
                                   int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)(V + 1) * C) return;
    int v = (int)(i / C), c = (int)(i % C);
    float sum = 0;
    for (size_t n = 0; n < N; n++)
        if (ids[n] == v) sum += dx[n * C + c];
    drows[i] = sum;
}
__global__ void add_row(float *to, const float *from, int C) {
    begin_dependent();
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) to[c] += from[c];
}

static void embed_backward_naive(real *dtable, real *dgain, real *dbias, const act *dx,
                                 const int *ids, const real *table, const real *gain, size_t N,
                                 int C, void *work) {
    size_t values = (size_t)(V + 1) * C;
    float *drows = (float *)work, *rest = drows + values / 4 * 4 + 4;  // float2 wants 8 bytes
    segment_sums_naive<<<blocks_for(values, THREADS), THREADS, 0, gpu_stream>>>(
        drows, (const float *)dx, ids, N, C);
    LAUNCHED("segment_sums_naive", 0, array_bytes<float>(N + V + 1, C) + 4.0 * N);
    norm_backward_naive(dtable, dgain, dbias, NULL, NULL, drows, table, gain, NULL, 1, V, C, true,
                        rest);
    LAUNCH(add_row, blocks_for(C, THREADS), THREADS, dbias, drows + (size_t)V * C, C);
    LAUNCHED("add_row", 0, 12.0 * C);
}

// tiled: a block per (v, slab of rows) first lists the n that hold v, in order, LIST ids at a time
// (ballots would do for 32; a scan over the block does for all), then a thread per column adds the
// listed rows. A common byte's rows are thus spread over the slabs, and the loads of the list are
// independent. Bytes: dx once; ids once per v and slab, from L2; part (slabs, V+1, C).
// Measured: float32 2.05 -> 0.034 ms on bytes drawn evenly; in bf16 50 us for 16384 rows of English
// text, whose commonest byte makes one list far longer than the others: see `product` below.
// What dropped bytes add to the bias is added by the kernel that knows the whole sum: with one slab
// this one, to which dbias is then given, else sum_slabs.
enum { LIST = 2048, PER_THREAD = LIST / THREADS, SLABS = 64 };

// Slabs of LIST rows, or of several times as many where that would take much scratch: slabs * C is
// at most 65536 (or C), so part (slabs, V+1, C) at most 67 MB.
static size_t embed_slabs(size_t N, int C) {
    size_t most = 65536 / (size_t)C < 1 ? 1 : 65536 / (size_t)C > SLABS ? SLABS : 65536 / C;
    size_t lists = ceil_div(N, LIST);
    return ceil_div(lists, ceil_div(lists, most));
}

template <typename T>
__global__ void segment_sums_tiled(float *part, float *dbias, const T *dx, const int *ids, size_t N,
                                   int C, size_t slab_rows) {
    __shared__ int list[LIST], warp_counts[WARPS];
    int v = blockIdx.x, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    size_t begin = blockIdx.y * slab_rows, end = begin + slab_rows < N ? begin + slab_rows : N;
    float *to = part + ((size_t)blockIdx.y * (V + 1) + v) * C;
    for (size_t n0 = begin; n0 < end; n0 += LIST) {
        int left = end - n0 < LIST ? (int)(end - n0) : LIST, mine = 0;
        // Eight ids in a row for each thread: its finds follow those of the thread before.
        for (int j = 0; j < PER_THREAD; j++) {
            int i = tid * PER_THREAD + j;
            mine += i < left && ids[n0 + i] == v;
        }
        int upto = mine;  // inclusive count over the warp's lanes, then over the warps before
        for (int d = 1; d < 32; d *= 2) {
            int below = __shfl_up_sync(~0u, upto, d);
            if (lane >= d) upto += below;
        }
        __syncthreads();  // not in the first round: all are done with the list and counts before
        if (lane == 31) warp_counts[warp] = upto;
        __syncthreads();  // all counts are there
        // Where mine begin: after those of the lanes below and of the warps before.
        int at = upto - mine, total = 0;
        for (int u = 0; u < WARPS; u++) {
            if (u < warp) at += warp_counts[u];
            total += warp_counts[u];
        }
        for (int j = 0; j < PER_THREAD; j++) {
            int i = tid * PER_THREAD + j;
            if (i < left && ids[n0 + i] == v) list[at++] = i;
        }
        __syncthreads();  // the list is whole
        bool first = n0 == begin;
        // Only here: ids are draw_batch's, many kernels ago, so the first list could be made while
        // the kernel before still ran. dx is that kernel's.
        if (first) begin_dependent();
        for (int c = tid; c < C && (first || total > 0); c += THREADS) {
            float sum = first ? 0 : to[c];  // mine: no one else touches it
            // Neighbouring threads: neighbouring columns of a listed row; eight rows on their way.
#pragma unroll 8
            for (int i = 0; i < total; i++) sum += (float)dx[(n0 + list[i]) * C + c];
            to[c] = sum;
        }
    }
    for (int c = tid; dbias && v == BYTE_DROPPED && c < C; c += THREADS) dbias[c] += to[c];
}

// drows (V,C) = the sums over slabs of part (slabs, V+1, C), whose last row goes to dbias. A thread
// per column of a row, neighbours next to each other; slabs in order.
__global__ void sum_slabs(float *drows, float *dbias, const float *part, int C, size_t slabs) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, values = (size_t)(V + 1) * C;
    if (i >= values) return;
    float sum = 0;
#pragma unroll 8
    for (size_t s = 0; s < slabs; s++) sum += part[s * values + i];
    if (i < (size_t)V * C)
        drows[i] = sum;
    else
        dbias[i - (size_t)V * C] += sum;
}

template <typename T>
static void embed_backward_tiled(real *dtable, real *dgain, real *dbias, const act *dx,
                                 const int *ids, const real *table, const real *gain, size_t N,
                                 int C, void *work) {
    size_t values = (size_t)(V + 1) * C, slabs = embed_slabs(N, C);
    size_t slab_rows = ceil_div(ceil_div(N, LIST), slabs) * LIST;
    float *drows = (float *)work, *part = drows + values / 4 * 4 + 4;  // both on 16 bytes
    bool one = slabs == 1;
    LAUNCH(segment_sums_tiled<T>, dim3(V + 1, (unsigned)slabs), THREADS,
           one ? drows : part, one ? dbias : NULL, (const T *)dx, ids, N, C, slab_rows);
    LAUNCHED("segment_sums_tiled", 0, array_bytes<T>(N, C) + 4.0 * N + 4.0 * slabs * values);
    if (!one) {
        LAUNCH(sum_slabs, blocks_for(values, THREADS), THREADS, drows, dbias, part, C, slabs);
        LAUNCHED("sum_slabs", 0, 4.0 * (slabs + 1) * values);
    }
    norm_backward_tiled<float>(dtable, dgain, dbias, NULL, NULL, drows, table, gain, NULL, 1, V, C,
                               true, part);
}

// product, for many rows in bf16: drows = onehot^T dx, a linear layer's weight gradient, with one 1
// in each row of onehot (N,V) and none where the byte is dropped. Products are exact; sums round.
// Bound before: the longest list. One byte of seven of an English text is a space.
// Bytes: dx once, onehot once written and read, PRODUCT_ROWS of it at a time. dbias is the gradient
// of such a layer's bias: the sum of all rows.
// Count for 16384 rows: 2*16384*256*256 = 2.1 GFLOP, nearly all with zeros; tensor cores have them
// to spare. onehot is 8.4 MB, small enough to stay in L2 until the product reads it.
// Cost: that scratch, three launches. The time no longer depends on the text.
// Measured, 16384 rows of English: 50 -> 3.3 us for one_hot, 10 the product, 3 to 9 its sums.
enum { PRODUCT_LEAST = 4096, PRODUCT_ROWS = 16384 };

static size_t product_rows(size_t N) { return N < PRODUCT_ROWS ? N : (size_t)PRODUCT_ROWS; }

// onehot: a thread writes eight values, 16 bytes, next to its neighbours'; the 32 threads of a row
// read one id. drows: the first `zeros` become 0, the thread's share: the product adds to it.
// Measured: 3.3 us for 16384 rows, 8.4 MB, 2.5 TB/s.
__global__ void one_hot(bf16 *onehot, float *drows, const int *ids, size_t N, size_t zeros) {
    begin_dependent();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (size_t j = i; j < zeros; j += (size_t)gridDim.x * blockDim.x) drows[j] = 0;
    if (i >= N * (V / 8)) return;
    int at = ids[i / (V / 8)] - 8 * (int)(i % (V / 8));  // where the 1 is among the eight, if it is
    // 0x3F80 is 1 in bf16. BYTE_DROPPED = 256 leaves `at` at 8 or more: a row of zeros.
    uint32_t w[4];
    for (int j = 0; j < 4; j++) w[j] = at == 2 * j ? 0x3F80 : at == 2 * j + 1 ? 0x3F800000 : 0;
    *(uint4 *)(onehot + 8 * i) = make_uint4(w[0], w[1], w[2], w[3]);
}

// The convolutions of the backend `tensor`.
static const Backend *tensor_convs(void) {
    static Backend b;
    if (!b.conv_backward_weight)
        for (int i = 0; i < n_tensor_kernels; i++)
            if (tensor_kernels[i].used_by[0]) kernel_install(&b, &tensor_kernels[i]);
    return &b;
}

static void embed_backward_product(real *dtable, real *dgain, real *dbias, const act *dx,
                                   const int *ids, const real *table, const real *gain, size_t N,
                                   int C, void *work) {
    if (N < PRODUCT_LEAST || C % 8 != 0 || !aligned16(dx) || !aligned16(work)) {
        embed_backward_tiled<bf16>(dtable, dgain, dbias, dx, ids, table, gain, N, C, work);
        return;
    }
    size_t values = (size_t)(V + 1) * C;
    float *drows = (float *)work;
    bf16 *onehot = (bf16 *)(drows + values);  // on 16 bytes, as C is a multiple of 8
    void *rest = onehot + product_rows(N) * V;
    for (size_t n = 0; n < N; n += PRODUCT_ROWS) {
        size_t rows = product_rows(N - n);
        LAUNCH(one_hot, blocks_for(rows * (V / 8), THREADS), THREADS,
               onehot, drows, ids + n, rows, n == 0 ? values : 0);
        LAUNCHED("one_hot", 0, array_bytes<bf16>(rows, V) + 4.0 * (rows + (n == 0 ? values : 0)));
        // A linear layer from V to C channels on one sequence of `rows` rows: its dw is drows.
        const WeightJob job = {drows, dbias, onehot, (const bf16 *)dx + n * C, 1};
        const ConvShape s = {1, (int)rows, V, C, 1, 1};
        tensor_convs()->conv_backward_weight(&job, 1, s, rest);
    }
    // dbias is complete: what LayerNorm's backward would add to it goes where nobody reads.
    norm_backward_tiled<float>(dtable, dgain, drows + (size_t)V * C, NULL, NULL, drows, table, gain,
                               NULL, 1, V, C, true, rest);
}

// ---- Loss ---------------------------------------------------------------------------------------
// forward:  p = cap * tanh(l/cap);  loss = log(sum_v exp(p_v)) - p_target
//           dl_v = scale * (1 - tanh^2) * (softmax(p)_v - [v == target])
// The largest p is taken off before exp, which leaves p's softmax as it is and no exp above 1.

// naive: one thread per row, which goes over its row three times, tanh and all; neighbours are 1 KB
// apart: 0.22 ms
__global__ void cross_entropy_row(float *losses, float *logits, const int *targets, float cap,
                                  float scale, size_t N) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float *l = logits + n * V, top = 0;
    int target = targets[n];
    for (int v = 0; v < V; v++) {
        float p = cap > 0 ? cap * tanhf(l[v] / cap) : l[v];
        if (v == 0 || p > top) top = p;
    }
    double sum = 0;
    for (int v = 0; v < V; v++)
        sum += exp_real((cap > 0 ? cap * tanhf(l[v] / cap) : l[v]) - top);
    float at_target = target < 0 ? 0 : cap > 0 ? cap * tanhf(l[target] / cap) : l[target];
    losses[n] = target < 0 ? 0 : (float)(log(sum) - (at_target - top));
    for (int v = 0; v < V && scale != 0; v++) {
        float t = cap > 0 ? tanhf(l[v] / cap) : 0, p = cap > 0 ? cap * t : l[v];
        float q = exp_real(p - top) / (float)sum;
        l[v] = target < 0 ? 0 : scale * (1 - t * t) * (q - (v == target ? 1 : 0));
    }
}

// Targets and losses; logits, and their gradient where it is wanted.
template <typename T>
static double loss_bytes(float scale, size_t N) {
    return 8.0 * N + (scale != 0 ? 2 : 1) * array_bytes<T>(N, V);
}

static void cross_entropy_naive(real *losses, act *logits, const int *targets, float cap,
                                float scale, size_t N) {
    cross_entropy_row<<<blocks_for(N, THREADS), THREADS, 0, gpu_stream>>>(
        losses, (float *)logits, targets, cap, scale, N);
    LAUNCHED("cross_entropy_naive", 0, loss_bytes<float>(scale, N));
}

// exp and tanh, as precise as the logits are stored. In bf16 by the GPU's own 2^x and 1/x, right to
// 2^-22 (PTX ISA) where bf16 rounds to 2^-9: one instruction each.
static __device__ float loss_exp(float x, float) { return exp_real(x); }
static __device__ float loss_exp(float x, bf16) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.44269504f));
    return e;
}
static __device__ float loss_tanh(float x, float) { return tanhf(x); }
static __device__ float loss_tanh(float x, bf16 type) {
    float r;  // 1/inf = 0 and 1/1 are the ends
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + loss_exp(2 * x, type)));
    return 1 - 2 * r;
}

// tiled: one warp per row, whose 256 values stay in the lanes' registers: lane i holds 8i..8i+7.
// Bytes: logits read once and written once, 67 MB.
// Bound before: three tanh a value and rows 1 KB apart. Now one tanh and one exp a value, and every
// load and store of a warp is a whole row: neighbouring lanes, neighbouring 16 bytes of bf16.
// Measured: float32 0.22 -> 0.021 ms; in bf16 13.9 us for 32768 rows, 33.6 MB, 2.4 TB/s.
template <typename T>
__global__ void cross_entropy_warp(float *losses, T *logits, const int *targets, float cap,
                                   float scale, size_t N) {
    begin_dependent();
    static_assert(V == 256, "eight values in each of 32 lanes");
    size_t n = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    const int target = targets[n], first = 8 * lane;
    T *l = logits + n * V + first;
    float p[8], slope[8], top = -INFINITY, sum = 0, at_target = 0;
    load_eight(p, l);
    const float per_cap = 1 / cap;
    for (int j = 0; j < 8; j++) {
        float t = cap > 0 ? loss_tanh(p[j] * per_cap, T()) : 0;
        if (cap > 0) p[j] = cap * t;
        slope[j] = 1 - t * t;  // kept, because p takes the place of l; 1 where cap is 0
        top = fmaxf(top, p[j]);
    }
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int j = 0; j < 8; j++) {
        p[j] -= top;
        if (first + j == target) at_target = p[j];
        p[j] = loss_exp(p[j], T());
        sum += p[j];
    }
    sum = warp_sum(sum);
    // From the lane that has it; without a target from some lane, for nothing.
    at_target = __shfl_sync(~0u, at_target, target / 8 & 31);
    if (lane == 0) losses[n] = target < 0 ? 0 : logf(sum) - at_target;
    if (scale == 0) return;  // only the losses are wanted
    const float per_sum = 1 / sum;
    for (int j = 0; j < 8; j++)
        // The lane's own eight logits are in registers: it overwrites what no other lane reads.
        p[j] = target < 0 ? 0 : scale * slope[j] * (p[j] * per_sum - (first + j == target));
    store_eight(l, p);
}

template <typename T>
static void cross_entropy_tiled(real *losses, act *logits, const int *targets, float cap,
                                float scale, size_t N) {
    LAUNCH(cross_entropy_warp<T>, blocks_for(N, WARPS), THREADS,
           losses, (T *)logits, targets, cap, scale, N);
    LAUNCHED("cross_entropy_tiled", 0, loss_bytes<T>(scale, N));
}

// naive: one thread adds all losses, in the CPU's order
__global__ void add_losses_one(StepState *state, const float *losses, size_t N) {
    double sum = 0;
    for (size_t n = 0; n < N; n++) sum += losses[n];
    state->loss_sum += sum;
}
static void add_losses_naive(StepState *state, const real *losses, size_t N, void *work) {
    (void)work;
    add_losses_one<<<1, 1, 0, gpu_stream>>>(state, losses, N);
    LAUNCHED("add_losses_naive", 0, 4.0 * N);
}

// The sum of one double per thread over a block, in thread 0: always the same tree of additions.
static __device__ double block_sum(double v) {
    __shared__ double warps[32];
    v = warp_sum(v);
    // In a kernel's first call this prevents nothing. In a later one: the first warp has read the
    // call before's sums before another warp writes over them.
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();  // every warp's sum is there before the first warp adds them
    return warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0);
}

// tiled: one block, each thread adds every 1024th loss, neighbours next to each other: 32 loads for
// 32768 rows, 131 KB in all. More blocks would need a second kernel to add up theirs.
__global__ void add_losses_block(StepState *state, const float *losses, size_t N) {
    begin_dependent();
    double sum = 0;
#pragma unroll 16
    for (size_t n = threadIdx.x; n < N; n += 1024) sum += losses[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) state->loss_sum += sum;
}
static void add_losses_tiled(StepState *state, const real *losses, size_t N, void *work) {
    (void)work;
    LAUNCH(add_losses_block, 1, 1024, state, losses, N);
    LAUNCHED("add_losses_tiled", 0, 4.0 * N);
}

// ---- Data ---------------------------------------------------------------------------------------

// One thread per byte; each finds its window's start for itself. Nothing to tile: a byte is read
// twice, by neighbours, and two ints are written. Neighbouring threads: neighbouring bytes of one
// window.
__global__ void draw_bytes(int *ids, int *targets, Corpus c, const StepState *state, uint64_t seed,
                           uint32_t byte_threshold, uint64_t first, int B, int T) {
    begin_dependent();
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)B * T) return;
    uint64_t row = first + n / T, t = n % T;
    const uint8_t *at = c.text + window_start(&c, seed, state->step, row) + t;
    bool dropped = byte_dropped(seed, state->step, byte_threshold, row * (uint64_t)T + t);
    ids[n] = dropped ? BYTE_DROPPED : at[0];
    targets[n] = at[1];
}
static void draw_batch_each(int *ids, int *targets, Corpus corpus, const StepState *state,
                            uint64_t seed, uint32_t byte_threshold, uint64_t first, int B, int T) {
    LAUNCH(draw_bytes, blocks_for((size_t)B * T, THREADS), THREADS,
           ids, targets, corpus, state, seed, byte_threshold, first, B, T);
    LAUNCHED("draw_batch_each", 0, 9.0 * B * T);  // of a byte of text an id and a target
}

// ---- AdamW --------------------------------------------------------------------------------------
//
// Sum of squares in double by slabs of NORM_SLAB gradients; one block adds the slabs' sums, notes
// the step's figures and prepares the update; one thread per parameter updates. The step's numbers
// lie in scratch between the kernels, so the host is not asked.
// Three kernels, because no parameter may change before the norm of all gradients is known: the end
// of a kernel is the barrier over all of the GPU. (One cooperative kernel with barriers of its own:
// 39.8 us against 22.7 for these three, 1.97 M parameters.)
// Bytes a parameter: 4 to square; 16 read and 16 written to update, 8 more with ema, 2 for the copy
// in bf16. Measured in a step of 1x128, 1.97 M, by the same kind of trace: squares 3.4 us (slabs of
// 4096 then), begin_step 2.5, update_four 16.6.
enum { NORM_SLAB = 8192 };

// naive: one thread per slab, so neighbours are 32 KB apart; one thread for all slabs
__global__ void squares_naive(double *part, const float *x, size_t n) {
    size_t slab = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (slab * NORM_SLAB >= n) return;
    size_t end = n < (slab + 1) * NORM_SLAB ? n : (slab + 1) * NORM_SLAB;
    double sum = 0;
    for (size_t i = slab * NORM_SLAB; i < end; i++) sum += (double)x[i] * x[i];
    part[slab] = sum;
}
// tiled: one block of 1024 per slab, neighbours next to each other, eight loads a thread that do
// not wait for each other. 1.97 M parameters: 241 slabs, 7.9 MB: as many blocks as run at a time.
// Tried and dropped: the block that ends last begins the step, 9.8 us for 6.4 in two kernels.
__global__ void squares_tiled(double *part, const float *x, size_t n) {
    begin_dependent();
    double sum = 0;
#pragma unroll
    for (int j = 0; j < NORM_SLAB; j += 1024) {
        size_t i = (size_t)blockIdx.x * NORM_SLAB + j + threadIdx.x;
        if (i < n) sum += (double)x[i] * x[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

// One block of THREADS (tiled) or one thread (naive: blockDim.x is 1, and the loop is the CPU's).
// The schedule, a cosine and two powers in double, takes one thread longer than all the rest: it is
// worked out before the wait, while the kernel before still runs. What it reads, the step's number,
// only this kernel writes.
__global__ void begin_step(AdamWStep *a, StepState *state, const double *part, size_t slabs,
                           double loss_scale, const __grid_constant__ Hyper h) {
    AdamWStep next;
    if (threadIdx.x == 0) next = adamw_schedule(&h, state->step);
    begin_dependent();
    double sum = 0;
    for (size_t i = threadIdx.x; i < slabs; i += blockDim.x) sum += part[i];
    if (blockDim.x > 1) sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    adamw_begin(&next, &h, state, sqrt(sum), state->loss_sum * loss_scale);
    *a = next;
    state->loss_sum = 0;  // for the next step's passes, which add to it
    if (next.finite) state->step++;  // the next step's draws read it
}

// naive: one thread per parameter
__global__ void update_one(float *p, float *g, float *m, float *v, float *ema, size_t n,
                           size_t n_decay, const AdamWStep *a) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || !a->finite) return;
    adamw_update(a, i < n_decay, &p[i], g[i], &m[i], &v[i], ema ? &ema[i] : NULL);
    g[i] = 0;
}
// tiled: four, 16 bytes at a time; the last n % 4 one by one. Bytes: 8 arrays of n, 63 MB for the
// paper's 1.97 M parameters. copy: the new parameters in bf16, NULL where nobody keeps one.
// Neighbouring threads: neighbouring 16 bytes of every array. No sum crosses threads: no barrier.
// Measured: 8.4 M parameters 0.68 -> 0.13 ms. 1.97 M in a step, 67 MB with the copy: 16.6 us, 4.0
// TB/s, more than memory gives: some of it must still lie in L2.
// Tried and dropped: eight parameters a thread, and loads ahead of the wait: no gain.
// Moments are read and written past all others there (evict first): nothing else needs them before
// the next update, and 15.8 MB of the paper's would push out what does: parameters, gradients, the
// copy. A step of 1x128 takes 97 us instead of 105.
__global__ void update_four(float *p, float *g, float *m, float *v, float *ema, bf16 *copy,
                            size_t n, size_t n_decay, const AdamWStep *step) {
    begin_dependent();
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    AdamWStep a = *step;
    if (i >= n || !a.finite) return;  // every thread decides alike: all parameters or none
    if (i + 4 > n) {
        for (; i < n; i++) {
            adamw_update(&a, i < n_decay, &p[i], g[i], &m[i], &v[i], ema ? &ema[i] : NULL);
            g[i] = 0;
            if (copy) copy[i] = (bf16)p[i];
        }
        return;
    }
    // All loads before the first store, as the arrays might overlap for all the compiler knows.
    float p4[4], g4[4], m4[4], v4[4], e4[4];
    *(float4 *)p4 = *(float4 *)(p + i);
    *(float4 *)g4 = *(const float4 *)(g + i);
    *(float4 *)m4 = __ldcs((const float4 *)(m + i));
    *(float4 *)v4 = __ldcs((const float4 *)(v + i));
    if (ema) *(float4 *)e4 = *(float4 *)(ema + i);
    for (int j = 0; j < 4; j++)
        adamw_update(&a, i + j < n_decay, &p4[j], g4[j], &m4[j], &v4[j], ema ? &e4[j] : NULL);
    *(float4 *)(g + i) = make_float4(0, 0, 0, 0);
    *(float4 *)(p + i) = *(float4 *)p4;
    __stcs((float4 *)(m + i), *(float4 *)m4);
    __stcs((float4 *)(v + i), *(float4 *)v4);
    if (ema) *(float4 *)(ema + i) = *(float4 *)e4;
    if (copy) put_four(copy + i, *(float4 *)p4);
}

// After the slabs' sums: doubles, so it lies on 8 bytes.
static AdamWStep *step_numbers(void *work, size_t slabs) {
    return (AdamWStep *)((double *)work + slabs);
}

static void optimize_naive(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                           size_t n_decay, StepState *state, double loss_scale, Hyper hyper,
                           void *work) {
    size_t slabs = ceil_div(n, NORM_SLAB);
    AdamWStep *a = step_numbers(work, slabs);
    squares_naive<<<blocks_for(slabs, 32), 32, 0, gpu_stream>>>((double *)work, grads, n);
    LAUNCHED("squares_naive", 0, 4.0 * n + 8.0 * slabs);
    begin_step<<<1, 1, 0, gpu_stream>>>(a, state, (double *)work, slabs, loss_scale, hyper);
    LAUNCHED("begin_step", 0, 8.0 * slabs);
    update_one<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>(params, grads, m, v, ema, n,
                                                                   n_decay, a);
    LAUNCHED("update_one", 0, (ema ? 40.0 : 32.0) * n);
}

static void optimize_tiled(real *params, real *grads, real *m, real *v, real *ema, size_t n,
                           size_t n_decay, StepState *state, double loss_scale, Hyper hyper,
                           void *work) {
    size_t slabs = ceil_div(n, NORM_SLAB);
    AdamWStep *a = step_numbers(work, slabs);
    LAUNCH(squares_tiled, (unsigned)slabs, 1024, (double *)work, grads, n);
    LAUNCHED("squares_tiled", 0, 4.0 * n + 8.0 * slabs);
    LAUNCH(begin_step, 1, THREADS, a, state, (const double *)work, slabs, loss_scale, hyper);
    LAUNCHED("begin_step", 0, 8.0 * slabs);
    LAUNCH(update_four, blocks_for(n, 4 * THREADS), THREADS, params, grads, m, v, ema,
           bf16_copy(params), n, n_decay, (const AdamWStep *)a);
    LAUNCHED("update_four", 0, ((ema ? 40.0 : 32.0) + (bf16_copy(params) ? 2 : 0)) * n);
}

// ---- Scratch ------------------------------------------------------------------------------------
//
// One allocation serves all layers, one after the other, and another those in branches: the largest
// need counts.
// Each line below is what a launcher above lays out, so the two change together.

static size_t gpu_work_bytes(size_t N, int K, int width, size_t n) {
    size_t w = (size_t)width, rows = (V + 1) * w + 4;  // drows, and up to 4 to lie on 16 bytes
    // Slabs * C <= max(65536, C) (embed_slabs), whatever C <= width is.
    size_t slab_values = ceil_div(N, LIST) * w, most = w > 65536 ? w : 65536;
    if (slab_values > most) slab_values = most;
    // Partial sums of dgain and dbias: of the batch's N rows, and of the table's V.
    size_t norm = norm_blocks(N) * 2 * w, norm_table = norm_blocks(V) * 2 * w;
    if (norm < 2 * N) norm = 2 * N;  // naive: two moments per row
    if (norm_table < 2 * V) norm_table = 2 * V;
    // segment_sums' part, whose place norm_backward on the table takes over once it is read.
    size_t embed = slab_values * (V + 1);
    if (embed < norm_table) embed = norm_table;
    embed += rows;
    size_t bytes = (embed > norm ? embed : norm) * sizeof(float);
    size_t optimizer = ceil_div(n, NORM_SLAB) * sizeof(double) + sizeof(AdamWStep);
    size_t conv = conv_work_bytes(N, K, width);
    if (bytes < optimizer) bytes = optimizer;
    return bytes < conv ? conv : bytes;
}

// What embed_backward_product takes: drows, onehot, and what a linear layer of so many rows, or
// LayerNorm on the table, takes after them.
static size_t product_work_bytes(size_t N, int width) {
    size_t rows = product_rows(N), w = (size_t)width;
    size_t tensor = tensor_work_bytes(rows, 1, width), conv = conv_work_bytes(rows, 1, width);
    size_t norm = norm_blocks(V) * 2 * w * sizeof(float), rest = tensor > conv ? tensor : conv;
    if (rest < norm) rest = norm;
    return (V + 1) * w * sizeof(float) + rows * V * sizeof(bf16) + rest;
}

static size_t bf16_work_bytes(size_t N, int K, int width, size_t n) {
    size_t bytes = gpu_work_bytes(N, K, width, n), conv = tensor_work_bytes(N, K, width);
    size_t product = N < PRODUCT_LEAST ? 0 : product_work_bytes(N, width);
    if (bytes < product) bytes = product;
    return bytes > conv ? bytes : conv;
}

// ---- The table, and the backends made from it ---------------------------------------------------

static const Kernel layer_kernels[] = {
    KERNEL(float, embed_forward, embed_forward_naive, "naive", "a thread per value"),
    KERNEL_PAIR(embed_forward, embed_forward_tiled, "a warp per row, four values a lane"),
    KERNEL(float, embed_backward, embed_backward_naive, "naive", "a thread per (byte, channel)"),
    KERNEL_PAIR(embed_backward, embed_backward_tiled, "list each byte's rows, add them"),
    KERNEL(bf16, embed_backward, embed_backward_product, "tensor", "one-hot rows times dx, bf16"),
    KERNEL(float, norm_forward, norm_forward_naive, "naive", "a thread per row"),
    KERNEL_PAIR(norm_forward, norm_forward_tiled, "a warp per row, in registers up to C = 256"),
    KERNEL(float, norm_backward, norm_backward_naive, "naive", "a thread per row, then per column"),
    KERNEL_PAIR(norm_backward, norm_backward_tiled, "the same, columns added over a block"),
    KERNEL(float, cross_entropy, cross_entropy_naive, "naive", "a thread per row"),
    KERNEL_PAIR(cross_entropy, cross_entropy_tiled, "a warp per row, in registers"),
    KERNEL(float, add_losses, add_losses_naive, "naive", "one thread"),
    KERNEL(float, add_losses, add_losses_tiled, "tiled tensor", "one block"),
    KERNEL(float, draw_batch, draw_batch_each, "naive tiled tensor", "a thread per byte"),
    KERNEL(float, optimize, optimize_naive, "naive", "a thread per parameter"),
    KERNEL(float, optimize, optimize_tiled, "tiled tensor", "four parameters a thread"),
};
enum { N_LAYER_KERNELS = sizeof layer_kernels / sizeof *layer_kernels, MAX_KERNELS = 128 };

const Kernel *gpu_kernels(int *n) {
    static Kernel all[MAX_KERNELS];
    static int count = 0;
    if (count == 0) {
        for (int i = 0; i < n_conv_kernels; i++) all[count++] = conv_kernels[i];
        for (int i = 0; i < n_tensor_kernels; i++) all[count++] = tensor_kernels[i];
        for (int i = 0; i < N_LAYER_KERNELS; i++) all[count++] = layer_kernels[i];
    }
    *n = count;
    return all;
}

// An entry of Backend is a pointer to a function: its bytes go where entry says that it lies.
void kernel_install(Backend *b, const Kernel *k) {
    memcpy((char *)b + k->entry, &k->launch, sizeof k->launch);
}

// Up to here a convolution leaves enough of a large GPU to what runs beside it.
enum { BRANCH_ROWS = 2048 };
static Backend memory_half(void) {
    Backend b = {};
    b.act_bytes = sizeof(float);
    b.available = gpu_available;
    b.alloc = gpu_alloc;
    b.free = gpu_free;
    b.zero = gpu_zero;
    b.upload = gpu_upload;
    b.download = gpu_download;
    b.write_acts = gpu_write_acts;
    b.read_acts = gpu_read_acts;
    b.work_bytes = gpu_work_bytes;
    b.branch_rows = BRANCH_ROWS;
    b.begin_branch = gpu_begin_branch;
    b.end_branch = gpu_end_branch;
    b.join = gpu_join;
    b.record = gpu_record;
    b.replay = gpu_replay;
    b.free_recording = gpu_free_recording;
    b.error = gpu_error;
    return b;
}
const Backend gpu_memory = memory_half();

// Two passes to a step of many rows: half the memory for activations, while a pass still fills the
// GPU. Where memory does not matter a step is faster in one pass: Training.at_once.
static size_t bf16_pass_rows(size_t N) { return N < 16384 ? N : N / 2; }

static void store_bf16(Backend *b) {
    b->act_bytes = sizeof(bf16);
    b->write_acts = bf16_write_acts;
    b->read_acts = bf16_read_acts;
    b->work_bytes = bf16_work_bytes;
    b->pass_rows = bf16_pass_rows;
    b->sync_params = bf16_sync_params;
}

static const struct {
    const char *name, *idea;
    bool bf16_acts;
} backends[] = {
    {"naive", "CUDA float32, the CPU's loops with a thread per output", false},
    {"tiled", "CUDA float32, tiles in shared memory and registers", false},
    {"tensor", "CUDA bf16 with float32 sums, tensor cores", true},
};
enum { N_BACKENDS = sizeof backends / sizeof *backends, BF16_CAPABILITY = 80 };

const char *const *gpu_backend_names(int *n) {
    static const char *fastest_last[N_BACKENDS];
    GpuInfo g;
    Error e;
    for (int i = 0; i < N_BACKENDS; i++) fastest_last[i] = backends[i].name;
    // Without tensor cores for bf16 the fastest is the one before.
    if (gpu_open(&g, &e) == 0 && g.capability < BF16_CAPABILITY) {
        fastest_last[N_BACKENDS - 2] = backends[N_BACKENDS - 1].name;
        fastest_last[N_BACKENDS - 1] = backends[N_BACKENDS - 2].name;
    }
    *n = N_BACKENDS;
    return fastest_last;
}

// Whether `name` is one of the words of `list`.
static bool names(const char *list, const char *name) {
    size_t length = strlen(name);
    for (const char *at = list; (at = strstr(at, name)) != NULL; at += length)
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
    return false;
}

const Backend *gpu_backend(const char *name, Error *e) {
    static Backend made[N_BACKENDS];
    if (gpu_open(NULL, e)) return NULL;
    for (int i = 0; i < N_BACKENDS; i++) {
        if (strcmp(name, backends[i].name) != 0) continue;
        int n;
        const Kernel *k = gpu_kernels(&n);
        made[i] = gpu_memory;
        made[i].name = backends[i].name;
        made[i].idea = backends[i].idea;
        if (backends[i].bf16_acts) store_bf16(&made[i]);
        for (int j = 0; j < n; j++)
            if (names(k[j].used_by, name)) kernel_install(&made[i], &k[j]);
        return &made[i];
    }
    fail(e, "no kernels named '%s': expected naive, tiled or tensor", name);
    return NULL;
}

// ---- Time, and the ceilings to hold it against --------------------------------------------------

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// So many calls of f, as something that can be recorded.
typedef struct {
    void (*f)(void *);
    void *arg;
    int times;
} Calls;
static void call_in_a_row(void *calls) {
    const Calls *c = (const Calls *)calls;
    for (int i = 0; i < c->times; i++) c->f(c->arg);
}

// Milliseconds of the calls; of their recording, where there is one.
static float calls_ms(Calls *calls, void *recording, cudaEvent_t begin, cudaEvent_t end) {
    float ms = 0;
    CHECK(cudaEventRecord(begin, gpu_stream));
    if (recording)
        gpu_replay(recording);
    else
        call_in_a_row(calls);
    CHECK(cudaEventRecord(end, gpu_stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms;
}

static void *record_calls(Calls *calls) {
    if (first_error[0]) return NULL;
    void *recording = gpu_record(call_in_a_row, calls);
    // What cannot be recorded is no error of the calls: they are made one by one, and note theirs.
    if (!recording) first_error[0] = 0, cudaGetLastError();
    return recording;
}

double gpu_time(void (*f)(void *), void *arg) {
    enum { MOST_RUNS = 50, MOST_CALLS = 50 };
    const float LONG = 0.25f;  // ms
    Calls calls = {f, arg, 3};
    float ms[MOST_RUNS], spent = 0;
    int runs = 0;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    call_in_a_row(&calls);  // code is loaded at its first launch; caches and clocks settle
    calls.times = 1;
    float once = calls_ms(&calls, NULL, begin, end);
    if (once < 1) calls.times = once * MOST_CALLS > 1 ? (int)(1 / once) : (int)MOST_CALLS;
    // What takes longer than LONG hides its launches; and a copy is slower as a graph's node.
    void *recording = once < LONG ? record_calls(&calls) : NULL;
    if (recording) calls_ms(&calls, recording, begin, end);  // the first replay sends it to the GPU
    // At least 5 runs, then until 0.2 s are spent: slow kernels must not take minutes.
    while (runs < MOST_RUNS && (runs < 5 || spent < 200) && spent < 2000 && !first_error[0]) {
        ms[runs] = calls_ms(&calls, recording, begin, end);
        spent += ms[runs++];
    }
    if (recording) gpu_free_recording(recording);
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    if (runs == 0 || first_error[0]) return -1;
    qsort(ms, (size_t)runs, sizeof *ms, compare_floats);
    return ms[runs / 2] / calls.times / 1e3;  // median, in seconds
}

// A trace: an event after every launch, read when all is done, so that the host never waits in
// between. at[0] stands before the first launch, launch[i] ended at at[i].
enum { MOST_LAUNCHES = 1024 };
bool gpu_tracing;
static struct {
    cudaEvent_t at[MOST_LAUNCHES + 1];
    KernelTime launch[MOST_LAUNCHES + 1];
    int n;
} trace;

void gpu_note_launch(const char *name, double flops, double bytes) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CHECK(cudaStreamIsCapturing(gpu_stream, &status));
    // An event that was recorded into a graph has no time to be read.
    if (status != cudaStreamCaptureStatusNone || trace.n > MOST_LAUNCHES) return;
    int i = trace.n++;
    const KernelTime launch = {name, 1, 0, flops, bytes};
    trace.launch[i] = launch;
    if (!trace.at[i]) CHECK(cudaEventCreate(&trace.at[i]));
    CHECK(cudaEventRecord(trace.at[i], gpu_stream));
}

// Keeps the GPU busy for 2 to 3 ms, in which the host queues what is traced: short kernels would
// else wait for their launches, and those waits count as theirs.
__global__ void hold() {
    for (long long begin = clock64(); clock64() - begin < 4000000;) continue;
}

int gpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n) {
    hold<<<1, 1, 0, gpu_stream>>>();
    LAUNCHED("hold", 0, 0);
    trace.n = 0;
    gpu_note_launch("", 0, 0);  // starts the clock
    gpu_tracing = true;
    f(arg);
    gpu_tracing = false;
    CHECK(cudaStreamSynchronize(gpu_stream));
    for (int i = 1; i < trace.n; i++) {
        const KernelTime *launch = &trace.launch[i];
        int j = 0;
        while (j < n && strcmp(rows[j].name, launch->name) != 0) j++;
        if (j == MOST_KERNEL_TIMES) continue;
        const KernelTime none = {launch->name, 0, 0, 0, 0};
        if (j == n) rows[n++] = none;
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, trace.at[i - 1], trace.at[i]));
        rows[j].launches++;
        rows[j].seconds += ms / 1e3;
        rows[j].flops += launch->flops;
        rows[j].bytes += launch->bytes;
    }
    return n;
}

// 537 MB read and 537 MB written: ten times what L2 holds.
enum { COPY_BYTES = 1 << 29 };
static void copy_once(void *p) {
    CHECK(cudaMemcpyAsync((char *)p + COPY_BYTES, p, COPY_BYTES, cudaMemcpyDeviceToDevice,
                          gpu_stream));
}
double gpu_copy_rate(void) {
    void *p = gpu_alloc(2 * (size_t)COPY_BYTES);
    if (!p) return 0;
    gpu_zero(p, 2 * (size_t)COPY_BYTES);
    double s = gpu_time(copy_once, p);
    gpu_free(p);
    return s > 0 ? 2.0 * COPY_BYTES / s : 0;
}

// Eight chains of multiply-adds per thread, enough to hide one's latency behind the others; eight
// blocks of 256 for each of an H100's 132 multiprocessors are all the threads that it can hold.
enum { FMA_LOOPS = 4096, FMA_CHAINS = 8, FMA_BLOCKS = 132 * 8 };
#define FMA_FLOPS (2.0 * FMA_LOOPS * FMA_CHAINS * FMA_BLOCKS * THREADS)
__global__ void fma_chains(float *out, float a, float b) {
    float v[FMA_CHAINS];
    for (int j = 0; j < FMA_CHAINS; j++) v[j] = threadIdx.x + j;
#pragma unroll 16
    for (int i = 0; i < FMA_LOOPS; i++)
        for (int j = 0; j < FMA_CHAINS; j++) v[j] = v[j] * a + b;
    float sum = 0;
    for (int j = 0; j < FMA_CHAINS; j++) sum += v[j];
    out[(size_t)blockIdx.x * blockDim.x + threadIdx.x] = sum;  // else nvcc drops the loops
}
static void fma_once(void *p) {
    fma_chains<<<FMA_BLOCKS, THREADS, 0, gpu_stream>>>((float *)p, 0.999f, 0.001f);
    LAUNCHED("fma_chains", FMA_FLOPS, 4.0 * FMA_BLOCKS * THREADS);
}
double gpu_fma_rate(void) {
    void *p = gpu_alloc((size_t)FMA_BLOCKS * THREADS * sizeof(float));
    if (!p) return 0;
    double s = gpu_time(fma_once, p);
    gpu_free(p);
    return s > 0 ? FMA_FLOPS / s : 0;
}

// A yardstick only, linked where it is there (make bench): nothing here computes with it.
#ifdef WITH_CUBLAS
#include <cublas_v2.h>
typedef struct {
    cublasHandle_t handle;
    void *a, *b, *c;
    int M, N, K;
    bool in_bf16;
} Gemm;
static void gemm_once(void *arg) {
    const Gemm *g = (const Gemm *)arg;
    const float one = 1, zero = 0;
    cudaDataType_t type = g->in_bf16 ? CUDA_R_16BF : CUDA_R_32F;
    // cuBLAS counts columns first: our (M,K)(K,N) is its (N,K)(K,M), so b comes before a.
    cublasGemmEx(g->handle, CUBLAS_OP_N, CUBLAS_OP_N, g->N, g->M, g->K, &one, g->b, type, g->N,
                 g->a, type, g->K, &zero, g->c, type, g->N, CUBLAS_COMPUTE_32F,
                 CUBLAS_GEMM_DEFAULT);
}
// Zeros would run cooler, and faster.
__global__ void fill_randomly(void *p, size_t n, bool in_bf16) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = (philox(1, (uint32_t)i, 0, 0, RNG_TEST).v[0] >> 8) / 8388608.0f - 1;
    if (in_bf16)
        ((bf16 *)p)[i] = (bf16)v;
    else
        ((float *)p)[i] = v;
}
enum { GEMM_WORK = 32 << 20 };  // bytes that cuBLAS's manual recommends for Hopper
double gpu_cublas_rate(int M, int N, int K, bool in_bf16) {
    Gemm g = {NULL, NULL, NULL, NULL, M, N, K, in_bf16};
    size_t a = (size_t)M * K, b = (size_t)K * N, c = (size_t)M * N, size = in_bf16 ? 2 : 4;
    char *memory = (char *)gpu_alloc(GEMM_WORK + (a + b + c) * size);
    if (!memory || cublasCreate(&g.handle) != CUBLAS_STATUS_SUCCESS) return 0;
    g.a = memory + GEMM_WORK, g.b = (char *)g.a + a * size, g.c = (char *)g.b + b * size;
    fill_randomly<<<blocks_for(a + b + c, THREADS), THREADS, 0, gpu_stream>>>(g.a, a + b + c,
                                                                              in_bf16);
    LAUNCHED("fill_randomly", 0, (double)((a + b + c) * size));
    cublasSetStream(g.handle, gpu_stream);
    // Else a recorded call might allocate its own. After the stream, which would take it back.
    cublasSetWorkspace(g.handle, memory, GEMM_WORK);
    double s = gpu_time(gemm_once, &g);
    cublasDestroy(g.handle);
    gpu_free(memory);
    return s > 0 ? 2.0 * M * N * K / s : 0;
}
#else
double gpu_cublas_rate(int M, int N, int K, bool in_bf16) {
    (void)M, (void)N, (void)K, (void)in_bf16;
    return 0;
}
#endif
