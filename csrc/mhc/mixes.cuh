// The second half of a boundary, one token by one group of threads: from partial dot products to mixes, to u and its
// norm, and beside them post and comb of the sublayer that follows. docs/model.md 2.3.
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

constexpr int kWorkers = 256;     // threads of a block that finishes tokens, besides the Sinkhorn warp
constexpr int kSums = kMixes + 1;  // the dot products, then the square sum

// kWorkers + 32 threads finish kWorkers / kGroup tokens from `first` on, kOctets octets of columns a thread at most.
// `load(x, token, column)` gives X' of eight columns, `add(token, from, count, lane)` the sum over `count` splits of a
// lane's value. The first kAhead octets are loaded before the sums are. Every warp works out the mixes of its token for
// itself; the last warp does so for all of them and runs Sinkhorn while the others make u. A token or column past the
// end stands for the last one: loads need no branch, and nothing of it is stored.
template <class T, int kGroup, int kOctets, int kAhead, class Load, class Add>
__device__ void finish_tokens(const Tensors<T>& p, const Sizes& n, int64_t first, const Load& load, const Add& add) {
  constexpr int kTokens = kWorkers / kGroup, kWarps = kGroup / kWarp, kStep = 2;  // octets read together
  static_assert(kAhead % kStep == 0 && kOctets % kStep == 0);
  __shared__ float sums[kTokens][kWarps][kWarp], squares[kTokens][kWarps], logits[kTokens][16];
  const int lane = threadIdx.x % kWarp, slot = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  const bool worker = threadIdx.x < kWorkers, valid = worker && first + slot < n.tokens;
  const int64_t token = valid ? first + slot : n.tokens - 1;

  auto column_of = [&](int octet) { return 8 * (thread + octet * kGroup); };
  auto load_octet = [&](Octet<T>(&x)[kStreams], int octet) {
    load(x, token, min(column_of(octet), n.hidden - 8));
  };
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
    // A warp's share of the splits.
    const int share = (n.splits + kWarps - 1) / kWarps, from = thread / kWarp * share;
    sums[slot][thread / kWarp][lane] = add(token, from, max(0, min(share, n.splits - from)), lane);
  }
  const int part = lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2;  // of the mixes: pre, post, comb
  const bool real = lane < n.rows;
  const float gain = real ? p.scale[part] : 0.0f, shift = real ? p.base[lane] : 0.0f;
  __syncthreads();
  auto logit_of = [&](int of) {  // lane r: the scaled mix r of token `of`
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[of][w][lane];
    const float square_sum = __shfl_sync(kFullMask, sum, kMixes);
    return sum * rsqrtf(__fdividef(square_sum, float(kStreams) * n.hidden) + n.norm_eps) * gain + shift;
  };

  if (!worker) {
    if (p.comb_out == nullptr) return;
    for (int of = 0; of < kTokens; ++of) {
      const float logit = logit_of(of);
      if (part == 2 && lane < kMixes) logits[of][lane - 2 * kStreams] = logit;
    }
    __syncwarp();
    const int64_t mine = first + lane;
    if (lane < kTokens && mine < n.tokens) {
      float c[kStreams][kStreams];
#pragma unroll
      for (int i = 0; i < 16; ++i) c[i / 4][i % 4] = logits[lane][i];
      sinkhorn(c, n.iterations, n.eps);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        Vector<float, 4> row = {c[j][0], c[j][1], c[j][2], c[j][3]};
        store_vector(p.comb_out + (mine * kStreams + j) * kStreams, row);
      }
    }
    return;
  }

  float gate = sigmoid(logit_of(slot));
  if (valid && thread < kWarp && part == 1 && p.post_out != nullptr) {
    p.post_out[token * kStreams + lane - kStreams] = 2.0f * gate;
  }
  gate += n.eps;
  float pre[kStreams];
#pragma unroll
  for (int k = 0; k < kStreams; ++k) pre[k] = __shfl_sync(kFullMask, gate, k);
  Octet<T> u[kOctets];
  float square = 0.0f;
  auto collapse = [&](int octet, const Octet<T>(&x)[kStreams]) {
    float sum[8];
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float from[8];
      unpack(x[k], from);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = k == 0 ? pre[0] * from[c] : fmaf(pre[k], from[c], sum[c]);
    }
    pack(sum, u[octet]);
    square += column_of(octet) < n.hidden ? square_sum(u[octet]) : 0.0f;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) collapse(i, ahead[i]);
#pragma unroll
  for (int i = kAhead; i < kOctets; i += kStep) {
    Octet<T> x[kStep][kStreams];
#pragma unroll
    for (int j = 0; j < kStep; ++j) load_octet(x[j], i + j);
#pragma unroll
    for (int j = 0; j < kStep; ++j) collapse(i + j, x[j]);
  }

  const bool normalise = p.norm != nullptr;
  float scale = 1.0f;
  if (normalise) {
    square = warp_sum(square);
    if (lane == 0) squares[slot][thread / kWarp] = square;
    asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += squares[slot][w];
    scale = rsqrtf(__fdividef(total, float(n.hidden)) + n.norm_eps);
  }
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (valid && column_of(i) < n.hidden) {
      if (normalise) {
        const Vector<float, 8> weight = kAll ? weights[i] : load_vector<8>(p.norm + column_of(i));
        float y[8];
        unpack(u[i], y);
#pragma unroll
        for (int c = 0; c < 8; ++c) y[c] = y[c] * scale * weight[c];
        pack(y, u[i]);
      }
      store_octet(p.u + token * n.hidden + column_of(i), u[i]);
    }
  }
}

}  // namespace dsv4
