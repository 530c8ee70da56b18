// hopper.cuh: Hopper's instructions (sm_90a), one wrapper each: barriers in shared memory,
// dependent launches, the copy engine (TMA), registers that move between warpgroups, wgmma; the
// ring of stages that conv_wgmma.cu and weight_wgmma.cu both use; and on the host the tensor maps.
//
// Read tensor.cuh first. PTX ISA: mbarrier, griddepcontrol, cp.async.bulk.tensor, setmaxnreg, and
// the chapter "Asynchronous Warpgroup Level Matrix Instructions" with its "Matrix Descriptor
// Format". Needs CUDA 12 to build.
#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "fast/tensor.cuh"

#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#if CUDART_VERSION < 12000
#error "hopper.cuh needs CUDA 12 or newer: it is the first that knows tensor maps and wgmma"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for sm_90a, not sm_90 (make ARCH=90 does): the matrix instructions need the a"
#endif
// As HAVE_MMA in tensor.cuh.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAVE_WGMMA 1
#endif

enum {
    SHARED_BYTES = 227 * 1024,  // all that a block can have on Hopper
    MAX_SLOTS = 16,
    BARRIER_BYTES = 1024,  // and a block's 128 biases
    MAX_HALO = 192,  // rows: with a tile of 64, all that a box of a tensor map can have
    SUM_TILE = 64,   // rows of a tile; a wgmma has 64
};

// Whether conv_wgmma.cu's and weight_wgmma.cu's kernels run on this GPU, with this driver.
bool have_wgmma(void);

#ifdef HAVE_WGMMA
// ---- Barriers and dependent launches ------------------------------------------------------------

// A barrier in shared memory counts arrivals and bytes still to come; when both are zero its phase
// flips. mbarrier_wait(parity) returns once the phase of that parity is over.
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
// At the barrier in the same place of block `rank` of the cluster.
INLINE void mbarrier_arrive_at(uint32_t bar, int rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(bar),
        "r"(rank)
        : "memory");
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

// All threads of a cluster's blocks wait for each other; the 128 of warpgroup `group` do.
INLINE void cluster_barrier(void) {
    asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}
INLINE void group_barrier(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");  // 0 is __syncthreads
}

// Dependent launches: blocks of the next kernel may take the places of ours that are done, and set
// up; wait_for_previous returns when all of the kernel before is done and its writes are visible.
INLINE void let_next_start(void) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
INLINE void wait_for_previous(void) { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- The copy engine ----------------------------------------------------------------------------

// A box of a tensor map goes to shared memory, zeros where the box leaves the
// tensor; `bar` is told of its bytes. c0 counts values, c1 rows.
INLINE void tensor_copy(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0, int c1,
                        int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// The same into every block of the cluster that has a bit in `blocks`, at the same place of its
// shared memory; and each one's `bar` is told.
INLINE void tensor_copy_to(uint16_t blocks, uint32_t dst, const CUtensorMap *map, uint32_t bar,
                           int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
        : "memory");
}

// The copy engine reads a map before it first copies by it; read ahead, it costs no wait then.
INLINE void map_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies `bytes`, a multiple of 16, as they lie in memory.
INLINE void bulk_copy(uint32_t dst, const void *src, int bytes, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst),
        "l"(src), "r"(bytes), "r"(bar)
        : "memory");
}

// ---- wgmma --------------------------------------------------------------------------------------

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
    // In a cluster the uppermost byte of an address is the block's rank: a descriptor has no place
    // for it.
    Operand o = {(addr & 0x3FFFF) >> 4 | (uint32_t)(lead >> 4) << 16,
                 (uint32_t)(stride >> 4) | swizzle};
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
// their list in the text, the arguments after transpose_b are those themselves. The seven between
// are the numbers of what follows them.
#define WGMMA(N, regs, a_lo, a_hi, b_lo, b_hi, accumulate, transpose_a, transpose_b, ...)        \
    asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %" #accumulate ", 0;\n"         \
                 "mov.b64 a, {%" #a_lo ", %" #a_hi "}; mov.b64 b, {%" #b_lo ", %" #b_hi "};\n"   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" regs               \
                 "}, a, b, p, 1, 1, %" #transpose_a ", %" #transpose_b "; }"                     \
                 : __VA_ARGS__                                                                   \
                 : "r"(a.lo), "r"(a.hi), "r"(b.lo), "r"(b.hi), "r"(add),             \
                   "n"(TRANSPOSE_A), "n"(TRANSPOSE_B))
