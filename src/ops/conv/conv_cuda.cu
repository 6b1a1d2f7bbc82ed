// Three forms:
//   few tokens a segment (decoding): a thread takes a segment from its state to its state;
//   many: runs of tokens, then the states, which the runs may have read;
//   a number of taps without registers of its own: one element a thread.
// The kernels of the first two stand in conv_taps.cuh. All add the bias and the taps in the same
// order, so that any split of a sequence gives the same bits. Batch-invariant, the form of a
// segment is that for its own length even so.
#include <algorithm>

#include "ops/conv/conv_taps.cuh"

namespace cambium::cuda {
namespace {

using namespace conv;

constexpr int64_t kAnyRun = 256;

/// Adds the parts in the order of the tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_weight_gradients(ShortConv<T> a, const float* part, int64_t parts) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t rows = a.taps() + 1;
  if (index >= rows * a.channels()) {
    return;
  }
  const int64_t tap = index / a.channels();
  const int64_t c = index % a.channels();
  float* to = tap < a.taps() ? a.weight.grad == nullptr ? nullptr : a.weight.grad_row(c) + tap
              : a.bias.grad == nullptr ? nullptr
                                       : a.bias.grad + c;
  if (to == nullptr) {
    return;
  }
  float sum = 0.0F;
#pragma unroll 8
  for (int64_t p = 0; p < parts; ++p) {
    sum += part[p * rows * a.channels() + index];
  }
  *to += sum;
}

// --- Any number of taps.

/// Input of channel c, `back` tokens before token i of segment s; row `row` of `state` has those
/// before the segment.
template <class T>
__device__ __forceinline__ float input(const ShortConv<T>& a, const float* state, int64_t row,
                                       int64_t s, int64_t i, int64_t back, int64_t c) {
  if (back <= i) {
    return load(a.x.at(a.segments.begin(s) + i - back, c));
  }
  return a.segments.continues(s)
             ? state[(row * a.channels() + c) * (a.taps() - 1) + a.taps() - 1 - (back - i)]
             : 0.0F;
}
template <class T>
__device__ __forceinline__ float sum_of_taps(const ShortConv<T>& a, const float* state, int64_t row,
                                             int64_t s, int64_t i, int64_t c) {
  float sum = a.bias.defined() ? a.bias.data[c] : 0.0F;
  for (int64_t j = 0; j < a.taps(); ++j) {
    sum = fmaf(a.weight.row(c)[j], input(a, state, row, s, i, a.taps() - 1 - j, c), sum);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) any_forward(ShortConv<T> a, const int32_t* segment) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = index / a.channels();
  const int64_t c = index % a.channels();
  if (t < a.x.count()) {
    const int64_t s = segment[t];
    const float sum = sum_of_taps(a, a.state, a.segments.row(s), s, t - a.segments.begin(s), c);
    store(a.y.at(t, c), a.silu ? silu_of<T>(sum) : sum);
  }
}

/// dpre (T, C): the gradient before the activation.
template <class T>
__global__ void __launch_bounds__(kThreads)
    any_activation_backward(ShortConv<T> a, const int32_t* segment, float* dpre) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = index / a.channels();
  const int64_t c = index % a.channels();
  if (t < a.x.count()) {
    const int64_t s = segment[t];
    float d = load(a.y.grad_at(t, c));
    if (a.silu) {
      d *= silu_grad_of<T>(
          sum_of_taps(a, static_cast<const float*>(a.kept), s, s, t - a.segments.begin(s), c));
    }
    dpre[index] = d;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    any_input_backward(ShortConv<T> a, const int32_t* segment, const float* dpre) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = index / a.channels();
  const int64_t c = index % a.channels();
  if (t < a.x.count()) {
    const Place place(a.segments, segment[t]);
    const int64_t uses = min(place.end - t, a.taps());
    float sum = 0.0F;
    for (int64_t ahead = 0; ahead < uses; ++ahead) {
      sum = fmaf(a.weight.row(c)[a.taps() - 1 - ahead], dpre[index + ahead * a.channels()], sum);
    }
    add_to(a.x.grad_at(t, c), sum);
  }
}

/// A channel and kAnyRun tokens a thread; part as in runs_backward.
template <class T>
__global__ void __launch_bounds__(kThreads)
    any_weight_backward(ShortConv<T> a, const int32_t* segment, const float* dpre, float* part) {
  const int64_t channels = a.channels();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t run = index / channels;
  const int64_t c = index % channels;
  const int64_t begin = run * kAnyRun;
  const int64_t end = min(begin + kAnyRun, a.x.count());
  if (begin >= a.x.count()) {
    return;
  }
  const auto* initial = static_cast<const float*>(a.kept);
  for (int64_t tap = 0; tap <= a.taps(); ++tap) {
    Place place(a.segments, segment[begin]);
    float sum = 0.0F;
    for (int64_t t = begin; t < end; ++t) {
      if (t == place.end) {
        place.advance(a.segments);
      }
      const float x = tap == a.taps() ? 1.0F
                                      : input(a, initial, place.s, place.s, t - place.begin,
                                              a.taps() - 1 - tap, c);
      sum = fmaf(dpre[t * channels + c], x, sum);
    }
    part[(run * (a.taps() + 1) + tap) * channels + c] = sum;
  }
}

// --- States.

/// Keeps the states before the segments for the backward kernel.
template <class T>
__global__ void __launch_bounds__(kThreads) keep_states(ShortConv<T> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t s = index / a.state_size();
  if (s < a.segments.count && a.segments.continues(s)) {
    static_cast<float*>(a.kept)[index] =
        a.state[a.segments.row(s) * a.state_size() + index % a.state_size()];
  }
}

/// Leaves in the state the last K - 1 inputs of each sequence with at least `least` tokens here, at
/// least 1.
template <class T>
__global__ void __launch_bounds__(kThreads) leave_states(ShortConv<T> a, int64_t least) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t s = index / a.channels();
  const int64_t c = index % a.channels();
  if (s >= a.segments.count || a.segments.length(s) < least) {
    return;
  }
  const int64_t row = a.segments.row(s);
  // Column j is read from one that is not yet overwritten: inputs move to the left.
  for (int64_t j = 0; j < a.taps() - 1; ++j) {
    a.state[(row * a.channels() + c) * (a.taps() - 1) + j] =
        input(a, a.state, row, s, a.segments.length(s) - 1, a.taps() - 2 - j, c);
  }
}

