// kernel_table.cu: the table of all kernels on a GPU, and the backends that are made from it:
// `naive` and `tiled` (float32) and `tensor` (bf16 activations). A backend is the memory half of
// device.cu and, for every operation, the last row of the table that names the backend.
//
// Read first: gpu.h (Kernel), device.cuh. The rows stand at the end of the files with the kernels:
// layers.cu, conv_kernels.cu, fast/.    Run by:  ./train --device cuda --kernels naive|tiled|tensor
#include "support/device.cuh"

// ---- Workspace ----------------------------------------------------------------------------------
//
// One allocation serves all layers, one after the other, and a second one those on the side stream:
// the largest need counts.

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t gpu_work_bytes(size_t N, int K, int width, size_t n) {
    size_t bytes = larger(norm_work_bytes(N, width), embed_work_bytes(N, width));
    bytes = larger(bytes, optimizer_work_bytes(n));
    return larger(bytes, conv_work_bytes(N, K, width));
}
static size_t bf16_work_bytes(size_t N, int K, int width, size_t n) {
    size_t bytes = larger(gpu_work_bytes(N, K, width, n), tensor_work_bytes(N, K, width));
    return larger(bytes, embed_product_work_bytes(N, width));
}

static size_t no_work(AttentionShape s) { return (void)s, 8; }

// ---- The table ----------------------------------------------------------------------------------

static const struct {
    const Kernel *rows;
    const int *n;
} files[] = {
    {conv_kernels, &n_conv_kernels},           {tensor_kernels, &n_tensor_kernels},
    {embed_kernels, &n_embed_kernels},         {layer_kernels, &n_layer_kernels},
    {optimizer_kernels, &n_optimizer_kernels}, {attention_kernels, &n_attention_kernels},
    {attention_mma_kernels, &n_attention_mma_kernels},
    {attention_wgmma_kernels, &n_attention_wgmma_kernels},
    {input_kernels, &n_input_kernels},
};
enum { N_FILES = sizeof files / sizeof *files, MAX_KERNELS = 128 };

const Kernel *gpu_kernels(int *n) {
    static Kernel all[MAX_KERNELS];
    static int count = 0;
    if (count == 0)
        for (int f = 0; f < N_FILES; f++)
            for (int i = 0; i < *files[f].n; i++) all[count++] = files[f].rows[i];
    *n = count;
    return all;
}

// An entry of Backend is a pointer to a function: its bytes go where entry says that it lies.
void kernel_install(Backend *b, const Kernel *k) {
    memcpy((char *)b + k->entry, &k->launch, sizeof k->launch);
}

// ---- The backends -------------------------------------------------------------------------------

static const struct {
    const char *name, *idea;
    bool bf16_acts;
} backends[] = {
    {"naive", "CUDA float32, the plain loops with a thread per output", false},
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
        made[i].work_bytes = backends[i].bf16_acts ? bf16_work_bytes : gpu_work_bytes;
        made[i].attention.work_bytes =
            backends[i].bf16_acts ? attention_wgmma_work_bytes : no_work;
        made[i].inputs.work_bytes = input_work_bytes;
        if (backends[i].bf16_acts) store_bf16(&made[i]);
        for (int j = 0; j < n; j++)
            if (names(k[j].used_by, name)) kernel_install(&made[i], &k[j]);
        return &made[i];
    }
    fail(e, "no kernels named '%s': expected naive, tiled or tensor", name);
    return NULL;
}
