// The product of many tokens: a block computes a tile of rows x tokens, columns arriving stage by stage.
//
// A stage is kBlocks blocks of 64 columns of every row tile and every token of the block's tile. It is copied to shared
// memory by cp.async, a few stages ahead. Weights stay codes there; a warp turns those of its 32 rows into operands in
// registers (units.cuh) and multiplies each with all of its tokens, so that the unpacking, about 70 instructions for 16
// rows x 64 columns, is spread over up to eight MMAs each. Sums are fp32 and in registers, ascending in K. Where a tile
// has few rows, kWarpsK warps take the blocks of a stage in turn and their sums are added at the end, in ascending
// order.
//
// Shared memory of a stage: row tiles, each its pieces as units.cuh has them and then its scales, or for bf16 16 rows;
// then the tokens. A row of bf16, of weights or tokens, has 128 kBlocks bytes, and its 16-byte pieces 2 i and 2 i + 1
// change places in odd rows: the eight lanes that are served together read four even pieces of one row and four odd
// ones of the next, and meet no bank twice.
//
// FP8: the scale of 128 x 128 weights is 2^e m with 1 <= m < 2, its rest. 2^e multiplies the operands, exactly while it
// is between 2^-124 and 2^119. The sums are kept in units of m: where m changes they are multiplied by the quotient of
// the old and the new one, one rounding each; scales of e8m0 never do that.
#pragma once

#include "gemm/units.cuh"

namespace dsv4 {

constexpr int kMostShared = 227 * 1024;      // bytes that a block may have
constexpr int kSharedOfTwo = 113 * 1024;     // bytes of each, where two blocks share a multiprocessor
constexpr int kScaleReserve = 4 * 1024;      // of these for the scales of FP8 blocks
constexpr int kSumStride = 36;               // floats from one token's 32 sums to the next's: no two lanes share a bank
constexpr int kWarpRows = 32;                // two row tiles
constexpr int kWarpTiles = kWarpRows / kUnitRows;

// Pieces that hold 16 rows x 64 columns.
__host__ __device__ constexpr int tile_pieces(Kind kind) { return kPieces * kBlock / unit_columns(kind); }

// kWarpsM x kWarpsN warps, each with 32 rows and up to kTilesN x 8 tokens, kWarpsK times.
template <Kind kind, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kTilesN_, int kBlocks_, int kPerProcessor_>
struct TileShape {
  static constexpr Kind kKind = kind;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_, kTilesN = kTilesN_;
  static constexpr int kBlocks = kBlocks_, kPerProcessor = kPerProcessor_;
  static constexpr int kRows = kWarpRows * kWarpsM, kTokens = 8 * kTilesN * kWarpsN, kColumns = kBlock * kBlocks;
  static constexpr int kWarps = kWarpsM * kWarpsN * kWarpsK, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kRows / kUnitRows;
  static constexpr int kTilePieces = tile_pieces(kind) * kBlocks;
  static constexpr int kScaleBytes = kind == Kind::nvfp4 ? 256 : kind == Kind::mxfp4 ? 128 : 0;  // of a packed unit
  static constexpr int kTileBytes = kTilePieces * kPieceBytes + kScaleBytes;
  static constexpr int kPitch = 2 * kColumns;  // bytes of a row of bf16
  static constexpr int kStageBytes = kRowTiles * kTileBytes + kTokens * kPitch;
  static constexpr int kBudget = (kPerProcessor == 1 ? kMostShared : kSharedOfTwo) - kScaleReserve;
  static constexpr int kStages = kBudget / kStageBytes < 6 ? kBudget / kStageBytes : 6;
  static constexpr int kSumBytes = kWarps * 8 * kTilesN * kSumStride * int(sizeof(float));
  static constexpr int kPipelineBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;

  static_assert(kStages >= 2 && kPipelineBytes <= kBudget);
  static_assert(kWarps % kRowTiles == 0 ? kTilePieces % (kWarps / kRowTiles) == 0 : kRowTiles % kWarps == 0);
  static_assert(kThreads % kTokens == 0 && kTilesN % kWarpsK == 0 && kBlocks % kWarpsK == 0);
  static_assert(kind == Kind::bf16 || kBlocks % 2 == 0);
  static_assert(kind != Kind::fp8 || (kWarpsK == 1 ? kBlocks == 2 : kWarpsK == kBlocks));  // one scale a stage and warp

