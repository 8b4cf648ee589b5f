// attend_step of ops/attention/reference.py for bf16 queries, one launch: window ring and compressed entries as the cache
// stores them, KV records or bf16 rows.
//
// A query's list is the rows of its window, oldest first, and then its compressed entries, ascending. A cluster of 8 or 16
// blocks takes one query and 16 of its heads; each block an equal, contiguous part of the list, whose true length is known
// only here, from the position and, where entries are selected, from the number of choices. So the order of every sum
// depends on shapes and on this query's own list: a query has the same bits beside any other seven.
//
// A block walks its part in tiles of rows, copied by cp.async as they are stored while the tile before is used; keys are
// values, so a tile serves both products, 16 heads being the rows of the tensor cores' A operand.
//   S: the warps are four pairs; a pair takes every fourth group of eight rows, either warp of it half of the columns,
//      whose part of q it holds in registers; partial scores meet in shared memory.
//   P: the online softmax in fp32, maxima through shared memory. P stands there as fp16, shifted by 2^15, and as bf16.
//   O: warp w has columns 64 w .. + 63 of the output, 32 sums a lane, and reads the tile transposed.
// A record's 448 codes (e4m3) become fp16 in one instruction a pair when they are read: exact. q as fp16 is exact as well
// (gemm/units.cuh TokenScale). A block of 64 columns has one power of two a row: S takes it after four MMA steps; for O,
// where warp w < 7 has exactly block w, it is multiplied to P in fp16, relative to the largest so far, by which sums are
// scaled as by the maximum of the softmax. The last 64 columns, and bf16 rows, are multiplied as bf16. No row of the tile
// shares banks with the next seven: 592 and 1040 bytes are odd multiples of 16.
// Behind the end of a part rows are zeros and scores -infinity; rows that the query does not see are never read.
//
// At the end every block has maximum, denominator and 16 x 512 sums of its part. Block r of the cluster finishes heads
// r 16 / splits ..: all send it their sums into its shared memory, st.async counted by its barrier; it adds them weighted,
// in the order of the parts, with the sink once in the denominator, turns the last 64 columns back and stores.
//
// Floor, one query of Flash on an H200: 640 rows of 592 bytes, q and out: 0.5 MB, 0.1 us; 8,320 rows: 4.9 MB, 1.1 us,
// and 1.1 GFLOP on the 64 multiprocessors of four clusters of 16, 3.8 us by mma.sync. Expected 4 us at 640 rows: launch
// 1.0, positions and choices 0.5, rows 0.7, products 0.5, exchange 0.9, output 0.3; 9 us at 8,320: of five tiles of 104
// rows, the first's latency 0.9, then 1.1 each by the tensor cores and three barriers.
// sass attend_step_kernel: HMMA.16816.F32, LDSM.16.M88.4, LDSM.16.MT88.4, LDGSTS.E.BYPASS.LTC128B.128
#include "attention/prefill.cuh"
#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/overlap.cuh"
#include "gemm/units.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kPairs = kWarps / 2;
constexpr int kHeads = 16;                    // of a cluster
constexpr int kMySteps = kWidth / 16 / 2;     // MMA steps of a warp: of half the columns
constexpr int kColumns = kWidth / kWarps;     // of O, a warp's
constexpr int kCodes = 448;                   // of a record; then 64 columns in bf16, then
constexpr int kScalesAt = kCodes + 2 * 2 * kRotaryPairs;
constexpr int kShift = 15;                    // P is multiplied by 2^15: exact in fp16 down to 2^-31 of the largest
constexpr int kMaxStep = 8;
constexpr int kBatch = 4;                      // choices that a thread has under way
constexpr int kLongList = 2048;               // rows from which on a cluster has 16 blocks
constexpr int kMaxShared = 227 * 1024;
constexpr int kFactorPitch = 80;              // bytes of the factors of a tile that one t of a quad reads

