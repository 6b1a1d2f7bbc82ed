#include "base/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cambium {
namespace {

// The known answers that the generator's authors publish.
TEST(Philox, KnownAnswers) {
  struct Row {
    std::array<uint32_t, 4> counter;
    std::array<uint32_t, 2> key;
    std::array<uint32_t, 4> want;
  };
  constexpr uint32_t kOnes = 0xFFFFFFFF;
  const Row rows[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{kOnes, kOnes, kOnes, kOnes},
       {kOnes, kOnes},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(philox(row.counter, row.key), row.want);
  }
}

TEST(Rng, SameNameSameStreamAndDifferentNameDifferentStream) {
  auto take = [](uint64_t seed, uint64_t stream) {
    Rng rng(seed, stream);
    std::vector<uint64_t> out(5);
    for (uint64_t& word : out) {
      word = rng.next();
    }
    return out;
  };
  EXPECT_EQ(take(7, 9), take(7, 9));
  EXPECT_NE(take(7, 9), take(7, 10));
  EXPECT_NE(take(7, 9), take(8, 9));
  EXPECT_NE(take(7, uint64_t{1} << 32), take(7, 0));
  EXPECT_NE(take(uint64_t{7} << 32, 0), take(7, 0));
  EXPECT_NE(mix_seed(1, 2), mix_seed(2, 1));
}

TEST(Rng, MomentsOfUniformAndNormal) {
  Rng rng(1, 2);
  const int n = 20000;
  double sum = 0;
  double normal_sum = 0;
  double normal_squares = 0;
  for (int i = 0; i < n; ++i) {
    const double u = rng.uniform();
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    const double x = rng.normal();
    normal_sum += x;
    normal_squares += x * x;
  }
  EXPECT_NEAR(sum / n, 0.5, 0.01);
  EXPECT_NEAR(normal_sum / n, 0.0, 0.03);
  EXPECT_NEAR(normal_squares / n, 1.0, 0.05);
}

TEST(Rng, BelowIsUniformAndBetweenIncludesBothEnds) {
  Rng rng(3, 0);
  std::vector<int> seen(7);
  for (int i = 0; i < 14000; ++i) {
    ++seen[static_cast<size_t>(rng.between(-3, 3) + 3)];
  }
  for (const int count : seen) {
    EXPECT_NEAR(count, 2000, 200);
  }
  EXPECT_EQ(rng.between(5, 5), 5);
  const int64_t huge = (int64_t{1} << 62) + 1;
  for (int i = 0; i < 100; ++i) {
    EXPECT_LT(rng.below(huge), huge);
  }
  EXPECT_DEATH(rng.below(0), "positive bound");
}

TEST(Rng, ShuffleKeepsTheItems) {
  std::vector<int> items(50);
  std::iota(items.begin(), items.end(), 0);
  const std::vector<int> before = items;
  Rng rng(4, 1);
  rng.shuffle(std::span(items));
  EXPECT_NE(items, before);
  EXPECT_TRUE(std::is_permutation(items.begin(), items.end(), before.begin()));
}

TEST(Permutation, IsOneForEverySize) {
  for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4097}) {
    const Permutation order(n, 11);
    std::vector<bool> hit(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = order(i);
      ASSERT_GE(j, 0);
      ASSERT_LT(j, n);
      EXPECT_FALSE(hit[static_cast<size_t>(j)]) << n;
      hit[static_cast<size_t>(j)] = true;
    }
  }
}

TEST(Permutation, SeedDecidesAndLargeSizesWork) {
  const int64_t n = 100000;
  const Permutation a(n, 1);
  const Permutation b(n, 2);
  int fixed = 0;
  int same = 0;
  for (int64_t i = 0; i < 1000; ++i) {
    fixed += a(i) == i ? 1 : 0;
    same += a(i) == b(i) ? 1 : 0;
  }
  EXPECT_LT(fixed, 5);
  EXPECT_LT(same, 5);
  const Permutation huge(int64_t{1} << 61, 3);
  EXPECT_NE(huge(0), huge(1));
  EXPECT_DEATH(a(n), "position");
}

}  // namespace
}  // namespace cambium
