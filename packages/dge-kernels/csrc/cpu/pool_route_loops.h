// Sums over patches, broadcasts to patches and the router. Included by kernels.cpp alone.
#pragma once

#include <type_traits>

#include "matmul.h"

namespace DGE_ISA {

// Channels that are summed at a time: their accumulators stay in the first-level cache.
constexpr int64_t kChunk = 768;

template <class T>
DGE_INLINE const T* token_row(const Tokens& tokens, int64_t image, int64_t token) {
  return static_cast<const T*>(tokens.data) + image * tokens.image_stride + token * tokens.token_stride;
}

// Rows of tokens that are summed in one pass over their channels: few enough for the prefetcher to follow.
constexpr int kRows = 4;

// sum[c] = the sum of N rows in their order, on top of what it is where Add: the order of sum_held, so that a channel's
// sum does not depend on the number of channels beside it or on the machine's vectors.
template <int N, bool Add, class T>
DGE_INLINE void sum_rows(const T* const* rows, int64_t n, Acc<T>* __restrict__ sum) {
  const T *a = rows[0], *b = rows[N > 1 ? 1 : 0], *c = rows[N > 2 ? 2 : 0], *d = rows[N > 3 ? 3 : 0];
  for (int64_t i = 0; i < n; ++i) {
    Acc<T> value = Add ? sum[i] + load(a[i]) : load(a[i]);
    if constexpr (N > 1) value += load(b[i]);
    if constexpr (N > 2) value += load(c[i]);
    if constexpr (N > 3) value += load(d[i]);
    sum[i] = value;
  }
}

template <bool Add, class T>
DGE_INLINE void sum_rows(const T* const* rows, int count, int64_t n, Acc<T>* sum) {
  switch (count) {
    case 1: return sum_rows<1, Add>(rows, n, sum);
    case 2: return sum_rows<2, Add>(rows, n, sum);
    case 3: return sum_rows<3, Add>(rows, n, sum);
    default: return sum_rows<kRows, Add>(rows, n, sum);
  }
}

// Vectors of channels that are summed in registers over all of a span's tokens: as many as there are registers for, so
// that memory is read in runs as long as possible.
#if DGE_VECTOR_BYTES == 64
constexpr int kHeld = 24;
#else
constexpr int kHeld = 12;
#endif

// sum[c] = the sum over a span of V vectors of channels from `first`, where tokens are of the accumulator's type.
template <int V, class T>
DGE_INLINE void sum_held(const Tokens& x, int64_t image, const Span& span, int64_t first, T* sum) {
  Vec<T> held[V] = {};
  for (int32_t row = 0; row < span.rows; ++row) {
    const T* source = token_row<T>(x, image, token_of(span, row, 0)) + first;
    for (int32_t col = 0; col < span.cols; ++col, source += x.token_stride) {
#pragma GCC unroll 24
      for (int j = 0; j < V; ++j) held[j] += load_vector(source + j * kLanes<T>);
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < V; ++j) store_vector(sum + j * kLanes<T>, held[j]);
}

// The same for as many vectors as fit n channels; returns how many channels that were.
template <int V, class T>
DGE_INLINE int64_t sum_while_fits(const Tokens& x, int64_t image, const Span& span, int64_t first, int64_t n, T* sum) {
  constexpr int64_t kWidth = V * kLanes<T>;
  int64_t done = 0;
  for (; n - done >= kWidth; done += kWidth) sum_held<V>(x, image, span, first + done, sum + done);
  return done;
}

// sum[c] = the sum over a span of channels first..first + n.
template <class T>
DGE_INLINE void sum_span(const Tokens& x, int64_t image, const Span& span, int64_t first, int64_t n, Acc<T>* sum) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    int64_t done = sum_while_fits<kHeld>(x, image, span, first, n, sum);
    done += sum_while_fits<4>(x, image, span, first + done, n - done, sum + done);
    first += done, n -= done, sum += done;
    if (n == 0) return;
  }
  const T* rows[kRows];
  int count = 0;
  bool started = false;
  for (int32_t row = 0; row < span.rows; ++row) {
    for (int32_t col = 0; col < span.cols; ++col) {
      rows[count++] = token_row<T>(x, image, token_of(span, row, col)) + first;
      if (count < kRows) continue;
      started ? sum_rows<true>(rows, count, n, sum) : sum_rows<false>(rows, count, n, sum);
      started = true;
      count = 0;
    }
  }
  if (count) started ? sum_rows<true>(rows, count, n, sum) : sum_rows<false>(rows, count, n, sum);
}

