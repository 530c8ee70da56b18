// conv_wgmma.cu: rung 5 of the causal dilated convolution, on Hopper's tensor cores (sm_90a):
// forward and backward to the input. bf16 operands, float32 sums. K <= 3, (K-1)*dil <= 192, and
// shared memory for the weights and three stages: C = 256, K = 3 up to dil 56. C and O in multiples
// of 8 and pointers in multiples of 16 bytes. Linear layers of 512 summed channels and more go to
// linear_wgmma.cu, but for few rows; what neither takes goes to mma, the rung below.
//
// Read first: conv_mma.cu (rung 4), hopper.cuh (the instructions). The gradient to the weights is
// weight_wgmma.cu. The rungs on tensor cores are the table at the end of this file.   Run:
//   make check-kernels            # every rung against the CPU, then timed, side by side
//
// Measured on an H100 80GB HBM3, 2026-11-22 (./bench --only ladder --batch B --seq T: many calls in
// a row, the median); C = O = 256, K = 3, dil = 4. Microseconds, then TFLOP/s; two runs differed by
// up to 3 %, at 1x128 by up to 8 %.
//   B x T                      1x128 1x1024    16x512    16x1024     32x1024     64x2048
//   wgmma forward, bias, GELU    2.4    3.8  7.5 (427) 12.0 (535)  23.3 (554)  85.4 (604)
//     to the input, gelu'        2.5    3.7  8.6 (373) 13.9 (462)  27.6 (467) 104.4 (494)
//     to the weights, one layer  3.9    7.1   17 (192)   29 (221)  31.8 (406)  77.5 (665)
//   mma, forward                20.5   21.4   28 (113)   63 (103)   104 (124)   380 (136)
// For comparison: block in float32 takes 336 us for the forward of 32x1024; cuBLAS reaches 720 to
// 796 TFLOP/s on 8192^3 in bf16, and 389 and 493 on the bare products of 32x1024 and 64x2048. (A
// step makes the weight gradients of six layers at a time; one alone gets narrow tiles up to
// 16x1024.)
#include "fast/hopper.cuh"

