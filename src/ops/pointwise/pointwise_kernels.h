// Private to the operations: what their kernels are given. Results and their gradients are
// contiguous; inputs are walked by their Rows, gradients of inputs as the inputs.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "tensor/rows.h"

namespace cambium {

/// y = f(a, b), element by element; b is null for functions of one argument.
struct Pointwise {
  Rows a_rows, b_rows;
  int64_t channels;
  const float* a;
  const float* b;
  float* y;
};

struct PointwiseGrad {
  Rows a_rows, b_rows;
  int64_t channels;
  const float* a;
  const float* b;
  const float* dy;
  float* da;  // added to; null when not wanted
  float* db;
};

CAMBIUM_CPU_KERNEL(add_forward, Pointwise)
CAMBIUM_CPU_KERNEL(add_backward, PointwiseGrad)
CAMBIUM_CPU_KERNEL(swiglu_forward, Pointwise)
CAMBIUM_CPU_KERNEL(swiglu_backward, PointwiseGrad)
CAMBIUM_CPU_KERNEL(sigmoid_forward, Pointwise)
CAMBIUM_CPU_KERNEL(sigmoid_backward, PointwiseGrad)

/// y (T, H) from x (T, H) and a parameter p (H).
struct PerHead {
  int64_t tokens, heads;
  int64_t x_row;
  const float* x;
  const float* p;  // bias or a_log
  float lo, hi;    // of step_size
  float* y;
};

struct PerHeadGrad {
  int64_t tokens, heads;
  int64_t x_row;
  const float* x;
  const float* p;
  float lo, hi;
  const float* dy;
  float* dx;  // added to; null when not wanted
  float* dp;
};

CAMBIUM_CPU_KERNEL(step_size_forward, PerHead)
CAMBIUM_CPU_KERNEL(step_size_backward, PerHeadGrad)
CAMBIUM_CPU_KERNEL(log_decay_forward, PerHead)
CAMBIUM_CPU_KERNEL(log_decay_backward, PerHeadGrad)

struct RepeatHeads {
  Rows rows;  // of x: tokens, groups
  int64_t channels, times;
  const float* x;
  float* y;
};

struct RepeatHeadsGrad {
  Rows rows;
  int64_t channels, times;
  const float* dy;
  float* dx;
};

CAMBIUM_CPU_KERNEL(repeat_heads_forward, RepeatHeads)
CAMBIUM_CPU_KERNEL(repeat_heads_backward, RepeatHeadsGrad)

}  // namespace cambium
