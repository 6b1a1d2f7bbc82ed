#include "ops/matmul/matmul.h"

#include "base/parallel.h"
#include "ops/matmul/matmul_kernels.h"
#include "ops/matmul/matmul_ref.h"

namespace cambium {
namespace {

void expect_rows(const char* who, const char* name, const Tensor& t, int64_t columns) {
  expect(t.rank == 2 && t.row_contiguous() && (columns < 0 || t.dim(1) == columns) &&
             (t.dtype == Dtype::kF32 || t.dtype == Dtype::kF64),
         "[{}] expected {} (rows, {}) f32 or f64 with contiguous rows, got {}", who, name,
         columns < 0 ? std::string("columns") : std::to_string(columns), t.describe());
}

void expect_weight(const char* who, const Tensor& weight, const Tensor& x) {
  expect(weight.rank == 2 && weight.contiguous() &&
             (weight.dtype == x.dtype || (weight.dtype == Dtype::kBF16 && x.dtype == Dtype::kF32)),
         "[{}] expected a contiguous weight (N, K) of {}, got {}", who,
         x.dtype == Dtype::kF64 ? "f64" : "f32 or bf16", weight.describe());
}

void expect_output(const char* who, const Tensor& out, int64_t rows, const Tensor& like) {
  expect(out.dim(0) == rows && out.dtype == like.dtype, "[{}] expected out {} with {} rows, got {}",
         who, dtype_name(like.dtype), rows, out.describe());
}

// Calls f with a typed pointer to the weight.
template <class Real, class F>
void with_weight(const Tensor& weight, F&& f) {
  if (weight.dtype == Dtype::kBF16) {
    f(weight.ptr<bf16>());
  } else {
    f(weight.ptr<Real>());
  }
}

template <class Real>
void forward_reference(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& bias,
                       bool accumulate) {
  with_weight<Real>(weight, [&](const auto* w) {
    reference::matmul_forward<Real>(x.dim(0), weight.dim(0), x.dim(1), x.ptr<Real>(),
                                    x.row_stride(), w, bias.defined() ? bias.ptr<Real>() : nullptr,
                                    y.ptr<Real>(), y.row_stride(), accumulate);
  });
}

void forward(const Context& ctx, const Tensor& y, const Tensor& x, const Tensor& weight,
             const Tensor& bias, bool accumulate) {
  if (x.dtype == Dtype::kF64) {
    forward_reference<double>(y, x, weight, bias, accumulate);
  } else if (ctx.reference) {
    forward_reference<float>(y, x, weight, bias, accumulate);
  } else {
    gemm({.m = x.dim(0),
          .n = weight.dim(0),
          .k = x.dim(1),
          .a = x.ptr<float>(),
          .a_row = x.row_stride(),
          .a_k = 1,
          .b = weight.data,
          .b_is_bf16 = weight.dtype == Dtype::kBF16,
          .b_rows_are_k = false,
          .b_stride = weight.dim(1),
          .bias = bias.defined() ? bias.ptr<float>() : nullptr,
          .c = y.ptr<float>(),
          .c_row = y.row_stride(),
          .accumulate = accumulate,
          .threads = num_threads()});
  }
}

template <class Real>
void grad_input_reference(const Tensor& out, const Tensor& dy, const Tensor& weight,
                          bool accumulate) {
  with_weight<Real>(weight, [&](const auto* w) {
    reference::matmul_grad_input<Real>(dy.dim(0), dy.dim(1), weight.dim(1), dy.ptr<Real>(),
                                       dy.row_stride(), w, out.ptr<Real>(), out.row_stride(),
                                       accumulate);
  });
}

void grad_input(bool naive, const Tensor& out, const Tensor& dy, const Tensor& weight,
                bool accumulate) {
  if (dy.dtype == Dtype::kF64) {
    grad_input_reference<double>(out, dy, weight, accumulate);
  } else if (naive) {
    grad_input_reference<float>(out, dy, weight, accumulate);
  } else {
    gemm({.m = dy.dim(0),
          .n = weight.dim(1),
          .k = dy.dim(1),
          .a = dy.ptr<float>(),
          .a_row = dy.row_stride(),
          .a_k = 1,
          .b = weight.data,
          .b_is_bf16 = weight.dtype == Dtype::kBF16,
          .b_rows_are_k = true,
          .b_stride = weight.dim(1),
          .bias = nullptr,
          .c = out.ptr<float>(),
          .c_row = out.row_stride(),
          .accumulate = accumulate,
          .threads = num_threads()});
  }
}

template <class Real>
void grad_weight_reference(const Tensor& out, const Tensor& dy, const Tensor& x, bool accumulate) {
  reference::matmul_grad_weight<Real>(dy.dim(0), dy.dim(1), x.dim(1), dy.ptr<Real>(),
                                      dy.row_stride(), x.ptr<Real>(), x.row_stride(),
                                      out.ptr<Real>(), out.row_stride(), accumulate);
}

void grad_weight(bool naive, const Tensor& out, const Tensor& dy, const Tensor& x,
                 bool accumulate) {
  if (dy.dtype == Dtype::kF64) {
    grad_weight_reference<double>(out, dy, x, accumulate);
  } else if (naive) {
    grad_weight_reference<float>(out, dy, x, accumulate);
  } else {
    gemm({.m = dy.dim(1),
          .n = x.dim(1),
          .k = dy.dim(0),
          .a = dy.ptr<float>(),
          .a_row = 1,
          .a_k = dy.row_stride(),
          .b = x.data,
          .b_is_bf16 = false,
          .b_rows_are_k = true,
          .b_stride = x.row_stride(),
          .bias = nullptr,
          .c = out.ptr<float>(),
          .c_row = out.row_stride(),
          .accumulate = accumulate,
          .threads = num_threads()});
  }
}

void grad_bias(bool naive, const Tensor& bias, const Tensor& dy) {
  if (dy.dtype == Dtype::kF64) {
    reference::matmul_grad_bias<double>(dy.dim(0), dy.dim(1), dy.ptr<double>(), dy.row_stride(),
                                        bias.grad_ptr<double>());
  } else if (naive) {
    reference::matmul_grad_bias<float>(dy.dim(0), dy.dim(1), dy.ptr<float>(), dy.row_stride(),
                                       bias.grad_ptr<float>());
  } else {
    column_sums({dy.dim(0), dy.dim(1), dy.ptr<float>(), dy.row_stride(), bias.grad_ptr<float>()});
  }
}

}  // namespace

Tensor matmul(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  require_cpu("matmul", x);
  expect_weight("matmul", weight, x);
  expect_rows("matmul", "x", x, weight.dim(1));
  expect(
      !bias.defined() || (bias.rank == 1 && bias.dim(0) == weight.dim(0) && bias.dtype == x.dtype),
      "[matmul] expected bias {} ({}), got {}", dtype_name(x.dtype), weight.dim(0),
      bias.describe());
  expect(weight.dtype == x.dtype || !weight.has_grad(),
         "[matmul] a bf16 weight has no gradient; train the f32 weight, got {}", weight.describe());
  const bool differentiate = ctx.differentiate(x, weight, bias);
  const Tensor y = ctx.result(x.dtype, {x.dim(0), weight.dim(0)}, differentiate);
  forward(ctx, y, x, weight, bias, false);
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, x, weight, bias, y] {
      const Tensor dy = y.grad_tensor();
      if (x.has_grad()) {
        grad_input(naive, x.grad_tensor(), dy, weight, true);
      }
      if (weight.has_grad()) {
        grad_weight(naive, weight.grad_tensor(), dy, x, true);
      }
      if (bias.has_grad()) {
        grad_bias(naive, bias, dy);
      }
    });
  }
  return y;
}

