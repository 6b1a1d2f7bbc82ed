#include "eval/paired.h"

#include <gmock/gmock.h>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;

TEST(Paired, McNemarsExactTest) {
  struct Row {
    int64_t a, b;
    double p;  // of scipy.stats.binomtest(a, a + b).pvalue
  };
  for (const Row& row :
       {Row{0, 0, 1.0}, Row{1, 0, 1.0}, Row{5, 5, 1.0}, Row{0, 6, 0.03125}, Row{8, 1, 0.0390625},
        Row{1, 8, 0.0390625}, Row{20, 9, 0.06142}, Row{0, 2000, 0.0}}) {
    EXPECT_NEAR(mcnemar_exact(row.a, row.b), row.p, 1e-5) << row.a << " " << row.b;
  }
}

TEST(Paired, ComparesQuestionByQuestion) {
  std::vector<double> first(50, 1.0);
  std::vector<double> second(50, 1.0);
  for (size_t i = 0; i < 10; ++i) {
    second[i] = 0.0;
  }
  first[49] = 0.0;
  const PairedResult r = compare_paired(first, second);
  EXPECT_EQ(r.only_first, 10);
  EXPECT_EQ(r.only_second, 1);
  EXPECT_TRUE(r.exact);
  EXPECT_NEAR(r.difference.value, 0.18, 1e-12);
  EXPECT_GT(r.difference.interval.low, 0.0);
  EXPECT_LT(r.difference.interval.high, 0.36);
  EXPECT_NEAR(r.p, 0.01171875, 1e-9);
  // Shares of several answers: no 2x2 table, the same questions with other signs instead.
  first[0] = 0.5;
  const PairedResult shares = compare_paired(first, second);
  EXPECT_FALSE(shares.exact);
  EXPECT_GT(shares.p, 0.001);
  EXPECT_LT(shares.p, 0.05);
  EXPECT_EQ(compare_paired(second, second).p, 1.0);
  EXPECT_EQ(compare_paired(first, first).p, 1.0);
}

TEST(Paired, ReadsGradedAnswers) {
  const TestFolder folder;
  const std::string path = folder.at("a.jsonl");
  write_file_atomically(path, R"({"question": "a", "correct": true, "tokens": 10, "sample": 0})"
                              "\n"
                              R"({"question": "a", "correct": false, "tokens": 30, "sample": 1})"
                              "\n"
                              R"({"question": "b", "correct": true, "sample": 0})"
                              "\n"
                              R"({"question": "b", "correct": true})"
                              "\n");
  const StoredGrades grades = read_grades(path);
  EXPECT_THAT(grades.questions, ElementsAre("a", "b", "b"));  // asked twice is two questions
  EXPECT_THAT(grades.scores, ElementsAre(0.5, 1.0, 1.0));
  EXPECT_EQ(grades.mean_tokens, 20.0);
  StoredGrades other = grades;
  EXPECT_EQ(compare_grades(grades, other, "x").difference.value, 0.0);
  other.questions[1] = "c";
  EXPECT_THAT(
      message_of([&] { compare_grades(grades, other, "t.jsonl"); }),
      HasSubstr("t.jsonl: expected answers to the same questions, but question 2 is 'c' there"));
  other.questions.pop_back();
  EXPECT_THAT(message_of([&] { compare_grades(grades, other, "t.jsonl"); }),
              HasSubstr("the same 3 questions, got 2"));
  for (const char* text :
       {"", "{}", "[]", R"({"question": "a"})", R"({"question": 1, "correct": true})",
        R"({"question": "a", "correct": "yes"})"}) {
    write_file_atomically(path, text);
    EXPECT_THAT(message_of([&] { read_grades(path); }), HasSubstr(path)) << text;
  }
}

}  // namespace
}  // namespace cambium
