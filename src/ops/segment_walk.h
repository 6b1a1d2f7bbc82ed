// Segments as kernels take them: plain numbers and pointers.
#pragma once

#include <cstdint>

namespace cambium {

struct SegmentWalk {
  int64_t count = 0;
  const int32_t* start = nullptr;     // (count + 1)
  const int32_t* position = nullptr;  // (count)
  const int32_t* slot = nullptr;      // (count); null: segment s has state row s

  int64_t begin(int64_t s) const { return start[s]; }
  int64_t length(int64_t s) const { return start[s + 1] - start[s]; }
  /// Whether segment s continues a sequence whose state must be read.
  bool continues(int64_t s) const { return position[s] > 0; }
  int64_t row(int64_t s) const { return slot != nullptr ? slot[s] : s; }
};

}  // namespace cambium
