// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/attention/key_rows.h"
#include "ops/selection/chosen_tokens.h"

namespace cambium {

template <class T>
struct ChosenAttention {
  AttentionShape shape;
  View<T> q;     // (T, H, D)
  KeyRows<T> k;  // (rows, Hkv, D)
  KeyRows<T> v;  // (rows, Hkv, Dv)
  ChosenTokens chosen;
  View<T> y;           // (T, H, Dv) contiguous
  float* largest;      // (T, H) kept for backward: the largest score; null if unwanted
  float* inverse_sum;  // (T, H): 1 / sum of exp(score - largest)

  /// The list of token t for a head of keys.
  constexpr int64_t list(int64_t t, int64_t kv_head) const {
    return chosen.lists == 1 ? t : t * chosen.lists + kv_head;
  }
};
CAMBIUM_KERNEL(chosen_attention_forward, ChosenAttention)
/// Reads y and y.grad; adds to the gradients of q, k and v. Without pages.
CAMBIUM_KERNEL(chosen_attention_backward, ChosenAttention)

}  // namespace cambium
