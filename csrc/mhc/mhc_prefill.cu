// mhc_boundary, mhc_pre and mhc_head of ops/mhc/reference.py for many bf16 tokens: one launch for up to 8192 of them.
//
// Every block stays for the whole launch. `splits` blocks share the columns of a tile of 32 tokens, at most 128 each,
// and `walkers` such sets share the tiles. In a block
// - eight warps multiply: 16 tokens and one chunk of 32 columns each. They make X' (post), store it, and multiply it
//   with the bf16 parts of fn (dots.cuh), which wait in shared memory as A operands: a lane's octet of a token is a B
//   operand as it lies. The next two tiles are under way into shared memory, each octet to the thread that will use it:
//   loads in flight need neither registers, nor L1, nor a barrier. The sums of a block's chunks meet in shared memory,
//   in ascending order, and go to `partial`. Only the four warps of the same 16 tokens wait for each other, so one half
//   of a tile can multiply while the other makes X';
// - one warp tells the other blocks that X' and sums are there, by one integer a tile, after a fence for which no other
//   warp waits;
// - six warps finish tokens: they wait for a tile's sums of all columns, read its X' back from L2, where it came a few
//   microseconds ago, and make u, its norm, post and comb. The tokens of a tile go round the blocks of its set.
// Who waits, waits for warps that wait for nobody outside their block; the launch is cooperative, so all blocks are
// there. Sums run over chunks, then splits, in ascending order: bits do not depend on timing.
//
// Bytes a token in bf16: y, X, X' and u, 20 D, each once in device memory; X' a second time from L2, and the sums, 100
// bytes a token and block.
// sass mhc_prefill_kernel: HMMA.16816.F32.BF16, LDGSTS.E.BYPASS.128, LDG.E.128, LDS.128, STG.E.128
#include <type_traits>

#include "common/barrier.cuh"
#include "mhc/dots.cuh"
#include "mhc/launch.cuh"
#include "mhc/mixes.cuh"

namespace dsv4 {
namespace {

constexpr int kChunks = 4;  // of a block: at most 128 columns
constexpr int kGroups = 2;  // of 16 tokens
constexpr int kTile = 16 * kGroups;
constexpr int kStages = 2;  // tiles on their way into shared memory
constexpr int kGroupThreads = kChunks * kWarp;
constexpr int kMultipliers = kGroups * kGroupThreads;
constexpr int kMeeting = kMultipliers + kWarp;  // of which the last warp tells
constexpr int kFinishers = 6 * kWarp;           // then come these; 15 warps leave each thread 128 registers
constexpr int kMaxTiles = 256;                  // of a launch

constexpr int kOperands = 5;  // 16-row A operands that hold the three parts of 24 rows

// Dynamic shared memory.
struct Shared {
  // fn as A operands of the MMA over columns 8 t + 4 s .. 8 t + 4 s + 3: rows 0 to 15 of each part, then rows 16 to 23
  // of parts 0 and 1, then of part 2 and zeros.
  uint4 fn[kChunks][kStreams][2][kOperands][kWarp];
  // What a lane multiplies of a tile: octets of its tokens g and g + 8, of the streams and of y.
  Pairs tile[kStages][kGroups * kChunks][2][kStreams + 1][kWarp];
  float mixing[kStages + 2][kTile][kCoefficients];  // post and comb of the sublayer that ends
  float sums[2][kChunks][kTile][kSums];             // two: one barrier a tile is enough
  uint64_t done[kMaxTiles];                         // a barrier a tile: all multiplying warps have stored X' and sums
};

// Blocks that have stored their part of a tile, then tokens that are being finished. Zero between launches. Launches
// that use it must not run at the same time.
__device__ uint32_t arrivals[kMaxTiles];

// The tiles of a block: `first`, then every `walkers`-th; at least one.
struct Walk {
  int split, first, walkers, count;

