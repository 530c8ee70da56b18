// attention_wgmma.cu: attention on Hopper's tensor cores (sm_90a), heads of 64 channels, bf16 with
// float32 sums. What it cannot take goes to attention_mma.cu, the rung below it.
//
// Read first: mixers/attn.c (what is computed), attention_mma.cu (scores become factors without
// leaving their registers), hopper.cuh (the instructions), conv_wgmma.cu (a thread that copies,
// warpgroups that multiply).   Run:
//   make check-kernels            # every rung against the CPU, then timed, side by side
//
// Bound before: mma.sync reads both factors from registers, so every warp fetches every tile from
// shared memory; and a warp that computes exponentials multiplies nothing.
// Idea: a warpgroup owns 64 rows of a head, in registers, and walks over tiles of 64 others, which
// a thread of its own copies to a ring of slots. A wgmma reads a tile from shared memory in either
// order, its rows as columns (scores) or its channels (values), and runs beside other instructions:
//
//   tensor cores   | scores n | values n-1 |               | scores n+1 | values n | ..
//   a warpgroup               | exponentials n .. | scale o |            | exponentials n+1 ..
//
// What it leaves idle the other warpgroups take: three forward; two backward, which need more
// registers. Backward has two kernels without atomics, as the rung below; p and dp are computed in
// both. The first owns queries: it makes delta from out and the gradients that it has anyway, then
// dq and dgain's partial sums. The second owns keys.
//
// Count: forward 4 P d operations; backward 6 P d and 8 P d, of which 4 P d are done twice. 64x2048
// with 4 heads: P = 5.4e8 pairs; 138, 206 and 275 GFLOP. A multiprocessor does 4096 a cycle and 16
// exponentials: a tile of 64 x 64 takes forward 256 cycles of either, so neither alone binds, and
// some 300 instructions of each of 4 warps: without any product it still takes 70 % of the time.
// Bytes: a slot's, 16 KB, serve 192 rows forward and 128 backward. Blocks take items in turn, those
// with most tiles first, so that none has more than 3 % above the mean.
//
//   shared memory   | own tiles | ring: 8 slots | for keys: lse, delta of each slot | barriers |
//   a tile          64 rows of 128 bytes, swizzled; rows beyond a sequence are zeros, by the map
//   own tiles       forward q     queries q, dout     keys k, v       for each warpgroup
//   a slot          k, v          k, v                q, dout
//
// Barriers:     waits, for                                                prevents
//   own full    groups, until an item's own tiles have come               reading the last item's
//   own empty   the copying thread, until all warps have read them        overwriting them before
//   full        groups, until a slot's tiles have come                    multiplying old ones
//   empty       the copying thread, until all warps are done with a slot  overwriting it before
//
// Two rules of ptxas, or it runs products one by one and says so (C7514, C7515): sums that another
// instruction changes must have been waited for with all products before them, and no wgmma stands
// under a condition. It moves a wait up over arithmetic, but not over a branch: forward the walk to
// the next tile stands between the exponentials and the wait, backward the mask.
//
// Measured on an H100, 4 heads of 64, W = T, many calls in a row, 2026-11-25, us (TFLOP/s: 4 P d
// and 10 P d); mma in an earlier run of that day, FlashAttention-2 and cuDNN in another, both in
// MEASURED.md, with the commands:
//     B x T      forward           mma   FA2  cuDNN    backward         mma   FA2  cuDNN
//     1x128         3.9            5.8                   12.7          12.7
//     64x512       41.0 (210)     59.6    67     42      145  (148)     224   291    216
//     32x1024      64.1 (268)     91.6    98     61      189  (227)     351   378    266
//     64x2048     383   (359)    539     526    357     1182  (291)    2131  1973   1308
// Tried and dropped, us, each beside what it was to beat in one run (two runs of one build differed
// by up to 5 %): forward 128 keys a step and two warpgroups, 383 -> 413 at 64x2048, 41.9 -> 47.3 at
// 64x512; 96 keys, 383 -> 380 and 41.9 -> 42.6; the scores after the next begun before the
// exponentials, 408 -> 442 and 46.2 -> 44.7; items drawn from a counter, 408 -> 401, 46.2 -> 46.7.
#include "fast/hopper.cuh"
#include "mixers/attn.cuh"

