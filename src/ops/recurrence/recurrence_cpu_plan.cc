// How the recurrence is cut into work on the CPU.
#include <algorithm>

#include "base/parallel.h"
#include "ops/recurrence/recurrence_chunks.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

// Tokens of a chunk, a divisor of kRecurrenceMaxChunk: the pairs of a chunk cost as much as its
// state where they are about as many as a head has channels.
int64_t chunk_tokens(const Recurrence<float>& a) {
  return std::max(a.key_dim, a.dim) > 64 ? kRecurrenceMaxChunk : kRecurrenceMaxChunk / 2;
}

// Sets first[s] to the number of chunks before segment s, where asked, and returns them all.
int64_t count_chunks(const Recurrence<float>& a, int64_t* first) {
  const int64_t chunk = chunk_tokens(a);
  int64_t count = 0;
  for (int64_t s = 0; s < a.segments.count; ++s) {
    if (first != nullptr) {
      first[s] = count;
    }
    const int64_t begin = a.segments.position[s];
    const int64_t end = begin + a.segments.length(s);
    count += end > begin ? (end - 1) / chunk - begin / chunk + 1 : 0;
  }
  return count;
}

RecurrenceChunks make_chunks(const Recurrence<float>& a, Arena& arena) {
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 15;
  const int64_t work = a.segments.tokens() * a.heads * a.key_dim * a.dim;
  const int64_t pieces = std::min({a.segments.count * a.heads, 1 + work / kLeastWork,
                                   std::max<int64_t>(4 * num_threads(), 16)});
  int64_t* first = nullptr;
  if (a.kept != nullptr) {
    first = arena.empty(Dtype::kI64, {a.segments.count}).ptr<int64_t>();
    count_chunks(a, first);
  }
  const int64_t scratch = pieces * recurrence_scratch(a.key_dim, a.dim);
  return {.op = a,
          .chunk = chunk_tokens(a),
          .first_chunk = first,
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
  return count_chunks(a, nullptr) * a.heads * recurrence_padded(a.key_dim) *
         recurrence_padded(a.dim) * static_cast<int64_t>(sizeof(float));
}

void recurrence_forward::cpu(const Recurrence<float>& a, Arena& arena) {
  recurrence_chunks_forward(make_chunks(a, arena));
}

void recurrence_backward::cpu(const Recurrence<float>& a, Arena& arena) {
  RecurrenceChunks chunks = make_chunks(a, arena);
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
