// NVFP4 of activations: ops/quant/reference.py nvfp4_global_scale, quantize_nvfp4, quantize_nvfp4_tokens, round_nvfp4.
//
// A thread has a whole block of 16 values, so a block needs no exchange: two 16-byte loads (bf16), 8 bytes of codes and
// a byte of scale stored, neighbouring threads beside each other. For scales per token a thread block has a row, keeps
// it in registers between the row's maximum and the codes (up to 32768 values; of wider rows the second reading comes
// from L2), and meets once, in the maximum. Where the scale is given, nothing is exchanged at all.
//
// Bytes an element of bf16: 2 read, 0.5625 written. 8192 x 4096: 86 MB; 8192 x 7168: 150 MB. round_nvfp4, which turns
// the codes into values before it stores them: 2 read, 2 written.
//
// What an SM can issue in that time is some 20 instructions a value, so the quotients x / step of the reference are not
// divisions, yet have their bits (Divisor). They have to: x / step is a midpoint of two codes, or an ulp from one, in
// many blocks, because a row's scale is a bf16 value / 2688 and 2688 = 2^7 21, so that 3 or 7 times a step may again be
// a short number. So rounding takes no branch. Blocks out of the ordinary (a step of zero, of extreme size, or too
// small for its values; infinity, NaN) are read again and rounded value by value, as the reference does it.
// sass quantize_nvfp4_kernel: LDG.E.128, STG.E.64, F2FP.F16.F32.PACK_AB, PRMT
// sass quantize_nvfp4_tokens_kernel: LDG.E.128, STG.E.64, F2FP.F16.F32.PACK_AB, PRMT
// sass round_nvfp4_kernel: LDG.E.128, STG.E.128, F2FP.F16.F32.PACK_AB, PRMT
// sass round_nvfp4_tokens_kernel: LDG.E.128, STG.E.128, F2FP.F16.F32.PACK_AB, PRMT
#include "quant/quant.cuh"

#include <type_traits>

namespace dsv4 {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kGivenThreads = 128;   // where no row has to meet
constexpr int64_t kFewRows = 264;    // for which a block a thread is sooner done; the bits are the same
constexpr float kLargest = 2688.0f;  // 6 * 448: the largest code times the largest scale

// The largest x of a block; one barrier.
__device__ inline unsigned block_max(unsigned x, unsigned* scratch) {
  x = __reduce_max_sync(kFullMask, x);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  return __reduce_max_sync(kFullMask, lane < warps ? scratch[lane] : 0);
}

// Division by one number of many. below + rest is 1 / value to 2^-42. As rest is positive, -0 / value stays -0. Made
// for values and quotients of 2^-100 to 2^100; what is farther out may go wrong, but never becomes a number in between.
struct Divisor {
  float value, below, rest, nearest;

  __device__ explicit Divisor(float divisor) : value(divisor) {
    float about;  // 1 / value within an ulp
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(about) : "f"(divisor));
    below = about * (1 - 0x1p-22f);
    // With e = 1 - value * below, 2^-24 to 2^-21, rest / below is e + e^2 + ... The factor is a little more than 1 + e:
    // 1 / value is never missed from below, which matters for one mantissa, of ones only.
    rest = below * fmaf(-value, below, 1.0f) * (1 + 0x1p-20f);
    nearest = below + rest;
  }

  // Of an x of 8 significant bits: at, above or below a midpoint of two codes as __fdiv_rn(x, value) is. Tried for
  // every mantissa of value, with the two x around each midpoint and `about` an ulp off either way.
  __device__ float short_quotient(float x) const { return fmaf(x, below, x * rest); }

  // __fdiv_rn(x, value), but for the sign of zero: the exact remainder of a quotient within an ulp, and the reciprocal
  // rounded to nearest, give the rounded quotient.
  __device__ float quotient(float x) const {
    const float about = short_quotient(x);
    return fmaf(fmaf(-about, value, x), nearest, about);
  }
};

// __fdiv_rn(x, 6), tried for every mantissa.
__device__ inline float sixth(float x) {
  constexpr float kSixth = 1.0f / 6.0f;
  const float about = x * kSixth;
  return fmaf(fmaf(-6.0f, about, x), kSixth, about);
}

// A quotient, |q| < 7, times 2^-14 to what rounds half up to the code that q rounds half to even to. The midpoints are
// .25 and 1.25 2^j, which go down, and .75 and 1.75 2^j, which go up. The first step adds an ulp where the mantissa is
// above 4/3, the second takes one away: the former midpoints, and an ulp above, end below themselves and at or above.
constexpr float kToHalf = 0x1p-14f;
constexpr float kEnd = 6.5f;  // above what a block has whose scale was not cut to 448
__device__ inline float ties_to_even(float q) { return fmaf(q, 0x1.8p-25f, q) * (kToHalf * (1 - 0x1p-24f)); }

