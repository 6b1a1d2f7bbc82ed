#include "ops/attention/attention.h"

#include <algorithm>

#include "ops/attention/attention_kernels.h"
#include "ops/attention/attention_ref.h"

namespace cambium {
namespace {

void check_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                   const AttentionConfig& config) {
  expect(q.rank == 3 && (q.dtype == Dtype::kF32 || q.dtype == Dtype::kF64),
         "[attention] expected q (T, H, D) in f32 or f64, got {}", q.describe());
  expect(k.rank == 3 && k.dtype == q.dtype && k.dim(0) == q.dim(0) && k.dim(2) == q.dim(2),
         "[attention] expected k {} ({}, Hkv, {}) beside q {}, got {}", dtype_name(q.dtype),
         q.dim(0), q.dim(2), q.describe(), k.describe());
  expect(v.rank == 3 && v.dtype == q.dtype && v.dim(0) == k.dim(0) && v.dim(1) == k.dim(1),
         "[attention] expected v {} ({}, {}, Dv) beside k {}, got {}", dtype_name(q.dtype),
         k.dim(0), k.dim(1), k.describe(), v.describe());
  expect(k.dim(1) > 0 && q.dim(1) % k.dim(1) == 0,
         "[attention] expected query heads a multiple of key-value heads, got {} and {}", q.dim(1),
         k.dim(1));
  expect(q.has_rows() && k.has_rows() && v.has_rows(),
         "[attention] expected q, k and v with contiguous head dims");
  expect(segments.tokens() == q.dim(0), "[attention] expected segments over {} tokens, got {}",
         q.dim(0), segments.tokens());
  expect(config.window >= 0, "[attention] expected a window of at least 1 (0 = none), got {}",
         config.window);
}

void check_cache(const Tensor& cache, const char* name, const Tensor& rows) {
  expect(cache.rank == 4 && cache.contiguous() && cache.dtype == rows.dtype &&
             cache.dim(2) == rows.dim(1) && cache.dim(3) == rows.dim(2),
         "[attention] expected cached {} {} (pages, page_size, {}, {}), got {}", name,
         dtype_name(rows.dtype), rows.dim(1), rows.dim(2), cache.describe());
}

/// Every page that a token of a segment writes or reads is in the table.
void check_pages(const KvPages& pages, const AttentionShape& shape) {
  expect(pages.keys.dim(0) == pages.values.dim(0) && pages.keys.dim(1) == pages.values.dim(1),
         "[attention] expected as many pages of keys as of values, got {} and {}",
         pages.keys.describe(), pages.values.describe());
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
           "[attention] segment {} reaches position {}, its page table covers 0..{}", s, last,
           pages.pages_per_segment * shape.page_size - 1);
    for (int64_t p = shape.reach(first) / shape.page_size; p <= last / shape.page_size; ++p) {
      const int32_t page = shape.table[s * pages.pages_per_segment + p];
      expect(page >= 0 && page < pages.keys.dim(0),
             "[attention] segment {} needs page {} of its table, which names {} of {} pages", s, p,
             page, pages.keys.dim(0));
    }
  }
}

/// Copies the rows of new tokens to their places in the cache.
template <class Real>
void write_pages(const AttentionShape& shape, const Tensor& rows, const Tensor& cache) {
  const Rows walk = rows.row_walk();
  const int64_t heads = rows.dim(1);
  const int64_t dim = rows.dim(2);
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t i = 0; i < shape.length(s); ++i) {
      const Real* from = rows.ptr<Real>() + (shape.start[s] + i) * walk.outer_stride;
      Real* to = cache.ptr<Real>() + shape.key_row(s, shape.first_position(s) + i) * heads * dim;
      for (int64_t h = 0; h < heads; ++h) {
        std::copy_n(from + h * walk.inner_stride, dim, to + h * dim);
      }
    }
  }
}

/// The walk of a cache seen as (pages * page_size, Hkv, D).
Rows cache_walk(const Tensor& cache) {
  return {cache.dim(0) * cache.dim(1), cache.dim(2), cache.dim(2) * cache.dim(3), cache.dim(3)};
}

template <class Real>
void forward(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v,
             const KvPages* pages, const Tensor& y) {
  Rows k_rows = k.row_walk();
  Rows v_rows = v.row_walk();
  const Real* keys = k.ptr<Real>();
  const Real* values = v.ptr<Real>();
  if (pages != nullptr) {
    write_pages<Real>(shape, k, pages->keys);
    write_pages<Real>(shape, v, pages->values);
    k_rows = cache_walk(pages->keys);
    v_rows = cache_walk(pages->values);
    keys = pages->keys.ptr<Real>();
    values = pages->values.ptr<Real>();
  }
  reference::attention_forward<Real>(shape, q.row_walk(), q.ptr<Real>(), k_rows, keys, v_rows,
                                     values, y.ptr<Real>());
}

template <class Real>
void backward(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& y) {
  reference::attention_backward<Real>(
      shape, q.row_walk(), q.ptr<Real>(), k.row_walk(), k.ptr<Real>(), v.row_walk(), v.ptr<Real>(),
      y.grad_ptr<Real>(), q.grad_ptr<Real>(), k.grad_ptr<Real>(), v.grad_ptr<Real>());
}

}  // namespace

Tensor attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Segments& segments, const AttentionConfig& config, const KvPages* pages) {
  require_cpu("attention", q);
  check_tensors(q, k, v, segments, config);
  AttentionShape shape = {.segments = segments.count(),
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
                          .window = config.window};
  const bool differentiate = ctx.differentiate(q, k, v);
  if (pages != nullptr) {
    expect(!differentiate, "[attention] cached keys and values have no gradient; train without");
    check_cache(pages->keys, "keys", k);
    check_cache(pages->values, "values", v);
    shape.position = segments.position.data();
    shape.table = pages->table.data();
    shape.pages_per_segment = pages->pages_per_segment;
    shape.page_size = pages->keys.dim(1);
    check_pages(*pages, shape);
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), v.dim(2)}, differentiate);
  if (q.dtype == Dtype::kF64) {
    forward<double>(shape, q, k, v, pages, y);
  } else {
    forward<float>(shape, q, k, v, pages, y);
  }
  if (differentiate) {
    ctx.tape->record([shape, q, k, v, y] {
      if (q.dtype == Dtype::kF64) {
        backward<double>(shape, q, k, v, y);
      } else {
        backward<float>(shape, q, k, v, y);
      }
    });
  }
  return y;
}

}  // namespace cambium
