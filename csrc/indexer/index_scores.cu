// index_scores: ops/indexer/reference.py for bf16 queries: score[t, j] = sum_h w[t, h] relu(q[t, h] . k[j]).
//
// Keys are rows of the product, heads its columns: a warp has 16 keys of 128 dims as A operands in registers, made once
// of index records or bf16 rows, and multiplies them with one query after another. Of a query, 64 heads are a slot of B
// in shared memory; more heads are a second slot. A block has up to eight slots, staged once, and its groups of four
// warps walk through tiles of 64 keys; the next tile's bytes come while this one is multiplied. relu, weights and
// the sum over heads happen on the sums in registers, 16 heads a thread in ascending order, then over four lanes: the
// [heads x keys] products never leave the registers. Two forms of the inner product share all of this: wgmma of sm_90a,
// where the sums of one slot are finished while the next one is multiplied, and mma.sync.
//
// The sum over dims may be taken in any fixed order. Lane 4 g + t takes dims 8 t .. 8 t + 7 of each 32: one word of a
// record, or 16 bytes of bf16. Word i of their four pairs is half i % 2 of MMA step 2 p + i / 2 of 32-dim block p; a
// pair is the dims (i, i + 4) of records, so that shifts and masks alone make it of the word, and (2 i, 2 i + 1) of
// bf16. Queries are staged in the same order. e2m1 codes become bf16 times 2^-126, which the multiplication by the
// scale takes back, but for 2^-32: so scales from 2^-94 to 2^33 are exact, and the weights take the rest.
//
// Tile i belongs to group i / splits % groups of split i % splits: what is visible spreads over all blocks, whatever
// the table's capacity, and a block without a visible tile leaves. A score's bits depend on its query and key alone.
//
// For the choice that follows a step, a warp also leaves the largest of its 16 scores, as an integer (REDUX).
//
// Floor: 68 bytes a key, 2 * 128 flop a key and head. One query, 64 heads: 4,096 keys 0.28 MB, 262,144 keys 17.8 MB:
// 4.1 us, and 4.3 GFLOP: 4.6 us of an H200's 940 TFLOPS; 31 tiles a multiprocessor, each 330 instructions of a warp of
// every scheduler: 5.4 us. Expected of a step: 3 us (launch 1, visible, queries and keys together 0.8, the rest
// latency), 32,768 keys 3.5 us, one tile a group, 262,144 keys 10 us. 8,192 queries at 15,400 keys: 2.06 TFLOP, 2.2 ms;
// expected 3.7 ms.
// sass index_scores_kernel: LDG.E, STG.E
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/order.cuh"
#include "common/overlap.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {
namespace {

constexpr bool kHasWgmma = DSV4_ARCH == 90;
constexpr int kWidth = 128;                // dims of queries and keys
constexpr int kSteps = kWidth / 16;        // MMA steps
constexpr int kBlocks = kWidth / 32;       // blocks of 32 dims, of one scale
constexpr int kHeads = 64;                 // of a slot
constexpr int kMaxHeads = 2 * kHeads;
constexpr int kGroupThreads = 4 * kWarp;
// Groups of four warps: with one slot there are registers for a fourth, which hides more of the others' waits.
__host__ __device__ constexpr int groups_of(bool one) { return one ? 4 : 3; }
constexpr int kTile = 64;                  // keys of a group
constexpr int kRecord = 68;                // bytes: 64 of codes, low nibble first, and four scales
constexpr int kStep = 8;                   // queries up to which one group of them is all there is
constexpr int kMaxQueries = 8;             // of a block
constexpr int kHalfSlot = kHeads * kSwizzleRow;  // 64 dims of all heads of a slot
constexpr int kSlot = 2 * kHalfSlot;
constexpr int kOctetsOfSlot = kHeads * kWidth / 8;

// Slots of a block: 128 KB for wgmma; what fits every architecture for mma.sync.
constexpr int max_slots(bool wgmma) { return wgmma ? 8 : 4; }
constexpr size_t shared_bytes(int slots) { return kSwizzleGroup + slots * (kSlot + kHeads * sizeof(float)); }

struct Scores {
  const bf16* q;           // [T, Hi, 128]
  const void* keys;        // [C, 68] records or [C, 128] bf16
  const float* weights;    // [T, Hi]
  const int64_t* visible;  // [T]
  float* out;              // [T, C]
  unsigned* best;          // [T, best_pitch]: the largest score of every 16 entries (common/order.cuh), or null
  int tokens, heads, entries, best_pitch;
  int least;               // a query that sees no more than so many entries is left out
  int parts;               // slots of a query
  int queries;             // of a block
  int slots;               // of a block; 1 or even
  int splits;              // of the keys
};

// A warp's 16 keys: lane 4 g + t has its dims of rows g and g + 8.
struct Records {
  static constexpr bool kAhead = true;  // loaded one tile ahead
  static constexpr int kBytes = kRecord;
  static constexpr float kFactor = 0x1p32f;
  uint32_t codes[2][kBlocks], scales[2];

