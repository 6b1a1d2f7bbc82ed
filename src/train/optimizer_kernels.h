// What the optimiser asks of the CPU. Private to src/train.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

/// p -= rate * (m^ / (sqrt(v^) + epsilon) + decay * p), and g = 0.
struct AdamwUpdate {
  int64_t n;
  float* p;
  float* g;
  float* m;
  float* v;
  float gradient_scale;  // g is multiplied by it first
  float rate;
  float beta1, beta2;
  float m_correction, v_correction;  // 1 / (1 - beta^t)
  float epsilon;
  float weight_decay;
};
CAMBIUM_CPU_KERNEL(adamw_update, AdamwUpdate)

/// *result = sum of squares, in a fixed order: floats inside a block, doubles across blocks.
struct SumSquares {
  int64_t n;
  const float* x;
  double* result;
};
CAMBIUM_CPU_KERNEL(sum_squares, SumSquares)

}  // namespace cambium
