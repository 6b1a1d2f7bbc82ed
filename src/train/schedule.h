// The learning rate over a run: linear warm-up, then constant, linear or cosine decay.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>

#include "base/error.h"

namespace cambium {

enum class Decay { kConstant, kLinear, kCosine };

struct ScheduleConfig {
  double peak = 1e-3;
  int64_t warmup_steps = 0;
  Decay decay = Decay::kCosine;
  double final_ratio = 0.1;  // of the peak, at the last step
};

/// The rate of step `step` (0-based) of `steps`. The first step of a warm-up has peak / warmup.
inline double learning_rate(const ScheduleConfig& config, int64_t step, int64_t steps) {
  if (step < config.warmup_steps) {
    return config.peak * static_cast<double>(step + 1) / static_cast<double>(config.warmup_steps);
  }
  const auto span = static_cast<double>(steps - config.warmup_steps);
  const double t =
      span <= 1.0 ? 0.0 : static_cast<double>(step - config.warmup_steps) / (span - 1.0);
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

inline Decay parse_decay(const std::string& name) {
  if (name == "constant") return Decay::kConstant;
  if (name == "linear") return Decay::kLinear;
  if (name == "cosine") return Decay::kCosine;
  fail("decay '{}' is not known; expected constant, linear or cosine", name);
}

inline const char* decay_name(Decay decay) {
  return decay == Decay::kConstant ? "constant" : decay == Decay::kLinear ? "linear" : "cosine";
}

}  // namespace cambium
