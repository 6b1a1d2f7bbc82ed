// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "tensor/rows.h"

namespace cambium {

/// For each head of each token: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the first
/// `half` dims and the `half` after them; the rest of the head is copied. With `inverse` the angle
/// is turned round. The backward pass is the inverse rotation of the gradient, added.
struct Rotate {
  Rows x_rows, y_rows;  // tokens, heads
  int64_t channels, half;
  const int32_t* position;  // (tokens)
  const float* cos;         // (positions, half)
  const float* sin;
  bool inverse;
  bool accumulate;  // add to y
  const float* x;
  float* y;
};

CAMBIUM_CPU_KERNEL(rotate, Rotate)

}  // namespace cambium
