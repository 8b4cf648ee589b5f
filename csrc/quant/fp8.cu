// FP8 by blocks of a row with power-of-two scales: ops/quant/reference.py quantize_fp8, round_fp8, round_kv.
//
// A thread has 16 values, two 16-byte loads (bf16), and keeps them in registers; the block / 16 neighbouring lanes that
// share a block meet in its maximum by shuffles. Codes leave as one 16-byte store a thread, rounded values as they
// came. Division by a power of two is exact, so elements are multiplied by its reciprocal. Blocks that are not 16, 32,
// .. 512 wide, and rows that are no multiple of 16, take a warp a row, value by value.
//
// Bytes an element of bf16, blocks of 128: 2 read, 1.008 written; 8192 x 4096: 101 MB; 8192 x 7168: 177 MB. round_kv:
// 2 read, 2 written.
// sass quantize_fp8_kernel: LDG.E.128, STG.E.128, F2FP.SATFINITE.E4M3, SHFL.BFLY
// sass round_fp8_kernel: LDG.E.128, STG.E.128, F2FP.SATFINITE.E4M3, SHFL.BFLY
#include "quant/quant.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256, kMaxThreads = 512;

// Rows of `width` values, of which the first `rounded` are quantised by blocks and the others copied.
struct Rows {
  int64_t count;
  int width, rounded, block;
  int blocks;  // of a row
  int shift;   // block = 16 << shift, for the kernels of whole vectors

  Rows(int64_t count, int64_t width, int64_t rounded, int64_t block)
      : count(count), width(int(width)), rounded(int(rounded)), block(int(block)) {
    blocks = int(ceil_div(rounded, block));
    for (shift = 0; kValues << shift < block; ++shift) continue;
  }
};

// This thread's 16 values, within or behind its row, and the scale of its block. Every lane calls it.
template <class T>
struct Piece {
  int64_t row;
  int first;  // in the row
  bool exists, is_rounded;
  Values<T> values = {};
  uint32_t scale;

  __device__ Piece(const T* __restrict__ x, const Rows& rows) {
    row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    first = (blockIdx.y * blockDim.x + threadIdx.x) * kValues;
    exists = row < rows.count && first < rows.width;
    is_rounded = exists && first < rows.rounded;
    if (exists) values = load_values(x + row * rows.width + first);
    unsigned most = is_rounded ? largest_magnitude(values) : 0;
    for (int lane = 1; lane < 1 << rows.shift; lane *= 2)
      most = max(most, __shfl_xor_sync(kFullMask, most, lane));
    scale = fp8_scale(most);
  }

