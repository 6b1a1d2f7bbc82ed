// How attention's work is cut for the CPU: blocks of queries where there are many, splits of the
// keys where there are few, pairs of chunks in the backward pass. The lists depend on the segments
// and little else, so that layers of one shape share them.
#include <algorithm>
#include <vector>

#include "ops/attention/attention_work.h"
#include "ops/segment_plans.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

/// Few enough queries that reading the keys takes longer than multiplying them.
bool decodes(const AttentionShape& shape, int64_t s) {
  const int64_t length = shape.length(s);
  return length == 1 || length * shape.group() <= 16;
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// What the lists depend on beside the segments.
struct PlanKey {
  int64_t heads, kv_heads;
  int64_t window, sinks;
  bool paged;  // else every segment stands at position 0
  bool training;
  bool operator==(const PlanKey&) const = default;
};

PlanKey key_of(const AttentionShape& shape, bool training) {
  return {shape.heads, shape.kv_heads, shape.window, shape.sinks, shape.position != nullptr,
          training};
}

struct ForwardPlan {
  using Key = PlanKey;
  Key key;
  std::vector<AttentionBlock> blocks;
  std::vector<AttentionSplit> splits;
  int64_t partials = 0;  // rows of AttentionSplits::partials
};

/// The queries of long segments (of all, in training), longest work first within a segment.
void add_blocks(const AttentionShape& shape, ForwardPlan& plan) {
  for (int64_t s = 0; s < shape.segments; ++s) {
    if (!plan.key.training && decodes(shape, s)) {
      continue;
    }
    for (int64_t b = ceil_div(shape.length(s) * shape.group(), kRowsPerBlock); b-- > 0;) {
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        plan.blocks.push_back(
            {static_cast<int32_t>(s), static_cast<int32_t>(h), b * kRowsPerBlock});
      }
    }
  }
}

void add_splits(const AttentionShape& shape, ForwardPlan& plan) {
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t first = shape.first_position(s);
    const int64_t end = first + shape.length(s);
    if (first == end || !decodes(shape, s)) {
      continue;
    }
    for (const KeyRange& keys : shape.key_ranges(first, end - 1)) {
      for (int64_t i = keys.first / kPositionsPerSplit; i * kPositionsPerSplit < keys.end; ++i) {
        plan.splits.push_back({static_cast<int32_t>(s),
                               std::max(i * kPositionsPerSplit, keys.first),
                               std::min((i + 1) * kPositionsPerSplit, keys.end), plan.partials});
        plan.partials += shape.length(s) * shape.heads;
      }
    }
  }
}

ForwardPlan forward_plan(const AttentionShape& shape, const PlanKey& key) {
  ForwardPlan plan{key, {}, {}};
  add_blocks(shape, plan);
  if (!key.training) {
    add_splits(shape, plan);
  }
  return plan;
}

/// Pairs by step: step i are those whose queries stand i chunks behind the keys.
struct BackwardPlan {
  using Key = PlanKey;
  Key key;
  std::vector<AttentionPair> pairs;
  std::vector<size_t> ends;  // of each step's pairs
};

BackwardPlan backward_plan(const AttentionShape& shape, const PlanKey& key) {
  BackwardPlan plan{key, {}, {}};
  const auto chunks = [&](int64_t s) { return ceil_div(shape.length(s), kTokensPerChunk); };
  // The last query chunk that sees a key of chunk c.
  const auto last_query_chunk = [&](int64_t s, int64_t c) {
    const int64_t seen = (c + 1) * kTokensPerChunk - 1 + shape.window - 1;
    return shape.window == 0 || c * kTokensPerChunk < shape.sinks
               ? chunks(s) - 1
               : std::min(chunks(s) - 1, seen / kTokensPerChunk);
  };
  int64_t steps = 0;
  for (int64_t s = 0; s < shape.segments; ++s) {
    steps = std::max(steps, chunks(s));
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t s = 0; s < shape.segments; ++s) {
      for (int64_t c = 0; c + step < chunks(s); ++c) {
        const int64_t last = last_query_chunk(s, c);
        for (int64_t h = 0; c + step <= last && h < shape.kv_heads; ++h) {
          plan.pairs.push_back({static_cast<int32_t>(s), static_cast<int32_t>(h),
                                static_cast<int32_t>(c), static_cast<int32_t>(c + step), step == 0,
                                c + step == last});
        }
      }
    }
    plan.ends.push_back(plan.pairs.size());
  }
  return plan;
}

/// Zeroed by the first pair of each chunk of keys.
float* scratch(Arena& arena, const AttentionShape& shape, int64_t dim) {
  return arena.empty(Dtype::kF32, {shape.kv_heads * scratch_rows(shape) * padded_dim(dim)})
      .ptr<float>();
}

}  // namespace

void attention_forward::cpu(const Attention<float>& a, Arena& arena) {
  const PlanKey key = key_of(a.shape, a.largest != nullptr);
  const auto plan =
      plan_for<ForwardPlan>(a.shape.plans, key, [&] { return forward_plan(a.shape, key); });
  attention_blocks({a, plan->blocks.data(), static_cast<int64_t>(plan->blocks.size())});
  if (!plan->splits.empty()) {
    float* partials =
        arena.empty(Dtype::kF32, {plan->partials * partial_size(a.shape)}).ptr<float>();
    attention_splits({a, plan->splits.data(), static_cast<int64_t>(plan->splits.size()), partials});
  }
}

void attention_backward::cpu(const Attention<float>& a, Arena& arena) {
  const AttentionShape& shape = a.shape;
  if (a.sink_logits.grad != nullptr) {
    attention_sink_grads(a);
  }
  const PlanKey key = key_of(shape, true);
  const auto plan =
      plan_for<BackwardPlan>(shape.plans, key, [&] { return backward_plan(shape, key); });
  AttentionPairs args = {.in = a,
                         .pairs = plan->pairs.data(),
                         .count = 0,
                         .keys = scratch(arena, shape, shape.head_dim),
                         .values = scratch(arena, shape, shape.value_dim),
                         .key_grads = scratch(arena, shape, shape.head_dim),
                         .value_grads = scratch(arena, shape, shape.value_dim)};
  for (const size_t end : plan->ends) {
    args.count = plan->pairs.data() + end - args.pairs;
    attention_pairs(args);
    args.pairs += args.count;
  }
}

}  // namespace cambium
