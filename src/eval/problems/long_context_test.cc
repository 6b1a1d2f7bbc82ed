#include <algorithm>

#include "eval/problems/long_context.h"

#include <gmock/gmock.h>

#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;
using testing::message_of;

// A word is a token.
int64_t words(const std::string& text) {
  return std::count(text.begin(), text.end(), ' ') + 1;
}

TEST(LongContext, FillsTheLengthAndPlacesTheFactAtItsDepth) {
  for (const LongTask task : {LongTask::kPasskey, LongTask::kKeyValue, LongTask::kVariables}) {
    for (const int64_t length : {200, 5000}) {
      for (const double depth : {0.0, 0.5, 1.0}) {
        const LongSpec spec{task, length, depth};
        const Example example = long_example(spec, 1, 3, words);
        EXPECT_LE(words(example.question), length);
        EXPECT_GT(words(example.question), length - 40) << static_cast<int>(task);
        EXPECT_EQ(example.question, long_example(spec, 1, 3, words).question);
        EXPECT_NE(example.question, long_example(spec, 2, 3, words).question);
        EXPECT_EQ(example.answer, long_example({task, length, 0.25}, 1, 3, words).answer);
        const std::string first = example.answer.substr(0, example.answer.find(' '));
        const size_t at = example.question.find(first);
        ASSERT_NE(at, std::string::npos);
        if (length == 5000) {
          const double place =
              static_cast<double>(at) / static_cast<double>(example.question.size());
          EXPECT_NEAR(place, depth, 0.03);
        }
        EXPECT_TRUE(grade(AnswerForm::kWords, "I say " + example.answer, example.answer).correct);
      }
    }
  }
}

TEST(LongContext, ChainsLeadFromValueToNames) {
  const Example example = long_example({LongTask::kVariables, 400, 0.0, 3, 2}, 5, 0, words);
  EXPECT_EQ(std::count(example.answer.begin(), example.answer.end(), ' '), 3);
  EXPECT_THAT(example.question, HasSubstr("Find all 4 variables"));
  std::string last;
  std::string rest = example.answer + " ";
  while (!rest.empty()) {
    const std::string name = rest.substr(0, rest.find(' '));
    rest.erase(0, name.size() + 1);
    if (!last.empty()) {
      EXPECT_THAT(example.question, HasSubstr("VAR " + name + " = VAR " + last));
    }
    last = name;
  }
}

TEST(LongContext, WhatCannotBeIsAnError) {
  EXPECT_THAT(message_of([] {
                long_example({LongTask::kPasskey, 10}, 1, 0, words);
              }),
              HasSubstr("passkey: the question alone has"));
  EXPECT_THAT(message_of([] {
                long_example({LongTask::kPasskey, 100, 1.5}, 1, 0, words);
              }),
              HasSubstr("expected a depth of 0 to 1"));
  EXPECT_THAT(message_of([] {
                long_example({LongTask::kVariables, 100, 0.5, 0}, 1, 0, words);
              }),
              HasSubstr("hops and chains"));
}

}  // namespace
}  // namespace cambium
