// What attend_step reads and multiplies: a query's list of rows, tiles of it in shared memory, and the products of q
// and of P with a tile on the tensor cores. See attend_step.cu.
#pragma once

#include "attention/prefill.cuh"
#include "common/barrier.cuh"
#include "common/mma.cuh"
#include "gemm/units.cuh"

namespace dsv4 {

constexpr int kWarps = 16, kThreads = kWarps * kWarp;
constexpr int kQuads = kWarps / 4;            // of warps
constexpr int kHeads = 16;                    // of a cluster
constexpr int kMySteps = kWidth / 16 / 4;     // MMA steps of a warp in S: of a quarter of the columns
constexpr int kColumns = kWidth / kWarps;     // of O, a warp's
constexpr int kBlockColumns = 64;             // columns that share a scale
constexpr int kCodes = 448;                   // of a record; then 64 columns in bf16, then
constexpr int kScalesAt = kCodes + 2 * 2 * kRotaryPairs;
constexpr int kFactorPitch = 80;              // bytes of the factors of a tile that one t of a quad of lanes reads
constexpr int kFactorBytes = 4 * kFactorPitch + 16;  // of a block, and the scale that they are relative to

template <bool records>
struct Form {
  static constexpr int kRow = records ? 592 : kRowBytes;  // bytes of a row of a table
  static constexpr int kPitch = records ? 592 : kRowBytes + 16;
  static constexpr int kPieces = kRow / 16;
  static constexpr int kRows = records ? 128 : 64;        // of a tile, at most
  static constexpr int kQueryPitch = kRowBytes + (records ? 32 : 16);  // of q in shared memory
  static constexpr int kGroups = kRows / 8 / kQuads;      // groups of eight rows, a quad's
};

struct Step {
  const bf16* q;                            // [T, H, 512]
  const uint8_t *window_rows, *compressed;  // [R, row], [C, row] or null
  const float *sink, *inv_freq;             // [H], [32]
  const int64_t* positions;                 // [T]
  const int32_t* selected;                  // [T, I] or null
  bf16* out;                                // [T, H, 512]
  int heads, head_tiles, window, ring, entries, ratio, top_k;
  int split_bits;                           // a cluster has 2^split_bits blocks
  int rows, tiles;                          // rows of a tile, at most, a multiple of 16; tiles in shared memory: 1 or 2
};

// This thread's place: lane 4 g + t of a warp; the warp is one of the four of a quad, and has that quarter of the
// columns.
struct Place {
  int warp, lane, g, t, quad, quarter;
};

__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}
// Two of the four codes of a word as fp16. The instruction reads either half of a register; a shift would be one more.
__device__ inline uint32_t low_to_f16(uint32_t codes) { return e4m3_to_f16(uint16_t(codes)); }
__device__ inline uint32_t high_to_f16(uint32_t codes) {
  uint32_t pair;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, high;\n"
      "}"
      : "=r"(pair)
      : "r"(codes));
  return pair;
}
// 2^(byte - 127) of a scale's byte; 0 of 0.
__device__ inline float scale_of(uint32_t byte) { return __uint_as_float(byte << 23); }

// The list of one query.
struct Rows {
  const Step& c;
  const int32_t* selected;  // in shared memory, or null
  int oldest, in_window;    // slot of the window's first row, and its number of rows
};

// Rows first .. first + count - 1 of the list are on their way to a tile: neighbours of a table in one bulk copy,
// counted by `barrier`, chosen entries by cp.async, all threads'.
template <class F>
__device__ inline void copy_tile(const Rows& rows, int first, int count, uint32_t tile, uint32_t barrier,
                                 const Place& p) {
  const Step& c = rows.c;
  const int in_window = min(max(rows.in_window - first, 0), count);
  const bool scattered = rows.selected != nullptr;
  if (p.warp == kWarps - 2) {  // in O one of the two with least to do
    if (p.lane == 0) expect_bytes(barrier, (scattered ? in_window : count) * F::kRow);
    auto copy = [&](const uint8_t* from, int to, int n) {
      if (F::kPitch == F::kRow) {
        if (p.lane == 0 && n > 0) copy_bulk(tile + to * F::kPitch, from, n * F::kRow, barrier);
      } else {
        for (int i = p.lane; i < n; i += kWarp) {
          copy_bulk(tile + (to + i) * F::kPitch, from + i * F::kRow, F::kRow, barrier);
        }
      }
    };
    if (in_window > 0) {
      const int slot = (rows.oldest + first) % c.ring, until_end = min(in_window, c.ring - slot);
      copy(c.window_rows + slot * F::kRow, 0, until_end);
      copy(c.window_rows, until_end, in_window - until_end);
    }
    if (!scattered) {
      const int entry = first + in_window - rows.in_window;
      copy(c.compressed + int64_t(entry) * F::kRow, in_window, count - in_window);
    }
  }
  if (scattered) {
    const int32_t* entries = rows.selected + (first + in_window - rows.in_window);
    const int pieces = (count - in_window) * F::kPieces;
    for (int i = threadIdx.x; i < pieces; i += kThreads) {
      const int row = i / F::kPieces, piece = i - row * F::kPieces;
      const uint8_t* from = c.compressed + int64_t(entries[row]) * F::kRow + 16 * piece;
      copy_async_piece(tile + (in_window + row) * F::kPitch + 16 * piece, from);
    }
  }
}