  __device__ explicit Walk(const Sizes& n) {
    split = blockIdx.x % n.splits, first = blockIdx.x / n.splits, walkers = gridDim.x / n.splits;
    count = int(ceil_div(ceil_div(n.tokens, kTile) - first, walkers));
  }
  __device__ int tile(int i) const { return first + i * walkers; }
};

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Barrier 1 is for the multipliers and the warp that tells, once; then come those of the groups and of the teams.
constexpr int kGroupBarrier = 2, kTeamBarrier = kGroupBarrier + kGroups;

template <int kThreads>
__device__ inline void meet(int barrier) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory"); }

__device__ inline uint32_t shared_address(const void* of) { return uint32_t(__cvta_generic_to_shared(of)); }
// At a barrier in shared memory that counts warps (common/barrier.cuh), and whether its first phase has ended.
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline bool has_ended(uint32_t barrier) {
  uint32_t ended;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
      : "=r"(ended)
      : "r"(barrier)
      : "memory");
  return ended;
}

template <bool kPost>
__device__ void multiply(const Tensors<bf16>& p, const Sizes& n, const Walk& walk, Shared& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group = warp / kChunks, chunk = warp % kChunks;
  const int local = chunk * kChunk + 8 * t, column = walk.split * n.columns + local;
  const bool inside = local < n.columns && column < n.hidden;

  // A token or column past the end stands for the last one or column 0: loads need no branch, nothing of it is stored,
  // and fn is zero in columns outside.
  const int at_column = inside ? column : 0;
  auto token_of = [&](int i, int of) { return min(walk.tile(i) * kTile + of, n.tokens - 1); };
  auto copy_mixing = [&](int i) {
    const int thread = threadIdx.x % kGroupThreads;
    if (kPost && thread < 16 * (1 + kStreams)) {
      const int of = 16 * group + thread / (1 + kStreams), row = thread % (1 + kStreams);
      const int64_t token = token_of(i, of);
      const float* from = row == 0 ? p.post + token * kStreams : p.comb + (token * kStreams + row - 1) * kStreams;
      copy_async_16(&shared.mixing[i % (kStages + 2)][of][4 * row], from, true);
    }
  };
  // Tile i, and the coefficients of the one behind it, which other threads of the group will read after a barrier.
  // Always a group of copies, be it empty.
  auto copy_tile = [&](int i) {
    if (i < walk.count) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto& to = shared.tile[i % kStages][warp][half];
        const int64_t token = token_of(i, 16 * group + g + 8 * half);
        const bf16* at = p.x + token * kStreams * n.hidden + at_column;
#pragma unroll
        for (int k = 0; k < kStreams; ++k) copy_async_16(&to[k][lane], at + k * n.hidden, true);
        if (kPost) copy_async_16(&to[kStreams][lane], p.y + token * n.hidden + at_column, true);
      }
      if (i + 1 < walk.count) copy_mixing(i + 1);
    }
    commit_copies();
  };
  copy_mixing(0);
  commit_copies();
#pragma unroll
  for (int i = 0; i < kStages; ++i) copy_tile(i);

  // The two groups share the work of splitting fn. A row that does not exist, or columns outside, count as zeros.
