// linear_wgmma.cu: linear layers of any width on Hopper's tensor cores (sm_90a): forward and
// backward to the input of a conv with K = 1. bf16 operands, float32 sums. C and O in multiples of
// 8 and pointers in multiples of 16 bytes; the rest goes to mma, the rung below.
//
// Read first: conv_wgmma.cu, whose rung keeps its weights in shared memory; hopper.cuh.   Run:
//   ./bench --only linear         # every rung at a transformer's widths, beside cuBLAS
//
//   sums (128 rows, TILE_O) = sum over chunks of 64 channels of  x[rows, chunk] w[chunk, TILE_O]
//
// Bound before: shared memory, which holds the weights of 128 channels made from up to 768 summed.
// Idea: both operands stream. A stage is a chunk of 64 summed channels of both, and each of two
// warpgroups multiplies 64 of its rows by all of its weights.
// Count, the tile of 128 rows x 256 channels: a stage is 4.2 MFLOP, 1024 cycles of tensor cores,
// and 48 KB: 48 bytes a cycle, where L2 gives some 30. So two blocks form a cluster and share their
// weights: each fetches half of them, and the copy engine writes that half into both. 32 bytes a
// cycle are left. Such layers move as many bytes as they multiply: 32768 x (1024 -> 256) with a
// residual 101 MB, 34 us, and 17 GFLOP, 22 us. So copies, products and epilogues all go on at a
// time: the sums leave the multiplying groups as bf16 in shared memory, where a third group finds
// them for its epilogue while those two are at the next tile.
// Cost: 64 KB for these sums, and 3 stages are left.
// Fewer rows get narrower tiles, 128 or 64 channels, so that all multiprocessors have one.
// Measured on an H100, 32768 rows, 2026-11-25: 1024 -> 256 forward with GELU 46.9 us, 2156 GB/s,
// 71 % of cuBLAS' rate on the bare product, which stores one array less; 256 -> 1024 to the input
// 55.3 us. On mma.sync 1024 -> 512 took 289 and 323 us.
// Tried and dropped: without the third group, both groups at their epilogues at a time, 57.8 and
// 59.9 us; arrivals at the other block with .release.cluster, each a fence of the whole GPU.
//
//   shared memory   | stage 0: x 128 rows x 64 channels | w 64 x TILE_O | stage 1 | ..
//                   | sums: 128 rows x TILE_O, bf16 | barriers | biases, for each warpgroup |
//   cluster         block 0: rows 0..127 of 256       block 1: rows 128..255       same channels
//                   each copies its own x, and its half of the rows of every box of w into both
//
//   one thread     | copies stage after stage, as slots become free
//   groups 0, 1    | multiply tile 0 | sums to shared memory | multiply tile 1 | sums ..
//   group 2                                                  | epilogue of tile 0 | ..
//
// Barriers:    waits, for                                               prevents
//   full       group, until a stage's bytes have come, of both blocks   multiplying what lay there
//   empty      the copying thread, until all warps of both blocks       overwriting it before, also
//              have multiplied a stage                                  in the other block
//   summed     group 2, until a tile's sums are written                 reading the tile before's
//   read       groups 0 and 1, until group 2 has read a tile's sums     overwriting them before
//   cluster    all, at the start; all, at the end                       a copy or an arrival at a
//                                                                       block not set up or gone
#include "fast/hopper.cuh"

enum {
    LINEAR_GROUPS = 2,
    LINEAR_ROWS = LINEAR_GROUPS * SUM_TILE,  // of a block's tile
    LINEAR_CLUSTER = 2,
    LINEAR_CHUNK = 64,  // summed channels of a stage: rows of 128 bytes
    LINEAR_THREADS = LINEAR_GROUPS * 128 + 256,
    MULTIPLY_REGISTERS = 176,
    OTHER_REGISTERS = 80,
    X_BYTES = LINEAR_ROWS * LINEAR_CHUNK * 2,
    BOX_BYTES = 64 * LINEAR_CHUNK * 2,  // forward: 64 summed channels x 64 made
    LINEAR_BARRIERS = 8 * (2 * MAX_SLOTS + 2),
    AT_ONCE = 2,  // epilogue: how many of a thread's pieces have their inputs on the way
};
static_assert(256 * (MULTIPLY_REGISTERS + OTHER_REGISTERS) <= 65536, "registers");
// Bytes: a stage; the sums; all but the ring.
static constexpr __host__ __device__ int linear_stage(int tile_o) {
    return X_BYTES + LINEAR_CHUNK * tile_o * 2;
}
static constexpr __host__ __device__ int linear_sums(int tile_o) {
    return LINEAR_ROWS * tile_o * 2;
}
static constexpr __host__ __device__ int linear_rest(int tile_o) {
    return linear_sums(tile_o) + LINEAR_BARRIERS + LINEAR_GROUPS * tile_o * (int)sizeof(float);
}
static constexpr __host__ __device__ int linear_slots(int tile_o) {
    return (SHARED_BYTES - linear_rest(tile_o)) / linear_stage(tile_o);
}
static_assert(linear_slots(256) >= 3 && linear_slots(64) <= MAX_SLOTS, "a ring");

