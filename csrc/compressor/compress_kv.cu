// compress_kv, compress_step: ops/compressor/reference.py, from projections to finished entries and the updated tail in
// one launch. The host knows where a chunk begins; of a step the kernel reads it, so that a graph serves any position.
//
// The rows of a call are counted from the first token of the unfinished window: rows below `pending` lie in the tail,
// the others are new. In CSA the tail also keeps the window before, as rows -ratio .. -1. So every window is read in
// the same way, wherever a sequence was cut, and the bits of an entry do not depend on the cuts.
//
// One block computes an entry, or a cluster of up to 8 whose blocks share its channels where a window has more than
// 64 KB (HCA: 128 rows of 512 channels). A thread takes a pair of channels, which RoPE turns together, and 8 slots of
// the softmax at a time, in registers: it asks for all of them before it uses the first, 32 to 64 KB of kv and gate in
// flight a block, each byte read once. Groups of threads that have other slots of the same channels meet in shared
// memory in order of group, the sums of squares of a cluster in order of rank. All of this follows from ratio and width
// alone. From the pooled value to the stored one a pair stays with its thread.
//
// One token waits for what is done in turn, so nothing else is: while the window is on its way, a thread computes its
// angle and asks for the rows that will move within the tail; the blocks of a cluster pass their sums by stores that
// count at a barrier in shared memory, and so wait for no fence; the tail is written last.
//
// The tail is read by the first window, and in CSA by the second, whose series Ca may be pending. One block, or the
// ranks of one cluster each for its channels, computes both and then updates the tail, which no other block touches.
//
// Bytes: 8 T C for kv and gate, 2 or 4 width an entry, and `ape` from cache. At decode, to emit: a window, 32 KB (CSA,
// width 512) or 512 KB (HCA); CSA then moves the window, 32 KB; every other token is copied, 16 KB or 8 KB.
// sass compress_kv_kernel: LDG.E.64, LDGSTS.E.BYPASS.128, LDS.128, STG.E.128, UCGABAR, SYNCS
#include "common/cluster.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/rotary.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kLanes = 2;  // channels of a thread
constexpr int kBatch = 8;  // slots that a thread asks for before it uses the first of them
constexpr int kMaxRanks = 8;
constexpr int kMaxSlice = 512;  // channels of a block
constexpr int kMaxGroups = kMaxThreads / kWarp;
constexpr int kMaxWarps = kMaxSlice / kLanes / kWarp;  // of a group
constexpr int64_t kBlockBytes = 64 << 10;              // of a window
constexpr int kQuad = 4;                               // channels of a thread where rows move
constexpr int kMoves = 4;                              // quads that a thread has on the way, each of kv, gate and bias
constexpr float kNothing = -INFINITY;                  // the gate of an empty slot

using Lanes = Vector<float, kLanes>;
using Quad = Vector<float, kQuad>;

// Dynamic shared memory, see Shared.
constexpr size_t shared_bytes(int threads) { return threads * 3 * (kMoves * sizeof(Quad) + sizeof(Lanes)); }

// Where rows lie, counted from any one of them: the pointers are those of row 0, whether it is there or not.
struct Rows {
  const float *kv, *gate;      // rows from `pending` on, gates without bias
  float *tail_kv, *tail_gate;  // rows before, gates with bias
  int pending;

  __device__ Rows from(int row, int channels, int channel) const {
    int64_t skipped = int64_t(row) * channels + channel;
    return {kv + skipped, gate + skipped, tail_kv + skipped, tail_gate + skipped, pending - row};
  }
};

// With `overlap` (CSA) the channels are series Ca, for the next window, and Cb, for the own.
struct Call {
  Rows rows;
  const float* ape;  // [ratio, channels]
  int ratio, width, channels;
  int windows;  // that the call completes
  int left;     // tokens of the unfinished window after it
};

// What happens to a pooled window, and where it goes.
template <class T>
struct Finish {
  const float* norm;      // [width]
  const float* inv_freq;  // [rotary / 2]
  T* out;                 // [windows, width]
  int64_t position;       // of row 0
  int rotary;             // values at the end of an entry that turn
  float per_width, eps;   // 1 / width
};

// How a window is spread: channels over the ranks of a cluster, slots over groups of 2^group_bits threads, whole warps.
struct Split {
  int rank_bits, slice, groups, group_bits;
};

