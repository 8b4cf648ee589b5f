// Thread-block clusters: rank, barrier, and stores into another block's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

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
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Store to the same place in the shared memory of block `rank` of this cluster.
__device__ inline void store_remote(float* mine, int rank, float value) {
  uint32_t local = uint32_t(__cvta_generic_to_shared(mine)), remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// Launch `kernel` in clusters of `size` blocks. Sizes above 8 and shared memory above 48 KB are opted into once.
template <class... Params, class... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int64_t clusters, int size, int threads, size_t shared_bytes,
                            cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(clusters * size));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace dsv4
