// The scan's step of one token for each of many sequences, the loop of generation: nearly all bytes
// are those of the states, read and written once. Nobody reads them again before the next step, and
// so they are the first to leave the L2.
//
// Four neighbouring threads share a channel of 16 states, so that a warp reads 512 bytes of a state
// at once, for kSequences sequences together: as many reads are on their way as the memory needs,
// and rates are worked out once for all of them. What is of a sequence and channel alone is worked
// out by one of the four threads, for its sequence.
#include "ops/cuda_bulk.cuh"
#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kSequences = 4;
constexpr int kLanes = 4;  // of a channel
constexpr int kOwn = 4;    // states of a thread
constexpr int kChannels = kScanThreads / kLanes;

struct Step {
  unsigned channel_blocks;
  unsigned b_channels, c_channels;  // that share B, C
};

/// kAmong: segments of other lengths are among those of one token, and left out.
template <class T, bool kAmong>
__global__ void __launch_bounds__(kScanThreads, 6) scan_step(SelectiveScan<T> a, Step step) {
  using Math = ScanMath<T>;
  const unsigned place =
      blockIdx.x % step.channel_blocks * kChannels + static_cast<unsigned>(threadIdx.x) / kLanes;
  const bool real = place < static_cast<unsigned>(a.channels);
  const unsigned channel = real ? place : static_cast<unsigned>(a.channels) - 1;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto count = static_cast<unsigned>(a.segments.count);
  const unsigned first = blockIdx.x / step.channel_blocks * kSequences;
  const int64_t at = static_cast<int64_t>(channel) * 16 + lane * kOwn;  // in a slot
  const uint64_t policy = first_to_leave();
  float rate[kOwn];
  load_n<kOwn>(a.a_log.data + at, rate);
#pragma unroll
  for (float& of_state : rate) {
    of_state = Math::rate(of_state);
  }
  const float bias = a.dt_bias.data[channel];
  const float skip = a.d.data[channel];
  await_inputs();
  // Alone, sequences are tokens: each has one. What is left out reads some token and writes
  // nothing.
  const unsigned own = first + static_cast<unsigned>(lane);
  const unsigned mine = min(own, count - 1);
  const bool taken = own < count && (!kAmong || a.segments.length(mine) == 1);
  const unsigned token = !kAmong ? mine
                         : taken ? static_cast<unsigned>(a.segments.begin(mine))
                                 : 0U;
  const int64_t slot = a.segments.row(mine);
  const bool continues = taken && a.segments.continues(mine);
  float h[kSequences][kOwn] = {};
  float* state[kSequences];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    const int64_t row = __shfl_sync(kAllLanes, slot, k, kLanes);
    const bool read = __shfl_sync(kAllLanes, static_cast<int>(continues), k, kLanes) != 0;
    state[k] = a.state + row * a.channels * 16 + at;
    if (read) {
      load_once(state[k], policy, h[k]);
    }
  }
  const unsigned b_offset = channel / step.b_channels * 16 + lane * kOwn;
  const unsigned c_offset = channel / step.c_channels * 16 + lane * kOwn;
  Packed<kOwn, T> b[kSequences];
  Packed<kOwn, T> c[kSequences];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    const unsigned t =
        kAmong ? __shfl_sync(kAllLanes, token, k, kLanes) : min(first + k, count - 1);
    b[k] = *reinterpret_cast<const Packed<kOwn, T>*>(a.b.at(t, b_offset));
    c[k] = *reinterpret_cast<const Packed<kOwn, T>*>(a.c.at(t, c_offset));
  }
  const float u = load(a.u.at(token, channel));
  const float z = load(a.z.at(token, channel));
  const float size = Math::softplus(load(a.dt.at(token, channel)) + bias);
  const float written = size * u;
  float y[kSequences];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    const float token_size = __shfl_sync(kAllLanes, size, k, kLanes);
    const float token_written = __shfl_sync(kAllLanes, written, k, kLanes);
    y[k] = 0.0F;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      h[k][n] =
          fmaf(Math::decay(token_size * rate[n]), h[k][n], token_written * load(&b[k].value[n]));
      y[k] = fmaf(load(&c[k].value[n]), h[k][n], y[k]);
    }
    const bool wanted = kAmong ? __shfl_sync(kAllLanes, static_cast<int>(taken), k, kLanes) != 0
                               : first + k < count;
    if (a.state != nullptr && real && wanted) {
      store_once(state[k], policy, h[k]);
    }
  }
  sum_and_deal<kLanes, 1>(y, lane);
  if (real && taken) {
    store(a.y.at(token, channel), fmaf(skip, u, y[0]) * scan_gate(a, z, Math::gate(z)));
  }
}

template <class T>
bool step_if_fits(const SelectiveScan<T>& a, const DeviceSegments& segments, const Launch& on) {
  const auto fits = [](const View<T>& v) {
    return aligned(v.data, kOwn * sizeof(T)) && v.rows.outer_stride % kOwn == 0;
  };
  const bool alone = segments.longest == 1 && segments.tokens == a.segments.count;
  if (a.states != 16 || (!alone && !on.batch_invariant) || a.kept != nullptr || !fits(a.b) ||
      !fits(a.c) || !aligned(a.a_log.data) || !aligned(a.state)) {
    return false;
  }
  const auto channel_blocks = static_cast<unsigned>(ceil_div(a.channels, kChannels));
  const Step step{channel_blocks, static_cast<unsigned>(a.channels / a.b_groups),
                  static_cast<unsigned>(a.channels / a.c_groups)};
  launch_ahead(on, "selective_scan", on.batch_invariant ? scan_step<T, true> : scan_step<T, false>,
               static_cast<unsigned>(ceil_div(a.segments.count, kSequences)) * channel_blocks,
               kScanThreads, 0, a, step);
  return true;
}

}  // namespace

bool scan_decode(const SelectiveScan<float>& a, const DeviceSegments& segments, const Launch& on) {
  return step_if_fits(a, segments, on);
}
bool scan_decode(const SelectiveScan<bf16>& a, const DeviceSegments& segments, const Launch& on) {
  return step_if_fits(a, segments, on);
}

}  // namespace cambium::cuda
