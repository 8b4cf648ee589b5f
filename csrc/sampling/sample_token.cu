// sample_token: ops/sampling/reference.py, in two kernels.
//
// sample_largest, for temperature 0: one cluster of 8 blocks reads the V logits once, all loads in flight, and keeps
// the largest key with the lowest id; 517 KB at V = 129,280. Partial results meet in shared memory of the cluster.
//
// sample_ranked, for the rest: one block walks logits that are sorted in descending order. The definition sums in rank
// order with one fp32 rounding a step. Such a sum can be taken apart: while it stays between two powers of two, its
// last bits are equally spaced, and what a run of additions adds to it, counted in last bits, depends on the sum only
// through its parity (ties round to even). So each thread adds up its run of 8 values twice, from an even and from an
// odd sum; a scan over these pairs gives every thread the sum that it starts from, to the bit; and the first run that
// crosses a power of two, or the bound that is looked for, is added up by the real sum. A window of 8192 values costs
// about 2 us; the additions alone, one after the other, take 17. The walk ends where a whole window no longer changes
// the sum: values descend, so none after it can.
// sass sample_largest_kernel: UCGABAR_ARV
// sass sample_ranked_kernel: MUFU.EX2, SHFL.UP
#include <cooperative_groups.h>

#include "common/device.cuh"
#include "common/order.cuh"

namespace dsv4 {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 8;     // of the cluster
constexpr int kInFlight = 16;  // logits a thread of it loads at once: 131,072 in all

struct Best {
  unsigned key, id;  // the larger key is better, then the lower id
};

__device__ inline Best warp_best(Best mine) {
  unsigned key = __reduce_max_sync(kFullMask, mine.key);
  return {key, __reduce_min_sync(kFullMask, mine.key == key ? mine.id : ~0u)};
}

__global__ void __cluster_dims__(kBlocks) __launch_bounds__(kThreads)
    sample_largest_kernel(const float* __restrict__ logits, int64_t* __restrict__ out, int vocab) {
  __shared__ Best of_warps[kWarps];
  __shared__ Best of_block;
  cg::cluster_group cluster = cg::this_cluster();
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Best best = {0, ~0u};  // worse than any logit
  constexpr int kStride = kBlocks * kThreads;
  for (int base = blockIdx.x * kThreads + threadIdx.x; base < vocab; base += kInFlight * kStride) {
    float logit[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) logit[i] = base + i * kStride < vocab ? logits[base + i * kStride] : -INFINITY;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      unsigned key = isnan(logit[i]) ? ~0u : ordered(logit[i]);
      if (key > best.key) best = {key, unsigned(base + i * kStride)};
    }
  }
  best = warp_best(best);
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = warp_best(of_warps[lane]);
    if (lane == 0) of_block = best;
  }
  cluster.sync();
  if (blockIdx.x == 0 && warp == 0) {
    best = warp_best(*cluster.map_shared_rank(&of_block, lane % kBlocks));
    bool finite = best.key > ordered(-INFINITY) && best.key < ordered(INFINITY);
    if (lane == 0) *out = finite ? int64_t(best.id) : -1;
  }
  cluster.sync();  // a block's shared memory lasts until all have been read
}

constexpr int kRun = 8;  // values a thread adds up
constexpr int kWindow = kThreads * kRun;
constexpr unsigned kBinade = 1u << 23;      // floats between two powers of two
constexpr unsigned kNoBound = 0x7f800000u;  // infinity

// What a run of additions adds to a sum whose last bit is 0 or 1, in last bits; kBinade or more if it crosses a power
// of two. Sums are handled as the bits of their floats, which count last bits.
struct Gain {
  unsigned even, odd;
};
__device__ inline unsigned gain_of(Gain run, unsigned sum) { return sum & 1 ? run.odd : run.even; }
__device__ inline Gain then(Gain a, Gain b) {
  return {a.even + gain_of(b, a.even), a.odd + gain_of(b, 1 + a.odd)};
}

__device__ inline Gain add_run(const float (&values)[kRun], unsigned sum) {
  unsigned power = sum & ~(kBinade - 1);
  float even = __uint_as_float(power), odd = __uint_as_float(power + 1);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    even += values[j];
    odd += values[j];
  }
  return {__float_as_uint(even) - power, __float_as_uint(odd) - (power + 1)};
}

// The gain of the runs of this and all earlier lanes.
__device__ inline Gain warp_scan(Gain run) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    Gain earlier = {__shfl_up_sync(kFullMask, run.even, step), __shfl_up_sync(kFullMask, run.odd, step)};
    if (threadIdx.x % kWarp >= step) run = then(earlier, run);
  }
  return run;
}

// The probability of a logit under the filters so far: its weight, divided by the sum that each of them left, 1 where
// it is off.
struct Distribution {
  float peak, temperature;
  float of_top_k = 1.0f, of_top_p = 1.0f, of_min_p = 1.0f;

  __device__ float operator()(float logit) const {
    float p = expf((logit - peak) / temperature);
    if (of_top_k != 1.0f) p /= of_top_k;  // p / 1 is p, and saves an exact division a value
    if (of_top_p != 1.0f) p /= of_top_p;
    if (of_min_p != 1.0f) p /= of_min_p;
    return p;
  }
};

struct Scratch {
  float values[kThreads][kRun + 1];  // one column more: no two lanes meet in a bank
  Gain warps[kWarps];
  unsigned sum;
  int done;
};

struct Prefix {
  int length;
  float sum;
};

