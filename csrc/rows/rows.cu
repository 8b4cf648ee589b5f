// store_rows, load_rows: ops/rows/reference.py, rows of the cache in their table's format (ops/formats.py).
//
// A thread has 16 values of a row and asks for them and for the row's slot at once. A KV row is a warp: 28 lanes have
// the values without RoPE, four lanes a block of FP8, whose maximum meets by shuffles; the other four copy the rotated
// values; the scales are gathered into one vector by shuffles. An index key is 8 lanes: rotation as in
// quant/hadamard.cu, two lanes a block of FP4. Plain rows are copied, a block of threads a row. Which row of the table
// is written is read on the device, so that a graph of a decode step can be replayed at any position.
//
// Bytes a row: 1024 read and 592 written (KV), 256 and 68 (index key); load_rows 592 and 1024, 262144 rows: 424 MB.
// sass store_kv_kernel: LDG.E.128, STG.E.128, F2FP.SATFINITE.E4M3, SHFL.BFLY
// sass store_index_kernel: LDG.E.128, SHFL.BFLY
// sass load_kv_kernel: LDG.E.128, STG.E.128
#include "quant/quant.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kWidth = 512, kCodes = 448;          // of a KV row: values, and those without RoPE
constexpr int kCodeLanes = kCodes / kValues;       // of a warp
constexpr int kLanesPerBlock = 64 / kValues;       // of FP8
constexpr int kBlocks = kCodes / 64;               // of FP8
constexpr int kRope = kCodes;                      // where in a record the rotated values begin
constexpr int kScales = kRope + 2 * (kWidth - kCodes);
constexpr int kRecord = 592;
constexpr int kIndexWidth = 128, kIndexLanes = kIndexWidth / kValues;
constexpr int kIndexWords = 17;                    // of a record: 16 of codes, one of scales
constexpr float kIndexFactor = 0.08838834764831845f;  // 128^-0.5

// Where the rows go: row t of the call into row slots[t] mod rows, nowhere if negative.
struct Slots {
  const int64_t* slots;
  int64_t count;
  uint32_t rows;

  __device__ int64_t of(int64_t row) const { return row < count ? slots[row] : -1; }
  __device__ int64_t place(int64_t slot) const { return uint32_t(slot) % rows; }
};

__global__ void __launch_bounds__(kThreads)
    store_kv_kernel(const bf16* __restrict__ x, uint8_t* __restrict__ table, Slots slots) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= slots.count) return;
  const int64_t slot = slots.of(row);
  const Values<bf16> values = load_values(x + row * kWidth + lane * kValues);
  if (slot < 0) return;
  uint8_t* to = table + slots.place(slot) * kRecord;
  const bool has_codes = lane < kCodeLanes;
  unsigned most = has_codes ? largest_magnitude(values) : 0;
#pragma unroll
  for (int step = 1; step < kLanesPerBlock; step *= 2) most = max(most, __shfl_xor_sync(kFullMask, most, step));
  const uint32_t scale = fp8_scale(most);
  uint32_t scales[2] = {0, 0};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    scales[block / 4] |= __shfl_sync(kFullMask, scale, block * kLanesPerBlock) << 8 * (block % 4);
  if (lane == 0)
    store_vector(reinterpret_cast<uint32_t*>(to + kScales), Vector<uint32_t, 4>{scales[0], scales[1], 0, 0});
  if (!has_codes) {
    store_values(reinterpret_cast<bf16*>(to + kRope) + (lane - kCodeLanes) * kValues, values);
    return;
  }
  float y[kValues];
  unpack(values, y);
  const float factor = reciprocal_power(scale);
  Vector<uint32_t, 4> codes;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    codes[i] = to_e4m3_pair(y[4 * i] * factor, y[4 * i + 1] * factor) |
               to_e4m3_pair(y[4 * i + 2] * factor, y[4 * i + 3] * factor) << 16;
  store_vector(reinterpret_cast<uint32_t*>(to + lane * kValues), codes);
}

__global__ void __launch_bounds__(kThreads)
    store_index_kernel(const bf16* __restrict__ x, uint32_t* __restrict__ table, Slots slots) {
  const int lane = threadIdx.x % kIndexLanes;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kIndexLanes) + threadIdx.x / kIndexLanes;
  const int64_t slot = slots.of(row);
  Values<bf16> values = {};
  if (row < slots.count) values = load_values(x + row * kIndexWidth + lane * kValues);
  float y[kValues];
  unpack(values, y);
  rotate_row(y, kIndexLanes);
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    y[i] = rounded<bf16>(y[i] * kIndexFactor);
    most = max(most, magnitude(y[i]));
  }
  const uint32_t scale = fp4_scale(max(most, __shfl_xor_sync(kFullMask, most, 1)));
  const float factor = reciprocal_power(scale);
  uint32_t codes[2] = {0, 0}, scales = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) codes[i / 8] |= to_e2m1(y[i] * factor) << 4 * (i % 8);
