// What both kernels of run_experts share: which experts which tokens need, and how a block's warps stream them.
//
// PASSES. A token and one of its slots are a pair. A pass is an expert and up to eight of the pairs that chose it (of
// gate_up up to T, so that a tile's sums never need more room): the columns of an MMA. The first pass is the shared
// expert's, which every token takes and which is known before anyone has chosen; the others are in ascending order of
// experts.
//
// WORK. The rows that passes multiply, tokens of gate_up or h of down, lie in shared memory from the beginning: for
// weights that become fp16 as fp16, every stretch of 256 columns times a power of two of its own. A block has a run of
// row tiles, and of each the same stretches. An item is a span of these stretches of one tile of one matrix. Warps
// divide the items, span after span and of each all tiles, evenly; each has a ring of units under way (gemm/ring.cuh).
// So most items of a warp differ in the tile alone, and it finds out once where rows, weights and sums lie. An item's
// sums, 16 rows x the columns of its pass, go to a slot in shared memory. After a barrier slots are added in ascending
// order of K. Spans depend on the shape of matrices alone, and a column on no other, so that a token's result has the
// same bits beside any other seven.
#pragma once

#include "common/overlap.cuh"
#include "gemm/ring.cuh"
#include "gemm/sums.cuh"

namespace dsv4 {

constexpr int kExpertWarps = 16;
constexpr int kExpertThreads = kExpertWarps * kWarp;
constexpr int kRingUnits = 2;
constexpr int kStretch = 256;  // columns of a matrix are a multiple of it: whole units of every kind
constexpr int kStretchBytes = 2 * kStretch;  // of a row in shared memory
constexpr int kMaxExpertTokens = 8, kMaxPairs = 128;
constexpr int kColumns = 8;         // of a pass
constexpr int kMatrices = 3;        // of an expert, in tables: w1, w3, w2
constexpr int kOrderBytes = 64;     // of a GateOrder
constexpr int kExpertRingBytes = kExpertWarps * kRingUnits * kUnitShared;
constexpr int kExpertBarriers = kExpertWarps * kRingUnits + 1;  // the rings', then that of a cluster's exchange
// Dynamic shared memory that a block may have. A multiprocessor has 228 KB, of which each block takes one more.
constexpr int kMaxExpertShared = 227 * 1024;
// With these a block of gate_up and one of down fit together, but not two of gate_up: the second one would have to wait
// for the first while another multiprocessor does nothing.
constexpr int kGateShared = 113 * 1024 + 128, kHalfExpertShared = 113 * 1024 - 128;

// Division of 0 <= a by the same number many times, for a * by < 2^32.
struct Divisor {
  int by;
  uint32_t reciprocal;

  Divisor() = default;
  __host__ __device__ explicit Divisor(int by) : by(by), reciprocal(by == 1 ? 0 : 0xffffffffu / by + 1) {}
  __device__ int divide(int a) const { return by == 1 ? a : int(__umulhi(uint32_t(a), reciprocal)); }
};

// A row in shared memory: its columns, then the factor of each stretch that undoes its power of two.
__host__ __device__ constexpr int factors_at(int stretches) { return stretches * kStretchBytes; }
__host__ __device__ constexpr int row_pitch(int stretches) {
  const int columns = token_pitch(stretches * kStretch), needed = factors_at(stretches) + 4 * stretches;
  return columns + (needed > columns ? (needed - columns + 127) / 128 * 128 : 0);  // whole lines: banks as before
}

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
  int tile_bytes;     // of 16 rows

  __host__ __device__ int stretches() const { return columns / kStretch; }
  __host__ __device__ int stretch_bytes() const {  // of 16 rows
    return is_packed(kind) ? unit_bytes(kind) : kStretch / unit_columns(kind) * kPieces * kPieceBytes;
  }
};

// Shared memory of a block, in bytes from its beginning: the warps' rings, barriers and lists, the rows that are
// multiplied, slots of sums, and (down) the sums of a cluster's blocks.
struct ExpertLayout {
  int data, scales, global_scales, routing, expert, begins, first, pair, row_at, count, orders;
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
    for (int* list : {&routing, &expert, &begins, &pair, &row_at}) *list = take(4 * all);
    first = take(4 * (passes + 1));
    count = take(4);
    orders = take(2 * kOrderBytes);  // gate_up
    at = int(ceil_div(at, 128)) * 128;
    pitch = row_pitch(stretches);
    shared_pitch = row_pitch(shared_stretches);
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
  int experts;               // that the tables have
  int tokens, slots, pairs;  // pairs = tokens x slots
  int sum_floats;            // gate_up: for slots
  bool alike;                // the shared expert is one more of the routed ones' kind, in down also of their shape
  int routed_workers;        // blocks (gate_up) or warps of a block (down); any others are the shared expert's
  int split_bits;            // down: 2^split_bits blocks of a cluster divide F
  bool overlap;
  int span, spans;           // gate_up: stretches that are added up in registers, and such spans of a row
  int chunk_tiles, longest;  // down: tiles that have slots at once, and the most stretches that a block has of a row
  int slot_floats;           // down: of a tile's
  int exchange;              // down: where in shared memory
  ExpertLayout layout;

