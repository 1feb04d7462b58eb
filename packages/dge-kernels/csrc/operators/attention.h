// ragged_attention and its gradient on any device: each image's queries attend to that image's keys.
#pragma once

#include <tuple>

#include "../arguments.h"

namespace dge {

inline Heads query_heads(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }
inline Heads key_heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The inputs as the kernels need them, kept alive beside the raw view of them.
struct AttentionInputs {
  Tensor q, k, v, ends;
  AttentionArgs args;
};

template <class Device>
AttentionInputs checked_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                               double scale) {
  check(q.dim() == 3 && k.dim() == 4, "q must have 3 dimensions and k 4");
  const int64_t queries = q.size(0), heads = q.size(1), width = q.size(2), batch = k.size(0), keys = k.size(1);
  check(keys >= 1 && heads >= 1 && width >= 1, "k must have at least one key, one head and one channel");
  check(batch >= 1 || queries == 0, "q must be empty where k has no images, got ", queries, " queries");
  check_shape(k, "k", {batch, keys, heads, width});
  check_shape(v, "v", {batch, keys, heads, width});
  check_like(k, "k", q, "q");
  check_like(v, "v", q, "q");
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) == batch + 1 && cu_seqlens.scalar_type() == ScalarType::Int &&
            cu_seqlens.device() == q.device(),
        "cu_seqlens must be int32 [", batch + 1, "] on the device of q");
  AttentionInputs in{
      with_dense_rows(q), with_dense_rows(k), with_dense_rows(v), torch::stable::contiguous(cu_seqlens), {}};
  const auto* ends = static_cast<const int32_t*>(in.ends.const_data_ptr());
  Device::check_ends(ends, batch, queries);
  in.args = {type_of(q, "q"),   queries,         batch,           keys,    heads,  width, ends, scale,
             query_heads(in.q), key_heads(in.k), key_heads(in.v), nullptr, nullptr};
  return in;
}

template <class Device>
std::tuple<Tensor, Tensor> ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                            [[maybe_unused]] int64_t max_seqlen, double scale) {
  AttentionInputs in = checked_inputs<Device>(q, k, v, cu_seqlens, scale);
  Tensor out = empty_like<3>(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor logsumexp = empty_like<2>(q, {q.size(0), q.size(1)}, accumulator_of(q.scalar_type()));
  in.args.out = out.mutable_data_ptr();
  in.args.logsumexp = logsumexp.mutable_data_ptr();
  Device::attention(in.args, q);
  return {out, logsumexp};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> ragged_attention_backward(const Tensor& grad_in, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out_in,
                                                             const Tensor& logsumexp_in, const Tensor& cu_seqlens,
                                                             [[maybe_unused]] int64_t max_seqlen, double scale) {
  AttentionInputs in = checked_inputs<Device>(q, k, v, cu_seqlens, scale);
  const int64_t queries = q.size(0), heads = q.size(1), width = q.size(2), batch = k.size(0), keys = k.size(1);
  check_shape(grad_in, "grad", {queries, heads, width});
  check_shape(out_in, "out", {queries, heads, width});
  check_shape(logsumexp_in, "logsumexp", {queries, heads});
  check_like(grad_in, "grad", q, "q");
  check_like(out_in, "out", q, "q");
  check(logsumexp_in.scalar_type() == accumulator_of(q.scalar_type()) && logsumexp_in.device() == q.device(),
        "logsumexp must have the accumulator's dtype and the device of q");
  const Tensor grad = with_dense_rows(grad_in), out = torch::stable::contiguous(out_in);
  const Tensor logsumexp = torch::stable::contiguous(logsumexp_in);
  Tensor grad_q = empty_like<3>(q, {queries, heads, width}, q.scalar_type());
  Tensor grad_k = empty_like<4>(k, {batch, keys, heads, width}, q.scalar_type());
  Tensor grad_v = empty_like<4>(v, {batch, keys, heads, width}, q.scalar_type());
  in.args.out = const_cast<void*>(out.const_data_ptr());  // read only: the structure serves both directions
  in.args.logsumexp = const_cast<void*>(logsumexp.const_data_ptr());
  Device::attention_backward(
      {in.args, query_heads(grad), grad_q.mutable_data_ptr(), grad_k.mutable_data_ptr(), grad_v.mutable_data_ptr()}, q);
  return {grad_q, grad_k, grad_v};
}

}  // namespace dge
