#include "base/parallel.h"
#include "base/simd.h"
#include "ops/activation/activation_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Elements of a piece: enough to pay for handing it to a thread.
constexpr int64_t kElementsPerPiece = 8192;

inline int64_t rows_per_piece(int64_t channels) {
  return kElementsPerPiece / (channels < 1 ? 1 : channels) + 1;
}

/// f(x) and df/dx.
struct Activated {
  vf value, slope;
};

struct Silu {
  static Activated at(vf x) {
    const vf s = vsigmoid(x);
    return {x * s, s * (1.0F + x * (1.0F - s))};
  }
};

struct Relu2 {
  static Activated at(vf x) {
    const vf r = vmax(x, vf{});
    return {r * r, 2.0F * r};
  }
};

struct Gelu {
  static Activated at(vf x) {
    const vf zero = {};
    const vf distance = vmax(x, -x);
    const vf bell = vexp(-0.5F * x * x);
    // Phi(-|x|): Abramowitz & Stegun 7.1.26 for erfc(|x| / sqrt 2), to 8e-8.
    const vf t = 1.0F / (1.0F + 0.3275911F * 0.70710678118654752F * distance);
    vf p = vset(1.061405429F);
    p = p * t - 1.453152027F;
    p = p * t + 1.421413741F;
    p = p * t - 0.284496736F;
    p = p * t + 0.254829592F;
    const vf tail = 0.5F * p * t * bell;
    const vf phi = x > zero ? 1.0F - tail : tail;
    return {x * phi, phi + x * bell * 0.39894228040143268F};
  }
};

struct GeluTanh {
  static Activated at(vf x) {
    constexpr float kSlope = 1.5957691216057308F;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715F;
    const vf s = vsigmoid(kSlope * x * (1.0F + kCubic * x * x));
    return {x * s, s + x * s * (1.0F - s) * kSlope * (1.0F + 3.0F * kCubic * x * x)};
  }
};

template <class F>
void forward(const Activate<float>& a) {
  parallel_for(a.x.count(), rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x.row(r);
      const float* up = a.up.defined() ? a.up.row(r) : nullptr;
      float* y = a.y.row(r);
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        vf value = F::at(vload_upto(x + c, n)).value;
        if (up != nullptr) {
          value *= vload_upto(up + c, n);
        }
        vstore_upto(y + c, value, n);
      }
    }
  });
}

// The gate and up may be one tensor: the gradients are added one after the other.
template <class F>
void backward(const Activate<float>& a) {
  parallel_for(a.x.count(), rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x.row(r);
      const float* up = a.up.defined() ? a.up.row(r) : nullptr;
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        const Activated f = F::at(vload_upto(x + c, n));
        const vf dy = vload_upto(a.y.grad_row(r) + c, n);
        if (a.x.grad != nullptr) {
          float* dx = a.x.grad_row(r) + c;
          const vf factor = up != nullptr ? dy * vload_upto(up + c, n) : dy;
          vstore_upto(dx, vload_upto(dx, n) + factor * f.slope, n);
        }
        if (a.up.grad != nullptr) {
          float* dup = a.up.grad_row(r) + c;
          vstore_upto(dup, vload_upto(dup, n) + dy * f.value, n);
        }
      }
    }
  });
}

template <class Run>
void with_kind(ActivationKind kind, const Run& run) {
  switch (kind) {
    case ActivationKind::kSilu:
      return run(Silu{});
    case ActivationKind::kRelu2:
      return run(Relu2{});
    case ActivationKind::kGelu:
      return run(Gelu{});
    case ActivationKind::kGeluTanh:
      return run(GeluTanh{});
  }
}

/// exp(x) - 1 for x <= 0. Near 0 by its series, as the 1 would take the digits.
inline vf vexpm1_below_zero(vf x) {
  vf p = 1.0F + x * (1.0F / 7.0F);
  p = 1.0F + x * (1.0F / 6.0F) * p;
  p = 1.0F + x * (1.0F / 5.0F) * p;
  p = 1.0F + x * (1.0F / 4.0F) * p;
  p = 1.0F + x * (1.0F / 3.0F) * p;
  p = 1.0F + x * (1.0F / 2.0F) * p;
  return x > vset(-0.3F) ? x * p : vexp(x) - 1.0F;
}

/// The function's numbers beside x.
struct XieluNumbers {
  explicit XieluNumbers(const Xielu<float>& a)
      : beta(a.beta),
        eps(a.eps),
        p(vsum(vsoftplus(vset(a.alpha_p.data[0]))) / static_cast<float>(kLanes)),
        n(a.beta + vsum(vsoftplus(vset(a.alpha_n.data[0]))) / static_cast<float>(kLanes)) {}
  /// expm1(min(x, eps)) - x
  vf low(vf x) const { return vexpm1_below_zero(vmin(x, vset(eps))) - x; }
  float beta, eps, p, n;
};

}  // namespace

