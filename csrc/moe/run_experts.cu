// experts_gate_up and experts_down: run_experts of ops/moe/reference.py for up to 8 tokens; weights of any format.
//
//   h[pair] = bf16(silu(min(w1 x, limit)) clamp(w3 x, -limit, limit) routing[pair]); the shared expert has no routing
//   y[t] = sum over slots of w2 h[t, slot], ascending, then the shared expert's; fp32, rounded once
//
// Two launches, which overlap: the second one's blocks start copying w2 before the first one's have ended. Each reads
// the weights of every expert that some token chose once: at one token and D 4096, F 2048, 7 experts of NVFP4 in all,
// 66 and 33 MB, 22.5 us of an H200's memory. Which experts those are, and where their weights lie, only the device
// knows: every block finds out for itself (experts.cuh, which says how a block works).
//
// gate_up: a block a multiprocessor. It takes row tiles of F, with w1 and w3 of every one, so that it can finish h.
// Where all weights are alike its first tiles are the shared expert's: they are asked for before it is known who was
// chosen, even before the launch before has ended. Where they are not, some blocks work for the shared expert alone.
// down: clusters of blocks that divide F, each of which keeps its columns of every h. A cluster takes a run of row
// tiles of D with w2 of all experts. Blocks add a token's experts in the order of its slots; the sums of a cluster's
// blocks go to one of them, which adds those in order.
//
// There are kernels for the formats that checkpoints have: those for any are so large that their instructions come
// late.
// sass experts_gate_up_kernel: HMMA.16816.F32, LDS.128
// sass experts_down_kernel: HMMA.16816.F32, LDS.128
#include <cmath>
#include <initializer_list>

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "moe/experts.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxSplitBits = 3;

// Blocks that share a multiprocessor, at the end of a launch and the beginning of the next.
constexpr int kBlocksAtOnce = DSV4_ARCH == 90 ? 2 : 1;

// As in pairs.cu, but divided within 2 units of the last place of fp32, before the one rounding to bf16: the slow path
// of an exact division takes registers that gate_up does not have.
__device__ inline float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return __fdividef(gate, 1.0f + expf(-gate)) * up;
}

// The tables into the L2 cache, a few lines each block: they will be needed as soon as it is known who was chosen.
__device__ inline void ask_for_tables(const Experts& p) {
  constexpr int kSector = 32;
  const int matrices = p.experts * kMatrices;
  const int addresses = matrices * 2 * int(sizeof(int64_t)), scales = matrices * int(sizeof(float));
  for (int at = blockIdx.x * kSector; at < addresses; at += gridDim.x * kSector) {
    fetch_to_l2(reinterpret_cast<const char*>(p.routed.addresses) + at);
    if (at < scales) fetch_to_l2(reinterpret_cast<const char*>(p.routed.global_scales) + at);
  }
}

// h of the tiles first .. end - 1 of a block, all of them of the shared expert or none. A thread a row.
__device__ inline void finish_gate_up(const Experts& p, const Passes& passes, const GateOrder& order,
                                      const float* sums, int first, int end) {
  const bool is_shared = order.is_shared(first);
  const ExpertSide& side = is_shared ? p.shared : p.routed;
  const int of_slot = order.of_slot(first), most = of_slot / kSumStride, spans = order.spans;
  for (int i = threadIdx.x; i < (end - first) * most * kUnitRows; i += kExpertThreads) {
    const int row = i % kUnitRows, tile = divide_fast(i / kUnitRows, most), column = i / kUnitRows - tile * most;
    const Segment s = order.at(0, first + tile);
    const int at = passes.first()[s.pass] + column;
    if (at >= passes.first()[s.pass + 1]) continue;
    const int pair = passes.pair()[at];
    const float* from = sums + tile * order.of_tile(first) + column * kSumStride + row;
    float gate = 0.0f, up = 0.0f;
#pragma unroll 4
    for (int span = 0; span < spans; ++span) {
      gate += from[span * of_slot];
      up += from[(spans + span) * of_slot];
    }
    const float h = swiglu(gate, up, p.limit) * passes.routing()[pair];
    const int64_t of_pair = int64_t(is_shared ? pair - p.pairs : pair) * side.rows;
    side.hidden[of_pair + s.tile * kUnitRows + row] = __float2bfloat16_rn(h);
  }
}

