// The 24 dot products of fn with a token's streams on tensor cores, exact to fp32.
//
// A warp takes chunks of 32 columns of a stream. Lane 4 g + t holds columns 8 t .. 8 t + 7 of its tokens and of rows
// g, g + 8, g + 16 of fn: 16-byte accesses, and exactly the fragments of mma.m16n8k16 if step s of a chunk multiplies
// columns 8 t + 4 s .. 8 t + 4 s + 3. fn is the sum of three bf16 parts of eight bits of mantissa each; bf16 streams
// have one part, f32 streams three as well.
#pragma once

#include "common/mma.cuh"
#include "mhc/mhc.cuh"

namespace dsv4 {

constexpr int kChunk = 32;             // columns
constexpr int kRowTiles = kMixes / 8;  // n-tiles of the MMA
constexpr int kParts = 3;

// Eight f32 values as three bf16 parts whose sum is exact.
__device__ inline void split_octet(const Vector<float, 8>& v, Pairs (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x = v[2 * i], y = v[2 * i + 1];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      parts[part].pair[i] = __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x7632);
      x -= __uint_as_float(__float_as_uint(x) & 0xffff0000u);
      y -= __uint_as_float(__float_as_uint(y) & 0xffff0000u);
    }
  }
}
__device__ inline void split_octet(const Pairs& v, Pairs (&parts)[1]) { parts[0] = v; }

}  // namespace dsv4
