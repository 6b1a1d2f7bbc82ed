// How attention's work is cut for the CPU: blocks of queries where there are many, splits of the
// keys where there are few, pairs of chunks in the backward pass.
#include <algorithm>

#include "ops/attention/attention_work.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

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

/// Zeroed by the first pair of each chunk of keys.
float* scratch(Arena& arena, const AttentionShape& shape, int64_t dim) {
  return arena.empty(Dtype::kF32, {shape.kv_heads * scratch_rows(shape) * padded_dim(dim)})
      .ptr<float>();
}

}  // namespace

void attention_forward::cpu(const Attention<float>& a, Arena& arena) {
  const bool training = a.largest != nullptr;
  const auto blocks = make_blocks(arena, a.shape, training);
  attention_blocks({a, blocks.items(), blocks.count()});
  if (!training) {
    const auto splits = make_splits(arena, a.shape);
    attention_splits({a, splits.items(), splits.count()});
  }
}

void attention_backward::cpu(const Attention<float>& a, Arena& arena) {
  const AttentionShape& shape = a.shape;
  AttentionPairs args = {.in = a,
                         .pairs = nullptr,
                         .count = 0,
                         .keys = scratch(arena, shape, shape.head_dim),
                         .values = scratch(arena, shape, shape.value_dim),
                         .key_grads = scratch(arena, shape, shape.head_dim),
                         .value_grads = scratch(arena, shape, shape.value_dim)};
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
    attention_pairs(args);
  }
}

}  // namespace cambium
