#include "eval/problem_source.h"

#include <gtest/gtest.h>

#include <functional>

#include "base/error.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;

/// The text of the tokens that are learned, or of those that are not.
std::string part(const Tokenizer& tokenizer, const Document& document, bool learned) {
  std::vector<int32_t> tokens;
  for (size_t t = 0; t < document.tokens.size(); ++t) {
    if ((document.learn[t] != 0) == learned) {
      tokens.push_back(document.tokens[t]);
    }
  }
  return tokenizer.decode(tokens, false);
}

TEST(ProblemSource, DocumentsAreTheProblemsOfTheSplit) {
  const Tokenizer tokenizer = byte_tokenizer();
  ProblemSpec spec;
  spec.retrieval_share = 0.3;
  for (const Split split : {Split::kTrain, Split::kValid, Split::kTest}) {
    const auto source = problem_source(tokenizer, spec, split, 5);
    EXPECT_EQ(source->size(), 0);
    for (const uint64_t index : {0, 1, 2, 3, 40, 1000000}) {
      const Problem problem = make_problem(spec, split, 5, index);
      const Document document = source->document(index);
      EXPECT_EQ(part(tokenizer, document, false), problem.question + "\n");
      EXPECT_EQ(part(tokenizer, document, true), problem.answer + "<|stop|>");
    }
  }
}

TEST(ProblemSource, LearnsSomeProblemsWhole) {
  const Tokenizer tokenizer = byte_tokenizer();
  const auto source = problem_source(tokenizer, {}, Split::kTrain, 5, 3);
  for (uint64_t index = 0; index < 9; ++index) {
    const Problem problem = make_problem({}, Split::kTrain, 5, index);
    const std::string prompt = problem.question + "\n";
    EXPECT_EQ(part(tokenizer, source->document(index), true),
              (index % 3 == 0 ? prompt : "") + problem.answer + "<|stop|>");
  }
}

// A run resumes over the same data only, so whatever changes the documents changes the name.
TEST(ProblemSource, FingerprintNamesEveryParameter) {
  const Tokenizer tokenizer = byte_tokenizer();
  const auto name = [&](const ProblemSpec& spec, Split split, uint64_t seed, int64_t every) {
    return problem_source(tokenizer, spec, split, seed, every)->fingerprint();
  };
  const std::string plain = name({}, Split::kTrain, 1, 0);
  EXPECT_EQ(name({}, Split::kTrain, 1, 0), plain);
  EXPECT_NE(name({}, Split::kValid, 1, 0), plain);
  EXPECT_NE(name({}, Split::kTrain, 2, 0), plain);
  EXPECT_NE(name({}, Split::kTrain, 1, 4), plain);
  const std::vector<std::function<void(ProblemSpec&)>> changes = {
      [](ProblemSpec& s) { s.retrieval_share = 0.5; },
      [](ProblemSpec& s) { s.word.min_steps = 1; },
      [](ProblemSpec& s) { s.word.max_steps = 5; },
      [](ProblemSpec& s) { s.word.distractors = 2; },
      [](ProblemSpec& s) { s.word.hard = 0.5; },
      [](ProblemSpec& s) { s.word.shuffle = 0.5; },
      [](ProblemSpec& s) { s.word.lookback = 0.5; },
      [](ProblemSpec& s) { s.word.max_number = 13; },
      [](ProblemSpec& s) { s.word.max_value = 61; },
      [](ProblemSpec& s) { s.word.max_factor = 6; },
      [](ProblemSpec& s) { s.retrieval.min_chars = 401; },
      [](ProblemSpec& s) { s.retrieval.max_chars = 1601; },
      [](ProblemSpec& s) { s.retrieval.min_facts = 1; },
      [](ProblemSpec& s) { s.retrieval.max_facts = 21; },
      [](ProblemSpec& s) { s.retrieval.questions = 2; },
      [](ProblemSpec& s) { s.retrieval.digits = 5; }};
  for (size_t i = 0; i < changes.size(); ++i) {
    ProblemSpec spec;
    changes[i](spec);
    EXPECT_NE(name(spec, Split::kTrain, 1, 0), plain) << "change " << i;
  }
}

TEST(ProblemTask, AsksOneKindAndKnowsItsAnswers) {
  ProblemSpec spec;
  spec.retrieval_share = 0.5;
  for (const ProblemKind kind : {ProblemKind::kWord, ProblemKind::kRetrieval}) {
    const Task task = problem_task(spec, kind, Split::kTest, 3, 25);
    EXPECT_EQ(task.name, kind == ProblemKind::kWord ? "problems" : "retrieval");
    ASSERT_EQ(task.examples.size(), 25U);
    ProblemSpec only = spec;
    only.retrieval_share = kind == ProblemKind::kRetrieval ? 1.0 : 0.0;
    for (size_t i = 0; i < task.examples.size(); ++i) {
      const Problem problem = make_problem(only, Split::kTest, 3, i);
      EXPECT_EQ(problem.kind, kind);
      EXPECT_EQ(task.examples[i].question, problem.question);
      EXPECT_TRUE(grade(task, problem.answer, task.examples[i]).correct) << problem.answer;
      EXPECT_FALSE(grade(task, "#### 123456789", task.examples[i]).correct);
    }
    EXPECT_TRUE(problem_task(spec, kind, Split::kTest, 3, 0).examples.empty());
  }
}

TEST(ProblemSourceErrors, RefusesWhatCannotBe) {
  ProblemSpec spec;
  spec.word.min_steps = 9;
  EXPECT_THROW(problem_source(byte_tokenizer(), spec, Split::kTrain, 1), Error);
  EXPECT_THROW(problem_task(spec, ProblemKind::kWord, Split::kTrain, 1, 3), Error);
}

}  // namespace
}  // namespace cambium
