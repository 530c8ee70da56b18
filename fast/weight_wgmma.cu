// weight_wgmma.cu: rung 5 of the causal dilated convolution, on Hopper's tensor cores (sm_90a):
// backward to the weights, of several layers in one launch. bf16 operands, float32 sums. K <= 3,
// (K-1)*dil <= 192, C and O in multiples of 8, pointers in multiples of 16 bytes. What it cannot
// take goes to mma, the rung below it.
//
// Read first: conv_wgmma.cu (the other two products, the measurements), hopper.cuh.   Run:
//   make check-kernels            # every rung against the CPU, then timed, side by side
#include "fast/hopper.cuh"

// ---- Rung 5: wgmma, backward to the weights
//
//     dw[k] (C,O) = sum over rows of  x[row - k*dil]^T  dy[row]
//
// Both operands have the summed index, time, outside; wgmma transposes them.
// Bound before: operands on their way, from L2 and through registers.
// Idea: a block keeps a tile of sums, TAPS taps x CHUNKS*64 channels c x TILE_O channels o, in
// registers while its share of the rows, a split, passes by. A warpgroup owns one tap of 64
// channels c. Thread 0 copies between its products, because sums have all the registers.
// Count, the tile of 3 x 64 x 256: 196,608 bytes of float32, three quarters of the registers. A
// stage of 64 rows is 64*256*64*3*2 = 6.3 MFLOP, 1536 cycles of tensor cores, and 41 KB from L2,
// 27 bytes a cycle of some 30 that it gives: both nearly bind.
// Cost: C = O = 256, K = 3 are only 4 such tiles, so rows are cut into splits, each with blocks of
// its own (split-K). Each writes its partial sums, 196,608 bytes a tile, and a second kernel reads
// and adds them.
// Linear layers: with K = 1 a stage has two chunks of x for two of its three taps, 48 KB for 1024
// cycles, and L2 binds. Then the two blocks of a cluster, neighbours c, share dy: each fetches half
// of it into both, and 32 KB are left. Measured, one layer of 32768 rows: 256 -> 1024 57.5 -> 49.4
// us, 1024 -> 256 51.0 -> 46.2; but 256 -> 256 23.4 -> 26.9, which is not mended yet.
// So a launch takes up to MAX_WEIGHT_JOBS layers: more tiles need fewer splits.
// Few rows: the time is mostly dw's, read and written by as many blocks as there are tiles. A tile
// of 64 channels o makes four times as many, in one split or few. A single split adds to dw
// itself: no workspace, no second kernel. weight_plan below counts what is best.
// Measured: one layer of 32768 rows 115 -> 31.8 us. In a step of 32x1024, two passes of 16384 rows,
// all of them, linear layers and embedding included, 281 us and 94 for the second kernel.
//
//   shared memory   | stage 0 | stage 1 | .. 5 of 41 KB | barriers full, empty |
//   a stage         | dy: PARTS x [64 rows x 64 o] | x: CHUNKS x [64 + (K-1)*dil rows x 64 c] |
//                   rows of 128 bytes, swizzled;  tap k starts at row (K-1-k)*dil of x
//   step i          wait for stage i | queue its products | add up dy for db |
//                   wait for products i - 1 and free its stage | thread 0: refill that of i - 2
//
// Barriers: `full` as in conv_wgmma.cu. `empty`: thread 0 waits until all warps have multiplied a
// stage, and added it up, before the copy overwrites it.
// Every sum is added in an order that only the shape and the GPU decide.
// Tried and dropped: splits as clusters that add their sums through distributed shared memory,
// training at 29.0 M bytes/s for 30.0 M (32x1024); copies of dy shared by a cluster with K = 3,
// 67.3 -> 69.9 us; a warpgroup that copies and gives its registers to the others, because ptxas
// then keeps to 128 registers and m64n256 needs more.

enum {
    DY_PART = SUM_TILE * 128,  // bytes: 64 columns of dy in a stage
    MAX_TILE_O = 256,
    WEIGHT_LEAST_SLOTS = 3,  // one stage is multiplied, one freed, one on its way
    WEIGHT_LEAST_STEPS = 4,  // of a split, where there are several
    ADD_COLUMNS = 64,        // float4 that a block of the second kernel makes
    ADD_WAYS = 4,            // threads that share the splits of one
};

