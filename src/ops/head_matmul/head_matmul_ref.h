// The naive definition, in the precision of its element type.
#pragma once

#include "ops/head_matmul/head_matmul_kernels.h"
#include "ops/matmul/matmul_ref.h"

namespace cambium {
namespace reference {

/// y[t, h, c] = [y +] sum over i of x[t, h, i] weight_of(h, c, i).
template <class T, class WeightOf>
void head_product(const HeadMatmul<T>& a, const WeightOf& weight_of) {
  for (int64_t t = 0; t < a.tokens(); ++t) {
    for (int64_t h = 0; h < a.heads(); ++h) {
      for (int64_t c = 0; c < a.y.channels; ++c) {
        T sum = 0;
        for (int64_t i = 0; i < a.x.channels; ++i) {
          sum += a.x.row(t, h)[i] * weight_of(h, c, i);
        }
        T& y = a.y.row(t, h)[c];
        y = a.accumulate ? y + sum : sum;
      }
    }
  }
}

}  // namespace reference

template <class T>
void head_matmul_forward::reference(const HeadMatmul<T>& a) {
  ::cambium::reference::head_product(a, [&](int64_t h, int64_t n, int64_t k) {
    return ::cambium::reference::weight_value(a.weight, h * a.y.channels + n, k);
  });
}

template <class T>
void head_matmul_transposed_forward::reference(const HeadMatmul<T>& a) {
  ::cambium::reference::head_product(a, [&](int64_t h, int64_t k, int64_t n) {
    return ::cambium::reference::weight_value(a.weight, h * a.x.channels + n, k);
  });
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
