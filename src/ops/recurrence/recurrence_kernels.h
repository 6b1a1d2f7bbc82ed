// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/segment_walk.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct Recurrence {
  SegmentWalk segments;
  int64_t key_heads;
  int64_t heads;    // value heads
  int64_t key_dim;  // K
  int64_t dim;      // V
  bool decay_per_channel;
  bool delta;
  // The heads of a token and their elements lie together.
  View<T> q, k;            // (T, key_heads, K)
  View<T> v;               // (T, heads, V)
  View<Sum<T>> log_decay;  // (T, heads) or (T, heads, K)
  View<Sum<T>> weight;     // (T, heads), or undefined
  View<Sum<T>> skip;       // (heads), or undefined
  Sum<T>* state;  // (slots, heads, K, V): before the segments; forward leaves those after them
  View<T> y;      // (T, heads, V) contiguous
  void* kept;     // from forward to backward

  constexpr int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
  /// How many log decays a head has in a token.
  constexpr int64_t decay_dim() const { return decay_per_channel ? key_dim : 1; }
  constexpr int64_t state_size() const { return heads * key_dim * dim; }
  constexpr Sum<T>* state_of(int64_t segment, int64_t head) const {
    return state == nullptr ? nullptr
                            : state + (segments.row(segment) * heads + head) * key_dim * dim;
  }
};

CAMBIUM_KEEPING_KERNEL(recurrence_forward, Recurrence)
/// Reads y.grad; adds to the gradients of the inputs.
CAMBIUM_PLANNED_KERNEL(recurrence_backward, Recurrence)

}  // namespace cambium
