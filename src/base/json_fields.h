// Values of a JSON object by key, each with its type and range checked: for files that this program
// wrote and anybody may have changed since. Every Error names the file, the way to the value in it,
// what was expected and what came.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace cambium {

class JsonFields {
 public:
  /// Error unless `value`, which must outlive this, is an object. `where` names it: "summary.json".
  JsonFields(const nlohmann::json& value, std::string where);

  const std::string& where() const { return where_; }
  /// There and not null.
  bool has(const char* key) const;

  int64_t whole(const char* key, int64_t low = 0, int64_t high = INT64_MAX) const;
  uint64_t unsigned_whole(const char* key) const;
  /// Finite, as JSON's numbers are.
  double real(const char* key) const;
  bool flag(const char* key) const;
  std::string text(const char* key) const;
  JsonFields object(const char* key) const;
  /// The objects of a list.
  std::vector<JsonFields> objects(const char* key) const;
  std::vector<int64_t> wholes(const char* key, int64_t low = 0, int64_t high = INT64_MAX) const;
  /// null, which stands for NaN in our files, is NaN here.
  std::vector<double> reals(const char* key) const;
  std::vector<bool> flags(const char* key) const;
  /// An object of strings, or of whole numbers from 0.
  std::map<std::string, std::string> texts_by_name(const char* key) const;
  std::map<std::string, int64_t> wholes_by_name(const char* key) const;

 private:
  const nlohmann::json& at(const char* key) const;
  const nlohmann::json& list(const char* key) const;
  const nlohmann::json* json_;
  std::string where_;
};

}  // namespace cambium
