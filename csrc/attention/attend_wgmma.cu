// attend of ops/attention/reference.py for many queries, bf16, on sm_90a: wgmma.
//
// One query with 64 heads is the 64 rows of a product, so that 128 heads are two. A block stays and computes one such
// item after another; a multiprocessor holds one block, of three warpgroups.
//
// The third one copies: the rows of an item's list (prefill.cuh), 64 at a time, by cp.async into one of two tiles of 64
// KB, and its 64 queries, 64 KB, as soon as the item before no longer needs its own. It runs ahead, past the end of an
// item, by as much as there is room. A tile arrives in quarters of 128 columns, each with a barrier of its own, so that
// the first ones are multiplied while the others are under way; it is given back in halves of 256 columns. Rows behind
// the list's end are filled with zeros and never read.
//
// The other two compute. S = Q K^T of a tile, 64 heads x 64 entries, is divided by entries, 32 each. Row maxima are
// exchanged, then P in bf16, through shared memory; O += P V is divided by columns, 256 each, 128 sums a thread. V is
// the same tile, as keys are values, its rows now those of K (mn_major). The softmax is the online one in fp32, shifted
// by no less than the sink; sums are kept a lane's own until the end, and then added in a fixed order. Neighbouring
// blocks compute neighbouring queries, whose windows are nearly the same rows of the L2 cache, and begin with the last
// ones, which attend to most.
//
// 4 H 512 n operations of a query with H heads and n rows: 84 MFLOP for 64 x 640 against 128 KB of q and out from
// memory and 640 KB of rows from the L2 cache. Per tile the tensor cores need 2,048 cycles. Shared memory, at 128 bytes
// a cycle, is as busy: 1,536 for S, of which q is read anew by both warpgroups, 640 for O and 512 to fill the tile. S,
// softmax and O follow each other, about 3,400 cycles or 1.9 us for 8.4 MFLOP: at most 570 TFLOPS on an H200. Expected:
// 450 for 640 rows and 300 for 160, where a third of an item's time is its beginning and end.
// sass 90a attend_wgmma_kernel: HGMMA.64x32x16.F32.BF16, HGMMA.64x256x16.F32.BF16, ARRIVES.LDGSTSBAR
#include "attention/prefill.cuh"
#include "common/barrier.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {

