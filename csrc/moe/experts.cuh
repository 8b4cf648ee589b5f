// What both kernels of run_experts share: which experts which tokens need, and how a block's warps stream them.
//
// PASSES. A token and one of its slots are a pair. A pass is an expert and up to eight of the pairs that chose it (of
// gate_up up to T, so that a tile's sums never need more room): the columns of an MMA. Passes are in ascending order of
// experts; the shared expert, which every token takes, comes last.
//
// WORK. The rows that passes multiply, tokens of gate_up or h of down, lie in shared memory from the beginning. A block
// has a run of row tiles, and of each the same stretches of 256 columns. An item is a span of these stretches of one
// tile of one matrix; warps take items in turn, each with a ring of units under way (gemm/ring.cuh). An item's sums, 16
// rows x the columns of its pass, go to a slot in shared memory. After a barrier slots are added in ascending order of
// K. Spans depend on the shape of matrices alone, and a column on no other, so that a token's result has the same bits
// beside any other seven.
#pragma once

#include "common/overlap.cuh"
#include "gemm/ring.cuh"

namespace dsv4 {

constexpr int kExpertWarps = 16;
constexpr int kExpertThreads = kExpertWarps * kWarp;
constexpr int kRingUnits = 2;
constexpr int kStretch = 256;  // columns of a matrix are a multiple of it: whole units of every kind
constexpr int kStretchBytes = 2 * kStretch;  // of a row in shared memory
constexpr int kMaxExpertTokens = 8, kMaxPairs = 128;
constexpr int kColumns = 8;         // of a pass
constexpr int kColumnStride = 20;   // floats between the sums of two columns: no two lanes of a warp share a bank
constexpr int kMatrices = 3;        // of an expert, in tables: w1, w3, w2
constexpr int kQuads = kUnitRows / 4;
constexpr int kExpertRingBytes = kExpertWarps * kRingUnits * kUnitShared;
constexpr int kExpertBarriers = kExpertWarps * kRingUnits + 2;  // the rings', then that of a cluster's exchange
// Dynamic shared memory: what a block may have, and what leaves as much for one of another launch.
constexpr int kMaxExpertShared = 227 * 1024, kHalfExpertShared = 113 * 1024;
// Of gate_up: a block of down fits beside it, but no second one of its own, which would have to wait for the first
// while another multiprocessor does nothing.
constexpr int kGateShared = kHalfExpertShared + 1024;

// Division of 0 <= a by the same number many times, for a * by < 2^32.
struct Divisor {
  int by;
  uint32_t reciprocal;

  Divisor() = default;
  __host__ __device__ explicit Divisor(int by) : by(by), reciprocal(by == 1 ? 0 : 0xffffffffu / by + 1) {}
  __device__ int divide(int a) const { return by == 1 ? a : int(__umulhi(uint32_t(a), reciprocal)); }
};

// Experts of one kind and shape: the routed ones, or the shared one.
struct ExpertSide {
  const int64_t* addresses;    // [E, 3, 2]: a matrix, and the scales of its FP8 blocks
  const float* global_scales;  // [E, 3]
  const bf16* in;              // x [T, columns], or h [pairs, columns]
  bf16* hidden;                // gate_up: h [pairs, rows]
  Kind kind;
  bool e8m0;
  int rows, columns;  // of a matrix
  Divisor tiles;      // rows / 16

  __host__ __device__ int stretches() const { return columns / kStretch; }
  __host__ __device__ int stretch_bytes() const {  // of 16 rows
    return is_packed(kind) ? unit_bytes(kind) : kStretch / unit_columns(kind) * kPieces * kPieceBytes;
  }
};

// Shared memory of a block, in bytes from its beginning: the warps' rings, barriers and lists, the rows that are
// multiplied, slots of sums, and (down) the sums of a cluster's blocks.
struct ExpertLayout {
  int data, scales, global_scales, weight, largest, inverse, expert, begins, place, first, pair, row_at, count, block;
  int pitch, shared_pitch, rows, shared_rows, sums;

