#include "nn/options.h"

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"
#include "base/text.h"

namespace cambium {

bool operator==(const Options& a, const Options& b) {
  return a.values_.size() == b.values_.size() &&
         std::all_of(a.values_.begin(), a.values_.end(), [&](const auto& option) {
           const OptionValue* other = b.find(option.first);
           return other != nullptr && *other == option.second;
         });
}

const OptionValue* Options::find(std::string_view key) const {
  for (const auto& [name, value] : values_) {
    if (name == key) {
      return &value;
    }
  }
  return nullptr;
}

void Options::set(std::string_view key, OptionValue value) {
  for (auto& [name, old] : values_) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  values_.emplace_back(key, std::move(value));
}

int64_t Options::integer(std::string_view owner, std::string_view key) const {
  const OptionValue* value = find(key);
  expect(value != nullptr, "{}: expected the option '{}', which is missing", owner, key);
  expect(std::holds_alternative<int64_t>(*value), "{}: expected '{}' to be a whole number", owner,
         key);
  return std::get<int64_t>(*value);
}

int64_t Options::integer(std::string_view owner, std::string_view key, int64_t fallback) const {
  return has(key) ? integer(owner, key) : fallback;
}

int64_t Options::size(std::string_view owner, std::string_view key, int64_t most) const {
  return in_range(owner, key, integer(owner, key), 1, most);
}

int64_t Options::size_or(std::string_view owner, std::string_view key, int64_t fallback,
                         int64_t most, int64_t least) const {
  return has(key) ? in_range(owner, key, integer(owner, key), least, most) : fallback;
}

double Options::real(std::string_view owner, std::string_view key, double fallback) const {
  const OptionValue* value = find(key);
  if (value == nullptr) {
    return fallback;
  }
  if (const auto* whole = std::get_if<int64_t>(value)) {
    return static_cast<double>(*whole);
  }
  expect(std::holds_alternative<double>(*value), "{}: expected '{}' to be a number", owner, key);
  return std::get<double>(*value);
}

bool Options::flag(std::string_view owner, std::string_view key, bool fallback) const {
  const OptionValue* value = find(key);
  if (value == nullptr) {
    return fallback;
  }
  expect(std::holds_alternative<bool>(*value), "{}: expected '{}' to be true or false", owner, key);
  return std::get<bool>(*value);
}

const std::string& Options::text(std::string_view owner, std::string_view key) const {
  const OptionValue* value = find(key);
  expect(value != nullptr, "{}: expected the option '{}', which is missing", owner, key);
  expect(std::holds_alternative<std::string>(*value), "{}: expected '{}' to be a string", owner,
         key);
  return std::get<std::string>(*value);
}

std::string Options::text(std::string_view owner, std::string_view key,
                          const char* fallback) const {
  return has(key) ? text(owner, key) : fallback;
}

std::vector<double> Options::reals(std::string_view owner, std::string_view key) const {
  const OptionValue* value = find(key);
  if (value == nullptr) {
    return {};
  }
  expect(std::holds_alternative<std::vector<double>>(*value),
         "{}: expected '{}' to be a list of numbers", owner, key);
  return std::get<std::vector<double>>(*value);
}

void Options::expect_only(std::string_view owner, const std::vector<std::string>& known) const {
  for (const auto& [name, value] : values_) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      fail("{}: unknown option '{}'{}", owner, name, did_you_mean(name, known));
    }
  }
}

}  // namespace cambium
