#include "eval/paired.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/json_lines.h"
#include "base/random.h"
#include "base/text.h"

namespace cambium {
namespace {

/// Share of random sign flips of the differences whose sum is at least as far from zero; the data
/// itself counts as one, so that it is never 0.
double sign_flip_p(const std::vector<double>& differences, uint64_t seed, int flips = 10'000) {
  double seen = 0;
  for (const double d : differences) {
    seen += d;
  }
  int64_t as_far = 1;
  for (int k = 0; k < flips; ++k) {
    Rng rng(seed, static_cast<uint64_t>(k));
    double sum = 0;
    for (const double d : differences) {
      sum += rng.chance(0.5) ? d : -d;
    }
    as_far += std::abs(sum) >= std::abs(seen) - 1e-12 ? 1 : 0;
  }
  return static_cast<double>(as_far) / (flips + 1);
}

/// Joins answers to one question that stand one after the other.
class Grouper {
 public:
  void add(const std::string& question, bool correct, int64_t sample) {
    if (sample == 0 || grades.questions.empty() || grades.questions.back() != question) {
      grades.questions.push_back(question);
      grades.scores.push_back(0.0);
      counts_.push_back(0);
    }
    grades.scores.back() += correct ? 1.0 : 0.0;
    ++counts_.back();
  }
  StoredGrades finish() {
    for (size_t i = 0; i < counts_.size(); ++i) {
      grades.scores[i] /= static_cast<double>(counts_[i]);
    }
    return std::move(grades);
  }
  StoredGrades grades;

 private:
  std::vector<int64_t> counts_;
};

}  // namespace

double mcnemar_exact(int64_t a, int64_t b) {
  CAMBIUM_CHECK(a >= 0 && b >= 0);
  const int64_t n = a + b;
  double tail = 0;
  for (int64_t k = 0; k <= std::min(a, b); ++k) {
    const auto c = static_cast<double>(k);
    const auto m = static_cast<double>(n);
    tail += std::exp(std::lgamma(m + 1) - std::lgamma(c + 1) - std::lgamma(m - c + 1) -
                     m * std::log(2.0));
  }
  return std::min(1.0, 2 * tail);
}

PairedResult compare_paired(std::span<const double> first, std::span<const double> second,
                            uint64_t seed) {
  CAMBIUM_CHECK(first.size() == second.size() && !first.empty());
  PairedResult out;
  out.questions = std::ssize(first);
  out.exact = true;
  std::vector<double> differences;
  for (size_t i = 0; i < first.size(); ++i) {
    differences.push_back(first[i] - second[i]);
    out.only_first += first[i] == 1 && second[i] == 0 ? 1 : 0;
    out.only_second += first[i] == 0 && second[i] == 1 ? 1 : 0;
    const auto whole = [](double score) { return score == 0 || score == 1; };
    out.exact = out.exact && whole(first[i]) && whole(second[i]);
  }
  out.difference = bootstrap_mean(differences, seed);
  out.p =
      out.exact ? mcnemar_exact(out.only_first, out.only_second) : sign_flip_p(differences, seed);
  return out;
}

StoredGrades read_grades(const std::string& path) {
  Grouper grouper;
  double tokens = 0;
  double measured = 0;
  each_json_line(path, [&](const nlohmann::ordered_json& line, int64_t /*number*/) {
    const auto text = line.is_object() ? line.find("question") : line.end();
    expect(line.is_object() && text != line.end() && text->is_string() &&
               line.contains("correct") && line["correct"].is_boolean(),
           "expected an object with 'question' and the grade 'correct' (write the file with -o, or "
           "grade it with --answers)");
    const auto sample = line.find("sample");
    grouper.add(text->get<std::string>(), line["correct"].get<bool>(),
                sample != line.end() && sample->is_number_integer() ? sample->get<int64_t>() : 0);
    const auto length = line.find("tokens");
    if (length != line.end() && length->is_number_integer()) {
      tokens += static_cast<double>(length->get<int64_t>());
      measured += 1;
    }
  });
  expect(!grouper.grades.questions.empty(), "{} has no graded answers", path);
  StoredGrades out = grouper.finish();
  out.mean_tokens = measured > 0 ? tokens / measured : 0.0;
  return out;
}

StoredGrades grades_of(const AccuracyResult& result) {
  Grouper grouper;
  for (const ExampleResult& e : result.examples) {
    grouper.add(e.question, e.correct, e.sample);
  }
  StoredGrades out = grouper.finish();
  out.mean_tokens = result.mean_tokens();
  return out;
}

PairedResult compare_grades(const StoredGrades& first, const StoredGrades& second,
                            const std::string& path) {
  expect(first.questions.size() == second.questions.size(),
         "{}: expected answers to the same {} questions, got {}", path, first.questions.size(),
         second.questions.size());
  for (size_t i = 0; i < first.questions.size(); ++i) {
    expect(
        first.questions[i] == second.questions[i],
        "{}: expected answers to the same questions, but question {} is '{}' there and '{}' here",
        path, i + 1, shortened(second.questions[i], 60), shortened(first.questions[i], 60));
  }
  return compare_paired(first.scores, second.scores);
}

}  // namespace cambium
