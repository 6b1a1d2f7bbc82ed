// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/selective_scan/selective_scan_kernels.h"

namespace cambium {

template <class T>
struct ScanStep {
  SelectiveScan<T> scan;     // but for u
  View<T> x;                 // (T, d / repeat)
  View<Sum<T>> conv_weight;  // (d, taps)
  View<Sum<T>> conv_bias;    // (d), or undefined
  Sum<T>* conv;              // (slots, d, taps - 1): the inputs before; leaves those after
  int64_t repeat;            // heads of N channels that are made of one

  constexpr int64_t taps() const { return conv_weight.channels; }
  /// The channel of x that channel c is made of.
  constexpr int64_t source(int64_t c) const {
    return c / scan.states / repeat * scan.states + c % scan.states;
  }
  constexpr Sum<T>* conv_of(int64_t segment) const {
    return conv + scan.segments.row(segment) * scan.channels * (taps() - 1);
  }
};

CAMBIUM_PLANNED_KERNEL(scan_step_forward, ScanStep)

}  // namespace cambium
