#include "eval/score_report.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

namespace cambium {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

AccuracyResult graded(const std::vector<int>& right) {
  AccuracyResult result;
  for (const int one : right) {
    result.examples.emplace_back();
    result.examples.back().correct = one != 0;
    result.summary.correct += one;
  }
  result.summary.total = std::ssize(right);
  result.summary.accuracy = {0.5, 0.25, 0.75};
  return result;
}

TEST(ScoreReport, SaysWhatIsKnownAndNothingElse) {
  AccuracyResult result = graded({1, 0, 1, 0});
  const ScoreReport plain{"gsm8k", 4, &result};
  EXPECT_EQ(score_text(plain), "gsm8k: 2 of 4 right, 50.0 % [25.0, 75.0] (95 %)\n");
  EXPECT_FALSE(score_json(plain).contains("right_per_second"));
  result.samples = 2;
  result.unanswered = 1;
  result.measured = 4;
  result.tokens = 40;
  result.truncated = 1;
  const ScoreReport timed{"gsm8k", 2, &result, 4.0};
  EXPECT_THAT(score_text(timed),
              AllOf(HasSubstr("; 1 not answered: too long"),
                    HasSubstr("the mean of 2 answers to each of 2 problems"),
                    HasSubstr("1 cut off at the limit of tokens (25.0 %), 0 without an answer"),
                    HasSubstr("10.0 tokens an answer"), HasSubstr("0.50 right answers a second")));
  EXPECT_EQ(score_json(timed)["right_per_second"], 0.5);
  EXPECT_EQ(score_json(timed)["interval"],
            "bootstrap over problems (Wilson's where all are alike), 95 %");
}

// Rows of lengths, columns of depths; a single depth is the middle.
TEST(ScoreReport, HasACellForEachLengthAndDepth) {
  const AccuracyResult result = graded({1, 1, 1, 0, 0, 0, 1, 0});
  const ScoreReport report{"passkey", 8, &result, 0.0, "", LongGrid{{64, 128}, 2, 2}};
  const auto cells = score_json(report)["cells"];
  ASSERT_EQ(cells.size(), 4U);
  EXPECT_EQ(cells[1]["length"], 64);
  EXPECT_EQ(cells[1]["depth"], 1.0);
  EXPECT_EQ(cells[1]["correct"], 1);
  EXPECT_EQ(cells[3]["length"], 128);
  EXPECT_THAT(score_text(report), AllOf(HasSubstr("depth      0%    100%"),
                                        HasSubstr("100%     50%"), HasSubstr("  0%     50%")));
  EXPECT_EQ(depth_of(0, 1), 0.5);
  EXPECT_EQ(depth_of(1, 3), 0.5);
}

TEST(ScoreReport, OfOptionsHasRotationsWhereThereWereSome) {
  ChoiceSummary summary;
  summary.by_sum.accuracy = {0.5, 0.4, 0.6};
  EXPECT_THAT(choices_text(summary, 1, "arc", 9),
              AllOf(HasSubstr("arc: acc 50.0 % [40.0, 60.0]"), Not(HasSubstr("sticky"))));
  EXPECT_THAT(choices_text(summary, 4, "arc", 9), HasSubstr("in all 4 rotations"));
  EXPECT_FALSE(choices_json(summary, 1).contains("sticky"));
  EXPECT_TRUE(choices_json(summary, 4).contains("sticky"));
}

}  // namespace
}  // namespace cambium
