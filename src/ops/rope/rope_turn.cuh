// How a pair turns, for every kernel that turns one: the same bits in all of them.
#pragma once

#include "ops/cuda.cuh"

namespace cambium::cuda {

/// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
__device__ __forceinline__ void turn_pair(float cos, float sin, float& x1, float& x2) {
  const float first = fmaf(x1, cos, -__fmul_rn(x2, sin));
  x2 = fmaf(x2, cos, __fmul_rn(x1, sin));
  x1 = first;
}

}  // namespace cambium::cuda
