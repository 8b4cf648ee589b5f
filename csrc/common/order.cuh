// Floats as unsigned integers of the same order, for integer maxima: a warp has an instruction for those (redux).
#pragma once

#include <cuda_runtime.h>

namespace dsv4 {

// x < y if and only if ordered(x) < ordered(y), for all but NaN; -0 equals 0. A NaN lies outside the infinities.
__device__ inline unsigned ordered(float x) {
  unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

}  // namespace dsv4
