// One token of a recurrent mixer with more heads than a device holds states of at once. There a
// state that waits for anything leaves memory idle: the recurrence's own kernel, which does nothing
// but read a state and write it, takes two thirds of the time of one that convolves first and norms
// after, whose blocks moreover begin and end in clusters. So the small things go before in one
// kernel, where each head of q, k and v is convolved once, and after.
#include "ops/conv/conv_token.cuh"
#include "ops/norm/norm_kernels.h"
#include "ops/recurrence/recurrence_kernels.h"
#include "ops/recurrent_step/recurrent_step_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kHeadsAtOnce = 2 * 132;  // on an H100

/// What the recurrence takes.
template <class T>
struct StepParts {
  T *q, *k;          // (T, H, K)
  T* v;              // (T, H, V)
  float* log_decay;  // (T, H) or (T, H K)
  float* weight;     // (T, H)
};

/// A block for a head of q, k or v of a token, or for 128 of its gates.
template <class T>
__global__ void __launch_bounds__(kMostStepDim)
    prepare_step(RecurrentStep<T> a, StepParts<T> to, int taps, bool early) {
  __shared__ float raw[kMostStepDim];
  __shared__ float squares[kMostStepDim / 32];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t decays = a.decay.channels;
  const int64_t convolved = a.q_heads + a.k_heads + a.v_heads;
  const int64_t units = convolved + (decays + kMostStepDim - 1) / kMostStepDim;
  const int64_t t = blockIdx.x / units;  // the segment and its token
  const int64_t unit = blockIdx.x % units;
  if (unit >= convolved) {
    await_inputs();
    const int64_t i = (unit - convolved) * kMostStepDim + thread;
    if (i < decays) {
      const int64_t h = decays == a.heads ? i : i / a.key_dim;
      const float x = load(a.decay.at(t, i)) + a.dt_bias.data[i];
      to.log_decay[t * decays + i] = log_decay_of(a, expf(a.a_log.data[h]), x);
      if (!a.weight.defined()) {
        to.weight[t * a.heads + i] = softplus(x);
      }
    }
    if (a.weight.defined() && i < a.heads) {
      to.weight[t * a.heads + i] = a.strongest * sigmoid_of<T>(load(a.weight.at(t, i)));
    }
    return;
  }
  const bool of_q = unit < a.q_heads;
  const bool of_v = unit >= a.q_heads + a.k_heads;
  const int64_t head = of_q ? unit : of_v ? unit - a.q_heads - a.k_heads : unit - a.q_heads;
  const int64_t sharing = a.heads / (of_q ? a.q_heads : of_v ? a.v_heads : a.k_heads);
  const int64_t width = of_v ? a.dim : a.key_dim;
  const int64_t channel = (of_q ? a.q_from : of_v ? a.v_from : a.k_from) + head * width + thread;
  const bool exists = thread < width;
  if (!early) {
    await_inputs();
  }
  float* conv = a.conv_of(t);
  ConvChannel own{};
  if (exists) {
    own.load_weights(a.conv_weight.data, a.conv_bias.data, taps, channel);
    own.load_past(conv, taps, channel, a.segments.position[t] > 0);
  }
  const int half = static_cast<int>(a.half);
  const bool turns = !of_v && thread < 2 * half;
  float cos = 1.0F;
  float sin = 0.0F;
  if (turns) {
    const int64_t pair = t * half + pair_of(thread, half, a.interleaved);
    cos = a.cos[pair];
    sin = a.sin[pair];
  }
  if (early) {
    await_inputs();
  }
  const float x = exists ? load(a.x.at(t, channel)) : 0.0F;
  float y = exists ? own.activated<T>(x) : 0.0F;
  if (exists) {
    own.leave_past(conv, taps, channel, x);
  }
  if (!of_v) {
    raw[thread] = y;
    const float square = warp_sum(y * y);
    if (thread % 32 == 0) {
      squares[thread / 32] = square;
    }
    __syncthreads();
    float of_length = 0.0F;
#pragma unroll
    for (const float part : squares) {
      of_length += part;
    }
    const float factor =
        a.unit_eps > 0.0F ? (of_q ? a.q_scale : 1.0F) * rsqrtf(of_length + a.unit_eps) : 1.0F;
    y = factor * (turns ? turned(raw, thread, half, a.interleaved, cos, sin) : y);
  }
  if (exists) {
    T* out = (of_q ? to.q : of_v ? to.v : to.k) + (t * a.heads + head * sharing) * width + thread;
    for (int64_t i = 0; i < sharing; ++i) {
      store(out + i * width, y);
    }
  }
}

}  // namespace