enum {
    HEAD = 64,
    TILE = 64,  // rows; a wgmma has as many
    TILE_BYTES = TILE * HEAD * 2,
    STAGE_BYTES = 2 * TILE_BYTES,
    SLOTS = 8,
    ROWS_BYTES = 2 * TILE * 4,  // lse and delta of a tile of queries
};
enum { FORWARD, QUERIES, KEYS };  // the kernels

// Bytes from the start of a block's shared memory, and how its threads share the registers.
template <int MODE>
struct Layout {
    enum { GROUPS = MODE == FORWARD ? 3 : 2, OWN = MODE == FORWARD ? 1 : 2 };
    enum { RING = GROUPS * OWN * TILE_BYTES, ROWS = RING + SLOTS * STAGE_BYTES };
    enum { OWN_FULL = ROWS + (MODE == KEYS ? SLOTS * ROWS_BYTES : 0), OWN_EMPTY = OWN_FULL + 8 };
    enum { FULL = OWN_EMPTY + 8, EMPTY = FULL + 8 * SLOTS, BYTES = EMPTY + 8 * SLOTS };
    enum { THREADS = 128 * GROUPS + 128 };
    enum { GROUP_REGISTERS = GROUPS == 3 ? 160 : 240, COPY_REGISTERS = GROUPS == 3 ? 32 : 24 };
    static_assert((int)BYTES <= (int)SHARED_BYTES, "shared memory");
    static_assert((int)SLOTS > (int)GROUPS + 2, "a group holds 2 while it skips others' tiles");
    // A kernel begins with as many for every thread, a multiple of 8; one that asks for more waits
    // for ever.
    static_assert(128 * (GROUPS * GROUP_REGISTERS + COPY_REGISTERS) <=
                      THREADS * (65536 / THREADS / 8 * 8), "registers");
};

typedef struct {
    CUtensorMap qkv, dout;  // (channels,T,B), innermost first; boxes of 64 channels x 64 rows
    AttentionShape s;
    const float *gain;
    bf16 *out;        // forward: (N,H*d)            backward: dqkv
    float *lse;       // forward: written, or NULL   backward: read
    const bf16 *y;    // backward: forward's out, for delta
    float *rows;      // (B,H,tiles,2,64): log2(e) lse, and gain / sqrt(d) delta
    float *gains;     // (B,strips of 16 rows,H): what they add to dgain
    int blocks, items;  // blocks of rows of a head, items of work
} AttentionArgs;

#ifdef HAVE_WGMMA
// An item of work: GROUPS tiles of rows of a head, and the tiles that they walk over. Those with
// most to walk over come first.
template <int MODE>
struct Item {
    int b, head, row0, first, end, heads;  // rows first..end-1, of `heads` heads
    __device__ Item(const AttentionArgs &a, int i) {
        enum { OWNED = Layout<MODE>::GROUPS * TILE };
        heads = MODE == KEYS ? a.s.H / a.s.G : 1;
        const int per_text = a.s.H / heads, all = a.s.B * per_text, block = i / all;
        b = i % all / per_text;
        head = i % all % per_text * heads;
        row0 = (MODE == KEYS ? block : a.blocks - 1 - block) * OWNED;
        first = MODE == KEYS ? row0 : max(0, row0 - a.s.W + 1) / TILE * TILE;
        end = min(a.s.T, row0 + OWNED + (MODE == KEYS ? a.s.W - 1 : 0));
    }
};

// The number of a tile of queries among those of all heads.
INLINE size_t tile_of(const AttentionShape &s, int b, int head, int row) {
    return ((size_t)b * s.H + head) * ((s.T + TILE - 1) / TILE) + row / TILE;
}

