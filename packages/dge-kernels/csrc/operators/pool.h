// pool_queries, unpool_queries and their gradients, on any device: sums over patches and broadcasts to them.
#pragma once

#include "../arguments.h"

namespace dge {

template <class Device>
Tensor gather(const Tensor& x_in, const char* name, const Tensor& patches_in, const Grid& grid, bool mean) {
  check(x_in.dim() == 3, name, " must have 3 dimensions");
  check_shape(x_in, name, {x_in.size(0), num_tokens(grid), x_in.size(2)});
  const Tensor x = with_dense_rows(x_in), patches = checked_patches(patches_in, x);
  const int64_t queries = patches.size(0), batch = x.size(0), channels = x.size(2);
  Tensor out = empty_like<2>(x, {queries, channels}, x.scalar_type());
  Device::gather(
      {type_of(x, name), queries, batch, tokens_of(x), out.mutable_data_ptr(), rows_of(patches), channels, grid, mean},
      x);
  return out;
}

template <class Device>
Tensor scatter(const Tensor& delta_in, const char* name, const Tensor& patches_in, const Grid& grid, int64_t batch,
               const Tensor* residual, bool mean) {
  const Tensor delta = torch::stable::contiguous(delta_in), patches = checked_patches(patches_in, delta);
  check(delta.dim() == 2, name, " must have 2 dimensions");
  const int64_t queries = patches.size(0), channels = delta.size(1);
  check_shape(delta, name, {queries, channels});
  Tensor out = empty_like<3>(delta, {batch, num_tokens(grid), channels}, delta.scalar_type());
  Device::scatter(
      {type_of(delta, name), queries, batch, delta.const_data_ptr(), residual ? tokens_of(*residual) : Tokens{},
       out.mutable_data_ptr(), rows_of(patches), channels, grid, mean},
      delta);
  return out;
}

template <class Device>
Tensor pool_queries(const Tensor& x, const Tensor& patches, int64_t height, int64_t width, int64_t prefix) {
  return gather<Device>(x, "x", patches, checked_grid(height, width, prefix), true);
}

template <class Device>
Tensor pool_queries_backward(const Tensor& grad, const Tensor& patches, int64_t batch, int64_t height, int64_t width,
                             int64_t prefix) {
  return scatter<Device>(grad, "grad", patches, checked_grid(height, width, prefix), batch, nullptr, true);
}

template <class Device>
Tensor unpool_queries(const Tensor& delta, const Tensor& patches, const Tensor& residual_in, int64_t height,
                      int64_t width, int64_t prefix) {
  const Grid grid = checked_grid(height, width, prefix);
  check(residual_in.dim() == 3 && delta.dim() == 2, "residual must have 3 dimensions and delta 2");
  check_shape(residual_in, "residual", {residual_in.size(0), num_tokens(grid), delta.size(1)});
  check_like(delta, "delta", residual_in, "residual");
  const Tensor residual = with_dense_rows(residual_in);
  return scatter<Device>(delta, "delta", patches, grid, residual.size(0), &residual, false);
}

template <class Device>
Tensor unpool_queries_backward(const Tensor& grad, const Tensor& patches, int64_t height, int64_t width,
                               int64_t prefix) {
  return gather<Device>(grad, "grad", patches, checked_grid(height, width, prefix), false);
}

}  // namespace dge
