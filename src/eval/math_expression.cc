#include "eval/math_expression.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <numbers>

#include "base/random.h"
#include "eval/text_edit.h"

namespace cambium {
namespace {

using Value = std::complex<double>;

/// Deeper nesting than any answer has: a hostile one must not use up the stack.
constexpr int kDeepest = 64;
constexpr int kPoints = 4;
constexpr size_t kLongest = 2000;

/// The value of a letter, between 0.3 and 2.3 and never a number that identities favour.
Value letter_value(std::string_view name, int point) {
  uint64_t stream = static_cast<uint64_t>(point);
  for (const char c : name) {
    stream = mix_seed(stream, static_cast<unsigned char>(c));
  }
  return {0.3 + 2.0 * Rng(1, stream).uniform(), 0.0};
}

struct Function {
  std::string_view name;
  Value (*of)(Value);
};

constexpr std::array<Function, 18> kFunctions = {{
    {"arcsin", [](Value x) { return std::asin(x); }},
    {"arccos", [](Value x) { return std::acos(x); }},
    {"arctan", [](Value x) { return std::atan(x); }},
    {"sinh", [](Value x) { return std::sinh(x); }},
    {"cosh", [](Value x) { return std::cosh(x); }},
    {"tanh", [](Value x) { return std::tanh(x); }},
    {"sin", [](Value x) { return std::sin(x); }},
    {"cos", [](Value x) { return std::cos(x); }},
    {"tan", [](Value x) { return std::tan(x); }},
    {"cot", [](Value x) { return 1.0 / std::tan(x); }},
    {"sec", [](Value x) { return 1.0 / std::cos(x); }},
    {"csc", [](Value x) { return 1.0 / std::sin(x); }},
    {"exp", [](Value x) { return std::exp(x); }},
    {"log", [](Value x) { return std::log(x); }},  // natural, as SymPy reads it
    {"ln", [](Value x) { return std::log(x); }},
    {"lg", [](Value x) { return std::log10(x); }},
    {"lfloor", nullptr},
    {"lceil", nullptr},
}};

constexpr std::string_view kGreek[] = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "theta", "lambda", "mu",
    "nu",    "rho",  "sigma", "tau",   "phi",     "varphi",     "omega", "psi",    "chi",
    "xi",    "eta",  "zeta",  "kappa", "ell",     "Delta",      "Omega", "Gamma"};

/// sum := product (("+" | "-") product)*; product := factor (operator? factor)*; factor := "-"*
/// atom power*. Fails once and for all at the first thing it does not know.
class Reader {
 public:
  Reader(std::string_view text, int point) : text_(text), point_(point) {}

  std::optional<Value> all() {
    const Value value = sum(0);
    skip();
    if (failed_ || at_ != text_.size() || !std::isfinite(value.real()) ||
        !std::isfinite(value.imag())) {
      return std::nullopt;
    }
    return value;
  }

