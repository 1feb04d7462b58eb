// Sums over patches, broadcasts to patches and the router. Included by kernels.cpp alone.
#pragma once

#include "numbers.h"

namespace DGE_ISA {

// Channels that are summed at a time: their accumulators stay in the first-level cache.
constexpr int64_t kChunk = 512;

template <class T>
DGE_INLINE const T* token_row(const Tokens& tokens, int64_t image, int64_t token) {
  return static_cast<const T*>(tokens.data) + image * tokens.image_stride + token * tokens.token_stride;
}

// sum[c] = the sum over a span of channels first..first + n.
template <class T>
DGE_INLINE void sum_span(const Tokens& x, int64_t image, const Span& span, int64_t first, int64_t n, Acc<T>* sum) {
  for (int32_t row = 0; row < span.rows; ++row) {
    for (int32_t col = 0; col < span.cols; ++col) {
      const T* source = token_row<T>(x, image, token_of(span, row, col)) + first;
      if (row == 0 && col == 0) {
        for (int64_t c = 0; c < n; ++c) sum[c] = load(source[c]);
      } else {
        for (int64_t c = 0; c < n; ++c) sum[c] += load(source[c]);
      }
    }
  }
}

template <class T>
void gather_rows(const GatherArgs& args, int64_t begin, int64_t end) {
  Acc<T> sum[kChunk];
  for (int64_t q = begin; q < end; ++q) {
    const Patch& patch = args.patches[q];
    const Span span = span_of(patch, args.grid);
    T* out = static_cast<T*>(args.out) + q * args.channels;
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
DGE_INLINE A dot(const A* a, const A* b, int64_t n) {
  A partial[16] = {};
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) {
    for (int i = 0; i < 16; ++i) partial[i] += a[c + i] * b[c + i];
  }
  for (; c < n; ++c) partial[0] += a[c] * b[c];
  A sum = 0;
  for (int i = 0; i < 16; ++i) sum += partial[i];
  return sum;
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
      for (int64_t s = 0; s < args.splits; ++s) {
        logits[s] += dot(sum, static_cast<const A*>(args.weight) + s * args.channels + first, n);
      }
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