#if DSV4_ARCH == 90
namespace {

constexpr int kGroup = 4 * kWarp;  // threads of a warpgroup
constexpr int kComputing = 2 * kGroup, kThreads = 3 * kGroup;
// 65,536 registers, 168 of each thread at first: the copying warpgroup leaves what the computing ones take.
constexpr int kCopyRegisters = 72, kComputeRegisters = 216;
static_assert(kGroup * kCopyRegisters + kComputing * kComputeRegisters <= 65536);

constexpr int kRows = 64;     // heads of an item
constexpr int kEntries = 64;  // of a tile
constexpr int kShare = kEntries / 2;         // entries of a warpgroup's part of S,
constexpr int kColumns = kWidth / 2;         // columns of its part of O
constexpr int kBlockBytes = kRows * kSwizzleRow;         // 64 rows x 64 columns (wgmma.cuh)
constexpr int kTileBytes = kWidth / 64 * kBlockBytes;
constexpr int kQuarters = 4, kQuarterColumns = kWidth / kQuarters;
static_assert(kRows == kEntries);

// Shared memory.
constexpr int kTilesAt = kTileBytes, kProbsAt = kTilesAt + 2 * kTileBytes;
constexpr int kMaximaAt = kProbsAt + kBlockBytes;      // [warpgroup][row]
constexpr int kSumsAt = kMaximaAt + 2 * kRows * 4;     // the same
constexpr int kAnglesAt = kSumsAt + 2 * kRows * 4;     // of two items
constexpr int kCountsAt = kAnglesAt + 2 * kRotaryPairs * 8;  // of two items
constexpr int kBarriersAt = kCountsAt + 2 * 4;
// Barriers. Filled: by every copying thread, and for the first quarter of q by the lane that wrote angles and count.
// Free: by every warp that has read it.
constexpr int kQueryFilled = kBarriersAt, kQueryFree = kQueryFilled + 8 * kQuarters;
constexpr int kTileFilled = kQueryFree + 8, kTileFree = kTileFilled + 2 * 8 * kQuarters;
constexpr int kShared = kTileFree + 2 * 8 * 2;
static_assert(kBarriersAt % 8 == 0 && kShared <= 227 * 1024);

// The items of a block, from the last query to the first.
struct Item {
  int token, first_head;
};
__device__ inline Item item_at(const Chunk& c, int head_tiles, int index) {
  const int from_end = c.tokens * head_tiles - 1 - index;
  return {from_end / head_tiles, from_end % head_tiles * kRows};
}

__device__ inline void copy_piece(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Copy 128 columns of 64 rows. Each copying warp takes 16 rows, of which its lanes 0 .. 15 know where they are, null
// for zeros; two rows x 256 bytes at a time.
__device__ inline void copy_quarter(const Chunk& c, uint32_t matrix, int quarter, const bf16* row_of_mine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4, piece = lane % 16, odd = lane / 16;
  const uint32_t to = matrix + (2 * quarter + piece / 8) * kBlockBytes + swizzled(16 * warp + odd, piece % 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bf16* row = row_of_lane(row_of_mine, 2 * i + odd);
    const bf16* from = (row == nullptr ? c.window_kv : row) + quarter * kQuarterColumns + 8 * piece;
    // 2 i rows further: pieces change places by xor with 2 i.
    copy_piece((to ^ 16 * (2 * i % 8)) + 2 * i * kSwizzleRow, from, row != nullptr);
  }
}

// What the third warpgroup does.
__device__ inline void copy_items(const Chunk& c, int head_tiles, uint8_t* memory) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4, mine = 16 * warp + lane;
  int filled = 0;  // tiles so far
  int parity = 0;  // of the item's number
#pragma unroll 1
  for (int index = blockIdx.x; index < c.tokens * head_tiles; index += gridDim.x, parity ^= 1) {
    const Item item = item_at(c, head_tiles, index);
    const List list = list_of(c, item.token);
#pragma unroll 1
    for (int first = 0; first < list.count; first += kEntries, ++filled) {
      const int buffer = filled % 2, turn = filled / 2 % 2;
      const bf16* row = lane < 16 ? row_of(c, list, first + mine) : nullptr;
#pragma unroll 1
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        if (quarter % 2 == 0) wait_barrier(shared + kTileFree + 8 * (2 * buffer + quarter / 2), turn ^ 1);
        copy_quarter(c, shared + kTilesAt + buffer * kTileBytes, quarter, row);
        arrive_after_copies(shared + kTileFilled + 8 * (kQuarters * buffer + quarter));
      }
      if (first > 0) continue;
      // There was room for the first tile before q of the item before is no longer needed.
      wait_barrier(shared + kQueryFree, parity ^ 1);
      const int head = item.first_head + mine;
      row = lane < 16 && head < c.heads ? c.q + (int64_t(item.token) * c.heads + head) * kWidth : nullptr;
      if (warp == 0) {
        float2* angles = reinterpret_cast<float2*>(memory + kAnglesAt) + parity * kRotaryPairs;
        angles[lane] = rotary_angle(c.positions[item.token], c.inv_freq[lane]);
        if (lane == 0) reinterpret_cast<int*>(memory + kCountsAt)[parity] = list.count;
        __syncwarp();
        if (lane == 0) arrive(shared + kQueryFilled);
      }
#pragma unroll 1
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        copy_quarter(c, shared, quarter, row);
        arrive_after_copies(shared + kQueryFilled + 8 * quarter);
      }
    }
  }
}

// Two rows of a thread in the softmax: the shift, and the sum of this lane's powers.
struct Softmax {
  float shift[2], sum[2];
};

