// gemv_mma: linear, linear_stack and grouped_linear of ops/gemm/reference.py for up to 32 tokens; weights of any
// format.
//
// Every weight is read once: N K (0.5 + 1/16) bytes of NVFP4, 18.9 MB at 8192 x 4096, 4.3 us of an H200's memory. That
// is what takes the time, so everything else is small beside it. The grid has a block a multiprocessor; gemv.cuh says
// what each of them and its warps do. Here, for up to 8 tokens, warps multiply the units with the tokens, which lie in
// shared memory; a unit's 16 x T sums go to shared memory; a barrier later they are added over K in ascending order,
// scaled, rounded once and stored. The order depends on the shape of the matrix alone: a token's result has the same
// bits beside any other seven. For more tokens see gemv_mma_many.cu.
//
// Overlapping launches (common/overlap.cuh) start copying weights before the launch before has ended: weights are
// constants.
// sass gemv_mma_kernel: HMMA.16816.F32, LDS.128
#include "gemm/gemv.cuh"

namespace dsv4 {
namespace gemv {
namespace {

constexpr int kTokenStride = 20;  // floats between the sums of two tokens: no two lanes of a warp share a bank
// Barriers, what is known of tokens, and the matrices' global scales.
constexpr int kBarriers = kRingBarriers + 2;
constexpr int kHeadBytes = 8 * kBarriers + int(sizeof(Head));
constexpr int kHalfShared = 113 * 1024;  // two blocks fit a multiprocessor: the launch after may begin

// Dynamic shared memory of a block: the warps' rings, barriers and scales, tokens, the sums of spans, and those of a
// cluster's blocks for the tiles that this block of it finishes. Buffers of chunks take turns.
struct Layout {
  int tokens, sums, exchange, total;
  int slot_floats, buffer_floats, part_floats, exchange_floats;

  __host__ __device__ Layout(const Gemv& p, int spans, int chunk_tiles) {
    const int splits = p.splits(), own_tiles = (chunk_tiles + splits - 1) >> p.split_bits;
    slot_floats = p.tokens * kTokenStride;
    buffer_floats = chunk_tiles * spans * slot_floats;
    part_floats = own_tiles * kUnitRows * p.tokens;
    exchange_floats = splits > 1 ? splits * part_floats : 0;
    tokens = kRingBytes + kHeadBytes;
    sums = tokens + p.tokens * token_pitch(p.most_stretches() * kStretch);
    exchange = sums + p.buffers * buffer_floats * 4;
    total = exchange + p.buffers * exchange_floats * 4;
  }
};

// A block's part of a job, of which warps take spans.
struct FewRun : Run {
  int span, spans;  // the last ones may be empty, where a block has fewer stretches

  __device__ FewRun(const Gemv& p, const Job& job, int cluster, int rank)
      : Run(p, job, cluster, rank), span(job.span), spans(job.spans) {}
};

// A warp's way through a run: unit after unit of its spans, which are every sixteenth.
template <Kind kind>
struct Walk {
  static constexpr int kUnits = kStretch / unit_columns(kind);  // of a stretch
  int tile, span, unit, end;                                    // units of this span, counted from the tile's first here

