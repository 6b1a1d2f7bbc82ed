#include "base/json_fields.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/text.h"

namespace cambium {
namespace {

using Json = nlohmann::json;

[[noreturn]] void wrong(const std::string& where, const std::string& name,
                        const std::string& expected, const Json& got) {
  fail("{}: expected {} to be {}, got {}", where, name, expected,
       shortened(got.dump(-1, ' ', false, Json::error_handler_t::replace)));
}

std::string quoted(const char* key) {
  return fmt::format("'{}'", key);
}

std::string entry(const char* key, size_t index) {
  return fmt::format("'{}[{}]'", key, index);
}

int64_t to_whole(const std::string& where, const std::string& name, const Json& value, int64_t low,
                 int64_t high) {
  // Beyond 2^63 the parser's numbers are unsigned.
  const bool fits =
      value.is_number_unsigned()
          ? value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())
          : value.is_number_integer();
  if (!fits || value.get<int64_t>() < low || value.get<int64_t>() > high) {
    wrong(where, name,
          high == INT64_MAX ? fmt::format("a whole number from {}", low)
                            : fmt::format("a whole number from {} to {}", low, high),
          value);
  }
  return value.get<int64_t>();
}

std::string to_text(const std::string& where, const std::string& name, const Json& value) {
  if (!value.is_string()) {
    wrong(where, name, "a string", value);
  }
  return value.get<std::string>();
}

}  // namespace

JsonFields::JsonFields(const Json& value, std::string where)
    : json_(&value), where_(std::move(where)) {
  if (!value.is_object()) {
    fail("{}: expected an object, got {}", where_,
         shortened(value.dump(-1, ' ', false, Json::error_handler_t::replace)));
  }
}

const Json& JsonFields::at(const char* key) const {
  const auto it = json_->find(key);
  expect(it != json_->end(), "{}: expected the key '{}', which is missing", where_, key);
  return *it;
}

const Json& JsonFields::list(const char* key) const {
  const Json& value = at(key);
  if (!value.is_array()) {
    wrong(where_, quoted(key), "a list", value);
  }
  return value;
}

bool JsonFields::has(const char* key) const {
  const auto it = json_->find(key);
  return it != json_->end() && !it->is_null();
}

int64_t JsonFields::whole(const char* key, int64_t low, int64_t high) const {
  return to_whole(where_, quoted(key), at(key), low, high);
}

uint64_t JsonFields::unsigned_whole(const char* key) const {
  const Json& value = at(key);
  if (!value.is_number_unsigned()) {
    wrong(where_, quoted(key), "a whole number from 0", value);
  }
  return value.get<uint64_t>();
}

double JsonFields::real(const char* key) const {
  const Json& value = at(key);
  if (!value.is_number()) {
    wrong(where_, quoted(key), "a number", value);
  }
  return value.get<double>();
}

bool JsonFields::flag(const char* key) const {
  const Json& value = at(key);
  if (!value.is_boolean()) {
    wrong(where_, quoted(key), "true or false", value);
  }
  return value.get<bool>();
}

std::string JsonFields::text(const char* key) const {
  return to_text(where_, quoted(key), at(key));
}

JsonFields JsonFields::object(const char* key) const {
  return {at(key), fmt::format("{}: {}", where_, key)};
}

std::vector<JsonFields> JsonFields::objects(const char* key) const {
  std::vector<JsonFields> all;
  for (const Json& value : list(key)) {
    all.push_back({value, fmt::format("{}: {}[{}]", where_, key, all.size())});
  }
  return all;
}

std::vector<int64_t> JsonFields::wholes(const char* key, int64_t low, int64_t high) const {
  std::vector<int64_t> all;
  for (const Json& value : list(key)) {
    all.push_back(to_whole(where_, entry(key, all.size()), value, low, high));
  }
  return all;
}

std::vector<double> JsonFields::reals(const char* key) const {
  std::vector<double> all;
  for (const Json& value : list(key)) {
    if (!value.is_null() && !value.is_number()) {
      wrong(where_, entry(key, all.size()), "a number or null", value);
    }
    all.push_back(value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>());
  }
  return all;
}

std::vector<bool> JsonFields::flags(const char* key) const {
  std::vector<bool> all;
  for (const Json& value : list(key)) {
    if (!value.is_boolean()) {
      wrong(where_, entry(key, all.size()), "true or false", value);
    }
    all.push_back(value.get<bool>());
  }
  return all;
}

std::map<std::string, std::string> JsonFields::texts_by_name(const char* key) const {
  const JsonFields inside = object(key);
  std::map<std::string, std::string> all;
  for (const auto& [name, value] : inside.json_->items()) {
    all[name] = to_text(inside.where_, fmt::format("'{}'", shortened(name)), value);
  }
  return all;
}

std::map<std::string, int64_t> JsonFields::wholes_by_name(const char* key) const {
  const JsonFields inside = object(key);
  std::map<std::string, int64_t> all;
  for (const auto& [name, value] : inside.json_->items()) {
    all[name] = to_whole(inside.where_, fmt::format("'{}'", shortened(name)), value, 0, INT64_MAX);
  }
  return all;
}

}  // namespace cambium
