#include "ops/conv/conv.h"

#include "ops/checks.h"
#include "ops/conv/conv_kernels.h"
#include "ops/conv/conv_ref.h"
#include "ops/run.h"

namespace cambium {

Tensor short_conv(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  bool silu, const Segments& segments, const Tensor& state) {
  expect(x.rank == 2 && x.row_contiguous() && is_computed(x),
         "[short_conv] expected x (T, C), f32 or f64, with contiguous rows, got {}", x);
  expect(weight.rank == 2 && weight.dim(0) == x.dim(1) && weight.dim(1) >= 1 &&
             weight.dtype == sum_dtype(x.dtype) && weight.contiguous(),
         "[short_conv] expected weight {} ({}, K), got {}", dtype_name(sum_dtype(x.dtype)),
         x.dim(1), weight);
  expect(!bias.defined() ||
             (bias.rank == 1 && bias.dim(0) == x.dim(1) && bias.dtype == sum_dtype(x.dtype)),
         "[short_conv] expected bias {} ({}), got {}", dtype_name(sum_dtype(x.dtype)), x.dim(1),
         bias);
  expect_segments("short_conv", segments, x.dim(0), state, sum_dtype(x.dtype),
                  {x.dim(1), weight.dim(1) - 1});
  const bool differentiate = ctx.differentiate(x, weight, bias);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=, walk = segments.walk()]<class T>(void* kept) {
    return ShortConv<T>{.segments = walk,
                        .x = view<T>(x),
                        .weight = view<Sum<T>>(weight),
                        .bias = view<Sum<T>>(bias),
                        .silu = silu,
                        .state = data_of<Sum<T>>(state),
                        .y = view<T>(y),
                        .kept = kept};
  };
  void* kept = keep<short_conv_forward>(ctx, differentiate, x, args, nullptr);
  run<short_conv_forward>(ctx, x, args, kept);
  if (differentiate) {
    ctx.record({x, weight, bias, y},
               [=](const Context& c) { run<short_conv_backward>(c, y, args, kept); });
  }
  return y;
}

}  // namespace cambium
