// Private to the operation: what its definition and its kernels are given. A gradient is null where
// it is not wanted.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/segment_walk.h"

namespace cambium {

/// An input (T, width), rows `stride` apart.
template <class Real>
struct ScanRows {
  const Real* data;
  Real* grad;
  int64_t stride;

  const Real* row(int64_t t) const { return data + t * stride; }
  Real* grad_row(int64_t t) const { return grad == nullptr ? nullptr : grad + t * stride; }
};

template <class Real>
struct ScanArgs {
  SegmentWalk segments;
  int64_t channels;  // d
  int64_t states;    // N
  int64_t b_groups;
  int64_t c_groups;
  ScanRows<Real> u, dt, b, c, z;
  const Real* a_log;    // (d, N)
  const Real* d;        // (d)
  const Real* dt_bias;  // (d)
  Real* da_log;
  Real* dd;
  Real* ddt_bias;
  Real* state;     // (slots, d, N) or null: before the segments; forward leaves those after them
  Real* y;         // (T, d) contiguous
  const Real* dy;  // backward only

  int64_t b_offset(int64_t channel) const { return channel / (channels / b_groups) * states; }
  int64_t c_offset(int64_t channel) const { return channel / (channels / c_groups) * states; }
  Real* state_of(int64_t segment) const {
    return state == nullptr ? nullptr : state + segments.row(segment) * channels * states;
  }
};

}  // namespace cambium
