// A typed reader of TOML plans. Every key must be asked for: keys that nobody knows are an Error
// that suggests the nearest known one, so that a typo never silently means the default.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

struct PlanNode;

class PlanTable {
 public:
  /// Error with file, line and reason for what is not TOML.
  static PlanTable read(const std::string& path);
  static PlanTable parse(std::string_view text, const std::string& where = "plan");

  bool has(const std::string& key) const;
  /// The value, an Error when it is missing or of another type, or `fallback` when it is missing.
  /// A number without a fraction serves as real too; inf and nan do not.
  int64_t get_int(const std::string& key) const;
  int64_t get_int(const std::string& key, int64_t fallback) const;
  double get_real(const std::string& key) const;
  double get_real(const std::string& key, double fallback) const;
  bool get_bool(const std::string& key, bool fallback) const;
  std::string get_string(const std::string& key) const;
  std::string get_string(const std::string& key, const std::string& fallback) const;
  /// Empty when missing.
  std::vector<int64_t> get_int_list(const std::string& key) const;
  std::vector<double> get_real_list(const std::string& key) const;
  std::vector<std::string> get_string_list(const std::string& key) const;
  /// [key]; an empty table when missing.
  PlanTable table(const std::string& key) const;
  /// [[key]], in order; empty when missing.
  std::vector<PlanTable> tables(const std::string& key) const;
  /// The keys of this table, in the order of the file.
  std::vector<std::string> keys() const;

  /// Sets "a.b.c" to a TOML value given as text, as a command line does: "3", "0.1", "[1, 2]", or
  /// in place of a table or a list of them "{a = 1}", "[{a = 1}, {a = 2}]". Text that is no TOML
  /// value is taken as a string.
  void set(const std::string& dotted_key, const std::string& value);
  /// The same for each "key=value", as --set gives them; Error for one without "=".
  void set_all(const std::vector<std::string>& assignments);

  /// Error for the first key of this table or any below it that was never asked for.
  void expect_all_used() const;
  /// "plans/teacher.toml [optimizer]".
  std::string where() const;
  /// "plans/teacher.toml:7: optimizer.beta1", to begin a message about the value of a key with.
  std::string place(const std::string& key) const;
  /// The whole table as TOML.
  std::string to_text() const;

 private:
  explicit PlanTable(std::shared_ptr<PlanNode> node) : node_(std::move(node)) {}
  std::shared_ptr<PlanNode> node_;
};

}  // namespace cambium
