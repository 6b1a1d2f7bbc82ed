// The scan forward of bf16 and 16 states, by tiles (selective_scan_tiles_cuda.cuh).
//
// What bounds it, on an H100 at its 1.755 GHz, for 8,192 tokens of 4,096 channels: 352 MB of inputs
// and result at 3.0 TB/s are 0.117 ms. A state a token needs one exponential; with two for the step
// and two for the gate that are 671 million, at 16 a clock and multiprocessor 0.181 ms. The
// arithmetic around them, 5 instructions a state with the exponential and about 35 a channel with
// its loads and stores, 0.15 ms at one a clock and scheduler. So the exponentials are the floor,
// and everything else must run beside them: no exponential is computed twice, and B, C, steps and
// gates are prepared by other warps.
#include "ops/selective_scan/selective_scan_tiles_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kSlots = 132 * 2;  // blocks that keep a large GPU busy

// Places in a buffer, padded so that lanes meet in no bank.
// Steps: (warp, token / 2, channel, token % 2) of (step, step u).
constexpr int kStepPair = kWarpChannels * 4 + 4;
constexpr int kStepWarp = kTileTokens / 2 * kStepPair + 8;
// Parts of y: (warp, token, channel, lane).
constexpr int kPartToken = kWarpChannels * 4 + 4;
constexpr int kPartWarp = kTileTokens * kPartToken + 8;
constexpr int kSteps = kScanWarps * kStepWarp;
constexpr int kParts = kScanWarps * kPartWarp;

struct Buffers {
  float* memory;
  int words;  // of a buffer

  __device__ __forceinline__ float* steps(int i) const { return memory + i % 2 * words; }
  __device__ __forceinline__ float* parts(int i) const { return steps(i) + kSteps; }
  __device__ __forceinline__ float* rows(int i) const { return parts(i) + kParts; }
};
int buffer_words(int slots) {
  return kSteps + kParts + slots * kSlotWords;
}

/// A helper: eight channels of a token of each tile.
template <bool kLocal, int kRows>
__device__ __forceinline__ void help(const SelectiveScan<bf16>& a, const TileGroups& groups,
                                     const Buffers& buffers, unsigned block_channel, int64_t first,
                                     int tokens) {
  using Math = ScanMath<bf16>;
  const int helper = static_cast<int>(threadIdx.x);
  const int token = helper / kScanWarps;
  const int warp = helper % kScanWarps;  // that scans these channels
  const unsigned channel = block_channel + warp * kWarpChannels;
  const int slots = groups.b_slots + (kLocal ? 0 : groups.c_slots);
  float bias[kWarpChannels];
  float skip[kWarpChannels];
#pragma unroll
  for (int g = 0; g < kWarpChannels; ++g) {
    bias[g] = a.dt_bias.data[channel + g];
    skip[g] = a.d.data[channel + g];
  }
  const bf16* u_at = a.u.at(first + token, channel);
  const bf16* dt_at = a.dt.at(first + token, channel);
  const bf16* z_at = a.z.at(first + token, channel);
  bf16* y_at = a.y.at(first + token, channel);
  RowsAhead<kRows> rows(a, groups, block_channel, slots, helper, first);
  uint4 u;
  uint4 dt;
  uint4 z = make_uint4(0, 0, 0, 0);
  const auto load_tile = [&](int left) {  // tokens from it on
    u = load_octet(u_at, token < left);
    dt = load_octet(dt_at, token < left, kNoStep);
    u_at += kTileTokens * a.u.rows.outer_stride;
    dt_at += kTileTokens * a.dt.rows.outer_stride;
    if constexpr (!kLocal) {
      z = load_octet(z_at, token < left);
      z_at += kTileTokens * a.z.rows.outer_stride;
    }
    rows.load(left);
  };
  const auto finish = [&](int tile, bool exists, const uint4& its_u, const uint4& its_z) {
    wait_at(kScanned + tile % 2);
    if constexpr (!kLocal) {
      const auto* parts = reinterpret_cast<const float4*>(buffers.parts(tile) + warp * kPartWarp +
                                                          token * kPartToken);
      float wide_u[kWarpChannels];
      float wide_z[kWarpChannels];
      float y[kWarpChannels];
      widen(its_u, wide_u);
      widen(its_z, wide_z);
#pragma unroll
      for (int g = 0; g < kWarpChannels; ++g) {
        const float4 part = parts[g];
        const float sum = (part.x + part.y) + (part.z + part.w);
        y[g] = fmaf(skip[g], wide_u[g], sum) * (wide_z[g] * Math::gate(wide_z[g]));
      }
      if (exists) {
        store_octet(y_at, y);
      }
      y_at += kTileTokens * a.y.rows.outer_stride;
    }
  };

  uint4 last_u = make_uint4(0, 0, 0, 0);
  uint4 last_z = last_u;
  load_tile(tokens);
  int tile = 0;
  for (int left = tokens; left > 0; left -= kTileTokens, ++tile) {
    float wide_u[kWarpChannels];
    float raw[kWarpChannels];
    widen(u, wide_u);
    widen(dt, raw);
    float* steps = buffers.steps(tile) + warp * kStepWarp + token / 2 * kStepPair + token % 2 * 2;
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      const float step = Math::softplus(raw[g] + bias[g]);
      *reinterpret_cast<float2*>(steps + g * 4) = make_float2(step, step * wide_u[g]);
    }
    rows.store(buffers.rows(tile), slots, helper);
    pass(kFilled + tile % 2);
    const uint4 this_u = u;
    const uint4 this_z = z;
    load_tile(left - kTileTokens);
    if (tile > 0) {
      finish(tile - 1, true, last_u, last_z);
    }
    last_u = this_u;
    last_z = this_z;
  }
  if (tile > 0) {
    finish(tile - 1, (tile - 1) * kTileTokens + token < tokens, last_u, last_z);
  }
}

