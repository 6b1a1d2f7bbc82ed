#include "hybrid/measure.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/placement.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::HasSubstr;

/// A model of bytes; its weights are drawn wide, so that two seeds disagree.
LoadedModel byte_model(const std::vector<UnitSpec>& mixers, uint64_t seed) {
  ModelSpec spec = testing::tiny_spec(mixers);
  spec.vocab = 261;
  spec.max_positions = 2048;
  spec.eos_ids = {0};
  return fresh_model(spec, seed, 0.3);
}

LoadedModel attention_model(uint64_t seed) {
  return byte_model({testing::attention_mixer(), testing::attention_mixer()}, seed);
}

HybridPlan small_plan() {
  HybridPlan plan;
  plan.evaluate.held_out_documents = 6;
  plan.evaluate.held_out_tokens = 600;
  plan.evaluate.problems = 5;
  plan.evaluate.max_new_tokens = 4;
  return plan;
}

class MeasureTest : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_F(MeasureTest, GeneratedDataOfAPlan) {
  HybridPlan plan = small_plan();
  plan.evaluate.retrieval = 3;
  plan.evaluate.retrieval_spec.min_chars = 200;
  plan.evaluate.retrieval_spec.max_chars = 300;
  const RunData data(plan, byte_tokenizer());
  // Every part is a split of its own.
  EXPECT_THAT(data.train().fingerprint(), HasSubstr("problems train seed 1"));
  EXPECT_THAT(data.valid().fingerprint(), HasSubstr("problems valid seed 1"));
  EXPECT_EQ(data.task().examples.size(), 5U);
  EXPECT_EQ(data.task().examples[0].question,
            problem_task(plan.data.problems, ProblemKind::kWord, Split::kTest, 1, 1)
                .examples[0]
                .question);
  // Retrieval is asked at the length that [evaluate] says, not at the length trained on.
  ASSERT_EQ(data.retrieval().examples.size(), 3U);
  for (const Example& example : data.retrieval().examples) {
    EXPECT_LT(example.question.size(), 400U);
  }
  const HeldOut expected(data.valid(), 6, 600);
  EXPECT_EQ(data.held_out().documents(), 6);
  EXPECT_EQ(data.held_out().labels(), expected.labels());
}

TEST_F(MeasureTest, DataFromFiles) {
  const TestFolder folder;
  HybridPlan plan = small_plan();
  plan.data.train = folder.at("train.jsonl");
  plan.data.valid = folder.at("valid.jsonl");
  plan.evaluate.problems = 0;
  write_file_atomically(plan.data.train, "{\"text\": \"ab\"}\n{\"text\": \"c\"}\n");
  write_file_atomically(plan.data.valid, "{\"prompt\": \"1+1=\", \"completion\": \"2\"}\n");
  const RunData data(plan, byte_tokenizer());
  EXPECT_EQ(data.train().size(), 2);
  EXPECT_EQ(data.valid().size(), 1);
  EXPECT_EQ(data.held_out().labels(), 2);
  EXPECT_TRUE(data.task().examples.empty());
  EXPECT_TRUE(data.retrieval().examples.empty());
  // A benchmark's file is asked beside them.
  plan.evaluate.task = "gsm8k";
  plan.evaluate.task_path = folder.at("task.jsonl");
  plan.evaluate.problems = 1;
  write_file_atomically(plan.evaluate.task_path,
                        "{\"question\": \"a\", \"answer\": \"#### 1\"}\n"
                        "{\"question\": \"b\", \"answer\": \"#### 2\"}\n");
  const RunData asked(plan, byte_tokenizer());
  ASSERT_EQ(asked.task().examples.size(), 1U);
  EXPECT_EQ(asked.task().examples[0].question, "a");
}

