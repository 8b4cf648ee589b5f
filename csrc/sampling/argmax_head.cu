// argmax_head: ops/sampling/reference.py, in two kernels: the id of the largest logit, most of the head as int8.
//
// screen_head_kernel reads the int8 copy of the head, V D bytes, half of the bf16 head's: 529 MB at Flash, 121 us of
// an H200's memory. One block a multiprocessor takes a run of tiles of 16 rows; its warps take tiles in turn, each a
// contiguous stretch of memory, with 8 KB under way, and hand the bytes to the tensor cores as they are. x becomes
// three int8 vectors in steps of a, a / 128, a / 128^2, three columns of the other operand: integer products and sums
// are exact, so the only errors are the residuals of rounding, whose norms bound them (Cauchy-Schwarz):
//     |w . x - s q . x'| <= |x| error + |x - x'| norm      error >= |w - s q| + 2^-14 |w|, norm >= |s q|
// where 2^-14 |w| |x| also covers what fp32 loses, here and in the exact logits. Each row gets an upper bound; of the
// lower bounds the largest of each block is kept.
//
// rescore_head_kernel computes the logits of all rows that may be the largest, those whose upper bound is not below the
// best lower bound: tens of 129,280 as a rule, all of them where x is NaN or every row is alike. A logit is summed in
// fp32, 256 columns by two chains of MMAs, then over columns in ascending order, whatever rows stand beside it: the
// choice is the same as if every row were a candidate. Rows go to blocks by chunks of 32 in turn. Every block sends its
// best row to one block more, which waits for them as in router/route.cu: a word is zero until it arrives, and again
// when it has been read.
// sass screen_head_kernel: IMMA.16832.S8.S8, LDG.E.NA.128, LDS.128
// sass rescore_head_kernel: HMMA.16816.F32.BF16, LDG.E.128
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/order.cuh"
#include "common/overlap.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16;     // of a tile
constexpr int kColumns = 64;  // of a block of a tile: 1 KB of codes
constexpr int kSteps = 2;     // MMAs of a block, for each of which a lane has 16 bytes
constexpr int kAhead = 8;     // blocks that a warp has under way
constexpr int kMaxWidth = 8192;
constexpr int kMaxBlocks = 512;
constexpr int kParts = 3;                      // int8 vectors that x is taken apart into
constexpr int kPartPitch = kMaxWidth + 64;     // so that two parts read together hit all banks
constexpr int kOctets = kMaxWidth / 8 / kThreads;
constexpr float kRoundUp = 1.001f;             // more than the rounding of a sum of squares takes away
constexpr int kStretch = 256;                  // columns of rescore_head that one warp adds up
constexpr int kMaxStretches = kMaxWidth / kStretch;
constexpr int kChunk = kWarp, kChunks = 2;     // rows of a chunk, chunks that a warp looks at together

struct Head {
  const bf16 *x, *w;                    // [D], [V, D]
  const uint8_t* codes;                 // int8 as ops/sampling arranges them, D padded to a multiple of 512
  const float *scale, *error, *norm;    // [V]
  float* upper;                         // [V] bounds
  int64_t* out;
  int rows, width, blocks;              // V, D, and blocks of 64 columns of a tile: D / 64 when padded
  int screens;                          // blocks of the first launch
};

// Written by the first launch, read by the second.
__device__ float lower_of_blocks[kMaxBlocks];

