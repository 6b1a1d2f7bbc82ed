// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "tensor/rows.h"

namespace cambium {

struct RmsNormForward {
  Rows rows;  // of x
  int64_t channels;
  const float* x;
  const float* weight;  // (channels)
  float eps;
  float* y;  // (rows.count(), channels) contiguous
};

struct RmsNormBackward {
  Rows rows;  // of x
  int64_t channels;
  const float* x;
  const float* weight;
  float eps;
  const float* dy;  // (rows.count(), channels) contiguous
  float* dx;        // added to, strided as x; null when not wanted
  float* dweight;   // (channels), added to; null when not wanted
};

CAMBIUM_CPU_KERNEL(rms_norm_forward, RmsNormForward)
CAMBIUM_CPU_KERNEL(rms_norm_backward, RmsNormBackward)

}  // namespace cambium
