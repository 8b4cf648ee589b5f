// attend of ops/attention/reference.py for many queries, bf16, on any architecture: mma.sync.
//
// A block computes one query for as many heads as a tile has rows, 64, or 32 where a block has less than 200 KB of
// shared memory. Its list of rows (prefill.cuh) comes tile by tile, 64 or 32 rows x 1 KB, into one of two buffers: the
// next tile is copied by cp.async, every row by one warp, while this one is used. Rows behind the list's end are filled
// with zeros and never read. As keys are values, a tile is read twice from shared memory: as it lies for S = Q K^T, and
// transposed by ldmatrix for O += P V.
//
// Eight warps, two groups of heads x four groups of columns. In S the columns are the tile's entries, each warp a
// quarter of them; in O they are the 512 of a row, each warp 128: 128 sums a lane. Between the two, row maxima and P in
// bf16 pass through shared memory. The softmax is the online one in fp32, shifted by no less than the sink, so that no
// power overflows; sums are kept a lane's own until the end, and then added in a fixed order. The query that attends to
// most is the last one: blocks begin with it.
//
// 4 H 512 n operations of a query with H heads and n rows; 84 MFLOP for 64 x 640 and 128 KB of q and out from memory,
// 640 KB of rows from the L2 cache. What binds is shared memory, per 64 heads x 64 rows 384 KB for S and 128 KB for O
// at 128 bytes a cycle, 4,100 cycles: at most 480 TFLOPS on an H200; 250 are expected, for softmax and barriers do not
// overlap with it.
// sass attend_tiles_kernel: HMMA.16816.F32.BF16, LDSM.16.M88.4, LDSM.16.MT88.4, LDGSTS.E.BYPASS.LTC128B.128
#include "attention/prefill.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kRowGroups = 2, kColumnGroups = 4;
constexpr int kTiles = kWidth / 8 / kColumnGroups;  // of eight columns of O, a warp's

// kRowTiles x 16 heads a warp, kEntries rows of the list a tile.
template <int kRowTiles_, int kEntries_>
struct TileShape {
  static constexpr int kRowTiles = kRowTiles_, kEntries = kEntries_;
  static constexpr int kRows = kRowGroups * 16 * kRowTiles;      // heads of a block
  static constexpr int kScoreTiles = kEntries / 8 / kColumnGroups;  // of eight entries of S, a warp's
  static constexpr int kCopies = kEntries / kWarps;              // rows that a warp copies
  static constexpr int kPitch = 2 * kEntries;                    // bytes of a row of P
  static constexpr int kTileBytes = kEntries * kRowBytes;
  // Shared memory: q, two tiles, P, row maxima of each column group, angles.
  static constexpr int kTilesAt = kRows * kRowBytes, kProbsAt = kTilesAt + 2 * kTileBytes;
  static constexpr int kMaximaAt = kProbsAt + kRows * kPitch, kAnglesAt = kMaximaAt + 4 * kRows * kColumnGroups;
  static constexpr int kShared = kAnglesAt + 8 * kRotaryPairs;
  static_assert(kScoreTiles == 1 || kScoreTiles == 2);

  // Where the 16-byte piece of a row of P lies: the eight rows of an 8 x 8 matrix meet no bank twice.
  static __device__ uint32_t prob_at(int row, int piece) {
    return row * kPitch + 16 * (piece ^ (kPitch == 128 ? row % 8 : row / 2 % 4));
  }
};
using LargeShape = TileShape<2, 64>;
using SmallShape = TileShape<1, 32>;
static_assert(LargeShape::kShared <= 227 * 1024 && SmallShape::kShared <= 99 * 1024);