// What is known of a block's order before anyone has chosen: the tiles of the shared expert.
__device__ inline GateOrder begin_order(const Experts& p, const ExpertSide& side) {
  const int blocks = int(gridDim.x), block = int(blockIdx.x);
  GateOrder order = {};
  order.stretches = side.stretches(), order.span = p.span, order.spans = p.spans, order.outers = 2 * p.spans;
  order.by = p.routed.tiles;
  order.columns = 1, order.shared_columns = p.tokens;
  const bool is_shared = &side == &p.shared;
  if (p.alike || is_shared) {
    const int others = is_shared ? p.routed_workers : 0;
    const Share share(p.shared.tiles.by, blocks - others, block - others);
    order.shared_tiles = order.tiles = share.count, order.first_shared = share.first;
  }
  order.shared_chunk = divide_fast(p.sum_floats, 2 * order.of_shared_tile());
  return order;
}
// And after it.
__device__ inline void end_order(const Experts& p, const Passes& passes, const ExpertSide& side, GateOrder& order) {
  int count = 0;
  if (&side == &p.routed) {
    const int all = (passes.count() - 1) * order.by.by + (p.alike ? p.shared.tiles.by : 0);
    const Share share(all, p.routed_workers, int(blockIdx.x));
    order.first_routed = share.first - order.first_shared, count = share.count - order.shared_tiles;
  }
  order.tiles += count, order.chunk = max(count, 1);
  if (p.tokens > 1 && count > 0) {
    const int last = order.at(0, order.tiles - 1).pass;
    for (int pass = order.at(0, order.shared_tiles).pass; pass <= last; ++pass) {
      order.columns = max(order.columns, passes.columns_of(pass));
    }
  }
  if (order.before(order.tiles) > p.sum_floats) {
    order.buffer_floats = p.sum_floats / 2;
    const int most = divide_fast(order.buffer_floats, order.of_tile(order.tiles));
    const int chunks = max(divide_fast(count + most - 1, most), 1);
    order.chunk = max(divide_fast(count + chunks - 1, chunks), 1);  // all of about the same size
  }
}

template <Kind kind, bool kWhole>
__device__ void gate_up(const Experts& p, unsigned char* memory, const ExpertSide& side) {
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);  // known to the compiler as the same for all lanes
  const Passes passes{memory, p.layout};
  GateOrder* orders = passes.at<GateOrder>(p.layout.orders);
  if (threadIdx.x == kExpertThreads - 1) orders[0] = begin_order(p, side);
  passes.find_shared<0, 2>(p);

  const int stretches = side.stretches();
  auto find = [&](int task) -> Stretch {
    const int row = divide_fast(task, stretches), stretch = task - row * stretches;
    return {side.in + row * side.columns + stretch * kStretch,
            memory + p.layout.rows + row * p.layout.pitch,
            stretch,
            stretches,
            kind,
            row < p.tokens};
  };
  const Stretch first = find(warp);
  uint4 piece;
  Passes::Choice choice;
  auto ask = [&] {
    choice = passes.ask(p);
    if (first.exists) piece = first.load();
  };
  if (!p.overlap) ask();
  __syncthreads();
  Worker<kind, GateOrder, kWhole> worker(passes, side, orders, warp, warp);
  worker.start(p.overlap ? kRingUnits : 1, p.overlap);
  wait_for_launch_before();
  let_next_launch_start();  // not sooner: the next launch reads `chosen` without waiting
  if (p.overlap) ask();
  if (first.exists) first.store(piece);
  passes.find<0, 2>(p, choice);
  copy_rows(kExpertWarps, p.tokens * stretches, find);
  if (threadIdx.x == 0) {  // for its own warp what it reads has been found
    orders[1] = orders[0];
    end_order(p, passes, side, orders[1]);
  }
  __syncthreads();
  const GateOrder& order = orders[1];
  worker.extend(&order);
  worker.start(kRingUnits, false);

  auto slots_of = [&](int tile) { return passes.at<float>(p.layout.sums) + order.before(tile); };
  for (int chunk = 0; chunk < order.tiles; chunk = order.chunk_end(chunk)) {
    worker.multiply(chunk, [&](const Segment& s, int tile, int column) {
      const int slot = (s.matrix - 2 * s.pass) * order.spans + s.span;
      return slots_of(tile) + slot * order.of_slot(tile) + column * kSumStride;
    });
    const int end = order.chunk_end(chunk);
    const bool all = order.buffer_floats == 0;
    if (all && end < order.tiles) continue;
    __syncthreads();
    for (int from = all ? 0 : chunk, to; from < end; from = to) {
      to = order.chunk_end(from);
      finish_gate_up(p, passes, order, slots_of(from), from, to);
    }
  }
}