  __device__ Walk(const FewRun& run, int warp) : tile(0), span(warp) { settle(run); }
  __device__ void settle(const FewRun& run) {
    while (span >= run.spans) span -= run.spans, ++tile;
    unit = min(span * run.span, run.stretches) * kUnits;
    end = min(span * run.span + run.span, run.stretches) * kUnits;
  }
  __device__ void next_span(const FewRun& run) {
    span += kWarps;
    settle(run);
  }
  // Past empty spans, to a unit that exists or past the last tile.
  __device__ void find(const FewRun& run) {
    while (unit >= end && tile < run.tiles) next_span(run);
  }
};

constexpr int kMostPieces = 8;  // of 256 columns of a token, that one warp brings to shared memory

// A run's columns of x to shared memory as multiply_step reads them, zeros past the last one. For weights that become
// fp16 each token is scaled; head.inverse undoes it. Not by bulk copies: those would queue behind the weights'.
// `between` is done while the tokens are on their way.
template <Kind kind, class Between>
__device__ inline void load_tokens(const Gemv& p, const Job& job, const FewRun& run, unsigned char* tokens, Head& head,
                                   const Between& between) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = run.first_stretch * kStretch, pitch = token_pitch(run.stretches * kStretch);
  const int pieces = run.stretches * p.tokens, per_token = 65536 / run.stretches + 1;  // its inverse
  uint4 held[kMostPieces];
  // Piece i of this warp: which token and stretch.
  auto each_piece = [&](auto&& do_this) {
#pragma unroll
    for (int i = 0; i < kMostPieces; ++i) {
      const int number = warp + i * kWarps;
      if (number >= pieces) return;
      const int token = number * per_token >> 16;
      do_this(held[i], token, number - token * run.stretches);
    }
  };
  each_piece([&](uint4& piece, int token, int stretch) {
    const int column = first + stretch * kStretch + 8 * lane;
    piece = {};
    if (column < p.columns) piece = load_piece(p.x + token * p.x_stride + job.column + column);
  });
  between();
  if constexpr (is_half(kind)) {
    __syncthreads();  // head.largest is zero
    each_piece([&](const uint4& piece, int token, int) {
      const uint32_t most = __reduce_max_sync(kFullMask, largest_bits(piece));
      if (lane == 0) atomicMax(head.largest + token, most);
    });
    __syncthreads();
    if (threadIdx.x < p.tokens) {
      head.inverse[threadIdx.x] = TokenScale(head.largest[threadIdx.x]).inverse * unit_factor(kind);
    }
  }
  each_piece([&](const uint4& piece, int token, int stretch) {
    const uint4 v = is_half(kind) ? scale_to_f16(piece, TokenScale(head.largest[token]).factor) : piece;
    *reinterpret_cast<uint4*>(tokens + token * pitch + 2 * kStretch * stretch + token_piece_at<kind>(lane)) = v;
  });
}

// Four rows of a tile.
template <Kind kind>
__device__ inline void store_output(const Gemv& p, const Job& job, const Head& head, int tile, int row, int token,
                                    float4 sum) {
  const Matrix& matrix = matrix_of(p, job, tile);
  const int n = (tile - matrix.first_tile) * kUnitRows + row;
  const float scale = kind == Kind::nvfp4 ? head.global_scale[&matrix - p.matrix] : 1.0f;
  float y[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!is_half(kind)) y[i] *= unit_factor(kind);
    if (p.token_scale != nullptr) y[i] *= head.token_scale[token];
    if (kind == Kind::nvfp4) y[i] *= scale;
  }
  const int64_t at = token * matrix.stride + n;
  const bool whole = n + 4 <= matrix.rows && matrix.stride % 4 == 0;
  if (matrix.out_f32) {
    float* to = static_cast<float*>(matrix.out) + at;
    if (whole) {
      *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (n + i < matrix.rows) to[i] = y[i];
      }
    }
  } else {
    bf16* to = static_cast<bf16*>(matrix.out) + at;
    Vector<bf16, 4> rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = __float2bfloat16_rn(y[i]);
    if (whole) {
      store_vector(to, rounded);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (n + i < matrix.rows) to[i] = rounded[i];
      }
    }
  }
}

// Sums of a span to its slot. A lane alone reads and writes its places: units of FP8, each with its scale, add up
// there.
template <Kind kind, int kChains>
__device__ inline void put_sums(const Gemv& p, float* slot, int g, int t, const float (&sum)[kChains][4],
                                float scale, bool add) {
  float* to = slot + 2 * t * kTokenStride + g;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float whole = kChains == 2 ? sum[0][e] + sum[kChains - 1][e] : sum[0][e];
    float* place = to + e % 2 * kTokenStride + 8 * (e / 2);
    if (2 * t + e % 2 < p.tokens) {
      if constexpr (kind == Kind::fp8) whole = add ? fmaf(whole, scale, *place) : whole * scale;
      *place = whole;
    }
  }
}