/// kLocal: from a state of zero, for the state after the span (into carry) and the sum of its
/// steps; else from the state in carry, or without carry that before the segment.
template <bool kLocal, int kRows>
__global__ void __launch_bounds__(kTileThreads, 2)
    scan_tiles(SelectiveScan<bf16> a, ScanSpans spans, TileGroups groups, float* carry,
               float* step_sums) {
  extern __shared__ __align__(16) float memory[];
  const int64_t index = blockIdx.x / groups.channel_blocks;
  const unsigned block_channel = blockIdx.x % groups.channel_blocks * kTileChannels;
  const ScanSpan span(a.segments, spans, index);
  if (!span.taken || (kLocal && span.last)) {
    return;
  }
  const int64_t first = a.segments.begin(span.segment) + span.begin;
  const auto tokens = static_cast<int>(span.end - span.begin);
  const Buffers buffers{
      memory, kSteps + kParts + (groups.b_slots + (kLocal ? 0 : groups.c_slots)) * kSlotWords};
  if (threadIdx.x < kHelpers) {
    help<kLocal, kRows>(a, groups, buffers, block_channel, first, tokens);
    return;
  }

  const int warp = static_cast<int>(threadIdx.x - kHelpers) / 32;
  // Lanes next to each other have the same states or the same channel: their reads of B and C, and
  // of steps, are one.
  const int place = static_cast<int>(threadIdx.x) % 32;
  const int lane = place / 2 % 4;
  const int g = place % 2 + place / 8 * 2;
  const int64_t channel = block_channel + warp * kWarpChannels + g;
  const int64_t row_size = a.channels * kTileStates;
  const int64_t at = channel * kTileStates + lane * 4;
  float rate[4];
  load_n<4>(a.a_log.data + at, rate);
#pragma unroll
  for (float& of_state : rate) {
    of_state = ScanMath<bf16>::rate(of_state);
  }
  float h[4] = {};
  if (!kLocal && carry != nullptr) {
    load_n<4>(carry + index * row_size + at, h);
  } else if (!kLocal && a.segments.continues(span.segment)) {
    load_n<4>(a.state_of(span.segment) + at, h);
  }
  float* kept = nullptr;
  if (!kLocal && a.kept != nullptr) {
    kept = static_cast<float*>(a.kept) +
           (spans.first_kept[span.segment] + span.begin / kKeptTokens) * row_size + at;
  }
  const int b_place = warp / groups.b_warps * kSlotWords + lane * 4;
  const int c_place = (groups.b_slots + warp / groups.c_warps) * kSlotWords + lane * 4;
  float step_sum = 0.0F;
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int tile = 0; tile < tiles; ++tile) {
    if (kept != nullptr) {
      store_n<4>(kept + tile * row_size, h);
    }
    const float* steps = buffers.steps(tile) + warp * kStepWarp + g * 4;
    const float* b_rows = buffers.rows(tile) + b_place;
    const float* c_rows = buffers.rows(tile) + c_place;
    float* parts = buffers.parts(tile) + warp * kPartWarp + g * 4 + lane;
    const int end = min(tokens - tile * kTileTokens, kTileTokens);
    wait_at(kFilled + tile % 2);
    for (int group = 0; group < end; group += 8) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float step[4];  // (step, step u) of two tokens
        load_n<4>(steps + (group + j) / 2 * kStepPair, step);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int token = group + j + k;
          float b[4];
          float c[4];
          load_n<4>(b_rows + token * kTileStates, b);
          if constexpr (!kLocal) {
            load_n<4>(c_rows + token * kTileStates, c);
          }
          float y = 0.0F;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            h[n] = fmaf(fast_exp2(step[2 * k] * rate[n]), h[n], step[2 * k + 1] * b[n]);
            if constexpr (!kLocal) {
              y = fmaf(c[n], h[n], y);
            }
          }
          if constexpr (kLocal) {
            step_sum += step[2 * k];
          } else {
            parts[token * kPartToken] = y;
          }
        }
      }
    }
    pass(kScanned + tile % 2);
  }
  if constexpr (kLocal) {
    store_n<4>(carry + index * row_size + at, h);
    if (lane == 0) {
      step_sums[index * a.channels + channel] = step_sum;
    }
  } else if (span.last && a.state != nullptr) {
    store_n<4>(a.state_of(span.segment) + at, h);
  }
}

}  // namespace

