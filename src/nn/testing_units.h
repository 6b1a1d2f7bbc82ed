// The units that tests run over, by subject: options and the parameters that they make.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "nn/unit.h"

namespace cambium::testing {

constexpr int64_t kWidth = 12;
constexpr int64_t kTokens = 21;

struct UnitCase {
  const char* name;
  UnitSpec spec;
  std::map<std::string, std::vector<int64_t>> parameters;  // shapes
};

/// The options with more of them, or others.
inline Options with(Options options,
                    std::initializer_list<std::pair<std::string, OptionValue>> more) {
  for (const auto& [key, value] : more) {
    options.set(key, value);
  }
  return options;
}

std::vector<UnitCase> attention_cases();     // units_attention_test.cc
std::vector<UnitCase> recurrent_cases();     // units_recurrent_test.cc
std::vector<UnitCase> parallel_cases();      // units_parallel_test.cc
std::vector<UnitCase> feed_forward_cases();  // units_feed_forward_test.cc

}  // namespace cambium::testing
