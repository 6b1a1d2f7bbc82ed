#include "ops/turned_write/turned_write.h"

#include "ops/attention/attention_pages.h"
#include "ops/checks.h"
#include "ops/run.h"
#include "ops/token_steps.h"
#include "ops/turned_write/turned_write_kernels.h"
#include "ops/turned_write/turned_write_ref.h"

namespace cambium {
namespace {

constexpr const char* kName = "turned_write";

}  // namespace

bool turned_write_serves(const Context& ctx, const Tensor& k, const Turns& turns,
                         const Segments& segments, const KvPages& pages) {
  return k.device.kind == Device::kCuda && ctx.tape == nullptr && single_tokens(segments) &&
         pages.keys.dtype != Dtype::kF8E4M3 && !turns.interleaved;
}

Tensor turned_write(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Turns& turns, const Segments& segments, const KvPages& pages) {
  for (const Tensor& x : {q, k, v}) {
    expect(
        is_computed(x) && x.dtype == q.dtype && x.rank == 3 && x.has_rows() && x.dim(0) == q.dim(0),
        "[{}] expected q, k and v (T, H, D) f32 or f64 with contiguous heads, got {}", kName, x);
  }
  expect(turns.dim <= q.dim(2) && k.dim(2) == q.dim(2) && turns.tokens == q.dim(0),
         "[{}] expected q and k of {} tokens and at least {} dims (those that turn), got {} and {}",
         kName, turns.tokens, turns.dim, q, k);
  expect_paged(kName, "keys", {pages.keys}, k);
  expect_paged(kName, "values", {pages.values}, v);
  expect(pages.keys.dtype == pages.values.dtype && pages.keys.dtype != Dtype::kF8E4M3,
         "[{}] expected pages of one type, not f8, got {} and {}", kName, pages.keys, pages.values);
  AttentionShape shape{};
  shape.segments = segments.count();
  shape.start = segments.start.data();
  shape.heads = q.dim(1);
  shape.kv_heads = k.dim(1);
  shape.head_dim = q.dim(2);
  shape.value_dim = v.dim(2);
  shape.plans = segments.plans;
  shape.window = 1;  // pages of earlier tokens may be gone: nothing looks back here
  use_pages(kName, shape, segments, pages.table, pages.pages_per_segment, pages.keys);
  const Tensor turned = ctx.result_like(q, false);
  run<turned_write_forward>(ctx, q, [&]<class T>() {
    const auto rope_of = [&](const Tensor& x, const Tensor& y) {
      return Rope<T>{view<T>(x),     view<T>(y),      turns.dim / 2,   turns.cos,        turns.sin,
                     turns.position, turns.frequency, turns.amplitude, turns.interleaved};
    };
    const Tensor keys = rows_of(pages.keys);
    const Tensor values = rows_of(pages.values);
    TurnedWrite<T> a{{shape,
                      {{view<T>(k), wide_view<T>(keys), narrow_view<T>(keys)},
                       {view<T>(v), wide_view<T>(values), narrow_view<T>(values)}}},
                     rope_of(q, turned),
                     rope_of(k, {})};
    a.q.scale = turns.query_scale;
    a.q.beta = turns.query_beta;
    a.q.length = turns.query_length;
    return a;
  });
  return turned;
}

}  // namespace cambium
