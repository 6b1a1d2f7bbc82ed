#include "eval/problems/problems.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "base/random.h"
#include "base/testing.h"
#include "eval/problems/phrases.h"

namespace cambium {
namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> out(1);
  for (const char c : text) {
    if (c == '\n') {
      out.emplace_back();
    } else {
      out.back() += c;
    }
  }
  return out;
}

// A worked step "Tom: 12+7=19", or with owners named "Tom: 12+ Ida 7= Tom 19".
struct Step {
  std::string label;
  std::string from;
  std::string found_by;
  int64_t left = 0;
  char op = 0;
  int64_t right = 0;
  int64_t result = 0;
};

// The number at `at`, which moves behind it; before it may stand " NAME ".
int64_t number_after_name(const char*& at, std::string& name, const std::string& line) {
  if (*at == ' ') {
    const char* space = std::strchr(at + 1, ' ');
    if (space == nullptr) {
      ADD_FAILURE() << line;
      return 0;
    }
    name.assign(at + 1, space);
    at = space + 1;
  }
  char* end = nullptr;
  const int64_t number = std::strtoll(at, &end, 10);
  at = end;
  return number;
}

Step parse_step(const std::string& line) {
  Step step;
  const size_t colon = line.find(": ");
  const char* at = line.c_str() + (colon == std::string::npos ? 0 : colon + 2);
  char* end = nullptr;
  step.left = std::strtoll(at, &end, 10);
  step.op = *end;
  step.label = colon == std::string::npos ? "" : line.substr(0, colon);
  at = end + 1;
  step.right = number_after_name(at, step.from, line);
  EXPECT_EQ(*at, '=') << line;
  ++at;
  step.result = number_after_name(at, step.found_by, line);
  EXPECT_EQ(*at, '\0') << line;
  return step;
}

int64_t compute(const Step& step) {
  switch (step.op) {
    case '+':
      return step.left + step.right;
    case '-':
      return step.left - step.right;
    case '*':
      return step.left * step.right;
    case '/':
      EXPECT_EQ(step.left % step.right, 0);
      return step.left / step.right;
    default:
      ADD_FAILURE() << "operation " << step.op;
      return 0;
  }
}

std::set<int64_t> numbers_in(const std::string& text) {
  std::set<int64_t> out;
  for (size_t i = 0; i < text.size();) {
    size_t end = i;
    while (end < text.size() && text[end] >= '0' && text[end] <= '9') {
      ++end;
    }
    if (end > i) {
      out.insert(std::stoll(text.substr(i, end - i)));
    }
    i = end + 1;
  }
  return out;
}

// The words that stand for numbers.
void add_named_numbers(const std::string& text, std::set<int64_t>& numbers) {
  const std::pair<const char*, int64_t> named[] = {
      {"twice", 2}, {"double", 2}, {"half", 2}, {"third", 3}, {"quarter", 4}};
  for (const auto& [word, n] : named) {
    if (text.find(word) != std::string::npos) {
      numbers.insert(n);
    }
  }
}

struct Range {
  const char* name;
  ProblemSpec spec;
};

std::vector<Range> word_ranges() {
  std::vector<Range> out{{"default", {}},
                         {"one step", {}},
                         {"hardest", {}},
                         {"large numbers", {}},
                         {"looking back", {}}};
  out[1].spec.word = {.min_steps = 1, .max_steps = 1, .distractors = 0};
  out[2].spec.word = {.min_steps = 10,
                      .max_steps = 16,
                      .distractors = 6,
                      .hard = 0.5,
                      .shuffle = 1.0,
                      .lookback = 1.0,
                      .max_number = 30,
                      .max_value = 100,
                      .max_factor = 5};
  out[3].spec.word = {
      .min_steps = 2, .max_steps = 8, .max_number = 5000, .max_value = 100000, .max_factor = 20};
  out[4].spec.word = {
      .lookback = kMostLookback, .max_number = 30, .max_value = 100, .max_factor = 5};
  return out;
}

