// Barriers in shared memory that count the bytes of copies and of stores between blocks of a cluster.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

// Addresses are those of shared memory (32 bits); a barrier takes 8 bytes. One thread makes it, the others use it after a
// barrier of the block, or of the cluster if its blocks write here.
__device__ inline void make_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes new barriers known to copies and to the cluster.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrive, and add to the bytes that this phase waits for.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void wait_barrier(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra.uni ended;\n"
      "bra.uni again;\n"
      "ended:\n"
      "}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Copy `bytes`, a multiple of 16, from global to shared memory; the barrier counts them when they are there.
__device__ inline void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// Copy `bytes`, a multiple of 16, from this block's shared memory to the place `there` of block `rank` of this cluster, whose
// barrier of that place counts them. What was written here must have been fenced for copies.
__device__ inline void copy_bulk_remote(uint32_t there, uint32_t from, int bytes, uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, %4;\n"
      "mapa.shared::cluster.u32 counter, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [place], [%1], %2, [counter];\n"
      "}" ::"r"(there), "r"(from), "r"(bytes), "r"(barrier), "r"(rank)
      : "memory");
}
// What this thread wrote to shared memory stands before the bulk copies that follow, its own or behind a barrier.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Store to the same place in the shared memory of block `rank` of this cluster; its barrier of the same place counts it.
__device__ inline void store_remote_counted(uint32_t mine, uint32_t barrier, int rank, const float4& v) {
  asm volatile(
      "{\n"
      ".reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {%3, %4, %5, %6}, [counter];\n"
      "}" ::"r"(mine), "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// Arrive at a barrier of this block: what this thread has written or read before, or its warp before a __syncwarp, is
// known to who waits.
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive at the barrier of the same place in block `rank` of this cluster: what this thread has read, or its warp
// before a __syncwarp, may be overwritten.
__device__ inline void arrive_remote(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 counter;\n"
      "mapa.shared::cluster.u32 counter, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [counter];\n"
      "}" ::"r"(barrier), "r"(rank)
      : "memory");
}

}  // namespace dsv4
