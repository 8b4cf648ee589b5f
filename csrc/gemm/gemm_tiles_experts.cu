// gemm_tiles_experts: one matrix of every expert times the tokens that chose it, as run_experts of ops/moe/reference.py
// does it for more tokens than experts.cuh takes; weights of any format.
//
// For the pairs p in offset[e] .. offset[e + 1] - 1 of expert e (group_by_expert):
//   out[p][n] = (sum over k of x[row(p)][k] W_e[n][k]) * token_scale[row(p)] * global_scale_e, fp32, rounded once,
// where row(p) is index[p] / slots, or p without an index. How many pairs an expert has is known on the device alone:
// every block makes a prefix sum of the numbers of tiles (tiles.cuh) and takes each gridDim-th tile; those of one
// expert are neighbours, token tiles side by side, so that its weights are read from memory once. A tile with few
// tokens multiplies fewer columns. At 8,192 tokens, 6 of 256 experts, an expert has some 192 pairs: 2 F D of 4 bits are
// read for 200 MFLOP each, and the time is that of the products.
// sass gemm_tiles_experts_kernel: HMMA.16816.F32.BF16, LDGSTS.E.BYPASS.LTC128B.128, LDS.128
#include "common/launch.cuh"
#include "gemm/tiles.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxExperts = 512;
constexpr int kMatrices = 3;   // of an expert, in the tables: w1, w3, w2
constexpr int kFewPairs = 24;  // an expert, on average: then tiles of 32 tokens

// 256 rows x 128 tokens, or 32.
template <Kind kind>
using LargeTile = TileShape<kind, 8, 2, 1, 8, kind == Kind::bf16 ? 1 : 2, 1>;
template <Kind kind>
using NarrowTile = TileShape<kind, 8, 1, 1, 4, kind == Kind::bf16 ? 1 : 2, 2>;

struct Experts {
  const bf16* x;
  const int32_t *index, *offset;
  const int64_t* addresses;    // [E, 3, 2]: a matrix, and the scales of its FP8 blocks
  const float* global_scales;  // [E, 3]
  const float* token_scale;
  void* out;
  bool e8m0, f32, aligned;
  int matrix, experts, slots, rows, columns, row_tiles;
  unsigned x_stride, out_stride;
};

// Up to kTokens pairs of one expert x rows.
struct Place {
  int expert, first_pair, pairs, first_row;
};

// before[e]: tiles of the experts before e, for e <= E. All threads; ends with a barrier.
template <class S>
__device__ inline void count_tiles(const Experts& p, int* before) {
  for (int e = threadIdx.x; e < p.experts; e += S::kThreads) {
    before[e + 1] = (p.offset[e + 1] - p.offset[e] + S::kTokens - 1) / S::kTokens * p.row_tiles;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    // A lane sums consecutive experts; what the lanes before it have is its beginning.
    const int per = (p.experts + kWarp - 1) / kWarp, first = threadIdx.x * per, end = min(first + per, p.experts);
    int sum = 0;
    for (int e = first; e < end; ++e) sum += before[e + 1];
    int total = sum;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(kFullMask, total, step);
      if (threadIdx.x >= step) total += below;
    }
    int running = total - sum;
    for (int e = first; e < end; ++e) before[e + 1] = running += before[e + 1];
    if (threadIdx.x == 0) before[0] = 0;
  }
  __syncthreads();
}

