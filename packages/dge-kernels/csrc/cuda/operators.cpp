// The CUDA side of every operator: torch's current stream, and the launches in order.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../operators/attention.h"
#include "../operators/plan.h"
#include "../operators/pool.h"
#include "../operators/route.h"
#include "launch.h"

namespace dge::cuda {
namespace {

// Makes a tensor's device current, and knows the stream that torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Tensor running_sum(const Tensor& counts) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(counts), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(std::optional<ScalarType>(ScalarType::Long))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Waits for the device once: the number of queries decides how much memory the plan takes.
std::vector<int32_t> read_ends(const Tensor& cu_seqlens, cudaStream_t stream) {
  std::vector<int32_t> ends(cu_seqlens.numel());
  check(cudaMemcpyAsync(ends.data(), cu_seqlens.const_data_ptr(), ends.size() * sizeof(int32_t), cudaMemcpyDeviceToHost,
                        stream),
        "reading cu_seqlens");
  check(cudaStreamSynchronize(stream), "waiting for cu_seqlens");
  return ends;
}

std::tuple<Tensor, Tensor, int64_t> plan_queries(const Tensor& choice_in, std::vector<int64_t> splits, int64_t height,
                                                 int64_t width, int64_t prefix) {
  const OnDevice device(choice_in);
  const Tensor choice = torch::stable::contiguous(choice_in);
  const PlanArgs args = checked_plan(choice, splits, height, width, prefix);
  Tensor counts = empty_like<1>(choice, {args.batch * args.regions}, ScalarType::Int);
  count_queries(args, static_cast<int32_t*>(counts.mutable_data_ptr()), device.stream());
  const Tensor sums = running_sum(counts);
  const auto* totals = static_cast<const int64_t*>(sums.const_data_ptr());
  Tensor cu_seqlens = empty_like<1>(choice, {args.batch + 1}, ScalarType::Int);
  write_ends(args, totals, static_cast<int32_t*>(cu_seqlens.mutable_data_ptr()), device.stream());
  const std::vector<int32_t> ends = read_ends(cu_seqlens, device.stream());
  Tensor patches = empty_like<2>(choice, {ends.back(), 4}, ScalarType::Int);
  write_patches(args, totals, static_cast<Patch*>(patches.mutable_data_ptr()), device.stream());
  int64_t longest = 0;
  for (size_t b = 1; b < ends.size(); ++b) longest = std::max<int64_t>(longest, ends[b] - ends[b - 1]);
  return {patches, cu_seqlens, longest};
}

struct Device {
  // What a plan holds is on the device: the kernels skip what lies outside instead.
  static void check_patches(const Patch*, int64_t, const Grid&, int64_t, bool) {}
  static void check_ends(const int32_t*, int64_t, int64_t) {}

  static void gather(const GatherArgs& args, const Tensor& like) { cuda::gather(args, OnDevice(like).stream()); }
  static void scatter(const ScatterArgs& args, const Tensor& like) { cuda::scatter(args, OnDevice(like).stream()); }
  static void route(const RouteArgs& args, const Tensor& like) { cuda::route(args, OnDevice(like).stream()); }

  static void check_width(const AttentionArgs& args) {
    dge::check(args.width <= kWidestHead, "q must have at most ", kWidestHead, " channels per head on CUDA, got ",
               args.width);
  }

  static void attention(const AttentionArgs& args, const Tensor& like) {
    check_width(args);
    const OnDevice device(like);
    cuda::attention(args, device.stream());
  }

  static void attention_backward(const AttentionBackwardArgs& args, const Tensor& like) {
    check_width(args.forward);
    const OnDevice device(like);
    Tensor overlap =
        empty_like<2>(like, {args.forward.queries, args.forward.heads}, accumulator_of(like.scalar_type()));
    cuda::attention_backward(args, overlap.mutable_data_ptr(), device.stream());
  }
};

}  // namespace
}  // namespace dge::cuda

STABLE_TORCH_LIBRARY_IMPL(dge_kernels, CUDA, m) {
  using dge::cuda::Device;
  m.impl("plan_queries", TORCH_BOX(&dge::cuda::plan_queries));
  m.impl("pool_queries", TORCH_BOX(&dge::pool_queries<Device>));
  m.impl("pool_queries_backward", TORCH_BOX(&dge::pool_queries_backward<Device>));
  m.impl("unpool_queries", TORCH_BOX(&dge::unpool_queries<Device>));
  m.impl("unpool_queries_backward", TORCH_BOX(&dge::unpool_queries_backward<Device>));
  m.impl("route", TORCH_BOX(&dge::route<Device>));
  m.impl("ragged_attention", TORCH_BOX(&dge::ragged_attention<Device>));
  m.impl("ragged_attention_backward", TORCH_BOX(&dge::ragged_attention_backward<Device>));
}
