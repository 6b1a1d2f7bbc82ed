// The scan backward. With dh_t = dL/dh_t, of later tokens and this one, a thread walks back over
// the tokens of a span:
//
//   dh_t = dy_t C_t + decay_{t+1} dh_{t+1}     dC_t += dy_t h_t     dB_t += dh_t step_t u_t
//
// The states are computed again, kKeptTokens from a kept one: first those at the starts of groups
// of kTokens, which wait in shared memory, then from the last group to the first those within, in
// registers. A warp takes channels that share B and C, so that their gradients are sums over the
// warp; where more warps share them, parts (T, warps, N) are summed in order by a second kernel.
// Where segments alone do not fill the GPU they are cut into spans as forward, the gradients of
// states carried from the last span to the first.
//
// A block's unit of work is a few neighbouring spans; it leaves one part of the gradients of
// weights.
#include <algorithm>
#include <numeric>

#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kTokens = 4;
constexpr int kGroups = static_cast<int>(kKeptTokens) / kTokens;
constexpr int kWarps = kScanThreads / 32;
constexpr int64_t kSlots = 132 * 12;  // warps of this kernel that a large GPU holds

/// What a kernel gets beside the arguments of the operation.
struct Work {
  ScanSpans spans;
  int64_t units;
  // A warp takes up to 32 / kLanes channels of `shared`, which have their B and C in common.
  int64_t shared;
  int64_t warps_of_shared;
  int64_t warps;
  const float* carry;  // (spans, d, N): the gradients of the states after the spans; or null: zero
  float* db;           // (T, warps, N) parts; null: straight into the gradient, where wanted
  float* dc;
  float* da_log;    // (units, d, N)
  float* dd;        // (units, d)
  float* ddt_bias;  // (units, d)
  bool distinct;    // u, dt and z have gradients apart from each other
};

/// From the last token of a span to its first: the gradient that its tokens give to the state
/// before it (into carry), and the sum of its steps. The first span of a segment has no use for it.
template <class T, int kStates, int kLanes, bool kFull>
__global__ void __launch_bounds__(kScanThreads, 4)
    scan_local_backward(SelectiveScan<T> a, ScanSpans spans, int64_t channel_blocks, float* carry,
                        float* step_sums) {
  using Tokens = Deal<kTokens, kLanes>;
  using Math = ScanMath<T>;
  const int64_t index = blockIdx.x / channel_blocks;
  const ScanSpan span(a.segments, spans, index);
  if (span.begin == 0) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t place = (blockIdx.x % channel_blocks * kScanThreads + threadIdx.x) / kLanes;
  const bool real = place < a.channels;
  const int64_t channel = real ? place : a.channels - 1;
  const int64_t state = static_cast<int64_t>(lane) * kStates;
  const float bias = a.dt_bias.data[channel];
  const int64_t c_offset = a.c_offset(channel);
  float rate[kStates];
  load_rates<kStates, kFull>(a, channel, state, rate);
  float dh[kStates] = {};
  float step_sum = 0.0F;
  const int64_t first = a.segments.begin(span.segment);
  for (int64_t i = span.begin + (span.end - span.begin - 1) / kTokens * kTokens; i >= span.begin;
       i -= kTokens) {
    float step[Tokens::kOwn];
    float dy[Tokens::kOwn];
#pragma unroll
    for (int k = 0; k < Tokens::kOwn; ++k) {
      const int64_t token = i + Tokens::first(lane) + k;
      const int64_t t = first + min(token, span.end - 1);
      const float z = load(a.z.at(t, channel));
      const bool some = token < span.end;
      step[k] = some ? Math::softplus(load(a.dt.at(t, channel)) + bias) : 0.0F;
      dy[k] = some ? load(a.y.grad_at(t, channel)) * scan_gate(a, z, Math::gate(z)) : 0.0F;
      step_sum += Tokens::leads(lane) ? step[k] : 0.0F;
    }
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      const float token_step = Tokens::of(step, j);
      const float token_dy = Tokens::of(dy, j);
      float c[kStates];
      load_states<kStates, kFull>(a.c.at(first + min(i + j, span.end - 1), c_offset), state,
                                  a.states, c);
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        dh[n] = Math::decay(token_step * rate[n]) * fmaf(token_dy, c[n], dh[n]);
      }
    }
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    step_sum += __shfl_xor_sync(kAllLanes, step_sum, lanes);
  }
  if (real) {
    store_states<kStates, kFull>(carry + (index * a.channels + channel) * a.states, state, a.states,
                                 dh);
    if (lane == 0) {
      step_sums[index * a.channels + channel] = step_sum;
    }
  }
}

