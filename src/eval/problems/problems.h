// Seeded problems without end: grade-school word problems with worked steps, and retrieval of one
// fact from a long text. Problem i of a seed is always the same one, and a problem belongs to one
// split for ever, so what is trained on can never be what is tested.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace cambium {

class Rng;

enum class Split { kTrain, kValid, kTest };

/// "train", "valid" or "test"; anything else is an Error.
Split parse_split(std::string_view name);
std::string_view split_name(Split split);

// The defaults below are the range of the teacher that ships with the project.

inline constexpr double kMostLookback = 10.0;

/// Word problems: a chain of quantities, each found from the ones before it by one computation.
struct WordSpec {
  int min_steps = 2;     // computations from the given facts to the answer
  int max_steps = 4;     //
  int distractors = 1;   // at most so many sentences that do not matter
  double hard = 0.0;     // chance that a distractor is one more quantity of the same kind
  double shuffle = 0.0;  // chance that the facts come in any order
  // How often a step needs more than the result before it: 0 never, 1 in a seventh of the facts and
  // half of the questions, kMostLookback in most.
  double lookback = 0.0;
  // Steps name the owner whose quantity they take ("Zoe: 4+ Ida 5=9"), so that who is looked for is
  // written before what is found, and the owner of what they find ("Zoe: 4+5= Zoe 9"), so that it
  // stands beside what will be looked for.
  bool name_operands = false;
  bool name_results = false;
  int max_number = 12;  // the largest number that the text gives
  int max_value = 60;   // the largest result of any step
  int max_factor = 3;   // the largest factor of "5 times as many"

  bool operator==(const WordSpec&) const = default;
};

/// Retrieval: facts "The code of the red lantern is 4821." among sentences that say nothing, then a
/// question on one of them, at a uniformly random place.
struct RetrievalSpec {
  int min_chars = 100;  // length of the text, in characters: uniform between the two
  int max_chars = 600;
  int min_facts = 2;  // so many facts, as far as they fit into the length; filler for the rest
  int max_facts = 6;
  int questions = 1;   // at most so many facts are asked for at once; the last one is the answer
  int digits = 2;      // of each value
  double alike = 0.0;  // chance that the names of a text share their words, as far as they can

  bool operator==(const RetrievalSpec&) const = default;
};

struct ProblemSpec {
  double retrieval_share = 0.0;  // chance that a problem is one of retrieval
  WordSpec word;
  RetrievalSpec retrieval;

  /// Error naming the first parameter that cannot be.
  void validate() const;
  bool operator==(const ProblemSpec&) const = default;
};

enum class ProblemKind { kWord, kRetrieval };

struct Problem {
  ProblemKind kind = ProblemKind::kWord;
  std::string question;
  std::string answer;     // the worked steps, one per line, then "#### 42"
  std::string result;     // "42"
  int steps = 0;          // computations (word) or facts asked for (retrieval)
  uint64_t identity = 0;  // of the content: structure and numbers, not names or wording
};

/// The split of a problem, from its identity alone: 90 % train, 5 % valid, 5 % test.
Split split_of(uint64_t identity);

/// Problem `index` of the seed in that split. Deterministic; the spec must be valid.
Problem make_problem(const ProblemSpec& spec, Split split, uint64_t seed, uint64_t index);

enum class ProblemFormat { kQuestionAnswer, kMessages };

/// One line of JSON, without the newline: {"question", "answer"}, or with kMessages
/// {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}.
std::string problem_json(const Problem& problem, ProblemFormat format);

/// One draw of each kind, of whatever split it falls into.
Problem draw_word_problem(const WordSpec& spec, Rng& rng);
Problem draw_retrieval_problem(const RetrievalSpec& spec, Rng& rng);

}  // namespace cambium
