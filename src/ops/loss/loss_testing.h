// What the tests of the loss share.
#pragma once

#include <cstdint>
#include <vector>

namespace cambium::testing {

/// Labels of so many tokens, of which every third counts for nothing.
inline std::vector<int32_t> make_labels(int64_t tokens, int64_t vocabulary) {
  std::vector<int32_t> labels;
  for (int64_t t = 0; t < tokens; ++t) {
    labels.push_back(t % 3 == 1 ? -100 : static_cast<int32_t>((7 * t + 2) % vocabulary));
  }
  return labels;
}

}  // namespace cambium::testing
