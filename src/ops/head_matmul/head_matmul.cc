#include "ops/head_matmul/head_matmul.h"

#include "ops/checks.h"
#include "ops/head_matmul/head_matmul_kernels.h"
#include "ops/head_matmul/head_matmul_ref.h"
#include "ops/matmul/matmul_weight.h"
#include "ops/run.h"

namespace cambium {
namespace {

/// y = [y +] x weight^T or x weight.
void product(const Context& ctx, const Tensor& y, const Tensor& x, const Tensor& weight,
             bool transposed, bool accumulate) {
  const auto args = [=]<class T>() {
    return HeadMatmul<T>{view<T>(x), weight_view<T>(weight), view<T>(y), accumulate};
  };
  if (transposed) {
    run<head_matmul_transposed_forward>(ctx, x, args);
  } else {
    run<head_matmul_forward>(ctx, x, args);
  }
}

void check(const Tensor& x, const Tensor& weight, bool transposed) {
  expect_rows("head_matmul", transposed ? "x (T, H, N)" : "x (T, H, K)", x, 3);
  expect(weight.rank == 3 && weight.has_rows() && weight.device == x.device &&
             is_weight_type(weight, x) && weight.dim(0) == x.dim(1) &&
             weight.dim(transposed ? 1 : 2) == x.dim(2),
         "[head_matmul] expected a weight of {} ({}) beside x {}, got {}", weight_types(x),
         transposed ? fmt::format("{}, {}, K", x.dim(1), x.dim(2))
                    : fmt::format("{}, N, {}", x.dim(1), x.dim(2)),
         x, weight);
  expect_trainable("head_matmul", weight);
}

Tensor forward(Context& ctx, const Tensor& x, const Tensor& weight, bool transposed) {
  check(x, weight, transposed);
  const bool differentiate = ctx.differentiate(x, weight);
  const Tensor y =
      ctx.result(x.dtype, {x.dim(0), x.dim(1), weight.dim(transposed ? 2 : 1)}, differentiate);
  product(ctx, y, x, weight, transposed, false);
  if (differentiate) {
    ctx.record({x, weight, y}, [=](const Context& c) {
      const Tensor dy = y.grad_tensor();
      if (x.has_grad()) {
        product(c, x.grad_tensor(), dy, weight.detached(), !transposed, true);
      }
      if (weight.has_grad()) {
        const Tensor n = transposed ? x.detached() : dy;
        const Tensor k = transposed ? dy : x.detached();
        const Tensor out = weight.grad_tensor();
        run<head_matmul_grad_weight>(c, n, [=]<class T>() {
          return HeadMatmulGradWeight<T>{view<T>(n), view<T>(k), view<Sum<T>>(out)};
        });
      }
    });
  }
  return y;
}

}  // namespace

Tensor head_matmul(Context& ctx, const Tensor& x, const Tensor& weight) {
  return forward(ctx, x, weight, false);
}

Tensor head_matmul_transposed(Context& ctx, const Tensor& x, const Tensor& weight) {
  return forward(ctx, x, weight, true);
}

}  // namespace cambium
