// rows.cuh: one warp reads, averages, normalises and writes a row of channels. LayerNorm
// (layers.cu) and the embedding (fast/embedding.cu) share these functions. The embedding also calls
// LayerNorm's launchers, for its table. Read first: device.cuh.
#ifndef ROWS_CUH
#define ROWS_CUH

#include "support/device.cuh"

// LayerNorm's launchers (layers.cu), with the signatures of Backend.
void norm_forward_naive(act *out, const act *x, const real *gain, const real *bias, size_t N,
                        int C);
void norm_backward_naive(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                         const real *gain, const real *bias, Epilogue e, size_t N, int C,
                         void *work);
template <typename T>
void norm_backward_tiled(act *again, real *dgain, real *dbias, const act *dout, const act *x,
                         const real *gain, const real *bias, Epilogue e, size_t N, int C,
                         void *work);

// ---- A row that is read again from cache --------------------------------------------------------

// Mean and 1/standard deviation of a row. The warp reads it four values a lane; the second pass
// finds the row in L1.
// Neighbouring lanes: neighbouring 16 bytes of float32, or 8 of bf16. A load of the warp is 128
// channels, four whole lines, or two. warp_sum leaves the same bits in every lane.
template <bool VEC, typename T>
static inline __device__ float2 warp_moments(const T *x, int C, int lane) {
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
static inline __device__ void warp_norm_row(Out *out, const T *row, const float *gain,
                                            const float *bias, int C, int lane, bool dropped) {
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

// ---- A row that stays in registers --------------------------------------------------------------
//
// Rows of up to WARP_C channels, channels 8*lane + j in lane `lane`. A warp takes ROWS_AT_ONCE rows
// at a time, or one where all rows are few.
enum { WARP_C = 256, ROWS_AT_ONCE = 4, FEW_ROWS = 4096 };

// Neighbouring lanes: neighbouring 16 bytes of bf16; 512 bytes, four whole lines, for C = 256. C is
// a multiple of 8, so a lane has eight channels or none, which are zeros. C = 0: no row.
template <typename T>
static inline __device__ void load_row(float v[8], const T *row, int C, int lane) {
    for (int j = 0; j < 8; j++) v[j] = 0;
    if (8 * lane < C) load_eight(v, row + 8 * lane);
}
template <typename T>
static inline __device__ void store_row(T *row, const float v[8], int C, int lane) {
    if (8 * lane < C) store_eight(row + 8 * lane, v);
}
static inline __device__ float2 register_moments(const float v[8], int C, int lane) {
    float sum = 0, squares = 0;
    for (int j = 0; j < 8; j++) sum += v[j];
    float mean = warp_sum(sum) / C;
    for (int j = 0; j < 8; j++)
        if (8 * lane < C) squares += (v[j] - mean) * (v[j] - mean);  // 0 - mean is not 0
    return make_float2(mean, 1 / sqrtf(warp_sum(squares) / C + (float)NORM_EPS));
}
#endif
