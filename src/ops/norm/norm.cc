#include "ops/norm/norm.h"

#include "ops/norm/norm_kernels.h"
#include "ops/norm/norm_ref.h"

namespace cambium {
namespace {

void expect_rows(const char* who, const Tensor& x) {
  require_cpu(who, x);
  expect(x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64, "[{}] expected x f32 or f64, got {}",
         who, x.describe());
  expect(x.has_rows(), "[{}] expected x with contiguous rows, got {}", who, x.describe());
}

// Memory for the inverse deviation of each row, for the length of a backward step.
float* row_scratch(Arena* arena, const Rows& rows) {
  return static_cast<float*>(arena->allocate(rows.count() * static_cast<int64_t>(sizeof(float))));
}

template <class Real>
void rms_reference(const Tensor& x, const Tensor& w, float eps, const Tensor& y) {
  reference::rms_norm_forward<Real>(x.row_walk(), x.dim(-1), x.ptr<Real>(), w.ptr<Real>(), eps,
                                    y.ptr<Real>());
}
template <class Real>
void rms_reference_backward(const Tensor& x, const Tensor& w, float eps, const Tensor& y) {
  reference::rms_norm_backward<Real>(x.row_walk(), x.dim(-1), x.ptr<Real>(), w.ptr<Real>(), eps,
                                     y.grad_ptr<Real>(), x.grad_ptr<Real>(), w.grad_ptr<Real>());
}

// The gated norm sees tokens of groups: (T, C) as (T, C / group, group).
struct Gated {
  Tensor x, gate, weight;
  GatedNormConfig config;
  Rows x_rows, gate_rows;
  int64_t weight_step;

  Gated(const Tensor& x, const Tensor& gate, const Tensor& weight, const GatedNormConfig& config)
      : x(x),
        gate(gate),
        weight(weight),
        config(config),
        x_rows(groups(x)),
        gate_rows(groups(gate)),
        weight_step(weight.dim(0) == x.dim(1) ? config.group : 0) {}

  Rows groups(const Tensor& t) const {
    return t.split_last(t.dim(1) / config.group, config.group).row_walk();
  }
  bool gate_first() const { return config.order == GateOrder::kGateFirst; }
  bool sigmoid() const { return config.activation == GateActivation::kSigmoid; }

  template <class Real>
  void reference_forward(const Tensor& y) const {
    reference::gated_norm_forward<Real>(x_rows, gate_rows, config.group, gate_first(), sigmoid(),
                                        x.ptr<Real>(), gate.ptr<Real>(), weight.ptr<Real>(),
                                        weight_step, config.eps, y.ptr<Real>());
  }
  void forward(bool naive, const Tensor& y) const {
    if (x.dtype == Dtype::kF64) {
      reference_forward<double>(y);
    } else if (naive) {
      reference_forward<float>(y);
    } else {
      gated_norm_forward({x_rows, gate_rows, config.group, gate_first(), sigmoid(), x.ptr<float>(),
                          gate.ptr<float>(), weight.ptr<float>(), weight_step, config.eps,
                          y.ptr<float>()});
    }
  }

