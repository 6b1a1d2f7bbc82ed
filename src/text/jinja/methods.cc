// Methods of strings, lists, mappings and loops, as Python has them.
#include <algorithm>
#include <array>
#include <optional>

#include "base/error.h"
#include "text/jinja/filter_tables.h"
#include "text/jinja/search.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

using Values = std::vector<Value>;
using Row = std::pair<std::string_view, Filter>;

Value strings(Runtime& runtime, std::vector<std::string> parts,
              List::Kind kind = List::Kind::kList) {
  Values values;
  for (std::string& part : parts) {
    runtime.budget.step();
    values.push_back(runtime.text(std::move(part)));
  }
  return Value::list(std::move(values), kind);
}

std::vector<std::string> split_blanks(const std::string& s, int64_t most, bool from_right) {
  std::u32string characters = text::to_code_points(s);
  if (from_right) {
    std::reverse(characters.begin(), characters.end());
  }
  std::vector<std::string> parts;
  size_t at = 0;
  const auto skip = [&] {
    while (at < characters.size() && text::is_white_space(characters[at])) {
      ++at;
    }
  };
  for (skip(); at < characters.size(); skip()) {
    std::u32string part;
    if (most >= 0 && static_cast<int64_t>(parts.size()) == most) {  // the rest as it is
      part = characters.substr(at);
      at = characters.size();
    } else {
      while (at < characters.size() && !text::is_white_space(characters[at])) {
        part += characters[at++];
      }
    }
    if (from_right) {
      std::reverse(part.begin(), part.end());
    }
    parts.push_back(text::to_utf8(part));
  }
  if (from_right) {
    std::reverse(parts.begin(), parts.end());
  }
  return parts;
}

std::vector<std::string> split_at(const std::string& s, const std::string& separator,
                                  int64_t most) {
  expect(!separator.empty(), "split expected a separator, got an empty string");
  std::vector<std::string> parts;
  size_t from = 0;
  for (size_t at; (most < 0 || static_cast<int64_t>(parts.size()) < most) &&
                  (at = find_bytes(s, separator, from)) != std::string::npos;
       from = at + separator.size()) {
    parts.push_back(s.substr(from, at - from));
  }
  parts.push_back(s.substr(from));
  return parts;
}

std::vector<std::string> rsplit_at(const std::string& s, const std::string& separator,
                                   int64_t most) {
  expect(!separator.empty(), "rsplit expected a separator, got an empty string");
  std::vector<std::string> parts;
  size_t end = s.size();
  while (most < 0 || static_cast<int64_t>(parts.size()) < most) {
    const size_t at = rfind_bytes(std::string_view(s).substr(0, end), separator);
    if (at == std::string::npos) {
      break;
    }
    parts.push_back(s.substr(at + separator.size(), end - at - separator.size()));
    end = at;
  }
  parts.push_back(s.substr(0, end));
  std::reverse(parts.begin(), parts.end());
  return parts;
}

Value split(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("split", args, {"sep", "maxsplit"});
  const bool blanks = !b.has(0) || b[0].is_none();
  return strings(runtime, blanks ? split_blanks(self.as_string(), b.integer(1, -1), false)
                                 : split_at(self.as_string(), b.string(0, ""), b.integer(1, -1)));
}

Value rsplit(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("rsplit", args, {"sep", "maxsplit"});
  const bool blanks = !b.has(0) || b[0].is_none();
  return strings(runtime, blanks ? split_blanks(self.as_string(), b.integer(1, -1), true)
                                 : rsplit_at(self.as_string(), b.string(0, ""), b.integer(1, -1)));
}

