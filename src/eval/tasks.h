// The public benchmarks, read in the form in which they are published, and our own problems.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "eval/choices.h"
#include "eval/graders.h"

namespace cambium {

struct Example {
  std::string question;
  std::string answer;    // the final answer alone; of mbpp, the tests
  std::string solution;  // the worked solution where the data has one, else empty
  /// Of a question with options, which `question` shows lettered and `answer` has the letter of.
  ChoiceQuestion choice{};
  /// How lm-evaluation-harness asks, where that is not made of `question` (MBPP).
  std::string harness{};
};

struct Task {
  std::string name;  // the form's name
  AnswerForm form = AnswerForm::kNumber;
  std::vector<Example> examples;
  Extraction extraction = Extraction::kOwn;
  ChoiceStyle style = ChoiceStyle::kOptions;  // of AnswerForm::kLetter, asked by likelihood
};

/// The forms: gsm8k (question, answer ending in "#### 42"; also what `cambium data` writes, with
/// question and answer or with messages), math500, aime, svamp, mawps, asdiv, mbpp; with options
/// gpqa (its CSV table), arc, hellaswag, mmlu and choices (question, choices, answer).
const std::vector<std::string>& task_forms();

/// Reads JSON lines, or one array of objects. `form` is one of task_forms(), or "auto" to tell by
/// the first line's keys. `limit` examples at most, from the start; 0 is all. `seed` shuffles the
/// options of gpqa, the only form that does not say their order. Errors name the file and the line.
Task load_task(std::string_view form, const std::string& path, int64_t limit = 0,
               uint64_t seed = 1);

/// The same from text that is already in memory; `origin` names it in errors.
Task parse_task(std::string_view form, std::string_view lines, const std::string& origin,
                int64_t limit = 0, uint64_t seed = 1);

Grade grade(const Task& task, std::string_view response, const Example& example);

}  // namespace cambium
