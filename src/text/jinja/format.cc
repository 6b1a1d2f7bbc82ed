// Python's two ways to format: "%s" % value and "{}".format(value).
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "text/jinja/filter_tables.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

struct Spec {
  std::string fill = " ";
  char align = '\0';  // < > ^ =
  char sign = '-';
  bool alternate = false;
  bool comma = false;
  int64_t width = 0;
  int64_t precision = -1;
  char type = '\0';
};

int64_t read_number(std::string_view s, size_t& at) {
  int64_t n = 0;
  while (at < s.size() && s[at] >= '0' && s[at] <= '9') {
    n = n * 10 + (s[at++] - '0');
    expect(n < 100'000, "a format's width or precision is too large");
  }
  return n;
}

std::string pad(const std::string& text, const Spec& spec, char fallback_align) {
  const int64_t missing = spec.width - static_cast<int64_t>(text::utf8_length(text));
  if (missing <= 0) {
    return text;
  }
  const char align = spec.align == '\0' ? fallback_align : spec.align;
  int64_t left = align == '<' ? 0 : missing;
  if (align == '^') {
    left = missing / 2;
  }
  std::string before;
  std::string after;
  for (int64_t i = 0; i < missing; ++i) {
    (i < left ? before : after) += spec.fill;
  }
  const size_t sign = align == '=' && !text.empty() && (text[0] == '-' || text[0] == '+') ? 1 : 0;
  return text.substr(0, sign) + before + text.substr(sign) + after;
}

std::string with_sign(std::string digits, bool negative, const Spec& spec) {
  if (spec.comma) {
    const size_t point = std::min(digits.find_first_of(".e"), digits.size());
    for (size_t i = point; i > 3; i -= 3) {
      digits.insert(i - 3, ",");
    }
  }
  return (negative ? "-" : spec.sign == '+' ? "+" : spec.sign == ' ' ? " " : "") + digits;
}

std::string format_number(const Value& value, const Spec& spec) {
  const char type = spec.type == '\0' ? (value.is_float() ? 'g' : 'd') : spec.type;
  if (type == 'd' || type == 'i' || type == 'u' || type == 'x' || type == 'X' || type == 'o' ||
      type == 'b') {
    const auto whole = value.is_float()
                           ? static_cast<int64_t>(std::clamp(value.as_double(), -9.2e18, 9.2e18))
                           : value.as_int();
    const uint64_t size =
        whole < 0 ? 0 - static_cast<uint64_t>(whole) : static_cast<uint64_t>(whole);
    std::string digits = type == 'x'   ? fmt::format("{:x}", size)
                         : type == 'X' ? fmt::format("{:X}", size)
                         : type == 'o' ? fmt::format("{:o}", size)
                         : type == 'b' ? fmt::format("{:b}", size)
                                       : std::to_string(size);
    return with_sign(std::move(digits), whole < 0, spec);
  }
  const double number = std::abs(value.as_double());
  const bool negative = std::signbit(value.as_double());
  const auto precision = static_cast<int>(spec.precision < 0 ? 6 : spec.precision);
  if (spec.type == '\0' && spec.precision < 0) {
    return with_sign(float_repr(number), negative, spec);
  }
  switch (type) {
    case 'f':
    case 'F':
      return with_sign(fmt::format("{:.{}f}", number, precision), negative, spec);
    case 'e':
      return with_sign(fmt::format("{:.{}e}", number, precision), negative, spec);
    case 'E':
      return with_sign(fmt::format("{:.{}E}", number, precision), negative, spec);
    case '%':
      return with_sign(fmt::format("{:.{}f}%", number * 100, precision), negative, spec);
    case 'g':
    case 'G':
      return with_sign(fmt::format("{:.{}g}", number, std::max(precision, 1)), negative, spec);
    default:
      fail("format type {:?} is not supported", std::string(1, type));
  }
}

std::string limited(Runtime& runtime, std::string text, const Spec& spec) {
  if (spec.precision >= 0) {
    const std::u32string characters = text::to_code_points(text);
    text = text::to_utf8(characters.substr(0, static_cast<size_t>(spec.precision)));
  }
  runtime.budget.bytes(text.size());
  return text;
}

/// The value of one {field}: an index or a name, then .attribute and [item].
Value field_value(Runtime& runtime, std::string_view field, const Args& args, size_t& automatic) {
  size_t at = std::min(field.find_first_of(".["), field.size());
  const std::string head(field.substr(0, at));
  Value value;
  if (head.empty() ||
      std::all_of(head.begin(), head.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    size_t digits = 0;
    const size_t index =
        head.empty() ? automatic++ : static_cast<size_t>(read_number(head, digits));
    expect(index < args.positional.size(), "format has no argument {}", index);
    value = args.positional[index];
  } else {
    const auto found = std::find_if(args.named.begin(), args.named.end(),
                                    [&](const auto& arg) { return arg.first == head; });
    expect(found != args.named.end(), "format has no argument {:?}", head);
    value = found->second;
  }
  while (at < field.size()) {
    const bool item = field[at] == '[';
    const size_t end =
        item ? field.find(']', at) : std::min(field.find_first_of(".[", at + 1), field.size());
    expect(end != std::string_view::npos, "format expected ] in {:?}", field);
    const std::string name(field.substr(at + 1, end - at - 1));
    size_t digits = 0;
    value = !item ? runtime.attribute(value, name)
            : !name.empty() && name[0] >= '0' && name[0] <= '9'
                ? runtime.item(value, Value(read_number(name, digits)))
                : runtime.item(value, Value(name));
    at = item ? end + 1 : end;
  }
  return value;
}

Spec parse_spec(std::string_view s) {
  Spec spec;
  size_t at = 0;
  const size_t first = s.empty() ? 0 : text::decode_utf8(s, 0).length;
  const auto aligns = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  if (first < s.size() && aligns(s[first])) {
    spec.fill = s.substr(0, first);
    spec.align = s[first];
    at = first + 1;
  } else if (!s.empty() && aligns(s[0])) {
    spec.align = s[at++];
  }
  if (at < s.size() && (s[at] == '+' || s[at] == '-' || s[at] == ' ')) {
    spec.sign = s[at++];
  }
  if (at < s.size() && s[at] == '0') {
    spec.fill = "0";
    spec.align = spec.align == '\0' ? '=' : spec.align;
    ++at;
  }
  spec.width = read_number(s, at);
  if (at < s.size() && s[at] == ',') {
    spec.comma = true;
    ++at;
  }
  if (at < s.size() && s[at] == '.') {
    spec.precision = read_number(s, ++at);
  }
  if (at < s.size()) {
    spec.type = s[at++];
  }
  expect(at == s.size(), "format specification {:?} is not supported", s);
  return spec;
}

}  // namespace

std::string format_braces(Runtime& runtime, const std::string& format, const Args& args) {
  std::string out;
  size_t automatic = 0;
  for (size_t at = 0; at < format.size(); ++at) {
    const char c = format[at];
    if ((c == '{' || c == '}') && at + 1 < format.size() && format[at + 1] == c) {
      out += c;
      ++at;
      continue;
    }
    expect(c != '}', "format met a single }}");
    if (c != '{') {
      out += c;
      continue;
    }
    const size_t end = format.find('}', at);
    expect(end != std::string::npos, "format expected }} in {:?}", format);
    std::string_view inside = std::string_view(format).substr(at + 1, end - at - 1);
    const size_t colon = std::min(inside.find(':'), inside.size());
    const std::string_view spec_text = colon < inside.size() ? inside.substr(colon + 1) : "";
    inside = inside.substr(0, colon);
    const size_t bang = inside.find('!');
    const Value value = field_value(runtime, inside.substr(0, bang), args, automatic);
    const Spec spec = parse_spec(spec_text);
    if (bang != std::string_view::npos && inside.substr(bang) == "!r") {
      out += pad(limited(runtime, to_repr(value, runtime.budget), spec), spec, '<');
    } else if (value.is_number() && !(value.is_bool() && spec.type == '\0') && spec.type != 's') {
      out += pad(format_number(value, spec), spec, '>');
    } else {
      out += pad(limited(runtime, runtime.str(value), spec), spec, '<');
    }
    runtime.budget.bytes(static_cast<size_t>(spec.width));
    at = end;
  }
  return out;
}

std::string format_percent(Runtime& runtime, const std::string& format, const Value& value) {
  const bool tuple = value.is_list() && value.as_list().kind == List::Kind::kTuple;
  const std::vector<Value> values = tuple ? value.as_list().items : std::vector<Value>{value};
  size_t next = 0;
  std::string out;
  for (size_t at = 0; at < format.size(); ++at) {
    if (format[at] != '%') {
      out += format[at];
      continue;
    }
    expect(++at < format.size(), "format ends in the middle of a %");
    if (format[at] == '%') {
      out += '%';
      continue;
    }
    Value item;
    bool named = false;
    if (format[at] == '(') {
      const size_t end = format.find(')', at);
      expect(end != std::string::npos, "format expected ) in {:?}", format);
      item = runtime.item(value, Value(format.substr(at + 1, end - at - 1)));
      named = true;
      at = end + 1;
    }
    Spec spec;
    for (;
         at < format.size() && std::string_view("-+ 0#").find(format[at]) != std::string_view::npos;
         ++at) {
      if (format[at] == '-') {
        spec.align = '<';
      } else if (format[at] == '0' && spec.align == '\0') {
        spec.align = '=';
        spec.fill = "0";
      } else if (format[at] == '+' || format[at] == ' ') {
        spec.sign = format[at];
      }
    }
    spec.width = read_number(format, at);
    if (at < format.size() && format[at] == '.') {
      spec.precision = read_number(format, ++at);
    }
    expect(at < format.size(), "format ends in the middle of a %");
    spec.type = format[at];
    if (!named) {
      expect(next < values.size(), "format has not enough values for {:?}", format);
      item = values[next++];
    }
    runtime.budget.bytes(static_cast<size_t>(spec.width));
    if (spec.type == 's' || spec.type == 'r') {
      const std::string text = spec.type == 's' ? runtime.str(item) : to_repr(item, runtime.budget);
      out += pad(limited(runtime, text, spec), spec, '>');
    } else {
      expect(item.is_number(), "%{} expected a number, got a {}", spec.type, item.type_name());
      out += pad(format_number(item, spec), spec, '>');
    }
    expect(out.size() <= static_cast<size_t>(Budget::kOutput),
           "format makes a text that is too long");
  }
  expect(next == values.size() || value.is_dict(), "format has more values than places in {:?}",
         format);
  return out;
}

}  // namespace cambium::jinja