#pragma unroll
  for (int i = 0; i < kStreams / kGroups; ++i) {
    const int k = kStreams / kGroups * group + i;
    Vector<float, 8> rows[kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const int64_t row = min(8 * j + g, n.rows - 1);
      rows[j] = load_vector<8>(p.fn + (row * kStreams + k) * n.hidden + at_column);
    }
    Pairs parts[kRowTiles][kParts];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (!inside || 8 * j + g >= n.rows) rows[j] = {};
      split_octet(rows[j], parts[j]);
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
  wait_copies<kStages>();  // the coefficients of tile 0
  meet<kMeeting>(1);

  auto meet_group = [&] { meet<kGroupThreads>(kGroupBarrier + group); };
  for (int i = 0; i < walk.count; ++i) {
    const int first = walk.tile(i) * kTile;
    wait_copies<kStages - 1>();
    Pairs made[2][kStreams];
    float squares[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of = 16 * group + g + 8 * half;
      const auto& from = shared.tile[i % kStages][warp][half];
#pragma unroll
      for (int k = 0; k < kStreams; ++k) made[half][k] = from[k][lane];
      if constexpr (kPost) {
        float c[kCoefficients];
        const float* mixing = shared.mixing[i % (kStages + 2)][of];
        load_coefficients(c, mixing, mixing + kStreams);
        mix_streams(c, from[kStreams][lane], made[half]);
        if (inside && first + of < n.tokens) {
          bf16* at = p.x_out + int64_t(first + of) * kStreams * n.hidden + column;
#pragma unroll
          for (int k = 0; k < kStreams; ++k) store_octet(at + k * n.hidden, made[half][k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kStreams; ++k) squares[half] += square_sum(made[half][k]);
    }
    copy_tile(i + kStages);  // into what this thread has just read

    float upper[2][4] = {}, lower[2][4] = {};  // rows 0 to 15; rows 16 to 23 as two addends
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int index = kOperands - 1; index >= 0; --index) {  // of each sum, the smallest products first
          const uint4 a = shared.fn[chunk][k][s][index][lane];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t* b = made[half][k].pair + 2 * s;
            mma_bf16(index < kParts ? upper[half] : lower[half], a.x, a.y, a.z, a.w, b[0], b[1]);
          }
        }
      }
    }

    // Accumulator e: row g + 8 (e / 2), token 2 t + e % 2.
    auto& all_sums = shared.sums[i % 2];
    float(*sums)[kSums] = all_sums[chunk] + 16 * group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[8 * half + 2 * t + e % 2][g + 8 * (e / 2)] = upper[half][e];
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[8 * half + 2 * t + e][16 + g] = lower[half][e] + lower[half][e + 2];
      float square = inside ? squares[half] : 0.0f;
      square += __shfl_xor_sync(kFullMask, square, 1);
      square += __shfl_xor_sync(kFullMask, square, 2);
      if (t == 0) sums[g + 8 * half][kMixes] = square;
    }
    meet_group();
    // Eight threads a token add the chunks in ascending order.
    const int of = threadIdx.x / 8;
    if (first + of < n.tokens) {
      float* to = p.partial + (int64_t(first + of) * n.splits + walk.split) * kSums;
#pragma unroll
      for (int r = threadIdx.x % 8; r < 32; r += 8) {
        if (r < kSums) {
          float sum = all_sums[0][of][r];
#pragma unroll
          for (int c = 1; c < kChunks; ++c) sum += all_sums[c][of][r];
          to[r] = sum;
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(shared_address(&shared.done[i]));
  }
}

// One thread. A fence takes as long as the stores before it take to reach L2, perhaps longer than a tile: the
// multipliers do not wait for it, and one fence serves all tiles that are done by then.
__device__ inline void tell(const Walk& walk, Shared& shared) {
  const bool me = threadIdx.x % kWarp == 0;
  for (int i = 0; me && i < walk.count; ++i) make_barrier(shared_address(&shared.done[i]), kMultipliers / kWarp);
  meet<kMeeting>(1);
  if (!me) return;
  for (int told = 0, done = 0; told < walk.count;) {
    wait_barrier(shared_address(&shared.done[done++]), 0);
    while (done < walk.count && has_ended(shared_address(&shared.done[done]))) ++done;
    asm volatile("fence.release.gpu;" ::: "memory");  // one that acquires would empty L1 of the norm's weights
    for (; told < done; ++told) {
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(&arrivals[walk.tile(told)]) : "memory");
    }
  }
}

// Without the fence of an acquire, which would empty L1 of the norm's weights: the loads that follow go to L2 as this
// one does, and none starts before it has come back.
__device__ inline void wait_for_arrivals(const uint32_t* count, uint32_t wanted) {
  uint32_t found;
  while (true) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
    if (found >= wanted) return;
    __nanosleep(100);
  }
}

// From L2, where other blocks have stored it.
__device__ inline Pairs load_shared_octet(const bf16* from) {
  Pairs v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3])
               : "l"(from)
               : "memory");
  return v;
}

// What was worked out from x before this is not kept in registers, but worked out again.
__device__ inline void forget(int& x) { asm volatile("" : "+r"(x)); }

// The blocks that share a token's columns, at most: a power of two for every width up to what teams can hold.
template <int kTeam, int kOctets>
constexpr int kMaxSplits = 8 * kTeam * kOctets <= 4096 ? 32 : 64;

