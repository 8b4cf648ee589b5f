// select_topk: ops/indexer/reference.py, the k best visible scores of a row: exact, ties by lowest index, no sort.
//
// Scores become integers of the same order (common/order.cuh), of which the k-th largest is found 8 bits at a time: a
// histogram of the next digit of all entries that have the digits found so far, then the bin in which the k-th lies.
// The search ends early when all entries of that bin are taken, as a rule after three digits. Then each warp counts its
// entries above the bound and at it, sums over the warps before it tell where its choice begins, and in a last pass it
// stores indices in ascending order; at the bound the first ones are taken, as many as are missing.
//
// A histogram has a column for every lane, so that the atomic additions of a warp never meet, whatever the scores:
// most share their first digit. A warp's entries are consecutive, and so are those of the warps of a block and of the
// blocks of a cluster. Each pass reads the scores again, which after the first pass lie in L1: no row is too long.
//
// One block takes a row. In a step a row of more than 8,192 visible entries is divided among a cluster of 8: each block
// sends its 256 counts to all eight, counted by barriers, and all eight find the same bin. Counts are integers: nothing
// depends on the order in which they are added, and the choice is the same however a row is divided.
// Of a row that sees no more than k entries no score is read.
//
// A step goes another way where rows have up to 8,192 entries, or up to 262,144 of which index_scores left the best of
// every 16: one block a row, no cluster. As many groups of 16 as are wanted hold at least as many scores no worse than
// the worst of these groups' bests: what lies below is out of the question. So the block reads 16,384 numbers, not
// 262,144, then the groups that may hold a winner, for 512 winners about 600, and chooses among their 9,600 entries, of
// which 550 are above the bound. A row of up to 8,192 visible entries is read whole. What is read stays in shared
// memory. Digits have 11 bits of the distance from the largest key, and the first begins where the distances do: two
// passes, as a rule. Where more groups may hold a winner than there is room for (many equal scores), one block goes the
// first way.
//
// Launches overlap (common/overlap.cuh): histograms are cleared while the scores are still computed, and a step's block
// runs through its passes once with zeros, which brings their code to the multiprocessor.
// Bytes: a row's visible scores once from L2; of a step's long row 64 KB of bests and 40 KB of scores. Expected of a
// step alone: 4,096 entries 4 us, 32,768 entries 5 us, 262,144 entries 6 us, a launch's 1.2 us among them; 8,192 rows
// of 15,400 entries 0.6 ms.
// sass select_topk_kernel: LDG.E.128, ATOMS
// sass select_step_kernel: LDGSTS, ATOMS
#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/order.cuh"
#include "common/overlap.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kDigit = 8, kBins = 1 << kDigit, kDigits = 32 / kDigit;
constexpr int kCluster = 8;        // blocks that divide a row
constexpr int kAlone = 8192;       // entries of a row that is not divided
constexpr int kStep = 8;           // tokens up to which rows are divided
constexpr int kTogether = 4;       // entries of a lane, of one load
constexpr int kStride = kWarp * kTogether;
constexpr int kInFlight = 4;       // loads of a lane
constexpr int kLanesPerBin = kThreads / kBins, kPerLane = kWarp / kLanesPerBin;  // where a histogram is summed
constexpr int64_t kMaxEntries = 1 << 30;

static_assert(kCluster == 8 && kLanesPerBin == 2, "eight lanes that hold four bins send them to eight blocks");

struct Select {
  const float* scores;     // [T, C]
  const uint4* best;       // [T, ceil(C / 64)] x 4: the largest key of every 16 entries, or null
  const int64_t* visible;  // [T]
  int32_t* out;            // [T, width]
  int64_t entries;
  int top_k, width;
};

// Where the k-th largest lies: the digit, how many entries of its bin are taken, how many there are.
struct Found {
  unsigned bin, needed, count;
};

