// plan_queries on the device: one thread per region counts and later writes its patches; the running sum
// between the two is torch's.
#include "device.cuh"
#include "plan_body.h"

namespace dge::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void count_kernel(PlanArgs args, int32_t* counts) {
  const int64_t index = thread_index();
  if (index < args.batch * args.regions) count_region(args, index, counts);
}

__global__ void ends_kernel(PlanArgs args, const int64_t* sums, int32_t* cu_seqlens) {
  const int64_t index = thread_index();
  if (index <= args.batch) write_end(args, index, sums, cu_seqlens);
}

__global__ void patches_kernel(PlanArgs args, const int64_t* sums, Patch* patches, int64_t total) {
  const int64_t index = thread_index();
  if (index < args.batch * args.regions) write_region(args, index, sums, patches, total);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

}  // namespace

void count_queries(const PlanArgs& args, int32_t* counts, cudaStream_t stream) {
  if (args.batch == 0) return;
  count_kernel<<<blocks_for(args.batch * args.regions), kThreads, 0, stream>>>(args, counts);
  check(cudaGetLastError(), "counting the queries of each region");
}

void write_ends(const PlanArgs& args, const int64_t* sums, int32_t* cu_seqlens, cudaStream_t stream) {
  ends_kernel<<<blocks_for(args.batch + 1), kThreads, 0, stream>>>(args, sums, cu_seqlens);
  check(cudaGetLastError(), "writing cu_seqlens");
}

void write_patches(const PlanArgs& args, const int64_t* sums, Patch* patches, int64_t total, cudaStream_t stream) {
  if (args.batch == 0) return;
  patches_kernel<<<blocks_for(args.batch * args.regions), kThreads, 0, stream>>>(args, sums, patches, total);
  check(cudaGetLastError(), "writing the patches");
}

}  // namespace dge::cuda