// q of the warp's head, on the way to shared memory. For records the columns of codes become fp16, and all are
// multiplied by a power of two, whose inverse is kept.
template <bool records>
struct Query {
  uint4 piece[2];

  __device__ Query(const bf16* q, int heads, const Place& p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      piece[i] = {};
      if (p.warp < heads) piece[i] = load_piece(q + p.warp * kWidth + 8 * (p.lane + i * kWarp));
    }
  }
  __device__ void store(unsigned char* to, float* inverse, const Place& p) const {
    float factor = 1.0f;
    if constexpr (records) {
      const TokenScale scale(__reduce_max_sync(kFullMask, max(largest_bits(piece[0]), largest_bits(piece[1]))));
      factor = scale.factor;
      if (p.lane == 0) inverse[p.warp] = scale.inverse;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * (p.lane + i * kWarp);
      uint4 v = piece[i];
      if constexpr (records) v = column < kCodes ? scale_to_f16(v, factor) : scaled(v, factor);
      *reinterpret_cast<uint4*>(to + p.warp * Form<records>::kQueryPitch + 2 * column) = v;
    }
  }
  static __device__ uint4 scaled(const uint4& v, float factor) {
    auto multiply = [&](uint32_t pair) {
      return pack_bf16(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
    };
    return {multiply(v.x), multiply(v.y), multiply(v.z), multiply(v.w)};
  }
};
static_assert(kWarps == kHeads);

// The warp's quarter of q as operands, a[i] of step i. Lane 4 g + t multiplies codes 4 t .. + 3 of the 16 of a step.
template <bool records>
__device__ inline void load_queries(uint32_t (&a)[kMySteps][4], uint32_t queries, const Place& p) {
  constexpr int kPitch = Form<records>::kQueryPitch;
  const uint32_t at = queries + p.quarter * kRowBytes / 4;
  const uint32_t of_codes = at + p.g * kPitch + 8 * p.t;
  const uint32_t of_bf16 = at + p.lane % 16 * kPitch + p.lane / 16 * 16;
#pragma unroll
  for (int i = 0; i < kMySteps; ++i) {
    if (records && (i < kMySteps / 2 || p.quarter < 3)) {
      const uint2 upper = read_shared_8(of_codes + 32 * i), lower = read_shared_8(of_codes + 8 * kPitch + 32 * i);
      a[i][0] = upper.x, a[i][2] = upper.y, a[i][1] = lower.x, a[i][3] = lower.y;
    } else {
      load_matrices(a[i], of_bf16 + 32 * i);
    }
  }
}

// s = q times the eight rows of a tile from `tile` on, in the warp's quarter of the columns: two blocks of 64, each a
// chain of MMAs of its own.
template <bool records>
__device__ inline void multiply_scores(float (&s)[4], const uint32_t (&a)[kMySteps][4], const unsigned char* tile,
                                       const Place& p) {
  constexpr int kPitch = Form<records>::kPitch, kHalf = kMySteps / 2;
  const uint32_t at = uint32_t(__cvta_generic_to_shared(tile)) + p.lane % 8 * kPitch + p.lane / 8 * 16;
  float d[2][4] = {};
  auto multiply_bf16 = [&](int block, int column) {  // 64 columns from `column` bytes on
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) {
      const uint32_t(&low)[4] = a[kHalf * block + i], (&high)[4] = a[kHalf * block + i + 1];
      uint32_t b[4];
      load_matrices(b, at + column + 32 * i);
      mma_bf16(d[block], low[0], low[1], low[2], low[3], b[0], b[1]);
      mma_bf16(d[block], high[0], high[1], high[2], high[3], b[2], b[3]);
    }
  };
  if constexpr (records) {
    const int column = 2 * kBlockColumns * p.quarter;
    uint32_t first[4], second[4];
    load_matrices(first, at + column);
    load_matrices(second, at + column + kBlockColumns);  // for the last quarter bf16, not used
    auto multiply_codes = [&](int block, int i, uint32_t word) {
      const uint32_t(&q)[4] = a[kHalf * block + i];
      mma_f16(d[block], q[0], q[1], q[2], q[3], low_to_f16(word), high_to_f16(word));
    };
    if (p.quarter < 3) {
#pragma unroll
      for (int i = 0; i < kHalf; ++i) multiply_codes(0, i, first[i]), multiply_codes(1, i, second[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kHalf; ++i) multiply_codes(0, i, first[i]);
      multiply_bf16(1, kCodes);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const unsigned char* scales = tile + (2 * p.t + row) * kPitch + kScalesAt + 2 * p.quarter;
      const float of_first = scale_of(scales[0]), of_second = p.quarter < 3 ? scale_of(scales[1]) : 1.0f;
#pragma unroll
      for (int j = row; j < 4; j += 2) s[j] = fmaf(d[0][j], of_first, d[1][j] * of_second);
    }
  } else {
#pragma unroll
    for (int block = 0; block < 2; ++block) multiply_bf16(block, p.quarter * kRowBytes / 4 + 2 * kBlockColumns * block);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = d[0][j] + d[1][j];
  }
}

