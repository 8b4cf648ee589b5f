// gemv_mma for 9 to 32 tokens.
//
// So many tokens of a long row fill the shared memory, and the sums of a tile (16 rows x 32 tokens, 2 KB) are too many
// to keep beside them. So a warp keeps them in registers over all units that it has of a tile. The columns of K are
// divided among the blocks of a cluster and among the warps of a block, as far as there are too few tiles for all
// warps: the parts of a tile. One of their warps, the finisher, gets the sums of the others, adds the parts in an order
// that depends on the tile alone, scales, rounds once and stores. No barrier of the block stands between a warp and
// its next tile.
//
// A finisher has room for the sums of one tile: before the next one it tells the others that their sums have been read.
// sass gemv_mma_many_kernel: HMMA.16816.F32, LDS.128
#include "gemm/gemv.cuh"

namespace dsv4 {
namespace gemv {
namespace {

constexpr int kMaxPartBits = 3;
constexpr int kSumBytes = 16 * kWarp;  // of 16 rows x 8 tokens: four floats a lane
// Of the rings; one that counts a finisher's sums and one that lets a warp send the next ones.
constexpr int kBarriers = kRingBarriers + 2 * kWarps;
constexpr int kHeadBytes = 8 * kBarriers + int(sizeof(Head));

__host__ __device__ inline int spans(const Gemv& p) { return 1 << p.span_bits; }
__host__ __device__ inline int parts(const Gemv& p) { return 1 << (p.split_bits + p.span_bits); }
__host__ __device__ inline int groups(const Gemv& p) { return kWarps >> p.span_bits; }  // of a block: tiles at a time

// Dynamic shared memory of a block: the warps' rings, barriers and scales, tokens, sums of other parts.
constexpr int kTokensAt = kRingBytes + kHeadBytes;
__host__ __device__ inline int token_tiles(const Gemv& p) { return p.tokens > 16 ? 4 : 2; }  // of 8
__host__ __device__ inline int sums_at(const Gemv& p) {
  return kTokensAt + 8 * token_tiles(p) * token_pitch(p.most_stretches() * kStretch);
}
int shared_bytes(const Gemv& p) {
  const int finished = (groups(p) + p.splits() - 1) >> p.split_bits;  // groups whose finisher is in one block
  return sums_at(p) + finished * (parts(p) - 1) * token_tiles(p) * kSumBytes;
}

// The block's columns of every token to shared memory as multiply_step reads them, zeros past the last one. For weights
// that become fp16 each token is then scaled; head.inverse undoes it. Ends with a barrier of the block.
template <Kind kind>
__device__ inline void load_tokens(const Gemv& p, const Job& job, const Run& run, unsigned char* tokens, Head& head) {
  constexpr int kTogether = 4;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = job.column + run.first_stretch * kStretch, pitch = token_pitch(run.stretches * kStretch);
  const int columns = p.columns - run.first_stretch * kStretch;
  const int pieces = run.stretches * p.tokens, per_token = 65536 / run.stretches + 1;  // its inverse
  auto place = [&](int token, int stretch) {
    return reinterpret_cast<uint4*>(tokens + token * pitch + 2 * kStretch * stretch + token_piece_at<kind>(lane));
  };
  for (int base = warp; base < pieces; base += kTogether * kWarps) {
    uint4 held[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int number = base + i * kWarps, token = number * per_token >> 16;
      const int column = (number - token * run.stretches) * kStretch + 8 * lane;
      held[i] = {};
      if (number < pieces && column < columns) held[i] = load_piece(p.x + token * p.x_stride + first + column);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int number = base + i * kWarps, token = number * per_token >> 16;
      if (number >= pieces) break;
      *place(token, number - token * run.stretches) = held[i];
      if (is_half(kind)) {
        const uint32_t most = __reduce_max_sync(kFullMask, largest_bits(held[i]));
        if (lane == 0) atomicMax(head.largest + token, most);
      }
    }
  }
  __syncthreads();
  if constexpr (is_half(kind)) {
    if (threadIdx.x < p.tokens) {
      head.inverse[threadIdx.x] = TokenScale(head.largest[threadIdx.x]).inverse;
    }
#pragma unroll 4
    for (int number = warp; number < pieces; number += kWarps) {
      const int token = number * per_token >> 16;
      uint4* piece = place(token, number - token * run.stretches);
      *piece = scale_to_f16(*piece, TokenScale(head.largest[token]).factor);
    }
    __syncthreads();
  }
}

// The sums of a tile, scaled and rounded. Lanes of neighbouring rows exchange a token, so that each stores two rows.
template <Kind kind, int kTiles>
__device__ inline void store_tile(const Gemv& p, const Job& job, const Head& head, int tile, int lane,
                                  const float (&sum)[kTiles][4]) {
  const Matrix& m = matrix_of(p, job, tile);
  const float scale = kind == Kind::nvfp4 ? head.global_scale[&m - p.matrix] : 1.0f;
  const int g = lane / 4, t = lane % 4, odd = g % 2;
  const int row = (tile - m.first_tile) * kUnitRows + g - odd;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int token = 8 * n + 2 * t + odd, known = min(token, p.tokens - 1);
    const float token_scale = p.token_scale != nullptr ? head.token_scale[known] : 1.0f;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float even = sum[n][2 * lower], uneven = sum[n][2 * lower + 1];  // of tokens 2t, 2t + 1
      const float mine = odd ? uneven : even, other = odd ? even : uneven;
      const float got = __shfl_xor_sync(kFullMask, other, 4);
      const float y0 = (odd ? got : mine) * unit_factor(kind) * token_scale * scale;
      const float y1 = (odd ? mine : got) * unit_factor(kind) * token_scale * scale;
      const int n0 = row + 8 * lower;
      if (token >= p.tokens || n0 >= m.rows) continue;
      const int64_t at = token * m.stride + n0;
      const bool both = n0 + 1 < m.rows;
      if (m.out_f32) {
        float* to = static_cast<float*>(m.out) + at;
        to[0] = y0;
        if (both) to[1] = y1;
      } else {
        bf16* to = static_cast<bf16*>(m.out) + at;
        if (both && m.stride % 2 == 0) {
          *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(y0, y1);
        } else {
          to[0] = __float2bfloat16_rn(y0);
          if (both) to[1] = __float2bfloat16_rn(y1);
        }
      }
    }
  }
}

// A warp's share of the sums of tiles: one of the parts that a finisher adds, its own first, then round from there.
template <int kTiles>
struct Part {
  const Gemv& p;
  int lane, turn;          // of this part in the order of the sum: 0 is the finisher's
  int finisher_rank, rank, group, span;
  uint32_t sums;           // of the parts from turn 1 on; the addresses are the same in every block
  uint32_t full, free;     // barriers: the sums are there, in the finisher's block; those of the tile before were read

