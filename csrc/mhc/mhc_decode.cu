// mhc_boundary, mhc_pre and mhc_head of ops/mhc/reference.py for up to 8 tokens: one launch.
//
// 128 blocks share the columns: fn (384 D bytes, nearly all there is to read) comes from all of DRAM at once. In a
// block, a warp takes one stream of 32 columns: everything it reads is under way together, then it makes its stream of
// X' (post), stores it, and multiplies it with fn (dots.cuh). One more block a token meanwhile makes all of that
// token's X' for itself, and then finishes the token (mixes.cuh): only sums travel between blocks.
// They travel in `sums_of_blocks` without fences, counters or flags: a word there is zero until its sum arrives (a sum
// of zero arrives as -0.0), whoever waits for it polls the word itself, and makes it zero again. Sums run over warps,
// then blocks, in ascending order: a token's bits depend neither on timing nor on the other tokens. The blocks that
// wait are at most 8 and wait for blocks that wait for nobody, so nothing that runs beside can keep them from ending.
//
// Launches of this kernel overlap (programmatic dependent launch): fn, which no launch before writes, is read before
// the wait for the launch before. Everything else comes after it.
//
// Floor at one token, D = 4096: 1.6 MB, 0.4 us. Expected 5 us: launch 0.7, one latency of L2 0.8, dots and reduction
// 0.5, a store and a load through L2 0.9, mixes 0.3, Sinkhorn 1 on one thread.
// sass mhc_decode_kernel: HMMA.16816.F32.BF16, LDG.E.128, STG.E.128
#include "common/launch.cuh"
#include "common/overlap.cuh"
#include "mhc/dots.cuh"
#include "mhc/launch.cuh"
#include "mhc/mixes.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxTokens = 8, kMaxSplits = 128;
constexpr int kThreads = kWorkers + kWarp;

// Zero between launches. Launches that use it must not run at the same time.
__device__ float sums_of_blocks[kMaxTokens][kMaxSplits][kWarp];

__device__ inline void send(float* to, float sum) {
  const uint32_t bits = sum == 0.0f ? 0x80000000u : __float_as_uint(sum);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

// kCount sums, kStride floats apart, added in ascending order.
template <int kCount, int kStride>
__device__ inline float receive(float* from) {
  uint32_t bits[kCount];
  bool waiting = true;
  while (waiting) {
    waiting = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits[i]) : "l"(from + i * kStride) : "memory");
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) waiting |= bits[i] == 0;
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    from[i * kStride] = 0.0f;
    sum += __uint_as_float(bits[i]);
  }
  return sum;
}

// The sums of one block's columns.
template <class T, bool kPost>
__device__ void sum_columns(const Tensors<T>& p, const Sizes& n) {
  constexpr int kStreamParts = sizeof(T) == 2 ? 1 : kParts;
  __shared__ float partial[kWorkers / kWarp][kMaxTokens][kSums];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int stream = warp % kStreams, local = warp / kStreams * kChunk + 8 * t;
  const int column = blockIdx.x * n.columns + local;
  const int warps = int(ceil_div(n.columns, kChunk)) * kStreams;  // at most 8
  if (warp < warps) {
    // A row, token or column that does not exist counts as zeros. All loads start before any is used.
    const bool inside = local < n.columns && column < n.hidden, valid = inside && g < n.tokens;
    Vector<float, 8> rows[kRowTiles] = {};
    Octet<T> from[kStreams] = {}, y = {}, x = {};
    float weight[kStreams] = {}, post = 0.0f;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (inside && 8 * j + g < n.rows) {
        rows[j] = load_vector<8>(p.fn + (int64_t(8 * j + g) * kStreams + stream) * n.hidden + column);
      }
    }
    Pairs b[kRowTiles][kParts];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      split_octet(rows[j], b[j]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) keep_here(b[j][part]);
    }
    wait_for_launch_before();
    const int64_t at = int64_t(g) * kStreams * n.hidden + column;
    if (valid && kPost) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) from[j] = load_octet(p.x + at + int64_t(j) * n.hidden);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) weight[j] = p.comb[(g * kStreams + j) * kStreams + stream];
      y = load_octet(p.y + int64_t(g) * n.hidden + column);
      post = p.post[g * kStreams + stream];
    } else if (valid) {
      x = load_octet(p.x + at + int64_t(stream) * n.hidden);
    }
    asm volatile("" ::: "memory");
    if constexpr (kPost) {
      float values[kStreams][8], added[8], to[8];
#pragma unroll
      for (int j = 0; j < kStreams; ++j) unpack(from[j], values[j]);
      unpack(y, added);
      mix_stream(weight, post, values, added, to);
      pack(to, x);
      if (valid) store_octet(p.x_out + at + int64_t(stream) * n.hidden, x);
    }
    float square = square_sum(x);
    square += __shfl_xor_sync(kFullMask, square, 1);
    square += __shfl_xor_sync(kFullMask, square, 2);
    if (t == 0) partial[warp][g][kMixes] = square;

    Pairs a[kStreamParts];
    split_octet(x, a);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      float sum[4] = {};
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {  // the smallest products first
#pragma unroll
        for (int other = kStreamParts - 1; other >= 0; --other) {
          if (part + other < kParts) {
            const uint32_t *x_pair = a[other].pair, *fn_pair = b[j][part].pair;
            mma_bf16(sum, x_pair[0], 0, x_pair[1], 0, fn_pair[0], fn_pair[1]);
            mma_bf16(sum, x_pair[2], 0, x_pair[3], 0, fn_pair[2], fn_pair[3]);
          }
        }
      }
      partial[warp][g][8 * j + 2 * t] = sum[0];
      partial[warp][g][8 * j + 2 * t + 1] = sum[1];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n.tokens * kSums; i += kThreads) {
    const int token = i / kSums, r = i % kSums;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += partial[w][token][r];
    send(&sums_of_blocks[token][blockIdx.x][r], sum);
  }
}