template <Kind kind>
__device__ void run_job(const Gemv& p, const Job& job, unsigned char* memory) {
  const int cluster = (blockIdx.x >> p.split_bits) - job.first_cluster, rank = blockIdx.x & (p.splits() - 1);
  constexpr int kUnits = Walk<kind>::kUnits, kColumns = unit_columns(kind);
  constexpr int kChains = kind == Kind::fp8 ? 1 : 2;  // of dependent MMAs
  // Known to the compiler as the same for all lanes.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const FewRun run(p, job, cluster, rank);
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory)), barriers = shared + kRingBytes;
  const uint32_t exchange_barrier = barriers + 8 * kWarps * kSlots;
  Head& head = *reinterpret_cast<Head*>(memory + kRingBytes + 8 * kBarriers);

  Walk<kind> at(run, warp), ahead = at;
  const uint8_t* ahead_at = nullptr;  // packed: the next unit of a span
  auto next_unit = [&] {
    const bool same_span = ahead.unit < ahead.end && ahead_at != nullptr;
    if (!same_span) ahead.find(run);
    const int tile = run.first_tile + ahead.tile, block = run.first_stretch * kUnits + ahead.unit;
    ++ahead.unit;
    Source<kind> source;
    source.exists = ahead.tile < run.tiles;
    if constexpr (is_packed(kind)) {
      if (!same_span) ahead_at = unit_at<kind>(p, job, tile, block, lane);
      source.unit = ahead_at;
      ahead_at += unit_bytes(kind);
    } else {
      source.unit = unit_at<kind>(p, job, tile, block, lane);
    }
    return source;
  };
  Ring<kind, kSlots> ring(shared + warp * kSlots * kUnitShared, barriers + 8 * warp * kSlots, lane);
  auto prepare = [&] {
    ring.fill(next_unit);
    prepare_head<kind>(p, job, head);
    if (p.split_bits > 0) {
      if (threadIdx.x == 0) {
        make_barrier(exchange_barrier, 1);
        publish_barriers();
      }
      cluster_arrive_relaxed();
    }
  };
  const Layout layout(p, run.spans, p.chunk_tiles);
  if (p.overlap) prepare();
  wait_for_launch_before();
  load_tokens<kind>(p, job, run, memory + layout.tokens, head, [&] {
    if (!p.overlap) prepare();
    if (p.token_scale != nullptr && threadIdx.x < p.tokens) head.token_scale[threadIdx.x] = p.token_scale[threadIdx.x];
  });
  __syncthreads();
  const uint32_t token_at = shared + layout.tokens + min(g, p.tokens - 1) * token_pitch(run.stretches * kStretch) + 16 * t;

  int parity = 0;  // of the chunk's number
  for (int chunk = 0; chunk < run.tiles; chunk += p.chunk_tiles, parity ^= 1) {
    const int buffer = p.buffers == 2 ? parity : 0;
    float* sums = reinterpret_cast<float*>(memory + layout.sums) + buffer * layout.buffer_floats;
    const int end = min(chunk + p.chunk_tiles, run.tiles);
    for (; at.tile < end; at.next_span(run)) {
      float* slot = sums + ((at.tile - chunk) * run.spans + at.span) * layout.slot_floats;
      float sum[kChains][4] = {};
      const int first = at.unit;
      for (int unit = first; unit < at.end; ++unit) {
        const int token_offset = unit * (kColumns / kHalf * kHalfBytes);
        ring.take(next_unit, [&](int half, const uint32_t(&a)[kSteps][4]) {
          uint32_t x[kSteps][2];
          read_tokens(token_at + token_offset + half * kHalfBytes, x);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) multiply_step<kind>(sum[i % kChains], a[i], x[i]);
        });
        if constexpr (kind == Kind::fp8) {
          const int tile = run.first_tile + at.tile;
          const float scale = block_scale_of(p, matrix_of(p, job, tile), tile, run.first_stretch * kUnits + unit);
          put_sums<kind>(p, slot, g, t, sum, scale, unit > first);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[0][i] = 0.0f;
        }
      }
      if (kind != Kind::fp8 || first >= at.end) put_sums<kind>(p, slot, g, t, sum, 1.0f, false);
    }
    __syncthreads();

    // Over K in ascending order: a thread the sums of four rows for its block, then for its cluster.
    constexpr int kQuads = kUnitRows / 4;
    const int tiles = end - chunk, quad = threadIdx.x % kQuads;
    auto sum_of = [&](int tile, int token) {
      const float* from = sums + tile * run.spans * layout.slot_floats + token * kTokenStride + 4 * quad;
      float4 sum = {};
#pragma unroll 4
      for (int s = 0; s < run.spans; ++s, from += layout.slot_floats) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      const float factor = is_half(kind) ? head.inverse[token] : 1.0f;
      return make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
    };
    auto each_output = [&](int count, auto&& do_this) {
      for (int pair = threadIdx.x / kQuads; pair < count * p.tokens; pair += kThreads / kQuads) {
        const int tile = int((pair + 0.5f) * p.tokens_inverse);
        do_this(tile, pair - tile * p.tokens);
      }
    };
    if (p.split_bits == 0) {
      each_output(tiles, [&](int tile, int token) {
        store_output<kind>(p, job, head, run.first_tile + chunk + tile, 4 * quad, token, sum_of(tile, token));
      });
    } else {
      // Tile i of the chunk is finished by block i % splits, which waits for the sums of all blocks.
      const int splits = p.splits(), mask = splits - 1;
      const int own = (tiles - rank + mask) >> p.split_bits;
      const int exchange = layout.exchange + buffer * layout.exchange_floats * 4;
      if (threadIdx.x == 0 && own > 0) expect_bytes(exchange_barrier, splits * own * kUnitRows * p.tokens * 4);
      // Until barriers are made, and the sums of the chunk before have been read.
      if (p.buffers == 2 || chunk == 0) cluster_wait();
      each_output(tiles, [&](int tile, int token) {
        const int place = ((tile >> p.split_bits) * p.tokens + token) * kUnitRows + 4 * quad;
        store_remote_counted(shared + exchange + 4 * (rank * layout.part_floats + place), exchange_barrier, tile & mask,
                             sum_of(tile, token));
      });
      if (own > 0) wait_barrier(exchange_barrier, parity);
      each_output(own, [&](int tile, int token) {
        const float* from = reinterpret_cast<const float*>(memory + exchange) + (tile * p.tokens + token) * kUnitRows + 4 * quad;
        float4 sum = {};
        for (int r = 0; r < splits; ++r, from += layout.part_floats) {
          const float4 v = *reinterpret_cast<const float4*>(from);
          sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        store_output<kind>(p, job, head, run.first_tile + chunk + (tile << p.split_bits) + rank, 4 * quad, token, sum);
      });
      cluster_arrive_relaxed();
      if (p.buffers == 1) cluster_wait();
    }
    if (p.buffers == 1) __syncthreads();
  }
  if (p.split_bits > 0 && p.buffers == 2) cluster_wait();
}

