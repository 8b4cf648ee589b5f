// What the router's kernels share: the score of a logit, and a warp's choice of the largest keys. docs/model.md 2.14.
#pragma once

#include "common/device.cuh"
#include "common/order.cuh"

namespace dsv4 {

// Rounded like torch's: accurate exp, log1p and sqrt, no contraction across them.
__device__ inline float score(float logit) { return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit))); }

// Score + bias as an integer of the same order; 0 is less than that of any expert that may still be taken, and whatever
// a NaN's bits are, there is a next one to take.
__device__ inline unsigned key_of(float score, float bias) { return max(ordered(score + bias), 1u); }

// The keys of all experts in the registers of one warp: lane l holds those of kPerLane consecutive ones, so that the
// lowest lane that has a key has the lowest expert.
template <int kPerLane>
struct Keys {
  unsigned held[kPerLane];

  // From shared memory, zeros past the last expert.
  __device__ explicit Keys(const unsigned* keys) {
    const auto mine = load_vector<kPerLane>(keys + threadIdx.x % kWarp * kPerLane);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) held[i] = mine[i];
  }

  // The expert of the largest key, the lowest of equals, the same in every lane; its key becomes 0. What the next call
  // waits for is short: a maximum, one redux, one vote.
  __device__ int take() {
    unsigned tree[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) tree[i] = held[i];
#pragma unroll
    for (int step = 1; step < kPerLane; step *= 2) {
#pragma unroll
      for (int i = 0; i + step < kPerLane; i += 2 * step) tree[i] = max(tree[i], tree[i + step]);
    }
    int at = 0;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) at = held[i] == tree[0] ? i : at;
    const bool largest = __reduce_max_sync(kFullMask, tree[0]) == tree[0];
    const int lane = __ffs(int(__ballot_sync(kFullMask, largest))) - 1;
    const bool mine = lane == int(threadIdx.x % kWarp);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) held[i] = mine && at == i ? 0 : held[i];
    return lane * kPerLane + __shfl_sync(kFullMask, at, lane);
  }
};

}  // namespace dsv4