// One thread's work: what each item owns, then what it walks over, as slots become free.
template <int MODE>
INLINE void attention_copy(const AttentionArgs &a, uint32_t smem) {
    typedef Layout<MODE> L;
    const uint32_t own_full = smem + L::OWN_FULL;
    unsigned n = 0, own = 0;  // tiles walked over and items so far: tile n has slot n % SLOTS
    map_prefetch(&a.qkv);
    if (MODE != FORWARD) map_prefetch(&a.dout);
    wait_for_previous();  // before anything is read: the kernel before may have made it
    let_next_start();
    for (int i = blockIdx.x; i < a.items; i += gridDim.x, own++) {
        const Item<MODE> item(a, i);
        const Head mine(a.s, item.head);
        // The first wait for each place falls through: it is empty.
        mbarrier_wait(smem + L::OWN_EMPTY, own % 2 ^ 1);
        mbarrier_expect(own_full, L::RING);
        for (int g = 0; g < L::GROUPS; g++) {
            const uint32_t to = smem + g * L::OWN * TILE_BYTES;
            const int row = item.row0 + g * TILE;
            tensor_copy(to, &a.qkv, own_full, MODE == KEYS ? mine.k : mine.q, row, item.b);
            if (MODE == KEYS) tensor_copy(to + TILE_BYTES, &a.qkv, own_full, mine.v, row, item.b);
            if (MODE == QUERIES)
                tensor_copy(to + TILE_BYTES, &a.dout, own_full, mine.q, row, item.b);
        }
        for (int head = item.head; head < item.head + item.heads; head++)
            for (int row = item.first; row < item.end; row += TILE, n++) {
                const Head h(a.s, head);
                const int slot = n % SLOTS;
                const uint32_t full = smem + L::FULL + 8 * slot;
                const uint32_t to = smem + L::RING + slot * STAGE_BYTES;
                mbarrier_wait(smem + L::EMPTY + 8 * slot, n / SLOTS % 2 ^ 1);
                mbarrier_expect(full, STAGE_BYTES + (MODE == KEYS ? ROWS_BYTES : 0));
                if (MODE == KEYS) {
                    tensor_copy(to, &a.qkv, full, h.q, row, item.b);
                    tensor_copy(to + TILE_BYTES, &a.dout, full, h.q, row, item.b);
                    bulk_copy(smem + L::ROWS + slot * ROWS_BYTES,
                              a.rows + tile_of(a.s, item.b, h.h, row) * 2 * TILE, ROWS_BYTES, full);
                } else {
                    tensor_copy(to, &a.qkv, full, h.k, row, item.b);
                    tensor_copy(to + TILE_BYTES, &a.qkv, full, h.v, row, item.b);
                }
            }
    }
}

// ---- What the three kernels share ---------------------------------------------------------------

// A tile that a warpgroup works on: its slot, its first row, the head whose it is.
typedef struct {
    int slot, row, head;
} Tile;

// A warpgroup's way over the tiles of its items.
template <int MODE>
struct Walk {
    typedef Layout<MODE> L;
    uint32_t smem;
    const char *shared;  // the same
    unsigned n, own;     // tiles and items so far
    int row, head;       // of tile n
    __device__ Walk(uint32_t at, const char *same) : smem(at), shared(same), n(0), own(0) {}