template <class T>
void gather_rows(const GatherArgs& args, int64_t begin, int64_t end) {
  Acc<T> sum[kChunk];
  for (int64_t q = begin; q < end; ++q) {
    const Patch& patch = args.patches[q];
    const Span span = span_of(patch, args.grid);
    T* out = static_cast<T*>(args.out) + q * args.channels;
    if (span.rows * span.cols == 1) {
      __builtin_memcpy(out, token_row<T>(args.x, patch.image, token_of(span, 0, 0)), args.channels * sizeof(T));
      continue;
    }
    const Acc<T> factor = args.mean ? Acc<T>(1) / Acc<T>(span.rows * span.cols) : Acc<T>(1);
    for (int64_t first = 0; first < args.channels; first += kChunk) {
      const int64_t n = smaller(kChunk, args.channels - first);
      sum_span<T>(args.x, patch.image, span, first, n, sum);
      for (int64_t c = 0; c < n; ++c) store(out + first + c, sum[c] * factor);
    }
  }
}

template <class T>
void scatter_rows(const ScatterArgs& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels, tokens = num_tokens(args.grid);
  for (int64_t q = begin; q < end; ++q) {
    const Patch& patch = args.patches[q];
    const Span span = span_of(patch, args.grid);
    const T* delta = static_cast<const T*>(args.delta) + q * channels;
    const Acc<T> factor = args.mean ? Acc<T>(1) / Acc<T>(span.rows * span.cols) : Acc<T>(1);
    for (int32_t row = 0; row < span.rows; ++row) {
      for (int32_t col = 0; col < span.cols; ++col) {
        const int64_t token = token_of(span, row, col);
        T* __restrict__ out = static_cast<T*>(args.out) + (patch.image * tokens + token) * channels;
        if (args.residual.data) {
          const T* residual = token_row<T>(args.residual, patch.image, token);
          for (int64_t c = 0; c < channels; ++c) store(out + c, load(residual[c]) + load(delta[c]) * factor);
        } else {
          for (int64_t c = 0; c < channels; ++c) store(out + c, load(delta[c]) * factor);
        }
      }
    }
  }
}

template <class A>
DGE_INLINE A sum_lanes(Vec<A> v) {
  A lane[kLanes<A>];
  store_vector(lane, v);
  for (int64_t width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// out[s] += a · b[s] for N rows b[s], in sums that do not wait for each other.
template <int N, class A>
DGE_INLINE void add_dots(const A* a, const A* b, int64_t stride, int64_t n, A* out) {
  constexpr int64_t kStep = 2 * kLanes<A>;
  Vec<A> even[N] = {}, odd[N] = {};
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    const Vec<A> first = load_vector(a + c), second = load_vector(a + c + kLanes<A>);
#pragma GCC unroll 3
    for (int s = 0; s < N; ++s) {
      even[s] += first * load_vector(b + s * stride + c);
      odd[s] += second * load_vector(b + s * stride + c + kLanes<A>);
    }
  }
#pragma GCC unroll 3
  for (int s = 0; s < N; ++s) {
    A rest = 0;
    for (int64_t i = c; i < n; ++i) rest += a[i] * b[s * stride + i];
    out[s] += sum_lanes<A>(even[s] + odd[s]) + rest;
  }
}

template <class T>
void route_regions(const RouteArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  A sum[kChunk], logits[256];
  const int64_t regions = count_regions(args.region, args.grid);
  for (int64_t i = begin; i < end; ++i) {
    const Region region = region_at(i % regions, args.region, args.grid);
    const Patch whole = patch_at(region, args.region, 0, i / regions);
    const Span span = span_of(whole, args.grid);
    for (int64_t s = 0; s < args.splits; ++s) logits[s] = 0;
    for (int64_t first = 0; first < args.channels; first += kChunk) {
      const int64_t n = smaller(kChunk, args.channels - first);
      sum_span<T>(args.x, whole.image, span, first, n, sum);
      const A* weight = static_cast<const A*>(args.weight) + first;
      int64_t s = 0;
      for (; s + 3 <= args.splits; s += 3) add_dots<3>(sum, weight + s * args.channels, args.channels, n, logits + s);
      for (; s < args.splits; ++s) add_dots<1>(sum, weight + s * args.channels, args.channels, n, logits + s);
    }
    int64_t best = 0;
    const A factor = A(1) / A(span.rows * span.cols);
    for (int64_t s = 0; s < args.splits; ++s) {
      logits[s] = logits[s] * factor + static_cast<const A*>(args.bias)[s];
      // The first of equals; a NaN counts as largest, as in torch.argmax.
      const bool larger = logits[s] > logits[best] || (logits[s] != logits[s] && logits[best] == logits[best]);
      best = larger ? s : best;
    }
    args.choice[i] = static_cast<uint8_t>(best);
  }
}

}  // namespace DGE_ISA
