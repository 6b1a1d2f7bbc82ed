// The naive definition, in the precision of its argument type. W is Real or bf16.
#pragma once

#include <cstdint>

#include "base/float16.h"

namespace cambium::reference {

template <class Real, class W>
Real weight_value(W w) {
  return static_cast<Real>(widen(w));
}

/// y (T, N) = [y +] x (T, K) w (N, K)^T + bias (N)
template <class Real, class W>
void matmul_forward(int64_t t, int64_t n, int64_t k, const Real* x, int64_t x_row, const W* w,
                    const Real* bias, Real* y, int64_t y_row, bool accumulate) {
  for (int64_t i = 0; i < t; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Real sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += x[i * x_row + p] * weight_value<Real>(w[j * k + p]);
      }
      if (bias != nullptr) {
        sum += bias[j];
      }
      y[i * y_row + j] = accumulate ? y[i * y_row + j] + sum : sum;
    }
  }
}

/// dx (T, K) = [dx +] dy (T, N) w (N, K)
template <class Real, class W>
void matmul_grad_input(int64_t t, int64_t n, int64_t k, const Real* dy, int64_t dy_row, const W* w,
                       Real* dx, int64_t dx_row, bool accumulate) {
  for (int64_t i = 0; i < t; ++i) {
    for (int64_t p = 0; p < k; ++p) {
      Real sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        sum += dy[i * dy_row + j] * weight_value<Real>(w[j * k + p]);
      }
      dx[i * dx_row + p] = accumulate ? dx[i * dx_row + p] + sum : sum;
    }
  }
}

/// dw (N, K) = [dw +] dy (T, N)^T x (T, K)
template <class Real>
void matmul_grad_weight(int64_t t, int64_t n, int64_t k, const Real* dy, int64_t dy_row,
                        const Real* x, int64_t x_row, Real* dw, int64_t dw_row, bool accumulate) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t p = 0; p < k; ++p) {
      Real sum = 0;
      for (int64_t i = 0; i < t; ++i) {
        sum += dy[i * dy_row + j] * x[i * x_row + p];
      }
      dw[j * dw_row + p] = accumulate ? dw[j * dw_row + p] + sum : sum;
    }
  }
}

/// sum (N) += column sums of dy (T, N)
template <class Real>
void matmul_grad_bias(int64_t t, int64_t n, const Real* dy, int64_t dy_row, Real* sum) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < t; ++i) {
      sum[j] += dy[i * dy_row + j];
    }
  }
}

}  // namespace cambium::reference
