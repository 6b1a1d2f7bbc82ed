// Rows: how to walk the rows (last axis) of a tensor (T, ..., C) whose tokens may lie further apart
// than their own size, as in a column slice of a fused projection split into heads. Free of
// containers, for kernels.
#pragma once

#include <cstdint>

namespace cambium {

struct Rows {
  int64_t outer = 0;         // tokens
  int64_t inner = 1;         // rows of a token
  int64_t outer_stride = 0;  // in elements
  int64_t inner_stride = 0;

  constexpr int64_t count() const { return outer * inner; }
  /// Offset of row r, counted over tokens and rows of a token.
  constexpr int64_t offset(int64_t r) const {
    return outer_stride == inner * inner_stride ? r * inner_stride : offset(r / inner, r % inner);
  }
  /// Offset of row i of token t.
  constexpr int64_t offset(int64_t t, int64_t i) const {
    return t * outer_stride + i * inner_stride;
  }
};

}  // namespace cambium
