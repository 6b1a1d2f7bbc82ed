// What a Split or Replace looks for: a fixed string or a regular expression.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "text/regex.h"

namespace cambium::text {

class Pattern {
 public:
  /// `spec`: {"String": s} or {"Regex": s}.
  static Pattern from_json(const nlohmann::json& spec);
  static Pattern from_string(std::string string);
  static Pattern from_regex(std::string_view regex);

  bool find(std::string_view subject, size_t from, size_t& begin, size_t& end) const {
    return regex_ ? regex_->find(subject, from, begin, end)
                  : find_string(subject, from, begin, end);
  }

  /// Every match replaced by `content`, taken literally.
  std::string replace(std::string_view subject, std::string_view content) const;

 private:
  Pattern() = default;
  bool find_string(std::string_view subject, size_t from, size_t& begin, size_t& end) const;
  std::string string_;
  std::optional<Regex> regex_;
};

/// Calls `visit(begin, end)` for every match in `subject`, left to right, not overlapping.
template <class Visit>
void each_match(const Pattern& pattern, std::string_view subject, Visit&& visit) {
  size_t from = 0;
  size_t begin = 0;
  size_t end = 0;
  while (from <= subject.size() && pattern.find(subject, from, begin, end)) {
    visit(begin, end);
    from = end;
    if (begin == end) {  // step over one character after an empty match
      ++from;
      while (from < subject.size() && (static_cast<unsigned char>(subject[from]) & 0xC0) == 0x80) {
        ++from;
      }
    }
  }
}

}  // namespace cambium::text
