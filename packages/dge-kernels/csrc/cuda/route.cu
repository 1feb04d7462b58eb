// The router: one warp per region sums its tokens and takes the dot products with every split's weights.
#include "device.cuh"

namespace dge::cuda {
namespace {

constexpr int kSplitsAtOnce = 8;  // more are handled by reading the region again

// One lane's share of the products of a region's summed tokens with splits first..first + kSplitsAtOnce.
template <class T, int V>
DGE_INLINE void route_lane(const RouteArgs& args, int64_t index, int64_t first, int lane, int lanes, Acc<T>* partial) {
  const int64_t regions = count_regions(args.region, args.grid);
  const Region region = region_at(index % regions, args.region, args.grid);
  const Span span = span_of(patch_at(region, args.region, 0, 0), args.grid);
  const T* image = static_cast<const T*>(args.x.data) + index / regions * args.x.image_stride;
  for (int64_t c = lane * V; c < args.channels; c += lanes * V) {
    Acc<T> sum[V] = {};
    for (int32_t row = 0; row < span.rows; ++row) {
#pragma unroll 4
      for (int32_t col = 0; col < span.cols; ++col) {
        const auto pack = load_pack<V>(image + token_of(span, row, col) * args.x.token_stride + c);
        for (int i = 0; i < V; ++i) sum[i] += load(pack.item[i]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSplitsAtOnce; ++s) {
      if (first + s < args.splits) {
        const Acc<T>* weight = static_cast<const Acc<T>*>(args.weight) + (first + s) * args.channels + c;
        for (int i = 0; i < V; ++i) partial[s] += sum[i] * weight[i];
      }
    }
  }
}

template <class T, int V>
__global__ void route_kernel(RouteArgs args) {
  const int64_t regions = count_regions(args.region, args.grid), index = warp_row();
  if (index >= args.batch * regions) return;
  const Region region = region_at(index % regions, args.region, args.grid);
  const Acc<T> factor = Acc<T>(1) / Acc<T>(region.rows * region.cols);
  Acc<T> best_logit = 0;
  int64_t best = 0;
  for (int64_t first = 0; first < args.splits; first += kSplitsAtOnce) {
    Acc<T> partial[kSplitsAtOnce] = {};
    route_lane<T, V>(args, index, first, threadIdx.x, kWarp, partial);
#pragma unroll
    for (int s = 0; s < kSplitsAtOnce; ++s) {
      const Acc<T> product = warp_sum(partial[s]) * factor;
      if (first + s < args.splits) {
        const Acc<T> logit = product + static_cast<const Acc<T>*>(args.bias)[first + s];
        // The first of equals; a NaN counts as largest, as in torch.argmax.
        const bool larger = logit > best_logit || (logit != logit && best_logit == best_logit);
        if (first + s == 0 || larger) {
          best_logit = logit;
          best = first + s;
        }
      }
    }
  }
  if (threadIdx.x == 0) args.choice[index] = static_cast<uint8_t>(best);
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
