#include "hybrid/surrogate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "hybrid/placement_optimum.h"

namespace cambium {
namespace {

Energy random_energy(const SurrogateShape& shape, uint64_t seed, double pair) {
  Energy e(shape);
  Rng rng(seed, 0);
  e.constant = static_cast<double>(rng.normal());
  for (int64_t l = 0; l < shape.layers; ++l) {
    for (int m = 1; m < shape.kinds; ++m) {
      e.h(l, m) = static_cast<double>(rng.normal());
      for (int64_t r = 1; r <= std::min(shape.reach, l); ++r) {
        for (int b = 1; b < shape.kinds; ++b) {
          e.j(r, l - r, b, m) = pair * static_cast<double>(rng.normal());
        }
      }
    }
  }
  return e;
}

Choices random_choices(const SurrogateShape& shape, Rng& rng) {
  Choices c;
  for (int64_t l = 0; l < shape.layers; ++l) {
    c.push_back(static_cast<int>(rng.below(shape.kinds)));
  }
  return c;
}

std::vector<Choices> every_placement(const SurrogateShape& shape) {
  std::vector<Choices> all = {Choices(static_cast<size_t>(shape.layers), 0)};
  for (size_t l = 0; l < static_cast<size_t>(shape.layers); ++l) {
    const size_t n = all.size();
    for (int m = 1; m < shape.kinds; ++m) {
      for (size_t i = 0; i < n; ++i) {
        Choices c = all[i];
        c[l] = m;
        all.push_back(std::move(c));
      }
    }
  }
  return all;
}

TEST(Cholesky, SolvesAndTellsWhatIsNotPositiveDefinite) {
  const Cholesky a({4, 0, 0, 2, 5, 0, 1, 3, 6}, 3);
  ASSERT_TRUE(a.ok());
  const std::vector<double> x = a.solve({9, 21, 25});
  EXPECT_NEAR(4 * x[0] + 2 * x[1] + x[2], 9, 1e-12);
  EXPECT_NEAR(2 * x[0] + 5 * x[1] + 3 * x[2], 21, 1e-12);
  EXPECT_NEAR(x[0] + 3 * x[1] + 6 * x[2], 25, 1e-12);
  EXPECT_NEAR(a.log_determinant(), std::log(4 * (30 - 9) - 2 * (12 - 3) + (6 - 5)), 1e-12);
  EXPECT_FALSE(Cholesky({1, 0, 2, 1}, 2).ok());
  EXPECT_FALSE(Cholesky({1, 0, 1, 1}, 2).ok()) << "of rank 1";
  const double rows[] = {1, 0, 1, 1, 1, 2, 1, 3};
  const double values[] = {1, 3, 5, 7};
  const std::vector<double> line = least_squares(rows, values, 2);
  EXPECT_NEAR(line[0], 1, 1e-12);
  EXPECT_NEAR(line[1], 2, 1e-12);
}

TEST(Surrogate, FindsPlantedCoefficientsWithinItsOwnDeviations) {
  const SurrogateShape shape{6, 3, 2};
  const Energy planted = random_energy(shape, 5, 0.3);
  Rng rng(5, 0);
  std::vector<Choices> placements;
  std::vector<double> values;
  for (int i = 0; i < 150; ++i) {
    placements.push_back(random_choices(shape, rng));
    values.push_back(planted.of(placements.back()) + 0.05 * static_cast<double>(rng.normal()));
  }
  const Surrogate fit(shape, placements, values);
  EXPECT_FALSE(fit.scale().log) << "some values are negative";
  EXPECT_LT(fit.strengths().pair, 1.0);
  const Energy mean = fit.mean();
  const Energy deviation = fit.deviations();
  int within = 0;
  int count = 0;
  const auto check = [&](double found, double sd, double truth) {
    EXPECT_NEAR(found, truth, 0.35);
    EXPECT_GT(sd, 0.0);
    within += std::abs(found - truth) < 2 * sd ? 1 : 0;
    ++count;
  };
  for (int64_t l = 0; l < shape.layers; ++l) {
    for (int m = 1; m < shape.kinds; ++m) {
      check(mean.h(l, m), deviation.h(l, m), planted.h(l, m));
      for (int64_t r = 1; r <= std::min(shape.reach, l); ++r) {
        for (int b = 1; b < shape.kinds; ++b) {
          check(mean.j(r, l - r, b, m), deviation.j(r, l - r, b, m), planted.j(r, l - r, b, m));
        }
      }
    }
  }
  EXPECT_EQ(count, shape.features());
  EXPECT_GE(within, count * 8 / 10) << "of " << count;
  // The coefficients and the kernel are one model.
  for (int i = 0; i < 20; ++i) {
    const Choices c = random_choices(shape, rng);
    EXPECT_NEAR(mean.of(c), fit.predict(c).mean, 1e-8);
    EXPECT_NEAR(fit.predict(c).mean, planted.of(c), 0.2);
  }
  EXPECT_GT(fit.left_out_rank(1.0), 0.95);
}

TEST(Surrogate, DrawsHaveThePosteriorsMeanAndDeviation) {
  const SurrogateShape shape{5, 2, 1};
  const Energy planted = random_energy(shape, 4, 0.3);
  Rng rng(6, 0);
  std::vector<Choices> placements;
  std::vector<double> values;
  for (int i = 0; i < 9; ++i) {
    placements.push_back(random_choices(shape, rng));
    values.push_back(planted.of(placements.back()));
  }
  const Surrogate fit(shape, placements, values);
  const Choices asked = {1, 1, 0, 1, 1};
  const Prediction p = fit.predict(asked);
  double sum = 0;
  double squares = 0;
  const int n = 4000;
  for (int i = 0; i < n; ++i) {
    const double e = fit.draw(rng).of(asked);
    sum += e;
    squares += (e - p.mean) * (e - p.mean);
  }
  EXPECT_NEAR(sum / n, p.mean, 4 * p.deviation / std::sqrt(n));
  EXPECT_NEAR(std::sqrt(squares / n), p.deviation, 0.1 * p.deviation);
}

TEST(Surrogate, TakesTheLogarithmWhereDamageMultiplies) {
  const SurrogateShape shape{8, 2, 1};
  const Energy planted = random_energy(shape, 7, 0.0);
  Rng rng(8, 0);
  std::vector<Choices> placements;
  std::vector<double> values;
  for (int i = 0; i < 60; ++i) {
    placements.push_back(random_choices(shape, rng));
    values.push_back(std::exp(2 * planted.of(placements.back())));
  }
  const Surrogate fit(shape, placements, values);
  EXPECT_TRUE(fit.scale().log);
  const ValueScale scale = fit.scale();
  EXPECT_NEAR(scale.from(scale.to(0.3)), 0.3, 1e-12);
}

TEST(Surrogate, RankCorrelationSharesTheRanksOfEqualValues) {
  EXPECT_NEAR(rank_correlation({1, 2, 3, 4}, {10, 20, 30, 40}), 1.0, 1e-12);
  EXPECT_NEAR(rank_correlation({1, 2, 3, 4}, {4, 3, 2, 1}), -1.0, 1e-12);
  EXPECT_NEAR(rank_correlation({1, 1, 2, 2}, {1, 1, 2, 2}), 1.0, 1e-12);
  EXPECT_TRUE(std::isnan(rank_correlation({1}, {1})));
  EXPECT_TRUE(std::isnan(rank_correlation({2, 2, 2}, {1, 2, 3})));
}

TEST(PlacementOptimum, IsThatOfTryingEveryPlacement) {
  const struct {
    SurrogateShape shape;
    bool by_layer;  // costs differ from layer to layer
    std::vector<int64_t> at_least, at_most, none_or_at_least = {};
  } rows[] = {
      {{7, 2, 1}, false, {0, 0}, {7, 7}},
      {{6, 3, 1}, true, {0, 0, 0}, {6, 6, 6}},
      {{6, 3, 2}, true, {0, 0, 0}, {6, 6, 6}},
      {{6, 3, 0}, false, {0, 0, 0}, {6, 6, 6}},
      {{6, 3, 1}, false, {1, 2, 0}, {6, 6, 2}},
      {{7, 2, 3}, true, {0, 3}, {2, 7}},
      {{6, 3, 1}, true, {0, 0, 6}, {6, 6, 6}},
      {{1, 2, 1}, false, {0, 0}, {1, 1}},
      {{5, 4, 4}, true, {0, 1, 0, 0}, {1, 5, 5, 1}},
      {{6, 3, 1}, true, {0, 0, 0}, {6, 6, 6}, {1, 2, 3}},
      {{6, 3, 1}, false, {0, 1, 0}, {6, 1, 2}, {2, 1, 3}},
      {{5, 3, 2}, true, {0, 0, 0}, {5, 5, 5}, {4, 2, 2}},
  };
  for (const auto& row : rows) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      const Energy energy = random_energy(row.shape, seed, 0.5);
      Rng rng(seed, 9);
      PlacementLimits limits{{}, 0.0, row.at_least, row.at_most, row.none_or_at_least};
      std::vector<double> kind_cost;
      for (int64_t m = 0; m < row.shape.kinds; ++m) {
        kind_cost.push_back(0.5 + rng.uniform());
      }
      for (int64_t l = 0; l < row.shape.layers; ++l) {
        limits.cost.push_back(kind_cost);
        for (double& cost : limits.cost.back()) {
          cost *= row.by_layer ? 0.5 + rng.uniform() : 1.0;
        }
      }
      if (row.by_layer) {
        limits.cost[0][1] = INFINITY;
      }
      for (const double share : {0.6, 0.8, 1.0, 1.3, 9.0}) {
        limits.budget = share * static_cast<double>(row.shape.layers);
        double least = INFINITY;
        for (const Choices& c : every_placement(row.shape)) {
          least = limits.allow(c) ? std::min(least, energy.of(c)) : least;
        }
        const auto found = best_placement(energy, limits);
        ASSERT_EQ(found.has_value(), std::isfinite(least)) << seed << " " << share;
        if (found) {
          EXPECT_TRUE(limits.allow(*found));
          EXPECT_NEAR(energy.of(*found), least, 1e-9) << seed << " " << share;
        }
      }
    }
  }
}