TEST(WordProblems, StepsAreTrueChainedAndWithinRange) {
  for (const Range& range : word_ranges()) {
    SCOPED_TRACE(range.name);
    const WordSpec& spec = range.spec.word;
    range.spec.validate();
    for (uint64_t index = 0; index < 400; ++index) {
      const Problem problem = make_problem(range.spec, Split::kTrain, 3, index);
      SCOPED_TRACE(problem.question + "\n" + problem.answer);
      std::vector<std::string> lines = lines_of(problem.answer);
      ASSERT_EQ(lines.back(), "#### " + problem.result);
      lines.pop_back();
      ASSERT_EQ(static_cast<int>(lines.size()), problem.steps);
      EXPECT_GE(problem.steps, spec.min_steps);
      EXPECT_LE(problem.steps, spec.max_steps);

      std::set<int64_t> known = numbers_in(problem.question);
      add_named_numbers(problem.question, known);
      int64_t last = 0;
      for (const std::string& line : lines) {
        const Step step = parse_step(line);
        EXPECT_EQ(compute(step), step.result) << line;
        EXPECT_LE(step.result, spec.max_value);
        EXPECT_GT(step.result, 0);
        // Nothing appears from nowhere: each operand is given or was computed before.
        EXPECT_TRUE(known.contains(step.left)) << line;
        EXPECT_TRUE(known.contains(step.right)) << line;
        known.insert(step.result);
        last = step.result;
      }
      EXPECT_EQ(std::to_string(last), problem.result);
      EXPECT_EQ(problem.question.find('{'), std::string::npos);
      EXPECT_EQ(problem.question.back(), '?');
    }
  }
}

// The steps of all forms are the same but for names: of an operand that of an owner who had the
// number.
TEST(WordProblems, NamedOperandsAndResultsAreTheirOwners) {
  ProblemSpec plain;
  plain.word = {.min_steps = 2, .max_steps = 8, .lookback = 4.0, .max_value = 99};
  ProblemSpec spec = plain;
  spec.word.name_operands = true;
  spec.word.name_results = true;
  int computed = 0;
  int given = 0;
  for (uint64_t index = 0; index < 400; ++index) {
    const Problem problem = make_problem(spec, Split::kTrain, 3, index);
    const Problem same = make_problem(plain, Split::kTrain, 3, index);
    SCOPED_TRACE(problem.question + "\n" + problem.answer);
    ASSERT_EQ(problem.question, same.question);
    const std::vector<std::string> lines = lines_of(problem.answer);
    const std::vector<std::string> unnamed = lines_of(same.answer);
    ASSERT_EQ(lines.size(), unnamed.size());
    std::map<std::string, int64_t> value;
    for (size_t i = 0; i + 1 < lines.size(); ++i) {
      const Step step = parse_step(lines[i]);
      const Step without = parse_step(unnamed[i]);
      EXPECT_TRUE(without.from.empty() && without.found_by.empty());
      EXPECT_EQ(std::tie(step.label, step.left, step.op, step.right, step.result),
                std::tie(without.label, without.left, without.op, without.right, without.result));
      EXPECT_EQ(step.found_by, step.label);
      if (!step.from.empty()) {
        EXPECT_NE(problem.question.find(step.from), std::string::npos);
        const auto known = value.find(step.from);
        if (known != value.end()) {
          EXPECT_EQ(step.right, known->second);
        }
        (known != value.end() ? computed : given) += 1;
      }
      value[step.label] = step.result;
    }
  }
  EXPECT_GT(computed, 100);
  EXPECT_GT(given, 100);
}

TEST(WordProblems, EveryStepNumberOccursAndDistractorsAppear) {
  ProblemSpec spec;
  spec.word = {.min_steps = 1, .max_steps = 10, .distractors = 3};
  std::set<int> steps;
  int years = 0;
  for (uint64_t index = 0; index < 400; ++index) {
    const Problem problem = make_problem(spec, Split::kTrain, 5, index);
    steps.insert(problem.steps);
    years += problem.question.find("years old") != std::string::npos ? 1 : 0;
  }
  EXPECT_EQ(steps.size(), 10u);
  EXPECT_GT(years, 20);
  spec.word.distractors = 0;
  for (uint64_t index = 0; index < 100; ++index) {
    EXPECT_EQ(make_problem(spec, Split::kTrain, 5, index).question.find("years old"),
              std::string::npos);
  }
}

TEST(Problems, SameSeedAndIndexGiveTheSameProblem) {
  ProblemSpec spec;
  spec.retrieval_share = 0.5;
  std::set<std::string> seen;
  int retrieval = 0;
  for (uint64_t index = 0; index < 100; ++index) {
    const Problem a = make_problem(spec, Split::kValid, 7, index);
    const Problem b = make_problem(spec, Split::kValid, 7, index);
    EXPECT_EQ(a.question, b.question);
    EXPECT_EQ(a.answer, b.answer);
    EXPECT_NE(a.question, make_problem(spec, Split::kValid, 8, index).question);
    seen.insert(a.question);
    retrieval += a.kind == ProblemKind::kRetrieval ? 1 : 0;
  }
  EXPECT_EQ(seen.size(), 100u);
  EXPECT_NEAR(retrieval, 50, 25);
}