// ---- Rung 5: wgmma, forward and backward to the input
//
//   sums (64 rows, TILE_O) = sum over taps k and channels of  x[rows moved by k*dil] w[k]
//
// Bound before: operands on their way to the tensor cores, from L2 and through registers.
// Count for C = O = 256, K = 3, a tile of 64 rows x 128 channels: 64*128*768*2 = 12.6 MFLOP, 3072
// cycles of a multiprocessor's tensor cores. It needs 72 rows of 512 bytes and 196,608 bytes of
// weights. These are the problem: fetched for every tile they would be 64 bytes a cycle, where L2
// gives some 30.
// Idea: a block keeps the weights of its 128 output channels in shared memory for its whole life,
// one block to a multiprocessor, and lets the rows pass by. They come through a ring of stages of
// 32 channels; a tap is the same stage from another row on, so three taps cost one copy and a halo
// of (K-1)*dil rows. Tensor cores read shared memory themselves.
// Saved: L2 traffic falls to 12 bytes a cycle, and no operand passes a register.
// Cost: 196,608 bytes before the first product: up to some 1000 rows a layer's time is mostly that.
// So there are two tiles, a wide one of 128 channels and, where all its blocks run at a time, a
// small one of 32: a quarter of the weights, all fetched while the kernel before still runs. That
// leaves room for stages of 64 channels, the same bytes in half as many rows for the copy engine.
// Measured: 32768 rows forward 104 -> 23.3 us. At 131072 rows forward and backward through GELU
// move 201 and 268 MB at 2.4 and 2.6 TB/s: device memory is nearly their bound.
//
//   shared memory   | weights: chunk 0 (taps 0, 1, 2) | chunk 1 | ..  192 KB, small tile 48 KB
//   (dil = 4)       | ring: stage 0 | stage 1 | .. 7 of 4.5 KB, small tile 16 of 9 KB | barriers |
//   a chunk         64 summed channels x TILE_O made, per tap; rows of 128 bytes, swizzled (of the
//                   small tile forward 64)
//   a stage         64 + (K-1)*dil rows x 32 channels (of the small tile 64); rows of 64 bytes
//                   (128), swizzled
//   forward reads   [ halo = (K-1)*dil | 64 rows ]    tap k starts at row (K-1-k)*dil
//   backward reads  [ 64 rows | halo = (K-1)*dil ]    tap k starts at row k*dil
//
// Rows before a sequence's first, and after its last, are zeros by the tensor map, which has a
// dimension for time and one for the sequence: no tap ever sees another sequence.
//
//   one thread   copies weights, then stages, as slots become free
//   group 0      | multiply tile 0 | epilogue of tile 0  . . . . | multiply tile 3 | epilogue ..
//   group 1                        | multiply tile 1 | epilogue of tile 1  . . . . | multiply 4
//   group 2                                          | multiply tile 2 | epilogue of tile 2 . .
//
// Three warpgroups take turns at the tensor cores: while one multiplies, the others are at the
// epilogues of their tiles: bias, activation, dropout, residual, 16-byte stores.
//
// Barriers:    waits, for                                              prevents
//   full       group, until a stage's bytes have come                  multiplying what lay there
//   empty      the copying thread, until 4 warps multiplied a stage    overwriting it before
//   weights    group, until a tap of a chunk has come                  multiplying garbage
//   bias       group, before the epilogue of its first tile            adding garbage
//   order      group, until the group before queued its last product   all three multiplying at a
//              time, then all in epilogues at a time with idle tensor cores; no data depends on it
//
// Dependent launches, and why the weights may be fetched before wait_for_previous: weights and
// their bf16 copy are written by sync_params and optimize. The kernel after those is draw_batch or
// embed_forward, never a conv, and lets the next one start only when its own wait is over: so the
// weights are whole before any block of ours can run. Weights that are not in that copy are
// converted by the kernel right before ours: then ours is launched without overlap
// (`weights_unchanged` false). Biases are parameters, too. All else waits: x, what the epilogue
// reads and the step's number may come from the kernel before, and what is written may still be
// read there. The next kernel may start when our own wait is over: earlier, its blocks and those of
// the one after it would fill the GPU with waiting, and the side stream's kernels would find no
// place. A kernel that is not launched in this way needs neither call, and loses only the overlap.
//
// Tried and dropped (us, before and after, each pair at one shape): clusters of 2 and of 4 blocks
// that share copies of weights, 12.1 -> 13.5 and 15.1; two warpgroups for three, 23.9 -> 27.0;
// several layers in one launch, at 128 rows 3.1 -> 4.6 a layer, at 16384 13.1 to 14.2 -> 13.7 to
// 14.3; reading the epilogue's input late, 29.2 -> 34.5; an epilogue on all 128 columns at once,
// 14.1 -> 15.0; asking for the activation for every eight channels instead of once a tile, which
// made backward to the input 5 to 8 % slower.

enum {
    CHUNK_C = 64,               // channels of a chunk of weights
    CHUNK_BYTES = CHUNK_C * 2,  // of a chunk's tap, for each channel of TILE_O
    MAX_WEIGHTS = 24,           // taps of chunks in shared memory, of the small tile
    CONV_GROUPS = 3,
    CONV_THREADS = CONV_GROUPS * 128 + 128,  // setmaxnreg gives registers to whole warpgroups
    GROUP_REGISTERS = 160,
    COPY_REGISTERS = 32,
    BIAS_AT = 512,       // bytes behind the barriers' first
};
static_assert(128 * (CONV_GROUPS * GROUP_REGISTERS + COPY_REGISTERS) <= 65536, "registers");
static_assert(8 * (MAX_WEIGHTS + 2 * MAX_SLOTS + CONV_GROUPS + 1) <= BIAS_AT, "barriers");
static_assert(BIAS_AT + 128 * sizeof(float) <= BARRIER_BYTES, "biases");
// Channels of a stage of rows: half a chunk of weights, as those leave room for no more; beside the
// small tile's, a whole one, of which the copy engine has half as many rows to fetch.
static constexpr __host__ __device__ int step_channels(int tile_o) {
    return tile_o < 128 ? CHUNK_C : CHUNK_C / 2;
}

