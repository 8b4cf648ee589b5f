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
// gate_up: a block a multiprocessor. Blocks are divided between the routed experts and the shared one by bytes; each
// takes a run of row tiles of F, with w1 and w3 of every one, so that it can finish h.
// down: clusters of blocks that divide F, each of which keeps its columns of every h. A cluster takes a run of row
// tiles of D with w2 of all experts. Blocks add a token's experts in the order of its slots; the sums of a cluster's
// blocks go to one of them, which adds those in order.
//
// There are kernels for one format of all weights: those for any are so large that their instructions come late.
// sass experts_gate_up_kernel: HMMA.16816.F32, LDS.128
// sass experts_down_kernel: HMMA.16816.F32, LDS.128
#include <initializer_list>

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "moe/experts.cuh"

namespace dsv4 {
namespace {

constexpr int kGateSpan = 2;     // stretches of an item of gate_up
constexpr int kMaxSplitBits = 3;
constexpr int kRowBytes = 120 * 1024;  // that one token's h may have in a block of down

// Blocks that share a multiprocessor, at the end of a launch and the beginning of the next.
constexpr int kBlocksAtOnce = DSV4_ARCH == 90 ? 2 : 1;

__device__ inline float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + expf(-gate)) * up;
}

// The tables into the L2 cache, a few lines each block: they will be needed as soon as it is known who was chosen.
__device__ inline void ask_for_tables(const Experts& p) {
  constexpr int kLine = 128;
  const int matrices = p.experts * kMatrices;
  const int addresses = matrices * 2 * int(sizeof(int64_t)), scales = matrices * int(sizeof(float));
  for (int at = blockIdx.x * kLine; at < addresses; at += gridDim.x * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(p.routed.addresses) + at));
    if (at < scales) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(p.routed.global_scales) + at));
    }
  }
}

// Slots of gate_up, in shared memory: as many tiles at once as fit, by the most columns that a pass of this block has.
struct GateSlots {
  int most, floats;  // of a slot
  int tiles, buffer_floats;
  int all;  // tiles of this block

  __device__ void choose(const Experts& p, const Passes& passes, const Order<false>& order) {
    all = order.groups / 2;
    const int last = order.side.tiles.divide(order.first_tile + max(all, 1) - 1);
    most = 1;
    for (int pass = order.side.tiles.divide(order.first_tile); pass <= last; ++pass) {
      most = max(most, passes.columns_of(order.first_pass + pass));
    }
    floats = most * kColumnStride;
    const int of_tile = 2 * order.spans * floats;
    const bool fits = all * of_tile <= p.sum_floats;
    tiles = max(all, 1);
    if (!fits) {
      const int most_tiles = p.sum_floats / (2 * of_tile), chunks = (all + most_tiles - 1) / most_tiles;
      tiles = (all + chunks - 1) / chunks;
    }
    buffer_floats = fits ? 0 : tiles * of_tile;
  }
};

// h of the tiles chunk .. + tiles - 1 of a block.
__device__ inline void finish_gate_up(const Experts& p, const Passes& passes, const Order<false>& order,
                                      const GateSlots& slots, const float* sums, int chunk, int tiles) {
  const ExpertSide& side = order.side;
  const bool is_shared = &side == &p.shared;
  for (int i = threadIdx.x; i < tiles * slots.most * kQuads; i += kExpertThreads) {
    const int quad = i % kQuads, tile = divide_fast(i / kQuads, slots.most), column = i / kQuads - tile * slots.most;
    const Item item = order.at(2 * (chunk + tile), 0);
    if (column >= passes.columns_of(item.pass)) continue;
    const int pair = passes.pair()[passes.first()[item.pass] + column];
    const int row = is_shared ? pair - p.pairs : divide_fast(pair, p.slots);  // of x
    const float* from = sums + 2 * tile * order.spans * slots.floats + column * kColumnStride + 4 * quad;
    const float4 gate = add_slots(from, order.spans, slots.floats);
    const float4 up = add_slots(from + order.spans * slots.floats, order.spans, slots.floats);
    const float inverse = passes.inverse()[row], weight = passes.weight()[pair];
    const float gate_scale = passes.global_scales()[item.matrix], up_scale = passes.global_scales()[item.matrix + 1];
    auto h = [&](float w1, float w3) {
      return swiglu(w1 * inverse * gate_scale, w3 * inverse * up_scale, p.limit) * weight;
    };
    const int64_t of_pair = int64_t(is_shared ? row : pair) * side.rows;
    store_rounded(side.hidden + of_pair + item.tile * kUnitRows + 4 * quad,
                  make_float4(h(gate.x, up.x), h(gate.y, up.y), h(gate.z, up.z), h(gate.w, up.w)));
  }
}

