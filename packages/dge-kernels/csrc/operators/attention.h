// ragged_attention and its gradient on any device: each image's queries attend to that image's keys.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "../arguments.h"

namespace dge {

// [rows, h, ...] of packed queries or keys, and [B, N, h, ...].
inline Heads packed_heads(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }
inline Heads dense_heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Whether the sizes of `t`, of no more dimensions than `like`, are the first ones of `like`.
inline bool begins_as(const Tensor& t, const Tensor& like) {
  return std::equal(t.sizes().begin(), t.sizes().end(), like.sizes().begin());
}

inline Tensor checked_ends(const Tensor& ends, const char* name, int64_t batch, const Tensor& q) {
  check(ends.dim() == 1 && ends.size(0) == batch + 1 && ends.scalar_type() == ScalarType::Int &&
            ends.device() == q.device(),
        name, " must be int32 [", batch + 1, "] on the device of q");
  return torch::stable::contiguous(ends);
}

// The inputs as the kernels need them, kept alive beside the raw view of them.
struct AttentionInputs {
  Tensor q, k, v, ends, key_ends;
  AttentionArgs args;
};

template <class Device>
AttentionInputs checked_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                               double scale, const std::optional<Tensor>& cu_seqlens_k,
                               const std::optional<Tensor>& bias) {
  const bool packed = cu_seqlens_k.has_value();
  check(q.dim() == 3 && k.dim() == (packed ? 3 : 4), "q must have 3 dimensions and k ", packed ? 3 : 4);
  check(!packed || cu_seqlens_k->numel() >= 1, "cu_seqlens_k must have at least one entry");
  const int64_t queries = q.size(0), heads = q.size(1), width = q.size(2);
  const int64_t batch = packed ? cu_seqlens_k->numel() - 1 : k.size(0);
  const int64_t rows = packed ? k.size(0) : batch * k.size(1);
  check((packed || k.size(1) >= 1) && heads >= 1 && width >= 1,
        "k must have at least one key, one head and one channel");
  check(batch >= 1 || queries == 0, "q must be empty where k has no images, got ", queries, " queries");
  check(batch >= 1 || rows == 0, "k must be empty where there are no images, got ", rows, " keys");
  check(k.size(-2) == heads && k.size(-1) == width, "k must have the heads and channels of q");
  check(v.dim() == k.dim() && begins_as(v, k), "v must have the shape of k");
  check_like(k, "k", q, "q");
  check_like(v, "v", q, "q");
  AttentionInputs in{with_dense_rows(q), with_dense_rows(k),
                     with_dense_rows(v), checked_ends(cu_seqlens, "cu_seqlens", batch, q),
                     cu_seqlens,         {}};
  const auto heads_of = packed ? packed_heads : dense_heads;
  const auto* ends = static_cast<const int32_t*>(in.ends.const_data_ptr());
  Device::check_ends(ends, batch, queries, "cu_seqlens", " queries of q");
  in.args = {type_of(q, "q"),
             queries,
             batch,
             packed ? 0 : k.size(1),
             heads,
             width,
             ends,
             scale,
             packed_heads(in.q),
             heads_of(in.k),
             heads_of(in.v),
             nullptr,
             nullptr,
             nullptr,
             rows,
             {}};
  if (packed) {
    in.key_ends = checked_ends(*cu_seqlens_k, "cu_seqlens_k", batch, q);
    in.args.key_ends = static_cast<const int32_t*>(in.key_ends.const_data_ptr());
    in.args.keys = Device::check_ends(in.args.key_ends, batch, rows, "cu_seqlens_k", " keys of k");
  }
  if (bias) {
    check(bias->dim() == k.dim() - 1 && begins_as(*bias, k) && bias->scalar_type() == accumulator_of(q.scalar_type()) &&
              bias->device() == q.device(),
          "bias must have k's shape without its channels, the accumulator's dtype and the device of q");
    in.args.bias = heads_of(*bias);
  }
  return in;
}

template <class Device>
std::tuple<Tensor, Tensor> ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                            [[maybe_unused]] int64_t max_seqlen, double scale,
                                            std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> bias) {
  AttentionInputs in = checked_inputs<Device>(q, k, v, cu_seqlens, scale, cu_seqlens_k, bias);
  Tensor out = empty_like<3>(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor logsumexp = empty_like<2>(q, {q.size(0), q.size(1)}, accumulator_of(q.scalar_type()));
  in.args.out = out.mutable_data_ptr();
  in.args.logsumexp = logsumexp.mutable_data_ptr();
  Device::attention(in.args, q);
  return {out, logsumexp};
}

// The last result is the gradient of the bias, and empty where there is none.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> ragged_attention_backward(
    const Tensor& grad_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_in,
    const Tensor& logsumexp_in, const Tensor& cu_seqlens, [[maybe_unused]] int64_t max_seqlen, double scale,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> bias) {
  AttentionInputs in = checked_inputs<Device>(q, k, v, cu_seqlens, scale, cu_seqlens_k, bias);
  const int64_t queries = q.size(0), heads = q.size(1), width = q.size(2);
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
  Tensor grad_k = torch::stable::new_empty(k, k.sizes(), q.scalar_type());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes(), q.scalar_type());
  Tensor grad_bias =
      bias ? torch::stable::new_empty(*bias, bias->sizes()) : empty_like<1>(logsumexp, {0}, logsumexp.scalar_type());
  in.args.out = const_cast<void*>(out.const_data_ptr());  // read only: the structure serves both directions
  in.args.logsumexp = const_cast<void*>(logsumexp.const_data_ptr());
  Device::attention_backward({in.args, packed_heads(grad), grad_q.mutable_data_ptr(), grad_k.mutable_data_ptr(),
                              grad_v.mutable_data_ptr(), grad_bias.mutable_data_ptr()},
                             q);
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace dge
