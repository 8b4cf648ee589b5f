// apply_rope, rms_norm_rope: ops/rope/reference.py, the second with the norm of ops/norm/reference.py before it.
//
// A thread block takes neighbouring rows of [T * H, N], two for each of its groups of lanes. A group keeps its rows in
// registers, 16 bytes a lane and access, from the load through the norm (a butterfly over the group) and its rounding
// to the rotation of the last values. Rows of a token turn by the same angles: a block computes the cosines and sines
// of its tokens once, into shared memory, while its rows are on their way. Groups and order of summation follow from
// the width alone. Rows that no vector fits go value by value.
//
// Bytes: an element read and written once, 4 in bf16. Queries of Pro, [T, 128, 512]: 262 KB a token.
// sass rotate_rows_kernel: LDG.E.128, STG.E.128
#include "common/device.cuh"
#include "common/rotary.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2;        // of a group
constexpr int kMaxValues = 16;  // of a row in one lane: 2 vectors of bf16, 4 of f32

// What all rows share. The last 2 * pairs of `width` values turn.
struct Rope {
  const int64_t* positions;  // [tokens]
  const float* inv_freq;     // [pairs]
  const float* weight;       // [width] or null, of the norm
  int rows, heads, width, pairs;
  float eps;
  bool inverse;
};

__device__ inline float2 angle_of(const Rope& rope, int token, int pair) {
  float2 angle = rotary_angle(rope.positions[token], rope.inv_freq[pair]);
  return make_float2(angle.x, rope.inverse ? -angle.y : angle.y);
}

// A row's vectors in the lanes of a group: vector v of a lane begins at (v * lanes + lane) * kPer.
template <class T, int kVectors>
struct Row {
  static constexpr int kPer = 16 / sizeof(T);
  Vector<T, kPer> vectors[kVectors];

  __device__ void load(const T* row, int width, int lanes, int lane) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      int at = (v * lanes + lane) * kPer;
      if (at < width) vectors[v] = load_vector<kPer>(row + at);
    }
  }

  // Every lane of the warp calls it.
  __device__ void normalize(const Rope& rope, int lanes, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if ((v * lanes + lane) * kPer >= rope.width) continue;
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum += to_float(vectors[v][i]) * to_float(vectors[v][i]);
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    const float scale = rsqrtf(sum / rope.width + rope.eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      int at = (v * lanes + lane) * kPer;
      if (at >= rope.width) continue;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        float y = to_float(vectors[v][i]) * scale;
        vectors[v][i] = from_float<T>(rope.weight ? y * rope.weight[at + i] : y);
      }
    }
  }

  __device__ void rotate_and_store(T* row, const Rope& rope, const float2* angles, int lanes, int lane) {
    const int first = rope.width - 2 * rope.pairs;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      int at = (v * lanes + lane) * kPer;
      if (at >= rope.width) continue;
      if (at >= first) {
#pragma unroll
        for (int i = 0; i < kPer; i += 2) {
          float2 pair = make_float2(to_float(vectors[v][i]), to_float(vectors[v][i + 1]));
          pair = rotate(pair, angles[(at - first + i) / 2]);
          vectors[v][i] = from_float<T>(pair.x);
          vectors[v][i + 1] = from_float<T>(pair.y);
        }
      }
      store_vector(row + at, vectors[v]);
    }
  }
};

// The bounds give registers enough for all of a thread's loads at once: 64 KB in flight an SM in bf16.
template <class T, int kVectors, bool kNorm>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 3)
    rotate_rows_kernel(const T* __restrict__ x, T* __restrict__ out, Rope rope, int lanes) {
  extern __shared__ float2 angles[];  // [tokens of this block, pairs]
  const int shift = __ffs(lanes) - 1, lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> shift;
  const int groups = kThreads >> shift, first = blockIdx.x * groups * kRows;
  Row<T, kVectors> kept[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int row = min(first + r * groups + group, rope.rows - 1);  // rows behind the last are not stored
    kept[r].load(x + int64_t(row) * rope.width, rope.width, lanes, lane);
  }
  const int first_token = first / rope.heads, last = min(first + groups * kRows, rope.rows) - 1;
  const int count = (last / rope.heads - first_token + 1) * rope.pairs;
  for (int i = threadIdx.x; i < count; i += kThreads)
    angles[i] = angle_of(rope, first_token + i / rope.pairs, i % rope.pairs);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int row = first + r * groups + group;
    if constexpr (kNorm) kept[r].normalize(rope, lanes, lane);
    if (row < rope.rows)
      kept[r].rotate_and_store(out + int64_t(row) * rope.width, rope,
                               angles + (row / rope.heads - first_token) * rope.pairs, lanes, lane);
  }
}