  ExpertLayout() = default;
  // `matrices` that a kernel reads of an expert; of routed and shared rows, the number and the stretches.
  ExpertLayout(int tokens, int pairs, int matrices, int routed, int stretches, int shared, int shared_stretches) {
    const int all = pairs + tokens, passes = pairs + 1;
    int at = kExpertRingBytes + 8 * kExpertBarriers;
    auto take = [&](int bytes) {
      at += bytes;
      return at - bytes;
    };
    data = take(8 * passes * matrices);
    scales = take(8 * passes * matrices);
    global_scales = take(4 * passes * matrices);
    for (int* list : {&weight, &largest, &inverse, &expert, &begins, &place, &pair, &row_at}) *list = take(4 * all);
    first = take(4 * (passes + 1));
    count = take(4);
    block = take(32);  // what a kernel's block has for itself
    at = int(ceil_div(at, 128)) * 128;
    pitch = token_pitch(stretches * kStretch);
    shared_pitch = token_pitch(shared_stretches * kStretch);
    rows = take(routed * pitch);
    shared_rows = take(shared * shared_pitch);
    sums = at;
  }
};

struct Experts {
  ExpertSide routed, shared;
  const int64_t* chosen;  // [T, K]
  const float* routing;   // [T, K]
  bf16* out;              // [T, D]
  float limit;
  int experts;               // that the tables have (gate_up)
  int tokens, slots, pairs;  // pairs = tokens x slots
  int sum_floats;            // gate_up: for slots
  bool one_list;             // down: the shared expert is one more of the routed ones' kind and shape
  int split_bits;            // down: 2^split_bits blocks of a cluster divide F
  bool overlap;
  int chunk_tiles, spans;    // down: tiles that have slots at once, and slots of each column of a tile
  int exchange;              // down: where in shared memory
  ExpertLayout layout;

  __host__ __device__ int splits() const { return 1 << split_bits; }
};

// The passes of a call, in shared memory: `routed` ones, then the shared expert's.
struct Passes {
  unsigned char* memory;
  const ExpertLayout& layout;
  int routed;

  template <class T>
  __device__ T* at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ int64_t* data() const { return at<int64_t>(layout.data); }      // [passes][matrices]: addresses
  __device__ int64_t* scales() const { return at<int64_t>(layout.scales); }
  __device__ float* global_scales() const { return at<float>(layout.global_scales); }
  __device__ float* weight() const { return at<float>(layout.weight); }      // of pairs: routing, or w2's global scale
  __device__ uint32_t* largest() const { return at<uint32_t>(layout.largest); }  // magnitude of each row
  __device__ float* inverse() const { return at<float>(layout.inverse); }    // the factor of its sums
  __device__ int* place() const { return at<int>(layout.place); }            // column of each pair
  __device__ int* first() const { return at<int>(layout.first); }            // column of each pass
  __device__ int* pair() const { return at<int>(layout.pair); }              // of each column
  __device__ int* row_at() const { return at<int>(layout.row_at); }          // where its row lies in memory
  __device__ int columns_of(int pass) const { return first()[pass + 1] - first()[pass]; }

  __device__ void find_matrix(const ExpertSide& side, int in_table, int to) const {
    data()[to] = side.addresses[2 * in_table];
    scales()[to] = side.addresses[2 * in_table + 1];
    global_scales()[to] = side.global_scales[in_table];
  }