typedef struct {
    CUtensorMap x, dy;  // (C,T,B) and (O,T,B), innermost first
    float *dw, *db;
    int dil, x_rows;  // rows of x in a stage
} WeightSum;
typedef struct {
    WeightSum job[MAX_WEIGHT_JOBS];
    float4 *part;    // (job, o tile, group, split, pieces, threads): the accumulators as they stand
    float *db_part;  // (job, split, O)
    int C, O, K, steps_per_seq, steps, splits, groups, o_tiles, slots, x_bytes;
} WeightArgs;
static_assert(sizeof(WeightArgs) <= 4096, "what a kernel's arguments may take before CUDA 12.1");

#ifdef HAVE_WGMMA
// Sends for step `step` of all, as the ring's `slot`. rank: of the block in its cluster.
template <int CHUNKS, int TILE_O, int CLUSTER>
INLINE void copy_step(const WeightArgs *a, const WeightSum *job, uint32_t ring, int stage_bytes,
                      int halo, int step, int slot, int group, int o_tile, int rank) {
    enum { PARTS = TILE_O / 64, SHARE = PARTS / CLUSTER, DY_BYTES = PARTS * DY_PART };
    const uint32_t stage = ring + slot * stage_bytes;
    const uint32_t full = ring + a->slots * stage_bytes + 8 * slot;
    const int b = step / a->steps_per_seq, t0 = step % a->steps_per_seq * SUM_TILE;
    mbarrier_expect(full, DY_BYTES + CHUNKS * job->x_rows * 128);
    for (int c = 0; c < CHUNKS; c++)
        tensor_copy(stage + DY_BYTES + c * a->x_bytes, &job->x, full, (group * CHUNKS + c) * 64,
                    t0 - halo, b);
    for (int o = rank * SHARE; o < (rank + 1) * SHARE; o++)
        if (CLUSTER == 1)
            tensor_copy(stage + o * DY_PART, &job->dy, full, o_tile * TILE_O + o * 64, t0, b);
        else
            tensor_copy_to((1 << CLUSTER) - 1, stage + o * DY_PART, &job->dy, full,
                           o_tile * TILE_O + o * 64, t0, b);
}

// The products of one stage. x, dy: its operands.
template <int TILE_O>
INLINE void multiply_step(float *acc, Operand x, Operand dy, bool add) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < SUM_TILE / 16; s++) {
        Operand x_s = operand_at(x, s * 2048), dy_s = operand_at(dy, s * 2048);
        wgmma<TILE_O, 1, 1>(acc, x_s, dy_s, add | s);
    }
    wgmma_commit();
}

// db: the groups of a split share out dy's parts of 64 columns; eight warps add 8 rows each, a lane
// two neighbouring columns. The copy engine has permuted a row's 16-byte units by its number.
template <int PARTS>
INLINE void sum_dy(float2 sum[PARTS], const char *stage, int group, int groups, int warp,
                   int lane) {
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
        if (warp >= 8 || group + n * groups >= PARTS) break;
        const char *dy = stage + (group + n * groups) * DY_PART + warp * 8 * 128;
#pragma unroll
        for (int row = 0; row < 8; row++) {
            uint32_t w = *(const uint32_t *)(dy + row * 128 + ((lane * 4) ^ (row * 16)));
            sum[n].x += low(w), sum[n].y += high(w);
        }
    }
}
// The eight warps' sums of a column meet in shared memory, where one warp a part adds them up: that
// is the split's sum, for db or for the second kernel.
template <int PARTS>
INLINE void store_dy_sum(const WeightArgs *a, float2 *sums, const float2 sum[PARTS], int job_n,
                          int o0, int group, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < PARTS; n++)
        if (warp < 8) sums[(n * 8 + warp) * 32 + lane] = sum[n];
    __syncthreads();  // all eight are written before one warp adds them
    const int part = group + warp * a->groups, o = o0 + part * 64 + 2 * lane;
    float *db = a->job[job_n].db;
    if (warp >= PARTS || part >= PARTS || o >= a->O || !db) return;
    float2 total = {0, 0};
    for (int i = 0; i < 8; i++) {
        total.x += sums[(warp * 8 + i) * 32 + lane].x;
        total.y += sums[(warp * 8 + i) * 32 + lane].y;
    }
    if (a->splits > 1)
        *(float2 *)(a->db_part + ((size_t)job_n * a->splits + blockIdx.y) * a->O + o) = total;
    else
        db[o] += total.x, db[o + 1] += total.y;
}

