// Every launcher of csrc/, as bindings.cpp calls it. A launcher starts its kernel on `stream` and returns at once.
//
// Argument types say what the binding checks: `const float*` is a contiguous f32 CUDA tensor, `In` and `Out` one of
// any dtype that the launcher looks at, `Maybe<T>` a tensor that may be absent. Shapes are checked in dsv4/ops.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4 {

enum class Type { f32, bf16, u8, e4m3, e8m0, i32, i64, other };

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

// A tensor of any dtype, or nothing.
struct MaybeIn {
  const void* data;
  Type type;
};

// Several tensors of any dtype, or integers, for one launch.
constexpr int kMaxList = 8;
struct TensorList {
  Out at[kMaxList];
  int count;
};
struct IntegerList {
  int64_t at[kMaxList];
  int count;
};

// room norm
cudaError_t rms_norm(In x, Maybe<const float> weight, Out out, int64_t rows, int64_t width, double eps,
                     cudaStream_t stream);

// room mhc
cudaError_t mhc_boundary(In y, In x, const float* post, const float* comb, const float* fn, const float* base,
                         const float* scale, const float* norm, Out x_out, Out u, float* post_out, float* comb_out,
                         Maybe<float> partial, int64_t tokens, int64_t hidden, int64_t at_once, int64_t splits,
                         int64_t iterations, double eps, double norm_eps, cudaStream_t stream);
cudaError_t mhc_pre(In x, const float* fn, const float* base, const float* scale, Out u, float* post_out,
                    float* comb_out, Maybe<float> partial, int64_t tokens, int64_t hidden, int64_t at_once,
                    int64_t splits, int64_t iterations, double eps, double norm_eps, cudaStream_t stream);
cudaError_t mhc_head(In x, const float* fn, const float* base, const float* scale, Out u, Maybe<float> partial,
                     int64_t tokens, int64_t hidden, int64_t at_once, int64_t splits, double eps, double norm_eps,
                     cudaStream_t stream);
cudaError_t mhc_post(In y, In x, const float* post, const float* comb, Out out, int64_t tokens, int64_t hidden,
                     cudaStream_t stream);
cudaError_t sinkhorn_normalize(const float* logits, float* out, int64_t matrices, int64_t iterations, double eps,
                               cudaStream_t stream);

// room compressor
cudaError_t compress_kv(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                        const float* norm, const float* inv_freq, Out out, int64_t tokens, int64_t ratio, int64_t width,
                        int64_t rotary, int64_t start, bool overlap, double eps, cudaStream_t stream);

// Entries that are not completed are left out of `out` and have -1 in `slots`.
cudaError_t compress_step(const float* kv, const float* gate, const float* ape, float* tail_kv, float* tail_gate,
                          const float* norm, const float* inv_freq, const int64_t* positions, Out out, int64_t* slots,
                          int64_t tokens, int64_t entries, int64_t ratio, int64_t width, int64_t rotary, bool overlap,
                          double eps, cudaStream_t stream);

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
cudaError_t route_topk(In x, Maybe<const float> token_scale, In weight, Maybe<const float> weight_scale,
                       const float* bias, float* weights, int64_t* experts, int64_t tokens, int64_t num_experts,
                       int64_t width, int64_t top_k, double scale, cudaStream_t stream);
cudaError_t route_hash(In x, Maybe<const float> token_scale, In weight, Maybe<const float> weight_scale,
                       const int64_t* token_ids, const int64_t* tid2eid, float* weights, int64_t* experts,
                       int64_t tokens, int64_t num_experts, int64_t width, int64_t top_k, double scale,
                       cudaStream_t stream);

// room sampling
cudaError_t sample_largest(const float* logits, int64_t* out, int64_t vocab, cudaStream_t stream);
cudaError_t argmax_head(In x, In w, const uint8_t* codes, const float* scale, const float* error, const float* norm,
                        float* upper, int64_t* out, int64_t vocab, int64_t width, int64_t padded, cudaStream_t stream);
cudaError_t sample_ranked(const float* ranked, const int64_t* ids, int64_t* out, int64_t vocab, double temperature,
                          int64_t top_k, double top_p, double min_p, int64_t seed, int64_t position,
                          cudaStream_t stream);

// room quant
cudaError_t nvfp4_global_scale(In x, float* out, int64_t rows, int64_t width, double divisor, cudaStream_t stream);
cudaError_t quantize_nvfp4(In x, const float* global_scale, uint8_t* codes, Out scales, int64_t rows, int64_t width,
                           bool per_row, cudaStream_t stream);