// --- The host's side.

/// Whether V channels are one access everywhere.
template <class T>
bool in_packs(const ShortConv<T>& a, int64_t width) {
  const size_t bytes = sizeof(T) * static_cast<size_t>(width);
  return a.channels() % width == 0 && a.x.rows.outer_stride % width == 0 &&
         aligned(a.x.data, bytes) && aligned(a.x.grad, bytes) && aligned(a.y.data, bytes) &&
         aligned(a.y.grad, bytes) && aligned(a.weight.data, 16) && aligned(a.state, 16) &&
         aligned(a.kept, 16);
}

/// Calls f.operator()<V, kTaps>() for the widest of the widths and the taps; false where no kernel
/// has so many taps.
template <int V, class F>
bool with_taps(int64_t taps, const F& f) {
  switch (taps) {
    case 2:
      f.template operator()<V, 2>();
      return true;
    case 3:
      f.template operator()<V, 3>();
      return true;
    case 4:
      f.template operator()<V, 4>();
      return true;
    default:
      return false;
  }
}
template <int kWide, class T, class F>
bool pick_kernel(const ShortConv<T>& a, const F& f) {
  return in_packs(a, kWide) ? with_taps<kWide>(a.taps(), f) : with_taps<1>(a.taps(), f);
}

/// For one thread each.
unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>(ceil_div(threads, kThreads));
}

