#include "eval/graders.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "eval/text_edit.h"

namespace cambium {
namespace {

bool is_space(char c) {
  return std::isspace(static_cast<unsigned char>(c)) != 0;
}

/// The index after the brace that closes the one at `open`; npos when none does.
size_t after_group(std::string_view text, size_t open) {
  int depth = 0;
  for (size_t i = open; i < text.size(); ++i) {
    depth += text[i] == '{' ? 1 : text[i] == '}' ? -1 : 0;
    if (depth == 0) {
      return i + 1;
    }
  }
  return std::string_view::npos;
}

std::optional<double> literal_value(std::string_view text) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value, std::chars_format::fixed);
  if (error != std::errc() || at != end || !std::isfinite(value)) {
    return std::nullopt;
  }
  return value;
}

/// 1,234,567 without its commas; any other text as it is.
std::string without_thousands(std::string_view text) {
  std::string out;
  size_t digits = 0;
  bool grouped = false;
  const size_t whole = std::min(text.find('.'), text.size());
  for (size_t i = 0; i < whole; ++i) {
    if (text[i] == ',') {
      if (digits == 0 || digits > 3 || (grouped && digits != 3)) {
        return std::string(text);
      }
      grouped = true;
      digits = 0;
    } else if (is_digit(text[i])) {
      ++digits;
      out += text[i];
    } else if (i == 0 && (text[i] == '-' || text[i] == '+')) {
      out += text[i];
    } else {
      return std::string(text);
    }
  }
  if (!grouped || digits != 3) {
    return std::string(text);
  }
  return out.append(text.substr(whole));
}

/// The braced group or the single character at `at`, and the place after it.
std::pair<std::string_view, size_t> argument(std::string_view text, size_t at) {
  if (at < text.size() && text[at] == '{') {
    const size_t end = after_group(text, at);
    if (end != std::string_view::npos) {
      return {text.substr(at + 1, end - at - 2), end};
    }
  }
  return {text.substr(std::min(at, text.size()), 1), std::min(at + 1, text.size())};
}

/// \frac43 and \sqrt2 with the braces that they leave out.
std::string with_braces(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    int arguments = 0;
    if (text.substr(i, 5) == "\\frac") {
      arguments = 2;
    } else if (text.substr(i, 5) == "\\sqrt" && text.substr(i + 5, 1) != "[") {
      arguments = 1;
    }
    if (arguments == 0) {
      out += text[i++];
      continue;
    }
    out += text.substr(i, 5);
    i += 5;
    for (; arguments > 0; --arguments) {
      const auto [inside, end] = argument(text, i);
      out += "{" + with_braces(inside) + "}";
      i = end;
    }
  }
  return out;
}

constexpr std::string_view kTextCommands[] = {"\\text{", "\\textbf{", "\\mbox{", "\\mathrm{",
                                              "\\textrm{"};

/// Drops a unit at the end ("15\mbox{ cm}^2", "90 degrees"); words that are the answer stay.
std::string without_unit(std::string text) {
  for (const std::string_view command : kTextCommands) {
    const size_t at = text.rfind(command);
    if (at == std::string::npos || trim(std::string_view(text).substr(0, at)).empty()) {
      continue;
    }
    const size_t end = after_group(text, at + command.size() - 1);
    if (end == std::string::npos) {
      continue;
    }
    const std::string_view rest = trim(std::string_view(text).substr(end));
    if (rest.empty() || rest[0] == '^') {
      text.erase(at);
    }
  }
  const std::string_view all = trim(text);
  const size_t space = all.find(' ');
  if (space != std::string_view::npos && number_value(all.substr(0, space)) &&
      std::all_of(all.begin() + static_cast<int64_t>(space), all.end(),
                  [](char c) { return is_letter(c) || is_space(c); })) {
    return std::string(all.substr(0, space));
  }
  return std::string(all);
}

/// The words of \text{...} without the command.
void unwrap_text(std::string& text) {
  for (const std::string_view command : kTextCommands) {
    for (size_t at = text.find(command); at != std::string::npos; at = text.find(command)) {
      const size_t end = after_group(text, at + command.size() - 1);
      if (end != std::string::npos) {
        text.erase(end - 1, 1);
      }
      text.erase(at, command.size());
    }
  }
}

