#include "ops/selective_scan/selective_scan.h"

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selective_scan/selective_scan_kernels.h"
#include "ops/selective_scan/selective_scan_ref.h"

namespace cambium {
namespace {

void check(const SelectiveScanInputs& in) {
  const Tensor& u = in.u;
  expect(u.rank == 2 && u.row_contiguous() && is_computed(u),
         "[selective_scan] expected u (T, d), f32 or f64, with contiguous rows, got {}", u);
  const char* dtype = dtype_name(u.dtype);
  const char* sums = dtype_name(sum_dtype(u.dtype));
  for (const auto& [name, t] : {std::pair{"dt", in.dt}, std::pair{"z", in.z}}) {
    expect(t.same_shape(u) && t.dtype == u.dtype && t.row_contiguous(),
           "[selective_scan] expected {} shaped like u {}, got {}", name, u, t);
  }
  expect(in.a_log.rank == 2 && in.a_log.dim(0) == u.dim(1) &&
             in.a_log.dtype == sum_dtype(u.dtype) && in.a_log.contiguous(),
         "[selective_scan] expected a_log {} ({}, N), got {}", sums, u.dim(1), in.a_log);
  const int64_t states = in.a_log.dim(1);
  for (const auto& [name, t] : {std::pair{"b", in.b}, std::pair{"c", in.c}}) {
    expect(t.rank == 3 && t.dim(0) == u.dim(0) && t.dim(2) == states && t.dtype == u.dtype &&
               t.has_rows() && (t.dim(1) == 1 || t.stride[1] == states),
           "[selective_scan] expected {} {} ({}, groups, {}) with groups together, got {}", name,
           dtype, u.dim(0), states, t);
    expect(t.dim(1) > 0 && u.dim(1) % t.dim(1) == 0,
           "[selective_scan] expected a number of {} groups that divides {} channels, got {}", name,
           u.dim(1), t.dim(1));
  }
  for (const auto& [name, t] : {std::pair{"d", in.d}, std::pair{"dt_bias", in.dt_bias}}) {
    expect(t.rank == 1 && t.dim(0) == u.dim(1) && t.dtype == sum_dtype(u.dtype),
           "[selective_scan] expected {} {} ({}), got {}", name, sums, u.dim(1), t);
  }
}

}  // namespace

Tensor selective_scan(Context& ctx, const SelectiveScanInputs& inputs, const Segments& segments,
                      const Tensor& state) {
  check(inputs);
  const Tensor& u = inputs.u;
  expect_segments("selective_scan", segments, u.dim(0), state, sum_dtype(u.dtype),
                  {u.dim(1), inputs.a_log.dim(1)});
  const bool differentiate = ctx.differentiate(u, inputs.dt, inputs.b, inputs.c, inputs.z,
                                               inputs.a_log, inputs.d, inputs.dt_bias);
  const Tensor y = ctx.result_like(u, differentiate);
  const auto args = [in = inputs, walk = segments.walk(), state, y]<class T>(void* kept) {
    return SelectiveScan<T>{.segments = walk,
                            .channels = in.u.dim(1),
                            .states = in.a_log.dim(1),
                            .b_groups = in.b.dim(1),
                            .c_groups = in.c.dim(1),
                            .sigmoid = in.gate == GateActivation::kSigmoid,
                            .u = view<T>(in.u),
                            .dt = view<T>(in.dt),
                            .z = view<T>(in.z),
                            .b = view<T>(in.b),
                            .c = view<T>(in.c),
                            .a_log = view<Sum<T>>(in.a_log),
                            .d = view<Sum<T>>(in.d),
                            .dt_bias = view<Sum<T>>(in.dt_bias),
                            .state = data_of<Sum<T>>(state),
                            .y = view<T>(y),
                            .kept = kept};
  };
  void* kept = keep<selective_scan_forward>(ctx, differentiate, u, args, nullptr);
  run<selective_scan_forward>(ctx, u, args, kept);
  if (differentiate) {
    ctx.record(
        {u, inputs.dt, inputs.b, inputs.c, inputs.z, inputs.a_log, inputs.d, inputs.dt_bias, y},
        [=](const Context& c) { run<selective_scan_backward>(c, y, args, kept); });
  }
  return y;
}

}  // namespace cambium