    // Keys and, second, values; or queries and gradients of out.
    __device__ Operand tile(Tile t, int second) const {
        return operand(SWIZZLE_128, smem + L::RING + t.slot * STAGE_BYTES + second * TILE_BYTES,
                       TILE_BYTES, 1024);
    }
    // lse of a tile's queries, from the lane's first column on; TILE behind it the deltas.
    __device__ const float *rows(Tile t) const {
        return (const float *)(shared + L::ROWS + t.slot * ROWS_BYTES) + threadIdx.x % 4 * 2;
    }
    // An item begins: its own tiles have come.
    __device__ void begin(const Item<MODE> &item) {
        row = item.first, head = item.head;
        mbarrier_wait(smem + L::OWN_FULL, own++ % 2);
    }
    // Factors of 16 rows of this warp, all channels, from the group's own tile n_own.
    __device__ void load_own(uint32_t (&a)[4][4], int n_own) const {
        const int r = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, c = threadIdx.x % 32 / 16;
        const uint32_t row = smem + (threadIdx.x / 128 * L::OWN + n_own) * TILE_BYTES + r * 128;
#pragma unroll
        for (int k = 0; k < 4; k++) ldmatrix<false>(a[k], row + ((2 * k + c) ^ r % 8) * 16);
    }
    // This warp has read what the group owns, or a slot.
    __device__ void release_own() const {
        __syncwarp();  // all lanes have
        if (threadIdx.x % 32 == 0) mbarrier_arrive(smem + L::OWN_EMPTY);
    }
    __device__ void release(int slot) const {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(smem + L::EMPTY + 8 * slot);
    }
    // The next tile of the item of which some row sees, or is seen by, some of rows r0..r0+63; it
    // has come. Releases those before it, but only when they have come: else a slot could be
    // released twice for one filling. False: there is none.
    __device__ bool next(Tile *t, const Item<MODE> &item, const AttentionShape &s, int r0) {
        bool seen = false;
        while (!seen && head < item.head + item.heads) {
            *t = {(int)(n % SLOTS), row, head};
            seen = r0 < s.T && (MODE == KEYS ? row + TILE > r0 && row - (r0 + TILE - 1) < s.W
                                             : row < r0 + TILE && row + TILE - 1 > r0 - s.W);
            mbarrier_wait(smem + L::FULL + 8 * t->slot, n++ / SLOTS % 2);
            if (!seen) release(t->slot);
            row += TILE;
            if (row >= item.end) row = item.first, head++;
        }
        return seen;
    }
};

// sums = factors times the rows of a tile; the channels are summed over.
INLINE void row_products(float (&sums)[32], const uint32_t (&a)[4][4], Operand tile) {
    wgmma_fresh(sums);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_registers<64, 0>(sums, a[k], operand_at(tile, k * 32), k);
}
// sums += factors times the channels of a tile; its rows are summed over.
INLINE void add_products(float (&sums)[32], const uint32_t (&a)[4][4], Operand tile) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma_registers<64, 1>(sums, a[k], operand_at(tile, k * 16 * HEAD * 2), 1);
}
INLINE void sums_as_factors(uint32_t (&a)[4][4], const float (&sums)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) a[i / 4][i % 4] = pack(sums[2 * i], sums[2 * i + 1]);
}

// x becomes `value` where the row does not see the column (KEYS: is not seen by it). apart: the
// warp's first row less the tile's first.
template <int MODE>
INLINE void mask(float (&x)[32], int apart, int W, float value) {
    if (MODE == KEYS ? apart + 15 <= 0 && TILE - 1 - apart < W
                     : apart >= TILE - 1 && apart + 15 < W)
        return;  // all of the warp's 16 rows see all columns
    apart += threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int back = apart + i % 4 / 2 * 8 - (i / 4 * 8 + i % 2);
        if ((unsigned)(MODE == KEYS ? -back : back) >= (unsigned)W) x[i] = value;
    }
}

// Row `half` of a lane's two, as bf16.
INLINE void store_sums(bf16 *row, const float (&sums)[32], int half, float scale) {
#pragma unroll
    for (int n = 0; n < 8; n++)
        *(uint32_t *)(row + 8 * n + 2 * (threadIdx.x % 4)) =
            pack(scale * sums[4 * n + 2 * half], scale * sums[4 * n + 2 * half + 1]);
}

// ---- Forward ------------------------------------------------------------------------------------

// Of a lane's two rows: the largest score that counts as base so far, the sum of exponentials, and
// what a new base makes of what was summed before.
typedef struct {
    float top[2], sum[2], shrink[2];
} Softmax;

// Scores become exponentials relative to the base.
INLINE void softmax(float (&x)[32], Softmax *f, float scale, int apart, int W) {
    mask<FORWARD>(x, apart, W, -INFINITY);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = f->top[h], row[2] = {0, 0};
        for (int i = 2 * h; i < 32; i += 4) most = fmaxf(most, fmaxf(x[i], x[i + 1]));
        most = quad_most(most);
        // The base may lag: exponentials up to 2 are as precise, and few tiles need a new one.
        if (!(scale * (most - f->top[h]) > 1)) most = f->top[h];
        // No key of this row so far: -inf - -inf is no number.
        const float base = most == -INFINITY ? 0 : scale * most;
        f->shrink[h] = exp2_of(scale * f->top[h] - base);
        f->top[h] = most;
        for (int i = 2 * h; i < 32; i += 4)
            for (int e = 0; e < 2; e++) {
                x[i + e] = exp2_of(scale * x[i + e] - base);
                row[e] += x[i + e];
            }
        f->sum[h] = f->shrink[h] * f->sum[h] + (row[0] + row[1]);
    }
}