// For any format it needs so many registers that it shares a multiprocessor with no other block.
template <int kRouted, int kShared>
__global__ void __launch_bounds__(kExpertThreads, kRouted == kAny ? 1 : kBlocksAtOnce)
    experts_gate_up_kernel(const __grid_constant__ Experts p) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (threadIdx.x == 0) ask_for_tables(p);
  const bool is_shared = int(blockIdx.x) >= p.routed_workers;
  const ExpertSide& side = is_shared ? p.shared : p.routed;
  if constexpr (kRouted != kAny) {
    if (kRouted == kShared || !is_shared) return gate_up<Kind(kRouted), true>(p, memory, side);
    return gate_up<Kind(kShared), true>(p, memory, side);
  } else {
    switch (side.kind) {
      case Kind::nvfp4: return gate_up<Kind::nvfp4, false>(p, memory, side);
      case Kind::mxfp4: return gate_up<Kind::mxfp4, false>(p, memory, side);
      case Kind::fp8: return gate_up<Kind::fp8, false>(p, memory, side);
      case Kind::bf16: return gate_up<Kind::bf16, false>(p, memory, side);
    }
  }
}

// A block of down: its place in a cluster, row tiles of D, stretches of F.
struct DownBlock {
  int rank, first_tile, tiles;
  int first, stretches, shared_first, shared_stretches;  // of the routed experts' F and of the shared one's

  // Slots of a tile: of each pair all stretches, then likewise of the shared expert. This is its first one for a token.
  __device__ int shared_slot(const Experts& p, int token) const {
    return p.pairs * stretches + token * shared_stretches;
  }

  __device__ explicit DownBlock(const Experts& p) {
    const int clusters = int(gridDim.x) >> p.split_bits, cluster = int(blockIdx.x) >> p.split_bits;
    rank = int(blockIdx.x) & (p.splits() - 1);
    const Share share(p.routed.tiles.by, clusters, cluster);
    first_tile = share.first, tiles = share.count;
    auto begin = [&](const ExpertSide& side, int of) { return (side.stretches() * of) >> p.split_bits; };
    first = begin(p.routed, rank), stretches = begin(p.routed, rank + 1) - first;
    shared_first = begin(p.shared, rank), shared_stretches = begin(p.shared, rank + 1) - shared_first;
  }
};

