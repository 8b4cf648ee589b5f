// attend and attend_step of ops/attention/reference.py in f32, for debugging: right, not fast.
//
// A block computes one head of one query. Its eight warps take every eighth row of the query's list, window rows and
// then compressed entries; a lane holds 16 of the 512 columns. Every warp has an online softmax of its own; at the end
// they are merged in ascending order, the sink once in the denominator. A warp without rows adds exact zeros.
//
// Floor: 2 KB a row, read by every head: 84 MB from the L2 cache for 64 heads and 640 rows, some 20 us.
#include "common/device.cuh"
#include "common/rotary.cuh"

namespace dsv4 {
namespace {

constexpr int kWidth = 512, kRotary = 64, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kMine = kWidth / kWarp;           // columns of a lane, in groups of four: 128 i + 4 lane ..
constexpr float kScale = 0.044194173824159216f;  // 512^-0.5

struct Queries {
  const float *q, *window_rows, *sink;
  const int64_t* positions;
  const float *inv_freq, *compressed;
  const int64_t* visible;
  const int32_t* selected;
  float* out;
  int tokens, heads, rows, window, entries, ratio, top_k;
  bool ring;  // position p stands in row p mod rows; otherwise the last row is the last query's own
};

// Columns of a row that are a lane's.
__device__ inline void load_row(float (&to)[kMine], const float* row, int lane) {
#pragma unroll
  for (int i = 0; i < kMine / 4; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(row + 4 * kWarp * i + 4 * lane);
    to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
  }
}

__global__ void __launch_bounds__(kThreads) attend_f32_kernel(const __grid_constant__ Queries c) {
  __shared__ float outputs[kWarps][kWidth], maxima[kWarps], sums[kWarps];
  const int token = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t position = c.positions[token];

  // The window's oldest row, and how many it has; then how many entries are there to look at.
  const int own = c.rows - c.tokens + token;
  const int64_t oldest = max(int64_t(0), (c.ring ? position : int64_t(own)) - c.window + 1);
  const int in_window = int((c.ring ? position : int64_t(own)) - oldest + 1);
  int others = 0;
  if (c.selected != nullptr) {
    others = c.top_k;
  } else if (c.compressed != nullptr) {
    others = int(min(c.ring ? (position + 1) / c.ratio : c.visible[token], int64_t(c.entries)));
  }

  float q[kMine], o[kMine] = {}, most = -INFINITY, sum = 0.0f;
  load_row(q, c.q + (int64_t(token) * c.heads + head) * kWidth, lane);
  for (int e = warp; e < in_window + others; e += kWarps) {
    const float* row;
    if (e < in_window) {
      row = c.window_rows + (c.ring ? (oldest + e) % c.rows : oldest + e) * kWidth;
    } else {
      const int entry = c.selected != nullptr ? c.selected[int64_t(token) * c.top_k + e - in_window] : e - in_window;
      if (entry < 0) continue;
      row = c.compressed + int64_t(entry) * kWidth;
    }
    float key[kMine], dot = 0.0f;
    load_row(key, row, lane);
#pragma unroll
    for (int i = 0; i < kMine; ++i) dot = fmaf(q[i], key[i], dot);
    const float score = warp_sum(dot) * kScale, larger = fmaxf(most, score);
    const float factor = expf(most - larger), p = expf(score - larger);
    most = larger;
    sum = fmaf(sum, factor, p);
#pragma unroll
    for (int i = 0; i < kMine; ++i) o[i] = fmaf(o[i], factor, p * key[i]);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) outputs[warp][4 * kWarp * (i / 4) + 4 * lane + i % 4] = o[i];
  if (lane == 0) maxima[warp] = most, sums[warp] = sum;
  __syncthreads();

  // The first warp has the window's first row, so that the largest of all is finite.
  const float sink = c.sink[head];
  float largest = sink;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w]);
  const int column = 2 * threadIdx.x;
  float total = expf(sink - largest);
  float2 value = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float factor = expf(maxima[w] - largest);  // 0 of a warp without rows
    total = fmaf(factor, sums[w], total);
    value.x = fmaf(factor, outputs[w][column], value.x);
    value.y = fmaf(factor, outputs[w][column + 1], value.y);
  }
  value.x /= total, value.y /= total;
  if (column >= kWidth - kRotary) {
    const float2 angle = rotary_angle(position, c.inv_freq[(column - (kWidth - kRotary)) / 2]);
    value = rotate(value, make_float2(angle.x, -angle.y));
  }
  *reinterpret_cast<float2*>(c.out + (int64_t(token) * c.heads + head) * kWidth + column) = value;
}

}  // namespace

// q, out [tokens, heads, 512]; window_rows [rows, 512], a ring by position, or the rows up to the last query's own;
// compressed [entries, 512], seen by position and `ratio` in a ring's call, by visible [tokens] otherwise, or selected
// [tokens, top_k].
cudaError_t attend_f32(const float* q, const float* window_rows, const float* sink, const int64_t* positions,
                       const float* inv_freq, Maybe<const float> compressed, Maybe<const int64_t> visible,
                       Maybe<const int32_t> selected, float* out, int64_t tokens, int64_t heads, int64_t rows,
                       int64_t window, int64_t entries, int64_t ratio, int64_t top_k, bool ring, cudaStream_t stream) {
  if (tokens < 1 || heads < 1 || window < 1 || rows < (ring ? window : tokens)) return cudaErrorInvalidValue;
  const bool none = compressed.data == nullptr, chosen = selected.data != nullptr;
  if (none ? chosen || visible.data != nullptr : !chosen && (ring ? ratio < 1 : visible.data == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if ((uintptr_t(q) | uintptr_t(window_rows) | uintptr_t(compressed.data) | uintptr_t(out)) % 16) {
    return cudaErrorMisalignedAddress;
  }
  const Queries c = {q, window_rows, sink, positions, inv_freq, compressed.data, visible.data, selected.data, out,
                     int(tokens), int(heads), int(rows), int(window), int(entries), int(ratio), int(top_k), ring};
  attend_f32_kernel<<<unsigned(tokens * heads), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

}  // namespace dsv4