  // kFirst .. + kCount - 1 are the matrices that the kernel reads. The whole block; ends with a barrier.
  template <int kFirst, int kCount>
  __device__ void find(const Experts& p) {
    constexpr bool kDown = kFirst == 2;
    int* expert = at<int>(layout.expert);
    int* begins = at<int>(layout.begins);  // of columns: the expert of the pass that begins there, or -1
    const int i = threadIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (i < p.pairs) {
      expert[i] = int(p.chosen[i]);
      if (!kDown) weight()[i] = p.routing[i];
    }
    if (i < p.pairs + p.tokens) largest()[i] = 0;
    __syncthreads();
    if (i < p.pairs) {
      const int mine = expert[i];
      if (kDown) weight()[i] = p.routed.global_scales[mine * kMatrices + kFirst];
      int before = 0, same = 0;
#pragma unroll 4
      for (int j = 0; j < p.pairs; ++j) {
        before += expert[j] < mine;
        same += expert[j] == mine && j < i;
      }
      const int column = before + same;
      place()[i] = column;
      pair()[column] = i;
      row_at()[column] = layout.rows + (kDown ? i : i / p.slots) * layout.pitch;
      begins[column] = same % (kDown ? kColumns : p.tokens) == 0 ? mine : -1;
    } else if (i < p.pairs + p.tokens) {
      place()[i] = pair()[i] = i;
      row_at()[i] = layout.shared_rows + (i - p.pairs) * layout.shared_pitch;
      weight()[i] = kDown ? p.shared.global_scales[kFirst] : 1.0f;
    }
    __syncthreads();
    if (warp < kCount) {
      int before = 0;
      for (int base = 0; base < p.pairs; base += kWarp) {
        const int of = base + lane < p.pairs ? begins[base + lane] : -1;
        const unsigned all = __ballot_sync(kFullMask, of >= 0);
        const int pass = before + __popc(all & ((1u << lane) - 1));
        if (of >= 0) {
          if (warp == 0) first()[pass] = base + lane;
          find_matrix(p.routed, of * kMatrices + kFirst + warp, pass * kCount + warp);
        }
        before += __popc(all);
      }
      if (lane == 0) {
        find_matrix(p.shared, kFirst + warp, before * kCount + warp);
        if (warp == 0) {
          first()[before] = p.pairs, first()[before + 1] = p.pairs + p.tokens;
          *at<int>(layout.count) = before;
        }
      }
    }
    __syncthreads();
    routed = *at<int>(layout.count);
  }
};

// How many of `all` workers take the routed experts' items, the others the shared one's, so that the last one ends
// early.
__device__ inline int divide_workers(int all, int routed, int routed_bytes, int shared, int shared_bytes) {
  const float bytes = float(routed) * float(routed_bytes), others = float(shared) * float(shared_bytes);
  const int low = min(max(int(float(all) * bytes / (bytes + others)), 1), all - 1), high = min(low + 1, all - 1);
  auto slowest = [&](int workers) {
    const int most = (routed + workers - 1) / workers, most_shared = (shared + all - workers - 1) / (all - workers);
    return fmaxf(float(most) * float(routed_bytes), float(most_shared) * float(shared_bytes));
  };
  return slowest(high) < slowest(low) ? high : low;
}

// Rows that are brought to shared memory as multiply_step reads them: of each row these stretches.
struct Rows {
  const bf16* in;  // [count, columns], from the first of the stretches on
  int count, columns, stretches;
  int at, pitch;  // in shared memory
  int index;      // of the first row, in the lists of Passes
  Kind kind;
  int first_warp;  // that has something to do

  // Tasks are stretches of rows; warps take them in turn, a lane 16 bytes of each.
  __device__ int tasks() const { return count * stretches; }
  __device__ int first_task() const { return (threadIdx.x / kWarp + kExpertWarps - first_warp) % kExpertWarps; }
  __device__ bool half() const { return is_half(kind); }
  __device__ uint4* place(unsigned char* memory, int row, int stretch) const {
    const int lane = threadIdx.x % kWarp;
    const int piece = kind == Kind::bf16 ? token_piece_at<Kind::bf16>(lane) : token_piece_at<Kind::nvfp4>(lane);
    return reinterpret_cast<uint4*>(memory + at + row * pitch + stretch * kStretchBytes + piece);
  }