// a where the mask is set, elsewhere b; of masks and ors the compiler makes two instructions.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
}

// Two values times 2^-14 to signed codes, in the high nibbles of bytes 1 and 3, what else there is to be ignored.
// The bits of y 2^-14 in f16 are those of y in e2m1 and 9 more: the smallest exponents agree, and so do the
// subnormals. Half a unit of e2m1 is added as an integer; what then stands above the 9 bits is the code. That rounds
// half up, and exactly: truncation to f16 moves no value across a midpoint.
__device__ inline uint32_t code_pair(float low, float high) {
  uint32_t halves;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  // Shifted by 3, the code comes to bits 14..12 of its half, beside the sign.
  return select_bits(0x80008000u, halves, halves * 8 + 0x08000800u);
}

// Eight values times 2^-14 to eight nibbles, the first lowest.
__device__ inline uint32_t code_word(const float* y) {
  const uint32_t even = __byte_perm(code_pair(y[0], y[2]), code_pair(y[4], y[6]), 0x7531);
  const uint32_t odd = __byte_perm(code_pair(y[1], y[3]), code_pair(y[5], y[7]), 0x7531);
  return select_bits(0x0f0f0f0fu, even >> 4, odd);
}

struct Block {
  uint32_t codes[2];
  uint32_t scale;
};

// A block as the reference has it, value by value, for what is rare.
template <class T>
__device__ inline Block quantize_slowly(const T* x, unsigned most, float global_scale) {
  float ratio = __fdiv_rn(__fdiv_rn(__uint_as_float(most), 6.0f), global_scale);
  if (isnan(ratio)) ratio = 0.0f;  // 0 / 0, an empty row
  Block block = {{0, 0}, to_e4m3_pair(ratio, 0.0f)};
  const float step = from_e4m3_pair(block.scale).x * global_scale;
#pragma unroll 1
  for (int i = kValues - 1; i >= 0 && step > 0.0f; --i) {
    const uint32_t code = to_e2m1(__fdiv_rn(to_float(x[i]), step));
    block.codes[1] = block.codes[1] << 4 | block.codes[0] >> 28;
    block.codes[0] = block.codes[0] << 4 | code;
  }
  return block;
}

// One block, in registers and in memory: its codes and e4m3 scale. `most`: its largest magnitude.
template <class T>
__device__ inline Block quantize_block(const Values<T>& x, const T* memory, unsigned most, const Divisor& global) {
  const uint32_t scale = to_e4m3_pair(global.quotient(sixth(__uint_as_float(most))), 0.0f);
  const float step = from_e4m3_pair(scale).x * global.value;
  const Divisor by(step);
  // The scale is 2^-9 to 448 or 0, so that an ordinary step comes only of an ordinary global scale.
  const bool ordinary = step >= 0x1p-60f && step <= 0x1p60f && __uint_as_float(most) * by.below < kEnd;
  if (!ordinary) return quantize_slowly(memory, most, global.value);
  float y[kValues];
  unpack(x, y);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if constexpr (sizeof(T) == 2) {
      y[i] = ties_to_even(by.short_quotient(y[i]));
    } else {
      y[i] = copysignf(ties_to_even(by.quotient(y[i])), y[i]);
    }
  }
  return {{code_word(y), code_word(y + kValues / 2)}, scale};
}

// Where the blocks of a row go: codes and scales, or the values that these stand for but for the global scale.
struct CodeRow {
  uint8_t *codes, *scales;

  __device__ CodeRow(uint8_t* codes, uint8_t* scales, int64_t first)
      : codes(codes + first * (kValues / 2)), scales(scales + first) {}
  __device__ void store(const Block& block, uint64_t at) const {
    Vector<uint32_t, 2> words = {block.codes[0], block.codes[1]};
    store_vector(reinterpret_cast<uint32_t*>(codes) + 2 * at, words);
    scales[at] = uint8_t(block.scale);
  }
};

template <class T>
struct ValueRow {
  T* values;

  __device__ ValueRow(T* values, int64_t first) : values(values + first * kValues) {}
  // A code becomes f16 as it came of it: its sign, and three bits that are those of the value times 2^-14.
  __device__ void store(const Block& block, uint64_t at) const {
    const float factor = from_e4m3_pair(block.scale).x / kToHalf;
    float y[kValues];
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      const uint32_t byte = block.codes[i / 8] >> 4 * (i % 8), pair = (byte & 0x0f) | (byte & 0xf0) << 12;
      const uint32_t halves = (pair & 0x00080008) << 12 | (pair & 0x00070007) << 9;
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(halves));
      y[i] = both.x * factor, y[i + 1] = both.y * factor;
    }
    Values<T> out;
    pack(y, out);
    store_values(values + at * kValues, out);
  }
};