/// The gradient of B or C of kHeld states at the tokens of a group, as its threads hold them.
template <class T, int kHeld>
__device__ __forceinline__ void add_to_rows(const View<T>& to, int64_t offset, int64_t first,
                                            int64_t count, int64_t n,
                                            const float (&sums)[kTokens][kHeld]) {
  float old[kTokens][kHeld];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      old[j][k] = j < count && k < n ? load(to.grad_at(first + j, offset + k)) : 0.0F;
    }
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (j < count && k < n) {
        store(to.grad_at(first + j, offset + k), old[j][k] + sums[j][k]);
      }
    }
  }
}

template <class T, int kStates, int kLanes, bool kFull>
__global__ void __launch_bounds__(kScanThreads, 3) scan_backward(SelectiveScan<T> a, Work work) {
  using Tokens = Deal<kTokens, kLanes>;
  using Math = ScanMath<T>;
  constexpr int kOwn = Tokens::kOwn;
  constexpr int kChannels = 32 / kLanes;
  constexpr int kHeld = 2 * kStates > kChannels ? 2 * kStates / kChannels : 1;
  // (kGroups, kStates, kScanThreads): the states before groups of tokens, each thread its own.
  extern __shared__ float starts[];
  const int64_t warp_blocks = ceil_div(work.warps, kWarps);
  const int64_t unit = blockIdx.x / warp_blocks;
  const int64_t warp = blockIdx.x % warp_blocks * kWarps + threadIdx.x / 32;
  if (warp >= work.warps) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int place = static_cast<int>(threadIdx.x) % 32 / kLanes;
  const int64_t within = warp % work.warps_of_shared * kChannels;
  const bool real = within + place < work.shared;
  const int64_t first_channel = warp / work.warps_of_shared * work.shared + within;
  const int64_t channel = real ? first_channel + place : first_channel;
  const int64_t state = static_cast<int64_t>(lane) * kStates;
  const int64_t row_size = a.channels * a.states;
  const int64_t row = channel * a.states;
  const float bias = a.dt_bias.data[channel];
  const float skip = a.d.data[channel];
  const int64_t b_offset = a.b_offset(channel);
  const int64_t c_offset = a.c_offset(channel);
  // Which sums over the warp this thread gets: kHeld of those of B and then C.
  const int held = place * 2 * kStates / kChannels;
  const bool holds_c = held >= kStates;
  const int64_t held_state = state + held % kStates;
  const int64_t held_count =
      place * 2 * kStates % kChannels == 0 ? max(a.states - held_state, int64_t{0}) : 0;
  float* const parts = holds_c ? work.dc : work.db;
  const View<T>& straight = holds_c ? a.c : a.b;
  const int64_t straight_offset = (holds_c ? c_offset : b_offset) + held_state;

  float rate[kStates];
  load_rates<kStates, kFull>(a, channel, state, rate);
  float da[kStates] = {};
  float dd = 0.0F;
  float dbias = 0.0F;
  const auto start_of = [&](int group, int n) -> float& {
    return starts[(group * kStates + n) * kScanThreads + static_cast<int>(threadIdx.x)];
  };

  const int64_t spans_end = (unit + 1) * work.spans.count / work.units;
  for (int64_t index = unit * work.spans.count / work.units; index < spans_end; ++index) {
    const ScanSpan span(a.segments, work.spans, index);
    const int64_t first = a.segments.begin(span.segment);
    const float* kept =
        static_cast<const float*>(a.kept) + work.spans.first_kept[span.segment] * row_size + row;
    float dh[kStates] = {};
    if (work.carry != nullptr && real) {
      load_states<kStates, kFull>(work.carry + index * row_size + row, state, a.states, dh);
    }
    for (int64_t chunk = (span.end - 1) / kKeptTokens * kKeptTokens;
         chunk >= span.begin && span.end > span.begin; chunk -= kKeptTokens) {
      const int64_t end = min(chunk + kKeptTokens, span.end);
      const int groups = static_cast<int>(ceil_div(end - chunk, kTokens));
      float h[kStates];
      load_states<kStates, kFull>(kept + chunk / kKeptTokens * row_size, state, a.states, h);
      for (int group = 0; group < groups; ++group) {
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          start_of(group, n) = h[n];
        }
        if (group + 1 == groups) {
          break;
        }
        const int64_t i = first + chunk + static_cast<int64_t>(group) * kTokens;
        float step[kOwn];
        float written[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const int64_t t = i + Tokens::first(lane) + k;
          step[k] = Math::softplus(load(a.dt.at(t, channel)) + bias);
          written[k] = step[k] * load(a.u.at(t, channel));
        }
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const float token_step = Tokens::of(step, j);
          const float token_written = Tokens::of(written, j);
          float b[kStates];
          load_states<kStates, kFull>(a.b.at(i + j, b_offset), state, a.states, b);
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            h[n] = fmaf(Math::decay(token_step * rate[n]), h[n], token_written * b[n]);
          }
        }
      }

      for (int group = groups - 1; group >= 0; --group) {
        const int64_t i = chunk + static_cast<int64_t>(group) * kTokens;
        float u[kOwn];
        float raw[kOwn];
        float step[kOwn];
        float written[kOwn];
        float z[kOwn];
        float gate[kOwn];
        float dout[kOwn];
        float dy[kOwn];
        float old_u[kOwn] = {};
        float old_dt[kOwn] = {};
        float old_z[kOwn] = {};
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const int64_t token = i + Tokens::first(lane) + k;
          const bool some = token < end;
          const int64_t t = first + min(token, end - 1);
          u[k] = load(a.u.at(t, channel));
          raw[k] = load(a.dt.at(t, channel)) + bias;
          z[k] = load(a.z.at(t, channel));
          dout[k] = some && real ? load(a.y.grad_at(t, channel)) : 0.0F;
          if (work.distinct) {
            old_u[k] = a.u.grad == nullptr ? 0.0F : load(a.u.grad_at(t, channel));
            old_dt[k] = a.dt.grad == nullptr ? 0.0F : load(a.dt.grad_at(t, channel));
            old_z[k] = a.z.grad == nullptr ? 0.0F : load(a.z.grad_at(t, channel));
          }
          step[k] = some ? Math::softplus(raw[k]) : 0.0F;
          written[k] = step[k] * u[k];
          gate[k] = Math::gate(z[k]);
          dy[k] = dout[k] * scan_gate(a, z[k], gate[k]);
        }
        float before[kTokens][kStates];
        float decay[kTokens][kStates];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          h[n] = start_of(group, n);
        }
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const int64_t t = first + min(i + j, end - 1);
          const float token_step = Tokens::of(step, j);
          const float token_written = Tokens::of(written, j);
          float b[kStates];
          load_states<kStates, kFull>(a.b.at(t, b_offset), state, a.states, b);
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            before[j][n] = h[n];
            decay[j][n] = Math::decay(token_step * rate[n]);
            h[n] = fmaf(decay[j][n], h[n], token_written * b[n]);
          }
        }
        // A fence for the compiler: B and the first state are loaded again below, from the L1 and
        // shared memory, rather than held in registers.
        __syncwarp();
        float y[kTokens];      // sum_n C h
        float read[kTokens];   // sum_n dh B
        float drate[kTokens];  // sum_n dh decay h_{t-1} A
        float sums[kTokens][kHeld];
