// What filters, tests, methods and functions need of a running template.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/value.h"

namespace cambium::jinja {

class Runtime {
 public:
  Budget budget;

  /// object.name and object[key]; undefined when there is none.
  Value attribute(const Value& object, std::string_view name);
  Value item(const Value& object, const Value& key);
  Value slice(const Value& object, const Value& start, const Value& stop, const Value& step);
  Value call(const Value& callee, const Args& args);
  /// The items of anything that can be iterated; reads a generator up.
  std::vector<Value> iterate(const Value& value);
  size_t length(const Value& value);
  bool contains(const Value& container, const Value& item);

  std::string str(const Value& value) { return to_str(value, budget); }
  /// A new string, counted.
  Value text(std::string s) {
    budget.bytes(s.size());
    return Value(std::move(s));
  }
  Value filter(std::string_view name, const Value& value, const Args& args);
  bool test(std::string_view name, const Value& value, const Args& args);
  Value make_namespace(Dict values);

  Value add(const Value& a, const Value& b);
  Value binary(std::string_view op, const Value& a, const Value& b);
  Value negative(const Value& value);

  /// Namespaces can hold each other in circles, so they are emptied when the rendering ends.
  ~Runtime();
  Runtime() = default;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

 private:
  Value multiply(const Value& a, const Value& b);
  Value modulo(const Value& a, const Value& b);
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

using Filter = Value (*)(Runtime&, const Value&, const Args&);
using Test = bool (*)(Runtime&, const Value&, const Args&);

/// Null when there is none of that name.
Filter find_filter(std::string_view name);
Test find_test(std::string_view name);
/// A method of a string, list, mapping or loop; null when there is none.
Filter find_method(const Value& object, std::string_view name);
/// The functions that every template sees: range, dict, namespace, raise_exception, ...
const std::vector<std::pair<std::string, Value>>& global_functions();

/// Python's "..." % value and "...".format(...).
std::string format_percent(Runtime& runtime, const std::string& format, const Value& value);
std::string format_braces(Runtime& runtime, const std::string& format, const Args& args);

/// Arguments by the names of a function's parameters.
class Bound {
 public:
  /// Throws Error for an argument without a parameter or given twice.
  Bound(std::string_view function, const Args& args, std::initializer_list<const char*> names);

  bool has(size_t i) const { return values_[i] != nullptr; }
  /// Undefined when missing.
  const Value& operator[](size_t i) const;
  const Value& required(size_t i) const;
  int64_t integer(size_t i, int64_t fallback) const;
  bool boolean(size_t i, bool fallback) const;
  std::string string(size_t i, std::string_view fallback) const;

 private:
  std::string function_;
  std::vector<const char*> names_;
  std::vector<const Value*> values_;
};

/// The integer value, or an Error that names the function.
int64_t expect_integer(const Value& value, std::string_view function);
const std::string& expect_string(const Value& value, std::string_view function);

}  // namespace cambium::jinja