// Whatever the seed, no problem is in two splits: neither its content nor its text.
TEST(Problems, SplitsNeverOverlap) {
  for (const double retrieval_share : {0.0, 0.5}) {
    ProblemSpec spec;
    spec.retrieval_share = retrieval_share;
    spec.word.min_steps = 1;
    spec.retrieval = {.min_chars = 120, .max_chars = 200, .min_facts = 2, .max_facts = 3};
    std::set<uint64_t> identities[3];
    std::set<std::string> questions[3];
    for (const Split split : {Split::kTrain, Split::kValid, Split::kTest}) {
      const auto s = static_cast<size_t>(split);
      for (uint64_t index = 0; index < 3000; ++index) {
        const Problem problem = make_problem(spec, split, 11 + index % 3, index);
        EXPECT_EQ(split_of(problem.identity), split);
        identities[s].insert(problem.identity);
        questions[s].insert(problem.question);
      }
    }
    for (size_t a = 0; a < 3; ++a) {
      for (size_t b = a + 1; b < 3; ++b) {
        for (const uint64_t identity : identities[a]) {
          EXPECT_FALSE(identities[b].contains(identity));
        }
        for (const std::string& question : questions[a]) {
          EXPECT_FALSE(questions[b].contains(question));
        }
      }
    }
  }
}

// Names, things and wording do not make a problem a new one; its numbers and structure do.
TEST(Problems, IdentityIsOfTheContent) {
  const WordSpec spec{
      .min_steps = 1, .max_steps = 1, .distractors = 1, .max_number = 10, .max_value = 20};
  std::set<std::pair<uint64_t, std::string>> by_answer;
  std::set<uint64_t> identities;
  std::set<std::string> questions;
  Rng rng(1, 1);
  for (int k = 0; k < 4000; ++k) {
    const Problem problem = draw_word_problem(spec, rng);
    by_answer.emplace(problem.identity, problem.result);
    identities.insert(problem.identity);
    questions.insert(problem.question);
  }
  EXPECT_EQ(by_answer.size(), identities.size()) << "one identity, two answers";
  EXPECT_LT(identities.size() * 4, questions.size());
}

TEST(RetrievalProblems, AnswerStandsInATextOfTheLength) {
  const RetrievalSpec rows[] = {
      {},
      {.min_chars = 150, .max_chars = 200, .min_facts = 1, .max_facts = 2},
      {.min_chars = 20000, .max_chars = 30000, .min_facts = 600, .max_facts = 600},
      {.min_chars = 3000,
       .max_chars = 3000,
       .min_facts = 8,
       .max_facts = 9,
       .questions = 4,
       .digits = 7},
      {.min_chars = 30000, .max_chars = 30000, .min_facts = 2, .max_facts = 600, .alike = 1.0},
  };
  for (const RetrievalSpec& row : rows) {
    ProblemSpec spec;
    spec.retrieval_share = 1.0;
    spec.retrieval = row;
    spec.validate();
    for (uint64_t index = 0; index < 20; ++index) {
      const Problem problem = make_problem(spec, Split::kTest, 2, index);
      const size_t text = problem.question.rfind(". ") + 1;
      EXPECT_LE(static_cast<int>(text), row.max_chars);
      EXPECT_GE(static_cast<int>(text), row.min_chars - 60);
      std::vector<std::string> lines = lines_of(problem.answer);
      EXPECT_EQ(lines.back(), "#### " + problem.result);
      EXPECT_EQ(static_cast<int>(problem.result.size()), row.digits);
      lines.pop_back();
      EXPECT_GE(lines.size(), 1u);
      EXPECT_LE(static_cast<int>(lines.size()), row.questions);
      for (const std::string& line : lines) {
        const size_t colon = line.find(": ");
        ASSERT_NE(colon, std::string::npos);
        const std::string fact =
            "The code of the " + line.substr(0, colon) + " is " + line.substr(colon + 2) + ".";
        const size_t at = problem.question.find(fact);
        EXPECT_NE(at, std::string::npos) << fact;
        const std::string key = "of the " + line.substr(0, colon) + " is ";
        EXPECT_EQ(problem.question.find(key, at + fact.size()), std::string::npos) << key;
      }
    }
  }
}

