// Device code that the mhc kernels share: stream coefficients and the Sinkhorn normalisation. docs/model.md 2.3, 2.4.
#pragma once

#include "common/device.cuh"

namespace dsv4 {

constexpr int kStreams = 4;                         // M
constexpr int kCoefficients = kStreams * (1 + kStreams);  // post [M], then comb [M, M] row by row
constexpr int kMixes = kStreams * (2 + kStreams);   // rows of fn: pre, post, comb

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// X'[k] = post[k] y + sum_j comb[j][k] X[j] of eight columns, for one k: weight[j] = comb[j][k], post = post[k].
__device__ inline void mix_stream(const float (&weight)[kStreams], float post, const float (&from)[kStreams][8],
                                  const float (&added)[8], float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    to[i] = weight[0] * from[0][i];
#pragma unroll
    for (int j = 1; j < kStreams; ++j) to[i] = fmaf(weight[j], from[j][i], to[i]);
    to[i] = fmaf(post, added[i], to[i]);
  }
}

// All of X', in place, rounded to T once. `c`: post, then comb row by row.
template <class V>
__device__ inline void mix_streams(const float (&c)[kCoefficients], const V& y, V (&x)[kStreams]) {
  float from[kStreams][8], added[8];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) unpack(x[j], from[j]);
  unpack(y, added);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float weight[kStreams], to[8];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) weight[j] = c[kStreams + kStreams * j + k];
    mix_stream(weight, c[k], from, added, to);
    pack(to, x[k]);
  }
}

// The 20 coefficients of a token: post [M], then comb [M, M].
__device__ inline void load_coefficients(float (&c)[kCoefficients], const float* post, const float* comb) {
#pragma unroll
  for (int row = 0; row < 1 + kStreams; ++row) {
    const Vector<float, 4> four = load_vector<4>(row == 0 ? post : comb + (row - 1) * kStreams);
#pragma unroll
    for (int i = 0; i < kStreams; ++i) c[kStreams * row + i] = four[i];
  }
}

template <class V>
__device__ inline float square_sum(const V& v) {
  float values[8], sum = 0.0f;
  unpack(v, values);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

// 1 / x to an ulp for normal x.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x of four sums between 1e-7 and 1e7 to a few ulps, by a single reciprocal: a thread alone would wait for four.
__device__ inline void reciprocals(float (&x)[kStreams]) {
  const float x01 = x[0] * x[1], x23 = x[2] * x[3], inverse = reciprocal(x01 * x23);
  const float inverse01 = inverse * x23, inverse23 = inverse * x01;
  const float x0 = x[0], x2 = x[2];
  x[0] = inverse01 * x[1];
  x[1] = inverse01 * x0;
  x[2] = inverse23 * x[3];
  x[3] = inverse23 * x2;
}

// One thread, one 4 x 4 matrix in registers: row softmax + eps, columns, then (rows, columns) iterations - 1 times.
// Four independent sums a step hide each other's latency; shuffles over 16 lanes would take longer.
__device__ inline void sinkhorn(float (&c)[kStreams][kStreams], int iterations, float eps) {
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    float top = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) sum += c[j][k] = expf(c[j][k] - top);
    const float inverse = reciprocal(sum);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] = c[j][k] * inverse + eps;
  }
  float sums[kStreams];
  for (int round = 0; round < iterations; ++round) {
    if (round > 0) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) sums[j] = (c[j][0] + c[j][1]) + (c[j][2] + c[j][3]) + eps;
      reciprocals(sums);
#pragma unroll
      for (int i = 0; i < kStreams * kStreams; ++i) c[i / kStreams][i % kStreams] *= sums[i / kStreams];
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) sums[k] = (c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps;
    reciprocals(sums);
#pragma unroll
    for (int i = 0; i < kStreams * kStreams; ++i) c[i / kStreams][i % kStreams] *= sums[i % kStreams];
  }
}

}  // namespace dsv4