INLINE void forward_groups(const AttentionArgs &a, uint32_t smem, const char *shared) {
    const AttentionShape &s = a.s;
    const int group = threadIdx.x / 128;
    Walk<FORWARD> walk(smem, shared);
    wait_for_previous();  // before anything is read or written
    for (int i = blockIdx.x; i < a.items; i += gridDim.x) {
        const Item<FORWARD> item(a, i);
        const int r0 = item.row0 + group * TILE, r = r0 + threadIdx.x % 128 / 32 * 16;
        const float gain = a.gain[item.head];
        // Not 0: -inf times 0 is no number.
        const float scale = fmaxf(fabsf(gain) * rsqrtf((float)HEAD) * LOG2_E, 1e-30f);
        uint32_t q[4][4], p[4][4] = {};
        float o[32] = {};
        Softmax f = {{-INFINITY, -INFINITY}, {0, 0}, {1, 1}};
        walk.begin(item);
        walk.load_own(q, 0);
        walk.release_own();
        // The largest score is scale times the largest product only where scale is not negative.
        for (int k = 0; k < 16; k++) q[k / 4][k % 4] ^= gain < 0 ? 0x80008000u : 0;
        Tile now, next;
        if (!walk.next(&now, item, s, r0)) continue;
        Tile before = now;  // its p is 0
        bool more = true;
        while (more) {
            float x[32];
            wgmma_fence();
            row_products(x, q, walk.tile(now, 0));
            wgmma_commit();
            add_products(o, p, walk.tile(before, 1));
            wgmma_commit();
            wgmma_wait<1>();  // for the scores
            wgmma_pin(x);
            softmax(x, &f, scale, r - now.row, s.W);
            wgmma_pin(x);
            more = walk.next(&next, item, s, r0);
            wgmma_wait<0>();
            wgmma_pin(o);
            if (before.slot != now.slot) walk.release(before.slot);
            if (__any_sync(~0u, f.shrink[0] != 1 || f.shrink[1] != 1))
#pragma unroll
                for (int n = 0; n < 32; n++) o[n] *= f.shrink[n % 4 / 2];
            sums_as_factors(p, x);
            before = now, now = next;
        }
        wgmma_fence();
        add_products(o, p, walk.tile(before, 1));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(o);
        walk.release(before.slot);
        for (int half = 0; half < 2; half++) {
            const int t = r + threadIdx.x % 32 / 4 + 8 * half;
            const float all = quad_sum(f.sum[half]);
            if (t >= s.T) continue;
            const size_t row = ((size_t)item.b * s.T + t) * s.H + item.head;
            store_sums(a.out + row * HEAD, o, half, 1 / all);
            if (a.lse && threadIdx.x % 4 == 0)
                a.lse[row] = LN_2 * (scale * f.top[half] + log2f(all));
        }
    }
}

// ---- Backward -----------------------------------------------------------------------------------

// lse (of base 2) and delta / sqrt(d) of a lane's two rows t and t + 8; stored for the keys'
// kernel. go: gradients of out, as factors.
INLINE void load_rows(float (&lse)[2], float (&delta)[2], const uint32_t (&go)[4][4],
                      const AttentionArgs &a, int b, int head, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++, t += 8) {
        const size_t row = ((size_t)b * a.s.T + t) * a.s.H + head;
        const bf16 *y = a.y + row * HEAD + 2 * (threadIdx.x % 4);
        float dot = 0;
        for (int n = 0; n < 8; n++) {
            const uint32_t g = go[n / 2][n % 2 * 2 + half];
            const uint32_t v = t < a.s.T ? *(const uint32_t *)(y + 8 * n) : 0;
            dot += low(g) * low(v) + high(g) * high(v);
        }
        delta[half] = quad_sum(dot) * rsqrtf((float)HEAD);
        lse[half] = t < a.s.T ? LOG2_E * a.lse[row] : 0;
        if (threadIdx.x % 4 != 0 || t >= (a.s.T + TILE - 1) / TILE * TILE) continue;
        float *to = a.rows + tile_of(a.s, b, head, t) * 2 * TILE + t % TILE;
        to[0] = lse[half];
        to[TILE] = a.gain[head] * delta[half];
    }
}

