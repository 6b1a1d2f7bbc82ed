// The learning rate over a run: linear warm-up, then constant, linear or cosine decay.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <utility>

#include "base/error.h"

namespace cambium {

enum class Decay { kConstant, kLinear, kCosine };
inline constexpr std::pair<const char*, Decay> kDecays[] = {
    {"constant", Decay::kConstant}, {"linear", Decay::kLinear}, {"cosine", Decay::kCosine}};

struct ScheduleConfig {
  double peak = 1e-3;
  int64_t warmup_steps = 0;
  Decay decay = Decay::kCosine;
  double final_ratio = 0.1;  // of the peak, at the last step
};

/// The rate of step `step` (0-based) of `steps`. The first step of a warm-up has peak / warmup. A
/// run of so many tokens counts steps by them, so neither need be whole, and the last step may lie
/// a little beyond the end.
inline double learning_rate(const ScheduleConfig& config, double step, double steps) {
  const auto warmup = static_cast<double>(config.warmup_steps);
  if (step < warmup) {
    return config.peak * (step + 1.0) / warmup;
  }
  const double span = steps - warmup;
  const double t = span <= 1.0 ? 0.0 : std::min(1.0, (step - warmup) / (span - 1.0));
  const double floor = config.final_ratio;
  switch (config.decay) {
    case Decay::kLinear:
      return config.peak * (1.0 - (1.0 - floor) * t);
    case Decay::kCosine:
      return config.peak * (floor + (1.0 - floor) * 0.5 * (1.0 + std::cos(std::numbers::pi * t)));
    case Decay::kConstant:
      break;
  }
  return config.peak;
}

inline const char* decay_name(Decay decay) {
  return kDecays[static_cast<size_t>(decay)].first;
}

inline Decay parse_decay(const std::string& name) {
  for (const auto& [known, decay] : kDecays) {
    if (name == known) {
      return decay;
    }
  }
  fail("decay '{}' is not known; expected constant, linear or cosine", name);
}

}  // namespace cambium