template <Kind kind, bool kAlone>
__device__ void gate_up(const Experts& p, const Passes& passes, const Order<false>& order) {
  const int warp = order.worker, lane = threadIdx.x % kWarp;
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(passes.memory));
  Worker<kind, false, kAlone> worker(passes, order, shared, warp, lane);
  const Rows rows = {order.side.in, p.tokens, order.side.columns, order.stretches, p.layout.rows, p.layout.pitch, 0,
                     kind, 0};
  rows.copy(passes);  // before the weights, behind which they would wait
  worker.start(false);
  GateSlots& slots = *passes.at<GateSlots>(p.layout.block);
  if (threadIdx.x == 0) slots.choose(p, passes, order);
  __syncthreads();
  rows.scale(passes, false);
  __syncthreads();

  int buffer = 0;
  for (int chunk = 0; chunk < slots.all; chunk += slots.tiles) {
    float* sums = reinterpret_cast<float*>(passes.memory + p.layout.sums) + buffer * slots.buffer_floats;
    const int end = min(chunk + slots.tiles, slots.all);
    worker.multiply(2 * end, [&](int group, int span, int) {
      return sums + ((group - 2 * chunk) * order.spans + span) * slots.floats;
    });
    __syncthreads();
    finish_gate_up(p, passes, order, slots, sums, chunk, end - chunk);
    buffer ^= 1;
  }
}

template <int kKind>
__global__ void __launch_bounds__(kExpertThreads, kBlocksAtOnce)
    experts_gate_up_kernel(const __grid_constant__ Experts p) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (threadIdx.x == 0) ask_for_tables(p);
  wait_for_launch_before();
  let_next_launch_start();  // not sooner: the next launch reads `chosen` without waiting
  Passes passes{memory, p.layout};
  passes.find<0, 2>(p);

  const int blocks = int(gridDim.x), routed_tiles = passes.routed * p.routed.tiles.by;
  const int routed_blocks = divide_workers(blocks, routed_tiles, p.routed.stretch_bytes(), p.shared.tiles.by,
                                           p.shared.stretch_bytes());
  const bool is_shared = int(blockIdx.x) >= routed_blocks;
  const ExpertSide& side = is_shared ? p.shared : p.routed;
  const int block = int(blockIdx.x) - (is_shared ? routed_blocks : 0);
  const int of = is_shared ? blocks - routed_blocks : routed_blocks, tiles = is_shared ? side.tiles.by : routed_tiles;
  const int each = tiles / of, more = tiles - each * of, tiles_here = each + (block < more);
  const int spans = (side.stretches() + kGateSpan - 1) / kGateSpan;
  // The warp is known to the compiler as the same for all lanes.
  const Order<false> order = {.side = side,
                              .groups = 2 * tiles_here,
                              .items = spans,
                              .worker = int(__shfl_sync(kFullMask, threadIdx.x / kWarp, 0)),
                              .workers = kExpertWarps,
                              .first_stretch = 0,
                              .stretches = side.stretches(),
                              .span = kGateSpan,
                              .spans = spans,
                              .first_pass = is_shared ? passes.routed : 0,
                              .first_tile = block * each + min(block, more)};
  if constexpr (kKind != kAny) {
    return gate_up<Kind(kKind), true>(p, passes, order);
  } else {
    switch (side.kind) {
      case Kind::nvfp4: return gate_up<Kind::nvfp4, false>(p, passes, order);
      case Kind::mxfp4: return gate_up<Kind::mxfp4, false>(p, passes, order);
      case Kind::fp8: return gate_up<Kind::fp8, false>(p, passes, order);
      case Kind::bf16: return gate_up<Kind::bf16, false>(p, passes, order);
    }
  }
}

// A block of down: its place in a cluster, row tiles of D, stretches of F.
struct DownBlock {
  int rank, first_tile, tiles;
  int first, stretches, shared_first, shared_stretches;  // of the routed experts' F and of the shared one's

  __device__ explicit DownBlock(const Experts& p) {
    const int clusters = int(gridDim.x) >> p.split_bits, cluster = int(blockIdx.x) >> p.split_bits;
    rank = int(blockIdx.x) & (p.splits() - 1);
    const int each = p.routed.tiles.by / clusters, more = p.routed.tiles.by - each * clusters;
    first_tile = cluster * each + min(cluster, more);
    tiles = each + (cluster < more);
    auto begin = [&](const ExpertSide& side, int of) { return (side.stretches() * of) >> p.split_bits; };
    first = begin(p.routed, rank), stretches = begin(p.routed, rank + 1) - first;
    shared_first = begin(p.shared, rank), shared_stretches = begin(p.shared, rank + 1) - shared_first;
  }
};