template <class T, bool kPost, int kOctets>
__global__ void __launch_bounds__(kThreads, 1) mhc_decode_kernel(const Tensors<T> p, const Sizes n) {
  let_next_launch_start();
  if (blockIdx.x < kMaxSplits) {
    sum_columns<T, kPost>(p, n);
    return;
  }
  wait_for_launch_before();
  const int token = blockIdx.x - kMaxSplits;
  float c[kCoefficients];
  if constexpr (kPost) load_coefficients(c, p.post + token * kStreams, p.comb + token * kStreams * kStreams);
  auto load = [&](Octet<T>(&x)[kStreams], int column) {
    const T* at = p.x + int64_t(token) * kStreams * n.hidden + column;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) x[k] = load_octet(at + k * n.hidden);
    if constexpr (kPost) mix_streams(c, load_octet(p.y + int64_t(token) * n.hidden + column), x);
  };
  auto add = [&](int warp, int lane) {
    constexpr int kShare = kMaxSplits / (kWorkers / kWarp);
    return lane < kSums ? receive<kShare, kWarp>(&sums_of_blocks[token][warp * kShare][lane]) : 0.0f;
  };
  constexpr int kAhead = sizeof(T) == 2 ? kOctets : 2;  // as many octets as registers hold
  finish_token<T, kOctets, kAhead>(p, n, token, load, add);
}

}  // namespace

template <class T>
cudaError_t launch_decode(Tensors<T> tensors, Sizes sizes, cudaStream_t stream) {
  // Eight tokens a launch; more than eight come here in f32 only, which has no other kernel.
  sizes.splits = kMaxSplits;
  sizes.columns = int(ceil_div(sizes.hidden, 8 * kMaxSplits) * 8);
  const int octets = sizes.hidden / 8;
  for (int64_t first = 0, tokens = sizes.tokens; first < tokens; first += kMaxTokens) {
    Tensors<T> part = tensors.from(first, sizes.hidden);
    sizes.tokens = int(tokens - first < kMaxTokens ? tokens - first : kMaxTokens);
    auto start = [&](auto kernel) {
      const Grid grid = {.blocks = kMaxSplits + sizes.tokens, .threads = kThreads, .overlap = true};
      return launch(kernel, grid, stream, part, sizes);
    };
    cudaError_t error;
    if (tensors.y != nullptr) {
      error = octets <= 2 * kWorkers ? start(mhc_decode_kernel<T, true, 2>) : start(mhc_decode_kernel<T, true, 4>);
    } else {
      error = octets <= 2 * kWorkers ? start(mhc_decode_kernel<T, false, 2>) : start(mhc_decode_kernel<T, false, 4>);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_decode(Tensors<bf16>, Sizes, cudaStream_t);
template cudaError_t launch_decode(Tensors<float>, Sizes, cudaStream_t);

}  // namespace dsv4