// Rows of q and of tiles have 64 pieces of 16 bytes; piece p lies at place p ^ (row % 8).
__device__ inline uint32_t piece_at(int row, int piece) { return row * kRowBytes + 16 * (piece ^ row % 8); }

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}
__device__ inline void copy_piece(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// This warp's place in the block, and its lane as operands of mma_bf16 have it: 4 g + t.
struct Place {
  int warp, lane, g, t, row_group, column_group;
};
__device__ inline Place place_of_thread() {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return {warp, lane, lane / 4, lane % 4, warp / kColumnGroups, warp % kColumnGroups};
}

// Copy a row of 1 KB to row `row` of the matrix at `to`; without one, zeros.
__device__ inline void copy_row(uint32_t to, int row, const bf16* from, const bf16* anything, int lane) {
  const bool valid = from != nullptr;
  const bf16* first = (valid ? from : anything) + 8 * lane;
#pragma unroll
  for (int i = 0; i < 2; ++i) copy_piece(to + piece_at(row, lane + i * kWarp), first + i * 8 * kWarp, valid);
}

template <class S>
__device__ inline void copy_tile(const Chunk& c, uint32_t to, const bf16* row_of_mine, const Place& p) {
#pragma unroll
  for (int i = 0; i < S::kCopies; ++i) {
    copy_row(to, p.warp * S::kCopies + i, row_of_lane(row_of_mine, i), c.window_kv, p.lane);
  }
}

// s = this warp's heads times its quarter of the tile's entries.
template <class S>
__device__ inline void multiply_scores(float (&s)[S::kRowTiles][S::kScoreTiles][4], uint32_t q, uint32_t tile,
                                       const Place& p) {
  const int in_eight = p.lane % 8;
  const uint32_t q_at = q + piece_at(p.row_group * 16 * S::kRowTiles + p.lane % 16, p.lane / 16);
  // Matrices of b: two of columns 0..7, 8..15 for 16 entries, or four of columns 0..31 for eight.
  const int first = p.column_group * 8 * S::kScoreTiles;
  const uint32_t k_at = tile + (S::kScoreTiles == 2 ? piece_at(first + in_eight + p.lane / 16 * 8, p.lane / 8 % 2)
                                                    : piece_at(first + in_eight, p.lane / 8));
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < S::kScoreTiles; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
#pragma unroll 1
  for (uint32_t block = 0; block < kRowBytes; block += 128) {  // 64 columns: within them, places are changed by xor
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4][2];  // of 16 columns: of step, and of score tile
      if (S::kScoreTiles == 1) {
        uint32_t four[4];
        load_matrices(four, (k_at ^ 64 * pair) + block);
        b[0][0] = four[0], b[0][1] = four[1], b[1][0] = four[2], b[1][1] = four[3];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = 32 * (2 * pair + half);
        if (S::kScoreTiles == 2) {
          uint32_t four[4];
          load_matrices(four, (k_at ^ step) + block);
          b[2 * half][0] = four[0], b[2 * half][1] = four[1];
          b[2 * half + 1][0] = four[2], b[2 * half + 1][1] = four[3];
        }
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          uint32_t a[4];
          load_matrices(a, (q_at ^ step) + block + m * 16 * kRowBytes);
#pragma unroll
          for (int n = 0; n < S::kScoreTiles; ++n) {
            const uint32_t(&of)[2] = b[S::kScoreTiles == 2 ? 2 * half + n : half];
            mma_bf16(s[m][n], a[0], a[1], a[2], a[3], of[0], of[1]);
          }
        }
      }
    }
  }
}

// o += P times the tile, this warp's heads and 128 columns.
template <class S>
__device__ inline void multiply_values(float (&o)[S::kRowTiles][4 * kTiles], uint32_t probs, uint32_t tile,
                                       const Place& p) {
  const uint32_t v_at = tile + piece_at(p.lane % 16, p.lane / 16) + p.column_group * 16 * kTiles;
#pragma unroll 1
  for (int step = 0; step < S::kEntries / 16; ++step) {
    uint32_t a[S::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      const int row = (p.row_group * S::kRowTiles + m) * 16 + p.lane % 16;
      load_matrices(a[m], probs + S::prob_at(row, 2 * step + p.lane / 16));
    }
    const uint32_t v = v_at + step * 16 * kRowBytes;
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      load_transposed(b, (v ^ 32 * (j / 2 % 4)) + 128 * (j / 8));
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float(&sum)[4] = reinterpret_cast<float(&)[4]>(o[m][4 * (j + n)]);
          mma_bf16(sum, a[m][0], a[m][1], a[m][2], a[m][3], b[2 * n], b[2 * n + 1]);
        }
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) attend_tiles_kernel(const __grid_constant__ Chunk c, int head_tiles) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  float* maxima = reinterpret_cast<float*>(memory + S::kMaximaAt);
  float2* angles = reinterpret_cast<float2*>(memory + S::kAnglesAt);
  const Place p = place_of_thread();
  const int token = c.tokens - 1 - int(blockIdx.x) / head_tiles, first_head = int(blockIdx.x) % head_tiles * S::kRows;
  const List list = list_of(c, token);
  const int tiles = (list.count + S::kEntries - 1) / S::kEntries;

  // Lanes below kCopies know the rows that this warp copies of the next tile.
  const int mine = p.warp * S::kCopies + p.lane;
  const auto row_of_mine = [&](int tile) {
    return p.lane < S::kCopies ? row_of(c, list, tile * S::kEntries + mine) : nullptr;
  };
  const bf16* q = c.q + (int64_t(token) * c.heads + first_head) * kWidth;
  for (int row = p.warp; row < S::kRows; row += kWarps) {
    copy_row(shared, row, first_head + row < c.heads ? q + row * kWidth : nullptr, c.q, p.lane);
  }
  copy_tile<S>(c, shared + S::kTilesAt, row_of_mine(0), p);
  const bf16* next_row = row_of_mine(1);
  if (p.warp == 0) angles[p.lane] = rotary_angle(c.positions[token], c.inv_freq[p.lane]);

  // Of rows g and g + 8 of each row tile: the shift, and the sum of this lane's powers.
  float shift[S::kRowTiles][2], sum[S::kRowTiles][2] = {}, o[S::kRowTiles][4 * kTiles] = {};
  const int first_row = p.row_group * 16 * S::kRowTiles + p.g;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[m][r] = c.sink[min(first_head + first_row + 16 * m + 8 * r, c.heads - 1)] * kLog2e;
    }
  }

