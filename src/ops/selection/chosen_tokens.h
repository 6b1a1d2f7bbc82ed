// The tokens that each token of a call may look at. Free of containers, for kernels.
#pragma once

#include <cstdint>

namespace cambium {

/// A token at position p has chosen min(budget, p + 1) tokens of its sequence; without a choice it
/// looks at all up to itself.
struct ChosenTokens {
  const int32_t* positions = nullptr;  // (T, budget) ascending, where kernels find them; or null
  int64_t budget = 0;

  constexpr bool defined() const { return positions != nullptr; }
  /// How many a token at position `own` looks at.
  constexpr int64_t count(int64_t own) const {
    return positions != nullptr && own >= budget ? budget : own + 1;
  }
  /// The i-th of token t of the call.
  constexpr int64_t position(int64_t t, int64_t i) const {
    return positions != nullptr ? positions[t * budget + i] : i;
  }
  /// Whether token t, at position `own`, looks at position p.
  constexpr bool has(int64_t t, int64_t own, int64_t p) const {
    if (p > own || positions == nullptr || own < budget) {
      return p <= own;
    }
    int64_t first = 0;
    int64_t end = budget;
    while (first < end) {
      const int64_t middle = (first + end) / 2;
      if (positions[t * budget + middle] < p) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first < budget && positions[t * budget + first] == p;
  }
};

}  // namespace cambium
