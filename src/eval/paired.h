// Two models on the same questions: whether one is better, and by how much, from what each did with
// each question.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "eval/quality.h"
#include "eval/statistics.h"

namespace cambium {

struct PairedResult {
  int64_t questions = 0;
  Estimate difference;      // mean score of the first minus that of the second, bootstrap interval
  int64_t only_first = 0;   // questions that it alone has right, where each has one answer
  int64_t only_second = 0;  //
  /// Two-sided; McNemar's exact test with one answer a question, else a sign-flip test.
  double p = 1.0;
  bool exact = false;
};

/// The binomial probability of a split at least as uneven as `a` against `b` (McNemar 1947, in its
/// exact form); 1 where both are 0.
double mcnemar_exact(int64_t a, int64_t b);

/// `first` and `second` hold the score of each question, 0..1, in the same order; `one_answer` says
/// that all are 0 or 1. The interval resamples questions, each with both scores.
PairedResult compare_paired(std::span<const double> first, std::span<const double> second,
                            uint64_t seed = 1);

/// Scores, lengths and questions of a file of graded answers (example_lines()).
struct StoredGrades {
  std::vector<std::string> questions;
  std::vector<double> scores;  // a question each: the share of its answers that are right
  double mean_tokens = 0.0;    // of the answers whose length is known; 0 where none is
};
/// Answers to one question stand one after the other. Error naming the line for one without a
/// grade.
StoredGrades read_grades(const std::string& path);
StoredGrades grades_of(const AccuracyResult& result);

/// Pairs them by their order. Error unless both were asked the same questions.
PairedResult compare_grades(const StoredGrades& first, const StoredGrades& second,
                            const std::string& path);

}  // namespace cambium