  __device__ void load(const void* table, int row, int last, int t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto* from = static_cast<const uint32_t*>(table) + int64_t(min(row + 8 * r, last)) * (kRecord / 4);
#pragma unroll
      for (int p = 0; p < kBlocks; ++p) codes[r][p] = from[4 * p + t];
      scales[r] = from[kWidth / 8];
    }
  }

  __device__ void convert(uint32_t (&a)[kSteps][4]) const {
    constexpr uint32_t kSize = 0x01c001c0, kSign = 0x80008000;
#pragma unroll
    for (int p = 0; p < kBlocks; ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t q = codes[r][p];
        // 2^(byte - 127 + 126 - 32) twice, in bf16: exponent byte + 94.
        const uint32_t scale = (__byte_perm(scales[r], 0, 0x4040 + 0x0101 * p) + 0x005e005e) << 7;
        const uint32_t pairs[] = {
            ((q << 6) & kSize) | ((q << 12) & kSign), ((q << 2) & kSize) | ((q << 8) & kSign),
            ((q >> 2) & kSize) | ((q << 4) & kSign), ((q >> 6) & kSize) | (q & kSign)};
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 * p + i / 2][i % 2 * 2 + r] = multiply(pairs[i], scale);
      }
    }
  }

  // A lane's eight dims of a query, as two dims a word, in the order of the operands.
  static __device__ uint4 arrange(const uint4& v) {
    return {__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
            __byte_perm(v.y, v.w, 0x7632)};
  }

 private:
  static __device__ uint32_t multiply(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
  }
};

struct PlainKeys {
  static constexpr bool kAhead = false;  // registers for two tiles would not do
  static constexpr int kBytes = 2 * kWidth;
  static constexpr float kFactor = 1.0f;
  uint4 octets[2][kBlocks];

  __device__ void load(const void* table, int row, int last, int t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto* from = static_cast<const bf16*>(table) + int64_t(min(row + 8 * r, last)) * kWidth + 8 * t;
#pragma unroll
      for (int p = 0; p < kBlocks; ++p) octets[r][p] = *reinterpret_cast<const uint4*>(from + 32 * p);
    }
  }
  __device__ void convert(uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int p = 0; p < kBlocks; ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& v = octets[r][p];
        a[2 * p][r] = v.x, a[2 * p][2 + r] = v.y;
        a[2 * p + 1][r] = v.z, a[2 * p + 1][2 + r] = v.w;
      }
    }
  }
  static __device__ uint4 arrange(const uint4& v) { return v; }
};

// Queries first .. first + count - 1 as slots of B, in the order of the keys' dims; heads and queries that do not exist
// are zeros. A warp stores 16 bytes of each of eight rows, which meet no bank twice.
template <class Keys, bool kOne>
__device__ void stage_queries(const Scores& p, int first, int count, unsigned char* slots, float* weights) {
  constexpr int kThreads = groups_of(kOne) * kGroupThreads;
  const int all = kOne ? 1 : p.slots, parts = kOne ? 1 : p.parts;
#pragma unroll 4
  for (int i = threadIdx.x; i < all * kOctetsOfSlot; i += kThreads) {
    const int t = i % 4, block = i / 32 % kBlocks, slot = i / kOctetsOfSlot;
    const int row = i / 128 % 8 * 8 + i / 4 % 8, query = slot / parts, head = slot % parts * kHeads + row;
    uint4 v = {};
    if (query < count && head < p.heads) {
      const bf16* from = p.q + (int64_t(first + query) * p.heads + head) * kWidth;
      v = *reinterpret_cast<const uint4*>(from + 32 * block + 8 * t);
    }
    v = Keys::arrange(v);
    unsigned char* half = slots + slot * kSlot + block / 2 * kHalfSlot + 4 * t;
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      *reinterpret_cast<uint32_t*>(half + swizzled(row, block % 2 * 4 + word)) = words[word];
    }
  }
  for (int i = threadIdx.x; i < all * kHeads; i += kThreads) {
    const int slot = i / kHeads, query = slot / parts, head = slot % parts * kHeads + i % kHeads;
    const bool real = query < count && head < p.heads;
    weights[i] = real ? p.weights[int64_t(first + query) * p.heads + head] * Keys::kFactor : 0.0f;
  }
}

