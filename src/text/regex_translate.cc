// Oniguruma's pattern dialect rewritten for PCRE2. The walk keeps where the last atom began in the
// output, so that a stacked quantifier can be wrapped, and reads character classes as small trees,
// because PCRE2 knows neither nested classes nor intersections.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

// What stands inside brackets for the shorthand classes.
constexpr std::string_view kSpace =
    R"(\x09-\x0D\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr std::string_view kHex = "0-9A-Fa-f";

/// Oniguruma's names for sets that PCRE2 calls otherwise; compared without case, blanks, _ and -.
/// The second is what stands inside brackets.
constexpr std::array<std::pair<std::string_view, std::string_view>, 44> kProperties = {{
    {"letter", "\\p{L}"},
    {"casedletter", "\\p{L&}"},
    {"lc", "\\p{L&}"},
    {"uppercaseletter", "\\p{Lu}"},
    {"lowercaseletter", "\\p{Ll}"},
    {"titlecaseletter", "\\p{Lt}"},
    {"modifierletter", "\\p{Lm}"},
    {"otherletter", "\\p{Lo}"},
    {"mark", "\\p{M}"},
    {"combiningmark", "\\p{M}"},
    {"nonspacingmark", "\\p{Mn}"},
    {"spacingmark", "\\p{Mc}"},
    {"enclosingmark", "\\p{Me}"},
    {"number", "\\p{N}"},
    {"decimalnumber", "\\p{Nd}"},
    {"letternumber", "\\p{Nl}"},
    {"othernumber", "\\p{No}"},
    {"punctuation", "\\p{P}"},
    {"connectorpunctuation", "\\p{Pc}"},
    {"dashpunctuation", "\\p{Pd}"},
    {"openpunctuation", "\\p{Ps}"},
    {"closepunctuation", "\\p{Pe}"},
    {"initialpunctuation", "\\p{Pi}"},
    {"finalpunctuation", "\\p{Pf}"},
    {"otherpunctuation", "\\p{Po}"},
    {"symbol", "\\p{S}"},
    {"mathsymbol", "\\p{Sm}"},
    {"currencysymbol", "\\p{Sc}"},
    {"modifiersymbol", "\\p{Sk}"},
    {"othersymbol", "\\p{So}"},
    {"separator", "\\p{Z}"},
    {"spaceseparator", "\\p{Zs}"},
    {"lineseparator", "\\p{Zl}"},
    {"paragraphseparator", "\\p{Zp}"},
    {"other", "\\p{C}"},
    {"control", "\\p{Cc}"},
    {"format", "\\p{Cf}"},
    {"unassigned", "\\p{Cn}"},
    {"alpha", "\\p{Alphabetic}"},
    {"upper", "\\p{Uppercase}"},
    {"lower", "\\p{Lowercase}"},
    {"digit", "\\p{Nd}"},
    {"alnum", "\\p{Alphabetic}\\p{Nd}"},
    {"punct", "\\p{P}$+<=>^`|~"},
}};

