// The scan forward. With 16 states a thread has all of a channel: no sums between threads, and a
// warp reads 32 neighbouring channels. For a few tokens, where the states are most of the bytes,
// four threads share a channel, so that a warp reads and writes its states in one row.
#include "ops/selective_scan/selective_scan_cuda.cuh"

#include <algorithm>
#include <vector>

#include "ops/segment_plans.h"

namespace cambium::cuda {
namespace {

constexpr int64_t kSlots = 132 * 16;  // warps of this kernel that a large GPU holds

/// The sum of a value over the lanes of a channel.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, lanes);
  }
  return x;
}

/// A block takes neighbouring channels of a span. kLocal: from a state of zero, for the state after
/// the span (into carry) and the sum of its steps; else from the state in carry, or without carry
/// that before the segment, for everything.
template <class T, int kStates, int kLanes, int kTokens, bool kFull, bool kLocal>
__global__ void __launch_bounds__(kScanThreads, 4)
    scan_forward(SelectiveScan<T> a, ScanSpans spans, int64_t channel_blocks, float* carry,
                 float* step_sums) {
  using Tokens = Deal<kTokens, kLanes>;
  using Math = ScanMath<T>;
  const int64_t index = blockIdx.x / channel_blocks;
  const ScanSpan span(a.segments, spans, index);
  if (!span.taken || (kLocal && span.last)) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t place = (blockIdx.x % channel_blocks * kScanThreads + threadIdx.x) / kLanes;
  const bool real = place < a.channels;
  const int64_t channel = real ? place : a.channels - 1;
  const int64_t state = static_cast<int64_t>(lane) * kStates;  // the first of this thread
  const int64_t row_size = a.channels * a.states;
  const int64_t row = channel * a.states;
  const float bias = a.dt_bias.data[channel];
  const float skip = a.d.data[channel];
  const int64_t b_offset = a.b_offset(channel);
  const int64_t c_offset = a.c_offset(channel);
  float rate[kStates];
  load_rates<kStates, kFull>(a, channel, state, rate);
  float h[kStates] = {};
  if (!kLocal && carry != nullptr) {
    load_states<kStates, kFull>(carry + index * row_size + row, state, a.states, h);
  } else if (!kLocal && a.segments.continues(span.segment)) {
    load_states<kStates, kFull>(a.state_of(span.segment) + row, state, a.states, h);
  }
  float* kept = nullptr;
  if (!kLocal && a.kept != nullptr) {
    kept = static_cast<float*>(a.kept) + spans.first_kept[span.segment] * row_size + row;
  }
  float step_sum = 0.0F;
  const int64_t first = a.segments.begin(span.segment);
  for (int64_t i = span.begin; i < span.end; i += kTokens) {
    if (kept != nullptr && real && i % kKeptTokens == 0) {
      store_states<kStates, kFull>(kept + i / kKeptTokens * row_size, state, a.states, h);
    }
    float u[Tokens::kOwn];
    float step[Tokens::kOwn];
    float written[Tokens::kOwn];
    float z[Tokens::kOwn];
#pragma unroll
    for (int k = 0; k < Tokens::kOwn; ++k) {
      const int64_t token = i + Tokens::first(lane) + k;
      const int64_t t = first + min(token, span.end - 1);
      u[k] = load(a.u.at(t, channel));
      z[k] = kLocal ? 0.0F : load(a.z.at(t, channel));
      // A step of 0 leaves the state as it is.
      step[k] = token < span.end ? Math::softplus(load(a.dt.at(t, channel)) + bias) : 0.0F;
      written[k] = step[k] * u[k];
      step_sum += Tokens::leads(lane) ? step[k] : 0.0F;
    }
    float y[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int64_t t = first + min(i + j, span.end - 1);
      const float token_step = Tokens::of(step, j);
      const float token_written = Tokens::of(written, j);
      float b[kStates];
      float c[kStates];
      load_states<kStates, kFull>(a.b.at(t, b_offset), state, a.states, b);
      if constexpr (!kLocal) {
        load_states<kStates, kFull>(a.c.at(t, c_offset), state, a.states, c);
      }
      float even = 0.0F;
      float odd = 0.0F;
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        h[n] = fmaf(Math::decay(token_step * rate[n]), h[n], token_written * b[n]);
        if constexpr (!kLocal) {
          float& sum = n % 2 == 0 ? even : odd;
          sum = fmaf(c[n], h[n], sum);
        }
      }
      y[j] = even + odd;
    }
    if constexpr (!kLocal) {
      sum_and_deal<kLanes, 1>(y, lane);
#pragma unroll
      for (int k = 0; k < Tokens::kOwn; ++k) {
        const int64_t token = i + Tokens::first(lane) + k;
        if (token < span.end && real && Tokens::leads(lane)) {
          store(a.y.at(first + token, channel),
                fmaf(skip, u[k], y[k]) * scan_gate(a, z[k], Math::gate(z[k])));
        }
      }
    }
  }
  if constexpr (kLocal) {
    step_sum = lane_sum<kLanes>(step_sum);
    if (real) {
      store_states<kStates, kFull>(carry + index * row_size + row, state, a.states, h);
      if (lane == 0) {
        step_sums[index * a.channels + channel] = step_sum;
      }
    }
  } else if (span.last && a.state != nullptr && real) {
    store_states<kStates, kFull>(a.state_of(span.segment) + row, state, a.states, h);
  }
}

