#include "ops/head_matmul/head_matmul.h"

#include "base/testing.h"
#include "ops/testing_inputs.h"
#include "ops/testing_table.h"

namespace cambium {
namespace {

using Row = testing::OperationRow;

class HeadMatmul : public testing::OperationTable {};

TEST_P(HeadMatmul, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  expect_kernels_and_gradients();
}

testing::Input weight(std::vector<int64_t> shape) {
  return {std::move(shape), -1.0, 1.0, true, true};
}
/// Of the activations' type, which a weight without a gradient may have.
testing::Input narrow(std::vector<int64_t> shape) {
  return {std::move(shape), -1.0, 1.0, false};
}

const testing::Operation kPlain = [](Context& ctx, const std::vector<Tensor>& in) {
  return head_matmul(ctx, in[0], in[1]);
};
const testing::Operation kTransposed = [](Context& ctx, const std::vector<Tensor>& in) {
  return head_matmul_transposed(ctx, in[0], in[1]);
};

INSTANTIATE_TEST_SUITE_P(
    Shapes, HeadMatmul,
    ::testing::Values(
        Row{"plain", kPlain, {{{11, 3, 20}}, weight({3, 9, 20})}},
        Row{"transposed", kTransposed, {{{11, 3, 9}}, weight({3, 9, 20})}},
        Row{"one_token", kPlain, {{{1, 2, 40}}, weight({2, 33, 40})}},
        Row{"one_token_transposed", kTransposed, {{{1, 2, 17}}, weight({2, 17, 300})}},
        // Rows that are taken in wide pieces, of one token and of some.
        Row{"wide", kPlain, {{{3, 2, 264}}, weight({2, 37, 264})}},
        Row{"wide_transposed", kTransposed, {{{3, 2, 40}}, weight({2, 40, 136})}},
        Row{"wide_narrow", kPlain, {{{8, 2, 512}}, narrow({2, 35, 512})}},
        Row{"wide_narrow_transposed", kTransposed, {{{7, 2, 33}}, narrow({2, 33, 264})}},
        Row{"wide_narrow_token", kPlain, {{{1, 3, 512}}, narrow({3, 128, 512})}},
        Row{"wide_narrow_token_transposed", kTransposed, {{{1, 3, 128}}, narrow({3, 128, 512})}},
        // The rows of keys and of values that stand in one projection, and slices of heads.
        Row{"rows_of_a_projection",
            [](Context& ctx, const std::vector<Tensor>& in) {
              const Tensor w = in[1].reshape({4, 7, 6}).slice(1, 4, 3);
              return head_matmul(ctx, in[0].slice(2, 2, 6), w);
            },
            {{{5, 4, 10}}, weight({4 * 7, 6})}},
        Row{"rows_of_a_projection_transposed",
            [](Context& ctx, const std::vector<Tensor>& in) {
              const Tensor w = in[1].reshape({4, 7, 6}).slice(1, 0, 4);
              return head_matmul_transposed(ctx, in[0].slice(2, 3, 4), w);
            },
            {{{5, 4, 10}}, weight({4 * 7, 6})}}),
    ::testing::PrintToStringParamName());

TEST(HeadMatmul, ANarrowWeightIsReadAsItIs) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> x{1, 2, 3, 4};
  std::vector<float> wide{1.5F, -2, 0.25F, 3, 1, 0.5F, -1, 8};
  std::vector<bf16> narrow;
  for (const float w : wide) {
    narrow.push_back(round_to_bf16(w));
  }
  const Tensor in = Tensor::of(x.data(), {1, 2, 2});
  for (const auto& product : {head_matmul, head_matmul_transposed}) {
    const Tensor a = product(ctx, in, Tensor::of(wide.data(), {2, 2, 2}));
    const Tensor b = product(ctx, in, Tensor::of(narrow.data(), {2, 2, 2}));
    EXPECT_EQ(testing::to_doubles(a, a.data), testing::to_doubles(b, b.data));
  }
}

TEST(HeadMatmul, BatchInvariantTokensAreTheSameAlone) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const bool transposed : {false, true}) {
    const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
      return transposed ? head_matmul_transposed(ctx, in[0], in[1])
                        : head_matmul(ctx, in[0], in[1]);
    };
    const std::vector<testing::Input> inputs = {{{11, 3, transposed ? 72 : 520}}, {{3, 72, 520}}};
    auto values = testing::draw(inputs);
    for (auto& input : values) {
      input = testing::as_stored(std::move(input), Dtype::kBF16);
    }
    testing::CudaContext cuda(Dtype::kBF16);
    cuda.ctx.batch_invariant = true;
    const testing::HeldInputs in(inputs, values, Device::kCuda, Dtype::kBF16);
    const auto y = testing::take(operation(cuda.ctx, in.tensors));
    const auto exact = testing::run_operation<double>(operation, inputs, values, true, false);
    EXPECT_LE(testing::norm_error(y, exact.output), testing::kNarrowForward);
    const auto last =
        testing::take(operation(cuda.ctx, {in.tensors[0].slice(0, 10, 1), in.tensors[1]}));
    EXPECT_TRUE(std::equal(last.rbegin(), last.rend(), y.rbegin()));
  }
}

TEST(HeadMatmulErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = arena.empty(Dtype::kF32, {2, 4, 3});
  EXPECT_EQ(testing::error_of([&] {
              head_matmul(ctx, x, arena.empty(Dtype::kF32, {4, 3, 5}));
            }),
            "[head_matmul] expected a weight of f32 or bf16 (4, N, 3) beside x f32 (2, 4, 3), got "
            "f32 (4, 3, 5)");
  EXPECT_EQ(testing::error_of([&] {
              head_matmul_transposed(ctx, x, arena.empty(Dtype::kF32, {3, 3, 5}));
            }),
            "[head_matmul] expected a weight of f32 or bf16 (4, 3, K) beside x f32 (2, 4, 3), got "
            "f32 (3, 3, 5)");
}

}  // namespace
}  // namespace cambium
