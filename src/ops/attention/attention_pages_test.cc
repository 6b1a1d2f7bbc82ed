// Attention over cached keys and values: every way to cut a sequence gives what one pass gives.
#include "base/checked.h"
#include "base/parallel.h"
#include "base/testing.h"
#include "ops/attention/attention_pages_testing.h"

namespace cambium {
namespace {

using testing::for_each_isa;
using testing::on_cuda;
using namespace testing::pages;  // NOLINT(google-build-using-namespace)

class AttentionPages : public ::testing::TestWithParam<Case> {};

void expect_splits_agree(const Case& c, Cached& cached, double tolerance, bool reference) {
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, c.tokens}}, reference), tolerance) << "one pass";
  for (int64_t cut = 1; cut < c.tokens; ++cut) {
    cached.poison();
    ASSERT_LE(cached.run({{0, 0, cut}}, reference), tolerance) << "up to " << cut;
    ASSERT_LE(cached.run({{0, cut, c.tokens - cut}}, reference), tolerance) << "from " << cut;
  }
  for (const int64_t step : {1, 3, 17}) {
    cached.poison();
    for (int64_t t = 0; t < c.tokens; t += step) {
      ASSERT_LE(cached.run({{0, t, std::min(step, c.tokens - t)}}, reference), tolerance)
          << "steps of " << step << " at " << t;
    }
  }
}

TEST_P(AttentionPages, EverySplitEqualsOnePass) {
  const Case& c = GetParam();
  Cached cached(c, 1, 7);
  for_each_isa([&] { expect_splits_agree(c, cached, kTolerance, false); });
  if (c.tokens <= 50) {
    expect_splits_agree(c, cached, kTolerance, true);
  }
}

class AttentionPagesOnCuda : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionPagesOnCuda, EverySplitEqualsOnePass) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for_each_on_cuda(GetParam(), [](const Case& c, Dtype activations) {
    Cached cached(c, 1, 7, Device::kCuda, activations);
    expect_splits_agree(c, cached, tolerance_of(activations), false);
  });
}

// Those of the CPU, and the dims and groups that have kernels of their own.
INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPagesOnCuda,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16}, Case{70, 4, 2, 16, 16, 0, 64},
                      Case{70, 4, 2, 32, 16, 20, 16}, Case{80, 3, 1, 64, 64, 9, 1},
                      Case{45, 6, 2, 7, 5, 1, 5}, Case{66, 18, 1, 24, 40, 0, 7},
                      Case{100, 8, 2, 64, 64, 0, 16}, Case{70, 4, 1, 96, 96, 0, 16},
                      Case{70, 8, 2, 128, 128, 33, 32}, Case{66, 16, 1, 128, 64, 0, 16},
                      Case{40, 2, 1, 256, 256, 0, 16}, Case{40, 2, 2, 192, 128, 0, 16},
                      Case{150, 14, 2, 64, 64, 0, 128}, Case{70, 14, 2, 64, 64, 20, 256}),
    ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Sinks, AttentionPagesOnCuda,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, {}, 5},
                                           Case{90, 8, 2, 64, 64, 20, 16, {}, 16},
                                           Case{80, 3, 1, 64, 64, 9, 1, {}, 3},
                                           Case{45, 6, 2, 7, 5, 1, 5, {}, 100},
                                           Case{90, 8, 2, 128, 128, 10, 32, {}, 30},
                                           Case{100, 16, 1, 128, 64, 7, 16, {}, 1},
                                           Case{70, 4, 1, 96, 96, 30, 16, {}, 17},
                                           Case{60, 2, 1, 256, 256, 12, 16, {}, 20}),
                         ::testing::PrintToStringParamName());

