// The values of templates: Python's, as far as templates can tell.
//
// Lists and dictionaries never change after they were made (the sandbox that templates are written
// for forbids it); only namespaces do. So values share their parts freely.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace cambium::jinja {

class Value;
class Dict;
struct Namespace;
class Runtime;

/// A name or attribute that does not exist: prints as nothing, is false, empty when iterated, and
/// an error when used in any other way.
struct Undefined {
  std::string name;
};
struct None {};

using String = std::shared_ptr<const std::string>;

/// A whole number beyond 64 bits with a sign, from JSON: printed as it came, not computed with.
struct BigInteger {
  std::string digits;
};

struct List {
  enum class Kind {
    kList,
    kTuple,
    kView,       // of a dictionary: has a length but cannot be indexed
    kGenerator,  // can be read once; true even when empty
  };
  Kind kind = Kind::kList;
  std::vector<Value> items;
  int depth = 1;       // nesting, bounded so that walking a value cannot exhaust the stack
  bool spent = false;  // a generator that was read
};

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

/// A macro, a function, or a method bound to its object.
struct Callable {
  std::string name;
  std::function<Value(Runtime&, const Args&)> call;
};

/// The variable `loop`.
struct Loop {
  std::shared_ptr<const List> items;
  size_t index = 0;
  int depth = 0;
  std::shared_ptr<std::vector<Value>> changed;  // what loop.changed() saw last
};

class Value {
 public:
  using Data = std::variant<Undefined, None, bool, int64_t, double, String, std::shared_ptr<List>,
                            std::shared_ptr<const Dict>, std::shared_ptr<Namespace>,
                            std::shared_ptr<const Callable>, std::shared_ptr<const Loop>,
                            std::shared_ptr<const BigInteger>>;

  Value() = default;                            // undefined
  Value(Data data) : data_(std::move(data)) {}  // NOLINT: every alternative is a value
  Value(bool b) : data_(b) {}
  Value(int i) : data_(static_cast<int64_t>(i)) {}
  Value(int64_t i) : data_(i) {}
  Value(double d) : data_(d) {}
  Value(std::string s) : data_(std::make_shared<const std::string>(std::move(s))) {}
  Value(const char* s) : Value(std::string(s)) {}
  static Value undefined(std::string name) { return Data(Undefined{std::move(name)}); }
  static Value none() { return Data(None{}); }
  /// Throws Error when nested too deeply.
  static Value list(std::vector<Value> items, List::Kind kind = List::Kind::kList);
  static Value dict(Dict items);

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_string() const { return std::holds_alternative<String>(data_); }
  bool is_list() const { return std::holds_alternative<std::shared_ptr<List>>(data_); }
  bool is_dict() const { return std::holds_alternative<std::shared_ptr<const Dict>>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_integral() const { return is_bool() || is_int(); }

  /// The digits of a big whole number, or null.
  const std::string* big_integer() const {
    const auto* p = std::get_if<std::shared_ptr<const BigInteger>>(&data_);
    return p == nullptr ? nullptr : &(*p)->digits;
  }

  const Data& data() const { return data_; }
  const Undefined& as_undefined() const { return std::get<Undefined>(data_); }
  const std::string& as_string() const { return *std::get<String>(data_); }
  List& as_list() const { return *std::get<std::shared_ptr<List>>(data_); }
  const Dict& as_dict() const { return *std::get<std::shared_ptr<const Dict>>(data_); }
  /// Booleans count as 0 and 1.
  int64_t as_int() const { return is_bool() ? std::get<bool>(data_) : std::get<int64_t>(data_); }
  double as_double() const {
    return is_float() ? std::get<double>(data_) : static_cast<double>(as_int());
  }
  template <class T>
  std::shared_ptr<T> get_if() const {
    const auto* p = std::get_if<std::shared_ptr<T>>(&data_);
    return p == nullptr ? nullptr : *p;
  }

  bool truth() const;
  /// Python's name of the type, for messages.
  std::string type_name() const;
  int depth() const;

 private:
  Data data_;
};

/// Keeps the order of insertion.
class Dict {
 public:
  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
  /// Replaces the value of an equal key.
  void set(Value key, Value value);
  size_t size() const { return items_.size(); }
  const std::vector<std::pair<Value, Value>>& items() const { return items_; }
  int depth() const { return depth_; }
  void clear();

 private:
  std::vector<std::pair<Value, Value>> items_;
  std::unordered_map<std::string, size_t> index_;  // of text keys, once there are many
  int depth_ = 1;
};

/// What `namespace()` makes: the one thing that can be assigned to.
struct Namespace {
  Dict values;
};

/// Limits on what a rendering may take; counts down and throws Error.
class Budget {
 public:
  static constexpr int64_t kSteps = 5'000'000;
  static constexpr int64_t kBytes = int64_t{1} << 29;
  static constexpr int64_t kOutput = int64_t{1} << 26;
  static constexpr int kDepth = 600;       // nested evaluation
  static constexpr int kValueDepth = 200;  // nested lists and dictionaries

  void step(int64_t n = 1);
  /// Bytes written into new strings.
  void bytes(size_t n);

 private:
  int64_t steps_ = kSteps;
  int64_t bytes_ = kBytes;
};

bool equal(const Value& a, const Value& b, Budget& budget);
/// a < b; throws Error for types without an order.
bool less(const Value& a, const Value& b, Budget& budget);

/// Python's str() and repr().
std::string to_str(const Value& value, Budget& budget);
std::string to_repr(const Value& value, Budget& budget);
std::string float_repr(double value);

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  bool multiline = false;  // an indent was given
  std::string indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
};
/// Python's json.dumps.
std::string to_json(const Value& value, const JsonStyle& style, Budget& budget);
/// Reads JSON, keeping the order of keys. `what` names the text in errors.
Value from_json(std::string_view text, std::string_view what);

}  // namespace cambium::jinja