template <int kBlocks>
struct alignas(16) Shared {
  unsigned bins[kBins][kWarp];           // of this block, a column for every lane
  unsigned counts[2][kBlocks][kBins];    // of each block, of this digit and the one before
  uint4 totals[kBlocks];                 // of each block: entries above the bound, at the bound
  uint64_t arrived[kDigits + 1];         // barriers of the digits' counts and of the totals
  unsigned above[kWarps], equal[kWarps];
  Found found;
};

// A warp's entries: those at first .. end - 1 from `base` on, which is a multiple of 16 bytes and `skew` entries before
// the row.
struct Piece {
  const float* base;
  int skew, first, end;

  // use(place, keys) of four consecutive entries a lane; whole warps together. Keys of what is not an entry are 0, less
  // than any score's, and may be counted: there are enough scores for the bound to lie above.
  template <class Use>
  __device__ void for_keys(Use&& use) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int at = first; at < end; at += kInFlight * kStride) {
      float4 values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int place = at + i * kStride + kTogether * lane;
        values[i] = {};
        if (is_whole(place)) values[i] = *reinterpret_cast<const float4*>(base + place);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int place = at + i * kStride + kTogether * lane;
        uint4 keys = {};
        if (is_whole(place)) {
          const float4& v = values[i];
          keys = {key_of(v.x), key_of(v.y), key_of(v.z), key_of(v.w)};
        } else if (place < end) {  // the row's first or last entries
          keys = {key_at(place), key_at(place + 1), key_at(place + 2), key_at(place + 3)};
        }
        use(place, keys);
      }
    }
  }

 private:
  __device__ bool is_whole(int place) const { return place >= skew && place + kTogether <= end; }
  // -0 equals 0, and any NaN is the largest: the addition in ordered() leaves one NaN of all, 0x7fffffff.
  static __device__ unsigned key_of(float score) { return ordered(score); }
  __device__ unsigned key_at(int place) const {
    return place >= skew && place < end ? key_of(base[place]) : 0;
  }
};

// The block's count of each bin, which is cleared, to all blocks that divide the row, or to this one alone.
template <int kBlocks>
__device__ void share_counts(Shared<kBlocks>& shared, int digit, int rank, bool divided) {
  const int lane = threadIdx.x % kWarp, bin = threadIdx.x / kLanesPerBin;
  uint4* const half = reinterpret_cast<uint4*>(&shared.bins[bin][threadIdx.x % kLanesPerBin * kPerLane]);
  unsigned count = 0;
#pragma unroll
  for (int i = 0; i < kPerLane / 4; ++i) {
    uint4& four = half[(i + bin) % (kPerLane / 4)];  // begun at another place by each bin: they share their banks
    count += (four.x + four.y) + (four.z + four.w);
    four = {};
  }
  count += __shfl_xor_sync(kFullMask, count, 1);
  const int first = lane & ~7;  // of eight lanes, which hold four bins
  const uint4 four = {__shfl_sync(kFullMask, count, first), __shfl_sync(kFullMask, count, first + 2),
                      __shfl_sync(kFullMask, count, first + 4), __shfl_sync(kFullMask, count, first + 6)};
  unsigned* const to = &shared.counts[digit % 2][rank][(threadIdx.x - lane + first) / kLanesPerBin];
  if constexpr (kBlocks > 1) {
    if (divided) {
      const float4 bits = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                           __uint_as_float(four.w)};
      const uint32_t barrier = uint32_t(__cvta_generic_to_shared(&shared.arrived[digit]));
      store_remote_counted(uint32_t(__cvta_generic_to_shared(to)), barrier, lane % kBlocks, bits);
      return;
    }
  }
  if (lane == first) *reinterpret_cast<uint4*>(to) = four;
}