// d += a b: a 16 x 32, b 32 x 8, int8 with int32 sums, laid out like mma_bf16 with four columns to a word.
__device__ inline void mma_int8(int (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Codes are read once: around the L1 cache.
__device__ inline uint4 read_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ inline float power_of_two(int exponent) { return __uint_as_float(unsigned(exponent + 127) << 23); }

// x as three int8 vectors in shared memory, and what the bounds need of it.
struct Parts {
  float step, norm, residual;  // of the last part; |x| and |x - x'|, rounded up
};
__device__ inline Parts take_apart(const Head& p, uint8_t (&parts)[kParts][kPartPitch]) {
  __shared__ unsigned tops[kWarps];
  __shared__ float squares[2][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float x[kOctets][8];
  float largest = 0.0f;
  unsigned top = 0;  // the largest magnitude as bits, NaN above infinity
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    const int column = 8 * (threadIdx.x + o * kThreads);
    Pairs v = {};
    if (column < p.width) v = load_octet(p.x + column);
    unpack(v, x[o]);
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max(top, __float_as_uint(fabsf(x[o][i])));
  }
  top = __reduce_max_sync(kFullMask, top);
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = max(top, tops[w]);
  largest = __uint_as_float(top);
  // The first step: the largest magnitude is between 32 and 64 of it. Not so small that a step is no normal number.
  const int exponent = max(int(__float_as_uint(largest) >> 23) - 127 - 5, -100);
  const float inverse = power_of_two(-exponent);
  float square = 0.0f, rest = 0.0f;  // in first and in last steps
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    uint32_t words[kParts][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float left = x[o][i] * inverse;  // exact, like all that follows but squares
      square = fmaf(left, left, square);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float whole = rintf(left);
        words[part][i / 4] |= (unsigned(int(whole)) & 0xff) << (8 * (i % 4));
        left -= whole;
        if (part + 1 < kParts) left *= 128.0f;
      }
      rest = fmaf(left, left, rest);
    }
    const int column = 8 * (threadIdx.x + o * kThreads);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      *reinterpret_cast<uint2*>(&parts[part][column]) = make_uint2(words[part][0], words[part][1]);
    }
  }
  square = warp_sum(square);
  rest = warp_sum(rest);
  if (lane == 0) squares[0][warp] = square, squares[1][warp] = rest;
  __syncthreads();
  square = rest = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) square += squares[0][w], rest += squares[1][w];
  Parts found;
  found.step = power_of_two(exponent - 14);
  found.norm = sqrtf(square) * kRoundUp * power_of_two(exponent);
  found.residual = (sqrtf(rest) * kRoundUp + 0x1p-20f) * found.step;  // more than squares that underflow
  return found;
}

__global__ void __launch_bounds__(kThreads, 1) screen_head_kernel(const Head p) {
  __shared__ alignas(16) uint8_t parts[kParts][kPartPitch];
  __shared__ float lowest[kWarps];
  let_next_launch_start();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int tiles = int(ceil_div(p.rows, kRows));
  const int first = int(int64_t(tiles) * blockIdx.x / gridDim.x);
  const int end = int(int64_t(tiles) * (blockIdx.x + 1) / gridDim.x);

  constexpr int kBlockPieces = kSteps * kWarp;  // of 16 bytes
  const uint4* const codes = reinterpret_cast<const uint4*>(p.codes) + lane;
  uint4 held[kAhead][kSteps] = {};
  auto load = [&](const uint4* from, int j) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) held[j][step] = read_once(from + j * kBlockPieces + step * kWarp);
  };
  auto begin_of = [&](int tile) { return codes + int64_t(tile) * p.blocks * kBlockPieces; };
  const uint4* from = begin_of(first + warp);
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    if (first + warp < end) load(from, j);
  }

  wait_for_launch_before();
  const Parts x = take_apart(p, parts);
  const uint32_t part_at = uint32_t(__cvta_generic_to_shared(&parts[min(g, kParts - 1)][16 * t]));
  float best = -INFINITY;
  for (int tile = first + warp; tile < end; tile += kWarps) {
    float scale[2], error[2], norm[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min(tile * kRows + g + 8 * r, p.rows - 1);
      scale[r] = p.scale[row], error[r] = p.error[row], norm[r] = p.norm[row];
    }
    int sum[4] = {};
    for (int block = 0; block < p.blocks; block += kAhead) {
      // What comes after these blocks, in this tile or in the warp's next one, takes their place.
      const bool last = block + kAhead == p.blocks, more = !last || tile + kWarps < end;
      from = last ? begin_of(tile + kWarps) : from + kAhead * kBlockPieces;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        uint4 b;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
                     : "r"(part_at + (block + j) * kColumns));
        mma_int8(sum, held[j][0], b.x, b.y);
        mma_int8(sum, held[j][1], b.z, b.w);
        if (more) load(from, j);
      }
    }
    // Column c of the sums belongs to part c: lane t = 0 has two of them, lane t = 1 the third.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int third = __shfl_down_sync(kFullMask, sum[2 * r], 1);
      const int row = tile * kRows + g + 8 * r;
      if (t == 0 && row < p.rows) {
        const int64_t whole = int64_t(sum[2 * r]) * (128 * 128) + int64_t(sum[2 * r + 1]) * 128 + third;
        const float value = float(whole) * scale[r] * x.step;
        float bound = x.norm * error[r] + x.residual * norm[r] + 1e-34f;  // more than products that underflow
        if (!isfinite(value)) bound = INFINITY;
        p.upper[row] = value + bound;
        best = fmaxf(best, value - bound);  // of a number and NaN, the number
      }
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kFullMask, best, step));
  if (lane == 0) lowest[warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = fmaxf(best, lowest[w]);
    lower_of_blocks[blockIdx.x] = best;
  }
}