/// A state a thread.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    carry_states(SelectiveScan<T> a, ScanSpans spans, float* carry, const float* step_sums,
                 bool backward) {
  const int64_t row_size = a.channels * a.states;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  const int64_t segment = index / row_size;
  const int64_t at = index % row_size;
  if (segment >= a.segments.count) {
    return;
  }
  const int64_t channel = at / a.states;
  const float rate = ScanMath<T>::rate(a.a_log.data[at]);
  const int64_t begin = spans.first_span[segment];
  const int64_t count = spans.first_span[segment + 1] - begin;
  float h = !backward && a.segments.continues(segment) ? a.state_of(segment)[at] : 0.0F;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t span = backward ? begin + count - 1 - i : begin + i;
    float* place = carry + span * row_size + at;
    float after = 0.0F;
    if (i + 1 < count) {  // nothing was scanned of the last
      after = fmaf(ScanMath<T>::decay(step_sums[span * a.channels + channel] * rate), h, *place);
    }
    *place = h;
    h = after;
  }
}

/// The scan of the segments of `lengths`.
template <class T, int kStates, int kLanes, int kTokens, bool kFull>
void scan(const SelectiveScan<T>& host, const SelectiveScan<T>& a, const DeviceSegments& segments,
          unsigned lengths, const Launch& on) {
  const int64_t channel_blocks = ceil_div(a.channels * kLanes, kScanThreads);
  const int64_t warps = channel_blocks * kScanThreads / 32;
  const int64_t tokens = on.batch_invariant ? kWholeSegments : span_tokens(segments, warps, kSlots);
  ScanSpans spans{.count = a.segments.count, .tokens = tokens};
  std::shared_ptr<const ScanPlan> plan;
  if (a.kept != nullptr || tokens != kWholeSegments) {
    plan = scan_plan(host.segments, tokens, on);
    spans = plan->spans;
  }
  spans.lengths = lengths;
  const auto blocks = static_cast<unsigned>(spans.count * channel_blocks);
  float* carry = nullptr;
  if (plan != nullptr && plan->cut) {
    carry = scratch<float>(on, spans.count * a.channels * a.states);
    float* step_sums = scratch<float>(on, spans.count * a.channels);
    launch(on, "selective_scan", scan_forward<T, kStates, kLanes, kTokens, kFull, true>, blocks,
           kScanThreads, 0, a, spans, channel_blocks, carry, step_sums);
    carry_over_spans(a, spans, carry, step_sums, false, on);
  }
  launch(on, "selective_scan", scan_forward<T, kStates, kLanes, kTokens, kFull, false>, blocks,
         kScanThreads, 0, a, spans, channel_blocks, carry, nullptr);
}

/// The form that suits the segments of `lengths`: few tokens or more.
template <class T>
void scan_lengths(const SelectiveScan<T>& host, const SelectiveScan<T>& a,
                  const DeviceSegments& segments, unsigned lengths, bool few, const Launch& on) {
  if constexpr (sizeof(T) == 2) {
    if (!few && scan_by_tiles(host, segments, lengths, on)) {
      return;
    }
  }
  constexpr int64_t kWidth = 16 / sizeof(T);
  if (a.states == 16 && aligned(a.b.data) && aligned(a.c.data) && aligned(a.a_log.data) &&
      aligned(a.state) && aligned(a.kept) && a.b.rows.outer_stride % kWidth == 0 &&
      a.c.rows.outer_stride % kWidth == 0) {
    few ? scan<T, 4, 4, 1, true>(host, a, segments, lengths, on)
        : scan<T, 16, 1, 4, true>(host, a, segments, lengths, on);
  } else if (a.states <= 8) {
    scan<T, 8, 1, 4, false>(host, a, segments, lengths, on);
  } else if (a.states <= 16) {
    scan<T, 16, 1, 4, false>(host, a, segments, lengths, on);
  } else if (a.states <= 64) {
    scan<T, 16, 4, 4, false>(host, a, segments, lengths, on);
  } else {
    check_launch("selective_scan of more than 256 states a channel", {}, {}, 0,
                 a.states <= 256 ? cudaSuccess : cudaErrorInvalidValue);
    scan<T, 16, 16, 4, false>(host, a, segments, lengths, on);
  }
}