// Where in dw the first value of a thread's piece 0 lies, piece j being acc[4j..4j+3]; another two
// lie 8 rows further on, piece j 8*j columns. inside: whether those rows exist. o0: the tile's
// first column.
template <int TAPS, int CHUNKS>
INLINE float *weight_at(const WeightArgs *a, const WeightSum *job, int group, int o0, int thread,
                        bool inside[2]) {
    const int tap = thread / 128 % TAPS, chunk = thread / 128 / TAPS, lane = thread % 32;
    const int c = (group * CHUNKS + chunk) * 64 + thread % 128 / 32 * 16 + lane / 4;
    inside[0] = c < a->C, inside[1] = c + 8 < a->C;
    return job->dw + ((size_t)tap * a->C + c) * a->O + o0 + 2 * (lane % 4);
}
// dw += the sums. A batch, as large as registers allow, is read before any of it is written, so
// that not each waits for memory alone. left: columns of dw from the tile's first on.
template <int PIECES>
INLINE void add_to_weights(float *dw, const bool inside[2], size_t O, int left, const float *acc) {
    enum { BATCH = PIECES == 8 ? 8 : 4 };
    static_assert(PIECES % BATCH == 0, "batches are whole");
    float *dw8 = dw + 8 * O;
#pragma unroll
    for (int n = 0; n < PIECES; n += BATCH) {
        float2 old[BATCH], old8[BATCH];
#pragma unroll
        for (int j = n; j < n + BATCH; j++) {
            if (8 * j < left && inside[0]) old[j - n] = *(const float2 *)(dw + 8 * j);
            if (8 * j < left && inside[1]) old8[j - n] = *(const float2 *)(dw8 + 8 * j);
        }
#pragma unroll
        for (int j = n; j < n + BATCH; j++) {
            float2 v = make_float2(old[j - n].x + acc[4 * j], old[j - n].y + acc[4 * j + 1]);
            float2 v8 = make_float2(old8[j - n].x + acc[4 * j + 2], old8[j - n].y + acc[4 * j + 3]);
            if (8 * j < left && inside[0]) *(float2 *)(dw + 8 * j) = v;
            if (8 * j < left && inside[1]) *(float2 *)(dw8 + 8 * j) = v8;
        }
    }
}
#endif

