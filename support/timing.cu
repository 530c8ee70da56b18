// timing.cu: how long something takes on the GPU (gpu_time, gpu_trace), and the ceilings to hold it
// against: the rates of a large copy, of multiply-adds and of cuBLAS.
//
// Read first: gpu.h (the contracts), device.cuh. Run by:  ./bench
// cuBLAS is a yardstick only, which `make bench` links where it is there: the Makefile builds this
// file a second time for it, WITH_CUBLAS.
#include "support/device.cuh"

#include <stdlib.h>

// ---- The time of a call -------------------------------------------------------------------------

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// So many calls of f, as something that can be captured as a CUDA graph.
typedef struct {
    void (*f)(void *);
    void *arg;
    int times;
} Calls;
static void call_in_a_row(void *calls) {
    const Calls *c = (const Calls *)calls;
    for (int i = 0; i < c->times; i++) c->f(c->arg);
}

// Milliseconds of the calls, or of their graph, where there is one.
static float calls_ms(Calls *calls, void *graph, cudaEvent_t begin, cudaEvent_t end) {
    float ms = 0;
    CHECK(cudaEventRecord(begin, gpu_stream));
    if (graph)
        gpu_memory.replay(graph);
    else
        call_in_a_row(calls);
    CHECK(cudaEventRecord(end, gpu_stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms;
}

static void *capture_calls(Calls *calls) {
    if (gpu_has_error()) return NULL;
    void *graph = gpu_memory.capture(call_in_a_row, calls);
    // A failed capture is no error of the calls: they are made one by one, and note their own.
    if (!graph) gpu_forget_error();
    return graph;
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
    call_in_a_row(&calls);  // code is loaded at its first launch; caches warm up, clocks rise
    calls.times = 1;
    float once = calls_ms(&calls, NULL, begin, end);
    if (once < 1) calls.times = once * MOST_CALLS > 1 ? (int)(1 / once) : (int)MOST_CALLS;
    // Calls longer than LONG hide their launches without a graph, in which a copy is slower.
    void *graph = once < LONG ? capture_calls(&calls) : NULL;
    if (graph) calls_ms(&calls, graph, begin, end);  // the first replay sends it to the GPU
    // At least 5 runs, then until 0.2 s are spent: slow kernels must not take minutes.
    while (runs < MOST_RUNS && (runs < 5 || spent < 200) && spent < 2000 && !gpu_has_error()) {
        ms[runs] = calls_ms(&calls, graph, begin, end);
        spent += ms[runs++];
    }
    if (graph) gpu_memory.free_graph(graph);
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    if (runs == 0 || gpu_has_error()) return -1;
    qsort(ms, (size_t)runs, sizeof *ms, compare_floats);
    return ms[runs / 2] / calls.times / 1e3;  // median, in seconds
}

// ---- A trace ------------------------------------------------------------------------------------
//
// An event after every launch. The events are read when all is done, so that the host never waits
// in between. at[0] stands before the first launch; launch[i] ended at at[i].
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
    // An event that is captured into a graph has no time to be read.
    if (status != cudaStreamCaptureStatusNone || trace.n > MOST_LAUNCHES) return;
    int i = trace.n++;
    const KernelTime launch = {name, 1, 0, flops, bytes};
    trace.launch[i] = launch;
    if (!trace.at[i]) CHECK(cudaEventCreate(&trace.at[i]));
    CHECK(cudaEventRecord(trace.at[i], gpu_stream));
}

// Keeps the GPU busy for 2 to 3 ms, in which the host queues what is traced. Short kernels would
// otherwise wait for their launches, and the waits would count as the kernels' time.
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

// ---- Ceilings -----------------------------------------------------------------------------------

// 537 MB read and 537 MB written: ten times what L2 holds.
enum { COPY_BYTES = 1 << 29 };
static void copy_once(void *p) {
    CHECK(cudaMemcpyAsync((char *)p + COPY_BYTES, p, COPY_BYTES, cudaMemcpyDeviceToDevice,
                          gpu_stream));
}
double gpu_copy_rate(void) {
    void *p = gpu_memory.alloc(2 * (size_t)COPY_BYTES);
    if (!p) return 0;
    gpu_memory.zero(p, 2 * (size_t)COPY_BYTES);
    double s = gpu_time(copy_once, p);
    gpu_memory.free(p);
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
    void *p = gpu_memory.alloc((size_t)FMA_BLOCKS * THREADS * sizeof(float));
    if (!p) return 0;
    double s = gpu_time(fma_once, p);
    gpu_memory.free(p);
    return s > 0 ? FMA_FLOPS / s : 0;
}

// cuBLAS. Nothing else here computes with it.
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
    char *memory = (char *)gpu_memory.alloc(GEMM_WORK + (a + b + c) * size);
    if (!memory || cublasCreate(&g.handle) != CUBLAS_STATUS_SUCCESS) return 0;
    g.a = memory + GEMM_WORK, g.b = (char *)g.a + a * size, g.c = (char *)g.b + b * size;
    fill_randomly<<<blocks_for(a + b + c, THREADS), THREADS, 0, gpu_stream>>>(g.a, a + b + c,
                                                                              in_bf16);
    LAUNCHED("fill_randomly", 0, (double)((a + b + c) * size));
    cublasSetStream(g.handle, gpu_stream);
    // Without a workspace of ours a captured call might allocate one. It is set after the stream,
    // because cublasSetStream would reset it.
    cublasSetWorkspace(g.handle, memory, GEMM_WORK);
    double s = gpu_time(gemm_once, &g);
    cublasDestroy(g.handle);
    gpu_memory.free(memory);
    return s > 0 ? 2.0 * M * N * K / s : 0;
}
#else
double gpu_cublas_rate(int M, int N, int K, bool in_bf16) {
    (void)M, (void)N, (void)K, (void)in_bf16;
    return 0;
}
#endif