template <bool records>
struct Form {
  static constexpr int kRow = records ? 592 : kRowBytes;  // bytes of a row of a table
  static constexpr int kPitch = records ? 592 : kRowBytes + 16;
  static constexpr int kPieces = kRow / 16;
  static constexpr int kRows = records ? 128 : 64;        // of a tile, at most
  static constexpr int kQueryPitch = kRowBytes + (records ? 32 : 16);  // of q in shared memory
  static constexpr int kGroups = kRows / 8 / kPairs;      // groups of eight rows, a pair's
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

// Dynamic shared memory, in bytes: at fixed places, then the tiles, then the choices of the query. Sums that arrive take the
// place of q, which all have read before the cluster's barrier; partial scores take that of P.
constexpr int kReceivedAt = 0, kQueriesAt = 0;
constexpr int kStatsAt = kReceivedAt + kHeads * kWidth * 4;
constexpr int kFactorsAt = kStatsAt + kHeads * 16;
constexpr int kMaximaAt = kFactorsAt + kWarps * 4 * kFactorPitch;
constexpr int kSumsAt = kMaximaAt + kHeads * kWarps * 4;
constexpr int kInverseAt = kSumsAt + kHeads * kWarps * 4;
constexpr int kAnglesAt = kInverseAt + kHeads * 4;
constexpr int kBarrierAt = kAnglesAt + kRotaryPairs * 8;
constexpr int kChosenAt = kBarrierAt + 8;
constexpr int kProbsAt = kBarrierAt + 16;
template <bool records>
struct Tail {
  using F = Form<records>;
  static constexpr int kProbPitch = 2 * F::kRows + 16, kProbBytes = kHeads * kProbPitch;  // of one P
  static constexpr int kPartial = kWarps * F::kGroups * kWarp * 16;
  static constexpr int kTilesAt = kProbsAt + (kPartial > 2 * kProbBytes ? kPartial : 2 * kProbBytes);

  static __host__ __device__ int selected(const Step& c) { return kTilesAt + c.tiles * c.rows * F::kPitch; }
};
static_assert(kHeads * Form<true>::kQueryPitch <= kHeads * kWidth * 4 && kProbsAt % 16 == 0);

// This thread's place: lane 4 g + t of a warp, which is one half of a pair.
struct Place {
  int warp, lane, g, t, pair, half;
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
// Both warps of a pair have arrived, and see what the other wrote.
__device__ inline void sync_pair(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(1 + pair) : "memory"); }

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
  const int32_t* selected;  // in shared memory
  int oldest, in_window;    // slot of the window's first row, and its number of rows

  template <class F>
  __device__ const uint8_t* at(int e) const {
    if (e < in_window) {
      const int slot = oldest + e;
      return c.window_rows + (slot < c.ring ? slot : slot - c.ring) * F::kRow;
    }
    const int entry = e - in_window;
    return c.compressed + int64_t(c.selected != nullptr ? selected[entry] : entry) * F::kRow;
  }
};

// Rows first .. first + count - 1 of the list become a tile, with zeros behind them up to `padded`, a multiple of 16. A row
// is one warp's, whose lanes know the addresses of its rows.
template <class F>
__device__ inline void copy_tile(const Rows& rows, int first, int count, int padded, uint32_t tile, const Place& p) {
  const int mine = p.warp + kWarps * p.lane, each = padded / kWarps;
  const uint8_t* row = mine < count ? rows.at<F>(first + mine) : nullptr;
  auto copy = [&](int i, int piece) {
    const auto address = __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(row), i);
    const uint8_t* from = address != 0 ? reinterpret_cast<const uint8_t*>(address) + 16 * piece : rows.c.window_rows;
    const uint32_t to = tile + (p.warp + kWarps * i) * F::kPitch + 16 * piece;
    if (i < each) copy_async_piece(to, from, address != 0 ? 16 : 0);
  };
#pragma unroll 4
  for (int i = 0; i < each; ++i) {
#pragma unroll
    for (int piece = 0; piece + kWarp <= F::kPieces; piece += kWarp) copy(i, piece + p.lane);
  }
  constexpr int kLeft = F::kPieces % kWarp;  // of every row; several rows' together
  if constexpr (kLeft > 0) {
    for (int base = 0; base < each * kLeft; base += kWarp) {
      const int i = (base + p.lane) / kLeft;
      copy(i, F::kPieces - kLeft + base + p.lane - i * kLeft);
    }
  }
}

// q of two heads of the 16, a warp's, on the way to shared memory. For records the columns of codes become fp16, and all
// are multiplied by a power of two a head, whose inverse is kept.
template <bool records>
struct Queries {
  uint4 piece[2][2];

