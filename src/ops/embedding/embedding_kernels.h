// Private to the operation: what its definition and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct Embedding {
  int64_t count;
  const int32_t* tokens;     // (count)
  View<Sum<T>> table;        // (V, C)
  View<bf16, float> narrow;  // (V, C) in place of table: bf16 where T is wider
  View<T> y;                 // (count, C) contiguous
};
CAMBIUM_KERNEL(embedding_forward, Embedding)
/// Reads y.grad, adds to table.grad.
CAMBIUM_KERNEL(embedding_backward, Embedding)

}  // namespace cambium
