// What kernels that round share: 16 values a thread, magnitudes as integers, conversions to e4m3 and e2m1, powers of
// two, the scales of blocks, and the indexer's rotation.
#pragma once

#include "common/device.cuh"

namespace dsv4 {

constexpr int kValues = 16;  // of a thread: a block of NVFP4, 32 bytes of bf16

// 16 consecutive values of bf16 or f32 as they lie in memory.
template <class T>
struct Values {
  Octet<T> halves[2];
};

template <class T>
__device__ inline Values<T> load_values(const T* from) {
  return {load_octet(from), load_octet(from + 8)};
}

template <class T>
__device__ inline void store_values(T* to, const Values<T>& x) {
  store_octet(to, x.halves[0]);
  store_octet(to + 8, x.halves[1]);
}

template <class T>
__device__ inline void unpack(const Values<T>& x, float (&to)[kValues]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float eight[8];
    unpack(x.halves[half], eight);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[8 * half + i] = eight[i];
  }
}
// Rounded to T.
template <class T>
__device__ inline void pack(const float (&from)[kValues], Values<T>& x) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = from[8 * half + i];
    pack(eight, x.halves[half]);
  }
}

// Magnitudes are compared by their fp32 bits, as unsigned integers: the same order, and NaN above infinity.
__device__ inline unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ inline unsigned largest_magnitude(const Values<float>& x) {
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) most = max(most, magnitude(x.halves[i / 8][i % 8]));
  return most;
}
__device__ inline unsigned largest_magnitude(const Values<bf16>& x) {
  unsigned most = 0;  // of the low and of the high values of all pairs
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) most = __vmaxu2(most, x.halves[i / 4].pair[i % 4] & 0x7fff7fffu);
  return max(most << 16, most & 0xffff0000u);
}

// Two values to e4m3, `low` in the low byte: to nearest, ties to even, saturating at 448; NaN stays NaN.
__device__ inline uint32_t to_e4m3_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float2 from_e4m3_pair(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
  return __half22float2(reinterpret_cast<const __half2&>(halves));
}

// The code of the e2m1 value nearest to q, ties to even code, saturating at 6; the sign of zero is kept.
__device__ inline uint32_t to_e2m1(float q) {
  const float size = fabsf(q);
  return (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) +
         (size > 5.0f) + (signbit(q) ? 8 : 0);
}

// ceil(log2(x)) + 127 of a normal x > 0, from its exponent field: exact. At most 254, a finite scale.
__device__ inline uint32_t ceil_log2(float x) { return min((__float_as_uint(x) + 0x7fffffu) >> 23, 254u); }

// 2^(byte - 127) for byte >= 1, and its reciprocal, also normal for byte <= 253. Multiplying by the latter is dividing
// by the former, bit by bit.
__device__ inline float power_of_two(uint32_t byte) { return __uint_as_float(byte << 23); }
__device__ inline float reciprocal_power(uint32_t byte) { return __uint_as_float((254u - byte) << 23); }

// The scale's byte of a block of FP8 or FP4 codes by the block's largest magnitude.
__device__ inline uint32_t fp8_scale(unsigned most) {
  return ceil_log2(__fdiv_rn(fmaxf(__uint_as_float(most), 1e-4f), 448.0f));
}
__device__ inline uint32_t fp4_scale(unsigned most) {
  return ceil_log2(__fdiv_rn(fmaxf(__uint_as_float(most), 6 * 0x1p-126f), 6.0f));
}

// Hadamard butterflies over all values of the row that `lanes` neighbouring lanes share, every lane of a warp at once.
__device__ inline void rotate_row(float (&y)[kValues], int lanes) {
#pragma unroll
  for (int width = 1; width < kValues; width *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i & width) continue;
      float a = y[i], b = y[i + width];
      y[i] = a + b;
      y[i + width] = a - b;
    }
  }
  for (int lane = 1; lane < lanes; lane *= 2) {
    const float sign = threadIdx.x & lane ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      y[i] = fmaf(sign, y[i], __shfl_xor_sync(kFullMask, y[i], lane));  // a + b, or a - b in the upper lane
  }
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The number of threads for `wanted`: whole warps, at most `most`.
inline int whole_warps(int64_t wanted, int most) {
  int64_t threads = ceil_div(wanted, kWarp) * kWarp;
  return int(threads < most ? threads : most);
}

}  // namespace dsv4
