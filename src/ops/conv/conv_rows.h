// Private to the operation on the CPU: its kernels walk along channels, so that they take the
// weight transposed.
#pragma once

#include "ops/conv/conv_kernels.h"

namespace cambium {

struct ConvRows {
  ShortConv<float> op;
  const float* weight;  // (K, C): transposed
  const float* state;   // before the segments; the rows of segments as `walk` says
  SegmentWalk walk;
  float* dpre;  // backward only: (T, C) scratch, the gradient before the activation
};

CAMBIUM_CPU_KERNEL(conv_rows_forward, ConvRows)
CAMBIUM_CPU_KERNEL(conv_rows_backward, ConvRows)

}  // namespace cambium
