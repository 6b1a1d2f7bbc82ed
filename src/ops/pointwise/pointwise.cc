#include "ops/pointwise/pointwise.h"

#include "ops/pointwise/pointwise_kernels.h"
#include "ops/pointwise/pointwise_ref.h"

namespace cambium {
namespace {

void expect_rows(const char* who, const char* name, const Tensor& x) {
  require_cpu(who, x);
  expect((x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64) && x.has_rows(),
         "[{}] expected {} f32 or f64 with contiguous rows, got {}", who, name, x.describe());
}

void expect_like(const char* who, const char* name, const Tensor& b, const Tensor& a) {
  expect(b.same_shape(a) && b.dtype == a.dtype && b.has_rows(),
         "[{}] expected {} like the first input, {} with contiguous rows, got {}", who, name,
         a.describe(), b.describe());
}

template <class F, class Real>
void reference_forward(const Tensor& a, const Tensor& b, const Tensor& y) {
  reference::pointwise<F, Real>(a.row_walk(), b.defined() ? b.row_walk() : Rows{}, a.dim(-1),
                                a.ptr<Real>(), b.defined() ? b.ptr<Real>() : nullptr,
                                y.ptr<Real>());
}

template <class F, class Real>
void reference_backward(const Tensor& a, const Tensor& b, const Tensor& y) {
  reference::pointwise_grad<F, Real>(a.row_walk(), b.defined() ? b.row_walk() : Rows{}, a.dim(-1),
                                     a.ptr<Real>(), b.defined() ? b.ptr<Real>() : nullptr,
                                     y.grad_ptr<Real>(), a.grad_ptr<Real>(),
                                     b.defined() ? b.grad_ptr<Real>() : nullptr);
}

// An operation element by element: F is its definition, the kernels do the same to floats.
template <class F>
Tensor pointwise(Context& ctx, const Tensor& a, const Tensor& b, void (*forward)(const Pointwise&),
                 void (*backward)(const PointwiseGrad&)) {
  const bool differentiate = ctx.differentiate(a, b);
  const Tensor y = ctx.result_like(a, differentiate);
  const Rows b_rows = b.defined() ? b.row_walk() : Rows{};
  if (a.dtype == Dtype::kF64) {
    reference_forward<F, double>(a, b, y);
  } else if (ctx.reference) {
    reference_forward<F, float>(a, b, y);
  } else {
    forward({a.row_walk(), b_rows, a.dim(-1), a.ptr<float>(),
             b.defined() ? b.ptr<float>() : nullptr, y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, a, b, b_rows, y, backward] {
      if (a.dtype == Dtype::kF64) {
        reference_backward<F, double>(a, b, y);
      } else if (naive) {
        reference_backward<F, float>(a, b, y);
      } else {
        backward({a.row_walk(), b_rows, a.dim(-1), a.ptr<float>(),
                  b.defined() ? b.ptr<float>() : nullptr, y.grad_ptr<float>(), a.grad_ptr<float>(),
                  b.defined() ? b.grad_ptr<float>() : nullptr});
      }
    });
  }
  return y;
}

void expect_per_head(const char* who, const Tensor& x, const char* name, const Tensor& p) {
  require_cpu(who, x);
  expect((x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64) && x.rank == 2 && x.row_contiguous(),
         "[{}] expected x (T, H) f32 or f64 with contiguous rows, got {}", who, x.describe());
  expect(p.rank == 1 && p.contiguous() && p.dim(0) == x.dim(1) && p.dtype == x.dtype,
         "[{}] expected {} {} ({}), got {}", who, name, dtype_name(x.dtype), x.dim(1),
         p.describe());
}

template <class Real>
void repeat_reference(const Tensor& x, int64_t times, const Tensor& y) {
  reference::repeat_heads<false>(x.row_walk(), x.dim(-1), times, x.ptr<Real>(), y.ptr<Real>());
}
template <class Real>
void repeat_reference_backward(const Tensor& x, int64_t times, const Tensor& y) {
  reference::repeat_heads<true>(x.row_walk(), x.dim(-1), times, x.grad_ptr<Real>(),
                                y.grad_ptr<Real>());
}

template <class Real>
void step_reference(const Tensor& x, const Tensor& bias, float lo, float hi, const Tensor& y) {
  reference::step_size_forward<Real>(x.dim(0), x.dim(1), x.row_stride(), x.ptr<Real>(),
                                     bias.ptr<Real>(), lo, hi, y.ptr<Real>());
}
template <class Real>
void step_reference_backward(const Tensor& x, const Tensor& bias, float lo, float hi,
                             const Tensor& y) {
  reference::step_size_backward<Real>(x.dim(0), x.dim(1), x.row_stride(), x.ptr<Real>(),
                                      bias.ptr<Real>(), lo, hi, y.grad_ptr<Real>(),
                                      x.grad_ptr<Real>(), bias.grad_ptr<Real>());
}

template <class Real>
void decay_reference(const Tensor& x, const Tensor& a_log, const Tensor& y) {
  reference::log_decay_forward<Real>(x.dim(0), x.dim(1), x.row_stride(), x.ptr<Real>(),
                                     a_log.ptr<Real>(), y.ptr<Real>());
}
template <class Real>
void decay_reference_backward(const Tensor& x, const Tensor& a_log, const Tensor& y) {
  reference::log_decay_backward<Real>(x.dim(0), x.dim(1), x.row_stride(), x.ptr<Real>(),
                                      a_log.ptr<Real>(), y.grad_ptr<Real>(), x.grad_ptr<Real>(),
                                      a_log.grad_ptr<Real>());
}

}  // namespace

Tensor add(Context& ctx, const Tensor& a, const Tensor& b) {
  expect_rows("add", "a", a);
  expect_like("add", "b", b, a);
  return pointwise<reference::Add>(ctx, a, b, add_forward, add_backward);
}

Tensor swiglu(Context& ctx, const Tensor& gate, const Tensor& up) {
  expect_rows("swiglu", "gate", gate);
  expect_like("swiglu", "up", up, gate);
  return pointwise<reference::Swiglu>(ctx, gate, up, swiglu_forward, swiglu_backward);
}

Tensor sigmoid(Context& ctx, const Tensor& x) {
  expect_rows("sigmoid", "x", x);
  return pointwise<reference::Sigmoid>(ctx, x, {}, sigmoid_forward, sigmoid_backward);
}

Tensor step_size(Context& ctx, const Tensor& raw, const Tensor& bias, float lo, float hi) {
  expect_per_head("step_size", raw, "bias", bias);
  expect(lo <= hi, "[step_size] expected lo <= hi, got {} and {}", lo, hi);
  const bool differentiate = ctx.differentiate(raw, bias);
  const Tensor y = ctx.result_like(raw, differentiate);
  if (raw.dtype == Dtype::kF64) {
    step_reference<double>(raw, bias, lo, hi, y);
  } else if (ctx.reference) {
    step_reference<float>(raw, bias, lo, hi, y);
  } else {
    step_size_forward({raw.dim(0), raw.dim(1), raw.row_stride(), raw.ptr<float>(),
                       bias.ptr<float>(), lo, hi, y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, raw, bias, lo, hi, y] {
      if (raw.dtype == Dtype::kF64) {
        step_reference_backward<double>(raw, bias, lo, hi, y);
      } else if (naive) {
        step_reference_backward<float>(raw, bias, lo, hi, y);
      } else {
        step_size_backward({raw.dim(0), raw.dim(1), raw.row_stride(), raw.ptr<float>(),
                            bias.ptr<float>(), lo, hi, y.grad_ptr<float>(), raw.grad_ptr<float>(),
                            bias.grad_ptr<float>()});
      }
    });
  }
  return y;
}

Tensor log_decay(Context& ctx, const Tensor& x, const Tensor& a_log) {
  expect_per_head("log_decay", x, "a_log", a_log);
  const bool differentiate = ctx.differentiate(x, a_log);
  const Tensor y = ctx.result_like(x, differentiate);
  if (x.dtype == Dtype::kF64) {
    decay_reference<double>(x, a_log, y);
  } else if (ctx.reference) {
    decay_reference<float>(x, a_log, y);
  } else {
    log_decay_forward({x.dim(0), x.dim(1), x.row_stride(), x.ptr<float>(), a_log.ptr<float>(), 0, 0,
                       y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, x, a_log, y] {
      if (x.dtype == Dtype::kF64) {
        decay_reference_backward<double>(x, a_log, y);
      } else if (naive) {
        decay_reference_backward<float>(x, a_log, y);
      } else {
        log_decay_backward({x.dim(0), x.dim(1), x.row_stride(), x.ptr<float>(), a_log.ptr<float>(),
                            0, 0, y.grad_ptr<float>(), x.grad_ptr<float>(),
                            a_log.grad_ptr<float>()});
      }
    });
  }
  return y;
}

Tensor repeat_heads(Context& ctx, const Tensor& x, int64_t times) {
  expect_rows("repeat_heads", "x", x);
  expect(x.rank == 3 && times >= 1,
         "[repeat_heads] expected x (T, G, N) and times >= 1, got {} and {}", x.describe(), times);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result(x.dtype, {x.dim(0), x.dim(1) * times, x.dim(2)}, differentiate);
  if (x.dtype == Dtype::kF64) {
    repeat_reference<double>(x, times, y);
  } else if (ctx.reference) {
    repeat_reference<float>(x, times, y);
  } else {
    repeat_heads_forward({x.row_walk(), x.dim(-1), times, x.ptr<float>(), y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, x, times, y] {
      if (x.dtype == Dtype::kF64) {
        repeat_reference_backward<double>(x, times, y);
      } else if (naive) {
        repeat_reference_backward<float>(x, times, y);
      } else {
        repeat_heads_backward(
            {x.row_walk(), x.dim(-1), times, y.grad_ptr<float>(), x.grad_ptr<float>()});
      }
    });
  }
  return y;
}

}  // namespace cambium