void matmul_into(const Context& ctx, const Tensor& out, const Tensor& x, const Tensor& weight,
                 bool accumulate) {
  require_cpu("matmul_into", x);
  expect_weight("matmul_into", weight, x);
  expect_rows("matmul_into", "x", x, weight.dim(1));
  expect_rows("matmul_into", "out", out, weight.dim(0));
  expect_output("matmul_into", out, x.dim(0), x);
  forward(ctx, out, x, weight, {}, accumulate);
}

void matmul_grad_input(const Context& ctx, const Tensor& out, const Tensor& dy,
                       const Tensor& weight, bool accumulate) {
  require_cpu("matmul_grad_input", dy);
  expect_weight("matmul_grad_input", weight, dy);
  expect_rows("matmul_grad_input", "dy", dy, weight.dim(0));
  expect_rows("matmul_grad_input", "out", out, weight.dim(1));
  expect_output("matmul_grad_input", out, dy.dim(0), dy);
  grad_input(ctx.reference, out, dy, weight, accumulate);
}

void matmul_grad_weight(const Context& ctx, const Tensor& out, const Tensor& dy, const Tensor& x,
                        bool accumulate) {
  require_cpu("matmul_grad_weight", dy);
  expect_rows("matmul_grad_weight", "dy", dy, -1);
  expect_rows("matmul_grad_weight", "x", x, -1);
  expect_rows("matmul_grad_weight", "out", out, x.dim(1));
  expect_output("matmul_grad_weight", out, dy.dim(1), dy);
  expect(x.dim(0) == dy.dim(0) && x.dtype == dy.dtype,
         "[matmul_grad_weight] expected x {} with {} rows, got {}", dtype_name(dy.dtype), dy.dim(0),
         x.describe());
  grad_weight(ctx.reference, out, dy, x, accumulate);
}

}  // namespace cambium
