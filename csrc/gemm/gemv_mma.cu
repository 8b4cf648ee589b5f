// gemv_mma: linear, linear_stack and grouped_linear of ops/gemm/reference.py for up to 32 tokens; weights of any
// format.
//
// Every weight is read once: N K (0.5 + 1/16) bytes of NVFP4, 18.9 MB at 8192 x 4096, 4.3 us of an H200's memory. That
// is what takes the time, so everything else is small beside it. The grid has a block a multiprocessor; gemv.cuh says
// what each of them does. Here, for up to 8 tokens, the warps of a block divide its units evenly, one stretch of K
// after another, and multiply them with the tokens, which lie in shared memory. A warp adds up its part of a row tile;
// one barrier later these sums are added over K in ascending order, scaled, rounded once and stored. The order depends
// on the shape of the matrix alone: a token's result has the same bits beside any other seven. For more tokens see
// gemv_mma_many.cu.
//
// Overlapping launches (common/overlap.cuh) start copying weights before the launch before has ended: weights are
// constants. What a multiprocessor asks memory for comes in the order in which it asked, be it in L2 or not: 74 KB of
// weights under way are 2 us in which no token arrives and no launch ends. So global scales and, where launches do not
// overlap, tokens are asked for before the weights; where they do, a warp's second unit is asked for when its first is
// there.
// sass gemv_mma_kernel: HMMA.16816.F32, LDS.128
#include "gemm/gemv.cuh"
#include "gemm/sums.cuh"

namespace dsv4 {
namespace gemv {
namespace {

// Barriers, what is known of tokens, and the matrices' global scales.
constexpr int kBarriers = kRingBarriers + 2;
constexpr int kHeadBytes = 8 * kBarriers + int(sizeof(Head));

// The slots that hold a tile's sums, from `first` to `last`: of one warp after another, each of its part of K.
struct TileSlots {
  int first, last;
};

// Dynamic shared memory of a block: the warps' rings, barriers and scales, what tokens were scaled by, which slots hold
// the sums of a tile, tokens, these slots, and those of a cluster's blocks for the tiles that this block finishes.
struct Layout {
  int inverse, tile_slots, tokens, sums, exchange, total;
  int slot_floats, part_floats;

  __host__ __device__ Layout(const Gemv& p, int tiles) {
    const int splits = p.splits(), own_tiles = (tiles + splits - 1) >> p.split_bits;
    slot_floats = p.tokens * kSumStride;
    part_floats = own_tiles * kUnitRows * p.tokens;
    inverse = kRingBytes + kHeadBytes;
    tile_slots = inverse + p.most_stretches() * kFewTokens * 4;
    tokens = tile_slots + (tiles * int(sizeof(TileSlots)) + 15) / 16 * 16;
    sums = tokens + p.tokens * token_pitch(p.most_stretches() * kStretch);
    exchange = sums + (tiles + kWarps - 1) * slot_floats * 4;
    total = exchange + (splits > 1 ? splits * part_floats * 4 : 0);
  }
};

// A warp's part of a block's run, whose stretches, of one tile after another, the warps divide evenly; only the last
// warps may have none.
struct Part {
  int tile, stretch, left;  // where the next stretch is; how many there are still

  __device__ Part(const Run& run, int warp) {
    const int all = run.tiles * run.stretches;
    auto first_of = [&](int w) { return all < kWarps ? min(w, all) : all * w / kWarps; };
    const int first = first_of(warp);
    left = first_of(warp + 1) - first;
    tile = divide_fast(first, run.stretches);
    stretch = first - tile * run.stretches;
  }
};

// The units of a part, one after another, as the ring copies them.
template <Kind kind>
class Units {
 public:
  __device__ Units(const Gemv& p, const Job& job, const Run& run, const Part& part, int lane)
      : p_(p), job_(job), run_(run), part_(part), lane_(lane) {}

  __device__ Source<kind> next() {
    Source<kind> source;
    if constexpr (is_packed(kind)) {
      if (together_ == 0) find();
      source.exists = together_ > 0;
      source.unit = at_;
      together_ -= source.exists;
      at_ += unit_bytes(kind);
    } else {
      constexpr int kUnits = kStretch / unit_columns(kind);  // of a stretch
      source.exists = part_.left > 0;
      if (source.exists) {
        const int tile = run_.first_tile + part_.tile, first = (run_.first_stretch + part_.stretch) * kUnits;
        source.unit = unit_at<kind>(p_, job_, tile, first + unit_, lane_);
        if (++unit_ == kUnits) {
          unit_ = 0, --part_.left;
          if (++part_.stretch == run_.stretches) part_.stretch = 0, ++part_.tile;
        }
      }
    }
    return source;
  }