// The part of a block and of a thread in every window.
struct Place {
  int rank, begin, length;  // the block's channels begin .. begin + length - 1, none in a rank too many
  int group;                // the thread's slots: kBatch from kBatch * group on, and again behind those of all groups
  int lane;                 // its channels: begin + lane and the next
  bool active;              // whether it has channels
};

// What a call whose first position is read on the device gets beside the others, whose pending, windows, left and
// position are then still to be found.
struct Step {
  const int64_t* position;  // of its first token
  int64_t* slots;           // [entries]: the index of each entry, -1 for those that are not completed
  int tokens, entries;

  template <class T>
  __device__ void complete(Call& call, Finish<T>& finish) const {
    const uint32_t at = uint32_t(*position), window = at / uint32_t(call.ratio), pending = at - window * call.ratio;
    const int64_t skipped = int64_t(pending) * call.channels;
    call.rows.kv -= skipped, call.rows.gate -= skipped, call.rows.pending = int(pending);
    call.windows = int((pending + tokens) / uint32_t(call.ratio));
    call.left = int(pending) + tokens - call.windows * call.ratio;
    finish.position = at - pending;
    if (blockIdx.x == 0 && threadIdx.x < entries)
      slots[threadIdx.x] = threadIdx.x < call.windows ? int64_t(window) + threadIdx.x : -1;
  }
};

// The softmax over some slots: the largest gate, the sum of exp(gate - top), and that of its products with the values.
struct Pool {
  Lanes top, sum, value;
};

struct Shared {
  Quad* kept;         // [kMoves, 3, threads]: rows on their way into the tail
  Pool* pools;        // [threads]: of each thread's slots
  float* warps;       // [kMaxWarps]
  float* squares;     // [ranks], of one window
  uint64_t* arrived;  // the barrier where they count
};

// exp(x), within 2 ulp and a rounding of x; results below 1e-38 are 0.
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// What is subtracted from gates up to `top`: with nothing but empty slots exp(-inf - 0) = 0, not exp(-inf + inf).
__device__ inline float shift_of(float top) { return top == kNothing ? 0.0f : top; }

// A barrier of which one phase passes when `bytes` have been stored beside it by store_counted. Of one thread; it is
// ready for the cluster behind cluster_arrive_relaxed and cluster_wait.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  uint32_t at = uint32_t(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// As cluster_arrive, for initialised barriers alone: earlier writes need not be visible, and nothing waits for them.
__device__ inline void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// As store_remote; the four bytes count at the barrier that lies there as `barrier` lies here.
__device__ inline void store_counted(float* mine, uint64_t* barrier, int rank, float value) {
  uint32_t to, counter;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(to)
               : "r"(uint32_t(__cvta_generic_to_shared(mine))), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(counter)
               : "r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
               "r"(__float_as_uint(value)), "r"(counter)
               : "memory");
}
__device__ inline void wait_bytes(uint64_t* barrier) {
  uint32_t at = uint32_t(__cvta_generic_to_shared(barrier)), done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(at)
        : "memory");
}

// Hides where a pointer comes from: the compiler then adds an offset to it, not to every term that it was made of.
template <class T>
__device__ inline void keep_whole(T& value) {
  if constexpr (sizeof(T) == 8) asm("" : "+l"(value));
  else asm("" : "+r"(value));
}

// The same number, known from here on: what depends on it is not computed earlier, before loads that it would delay.
__device__ inline int from_here(int x) {
  asm volatile("" : "+r"(x)::"memory");
  return x;
}

// What a thread asks for before it uses the first of it.
struct Batch {
  Lanes kv[kBatch], gate[kBatch], bias[kBatch];
};

__device__ inline Lanes load_lanes(const float* from) {
  __builtin_assume(__isGlobal(from));
  return load_vector<kLanes>(from);
}