  __host__ __device__ static constexpr int stages_of(int columns) {
    return unsigned(columns + kColumns - 1) / kColumns;
  }
  // FP8: block scales in a row of whole stages, and what of them is one stage's.
  static constexpr int kStageScales = ceil_div(kColumns, 128);
  __host__ __device__ static constexpr int scales_of(int columns) { return stages_of(columns) * kStageScales; }
  // Bytes of every BlockScale of a tile; the rests of the last stage follow.
  __host__ __device__ static constexpr int rests_at(int columns) { return 8 * kWarpsM * scales_of(columns); }
  // Bytes of dynamic shared memory for K columns: the pipeline, then those of FP8.
  __host__ __device__ static size_t shared_bytes(int columns) {
    return kPipelineBytes + (kind == Kind::fp8 ? rests_at(columns) + 4 * kWarpsM * kStageScales : 0);
  }
};

// The index of this thread, read where it stands: what is computed of it is computed there too, rather than kept in
// registers through the loop over stages.
__device__ inline unsigned thread_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// What a tile reads, in shared memory: what a thread needs of it for each stage it reads anew. Rows first_row .. of a
// matrix [rows, columns]; those at the end may lie beyond it.
struct TileWeight {
  const uint8_t* data;
  const void* scales;  // FP8: [ceil(rows / 128), ceil(columns / 128)], e8m0 or f32
  bool e8m0;
  int rows, columns;
  int first_row;  // a multiple of 16, for FP8 of 32
};

// How the threads of a block copy a stage. Where from and where to is computed anew for each: registers are what the
// loop is short of. `token_row(r)` is the first column of the tile's token r, null if there is none.
template <class S, class TokenRow>
struct StageCopy {
  static constexpr Kind kind = S::kKind;
  // Warps that copy one row tile, row tiles that a warp copies, threads that copy one token.
  static constexpr int kShare = S::kWarps < S::kRowTiles ? 1 : S::kWarps / S::kRowTiles;
  static constexpr int kRounds = S::kWarps < S::kRowTiles ? S::kRowTiles / S::kWarps : 1;
  static constexpr int kPerToken = S::kThreads / S::kTokens;
  static constexpr int kValueBytes = kind == Kind::bf16 ? 2 : 1;

  const TileWeight& w;
  const TokenRow& token_row;

  // Start copying stage `index` to the shared memory at `to`.
  __device__ void start(uint32_t to, int index) const {
    const int columns = w.columns;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const unsigned tile = thread_again() / kWarp / kShare + round * S::kWarps;
      if constexpr (is_packed(kind)) {
        copy_units(to, index, columns, tile);
      } else {
        copy_rows(to, index, columns, tile);
      }
    }
    copy_token(to, index, columns);
  }

 private:
  __device__ void copy_units(uint32_t to, int index, int columns, unsigned tile) const {
    const unsigned lane = thread_again() % kWarp, share = thread_again() / kWarp % kShare;
    const unsigned units = unsigned(columns + unit_columns(kind) - 1) / unit_columns(kind);
    const unsigned row_tile = min(unsigned(w.first_row) / kUnitRows + tile, unsigned(w.rows - 1) / kUnitRows);
    const unsigned block = index * S::kBlocks, quarter = block % kPieces;  // of a unit, where the stage begins
    const uint8_t* unit = w.data + uint64_t(row_tile * units + block / kPieces) * unit_bytes(kind) + 16 * lane;
    const uint8_t* first = unit + (quarter + share) * kPieceBytes;
    to += tile * S::kTileBytes + 16 * lane;
#pragma unroll
    for (int i = 0; i < S::kTilePieces / kShare; ++i) {
      copy_async_piece(to + (share + i * kShare) * kPieceBytes, first + i * kShare * kPieceBytes);
    }
    if (share == 0 && lane < S::kScaleBytes / 16) {
      copy_async_piece(to + S::kTilePieces * kPieceBytes, unit + kPieces * kPieceBytes);
    }
  }

