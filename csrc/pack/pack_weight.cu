// 4-bit weights into the units that matrix kernels read, and back: ops/pack/reference.py pack_weight, unpack_weight.
// dsv4/ops/formats.py Packed says where each bit stands, csrc/gemm/units.cuh how it is read.
//
// A warp a unit, and no exchange between lanes: lane 4 g + t handles what it will hold as an operand, of each piece 16
// columns of rows g and g + 8. Packed, these are 16 bytes a lane, 512 contiguous ones of a warp; row-major they are 8
// bytes of either row, 8 rows x 32 bytes of a warp, whole sectors. Not 16 bytes, because 8 are one group of NVFP4: rows
// of K / 2 bytes are no better aligned, and a group exists or is padding as a whole. Scales are single bytes in rows,
// for rows of K / 16 bytes have no alignment at all. A lane's 16 loads do not wait for each other.
//
// A full unit is 2304 (NVFP4) or 2176 bytes (MXFP4) read and as many written. 2048 x 4096 in NVFP4: 9.4 MB.
// sass pack_weight_kernel: LDG.E.64, STG.E.128
// sass unpack_weight_kernel: LDG.E.128, STG.E.64
#include "common/launch.cuh"
#include "gemm/units.cuh"

#include <type_traits>

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitColumns = 256, kPieceColumns = 64, kLaneColumns = 16;
constexpr int64_t kMost = 1 << 30;      // rows, columns, units: more would overflow an int
constexpr uint32_t kPair = 0x00010001;  // a bit of the even column's code and the same bit of the odd one's

static_assert(unit_columns(Kind::nvfp4) == kUnitColumns && unit_columns(Kind::mxfp4) == kUnitColumns);
static_assert(kPieces * kPieceColumns == kUnitColumns && kPieceBytes == 16 * kWarp && kUnitRows == 16);

using Codes = Vector<uint32_t, 2>;  // 16 columns of a row, the first in the lowest nibble
using Words = Vector<uint32_t, 4>;  // 16 columns of two rows, packed

template <Kind kind>
using Constant = std::integral_constant<Kind, kind>;

// A byte of codes to a pair, the even column's code below, the odd one's 16 bits above; higher bits are ignored.
__device__ inline uint32_t to_pair(uint32_t byte) { return (byte & 0x0f) | (byte & 0xf0) << 12; }
__device__ inline uint32_t from_pair(uint32_t pair) { return (pair | pair >> 12) & 0xff; }

// Where a word has the codes 0 to 3: the bit of the sign, the lowest bit of the magnitude. Of MXFP4's last magnitude
// the lowest bit stands apart.
__device__ constexpr int sign_bit(Kind kind, int i) {
  return kind == Kind::nvfp4 ? (i % 2 ? 0 : 7) + i / 2 * 8 : i == 3 ? 14 : 15 - 3 * i;
}
__device__ constexpr int size_bit(Kind kind, int i) {
  return kind == Kind::nvfp4 ? (i % 2 ? 4 : 1) + i / 2 * 8 : i == 3 ? 9 : 6 - 3 * i;
}
constexpr int kApart = 13;

// A word of four pairs: columns 0 and 1 of row g (0) and g + 8 (1), columns 2 and 3 of row g (2) and g + 8 (3).
template <Kind kind, int i>
__device__ inline uint32_t place_pair(uint32_t pair) {
  constexpr bool apart = i == 3 && kind == Kind::mxfp4;
  const uint32_t word = (pair >> 3 & kPair) << sign_bit(kind, i);
  return word | (pair & (apart ? 6 : 7) * kPair) << size_bit(kind, i) | (apart ? (pair & kPair) << kApart : 0);
}
template <Kind kind, int i>
__device__ inline uint32_t take_pair(uint32_t word) {
  constexpr bool apart = i == 3 && kind == Kind::mxfp4;
  const uint32_t pair = (word >> sign_bit(kind, i) & kPair) << 3;
  return pair | (word >> size_bit(kind, i) & (apart ? 6 : 7) * kPair) | (apart ? word >> kApart & kPair : 0);
}

