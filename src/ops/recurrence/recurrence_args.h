// Private to the operation: what its definition and its kernels are given. A pointer may be null
// where the recurrence goes without that input, or (for a gradient) where it is not wanted.
#pragma once

#include <cstdint>

#include "ops/segment_walk.h"

namespace cambium {

/// One input (T, heads, dim): heads and their elements lie together, tokens `stride` apart.
template <class Real>
struct PerToken {
  Real* data = nullptr;
  Real* grad = nullptr;
  int64_t stride = 0;

  Real* at(int64_t token, int64_t offset) const { return data + token * stride + offset; }
  /// Where the gradient of at(token, offset) goes, or null.
  Real* grad_at(int64_t token, int64_t offset) const {
    return grad == nullptr ? nullptr : grad + token * stride + offset;
  }
};

template <class Real>
struct RecurrenceArgs {
  SegmentWalk segments;
  int64_t key_heads;
  int64_t heads;    // value heads
  int64_t key_dim;  // K
  int64_t dim;      // V
  bool decay_per_channel;
  bool delta;
  PerToken<Real> q;          // (T, key_heads, K)
  PerToken<Real> k;          // (T, key_heads, K)
  PerToken<Real> v;          // (T, heads, V)
  PerToken<Real> log_decay;  // (T, heads) or (T, heads, K)
  PerToken<Real> weight;     // (T, heads)
  Real* skip;                // (heads)
  Real* dskip;
  Real* state;     // (slots, heads, K, V): before the segments; forward leaves those after them
  Real* y;         // (T, heads, V)
  const Real* dy;  // backward only

  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
  /// Offset of a head's log decay in its token, and how many there are.
  int64_t decay_dim() const { return decay_per_channel ? key_dim : 1; }
  Real* state_of(int64_t segment, int64_t head) const {
    return state == nullptr ? nullptr
                            : state + (segments.row(segment) * heads + head) * key_dim * dim;
  }
};

}  // namespace cambium