// One warp: the bin of the `needed`-th largest, of the counts of all blocks. A lane has eight bins.
template <int kBlocks>
__device__ void find_bin(const unsigned (&counts)[kBlocks][kBins], int blocks, unsigned needed, Found& found) {
  constexpr int kOwn = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  unsigned own[kOwn] = {}, sum = 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (block < blocks) {
      const auto* from = reinterpret_cast<const uint4*>(&counts[block][kOwn * lane]);
#pragma unroll
      for (int i = 0; i < kOwn / 4; ++i) {
        const uint4 four = from[i];
        own[4 * i] += four.x, own[4 * i + 1] += four.y, own[4 * i + 2] += four.z, own[4 * i + 3] += four.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  unsigned from_here = sum;  // of this lane and those of larger digits
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned further = __shfl_down_sync(kFullMask, from_here, step);
    if (lane + step < kWarp) from_here += further;
  }
  unsigned above = from_here - sum;
  if (above >= needed || from_here < needed) return;
  Found mine = {};
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (above < needed && needed <= above + own[i]) mine = {unsigned(kOwn * lane + i), needed - above, own[i]};
    above += own[i];
  }
  found = mine;
}

// Counts of entries above and at the bound.
struct Tally {
  unsigned above, equal;
};

// Of the warps before this one in the row.
template <int kBlocks>
__device__ Tally tally_before(Shared<kBlocks>& shared, const Tally& mine, int rank, bool divided) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) shared.above[warp] = mine.above, shared.equal[warp] = mine.equal;
  __syncthreads();
  const Tally of_warp = {lane < kWarps ? shared.above[lane] : 0, lane < kWarps ? shared.equal[lane] : 0};
  Tally before = {__reduce_add_sync(kFullMask, lane < warp ? of_warp.above : 0),
                  __reduce_add_sync(kFullMask, lane < warp ? of_warp.equal : 0)};
  if constexpr (kBlocks > 1) {
    if (!divided) return before;
    const uint32_t barrier = uint32_t(__cvta_generic_to_shared(&shared.arrived[kDigits]));
    if (warp == 0) {
      const Tally total = {__reduce_add_sync(kFullMask, of_warp.above), __reduce_add_sync(kFullMask, of_warp.equal)};
      const float4 bits = {__uint_as_float(total.above), __uint_as_float(total.equal), 0.0f, 0.0f};
      const uint32_t to = uint32_t(__cvta_generic_to_shared(&shared.totals[rank]));
      if (lane < kBlocks) store_remote_counted(to, barrier, lane, bits);
    }
    wait_barrier(barrier, 0);
    const uint4 of_block = lane < rank ? shared.totals[lane] : uint4();
    before.above += __reduce_add_sync(kFullMask, of_block.x);
    before.equal += __reduce_add_sync(kFullMask, of_block.y);
  }
  return before;
}

template <int kBlocks>
__device__ void clear(Shared<kBlocks>& shared) {
  for (int i = threadIdx.x; i < kBins * kWarp / 4; i += kThreads) reinterpret_cast<uint4*>(shared.bins)[i] = {};
}

