// What each kernel is asked to do, as plain memory: the same structures for both devices. No torch here.
#pragma once

#include "geometry.h"

namespace dge {

enum class Type : int32_t { f32, f64, f16, bf16 };

enum class Index : int32_t { u8, i8, i16, i32, i64 };

// What values of a storage type are added up in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

constexpr int kMostSplits = 256;

// choice [batch, regions] indexes `sides`, the tokens per side of each split's patches.
struct PlanArgs {
  Index type;
  const void* choice;
  int64_t batch, regions, size;
  Grid grid;
  int32_t splits;
  int32_t sides[kMostSplits];
};

DGE_INLINE int64_t choice_at(const PlanArgs& args, int64_t index) {
  switch (args.type) {
    case Index::u8: return static_cast<const uint8_t*>(args.choice)[index];
    case Index::i8: return static_cast<const int8_t*>(args.choice)[index];
    case Index::i16: return static_cast<const int16_t*>(args.choice)[index];
    case Index::i32: return static_cast<const int32_t*>(args.choice)[index];
    case Index::i64: return static_cast<const int64_t*>(args.choice)[index];
  }
  return 0;
}

// [B, N, C] tokens whose channels are contiguous; strides in elements.
struct Tokens {
  const void* data;
  int64_t image_stride, token_stride;
};

// out [Q, C] = the sum, or the mean, of each patch's tokens.
struct GatherArgs {
  Type type;
  int64_t queries, batch;
  Tokens x;
  void* out;
  const Patch* patches;
  int64_t channels;
  Grid grid;
  bool mean;
};

// out [B, N, C] = residual + each patch's row of delta, divided by the patch's tokens where `mean`.
struct ScatterArgs {
  Type type;
  int64_t queries, batch;
  const void* delta;
  Tokens residual;  // data == nullptr: no residual
  void* out;
  const Patch* patches;
  int64_t channels;
  Grid grid;
  bool mean;
};

// choice [B · regions] = argmax over splits of weight · mean(region) + bias, in the accumulator's type.
struct RouteArgs {
  Type type;
  int64_t batch;
  Tokens x;
  const void *weight, *bias;
  uint8_t* choice;
  int64_t channels, splits, region;
  Grid grid;
};

// [rows, h, d] with contiguous d: q and out by packed query, k and v by image and token.
struct Heads {
  const void* data;
  int64_t image_stride, row_stride, head_stride;
};

// Image b owns the packed queries ends[b]..ends[b + 1].
struct AttentionArgs {
  Type type;
  int64_t queries, batch, keys, heads, width;
  const int32_t* ends;
  double scale;
  Heads q, k, v;
  void *out, *logsumexp;  // logsumexp in the accumulator's type
};

struct AttentionBackwardArgs {
  AttentionArgs forward;
  Heads grad_out;
  void *grad_q, *grad_k, *grad_v;
};

}  // namespace dge