// y of the tiles chunk .. + tiles - 1 of a block, whose slots are at `sums`.
__device__ inline void finish_down(const Experts& p, const Passes& passes, const DownBlock& block, const float* sums,
                                   int chunk, int tiles, int buffer) {
  const int all = p.pairs + p.tokens, slot_floats = all * kColumnStride, quad = threadIdx.x % kQuads;
  auto sum_of = [&](int tile, int token) {
    const float* of_tile = sums + tile * p.spans * slot_floats + 4 * quad;
    float4 sum = {};
    auto add = [&](int pair, int stretches) {
      const float4 v = add_slots(of_tile + passes.place()[pair] * kColumnStride, stretches, slot_floats);
      const float factor = passes.inverse()[pair];
      sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
      sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
    };
#pragma unroll 2
    for (int slot = 0; slot < p.slots; ++slot) add(token * p.slots + slot, block.stretches);
    add(p.pairs + token, block.shared_stretches);
    return sum;
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
  if (p.split_bits == 0) {
    each_output(tiles, [&](int tile, int token) { store(tile, token, sum_of(tile, token)); });
    return;
  }
  // Tile i of the chunk is finished by block i % splits, which waits for the sums of all blocks.
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(passes.memory));
  const uint32_t barrier = shared + kExpertRingBytes + 8 * kExpertWarps * kRingUnits;
  const int splits = p.splits(), mask = splits - 1, own = (tiles - block.rank + mask) >> p.split_bits;
  const int of_rank = ((p.chunk_tiles + mask) >> p.split_bits) * p.tokens * kUnitRows;  // floats
  const int exchange = p.exchange + buffer * splits * of_rank * 4;
  if (threadIdx.x == 0 && own > 0) expect_bytes(barrier, splits * own * p.tokens * kUnitRows * 4);
  cluster_wait();  // until barriers are made, and the sums of the chunk before have been read
  each_output(tiles, [&](int tile, int token) {
    const int place = ((tile >> p.split_bits) * p.tokens + token) * kUnitRows + 4 * quad;
    store_remote_counted(shared + exchange + 4 * (block.rank * of_rank + place), barrier, tile & mask,
                         sum_of(tile, token));
  });
  if (own > 0) wait_barrier(barrier, buffer);
  each_output(own, [&](int tile, int token) {
    const int place = (tile * p.tokens + token) * kUnitRows + 4 * quad;
    const float* from = reinterpret_cast<const float*>(passes.memory + exchange) + place;
    store((tile << p.split_bits) + block.rank, token, add_slots(from, splits, of_rank));
  });
  cluster_arrive_relaxed();
}

template <Kind kind, bool kAlone>
__device__ void down(const Experts& p, const Passes& passes, const DownBlock& block, const Order<true>& order,
                     int warp) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(passes.memory));
  Worker<kind, true, kAlone> worker(passes, order, shared, warp, threadIdx.x % kWarp);
  worker.start(p.overlap);
  wait_for_launch_before();
  const Rows rows = {p.routed.in + block.first * kStretch, p.pairs, p.routed.columns, block.stretches, p.layout.rows,
                     p.layout.pitch, 0, p.routed.kind, 0};
  const Rows shared_rows = {p.shared.in + block.shared_first * kStretch, p.tokens, p.shared.columns,
                            block.shared_stretches, p.layout.shared_rows, p.layout.shared_pitch, p.pairs,
                            p.shared.kind, rows.tasks() % kExpertWarps};
  rows.copy(passes);
  shared_rows.copy(passes);
  sync_block();
  rows.scale(passes, true);
  shared_rows.scale(passes, true);
  sync_block();

  const int slot_floats = (p.pairs + p.tokens) * kColumnStride, buffer_floats = p.chunk_tiles * p.spans * slot_floats;
  int buffer = 0;
  for (int chunk = 0; chunk < block.tiles; chunk += p.chunk_tiles) {
    float* sums = reinterpret_cast<float*>(passes.memory + p.layout.sums) + buffer * buffer_floats;
    const int end = min(chunk + p.chunk_tiles, block.tiles);
    worker.multiply(min(end, order.groups), [&](int group, int span, int column) {
      return sums + ((group - chunk) * p.spans + span) * slot_floats + column * kColumnStride;
    });
    sync_block();
    finish_down(p, passes, block, sums, chunk, end - chunk, buffer);
    buffer ^= 1;
  }
  if (p.split_bits > 0) cluster_wait();
}

