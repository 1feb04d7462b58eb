// Sums over patches and broadcasts to them: one warp per query, its lanes along the channels. Every element of
// the output has one writer.
#include "device.cuh"

namespace dge::cuda {
namespace {

template <class T>
DGE_INLINE const T* token_row(const Tokens& tokens, int64_t image, int64_t token) {
  return static_cast<const T*>(tokens.data) + image * tokens.image_stride + token * tokens.token_stride;
}

// One lane's share of one query: channels V · lane, V · (lane + lanes), ...
template <class T, int V>
DGE_INLINE void gather_lane(const GatherArgs& args, int64_t query, int lane, int lanes) {
  const Patch patch = args.patches[query];
  const bool inside = is_inside(patch, args.grid, args.batch);
  const Span span = inside ? span_of(patch, args.grid) : Span{0, 0, 0, 0};
  const Acc<T> factor = args.mean && inside ? Acc<T>(1) / Acc<T>(span.rows * span.cols) : Acc<T>(1);
  for (int64_t c = lane * V; c < args.channels; c += lanes * V) {
    Acc<T> sum[V] = {};
    for (int32_t row = 0; row < span.rows; ++row) {
#pragma unroll 4
      for (int32_t col = 0; col < span.cols; ++col) {
        const auto pack = load_pack<V>(token_row<T>(args.x, patch.image, token_of(span, row, col)) + c);
        for (int i = 0; i < V; ++i) sum[i] += load(pack.item[i]);
      }
    }
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) store(&out.item[i], sum[i] * factor);
    store_pack<V>(static_cast<T*>(args.out) + query * args.channels + c, out);
  }
}

template <class T, int V>
DGE_INLINE void scatter_lane(const ScatterArgs& args, int64_t query, int lane, int lanes) {
  const Patch patch = args.patches[query];
  if (!is_inside(patch, args.grid, args.batch)) return;
  const Span span = span_of(patch, args.grid);
  const Acc<T> factor = args.mean ? Acc<T>(1) / Acc<T>(span.rows * span.cols) : Acc<T>(1);
  T* image = static_cast<T*>(args.out) + patch.image * num_tokens(args.grid) * args.channels;
  for (int64_t c = lane * V; c < args.channels; c += lanes * V) {
    const auto delta = load_pack<V>(static_cast<const T*>(args.delta) + query * args.channels + c);
    for (int32_t row = 0; row < span.rows; ++row) {
#pragma unroll 4
      for (int32_t col = 0; col < span.cols; ++col) {
        const int64_t token = token_of(span, row, col);
        Pack<T, V> out{};
        if (args.residual.data) out = load_pack<V>(token_row<T>(args.residual, patch.image, token) + c);
        for (int i = 0; i < V; ++i) store(&out.item[i], load(out.item[i]) + load(delta.item[i]) * factor);
        store_pack<V>(image + token * args.channels + c, out);
      }
    }
  }
}

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
    const bool wide =
        is_wide<T>(args.residual.data, args.channels, {args.residual.image_stride, args.residual.token_stride}) &&
        is_wide<T>(args.delta, args.channels) && is_wide<T>(args.out, args.channels);
    const auto kernel = wide ? scatter_kernel<T, 16 / sizeof(T)> : scatter_kernel<T, 1>;
    launch_warps(kernel, args.queries, stream, "unpooling queries", args);
  });
}

}  // namespace dge::cuda
