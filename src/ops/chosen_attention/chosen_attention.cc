#include "ops/chosen_attention/chosen_attention.h"

#include "ops/attention/attention_pages.h"
#include "ops/checks.h"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/chosen_attention/chosen_attention_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

constexpr const char* kName = "chosen_attention";

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
           const ChosenTokens& chosen) {
  expect_rows(kName, "q (T, H, D)", q, 3);
  expect(k.rank == 3 && k.dtype == q.dtype && k.device == q.device && k.dim(0) == q.dim(0) &&
             k.dim(2) == q.dim(2) && k.has_rows() && k.dim(1) > 0 && q.dim(1) % k.dim(1) == 0,
         "[{}] expected k {} ({}, Hkv, {}), Hkv a divisor of {}, beside q {}, got {}", kName,
         dtype_name(q.dtype), q.dim(0), q.dim(2), q.dim(1), q, k);
  expect(v.rank == 3 && v.dtype == q.dtype && v.device == q.device && v.dim(0) == q.dim(0) &&
             v.dim(1) == k.dim(1) && v.has_rows(),
         "[{}] expected v {} ({}, {}, Dv) beside k {}, got {}", kName, dtype_name(q.dtype),
         q.dim(0), k.dim(1), k, v);
  expect(q.dim(2) <= kMaxKernelHeadDim && v.dim(2) <= kMaxKernelHeadDim,
         "[{}] expected heads of at most {} numbers, got {} and {}", kName, kMaxKernelHeadDim,
         q.dim(2), v.dim(2));
  expect(segments.tokens() == q.dim(0), "[{}] expected segments over {} tokens, got {}", kName,
         q.dim(0), segments.tokens());
  expect(chosen.lists == 1 || chosen.lists == k.dim(1),
         "[{}] expected a list of chosen tokens, or one for each of {} heads of keys, got {}",
         kName, k.dim(1), chosen.lists);
}

}  // namespace

Tensor chosen_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Segments& segments, float scale, const ChosenTokens& chosen,
                        const KvPages* pages) {
  check(q, k, v, segments, chosen);
  AttentionShape shape = one_key_shape(segments, q.dim(1), q.dim(2), v.dim(2), scale);
  shape.kv_heads = k.dim(1);
  const bool differentiate = ctx.differentiate(q, k, v);
  Tensor keys = k;
  Tensor values = v;
  Tensor key_scales, value_scales;
  if (pages != nullptr) {
    expect(!differentiate, "[{}] cached keys and values have no gradient; train without", kName);
    use_kv_pages(ctx, kName, k, v, segments, *pages, shape);
    keys = rows_of(pages->keys);
    values = rows_of(pages->values);
    key_scales = pages->key_scales;
    value_scales = pages->value_scales;
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), v.dim(2)}, differentiate);
  float* kept = differentiate ? ctx.scratch<float>(2 * q.dim(0) * q.dim(1)) : nullptr;
  const auto args = [=]<class T>() {
    return ChosenAttention<T>{
        .shape = shape,
        .q = view<T>(q),
        .k = key_rows<T>(keys, key_scales),
        .v = key_rows<T>(values, value_scales),
        .chosen = chosen,
        .y = view<T>(y),
        .largest = kept,
        .inverse_sum = kept == nullptr ? nullptr : kept + q.dim(0) * q.dim(1)};
  };
  run<chosen_attention_forward>(ctx, q, args);
  if (differentiate) {
    ctx.record({q, k, v, y}, [=](const Context& c) { run<chosen_attention_backward>(c, q, args); });
  }
  return y;
}

}  // namespace cambium