#pragma unroll
        for (int j = kTokens - 1; j >= 0; --j) {
          const int64_t t = first + min(i + j, end - 1);
          const float token_step = Tokens::of(step, j);
          const float token_written = Tokens::of(written, j);
          const float token_dy = Tokens::of(dy, j);
          float b[kStates];
          float c[kStates];
          load_states<kStates, kFull>(a.b.at(t, b_offset), state, a.states, b);
          load_states<kStates, kFull>(a.c.at(t, c_offset), state, a.states, c);
          y[j] = 0.0F;
          read[j] = 0.0F;
          drate[j] = 0.0F;
          float of_row[2 * kStates];
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            y[j] = fmaf(c[n], h[n], y[j]);
            of_row[kStates + n] = token_dy * h[n];
            dh[n] = fmaf(token_dy, c[n], dh[n]);
            of_row[n] = dh[n] * token_written;
            read[j] = fmaf(dh[n], b[n], read[j]);
            dh[n] *= decay[j][n];
            const float last = j == 0 ? start_of(group, n) : before[j][n];
            const float change = dh[n] * last;
            drate[j] = fmaf(change, rate[n], drate[j]);
            da[n] = fmaf(change, token_step, da[n]);
            h[n] = last;
          }
          sum_and_deal<kChannels, kLanes>(of_row, place);
