// Rows of tokens in the pages of a cache, as every operation has them that looks back: keys,
// values, latents, keys of an index. Private to these operations.
#pragma once

#include <span>

#include "ops/attention/key_rows.h"
#include "ops/segments.h"

namespace cambium {

struct KvPages;

/// What tokens leave in pages: each D numbers in rows of G.
struct PagedRows {
  Tensor rows;      // (pages, page_size, G, D) of the type of what is written, or bf16, or f8
  Tensor scales{};  // (pages, page_size, G) bf16: of rows in f8, which are each times their own
};

/// Fails unless `paged` can take `rows` (T, G, D).
void expect_paged(const char* operation, const char* name, const PagedRows& paged,
                  const Tensor& rows);
/// Gives the shape positions and a page table, which must name a page of `pages` for all that the
/// segments' tokens write or see.
void use_pages(const char* operation, AttentionShape& shape, const Segments& segments,
               std::span<const int32_t> table, int64_t pages_per_segment, const Tensor& pages);
/// Copies the rows of the call's tokens, up to two kinds, to their places.
struct NewRows {
  Tensor rows;  // (T, G, D)
  PagedRows to;
};
void write_pages(Context& ctx, const AttentionShape& shape, std::initializer_list<NewRows> rows);

/// Gives the shape positions and table of pages of keys and values, which must fit k and v, and
/// writes the call's rows there unless they are.
void use_kv_pages(Context& ctx, const char* operation, const Tensor& k, const Tensor& v,
                  const Segments& segments, const KvPages& pages, AttentionShape& shape);

/// That of queries whose heads share one key of `dim` numbers a token, without pages.
AttentionShape one_key_shape(const Segments& segments, int64_t heads, int64_t dim,
                             int64_t value_dim, float scale);

/// Pages as rows of tokens: (pages * page_size, G, D).
Tensor rows_of(const Tensor& pages);

/// The view of rows that lie in type T, and of those that lie in bf16 beside a wider T.
template <class T>
View<T> wide_view(const Tensor& x) {
  return x.dtype == DtypeOf<T>::value ? view<T>(x) : View<T>{};
}
template <class T>
View<bf16> narrow_view(const Tensor& x) {
  return x.dtype == DtypeOf<T>::value || x.dtype != Dtype::kBF16 ? View<bf16>{} : view<bf16>(x);
}
/// The same of those that lie in f8.
inline ScaledRows scaled_rows(const Tensor& x, const Tensor& scales) {
  return x.dtype == Dtype::kF8E4M3 ? ScaledRows{view<f8e4m3>(x), scales.ptr<bf16>()} : ScaledRows{};
}
template <class T>
KeyRows<T> key_rows(const Tensor& rows, const Tensor& scales) {
  return {wide_view<T>(rows), narrow_view<T>(rows), scaled_rows(rows, scales)};
}

}  // namespace cambium