// A logit as a key above the complement of its row: the larger is better, then the lower row. NaN is best of all.
using Ranked = unsigned long long;
constexpr Ranked kNone = 1;  // less than any row's
__device__ inline Ranked rank(float logit, int row) {
  return Ranked(isnan(logit) ? ~0u : ordered(logit)) << 32 | (~unsigned(row));
}
__device__ inline Ranked warp_best(Ranked mine) {
  const unsigned key = __reduce_max_sync(kFullMask, unsigned(mine >> 32));
  const unsigned row = __reduce_max_sync(kFullMask, unsigned(mine >> 32) == key ? unsigned(mine) : 0);
  return Ranked(key) << 32 | row;
}

// Zero between launches. Launches that use it must not run at the same time.
__device__ Ranked best_of_blocks[kMaxBlocks];

// Logits of 16 rows by the whole block, the sums of lane r of the first warp; a warp takes every sixteenth stretch.
__device__ inline float score_rows(const Head& p, const int* rows, float (&sums)[kMaxStretches][kRows]) {
  constexpr int kUnits = kStretch / kColumns;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int stretches = int(ceil_div(p.width, kStretch));
  const bf16* upper = p.w + int64_t(rows[g]) * p.width;
  const bf16* lower = p.w + int64_t(rows[g + 8]) * p.width;
  for (int stretch = warp; stretch < stretches; stretch += kWarps) {
    uint4 a[kUnits][2][2], b[kUnits][2];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = stretch * kStretch + u * kColumns + half * kColumns / 2 + 8 * t;
        a[u][half][0] = a[u][half][1] = b[u][half] = {};
        if (column < p.width) {
          a[u][half][0] = __ldg(reinterpret_cast<const uint4*>(upper + column));
          a[u][half][1] = __ldg(reinterpret_cast<const uint4*>(lower + column));
          if (g == 0) b[u][half] = *reinterpret_cast<const uint4*>(p.x + column);
        }
      }
    }
    float sum[2][4] = {};
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 &w0 = a[u][half][0], &w1 = a[u][half][1], &v = b[u][half];
        mma_bf16(sum[0], w0.x, w1.x, w0.y, w1.y, v.x, v.y);
        mma_bf16(sum[1], w0.z, w1.z, w0.w, w1.w, v.z, v.w);
      }
    }
    if (t == 0) {
      sums[stretch][g] = sum[0][0] + sum[1][0];
      sums[stretch][g + 8] = sum[0][2] + sum[1][2];
    }
  }
  __syncthreads();
  float logit = 0.0f;
  if (threadIdx.x < kRows) {
    for (int stretch = 0; stretch < stretches; ++stretch) logit += sums[stretch][threadIdx.x];
  }
  __syncthreads();
  return logit;
}

