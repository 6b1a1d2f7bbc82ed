// What a gate asks, one key at a time: measured values that pass, and others that do not.
#include "hybrid/gate.h"

#include <gmock/gmock.h>

namespace cambium {
namespace {

using ::testing::HasSubstr;

AccuracySummary share(double value) {
  return {static_cast<int64_t>(100 * value), 100, {value, value - 0.05, value + 0.05}};
}

ModelSummary measured() {
  ModelSummary m;
  m.reverse_kl = 0.02;
  m.accuracy = share(0.9);
  m.retrieval = share(0.9);
  m.retrieval_at = {{"retrieval of 200 characters", share(0.9)},
                    {"passkey of 800 tokens", share(0.8)},
                    {"variables of 800 tokens", share(0.0)}};
  m.sticky = share(0.1);
  m.answer_tokens = 50.0;
  m.cached_kl = 1e-9;
  m.cached_limit = 1e-5;
  return m;
}

TEST(Gate, EveryKeyPassesAndFails) {
  const struct {
    const char* key;
    void (*ask)(GatePlan& gate);
    void (*spoil)(ModelSummary& model);
    const char* said;
  } rows[] = {
      {"max_reverse_kl", [](GatePlan& g) { g.max_reverse_kl = 0.1; },
       [](ModelSummary& m) { m.reverse_kl = 0.2; },
       "held-out reverse KL 0.2000, at most 0.1 asked: FAILED"},
      {"min_accuracy_kept", [](GatePlan& g) { g.min_accuracy_kept = 0.95; },
       [](ModelSummary& m) { m.accuracy = share(0.8); },
       "is 88.9 % of the teacher's 90.0 %, at least 95 % asked: FAILED"},
      {"min_retrieval_kept", [](GatePlan& g) { g.min_retrieval_kept = 0.95; },
       [](ModelSummary& m) { m.retrieval = share(0.8); },
       "retrieval 80.0 % is 88.9 % of the teacher's 90.0 %, at least 95 % asked: FAILED"},
      {"min_retrieval_kept, far texts alone", [](GatePlan& g) { g.min_retrieval_kept = 0.95; },
       [](ModelSummary& m) { m.retrieval_at[1].found = share(0.4); },
       "passkey of 800 tokens 40.0 % is 50.0 % of the teacher's 80.0 %, at least 95 % asked: "
       "FAILED"},
      {"max_answer_length_ratio", [](GatePlan& g) { g.max_answer_length_ratio = 1.2; },
       [](ModelSummary& m) { m.answer_tokens = 70.0; },
       "answers of 70.0 tokens are 1.40 times the teacher's 50.0, at most 1.2 times asked: FAILED"},
      {"max_sticky", [](GatePlan& g) { g.max_sticky = 0.25; },
       [](ModelSummary& m) { m.sticky = share(0.5); },
       "50.0 % of the questions with the same letter in all rotations of their options (the "
       "teacher 10.0 %), at most 25.0 % asked: FAILED"},
      {"cached_equals_uncached", [](GatePlan&) {}, [](ModelSummary& m) { m.cached_kl = 0.5; },
       "KL between texts read without and through a cache 5.0e-01, at most 1e-05 asked: FAILED"},
  };
  for (const auto& row : rows) {
    GatePlan gate;
    row.ask(gate);
    const ModelSummary teacher = measured();
    ModelSummary model = measured();
    EXPECT_TRUE(judge_gate(gate, model, teacher).passed) << row.key;
    row.spoil(model);
    const GateSummary failed = judge_gate(gate, model, teacher);
    EXPECT_FALSE(failed.passed) << row.key;
    EXPECT_THAT(failed.reason, HasSubstr(row.said)) << row.key;
    gate = {};
    gate.cached_equals_uncached = false;
    EXPECT_TRUE(judge_gate(gate, model, teacher).passed) << row.key << " was not asked";
    EXPECT_EQ(judge_gate(gate, model, teacher).reason, "nothing was asked");
  }
}

TEST(Gate, TheLowerEndIsAskedOfRetrievalToo) {
  GatePlan gate{.min_retrieval_kept = 0.95, .lower_bound = true};
  EXPECT_FALSE(judge_gate(gate, measured(), measured()).passed);
  gate.min_retrieval_kept = 0.9;
  EXPECT_TRUE(judge_gate(gate, measured(), measured()).passed);
}

TEST(Gate, WhatTheTeacherHasNoneOfIsSaidAndNotJudged) {
  const GatePlan gate{.min_retrieval_kept = 0.95};
  const GateSummary passed = judge_gate(gate, measured(), measured());
  EXPECT_TRUE(passed.passed);
  EXPECT_THAT(passed.reason,
              HasSubstr("variables of 800 tokens is not asked for: the teacher has none right"));
}

// Runs that an earlier version began have not measured everything of their teacher.
TEST(Gate, WhatWasNotMeasuredIsNotJudged) {
  GatePlan gate{.max_answer_length_ratio = 1.0, .max_sticky = 0.1};
  ModelSummary teacher;
  ModelSummary model;
  model.answer_tokens = 10.0;
  EXPECT_EQ(judge_gate(gate, model, teacher).reason, "nothing was asked");
}

}  // namespace
}  // namespace cambium
