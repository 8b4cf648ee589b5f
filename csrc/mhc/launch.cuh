// How mhc_boundary.cu reaches the kernels for few and for many tokens.
#pragma once

#include "mhc/mixes.cuh"

namespace dsv4 {

// mhc_decode.cu: up to 8 tokens a launch.
template <class T>
cudaError_t launch_decode(Tensors<T> tensors, Sizes sizes, cudaStream_t stream);

// mhc_prefill.cu: any number of bf16 tokens, a launch for every `at_once`; `sizes.splits` and `sizes.columns` set.
cudaError_t launch_prefill(Tensors<bf16> tensors, Sizes sizes, int64_t at_once, cudaStream_t stream);

}  // namespace dsv4
