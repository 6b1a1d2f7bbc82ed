#include "eval/problems/problems.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/random.h"
#include "eval/problems/phrases.h"

namespace cambium {
namespace {

void check_range(std::string_view what, int64_t low, int64_t high, int64_t least, int64_t most) {
  expect(low >= least && low <= high && high <= most,
         "[problems] expected {} <= min_{} <= max_{} <= {}, got {} and {}", least, what, what, most,
         low, high);
}

void check_number(std::string_view name, int64_t value, int64_t least, int64_t most) {
  expect(value >= least && value <= most, "[problems] expected {} in {}..{}, got {}", name, least,
         most, value);
}

void check_chance(std::string_view name, double value) {
  expect(value >= 0.0 && value <= 1.0, "[problems] expected {} in 0..1, got {}", name, value);
}

}  // namespace

Split parse_split(std::string_view name) {
  for (const Split split : {Split::kTrain, Split::kValid, Split::kTest}) {
    if (name == split_name(split)) {
      return split;
    }
  }
  fail("[problems] expected a split train, valid or test, got '{}'", name);
}

std::string_view split_name(Split split) {
  switch (split) {
    case Split::kTrain:
      return "train";
    case Split::kValid:
      return "valid";
    case Split::kTest:
      return "test";
  }
  CAMBIUM_CHECK(false, "no such split");
}

void ProblemSpec::validate() const {
  check_chance("retrieval_share", retrieval_share);
  check_range("steps", word.min_steps, word.max_steps, 1, kMaxSteps);
  check_number("distractors", word.distractors, 0, kMaxDistractors);
  check_chance("hard", word.hard);
  check_chance("shuffle", word.shuffle);
  expect(word.lookback >= 0.0 && word.lookback <= kMostLookback,
         "[problems] expected lookback in 0..{:g}, got {}", kMostLookback, word.lookback);
  check_number("max_number", word.max_number, 10, 100000);
  check_number("max_value", word.max_value, 2 * word.max_number, 1000000);
  check_number("max_factor", word.max_factor, 2, 1000);
  check_range("chars", retrieval.min_chars, retrieval.max_chars, 100, 100000000);
  check_range("facts", retrieval.min_facts, retrieval.max_facts, 1, max_retrieval_facts());
  check_number("questions", retrieval.questions, 1, retrieval.min_facts);
  check_number("digits", retrieval.digits, 1, 9);
  check_chance("alike", retrieval.alike);
  const int need = retrieval.questions * kFactChars;
  expect(
      retrieval.min_chars >= need,
      "[problems] {} questions need facts of about {} characters, got min_chars {}; ask fewer or "
      "make the text longer",
      retrieval.questions, need, retrieval.min_chars);
}

Split split_of(uint64_t identity) {
  const uint64_t part = mix_seed(identity, 0x73706C6974) % 100;
  return part < 90 ? Split::kTrain : part < 95 ? Split::kValid : Split::kTest;
}

Problem make_problem(const ProblemSpec& spec, Split split, uint64_t seed, uint64_t index) {
  const uint64_t key = mix_seed(seed, static_cast<uint64_t>(split));
  Rng rng(key, index);
  const bool retrieval = rng.chance(spec.retrieval_share);
  // A draw lands in the split with chance 5 % at least: 2000 misses in a row do not happen.
  for (int attempt = 0; attempt < 2000; ++attempt) {
    Problem problem =
        retrieval ? draw_retrieval_problem(spec.retrieval, rng) : draw_word_problem(spec.word, rng);
    if (split_of(problem.identity) == split) {
      return problem;
    }
  }
  fail("[problems] found no {} problem in 2000 draws: so narrow a range has none; widen it",
       split_name(split));
}

std::string problem_json(const Problem& problem, ProblemFormat format) {
  using nlohmann::ordered_json;
  ordered_json line;
  if (format == ProblemFormat::kMessages) {
    line["messages"] = {
        ordered_json{{"role", "user"}, {"content", problem.question}},
        ordered_json{{"role", "assistant"}, {"content", problem.answer}},
    };
  } else {
    line["question"] = problem.question;
    line["answer"] = problem.answer;
  }
  return line.dump();
}

}  // namespace cambium
