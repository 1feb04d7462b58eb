// The arithmetic of regions and patches, for every grid up to 13 x 13 and several split sets.
#include "../../csrc/geometry.h"

#include "check.h"

using namespace dge;
using test::check;

// Each token of a grid belongs to exactly one patch, whatever the patches' side in each region.
void check_cover(int64_t height, int64_t width, int64_t size, int64_t divisor) {
  const Grid grid{height, width, 2};
  std::vector<int> covered(num_tokens(grid), 0);
  for (int64_t r = 0; r < count_regions(size, grid); ++r) {
    const Region region = region_at(r, size, grid);
    const int64_t side = r % 2 ? size : size / divisor;
    for (int64_t i = 0; i < count_patches(region, side); ++i) {
      const Patch patch = patch_at(region, side, i, 0);
      check(is_inside(patch, grid, 1), "a patch lies inside");
      const Span span = span_of(patch, grid);
      for (int32_t row = 0; row < span.rows; ++row) {
        for (int32_t col = 0; col < span.cols; ++col) ++covered.at(token_of(span, row, col));
      }
    }
  }
  for (int64_t t = 0; t < grid.prefix; ++t) {
    const Span span = span_of(prefix_patch(t, 0), grid);
    check(span.rows == 1 && span.cols == 1, "a prefix token is one token");
    ++covered.at(token_of(span, 0, 0));
  }
  for (int count : covered) check(count == 1, "each token is covered once");
}

int main() {
  for (int64_t height = 1; height <= 13; ++height) {
    for (int64_t width = 1; width <= 13; ++width) {
      for (int64_t divisor : {1, 2, 4}) check_cover(height, width, 4, divisor);
      check_cover(height, width, 6, 3);
    }
  }
  const Grid grid{5, 7, 1};
  check(!is_inside({0, 5, 0, 1}, grid, 1), "a row below the grid is outside");
  check(!is_inside({0, 0, 7, 1}, grid, 1), "a column right of the grid is outside");
  check(!is_inside({1, 0, 0, 1}, grid, 1), "an image past the batch is outside");
  check(!is_inside({-1, 0, 0, 1}, grid, 1), "a negative image is outside");
  check(!is_inside({0, 0, 0, 0}, grid, 1), "a patch without a side is outside");
  check(!is_inside({0, -2, 0, 1}, grid, 1), "a prefix token that does not exist is outside");
  check(is_inside({0, -1, 0, 1}, grid, 1), "a prefix token that exists is inside");
  check(is_inside({0, 4, 6, 4}, grid, 1), "a patch that crosses the edge is inside");
  return test::report("geometry");
}
