// Options: a small ordered list of named values that configures a unit. It keeps models data: a
// spec prints, parses and travels without knowing the units.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace cambium {

using OptionValue = std::variant<bool, int64_t, double, std::string, std::vector<double>>;

class Options {
 public:
  Options() = default;
  Options(std::initializer_list<std::pair<std::string, OptionValue>> values) : values_(values) {}

  void set(std::string_view key, OptionValue value);
  bool has(std::string_view key) const { return find(key) != nullptr; }
  const std::vector<std::pair<std::string, OptionValue>>& values() const { return values_; }

  /// The value, or an Error that names the key and `owner` when it is missing or of another type.
  int64_t integer(std::string_view owner, std::string_view key) const;
  int64_t integer(std::string_view owner, std::string_view key, int64_t fallback) const;
  /// A whole number from 1 to `most`: what sizes are made of. Products of several still ask for
  /// base/checked.h.
  int64_t size(std::string_view owner, std::string_view key, int64_t most) const;
  /// From `least` to `most`, or the fallback where the key is missing.
  int64_t size_or(std::string_view owner, std::string_view key, int64_t fallback, int64_t most,
                  int64_t least = 0) const;
  double real(std::string_view owner, std::string_view key, double fallback) const;
  bool flag(std::string_view owner, std::string_view key, bool fallback) const;
  const std::string& text(std::string_view owner, std::string_view key) const;
  std::string text(std::string_view owner, std::string_view key, const char* fallback) const;
  /// Empty where the key is missing.
  std::vector<double> reals(std::string_view owner, std::string_view key) const;
  /// Error unless every key is one of `known`; suggests the nearest.
  void expect_only(std::string_view owner, const std::vector<std::string>& known) const;
  /// The same keys with the same values, in whatever order they were set.
  friend bool operator==(const Options& a, const Options& b);

 private:
  const OptionValue* find(std::string_view key) const;
  std::vector<std::pair<std::string, OptionValue>> values_;
};

}  // namespace cambium
