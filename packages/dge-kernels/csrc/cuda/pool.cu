// Sums over patches and broadcasts to them: one warp per query, its lanes along the channels. Every element of
// the output has one writer.
#include "device.cuh"
#include "pool_route_body.h"

namespace dge::cuda {
namespace {

template <class T, int V>
__global__ void gather_kernel(GatherArgs args) {
  if (warp_row() < args.queries) gather_lane<T, V>(args, warp_row(), threadIdx.x, kWarp);
}

template <class T, int V>
__global__ void scatter_kernel(ScatterArgs args) {
  if (warp_row() < args.queries) scatter_lane<T, V>(args, warp_row(), threadIdx.x, kWarp);
}

}  // namespace

void gather(const GatherArgs& args, cudaStream_t stream) {
  with_type(args.type, [&](auto type) {
    using T = decltype(type);
    const bool wide = is_wide<T>(args.x.data, args.channels, {args.x.image_stride, args.x.token_stride}) &&
                      is_wide<T>(args.out, args.channels);
    const auto kernel = wide ? gather_kernel<T, 16 / sizeof(T)> : gather_kernel<T, 1>;
    launch_warps(kernel, args.queries, stream, "pooling queries", args);
  });
}

void scatter(const ScatterArgs& args, cudaStream_t stream) {
  with_type(args.type, [&](auto type) {
    using T = decltype(type);
    const Tokens& residual = args.residual;
    const bool wide = is_wide<T>(residual.data, args.channels, {residual.image_stride, residual.token_stride}) &&
                      is_wide<T>(args.delta, args.channels) && is_wide<T>(args.out, args.channels);
    const auto kernel = wide ? scatter_kernel<T, 16 / sizeof(T)> : scatter_kernel<T, 1>;
    launch_warps(kernel, args.queries, stream, "unpooling queries", args);
  });
}

}  // namespace dge::cuda
