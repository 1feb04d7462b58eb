// Sums over patches, broadcasts to patches and the router: what one lane, or one warp, does for one row.
#pragma once

#include "body.h"

namespace dge::cuda {

template <class T>
DGE_BODY const T* token_row(const Tokens& tokens, int64_t image, int64_t token) {
  return static_cast<const T*>(tokens.data) + image * tokens.image_stride + token * tokens.token_stride;
}

// sum[0..V] = the sum over a span of channels c..c + V. V is 16 bytes' worth, or 1.
template <class T, int V>
DGE_BODY void sum_span(const Tokens& x, int64_t image, const Span& span, int64_t c, Acc<T>* sum) {
  for (int i = 0; i < V; ++i) sum[i] = 0;
  for (int32_t row = 0; row < span.rows; ++row) {
#pragma unroll 4
    for (int32_t col = 0; col < span.cols; ++col) {
      const auto pack = load_pack<V>(token_row<T>(x, image, token_of(span, row, col)) + c);
      for (int i = 0; i < V; ++i) sum[i] += load(pack.item[i]);
    }
  }
}

// One lane's share of one query: channels V · lane, V · (lane + lanes), ...
template <class T, int V>
DGE_BODY void gather_lane(const GatherArgs& args, int64_t query, int lane, int lanes) {
  const Patch patch = args.patches[query];
  const bool inside = is_inside(patch, args.grid, args.batch);
  const Span span = inside ? span_of(patch, args.grid) : Span{0, 0, 0, 0};
  const Acc<T> factor = args.mean && inside ? Acc<T>(1) / Acc<T>(span.rows * span.cols) : Acc<T>(1);
  for (int64_t c = lane * V; c < args.channels; c += lanes * V) {
    Acc<T> sum[V];
    sum_span<T, V>(args.x, patch.image, span, c, sum);
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) store(&out.item[i], sum[i] * factor);
    store_pack<V>(static_cast<T*>(args.out) + query * args.channels + c, out);
  }
}

template <class T, int V>
DGE_BODY void scatter_lane(const ScatterArgs& args, int64_t query, int lane, int lanes) {
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

constexpr int kSplitsAtOnce = 8;  // more are handled by reading the region again

template <class T>
struct RouteLane {
  Acc<T> product[kSplitsAtOnce];
};

// One warp's region: its choice is written by lane 0.
template <class T, int V, class Warp>
DGE_BODY void route_region(Warp& warp, const RouteArgs& args, int64_t index) {
  const int64_t regions = count_regions(args.region, args.grid);
  const Region region = region_at(index % regions, args.region, args.grid);
  const Span span = span_of(patch_at(region, args.region, 0, 0), args.grid);
  const Acc<T> factor = Acc<T>(1) / Acc<T>(span.rows * span.cols);
  Acc<T> best_logit = 0;
  int64_t best = 0;
  for (int64_t first = 0; first < args.splits; first += kSplitsAtOnce) {
    warp.each([&](int lane, RouteLane<T>& state) {
      for (int s = 0; s < kSplitsAtOnce; ++s) state.product[s] = 0;
      for (int64_t c = lane * V; c < args.channels; c += kWarp * V) {
        Acc<T> sum[V];
        sum_span<T, V>(args.x, index / regions, span, c, sum);
#pragma unroll
        for (int s = 0; s < kSplitsAtOnce; ++s) {
          if (first + s >= args.splits) continue;
          const Acc<T>* weight = static_cast<const Acc<T>*>(args.weight) + (first + s) * args.channels + c;
          for (int i = 0; i < V; ++i) state.product[s] += sum[i] * weight[i];
        }
      }
    });
#pragma unroll
    for (int s = 0; s < kSplitsAtOnce; ++s) {
      const Acc<T> product = warp.sum([s](const RouteLane<T>& state) { return state.product[s]; }) * factor;
      if (first + s >= args.splits) continue;
      const Acc<T> logit = product + static_cast<const Acc<T>*>(args.bias)[first + s];
      // The first of equals; a NaN counts as largest, as in torch.argmax.
      const bool larger = logit > best_logit || (logit != logit && best_logit == best_logit);
      if (first + s == 0 || larger) {
        best_logit = logit;
        best = first + s;
      }
    }
  }
  warp.each([&](int lane, RouteLane<T>&) {
    if (lane == 0) args.choice[index] = static_cast<uint8_t>(best);
  });
}

}  // namespace dge::cuda
