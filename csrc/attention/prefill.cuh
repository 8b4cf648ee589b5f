// What both forms of attend share: the list of rows that a query attends to, softmax in powers of two, the output.
//
// A query's list is the rows of its window, oldest first, and then its compressed entries, ascending. Its number n is
// known before the first tile, so that row e of the list takes part if and only if e < n.
#pragma once

#include "common/device.cuh"
#include "common/rotary.cuh"

namespace dsv4 {

constexpr int kWidth = 512;         // Dh
constexpr int kRotaryPairs = 32;    // Dr / 2: the last pairs of a row
constexpr int kRowBytes = 2 * kWidth;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kScale = 0.044194173824159216f * kLog2e;  // Dh^-0.5, for powers of two instead of e

// Consecutive queries. q and out [tokens, heads, 512]; window_kv [before + tokens, 512]: row before + t is query t's
// own; compressed [entries, 512], of which query t attends to those below visible[t], or to selected[t], of which
// there are top_k, -1s last.
struct Chunk {
  const bf16 *q, *window_kv, *compressed;
  const float* sink;
  const int64_t* positions;
  const float* inv_freq;
  const int64_t* visible;
  const int32_t* selected;
  bf16* out;
  int tokens, heads, before, window, entries, top_k;
};

// The launchers' arguments as a chunk, or what is wrong with them.
inline cudaError_t make_chunk(In q, In window_kv, const float* sink, const int64_t* positions, const float* inv_freq,
                              MaybeIn compressed, Maybe<const int64_t> visible, Maybe<const int32_t> selected, Out out,
                              int64_t tokens, int64_t heads, int64_t before, int64_t window, int64_t entries,
                              int64_t top_k, Chunk& chunk) {
  if (q.type != Type::bf16 || window_kv.type != Type::bf16 || out.type != Type::bf16) return cudaErrorInvalidValue;
  if (compressed.data != nullptr && compressed.type != Type::bf16) return cudaErrorInvalidValue;
  if (tokens < 1 || heads < 1 || before < 0 || window < 1) return cudaErrorInvalidValue;
  // Entries are chosen in one way.
  if (compressed.data == nullptr ? visible.data || selected.data : !visible.data == !selected.data) {
    return cudaErrorInvalidValue;
  }
  const uintptr_t addresses = uintptr_t(q.data) | uintptr_t(window_kv.data) | uintptr_t(compressed.data);
  if ((addresses | uintptr_t(out.data)) % 16) return cudaErrorMisalignedAddress;
  chunk = {static_cast<const bf16*>(q.data), static_cast<const bf16*>(window_kv.data),
           static_cast<const bf16*>(compressed.data), sink, positions, inv_freq, visible.data, selected.data,
           static_cast<bf16*>(out.data), int(tokens), int(heads), int(before), int(window), int(entries), int(top_k)};
  return cudaSuccess;
}

// The list of one query.
struct List {
  const int32_t* selected;  // of this query, or null
  int first_row;            // of window_kv
  int in_window, count;     // rows of the window; all rows
};

// How many of the query's choices are not -1. All lanes of a warp together.
__device__ inline int count_selected(const int32_t* selected, int top_k) {
  const int lane = threadIdx.x % kWarp, step = (top_k + kWarp - 1) / kWarp;
  const int begin = step * lane;
  const int begun = __popc(__ballot_sync(kFullMask, begin < top_k && selected[begin] >= 0));
  if (begun == 0) return 0;
  const int first = step * (begun - 1);
  int count = first;
  for (int i = lane; i - lane < step; i += kWarp) {
    const bool chosen = i < step && first + i < top_k && selected[first + i] >= 0;
    count += __popc(__ballot_sync(kFullMask, chosen));
  }
  return count;
}

// All lanes of a warp together.
__device__ inline List list_of(const Chunk& c, int token) {
  const int own = c.before + token, first_row = max(0, own - c.window + 1), in_window = own - first_row + 1;
  if (c.selected != nullptr) {
    const int32_t* selected = c.selected + int64_t(token) * c.top_k;
    return {selected, first_row, in_window, in_window + count_selected(selected, c.top_k)};
  }
  const int seen = c.visible == nullptr ? 0 : int(min(c.visible[token], int64_t(c.entries)));
  return {nullptr, first_row, in_window, in_window + max(seen, 0)};
}

// Row e of the list, or null from its end on.
__device__ inline const bf16* row_of(const Chunk& c, const List& list, int e) {
  if (e >= list.count) return nullptr;
  if (e < list.in_window) return c.window_kv + int64_t(list.first_row + e) * kWidth;
  int entry = e - list.in_window;
  if (list.selected != nullptr) entry = list.selected[entry];
  return c.compressed + int64_t(entry) * kWidth;
}
// The same, known to lane `from` of the warp.
__device__ inline const bf16* row_of_lane(const bf16* row, int from) {
  return reinterpret_cast<const bf16*>(__shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(row), from));
}

// 2^x, to 2^-22; 0 below 2^-126.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

// Over the four lanes that share a row.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

// Lane t of four gets the words w[t] of all four, in their order.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t given = __shfl_xor_sync(kFullMask, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? given : w[i], w[i + 1] = odd ? w[i + 1] : given;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t given = __shfl_xor_sync(kFullMask, high ? w[i] : w[i + 2], 2);
    w[i] = high ? given : w[i], w[i + 2] = high ? w[i + 2] : given;
  }
}

// Store a lane's share of two rows, 8 kTiles columns from `to[0]` and `to[1]` on, null for a row that does not exist:
// sums d[4 j + 2 r], d[4 j + 2 r + 1] of columns 8 j + 2 t, + 1 of row r, times factor[r]. With `angles`, the last 64
// columns are turned back by those. Whole warps; lanes change values so that each stores 16 bytes.
template <int kTiles>
__device__ inline void store_output(const float (&d)[4 * kTiles], const float (&factor)[2], bf16* const (&to)[2],
                                    const float2* angles) {
  constexpr int kFirstTurned = kTiles - 2 * kRotaryPairs / 8;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int group = 0; group < kTiles; group += 4) {
    float2 angle[4];
    if (group >= kFirstTurned && angles != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) angle[i] = angles[4 * (group - kFirstTurned + i) + t];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (group + i) + 2 * r;
        float2 pair = make_float2(d[at] * factor[r], d[at + 1] * factor[r]);
        if (group >= kFirstTurned && angles != nullptr) pair = rotate(pair, make_float2(angle[i].x, -angle[i].y));
        words[i] = pack_bf16(pair.x, pair.y);
      }
      transpose_quad(words);
      if (to[r] == nullptr) continue;
      store_octet(to[r] + 8 * (group + t), Pairs{{words[0], words[1], words[2], words[3]}});
    }
  }
}

}  // namespace dsv4