#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const uint32_t tile = shared + S::kTilesAt + i % 2 * S::kTileBytes;
    wait_async_copies();
    __syncthreads();  // this tile is there, and the one before is no longer read
    if (i + 1 < tiles) {
      copy_tile<S>(c, shared + S::kTilesAt + (i + 1) % 2 * S::kTileBytes, next_row, p);
      next_row = row_of_mine(i + 2);
    }
    float s[S::kRowTiles][S::kScoreTiles][4];
    multiply_scores<S>(s, shared, tile, p);

    const int first_entry = p.column_group * 8 * S::kScoreTiles + 2 * p.t, left = list.count - i * S::kEntries;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < S::kScoreTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = s[m][n][2 * r + e];
            score = first_entry + 8 * n + e < left ? score * kScale : -INFINITY;
            largest = fmaxf(largest, score);
          }
        }
        largest = quad_max(largest);
        if (p.t == 0) maxima[p.column_group * S::kRows + first_row + 16 * m + 8 * r] = largest;
      }
    }
    __syncthreads();
    bool rescale = false;
    float factor[S::kRowTiles][2];
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * m + 8 * r;
        float largest = shift[m][r];
#pragma unroll
        for (int k = 0; k < kColumnGroups; ++k) largest = fmaxf(largest, maxima[k * S::kRows + row]);
        factor[m][r] = power_of_two(shift[m][r] - largest);
        rescale |= shift[m][r] != largest;
        shift[m][r] = largest;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < S::kScoreTiles; ++n) {
          const float low = power_of_two(s[m][n][2 * r] - largest), high = power_of_two(s[m][n][2 * r + 1] - largest);
          added += low + high;
          const int piece = p.column_group * S::kScoreTiles + n;
          *reinterpret_cast<uint32_t*>(memory + S::kProbsAt + S::prob_at(row, piece) + 4 * p.t) = pack_bf16(low, high);
        }
        sum[m][r] = sum[m][r] * factor[m][r] + added;
      }
    }
    if (__any_sync(kFullMask, rescale)) {
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4 * kTiles; ++e) o[m][e] *= factor[m][e / 2 % 2];
      }
    }
    __syncthreads();
    multiply_values<S>(o, shared + S::kProbsAt, tile, p);
  }

  // Every warp's part of the denominators, where the maxima were.
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[m][r]);
      if (p.t == 0) maxima[p.column_group * S::kRows + first_row + 16 * m + 8 * r] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
    float factor[2];
    bf16* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 16 * m + 8 * r, head = first_head + row;
      float total = power_of_two(c.sink[min(head, c.heads - 1)] * kLog2e - shift[m][r]);
#pragma unroll
      for (int k = 0; k < kColumnGroups; ++k) total += maxima[k * S::kRows + row];
      factor[r] = 1.0f / total;
      bf16* first = c.out + (int64_t(token) * c.heads + head) * kWidth + p.column_group * 8 * kTiles;
      to[r] = head < c.heads ? first : nullptr;
    }
    store_output<kTiles>(o[m], factor, to, p.column_group == kColumnGroups - 1 ? angles : nullptr);
  }
}

template <class S>
cudaError_t start(const Chunk& c, cudaStream_t stream) {
  const int head_tiles = int(ceil_div(c.heads, S::kRows));
  auto kernel = attend_tiles_kernel<S>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  if (error != cudaSuccess) return error;
  return launch(kernel, Grid{int64_t(c.tokens) * head_tiles, kThreads, S::kShared}, stream, c, head_tiles);
}

}  // namespace

// q, out [tokens, heads, 512]; window_kv [before + tokens, 512]; compressed [entries, 512]; all bf16. sink [heads];
// positions, visible [tokens]; inv_freq [32]; selected [tokens, top_k]. `small` takes the tiles of 32 heads also where
// the others fit.
cudaError_t attend_tiles(In q, In window_kv, const float* sink, const int64_t* positions, const float* inv_freq,
                         MaybeIn compressed, Maybe<const int64_t> visible, Maybe<const int32_t> selected, Out out,
                         int64_t tokens, int64_t heads, int64_t before, int64_t window, int64_t entries, int64_t top_k,
                         bool small, cudaStream_t stream) {
  Chunk chunk;
  cudaError_t error = make_chunk(q, window_kv, sink, positions, inv_freq, compressed, visible, selected, out, tokens,
                                 heads, before, window, entries, top_k, chunk);
  int device = 0, most_shared = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  if (small || most_shared < LargeShape::kShared) return start<SmallShape>(chunk, stream);
  return start<LargeShape>(chunk, stream);
}

}  // namespace dsv4
