#include "train/schedule.h"
#include "base/testing.h"

#include <gtest/gtest.h>

#include <numbers>

namespace cambium {
namespace {

struct Row {
  const char* name;
  ScheduleConfig config;
  int64_t step, steps;
  double expected;
};

TEST(Schedule, IsWhatTheConfigurationSays) {
  const double eighth = std::cos(std::numbers::pi / 4);
  const Row rows[] = {
      // Four steps of warm-up: the first is not zero and the last reaches the peak.
      {"first of a warm-up", {.peak = 2.0, .warmup_steps = 4}, 0, 13, 0.5},
      {"inside a warm-up", {.peak = 2.0, .warmup_steps = 4}, 2, 13, 1.5},
      {"last of a warm-up", {.peak = 2.0, .warmup_steps = 4}, 3, 13, 2.0},
      {"first after a warm-up", {.peak = 2.0, .warmup_steps = 4}, 4, 13, 2.0},
      {"first without a warm-up", {.peak = 2.0}, 0, 13, 2.0},
      // Nine steps of decay have eight intervals.
      {"linear, a quarter", {2.0, 4, Decay::kLinear, 0.2}, 6, 13, 1.6},
      {"linear, half", {2.0, 4, Decay::kLinear, 0.2}, 8, 13, 1.2},
      {"linear, last", {2.0, 4, Decay::kLinear, 0.2}, 12, 13, 0.4},
      {"linear to zero, last", {2.0, 0, Decay::kLinear, 0.0}, 9, 10, 0.0},
      {"cosine, a quarter", {2.0, 4, Decay::kCosine, 0.2}, 6, 13, 0.4 + 0.8 * (1.0 + eighth)},
      {"cosine, half", {2.0, 4, Decay::kCosine, 0.2}, 8, 13, 1.2},
      {"cosine, three quarters", {2.0, 4, Decay::kCosine, 0.2}, 10, 13, 0.4 + 0.8 * (1.0 - eighth)},
      {"cosine, last", {2.0, 4, Decay::kCosine, 0.2}, 12, 13, 0.4},
      {"constant, last", {2.0, 4, Decay::kConstant, 0.2}, 12, 13, 2.0},
      {"ratio above one", {2.0, 0, Decay::kLinear, 1.5}, 9, 10, 3.0},
      // Nothing to decay over.
      {"the only step", {.peak = 2.0}, 0, 1, 2.0},
      {"one step after a warm-up", {.peak = 2.0, .warmup_steps = 4}, 4, 5, 2.0},
      {"a warm-up longer than the run", {.peak = 2.0, .warmup_steps = 8}, 3, 4, 1.0},
  };
  for (const Row& row : rows) {
    EXPECT_NEAR(learning_rate(row.config, row.step, row.steps), row.expected, 1e-12) << row.name;
  }
}

TEST(Schedule, NeverRisesAfterTheWarmUp) {
  for (const Decay decay : {Decay::kConstant, Decay::kLinear, Decay::kCosine}) {
    const ScheduleConfig config{.warmup_steps = 10, .decay = decay};
    for (int64_t step = 1; step < 100; ++step) {
      const double before = learning_rate(config, step - 1, 100);
      const double now = learning_rate(config, step, 100);
      if (step < 10) {
        EXPECT_GT(now, before) << decay_name(decay) << " at step " << step;
      } else {
        EXPECT_LE(now, before) << decay_name(decay) << " at step " << step;
      }
    }
  }
}

TEST(Schedule, DecaysHaveNames) {
  for (const Decay decay : {Decay::kConstant, Decay::kLinear, Decay::kCosine}) {
    EXPECT_EQ(parse_decay(decay_name(decay)), decay);
  }
  const std::string message = testing::error_of([&] { parse_decay("exponential"); });
  EXPECT_EQ(message, "decay 'exponential' is not known; expected constant, linear or cosine");
}

}  // namespace
}  // namespace cambium
