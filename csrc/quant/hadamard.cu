// The indexer's rotation and rounding: ops/quant/reference.py rotate_hadamard, round_index.
//
// A thread has 16 values of a row; 2, 4, 8 or 16 neighbouring lanes share a row of 32 to 256. Butterflies of width 1 to
// 8 happen within a thread, wider ones by shuffles, in the reference's order and in fp32, so the bits are its own. FP4
// blocks of 32 are two lanes. Everything stays in registers: 2 bytes read and 2 written an element of bf16.
// Queries of 8192 tokens, 64 heads of 128: 268 MB.
// sass hadamard_kernel: LDG.E.128, STG.E.128, SHFL.BFLY
#include "quant/quant.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// x rounded to the nearest e2m1 value, ties to even; |x| is at most 6, or an ulp above.
__device__ inline float round_e2m1(float x) {
  // A number of which e2m1's last place at |x| is the last bit: 2^22 below 2, then 2^23, 2^24.
  unsigned exponent = __float_as_uint(fmaxf(fabsf(x), 1.0f)) & 0x7f800000u;
  float large = __uint_as_float(exponent + (22u << 23));
  return copysignf((fabsf(x) + large) - large, x);
}

template <class T, bool kRoundIndex>
__global__ void __launch_bounds__(kThreads)
    hadamard_kernel(const T* __restrict__ x, T* __restrict__ out, int64_t pieces, int lanes, float factor) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  Values<T> values = {};
  if (piece < pieces) values = load_values(x + piece * kValues);
  float y[kValues];
  unpack(values, y);
  rotate_row(y, lanes);
#pragma unroll
  for (int i = 0; i < kValues; ++i) y[i] = rounded<T>(y[i] * factor);
  if constexpr (kRoundIndex) {
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) most = max(most, magnitude(y[i]));
    most = max(most, __shfl_xor_sync(kFullMask, most, 1));
    const uint32_t scale = fp4_scale(most);
#pragma unroll
    for (int i = 0; i < kValues; ++i) y[i] = round_e2m1(y[i] * reciprocal_power(scale)) * power_of_two(scale);
  }
  pack(y, values);
  if (piece < pieces) store_values(out + piece * kValues, values);
}

template <bool kRoundIndex>
cudaError_t start(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream) {
  if (!aligned(x.data) || !aligned(out.data)) return cudaErrorMisalignedAddress;
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t pieces = rows * width / kValues;
    hadamard_kernel<T, kRoundIndex><<<ceil_div(pieces, kThreads), kThreads, 0, stream>>>(
        static_cast<const T*>(x.data), static_cast<T*>(out.data), pieces, int(width / kValues), float(factor));
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t rotate_hadamard(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream) {
  return start<false>(x, out, rows, width, factor, stream);
}

cudaError_t round_index(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream) {
  return start<true>(x, out, rows, width, factor, stream);
}

}  // namespace dsv4