typedef struct {
    CUtensorMap x, w;  // x: (C,T,B), innermost first;  w: (O,C,K)
    Epilogue e;
    const float *bias;  // forward; or NULL
    int T, n_in, n_out, dil, tiles_per_seq, tiles, slots, stage_bytes, stage_rows;
} ConvArgs;

#ifdef HAVE_WGMMA
// Where the barriers lie behind the ring.
typedef struct {
    uint32_t weights, full, empty, order, bias;
} ConvBarriers;
INLINE ConvBarriers conv_barriers(uint32_t at) {
    ConvBarriers b = {at, at + 8 * MAX_WEIGHTS, at + 8 * (MAX_WEIGHTS + MAX_SLOTS),
                      at + 8 * (MAX_WEIGHTS + 2 * MAX_SLOTS),
                      at + 8 * (MAX_WEIGHTS + 2 * MAX_SLOTS + CONV_GROUPS)};
    return b;
}

// All taps of a chunk: 64 summed channels by the block's TILE_O. A swizzled row holds 64 channels
// and a box is no longer than that: 128 come as two boxes.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void copy_weights(const ConvArgs *a, uint32_t weights, uint32_t bar, int chunk, int out0) {
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, BOXES = TILE_O > 64 ? 2 : 1 };
    const int o = BACKWARD ? chunk * CHUNK_C : out0, c = BACKWARD ? out0 : chunk * CHUNK_C;
    for (int k = 0; k < TAPS; k++) {
        uint32_t dst = weights + (chunk * TAPS + k) * TAP_BYTES;
        uint32_t full = bar + 8 * (chunk * TAPS + k);
        mbarrier_expect(full, TAP_BYTES);
        for (int p = 0; p < BOXES; p++)
            tensor_copy(dst + p * TAP_BYTES / 2, &a->w, full, o + p * 64 * !BACKWARD,
                        c + p * 64 * BACKWARD, k);
    }
}

// One thread's work: the biases and weights once, two chunks ahead of the products or, for the
// small tile, all ahead of the wait; and the stages in the order of the block's tiles.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void conv_copy(const ConvArgs *a, uint32_t weights, uint32_t ring, ConvBarriers bar,
                      int first, int stride, int out0) {
    enum { STEP = step_channels(TILE_O), STEPS = CHUNK_C / STEP };
    const int chunks = (a->n_in + CHUNK_C - 1) / CHUNK_C, ahead = TILE_O < 128 ? chunks : 2;
    int chunk = 0;
    map_prefetch(&a->x);
    if (!BACKWARD && a->bias) {
        int bytes = (a->n_out - out0 < TILE_O ? a->n_out - out0 : TILE_O) * (int)sizeof(float);
        mbarrier_expect(bar.bias, bytes);
        bulk_copy(bar.weights + BIAS_AT, a->bias + out0, bytes, bar.bias);
    }
    for (; chunk < ahead && chunk < chunks; chunk++)
        copy_weights<BACKWARD, TAPS, TILE_O>(a, weights, bar.weights, chunk, out0);
    wait_for_previous();  // before x is read: the kernel before may have made it
    let_next_start();
    Ring r = {0, 1};      // the first wait for each slot falls through: it is empty
    for (int tile = first; tile < a->tiles; tile += stride) {
        int b = tile / a->tiles_per_seq, t0 = tile % a->tiles_per_seq * SUM_TILE;
        if (!BACKWARD) t0 -= (TAPS - 1) * a->dil;
        for (int step = 0; step < STEPS * chunks; step++) {
            mbarrier_wait(bar.empty + 8 * r.slot, r.phase);
            mbarrier_expect(bar.full + 8 * r.slot, a->stage_rows * STEP * 2);
            tensor_copy(ring + r.slot * a->stage_bytes, &a->x, bar.full + 8 * r.slot,
                        step * STEP, t0, b);
            ring_skip(&r, 1, a->slots);
            if (chunk < chunks && step % STEPS == STEPS - 1)
                copy_weights<BACKWARD, TAPS, TILE_O>(a, weights, bar.weights, chunk++, out0);
        }
    }
}