  __device__ Part(const Gemv& p, uint32_t shared, int rank, int group, int span, int lane)
      : p(p), lane(lane), rank(rank), group(group), span(span) {
    // Finishers take turns among blocks, so that each has as many, then among warps.
    finisher_rank = group & (p.splits() - 1);
    const int finisher_span = (group >> p.split_bits) & (spans(p) - 1);
    turn = ((rank - finisher_rank) * spans(p) + span - finisher_span) & (parts(p) - 1);
    sums = shared + sums_at(p) + (group >> p.split_bits) * (parts(p) - 1) * kTiles * kSumBytes + 16 * lane;
    full = shared + kRingBytes + 8 * (kRingBarriers + group);
    free = shared + kRingBytes + 8 * (kRingBarriers + kWarps);
  }

  // The sums of tile number `round` of this group go to the finisher, which returns true with those of all parts.
  __device__ bool add(float (&sum)[kTiles][4], int round, bool last) const {
    const int others = parts(p) - 1, bytes = kTiles * kSumBytes;
    if (turn > 0) {
      if (round > 0) wait_barrier(free + 8 * (group << p.span_bits | span), (round - 1) % 2);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t place = sums + (turn - 1) * bytes + n * kSumBytes;
        const float4 v = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
        if (p.split_bits > 0) {
          store_remote_counted(place, full, finisher_rank, v);
        } else {
          write_shared_float4(place, v);
        }
      }
      if (p.split_bits == 0) {
        __syncwarp();
        if (lane == 0) arrive(full);
      }
      return false;
    }
    if (others == 0) return true;
    if (lane == 0) {
      if (p.split_bits > 0) {
        expect_bytes(full, others * bytes);
      } else {
        arrive(full);
      }
    }
    wait_barrier(full, round % 2);
    for (int i = 0; i < others; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 v = read_shared_float4(sums + i * bytes + n * kSumBytes);
        sum[n][0] += v.x, sum[n][1] += v.y, sum[n][2] += v.z, sum[n][3] += v.w;
      }
    }
    __syncwarp();  // every lane has read the sums
    const int sender_rank = lane >> p.span_bits, sender_span = lane & (spans(p) - 1);
    if (!last && lane < parts(p) && (sender_rank != rank || sender_span != span)) {
      const uint32_t sender = free + 8 * (group << p.span_bits | sender_span);
      if (p.split_bits > 0) {
        arrive_remote(sender, sender_rank);
      } else {
        arrive(sender);
      }
    }
    return true;
  }
};

