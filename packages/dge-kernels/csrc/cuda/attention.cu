// Softmax attention of ragged queries for what torch's variable-length kernel does not take: float32, float64,
// old devices, odd heads. One warp owns one query (or, for the gradients of keys and values, one key) and walks
// over tiles of 32 of the others, one per lane; no atomics, no shared memory, no barriers.
//
// The running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax"
// (2018); the backward pass recomputes the probabilities as FlashAttention does (Dao et al., 2022).
#include "device.cuh"

namespace dge::cuda {
namespace {

template <class T>
DGE_INLINE const T* head_row(const Heads& heads, int64_t image, int64_t row, int64_t head) {
  return static_cast<const T*>(heads.data) + image * heads.image_stride + row * heads.row_stride +
         head * heads.head_stride;
}

template <class T>
DGE_INLINE Acc<T> dot(const T* a, const T* b, int64_t width) {
  Acc<T> sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += load(a[c]) * load(b[c]);
  return sum;
}

// The image whose queries include `query`: the last one that starts at or before it.
DGE_INLINE int64_t image_of(const AttentionArgs& args, int64_t query) {
  int64_t low = 0, high = args.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.ends[middle] <= query ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// sum[r] += weight · row[lane + 32 r], for the channels that exist.
template <int R, class T>
__device__ __forceinline__ void add_row(Acc<T>* sum, Acc<T> weight, const T* row, int64_t width) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t c = threadIdx.x + r * kWarp;
    if (c < width) sum[r] += weight * load(row[c]);
  }
}

template <int R, class T>
__device__ __forceinline__ void write_row(T* row, const Acc<T>* sum, Acc<T> factor, int64_t width) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t c = threadIdx.x + r * kWarp;
    if (c < width) store(row + c, sum[r] * factor);
  }
}

// R: channels per lane, so heads of up to 32 R channels.
template <class T, int R>
__global__ void attention_kernel(AttentionArgs args) {
  using A = Acc<T>;
  if (warp_row() >= args.queries * args.heads) return;
  const int64_t query = warp_row() / args.heads, head = warp_row() % args.heads, image = image_of(args, query);
  const T* q = head_row<T>(args.q, 0, query, head);
  A top = -INFINITY, total = 0, sum[R] = {};
  for (int64_t first = 0; first < args.keys; first += kWarp) {
    const int64_t key = first + threadIdx.x, count = smaller(kWarp, args.keys - first);
    const bool exists = key < args.keys;
    const A score = exists ? A(args.scale) * dot(q, head_row<T>(args.k, image, key, head), args.width) : A(-INFINITY);
    const A tile_top = warp_max(score), new_top = tile_top > top ? tile_top : top;
    const A weight = exists ? exp_of(score - new_top) : A(0);
    const A shrink = exp_of(top - new_top);
    total = total * shrink + warp_sum(weight);
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] *= shrink;
    for (int j = 0; j < count; ++j) {
      add_row<R>(sum, __shfl_sync(kAll, weight, j), head_row<T>(args.v, image, first + j, head), args.width);
    }
    top = new_top;
  }
  const int64_t at = query * args.heads + head;
  write_row<R>(static_cast<T*>(args.out) + at * args.width, sum, A(1) / total, args.width);
  if (threadIdx.x == 0) static_cast<A*>(args.logsumexp)[at] = top + log_of(total);
}

// The gradient of a query, and <grad_out, out> for the kernel below.
template <class T, int R>
__global__ void grad_query_kernel(AttentionBackwardArgs args, Acc<T>* overlap) {
  using A = Acc<T>;
  const AttentionArgs& forward = args.forward;
  if (warp_row() >= forward.queries * forward.heads) return;
  const int64_t query = warp_row() / forward.heads, head = warp_row() % forward.heads;
  const int64_t image = image_of(forward, query), at = warp_row(), width = forward.width;
  const T* q = head_row<T>(forward.q, 0, query, head);
  const T* grad_out = head_row<T>(args.grad_out, 0, query, head);
  const T* out = static_cast<const T*>(forward.out) + at * width;
  A share = 0;
  for (int64_t c = threadIdx.x; c < width; c += kWarp) share += load(grad_out[c]) * load(out[c]);
  const A mean = warp_sum(share), logsumexp = static_cast<const A*>(forward.logsumexp)[at];
  A sum[R] = {};
  for (int64_t first = 0; first < forward.keys; first += kWarp) {
    const int64_t key = first + threadIdx.x, count = smaller(kWarp, forward.keys - first);
    A slope = 0;
    if (key < forward.keys) {
      const A score = A(forward.scale) * dot(q, head_row<T>(forward.k, image, key, head), width);
      const A grad = dot(grad_out, head_row<T>(forward.v, image, key, head), width);
      slope = exp_of(score - logsumexp) * (grad - mean) * A(forward.scale);
    }
    for (int j = 0; j < count; ++j) {
      add_row<R>(sum, __shfl_sync(kAll, slope, j), head_row<T>(forward.k, image, first + j, head), width);
    }
  }
  write_row<R>(static_cast<T*>(args.grad_q) + at * width, sum, A(1), width);
  if (threadIdx.x == 0) overlap[at] = mean;
}

