// Whether a response has the right final answer: finding it in the text, and comparing it with the
// expected one as a number, as mathematics or as words.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

/// What the answers of a task are.
enum class AnswerForm {
  kNumber,   // a number; a word, a time or a ratio where the expected answer is one (ASDiv)
  kInteger,  // a whole number, leading zeros allowed (AIME)
  kMath,     // mathematics written in LaTeX (MATH)
  kPython,   // a program; what is expected are the tests it must pass (MBPP)
  kLetter,   // of an option, as a capital (GPQA, MMLU)
  kWords,    // all of the expected words, anywhere in the response (RULER)
};

/// How an answer is found and compared. Everything but kOwn is what a reference harness does, for
/// numbers that are to stand beside its own.
enum class Extraction : uint8_t {
  kOwn,        // "####", \boxed, "the answer is", then the last number; compared by value
  kStrict,     // lm-evaluation-harness gsm8k strict-match: the first "#### 42"
  kFlexible,   // and flexible-extract: the last number
  kHendrycks,  // hendrycks_math: between the first and the last $, equal after strip_string
  kMinerva,    // minerva_math: "Final Answer: The final answer is X. I hope it is correct."
};
const std::vector<std::string>& extraction_names();
/// Error unless it is one of extraction_names() and goes with answers of the form.
Extraction parse_extraction(std::string_view name, AnswerForm form);

struct Grade {
  bool correct = false;
  bool answered = false;  // a final answer was found, right or wrong
  std::string given;      // as found in the response
};

/// Compares the response's final answer with `expected`. kPython: runs the response's code and then
/// the statements of `expected` in a sandbox (sandbox.h), `given` is "passed" or what went wrong.
Grade grade(AnswerForm form, std::string_view response, std::string_view expected,
            Extraction extraction = Extraction::kOwn);

/// The same as a reference harness does it; not kOwn.
Grade grade_like_harness(Extraction extraction, std::string_view response,
                         std::string_view expected);

/// Runs the response's code, then `tests` (Python statements), each as a file of its own.
Grade grade_python(std::string_view response, std::string_view tests);

/// The program in a response: the first fenced block that defines something, or the first block, or
/// without fences everything from the first line of code on; nothing where there is no code.
std::optional<std::string> python_code(std::string_view response);

/// What follows the last "####", to the end of its line; without one the content of the last
/// \boxed{...}; without either nothing.
std::optional<std::string> marked_answer(std::string_view response);

/// The last number of the text as a plain literal: "-1,234.50" gives "-1234.50". A dot that ends a
/// sentence is not part of it, nor is a minus between two operands.
std::optional<std::string> last_number(std::string_view text);

/// The value of "12", "-1,234.5", "3/4", "\frac{3}{4}" or "1\frac{4}{5}"; nothing for anything
/// else.
std::optional<double> number_value(std::string_view text);

/// LaTeX in one way of writing: no spaces, sizes, units, dollars, degrees or thousands' commas;
/// \frac and \sqrt with braces; without a leading "x=". Idempotent.
std::string normalise_math(std::string_view latex);

/// Equal in writing after normalise_math, as formulas (math_expression.h), or part by part: tuples
/// and intervals in order, sets and bare lists in any, unions, matrices by their cells, both values
/// of \pm, equations up to a factor, inequalities as intervals.
bool same_math(std::string_view a, std::string_view b);

}  // namespace cambium
