// Every launcher of csrc/, as bindings.cpp calls it. A launcher starts its kernel on `stream` and returns at once.
//
// Argument types say what the binding checks: `const float*` is a contiguous f32 CUDA tensor, `In` and `Out` one of
// any dtype that the launcher looks at, `Maybe<T>` a tensor that may be absent. Shapes are checked in dsv4/ops.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4 {

enum class Type { f32, bf16, u8, e4m3, e8m0, i64, other };

struct In {
  const void* data;
  Type type;
};

struct Out {
  void* data;
  Type type;
};

// A tensor or nothing.
template <class T>
struct Maybe {
  T* data;
};

// room norm
cudaError_t rms_norm(In x, Maybe<const float> weight, Out out, int64_t rows, int64_t width, double eps,
                     cudaStream_t stream);

// room mhc
cudaError_t mhc_boundary(In y, In x, const float* post, const float* comb, const float* fn, const float* base,
                         const float* scale, const float* norm, Out x_out, Out u, float* post_out, float* comb_out,
                         float* partial, int64_t tokens, int64_t hidden, int64_t splits, int64_t iterations,
                         double eps, double norm_eps, cudaStream_t stream);
cudaError_t mhc_pre(In x, const float* fn, const float* base, const float* scale, Out u, float* post_out,
                    float* comb_out, float* partial, int64_t tokens, int64_t hidden, int64_t splits,
                    int64_t iterations, double eps, double norm_eps, cudaStream_t stream);
cudaError_t mhc_head(In x, const float* fn, const float* base, const float* scale, Out u, float* partial,
                     int64_t tokens, int64_t hidden, int64_t splits, double eps, double norm_eps,
                     cudaStream_t stream);
cudaError_t mhc_post(In y, In x, const float* post, const float* comb, Out out, int64_t tokens, int64_t hidden,
                     cudaStream_t stream);
cudaError_t sinkhorn_normalize(const float* logits, float* out, int64_t matrices, int64_t iterations, double eps,
                               cudaStream_t stream);

// room compressor
cudaError_t compress_kv(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                        const float* norm, const float* inv_freq, Out out, int64_t tokens, int64_t ratio, int64_t width,
                        int64_t rotary, int64_t start, bool overlap, double eps, cudaStream_t stream);

// room embed
cudaError_t embed_streams(const int64_t* token_ids, In table, Out out, int64_t tokens, int64_t width,
                          int64_t num_streams, cudaStream_t stream);

// room router
cudaError_t gate_logits(In x, In weight, float* out, int64_t tokens, int64_t num_experts, int64_t width,
                        cudaStream_t stream);
cudaError_t topk_gate(const float* logits, const float* bias, float* weights, int64_t* experts, int64_t tokens,
                      int64_t num_experts, int64_t top_k, double scale, cudaStream_t stream);
cudaError_t hash_gate(const float* logits, const int64_t* token_ids, const int64_t* tid2eid, float* weights,
                      int64_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k, double scale,
                      cudaStream_t stream);

// room sampling
cudaError_t sample_largest(const float* logits, int64_t* out, int64_t vocab, cudaStream_t stream);
cudaError_t sample_ranked(const float* ranked, const int64_t* ids, int64_t* out, int64_t vocab, double temperature,
                          int64_t top_k, double top_p, double min_p, int64_t seed, int64_t position,
                          cudaStream_t stream);

// room quant
cudaError_t nvfp4_global_scale(In x, float* out, int64_t rows, int64_t width, double divisor, cudaStream_t stream);
cudaError_t quantize_nvfp4(In x, const float* global_scale, uint8_t* codes, Out scales, int64_t rows, int64_t width,
                           bool per_row, cudaStream_t stream);
cudaError_t quantize_nvfp4_tokens(In x, uint8_t* codes, Out scales, float* global_scale, int64_t rows, int64_t width,
                                  cudaStream_t stream);
cudaError_t quantize_fp8(In x, Out codes, Out scales, int64_t rows, int64_t width, int64_t block, cudaStream_t stream);
cudaError_t round_fp8(In x, Out out, int64_t rows, int64_t width, int64_t block, cudaStream_t stream);
cudaError_t round_kv(In kv, Out out, int64_t rows, int64_t width, int64_t rope_dim, int64_t block,
                     cudaStream_t stream);
cudaError_t rotate_hadamard(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream);
cudaError_t round_index(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream);

// room rope
cudaError_t apply_rope(In x, const int64_t* positions, const float* inv_freq, Out out, int64_t tokens, int64_t heads,
                       int64_t width, int64_t pairs, bool inverse, cudaStream_t stream);
cudaError_t rms_norm_rope(In x, Maybe<const float> weight, const int64_t* positions, const float* inv_freq, Out out,
                          int64_t tokens, int64_t heads, int64_t width, int64_t pairs, double eps,
                          cudaStream_t stream);

// benchmarks
cudaError_t read_stream(const float* x, float* out, int64_t vectors, int64_t blocks, cudaStream_t stream);

}  // namespace dsv4
