#include "ops/matmul/matmul.h"

#include <algorithm>
#include <numeric>

#include "ops/checks.h"
#include "ops/matmul/matmul_kernels.h"
#include "ops/matmul/matmul_ref.h"
#include "ops/matmul/matmul_weight.h"
#include "ops/run.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

void expect_matrix(const char* who, const char* name, const Tensor& t, int64_t columns) {
  const bool as_expected =
      t.rank == 2 && t.row_contiguous() && (columns < 0 || t.dim(1) == columns) && is_computed(t);
  if (!as_expected) {
    fail("[{}] expected {} (rows, {}) f32 or f64 with contiguous rows, got {}", who, name,
         columns < 0 ? std::string("columns") : std::to_string(columns), t);
  }
}

void expect_weight(const char* who, const Tensor& weight, const Tensor& x) {
  expect(weight.rank == 2 && weight.contiguous() && is_weight_type(weight, x),
         "[{}] expected a contiguous weight (N, K) of {}, got {}", who, weight_types(x), weight);
}

void expect_output(const char* who, const Tensor& out, int64_t rows, Dtype dtype) {
  expect(out.dim(0) == rows && out.dtype == dtype, "[{}] expected out {} with {} rows, got {}", who,
         dtype_name(dtype), rows, out);
}

template <class T, class Y = T>
MatmulTo<T, Y> product(const Tensor& y, const Tensor& x, const Affine& f, bool accumulate) {
  return {view<T>(x), weight_view<T>(f.weight), view<Sum<T>>(f.bias), view<Y>(y), accumulate};
}

void grad_input(const Context& ctx, const Tensor& out, const Tensor& dy, const Tensor& weight,
                bool accumulate) {
  run<matmul_grad_input_of>(ctx, dy, [&]<class T>() {
    return MatmulGradInput<T>{view<T>(dy), weight_view<T>(weight), view<T>(out), accumulate};
  });
}

void grad_weight(const Context& ctx, const Tensor& out, const Tensor& dy, const Tensor& x,
                 bool accumulate) {
  run<matmul_grad_weight_of>(ctx, dy, [&]<class T>() {
    return MatmulGradWeight<T>{view<T>(dy), view<T>(x), view<Sum<T>>(out), accumulate};
  });
}

void grad_bias(const Context& ctx, const Tensor& bias, const Tensor& dy) {
  run<matmul_grad_bias>(ctx, dy, [&]<class T>() {
    return MatmulGradBias<T>{view<T>(dy), bias.grad_ptr<Sum<T>>()};
  });
}

void expect_affine(const Tensor& x, const Affine& of) {
  const auto& [weight, bias] = of;
  expect_weight("matmul", weight, x);
  expect_matrix("matmul", "x", x, weight.dim(1));
  expect(!bias.defined() ||
             (bias.rank == 1 && bias.dim(0) == weight.dim(0) && bias.dtype == sum_dtype(x.dtype)),
         "[matmul] expected bias {} ({}), got {}", dtype_name(sum_dtype(x.dtype)), weight.dim(0),
         bias);
  expect_trainable("matmul", weight);
}

void record_step(const Context& ctx, const Tensor& y, const Tensor& x, const Affine& of) {
  if (!y.has_grad()) {
    return;
  }
  ctx.record({y, of.bias}, [x, y, f = of](const Context& c) {
    const Tensor unrounded = y.grad_tensor();
    Tensor dy = unrounded;
    if (y.dtype != x.dtype && (x.has_grad() || f.weight.has_grad())) {
      dy = c.arena->empty(x.dtype, {y.dim(0), y.dim(1)});
      copy(dy, unrounded);
    }
    if (x.has_grad()) {
      const bool set = x.takes_grad();
      grad_input(c, x.grad_tensor(), dy, f.weight, !set);
    }
    if (f.weight.has_grad()) {
      const bool set = f.weight.takes_grad();
      grad_weight(c, f.weight.grad_tensor(), dy, x, !set);
    }
    if (f.bias.has_grad()) {
      grad_bias(c, f.bias, unrounded);
    }
  });
}

/// Whether few rows of several results lie side by side, as columns of one, where their weights lie
/// one behind the other: on a GPU one product then gives them all. (Its batch-invariant product
/// takes them as they lie.)
bool side_by_side(const Context& ctx, const Tensor& x, std::span<const Affine> of) {
  constexpr int64_t kRows = 512;
  return of.size() > 1 && x.device.kind == Device::kCuda && x.dim(0) <= kRows &&
         !ctx.batch_invariant && std::none_of(of.begin(), of.end(), [&](const Affine& f) {
           return ctx.differentiate(x, f.weight, f.bias);
         });
}

/// How many of the products from the first one on have weights that lie one behind the other, and
/// results whose rows begin where 16 bytes do.
size_t neighbours(const Tensor& x, std::span<const Affine> of) {
  const auto keeps_alignment = [&](const Affine& f) {
    return f.weight.dim(0) * dtype_size(x.dtype) % 16 == 0;
  };
  size_t count = 1;
  while (count < of.size()) {
    const Tensor& before = of[count - 1].weight;
    const Tensor& weight = of[count].weight;
    if (!keeps_alignment(of[0]) || !keeps_alignment(of[count]) || before.dtype != weight.dtype ||
        static_cast<const std::byte*>(before.data) + before.numel() * dtype_size(before.dtype) !=
            weight.data) {
      break;
    }
    ++count;
  }
  return count;
}

}  // namespace

