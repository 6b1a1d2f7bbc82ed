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
  expect(q.dim(2) <= kMaxHeadDim && v.dim(2) <= kMaxHeadDim,
         "[attention] expected head dims up to {}, got {} and {}", kMaxHeadDim, q.dim(2), v.dim(2));
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
void write_rows(const AttentionShape& shape, const Tensor& rows, const Tensor& cache) {
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

void write_pages(const AttentionShape& shape, const Tensor& rows, const Tensor& cache) {
  if (rows.dtype == Dtype::kF64) {
    write_rows<double>(shape, rows, cache);
  } else {
    write_rows<float>(shape, rows, cache);
  }
}

/// The walk of a cache seen as (pages * page_size, Hkv, D).
Rows cache_walk(const Tensor& cache) {
  return {cache.dim(0) * cache.dim(1), cache.dim(2), cache.dim(2) * cache.dim(3), cache.dim(3)};
}

/// Few enough queries that reading the keys takes longer than multiplying them.
bool decodes(const AttentionShape& shape, int64_t s) {
  const int64_t length = shape.length(s);
  return length == 1 || length * shape.group() <= 16;
}

/// Items for the kernels, in the arena.
template <class Item>
class List {
 public:
  List(Arena& arena, int64_t capacity)
      : items_(static_cast<Item*>(arena.allocate(capacity * static_cast<int64_t>(sizeof(Item))))) {}
  void add(const Item& item) { items_[count_++] = item; }
  const Item* items() const { return items_; }
  int64_t count() const { return count_; }

 private:
  Item* items_;
  int64_t count_ = 0;
};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// The queries of long segments (of all, with `all`), longest work first within a segment.
List<AttentionBlock> make_blocks(Arena& arena, const AttentionShape& shape, bool all) {
  const auto blocks_of = [&](int64_t s) {
    return all || !decodes(shape, s) ? ceil_div(shape.length(s) * shape.group(), kRowsPerBlock) : 0;
  };
  int64_t capacity = 0;
  for (int64_t s = 0; s < shape.segments; ++s) {
    capacity += shape.kv_heads * blocks_of(s);
  }
  List<AttentionBlock> blocks(arena, capacity);
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t b = blocks_of(s); b-- > 0;) {
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        blocks.add({static_cast<int32_t>(s), static_cast<int32_t>(h), b * kRowsPerBlock});
      }
    }
  }
  return blocks;
}

List<AttentionSplit> make_splits(Arena& arena, const AttentionShape& shape) {
  struct Range {
    int64_t first, end;  // splits, counted from position 0
  };
  const auto range_of = [&](int64_t s) -> Range {
    const int64_t first = shape.first_position(s);
    const int64_t end = first + shape.length(s);
    if (first == end || !decodes(shape, s)) {
      return {0, 0};
    }
    return {shape.reach(first) / kPositionsPerSplit, ceil_div(end, kPositionsPerSplit)};
  };
  int64_t capacity = 0;
  for (int64_t s = 0; s < shape.segments; ++s) {
    capacity += range_of(s).end - range_of(s).first;
  }
  List<AttentionSplit> splits(arena, capacity);
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t first = shape.first_position(s);
    const int64_t floats = shape.length(s) * shape.heads * partial_size(shape);
    for (int64_t i = range_of(s).first; i < range_of(s).end; ++i) {
      splits.add({static_cast<int32_t>(s), std::max(i * kPositionsPerSplit, shape.reach(first)),
                  std::min((i + 1) * kPositionsPerSplit, first + shape.length(s)),
                  arena.empty(Dtype::kF32, {floats}).ptr<float>()});
    }
  }
  return splits;
}

/// What backward steps need to compute the probabilities again.
struct Softmax {
  Tensor largest;      // (T, H)
  Tensor inverse_sum;  // (T, H)
};

struct KeysAndValues {
  Rows k_rows, v_rows;
  Tensor k, v;  // or the pages
};

template <class Real>
void run_definition(const AttentionShape& shape, const Tensor& q, const KeysAndValues& kv,
                    const Tensor& y) {
  reference::attention_forward<Real>(shape, q.row_walk(), q.ptr<Real>(), kv.k_rows,
                                     kv.k.ptr<Real>(), kv.v_rows, kv.v.ptr<Real>(), y.ptr<Real>());
}

void run_kernels(Arena& arena, const AttentionShape& shape, const Tensor& q,
                 const KeysAndValues& kv, const Softmax* softmax, const Tensor& y) {
  const ArenaScope scope(arena);
  const AttentionInput in = {shape,          q.row_walk(),      kv.k_rows,        kv.v_rows,
                             q.ptr<float>(), kv.k.ptr<float>(), kv.v.ptr<float>()};
  const auto blocks = make_blocks(arena, shape, softmax != nullptr);
  attention_forward({in, blocks.items(), blocks.count(), y.ptr<float>(),
                     softmax == nullptr ? nullptr : softmax->largest.ptr<float>(),
                     softmax == nullptr ? nullptr : softmax->inverse_sum.ptr<float>()});
  if (softmax == nullptr) {
    const auto splits = make_splits(arena, shape);
    attention_decode({in, splits.items(), splits.count(), y.ptr<float>()});
  }
}