 private:
  Value fail() {
    failed_ = true;
    return 0;
  }
  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
      ++at_;
    }
  }
  char peek() {
    skip();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(std::string_view word) {
    skip();
    const std::string_view rest = text_.substr(std::min(at_, text_.size()));
    if (!rest.starts_with(word)) {
      return false;
    }
    // A command's name ends where its letters end.
    if (word[0] == '\\' && is_letter(word.back()) && rest.size() > word.size() &&
        is_letter(rest[word.size()])) {
      return false;
    }
    at_ += word.size();
    return true;
  }

  Value sum(int depth) {
    if (depth > kDeepest) {
      return fail();
    }
    Value value = product(depth);
    while (!failed_) {
      if (take("+")) {
        value += product(depth);
      } else if (take("-")) {
        value -= product(depth);
      } else {
        break;
      }
    }
    return value;
  }

  bool begins_factor() {
    const char c = peek();
    if (c == '\\') {
      for (const std::string_view end : {"\\}", "\\right", "\\rfloor", "\\rceil", "\\rvert"}) {
        if (text_.substr(at_).starts_with(end)) {
          return false;
        }
      }
      return true;
    }
    return is_digit(c) || is_letter(c) || c == '(' || c == '[' || c == '{';
  }

  Value product(int depth) {
    Value value = factor(depth);
    while (!failed_) {
      if (take("\\cdot") || take("\\times") || take("*")) {
        value *= factor(depth);
      } else if (take("/") || take("\\div")) {
        value /= factor(depth);
      } else if (begins_factor()) {
        value *= power(depth);
      } else {
        break;
      }
    }
    return value;
  }

  Value factor(int depth) {
    double sign = 1;
    for (;;) {
      if (take("-")) {
        sign = -sign;
      } else if (!take("+")) {
        break;
      }
    }
    return sign * power(depth);
  }

  Value power(int depth) {
    Value base = atom(depth);
    for (;;) {
      if (failed_) {
        return 0;
      }
      if (take("!")) {
        if (base.imag() != 0 || base.real() < 0 || base.real() > 170 ||
            base.real() != std::floor(base.real())) {
          return fail();
        }
        base = std::tgamma(base.real() + 1);
      } else if (take("^") || take("**")) {
        const Value exponent = argument(depth);
        base = raised(base, exponent);
      } else {
        return base;
      }
    }
  }

  static Value raised(Value base, Value exponent) {
    if (exponent.imag() == 0 && exponent.real() == std::floor(exponent.real()) &&
        std::abs(exponent.real()) <= 64) {
      Value out = 1;
      for (int k = 0; k < static_cast<int>(std::abs(exponent.real())); ++k) {
        out *= base;
      }
      return exponent.real() < 0 ? 1.0 / out : out;
    }
    return std::pow(base, exponent);
  }

  /// What \frac, \sqrt and ^ take: a group, or one digit, letter or command.
  Value argument(int depth) {
    if (peek() == '{') {
      return group("}", depth);
    }
    if (depth > kDeepest) {
      return fail();
    }
    if (peek() == '-') {
      ++at_;
      return -argument(depth + 1);
    }
    if (is_digit(peek()) && !in_plain_text()) {
      return static_cast<double>(text_[at_++] - '0');
    }
    return atom(depth + 1);
  }

  /// "x^10" outside LaTeX's braces means ten; \frac12 means one half.
  bool in_plain_text() const { return at_ > 0 && text_[at_ - 1] == '^'; }

  Value group(std::string_view close, int depth) {
    ++at_;
    const Value value = sum(depth + 1);
    return take(close) ? value : fail();
  }

  Value number() {
    const size_t begin = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) {
      ++at_;
    }
    // Commas between groups of three digits.
    while (at_ + 3 < text_.size() && text_[at_] == ',' && is_digit(text_[at_ + 1]) &&
           is_digit(text_[at_ + 2]) && is_digit(text_[at_ + 3]) &&
           (at_ + 4 == text_.size() || !is_digit(text_[at_ + 4]))) {
      at_ += 4;
    }
    if (at_ < text_.size() && text_[at_] == '.') {
      ++at_;
      while (at_ < text_.size() && is_digit(text_[at_])) {
        ++at_;
      }
    }
    std::string digits(text_.substr(begin, at_ - begin));
    std::erase(digits, ',');
    double value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value,
                                              std::chars_format::fixed);
    if (error != std::errc() || end != digits.data() + digits.size()) {
      return fail();
    }
    // A whole number before a fraction of two numbers is a mixed number.
    const size_t back = at_;
    if (digits.find('.') == std::string::npos && (take("\\frac") || take("\\dfrac"))) {
      const std::string_view rest = text_.substr(at_);
      const bool letters = std::any_of(rest.begin(), rest.end(), is_letter);
      if (!letters && rest.find('\\') == std::string_view::npos) {
        const Value above = argument(0);
        const Value below = argument(0);
        return value + above / below;
      }
      at_ = back;
    }
    return value;
  }

  Value atom(int depth) {
    if (failed_ || depth > kDeepest) {
      return fail();
    }
    const char c = peek();
    if (is_digit(c) || c == '.') {
      return number();
    }
    if (c == '(') {
      return group(")", depth);
    }
    if (c == '[') {
      return group("]", depth);
    }
    if (c == '{') {
      return group("}", depth);
    }
    if (c == '|') {
      ++at_;
      const Value value = sum(depth + 1);
      return take("|") ? Value(std::abs(value)) : fail();
    }
    if (c == '\\') {
      return command(depth);
    }
    if (!is_letter(c)) {
      return fail();
    }
    return name(depth);
  }

  /// A letter, or a function's name in plain text ("sqrt(2)", "pi").
  Value name(int depth) {
    size_t end = at_;
    while (end < text_.size() && is_letter(text_[end])) {
      ++end;
    }
    const std::string_view word = text_.substr(at_, end - at_);
    if (word == "pi") {
      at_ = end;
      return std::numbers::pi;
    }
    if (word == "sqrt" && end < text_.size() && text_[end] == '(') {
      at_ = end;
      return std::sqrt(atom(depth + 1));
    }
    for (const Function& function : kFunctions) {
      if (function.of != nullptr && word == function.name) {
        at_ = end;
        return applied(function, depth);
      }
    }
    // Words are no formulas; a row of variables is at most three letters long.
    if (word.size() > 3) {
      return fail();
    }
    const std::string_view letter = text_.substr(at_++, 1);
    std::string variable(letter);
    if (at_ < text_.size() && text_[at_] == '_') {
      const size_t begin = at_++;
      if (peek() == '{') {
        const size_t close = text_.find('}', at_);
        at_ = close == std::string_view::npos ? text_.size() : close + 1;
      } else {
        at_ = std::min(at_ + 1, text_.size());
      }
      for (const char part : text_.substr(begin, at_ - begin)) {
        if (part != '{' && part != '}') {
          variable += part;
        }
      }
    }
    if (variable == "e") {
      return std::numbers::e;
    }
    if (variable == "i") {
      return Value(0, 1);
    }
    return letter_value(variable, point_);
  }

  Value applied(const Function& function, int depth) {
    Value exponent = 1;
    if (take("^")) {
      exponent = argument(depth + 1);
    }
    // The argument is a group, or a row of factors: \sin 2x.
    Value x;
    if (peek() == '(' || peek() == '{') {
      x = atom(depth + 1);
    } else {
      x = power(depth + 1);
      while (!failed_ && begins_factor() && peek() != '\\' && peek() != '(') {
        x *= power(depth + 1);
      }
    }
    if (exponent == Value(-1) && function.name.size() == 3) {
      for (const Function& inverse : kFunctions) {
        if (inverse.name.size() == 6 && inverse.name.substr(3) == function.name) {
          return inverse.of(x);
        }
      }
    }
    return raised(function.of(x), exponent);
  }

  Value command(int depth) {
    for (const std::string_view fraction : {"\\frac", "\\dfrac", "\\tfrac", "\\cfrac"}) {
      if (take(fraction)) {
        const Value above = argument(depth + 1);
        const Value below = argument(depth + 1);
        return above / below;
      }
    }
    for (const std::string_view binomial : {"\\binom", "\\dbinom", "\\tbinom"}) {
      if (take(binomial)) {
        const Value n = argument(depth + 1);
        const Value k = argument(depth + 1);
        if (n.real() < 0 || k.real() < 0 || k.real() > n.real() || n.real() > 1000) {
          return fail();
        }
        return std::round(std::exp(std::lgamma(n.real() + 1) - std::lgamma(k.real() + 1) -
                                   std::lgamma(n.real() - k.real() + 1)));
      }
    }
    if (take("\\sqrt")) {
      Value degree = 2;
      if (peek() == '[') {
        degree = group("]", depth);
      }
      const Value x = argument(depth + 1);
      if (degree == Value(2)) {
        return std::sqrt(x);
      }
      const bool odd = std::fmod(degree.real(), 2) == 1;
      return odd && x.imag() == 0
                 ? Value(std::copysign(std::pow(std::abs(x.real()), 1 / degree.real()), x.real()))
                 : std::pow(x, 1.0 / degree);
    }
    if (take("\\left") || take("\\bigl") || take("\\big") || take("\\Big")) {
      return atom(depth + 1);
    }
    if (take("\\{")) {
      return fail();
    }
    if (take("\\lfloor")) {
      const Value x = sum(depth + 1);
      return take("\\rfloor") ? Value(std::floor(x.real())) : fail();
    }
    if (take("\\lceil")) {
      const Value x = sum(depth + 1);
      return take("\\rceil") ? Value(std::ceil(x.real())) : fail();
    }
    if (take("\\pi")) {
      return std::numbers::pi;
    }
    if (take("\\log")) {
      if (take("_")) {
        const Value base = argument(depth + 1);
        const Value x = peek() == '(' ? atom(depth + 1) : power(depth + 1);
        return std::log(x) / std::log(base);
      }
      return applied(kFunctions[13], depth);
    }
    for (const Function& function : kFunctions) {
      if (function.of != nullptr && take("\\" + std::string(function.name))) {
        return applied(function, depth);
      }
    }
    for (const std::string_view letter : kGreek) {
      if (take("\\" + std::string(letter))) {
        return letter_value(letter, point_);
      }
    }
    return fail();
  }

  std::string_view text_;
  int point_;
  size_t at_ = 0;
  bool failed_ = false;
};

