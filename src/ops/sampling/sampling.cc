#include "ops/sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"

namespace cambium {
namespace {

void check(std::span<const float> logits, const SamplingConfig& config, double uniform) {
  expect(!logits.empty(), "[sample_token] expected logits, got none");
  check_sampling(config);
  expect(uniform >= 0.0 && uniform < 1.0, "[sample_token] expected uniform in [0, 1), got {}",
         uniform);
}

/// The largest logit, the lowest index among equals. NaN is never chosen; it is an error where
/// nothing else is left.
int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (best < 0 ? !std::isnan(logits[i]) : logits[i] > logits[static_cast<size_t>(best)]) {
      best = static_cast<int32_t>(i);
    }
  }
  expect(best >= 0, "[sample_token] every logit is NaN; the model's weights or state are broken");
  return best;
}

struct Candidate {
  double weight;  // exp((logit - largest) / temperature)
  int32_t token;
};

/// Likelier first; the lower index among equals, so that cuts do not depend on the sort.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

double total(const std::vector<Candidate>& candidates) {
  double sum = 0.0;
  for (const Candidate& c : candidates) {
    sum += c.weight;
  }
  return sum;
}

void keep_top_k(std::vector<Candidate>& candidates, int64_t k) {
  if (k > 0 && k < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), likelier);
    candidates.resize(static_cast<size_t>(k));
  }
}

/// The fewest likeliest tokens that hold a share p of what is left.
void keep_top_p(std::vector<Candidate>& candidates, double p) {
  if (p >= 1.0) {
    return;
  }
  const double wanted = p * total(candidates);
  std::sort(candidates.begin(), candidates.end(), likelier);
  double sum = 0.0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    sum += candidates[i].weight;
    if (sum >= wanted) {
      candidates.resize(i + 1);
      return;
    }
  }
}

}  // namespace

void check_sampling(const SamplingConfig& config) {
  expect(config.temperature >= 0.0F && std::isfinite(config.temperature),
         "[sample_token] expected temperature >= 0, got {}", config.temperature);
  expect(config.top_k >= 0, "[sample_token] expected top_k >= 0 (0 = all), got {}", config.top_k);
  expect(config.top_p > 0.0F && config.top_p <= 1.0F,
         "[sample_token] expected 0 < top_p <= 1, got {}", config.top_p);
  expect(config.min_p >= 0.0F && config.min_p <= 1.0F,
         "[sample_token] expected 0 <= min_p <= 1, got {}", config.min_p);
}

int32_t sample_token(std::span<const float> logits, const SamplingConfig& config, double uniform) {
  check(logits, config, uniform);
  const int32_t best = argmax(logits);
  if (config.temperature == 0.0F || std::isinf(logits[static_cast<size_t>(best)])) {
    return best;
  }
  const double largest = logits[static_cast<size_t>(best)];
  const double inverse = 1.0 / static_cast<double>(config.temperature);
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp((static_cast<double>(logits[i]) - largest) * inverse);
    // The likeliest weighs 1. What weighs nothing (or is NaN) can never be drawn.
    if (weight > 0.0 && weight >= static_cast<double>(config.min_p)) {
      candidates.push_back({weight, static_cast<int32_t>(i)});
    }
  }
  keep_top_k(candidates, config.top_k);
  keep_top_p(candidates, static_cast<double>(config.top_p));
  // In the order of the vocabulary, whatever the cuts did to the order.
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  double left = uniform * total(candidates);
  for (const Candidate& c : candidates) {
    left -= c.weight;
    if (left < 0.0) {
      return c.token;
    }
  }
  return candidates.back().token;  // rounding ate the last step
}

double token_log_probability(std::span<const float> logits, int32_t token) {
  expect(token >= 0 && static_cast<size_t>(token) < logits.size(),
         "[token_log_probability] expected a token in 0..{}, got {}",
         static_cast<int64_t>(logits.size()) - 1, token);
  double largest = -std::numeric_limits<double>::infinity();
  for (const float x : logits) {
    largest = std::max(largest, static_cast<double>(x));
  }
  double sum = 0.0;
  for (const float x : logits) {
    sum += std::exp(static_cast<double>(x) - largest);
  }
  return static_cast<double>(logits[static_cast<size_t>(token)]) - largest - std::log(sum);
}

}  // namespace cambium
