// How good a model is: task accuracy by generation, and its distance from a teacher on held-out
// text.
#pragma once

#include <functional>
#include <string>
#include <vector>

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
  /// Greedy unless temperature is above 0.
  double temperature = 0.0;
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
};

struct AccuracyResult {
  AccuracySummary summary;  // with the 95 % interval of Wilson
  std::vector<ExampleResult> examples;
  int64_t unanswered = 0;  // of them: not right
};

struct Response {
  std::string text;
  /// Why the model was not asked: the problem is too long for it or for the cache.
  std::string unanswered{};
};

struct Answers {
  std::vector<Response> responses;  // in the order of the examples
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

/// Grades one response an example; one that was not answered is not right.
AccuracyResult grade_responses(const Task& task, const std::vector<Response>& responses);

/// Generates an answer to every example and grades it. `progress` is told how many are done.
AccuracyResult evaluate_accuracy(Model& model, const Tokenizer& tokenizer, const Task& task,
                                 const AccuracyConfig& config,
                                 const std::function<void(int64_t done)>& progress = {});

/// Error, before any answer is generated, where this machine cannot grade the task's.
void expect_gradable(const Task& task);

/// {"question", "expected", "response", "given", "correct"}, one line an example, and the reason
/// "unanswered" where the model was not asked.
std::string example_lines(const std::vector<ExampleResult>& examples);
/// {"question", "expected", "response"} of answers that are to be graded elsewhere, and
/// "unanswered" as above.
std::string ungraded_lines(const Task& task, const std::vector<Response>& responses);
/// The responses in such a file, of either kind or of `cambium generate`. Error naming the line
/// unless there is one for each example, in their order.
std::vector<Response> read_responses(const std::string& path, const Task& task);

}  // namespace cambium
