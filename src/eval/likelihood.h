// What a model thinks of texts that it is shown: the log-probability of continuations, and the
// choice among options that follows from it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/report/summary.h"
#include "eval/tasks.h"
#include "model/model.h"
#include "text/tokenizer.h"

namespace cambium {

struct Continuation {
  std::string context;
  std::string text;
  /// Contexts of a chat template bring their own begin token.
  bool add_special = true;
};

/// log p(text | context) of each, in nats, over the tokens that the whole has beyond the context's
/// own, as lm-evaluation-harness takes them: spaces that end a context belong to the continuation,
/// and of what is too long for the model the beginning is left out. Error for a continuation
/// without a token. `progress` is told how many are done.
std::vector<double> log_probabilities(Model& model, const Tokenizer& tokenizer,
                                      const std::vector<Continuation>& continuations,
                                      const std::function<void(int64_t done)>& progress = {});

struct ChoiceResult {
  std::vector<double> log_probabilities;  // an option each
  int64_t chosen = 0;                     // by the sum: the largest log p
  int64_t chosen_by_length = 0;           // by log p / bytes of the option
  int64_t correct = 0;

  /// log p(correct) - the largest log p of the others.
  double margin() const;
};

/// One question in one order of its options. Options are measured in bytes, without the space that
/// joins them to the context. lm-evaluation-harness divides by characters in acc_norm and by bytes
/// in acc_bytes; the two differ for options with letters beyond ASCII only.
ChoiceResult choose(std::vector<double> log_probabilities, const ChoiceQuestion& question,
                    ChoiceStyle style);

struct ChoiceSummary {
  AccuracySummary by_sum;     // acc
  AccuracySummary by_length;  // acc_norm
  Measured margin;            // nats, mean over questions (and orders) with its interval
  /// Over questions asked in every rotation of their options: whether the letter stayed the same,
  /// which no model that reads them can always do.
  AccuracySummary sticky;
  std::vector<int64_t> letters;  // how often each letter was chosen
};

/// `results` holds `rotations` results a question, in their order.
ChoiceSummary summarise_choices(const std::vector<ChoiceResult>& results, int64_t rotations);

struct ChoiceConfig {
  bool chat = false;
  /// Asks every question in all rotations of its options, by letters.
  bool rotations = false;
  std::vector<Example> shots{};
};

/// Asks every question of a task with options by likelihood. All must have as many options where
/// they are rotated.
std::vector<ChoiceResult> evaluate_choices(Model& model, const Tokenizer& tokenizer,
                                           const Task& task, const ChoiceConfig& config,
                                           const std::function<void(int64_t done)>& progress = {});

/// Whether every question of the task has options, all as many: those can be asked in rotations.
bool rotatable(const Task& task);

/// How often each question of the task is asked.
int64_t rotations_of(const Task& task, const ChoiceConfig& config);

}  // namespace cambium
