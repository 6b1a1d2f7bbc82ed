#include "ops/activation/activation_kernels.h"
#include "ops/elements_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

/// f(x) and df/dx.
struct Activated {
  vf value, slope;
};

struct Silu {
  static Activated at(vf x) { return {vsilu(x), vsilu_grad(x)}; }
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
  if (a.up.defined()) {
    pointwise(a.x, a.up, a.y, [](vf x, vf up) { return F::at(x).value * up; });
  } else {
    pointwise(a.x, {}, a.y, [](vf x, vf) { return F::at(x).value; });
  }
}

template <class F>
void backward(const Activate<float>& a) {
  const auto grad_up = [](vf x, vf, vf dy) { return dy * F::at(x).value; };
  if (a.up.defined()) {
    const auto grad = [](vf x, vf up, vf dy) { return dy * up * F::at(x).slope; };
    pointwise_grad(a.x, a.up, a.y, grad, grad_up);
  } else {
    const auto grad = [](vf x, vf, vf dy) { return dy * F::at(x).slope; };
    pointwise_grad(a.x, {}, a.y, grad, grad_up);
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
  with_kind<Silu, Relu2, Gelu, GeluTanh>(a.kind, [&]<class F>(F) { forward<F>(a); });
}
void activation_backward(const Activate<float>& a) {
  with_kind<Silu, Relu2, Gelu, GeluTanh>(a.kind, [&]<class F>(F) { backward<F>(a); });
}

void clamped_swiglu_forward(const ClampedSwiglu<float>& a) {
  const vf limit = vset(a.limit);
  pointwise(a.gate, a.up, a.y, [&](vf raw_gate, vf raw_up) {
    const vf gate = vmin(limit, raw_gate);
    const vf up = vmax(-limit, vmin(limit, raw_up));
    return (up + 1.0F) * gate * vsigmoid(kClampedSlope * gate);
  });
}

void clamped_swiglu_backward(const ClampedSwiglu<float>& a) {
  const vf limit = vset(a.limit);
  pointwise_grad(
      a.gate, a.up, a.y,
      [&](vf raw_gate, vf raw_up, vf dy) {
        const vf gate = vmin(limit, raw_gate);
        const vf up = vmax(-limit, vmin(limit, raw_up));
        const vf s = vsigmoid(kClampedSlope * gate);
        const vf d = dy * (up + 1.0F) * s * (1.0F + kClampedSlope * gate * (1.0F - s));
        return raw_gate <= limit ? d : vf{};
      },
      [&](vf raw_gate, vf raw_up, vf dy) {
        const vf gate = vmin(limit, raw_gate);
        const vf up = vmax(-limit, vmin(limit, raw_up));
        return raw_up == up ? dy * gate * vsigmoid(kClampedSlope * gate) : vf{};
      });
}

void xielu_forward(const Xielu<float>& a) {
  const XieluNumbers k(a);
  pointwise(a.x, {}, a.y, [&](vf x, vf) {
    const vf curve = x > vf{} ? k.p * x * x : k.n * k.low(x);
    return curve + k.beta * x;
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
  if (a.y.defined()) {
    pointwise(a.x, a.y, a.x, [&](vf x, vf y) {
      const vf bend = y / a.cap;
      return x * (1.0F - bend * bend);
    });
  } else {
    pointwise(a.x, {}, a.x, [&](vf x, vf) { return a.cap * vtanh(x / a.cap); });
  }
}

}  // namespace cambium::CAMBIUM_ISA