void activation_forward(const Activate<float>& a) {
  with_kind(a.kind, [&]<class F>(F) { forward<F>(a); });
}
void activation_backward(const Activate<float>& a) {
  with_kind(a.kind, [&]<class F>(F) { backward<F>(a); });
}

void clamped_swiglu_forward(const ClampedSwiglu<float>& a) {
  const vf limit = vset(a.limit);
  parallel_for(a.y.count(), rows_per_piece(a.y.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < a.y.channels; c += kLanes) {
        const int64_t n = a.y.channels - c;
        const vf gate = vmin(limit, vload_upto(a.gate.row(r) + c, n));
        const vf up = vmax(-limit, vmin(limit, vload_upto(a.up.row(r) + c, n)));
        vstore_upto(a.y.row(r) + c, (up + 1.0F) * gate * vsigmoid(kClampedSlope * gate), n);
      }
    }
  });
}

void clamped_swiglu_backward(const ClampedSwiglu<float>& a) {
  const vf limit = vset(a.limit);
  parallel_for(a.y.count(), rows_per_piece(a.y.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < a.y.channels; c += kLanes) {
        const int64_t n = a.y.channels - c;
        const vf raw_gate = vload_upto(a.gate.row(r) + c, n);
        const vf raw_up = vload_upto(a.up.row(r) + c, n);
        const vf gate = vmin(limit, raw_gate);
        const vf up = vmax(-limit, vmin(limit, raw_up));
        const vf s = vsigmoid(kClampedSlope * gate);
        const vf dy = vload_upto(a.y.grad_row(r) + c, n);
        if (a.gate.grad != nullptr) {
          float* to = a.gate.grad_row(r) + c;
          const vf d = dy * (up + 1.0F) * s * (1.0F + kClampedSlope * gate * (1.0F - s));
          vstore_upto(to, vload_upto(to, n) + (raw_gate <= limit ? d : vf{}), n);
        }
        if (a.up.grad != nullptr) {
          float* to = a.up.grad_row(r) + c;
          vstore_upto(to, vload_upto(to, n) + (raw_up == up ? dy * gate * s : vf{}), n);
        }
      }
    }
  });
}

void xielu_forward(const Xielu<float>& a) {
  const XieluNumbers k(a);
  parallel_for(a.x.count(), rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        const vf x = vload_upto(a.x.row(r) + c, n);
        const vf curve = x > vf{} ? k.p * x * x : k.n * k.low(x);
        vstore_upto(a.y.row(r) + c, curve + k.beta * x, n);
      }
    }
  });
}

// Rows own their sums; what a thread takes does not change the order of the last one.
void xielu_backward(const Xielu<float>& a) {
  const XieluNumbers k(a);
  const int64_t rows = a.x.count();
  parallel_for(rows, rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      vf dp = {};
      vf dn = {};
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        const vf x = vload_upto(a.x.row(r) + c, n);
        const vf dy = vload_upto(a.y.grad_row(r) + c, n);
        const auto above = x > vf{};
        if (a.x.grad != nullptr) {
          const vf rise = x < vset(k.eps) ? vexp(x) : vf{};
          const vf slope = above ? 2.0F * k.p * x : k.n * (rise - 1.0F);
          float* dx = a.x.grad_row(r) + c;
          vstore_upto(dx, vload_upto(dx, n) + dy * (slope + k.beta), n);
        }
        dp += above ? dy * x * x : vf{};
        dn += above ? vf{} : dy * k.low(x);
      }
      a.sums[r] = vsum(dp);
      a.sums[rows + r] = vsum(dn);
    }
  });
  float dp = 0.0F;
  float dn = 0.0F;
  for (int64_t r = 0; r < rows; ++r) {
    dp += a.sums[r];
    dn += a.sums[rows + r];
  }
  const auto slope = [](float x) { return x > 20.0F ? 1.0F : 1.0F / (1.0F + __builtin_expf(-x)); };
  if (a.alpha_p.grad != nullptr) {
    a.alpha_p.grad[0] += dp * slope(a.alpha_p.data[0]);
  }
  if (a.alpha_n.grad != nullptr) {
    a.alpha_n.grad[0] += dn * slope(a.alpha_n.data[0]);
  }
}

void soft_cap_rows(const SoftCap<float>& a) {
  parallel_for(a.x.count(), rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* x = a.x.row(r);
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        const vf v = vload_upto(x + c, n);
        if (a.y.defined()) {
          const vf y = vload_upto(a.y.row(r) + c, n) / a.cap;
          vstore_upto(x + c, v * (1.0F - y * y), n);
        } else {
          vstore_upto(x + c, a.cap * vtanh(v / a.cap), n);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