  __device__ Queries(const bf16* q, int heads, const Place& p) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = 2 * p.warp + r;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        piece[r][i] = {};
        if (head < heads) piece[r][i] = load_piece(q + head * kWidth + 8 * (p.lane + i * kWarp));
      }
    }
  }
  __device__ void store(unsigned char* to, float* inverse, const Place& p) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = 2 * p.warp + r;
      float factor = 1.0f;
      if constexpr (records) {
        const TokenScale scale(__reduce_max_sync(kFullMask, max(largest_bits(piece[r][0]), largest_bits(piece[r][1]))));
        factor = scale.factor;
        if (p.lane == 0) inverse[head] = scale.inverse;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * (p.lane + i * kWarp);
        uint4 v = piece[r][i];
        if constexpr (records) v = column < kCodes ? scale_to_f16(v, factor) : scaled(v, factor);
        *reinterpret_cast<uint4*>(to + head * Form<records>::kQueryPitch + 2 * column) = v;
      }
    }
  }
  static __device__ uint4 scaled(const uint4& v, float factor) {
    auto multiply = [&](uint32_t pair) {
      return pack_bf16(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
    };
    return {multiply(v.x), multiply(v.y), multiply(v.z), multiply(v.w)};
  }
};

// A warp's half of q as operands, a[i] of step i. Lane 4 g + t multiplies codes 4 t .. + 3 of the 16 of a step.
template <bool records>
__device__ inline void load_queries(uint32_t (&a)[kMySteps][4], uint32_t queries, const Place& p) {
  constexpr int kPitch = Form<records>::kQueryPitch;
  const uint32_t at = queries + p.half * kWidth;
  const uint32_t of_codes = at + p.g * kPitch + 8 * p.t;
  const uint32_t of_bf16 = at + p.lane % 16 * kPitch + p.lane / 16 * 16;
#pragma unroll
  for (int i = 0; i < kMySteps; ++i) {
    if (records && (i < kMySteps - 4 || p.half == 0)) {
      const uint2 upper = read_shared_8(of_codes + 32 * i), lower = read_shared_8(of_codes + 8 * kPitch + 32 * i);
      a[i][0] = upper.x, a[i][2] = upper.y, a[i][1] = lower.x, a[i][3] = lower.y;
    } else {
      load_matrices(a[i], of_bf16 + 32 * i);
    }
  }
}

// s = q times eight rows of a tile in this warp's half of the columns; `tile` is where the first of them begins.
template <bool records>
__device__ inline void multiply_scores(float (&s)[4], const uint32_t (&a)[kMySteps][4], const unsigned char* tile,
                                       const Place& p) {
  constexpr int kPitch = Form<records>::kPitch;
  const uint32_t at = uint32_t(__cvta_generic_to_shared(tile)) + p.lane % 8 * kPitch + p.lane / 8 * 16;
  s[0] = s[1] = s[2] = s[3] = 0.0f;
  auto multiply_bf16_block = [&](uint32_t from, int first) {  // 64 columns
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t(&low)[4] = a[first + i], (&high)[4] = a[first + i + 1];
      uint32_t b[4];
      load_matrices(b, from + 32 * i);
      mma_bf16(s, low[0], low[1], low[2], low[3], b[0], b[1]);
      mma_bf16(s, high[0], high[1], high[2], high[3], b[2], b[3]);
    }
  };
  if constexpr (records) {
    const unsigned char* scales_at = tile + 2 * p.t * kPitch + kScalesAt + 4 * p.half;
    const uint32_t scales[2] = {*reinterpret_cast<const uint32_t*>(scales_at),
                                *reinterpret_cast<const uint32_t*>(scales_at + kPitch)};
    auto multiply_codes = [&](int block) {
      uint32_t codes[4];
      load_matrices(codes, at + p.half * kWidth / 2 + 64 * block);
      float d[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t(&q)[4] = a[4 * block + i];
        mma_f16(d, q[0], q[1], q[2], q[3], low_to_f16(codes[i]), high_to_f16(codes[i]));
      }
      const float even = scale_of(scales[0] >> 8 * block & 0xff), odd = scale_of(scales[1] >> 8 * block & 0xff);
      s[0] = fmaf(d[0], even, s[0]), s[1] = fmaf(d[1], odd, s[1]);
      s[2] = fmaf(d[2], even, s[2]), s[3] = fmaf(d[3], odd, s[3]);
    };
#pragma unroll
    for (int block = 0; block < 3; ++block) multiply_codes(block);
    if (p.half == 0) {
      multiply_codes(3);
    } else {
      multiply_bf16_block(at + kCodes, kMySteps - 4);
    }
  } else {
#pragma unroll
    for (int block = 0; block < 4; ++block) multiply_bf16_block(at + p.half * kWidth + 128 * block, 4 * block);
  }
}

