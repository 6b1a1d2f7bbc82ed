// How packed tokens divide into pieces of sequences. Training, prefill, chunked prefill and decode
// differ in nothing else.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>

#include "ops/segment_walk.h"
#include "tensor/context.h"

namespace cambium {

/// Rows [start[s], start[s + 1]) of a packed tensor are consecutive tokens of one sequence, the
/// first of which stands at absolute position position[s]. With state, slot[s] is the sequence's
/// row in every state tensor; operations read the state of the tokens before the segment (nothing
/// when position[s] is 0, whatever the slot holds) and leave the state after it.
struct Segments {
  std::span<const int32_t> start;     // (S + 1)
  std::span<const int32_t> position;  // (S)
  std::span<const int32_t> slot;      // (S), or empty when no state is kept
  SegmentPlans* plans = nullptr;      // of these segments, for every call on them; or null

  int64_t count() const { return static_cast<int64_t>(position.size()); }
  int64_t tokens() const { return start.empty() ? 0 : start.back(); }
  int64_t length(int64_t s) const {
    const auto i = static_cast<size_t>(s);
    return start[i + 1] - start[i];
  }
  SegmentWalk walk() const {
    return {count(), start.data(), position.data(), slot.empty() ? nullptr : slot.data(), plans};
  }
};

/// Fails unless the segments divide `tokens` tokens, every slot is a row of `state`, and the state
/// is a contiguous tensor (slots, row_shape...) of `dtype`; an undefined state is right only where
/// all segments stand at position 0.
void expect_segments(const char* operation, const Segments& segments, int64_t tokens,
                     const Tensor& state, Dtype dtype, std::initializer_list<int64_t> row_shape);

}  // namespace cambium
