// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct JoinHeads {
  View<T> a;  // (T, H, A)
  View<T> b;  // (T, H, B) or (T, 1, B)
  View<T> y;  // (T, H, A + B) contiguous

  constexpr int64_t heads() const { return a.rows.inner; }
  constexpr bool shared() const { return b.rows.inner != heads(); }
};
CAMBIUM_KERNEL(join_heads_forward, JoinHeads)
CAMBIUM_KERNEL(join_heads_backward, JoinHeads)

}  // namespace cambium
