// Private to the operation: what its definition and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct Embedding {
  int64_t count;
  const int32_t* tokens;            // (count); below 0: newest[-1 - token]
  View<Sum<T>> table;               // (V, C)
  View<bf16, float> narrow;         // (V, C) in place of table: bf16 where T is wider
  View<T> y;                        // (count, C) contiguous
  const int32_t* newest = nullptr;  // may be null where no token is below 0

  /// A token that could not be chosen (-1: its logits were NaN, which its chooser tells) reads row
  /// 0.
  constexpr int64_t token(int64_t t) const {
    const int32_t own = tokens[t] < 0 ? newest[-1 - tokens[t]] : tokens[t];
    return own < 0 ? 0 : own;
  }
};
CAMBIUM_KERNEL(embedding_forward, Embedding)
/// Reads y.grad, adds to table.grad.
CAMBIUM_KERNEL(embedding_backward, Embedding)

}  // namespace cambium
