#include "text/jinja/runtime.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "text/jinja/search.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

[[noreturn]] void undefined_used(const Value& value) {
  fail("{} is undefined", value.as_undefined().name);
}

void check_overflow(bool overflow) {
  expect(!overflow, "an integer became too large");
}

int64_t floor_divide(int64_t a, int64_t b) {
  expect(b != 0, "division by zero");
  expect(!(a == INT64_MIN && b == -1), "an integer became too large");
  const int64_t q = a / b;
  return q - ((a % b != 0) && ((a < 0) != (b < 0)));
}

Value power(const Value& a, const Value& b) {
  if (!a.is_integral() || !b.is_integral() || b.as_int() < 0) {
    return std::pow(a.as_double(), b.as_double());
  }
  int64_t result = 1;
  for (int64_t i = 0, base = a.as_int(); i < b.as_int(); ++i) {
    if (base == 0 || base == 1) {
      return base;
    }
    if (base == -1) {
      return b.as_int() % 2 == 0 ? int64_t{1} : int64_t{-1};
    }
    check_overflow(__builtin_mul_overflow(result, base, &result));
  }
  return result;
}

/// Python's slice bounds for a sequence of `size`.
struct Slice {
  int64_t start;
  int64_t step;
  int64_t count;
};

Slice slice_bounds(int64_t size, const Value& start, const Value& stop, const Value& step) {
  const auto given = [](const Value& v) { return !v.is_undefined() && !v.is_none(); };
  const int64_t by = given(step) ? expect_integer(step, "slice") : 1;
  expect(by != 0, "the step of a slice is zero");
  const auto bound = [&](const Value& v, int64_t fallback) {
    if (!given(v)) {
      return fallback;
    }
    int64_t i = expect_integer(v, "slice");
    i = i < 0 ? (i < -size ? -1 : i + size) : i;
    return by > 0 ? std::clamp<int64_t>(i, 0, size) : std::clamp<int64_t>(i, -1, size - 1);
  };
  const int64_t from = bound(start, by > 0 ? 0 : size - 1);
  const int64_t to = bound(stop, by > 0 ? size : -1);
  const int64_t distance = by > 0 ? to - from : from - to;
  if (distance <= 0) {
    return {from, by, 0};
  }
  const int64_t width = by == INT64_MIN ? INT64_MAX : std::abs(by);
  return {from, by, (distance - 1) / width + 1};
}

bool number_pair(const Value& a, const Value& b) {
  return a.is_number() && b.is_number();
}

}  // namespace

Runtime::~Runtime() {
  for (const auto& one : namespaces_) {
    one->values.clear();
  }
}

Value Runtime::make_namespace(Dict values) {
  namespaces_.push_back(std::make_shared<Namespace>());
  namespaces_.back()->values = std::move(values);
  return Value::Data(namespaces_.back());
}

Value Runtime::attribute(const Value& object, std::string_view name) {
  if (object.is_undefined()) {
    undefined_used(object);
  }
  if (name.starts_with('_')) {
    return Value::undefined("attribute " + std::string(name));
  }
  if (const auto space = object.get_if<Namespace>()) {
    const Value* found = space->values.find(name);
    return found != nullptr ? *found : Value::undefined("namespace attribute " + std::string(name));
  }
  if (const Filter method = find_method(object, name)) {
    auto bound = std::make_shared<Callable>();
    bound->name = name;
    bound->call = [method, object](Runtime& runtime, const Args& args) {
      return method(runtime, object, args);
    };
    return Value::Data(std::shared_ptr<const Callable>(std::move(bound)));
  }
  if (object.is_dict()) {
    if (const Value* found = object.as_dict().find(name)) {
      return *found;
    }
  }
  if (const auto loop = object.get_if<const Loop>()) {
    const auto size = static_cast<int64_t>(loop->items->items.size());
    const auto index = static_cast<int64_t>(loop->index);
    const auto neighbour = [&](int64_t at) {
      return at >= 0 && at < size ? loop->items->items[static_cast<size_t>(at)]
                                  : Value::undefined("item beside the loop");
    };
    if (name == "index") {
      return index + 1;
    }
    if (name == "index0") {
      return index;
    }
    if (name == "revindex") {
      return size - index;
    }
    if (name == "revindex0") {
      return size - index - 1;
    }
    if (name == "first") {
      return index == 0;
    }
    if (name == "last") {
      return index + 1 == size;
    }
    if (name == "length") {
      return size;
    }
    if (name == "depth") {
      return loop->depth + 1;
    }
    if (name == "depth0") {
      return loop->depth;
    }
    if (name == "previtem") {
      return neighbour(index - 1);
    }
    if (name == "nextitem") {
      return neighbour(index + 1);
    }
  }
  return Value::undefined("attribute " + std::string(name) + " of a " + object.type_name());
}

