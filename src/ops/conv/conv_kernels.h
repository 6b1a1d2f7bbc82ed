// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/segment_walk.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct ShortConv {
  SegmentWalk segments;
  View<T> x;            // (T, C)
  View<Sum<T>> weight;  // (C, K)
  View<Sum<T>> bias;    // (C), or undefined
  bool silu;
  Sum<T>* state;  // (slots, C, K - 1) or null: before the segments; forward leaves those after them
  View<T> y;      // (T, C) contiguous
  void* kept;     // from forward to backward: the states before the segments, (S, C, K - 1)

  constexpr int64_t channels() const { return x.channels; }
  constexpr int64_t taps() const { return weight.channels; }
  constexpr int64_t state_size() const { return channels() * (taps() - 1); }
};

CAMBIUM_KEEPING_KERNEL(short_conv_forward, ShortConv)
/// Reads y.grad; adds to the gradients of the inputs.
CAMBIUM_PLANNED_KERNEL(short_conv_backward, ShortConv)

}  // namespace cambium
