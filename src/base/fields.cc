#include "base/fields.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "base/text.h"

namespace cambium {
namespace {

constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();

std::string real_text(double value, bool single) {
  return single ? fmt::format("{}", static_cast<float>(value)) : fmt::format("{}", value);
}

std::string names_text(std::span<const char* const> names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    text += fmt::format("{}{}", i == 0 ? "" : i + 1 == names.size() ? " or " : ", ", names[i]);
  }
  return text;
}

const char* yes_no(bool b) {
  return b ? "yes" : "no";
}

}  // namespace

namespace fields {

std::string range_text(const IntRange& range) {
  if (range.low == kLowest && range.high == kHighest) {
    return "a whole number";
  }
  if (range.high == kHighest) {
    return fmt::format("a whole number from {}", range.low);
  }
  if (range.low == kLowest) {
    return fmt::format("a whole number up to {}", range.high);
  }
  return fmt::format("a whole number from {} to {}", range.low, range.high);
}

std::string range_text(const RealRange& range) {
  const bool low = range.low > -static_cast<double>(FLT_MAX);
  const bool high = range.high < static_cast<double>(FLT_MAX);
  if (!low && !high) {
    return "a finite number";
  }
  std::string text = "a number";
  if (low) {
    text += fmt::format(" {} {}", range.open_low ? "above" : "from", range.low);
  }
  if (high) {
    text += fmt::format(" {} {}", range.open_high ? "below" : low ? "to" : "up to", range.high);
  }
  return text;
}

bool contains(const IntRange& range, int64_t value) {
  return value >= range.low && value <= range.high;
}

bool contains(const RealRange& range, double value) {
  return std::isfinite(value) && (range.open_low ? value > range.low : value >= range.low) &&
         (range.open_high ? value < range.high : value <= range.high);
}

}  // namespace fields

void FieldVisitor::operator()(const Field& field, float& member, RealRange range) {
  range.low = std::max(range.low, -static_cast<double>(FLT_MAX));
  range.high = std::min(range.high, static_cast<double>(FLT_MAX));
  auto value = static_cast<double>(member);
  const double before = value;
  real(field, value, range, true);
  if (value != before) {
    member = static_cast<float>(value);
  }
}

void FieldVisitor::operator()(const Field& field, std::string& member,
                              std::initializer_list<const char*> names) {
  const std::vector<const char*> list(names);
  const auto found = std::find(list.begin(), list.end(), member);
  CAMBIUM_CHECK(found != list.end(), "{} = {} is none of its own names", field.key, member);
  auto chosen = static_cast<size_t>(found - list.begin());
  choice(field, chosen, list);
  member = list[chosen];
}

void FieldReader::whole(const Field& field, int64_t& value, const IntRange& range) {
  if (at().has(field.key)) {
    value = at().get_int(field.key);
    expect(fields::contains(range, value), "{} must be {}, got {}", at().place(field.key),
           fields::range_text(range), value);
  }
}

void FieldReader::real(const Field& field, double& value, const RealRange& range, bool single) {
  (void)single;
  if (at().has(field.key)) {
    value = at().get_real(field.key);
    expect(fields::contains(range, value), "{} must be {}, got {}", at().place(field.key),
           fields::range_text(range), value);
  }
}

void FieldReader::flag(const Field& field, bool& value) {
  value = at().get_bool(field.key, value);
}

void FieldReader::text(const Field& field, std::string& value) {
  value = at().get_string(field.key, value);
}

void FieldReader::choice(const Field& field, size_t& chosen, std::span<const char* const> names) {
  if (!at().has(field.key)) {
    return;
  }
  const std::string name = at().get_string(field.key);
  const auto found = std::find(names.begin(), names.end(), name);
  const std::vector<std::string> known(names.begin(), names.end());
  expect(found != names.end(), "{} = \"{}\" is not known; expected one of {}{}",
         at().place(field.key), name, join(known, ", "), did_you_mean(name, known));
  chosen = static_cast<size_t>(found - names.begin());
}

void FieldReader::wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) {
  if (!at().has(field.key)) {
    return;
  }
  values = at().get_int_list(field.key);
  for (const int64_t value : values) {
    expect(fields::contains(range, value), "{} must be a list, each {}, got {}",
           at().place(field.key), fields::range_text(range), value);
  }
}

void FieldReader::texts(const Field& field, std::vector<std::string>& values) {
  if (at().has(field.key)) {
    values = at().get_string_list(field.key);
  }
}

void FieldReader::begin_table(const Field& field) {
  tables_.push_back(at().table(field.key));
}

void FieldReader::end_table() {
  tables_.pop_back();
}