TEST(RetrievalProblems, AlikeNamesShareWords) {
  // How many of 200 texts ask for a thing of which another fact has the adjective, or the noun.
  const auto shared = [](double alike) {
    ProblemSpec spec;
    spec.retrieval_share = 1.0;
    spec.retrieval = {
        .min_chars = 400, .max_chars = 400, .min_facts = 2, .max_facts = 9, .alike = alike};
    int count = 0;
    for (uint64_t index = 0; index < 200; ++index) {
      const Problem problem = make_problem(spec, Split::kTrain, 3, index);
      const std::string name = problem.answer.substr(0, problem.answer.find(':'));
      const std::string adjective = "the " + name.substr(0, name.find(' ')) + " ";
      const std::string noun = name.substr(name.find(' ')) + " is";
      const auto often = [&](const std::string& words) {
        const size_t first = problem.question.find(words);
        return problem.question.find(words, first + 1) < problem.question.rfind(". ");
      };
      count += often(adjective) || often(noun) ? 1 : 0;
    }
    return count;
  };
  EXPECT_LT(shared(0.0), 100);
  EXPECT_NEAR(shared(0.5), 130, 35);
  EXPECT_EQ(shared(1.0), 200);
}

TEST(RetrievalProblems, TheNeedleIsAnywhere) {
  ProblemSpec spec;
  spec.retrieval_share = 1.0;
  int quarter[4] = {};
  for (uint64_t index = 0; index < 800; ++index) {
    const Problem problem = make_problem(spec, Split::kTrain, 4, index);
    const size_t at = problem.question.find(" is " + problem.result + ".");
    ++quarter[std::min<size_t>(3, 4 * at / problem.question.rfind(". "))];
  }
  for (const int count : quarter) {
    EXPECT_NEAR(count, 200, 60);
  }
}

TEST(Problems, JsonForms) {
  const Problem problem = make_problem({}, Split::kTrain, 1, 0);
  const auto plain = nlohmann::json::parse(problem_json(problem, ProblemFormat::kQuestionAnswer));
  EXPECT_EQ(plain["question"], problem.question);
  EXPECT_EQ(plain["answer"], problem.answer);
  const auto chat = nlohmann::json::parse(problem_json(problem, ProblemFormat::kMessages));
  ASSERT_EQ(chat["messages"].size(), 2u);
  EXPECT_EQ(chat["messages"][0]["role"], "user");
  EXPECT_EQ(chat["messages"][0]["content"], problem.question);
  EXPECT_EQ(chat["messages"][1]["role"], "assistant");
  EXPECT_EQ(chat["messages"][1]["content"], problem.answer);
}

TEST(Problems, WrongParametersAreNamed) {
  struct Row {
    const char* expected;
    void (*spoil)(ProblemSpec&);
  };
  const Row rows[] = {
      {"min_steps", [](ProblemSpec& s) { s.word.min_steps = 0; }},
      {"max_steps", [](ProblemSpec& s) { s.word.max_steps = kMaxSteps + 1; }},
      {"min_steps", [](ProblemSpec& s) { s.word.max_steps = 1; }},
      {"distractors", [](ProblemSpec& s) { s.word.distractors = -1; }},
      {"hard", [](ProblemSpec& s) { s.word.hard = 1.5; }},
      {"shuffle", [](ProblemSpec& s) { s.word.shuffle = -0.1; }},
      {"lookback", [](ProblemSpec& s) { s.word.lookback = 10.1; }},
      {"max_number", [](ProblemSpec& s) { s.word.max_number = 3; }},
      {"max_value", [](ProblemSpec& s) { s.word.max_value = 20; }},
      {"max_factor", [](ProblemSpec& s) { s.word.max_factor = 1; }},
      {"retrieval_share", [](ProblemSpec& s) { s.retrieval_share = 2; }},
      {"min_chars", [](ProblemSpec& s) { s.retrieval.min_chars = 10; }},
      {"max_facts", [](ProblemSpec& s) { s.retrieval.max_facts = 100000; }},
      {"questions", [](ProblemSpec& s) { s.retrieval.questions = 5; }},
      {"digits", [](ProblemSpec& s) { s.retrieval.digits = 0; }},
      {"alike", [](ProblemSpec& s) { s.retrieval.alike = 1.5; }},
  };
  for (const Row& row : rows) {
    ProblemSpec spec;
    row.spoil(spec);
    const std::string message = testing::error_of([&] { spec.validate(); });
    EXPECT_NE(message.find(row.expected), std::string::npos) << message;
  }
  EXPECT_NO_THROW(ProblemSpec{}.validate());
  EXPECT_THROW(parse_split("testing"), Error);
  EXPECT_EQ(parse_split("valid"), Split::kValid);
}

}  // namespace
}  // namespace cambium
