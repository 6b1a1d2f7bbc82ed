// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

/// For each head of each token: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the first
/// `half` dims and the `half` after them, or over neighbours where pairs are interleaved; the rest
/// of the head is copied. All of it is then times the token's scale. Backward is the inverse
/// rotation of y.grad times the scale, added to x.grad or, where `set` (on CUDA alone), in its
/// place.
template <class T>
struct Rope {
  View<T> x, y;  // (tokens, heads, channels)
  int64_t half = 0;
  const float* cos = nullptr;  // (tokens, half)
  const float* sin = nullptr;
  const int32_t* position = nullptr;        // (tokens): the definition turns by
  const float* const* frequency = nullptr;  // position * frequency[i], times amplitude
  float amplitude = 1.0F;
  bool interleaved = false;
  const float* scale = nullptr;  // (tokens), or null: 1
  double beta = 0.0;  // the definition scales by 1 + beta ln(1 + floor(position / length))
  int64_t length = 1;
  bool set = false;
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