// The powers of two of block p.warp of a tile's rows, relative to the largest so far, as pairs of fp16 in the order of
// multiply_values. Returns by what sums so far are to be multiplied; `largest` is a scale's byte.
__device__ inline float prepare_factors(const unsigned char* tile, int padded, unsigned char* factors, int& largest,
                                        const Place& p) {
  constexpr int kPitch = Form<true>::kPitch, kEach = Form<true>::kRows / kWarp;
  int scale[kEach], most = largest;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = p.lane + i * kWarp;
    scale[i] = row < padded ? tile[row * kPitch + kScalesAt + p.warp] : 0;
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
  __syncwarp();
  const float by = scale_of(max(127 + largest - most, 0));
  largest = most;
  return by;
}

// o += P times columns 64 warp .. + 63 of the tile. Sums of codes: o[2 c] has columns 16 c + 4 t and + 2, o[2 c + 1] the
// ones behind them; of bf16: o[n] has 8 n + 2 t, + 1. Of each, values 0, 1 are head g's and 2, 3 head (g + 8)'s.
template <bool codes, class F>
__device__ inline void multiply_values(float (&o)[8][4], uint32_t tile, uint32_t probs, const unsigned char* factors,
                                       int padded, const Place& p) {
  constexpr int kProbPitch = 2 * F::kRows + 16;
  const uint32_t probs_at = probs + p.lane % 16 * kProbPitch + p.lane / 16 * 16;
  const int column_at = codes ? kColumns * p.warp : F::kRow == kRowBytes ? 2 * kColumns * p.warp : kCodes;
  const uint32_t at = tile + p.lane % 16 * F::kPitch + column_at + p.lane / 16 * 16;
#pragma unroll 2
  for (int step = 0; step < padded / 16; ++step) {
    uint32_t a[4], b[4];
    load_matrices(a, probs_at + 32 * step);
    if constexpr (codes) {
      const uint2 factor = *reinterpret_cast<const uint2*>(factors + p.t * kFactorPitch + 8 * step);
      a[0] = multiply_f16(a[0], factor.x), a[1] = multiply_f16(a[1], factor.x);
      a[2] = multiply_f16(a[2], factor.y), a[3] = multiply_f16(a[3], factor.y);
#pragma unroll
      for (int c = 0; c < 4; c += 2) {
        load_transposed(b, at + step * 16 * F::kPitch + 16 * c);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = __byte_perm(b[i], 0, 0x3120);  // two rows' first, two rows' second column
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_f16(o[2 * (c + i)], a[0], a[1], a[2], a[3], low_to_f16(b[2 * i]), low_to_f16(b[2 * i + 1]));
          mma_f16(o[2 * (c + i) + 1], a[0], a[1], a[2], a[3], high_to_f16(b[2 * i]), high_to_f16(b[2 * i + 1]));
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        load_transposed(b, at + step * 16 * F::kPitch + 16 * n);
        mma_bf16(o[n], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_bf16(o[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  }
}

// What a block knows of its part of the list when it has walked it.
struct Part {
  float o[8][4];   // as multiply_values leaves them
  float most[2];   // of heads g and g + 8: the largest score, in powers of two,
  float sum[2];    // and this lane's part of the sum of P
  int largest;     // scale's byte: sums of codes are of 2^(largest - 127)
};

// Scores of a tile, this lane's, to P in shared memory. x[i]: two rows x heads g, g + 8 of the own groups, -infinity where
// there is no row. Returns by what the sums of either head so far are to be multiplied.
template <bool records, int kOwn>
__device__ inline float2 store_probs(Part& part, float (&x)[kOwn][4], unsigned char* memory,
                                     int padded, bool last, const Place& p) {
  using L = Tail<records>;
  float* maxima = reinterpret_cast<float*>(memory + kMaximaAt);
  float* sums = reinterpret_cast<float*>(memory + kSumsAt);
  float top[2] = {-INFINITY, -INFINITY}, by[2];
#pragma unroll
  for (int i = 0; i < 4 * kOwn; ++i) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], x[i / 4][i % 4]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(top[r]);
    if (p.t == 0) maxima[(p.g + 8 * r) * kWarps + p.warp] = top[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float4* of_warps = reinterpret_cast<const float4*>(maxima + (p.g + 8 * r) * kWarps);
    const float4 low = of_warps[0], high = of_warps[1];
    const float in_low = fmaxf(fmaxf(low.x, low.y), fmaxf(low.z, low.w));
    const float in_high = fmaxf(fmaxf(high.x, high.y), fmaxf(high.z, high.w));
    top[r] = fmaxf(part.most[r], fmaxf(in_low, in_high));  // finite: a tile has a row
    by[r] = power_of_two(part.most[r] - top[r]);
    part.most[r] = top[r];
    part.sum[r] *= by[r];
    const uint32_t row_at = (p.g + 8 * r) * L::kProbPitch;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = 8 * (p.pair + kPairs * (2 * i + p.half)) + 2 * p.t;
      const float first = power_of_two(x[i][2 * r] - (top[r] - kShift));
      const float second = power_of_two(x[i][2 * r + 1] - (top[r] - kShift));
      part.sum[r] += first + second;
      if (row >= padded) continue;
      unsigned char* to = memory + kProbsAt + row_at + 2 * row;
      if (records) {
        *reinterpret_cast<uint32_t*>(to) = as_word(__floats2half2_rn(first, second));
        to += L::kProbBytes;
      }
      *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
    }
    if (last) {
      const float sum = quad_sum(part.sum[r]);
      if (p.t == 0) sums[(p.g + 8 * r) * kWarps + p.warp] = sum;
    }
  }
  __syncthreads();
  return make_float2(by[0], by[1]);
}

// One tile of `count` rows: scores, P, sums.
template <bool records>
__device__ inline void use_tile(Part& part, const uint32_t (&a)[kMySteps][4], unsigned char* memory,
                                unsigned char* tile, int count, bool last, const Place& p) {
  using F = Form<records>;
  constexpr int kOwn = F::kGroups / 2;  // groups whose scores a warp finishes: every other one of its pair's
  const int padded = (count + 15) / 16 * 16;
  const bool codes = records && p.warp < kCodes / kColumns;
  unsigned char* factors = memory + kFactorsAt + p.warp * 4 * kFactorPitch;
  const float rescale = codes ? prepare_factors(tile, padded, factors, part.largest, p) : 1.0f;

  float4* partial = reinterpret_cast<float4*>(memory + kProbsAt) + p.lane;  // [warp, group, lane]
#pragma unroll 1
  for (int i = 0; i < F::kGroups && 8 * (p.pair + kPairs * i) < count; ++i) {
    float s[4];
    multiply_scores<records>(s, a, tile + 8 * (p.pair + kPairs * i) * F::kPitch, p);
    partial[(p.warp * F::kGroups + i) * kWarp] = make_float4(s[0], s[1], s[2], s[3]);
  }
  sync_pair(p.pair);
  float factor[2] = {kScale, kScale};
  if (records) {
    const float* inverse = reinterpret_cast<const float*>(memory + kInverseAt);
    factor[0] *= inverse[p.g], factor[1] *= inverse[p.g + 8];
  }
  float x[kOwn][4];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int group = 2 * i + p.half, row = 8 * (p.pair + kPairs * group) + 2 * p.t;
    const float4 first = partial[(2 * p.pair * F::kGroups + group) * kWarp];
    const float4 second = partial[((2 * p.pair + 1) * F::kGroups + group) * kWarp];
    const bool even = row < count, odd = row + 1 < count;
    x[i][0] = even ? (first.x + second.x) * factor[0] : -INFINITY;
    x[i][1] = odd ? (first.y + second.y) * factor[0] : -INFINITY;
    x[i][2] = even ? (first.z + second.z) * factor[1] : -INFINITY;
    x[i][3] = odd ? (first.w + second.w) * factor[1] : -INFINITY;
  }
  const float2 by = store_probs<records>(part, x, memory, padded, last, p);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    part.o[n][0] *= by.x * rescale, part.o[n][1] *= by.x * rescale;
    part.o[n][2] *= by.y * rescale, part.o[n][3] *= by.y * rescale;
  }
  const uint32_t tile_at = uint32_t(__cvta_generic_to_shared(tile));
  const uint32_t probs = uint32_t(__cvta_generic_to_shared(memory)) + kProbsAt;
  if (codes) {
    multiply_values<true, F>(part.o, tile_at, probs, factors, padded, p);
  } else {
    const uint32_t in_bf16 = probs + (records ? Tail<records>::kProbBytes : 0);
    multiply_values<false, F>(part.o, tile_at, in_bf16, factors, padded, p);
  }
}

// A block's sums, maxima and denominators to the blocks that finish their heads.
template <bool records>
__device__ inline void send_part(const Part& part, const float* sums, bool empty, uint32_t shared, int rank,
                                 int split_bits, const Place& p) {
  const int heads = kHeads >> split_bits, odd = p.t % 2;
  const uint32_t barrier = shared + kBarrierAt;
  auto place_of = [&](int head) { return rank * heads + head % heads; };
  if (p.warp == 0 && p.t < 2) {
    const int head = p.g + 8 * p.t;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[head * kWarps + w];
    const float4 v = make_float4(p.t == 0 ? part.most[0] : part.most[1], empty ? 0.0f : sum, 0.0f, 0.0f);
    store_remote_counted(shared + kStatsAt + 16 * place_of(head), barrier, head / heads, v);
  }
  const bool codes = records && p.warp < kCodes / kColumns;
  const float factor = codes ? scale_of(part.largest) : 1.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int head = p.g + 8 * r;
    const uint32_t row = shared + kReceivedAt + (place_of(head) * kWidth + kColumns * p.warp) * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float upper[2] = {part.o[2 * c][2 * r], part.o[2 * c][2 * r + 1]};
      const float lower[2] = {part.o[2 * c + 1][2 * r], part.o[2 * c + 1][2 * r + 1]};
      float4 v = make_float4(upper[0] * factor, lower[0] * factor, upper[1] * factor, lower[1] * factor);
      int column = 16 * c + 4 * p.t;
      if (!codes) {  // neighbours exchange pairs, so that each has four columns of one of the two
        const float x = __shfl_xor_sync(kFullMask, odd ? upper[0] : lower[0], 1);
        const float y = __shfl_xor_sync(kFullMask, odd ? upper[1] : lower[1], 1);
        v = odd ? make_float4(x, y, lower[0], lower[1]) : make_float4(upper[0], upper[1], x, y);
        column = 16 * c + 8 * odd + p.t / 2 * 4;
      }
      store_remote_counted(row + 4 * column, barrier, head / heads, v);
    }
  }
}

