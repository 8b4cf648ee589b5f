// Barriers in shared memory that count the bytes of copies and of stores between blocks of a cluster.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

// Addresses are those of shared memory (32 bits); a barrier takes 8 bytes. One thread makes it, the others use it after
// a barrier of the block, or of the cluster if its blocks write here.
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

// What this thread wrote to shared memory, or read of it, stands before the bulk copies that follow, its own or behind
// a barrier.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The address of the same place in the shared memory of block `rank` of this cluster.
__device__ inline uint32_t place_in_block(uint32_t mine, int rank) {
  uint32_t place;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(mine), "r"(rank));
  return place;
}
// Store to a place in another block's shared memory; a barrier there counts it.
__device__ inline void store_counted(uint32_t place, uint32_t barrier, const float4& v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(place),
      "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
// Store to the same place in the shared memory of block `rank` of this cluster; its barrier of the same place counts
// it.
__device__ inline void store_remote_counted(uint32_t mine, uint32_t barrier, int rank, const float4& v) {
  store_counted(place_in_block(mine, rank), place_in_block(barrier, rank), v);
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
