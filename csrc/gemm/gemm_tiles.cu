// gemm_tiles: linear and grouped_linear of ops/gemm/reference.py for more than 32 tokens; weights of any format.
//
// y[t][n] = (sum over k of x[t][k] W[n][k]) * token_scale[t] * global_scale, in fp32, rounded once. Blocks compute
// tiles of rows x tokens (tiles.cuh), the largest that keep the device busy. 2 N K T operations: 0.55 TFLOP at 8192 x
// 4096 and 8,192 tokens; mma.sync reaches some 60 % of what the tensor cores can do by wgmma, about 500 TFLOPS on an
// H200. Tiles of 8 x 128 tokens are taken by neighbouring blocks, all rows before the next 1,024 tokens: of x what is
// being read stays in the L2 cache, and weights come from memory once for every 1,024 tokens.
// sass gemm_tiles_kernel: HMMA.16816.F32.BF16, LDGSTS.E.BYPASS.LTC128B.128, LDS.128
#include "common/launch.cuh"
#include "gemm/tiles.cuh"

namespace dsv4 {
namespace {

constexpr int kTokenTilesTogether = 8;

// 256 rows x 128 tokens: for prefill. 32 x 64 tokens a warp, of which 16 make a block.
template <Kind kind>
using LargeTile = TileShape<kind, 8, 2, 1, 8, kind == Kind::bf16 ? 1 : 2, 1>;
// 128 x 64: two blocks a multiprocessor.
template <Kind kind>
using MediumTile = TileShape<kind, 4, 2, 1, 4, kind == Kind::bf16 ? 1 : 2, 2>;
// 32 x 64: four warps divide the columns.
template <Kind kind>
using SmallTile = TileShape<kind, 1, 1, 4, 8, 4, 1>;

struct Product {
  const bf16* x;
  const uint8_t* weight;
  const void* scales;
  const float *token_scale, *global_scale;
  void* out;
  bool e8m0, f32, aligned;
  int tokens, rows, columns;  // of one group
  int row_tiles, token_tiles, groups;
  unsigned x_stride, out_stride;
};

// Which tile a block computes: token tiles in bands; in a band token tiles side by side, then row tiles, then groups.
struct Place {
  int first_token, first_row, end_row, first_column;
};
template <class S>
__device__ inline Place place_of(const Product& p, int block) {
  const int all_rows = p.row_tiles * p.groups, band = block / (kTokenTilesTogether * all_rows);
  const int first_token_tile = band * kTokenTilesTogether;
  const int together = min(kTokenTilesTogether, p.token_tiles - first_token_tile);
  const int in_band = block - band * kTokenTilesTogether * all_rows;
  const int row_tile = in_band / together, group = row_tile / p.row_tiles;
  return {(first_token_tile + in_band % together) * S::kTokens,
          group * p.rows + row_tile % p.row_tiles * S::kRows, (group + 1) * p.rows, group * p.columns};
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kPerProcessor) gemm_tiles_kernel(const __grid_constant__ Product p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ Place place;
  __shared__ TileWeight weight;
  if (threadIdx.x == 0) {
    place = place_of<S>(p, blockIdx.x);
    weight = {p.weight, p.scales, p.e8m0, p.rows * p.groups, p.columns, place.first_row};
  }
  const auto token_row = [&](int r) {
    const int token = place.first_token + r;
    return token < p.tokens ? p.x + uint64_t(p.x_stride) * unsigned(token) + place.first_column : nullptr;
  };
  compute_tile<S, S::kTilesN>(weight, memory, token_row, [&] {
    const Place at = place;
    const float by_weight = p.global_scale == nullptr ? 1.0f : *p.global_scale;
    return [=, &p](int token, int row, float (&v)[8]) {
      token += at.first_token, row += at.first_row;
      if (token >= p.tokens || row >= at.end_row) return;
      const float by_token = p.token_scale == nullptr ? 1.0f : p.token_scale[token];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * by_token * by_weight;
      store_results(p.out, p.f32, int64_t(token) * p.out_stride + row, at.end_row - row, p.aligned, v);
    };
  });
}

int64_t tiles_of(const Product& p, int rows, int tokens) {
  return ceil_div(p.rows, rows) * p.groups * ceil_div(p.tokens, tokens);
}

template <class S>
cudaError_t start(Product p, cudaStream_t stream) {
  p.row_tiles = int(ceil_div(p.rows, S::kRows));
  p.token_tiles = int(ceil_div(p.tokens, S::kTokens));
  const size_t shared = S::shared_bytes(p.columns);
  auto kernel = gemm_tiles_kernel<S>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  return launch(kernel, Grid{tiles_of(p, S::kRows, S::kTokens), S::kThreads, shared}, stream, p);
}

// The shape whose last round of tiles ends first: rounds x size, by how fast a multiprocessor is with it.
template <Kind kind>
cudaError_t start_best(const Product& p, cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  const auto cost = [&](int rows, int tokens, double slowness) {
    return double(ceil_div(tiles_of(p, rows, tokens), processors)) * rows * tokens * slowness;
  };
  const double large = cost(256, 128, 1.0), medium = cost(128, 64, 1.15), small = cost(32, 64, 2.2);
  if (large <= medium && large <= small) return start<LargeTile<kind>>(p, stream);
  if (medium <= small) return start<MediumTile<kind>>(p, stream);
  return start<SmallTile<kind>>(p, stream);
}

}  // namespace

// x [tokens, groups * columns] bf16, `x_stride` apart; weight [groups * rows, columns], packed or as stored; scales
// only of FP8, [rows / 128, columns / 128] rounded up, e8m0 or f32; token_scale [tokens]; global_scale one; out
// [tokens, groups * rows] bf16 or f32, `out_stride` apart. Rows g * rows .. (g + 1) * rows - 1 of the weight meet
// columns g * columns .. of x. columns: a multiple of 16, of 8 for bf16; x_stride: of 8; rows, of several groups: of
// 16, of 32 for FP8.
cudaError_t gemm_tiles(In x, In weight, MaybeIn scales, Maybe<const float> token_scale, Maybe<const float> global_scale,
                       Out out, int64_t kind, int64_t tokens, int64_t rows, int64_t columns, int64_t groups,
                       int64_t x_stride, int64_t out_stride, cudaStream_t stream) {
  const bool f32 = out.type == Type::f32;
  if (x.type != Type::bf16 || (!f32 && out.type != Type::bf16)) return cudaErrorInvalidValue;
  const int row_step = kind == int64_t(Kind::fp8) ? kWarpRows : kUnitRows;
  if (columns % (kind == int64_t(Kind::bf16) ? 8 : 16) || x_stride % 8) return cudaErrorInvalidValue;
  if (groups > 1 && rows % row_step) return cudaErrorInvalidValue;
  if ((uintptr_t(x.data) | uintptr_t(weight.data)) % 16) return cudaErrorMisalignedAddress;
  const bool aligned = uintptr_t(out.data) % 16 == 0 && out_stride % (f32 ? 4 : 8) == 0 && rows % 8 == 0;
  const Product p{static_cast<const bf16*>(x.data), static_cast<const uint8_t*>(weight.data), scales.data,
                  token_scale.data, global_scale.data, out.data, scales.type != Type::f32, f32, aligned, int(tokens),
                  int(rows), int(columns), 0, 0, int(groups), unsigned(x_stride), unsigned(out_stride)};
  switch (Kind(kind)) {
    case Kind::nvfp4: return start_best<Kind::nvfp4>(p, stream);
    case Kind::mxfp4: return start_best<Kind::mxfp4>(p, stream);
    case Kind::fp8: return start_best<Kind::fp8>(p, stream);
    case Kind::bf16: return start_best<Kind::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