  // As stored: of a piece of FP8 a lane copies 16 columns of row lane / 4, of bf16 8 columns of row lane / 8.
  __device__ void copy_rows(uint32_t to, int index, int columns, unsigned tile) const {
    const unsigned lane = thread_again() % kWarp, share = thread_again() / kWarp % kShare;
    const unsigned lane_row = kind == Kind::fp8 ? lane / 4 : lane / 8;
    const unsigned lane_column = kind == Kind::fp8 ? 16 * (lane % 4) : 8 * (lane % 8);
    const int first_row = w.first_row + tile * kUnitRows + lane_row, first_column = index * S::kColumns + lane_column;
    const int rows_left = w.rows - first_row, columns_left = columns - first_column;
    const unsigned row_bytes = columns * kValueBytes;
    const uint8_t* from = w.data + uint64_t(unsigned(first_row)) * row_bytes + first_column * kValueBytes;
    const unsigned lane_place = lane_row * S::kPitch + 16 * (lane % 8 ^ lane_row % 2);  // of bf16
    to += tile * S::kTileBytes + (kind == Kind::fp8 ? 16 * lane : lane_place);
#pragma unroll
    for (int i = 0; i < S::kTilePieces / kShare; ++i) {
      const int p = share + i * kShare, block = p / tile_pieces(kind), part = p % tile_pieces(kind);
      const int row = part * (kind == Kind::fp8 ? 8 : 4), column = block * kBlock;
      const int place = kind == Kind::fp8 ? p * kPieceBytes : row * S::kPitch + 2 * column;
      const bool inside = row < rows_left && column < columns_left;
      copy_async_piece(to + place, from + row * row_bytes + column * kValueBytes, inside ? 16 : 0);
    }
  }

  // A thread takes pieces first ^ kPerToken i of a token's row. Where fewer than eight threads copy one token,
  // neighbouring tokens begin with different pieces of each eight: a warp's copies reach all banks.
  __device__ void copy_token(uint32_t to, int index, int columns) const {
    constexpr int kGroups = 8 * S::kBlocks / kPerToken;
    const unsigned thread = thread_again(), r = thread / kPerToken;
    const unsigned first = kPerToken < 8 ? (thread % kPerToken + kPerToken * r) % 8 : thread % kPerToken;
    const bf16* row = token_row(r);
    if (row == nullptr) return;
    const int first_column = index * S::kColumns + 8 * first, columns_left = columns - first_column;
    row += first_column;
    to += S::kRowTiles * S::kTileBytes + r * S::kPitch + 16 * (first ^ r % 2);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      // Pieces from the first one to this one: those of its bits that count within eight, flipped.
      int away = kPerToken * i / 8 * 8;
#pragma unroll
      for (int bit = 1; bit < 8; bit *= 2) {
        if (kPerToken * i & bit) away += first & bit ? -bit : bit;
      }
      copy_async_piece(to + 16 * away, row + 8 * away, 8 * away < columns_left ? 16 : 0);
    }
  }
};

