// select_topk of up to eight rows that have up to 8,192 entries, or up to 262,144 of which index_scores left the best
// of every 16: one block a row, no cluster.
//
// As many groups of 16 as are wanted hold at least as many scores no worse than the worst of these groups' bests: what
// lies below is out of the question. So the block reads 16,384 numbers, not 262,144, then the groups that may hold a
// winner, for 512 winners about 600, and lists those of their 9,600 entries that may win, with their keys. A row of up
// to 8,192 visible entries is read whole. Digits have 11 bits of the distance from the largest key, and the first
// begins where the distances do: one pass finds a bound that few more than the winners reach; they are listed, and what
// follows is about them alone. Where more are left than there is room for (many equal scores), the search of select.cuh
// is next.
//
// Bytes: of a long row 64 KB of bests and 40 KB of scores, from L2.
// sass select_step_kernel: LDGSTS, ATOMS
#include "indexer/select.cuh"

namespace dsv4 {
namespace {

// A row of a step: numbers lie in pieces of four, the largest keys of four groups of entries or four scores.
constexpr int kGroup = 16;           // entries whose best index_scores leaves
constexpr int kPieces = 8192;        // that there is room for: 32,768 scores
constexpr int kCandidates = 1920;    // entries, or groups before, that may be chosen
constexpr int kStepBits = 11, kStepBins = 1 << kStepBits;
constexpr int kLongest = 1 << 18;    // entries
constexpr int kSingle = 2048;        // pieces of groups above which four groups count as one
constexpr int kMostOwn = 16;         // pieces of a thread, whose items a mask of 64 bits tells apart

__host__ __device__ constexpr int own_pieces(int pieces) { return (pieces + kThreads - 1) / kThreads | 1; }
static_assert(own_pieces(kLongest / kGroup / 4) <= kMostOwn && own_pieces(kCandidates * kGroup / 4) <= kMostOwn);
static_assert(kStepBins == 4 * kThreads && kAlone / 4 <= kPieces && kLongest / kGroup <= 1 << 16);

struct alignas(16) Step {
  uint4 pieces[kPieces];
  unsigned bins[kStepBins];      // the first is that of the largest keys
  unsigned keys[kCandidates];    // of candidates, in ascending order of their entries
  int places[kCandidates];
  uint16_t groups[kCandidates];  // ascending
  unsigned low[kWarps], high[kWarps], sums[kWarps];
  Found found;
};
static_assert(sizeof(Shared<1>) <= sizeof(Step));

// The sum over all threads before this one, with a barrier; `total` is that over all.
__device__ inline unsigned sum_before(Step& shared, unsigned x, unsigned& total) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned through = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned earlier = __shfl_up_sync(kFullMask, through, step);
    if (lane >= step) through += earlier;
  }
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

// Keys from `top` - `span` to `top`, in which the `needed`-th largest lies, of `count` that lie in it.
struct Range {
  unsigned top, span, needed, count;

  __device__ unsigned least() const { return top - span; }
  // Divides it into bins and goes on with that of the needed-th largest; add(use) hands this thread's keys to `use`.
  // False where a bin is a key.
  template <class Add>
  __device__ bool narrow(Step& shared, Add&& add) {
    const int shift = max(32 - kStepBits - __clz(span), 0);
    add([&](unsigned key) {
      if (top - key <= span) atomicAdd(&shared.bins[(top - key) >> shift], 1u);
    });
    const Found found = find_step_bin(shared, needed);
    needed = found.needed, count = found.count;
    top -= found.bin << shift;
    span = min(span - (found.bin << shift), (1u << shift) - 1);
    return shift > 0;
  }
};

// The pieces as keys; 0, less than any key, is what does not exist or is out of the question.
struct View {
  const Step& shared;
  bool scores, listed;  // scores of entries, of those in listed groups; otherwise keys of groups
  int pieces, limit;    // groups or entries that exist
  unsigned least;       // of those in question
  int first, end;       // this thread's, neighbours and an odd number: lanes that read them meet no bank twice

