// mhc_boundary, mhc_pre and mhc_head of ops/mhc/reference.py for many bf16 tokens: two launches.
//
// mhc_dots: a block keeps the bf16 parts of fn (dots.cuh) of its columns, at most 256, in shared memory for the whole
// launch, and walks over tiles of 32 tokens. Eight warps share 16 tokens, one chunk of 32 columns each: they make X'
// (post), store it, and multiply it from the registers that hold it, with the next tile under way. fn is the A operand:
// a lane's octet of a token is a B operand as it lies. Sums of a block's chunks meet in shared memory, in ascending
// order, and go to `partial`.
// mhc_finish: 64 or 128 threads a token (mixes.cuh).
//
// Bytes a token in bf16: y, X, X' and u, 20 D, each once; the sums, 100 bytes a block of columns, stay in L2.
// sass mhc_dots_kernel: HMMA.16816.F32.BF16, LDG.E.128, LDS.128, STS.128
// sass mhc_finish_kernel: LDG.E.128, STG.E.128
#include "mhc/dots.cuh"
#include "mhc/launch.cuh"
#include "mhc/mixes.cuh"

namespace dsv4 {
namespace {

constexpr int kChunks = 8;    // of a block: at most 256 columns
constexpr int kGroups = 2;    // of 16 tokens
constexpr int kTile = 16 * kGroups;
constexpr int kGroupThreads = kChunks * kWarp;
constexpr int kSlice = 4096;  // tokens of a pair of launches, for which the caller provides `partial`
constexpr int kFinishBlocks = DSV4_ARCH == 90 ? 2 : 1;  // of mhc_finish on a processor; on sm_100a two would spill

constexpr int kOperands = 5;  // 16-row A operands that hold the three parts of 24 rows

// Dynamic shared memory of mhc_dots_kernel.
struct DotsShared {
  // fn as A operands of the MMA over columns 8 t + 4 s .. 8 t + 4 s + 3: rows 0 to 15 of each part, then rows 16 to 23
  // of parts 0 and 1, then of part 2 and zeros.
  uint4 fn[kChunks][kStreams][2][kOperands][kWarp];
  // Double buffers: one barrier a tile.
  float mixing[2][kGroups][16][kCoefficients];  // post and comb of the sublayer that ends
  float sums[2][kGroups][kChunks][16][kSums];
};

template <bool kPost>
__global__ void __launch_bounds__(kGroups * kGroupThreads, 1) mhc_dots_kernel(const Tensors<bf16> p, const Sizes n) {
  extern __shared__ __align__(16) unsigned char memory[];
  DotsShared& shared = *reinterpret_cast<DotsShared*>(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group = warp / kChunks, chunk = warp % kChunks, member = threadIdx.x % kGroupThreads;
  const int split = blockIdx.x % n.splits, walkers = gridDim.x / n.splits;
  const int local = chunk * kChunk + 8 * t, column = split * n.columns + local;
  const bool inside = local < n.columns && column < n.hidden;
  const int chunks = int(ceil_div(n.columns, kChunk));

  // The two groups share the work of splitting fn. A row that does not exist, or columns outside, count as zeros.
  Vector<float, 8> rows[kStreams / kGroups][kRowTiles];
#pragma unroll
  for (int i = 0; i < kStreams / kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const int64_t row = min(8 * j + g, n.rows - 1), k = kStreams / kGroups * group + i;
      rows[i][j] = load_vector<8>(p.fn + (row * kStreams + k) * n.hidden + (inside ? column : 0));
    }
  }
#pragma unroll
  for (int i = 0; i < kStreams / kGroups; ++i) {
    const int k = kStreams / kGroups * group + i;
    Pairs parts[kRowTiles][kParts];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (!inside || 8 * j + g >= n.rows) rows[i][j] = {};
      split_octet(rows[i][j], parts[j]);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      auto operand = [&](int index, const Pairs& rows, const Pairs& rows_below) {
        shared.fn[chunk][k][s][index][lane] = make_uint4(rows.pair[2 * s], rows_below.pair[2 * s],
                                                         rows.pair[2 * s + 1], rows_below.pair[2 * s + 1]);
      };
#pragma unroll
      for (int part = 0; part < kParts; ++part) operand(part, parts[0][part], parts[1][part]);
      operand(3, parts[2][0], parts[2][1]);
      operand(4, parts[2][2], Pairs{});
    }
  }

  // What a lane reads of a tile: octets of tokens g and g + 8. A token or column past the end stands for the last one:
  // loads need no branch, nothing of it is stored, and fn is zero in columns outside.
  auto token_of = [&](int64_t tile, int i) { return min(tile * kTile + 16 * group + i, int64_t(n.tokens - 1)); };
  const int at_column = inside ? column : 0;
  auto load_tile = [&](Pairs(&x)[2][kStreams], Pairs(&y)[2], int64_t tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = token_of(tile, g + 8 * i);
      const bf16* at = p.x + token * kStreams * n.hidden + at_column;
#pragma unroll
      for (int k = 0; k < kStreams; ++k) x[i][k] = load_octet(at + k * n.hidden);
      if constexpr (kPost) y[i] = load_octet(p.y + token * n.hidden + at_column);
    }
  };
  auto load_mixing = [&](int64_t tile, int buffer) {
    if (kPost && member < 16 * (1 + kStreams)) {
      const int i = member / (1 + kStreams), row = member % (1 + kStreams);
      const int64_t token = token_of(tile, i);
      const float* from = row == 0 ? p.post + token * kStreams : p.comb + (token * kStreams + row - 1) * kStreams;
      copy_async_16(&shared.mixing[buffer][group][i][4 * row], from, true);
    }
  };