  __host__ __device__ int splits() const { return 1 << split_bits; }
};

// The passes of a call, in shared memory.
struct Passes {
  unsigned char* memory;
  const ExpertLayout& layout;

  template <class T>
  __device__ T* at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ int64_t* data() const { return at<int64_t>(layout.data); }      // [passes][matrices]: addresses
  __device__ int64_t* scales() const { return at<int64_t>(layout.scales); }
  __device__ float* global_scales() const { return at<float>(layout.global_scales); }
  __device__ float* routing() const { return at<float>(layout.routing); }    // of pairs; 1 of the shared expert's
  __device__ int* first() const { return at<int>(layout.first); }            // column of each pass
  __device__ int* pair() const { return at<int>(layout.pair); }              // of each column
  __device__ int* row_at() const { return at<int>(layout.row_at); }          // where its row lies in memory
  __device__ int columns_of(int pass) const { return first()[pass + 1] - first()[pass]; }

  // How many passes there are.
  __device__ int count() const { return *at<int>(layout.count); }

  // What a thread needs to know of the pair with its number.
  struct Choice {
    int expert;
    float routing;
  };
  __device__ Choice ask(const Experts& p) const {
    const int i = threadIdx.x;
    Choice choice = {};
    if (i < p.pairs) {
      choice.expert = int(p.chosen[i]);
      if (p.routing != nullptr) choice.routing = p.routing[i];
    }
    return choice;
  }

  // The lists of the first pass, the shared expert's, and then all others. The whole block, which needs a barrier
  // before they are read. kFirst .. + kCount - 1 are the matrices that the kernel reads.
  template <int kFirst, int kCount>
  __device__ void find_shared(const Experts& p) const {
    const int i = threadIdx.x;
    if (i < p.tokens) {
      pair()[i] = p.pairs + i;
      row_at()[i] = layout.shared_rows + i * layout.shared_pitch;
      routing()[p.pairs + i] = 1.0f;
    }
    if (i < kCount) find_matrix(p.shared, kFirst + i, i);
    if (i == 0) first()[0] = 0, first()[1] = p.tokens;
  }
  template <int kFirst, int kCount>
  __device__ void find(const Experts& p, const Choice& choice) const {
    constexpr bool kDown = kFirst == 2;
    int* expert = at<int>(layout.expert);  // of pairs, then of passes
    int* begins = at<int>(layout.begins);  // of columns: the expert of the pass that begins there, or -1
    const bool few = p.pairs <= kWarp;     // the work of one warp
    const int i = threadIdx.x, threads = few ? kWarp : kExpertThreads;
    if (i >= threads) return;
    auto barrier = [&] {
      if (few) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    };
    // A thread a pair.
    if (i < p.pairs) expert[i] = choice.expert, routing()[i] = choice.routing;
    barrier();
    if (i < p.pairs) {
      int before = 0, same = 0;
#pragma unroll 2
      for (int j = 0; j < p.pairs; ++j) {
        const int other = expert[j];
        before += other < choice.expert;
        same += other == choice.expert && j < i;
      }
      const int column = before + same;
      pair()[p.tokens + column] = i;
      row_at()[p.tokens + column] = layout.rows + (kDown ? i : divide_fast(i, p.slots)) * layout.pitch;
      begins[column] = same % (kDown ? kColumns : p.tokens) == 0 ? choice.expert : -1;
    }
    barrier();
    if (i < kWarp) {
      int passes = 1;
      for (int base = 0; base < p.pairs; base += kWarp) {
        const int column = base + i, of = column < p.pairs ? begins[column] : -1;
        const unsigned all = __ballot_sync(kFullMask, of >= 0);
        const int pass = passes + __popc(all & ((1u << i) - 1));
        if (of >= 0) first()[pass] = p.tokens + column, expert[pass - 1] = of;
        passes += __popc(all);
      }
      if (i == 0) first()[passes] = p.tokens + p.pairs, *at<int>(layout.count) = passes;
    }
    barrier();
    for (int to = kCount + i; to < count() * kCount; to += threads) {
      find_matrix(p.routed, expert[to / kCount - 1] * kMatrices + kFirst + to % kCount, to);
    }
  }