/// Batch-invariant: every segment is taken by the form for its own length.
template <class T>
void scan_each(const SelectiveScan<T>& host, const SelectiveScan<T>& a,
               const DeviceSegments& segments, const Launch& on) {
  unsigned there = 0;
  for (int64_t s = 0; s < host.segments.count; ++s) {
    there |= length_kind(host.segments.length(s));
  }
  if ((there & kOneToken) != 0 && scan_decode(a, segments, on)) {
    there &= ~kOneToken;
  }
  if ((there & (kOneToken | kFew)) != 0) {
    scan_lengths(host, a, segments, there & (kOneToken | kFew), true, on);
  }
  if ((there & kMany) != 0) {
    scan_lengths(host, a, segments, kMany, false, on);
  }
}

template <class T>
void run_forward(const SelectiveScan<T>& host, const Launch& on) {
  const DeviceSegments segments = on_device(host.segments, on);
  SelectiveScan<T> a = host;
  a.segments = segments.walk;
  if (a.segments.count == 0 || a.channels == 0 || a.states == 0) {
    return;
  }
  if (on.batch_invariant) {
    scan_each(host, a, segments, on);
  } else if (!scan_decode(a, segments, on)) {
    scan_lengths(host, a, segments, kAnyLength, segments.longest <= kFewTokens, on);
  }
}

int64_t kept_states(const SegmentWalk& segments) {
  int64_t count = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    count += ceil_div(segments.length(s), kKeptTokens);
  }
  return count;
}
template <class T>
int64_t kept_bytes(const SelectiveScan<T>& a) {
  return kept_states(a.segments) * a.channels * a.states * static_cast<int64_t>(sizeof(float));
}

}  // namespace

std::shared_ptr<const ScanPlan> scan_plan(const SegmentWalk& segments, int64_t tokens,
                                          const Launch& on) {
  return plan_for<ScanPlan>(segments.plans, {tokens}, [&] {
    std::vector<int32_t> first_span{0};
    std::vector<int32_t> first_kept;
    std::vector<int32_t> segment;
    std::vector<int32_t> begin;
    int64_t kept = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
      first_kept.push_back(static_cast<int32_t>(kept));
      kept += ceil_div(segments.length(s), kKeptTokens);
      const int64_t count = std::max<int64_t>(ceil_div(segments.length(s), tokens), 1);
      for (int64_t i = 0; i < count; ++i) {
        segment.push_back(static_cast<int32_t>(s));
        begin.push_back(static_cast<int32_t>(i * tokens));
      }
      first_span.push_back(static_cast<int32_t>(segment.size()));
    }
    std::vector<int32_t> all;
    for (const auto* part : {&first_span, &first_kept, &segment, &begin}) {
      all.insert(all.end(), part->begin(), part->end());
    }
    ScanPlan plan{
        .key = {tokens},
        .memory = DeviceArray(all.data(), static_cast<int64_t>(all.size() * sizeof(int32_t)), on)};
    const auto* at = plan.memory.as<int32_t>();
    const auto count = static_cast<int64_t>(segment.size());
    plan.spans.count = count;
    plan.spans.tokens = tokens;
    plan.spans.first_span = at;
    plan.spans.first_kept = at + segments.count + 1;
    plan.spans.segment = plan.spans.first_kept + segments.count;
    plan.spans.begin = plan.spans.segment + count;
    plan.cut = count > segments.count;
    return plan;
  });
}

int64_t span_tokens(const DeviceSegments& segments, int64_t warps, int64_t slots) {
  if (segments.longest <= 2 * kKeptTokens) {
    return kWholeSegments;
  }
  // Sequences as long as the longest run for the time of all.
  const int64_t beside = ceil_div(segments.tokens, segments.longest);
  if (3 * beside * warps >= slots) {
    return kWholeSegments;
  }
  const int64_t spans = std::max<int64_t>(slots / warps, 1);
  const int64_t tokens = ceil_div(ceil_div(segments.tokens, spans), kKeptTokens) * kKeptTokens;
  return tokens < segments.longest ? tokens : kWholeSegments;
}

template <class T>
void carry_over_spans(const SelectiveScan<T>& a, const ScanSpans& spans, float* carry,
                      const float* step_sums, bool backward, const Launch& on) {
  const int64_t threads = a.segments.count * a.channels * a.states;
  launch(on, "selective_scan", carry_states<T>,
         static_cast<unsigned>(ceil_div(threads, kScanThreads)), kScanThreads, 0, a, spans, carry,
         step_sums, backward);
}
template void carry_over_spans<float>(const SelectiveScan<float>&, const ScanSpans&, float*,
                                      const float*, bool, const Launch&);
template void carry_over_spans<bf16>(const SelectiveScan<bf16>&, const ScanSpans&, float*,
                                     const float*, bool, const Launch&);

int64_t selective_scan_forward_keeps(const SelectiveScan<float>& a) {
  return kept_bytes(a);
}
int64_t selective_scan_forward_keeps(const SelectiveScan<bf16>& a) {
  return kept_bytes(a);
}

void selective_scan_forward(const SelectiveScan<float>& a, const Launch& on) {
  run_forward(a, on);
}
void selective_scan_forward(const SelectiveScan<bf16>& a, const Launch& on) {
  run_forward(a, on);
}

}  // namespace cambium::cuda
