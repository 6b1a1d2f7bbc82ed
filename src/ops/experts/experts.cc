#include "ops/experts/experts.h"

#include "ops/checks.h"
#include "ops/experts/experts_kernels.h"
#include "ops/experts/experts_ref.h"
#include "ops/matmul/matmul_weight.h"
#include "ops/run.h"

namespace cambium {
namespace {

/// The matrices of the experts below each other: (E * N, K).
Tensor rows_of(const Tensor& weight) {
  return weight.reshape({weight.dim(0) * weight.dim(1), weight.dim(2)});
}

/// Expects weight (E, N, K) for x (rows, K), and bias (E, N) or undefined.
void expect_experts(const char* operation, const Tensor& x, const Tensor& weight,
                    const Tensor& bias, int64_t experts) {
  expect(weight.rank == 3 && weight.contiguous() && weight.dim(0) == experts &&
             weight.dim(2) == x.dim(1) && is_weight_type(weight, x),
         "[{}] expected a contiguous weight ({}, N, {}) of {}, got {}", operation, experts,
         x.dim(1), weight_types(x), weight);
  expect_trainable(operation, weight);
  expect_device(operation, "weight", weight, x);
  const int64_t outputs = weight.dim(1);
  expect(!bias.defined() || (bias.rank == 2 && bias.contiguous() && bias.dim(0) == experts &&
                             bias.dim(1) == outputs && bias.dtype == sum_dtype(x.dtype)),
         "[{}] expected a contiguous bias {} ({}, {}), got {}", operation,
         dtype_name(sum_dtype(x.dtype)), experts, outputs, bias);
}

void expect_slots(const char* operation, const Tensor& x, const Routing& routing) {
  expect_rows(operation, "x (T * top, C)", x, 2);
  expect(x.dim(0) == routing.lists.rows(), "[{}] expected {} rows, one a token and expert, got {}",
         operation, routing.lists.rows(), x);
}

void expect_combined(const char* operation, const Tensor& y, const Routing& routing) {
  expect_slots(operation, y, routing);
  expect(routing.weight.dtype == sum_dtype(y.dtype),
         "[{}] expected rows of the type that was routed, got {} and weights {}", operation, y,
         routing.weight);
}

}  // namespace

Routing route(Context& ctx, const Tensor& logits, const Tensor& choice_bias,
              const RouterConfig& config) {
  expect_rows("route", "logits (T, E)", logits, 2);
  const int64_t experts = logits.dim(1);
  expect(experts <= kMaxRoutedExperts, "[route] expected at most {} experts, got {}",
         kMaxRoutedExperts, experts);
  expect(config.groups >= 1 && experts % config.groups == 0 && config.group_top >= 1 &&
             config.group_top <= config.groups,
         "[route] expected groups that divide {} experts and at most as many of them to stay, got "
         "{} and {}",
         experts, config.groups, config.group_top);
  const int64_t candidates = experts / config.groups * config.group_top;
  expect(config.top >= 1 && config.top <= candidates,
         "[route] expected top from 1 to {}, the experts to choose from, got {}", candidates,
         config.top);
  if (choice_bias.defined()) {
    expect_vector("route", "choice_bias", choice_bias, experts, logits);
  }
  const int64_t tokens = logits.dim(0);
  const bool differentiate = ctx.differentiate(logits);
  const int64_t slots = tokens * config.top;
  const Routing routing{
      ctx.result(sum_dtype(logits.dtype), {tokens, config.top}, differentiate),
      {tokens, experts, config.top, ctx.scratch<int32_t>(slots), ctx.scratch<int32_t>(slots),
       ctx.scratch<int32_t>(slots), ctx.scratch<int32_t>(experts + 1)}};
  const auto args = [=]<class T>() {
    return Route<T>{view<T>(logits), view<Sum<T>>(choice_bias.detached()),
                    view<Sum<T>>(routing.weight), routing.lists, config};
  };
  run<route_forward>(ctx, logits, args);
  if (differentiate) {
    ctx.record({logits, routing.weight},
               [=](const Context& c) { run<route_backward>(c, logits, args); });
  }
  return routing;
}

Tensor router_losses(Context& ctx, const Tensor& logits, const Routing& routing,
                     RouterScore score) {
  expect_rows("router_losses", "logits (T, E)", logits, 2);
  const ExpertLists& lists = routing.lists;
  expect(
      logits.dim(0) == lists.tokens && logits.dim(1) == lists.experts,
      "[router_losses] expected the logits that were routed, of {} tokens and {} experts, got {}",
      lists.tokens, lists.experts, logits);
  const bool differentiate = ctx.differentiate(logits);
  const Tensor losses = ctx.result(sum_dtype(logits.dtype), {2, lists.tokens}, differentiate);
  const auto args = [=]<class T>() {
    return RouterLosses<T>{view<T>(logits), view<Sum<T>>(losses), lists, score};
  };
  run<router_losses_forward>(ctx, logits, args);
  if (differentiate) {
    ctx.record({logits, losses},
               [=](const Context& c) { run<router_losses_backward>(c, logits, args); });
  }
  return losses;
}

Tensor dispatch(Context& ctx, const Tensor& x, const Routing& routing) {
  expect_rows("dispatch", "x (T, C)", x, 2);
  expect(x.dim(0) == routing.lists.tokens, "[dispatch] expected {} tokens, as were routed, got {}",
         routing.lists.tokens, x);
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result(x.dtype, {routing.lists.rows(), x.dim(1)}, differentiate);
  const auto args = [=, lists = routing.lists]<class T>() {
    return Dispatch<T>{view<T>(x), view<T>(y), lists};
  };
  run<dispatch_forward>(ctx, x, args);
  if (differentiate) {
    ctx.record({x, y}, [=](const Context& c) { run<dispatch_backward>(c, x, args); });
  }
  return y;
}

Tensor combine_with(Context& ctx, const Tensor& y, const Routing& routing, const Tensor& added,
                    const Tensor& gate) {
  constexpr const char* kName = "combine_with";
  expect_combined(kName, y, routing);
  const Tensor sum = ctx.result(y.dtype, {routing.lists.tokens, y.dim(1)}, false);
  expect_rows(kName, "added (T, C)", added, 2);
  expect(added.dim(0) == sum.dim(0) && added.dim(1) == sum.dim(1) && added.dtype == y.dtype,
         "[{}] expected what is added as the result is, {}, got {}", kName, sum, added);
  expect(!gate.defined() || (gate.rank == 2 && gate.dim(0) == sum.dim(0) && gate.dim(1) == 1 &&
                             gate.dtype == y.dtype),
         "[{}] expected a gate for each of {} tokens, {} ({}, 1), got {}", kName, sum.dim(0),
         dtype_name(y.dtype), sum.dim(0), gate);
  run<combine_forward>(ctx, y, [&]<class T>() {
    return Combine<T>{view<T>(y.detached()),
                      view<Sum<T>>(routing.weight.detached()),
                      view<T>(sum),
                      routing.lists,
                      view<T>(added.detached()),
                      view<T>(gate.detached())};
  });
  return sum;
}

Tensor combine(Context& ctx, const Tensor& y, const Routing& routing) {
  expect_combined("combine", y, routing);
  const Tensor weight = routing.weight;
  const bool differentiate = ctx.differentiate(y, weight);
  const Tensor sum = ctx.result(y.dtype, {routing.lists.tokens, y.dim(1)}, differentiate);
  const auto args = [=, lists = routing.lists]<class T>() {
    return Combine<T>{view<T>(y), view<Sum<T>>(weight), view<T>(sum), lists, {}, {}};
  };
  run<combine_forward>(ctx, y, args);
  if (differentiate) {
    ctx.record({y, weight, sum}, [=](const Context& c) { run<combine_backward>(c, y, args); });
  }
  return sum;
}

bool combine_with_serves(const Context& ctx, const Tensor& y) {
  return y.device.kind == Device::kCuda && ctx.tape == nullptr;
}

bool experts_hidden_serves(const Context& ctx, const Tensor& x, const Tensor& gate,
                           const Tensor& up) {
  constexpr int64_t kAccess = 8;  // elements
  return x.device.kind == Device::kCuda && ctx.tape == nullptr && x.dtype == Dtype::kBF16 &&
         gate.dtype == Dtype::kBF16 && up.dtype == Dtype::kBF16 && x.dim(1) % kAccess == 0 &&
         up.dim(1) % kAccess == 0;
}

Tensor experts_hidden(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& gate_bias,
                      const Tensor& up, const Tensor& up_bias, float limit,
                      const Routing& routing) {
  constexpr const char* kName = "experts_hidden";
  const ExpertLists lists = routing.lists;
  expect_rows(kName, "x (T, K)", x, 2);
  expect(x.dim(0) == lists.tokens, "[{}] expected {} tokens, as were routed, got {}", kName,
         lists.tokens, x);
  expect_experts(kName, x, gate, gate_bias, lists.experts);
  expect_experts(kName, x, up, up_bias, lists.experts);
  expect(gate.dim(1) == up.dim(1) && gate.dtype == up.dtype &&
             gate_bias.defined() == up_bias.defined(),
         "[{}] expected gate and up of one shape and type, with biases or without, got {} and {}",
         kName, gate, up);
  const Tensor y = ctx.result(x.dtype, {lists.rows(), up.dim(1)}, false);
  run<experts_hidden_forward>(ctx, x, [&]<class T>() {
    return ExpertsHidden<T>{view<T>(x),
                            weight_view<T>(rows_of(gate.detached())),
                            weight_view<T>(rows_of(up.detached())),
                            view<Sum<T>>(gate_bias.detached()),
                            view<Sum<T>>(up_bias.detached()),
                            view<T>(y),
                            limit,
                            lists};
  });
  return y;
}

Tensor experts_matmul(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                      const Routing& routing) {
  expect_slots("experts_matmul", x, routing);
  const int64_t experts = routing.lists.experts;
  expect_experts("experts_matmul", x, weight, bias, experts);
  const int64_t outputs = weight.dim(1);
  const ExpertLists lists = routing.lists;
  const bool differentiate = ctx.differentiate(x, weight, bias);
  const Tensor y = ctx.result(x.dtype, {x.dim(0), outputs}, differentiate);
  run<experts_matmul_forward>(ctx, x, [&]<class T>() {
    return ExpertsMatmul<T>{view<T>(x), weight_view<T>(rows_of(weight)), view<Sum<T>>(bias),
                            view<T>(y), lists};
  });
  if (!differentiate) {
    return y;
  }
  ctx.record({y, bias}, [=](const Context& c) {
    const Tensor dy = y.grad_tensor();
    if (x.has_grad()) {
      const bool set = x.takes_grad();
      const Tensor out = x.grad_tensor();
      run<experts_grad_input>(c, dy, [&]<class T>() {
        return ExpertsGradInput<T>{view<T>(dy), weight_view<T>(rows_of(weight)), view<T>(out), !set,
                                   lists};
      });
    }
    if (weight.has_grad()) {
      const bool set = weight.takes_grad();
      const Tensor out = weight.grad_tensor().reshape({experts * outputs, x.dim(1)});
      run<experts_grad_weight>(c, dy, [&]<class T>() {
        return ExpertsGradWeight<T>{view<T>(dy), view<T>(x), view<Sum<T>>(out), !set, lists};
      });
    }
    if (bias.has_grad()) {
      run<experts_grad_bias>(c, dy, [&]<class T>() {
        return ExpertsGradBias<T>{view<T>(dy), bias.grad_ptr<Sum<T>>(), lists};
      });
    }
  });
  return y;
}

}  // namespace cambium
