// The CUDA side of every operator: torch's current stream, and the launches in order.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

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
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
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
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Device {
  static std::tuple<Tensor, Tensor> count_queries(const PlanArgs& args, const Tensor& choice) {
    const OnDevice device(choice);
    Tensor counts = empty_like<1>(choice, {args.batch * args.regions}, ScalarType::Int);
    cuda::count_queries(args, static_cast<int32_t*>(counts.mutable_data_ptr()), device.stream());
    const Tensor sums = running_sum(counts);
    Tensor cu_seqlens = empty_like<1>(choice, {args.batch + 1}, ScalarType::Int);
    cuda::write_ends(args, static_cast<const int64_t*>(sums.const_data_ptr()),
                     static_cast<int32_t*>(cu_seqlens.mutable_data_ptr()), device.stream());
    return {sums, cu_seqlens};
  }

  // Waits for the device once: the number of queries decides how much memory the plan takes.
  static std::vector<int32_t> read_ends(const Tensor& cu_seqlens) {
    const OnDevice device(cu_seqlens);
    std::vector<int32_t> ends(cu_seqlens.numel());
    check(cudaMemcpyAsync(ends.data(), cu_seqlens.const_data_ptr(), ends.size() * sizeof(int32_t),
                          cudaMemcpyDeviceToHost, device.stream()),
          "reading cu_seqlens");
    check(cudaStreamSynchronize(device.stream()), "waiting for cu_seqlens");
    return ends;
  }

  // What it would have to look at is on the device: the kernel skips what lies beyond `total` instead.
  static void check_sums(const PlanArgs&, const Tensor&, int64_t) {}

  static void write_patches(const PlanArgs& args, const Tensor& sums, Tensor& patches) {
    const OnDevice device(sums);
    cuda::write_patches(args, static_cast<const int64_t*>(sums.const_data_ptr()),
                        static_cast<Patch*>(patches.mutable_data_ptr()), patches.size(0), device.stream());
  }

  // What a plan holds is on the device: the kernels skip what lies outside instead.
  static int64_t check_ends(const int32_t*, int64_t, int64_t, const char*, const char*) { return 0; }

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
  m.impl("plan_queries", TORCH_BOX(&dge::plan_queries<Device>));
  m.impl("count_queries", TORCH_BOX(&dge::count_queries<Device>));
  m.impl("write_patches", TORCH_BOX(&dge::write_patches<Device>));
  m.impl("pool_queries", TORCH_BOX(&dge::pool_queries<Device>));
  m.impl("pool_queries_backward", TORCH_BOX(&dge::pool_queries_backward<Device>));
  m.impl("unpool_queries", TORCH_BOX(&dge::unpool_queries<Device>));
  m.impl("unpool_queries_backward", TORCH_BOX(&dge::unpool_queries_backward<Device>));
  m.impl("route", TORCH_BOX(&dge::route<Device>));
  m.impl("ragged_attention", TORCH_BOX(&dge::ragged_attention<Device>));
  m.impl("ragged_attention_backward", TORCH_BOX(&dge::ragged_attention_backward<Device>));
}