 private:
  __device__ void find_matrix(const ExpertSide& side, int in_table, int to) const {
    const longlong2 from = __ldg(reinterpret_cast<const longlong2*>(side.addresses) + in_table);
    global_scales()[to] = __ldg(side.global_scales + in_table);
    data()[to] = from.x;
    scales()[to] = from.y;
  }
};

// Number `index` of `of` shares of `all`.
struct Share {
  int first, count;
  __device__ Share(int all, int of, int index) {
    const int each = divide_fast(all, of), more = all - each * of;
    first = index * each + min(index, more), count = each + (index < more);
  }
};

// A stretch of a row that is brought to shared memory as multiply_step reads it.
struct Stretch {
  const bf16* from;
  unsigned char* row;  // in shared memory
  int index, of;       // of the row's stretches
  Kind kind;           // of the weights that meet it
  bool exists;

  __device__ uint4 load() const { return load_piece(from + 8 * (threadIdx.x % kWarp)); }
  __device__ void store(uint4 piece) const {
    const int lane = threadIdx.x % kWarp;
    const int at = kind == Kind::bf16 ? token_piece_at<Kind::bf16>(lane) : token_piece_at<Kind::nvfp4>(lane);
    if (is_half(kind)) {
      const TokenScale scale(__reduce_max_sync(kFullMask, largest_bits(piece)));
      piece = scale_to_f16(piece, scale.factor);
      if (lane == 0) reinterpret_cast<float*>(row + factors_at(of))[index] = scale.inverse * unit_factor(kind);
    }
    *reinterpret_cast<uint4*>(row + index * kStretchBytes + at) = piece;
  }
};

// Brings `find(task)` for tasks first .. count - 1, which the warps take in turn; several are on their way at once.
template <class Find>
__device__ inline void copy_rows(int first, int count, const Find& find) {
  constexpr int kTogether = 4;
  for (int base = first + threadIdx.x / kWarp; base < count; base += kTogether * kExpertWarps) {
    uint4 held[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const Stretch stretch = find(base + i * kExpertWarps);
      if (stretch.exists) held[i] = stretch.load();
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const Stretch stretch = find(base + i * kExpertWarps);
      if (stretch.exists) stretch.store(held[i]);
    }
  }
}

// Items of one span and of tiles that follow one another.
struct Segment {
  int pass, matrix, tile, span, count;
};

// The orders of items, of a block or of some of its warps. An outer index and then a tile name an item; outer is of
// gate_up a span of w1 or then of w3, of down a span of a pass.
struct DownOrder {
  static constexpr int span = 1;   // stretches that are added up in registers
  int workers;                     // warps that share the items
  int first_stretch, stretches;    // of the block
  int outers, tiles, chunk;        // tiles of the block, and those that have slots at once
  int first_pass, first_tile;
  Divisor by;                      // spans
  int slot_floats;                 // of a tile

  __device__ int of_tile(int) const { return slot_floats; }
  __device__ int chunk_end(int first) const { return min(first + chunk, tiles); }
  // `count`: at least so many tiles of the order from this one on lie in the same matrix.
  __device__ Segment at(int outer, int tile) const {
    const int pass = by.divide(outer);
    return {first_pass + pass, first_pass + pass, first_tile + tile, outer - pass * stretches, tiles};
  }
};
struct GateOrder {
  static constexpr int workers = kExpertWarps, first_stretch = 0;
  int stretches, span, spans, outers;
  int tiles, chunk;
  int shared_tiles, first_shared, shared_chunk;  // the block's first tiles are the shared expert's
  int first_routed;                              // tile of all passes of routed experts, one after another
  Divisor by;                                    // row tiles of a routed expert
  // Slots, of each tile all spans of w1, then those of w3, have as many columns as the passes of this block at most.
  int columns, shared_columns;
  int buffer_floats;  // of one of two buffers, which take chunks in turn; 0: slots of all tiles fit

