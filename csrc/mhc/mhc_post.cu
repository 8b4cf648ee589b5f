// mhc_post and sinkhorn_normalize of ops/mhc/reference.py, on their own: after the last block, and for whoever wants
// one step alone. Between sublayers mhc_boundary does both.
//
// mhc_post: a thread takes eight columns of a token: 16-byte accesses, 18 D bytes a token in bf16, each once.
// sass mhc_post_kernel: LDG.E.128, STG.E.128
#include "mhc/mhc.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    mhc_post_kernel(const T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ post,
                    const float* __restrict__ comb, T* __restrict__ out, int hidden) {
  const int64_t token = blockIdx.y;
  const int column = 8 * (blockIdx.x * kThreads + threadIdx.x);
  if (column >= hidden) return;
  float c[kCoefficients];
  load_coefficients(c, post + token * kStreams, comb + token * kStreams * kStreams);
  Octet<T> streams[kStreams];
#pragma unroll
  for (int k = 0; k < kStreams; ++k) streams[k] = load_octet(x + (token * kStreams + k) * hidden + column);
  mix_streams(c, load_octet(y + token * hidden + column), streams);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) store_octet(out + (token * kStreams + k) * hidden + column, streams[k]);
}

__global__ void __launch_bounds__(kThreads)
    sinkhorn_kernel(const float* __restrict__ logits, float* __restrict__ out, int64_t matrices, int iterations,
                    float eps) {
  const int64_t matrix = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (matrix >= matrices) return;
  float c[kStreams][kStreams];
#pragma unroll
  for (int i = 0; i < 16; ++i) c[i / 4][i % 4] = logits[matrix * 16 + i];
  sinkhorn(c, iterations, eps);
#pragma unroll
  for (int i = 0; i < 16; ++i) out[matrix * 16 + i] = c[i / 4][i % 4];
}

}  // namespace

cudaError_t mhc_post(In y, In x, const float* post, const float* comb, Out out, int64_t tokens, int64_t hidden,
                     cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    // grid.y holds at most 65,535 blocks: long prompts go in slices.
    for (int64_t first = 0; first < tokens; first += 65535) {
      dim3 grid(unsigned(ceil_div(hidden, 8 * kThreads)), unsigned(tokens - first < 65535 ? tokens - first : 65535));
      mhc_post_kernel<<<grid, kThreads, 0, stream>>>(
          static_cast<const T*>(y.data) + first * hidden, static_cast<const T*>(x.data) + first * kStreams * hidden,
          post + first * kStreams, comb + first * kStreams * kStreams,
          static_cast<T*>(out.data) + first * kStreams * hidden, int(hidden));
    }
    return cudaGetLastError();
  });
}

cudaError_t sinkhorn_normalize(const float* logits, float* out, int64_t matrices, int64_t iterations, double eps,
                               cudaStream_t stream) {
  sinkhorn_kernel<<<unsigned(ceil_div(matrices, kThreads)), kThreads, 0, stream>>>(logits, out, matrices,
                                                                                 int(iterations), float(eps));
  return cudaGetLastError();
}

}  // namespace dsv4