// Of matrices of one format, of which two blocks fit a multiprocessor, or of several.
constexpr int kAny = -1;
template <int kKind>
__global__ void __launch_bounds__(kThreads, kKind != kAny && DSV4_ARCH == 90 ? 2 : 1)
    gemv_mma_kernel(const __grid_constant__ Gemv p) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  const Job& job = job_of_block(p);
  if constexpr (kKind != kAny) {
    run_job<Kind(kKind)>(p, job, memory);
  } else {
    switch (job.kind) {
      case Kind::nvfp4: return run_job<Kind::nvfp4>(p, job, memory);
      case Kind::mxfp4: return run_job<Kind::mxfp4>(p, job, memory);
      case Kind::fp8: return run_job<Kind::fp8>(p, job, memory);
      case Kind::bf16: return run_job<Kind::bf16>(p, job, memory);
    }
  }
}

// How many stretches a warp adds up: as many as leave every warp the same work, or nearly.
int choose_span(const Gemv& p, const Job& job) {
  const int stretches = p.most_stretches(), tiles = job.most_tiles();
  int best = 1;
  double least = 0;
  for (int span = 1; span <= stretches; span *= 2) {
    const int64_t items = int64_t(tiles) * ((stretches + span - 1) / span);
    const double cost = double(ceil_div(items, kWarps)) * (span + 0.1);  // a span's end costs a tenth of a stretch
    if (span == 1 || cost < least) best = span, least = cost;
  }
  return best;
}

// How many blocks divide K: at least what lets the tokens fit, then what spreads the bytes best. A function of the
// matrices alone, so that their bits do not depend on how many tokens there are.
bool choose_splits(Gemv& p, const int (&clusters)[kMaxSplitBits + 1]) {
  constexpr int kFit = 16;
  int best = -1;
  double least = 0;
  for (p.split_bits = 0; p.split_bits <= kMaxSplitBits && p.splits() <= p.stretches(); ++p.split_bits) {
    const int splits = p.splits();
    const bool last = p.split_bits == kMaxSplitBits || 2 * splits > p.stretches();
    if ((p.most_stretches() > kFit && !last) || clusters[p.split_bits] < p.jobs) continue;
    // Every doubling must be worth 4 %: blocks wait for each other.
    const double bytes = double(divide(p, clusters[p.split_bits])) / splits * (1 + 0.04 * p.split_bits);
    if (best < 0 || bytes < least) best = p.split_bits, least = bytes;
  }
  if (best < 0) return false;
  p.split_bits = best;
  divide(p, clusters[best]);
  for (int j = 0; j < p.jobs; ++j) {
    Job& job = p.job[j];
    job.span = choose_span(p, job);
    job.spans = (p.most_stretches() + job.span - 1) / job.span;
  }
  return true;
}

int most_spans(const Gemv& p) {
  int most = 1;
  for (int j = 0; j < p.jobs; ++j) most = max(most, p.job[j].spans);
  return most;
}

