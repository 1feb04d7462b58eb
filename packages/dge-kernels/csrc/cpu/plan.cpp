// plan_queries on the CPU: from each region's choice of split to the packed list of patches.
#include <torch/csrc/stable/library.h>

#include "../operators/plan.h"

namespace dge::cpu {
namespace {

// Writes the queries up to each image's end into cu_seqlens; returns the longest image's count.
int64_t count_queries(const PlanArgs& args, int32_t* cu_seqlens) {
  int64_t total = 0, longest = 0;
  cu_seqlens[0] = 0;
  for (int64_t image = 0; image < args.batch; ++image) {
    int64_t queries = args.grid.prefix;
    for (int64_t r = 0; r < args.regions; ++r) {
      const int64_t split = choice_at(args, image * args.regions + r);
      check(split >= 0 && split < args.splits, "choice must be in [0, ", args.splits, "), got ", split, " for image ",
            image, ", region ", r);
      queries += count_patches(region_at(r, args.size, args.grid), args.sides[split]);
    }
    total += queries;
    longest = std::max(longest, queries);
    cu_seqlens[image + 1] = static_cast<int32_t>(total);
  }
  return longest;
}

void write_patches(const PlanArgs& args, int64_t image, Patch* out) {
  for (int64_t token = 0; token < args.grid.prefix; ++token) *out++ = prefix_patch(token, image);
  for (int64_t r = 0; r < args.regions; ++r) {
    const int64_t side = args.sides[choice_at(args, image * args.regions + r)];
    const Region region = region_at(r, args.size, args.grid);
    const int64_t patches = count_patches(region, side);
    for (int64_t i = 0; i < patches; ++i) *out++ = patch_at(region, side, i, image);
  }
}

std::tuple<Tensor, Tensor, int64_t> plan_queries(const Tensor& choice_in, std::vector<int64_t> splits, int64_t height,
                                                 int64_t width, int64_t prefix) {
  const Tensor choice = torch::stable::contiguous(choice_in);
  const PlanArgs args = checked_plan(choice, splits, height, width, prefix);
  Tensor cu_seqlens = empty_like<1>(choice, {args.batch + 1}, ScalarType::Int);
  auto* ends = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  const int64_t longest = count_queries(args, ends);
  Tensor patches = empty_like<2>(choice, {ends[args.batch], 4}, ScalarType::Int);
  auto* out = static_cast<Patch*>(patches.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 4096 / args.regions);
  torch::stable::parallel_for(0, args.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) write_patches(args, image, out + ends[image]);
  });
  return {patches, cu_seqlens, longest};
}

}  // namespace
}  // namespace dge::cpu

STABLE_TORCH_LIBRARY_IMPL(dge_kernels, CPU, m) { m.impl("plan_queries", TORCH_BOX(&dge::cpu::plan_queries)); }
