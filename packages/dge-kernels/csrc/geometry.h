// The arithmetic of regions, splits and patches: the one definition that the CPU and CUDA kernels share.
//
// A token grid of height x width is cut into regions of `size` tokens per side, clipped at the bottom and
// right edge. A region with split k has k x k patches of size / k tokens per side; patches that have no
// token inside the grid do not exist, so a clipped region may have fewer than k x k. A patch is one query.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DGE_INLINE static __host__ __device__ __forceinline__
#else
// Forced inline and static: this header is compiled for several instruction sets in one library, and a
// shared out-of-line copy could be one that the machine cannot run.
#define DGE_INLINE static inline __attribute__((always_inline))
#endif

namespace dge {

// One row of a plan's `patches`. y < 0 marks prefix token -y - 1.
struct alignas(16) Patch {
  int32_t image, y, x, side;
};

struct Grid {
  int64_t height, width, prefix;
};

// The tokens of one patch that lie inside the grid: `rows` runs of `cols` consecutive tokens, the first
// token being `first`, one run every `stride` tokens. All are token indices within the patch's image.
struct Span {
  int64_t first, stride;
  int32_t rows, cols;
};

DGE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DGE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DGE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

DGE_INLINE int64_t num_tokens(const Grid& grid) { return grid.prefix + grid.height * grid.width; }

DGE_INLINE Span span_of(const Patch& patch, const Grid& grid) {
  if (patch.y < 0) {
    return {-static_cast<int64_t>(patch.y) - 1, 0, 1, 1};
  }
  const auto rows = static_cast<int32_t>(smaller(patch.side, grid.height - patch.y));
  const auto cols = static_cast<int32_t>(smaller(patch.side, grid.width - patch.x));
  return {grid.prefix + patch.y * grid.width + patch.x, grid.width, rows, cols};
}

DGE_INLINE int64_t token_of(const Span& span, int32_t row, int32_t col) { return span.first + row * span.stride + col; }

// Whether a patch names an existing image and at least one existing token.
DGE_INLINE bool is_inside(const Patch& patch, const Grid& grid, int64_t batch) {
  if (patch.image < 0 || patch.image >= batch) {
    return false;
  }
  if (patch.y < 0) {
    return -static_cast<int64_t>(patch.y) <= grid.prefix;
  }
  return patch.side > 0 && patch.x >= 0 && patch.y < grid.height && patch.x < grid.width;
}

// A region, by its first token and the part of it that lies inside the grid.
struct Region {
  int64_t y, x, rows, cols;
};

DGE_INLINE Region region_at(int64_t index, int64_t size, const Grid& grid) {
  const int64_t per_row = ceil_div(grid.width, size);
  const int64_t y = index / per_row * size, x = index % per_row * size;
  return {y, x, smaller(size, grid.height - y), smaller(size, grid.width - x)};
}

DGE_INLINE int64_t count_regions(int64_t size, const Grid& grid) {
  return ceil_div(grid.height, size) * ceil_div(grid.width, size);
}

DGE_INLINE int64_t count_patches(const Region& region, int64_t side) {
  return ceil_div(region.rows, side) * ceil_div(region.cols, side);
}

// Patch number `index` of a region, row by row, for patches of `side` tokens.
DGE_INLINE Patch patch_at(const Region& region, int64_t side, int64_t index, int64_t image) {
  const int64_t per_row = ceil_div(region.cols, side);
  return {static_cast<int32_t>(image), static_cast<int32_t>(region.y + index / per_row * side),
          static_cast<int32_t>(region.x + index % per_row * side), static_cast<int32_t>(side)};
}

DGE_INLINE Patch prefix_patch(int64_t token, int64_t image) {
  return {static_cast<int32_t>(image), static_cast<int32_t>(-1 - token), 0, 1};
}

}  // namespace dge
