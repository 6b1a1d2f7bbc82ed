// The naive definition, in the precision of its element type.
#pragma once

#include "ops/head_matmul/head_matmul_kernels.h"

namespace cambium {
namespace reference {

template <class T>
T head_weight(const MatmulWeight<T>& weight, int64_t h, int64_t n, int64_t k) {
  return weight.narrow.defined() ? static_cast<T>(widen(weight.narrow.row(h, n)[k]))
                                 : static_cast<T>(weight.wide.row(h, n)[k]);
}

}  // namespace reference

template <class T>
void head_matmul_forward::reference(const HeadMatmul<T>& a) {
  for (int64_t t = 0; t < a.tokens(); ++t) {
    for (int64_t h = 0; h < a.heads(); ++h) {
      for (int64_t n = 0; n < a.y.channels; ++n) {
        T sum = 0;
        for (int64_t k = 0; k < a.x.channels; ++k) {
          sum += a.x.row(t, h)[k] * reference::head_weight(a.weight, h, n, k);
        }
        T& y = a.y.row(t, h)[n];
        y = a.accumulate ? y + sum : sum;
      }
    }
  }
}

template <class T>
void head_matmul_transposed_forward::reference(const HeadMatmul<T>& a) {
  for (int64_t t = 0; t < a.tokens(); ++t) {
    for (int64_t h = 0; h < a.heads(); ++h) {
      for (int64_t k = 0; k < a.y.channels; ++k) {
        T sum = 0;
        for (int64_t n = 0; n < a.x.channels; ++n) {
          sum += a.x.row(t, h)[n] * reference::head_weight(a.weight, h, n, k);
        }
        T& y = a.y.row(t, h)[k];
        y = a.accumulate ? y + sum : sum;
      }
    }
  }
}

template <class T>
void head_matmul_grad_weight::reference(const HeadMatmulGradWeight<T>& a) {
  for (int64_t h = 0; h < a.n.rows.inner; ++h) {
    for (int64_t n = 0; n < a.n.channels; ++n) {
      for (int64_t k = 0; k < a.k.channels; ++k) {
        Sum<T> sum = 0;
        for (int64_t t = 0; t < a.n.rows.outer; ++t) {
          sum += a.n.row(t, h)[n] * a.k.row(t, h)[k];
        }
        a.out.row(h, n)[k] += sum;
      }
    }
  }
}

}  // namespace cambium