// bf16 and f8 pages hold rounded numbers, and every token sees those, however its sequence is cut:
// beside the definition over rounded keys and values the error is that of fp32 pages.
INSTANTIATE_TEST_SUITE_P(Bf16, AttentionPages,
                         ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kBF16},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kBF16},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kBF16},
                                           Case{66, 18, 1, 24, 40, 0, 7, Dtype::kBF16}),
                         ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(F8, AttentionPages,
                         ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF8E4M3},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF8E4M3},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kF8E4M3},
                                           Case{66, 18, 1, 24, 40, 0, 7, Dtype::kF8E4M3},
                                           Case{80, 3, 1, 64, 64, 9, 1, Dtype::kF8E4M3}),
                         ::testing::PrintToStringParamName());

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPages,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16}, Case{70, 4, 2, 16, 16, 0, 64},
                      Case{70, 4, 2, 32, 16, 20, 16}, Case{80, 3, 1, 64, 64, 9, 1},
                      Case{45, 6, 2, 7, 5, 1, 5}, Case{66, 18, 1, 24, 40, 0, 7},
                      Case{40, 14, 2, 64, 64, 0, 128}, Case{40, 4, 2, 16, 16, 9, 256}),
    ::testing::PrintToStringParamName());

// Sinks within a page, a whole page, more than the window, more than the sequence, in pages of one
// token; those of the middle are given away while later tokens are computed.
INSTANTIATE_TEST_SUITE_P(Sinks, AttentionPages,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF32, 5},
                                           Case{70, 4, 2, 16, 16, 20, 16, Dtype::kF32, 16},
                                           Case{70, 4, 2, 16, 16, 9, 7, Dtype::kF32, 30},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kF32, 100},
                                           Case{80, 3, 1, 64, 64, 9, 1, Dtype::kF32, 1},
                                           Case{66, 18, 1, 24, 40, 8, 7, Dtype::kBF16, 3},
                                           Case{45, 6, 2, 7, 5, 4, 5, Dtype::kBF16, 5},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF8E4M3, 17}),
                         ::testing::PrintToStringParamName());

// A soft cap, and sinks that have a score and no value, alone and together.
INSTANTIATE_TEST_SUITE_P(
    Bends, AttentionPages,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF32, 0, 0.8F},
                      Case{45, 6, 2, 7, 5, 4, 5, Dtype::kBF16, 5, 2.0F},
                      Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF32, 0, 0.0F, true},
                      Case{45, 6, 2, 7, 5, 9, 5, Dtype::kF8E4M3, 3, 0.0F, true},
                      Case{66, 18, 1, 24, 40, 0, 7, Dtype::kBF16, 0, 1.5F, true}),
    ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Bends, AttentionPagesOnCuda,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, {}, 0, 0.8F},
                                           Case{45, 6, 2, 7, 5, 4, 5, {}, 5, 2.0F},
                                           Case{90, 8, 2, 64, 64, 0, 16, {}, 0, 0.0F, true},
                                           Case{45, 6, 2, 7, 5, 9, 5, {}, 3, 0.0F, true},
                                           Case{66, 16, 1, 128, 64, 20, 16, {}, 0, 0.0F, true},
                                           Case{70, 4, 1, 96, 96, 0, 16, {}, 0, 0.0F, true},
                                           Case{40, 2, 1, 256, 256, 0, 16, {}, 0, 1.5F, true}),
                         ::testing::PrintToStringParamName());

void expect_far_pieces_agree(const Case& c, Cached& cached, double tolerance) {
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, 1100}}), tolerance);
  ASSERT_LE(cached.run({{0, 1100, 300}}), tolerance);
  for (int64_t t = 1400; t < c.tokens; t += 20) {
    ASSERT_LE(cached.run({{0, t, 3}}), tolerance);
    ASSERT_LE(cached.run({{0, t + 3, 1}}), tolerance);
    ASSERT_LE(cached.run({{0, t + 4, 16}}), tolerance);
  }
}