Value Runtime::item(const Value& object, const Value& key) {
  if (object.is_undefined()) {
    undefined_used(object);
  }
  const auto index = [&](int64_t size) {
    const int64_t i = key.as_int() < 0 ? key.as_int() + size : key.as_int();
    return i >= 0 && i < size ? i : -1;
  };
  if (object.is_dict()) {
    if (const Value* found = object.as_dict().find(key)) {
      return *found;
    }
  } else if (object.is_list() && object.as_list().kind <= List::Kind::kTuple && key.is_integral()) {
    const auto& items = object.as_list().items;
    const int64_t i = index(static_cast<int64_t>(items.size()));
    return i >= 0 ? items[static_cast<size_t>(i)] : Value::undefined("item out of range");
  } else if (object.is_string() && key.is_integral()) {
    const std::u32string characters = text::to_code_points(object.as_string());
    budget.bytes(characters.size());
    const int64_t i = index(static_cast<int64_t>(characters.size()));
    return i >= 0 ? text(text::to_utf8(characters.substr(static_cast<size_t>(i), 1)))
                  : Value::undefined("character out of range");
  }
  if (key.is_string()) {
    return attribute(object, key.as_string());
  }
  return Value::undefined("item of a " + object.type_name());
}

Value Runtime::slice(const Value& object, const Value& start, const Value& stop,
                     const Value& step) {
  if (object.is_undefined()) {
    undefined_used(object);
  }
  if (object.is_string()) {
    const std::u32string characters = text::to_code_points(object.as_string());
    const Slice s = slice_bounds(static_cast<int64_t>(characters.size()), start, stop, step);
    std::u32string part;
    for (int64_t i = 0; i < s.count; ++i) {
      part += characters[static_cast<size_t>(s.start + i * s.step)];
    }
    budget.bytes(characters.size());
    return text(text::to_utf8(part));
  }
  if (object.is_list() && object.as_list().kind <= List::Kind::kTuple) {
    const auto& items = object.as_list().items;
    const Slice s = slice_bounds(static_cast<int64_t>(items.size()), start, stop, step);
    budget.step(s.count);
    std::vector<Value> part;
    for (int64_t i = 0; i < s.count; ++i) {
      part.push_back(items[static_cast<size_t>(s.start + i * s.step)]);
    }
    return Value::list(std::move(part), object.as_list().kind);
  }
  return Value::undefined("slice of a " + object.type_name());
}

Value Runtime::call(const Value& callee, const Args& args) {
  if (callee.is_undefined()) {
    undefined_used(callee);
  }
  const auto callable = callee.get_if<const Callable>();
  expect(callable != nullptr, "a {} cannot be called", callee.type_name());
  return callable->call(*this, args);
}

std::vector<Value> Runtime::iterate(const Value& value) {
  if (value.is_list()) {
    List& list = value.as_list();
    budget.step(static_cast<int64_t>(list.items.size()));
    if (list.kind == List::Kind::kGenerator) {
      return std::exchange(list.items, {});
    }
    return list.items;
  }
  std::vector<Value> items;
  if (value.is_dict()) {
    for (const auto& [key, item] : value.as_dict().items()) {
      items.push_back(key);
    }
  } else if (value.is_string()) {
    const std::string& s = value.as_string();
    budget.step(static_cast<int64_t>(s.size()));
    for (size_t at = 0; at < s.size();) {
      const size_t length = text::decode_utf8(s, at).length;
      items.emplace_back(s.substr(at, length));
      at += length;
    }
  } else if (!value.is_undefined()) {
    fail("a {} cannot be iterated", value.type_name());
  }
  budget.step(static_cast<int64_t>(items.size()));
  return items;
}

