// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/segment_walk.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct SelectiveScan {
  SegmentWalk segments;
  int64_t channels;  // d
  int64_t states;    // N
  int64_t b_groups;
  int64_t c_groups;
  bool sigmoid;          // act of z, else silu
  View<T> u, dt, z;      // (T, d)
  View<T> b, c;          // (T, groups, N), the groups of a token together
  View<Sum<T>> a_log;    // (d, N)
  View<Sum<T>> d;        // (d)
  View<Sum<T>> dt_bias;  // (d)
  Sum<T>* state;  // (slots, d, N) or null: before the segments; forward leaves those after them
  View<T> y;      // (T, d) contiguous
  void* kept;     // from forward to backward

  constexpr int64_t b_offset(int64_t channel) const {
    return channel / (channels / b_groups) * states;
  }
  constexpr int64_t c_offset(int64_t channel) const {
    return channel / (channels / c_groups) * states;
  }
  constexpr Sum<T>* state_of(int64_t segment) const {
    return state == nullptr ? nullptr : state + segments.row(segment) * channels * states;
  }
};

CAMBIUM_KEEPING_KERNEL(selective_scan_forward, SelectiveScan)
/// Reads y.grad; adds to the gradients of the inputs.
CAMBIUM_PLANNED_KERNEL(selective_scan_backward, SelectiveScan)

}  // namespace cambium
