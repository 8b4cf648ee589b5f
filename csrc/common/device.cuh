// What every kernel needs: dtype conversion, 16-byte vectors, reductions in a fixed order, dispatch over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "launchers.h"

namespace dsv4 {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

using bf16 = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// x rounded to T and back: the value that a tensor of T between two operations would hold.
template <class T>
__device__ inline float rounded(float x) { return to_float(from_float<T>(x)); }

// N consecutive values of T moved by one access of up to 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T values[N];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int N, class T>
__device__ inline Vector<T, N> load_vector(const T* from) { return *reinterpret_cast<const Vector<T, N>*>(from); }
template <int N, class T>
__device__ inline void store_vector(T* to, const Vector<T, N>& v) { *reinterpret_cast<Vector<T, N>*>(to) = v; }

// Eight values that are moved and unpacked together. bf16 values stay pairs in words: access by element would leave
// the compiler with halves of registers.
struct alignas(16) Pairs {
  uint32_t pair[4];
};
template <class T>
struct OctetOf {
  using type = Vector<T, 8>;
};
template <>
struct OctetOf<bf16> {
  using type = Pairs;
};
template <class T>
using Octet = typename OctetOf<T>::type;

template <class T>
__device__ inline Octet<T> load_octet(const T* from) { return *reinterpret_cast<const Octet<T>*>(from); }
__device__ inline void store_octet(float* to, const Vector<float, 8>& v) { *reinterpret_cast<Vector<float, 8>*>(to) = v; }
__device__ inline void store_octet(bf16* to, const Pairs& v) {
  // Left to itself the compiler sometimes stores word by word, rather than move them into neighbouring registers.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.pair[0]), "r"(v.pair[1]), "r"(v.pair[2]),
               "r"(v.pair[3])
               : "memory");
}

__device__ inline void unpack(const Vector<float, 8>& v, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = v[i];
}
__device__ inline void unpack(const Pairs& v, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(v.pair[i] << 16);
    to[2 * i + 1] = __uint_as_float(v.pair[i] & 0xffff0000u);
  }
}
// Rounded to the octet's type.
__device__ inline void pack(const float (&from)[8], Vector<float, 8>& v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = from[i];
}
__device__ inline void pack(const float (&from)[8], Pairs& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    v.pair[i] = reinterpret_cast<const uint32_t&>(two);
  }
}

// Keeps the work that makes v before whatever volatile statement comes next, and hides from the compiler that v stays
// the same: it then keeps the packed words, not every value unpacked.
__device__ inline void keep_here(Pairs& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(v.pair[i]));
}
__device__ inline void keep_here(Vector<float, 8>& v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(v[i]));
}

// Copy 16 bytes from global to shared memory without a register; `valid` false writes zeros and reads nothing.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Until this thread's copies have arrived; other threads need a barrier as well.
__device__ inline void wait_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Butterfly over a warp: every lane ends with the same bits.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

// Sum over a block, warps in ascending order; `scratch` holds one float a warp and may be used again after the next
// __syncthreads.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) total += scratch[warp];
  return total;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// 0 <= a / by for a < 2^20: the quotient of a + 1/2 is farther from a whole number than its error is large.
__device__ inline int divide_fast(int a, int by) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(float(by)));
  return int((float(a) + 0.5f) * inverse);
}

// How many multiprocessors the current device has.
inline cudaError_t count_processors(int& count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// `call(T())` for the floating-point dtype of a tensor.
template <class Call>
cudaError_t for_float_type(Type type, Call&& call) {
  if (type == Type::bf16) return call(bf16());
  if (type == Type::f32) return call(float());
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
