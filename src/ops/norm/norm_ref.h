// The naive definition, in the precision of its argument type, forward and backward.
#pragma once

#include <cmath>
#include <cstdint>

#include "tensor/rows.h"

namespace cambium::reference {

template <class Real>
void rms_norm_forward(const Rows& rows, int64_t channels, const Real* x, const Real* weight,
                      Real eps, Real* y) {
  for (int64_t r = 0; r < rows.count(); ++r) {
    const Real* in = x + rows.offset(r);
    Real square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += in[c] * in[c];
    }
    const Real rstd = 1 / std::sqrt(square / static_cast<Real>(channels) + eps);
    for (int64_t c = 0; c < channels; ++c) {
      y[r * channels + c] = in[c] * rstd * weight[c];
    }
  }
}

/// dx += rstd (t - x^ mean(x^ t)), dweight += dy x^, with t = dy weight and x^ = x rstd.
template <class Real>
void rms_norm_backward(const Rows& rows, int64_t channels, const Real* x, const Real* weight,
                       Real eps, const Real* dy, Real* dx, Real* dweight) {
  for (int64_t r = 0; r < rows.count(); ++r) {
    const Real* in = x + rows.offset(r);
    const Real* grad = dy + r * channels;
    Real square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += in[c] * in[c];
    }
    const Real rstd = 1 / std::sqrt(square / static_cast<Real>(channels) + eps);
    Real mean = 0;
    for (int64_t c = 0; c < channels; ++c) {
      mean += in[c] * rstd * grad[c] * weight[c];
    }
    mean /= static_cast<Real>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      if (dx != nullptr) {
        dx[rows.offset(r) + c] += rstd * (grad[c] * weight[c] - in[c] * rstd * mean);
      }
      if (dweight != nullptr) {
        dweight[c] += grad[c] * in[c] * rstd;
      }
    }
  }
}

}  // namespace cambium::reference
