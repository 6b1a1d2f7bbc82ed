#include "ops/norm/norm.h"

#include "ops/norm/norm_kernels.h"
#include "ops/norm/norm_ref.h"

namespace cambium {
namespace {

void forward(const Context& ctx, const Tensor& x, const Tensor& w, float eps, const Tensor& y) {
  if (x.dtype == Dtype::kF64) {
    reference::rms_norm_forward<double>(x.row_walk(), x.dim(-1), x.ptr<double>(), w.ptr<double>(),
                                        eps, y.ptr<double>());
  } else if (ctx.reference) {
    reference::rms_norm_forward<float>(x.row_walk(), x.dim(-1), x.ptr<float>(), w.ptr<float>(), eps,
                                       y.ptr<float>());
  } else {
    rms_norm_forward(
        {x.row_walk(), x.dim(-1), x.ptr<float>(), w.ptr<float>(), eps, y.ptr<float>()});
  }
}

void backward(bool naive, const Tensor& x, const Tensor& w, float eps, const Tensor& y) {
  if (x.dtype == Dtype::kF64) {
    reference::rms_norm_backward<double>(x.row_walk(), x.dim(-1), x.ptr<double>(), w.ptr<double>(),
                                         eps, y.grad_ptr<double>(), x.grad_ptr<double>(),
                                         w.grad_ptr<double>());
  } else if (naive) {
    reference::rms_norm_backward<float>(x.row_walk(), x.dim(-1), x.ptr<float>(), w.ptr<float>(),
                                        eps, y.grad_ptr<float>(), x.grad_ptr<float>(),
                                        w.grad_ptr<float>());
  } else {
    rms_norm_backward({x.row_walk(), x.dim(-1), x.ptr<float>(), w.ptr<float>(), eps,
                       y.grad_ptr<float>(), x.grad_ptr<float>(), w.grad_ptr<float>()});
  }
}

}  // namespace

Tensor rms_norm(Context& ctx, const Tensor& x, const Tensor& weight, float eps) {
  require_cpu("rms_norm", x);
  expect(x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64,
         "[rms_norm] expected x f32 or f64, got {}", x.describe());
  expect(x.has_rows(), "[rms_norm] expected x with contiguous rows, got {}", x.describe());
  expect(weight.rank == 1 && weight.dim(0) == x.dim(-1) && weight.dtype == x.dtype,
         "[rms_norm] expected weight {} ({}), got {}", dtype_name(x.dtype), x.dim(-1),
         weight.describe());
  const bool differentiate = ctx.differentiate(x, weight);
  const Tensor y = ctx.result_like(x, differentiate);
  forward(ctx, x, weight, eps, y);
  if (differentiate) {
    ctx.tape->record(
        [naive = ctx.reference, x, weight, eps, y] { backward(naive, x, weight, eps, y); });
  }
  return y;
}

}  // namespace cambium
