// Products of one form side by side, by cuBLASLt, for operations whose heads have weights of their
// own.
#pragma once

#include <cstdint>

#include "ops/kernel.h"

namespace cambium::cuda {

/// `count` products c (m, n) = [c +] a (m, k) b, row-major with rows so many elements apart, b
/// being (k, n) or its transpose (n, k); from one to the next operands lie a step apart.
template <class T>
struct SideBySide {
  int64_t count, m, n, k;
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_row, b_step;
  bool b_transposed;
  T* c;
  int64_t c_row, c_step;
  bool accumulate;
};
/// False, and nothing done, where the library does not serve the sizes.
template <class T>
bool side_by_side(const SideBySide<T>& p, const Launch& on);

}  // namespace cambium::cuda
