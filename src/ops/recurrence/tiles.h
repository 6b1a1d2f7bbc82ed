// Small dense products for *_cpu.cc kernels: matrices of a chunk, held in cache, padded to
// multiples of 16 in both directions so that no tile has an edge.
#pragma once

#include "base/simd.h"

namespace cambium::CAMBIUM_ISA {

inline constexpr int64_t kTile = 16;
/// Vectors in a row of a tile.
inline constexpr int kTileVectors = static_cast<int>(kTile) / kLanes;

enum class Into { kSet, kAdd, kSubtract };

/// The left operand: element (i, d) is p[i * row + d * depth]; its transpose swaps the strides.
struct Left {
  const float* p;
  int64_t row;
  int64_t depth;
};

namespace tiles {

template <Into kInto, int kRows, int kVectors>
static inline void multiply_block(int64_t depth, const Left& a, const float* b, int64_t b_row,
                                  float* c, int64_t c_row) {
  vf sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = kInto == Into::kSet ? vf{} : vload(c + i * c_row + j * kLanes);
    }
  }
  const float* p = a.p;
  for (int64_t d = 0; d < depth; ++d) {
    vf row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      row[j] = vload(b + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const vf x = vset(p[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (kInto == Into::kSubtract) {
          sum[i][j] -= x * row[j];
        } else {
          sum[i][j] += x * row[j];
        }
      }
    }
    p += a.depth;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      vstore(c + i * c_row + j * kLanes, sum[i][j]);
    }
  }
}

// As many rows as leave the accumulators in registers.
inline constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;

}  // namespace tiles

/// c (rows, columns) = or += or -= a (rows, depth) b (depth, columns); rows and columns multiples
/// of 16.
template <Into kInto>
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const Left& a,
                            const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t j = 0;
  if constexpr (kLanes == 16) {
    for (; j + 2 * kTile <= columns; j += 2 * kTile) {
      for (int64_t i = 0; i < rows; i += tiles::kRows) {
        tiles::multiply_block<kInto, tiles::kRows, 2>(depth, {a.p + i * a.row, a.row, a.depth},
                                                      b + j, b_row, c + i * c_row + j, c_row);
      }
    }
  }
  for (; j < columns; j += kTile) {
    for (int64_t i = 0; i < rows; i += tiles::kRows) {
      tiles::multiply_block<kInto, tiles::kRows, kTileVectors>(
          depth, {a.p + i * a.row, a.row, a.depth}, b + j, b_row, c + i * c_row + j, c_row);
    }
  }
}

/// to (columns, rows) = from (rows, columns) transposed.
static inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row,
                             float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        square[l] = vload(from + (i + l) * from_row + j);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        vstore(to + (j + l) * to_row + i, square[l]);
      }
    }
  }
}

/// Rows of `dim` elements, `from_row` apart, into padded rows; rows [count, padded_count) are zero.
static inline void load_rows(int64_t count, int64_t padded_count, int64_t dim, const float* from,
                             int64_t from_row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < to_row; j += kLanes) {
      const int64_t left = dim - j;
      vstore(to + i * to_row + j, left > 0 ? vload_upto(from + i * from_row + j, left) : vf{});
    }
  }
  for (int64_t i = count * to_row; i < padded_count * to_row; i += kLanes) {
    vstore(to + i, vf{});
  }
}

/// to += from, over the first `dim` elements of each row; sets instead if `set`.
static inline void store_rows(int64_t count, int64_t dim, const float* from, int64_t from_row,
                              float* to, int64_t to_row, bool set) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < dim; j += kLanes) {
      const int64_t left = dim - j;
      float* p = to + i * to_row + j;
      const vf x = vload(from + i * from_row + j);
      vstore_upto(p, set ? x : vload_upto(p, left) + x, left);
    }
  }
}

}  // namespace cambium::CAMBIUM_ISA
