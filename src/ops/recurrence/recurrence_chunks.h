// Private to the operation on the CPU: its work in chunks of tokens, which the plan deals to
// pieces.
#pragma once

#include "ops/recurrence/recurrence_kernels.h"

namespace cambium {

/// Matrices of a chunk are padded to multiples of this in every direction.
inline constexpr int64_t kRecurrenceTile = 16;
inline constexpr int64_t kRecurrenceMaxChunk = 64;

constexpr int64_t recurrence_padded(int64_t n) {
  return (n + kRecurrenceTile - 1) / kRecurrenceTile * kRecurrenceTile;
}

/// Floats of scratch memory for one piece of work.
constexpr int64_t recurrence_scratch(int64_t key_dim, int64_t dim) {
  const int64_t k = recurrence_padded(key_dim);
  const int64_t v = recurrence_padded(dim);
  const int64_t c = kRecurrenceMaxChunk;
  return 14 * c * k + 7 * c * v + 3 * k * v + 5 * c * c + 50 * k + 2 * c;
}

struct RecurrenceChunks {
  Recurrence<float> op;
  int64_t chunk;  // tokens, a divisor of kRecurrenceChunk; cut at its multiples of position
  /// (segments): how many chunks the segments before have.
  const int64_t* first_chunk;
  /// (chunks, heads, padded K, padded V): the states at chunk starts; forward writes them where not
  /// null, backward reads them.
  float* chunk_states;
  /// Segments x heads are dealt to this many pieces of work, each with its own scratch.
  int64_t pieces;
  float* scratch;  // (pieces, recurrence_scratch())
  // Backward only. Where value heads share keys, the gradients by q and k of each value head, to be
  // summed in order; else null.
  float* dq_heads;    // (T, heads, K)
  float* dk_heads;    // (T, heads, K)
  float* dskip_part;  // (segments, heads) or null
};

CAMBIUM_CPU_KERNEL(recurrence_chunks_forward, RecurrenceChunks)
CAMBIUM_CPU_KERNEL(recurrence_chunks_backward, RecurrenceChunks)

}  // namespace cambium