 private:
  // The units from the part's next one on that lie without gaps: a matrix's, or a tile's if blocks divide K.
  __device__ void find() {
    if (part_.left == 0) return;
    const int tile = run_.first_tile + part_.tile;
    const Matrix& matrix = matrix_of(p_, job_, tile);
    at_ = unit_at<kind>(p_, job_, tile, run_.first_stretch + part_.stretch, lane_);
    int tiles = 1;
    if (p_.split_bits == 0) tiles = matrix.first_tile + int(ceil_div(matrix.rows, kUnitRows)) - tile;
    together_ = min(part_.left, tiles * run_.stretches - part_.stretch);
    part_.left -= together_;
    part_.tile += tiles;
    part_.stretch = 0;
  }

  const Gemv& p_;
  const Job& job_;
  const Run& run_;
  Part part_;  // what has not been found
  int lane_;
  int unit_ = 0;                 // FP8, bf16: the next one of its stretch
  int together_ = 0;             // packed: units that lie at at_
  const uint8_t* at_ = nullptr;
};

// Pieces, stretches of tokens, that a warp brings to shared memory, at most. There are kernels for the fewer, which
// take at most 33 KB of a block: two blocks, of a launch and the one before, then fit a multiprocessor.
constexpr int kFewPieces = 4, kMostPieces = 8;

// A run's columns of x on their way to shared memory, where they lie as multiply_step reads them, zeros past the last
// one. Every sixteenth piece is a warp's.
template <Kind kind, int kPiecesOfWarp>
class Tokens {
 public:
  __device__ Tokens(const Gemv& p, const Job& job, const Run& run, int warp, int lane)
      : p_(p), job_(job), run_(run), warp_(warp), lane_(lane) {}

  // Start reading them.
  __device__ void load(uint4 (&held)[kPiecesOfWarp]) const {
    Place at = first();
#pragma unroll
    for (int i = 0; i < kPiecesOfWarp; ++i) {
      if (warp_ + kWarps * i >= run_.stretches * p_.tokens) break;
      const int column = (run_.first_stretch + at.stretch) * kStretch + 8 * lane_;
      held[i] = {};
      if (column < p_.columns) held[i] = load_piece(p_.x + at.token * p_.x_stride + job_.column + column);
      step(at);
    }
  }
  // To shared memory; for weights that become fp16 as fp16: every piece is scaled, and `inverse` [stretches, 8] undoes
  // it.
  __device__ void store(const uint4 (&held)[kPiecesOfWarp], unsigned char* tokens, float* inverse) const {
    const int pitch = token_pitch(run_.stretches * kStretch);
    tokens += token_piece_at<kind>(lane_);
    Place at = first();
#pragma unroll
    for (int i = 0; i < kPiecesOfWarp; ++i) {
      if (warp_ + kWarps * i >= run_.stretches * p_.tokens) break;
      uint4 piece = held[i];
      if constexpr (is_half(kind)) {
        const TokenScale scale(__reduce_max_sync(kFullMask, largest_bits(piece)));
        piece = scale_to_f16(piece, scale.factor);
        if (lane_ == 0) inverse[at.stretch * kFewTokens + at.token] = scale.inverse * unit_factor(kind);
      }
      *reinterpret_cast<uint4*>(tokens + at.token * pitch + 2 * kStretch * at.stretch) = piece;
      step(at);
    }
  }

 private:
  struct Place {
    int token, stretch;
  };
  __device__ Place first() const {
    Place at = {0, warp_};
    settle(at);
    return at;
  }
  __device__ void step(Place& at) const {
    at.stretch += kWarps;
    settle(at);
  }
  __device__ void settle(Place& at) const {
    while (at.stretch >= run_.stretches) at.stretch -= run_.stretches, ++at.token;
  }

  const Gemv& p_;
  const Job& job_;
  const Run& run_;
  int warp_, lane_;
};

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
    if (p.token_scale != nullptr) y[i] *= head.token_scale[token];
    if (kind == Kind::nvfp4) y[i] *= scale;
  }
  const int64_t at = token * matrix.stride + n;
  const bool whole = n + 4 <= matrix.rows && matrix.stride % 4 == 0;
  Vector<bf16, 4> rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = __float2bfloat16_rn(y[i]);
  float* out_f32 = static_cast<float*>(matrix.out) + at;
  bf16* out = static_cast<bf16*>(matrix.out) + at;
  if (whole && matrix.out_f32) {
    *reinterpret_cast<float4*>(out_f32) = make_float4(y[0], y[1], y[2], y[3]);
  } else if (whole) {
    store_vector(out, rounded);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i >= matrix.rows) break;
      if (matrix.out_f32) {
        out_f32[i] = y[i];
      } else {
        out[i] = rounded[i];
      }
    }
  }
}

