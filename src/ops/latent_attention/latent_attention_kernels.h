// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/attention/key_rows.h"
#include "ops/latent_attention/max_latent.h"
#include "ops/selection/chosen_tokens.h"

namespace cambium {

template <class T>
struct LatentAttention {
  AttentionShape shape;  // one key-value head, of R + P numbers, R of them its value
  View<T> q;             // (T, H, R + P)
  KeyRows<T> latent;     // (rows, R)
  KeyRows<T> rope_key;   // (rows, P)
  ChosenTokens chosen;
  View<T> y;           // (T, H, R) contiguous
  float* largest;      // (T, H) kept for backward: the largest score; null if unwanted
  float* inverse_sum;  // (T, H): 1 / sum of exp(score - largest)
};
CAMBIUM_KERNEL(latent_attention_forward, LatentAttention)
/// Reads y and y.grad; adds to the gradients of q, latent and rope_key. Without pages.
CAMBIUM_KERNEL(latent_attention_backward, LatentAttention)

}  // namespace cambium
