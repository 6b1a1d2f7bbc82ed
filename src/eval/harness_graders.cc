// Answers found and compared as lm-evaluation-harness (0.4.13) does it, quirks included: scores
// that are to stand beside published ones need the same extraction, not a better one.
#include <algorithm>
#include <array>
#include <cctype>

#include "base/error.h"
#include "base/text.h"
#include "eval/graders.h"
#include "eval/math_expression.h"
#include "eval/text_edit.h"

namespace cambium {
namespace {

/// "#### (\-?[0-9\.\,]+)", the first.
std::optional<std::string> strict_match(std::string_view text) {
  for (size_t at = text.find("#### "); at != std::string_view::npos;
       at = text.find("#### ", at + 1)) {
    const size_t begin = at + 5;
    size_t end = begin + (text.substr(begin, 1) == "-" ? 1 : 0);
    const size_t digits = end;
    while (end < text.size() && (is_digit(text[end]) || text[end] == '.' || text[end] == ',')) {
      ++end;
    }
    if (end > digits) {
      return std::string(text.substr(begin, end - begin));
    }
  }
  return std::nullopt;
}

/// "(-?[$0-9.,]{2,})|(-?[0-9]+)", the last of those that do not overlap, from the left.
std::optional<std::string> flexible_extract(std::string_view text) {
  std::optional<std::string> last;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at + (text[at] == '-' ? 1 : 0);
    size_t end = begin;
    while (end < text.size() &&
           (is_digit(text[end]) || text[end] == '$' || text[end] == '.' || text[end] == ',')) {
      ++end;
    }
    if (end >= begin + 2 || (end == begin + 1 && is_digit(text[begin]))) {
      last = std::string(text.substr(at, end - at));
      at = end;
    } else {
      ++at;
    }
  }
  return last;
}

/// What exact_match leaves out in gsm8k.
std::string plain_number(std::string text) {
  std::erase(text, ',');
  std::erase(text, '$');
  const size_t hashes = text.rfind("#### ");
  if (hashes != std::string::npos) {
    text.erase(0, hashes + 5);
  }
  if (text.ends_with('.')) {
    text.pop_back();
  }
  return text;
}

/// \frac12 with braces; nothing where hendrycks_math's own code fails.
std::optional<std::string> fix_fracs(const std::string& text) {
  std::string out;
  size_t at = text.find("\\frac");
  out = text.substr(0, at);
  while (at != std::string::npos) {
    const size_t begin = at + 5;
    at = text.find("\\frac", begin);
    const std::string piece = text.substr(begin, at == std::string::npos ? at : at - begin);
    out += "\\frac";
    if (piece.empty()) {
      return std::nullopt;
    }
    if (piece[0] == '{') {
      out += piece;
      continue;
    }
    if (piece.size() < 2) {
      return text;
    }
    out += std::string("{") + piece[0] + "}";
    out += piece[1] == '{' ? piece.substr(1) : std::string("{") + piece[1] + "}" + piece.substr(2);
  }
  return out;
}

std::optional<std::string> fix_sqrt(const std::string& text) {
  size_t at = text.find("\\sqrt");
  std::string out = text.substr(0, at);
  while (at != std::string::npos) {
    const size_t begin = at + 5;
    at = text.find("\\sqrt", begin);
    const std::string piece = text.substr(begin, at == std::string::npos ? at : at - begin);
    if (piece.empty()) {
      return std::nullopt;
    }
    out += piece[0] == '{' ? "\\sqrt" + piece
                           : std::string("\\sqrt{") + piece[0] + "}" + piece.substr(1);
  }
  return out;
}

bool is_python_int(std::string_view text) {
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) {
    text.remove_prefix(1);
  }
  return !text.empty() && std::all_of(text.begin(), text.end(), is_digit);
}

