// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

/// For each head of each token: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the first
/// `half` dims and the `half` after them; the rest of the head is copied. Backward is the inverse
/// rotation of y.grad, added to x.grad.
template <class T>
struct Rope {
  View<T> x, y;  // (tokens, heads, channels)
  int64_t half = 0;
  const float* cos = nullptr;  // (tokens, half)
  const float* sin = nullptr;
  const int32_t* position = nullptr;        // (tokens): the definition turns by
  const float* const* frequency = nullptr;  // position * frequency[i], times amplitude
  float amplitude = 1.0F;
};

/// Tensors of the same tokens: queries and keys.
template <class T>
struct Ropes {
  int64_t count = 0;
  Rope<T> each[2];
};
CAMBIUM_KERNEL(rope_forward, Ropes)
CAMBIUM_KERNEL(rope_backward, Ropes)

}  // namespace cambium
