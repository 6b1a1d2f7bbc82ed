// The naive definition, in the precision of its element type.
#pragma once

#include "ops/matmul/matmul_kernels.h"

namespace cambium {
namespace reference {

template <class T>
T weight_value(const MatmulWeight<T>& weight, int64_t n, int64_t k) {
  return weight.narrow.defined() ? static_cast<T>(widen(weight.narrow.row(n)[k]))
                                 : weight.wide.row(n)[k];
}

template <class T>
void matmul(const Matmul<T>& a) {
  for (int64_t t = 0; t < a.x.rows.outer; ++t) {
    for (int64_t n = 0; n < a.y.channels; ++n) {
      T sum = 0;
      for (int64_t k = 0; k < a.x.channels; ++k) {
        sum += a.x.row(t)[k] * weight_value(a.weight, n, k);
      }
      if (a.bias.defined()) {
        sum += a.bias.data[n];
      }
      a.y.row(t)[n] = a.accumulate ? a.y.row(t)[n] + sum : sum;
    }
  }
}

}  // namespace reference

template <class T>
void matmul_forward::reference(const Matmuls<T>& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    reference::matmul(a.each[i]);
  }
}

template <class T>
void matmul_unrounded_forward::reference(const UnroundedMatmuls<T>& a) {
  matmul_forward::reference(a);  // which is of f32 and f64, the types of sums
}

template <class T>
void matmul_grad_input_of::reference(const MatmulGradInput<T>& a) {
  for (int64_t t = 0; t < a.dy.rows.outer; ++t) {
    for (int64_t k = 0; k < a.out.channels; ++k) {
      T sum = 0;
      for (int64_t n = 0; n < a.dy.channels; ++n) {
        sum += a.dy.row(t)[n] * reference::weight_value(a.weight, n, k);
      }
      a.out.row(t)[k] = a.accumulate ? a.out.row(t)[k] + sum : sum;
    }
  }
}

template <class T>
void matmul_grad_weight_of::reference(const MatmulGradWeight<T>& a) {
  for (int64_t n = 0; n < a.dy.channels; ++n) {
    for (int64_t k = 0; k < a.x.channels; ++k) {
      Sum<T> sum = 0;
      for (int64_t t = 0; t < a.dy.rows.outer; ++t) {
        sum += a.dy.row(t)[n] * a.x.row(t)[k];
      }
      a.out.row(n)[k] = a.accumulate ? a.out.row(n)[k] + sum : sum;
    }
  }
}

template <class T>
void matmul_batch::reference(const MatmulBatch<T>& a) {
  for (int64_t i = 0; i < a.count * a.rows; ++i) {
    const T* x = a.x + i * a.inner;
    const T* weight = a.weight + i / a.rows * a.inner * a.columns;
    for (int64_t c = 0; c < a.columns; ++c) {
      T sum = 0;
      for (int64_t k = 0; k < a.inner; ++k) {
        sum += x[k] * (a.turned ? weight[k * a.columns + c] : weight[c * a.inner + k]);
      }
      a.y[i * a.columns + c] = sum;
    }
  }
}

template <class T>
void matmul_grad_bias::reference(const MatmulGradBias<T>& a) {
  for (int64_t n = 0; n < a.dy.channels; ++n) {
    for (int64_t t = 0; t < a.dy.rows.outer; ++t) {
      a.out[n] += a.dy.row(t)[n];
    }
  }
}

}  // namespace cambium