template <Kind kind, int kTiles>
__device__ void run_job(const Gemv& p, const Job& job, unsigned char* memory) {
  constexpr int kUnits = kStretch / unit_columns(kind), kColumns = unit_columns(kind);  // units of a stretch
  const int cluster = (blockIdx.x >> p.split_bits) - job.first_cluster, rank = blockIdx.x & (p.splits() - 1);
  // Known to the compiler as the same for all lanes.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group = warp >> p.span_bits, span = warp & (spans(p) - 1);
  const Run run(p, job, cluster, rank);
  const int first = (run.stretches * span >> p.span_bits) * kUnits;
  const int end = (run.stretches * (span + 1) >> p.span_bits) * kUnits;
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory)), barriers = shared + kRingBytes;
  Head& head = *reinterpret_cast<Head*>(memory + kRingBytes + 8 * kBarriers);

  int ahead_tile = group, ahead = first;
  const uint8_t* ahead_at = nullptr;  // packed
  auto next_unit = [&] {
    if (ahead == end) ahead = first, ahead_tile += groups(p);
    const int tile = run.first_tile + ahead_tile, block = run.first_stretch * kUnits + ahead;
    Source<kind> source;
    source.exists = ahead_tile < run.tiles;
    if constexpr (is_packed(kind)) {
      if (ahead == first) ahead_at = unit_at<kind>(p, job, tile, block, lane);
      source.unit = ahead_at;
      ahead_at += unit_bytes(kind);
    } else {
      source.unit = unit_at<kind>(p, job, tile, block, lane);
    }
    ++ahead;
    return source;
  };
  Ring<kind, kSlots> ring(shared + warp * kSlots * kUnitShared, barriers + 8 * warp * kSlots, lane);
  auto prepare = [&] {
    const float scale = global_scale_of<kind>(p, job);  // before the weights, behind which it would wait
    ring.fill(next_unit);
    if (threadIdx.x < kMaxTokens) head.largest[threadIdx.x] = 0;
    if (threadIdx.x < job.matrices) head.global_scale[job.first_matrix + threadIdx.x] = scale;
    if (threadIdx.x < 2 * kWarps) {
      // A finisher's sums are counted by bytes where a cluster divides K, else by the warps that have written them.
      const bool warps = threadIdx.x < kWarps && p.split_bits == 0;
      make_barrier(barriers + 8 * (kRingBarriers + threadIdx.x), warps ? parts(p) : 1);
    }
    publish_barriers();
    __syncthreads();
  };
  if (p.overlap) prepare();
  wait_for_launch_before();
  if (!p.overlap) prepare();
  if (p.split_bits > 0) cluster_arrive_relaxed();
  if (p.token_scale != nullptr && threadIdx.x < p.tokens) head.token_scale[threadIdx.x] = p.token_scale[threadIdx.x];
  load_tokens<kind>(p, job, run, memory + kTokensAt, head);
  if (p.split_bits > 0) cluster_wait();  // barriers are made in all its blocks
  // Places of tokens past the last one hold anything: these columns of the product are not stored.
  const int pitch = token_pitch(run.stretches * kStretch);
  const uint32_t token_at = shared + kTokensAt + g * pitch + 16 * t;

  const Part<kTiles> part(p, shared, rank, group, span, lane);
  int round = 0;
  for (int tile = group; tile < run.tiles; tile += groups(p), ++round) {
    float sum[kTiles][4] = {};
    [[maybe_unused]] float total[kTiles][4] = {};  // FP8: of the units before, each times its scale
#pragma unroll 1
    for (int unit = first; unit < end; ++unit) {
      const int token_offset = unit * (kColumns / kHalf * kHalfBytes);
      [[maybe_unused]] float scale;
      if constexpr (kind == Kind::fp8) {
        const int in_job = run.first_tile + tile;
        scale = block_scale_of(p, matrix_of(p, job, in_job), in_job, run.first_stretch * kUnits + unit);
      }
      ring.take(next_unit, [&](int half, const uint32_t(&a)[kSteps][4]) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t x[kSteps][2];
          read_tokens(token_at + 8 * n * pitch + token_offset + half * kHalfBytes, x);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) multiply_step<kind>(sum[n], a[i], x[i]);
        }
      });
      if constexpr (kind == Kind::fp8) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          total[i / 4][i % 4] = fmaf(sum[i / 4][i % 4], scale, total[i / 4][i % 4]);
          sum[i / 4][i % 4] = 0.0f;
        }
      }
    }
    float(&sums)[kTiles][4] = kind == Kind::fp8 ? total : sum;
    if constexpr (is_half(kind)) {  // each block of a cluster has scaled its columns of a token by itself
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float inverse = head.inverse[min(8 * (i / 2) + 2 * t + i % 2, p.tokens - 1)];
        sums[i / 2][i % 2] *= inverse;
        sums[i / 2][2 + i % 2] *= inverse;
      }
    }
    const bool last = tile + groups(p) >= run.tiles;
    if (part.add(sums, round, last)) store_tile<kind>(p, job, head, run.first_tile + tile, lane, sums);
  }
}