size_t Runtime::length(const Value& value) {
  if (value.is_string()) {
    return text::utf8_length(value.as_string());
  }
  if (value.is_list() && value.as_list().kind != List::Kind::kGenerator) {
    return value.as_list().items.size();
  }
  if (value.is_dict()) {
    return value.as_dict().size();
  }
  expect(value.is_undefined(), "a {} has no length", value.type_name());
  return 0;
}

bool Runtime::contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    budget.step(static_cast<int64_t>(container.as_string().size() / 64 + 1));
    return find_bytes(container.as_string(), expect_string(item, "in")) != std::string::npos;
  }
  if (container.is_dict()) {
    return container.as_dict().find(item) != nullptr;
  }
  const std::vector<Value> items = iterate(container);
  return std::any_of(items.begin(), items.end(),
                     [&](const Value& one) { return equal(one, item, budget); });
}

Value Runtime::filter(std::string_view name, const Value& value, const Args& args) {
  const Filter found = find_filter(name);
  expect(found != nullptr, "there is no filter {:?}", name);
  return found(*this, value, args);
}

bool Runtime::test(std::string_view name, const Value& value, const Args& args) {
  const Test found = find_test(name);
  expect(found != nullptr, "there is no test {:?}", name);
  return found(*this, value, args);
}

Value Runtime::add(const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) {
    return text(a.as_string() + b.as_string());
  }
  if (number_pair(a, b)) {
    if (!a.is_integral() || !b.is_integral()) {
      return a.as_double() + b.as_double();
    }
    int64_t sum = 0;
    check_overflow(__builtin_add_overflow(a.as_int(), b.as_int(), &sum));
    return sum;
  }
  if (a.is_list() && b.is_list() && a.as_list().kind == b.as_list().kind &&
      a.as_list().kind <= List::Kind::kTuple) {
    std::vector<Value> both = iterate(a);
    const std::vector<Value> more = iterate(b);
    both.insert(both.end(), more.begin(), more.end());
    return Value::list(std::move(both), a.as_list().kind);
  }
  for (const Value* side : {&a, &b}) {
    if (side->is_undefined()) {
      undefined_used(*side);
    }
  }
  fail("cannot add a {} and a {}", a.type_name(), b.type_name());
}

Value Runtime::multiply(const Value& a, const Value& b) {
  if (number_pair(a, b)) {
    if (!a.is_integral() || !b.is_integral()) {
      return a.as_double() * b.as_double();
    }
    int64_t product = 0;
    check_overflow(__builtin_mul_overflow(a.as_int(), b.as_int(), &product));
    return product;
  }
  const Value& what = a.is_integral() ? b : a;
  const Value& times = a.is_integral() ? a : b;
  const int64_t n = times.is_integral() ? std::max<int64_t>(times.as_int(), 0) : 0;
  if (what.is_string() && times.is_integral()) {
    std::string out;
    if (!what.as_string().empty()) {
      expect(n <= Budget::kOutput / static_cast<int64_t>(what.as_string().size()),
             "a repeated string is too long");
      for (int64_t i = 0; i < n; ++i) {
        out += what.as_string();
      }
    }
    return text(std::move(out));
  }
  if (what.is_list() && what.as_list().kind <= List::Kind::kTuple && times.is_integral()) {
    std::vector<Value> out;
    for (int64_t i = 0; i < n && !what.as_list().items.empty(); ++i) {
      const std::vector<Value> once = iterate(what);
      out.insert(out.end(), once.begin(), once.end());
    }
    return Value::list(std::move(out), what.as_list().kind);
  }
  fail("cannot multiply a {} and a {}", a.type_name(), b.type_name());
}

