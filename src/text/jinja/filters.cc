// The filters that work on values and lists; those for text are in text_filters.cc.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <optional>

#include "base/error.h"
#include "text/jinja/filter_tables.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

using Values = std::vector<Value>;

Args with_positional(const Args& args, size_t from) {
  Args rest;
  if (args.positional.size() > from) {
    rest.positional.assign(args.positional.begin() + static_cast<ptrdiff_t>(from),
                           args.positional.end());
  }
  rest.named = args.named;
  return rest;
}

/// Follows "a.b.0" through attributes and items; `fallback`, when given, stands for what is
/// missing.
Value path(Runtime& runtime, Value value, const Value& attribute, const Value* fallback = nullptr) {
  const auto step = [&](const Value& key) {
    value = runtime.item(value, key);
    if (value.is_undefined() && fallback != nullptr) {
      value = *fallback;
    }
  };
  if (attribute.is_integral()) {
    step(attribute);
    return value;
  }
  const std::string& names = expect_string(attribute, "attribute");
  for (size_t from = 0; from <= names.size();) {
    const size_t dot = std::min(names.find('.', from), names.size());
    const std::string name = names.substr(from, dot - from);
    const bool number =
        !name.empty() && name.size() < 10 &&
        std::all_of(name.begin(), name.end(), [](char c) { return c >= '0' && c <= '9'; });
    step(number ? Value(std::atoi(name.c_str())) : Value(name));
    from = dot + 1;
  }
  return value;
}

/// Text compares without case unless asked otherwise.
Value folded(const Value& value, bool case_sensitive) {
  return value.is_string() && !case_sensitive ? Value(text::to_lower(value.as_string())) : value;
}

Value do_default(Runtime&, const Value& value, const Args& args) {
  const Bound b("default", args, {"default_value", "boolean"});
  const bool missing = value.is_undefined() || (b.boolean(1, false) && !value.truth());
  return missing ? (b.has(0) ? b[0] : Value("")) : value;
}

Value do_length(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("length", args, {});
  return static_cast<int64_t>(runtime.length(value));
}

Value do_first(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("first", args, {});
  const Values items = runtime.iterate(value);
  return items.empty() ? Value::undefined("the first item") : items.front();
}

Value do_last(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("last", args, {});
  const Values items = runtime.iterate(value);
  return items.empty() ? Value::undefined("the last item") : items.back();
}

Value do_list(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("list", args, {});
  return Value::list(runtime.iterate(value));
}

Value do_reverse(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("reverse", args, {});
  Values items = runtime.iterate(value);
  std::reverse(items.begin(), items.end());
  if (!value.is_string()) {
    return Value::list(std::move(items), List::Kind::kGenerator);
  }
  std::string out;
  for (const Value& item : items) {
    out += item.as_string();
  }
  return runtime.text(std::move(out));
}

Value do_items(Runtime&, const Value& value, const Args& args) {
  const Bound b("items", args, {});
  Values pairs;
  if (!value.is_undefined()) {
    expect(value.is_dict(), "items expected a mapping, got a {}", value.type_name());
    for (const auto& [key, item] : value.as_dict().items()) {
      pairs.push_back(Value::list({key, item}, List::Kind::kTuple));
    }
  }
  return Value::list(std::move(pairs), List::Kind::kGenerator);
}

Value do_map(Runtime& runtime, const Value& value, const Args& args) {
  Values out;
  const auto named = [&](const char* name) {
    const auto found = std::find_if(args.named.begin(), args.named.end(),
                                    [&](const auto& arg) { return arg.first == name; });
    return found == args.named.end() ? nullptr : &found->second;
  };
  // As in Jinja: of anything false there is nothing, and nothing is an error.
  const Values items = value.truth() ? runtime.iterate(value) : Values();
  if (args.positional.empty()) {
    const Value* attribute = named("attribute");
    const Value* fallback = named("default");
    expect(attribute != nullptr && args.named.size() == (fallback != nullptr ? 2U : 1U),
           "map expected a filter's name or attribute=");
    for (const Value& item : items) {
      out.push_back(path(runtime, item, *attribute, fallback));
    }
  } else {
    const std::string& filter = expect_string(args.positional[0], "map");
    const Args rest = with_positional(args, 1);
    for (const Value& item : items) {
      runtime.budget.step();
      out.push_back(runtime.filter(filter, item, rest));
    }
  }
  return Value::list(std::move(out), List::Kind::kGenerator);
}

