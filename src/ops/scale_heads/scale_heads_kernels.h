// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct ScaleHeads {
  View<T> x;            // (T, H, D)
  View<Sum<T>> factor;  // (H)
  View<T> y;            // (T, H, D) contiguous

  constexpr int64_t tokens() const { return x.rows.outer; }
  constexpr int64_t heads() const { return x.rows.inner; }
};
CAMBIUM_KERNEL(scale_heads_forward, ScaleHeads)
CAMBIUM_KERNEL(scale_heads_backward, ScaleHeads)

}  // namespace cambium
