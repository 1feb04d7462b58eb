// The router: one warp per region sums its tokens and takes the dot products with every split's weights.
#include "device.cuh"
#include "pool_route_body.h"

namespace dge::cuda {
namespace {

template <class T, int V>
__global__ void route_kernel(RouteArgs args) {
  if (warp_row() >= args.batch * count_regions(args.region, args.grid)) return;
  Warp<RouteLane<T>> warp;
  route_region<T, V>(warp, args, warp_row());
}

}  // namespace

void route(const RouteArgs& args, cudaStream_t stream) {
  with_type(args.type, [&](auto type) {
    using T = decltype(type);
    const bool wide = is_wide<T>(args.x.data, args.channels, {args.x.image_stride, args.x.token_stride});
    const auto kernel = wide ? route_kernel<T, 16 / sizeof(T)> : route_kernel<T, 1>;
    launch_warps(kernel, args.batch * count_regions(args.region, args.grid), stream, "routing regions", args);
  });
}

}  // namespace dge::cuda