/// strip_string of hendrycks_math; nothing where its code raises an exception.
std::optional<std::string> strip_string(std::string text) {
  std::erase(text, '\n');
  for (const auto& [from, to] : {std::pair{"\\!", ""},
                                 {"\\\\", "\\"},
                                 {"tfrac", "frac"},
                                 {"dfrac", "frac"},
                                 {"\\left", ""},
                                 {"\\right", ""},
                                 {"^{\\circ}", ""},
                                 {"^\\circ", ""},
                                 {"\\$", ""}}) {
    replace_all(text, from, to);
  }
  const size_t unit = text.find("\\text{ ");
  if (unit != std::string::npos) {
    if (text.find("\\text{ ", unit + 1) != std::string::npos) {
      return std::nullopt;
    }
    text.erase(unit);
  }
  replace_all(text, "\\%", "");
  replace_all(text, " .", " 0.");
  replace_all(text, "{.", "{0.");
  if (text.empty()) {
    return text;
  }
  if (text[0] == '.') {
    text = "0" + text;
  }
  const size_t equals = text.find('=');
  if (equals <= 2 && text.find('=', equals + 1) == std::string::npos) {
    text.erase(0, equals + 1);
  }
  std::optional<std::string> fixed = fix_sqrt(text);
  if (!fixed) {
    return std::nullopt;
  }
  std::erase(*fixed, ' ');
  fixed = fix_fracs(*fixed);
  if (!fixed) {
    return std::nullopt;
  }
  if (*fixed == "0.5") {
    fixed = "\\frac{1}{2}";
  }
  if (std::count(fixed->begin(), fixed->end(), '/') == 1) {
    const size_t slash = fixed->find('/');
    const std::string above = fixed->substr(0, slash);
    const std::string below = fixed->substr(slash + 1);
    if (!is_python_int(above) || !is_python_int(below)) {
      return std::nullopt;
    }
    const auto plain = [](const std::string& number) {
      return is_digit(number[0]) || number[0] == '-'
                 ? number.find_first_not_of("-") != std::string::npos &&
                       (number.size() == 1 || number[number[0] == '-' ? 1 : 0] != '0')
                 : false;
    };
    if (plain(above) && plain(below)) {
      fixed = "\\frac{" + above + "}{" + below + "}";
    }
  }
  return fixed;
}

Grade hendrycks(std::string_view response, std::string_view expected) {
  const size_t open = response.find('$');
  const size_t close = response.rfind('$');
  Grade out;
  out.given = std::string(open == close ? response : response.substr(open + 1, close - open - 1));
  out.answered = open != close;
  const std::optional<std::string> x = strip_string(out.given);
  const std::optional<std::string> y = strip_string(std::string(expected));
  out.correct = x && y ? *x == *y : out.given == expected;
  return out;
}

/// The replacements of appendix D of Lewkowycz et al. (2022), "Solving quantitative reasoning
/// problems with language models".
constexpr std::array<std::pair<std::string_view, std::string_view>, 10> kSubstitutions = {
    {{"an ", ""},
     {"a ", ""},
     {".$", "$"},
     {"\\$", ""},
     {"\\ ", ""},
     {" ", ""},
     {"mbox", "text"},
     {",\\text{and}", ","},
     {"\\text{and}", ","},
     {"\\text{m}", "\\text{}"}}};
constexpr std::string_view kUnitWords[] = {
    "square",   "ways",    "integers", "dollars",  "mph",
    "inches",   "ft",      "hours",    "km",       "units",
    "sue",      "points",  "feet",     "minutes",  "digits",
    "cents",    "degrees", "cm",       "gm",       "pounds",
    "meters",   "meals",   "edges",    "students", "childrentickets",
    "multiples"};
constexpr std::string_view kMarks[] = {"\\ldots",      "\\text{s}",  "\\text{.}",  "\\text{\ns}",
                                       "\\text{}^2",   "\\text{}^3", "\\text{\n}", "\\text{}",
                                       "\\mathrm{th}", "^\\circ",    "^{\\circ}",  "\\;",
                                       ",\\!",         "{,}",        "\"",         "\\dots"};

/// Takes `word` out of the text: only whole words, or everywhere but in the names of commands.
void erase_word(std::string& text, std::string_view word, bool whole) {
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at)) {
    bool goes = false;
    if (whole) {
      const size_t end = at + word.size();
      goes = (at == 0 || (text[at - 1] != '\\' && !is_word(text[at - 1]))) &&
             (end == text.size() || !is_word(text[end]));
    } else {
      size_t begin = at;
      while (begin > 0 && is_letter(text[begin - 1])) {
        --begin;
      }
      goes = begin == 0 || text[begin - 1] != '\\';
    }
    if (goes) {
      text.erase(at, word.size());
    } else {
      ++at;
    }
  }
}

/// "\command{X}" -> "X", up to the next brace or to the last one.
void unwrap(std::string& text, std::string_view command, bool greedy) {
  for (size_t at = text.find(command); at != std::string::npos; at = text.find(command, at)) {
    const size_t open = at + command.size();
    const size_t close = greedy ? text.rfind('}') : text.find('}', open);
    if (close == std::string::npos || close < open) {
      return;
    }
    text.erase(close, 1);
    text.erase(at, command.size());
  }
}