// The slots first .. first + kBatch - 1 of `end`, from two channels of their rows: row s is slot s. The bias is what
// the gates of new rows lack; that of a slot too many makes it an empty one.
template <bool overlap>
__device__ inline void load_batch(const Call& call, const Rows& rows, const float* ape, int first, int end,
                                  Batch& batch) {
  const int before = overlap ? call.ratio : 0;
  int period = call.ratio * call.channels;
  keep_whole(period);
  const bool all_new = first >= rows.pending;
  if (first + kBatch <= end && (all_new || first + kBatch <= rows.pending)) {  // all of one kind
    const float *kv = all_new ? rows.kv : rows.tail_kv, *gate = all_new ? rows.gate : rows.tail_gate;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const bool own = overlap && first + k >= before;  // series Cb
      const int at = (first + k) * call.channels + (own ? call.width : 0);
      batch.kv[k] = load_lanes(kv + at);
      batch.gate[k] = load_lanes(gate + at);
      batch.bias[k] = {};
      if (all_new) batch.bias[k] = load_lanes(ape + (at - (own ? period : 0)));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const int slot = min(first + k, end - 1);
    const bool own = overlap && slot >= before, is_new = slot >= rows.pending;
    const int at = slot * call.channels + (own ? call.width : 0);
    batch.kv[k] = load_lanes((is_new ? rows.kv : rows.tail_kv) + at);
    batch.gate[k] = load_lanes((is_new ? rows.gate : rows.tail_gate) + at);
    batch.bias[k][0] = batch.bias[k][1] = first + k < end ? 0.0f : kNothing;
    if (is_new && first + k < end) batch.bias[k] = load_lanes(ape + (at - (own ? period : 0)));
  }
}

// The thread's slots of a window; all threads of a block come here. meanwhile() runs when the first are on their way.
// What an empty slot holds does not matter, be it infinite.
template <bool overlap, class Meanwhile>
__device__ inline Pool pool_slots(const Call& call, const Split& split, const Place& place, int window,
                                  Meanwhile&& meanwhile) {
  const int before = overlap ? call.ratio : 0;  // slots that are rows of the window before
  const int end = before + call.ratio, channel = min(place.begin + place.lane, call.width - kLanes);
  Rows rows = call.rows.from(window * call.ratio - before, call.channels, channel);
  const float* ape = call.ape + channel;
  keep_whole(rows.kv), keep_whole(rows.gate), keep_whole(rows.tail_kv), keep_whole(rows.tail_gate), keep_whole(ape);
  Pool pool = {{kNothing, kNothing}, {}, {}};
  int first = place.group * kBatch;
  do {
    Batch batch;
    load_batch<overlap>(call, rows, ape, first, end, batch);
    if (first == place.group * kBatch) meanwhile();
    first += kBatch * split.groups;
    const Lanes last_top = pool.top;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      float gate[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        gate[k] = batch.gate[k][i] + batch.bias[k][i];
        pool.top[i] = fmaxf(pool.top[i], gate[k]);
      }
      const float shift = shift_of(pool.top[i]), keep = power(last_top[i] - shift);
      pool.sum[i] *= keep, pool.value[i] *= keep;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float weight = power(gate[k] - shift);
        pool.sum[i] += weight;
        pool.value[i] = fmaf(weight, gate[k] == kNothing ? 0.0f : batch.kv[k][i], pool.value[i]);
      }
    }
  } while (first < end);
  return pool;
}

// The slots of all groups, for the threads of group 0; all threads of a block come here.
__device__ inline Pool merge_groups(const Pool& own, const Split& split, const Place& place, const Shared& shared) {
  const int thread = from_here(threadIdx.x);
  shared.pools[thread] = own;
  __syncthreads();
  if (place.group) return own;
  auto pool_of = [&](int group) -> const Pool& {  // without branches: of a group too many the last, to count as nothing
    return shared.pools[thread + (min(group, split.groups - 1) << split.group_bits)];
  };
  Lanes tops[kMaxGroups];
  Pool pool = {{kNothing, kNothing}, {}, {}};
#pragma unroll
  for (int group = 0; group < kMaxGroups; ++group) {
    tops[group] = pool_of(group).top;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) pool.top[i] = fmaxf(pool.top[i], tops[group][i]);
  }
#pragma unroll
  for (int group = 0; group < kMaxGroups; ++group) {
    const Lanes sum = pool_of(group).sum, value = pool_of(group).value;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      float keep = group < split.groups ? power(tops[group][i] - shift_of(pool.top[i])) : 0.0f;
      pool.sum[i] = fmaf(keep, sum[i], pool.sum[i]);
      pool.value[i] = fmaf(keep, value[i], pool.value[i]);
    }
  }
  return pool;
}