// Sums over a lane's heads of keys g and g + 8, of even and of odd heads.
struct Sums {
  float upper[2] = {}, lower[2] = {};

  // d: the products of eight heads 8 j + .. with both keys, as mma_bf16 leaves them; w: weights of heads 2 t, 2 t + 1.
  __device__ void add(const float* d, const float2& w) {
    upper[0] = fmaf(w.x, fmaxf(d[0], 0.0f), upper[0]);
    upper[1] = fmaf(w.y, fmaxf(d[1], 0.0f), upper[1]);
    lower[0] = fmaf(w.x, fmaxf(d[2], 0.0f), lower[0]);
    lower[1] = fmaf(w.y, fmaxf(d[3], 0.0f), lower[1]);
  }
};

// Adds up over the four lanes of a key and stores the warp's 16 scores, those below `seen`, and in `best` the largest.
__device__ inline void store_scores(const Sums& sums, float* row, unsigned* best, int key, int seen) {
  const int lane = threadIdx.x % kWarp, t = lane % 4;
  const float upper = sums.upper[0] + sums.upper[1], lower = sums.lower[0] + sums.lower[1];
  // Even lanes go on with the upper key, odd ones with the lower key.
  float sum = t % 2 ? lower : upper;
  sum += __shfl_xor_sync(kFullMask, t % 2 ? upper : lower, 1);
  sum += __shfl_xor_sync(kFullMask, sum, 2);
  const int own = key + lane / 4 + t % 2 * 8;
  if (t < 2 && own < seen) row[own] = sum;
  if (!best) return;
  const unsigned largest = __reduce_max_sync(kFullMask, own < seen ? ordered(sum) : 0);
  if (lane == 0 && key < seen) best[key / 16] = largest;
}

// What a group multiplies its keys with.
struct Queries {
  uint32_t slots;        // shared address
  const float* weights;  // of the lane's heads: slot 0, heads 2 t, 2 t + 1
  const int* seen;       // entries that each query sees
  float* out;            // of the first query
  unsigned* best;
  int parts, count;      // slots of a query, of the block
  int64_t pitch, best_pitch;

  // The end of a slot; `sums` is that of the query so far.
  __device__ void finish(Sums& sums, int slot, int key) const {
    if (slot % parts + 1 < parts) return;
    const int query = slot / parts;
    store_scores(sums, out + query * pitch, best ? best + query * best_pitch : nullptr, key, seen[query]);
    sums = {};
  }
};

__device__ inline void multiply_keys_mma(const uint32_t (&a)[kSteps][4], const Queries& q, int key) {
  const int lane = threadIdx.x % kWarp, row = lane % 8;
  // Of the four 8 x 16-byte matrices of one ldmatrix, two MMA steps, this lane gives the address of one row.
  const uint32_t near = q.slots + swizzled(row, lane / 8);
  Sums sums;
#pragma unroll 1
  for (int slot = 0; slot < q.count; ++slot) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      float d[4] = {};
#pragma unroll
      for (int pair = 0; pair < kSteps / 2; ++pair) {
        const uint32_t at = slot * kSlot + pair / 2 * kHalfSlot + j * kSwizzleGroup;
        uint32_t b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"((near ^ (pair % 2 * 64)) + at));
        const auto &first = a[2 * pair], &second = a[2 * pair + 1];
        mma_bf16(d, first[0], first[1], first[2], first[3], b[0], b[1]);
        mma_bf16(d, second[0], second[1], second[2], second[3], b[2], b[3]);
      }
      sums.add(d, *reinterpret_cast<const float2*>(q.weights + slot * kHeads + 8 * j));
    }
    q.finish(sums, slot, key);
  }
}

// Begins the products of a tile with the slot at `slots`.
__device__ inline void issue_products(float (&d)[kHeads / 2],
                                      const uint32_t (&a)[kSteps][4],
                                      uint32_t slots,
                                      int slot) {
  const uint64_t operand = k_major(slots);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = slot * kSlot + step / 4 * kHalfSlot + step % 4 * 32;
    wgmma_64x64_registers(d, a[step], operand + uint64_t(at / 16), step > 0);
  }
  wgmma_commit();
}

// The lane's weights of a slot, for the only one in registers.
struct Weights {
  float2 of[kHeads / 8];
  __device__ explicit Weights(const float* weights) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) of[j] = *reinterpret_cast<const float2*>(weights + 8 * j);
  }
};

