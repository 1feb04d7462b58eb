// plan_queries: what one thread does for one region, or for one image.
#pragma once

#include "body.h"

namespace dge::cuda {

// A choice out of range is clamped: it must not make a kernel write out of bounds.
DGE_BODY int64_t side_of(const PlanArgs& args, int64_t index) {
  const int64_t split = choice_at(args, index);
  return args.sides[split < 0 ? 0 : smaller(split, args.splits - 1)];
}

DGE_BODY void count_region(const PlanArgs& args, int64_t index, int32_t* counts) {
  const int64_t region = index % args.regions;
  const int64_t patches = count_patches(region_at(region, args.size, args.grid), side_of(args, index));
  counts[index] = static_cast<int32_t>(patches + (region == 0 ? args.grid.prefix : 0));
}

// Rows from `total` on, and negative ones, are skipped: sums that belong to another choice must not write there.
DGE_BODY void write_region(const PlanArgs& args, int64_t index, const int64_t* sums, Patch* patches, int64_t total) {
  const int64_t image = index / args.regions, number = index % args.regions, side = side_of(args, index);
  const Region region = region_at(number, args.size, args.grid);
  const int64_t prefix = number == 0 ? args.grid.prefix : 0, first = index ? sums[index - 1] : 0;
  const int64_t count = prefix + count_patches(region, side);
  if (first < 0) return;
  for (int64_t i = 0; i < count && first + i < total; ++i) {
    patches[first + i] = i < prefix ? prefix_patch(i, image) : patch_at(region, side, i - prefix, image);
  }
}

DGE_BODY void write_end(const PlanArgs& args, int64_t index, const int64_t* sums, int32_t* cu_seqlens) {
  cu_seqlens[index] = index ? static_cast<int32_t>(sums[index * args.regions - 1]) : 0;
}

}  // namespace dge::cuda