TEST(PlacementOptimum, TheFrontIsBeatenByNoPlacement) {
  const SurrogateShape shape{6, 3, 1};
  const Energy energy = random_energy(shape, 2, 0.5);
  PlacementLimits limits{{}, 9.0, {0, 0, 0}, {6, 6, 6}};
  limits.cost.assign(6, {1.5, 0.25, 1.0});
  const std::vector<Optimum> front = placement_front(energy, limits);
  ASSERT_FALSE(front.empty());
  for (size_t i = 0; i < front.size(); ++i) {
    EXPECT_NEAR(front[i].value, energy.of(front[i].choices), 1e-12);
    EXPECT_NEAR(front[i].cost, limits.cost_of(front[i].choices), 1e-12);
    EXPECT_TRUE(i == 0 ||
                (front[i].cost > front[i - 1].cost && front[i].value < front[i - 1].value));
  }
  for (const Choices& c : every_placement(shape)) {
    double least = INFINITY;
    for (const Optimum& o : front) {
      least = o.cost <= limits.cost_of(c) + 1e-9 ? std::min(least, o.value) : least;
    }
    EXPECT_LE(least, energy.of(c) + 1e-9);
  }
}

// Costs as sums of tenths, whose rounding must not push what meets the budget exactly out of it.
TEST(PlacementOptimum, ABudgetThatIsMetExactlyIsMet) {
  Energy energy({10, 2, 1});
  for (int64_t l = 0; l < 10; ++l) {
    energy.h(l, 1) = 1.0;
  }
  PlacementLimits limits{{}, 0.3 * 5 + 0.1 * 5, {0, 0}, {10, 10}};
  limits.cost.assign(10, {0.3, 0.1});
  const auto found = best_placement(energy, limits);
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(std::count(found->begin(), found->end(), 0), 5);
}

}  // namespace
}  // namespace cambium