typedef struct {
    CUtensorMap x, w;  // x: (n_in,N);  w: (O,C), innermost first
    Epilogue e;
    const float *bias;  // forward; or NULL
    int N, n_in, n_out, parts, tiles;  // parts: tiles beside each other; tiles: of all clusters
} LinearArgs;

#ifdef HAVE_WGMMA
// Barriers, as addresses; sums and biases, as offsets.
typedef struct {
    uint32_t full, empty, summed, read;
    int sums, bias;
} LinearPlaces;

// One thread's work: the stages in the order of the cluster's tiles.
template <bool BACKWARD, int TILE_O>
INLINE void linear_copy(const LinearArgs *a, uint32_t ring, LinearPlaces at, int first, int stride,
                        int rank) {
    enum { STAGE = linear_stage(TILE_O), SLOTS = linear_slots(TILE_O), BOXES = TILE_O / 64 };
    enum { W_HALF = TILE_O * LINEAR_CHUNK };  // bytes of what this block fetches
    const uint16_t both = 3;
    map_prefetch(&a->x);
    map_prefetch(&a->w);
    wait_for_previous();  // before x is read, or weights that the kernel before has converted
    let_next_start();
    Ring r = {0, 1};      // the first wait for each slot falls through: it is empty
    for (int tile = first; tile < a->tiles; tile += stride) {
        const int row = (tile / a->parts * LINEAR_CLUSTER + rank) * LINEAR_ROWS;
        const int made = tile % a->parts * TILE_O;
        for (int in = 0; in < a->n_in; in += LINEAR_CHUNK) {
            const uint32_t stage = ring + r.slot * STAGE, bar = at.full + 8 * r.slot;
            mbarrier_wait(at.empty + 8 * r.slot, r.phase);
            mbarrier_expect(bar, STAGE);
            tensor_copy(stage, &a->x, bar, in, row, 0);
            if (BACKWARD)  // rows are channels made
                tensor_copy_to(both, stage + X_BYTES + rank * W_HALF, &a->w, bar, in,
                               made + rank * TILE_O / 2, 0);
            else  // rows are channels summed, in boxes of 64 made
                for (int p = 0; p < BOXES; p++)
                    tensor_copy_to(both, stage + X_BYTES + p * BOX_BYTES + rank * BOX_BYTES / 2,
                                   &a->w, bar, made + 64 * p, in + rank * LINEAR_CHUNK / 2, 0);
            ring_skip(&r, 1, SLOTS);
        }
    }
}

// Where 8 channels of a row of sums lie. 8 rows of one column, and 8 columns of one row, are in
// different banks: within a row the pieces of 16 bytes are exchanged by its number.
template <int TILE_O>
INLINE uint32_t sums_at(int row, int piece) {
    return (uint32_t)(row * TILE_O * 2 + (piece ^ row % 8) * 16);
}

