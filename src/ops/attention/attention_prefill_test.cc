// Pieces of prompts over cached keys and values as cuDNN serves them, beside our own kernels.
#if CAMBIUM_CUDA
#include "ops/attention/attention_cudnn_testing.h"
#include "ops/attention/attention_pages_testing.h"

namespace cambium {
namespace {

using namespace testing::pages;  // NOLINT(google-build-using-namespace)
using cuda::attention::allow_cudnn;
using cuda::attention::cudnn_calls;
using cuda::attention::cudnn_status;
using cuda::attention::limit_gathered;

/// A cache for activations in bf16, everything in it poisoned.
class PrefillCache : public Cached {
 public:
  PrefillCache(const Case& c, int sequences, Dtype pages = Dtype::kBF16)
      : Cached(with_pages(c, pages), sequences, 13, Device::kCuda, Dtype::kBF16) {
    poison_scratch(int64_t{80} << 20);
    poison();
  }

 private:
  static Case with_pages(Case c, Dtype pages) {
    c.pages = pages;
    return c;
  }
};

/// Pieces of prompts that cuDNN serves where there is one, and our own kernels elsewhere.
class AttentionPrefill : public testing::WithCudnn {
 protected:
  /// Runs the pieces, in so many calls of cuDNN.
  void expect_right(Cached& cached, const std::vector<Cached::Piece>& pieces, int64_t calls) {
    const int64_t before = cudnn_calls();
    const double error = cached.run(pieces);
    EXPECT_LE(error, kNarrowTolerance);
    EXPECT_EQ(cudnn_calls() - before, served_ ? calls : 0) << cudnn_status();
  }
};

class AttentionPrefillShapes : public AttentionPrefill, public ::testing::WithParamInterface<Case> {
 protected:
  void expect_splits_right(const Case& c, Dtype pages) {
    PrefillCache cached(c, 1, pages);
    expect_right(cached, {{0, 0, c.tokens}}, 1);
    // Cuts on and beside the ends of pages and of tiles, and of what is served.
    for (const int64_t cut : {1, 128, 255, 256, 257, 300, 512, 513, 640, 721}) {
      SCOPED_TRACE(cut);
      for (const bool allowed : {true, false}) {
        allow_cudnn(allowed);
        cached.poison();
        expect_right(cached, {{0, 0, cut}}, allowed && cut >= 256 ? 1 : 0);
        expect_right(cached, {{0, cut, c.tokens - cut}}, allowed && c.tokens - cut >= 256 ? 1 : 0);
      }
      allow_cudnn(true);
    }
    for (const int64_t step : {256, 300}) {
      SCOPED_TRACE(step);
      cached.poison();
      for (int64_t t = 0; t < c.tokens; t += step) {
        const int64_t count = std::min(step, c.tokens - t);
        expect_right(cached, {{0, t, count}}, count >= 256 ? 1 : 0);
        const auto once = cached.last();
        expect_right(cached, {{0, t, count}}, count >= 256 ? 1 : 0);
        EXPECT_EQ(cached.last(), once) << "two runs differ";
      }
    }
  }
};

TEST_P(AttentionPrefillShapes, EverySplitEqualsOnePass) {
  for (const Dtype pages : {Dtype::kBF16, Dtype::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(pages));
    expect_splits_right(GetParam(), pages);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPrefillShapes,
    ::testing::Values(Case{1000, 4, 1, 64, 64, 0, 16}, Case{976, 4, 1, 128, 128, 0, 64},
                      Case{1000, 4, 1, 128, 128, 300, 16}, Case{900, 2, 2, 64, 64, 33, 5},
                      Case{1000, 4, 2, 64, 64, 1, 16}, Case{900, 4, 2, 128, 64, 700, 16},
                      Case{900, 2, 1, 96, 96, 0, 7}, Case{900, 2, 1, 256, 256, 0, 16}),
    ::testing::PrintToStringParamName());

TEST_F(AttentionPrefill, BesideTokensOfOtherSequences) {
  for (const auto& c : {Case{900, 8, 2, 64, 64, 0, 16}, Case{900, 4, 1, 128, 128, 350, 16}}) {
    SCOPED_TRACE(::testing::PrintToString(c));
    PrefillCache cached(c, 6);
    // Pieces that begin their sequences go together, as do those that do not.
    expect_right(cached, {{0, 0, 600}, {1, 0, 300}, {2, 0, 64}, {3, 0, 5}, {4, 0, 0}}, 1);
    expect_right(cached,
                 {{1, 300, 1}, {0, 600, 256}, {3, 5, 1}, {4, 0, 512}, {2, 64, 500}, {5, 0, 16}}, 2);
    const std::vector<Cached::Piece> step = {{4, 512, 300}, {1, 301, 1},  {2, 564, 30},
                                             {5, 16, 700},  {0, 856, 44}, {3, 6, 270}};
    expect_right(cached, step, 1);
    const auto together = cached.last();
    expect_right(cached, step, 1);
    EXPECT_EQ(cached.last(), together) << "two runs differ";
    expect_right(cached, {{1, 302, 1}, {4, 812, 1}, {3, 276, 2}}, 0);
  }
}

TEST_F(AttentionPrefill, WhatIsNotServedIsOurs) {
  for (const auto& c : {Case{600, 4, 2, 32, 32, 0, 16}, Case{600, 2, 1, 72, 72, 0, 16}}) {
    SCOPED_TRACE(::testing::PrintToString(c));
    PrefillCache cached(c, 1);
    expect_right(cached, {{0, 0, 300}}, 0);
    expect_right(cached, {{0, 300, 300}}, 0);
  }
}

// It has no sinks: it serves the pieces whose tokens all have them in their window.
TEST_F(AttentionPrefill, PiecesBeyondTheWindowOfSinksAreOurs) {
  PrefillCache cached({900, 4, 2, 64, 64, 400, 16, {}, 9}, 1);
  expect_right(cached, {{0, 0, 400}}, 1);
  expect_right(cached, {{0, 400, 500}}, 0);
  cached.poison();
  expect_right(cached, {{0, 0, 401}}, 0);
}

TEST_F(AttentionPrefill, GathersNoMoreThanItsLimitAtATime) {
  const Case c = {900, 8, 4, 64, 64, 0, 16};
  PrefillCache cached(c, 3);
  expect_right(cached, {{0, 0, 500}, {1, 0, 500}, {2, 0, 500}}, 1);
  // 900 keys take 1,024 rows of 64 + 64 numbers a head.
  constexpr int64_t kHead = int64_t{1024} * 128 * 2;
  const std::vector<Cached::Piece> pieces = {{0, 500, 400}, {1, 500, 400}, {2, 500, 400}};
  for (const auto& [heads, calls] : std::vector<std::pair<int64_t, int64_t>>{
           {12, 1}, {11, 2}, {8, 2}, {4, 3}, {3, 6}, {2, 6}, {1, 12}}) {
    SCOPED_TRACE(heads);
    limit_gathered(heads * kHead);
    expect_right(cached, pieces, calls);
  }
  limit_gathered(kHead - 1);
  expect_right(cached, pieces, 0);
}

}  // namespace
}  // namespace cambium
#endif