template <class T, int R>
__global__ void grad_key_kernel(AttentionBackwardArgs args, const Acc<T>* overlap) {
  using A = Acc<T>;
  const AttentionArgs& forward = args.forward;
  if (warp_row() >= forward.batch * forward.keys * forward.heads) return;
  const int64_t head = warp_row() % forward.heads, key = warp_row() / forward.heads % forward.keys;
  const int64_t image = warp_row() / forward.heads / forward.keys, width = forward.width;
  const T* k = head_row<T>(forward.k, image, key, head);
  const T* v = head_row<T>(forward.v, image, key, head);
  const int64_t first_query = forward.ends[image] < 0 ? 0 : forward.ends[image];
  const int64_t end = smaller(forward.ends[image + 1], forward.queries);
  A key_sum[R] = {}, value_sum[R] = {};
  for (int64_t first = first_query; first < end; first += kWarp) {
    const int64_t query = first + threadIdx.x, count = smaller(kWarp, end - first);
    A weight = 0, slope = 0;
    if (query < end) {
      const int64_t at = query * forward.heads + head;
      const A score = A(forward.scale) * dot(head_row<T>(forward.q, 0, query, head), k, width);
      const A grad = dot(head_row<T>(args.grad_out, 0, query, head), v, width);
      weight = exp_of(score - static_cast<const A*>(forward.logsumexp)[at]);
      slope = weight * (grad - overlap[at]) * A(forward.scale);
    }
    for (int j = 0; j < count; ++j) {
      add_row<R>(key_sum, __shfl_sync(kAll, slope, j), head_row<T>(forward.q, 0, first + j, head), width);
      add_row<R>(value_sum, __shfl_sync(kAll, weight, j), head_row<T>(args.grad_out, 0, first + j, head), width);
    }
  }
  write_row<R>(static_cast<T*>(args.grad_k) + warp_row() * width, key_sum, A(1), width);
  write_row<R>(static_cast<T*>(args.grad_v) + warp_row() * width, value_sum, A(1), width);
}

// Calls body with the storage type and, as an integral constant, the channels per lane.
template <class Body>
void with_type_and_width(const AttentionArgs& args, const Body& body) {
  with_type(args.type, [&](auto type) {
    if (args.width <= 1 * kWarp) return body(type, std::integral_constant<int, 1>{});
    if (args.width <= 2 * kWarp) return body(type, std::integral_constant<int, 2>{});
    if (args.width <= 4 * kWarp) return body(type, std::integral_constant<int, 4>{});
    return body(type, std::integral_constant<int, kWidestHead / kWarp>{});
  });
}

}  // namespace

void attention(const AttentionArgs& args, cudaStream_t stream) {
  with_type_and_width(args, [&](auto type, auto per_lane) {
    const auto kernel = attention_kernel<decltype(type), per_lane.value>;
    launch_warps(kernel, args.queries * args.heads, stream, "attending", args);
  });
}

void attention_backward(const AttentionBackwardArgs& args, void* overlap, cudaStream_t stream) {
  const AttentionArgs& forward = args.forward;
  with_type_and_width(forward, [&](auto type, auto per_lane) {
    using T = decltype(type);
    auto* shares = static_cast<Acc<T>*>(overlap);
    launch_warps(grad_query_kernel<T, per_lane.value>, forward.queries * forward.heads, stream,
                 "computing the gradient of q", args, shares);
    launch_warps(grad_key_kernel<T, per_lane.value>, forward.batch * forward.keys * forward.heads, stream,
                 "computing the gradients of k and v", args, shares);
  });
}

}  // namespace dge::cuda