  __device__ View(const Step& shared, bool scores, bool listed, int pieces, int limit, unsigned least)
      : shared(shared), scores(scores), listed(listed), pieces(pieces), limit(limit), least(least) {
    const int own = own_pieces(pieces);
    first = min(int(threadIdx.x) * own, pieces), end = min(first + own, pieces);
  }
  __device__ int place(int i) const { return listed ? shared.groups[i / 4] * kGroup + i % 4 * 4 : 4 * i; }
  __device__ unsigned key_of(unsigned bits) const { return scores ? ordered(__uint_as_float(bits)) : bits; }
  __device__ uint4 keys(int i) const {
    const int at = place(i);
    auto in_question = [&](unsigned bits, int at) {
      const unsigned key = key_of(bits);
      return at < limit && key >= least ? key : 0;
    };
    const uint4 v = shared.pieces[i];
    return {in_question(v.x, at), in_question(v.y, at + 1), in_question(v.z, at + 2), in_question(v.w, at + 3)};
  }
  template <class Use>
  __device__ void for_keys(bool as_one, Use&& use) const {
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      const uint4 k = keys(i);
      if (as_one) {
        use(max(max(k.x, k.y), max(k.z, k.w)));
      } else {
        use(k.x), use(k.y), use(k.z), use(k.w);
      }
    }
  }
};

// From the least to the largest key, with a barrier.
__device__ inline Range find_range(Step& shared, const View& view, bool as_one, unsigned needed) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned less = ~0u, high = 0;  // one less than the least: 0 does not count
  view.for_keys(as_one, [&](unsigned key) { less = min(less, key - 1), high = max(high, key); });
  less = __reduce_min_sync(kFullMask, less), high = __reduce_max_sync(kFullMask, high);
  if (lane == 0) shared.low[warp] = less, shared.high[warp] = high;
  __syncthreads();
  const unsigned top = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
  return {top, top - (__reduce_min_sync(kFullMask, shared.low[lane % kWarps]) + 1), needed, 0};
}

// Lists what is in question, groups or entries with their keys, and returns how many there are; if that is more than
// there is room for, nothing is listed. Ends with a barrier.
__device__ inline int list_candidates(Step& shared, const View& view) {
  uint64_t mask = 0;
#pragma unroll 1
  for (int i = view.end - 1; i >= view.first; --i) {
    const uint4 k = view.keys(i);
    mask = mask << 4 | unsigned((k.x != 0) | (k.y != 0) << 1 | (k.z != 0) << 2 | (k.w != 0) << 3);
  }
  unsigned total, to = sum_before(shared, __popcll(mask), total);
  if (total > kCandidates) mask = 0;
#pragma unroll 1
  for (; mask != 0; mask &= mask - 1, ++to) {
    const int item = 4 * view.first + __ffsll(mask) - 1;
    if (!view.scores) {
      shared.groups[to] = uint16_t(item);
    } else {
      shared.keys[to] = view.key_of(reinterpret_cast<const unsigned*>(shared.pieces)[item]);
      shared.places[to] = view.place(item / 4) + item % 4;
    }
  }
  __syncthreads();
  return int(total);
}

// The best among `count` candidates, which lie in `range`.
__device__ inline void choose_candidates(Step& shared, Range range, int count, int32_t* out) {
  const int own = int(ceil_div(count, kThreads));
  const int first = min(int(threadIdx.x) * own, count), end = min(first + own, count);
  auto add = [&](auto&& use) {
    for (int i = first; i < end; ++i) use(shared.keys[i]);
  };
#pragma unroll 1
  while (range.narrow(shared, add) && range.count > range.needed) {
  }
  // Keys above `bound` are taken, and of those at it, if not all, the first `needed`.
  const unsigned bound = range.count > range.needed ? range.top : range.least() - 1;
  unsigned mine = 0, total;  // above the bound in the low half, at it in the high half
  add([&](unsigned key) { mine += key > bound ? 1 : key == bound ? 0x10000 : 0; });
  const unsigned before = sum_before(shared, mine, total);
  unsigned above = before & 0xffff, equal = before >> 16;
  const unsigned needed = range.count > range.needed ? range.needed : 0;
  for (int i = first; i < end; ++i) {
    const unsigned key = shared.keys[i];
    if (key > bound || (key == bound && equal < needed)) out[above + min(equal, needed)] = shared.places[i];
    above += key > bound, equal += key == bound;
  }
}

