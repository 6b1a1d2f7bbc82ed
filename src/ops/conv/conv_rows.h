// Private to the operation on the CPU: its kernels walk along channels, so that they take the
// weight transposed.
#pragma once

#include "ops/conv/conv_kernels.h"

namespace cambium {

struct ConvRows {
  ShortConv<float> op;
  const float* weight;  // (K, C): transposed; not for few rows
  float* state;         // before the segments; the rows of segments as `walk` says
  SegmentWalk walk;
  float* dpre;  // backward only: (T, C) scratch, the gradient before the activation
};

CAMBIUM_CPU_KERNEL(conv_rows_forward, ConvRows)
/// For up to this many tokens, as in decoding: a transposed copy of the weight would take longer
/// than the convolution. It turns what it reads in registers, and leaves the state too.
inline constexpr int64_t kConvFewTokens = 32;
inline constexpr int64_t kConvFewTaps = 8;
CAMBIUM_CPU_KERNEL(conv_few_rows_forward, ConvRows)
CAMBIUM_CPU_KERNEL(conv_rows_backward, ConvRows)

}  // namespace cambium
