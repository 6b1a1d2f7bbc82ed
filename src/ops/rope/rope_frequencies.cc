#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/rope/rope.h"

namespace cambium {
namespace {

/// Waves that fit less than low_freq_factor times into the original length are stretched by
/// `factor`, those that fit more than high_freq_factor times are left.
double llama3(const RopeConfig& c, double f) {
  const double turns = static_cast<double>(c.original_length) * f / (2 * std::numbers::pi);
  const double keep =
      std::clamp((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0.0, 1.0);
  return (1 - keep) * f / c.factor + keep * f;
}

/// The dim (a real number) whose pair turns `turns` times in the original length.
double yarn_dim(const RopeConfig& c, double turns) {
  const double length = static_cast<double>(c.original_length);
  return static_cast<double>(c.dim) * std::log(length / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(c.theta));
}

double yarn(const RopeConfig& c, double f, size_t i) {
  double low = yarn_dim(c, c.beta_fast);
  double high = yarn_dim(c, c.beta_slow);
  if (c.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(c.dim - 1));
  high += low == high ? 0.001 : 0.0;
  const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return f * (1 - ramp) + f / c.factor * ramp;
}

/// theta grown so that the slowest pair covers a sequence of `length` tokens.
double dynamic_theta(const RopeConfig& c, int64_t length) {
  if (length <= c.original_length) {
    return c.theta;
  }
  const double dim = static_cast<double>(c.dim);
  const double ratio = static_cast<double>(length) / static_cast<double>(c.original_length);
  return c.theta * std::pow(c.factor * ratio - (c.factor - 1), dim / (dim - 2));
}

}  // namespace

std::vector<float> rope_frequencies(const RopeConfig& config, int64_t length) {
  const double theta =
      config.scaling == RopeScaling::kDynamic ? dynamic_theta(config, length) : config.theta;
  std::vector<float> result(static_cast<size_t>(config.dim / 2));
  for (size_t i = 0; i < result.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config.dim);
    double f = static_cast<float>(1.0 / std::pow(theta, exponent));
    switch (config.scaling) {
      case RopeScaling::kNone:
      case RopeScaling::kDynamic:
        break;
      case RopeScaling::kLinear:
        f /= config.factor;
        break;
      case RopeScaling::kLlama3:
        f = llama3(config, f);
        break;
      case RopeScaling::kYarn:
        f = yarn(config, f, i);
        break;
      case RopeScaling::kLongRope:
        f /= (length > config.original_length ? config.long_factors : config.short_factors)[i];
        break;
    }
    result[i] = static_cast<float>(f);
  }
  return result;
}

}  // namespace cambium
