// Attention: what one warp does for one query, or for one key. It walks over tiles of 32 of the others, one per
// lane, and holds its own row spread over the lanes; no atomics, no shared memory, no barriers.
//
// The running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax"
// (2018); the backward pass recomputes the probabilities as FlashAttention does (Dao et al., 2022).
#pragma once

#include "body.h"

namespace dge::cuda {

template <class T>
DGE_BODY const T* head_row(const Heads& heads, int64_t image, int64_t row, int64_t head) {
  return static_cast<const T*>(heads.data) + image * heads.image_stride + row * heads.row_stride +
         head * heads.head_stride;
}

template <class T>
DGE_BODY Acc<T> dot(const T* a, const T* b, int64_t width) {
  Acc<T> sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += load(a[c]) * load(b[c]);
  return sum;
}

// The image whose queries include `query`: the last one that starts at or before it.
DGE_BODY int64_t image_of(const AttentionArgs& args, int64_t query) {
  int64_t low = 0, high = args.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.ends[middle] <= query ? low : high) = middle;
  }
  return low;
}

// sum[r] += weight · row[lane + 32 r], for the channels that exist. R: channels per lane.
template <int R, class T>
DGE_BODY void add_row(Acc<T>* sum, Acc<T> weight, const T* row, int lane, int64_t width) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t c = lane + r * kWarp;
    if (c < width) sum[r] += weight * load(row[c]);
  }
}

template <int R, class T>
DGE_BODY void write_row(T* row, const Acc<T>* sum, Acc<T> factor, int lane, int64_t width) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t c = lane + r * kWarp;
    if (c < width) store(row + c, sum[r] * factor);
  }
}

template <class T, int R>
struct AttentionLane {
  Acc<T> score, weight, sum[R];
};

// `index` counts queries and, fastest, heads.
template <class T, int R, class Warp>
DGE_BODY void attend(Warp& warp, const AttentionArgs& args, int64_t index) {
  using A = Acc<T>;
  using Lane = AttentionLane<T, R>;
  const int64_t query = index / args.heads, head = index % args.heads, image = image_of(args, query);
  const T* q = head_row<T>(args.q, 0, query, head);
  A top = -INFINITY, total = 0;
  warp.each([&](int, Lane& state) {
    for (int r = 0; r < R; ++r) state.sum[r] = 0;
  });
  for (int64_t first = 0; first < args.keys; first += kWarp) {
    const int64_t count = smaller(kWarp, args.keys - first);
    warp.each([&](int lane, Lane& state) {
      state.score = lane < count ? A(args.scale) * dot(q, head_row<T>(args.k, image, first + lane, head), args.width)
                                 : A(-INFINITY);
    });
    const A tile_top = warp.max([](const Lane& state) { return state.score; });
    const A new_top = tile_top > top ? tile_top : top, shrink = exp_of(top - new_top);
    warp.each([&](int lane, Lane& state) {
      state.weight = lane < count ? exp_of(state.score - new_top) : A(0);
      for (int r = 0; r < R; ++r) state.sum[r] *= shrink;
    });
    total = total * shrink + warp.sum([](const Lane& state) { return state.weight; });
    for (int j = 0; j < count; ++j) {
      const A weight = warp.from(j, [](const Lane& state) { return state.weight; });
      const T* v = head_row<T>(args.v, image, first + j, head);
      warp.each([&](int lane, Lane& state) { add_row<R>(state.sum, weight, v, lane, args.width); });
    }
    top = new_top;
  }
  warp.each([&](int lane, Lane& state) {
    write_row<R>(static_cast<T*>(args.out) + index * args.width, state.sum, A(1) / total, lane, args.width);
    if (lane == 0) static_cast<A*>(args.logsumexp)[index] = top + log_of(total);
  });
}

template <class T, int R>
struct GradQueryLane {
  Acc<T> slope, sum[R];
};