template <class S>
__device__ inline Place place_of(const Experts& p, const int* before, int tile) {
  int low = 0, high = p.experts;  // before[low] <= tile < before[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (before[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int in_expert = tile - before[low], token_tiles = (before[low + 1] - before[low]) / p.row_tiles;
  const int first_pair = p.offset[low] + in_expert % token_tiles * S::kTokens;
  return {low, first_pair, min(p.offset[low + 1] - first_pair, S::kTokens), in_expert / token_tiles * S::kRows};
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kPerProcessor)
    gemm_tiles_experts_kernel(const __grid_constant__ Experts p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ int before[kMaxExperts + 1];
  __shared__ int rows[S::kTokens];  // of x, -1 past the last pair
  __shared__ Place place;
  __shared__ TileWeight weight;
  __shared__ int tile;
  count_tiles<S>(p, before);
  if (threadIdx.x == 0) tile = blockIdx.x;
  __syncthreads();
#pragma unroll 1
  while (tile < before[p.experts]) {
    if (threadIdx.x == 0) {
      place = place_of<S>(p, before, tile);
      const int64_t* address = p.addresses + (place.expert * kMatrices + p.matrix) * 2;
      weight = {reinterpret_cast<const uint8_t*>(address[0]), reinterpret_cast<const void*>(address[1]), p.e8m0, p.rows,
                p.columns, place.first_row};
    }
    __syncthreads();
    if (threadIdx.x < S::kTokens) {
      const int pair = place.first_pair + threadIdx.x;
      rows[threadIdx.x] = threadIdx.x >= place.pairs ? -1 : p.index == nullptr ? pair : p.index[pair] / p.slots;
    }
    const auto token_row = [&](int r) {
      const int row = rows[r];
      return row < 0 ? nullptr : p.x + uint64_t(p.x_stride) * unsigned(row);
    };
    const auto make_store = [&] {
      const Place at = place;
      const float by_weight = S::kKind == Kind::nvfp4 ? p.global_scales[at.expert * kMatrices + p.matrix] : 1.0f;
      return [&, at, by_weight](int token, int row, float (&v)[8]) {
        row += at.first_row;
        if (token >= at.pairs || row >= p.rows) return;
        const float by_token = p.token_scale == nullptr ? 1.0f : p.token_scale[rows[token]];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = v[i] * by_token * by_weight;
        store_results(p.out, p.f32, int64_t(at.first_pair + token) * p.out_stride + row, p.rows - row, p.aligned, v);
      };
    };
    // The columns that each warp multiplies: all, three quarters, half or a quarter of a tile's.
    const int quarters = (place.pairs + S::kTokens / 4 - 1) / (S::kTokens / 4);
    if (quarters == 4) {
      compute_tile<S, S::kTilesN>(weight, memory, token_row, make_store);
    } else if (quarters == 3) {
      compute_tile<S, S::kTilesN * 3 / 4>(weight, memory, token_row, make_store);
    } else if (quarters == 2) {
      compute_tile<S, S::kTilesN / 2>(weight, memory, token_row, make_store);
    } else {
      compute_tile<S, S::kTilesN / 4>(weight, memory, token_row, make_store);
    }
    __syncthreads();
    if (threadIdx.x == 0) tile += gridDim.x;
    __syncthreads();
  }
}

template <class S>
cudaError_t start(Experts p, int64_t pairs, cudaStream_t stream) {
  p.row_tiles = int(ceil_div(p.rows, S::kRows));
  int processors = 0;
  cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  // No more tiles than this: each expert may have one that is not full.
  const int64_t most = (pairs / S::kTokens + (pairs < p.experts ? pairs : p.experts)) * p.row_tiles;
  const int64_t at_once = processors * S::kPerProcessor;
  const size_t shared = S::shared_bytes(p.columns);
  auto kernel = gemm_tiles_experts_kernel<S>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  return launch(kernel, Grid{most < at_once ? most : at_once, S::kThreads, shared}, stream, p);
}

template <Kind kind>
cudaError_t start_for(const Experts& p, int64_t pairs, cudaStream_t stream) {
  if (pairs <= int64_t(kFewPairs) * p.experts) return start<NarrowTile<kind>>(p, pairs, stream);
  return start<LargeTile<kind>>(p, pairs, stream);
}

}  // namespace

// x [rows of x, columns] bf16, `x_stride` apart; index [pairs] i32 or null; offset [experts + 1] i32, from 0 to pairs;
// addresses [experts, 3, 2], global_scales [experts, 3] (read of NVFP4 alone), token_scale [rows of x] or null;
// out [pairs, rows], `out_stride` apart, bf16 or f32. `matrix` is 0 for w1, 1 for w3, 2 for w2. columns: a multiple of
// 16, of 8 for bf16; x_stride: of 8.
cudaError_t gemm_tiles_experts(In x, Maybe<const int32_t> index, const int32_t* offset, const int64_t* addresses,
                               const float* global_scales, Maybe<const float> token_scale, Out out, int64_t kind,
                               bool e8m0, int64_t matrix, int64_t pairs, int64_t experts, int64_t slots, int64_t rows,
                               int64_t columns, int64_t x_stride, int64_t out_stride, cudaStream_t stream) {
  const bool f32 = out.type == Type::f32;
  if (x.type != Type::bf16 || (!f32 && out.type != Type::bf16)) return cudaErrorInvalidValue;
  if (columns % (kind == int64_t(Kind::bf16) ? 8 : 16) || x_stride % 8 || experts > kMaxExperts) {
    return cudaErrorInvalidValue;
  }
  if (uintptr_t(x.data) % 16) return cudaErrorMisalignedAddress;
  const bool aligned = uintptr_t(out.data) % 16 == 0 && out_stride % (f32 ? 4 : 8) == 0;
  const Experts p{static_cast<const bf16*>(x.data), index.data, offset, addresses, global_scales, token_scale.data,
                  out.data, e8m0, f32, aligned, int(matrix), int(experts), int(slots), int(rows), int(columns), 0,
                  unsigned(x_stride), unsigned(out_stride)};
  switch (Kind(kind)) {
    case Kind::nvfp4: return start_for<Kind::nvfp4>(p, pairs, stream);
    case Kind::mxfp4: return start_for<Kind::mxfp4>(p, pairs, stream);
    case Kind::fp8: return start_for<Kind::fp8>(p, pairs, stream);
    case Kind::bf16: return start_for<Kind::bf16>(p, pairs, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
