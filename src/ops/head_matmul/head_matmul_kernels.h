// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/matmul/matmul_kernels.h"

namespace cambium {

/// y = [y +] x weight^T a head, or x weight where it is transposed.
template <class T>
struct HeadMatmul {
  View<T> x;               // (T, H, K), or (T, H, N)
  MatmulWeight<T> weight;  // (H, N, K)
  View<T> y;               // (T, H, N), or (T, H, K)
  bool accumulate;

  constexpr int64_t tokens() const { return x.rows.outer; }
  constexpr int64_t heads() const { return x.rows.inner; }
};
CAMBIUM_KERNEL(head_matmul_forward, HeadMatmul)
CAMBIUM_KERNEL(head_matmul_transposed_forward, HeadMatmul)

/// out[h, n, k] += sum over t of n[t, h, n] k[t, h, k]
template <class T>
struct HeadMatmulGradWeight {
  View<T> n;         // (T, H, N)
  View<T> k;         // (T, H, K)
  View<Sum<T>> out;  // (H, N, K)
};
CAMBIUM_KERNEL(head_matmul_grad_weight, HeadMatmulGradWeight)

}  // namespace cambium