/// Letters and digits only, in lower case: how words are compared.
std::string plain_words(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (is_letter(c) || is_digit(c) || c == ':' || c == '/' || (c == '-' && out.empty())) {
      out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  return out;
}

std::string_view last_line(std::string_view text) {
  text = trim(text);
  const size_t at = text.rfind('\n');
  return at == std::string_view::npos ? text : text.substr(at + 1);
}

std::optional<std::string> math_answer(std::string_view response) {
  if (std::optional<std::string> marked = marked_answer(response)) {
    return marked;
  }
  std::string_view line = last_line(response);
  const size_t phrase = line.rfind("answer is");
  if (phrase != std::string_view::npos) {
    line = trim(line.substr(phrase + 9));
    if (line.starts_with(':')) {
      line = trim(line.substr(1));
    }
    constexpr std::string_view kHope = "I hope it is correct.";  // Minerva's last words
    if (line.ends_with(kHope)) {
      line = trim(line.substr(0, line.size() - kHope.size()));
    }
    // "$12$ because ...": the formula is the answer.
    size_t end = line.starts_with('$') ? line.find('$', 1) : std::string_view::npos;
    while (end != std::string_view::npos && line[end - 1] == '\\') {  // "\$18.90"
      end = line.find('$', end + 1);
    }
    if (end != std::string_view::npos) {
      return std::string(line.substr(1, end - 1));
    }
    if (line.ends_with('.')) {
      line.remove_suffix(1);
    }
    return std::string(line);
  }
  const size_t close = line.rfind('$');
  if (close != std::string_view::npos && close > 0) {
    const size_t open = line.rfind('$', close - 1);
    if (open != std::string_view::npos) {
      return std::string(line.substr(open + 1, close - open - 1));
    }
  }
  return last_number(response);
}

Grade grade_words(std::string_view response, std::string_view expected) {
  Grade out;
  const std::optional<std::string> marked = marked_answer(response);
  out.given = marked ? *marked : std::string(last_line(response));
  out.answered = !out.given.empty();
  const std::string want = plain_words(expected);
  const std::string got = plain_words(out.given);
  out.correct = !want.empty() && (marked ? got == want : got.ends_with(want));
  return out;
}

/// Whether `word` stands in the text as a word of its own; letters of either case are alike.
bool has_word(std::string_view text, std::string_view word) {
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) ==
           std::tolower(static_cast<unsigned char>(b));
  };
  for (auto at = text.begin();; ++at) {
    at = std::search(at, text.end(), word.begin(), word.end(), same);
    if (at == text.end()) {
      return false;
    }
    const auto end = at + static_cast<int64_t>(word.size());
    if ((at == text.begin() || !is_word(at[-1])) && (end == text.end() || !is_word(*end))) {
      return true;
    }
  }
}

Grade grade_all_words(std::string_view response, std::string_view expected) {
  Grade out;
  size_t wanted = 0;
  size_t found = 0;
  while (!(expected = trim(expected)).empty()) {
    const std::string_view word = expected.substr(0, expected.find(' '));
    expected.remove_prefix(word.size());
    ++wanted;
    if (has_word(response, word)) {
      ++found;
      out.given += (out.given.empty() ? "" : " ") + std::string(word);
    }
  }
  out.answered = !trim(response).empty();
  out.correct = wanted > 0 && found == wanted;
  return out;
}

/// The letter of an option: in a box, after the last "answer" ("Answer: (B)", "the answer is
/// **B**"), in the last brackets, or all that there is.
std::optional<std::string> letter_answer(std::string_view response) {
  constexpr std::string_view kAround = " \t\n*:($\"'[{`.";
  const auto alone = [](std::string_view text) -> std::optional<std::string> {
    if (text.empty() || text[0] < 'A' || text[0] > 'Z' || (text.size() > 1 && is_word(text[1]))) {
      return std::nullopt;
    }
    return std::string(text.substr(0, 1));
  };
  const auto inside = [&](std::string_view text) {
    for (const std::string_view command : kTextCommands) {
      const size_t at = text.find(command);
      text.remove_prefix(at == std::string_view::npos ? 0 : at + command.size());
    }
    return alone(text.substr(std::min(text.find_first_not_of(kAround), text.size())));
  };
  if (const std::optional<std::string> marked = marked_answer(response)) {
    return inside(*marked);
  }
  std::string lower(response);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) {
    return static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  });
  for (size_t at = lower.rfind("answer"); at != std::string::npos;
       at = at == 0 ? std::string::npos : lower.rfind("answer", at - 1)) {
    std::string_view rest = response.substr(at + 6);
    size_t skipped = std::min(rest.find_first_not_of(kAround), rest.size());
    for (const std::string_view word : {"is", "option", "choice"}) {
      if (rest.substr(skipped).starts_with(word)) {
        skipped += word.size();
        skipped += std::min(rest.substr(skipped).find_first_not_of(kAround), rest.size() - skipped);
      }
    }
    if (std::optional<std::string> letter = inside(rest.substr(skipped))) {
      return letter;
    }
  }
  for (size_t at = response.rfind('('); at != std::string_view::npos;
       at = at == 0 ? std::string_view::npos : response.rfind('(', at - 1)) {
    if (at + 2 < response.size() && response[at + 2] == ')' && response[at + 1] >= 'A' &&
        response[at + 1] <= 'Z') {
      return std::string(response.substr(at + 1, 1));
    }
  }
  const std::string_view all = trim(response);
  const std::optional<std::string> letter = inside(all);
  // "A triangle ..." begins with a word, "B" and "B. Paris" with a letter.
  const size_t begin = std::min(all.find_first_not_of(kAround), all.size());
  const std::string_view after = all.substr(std::min(begin + 1, all.size()));
  return letter && (after.empty() || after[0] != ' ') ? letter : std::nullopt;
}

}  // namespace