// y of the tiles chunk .. + tiles - 1 of a block, whose slots are at `sums`.
__device__ inline void finish_down(const Experts& p, const Passes& passes, const DownBlock& block, const float* sums,
                                   int chunk, int tiles, int buffer) {
  const int quad = threadIdx.x % kQuads;
  auto sum_of = [&](int tile, int token) {
    const float* from = sums + tile * p.slot_floats + 4 * quad;
    const int of_token = p.slots * block.stretches;
    const float4 a = add_slots(from + token * of_token * kSumStride, of_token, kSumStride);
    const float4 b = add_slots(from + block.shared_slot(p, token) * kSumStride, block.shared_stretches, kSumStride);
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  };
  auto each_output = [&](int count, auto&& do_this) {
    for (int i = threadIdx.x / kQuads; i < count * p.tokens; i += kExpertThreads / kQuads) {
      const int tile = divide_fast(i, p.tokens);
      do_this(tile, i - tile * p.tokens);
    }
  };
  auto store = [&](int tile, int token, const float4& sum) {
    const int row = (block.first_tile + chunk + tile) * kUnitRows + 4 * quad;
    store_rounded(p.out + int64_t(token) * p.routed.rows + row, sum);
  };
  // Tile i of the chunk is finished by block i % splits, which waits for the sums of all blocks.
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(passes.memory));
  const uint32_t barrier = shared + kExpertRingBytes + 8 * kExpertWarps * kRingUnits;
  const int splits = p.splits(), mask = splits - 1, own = (tiles - block.rank + mask) >> p.split_bits;
  const int of_rank = ((p.chunk_tiles + mask) >> p.split_bits) * p.tokens * kUnitRows;  // floats
  const int exchange = p.exchange + buffer * splits * of_rank * 4;
  if (threadIdx.x == 0 && splits > 1 && own > 0) expect_bytes(barrier, splits * own * p.tokens * kUnitRows * 4);
  cluster_wait();  // until barriers are made, and the sums of the chunk before have been read
  each_output(tiles, [&](int tile, int token) {
    const int place = ((tile >> p.split_bits) * p.tokens + token) * kUnitRows + 4 * quad;
    const float4 sum = sum_of(tile, token);
    if (splits == 1) {  // only between blocks are there stores that a barrier counts
      store(tile, token, sum);
    } else {
      store_remote_counted(shared + exchange + 4 * (block.rank * of_rank + place), barrier, tile & mask, sum);
    }
  });
  if (splits > 1) {
    if (own > 0) wait_barrier(barrier, buffer);
    each_output(own, [&](int tile, int token) {
      const int place = (tile * p.tokens + token) * kUnitRows + 4 * quad;
      const float* from = reinterpret_cast<const float*>(passes.memory + exchange) + place;
      store((tile << p.split_bits) + block.rank, token, add_slots(from, splits, of_rank));
    });
  }
  cluster_arrive_relaxed();
}

template <int kRouted, int kShared, Kind kind>
__device__ void down(const Experts& p, const Passes& passes, const ExpertSide& side, const DownBlock& block,
                     const DownOrder& order, int number, int warp) {
  Worker<kind, DownOrder, kRouted != kAny> worker(passes, side, &order, number, warp);
  worker.start(kRingUnits, p.overlap);
  wait_for_launch_before();
  // Rows of h, those of the shared expert last, in as many stretches as the longer ones have here.
  copy_rows(0, (p.pairs + p.tokens) * p.longest, [&](int task) -> Stretch {
    const int row = divide_fast(task, p.longest), stretch = task - row * p.longest;
    const bool is_shared = row >= p.pairs;
    const ExpertSide& side = is_shared ? p.shared : p.routed;
    const int of_side = is_shared ? row - p.pairs : row, of = is_shared ? block.shared_stretches : block.stretches;
    return {side.in + of_side * side.columns + ((is_shared ? block.shared_first : block.first) + stretch) * kStretch,
            passes.memory + (is_shared ? p.layout.shared_rows + of_side * p.layout.shared_pitch
                                       : p.layout.rows + of_side * p.layout.pitch),
            stretch,
            of,
            kRouted == kAny ? side.kind : Kind(is_shared ? kShared : kRouted),
            row < p.pairs + p.tokens && stretch < of};
  });
  sync_block();

  int buffer = 0;
  for (int chunk = 0; chunk < block.tiles; chunk += p.chunk_tiles, buffer ^= 1) {
    float* sums = reinterpret_cast<float*>(passes.memory + p.layout.sums) + buffer * p.chunk_tiles * p.slot_floats;
    if (order.tiles > 0) {
      worker.multiply(chunk, [&](const Segment& s, int, int column) {
        const int pair = passes.pair()[passes.first()[s.pass] + column];
        const int slot = pair < p.pairs ? pair * block.stretches : block.shared_slot(p, pair - p.pairs);
        return sums + (s.tile - block.first_tile - chunk) * p.slot_floats + (slot + s.span) * kSumStride;
      });
    }
    sync_block();
    finish_down(p, passes, block, sums, chunk, min(p.chunk_tiles, block.tiles - chunk), buffer);
  }
  cluster_wait();
}

