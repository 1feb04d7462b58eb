// Softmax attention of ragged queries for what torch's variable-length kernel does not take: float32, float64,
// old devices, odd heads.
#include "attention_body.h"
#include "device.cuh"

namespace dge::cuda {
namespace {

// R: channels per lane, so heads of up to 32 R channels.
template <class T, int R>
__global__ void attention_kernel(AttentionArgs args) {
  if (warp_row() >= args.queries * args.heads) return;
  Warp<AttentionLane<T, R>> warp;
  attend<T, R>(warp, args, warp_row());
}

template <class T, int R>
__global__ void grad_query_kernel(AttentionBackwardArgs args, Acc<T>* overlap) {
  if (warp_row() >= args.forward.queries * args.forward.heads) return;
  Warp<GradQueryLane<T, R>> warp;
  attend_grad_query<T, R>(warp, args, overlap, warp_row());
}

template <class T, int R>
__global__ void grad_key_kernel(AttentionBackwardArgs args, const Acc<T>* overlap) {
  if (warp_row() >= args.forward.key_rows * args.forward.heads) return;
  Warp<GradKeyLane<T, R>> warp;
  attend_grad_key<T, R>(warp, args, overlap, warp_row());
}

// Calls body with the storage type and, as an integral constant, the channels per lane.
template <class Body>
void with_type_and_width(const AttentionArgs& args, const Body& body) {
  with_type(args.type, [&](auto type) {
    if (args.width <= 1 * kWarp) return body(type, std::integral_constant<int, 1>{});
    if (args.width <= 2 * kWarp) return body(type, std::integral_constant<int, 2>{});
    if (args.width <= 4 * kWarp) return body(type, std::integral_constant<int, 4>{});
    return body(type, std::integral_constant<int, kWidestHead / kWarp>{});
  });
}

}  // namespace

void attention(const AttentionArgs& args, cudaStream_t stream) {
  with_type_and_width(args, [&](auto type, auto per_lane) {
    const auto kernel = attention_kernel<decltype(type), per_lane.value>;
    launch_warps(kernel, args.queries * args.heads, stream, "attending", args);
  });
}

void attention_backward(const AttentionBackwardArgs& args, void* overlap, cudaStream_t stream) {
  const AttentionArgs& forward = args.forward;
  with_type_and_width(forward, [&](auto type, auto per_lane) {
    using T = decltype(type);
    auto* shares = static_cast<Acc<T>*>(overlap);
    launch_warps(grad_query_kernel<T, per_lane.value>, forward.queries * forward.heads, stream,
                 "computing the gradient of q", args, shares);
    launch_warps(grad_key_kernel<T, per_lane.value>, forward.key_rows * forward.heads, stream,
                 "computing the gradients of k, v and the bias", args, shares);
  });
}

}  // namespace dge::cuda