TEST(AttentionPagesLong, DecodeAndPrefillFarIntoASequence) {
  // Many splits, a window that skips most of them, and sinks that are in some.
  for (const Dtype pages : {Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3}) {
    for (const auto& [window, sinks] : {std::pair{0, 0}, {700, 0}, {300, 10}, {60, 300}}) {
      const Case c = {1500, 3, 1, 16, 16, window, 64, pages, sinks};
      Cached cached(c, 1, 3);
      for_each_isa([&] { expect_far_pieces_agree(c, cached, kTolerance); });
    }
  }
}

TEST(AttentionPagesLong, SinkLogitsJoinManySplits) {
  const Case c = {1500, 3, 1, 16, 16, 0, 64, Dtype::kF32, 0, 1.5F, true};
  Cached cached(c, 1, 3);
  for_each_isa([&] { expect_far_pieces_agree(c, cached, kTolerance); });
  if (!on_cuda()) {
    return;
  }
  for (const float softcap : {0.0F, 1.5F}) {
    for (const int64_t dim : {16, 128}) {
      for_each_on_cuda({1500, 4, 1, dim, dim, 0, 64, {}, 0, softcap, true},
                       [](const Case& each, Dtype activations) {
                         Cached both(each, 1, 3, Device::kCuda, activations);
                         expect_far_pieces_agree(each, both, tolerance_of(activations));
                       });
    }
  }
}

TEST(AttentionPagesLong, OnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& [window, sinks] : {std::pair{0, 0}, {700, 0}, {60, 300}}) {
    for_each_on_cuda({1500, 3, 1, 16, 16, window, 64, {}, sinks},
                     [](const Case& c, Dtype activations) {
                       Cached cached(c, 1, 3, Device::kCuda, activations);
                       expect_far_pieces_agree(c, cached, tolerance_of(activations));
                     });
  }
}

// The dims of models, whose bf16 has kernels of its own.
TEST(AttentionPagesLong, WideHeadsOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& [window, sinks] : {std::pair{0, 0}, {300, 10}}) {
    for_each_on_cuda({1500, 2, 1, 128, 128, window, 16, {}, sinks},
                     [](const Case& c, Dtype activations) {
                       Cached cached(c, 1, 3, Device::kCuda, activations);
                       expect_far_pieces_agree(c, cached, tolerance_of(activations));
                     });
  }
}

/// Prefill, a longer prefill, an empty segment, then chunks beside single steps; returns the
/// results of the last call and those of its pieces by themselves.
std::pair<std::vector<double>, std::vector<double>> run_batch(Cached& cached, double tolerance) {
  cached.poison();
  EXPECT_LE(cached.run({{0, 0, 100}, {1, 0, 290}, {2, 0, 0}, {3, 0, 5}}), tolerance);
  EXPECT_LE(cached.run({{0, 100, 150}, {1, 290, 1}, {2, 0, 64}, {3, 5, 1}}), tolerance);
  const std::vector<Cached::Piece> step = {{0, 250, 1}, {1, 291, 1}, {2, 64, 30}, {3, 6, 2}};
  EXPECT_LE(cached.run(step), tolerance);
  const auto together = cached.last();
  std::vector<double> apart;
  for (const auto& piece : step) {
    EXPECT_LE(cached.run({piece}), tolerance);
    apart.insert(apart.end(), cached.last().begin(), cached.last().end());
  }
  EXPECT_LE(cached.run(step), tolerance);
  EXPECT_EQ(cached.last(), together) << "two runs differ";
  return {together, apart};
}

TEST(AttentionPagesBatch, SequencesAtDifferentPlacesTogetherAndApart) {
  for (const Case& c :
       {Case{300, 4, 2, 16, 16, 0, 16}, Case{300, 4, 2, 16, 16, 50, 16, Dtype::kF32, 20}}) {
    Cached cached(c, 4, 5);
    for_each_isa([&] {
      const auto [together, apart] = run_batch(cached, kTolerance);
      EXPECT_EQ(together, apart);
    });
  }
}