TEST_F(MeasureTest, WhatChoosesIsNeverReported) {
  const TestFolder folder;
  HybridPlan plan = small_plan();
  plan.evaluate.held_out_documents = 6;
  plan.evaluate.problems = 5;
  StagePlan stage;
  stage.place.metric = "accuracy";
  stage.place.documents = 3;
  stage.place.problems = 2;
  plan.stages = {stage};
  // Without end there is enough for both.
  const RunData generated(plan, byte_tokenizer());
  EXPECT_EQ(generated.held_out().documents(), 6);
  EXPECT_EQ(generated.selection().documents, 3);
  EXPECT_EQ(generated.selection_documents(3).documents(), 3);
  EXPECT_EQ(generated.selection_documents(3).fingerprint(),
            HeldOut(generated.valid(), 3, 600, 6).fingerprint());
  const auto disjoint = [](const Task& a, const Task& b) {
    for (const Example& x : a.examples) {
      for (const Example& y : b.examples) {
        EXPECT_NE(x.question, y.question);
      }
    }
  };
  EXPECT_EQ(generated.selection_problems(9).examples.size(), 2U);
  disjoint(generated.task(), generated.selection_problems(2));
  // Files that are too short are shared out, by the sizes that were asked.
  plan.data.train = folder.at("train.jsonl");
  plan.data.valid = folder.at("valid.jsonl");
  plan.evaluate.task = "gsm8k";
  plan.evaluate.task_path = folder.at("task.jsonl");
  std::string documents;
  std::string problems;
  for (int i = 0; i < 6; ++i) {
    documents += fmt::format("{{\"text\": \"document {}\"}}\n", i);
    problems += fmt::format("{{\"question\": \"q{}\", \"answer\": \"#### {}\"}}\n", i, i);
  }
  write_file_atomically(plan.data.train, documents);
  write_file_atomically(plan.data.valid, documents);
  write_file_atomically(plan.evaluate.task_path, problems);
  const RunData shared(plan, byte_tokenizer());
  EXPECT_EQ(shared.held_out().documents(), 4);  // 6 to 3 of 6
  EXPECT_EQ(shared.selection().documents, 2);
  EXPECT_EQ(shared.task().examples.size(), 4U);  // 5 to 2 of 6
  EXPECT_EQ(shared.selection_problems(9).examples.size(), 2U);
  disjoint(shared.task(), shared.selection_problems(9));
  // One document cannot do both.
  write_file_atomically(plan.data.valid, "{\"text\": \"alone\"}\n");
  const std::string message =
      testing::error_of([&] { const RunData alone(plan, byte_tokenizer()); });
  EXPECT_THAT(message, HasSubstr("expected at least 2 documents"));
}

TEST_F(MeasureTest, BenchmarksAreAskedThroughTheChatTemplate) {
  HybridPlan plan = small_plan();
  const RunData data(plan, byte_tokenizer());
  EXPECT_FALSE(data.answers(plan.evaluate).chat);  // generated problems, as they are trained on
  plan.evaluate.ask = Ask::kTemplate;
  EXPECT_TRUE(data.answers(plan.evaluate).chat);
  plan.evaluate.ask = Ask::kAuto;
  plan.evaluate.task = "gsm8k";
  EXPECT_TRUE(data.answers(plan.evaluate).chat);
  plan.evaluate.ask = Ask::kPlain;
  EXPECT_FALSE(data.answers(plan.evaluate).chat);
}

TEST_F(MeasureTest, SpecSaysLayersParametersAndCache) {
  UnitSpec window = testing::attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{12});
  const UnitSpec mamba = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
  const UnitSpec attention = testing::attention_mixer();
  LoadedModel model = byte_model({attention, window, attention, mamba}, 1);
  ModelSummary summary = summarise_spec("hybrid", *model.model, nullptr, Dtype::kF32);
  EXPECT_EQ(summary.name, "hybrid");
  EXPECT_EQ(summary.map, "AWAM");
  EXPECT_EQ(summary.mixers, (std::map<std::string, int64_t>{
                                {"attention", 2}, {"mamba", 1}, {"sliding_window", 1}}));
  EXPECT_EQ(summary.converted, 2);
  EXPECT_EQ(summary.parameters, static_cast<int64_t>(testing::all_weights(*model.model).size()));
  // A key and a value of 8 floats for the one head; the window keeps 12 tokens of them, and Mamba
  // 16 channels of 4 states and 3 inputs of the convolution.
  constexpr int64_t kToken = (8 + 8) * 4;
  EXPECT_EQ(summary.cache_bytes_per_token, 2 * kToken);
  EXPECT_EQ(summary.state_bytes_per_sequence, 12 * kToken + (16 * 4 + 16 * 3) * 4);
  // As served: keys and values in bf16, states in fp32.
  summarise_cache(summary, *model.model);
  EXPECT_EQ(summary.cache_bytes_per_token, 2 * kToken / 2);
  EXPECT_EQ(summary.state_bytes_per_sequence, 12 * kToken / 2 + (16 * 4 + 16 * 3) * 4);
}

