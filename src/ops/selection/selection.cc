#include "ops/selection/selection.h"

#include <algorithm>
#include <numeric>

#include "ops/attention/attention_pages.h"
#include "ops/checks.h"
#include "ops/run.h"
#include "ops/selection/selection_kernels.h"
#include "ops/selection/selection_ref.h"

namespace cambium {
namespace {

constexpr const char* kName = "choose_tokens";

/// Checks the pages, gives the shape their table and writes the call's keys.
void write(Context& ctx, const Tensor& k, const Segments& segments, const IndexPages& pages,
           AttentionShape& shape) {
  const NewRows rows{k.split_last(1, k.dim(1)), {pages.keys, pages.key_scales}};
  expect_paged(kName, "keys", rows.to, rows.rows);
  use_pages(kName, shape, segments, pages.table, pages.pages_per_segment, pages.keys);
  write_pages(ctx, shape, {rows});
}

void check(const Selection& selection) {
  const auto& [granularity, top, size, local] = selection;
  expect(top >= 1, "[{}] expected a budget of at least 1 token, block or pool, got {}", kName, top);
  expect(granularity == Granularity::kToken ? size == 1 : size >= 1,
         "[{}] expected pieces of at least 1 token, and of 1 where tokens are chosen, got {}",
         kName, size);
  expect(granularity != Granularity::kBlock || (local >= 1 && local <= top),
         "[{}] expected 1 to {} local blocks, a token's own the first of them, got {}", kName, top,
         local);
}

}  // namespace

ChosenTokens choose_tokens(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& weight,
                           const Segments& segments, const Selection& selection,
                           const IndexPages* pages) {
  expect_rows(kName, "q (T, H, D)", q, 3);
  expect(k.rank == 2 && k.dtype == q.dtype && k.device == q.device && k.dim(0) == q.dim(0) &&
             k.dim(1) == q.dim(2) && k.row_contiguous(),
         "[{}] expected k {} ({}, {}) beside q {}, got {}", kName, dtype_name(q.dtype), q.dim(0),
         q.dim(2), q, k);
  expect(!weight.defined() ||
             (weight.rank == 2 && weight.dtype == q.dtype && weight.device == q.device &&
              weight.dim(0) == q.dim(0) && weight.dim(1) == q.dim(1) && weight.row_contiguous()),
         "[{}] expected weight {} ({}, {}) beside q {}, got {}", kName, dtype_name(q.dtype),
         q.dim(0), q.dim(1), q, weight);
  expect(q.dim(2) <= kMaxKernelHeadDim, "[{}] expected heads of at most {} numbers, got {}", kName,
         kMaxKernelHeadDim, q.dim(2));
  check(selection);
  expect(segments.tokens() == q.dim(0), "[{}] expected segments over {} tokens, got {}", kName,
         q.dim(0), segments.tokens());
  AttentionShape shape = one_key_shape(segments, q.dim(1), q.dim(2), q.dim(2), 1.0F);
  Tensor keys = k;
  Tensor scales;
  if (pages != nullptr) {
    write(ctx, k, segments, *pages, shape);
    keys = rows_of(pages->keys);
    scales = pages->key_scales;
  }
  ChosenTokens chosen;
  chosen.tail = selection.granularity == Granularity::kPool;
  chosen.budget = selection.top + (chosen.tail ? 1 : 0);
  chosen.size = selection.size;
  chosen.lists = weight.defined() ? 1 : q.dim(1);
  auto* pieces = ctx.scratch<int32_t>(q.dim(0) * chosen.lists * chosen.budget);
  chosen.pieces = pieces;
  run<choose_tokens_of>(ctx, q, [&]<class T>() {
    return ChooseTokens<T>{shape,           view<T>(q), key_rows<T>(keys, scales),
                           view<T>(weight), pieces,     chosen,
                           selection.local};
  });
  return chosen;
}

ChosenTokens choose_window(Context& ctx, const Segments& segments, int64_t window, int64_t sinks) {
  expect(
      window >= 1 && sinks >= 0,
      "[choose_window] expected a window of at least 1 token and sinks of at least 0, got {} and "
      "{}",
      window, sinks);
  const int64_t budget = window + sinks;
  bool all = true;
  for (int64_t s = 0; s < segments.count(); ++s) {
    all = all && segments.position[static_cast<size_t>(s)] + segments.length(s) <= budget;
  }
  if (all) {
    return {};
  }
  const int64_t count = segments.tokens() * budget;
  auto* positions = ctx.shared_scratch<int32_t>(count);
  for (int64_t s = 0; s < segments.count(); ++s) {
    const auto start = static_cast<int64_t>(segments.start[static_cast<size_t>(s)]);
    for (int64_t i = 0; i < segments.length(s); ++i) {
      const int64_t own = segments.position[static_cast<size_t>(s)] + i;
      int32_t* row = positions + (start + i) * budget;
      const int64_t near = std::max<int64_t>(own - window + 1, sinks);
      std::iota(row, row + sinks, 0);
      std::iota(row + sinks, row + budget, static_cast<int32_t>(near));
    }
  }
  return {ctx.to_device(std::span<const int32_t>(positions, static_cast<size_t>(count))), budget};
}

void write_index(Context& ctx, const Tensor& k, const Segments& segments, const IndexPages& pages) {
  AttentionShape shape = one_key_shape(segments, 1, k.dim(1), k.dim(1), 1.0F);
  write(ctx, k, segments, pages, shape);
}

}  // namespace cambium
