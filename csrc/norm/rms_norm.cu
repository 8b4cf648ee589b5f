// rms_norm: ops/norm/reference.py, one pass over each row.
//
// One, two, four or eight warps share a row, so that a thread holds at most four 16-byte vectors of it between the sum
// of squares and the scaling: x is read once and out written once, 4 bytes an element in bf16. Blocks take a few
// rows each and keep their share of the weight, twice as many bytes as of x, in registers. How a row is
// shared follows from the width alone, so its bits do not depend on how many rows there are. Rows that no vector
// fits, or wider ones, are read twice, value by value.
// sass rms_norm_kernel: LDG.E.128, STG.E.128
#include "common/device.cuh"

namespace dsv4 {
namespace {

// Hides from the compiler that a vector stays the same: it then keeps the packed words, not every value unpacked.
template <class T, int N>
__device__ inline void keep_packed(Vector<T, N>& v) {
  static_assert(N * sizeof(T) % 4 == 0);
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 4); ++i) asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&v)[i]));
}

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a row that one thread keeps
constexpr int kBlocksPerProcessor = 3;
constexpr int kRounds = 4;

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

// Sum over the kShare warps of a row, in ascending order; no other warp is waited for.
template <int kShare>
__device__ inline float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  if constexpr (kShare == 1) return x;
  const int warp = threadIdx.x / kWarp, first = warp / kShare * kShare;
  if (threadIdx.x % kWarp == 0) scratch[warp] = x;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warp / kShare), "n"(kShare * kWarp) : "memory");
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kShare; ++w) total += scratch[first + w];
  return total;
}

template <class T, int kShare>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    rms_norm_kernel(const T* __restrict__ x, const float* __restrict__ weight, T* __restrict__ out, int64_t rows,
                    int width, float eps) {
  constexpr int kPer = kPerVector<T>, kRowThreads = kShare * kWarp, kRows = kThreads / kRowThreads;
  __shared__ float scratch[2][kThreads / kWarp];  // two, so that one barrier a row is enough
  const int column = threadIdx.x % kRowThreads * kPer;
  Vector<float, kPer> w[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = column + v * kRowThreads * kPer;
    if (weight != nullptr && at < width) w[v] = load_vector<kPer>(weight + at);
  }
  int buffer = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < rows; first += int64_t(gridDim.x) * kRows, buffer ^= 1) {
    const int64_t row = first + threadIdx.x / kRowThreads;
    const bool valid = row < rows;
    Vector<T, kPer> kept[kVectors];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = column + v * kRowThreads * kPer;
      if (valid && at < width) kept[v] = load_vector<kPer>(x + row * width + at);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (valid && column + v * kRowThreads * kPer < width) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum = fmaf(to_float(kept[v][i]), to_float(kept[v][i]), sum);
        keep_packed(kept[v]);
      }
    }
    const float scale = rsqrtf(row_sum<kShare>(sum, scratch[buffer]) / width + eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = column + v * kRowThreads * kPer;
      if (valid && at < width) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const float y = to_float(kept[v][i]) * scale;
          kept[v][i] = from_float<T>(weight != nullptr ? y * w[v][i] : y);
        }
        store_vector(out + row * width + at, kept[v]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_any_width_kernel(const T* __restrict__ x, const float* __restrict__ weight, T* __restrict__ out,
                              int64_t width, float eps) {
  __shared__ float scratch[kThreads / kWarp];
  const T* row = x + blockIdx.x * width;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) sum = fmaf(to_float(row[i]), to_float(row[i]), sum);
  const float scale = rsqrtf(block_sum(sum, scratch) / width + eps);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float y = to_float(row[i]) * scale;
    out[blockIdx.x * width + i] = from_float<T>(weight != nullptr ? y * weight[i] : y);
  }
}

}  // namespace

cudaError_t rms_norm(In x, Maybe<const float> weight, Out out, int64_t rows, int64_t width, double eps,
                     cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    auto* from = static_cast<const T*>(x.data);
    auto* to = static_cast<T*>(out.data);
    auto start = [&](auto kernel, int share) {
      // As many blocks as run at once; but no more than kRounds rounds each, so that they end at about the same time.
      const int64_t steps = ceil_div(rows, kThreads / kWarp / share), at_once = int64_t(processors) * kBlocksPerProcessor;
      const int64_t least = ceil_div(steps, kRounds), blocks = steps < at_once ? steps : at_once;
      kernel<<<unsigned(blocks > least ? blocks : least), kThreads, 0, stream>>>(from, weight.data, to, rows,
                                                                                int(width), float(eps));
    };
    const int64_t warps = ceil_div(width, kPerVector<T> * kVectors * kWarp);
    if (width % kPerVector<T> || warps > 8) {
      rms_norm_any_width_kernel<T>
          <<<unsigned(rows), kThreads, 0, stream>>>(from, weight.data, to, width, float(eps));
    } else if (warps == 1) {
      start(rms_norm_kernel<T, 1>, 1);
    } else if (warps == 2) {
      start(rms_norm_kernel<T, 2>, 2);
    } else if (warps <= 4) {
      start(rms_norm_kernel<T, 4>, 4);
    } else {
      start(rms_norm_kernel<T, 8>, 8);
    }
    return cudaGetLastError();
  });
}

}  // namespace dsv4