template <int kTiles, Kind kind>  // tiles of 8 tokens
__global__ void __launch_bounds__(kThreads, 1) gemv_mma_many_kernel(const __grid_constant__ Gemv p) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  run_job<kind, kTiles>(p, job_of_block(p), memory);
}

// How many blocks and warps divide K, so that the tokens fit and the busiest warp has the fewest stretches.
bool choose_parts(Gemv& p, const int (&clusters)[kMaxSplitBits + 1]) {
  double least = 0;
  int best_split = -1, best_span = 0;
  for (p.split_bits = 0; p.split_bits <= kMaxSplitBits && p.splits() <= p.stretches(); ++p.split_bits) {
    if (clusters[p.split_bits] < p.jobs) continue;
    divide(p, clusters[p.split_bits]);
    const int least_stretches = p.stretches() >> p.split_bits;
    for (p.span_bits = 0; p.split_bits + p.span_bits <= kMaxPartBits && spans(p) <= least_stretches; ++p.span_bits) {
      if (shared_bytes(p) > kMaxShared) continue;
      double slowest = 0;
      for (int j = 0; j < p.jobs; ++j) {
        const int tiles = p.job[j].most_tiles(), rounds = int(ceil_div(tiles, groups(p)));
        const double busy = tiles < groups(p) ? double(tiles) / groups(p) : 1;  // of the warps: the fewer, the faster
        const double stretches = double(ceil_div(p.most_stretches(), spans(p))) + (parts(p) > 1 ? 0.25 : 0.05);
        const double cost = rounds * stretches * (0.4 + 0.6 * busy);
        slowest = cost > slowest ? cost : slowest;
      }
      const double cost = slowest + 0.1 * (p.split_bits + p.span_bits) + (p.split_bits > 0 ? 0.4 : 0);
      if (best_split < 0 || cost < least) best_split = p.split_bits, best_span = p.span_bits, least = cost;
    }
  }
  if (best_split < 0) return false;
  p.split_bits = best_split;
  p.span_bits = best_span;
  divide(p, clusters[best_split]);
  return true;
}

// Jobs of one format: one launch, or several for fewer tokens each where so many do not fit shared memory.
cudaError_t start_kind(const Gemv& call, Kind kind, const Clusters& clusters, cudaStream_t stream) {
  for (int most = kMaxTokens; most >= kFewTokens; most /= 2) {
    Gemv p = call;
    p.tokens = call.tokens < most ? call.tokens : most;
    if (!choose_parts(p, clusters.count)) continue;
    const int step = p.tokens;
    for (int first = 0; first < call.tokens; first += step) {
      const Gemv part = part_of(p, first, call.tokens - first < step ? call.tokens - first : step);
      const cudaError_t error = for_kind(kind, [&](auto constant) {
        constexpr Kind kKind = Kind(decltype(constant)::value);
        const int shared = shared_bytes(part);
        if (step <= 16) return start_kernel<gemv_mma_many_kernel<2, kKind>, false>(part, shared, stream);
        return start_kernel<gemv_mma_many_kernel<4, kKind>, false>(part, shared, stream);
      });
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

// A launch for each format: with so many tokens a kernel for several would not keep its sums in registers.
cudaError_t start_many(const Gemv& call, cudaStream_t stream) {
  static const Clusters clusters(gemv_mma_many_kernel<4, Kind::nvfp4>);
  if (clusters.error != cudaSuccess) return clusters.error;
  for (int j = 0; j < call.jobs;) {
    const Kind kind = call.job[j].kind;
    Gemv p = call;
    for (p.jobs = 0; j < call.jobs && call.job[j].kind == kind; ++j) p.job[p.jobs++] = call.job[j];
    const cudaError_t error = start_kind(p, kind, clusters, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace gemv
}  // namespace dsv4