// Grid: x groups of 64*CHUNKS channels c, CLUSTER of them a cluster; y splits; z (job, tile of
// TILE_O channels o).
template <int TAPS, int CHUNKS, int TILE_O, int CLUSTER>
__global__ void __launch_bounds__(TAPS *CHUNKS * 128, 1)
    weight_wgmma(const __grid_constant__ WeightArgs a) {
#ifdef HAVE_WGMMA
    enum { BLOCK_WARPS = TAPS * CHUNKS * 4, PARTS = TILE_O / 64, DY_BYTES = PARTS * DY_PART };
    enum { BLOCK_THREADS = BLOCK_WARPS * 32, PIECES = TILE_O / 8 };
    static_assert(BLOCK_WARPS >= 8, "so many add up dy");
    extern __shared__ __align__(1024) char smem[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    const int rank = blockIdx.x % CLUSTER;
    const int group = blockIdx.x, job_n = blockIdx.z / a.o_tiles, o_tile = blockIdx.z % a.o_tiles;
    const WeightSum *job = &a.job[job_n];
    const int stage_bytes = DY_BYTES + CHUNKS * a.x_bytes, halo = (a.K - 1) * job->dil;
    const uint32_t ring = shared_addr(smem), full = ring + a.slots * stage_bytes;
    const uint32_t empty = full + 8 * MAX_SLOTS;
    const int begin = (int)((int64_t)a.steps * blockIdx.y / a.splits);
    const int end = (int)((int64_t)a.steps * (blockIdx.y + 1) / a.splits);
    if (threadIdx.x == 0) {
        map_prefetch(&job->x);
        map_prefetch(&job->dy);
    }
    ring_begin<CLUSTER>(full, empty, a.slots, BLOCK_WARPS);
    wait_for_previous();  // before x and dy are read, and dw or the workspace is written
    let_next_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < a.slots && begin + i < end; i++)
            copy_step<CHUNKS, TILE_O, CLUSTER>(&a, job, ring, stage_bytes, halo, begin + i, i,
                                               group, o_tile, rank);

    const int tap = warp / 4 % TAPS, chunk = warp / 4 / TAPS;
    // A tap is the same stage of x from another row on; every warpgroup reads all of dy.
    const Operand dy_op = operand(SWIZZLE_128, ring, DY_PART, 1024);
    const Operand x_op =
        operand_at(dy_op, DY_BYTES + chunk * a.x_bytes + (halo - tap * job->dil) * 128);
    float acc[TILE_O / 2];
    float2 sum[PARTS] = {};
    Ring r = {0, 0}, refill = {0, 0};  // refill: the slot of step i - 2
    for (int i = begin; i < end; i++) {
        mbarrier_wait(full + 8 * r.slot, r.phase);
        multiply_step<TILE_O>(acc, operand_at(x_op, r.slot * stage_bytes),
                              operand_at(dy_op, r.slot * stage_bytes), i > begin);
        sum_dy<PARTS>(sum, smem + r.slot * stage_bytes, group, a.groups, warp, lane);
        if (i > begin) {
            int before = r.slot ? r.slot - 1 : a.slots - 1;
            free_slot<1, CLUSTER>(empty + 8 * before);
        }
        ring_skip(&r, 1, a.slots);
        if (i - begin < 2) continue;
        if (threadIdx.x == 0 && i - 2 + a.slots < end) {
            mbarrier_wait(empty + 8 * refill.slot, refill.phase);
            copy_step<CHUNKS, TILE_O, CLUSTER>(&a, job, ring, stage_bytes, halo, i - 2 + a.slots,
                                               refill.slot, group, o_tile, rank);
        }
        __syncwarp();  // wgmma wants its warps whole
        ring_skip(&refill, 1, a.slots);
    }
    wgmma_wait<0>();
    __syncthreads();  // the ring is free for db's sums: no warp reads or multiplies in it any more
    store_dy_sum<PARTS>(&a, (float2 *)smem, sum, job_n, o_tile * TILE_O, group, warp, lane);
    if (a.splits > 1) {
        // As they stand in the registers, not in dw's order: neighbouring threads write
        // neighbouring 16 bytes, and the second kernel knows whose they are.
        float4 *part = a.part + threadIdx.x + (((size_t)blockIdx.z * a.groups + group) * a.splits +
                                               blockIdx.y) * PIECES * BLOCK_THREADS;
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            part[j * BLOCK_THREADS] =
                make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    } else {
        bool inside[2];
        float *dw = weight_at<TAPS, CHUNKS>(&a, job, group, o_tile * TILE_O, threadIdx.x, inside);
        add_to_weights<PIECES>(dw, inside, a.O, a.O - o_tile * TILE_O, acc);
    }
    if (CLUSTER > 1) cluster_barrier();  // the other block may still arrive at this one's `empty`
#endif
}

