#include "ops/scan_step/scan_step.h"

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/scan_step/scan_step_kernels.h"
#include "ops/scan_step/scan_step_ref.h"
#include "ops/token_steps.h"

namespace cambium {
namespace {

constexpr const char* kName = "scan_step";
constexpr int64_t kStates = 16;
constexpr int64_t kMostTaps = 4;

void check(const ScanStepInputs& in) {
  const Tensor& x = in.x;
  const Tensor& z = in.scan.z;
  expect_rows(kName, "x", x, 2);
  expect(z.rank == 2 && z.dim(0) == x.dim(0) && z.dtype == x.dtype && z.row_contiguous() &&
             in.scan.dt.same_shape(z) && in.scan.dt.dtype == x.dtype && in.scan.dt.row_contiguous(),
         "[{}] expected z and dt {} ({}, d), got {} and {}", kName, dtype_name(x.dtype), x.dim(0),
         z, in.scan.dt);
  const int64_t channels = z.dim(1);
  const int64_t states = in.scan.a_log.dim(1);
  expect(x.dim(1) % states == 0 && channels % x.dim(1) == 0,
         "[{}] expected heads of {} channels in x that make up {} when repeated, got {}", kName,
         states, channels, x);
  expect(in.conv_weight.rank == 2 && in.conv_weight.dim(0) == channels &&
             in.conv_weight.dim(1) >= 2 && in.conv_weight.dtype == sum_dtype(x.dtype) &&
             in.conv_weight.contiguous(),
         "[{}] expected conv_weight {} ({}, taps), got {}", kName, dtype_name(sum_dtype(x.dtype)),
         channels, in.conv_weight);
  if (in.conv_bias.defined()) {
    expect_vector(kName, "conv_bias", in.conv_bias, channels, x);
  }
  expect_vector(kName, "d", in.scan.d, channels, x);
  expect_vector(kName, "dt_bias", in.scan.dt_bias, channels, x);
  expect(in.scan.a_log.rank == 2 && in.scan.a_log.dim(0) == channels &&
             in.scan.a_log.dtype == sum_dtype(x.dtype) && in.scan.a_log.contiguous(),
         "[{}] expected a_log {} ({}, N), got {}", kName, dtype_name(sum_dtype(x.dtype)), channels,
         in.scan.a_log);
  for (const Tensor& t : {in.scan.b, in.scan.c}) {
    expect(t.rank == 3 && t.dim(0) == x.dim(0) && t.dim(2) == states && t.dtype == x.dtype &&
               t.has_rows() && (t.dim(1) == 1 || t.stride[1] == states) && t.dim(1) > 0 &&
               channels % t.dim(1) == 0,
           "[{}] expected b and c {} ({}, groups, {}) with groups together, got {}", kName,
           dtype_name(x.dtype), x.dim(0), states, t);
  }
}

/// Whether four neighbouring elements of a row, counted from its start, are one access.
bool in_fours(const Tensor& t) {
  const auto bytes = static_cast<uintptr_t>(4 * dtype_size(t.dtype));
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && t.row_walk().outer_stride % 4 == 0;
}

}  // namespace

bool scan_step_serves(const Context& ctx, const ScanStepInputs& in, const Segments& segments) {
  return decodes_by_steps(ctx, in.x, segments) && in.scan.a_log.dim(1) == kStates &&
         in.conv_weight.dim(1) <= kMostTaps && in_fours(in.scan.b) && in_fours(in.scan.c);
}

Tensor scan_step(const Context& ctx, const ScanStepInputs& in, const Segments& segments,
                 const Tensor& conv, const Tensor& state) {
  check(in);
  const Dtype sums = sum_dtype(in.x.dtype);
  const int64_t channels = in.scan.z.dim(1);
  const int64_t states = in.scan.a_log.dim(1);
  expect_segments(kName, segments, in.x.dim(0), conv, sums, {channels, in.conv_weight.dim(1) - 1});
  expect_segments(kName, segments, in.x.dim(0), state, sums, {channels, states});
  expect(conv.defined() && state.defined() && single_tokens(segments),
         "[{}] expected states and segments of one token", kName);
  const Tensor y = ctx.result_like(in.scan.z, false);
  run<scan_step_forward>(ctx, in.x, [&]<class T>() {
    return ScanStep<T>{.scan = {.segments = segments.walk(),
                                .channels = channels,
                                .states = states,
                                .b_groups = in.scan.b.dim(1),
                                .c_groups = in.scan.c.dim(1),
                                .sigmoid = in.scan.gate == GateActivation::kSigmoid,
                                .u = {},
                                .dt = view<T>(in.scan.dt),
                                .z = view<T>(in.scan.z),
                                .b = view<T>(in.scan.b),
                                .c = view<T>(in.scan.c),
                                .a_log = view<Sum<T>>(in.scan.a_log),
                                .d = view<Sum<T>>(in.scan.d),
                                .dt_bias = view<Sum<T>>(in.scan.dt_bias),
                                .state = state.ptr<Sum<T>>(),
                                .y = view<T>(y),
                                .kept = nullptr},
                       .x = view<T>(in.x),
                       .conv_weight = view<Sum<T>>(in.conv_weight),
                       .conv_bias = view<Sum<T>>(in.conv_bias),
                       .conv = conv.ptr<Sum<T>>(),
                       .repeat = channels / in.x.dim(1)};
  });
  return y;
}

}  // namespace cambium