__device__ inline void multiply_keys_once(const uint32_t (&a)[kSteps][4], const Queries& q, const Weights& w, int key) {
  float d[kHeads / 2];
  issue_products(d, a, q.slots, 0);
  wgmma_wait<0>();
  keep_results(d);
  Sums sums;
#pragma unroll
  for (int j = 0; j < kHeads / 8; ++j) sums.add(d + 4 * j, w.of[j]);
  store_scores(sums, q.out, q.best, key, q.seen[0]);
}

__device__ inline void multiply_keys_wgmma(const uint32_t (&a)[kSteps][4], const Queries& q, int key) {
  Sums sums;
  auto issue = [&](float(&d)[kHeads / 2], int slot) { issue_products(d, a, q.slots, slot); };
  auto finish = [&](float(&d)[kHeads / 2], int slot) {
    keep_results(d);
    const float* weights = q.weights + slot * kHeads;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) sums.add(d + 4 * j, *reinterpret_cast<const float2*>(weights + 8 * j));
    q.finish(sums, slot, key);
  };
  float even[kHeads / 2], odd[kHeads / 2];
#pragma unroll 1
  for (int slot = 0; slot < q.count; slot += 2) {
    issue(even, slot);
    issue(odd, slot + 1);
    wgmma_wait<1>();
    finish(even, slot);
    wgmma_wait<0>();
    finish(odd, slot + 1);
  }
}

// A step's one query whose heads are one slot, by wgmma; a step; more queries.
enum class Call { one, step, chunk };

template <class Keys, bool kWgmma, Call call>
__global__ void __launch_bounds__(groups_of(call == Call::one) * kGroupThreads, 1) index_scores_kernel(const Scores p) {
  constexpr bool kOne = call == Call::one;
  constexpr int kGroups = groups_of(kOne);
  extern __shared__ unsigned char memory[];
  __shared__ int seen[kMaxQueries];
  let_next_launch_start();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  // The last queries, which see most keys, come first.
  const int block = kOne ? 0 : gridDim.x / p.splits - 1 - blockIdx.x / p.splits;
  const int split = kOne ? blockIdx.x : blockIdx.x % p.splits;
  const int first = block * p.queries, count = kOne ? 1 : min(p.queries, p.tokens - first);
  unsigned char* const slots = memory + (-__cvta_generic_to_shared(memory) & (kSwizzleGroup - 1));
  float* const weights = reinterpret_cast<float*>(slots + (kOne ? 1 : p.slots) * kSlot);

  const int in_tile = warp % 4 * 16, stride = p.splits * kGroups;
  // Whole warps walk through the tiles, as wgmma needs it; the shuffle lets the compiler know.
  const int group = __shfl_sync(kFullMask, warp / 4, 0);
  int tile = split + group * p.splits;
  if constexpr (call != Call::chunk) {
    // What a step's block needs first comes from device memory while the launch before ends.
    const int keys = min(kTile, p.entries - tile * kTile);
    if (threadIdx.x % kGroupThreads == 0 && keys >= 16) {
      fetch_to_l2(static_cast<const char*>(p.keys) + int64_t(tile) * kTile * Keys::kBytes, keys / 4 * 4 * Keys::kBytes);
    }
    if (split == 0 && threadIdx.x == 1) {
      fetch_to_l2(p.q + int64_t(first) * p.heads * kWidth, count * p.heads * kWidth * int(sizeof(bf16)));
      fetch_to_l2(p.visible + first);
    }
  }
  wait_for_launch_before();
  Keys keys;
  if (Keys::kAhead) keys.load(p.keys, tile * kTile + in_tile + g, p.entries - 1, t);  // there may be no such row to see
  int64_t sees = 0;
  if (threadIdx.x < count) sees = p.visible[first + threadIdx.x];
  stage_queries<Keys, kOne>(p, first, count, slots, weights);
  if (threadIdx.x < kMaxQueries) seen[threadIdx.x] = sees > p.least ? int(min(sees, int64_t(p.entries))) : 0;
  if constexpr (kWgmma) publish_to_wgmma();
  __syncthreads();
  int most = 0;
#pragma unroll
  for (int i = 0; i < (kOne ? 1 : kMaxQueries); ++i) most = max(most, seen[i]);

  Queries q = {uint32_t(__cvta_generic_to_shared(slots)), weights + 2 * t, seen};
  q.out = p.out + int64_t(first) * p.entries, q.pitch = p.entries;
  q.best = call != Call::chunk && p.best ? p.best + int64_t(first) * p.best_pitch : nullptr;
  q.best_pitch = p.best_pitch;
  q.parts = p.parts, q.count = p.slots;
  auto for_tiles = [&](auto&& multiply) {
    for (; tile * kTile < most; tile += stride) {
      uint32_t a[kSteps][4];
      if (!Keys::kAhead) keys.load(p.keys, tile * kTile + in_tile + g, p.entries - 1, t);
      keys.convert(a);
      if (Keys::kAhead) keys.load(p.keys, (tile + stride) * kTile + in_tile + g, p.entries - 1, t);
      multiply(a, tile * kTile + in_tile);
    }
  };
  if constexpr (kOne) {
    const Weights w(q.weights);
    for_tiles([&](const uint32_t(&a)[kSteps][4], int key) { multiply_keys_once(a, q, w, key); });
  } else if constexpr (kWgmma) {
    for_tiles([&](const uint32_t(&a)[kSteps][4], int key) { multiply_keys_wgmma(a, q, key); });
  } else {
    for_tiles([&](const uint32_t(&a)[kSteps][4], int key) { multiply_keys_mma(a, q, key); });
  }
}

