// route_topk, route_hash: ops/router/reference.py for up to 8 bf16 tokens: from x to weights and experts in one launch.
//
// The gate's weights are what moves: 2.1 MB in bf16 at Flash (256 experts of 4096), 5.5 MB at Pro, a quarter of that in
// NVFP4. Up to 128 blocks take a tile of 16 experts and a part of the columns each. The warps of a block multiply
// blocks of 64 columns with all tokens, the warps' sums are added in shared memory, and the block sends 16 sums a
// token. One more block a token waits for them, a thread an expert: it adds the parts in ascending order and scores,
// and its first warp chooses (choose.cuh). A sum's order depends on the shape of the gate alone: a token's result has
// the same bits beside any other seven.
// Sums travel in `sums_of_blocks` without fences, counters or flags: a word there is zero until its sum arrives (a sum
// of zero arrives as -0.0), whoever waits for it polls the word itself, and makes it zero again. The blocks that wait
// are at most 8 and wait for blocks that wait for nobody, so nothing that runs beside can keep them from ending.
//
// Launches overlap (common/overlap.cuh): weights and bias are constants, read before the wait for the launch before.
//
// Floor at one token, D = 4096, bf16: 2.1 MB, 0.5 us. Expected 3.5 us: launch 1.0, x 0.5, products and reduction 0.2, a
// store and a load through L2 0.8, score 0.1, six rounds of the choice 0.3, weights 0.1.
// sass route_kernel: HMMA.16816.F32.BF16, LDG.E.128
#include "common/launch.cuh"
#include "common/overlap.cuh"
#include "gemm/units.cuh"
#include "router/choose.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxTokens = 8, kMaxSplits = 8, kMaxExperts = 512, kMaxChoice = kWarp;
constexpr int kWorkerBlocks = 128;
constexpr int kColumns = 64;      // that four MMA steps multiply
constexpr int kMmas = 4;
constexpr int kBatch = 2;         // blocks of 64 columns whose weights a warp has under way
constexpr int kTokenStride = 20;  // floats between the sums of two tokens: no two lanes of a warp share a bank

struct Route {
  const bf16* x;                  // [T, D]
  const float* token_scale;       // [T] or null
  const uint8_t* weight;          // [E, D] bf16, or packed NVFP4
  const float* weight_scale;      // [], NVFP4 only
  const float* bias;              // [E]; null where the table chooses
  const int64_t *ids, *table;     // [T], [V, K]; null where scores choose
  float* weights;                 // [T, K]
  int64_t* experts;               // [T, K]
  int tokens, num_experts, width, top_k;
  int tiles, splits;              // of 16 experts, of the columns: a block of the launch has one of each
  int blocks;                     // of 64 columns, of a split
  float scale;
};

// Zero between launches. Launches that use it must not run at the same time.
__device__ float sums_of_blocks[kMaxTokens][kMaxSplits][kMaxExperts];

__device__ inline void send(float* to, float sum) {
  const uint32_t bits = sum == 0.0f ? 0x80000000u : __float_as_uint(sum);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

// The sum of the parts of one logit, in ascending order.
__device__ inline float receive(float* from, int splits) {
  uint32_t bits[kMaxSplits];
  bool waiting = true;
  while (waiting) {
    waiting = false;
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      bits[s] = 0x80000000u;
      if (s < splits) {
        const float* part = from + s * kMaxExperts;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits[s]) : "l"(part) : "memory");
      }
    }
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) waiting |= bits[s] == 0;
  }
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    if (s < splits) from[s * kMaxExperts] = 0.0f;
    sum += __uint_as_float(bits[s]);
  }
  return sum;
}

// A lane's weights of one block of 64 columns of a row tile, and the columns of x that belong to them: `near` .. + 7
// and `far` .. + 7. A row of bf16 is read in whole sectors, eight columns a lane from either half of the block.
template <Kind kind>
struct Weights {
  static constexpr int kParts = kind == Kind::bf16 ? 4 : 1;
  uint4 parts[kParts];
  uint32_t scales;

  static __device__ int near(int t) { return (kind == Kind::bf16 ? 8 : 16) * t; }
  static __device__ int far(int t) { return near(t) + (kind == Kind::bf16 ? 32 : 8); }