cudaError_t quantize_nvfp4_tokens(In x, uint8_t* codes, Out scales, float* global_scale, int64_t rows, int64_t width,
                                  cudaStream_t stream);
cudaError_t round_nvfp4(In x, Maybe<const float> given_scale, Out out, float* global_scale, int64_t rows, int64_t width,
                        bool per_row, cudaStream_t stream);
cudaError_t quantize_fp8(In x, Out codes, Out scales, int64_t rows, int64_t width, int64_t block, cudaStream_t stream);
cudaError_t round_fp8(In x, Out out, int64_t rows, int64_t width, int64_t block, cudaStream_t stream);
cudaError_t round_kv(In kv, Out out, int64_t rows, int64_t width, int64_t rope_dim, int64_t block,
                     cudaStream_t stream);
cudaError_t rotate_hadamard(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream);
cudaError_t round_index(In x, Out out, int64_t rows, int64_t width, double factor, cudaStream_t stream);

// room rows. Row t of x, `width` values, goes into row slots[t] mod `rows` of the table, of `row_width` elements each.
cudaError_t store_rows(In x, Out table, const int64_t* slots, int64_t count, int64_t width, int64_t rows,
                       int64_t row_width, cudaStream_t stream);
cudaError_t load_rows(const uint8_t* table, Out out, int64_t count, cudaStream_t stream);

// room pack
cudaError_t pack_weight(const uint8_t* codes, In scales, uint8_t* data, int64_t rows, int64_t columns,
                        cudaStream_t stream);
cudaError_t unpack_weight(const uint8_t* data, uint8_t* codes, Out scales, int64_t rows, int64_t columns,
                          cudaStream_t stream);

// room rope
cudaError_t apply_rope(In x, const int64_t* positions, const float* inv_freq, Out out, int64_t tokens, int64_t heads,
                       int64_t width, int64_t pairs, bool inverse, cudaStream_t stream);
cudaError_t rms_norm_rope(In x, Maybe<const float> weight, const int64_t* positions, const float* inv_freq, Out out,
                          int64_t tokens, int64_t heads, int64_t width, int64_t pairs, double eps,
                          cudaStream_t stream);

// room gemm. Kinds are those of gemm/units.cuh; `columns` is K of one group; `scales` of a format without are not read.
cudaError_t gemv_mma(In x, Maybe<const float> token_scale, TensorList weights, TensorList scales, TensorList outs,
                     IntegerList kinds, IntegerList rows, int64_t tokens, int64_t columns, int64_t groups, bool overlap,
                     cudaStream_t stream);

cudaError_t gemm_tiles(In x, In weight, MaybeIn scales, Maybe<const float> token_scale,
                       Maybe<const float> global_scale, Out out, int64_t kind, int64_t tokens, int64_t rows,
                       int64_t columns, int64_t groups, int64_t x_stride, int64_t out_stride, cudaStream_t stream);
// out[p] = W_e x[index[p] / slots] for the pairs p of each expert e; index absent: x[p]. Tables as in room moe;
// `matrix` is 0 for w1, 1 for w3, 2 for w2.
cudaError_t gemm_tiles_experts(In x, Maybe<const int32_t> index, const int32_t* offset, const int64_t* addresses,
                               const float* global_scales, Maybe<const float> token_scale, Out out, int64_t kind,
                               bool e8m0, int64_t matrix, int64_t pairs, int64_t experts, int64_t slots, int64_t rows,
                               int64_t columns, int64_t x_stride, int64_t out_stride, cudaStream_t stream);

// room moe. Tables of a side (the routed experts, the shared one): addresses [E, 3, 2] of w1, w3, w2 and of the scales
// of their FP8 blocks, global scales [E, 3]. Kinds are those of gemm/units.cuh.
cudaError_t experts_gate_up(In x, In shared_x, const float* routing, const int64_t* chosen, const int64_t* addresses,
                            const float* global_scales, const int64_t* shared_addresses,
                            const float* shared_global_scales, Out hidden, Out shared_hidden, int64_t experts,
                            int64_t tokens, int64_t slots, int64_t width, int64_t inner, int64_t shared_inner,
                            int64_t kind, bool e8m0, int64_t shared_kind, bool shared_e8m0, double limit, bool overlap,
                            cudaStream_t stream);
cudaError_t experts_down(In hidden, In shared_hidden, const int64_t* chosen, const int64_t* addresses,
                         const float* global_scales, const int64_t* shared_addresses,
                         const float* shared_global_scales, Out out, int64_t experts, int64_t tokens, int64_t slots,
                         int64_t width, int64_t inner, int64_t shared_inner, int64_t kind, bool e8m0,
                         int64_t shared_kind, bool shared_e8m0, bool overlap, cudaStream_t stream);

