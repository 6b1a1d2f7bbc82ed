#include "ops/norm/norm.h"

#include "ops/checks.h"
#include "ops/norm/norm_kernels.h"
#include "ops/norm/norm_ref.h"
#include "ops/run.h"

namespace cambium {

Tensor rms_norm(Context& ctx, const Tensor& x, const Tensor& weight, float eps, bool zero_centred) {
  expect_computed("rms_norm", "x", x);
  expect_rows("rms_norm", "x", x);
  expect_vector("rms_norm", "weight", weight, x.dim(-1), x);
  const bool differentiate = ctx.differentiate(x, weight);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>(float* rstd) {
    return RmsNorm<T>{view<T>(x), view<Sum<T>>(weight), view<T>(y), eps, zero_centred, rstd};
  };
  run<rms_norm_forward>(ctx, x, args, nullptr);
  if (differentiate) {
    ctx.record({x, weight, y}, [=](const Context& c) {
      run<rms_norm_backward>(c, x, args, c.scratch<float>(x.rows()));
    });
  }
  return y;
}

namespace {

struct StreamNorm {
  Tensor weight, bias;  // undefined = there is none
  float eps;
  bool zero_centred, layer;
};

void add_norm_into(const Context& ctx, const char* operation, const Tensor& x, const Tensor& stream,
                   float keep, const Tensor& y, float out, const StreamNorm& norm) {
  expect_rows(operation, "y", y, 2);
  expect(stream.same_shape(y) && stream.dtype == sum_dtype(y.dtype) && stream.contiguous(),
         "[{}] expected a contiguous stream {} ({}, {}), got {}", operation,
         dtype_name(sum_dtype(y.dtype)), y.dim(0), y.dim(1), stream);
  expect_device(operation, "the stream", stream, y);
  if (x.defined()) {
    expect(x.same_shape(y) && x.dtype == y.dtype && x.contiguous(),
           "[{}] expected x like y, {}, and contiguous, got {}", operation, y, x);
  }
  if (norm.weight.defined()) {
    expect_vector(operation, "weight", norm.weight, y.dim(1), y);
  }
  if (norm.bias.defined()) {
    expect_vector(operation, "bias", norm.bias, y.dim(1), y);
  }
  run<add_rms_norm_forward>(ctx, y, [&]<class T>() {
    return AddRmsNorm<T>{
        view<Sum<T>>(stream), keep,     view<T>(y),        out,        view<Sum<T>>(norm.weight),
        view<T>(x),           norm.eps, norm.zero_centred, norm.layer, view<Sum<T>>(norm.bias)};
  });
}

}  // namespace

void add_rms_norm_into(const Context& ctx, const Tensor& x, const Tensor& stream, float keep,
                       const Tensor& y, float out, const Tensor& weight, float eps,
                       bool zero_centred) {
  add_norm_into(ctx, "add_rms_norm", x, stream, keep, y, out,
                {weight, {}, eps, zero_centred, false});
}

void add_layer_norm_into(const Context& ctx, const Tensor& x, const Tensor& stream, float keep,
                         const Tensor& y, float out, const Tensor& weight, const Tensor& bias,
                         float eps) {
  add_norm_into(ctx, "add_layer_norm", x, stream, keep, y, out, {weight, bias, eps, false, true});
}

Tensor add_rms_norm(const Context& ctx, const Tensor& stream, float keep, const Tensor& y,
                    float out, const Tensor& weight, float eps, bool zero_centred) {
  const Tensor x = ctx.result_like(y, false);
  add_rms_norm_into(ctx, x, stream, keep, y, out, weight, eps, zero_centred);
  return x;
}

Tensor layer_norm(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  float eps) {
  expect_computed("layer_norm", "x", x);
  expect_rows("layer_norm", "x", x);
  expect_vector("layer_norm", "weight", weight, x.dim(-1), x);
  if (bias.defined()) {
    expect_vector("layer_norm", "bias", bias, x.dim(-1), x);
  }
  const bool differentiate = ctx.differentiate(x, weight, bias);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>(float* mean, float* rstd) {
    return LayerNorm<T>{view<T>(x), view<Sum<T>>(weight), view<Sum<T>>(bias), view<T>(y), eps, mean,
                        rstd};
  };
  run<layer_norm_forward>(ctx, x, args, nullptr, nullptr);
  if (differentiate) {
    ctx.record({x, weight, bias, y}, [=](const Context& c) {
      run<layer_norm_backward>(c, x, args, c.scratch<float>(x.rows()), c.scratch<float>(x.rows()));
    });
  }
  return y;
}

Tensor gated_rms_norm(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& weight,
                      const GatedNormConfig& config) {
  expect_computed("gated_rms_norm", "x", x);
  expect_rows("gated_rms_norm", "x", x);
  expect(x.rank == 2 && gate.same_shape(x) && gate.dtype == x.dtype && gate.has_rows(),
         "[gated_rms_norm] expected x and gate (T, C) of one dtype, got {} and {}", x, gate);
  expect(config.group > 0 && x.dim(1) % config.group == 0,
         "[gated_rms_norm] expected groups that divide {} channels, got groups of {}", x.dim(1),
         config.group);
  expect(weight.rank == 1 && weight.contiguous() && weight.dtype == sum_dtype(x.dtype) &&
             (weight.dim(0) == x.dim(1) || weight.dim(0) == config.group),
         "[gated_rms_norm] expected weight {} ({}) or ({}), got {}", dtype_name(sum_dtype(x.dtype)),
         x.dim(1), config.group, weight);
  const bool differentiate = ctx.differentiate(x, gate, weight);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>(float* rstd) {
    const int64_t groups = x.dim(1) / config.group;
    const auto grouped = [&](const Tensor& t) {
      return view<T>(t.split_last(groups, config.group));
    };
    return GatedNorm<T>{.x = grouped(x),
                        .gate = grouped(gate),
                        .weight = view<Sum<T>>(weight),
                        .y = grouped(y),
                        .groups = groups,
                        .weight_step = weight.dim(0) == x.dim(1) ? config.group : 0,
                        .gate_first = config.order == GateOrder::kGateFirst,
                        .sigmoid = config.activation == GateActivation::kSigmoid,
                        .eps = config.eps,
                        .rstd = rstd};
  };
  run<gated_norm_forward>(ctx, x, args, nullptr);
  if (differentiate) {
    ctx.record({x, gate, weight, y}, [=](const Context& c) {
      run<gated_norm_backward>(c, x, args, c.scratch<float>(x.numel() / config.group));
    });
  }
  return y;
}

Tensor l2_norm(Context& ctx, const Tensor& x, float eps, float scale) {
  expect_computed("l2_norm", "x", x);
  expect_rows("l2_norm", "x", x);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result_like(x, differentiate);
  const auto args = [=]<class T>() { return L2Norm<T>{view<T>(x), view<T>(y), eps, scale}; };
  run<l2_norm_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y}, [=](const Context& c) { run<l2_norm_backward>(c, x, args); });
  }
  return y;
}

}  // namespace cambium
