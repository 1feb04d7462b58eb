// Softmax attention of one head of one image over a run of queries. Included by kernels.cpp alone.
//
// Scores are kept transposed, [keys, queries of the block]: keys and values are then read where they lie,
// each softmax is a lane of its own, and only the block's few queries are repacked.
#pragma once

#include "matmul.h"

namespace DGE_ISA {

template <class A>
constexpr int64_t kBlock = kTileVectors * kLanes<A>;

template <class A>
DGE_INLINE int64_t padded(int64_t width) {
  return ceil_div(width, kLanes<A>) * kLanes<A>;
}

// e^x for x <= 0, to about one unit in the last place; -inf gives 0, NaN stays NaN. 2^n · e^r with
// |r| <= ln(2) / 2 and e^r by its Taylor series to the seventh power.
DGE_INLINE Vec<float> exp_vector(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(DGE_VECTOR_BYTES)));
  const Vec<float> low = Vec<float>{} - 87.0f;
  const Vec<float> bounded = x < low ? low : x;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = bounded * 0x1.715476p0f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> e = r * (1.0f / 5040) + (1.0f / 720);
  e = e * r + (1.0f / 120);
  e = e * r + (1.0f / 24);
  e = e * r + (1.0f / 6);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  Int power;
  __builtin_memcpy(&power, &shifted, sizeof(power));
  power = (power << 23) + (127 << 23);
  Vec<float> scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return x < low ? Vec<float>{} : e * scale;
}

DGE_INLINE Vec<double> exp_vector(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

DGE_INLINE float log_of(float x) { return __builtin_logf(x); }
DGE_INLINE double log_of(double x) { return __builtin_log(x); }

template <class T>
DGE_INLINE const T* head_row(const Heads& heads, int64_t image, int64_t row, int64_t head) {
  return static_cast<const T*>(heads.data) + image * heads.image_stride + row * heads.row_stride +
         head * heads.head_stride;
}

// Hands out pieces of the scratch memory; with a null base it only counts.
template <class A>
struct Arena {
  A* base;
  int64_t used = 0;
  A* take(int64_t count) {
    A* piece = base ? base + used : nullptr;
    used += ceil_div(count, 16) * 16;
    return piece;
  }
};

// [rows, cols] of type A with rows `row` apart: the caller's memory where that already is it, else a copy
// padded with zeros to whole vectors.
template <class A>
struct Panel {
  const A* data;
  int64_t row;
};

template <class T>
Panel<Acc<T>> panel_of(const T* source, int64_t row, int64_t rows, int64_t cols, bool whole_vectors, Acc<T>* copy) {
  using A = Acc<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (!whole_vectors || cols % kLanes<A> == 0) return {reinterpret_cast<const A*>(source), row};
  }
  const int64_t stride = padded<A>(cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < cols; ++c) copy[i * stride + c] = load(source[i * row + c]);
    for (int64_t c = cols; c < stride; ++c) copy[i * stride + c] = 0;
  }
  return {copy, stride};
}

// scores [keys, lanes] = the bias of each key; whether there is one, so that products must be added to it.
template <class A>
bool start_from_bias(const AttentionArgs& args, const AttentionItem& item, const KeyRun& run, int64_t lanes,
                     A* scores) {
  if (!args.bias.data) return false;
  for (int64_t n = 0; n < run.count; ++n) {
    const Vec<A> bias = Vec<A>{} + *head_row<A>(args.bias, item.image, run.first + n, item.head);
    for (int64_t j = 0; j < lanes; j += kLanes<A>) store_vector(scores + n * lanes + j, bias);
  }
  return true;
}

