#include "eval/statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/random.h"

namespace cambium {
namespace {

double plain_mean(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) {
    sum += value;
  }
  return sum / static_cast<double>(values.size());
}

template <class Statistic>
Estimate bootstrap(std::span<const double> values, uint64_t seed, int resamples,
                   Statistic statistic) {
  CAMBIUM_CHECK(!values.empty() && resamples > 0, "{} values, {} resamples", values.size(),
                resamples);
  const auto n = static_cast<int64_t>(values.size());
  std::vector<double> found;
  std::vector<double> sample(values.size());
  for (int k = 0; k < resamples; ++k) {
    Rng rng(seed, static_cast<uint64_t>(k));
    for (double& value : sample) {
      value = values[static_cast<size_t>(rng.below(n))];
    }
    found.push_back(statistic(sample));
  }
  return {statistic(values), {quantile(found, 0.025), quantile(found, 0.975)}};
}

/// Wilson's score interval of a share p of n trials.
Estimate wilson(double p, double n, double z) {
  const double shrink = 1.0 + z * z / n;
  const double centre = (p + z * z / (2 * n)) / shrink;
  const double half = z / shrink * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return {p,
          {std::max(0.0, std::min(p, centre - half)), std::min(1.0, std::max(p, centre + half))}};
}

}  // namespace

Estimate proportion(int64_t successes, int64_t trials, double z) {
  CAMBIUM_CHECK(trials > 0 && successes >= 0 && successes <= trials, "{} of {}", successes, trials);
  const auto n = static_cast<double>(trials);
  return wilson(static_cast<double>(successes) / n, n, z);
}

Estimate mean(std::span<const double> values, double z) {
  const double half = z * deviation(values) / std::sqrt(static_cast<double>(values.size()));
  const double centre = plain_mean(values);
  return {centre, {centre - half, centre + half}};
}

Estimate bootstrap_mean(std::span<const double> values, uint64_t seed, int resamples) {
  return bootstrap(values, seed, resamples, plain_mean);
}

Estimate mean_share(std::span<const double> shares, uint64_t seed) {
  CAMBIUM_CHECK(!shares.empty());
  const auto [low, high] = std::minmax_element(shares.begin(), shares.end());
  // Shares that are sums of 1/n differ in their last places.
  return *high - *low > 1e-9
             ? bootstrap_mean(shares, seed)
             : wilson(std::clamp(*low, 0.0, 1.0), static_cast<double>(shares.size()), kZ95);
}

Estimate bootstrap_median(std::span<const double> values, uint64_t seed, int resamples) {
  return bootstrap(values, seed, resamples, median);
}

Estimate bootstrap_ratio(std::span<const double> values, std::span<const double> weights,
                         uint64_t seed, int resamples) {
  CAMBIUM_CHECK(values.size() == weights.size() && !values.empty() && resamples > 0);
  const auto n = static_cast<int64_t>(values.size());
  std::vector<double> found;
  for (int k = 0; k < resamples; ++k) {
    Rng rng(seed, static_cast<uint64_t>(k));
    double above = 0;
    double below = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto pick = static_cast<size_t>(rng.below(n));
      above += values[pick];
      below += weights[pick];
    }
    if (below > 0) {
      found.push_back(above / below);
    }
  }
  return {plain_mean(values) / plain_mean(weights),
          {quantile(found, 0.025), quantile(found, 0.975)}};
}

double deviation(std::span<const double> values) {
  CAMBIUM_CHECK(!values.empty());
  if (values.size() == 1) {
    return 0;
  }
  const double centre = plain_mean(values);
  double squares = 0;
  for (const double value : values) {
    squares += (value - centre) * (value - centre);
  }
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

double quantile(std::span<const double> values, double q) {
  CAMBIUM_CHECK(!values.empty() && q >= 0 && q <= 1, "quantile {} of {} values", q, values.size());
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace cambium