Value Runtime::modulo(const Value& a, const Value& b) {
  if (a.is_string()) {
    return text(format_percent(*this, a.as_string(), b));
  }
  expect(number_pair(a, b), "cannot take a {} modulo a {}", a.type_name(), b.type_name());
  if (a.is_integral() && b.is_integral()) {
    if (b.as_int() == -1) {
      return 0;
    }
    return a.as_int() - floor_divide(a.as_int(), b.as_int()) * b.as_int();
  }
  expect(b.as_double() != 0, "division by zero");
  const double rest = std::fmod(a.as_double(), b.as_double());
  return rest != 0 && (rest < 0) != (b.as_double() < 0) ? rest + b.as_double() : rest;
}

Value Runtime::binary(std::string_view op, const Value& a, const Value& b) {
  for (const Value* side : {&a, &b}) {
    if (side->is_undefined() && !(op == "%" && a.is_string())) {
      undefined_used(*side);
    }
  }
  if (op == "+") {
    return add(a, b);
  }
  if (op == "*") {
    return multiply(a, b);
  }
  if (op == "%") {
    return modulo(a, b);
  }
  expect(number_pair(a, b), "cannot apply {} to a {} and a {}", op, a.type_name(), b.type_name());
  if (op == "-") {
    if (!a.is_integral() || !b.is_integral()) {
      return a.as_double() - b.as_double();
    }
    int64_t difference = 0;
    check_overflow(__builtin_sub_overflow(a.as_int(), b.as_int(), &difference));
    return difference;
  }
  if (op == "/") {
    expect(b.as_double() != 0, "division by zero");
    return a.as_double() / b.as_double();
  }
  if (op == "//") {
    if (a.is_integral() && b.is_integral()) {
      return floor_divide(a.as_int(), b.as_int());
    }
    expect(b.as_double() != 0, "division by zero");
    return std::floor(a.as_double() / b.as_double());
  }
  return power(a, b);
}

Value Runtime::negative(const Value& value) {
  if (value.is_undefined()) {
    undefined_used(value);
  }
  expect(value.is_number(), "cannot negate a {}", value.type_name());
  if (value.is_float()) {
    return -value.as_double();
  }
  check_overflow(value.as_int() == INT64_MIN);
  return -value.as_int();
}

Bound::Bound(std::string_view function, const Args& args, std::initializer_list<const char*> names)
    : function_(function), names_(names), values_(names.size(), nullptr) {
  expect(args.positional.size() <= names_.size(), "{} takes at most {} arguments, got {}", function,
         names_.size(), args.positional.size());
  for (size_t i = 0; i < args.positional.size(); ++i) {
    values_[i] = &args.positional[i];
  }
  for (const auto& [name, value] : args.named) {
    const auto found =
        std::find_if(names_.begin(), names_.end(),
                     [&wanted = name](const char* known) { return wanted == known; });
    expect(found != names_.end(), "{} has no parameter {:?}", function, name);
    const Value*& place = values_[static_cast<size_t>(found - names_.begin())];
    expect(place == nullptr, "{} got {:?} twice", function, name);
    place = &value;
  }
}

const Value& Bound::operator[](size_t i) const {
  static const Value undefined = Value::undefined("an argument");
  return values_[i] != nullptr ? *values_[i] : undefined;
}

const Value& Bound::required(size_t i) const {
  expect(values_[i] != nullptr, "{} needs an argument {:?}", function_, names_[i]);
  return *values_[i];
}

int64_t Bound::integer(size_t i, int64_t fallback) const {
  return values_[i] == nullptr || values_[i]->is_none() ? fallback
                                                        : expect_integer(*values_[i], function_);
}

bool Bound::boolean(size_t i, bool fallback) const {
  return values_[i] == nullptr ? fallback : values_[i]->truth();
}

std::string Bound::string(size_t i, std::string_view fallback) const {
  return values_[i] == nullptr ? std::string(fallback) : expect_string(*values_[i], function_);
}

int64_t expect_integer(const Value& value, std::string_view function) {
  expect(value.is_integral(), "{} expected an integer, got a {}", function, value.type_name());
  return value.as_int();
}

const std::string& expect_string(const Value& value, std::string_view function) {
  expect(value.is_string(), "{} expected a string, got a {}", function, value.type_name());
  return value.as_string();
}

}  // namespace cambium::jinja
