#include "ops/activation/activation.h"

#include <vector>

#include "base/text.h"
#include "ops/activation/activation_kernels.h"
#include "ops/activation/activation_ref.h"
#include "ops/checks.h"
#include "ops/record_pair.h"
#include "ops/run.h"

namespace cambium {
namespace {

constexpr const char* kNames[] = {"silu", "relu2", "gelu", "gelu_tanh"};

}  // namespace

const char* activation_name(ActivationKind kind) {
  return kNames[static_cast<int>(kind)];
}

ActivationKind find_activation(const std::string& name) {
  std::vector<std::string> names;
  for (const char* known : kNames) {
    if (name == known) {
      return static_cast<ActivationKind>(names.size());
    }
    names.emplace_back(known);
  }
  fail("[activation] expected one of {}, got '{}'{}", join(names, ", "), name,
       did_you_mean(name, names));
}

static Tensor activate(Context& ctx, const Tensor& x, const Tensor& up, ActivationKind kind) {
  const bool differentiate = ctx.differentiate(x, up);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() {
    return Activate<T>{view<T>(x), view<T>(up), view<T>(y), kind};
  };
  run<activation_forward>(ctx, x, args);
  if (differentiate) {
    record_pair<activation_backward>(ctx, y, x, up, args);
  }
  return y;
}

Tensor activation(Context& ctx, const Tensor& x, ActivationKind kind) {
  expect_rows("activation", "x", x);
  return activate(ctx, x, {}, kind);
}

Tensor gated_activation(Context& ctx, const Tensor& gate, const Tensor& up, ActivationKind kind) {
  expect_rows("gated_activation", "gate", gate);
  expect_like("gated_activation", "up", up, gate);
  return activate(ctx, gate, up, kind);
}

Tensor clamped_swiglu(Context& ctx, const Tensor& gate, const Tensor& up, float limit) {
  expect_rows("clamped_swiglu", "gate", gate);
  expect_like("clamped_swiglu", "up", up, gate);
  expect(limit > 0.0F, "[clamped_swiglu] expected a limit above 0, got {}", limit);
  const bool differentiate = ctx.differentiate(gate, up);
  const Tensor y = ctx.result_like(gate, differentiate);
  const auto args = [=]<class T>() {
    return ClampedSwiglu<T>{view<T>(gate), view<T>(up), view<T>(y), limit};
  };
  run<clamped_swiglu_forward>(ctx, gate, args);
  if (differentiate) {
    record_pair<clamped_swiglu_backward>(ctx, y, gate, up, args);
  }
  return y;
}

Tensor xielu(Context& ctx, const Tensor& x, const Tensor& alpha_p, const Tensor& alpha_n,
             float beta, float eps) {
  expect_rows("xielu", "x", x);
  expect_vector("xielu", "alpha_p", alpha_p, 1, x);
  expect_vector("xielu", "alpha_n", alpha_n, 1, x);
  expect(eps <= 0.0F, "[xielu] expected eps of at most 0, got {}", eps);
  const bool differentiate = ctx.differentiate(x, alpha_p, alpha_n);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>(float* sums) {
    return Xielu<T>{view<T>(x), view<T>(y), view<Sum<T>>(alpha_p), view<Sum<T>>(alpha_n), beta,
                    eps,        sums};
  };
  run<xielu_forward>(ctx, x, args, nullptr);
  if (differentiate) {
    ctx.record({x, alpha_p, alpha_n, y}, [=](const Context& c) {
      run<xielu_backward>(c, x, args, c.scratch<float>(2 * x.rows()));
    });
  }
  return y;
}

static void run_soft_cap(const Context& ctx, const char* operation, const Tensor& x,
                         const Tensor& y, float cap) {
  expect_rows(operation, "x", x);
  expect(x.contiguous() && cap > 0.0F,
         "[{}] expected contiguous x and a cap above 0, got {} and {}", operation, x, cap);
  run<soft_cap_rows>(ctx, x, [&]<class T>() { return SoftCap<T>{view<T>(x), view<T>(y), cap}; });
}

void soft_cap(const Context& ctx, const Tensor& x, float cap) {
  run_soft_cap(ctx, "soft_cap", x, {}, cap);
}

void soft_cap_grad(const Context& ctx, const Tensor& grad, const Tensor& y, float cap) {
  expect_like("soft_cap_grad", "y", y, grad);
  run_soft_cap(ctx, "soft_cap_grad", grad, y, cap);
}

}  // namespace cambium