#pragma unroll
  for (int block = 0; block < 4; ++block)
    scales |= __shfl_sync(kFullMask, scale, 2 * block, kIndexLanes) << 8 * block;
  if (slot < 0) return;
  uint32_t* to = table + slots.place(slot) * kIndexWords;
  to[2 * lane] = codes[0], to[2 * lane + 1] = codes[1];
  if (lane == 0) to[kIndexWords - 1] = scales;
}

// Rows of `vectors` vectors of 16 bytes, a block of threads each.
__global__ void __launch_bounds__(kThreads)
    store_plain_kernel(const uint4* __restrict__ x, uint4* __restrict__ table, Slots slots, int vectors) {
  const int64_t row = blockIdx.x, slot = slots.of(row);
  if (slot < 0) return;
  for (int i = threadIdx.x; i < vectors; i += kThreads) table[slots.place(slot) * vectors + i] = x[row * vectors + i];
}

__global__ void __launch_bounds__(kThreads)
    load_kv_kernel(const uint8_t* __restrict__ table, bf16* __restrict__ out, int64_t count) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= count) return;
  const uint8_t* from = table + row * kRecord;
  bf16* to = out + row * kWidth + lane * kValues;
  if (lane >= kCodeLanes) {
    store_values(to, load_values(reinterpret_cast<const bf16*>(from + kRope) + (lane - kCodeLanes) * kValues));
    return;
  }
  const auto codes = load_vector<4>(reinterpret_cast<const uint32_t*>(from + lane * kValues));
  const float scale = power_of_two(from[kScales + lane / kLanesPerBlock]);
  float y[kValues];
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const float2 pair = from_e4m3_pair(codes[i / 2] >> 16 * (i % 2));
    y[2 * i] = pair.x * scale, y[2 * i + 1] = pair.y * scale;
  }
  Values<bf16> values;
  pack(y, values);
  store_values(to, values);
}

}  // namespace

cudaError_t store_rows(In x, Out table, const int64_t* slots, int64_t count, int64_t width, int64_t rows,
                       int64_t row_width, cudaStream_t stream) {
  if (!aligned(x.data) || !aligned(table.data)) return cudaErrorMisalignedAddress;
  if (rows >= int64_t(1) << 31) return cudaErrorInvalidValue;
  const Slots to{slots, count, uint32_t(rows)};
  if (table.type != Type::u8) {
    if (table.type != x.type || row_width != width || width % 8) return cudaErrorInvalidValue;
    return for_float_type(x.type, [&](auto zero) {
      const int vectors = int(width * sizeof(zero) / sizeof(uint4));
      store_plain_kernel<<<count, kThreads, 0, stream>>>(static_cast<const uint4*>(x.data),
                                                         static_cast<uint4*>(table.data), to, vectors);
      return cudaGetLastError();
    });
  }
  if (x.type != Type::bf16) return cudaErrorInvalidValue;
  auto* from = static_cast<const bf16*>(x.data);
  if (width == kWidth && row_width == kRecord) {
    const int64_t blocks = ceil_div(count, kThreads / kWarp);
    store_kv_kernel<<<blocks, kThreads, 0, stream>>>(from, static_cast<uint8_t*>(table.data), to);
  } else if (width == kIndexWidth && row_width == 4 * kIndexWords) {
    const int64_t blocks = ceil_div(count, kThreads / kIndexLanes);
    store_index_kernel<<<blocks, kThreads, 0, stream>>>(from, static_cast<uint32_t*>(table.data), to);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t load_rows(const uint8_t* table, Out out, int64_t count, cudaStream_t stream) {
  if (!aligned(table) || !aligned(out.data)) return cudaErrorMisalignedAddress;
  if (out.type != Type::bf16) return cudaErrorInvalidValue;
  load_kv_kernel<<<ceil_div(count, kThreads / kWarp), kThreads, 0, stream>>>(table, static_cast<bf16*>(out.data),
                                                                             count);
  return cudaGetLastError();
}

}  // namespace dsv4
