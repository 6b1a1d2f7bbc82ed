// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/attention/key_rows.h"
#include "ops/selection/chosen_tokens.h"

namespace cambium {

template <class T>
struct ChooseTokens {
  AttentionShape shape;  // one head of keys
  View<T> q;             // (T, H, D)
  KeyRows<T> keys;       // (rows, D)
  View<T> weight;        // (T, H)
  int32_t* positions;    // (T, budget): of each token as many as ChosenTokens::count
  int64_t budget;

  constexpr ChosenTokens chosen() const { return {positions, budget}; }
};
CAMBIUM_PLANNED_KERNEL(choose_tokens_of, ChooseTokens)

/// A number whose order among unsigned numbers is that of x among floats.
constexpr uint32_t ordered_bits(uint32_t bits) {
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace cambium