template <Kind kind, int kPiecesOfWarp>
__device__ void run_job(const Gemv& p, const Job& job, unsigned char* memory) {
  const int cluster = (blockIdx.x >> p.split_bits) - job.first_cluster, rank = blockIdx.x & (p.splits() - 1);
  constexpr int kColumns = unit_columns(kind), kUnits = kStretch / kColumns;  // of a stretch
  constexpr int kChains = kind == Kind::fp8 ? 1 : 2;  // of dependent MMAs
  // Known to the compiler as the same for all lanes.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, thread = warp * kWarp + lane;
  const Run run(p, job, cluster, rank);
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory)), barriers = shared + kRingBytes;
  const uint32_t exchange_barrier = barriers + 8 * kWarps * kSlots;
  const Layout layout(p, run.tiles);
  Head& head = *reinterpret_cast<Head*>(memory + kRingBytes + 8 * kBarriers);
  float* inverse = reinterpret_cast<float*>(memory + layout.inverse);
  TileSlots* tile_slots = reinterpret_cast<TileSlots*>(memory + layout.tile_slots);
  float* sums = reinterpret_cast<float*>(memory + layout.sums);

  Part part(run, warp);
  Units<kind> units(p, job, run, part, lane);
  auto next_unit = [&] { return units.next(); };
  Ring<kind, kSlots> ring(shared + warp * kSlots * kUnitShared, barriers + 8 * warp * kSlots, lane);
  auto prepare = [&] {
    const float scale = global_scale_of<kind>(p, job);
    ring.fill(next_unit, p.overlap);
    if (thread < job.matrices) head.global_scale[job.first_matrix + thread] = scale;
    if (p.split_bits > 0) {
      if (thread == 0) {
        make_barrier(exchange_barrier, 1);
        publish_barriers();
      }
      cluster_arrive_relaxed();
    }
  };
  const Tokens<kind, kPiecesOfWarp> tokens(p, job, run, warp, lane);
  uint4 held[kPiecesOfWarp];
  if (!p.overlap) tokens.load(held);
  prepare();
  wait_for_launch_before();
  if (p.overlap) tokens.load(held);
  if (p.token_scale != nullptr && thread < p.tokens) head.token_scale[thread] = p.token_scale[thread];
  tokens.store(held, memory + layout.tokens, inverse);
  __syncthreads();

  const int pitch = token_pitch(run.stretches * kStretch);
  const uint32_t token_at = shared + layout.tokens + min(g, p.tokens - 1) * pitch + 16 * t;
  while (part.left > 0) {
    // This warp's part of a tile.
    const int first = part.stretch, count = min(part.left, run.stretches - first), slot = part.tile + warp;
    float sum[4] = {};
    float chain[kChains][4] = {};
    for (int unit = first * kUnits; unit < (first + count) * kUnits; ++unit) {
      const int token_offset = unit * (kColumns / kHalf * kHalfBytes);
      ring.take(next_unit, [&](int half, const uint32_t(&a)[kSteps][4]) {
        uint32_t x[kSteps][2];
        read_tokens(token_at + token_offset + half * kHalfBytes, x);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) multiply_step<kind>(chain[i % kChains], a[i], x[i]);
      });
      if constexpr (is_half(kind)) {
        float2 factor = *reinterpret_cast<const float2*>(inverse + unit / kUnits * kFewTokens + 2 * t);
        if constexpr (kind == Kind::fp8) {
          const int tile = run.first_tile + part.tile;
          const float scale = block_scale_of(p, matrix_of(p, job, tile), tile, run.first_stretch * kUnits + unit);
          factor.x *= scale, factor.y *= scale;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float of_unit = kChains == 2 ? chain[0][e] + chain[kChains - 1][e] : chain[0][e];
          sum[e] = fmaf(of_unit, e % 2 ? factor.y : factor.x, sum[e]);
          chain[0][e] = chain[kChains - 1][e] = 0.0f;
        }
      }
    }
    float* to = sums + slot * layout.slot_floats + 2 * t * kSumStride + g;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!is_half(kind)) sum[e] = (chain[0][e] + chain[kChains - 1][e]) * unit_factor(kind);
      if (2 * t + e % 2 < p.tokens) to[e % 2 * kSumStride + 8 * (e / 2)] = sum[e];
    }
    if (first == 0) tile_slots[part.tile].first = slot;
    if (first + count == run.stretches) tile_slots[part.tile].last = slot;
    part.left -= count;
    part.stretch = 0;
    ++part.tile;
  }
  __syncthreads();

  // Over K in ascending order: a thread the sums of four rows for its block, then for its cluster.
  const int quad = thread % kQuads;
  auto sum_of = [&](int tile, int token) {
    const TileSlots slots = tile_slots[tile];
    const float* from = sums + slots.first * layout.slot_floats + token * kSumStride + 4 * quad;
    return add_slots(from, slots.last - slots.first + 1, layout.slot_floats);
  };
  auto each_output = [&](int tiles, auto&& do_this) {
    for (int pair = thread / kQuads; pair < tiles * p.tokens; pair += kThreads / kQuads) {
      const int tile = divide_fast(pair, p.tokens);
      do_this(tile, pair - tile * p.tokens);
    }
  };
  // Of a cluster tile i is finished by block i % splits, which waits for the sums of all blocks.
  const int splits = p.splits(), mask = splits - 1;
  const int own = (run.tiles - rank + mask) >> p.split_bits;
  if (splits > 1) {
    if (thread == 0 && own > 0) expect_bytes(exchange_barrier, splits * own * kUnitRows * p.tokens * 4);
    cluster_wait();  // barriers are made
    each_output(run.tiles, [&](int tile, int token) {
      const int place = ((tile >> p.split_bits) * p.tokens + token) * kUnitRows + 4 * quad;
      store_remote_counted(shared + layout.exchange + 4 * (rank * layout.part_floats + place), exchange_barrier,
                           tile & mask, sum_of(tile, token));
    });
    if (own > 0) wait_barrier(exchange_barrier, 0);  // nothing is written to this block any more: it may end
  }
  each_output(own, [&](int tile, int token) {
    float4 sum;
    if (splits > 1) {
      const int place = (tile * p.tokens + token) * kUnitRows + 4 * quad;
      sum = add_slots(reinterpret_cast<const float*>(memory + layout.exchange) + place, splits, layout.part_floats);
    } else {
      sum = sum_of(tile, token);
    }
    store_output<kind>(p, job, head, run.first_tile + (tile << p.split_bits) + rank, 4 * quad, token, sum);
  });
}

