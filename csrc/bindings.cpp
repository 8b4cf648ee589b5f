// The torch extension: one line per operation, on PyTorch's stable ABI, so that one library serves every torch >= 2.11.
//
// Each operation forwards to the launcher of the same name (launchers.h): tensors become pointers, the current stream
// of their device is appended. Outputs are allocated by the caller.
#include "launchers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

// A CPU build of torch loads this library too, and has no streams. (A CUDA build brings the symbol through libtorch.so.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using dsv4::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Byte: return Type::u8;
    case ScalarType::Float8_e4m3fn: return Type::e4m3;
    case ScalarType::Float8_e8m0fnu: return Type::e8m0;
    case ScalarType::Int: return Type::i32;
    case ScalarType::Long: return Type::i64;
    default: return Type::other;
  }
}

template <class T>
constexpr Type kType = Type::other;
template <>
constexpr Type kType<float> = Type::f32;
template <>
constexpr Type kType<int32_t> = Type::i32;
template <>
constexpr Type kType<int64_t> = Type::i64;
template <>
constexpr Type kType<uint8_t> = Type::u8;

void* checked(const Tensor& tensor, const char* op) {
  STD_TORCH_CHECK(tensor.is_cuda(), "dsv4::", op, ": expected a CUDA tensor, found one of another device");
  STD_TORCH_CHECK(tensor.is_contiguous(), "dsv4::", op, ": expected a contiguous tensor, found one that is not");
  return tensor.data_ptr();
}

// How one parameter of a launcher is made of one argument of the operation.
template <class Param>
struct Argument {
  static_assert(std::is_integral_v<Param> || std::is_floating_point_v<Param>);
  using Boxed = std::conditional_t<std::is_same_v<Param, bool>, bool,
                                   std::conditional_t<std::is_integral_v<Param>, int64_t, double>>;
  static Param get(Boxed value, const char*) { return static_cast<Param>(value); }
};
template <class T>
struct Argument<T*> {
  using Boxed = Tensor;
  static T* get(const Tensor& tensor, const char* op) {
    STD_TORCH_CHECK(type_of(tensor) == kType<std::remove_const_t<T>>, "dsv4::", op, ": a tensor has the wrong dtype");
    return static_cast<T*>(checked(tensor, op));
  }
};
template <>
struct Argument<dsv4::In> {
  using Boxed = Tensor;
  static dsv4::In get(const Tensor& tensor, const char* op) { return {checked(tensor, op), type_of(tensor)}; }
};
template <>
struct Argument<dsv4::Out> {
  using Boxed = Tensor;
  static dsv4::Out get(const Tensor& tensor, const char* op) { return {checked(tensor, op), type_of(tensor)}; }
};
template <class T>
struct Argument<dsv4::Maybe<T>> {
  using Boxed = std::optional<Tensor>;
  static dsv4::Maybe<T> get(const Boxed& tensor, const char* op) {
    return {tensor.has_value() ? Argument<T*>::get(*tensor, op) : nullptr};
  }
};

template <>
struct Argument<dsv4::MaybeIn> {
  using Boxed = std::optional<Tensor>;
  static dsv4::MaybeIn get(const Boxed& tensor, const char* op) {
    if (!tensor.has_value()) return {nullptr, Type::other};
    return {checked(*tensor, op), type_of(*tensor)};
  }
};
template <class List, class Item>
List checked_list(const std::vector<Item>& items, const char* op, List list = {}) {
  STD_TORCH_CHECK(items.size() <= dsv4::kMaxList, "dsv4::", op, ": a list has more than ", dsv4::kMaxList, " items");
  list.count = int(items.size());
  return list;
}
template <>
struct Argument<dsv4::TensorList> {
  using Boxed = std::vector<Tensor>;
  static dsv4::TensorList get(const Boxed& tensors, const char* op) {
    auto list = checked_list<dsv4::TensorList>(tensors, op);
    for (int i = 0; i < list.count; ++i) list.at[i] = Argument<dsv4::Out>::get(tensors[i], op);
    return list;
  }
};
template <>
struct Argument<dsv4::IntegerList> {
  using Boxed = std::vector<int64_t>;
  static dsv4::IntegerList get(const Boxed& integers, const char* op) {
    auto list = checked_list<dsv4::IntegerList>(integers, op);
    std::copy(integers.begin(), integers.end(), list.at);
    return list;
  }
};

