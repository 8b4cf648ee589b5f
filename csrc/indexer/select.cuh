// The k best of a row of scores, by digits: what both kernels of select_topk share.
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
#pragma once

#include "common/barrier.cuh"
#include "common/cluster.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/order.cuh"
#include "common/overlap.cuh"

namespace dsv4 {

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
__device__ inline void share_counts(Shared<kBlocks>& shared, int digit, int rank, bool divided) {
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
__device__ inline void find_bin(const unsigned (&counts)[kBlocks][kBins], int blocks, unsigned needed, Found& found) {
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
__device__ inline Tally tally_before(Shared<kBlocks>& shared, const Tally& mine, int rank, bool divided) {
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
__device__ inline void clear(Shared<kBlocks>& shared) {
  for (int i = threadIdx.x; i < kBins * kWarp / 4; i += kThreads) reinterpret_cast<uint4*>(shared.bins)[i] = {};
}

// Chooses among the `seen` entries of a row, more than are wanted, by this block or by all of a cluster. The histogram
// is cleared.
template <int kBlocks>
__device__ inline void choose_by_digits(const Select& p,
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

// One block a row, no cluster, for up to kStep rows (select_step.cu).
bool fits_step(const Select& p, int64_t tokens);
cudaError_t start_select_step(const Select& p, int64_t tokens, cudaStream_t stream);

}  // namespace dsv4