template <int kKind>
__global__ void __launch_bounds__(kExpertThreads, kBlocksAtOnce)
    experts_down_kernel(const __grid_constant__ Experts p) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_launch_start();
  Passes passes{memory, p.layout};
  if (p.split_bits > 0) {
    if (threadIdx.x == 0) {
      make_barrier(uint32_t(__cvta_generic_to_shared(memory)) + kExpertRingBytes + 8 * kExpertWarps * kRingUnits, 1);
      publish_barriers();
    }
    cluster_arrive_relaxed();
  }
  passes.find<2, 1>(p);

  // A warp has weights of one kind. Its number is known to the compiler as the same for all lanes.
  const DownBlock block(p);
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  int routed_warps = kExpertWarps;
  if (!p.one_list) {
    routed_warps = divide_workers(kExpertWarps, block.tiles * passes.routed * block.stretches, p.routed.stretch_bytes(),
                                  block.tiles * block.shared_stretches, p.shared.stretch_bytes());
  }
  const bool is_shared = warp >= routed_warps;
  const ExpertSide& side = is_shared ? p.shared : p.routed;
  const int stretches = is_shared ? block.shared_stretches : block.stretches;
  const int of_side = is_shared ? 1 : passes.routed + p.one_list;
  const Order<true> order = {.side = side,
                             .groups = stretches > 0 ? block.tiles : 0,
                             .items = of_side * stretches,
                             .worker = warp - (is_shared ? routed_warps : 0),
                             .workers = is_shared ? kExpertWarps - routed_warps : routed_warps,
                             .first_stretch = is_shared ? block.shared_first : block.first,
                             .stretches = stretches,
                             .span = 1,
                             .spans = stretches,
                             .first_pass = is_shared ? passes.routed : 0,
                             .first_tile = block.first_tile,
                             .by = Divisor(max(stretches, 1))};
  if constexpr (kKind != kAny) {
    return down<Kind(kKind), true>(p, passes, block, order, warp);
  } else {
    switch (side.kind) {
      case Kind::nvfp4: return down<Kind::nvfp4, false>(p, passes, block, order, warp);
      case Kind::mxfp4: return down<Kind::mxfp4, false>(p, passes, block, order, warp);
      case Kind::fp8: return down<Kind::fp8, false>(p, passes, block, order, warp);
      case Kind::bf16: return down<Kind::bf16, false>(p, passes, block, order, warp);
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

  Device() : error(prepare<experts_down_kernel<kAny>>()) {
    if (error != cudaSuccess) return;
    error = count_clusters(experts_down_kernel<kAny>, kExpertThreads, kMaxExpertShared, clusters);
  }
};

const Device& device() {
  static const Device found;
  return found;
}

// `start(constant)` of the format of all experts if there are kernels for it alone, or of kAny.
template <class Start>
cudaError_t for_kinds(const Experts& p, const Start& start) {
  if (p.routed.kind == p.shared.kind) {
    switch (p.routed.kind) {
      case Kind::nvfp4: return start(KindConstant<int(Kind::nvfp4)>());
      case Kind::mxfp4: return start(KindConstant<int(Kind::mxfp4)>());
      case Kind::fp8: return start(KindConstant<int(Kind::fp8)>());
      case Kind::bf16: break;
    }
  }
  return start(KindConstant<kAny>());
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

// Shared memory of gate_up: two buffers of slots for some tiles whose passes have all tokens; where passes have fewer,
// there are more tiles. False if those of one do not fit.
bool choose_slots(Experts& p, int& total) {
  constexpr int kEnoughTiles = 4;
  const int stretches = p.routed.stretches(), spans = int(ceil_div(stretches, kGateSpan));
  p.layout = ExpertLayout(p.tokens, p.pairs, 2, p.tokens, stretches, 0, stretches);
  p.layout.shared_rows = p.layout.rows;  // a block has those of one side
  const int least = 2 * 2 * spans * p.tokens * kColumnStride * 4;
  total = p.layout.sums + kEnoughTiles * least <= kGateShared ? kGateShared : kMaxExpertShared;
  p.sum_floats = (total - p.layout.sums) / 4;
  return p.layout.sums + least <= total;
}

cudaError_t start_gate_up(const Experts& p, bool overlap, cudaStream_t stream) {
  if (device().error != cudaSuccess) return device().error;
  int total = 0;
  auto fits = [&](int tokens) {
    Experts part = p;
    part.tokens = tokens, part.pairs = tokens * p.slots;
    return choose_slots(part, total);
  };
  return for_parts(p, fits, [&](Experts part) {
    choose_slots(part, total);
    Grid grid{.blocks = device().clusters[0], .threads = kExpertThreads, .shared = size_t(total)};
    grid.overlap = part.overlap = overlap;
    return for_kinds(part, [&](auto kind) {
      constexpr auto kernel = experts_gate_up_kernel<decltype(kind)::value>;
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
  p.spans = routed > shared ? routed : shared;
  const int tile_bytes = p.spans * (p.pairs + p.tokens) * kColumnStride * 4;
  auto bytes_of = [&](int tiles, int buffers) {
    const int own = (tiles + p.splits() - 1) >> p.split_bits;
    const int exchange = p.split_bits > 0 ? p.splits() * own * p.tokens * kUnitRows * 4 : 0;
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

cudaError_t start_down(Experts p, bool overlap, cudaStream_t stream) {
  if (device().error != cudaSuccess) return device().error;
  // How many blocks divide F is a function of the shape: a token's bits do not depend on how many there are.
  const int stretches = p.routed.stretches();
  for (p.split_bits = 0; p.split_bits < 2 && (2 << p.split_bits) <= stretches; ++p.split_bits) {}
  const int one = (p.slots + 1) * token_pitch(int(ceil_div(stretches, p.splits())) * kStretch);
  if (p.split_bits == 2 && one > kRowBytes) p.split_bits = kMaxSplitBits;
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
    Grid grid{.blocks = int64_t(used) << p.split_bits, .threads = kExpertThreads, .shared = size_t(total)};
    grid.cluster = p.splits();
    grid.overlap = part.overlap = overlap;
    return for_kinds(part, [&](auto kind) {
      constexpr auto kernel = experts_down_kernel<decltype(kind)::value>;
      const cudaError_t error = prepare<kernel>();
      return error == cudaSuccess ? launch(kernel, grid, stream, part) : error;
    });
  });
}

ExpertSide side_of(const int64_t* addresses, const float* global_scales, int64_t kind, bool e8m0, int64_t rows,
                   int64_t columns) {
  return {addresses, global_scales, nullptr, nullptr, Kind(kind), e8m0, int(rows), int(columns),
          Divisor(int(rows) / kUnitRows)};
}

bool can_take(const Experts& p) {
  auto fits = [](const ExpertSide& s) {
    return s.rows % kUnitRows == 0 && s.columns % kStretch == 0 && s.rows > 0 && s.columns > 0 && int(s.kind) >= 0 &&
           s.kind <= Kind::bf16 && uintptr_t(s.in) % 16 == 0;
  };
  return p.tokens >= 1 && p.tokens <= kMaxExpertTokens && p.slots >= 1 && p.pairs <= kMaxPairs && fits(p.routed) &&
         fits(p.shared);
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
  p.chosen = chosen, p.routing = routing, p.limit = float(limit), p.experts = int(experts);
  p.tokens = int(tokens), p.slots = int(slots), p.pairs = int(tokens * slots);
  return can_take(p) ? start_gate_up(p, overlap, stream) : cudaErrorInvalidValue;
}

// out [T, width]; the rest as above.
cudaError_t experts_down(In hidden, In shared_hidden, const int64_t* chosen, const int64_t* addresses,
                         const float* global_scales, const int64_t* shared_addresses,
                         const float* shared_global_scales, Out out, int64_t tokens, int64_t slots, int64_t width,
                         int64_t inner, int64_t shared_inner, int64_t kind, bool e8m0, int64_t shared_kind,
                         bool shared_e8m0, bool overlap, cudaStream_t stream) {
  for (Type type : {hidden.type, shared_hidden.type, out.type}) {
    if (type != Type::bf16) return cudaErrorInvalidValue;
  }
  Experts p = {side_of(addresses, global_scales, kind, e8m0, width, inner),
               side_of(shared_addresses, shared_global_scales, shared_kind, shared_e8m0, width, shared_inner)};
  p.routed.in = static_cast<const bf16*>(hidden.data), p.shared.in = static_cast<const bf16*>(shared_hidden.data);
  p.chosen = chosen, p.out = static_cast<bf16*>(out.data);
  p.tokens = int(tokens), p.slots = int(slots), p.pairs = int(tokens * slots);
  p.one_list = p.routed.kind == p.shared.kind && p.routed.e8m0 == p.shared.e8m0 && inner == shared_inner;
  return can_take(p) ? start_down(p, overlap, stream) : cudaErrorInvalidValue;
}

}  // namespace dsv4