// Chooses among the `seen` entries of a row, more than are wanted, by this block or by all of a cluster. The histogram
// is cleared.
template <int kBlocks>
__device__ void choose_by_digits(const Select& p,
                                 Shared<kBlocks>& shared,
                                 int64_t token,
                                 int seen,
                                 int rank,
                                 bool divided) {
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
  int32_t* const out = p.out + token * p.width;
  const int64_t start = token * p.entries;
  Piece piece = {.skew = int(start % kTogether)};
  piece.base = p.scores + start - piece.skew;
  const int end = piece.skew + seen, pieces = divided ? kBlocks * kWarps : kWarps;
  const int length = int(ceil_div(end, pieces * kStride)) * kStride;
  piece.first = min((rank * kWarps + warp) * length, end);
  piece.end = min(piece.first + length, end);

  unsigned bound = 0, needed = p.top_k;  // the digits found so far; entries of theirs that are taken
  int shift = 32;
#pragma unroll 1
  for (int digit = 0; digit < kDigits; ++digit) {
    shift -= kDigit;
    bound <<= kDigit;
    unsigned* const column = &shared.bins[0][threadIdx.x % kWarp];
    auto bin_of = [&](unsigned key) { return (key >> shift) - bound; };  // kBins or more: other digits before
    auto count = [&](unsigned bin) {
      if (bin < kBins) atomicAdd(column + bin * kWarp, 1u);
    };
    piece.for_keys([&](int, const uint4& keys) {
      const uint4 bins = {bin_of(keys.x), bin_of(keys.y), bin_of(keys.z), bin_of(keys.w)};
      // After the first digits, of most lanes none counts.
      if (min(min(bins.x, bins.y), min(bins.z, bins.w)) >= kBins) return;
      count(bins.x), count(bins.y), count(bins.z), count(bins.w);
    });
    __syncthreads();
    share_counts(shared, digit, rank, divided);
    if (!divided) __syncthreads();
    if (warp == 0) {
      if (divided) wait_barrier(uint32_t(__cvta_generic_to_shared(&shared.arrived[digit])), 0);
      find_bin(shared.counts[digit % 2], divided ? kBlocks : 1, needed, shared.found);
    }
    __syncthreads();
    bound += shared.found.bin;
    needed = shared.found.needed;
    if (needed == shared.found.count) break;
  }

  Tally mine = {};
  auto tally = [&](unsigned key) { mine.above += key >> shift > bound, mine.equal += key >> shift == bound; };
  piece.for_keys([&](int, const uint4& keys) { tally(keys.x), tally(keys.y), tally(keys.z), tally(keys.w); });
  mine = {__reduce_add_sync(kFullMask, mine.above), __reduce_add_sync(kFullMask, mine.equal)};
  Tally before = tally_before(shared, mine, rank, divided);
  if (mine.above == 0 && (mine.equal == 0 || before.equal >= needed)) return;

  piece.for_keys([&](int place, const uint4& keys) {
    const unsigned high[] = {keys.x >> shift, keys.y >> shift, keys.z >> shift, keys.w >> shift};
    unsigned own = 0;  // entries above the bound in the low half, at it in the high half
#pragma unroll
    for (int i = 0; i < kTogether; ++i) own += high[i] > bound ? 1 : high[i] == bound ? 0x10000 : 0;
    if (!__any_sync(kFullMask, before.equal < needed ? own : own & 0xffff)) return;
    unsigned through = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned earlier = __shfl_up_sync(kFullMask, through, step);
      if (int(threadIdx.x % kWarp) >= step) through += earlier;
    }
    Tally here = {before.above + ((through - own) & 0xffff), before.equal + ((through - own) >> 16)};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool above = high[i] > bound, equal = high[i] == bound;
      if (above || (equal && here.equal < needed)) out[here.above + min(here.equal, needed)] = place + i - piece.skew;
      here.above += above, here.equal += equal;
    }
    const unsigned all = __shfl_sync(kFullMask, through, kWarp - 1);
    before.above += all & 0xffff, before.equal += all >> 16;
  });
}

// kBlocks: of a cluster, whose first block alone takes a row that is not divided.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks > 1 ? 1 : 2) select_topk_kernel(const Select p) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kBlocks>*>(memory);
  let_next_launch_start();
  const int rank = blockIdx.x % kBlocks;
  const int64_t token = blockIdx.x / kBlocks;
  clear(shared);
  if constexpr (kBlocks > 1) {
    if (threadIdx.x == 0) {
      const uint32_t barrier = uint32_t(__cvta_generic_to_shared(shared.arrived));
      for (int i = 0; i <= kDigits; ++i) make_barrier(barrier + 8 * i, 1);
      publish_barriers();
      for (int i = 0; i < kDigits; ++i) expect_bytes(barrier + 8 * i, sizeof(shared.counts[0]));
      expect_bytes(barrier + 8 * kDigits, sizeof(shared.totals));
    }
    cluster_arrive();
    wait_for_launch_before();
    cluster_wait();
  } else {
    wait_for_launch_before();
    __syncthreads();
  }

  const int64_t sees = p.visible[token];
  const int seen = int(sees < 0 ? 0 : sees < p.entries ? sees : p.entries);
  int32_t* const out = p.out + token * p.width;
  if (seen <= p.top_k) {
    if (rank > 0) return;
    for (int i = threadIdx.x; i < p.width; i += kThreads) out[i] = i < seen ? i : -1;
    return;
  }
  const bool divided = kBlocks > 1 && seen > kAlone;
  if (!divided && rank > 0) return;
  choose_by_digits(p, shared, token, seen, rank, divided);
}

