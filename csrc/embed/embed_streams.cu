// embed_streams: ops/embed/reference.py. A block a token: its row of the table, read once, written M times.
//
// 16 bytes of the narrower dtype a thread and access. At 8192 tokens of Flash in bf16 67 MB are read and 268 MB
// written, 80 us of an H200's memory; one token is one load that waits for the id, and its stores.
// sass embed_streams_kernel: LDG.E.128, STG.E.128
#include <type_traits>

#include "common/device.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kPer = 8;  // values a thread takes at once: 16 bytes of bf16, twice that of f32

template <class To, class From>
__device__ inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>) return x;  // bit by bit, NaN too
  else return from_float<To>(to_float(x));
}

template <class From, class To>
__global__ void __launch_bounds__(kMaxThreads)
    embed_streams_kernel(const int64_t* __restrict__ token_ids, const From* __restrict__ table, To* __restrict__ out,
                         int width, int num_streams) {
  const From* row = table + token_ids[blockIdx.x] * width;
  To* streams = out + int64_t(blockIdx.x) * num_streams * width;
  for (int at = threadIdx.x * kPer; at < width; at += blockDim.x * kPer) {
    Vector<From, kPer> from = load_vector<kPer>(row + at);
    Vector<To, kPer> to;
#pragma unroll
    for (int i = 0; i < kPer; ++i) to[i] = convert<To>(from[i]);
    for (int m = 0; m < num_streams; ++m) store_vector(streams + int64_t(m) * width + at, to);
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kMaxThreads)
    embed_streams_any_width_kernel(const int64_t* __restrict__ token_ids, const From* __restrict__ table,
                                   To* __restrict__ out, int width, int num_streams) {
  const From* row = table + token_ids[blockIdx.x] * width;
  To* streams = out + int64_t(blockIdx.x) * num_streams * width;
  for (int at = threadIdx.x; at < width; at += blockDim.x) {
    for (int m = 0; m < num_streams; ++m) streams[int64_t(m) * width + at] = convert<To>(row[at]);
  }
}

}  // namespace

cudaError_t embed_streams(const int64_t* token_ids, In table, Out out, int64_t tokens, int64_t width,
                          int64_t num_streams, cudaStream_t stream) {
  bool vectors = width % kPer == 0 && (uintptr_t(table.data) | uintptr_t(out.data)) % 16 == 0;
  int64_t accesses = vectors ? width / kPer : width;
  int threads = int(ceil_div(accesses < kMaxThreads ? accesses : kMaxThreads, kWarp) * kWarp);
  return for_float_type(table.type, [&](auto from_zero) {
    return for_float_type(out.type, [&](auto to_zero) {
      using From = decltype(from_zero);
      using To = decltype(to_zero);
      auto start = [&](auto kernel) {
        kernel<<<tokens, threads, 0, stream>>>(token_ids, static_cast<const From*>(table.data),
                                               static_cast<To*>(out.data), int(width), int(num_streams));
        return cudaGetLastError();
      };
      return vectors ? start(embed_streams_kernel<From, To>) : start(embed_streams_any_width_kernel<From, To>);
    });
  });
}

}  // namespace dsv4