// A row whose scale is given, or a part of it: a thread has kKept blocks, blockDim.x apart.
template <int kKept, class T, class Row>
__device__ inline void quantize_row(const T* __restrict__ x, const float* __restrict__ global_scale, const Row& row,
                                    unsigned blocks) {
  const unsigned begin = blockIdx.y * blockDim.x * kKept + threadIdx.x;
  Values<T> kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const unsigned block = begin + k * blockDim.x;
    if (block < blocks) kept[k] = load_values(x + uint64_t(block) * kValues);
  }
  const Divisor global(*global_scale);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const unsigned block = begin + k * blockDim.x;
    if (block >= blocks) return;
    const T* memory = x + uint64_t(block) * kValues;
    row.store(quantize_block(kept[k], memory, largest_magnitude(kept[k]), global), block);
  }
}

// A thread block a row, whose scale goes to `global_scale`; a thread keeps kKept blocks, or none if kKept is 0.
template <int kKept, class T, class Row>
__device__ inline void quantize_token(const T* __restrict__ x, float* __restrict__ global_scale, const Row& row,
                                      unsigned blocks) {
  __shared__ unsigned scratch[kMaxThreads / kWarp];
  Values<T> kept[kKept ? kKept : 1];
  unsigned most[kKept ? kKept : 1], most_of_row = 0;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const unsigned block = k * blockDim.x + threadIdx.x;
    if (block < blocks) kept[k] = load_values(x + uint64_t(block) * kValues);
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    most[k] = k * blockDim.x + threadIdx.x < blocks ? largest_magnitude(kept[k]) : 0;
    most_of_row = max(most_of_row, most[k]);
  }
  if constexpr (kKept == 0) {
    for (unsigned block = threadIdx.x; block < blocks; block += blockDim.x)
      most_of_row = max(most_of_row, largest_magnitude(load_values(x + uint64_t(block) * kValues)));
  }
  const float scale = __fdiv_rn(__uint_as_float(block_max(most_of_row, scratch)), kLargest);
  if (threadIdx.x == 0) *global_scale = scale;
  const Divisor global(scale);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const unsigned block = k * blockDim.x + threadIdx.x;
    if (block >= blocks) return;
    const T* memory = x + uint64_t(block) * kValues;
    row.store(quantize_block(kept[k], memory, most[k], global), block);
  }
  if constexpr (kKept == 0) {
    for (unsigned block = threadIdx.x; block < blocks; block += blockDim.x) {
      const T* memory = x + uint64_t(block) * kValues;
      const Values<T> values = load_values(memory);
      row.store(quantize_block(values, memory, largest_magnitude(values), global), block);
    }
  }
}

// blockIdx.x is the row of every kernel.
template <class T, int kKept>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_nvfp4_kernel(const T* __restrict__ x, const float* __restrict__ global_scale, uint8_t* __restrict__ codes,
                          uint8_t* __restrict__ scales, unsigned blocks, int scale_stride) {
  const int64_t first = int64_t(blockIdx.x) * blocks;
  const float* scale = global_scale + int64_t(blockIdx.x) * scale_stride;
  quantize_row<kKept>(x + first * kValues, scale, CodeRow(codes, scales, first), blocks);
}

template <class T, int kKept>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_nvfp4_tokens_kernel(const T* __restrict__ x, uint8_t* __restrict__ codes, uint8_t* __restrict__ scales,
                                 float* __restrict__ global_scale, unsigned blocks) {
  const int64_t first = int64_t(blockIdx.x) * blocks;
  quantize_token<kKept>(x + first * kValues, global_scale + blockIdx.x, CodeRow(codes, scales, first), blocks);
}

template <class T, int kKept>
__global__ void __launch_bounds__(kMaxThreads)
    round_nvfp4_kernel(const T* __restrict__ x, const float* __restrict__ given_scale, T* __restrict__ out,
                       float* __restrict__ global_scale, unsigned blocks, int scale_stride) {
  const int64_t first = int64_t(blockIdx.x) * blocks;
  const float* scale = given_scale + int64_t(blockIdx.x) * scale_stride;
  if (blockIdx.y == 0 && threadIdx.x == 0) global_scale[blockIdx.x] = *scale;
  quantize_row<kKept>(x + first * kValues, scale, ValueRow<T>(out, first), blocks);
}

template <class T, int kKept>
__global__ void __launch_bounds__(kMaxThreads)
    round_nvfp4_tokens_kernel(const T* __restrict__ x, T* __restrict__ out, float* __restrict__ global_scale,
                              unsigned blocks) {
  const int64_t first = int64_t(blockIdx.x) * blocks;
  quantize_token<kKept>(x + first * kValues, global_scale + blockIdx.x, ValueRow<T>(out, first), blocks);
}

