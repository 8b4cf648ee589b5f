// The launchers of mhc_boundary, mhc_pre and mhc_head: one computation with or without the post of the sublayer
// before, with 24 mixes or the head's 4.
#include "mhc/launch.cuh"

namespace dsv4 {
namespace {

// Arguments are checked in ops/mhc. With `partial` [at_once, splits, 25], its scratch, the kernel for many bf16 tokens
// runs, else the one for few tokens and f32.
template <class T>
cudaError_t launch(Tensors<T> tensors, Maybe<float> partial, int rows, int64_t tokens, int64_t hidden, int64_t at_once,
                   int64_t splits, int64_t iterations, double eps, double norm_eps, cudaStream_t stream) {
  Sizes sizes = {int(tokens), int(hidden), int(splits), int(ceil_div(hidden, 8 * splits) * 8), rows,
                 int(iterations), float(eps), float(norm_eps)};
  tensors.partial = partial.data;
  if (partial.data == nullptr) return launch_decode(tensors, sizes, stream);
  if constexpr (sizeof(T) == 2) return launch_prefill(tensors, sizes, at_once, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t mhc_boundary(In y, In x, const float* post, const float* comb, const float* fn, const float* base,
                         const float* scale, const float* norm, Out x_out, Out u, float* post_out, float* comb_out,
                         Maybe<float> partial, int64_t tokens, int64_t hidden, int64_t at_once, int64_t splits,
                         int64_t iterations, double eps, double norm_eps, cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    Tensors<T> tensors = {static_cast<const T*>(y.data), static_cast<const T*>(x.data), post, comb, fn, base, scale,
                          norm, static_cast<T*>(x_out.data), static_cast<T*>(u.data), post_out, comb_out, nullptr};
    return launch(tensors, partial, kMixes, tokens, hidden, at_once, splits, iterations, eps, norm_eps, stream);
  });
}

cudaError_t mhc_pre(In x, const float* fn, const float* base, const float* scale, Out u, float* post_out,
                    float* comb_out, Maybe<float> partial, int64_t tokens, int64_t hidden, int64_t at_once,
                    int64_t splits, int64_t iterations, double eps, double norm_eps, cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    Tensors<T> tensors = {nullptr, static_cast<const T*>(x.data), nullptr, nullptr, fn, base, scale, nullptr, nullptr,
                          static_cast<T*>(u.data), post_out, comb_out, nullptr};
    return launch(tensors, partial, kMixes, tokens, hidden, at_once, splits, iterations, eps, norm_eps, stream);
  });
}

cudaError_t mhc_head(In x, const float* fn, const float* base, const float* scale, Out u, Maybe<float> partial,
                     int64_t tokens, int64_t hidden, int64_t at_once, int64_t splits, double eps, double norm_eps,
                     cudaStream_t stream) {
  return for_float_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    Tensors<T> tensors = {nullptr, static_cast<const T*>(x.data), nullptr, nullptr, fn, base, scale, nullptr, nullptr,
                          static_cast<T*>(u.data), nullptr, nullptr, nullptr};
    return launch(tensors, partial, kStreams, tokens, hidden, at_once, splits, 1, eps, norm_eps, stream);
  });
}

}  // namespace dsv4
