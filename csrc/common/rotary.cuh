// The rotation of RoPE, as accurate as torch's at any position.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

// (cos, sin) of the fp32 product position * inv_freq. The angle may be 1e6: counted in half turns, in double, it comes
// into [-1, 1] with an error below 1e-7, and sincospif has no path for large arguments, which would take a stack.
__device__ inline float2 rotary_angle(int64_t position, float inv_freq) {
  double half_turns = double(__fmul_rn(float(position), inv_freq)) * 0.31830988618379067;  // 1 / pi
  half_turns -= 2.0 * rint(0.5 * half_turns);
  float cosine, sine;
  sincospif(float(half_turns), &sine, &cosine);
  return make_float2(cosine, sine);
}

// The pair (a, b) turned by an angle; products are rounded before their sum, as in torch.
__device__ inline float2 rotate(float2 pair, float2 angle) {
  return make_float2(__fsub_rn(__fmul_rn(pair.x, angle.x), __fmul_rn(pair.y, angle.y)),
                     __fadd_rn(__fmul_rn(pair.x, angle.y), __fmul_rn(pair.y, angle.x)));
}

}  // namespace dsv4
