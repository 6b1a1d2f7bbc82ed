// Private to the operation: what its definition and its kernels are given.
#pragma once

#include <memory>

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

/// A weight (N, K): of the type it is multiplied in, or bf16 where that is wider.
template <class T>
struct MatmulWeight {
  View<Sum<T>> wide;
  View<bf16, float> narrow;  // in place of wide

  int64_t inputs() const { return narrow.defined() ? narrow.channels : wide.channels; }
};

/// y = [y +] x weight^T + bias, y of elements Y
template <class T, class Y>
struct MatmulTo {
  View<T> x;  // (T, K)
  MatmulWeight<T> weight;
  View<Sum<T>> bias;  // (N), or undefined
  View<Y> y;          // (T, N)
  bool accumulate;    // then without bias
};
template <class T>
using Matmul = MatmulTo<T, T>;

/// Most products of one x that are computed together.
inline constexpr int64_t kMaxMatmuls = 8;
/// Products of one x, whose outputs do not overlap; each has the bits it has by itself. What a call
/// does not use of its room is neither written nor copied.
template <class T, class Y>
struct MatmulsTo {
  /// of(i) is the i-th product.
  template <class Of>
  MatmulsTo(int64_t products, const Of& of) : count(products) {
    for (int64_t i = 0; i < count; ++i) {
      std::construct_at(each + i, of(i));
    }
  }
  MatmulsTo(const MatmulsTo&) = delete;
  MatmulsTo& operator=(const MatmulsTo&) = delete;

  int64_t count;
  union {
    MatmulTo<T, Y> each[kMaxMatmuls];  // the first `count` are there
  };
};
template <class T>
using Matmuls = MatmulsTo<T, T>;
CAMBIUM_PLANNED_KERNEL(matmul_forward, Matmuls)
/// The same, whose results are of the type that they are summed in.
template <class T>
using UnroundedMatmuls = MatmulsTo<T, Sum<T>>;
CAMBIUM_PLANNED_KERNEL(matmul_unrounded_forward, UnroundedMatmuls)

/// out = [out +] dy weight
template <class T>
struct MatmulGradInput {
  View<T> dy;  // (T, N)
  MatmulWeight<T> weight;
  View<T> out;  // (T, K)
  bool accumulate;
};
CAMBIUM_PLANNED_KERNEL(matmul_grad_input_of, MatmulGradInput)

/// out = [out +] dy^T x
template <class T>
struct MatmulGradWeight {
  View<T> dy;        // (T, N)
  View<T> x;         // (T, K)
  View<Sum<T>> out;  // (N, K)
  bool accumulate;
};
CAMBIUM_PLANNED_KERNEL(matmul_grad_weight_of, MatmulGradWeight)

/// y[b] = x[b] weight[b]^T, or x[b] weight[b] where the weights are `turned`. The matrices of a
/// tensor lie one behind the other.
template <class T>
struct MatmulBatch {
  int64_t count, rows, inner, columns;
  const T* x;       // (count, rows, inner)
  const T* weight;  // (count, columns, inner); turned (count, inner, columns)
  T* y;             // (count, rows, columns)
  bool turned;
};
CAMBIUM_PLANNED_KERNEL(matmul_batch, MatmulBatch)

/// out += the sum of the rows of dy
template <class T>
struct MatmulGradBias {
  View<T> dy;   // (T, N)
  Sum<T>* out;  // (N)
};
CAMBIUM_PLANNED_KERNEL(matmul_grad_bias, MatmulGradBias)

}  // namespace cambium