template <Kind kind>
__device__ inline Words pack_codes(const Codes& upper, const Codes& lower) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t x = upper[i / 2] >> 16 * (i % 2), y = lower[i / 2] >> 16 * (i % 2);
    words[i] = place_pair<kind, 0>(to_pair(x)) | place_pair<kind, 1>(to_pair(y)) |
               place_pair<kind, 2>(to_pair(x >> 8)) | place_pair<kind, 3>(to_pair(y >> 8));
  }
  return words;
}

template <Kind kind>
__device__ inline void unpack_codes(const Words& words, Codes& upper, Codes& lower) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t first = words[2 * j], second = words[2 * j + 1];
    upper[j] = from_pair(take_pair<kind, 0>(first)) | from_pair(take_pair<kind, 2>(first)) << 8 |
               from_pair(take_pair<kind, 0>(second)) << 16 | from_pair(take_pair<kind, 2>(second)) << 24;
    lower[j] = from_pair(take_pair<kind, 1>(first)) | from_pair(take_pair<kind, 3>(first)) << 8 |
               from_pair(take_pair<kind, 1>(second)) << 16 | from_pair(take_pair<kind, 3>(second)) << 24;
  }
}

// A row-major matrix of codes and scales.
struct Matrix {
  int rows, columns;
  int across;  // units in a row tile
  int units;
};

// Where this thread's part of its unit lies.
template <Kind kind>
struct Place {
  static constexpr int kGroup = kind == Kind::nvfp4 ? 16 : 32;  // columns of a scale
  static constexpr int kScaleLanes = kGroup / kLaneColumns;     // neighbouring lanes that share one
  int unit, lane, row, column, columns;
  bool upper, lower;  // whether rows g and g + 8 exist

  __device__ explicit Place(const Matrix& matrix) : columns(matrix.columns) {
    lane = threadIdx.x % kWarp;
    unit = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
    row = unit / matrix.across * kUnitRows + lane / 4;
    column = unit % matrix.across * kUnitColumns + lane % 4 * kLaneColumns;
    upper = row < matrix.rows, lower = row + 8 < matrix.rows;
  }

  __device__ bool exists(int piece) const { return column + piece * kPieceColumns < columns; }
  // Row g: 16 codes of a piece, and their scale. From row g to row g + 8.
  __device__ int64_t codes(int piece) const { return (int64_t(row) * columns + column + piece * kPieceColumns) / 2; }
  __device__ int64_t scale(int piece) const {
    return int64_t(row) * (columns / kGroup) + (column + piece * kPieceColumns) / kGroup;
  }
  __device__ int64_t codes_below() const { return int64_t(columns) * 4; }
  __device__ int64_t scale_below() const { return int64_t(columns / kGroup) * 8; }
  // Packed: the words of a piece, and the scales of all pieces, which one of the lanes that share them moves.
  __device__ int64_t words(int piece) const {
    return int64_t(unit) * unit_bytes(kind) + piece * kPieceBytes + lane * int(sizeof(Words));
  }
  __device__ int64_t packed_scales() const {
    return int64_t(unit) * unit_bytes(kind) + kPieces * kPieceBytes + lane / kScaleLanes * 8;
  }
  __device__ bool moves_scales() const { return lane % kScaleLanes == 0; }
};

template <int N>
__device__ inline Vector<uint32_t, N> load_words(const uint8_t* from) {
  return load_vector<N>(reinterpret_cast<const uint32_t*>(from));
}
template <int N>
__device__ inline void store_words(uint8_t* to, const Vector<uint32_t, N>& words) {
  store_vector(reinterpret_cast<uint32_t*>(to), words);
}

template <Kind kind>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const uint8_t* __restrict__ codes, const uint8_t* __restrict__ scales,
                       uint8_t* __restrict__ data, Matrix matrix) {
  const Place<kind> at(matrix);
  if (at.unit >= matrix.units) return;
  Codes upper[kPieces], lower[kPieces];
  uint32_t scale[2 * kPieces];
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
    const bool is_upper = at.upper && at.exists(q), is_lower = at.lower && at.exists(q);
    upper[q] = is_upper ? load_words<2>(codes + at.codes(q)) : Codes{0, 0};
    lower[q] = is_lower ? load_words<2>(codes + at.codes(q) + at.codes_below()) : Codes{0, 0};
    scale[2 * q] = is_upper ? scales[at.scale(q)] : 0;
    scale[2 * q + 1] = is_lower ? scales[at.scale(q) + at.scale_below()] : 0;
  }
