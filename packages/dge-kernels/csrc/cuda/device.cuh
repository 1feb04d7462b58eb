// Launches: one warp per row, and the storage type that a problem names.
#pragma once

#include <initializer_list>

#include "body.h"
#include "launch.h"

namespace dge::cuda {

constexpr int kWarpsPerBlock = 8;

// Whether rows of `channels` elements that start at `data` and lie `strides` apart can be read 16 bytes at a time.
template <class T>
bool is_wide(const void* data, int64_t channels, std::initializer_list<int64_t> strides = {}) {
  constexpr int64_t wide = 16 / sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels % wide == 0;
  for (int64_t stride : strides) aligned = aligned && stride % wide == 0;
  return aligned;
}

// The row that this warp works on, for kernels launched by launch_warps; it may lie past the last one.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
}

// Launches kernel(args...) with a warp of 32 x 1 threads for each row.
template <class Kernel, class... Args>
void launch_warps(Kernel kernel, int64_t rows, cudaStream_t stream, const char* doing, const Args&... args) {
  if (rows == 0) return;
  const int64_t blocks = ceil_div(rows, kWarpsPerBlock);
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("too many rows for one launch while ") + doing);
  kernel<<<static_cast<unsigned>(blocks), dim3(kWarp, kWarpsPerBlock), 0, stream>>>(args...);
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