// Warpgroups own 64 queries each, make dq and what the rows add to dgain.
INLINE void query_groups(const AttentionArgs &a, uint32_t smem, const char *shared) {
    const AttentionShape &s = a.s;
    const int group = threadIdx.x / 128;
    Walk<QUERIES> walk(smem, shared);
    wait_for_previous();  // before anything is read or written
    for (int i = blockIdx.x; i < a.items; i += gridDim.x) {
        const Item<QUERIES> item(a, i);
        const int r0 = item.row0 + group * TILE, r = r0 + threadIdx.x % 128 / 32 * 16;
        const int t = r + threadIdx.x % 32 / 4;
        const float gain = a.gain[item.head], root = rsqrtf((float)HEAD);
        const float scale = gain * root * LOG2_E;
        uint32_t q[4][4], go[4][4], ds[4][4] = {};
        float dq[32] = {}, lse[2], delta[2];
        walk.begin(item);
        walk.load_own(q, 0);
        walk.load_own(go, 1);
        walk.release_own();
        load_rows(lse, delta, go, a, item.b, item.head, t);
        Tile now, next;
        if (!walk.next(&now, item, s, r0)) continue;
        Tile before = now;  // its ds is 0
        bool more = true;
        while (more) {
            float p[32], dp[32];
            wgmma_fence();
            row_products(p, q, walk.tile(now, 0));
            wgmma_commit();
            add_products(dq, ds, walk.tile(before, 0));
            row_products(dp, go, walk.tile(now, 1));
            wgmma_commit();
            wgmma_wait<1>();  // for the scores
            wgmma_pin(p);
#pragma unroll
            for (int n = 0; n < 32; n++) p[n] = exp2_of(scale * p[n] - lse[n % 4 / 2]);
            mask<QUERIES>(p, r - now.row, s.W, 0);
            wgmma_pin(p);
            wgmma_wait<0>();
            wgmma_pin(dp);
            if (before.slot != now.slot) walk.release(before.slot);
#pragma unroll
            for (int n = 0; n < 32; n++) p[n] *= root * dp[n] - delta[n % 4 / 2];
            sums_as_factors(ds, p);
            more = walk.next(&next, item, s, r0);
            before = now, now = next;
        }
        wgmma_fence();
        add_products(dq, ds, walk.tile(before, 0));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(dq);
        walk.release(before.slot);
        float dot = 0;  // of dq and q, which lie in the same lanes; queries from T on are 0
#pragma unroll
        for (int n = 0; n < 16; n++)
            dot += dq[2 * n] * low(q[n / 4][n % 4]) + dq[2 * n + 1] * high(q[n / 4][n % 4]);
        dot = warp_sum(dot);
        if (r < s.T && threadIdx.x % 32 == 0)
            a.gains[((size_t)item.b * ((s.T + 15) / 16) + r / 16) * s.H + item.head] = dot;
        bf16 *to = a.out + ((size_t)item.b * s.T + t) * row_width(s) + item.head * HEAD;
        if (t < s.T) store_sums(to, dq, 0, gain);
        if (t + 8 < s.T) store_sums(to + 8 * row_width(s), dq, 1, gain);
    }
}