__device__ inline uint32_t read_shared_2(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

// A scale of FP8 blocks: its power of two, a pair of bf16, and the quotient of rests that its warp's sums are
// multiplied by before.
struct BlockScale {
  uint32_t power;
  float quotient;
};
// The scale without its power of two, 1 to 2; of zero and what is below 2^-126, whose power is 0, 1.
__device__ inline float rest_of(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  return bits & 0x7f800000 ? __uint_as_float((bits & 0x007fffff) | 0x3f800000) : 1.0f;
}

// Write every BlockScale of a tile to shared memory, [columns / 128][kWarpsM], and the rests of the last stage behind
// them.
template <class S>
__device__ inline void write_block_scales(const TileWeight& w, uint8_t* memory) {
  const int across = (w.columns + 127) / 128, all = S::scales_of(w.columns);
  BlockScale* to = reinterpret_cast<BlockScale*>(memory);
  float* rests = reinterpret_cast<float*>(memory + S::rests_at(w.columns));
  for (int i = threadIdx.x; i < S::kWarpsM * all; i += S::kThreads) {
    const int row = min(w.first_row + i % S::kWarpsM * kWarpRows, w.rows - 1) / 128, column = i / S::kWarpsM;
    const auto scale_at = [&](int c) {
      return c < 0 || c >= across ? 0.0f : read_block_scale(w.scales, w.e8m0, int64_t(row) * across + c);
    };
    const float scale = scale_at(column), rest = rest_of(scale);
    const uint32_t power = __byte_perm(__float_as_uint(scale) & 0x7f800000, 0, 0x3232);
    to[i] = {power, rest_of(scale_at(column - S::kStageScales)) / rest};
    if (column >= all - S::kStageScales) rests[i - S::kWarpsM * (all - S::kStageScales)] = rest;
  }
}

// The sums of one warp: 32 rows x 8 kTilesN tokens, accumulators of mma_bf16 for each of its two row tiles.
template <class S, int kTilesN>
struct WarpSums {
  static constexpr Kind kind = S::kKind;
  float d[kWarpTiles][kTilesN][4] = {};
  uint32_t power;  // FP8: of the block's scale

  int warp_k;
  uint32_t tokens_at;     // in a stage, of this warp
  uint32_t block_scales;  // FP8: in shared memory, of this warp's rows

  __device__ explicit WarpSums(uint32_t memory) {
    const unsigned warp = thread_again() / kWarp, warp_n = warp / S::kWarpsM % S::kWarpsN;
    warp_k = S::kWarpsK == 1 ? 0 : warp / (S::kWarpsM * S::kWarpsN);
    tokens_at = S::kRowTiles * S::kTileBytes + 8 * kTilesN * warp_n * S::kPitch;
    block_scales = memory + S::kPipelineBytes + 8 * (warp_k / 2 * S::kWarpsM + warp % S::kWarpsM);
  }

  // Add the products of stage `index`, which lies at `stage`.
  __device__ void add_stage(uint32_t stage, int index) {
    if constexpr (kind == Kind::fp8) {
      const uint2 scale = read_shared_8(block_scales + 8 * index * S::kStageScales * S::kWarpsM);
      power = scale.x;
      if (scale.y != __float_as_uint(1.0f)) rescale(__uint_as_float(scale.y));
    }
#pragma unroll 1
    for (int i = 0; i < S::kBlocks / S::kWarpsK; ++i) {
      add_block(stage, index, i * S::kWarpsK + (S::kWarpsK == 1 ? 0 : warp_k));
    }
  }

 private:
  // A half after the other, but for bf16: what the compiler takes from a second one into the first needs too many
  // registers.
  __device__ void add_block(uint32_t stage, int index, int b) {
    constexpr int kTogether = part_pieces(kind), kHalvesTogether = kind == Kind::bf16 ? 2 : 1;
    const unsigned lane = thread_again() % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t tiles = stage + thread_again() / kWarp % S::kWarpsM * kWarpTiles * S::kTileBytes;
    uint4 pieces[kWarpTiles][kTogether];
    ScalePair scales[kWarpTiles] = {};
    if constexpr (is_packed(kind)) {
      const unsigned quarter = (index * S::kBlocks + b) % kPieces;  // of a unit
      const unsigned of_lane = kind == Kind::nvfp4 ? 8 * lane : 8 * (2 * g + t / 2);
      const uint32_t scales_at = tiles + S::kTilePieces * kPieceBytes + of_lane + 2 * quarter;
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        const uint32_t bytes = read_shared_2(scales_at + m * S::kTileBytes);
        scales[m] = kind == Kind::nvfp4 ? unpack_e4m3(bytes) : unpack_e8m0(bytes);
      }
    }
#pragma unroll kHalvesTogether
    for (int h = 0; h < kBlock / kHalf; ++h) {
      const uint32_t in_row = 2 * kBlock * b + 32 * t + 16 * (h ^ g % 2);  // of bf16: where this lane's columns lie
      uint32_t a[kWarpTiles][kSteps][4];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        const uint32_t tile = tiles + m * S::kTileBytes;
        if constexpr (kind == Kind::bf16) {
          pieces[m][0] = read_shared_16(tile + g * S::kPitch + in_row);
          pieces[m][1] = read_shared_16(tile + (g + 8) * S::kPitch + in_row);
        } else {
          // Only the words of this half, which unpack_half takes for the first one.
#pragma unroll
          for (int q = 0; q < kTogether; ++q) {
            const uint2 words = read_shared_8(tile + 16 * lane + (b * kTogether + q) * kPieceBytes + 8 * h);
            pieces[m][q].x = words.x, pieces[m][q].y = words.y;
          }
        }
        unpack_half_bf16<kind>(pieces[m], scales[m], 0, a[m]);
        if constexpr (kind == Kind::fp8) multiply_by(power, a[m]);
      }
      multiply(stage + tokens_at + g * S::kPitch + in_row, a);
    }
  }

  // Two MMA steps for all tokens, two token tiles at a time, so that four sums are independent.
  __device__ void multiply(uint32_t tokens, const uint32_t (&a)[kWarpTiles][kSteps][4]) {
    constexpr int kPair = kTilesN % 2 ? 1 : 2;
#pragma unroll
    for (int n = 0; n < kTilesN; n += kPair) {
      uint32_t x[kPair][kSteps][2];
#pragma unroll
      for (int p = 0; p < kPair; ++p) {
        const uint4 v = read_shared_16(tokens + (n + p) * 8 * S::kPitch);
        x[p][0][0] = v.x, x[p][0][1] = v.y, x[p][1][0] = v.z, x[p][1][1] = v.w;
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
#pragma unroll
          for (int m = 0; m < kWarpTiles; ++m) {
            mma_bf16(d[m][n + p], a[m][i][0], a[m][i][1], a[m][i][2], a[m][i][3], x[p][i][0], x[p][i][1]);
          }
        }
      }
    }
  }

  __device__ static void multiply_by(uint32_t power, uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = multiply_bf16(a[i][r], power);
    }
  }

  __device__ void rescale(float quotient) {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d[m][n][e] *= quotient;
      }
    }
  }
};