// A multiplying warpgroup's work: its 64 rows of every tile.
template <bool BACKWARD, int TILE_O>
INLINE void linear_multiply(const LinearArgs *a, char *smem, LinearPlaces at, int first,
                            int stride, int group) {
    enum { STAGE = linear_stage(TILE_O), SLOTS = linear_slots(TILE_O) };
    // Columns of a wgmma: for 256 ptxas wants more registers than 512 threads begin with.
    enum { WIDE = TILE_O < 128 ? TILE_O : 128 };
    const int lane = threadIdx.x % 32, q = lane % 4, thread = threadIdx.x % 128;
    const int row0 = group * SUM_TILE + thread / 32 * 16 + lane / 4;  // and row0 + 8
    const uint32_t ring = shared_addr(smem);
    const Operand x_op = operand(SWIZZLE_128, ring + group * SUM_TILE * 128, 16, 1024);
    // Backward the summed channels of w lie side by side, forward those that are made.
    const Operand w_op = operand(SWIZZLE_128, ring + X_BYTES, BACKWARD ? 16 : BOX_BYTES, 1024);
    const int w_step = BACKWARD ? 32 : 16 * 128;  // bytes from 16 summed channels to the next
    float *bias = (float *)(smem + at.bias) + group * TILE_O;
    float acc[TILE_O / 2];
    Ring r = {0, 0}, n = {0, 1};  // n.phase: of `read`, before whose first all is read
    for (int tile = first; tile < a->tiles; tile += stride, n.phase ^= 1) {
        if (!BACKWARD) {
            const int made = tile % a->parts * TILE_O;
            group_barrier(group);  // the tile before has read its biases
            for (int i = thread; i < TILE_O; i += 128)
                bias[i] = a->bias && made + i < a->n_out ? a->bias[made + i] : 0;
            group_barrier(group);  // all are written before one is read
        }
        uint32_t before = 0;
        for (int in = 0; in < a->n_in; in += LINEAR_CHUNK) {
            const Operand x = operand_at(x_op, r.slot * STAGE);
            const Operand w = operand_at(w_op, r.slot * STAGE);
            mbarrier_wait(at.full + 8 * r.slot, r.phase);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < LINEAR_CHUNK / 16; i++)
#pragma unroll
                for (int c = 0; c < TILE_O; c += WIDE)
                    wgmma<WIDE, 0, !BACKWARD>(acc + c / 2, operand_at(x, i * 32),
                                              operand_at(w, i * w_step + c * LINEAR_CHUNK * 2),
                                              in | i);
            wgmma_commit();
            if (in > 0) free_slot<1, LINEAR_CLUSTER>(before);  // the stage before is multiplied
            before = at.empty + 8 * r.slot;
            ring_skip(&r, 1, SLOTS);
        }
        free_slot<0, LINEAR_CLUSTER>(before);
        mbarrier_wait(at.read, n.phase);
#pragma unroll
        for (int j = 0; j < TILE_O / 8; j++) {
            float2 b = {0, 0};
            if (!BACKWARD) b = *(const float2 *)(bias + 8 * j + 2 * q);
            char *to = smem + at.sums + sums_at<TILE_O>(row0, j) + 4 * q;
            *(uint32_t *)to = pack(acc[4 * j] + b.x, acc[4 * j + 1] + b.y);
            *(uint32_t *)(to + 8 * TILE_O * 2) = pack(acc[4 * j + 2] + b.x, acc[4 * j + 3] + b.y);
        }
        __syncwarp();  // the warp's sums are written before it says so
        if (lane == 0) mbarrier_arrive(at.summed);
    }
}

// The epilogue of a tile: a thread has pieces of 8 channels of rows r and r + 8.
// Neighbouring lanes: neighbouring 16 bytes, 128 of a row; a warp: four rows.
template <bool BACKWARD, int TILE_O, Activation f>
INLINE void linear_epilogue_of(const LinearArgs *a, const char *sums, uint32_t summed, int phase,
                               size_t row0, int made, uint32_t step_number) {
    enum { PIECES = LINEAR_ROWS / 16 * TILE_O / 8 * 8 / 128 };
    const Dropout *drop = &a->e.drop;
    const int thread = threadIdx.x % 128;
    const bf16 *from = epilogue_input<BACKWARD>(&a->e);
    for (int i = 0; i < PIECES; i += AT_ONCE) {
        uint4 input[AT_ONCE][2];
        bool inside[AT_ONCE][2];
        int row[AT_ONCE], col[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {  // read now: the sums may not be there yet
            row[k] = (i + k) % 4 * 32 + thread / 64 * 16 + thread / 8 % 8;
            col[k] = (i + k) / 4 * 64 + thread % 8 * 8;
            for (int h = 0; h < 2; h++) {
                size_t r = row0 + row[k] + 8 * h;
                inside[k][h] = r < (size_t)a->N && made + col[k] < a->n_out;
                input[k][h] = make_uint4(0, 0, 0, 0);
                if (from && inside[k][h])
                    input[k][h] = *(const uint4 *)(from + r * a->n_out + made + col[k]);
            }
        }
        if (i == 0) mbarrier_wait(summed, phase);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const size_t r = row0 + row[k], i0 = r * a->n_out + made + col[k];
            const char *piece = sums + sums_at<TILE_O>(row[k], col[k] / 8);
            uint4 v[2] = {*(const uint4 *)piece, *(const uint4 *)(piece + 8 * TILE_O * 2)};
            uint32_t kept[2] = {0, 0};
            if (!BACKWARD && drop->threshold)
                draw_kept_rows<1>(kept, drop, step_number, drop->first + r, made + col[k],
                                  a->n_out);
            if (BACKWARD)
                epilogue_backward8<f>(&a->e, v, input[k], inside[k], i0, a->n_out);
            else
                epilogue_forward8<f>(&a->e, v, input[k], kept, 0, inside[k], i0, a->n_out);
        }
    }
}

