// The fields of a configuration, declared once: a function `visit_fields(Config&, FieldVisitor&)`
// names each member with its key, its meaning and the values it may have. Reading a plan, checking
// a configuration that was built in code, the fingerprint of a run and the table of keys in the
// documents are visitors of it, so that none of them can forget a field.
//
//   void visit_fields(ScheduleConfig& c, FieldVisitor& visit) {
//     visit({"rate", "peak learning rate"}, c.peak, reals_above(0.0, 1e3));
//     visit({"decay", "of the rate"}, c.decay, {{"constant", Decay::kConstant}, ...});
//     visit.table({"optimizer", "..."}, [&] { ... });
//   }
#pragma once

#include <algorithm>
#include <cfloat>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/toml.h"

namespace cambium {

struct Field {
  const char* key;
  const char* help = "";
  /// What fingerprints write before the value; null = the key, "" = the value alone.
  const char* label = nullptr;
  /// False for what does not change the result of a run: it is left out of fingerprints.
  bool decides = true;
};

/// Whole numbers from low to high, both included.
struct IntRange {
  int64_t low = std::numeric_limits<int64_t>::min();
  int64_t high = std::numeric_limits<int64_t>::max();
};

/// Finite numbers from low to high; the open ends themselves are not among them.
struct RealRange {
  double low = -DBL_MAX;
  double high = DBL_MAX;
  bool open_low = false;
  bool open_high = false;
};

inline IntRange ints_from(int64_t low, int64_t high = std::numeric_limits<int64_t>::max()) {
  return {low, high};
}
inline RealRange reals_from(double low, double high = DBL_MAX) {
  return {low, high, false, false};
}
inline RealRange reals_above(double low, double high = DBL_MAX) {
  return {low, high, true, false};
}
/// From low on, below high.
inline RealRange reals_within(double low, double high) {
  return {low, high, false, true};
}

template <class T>
concept WholeNumber = std::integral<T> && !std::same_as<T, bool>;

class FieldVisitor {
 public:
  virtual ~FieldVisitor() = default;

  /// A whole number of any width: `range` is cut to what the member can hold.
  template <WholeNumber T>
  void operator()(const Field& field, T& member, IntRange range = {}) {
    if (std::in_range<int64_t>(std::numeric_limits<T>::max())) {
      range.high = std::min(range.high, static_cast<int64_t>(std::numeric_limits<T>::max()));
    }
    range.low = std::max(range.low, static_cast<int64_t>(std::numeric_limits<T>::min()));
    // What an int64_t cannot hold is outside every range; the largest one stands for it.
    int64_t value = std::in_range<int64_t>(member) ? static_cast<int64_t>(member)
                                                   : std::numeric_limits<int64_t>::max();
    const int64_t before = value;
    whole(field, value, range);
    if (value != before) {
      member = static_cast<T>(value);
    }
  }
  void operator()(const Field& field, double& member, const RealRange& range = {}) {
    real(field, member, range, false);
  }
  void operator()(const Field& field, float& member, RealRange range = {});
  void operator()(const Field& field, bool& member) { flag(field, member); }
  void operator()(const Field& field, std::string& member) { text(field, member); }
  /// One of the named values.
  template <class E>
  requires std::is_enum_v<E>
  void operator()(const Field& field, E& member,
                  std::span<const std::pair<const char*, E>> values) {
    std::vector<const char*> names;
    size_t chosen = values.size();
    for (const auto& [name, value] : values) {
      chosen = value == member ? names.size() : chosen;
      names.push_back(name);
    }
    CAMBIUM_CHECK(chosen < names.size(), "{} has a value without a name", field.key);
    choice(field, chosen, names);
    member = values[chosen].second;
  }
  template <class E>
  requires std::is_enum_v<E>
  void operator()(const Field& field, E& member,
                  std::initializer_list<std::pair<const char*, E>> values) {
    (*this)(field, member, std::span<const std::pair<const char*, E>>(values));
  }
  /// A string that must be one of `names`.
  void operator()(const Field& field, std::string& member,
                  std::initializer_list<const char*> names);
  /// A list; `range` is of each element.
  void operator()(const Field& field, std::vector<int64_t>& member, const IntRange& range = {}) {
    wholes(field, member, range);
  }
  void operator()(const Field& field, std::vector<std::string>& member) { texts(field, member); }
  /// The fields that `body` visits are those of the table [key].
  template <class Body>
  void table(const Field& field, Body&& body) {
    begin_table(field);
    body();
    end_table();
  }

 protected:
  virtual void whole(const Field& field, int64_t& value, const IntRange& range) = 0;
  /// `single`: the member is a float.
  virtual void real(const Field& field, double& value, const RealRange& range, bool single) = 0;
  virtual void flag(const Field& field, bool& value) = 0;
  virtual void text(const Field& field, std::string& value) = 0;
  virtual void choice(const Field& field, size_t& chosen, std::span<const char* const> names) = 0;
  virtual void wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) = 0;
  virtual void texts(const Field& field, std::vector<std::string>& values) = 0;
  virtual void begin_table(const Field& field) = 0;
  virtual void end_table() = 0;
};