TEST_F(MeasureTest, LayersThatTheTeacherHadAreNotConverted) {
  const UnitSpec attention = testing::attention_mixer();
  const UnitSpec mamba = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
  LoadedModel teacher = byte_model({mamba, attention, mamba, attention}, 1);
  LoadedModel hybrid = byte_model({mamba, mamba, mamba, attention}, 1);
  const ModelSpec& taught = teacher.model->spec();
  EXPECT_EQ(summarise_spec("teacher", *teacher.model, &taught).converted, 0);
  EXPECT_EQ(summarise_spec("hybrid", *hybrid.model, &taught).converted, 1);
  EXPECT_EQ(converted_layers(hybrid.model->spec(), &taught), (std::vector<int64_t>{1}));
  EXPECT_EQ(layers_to_convert(hybrid.model->spec(), 0.5), 0);
  EXPECT_EQ(layers_to_convert(hybrid.model->spec(), 1.0), 1);
}

TEST_F(MeasureTest, QualityAgainstItselfAndAgainstAnother) {
  HybridPlan plan = small_plan();
  plan.evaluate.retrieval = 2;
  plan.evaluate.retrieval_lengths = {150, 400};
  plan.evaluate.long_texts = {{"passkey"}, {{300, 600}, 3, 2}};
  const RunData data(plan, byte_tokenizer());
  LoadedModel teacher = attention_model(1);
  LoadedModel student = attention_model(2);
  ModelSummary same = summarise_spec("teacher", *teacher.model);
  measure_quality(same, *teacher.model, *teacher.model, data, plan.evaluate);
  EXPECT_NEAR(same.reverse_kl, 0.0, 1e-6);
  EXPECT_EQ(same.agreement, 1.0);
  EXPECT_EQ(same.accuracy.total, 5);
  EXPECT_EQ(same.retrieval.total, 2);
  ASSERT_EQ(same.retrieval_at.size(), 4U);
  EXPECT_EQ(same.retrieval_at[1].what, "retrieval of 400 characters");
  EXPECT_EQ(same.retrieval_at[1].found.total, 2);
  EXPECT_EQ(same.retrieval_at[3].what, "passkey of 600 tokens");
  EXPECT_EQ(same.retrieval_at[3].found.total, 6);
  const auto asked = [&](size_t i) {
    return data.retrieval_at()[i].task.examples[1].question.size();
  };
  EXPECT_GT(asked(1), asked(0) + 150);
  EXPECT_GT(asked(3), asked(2) + 150);
  EXPECT_EQ(data.long_answers(plan.evaluate).max_new_tokens, kLongAnswerTokens);
  EXPECT_GT(same.answer_tokens, 0.0);
  EXPECT_LE(same.answer_tokens, 4.0);
  EXPECT_GE(same.cached_kl, 0.0);
  EXPECT_LT(same.cached_kl, same.cached_limit / 100);
  EXPECT_EQ(same.sticky.total, 0);  // the problems have no options
  ModelSummary apart = summarise_spec("student", *student.model);
  measure_quality(apart, *student.model, *teacher.model, data, plan.evaluate);
  const LossSums sums = total(data.held_out().measure(*student.model, teacher.model.get()));
  const auto tokens = static_cast<double>(data.held_out().labels());
  EXPECT_DOUBLE_EQ(apart.reverse_kl, sums.reverse_kl / tokens);
  EXPECT_DOUBLE_EQ(apart.nll, sums.cross_entropy / tokens);
  EXPECT_DOUBLE_EQ(apart.agreement, static_cast<double>(sums.agreement) / tokens);
  EXPECT_GT(apart.reverse_kl, 0.1);
  EXPECT_LT(apart.agreement, 0.5);
}