// s = this warpgroup's 32 entries of a tile. A quarter is multiplied as soon as it is there, for an item's first tile
// also that of q.
__device__ inline void multiply_scores(float (&s)[16], uint32_t shared, int buffer, int turn, int group, bool first,
                                       int parity) {
  const uint64_t q = k_major(shared);
  const uint64_t k = k_major(shared + kTilesAt + buffer * kTileBytes + group * kShare * kSwizzleRow);
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    if (first) wait_barrier(shared + kQueryFilled + 8 * quarter, parity);
    wait_barrier(shared + kTileFilled + 8 * (kQuarters * buffer + quarter), turn);
    publish_to_wgmma();
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kQuarterColumns / 16; ++step) {
      const int bytes = (2 * quarter + step / 4) * kBlockBytes + step % 4 * 32;
      wgmma_64x32(s, q + bytes / 16, k + bytes / 16, quarter + step > 0);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  keep_results(s);
}

// S to P, which is written to shared memory; returns what O so far is to be multiplied by. `left`: rows of the list
// from the tile's first on.
__device__ inline float2 take_powers(float (&s)[16], Softmax& softmax, uint8_t* memory, int group, int left) {
  const int lane = threadIdx.x % kWarp, t = lane % 4, row = threadIdx.x / kWarp % 4 * 16 + lane / 4;
  float* maxima = reinterpret_cast<float*>(memory + kMaximaAt);
  if (left < kEntries) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (group * kShare + i / 4 * 8 + 2 * t + i % 2 >= left) s[i] = -INFINITY;
    }
  }
  float largest[2], factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = -INFINITY;
#pragma unroll
    for (int j = 0; j < 4; ++j) largest[r] = fmaxf(largest[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    largest[r] = quad_max(largest[r]) * kScale;
    if (t == 0) maxima[group * kRows + row + 8 * r] = largest[r];
  }
  sync_threads_of(1, kComputing);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float shift = fmaxf(fmaxf(largest[r], maxima[(1 - group) * kRows + row + 8 * r]), softmax.shift[r]);
    factor[r] = power_of_two(softmax.shift[r] - shift);
    softmax.shift[r] = shift;
    float added = 0.0f;
    uint8_t* probs = memory + kProbsAt + 4 * t;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float low = power_of_two(fmaf(s[4 * j + 2 * r], kScale, -shift));
      const float high = power_of_two(fmaf(s[4 * j + 2 * r + 1], kScale, -shift));
      added += low + high;
      *reinterpret_cast<uint32_t*>(probs + swizzled(row + 8 * r, 4 * group + j)) = pack_bf16(low, high);
    }
    softmax.sum[r] = fmaf(softmax.sum[r], factor[r], added);
  }
  publish_to_wgmma();
  return make_float2(factor[0], factor[1]);
}

// O divided by the denominators, turned back and stored.
__device__ inline void finish_item(const float (&o)[128], const Softmax& softmax, const float (&sink)[2],
                                   const Chunk& c, const Item& item, uint8_t* memory, int group, int parity) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp % 4 * 16 + lane / 4;
  float* sums = reinterpret_cast<float*>(memory + kSumsAt);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(softmax.sum[r]);
    if (lane % 4 == 0) sums[group * kRows + row + 8 * r] = sum;
  }
  sync_threads_of(1, kComputing);
  float factor[2];
  bf16* to[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = sums[row + 8 * r] + sums[kRows + row + 8 * r] + power_of_two(sink[r] - softmax.shift[r]);
    const int head = item.first_head + row + 8 * r;
    factor[r] = 1.0f / total;
    to[r] = head < c.heads ? c.out + (int64_t(item.token) * c.heads + head) * kWidth + group * kColumns : nullptr;
  }
  const float2* angles = reinterpret_cast<const float2*>(memory + kAnglesAt) + parity * kRotaryPairs;
  store_output<kColumns / 8>(o, factor, to, group == 1 ? angles : nullptr);
}

// What the first two warpgroups do.
__device__ inline void compute_items(const Chunk& c, int head_tiles, uint8_t* memory) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp % 4 * 16 + lane / 4;
  // Taken from one lane, so that the compiler knows it to be the same for all, and with it descriptors.
  const int group = __shfl_sync(kFullMask, int(threadIdx.x / kGroup), 0);
  const uint64_t probs = k_major(shared + kProbsAt);
  int used = 0;    // tiles so far
  int parity = 0;  // of the item's number
  float o[128] = {};