// amax(|row|) / divisor, a thread block a row. Rows that are no whole number of 16-byte vectors go value by value.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    nvfp4_global_scale_kernel(const T* __restrict__ x, float* __restrict__ out, int64_t width, bool vectors,
                              float divisor) {
  __shared__ unsigned scratch[kMaxThreads / kWarp];
  const T* row = x + int64_t(blockIdx.x) * width;
  unsigned most = 0;
  if (vectors) {
    for (int64_t at = int64_t(threadIdx.x) * kValues; at < width; at += blockDim.x * kValues)
      most = max(most, largest_magnitude(load_values(row + at)));
  } else {
    for (int64_t at = threadIdx.x; at < width; at += blockDim.x) most = max(most, magnitude(to_float(row[at])));
  }
  most = block_max(most, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = __fdiv_rn(__uint_as_float(most), divisor);
}

// `start(kKept, grid, threads)`, kKept a constant: where no row has to meet, and where it does.
template <int kKept>
using Kept = std::integral_constant<int, kKept>;

template <class Start>
cudaError_t spread_blocks(int64_t rows, int64_t blocks, Start&& start) {
  auto with = [&](auto kept) {
    const int threads = whole_warps(ceil_div(blocks, kept), kGivenThreads);
    start(kept, dim3(rows, ceil_div(blocks, threads * kept)), threads);
    return cudaGetLastError();
  };
  return rows <= kFewRows ? with(Kept<1>()) : with(Kept<2>());
}

template <class Start>
cudaError_t spread_rows(int64_t rows, int64_t blocks, Start&& start) {
  auto with = [&](auto kept) {
    start(kept, dim3(rows), whole_warps(ceil_div(blocks, kept ? kept : 1), kMaxThreads));
    return cudaGetLastError();
  };
  if (rows <= kFewRows && blocks <= kMaxThreads) return with(Kept<1>());
  if (blocks <= 2 * kMaxThreads) return with(Kept<2>());
  return blocks <= 4 * kMaxThreads ? with(Kept<4>()) : with(Kept<0>());
}

}  // namespace

cudaError_t nvfp4_global_scale(In x, float* out, int64_t rows, int64_t width, double divisor, cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    nvfp4_global_scale_kernel<T><<<rows, whole_warps(ceil_div(width, kValues), kMaxThreads), 0, stream>>>(
        static_cast<const T*>(x.data), out, width, width % kValues == 0 && aligned(x.data), float(divisor));
    return cudaGetLastError();
  });
}

cudaError_t quantize_nvfp4(In x, const float* global_scale, uint8_t* codes, Out scales, int64_t rows, int64_t width,
                           bool per_row, cudaStream_t stream) {
  if (!aligned(x.data) || !aligned(codes)) return cudaErrorMisalignedAddress;
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const unsigned blocks = width / kValues;
    return spread_blocks(rows, blocks, [&](auto kept, dim3 grid, int threads) {
      quantize_nvfp4_kernel<T, kept.value>
          <<<grid, threads, 0, stream>>>(static_cast<const T*>(x.data), global_scale, codes,
                                         static_cast<uint8_t*>(scales.data), blocks, per_row);
    });
  });
}

cudaError_t quantize_nvfp4_tokens(In x, uint8_t* codes, Out scales, float* global_scale, int64_t rows, int64_t width,
                                  cudaStream_t stream) {
  if (!aligned(x.data) || !aligned(codes)) return cudaErrorMisalignedAddress;
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const unsigned blocks = width / kValues;
    return spread_rows(rows, blocks, [&](auto kept, dim3 grid, int threads) {
      quantize_nvfp4_tokens_kernel<T, kept.value>
          <<<grid, threads, 0, stream>>>(static_cast<const T*>(x.data), codes, static_cast<uint8_t*>(scales.data),
                                         global_scale, blocks);
    });
  });
}

cudaError_t round_nvfp4(In x, Maybe<const float> given_scale, Out out, float* global_scale, int64_t rows, int64_t width,
                        bool per_row, cudaStream_t stream) {
  if (!aligned(x.data) || !aligned(out.data)) return cudaErrorMisalignedAddress;
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const auto* from = static_cast<const T*>(x.data);
    auto* to = static_cast<T*>(out.data);
    const unsigned blocks = width / kValues;
    if (given_scale.data == nullptr) {
      return spread_rows(rows, blocks, [&](auto kept, dim3 grid, int threads) {
        round_nvfp4_tokens_kernel<T, kept.value><<<grid, threads, 0, stream>>>(from, to, global_scale, blocks);
      });
    }
    return spread_blocks(rows, blocks, [&](auto kept, dim3 grid, int threads) {
      round_nvfp4_kernel<T, kept.value>
          <<<grid, threads, 0, stream>>>(from, given_scale.data, to, global_scale, blocks, per_row);
    });
  });
}

}  // namespace dsv4