// As many tiles in a chunk as shared memory holds, at least one; the bytes of shared memory, or 0 if one does not fit.
// Half of a multiprocessor's is taken if it holds four tiles: then launches overlap.
int choose_chunk(Gemv& p) {
  int tiles = 1;
  for (int j = 0; j < p.jobs; ++j) tiles = max(tiles, p.job[j].most_tiles());
  const int spans = most_spans(p);
  if (p.tokens * p.most_stretches() > kMostPieces * kWarps) return 0;
  auto fits = [&](int chunk, int buffers, int limit) {
    p.chunk_tiles = chunk;
    p.buffers = buffers;
    return chunk <= kThreads && Layout(p, spans, chunk).total <= limit;
  };
  auto most = [&](int buffers, int limit) {
    int chunk = min(tiles, 64);
    while (chunk > 0 && !fits(chunk, buffers, limit)) --chunk;
    return chunk;
  };
  bool found = fits(tiles, 1, kHalfShared) || most(2, kHalfShared) >= 4 || fits(tiles, 1, kMaxShared);
  if (!found && most(2, kMaxShared) * spans < kWarps) {
    // With one buffer more warps have something to do in every chunk.
    int chunk = most(1, kMaxShared);
    if (chunk * spans > kWarps) chunk = max(kWarps / spans, 1);
    if (chunk == 0) return 0;
    fits(chunk, 1, kMaxShared);
  }
  return Layout(p, spans, p.chunk_tiles).total;
}

cudaError_t start_few(const Gemv& call, cudaStream_t stream) {
  static const Clusters clusters(gemv_mma_kernel<kAny>);
  if (clusters.error != cudaSuccess) return clusters.error;
  Gemv p = call;
  if (!choose_splits(p, clusters.count)) return cudaErrorInvalidValue;
  p.tokens_inverse = 1.0f / float(p.tokens);
  const int shared = choose_chunk(p);
  if (shared == 0) return cudaErrorInvalidValue;
  for (int j = 1; j < p.jobs; ++j) {
    if (p.job[j].kind != p.job[0].kind) return start_kernel<gemv_mma_kernel<kAny>, true>(p, shared, stream);
  }
  return for_kind(p.job[0].kind, [&](auto constant) {
    constexpr int kKind = int(decltype(constant)::value);
    return start_kernel<gemv_mma_kernel<kKind>, true>(p, shared, stream);
  });
}

}  // namespace
}  // namespace gemv

cudaError_t gemv_mma(In x, Maybe<const float> token_scale, TensorList weights, TensorList scales, TensorList outs,
                     IntegerList kinds, IntegerList rows, int64_t tokens, int64_t columns, int64_t groups, bool overlap, cudaStream_t stream) {
  using namespace gemv;
  if (weights.count > kMaxMatrices || groups > kMaxJobs || (groups > 1 && weights.count > 1)) return cudaErrorInvalidValue;
  if (columns % 16 || tokens > kMaxTokens || tokens < 1 || x.type != Type::bf16) return cudaErrorInvalidValue;
  if (uintptr_t(x.data) % 16) return cudaErrorMisalignedAddress;
  Gemv p = {};
  p.x = static_cast<const bf16*>(x.data);
  p.x_stride = columns * groups;
  p.token_scale = token_scale.data;
  p.tokens = int(tokens);
  p.columns = int(columns);
  p.matrices = weights.count;
  p.overlap = overlap;
  for (int i = 0; i < weights.count; ++i) {
    const Kind kind = Kind(kinds.at[i]);
    Matrix& m = p.matrix[i];
    m = {static_cast<const uint8_t*>(weights.at[i].data), scales.at[i].data, const_cast<void*>(outs.at[i].data), rows.at[i]};
    m.rows = int(rows.at[i]);
    m.out_f32 = outs.at[i].type == Type::f32;
    m.e8m0 = scales.at[i].type == Type::e8m0;
    if (uintptr_t(m.data) % 16) return cudaErrorMisalignedAddress;
    if (!m.out_f32 && outs.at[i].type != Type::bf16) return cudaErrorInvalidValue;
    // A matrix joins the job before it if it has the same format.
    const bool joins = p.jobs > 0 && p.job[p.jobs - 1].kind == kind;
    if (!joins) p.job[p.jobs++] = {.kind = kind, .first_matrix = i};
    Job& job = p.job[p.jobs - 1];
    m.first_tile = job.tiles;
    ++job.matrices;
    job.tiles += int(ceil_div(rows.at[i], kUnitRows));
  }
  if (groups > 1) {
    if (rows.at[0] % (groups * kUnitRows)) return cudaErrorInvalidValue;
    const Job whole = p.job[0];
    for (int g = 0; g < groups; ++g) {
      Job& job = p.job[g] = whole;
      job.tiles = whole.tiles / int(groups);
      job.first_tile = g * job.tiles;
      job.column = int(g * columns);
    }
    p.jobs = int(groups);
  }
  return tokens <= kFewTokens ? start_few(p, stream) : start_many(p, stream);
}

}  // namespace dsv4