// dw += the partial sums of all splits, always in the same order. ADD_WAYS threads share what one
// float4 of an accumulator holds: with few tiles there would else be too few loads on their way.
// Neighbouring threads read neighbouring float4.
// Bytes: splits * 196,608 a tile of 3 x 64 x 256, written just before; then dw once read and once
// written, 786,432 bytes a layer of C = O = 256, K = 3.
// Grid: x the float4 of a tile's sums, and one more for db, y group, z (job, tile of o).
template <int TAPS, int CHUNKS, int TILE_O>
__global__ void __launch_bounds__(ADD_COLUMNS *ADD_WAYS)
    add_weight_splits(const __grid_constant__ WeightArgs a) {
#ifdef HAVE_WGMMA
    enum { BLOCK_THREADS = TAPS * CHUNKS * 128, SUMS = TILE_O / 8 * BLOCK_THREADS };
    static_assert(SUMS % ADD_COLUMNS == 0, "no thread lies outside");
    static_assert(TILE_O <= ADD_COLUMNS * ADD_WAYS, "one block makes a tile's db");
    __shared__ float4 of_way[ADD_WAYS][ADD_COLUMNS];
    wait_for_previous();  // before the sums are read
    let_next_start();
    const int job_n = blockIdx.z / a.o_tiles, o_tile = blockIdx.z % a.o_tiles, group = blockIdx.y;
    const WeightSum *job = &a.job[job_n];
    if (blockIdx.x == SUMS / ADD_COLUMNS) {
        int o = o_tile * TILE_O + threadIdx.x;
        if (group > 0 || threadIdx.x >= TILE_O || o >= a.O || !job->db) return;
        float sum = 0;
        for (int s = 0; s < a.splits; s++)
            sum += a.db_part[((size_t)job_n * a.splits + s) * a.O + o];
        job->db[o] += sum;
        return;
    }
    const int column = threadIdx.x % ADD_COLUMNS, way = threadIdx.x / ADD_COLUMNS;
    const int i = blockIdx.x * ADD_COLUMNS + column, j = i / BLOCK_THREADS;
    bool inside[2];
    float *dw = weight_at<TAPS, CHUNKS>(&a, job, group, o_tile * TILE_O + 8 * j, i % BLOCK_THREADS,
                                        inside);
    if (way > 0 || o_tile * TILE_O + 8 * j >= a.O) inside[0] = inside[1] = false;
    float2 old[2] = {{0, 0}, {0, 0}};  // read now: the sums hide how long it takes
    for (int h = 0; h < 2; h++)
        if (inside[h]) old[h] = *(const float2 *)(dw + h * 8 * (size_t)a.O);
    const float4 *part = a.part + ((size_t)blockIdx.z * a.groups + group) * a.splits * SUMS + i;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int s = way; s < a.splits; s += ADD_WAYS) {
        float4 p = part[(size_t)s * SUMS];
        sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
    }
    of_way[way][column] = sum;
    __syncthreads();  // all ways' sums are there before the first adds them
    if (way > 0) return;
    for (int n = 1; n < ADD_WAYS; n++) {
        float4 p = of_way[n][column];
        sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
    }
    if (inside[0]) *(float2 *)dw = make_float2(old[0].x + sum.x, old[0].y + sum.y);
    dw += 8 * (size_t)a.O;
    if (inside[1]) *(float2 *)dw = make_float2(old[1].x + sum.z, old[1].y + sum.w);
#endif
}

// ---- Planning and launching

// Bytes of workspace that partial sums may take: those of a wide tile for every multiprocessor, but
// of fewer on few rows, where 26 MB would be more than all activations.
static size_t partial_sum_bytes(size_t N, int K) {
    enum { FEW_ROWS = 4096, FEW_BLOCKS = 64 };
    size_t blocks = (size_t)gpu()->sms;
    if (N <= FEW_ROWS && blocks > FEW_BLOCKS) blocks = FEW_BLOCKS;
    return blocks * ((K < 3 ? 2 : 3) * 64 + 1) * MAX_TILE_O * sizeof(float);
}

// How n layers' weight gradients are computed: with which tile, its ring, and in how many splits.
typedef struct {
    int slots, x_bytes, splits, cluster;
    size_t tiles, stage, fetched;  // of a stage: bytes, and those that the block fetches itself
    double cycles;        // what the launch may take; infinite where the ring is too small
} WeightPlan;

// Cycles of a launch: products or copies, whichever is slower, then the sums' way into dw. These
// are estimates that rank plans. L2_RATE, bytes a cycle for a multiprocessor, is fitted so that
// they rank 5 to 64 splits of 16384 and 32768 rows as an H100 does.
static double weight_cycles(const WeightPlan *p, size_t sums, size_t steps, size_t splits) {
    enum { PRODUCTS = 2048, L2_RATE = 30, SECOND_KERNEL = 4000 };  // the first two: a cycle
    const size_t sms = (size_t)gpu()->sms, blocks = p->tiles * splits;
    double bytes = (double)sums * sizeof(float), products = (double)sums * SUM_TILE / PRODUCTS;
    double copies = (double)(p->fetched * (blocks < sms ? blocks : sms)) / (double)(L2_RATE * sms);
    double cycles = (double)ceil_div(steps, splits) * (products > copies ? products : copies);
    if (splits == 1) return (cycles + 2 * bytes / L2_RATE) * (double)ceil_div(blocks, sms);
    double second = SECOND_KERNEL + (double)blocks * bytes / (double)(L2_RATE * sms);
    return cycles + bytes / L2_RATE + second;
}

