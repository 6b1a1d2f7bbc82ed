// How good a model is: task accuracy by generation, and its distance from a teacher on held-out
// text.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/prompts.h"
#include "eval/report/summary.h"
#include "eval/tasks.h"
#include "model/model.h"
#include "serve/engine.h"
#include "text/tokenizer.h"

namespace cambium {

struct AccuracyConfig {
  int64_t max_new_tokens = 256;
  int64_t batch = 64;  // sequences generated at once
  /// Ask through the tokenizer's chat template instead of "question\n".
  bool chat = false;
  PromptWords words = PromptWords::kPlain;
  std::vector<Example> shots{};
  /// Greedy unless temperature is above 0; top_p and top_k cut what is drawn from (1 and 0: all).
  double temperature = 0.0;
  double top_p = 1.0;
  int64_t top_k = 0;
  /// Answers to each problem, which are drawn from streams of their own.
  int64_t samples = 1;
  uint64_t seed = 0;
  /// Of the engine, beside max_sequences, which is `batch`.
  EngineConfig engine{};
};

struct ExampleResult {
  std::string question;
  std::string expected;
  std::string response;
  std::string given;  // the answer found in the response; empty = none
  bool correct = false;
  std::string unanswered{};  // why the model was not asked; empty = it was
  std::string prompt{};      // what the model read; empty = not known
  int64_t sample = 0;        // which of the answers to this problem
  int64_t tokens = -1;       // of the response; -1 = not known
  bool truncated = false;    // ended by the limit of tokens
};

struct AccuracyResult {
  /// Of all answers. The 95 % interval is Wilson's, or with several samples the bootstrap's over
  /// problems: answers to one problem are no independent witnesses.
  AccuracySummary summary;
  std::vector<ExampleResult> examples;  // all samples of a problem, then the next problem
  int64_t samples = 1;                  // answers to each problem
  int64_t unanswered = 0;               // of all answers, those never asked for: not right
  int64_t no_answer = 0;                // asked for, but no final answer was found
  int64_t truncated = 0;
  int64_t tokens = 0;  // of the answers whose length is known
  int64_t measured = 0;

  double mean_tokens() const {
    return measured > 0 ? static_cast<double>(tokens) / static_cast<double>(measured) : 0.0;
  }
};

struct Response {
  std::string text;
  /// Why the model was not asked: the problem is too long for it or for the cache.
  std::string unanswered{};
  std::string prompt{};
  int64_t tokens = -1;
  bool truncated = false;
};

struct Answers {
  std::vector<Response> responses;  // in the order of the examples, all samples of one together
  int64_t prompt_tokens = 0;
  int64_t tokens = 0;    // of the responses
  double seconds = 0.0;  // from the first prompt to the last token

  double tokens_per_second() const {
    return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0;
  }
};

/// Generates an answer to every example that the engine can take; a note says which it cannot.
/// Error where that is none. `progress` is told how many are done.
Answers answer_examples(Model& model, const Tokenizer& tokenizer, const Task& task,
                        const AccuracyConfig& config,
                        const std::function<void(int64_t done)>& progress = {});

/// Grades the responses, as many to each example; one that was not answered is not right.
AccuracyResult grade_responses(const Task& task, const std::vector<Response>& responses);

/// Generates an answer to every example and grades it. `progress` is told how many are done.
AccuracyResult evaluate_accuracy(Model& model, const Tokenizer& tokenizer, const Task& task,
                                 const AccuracyConfig& config,
                                 const std::function<void(int64_t done)>& progress = {});

/// Error, before any answer is generated, where this machine cannot grade the task's.
void expect_gradable(const Task& task);

/// {"question", "expected", "response", "given", "correct"}, one line an answer, and where they are
/// known "prompt", "tokens", "truncated"; "sample" where there are several to a problem, and the
/// reason "unanswered" where the model was not asked.
std::string example_lines(const std::vector<ExampleResult>& examples);
/// The same without grades, of answers that are to be graded elsewhere.
std::string ungraded_lines(const Task& task, const std::vector<Response>& responses);
/// The responses in such a file, of either kind or of `cambium generate`. Error naming the line
/// unless there are as many for each example, in their order.
std::vector<Response> read_responses(const std::string& path, const Task& task);

}  // namespace cambium