template <class Keys, bool kWgmma, Call call>
cudaError_t start_form(const Scores& p, int64_t blocks, cudaStream_t stream) {
  constexpr bool kOne = call == Call::one;
  auto* kernel = index_scores_kernel<Keys, kWgmma, call>;
  const size_t most = shared_bytes(kOne ? 1 : max_slots(kWgmma)), shared = shared_bytes(p.slots);
  static const cudaError_t ready =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most));
  if (ready != cudaSuccess) return ready;
  const Grid grid = {
      .blocks = blocks, .threads = groups_of(kOne) * kGroupThreads, .shared = shared, .overlap = true};
  return launch(kernel, grid, stream, p);
}

template <class Keys, bool kWgmma>
cudaError_t start(Scores p, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  constexpr int kSlots = max_slots(kWgmma);
  p.queries = kSlots / p.parts < p.tokens ? kSlots / p.parts : p.tokens;
  p.slots = p.queries * p.parts;
  const bool one = kWgmma && Keys::kAhead && p.slots == 1;
  p.slots += p.slots > 1 || (kWgmma && !one) ? p.slots % 2 : 0;
  const int64_t blocks = ceil_div(p.tokens, p.queries), tiles = ceil_div(p.entries, kTile);
  // One block a multiprocessor for a step, but for as many as the choice that follows takes, whose blocks then start
  // early; several, so that they end at about the same time, for many queries.
  const int64_t free = processors > 2 * p.tokens ? processors - p.tokens : processors;
  const int64_t wanted = p.tokens > kStep ? ceil_div(4 * processors, blocks) : free < blocks ? 1 : free / blocks;
  p.splits = int(wanted < tiles ? wanted : tiles);
  if constexpr (kWgmma && Keys::kAhead) {
    if (one) return start_form<Keys, true, Call::one>(p, blocks * p.splits, stream);
  }
  if (p.tokens <= kStep) return start_form<Keys, kWgmma, Call::step>(p, blocks * p.splits, stream);
  return start_form<Keys, kWgmma, Call::chunk>(p, blocks * p.splits, stream);
}

}  // namespace

cudaError_t index_scores(In q, In keys, const float* weights, const int64_t* visible, float* out, Maybe<int32_t> best,
                         int64_t tokens, int64_t heads, int64_t entries, int64_t least, bool portable,
                         cudaStream_t stream) {
  if (q.type != Type::bf16 || heads < 1 || heads > kMaxHeads || entries < 1) return cudaErrorInvalidValue;
  if ((uintptr_t(q.data) | uintptr_t(keys.data)) % 16) return cudaErrorMisalignedAddress;
  Scores p = {static_cast<const bf16*>(q.data), keys.data, weights, visible, out,
              reinterpret_cast<unsigned*>(best.data)};
  p.best_pitch = int(4 * ceil_div(entries, 64));
  p.tokens = int(tokens), p.heads = int(heads), p.entries = int(entries);
  p.least = int(least < entries ? least : entries);
  p.parts = int(ceil_div(heads, kHeads));
  if (!portable && !kHasWgmma) return cudaErrorNotSupported;
  auto start_keys = [&](auto format) {
    using Keys = decltype(format);
    if constexpr (kHasWgmma) {
      if (!portable) return start<Keys, true>(p, stream);
    }
    return start<Keys, false>(p, stream);
  };
  if (keys.type == Type::u8) return start_keys(Records());
  if (keys.type == Type::bf16) return start_keys(PlainKeys());
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