template <class Real>
void run_definition_backward(const AttentionShape& shape, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& y) {
  reference::attention_backward<Real>(
      shape, q.row_walk(), q.ptr<Real>(), k.row_walk(), k.ptr<Real>(), v.row_walk(), v.ptr<Real>(),
      y.grad_ptr<Real>(), q.grad_ptr<Real>(), k.grad_ptr<Real>(), v.grad_ptr<Real>());
}

/// Step i pairs key chunk c with query chunk c + i, so that no two pairs of a step share either.
void run_kernels_backward(Arena& arena, const AttentionShape& shape, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Softmax& softmax,
                          const Tensor& y) {
  const ArenaScope scope(arena);
  const int64_t rows = shape.kv_heads * scratch_rows(shape);
  const auto scratch = [&](int64_t dim) {
    return arena.empty(Dtype::kF32, {rows, padded_dim(dim)}).ptr<float>();
  };
  AttentionBackward args = {.in = {shape, q.row_walk(), k.row_walk(), v.row_walk(), q.ptr<float>(),
                                   k.ptr<float>(), v.ptr<float>()},
                            .pairs = nullptr,
                            .count = 0,
                            .y = y.ptr<float>(),
                            .dy = y.grad_ptr<float>(),
                            .largest = softmax.largest.ptr<float>(),
                            .inverse_sum = softmax.inverse_sum.ptr<float>(),
                            .keys = scratch(shape.head_dim),
                            .values = scratch(shape.value_dim),
                            .key_grads = scratch(shape.head_dim),
                            .value_grads = scratch(shape.value_dim),
                            .dq = q.grad_ptr<float>(),
                            .dk = k.grad_ptr<float>(),
                            .dv = v.grad_ptr<float>()};
  const auto chunks = [&](int64_t s) { return ceil_div(shape.length(s), kTokensPerChunk); };
  // The last query chunk that sees a key of chunk c.
  const auto last_query_chunk = [&](int64_t s, int64_t c) {
    const int64_t seen = (c + 1) * kTokensPerChunk - 1 + shape.window - 1;
    return shape.window == 0 ? chunks(s) - 1 : std::min(chunks(s) - 1, seen / kTokensPerChunk);
  };
  int64_t capacity = 0;
  int64_t steps = 0;
  for (int64_t s = 0; s < shape.segments; ++s) {
    capacity += shape.kv_heads * chunks(s);
    steps = std::max(steps, chunks(s));
  }
  for (int64_t step = 0; step < steps; ++step) {
    List<AttentionPair> pairs(arena, capacity);
    for (int64_t s = 0; s < shape.segments; ++s) {
      for (int64_t c = 0; c + step < chunks(s); ++c) {
        const int64_t last = last_query_chunk(s, c);
        for (int64_t h = 0; c + step <= last && h < shape.kv_heads; ++h) {
          pairs.add({static_cast<int32_t>(s), static_cast<int32_t>(h), static_cast<int32_t>(c),
                     static_cast<int32_t>(c + step), step == 0, c + step == last});
        }
      }
    }
    args.pairs = pairs.items();
    args.count = pairs.count();
    attention_backward(args);
  }
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
    write_pages(shape, k, pages->keys);
    write_pages(shape, v, pages->values);
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), v.dim(2)}, differentiate);
  const bool naive = ctx.use_reference(q);
  Softmax softmax;
  if (differentiate && !naive) {
    softmax.largest = ctx.arena->empty(Dtype::kF32, {q.dim(0), q.dim(1)});
    softmax.inverse_sum = ctx.arena->empty(Dtype::kF32, {q.dim(0), q.dim(1)});
  }
  const KeysAndValues kv = pages == nullptr
                               ? KeysAndValues{k.row_walk(), v.row_walk(), k, v}
                               : KeysAndValues{cache_walk(pages->keys), cache_walk(pages->values),
                                               pages->keys, pages->values};
  if (q.dtype == Dtype::kF64) {
    run_definition<double>(shape, q, kv, y);
  } else if (naive) {
    run_definition<float>(shape, q, kv, y);
  } else {
    run_kernels(*ctx.arena, shape, q, kv, differentiate ? &softmax : nullptr, y);
  }
  if (differentiate) {
    ctx.tape->record([arena = ctx.arena, naive, shape, q, k, v, softmax, y] {
      if (q.dtype == Dtype::kF64) {
        run_definition_backward<double>(shape, q, k, v, y);
      } else if (naive) {
        run_definition_backward<float>(shape, q, k, v, y);
      } else {
        run_kernels_backward(*arena, shape, q, k, v, softmax, y);
      }
    });
  }
  return y;
}

}  // namespace cambium
