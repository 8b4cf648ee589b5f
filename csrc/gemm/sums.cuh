// Sums of products in shared memory, in slots of sixteen rows, on their way to an output.
#pragma once

#include "gemm/units.cuh"

namespace dsv4 {

constexpr int kSumStride = 20;  // floats between the sums of two columns: no two lanes of a warp share a bank
constexpr int kQuads = kUnitRows / 4;

// Four rows' sums in ascending order of K: `count` slots, `step` floats from one to the next.
__device__ inline float4 add_slots(const float* from, int count, int step) {
  float4 sum = {};
#pragma unroll 4
  for (int s = 0; s < count; ++s, from += step) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

}  // namespace dsv4