std::string normalise_final_answer(std::string_view raw) {
  const size_t equals = raw.rfind('=');
  std::string text(equals == std::string_view::npos ? raw : raw.substr(equals + 1));
  for (const std::string_view word : kUnitWords) {
    erase_word(text, word, true);
  }
  for (const auto& [from, to] : kSubstitutions) {
    replace_all(text, from, to);
  }
  for (const std::string_view word : kUnitWords) {
    erase_word(text, word, false);
  }
  for (const std::string_view mark : kMarks) {
    replace_all(text, mark, "");
  }
  const size_t open = text.find('$');
  const size_t close = open == std::string::npos ? open : text.find('$', open + 1);
  if (close != std::string::npos) {
    text = text.substr(open, close - open + 1);
  }
  unwrap(text, "\\text{", false);
  unwrap(text, "\\textbf{", false);
  unwrap(text, "\\overline{", false);
  unwrap(text, "\\boxed{", true);
  for (size_t at = text.find("frac"); at != std::string::npos; at = text.find("frac", at + 4)) {
    if (at + 5 < text.size() && text[at + 4] != '{') {
      text.replace(at + 4, 2, std::string("{") + text[at + 4] + "}{" + text[at + 5] + "}");
    }
  }
  for (size_t at = text.find("sqrt"); at != std::string::npos; at = text.find("sqrt", at + 4)) {
    size_t argument = at + 4;
    if (argument < text.size() && text[argument] == '[') {
      argument = text.find(']', argument);
      argument = argument == std::string::npos ? text.size() : argument + 1;
    }
    if (argument < text.size() && text[argument] != '{') {
      text.replace(argument, 1, std::string("{") + text[argument] + "}");
    }
  }
  std::erase(text, '$');
  // Only a whole number in groups of three loses its commas: "0,1" is two answers.
  const size_t sign = text.starts_with('-') ? 1 : 0;
  const size_t first = text.find(',');
  bool grouped = first != std::string::npos && first > sign && first - sign <= 3 &&
                 (text.size() - first) % 4 == 0;
  for (size_t i = sign; grouped && i < text.size(); ++i) {
    grouped = i >= first && (i - first) % 4 == 0 ? text[i] == ',' : is_digit(text[i]);
  }
  if (grouped) {
    std::erase(text, ',');
  }
  return text;
}

Grade minerva(std::string_view response, std::string_view expected) {
  constexpr std::string_view kBegin = "Final Answer: The final answer is";
  constexpr std::string_view kEnd = " I hope it is correct.";
  const std::string text = std::string(response) + "I hope it is correct.";
  Grade out;
  for (size_t at = text.find(kBegin); at != std::string::npos; at = text.find(kBegin, at + 1)) {
    const size_t begin = at + kBegin.size();
    const size_t end = text.find(kEnd, begin + 1);
    if (end != std::string::npos && text.find('\n', begin) >= end) {
      out.answered = true;
      out.given = std::string(trim(std::string_view(text).substr(begin, end - 1 - begin)));
      break;
    }
  }
  if (!out.answered) {
    return out;
  }
  const std::string x = normalise_final_answer(out.given);
  const std::string y = normalise_final_answer(expected);
  out.correct = !x.empty() && (x == y || same_expression(x, y));
  return out;
}

}  // namespace

const std::vector<std::string>& extraction_names() {
  static const std::vector<std::string> kNames = {"own", "strict", "flexible", "hendrycks",
                                                  "minerva"};
  return kNames;
}

Extraction parse_extraction(std::string_view name, AnswerForm form) {
  const auto& names = extraction_names();
  const auto at = std::find(names.begin(), names.end(), name);
  expect(at != names.end(), "no extraction '{}'{}; there are {}", name, did_you_mean(name, names),
         join(names, ", "));
  const auto found = static_cast<Extraction>(at - names.begin());
  const bool of_numbers = found == Extraction::kStrict || found == Extraction::kFlexible;
  const bool fits = found == Extraction::kOwn ||
                    (of_numbers ? form == AnswerForm::kNumber || form == AnswerForm::kInteger
                                : form == AnswerForm::kMath || form == AnswerForm::kInteger);
  expect(fits, "extraction '{}' is for answers that are {}; leave it away for this task", name,
         of_numbers ? "numbers (gsm8k, ...)" : "mathematics (math500, aime)");
  return found;
}

Grade grade_like_harness(Extraction extraction, std::string_view response,
                         std::string_view expected) {
  if (extraction == Extraction::kHendrycks) {
    return hendrycks(response, expected);
  }
  if (extraction == Extraction::kMinerva) {
    return minerva(response, expected);
  }
  CAMBIUM_CHECK(extraction != Extraction::kOwn);
  const std::optional<std::string> given =
      extraction == Extraction::kStrict ? strict_match(response) : flexible_extract(response);
  Grade out;
  if (given) {
    out.answered = true;
    out.given = *given;
    out.correct = plain_number(*given) == plain_number(std::string(expected));
  }
  return out;
}

}  // namespace cambium