TEST(AttentionPagesBatch, OnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& shape :
       {Case{300, 4, 2, 16, 16, 0, 16}, Case{300, 4, 2, 64, 64, 0, 16},
        Case{300, 8, 1, 128, 128, 50, 64}, Case{300, 4, 2, 64, 64, 50, 16, {}, 20}}) {
    for_each_on_cuda(shape, [](const Case& c, Dtype activations) {
      Cached cached(c, 4, 5, Device::kCuda, activations);
      const auto [together, apart] = run_batch(cached, tolerance_of(activations));
      EXPECT_EQ(together, apart) << "keys are split by the segment alone";
    });
  }
}

// So many heads that a block takes several sequences, and some of the last one's keys.
TEST(AttentionPagesBatch, BlocksOfManySequencesOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const Dtype pages : {Dtype::kBF16, Dtype::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(pages));
    Cached cached({330, 150, 150, 16, 16, 0, 16, pages}, 3, 5, Device::kCuda, Dtype::kBF16);
    const double tolerance = tolerance_of(Dtype::kBF16);
    cached.poison();
    EXPECT_LE(cached.run({{0, 0, 329}, {1, 0, 317}, {2, 0, 200}}), tolerance);
    const std::vector<Cached::Piece> step = {{0, 329, 1}, {1, 317, 1}, {2, 200, 1}};
    EXPECT_LE(cached.run(step), tolerance);
    const auto first = cached.last();
    EXPECT_LE(cached.run(step), tolerance);
    EXPECT_EQ(cached.last(), first) << "two runs differ";
  }
}

// Single tokens far into sequences of many lengths, beside pieces of prompts: more keys than blocks
// would share evenly.
TEST(AttentionPagesBatch, InvariantOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& shape :
       {Case{1300, 16, 8, 64, 64, 0, 16}, Case{1300, 8, 8, 128, 128, 700, 64, {}, 10},
        Case{1300, 12, 4, 16, 16, 0, 16}, Case{1300, 12, 4, 16, 16, 100, 16, {}, 70}}) {
    SCOPED_TRACE(fmt::format("heads of {}", shape.dim));
    for_each_on_cuda(shape, [](const Case& c, Dtype activations) {
      constexpr int kSequences = 12;
      Cached cached(c, kSequences, 5, Device::kCuda, activations, true);
      cached.poison();
      std::vector<Cached::Piece> step;
      for (int s = 0; s < kSequences; ++s) {
        const int64_t first = s % 4 == 3 ? 3 * s : 1270 - 97 * s;
        cached.run({{s, 0, first}});
        step.push_back({s, first, s % 4 == 3 ? 5 + 20 * s : s % 5 == 1 ? 3 : 1});
      }
      cached.run(step);
      const auto together = cached.last();
      auto from = together.begin();
      for (const auto& piece : step) {
        cached.run({piece});
        const auto to = from + static_cast<ptrdiff_t>(cached.last().size());
        EXPECT_TRUE(std::equal(from, to, cached.last().begin())) << "sequence " << piece.s;
        from = to;
      }
      cached.run({step[8], step[3], step[0]});
      const auto few = cached.last();
      cached.run({step[0]});
      EXPECT_TRUE(std::equal(cached.last().rbegin(), cached.last().rend(), few.rbegin()));
    });
  }
}

TEST(AttentionPagesThreads, ResultsDoNotDependOnTheirNumber) {
  const Case c = {1300, 3, 1, 16, 16, 0, 32};
  Cached cached(c, 1, 9);
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, 1290}}), kTolerance);
  const int before = num_threads();
  for (const int64_t count : {1, 10}) {
    set_num_threads(1);
    cached.run({{0, 1290, count}});
    const auto one = cached.last();
    set_num_threads(4);
    cached.run({{0, 1290, count}});
    EXPECT_EQ(one, cached.last());
  }
  set_num_threads(before);
}