Value splitlines(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("splitlines", args, {"keepends"});
  const bool keep = b.boolean(0, false);
  std::vector<std::string> lines;
  const std::string& s = self.as_string();
  size_t from = 0;
  for (size_t at = 0; at < s.size();) {
    const text::Decoded d = text::decode_utf8(s, at);
    const char32_t c = d.code_point;
    size_t end = at + d.length;
    if ((c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
        c == 0x2029) {
      end += c == '\r' && end < s.size() && s[end] == '\n';
      lines.push_back(s.substr(from, (keep ? end : at) - from));
      from = end;
    }
    at = end;
  }
  if (from < s.size()) {
    lines.push_back(s.substr(from));
  }
  return strings(runtime, std::move(lines));
}

template <bool kLeft, bool kRight>
Value strip_method(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("strip", args, {"chars"});
  return runtime.text(strip(self.as_string(), b[0], kLeft, kRight));
}

/// Python's slice bound for find and count.
size_t text_bound(const Bound& b, size_t i, size_t size, size_t fallback) {
  if (!b.has(i) || b[i].is_none()) {
    return fallback;
  }
  const int64_t at = b.integer(i, 0);
  return static_cast<size_t>(std::clamp<int64_t>(at < 0 ? at + static_cast<int64_t>(size) : at, 0,
                                                 static_cast<int64_t>(size)));
}

template <bool kStart>
Value affix(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b(kStart ? "startswith" : "endswith", args, {"prefix", "start", "end"});
  const std::u32string all = b.has(1) ? text::to_code_points(self.as_string()) : U"";
  const size_t start = text_bound(b, 1, all.size(), 0);
  const size_t end = text_bound(b, 2, all.size(), all.size());
  const std::string part = !b.has(1)     ? self.as_string()
                           : start > end ? std::string()
                                         : text::to_utf8(all.substr(start, end - start));
  const Value& what = b.required(0);
  const auto matches = [&](const Value& one) {
    const std::string& affix = expect_string(one, kStart ? "startswith" : "endswith");
    return kStart ? part.starts_with(affix) : part.ends_with(affix);
  };
  if (what.is_list()) {
    const Values any = runtime.iterate(what);
    return std::any_of(any.begin(), any.end(), matches);
  }
  return matches(what);
}

/// The position of the argument in characters, or -1.
int64_t find_text(const Value& self, const Args& args, const char* name, bool last) {
  const Bound b(name, args, {"sub", "start", "end"});
  const std::u32string s = text::to_code_points(self.as_string());
  const std::string& sub = expect_string(b.required(0), name);
  const size_t start = text_bound(b, 1, s.size(), 0);
  const size_t end = text_bound(b, 2, s.size(), s.size());
  if (start > end) {
    return -1;
  }
  const std::string range = text::to_utf8(std::u32string_view(s).substr(start, end - start));
  const size_t at = last ? rfind_bytes(range, sub) : find_bytes(range, sub);
  return at == std::string::npos
             ? -1
             : static_cast<int64_t>(text::utf8_length(std::string_view(range).substr(0, at)) +
                                    start);
}

template <bool kLast, bool kMust>
Value find(Runtime& runtime, const Value& self, const Args& args) {
  runtime.budget.step(static_cast<int64_t>(self.as_string().size() / 16 + 1));
  const int64_t at = find_text(self, args, kMust ? "index" : "find", kLast);
  expect(!kMust || at >= 0, "index did not find the text");
  return at;
}

Value count(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("count", args, {"sub"});
  const std::string& sub = expect_string(b.required(0), "count");
  const std::string& s = self.as_string();
  runtime.budget.step(static_cast<int64_t>(s.size() / 16 + 1));
  if (sub.empty()) {
    return static_cast<int64_t>(text::utf8_length(s) + 1);
  }
  int64_t n = 0;
  for (size_t at = 0; (at = find_bytes(s, sub, at)) != std::string::npos; at += sub.size()) {
    ++n;
  }
  return n;
}

Value replace_method(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("replace", args, {"old", "new", "count"});
  return runtime.text(replace(runtime, self.as_string(), expect_string(b.required(0), "replace"),
                              expect_string(b.required(1), "replace"), b.integer(2, -1)));
}

Value join(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("join", args, {"iterable"});
  // Read once: a generator is spent afterwards.
  std::vector<Value> items = runtime.iterate(b.required(0));
  for (const Value& item : items) {
    expect_string(item, "join");
  }
  Args between;
  between.positional.push_back(self);
  return runtime.filter("join", Value::list(std::move(items)), between);
}

template <std::string (*Change)(std::string_view)>
Value changed(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("a string method", args, {});
  return runtime.text(Change(self.as_string()));
}

std::string capitalised(std::string_view s) {
  return capitalize(std::string(s));
}

/// str.title: a letter after anything but a letter begins a word.
std::string title(std::string_view s) {
  std::string out;
  bool inside = false;
  for (const char32_t c : text::to_code_points(s)) {
    const std::string one = text::to_utf8(std::u32string_view(&c, 1));
    const std::string upper = text::to_upper(one);
    const std::string lower = text::to_lower(one);
    out += inside ? lower : upper;
    inside = upper != lower;
  }
  return out;
}

std::string swapcase(std::string_view s) {
  std::string out;
  for (const char32_t c : text::to_code_points(s)) {
    const std::string one = text::to_utf8(std::u32string_view(&c, 1));
    const std::string lower = text::to_lower(one);
    out += lower == one ? text::to_upper(one) : lower;
  }
  return out;
}

/// True when the text is not empty and every character satisfies the predicate.
template <bool (*Predicate)(char32_t)>
Value every(Runtime&, const Value& self, const Args& args) {
  const Bound b("a string method", args, {});
  const std::u32string s = text::to_code_points(self.as_string());
  return !s.empty() && std::all_of(s.begin(), s.end(), Predicate);
}

bool digit(char32_t c) {
  return c >= '0' && c <= '9';
}
bool letter_or_digit(char32_t c) {
  return text::is_word(c) && c != '_';
}
bool letter(char32_t c) {
  return letter_or_digit(c) && !digit(c);
}
bool ascii(char32_t c) {
  return c < 0x80;
}

Value is_ascii(Runtime&, const Value& self, const Args&) {
  const std::u32string s = text::to_code_points(self.as_string());
  return std::all_of(s.begin(), s.end(), ascii);
}

template <bool kUpper>
Value has_case(Runtime& runtime, const Value& self, const Args&) {
  return runtime.test(kUpper ? "upper" : "lower", self, {});
}

template <bool kPrefix>
Value without_affix(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("removeprefix", args, {"affix"});
  const std::string& s = self.as_string();
  const std::string& affix = expect_string(b.required(0), "removeprefix");
  if (kPrefix ? s.starts_with(affix) : s.ends_with(affix)) {
    return runtime.text(kPrefix ? s.substr(affix.size()) : s.substr(0, s.size() - affix.size()));
  }
  return self;
}

template <bool kLast>
Value partition(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("partition", args, {"sep"});
  const std::string& s = self.as_string();
  const std::string& separator = expect_string(b.required(0), "partition");
  expect(!separator.empty(), "partition expected a separator, got an empty string");
  const size_t at = kLast ? rfind_bytes(s, separator) : find_bytes(s, separator);
  std::vector<std::string> parts;
  if (at != std::string::npos) {
    parts = {s.substr(0, at), separator, s.substr(at + separator.size())};
  } else if (kLast) {
    parts = {"", "", s};
  } else {
    parts = {s, "", ""};
  }
  return strings(runtime, std::move(parts), List::Kind::kTuple);
}

int64_t checked_width(const Bound& b) {
  const int64_t width = expect_integer(b.required(0), "a padding method");
  expect(width < 1'000'000, "a text of {} characters is too wide", width);
  return width;
}

template <int kSide>  // -1: text to the left, 0: centred, 1: text to the right
Value justify(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("ljust", args, {"width", "fillchar"});
  const int64_t width = checked_width(b);
  const std::string fill = b.string(1, " ");
  expect(text::utf8_length(fill) == 1, "a padding method expected one character, got {:?}", fill);
  if (kSide == 0) {
    return runtime.text(center(self.as_string(), width, fill));
  }
  std::string padding;
  for (auto n = static_cast<int64_t>(text::utf8_length(self.as_string())); n < width; ++n) {
    padding += fill;
  }
  return runtime.text(kSide < 0 ? self.as_string() + padding : padding + self.as_string());
}

Value zfill(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("zfill", args, {"width"});
  const int64_t width = checked_width(b);
  const std::string& s = self.as_string();
  const auto length = static_cast<int64_t>(text::utf8_length(s));
  const size_t sign = s.starts_with('-') || s.starts_with('+') ? 1 : 0;
  const std::string zeros(static_cast<size_t>(std::max<int64_t>(0, width - length)), '0');
  return runtime.text(s.substr(0, sign) + zeros + s.substr(sign));
}

Value format(Runtime& runtime, const Value& self, const Args& args) {
  return runtime.text(format_braces(runtime, self.as_string(), args));
}

constexpr std::array<Row, 39> kStringMethods = {{
    {"split", split},
    {"rsplit", rsplit},
    {"splitlines", splitlines},
    {"strip", strip_method<true, true>},
    {"lstrip", strip_method<true, false>},
    {"rstrip", strip_method<false, true>},
    {"startswith", affix<true>},
    {"endswith", affix<false>},
    {"find", find<false, false>},
    {"rfind", find<true, false>},
    {"index", find<false, true>},
    {"rindex", find<true, true>},
    {"count", count},
    {"replace", replace_method},
    {"join", join},
    {"upper", changed<text::to_upper>},
    {"lower", changed<text::to_lower>},
    {"casefold", changed<text::to_lower>},
    {"capitalize", changed<capitalised>},
    {"title", changed<title>},
    {"swapcase", changed<swapcase>},
    {"isdigit", every<digit>},
    {"isdecimal", every<digit>},
    {"isnumeric", every<digit>},
    {"isalpha", every<letter>},
    {"isalnum", every<letter_or_digit>},
    {"isspace", every<text::is_white_space>},
    {"isascii", is_ascii},
    {"isupper", has_case<true>},
    {"islower", has_case<false>},
    {"removeprefix", without_affix<true>},
    {"removesuffix", without_affix<false>},
    {"partition", partition<false>},
    {"rpartition", partition<true>},
    {"center", justify<0>},
    {"ljust", justify<-1>},
    {"rjust", justify<1>},
    {"zfill", zfill},
    {"format", format},
}};

Value list_count(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("count", args, {"value"});
  int64_t n = 0;
  for (const Value& item : self.as_list().items) {
    n += equal(item, b.required(0), runtime.budget);
  }
  return n;
}

Value list_index(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("index", args, {"value"});
  const Values& items = self.as_list().items;
  for (size_t i = 0; i < items.size(); ++i) {
    if (equal(items[i], b.required(0), runtime.budget)) {
      return static_cast<int64_t>(i);
    }
  }
  fail("index did not find the value");
}

Value copy(Runtime&, const Value& self, const Args&) {
  return self;
}

Value forbidden(Runtime&, const Value& self, const Args&) {
  fail("a template must not change a {}; use a namespace and new values", self.type_name());
}

constexpr std::array<Row, 11> kListMethods = {{
    {"count", list_count},
    {"index", list_index},
    {"copy", copy},
    {"append", forbidden},
    {"extend", forbidden},
    {"insert", forbidden},
    {"pop", forbidden},
    {"remove", forbidden},
    {"clear", forbidden},
    {"sort", forbidden},
    {"reverse", forbidden},
}};

Value dict_get(Runtime&, const Value& self, const Args& args) {
  const Bound b("get", args, {"key", "default"});
  const Value* found = self.as_dict().find(b.required(0));
  return found != nullptr ? *found : (b.has(1) ? b[1] : Value::none());
}

Value dict_items(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b("items", args, {});
  Values pairs;
  for (const auto& [key, item] : self.as_dict().items()) {
    runtime.budget.step();
    pairs.push_back(Value::list({key, item}, List::Kind::kTuple));
  }
  return Value::list(std::move(pairs), List::Kind::kView);
}

template <bool kKeys>
Value dict_side(Runtime& runtime, const Value& self, const Args& args) {
  const Bound b(kKeys ? "keys" : "values", args, {});
  Values side;
  for (const auto& [key, item] : self.as_dict().items()) {
    runtime.budget.step();
    side.push_back(kKeys ? key : item);
  }
  return Value::list(std::move(side), List::Kind::kView);
}

constexpr std::array<Row, 10> kDictMethods = {{
    {"get", dict_get},
    {"items", dict_items},
    {"keys", dict_side<true>},
    {"values", dict_side<false>},
    {"copy", copy},
    {"update", forbidden},
    {"pop", forbidden},
    {"popitem", forbidden},
    {"setdefault", forbidden},
    {"clear", forbidden},
}};

Value loop_cycle(Runtime&, const Value& self, const Args& args) {
  expect(!args.positional.empty(), "loop.cycle expected values");
  return args.positional[self.get_if<const Loop>()->index % args.positional.size()];
}

Value loop_changed(Runtime& runtime, const Value& self, const Args& args) {
  Values& last = *self.get_if<const Loop>()->changed;
  const Value now = Value::list(args.positional, List::Kind::kTuple);
  if (!last.empty() && equal(last[0], now, runtime.budget)) {
    return false;
  }
  last.assign(1, now);
  return true;
}

constexpr std::array<Row, 2> kLoopMethods = {{
    {"cycle", loop_cycle},
    {"changed", loop_changed},
}};

template <size_t kSize>
Filter look_up(const std::array<Row, kSize>& table, std::string_view name) {
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const Row& row) { return row.first == name; });
  return found == table.end() ? nullptr : found->second;
}

}  // namespace