bool scan_by_tiles(const SelectiveScan<bf16>& host, const DeviceSegments& segments,
                   unsigned lengths, const Launch& on) {
  SelectiveScan<bf16> a = host;
  a.segments = segments.walk;
  if (!fits_tiles(a)) {
    return false;
  }
  const TileGroups groups = tile_groups(a);
  const int64_t span =
      on.batch_invariant ? kWholeSegments : span_tokens(segments, groups.channel_blocks, kSlots);
  ScanSpans spans{.count = a.segments.count, .tokens = span};
  std::shared_ptr<const ScanPlan> plan;
  if (a.kept != nullptr || span != kWholeSegments) {
    plan = scan_plan(host.segments, span, on);
    spans = plan->spans;
  }
  spans.lengths = lengths;
  const auto blocks = static_cast<unsigned>(spans.count * groups.channel_blocks);
  const auto bytes = [](int slots) { return 2 * sizeof(float) * buffer_words(slots); };
  float* carry = nullptr;
  if (plan != nullptr && plan->cut) {
    carry = scratch<float>(on, spans.count * a.channels * a.states);
    float* step_sums = scratch<float>(on, spans.count * a.channels);
    launch(on, "selective_scan", scan_tiles<true, kMaxSlots / 4>, blocks, kTileThreads,
           bytes(groups.b_slots), a, spans, groups, carry, step_sums);
    carry_over_spans(a, spans, carry, step_sums, false, on);
  }
  const int slots = groups.b_slots + groups.c_slots;
  launch(
      on, "selective_scan",
      slots <= kMaxSlots / 2 ? scan_tiles<false, kMaxSlots / 4> : scan_tiles<false, kMaxSlots / 2>,
      blocks, kTileThreads, bytes(slots), a, spans, groups, carry, nullptr);
  return true;
}

}  // namespace cambium::cuda
