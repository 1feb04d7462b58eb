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

// The image whose rows include `row`: the last one that starts at or before it.
DGE_BODY int64_t image_of(const int32_t* ends, int64_t batch, int64_t row) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (ends[middle] <= row ? low : high) = middle;
  }
  return low;
}

// The bias of a key, in the accumulator's type.
template <class A>
DGE_BODY A bias_of(const AttentionArgs& args, int64_t image, int64_t row, int64_t head) {
  return args.bias.data ? *head_row<A>(args.bias, image, row, head) : A(0);
}

// What scores are compared with for the gradient: without a key that is not masked, all probabilities must be 0.
template <class A>
DGE_BODY A logsumexp_of(const AttentionArgs& args, int64_t index) {
  const A value = static_cast<const A*>(args.logsumexp)[index];
  return value == -INFINITY ? A(INFINITY) : value;
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
  const int64_t query = index / args.heads, head = index % args.heads;
  const int64_t image = image_of(args.ends, args.batch, query);
  const KeyRun run = keys_of(args, image);
  const T* q = head_row<T>(args.q, 0, query, head);
  A top = -INFINITY, total = 0;
  warp.each([&](int, Lane& state) {
    for (int r = 0; r < R; ++r) state.sum[r] = 0;
  });
  for (int64_t done = 0; done < run.count; done += kWarp) {
    const int64_t count = smaller(kWarp, run.count - done), first = run.first + done;
    warp.each([&](int lane, Lane& state) {
      state.score = -INFINITY;
      if (lane >= count) return;
      state.score = A(args.scale) * dot(q, head_row<T>(args.k, image, first + lane, head), args.width) +
                    bias_of<A>(args, image, first + lane, head);
    });
    const A tile_top = warp.max([](const Lane& state) { return state.score; });
    const A new_top = tile_top > top ? tile_top : top, base = new_top == -INFINITY ? A(0) : new_top;
    const A shrink = exp_of(top - base);
    warp.each([&](int lane, Lane& state) {
      state.weight = lane < count ? exp_of(state.score - base) : A(0);
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
    const A factor = total == 0 ? A(0) : A(1) / total;
    write_row<R>(static_cast<T*>(args.out) + index * args.width, state.sum, factor, lane, args.width);
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
  const int64_t image = image_of(forward.ends, forward.batch, query);
  const KeyRun run = keys_of(forward, image);
  const T* q = head_row<T>(forward.q, 0, query, head);
  const T* grad_out = head_row<T>(args.grad_out, 0, query, head);
  const T* out = static_cast<const T*>(forward.out) + index * width;
  warp.each([&](int lane, Lane& state) {
    for (int r = 0; r < R; ++r) state.sum[r] = 0;
    state.slope = 0;
    for (int64_t c = lane; c < width; c += kWarp) state.slope += load(grad_out[c]) * load(out[c]);
  });
  const A mean = warp.sum([](const Lane& state) { return state.slope; });
  const A logsumexp = logsumexp_of<A>(forward, index), scale = A(forward.scale);
  for (int64_t done = 0; done < run.count; done += kWarp) {
    const int64_t count = smaller(kWarp, run.count - done), first = run.first + done;
    warp.each([&](int lane, Lane& state) {
      state.slope = 0;
      if (lane >= count) return;
      const A score = scale * dot(q, head_row<T>(forward.k, image, first + lane, head), width) +
                      bias_of<A>(forward, image, first + lane, head);
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
  Acc<T> weight, slope, bias_sum, key_sum[R], value_sum[R];
};

// The gradients of a key, its value and its bias; `index` counts images, keys and, fastest, heads.
template <class T, int R, class Warp>
DGE_BODY void attend_grad_key(Warp& warp, const AttentionBackwardArgs& args, const Acc<T>* overlap, int64_t index) {
  using A = Acc<T>;
  using Lane = GradKeyLane<T, R>;
  const AttentionArgs& forward = args.forward;
  const int64_t head = index % forward.heads, row = index / forward.heads, width = forward.width;
  const int64_t image = forward.key_ends ? image_of(forward.key_ends, forward.batch, row) : row / forward.keys;
  const KeyRun run = keys_of(forward, image);
  const int64_t place = row - run.packed, key = run.first + place;
  const T* k = head_row<T>(forward.k, image, key, head);
  const T* v = head_row<T>(forward.v, image, key, head);
  const A bias = bias_of<A>(forward, image, key, head);
  // Clamped: a plan made by hand must not make the kernel read out of bounds. A key of no image has no queries.
  const int64_t begin = larger(0, forward.ends[image]);
  const int64_t end = place >= 0 && place < run.count ? smaller(forward.ends[image + 1], forward.queries) : begin;
  warp.each([&](int, Lane& state) {
    state.bias_sum = 0;
    for (int r = 0; r < R; ++r) state.key_sum[r] = state.value_sum[r] = 0;
  });
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t count = smaller(kWarp, end - first);
    warp.each([&](int lane, Lane& state) {
      state.weight = state.slope = 0;
      if (lane >= count) return;
      const int64_t query = first + lane, at = query * forward.heads + head;
      const A score = A(forward.scale) * dot(head_row<T>(forward.q, 0, query, head), k, width) + bias;
      const A grad = dot(head_row<T>(args.grad_out, 0, query, head), v, width);
      state.weight = exp_of(score - logsumexp_of<A>(forward, at));
      const A slope = state.weight * (grad - overlap[at]);
      state.bias_sum += slope;
      state.slope = slope * A(forward.scale);
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
  if (!forward.bias.data) return;
  const A bias_sum = warp.sum([](const Lane& state) { return state.bias_sum; });
  warp.each([&](int lane, Lane&) {
    if (lane == 0) static_cast<A*>(args.grad_bias)[index] = bias_sum;
  });
}

}  // namespace dge::cuda
