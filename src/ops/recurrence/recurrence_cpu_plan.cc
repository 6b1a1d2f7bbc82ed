// How the recurrence is cut into work on the CPU.
#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "ops/recurrence/recurrence_chunks.h"
#include "ops/segment_plans.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

// Tokens of a chunk, a divisor of kRecurrenceMaxChunk: the pairs of a chunk cost as much as its
// state where they are about as many as a head has channels.
int64_t chunk_tokens(const Recurrence<float>& a) {
  return std::max(a.key_dim, a.dim) > 64 ? kRecurrenceMaxChunk : kRecurrenceMaxChunk / 2;
}

struct ChunkPlan {
  using Key = int64_t;
  Key key;                     // tokens of a chunk
  std::vector<int64_t> first;  // (segments + 1): chunks before each segment, and all of them
};

std::shared_ptr<const ChunkPlan> chunk_plan(const Recurrence<float>& a) {
  const int64_t chunk = chunk_tokens(a);
  return plan_for<ChunkPlan>(a.segments.plans, chunk, [&] {
    ChunkPlan plan{chunk, {0}};
    for (int64_t s = 0; s < a.segments.count; ++s) {
      const int64_t begin = a.segments.position[s];
      const int64_t end = begin + a.segments.length(s);
      const int64_t count = end > begin ? (end - 1) / chunk - begin / chunk + 1 : 0;
      plan.first.push_back(plan.first.back() + count);
    }
    return plan;
  });
}

/// `first_chunk` is read where states are kept.
RecurrenceChunks make_chunks(const Recurrence<float>& a, const int64_t* first_chunk, Arena& arena) {
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 15;
  const int64_t work = a.segments.tokens() * a.heads * a.key_dim * a.dim;
  const int64_t pieces = std::min({a.segments.count * a.heads, 1 + work / kLeastWork,
                                   std::max<int64_t>(4 * num_threads(), 16)});
  const int64_t scratch = pieces * recurrence_scratch(a.key_dim, a.dim);
  return {.op = a,
          .chunk = chunk_tokens(a),
          .first_chunk = first_chunk,
          .chunk_states = static_cast<float*>(a.kept),
          .pieces = pieces,
          .scratch = arena.empty(Dtype::kF32, {scratch}).ptr<float>(),
          .dq_heads = nullptr,
          .dk_heads = nullptr,
          .dskip_part = nullptr};
}

}  // namespace

// The states at chunk starts, the first included, are all that backward needs.
int64_t recurrence_forward::cpu_keeps(const Recurrence<float>& a) {
  return chunk_plan(a)->first.back() * a.heads * recurrence_padded(a.key_dim) *
         recurrence_padded(a.dim) * static_cast<int64_t>(sizeof(float));
}

void recurrence_forward::cpu(const Recurrence<float>& a, Arena& arena) {
  const auto plan = a.kept == nullptr ? nullptr : chunk_plan(a);
  recurrence_chunks_forward(make_chunks(a, plan == nullptr ? nullptr : plan->first.data(), arena));
}

void recurrence_backward::cpu(const Recurrence<float>& a, Arena& arena) {
  const auto plan = chunk_plan(a);
  RecurrenceChunks chunks = make_chunks(a, plan->first.data(), arena);
  if (a.key_heads < a.heads) {
    const auto heads = [&] {
      return arena.empty(Dtype::kF32, {a.segments.tokens(), a.heads, a.key_dim}).ptr<float>();
    };
    chunks.dq_heads = heads();
    chunks.dk_heads = heads();
  }
  if (a.skip.grad != nullptr) {
    chunks.dskip_part = arena.empty(Dtype::kF32, {a.segments.count, a.heads}).ptr<float>();
  }
  recurrence_chunks_backward(chunks);
}

}  // namespace cambium