// A row of a step. Keys lie in pieces of four: the best of four groups, or four entries.
constexpr int kGroup = 16;           // entries whose best index_scores leaves
constexpr int kPieces = 8192;        // that there is room for: 32,768 entries
constexpr int kStepBits = 11, kStepBins = 1 << kStepBits;
constexpr int kLongest = 1 << 18;    // entries
constexpr int kSingle = 2048;        // pieces of groups above which four groups count as one

static_assert(kStepBins == 4 * kThreads && kLongest / kGroup / 4 <= kPieces && kLongest / kGroup <= 1 << 16);

struct alignas(16) Step {
  uint4 pieces[kPieces];
  unsigned bins[kStepBins];  // the first is that of the largest keys
  uint16_t groups[kPieces / 4];
  unsigned low[kWarps], high[kWarps], sums[kWarps];
  Found found;
};
static_assert(sizeof(Shared<1>) <= sizeof(Step));

__device__ inline unsigned sum_through(unsigned x) {  // of this lane and those before
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned earlier = __shfl_up_sync(kFullMask, x, step);
    if (int(threadIdx.x % kWarp) >= step) x += earlier;
  }
  return x;
}

// The sum over all threads before this one, with a barrier; `total` is that over all.
__device__ inline unsigned sum_before(Step& shared, unsigned x, unsigned& total) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned through = sum_through(x);
  if (lane == kWarp - 1) shared.sums[warp] = through;
  __syncthreads();
  const unsigned of_warp = lane < kWarps ? shared.sums[lane] : 0;
  total = __reduce_add_sync(kFullMask, of_warp);
  return __reduce_add_sync(kFullMask, lane < warp ? of_warp : 0) + through - x;
}

// The bin of the `needed`-th largest; all bins are cleared. Begins and ends with a barrier.
__device__ inline Found find_step_bin(Step& shared, unsigned needed) {
  __syncthreads();
  uint4& own = reinterpret_cast<uint4*>(shared.bins)[threadIdx.x];
  const uint4 four = own;
  own = {};
  const unsigned counts[] = {four.x, four.y, four.z, four.w}, sum = (four.x + four.y) + (four.z + four.w);
  unsigned total, above = sum_before(shared, sum, total);
  if (above < needed && needed <= above + sum) {
    Found mine = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above < needed && needed <= above + counts[i]) mine = {4 * threadIdx.x + i, needed - above, counts[i]};
      above += counts[i];
    }
    shared.found = mine;
  }
  __syncthreads();
  return shared.found;
}

// The least and the largest key above 0 of the block, with a barrier. `less` is one less than a thread's least.
__device__ inline void find_range(Step& shared, unsigned less, unsigned high, unsigned& top, unsigned& span) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  less = __reduce_min_sync(kFullMask, less), high = __reduce_max_sync(kFullMask, high);
  if (lane == 0) shared.low[warp] = less, shared.high[warp] = high;
  __syncthreads();
  top = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
  span = top - (__reduce_min_sync(kFullMask, shared.low[lane % kWarps]) + 1);
}

template <class Use>
__device__ inline void for_items(const uint4& keys, bool as_one, Use&& use) {
  if (as_one) return use(max(max(keys.x, keys.y), max(keys.z, keys.w)));
  use(keys.x), use(keys.y), use(keys.z), use(keys.w);
}