#pragma unroll
          for (int k = 0; k < kHeld; ++k) {
            sums[j][k] = of_row[k];
          }
        }
        const int64_t count = min(end - i, static_cast<int64_t>(kTokens));
        if (parts != nullptr) {
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
#pragma unroll
            for (int k = 0; k < kHeld; ++k) {
              if (j < count && k < held_count) {
                parts[((first + i + j) * work.warps + warp) * a.states + held_state + k] =
                    sums[j][k];
              }
            }
          }
        } else if (straight.grad != nullptr) {
          add_to_rows(straight, straight_offset, first + i, count, held_count, sums);
        }

        sum_and_deal<kLanes, 1>(y, lane);
        sum_and_deal<kLanes, 1>(read, lane);
        sum_and_deal<kLanes, 1>(drate, lane);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const int64_t token = i + Tokens::first(lane) + k;
          if (token >= end || !real || !Tokens::leads(lane)) {
            continue;
          }
          const int64_t t = first + token;
          const float slope = raw[k] > 20.0F ? 1.0F : Math::gate(raw[k]);
          const float du = fmaf(step[k], read[k], skip * dy[k]);
          const float ddt = fmaf(u[k], read[k], drate[k] * Math::kRateUnit) * slope;
          const float dz = dout[k] * fmaf(skip, u[k], y[k]) * scan_gate_slope(a, z[k], gate[k]);
          dd = fmaf(dy[k], u[k], dd);
          dbias += ddt;
          if (a.u.grad != nullptr) {
            T* to = a.u.grad_at(t, channel);
            store(to, (work.distinct ? old_u[k] : load(to)) + du);
          }
          if (a.dt.grad != nullptr) {
            T* to = a.dt.grad_at(t, channel);
            store(to, (work.distinct ? old_dt[k] : load(to)) + ddt);
          }
          if (a.z.grad != nullptr) {
            T* to = a.z.grad_at(t, channel);
            store(to, (work.distinct ? old_z[k] : load(to)) + dz);
          }
        }
      }
    }
  }

#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    dd += __shfl_xor_sync(kAllLanes, dd, lanes);
    dbias += __shfl_xor_sync(kAllLanes, dbias, lanes);
  }
  if (real) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      da[n] *= rate[n] * Math::kRateUnit;
    }
    store_states<kStates, kFull>(work.da_log + unit * row_size + row, state, a.states, da);
    if (lane == 0) {
      work.dd[unit * a.channels + channel] = dd;
      work.ddt_bias[unit * a.channels + channel] = dbias;
    }
  }
}

/// grad (T, groups, N) += the parts of the warps of a group, in order. An element a thread.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    add_parts(View<T> to, const float* parts, int64_t tokens, int64_t groups, int64_t states,
              int64_t warps_of_group) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  const int64_t n = index % states;
  const int64_t group = index / states % groups;
  const int64_t t = index / states / groups;
  if (t >= tokens) {
    return;
  }
  const float* part = parts + (t * groups + group) * warps_of_group * states + n;
  float sum = 0.0F;
#pragma unroll 4
  for (int64_t i = 0; i < warps_of_group; ++i) {
    sum += part[i * states];
  }
  add_to(to.grad_at(t, group * states + n), sum);
}

/// An element a thread.
__global__ void __launch_bounds__(kScanThreads)
    sum_units(float* grad, const float* parts, int64_t size, int64_t units) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (index >= size) {
    return;
  }
  float sum = 0.0F;
#pragma unroll 8
  for (int64_t i = 0; i < units; ++i) {
    sum += parts[i * size + index];
  }
  grad[index] += sum;
}

unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>(ceil_div(threads, kScanThreads));
}
/// The gradients of the states after spans; see carry_gradients.
template <class T, int kStates, int kLanes, bool kFull>
const float* carry_back(const SelectiveScan<T>& a, const ScanSpans& spans, const Launch& on) {
  float* carry = scratch<float>(on, spans.count * a.channels * a.states);
  float* step_sums = scratch<float>(on, spans.count * a.channels);
  const int64_t channel_blocks = ceil_div(a.channels * kLanes, kScanThreads);
  launch(on, "selective_scan_backward", scan_local_backward<T, kStates, kLanes, kFull>,
         static_cast<unsigned>(spans.count * channel_blocks), kScanThreads, 0, a, spans,
         channel_blocks, carry, step_sums);
  carry_over_spans(a, spans, carry, step_sums, true, on);
  return carry;
}