/// select and reject, by attribute or not.
Value choose(Runtime& runtime, const Value& value, const Args& args, bool attribute, bool keep) {
  size_t used = 0;
  expect(!attribute || !args.positional.empty(), "expected the name of an attribute");
  used += attribute ? 1 : 0;
  const bool tested = args.positional.size() > used;
  const std::string test = tested ? expect_string(args.positional[used], "select") : "";
  const Args rest = with_positional(args, used + 1);
  Values out;
  Values items = value.truth() ? runtime.iterate(value) : Values();
  for (Value& item : items) {
    runtime.budget.step();
    const Value subject = attribute ? path(runtime, item, args.positional[0]) : item;
    const bool passes = tested ? runtime.test(test, subject, rest) : subject.truth();
    if (passes == keep) {
      out.push_back(std::move(item));
    }
  }
  return Value::list(std::move(out), List::Kind::kGenerator);
}

Value do_select(Runtime& r, const Value& v, const Args& a) {
  return choose(r, v, a, false, true);
}
Value do_reject(Runtime& r, const Value& v, const Args& a) {
  return choose(r, v, a, false, false);
}
Value do_selectattr(Runtime& r, const Value& v, const Args& a) {
  return choose(r, v, a, true, true);
}
Value do_rejectattr(Runtime& r, const Value& v, const Args& a) {
  return choose(r, v, a, true, false);
}

/// Sorts by the keys that go with the items; equal ones keep their order.
void sort_by(Runtime& runtime, Values& items, const Values& keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  // Unlike std::stable_sort, a merge sort by hand stands an order that is not one (nan).
  std::vector<size_t> merged(order.size());
  for (size_t width = 1; width < order.size(); width *= 2) {
    for (size_t from = 0; from < order.size(); from += 2 * width) {
      const size_t middle = std::min(from + width, order.size());
      const size_t end = std::min(from + 2 * width, order.size());
      size_t left = from;
      size_t right = middle;
      for (size_t out = from; out < end; ++out) {
        const bool take_right =
            left == middle ||
            (right < end &&
             (reverse ? less(keys[order[left]], keys[order[right]], runtime.budget)
                      : less(keys[order[right]], keys[order[left]], runtime.budget)));
        merged[out] = order[take_right ? right++ : left++];
      }
    }
    std::swap(order, merged);
  }
  Values sorted;
  for (const size_t i : order) {
    sorted.push_back(std::move(items[i]));
  }
  items = std::move(sorted);
}

Value do_sort(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("sort", args, {"reverse", "case_sensitive", "attribute"});
  Values items = runtime.iterate(value);
  Values keys;
  for (const Value& item : items) {
    if (!b.has(2) || b[2].is_none()) {
      keys.push_back(folded(item, b.boolean(1, false)));
      continue;
    }
    Values parts;  // several attributes may be given with commas
    const std::string names = b[2].is_integral() ? runtime.str(b[2]) : b.string(2, "");
    for (size_t from = 0; from <= names.size();) {
      const size_t comma = std::min(names.find(',', from), names.size());
      parts.push_back(
          folded(path(runtime, item, names.substr(from, comma - from)), b.boolean(1, false)));
      from = comma + 1;
    }
    keys.push_back(Value::list(std::move(parts)));
  }
  sort_by(runtime, items, keys, b.boolean(0, false));
  return Value::list(std::move(items));
}

Value do_dictsort(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("dictsort", args, {"case_sensitive", "by", "reverse"});
  expect(value.is_dict(), "dictsort expected a mapping, got a {}", value.type_name());
  const bool by_value = b.string(1, "key") == "value";
  Values items;
  Values keys;
  for (const auto& [key, item] : value.as_dict().items()) {
    items.push_back(Value::list({key, item}, List::Kind::kTuple));
    keys.push_back(folded(by_value ? item : key, b.boolean(0, false)));
  }
  sort_by(runtime, items, keys, b.boolean(2, false));
  return Value::list(std::move(items));
}

