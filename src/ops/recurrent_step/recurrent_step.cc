#include "ops/recurrent_step/recurrent_step.h"

#include <cmath>
#include <numeric>

#include "ops/checks.h"
#include "ops/recurrent_step/recurrent_step_kernels.h"
#include "ops/recurrent_step/recurrent_step_ref.h"
#include "ops/run.h"
#include "ops/token_steps.h"

namespace cambium {
namespace {

constexpr const char* kName = "recurrent_step";
constexpr int64_t kMostDim = 128;
constexpr int64_t kMostTaps = 4;
constexpr int64_t kMostSharing = 8;  // heads

int64_t heads_of(const RecurrentStepInputs& in) {
  return in.a_log.dim(0);
}
int64_t dim_of(const RecurrentStepInputs& in) {
  return in.z.dim(1) / heads_of(in);
}

/// Neighbouring heads that are computed together, as they share heads of q, k or v.
int64_t sharing_heads(const RecurrentStepInputs& in) {
  const int64_t heads = heads_of(in);
  return std::lcm(std::lcm(heads / in.q_heads, heads / in.k_heads), heads / in.v_heads);
}

void check(const RecurrentStepInputs& in) {
  const Tensor& x = in.x;
  expect_rows(kName, "x", x, 2);
  expect(in.a_log.rank == 1 && in.z.rank == 2 && in.z.dim(1) % heads_of(in) == 0,
         "[{}] expected a_log (H) and z (T, H V), got {} and {}", kName, in.a_log, in.z);
  const int64_t heads = heads_of(in);
  expect_vector(kName, "a_log", in.a_log, heads, x);
  for (const int64_t part : {in.q_heads, in.k_heads, in.v_heads}) {
    expect(part > 0 && heads % part == 0,
           "[{}] expected heads of q, k and v that divide {}, got {}, {} and {}", kName, heads,
           in.q_heads, in.k_heads, in.v_heads);
  }
  const int64_t channels = (in.q_heads + in.k_heads) * in.key_dim + in.v_heads * dim_of(in);
  expect(in.key_dim > 0 && x.dim(1) == channels,
         "[{}] expected x (T, {}): {} + {} heads of {} and {} of {}, got {}", kName, channels,
         in.q_heads, in.k_heads, in.key_dim, in.v_heads, dim_of(in), x);
  expect(in.conv_weight.rank == 2 && in.conv_weight.dim(0) == channels &&
             in.conv_weight.dim(1) >= 2 && in.conv_weight.dtype == sum_dtype(x.dtype) &&
             in.conv_weight.contiguous(),
         "[{}] expected conv_weight {} ({}, taps), got {}", kName, dtype_name(sum_dtype(x.dtype)),
         channels, in.conv_weight);
  if (in.conv_bias.defined()) {
    expect_vector(kName, "conv_bias", in.conv_bias, channels, x);
  }
  const auto expect_columns = [&](const char* name, const Tensor& t, int64_t columns) {
    expect(t.rank == 2 && t.dim(0) == x.dim(0) && t.dim(1) == columns && t.dtype == x.dtype &&
               t.has_rows(),
           "[{}] expected {} {} ({}, {}), got {}", kName, name, dtype_name(x.dtype), x.dim(0),
           columns, t);
  };
  const bool per_channel = in.decay.rank == 2 && in.decay.dim(1) == heads * in.key_dim;
  expect_columns("decay", in.decay, per_channel ? heads * in.key_dim : heads);
  expect_vector(kName, "dt_bias", in.dt_bias, in.decay.dim(1), x);
  if (in.weight.defined()) {
    expect_columns("weight", in.weight, heads);
  }
  expect(in.weight.defined() || (in.decay.dim(1) == heads && in.bound == 0.0F),
         "[{}] expected a weight beside decays of channels or with a bound, got none", kName);
  if (in.skip.defined()) {
    expect_vector(kName, "skip", in.skip, heads, x);
  }
  expect_columns("z", in.z, heads * dim_of(in));
  if (in.norm.defined()) {
    expect_vector(kName, "norm", in.norm, in.norm.dim(0) == dim_of(in) ? dim_of(in) : in.z.dim(1),
                  x);
    expect(in.norm_config.group == dim_of(in),
           "[{}] expected a norm of each head, groups of {}, got {}", kName, dim_of(in),
           in.norm_config.group);
  }
  expect(in.turns == nullptr || 2 * (in.turns->dim / 2) <= in.key_dim,
         "[{}] expected turns of at most {} dims, got {}", kName, in.key_dim,
         in.turns == nullptr ? 0 : in.turns->dim);
}

}  // namespace

bool recurrent_step_serves(const Context& ctx, const RecurrentStepInputs& in,
                           const Segments& segments) {
  if constexpr (kCudaBuild) {
    return decodes_by_steps(ctx, in.x, segments) && in.key_dim % 16 == 0 &&
           in.key_dim <= kMostDim && dim_of(in) % 4 == 0 && dim_of(in) <= kMostDim &&
           sharing_heads(in) <= kMostSharing && in.conv_weight.dim(1) <= kMostTaps &&
           (!in.norm.defined() || in.norm_config.group == dim_of(in)) && cuda::has_recurrent_step();
  } else {
    return false;
  }
}

Tensor recurrent_step(const Context& ctx, const RecurrentStepInputs& in, const Segments& segments,
                      const Tensor& conv, const Tensor& state) {
  check(in);
  const int64_t heads = heads_of(in);
  const int64_t dim = dim_of(in);
  const Dtype sums = sum_dtype(in.x.dtype);
  expect_segments(kName, segments, in.x.dim(0), conv, sums,
                  {in.x.dim(1), in.conv_weight.dim(1) - 1});
  expect_segments(kName, segments, in.x.dim(0), state, sums, {heads, in.key_dim, dim});
  expect(conv.defined() && state.defined() && single_tokens(segments),
         "[{}] expected states and segments of one token", kName);
  const Tensor y = ctx.result_like(in.z, false);
  const int64_t keys = in.k_heads * in.key_dim;
  const int64_t q_from = in.values_first ? in.v_heads * dim + keys : 0;
  const int64_t k_from = in.values_first ? in.v_heads * dim : in.q_heads * in.key_dim;
  const int64_t v_from = in.values_first ? 0 : in.q_heads * in.key_dim + keys;
  run<recurrent_step_forward>(ctx, in.x, [&]<class T>() {
    const Turns turns = in.turns == nullptr ? Turns{} : *in.turns;
    return RecurrentStep<T>{
        .segments = segments.walk(),
        .heads = heads,
        .q_heads = in.q_heads,
        .k_heads = in.k_heads,
        .v_heads = in.v_heads,
        .key_dim = in.key_dim,
        .dim = dim,
        .q_from = q_from,
        .k_from = k_from,
        .v_from = v_from,
        .x = view<T>(in.x),
        .conv_weight = view<Sum<T>>(in.conv_weight),
        .conv_bias = view<Sum<T>>(in.conv_bias),
        .conv = conv.ptr<Sum<T>>(),
        .unit_eps = in.unit_eps,
        .q_scale = 1.0F / std::sqrt(static_cast<float>(in.key_dim)),
        .half = turns.dim / 2,
        .interleaved = turns.interleaved,
        .cos = turns.cos,
        .sin = turns.sin,
        .position = turns.position,
        .frequency = turns.frequency,
        .amplitude = turns.amplitude,
        .decay = view<T>(in.decay),
        .weight = view<T>(in.weight),
        .a_log = view<Sum<T>>(in.a_log),
        .dt_bias = view<Sum<T>>(in.dt_bias),
        .skip = view<Sum<T>>(in.skip),
        .z = view<T>(in.z),
        .norm = view<Sum<T>>(in.norm),
        .state = state.ptr<Sum<T>>(),
        .y = view<T>(y),
        .norm_step = in.norm.defined() && in.norm.dim(0) == in.z.dim(1) ? dim : 0,
        .strongest = in.strongest,
        .bound = in.bound,
        .norm_eps = in.norm_config.eps,
        .delta = in.delta,
        .gate_first = in.norm_config.order == GateOrder::kGateFirst,
        .sigmoid = in.norm_config.activation == GateActivation::kSigmoid};
  });
  return y;
}

}  // namespace cambium
