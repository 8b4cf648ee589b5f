// How a kernel is started where <<< >>> does not suffice: clusters, overlap with the launch before, much shared memory.
#pragma once

#include <cuda_runtime.h>

namespace dsv4 {

struct Grid {
  int64_t blocks;        // a multiple of `cluster`
  int threads;
  size_t shared = 0;     // bytes of dynamic shared memory; above 48 KB the kernel must have been opted in
  int cluster = 1;       // blocks of a cluster
  bool overlap = false;  // may start while the launch before runs (common/overlap.cuh)
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  }
  if (grid.overlap) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// How many clusters of 1, 2, 4, .. blocks run at once with so much shared memory, for which the kernel has been opted in,
// where one block fits a multiprocessor: not all multiprocessors can be grouped.
template <int kSizes, class... Params>
cudaError_t count_clusters(void (*kernel)(Params...), int threads, size_t shared, int (&counts)[kSizes]) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&counts[0], cudaDevAttrMultiProcessorCount, device);
  for (int bits = 1; bits < kSizes && error == cudaSuccess; ++bits) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1u << bits, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(counts[0] >> bits << bits));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&counts[bits], kernel, &config);
  }
  return error;
}

}  // namespace dsv4