// The heads from first_head on that this block finishes, from the sums of `splits` blocks; a thread two columns.
template <int splits>
__device__ inline void finish_heads(const Step& c, const unsigned char* memory, int token, int first_head, const Place& p) {
  constexpr int kOwn = kHeads / splits;
  const int column = 2 * threadIdx.x;
#pragma unroll
  for (int h = 0; h < kOwn; ++h) {
    const int head = first_head + h;
    if (head >= c.heads) break;
    const float sink = c.sink[head] * kLog2e;
    const float2 stat = *reinterpret_cast<const float2*>(memory + kStatsAt + 16 * (p.lane % splits * kOwn + h));
    float most = stat.x;
#pragma unroll
    for (int step = splits / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kFullMask, most, step));
    most = fmaxf(most, sink);
    const float share = power_of_two(stat.x - most);
    float total = share * stat.y;
#pragma unroll
    for (int step = splits / 2; step > 0; step /= 2) total += __shfl_xor_sync(kFullMask, total, step);
    const float weight = __fdividef(share, total + power_of_two(sink - most + kShift));
    float2 o = {};
    const float2* from = reinterpret_cast<const float2*>(memory + kReceivedAt + (h * kWidth + column) * 4);
#pragma unroll
    for (int r = 0; r < splits; ++r) {
      const float w = __shfl_sync(kFullMask, weight, r);
      const float2 v = from[r * kOwn * kWidth / 2];
      o.x = fmaf(w, v.x, o.x), o.y = fmaf(w, v.y, o.y);
    }
    if (p.warp == kWarps - 1) {
      const float2 angle = reinterpret_cast<const float2*>(memory + kAnglesAt)[p.lane];
      o = rotate(o, make_float2(angle.x, -angle.y));
    }
    const uint32_t word = pack_bf16(o.x, o.y);
    *reinterpret_cast<uint32_t*>(c.out + (int64_t(token) * c.heads + head) * kWidth + column) = word;
  }
}

