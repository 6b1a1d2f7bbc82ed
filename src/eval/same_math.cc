// Comparing two answers of mathematics: first their shape, then the formulas in it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <vector>

#include "eval/graders.h"
#include "eval/math_expression.h"
#include "eval/text_edit.h"

namespace cambium {
namespace {

using Parts = std::vector<std::string>;

/// Cuts at `separator` outside all brackets. An interval's brackets need not match: "(0,1]".
Parts split_outside(std::string_view text, std::string_view separator) {
  Parts out;
  int depth = 0;
  size_t from = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    depth += c == '(' || c == '[' || c == '{' ? 1 : c == ')' || c == ']' || c == '}' ? -1 : 0;
    if (depth == 0 && text.substr(i).starts_with(separator)) {
      out.emplace_back(text.substr(from, i - from));
      from = i + separator.size();
      i = from - 1;
    }
  }
  out.emplace_back(text.substr(from));
  return out;
}

bool same_text(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](char x, char y) {
    return std::tolower(static_cast<unsigned char>(x)) ==
           std::tolower(static_cast<unsigned char>(y));
  });
}

bool same_formula(const std::string& a, const std::string& b) {
  // Words are compared without case; formulas never are.
  const auto is_word = [](const std::string& text) {
    return text.size() > 3 && std::all_of(text.begin(), text.end(), is_letter);
  };
  return a == b || (is_word(a) && same_text(a, b)) || same_expression(a, b);
}

using Same = std::function<bool(const std::string&, const std::string&)>;

bool all_in_order(const Parts& x, const Parts& y, const Same& same) {
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin(), same);
}

/// Each of x has its own twin in y.
bool all_in_any_order(const Parts& x, Parts y, const Same& same) {
  if (x.size() != y.size()) {
    return false;
  }
  for (const std::string& part : x) {
    const auto twin = std::find_if(y.begin(), y.end(),
                                   [&](const std::string& other) { return same(part, other); });
    if (twin == y.end()) {
      return false;
    }
    y.erase(twin);
  }
  return true;
}

/// Rows and cells of a matrix; nothing for what is none. pmatrix and bmatrix are alike.
std::optional<std::vector<Parts>> matrix(const std::string& text) {
  constexpr std::string_view kBegin = "\\begin{";
  if (!text.starts_with(kBegin)) {
    return std::nullopt;
  }
  const size_t close = text.find('}');
  const std::string kind = text.substr(kBegin.size(), close - kBegin.size());
  const std::string end = fmt::format("\\end{{{}}}", kind);
  if (close == std::string::npos || !text.ends_with(end) ||
      (!kind.ends_with("matrix") && kind != "array") || text.size() < close + 1 + end.size()) {
    return std::nullopt;
  }
  std::string inside = text.substr(close + 1, text.size() - close - 1 - end.size());
  if (kind == "array" && inside.starts_with('{') && inside.find('}') != std::string::npos) {
    inside.erase(0, inside.find('}') + 1);
  }
  std::vector<Parts> rows;
  for (const std::string& row : split_outside(inside, "\\\\")) {
    if (!row.empty()) {
      rows.push_back(split_outside(row, "&"));
    }
  }
  return rows;
}

bool same_matrices(const std::vector<Parts>& x, const std::vector<Parts>& y) {
  return x.size() == y.size() &&
         std::equal(x.begin(), x.end(), y.begin(), [](const Parts& a, const Parts& b) {
           return all_in_order(a, b, same_formula);
         });
}

/// Both values of "1 \pm \sqrt{2}"; the text itself without a \pm.
Parts with_both_signs(const Parts& parts) {
  Parts out;
  for (const std::string& part : parts) {
    if (part.find("\\pm") == std::string::npos) {
      out.push_back(part);
      continue;
    }
    out.push_back(replaced(replaced(part, "\\pm", "+"), "\\mp", "-"));
    out.push_back(replaced(replaced(part, "\\pm", "-"), "\\mp", "+"));
    if (out.back().starts_with('+')) {
      out.back().erase(0, 1);
    }
  }
  return out;
}

/// "x>2" as "(2,\infty)", "-1\le x<3" as "[-1,3)"; nothing for anything else.
std::optional<std::string> as_interval(std::string text) {
  // < and > stay; with "or equal" they become characters that no text has.
  constexpr char kAtMost = '\x01';
  constexpr char kAtLeast = '\x02';
  for (const auto& [name, sign] : {std::pair<std::string_view, char>{"\\leqslant", kAtMost},
                                   {"\\geqslant", kAtLeast},
                                   {"\\leq", kAtMost},
                                   {"\\geq", kAtLeast},
                                   {"\\le", kAtMost},
                                   {"\\ge", kAtLeast},
                                   {"\\lt", '<'},
                                   {"\\gt", '>'},
                                   {"<=", kAtMost},
                                   {">=", kAtLeast}}) {
    // Spaces are gone, so that one letter may follow ("\lex"); more are another command, \left.
    for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1)) {
      const size_t end = at + name.size();
      if (name[0] != '\\' || end + 1 >= text.size() || !is_letter(text[end]) ||
          !is_letter(text[end + 1])) {
        text.replace(at, name.size(), 1, sign);
      }
    }
  }
  std::vector<size_t> signs;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '<' || text[i] == '>' || text[i] == kAtMost || text[i] == kAtLeast) {
      signs.push_back(i);
    }
  }
  const auto variable = [](const std::string& part) {
    return part.size() == 1 && is_letter(part[0]);
  };
  const auto less = [&](size_t at) { return text[at] == '<' || text[at] == kAtMost; };
  const auto closed = [&](size_t at) { return text[at] == kAtMost || text[at] == kAtLeast; };
  if (signs.size() == 1) {
    std::string left = text.substr(0, signs[0]);
    std::string right = text.substr(signs[0] + 1);
    bool below = less(signs[0]);  // the variable is the smaller side
    if (!variable(left)) {
      std::swap(left, right);
      below = !below;
    }
    if (!variable(left) || right.empty()) {
      return std::nullopt;
    }
    const bool end = closed(signs[0]);
    return below ? fmt::format("(-\\infty,{}{}", right, end ? "]" : ")")
                 : fmt::format("{}{},\\infty)", end ? "[" : "(", right);
  }
  if (signs.size() == 2 && less(signs[0]) == less(signs[1])) {
    std::string low = text.substr(0, signs[0]);
    std::string high = text.substr(signs[1] + 1);
    bool low_closed = closed(signs[0]);
    bool high_closed = closed(signs[1]);
    if (!variable(text.substr(signs[0] + 1, signs[1] - signs[0] - 1)) || low.empty() ||
        high.empty()) {
      return std::nullopt;
    }
    if (!less(signs[0])) {
      std::swap(low, high);
      std::swap(low_closed, high_closed);
    }
    return fmt::format("{}{},{}{}", low_closed ? "[" : "(", low, high, high_closed ? "]" : ")");
  }
  return std::nullopt;
}

