// index_scores: ops/indexer/reference.py for f32 queries and keys, the dtype of debugging: right, not fast.
//
// A thread has one key in registers and meets one query's heads, which a block of 128 threads stages in shared memory
// 16 at a time. A product is four sums, of every fourth dim, in ascending order; heads follow in ascending order. A
// block whose keys the query does not see leaves. 64 heads, 128 dims: 16 kflop a score, a few TFLOPS.
// sass index_scores_f32_kernel: LDG.E.128, FFMA
#include "common/device.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kWidth = 128;  // dims
constexpr int kHeads = 16;   // staged at a time

struct Scores {
  const float *q, *keys, *weights;  // [T, Hi, 128], [C, 128], [T, Hi]
  const int64_t* visible;           // [T]
  float* out;                       // [T, C]
  int64_t entries, least;
  int heads, tiles;                 // tiles of 128 keys
};

__global__ void __launch_bounds__(kThreads) index_scores_f32_kernel(const Scores p) {
  __shared__ float4 staged[kHeads][kWidth / 4];
  __shared__ float weights[kHeads];
  const int64_t token = blockIdx.x / p.tiles, first = int64_t(blockIdx.x % p.tiles) * kThreads;
  const int64_t sees = p.visible[token], seen = sees > p.least ? min(sees, p.entries) : 0;
  if (first >= seen) return;
  const int64_t entry = first + threadIdx.x;
  float4 key[kWidth / 4];
  const auto* from = reinterpret_cast<const float4*>(p.keys + min(entry, seen - 1) * kWidth);
#pragma unroll
  for (int i = 0; i < kWidth / 4; ++i) key[i] = from[i];
  float score = 0.0f;
  for (int head = 0; head < p.heads; head += kHeads) {
    const int count = min(kHeads, p.heads - head);
    const auto* q = reinterpret_cast<const float4*>(p.q + (token * p.heads + head) * kWidth);
    __syncthreads();
    for (int i = threadIdx.x; i < count * kWidth / 4; i += kThreads) staged[i / (kWidth / 4)][i % (kWidth / 4)] = q[i];
    if (threadIdx.x < count) weights[threadIdx.x] = p.weights[token * p.heads + head + threadIdx.x];
    __syncthreads();
    for (int h = 0; h < count; ++h) {
      float4 sum = {};
#pragma unroll
      for (int i = 0; i < kWidth / 4; ++i) {
        const float4 v = staged[h][i];
        sum.x = fmaf(v.x, key[i].x, sum.x), sum.y = fmaf(v.y, key[i].y, sum.y);
        sum.z = fmaf(v.z, key[i].z, sum.z), sum.w = fmaf(v.w, key[i].w, sum.w);
      }
      score = fmaf(weights[h], fmaxf((sum.x + sum.y) + (sum.z + sum.w), 0.0f), score);
    }
  }
  if (entry < seen) p.out[token * p.entries + entry] = score;
}

}  // namespace

cudaError_t index_scores_f32(const float* q, const float* keys, const float* weights, const int64_t* visible,
                             float* out, int64_t tokens, int64_t heads, int64_t entries, int64_t least,
                             cudaStream_t stream) {
  if (tokens < 1 || heads < 1 || entries < 1) return cudaErrorInvalidValue;
  if ((uintptr_t(q) | uintptr_t(keys)) % 16) return cudaErrorMisalignedAddress;
  Scores p = {q, keys, weights, visible, out, entries, least, int(heads), int(ceil_div(entries, kThreads))};
  if (tokens * p.tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch(index_scores_f32_kernel, {.blocks = tokens * p.tiles, .threads = kThreads}, stream, p);
}

}  // namespace dsv4