// packed [width, lanes] = factor · rows of `count` queries, transposed; lanes past count are zero.
template <class T>
void transpose_block(const Heads& from, int64_t head, int64_t first, int64_t count, int64_t lanes, int64_t width,
                     Acc<T> factor, Acc<T>* packed) {
  for (int64_t i = 0; i < lanes; ++i) {
    const T* row = i < count ? head_row<T>(from, 0, first + i, head) : nullptr;
    for (int64_t c = 0; c < width; ++c) packed[c * lanes + i] = row ? load(row[c]) * factor : Acc<T>(0);
  }
}

// scores [keys, lanes] -> e^(score - max) in place, and per lane the max and the sum; without a key, or with -inf
// alone, these are 0.
template <class A>
void softmax_lanes(A* scores, int64_t keys, int64_t lanes, A* maxima, A* sums) {
  for (int64_t j = 0; j < lanes; j += kLanes<A>) {
    const Vec<A> lowest = Vec<A>{} - A(__builtin_inf());
    Vec<A> top = lowest;
    for (int64_t n = 0; n < keys; ++n) {
      const Vec<A> s = load_vector(scores + n * lanes + j);
      top = s > top ? s : top;
    }
    top = top == lowest ? Vec<A>{} : top;
    Vec<A> sum = {};
    for (int64_t n = 0; n < keys; ++n) {
      const Vec<A> e = exp_vector(load_vector(scores + n * lanes + j) - top);
      store_vector(scores + n * lanes + j, e);
      sum += e;
    }
    store_vector(maxima + j, top);
    store_vector(sums + j, sum);
  }
}

template <class A>
struct ForwardScratch {
  A *keys, *values, *queries, *scores, *out, *maxima, *sums;
  int64_t size;

  ForwardScratch(const AttentionArgs& args, A* base) {
    Arena<A> arena{base};
    const int64_t row = padded<A>(args.width);
    keys = arena.take(args.keys * row);
    values = arena.take(args.keys * row);
    queries = arena.take(args.width * kBlock<A>);
    scores = arena.take(args.keys * kBlock<A>);
    out = arena.take(kBlock<A> * row);
    maxima = arena.take(kBlock<A>);
    sums = arena.take(kBlock<A>);
    size = arena.used;
  }
};

template <class T>
void attention_item(const AttentionArgs& args, const AttentionItem& item, Acc<T>* memory) {
  using A = Acc<T>;
  const ForwardScratch<A> scratch(args, memory);
  const int64_t row = padded<A>(args.width);
  const KeyRun run = keys_of(args, item.image);
  const int64_t n = run.count;
  const Panel<A> keys = panel_of(head_row<T>(args.k, item.image, run.first, item.head), args.k.row_stride, n,
                                 args.width, false, scratch.keys);
  const Panel<A> values = panel_of(head_row<T>(args.v, item.image, run.first, item.head), args.v.row_stride, n,
                                   args.width, true, scratch.values);
  for (int64_t first = item.first; first < item.last; first += kBlock<A>) {
    const int64_t count = smaller(kBlock<A>, item.last - first), lanes = padded<A>(count);
    transpose_block<T>(args.q, item.head, first, count, lanes, args.width, A(args.scale), scratch.queries);
    const bool add = start_from_bias(args, item, run, lanes, scratch.scores);
    matmul<A>(n, lanes, args.width, {keys.data, keys.row, 1}, scratch.queries, lanes, scratch.scores, lanes, add);
    softmax_lanes(scratch.scores, n, lanes, scratch.maxima, scratch.sums);
    matmul<A>(count, row, n, {scratch.scores, 1, lanes}, values.data, values.row, scratch.out, row);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * args.heads + item.head;
      const A factor = scratch.sums[i] == 0 ? A(0) : A(1) / scratch.sums[i];  // 0: there was no key
      T* out = static_cast<T*>(args.out) + at * args.width;
      for (int64_t c = 0; c < args.width; ++c) store(out + c, scratch.out[i * row + c] * factor);
      static_cast<A*>(args.logsumexp)[at] = scratch.maxima[i] + log_of(scratch.sums[i]);
    }
  }
}

}  // namespace DGE_ISA
