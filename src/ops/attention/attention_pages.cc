#include "ops/attention/attention_pages.h"

#include <algorithm>
#include <cstdint>

#include "ops/attention/attention.h"
#include "ops/attention/attention_ref.h"
#include "ops/checks.h"
#include "ops/run.h"

namespace cambium {
namespace {

/// The scales that go with rows in f8, and none with others.
void check_scales(const char* operation, const char* name, const PagedRows& paged) {
  const auto& [cache, scales] = paged;
  if (cache.dtype != Dtype::kF8E4M3) {
    expect(!scales.defined(), "[{}] cached {} in {} have no scales, got {}", operation, name,
           dtype_name(cache.dtype), scales);
    return;
  }
  expect(scales.rank == 3 && scales.contiguous() && scales.dtype == Dtype::kBF16 &&
             scales.dim(0) == cache.dim(0) && scales.dim(1) == cache.dim(1) &&
             scales.dim(2) == cache.dim(2),
         "[{}] expected scales bf16 ({}, {}, {}) of cached {} in f8, got {}", operation,
         cache.dim(0), cache.dim(1), cache.dim(2), name,
         scales.defined() ? scales.describe() : "none");
}

/// Entries [first, end) of a segment's table name pages. Tables of long sequences have very many
/// entries, and every layer comes here: sixteen are looked at together, without a branch.
void check_range(const char* operation, const int32_t* table, int64_t first, int64_t end,
                 int64_t segment, int64_t pages) {
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
           "[{}] segment {} needs page {} of its table, which names {} of {} pages", operation,
           segment, p, table[p], pages);
  }
}

}  // namespace

void expect_paged(const char* operation, const char* name, const PagedRows& paged,
                  const Tensor& rows) {
  const Tensor& cache = paged.rows;
  const bool narrow =
      (cache.dtype == Dtype::kBF16 && rows.dtype == Dtype::kF32) || cache.dtype == Dtype::kF8E4M3;
  expect(cache.rank == 4 && cache.contiguous() && (cache.dtype == rows.dtype || narrow) &&
             cache.dim(2) == rows.dim(1) && cache.dim(3) == rows.dim(2),
         "[{}] expected cached {} {} (pages, page_size, {}, {}), got {}", operation, name,
         dtype_name(rows.dtype), rows.dim(1), rows.dim(2), cache);
  check_scales(operation, name, paged);
}

void use_pages(const char* operation, AttentionShape& shape, const Segments& segments,
               std::span<const int32_t> table, int64_t pages_per_segment, const Tensor& pages) {
  shape.position = segments.position.data();
  shape.table = table.data();
  shape.pages_per_segment = pages_per_segment;
  shape.page_size = pages.dim(1);
  expect(static_cast<int64_t>(table.size()) == shape.segments * pages_per_segment,
         "[{}] expected a page table ({}, {}), got {} entries", operation, shape.segments,
         pages_per_segment, table.size());
  for (int64_t s = 0; s < shape.segments; ++s) {
    if (shape.length(s) == 0) {
      continue;
    }
    const int64_t first = shape.first_position(s);
    const int64_t last = first + shape.length(s) - 1;
    expect(first >= 0 && last / shape.page_size < pages_per_segment,
           "[{}] segment {} reaches position {}, its page table covers "
           "0..{}",
           operation, s, last, pages_per_segment * shape.page_size - 1);
    const SeenKeys seen = shape.seen_keys(s);
    const int32_t* of_segment = shape.table + s * pages_per_segment;
    check_range(operation, of_segment, 0, (seen.sinks + shape.page_size - 1) / shape.page_size, s,
                pages.dim(0));
    check_range(operation, of_segment, seen.first / shape.page_size, last / shape.page_size + 1, s,
                pages.dim(0));
  }
}

Tensor rows_of(const Tensor& pages) {
  return pages.reshape({pages.dim(0) * pages.dim(1), pages.dim(2), pages.dim(3)});
}

void write_pages(Context& ctx, const AttentionShape& shape, std::initializer_list<NewRows> rows) {
  CAMBIUM_CHECK(rows.size() >= 1 && rows.size() <= 2);
  run<attention_write>(ctx, rows.begin()->rows, [&]<class T>() {
    AttentionWrite<T> write{shape, {}};
    auto* part = write.each;
    for (const NewRows& from : rows) {
      const Tensor to = rows_of(from.to.rows);
      *part++ = {view<T>(from.rows), wide_view<T>(to), narrow_view<T>(to),
                 scaled_rows(to, from.to.scales)};
    }
    return write;
  });
}

void use_kv_pages(Context& ctx, const char* operation, const Tensor& k, const Tensor& v,
                  const Segments& segments, const KvPages& pages, AttentionShape& shape) {
  expect_paged(operation, "keys", {pages.keys, pages.key_scales}, k);
  expect_paged(operation, "values", {pages.values, pages.value_scales}, v);
  expect(pages.keys.dim(0) == pages.values.dim(0) && pages.keys.dim(1) == pages.values.dim(1) &&
             pages.keys.dtype == pages.values.dtype,
         "[{}] expected as many pages of keys as of values, got {} and {}", operation, pages.keys,
         pages.values);
  use_pages(operation, shape, segments, pages.table, pages.pages_per_segment, pages.keys);
  if (!pages.written) {
    write_pages(ctx, shape,
                {{k, {pages.keys, pages.key_scales}}, {v, {pages.values, pages.value_scales}}});
  }
}

AttentionShape one_key_shape(const Segments& segments, int64_t heads, int64_t dim,
                             int64_t value_dim, float scale) {
  AttentionShape shape{};
  shape.segments = segments.count();
  shape.start = segments.start.data();
  shape.heads = heads;
  shape.kv_heads = 1;
  shape.head_dim = dim;
  shape.value_dim = value_dim;
  shape.scale = scale;
  shape.plans = segments.plans;
  return shape;
}

}  // namespace cambium
