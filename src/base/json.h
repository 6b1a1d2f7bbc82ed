// Reading JSON from files and requests: nlohmann's parser behind the checks it lacks. Text of any
// form ends in a value or an Error; what is returned is never nested deeper than `depth`, so that
// the library's own recursions over it (copying, dump, destruction) stay small.
#pragma once

#include <exception>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace cambium {

struct JsonRules {
  /// Objects and lists inside one another at most.
  int depth = 200;
  /// Python's Infinity, -Infinity and NaN, which JSON does not have, become the strings of these
  /// names: nobody minds them in keys that are not used, and where a number is needed the Error
  /// shows them.
  bool python = false;
  /// Two equal keys of an object are an Error; otherwise the last counts.
  bool unique_keys = false;
  /// Ends the Error about depth.
  std::string_view too_deep = "";
};

/// What the library says is wrong, without its own number for it.
std::string json_problem(const std::exception& error);

/// Error that names `where`, the line and what is wrong. Json is nlohmann::json or ordered_json.
template <class Json>
Json parse_json(std::string_view text, const std::string& where, const JsonRules& rules = {});

/// The same, or a discarded value instead of an Error.
template <class Json>
Json try_json(std::string_view text, const JsonRules& rules = {});

extern template nlohmann::json try_json(std::string_view, const JsonRules&);
extern template nlohmann::ordered_json try_json(std::string_view, const JsonRules&);
extern template nlohmann::json parse_json(std::string_view, const std::string&, const JsonRules&);
extern template nlohmann::ordered_json parse_json(std::string_view, const std::string&,
                                                  const JsonRules&);

}  // namespace cambium