// The best number of splits for a tile: all blocks run at a time, and no split has few rows. Few
// numbers are left to choose from (at most 132 / tiles on an H100), so all are tried.
static WeightPlan weight_plan(const WeightJob *jobs, int n, ConvShape s, int chunks, int tile_o) {
    WeightPlan p = {0, 0, 1, 1, 0, 0, 0, INFINITY};
    for (int i = 0; i < n; i++) {
        int bytes = (int)ceil_div(SUM_TILE + (s.K - 1) * jobs[i].dil, 8) * 8 * 128;
        if (bytes > p.x_bytes) p.x_bytes = bytes;
    }
    p.stage = (size_t)(SUM_TILE * 2 * tile_o + chunks * p.x_bytes);
    p.cluster = s.K == 1 && tile_o == MAX_TILE_O && ceil_div(s.C, 64 * chunks) % 2 == 0 ? 2 : 1;
    p.fetched = p.stage - (size_t)(SUM_TILE * 2 * tile_o) * (p.cluster - 1) / p.cluster;
    p.slots = (int)((SHARED_BYTES - BARRIER_BYTES) / p.stage);
    if (p.slots > MAX_SLOTS) p.slots = MAX_SLOTS;
    p.tiles = n * ceil_div(s.C, 64 * chunks) * ceil_div(s.O, tile_o);
    const size_t sums = (size_t)s.K * chunks * 64 * tile_o;
    const size_t steps = s.B * ceil_div(s.T, SUM_TILE);
    const size_t rows = (size_t)s.B * s.T;
    size_t most = rows / (WEIGHT_LEAST_STEPS * SUM_TILE);
    if (most > gpu()->sms / p.tiles) most = gpu()->sms / p.tiles;
    size_t split = p.tiles * (sums + tile_o) * sizeof(float);
    size_t space = partial_sum_bytes(rows, s.K);
    if (most > space / split) most = space / split;
    if (p.slots < WEIGHT_LEAST_SLOTS) return p;
    for (size_t splits = 1; splits == 1 || splits <= most; splits++) {
        double cycles = weight_cycles(&p, sums, steps, splits);
        if (cycles < p.cycles) p.splits = (int)splits, p.cycles = cycles;
    }
    return p;
}
static_assert((SHARED_BYTES - BARRIER_BYTES) / (DY_PART + (SUM_TILE + MAX_HALO) * 128) >=
                  WEIGHT_LEAST_SLOTS,
              "the narrow tile's ring always fits");

template <int TAPS, int CHUNKS, int TILE_O, int CLUSTER>
static void weight_launch(const WeightJob *jobs, int n, ConvShape s, const WeightPlan *plan,
                          void *work) {
    enum { BLOCK_THREADS = TAPS * CHUNKS * 128 };
    enum { SUMS = TILE_O / 8 * BLOCK_THREADS };  // float4 of a block
    static bool prepared;
    const void *kernel = (const void *)weight_wgmma<TAPS, CHUNKS, TILE_O, CLUSTER>;
    WeightArgs a;
    memset(&a, 0, sizeof a);
    a.C = s.C, a.O = s.O, a.K = s.K, a.splits = plan->splits, a.x_bytes = plan->x_bytes;
    for (int i = 0; i < n; i++) {
        WeightSum *job = &a.job[i];
        job->dw = jobs[i].dw, job->db = jobs[i].db, job->dil = jobs[i].dil;
        job->x_rows = SUM_TILE + (s.K - 1) * job->dil;
        if (!make_map(&job->x, jobs[i].x, (size_t)s.C, (size_t)s.T, (size_t)s.B, 64,
                      job->x_rows) ||
            !make_map(&job->dy, jobs[i].dy, (size_t)s.O, (size_t)s.T, (size_t)s.B, 64, SUM_TILE))
            return;
    }
    a.steps_per_seq = (int)ceil_div(s.T, SUM_TILE);
    a.steps = s.B * a.steps_per_seq;
    a.groups = (int)ceil_div(s.C, 64 * CHUNKS);
    a.o_tiles = (int)ceil_div(s.O, TILE_O);
    a.part = (float4 *)work;
    a.db_part = (float *)(a.part + plan->tiles * a.splits * SUMS);
    // No more slots than steps: what is left is the next kernel's, whose blocks may come early.
    int most = (int)ceil_div(a.steps, a.splits);
    a.slots = plan->slots < most ? plan->slots : most;
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
    prepared = true;
    unsigned jobs_tiles = (unsigned)(n * a.o_tiles);
    launch(kernel, dim3((unsigned)a.groups, (unsigned)a.splits, jobs_tiles), BLOCK_THREADS,
           a.slots * plan->stage + BARRIER_BYTES, &a, true, CLUSTER);
    LAUNCHED("weight_wgmma", n * conv_flops(s), n * weight_bytes(s, sizeof(bf16), a.splits));
    if (a.splits == 1) return;
    launch((const void *)add_weight_splits<TAPS, CHUNKS, TILE_O>,
           dim3(SUMS / ADD_COLUMNS + 1, (unsigned)a.groups, jobs_tiles), ADD_COLUMNS * ADD_WAYS, 0,
           &a, true);
    LAUNCHED("add_weight_splits", 0, n * splits_bytes(s, a.splits));
}