// The shortest prefix of the first `count` probabilities whose sum, as bits, reaches `bound`, or all of them.
// Probabilities descend and none is negative; the first is positive. One copy of this code serves all passes.
__device__ __noinline__ Prefix shortest_prefix(const float* ranked, int count, unsigned bound,
                                               Distribution probability) {
  __shared__ Scratch scratch;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned sum = __float_as_uint(probability(ranked[0]));
  int done = 1;  // values that are in the sum
  while (done < count && sum < bound) {
    // In a flat list, as many values again as are done double the sum, and a window ends there.
    int length = min(min(max(done, kThreads), kWindow), count - done);
    float mine[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      int i = j * kThreads + threadIdx.x;
      mine[j] = i < length ? ranked[done + i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      int i = j * kThreads + threadIdx.x;
      scratch.values[i / kRun][i % kRun] = mine[j];
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < length; i += kThreads) {
      float& value = scratch.values[i / kRun][i % kRun];
      value = probability(value);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRun; ++j) mine[j] = scratch.values[threadIdx.x][j];
    Gain through = warp_scan(add_run(mine, sum));
    // A warp that crosses may count to 2^30; cut short, 32 of them fit an integer.
    if (lane == kWarp - 1) scratch.warps[warp] = {min(through.even, kBinade), min(through.odd, kBinade)};
    __syncthreads();
    unsigned total = 0, before = 0;  // gained by the window, by the warps before this one
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = total;
      total += gain_of(scratch.warps[w], sum + total);
    }
    Gain earlier = {__shfl_up_sync(kFullMask, through.even, 1), __shfl_up_sync(kFullMask, through.odd, 1)};
    unsigned start = before + (lane ? gain_of(earlier, sum + before) : 0);
    unsigned end = before + gain_of(through, sum + before);
    unsigned room = min((sum | (kBinade - 1)) + 1, bound) - sum;
    bool decides = start < room && room <= end;  // at most one thread; gains up to its start are exact
    if (decides) {
      float real = __uint_as_float(sum + start);
      int at = done + threadIdx.x * kRun;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (__float_as_uint(real) < bound) {
          real += mine[j];
          ++at;
        }
      }
      scratch.sum = __float_as_uint(real);
      scratch.done = min(at, done + length);
    }
    if (__syncthreads_or(decides)) {
      sum = scratch.sum;
      done = scratch.done;
    } else {
      sum += total;
      done = total ? done + length : count;
    }
  }
  return {done, __uint_as_float(sum)};
}

// How many of `count` sorted logits fulfil `holds`: the first does, and after the first that does not, none does.
template <class Holds>
__device__ int count_leading(const float* ranked, int count, Holds holds) {
  int low = 0, high = count;  // low holds; high does not, or is the end
  while (high - low > 1) {
    int step = int(ceil_div(high - low, kThreads));
    int at = low + threadIdx.x * step;
    int found = __syncthreads_count(at < high && holds(ranked[at]));
    low += (found - 1) * step;
    high = min(low + step, high);
  }
  return high;
}

// The upper 24 bits of the first word of Philox4x32-10, as a fraction.
__device__ inline float uniform(uint64_t seed, uint64_t position) {
  unsigned c0 = unsigned(position), c1 = unsigned(position >> 32), c2 = 0, c3 = 0;
  unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return float(c0 >> 8) * 0x1p-24f;
}

// top_p, min_p < 0: off. The steps are those of the reference, in its order.
__global__ void __launch_bounds__(kThreads)
    sample_ranked_kernel(const float* __restrict__ ranked, const int64_t* __restrict__ ids, int64_t* __restrict__ out,
                         int vocab, float temperature, int top_k, float top_p, float min_p, uint64_t seed,
                         uint64_t position) {
  float peak = ranked[0];
  if (!isfinite(peak) || isnan(ranked[vocab - 1])) {  // a sort puts NaN at an end
    if (threadIdx.x == 0) *out = -1;
    return;
  }
  Distribution probability = {peak, temperature};
  int kept = count_leading(ranked, top_k, [&](float logit) { return probability(logit) > 0.0f; });
  probability.of_top_k = shortest_prefix(ranked, kept, kNoBound, probability).sum;
  if (top_p >= 0.0f) {
    Prefix nucleus = shortest_prefix(ranked, kept, __float_as_uint(top_p), probability);
    kept = nucleus.length;
    probability.of_top_p = nucleus.sum;
  }
  if (min_p >= 0.0f) {
    float least = probability(peak) * min_p;
    kept = count_leading(ranked, kept, [&](float logit) { return probability(logit) >= least; });
    probability.of_min_p = shortest_prefix(ranked, kept, kNoBound, probability).sum;
  }
  // More than u is at least the next float. If no sum gets there, the last token kept is the choice.
  unsigned bound = __float_as_uint(uniform(seed, position)) + 1;
  int chosen = shortest_prefix(ranked, kept, bound, probability).length - 1;
  if (threadIdx.x == 0) *out = ids[chosen];
}

}  // namespace

cudaError_t sample_largest(const float* logits, int64_t* out, int64_t vocab, cudaStream_t stream) {
  sample_largest_kernel<<<kBlocks, kThreads, 0, stream>>>(logits, out, int(vocab));
  return cudaGetLastError();
}

cudaError_t sample_ranked(const float* ranked, const int64_t* ids, int64_t* out, int64_t vocab, double temperature,
                          int64_t top_k, double top_p, double min_p, int64_t seed, int64_t position,
                          cudaStream_t stream) {
  int limit = int(top_k > 0 && top_k < vocab ? top_k : vocab);
  float p = top_p < 1.0 ? float(top_p) : -1.0f, least = min_p > 0.0 ? float(min_p) : -1.0f;
  sample_ranked_kernel<<<1, kThreads, 0, stream>>>(ranked, ids, out, int(vocab), float(temperature), limit, p, least,
                                                   uint64_t(seed), uint64_t(position));
  return cudaGetLastError();
}

}  // namespace dsv4
