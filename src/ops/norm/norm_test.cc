#include "ops/norm/norm.h"

#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::Input;

struct Shape {
  int64_t rows, channels;
};

class RmsNorm : public ::testing::TestWithParam<Shape> {};

TEST_P(RmsNorm, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const auto [rows, channels] = GetParam();
  const std::vector<Input> inputs = {{{rows, channels}}, {{channels}}};
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return rms_norm(ctx, in[0], in[1], 1e-5F);
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

INSTANTIATE_TEST_SUITE_P(Shapes, RmsNorm,
                         ::testing::Values(Shape{1, 2}, Shape{3, 7}, Shape{5, 64}, Shape{130, 80},
                                           Shape{2, 577}));

TEST(RmsNormViews, HeadsOfAColumnSlice) {
  // x is the middle third of a wider tensor, split into heads, as after a fused projection.
  const std::vector<Input> inputs = {{{6, 96}}, {{16}}};
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return rms_norm(ctx, in[0].slice(1, 32, 32).split_last(2, 16), in[1], 1e-6F);
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

TEST(RmsNormErrors, NameTheShapes) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = arena.empty(Dtype::kF32, {4, 8});
  const Tensor w = arena.empty(Dtype::kF32, {7});
  try {
    rms_norm(ctx, x, w, 1e-5F);
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[rms_norm] expected weight f32 (8), got f32 (7)");
  }
}

}  // namespace
}  // namespace cambium