// For many tokens. Pairs are flat indices token * slots + slot; `order` are the pairs by expert, ascending in each,
// those of expert e at offset[e] .. offset[e + 1] - 1, and `place` is where each pair stands there.
cudaError_t group_by_expert(const int64_t* chosen, int32_t* offset, int32_t* order, int32_t* place, int64_t pairs,
                            int64_t experts, cudaStream_t stream);
// Row p of gate, up and h belongs to pair order[p], or p; without routing every pair's weight is 1.
cudaError_t swiglu_pairs(const float* gate, const float* up, Maybe<const float> routing, Maybe<const int32_t> order,
                         Out h, int64_t pairs, int64_t width, double limit, cudaStream_t stream);
// out[t] = sum over slots of down[place[t * slots + slot]], then shared[t]; fp32, rounded once.
cudaError_t sum_slots(const float* down, const int32_t* place, Maybe<const float> shared, Out out, int64_t tokens,
                      int64_t slots, int64_t width, cudaStream_t stream);

// room attention, up to 8 tokens. Window rows and entries are KV records (u8), or plain rows of q's dtype. `ring` and
// `entries` are the rows of the tables; of compressed, either the entries below (position + 1) / ratio or selected[t].
// bf16, heads of 512 values; `splits` blocks, 8 or 16, divide a query's rows, 0: chosen by the sizes.
cudaError_t attend_step(In q, In window_rows, const float* sink, const int64_t* positions, const float* inv_freq,
                        MaybeIn compressed, Maybe<const int32_t> selected, Out out, int64_t tokens, int64_t heads,
                        int64_t window, int64_t ring, int64_t entries, int64_t ratio, int64_t top_k, int64_t splits,
                        cudaStream_t stream);
// Both in f32; `ring`: position p stands in row p mod rows, otherwise the last row is the last query's own.
cudaError_t attend_f32(const float* q, const float* window_rows, const float* sink, const int64_t* positions,
                       const float* inv_freq, Maybe<const float> compressed, Maybe<const int64_t> visible,
                       Maybe<const int32_t> selected, float* out, int64_t tokens, int64_t heads, int64_t rows,
                       int64_t window, int64_t entries, int64_t ratio, int64_t top_k, bool ring, cudaStream_t stream);

// room attention, prefill: bf16, heads of 512 values. Of compressed, either all entries below visible[t] or
// selected[t].
cudaError_t attend_tiles(In q, In window_kv, const float* sink, const int64_t* positions, const float* inv_freq,
                         MaybeIn compressed, Maybe<const int64_t> visible, Maybe<const int32_t> selected, Out out,
                         int64_t tokens, int64_t heads, int64_t before, int64_t window, int64_t entries, int64_t top_k,
                         bool small, cudaStream_t stream);
cudaError_t attend_wgmma(In q, In window_kv, const float* sink, const int64_t* positions, const float* inv_freq,
                         MaybeIn compressed, Maybe<const int64_t> visible, Maybe<const int32_t> selected, Out out,
                         int64_t tokens, int64_t heads, int64_t before, int64_t window, int64_t entries, int64_t top_k,
                         cudaStream_t stream);

// room indexer: keys [C, 128] bf16 or index records [C, 68]; heads of 128 values, up to 128 of them. Of the entries
// that a query sees, none is scored where they are not more than `least`. portable: mma.sync on every architecture.
// best [T, 4 ceil(C / 64)]: of every 16 entries the largest score, as an integer of the same order (common/order.cuh).
cudaError_t index_scores(In q, In keys, const float* weights, const int64_t* visible, float* out, Maybe<int32_t> best,
                         int64_t tokens, int64_t heads, int64_t entries, int64_t least, bool portable,
                         cudaStream_t stream);
cudaError_t index_scores_f32(const float* q, const float* keys, const float* weights, const int64_t* visible,
                             float* out, int64_t tokens, int64_t heads, int64_t entries, int64_t least,
                             cudaStream_t stream);
// out [T, min(top_k, C)]. Where no more than top_k entries are visible, no score is read.
// best: what index_scores left of up to 8 rows, or nothing.
cudaError_t select_topk(const float* scores, Maybe<const int32_t> best, const int64_t* visible, int32_t* out,
                        int64_t tokens, int64_t entries, int64_t top_k, cudaStream_t stream);

// benchmarks
cudaError_t read_stream(const float* x, float* out, int64_t vectors, int64_t blocks, cudaStream_t stream);

}  // namespace dsv4
