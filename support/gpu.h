// gpu.h: what the GPU files offer the programs, in plain C: the device, the table of kernels, their
// check and their timing. Read backend.h first; what the .cu files share is in device.cuh.
//
// Built without CUDA what train, bench and the tests call still exists and says so in one line, so
// that no program needs an #ifdef: gpu_open fails, and there are no kernels.
#ifndef GPU_H
#define GPU_H

#include "support/backend.h"

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
} GpuInfo;

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
// Which rung of the tensor backend's convolutions runs a shape on this GPU: "wgmma", "mma" or
// "block", each of which hands what it does not take to the next.
const char *tensor_rung(ConvShape s);

// Seconds on the GPU of one f(arg), which queues work, among several in a row: 1 to 50 of them, for
// 1 ms or so, captured as a CUDA graph and replayed; the median, divided. So the host's launches
// are not in it, and dependent launches overlap as in a step. All calls work on the same arrays:
// what L2 can hold of them it has from the call before. Calls that cannot be captured are made in a
// row without a graph. -1 where the device reported an error.
double gpu_time(void (*f)(void *), void *arg);
// Runs f(arg), and adds what each of its launches took to the row of its name: one of the n that
// are there, or a new one, in the order of first launches. Returns how many rows there are now, at
// most MOST_KERNEL_TIMES. Only what f launches itself is seen, not what it captures or replays,
// and of that the first 1024. Each runs by itself, because its clock is read before the next one
// may start: together they take longer than where dependent launches overlap. f may not use the
// side stream: there is one clock, of one stream.
int gpu_trace(void (*f)(void *), void *arg, KernelTime *rows, int n);

// Ceilings, measured: bytes/s of a large copy (read + written), FLOP/s of independent float32
// multiply-adds, FLOP/s of cuBLAS on (M,K)x(K,N) in float32 or bf16 (0 unless built WITH_CUBLAS).
double gpu_copy_rate(void);
double gpu_fma_rate(void);
double gpu_cublas_rate(int M, int N, int K, bool in_bf16);

// ---- kernel_check.c: one kernel against the plain loops -----------------------------------------

// Checks a few ugly shapes of every kernel of the backend. 0, or -1 with the kernel, the shape and
// the error found.
int gpu_selftest(const Backend *b, Error *e);

// One row on one shape: 0, or -1 where it could not run (no memory, a device error).
// `variant` picks among the op's options: residual or not, dropout or not, ...
enum { CHECK_VARIANTS = 4 };  // of each activation, GELU's first
int kernel_check(const Kernel *k, ConvShape s, int variant, bool exact, uint64_t seed,
                 KernelCheck *r, Error *e);

// Median seconds of a row at a shape (-1: could not run), and what that work is: operations (0 for
// what only moves data) and the bytes that must move, every operand once.
double kernel_seconds(const Kernel *k, ConvShape s, double *flops, double *bytes);

#else
#ifndef WITHOUT_CUDA  // why: the Makefile knows
#define WITHOUT_CUDA "make with nvcc on PATH"
#endif
static inline int gpu_open(GpuInfo *info, Error *e) {
    (void)info;
    return fail(e, "built without CUDA: %.400s", WITHOUT_CUDA);
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
static inline const char *tensor_rung(ConvShape s) { return (void)s, "none"; }
static inline double kernel_seconds(const Kernel *k, ConvShape s, double *flops, double *bytes) {
    (void)k, (void)s;
    return *flops = *bytes = -1;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