Filter find_method(const Value& object, std::string_view name) {
  if (object.is_string()) {
    return look_up(kStringMethods, name);
  }
  if (object.is_dict()) {
    return look_up(kDictMethods, name);
  }
  if (object.is_list()) {
    return object.as_list().kind <= List::Kind::kTuple ? look_up(kListMethods, name) : nullptr;
  }
  return object.get_if<const Loop>() != nullptr ? look_up(kLoopMethods, name) : nullptr;
}

std::string strip(const std::string& s, const Value& characters, bool left, bool right) {
  std::u32string set;
  const bool blanks = characters.is_undefined() || characters.is_none();
  if (!blanks) {
    set = text::to_code_points(expect_string(characters, "strip"));
  }
  const auto strips = [&](char32_t c) {
    return blanks ? text::is_white_space(c) || (c >= 0x1C && c <= 0x1F)
                  : set.find(c) != std::u32string::npos;
  };
  size_t from = 0;
  while (left && from < s.size()) {
    const text::Decoded d = text::decode_utf8(s, from);
    if (!strips(d.code_point)) {
      break;
    }
    from += d.length;
  }
  size_t end = s.size();
  while (right && end > from) {
    size_t before = end - 1;
    while (before > from && (static_cast<unsigned char>(s[before]) & 0xC0) == 0x80) {
      --before;
    }
    if (!strips(text::decode_utf8(s, before).code_point)) {
      break;
    }
    end = before;
  }
  return s.substr(from, end - from);
}