Value do_unique(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("unique", args, {"case_sensitive", "attribute"});
  Values out;
  Values seen;
  for (Value& item : runtime.iterate(value)) {
    const Value subject = b.has(1) && !b[1].is_none() ? path(runtime, item, b[1]) : item;
    Value key = folded(subject, b.boolean(0, false));
    if (std::none_of(seen.begin(), seen.end(),
                     [&](const Value& old) { return equal(old, key, runtime.budget); })) {
      seen.push_back(std::move(key));
      out.push_back(std::move(item));
    }
  }
  return Value::list(std::move(out), List::Kind::kGenerator);
}

Value do_groupby(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("groupby", args, {"attribute", "default", "case_sensitive"});
  Values items = runtime.iterate(value);
  Values keys;
  for (const Value& item : items) {
    Value key = path(runtime, item, b.required(0));
    keys.push_back(folded(key.is_undefined() && b.has(1) ? b[1] : key, b.boolean(2, false)));
  }
  Values order;
  for (size_t i = 0; i < items.size(); ++i) {
    order.emplace_back(static_cast<int64_t>(i));
  }
  sort_by(runtime, order, keys, false);
  Values groups;
  for (size_t i = 0; i < order.size();) {
    const Value& key = keys[static_cast<size_t>(order[i].as_int())];
    const Value shown = path(runtime, items[static_cast<size_t>(order[i].as_int())], b[0]);
    Values members;
    while (i < order.size() &&
           equal(keys[static_cast<size_t>(order[i].as_int())], key, runtime.budget)) {
      members.push_back(items[static_cast<size_t>(order[i].as_int())]);
      ++i;
    }
    groups.push_back(Value::list(
        {shown.is_undefined() ? key : shown, Value::list(std::move(members))}, List::Kind::kTuple));
  }
  return Value::list(std::move(groups));
}

Value extreme(Runtime& runtime, const char* name, const Value& value, const Args& args,
              bool largest) {
  const Bound b(name, args, {"case_sensitive", "attribute"});
  const Values items = runtime.iterate(value);
  const auto key = [&](const Value& item) {
    return folded(b.has(1) && !b[1].is_none() ? path(runtime, item, b[1]) : item,
                  b.boolean(0, false));
  };
  if (items.empty()) {
    return Value::undefined(fmt::format("the {} of nothing", name));
  }
  const Value* best = &items[0];
  for (const Value& item : items) {
    if (largest ? less(key(*best), key(item), runtime.budget)
                : less(key(item), key(*best), runtime.budget)) {
      best = &item;
    }
  }
  return *best;
}

Value do_min(Runtime& r, const Value& v, const Args& a) {
  return extreme(r, "min", v, a, false);
}
Value do_max(Runtime& r, const Value& v, const Args& a) {
  return extreme(r, "max", v, a, true);
}

Value do_sum(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("sum", args, {"attribute", "start"});
  Value total = b.has(1) ? b[1] : Value(0);
  for (const Value& item : runtime.iterate(value)) {
    total = runtime.add(total, b.has(0) && !b[0].is_none() ? path(runtime, item, b[0]) : item);
  }
  return total;
}

Value do_batch(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("batch", args, {"linecount", "fill_with"});
  const int64_t count = expect_integer(b.required(0), "batch");
  expect(count > 0 && count < 1'000'000, "batch expected a positive count, got {}", count);
  Values out;
  Values batch;
  for (Value& item : runtime.iterate(value)) {
    if (static_cast<int64_t>(batch.size()) == count) {
      out.push_back(Value::list(std::exchange(batch, {})));
    }
    batch.push_back(std::move(item));
  }
  if (!batch.empty()) {
    while (b.has(1) && !b[1].is_none() && static_cast<int64_t>(batch.size()) < count) {
      runtime.budget.step();
      batch.push_back(b[1]);
    }
    out.push_back(Value::list(std::move(batch)));
  }
  return Value::list(std::move(out), List::Kind::kGenerator);
}

