// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/segment_walk.h"

namespace cambium {

struct ShortConvForward {
  SegmentWalk segments;
  int64_t channels;
  int64_t taps;
  const float* x;  // (T, channels), rows x_stride apart
  int64_t x_stride;
  const float* weight;  // (taps, channels): transposed
  const float* bias;    // (channels) or null
  bool silu;
  const float* state;  // (slots, channels, taps - 1) or null
  float* y;            // (T, channels) contiguous
};

struct ShortConvBackward {
  ShortConvForward forward;  // its y is scratch: the gradient before the activation
  const float* dy;           // (T, channels) contiguous
  float* dx;                 // added to, strided as x; null when not wanted
  float* dweight;            // (channels, taps), added to; null when not wanted
  float* dbias;              // (channels), added to; null when not wanted
};

CAMBIUM_CPU_KERNEL(short_conv_forward, ShortConvForward)
CAMBIUM_CPU_KERNEL(short_conv_backward, ShortConvBackward)

}  // namespace cambium