std::optional<std::string> marked_answer(std::string_view response) {
  const size_t hashes = response.rfind("####");
  if (hashes != std::string_view::npos) {
    std::string_view rest = response.substr(hashes + 4);
    rest = trim(rest.substr(0, rest.find('\n')));
    return std::string(rest);
  }
  const size_t boxed = response.rfind("\\boxed");
  if (boxed == std::string_view::npos) {
    return std::nullopt;
  }
  size_t at = boxed + 6;
  while (at < response.size() && response[at] == ' ') {
    ++at;
  }
  if (at < response.size() && response[at] == '{') {
    const size_t end = after_group(response, at);
    if (end == std::string_view::npos) {
      return std::nullopt;  // cut off inside the box
    }
    return std::string(trim(response.substr(at + 1, end - at - 2)));
  }
  const size_t end = response.find_first_of(" $.\n", at);
  return std::string(response.substr(at, end == std::string_view::npos ? end : end - at));
}

std::optional<std::string> last_number(std::string_view text) {
  size_t end = text.size();
  while (end > 0 && !is_digit(text[end - 1])) {
    --end;
  }
  if (end == 0) {
    return std::nullopt;
  }
  size_t begin = end;
  while (begin > 0) {
    const char c = text[begin - 1];
    const bool inside = (c == '.' || c == ',') && begin >= 2 && is_digit(text[begin - 2]);
    const bool leading_dot = c == '.' && (begin < 2 || !is_digit(text[begin - 2]));
    if (!is_digit(c) && !inside && !leading_dot) {
      break;
    }
    --begin;
    if (leading_dot) {
      break;
    }
  }
  // A comma that does not group three digits separates two numbers, and so does a second dot.
  std::string_view number = text.substr(begin, end - begin);
  const std::string joined = without_thousands(number);
  size_t cut = joined.find(',') == std::string::npos ? 0 : number.rfind(',') + 1;
  const size_t dot = number.rfind('.');
  if (dot != std::string_view::npos && dot > cut &&
      number.substr(cut, dot - cut).find('.') != std::string_view::npos) {
    cut = dot + 1;
  }
  const bool minus = cut == 0 && begin > 0 && text[begin - 1] == '-' &&
                     (begin == 1 || !(is_digit(text[begin - 2]) || is_letter(text[begin - 2]) ||
                                      text[begin - 2] == ')'));
  return (minus ? "-" : "") + (cut > 0 ? std::string(number.substr(cut)) : joined);
}

std::optional<double> number_value(std::string_view text) {
  const std::string plain = without_thousands(trim(text));
  std::string_view rest = plain;
  double sign = 1;
  if (!rest.empty() && (rest[0] == '-' || rest[0] == '+')) {
    sign = rest[0] == '-' ? -1 : 1;
    rest = trim(rest.substr(1));
  }
  if (rest.empty() || rest[0] == '-' || rest[0] == '+') {
    return std::nullopt;
  }
  if (const std::optional<double> value = literal_value(rest)) {
    return sign * *value;
  }
  if (rest.front() == '(' && rest.back() == ')') {
    const std::optional<double> value = number_value(rest.substr(1, rest.size() - 2));
    return value ? std::optional(sign * *value) : std::nullopt;
  }
  double whole = 0;
  std::optional<double> above;
  std::optional<double> below;
  const size_t frac = rest.find("\\frac");
  if (frac != std::string_view::npos) {
    if (frac > 0) {
      const std::optional<double> before = literal_value(trim(rest.substr(0, frac)));
      if (!before) {
        return std::nullopt;
      }
      whole = *before;
    }
    const auto [top, after_top] = argument(rest, frac + 5);
    const auto [bottom, end] = argument(rest, after_top);
    if (end != rest.size()) {
      return std::nullopt;
    }
    above = literal_value(top);
    below = literal_value(bottom);
  } else if (const size_t slash = rest.find('/'); slash != std::string_view::npos) {
    above = literal_value(trim(rest.substr(0, slash)));
    below = literal_value(trim(rest.substr(slash + 1)));
  }
  if (!above || !below || *below == 0) {
    return std::nullopt;
  }
  return sign * (whole + *above / *below);
}

