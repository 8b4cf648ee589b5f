// How a warp reads weights: in units of 16 rows, copied to shared memory and turned into operands of the tensor cores.
//
// Weights are the A operand of mma_bf16 (common/mma.cuh), tokens the B operand. The sum over columns may be taken in
// any fixed order, so of every block of 64 columns lane 4 g + t takes the consecutive columns 16 t .. 16 t + 15, of
// rows g and g + 8 of the weight and of token g: MMA step i multiplies columns 16 t + 4 i .. + 3. A lane's part of a
// weight row is then one group of NVFP4, so that each scale is unpacked once, or 16 bytes of FP8. (Of bf16 weights, 16
// bytes are 8 columns: 8 t .. 8 t + 7 of each half of a block.) Matrices of FP8 and bf16 are read as they are stored,
// those of 4 bits as ops/pack arranges them: unit after unit, nibbles where shifts and masks make operands of them.
//
// A unit is four pieces of 16 bytes a lane, then its scales.
#pragma once

#include "common/barrier.cuh"
#include "common/device.cuh"
#include "common/mma.cuh"

#include <cuda_fp16.h>

#include <type_traits>

namespace dsv4 {

enum class Kind : int { nvfp4, mxfp4, fp8, bf16 };
// The number of a kernel for several formats, beside those of Kind for one.
constexpr int kAny = -1;

// `start(constant)` of a format.
template <int kKind>
using KindConstant = std::integral_constant<int, kKind>;
template <class Start>
cudaError_t for_kind(Kind kind, const Start& start) {
  switch (kind) {
    case Kind::nvfp4: return start(KindConstant<int(Kind::nvfp4)>());
    case Kind::mxfp4: return start(KindConstant<int(Kind::mxfp4)>());
    case Kind::fp8: return start(KindConstant<int(Kind::fp8)>());
    case Kind::bf16: return start(KindConstant<int(Kind::bf16)>());
  }
  return cudaErrorInvalidValue;
}

constexpr int kUnitRows = 16;
constexpr int kPieces = 4;
constexpr int kBlock = 64;  // columns that four MMA steps multiply,
constexpr int kHalf = 32;  // and two, for which a lane reads 16 bytes of a token
constexpr int kSteps = 2;  // of a half
constexpr int kPieceBytes = 16 * kWarp;
constexpr int kUnitShared = kPieces * kPieceBytes + 8 * kWarp;  // of the largest kind, scales included

__host__ __device__ constexpr bool is_packed(Kind kind) { return kind == Kind::nvfp4 || kind == Kind::mxfp4; }
// Columns of a unit.
__host__ __device__ constexpr int unit_columns(Kind kind) { return is_packed(kind) ? 256 : kind == Kind::fp8 ? 128 : 64; }
// Bytes of a packed unit.
__host__ __device__ constexpr int unit_bytes(Kind kind) { return kind == Kind::nvfp4 ? 2304 : 2176; }
// Pieces that are read together, and the halves that they hold: 64 columns, but 32 of bf16.
__host__ __device__ constexpr int part_pieces(Kind kind) { return is_packed(kind) ? 1 : 2; }
__host__ __device__ constexpr int part_halves(Kind kind) { return kind == Kind::bf16 ? 1 : 2; }
// Whether few tokens meet a format as fp16, in which e2m1 x e4m3 and e4m3 are exact and unpacked in the fewest
// instructions; the tokens, bf16, are then scaled by powers of two so that they are exact as well. MXFP4's scales do
// not fit.
__host__ __device__ constexpr bool is_half(Kind kind) { return kind == Kind::nvfp4 || kind == Kind::fp8; }
// What the operands of unpack_half and unpack_half_bf16 are multiplied by to be the weight without its global scale.
__host__ __device__ constexpr float unit_factor(Kind kind) {
  return kind == Kind::nvfp4 ? 16384.0f : kind == Kind::mxfp4 ? 256.0f : 1.0f;
}
__host__ __device__ constexpr float unit_factor_bf16(Kind kind) { return is_packed(kind) ? 256.0f : 1.0f; }

// Around the L1 cache: weights are read once. `bytes` below 16 fills up with zeros.
__device__ inline void copy_async_piece(uint32_t shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

__device__ inline uint4 load_piece(const void* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ inline uint4 read_shared_16(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
__device__ inline float read_shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ inline float4 read_shared_float4(uint32_t at) {
  const uint4 v = read_shared_16(at);
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}
__device__ inline void write_shared_float4(uint32_t at, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ inline uint2 read_shared_8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

// Where a lane finds its part of a unit of FP8 or bf16, in a matrix as it is stored.
template <Kind kind>
struct Unit {
  static constexpr int kSize = kind == Kind::bf16 ? 2 : 1;  // bytes of an element
  static constexpr int kLane = 16 / kSize;                  // columns of a piece
  const uint8_t* at;  // the lane's first columns of row g
  int below;          // bytes from row g to row g + 8
  int width;          // columns that exist, from the lane's first on

  __device__ Unit() {}
  // Unit `block` of row tile `tile` of a matrix [rows, columns]. Rows past the end stand for the last one.
  __device__ Unit(const uint8_t* data, int rows, int columns, int tile, int block, int lane) {
    const int g = lane / 4, t = lane % 4, column = block * unit_columns(kind) + kLane * t;
    const int upper = min(tile * kUnitRows + g, rows - 1), lower = min(tile * kUnitRows + g + 8, rows - 1);
    at = data + (int64_t(upper) * columns + column) * kSize;
    below = (lower - upper) * columns * kSize;
    width = columns - column;
  }

  // Start copying piece q, of row g or g + 8, to its place in a slot; the same lane will read it.
  __device__ void copy(uint32_t slot, int q, int lane) const {
    const int columns = q / 2 * 4 * kLane;  // the quad's four lanes read 64 neighbouring bytes
    const bool inside = columns < width;
    const uint8_t* from = at + (q % 2 ? below : 0) + (inside ? columns * kSize : 0);
    copy_async_piece(slot + q * kPieceBytes + 16 * lane, from, inside ? 16 : 0);
  }
};

__device__ inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ inline __half2 as_f16(uint32_t pair) { return reinterpret_cast<const __half2&>(pair); }
__device__ inline uint32_t as_word(__half2 pair) { return reinterpret_cast<const uint32_t&>(pair); }
__device__ inline uint32_t multiply_f16(uint32_t a, uint32_t b) { return as_word(__hmul2(as_f16(a), as_f16(b))); }

// The scales of rows g and g + 8, each twice.
struct ScalePair {
  uint32_t upper, lower;
};
__device__ inline ScalePair each_twice(uint32_t pair) {
  return {__byte_perm(pair, pair, 0x1010), __byte_perm(pair, pair, 0x3232)};
}
// Two codes of e4m3 as fp16, which is exact.
__device__ inline uint32_t e4m3_to_f16(uint16_t codes) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
  return pair;
}
// Two codes of e4m3, in the low or the high half of a word, as s * 2^118 in bf16: their bits are those of s * 2^-120.
__device__ inline ScalePair unpack_e4m3(uint32_t bytes, bool high = false) {
  constexpr uint32_t k2To119 = 0x7b007b00;
  const uint32_t pair = __byte_perm(bytes, 0, high ? 0x4342 : 0x4140) << 4;
  return each_twice(multiply_bf16(multiply_bf16(pair, k2To119), k2To119));
}
// Two bytes of e8m0 likewise as 2^(byte - 127 + 118) in bf16.
__device__ inline ScalePair unpack_e8m0(uint32_t bytes, bool high = false) {
  return each_twice((__byte_perm(bytes, 0, high ? 0x4342 : 0x4140) + 0x00760076) << 7);
}

// The eight codes of a word as the four operands of one MMA step, times their scales. Bits move to where they are
// e2m1 * 2^-14 in fp16 or e2m1 * 2^-126 in bf16 (ops/formats.py CODE_BITS); the least of both are subnormal numbers.
// NVFP4: each byte has a code of row g and one of row g + 8, for the upper byte of an fp16.
struct CodeBytes {
  uint32_t upper, lower;
  __device__ explicit CodeBytes(uint32_t q)
      : upper(q & 0x8e8e8e8e), lower(((q >> 3) & 0x0e0e0e0e) | ((q << 7) & 0x80808080)) {}
};
__device__ inline void unpack_nvfp4(uint32_t q, const ScalePair& s, uint32_t (&a)[4]) {
  // Seven instructions of the integer pipe, which takes one every other cycle, and two of others.
  const uint32_t lower = ((q >> 3) & 0x0e0e0e0e) | ((q << 7) & 0x80808080);
  a[0] = multiply_f16((q << 8) & 0x8e008e00, s.upper);
  a[1] = multiply_f16(__byte_perm(lower, 0, 0x2404), s.lower);
  a[2] = multiply_f16(q & 0x8e008e00, s.upper);
  a[3] = multiply_f16(lower & 0xff00ff00, s.lower);
}
__device__ inline void unpack_nvfp4_bf16(uint32_t q, const ScalePair& s, uint32_t (&a)[4]) {
  constexpr uint32_t kSize = 0x01c001c0, kSign = 0x80008000;
  const CodeBytes codes(q);
  // Bytes 1 and 3 lie where an fp16 has them, bytes 0 and 2 eight bits lower; bf16 has them three bits below fp16.
  a[0] = multiply_bf16(((codes.upper << 5) & kSize) | ((codes.upper << 8) & kSign), s.upper);
  a[1] = multiply_bf16(((codes.lower << 5) & kSize) | ((codes.lower << 8) & kSign), s.lower);
  a[2] = multiply_bf16(((codes.upper >> 3) & kSize) | (codes.upper & kSign), s.upper);
  a[3] = multiply_bf16(((codes.lower >> 3) & kSize) | (codes.lower & kSign), s.lower);
}
__device__ inline void unpack_mxfp4_bf16(uint32_t q, const ScalePair& s, uint32_t (&a)[4]) {
  constexpr uint32_t kCode = 0x81c081c0;
  a[0] = multiply_bf16(q & kCode, s.upper);
  a[1] = multiply_bf16((q << 3) & kCode, s.lower);
  a[2] = multiply_bf16((q << 6) & kCode, s.upper);
  const uint32_t last = ((q >> 3) & 0x01800180) | ((q >> 7) & 0x00400040) | ((q << 1) & 0x80008000);
  a[3] = multiply_bf16(last, s.lower);
}

// Two e4m3 codes as bf16.
__device__ inline uint32_t e4m3_to_bf16(uint16_t codes) {
  const float2 both = __half22float2(as_f16(e4m3_to_f16(codes)));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(both.x, both.y);
  return reinterpret_cast<const uint32_t&>(pair);
}

// A lane's scales of a packed unit: two bytes a part.
template <Kind kind>
__device__ inline uint2 read_scales(uint32_t slot, int lane) {
  return read_shared_8(slot + kPieces * kPieceBytes + 8 * (kind == Kind::nvfp4 ? lane : lane / 4 * 2 + lane % 4 / 2));
}
// Those of one part, as unpack_half takes them, or unpack_half_bf16.
template <Kind kind>
__device__ inline ScalePair unpack_scales_bf16(const uint2& scales, int part) {
  const uint32_t bytes = part < 2 ? scales.x : scales.y;
  return kind == Kind::nvfp4 ? unpack_e4m3(bytes, part % 2) : unpack_e8m0(bytes, part % 2);
}
template <Kind kind>
__device__ inline ScalePair unpack_scales(const uint2& scales, int part) {
  const uint32_t bytes = part < 2 ? scales.x : scales.y;
  if (kind == Kind::nvfp4) {
    const uint32_t pair = e4m3_to_f16(uint16_t(part % 2 ? bytes >> 16 : bytes));
    return {as_word(__low2half2(as_f16(pair))), as_word(__high2half2(as_f16(pair)))};  // a choice of the multiplication
  }
  return unpack_scales_bf16<kind>(scales, part);
}

template <Kind kind, bool half>
__device__ inline void unpack_half_as(const uint4 (&pieces)[part_pieces(kind)], const ScalePair& scales, int h,
                                      uint32_t (&a)[kSteps][4]) {
  const uint4& upper = pieces[0];
  if constexpr (is_packed(kind)) {
    const uint32_t words[] = {h ? upper.z : upper.x, h ? upper.w : upper.y};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kind == Kind::mxfp4) {
        unpack_mxfp4_bf16(words[i], scales, a[i]);
      } else if constexpr (half) {
        unpack_nvfp4(words[i], scales, a[i]);
      } else {
        unpack_nvfp4_bf16(words[i], scales, a[i]);
      }
    }
  } else if constexpr (kind == Kind::fp8) {
    const uint4& lower = pieces[1];
    const uint32_t of_upper[] = {h ? upper.z : upper.x, h ? upper.w : upper.y};
    const uint32_t of_lower[] = {h ? lower.z : lower.x, h ? lower.w : lower.y};
    auto convert = [](uint32_t codes) { return half ? e4m3_to_f16(uint16_t(codes)) : e4m3_to_bf16(uint16_t(codes)); };
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      a[i][0] = convert(of_upper[i]);
      a[i][1] = convert(of_lower[i]);
      a[i][2] = convert(of_upper[i] >> 16);
      a[i][3] = convert(of_lower[i] >> 16);
    }
  } else {
    const uint4& lower = pieces[1];
    a[0][0] = upper.x, a[0][1] = lower.x, a[0][2] = upper.y, a[0][3] = lower.y;
    a[1][0] = upper.z, a[1][1] = lower.z, a[1][2] = upper.w, a[1][3] = lower.w;
  }
}
// Operands of the two MMA steps of half h of a part: a[i] of step i; of fp16 where is_half(kind), else of bf16.
template <Kind kind>
__device__ inline void unpack_half(const uint4 (&pieces)[part_pieces(kind)], const ScalePair& scales, int h,
                                   uint32_t (&a)[kSteps][4]) {
  unpack_half_as<kind, is_half(kind)>(pieces, scales, h, a);
}
// The same, of bf16 for every kind.
template <Kind kind>
__device__ inline void unpack_half_bf16(const uint4 (&pieces)[part_pieces(kind)], const ScalePair& scales, int h,
                                        uint32_t (&a)[kSteps][4]) {
  unpack_half_as<kind, false>(pieces, scales, h, a);
}
// One such step.
template <Kind kind>
__device__ inline void multiply_step(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (is_half(kind)) {
    mma_f16(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  } else {
    mma_bf16(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  }
}

// Eight bf16 values times `factor`, a power of two, as fp16.
__device__ inline uint4 scale_to_f16(const uint4& values, float factor) {
  auto convert = [&](uint32_t pair) {
    return as_word(__floats2half2_rn(__uint_as_float(pair << 16) * factor,
                                     __uint_as_float(pair & 0xffff0000u) * factor));
  };
  return {convert(values.x), convert(values.y), convert(values.z), convert(values.w)};
}
// The largest magnitude of eight bf16 values, as its bits, which are of the same order.
__device__ inline uint32_t largest_bits(const uint4& values) {
  auto magnitudes = [](uint32_t pair) { return pair & 0x7fff7fffu; };
  const uint32_t most = __vmaxu2(__vmaxu2(magnitudes(values.x), magnitudes(values.y)),
                                 __vmaxu2(magnitudes(values.z), magnitudes(values.w)));
  return max(most & 0xffffu, most >> 16);
}
// The power of two that brings values of that largest magnitude to 2^14 .. 2^15 in fp16: those above 2^-31 of it stay
// exact, the others keep an error below 2^-39 of it. `inverse` takes it back.
struct TokenScale {
  float factor, inverse;
  __device__ explicit TokenScale(uint32_t largest) {
    const uint32_t exponent = min(268u - (largest >> 7), 253u);
    factor = __uint_as_float(exponent << 23);
    inverse = __uint_as_float((254u - exponent) << 23);
  }
};

// Tokens in shared memory: rows of `columns` bf16, a multiple of 64. What a lane needs for one half is one piece of 16
// bytes, and the pieces of t = 0 .. 3 are neighbours; rows end with 64 bytes more. So the eight lanes that are served
// together hit all banks. For bf16 weights the order is that of the columns.
__host__ __device__ constexpr int token_pitch(int columns) { return 2 * columns + 64; }
template <Kind kind>
__device__ inline int token_piece_at(int piece) {
  return kind == Kind::bf16 ? 16 * piece : piece / 8 * 128 + piece % 2 * 64 + piece % 8 / 2 * 16;
}
// Operands of the two MMA steps of a half, from a lane's piece of it: b[i] of step i. Halves are 64 bytes apart.
constexpr int kHalfBytes = 64;
__device__ inline void read_tokens(uint32_t at, uint32_t (&b)[kSteps][2]) {
  const uint4 piece = read_shared_16(at);
  b[0][0] = piece.x, b[0][1] = piece.y, b[1][0] = piece.z, b[1][1] = piece.w;
}

// The scale of a block of 128 x 128 FP8 weights, f32 or e8m0.
__device__ inline float read_block_scale(const void* scales, bool e8m0, int64_t at) {
  if (!e8m0) return static_cast<const float*>(scales)[at];
  const unsigned byte = static_cast<const uint8_t*>(scales)[at];
  return __uint_as_float(byte ? byte << 23 : 0x00400000u);
}

}  // namespace dsv4