__global__ void __launch_bounds__(kThreads, 1) select_step_kernel(const Select p) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Step*>(memory);
  let_next_launch_start();
  const int64_t token = blockIdx.x, pieces_of_best = ceil_div(p.entries, 4 * kGroup);
  const auto* scores = reinterpret_cast<const uint4*>(p.scores + token * p.entries);
  int32_t* const out = p.out + token * p.width;
  fetch_to_l2(p.visible + token);
  reinterpret_cast<uint4*>(shared.bins)[threadIdx.x] = {};
  shared.pieces[threadIdx.x] = {};

  enum { kZeros, kBest, kEntries } stage = kZeros;
  int seen = 0, pieces = kThreads, limit = 4 * kThreads;  // limit: places of keys that exist
  unsigned least = 1;   // keys below it are out of the question and become 0
  bool listed = false;  // entries are those of shared.groups, not the row's first
#pragma unroll 1
  while (true) {
    wait_async_copies();
    __syncthreads();
    // An odd number of neighbouring pieces a thread: lanes that read them meet no bank twice.
    const int own = int(ceil_div(pieces, kThreads)) | 1;
    const int first = min(int(threadIdx.x) * own, pieces), end = min(first + own, pieces);
    const bool as_one = stage == kBest && pieces > kSingle && pieces >= p.top_k;
    auto place_of = [&](int i) { return listed ? shared.groups[i / 4] * kGroup + i % 4 * 4 : 4 * i; };
    unsigned less = ~0u, high = 0;
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      const int place = place_of(i);
      auto key_of = [&](unsigned bits, int at) {
        const unsigned key = stage == kEntries ? ordered(__uint_as_float(bits)) : bits;
        return at < limit && key >= least ? key : 0;
      };
      uint4 v = shared.pieces[i];
      v = {key_of(v.x, place), key_of(v.y, place + 1), key_of(v.z, place + 2), key_of(v.w, place + 3)};
      shared.pieces[i] = v;
      for_items(v, as_one, [&](unsigned key) { less = min(less, key - 1), high = max(high, key); });
    }

    // The needed-th largest key lies in [top - span, top]; bins divide that. Of groups, a few more than are wanted do.
    unsigned top, span, needed = stage == kZeros ? 1 : p.top_k;
    find_range(shared, less, high, top, span);
    Found found;
    const unsigned slack = stage == kEntries ? 0 : p.top_k / 4;
    int shift;