// Four neighbouring lanes exchange four words each: lane q ends with word q of all four, in the
// order of lanes. Accumulators have 2 columns of four groups of 8 in a lane; afterwards a lane has
// 8 columns of one group: one 16-byte store, and half of a draw of dropout. Two rounds, with the
// neighbour and then with the one after it: four shuffles, no shared memory and no barrier.
INLINE void transpose_quad(uint32_t w[4]) {
    const unsigned all = 0xFFFFFFFFu;
    int q = threadIdx.x;
    uint32_t send0 = q & 1 ? w[0] : w[1], send1 = q & 1 ? w[2] : w[3];
    send0 = __shfl_xor_sync(all, send0, 1);
    send1 = __shfl_xor_sync(all, send1, 1);
    if (q & 1)
        w[0] = send0, w[2] = send1;
    else
        w[1] = send0, w[3] = send1;
    send0 = q & 2 ? w[0] : w[2], send1 = q & 2 ? w[1] : w[3];
    send0 = __shfl_xor_sync(all, send0, 2);
    send1 = __shfl_xor_sync(all, send1, 2);
    if (q & 2)
        w[0] = send0, w[1] = send1;
    else
        w[2] = send0, w[3] = send1;
}

// What the epilogue reads beside a lane's sums, as tile_epilogue takes it: input[2g] and
// input[2g + 1] are its eight columns of group g of 32, in its row and 8 rows on.
// Four neighbouring lanes: 64 bytes of a row; a warp: eight rows at a time.
template <bool BACKWARD, int TILE_O>
INLINE void load_input(uint4 input[TILE_O / 16], const ConvArgs *a, const bool inside[2],
                       size_t i0, int left) {
    const bf16 *from = epilogue_input<BACKWARD>(&a->e);
#pragma unroll
    for (int j = 0; j < TILE_O / 16; j++) {
        input[j] = make_uint4(0, 0, 0, 0);
        if (from && inside[j % 2] && 32 * (j / 2) < left)
            input[j] = *(const uint4 *)(from + i0 + 32 * (j / 2) + j % 2 * 8 * (size_t)a->n_out);
    }
}

// The epilogue of a tile, 32 columns of two rows at a time: more would not fit into registers
// beside the sums. i0: element of the lane's first eight, `left` columns from there on; bias: in
// shared memory; kept: of draw_kept_rows.
template <bool BACKWARD, int TILE_O, Activation f>
INLINE void tile_epilogue(const ConvArgs *a, const float *acc, const float *bias, uint4 *input,
                          const uint32_t *kept, const bool *inside, size_t i0, int left) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int g = 0; g < TILE_O / 32; g++) {
        uint32_t w[2][4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            int j = 4 * g + m;
            float2 b = {0, 0};  // columns past n_out get what lies there, and are not stored
            if (!BACKWARD && a->bias) b = *(const float2 *)(bias + 8 * j + 2 * q);
            w[0][m] = pack(acc[4 * j] + b.x, acc[4 * j + 1] + b.y);
            w[1][m] = pack(acc[4 * j + 2] + b.x, acc[4 * j + 3] + b.y);
        }
        transpose_quad(w[0]);
        transpose_quad(w[1]);
        uint4 v[2] = {make_uint4(w[0][0], w[0][1], w[0][2], w[0][3]),
                      make_uint4(w[1][0], w[1][1], w[1][2], w[1][3])};
        if (32 * g >= left) continue;
        if (BACKWARD)
            epilogue_backward8<f>(&a->e, v, input + 2 * g, inside, i0 + 32 * g, a->n_out);
        else
            epilogue_forward8<f>(&a->e, v, input + 2 * g, kept, g, inside, i0 + 32 * g, a->n_out);
    }
}

#define TILE_EPILOGUE_CASE(name)                                                           \
    case ACT_##name:                                                                       \
        tile_epilogue<BACKWARD, TILE_O, ACT_##name>(a, acc, bias, input, kept, inside, i0, \
                                                    left);                                 \
        break;

