// route on any device: region mean, linear layer and argmax in one pass over the tokens.
#pragma once

#include "../arguments.h"

namespace dge {

template <class Device>
Tensor route(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, int64_t region, int64_t height,
             int64_t width, int64_t prefix) {
  const Grid grid = checked_grid(height, width, prefix);
  check(x_in.dim() == 3 && weight_in.dim() == 2, "x must have 3 dimensions and weight 2");
  check(region >= 1, "region must be at least 1, got ", region);
  const int64_t batch = x_in.size(0), channels = x_in.size(2), splits = weight_in.size(0);
  check(splits >= 1 && splits <= 256, "weight must have 1 to 256 rows, got ", splits);
  check_shape(x_in, "x", {batch, num_tokens(grid), channels});
  check_shape(weight_in, "weight", {splits, channels});
  check_shape(bias_in, "bias", {splits});
  const ScalarType wide = accumulator_of(x_in.scalar_type());
  check(weight_in.scalar_type() == wide && bias_in.scalar_type() == wide,
        "weight and bias must be float32, or float64 where x is");
  check(weight_in.device() == x_in.device() && bias_in.device() == x_in.device(),
        "weight and bias must be on the device of x");
  const Tensor x = with_dense_rows(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in), bias = torch::stable::contiguous(bias_in);
  Tensor choice = empty_like<3>(x, {batch, ceil_div(height, region), ceil_div(width, region)}, ScalarType::Byte);
  Device::route({type_of(x, "x"), batch, tokens_of(x), weight.const_data_ptr(), bias.const_data_ptr(),
                 static_cast<uint8_t*>(choice.mutable_data_ptr()), channels, splits, region, grid},
                x);
  return choice;
}

}  // namespace dge