bool bracketed(const std::string& text) {
  if (text.size() < 3 || (text.front() != '(' && text.front() != '[') ||
      (text.back() != ')' && text.back() != ']')) {
    return false;
  }
  int depth = 0;  // "(x+1)(x-2)" is no tuple
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    depth += text[i] == '(' || text[i] == '[' ? 1 : text[i] == ')' || text[i] == ']' ? -1 : 0;
    if (depth == 0) {
      return false;
    }
  }
  return true;
}

/// Both sides of an equation, if it is one.
std::optional<std::pair<std::string, std::string>> sides(const std::string& text) {
  const size_t at = text.find('=');
  if (at == std::string::npos || at == 0 || at + 1 == text.size() ||
      text.find('=', at + 1) != std::string::npos ||
      std::string_view("<>!").find(text[at - 1]) != std::string_view::npos) {
    return std::nullopt;
  }
  return std::pair{text.substr(0, at), text.substr(at + 1)};
}

/// left - right of both differ by a constant factor.
bool same_equations(const std::pair<std::string, std::string>& x,
                    const std::pair<std::string, std::string>& y) {
  std::optional<std::complex<double>> factor;
  for (int point = 0; point < 4; ++point) {
    const auto a = value_at(x.first, point);
    const auto b = value_at(x.second, point);
    const auto c = value_at(y.first, point);
    const auto d = value_at(y.second, point);
    if (!a || !b || !c || !d || std::abs(*c - *d) < 1e-12) {
      return false;
    }
    const std::complex<double> ratio = (*a - *b) / (*c - *d);
    if (std::abs(ratio) < 1e-12 || (factor && std::abs(ratio - *factor) > 1e-9 * std::abs(ratio))) {
      return false;
    }
    factor = ratio;
  }
  return true;
}

bool same_parts(const std::string& x, const std::string& y, int depth);

bool same_lists(const std::string& x, const std::string& y, int depth) {
  const auto same = [&](const std::string& a, const std::string& b) {
    return same_parts(a, b, depth + 1);
  };
  const bool ordered = bracketed(x) && split_outside(x.substr(1, x.size() - 2), ",").size() > 1;
  if (ordered) {
    return bracketed(y) && x.front() == y.front() && x.back() == y.back() &&
           all_in_order(split_outside(x.substr(1, x.size() - 2), ","),
                        split_outside(y.substr(1, y.size() - 2), ","), same);
  }
  const auto listed = [](const std::string& text) {
    const bool set = text.starts_with("\\{") && text.ends_with("\\}");
    return with_both_signs(split_outside(set ? text.substr(2, text.size() - 4) : text, ","));
  };
  const Parts left = listed(x);
  const Parts right = listed(y);
  // One element that is the text itself would be compared for ever.
  if (left.size() < 2 && (left.empty() || left[0] == x) && (right.empty() || right[0] == y)) {
    return false;
  }
  return all_in_any_order(left, right, same);
}

bool same_parts(const std::string& x, const std::string& y, int depth) {
  if (depth > 4 || x.empty() || y.empty()) {
    return x == y && !x.empty();
  }
  if (same_formula(x, y)) {
    return true;
  }
  const auto left = matrix(x);
  const auto right = matrix(y);
  if (left || right) {
    return left && right && same_matrices(*left, *right);
  }
  const Parts unions_x = split_outside(x, "\\cup");
  const Parts unions_y = split_outside(y, "\\cup");
  if (unions_x.size() > 1 || unions_y.size() > 1) {
    return all_in_any_order(unions_x, unions_y, [&](const std::string& a, const std::string& b) {
      return same_parts(a, b, depth + 1);
    });
  }
  const auto equation_x = sides(x);
  const auto equation_y = sides(y);
  if (equation_x && equation_y) {
    return same_equations(*equation_x, *equation_y);
  }
  const auto interval_x = as_interval(x);
  const auto interval_y = as_interval(y);
  if (interval_x || interval_y) {
    return same_parts(interval_x.value_or(x), interval_y.value_or(y), depth + 3);
  }
  return same_lists(x, y, depth);
}

}  // namespace

bool same_math(std::string_view a, std::string_view b) {
  const std::string x = normalise_math(a);
  const std::string y = normalise_math(b);
  if (x.empty() || y.empty()) {
    return x == y;
  }
  return same_parts(x, y, 0) || (number_value(x) && number_value(y) &&
                                 std::abs(*number_value(x) - *number_value(y)) <=
                                     1e-9 * std::max(1.0, std::abs(*number_value(y))));
}

}  // namespace cambium
