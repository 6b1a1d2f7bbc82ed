#pragma once

#include <cstdint>

namespace cambium {

/// How a token is chosen.
struct SamplingConfig {
  float temperature = 0.0F;  // 0 = greedy: the largest logit, the lowest index among equals
  int64_t top_k = 0;         // 0 = all
  float top_p = 1.0F;
  float min_p = 0.0F;  // drops tokens less likely than min_p times the likeliest
};

}  // namespace cambium
