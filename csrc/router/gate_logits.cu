// gate_logits: ops/router/reference.py, for few tokens. A block an expert: its row of the weight against the tokens.
//
// The weight is what moves: E D values once, 2.1 MB at Flash (256 experts of 4096 in bf16), 0.5 us of an H200's
// memory. All of a row's 16-byte loads are started before the first is used. Each thread sums its vectors in ascending
// order, lanes and warps follow in a fixed order; neither depends on the number of tokens, so a token's logits are
// bitwise the same whatever stands beside it.
// sass gate_logits_kernel: LDG.E.128
#include "common/device.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kPer = 8;    // values a thread takes at once: 16 bytes of bf16, twice that of f32
constexpr int kBatch = 4;  // such vectors of a row that one thread has in flight

// Adds kVectors vectors of a row, `stride` apart, times those of each token, to the sums of the tokens. All loads come
// first. Beyond the last token it is the last token's values that are loaded, so that no branch divides the loads.
template <int kVectors, int kTokens, class X, class W>
__device__ inline void add_products(const X* x, const W* row, int first, int tokens, int width, int at, int stride,
                                    float (&sum)[kTokens]) {
  Vector<W, kPer> w[kVectors];
  Vector<X, kPer> v[kVectors][kTokens];
#pragma unroll
  for (int b = 0; b < kVectors; ++b) {
    w[b] = load_vector<kPer>(row + at + b * stride);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      v[b][t] = load_vector<kPer>(x + int64_t(min(first + t, tokens - 1)) * width + at + b * stride);
    }
  }
#pragma unroll
  for (int b = 0; b < kVectors; ++b) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum[t] = fmaf(to_float(v[b][t][i]), to_float(w[b][i]), sum[t]);
    }
  }
}

// Block (e, g): expert e, tokens g * kTokens .. + kTokens - 1.
// Two blocks an SM leave the registers for all loads of a batch; left to itself, the compiler saves them.
template <class X, class W, int kTokens>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gate_logits_kernel(const X* __restrict__ x, const W* __restrict__ weight, float* __restrict__ out, int tokens,
                       int width) {
  constexpr int kVectors = kTokens == 1 ? kBatch : kBatch / 2;
  __shared__ float scratch[kTokens][kMaxThreads / kWarp];
  int expert = blockIdx.x, first = blockIdx.y * kTokens;
  const W* row = weight + int64_t(expert) * width;
  float sum[kTokens] = {};
  int at = threadIdx.x * kPer, stride = blockDim.x * kPer;
  for (; at + (kVectors - 1) * stride < width; at += kVectors * stride) {
    add_products<kVectors>(x, row, first, tokens, width, at, stride, sum);
  }
  for (; at < width; at += stride) add_products<1>(x, row, first, tokens, width, at, stride, sum);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float of_warp = warp_sum(sum[t]);
    if (threadIdx.x % kWarp == 0) scratch[t][threadIdx.x / kWarp] = of_warp;
  }
  __syncthreads();
  int token = first + threadIdx.x;
  if (threadIdx.x < kTokens && token < tokens) {
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) total += scratch[threadIdx.x][warp];
    out[int64_t(token) * gridDim.x + expert] = total;
  }
}

}  // namespace

cudaError_t gate_logits(In x, In weight, float* out, int64_t tokens, int64_t num_experts, int64_t width,
                        cudaStream_t stream) {
  if ((uintptr_t(x.data) | uintptr_t(weight.data)) % 16) return cudaErrorMisalignedAddress;
  if (width % kPer) return cudaErrorInvalidValue;
  int64_t batches = ceil_div(width, kPer * kBatch);
  int threads = int(ceil_div(batches < kMaxThreads ? batches : kMaxThreads, kWarp) * kWarp);
  return for_float_type(x.type, [&](auto x_zero) {
    return for_float_type(weight.type, [&](auto w_zero) {
      using X = decltype(x_zero);
      using W = decltype(w_zero);
      auto start = [&](auto kernel, int group) {
        kernel<<<dim3(num_experts, ceil_div(tokens, group)), threads, 0, stream>>>(
            static_cast<const X*>(x.data), static_cast<const W*>(weight.data), out, int(tokens), int(width));
        return cudaGetLastError();
      };
      return tokens == 1 ? start(gate_logits_kernel<X, W, 1>, 1) : start(gate_logits_kernel<X, W, 4>, 4);
    });
  });
}

}  // namespace dsv4