/// Without what only spaces a formula out.
std::string plain(std::string_view latex) {
  std::string text(latex);
  for (const std::string_view gone :
       {"\\right", "\\bigr", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "\\displaystyle", "~"}) {
    for (size_t at = text.find(gone); at != std::string::npos; at = text.find(gone, at)) {
      const bool longer = is_letter(gone.back()) && at + gone.size() < text.size() &&
                          is_letter(text[at + gone.size()]);
      if (longer) {
        at += gone.size();
      } else {
        text.replace(at, gone.size(), gone == "\\ " || gone == "~" ? " " : "");
      }
    }
  }
  return text;
}

}  // namespace

std::optional<std::complex<double>> value_at(std::string_view latex, int point) {
  if (latex.size() > kLongest) {
    return std::nullopt;
  }
  const std::string text = plain(latex);
  if (text.find_first_not_of(" \t\n") == std::string::npos) {
    return std::nullopt;
  }
  return Reader(text, point).all();
}

bool same_expression(std::string_view a, std::string_view b) {
  for (int point = 0; point < kPoints; ++point) {
    const auto x = value_at(a, point);
    const auto y = x ? value_at(b, point) : std::nullopt;
    if (!x || !y || std::abs(*x - *y) > 1e-9 * std::max({1e-3, std::abs(*x), std::abs(*y)})) {
      return false;
    }
  }
  return true;
}

}  // namespace cambium
