// plan_queries on any device: the checks, and the raw view of the choices.
#pragma once

#include <algorithm>
#include <vector>

#include "../arguments.h"

namespace dge {

inline Index index_of(const Tensor& choice) {
  switch (choice.scalar_type()) {
    case ScalarType::Byte: return Index::u8;
    case ScalarType::Char: return Index::i8;
    case ScalarType::Short: return Index::i16;
    case ScalarType::Int: return Index::i32;
    case ScalarType::Long: return Index::i64;
    default: check(false, "choice must be an integer tensor (uint8, int8, int16, int32 or int64)");
  }
  return Index::u8;
}

// `choice` must be contiguous and outlive the result.
inline PlanArgs checked_plan(const Tensor& choice, const std::vector<int64_t>& splits, int64_t height, int64_t width,
                             int64_t prefix) {
  check(!splits.empty() && splits.size() <= kMostSplits, "splits must have 1 to ", kMostSplits, " entries, got ",
        splits.size());
  const Grid grid = checked_grid(height, width, prefix);
  const int64_t size = *std::max_element(splits.begin(), splits.end());
  check(size >= 1 && size <= INT32_MAX, "splits must be at least 1, the largest is ", size);
  const int64_t rows = ceil_div(height, size), cols = ceil_div(width, size);
  const int64_t batch = choice.dim() == 3 ? choice.size(0) : 0;
  check_shape(choice, "choice", {batch, rows, cols});
  check(batch * num_tokens(grid) <= INT32_MAX, "the batch has more than 2^31 - 1 tokens");
  PlanArgs args{index_of(choice),
                choice.const_data_ptr(),
                batch,
                rows * cols,
                size,
                grid,
                static_cast<int32_t>(splits.size()),
                {}};
  for (size_t i = 0; i < splits.size(); ++i) {
    check(splits[i] >= 1 && size % splits[i] == 0, "each of splits must divide the largest, got ", splits[i]);
    args.sides[i] = static_cast<int32_t>(size / splits[i]);
  }
  return args;
}

}  // namespace dge
