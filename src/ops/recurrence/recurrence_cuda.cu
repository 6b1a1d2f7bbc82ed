// Which form of the recurrence runs, and the chunks of a call.
#include <type_traits>
#include <vector>

#include "ops/recurrence/recurrence_cuda.cuh"

namespace cambium::cuda {
namespace {

struct ChunkPlan {
  struct Key {
    int64_t segments;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray first;
  DeviceArray span;
  int64_t count = 0;
};

ChunkPlan make_plan(const SegmentWalk& segments, const Launch& on) {
  std::vector<int32_t> first{0};
  std::vector<ChunkSpan> spans;
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t position = segments.position[s];
    const int64_t length = segments.length(s);
    const int64_t count = chunks_of(position, length);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t begin = chunk_begin(position, c);
      const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
      spans.push_back({static_cast<int32_t>(s), static_cast<int32_t>(segments.begin(s) + begin),
                       static_cast<int32_t>(end - begin), c + 1 == count ? 1 : 0});
    }
    first.push_back(static_cast<int32_t>(spans.size()));
  }
  return {{segments.count},
          DeviceArray(first.data(), static_cast<int64_t>(first.size() * sizeof(int32_t)), on),
          DeviceArray(spans.data(), static_cast<int64_t>(spans.size() * sizeof(ChunkSpan)), on),
          static_cast<int64_t>(spans.size())};
}

template <class T>
int64_t keeps(const Recurrence<T>& a) {
  const int64_t errors = a.delta ? a.segments.tokens() * a.heads * a.dim : 0;
  return (count_chunks(a.segments) * a.state_size() + errors) * static_cast<int64_t>(sizeof(float));
}

template <class T>
void forward(const Recurrence<T>& a, const Launch& on) {
  const DeviceSegments segments = on_device(a.segments, on);
  bool in_chunks = false;
  if constexpr (std::is_same_v<T, bf16>) {
    in_chunks = segments.longest >= kLeastChunked && recurrence_has_chunks(a);
  }
  const DeviceChunks chunks =
      a.kept != nullptr || in_chunks ? device_chunks(a.segments, on) : DeviceChunks{};
  if (!in_chunks) {
    recurrence_steps(a, segments, chunks, segments.longest + 1, on);
    return;
  }
  if constexpr (std::is_same_v<T, bf16>) {
    recurrence_chunks(a, segments, chunks, on);
    bool any_short = false;
    for (int64_t s = 0; s < a.segments.count; ++s) {
      any_short = any_short || a.segments.length(s) < kLeastChunked;
    }
    if (any_short) {
      recurrence_steps(a, segments, chunks, kLeastChunked, on);
    }
  }
}

}  // namespace

DeviceChunks device_chunks(const SegmentWalk& segments, const Launch& on) {
  const auto plan = plan_for<ChunkPlan>(segments.plans, {segments.count},
                                        [&] { return make_plan(segments, on); });
  return {plan->first.as<int32_t>(), plan->span.as<ChunkSpan>(), plan->count, plan};
}

int64_t count_chunks(const SegmentWalk& segments) {
  int64_t count = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    count += chunks_of(segments.position[s], segments.length(s));
  }
  return count;
}

int64_t recurrence_forward_keeps(const Recurrence<float>& a) {
  return keeps(a);
}
int64_t recurrence_forward_keeps(const Recurrence<bf16>& a) {
  return keeps(a);
}
void recurrence_forward(const Recurrence<float>& a, const Launch& on) {
  forward(a, on);
}
void recurrence_forward(const Recurrence<bf16>& a, const Launch& on) {
  forward(a, on);
}

}  // namespace cambium::cuda
