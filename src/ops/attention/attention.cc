#include "ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops/attention/attention_kernels.h"
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
  expect(q.dim(2) <= kMaxHeadDim && v.dim(2) <= kMaxHeadDim,
         "[attention] expected head dims up to {}, got {} and {}", kMaxHeadDim, q.dim(2), v.dim(2));
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

void check_cache(const Tensor& cache, const char* name, const Tensor& rows) {
  const bool narrow =
      (cache.dtype == Dtype::kBF16 && rows.dtype == Dtype::kF32) || cache.dtype == Dtype::kF8E4M3;
  expect(cache.rank == 4 && cache.contiguous() && (cache.dtype == rows.dtype || narrow) &&
             cache.dim(2) == rows.dim(1) && cache.dim(3) == rows.dim(2),
         "[attention] expected cached {} {} (pages, page_size, {}, {}), got {}", name,
         dtype_name(rows.dtype), rows.dim(1), rows.dim(2), cache);
}

/// The scales that go with keys or values in f8, and none with others.
void check_scales(const Tensor& scales, const char* name, const Tensor& cache) {
  if (cache.dtype != Dtype::kF8E4M3) {
    expect(!scales.defined(), "[attention] cached {} in {} have no scales, got {}", name,
           dtype_name(cache.dtype), scales);
    return;
  }
  expect(scales.rank == 3 && scales.contiguous() && scales.dtype == Dtype::kBF16 &&
             scales.dim(0) == cache.dim(0) && scales.dim(1) == cache.dim(1) &&
             scales.dim(2) == cache.dim(2),
         "[attention] expected scales bf16 ({}, {}, {}) of cached {} in f8, got {}", cache.dim(0),
         cache.dim(1), cache.dim(2), name, scales.defined() ? scales.describe() : "none");
}

/// Entries [first, end) of a segment's table name pages. Tables of long sequences have very many
/// entries, and every layer comes here: sixteen are looked at together, without a branch.
void check_range(const int32_t* table, int64_t first, int64_t end, int64_t segment, int64_t pages) {
  constexpr int kTogether = 16;
  const auto greatest = static_cast<uint32_t>(std::min<int64_t>(pages, INT32_MAX) - 1);
  // The highest bit is set where an entry is negative or greater.
  const auto look = [&](int64_t p) {
    const auto page = static_cast<uint32_t>(table[p]);
    return page | (greatest - page);
  };
  uint32_t seen = 0;
  int64_t p = first;
  for (; p + kTogether <= end; p += kTogether) {
    for (int i = 0; i < kTogether; ++i) {
      seen |= look(p + i);
    }
  }
  for (; p < end; ++p) {
    seen |= look(p);
  }
  for (p = first; seen >> 31U != 0 && p < end; ++p) {
    expect(look(p) >> 31U == 0,
           "[attention] segment {} needs page {} of its table, which names {} of {} pages", segment,
           p, table[p], pages);
  }
}

/// Every page that a token of a segment writes or reads is in the table.
void check_pages(const KvPages& pages, const AttentionShape& shape) {
  expect(pages.keys.dim(0) == pages.values.dim(0) && pages.keys.dim(1) == pages.values.dim(1) &&
             pages.keys.dtype == pages.values.dtype,
         "[attention] expected as many pages of keys as of values, got {} and {}", pages.keys,
         pages.values);
  expect(static_cast<int64_t>(pages.table.size()) == shape.segments * pages.pages_per_segment,
         "[attention] expected a page table ({}, {}), got {} entries", shape.segments,
         pages.pages_per_segment, pages.table.size());
  for (int64_t s = 0; s < shape.segments; ++s) {
    if (shape.length(s) == 0) {
      continue;
    }
    const int64_t first = shape.first_position(s);
    const int64_t last = first + shape.length(s) - 1;
    expect(first >= 0 && last / shape.page_size < pages.pages_per_segment,
           "[attention] segment {} reaches position {}, its page table covers "
           "0..{}",
           s, last, pages.pages_per_segment * shape.page_size - 1);
    const SeenKeys seen = shape.seen_keys(s);
    const int32_t* table = shape.table + s * pages.pages_per_segment;
    check_range(table, 0, (seen.sinks + shape.page_size - 1) / shape.page_size, s,
                pages.keys.dim(0));
    check_range(table, seen.first / shape.page_size, last / shape.page_size + 1, s,
                pages.keys.dim(0));
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

/// Pages as rows of tokens: (pages * page_size, Hkv, D).
Tensor rows_of(const Tensor& pages) {
  return pages.reshape({pages.dim(0) * pages.dim(1), pages.dim(2), pages.dim(3)});
}

/// The view of keys or values that lie in type T, and of those that lie in bf16 beside a wider T.
template <class T>
View<T> wide_view(const Tensor& x) {
  return x.dtype == DtypeOf<T>::value ? view<T>(x) : View<T>{};
}
template <class T>
View<bf16> narrow_view(const Tensor& x) {
  return x.dtype == DtypeOf<T>::value || x.dtype != Dtype::kBF16 ? View<bf16>{} : view<bf16>(x);
}
/// The same of those that lie in f8.
ScaledRows scaled_rows(const Tensor& x, const Tensor& scales) {
  return x.dtype == Dtype::kF8E4M3 ? ScaledRows{view<f8e4m3>(x), scales.ptr<bf16>()} : ScaledRows{};
}

/// Whether the backward kernel is to set the gradient: those of CUDA can.
bool sets_grad(const Tensor& t) {
  if (t.device.kind == Device::kCuda) {
    return t.takes_grad();
  }
  t.settle_grad();
  return false;
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
    check_cache(pages->keys, "keys", k);
    check_cache(pages->values, "values", v);
    check_scales(pages->key_scales, "keys", pages->keys);
    check_scales(pages->value_scales, "values", pages->values);
    shape.position = segments.position.data();
    shape.table = pages->table.data();
    shape.pages_per_segment = pages->pages_per_segment;
    shape.page_size = pages->keys.dim(1);
    check_pages(*pages, shape);
    keys = rows_of(pages->keys);
    values = rows_of(pages->values);
    key_scales = pages->key_scales;
    value_scales = pages->value_scales;
    run<attention_write>(ctx, q, [&]<class T>() {
      return AttentionWrite<T>{
          shape,
          {{view<T>(k), wide_view<T>(keys), narrow_view<T>(keys), scaled_rows(keys, key_scales)},
           {view<T>(v), wide_view<T>(values), narrow_view<T>(values),
            scaled_rows(values, value_scales)}}};
    });
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), v.dim(2)}, differentiate);
  float* kept = differentiate ? ctx.scratch<float>(2 * q.dim(0) * q.dim(1)) : nullptr;
  const bool same = pages != nullptr && keys.dtype == k.dtype;
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

}  // namespace cambium
