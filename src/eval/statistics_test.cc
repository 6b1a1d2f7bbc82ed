#include "eval/statistics.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/random.h"

namespace cambium {
namespace {

TEST(Statistics, WilsonKnownIntervals) {
  struct Row {
    int64_t successes;
    int64_t trials;
    double low;
    double high;
  };
  // By the closed form, with z = 1.96 to four digits.
  const Row rows[] = {
      {0, 10, 0.0, 0.2775}, {10, 10, 0.7225, 1.0},       {5, 10, 0.2366, 0.7634},
      {1, 1, 0.2065, 1.0},  {950, 1000, 0.9347, 0.9619}, {81, 263, 0.2553, 0.3662},
  };
  for (const Row& row : rows) {
    const Estimate out = proportion(row.successes, row.trials);
    EXPECT_NEAR(out.interval.low, row.low, 1e-4) << row.successes << "/" << row.trials;
    EXPECT_NEAR(out.interval.high, row.high, 1e-4) << row.successes << "/" << row.trials;
    EXPECT_DOUBLE_EQ(out.value, static_cast<double>(row.successes) / row.trials);
  }
  EXPECT_DEATH(proportion(1, 0), "1 of 0");
  EXPECT_DEATH(proportion(3, 2), "3 of 2");
}

// Where every problem has the same share, resampling problems sees no doubt at all.
TEST(Statistics, SharesThatAreAllAlikeKeepAnInterval) {
  for (const auto& [share, successes] : {std::pair{0.0, 0}, {1.0, 10}, {0.5, 5}}) {
    const Estimate out = mean_share(std::vector<double>(10, share), 1);
    const Estimate trials = proportion(successes, 10);
    EXPECT_EQ(out.value, share);
    EXPECT_DOUBLE_EQ(out.interval.low, trials.interval.low);
    EXPECT_DOUBLE_EQ(out.interval.high, trials.interval.high);
  }
  const std::vector<double> mixed = {0.0, 0.5, 1.0, 1.0};
  EXPECT_EQ(mean_share(mixed, 1).interval.low, bootstrap_mean(mixed, 1).interval.low);
}

TEST(Statistics, MeanDeviationAndQuantiles) {
  const std::vector<double> values = {4, 1, 3, 2};
  EXPECT_DOUBLE_EQ(mean(values).value, 2.5);
  EXPECT_NEAR(deviation(values), 1.2910, 1e-4);
  EXPECT_NEAR(mean(values).interval.high - 2.5, 1.96 * 1.2910 / 2, 1e-3);
  EXPECT_DOUBLE_EQ(median(values), 2.5);
  EXPECT_DOUBLE_EQ(quantile(values, 0), 1);
  EXPECT_DOUBLE_EQ(quantile(values, 1), 4);
  EXPECT_DOUBLE_EQ(quantile(values, 0.25), 1.75);
  const std::vector<double> one = {7};
  EXPECT_DOUBLE_EQ(median(one), 7);
  EXPECT_DOUBLE_EQ(mean(one).interval.low, 7);
  EXPECT_DEATH(median({}), "0 values");
  EXPECT_DEATH(quantile(one, 2), "quantile 2");
}

TEST(Statistics, BootstrapAgreesWithTheNormalInterval) {
  std::vector<double> values;
  Rng rng(1, 0);
  for (int k = 0; k < 400; ++k) {
    values.push_back(rng.normal());
  }
  const Estimate plain = mean(values);
  const Estimate boot = bootstrap_mean(values, 3);
  EXPECT_DOUBLE_EQ(plain.value, boot.value);
  EXPECT_NEAR(plain.interval.low, boot.interval.low, 0.02);
  EXPECT_NEAR(plain.interval.high, boot.interval.high, 0.02);
  EXPECT_DOUBLE_EQ(bootstrap_mean(values, 3).interval.low, boot.interval.low);
  const Estimate middle = bootstrap_median(values, 3, 500);
  EXPECT_LE(middle.interval.low, middle.value);
  EXPECT_GE(middle.interval.high, middle.value);
}

}  // namespace
}  // namespace cambium