template <class T, int kStates, int kLanes, bool kFull>
void scan(const SelectiveScan<T>& host, const SelectiveScan<T>& a, const DeviceSegments& segments,
          const Launch& on) {
  constexpr int kChannels = 32 / kLanes;
  Work work{};
  const int64_t b_channels = a.channels / a.b_groups;
  const int64_t c_channels = a.channels / a.c_groups;
  work.shared = std::gcd(b_channels, c_channels);
  work.warps_of_shared = ceil_div(work.shared, kChannels);
  work.warps = a.channels / work.shared * work.warps_of_shared;
  const int64_t tokens = span_tokens(segments, work.warps, kSlots);
  const auto plan = scan_plan(host.segments, tokens, on);
  work.spans = plan->spans;
  // More units balance better; their parts of gradients take memory.
  work.units = std::min(work.spans.count, std::max<int64_t>(4 * kSlots / work.warps, 1));
  const int64_t row_size = a.channels * a.states;
  if (plan->cut) {
    work.carry = carry_back<T, kStates, kLanes, kFull>(a, work.spans, on);
  }
  work.distinct = gradients_apart<T>({a.u.grad, a.dt.grad, a.z.grad});
  // Straight into the gradient where one warp has all channels of a group.
  const bool apart = gradients_apart<T>({a.b.grad, a.c.grad, a.u.grad, a.dt.grad, a.z.grad});
  const int64_t b_warps = b_channels / work.shared * work.warps_of_shared;
  const int64_t c_warps = c_channels / work.shared * work.warps_of_shared;
  const int64_t parts = segments.tokens * work.warps * a.states;
  work.db = a.b.grad != nullptr && (b_warps > 1 || !apart) ? scratch<float>(on, parts) : nullptr;
  work.dc = a.c.grad != nullptr && (c_warps > 1 || !apart) ? scratch<float>(on, parts) : nullptr;
  work.da_log = scratch<float>(on, work.units * row_size);
  work.dd = scratch<float>(on, work.units * a.channels);
  work.ddt_bias = scratch<float>(on, work.units * a.channels);
  launch(on, "selective_scan_backward", scan_backward<T, kStates, kLanes, kFull>,
         static_cast<unsigned>(work.units * ceil_div(work.warps, kWarps)), kScanThreads,
         sizeof(float) * kGroups * kStates * kScanThreads, a, work);
  if (work.db != nullptr) {
    launch(on, "selective_scan_backward", add_parts<T>,
           blocks_of(segments.tokens * a.b_groups * a.states), kScanThreads, 0, a.b, work.db,
           segments.tokens, a.b_groups, a.states, b_warps);
  }
  if (work.dc != nullptr) {
    launch(on, "selective_scan_backward", add_parts<T>,
           blocks_of(segments.tokens * a.c_groups * a.states), kScanThreads, 0, a.c, work.dc,
           segments.tokens, a.c_groups, a.states, c_warps);
  }
  add_units(a.a_log.grad, work.da_log, row_size, work.units, on);
  add_units(a.d.grad, work.dd, a.channels, work.units, on);
  add_units(a.dt_bias.grad, work.ddt_bias, a.channels, work.units, on);
}

template <class T>
void run_backward(const SelectiveScan<T>& host, const Launch& on) {
  const DeviceSegments segments = on_device(host.segments, on);
  SelectiveScan<T> a = host;
  a.segments = segments.walk;
  if (segments.tokens == 0 || a.channels == 0 || a.states == 0) {
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (segments.longest > kFewTokens && scan_backward_by_tiles(host, segments, on)) {
      return;
    }
  }
  constexpr int64_t kWidth = 16 / sizeof(T);
  if (a.states == 16 && aligned(a.b.data) && aligned(a.c.data) && aligned(a.a_log.data) &&
      aligned(a.kept) && a.b.rows.outer_stride % kWidth == 0 &&
      a.c.rows.outer_stride % kWidth == 0) {
    scan<T, 8, 2, true>(host, a, segments, on);
  } else if (a.states <= 8) {
    scan<T, 8, 1, false>(host, a, segments, on);
  } else if (a.states <= 16) {
    scan<T, 8, 2, false>(host, a, segments, on);
  } else if (a.states <= 64) {
    scan<T, 8, 8, false>(host, a, segments, on);
  } else {
    check_launch("selective_scan_backward of more than 256 states a channel", {}, {}, 0,
                 a.states <= 256 ? cudaSuccess : cudaErrorInvalidValue);
    scan<T, 16, 16, false>(host, a, segments, on);
  }
}

}  // namespace

const float* carry_gradients(const SelectiveScan<bf16>& a, const ScanSpans& spans,
                             const Launch& on) {
  return carry_back<bf16, 8, 2, true>(a, spans, on);
}
void add_units(float* grad, const float* parts, int64_t size, int64_t units, const Launch& on) {
  if (grad != nullptr) {
    launch(on, "selective_scan_backward", sum_units, blocks_of(size), kScanThreads, 0, grad, parts,
           size, units);
  }
}

void selective_scan_backward(const SelectiveScan<float>& a, const Launch& on) {
  run_backward(a, on);
}
void selective_scan_backward(const SelectiveScan<bf16>& a, const Launch& on) {
  run_backward(a, on);
}

}  // namespace cambium::cuda
