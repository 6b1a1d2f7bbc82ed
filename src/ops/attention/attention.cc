#include "ops/attention/attention.h"

#include <cmath>

#include "ops/attention/attention_pages.h"
#include "ops/attention/attention_ref.h"
#include "ops/checks.h"
#include "ops/run.h"

namespace cambium {
namespace {

void check_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                   const AttentionConfig& config) {
  expect(q.rank == 3 && is_computed(q), "[attention] expected q (T, H, D) in f32 or f64, got {}",
         q);
  expect(k.rank == 3 && k.dtype == q.dtype && k.dim(0) == q.dim(0) && k.dim(2) == q.dim(2),
         "[attention] expected k {} ({}, Hkv, {}) beside q {}, got {}", dtype_name(q.dtype),
         q.dim(0), q.dim(2), q, k);
  expect(v.rank == 3 && v.dtype == q.dtype && v.dim(0) == k.dim(0) && v.dim(1) == k.dim(1),
         "[attention] expected v {} ({}, {}, Dv) beside k {}, got {}", dtype_name(q.dtype),
         k.dim(0), k.dim(1), k, v);
  expect(k.dim(1) > 0 && q.dim(1) % k.dim(1) == 0,
         "[attention] expected query heads a multiple of key-value heads, got "
         "{} and {}",
         q.dim(1), k.dim(1));
  expect(q.has_rows() && k.has_rows() && v.has_rows(),
         "[attention] expected q, k and v with contiguous head dims");
  expect(q.dim(2) <= kMaxKernelHeadDim && v.dim(2) <= kMaxKernelHeadDim,
         "[attention] expected head dims up to {}, got {} and {}", kMaxKernelHeadDim, q.dim(2),
         v.dim(2));
  expect(segments.tokens() == q.dim(0), "[attention] expected segments over {} tokens, got {}",
         q.dim(0), segments.tokens());
  expect(config.window >= 0, "[attention] expected a window of at least 1 (0 = none), got {}",
         config.window);
  expect(config.sinks == 0 || (config.sinks > 0 && config.window > 0),
         "[attention] expected sinks of at least 0 and none without a window, got {} and a window "
         "of {}",
         config.sinks, config.window);
  expect(config.softcap >= 0.0F && std::isfinite(config.softcap),
         "[attention] expected a softcap above 0 (0 = none), got {}", config.softcap);
  if (config.sink_logits.defined()) {
    expect_vector("attention", "sink_logits", config.sink_logits, q.dim(1), q);
  }
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                        const AttentionConfig& config) {
  return {.segments = segments.count(),
          .start = segments.start.data(),
          .position = nullptr,
          .table = nullptr,
          .pages_per_segment = 0,
          .page_size = 0,
          .heads = q.dim(1),
          .kv_heads = k.dim(1),
          .head_dim = q.dim(2),
          .value_dim = v.dim(2),
          .scale = config.scale,
          .window = config.window,
          .sinks = config.sinks,
          .softcap = config.softcap,
          .plans = segments.plans};
}

}  // namespace

Tensor attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Segments& segments, const AttentionConfig& config, const KvPages* pages) {
  check_tensors(q, k, v, segments, config);
  AttentionShape shape = shape_of(q, k, v, segments, config);
  const Tensor sink_logits = config.sink_logits;
  const bool differentiate = ctx.differentiate(q, k, v, sink_logits);
  Tensor keys = k;
  Tensor values = v;
  Tensor key_scales, value_scales;
  if (pages != nullptr) {
    expect(!differentiate, "[attention] cached keys and values have no gradient; train without");
    use_kv_pages(ctx, "attention", k, v, segments, *pages, shape);
    keys = rows_of(pages->keys);
    values = rows_of(pages->values);
    key_scales = pages->key_scales;
    value_scales = pages->value_scales;
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), v.dim(2)}, differentiate);
  float* kept = differentiate ? ctx.scratch<float>(2 * q.dim(0) * q.dim(1)) : nullptr;
  const bool same = pages != nullptr && !pages->written && keys.dtype == k.dtype;
  const auto args = [=]<class T>() {
    return Attention<T>{.shape = shape,
                        .q = view<T>(q),
                        .k = wide_view<T>(keys),
                        .v = wide_view<T>(values),
                        .narrow_k = narrow_view<T>(keys),
                        .narrow_v = narrow_view<T>(values),
                        .scaled_k = scaled_rows(keys, key_scales),
                        .scaled_v = scaled_rows(values, value_scales),
                        .new_k = same ? view<T>(k) : View<T>{},
                        .new_v = same ? view<T>(v) : View<T>{},
                        .y = view<T>(y),
                        .sink_logits = view<Sum<T>>(sink_logits),
                        .largest = kept,
                        .inverse_sum = kept == nullptr ? nullptr : kept + q.dim(0) * q.dim(1)};
  };
  run<attention_forward>(ctx, q, args);
  if (differentiate) {
    ctx.record({y, sink_logits}, [=](const Context& c) {
      const bool set_q = sets_grad(q);
      const bool set_k = sets_grad(k);  // not if it is q's, which is set
      const bool set_v = sets_grad(v);
      run<attention_backward>(c, q, [=]<class T>() {
        Attention<T> a = args.template operator()<T>();
        a.set_q = set_q;
        a.set_k = set_k;
        a.set_v = set_v;
        return a;
      });
    });
  }
  return y;
}

void write_keys(Context& ctx, const Tensor& k, const Tensor& v, const Segments& segments,
                const KvPages& pages) {
  AttentionShape shape = one_key_shape(segments, k.dim(1), k.dim(2), v.dim(2), 1.0F);
  use_kv_pages(ctx, "write_keys", k, v, segments, pages, shape);
}

}  // namespace cambium
