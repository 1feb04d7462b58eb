// Gradients of one head of one image over all its queries. Included by kernels.cpp alone.
//
// The probabilities are computed again from the saved logsumexp, block by block, as in FlashAttention (Dao et
// al., 2022), section 3.1. One item owns its head's keys and values, so sums need no atomics.
#pragma once

#include "attention.h"

namespace DGE_ISA {

template <class A>
struct BackwardScratch {
  A *keys, *values, *grad_keys, *grad_values, *grad_bias;
  A *queries, *grads, *query_rows, *grad_rows, *scores, *grad_scores, *grad_queries, *logsumexp, *overlap;
  int64_t size;

  BackwardScratch(const AttentionArgs& args, A* base) {
    Arena<A> arena{base};
    const int64_t row = padded<A>(args.width);
    const int64_t all = args.keys * row, block = row * kBlock<A>, scored = args.keys * kBlock<A>;
    keys = arena.take(all), values = arena.take(all);
    grad_keys = arena.take(all), grad_values = arena.take(all), grad_bias = arena.take(args.keys);
    queries = arena.take(block), query_rows = arena.take(block), grad_queries = arena.take(block);
    grads = arena.take(block), grad_rows = arena.take(block);
    scores = arena.take(scored), grad_scores = arena.take(scored);
    logsumexp = arena.take(kBlock<A>), overlap = arena.take(kBlock<A>);
    size = arena.used;
  }
};

// rows [count, row] = factor · the block's vectors of one head, padded with zeros.
template <class T>
void copy_block(const Heads& from, int64_t head, int64_t first, int64_t count, int64_t width, Acc<T> factor,
                Acc<T>* rows) {
  const int64_t stride = padded<Acc<T>>(width);
  for (int64_t i = 0; i < count; ++i) {
    const T* source = head_row<T>(from, 0, first + i, head);
    for (int64_t c = 0; c < width; ++c) rows[i * stride + c] = load(source[c]) * factor;
    for (int64_t c = width; c < stride; ++c) rows[i * stride + c] = 0;
  }
}

// Per query of the block: its logsumexp, and <grad_out, out>, which the softmax's gradient subtracts. A lane without a
// query, or a query without a key, gets +inf: all its probabilities are 0.
template <class T>
void load_statistics(const AttentionBackwardArgs& args, int64_t head, int64_t first, int64_t count, int64_t lanes,
                     const BackwardScratch<Acc<T>>& scratch) {
  const AttentionArgs& forward = args.forward;
  for (int64_t i = 0; i < lanes; ++i) {
    constexpr Acc<T> kNothing = __builtin_inf();
    Acc<T> overlap = 0, logsumexp = kNothing;
    if (i < count) {
      const int64_t at = (first + i) * forward.heads + head;
      const T* out = static_cast<const T*>(forward.out) + at * forward.width;
      const T* grad = head_row<T>(args.grad_out, 0, first + i, head);
      for (int64_t c = 0; c < forward.width; ++c) overlap += load(out[c]) * load(grad[c]);
      logsumexp = static_cast<const Acc<T>*>(forward.logsumexp)[at];
      logsumexp = logsumexp == -kNothing ? kNothing : logsumexp;
    }
    scratch.logsumexp[i] = logsumexp;
    scratch.overlap[i] = overlap;
  }
}

// scores -> probabilities, grad of probabilities -> grad of scores, both [keys, lanes] and in place.
template <class A>
void softmax_backward_lanes(A* scores, A* grads, int64_t keys, int64_t lanes, const A* logsumexp, const A* overlap) {
  for (int64_t n = 0; n < keys; ++n) {
    for (int64_t j = 0; j < lanes; j += kLanes<A>) {
      const int64_t at = n * lanes + j;
      const Vec<A> p = exp_vector(load_vector(scores + at) - load_vector(logsumexp + j));
      store_vector(scores + at, p);
      store_vector(grads + at, p * (load_vector(grads + at) - load_vector(overlap + j)));
    }
  }
}

// sums [keys] += each key's row of grads [keys, lanes]; lanes without a query hold zeros.
template <class A>
void add_lanes(const A* grads, int64_t keys, int64_t lanes, A* sums) {
  for (int64_t n = 0; n < keys; ++n) {
    Vec<A> sum = {};
    for (int64_t j = 0; j < lanes; j += kLanes<A>) sum += load_vector(grads + n * lanes + j);
    for (int64_t i = 0; i < kLanes<A>; ++i) sums[n] += sum[i];
  }
}

// The contiguous [rows, h, d] memory of one head <- padded rows of the scratch.
template <class T>
void store_rows(void* to, int64_t first, int64_t rows, int64_t head, const AttentionArgs& args, Acc<T> factor,
                const Acc<T>* from) {
  const int64_t stride = padded<Acc<T>>(args.width);
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(to) + ((first + i) * args.heads + head) * args.width;
    for (int64_t c = 0; c < args.width; ++c) store(out + c, from[i * stride + c] * factor);
  }
}