__global__ void __launch_bounds__(kThreads, 1) select_step_kernel(const Select p) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Step*>(memory);
  let_next_launch_start();
  const int64_t token = blockIdx.x;
  const auto* scores = reinterpret_cast<const uint4*>(p.scores + token * p.entries);
  const int pieces_of_best = int(ceil_div(p.entries, 4 * kGroup));
  int32_t* const out = p.out + token * p.width;
  reinterpret_cast<uint4*>(shared.bins)[threadIdx.x] = {};
  auto copy = [&](const uint4* from, int count) {
    for (int i = threadIdx.x; i < count; i += kThreads) copy_async_16(&shared.pieces[i], from + i, true);
  };
  auto arrive = [&] {
    wait_async_copies();
    __syncthreads();
  };
  wait_for_launch_before();

  // What is needed in most cases is under way before it is known how much the row sees.
  const bool few = p.entries <= kAlone;
  copy(few ? scores : p.best + token * pieces_of_best, few ? int(p.entries / 4) : pieces_of_best);
  const int64_t sees = p.visible[token];
  const int seen = int(sees < 0 ? 0 : sees < p.entries ? sees : p.entries), groups = int(ceil_div(seen, kGroup));
  arrive();
  if (seen <= p.top_k) {
    for (int i = threadIdx.x; i < p.width; i += kThreads) out[i] = i < seen ? i : -1;
    return;
  }
  const bool of_groups = !few && seen > kAlone && groups > p.top_k;
  if (!few && !of_groups) {
    copy(scores, int(ceil_div(seen, 4)));
    arrive();
  }
  const int limit = of_groups ? groups : seen;
  View view(shared, !of_groups, false, int(ceil_div(limit, 4)), limit, 1);
  const bool as_one = of_groups && view.pieces > kSingle && view.pieces >= p.top_k;
  Range range = find_range(shared, view, as_one, p.top_k);
  const unsigned top = range.top;
  auto add = [&](auto&& use) { view.for_keys(as_one, use); };
  // A few more than are wanted do.
#pragma unroll 1
  while (range.narrow(shared, add) && range.count - range.needed > unsigned(p.top_k) / 4) {
  }
  const unsigned least = range.least();
  view.least = least;
  int count = list_candidates(shared, view);
  if (of_groups && count <= kCandidates) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 4 * count; i += kThreads) {
      const int from = shared.groups[i / 4] * kGroup + i % 4 * 4;
      copy_async_16(&shared.pieces[i], scores + from / 4, from < p.entries);
    }
    arrive();
    count = list_candidates(shared, View(shared, true, true, 4 * count, seen, least));
  }
  if (count <= kCandidates) {
    choose_candidates(shared, {top, top - least, unsigned(p.top_k), 0}, count, out);
    return;
  }

  // Too many are equal, or nearly: all of the row's entries, by digits.
  auto& digits = *reinterpret_cast<Shared<1>*>(memory);
  clear(digits);
  __syncthreads();
  choose_by_digits(p, digits, token, seen, 0, false);
}

}  // namespace

// Of at most top_k entries there may be no scores.
bool fits_step(const Select& p, int64_t tokens) {
  const bool in_reach = p.entries <= kAlone || (p.best && p.entries <= kLongest);
  return tokens <= kStep && p.entries > p.top_k && p.top_k <= kCandidates / 2 && p.entries % 4 == 0 && in_reach;
}

cudaError_t start_select_step(const Select& p, int64_t tokens, cudaStream_t stream) {
  static const cudaError_t ready =
      cudaFuncSetAttribute(select_step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Step)));
  if (ready != cudaSuccess) return ready;
  const Grid grid = {.blocks = tokens, .threads = kThreads, .shared = sizeof(Step), .overlap = true};
  return launch(select_step_kernel, grid, stream, p);
}

}  // namespace dsv4