template <int kRouted, int kShared>
__global__ void __launch_bounds__(kExpertThreads, kBlocksAtOnce)
    experts_down_kernel(const __grid_constant__ Experts p) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  const Passes passes{memory, p.layout};
  if (threadIdx.x == 0) {
    make_barrier(uint32_t(__cvta_generic_to_shared(memory)) + kExpertRingBytes + 8 * kExpertWarps * kRingUnits, 1);
    publish_barriers();
  }
  cluster_arrive_relaxed();
  const Passes::Choice choice = passes.ask(p);
  passes.find_shared<2, 1>(p);
  passes.find<2, 1>(p, choice);
  __syncthreads();

  // A warp has weights of one kind. Its number is known to the compiler as the same for all lanes.
  const DownBlock block(p);
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  const bool is_shared = warp >= p.routed_workers;
  const ExpertSide& side = is_shared ? p.shared : p.routed;
  DownOrder order;
  order.stretches = is_shared ? block.shared_stretches : block.stretches;
  order.first_stretch = is_shared ? block.shared_first : block.first;
  order.by = Divisor(max(order.stretches, 1));
  order.first_pass = p.alike || is_shared ? 0 : 1;
  order.outers = (is_shared ? 1 : passes.count() - order.first_pass) * order.stretches;
  const int worker = warp - (is_shared ? p.routed_workers : 0);
  order.workers = is_shared ? kExpertWarps - p.routed_workers : p.routed_workers;
  order.first_tile = block.first_tile, order.slot_floats = p.slot_floats;
  order.tiles = order.stretches > 0 ? block.tiles : 0, order.chunk = p.chunk_tiles;
  if constexpr (kRouted != kAny) {
    if (kRouted == kShared || !is_shared) {
      return down<kRouted, kShared, Kind(kRouted)>(p, passes, side, block, order, worker, warp);
    }
    return down<kRouted, kShared, Kind(kShared)>(p, passes, side, block, order, worker, warp);
  } else {
    switch (side.kind) {
      case Kind::nvfp4: return down<kAny, kAny, Kind::nvfp4>(p, passes, side, block, order, worker, warp);
      case Kind::mxfp4: return down<kAny, kAny, Kind::mxfp4>(p, passes, side, block, order, worker, warp);
      case Kind::fp8: return down<kAny, kAny, Kind::fp8>(p, passes, side, block, order, worker, warp);
      case Kind::bf16: return down<kAny, kAny, Kind::bf16>(p, passes, side, block, order, worker, warp);
    }
  }
}

// What a kernel needs before its first launch.
template <void (*kernel)(Experts)>
cudaError_t prepare() {
  static const cudaError_t done = [] {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxExpertShared);
    if (error != cudaSuccess) return error;
    // Two blocks on a multiprocessor, of two launches, need all of what could be L1 cache.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  }();
  return done;
}

// What is asked of the device once: how many clusters of each size run at once.
struct Device {
  int clusters[kMaxSplitBits + 1];
  cudaError_t error;

  Device() : error(prepare<experts_down_kernel<kAny, kAny>>()) {
    if (error != cudaSuccess) return;
    error = count_clusters(experts_down_kernel<kAny, kAny>, kExpertThreads, kMaxExpertShared, clusters);
  }
};

const Device& device() {
  static const Device found;
  return found;
}

// `start(constant, constant)` of the formats of the routed experts and the shared one if there are kernels for them, or
// of kAny.
template <class Start>
cudaError_t for_kinds(const Experts& p, const Start& start) {
  constexpr KindConstant<int(Kind::nvfp4)> kNvfp4;
  constexpr KindConstant<int(Kind::mxfp4)> kMxfp4;
  constexpr KindConstant<int(Kind::fp8)> kFp8;
  if (p.routed.kind == Kind::nvfp4 && p.alike) return start(kNvfp4, kNvfp4);
  if (p.routed.kind == Kind::nvfp4 && p.shared.kind == Kind::fp8) return start(kNvfp4, kFp8);
  if (p.routed.kind == Kind::mxfp4 && p.shared.kind == Kind::fp8) return start(kMxfp4, kFp8);
  return start(KindConstant<kAny>(), KindConstant<kAny>());
}

