#include "train/step_judge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace cambium {
namespace {

using ::testing::HasSubstr;

StepJudge fed(std::initializer_list<std::pair<int, double>> losses) {
  StepJudge judge({.factor = 0.0, .window = 20});
  for (const auto& [times, loss] : losses) {
    for (int i = 0; i < times; ++i) {
      EXPECT_EQ(judge.diverged(loss), "");
    }
  }
  return judge;
}

TEST(StepJudge, SaysWhenTheLossHasRisenAboveTheFirst) {
  EXPECT_EQ(fed({{5, 0.05}, {15, 0.08}}).risen(),
            "the loss of the last 20 steps, 0.08, is 1.6 times that of the first 5, 0.05");
  EXPECT_EQ(fed({{5, 0.05}, {40, 0.06}}).risen(), "");             // as other documents may have it
  EXPECT_EQ(fed({{5, 0.05}, {20, 0.2}, {20, 0.04}}).risen(), "");  // it came back
  EXPECT_EQ(fed({{4, 0.04}, {1, 0.09}, {20, 0.08}}).risen(), "");  // no more than documents differ
  EXPECT_NE(fed({{4, 0.04}, {1, 0.07}, {20, 0.08}}).risen(), "");
  EXPECT_EQ(fed({{4, 0.05}}).risen(), "");  // not known yet
}

TEST(StepJudge, HasAWindowOfTenAtLeast) {
  StepJudge judge({.factor = 3.0, .window = 3, .patience = 1});
  for (const double loss : {0.1, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.4}) {
    EXPECT_EQ(judge.diverged(loss), "");  // more than three times the usual, which is not known yet
    EXPECT_EQ(judge.risen(), "");
  }
  EXPECT_EQ(judge.diverged(0.4), "");
  EXPECT_THAT(judge.risen(), HasSubstr("the last 10 steps"));
  EXPECT_EQ(judge.window(), 10);
  EXPECT_NE(judge.diverged(1.3), "");
}

TEST(StepJudge, GoesOnFromItsState) {
  StepJudge judge({.factor = 3.0, .window = 20});
  judge.set_state(fed({{5, 0.05}}).state());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(judge.diverged(0.1), "");
  }
  EXPECT_THAT(judge.risen(), HasSubstr("first 5, 0.05"));
}

}  // namespace
}  // namespace cambium