std::string FieldChecker::name_of(const Field& field) const {
  return tables_.empty() ? field.key : join(tables_, ".") + "." + field.key;
}

void FieldChecker::whole(const Field& field, int64_t& value, const IntRange& range) {
  expect(fields::contains(range, value), "{}: {} must be {}, got {}", where_, name_of(field),
         fields::range_text(range), value);
}

void FieldChecker::real(const Field& field, double& value, const RealRange& range, bool single) {
  expect(fields::contains(range, value), "{}: {} must be {}, got {}", where_, name_of(field),
         fields::range_text(range), real_text(value, single));
}

void FieldChecker::wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) {
  for (int64_t value : values) {
    whole(field, value, range);
  }
}

void FieldChecker::begin_table(const Field& field) {
  tables_.emplace_back(field.key);
}

void FieldChecker::end_table() {
  tables_.pop_back();
}

void FieldFingerprint::add(const Field& field, const std::string& value) {
  if (!field.decides) {
    return;
  }
  const std::string label = field.label == nullptr ? field.key : field.label;
  if (tables_.empty()) {
    entries_[label] = value;
    return;
  }
  std::string& entry = entries_[tables_.back()];
  entry +=
      fmt::format("{}{}{}{}", entry.empty() ? "" : " ", label, label.empty() ? "" : " ", value);
}

void FieldFingerprint::whole(const Field& field, int64_t& value, const IntRange&) {
  add(field, fmt::format("{}", value));
}
void FieldFingerprint::real(const Field& field, double& value, const RealRange&, bool single) {
  add(field, real_text(value, single));
}
void FieldFingerprint::flag(const Field& field, bool& value) {
  add(field, yes_no(value));
}
void FieldFingerprint::text(const Field& field, std::string& value) {
  add(field, value);
}
void FieldFingerprint::choice(const Field& field, size_t& chosen,
                              std::span<const char* const> names) {
  std::string name = names[chosen];
  std::replace(name.begin(), name.end(), '_', ' ');
  add(field, name);
}
void FieldFingerprint::wholes(const Field& field, std::vector<int64_t>& values, const IntRange&) {
  add(field, fmt::format("{}", fmt::join(values, ",")));
}
void FieldFingerprint::texts(const Field& field, std::vector<std::string>& values) {
  add(field, join(values, ","));
}

void FieldFingerprint::begin_table(const Field& field) {
  tables_.emplace_back(field.label == nullptr ? field.key : field.label);
}

void FieldFingerprint::end_table() {
  tables_.pop_back();
}

void FieldLister::add(const Field& field, std::string values, std::string fallback) {
  rows_.push_back(
      {join(tables_, "."), field.key, std::move(values), std::move(fallback), field.help});
}

void FieldLister::whole(const Field& field, int64_t& value, const IntRange& range) {
  add(field, fields::range_text(range), fmt::format("{}", value));
}
void FieldLister::real(const Field& field, double& value, const RealRange& range, bool single) {
  add(field, fields::range_text(range), real_text(value, single));
}
void FieldLister::flag(const Field& field, bool& value) {
  add(field, "true or false", value ? "true" : "false");
}
void FieldLister::text(const Field& field, std::string& value) {
  add(field, "a string", value);
}
void FieldLister::choice(const Field& field, size_t& chosen, std::span<const char* const> names) {
  add(field, names_text(names), names[chosen]);
}
void FieldLister::wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) {
  add(field, "a list, each " + fields::range_text(range),
      values.empty() ? "" : fmt::format("[{}]", fmt::join(values, ", ")));
}
void FieldLister::texts(const Field& field, std::vector<std::string>& values) {
  add(field, "a list of strings", join(values, ", "));
}

void FieldLister::begin_table(const Field& field) {
  tables_.emplace_back(field.key);
}

void FieldLister::end_table() {
  tables_.pop_back();
}

std::string fields_table(std::span<const FieldRow> rows) {
  std::string out = "| key | value | default | meaning |\n| --- | --- | --- | --- |\n";
  for (const FieldRow& row : rows) {
    out += fmt::format("| {}{} | {} | {} | {} |\n",
                       row.table.empty() ? "" : fmt::format("[{}] ", row.table), row.key,
                       row.values, row.fallback, row.help);
  }
  return out;
}

std::string fields_help(std::span<const FieldRow> rows, const std::string& prefix) {
  std::string out;
  for (const FieldRow& row : rows) {
    const std::string key = row.table.empty() ? row.key : row.table + "." + row.key;
    out += fmt::format("  {}{}: {}\n", prefix, key, row.values);
  }
  return out;
}

}  // namespace cambium