// The sum over an entry, in order of lane, warp and rank, for the threads of group 0, which alone have something to
// add; all threads of a block come here.
__device__ inline float entry_sum(float x, const Split& split, const Place& place, const Shared& shared) {
  const int warps = 1 << split.group_bits >> 5, ranks = 1 << split.rank_bits;
  x = warp_sum(x);
  if (warps > 1) {
    if (place.group == 0 && threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kMaxWarps; ++warp) x += warp < warps ? shared.warps[warp] : 0.0f;
  }
  if (ranks == 1 || place.group) return x;
  if (threadIdx.x < ranks) store_counted(shared.squares + place.rank, shared.arrived, threadIdx.x, x);
  wait_bytes(shared.arrived);
  x = 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMaxRanks; ++rank) x += rank < ranks ? shared.squares[rank] : 0.0f;
  return x;
}

// Pool a window, round, normalise, round, turn, round: the block's channels of one entry.
template <bool overlap, class T, class Meanwhile>
__device__ inline void emit(const Call& call, const Finish<T>& finish, const Split& split, const Place& place,
                            int window, const Shared& shared, Meanwhile&& meanwhile) {
  const int channel = place.begin + place.lane;
  const int turning = channel - (call.width - finish.rotary);  // even; the pair turns if not negative
  const bool finishes = place.active && place.group == 0, turns = finishes && turning >= 0;
  Lanes weight = {};
  float inv_freq = 0.0f;
  float2 angle = {};
  if (turns) inv_freq = finish.inv_freq[turning / 2];
  if (finishes) weight = load_vector<kLanes>(finish.norm + channel);
  Pool pool = pool_slots<overlap>(call, split, place, window, [&] {
    meanwhile();
    if (turns) angle = rotary_angle(finish.position + int64_t(from_here(window)) * call.ratio, inv_freq);
    asm volatile("" : "+f"(angle.x), "+f"(angle.y));  // now, not where it is used
  });
  if (split.groups > 1) pool = merge_groups(pool, split, place, shared);
  Lanes x = {};
  if (finishes) {  // the sum is between 1 and the number of slots
#pragma unroll
    for (int i = 0; i < kLanes; ++i) x[i] = rounded<T>(__fdividef(pool.value[i], pool.sum[i]));
  }
  const float squares = entry_sum(x[0] * x[0] + x[1] * x[1], split, place, shared);
  if (!finishes) return;
  const float scale = rsqrtf(squares * finish.per_width + finish.eps);
  float2 pair = make_float2(rounded<T>(x[0] * scale * weight[0]), rounded<T>(x[1] * scale * weight[1]));
  if (turns) pair = rotate(pair, angle);
  store_vector(finish.out + int64_t(window) * call.width + channel,
               Vector<T, kLanes>{from_float<T>(pair.x), from_float<T>(pair.y)});
}

// Rows from + begin .. from + end - 1 become rows to + begin .. to + end - 1 of the tail; windows begin at `from` and
// `to`. With the same `begin` a thread moves the same channels of the same rows of a window, wherever from and to.
struct Move {
  int from, to, begin, end;
};

// Moves rows, kMoves jobs of a thread at a time: four channels of one row and, in CSA, one series.
template <bool overlap>
struct Mover {
  const Call& call;
  Quad* kept;
  int threads, stride, start, channel;
  bool active;

  __device__ Mover(const Call& call, const Split& split, const Place& place, const Shared& shared)
      : call(call), threads(blockDim.x) {
    const int thread = from_here(threadIdx.x), bits = split.group_bits - 1, lane = (thread & ((1 << bits) - 1)) * kQuad;
    kept = shared.kept + thread;
    stride = threads >> bits;
    start = thread >> bits;
    channel = place.begin + lane;
    active = lane < place.length;
  }

  __device__ int at(int job) const {
    return overlap ? (job >> 1) * call.channels + (job & 1) * call.width : job * call.channels;
  }
  __device__ int end(const Move& move) const { return active ? move.end << overlap : 0; }

  // Values, gates, and the bias that the gates of a new row lack.
  __device__ void ask(const Move& move, int first) const {
    const Rows rows = call.rows.from(move.from, call.channels, channel);
#pragma unroll 1
    for (int k = 0; k < kMoves; ++k) {
      const int job = first + k * stride;
      if (job >= end(move)) break;
      const bool is_new = job >> overlap >= rows.pending;
      copy_async_16(kept + 3 * k * threads, (is_new ? rows.kv : rows.tail_kv) + at(job), true);
      copy_async_16(kept + (3 * k + 1) * threads, (is_new ? rows.gate : rows.tail_gate) + at(job), true);
      if (is_new) copy_async_16(kept + (3 * k + 2) * threads, call.ape + channel + at(job), true);
    }
  }

