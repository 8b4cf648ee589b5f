// topk_gate, hash_gate: ops/router/reference.py. Scores sqrt(softplus(logit)), the chosen experts, their weights.
//
// topk_gate: a block a token. A thread scores one expert (two above 512), so that a single token waits for one softplus
// and not for a chain of them. Then the first warp holds every expert's key, score + bias as an integer of the same
// order, in registers, and K times takes the largest (choose.cuh). 4 E bytes are read and 12 K written a token; one
// token takes as long as its dependent steps (launch, load, softplus, K rounds, division), many tokens as long as their
// instructions. For few tokens route.cu does this in the launch that makes the logits.
// hash_gate: a warp a token, a lane an expert of the table's row.
#include "router/choose.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxExperts = 1024;

// The routing weights of one token, by one warp, from the scores of its experts in slot order: score / sum * scale.
__device__ inline void write_weights(const float* chosen, int top_k, float scale, float* weights) {
  float sum = 0.0f;
  for (int k = 0; k < top_k; ++k) sum += chosen[k];
  for (int k = threadIdx.x % kWarp; k < top_k; k += kWarp) weights[k] = chosen[k] / sum * scale;
}

template <int kPerLane>
constexpr int kThreads = kWarp * (kPerLane < 16 ? kPerLane : 16);

template <int kPerLane>
__global__ void __launch_bounds__(kThreads<kPerLane>)
    topk_gate_kernel(const float* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ weights,
                     int64_t* __restrict__ experts, int num_experts, int top_k, float scale) {
  __shared__ float scores[kWarp * kPerLane];
  __shared__ alignas(16) unsigned keys[kWarp * kPerLane];
  __shared__ float chosen[kWarp * kPerLane];
  int64_t token = blockIdx.x;
  int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kWarp * kPerLane / kThreads<kPerLane>; ++i) {
    int expert = i * kThreads<kPerLane> + threadIdx.x;
    unsigned key = 0;
    if (expert < num_experts) {
      float logit = logits[token * num_experts + expert], its_bias = bias[expert];  // both loads before the softplus
      float s = score(logit);
      key = key_of(s, its_bias);
      scores[expert] = s;
    }
    keys[expert] = key;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;

  Keys<kPerLane> left(keys);
  for (int first = 0; first < top_k; first += kWarp) {
    int mine = 0;  // the choice number first + lane
    for (int k = first; k < min(first + kWarp, top_k); ++k) {
      const int expert = left.take();
      mine = k == first + lane ? expert : mine;
    }
    if (first + lane < top_k) {
      chosen[first + lane] = scores[mine];
      experts[token * top_k + first + lane] = mine;
    }
  }
  __syncwarp();
  write_weights(chosen, top_k, scale, weights + token * top_k);
}

__global__ void __launch_bounds__(kWarp)
    hash_gate_kernel(const float* __restrict__ logits, const int64_t* __restrict__ token_ids,
                     const int64_t* __restrict__ tid2eid, float* __restrict__ weights, int64_t* __restrict__ experts,
                     int num_experts, int top_k, float scale) {
  __shared__ float chosen[kMaxExperts];
  int64_t token = blockIdx.x;
  const int64_t* row = tid2eid + token_ids[token] * top_k;
  for (int k = threadIdx.x; k < top_k; k += kWarp) {
    int64_t expert = row[k];
    chosen[k] = score(logits[token * num_experts + expert]);
    experts[token * top_k + k] = expert;
  }
  __syncwarp();
  write_weights(chosen, top_k, scale, weights + token * top_k);
}

}  // namespace

cudaError_t topk_gate(const float* logits, const float* bias, float* weights, int64_t* experts, int64_t tokens,
                      int64_t num_experts, int64_t top_k, double scale, cudaStream_t stream) {
  auto start = [&](auto kernel, int threads) {
    kernel<<<tokens, threads, 0, stream>>>(logits, bias, weights, experts, int(num_experts), int(top_k), float(scale));
    return cudaGetLastError();
  };
  int64_t per_lane = ceil_div(num_experts, kWarp);
  if (per_lane <= 1) return start(topk_gate_kernel<1>, kThreads<1>);
  if (per_lane <= 4) return start(topk_gate_kernel<4>, kThreads<4>);
  if (per_lane <= 8) return start(topk_gate_kernel<8>, kThreads<8>);     // Flash: 256 experts
  if (per_lane <= 12) return start(topk_gate_kernel<12>, kThreads<12>);  // Pro: 384
  if (per_lane <= 16) return start(topk_gate_kernel<16>, kThreads<16>);
  if (per_lane <= 32) return start(topk_gate_kernel<32>, kThreads<32>);
  return cudaErrorInvalidValue;
}

cudaError_t hash_gate(const float* logits, const int64_t* token_ids, const int64_t* tid2eid, float* weights,
                      int64_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k, double scale,
                      cudaStream_t stream) {
  if (top_k > kMaxExperts) return cudaErrorInvalidValue;
  hash_gate_kernel<<<tokens, kWarp, 0, stream>>>(logits, token_ids, tid2eid, weights, experts, int(num_experts),
                                                 int(top_k), float(scale));
  return cudaGetLastError();
}

}  // namespace dsv4