// The same with A in registers; a0 to a3 are the numbers of these.
#define WGMMA_REGISTERS(N, regs, a0, a1, a2, a3, b_lo, b_hi, accumulate, transpose_b, ...)       \
    asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %" #accumulate ", 0;\n"            \
                 "mov.b64 b, {%" #b_lo ", %" #b_hi "};\n"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" regs "}, {%" #a0   \
                 ", %" #a1 ", %" #a2 ", %" #a3 "}, b, p, 1, 1, %" #transpose_b "; }"             \
                 : __VA_ARGS__                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.lo), "r"(b.hi), "r"(add),   \
                   "n"(TRANSPOSE_B))
// clang-format on

// acc (64 x N) += A B, or = A B where !add. Thread i of the warpgroup holds of rows
// r = i/32*16 + i%32/4 and r + 8 the columns 8j + 2(i%4) and the next, j = 0..N/8-1:
// acc[4j], acc[4j+1] of row r, acc[4j+2], acc[4j+3] of row r + 8.
// TRANSPOSE_x: operand x has its summed index outside; wgmma transposes it.
template <int N, int TRANSPOSE_A, int TRANSPOSE_B>
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

// The same with A in registers, as sums lie there: a[0] and a[1] hold of rows r and r + 8 the
// columns 2(i%4) and the next, as bf16, a[2] and a[3] those 8 columns further on.
template <int N, int TRANSPOSE_B>
INLINE void wgmma_registers(float *acc, const uint32_t a[4], Operand b, int add) {
    static_assert(N == 64, "written out here");
    WGMMA_REGISTERS(64, REGS32, 32, 33, 34, 35, 36, 37, 38, 39, ACC32(acc, 0));
}
// These become sums of new products: what they were before does not count.
template <int N>
INLINE void wgmma_fresh(float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "=f"(acc[i]));
}
// No arithmetic on these moves over this: neither before a wait for them, nor, where it is to be
// done while others are multiplied, behind the wait for those.
template <int N>
INLINE void wgmma_pin(float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

// ---- The ring -----------------------------------------------------------------------------------

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
// One thread sets up the ring's barriers; `readers` warps, of all blocks that copy for each other,
// empty a slot. Then all threads of those blocks meet: no copy and no arrival may reach a barrier
// that is not set up yet.
template <int CLUSTER>
INLINE void ring_begin(uint32_t full, uint32_t empty, int slots, int readers) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < slots; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, CLUSTER * readers);
        }
        mbarrier_init_fence();
    }
    if (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();
}
// Waits until this warp's products are done, all but those of the last PENDING stages: then the
// slot that `empty` belongs to has a reader less.
// With CLUSTER blocks that copy for each other: in all of them.
template <int PENDING, int CLUSTER = 1>
INLINE void free_slot(uint32_t empty) {
    const int lane = threadIdx.x % 32;
    wgmma_wait<PENDING>();
    if (CLUSTER == 1 && lane == 0) mbarrier_arrive(empty);
    if (CLUSTER > 1 && lane < CLUSTER) mbarrier_arrive_at(empty, lane);
}
#endif

// ---- Tensor maps, on the host -------------------------------------------------------------------

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found through the runtime, so that programs start without libcuda. NULL:
// a driver from before CUDA 12.
static inline EncodeTiled encode_tiled(void) {
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
        cudaGetLastError();  // mma runs instead, and no later launch must find this error
        function = NULL;
    }
    return (EncodeTiled)function;
}

// A bf16 tensor (n2,n1,n0), of which boxes of b1 rows of b0 values are copied, b0 = 32 or 64.
// Returns false, and notes the
// error, where the driver refuses.
static inline bool make_map(CUtensorMap *map, const void *base, size_t n0, size_t n1, size_t n2,
                            int b0, int b1) {
    cuuint64_t dims[3] = {n0, n1, n2}, strides[2] = {n0 * sizeof(bf16), n0 * n1 * sizeof(bf16)};
    cuuint32_t box[3] = {(cuuint32_t)b0, (cuuint32_t)b1, 1}, steps[3] = {1, 1, 1};
    CUresult r = encode_tiled()(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, dims, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        b0 == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    // The driver's codes for the errors that it has here are those of the runtime.
    if (r != CUDA_SUCCESS) gpu_note((cudaError_t)r, "a tensor map");
    return r == CUDA_SUCCESS;
}
#endif