// The products of one stage, `part` of its chunk.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void multiply_stage(float *acc, Operand x, Operand w, int part, int shift, bool add) {
    enum { STEP = step_channels(TILE_O) };
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, ROW_BYTES = BACKWARD || TILE_O >= 64 ? 128 : 64 };
    const int w_step = BACKWARD ? 2 : ROW_BYTES;  // bytes from one summed channel to the next
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int i = 0; i < STEP / 16; i++) {
            Operand x_k = operand_at(x, (BACKWARD ? k : TAPS - 1 - k) * shift + i * 32);
            Operand w_k = operand_at(w, k * TAP_BYTES + (part * STEP + i * 16) * w_step);
            wgmma<TILE_O, 0, !BACKWARD>(acc, x_k, w_k, add | k | i);
        }
    wgmma_commit();
}

// A warpgroup's work: every CONV_GROUPS-th of the block's tiles.
template <bool BACKWARD, int TAPS, int TILE_O>
INLINE void conv_multiply(const ConvArgs *a, uint32_t weights, uint32_t ring, ConvBarriers bar,
                          const float *bias, int first, int stride, int out0, int group) {
    enum { TAP_BYTES = CHUNK_BYTES * TILE_O, ROW_BYTES = BACKWARD || TILE_O >= 64 ? 128 : 64 };
    enum { STEP = step_channels(TILE_O), STEPS = CHUNK_C / STEP };
    const int chunks = (a->n_in + CHUNK_C - 1) / CHUNK_C;
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row0 + 8, as wgmma has them
    const int left = a->n_out - out0 - 8 * q;
    const Operand x_op = operand(STEP == 64 ? SWIZZLE_128 : SWIZZLE_64, ring, 16, 8 * STEP * 2);
    // Backward the summed channels of w lie side by side, forward those that are made.
    const Operand w_op = operand(ROW_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_64, weights,
                                 TAP_BYTES / 2, 8 * ROW_BYTES);
    const int shift = a->dil * STEP * 2;  // bytes from a tap's rows to the next tap's
    const Dropout *drop = &a->e.drop;
    float acc[TILE_O / 2];
    wait_for_previous();  // before the epilogue's input or the step is read and anything is written
    const uint32_t step_number = !BACKWARD && drop->threshold ? drop->state->step : 0;
    Ring r = {0, 0};
    ring_skip(&r, group * STEPS * chunks, a->slots);
    int n = group;  // the tile's number in the block
    for (int tile = first + group * stride; tile < a->tiles; tile += CONV_GROUPS * stride) {
        const int b = tile / a->tiles_per_seq, t0 = tile % a->tiles_per_seq * SUM_TILE;
        const size_t row = (size_t)b * a->T + t0 + row0, i0 = row * a->n_out + out0 + 8 * q;
        const bool inside[2] = {t0 + row0 < a->T, t0 + row0 + 8 < a->T};
        uint4 input[TILE_O / 16];  // read now: the products hide how long it takes
        load_input<BACKWARD, TILE_O>(input, a, inside, i0, left);
        uint32_t kept[2] = {0, 0};  // drawn now: a group waits for its turn anyway
        if (!BACKWARD && drop->threshold)
            draw_kept_rows<TILE_O / 32>(kept, drop, step_number, drop->first + row, out0 + 8 * q,
                                        a->n_out);
        // Few instructions from here: the tensor cores take 64 cycles for a wgmma, and a warp needs
        // 4 or 5 for each of its instructions.
        if (n > 0) mbarrier_wait(bar.order + 8 * group, (n - 1) / CONV_GROUPS & 1);
        Operand x = operand_at(x_op, r.slot * a->stage_bytes), w = w_op;
        uint32_t full = bar.full + 8 * r.slot, before = 0;
        for (int c = 0; c < chunks; c++) {
            if (n < CONV_GROUPS)  // this group's first tile; for its next ones they are there
                for (int k = 0; k < TAPS; k++) mbarrier_wait(bar.weights + 8 * (c * TAPS + k), 0);
#pragma unroll
            for (int part = 0; part < STEPS; part++) {
                mbarrier_wait(full, r.phase);
                multiply_stage<BACKWARD, TAPS, TILE_O>(acc, x, w, part, shift, c | part);
                if (part > 0 || c > 0) free_slot<1>(before);  // the stage before is multiplied
                before = full + 8 * MAX_SLOTS;  // the slot's `empty`
                full += 8;
                x = operand_at(x, a->stage_bytes);
                if (++r.slot == a->slots) {
                    r.slot = 0;
                    r.phase ^= 1;
                    full = bar.full;
                    x = x_op;
                }
            }
            w = operand_at(w, TAPS * TAP_BYTES);
        }
        // The next group's products may queue behind our last.
        if (lane == 0) mbarrier_arrive(bar.order + 8 * ((group + 1) % CONV_GROUPS));
        free_slot<0>(before);
        ring_skip(&r, (CONV_GROUPS - 1) * STEPS * chunks, a->slots);  // the others' stages
        n += CONV_GROUPS;
        if (!BACKWARD && a->bias) mbarrier_wait(bar.bias, 0);
        switch (a->e.activation) {
            ACTIVATIONS(TILE_EPILOGUE_CASE)
        default: break;
        }
    }
}
#endif

