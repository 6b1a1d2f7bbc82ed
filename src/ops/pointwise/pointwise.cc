#include "ops/pointwise/pointwise.h"

#include "ops/checks.h"
#include "ops/pointwise/pointwise_kernels.h"
#include "ops/pointwise/pointwise_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

// A function of one argument (b undefined) or two.
template <class Forward, class Backward>
Tensor pointwise(Context& ctx, const Tensor& a, const Tensor& b) {
  const bool differentiate = ctx.differentiate(a, b);
  const Tensor y = ctx.result_like(a, differentiate);
  const auto args = [=]<class T>() { return Pointwise<T>{view<T>(a), view<T>(b), view<T>(y)}; };
  run<Forward>(ctx, a, args);
  if (differentiate) {
    ctx.record({a, b, y}, [=](const Context& c) { run<Backward>(c, a, args); });
  }
  return y;
}

// y (T, H) from x (T, H) and a parameter p (H).
template <class Forward, class Backward>
Tensor per_head(Context& ctx, const char* operation, const Tensor& x, const char* name,
                const Tensor& p, float lo, float hi) {
  expect_rows(operation, "x (T, H)", x, 2);
  expect_vector(operation, name, p, x.dim(1), x);
  const bool differentiate = ctx.differentiate(x, p);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() {
    return PerHead<T>{view<T>(x), view<T, Sum<T>>(p), view<T>(y), lo, hi};
  };
  run<Forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, p, y}, [=](const Context& c) { run<Backward>(c, x, args); });
  }
  return y;
}

}  // namespace

Tensor add(Context& ctx, const Tensor& a, const Tensor& b) {
  expect_rows("add", "a", a);
  expect_like("add", "b", b, a);
  return add_scaled(ctx, 1.0F, a, 1.0F, b);
}

Tensor add_scaled(Context& ctx, float a, const Tensor& x, float b, const Tensor& y) {
  expect_rows("add_scaled", "x", x);
  expect_like("add_scaled", "y", y, x);
  const bool differentiate = ctx.differentiate(x, y);
  const Tensor sum = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() {
    return AddScaled<T>{a, view<T>(x), b, view<T>(y), view<T>(sum)};
  };
  run<add_scaled_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y, sum}, [=](const Context& c) { run<add_scaled_backward>(c, x, args); });
  }
  return sum;
}

Tensor swiglu(Context& ctx, const Tensor& gate, const Tensor& up) {
  expect_rows("swiglu", "gate", gate);
  expect_like("swiglu", "up", up, gate);
  return pointwise<swiglu_forward, swiglu_backward>(ctx, gate, up);
}

Tensor sigmoid(Context& ctx, const Tensor& x) {
  expect_rows("sigmoid", "x", x);
  return pointwise<sigmoid_forward, sigmoid_backward>(ctx, x, {});
}

Tensor step_size(Context& ctx, const Tensor& raw, const Tensor& bias, float lo, float hi) {
  expect(lo <= hi, "[step_size] expected lo <= hi, got {} and {}", lo, hi);
  return per_head<step_size_forward, step_size_backward>(ctx, "step_size", raw, "bias", bias, lo,
                                                         hi);
}

Tensor log_decay(Context& ctx, const Tensor& x, const Tensor& a_log) {
  return per_head<log_decay_forward, log_decay_backward>(ctx, "log_decay", x, "a_log", a_log, 0, 0);
}

Tensor repeat_heads(Context& ctx, const Tensor& x, int64_t times) {
  expect_rows("repeat_heads", "x", x);
  expect(x.rank == 3 && times >= 1,
         "[repeat_heads] expected x (T, G, N) and times >= 1, got {} and {}", x, times);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result(x.dtype, {x.dim(0), x.dim(1) * times, x.dim(2)}, differentiate);
  const auto args = [=]<class T>() { return RepeatHeads<T>{view<T>(x), view<T>(y), times}; };
  run<repeat_heads_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y}, [=](const Context& c) { run<repeat_heads_backward>(c, x, args); });
  }
  return y;
}

}  // namespace cambium