#pragma unroll 1
    do {
      shift = max(32 - kStepBits - __clz(span), 0);
#pragma unroll 1
      for (int i = first; i < end; ++i) {
        for_items(shared.pieces[i], as_one, [&](unsigned key) {
          if (top - key <= span) atomicAdd(&shared.bins[(top - key) >> shift], 1u);
        });
      }
      found = find_step_bin(shared, needed);
      needed = found.needed;
      top -= found.bin << shift;
      span = min(span - (found.bin << shift), (1u << shift) - 1);
    } while (found.count - needed > slack && shift > 0);

    // Keys above `bound` are taken, and of those from `least` on the first `needed`: only equal ones are left out.
    least = top - span;
    const bool ties = stage == kEntries && found.count > needed;
    const unsigned bound = ties ? top : least - 1;
    if (!ties) needed = 0;
    unsigned mine = 0, total;  // above the bound in the low half, at it in the high half
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      for_items(shared.pieces[i], false, [&](unsigned key) { mine += key > bound ? 1 : key >= least ? 0x10000 : 0; });
    }
    const unsigned before = sum_before(shared, mine, total);
    unsigned above = before & 0xffff, equal = before >> 16;
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      int place = place_of(i);
      for_items(shared.pieces[i], false, [&](unsigned key) {
        if (key > bound || (key >= least && equal < needed)) {
          const unsigned to = above + min(equal, needed);
          if (stage == kEntries) out[to] = place;
          else if (to < kPieces / 4) shared.groups[to] = uint16_t(place);
        }
        above += key > bound, equal += key <= bound && key >= least;
        ++place;
      });
    }
    if (stage == kEntries) return;
    __syncthreads();

    auto copy = [&](const uint4* from, int count) {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += kThreads) copy_async_16(&shared.pieces[i], from + i, true);
    };
    if (stage == kBest) {
      if (total > kPieces / 4) break;
      stage = kEntries, pieces = 4 * int(total), limit = seen, listed = true;
#pragma unroll 1
      for (int i = threadIdx.x; i < pieces; i += kThreads) {
        const int from = place_of(i);
        copy_async_16(&shared.pieces[i], scores + from / 4, from < p.entries);
      }
      continue;
    }
    // What is needed in most cases is under way before it is known how much the row sees.
    wait_for_launch_before();
    const bool few = p.entries <= kAlone;
    copy(few ? scores : p.best + token * pieces_of_best, int(few ? p.entries / 4 : pieces_of_best));
    const int64_t sees = p.visible[token];
    seen = int(sees < 0 ? 0 : sees < p.entries ? sees : p.entries);
    const int groups = int(ceil_div(seen, kGroup));
    if (seen <= p.top_k) {
      wait_async_copies();
      for (int i = threadIdx.x; i < p.width; i += kThreads) out[i] = i < seen ? i : -1;
      return;
    }
    stage = few || seen <= kAlone || groups <= p.top_k ? kEntries : kBest;
    limit = stage == kEntries ? seen : groups;
    pieces = int(ceil_div(limit, 4));
    least = 1;
    if (few || stage == kBest) continue;
    if (pieces > kPieces) break;
    wait_async_copies();
    __syncthreads();
    copy(scores, pieces);
  }

  // All of the row's entries, by digits: the room is that of the pieces.
  wait_async_copies();
  __syncthreads();
  auto& digits = *reinterpret_cast<Shared<1>*>(memory);
  clear(digits);
  __syncthreads();
  choose_by_digits(p, digits, token, seen, 0, false);
}

template <int kBlocks>
cudaError_t start(const Select& p, int64_t tokens, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(Shared<kBlocks>);
  auto* kernel = select_topk_kernel<kBlocks>;
  static const cudaError_t ready =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
  if (ready != cudaSuccess) return ready;
  const Grid grid = {
      .blocks = tokens * kBlocks, .threads = kThreads, .shared = kBytes, .cluster = kBlocks, .overlap = true};
  return launch(kernel, grid, stream, p);
}

cudaError_t start_step(const Select& p, int64_t tokens, cudaStream_t stream) {
  static const cudaError_t ready =
      cudaFuncSetAttribute(select_step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Step)));
  if (ready != cudaSuccess) return ready;
  const Grid grid = {.blocks = tokens, .threads = kThreads, .shared = sizeof(Step), .overlap = true};
  return launch(select_step_kernel, grid, stream, p);
}

}  // namespace

cudaError_t select_topk(const float* scores, Maybe<const int32_t> best, const int64_t* visible, int32_t* out,
                        int64_t tokens, int64_t entries, int64_t top_k, cudaStream_t stream) {
  if (tokens < 1 || entries < 1 || entries > kMaxEntries || top_k < 1) return cudaErrorInvalidValue;
  if ((uintptr_t(scores) | uintptr_t(best.data)) % 16) return cudaErrorMisalignedAddress;
  Select p = {scores, reinterpret_cast<const uint4*>(best.data), visible, out, entries};
  p.width = p.top_k = int(top_k < entries ? top_k : entries);
  if (tokens <= kStep && entries % 4 == 0 && (entries <= kAlone || (p.best && entries <= kLongest))) {
    return start_step(p, tokens, stream);
  }
  return tokens <= kStep && entries > kAlone ? start<kCluster>(p, tokens, stream) : start<1>(p, tokens, stream);
}

}  // namespace dsv4