  __device__ void load(const Route& p, int tile, int block, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (kind == Kind::bf16) {
      const bf16* weight = reinterpret_cast<const bf16*>(p.weight);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int row = min(tile * kUnitRows + g + part % 2 * 8, p.num_experts - 1);
        const int column = block * kColumns + (part / 2 ? far(t) : near(t));
        const bf16* from = weight + int64_t(row) * p.width + column;
        parts[part] = {};
        if (column < p.width) parts[part] = __ldg(reinterpret_cast<const uint4*>(from));
      }
    } else {
      constexpr int kBlocks = unit_columns(kind) / kColumns;
      const int units = int(ceil_div(p.width, unit_columns(kind)));
      const uint8_t* unit = p.weight + (int64_t(tile) * units + block / kBlocks) * unit_bytes(kind);
      const int piece = block % kBlocks;
      parts[0] = __ldg(reinterpret_cast<const uint4*>(unit + piece * kPieceBytes) + lane);
      scales = __ldg(reinterpret_cast<const uint16_t*>(unit + kPieces * kPieceBytes + 8 * lane) + piece);
    }
  }

  // Operands of the four MMA steps of the block: two multiply the columns from `near` on, two those from `far` on.
  __device__ void unpack(uint32_t (&a)[kMmas][4]) const {
    if constexpr (kind == Kind::bf16) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 &upper = parts[2 * half], &lower = parts[2 * half + 1];
        a[2 * half][0] = upper.x, a[2 * half][1] = lower.x, a[2 * half][2] = upper.y, a[2 * half][3] = lower.y;
        a[2 * half + 1][0] = upper.z, a[2 * half + 1][1] = lower.z;
        a[2 * half + 1][2] = upper.w, a[2 * half + 1][3] = lower.w;
      }
    } else {
      const ScalePair s = unpack_e4m3(scales);
      unpack_nvfp4_bf16(parts[0].x, s, a[0]);
      unpack_nvfp4_bf16(parts[0].y, s, a[1]);
      unpack_nvfp4_bf16(parts[0].z, s, a[2]);
      unpack_nvfp4_bf16(parts[0].w, s, a[3]);
    }
  }
};

// The sums of one block of the launch: a row tile, a part of the columns.
template <Kind kind, int kThreads>
__device__ void sum_columns(const Route& p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float partial[kWarps][kMaxTokens * kTokenStride];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int tile = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int first = split * p.blocks + warp;
  const int end = min((split + 1) * p.blocks, int(ceil_div(p.width, kColumns)));

  Weights<kind> weights[kBatch];
  auto load_weights = [&](int base) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (base + j * kWarps < end) weights[j].load(p, tile, base + j * kWarps, lane);
    }
  };
  load_weights(first);
  wait_for_launch_before();

  float sum[kMmas][4] = {};  // of each MMA step, so that none waits for another
  for (int base = first; base < end; base += kBatch * kWarps) {
    if (base != first) load_weights(base);
    uint4 near[kBatch], far[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int column = (base + j * kWarps) * kColumns;
      const int there[2] = {column + Weights<kind>::near(t), column + Weights<kind>::far(t)};
      const bool valid = base + j * kWarps < end && g < p.tokens;
      const bf16* row = p.x + int64_t(g) * p.width;
      near[j] = far[j] = {};
      if (valid && there[0] < p.width) near[j] = *reinterpret_cast<const uint4*>(row + there[0]);
      if (valid && there[1] < p.width) far[j] = *reinterpret_cast<const uint4*>(row + there[1]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (base + j * kWarps < end) {
        uint32_t a[kMmas][4];
        weights[j].unpack(a);
        mma_bf16(sum[0], a[0][0], a[0][1], a[0][2], a[0][3], near[j].x, near[j].y);
        mma_bf16(sum[1], a[1][0], a[1][1], a[1][2], a[1][3], near[j].z, near[j].w);
        mma_bf16(sum[2], a[2][0], a[2][1], a[2][2], a[2][3], far[j].x, far[j].y);
        mma_bf16(sum[3], a[3][0], a[3][1], a[3][2], a[3][3], far[j].z, far[j].w);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int token = 2 * t + e % 2, row = g + e / 2 * 8;
    if (token < p.tokens) partial[warp][token * kTokenStride + row] = (sum[0][e] + sum[1][e]) + (sum[2][e] + sum[3][e]);
  }
  __syncthreads();
  const int token = threadIdx.x / kUnitRows, row = threadIdx.x % kUnitRows;
  if (token < p.tokens && tile * kUnitRows + row < p.num_experts) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w][token * kTokenStride + row];
    send(&sums_of_blocks[token][split][tile * kUnitRows + row], total);
  }
}