#pragma unroll 1
  for (int index = blockIdx.x; index < c.tokens * head_tiles; index += gridDim.x, parity ^= 1) {
    const Item item = item_at(c, head_tiles, index);
    Softmax softmax = {};
    float sink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.shift[r] = sink[r] = c.sink[min(item.first_head + row + 8 * r, c.heads - 1)] * kLog2e;
    }
    wait_barrier(shared + kQueryFilled, parity);
    const int count = reinterpret_cast<const int*>(memory + kCountsAt)[parity];
#pragma unroll 1
    for (int first = 0; first < count; first += kEntries, ++used) {
      const int buffer = used % 2, turn = used / 2 % 2;
      float s[16] = {};
      multiply_scores(s, shared, buffer, turn, group, first == 0, parity);
      if (first + kEntries >= count && lane == 0) arrive(shared + kQueryFree);
      const float2 factor = take_powers(s, softmax, memory, group, count - first);
      if (first > 0 && __any_sync(kFullMask, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= i / 2 % 2 ? factor.y : factor.x;
      }
      sync_threads_of(2, kComputing);  // all of P is there
      const uint64_t v = mn_major(shared + kTilesAt + buffer * kTileBytes + group * (kTileBytes / 2), kBlockBytes);
      keep_results(o);
      wgmma_begin();
#pragma unroll
      for (int step = 0; step < kEntries / 16; ++step) {
        wgmma_64x256_mn(o, probs + step * 32 / 16, v + step * 16 * kSwizzleRow / 16, first + step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      keep_results(o);
      // The other warpgroup has no use for these columns: it was done with S before it came to the barrier.
      if (lane == 0) arrive(shared + kTileFree + 8 * (2 * buffer + group));
    }
    finish_item(o, softmax, sink, c, item, memory, group, parity);
  }
}

__global__ void __launch_bounds__(kThreads, 1) attend_wgmma_kernel(const __grid_constant__ Chunk c, int head_tiles) {
  extern __shared__ __align__(kSwizzleGroup) uint8_t memory[];
  if (threadIdx.x == 0) {
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
    for (int i = 0; i < kQuarters; ++i) make_barrier(shared + kQueryFilled + 8 * i, kGroup + (i == 0));
    make_barrier(shared + kQueryFree, kComputing / kWarp);
    for (int i = 0; i < 2 * kQuarters; ++i) make_barrier(shared + kTileFilled + 8 * i, kGroup);
    for (int i = 0; i < 2 * 2; ++i) make_barrier(shared + kTileFree + 8 * i, kGroup / kWarp);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= kComputing) {
    give_registers<kCopyRegisters>();
    copy_items(c, head_tiles, memory);
  } else {
    take_registers<kComputeRegisters>();
    compute_items(c, head_tiles, memory);
  }
}

}  // namespace
#endif

// Arguments as those of attend_tiles.
cudaError_t attend_wgmma(In q, In window_kv, const float* sink, const int64_t* positions, const float* inv_freq,
                         MaybeIn compressed, Maybe<const int64_t> visible, Maybe<const int32_t> selected, Out out,
                         int64_t tokens, int64_t heads, int64_t before, int64_t window, int64_t entries, int64_t top_k,
                         cudaStream_t stream) {
#if DSV4_ARCH == 90
  Chunk chunk;
  cudaError_t error = make_chunk(q, window_kv, sink, positions, inv_freq, compressed, visible, selected, out, tokens,
                                 heads, before, window, entries, top_k, chunk);
  int processors = 0;
  if (error == cudaSuccess) error = count_processors(processors);
  auto kernel = attend_wgmma_kernel;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  }
  if (error != cudaSuccess) return error;
  const int64_t head_tiles = ceil_div(heads, kRows), items = tokens * head_tiles;
  const int64_t blocks = items < processors ? items : processors;
  return launch(kernel, Grid{blocks, kThreads, kShared}, stream, chunk, int(head_tiles));
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace dsv4