std::string normalise_math(std::string_view latex) {
  std::string text(trim(latex));
  for (const std::string_view gone : {"\\left", "\\right"}) {
    for (size_t at = text.find(gone); at != std::string::npos; at = text.find(gone, at)) {
      if (at + gone.size() < text.size() && is_letter(text[at + gone.size()])) {
        at += gone.size();  // \leftarrow
      } else {
        text.erase(at, gone.size());
      }
    }
  }
  replace_all(text, "{,}", ",");
  replace_all(text, "+\\infty", "\\infty");
  for (const std::string_view gone : {"\\!", "\\,", "\\;", "\\:", "\\(", "\\)", "\\$", "$", "\\%",
                                      "%", "^\\circ", "^{\\circ}", "\\degree"}) {
    replace_all(text, gone, "");
  }
  for (size_t at = text.find("\\ "); at != std::string::npos; at = text.find("\\ ", at + 1)) {
    if (at == 0 || text[at - 1] != '\\') {  // not a matrix's end of row
      text.erase(at, 1);
    }
  }
  replace_all(text, "~", " ");
  replace_all(text, "\\dfrac", "\\frac");
  replace_all(text, "\\tfrac", "\\frac");
  text = without_unit(std::move(text));
  unwrap_text(text);
  std::erase_if(text, is_space);
  text = with_braces(text);
  for (size_t at = text.find_first_of("_^"); at != std::string::npos;
       at = text.find_first_of("_^", at + 1)) {
    if (at + 3 < text.size() && text[at + 1] == '{' && text[at + 3] == '}') {
      text.erase(at + 3, 1);
      text.erase(at + 1, 1);
    }
  }
  for (const std::string_view relation : {"=", "\\in"}) {
    if (text.size() > relation.size() + 1 && is_letter(text[0]) &&
        std::string_view(text).substr(1, relation.size()) == relation) {
      text.erase(0, relation.size() + 1);
    }
  }
  while (!text.empty() && text.back() == '.') {
    text.pop_back();
  }
  if (text.size() == 3 && text[0] == '(' && is_letter(text[1]) && text[2] == ')') {
    text = text.substr(1, 1);  // a choice "(C)"
  }
  return without_thousands(text);
}

Grade grade(AnswerForm form, std::string_view response, std::string_view expected,
            Extraction extraction) {
  if (extraction != Extraction::kOwn) {
    return grade_like_harness(extraction, response, expected);
  }
  if (form == AnswerForm::kLetter) {
    Grade out;
    out.given = letter_answer(response).value_or("");
    out.answered = !out.given.empty();
    out.correct = out.answered && out.given == expected;
    return out;
  }
  if (form == AnswerForm::kWords) {
    return grade_all_words(response, expected);
  }
  if (form == AnswerForm::kPython) {
    return grade_python(response, expected);
  }
  if (form == AnswerForm::kMath) {
    Grade out;
    const std::optional<std::string> given = math_answer(response);
    out.given = given.value_or("");
    out.answered = given && !given->empty();
    out.correct = out.answered && same_math(out.given, expected);
    return out;
  }
  const std::optional<double> want = number_value(expected);
  if (!want) {
    return grade_words(response, expected);
  }
  Grade out;
  const std::optional<std::string> marked = marked_answer(response);
  std::optional<std::string> given;
  if (marked && number_value(normalise_math(*marked))) {
    given = normalise_math(*marked);
  } else {
    given = last_number(marked ? *marked : response);
  }
  if (!given) {
    return out;
  }
  out.answered = true;
  out.given = *given;
  const std::optional<double> value = number_value(*given);
  out.correct = value && std::abs(*value - *want) <= 1e-6 * std::max(1.0, std::abs(*want));
  if (form == AnswerForm::kInteger && value && *value != std::floor(*value)) {
    out.correct = false;
  }
  return out;
}

}  // namespace cambium