  __device__ void store(const Move& move, int first) const {
    const int pending = call.rows.pending - move.from;
    const Rows rows = call.rows.from(move.to, call.channels, channel);
    wait_async_copies();
#pragma unroll
    for (int k = 0; k < kMoves; ++k) {
      const int job = first + k * stride;
      if (job >= end(move)) break;
      Quad kv = kept[3 * k * threads], gate = kept[(3 * k + 1) * threads];
      if (job >> overlap >= pending) {  // not for others: -0 + 0 is not -0
        const Quad bias = kept[(3 * k + 2) * threads];
        gate = {gate[0] + bias[0], gate[1] + bias[1], gate[2] + bias[2], gate[3] + bias[3]};
      }
      store_quad(rows.tail_kv + at(job), kv);
      store_quad(rows.tail_gate + at(job), gate);
    }
  }

  // 16 bytes at once: a plain store of values changed one by one becomes four.
  __device__ static void store_quad(float* to, const Quad& quad) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(quad[0], quad[1], quad[2], quad[3]));
  }

  // `asked`: for the first jobs.
  __device__ void run(const Move& move, bool asked) const {
    for (int job = (move.begin << overlap) + start; job < end(move); job += kMoves * stride, asked = false) {
      if (!asked) ask(move, job);
      store(move, job);
    }
  }
};

// Cluster 0 has the windows that read the tail, and the tail; every other cluster has one window, or in a step none.
template <class T, bool overlap, bool is_step>
__global__ void __launch_bounds__(kMaxThreads, 1)
    compress_kv_kernel(Call call, Finish<T> finish, Split split, Step step) {
  if constexpr (is_step) step.complete(call, finish);
  constexpr int kMaxWindows = 1 + overlap;  // of a cluster; the barrier of each is used once
  extern __shared__ Quad dynamic[];
  __shared__ float warps[kMaxWarps], squares[kMaxWindows][kMaxRanks];
  __shared__ uint64_t arrived[kMaxWindows];
  const int threads = blockDim.x, cluster = blockIdx.x >> split.rank_bits, ranks = 1 << split.rank_bits;
  Pool* pools = reinterpret_cast<Pool*>(dynamic + 3 * kMoves * threads);
  Place place;
  place.rank = blockIdx.x & (ranks - 1);
  place.begin = place.rank * split.slice;
  place.length = min(split.slice, call.width - place.begin);
  place.group = threadIdx.x >> split.group_bits;
  place.lane = (threadIdx.x & ((1 << split.group_bits) - 1)) * kLanes;
  place.active = place.lane < place.length;
  const int from_tail = min(call.windows, kMaxWindows);
  const int first = cluster ? from_tail + cluster - 1 : 0, end = cluster ? min(first + 1, call.windows) : from_tail;
  if (ranks > 1 && first < end) {
    if (threadIdx.x == 0)
      for (int i = 0; i < kMaxWindows; ++i) expect_bytes(&arrived[i], ranks * sizeof(float));
    cluster_arrive_relaxed();
  }
  Shared shared{dynamic, pools, warps, squares[0], arrived};
  // The last full window (CSA), then the pending tokens, from row 0 if the window is a new one. Where these overwrite
  // pending rows that belonged to the full window, the thread that writes is the one that has read them.
  const Move full{(call.windows - 1) * call.ratio, -call.ratio, 0, call.windows ? call.ratio : 0};
  const Move unfinished{call.windows * call.ratio, 0, call.windows ? 0 : call.rows.pending, call.left};
  for (int window = first; window < end; ++window) {
    if (window > first) __syncthreads();  // what was shared has been read
    shared.squares = squares[window - first], shared.arrived = &arrived[window - first];
    emit<overlap>(call, finish, split, place, window, shared, [&] {
      if (ranks > 1 && window == first) cluster_wait();  // for blocks that have not started
      if (overlap && cluster == 0 && window + 1 == end) {
        const Mover<overlap> mover(call, split, place, shared);
        mover.ask(full, mover.start);
      }
    });
  }
  if (cluster) return;
  if (first < end) __syncthreads();  // the tail has been read
  const Mover<overlap> mover(call, split, place, shared);
  if (overlap) mover.run(full, true);
  mover.run(unfinished, false);
}

