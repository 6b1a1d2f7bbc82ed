#include "text/jinja/lexer.h"

#include <fmt/format.h>
#include <cstdint>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/// All newlines as \n, without the one at the end of the file.
std::string normalise_newlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      i += i + 1 < source.size() && source[i + 1] == '\n';
      out += '\n';
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) {
    out.pop_back();
  }
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalise_newlines(source)), in_(source_) {}

  std::vector<Token> run() {
    while (at_ < in_.size()) {
      data();
    }
    push(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  template <class... Args>
  [[noreturn]] void wrong(fmt::format_string<Args...> what, Args&&... args) const {
    fail("[chat_template] line {}: {}", line_, fmt::format(what, std::forward<Args>(args)...));
  }

  bool starts(std::string_view s) const { return in_.substr(at_).starts_with(s); }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }

  void push(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  void advance(size_t n) {
    line_ += static_cast<int>(std::count(in_.begin() + at_, in_.begin() + at_ + n, '\n'));
    at_ += n;
  }

  void skip_space() {
    size_t n = 0;
    while (at_ + n < in_.size() && is_space(in_[at_ + n])) {
      ++n;
    }
    advance(n);
  }

  /// Text up to the next tag, and the tag's opening.
  void data() {
    size_t tag = at_;
    while ((tag = in_.find('{', tag)) != std::string_view::npos) {
      const char next = tag + 1 < in_.size() ? in_[tag + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') {
        break;
      }
      ++tag;
    }
    if (tag == std::string_view::npos) {
      print(in_.substr(at_));
      at_ = in_.size();
      return;
    }
    const char type = in_[tag + 1];
    print_before(tag, type != '{');
    const bool sign = peek(2) == '-' || peek(2) == '+';
    if (type == '#') {
      comment();
    } else if (type == '{') {
      push(TokenKind::kVariableBegin, "{{");
      advance(sign ? 3 : 2);
      inside(TokenKind::kVariableEnd);
    } else if (const size_t length = raw_tag("raw")) {
      raw(length);
    } else {
      push(TokenKind::kBlockBegin, "{%");
      advance(sign ? 3 : 2);
      inside(TokenKind::kBlockEnd);
    }
  }

  void print(std::string_view text) {
    if (!text.empty()) {
      push(TokenKind::kData, std::string(text));
    }
  }

  /// Prints the text from at_ to `tag` as the tag's sign says, and moves to the tag. `strips`: the
  /// tag takes blanks before it on its line.
  void print_before(size_t tag, bool strips) {
    std::string_view text = in_.substr(at_, tag - at_);
    const char sign = tag + 2 < in_.size() ? in_[tag + 2] : '\0';
    if (sign == '-') {
      while (!text.empty() && is_space(text.back())) {
        text.remove_suffix(1);
      }
    } else if (sign != '+' && strips) {
      const size_t newline = text.rfind('\n');
      const size_t line = newline == std::string_view::npos ? 0 : newline + 1;
      const bool line_begins = newline != std::string_view::npos || line_starting_;
      if (line_begins && std::all_of(text.begin() + line, text.end(), is_space)) {
        text = text.substr(0, line);
      }
    }
    print(text);
    advance(tag - at_);
  }

  /// After the end of a tag of `length` characters: what it takes of the text behind.
  void end_tag(size_t length, bool dash, bool trims) {
    advance(length);
    const size_t before = at_;
    if (dash) {
      skip_space();
    } else if (trims && peek() == '\n') {
      advance(1);
    }
    line_starting_ = at_ > before && in_[at_ - 1] == '\n';
  }

  void comment() {
    const size_t end = in_.find("#}", at_ + 2);
    if (end == std::string_view::npos) {
      wrong("expected #}} to end the comment");
    }
    const char sign = end > at_ + 2 ? in_[end - 1] : '\0';
    advance(end - at_);
    end_tag(2, sign == '-', sign != '+');
  }

  /// The length of a tag {% name %} at at_ up to its %}, or 0.
  size_t raw_tag(std::string_view name, size_t from = std::string_view::npos) const {
    size_t i = (from == std::string_view::npos ? at_ : from) + 2;
    i += i < in_.size() && (in_[i] == '-' || in_[i] == '+');
    while (i < in_.size() && is_space(in_[i])) {
      ++i;
    }
    if (!in_.substr(i).starts_with(name)) {
      return 0;
    }
    i += name.size();
    while (i < in_.size() && is_space(in_[i])) {
      ++i;
    }
    const size_t signs = i < in_.size() && (in_[i] == '-' || in_[i] == '+') ? 1 : 0;
    if (!in_.substr(i + signs).starts_with("%}")) {
      return 0;
    }
    return i + signs + 2 - (from == std::string_view::npos ? at_ : from);
  }

  void raw(size_t length) {
    end_tag(length, in_[at_ + length - 3] == '-', false);
    for (size_t end = at_; (end = in_.find("{%", end)) != std::string_view::npos; ++end) {
      if (const size_t close = raw_tag("endraw", end)) {
        print_before(end, true);
        const char sign = in_[at_ + close - 3];
        end_tag(close, sign == '-', sign != '+');
        return;
      }
    }
    wrong("expected {{% endraw %}} to end the raw block");
  }

  /// The tokens of a tag up to its end.
  void inside(TokenKind end) {
    const std::string_view closing = end == TokenKind::kBlockEnd ? "%}" : "}}";
    const int opened_at = line_;
    std::vector<char> open;  // brackets
    for (;;) {
      skip_space();
      if (at_ >= in_.size()) {
        line_ = opened_at;
        wrong("expected {} to end the tag", closing);
      }
      if (open.empty()) {
        const bool signs = peek() == '-' || (peek() == '+' && end == TokenKind::kBlockEnd);
        if (in_.substr(at_ + (signs ? 1 : 0)).starts_with(closing)) {
          const bool dash = peek() == '-';
          push(end, std::string(closing));
          end_tag(signs ? 3 : 2, dash, end == TokenKind::kBlockEnd && !signs);
          return;
        }
      }
      const char c = peek();
      if (is_digit(c)) {
        number();
      } else if (c == '\'' || c == '"') {
        string();
      } else if (c == '_' || text::is_word(text::decode_utf8(in_, at_).code_point)) {
        name();
      } else {
        operation(open);
      }
    }
  }

  void name() {
    size_t n = 0;
    while (at_ + n < in_.size()) {
      const text::Decoded d = text::decode_utf8(in_, at_ + n);
      if (d.code_point != '_' && !text::is_word(d.code_point)) {
        break;
      }
      n += d.length;
    }
    push(TokenKind::kName, std::string(in_.substr(at_, n)));
    at_ += n;
  }

  size_t digits(size_t from) const {
    size_t i = from;
    while (i < in_.size() && (is_digit(in_[i]) || (in_[i] == '_' && i > from &&
                                                   i + 1 < in_.size() && is_digit(in_[i + 1])))) {
      ++i;
    }
    return i;
  }

  void number() {
    const char letter = static_cast<char>(peek(1) | 0x20);
    if (peek() == '0' && (letter == 'x' || letter == 'o' || letter == 'b')) {
      size_t end = at_ + 2;
      while (end < in_.size() &&
             (std::isxdigit(static_cast<unsigned char>(in_[end])) || in_[end] == '_')) {
        ++end;
      }
      std::string digits = {'0', letter};
      digits += in_.substr(at_ + 2, end - at_ - 2);
      std::erase(digits, '_');
      push(TokenKind::kInteger, std::move(digits));
      at_ = end;
      return;
    }
    size_t i = digits(at_);
    bool real = false;
    // "x.1.5" indexes twice: a number right behind a dot has no fraction of its own.
    const bool after_dot = at_ > 0 && in_[at_ - 1] == '.';
    const auto at = [&](size_t k) { return k < in_.size() ? in_[k] : '\0'; };
    if (!after_dot && at(i) == '.' && is_digit(at(i + 1))) {
      i = digits(i + 1);
      real = true;
    }
    if (!after_dot && (at(i) == 'e' || at(i) == 'E')) {
      const size_t sign = at(i + 1) == '+' || at(i + 1) == '-' ? 2 : 1;
      if (is_digit(at(i + sign))) {
        i = digits(i + sign);
        real = true;
      }
    }
    std::string text(in_.substr(at_, i - at_));
    std::erase(text, '_');
    push(real ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
    at_ = i;
  }

  void string() {
    const char quote = peek();
    const int opened_at = line_;
    std::string text;
    advance(1);
    while (at_ < in_.size() && peek() != quote) {
      if (peek() == '\\') {
        escape(text);
      } else {
        text += peek();
        advance(1);
      }
    }
    if (at_ >= in_.size()) {
      line_ = opened_at;
      wrong("expected {} to end the string", quote);
    }
    advance(1);
    tokens_.push_back({TokenKind::kString, std::move(text), opened_at});
  }

  void escape(std::string& text) {
    static constexpr std::string_view kLetters = "abfnrtv\\'\"";
    static constexpr std::string_view kMeanings = "\a\b\f\n\r\t\v\\'\"";
    const char c = peek(1);
    const size_t simple = c == '\0' ? std::string_view::npos : kLetters.find(c);
    if (simple != std::string_view::npos) {
      text += kMeanings[simple];
      advance(2);
    } else if (c == '\n') {
      advance(2);
    } else if (c >= '0' && c <= '7') {
      code_point(text, 1, 3, 8);
    } else if (c == 'x') {
      code_point(text, 2, 2, 16);
    } else if (c == 'u') {
      code_point(text, 2, 4, 16);
    } else if (c == 'U') {
      code_point(text, 2, 8, 16);
    } else {  // an unknown escape is two plain characters
      text += '\\';
      advance(1);
    }
  }

  /// A numeric escape whose digits begin `skip` behind the backslash.
  void code_point(std::string& text, size_t skip, size_t most, uint32_t base) {
    uint32_t value = 0;
    size_t n = 0;
    for (; n < most; ++n) {
      const char c = peek(skip + n);
      const uint32_t digit = is_digit(c)              ? static_cast<uint32_t>(c - '0')
                             : (c >= 'a' && c <= 'f') ? static_cast<uint32_t>(c - 'a' + 10)
                             : (c >= 'A' && c <= 'F') ? static_cast<uint32_t>(c - 'A' + 10)
                                                      : 99;
      if (digit >= base) {
        break;
      }
      value = value * base + digit;
    }
    if ((base == 16 && n < most) || value > 0x10FFFF) {
      wrong("expected {} hexadecimal digits of a character in the escape", most);
    }
    text::append_utf8(text, value >= 0xD800 && value < 0xE000 ? text::kReplacement : value);
    advance(skip + n);
  }

  void operation(std::vector<char>& open) {
    static constexpr std::array<std::string_view, 25> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ","};
    const auto found = std::find_if(kOperators.begin(), kOperators.end(),
                                    [&](std::string_view op) { return starts(op); });
    if (found == kOperators.end()) {
      const size_t length = text::decode_utf8(in_, at_).length;
      wrong("unexpected character {:?}", in_.substr(at_, length));
    }
    const char c = (*found)[0];
    if (c == '(' || c == '[' || c == '{') {
      open.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    } else if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) {
        wrong("unexpected {}{}", c,
              open.empty() ? std::string() : fmt::format(", expected {}", open.back()));
      }
      open.pop_back();
    }
    push(TokenKind::kOperator, std::string(*found));
    advance(found->size());
  }

  std::string source_;
  std::string_view in_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // the text at at_ begins a line
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  return Lexer(source).run();
}

std::string describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kData:
      return "text";
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kString:
      return fmt::format("string {:?}", token.text);
    default:
      return token.text;
  }
}

}  // namespace cambium::jinja
