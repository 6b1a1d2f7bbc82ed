// The definition: one row at a time, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "base/error.h"
#include "ops/sampling/sampling_kernels.h"

namespace cambium {
namespace definition {

/// The largest logit, the lowest index among equals. NaN is never chosen; it is an error where
/// nothing else is left.
template <class T>
int32_t argmax(std::span<const T> logits) {
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
inline bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

inline double total(const std::vector<Candidate>& candidates) {
  double sum = 0.0;
  for (const Candidate& c : candidates) {
    sum += c.weight;
  }
  return sum;
}

inline void keep_top_k(std::vector<Candidate>& candidates, int64_t k) {
  if (k > 0 && k < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), likelier);
    candidates.resize(static_cast<size_t>(k));
  }
}

/// The fewest likeliest tokens that hold a share p of what is left.
inline void keep_top_p(std::vector<Candidate>& candidates, double p) {
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

/// A token drawn from a row whose largest logit is that of `best`.
template <class T>
int32_t draw(std::span<const T> logits, const SamplingConfig& config, double uniform,
             int32_t best) {
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

template <class T>
double log_probability(std::span<const T> logits, int32_t token) {
  double largest = -std::numeric_limits<double>::infinity();
  for (const T x : logits) {
    largest = std::max(largest, static_cast<double>(x));
  }
  double sum = 0.0;
  for (const T x : logits) {
    sum += std::exp(static_cast<double>(x) - largest);
  }
  return static_cast<double>(logits[static_cast<size_t>(token)]) - largest - std::log(sum);
}

template <class T>
T penalised(T logit, const SamplingConfig& config, int32_t generated) {
  const T repetition = config.repetition;
  const T scaled = logit > 0 ? logit / repetition : logit * repetition;
  return generated > 0 ? scaled - static_cast<T>(config.frequency) * static_cast<T>(generated) -
                             static_cast<T>(config.presence)
                       : scaled;
}

/// The `count` likeliest tokens: larger logits first, the lower index among equals, NaN last.
template <class T>
std::vector<int32_t> likeliest(std::span<const T> logits, int64_t count) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    const T x = logits[static_cast<size_t>(a)];
    const T y = logits[static_cast<size_t>(b)];
    return std::isnan(x) != std::isnan(y) ? std::isnan(y) : x > y || (!(y > x) && a < b);
  });
  order.resize(static_cast<size_t>(count));
  return order;
}

}  // namespace definition

template <class T>
void sample_rows::reference(const SampleRows<T>& a) {
  for (int64_t r = 0; r < a.logits.count(); ++r) {
    const std::span<const T> row(a.logits.row(r), static_cast<size_t>(a.logits.channels));
    a.token[r] = definition::draw(row, a.config[r], a.uniform[r], definition::argmax(row));
    a.log_probability[r] = static_cast<float>(definition::log_probability(row, a.token[r]));
  }
}

template <class T>
void penalise_rows::reference(const PenaliseRows<T>& a) {
  for (int64_t r = 0; r < a.logits.count(); ++r) {
    T* row = a.logits.row(r);
    for (int64_t i = a.start[r]; i < a.start[r + 1]; ++i) {
      T& logit = row[a.seen[i].token];
      logit = definition::penalised(logit, a.config[r], a.seen[i].generated);
    }
  }
}

template <class T>
void rank_rows::reference(const RankRows<T>& a) {
  for (int64_t r = 0; r < a.logits.count(); ++r) {
    if (a.wanted[r] < 0) {
      continue;
    }
    const std::span<const T> row(a.logits.row(r), static_cast<size_t>(a.logits.channels));
    const auto log_probability = [&](int32_t token) {
      return static_cast<float>(definition::log_probability(row, token));
    };
    a.log_probability[r] = log_probability(a.token[r]);
    const std::vector<int32_t> tokens = definition::likeliest(row, a.wanted[r]);
    for (size_t i = 0; i < tokens.size(); ++i) {
      a.likeliest[r * a.most + static_cast<int64_t>(i)] = {tokens[i], log_probability(tokens[i])};
    }
  }
}

}  // namespace cambium