/// A set of characters: a union of `items` and `nested`, intersected with every set of `also`.
struct ClassTree {
  bool negated = false;
  std::string items;  // PCRE2 text for inside brackets
  std::vector<ClassTree> nested;
  std::vector<ClassTree> also;
};

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) {
      step();
    }
    return std::move(out_);
  }

 private:
  template <class... Args>
  [[noreturn]] void wrong(fmt::format_string<Args...> what, Args&&... args) const {
    fail("[regex] pattern {:?}, at {}: {}", in_, at_,
         fmt::format(what, std::forward<Args>(args)...));
  }

  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  bool starts(std::string_view s) const { return in_.substr(at_).starts_with(s); }

  void atom(std::string_view text) {
    atom_ = out_.size();
    quantified_ = false;
    out_ += text;
  }

  void step() {
    const char c = peek();
    if (c == '\\') {
      escape();
    } else if (c == '[') {
      const ClassTree tree = char_class(0);
      atom(emit(tree));
    } else if (c == '(') {
      group_open();
    } else if (c == ')') {
      ++at_;
      if (groups_.empty()) {
        wrong("a ) without its (");
      }
      out_ += ')';
      atom_ = groups_.back();
      groups_.pop_back();
      quantified_ = false;
    } else if (c == '*' || c == '+' || c == '?') {
      ++at_;
      quantifier(std::string(1, c), true);
    } else if (c == '{') {
      interval();
    } else if (c == '|' || c == '^' || c == '$') {
      ++at_;
      atom(std::string_view(&c, 1));
    } else {
      const size_t length = decode_utf8(in_, at_).length;
      atom(in_.substr(at_, length));
      at_ += length;
    }
  }

  void group_open() {
    groups_.push_back(out_.size());
    if (starts("(*")) {
      wrong("verbs (*...) are not supported");
    }
    if (!starts("(?") || starts("(?<") || starts("(?:") || starts("(?=") || starts("(?!") ||
        starts("(?>") || starts("(?#")) {
      if (starts("(?#")) {
        const size_t close = in_.find(')', at_);
        at_ = close == std::string_view::npos ? in_.size() : close + 1;
        groups_.pop_back();
        return;
      }
      out_ += '(';
      ++at_;
      while (peek() == '?' || peek() == ':' || peek() == '=' || peek() == '!' || peek() == '>' ||
             peek() == '<') {
        const char c = peek();
        out_ += c;
        ++at_;
        if (c == ':' || c == '=' || c == '!' || c == '>') {
          break;
        }
      }
      return;
    }
    at_ += 2;
    out_ += "(?";
    while (peek() != ':' && peek() != ')') {
      const char c = peek();
      if (c == 'm') {
        out_ += 's';
      } else if (c == 'i' || c == 'x' || c == 's' || c == '-') {
        out_ += c;
      } else {
        wrong("group option {:?} is not supported", std::string_view(&c, 1));
      }
      ++at_;
    }
    out_ += peek();
    if (peek() == ')') {  // options for the rest of the enclosing group
      groups_.pop_back();
    }
    ++at_;
  }

  /// `text` is + * ? or an interval. After + * ? a further + makes it possessive and ? lazy; after
  /// an interval a + repeats the whole once more, where PCRE2 would read "possessive".
  void quantifier(const std::string& text, bool simple) {
    if (quantified_) {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
    out_ += text;
    quantified_ = true;
    if (peek() == '?' || (simple && peek() == '+')) {
      out_ += peek();
      ++at_;
    }
  }

  void interval() {
    size_t end = at_ + 1;
    std::string low;
    std::string high;
    bool comma = false;
    for (; end < in_.size() && in_[end] != '}'; ++end) {
      if (in_[end] == ',' && !comma) {
        comma = true;
      } else if (in_[end] >= '0' && in_[end] <= '9') {
        (comma ? high : low) += in_[end];
      } else {
        end = in_.size();
        break;
      }
    }
    if (end >= in_.size() || (low.empty() && high.empty())) {  // a plain brace
      atom("\\{");
      ++at_;
      return;
    }
    at_ = end + 1;
    const std::string from = low.empty() ? "0" : low;
    quantifier(comma ? "{" + from + "," + high + "}" : "{" + from + "}", false);
  }

  /// \x{..}, \xHH or \uHHHH at the backslash: the code point as PCRE2 text.
  std::string hex_escape() {
    std::string digits;
    size_t i = at_ + 2;
    if (in_[at_ + 1] == 'x' && i < in_.size() && in_[i] == '{') {
      const size_t close = in_.find('}', i);
      if (close == std::string_view::npos) {
        wrong("\\x{{ without its }}");
      }
      digits = in_.substr(i + 1, close - i - 1);
      i = close + 1;
    } else {
      const size_t most = in_[at_ + 1] == 'u' ? 4 : 2;
      while (digits.size() < most && i < in_.size() &&
             std::isxdigit(static_cast<unsigned char>(in_[i]))) {
        digits += in_[i++];
      }
    }
    if (digits.empty() || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) {
      wrong("expected hexadecimal digits");
    }
    at_ = i;
    return "\\x{" + digits + "}";
  }

  /// \p{..} or \P{..} at the backslash, as a set.
  ClassTree property() {
    bool negated = in_[at_ + 1] == 'P';
    const size_t close = in_.find('}', at_);
    std::string name;
    if (peek(2) == '{' && close != std::string_view::npos) {
      name = in_.substr(at_ + 3, close - at_ - 3);
      at_ = close + 1;
    } else if (std::isalpha(static_cast<unsigned char>(peek(2)))) {
      name = peek(2);
      at_ += 3;
    } else {
      wrong("expected a property name in braces");
    }
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.erase(0, 1);
    }
    std::string key;
    for (const char c : name) {
      if (c != ' ' && c != '_' && c != '-') {
        key += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      }
    }
    ClassTree tree;
    tree.negated = negated;
    const auto found = std::find_if(kProperties.begin(), kProperties.end(),
                                    [&](const auto& row) { return row.first == key; });
    if (found != kProperties.end()) {
      tree.items = found->second;
    } else if (key == "space" || key == "whitespace") {
      tree.items = kSpace;
    } else if (key == "word") {
      tree.items = kWord;
    } else if (key == "xdigit") {
      tree.items = kHex;
    } else if (key == "cntrl") {
      tree.items = "\\p{Cc}";
    } else {
      tree.items = "\\p{" + name + "}";
    }
    return tree;
  }

  static ClassTree shorthand(char letter) {
    ClassTree tree;
    tree.negated = letter >= 'A' && letter <= 'Z';
    switch (letter) {
      case 's':
      case 'S':
        tree.items = kSpace;
        break;
      case 'w':
      case 'W':
        tree.items = kWord;
        break;
      case 'h':
      case 'H':
        tree.items = kHex;
        break;
      default:
        tree.items = "\\p{Nd}";
    }
    return tree;
  }

  static bool is_shorthand(char c) {
    return std::string_view("sSwWhHdD").find(c) != std::string_view::npos && c != '\0';
  }

  /// A single escaped character at the backslash, as PCRE2 text valid in and out of brackets.
  std::string escaped_character() {
    const char c = peek(1);
    if (c == '\0' && at_ + 1 >= in_.size()) {
      wrong("a backslash at the end");
    }
    if (c == 'x' || c == 'u') {
      return hex_escape();
    }
    at_ += 2;
    switch (c) {
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        return std::string("\\") + c;
      case 'v':
        return "\\x0B";
      case '0':
        return "\\x00";
      default:
        break;
    }
    if (static_cast<unsigned char>(c) >=
        0x80) {  // a backslash before other characters says nothing
      const size_t length = decode_utf8(in_, at_ - 1).length;
      const std::string character(in_.substr(at_ - 1, length));
      at_ += length - 1;
      return character;
    }
    if (std::isalnum(static_cast<unsigned char>(c))) {
      return std::string(1, c);
    }
    return std::string("\\") + c;
  }

  void escape() {
    const char c = peek(1);
    if (is_shorthand(c)) {
      at_ += 2;
      atom(emit(shorthand(c)));
    } else if (c == 'p' || c == 'P') {
      const ClassTree tree = property();
      atom(emit(tree));
    } else if (c == 'b' || c == 'B') {
      at_ += 2;
      const std::string w = fmt::format("[{}]", kWord);
      atom(c == 'b' ? fmt::format("(?:(?<={0})(?!{0})|(?<!{0})(?={0}))", w)
                    : fmt::format("(?:(?<={0})(?={0})|(?<!{0})(?!{0}))", w));
    } else if (c == 'A' || c == 'z' || c == 'Z' || c == 'G' || c == 'K' || c == 'R' || c == 'X' ||
               (c >= '1' && c <= '9')) {
      atom(in_.substr(at_, 2));
      at_ += 2;
    } else if (c == 'k' || c == 'g') {
      wrong("\\{} is not supported", c);
    } else {
      atom(escaped_character());
    }
  }

  /// Reads a class from its [ to its ].
  ClassTree char_class(int depth) {
    if (depth > 32) {
      wrong("character classes are nested too deeply");
    }
    ++at_;  // [
    ClassTree whole;
    if (peek() == '^') {
      whole.negated = true;
      ++at_;
    }
    bool first = true;
    bool after_set = false;  // a - behind a shorthand or property cannot be a range
    ClassTree* part = &whole;
    std::vector<ClassTree> others;
    ClassTree other;
    for (;; first = false) {
      if (at_ >= in_.size()) {
        wrong("a character class without its ]");
      }
      const char c = peek();
      if (c == ']' && !first) {
        ++at_;
        break;
      }
      const bool behind_set = std::exchange(after_set, false);
      if (starts("&&")) {
        at_ += 2;
        if (part == &other) {
          others.push_back(std::move(other));
        }
        other = ClassTree{};
        part = &other;
      } else if (starts("[:")) {
        posix_bracket(*part);
      } else if (c == '[') {
        part->nested.push_back(char_class(depth + 1));
      } else if (c == '\\' && (is_shorthand(peek(1)) || peek(1) == 'p' || peek(1) == 'P')) {
        ClassTree set;
        if (is_shorthand(peek(1))) {
          set = shorthand(peek(1));
          at_ += 2;
        } else {
          set = property();
        }
        add(*part, std::move(set));
        after_set = true;
      } else if (c == '\\' && peek(1) == 'b') {
        at_ += 2;
        part->items += "\\x08";
      } else if (c == '\\') {
        part->items += escaped_character();
      } else if (c == '-') {  // a range, or literal at either end
        ++at_;
        const bool literal =
            part->items.empty() || behind_set || peek() == ']' || peek() == '[' || starts("&&");
        part->items += literal ? "\\-" : "-";
      } else {
        const size_t length = decode_utf8(in_, at_).length;
        if (c == ']' || c == '^') {
          part->items += '\\';
        }
        part->items += in_.substr(at_, length);
        at_ += length;
      }
    }
    if (part == &other) {
      others.push_back(std::move(other));
    }
    whole.also = std::move(others);
    return whole;
  }

  void posix_bracket(ClassTree& part) {
    const size_t close = in_.find(":]", at_);
    if (close == std::string_view::npos) {
      wrong("[: without its :]");
    }
    std::string name(in_.substr(at_ + 2, close - at_ - 2));
    const bool negated = !name.empty() && name[0] == '^';
    const std::string as_property =
        fmt::format("\\{}{{{}}}", negated ? 'P' : 'p', negated ? name.substr(1) : name);
    Translator inner(as_property);
    add(part, inner.property());
    at_ = close + 2;
  }

  /// Adds a set to a union: inside the same brackets when the set allows it.
  static void add(ClassTree& part, ClassTree set) {
    const bool single =
        set.items.starts_with("\\p{") && set.items.find('}') + 1 == set.items.size();
    if (!set.negated) {
      part.items += set.items;
    } else if (single) {
      part.items += "\\P" + set.items.substr(2);
    } else {
      part.nested.push_back(std::move(set));
    }
  }

  /// PCRE2 text that matches exactly one character of the set.
  static std::string emit(const ClassTree& tree) {
    if (tree.also.empty()) {
      return emit_union(tree, tree.negated);
    }
    std::string text = "(?:";
    if (tree.negated) {
      text += "(?!";
    }
    for (const ClassTree& set : tree.also) {
      text += "(?=" + emit_union(set, false) + ")";
    }
    text += emit_union(tree, false);
    return text + (tree.negated ? ")(?s:.))" : ")");
  }

  static std::string emit_union(const ClassTree& tree, bool negated) {
    // A lone property needs no brackets, and is faster without.
    std::string items = tree.items;
    std::vector<const ClassTree*> apart;
    for (const ClassTree& set : tree.nested) {
      if (!set.negated && set.also.empty() && set.nested.empty()) {
        items += set.items;
      } else {
        apart.push_back(&set);
      }
    }
    if (apart.empty()) {
      if (items.empty()) {
        return negated ? "(?s:.)" : "(?!)";
      }
      const bool property = (items.starts_with("\\p{") || items.starts_with("\\P{")) &&
                            items.find('}') + 1 == items.size();
      if (property) {
        if (negated) {
          items[1] = items[1] == 'p' ? 'P' : 'p';
        }
        return items;
      }
      return (negated ? "[^" : "[") + items + "]";
    }
    std::string text = items.empty() ? "" : "[" + items + "]|";
    for (const ClassTree* set : apart) {
      text += emit(*set) + "|";
    }
    text.pop_back();
    return negated ? "(?:(?!" + text + ")(?s:.))" : "(?:" + text + ")";
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  size_t atom_ = 0;          // where the last atom begins in out_
  bool quantified_ = false;  // the last atom already has a quantifier
  std::vector<size_t> groups_;
};

}  // namespace

std::string translate_oniguruma(std::string_view pattern) {
  return Translator(pattern).run();
}

}  // namespace cambium::text
