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

// [rows, h, d] with contiguous d: q and out by packed query; k, v and the bias, whose d is 1, by image and token, or
// by packed token.
struct Heads {
  const void* data;
  int64_t image_stride, row_stride, head_stride;
};

// Image b owns the packed queries ends[b]..ends[b + 1], and `keys` keys of its own or, where keys are packed too, those
// at key_ends[b]..key_ends[b + 1].
struct AttentionArgs {
  Type type;
  int64_t queries, batch, keys, heads, width;
  const int32_t* ends;
  double scale;
  Heads q, k, v;
  void *out, *logsumexp;              // logsumexp in the accumulator's type
  const int32_t* key_ends = nullptr;  // nullptr: `keys` of each image; else at most `keys`, which CUDA does not know
  int64_t key_rows = 0;               // keys of all images
  Heads bias = {};                    // added to the scores, in the accumulator's type; data == nullptr: no bias
};

struct AttentionBackwardArgs {
  AttentionArgs forward;
  Heads grad_out;
  void *grad_q, *grad_k, *grad_v;
  void* grad_bias = nullptr;  // [key_rows, heads] in the accumulator's type
};

// The keys of one image: `count` rows, from row `first` of the image's part of k, v and bias, or from row `packed` of
// the gradients.
struct KeyRun {
  int64_t first, packed, count;
};

DGE_INLINE KeyRun keys_of(const AttentionArgs& args, int64_t image) {
  if (!args.key_ends) return {0, image * args.keys, args.keys};
  // Clamped: ends made by hand must not make a kernel read out of bounds.
  const int64_t begin = larger(0, args.key_ends[image]), end = smaller(args.key_ends[image + 1], args.key_rows);
  return {begin, begin, larger(0, end - begin)};
}

}  // namespace dge
