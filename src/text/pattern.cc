#include "text/pattern.h"

#include "text/normalizer.h"

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace cambium::text {

Pattern Pattern::from_regex(std::string_view regex) {
  Pattern pattern;
  pattern.regex_.emplace(regex);
  return pattern;
}

Pattern Pattern::from_string(std::string string) {
  Pattern pattern;
  pattern.string_ = std::move(string);
  return pattern;
}

Pattern Pattern::from_json(const nlohmann::json& spec) {
  if (spec.is_object() && spec.contains("Regex")) {
    return from_regex(spec.at("Regex").get<std::string>());
  }
  if (spec.is_object() && spec.contains("String")) {
    return from_string(spec.at("String").get<std::string>());
  }
  fail("[tokenizer] expected a pattern {{\"String\": ...}} or {{\"Regex\": ...}}, got {}",
       spec.dump());
}

bool Pattern::find_string(std::string_view subject, size_t from, size_t& begin, size_t& end) const {
  begin = subject.find(string_, from);
  end = begin + string_.size();
  return begin != std::string_view::npos;
}

std::string Pattern::replace(std::string_view subject, std::string_view content) const {
  std::string out;
  size_t done = 0;
  each_match(*this, subject, [&](size_t begin, size_t end) {
    out.append(subject, done, begin - done);
    out += content;
    expect_bounded(out.size());
    done = end;
  });
  out.append(subject, done);
  return out;
}

}  // namespace cambium::text