// Warpgroups own 64 keys each, and make dk and dv: rows of p and dp are keys, columns queries.
INLINE void key_groups(const AttentionArgs &a, uint32_t smem, const char *shared) {
    const AttentionShape &s = a.s;
    const int group = threadIdx.x / 128;
    Walk<KEYS> walk(smem, shared);
    wait_for_previous();  // before anything is read or written
    for (int i = blockIdx.x; i < a.items; i += gridDim.x) {
        const Item<KEYS> item(a, i);
        const int r0 = item.row0 + group * TILE, r = r0 + threadIdx.x % 128 / 32 * 16;
        uint32_t k[4][4], v[4][4], pa[4][4], ds[4][4] = {};
        float dk[32] = {}, dv[32] = {};
        walk.begin(item);
        walk.load_own(k, 0);
        walk.load_own(v, 1);
        walk.release_own();
        Tile now, next;
        if (!walk.next(&now, item, s, r0)) continue;
        Tile before = now;  // its ds is 0
        bool more = true;
        while (more) {
            const float scale = a.gain[now.head] * rsqrtf((float)HEAD);
            const float *rows = walk.rows(now);
            float p[32], dp[32];
            wgmma_fence();
            row_products(p, k, walk.tile(now, 0));
            wgmma_commit();
            add_products(dk, ds, walk.tile(before, 0));
            row_products(dp, v, walk.tile(now, 1));
            wgmma_commit();
            wgmma_wait<1>();  // for the scores, and dv of the tile before
            wgmma_pin(p);
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                const float2 lse = *(const float2 *)(rows + 2 * i);
                for (int e = 0; e < 4; e++)
                    p[i + e] = exp2_of(scale * LOG2_E * p[i + e] - (e % 2 ? lse.y : lse.x));
            }
            mask<KEYS>(p, r - now.row, s.W, 0);
            sums_as_factors(pa, p);
            wgmma_fence();
            add_products(dv, pa, walk.tile(now, 1));
            wgmma_commit();
            wgmma_wait<1>();  // for all but dv
            wgmma_pin(dp);
            if (before.slot != now.slot) walk.release(before.slot);
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                const float2 delta = *(const float2 *)(rows + TILE + 2 * i);
                for (int e = 0; e < 4; e++)
                    p[i + e] *= scale * dp[i + e] - (e % 2 ? delta.y : delta.x);
            }
            sums_as_factors(ds, p);
            more = walk.next(&next, item, s, r0);
            before = now, now = next;
        }
        wgmma_fence();
        add_products(dk, ds, walk.tile(before, 0));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(dk);
        wgmma_pin(dv);
        walk.release(before.slot);
        const Head mine(s, item.head);
        for (int half = 0; half < 2; half++) {
            const int m = r + threadIdx.x % 32 / 4 + 8 * half;
            if (m >= s.T) continue;
            bf16 *to = a.out + ((size_t)item.b * s.T + m) * row_width(s);
            store_sums(to + mine.k, dk, half, 1);
            store_sums(to + mine.v, dv, half, 1);
        }
    }
}
#endif

template <int MODE>
__global__ void __launch_bounds__(Layout<MODE>::THREADS, 1)
    attention_wgmma(const __grid_constant__ AttentionArgs a) {
#ifdef HAVE_WGMMA
    typedef Layout<MODE> L;
    extern __shared__ __align__(1024) char shared[];  // swizzling goes by address
    const uint32_t smem = shared_addr(shared);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
        mbarrier_init(smem + L::OWN_FULL, 1);
        mbarrier_init(smem + L::OWN_EMPTY, 4 * L::GROUPS);
        for (int i = 0; i < SLOTS; i++) mbarrier_init(smem + L::FULL + 8 * i, 1);
        for (int i = 0; i < SLOTS; i++) mbarrier_init(smem + L::EMPTY + 8 * i, 4 * L::GROUPS);
        mbarrier_init_fence();
    }
    __syncthreads();  // no copy and no arrival may reach a barrier that is not set up yet
    if (warp < 4 * L::GROUPS) {
        registers_up<L::GROUP_REGISTERS>();
        if (MODE == FORWARD) forward_groups(a, smem, shared);
        if (MODE == QUERIES) query_groups(a, smem, shared);
        if (MODE == KEYS) key_groups(a, smem, shared);
    } else {
        registers_down<L::COPY_REGISTERS>();
        if (threadIdx.x == 128 * L::GROUPS) attention_copy<MODE>(a, smem);
    }
