// attn.cuh: what the files with attention kernels share: where a head's values lie, and counts.
#ifndef ATTN_CUH
#define ATTN_CUH

#include "support/device.cuh"

static inline __host__ __device__ size_t row_width(AttentionShape s) {
    return (size_t)(s.H + 2 * s.G) * (size_t)s.d;
}
// Head h and where in a row of qkv its query lies, and its group's key and value.
struct Head {
    int h, q, k, v;
    __device__ Head(AttentionShape s, int head)
        : h(head), q(head * s.d), k((s.H + head / (s.H / s.G)) * s.d), v(k + s.G * s.d) {}
};

// Bytes of qkv (or dqkv), `wide` times, and of out (or dout), `narrow` times.
static inline double attention_bytes(AttentionShape s, size_t size, int wide, int narrow) {
    return array_bytes(size, (size_t)s.B * s.T, wide * (int)row_width(s) + narrow * s.H * s.d);
}

// ---- Tensor cores: exponentials of base 2, and a row of sums, which four lanes share ------------

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

static __device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Of the four lanes that share a row of sums.
static __device__ __forceinline__ float quad_most(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
static __device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// ---- The rungs' launchers, for the rungs above them ---------------------------------------------

void attention_forward_mma(act *out, real *lse, const act *qkv, const real *gain, AttentionShape s,
                           void *work);
void attention_backward_mma(act *dqkv, real *dgain, const act *dout, const act *out,
                            const real *lse, real *delta, const act *qkv, const real *gain,
                            AttentionShape s, void *work);
template <typename T>
void attention_forward_tiled(act *out, real *lse, const act *qkv, const real *gain,
                             AttentionShape s, void *work);
template <typename T>
void attention_backward_tiled(act *dqkv, real *dgain, const act *dout, const act *out,
                              const real *lse, real *delta, const act *qkv, const real *gain,
                              AttentionShape s, void *work);
// delta = dout . out of every row and head; dgain += the columns of delta, as backward leaves it.
void attention_deltas_bf16(real *delta, const act *dout, const act *out, AttentionShape s);
void attention_gains_sum(real *dgain, const real *delta, AttentionShape s);
#endif
