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
};

struct AccuracyResult {
  AccuracySummary summary;  // with the 95 % interval of Wilson
  std::vector<ExampleResult> examples;
};

/// Generates an answer to every example and grades it. `progress` is told how many are done.
AccuracyResult evaluate_accuracy(Model& model, const Tokenizer& tokenizer, const Task& task,
                                 const AccuracyConfig& config,
                                 const std::function<void(int64_t done)>& progress = {});

/// {"question", "expected", "response", "given", "correct"}, one line an example.
std::string example_lines(const std::vector<ExampleResult>& examples);

}  // namespace cambium
