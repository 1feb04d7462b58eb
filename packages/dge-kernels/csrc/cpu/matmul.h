// A register-tiled matrix product for panels that fit the cache. Included by kernels.cpp alone.
#pragma once

#include "half_types.h"

namespace DGE_ISA {

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(DGE_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = DGE_VECTOR_BYTES / sizeof(A);

// Tiles of kTileRows x 3 vectors keep the accumulators, three operands and a broadcast in registers.
#if DGE_VECTOR_BYTES == 64
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

template <class A>
DGE_INLINE Vec<A> load_vector(const A* from) {
  Vec<A> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
DGE_INLINE void store_vector(A* to, Vec<A> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// An operand that is read one element at a time, with any strides.
template <class A>
struct Strided {
  const A* data;
  int64_t row, col;
};

template <int R, int V, class A>
DGE_INLINE void tile(int64_t depth, Strided<A> a, const A* b, int64_t b_row, A* c, int64_t c_row, bool add) {
  Vec<A> sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) sum[i][j] = add ? load_vector(c + i * c_row + j * kLanes<A>) : Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> operand[V];
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) operand[j] = load_vector(b + k * b_row + j * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const A factor = a.data[i * a.row + k * a.col];
#pragma GCC unroll 3
      for (int j = 0; j < V; ++j) sum[i][j] += operand[j] * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) store_vector(c + i * c_row + j * kLanes<A>, sum[i][j]);
  }
}

template <int V, class A>
void panel(int64_t rows, int64_t depth, Strided<A> a, const A* b, int64_t b_row, A* c, int64_t c_row, bool add) {
  const auto advance = [&](int64_t done) {
    a.data += done * a.row;
    c += done * c_row;
    rows -= done;
  };
  for (; rows >= kTileRows; advance(kTileRows)) tile<kTileRows, V>(depth, a, b, b_row, c, c_row, add);
  for (; rows >= 4; advance(4)) tile<4, V>(depth, a, b, b_row, c, c_row, add);
  for (; rows >= 2; advance(2)) tile<2, V>(depth, a, b, b_row, c, c_row, add);
  for (; rows >= 1; advance(1)) tile<1, V>(depth, a, b, b_row, c, c_row, add);
}

// c [rows, cols] = or += a [rows, depth] · b [depth, cols]; cols is a multiple of the vector's lanes. Each
// element is summed over depth in order, whatever the tile, so a row's result does not depend on the others.
template <class A>
void matmul(int64_t rows, int64_t cols, int64_t depth, Strided<A> a, const A* b, int64_t b_row, A* c, int64_t c_row,
            bool add = false) {
  for (int64_t left = cols / kLanes<A>; left > 0;) {
    const int64_t width = left == 4 ? 2 : smaller(left, kTileVectors);
    if (width == 3) panel<3>(rows, depth, a, b, b_row, c, c_row, add);
    if (width == 2) panel<2>(rows, depth, a, b, b_row, c, c_row, add);
    if (width == 1) panel<1>(rows, depth, a, b, b_row, c, c_row, add);
    left -= width;
    b += width * kLanes<A>;
    c += width * kLanes<A>;
  }
}

}  // namespace DGE_ISA
