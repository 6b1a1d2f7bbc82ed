// The token of selective_scan_decode_cuda.cu with the convolution before it: four neighbouring
// threads share a channel of 16 states, for four sequences together; what is of a sequence and
// channel alone, its convolution too, is worked out by one of the four. States and weights are on
// their way before the kernel that makes x is done.
#include "ops/conv/conv_token.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/scan_step/scan_step_kernels.h"
#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kSequences = 4;
constexpr int kLanes = 4;  // of a channel
constexpr int kOwn = 4;    // states of a thread
constexpr int kChannels = kScanThreads / kLanes;

struct Cut {
  unsigned channel_blocks;
  unsigned b_channels, c_channels;  // that share B, C
  unsigned repeat;
  int taps;
  int early;  // whether states may be read before the kernel before is done
};

template <class T>
__global__ void __launch_bounds__(kScanThreads, 6) step_kernel(ScanStep<T> step, Cut cut) {
  using Math = ScanMath<T>;
  const SelectiveScan<T>& a = step.scan;
  const unsigned place =
      blockIdx.x % cut.channel_blocks * kChannels + static_cast<unsigned>(threadIdx.x) / kLanes;
  const bool real = place < static_cast<unsigned>(a.channels);
  const unsigned channel = real ? place : static_cast<unsigned>(a.channels) - 1;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto count = static_cast<unsigned>(a.segments.count);
  const unsigned first = blockIdx.x / cut.channel_blocks * kSequences;
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
  ConvChannel conv;
  conv.load_weights(step.conv_weight.data, step.conv_bias.data, cut.taps, channel);
  if (cut.early == 0) {
    await_inputs();
  }
  // Sequences are tokens: each has one. A lane past the last reads that and writes nothing.
  const unsigned own = first + static_cast<unsigned>(lane);
  const unsigned mine = min(own, count - 1);
  const bool taken = real && own < count;
  const int64_t slot = a.segments.row(mine);
  const bool continues = own < count && a.segments.continues(mine);
  float* inputs = step.conv + slot * a.channels * (cut.taps - 1);
  conv.load_past(inputs, cut.taps, channel, continues);
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
  if (cut.early != 0) {
    await_inputs();
  }
  const unsigned b_offset = channel / cut.b_channels * 16 + lane * kOwn;
  const unsigned c_offset = channel / cut.c_channels * 16 + lane * kOwn;
  Packed<kOwn, T> b[kSequences];
  Packed<kOwn, T> c[kSequences];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    const unsigned t = min(first + k, count - 1);
    b[k] = *reinterpret_cast<const Packed<kOwn, T>*>(a.b.at(t, b_offset));
    c[k] = *reinterpret_cast<const Packed<kOwn, T>*>(a.c.at(t, c_offset));
  }
  const float x = load(step.x.at(mine, channel / 16 / cut.repeat * 16 + channel % 16));
  const float z = load(a.z.at(mine, channel));
  const float size = Math::softplus(load(a.dt.at(mine, channel)) + bias);
  const float u = conv.activated<T>(x);
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
    if (real && first + k < count) {
      store_once(state[k], policy, h[k]);
    }
  }
  sum_and_deal<kLanes, 1>(y, lane);
  if (taken) {
    store(a.y.at(mine, channel), fmaf(skip, u, y[0]) * scan_gate(a, z, Math::gate(z)));
    conv.leave_past(inputs, cut.taps, channel, x);
  }
}

template <class T>
void run_step(const ScanStep<T>& args, const Launch& on) {
  if (args.scan.segments.count == 0) {
    return;
  }
  const DeviceSegments segments = on_device(args.scan.segments, on);
  ScanStep<T> a = args;
  a.scan.segments = segments.walk;
  const Cut cut{static_cast<unsigned>(ceil_div(a.scan.channels, kChannels)),
                static_cast<unsigned>(a.scan.channels / a.scan.b_groups),
                static_cast<unsigned>(a.scan.channels / a.scan.c_groups),
                static_cast<unsigned>(a.repeat),
                static_cast<int>(a.taps()),
                on.recorder != nullptr ? 1 : 0};
  launch_ahead(
      on, "scan_step", step_kernel<T>,
      static_cast<unsigned>(ceil_div(args.scan.segments.count, kSequences)) * cut.channel_blocks,
      kScanThreads, 0, a, cut);
}

}  // namespace

void scan_step_forward(const ScanStep<float>& a, const Launch& on) {
  run_step(a, on);
}
void scan_step_forward(const ScanStep<bf16>& a, const Launch& on) {
  run_step(a, on);
}

}  // namespace cambium::cuda