  template <class Real>
  void reference_backward(const Tensor& y) const {
    reference::gated_norm_backward<Real>(
        x_rows, gate_rows, config.group, gate_first(), sigmoid(), x.ptr<Real>(), gate.ptr<Real>(),
        weight.ptr<Real>(), weight_step, config.eps, y.grad_ptr<Real>(), x.grad_ptr<Real>(),
        gate.grad_ptr<Real>(), weight.grad_ptr<Real>());
  }
  void backward(bool naive, Arena* arena, const Tensor& y) const {
    if (x.dtype == Dtype::kF64) {
      reference_backward<double>(y);
    } else if (naive) {
      reference_backward<float>(y);
    } else {
      gated_norm_backward({x_rows, gate_rows, config.group, gate_first(), sigmoid(), x.ptr<float>(),
                           gate.ptr<float>(), weight.ptr<float>(), weight_step, config.eps,
                           y.grad_ptr<float>(), x.grad_ptr<float>(), gate.grad_ptr<float>(),
                           weight.grad_ptr<float>(), row_scratch(arena, x_rows)});
    }
  }
};

}  // namespace

Tensor rms_norm(Context& ctx, const Tensor& x, const Tensor& weight, float eps) {
  expect_rows("rms_norm", x);
  expect(weight.rank == 1 && weight.dim(0) == x.dim(-1) && weight.dtype == x.dtype,
         "[rms_norm] expected weight {} ({}), got {}", dtype_name(x.dtype), x.dim(-1),
         weight.describe());
  const bool differentiate = ctx.differentiate(x, weight);
  const Tensor y = ctx.result_like(x, differentiate);
  if (x.dtype == Dtype::kF64) {
    rms_reference<double>(x, weight, eps, y);
  } else if (ctx.reference) {
    rms_reference<float>(x, weight, eps, y);
  } else {
    rms_norm_forward(
        {x.row_walk(), x.dim(-1), x.ptr<float>(), weight.ptr<float>(), eps, y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, arena = ctx.arena, x, weight, eps, y] {
      if (x.dtype == Dtype::kF64) {
        rms_reference_backward<double>(x, weight, eps, y);
      } else if (naive) {
        rms_reference_backward<float>(x, weight, eps, y);
      } else {
        const Rows rows = x.row_walk();
        rms_norm_backward({rows, x.dim(-1), x.ptr<float>(), weight.ptr<float>(), eps,
                           y.grad_ptr<float>(), x.grad_ptr<float>(), weight.grad_ptr<float>(),
                           row_scratch(arena, rows)});
      }
    });
  }
  return y;
}

Tensor gated_rms_norm(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& weight,
                      const GatedNormConfig& config) {
  expect_rows("gated_rms_norm", x);
  expect(x.rank == 2 && gate.same_shape(x) && gate.dtype == x.dtype && gate.has_rows(),
         "[gated_rms_norm] expected x and gate (T, C) of one dtype, got {} and {}", x.describe(),
         gate.describe());
  expect(config.group > 0 && x.dim(1) % config.group == 0,
         "[gated_rms_norm] expected groups that divide {} channels, got groups of {}", x.dim(1),
         config.group);
  expect(weight.rank == 1 && weight.dtype == x.dtype &&
             (weight.dim(0) == x.dim(1) || weight.dim(0) == config.group),
         "[gated_rms_norm] expected weight {} ({}) or ({}), got {}", dtype_name(x.dtype), x.dim(1),
         config.group, weight.describe());
  const bool differentiate = ctx.differentiate(x, gate, weight);
  const Tensor y = ctx.result_like(x, differentiate);
  const Gated gated(x, gate, weight, config);
  gated.forward(ctx.reference, y);
  if (differentiate) {
    ctx.tape->record(
        [naive = ctx.reference, arena = ctx.arena, gated, y] { gated.backward(naive, arena, y); });
  }
  return y;
}

Tensor l2_norm(Context& ctx, const Tensor& x, float eps, float scale) {
  expect_rows("l2_norm", x);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result_like(x, differentiate);
  const Rows rows = x.row_walk();
  if (x.dtype == Dtype::kF64) {
    reference::l2_norm_forward<double>(rows, x.dim(-1), eps, scale, x.ptr<double>(),
                                       y.ptr<double>());
  } else if (ctx.reference) {
    reference::l2_norm_forward<float>(rows, x.dim(-1), eps, scale, x.ptr<float>(), y.ptr<float>());
  } else {
    l2_norm_forward({rows, x.dim(-1), eps, scale, x.ptr<float>(), y.ptr<float>()});
  }
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, x, rows, eps, scale, y] {
      if (x.dtype == Dtype::kF64) {
        reference::l2_norm_backward<double>(rows, x.dim(-1), eps, scale, x.ptr<double>(),
                                            y.grad_ptr<double>(), x.grad_ptr<double>());
      } else if (naive) {
        reference::l2_norm_backward<float>(rows, x.dim(-1), eps, scale, x.ptr<float>(),
                                           y.grad_ptr<float>(), x.grad_ptr<float>());
      } else {
        l2_norm_backward({rows, x.dim(-1), eps, scale, x.ptr<float>(), y.grad_ptr<float>(),
                          x.grad_ptr<float>()});
      }
    });
  }
  return y;
}

}  // namespace cambium