template <bool BACKWARD, int TAPS, int TILE_O>
__global__ void __launch_bounds__(CONV_THREADS, 1)
    conv_wgmma(const __grid_constant__ ConvArgs a) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(1024) char smem[];  // swizzling goes by address
    // Through a shuffle, so that nvcc knows that it is the same in all of a warp.
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    const int chunks = (a.n_in + CHUNK_C - 1) / CHUNK_C, parts = (a.n_out + TILE_O - 1) / TILE_O;
    // Neighbouring blocks read the same rows, for other channels: the second finds them in L2.
    const int out0 = blockIdx.x % parts * TILE_O, first = blockIdx.x / parts;
    const int stride = gridDim.x / parts;
    const uint32_t weights = shared_addr(smem);
    const uint32_t ring = weights + chunks * TAPS * CHUNK_BYTES * TILE_O;
    const ConvBarriers bar = conv_barriers(ring + a.slots * a.stage_bytes);
    const float *bias = (const float *)(smem + (bar.weights + BIAS_AT - weights));
    if (threadIdx.x == 0) {
        for (int i = 0; i < chunks * TAPS; i++) mbarrier_init(bar.weights + 8 * i, 1);
        for (int i = 0; i < a.slots; i++) mbarrier_init(bar.full + 8 * i, 1);
        for (int i = 0; i < a.slots; i++) mbarrier_init(bar.empty + 8 * i, 4);
        for (int i = 0; i < CONV_GROUPS; i++) mbarrier_init(bar.order + 8 * i, 4);
        mbarrier_init(bar.bias, 1);
        mbarrier_init_fence();
    }
    __syncthreads();  // no copy and no arrival may reach a barrier that is not set up yet
    if (warp < 4 * CONV_GROUPS) {
        registers_up<GROUP_REGISTERS>();
        conv_multiply<BACKWARD, TAPS, TILE_O>(&a, weights, ring, bar, bias, first, stride, out0,
                                              warp / 4);
    } else {
        registers_down<COPY_REGISTERS>();
        if (threadIdx.x == 128 * CONV_GROUPS)
            conv_copy<BACKWARD, TAPS, TILE_O>(&a, weights, ring, bar, first, stride, out0);
    }
#endif
}

// ---- Launchers

bool have_wgmma(void) {
    static int known = -1;
    if (known < 0)
        known = gpu()->capability == 90 &&
                compiled_for((const void *)conv_wgmma<false, 3, 128>) == 90 && encode_tiled();
    return known;
}

