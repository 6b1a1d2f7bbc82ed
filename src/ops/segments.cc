#include "ops/segments.h"

#include <algorithm>
#include <array>

namespace cambium {

void expect_segments(const char* operation, const Segments& segments, int64_t tokens,
                     const Tensor& state, Dtype dtype, std::initializer_list<int64_t> row_shape) {
  const auto count = static_cast<size_t>(segments.count());
  expect(segments.start.size() == count + 1 && (count == 0 || segments.start[0] == 0) &&
             std::is_sorted(segments.start.begin(), segments.start.end()) &&
             segments.tokens() == tokens,
         "[{}] expected segments whose starts rise from 0 to {} tokens, got {} segments of {} "
         "tokens",
         operation, tokens, count, segments.tokens());
  if (!state.defined()) {
    for (size_t s = 0; s < count; ++s) {
      expect(
          segments.position[s] == 0,
          "[{}] segment {} stands at position {}, but no state of the tokens before it was given",
          operation, s, segments.position[s]);
    }
    return;
  }
  std::array<int64_t, kMaxRank> shape{state.dim(0)};
  std::copy(row_shape.begin(), row_shape.end(), shape.begin() + 1);
  const Tensor wanted =
      Tensor::of(dtype, state.device, std::span(shape.data(), row_shape.size() + 1), nullptr);
  expect(state.dtype == dtype && state.same_shape(wanted) && state.contiguous(),
         "[{}] expected a contiguous state {}, got {}", operation, wanted, state);
  expect(segments.slot.size() == count,
         "[{}] expected a state slot for each of {} segments, got {}", operation, count,
         segments.slot.size());
  for (const int32_t slot : segments.slot) {
    expect(slot >= 0 && slot < state.dim(0), "[{}] expected state slots below {}, got {}",
           operation, state.dim(0), slot);
  }
}

}  // namespace cambium
