// The naive definitions, in the precision of their argument type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "tensor/rows.h"

namespace cambium::reference {

template <class Real>
Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));
}
template <class Real>
Real softplus(Real x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}
template <class Real>
Real softplus_grad(Real x) {
  return x > 20 ? 1 : sigmoid(x);
}

// A function of one or two arguments: its value, and what the gradient dy of the value adds to the
// gradients of the arguments.
struct Add {
  template <class Real>
  static Real value(Real a, Real b) {
    return a + b;
  }
  template <class Real>
  static void grad(Real, Real, Real dy, Real& da, Real& db) {
    da = dy;
    db = dy;
  }
};

struct Swiglu {
  template <class Real>
  static Real value(Real gate, Real up) {
    return gate * sigmoid(gate) * up;
  }
  template <class Real>
  static void grad(Real gate, Real up, Real dy, Real& dgate, Real& dup) {
    const Real s = sigmoid(gate);
    dgate = dy * up * s * (1 + gate * (1 - s));
    dup = dy * gate * s;
  }
};

struct Sigmoid {
  template <class Real>
  static Real value(Real x, Real) {
    return sigmoid(x);
  }
  template <class Real>
  static void grad(Real x, Real, Real dy, Real& dx, Real&) {
    const Real s = sigmoid(x);
    dx = dy * s * (1 - s);
  }
};

template <class F, class Real>
void pointwise(const Rows& a_rows, const Rows& b_rows, int64_t channels, const Real* a,
               const Real* b, Real* y) {
  for (int64_t r = 0; r < a_rows.count(); ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      y[r * channels + c] = F::template value<Real>(
          a[a_rows.offset(r) + c], b == nullptr ? Real{} : b[b_rows.offset(r) + c]);
    }
  }
}

template <class F, class Real>
void pointwise_grad(const Rows& a_rows, const Rows& b_rows, int64_t channels, const Real* a,
                    const Real* b, const Real* dy, Real* da, Real* db) {
  for (int64_t r = 0; r < a_rows.count(); ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = a_rows.offset(r) + c;
      const int64_t j = b_rows.offset(r) + c;
      Real add_a = 0;
      Real add_b = 0;
      F::template grad<Real>(a[i], b == nullptr ? Real{} : b[j], dy[r * channels + c], add_a,
                             add_b);
      if (da != nullptr) {
        da[i] += add_a;
      }
      if (db != nullptr) {
        db[j] += add_b;
      }
    }
  }
}

template <class Real>
void step_size_forward(int64_t tokens, int64_t heads, int64_t x_row, const Real* x,
                       const Real* bias, Real lo, Real hi, Real* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      y[t * heads + h] = std::clamp(softplus(x[t * x_row + h] + bias[h]), lo, hi);
    }
  }
}

template <class Real>
void step_size_backward(int64_t tokens, int64_t heads, int64_t x_row, const Real* x,
                        const Real* bias, Real lo, Real hi, const Real* dy, Real* dx, Real* dbias) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const Real raw = x[t * x_row + h] + bias[h];
      const Real step = softplus(raw);
      const Real grad = step > lo && step < hi ? dy[t * heads + h] * softplus_grad(raw) : 0;
      if (dx != nullptr) {
        dx[t * x_row + h] += grad;
      }
      if (dbias != nullptr) {
        dbias[h] += grad;
      }
    }
  }
}

template <class Real>
void log_decay_forward(int64_t tokens, int64_t heads, int64_t x_row, const Real* x,
                       const Real* a_log, Real* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      y[t * heads + h] = -std::exp(a_log[h]) * x[t * x_row + h];
    }
  }
}

template <class Real>
void log_decay_backward(int64_t tokens, int64_t heads, int64_t x_row, const Real* x,
                        const Real* a_log, const Real* dy, Real* dx, Real* da_log) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const Real grad = -std::exp(a_log[h]) * dy[t * heads + h];
      if (dx != nullptr) {
        dx[t * x_row + h] += grad;
      }
      if (da_log != nullptr) {
        da_log[h] += grad * x[t * x_row + h];
      }
    }
  }
}

/// Also the backward pass with kBackward: dx (strided as x) += the sum of the copies in dy.
template <bool kBackward, class X, class Y>
void repeat_heads(const Rows& rows, int64_t channels, int64_t times, X* x, Y* y) {
  for (int64_t r = 0; r < rows.count(); ++r) {
    for (int64_t copy = 0; copy < times; ++copy) {
      for (int64_t c = 0; c < channels; ++c) {
        if constexpr (kBackward) {
          x[rows.offset(r) + c] += y[(r * times + copy) * channels + c];
        } else {
          y[(r * times + copy) * channels + c] = x[rows.offset(r) + c];
        }
      }
    }
  }
}

}  // namespace cambium::reference