  __device__ bool is_shared(int tile) const { return tile < shared_tiles; }
  __device__ int chunk_end(int first) const {
    return is_shared(first) ? min(first + shared_chunk, shared_tiles) : min(first + chunk, tiles);
  }
  __device__ Segment at(int outer, int tile) const {
    const int w3 = outer >= spans, span = outer - w3 * spans;
    if (is_shared(tile)) return {0, w3, first_shared + tile, span, shared_tiles - tile};
    const int of_all = first_routed + tile - shared_tiles, pass = by.divide(of_all), row_tile = of_all - pass * by.by;
    return {1 + pass, 2 * (1 + pass) + w3, row_tile, span, by.by - row_tile};
  }
  // Floats of a slot of a tile, and of all its slots.
  __device__ int of_slot(int tile) const { return (is_shared(tile) ? shared_columns : columns) * kSumStride; }
  __device__ int of_tile(int tile) const { return outers * of_slot(tile); }
  __device__ int of_shared_tile() const { return outers * shared_columns * kSumStride; }
  // Floats before those of a tile.
  __device__ int before(int tile) const {
    if (buffer_floats == 0) {
      return min(tile, shared_tiles) * of_shared_tile() + max(tile - shared_tiles, 0) * of_tile(tile);
    }
    const int first = is_shared(tile) ? 0 : shared_tiles, each = is_shared(tile) ? shared_chunk : chunk;
    const int number = divide_fast(tile - first, each), earlier = divide_fast(first + shared_chunk - 1, shared_chunk);
    return (earlier + number) % 2 * buffer_floats + (tile - first - number * each) * of_tile(tile);
  }
};

static_assert(sizeof(GateOrder) <= kOrderBytes);

// A warp's items of a chunk of tiles, which are counted outer after outer.
template <class Order>
struct Part {
  const Order& order;
  int worker, first_tile;

  __device__ int tiles() const { return order.chunk_end(first_tile) - first_tile; }
  // The first item of a worker.
  __device__ int begin(int worker) const { return divide_fast(order.outers * tiles() * worker, order.workers); }
  __device__ int begin() const { return begin(worker); }
  __device__ int end() const { return begin(worker + 1); }
  // The items of the same matrix and span from this one on. `tile`: the first one's, in the order.
  __device__ Segment at(int item, int& tile) const {
    const int outer = divide_fast(item, tiles()), of_chunk = item - outer * tiles();
    tile = first_tile + of_chunk;
    Segment s = order.at(outer, tile);
    s.count = min(min(end() - item, tiles() - of_chunk), s.count);
    return s;
  }
};

// A warp that multiplies the items of an order that are its own. Its ring starts with `start`; kWhole: see there.
template <Kind kind, class Order, bool kWhole>
class Worker {
 public:
  // Number `worker` of those of the order, with the ring of its warp.
  __device__ Worker(const Passes& passes, const ExpertSide& side, const Order* order, int worker, int warp)
      : passes_(passes), side_(side), order_(order), worker_(worker),
        ring_(shared_memory() + warp * kRingUnits * kUnitShared,
              shared_memory() + kExpertRingBytes + 8 * warp * kRingUnits, lane()) {}

  // The same as before and more behind it.
  __device__ void extend(const Order* order) { order_ = order; }
  // Start copying the first `count` units, so far as the order goes; once it goes farther the rest can be started.
  __device__ void start(int count, bool paced) {
#pragma unroll 1
    for (; started_ < count; ++started_) {
      if (left_ == 0) next_item();
      if (left_ == 0) break;
      ring_.fill_slot(started_, [&] { return next(); }, paced);
    }
  }

