// Thread-block clusters: barrier, and stores into another block's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

// Arrive and wait apart: what a thread does between them overlaps with the slower threads of the cluster. Writes
// before an arrival, remote ones too, are visible after the wait. Whole warps only.
__device__ inline void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// An arrival that makes no writes visible: all that this thread read before it has been read.
__device__ inline void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Store to the same place in the shared memory of block `rank` of this cluster.
__device__ inline void store_remote(float* mine, int rank, float value) {
  uint32_t local = uint32_t(__cvta_generic_to_shared(mine)), remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

}  // namespace dsv4
