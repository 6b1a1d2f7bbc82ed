// The vector functions of base/simd.h over arrays, per instruction set.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

enum class VectorFunction { kExp, kLog, kSoftplus, kSigmoid, kSilu, kSiluGrad };

struct VectorMath {
  VectorFunction function;
  int64_t n;
  const float* x;
  float* y;
};

/// x and y are (n + 1, n): row r of y gets the first r columns of x, for r up to the lanes.
struct VectorParts {
  int64_t n;
  const float* x;
  float* y;
};

/// y = the transpose of the leading square of x, lanes x lanes; `lanes` receives their number.
struct VectorSquare {
  const float* x;
  float* y;
  int* lanes;
};

CAMBIUM_CPU_KERNEL(vector_math, VectorMath)
CAMBIUM_CPU_KERNEL(vector_parts, VectorParts)
CAMBIUM_CPU_KERNEL(vector_square, VectorSquare)

}  // namespace cambium