template <class T>
void attention_backward_item(const AttentionBackwardArgs& args, const AttentionItem& item, Acc<T>* memory) {
  using A = Acc<T>;
  const AttentionArgs& forward = args.forward;
  const BackwardScratch<A> scratch(forward, memory);
  const KeyRun run = keys_of(forward, item.image);
  const int64_t n = run.count, width = forward.width, row = padded<A>(width);
  const A scale = A(forward.scale);
  const Panel<A> keys = panel_of(head_row<T>(forward.k, item.image, run.first, item.head), forward.k.row_stride, n,
                                 width, true, scratch.keys);
  const Panel<A> values = panel_of(head_row<T>(forward.v, item.image, run.first, item.head), forward.v.row_stride, n,
                                   width, false, scratch.values);
  for (int64_t i = 0; i < n * row; ++i) scratch.grad_keys[i] = scratch.grad_values[i] = 0;
  for (int64_t i = 0; i < n; ++i) scratch.grad_bias[i] = 0;
  for (int64_t first = item.first; first < item.last; first += kBlock<A>) {
    const int64_t count = smaller(kBlock<A>, item.last - first), lanes = padded<A>(count);
    transpose_block<T>(forward.q, item.head, first, count, lanes, width, scale, scratch.queries);
    transpose_block<T>(args.grad_out, item.head, first, count, lanes, width, A(1), scratch.grads);
    copy_block<T>(forward.q, item.head, first, count, width, scale, scratch.query_rows);
    copy_block<T>(args.grad_out, item.head, first, count, width, A(1), scratch.grad_rows);
    load_statistics<T>(args, item.head, first, count, lanes, scratch);
    const bool add = start_from_bias(forward, item, run, lanes, scratch.scores);
    matmul<A>(n, lanes, width, {keys.data, keys.row, 1}, scratch.queries, lanes, scratch.scores, lanes, add);
    matmul<A>(n, lanes, width, {values.data, values.row, 1}, scratch.grads, lanes, scratch.grad_scores, lanes);
    softmax_backward_lanes(scratch.scores, scratch.grad_scores, n, lanes, scratch.logsumexp, scratch.overlap);
    if (add) add_lanes(scratch.grad_scores, n, lanes, scratch.grad_bias);
    matmul<A>(count, row, n, {scratch.grad_scores, 1, lanes}, keys.data, keys.row, scratch.grad_queries, row);
    store_rows<T>(args.grad_q, first, count, item.head, forward, scale, scratch.grad_queries);
    matmul<A>(n, row, count, {scratch.scores, lanes, 1}, scratch.grad_rows, row, scratch.grad_values, row, true);
    matmul<A>(n, row, count, {scratch.grad_scores, lanes, 1}, scratch.query_rows, row, scratch.grad_keys, row, true);
  }
  store_rows<T>(args.grad_k, run.packed, n, item.head, forward, A(1), scratch.grad_keys);
  store_rows<T>(args.grad_v, run.packed, n, item.head, forward, A(1), scratch.grad_values);
  if (!forward.bias.data) return;
  A* grad_bias = static_cast<A*>(args.grad_bias) + run.packed * forward.heads + item.head;
  for (int64_t i = 0; i < n; ++i) grad_bias[i * forward.heads] = scratch.grad_bias[i];
}

}  // namespace DGE_ISA
