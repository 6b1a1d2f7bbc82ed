// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>

namespace cambium {

struct SamplingConfig {
  float temperature = 0.0F;  // 0 = greedy: the largest logit, the lowest index among equals
  int64_t top_k = 0;         // 0 = all
  float top_p = 1.0F;
  float min_p = 0.0F;  // drops tokens less likely than min_p times the likeliest
};

/// Error unless every setting is in its range; NaN is in none. sample_token asks this of every
/// token; whoever takes requests asks it first.
void check_sampling(const SamplingConfig& config);

/// One token from logits (V). `uniform` in [0, 1) decides; the caller draws it from (seed,
/// position).
int32_t sample_token(std::span<const float> logits, const SamplingConfig& config, double uniform);

/// log softmax(logits)[token].
double token_log_probability(std::span<const float> logits, int32_t token);

}  // namespace cambium