// Where no part can be longer than one tile, two blocks fit a multiprocessor.
template <bool records, bool one_tile>
__global__ void __launch_bounds__(kThreads, one_tile && DSV4_ARCH != 120 ? 2 : 1) attend_step_kernel(const __grid_constant__ Step c) {
  using F = Form<records>;
  constexpr int kTilesAt = Tail<records>::kTilesAt;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const Place p = {warp, lane, lane / 4, lane % 4, warp / 2, warp % 2};
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const int cluster = blockIdx.x >> c.split_bits, rank = blockIdx.x & ((1 << c.split_bits) - 1);
  const int token = cluster / c.head_tiles, first_head = (cluster - token * c.head_tiles) * kHeads;
  int& chosen = *reinterpret_cast<int*>(memory + kChosenAt);
  int32_t* selected = reinterpret_cast<int32_t*>(memory + Tail<records>::selected(c));
  if (threadIdx.x == 0) {
    chosen = 0;
    make_barrier(shared + kBarrierAt, 1);
    publish_barriers();
    expect_bytes(shared + kBarrierAt, kHeads * (kWidth * 4 + 16));
  }
  __syncthreads();
  wait_for_launch_before();

  // What a chain of loads begins with, all at once.
  const int position = int(c.positions[token]);
  const Queries<records> queries(c.q + (int64_t(token) * c.heads + first_head) * kWidth, c.heads - first_head, p);
  if (c.selected != nullptr) {
    const int32_t* from = c.selected + int64_t(token) * c.top_k;
    int end = 0;
    for (int base = threadIdx.x; base < c.top_k; base += kBatch * kThreads) {
      int32_t entry[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) entry[b] = base + b * kThreads < c.top_k ? from[base + b * kThreads] : -1;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = base + b * kThreads;
        if (i < c.top_k) selected[i] = entry[b];
        end = entry[b] >= 0 ? i + 1 : end;
      }
    }
    end = __reduce_max_sync(kFullMask, end);
    if (lane == 0) atomicMax(&chosen, end);
    __syncthreads();
  }
  const int in_window = min(position + 1, c.window);
  int visible = 0;
  if (c.compressed != nullptr) visible = c.selected != nullptr ? chosen : min((position + 1) / c.ratio, c.entries);
  const Rows rows{c, selected, (position + 1 - in_window) % c.ring, in_window};
  const int64_t all = in_window + visible;
  const int begin = int(all * rank >> c.split_bits), length = int(all * (rank + 1) >> c.split_bits) - begin;
  // The first tile has what is left of a whole number of tiles: it is here early.
  const int tiles = one_tile ? min(length, 1) : (length + c.rows - 1) / c.rows;
  auto copy = [&](int tile) {
    const int first = max(length - (tiles - tile) * c.rows, 0), end = length - (tiles - tile - 1) * c.rows;
    const uint32_t to = shared + kTilesAt + tile % 2 * c.rows * F::kPitch;
    if (tile < tiles) copy_tile<F>(rows, begin + first, end - first, (end - first + 15) / 16 * 16, to, p);
    commit_copies();
  };
  copy(0);
  if (!one_tile) copy(1);

  float* inverse = reinterpret_cast<float*>(memory + kInverseAt);
  queries.store(memory + kQueriesAt, inverse, p);
  __syncthreads();
  uint32_t a[kMySteps][4];
  load_queries<records>(a, shared + kQueriesAt, p);
  cluster_arrive_relaxed();  // q has been read
  float2* angle = reinterpret_cast<float2*>(memory + kAnglesAt) + lane;  // the last warp writes and reads
  if (warp == kWarps - 1) *angle = rotary_angle(position, c.inv_freq[lane]);

  Part part = {};
  part.most[0] = part.most[1] = -INFINITY;
  for (int tile = 0; tile < tiles; ++tile) {
    if (one_tile || tile > 0) {
      wait_copies<0>();
    } else {
      wait_copies<1>();
    }
    __syncthreads();  // the tile is there for all, and all have used the one before
    if (!one_tile && tile > 0) copy(tile + 1);
    const int count = tile == 0 ? length - (tiles - 1) * c.rows : c.rows;
    unsigned char* at = memory + kTilesAt + tile % 2 * c.rows * F::kPitch;
    use_tile<records>(part, a, memory, at, count, tile == tiles - 1, p);
    if (one_tile) break;
  }

  cluster_wait();
  const float* sums = reinterpret_cast<const float*>(memory + kSumsAt);
  send_part<records>(part, sums, length == 0, shared, rank, c.split_bits, p);
  wait_barrier(shared + kBarrierAt, 0);
  const int first_own = first_head + rank * (kHeads >> c.split_bits);
  if (c.split_bits == 3) {
    finish_heads<8>(c, memory, token, first_own, p);
  } else {
    finish_heads<16>(c, memory, token, first_own, p);
  }
}

