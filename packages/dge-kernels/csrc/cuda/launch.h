// The border between operators.cpp, which knows torch, and the .cu files, which know the device. Every function
// queues its work on `stream` and throws std::runtime_error where a launch fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../kernel_args.h"

namespace dge::cuda {

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(status));
  }
}

// counts [batch · regions] = the queries of each region, the prefix counted with an image's first region.
void count_queries(const PlanArgs& args, int32_t* counts, cudaStream_t stream);
// cu_seqlens [batch + 1] from the running sum of the counts.
void write_ends(const PlanArgs& args, const int64_t* sums, int32_t* cu_seqlens, cudaStream_t stream);
// patches [total]; where the sums reach beyond, nothing is written.
void write_patches(const PlanArgs& args, const int64_t* sums, Patch* patches, int64_t total, cudaStream_t stream);

void gather(const GatherArgs& args, cudaStream_t stream);
void scatter(const ScatterArgs& args, cudaStream_t stream);
void route(const RouteArgs& args, cudaStream_t stream);

// Channels per head that the attention kernels have registers for.
constexpr int64_t kWidestHead = 256;
void attention(const AttentionArgs& args, cudaStream_t stream);
// overlap [queries, heads] is memory for the kernels, in the accumulator's type.
void attention_backward(const AttentionBackwardArgs& args, void* overlap, cudaStream_t stream);

}  // namespace dge::cuda