int bits_of(int64_t x) {  // of the least power of two that is not below x
  int bits = 0;
  while (int64_t(1) << bits < x) ++bits;
  return bits;
}

Split split_window(int64_t slots, int64_t width) {
  int64_t ranks = 1;
  while (ranks < kMaxRanks && (8 * slots * width > ranks * kBlockBytes || width > ranks * kMaxSlice)) ranks *= 2;
  const int64_t slice = 8 * ceil_div(width, 8 * ranks), vectors = slice / kLanes;
  const int group_bits = bits_of(vectors < kWarp ? kWarp : vectors);
  const int64_t wanted = ceil_div(slots, kBatch), most = kMaxThreads >> group_bits;
  return {bits_of(ranks), int(slice), int(wanted < most ? wanted : most), group_bits};
}

// `windows`: that the call completes, of a step at most.
template <class T, bool overlap, bool is_step>
cudaError_t launch_windows(int64_t windows, cudaStream_t stream, const Call& call, const Finish<T>& finish,
                           const Step& step) {
  auto* kernel = compress_kv_kernel<T, overlap, is_step>;
  static const cudaError_t opted_in =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(kMaxThreads));
  if (opted_in != cudaSuccess) return opted_in;
  const int64_t from_tail = windows < 1 + overlap ? windows : 1 + overlap, clusters = 1 + windows - from_tail;
  const Split split = split_window(int64_t(call.ratio) << overlap, call.width);
  const int threads = split.groups << split.group_bits;
  const int ranks = 1 << split.rank_bits;
  const Grid grid = {.blocks = clusters * ranks, .threads = threads, .shared = shared_bytes(threads), .cluster = ranks};
  return launch(kernel, grid, stream, call, finish, split, step);
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A chunk from `start` on, or a step.
template <bool is_step>
cudaError_t compress(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                     const float* norm, const float* inv_freq, Out out, int64_t tokens, int64_t ratio, int64_t width,
                     int64_t rotary, int64_t start, bool overlap, double eps, const Step& step, cudaStream_t stream) {
  if (!(aligned(kv) && aligned(gate) && aligned(ape) && aligned(tail_kv) && aligned(tail_gate) && aligned(norm)))
    return cudaErrorMisalignedAddress;
  const int64_t channels = width << overlap, before = overlap ? ratio : 0, pending = start % ratio;
  const int64_t windows = is_step ? step.entries : (pending + tokens) / ratio;
  Call call;
  call.rows = {kv - pending * channels, gate - pending * channels, tail_kv + before * channels,
               tail_gate + before * channels, int(pending)};
  call.ape = ape;
  call.ratio = int(ratio);
  call.width = int(width);
  call.channels = int(channels);
  call.windows = int(windows);
  call.left = int((pending + tokens) % ratio);
  return for_float_type(out.type, [&](auto zero) {
    using T = decltype(zero);
    const Finish<T> finish{norm,        inv_freq,           static_cast<T*>(out.data), start - pending,
                           int(rotary), 1.0f / float(width), float(eps)};
    return overlap ? launch_windows<T, true, is_step>(windows, stream, call, finish, step)
                   : launch_windows<T, false, is_step>(windows, stream, call, finish, step);
  });
}

}  // namespace

cudaError_t compress_kv(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                        const float* norm, const float* inv_freq, Out out, int64_t tokens, int64_t ratio, int64_t width,
                        int64_t rotary, int64_t start, bool overlap, double eps, cudaStream_t stream) {
  return compress<false>(kv, gate, ape, tail_kv, tail_gate, norm, inv_freq, out, tokens, ratio, width, rotary, start,
                         overlap, eps, Step{}, stream);
}

cudaError_t compress_step(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                          const float* norm, const float* inv_freq, const int64_t* positions, Out out, int64_t* slots,
                          int64_t tokens, int64_t entries, int64_t ratio, int64_t width, int64_t rotary, bool overlap,
                          double eps, cudaStream_t stream) {
  if (entries > kWarp) return cudaErrorInvalidValue;
  return compress<true>(kv, gate, ape, tail_kv, tail_gate, norm, inv_freq, out, tokens, ratio, width, rotary, 0,
                        overlap, eps, Step{positions, slots, int(tokens), int(entries)}, stream);
}

}  // namespace dsv4
