#include "ops/join_heads/join_heads.h"

#include "base/testing.h"
#include "ops/testing_table.h"

namespace cambium {
namespace {

using Row = testing::OperationRow;

class JoinHeads : public testing::OperationTable {};

TEST_P(JoinHeads, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  expect_kernels_and_gradients();
}

const testing::Operation kPlain = [](Context& ctx, const std::vector<Tensor>& in) {
  return join_heads(ctx, in[0], in[1]);
};

INSTANTIATE_TEST_SUITE_P(
    Shapes, JoinHeads,
    ::testing::Values(Row{"one_part_shared", kPlain, {{{3, 4, 8}}, {{3, 1, 16}}}},
                      Row{"a_part_for_each", kPlain, {{{5, 3, 7}}, {{5, 3, 2}}}},
                      Row{"one_head", kPlain, {{{2, 1, 5}}, {{2, 1, 3}}}},
                      Row{"slices_of_wider_tensors",
                          [](Context& ctx, const std::vector<Tensor>& in) {
                            return join_heads(ctx, in[0].split_last(2, 20).slice(2, 0, 8),
                                              in[1].slice(1, 16, 8).split_last(1, 8));
                          },
                          {{{6, 40}}, {{6, 24}}}}),
    ::testing::PrintToStringParamName());

TEST(JoinHeadsErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor a = arena.empty(Dtype::kF32, {2, 4, 3});
  EXPECT_EQ(testing::error_of([&] {
              join_heads(ctx, a, arena.empty(Dtype::kF32, {2, 2, 3}));
            }),
            "[join_heads] expected b f32 (2, 4 or 1, B) beside a f32 (2, 4, 3), got f32 (2, 2, 3)");
  EXPECT_EQ(testing::error_of([&] { join_heads(ctx, a.merge_last(), a); }),
            "[join_heads] expected a (T, H, A) f32 or f64 with contiguous rows, got f32 (2, 12)");
}

}  // namespace
}  // namespace cambium