// The gradient of a query; overlap[index] = <grad_out, out>, for attend_grad_key. `index` as in attend.
template <class T, int R, class Warp>
DGE_BODY void attend_grad_query(Warp& warp, const AttentionBackwardArgs& args, Acc<T>* overlap, int64_t index) {
  using A = Acc<T>;
  using Lane = GradQueryLane<T, R>;
  const AttentionArgs& forward = args.forward;
  const int64_t query = index / forward.heads, head = index % forward.heads, width = forward.width;
  const int64_t image = image_of(forward, query);
  const T* q = head_row<T>(forward.q, 0, query, head);
  const T* grad_out = head_row<T>(args.grad_out, 0, query, head);
  const T* out = static_cast<const T*>(forward.out) + index * width;
  warp.each([&](int lane, Lane& state) {
    for (int r = 0; r < R; ++r) state.sum[r] = 0;
    state.slope = 0;
    for (int64_t c = lane; c < width; c += kWarp) state.slope += load(grad_out[c]) * load(out[c]);
  });
  const A mean = warp.sum([](const Lane& state) { return state.slope; });
  const A logsumexp = static_cast<const A*>(forward.logsumexp)[index], scale = A(forward.scale);
  for (int64_t first = 0; first < forward.keys; first += kWarp) {
    const int64_t count = smaller(kWarp, forward.keys - first);
    warp.each([&](int lane, Lane& state) {
      state.slope = 0;
      if (lane >= count) return;
      const A score = scale * dot(q, head_row<T>(forward.k, image, first + lane, head), width);
      const A grad = dot(grad_out, head_row<T>(forward.v, image, first + lane, head), width);
      state.slope = exp_of(score - logsumexp) * (grad - mean) * scale;
    });
    for (int j = 0; j < count; ++j) {
      const A slope = warp.from(j, [](const Lane& state) { return state.slope; });
      const T* k = head_row<T>(forward.k, image, first + j, head);
      warp.each([&](int lane, Lane& state) { add_row<R>(state.sum, slope, k, lane, width); });
    }
  }
  warp.each([&](int lane, Lane& state) {
    write_row<R>(static_cast<T*>(args.grad_q) + index * width, state.sum, A(1), lane, width);
    if (lane == 0) overlap[index] = mean;
  });
}

template <class T, int R>
struct GradKeyLane {
  Acc<T> weight, slope, key_sum[R], value_sum[R];
};

// The gradients of a key and its value; `index` counts images, keys and, fastest, heads.
template <class T, int R, class Warp>
DGE_BODY void attend_grad_key(Warp& warp, const AttentionBackwardArgs& args, const Acc<T>* overlap, int64_t index) {
  using A = Acc<T>;
  using Lane = GradKeyLane<T, R>;
  const AttentionArgs& forward = args.forward;
  const int64_t head = index % forward.heads, key = index / forward.heads % forward.keys, width = forward.width;
  const int64_t image = index / forward.heads / forward.keys;
  const T* k = head_row<T>(forward.k, image, key, head);
  const T* v = head_row<T>(forward.v, image, key, head);
  // Clamped: a plan made by hand must not make the kernel read out of bounds.
  const int64_t begin = forward.ends[image] < 0 ? 0 : forward.ends[image];
  const int64_t end = smaller(forward.ends[image + 1], forward.queries);
  warp.each([&](int, Lane& state) {
    for (int r = 0; r < R; ++r) state.key_sum[r] = state.value_sum[r] = 0;
  });
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t count = smaller(kWarp, end - first);
    warp.each([&](int lane, Lane& state) {
      state.weight = state.slope = 0;
      if (lane >= count) return;
      const int64_t query = first + lane, at = query * forward.heads + head;
      const A score = A(forward.scale) * dot(head_row<T>(forward.q, 0, query, head), k, width);
      const A grad = dot(head_row<T>(args.grad_out, 0, query, head), v, width);
      state.weight = exp_of(score - static_cast<const A*>(forward.logsumexp)[at]);
      state.slope = state.weight * (grad - overlap[at]) * A(forward.scale);
    });
    for (int j = 0; j < count; ++j) {
      const A weight = warp.from(j, [](const Lane& state) { return state.weight; });
      const A slope = warp.from(j, [](const Lane& state) { return state.slope; });
      const T* q = head_row<T>(forward.q, 0, first + j, head);
      const T* grad_out = head_row<T>(args.grad_out, 0, first + j, head);
      warp.each([&](int lane, Lane& state) {
        add_row<R>(state.key_sum, slope, q, lane, width);
        add_row<R>(state.value_sum, weight, grad_out, lane, width);
      });
    }
  }
  warp.each([&](int lane, Lane& state) {
    write_row<R>(static_cast<T*>(args.grad_k) + index * width, state.key_sum, A(1), lane, width);
    write_row<R>(static_cast<T*>(args.grad_v) + index * width, state.value_sum, A(1), lane, width);
  });
}

}  // namespace dge::cuda
