#pragma once

#include <cstdint>

namespace cambium {

/// How a token is chosen.
struct SamplingConfig {
  float temperature = 0.0F;  // 0 = greedy: the largest logit, the lowest index among equals
  int64_t top_k = 0;         // 0 = all
  float top_p = 1.0F;
  float min_p = 0.0F;  // drops tokens less likely than min_p times the likeliest
  // Of tokens that were there before (penalise_tokens): a logit above 0 of any token of prompt and
  // output is divided by `repetition`, one below multiplied with it; then `frequency` is taken off
  // for each time it is in the output, and `presence` once.
  float repetition = 1.0F;
  float presence = 0.0F;
  float frequency = 0.0F;

  bool penalises() const { return repetition != 1.0F || presence != 0.0F || frequency != 0.0F; }
};

/// A token of a sequence, and how many times it is in what was generated (0: in the prompt alone).
struct SeenToken {
  int32_t token = 0;
  int32_t generated = 0;
};

/// One of the likeliest tokens of a row.
struct RankedToken {
  int32_t token = 0;
  float log_probability = 0.0F;
};

/// The most likeliest tokens that can be asked for beside a chosen one.
inline constexpr int64_t kMostRanked = 20;

}  // namespace cambium