  // As they are; for weights that become fp16 also the largest magnitude of each row.
  __device__ void copy(const Passes& passes) const {
    constexpr int kTogether = 4;
    const int lane = threadIdx.x % kWarp;
    for (int base = first_task(); base < tasks(); base += kTogether * kExpertWarps) {
      uint4 held[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int task = base + i * kExpertWarps, row = divide_fast(task, stretches);
        if (task < tasks()) held[i] = load_piece(in + row * columns + (task - row * stretches) * kStretch + 8 * lane);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int task = base + i * kExpertWarps, row = divide_fast(task, stretches);
        if (task >= tasks()) break;
        *place(passes.memory, row, task - row * stretches) = held[i];
        if (half()) {
          const uint32_t most = __reduce_max_sync(kFullMask, largest_bits(held[i]));
          if (lane == 0) atomicMax(passes.largest() + index + row, most);
        }
      }
    }
  }
  // After a barrier: each row times a power of two, as fp16. Another barrier, and they can be read.
  __device__ void scale(const Passes& passes, bool down) const {
    for (int i = threadIdx.x; i < count; i += kExpertThreads) {
      float factor = unit_factor(kind);
      if (half()) factor *= TokenScale(passes.largest()[index + i]).inverse;
      passes.inverse()[index + i] = down ? factor * passes.weight()[index + i] : factor;
    }
    if (!half()) return;
    for (int task = first_task(); task < tasks(); task += kExpertWarps) {
      const int row = divide_fast(task, stretches);
      uint4* piece = place(passes.memory, row, task - row * stretches);
      *piece = scale_to_f16(*piece, TokenScale(passes.largest()[index + row]).factor);
    }
  }
};

// An item: a span of stretches of a tile of a matrix.
struct Item {
  int pass, matrix, tile, span;
};

// The order of items of a block, or of some of its warps: groups (a tile, down: of all passes) of items.
template <bool kDown>
struct Order {
  const ExpertSide& side;
  int groups, items;                 // of a group
  int worker, workers;               // this warp among those that share the items
  int first_stretch, stretches;      // of the block
  int span, spans;                   // stretches that are added up in registers; such spans of a tile
  int first_pass, first_tile;        // gate_up: tile of the side's passes, one after another
  Divisor by;                        // down: spans

  __device__ Item at(int group, int item) const {
    if (kDown) {
      const int pass = by.divide(item);
      return {first_pass + pass, first_pass + pass, first_tile + group, item - pass * spans};
    }
    const int tile = first_tile + group / 2, pass = side.tiles.divide(tile);
    return {first_pass + pass, 2 * (first_pass + pass) + group % 2, tile - pass * side.tiles.by, item};
  }
  __device__ void settle(int& group, int& item) const {
    while (item >= items) item -= items, ++group;
  }
};

// A warp that multiplies the items of an order that are its own. Its ring starts with `start`.
template <Kind kind, bool kDown, bool kAlone>
struct Worker {
  static constexpr int kUnits = kStretch / unit_columns(kind);  // of a stretch
  static constexpr int kChains = kind == Kind::fp8 ? 1 : 2;     // of dependent MMAs
  const Passes& passes;
  const Order<kDown>& order;
  int lane;
  int group, item;              // to be multiplied next
  int ahead_group, ahead_item;  // to be copied after the one at
  int left = 0;                 // units, and the next of them: as stored, this lane's columns of row g
  const uint8_t* at = nullptr;
  Ring<kind, kRingUnits, kAlone> ring;

  __device__ Worker(const Passes& passes, const Order<kDown>& order, uint32_t shared, int warp, int lane)
      : passes(passes), order(order), lane(lane), group(0), item(order.worker),
        ring(shared + warp * kRingUnits * kUnitShared, shared + kExpertRingBytes + 8 * warp * kRingUnits, lane) {
    if (order.groups > 0) order.settle(group, item);
    ahead_group = group, ahead_item = item;
  }

