#include "ops/pointwise/pointwise.h"

#include <algorithm>

#include "ops/activation/activation.h"
#include "ops/checks.h"
#include "ops/pointwise/pointwise_kernels.h"
#include "ops/pointwise/pointwise_ref.h"
#include "ops/record_pair.h"
#include "ops/run.h"

namespace cambium {
namespace {

// A result shaped like t in the type of its sums.
Tensor gate_like(const Context& ctx, const Tensor& t, bool with_grad) {
  return ctx.result(sum_dtype(t.dtype), std::span(t.shape.data(), static_cast<size_t>(t.rank)),
                    with_grad);
}

// x with the gate, or a function of it, as its factor.
template <class Forward, class Backward>
Tensor gated(Context& ctx, const char* operation, const Tensor& gate, const char* name,
             const Tensor& x) {
  expect_rows(operation, "gate", gate);
  expect_like(operation, name, x, gate);
  const bool differentiate = ctx.differentiate(gate, x);
  const Tensor y = ctx.result_like(gate, differentiate);
  const auto args = [=]<class T>() { return Pointwise<T>{view<T>(gate), view<T>(x), view<T>(y)}; };
  run<Forward>(ctx, gate, args);
  if (differentiate) {
    record_pair<Backward>(ctx, y, gate, x, args);
  }
  return y;
}

// y (T, H) from x (T, H), a parameter p (H) and perhaps another, q.
template <class Forward, class Backward>
Tensor per_head(Context& ctx, const char* operation, const Tensor& x, const char* name,
                const Tensor& p, float lo, float hi, const Tensor& q = {}) {
  expect_rows(operation, "x (T, H)", x, 2);
  expect_vector(operation, name, p, x.dim(1), x);
  const bool differentiate = ctx.differentiate(x, p, q);
  const Tensor y = gate_like(ctx, x, differentiate);
  const auto args = [=]<class T>() {
    return PerHead<T>{view<T>(x), view<Sum<T>>(p), view<Sum<T>>(q), view<Sum<T>>(y), lo, hi};
  };
  run<Forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, p, q, y}, [=](const Context& c) { run<Backward>(c, x, args); });
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
    record_pair<add_scaled_backward>(ctx, sum, x, y, args);
  }
  return sum;
}

Tensor multiply(Context& ctx, const Tensor& a, const Tensor& b) {
  return gated<multiply_forward, multiply_backward>(ctx, "multiply", a, "b", b);
}

Tensor scale_blocks(Context& ctx, const Tensor& x, std::span<const ColumnBlock> blocks) {
  expect_rows("scale_blocks", "x (T, C)", x, 2);
  ScaleBlocks<double> of{};  // whatever the type of elements
  expect(blocks.size() <= ScaleBlocks<double>::kMost,
         "[scale_blocks] expected at most {} blocks, got {}", ScaleBlocks<double>::kMost,
         blocks.size());
  int64_t columns = 0;
  for (const ColumnBlock& block : blocks) {
    columns += block.columns;
    of.end[of.count] = columns;
    of.factor[of.count++] = block.factor;
  }
  expect(columns == x.dim(1), "[scale_blocks] expected blocks of {} columns, got {}", x.dim(1),
         columns);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() {
    ScaleBlocks<T> a{view<T>(x), view<T>(y), of.count, {}, {}};
    std::copy_n(of.end, of.count, a.end);
    std::copy_n(of.factor, of.count, a.factor);
    return a;
  };
  run<scale_blocks_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y}, [=](const Context& c) { run<scale_blocks_backward>(c, x, args); });
  }
  return y;
}

Tensor swiglu(Context& ctx, const Tensor& gate, const Tensor& up) {
  expect_rows("swiglu", "gate", gate);
  expect_like("swiglu", "up", up, gate);
  return gated_activation(ctx, gate, up, ActivationKind::kSilu);
}

Tensor sigmoid_gate(Context& ctx, const Tensor& gate, const Tensor& x) {
  return gated<sigmoid_gate_forward, sigmoid_gate_backward>(ctx, "sigmoid_gate", gate, "x", x);
}

Tensor silu(Context& ctx, const Tensor& x) {
  expect_rows("silu", "x", x);
  return activation(ctx, x, ActivationKind::kSilu);
}

Tensor sigmoid(Context& ctx, const Tensor& x, float scale) {
  expect_rows("sigmoid", "x", x);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = gate_like(ctx, x, differentiate);
  const auto args = [=]<class T>() { return Sigmoid<T>{view<T>(x), view<Sum<T>>(y), scale}; };
  run<sigmoid_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y}, [=](const Context& c) { run<sigmoid_backward>(c, x, args); });
  }
  return y;
}

Tensor step_size(Context& ctx, const Tensor& raw, const Tensor& bias, float lo, float hi) {
  expect(lo <= hi, "[step_size] expected lo <= hi, got {} and {}", lo, hi);
  return per_head<step_size_forward, step_size_backward>(ctx, "step_size", raw, "bias", bias, lo,
                                                         hi);
}

Tensor log_decay(Context& ctx, const Tensor& x, const Tensor& a_log) {
  return per_head<log_decay_forward, log_decay_backward>(ctx, "log_decay", x, "a_log", a_log, 0, 0);
}

Tensor bounded_decay(Context& ctx, const Tensor& x, const Tensor& bias, const Tensor& a_log,
                     float bound) {
  expect(bound < 0.0F, "[bounded_decay] expected a bound below 0, got {}", bound);
  expect_rows("bounded_decay", "x (T, H)", x, 2);
  expect_vector("bounded_decay", "a_log", a_log, x.dim(1), x);
  return per_head<bounded_decay_forward, bounded_decay_backward>(ctx, "bounded_decay", x, "bias",
                                                                 bias, bound, 0, a_log);
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

Tensor mix_heads(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& gate,
                 const uint8_t* closed) {
  expect_rows("mix_heads", "a (T, H * D)", a, 2);
  expect_like("mix_heads", "b", b, a);
  const int64_t heads = gate.rank == 2 ? gate.dim(1) : 0;
  expect(gate.rank == 2 && gate.dtype == a.dtype && gate.device == a.device && gate.has_rows() &&
             gate.dim(0) == a.dim(0) && heads > 0 && a.dim(1) % heads == 0,
         "[mix_heads] expected gate {} ({}, H), H a divisor of {} channels, got {}",
         dtype_name(a.dtype), a.dim(0), a.dim(1), gate);
  const int64_t dim = a.dim(1) / heads;
  const bool differentiate = ctx.differentiate(a, b, gate);
  const Tensor y = ctx.result_like(a, differentiate);
  const auto args = [=]<class T>() {
    return MixHeads<T>{view<T>(a.split_last(heads, dim)),
                       view<T>(b.split_last(heads, dim)),
                       view<T>(gate.split_last(heads, 1)),
                       view<T>(y.split_last(heads, dim)),
                       heads,
                       closed};
  };
  run<mix_heads_forward>(ctx, a, args);
  if (differentiate) {
    ctx.record({a, b, gate, y}, [=](const Context& c) { run<mix_heads_backward>(c, a, args); });
  }
  return y;
}

}  // namespace cambium