// Launches with the wide tile, or with the narrow one of 64 channels o.
template <int TAPS, int NARROW_CHUNKS, int CHUNKS, int TILE_O>
static void weight_tile(const WeightJob *jobs, int n, ConvShape s, void *work) {
    WeightPlan narrow = weight_plan(jobs, n, s, NARROW_CHUNKS, 64);
    WeightPlan wide = weight_plan(jobs, n, s, CHUNKS, TILE_O);
    if (narrow.cycles < wide.cycles)
        weight_launch<TAPS, NARROW_CHUNKS, 64, 1>(jobs, n, s, &narrow, work);
    else if (TAPS == 1 && wide.cluster == 2)
        weight_launch<TAPS, CHUNKS, TILE_O, TAPS == 1 ? 2 : 1>(jobs, n, s, &wide, work);
    else
        weight_launch<TAPS, CHUNKS, TILE_O, 1>(jobs, n, s, &wide, work);
}

void conv_backward_weight_wgmma(const WeightJob *jobs, int n, ConvShape s, void *work) {
    bool takes = have_wgmma() && s.K <= 3 && s.C % 8 == 0 && s.O % 8 == 0 && aligned16(work);
    for (int i = 0; i < n; i++)
        takes = takes && (s.K - 1) * jobs[i].dil <= MAX_HALO && aligned16(jobs[i].x) &&
                aligned16(jobs[i].dy) && aligned16(jobs[i].dw);
    if (!takes) {
        conv_backward_weight_mma(jobs, n, s, work);
        return;
    }
    // Layers that fill the GPU alone gain nothing from one launch. (256 channels: 4 tiles a layer.)
    size_t tiles = ceil_div(s.C, 64) * ceil_div(s.O, MAX_TILE_O);
    int at_once = n * tiles <= (size_t)gpu()->sms ? n : 1;
    for (int i = 0; i < n; i += at_once) {
        if (s.K == 1) weight_tile<1, 2, 2, 256>(jobs + i, at_once, s, work);
        if (s.K == 2) weight_tile<2, 1, 2, 128>(jobs + i, at_once, s, work);
        if (s.K == 3) weight_tile<3, 1, 1, 256>(jobs + i, at_once, s, work);
    }
}

// The partial sums' tiles, splits and layers are at most `blocks` in product. `tiles` are as large
// as a block's registers hold; the narrow tiles are more, but no more bytes.
size_t weight_wgmma_work_bytes(size_t N, int K, int width) {
    size_t w = (size_t)width, splits = N / (WEIGHT_LEAST_STEPS * SUM_TILE);
    if (!have_wgmma() || splits < 2) return 0;
    size_t tiles = ceil_div(w, 64) * ceil_div(w, 128), blocks = tiles * splits * MAX_WEIGHT_JOBS;
    size_t bytes = blocks * ((K < 3 ? 2 : 3) * 64 + 1) * MAX_TILE_O * sizeof(float);
    size_t most = partial_sum_bytes(N, K);
    return bytes < most ? bytes : most;
}
