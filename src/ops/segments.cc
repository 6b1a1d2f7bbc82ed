#include "ops/segments.h"

#include <algorithm>
#include <array>
#include <cstring>

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
         "[{}] expected a contiguous state {}, got {}", operation, wanted.describe(),
         state.describe());
  expect(segments.slot.size() == count,
         "[{}] expected a state slot for each of {} segments, got {}", operation, count,
         segments.slot.size());
  for (const int32_t slot : segments.slot) {
    expect(slot >= 0 && slot < state.dim(0), "[{}] expected state slots below {}, got {}",
           operation, state.dim(0), slot);
  }
}

Tensor copy_initial_state(const Context& ctx, const Segments& segments, const Tensor& state) {
  const bool any = std::any_of(segments.position.begin(), segments.position.end(),
                               [](int32_t position) { return position > 0; });
  if (!any) {
    return {};
  }
  std::array<int64_t, kMaxRank> shape = state.shape;
  shape[0] = segments.count();
  const Tensor copy =
      ctx.arena->empty(state.dtype, std::span(shape.data(), static_cast<size_t>(state.rank)));
  for (int64_t s = 0; s < segments.count(); ++s) {
    const auto i = static_cast<size_t>(s);
    if (segments.position[i] > 0) {
      const Tensor from = state.slice(0, segments.slot[i], 1);
      std::memcpy(copy.slice(0, s, 1).data, from.data, static_cast<size_t>(from.bytes()));
    }
  }
  return copy;
}

}  // namespace cambium
