// What the operators of both devices share on their way from tensors to raw memory: checks that keep a
// kernel inside its arguments, and views that carry strides. Shapes and dtypes are checked with friendlier
// words in Python; the checks here hold for callers that come through torch.ops directly.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernel_args.h"

namespace dge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Becomes a RuntimeError in Python, whatever torch's version; shapes and dtypes never get here from there.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check(tensor.scalar_type() == other.scalar_type() && tensor.device() == other.device(), name,
        " must have the dtype and device of ", other_name);
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (auto it = expected.begin(); same && it != expected.end(); ++it, ++axis) {
    same = tensor.size(axis) == *it;
  }
  if (!same) {
    std::ostringstream want;
    for (int64_t size : expected) {
      want << size << ", ";
    }
    check(false, name, " must have shape [", want.str(), "]");
  }
}

inline Grid checked_grid(int64_t height, int64_t width, int64_t prefix) {
  check(height >= 1 && width >= 1 && prefix >= 0, "grid must be at least 1 x 1 and num_prefix_tokens at least 0, got ",
        height, " x ", width, " and ", prefix);
  return {height, width, prefix};
}

// int32 [Q, 4] on the device of `like`; contiguous, so that a row is one Patch.
inline Tensor checked_patches(const Tensor& patches, const Tensor& like) {
  check(patches.dim() == 2 && patches.size(1) == 4 && patches.scalar_type() == ScalarType::Int &&
            patches.device() == like.device(),
        "patches must be int32 [Q, 4] on the device of the tokens");
  return patches.is_contiguous() ? patches : torch::stable::contiguous(patches);
}

// A tensor whose last dimension has stride 1: itself where it already is so, else a copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Sizes of an output on the device of `like`, uninitialised: every kernel writes all of it.
template <size_t N>
Tensor empty_like(const Tensor& like, const std::array<int64_t, N>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: check(false, name, " must be float32, float64, float16 or bfloat16");
  }
  return Type::f32;
}

// Views of raw memory: the tensor must outlive them, and have contiguous channels.
inline Tokens tokens_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
inline const Patch* rows_of(const Tensor& patches) { return static_cast<const Patch*>(patches.const_data_ptr()); }

inline ScalarType accumulator_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace dge