// How many of the workers take the routed experts' stretches and not the shared one's, so that the last one ends early:
// for as many passes as are to be expected.
int divide_workers(const Experts& p, int workers, double of_routed, double of_shared) {
  if (p.alike) return workers;
  const double left_out = 1.0 - double(p.slots) / p.experts;  // how likely a token is not to choose an expert
  const double passes = left_out > 0 ? p.experts * (1.0 - std::pow(left_out, p.tokens)) : p.experts;
  const double routed = passes * of_routed;
  int best = 1;
  double least = INFINITY;
  for (int n = 1; n < workers; ++n) {
    const double slowest = std::fmax(std::ceil(routed / n) * p.routed.stretch_bytes(),
                                     std::ceil(of_shared / (workers - n)) * p.shared.stretch_bytes());
    if (slowest < least) least = slowest, best = n;
  }
  return best;
}

// `launch_part(part)` for the tokens of p, as many at a time as `fits(tokens)`.
template <class Fits, class LaunchPart>
cudaError_t for_parts(const Experts& p, const Fits& fits, const LaunchPart& launch_part) {
  int step = p.tokens;
  while (step > 0 && !fits(step)) --step;
  if (step == 0) return cudaErrorInvalidValue;
  const bool down = p.out != nullptr;
  for (int first = 0; first < p.tokens; first += step) {
    Experts part = p;
    part.tokens = p.tokens - first < step ? p.tokens - first : step;
    part.pairs = part.tokens * p.slots;
    part.chosen += first * p.slots;
    part.routed.in += int64_t(first) * (down ? p.slots : 1) * p.routed.columns;
    part.shared.in += int64_t(first) * p.shared.columns;
    if (down) {
      part.out += int64_t(first) * p.routed.rows;
    } else {
      part.routing += first * p.slots;
      part.routed.hidden += int64_t(first) * p.slots * p.routed.rows;
      part.shared.hidden += int64_t(first) * p.shared.rows;
    }
    const cudaError_t error = launch_part(part);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Spans of gate_up: a tile has as many as there are warps, or fewer.
void choose_span(Experts& p) {
  for (p.span = 1; 2 * ceil_div(p.routed.stretches(), p.span) > kExpertWarps; p.span *= 2) {}
  p.spans = int(ceil_div(p.routed.stretches(), p.span));
}

// Shared memory of gate_up: two buffers of slots for some tiles whose passes have all tokens; where passes have fewer,
// there are more tiles. False if those of one do not fit.
bool choose_slots(Experts& p, int& total) {
  constexpr int kEnoughTiles = 4;
  const int stretches = p.routed.stretches();
  p.layout = ExpertLayout(p.tokens, p.pairs, 2, p.tokens, stretches, 0, stretches);
  p.layout.shared_rows = p.layout.rows;  // a block has those of one of them, or both have the same
  const int least = 2 * 2 * p.spans * p.tokens * kSumStride * 4;
  total = p.layout.sums + kEnoughTiles * least <= kGateShared ? kGateShared : kMaxExpertShared;
  p.sum_floats = (total - p.layout.sums) / 4;
  return p.layout.sums + least <= total;
}

cudaError_t start_gate_up(Experts p, bool overlap, cudaStream_t stream) {
  if (device().error != cudaSuccess) return device().error;
  choose_span(p);
  int total = 0;
  auto fits = [&](int tokens) {
    Experts part = p;
    part.tokens = tokens, part.pairs = tokens * p.slots;
    return choose_slots(part, total);
  };
  return for_parts(p, fits, [&](Experts part) {
    choose_slots(part, total);
    part.routed_workers = divide_workers(part, device().clusters[0], part.routed.tiles.by, part.shared.tiles.by);
    Grid grid{.blocks = device().clusters[0], .threads = kExpertThreads, .shared = size_t(total)};
    grid.overlap = part.overlap = overlap;
    return for_kinds(part, [&](auto routed, auto shared) {
      constexpr auto kernel = experts_gate_up_kernel<decltype(routed)::value, decltype(shared)::value>;
      const cudaError_t error = prepare<kernel>();
      return error == cudaSuccess ? launch(kernel, grid, stream, part) : error;
    });
  });
}

// Shared memory of down with as many tiles in a chunk as it holds; false if one tile does not fit.
bool choose_chunk(Experts& p, int most_tiles, int& total) {
  auto most = [&](const ExpertSide& side) { return (side.stretches() + p.splits() - 1) >> p.split_bits; };
  const int routed = most(p.routed), shared = most(p.shared);
  p.layout = ExpertLayout(p.tokens, p.pairs, 1, p.pairs, routed, p.tokens, shared);
  p.longest = routed > shared ? routed : shared;
  p.slot_floats = (routed * p.pairs + shared * p.tokens) * kSumStride;
  const int tile_bytes = 4 * p.slot_floats;
  auto bytes_of = [&](int tiles, int buffers) {
    const int own = (tiles + p.splits() - 1) >> p.split_bits;
    const int exchange = p.splits() > 1 ? p.splits() * own * p.tokens * kUnitRows * 4 : 0;
    p.chunk_tiles = tiles;
    p.exchange = p.layout.sums + buffers * tiles * tile_bytes;
    return p.exchange + buffers * exchange;
  };
  for (const int limit : {kHalfExpertShared, kMaxExpertShared}) {
    if ((total = bytes_of(most_tiles, 1)) <= limit) return true;
    const int least = limit == kHalfExpertShared ? 4 : 1;  // smaller chunks are worse than launches that do not overlap
    for (int tiles = most_tiles - 1; tiles >= least; --tiles) {
      if (bytes_of(tiles, 2) > limit) continue;
      total = bytes_of(int(ceil_div(most_tiles, ceil_div(most_tiles, tiles))), 2);  // chunks of about the same size
      return true;
    }
  }
  return false;
}

// How many blocks of a cluster divide F, as a power of two: four, fewer if it has fewer stretches, or eight if a token
// needs them. A function of the shapes alone, so that a token's bits do not depend on how many there are.
int choose_splits(Experts p) {
  constexpr int kUsual = 2, kFewTiles = 2;
  p.tokens = 1, p.pairs = p.slots;
  int total = 0;
  for (p.split_bits = 0; p.split_bits < kUsual && (2 << p.split_bits) <= p.routed.stretches(); ++p.split_bits) {}
  while (p.split_bits < kMaxSplitBits && !choose_chunk(p, kFewTiles, total)) ++p.split_bits;
  return p.split_bits;
}

cudaError_t start_down(Experts p, bool overlap, cudaStream_t stream) {
  if (device().error != cudaSuccess) return device().error;
  p.split_bits = choose_splits(p);
  const int clusters = device().clusters[p.split_bits], tiles = p.routed.tiles.by;
  if (clusters < 1) return cudaErrorInvalidValue;
  const int used = clusters < tiles ? clusters : tiles, most_tiles = int(ceil_div(tiles, used));
  int total = 0;
  auto fits = [&](int tokens) {
    Experts part = p;
    part.tokens = tokens, part.pairs = tokens * p.slots;
    return choose_chunk(part, most_tiles, total);
  };
  return for_parts(p, fits, [&](Experts part) {
    choose_chunk(part, most_tiles, total);
    const double stretches_of_tile = double(most_tiles) / part.splits();
    part.routed_workers = divide_workers(part, kExpertWarps, stretches_of_tile * part.routed.stretches(),
                                         stretches_of_tile * part.shared.stretches());
    Grid grid{.blocks = int64_t(used) << p.split_bits, .threads = kExpertThreads, .shared = size_t(total)};
    grid.cluster = p.splits();
    grid.overlap = part.overlap = overlap;
    return for_kinds(part, [&](auto routed, auto shared) {
      constexpr auto kernel = experts_down_kernel<decltype(routed)::value, decltype(shared)::value>;
      const cudaError_t error = prepare<kernel>();
      return error == cudaSuccess ? launch(kernel, grid, stream, part) : error;
    });
  });
}

ExpertSide side_of(const int64_t* addresses, const float* global_scales, int64_t kind, bool e8m0, int64_t rows,
                   int64_t columns) {
  ExpertSide side = {addresses, global_scales, nullptr, nullptr, Kind(kind), e8m0, int(rows), int(columns),
                     Divisor(int(rows) / kUnitRows)};
  side.tile_bytes = side.stretches() * side.stretch_bytes();
  return side;
}

bool can_take(const Experts& p) {
  auto fits = [](const ExpertSide& s) {
    return s.rows % kUnitRows == 0 && s.columns % kStretch == 0 && s.rows > 0 && s.columns > 0 && int(s.kind) >= 0 &&
           s.kind <= Kind::bf16 && uintptr_t(s.in) % 16 == 0;
  };
  return p.experts >= 1 && p.tokens >= 1 && p.tokens <= kMaxExpertTokens && p.slots >= 1 && p.pairs <= kMaxPairs &&
         fits(p.routed) && fits(p.shared);
}

}  // namespace

// Both start one launch, or several for fewer tokens each where so many do not fit shared memory.

// x and shared_x [T, width], what the routed and the shared experts read; hidden [T x K, inner], shared_hidden [T,
// shared_inner].
cudaError_t experts_gate_up(In x, In shared_x, const float* routing, const int64_t* chosen, const int64_t* addresses,
                            const float* global_scales, const int64_t* shared_addresses,
                            const float* shared_global_scales, Out hidden, Out shared_hidden, int64_t experts,
                            int64_t tokens, int64_t slots, int64_t width, int64_t inner, int64_t shared_inner,
                            int64_t kind, bool e8m0, int64_t shared_kind, bool shared_e8m0, double limit, bool overlap,
                            cudaStream_t stream) {
  for (Type type : {x.type, shared_x.type, hidden.type, shared_hidden.type}) {
    if (type != Type::bf16) return cudaErrorInvalidValue;
  }
  Experts p = {side_of(addresses, global_scales, kind, e8m0, inner, width),
               side_of(shared_addresses, shared_global_scales, shared_kind, shared_e8m0, shared_inner, width)};
  p.routed.in = static_cast<const bf16*>(x.data), p.routed.hidden = static_cast<bf16*>(hidden.data);
  p.shared.in = static_cast<const bf16*>(shared_x.data), p.shared.hidden = static_cast<bf16*>(shared_hidden.data);
  p.chosen = chosen, p.routing = routing, p.limit = float(limit);
  p.experts = int(experts), p.tokens = int(tokens), p.slots = int(slots), p.pairs = int(tokens * slots);
  p.alike = p.routed.kind == p.shared.kind && p.routed.e8m0 == p.shared.e8m0 && p.routed.in == p.shared.in;
  return can_take(p) ? start_gate_up(p, overlap, stream) : cudaErrorInvalidValue;
}

// out [T, width]; the rest as above.
cudaError_t experts_down(In hidden, In shared_hidden, const int64_t* chosen, const int64_t* addresses,
                         const float* global_scales, const int64_t* shared_addresses,
                         const float* shared_global_scales, Out out, int64_t experts, int64_t tokens, int64_t slots,
                         int64_t width, int64_t inner, int64_t shared_inner, int64_t kind, bool e8m0,
                         int64_t shared_kind, bool shared_e8m0, bool overlap, cudaStream_t stream) {
  for (Type type : {hidden.type, shared_hidden.type, out.type}) {
    if (type != Type::bf16) return cudaErrorInvalidValue;
  }
  Experts p = {side_of(addresses, global_scales, kind, e8m0, width, inner),
               side_of(shared_addresses, shared_global_scales, shared_kind, shared_e8m0, width, shared_inner)};
  p.routed.in = static_cast<const bf16*>(hidden.data), p.shared.in = static_cast<const bf16*>(shared_hidden.data);
  p.chosen = chosen, p.out = static_cast<bf16*>(out.data);
  p.experts = int(experts), p.tokens = int(tokens), p.slots = int(slots), p.pairs = int(tokens * slots);
  p.alike = p.routed.kind == p.shared.kind && p.routed.e8m0 == p.shared.e8m0 && inner == shared_inner;
  return can_take(p) ? start_down(p, overlap, stream) : cudaErrorInvalidValue;
}

}  // namespace dsv4