  int64_t tile = blockIdx.x / n.splits;
  const int64_t tiles = ceil_div(n.tokens, kTile);
  Pairs x[2][kStreams], y[2];
  load_tile(x, y, tile);
  load_mixing(tile, 0);
  wait_async_copies();
  __syncthreads();

  for (int buffer = 0; tile < tiles; tile += walkers, buffer ^= 1) {
    const int64_t first = tile * kTile + 16 * group;
    Pairs made[2][kStreams];
    float squares[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kPost) {
        float c[kCoefficients];
        const float* mixing = shared.mixing[buffer][group][g + 8 * i];
        load_coefficients(c, mixing, mixing + kStreams);
        mix_streams(c, y[i], x[i]);
      }
#pragma unroll
      for (int k = 0; k < kStreams; ++k) {
        made[i][k] = x[i][k];
        squares[i] += inside ? square_sum(made[i][k]) : 0.0f;
      }
      if (kPost && inside && first + g + 8 * i < n.tokens) {
        bf16* at = p.x_out + (first + g + 8 * i) * kStreams * n.hidden + column;
#pragma unroll
        for (int k = 0; k < kStreams; ++k) store_octet(at + k * n.hidden, made[i][k]);
      }
    }
    // The next tile is on its way while this one is multiplied.
    if (tile + walkers < tiles) {
      load_tile(x, y, tile + walkers);
      load_mixing(tile + walkers, buffer ^ 1);
    }

    float upper[2][4] = {}, lower[2][4] = {};  // rows 0 to 15; rows 16 to 23 as two addends
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int index = kOperands - 1; index >= 0; --index) {  // of each sum, the smallest products first
          const uint4 a = shared.fn[chunk][k][s][index][lane];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t* b = made[i][k].pair + 2 * s;
            mma_bf16(index < kParts ? upper[i] : lower[i], a.x, a.y, a.z, a.w, b[0], b[1]);
          }
        }
      }
    }

    // Accumulator e: row g + 8 (e / 2), token 2 t + e % 2.
    float(*sums)[kSums] = shared.sums[buffer][group][chunk];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[8 * i + 2 * t + e % 2][g + 8 * (e / 2)] = upper[i][e];
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[8 * i + 2 * t + e][16 + g] = lower[i][e] + lower[i][e + 2];
      float square = squares[i];
      square += __shfl_xor_sync(kFullMask, square, 1);
      square += __shfl_xor_sync(kFullMask, square, 2);
      if (t == 0) sums[g + 8 * i][kMixes] = square;
    }
    wait_async_copies();
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroupThreads) : "memory");
    // Sixteen threads a token add the chunks in ascending order.
    const int of = member / 16;
    if (first + of < n.tokens) {
      float* to = p.partial + ((first + of) * n.splits + split) * kSums;
#pragma unroll
      for (int r = member % 16; r < 32; r += 16) {
        float sum = 0.0f;
        if (r < kSums) {
          for (int c = 0; c < chunks; ++c) sum += shared.sums[buffer][group][c][of][r];
          to[r] = sum;
        }
      }
    }
  }
}

template <int kThreads>  // a token
__global__ void __launch_bounds__(kWorkers + kWarp, kFinishBlocks)
    mhc_finish_kernel(const Tensors<bf16> p, const Sizes n, const bf16* streams) {
  auto load = [&](Pairs(&x)[kStreams], int64_t token, int column) {
    const bf16* at = streams + token * kStreams * n.hidden + column;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) x[k] = load_octet(at + k * n.hidden);
  };
  auto add = [&](int64_t token, int from, int count, int lane) {
    const float* at = p.partial + (token * n.splits + from) * kSums + min(lane, kMixes);
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < count; ++i) sum += at[i * kSums];
    return sum;
  };
  finish_tokens<bf16, kThreads, 8, 2>(p, n, int64_t(blockIdx.x) * (kWorkers / kThreads), load, add);
}

template <bool kPost>
cudaError_t launch_dots(const Tensors<bf16>& tensors, const Sizes& sizes, int processors, cudaStream_t stream) {
  auto* kernel = mhc_dots_kernel<kPost>;
  static cudaError_t ready =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(DotsShared));
  if (ready != cudaSuccess) return ready;
  int64_t tiles = ceil_div(sizes.tokens, kTile), walkers = processors / sizes.splits;
  walkers = walkers < 1 ? 1 : walkers < tiles ? walkers : tiles;
  kernel<<<unsigned(walkers * sizes.splits), kGroups * kGroupThreads, sizeof(DotsShared), stream>>>(tensors, sizes);
  return cudaGetLastError();
}

template <int kThreads>
cudaError_t launch_finish(const Tensors<bf16>& tensors, const Sizes& sizes, cudaStream_t stream) {
  const bf16* streams = tensors.y != nullptr ? tensors.x_out : tensors.x;
  unsigned blocks = unsigned(ceil_div(sizes.tokens, kWorkers / kThreads));
  mhc_finish_kernel<kThreads><<<blocks, kWorkers + kWarp, 0, stream>>>(tensors, sizes, streams);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_prefill(Tensors<bf16> tensors, Sizes sizes, cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  for (int64_t first = 0, tokens = sizes.tokens; first < tokens; first += kSlice) {
    const Tensors<bf16> slice = tensors.from(first, sizes.hidden);
    sizes.tokens = int(tokens - first < kSlice ? tokens - first : kSlice);
    error = tensors.y != nullptr ? launch_dots<true>(slice, sizes, processors, stream)
                                 : launch_dots<false>(slice, sizes, processors, stream);
    if (error != cudaSuccess) return error;
    error = sizes.hidden <= 64 * 64 ? launch_finish<64>(slice, sizes, stream) : launch_finish<128>(slice, sizes, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
