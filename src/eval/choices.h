// Questions with options: how they are read, lettered, shuffled and turned, and what is asked of a
// model that only gives probabilities.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

/// What lm-evaluation-harness puts before a model and lets it continue with.
enum class ChoiceStyle : uint8_t {
  kOptions,      // "Question: Q\nAnswer:", " option" (ARC)
  kEndings,      // "Q", " option" (HellaSwag)
  kLetters,      // "Q\nA. option\n...\nAnswer:", " A" (MMLU)
  kParentheses,  // "What is the correct answer to this question:Q\nChoices:\n(A) option\n...
                 // Answer:", " (A)" (GPQA)
};

struct ChoiceQuestion {
  std::string stem;                  // the question, without its options
  std::vector<std::string> options;  // at least two, at most 26
  int64_t correct = 0;               // which of them is right
  std::string preamble{};            // of MMLU, before the question: what the subject is
};

/// "A", "B", ...
std::string choice_letter(int64_t index);

/// One line of a public form: ARC (choices with text and label, answerKey), HellaSwag (ctx or ctx_a
/// and ctx_b, endings, label), MMLU and our own (question, choices, answer: which from 0, a letter,
/// or one of the choices). Error for a line that has no right answer.
ChoiceQuestion read_arc(const nlohmann::json& line);
ChoiceQuestion read_hellaswag(const nlohmann::json& line);
ChoiceQuestion read_choices(const nlohmann::json& line);

/// GPQA's public table, with the columns "Question", "Correct Answer", "Incorrect Answer 1" to 3
/// and any others. Question i's options come in an order that (seed, i) alone decides.
std::vector<ChoiceQuestion> read_gpqa(std::string_view csv, const std::string& origin,
                                      uint64_t seed, int64_t limit);

/// Every option `turns` places further down, the last ones first.
ChoiceQuestion rotated(const ChoiceQuestion& question, int64_t turns);

/// The question as a model is asked that answers in words: the options lettered, and a last line
/// that says how the answer is to end ("Answer: X").
std::string lettered_question(const ChoiceQuestion& question);

/// What a model of probabilities reads, and one continuation an option.
struct ChoicePrompt {
  std::string context;
  std::vector<std::string> continuations;
};
ChoicePrompt choice_prompt(const ChoiceQuestion& question, ChoiceStyle style);

}  // namespace cambium
