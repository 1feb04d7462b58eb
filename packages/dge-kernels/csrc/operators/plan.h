// plan_queries on any device, whole and in its two halves: counting the queries, which waits for nothing, and writing
// the patches, for which their number must be known on the host.
#pragma once

#include <algorithm>
#include <tuple>
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

// sums int64 [batch · regions]: the queries up to each region's last; cu_seqlens int32 [batch + 1].
template <class Device>
std::tuple<Tensor, Tensor> count_queries(const Tensor& choice_in, std::vector<int64_t> splits, int64_t height,
                                         int64_t width, int64_t prefix) {
  const Tensor choice = torch::stable::contiguous(choice_in);
  return Device::count_queries(checked_plan(choice, splits, height, width, prefix), choice);
}

// `sums` and `total` as counted for the same choice; with others, no more than `total` patches are written.
template <class Device>
Tensor write_patches(const Tensor& choice_in, const Tensor& sums_in, std::vector<int64_t> splits, int64_t height,
                     int64_t width, int64_t prefix, int64_t total) {
  const Tensor choice = torch::stable::contiguous(choice_in);
  const PlanArgs args = checked_plan(choice, splits, height, width, prefix);
  check(sums_in.scalar_type() == ScalarType::Long && sums_in.device() == choice.device(),
        "sums must be int64 on the device of choice");
  check_shape(sums_in, "sums", {args.batch * args.regions});
  check(total >= 0 && total <= args.batch * num_tokens(args.grid), "total must be from 0 to the batch's ",
        args.batch * num_tokens(args.grid), " tokens, got ", total);
  const Tensor sums = torch::stable::contiguous(sums_in);
  Device::check_sums(args, sums, total);
  Tensor patches = empty_like<2>(choice, {total, 4}, ScalarType::Int);
  Device::write_patches(args, sums, patches);
  return patches;
}

template <class Device>
std::tuple<Tensor, Tensor, int64_t> plan_queries(const Tensor& choice_in, std::vector<int64_t> splits, int64_t height,
                                                 int64_t width, int64_t prefix) {
  const Tensor choice = torch::stable::contiguous(choice_in);
  const PlanArgs args = checked_plan(choice, splits, height, width, prefix);
  const auto [sums, cu_seqlens] = Device::count_queries(args, choice);
  const std::vector<int32_t> ends = Device::read_ends(cu_seqlens);
  Tensor patches = empty_like<2>(choice, {ends.back(), 4}, ScalarType::Int);
  Device::write_patches(args, sums, patches);
  int64_t longest = 0;
  for (size_t b = 1; b < ends.size(); ++b) longest = std::max<int64_t>(longest, ends[b] - ends[b - 1]);
  return {patches, cu_seqlens, longest};
}

}  // namespace dge