template <class T>
bool has_many_heads(const RecurrentStep<T>& a) {
  return a.segments.count * a.heads > kHeadsAtOnce && a.key_dim == kMostStepDim &&
         a.dim == kMostStepDim && a.norm.defined();
}

template <class T>
void run_many_heads(const RecurrentStep<T>& args, const Launch& on) {
  RecurrentStep<T> a = args;
  a.segments = on_device(args.segments, on).walk;
  const int64_t tokens = args.segments.count;
  const int64_t decays = a.decay.channels;
  const auto heads_of = [&](T* data, int64_t width) {
    return View<T>{data, nullptr, {tokens, a.heads, a.heads * width, width}, width};
  };
  const auto gates_of = [&](float* data, int64_t width) {
    return View<Sum<T>>{data, nullptr, {tokens, 1, width, width}, width};
  };
  const StepParts<T> to{.q = scratch<T>(on, tokens * a.heads * a.key_dim),
                        .k = scratch<T>(on, tokens * a.heads * a.key_dim),
                        .v = scratch<T>(on, tokens * a.heads * a.dim),
                        .log_decay = scratch<float>(on, tokens * decays),
                        .weight = scratch<float>(on, tokens * a.heads)};
  const View<T> y = heads_of(scratch<T>(on, tokens * a.heads * a.dim), a.dim);
  const int64_t units = a.q_heads + a.k_heads + a.v_heads + ceil_div(decays, kMostStepDim);
  launch_ahead(on, "recurrent_step", prepare_step<T>, static_cast<unsigned>(tokens * units),
               kMostStepDim, 0, a, to, static_cast<int>(a.taps()), on.recorder != nullptr);
  recurrence_forward(Recurrence<T>{.segments = args.segments,
                                   .key_heads = a.heads,
                                   .heads = a.heads,
                                   .key_dim = a.key_dim,
                                   .dim = a.dim,
                                   .decay_per_channel = decays != a.heads,
                                   .delta = a.delta,
                                   .q = heads_of(to.q, a.key_dim),
                                   .k = heads_of(to.k, a.key_dim),
                                   .v = heads_of(to.v, a.dim),
                                   .log_decay = gates_of(to.log_decay, decays),
                                   .weight = gates_of(to.weight, a.heads),
                                   .skip = a.skip,
                                   .state = a.state,
                                   .y = y,
                                   .kept = nullptr},
                     on);
  gated_norm_forward(
      GatedNorm<T>{
          .x = y,
          .gate = {a.z.data, nullptr, {tokens, a.heads, a.z.rows.outer_stride, a.dim}, a.dim},
          .weight = a.norm,
          .y = heads_of(a.y.data, a.dim),
          .groups = a.heads,
          .weight_step = a.norm_step,
          .gate_first = a.gate_first,
          .sigmoid = a.sigmoid,
          .eps = a.norm_eps,
          .rstd = nullptr},
      on);
}

template bool has_many_heads(const RecurrentStep<float>&);
template bool has_many_heads(const RecurrentStep<bf16>&);
template void run_many_heads(const RecurrentStep<float>&, const Launch&);
template void run_many_heads(const RecurrentStep<bf16>&, const Launch&);

}  // namespace cambium::cuda