// Teams of kTeam threads, kOctets octets of columns each at most, finish a token each, as finish_token does. Sinkhorn
// waits until a team has eight matrices.
template <int kTeam, int kOctets>
__device__ void finish(const Tensors<bf16>& p, const Sizes& n, const Walk& walk) {
  constexpr int kTeams = kFinishers / kTeam, kWarps = kTeam / kWarp, kMatrices = 8;
  constexpr int kAhead = 4, kWeights = kOctets % 4 ? kOctets : 4;  // octets of X' and of the norm on their way together
  constexpr int kShare = (kMaxSplits<kTeam, kOctets> + kWarps - 1) / kWarps;  // splits of a warp, at most
  __shared__ float sums[kTeams][kWarps][kWarp], squares[kTeams][kWarps], logits[kTeams][kMatrices][16];
  const bf16* streams = p.y != nullptr ? p.x_out : p.x;
  auto token_of = [&](int place) { return walk.tile(place / kTile) * kTile + place % kTile; };

  for (int round = 0;; ++round) {
    int thread_of_all = threadIdx.x - kMeeting;
    forget(thread_of_all);
    const int team = thread_of_all / kTeam, warp = thread_of_all % kTeam / kWarp, lane = thread_of_all % kWarp;
    int thread = thread_of_all % kTeam;
    auto meet_team = [&] { meet<kTeam>(kTeamBarrier + team); };
    auto place_of = [&](int round) { return walk.split + (team + round * kTeams) * n.splits; };
    const int place = place_of(round), tile = walk.tile(place / kTile), token = token_of(place);
    const bool done = place / kTile >= walk.count || token >= n.tokens;  // the last tile may have fewer tokens
    if (warp == 0 && p.comb_out != nullptr && (round % kMatrices == 0 || done)) {
      __syncwarp();
      const int of = (round - 1) / kMatrices * kMatrices + lane;  // of the rounds since the last time
      if (lane < kMatrices && of < round) {
        balance(logits[team][lane], p.comb_out + int64_t(token_of(place_of(of))) * kStreams * kStreams, n);
      }
      __syncwarp();
    }
    if (done) return;
    wait_for_arrivals(&arrivals[tile], n.splits);
    auto column_of = [&](int octet) { return 8 * (thread + octet * kTeam); };
    const bf16* at_token = streams + int64_t(token) * kStreams * n.hidden;
    auto load = [&](Pairs(&x)[kStreams], int octet) {
      const bf16* at = at_token + min(column_of(octet), n.hidden - 8);
#pragma unroll
      for (int k = 0; k < kStreams; ++k) x[k] = load_shared_octet(at + k * n.hidden);
    };
    // All sums are asked for at once; a split that does not exist counts as zero.
    const int from = warp * kShare, count = n.splits - from;  // perhaps none
    const float* partial = p.partial + (int64_t(token) * n.splits + from) * kSums + min(lane, kMixes);
    float of_split[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) of_split[i] = i < count ? __ldcg(partial + i * kSums) : 0.0f;
    Pairs x[kAhead][kStreams];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(x[i], i);
    float sum = of_split[0];
#pragma unroll
    for (int i = 1; i < kShare; ++i) sum += of_split[i];
    sums[team][warp][lane] = sum;
    const int part = lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2;  // of the mixes: pre, post, comb
    const bool real = lane < n.rows;
    const float gain = real ? p.scale[part] : 0.0f, shift = real ? p.base[lane] : 0.0f;
    meet_team();
    if (thread == 0) {  // the last of a tile's tokens leaves zero
      const uint32_t last = n.splits + min(kTile, n.tokens - tile * kTile) - 1;
      if (atomicAdd(&arrivals[tile], 1) == last) arrivals[tile] = 0;
    }

    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[team][w][lane];
    const float square_sum_of_all = __shfl_sync(kFullMask, sum, kMixes);
    const float rms = __fdividef(square_sum_of_all, float(kStreams) * n.hidden) + n.norm_eps;
    const float logit = sum * rsqrtf(rms) * gain + shift;
    float gate = sigmoid(logit);
    if (warp == 0 && p.comb_out != nullptr) {
      if (part == 1) p.post_out[int64_t(token) * kStreams + lane - kStreams] = 2.0f * gate;
      if (part == 2 && lane < kMixes) logits[team][round % kMatrices][lane - 2 * kStreams] = logit;
    }
    gate += n.eps;
    float pre[kStreams];
#pragma unroll
    for (int k = 0; k < kStreams; ++k) pre[k] = __shfl_sync(kFullMask, gate, k);

    Pairs u[kOctets];
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      collapse(pre, x[i % kAhead], u[i]);
      if (i + kAhead < kOctets) load(x[i % kAhead], i + kAhead);
      square += column_of(i) < n.hidden ? square_sum(u[i]) : 0.0f;
    }
    square = warp_sum(square);
    if (lane == 0) squares[team][warp] = square;
    meet_team();
    forget(thread);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += squares[team][w];
    const float scale = rsqrtf(__fdividef(total, float(n.hidden)) + n.norm_eps);
#pragma unroll
    for (int i = 0; i < kOctets; i += kWeights) {
      if (p.norm != nullptr) {
        Vector<float, 8> weights[kWeights];
#pragma unroll
        for (int j = 0; j < kWeights; ++j) {
          weights[j] = load_vector<8>(p.norm + min(column_of(i + j), n.hidden - 8));
        }
#pragma unroll
        for (int j = 0; j < kWeights; ++j) normalise(scale, weights[j], u[i + j]);
      }
#pragma unroll
      for (int j = i; j < i + kWeights; ++j) {
        if (column_of(j) < n.hidden) store_octet(p.u + int64_t(token) * n.hidden + column_of(j), u[j]);
      }
    }
  }
}

