// The second half of a boundary: from partial dot products to mixes, to u and its norm, and beside them post and comb
// of the sublayer that follows. docs/model.md 2.3.
#pragma once

#include "mhc/mhc.cuh"

namespace dsv4 {

struct Sizes {
  int tokens, hidden;
  int splits, columns;  // blocks that share a token's columns, and columns of one, a multiple of 8
  int rows;             // of fn: 24, or 4 for the head
  int iterations;
  float eps, norm_eps;
};

template <class T>
struct Tensors {
  const T *y, *x;                                       // [T, D], [T, M, D]
  const float *post, *comb, *fn, *base, *scale, *norm;  // norm may be null: u is not normalised
  T *x_out, *u;                                         // [T, M, D], [T, D]
  float *post_out, *comb_out;                           // [T, M], [T, M, M]; null for the head
  float* partial;                                       // [T, splits, 25]: dot products and square sum; prefill

  // The same from token `first` on; `partial` is used again.
  __host__ Tensors from(int64_t first, int64_t hidden) const {
    Tensors t = *this;
    t.x += first * kStreams * hidden;
    t.u += first * hidden;
    if (y != nullptr) {
      t.y += first * hidden;
      t.post += first * kStreams;
      t.comb += first * kStreams * kStreams;
      t.x_out += first * kStreams * hidden;
    }
    if (post_out != nullptr) {
      t.post_out += first * kStreams;
      t.comb_out += first * kStreams * kStreams;
    }
    return t;
  }
};

// u of eight columns, sum_k pre[k] X'[k], rounded.
template <class V>
__device__ inline void collapse(const float (&pre)[kStreams], const V (&x)[kStreams], V& u) {
  float sum[8];
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float from[8];
    unpack(x[k], from);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] = k == 0 ? pre[0] * from[c] : fmaf(pre[k], from[c], sum[c]);
  }
  pack(sum, u);
}

template <class V>
__device__ inline void normalise(float scale, const Vector<float, 8>& weight, V& u) {
  float y[8];
  unpack(u, y);
#pragma unroll
  for (int c = 0; c < 8; ++c) y[c] = y[c] * scale * weight[c];
  pack(y, u);
}

// One thread: comb of one token.
__device__ inline void balance(const float (&logits)[kStreams * kStreams], float* comb, const Sizes& n) {
  float c[kStreams][kStreams];
#pragma unroll
  for (int i = 0; i < kStreams * kStreams; ++i) c[i / kStreams][i % kStreams] = logits[i];
  sinkhorn(c, n.iterations, n.eps);
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    Vector<float, 4> row = {c[j][0], c[j][1], c[j][2], c[j][3]};
    store_vector(comb + j * kStreams, row);
  }
}

constexpr int kWorkers = 256;      // threads of a block that finishes a token, besides the Sinkhorn warp
constexpr int kSums = kMixes + 1;  // the dot products, then the square sum

// A block of kWorkers + 32 threads finishes a token, at most kOctets octets of columns a thread. `load(x, column)` is
// X' of eight columns, `add(warp, lane)` the sum over a warp's share of the splits of a lane's value. The first kAhead
// octets are loaded before the sums are. Every warp works out the mixes for itself; the last one then runs Sinkhorn
// while the others make u. A column past the end stands for the last one: loads need no branch, and nothing of it is
// stored.
template <class T, int kOctets, int kAhead, class Load, class Add>
__device__ void finish_token(const Tensors<T>& p, const Sizes& n, int token, const Load& load, const Add& add) {
  constexpr int kWarps = kWorkers / kWarp, kStep = 2;  // octets read together
  static_assert(kAhead % kStep == 0 && kOctets % kStep == 0);
  __shared__ float sums[kWarps][kWarp], squares[kWarps], logits[kStreams * kStreams];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool worker = threadIdx.x < kWorkers;

  auto column_of = [&](int octet) { return 8 * (int(threadIdx.x) + octet * kWorkers); };
  auto load_octet = [&](Octet<T>(&x)[kStreams], int octet) { load(x, min(column_of(octet), n.hidden - 8)); };
  constexpr bool kAll = kAhead == kOctets;  // then the norm's weights are read ahead as well
  Vector<float, 8> weights[kAll ? kOctets : 1] = {};
  Octet<T> ahead[kAhead][kStreams];
  if (worker) {
    if (kAll && p.norm != nullptr) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) weights[i] = load_vector<8>(p.norm + min(column_of(i), n.hidden - 8));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_octet(ahead[i], i);
    sums[warp][lane] = add(warp, lane);
  }
  const int part = lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2;  // of the mixes: pre, post, comb
  const bool real = lane < n.rows;
  const float gain = real ? p.scale[part] : 0.0f, shift = real ? p.base[lane] : 0.0f;
  __syncthreads();
  float sum = 0.0f;  // lane r: dot product r, then its scaled mix
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][lane];
  const float square_sum_of_all = __shfl_sync(kFullMask, sum, kMixes);
  const float rms = __fdividef(square_sum_of_all, float(kStreams) * n.hidden) + n.norm_eps;
  const float logit = sum * rsqrtf(rms) * gain + shift;

  if (!worker) {
    if (p.comb_out == nullptr) return;
    if (part == 2 && lane < kMixes) logits[lane - 2 * kStreams] = logit;
    __syncwarp();
    if (lane == 0) balance(logits, p.comb_out + int64_t(token) * kStreams * kStreams, n);
    return;
  }

  float gate = sigmoid(logit);
  if (warp == 0 && part == 1 && p.post_out != nullptr) {
    p.post_out[int64_t(token) * kStreams + lane - kStreams] = 2.0f * gate;
  }
  gate += n.eps;
  float pre[kStreams];
#pragma unroll
  for (int k = 0; k < kStreams; ++k) pre[k] = __shfl_sync(kFullMask, gate, k);
  Octet<T> u[kOctets];
  float square = 0.0f;
  auto collapse_octet = [&](int octet, const Octet<T>(&x)[kStreams]) {
    collapse(pre, x, u[octet]);
    square += column_of(octet) < n.hidden ? square_sum(u[octet]) : 0.0f;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) collapse_octet(i, ahead[i]);
#pragma unroll
  for (int i = kAhead; i < kOctets; i += kStep) {
    Octet<T> x[kStep][kStreams];
#pragma unroll
    for (int j = 0; j < kStep; ++j) load_octet(x[j], i + j);
#pragma unroll
    for (int j = 0; j < kStep; ++j) collapse_octet(i + j, x[j]);
  }

  const bool normed = p.norm != nullptr;
  float scale = 1.0f;
  if (normed) {
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += squares[w];
    scale = rsqrtf(__fdividef(total, float(n.hidden)) + n.norm_eps);
  }
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (column_of(i) < n.hidden) {
      if (normed) normalise(scale, kAll ? weights[i] : load_vector<8>(p.norm + column_of(i)), u[i]);
      store_octet(p.u + int64_t(token) * n.hidden + column_of(i), u[i]);
    }
  }
}

}  // namespace dsv4
