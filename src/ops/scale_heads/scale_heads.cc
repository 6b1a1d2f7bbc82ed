#include "ops/scale_heads/scale_heads.h"

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/scale_heads/scale_heads_kernels.h"
#include "ops/scale_heads/scale_heads_ref.h"

namespace cambium {

Tensor scale_heads(Context& ctx, const Tensor& x, const Tensor& factor) {
  expect_rows("scale_heads", "x (T, H, D)", x, 3);
  expect_vector("scale_heads", "factor", factor, x.dim(1), x);
  const bool differentiate = ctx.differentiate(x, factor);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() {
    return ScaleHeads<T>{view<T>(x), view<Sum<T>>(factor), view<T>(y)};
  };
  run<scale_heads_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, factor, y}, [=](const Context& c) { run<scale_heads_backward>(c, x, args); });
  }
  return y;
}

}  // namespace cambium
