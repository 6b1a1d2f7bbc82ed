#include "ops/segment_plans.h"

#include <atomic>
#include <numeric>
#include <thread>

#include "ops/attention/attention.h"
#include "ops/recurrence/recurrence.h"
#include "ops/stateful_testing.h"

namespace cambium {
namespace {

struct Numbers {
  using Key = int;
  Key key;
  std::vector<int> numbers;
};
struct Names {
  using Key = int;
  Key key;
};

Numbers numbers(int key) {
  return {key, {key, key}};
}

TEST(SegmentPlans, AreKeptByTypeAndKeyUntilCleared) {
  SegmentPlans plans;
  const auto one = plans.get<Numbers>(1, [] { return numbers(1); });
  EXPECT_EQ(one->numbers, (std::vector<int>{1, 1}));
  EXPECT_EQ(plans.get<Numbers>(1, []() -> Numbers { throw std::logic_error("made twice"); }), one);
  EXPECT_EQ(plans.get<Numbers>(2, [] { return numbers(2); })->key, 2);
  plans.get<Names>(1, [] { return Names{1}; });
  EXPECT_EQ(plans.size(), 3U);
  plans.clear();
  EXPECT_EQ(plans.size(), 0U);
  EXPECT_EQ(one->numbers, (std::vector<int>{1, 1})) << "a plan in use stays";
  EXPECT_NE(plans.get<Numbers>(1, [] { return numbers(1); }), one);
}

TEST(SegmentPlans, OneThatCannotBeMadeLeavesNothing) {
  SegmentPlans plans;
  EXPECT_THROW(plans.get<Numbers>(1, []() -> Numbers { throw std::bad_alloc(); }), std::bad_alloc);
  EXPECT_EQ(plans.size(), 0U);
  EXPECT_EQ(plans.get<Numbers>(1, [] { return numbers(1); })->key, 1);
}

TEST(SegmentPlans, ThreadsThatAskAtOnceGetTheSame) {
  SegmentPlans plans;
  std::atomic<int> made = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        const int key = i % 10;
        EXPECT_EQ(plans
                      .get<Numbers>(key,
                                    [&] {
                                      ++made;
                                      return numbers(key);
                                    })
                      ->key,
                  key);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(made, 10);
}

struct Shape {
  int64_t heads, kv_heads, window, sinks = 0;
};
// Each differs from the first in one number that the lists depend on.
const std::vector<Shape> kShapes = {{4, 2, 0},   {8, 2, 0}, {4, 1, 0},
                                    {4, 2, 300}, {4, 2, 9}, {4, 2, 9, 5}};

/// Attention over drawn inputs: its result and, in training, the gradients.
std::vector<std::vector<double>> attend(const Shape& shape, const Segments& segments, bool training,
                                        const KvPages* pages = nullptr) {
  const std::vector<testing::Input> inputs = {{{segments.tokens(), shape.heads, 8}},
                                              {{segments.tokens(), shape.kv_heads, 8}},
                                              {{segments.tokens(), shape.kv_heads, 8}}};
  const auto run = testing::run_operation<float>(
      [&](Context& ctx, const std::vector<Tensor>& in) {
        return attention(ctx, in[0], in[1], in[2], segments,
                         {.scale = 0.3F, .window = shape.window, .sinks = shape.sinks}, pages);
      },
      inputs, testing::draw(inputs), false, training);
  std::vector<std::vector<double>> results = run.grads;
  results.push_back(run.output);
  return results;
}

TEST(SegmentPlans, LayersOfOneShapeShareAttentionsListsAndOthersDoNot) {
  const testing::OwnedSegments owned = testing::packed_segments({700, 1, 20, 270});
  SegmentPlans plans;
  Segments shared = owned.view();
  shared.plans = &plans;
  for (int layer = 0; layer < 2; ++layer) {
    for (const Shape& shape : kShapes) {
      for (const bool training : {true, false}) {
        EXPECT_EQ(attend(shape, shared, training), attend(shape, owned.view(), training));
      }
    }
  }
  // With and without gradients forward, and backward.
  EXPECT_EQ(plans.size(), 3 * kShapes.size());
}

TEST(SegmentPlans, AttentionOverPagesKeepsItsOwnLists) {
  // A long piece at position 0, a token and a short piece of longer sequences: blocks and splits.
  const testing::OwnedSegments owned{{0, 40, 41, 44}, {0, 600, 300}, {0, 1, 2}};
  SegmentPlans plans;
  Segments shared = owned.view();
  shared.plans = &plans;
  constexpr int64_t kPage = 64;
  constexpr int64_t kPerSegment = 10;
  std::vector<int32_t> table(3 * kPerSegment);
  std::iota(table.begin(), table.end(), 0);
  for (int layer = 0; layer < 2; ++layer) {
    for (const Shape& shape : kShapes) {
      const auto over_pages = [&](const Segments& segments) {
        const OwnedTensor keys(Dtype::kF32, {3 * kPerSegment, kPage, shape.kv_heads, 8});
        const OwnedTensor values(Dtype::kF32, {3 * kPerSegment, kPage, shape.kv_heads, 8});
        const KvPages pages{keys.view, values.view, table, kPerSegment};
        return attend(shape, segments, false, &pages);
      };
      EXPECT_EQ(over_pages(shared), over_pages(owned.view()));
      EXPECT_EQ(attend(shape, shared, false), attend(shape, owned.view(), false));
    }
  }
  EXPECT_EQ(plans.size(), 2 * kShapes.size());
}

TEST(SegmentPlans, RecurrencesOfOneChunkSizeShareTheirChunks) {
  const testing::OwnedSegments owned = testing::packed_segments({70, 1, 130, 64});
  SegmentPlans plans;
  Segments shared = owned.view();
  shared.plans = &plans;
  for (const int64_t dim : {16, 72, 16, 72}) {  // chunks of 32 and of 64 tokens
    const std::vector<testing::Input> inputs = {{{265, 2, dim}},
                                                {{265, 2, dim}},
                                                {{265, 2, dim}},
                                                {{265, 2}, -1.0, 0.0},
                                                {{265, 2}, 0.0, 1.0}};
    const auto run = [&](const Segments& segments) {
      const testing::Operation operation = [&](Context& ctx, const std::vector<Tensor>& in) {
        return recurrence(ctx,
                          {.q = in[0], .k = in[1], .v = in[2], .log_decay = in[3], .weight = in[4]},
                          segments);
      };
      return testing::run_operation<float>(operation, inputs, testing::draw(inputs), false, true);
    };
    const testing::Run with = run(shared);
    const testing::Run without = run(owned.view());
    EXPECT_EQ(with.output, without.output);
    EXPECT_EQ(with.grads, without.grads);
  }
  EXPECT_EQ(plans.size(), 2U);
}

}  // namespace
}  // namespace cambium