template <class T, bool kNorm>
__global__ void __launch_bounds__(kThreads)
    rotate_any_width_kernel(const T* __restrict__ x, T* __restrict__ out, Rope rope) {
  __shared__ float scratch[kThreads / kWarp];
  const T* row = x + int64_t(blockIdx.x) * rope.width;
  float scale = 1.0f;
  if constexpr (kNorm) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < rope.width; i += kThreads) sum += to_float(row[i]) * to_float(row[i]);
    scale = rsqrtf(block_sum(sum, scratch) / rope.width + rope.eps);
  }
  auto value = [&](int i) {
    if (!kNorm) return row[i];
    float y = to_float(row[i]) * scale;
    return from_float<T>(rope.weight ? y * rope.weight[i] : y);
  };
  const int first = rope.width - 2 * rope.pairs;
  for (int i = threadIdx.x; i < rope.width; i += kThreads) {
    T y = value(i);
    if (i >= first) {
      const int odd = (i - first) & 1;
      float2 pair = make_float2(to_float(value(i - odd)), to_float(value(i - odd + 1)));
      pair = rotate(pair, angle_of(rope, blockIdx.x / rope.heads, (i - first) / 2));
      y = from_float<T>(odd ? pair.y : pair.x);
    }
    out[int64_t(blockIdx.x) * rope.width + i] = y;
  }
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class T, bool kNorm>
cudaError_t start(const T* x, T* out, const Rope& rope, cudaStream_t stream) {
  constexpr int kPer = 16 / sizeof(T);
  const bool whole = rope.width % kPer == 0 && 2 * rope.pairs % kPer == 0 && aligned(x) && aligned(out);
  const int vectors = rope.width / kPer;
  if (!whole || rope.width > kMaxValues * kWarp) {
    rotate_any_width_kernel<T, kNorm><<<rope.rows, kThreads, 0, stream>>>(x, out, rope);
    return cudaGetLastError();
  }
  int lanes = 1;  // a power of two
  while (lanes < vectors && lanes < kWarp) lanes *= 2;
  const int rows = kThreads / lanes * kRows;
  const int tokens = (rows - 2) / rope.heads + 2;  // at most, that neighbouring rows belong to
  auto run = [&](auto kernel) {
    kernel<<<ceil_div(rope.rows, rows), kThreads, tokens * rope.pairs * sizeof(float2), stream>>>(x, out, rope, lanes);
    return cudaGetLastError();
  };
  if (vectors <= kWarp) return run(rotate_rows_kernel<T, 1, kNorm>);
  return run(rotate_rows_kernel<T, kMaxValues / kPer, kNorm>);
}

}  // namespace

cudaError_t apply_rope(In x, const int64_t* positions, const float* inv_freq, Out out, int64_t tokens, int64_t heads,
                       int64_t width, int64_t pairs, bool inverse, cudaStream_t stream) {
  const Rope rope{positions, inv_freq, nullptr, int(tokens * heads), int(heads), int(width), int(pairs), 0.0f, inverse};
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    return start<T, false>(static_cast<const T*>(x.data), static_cast<T*>(out.data), rope, stream);
  });
}

cudaError_t rms_norm_rope(In x, Maybe<const float> weight, const int64_t* positions, const float* inv_freq, Out out,
                          int64_t tokens, int64_t heads, int64_t width, int64_t pairs, double eps,
                          cudaStream_t stream) {
  const Rope rope{positions,  inv_freq,   weight.data, int(tokens * heads), int(heads),
                  int(width), int(pairs), float(eps),  false};
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    return start<T, true>(static_cast<const T*>(x.data), static_cast<T*>(out.data), rope, stream);
  });
}

}  // namespace dsv4