template <class Boxed>
const Tensor* as_tensor(const Boxed& value) {
  if constexpr (std::is_same_v<Boxed, Tensor>) return &value;
  return nullptr;
}

// The boxed function that torch calls: arguments off the stack, launch on the current stream, complain by name.
template <auto launcher, class... Params>
struct Operation {
  static inline const char* name = "";

  template <size_t... I>
  static cudaError_t call(const std::tuple<typename Argument<Params>::Boxed...>& args, cudaStream_t stream,
                          std::index_sequence<I...>) {
    return launcher(Argument<Params>::get(std::get<I>(args), name)..., stream);
  }

  static void boxed(StableIValue* stack, uint64_t, uint64_t) {
    auto args = torch::stable::detail::unbox_to_tuple<typename Argument<Params>::Boxed...>(stack);
    const Tensor* first = nullptr;
    std::apply([&](const auto&... arg) { ((first = first ? first : as_tensor(arg)), ...); }, args);
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "dsv4::", name, ": this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first->get_device_index(), &stream));
    cudaError_t error = call(args, static_cast<cudaStream_t>(stream), std::index_sequence_for<Params...>());
    STD_TORCH_CHECK(error != cudaErrorNotSupported, "dsv4::", name, " is not built for this architecture");
    STD_TORCH_CHECK(error == cudaSuccess, "dsv4::", name, ": ", cudaGetErrorString(error));
  }
};

template <auto launcher>
struct OperationOf;
template <class... Params, cudaError_t (*launcher)(Params...)>
struct OperationOf<launcher> {
  template <class Tuple, class Index>
  struct Strip;
  template <class Tuple, size_t... I>
  struct Strip<Tuple, std::index_sequence<I...>> {
    using type = Operation<launcher, std::tuple_element_t<I, Tuple>...>;
  };
  // The last parameter is the stream.
  using type = typename Strip<std::tuple<Params...>, std::make_index_sequence<sizeof...(Params) - 1>>::type;
};

}  // namespace