// The third warpgroup's work.
template <bool BACKWARD, int TILE_O>
INLINE void linear_epilogue(const LinearArgs *a, const char *smem, LinearPlaces at, int first,
                            int stride, int rank) {
    wait_for_previous();  // before the epilogue's input or the step is read and anything is written
    const uint32_t step = !BACKWARD && a->e.drop.threshold ? a->e.drop.state->step : 0;
    int phase = 0;
    for (int tile = first; tile < a->tiles; tile += stride, phase ^= 1) {
        const size_t row = (size_t)(tile / a->parts * LINEAR_CLUSTER + rank) * LINEAR_ROWS;
        const int made = tile % a->parts * TILE_O;
#define LINEAR_EPILOGUE_CASE(name)                                                              \
    case ACT_##name:                                                                            \
        linear_epilogue_of<BACKWARD, TILE_O, ACT_##name>(a, smem + at.sums, at.summed, phase,   \
                                                         row, made, step);                      \
        break;
        switch (a->e.activation) {
            ACTIVATIONS(LINEAR_EPILOGUE_CASE)
        default: break;
        }
        __syncwarp();  // all lanes have read
        if (threadIdx.x % 32 == 0) mbarrier_arrive(at.read);
    }
}
#endif

template <bool BACKWARD, int TILE_O>
__global__ void __launch_bounds__(LINEAR_THREADS, 1)
    linear_wgmma(const __grid_constant__ LinearArgs a) {
#ifdef HAVE_WGMMA
    enum { SLOTS = linear_slots(TILE_O), RING = SLOTS * linear_stage(TILE_O) };
    extern __shared__ __align__(1024) char smem[];
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
    const int rank = blockIdx.x % LINEAR_CLUSTER, first = blockIdx.x / LINEAR_CLUSTER;
    const int stride = gridDim.x / LINEAR_CLUSTER;
    const uint32_t bar = shared_addr(smem) + RING + linear_sums(TILE_O);
    const LinearPlaces at = {bar, bar + 8 * MAX_SLOTS, bar + 16 * MAX_SLOTS,
                             bar + 16 * MAX_SLOTS + 8, RING,
                             RING + linear_sums(TILE_O) + LINEAR_BARRIERS};
    if (threadIdx.x == 0) {
        mbarrier_init(at.summed, LINEAR_GROUPS * 4);
        mbarrier_init(at.read, 4);
    }
    ring_begin<LINEAR_CLUSTER>(at.full, at.empty, SLOTS, LINEAR_GROUPS * 4);
    if (group < LINEAR_GROUPS) {
        registers_up<MULTIPLY_REGISTERS>();
        linear_multiply<BACKWARD, TILE_O>(&a, smem, at, first, stride, group);
    } else {
        registers_down<OTHER_REGISTERS>();
        if (group == LINEAR_GROUPS)
            linear_epilogue<BACKWARD, TILE_O>(&a, smem, at, first, stride, rank);
        else if (threadIdx.x % 128 == 0)
            linear_copy<BACKWARD, TILE_O>(&a, shared_addr(smem), at, first, stride, rank);
        __syncwarp();
    }
    cluster_barrier();  // the other block may still copy into this one, or arrive
#endif
}

// ---- Launchers