/// Fills a configuration from a plan; what the plan does not give stays as it is. Error with file,
/// line, key, what was expected and what came.
class FieldReader : public FieldVisitor {
 public:
  explicit FieldReader(PlanTable table) { tables_.push_back(std::move(table)); }

 protected:
  void whole(const Field& field, int64_t& value, const IntRange& range) override;
  void real(const Field& field, double& value, const RealRange& range, bool single) override;
  void flag(const Field& field, bool& value) override;
  void text(const Field& field, std::string& value) override;
  void choice(const Field& field, size_t& chosen, std::span<const char* const> names) override;
  void wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) override;
  void texts(const Field& field, std::vector<std::string>& values) override;
  void begin_table(const Field& field) override;
  void end_table() override;

 private:
  const PlanTable& at() const { return tables_.back(); }
  std::vector<PlanTable> tables_;
};

/// A field as people are told of it.
struct FieldRow {
  std::string table;  // "optimizer.mixer"; empty for the fields of the configuration itself
  std::string key;
  std::string values;    // "a whole number from 1 to 100", "adamw or muon"
  std::string fallback;  // the value it has now
  std::string help;
};

namespace fields {

/// "a whole number from 1", "a number above 0 to 1000".
std::string range_text(const IntRange& range);
std::string range_text(const RealRange& range);
bool contains(const IntRange& range, int64_t value);
bool contains(const RealRange& range, double value);

}  // namespace fields

/// Checks the values a configuration has now. `where` begins the message: "distill".
class FieldChecker : public FieldVisitor {
 public:
  explicit FieldChecker(std::string where) : where_(std::move(where)) {}

 protected:
  void whole(const Field& field, int64_t& value, const IntRange& range) override;
  void real(const Field& field, double& value, const RealRange& range, bool single) override;
  void flag(const Field&, bool&) override {}
  void text(const Field&, std::string&) override {}
  void choice(const Field&, size_t&, std::span<const char* const>) override {}
  void wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) override;
  void texts(const Field&, std::vector<std::string>&) override {}
  void begin_table(const Field& field) override;
  void end_table() override;

 private:
  std::string name_of(const Field& field) const;
  std::string where_;
  std::vector<std::string> tables_;
};

/// What decides the result, by name: a field of the configuration itself is an entry of its own, a
/// table is one entry with the values of its fields in a row.
class FieldFingerprint : public FieldVisitor {
 public:
  std::map<std::string, std::string> take() { return std::move(entries_); }

 protected:
  void whole(const Field& field, int64_t& value, const IntRange& range) override;
  void real(const Field& field, double& value, const RealRange& range, bool single) override;
  void flag(const Field& field, bool& value) override;
  void text(const Field& field, std::string& value) override;
  void choice(const Field& field, size_t& chosen, std::span<const char* const> names) override;
  void wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) override;
  void texts(const Field& field, std::vector<std::string>& values) override;
  void begin_table(const Field& field) override;
  void end_table() override;

 private:
  void add(const Field& field, const std::string& value);
  std::map<std::string, std::string> entries_;
  std::vector<std::string> tables_;
};

/// Lists the fields for documents and help.
class FieldLister : public FieldVisitor {
 public:
  std::vector<FieldRow> take() { return std::move(rows_); }

 protected:
  void whole(const Field& field, int64_t& value, const IntRange& range) override;
  void real(const Field& field, double& value, const RealRange& range, bool single) override;
  void flag(const Field& field, bool& value) override;
  void text(const Field& field, std::string& value) override;
  void choice(const Field& field, size_t& chosen, std::span<const char* const> names) override;
  void wholes(const Field& field, std::vector<int64_t>& values, const IntRange& range) override;
  void texts(const Field& field, std::vector<std::string>& values) override;
  void begin_table(const Field& field) override;
  void end_table() override;

 private:
  void add(const Field& field, std::string values, std::string fallback);
  std::vector<FieldRow> rows_;
  std::vector<std::string> tables_;
};

/// A Markdown table of the rows: key, values, default, meaning.
std::string fields_table(std::span<const FieldRow> rows);
/// The same for a terminal, each line indented by two spaces; `prefix` stands before the keys.
std::string fields_help(std::span<const FieldRow> rows, const std::string& prefix);

template <class Config>
void read_fields(Config& config, const PlanTable& table) {
  FieldReader reader(table);
  visit_fields(config, reader);
}
template <class Config>
void check_fields(Config config, const std::string& where) {
  FieldChecker checker(where);
  visit_fields(config, checker);
}
template <class Config>
std::map<std::string, std::string> fingerprint_fields(Config config) {
  FieldFingerprint fingerprint;
  visit_fields(config, fingerprint);
  return fingerprint.take();
}
template <class Config>
std::vector<FieldRow> list_fields(Config config = {}) {
  FieldLister lister;
  visit_fields(config, lister);
  return lister.take();
}

}  // namespace cambium
