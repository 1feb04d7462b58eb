// What the kernels' bodies are written in. A body is compiled as device code by nvcc, and as host code by the C++
// tests, which run it over a whole launch under sanitizers; only the few lines that launch it are not tested so.
#pragma once

#include <cmath>

#include "../kernel_args.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DGE_BODY static __device__ __forceinline__
#else
#define DGE_BODY static inline
#endif

namespace dge::cuda {

constexpr int kWarp = 32;

DGE_BODY float load(float value) { return value; }
DGE_BODY double load(double value) { return value; }
DGE_BODY void store(float* out, float value) { *out = value; }
DGE_BODY void store(double* out, double value) { *out = value; }
#if defined(__CUDACC__)
DGE_BODY float load(__half value) { return __half2float(value); }
DGE_BODY float load(__nv_bfloat16 value) { return __bfloat162float(value); }
DGE_BODY void store(__half* out, float value) { *out = __float2half_rn(value); }
DGE_BODY void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
#endif

DGE_BODY float exp_of(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}
DGE_BODY double exp_of(double x) { return exp(x); }
DGE_BODY float log_of(float x) { return logf(x); }
DGE_BODY double log_of(double x) { return log(x); }

// V consecutive channels, moved in one access of V · sizeof(T) bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T item[V];
};

template <int V, class T>
DGE_BODY Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
// 16 bytes go by an instruction of their own: nvcc splits some plain stores of half-precision items into pieces.
template <int V, class T>
DGE_BODY void store_pack(T* to, const Pack<T, V>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(to), bits);
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

#if defined(__CUDACC__)

// A warp as a body sees it: a state per lane, things done by each lane, and what the lanes tell each other.
// Here each thread is one lane; the host's version, in the tests, keeps all 32 states.
template <class State>
struct Warp {
  State state{};

  template <class Do>
  __device__ __forceinline__ void each(const Do& action) {
    action(static_cast<int>(threadIdx.x), state);
  }

  template <class Get>
  __device__ __forceinline__ auto sum(const Get& get) const {
    auto value = get(state);
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  }

  template <class Get>
  __device__ __forceinline__ auto max(const Get& get) const {
    auto value = get(state);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const auto other = __shfl_xor_sync(0xffffffffu, value, step);
      value = other > value ? other : value;
    }
    return value;
  }

  // The value that one lane holds.
  template <class Get>
  __device__ __forceinline__ auto from(int lane, const Get& get) const {
    return __shfl_sync(0xffffffffu, get(state), lane);
  }
};

#endif

}  // namespace dge::cuda