// How many clusters of 8 and of 16 blocks run at once with all of the shared memory; of 16, none where that is no size.
struct Clusters {
  int of_8 = 0, of_16 = 0;
  cudaError_t error;

  template <class Kernel>
  explicit Clusters(Kernel* kernel) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
    if (error != cudaSuccess) return;
    int counts[5] = {};
    const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (allowed == cudaSuccess && count_clusters(kernel, kThreads, kMaxShared, counts) == cudaSuccess) {
      of_8 = counts[3], of_16 = counts[4];
    } else {
      cudaGetLastError();  // of a size that does not exist
      int small[4] = {};
      error = count_clusters(kernel, kThreads, kMaxShared, small);
      of_8 = small[3];
    }
  }
};

// 16 blocks divide a long list, where all heads of a query run at once.
template <bool records>
cudaError_t start(Step c, int64_t tokens, int64_t splits, cudaStream_t stream) {
  static const Clusters clusters(attend_step_kernel<records, false>), of_one_tile(attend_step_kernel<records, true>);
  if (clusters.error != cudaSuccess) return clusters.error;
  if (of_one_tile.error != cudaSuccess) return of_one_tile.error;
  const int64_t longest = c.window + (c.compressed == nullptr ? 0 : c.selected != nullptr ? c.top_k : c.entries);
  if (splits == 0) splits = longest >= kLongList && clusters.of_16 >= c.head_tiles ? 16 : 8;
  if ((splits != 8 && splits != 16) || (splits == 16 ? clusters.of_16 : clusters.of_8) == 0) return cudaErrorInvalidValue;
  c.split_bits = splits == 16 ? 4 : 3;
  const int64_t most = ceil_div(longest, splits), limit = Form<records>::kRows;
  c.rows = int(most < limit ? ceil_div(most, 16) * 16 : limit);
  c.tiles = most > limit ? 2 : 1;
  const int shared = Tail<records>::selected(c) + 4 * c.top_k;
  if (shared > kMaxShared) return cudaErrorInvalidValue;
  Grid grid = {.blocks = tokens * c.head_tiles * splits, .threads = kThreads, .shared = size_t(shared)};
  grid.cluster = int(splits);
  grid.overlap = true;
  return launch(c.tiles == 1 ? attend_step_kernel<records, true> : attend_step_kernel<records, false>, grid, stream, c);
}

}  // namespace