// Long texts that choose: in the lengths and kinds of those that are reported, none of which they
// are.
TEST_F(MeasureTest, RetrievalThatChoosesIsNotReported) {
  HybridPlan plan = small_plan();
  plan.evaluate.long_texts = {{"passkey", "keyvalue"}, {{200, 400}, 3, 2}};
  const RunData data(plan, byte_tokenizer());
  const Task chosen_by = data.selection_retrieval(0);
  ASSERT_EQ(chosen_by.examples.size(), 24U);
  size_t at = 0;
  for (const RunData::Retrieval& reported : data.retrieval_at()) {
    for (const Example& example : reported.task.examples) {
      const Example& other = chosen_by.examples[at++];
      EXPECT_NE(other.question, example.question);
      EXPECT_NE(other.answer, example.answer);
      EXPECT_NEAR(static_cast<double>(other.question.size()),
                  static_cast<double>(example.question.size()), 60.0);
    }
  }
  EXPECT_EQ(data.selection_retrieval(12).examples.size(), 12U);
  EXPECT_EQ(data.selection_retrieval(1).examples.size(), 12U);  // one of a cell at least
  EXPECT_EQ(data.selection_retrieval_answers(plan.evaluate).max_new_tokens, kLongAnswerTokens);
  // The plan's own texts go first.
  plan.evaluate.retrieval = 2;
  const RunData own(plan, byte_tokenizer());
  EXPECT_EQ(own.selection_retrieval(0).examples.size(), 2U);
  EXPECT_EQ(own.selection_retrieval_answers(plan.evaluate).max_new_tokens,
            plan.evaluate.max_new_tokens);
}

TEST_F(MeasureTest, QuestionsWithOptionsAreAskedInAllRotations) {
  const TestFolder folder;
  HybridPlan plan = small_plan();
  plan.evaluate.task = "choices";
  plan.evaluate.task_path = folder.at("choices.jsonl");
  const auto write = [&](const char* more) {
    write_file_atomically(
        plan.evaluate.task_path,
        std::string(R"({"question": "Two?", "choices": ["no", "yes"], "answer": 1})") + "\n" +
            R"({"question": "One?", "choices": ["no", "yes")" + more + "], \"answer\": 0}\n");
  };
  LoadedModel model = attention_model(1);
  const auto asked = [&] {
    const RunData data(plan, byte_tokenizer());
    ModelSummary summary;
    measure_quality(summary, *model.model, *model.model, data, plan.evaluate);
    return summary.sticky.total;
  };
  write("");
  EXPECT_EQ(asked(), 2);
  write(", \"so\"");
  EXPECT_EQ(asked(), 0);  // turned, two options and three are no like questions
}

TEST_F(MeasureTest, DamageByEveryMetric) {
  const HybridPlan plan = small_plan();
  const RunData data(plan, byte_tokenizer());
  LoadedModel teacher = attention_model(1);
  LoadedModel student = attention_model(2);
  const HeldOut few(data.valid(), 3, 500);
  const auto of = [&](LoadedModel& model, const char* metric) {
    return damage(*model.model, *teacher.model, data, few, metric, plan.evaluate);
  };
  const LossSums sums = total(few.measure(*student.model, teacher.model.get()));
  const auto tokens = static_cast<double>(few.labels());
  EXPECT_NEAR(of(teacher, "reverse-kl"), 0.0, 1e-6);
  EXPECT_DOUBLE_EQ(of(student, "reverse-kl"), sums.reverse_kl / tokens);
  EXPECT_DOUBLE_EQ(of(student, "nll"), sums.cross_entropy / tokens);
  EXPECT_GT(of(teacher, "nll"), 0.0);
  // Random weights solve nothing.
  EXPECT_EQ(of(student, "accuracy"), 1.0);
}

TEST_F(MeasureTest, DamageByAccuracyNeedsProblems) {
  HybridPlan plan = small_plan();
  plan.evaluate.problems = 0;
  const RunData data(plan, byte_tokenizer());
  LoadedModel model = attention_model(1);
  const std::string message = testing::error_of([&] {
    damage(*model.model, *model.model, data, data.held_out(), "accuracy", plan.evaluate);
  });
  EXPECT_THAT(message, HasSubstr("metric accuracy"));
  // Nothing is asked, and the held-out numbers are there all the same.
  ModelSummary summary;
  measure_quality(summary, *model.model, *model.model, data, plan.evaluate);
  EXPECT_EQ(summary.accuracy.total, 0);
  EXPECT_GT(summary.nll, 0.0);
}

}  // namespace
}  // namespace cambium
