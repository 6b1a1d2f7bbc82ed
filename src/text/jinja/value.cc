#include "text/jinja/value.h"

#include <fmt/format.h>
#include <type_traits>

#include <algorithm>

#include "base/error.h"

namespace cambium::jinja {
namespace {

/// From this many items on a dictionary looks text keys up by hash.
constexpr size_t kIndexed = 16;

void check_depth(int depth) {
  expect(depth <= Budget::kValueDepth, "lists or mappings are nested more than {} deep",
         Budget::kValueDepth);
}

/// Equality of keys, without recursion into containers (those cannot be keys).
bool same_key(const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) {
    return a.as_string() == b.as_string();
  }
  if (a.is_number() && b.is_number()) {
    return a.as_double() == b.as_double();
  }
  return a.is_none() && b.is_none();
}

}  // namespace

const Value* Dict::find(const Value& key) const {
  if (key.is_string()) {
    return find(std::string_view(key.as_string()));
  }
  for (const auto& [k, v] : items_) {
    if (same_key(k, key)) {
      return &v;
    }
  }
  return nullptr;
}

const Value* Dict::find(std::string_view key) const {
  if (!index_.empty()) {
    const auto found = index_.find(std::string(key));
    return found == index_.end() ? nullptr : &items_[found->second].second;
  }
  for (const auto& [k, v] : items_) {
    if (k.is_string() && k.as_string() == key) {
      return &v;
    }
  }
  return nullptr;
}

void Dict::set(Value key, Value value) {
  if (!key.is_string() && !key.is_number() && !key.is_none()) {
    fail("a {} cannot be a key", key.type_name());
  }
  depth_ = std::max(depth_, value.depth() + 1);
  check_depth(depth_);
  if (const Value* old = find(key)) {
    *const_cast<Value*>(old) = std::move(value);
    return;
  }
  items_.emplace_back(std::move(key), std::move(value));
  if (items_.size() < kIndexed) {
    return;
  }
  for (size_t i = items_.size() == kIndexed ? 0 : items_.size() - 1; i < items_.size(); ++i) {
    if (items_[i].first.is_string()) {
      index_.emplace(items_[i].first.as_string(), i);
    }
  }
}

void Dict::clear() {
  items_.clear();
  index_.clear();
}

Value Value::list(std::vector<Value> items, List::Kind kind) {
  auto list = std::make_shared<List>();
  list->kind = kind;
  for (const Value& item : items) {
    list->depth = std::max(list->depth, item.depth() + 1);
  }
  check_depth(list->depth);
  list->items = std::move(items);
  return Data(std::move(list));
}

Value Value::dict(Dict items) {
  return Data(std::make_shared<const Dict>(std::move(items)));
}

int Value::depth() const {
  if (is_list()) {
    return as_list().depth;
  }
  return is_dict() ? as_dict().depth() : 0;
}

bool Value::truth() const {
  if (is_number()) {
    return as_double() != 0;
  }
  if (is_string()) {
    return !as_string().empty();
  }
  if (is_list()) {
    return as_list().kind == List::Kind::kGenerator || !as_list().items.empty();
  }
  if (is_dict()) {
    return as_dict().size() > 0;
  }
  return !is_undefined() && !is_none();
}

std::string Value::type_name() const {
  if (is_list()) {
    switch (as_list().kind) {
      case List::Kind::kList:
        return "list";
      case List::Kind::kTuple:
        return "tuple";
      case List::Kind::kView:
        return "view of a mapping";
      case List::Kind::kGenerator:
        return "generator";
    }
  }
  static constexpr const char* kNames[] = {"undefined value", "None",     "bool", "int",
                                           "float",           "string",   "list", "mapping",
                                           "namespace",       "function", "loop", "int"};
  return kNames[data_.index()];
}

void Budget::step(int64_t n) {
  steps_ -= n;
  expect(steps_ >= 0, "the template takes more than {} steps", kSteps);
}

void Budget::bytes(size_t n) {
  bytes_ -= static_cast<int64_t>(n);
  expect(bytes_ >= 0, "the template writes more than {} MiB of text", kBytes >> 20);
}

bool equal(const Value& a, const Value& b, Budget& budget) {
  budget.step();
  if (a.is_number() && b.is_number()) {
    return a.is_integral() && b.is_integral() ? a.as_int() == b.as_int()
                                              : a.as_double() == b.as_double();
  }
  if (a.data().index() != b.data().index()) {
    return false;
  }
  if (a.is_string()) {
    return a.as_string() == b.as_string();
  }
  if (a.big_integer() != nullptr) {
    return *a.big_integer() == *b.big_integer();
  }
  if (a.is_list()) {
    const List& x = a.as_list();
    const List& y = b.as_list();
    if (&x == &y) {
      return true;
    }
    return x.kind == y.kind && x.kind != List::Kind::kGenerator &&
           std::equal(x.items.begin(), x.items.end(), y.items.begin(), y.items.end(),
                      [&](const Value& l, const Value& r) { return equal(l, r, budget); });
  }
  if (a.is_dict()) {
    const Dict& x = a.as_dict();
    const Dict& y = b.as_dict();
    if (&x == &y) {
      return true;
    }
    return x.size() == y.size() &&
           std::all_of(x.items().begin(), x.items().end(), [&](const auto& item) {
             const Value* other = y.find(item.first);
             return other != nullptr && equal(item.second, *other, budget);
           });
  }
  return std::visit(
      [&](const auto& mine) {
        using T = std::decay_t<decltype(mine)>;
        if constexpr (std::is_same_v<T, Undefined> || std::is_same_v<T, None>) {
          return true;
        } else {  // namespaces, functions and loops are equal to themselves only
          return mine == std::get<T>(b.data());
        }
      },
      a.data());
}

bool less(const Value& a, const Value& b, Budget& budget) {
  budget.step();
  if (a.is_number() && b.is_number()) {
    return a.is_integral() && b.is_integral() ? a.as_int() < b.as_int()
                                              : a.as_double() < b.as_double();
  }
  if (a.is_string() && b.is_string()) {
    return a.as_string() < b.as_string();  // the order of UTF-8 is that of code points
  }
  if (a.is_list() && b.is_list() && a.as_list().kind == b.as_list().kind &&
      a.as_list().kind <= List::Kind::kTuple) {
    const auto& x = a.as_list().items;
    const auto& y = b.as_list().items;
    for (size_t i = 0; i < x.size() && i < y.size(); ++i) {
      if (!equal(x[i], y[i], budget)) {
        return less(x[i], y[i], budget);
      }
    }
    return x.size() < y.size();
  }
  fail("a {} and a {} have no order", a.type_name(), b.type_name());
}

}  // namespace cambium::jinja
