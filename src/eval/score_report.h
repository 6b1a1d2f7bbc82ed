// Scores of a task as people and files have them: with intervals, what is known of the answers, and
// another model's beside them.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "eval/likelihood.h"
#include "eval/mt_bench.h"
#include "eval/problems/long_context.h"
#include "eval/quality.h"
#include "train/held_out.h"

namespace cambium {

/// What is said of answers that are graded.
struct ScoreReport {
  std::string task;
  int64_t problems = 0;
  const AccuracyResult* result = nullptr;
  double seconds = 0.0;   // that the answers took; 0 = not known
  std::string against{};  // a file of another model's answers to the same questions; empty = none
  std::optional<LongGrid> grid = std::nullopt;
};
/// Error where the file of the other model's answers is of other questions.
nlohmann::ordered_json score_json(const ScoreReport& report);
std::string score_text(const ScoreReport& report);

/// Of questions with options.
nlohmann::ordered_json choices_json(const ChoiceSummary& summary, int64_t rotations);
std::string choices_text(const ChoiceSummary& summary, int64_t rotations, const std::string& task,
                         size_t questions);

nlohmann::ordered_json mt_bench_json(const MtResult& result);
std::string mt_bench_text(const MtResult& result);

/// Loss and perplexity of documents; with a teacher what measured its KL, that too. `cached`: what
/// keys and values were kept as, "none" without a cache.
nlohmann::ordered_json text_json(const HeldOut& documents, const std::vector<LossSums>& each,
                                 const Tokenizer& tokenizer, bool teacher,
                                 const std::string& cached);

}  // namespace cambium