// Of matrices of one format, of which two blocks fit a multiprocessor, or of several.
template <int kKind, int kPiecesOfWarp>
__global__ void __launch_bounds__(kThreads, kKind != kAny && kPiecesOfWarp == kFewPieces && DSV4_ARCH == 90 ? 2 : 1)
    gemv_mma_kernel(const __grid_constant__ Gemv p) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  const Job& job = job_of_block(p);
  if constexpr (kKind != kAny) {
    run_job<Kind(kKind), kPiecesOfWarp>(p, job, memory);
  } else {
    switch (job.kind) {
      case Kind::nvfp4: return run_job<Kind::nvfp4, kPiecesOfWarp>(p, job, memory);
      case Kind::mxfp4: return run_job<Kind::mxfp4, kPiecesOfWarp>(p, job, memory);
      case Kind::fp8: return run_job<Kind::fp8, kPiecesOfWarp>(p, job, memory);
      case Kind::bf16: return run_job<Kind::bf16, kPiecesOfWarp>(p, job, memory);
    }
  }
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
  return true;
}

// Bytes of shared memory, or 0 if a block has not enough.
int shared_bytes(const Gemv& p) {
  int tiles = 1;
  for (int j = 0; j < p.jobs; ++j) tiles = max(tiles, p.job[j].most_tiles());
  const int bytes = Layout(p, tiles).total;
  return p.tokens * p.most_stretches() <= kMostPieces * kWarps && bytes <= kMaxShared ? bytes : 0;
}

cudaError_t start_few(const Gemv& call, cudaStream_t stream) {
  static const Clusters clusters(gemv_mma_kernel<kAny, kMostPieces>);
  if (clusters.error != cudaSuccess) return clusters.error;
  Gemv p = call;
  if (!choose_splits(p, clusters.count)) return cudaErrorInvalidValue;
  const int shared = shared_bytes(p);
  if (shared == 0) {
    // Of the largest matrices one token at a time.
    if (call.tokens == 1) return cudaErrorInvalidValue;
    for (int token = 0; token < call.tokens; ++token) {
      const cudaError_t error = start_few(part_of(call, token, 1), stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
  auto start = [&](auto kind) {
    constexpr int kKind = decltype(kind)::value;
    if (p.tokens * p.most_stretches() <= kFewPieces * kWarps) {
      return start_kernel<gemv_mma_kernel<kKind, kFewPieces>, true>(p, shared, stream);
    }
    return start_kernel<gemv_mma_kernel<kKind, kMostPieces>, true>(p, shared, stream);
  };
  for (int j = 1; j < p.jobs; ++j) {
    if (p.job[j].kind != p.job[0].kind) return start(KindConstant<kAny>());
  }
  return for_kind(p.job[0].kind, start);
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