  // All items of the chunk of tiles that begins with this one. slot(segment, its first tile in the order, column of its
  // pass): where the sums of the first of its items go.
  template <class Slot>
  __device__ void multiply(int first_tile, const Slot& slot) {
    const int g = lane() / 4, t = lane() % 4;
    const Part<Order> part = {*order_, worker_, first_tile};
    for (int item = part.begin(); item < part.end();) {
      int tile;
      Segment s = part.at(item, tile);
      item += s.count;
      const int first = passes_.first()[s.pass], columns = passes_.columns_of(s.pass);
      // Columns past the last one stand for it.
      auto row_of = [&](int c) { return shared_memory() + passes_.row_at()[first + min(c, columns - 1)]; };
      const int from = s.span * order_->span, units = units_of(s.span);
      const uint32_t row = row_of(g) + from * kStretchBytes + 16 * t;
      // Of columns 2 t and 2 t + 1: where the factors of their rows are and where their sums go.
      uint32_t factors[2];
      float* to[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        factors[c] = row_of(2 * t + c) + factors_at(order_->stretches) + 4 * from;
        to[c] = slot(s, tile, min(2 * t + c, columns - 1)) + g;
      }
#pragma unroll 1
      for (; s.count > 0; --s.count, ++s.tile) {
        float sum[4] = {};
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
          [[maybe_unused]] float scale = 1.0f;
          if constexpr (kind == Kind::fp8) {
            constexpr int kBlockColumns = unit_columns(kind);
            const int block = (order_->first_stretch + from) * kUnits + unit;
            const int before = s.tile / (kBlockColumns / kUnitRows) * (side_.columns / kBlockColumns);
            scale = read_block_scale(reinterpret_cast<const void*>(passes_.scales()[s.matrix]), side_.e8m0,
                                     before + block);
          }
          float by[2] = {1.0f, 1.0f};
          if constexpr (is_half(kind)) {
#pragma unroll
            for (int c = 0; c < 2; ++c) by[c] = read_shared_float(factors[c] + 4 * (unit / kUnits));
          }
          float chain[kChains][4] = {};
          ring_.take([&] { return next(); }, [&](int half, const uint32_t(&a)[kSteps][4]) {
            uint32_t x[kSteps][2];
            read_tokens(row + unit * 2 * unit_columns(kind) + half * kHalfBytes, x);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) multiply_step<kind>(chain[step % kChains], a[step], x[step]);
          });
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float of_unit = kChains == 2 ? chain[0][e] + chain[kChains - 1][e] : chain[0][e];
            sum[e] = fmaf(of_unit, kind == Kind::fp8 ? by[e % 2] * scale : by[e % 2], sum[e]);
          }
        }
        const float scale = passes_.global_scales()[s.matrix] * (is_half(kind) ? 1.0f : unit_factor(kind));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (2 * t + e % 2 < columns) to[e % 2][8 * (e / 2)] = sum[e] * scale;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) to[c] += order_->of_tile(first_tile);
      }
    }
  }

 private:
  static constexpr int kUnits = kStretch / unit_columns(kind);  // of a stretch
  static constexpr int kChains = kind == Kind::fp8 ? 1 : 2;     // of dependent MMAs

  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ uint32_t shared_memory() const { return uint32_t(__cvta_generic_to_shared(passes_.memory)); }
  __device__ int units_of(int span) const {
    return min(order_->span, order_->stretches - span * order_->span) * kUnits;
  }

  // Where the next item's units lie.
  __device__ void next_item() {
    if (same_ > 0) {
      at_ += side_.tile_bytes - units_ * step();
      --same_;
    } else {
      for (;; chunk_ = order_->chunk_end(chunk_), item_ = -1) {
        if (chunk_ >= order_->tiles) return;
        const Part<Order> part = {*order_, worker_, chunk_};
        if (item_ < 0) item_ = part.begin();
        if (item_ < part.end()) break;
      }
      int tile;
      const Segment s = Part<Order>{*order_, worker_, chunk_}.at(item_, tile);
      item_ += s.count;
      same_ = s.count - 1;
      units_ = units_of(s.span);
      const int unit = (order_->first_stretch + s.span * order_->span) * kUnits;
      at_ = reinterpret_cast<const uint8_t*>(passes_.data()[s.matrix]);
      at_ += int64_t(s.tile) * side_.tile_bytes + unit * step();
      if constexpr (!is_packed(kind)) {
        at_ += (lane() / 4 * side_.columns + Unit<kind>::kLane * (lane() % 4)) * Unit<kind>::kSize;
      }
    }
    left_ = units_;
  }
  // Bytes from a unit to the next one of a tile.
  __device__ static constexpr int step() {
    if constexpr (is_packed(kind)) {
      return unit_bytes(kind);
    } else {
      return unit_columns(kind) * Unit<kind>::kSize;
    }
  }
  __device__ Source<kind> next() {
    if (left_ == 0) next_item();
    Source<kind> source;
    source.exists = left_ > 0;
    if constexpr (is_packed(kind)) {
      source.unit = at_;
    } else {
      source.unit.at = at_;
      source.unit.below = 8 * side_.columns * Unit<kind>::kSize;
      source.unit.width = unit_columns(kind);
    }
    at_ += step();
    left_ -= source.exists;
    return source;
  }

  const Passes& passes_;
  const ExpertSide& side_;
  const Order* order_;
  int worker_;
  int started_ = 0;  // slots of the ring
  // What is to be copied next.
  int chunk_ = 0, item_ = -1;    // the item after the segment, of its chunk; -1: the first one
  int same_ = 0;                 // items of the segment behind the one that is being copied
  int units_ = 0, left_ = 0;     // of that one, and those of it that are still to be copied
  const uint8_t* at_ = nullptr;  // the next of them: as stored, this lane's columns of row g
  Ring<kind, kRingUnits, kWhole> ring_;
};

// A barrier of the block whose warps come to it in code for different kinds.
__device__ inline void sync_block() { asm volatile("barrier.sync.aligned 0;" ::: "memory"); }

__device__ inline void store_rounded(bf16* to, const float4& v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y), high = __floats2bfloat162_rn(v.z, v.w);
  *reinterpret_cast<uint2*>(to) = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}

}  // namespace dsv4
