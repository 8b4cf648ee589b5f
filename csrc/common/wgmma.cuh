// Products of a warpgroup, wgmma of sm_90a: four warps multiply tiles that lie in shared memory, asynchronously.
//
// An operand lies there in rows of 128 bytes, 64 values of bf16, in groups of eight rows that begin at a multiple of
// 1,024 bytes. The 16-byte piece p of row r of a group lies at place p ^ r: eight lanes that write one piece of eight
// rows, or one row, meet no bank twice, and neither do the tensor cores. A matrix wider than 64 columns is several such
// blocks of columns, one after another. Rows may be those of M or N, the columns being K (k_major), or those of K, the
// columns being N (mn_major): a tile of keys [entries][512] is the first for S = Q K^T and the second for P V.
//
// Order of things: writes by ordinary stores or cp.async become visible to wgmma by publish_to_wgmma(); accumulators
// that other instructions wrote, by wgmma_begin(); then products; wgmma_commit(); wgmma_wait<0>() and keep_results().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

constexpr int kSwizzleRow = 128;               // bytes
constexpr int kSwizzleGroup = 8 * kSwizzleRow;  // after which the places of pieces repeat

// Where byte 16 * piece of row `row` lies in a block of 64 columns.
__host__ __device__ constexpr int swizzled(int row, int piece) {
  return row * kSwizzleRow + ((piece ^ (row % 8)) * 16);
}

// The descriptor of an operand at `shared`: bits 0-13 its address, 16-29 and 32-45 two strides, all in units of 16
// bytes; bits 62-63 = 1 say that rows are 128 bytes and swizzled. Adding bytes / 16 moves the operand.
__device__ inline uint64_t describe_operand(uint32_t shared, int leading_bytes, int stride_bytes) {
  return uint64_t((shared & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(1) << 62;
}
// Rows of M or N, eight of them every 1,024 bytes. The next 16 columns of K are 32 bytes further within a block, and
// the first stride, which this form does not use, is 16 bytes by convention.
__device__ inline uint64_t k_major(uint32_t shared) { return describe_operand(shared, 16, kSwizzleGroup); }
// Rows of K, eight of them every 1,024 bytes; blocks of 64 columns of N, `block_bytes` apart. The next 16 rows of K are
// 2,048 bytes further.
__device__ inline uint64_t mn_major(uint32_t shared, int block_bytes) {
  return describe_operand(shared, block_bytes, kSwizzleGroup);
}

// Shared memory that was written by ordinary stores or cp.async, by this thread or by those it has waited for, may be
// read by wgmma and bulk copies after this.
__device__ inline void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }
// Keeps what reads or writes accumulators on its side of a wait: to the compiler they are finished when a product
// has been issued.
template <int kCount>
__device__ inline void keep_results(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers of every thread of this warpgroup from here on, a multiple of 8. Taken together they may not exceed what
// the block was started with; `take` waits until another warpgroup has given.
template <int kCount>
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)); }
template <int kCount>
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)); }

// A barrier of `threads` threads of a block, whole warps; id 0 is that of __syncthreads.
__device__ inline void sync_threads_of(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrive at a barrier in shared memory (common/barrier.cuh) once all cp.async of this thread so far are done.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Operands of inline assembly: the first 16 or 128 by number, and as many accumulators.
#define DSV4_FIRST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV4_FIRST_32 \
  DSV4_FIRST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_FIRST_128                                                                                     \
  DSV4_FIRST_16                                                                                            \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
  "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "   \
  "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "     \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DSV4_SUMS_4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define DSV4_SUMS_16(i) DSV4_SUMS_4(i), DSV4_SUMS_4((i) + 4), DSV4_SUMS_4((i) + 8), DSV4_SUMS_4((i) + 12)
#define DSV4_SUMS_64(i) DSV4_SUMS_16(i), DSV4_SUMS_16((i) + 16), DSV4_SUMS_16((i) + 32), DSV4_SUMS_16((i) + 48)

// d = a b^T, plus d if `add`: a 64 x 16 and b 32 x 16 bf16, both k_major; fp32 sums. Lane 4 g + t of warp w holds rows
// 16 w + g, in d[4 j] and d[4 j + 1], and 16 w + g + 8, in d[4 j + 2] and d[4 j + 3], of columns 8 j + 2 t and + 1.
__device__ inline void wgmma_64x32(float (&d)[16], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" DSV4_FIRST_16 "}, %16, %17, add, 1, 1, 0, 0;\n"
      "}"
      : DSV4_SUMS_16(0)
      : "l"(a), "l"(b), "r"(int(add)));
}

// d = a b^T, plus d if `add`: b 64 x 16, k_major; of a, 64 x 16, each warp has 16 rows in registers, laid out like the
// a of mma_bf16 (common/mma.cuh), which may not change before the wait. Sums as above, four more for 8 more columns.
__device__ inline void wgmma_64x64_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_FIRST_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
      "}"
      : DSV4_SUMS_16(0), DSV4_SUMS_16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

// d = a b, plus d if `add`: a 64 x 16, k_major, and b 16 x 256, mn_major; lanes as above.
__device__ inline void wgmma_64x256_mn(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" DSV4_FIRST_128 "}, %128, %129, add, 1, 1, 0, 1;\n"
      "}"
      : DSV4_SUMS_64(0), DSV4_SUMS_64(64)
      : "l"(a), "l"(b), "r"(int(add)));
}

}  // namespace dsv4