void matmul_each(Context& ctx, const Tensor& x, std::span<const Affine> of, std::span<Tensor> to) {
  CAMBIUM_CHECK(!of.empty() && of.size() <= kMaxMatmuls && to.size() == of.size());
  for (const Affine& one : of) {
    expect_affine(x, one);
  }
  const bool beside = side_by_side(ctx, x, of);
  for (size_t i = 0; i < of.size();) {
    const size_t count = beside ? neighbours(x, of.subspan(i)) : 1;
    if (count == 1) {
      to[i] = ctx.result(x.dtype, {x.dim(0), of[i].weight.dim(0)},
                         ctx.differentiate(x, of[i].weight, of[i].bias));
      ++i;
      continue;
    }
    const auto group = of.subspan(i, count);
    const int64_t columns =
        std::accumulate(group.begin(), group.end(), int64_t{0},
                        [](int64_t sum, const Affine& f) { return sum + f.weight.dim(0); });
    const Tensor all = ctx.result(x.dtype, {x.dim(0), columns}, false);
    int64_t column = 0;
    for (const size_t end = i + count; i < end; ++i) {
      to[i] = all.slice(1, column, of[i].weight.dim(0));
      column += of[i].weight.dim(0);
    }
  }
  run<matmul_forward>(ctx, x, [&]<class T>() {
    return Matmuls<T>(static_cast<int64_t>(of.size()),
                      [&](int64_t i) { return product<T>(to[i], x, of[i], false); });
  });
  for (size_t i = 0; i < of.size(); ++i) {
    record_step(ctx, to[i], x, of[i]);
  }
}

Tensor matmul(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return matmul_each<1>(ctx, x, {{{weight, bias}}})[0];
}

Tensor matmul_unrounded(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Affine of{weight, bias};
  expect_affine(x, of);
  const Tensor y =
      ctx.result(sum_dtype(x.dtype), {x.dim(0), weight.dim(0)}, ctx.differentiate(x, weight, bias));
  run<matmul_unrounded_forward>(ctx, x, [&]<class T>() {
    return UnroundedMatmuls<T>(1, [&](int64_t) { return product<T, Sum<T>>(y, x, of, false); });
  });
  record_step(ctx, y, x, of);
  return y;
}

Tensor matmul_unread(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Affine of{weight, bias};
  expect_affine(x, of);
  const Tensor y =
      ctx.result(x.dtype, {x.dim(0), weight.dim(0)}, ctx.differentiate(x, weight, bias));
  record_step(ctx, y, x, of);
  return y;
}

void matmul_into(const Context& ctx, const Tensor& out, const Tensor& x, const Tensor& weight,
                 bool accumulate) {
  expect_weight("matmul_into", weight, x);
  expect_matrix("matmul_into", "x", x, weight.dim(1));
  expect_matrix("matmul_into", "out", out, weight.dim(0));
  expect_output("matmul_into", out, x.dim(0), x.dtype);
  run<matmul_forward>(ctx, x, [&]<class T>() {
    return Matmuls<T>(1, [&](int64_t) { return product<T>(out, x, {weight, {}}, accumulate); });
  });
}

void matmul_grad_input(const Context& ctx, const Tensor& out, const Tensor& dy,
                       const Tensor& weight, bool accumulate) {
  expect_weight("matmul_grad_input", weight, dy);
  expect_matrix("matmul_grad_input", "dy", dy, weight.dim(0));
  expect_matrix("matmul_grad_input", "out", out, weight.dim(1));
  expect_output("matmul_grad_input", out, dy.dim(0), dy.dtype);
  grad_input(ctx, out, dy, weight, accumulate);
}

void matmul_grad_weight(const Context& ctx, const Tensor& out, const Tensor& dy, const Tensor& x,
                        bool accumulate) {
  expect_matrix("matmul_grad_weight", "dy", dy, -1);
  expect_matrix("matmul_grad_weight", "x", x, -1);
  expect_matrix("matmul_grad_weight", "out", out, x.dim(1));
  expect_output("matmul_grad_weight", out, dy.dim(1), sum_dtype(dy.dtype));
  expect(x.dim(0) == dy.dim(0) && x.dtype == dy.dtype,
         "[matmul_grad_weight] expected x {} with {} rows, got {}", dtype_name(dy.dtype), dy.dim(0),
         x);
  grad_weight(ctx, out, dy, x, accumulate);
}

void matmul_batch_into(const Context& ctx, const Tensor& out, const Tensor& x, const Tensor& weight,
                       bool turned) {
  const auto expect_matrices = [&](const char* name, const Tensor& t, int64_t rows,
                                   int64_t columns) {
    expect(t.rank == 3 && t.contiguous() && t.dtype == x.dtype && t.device == x.device &&
               t.dim(0) == x.dim(0) && t.dim(1) == rows && t.dim(2) == columns,
           "[matmul_batch] expected a contiguous {} ({}, {}, {}) beside x {}, got {}", name,
           x.dim(0), rows, columns, x, t);
  };
  expect(x.rank == 3 && x.contiguous(), "[matmul_batch] expected a contiguous x (B, T, K), got {}",
         x);
  expect(out.rank == 3, "[matmul_batch] expected out (B, T, N), got {}", out);
  const int64_t inner = x.dim(2);
  const int64_t columns = out.dim(2);
  expect_matrices("out", out, x.dim(1), columns);
  expect_matrices("weight", weight, turned ? inner : columns, turned ? columns : inner);
  run<matmul_batch>(ctx, x, [&]<class T>() {
    return MatmulBatch<T>{x.dim(0),   x.dim(1),        inner,        columns,
                          x.ptr<T>(), weight.ptr<T>(), out.ptr<T>(), turned};
  });
}

}  // namespace cambium
