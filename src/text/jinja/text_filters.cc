// The filters that make text.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/text.h"
#include "text/jinja/filter_tables.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

Value do_string(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("string", args, {});
  return runtime.text(runtime.str(value));
}

Value do_trim(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("trim", args, {"chars"});
  return runtime.text(strip(runtime.str(value), b[0], true, true));
}

Value do_upper(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("upper", args, {});
  return runtime.text(text::to_upper(runtime.str(value)));
}

Value do_lower(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("lower", args, {});
  return runtime.text(text::to_lower(runtime.str(value)));
}

Value do_capitalize(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("capitalize", args, {});
  return runtime.text(capitalize(runtime.str(value)));
}

/// Words begin after blanks, dashes and opening brackets.
Value do_title(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("title", args, {});
  std::string out;
  bool begins = true;
  for (const char32_t c : text::to_code_points(runtime.str(value))) {
    const std::string one = text::to_utf8(std::u32string_view(&c, 1));
    out += begins ? text::to_upper(one) : text::to_lower(one);
    begins = text::is_white_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
  }
  return runtime.text(std::move(out));
}

Value do_replace(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("replace", args, {"old", "new", "count"});
  return runtime.text(replace(runtime, runtime.str(value), runtime.str(b.required(0)),
                              runtime.str(b.required(1)), b.integer(2, -1)));
}

Value do_join(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("join", args, {"d", "attribute"});
  const std::string between = b.has(0) ? runtime.str(b[0]) : "";
  Value items = value;
  if (b.has(1) && !b[1].is_none()) {
    Args attribute;
    attribute.named.emplace_back("attribute", b[1]);
    items = runtime.filter("map", value, attribute);
  }
  std::string out;
  bool first = true;
  for (const Value& item : runtime.iterate(items)) {
    out += first ? "" : between;
    first = false;
    out += runtime.str(item);
    runtime.budget.bytes(between.size());
    expect(out.size() <= static_cast<size_t>(Budget::kOutput),
           "join makes a text that is too long");
  }
  return runtime.text(std::move(out));
}

Value do_escape(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("escape", args, {});
  return runtime.text(escape_html(runtime.str(value)));
}

std::vector<std::string> lines_of(const std::string& s) {
  std::vector<std::string> lines;
  size_t from = 0;
  for (size_t at = 0; at < s.size(); ++at) {
    if (s[at] == '\n' || s[at] == '\r') {
      lines.push_back(s.substr(from, at - from));
      at += s[at] == '\r' && at + 1 < s.size() && s[at + 1] == '\n';
      from = at + 1;
    }
  }
  if (from < s.size()) {
    lines.push_back(s.substr(from));
  }
  return lines;
}

Value do_indent(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("indent", args, {"width", "first", "blank"});
  const std::string margin =
      b.has(0) && b[0].is_string()
          ? b[0].as_string()
          : std::string(static_cast<size_t>(std::clamp<int64_t>(b.integer(0, 4), 0, 1000)), ' ');
  const std::vector<std::string> lines = lines_of(runtime.str(value) + "\n");
  std::string out = b.boolean(1, false) ? margin : "";
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) {
      out += '\n';
      out += lines[i].empty() && !b.boolean(2, false) ? "" : margin;
    }
    out += lines[i];
    runtime.budget.bytes(margin.size());
    expect(out.size() <= static_cast<size_t>(Budget::kOutput),
           "indent makes a text that is too long");
  }
  return runtime.text(std::move(out));
}

Value do_truncate(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("truncate", args, {"length", "killwords", "end", "leeway"});
  const std::u32string s = text::to_code_points(runtime.str(value));
  const std::u32string end = text::to_code_points(b.string(2, "..."));
  const int64_t length = b.integer(0, 255);
  const int64_t leeway = b.integer(3, 5);
  expect(length >= static_cast<int64_t>(end.size()),
         "truncate expected a length of at least {}, got {}", end.size(), length);
  if (static_cast<int64_t>(s.size()) <= length + leeway) {
    return runtime.text(text::to_utf8(s));
  }
  std::u32string kept = s.substr(0, static_cast<size_t>(length) - end.size());
  if (!b.boolean(1, false)) {
    const size_t blank = kept.rfind(U' ');
    kept = blank == std::u32string::npos ? kept : kept.substr(0, blank);
  }
  return runtime.text(text::to_utf8(kept + end));
}

Value do_wordcount(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("wordcount", args, {});
  int64_t words = 0;
  bool inside = false;
  for (const char32_t c : text::to_code_points(runtime.str(value))) {
    const bool word = text::is_word(c);
    words += word && !inside;
    inside = word;
  }
  return words;
}

Value do_center(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("center", args, {"width"});
  return runtime.text(center(runtime.str(value), b.integer(0, 80), " "));
}

Value do_format(Runtime& runtime, const Value& value, const Args& args) {
  const std::string format = runtime.str(value);
  expect(args.positional.empty() || args.named.empty(),
         "format expected arguments either by position or by name");
  if (args.named.empty()) {
    return runtime.text(
        format_percent(runtime, format, Value::list(args.positional, List::Kind::kTuple)));
  }
  Dict named;
  for (const auto& [name, item] : args.named) {
    named.set(name, item);
  }
  return runtime.text(format_percent(runtime, format, Value::dict(std::move(named))));
}

Value do_urlencode(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("urlencode", args, {});
  std::string out;
  for (const unsigned char c : runtime.str(value)) {
    const bool plain =
        (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') ||
        std::string_view("_.-~/").find(static_cast<char>(c)) != std::string_view::npos;
    out += plain ? std::string(1, static_cast<char>(c)) : fmt::format("%{:02X}", c);
  }
  return runtime.text(std::move(out));
}

constexpr std::array<std::pair<std::string_view, Filter>, 19> kFilters = {{
    {"string", do_string},
    {"trim", do_trim},
    {"upper", do_upper},
    {"lower", do_lower},
    {"capitalize", do_capitalize},
    {"title", do_title},
    {"replace", do_replace},
    {"join", do_join},
    {"escape", do_escape},
    {"e", do_escape},
    {"forceescape", do_escape},
    {"safe", do_string},  // nothing is escaped unasked, so nothing needs marking as safe
    {"indent", do_indent},
    {"truncate", do_truncate},
    {"wordcount", do_wordcount},
    {"center", do_center},
    {"format", do_format},
    {"urlencode", do_urlencode},
    {"pprint", [](Runtime& runtime, const Value& value,
                  const Args&) { return Value(to_repr(value, runtime.budget)); }},
}};

}  // namespace

Filter find_text_filter(std::string_view name) {
  const auto found = std::find_if(kFilters.begin(), kFilters.end(),
                                  [&](const auto& row) { return row.first == name; });
  return found == kFilters.end() ? nullptr : found->second;
}

}  // namespace cambium::jinja
