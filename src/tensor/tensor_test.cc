#include <gtest/gtest.h>

#include "base/parallel.h"
#include "tensor/context.h"

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
  ctx.record([sink](const Context&) { sink->push_back(1); });
  ctx.record([sink](const Context&) { sink->push_back(2); });
  tape.backward(ctx);
  tape.backward(ctx);
  EXPECT_EQ(order, (std::vector<int>{2, 1}));
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