template <bool kPost, int kTeam, int kOctets>
__global__ void __launch_bounds__(kMeeting + kFinishers, 1)
    mhc_prefill_kernel(const Tensors<bf16> p, const Sizes n) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Walk walk(n);
  if (threadIdx.x < kMultipliers) {
    multiply<kPost>(p, n, walk, shared);
  } else if (threadIdx.x < kMeeting) {
    tell(walk, shared);
  } else {
    finish<kTeam, kOctets>(p, n, walk);
  }
}

}  // namespace

cudaError_t launch_prefill(Tensors<bf16> tensors, Sizes sizes, int64_t at_once, cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = count_processors(processors);
  if (error != cudaSuccess) return error;
  if (sizes.columns > kChunks * kChunk || at_once < 1 || at_once > kMaxTiles * kTile || sizes.splits > processors)
    return cudaErrorInvalidValue;
  auto start = [&](auto kernel, int max_splits, Tensors<bf16> slice) {
    if (sizes.splits > max_splits) return cudaErrorInvalidValue;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return error;
    int64_t tiles = ceil_div(sizes.tokens, kTile), walkers = processors / sizes.splits;
    walkers = walkers < tiles ? walkers : tiles;
    void* arguments[] = {&slice, &sizes};
    return cudaLaunchCooperativeKernel(kernel, dim3(unsigned(walkers * sizes.splits)), dim3(kMeeting + kFinishers),
                                       arguments, sizeof(Shared), stream);
  };
  auto start_for_width = [&](auto post, Tensors<bf16> slice) {
    constexpr bool kPost = decltype(post)::value;
    if (sizes.hidden <= 8 * 64 * 8) return start(mhc_prefill_kernel<kPost, 64, 8>, kMaxSplits<64, 8>, slice);
    if (sizes.hidden <= 8 * 192 * 5) return start(mhc_prefill_kernel<kPost, 192, 5>, kMaxSplits<192, 5>, slice);
    return start(mhc_prefill_kernel<kPost, 192, 6>, kMaxSplits<192, 6>, slice);
  };
  for (int64_t first = 0, tokens = sizes.tokens; first < tokens; first += at_once) {
    const Tensors<bf16> slice = tensors.from(first, sizes.hidden);
    sizes.tokens = int(tokens - first < at_once ? tokens - first : at_once);
    error = tensors.y != nullptr ? start_for_width(std::bool_constant<true>(), slice)
                                 : start_for_width(std::bool_constant<false>(), slice);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
