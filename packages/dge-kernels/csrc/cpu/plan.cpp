// plan_queries on the CPU: from each region's choice of split to the packed list of patches.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../operators/plan.h"

namespace dge::cpu {
namespace {

int64_t count_region(const PlanArgs& args, int64_t image, int64_t region) {
  const int64_t split = choice_at(args, image * args.regions + region);
  check(split >= 0 && split < args.splits, "choice must be in [0, ", args.splits, "), got ", split, " for image ",
        image, ", region ", region);
  return count_patches(region_at(region, args.size, args.grid), args.sides[split]);
}

// Calls body with the number of each region in the batch and the queries up to its last.
template <class Body>
void for_each_sum(const PlanArgs& args, const Body& body) {
  int64_t total = 0;
  for (int64_t image = 0; image < args.batch; ++image) {
    total += args.grid.prefix;
    for (int64_t region = 0; region < args.regions; ++region) {
      total += count_region(args, image, region);
      body(image * args.regions + region, total);
    }
  }
}

void write_image(const PlanArgs& args, int64_t image, Patch* out) {
  for (int64_t token = 0; token < args.grid.prefix; ++token) *out++ = prefix_patch(token, image);
  for (int64_t r = 0; r < args.regions; ++r) {
    const int64_t side = args.sides[choice_at(args, image * args.regions + r)];
    const Region region = region_at(r, args.size, args.grid);
    const int64_t patches = count_patches(region, side);
    for (int64_t i = 0; i < patches; ++i) *out++ = patch_at(region, side, i, image);
  }
}

struct Device {
  static std::tuple<Tensor, Tensor> count_queries(const PlanArgs& args, const Tensor& choice) {
    Tensor sums = empty_like<1>(choice, {args.batch * args.regions}, ScalarType::Long);
    Tensor cu_seqlens = empty_like<1>(choice, {args.batch + 1}, ScalarType::Int);
    auto* sum = static_cast<int64_t*>(sums.mutable_data_ptr());
    auto* end = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
    end[0] = 0;
    for_each_sum(args, [&](int64_t index, int64_t total) {
      sum[index] = total;
      end[index / args.regions + 1] = static_cast<int32_t>(total);
    });
    return {sums, cu_seqlens};
  }

  static std::vector<int32_t> read_ends(const Tensor& cu_seqlens) {
    const auto* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    return {ends, ends + cu_seqlens.numel()};
  }

  static void check_sums(const PlanArgs& args, const Tensor& sums, int64_t total) {
    const auto* sum = static_cast<const int64_t*>(sums.const_data_ptr());
    bool same = total == (sums.numel() ? sum[sums.numel() - 1] : 0);
    for_each_sum(args, [&](int64_t index, int64_t expected) { same = same && sum[index] == expected; });
    check(same, "sums and total must be those that count_queries found for this choice");
  }

  static void write_patches(const PlanArgs& args, const Tensor& sums, Tensor& patches) {
    const auto* sum = static_cast<const int64_t*>(sums.const_data_ptr());
    auto* out = static_cast<Patch*>(patches.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, 4096 / args.regions);
    torch::stable::parallel_for(0, args.batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        write_image(args, image, out + (image ? sum[image * args.regions - 1] : 0));
      }
    });
  }
};

}  // namespace
}  // namespace dge::cpu

STABLE_TORCH_LIBRARY_IMPL(dge_kernels, CPU, m) {
  using dge::cpu::Device;
  m.impl("plan_queries", TORCH_BOX(&dge::plan_queries<Device>));
  m.impl("count_queries", TORCH_BOX(&dge::count_queries<Device>));
  m.impl("write_patches", TORCH_BOX(&dge::write_patches<Device>));
}
