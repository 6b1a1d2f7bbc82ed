#include "ops/recurrence/recurrence.h"

#include "ops/checks.h"
#include "ops/recurrence/recurrence_kernels.h"
#include "ops/recurrence/recurrence_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

// (T, heads, dim) with heads and elements together; (T, heads) for dim 0.
bool has_heads(const Tensor& t, const Tensor& like, Dtype dtype, int64_t heads, int64_t dim) {
  const int rank = dim > 0 ? 3 : 2;
  if (t.rank != rank || t.dtype != dtype || t.device != like.device || t.dim(0) != like.dim(0) ||
      t.dim(1) != heads || (dim > 0 && t.dim(2) != dim) || !t.has_rows()) {
    return false;
  }
  return dim == 0 || heads == 1 || t.stride[1] == dim;
}

void check(const RecurrenceInputs& in) {
  const Tensor& v = in.v;
  expect(v.rank == 3 && is_computed(v) && has_heads(v, v, v.dtype, v.dim(1), v.dim(2)),
         "[recurrence] expected v (T, Hv, V), f32 or f64, with heads together, got {}", v);
  const char* dtype = dtype_name(v.dtype);
  const char* sums = dtype_name(sum_dtype(v.dtype));
  expect(in.q.rank == 3 && has_heads(in.q, v, v.dtype, in.q.dim(1), in.q.dim(2)),
         "[recurrence] expected q {} ({}, Hk, K) with heads together, got {}", dtype, v.dim(0),
         in.q);
  const int64_t key_dim = in.q.dim(2);
  expect(has_heads(in.k, v, v.dtype, in.q.dim(1), key_dim),
         "[recurrence] expected k shaped like q {}, got {}", in.q, in.k);
  expect(v.dim(1) % in.q.dim(1) == 0,
         "[recurrence] expected a number of key heads that divides {} value heads, got {}",
         v.dim(1), in.q.dim(1));
  expect(has_heads(in.log_decay, v, sum_dtype(v.dtype), v.dim(1),
                   in.log_decay.rank == 3 ? key_dim : 0),
         "[recurrence] expected log_decay {} ({}, {}) or ({}, {}, {}), got {}", sums, v.dim(0),
         v.dim(1), v.dim(0), v.dim(1), key_dim, in.log_decay);
  expect(!in.weight.defined() || has_heads(in.weight, v, sum_dtype(v.dtype), v.dim(1), 0),
         "[recurrence] expected weight {} ({}, {}), got {}", sums, v.dim(0), v.dim(1), in.weight);
  expect(!in.delta || in.weight.defined(),
         "[recurrence] the delta rule needs a weight (its beta), got none");
  expect(!in.skip.defined() || (in.skip.rank == 1 && in.skip.dim(0) == v.dim(1) &&
                                in.skip.dtype == sum_dtype(v.dtype)),
         "[recurrence] expected skip {} ({}), got {}", sums, v.dim(1), in.skip);
}

}  // namespace

Tensor recurrence(Context& ctx, const RecurrenceInputs& inputs, const Segments& segments,
                  const Tensor& state) {
  check(inputs);
  const Tensor& v = inputs.v;
  expect_segments("recurrence", segments, v.dim(0), state, sum_dtype(v.dtype),
                  {v.dim(1), inputs.q.dim(2), v.dim(2)});
  const bool differentiate =
      ctx.differentiate(inputs.q, inputs.k, v, inputs.log_decay, inputs.weight, inputs.skip);
  const Tensor y = ctx.result_like(v, differentiate);
  const auto args = [in = inputs, walk = segments.walk(), state, y]<class T>(void* kept) {
    return Recurrence<T>{.segments = walk,
                         .key_heads = in.q.dim(1),
                         .heads = in.v.dim(1),
                         .key_dim = in.q.dim(2),
                         .dim = in.v.dim(2),
                         .decay_per_channel = in.log_decay.rank == 3,
                         .delta = in.delta,
                         .q = view<T>(in.q),
                         .k = view<T>(in.k),
                         .v = view<T>(in.v),
                         .log_decay = view<Sum<T>>(in.log_decay),
                         .weight = view<Sum<T>>(in.weight),
                         .skip = view<Sum<T>>(in.skip),
                         .state = data_of<Sum<T>>(state),
                         .y = view<T>(y),
                         .kept = kept};
  };
  void* kept = keep<recurrence_forward>(ctx, differentiate, v, args, nullptr);
  run<recurrence_forward>(ctx, v, args, kept);
  if (differentiate) {
    ctx.record({inputs.q, inputs.k, v, inputs.log_decay, inputs.weight, inputs.skip, y},
               [=](const Context& c) { run<recurrence_backward>(c, y, args, kept); });
  }
  return y;
}

}  // namespace cambium