// Where a tile's results go: `store(token, row, sums)` for eight rows from `row` on, both counted from the tile's
// first. `rests` are those of the last stage.
template <class S, int kTilesN, class Store>
__device__ inline void store_sums(const WarpSums<S, kTilesN>& sums, float* memory, const float* rests,
                                  const Store& store) {
  const unsigned warp = thread_again() / kWarp, lane = thread_again() % kWarp, g = lane / 4, t = lane % 4;
  const unsigned warp_tile = warp % (S::kWarpsM * S::kWarpsN), warp_k = warp / (S::kWarpsM * S::kWarpsN);
  constexpr int kWarpFloats = 8 * kTilesN * kSumStride;
  float* mine = memory + warp * kWarpFloats;
  float factor = unit_factor_bf16(S::kKind);
  if constexpr (S::kKind == Kind::fp8) factor = rests[warp_k / 2 * S::kWarpsM + warp_tile % S::kWarpsM];
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        mine[(8 * n + 2 * t + e % 2) * kSumStride + m * kUnitRows + g + 8 * (e / 2)] = sums.d[m][n][e] * factor;
      }
    }
  }
  if (S::kWarpsK > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  const float* first = memory + warp_tile * kWarpFloats;
#pragma unroll 1
  for (int n = warp_k; n < kTilesN; n += S::kWarpsK) {
    const int token = 8 * n + lane / 4, row = 8 * (lane % 4);
    float total[8] = {};
#pragma unroll
    for (int k = 0; k < S::kWarpsK; ++k) {
      const float* from = first + k * S::kWarpsM * S::kWarpsN * kWarpFloats + token * kSumStride + row;
      const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
      total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
      total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
    }
    store(8 * kTilesN * (warp_tile / S::kWarpsM) + token, warp_tile % S::kWarpsM * kWarpRows + row, total);
  }
}

// One tile, by all threads of the block. `token_row(r)` is the first column of its token r, or null. `make_store()` is
// called at the end and returns what store_sums takes.
template <class S, int kTilesN, class TokenRow, class MakeStore>
__device__ inline void compute_tile(const TileWeight& w, uint8_t* memory, const TokenRow& token_row,
                                    const MakeStore& make_store) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const StageCopy<S, TokenRow> copy{w, token_row};
  __syncthreads();  // the tile before has been stored, and `w` written
#pragma unroll 1
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < S::stages_of(w.columns)) copy.start(shared + s * S::kStageBytes, s);
    commit_copies();
  }
  if constexpr (S::kKind == Kind::fp8) write_block_scales<S>(w, memory + S::kPipelineBytes);
  WarpSums<S, kTilesN> sums(shared);
  uint32_t stage = shared;
  const uint32_t last_stage = shared + (S::kStages - 1) * S::kStageBytes;
#pragma unroll 1
  for (int s = 0; s < S::stages_of(w.columns); ++s) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    if (s + S::kStages - 1 < S::stages_of(w.columns)) {
      // Into the place of the stage before, which all warps have left.
      copy.start(stage == shared ? last_stage : stage - S::kStageBytes, s + S::kStages - 1);
    }
    commit_copies();
    sums.add_stage(stage, s);
    stage = stage == last_stage ? shared : stage + S::kStageBytes;
  }
  wait_copies<0>();
  __syncthreads();
  const float* rests = reinterpret_cast<const float*>(memory + S::kPipelineBytes + S::rests_at(w.columns));
  store_sums<S>(sums, reinterpret_cast<float*>(memory), rests, make_store());
}

// Eight neighbouring results of one token, of which `count` exist, rounded once to the output's type.
__device__ inline void store_results(void* out, bool f32, int64_t at, int count, bool aligned, const float (&v)[8]) {
  if (count >= 8 && aligned) {
    if (f32) {
      Octet<float> octet;
      pack(v, octet);
      store_octet(static_cast<float*>(out) + at, octet);
    } else {
      Octet<bf16> octet;
      pack(v, octet);
      store_octet(static_cast<bf16*>(out) + at, octet);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= count) break;
    if (f32) {
      static_cast<float*>(out)[at + i] = v[i];
    } else {
      static_cast<bf16*>(out)[at + i] = __float2bfloat16_rn(v[i]);
    }
  }
}

}  // namespace dsv4
