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
  View<T> weight;        // (T, H), or undefined: each head has a list
  int32_t* pieces;       // (T, lists, budget): of each list as many as ChosenTokens::count has
  ChosenTokens chosen;   // `pieces`, and how they are meant; its tail says pools
  int64_t local;         // of pieces that are not pools: always chosen

  /// Pieces 0 .. candidates(own) - 1 may be chosen, top() of them.
  constexpr int64_t candidates(int64_t own) const {
    return chosen.size == 1 ? own + 1 : (chosen.tail ? own + 1 : own + chosen.size) / chosen.size;
  }
  constexpr int64_t top() const { return chosen.budget - (chosen.tail ? 1 : 0); }
  /// The first of the candidates that are chosen whatever their scores.
  constexpr int64_t first_local(int64_t own) const {
    return chosen.size == 1 || chosen.tail ? candidates(own) : candidates(own) - local;
  }
  /// Whether the piece after the candidates, which is not whole, is looked at besides.
  constexpr bool has_tail(int64_t own) const { return chosen.tail && chosen.last_piece(own) > 0; }
};
CAMBIUM_PLANNED_KERNEL(choose_tokens_of, ChooseTokens)

/// A number whose order among unsigned numbers is that of x among floats.
constexpr uint32_t ordered_bits(uint32_t bits) {
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace cambium
