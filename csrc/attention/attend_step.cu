// attend_step of ops/attention/reference.py for bf16 queries, one launch: window ring and compressed entries as the
// cache stores them, KV records or bf16 rows. What is read and multiplied stands in step.cuh.
//
// A query's list is the rows of its window, oldest first, and then its compressed entries, ascending. A cluster of 8 or
// 16 blocks takes one query and 16 of its heads; each block an equal, contiguous part of the list, whose true length is
// known only here, from the position and, where entries are selected, from the number of choices. So the order of every
// sum depends on shapes and on this query's own list: a query has the same bits beside any other seven.
//
// A block walks its part in tiles of rows as they are stored; the tile after the one in use is always on its way. Keys
// are values, so a tile serves both products, 16 heads being the rows of the tensor cores' A operand. 16 warps, four to
// a scheduler, hide each other's latencies:
//   S: the warps are four quads; a quad takes every fourth group of eight rows, each of its warps a quarter of the
//      columns, whose part of q it holds in registers; partial scores meet in shared memory.
//   P: the online softmax in fp32, maxima through shared memory. P stands there as fp16, shifted by 2^15, and as bf16.
//   O: warp w has columns 32 w .. + 31 of the output, 16 sums a lane, and reads the tile transposed.
// A record's 448 codes (e4m3) become fp16 in one instruction a pair when they are read: exact. q as fp16 is exact as
// well (gemm/units.cuh TokenScale). A block of 64 columns has one power of two a row: S takes it after four MMA steps;
// for O, whose warps 2 b and 2 b + 1 have block b, it is multiplied to P in fp16, relative to the largest so far, by
// which sums are scaled as by the maximum of the softmax. The last 64 columns, and bf16 rows, are multiplied as bf16.
// No row of the tile shares banks with the next seven: 592 and 1040 bytes are odd multiples of 16. Behind the end of a
// part rows are zeros and scores -infinity; rows that the query does not see are never read.
//
// At the end every block has maximum, denominator and 16 x 512 sums of its part. Block r of the cluster finishes heads
// r 16 / splits ..: all send it their sums into its shared memory, st.async counted by its barrier; it adds them
// weighted, in the order of the parts, with the sink once in the denominator, turns the last 64 columns back and
// stores.
//
// Floor, one query of Flash on an H200: 640 rows of 592 bytes, q and out: 0.5 MB, 0.1 us; 8,320 rows: 4.9 MB, 1.1 us,
// and 1.1 GFLOP on the 64 multiprocessors of four clusters of 16, 3.8 us by mma.sync. What takes time at 640 rows are
// latencies in turn: launch, position and choices, rows, four steps in shared memory, 32 KB to the neighbours, output.
// Measured there, in a chain: 5.4 us at 128 rows, 7.5 at 640 of which 512 are chosen, 20 at 8,320; a tile of 104 rows
// takes 5,300 cycles, a third each for S, for O, and for P with the barriers around it, none of them bound by one unit
// alone.
// sass attend_step_kernel: HMMA.16816.F32, LDSM.16.M88.4, LDSM.16.MT88.4, UBLKCP
#include "attention/step.cuh"
#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/overlap.cuh"

namespace dsv4 {
namespace {

constexpr int kShift = 15;                    // P is multiplied by 2^15: exact in fp16 down to 2^-31 of the largest
constexpr int kMaxStep = 8;
constexpr int kLongList = 2048;               // rows from which on a cluster has 16 blocks
constexpr int kMaxShared = 227 * 1024;

// Dynamic shared memory, in bytes: at fixed places, then the tiles, then the choices of the query. q, then partial
// scores, then the sums that arrive take the same place: sums come when the whole cluster has read its last scores.
constexpr int kReceivedAt = 0, kQueriesAt = 0, kPartialAt = 0;
constexpr int kStatsAt = kReceivedAt + kHeads * kWidth * 4;
constexpr int kFactorsAt = kStatsAt + kHeads * 16;
constexpr int kMaximaAt = kFactorsAt + kCodes / kBlockColumns * kFactorBytes;
constexpr int kSumsAt = kMaximaAt + kHeads * kWarps * 4;
constexpr int kInverseAt = kSumsAt + kHeads * kWarps * 4;
constexpr int kSinksAt = kInverseAt + kHeads * 4;  // of the heads that this block finishes
constexpr int kAnglesAt = kSinksAt + 16;
constexpr int kBarrierAt = kAnglesAt + kRotaryPairs * 8;  // of the sums, and of either tile
constexpr int kTileBarrierAt = kBarrierAt + 8;
constexpr int kProbsAt = kBarrierAt + 32;
template <bool records>
struct Tail {
  using F = Form<records>;
  static constexpr int kProbPitch = 2 * F::kRows + 16, kProbBytes = kHeads * kProbPitch;  // of one P
  static constexpr int kTilesAt = kProbsAt + 2 * kProbBytes;
  static_assert(kWarps * F::kGroups * kWarp * 16 <= kStatsAt && kHeads * F::kQueryPitch <= kStatsAt);