// One token's choice and weights, a thread an expert.
template <Kind kind, int kThreads>
__device__ void finish_token(const Route& p, int token) {
  __shared__ float scores[kThreads];
  __shared__ alignas(16) unsigned keys[kThreads];
  const int expert = threadIdx.x, lane = threadIdx.x % kWarp;
  const bool real = expert < p.num_experts;
  const float bias = real && p.bias != nullptr ? p.bias[expert] : 0.0f;
  const float weight_scale = p.weight_scale != nullptr ? *p.weight_scale : 1.0f;
  wait_for_launch_before();
  const float token_scale = p.token_scale != nullptr ? p.token_scale[token] : 1.0f;
  int mine = 0;  // the choice number `lane`
  if (p.table != nullptr && threadIdx.x < p.top_k) mine = int(p.table[p.ids[token] * p.top_k + lane]);
  unsigned key = 0;
  if (real) {
    const float sum = receive(&sums_of_blocks[token][0][expert], p.splits) * unit_factor_bf16(kind);
    const float s = score(sum * token_scale * weight_scale);
    scores[expert] = s;
    key = key_of(s, bias);
  }
  keys[expert] = key;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;

  if (p.table == nullptr) {
    Keys<kThreads / kWarp> left(keys);
    for (int k = 0; k < p.top_k; ++k) {
      const int chosen = left.take();
      mine = k == lane ? chosen : mine;
    }
  }
  const float s = lane < p.top_k ? scores[mine] : 0.0f;
  float sum = 0.0f;
#pragma unroll 1
  for (int first = 0; first < p.top_k; first += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += __shfl_sync(kFullMask, s, first + k);
  }
  if (lane < p.top_k) {
    p.weights[token * p.top_k + lane] = s / sum * p.scale;
    p.experts[token * p.top_k + lane] = mine;
  }
}

template <Kind kind, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const Route p) {
  let_next_launch_start();
  const int workers = p.tiles * p.splits;
  if (blockIdx.x < workers) {
    sum_columns<kind, kThreads>(p);
  } else {
    finish_token<kind, kThreads>(p, blockIdx.x - workers);
  }
}

cudaError_t route(Route p, In x, In weight, int64_t tokens, int64_t num_experts, int64_t width, int64_t top_k,
                  double scale, cudaStream_t stream) {
  const bool packed = weight.type == Type::u8;
  if (x.type != Type::bf16 || (!packed && weight.type != Type::bf16)) return cudaErrorInvalidValue;
  if (packed != (p.weight_scale != nullptr) || width % 8 || (packed && width % 16)) return cudaErrorInvalidValue;
  if (tokens > kMaxTokens || num_experts > kMaxExperts || top_k > kMaxChoice) return cudaErrorInvalidValue;
  if ((uintptr_t(x.data) | uintptr_t(weight.data)) % 16) return cudaErrorMisalignedAddress;
  p.x = static_cast<const bf16*>(x.data);
  p.weight = static_cast<const uint8_t*>(weight.data);
  p.tokens = int(tokens);
  p.num_experts = int(num_experts);
  p.width = int(width);
  p.top_k = int(top_k);
  p.scale = float(scale);
  p.tiles = int(ceil_div(num_experts, kUnitRows));
  const int blocks = int(ceil_div(width, kColumns)), splits = kWorkerBlocks / p.tiles;
  p.blocks = int(ceil_div(blocks, splits < kMaxSplits ? splits : kMaxSplits));
  p.splits = int(ceil_div(blocks, p.blocks));
  auto start = [&](auto kernel, int threads) {
    const Grid grid = {.blocks = p.tiles * p.splits + tokens, .threads = threads, .overlap = true};
    return launch(kernel, grid, stream, p);
  };
  auto start_kind = [&](auto small, auto middle, auto large) {  // Flash has 256 experts, Pro 384
    return num_experts <= 256 ? start(small, 256) : num_experts <= 384 ? start(middle, 384) : start(large, 512);
  };
  constexpr Kind kNvfp4 = Kind::nvfp4, kBf16 = Kind::bf16;
  if (packed) return start_kind(route_kernel<kNvfp4, 256>, route_kernel<kNvfp4, 384>, route_kernel<kNvfp4, 512>);
  return start_kind(route_kernel<kBf16, 256>, route_kernel<kBf16, 384>, route_kernel<kBf16, 512>);
}

}  // namespace

cudaError_t route_topk(In x, Maybe<const float> token_scale, In weight, Maybe<const float> weight_scale,
                       const float* bias, float* weights, int64_t* experts, int64_t tokens, int64_t num_experts,
                       int64_t width, int64_t top_k, double scale, cudaStream_t stream) {
  Route p = {.token_scale = token_scale.data, .weight_scale = weight_scale.data, .bias = bias};
  p.weights = weights;
  p.experts = experts;
  return route(p, x, weight, tokens, num_experts, width, top_k, scale, stream);
}

cudaError_t route_hash(In x, Maybe<const float> token_scale, In weight, Maybe<const float> weight_scale,
                       const int64_t* token_ids, const int64_t* tid2eid, float* weights, int64_t* experts,
                       int64_t tokens, int64_t num_experts, int64_t width, int64_t top_k, double scale,
                       cudaStream_t stream) {
  Route p = {.token_scale = token_scale.data, .weight_scale = weight_scale.data};
  p.ids = token_ids;
  p.table = tid2eid;
  p.weights = weights;
  p.experts = experts;
  return route(p, x, weight, tokens, num_experts, width, top_k, scale, stream);
}

}  // namespace dsv4