// Of a block of columns: the byte of the largest scale of all rows so far, behind the factors of a tile.
__device__ inline int& largest_of(unsigned char* factors) {
  return *reinterpret_cast<int*>(factors + 4 * kFactorPitch);
}

// The powers of two of `block` of a tile's rows, relative to the largest so far: pairs of fp16 in the order of
// multiply_values. One warp.
__device__ inline void prepare_factors(const unsigned char* tile, int padded, unsigned char* factors, int block,
                                       const Place& p) {
  constexpr int kPitch = Form<true>::kPitch, kEach = Form<true>::kRows / kWarp;
  int scale[kEach], most = largest_of(factors);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = p.lane + i * kWarp;
    scale[i] = row < padded ? tile[row * kPitch + kScalesAt + block] : 0;
    most = max(most, scale[i]);
  }
  most = __reduce_max_sync(kFullMask, most);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = p.lane + i * kWarp, less = most - scale[i];
    const uint32_t bits = less < 15 ? (15 - less) << 10 : 0x400u >> min(less - 14, 31);  // 2^-less
    const int place = row % 8 / 2 * kFactorPitch + row / 16 * 8 + row % 16 / 8 * 4 + row % 2 * 2;
    *reinterpret_cast<uint16_t*>(factors + place) = uint16_t(bits);
  }
  if (p.lane == 0) largest_of(factors) = most;
}

// o += P times columns 32 warp .. + 31 of the tile. Sums of codes: o[2 c] has columns 16 c + 4 t and + 2, o[2 c + 1]
// the ones behind them; of bf16: o[n] has 8 n + 2 t, + 1. Of each, values 0, 1 are head g's and 2, 3 head (g + 8)'s.
template <bool codes, class F>
__device__ inline void multiply_values(float (&o)[4][4], uint32_t tile, uint32_t probs, const unsigned char* factors,
                                       int padded, const Place& p) {
  constexpr int kProbPitch = 2 * F::kRows + 16;
  const uint32_t probs_at = probs + p.lane % 16 * kProbPitch + p.lane / 16 * 16;
  const int first = kColumns * p.warp;
  const int column_at = codes ? first : F::kRow == kRowBytes ? 2 * first : kCodes + 2 * (first - kCodes);
  const uint32_t at = tile + p.lane % 16 * F::kPitch + column_at + p.lane / 16 * 16;
#pragma unroll(codes ? 2 : 1)
  for (int step = 0; step < padded / 16; ++step) {
    uint32_t a[4], b[4];
    load_matrices(a, probs_at + 32 * step);
    if constexpr (codes) {
      load_transposed(b, at + step * 16 * F::kPitch);
      const uint2 factor = *reinterpret_cast<const uint2*>(factors + p.t * kFactorPitch + 8 * step);
      a[0] = multiply_f16(a[0], factor.x), a[1] = multiply_f16(a[1], factor.x);
      a[2] = multiply_f16(a[2], factor.y), a[3] = multiply_f16(a[3], factor.y);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = __byte_perm(b[i], 0, 0x3120);  // two rows' first, two rows' second column
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_f16(o[2 * i], a[0], a[1], a[2], a[3], low_to_f16(b[2 * i]), low_to_f16(b[2 * i + 1]));
        mma_f16(o[2 * i + 1], a[0], a[1], a[2], a[3], high_to_f16(b[2 * i]), high_to_f16(b[2 * i + 1]));
      }
    } else {
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        load_transposed(b, at + step * 16 * F::kPitch + 16 * n);
        mma_bf16(o[n], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_bf16(o[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  }
}

}  // namespace dsv4