  static __host__ __device__ int selected(const Step& c) { return kTilesAt + c.tiles * c.rows * F::kPitch; }
};
static_assert(kProbsAt % 16 == 0);

// The warps of a quad have arrived, and see what the others wrote.
__device__ inline void sync_quad(int quad) { asm volatile("bar.sync %0, 128;" ::"r"(1 + quad) : "memory"); }

// What a block knows of its part of the list when it has walked it.
struct Part {
  float o[4][4];   // as multiply_values leaves them
  float most[2];   // of heads g and g + 8: the largest score, in powers of two,
  float sum[2];    // and this lane's part of the sum of P
  int largest;     // scale's byte: sums of codes are of 2^(largest - 127)
};

// This warp's scores of a tile to P in shared memory. x: rows `row`, + 1 x heads g, g + 8, -infinity where there is
// none. Returns by what the sums of either head so far are to be multiplied.
template <bool records>
__device__ inline float2 store_probs(Part& part, const float (&x)[4], int row, unsigned char* memory, int padded,
                                     bool last, const Place& p) {
  using L = Tail<records>;
  float* maxima = reinterpret_cast<float*>(memory + kMaximaAt);
  float* sums = reinterpret_cast<float*>(memory + kSumsAt);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = quad_max(fmaxf(x[2 * r], x[2 * r + 1]));
    if (p.t == 0) maxima[(p.g + 8 * r) * kWarps + p.warp] = top;
  }
  __syncthreads();
  float by[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Lane t takes four of the 16 warps.
    const float4 of_warps = reinterpret_cast<const float4*>(maxima + (p.g + 8 * r) * kWarps)[p.t];
    const float top_here = quad_max(fmaxf(fmaxf(of_warps.x, of_warps.y), fmaxf(of_warps.z, of_warps.w)));
    const float top = fmaxf(part.most[r], top_here);  // finite: a tile has a row
    by[r] = power_of_two(part.most[r] - top);
    part.most[r] = top;
    const float first = power_of_two(x[2 * r] - (top - kShift));
    const float second = power_of_two(x[2 * r + 1] - (top - kShift));
    part.sum[r] = part.sum[r] * by[r] + (first + second);
    if (row < padded) {
      unsigned char* to = memory + kProbsAt + (p.g + 8 * r) * L::kProbPitch + 2 * row;
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
  const int padded = (count + 15) / 16 * 16;
  const bool codes = records && p.warp < kCodes / kColumns;
  unsigned char* factors = memory + kFactorsAt;  // of all blocks of columns

  float4* partial = reinterpret_cast<float4*>(memory + kPartialAt) + p.lane;  // [warp, group, lane]
#pragma unroll 1
  for (int i = 0, row = 8 * p.quad; i < F::kGroups && row < count; ++i, row += 8 * kQuads) {
    float s[4];
    multiply_scores<records>(s, a, tile + row * F::kPitch, p);
    partial[(p.warp * F::kGroups + i) * kWarp] = make_float4(s[0], s[1], s[2], s[3]);
  }
  sync_quad(p.quad);
  if (const int block = 2 * p.quad + p.quarter - 2; records && p.quarter >= 2 && block < kCodes / kBlockColumns) {
    prepare_factors(tile, padded, factors + block * kFactorBytes, block, p);  // by those that have least to finish
  }
  // Each warp of a quad finishes one of its groups.
  float x[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  const int row = 8 * (p.quad + kQuads * p.quarter) + 2 * p.t;
  if (p.quarter < F::kGroups) {
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float4 v = partial[((4 * p.quad + w) * F::kGroups + p.quarter) * kWarp];
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    const float* inverse = reinterpret_cast<const float*>(memory + kInverseAt);
    const float upper = records ? kScale * inverse[p.g] : kScale, lower = records ? kScale * inverse[p.g + 8] : kScale;
    if (row < count) x[0] = sum[0] * upper, x[2] = sum[2] * lower;
    if (row + 1 < count) x[1] = sum[1] * upper, x[3] = sum[3] * lower;
  }
  const float2 by = store_probs<records>(part, x, row, memory, padded, last, p);
  if (last) cluster_arrive_relaxed();  // partial scores have been read
  factors += p.warp / 2 * kFactorBytes;
  float rescale = 1.0f;
  if (codes) {
    const int largest = largest_of(factors);
    rescale = scale_of(max(127 + part.largest - largest, 0));
    part.largest = largest;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
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
    const uint32_t there = place_in_block(barrier, head / heads);
    const uint32_t row =
        place_in_block(shared + kReceivedAt + (place_of(head) * kWidth + kColumns * p.warp) * 4, head / heads);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
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
      store_counted(row + 4 * column, there, v);
    }
  }
}

// Two columns of one head that this block finishes, its own'th, from the sums of `splits` blocks.
template <int splits>
__device__ inline float2 finish_head(const unsigned char* memory, int own, int column, float sink, int lane) {
  constexpr int kOwn = kHeads / splits;
  const float2 stat = *reinterpret_cast<const float2*>(memory + kStatsAt + 16 * (lane % splits * kOwn + own));
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
  const float2* from = reinterpret_cast<const float2*>(memory + kReceivedAt + (own * kWidth + column) * 4);
#pragma unroll
  for (int r = 0; r < splits; ++r) {
    const float w = __shfl_sync(kFullMask, weight, r);
    const float2 v = from[r * kOwn * kWidth / 2];
    o.x = fmaf(w, v.x, o.x), o.y = fmaf(w, v.y, o.y);
  }
  return o;
}

// How many entries the query has chosen; they are copied to shared memory. All threads; -1s come last.
__device__ inline int load_selected(const int32_t* from, int top_k, int32_t* selected) {
  constexpr int kBatch = 2;  // choices that a thread has under way
  int count = 0;
  for (int base = threadIdx.x; base - int(threadIdx.x) < top_k; base += kBatch * kThreads) {
    int32_t entry[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) entry[b] = base + b * kThreads < top_k ? from[base + b * kThreads] : -1;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kThreads < top_k) selected[base + b * kThreads] = entry[b];
      count += __syncthreads_count(entry[b] >= 0);
    }
  }
  return count;
}

// `one_tile`: no part is longer than a tile.
template <bool records, bool one_tile>
__global__ void __launch_bounds__(kThreads, 1) attend_step_kernel(const __grid_constant__ Step c) {
  using F = Form<records>;
  constexpr int kTilesAt = Tail<records>::kTilesAt;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const Place p = {warp, lane, lane / 4, lane % 4, warp / 4, warp % 4};
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const int cluster = blockIdx.x >> c.split_bits, rank = blockIdx.x & ((1 << c.split_bits) - 1);
  const int token = cluster / c.head_tiles, first_head = (cluster - token * c.head_tiles) * kHeads;
  int32_t* selected = reinterpret_cast<int32_t*>(memory + Tail<records>::selected(c));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) make_barrier(shared + kBarrierAt + 8 * i, 1);
    publish_barriers();
    expect_bytes(shared + kBarrierAt, kHeads * (kWidth * 4 + 16));
  }
  // Of the heads that this block finishes, a group of eight warps has one.
  const int own = warp / 8, head = first_head + (rank << (4 - c.split_bits)) + own;
  const bool finishes = own < kHeads >> c.split_bits && head < c.heads;
  float* sinks = reinterpret_cast<float*>(memory + kSinksAt);
  float2* angles = reinterpret_cast<float2*>(memory + kAnglesAt);
  if (warp % 8 == 0 && finishes) sinks[own] = c.sink[head] * kLog2e;
  if (warp == kWarps - 1) angles[lane].x = c.inv_freq[lane];
  if (threadIdx.x < kCodes / kBlockColumns) largest_of(memory + kFactorsAt + threadIdx.x * kFactorBytes) = 0;
  __syncthreads();
  wait_for_launch_before();

  // What a chain of loads begins with, all at once.
  const int position = int(c.positions[token]);
  const Query<records> query(c.q + (int64_t(token) * c.heads + first_head) * kWidth, c.heads - first_head, p);
  int visible = 0;
  if (c.selected != nullptr) {
    visible = load_selected(c.selected + int64_t(token) * c.top_k, c.top_k, selected);
  } else if (c.compressed != nullptr) {
    visible = min((position + 1) / c.ratio, c.entries);
  }
  const int in_window = min(position + 1, c.window);
  const Rows rows{c, c.selected != nullptr ? selected : nullptr, (position + 1 - in_window) % c.ring, in_window};
  const int all = in_window + visible;
  const int begin = all * rank >> c.split_bits, length = (all * (rank + 1) >> c.split_bits) - begin;
  // The first tile has what is left of a whole number of tiles: it is here early.
  const int tiles = one_tile ? min(length, 1) : (length + c.rows - 1) / c.rows;
  const int first_count = length - (tiles - 1) * c.rows;
  auto copy = [&](int tile) {
    const int first = max(length - (tiles - tile) * c.rows, 0), end = length - (tiles - tile - 1) * c.rows;
    const uint32_t barrier = shared + kTileBarrierAt + 8 * (tile % 2);
    const uint32_t to = shared + kTilesAt + tile % 2 * c.rows * F::kPitch;
    if (tile < tiles) copy_tile<F>(rows, begin + first, end - first, to, barrier, p);
    commit_copies();
  };
  copy(0);
  if (!one_tile) copy(1);

  float* inverse = reinterpret_cast<float*>(memory + kInverseAt);
  query.store(memory + kQueriesAt, inverse, p);
  if (warp < (first_count + 15) / 16 * 16 - first_count) {  // at most 15 rows of zeros, a warp each
    uint4* row = reinterpret_cast<uint4*>(memory + kTilesAt + (first_count + warp) * F::kPitch);
    for (int i = lane; i < F::kRow / 16; i += kWarp) row[i] = {};
    fence_copies();
  }
  if (warp == kWarps - 1) angles[lane] = rotary_angle(position, angles[lane].x);
  __syncthreads();
  uint32_t a[kMySteps][4];
  load_queries<records>(a, shared + kQueriesAt, p);

  Part part = {};
  part.most[0] = part.most[1] = -INFINITY;
  for (int tile = 0; tile < tiles; ++tile) {
    if (one_tile || tile > 0) {
      wait_copies<0>();
    } else {
      wait_copies<1>();
    }
    __syncthreads();  // all have copied their pieces, and used the tile before, or read q
    if (!one_tile && tile > 0) copy(tile + 1);
    wait_barrier(shared + kTileBarrierAt + 8 * (tile % 2), tile / 2 % 2);
    unsigned char* at = memory + kTilesAt + tile % 2 * c.rows * F::kPitch;
    use_tile<records>(part, a, memory, at, tile == 0 ? first_count : c.rows, tile == tiles - 1, p);
    if (one_tile) break;
  }
  if (tiles == 0) cluster_arrive_relaxed();

  cluster_wait();
  const float* sums = reinterpret_cast<const float*>(memory + kSumsAt);
  send_part<records>(part, sums, length == 0, shared, rank, c.split_bits, p);
  wait_barrier(shared + kBarrierAt, 0);
  if (!finishes) return;
  const int column = 2 * (threadIdx.x % (kThreads / 2));
  float2 o = c.split_bits == 3 ? finish_head<8>(memory, own, column, sinks[own], lane)
                               : finish_head<16>(memory, own, column, sinks[own], lane);
  if (warp % 8 == 7) o = rotate(o, make_float2(angles[lane].x, -angles[lane].y));  // the last 64 columns
  bf16* out = c.out + (int64_t(token) * c.heads + head) * kWidth + column;
  *reinterpret_cast<uint32_t*>(out) = pack_bf16(o.x, o.y);
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
  if (splits != 8 && splits != 16) return cudaErrorInvalidValue;
  if ((splits == 16 ? clusters.of_16 : clusters.of_8) == 0) return cudaErrorInvalidValue;
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
  if (window + entries > INT32_MAX / 16) return cudaErrorInvalidValue;
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