#pragma unroll
  for (int q = 0; q < kPieces; ++q) store_words(data + at.words(q), pack_codes<kind>(upper[q], lower[q]));
  Vector<uint32_t, 2> bytes;
#pragma unroll
  for (int j = 0; j < 2; ++j)
    bytes[j] = scale[4 * j] | scale[4 * j + 1] << 8 | scale[4 * j + 2] << 16 | scale[4 * j + 3] << 24;
  if (at.moves_scales()) store_words(data + at.packed_scales(), bytes);
}

template <Kind kind>
__global__ void __launch_bounds__(kThreads)
    unpack_weight_kernel(const uint8_t* __restrict__ data, uint8_t* __restrict__ codes, uint8_t* __restrict__ scales,
                         Matrix matrix) {
  const Place<kind> at(matrix);
  if (at.unit >= matrix.units) return;
  Words words[kPieces];
#pragma unroll
  for (int q = 0; q < kPieces; ++q) words[q] = load_words<4>(data + at.words(q));
  const auto bytes = load_words<2>(data + at.packed_scales());
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
    if (!at.exists(q)) return;
    Codes upper, lower;
    unpack_codes<kind>(words[q], upper, lower);
    const uint32_t scale = bytes[q / 2] >> 16 * (q % 2);
    if (at.upper) {
      store_words(codes + at.codes(q), upper);
      if (at.moves_scales()) scales[at.scale(q)] = uint8_t(scale);
    }
    if (at.lower) {
      store_words(codes + at.codes(q) + at.codes_below(), lower);
      if (at.moves_scales()) scales[at.scale(q) + at.scale_below()] = uint8_t(scale >> 8);
    }
  }
}

// `start(kind, matrix, grid)`, the kind a constant that the type of the scales tells.
template <class Start>
cudaError_t for_kind(const uint8_t* codes, Type scales, const uint8_t* data, int64_t rows, int64_t columns,
                     Start&& start) {
  if (reinterpret_cast<uintptr_t>(codes) % sizeof(Codes) || reinterpret_cast<uintptr_t>(data) % sizeof(Words))
    return cudaErrorMisalignedAddress;
  const int64_t across = ceil_div(columns, kUnitColumns), units = ceil_div(rows, kUnitRows) * across;
  if (rows > kMost || columns > kMost || units > kMost) return cudaErrorInvalidValue;
  const Matrix matrix = {int(rows), int(columns), int(across), int(units)};
  const Grid grid = {ceil_div(units, kThreads / kWarp), kThreads};
  if (scales == Type::e4m3 && columns % 16 == 0) return start(Constant<Kind::nvfp4>(), matrix, grid);
  if (scales == Type::e8m0 && columns % 32 == 0) return start(Constant<Kind::mxfp4>(), matrix, grid);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t pack_weight(const uint8_t* codes, In scales, uint8_t* data, int64_t rows, int64_t columns,
                        cudaStream_t stream) {
  return for_kind(codes, scales.type, data, rows, columns, [&](auto kind, const Matrix& matrix, const Grid& grid) {
    const auto* from = static_cast<const uint8_t*>(scales.data);
    return launch(pack_weight_kernel<kind.value>, grid, stream, codes, from, data, matrix);
  });
}

cudaError_t unpack_weight(const uint8_t* data, uint8_t* codes, Out scales, int64_t rows, int64_t columns,
                          cudaStream_t stream) {
  return for_kind(codes, scales.type, data, rows, columns, [&](auto kind, const Matrix& matrix, const Grid& grid) {
    auto* to = static_cast<uint8_t*>(scales.data);
    return launch(unpack_weight_kernel<kind.value>, grid, stream, data, codes, to, matrix);
  });
}

}  // namespace dsv4
