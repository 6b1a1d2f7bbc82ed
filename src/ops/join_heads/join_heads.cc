#include "ops/join_heads/join_heads.h"

#include "ops/checks.h"
#include "ops/join_heads/join_heads_kernels.h"
#include "ops/join_heads/join_heads_ref.h"
#include "ops/run.h"

namespace cambium {

Tensor join_heads(Context& ctx, const Tensor& a, const Tensor& b) {
  expect_rows("join_heads", "a (T, H, A)", a, 3);
  expect(b.rank == 3 && b.dtype == a.dtype && b.device == a.device && b.has_rows() &&
             b.dim(0) == a.dim(0) && (b.dim(1) == a.dim(1) || b.dim(1) == 1),
         "[join_heads] expected b {} ({}, {} or 1, B) beside a {}, got {}", dtype_name(a.dtype),
         a.dim(0), a.dim(1), a, b);
  const bool differentiate = ctx.differentiate(a, b);
  const Tensor y = ctx.result(a.dtype, {a.dim(0), a.dim(1), a.dim(2) + b.dim(2)}, differentiate);
  const auto args = [=]<class T>() { return JoinHeads<T>{view<T>(a), view<T>(b), view<T>(y)}; };
  run<join_heads_forward>(ctx, a, args);
  if (differentiate) {
    ctx.record({a, b, y}, [=](const Context& c) { run<join_heads_backward>(c, a, args); });
  }
  return y;
}

}  // namespace cambium