  __device__ int units_of(int span) const { return min(order.span, order.stretches - span * order.span) * kUnits; }
  __device__ Source<kind> next() {
    const ExpertSide& side = order.side;
    if (left == 0 && ahead_group < order.groups) {
      const Item i = order.at(ahead_group, ahead_item);
      const int stretch = order.first_stretch + i.span * order.span;
      at = reinterpret_cast<const uint8_t*>(passes.data()[i.matrix]);
      if constexpr (is_packed(kind)) {
        at += uint32_t(i.tile * side.stretches() + stretch) * unit_bytes(kind);
      } else {
        const int row = i.tile * kUnitRows + lane / 4, column = stretch * kStretch + Unit<kind>::kLane * (lane % 4);
        at += uint32_t(row * side.columns + column) * Unit<kind>::kSize;
      }
      left = units_of(i.span);
      ahead_item += order.workers;
      order.settle(ahead_group, ahead_item);
    }
    Source<kind> source;
    source.exists = left > 0;
    if constexpr (is_packed(kind)) {
      source.unit = at;
      at += unit_bytes(kind);
    } else {
      source.unit.at = at;
      source.unit.below = 8 * side.columns * Unit<kind>::kSize;
      source.unit.width = unit_columns(kind);
      at += unit_columns(kind) * Unit<kind>::kSize;
    }
    left -= source.exists;
    return source;
  }
  __device__ void start(bool paced) {
    ring.fill([&] { return next(); }, paced && item_exists());
  }
  __device__ bool item_exists() const { return group < order.groups; }

  // All items of groups below `end`. slot(group, span, first column of the pass): where the sums of an item go.
  template <class Slot>
  __device__ void multiply(int end, const Slot& slot) {
    const int g = lane / 4, t = lane % 4;
    while (group < end) {
      const Item i = order.at(group, item);
      const int first = passes.first()[i.pass], columns = passes.first()[i.pass + 1] - first;
      const int row_at = passes.row_at()[first + min(g, columns - 1)] + i.span * order.span * kStretchBytes + 16 * t;
      uint32_t row = uint32_t(__cvta_generic_to_shared(passes.memory)) + row_at;
      float sum[kChains][4] = {};
      [[maybe_unused]] float total[4] = {};  // FP8: of the units before, each times its scale
      const int units = units_of(i.span);
#pragma unroll 1
      for (int unit = 0; unit < units; ++unit, row += 2 * unit_columns(kind)) {
        [[maybe_unused]] float scale;
        if constexpr (kind == Kind::fp8) {
          constexpr int kBlockColumns = unit_columns(kind);
          const int block = (order.first_stretch + i.span * order.span) * kUnits + unit;
          const int of_tile = i.tile / (kBlockColumns / kUnitRows) * (order.side.columns / kBlockColumns);
          scale = read_block_scale(reinterpret_cast<const void*>(passes.scales()[i.matrix]), order.side.e8m0,
                                   of_tile + block);
        }
        ring.take([&] { return next(); }, [&](int half, const uint32_t(&a)[kSteps][4]) {
          uint32_t x[kSteps][2];
          read_tokens(row + half * kHalfBytes, x);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) multiply_step<kind>(sum[step % kChains], a[step], x[step]);
        });
        if constexpr (kind == Kind::fp8) {
#pragma unroll
          for (int e = 0; e < 4; ++e) total[e] = fmaf(sum[0][e], scale, total[e]), sum[0][e] = 0.0f;
        }
      }
      float* to = slot(group, i.span, first) + 2 * t * kColumnStride + g;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float whole = kind == Kind::fp8 ? total[e] : sum[0][e] + sum[kChains - 1][e];
        if (2 * t + e % 2 < columns) to[e % 2 * kColumnStride + 8 * (e / 2)] = whole;
      }
      item += order.workers;
      order.settle(group, item);
    }
  }
};

// A barrier of the block whose warps come to it in code for different kinds.
__device__ inline void sync_block() { asm volatile("barrier.sync.aligned 0;" ::: "memory"); }

// Four rows' sums in ascending order of K: `count` slots, `step` floats from one to the next.
__device__ inline float4 add_slots(const float* from, int count, int step) {
  float4 sum = {};
#pragma unroll 4
  for (int s = 0; s < count; ++s, from += step) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}
__device__ inline void store_rounded(bf16* to, const float4& v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y), high = __floats2bfloat162_rn(v.z, v.w);
  *reinterpret_cast<uint2*>(to) = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}

}  // namespace dsv4