// The best of the rows of this block that may be the largest.
__device__ inline Ranked rescore(const Head& p, int workers) {
  __shared__ float sums[kMaxStretches][kRows], lowest[kWarps];
  __shared__ int counts[kWarps], rows[kWarps * kChunks * kChunk + kRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float best = -INFINITY;
  for (int i = threadIdx.x; i < p.screens; i += kThreads) best = fmaxf(best, lower_of_blocks[i]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kFullMask, best, step));
  if (lane == 0) lowest[warp] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) best = fmaxf(best, lowest[w]);

  Ranked mine = kNone;
  const int chunks = int(ceil_div(p.rows, kChunk));
  for (int first = blockIdx.x; first < chunks; first += kWarps * kChunks * workers) {
    unsigned candidates[kChunks];
    int row[kChunks], count = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      row[c] = (first + (warp * kChunks + c) * workers) * kChunk + lane;
      // What cannot be excluded stays: NaN is less than nothing.
      candidates[c] = __ballot_sync(kFullMask, row[c] < p.rows && !(p.upper[min(row[c], p.rows - 1)] < best));
      count += __popc(candidates[c]);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int at = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      at += w < warp ? counts[w] : 0;
      total += counts[w];
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (candidates[c] >> lane & 1) rows[at + __popc(candidates[c] & ((1u << lane) - 1))] = row[c];
      at += __popc(candidates[c]);
    }
    __syncthreads();
    // The last tile is filled up with its last row.
    if (total > 0 && threadIdx.x < kRows) rows[total + threadIdx.x] = rows[total - 1];
    __syncthreads();
    for (int tile = 0; tile < total; tile += kRows) {
      const float logit = score_rows(p, rows + tile, sums);
      if (threadIdx.x < kRows) mine = max(mine, rank(logit, rows[tile + threadIdx.x]));
    }
    __syncthreads();
  }
  return mine;
}

__global__ void __launch_bounds__(kThreads, 1) rescore_head_kernel(const Head p) {
  __shared__ Ranked of_warps[kWarps];
  let_next_launch_start();
  wait_for_launch_before();
  const int workers = gridDim.x - 1, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (blockIdx.x < workers) {
    const Ranked mine = rescore(p, workers);
    if (warp > 0) return;
    const Ranked best = warp_best(mine);
    Ranked* to = &best_of_blocks[blockIdx.x];
    if (lane == 0) asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(best) : "memory");
    return;
  }
  Ranked best = kNone;
  if (threadIdx.x < workers) {
    Ranked* from = &best_of_blocks[threadIdx.x];
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(best) : "l"(from) : "memory");
    } while (best == 0);
    *from = 0;
  }
  __syncwarp();
  best = warp_best(best);
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = warp_best(lane < kWarps ? of_warps[lane] : kNone);
  const unsigned key = unsigned(best >> 32);
  const bool finite = key > ordered(-INFINITY) && key < ordered(INFINITY);
  if (lane == 0) *p.out = finite ? int64_t(~unsigned(best)) : -1;
}

}  // namespace

cudaError_t argmax_head(In x, In w, const uint8_t* codes, const float* scale, const float* error, const float* norm,
                        float* upper, int64_t* out, int64_t vocab, int64_t width, int64_t padded,
                        cudaStream_t stream) {
  if (x.type != Type::bf16 || w.type != Type::bf16) return cudaErrorInvalidValue;
  if (width % 8 || padded % (kAhead * kColumns) || padded < width || padded > kMaxWidth) return cudaErrorInvalidValue;
  if ((uintptr_t(x.data) | uintptr_t(w.data) | uintptr_t(codes)) % 16) return cudaErrorMisalignedAddress;
  Head p = {};
  p.x = static_cast<const bf16*>(x.data);
  p.w = static_cast<const bf16*>(w.data);
  p.codes = codes;
  p.scale = scale, p.error = error, p.norm = norm;
  p.upper = upper;
  p.out = out;
  p.rows = int(vocab), p.width = int(width), p.blocks = int(padded / kColumns);
  int processors = 0;
  cudaError_t failed = count_processors(processors);
  if (failed != cudaSuccess) return failed;
  if (processors > kMaxBlocks) processors = kMaxBlocks;
  p.screens = processors;
  failed = launch(screen_head_kernel, {.blocks = p.screens, .threads = kThreads, .overlap = true}, stream, p);
  if (failed != cudaSuccess) return failed;
  return launch(rescore_head_kernel, {.blocks = processors + 1, .threads = kThreads, .overlap = true}, stream, p);
}

}  // namespace dsv4
