#include "ops/activation/activation.h"

#include "base/testing.h"
#include "ops/testing_table.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Operation;

using Row = testing::OperationRow;

class FeedForwardFunction : public testing::OperationTable {};

TEST_P(FeedForwardFunction, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  expect_kernels_and_gradients();
}

using In = std::vector<Tensor>;

Operation of(ActivationKind kind) {
  return [kind](Context& c, const In& in) { return activation(c, in[0], kind); };
}
Operation gated(ActivationKind kind) {
  return [kind](Context& c, const In& in) { return gated_activation(c, in[0], in[1], kind); };
}

INSTANTIATE_TEST_SUITE_P(
    Table, FeedForwardFunction,
    ::testing::Values(
        Row{"silu", of(ActivationKind::kSilu), {{{4, 35}, -12, 12}}},
        Row{"relu2", of(ActivationKind::kRelu2), {{{4, 35}, -2, 2}}},
        Row{"gelu", of(ActivationKind::kGelu), {{{4, 35}, -4, 4}}},
        Row{"gelu_far_out", of(ActivationKind::kGelu), {{{3, 40}, 3, 12}}},
        Row{"gelu_tanh", of(ActivationKind::kGeluTanh), {{{4, 35}, -4, 4}}},
        Row{"gelu_of_heads_that_lie_apart",
            [](Context& c, const In& in) {
              return activation(c, in[0].split_last(3, 24).slice(2, 8, 8), ActivationKind::kGelu);
            },
            {{{5, 72}, -4, 4}}},
        Row{"gated_silu", gated(ActivationKind::kSilu), {{{4, 35}, -4, 4}, {{4, 35}}}},
        Row{"gated_relu2", gated(ActivationKind::kRelu2), {{{4, 35}, -2, 2}, {{4, 35}}}},
        Row{"gated_gelu", gated(ActivationKind::kGelu), {{{4, 35}, -4, 4}, {{4, 35}}}},
        Row{"gated_gelu_tanh", gated(ActivationKind::kGeluTanh), {{{300, 70}, -4, 4}, {{300, 70}}}},
        Row{"gated_by_halves_of_one_product",
            [](Context& c, const In& in) {
              return gated_activation(c, in[0].slice(1, 0, 17), in[0].slice(1, 17, 17),
                                      ActivationKind::kGeluTanh);
            },
            {{{6, 34}, -4, 4}}},
        Row{"gated_by_itself",
            [](Context& c, const In& in) {
              return gated_activation(c, in[0], in[0], ActivationKind::kGelu);
            },
            {{{6, 34}, -2, 2}}},
        Row{"gated_twice_whose_gradients_meet",
            [](Context& c, const In& in) {
              const Tensor first = gated_activation(c, in[0], in[1], ActivationKind::kSilu);
              return gated_activation(c, in[0], first, ActivationKind::kGelu);
            },
            {{{300, 72}, -4, 4}, {{300, 72}}}},
        Row{"clamped_swiglu",
            [](Context& c, const In& in) { return clamped_swiglu(c, in[0], in[1], 1.5F); },
            {{{4, 35}, -4, 4}, {{4, 35}, -3, 3}}},
        Row{"clamped_swiglu_twice_whose_gradients_meet",
            [](Context& c, const In& in) {
              const Tensor first = clamped_swiglu(c, in[0], in[1], 2.0F);
              return clamped_swiglu(c, first, in[1], 7.0F);
            },
            {{{6, 40}, -1, 1}, {{6, 40}, -1, 1}}},
        Row{"clamped_swiglu_of_halves",
            [](Context& c, const In& in) {
              return clamped_swiglu(c, in[0].slice(1, 0, 16), in[0].slice(1, 16, 16), 7.0F);
            },
            {{{6, 32}, -4, 9}}},
        Row{"xielu",
            [](Context& c, const In& in) { return xielu(c, in[0], in[1], in[2], 0.5F, -1e-6F); },
            {{{9, 35}, -4, 4}, {{1}, -1, 1}, {{1}, -1, 1}}},
        Row{"xielu_of_small_numbers_of_a_slice",
            [](Context& c,
               const In& in) { return xielu(c, in[0].slice(1, 3, 20), in[1], in[2], 0.5F, 0.0F); },
            {{{70, 24}, -0.4, 0.1}, {{1}, 20.5, 21}, {{1}, -3, -2}}}),
    ::testing::PrintToStringParamName());

std::vector<double> capped(Context& ctx, Dtype type, const std::vector<double>& logits,
                           const std::vector<double>& grad) {
  const OwnedTensor x(type, {7, 19}, false, ctx.device());
  const OwnedTensor d(type, {7, 19}, false, ctx.device());
  testing::put(x.view, logits);
  testing::put(d.view, grad);
  soft_cap(ctx, x.view, 3.0F);
  soft_cap_grad(ctx, d.view, x.view, 3.0F);
  ctx.synchronize();
  std::vector<double> all = testing::take(x.view);
  const std::vector<double> grads = testing::take(d.view);
  all.insert(all.end(), grads.begin(), grads.end());
  return all;
}

TEST(SoftCap, IsItsFormulaAndSoIsItsGradient) {
  const auto drawn = testing::draw({{{7, 19}, -9, 9}, {{7, 19}}});
  std::vector<double> exact;
  for (const double x : drawn[0]) {
    exact.push_back(3.0 * std::tanh(x / 3.0));
  }
  for (size_t i = 0; i < drawn[0].size(); ++i) {
    const double slope = 1.0 / std::pow(std::cosh(drawn[0][i] / 3.0), 2.0);
    exact.push_back(drawn[1][i] * slope);
  }
  Arena arena;
  Context ctx{.arena = &arena};
  EXPECT_LE(testing::relative_error(capped(ctx, Dtype::kF64, drawn[0], drawn[1]), exact), 1e-12);
  EXPECT_LE(testing::relative_error(capped(ctx, Dtype::kF32, drawn[0], drawn[1]), exact), 1e-5);
  if (testing::on_cuda()) {
    testing::CudaContext cuda;
    EXPECT_LE(testing::relative_error(capped(cuda.ctx, Dtype::kF32, drawn[0], drawn[1]), exact),
              1e-5);
    EXPECT_LE(testing::relative_error(capped(cuda.ctx, Dtype::kBF16, drawn[0], drawn[1]), exact),
              2e-2);
  }
}

TEST(FeedForwardFunction, WhatIsWrongIsNamed) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = ctx.result(Dtype::kF32, {2, 3}, false);
  const Tensor other = ctx.result(Dtype::kF32, {2, 4}, false);
  const Tensor one = ctx.result(Dtype::kF32, {1}, false);
  EXPECT_EQ(error_of([&] { find_activation("gelu_tan"); }),
            "[activation] expected one of silu, relu2, gelu, gelu_tanh, got 'gelu_tan'; did you "
            "mean 'gelu_tanh'?");
  EXPECT_EQ(
      error_of([&] { gated_activation(ctx, x, other, ActivationKind::kGelu); }),
      "[gated_activation] expected up like the first input, f32 (2, 3) with contiguous rows, got "
      "f32 (2, 4)");
  EXPECT_EQ(error_of([&] { xielu(ctx, x, other, one, 0.5F, 0.0F); }),
            "[xielu] expected alpha_p f32 (1), got f32 (2, 4)");
  EXPECT_EQ(error_of([&] { xielu(ctx, x, one, one, 0.5F, 0.1F); }),
            "[xielu] expected eps of at most 0, got 0.1");
}

}  // namespace
}  // namespace cambium
