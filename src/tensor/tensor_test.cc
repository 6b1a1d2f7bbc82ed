#include <gtest/gtest.h>

#include <cstring>

#include "base/parallel.h"
#include "tensor/context.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

TEST(Tensor, ViewsKeepDataAndGradientInStep) {
  OwnedTensor t(Dtype::kF32, {4, 12}, true);
  const Tensor v = t.view.slice(1, 4, 6).split_last(2, 3).slice(0, 1, 2);
  EXPECT_EQ(v.describe(), "f32 (2, 2, 3)");
  EXPECT_EQ(v.ptr<float>() - t.view.ptr<float>(), 16);
  EXPECT_EQ(v.grad_ptr<float>() - t.view.grad_ptr<float>(), 16);
  EXPECT_TRUE(v.merge_last().row_contiguous());
  EXPECT_EQ(v.merge_last().row_stride(), 12);
  EXPECT_FALSE(v.row_contiguous());
  EXPECT_FALSE(v.contiguous());
}

TEST(Arena, ReleaseReusesMemoryAndKeepsThePeak) {
  Arena arena;
  const auto mark = arena.mark();
  void* first = arena.allocate(1000);
  arena.allocate(40 << 20);
  arena.release(mark);
  EXPECT_EQ(arena.allocate(10), first);
  EXPECT_GE(arena.peak_bytes(), 40 << 20);
  EXPECT_EQ(arena.used_bytes(), 64);
}

TEST(Tape, RunsBackwardsOnce) {
  Arena arena;
  Tape tape(arena);
  std::vector<int> order;
  auto* sink = &order;
  const Context ctx{.arena = &arena, .tape = &tape};
  ctx.record({}, [sink](const Context&) { sink->push_back(1); });
  ctx.record({}, [sink](const Context&) { sink->push_back(2); });
  tape.backward(ctx);
  tape.backward(ctx);
  EXPECT_EQ(order, (std::vector<int>{2, 1}));
}

/// A fresh gradient is set by a first writer that writes all of it, else zeroed before it is
/// touched.
TEST(Tape, FreshGradientsAreSetOrZeroedBeforeTheyAreTouched) {
  Arena arena;
  {
    const ArenaScope scope(arena);
    std::memset(arena.allocate(4096), 0xff, 4096);  // NaN
  }
  Tape tape(arena);
  const Context ctx{.arena = &arena, .tape = &tape};
  const Tensor set = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor added = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor part = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor untouched = ctx.result(Dtype::kF32, {2, 3}, true);
  ctx.record({}, [=](const Context&) {
    EXPECT_FALSE(set.takes_grad()) << "it was set by the step before";
    set.grad_ptr<float>()[1] += 1.0F;
  });
  ctx.record({added}, [=](const Context&) {
    EXPECT_TRUE(set.takes_grad());
    fill(set.grad_tensor(), 2.0);
    EXPECT_FALSE(added.takes_grad()) << "a step that names it adds to it";
    static_cast<float*>(added.grad)[0] += 1.0F;
    const Tensor row = part.slice(0, 1, 1);
    EXPECT_FALSE(row.takes_grad()) << "a part cannot set the whole";
    static_cast<float*>(row.grad)[0] += 1.0F;
  });
  tape.backward(ctx);
  const auto grads = [](const Tensor& t) {
    const float* g = t.grad_ptr<float>();
    return std::vector<float>(g, g + t.numel());
  };
  EXPECT_EQ(grads(set), (std::vector<float>{2, 3, 2, 2, 2, 2}));
  EXPECT_EQ(grads(added), (std::vector<float>{1, 0, 0, 0, 0, 0}));
  EXPECT_EQ(grads(part), (std::vector<float>{0, 0, 0, 1, 0, 0}));
  EXPECT_EQ(grads(untouched), std::vector<float>(6, 0.0F));
  set.forget_grad();
  EXPECT_TRUE(set.reshape({6}).takes_grad());
  OwnedTensor parameter(Dtype::kF32, {3}, true);
  EXPECT_FALSE(parameter.view.takes_grad()) << "zeroed, so not fresh";
  parameter.view.forget_grad();
  EXPECT_EQ(grads(parameter.view), std::vector<float>(3, 0.0F));
}

TEST(ParallelFor, CoversTheRangeOnceWithAnyNumberOfThreads) {
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int repeat = 0; repeat < 200; ++repeat) {
      std::vector<int> hits(1000, 0);
      parallel_for(1000, 7, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          ++hits[static_cast<size_t>(i)];
        }
      });
      EXPECT_EQ(hits, std::vector<int>(1000, 1));
    }
  }
}

}  // namespace
}  // namespace cambium