std::string replace(Runtime& runtime, const std::string& s, const std::string& old,
                    const std::string& fresh, int64_t count) {
  std::string out;
  size_t done = 0;
  const auto put = [&](size_t upto, size_t resume) {
    out.append(s, done, upto - done);
    out += fresh;
    done = resume;
    runtime.budget.bytes(fresh.size());
    expect(out.size() <= static_cast<size_t>(Budget::kOutput),
           "replace makes a text that is too long");
    --count;
  };
  if (old.empty()) {  // between all characters
    for (size_t at = 0; count != 0; at += text::decode_utf8(s, at).length) {
      put(at, at);
      if (at >= s.size()) {
        break;
      }
    }
  } else {
    for (size_t at = 0; count != 0 && (at = s.find(old, at)) != std::string::npos;
         at += old.size()) {
      put(at, at + old.size());
    }
  }
  return out.append(s, done);
}

std::string capitalize(const std::string& s) {
  const size_t first = s.empty() ? 0 : text::decode_utf8(s, 0).length;
  return text::to_upper(s.substr(0, first)) + text::to_lower(s.substr(first));
}

std::string center(const std::string& s, int64_t width, const std::string& fill) {
  expect(width < 1'000'000, "a text of {} characters is too wide", width);
  const int64_t missing = width - static_cast<int64_t>(text::utf8_length(s));
  if (missing <= 0) {
    return s;
  }
  const int64_t left = missing / 2 + (missing & width & 1);
  std::string out;
  for (int64_t i = 0; i < missing; ++i) {
    out += i == left ? s : "";
    out += fill;
  }
  return missing == left ? out + s : out;
}

}  // namespace cambium::jinja
