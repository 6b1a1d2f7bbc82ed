#include "ops/scale_heads/scale_heads.h"

#include "base/testing.h"
#include "ops/testing_table.h"

namespace cambium {
namespace {

using Row = testing::OperationRow;

class ScaleHeads : public testing::OperationTable {};

TEST_P(ScaleHeads, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  expect_kernels_and_gradients();
}

const testing::Operation kPlain = [](Context& ctx, const std::vector<Tensor>& in) {
  return scale_heads(ctx, in[0], in[1]);
};

testing::Input factors(int64_t heads) {
  return {{heads}, -2.0, 2.0, true, true};
}

INSTANTIATE_TEST_SUITE_P(Shapes, ScaleHeads,
                         ::testing::Values(Row{"heads", kPlain, {{{5, 4, 16}}, factors(4)}},
                                           Row{"odd", kPlain, {{{3, 3, 7}}, factors(3)}},
                                           Row{"one_head", kPlain, {{{2, 1, 24}}, factors(1)}},
                                           Row{"many_tokens", kPlain, {{{150, 2, 8}}, factors(2)}},
                                           Row{"queries_beside_their_gates",
                                               [](Context& ctx, const std::vector<Tensor>& in) {
                                                 return scale_heads(ctx, in[0].slice(2, 0, 8),
                                                                    in[1]);
                                               },
                                               {{{6, 3, 16}}, factors(3)}}),
                         ::testing::PrintToStringParamName());

TEST(ScaleHeadsErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = arena.empty(Dtype::kF32, {2, 4, 3});
  EXPECT_EQ(testing::error_of([&] { scale_heads(ctx, x, arena.empty(Dtype::kF32, {3})); }),
            "[scale_heads] expected factor f32 (4), got f32 (3)");
  EXPECT_EQ(
      testing::error_of([&] { scale_heads(ctx, x.merge_last(), arena.empty(Dtype::kF32, {12})); }),
      "[scale_heads] expected x (T, H, D) f32 or f64 with contiguous rows, got f32 (2, 12)");
}

}  // namespace
}  // namespace cambium
