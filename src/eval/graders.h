// Whether a response has the right final answer: finding it in the text, and comparing it with the
// expected one as a number, as mathematics or as words.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace cambium {

/// What the answers of a task are.
enum class AnswerForm {
  kNumber,   // a number; a word, a time or a ratio where the expected answer is one (ASDiv)
  kInteger,  // a whole number, leading zeros allowed (AIME)
  kMath,     // mathematics written in LaTeX (MATH)
  kPython,   // a program; what is expected are the tests it must pass (MBPP)
};

struct Grade {
  bool correct = false;
  bool answered = false;  // a final answer was found, right or wrong
  std::string given;      // as found in the response
};

/// Compares the response's final answer with `expected`. kPython: runs the response's code and then
/// the statements of `expected` in a sandbox (sandbox.h), `given` is "passed" or what went wrong.
Grade grade(AnswerForm form, std::string_view response, std::string_view expected);

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

/// Equal as numbers, in writing after normalise_math, or element by element as tuples, intervals
/// and (in any order) bare lists. Non-goal: algebra; "x+1" and "1+x" differ.
bool same_math(std::string_view a, std::string_view b);

}  // namespace cambium
