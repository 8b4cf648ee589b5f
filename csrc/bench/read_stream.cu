// read_stream: how fast one kernel can read device memory; the rate that benchmarks state their percentages of.
//
// A fixed grid sweeps x front to back: a block takes tiles of kThreads x kLoads 16-byte vectors, one grid apart, so
// that all blocks together read one contiguous stretch at a time. A thread has kLoads accesses in flight, 128 KiB on
// a full multiprocessor, several times what covers the latency of device memory. Each block writes the sum of what
// it read, so that nothing can be left out; the order of that sum is fixed. Bytes: those of x.
// sass read_stream_kernel: LDG.E.128
#include "common/device.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;
constexpr int kBlocks = 8;  // on a multiprocessor

__global__ void __launch_bounds__(kThreads, kBlocks)
    read_stream_kernel(const float* __restrict__ x, float* __restrict__ out, int64_t vectors) {
  constexpr int kTile = kThreads * kLoads;
  __shared__ float scratch[kThreads / kWarp];
  float sum = 0.0f;
  int64_t at = int64_t(blockIdx.x) * kTile + threadIdx.x;  // in vectors of four floats
  for (; at + (kLoads - 1) * kThreads < vectors; at += int64_t(gridDim.x) * kTile) {
    Vector<float, 4> loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = load_vector<4>(x + 4 * (at + i * kThreads));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += (loaded[i][0] + loaded[i][1]) + (loaded[i][2] + loaded[i][3]);
  }
  // The last tile may end early. The tiles after it lie behind x.
  for (; at < vectors; at += kThreads) {
    Vector<float, 4> v = load_vector<4>(x + 4 * at);
    sum += (v[0] + v[1]) + (v[2] + v[3]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

cudaError_t read_stream(const float* x, float* out, int64_t vectors, int64_t blocks, cudaStream_t stream) {
  read_stream_kernel<<<blocks, kThreads, 0, stream>>>(x, out, vectors);
  return cudaGetLastError();
}

}  // namespace dsv4
