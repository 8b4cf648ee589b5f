// swiglu_pairs and sum_slots: run_experts of ops/moe/reference.py between and after the products of gemm_tiles_experts.
//
//   swiglu_pairs: h[p] = bf16(silu(min(gate[p], limit)) clamp(up[p], -limit, limit) routing[order[p]])
//   sum_slots: out[t] = down[place[t, 0]] + down[place[t, 1]] + .. + shared[t], in this order, rounded once
// Both in fp32. The bytes are what takes the time: 10 F of a pair (1.2 GB at 8,192 tokens, 6 experts, F 2048: 240 us of
// an H200's memory), then 4 D of a pair and 6 D of a token (1.0 GB at D 4096). A thread takes eight neighbouring
// values; sums follow the slots and nothing else.
// sass swiglu_pairs_kernel: LDG.E.128, STG.E.128
// sass sum_slots_kernel: LDG.E.128, STG.E.128
#include "common/device.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kPer = 8;

__global__ void __launch_bounds__(kThreads)
    swiglu_pairs_kernel(const float* __restrict__ gate, const float* __restrict__ up, const float* __restrict__ routing,
                        const int32_t* __restrict__ order, bf16* __restrict__ h, unsigned octets, unsigned in_row,
                        float limit) {
  const unsigned octet = blockIdx.x * kThreads + threadIdx.x;
  if (octet >= octets) return;
  const unsigned pair = octet / in_row;
  const float weight = routing == nullptr ? 1.0f : routing[order == nullptr ? pair : order[pair]];
  const Octet<float> g = load_octet(gate + kPer * int64_t(octet)), u = load_octet(up + kPer * int64_t(octet));
  float value[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    // Comparisons that are false of NaN: it stays one, as in torch.
    const float clamped = g[i] > limit ? limit : g[i];
    const float upper = u[i] > limit ? limit : u[i], both = upper < -limit ? -limit : upper;
    value[i] = clamped / (1.0f + expf(-clamped)) * both * weight;
  }
  Octet<bf16> rounded;
  pack(value, rounded);
  store_octet(h + kPer * int64_t(octet), rounded);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_slots_kernel(const float* __restrict__ down, const int32_t* __restrict__ place,
                     const float* __restrict__ shared, T* __restrict__ out, unsigned octets, unsigned in_row,
                     int slots) {
  const unsigned octet = blockIdx.x * kThreads + threadIdx.x;
  if (octet >= octets) return;
  const unsigned token = octet / in_row, column = kPer * (octet - token * in_row);
  const int64_t width = kPer * int64_t(in_row);
  place += int64_t(token) * slots;
  float sum[kPer], more[kPer];
  unpack(load_octet(down + place[0] * width + column), sum);
#pragma unroll 4
  for (int slot = 1; slot < slots; ++slot) {
    unpack(load_octet(down + place[slot] * width + column), more);
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum[i] += more[i];
  }
  if (shared != nullptr) {
    unpack(load_octet(shared + kPer * int64_t(octet)), more);
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum[i] += more[i];
  }
  Octet<T> rounded;
  pack(sum, rounded);
  store_octet(out + kPer * int64_t(octet), rounded);
}

int64_t blocks_for(int64_t octets) { return ceil_div(octets, kThreads); }

}  // namespace

// gate, up [pairs, width] f32; routing f32 of any shape, read at order[p] (or p); h [pairs, width] bf16. width: a
// multiple of 8.
cudaError_t swiglu_pairs(const float* gate, const float* up, Maybe<const float> routing, Maybe<const int32_t> order,
                         Out h, int64_t pairs, int64_t width, double limit, cudaStream_t stream) {
  if (width % kPer || h.type != Type::bf16 || pairs * width / kPer > INT32_MAX) return cudaErrorInvalidValue;
  if ((uintptr_t(gate) | uintptr_t(up) | uintptr_t(h.data)) % 16) return cudaErrorMisalignedAddress;
  const int64_t octets = pairs * width / kPer;
  return launch(swiglu_pairs_kernel, Grid{blocks_for(octets), kThreads}, stream, gate, up, routing.data, order.data,
                static_cast<bf16*>(h.data), unsigned(octets), unsigned(width / kPer), float(limit));
}

// down [tokens * slots, width] f32, place [tokens, slots] i32, shared [tokens, width] f32 or null, out [tokens, width]
// bf16 or f32. width: a multiple of 8; slots: at least 1.
cudaError_t sum_slots(const float* down, const int32_t* place, Maybe<const float> shared, Out out, int64_t tokens,
                      int64_t slots, int64_t width, cudaStream_t stream) {
  if (width % kPer || slots < 1 || tokens * width / kPer > INT32_MAX) return cudaErrorInvalidValue;
  if ((uintptr_t(down) | uintptr_t(shared.data) | uintptr_t(out.data)) % 16) return cudaErrorMisalignedAddress;
  const int64_t octets = tokens * width / kPer;
  return for_float_type(out.type, [&](auto zero) {
    using T = decltype(zero);
    return launch(sum_slots_kernel<T>, Grid{blocks_for(octets), kThreads}, stream, down, place, shared.data,
                  static_cast<T*>(out.data), unsigned(octets), unsigned(width / kPer), int(slots));
  });
}

}  // namespace dsv4
