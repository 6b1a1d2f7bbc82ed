#include "eval/graders.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace cambium {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_letter(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) != 0;
}
bool is_space(char c) {
  return std::isspace(static_cast<unsigned char>(c)) != 0;
}

std::string_view trim(std::string_view text) {
  while (!text.empty() && is_space(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && is_space(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
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

/// Cuts at commas outside all brackets.
std::vector<std::string_view> elements(std::string_view list) {
  std::vector<std::string_view> out;
  int depth = 0;
  size_t from = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    const char c = list[i];
    depth += c == '(' || c == '[' || c == '{' ? 1 : c == ')' || c == ']' || c == '}' ? -1 : 0;
    if (c == ',' && depth == 0) {
      out.push_back(list.substr(from, i - from));
      from = i + 1;
    }
  }
  out.push_back(list.substr(from));
  return out;
}

bool same_value(std::string_view a, std::string_view b) {
  if (a == b) {
    return true;
  }
  const std::optional<double> x = number_value(a);
  const std::optional<double> y = number_value(b);
  return x && y && std::abs(*x - *y) <= 1e-9 * std::max(1.0, std::abs(*y));
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

bool same_math(std::string_view a, std::string_view b) {
  const std::string x = normalise_math(a);
  const std::string y = normalise_math(b);
  if (x.empty() || y.empty()) {
    return x == y;
  }
  if (same_value(x, y)) {
    return true;
  }
  const auto bracketed = [](std::string_view text) {
    return text.size() > 2 && (text.front() == '(' || text.front() == '[') &&
           (text.back() == ')' || text.back() == ']');
  };
  std::string_view inside_x = x;
  std::string_view inside_y = y;
  const bool ordered = bracketed(x);
  if (ordered != bracketed(y)) {
    return false;
  }
  if (ordered) {
    if (x.front() != y.front() || x.back() != y.back()) {
      return false;
    }
    inside_x = inside_x.substr(1, x.size() - 2);
    inside_y = inside_y.substr(1, y.size() - 2);
  }
  const std::vector<std::string_view> left = elements(inside_x);
  std::vector<std::string_view> right = elements(inside_y);
  if (left.size() != right.size() || left.size() < 2) {
    return false;
  }
  if (ordered) {
    return std::equal(left.begin(), left.end(), right.begin(), same_value);
  }
  for (const std::string_view element : left) {
    const auto twin = std::find_if(right.begin(), right.end(), [&](std::string_view other) {
      return same_value(element, other);
    });
    if (twin == right.end()) {
      return false;
    }
    right.erase(twin);
  }
  return true;
}

Grade grade(AnswerForm form, std::string_view response, std::string_view expected) {
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