  __device__ void codes(uint32_t (&pairs)[kValues / 2]) const {
    const float factor = reciprocal_power(scale);
    float x[kValues];
    unpack(values, x);
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) pairs[i] = to_e4m3_pair(x[2 * i] * factor, x[2 * i + 1] * factor);
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_fp8_kernel(const T* __restrict__ x, uint8_t* __restrict__ codes, uint8_t* __restrict__ scales, Rows rows) {
  const Piece<T> piece(x, rows);
  if (!piece.exists) return;
  uint32_t pairs[kValues / 2];
  piece.codes(pairs);
  Vector<uint32_t, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = pairs[2 * i] | pairs[2 * i + 1] << 16;
  store_vector(reinterpret_cast<uint32_t*>(codes + piece.row * rows.width + piece.first), out);
  const int block = piece.first / kValues >> rows.shift;
  if (block << rows.shift == piece.first / kValues) scales[piece.row * rows.blocks + block] = uint8_t(piece.scale);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    round_fp8_kernel(const T* __restrict__ x, T* __restrict__ out, Rows rows) {
  Piece<T> piece(x, rows);
  if (!piece.exists) return;
  if (piece.is_rounded) {
    const float scale = power_of_two(piece.scale);
    uint32_t pairs[kValues / 2];
    piece.codes(pairs);
    float y[kValues];
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float2 pair = from_e4m3_pair(pairs[i]);
      y[2 * i] = pair.x * scale, y[2 * i + 1] = pair.y * scale;
    }
    pack(y, piece.values);
  }
  store_values(out + piece.row * rows.width + piece.first, piece.values);
}

// A warp a row, for any width and block: codes and scales, or rounded values in `out` if it is not null.
template <class T>
__global__ void __launch_bounds__(kWarp)
    fp8_any_width_kernel(const T* __restrict__ x, uint8_t* __restrict__ codes, uint8_t* __restrict__ scales,
                         T* __restrict__ out, Rows rows) {
  const int64_t row = blockIdx.x;
  x += row * rows.width;
  for (int b = 0; b < rows.blocks; ++b) {
    const int first = b * rows.block, end = min(first + rows.block, rows.rounded);
    unsigned most = 0;
    for (int i = first + threadIdx.x; i < end; i += kWarp) most = max(most, magnitude(to_float(x[i])));
    const uint32_t scale = fp8_scale(__reduce_max_sync(kFullMask, most));
    for (int i = first + threadIdx.x; i < end; i += kWarp) {
      uint32_t code = to_e4m3_pair(to_float(x[i]) * reciprocal_power(scale), 0.0f);
      if (out) {
        out[row * rows.width + i] = from_float<T>(from_e4m3_pair(code).x * power_of_two(scale));
      } else {
        codes[row * rows.width + i] = uint8_t(code);
      }
    }
    if (!out && threadIdx.x == 0) scales[row * rows.blocks + b] = uint8_t(scale);
  }
  for (int i = rows.rounded + threadIdx.x; out && i < rows.width; i += kWarp) out[row * rows.width + i] = x[i];
}

// How the rows are spread: the x threads of a block share a row, a whole number of FP8 blocks of it.
struct Shape {
  dim3 grid, block;
};

bool fits_vectors(const Rows& rows, const void* x, const void* out) {
  const bool block = rows.block == kValues << rows.shift && rows.block <= kValues * kWarp;
  return block && rows.width % kValues == 0 && rows.rounded % kValues == 0 && aligned(x) && aligned(out);
}

Shape spread(const Rows& rows) {
  const int vectors = rows.width / kValues;
  int across = 1 << rows.shift;  // a power of two up to a warp, beyond it whole warps
  while (across < vectors && across < kWarp) across *= 2;
  if (vectors > kWarp) across = whole_warps(vectors, kMaxThreads);
  const int down = across < kThreads ? kThreads / across : 1;
  return {dim3(unsigned(ceil_div(rows.count, down)), unsigned(ceil_div(vectors, across))), dim3(across, down)};
}

}  // namespace

cudaError_t quantize_fp8(In x, Out codes, Out scales, int64_t count, int64_t width, int64_t block,
                         cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const Rows rows(count, width, width, block);
    auto* from = static_cast<const T*>(x.data);
    auto* to = static_cast<uint8_t*>(codes.data);
    auto* scales_to = static_cast<uint8_t*>(scales.data);
    if (fits_vectors(rows, from, to)) {
      const Shape shape = spread(rows);
      quantize_fp8_kernel<T><<<shape.grid, shape.block, 0, stream>>>(from, to, scales_to, rows);
    } else {
      fp8_any_width_kernel<T><<<rows.count, kWarp, 0, stream>>>(from, to, scales_to, nullptr, rows);
    }
    return cudaGetLastError();
  });
}

cudaError_t round_kv(In kv, Out out, int64_t count, int64_t width, int64_t rope_dim, int64_t block,
                     cudaStream_t stream) {
  return for_float_type(kv.type, [&](auto zero) {
    using T = decltype(zero);
    const Rows rows(count, width, width - rope_dim, block);
    auto* from = static_cast<const T*>(kv.data);
    auto* to = static_cast<T*>(out.data);
    if (fits_vectors(rows, from, to)) {
      const Shape shape = spread(rows);
      round_fp8_kernel<T><<<shape.grid, shape.block, 0, stream>>>(from, to, rows);
    } else {
      fp8_any_width_kernel<T><<<rows.count, kWarp, 0, stream>>>(from, nullptr, nullptr, to, rows);
    }
    return cudaGetLastError();
  });
}

cudaError_t round_fp8(In x, Out out, int64_t count, int64_t width, int64_t block, cudaStream_t stream) {
  return round_kv(x, out, count, width, 0, block, stream);
}

}  // namespace dsv4
