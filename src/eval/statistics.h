// How sure a measured number is.
#pragma once

#include <cstdint>
#include <span>

namespace cambium {

struct Interval {
  double low = 0;
  double high = 0;
};

/// A measured value with its interval, 95 % unless z says otherwise.
struct Estimate {
  double value = 0;
  Interval interval;
};

inline constexpr double kZ95 = 1.959963984540054;

/// `successes` of `trials`, with the score interval of Wilson (1927): it stays inside 0..1 and is
/// sensible for few trials and for none or all successes. trials > 0.
Estimate proportion(int64_t successes, int64_t trials, double z = kZ95);

/// Mean with the normal interval from the sample's own deviation; one value has an interval of
/// width zero. Not empty.
Estimate mean(std::span<const double> values, double z = kZ95);

/// Mean with the percentile interval of the bootstrap (Efron 1979): for few or skewed values.
/// Deterministic by seed. Not empty.
Estimate bootstrap_mean(std::span<const double> values, uint64_t seed, int resamples = 2000);

/// Sum of the values over the sum of the weights, with the bootstrap's interval over their pairs: a
/// loss a token over documents of different lengths. As many weights as values, some above 0.
Estimate bootstrap_ratio(std::span<const double> values, std::span<const double> weights,
                         uint64_t seed, int resamples = 2000);

/// Sample standard deviation (n-1); 0 for one value. Not empty.
double deviation(std::span<const double> values);

/// The value below which the fraction q (0..1) of the values lies, interpolated. Not empty.
double quantile(std::span<const double> values, double q);
inline double median(std::span<const double> values) {
  return quantile(values, 0.5);
}

/// Mean of shares (0..1), one of each problem's answers, with the bootstrap's interval over
/// problems; where all are alike, which leaves nothing to resample, with Wilson's of as many
/// trials. Not empty.
Estimate mean_share(std::span<const double> shares, uint64_t seed);

/// Median with the percentile interval of the bootstrap: for timings, where a few are far off.
Estimate bootstrap_median(std::span<const double> values, uint64_t seed, int resamples = 2000);

}  // namespace cambium
