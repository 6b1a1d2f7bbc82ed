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

/// silu or sigmoid of a gate.
template <class Real>
Real gate_value(bool sigmoid, Real z) {
  const Real s = 1 / (1 + std::exp(-z));
  return sigmoid ? s : z * s;
}
template <class Real>
Real gate_slope(bool sigmoid, Real z) {
  const Real s = 1 / (1 + std::exp(-z));
  return sigmoid ? s * (1 - s) : s * (1 + z * (1 - s));
}

/// Rows are the groups of the tokens; the weight of row r starts at (r % inner) * weight_step.
template <class Real>
void gated_norm_forward(const Rows& x_rows, const Rows& gate_rows, int64_t group, bool gate_first,
                        bool sigmoid, const Real* x, const Real* gate, const Real* weight,
                        int64_t weight_step, Real eps, Real* y) {
  for (int64_t r = 0; r < x_rows.count(); ++r) {
    const Real* in = x + x_rows.offset(r);
    const Real* z = gate + gate_rows.offset(r);
    const Real* w = weight + r % x_rows.inner * weight_step;
    Real square = 0;
    for (int64_t c = 0; c < group; ++c) {
      const Real u = gate_first ? in[c] * gate_value(sigmoid, z[c]) : in[c];
      square += u * u;
    }
    const Real rstd = 1 / std::sqrt(square / static_cast<Real>(group) + eps);
    for (int64_t c = 0; c < group; ++c) {
      y[r * group + c] = in[c] * gate_value(sigmoid, z[c]) * rstd * w[c];
    }
  }
}

/// Gate first: with u = x a(z), t = dy weight: du = rstd (t - u^ mean(u^ t)), dx += du a(z),
/// dgate += du x a'(z). Norm first: with t = dy weight a(z): dx += rstd (t - x^ mean(x^ t)),
/// dgate += dy x^ weight a'(z). Either way dweight += dy x a(z) rstd.
template <class Real>
void gated_norm_backward(const Rows& x_rows, const Rows& gate_rows, int64_t group, bool gate_first,
                         bool sigmoid, const Real* x, const Real* gate, const Real* weight,
                         int64_t weight_step, Real eps, const Real* dy, Real* dx, Real* dgate,
                         Real* dweight) {
  for (int64_t r = 0; r < x_rows.count(); ++r) {
    const Real* in = x + x_rows.offset(r);
    const Real* z = gate + gate_rows.offset(r);
    const int64_t at_weight = r % x_rows.inner * weight_step;
    const Real* w = weight + at_weight;
    const Real* grad = dy + r * group;
    Real square = 0;
    Real dot = 0;  // of what is normalised with its scaled gradient: x a(z) dy w in either order
    for (int64_t c = 0; c < group; ++c) {
      const Real a = gate_value(sigmoid, z[c]);
      const Real u = gate_first ? in[c] * a : in[c];
      square += u * u;
      dot += in[c] * a * grad[c] * w[c];
    }
    const Real rstd = 1 / std::sqrt(square / static_cast<Real>(group) + eps);
    const Real mean = dot * rstd * rstd / static_cast<Real>(group);
    for (int64_t c = 0; c < group; ++c) {
      const Real a = gate_value(sigmoid, z[c]);
      const Real slope = gate_slope(sigmoid, z[c]);
      const Real t = grad[c] * w[c];
      const Real du = gate_first ? rstd * (t - in[c] * a * mean) : rstd * (t * a - in[c] * mean);
      if (dx != nullptr) {
        dx[x_rows.offset(r) + c] += gate_first ? du * a : du;
      }
      if (dgate != nullptr) {
        dgate[gate_rows.offset(r) + c] += (gate_first ? du : t * rstd) * in[c] * slope;
      }
      if (dweight != nullptr) {
        dweight[at_weight + c] += grad[c] * in[c] * a * rstd;
      }
    }
  }
}

template <class Real>
void l2_norm_forward(const Rows& rows, int64_t channels, Real eps, Real scale, const Real* x,
                     Real* y) {
  for (int64_t r = 0; r < rows.count(); ++r) {
    const Real* in = x + rows.offset(r);
    Real square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += in[c] * in[c];
    }
    const Real inverse = 1 / std::sqrt(square + eps);
    for (int64_t c = 0; c < channels; ++c) {
      y[r * channels + c] = scale * in[c] * inverse;
    }
  }
}

/// With r = rsqrt(sum(x^2) + eps): dx += scale r (dy - x r^2 (x . dy)).
template <class Real>
void l2_norm_backward(const Rows& rows, int64_t channels, Real eps, Real scale, const Real* x,
                      const Real* dy, Real* dx) {
  for (int64_t r = 0; r < rows.count(); ++r) {
    const Real* in = x + rows.offset(r);
    Real square = 0;
    Real dot = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += in[c] * in[c];
      dot += in[c] * dy[r * channels + c];
    }
    const Real inverse = 1 / std::sqrt(square + eps);
    for (int64_t c = 0; c < channels; ++c) {
      dx[rows.offset(r) + c] +=
          scale * inverse * (dy[r * channels + c] - in[c] * inverse * inverse * dot);
    }
  }
}

}  // namespace cambium::reference
