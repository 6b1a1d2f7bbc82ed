#include "nn/batch.h"

#include <gtest/gtest.h>

#include "nn/testing.h"
#include "ops/segment_plans.h"

namespace cambium {
namespace {

OwnedTensor run(const UnitSpec& spec, const Batch& batch) {
  constexpr int64_t kWidth = 12;
  Arena arena;
  Context ctx{.arena = &arena};
  const auto unit = make_unit(spec, kWidth);
  const testing::Memory memory(*unit, Dtype::kF32);
  const OwnedTensor x = testing::random_rows(batch.size(), kWidth, Dtype::kF32);
  const Tensor y = unit->forward(ctx, x.view, {&batch, nullptr, nullptr});
  OwnedTensor result(Dtype::kF32, {batch.size(), kWidth});
  std::copy_n(y.ptr<float>(), y.numel(), result.view.ptr<float>());
  return result;
}

TEST(Batch, KeepsWhatLayersOfOneShapeWorkOutOfItsSegments) {
  const UnitSpec full{"attention",
                      {{"heads", int64_t{2}}, {"head_dim", int64_t{6}}, {"rope", false}}};
  UnitSpec windowed = full;
  windowed.options.set("window", int64_t{3});
  Batch batch = testing::piece(40);
  const std::vector<double> alone[] = {testing::values_of(run(full, batch).view),
                                       testing::values_of(run(windowed, testing::piece(40)).view)};
  EXPECT_EQ(batch.segments().plans->size(), 1U);
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(testing::values_of(run(full, batch).view), alone[0]);
    EXPECT_EQ(testing::values_of(run(windowed, batch).view), alone[1]);
  }
  EXPECT_EQ(batch.segments().plans->size(), 2U);

  // Another piece, and other pieces altogether.
  batch.add(std::vector<int32_t>(7, 0));
  EXPECT_EQ(batch.segments().plans->size(), 0U);
  EXPECT_EQ(run(full, batch).view.dim(0), 47);
  batch.clear();
  EXPECT_EQ(batch.segments().plans->size(), 0U);
  batch.add(std::vector<int32_t>(40, 0));
  EXPECT_EQ(testing::values_of(run(windowed, batch).view), alone[1]);

  // A batch takes its plans along.
  const Batch moved = std::move(batch);
  EXPECT_EQ(moved.segments().plans->size(), 1U);
}

}  // namespace
}  // namespace cambium