// Slots of the ring, 0 where the kernel does not apply. n_in: channels summed over. Fewer than
// three would leave nothing on its way while one stage is multiplied and one freed.
static int conv_slots(ConvShape s, int n_in, int n_out, int tile_o) {
    enum { LEAST_SLOTS = 3 };
    if (s.K > 3 || n_in % 8 || n_out % 8 || (s.K - 1) * s.dil > MAX_HALO) return 0;
    int weights = s.K * (int)ceil_div(n_in, CHUNK_C), rows = SUM_TILE + (s.K - 1) * s.dil;
    if (weights > MAX_WEIGHTS) return 0;
    int left = SHARED_BYTES - BARRIER_BYTES - weights * CHUNK_BYTES * tile_o;
    int slots = left / ((int)ceil_div(rows, 8) * 8 * step_channels(tile_o) * 2);
    return slots < LEAST_SLOTS ? 0 : slots > MAX_SLOTS ? MAX_SLOTS : slots;
}
// Whether each block of the small tile finds a multiprocessor: for C = 256 and 132 of them up to 16
// tiles, 1024 rows. It fetches 49,152 bytes of weights, not 196,608.
static bool few_rows(ConvShape s, int n_out) {
    return s.B * ceil_div(s.T, SUM_TILE) * ceil_div(n_out, 32) <= (size_t)gpu()->sms;
}
// The tile for a shape: 32 or 128 channels; 0: linear_wgmma.cu takes it; -1: nothing here does.
static int conv_tile(ConvShape s, int n_in, int n_out) {
    enum { LINEAR_FROM = 512 };  // summed channels
    if (!have_wgmma()) return -1;
    if (few_rows(s, n_out) && conv_slots(s, n_in, n_out, 32)) return 32;
    if (linear_wgmma_takes(s) && n_in >= LINEAR_FROM) return 0;
    return conv_slots(s, n_in, n_out, 128) ? 128 : -1;
}

const char *tensor_rung(ConvShape s) {
    if (conv_tile(s, s.C, s.O) >= 0 && conv_tile(s, s.O, s.C) >= 0) return "wgmma";
    return mma_takes(s) ? "mma" : "block";
}