// What rounding costs. A key or value is off by at most 2^-9 of itself (half a unit in the last of
// 8 bits), so a score s = scale q.k by at most e = 2^-9 scale sum |q_i k_i|, a probability by a
// factor within exp(+-2e), and the output, a mean of values, by at most (exp(2e) - 1 + 2^-9)
// (largest |value|) + the error of fp32.
TEST(AttentionPagesRounding, StaysWithinItsBound) {
  const Case exact = {200, 4, 2, 16, 16, 0, 16};
  Case rounded = exact;
  rounded.pages = Dtype::kBF16;
  Cached wide(exact, 1, 11);
  Cached narrow(rounded, 1, 11);
  ASSERT_LE(wide.run({{0, 0, 200}}), kTolerance);
  ASSERT_LE(narrow.run({{0, 0, 200}}), kTolerance);
  const double unit = std::exp2(-9.0);
  const double e = unit * 0.5 * 16 * 2 * 2;  // scale 1/2, 16 products of numbers up to 2
  const double bound = std::expm1(2 * e) + unit + kTolerance;  // values up to 1
  double worst = 0.0;
  for (size_t i = 0; i < wide.last().size(); ++i) {
    worst = larger_error(worst, std::abs(wide.last()[i] - narrow.last()[i]));
  }
  EXPECT_LE(worst, bound);
  EXPECT_GT(worst, 0.0);
}

TEST(AttentionPagesErrors, NameTheSegmentAndThePage) {
  Arena arena;
  Tape tape(arena);
  const Tensor q = arena.empty(Dtype::kF32, {2, 2, 8});
  const Tensor k = arena.empty(Dtype::kF32, {2, 1, 8});
  const Tensor cache = arena.empty(Dtype::kF32, {3, 4, 1, 8});
  const std::vector<int32_t> start = {0, 2};
  const auto message = [&](Context ctx, const Tensor& query, const Tensor& keys,
                           const std::vector<int32_t>& table, int32_t at) {
    const std::vector<int32_t> position = {at};
    const KvPages pages = {keys, cache, table, 2};
    return testing::message_of([&] {
      attention(ctx, query, k, k, {start, position, {}}, {}, &pages);
    });
  };
  const Context plain{.arena = &arena};
  EXPECT_EQ(message(plain, q, cache, {2, 0}, 3), "no error");
  EXPECT_EQ(message(plain, q, cache, {2, 0}, 7),
            "[attention] segment 0 reaches position 8, its page table covers 0..7");
  EXPECT_EQ(message(plain, q, cache, {2, -1}, 3),
            "[attention] segment 0 needs page 1 of its table, which names -1 of 3 pages");
  EXPECT_EQ(message(plain, q, cache, {3, 1}, 3),
            "[attention] segment 0 needs page 0 of its table, which names 3 of 3 pages");
  EXPECT_EQ(message(plain, q, cache, {2}, 0),
            "[attention] expected a page table (1, 2), got 1 entries");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF8E4M3, {3, 4, 1, 8}), {2, 0}, 0),
            "[attention] expected scales bf16 (3, 4, 1) of cached keys in f8, got none");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF32, {3, 4, 2, 8}), {2, 0}, 0),
            "[attention] expected cached keys f32 (pages, page_size, 1, 8), got f32 (3, 4, 2, 8)");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF32, {3, 5, 1, 8}), {2, 0}, 0),
            "[attention] expected as many pages of keys as of values, got f32 (3, 5, 1, 8) and "
            "f32 (3, 4, 1, 8)");
  Tensor with_grad = q;
  with_grad.grad = arena.allocate(q.bytes());
  EXPECT_EQ(message({.arena = &arena, .tape = &tape}, with_grad, cache, {2, 0}, 0),
            "[attention] cached keys and values have no gradient; train without");
}

}  // namespace
}  // namespace cambium
