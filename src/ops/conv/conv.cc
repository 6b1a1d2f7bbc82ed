#include "ops/conv/conv.h"

#include "ops/conv/conv_kernels.h"
#include "ops/conv/conv_ref.h"
#include "ops/optional.h"

namespace cambium {
namespace {

struct Conv {
  Tensor x, weight, bias;
  bool silu;
  SegmentWalk segments;

  int64_t channels() const { return x.dim(1); }
  int64_t taps() const { return weight.dim(1); }
};

template <class Real>
void forward_reference(const Conv& c, const Tensor& state, const Tensor& y) {
  reference::short_conv_forward<Real>(
      c.segments, c.channels(), c.taps(), c.x.ptr<Real>(), c.x.row_stride(), c.weight.ptr<Real>(),
      data_or_null<Real>(c.bias), c.silu, data_or_null<Real>(state), y.ptr<Real>());
  if (state.defined()) {
    reference::short_conv_state<Real>(c.segments, c.channels(), c.taps(), c.x.ptr<Real>(),
                                      c.x.row_stride(), state.ptr<Real>());
  }
}

template <class Real>
void backward_reference(const Conv& c, const Tensor& initial, const Tensor& y) {
  reference::short_conv_backward<Real>(
      c.segments, c.channels(), c.taps(), c.x.ptr<Real>(), c.x.row_stride(), c.weight.ptr<Real>(),
      data_or_null<Real>(c.bias), c.silu, data_or_null<Real>(initial), y.grad_ptr<Real>(),
      c.x.grad_ptr<Real>(), c.weight.grad_ptr<Real>(), grad_or_null<Real>(c.bias));
}

// (taps, channels): the kernels walk along channels.
Tensor transposed_weight(Arena& arena, const Conv& c) {
  const Tensor t = arena.empty(Dtype::kF32, {c.taps(), c.channels()});
  const float* from = c.weight.ptr<float>();
  for (int64_t i = 0; i < c.channels(); ++i) {
    for (int64_t j = 0; j < c.taps(); ++j) {
      t.ptr<float>()[j * c.channels() + i] = from[i * c.taps() + j];
    }
  }
  return t;
}

ShortConvForward kernel_args(const Conv& c, const Tensor& weight, const Tensor& state, float* y) {
  return {c.segments,
          c.channels(),
          c.taps(),
          c.x.ptr<float>(),
          c.x.row_stride(),
          weight.ptr<float>(),
          data_or_null<float>(c.bias),
          c.silu,
          data_or_null<float>(state),
          y};
}

void forward(Context& ctx, const Conv& c, const Tensor& state, const Tensor& y) {
  if (c.x.dtype == Dtype::kF64) {
    return forward_reference<double>(c, state, y);
  }
  if (ctx.reference) {
    return forward_reference<float>(c, state, y);
  }
  const ArenaScope scope(*ctx.arena);
  short_conv_forward(kernel_args(c, transposed_weight(*ctx.arena, c), state, y.ptr<float>()));
  if (state.defined()) {
    reference::short_conv_state<float>(c.segments, c.channels(), c.taps(), c.x.ptr<float>(),
                                       c.x.row_stride(), state.ptr<float>());
  }
}

void backward(Arena& arena, bool naive, const Conv& c, const Tensor& initial, const Tensor& y) {
  if (c.x.dtype == Dtype::kF64) {
    return backward_reference<double>(c, initial, y);
  }
  if (naive) {
    return backward_reference<float>(c, initial, y);
  }
  const Tensor dpre = arena.empty(Dtype::kF32, {c.x.dim(0), c.channels()});
  short_conv_backward({kernel_args(c, transposed_weight(arena, c), initial, dpre.ptr<float>()),
                       y.grad_ptr<float>(), c.x.grad_ptr<float>(), c.weight.grad_ptr<float>(),
                       grad_or_null<float>(c.bias)});
}

}  // namespace

Tensor short_conv(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  bool silu, const Segments& segments, const Tensor& state) {
  require_cpu("short_conv", x);
  expect(x.rank == 2 && x.row_contiguous() && (x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64),
         "[short_conv] expected x (T, C), f32 or f64, with contiguous rows, got {}", x.describe());
  expect(weight.rank == 2 && weight.dim(0) == x.dim(1) && weight.dim(1) >= 1 &&
             weight.dtype == x.dtype && weight.contiguous(),
         "[short_conv] expected weight {} ({}, K), got {}", dtype_name(x.dtype), x.dim(1),
         weight.describe());
  expect(!bias.defined() || (bias.rank == 1 && bias.dim(0) == x.dim(1) && bias.dtype == x.dtype),
         "[short_conv] expected bias {} ({}), got {}", dtype_name(x.dtype), x.dim(1),
         bias.describe());
  expect_segments("short_conv", segments, x.dim(0), state, x.dtype, {x.dim(1), weight.dim(1) - 1});
  const Conv conv{x, weight, bias, silu, segments.walk()};
  const bool differentiate = ctx.differentiate(x, weight, bias);
  const Tensor y = ctx.result_like(x, differentiate);
  const Tensor initial = differentiate ? copy_initial_state(ctx, segments, state) : Tensor{};
  forward(ctx, conv, state, y);
  if (differentiate) {
    Conv saved = conv;
    saved.segments.slot = nullptr;
    ctx.tape->record([arena = ctx.arena, naive = ctx.reference, saved, initial, y] {
      backward(*arena, naive, saved, initial, y);
    });
  }
  return y;
}

}  // namespace cambium