cudaError_t attend_step(In q, In window_rows, const float* sink, const int64_t* positions, const float* inv_freq,
                        MaybeIn compressed, Maybe<const int32_t> selected, Out out, int64_t tokens, int64_t heads,
                        int64_t window, int64_t ring, int64_t entries, int64_t ratio, int64_t top_k, int64_t splits,
                        cudaStream_t stream) {
  const bool records = window_rows.type == Type::u8, has_entries = compressed.data != nullptr;
  if (q.type != Type::bf16 || out.type != Type::bf16) return cudaErrorInvalidValue;
  if (!records && window_rows.type != Type::bf16) return cudaErrorInvalidValue;
  if (has_entries && compressed.type != window_rows.type) return cudaErrorInvalidValue;
  if (tokens < 1 || tokens > kMaxStep || heads < 1 || window < 1 || ring < window) return cudaErrorInvalidValue;
  if (!has_entries ? selected.data != nullptr : selected.data == nullptr && ratio < 1) return cudaErrorInvalidValue;
  const uintptr_t addresses = uintptr_t(q.data) | uintptr_t(window_rows.data) | uintptr_t(compressed.data);
  if ((addresses | uintptr_t(out.data)) % 16) return cudaErrorMisalignedAddress;
  Step c = {.q = static_cast<const bf16*>(q.data)};
  c.window_rows = static_cast<const uint8_t*>(window_rows.data);
  c.compressed = static_cast<const uint8_t*>(compressed.data);
  c.sink = sink;
  c.inv_freq = inv_freq;
  c.positions = positions;
  c.selected = selected.data;
  c.out = static_cast<bf16*>(out.data);
  c.heads = int(heads);
  c.head_tiles = int(ceil_div(heads, kHeads));
  c.window = int(window);
  c.ring = int(ring);
  c.entries = int(entries);
  c.ratio = int(ratio);
  c.top_k = selected.data != nullptr ? int(top_k) : 0;
  return records ? start<true>(c, tokens, splits, stream) : start<false>(c, tokens, splits, stream);
}

}  // namespace dsv4
