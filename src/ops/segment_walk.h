// Segments as kernels take them: plain numbers and pointers.
#pragma once

#include <cstdint>

namespace cambium {

class SegmentPlans;

struct SegmentWalk {
  int64_t count = 0;
  const int32_t* start = nullptr;     // (count + 1)
  const int32_t* position = nullptr;  // (count)
  const int32_t* slot = nullptr;      // (count); null: segment s has state row s
  SegmentPlans* plans = nullptr;      // what was worked out of them (ops/segment_plans.h), or null

  constexpr int64_t begin(int64_t s) const { return start[s]; }
  constexpr int64_t length(int64_t s) const { return start[s + 1] - start[s]; }
  /// Whether segment s continues a sequence whose state must be read.
  constexpr bool continues(int64_t s) const { return position[s] > 0; }
  constexpr int64_t row(int64_t s) const { return slot != nullptr ? slot[s] : s; }
  constexpr int64_t tokens() const { return count == 0 ? 0 : start[count]; }
  constexpr bool any_continues() const {
    for (int64_t s = 0; s < count; ++s) {
      if (continues(s)) {
        return true;
      }
    }
    return false;
  }
};

/// What a definition keeps for its backward kernel: the state before each segment, (count, size),
/// as the forward kernel is about to overwrite the slots. No bytes where no segment has one.
template <class T>
constexpr int64_t initial_state_bytes(const SegmentWalk& segments, int64_t size) {
  return segments.any_continues() ? segments.count * size * static_cast<int64_t>(sizeof(T)) : 0;
}
template <class T>
void keep_initial_state(const SegmentWalk& segments, int64_t size, const T* state, T* kept) {
  for (int64_t s = 0; s < segments.count; ++s) {
    for (int64_t i = 0; segments.continues(s) && i < size; ++i) {
      kept[s * size + i] = state[segments.row(s) * size + i];
    }
  }
}

}  // namespace cambium
