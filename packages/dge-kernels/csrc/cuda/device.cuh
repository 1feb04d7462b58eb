// What the kernels share: storage types, 16-byte accesses, a warp's sums, launches of one warp per row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.h"

namespace dge::cuda {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr unsigned kAll = 0xffffffffu;

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

DGE_INLINE float load(float value) { return value; }
DGE_INLINE double load(double value) { return value; }
DGE_INLINE float load(__half value) { return __half2float(value); }
DGE_INLINE float load(__nv_bfloat16 value) { return __bfloat162float(value); }

DGE_INLINE void store(float* out, float value) { *out = value; }
DGE_INLINE void store(double* out, double value) { *out = value; }
DGE_INLINE void store(__half* out, float value) { *out = __float2half_rn(value); }
DGE_INLINE void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

// V consecutive channels, moved in one access of V · sizeof(T) bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T item[V];
};

template <int V, class T>
DGE_INLINE Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, class T>
DGE_INLINE void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Whether rows of `channels` elements that start at `data` and lie `strides` apart can be read 16 bytes at a time.
template <class T>
bool is_wide(const void* data, int64_t channels, std::initializer_list<int64_t> strides = {}) {
  constexpr int64_t wide = 16 / sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels % wide == 0;
  for (int64_t stride : strides) aligned = aligned && stride % wide == 0;
  return aligned;
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

template <class A>
__device__ __forceinline__ A warp_max(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAll, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// The row that this warp works on, for kernels launched by launch_warps; it may lie past the last one.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
}

// Launches kernel(args) with a warp of 32 x 1 threads for each row.
template <class Kernel, class... Args>
void launch_warps(Kernel kernel, int64_t rows, cudaStream_t stream, const char* doing, const Args&... args) {
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarpsPerBlock))), block(kWarp, kWarpsPerBlock);
  kernel<<<grid, block, 0, stream>>>(args...);
  check(cudaGetLastError(), doing);
}

// Calls body with a value of the storage type that `type` names.
template <class Body>
void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f64: return body(double{});
    case Type::f16: return body(__half{});
    case Type::bf16: return body(__nv_bfloat16{});
  }
}

}  // namespace dge::cuda