template <bool BACKWARD, int TILE_O>
static void linear_launch(const Epilogue &e, const float *bias, const void *x, const bf16 *w,
                          ConvShape s) {
    static bool prepared;
    const void *kernel = (const void *)linear_wgmma<BACKWARD, TILE_O>;
    LinearArgs a;
    memset(&a, 0, sizeof a);
    a.e = e;
    a.bias = bias;
    a.N = s.B * s.T;
    a.n_in = BACKWARD ? s.O : s.C;
    a.n_out = BACKWARD ? s.C : s.O;
    a.parts = (int)ceil_div(a.n_out, TILE_O);
    a.tiles = (int)ceil_div(a.N, LINEAR_CLUSTER * LINEAR_ROWS) * a.parts;
    if (!make_map(&a.x, x, (size_t)a.n_in, (size_t)a.N, 1, LINEAR_CHUNK, LINEAR_ROWS) ||
        !make_map(&a.w, w, (size_t)s.O, (size_t)s.C, 1, 64,
                  (BACKWARD ? TILE_O : LINEAR_CHUNK) / LINEAR_CLUSTER))
        return;
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
    prepared = true;
    size_t shared = (size_t)(linear_slots(TILE_O) * linear_stage(TILE_O) + linear_rest(TILE_O));
    // Of all clusters that fit, no more than give the busiest as many tiles as it has.
    size_t most = gpu()->sms / LINEAR_CLUSTER, busiest = ceil_div(a.tiles, most);
    launch(kernel, dim3((unsigned)(ceil_div(a.tiles, busiest) * LINEAR_CLUSTER)), LINEAR_THREADS,
           shared, &a, true, LINEAR_CLUSTER);
    LAUNCHED(BACKWARD ? "linear_wgmma backward" : "linear_wgmma forward", conv_flops(s),
             BACKWARD ? backward_bytes(e, s, sizeof(bf16)) : forward_bytes(e, s, sizeof(bf16)));
}

// Cycles of the busiest multiprocessor, to choose a tile by: products, and an epilogue of some 12
// cycles a column. Neither is measured; they only rank the tiles.
static size_t linear_cycles(size_t N, int n_in, int n_out, int tile_o) {
    size_t tiles = ceil_div(N, LINEAR_CLUSTER * LINEAR_ROWS) * ceil_div(n_out, tile_o);
    size_t stages = ceil_div(n_in, LINEAR_CHUNK);
    return ceil_div(tiles, gpu()->sms / LINEAR_CLUSTER) * tile_o * (4 * stages + 12);
}

template <bool BACKWARD>
static void linear_tiles(const Epilogue &e, const float *bias, const void *x, const bf16 *w,
                         ConvShape s) {
    size_t N = (size_t)s.B * s.T, cycles[3];
    int n_in = BACKWARD ? s.O : s.C, n_out = BACKWARD ? s.C : s.O;
    for (int i = 0; i < 3; i++) cycles[i] = linear_cycles(N, n_in, n_out, 64 << i);
    if (cycles[2] <= cycles[1] && cycles[2] <= cycles[0])
        linear_launch<BACKWARD, 256>(e, bias, x, w, s);
    else if (cycles[1] <= cycles[0])
        linear_launch<BACKWARD, 128>(e, bias, x, w, s);
    else
        linear_launch<BACKWARD, 64>(e, bias, x, w, s);
}

bool linear_wgmma_takes(ConvShape s) {
    return have_wgmma() && s.K == 1 && s.C % 8 == 0 && s.O % 8 == 0;
}

void conv_forward_linear(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                         void *work) {
    const bf16 *weights = NULL;
    if (linear_wgmma_takes(s)) weights = bf16_weights(w, (size_t)s.C * s.O, work);
    if (weights && all_aligned(e, x, weights, NULL))
        linear_tiles<false>(forward_epilogue(e), b, x, weights, s);
    else
        conv_forward_mma(x, w, b, e, s, work);
}

void conv_backward_input_linear(const act *dy, const real *w, Epilogue e, ConvShape s, void *work) {
    const bf16 *weights = NULL;
    if (linear_wgmma_takes(s)) weights = bf16_weights(w, (size_t)s.C * s.O, work);
    if (weights && all_aligned(e, dy, weights, NULL))
        linear_tiles<true>(e, NULL, dy, weights, s);
    else
        conv_backward_input_mma(dy, w, e, s, work);
}