// clang-format off
#define DSV4_OPERATIONS(OP) \
  OP(compress_kv, "(Tensor kv, Tensor gate, Tensor ape, Tensor(a!) tail_kv, Tensor(b!) tail_gate, Tensor norm, Tensor inv_freq, Tensor(c!) out, int tokens, int ratio, int width, int rotary, int start, bool overlap, float eps) -> ()") \
  OP(compress_step, "(Tensor kv, Tensor gate, Tensor ape, Tensor(a!) tail_kv, Tensor(b!) tail_gate, Tensor norm, Tensor inv_freq, Tensor positions, Tensor(c!) out, Tensor(d!) slots, int tokens, int entries, int ratio, int width, int rotary, bool overlap, float eps) -> ()") \
  OP(nvfp4_global_scale, "(Tensor x, Tensor(a!) out, int rows, int width, float divisor) -> ()") \
  OP(quantize_nvfp4, "(Tensor x, Tensor global_scale, Tensor(a!) codes, Tensor(b!) scales, int rows, int width, bool per_row) -> ()") \
  OP(quantize_nvfp4_tokens, "(Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) global_scale, int rows, int width) -> ()") \
  OP(round_nvfp4, "(Tensor x, Tensor? given_scale, Tensor(a!) out, Tensor(b!) global_scale, int rows, int width, bool per_row) -> ()") \
  OP(quantize_fp8, "(Tensor x, Tensor(a!) codes, Tensor(b!) scales, int rows, int width, int block) -> ()") \
  OP(round_fp8, "(Tensor x, Tensor(a!) out, int rows, int width, int block) -> ()") \
  OP(round_kv, "(Tensor kv, Tensor(a!) out, int rows, int width, int rope_dim, int block) -> ()") \
  OP(rotate_hadamard, "(Tensor x, Tensor(a!) out, int rows, int width, float factor) -> ()") \
  OP(round_index, "(Tensor x, Tensor(a!) out, int rows, int width, float factor) -> ()") \
  OP(store_rows, "(Tensor x, Tensor(a!) table, Tensor slots, int count, int width, int rows, int row_width) -> ()") \
  OP(load_rows, "(Tensor table, Tensor(a!) out, int count) -> ()") \
  OP(pack_weight, "(Tensor codes, Tensor scales, Tensor(a!) data, int rows, int columns) -> ()") \
  OP(unpack_weight, "(Tensor data, Tensor(a!) codes, Tensor(b!) scales, int rows, int columns) -> ()") \
  OP(apply_rope, "(Tensor x, Tensor positions, Tensor inv_freq, Tensor(a!) out, int tokens, int heads, int width, int pairs, bool inverse) -> ()") \
  OP(rms_norm_rope, "(Tensor x, Tensor? weight, Tensor positions, Tensor inv_freq, Tensor(a!) out, int tokens, int heads, int width, int pairs, float eps) -> ()") \
  OP(read_stream, "(Tensor x, Tensor(a!) out, int vectors, int blocks) -> ()") \
  OP(mhc_boundary, "(Tensor y, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor base, Tensor scale, Tensor norm, Tensor(a!) x_out, Tensor(b!) u, Tensor(c!) post_out, Tensor(d!) comb_out, Tensor(e!)? partial, int tokens, int hidden, int at_once, int splits, int iterations, float eps, float norm_eps) -> ()") \
  OP(mhc_pre, "(Tensor x, Tensor fn, Tensor base, Tensor scale, Tensor(a!) u, Tensor(b!) post_out, Tensor(c!) comb_out, Tensor(d!)? partial, int tokens, int hidden, int at_once, int splits, int iterations, float eps, float norm_eps) -> ()") \
  OP(mhc_head, "(Tensor x, Tensor fn, Tensor base, Tensor scale, Tensor(a!) u, Tensor(b!)? partial, int tokens, int hidden, int at_once, int splits, float eps, float norm_eps) -> ()") \
  OP(mhc_post, "(Tensor y, Tensor x, Tensor post, Tensor comb, Tensor(a!) out, int tokens, int hidden) -> ()") \
  OP(sinkhorn_normalize, "(Tensor logits, Tensor(a!) out, int matrices, int iterations, float eps) -> ()") \
  OP(embed_streams, "(Tensor token_ids, Tensor table, Tensor(a!) out, int tokens, int width, int num_streams) -> ()") \
  OP(gate_logits, "(Tensor x, Tensor weight, Tensor(a!) out, int tokens, int num_experts, int width) -> ()") \
  OP(topk_gate, "(Tensor logits, Tensor bias, Tensor(a!) weights, Tensor(b!) experts, int tokens, int num_experts, int top_k, float scale) -> ()") \
  OP(hash_gate, "(Tensor logits, Tensor token_ids, Tensor tid2eid, Tensor(a!) weights, Tensor(b!) experts, int tokens, int num_experts, int top_k, float scale) -> ()") \
  OP(gemv_mma, "(Tensor x, Tensor? token_scale, Tensor[] weights, Tensor[] scales, Tensor(a!)[] outs, int[] kinds, int[] rows, int tokens, int columns, int groups, bool overlap) -> ()") \
  OP(route_topk, "(Tensor x, Tensor? token_scale, Tensor weight, Tensor? weight_scale, Tensor bias, Tensor(a!) weights, Tensor(b!) experts, int tokens, int num_experts, int width, int top_k, float scale) -> ()") \
  OP(route_hash, "(Tensor x, Tensor? token_scale, Tensor weight, Tensor? weight_scale, Tensor token_ids, Tensor tid2eid, Tensor(a!) weights, Tensor(b!) experts, int tokens, int num_experts, int width, int top_k, float scale) -> ()") \
  OP(gemm_tiles, "(Tensor x, Tensor weight, Tensor? scales, Tensor? token_scale, Tensor? global_scale, Tensor(a!) out, int kind, int tokens, int rows, int columns, int groups, int x_stride, int out_stride) -> ()") \
  OP(experts_gate_up, "(Tensor x, Tensor shared_x, Tensor routing, Tensor chosen, Tensor addresses, Tensor global_scales, Tensor shared_addresses, Tensor shared_global_scales, Tensor(a!) hidden, Tensor(b!) shared_hidden, int experts, int tokens, int slots, int width, int inner, int shared_inner, int kind, bool e8m0, int shared_kind, bool shared_e8m0, float limit, bool overlap) -> ()") \
  OP(experts_down, "(Tensor hidden, Tensor shared_hidden, Tensor chosen, Tensor addresses, Tensor global_scales, Tensor shared_addresses, Tensor shared_global_scales, Tensor(a!) out, int experts, int tokens, int slots, int width, int inner, int shared_inner, int kind, bool e8m0, int shared_kind, bool shared_e8m0, bool overlap) -> ()") \
  OP(gemm_tiles_experts, "(Tensor x, Tensor? index, Tensor offset, Tensor addresses, Tensor global_scales, Tensor? token_scale, Tensor(a!) out, int kind, bool e8m0, int matrix, int pairs, int experts, int slots, int rows, int columns, int x_stride, int out_stride) -> ()") \
  OP(group_by_expert, "(Tensor chosen, Tensor(a!) offset, Tensor(b!) order, Tensor(c!) place, int pairs, int experts) -> ()") \
  OP(swiglu_pairs, "(Tensor gate, Tensor up, Tensor? routing, Tensor? order, Tensor(a!) h, int pairs, int width, float limit) -> ()") \
  OP(sum_slots, "(Tensor down, Tensor place, Tensor? shared, Tensor(a!) out, int tokens, int slots, int width) -> ()") \
  OP(attend_step, "(Tensor q, Tensor window_rows, Tensor sink, Tensor positions, Tensor inv_freq, Tensor? compressed, Tensor? selected, Tensor(a!) out, int tokens, int heads, int window, int ring, int entries, int ratio, int top_k, int splits) -> ()") \
  OP(attend_f32, "(Tensor q, Tensor window_rows, Tensor sink, Tensor positions, Tensor inv_freq, Tensor? compressed, Tensor? visible, Tensor? selected, Tensor(a!) out, int tokens, int heads, int rows, int window, int entries, int ratio, int top_k, bool ring) -> ()") \
  OP(attend_tiles, "(Tensor q, Tensor window_kv, Tensor sink, Tensor positions, Tensor inv_freq, Tensor? compressed, Tensor? visible, Tensor? selected, Tensor(a!) out, int tokens, int heads, int before, int window, int entries, int top_k, bool small) -> ()") \
  OP(attend_wgmma, "(Tensor q, Tensor window_kv, Tensor sink, Tensor positions, Tensor inv_freq, Tensor? compressed, Tensor? visible, Tensor? selected, Tensor(a!) out, int tokens, int heads, int before, int window, int entries, int top_k) -> ()") \
  OP(index_scores, "(Tensor q, Tensor keys, Tensor weights, Tensor visible, Tensor(a!) out, Tensor(b!)? best, int tokens, int heads, int entries, int least, bool portable) -> ()") \
  OP(index_scores_f32, "(Tensor q, Tensor keys, Tensor weights, Tensor visible, Tensor(a!) out, int tokens, int heads, int entries, int least) -> ()") \
  OP(select_topk, "(Tensor scores, Tensor? best, Tensor visible, Tensor(a!) out, int tokens, int entries, int top_k) -> ()") \
  OP(sample_largest, "(Tensor logits, Tensor(a!) out, int vocab) -> ()") \
  OP(argmax_head, "(Tensor x, Tensor w, Tensor codes, Tensor scale, Tensor error, Tensor norm, Tensor(a!) upper, Tensor(b!) out, int vocab, int width, int padded) -> ()") \
  OP(sample_ranked, "(Tensor ranked, Tensor ids, Tensor(a!) out, int vocab, float temperature, int top_k, float top_p, float min_p, int seed, int position) -> ()") \
  OP(rms_norm, "(Tensor x, Tensor? weight, Tensor(a!) out, int rows, int width, float eps) -> ()")
// clang-format on

STABLE_TORCH_LIBRARY(dsv4, m) {
#define DEFINE(op, schema) m.def(#op schema);
  DSV4_OPERATIONS(DEFINE)
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
#define IMPLEMENT(op, schema)                                   \
  {                                                             \
    using Op = typename OperationOf<&dsv4::op>::type;           \
    Op::name = #op;                                             \
    m.impl(#op, &Op::boxed);                                    \
  }
  DSV4_OPERATIONS(IMPLEMENT)
}
