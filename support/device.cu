// device.cu: the GPU as a device: it is opened here, and its memory, the bf16 copies of parameters,
// errors, CUDA graphs and the side stream are kept here. Together these are the memory half of a
// Backend, which the backends of kernel_table.cu share. No layer is computed in this file.
//
// Read first: backend.h (the contract), device.cuh. Refuses: machines without a usable GPU
// (gpu_open says why). Run by:  ./train --device cuda
#include "support/device.cuh"

#include <stdio.h>
#include <stdlib.h>

// ---- The device and its errors ------------------------------------------------------------------

cudaStream_t gpu_stream;

static char first_error[ERROR_LEN];  // "" = none since Backend.error() last reported

void gpu_note(cudaError_t code, const char *what) {
    if (code == cudaSuccess || first_error[0]) return;
    snprintf(first_error, sizeof first_error, "%s: %s (%s)", what, cudaGetErrorString(code),
             cudaGetErrorName(code));
}

bool gpu_has_error(void) { return first_error[0] != 0; }
void gpu_forget_error(void) {
    first_error[0] = 0;
    cudaGetLastError();  // else the next LAUNCHED would report it for its kernel
}

// Asked about, never launched: does this build hold code that the GPU can run?
__global__ void does_nothing() {}

// The driver, the first device, and whether this build has code for it.
static int probe_gpu(GpuInfo *g, Error *e) {
    int devices = 0, driver = 0, runtime = 0;  // versions: 13000 is CUDA 13.0
    size_t free_bytes, all;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return fail(e, "no NVIDIA driver found: install it, or use --device cpu");
    cudaError_t code = cudaGetDeviceCount(&devices);
    if (code == cudaErrorInsufficientDriver)
        return fail(e, "the NVIDIA driver knows CUDA %d.%d, this build needs %d.%d: update the "
                       "driver, build with an older toolkit, or use --device cpu",
                    driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (code == cudaErrorNoDevice || (code == cudaSuccess && devices == 0))
        return fail(e, "no NVIDIA GPU found (is CUDA_VISIBLE_DEVICES set?): use --device cpu");
    if (code != cudaSuccess)
        return fail(e, "cannot reach the GPU: %s; use --device cpu", cudaGetErrorString(code));
    struct cudaDeviceProp p;
    code = cudaGetDeviceProperties(&p, 0);
    if (code == cudaSuccess) code = cudaSetDevice(0);
    if (code == cudaSuccess) code = cudaMemGetInfo(&free_bytes, &all);
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
    // One of our own, because the default stream cannot be captured as a graph.
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

// ---- Memory -------------------------------------------------------------------------------------

// All allocations, so that free knows how many bytes it gives back, and which parameters have a
// copy in bf16. A model has some ten arrays: a list is enough.
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
// Activations in float32 are what the host has: real is float (device.cuh).
static void gpu_write_acts(act *dst, const real *src, size_t n) {
    gpu_upload(dst, src, n * sizeof *src);
}
static void gpu_read_acts(real *dst, const act *src, size_t n) {
    gpu_download(dst, src, n * sizeof *dst);
}

// ---- What bf16 adds -----------------------------------------------------------------------------
//
// Tensor cores multiply bf16 by bf16, so activations are stored in it. Parameters stay float32,
// because a step of a thousandth of a weight is lost in 8 bits, and have a bf16 copy beside them: 2
// bytes more per parameter, and no conversion on the way into a convolution.

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

// A thread per value, neighbours next to each other, 6 bytes a parameter. It runs only where
// parameters came from outside: in a step update_four writes the copy beside the parameter.
__global__ void round_values(bf16 *to, const float *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = __float2bfloat16_rn(from[i]);
}
static void round_to_bf16(bf16 *to, const float *from, size_t n) {
    round_values<<<blocks_for(n, THREADS), THREADS, 0, gpu_stream>>>(to, from, n);
    LAUNCHED("round_to_bf16", 0, 6.0 * n);
}

// The first call for these parameters makes the copy, which is freed with them. Where there is no
// memory for a copy, every convolution converts its weights for itself.
static void bf16_sync_params(const real *params, size_t n) {
    Held *h = held;
    while (h && h->p != (const void *)params) h = h->next;
    if (!h) return;
    if (!h->copy) h->copy = (bf16 *)gpu_alloc(h->bytes / sizeof(real) * sizeof(bf16));
    if (h->copy) round_to_bf16(h->copy, params, n);
}

bf16 *bf16_copy(const real *p) {
    for (Held *h = held; h; h = h->next) {
        size_t offset = (size_t)((uintptr_t)p - (uintptr_t)h->p);  // before h->p: wraps, huge
        if (h->copy && offset < h->bytes) return h->copy + offset / sizeof(real);
    }
    return NULL;
}
// The caller must look which of the two was returned. Converted weights are written by the kernel
// right before its own, so that one must not fetch them before its wait (fast/conv_wgmma.cu).
const bf16 *bf16_weights(const real *w, size_t n, void *work) {
    const bf16 *copy = bf16_copy(w);
    if (copy) return copy;
    round_to_bf16((bf16 *)work, w, n);
    return (const bf16 *)work;
}

// ---- Launches that overlap, errors, CUDA graphs -------------------------------------------------

#if CUDART_VERSION >= 12030
cudaLaunchConfig_t dependent_launch(dim3 grid, dim3 block) {
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
#endif

static const char *gpu_error(void) {
    static char reported[ERROR_LEN];
    CHECK(cudaStreamSynchronize(gpu_stream));
    if (!first_error[0]) return NULL;
    memcpy(reported, first_error, sizeof reported);
    gpu_forget_error();  // an error is reported once
    return reported;
}

// The launches of one step as a graph: replaying it is one call, with no gap between kernels.
// Relaxed mode, because the first launch of a kernel may have to load its code.
static void *gpu_capture(void (*body)(void *), void *arg) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    if (cudaStreamBeginCapture(gpu_stream, cudaStreamCaptureModeRelaxed) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    body(arg);
    cudaError_t code = cudaStreamEndCapture(gpu_stream, &graph);
    if (code == cudaSuccess) code = cudaGraphInstantiate(&exec, graph, 0);
    if (graph) CHECK(cudaGraphDestroy(graph));  // exec has a copy of its own
    gpu_note(code, "capturing a step");
    return code == cudaSuccess ? exec : NULL;
}
static void gpu_replay(void *graph) { CHECK(cudaGraphLaunch((cudaGraphExec_t)graph, gpu_stream)); }
static void gpu_free_graph(void *graph) { CHECK(cudaGraphExecDestroy((cudaGraphExec_t)graph)); }

// ---- The side stream ----------------------------------------------------------------------------
//
// Between fork and end_fork gpu_stream names the side stream, so every launcher works there, too.
// Events order the two streams; captured, they are edges of the graph. A fork costs the main stream
// nothing. A kernel that joins cannot be launched ahead, some 2 us.
static cudaStream_t other_stream;  // the one of the two that gpu_stream does not name
enum { FORK_EVENTS = 64 };  // used in turn; a reused event stands for a later fork, which is safe
static cudaEvent_t fork_begin, fork_end[FORK_EVENTS];
static unsigned forks;

static void swap_streams() {
    cudaStream_t stream = gpu_stream;
    gpu_stream = other_stream;
    other_stream = stream;
}

static void gpu_fork() {
    if (!other_stream) {
        CHECK(cudaStreamCreateWithFlags(&other_stream, cudaStreamNonBlocking));
        CHECK(cudaEventCreateWithFlags(&fork_begin, cudaEventDisableTiming));
        for (int i = 0; i < FORK_EVENTS; i++)
            CHECK(cudaEventCreateWithFlags(&fork_end[i], cudaEventDisableTiming));
    }
    CHECK(cudaEventRecord(fork_begin, gpu_stream));
    CHECK(cudaStreamWaitEvent(other_stream, fork_begin, 0));
    swap_streams();
}
static int gpu_end_fork() {
    int i = (int)(forks++ % FORK_EVENTS);
    CHECK(cudaEventRecord(fork_end[i], gpu_stream));
    swap_streams();
    return i + 1;
}
static void gpu_join(int fork) { CHECK(cudaStreamWaitEvent(gpu_stream, fork_end[fork - 1], 0)); }

// ---- The memory half of a Backend ---------------------------------------------------------------

// Up to here a convolution leaves enough of a large GPU to what runs beside it.
enum { SIDE_ROWS = 2048 };
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
    b.side_rows = SIDE_ROWS;
    b.fork = gpu_fork;
    b.end_fork = gpu_end_fork;
    b.join = gpu_join;
    b.capture = gpu_capture;
    b.replay = gpu_replay;
    b.free_graph = gpu_free_graph;
    b.error = gpu_error;
    return b;
}
const Backend gpu_memory = memory_half();

// Two passes to a step of many rows: half the memory for activations, while a pass still fills the
// GPU. Where memory does not matter, a step is faster in one pass: Training.at_once.
static size_t bf16_pass_rows(size_t N) { return N < 16384 ? N : N / 2; }

void store_bf16(Backend *b) {
    b->act_bytes = sizeof(bf16);
    b->write_acts = bf16_write_acts;
    b->read_acts = bf16_read_acts;
    b->pass_rows = bf16_pass_rows;
    b->sync_params = bf16_sync_params;
}