#endif
}

// ---- On the host --------------------------------------------------------------------------------

template <int MODE>
static void attention_launch(AttentionArgs *a) {
    typedef Layout<MODE> L;
    const void *kernel = (const void *)attention_wgmma<MODE>;
    static bool prepared;
    const int heads = MODE == KEYS ? a->s.H / a->s.G : 1, sms = gpu()->sms;
    a->blocks = (int)ceil_div(a->s.T, L::GROUPS * TILE);
    a->items = a->blocks * a->s.B * (a->s.H / heads);
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::BYTES));
    prepared = true;
    launch(kernel, dim3((unsigned)(a->items < sms ? a->items : sms)), L::THREADS, L::BYTES, a,
           true);
}

// False: not for these kernels. On an error of the driver, which is noted, true and no maps.
static bool attention_wgmma_takes(AttentionShape s, const void *a, const void *b, const void *c,
                                  const void *d) {
    return have_wgmma() && s.d == HEAD && aligned16(a) && aligned16(b) && aligned16(c) &&
           aligned16(d);
}

static void attention_forward_wgmma(act *out, real *lse, const act *qkv, const real *gain,
                                    AttentionShape s, void *work) {
    if (!attention_wgmma_takes(s, out, qkv, NULL, NULL)) {
        attention_forward_mma(out, lse, qkv, gain, s, work);
        return;
    }
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.s = s, a.gain = gain, a.out = (bf16 *)out, a.lse = lse;
    if (!make_map(&a.qkv, qkv, row_width(s), (size_t)s.T, (size_t)s.B, HEAD, TILE)) return;
    attention_launch<FORWARD>(&a);
    LAUNCHED("attention_forward_wgmma", 4 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(bf16), 1, 1));
}

// The workspace of backward: AttentionArgs' rows, then gains.
static size_t rows_values(AttentionShape s) {
    return (size_t)s.B * s.H * ceil_div(s.T, TILE) * 2 * TILE;
}
size_t attention_wgmma_work_bytes(AttentionShape s) {
    return (rows_values(s) + (size_t)s.B * s.H * ceil_div(s.T, 16)) * sizeof(float);
}

static void attention_backward_wgmma(act *dqkv, real *dgain, const act *dout, const act *out,
                                     const real *lse, real *delta, const act *qkv,
                                     const real *gain, AttentionShape s, void *work) {
    if (!attention_wgmma_takes(s, dqkv, dout, qkv, work)) {
        attention_backward_mma(dqkv, dgain, dout, out, lse, delta, qkv, gain, s, work);
        return;
    }
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.s = s, a.gain = gain, a.out = (bf16 *)dqkv, a.lse = (float *)lse, a.y = (const bf16 *)out;
    a.rows = (float *)work, a.gains = a.rows + rows_values(s);
    if (!make_map(&a.qkv, qkv, row_width(s), (size_t)s.T, (size_t)s.B, HEAD, TILE) ||
        !make_map(&a.dout, dout, (size_t)s.H * HEAD, (size_t)s.T, (size_t)s.B, HEAD, TILE))
        return;
    attention_launch<QUERIES>(&a);
    LAUNCHED("attention_queries_wgmma", 6 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(bf16), 2, 2));
    attention_launch<KEYS>(&a);
    LAUNCHED("attention_keys_wgmma", 8 * attention_pairs(s) * s.d,
             attention_bytes(s, sizeof(bf16), 2, 1));
    AttentionShape strips = s;  // of 16 rows
    strips.T = (int)ceil_div(s.T, 16);
    attention_gains_sum(dgain, a.gains, strips);
}

const Kernel attention_wgmma_kernels[] = {
    KERNEL(bf16, attention.forward, attention_forward_wgmma, "tensor",
           "a thread copies, scores and values are multiplied while others are exponentials"),
    KERNEL(bf16, attention.backward, attention_backward_wgmma, "tensor",
           "the same, queries and then keys"),
};
const int n_attention_wgmma_kernels =
    sizeof attention_wgmma_kernels / sizeof *attention_wgmma_kernels;