Value do_slice(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("slice", args, {"slices", "fill_with"});
  const int64_t slices = expect_integer(b.required(0), "slice");
  expect(slices > 0 && slices < 1'000'000, "slice expected a positive count, got {}", slices);
  const Values items = runtime.iterate(value);
  const auto size = static_cast<int64_t>(items.size());
  Values out;
  int64_t from = 0;
  for (int64_t i = 0; i < slices; ++i) {
    runtime.budget.step();
    const bool longer = i < size % slices;
    const int64_t count = size / slices + longer;
    Values part(items.begin() + from, items.begin() + from + count);
    if (b.has(1) && !b[1].is_none() && !longer && size % slices != 0) {
      part.push_back(b[1]);
    }
    from += count;
    out.push_back(Value::list(std::move(part)));
  }
  return Value::list(std::move(out), List::Kind::kGenerator);
}

Value do_abs(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("abs", args, {});
  expect(value.is_number(), "abs expected a number, got a {}", value.type_name());
  return value.as_double() < 0 ? runtime.negative(value)
         : value.is_bool()     ? Value(value.as_int())
                               : value;
}

Value do_round(Runtime&, const Value& value, const Args& args) {
  const Bound b("round", args, {"precision", "method"});
  expect(value.is_number(), "round expected a number, got a {}", value.type_name());
  const int64_t precision = b.integer(0, 0);
  expect(precision >= -300 && precision <= 300, "round cannot keep {} digits", precision);
  const std::string method = b.string(1, "common");
  if (method == "common" && value.is_integral() && precision >= 0) {
    return value.as_int();
  }
  if (method == "common") {
    if (precision >= 0) {  // printing rounds the exact value, halves to even
      return std::strtod(fmt::format("{:.{}f}", value.as_double(), precision).c_str(), nullptr);
    }
    const double unit = std::pow(10.0, static_cast<double>(-precision));
    const double rounded = std::nearbyint(value.as_double() / unit) * unit;
    return value.is_integral() ? Value(static_cast<int64_t>(rounded)) : Value(rounded);
  }
  expect(method == "ceil" || method == "floor",
         "round expected the method common, ceil or floor, got {:?}", method);
  const double unit = std::pow(10.0, static_cast<double>(precision));
  const double scaled = value.as_double() * unit;
  return (method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / unit;
}

std::string trimmed(const std::string& s) {
  return strip(s, Value(), true, true);
}

/// Python's int(text, base) and float(text); underscores between digits are allowed.
std::optional<int64_t> parse_int(std::string s, int base) {
  s = trimmed(s);
  std::erase(s, '_');
  const bool negative = s.starts_with('-');
  std::string digits = negative || s.starts_with('+') ? s.substr(1) : s;
  const auto prefix = [&](char lower, int of) {
    if ((base == of || base == 0) && digits.size() > 2 && digits[0] == '0' &&
        (digits[1] | 0x20) == lower) {
      digits.erase(0, 2);
      base = of;
    }
  };
  prefix('x', 16);
  prefix('o', 8);
  prefix('b', 2);
  base = base == 0 ? 10 : base;
  if (digits.empty() || base < 2 || base > 36) {
    return std::nullopt;
  }
  int64_t value = 0;
  for (const char c : digits) {
    const int digit = c >= '0' && c <= '9'                     ? c - '0'
                      : (c | 0x20) >= 'a' && (c | 0x20) <= 'z' ? (c | 0x20) - 'a' + 10
                                                               : 99;
    if (digit >= base || __builtin_mul_overflow(value, base, &value) ||
        __builtin_add_overflow(value, digit, &value)) {
      return std::nullopt;
    }
  }
  return negative ? -value : value;
}

std::optional<double> parse_float(std::string s) {
  s = trimmed(s);
  std::erase(s, '_');
  const std::string lower = text::to_lower(s);
  if (s.empty() || lower.find('x') != std::string::npos) {
    return std::nullopt;
  }
  char* end = nullptr;
  const double value = std::strtod(s.c_str(), &end);
  return *end == '\0' ? std::optional(value) : std::nullopt;
}

Value do_int(Runtime&, const Value& value, const Args& args) {
  const Bound b("int", args, {"default", "base"});
  expect(!value.is_undefined(), "{} is undefined",
         value.is_undefined() ? value.as_undefined().name : "");
  const Value fallback = b.has(0) ? b[0] : Value(0);
  const auto truncated = [&](double d) -> Value {
    expect(!std::isfinite(d) || std::abs(d) < 9.2e18, "int of {}, which is beyond 64 bits", d);
    return std::isfinite(d) ? Value(static_cast<int64_t>(d)) : fallback;
  };
  if (value.is_integral()) {
    return value.as_int();
  }
  if (value.big_integer() != nullptr) {
    return value;
  }
  if (value.is_float()) {
    return truncated(value.as_double());
  }
  if (!value.is_string()) {
    return fallback;
  }
  if (const auto whole = parse_int(value.as_string(), static_cast<int>(b.integer(1, 10)))) {
    return *whole;
  }
  const auto real = parse_float(value.as_string());
  return real ? truncated(*real) : fallback;
}

Value do_float(Runtime&, const Value& value, const Args& args) {
  const Bound b("float", args, {"default"});
  expect(!value.is_undefined(), "{} is undefined",
         value.is_undefined() ? value.as_undefined().name : "");
  if (value.is_number()) {
    return value.as_double();
  }
  const std::string* text = value.is_string() ? &value.as_string() : value.big_integer();
  const auto real = text != nullptr ? parse_float(*text) : std::nullopt;
  return real ? Value(*real) : (b.has(0) ? b[0] : Value(0.0));
}

Value do_attr(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("attr", args, {"name"});
  const std::string& name = expect_string(b.required(0), "attr");
  // Only real attributes, not the items of a mapping.
  return value.is_dict() && find_method(value, name) == nullptr
             ? Value::undefined("attribute " + name)
             : runtime.attribute(value, name);
}

Value do_tojson(Runtime& runtime, const Value& value, const Args& args) {
  const Bound b("tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  // The plain dialect has indent as the first parameter; a number there can only mean that.
  const bool indent_first = args.positional.size() == 1 && b[0].is_int();
  style.ensure_ascii = !indent_first && b.boolean(0, false);
  const Value& indent = indent_first ? b[0] : b[1];
  if (indent.is_string() || indent.is_integral()) {
    style.multiline = true;
    style.item_separator.pop_back();  // the blank goes to the next line
    style.indent =
        indent.is_string()
            ? indent.as_string()
            : std::string(static_cast<size_t>(std::clamp<int64_t>(indent.as_int(), 0, 64)), ' ');
  }
  if (b.has(2) && !b[2].is_none()) {
    const Values both = runtime.iterate(b[2]);
    expect(both.size() == 2, "tojson expected two separators, got {}", both.size());
    style.item_separator = expect_string(both[0], "tojson");
    style.key_separator = expect_string(both[1], "tojson");
  }
  style.sort_keys = b.boolean(3, false);
  return Value(to_json(value, style, runtime.budget));
}

constexpr std::array<std::pair<std::string_view, Filter>, 29> kFilters = {{
    {"default", do_default},
    {"d", do_default},
    {"length", do_length},
    {"count", do_length},
    {"first", do_first},
    {"last", do_last},
    {"list", do_list},
    {"reverse", do_reverse},
    {"items", do_items},
    {"map", do_map},
    {"select", do_select},
    {"reject", do_reject},
    {"selectattr", do_selectattr},
    {"rejectattr", do_rejectattr},
    {"sort", do_sort},
    {"dictsort", do_dictsort},
    {"unique", do_unique},
    {"groupby", do_groupby},
    {"min", do_min},
    {"max", do_max},
    {"sum", do_sum},
    {"batch", do_batch},
    {"slice", do_slice},
    {"abs", do_abs},
    {"round", do_round},
    {"int", do_int},
    {"float", do_float},
    {"attr", do_attr},
    {"tojson", do_tojson},
}};

}  // namespace

Filter find_filter(std::string_view name) {
  const auto found = std::find_if(kFilters.begin(), kFilters.end(),
                                  [&](const auto& row) { return row.first == name; });
  return found != kFilters.end() && !name.empty() ? found->second : find_text_filter(name);
}

}  // namespace cambium::jinja