template <class T>
void run_forward(const ShortConv<T>& args, const Launch& on) {
  const DeviceSegments segments = on_device(args.segments, on);
  const bool continues = args.segments.any_continues();
  ShortConv<T> a = args;
  a.segments = segments.walk;
  if (segments.tokens == 0 || a.channels() == 0) {
    return;
  }
  const int64_t count = a.segments.count;
  const bool each = on.batch_invariant && a.kept == nullptr;
  int64_t least = 1;  // tokens of the segments that are left for runs
  if ((segments.longest <= kFewTokens || each) && pick_kernel<4>(a, [&]<int V, int kTaps>() {
        const int64_t columns = a.channels() / V;
        launch_ahead(on, "short_conv", few_tokens_forward<T, V, kTaps>, blocks_of(count * columns),
                     kThreads, 0, a, columns, kFewTokens);
      })) {
    if (segments.longest <= kFewTokens) {
      return;
    }
    least = kFewTokens + 1;
  }
  if (a.kept != nullptr && continues) {
    launch(on, "short_conv", keep_states<T>, blocks_of(count * a.state_size()), kThreads, 0, a);
  }
  const bool leaves = a.state != nullptr && !continues;
  const bool runs = pick_kernel<4>(a, [&]<int V, int kTaps>() {
    // Long runs read fewer inputs twice and wait less for their first, short ones fill the GPU.
    constexpr int64_t kWanted = 1 << 18;
    const int64_t run = std::clamp(segments.tokens * a.channels() / V / kWanted / kBatch * kBatch,
                                   kLeastRun, kMostRun);
    const int64_t channel_blocks = ceil_div(a.channels() / V, kThreads);
    launch(on, "short_conv", runs_forward<T, V, kTaps>,
           static_cast<unsigned>(ceil_div(segments.tokens, run) * channel_blocks), kThreads, 0, a,
           segments.segment, channel_blocks, run, least, leaves);
  });
  if (!runs) {
    launch(on, "short_conv", any_forward<T>, blocks_of(segments.tokens * a.channels()), kThreads, 0,
           a, segments.segment);
  }
  if (a.state != nullptr && a.taps() > 1 && !(runs && leaves)) {
    launch(on, "short_conv", leave_states<T>, blocks_of(count * a.channels()), kThreads, 0, a,
           least);
  }
}

template <class T>
void run_backward(const ShortConv<T>& args, const Launch& on) {
  const DeviceSegments segments = on_device(args.segments, on);
  ShortConv<T> a = args;
  a.segments = segments.walk;
  const int64_t tokens = segments.tokens;
  if (tokens == 0 || a.channels() == 0) {
    return;
  }
  const bool weights = a.weight.grad != nullptr || a.bias.grad != nullptr;
  const int64_t part_size = (a.taps() + 1) * a.channels();
  float* part = nullptr;
  int64_t parts = 0;
  const bool runs = pick_kernel<2>(a, [&]<int V, int kTaps>() {
    // Long runs read fewer inputs twice, short ones fill the GPU.
    constexpr int64_t kWanted = 1 << 17;
    const int64_t run =
        std::clamp<int64_t>(tokens * a.channels() / V / kWanted, kBatch, 8 * kBatch) / kBatch *
        kBatch;
    const int64_t channel_blocks = ceil_div(a.channels() / V, kColumns);
    parts = ceil_div(tokens, run * kRuns);
    part = weights ? scratch<float>(on, parts * part_size) : nullptr;
    launch(on, "short_conv_backward", runs_backward<T, V, kTaps>,
           static_cast<unsigned>(parts * channel_blocks), kColumns * kRuns, 0, a, segments.segment,
           channel_blocks, run, part);
  });
  if (!runs) {
    float* dpre = scratch<float>(on, tokens * a.channels());
    launch(on, "short_conv_backward", any_activation_backward<T>, blocks_of(tokens * a.channels()),
           kThreads, 0, a, segments.segment, dpre);
    if (a.x.grad != nullptr) {
      launch(on, "short_conv_backward", any_input_backward<T>, blocks_of(tokens * a.channels()),
             kThreads, 0, a, segments.segment, dpre);
    }
    if (weights) {
      parts = ceil_div(tokens, kAnyRun);
      part = scratch<float>(on, parts * part_size);
      launch(on, "short_conv_backward", any_weight_backward<T>, blocks_of(parts * a.channels()),
             kThreads, 0, a, segments.segment, dpre, part);
    }
  }
  if (weights) {
    launch(on, "short_conv_backward", add_weight_gradients<T>, blocks_of(part_size), kThreads, 0, a,
           part, parts);
  }
}

}  // namespace

int64_t short_conv_forward_keeps(const ShortConv<float>& a) {
  return initial_state_bytes<float>(a.segments, a.state_size());
}
int64_t short_conv_forward_keeps(const ShortConv<bf16>& a) {
  return initial_state_bytes<float>(a.segments, a.state_size());
}

void short_conv_forward(const ShortConv<float>& a, const Launch& on) {
  run_forward(a, on);
}
void short_conv_forward(const ShortConv<bf16>& a, const Launch& on) {
  run_forward(a, on);
}

void short_conv_backward(const ShortConv<float>& a, const Launch& on) {
  run_backward(a, on);
}
void short_conv_backward(const ShortConv<bf16>& a, const Launch& on) {
  run_backward(a, on);
}

}  // namespace cambium::cuda
