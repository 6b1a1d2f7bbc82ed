// The naive definitions, in the precision of their element type.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/activation/activation_kernels.h"

namespace cambium {
namespace definition {

/// f(x) and df/dx.
template <class T>
struct Activated {
  T value, slope;
};

template <class T>
Activated<T> activated(ActivationKind kind, T x) {
  const auto sigmoid = [](T z) { return 1 / (1 + std::exp(-z)); };
  switch (kind) {
    case ActivationKind::kSilu: {
      const T s = sigmoid(x);
      return {x * s, s * (1 + x * (1 - s))};
    }
    case ActivationKind::kRelu2: {
      const T r = std::max(x, T{0});
      return {r * r, 2 * r};
    }
    case ActivationKind::kGelu: {
      const T phi = std::erfc(-x / std::numbers::sqrt2_v<T>) / 2;
      const T density =
          std::exp(-x * x / 2) * std::numbers::inv_sqrtpi_v<T> / std::numbers::sqrt2_v<T>;
      return {x * phi, phi + x * density};
    }
    case ActivationKind::kGeluTanh: {
      const T k = 2 * std::numbers::sqrt2_v<T> * std::numbers::inv_sqrtpi_v<T>;
      const T c = static_cast<T>(0.044715);
      const T s = sigmoid(k * (x + c * x * x * x));
      return {x * s, s + x * s * (1 - s) * k * (1 + 3 * c * x * x)};
    }
  }
  return {};
}

}  // namespace definition

template <class T>
void activation_forward::reference(const Activate<T>& a) {
  for (int64_t r = 0; r < a.x.count(); ++r) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      const T up = a.up.defined() ? a.up.row(r)[c] : T{1};
      a.y.row(r)[c] = definition::activated(a.kind, a.x.row(r)[c]).value * up;
    }
  }
}

template <class T>
void activation_backward::reference(const Activate<T>& a) {
  for (int64_t r = 0; r < a.x.count(); ++r) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      const auto f = definition::activated(a.kind, a.x.row(r)[c]);
      const T up = a.up.defined() ? a.up.row(r)[c] : T{1};
      const T dy = a.y.grad_row(r)[c];
      if (a.x.grad != nullptr) {
        a.x.grad_row(r)[c] += dy * up * f.slope;
      }
      if (a.up.grad != nullptr) {
        a.up.grad_row(r)[c] += dy * f.value;
      }
    }
  }
}

template <class T>
void clamped_swiglu_forward::reference(const ClampedSwiglu<T>& a) {
  const T limit = static_cast<T>(a.limit);
  for (int64_t r = 0; r < a.y.count(); ++r) {
    for (int64_t c = 0; c < a.y.channels; ++c) {
      const T gate = std::min(a.gate.row(r)[c], limit);
      const T up = std::clamp(a.up.row(r)[c], -limit, limit);
      a.y.row(r)[c] = (up + 1) * gate / (1 + std::exp(-static_cast<T>(kClampedSlope) * gate));
    }
  }
}

template <class T>
void clamped_swiglu_backward::reference(const ClampedSwiglu<T>& a) {
  const T limit = static_cast<T>(a.limit);
  const T slope = static_cast<T>(kClampedSlope);
  for (int64_t r = 0; r < a.y.count(); ++r) {
    for (int64_t c = 0; c < a.y.channels; ++c) {
      const T raw_gate = a.gate.row(r)[c];
      const T raw_up = a.up.row(r)[c];
      const T gate = std::min(raw_gate, limit);
      const T up = std::clamp(raw_up, -limit, limit);
      const T s = 1 / (1 + std::exp(-slope * gate));
      const T dy = a.y.grad_row(r)[c];
      if (a.gate.grad != nullptr && raw_gate <= limit) {
        a.gate.grad_row(r)[c] += dy * (up + 1) * s * (1 + slope * gate * (1 - s));
      }
      if (a.up.grad != nullptr && raw_up == up) {
        a.up.grad_row(r)[c] += dy * gate * s;
      }
    }
  }
}

namespace definition {

template <class T>
T xielu_softplus(T x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}

}  // namespace definition

template <class T>
void xielu_forward::reference(const Xielu<T>& a) {
  const T beta = static_cast<T>(a.beta);
  const T p = static_cast<T>(definition::xielu_softplus(a.alpha_p.data[0]));
  const T n = beta + static_cast<T>(definition::xielu_softplus(a.alpha_n.data[0]));
  for (int64_t r = 0; r < a.x.count(); ++r) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      const T x = a.x.row(r)[c];
      const T low = std::expm1(std::min(x, static_cast<T>(a.eps))) - x;
      a.y.row(r)[c] = (x > 0 ? p * x * x : n * low) + beta * x;
    }
  }
}

template <class T>
void xielu_backward::reference(const Xielu<T>& a) {
  const T eps = static_cast<T>(a.eps);
  const T beta = static_cast<T>(a.beta);
  const T p = static_cast<T>(definition::xielu_softplus(a.alpha_p.data[0]));
  const T n = beta + static_cast<T>(definition::xielu_softplus(a.alpha_n.data[0]));
  T dp = 0;
  T dn = 0;
  for (int64_t r = 0; r < a.x.count(); ++r) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      const T x = a.x.row(r)[c];
      const T dy = a.y.grad_row(r)[c];
      const T rise = x < eps ? std::exp(x) : T{0};
      if (a.x.grad != nullptr) {
        a.x.grad_row(r)[c] += dy * ((x > 0 ? 2 * p * x : n * (rise - 1)) + beta);
      }
      dp += x > 0 ? dy * x * x : T{0};
      dn += x > 0 ? T{0} : dy * (std::expm1(std::min(x, eps)) - x);
    }
  }
  // d softplus(x) / dx
  const auto slope = [](T x) { return x > 20 ? T{1} : 1 / (1 + std::exp(-x)); };
  if (a.alpha_p.grad != nullptr) {
    a.alpha_p.grad[0] += dp * slope(static_cast<T>(a.alpha_p.data[0]));
  }
  if (a.alpha_n.grad != nullptr) {
    a.alpha_n.grad[0] += dn * slope(static_cast<T>(a.alpha_n.data[0]));
  }
}

template <class T>
void soft_cap_rows::reference(const SoftCap<T>& a) {
  const T cap = static_cast<T>(a.cap);
  for (int64_t r = 0; r < a.x.count(); ++r) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      T& x = a.x.row(r)[c];
      if (a.y.defined()) {
        const T y = a.y.row(r)[c] / cap;
        x *= 1 - y * y;
      } else {
        x = cap * std::tanh(x / cap);
      }
    }
  }
}

}  // namespace cambium