template <bool BACKWARD, int TAPS, int TILE_O>
static void conv_launch(const Epilogue &e, const float *bias, const void *x, const bf16 *w,
                        ConvShape s, bool weights_unchanged) {
    static bool prepared;
    const void *kernel = (const void *)conv_wgmma<BACKWARD, TAPS, TILE_O>;
    ConvArgs a;
    memset(&a, 0, sizeof a);
    a.e = e;
    a.bias = bias;
    a.T = s.T;
    a.dil = s.dil;
    a.n_in = BACKWARD ? s.O : s.C;
    a.n_out = BACKWARD ? s.C : s.O;
    a.tiles_per_seq = (int)ceil_div(s.T, SUM_TILE);
    a.tiles = s.B * a.tiles_per_seq;
    a.slots = conv_slots(s, a.n_in, a.n_out, TILE_O);
    a.stage_rows = SUM_TILE + (s.K - 1) * s.dil;
    const int step = step_channels(TILE_O);
    a.stage_bytes = (int)ceil_div(a.stage_rows, 8) * 8 * step * 2;  // swizzling: groups of 8 rows
    if (!make_map(&a.x, x, (size_t)a.n_in, (size_t)s.T, (size_t)s.B, step, a.stage_rows) ||
        !make_map(&a.w, w, (size_t)s.O, (size_t)s.C, (size_t)s.K,
                  !BACKWARD && TILE_O < 64 ? TILE_O : 64, BACKWARD && TILE_O < 64 ? TILE_O : 64))
        return;
    if (!prepared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
    prepared = true;
    size_t shared = (size_t)s.K * ceil_div(a.n_in, CHUNK_C) * CHUNK_BYTES * TILE_O +
                    (size_t)a.slots * a.stage_bytes + BARRIER_BYTES;
    // One block to a multiprocessor; and no more than gives the busiest as many tiles as it has.
    // 16384 rows, two parts: 66 columns of blocks for 256 tiles give the busiest 4, so do 64.
    int parts = (int)ceil_div(a.n_out, TILE_O), most = gpu()->sms / parts;
    size_t busiest = ceil_div(a.tiles, most > 0 ? most : 1);
    launch(kernel, dim3((unsigned)(ceil_div(a.tiles, busiest) * parts)), CONV_THREADS, shared, &a,
           weights_unchanged);
    LAUNCHED(BACKWARD ? "conv_wgmma backward" : "conv_wgmma forward", conv_flops(s),
             BACKWARD ? backward_bytes(e, s, sizeof(bf16)) : forward_bytes(e, s, sizeof(bf16)));
}

template <bool BACKWARD, int TILE_O>
static void conv_taps(const Epilogue &e, const float *bias, const void *x, const bf16 *w,
                      ConvShape s, bool weights_unchanged) {
    if (s.K == 1) conv_launch<BACKWARD, 1, TILE_O>(e, bias, x, w, s, weights_unchanged);
    if (s.K == 2) conv_launch<BACKWARD, 2, TILE_O>(e, bias, x, w, s, weights_unchanged);
    if (s.K == 3) conv_launch<BACKWARD, 3, TILE_O>(e, bias, x, w, s, weights_unchanged);
}
static void conv_forward_wgmma(const act *x, const real *w, const real *b, Epilogue e, ConvShape s,
                               void *work) {
    const bf16 *weights = NULL;
    const int tile = conv_tile(s, s.C, s.O);
    if (tile > 0) weights = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (!weights || !all_aligned(e, x, weights, b))
        (tile == 0 ? conv_forward_linear : conv_forward_mma)(x, w, b, e, s, work);
    else if (tile == 32)
        conv_taps<false, 32>(forward_epilogue(e), b, x, weights, s, weights != work);
    else
        conv_taps<false, 128>(forward_epilogue(e), b, x, weights, s, weights != work);
}

static void conv_backward_input_wgmma(const act *dy, const real *w, Epilogue e, ConvShape s,
                                      void *work) {
    const bf16 *weights = NULL;
    const int tile = conv_tile(s, s.O, s.C);
    if (tile > 0) weights = bf16_weights(w, (size_t)s.K * s.C * s.O, work);
    if (!weights || !all_aligned(e, dy, weights, NULL))
        (tile == 0 ? conv_backward_input_linear : conv_backward_input_mma)(dy, w, e, s, work);
    else if (tile == 32)
        conv_taps<true, 32>(e, NULL, dy, weights, s, weights != work);
    else
        conv_taps<true, 128>(e, NULL, dy, weights, s, weights != work);
}

// ---- Workspace, and the table of the rungs on tensor cores

// The most that the launchers of both rungs take for N rows, at most K taps and `width` channels:
// partial sums of a weight gradient, or weights in bf16.
size_t tensor_work_bytes(size_t N, int K, int width) {
    size_t bytes = (size_t)K * width * width * sizeof(bf16);
    size_t mma = mma_work_bytes(N, K, width), wgmma = weight_wgmma_work_bytes(N, K, width);
    if (bytes < mma) bytes = mma;
    return bytes < wgmma ? wgmma : bytes;
}

const Kernel tensor_kernels[] = {
    KERNEL(bf16, conv_forward, conv_forward_mma, "", "mma.sync, tiles of 64x64, cp.async"),
    KERNEL(bf16, conv_forward, conv_forward_linear, "", "K = 1: rows and weights stream"),
    KERNEL(bf16, conv_forward, conv_forward_wgmma, "tensor", "weights stay in shared memory"),
    KERNEL(bf16, conv_backward_input, conv_backward_input_mma, "", "the same, looking ahead"),
    KERNEL(bf16, conv_backward_input, conv_backward_input_linear, "", "K = 1, the same"),
    KERNEL(bf16, conv_backward_input, conv_backward_input_wgmma, "tensor",
           "weights stay in shared memory"),
    KERNEL(bf16, conv_backward_weight, conv_backward_weight_mma, "", "mma.sync, splits of time"),
    KERNEL(bf16, conv_backward_weight, conv_backward_weight_wgmma, "tensor",
           "a warpgroup per tap, several layers at once"),
};
const int n_tensor_kernels = sizeof tensor_kernels / sizeof *tensor_kernels;
