// Private to the operation: what its definition and its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "tensor/rows.h"

namespace cambium {

/// Which tokens see which. The keys of segment s stand at positions 0 .. last; without pages
/// position 0 is the segment's own first token, and its key rows are the segment's rows.
struct AttentionShape {
  int64_t segments;
  const int32_t* start;     // (S + 1)
  const int32_t* position;  // (S), or null without pages: all zero
  const int32_t* table;     // (S, pages_per_segment), or null without pages
  int64_t pages_per_segment;
  int64_t page_size;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;   // of q and k
  int64_t value_dim;  // of v
  float scale;
  int64_t window;  // 0 = unbounded

  int64_t group() const { return heads / kv_heads; }
  int64_t length(int64_t s) const { return start[s + 1] - start[s]; }
  int64_t first_position(int64_t s) const { return position == nullptr ? 0 : position[s]; }
  /// The first position that a token at position p sees.
  int64_t reach(int64_t p) const { return window > 0 && p >= window ? p - window + 1 : 0; }
  /// Row of the key (or value) tensor that holds position p.
  int64_t key_row(int64_t s, int64_t p) const {
    return table == nullptr
               ? start[s] + p
               : table[s * pages_per_segment + p / page_size] * page_size + p % page_size;
  }
};

struct AttentionInput {
  AttentionShape shape;
  Rows q_rows;
  Rows k_rows;
  Rows v_rows;
  const float* q;
  const float* k;
  const float* v;
};

/// The kernels keep a head in buffers of this many numbers.
inline constexpr int64_t kMaxHeadDim = 256;
/// Head dims are padded to this in scratch memory.
inline constexpr int64_t kDimPad = 16;
inline int64_t padded_dim(int64_t dim) {
  return (dim + kDimPad - 1) / kDimPad * kDimPad;
}

// The queries that read one key-value head of a segment are numbered as rows: token by token, and
// for each token the heads of the group.

/// Rows [first_row, first_row + kRowsPerBlock) of a segment and key-value head, as far as there
/// are.
inline constexpr int64_t kRowsPerBlock = 128;
struct AttentionBlock {
  int32_t segment;
  int32_t kv_head;
  int64_t first_row;
};

struct AttentionForward {
  AttentionInput in;
  const AttentionBlock* blocks;
  int64_t count;
  float* y;            // (T, H, Dv) contiguous
  float* largest;      // (T, H): the largest score, times log2(e); null when not wanted
  float* inverse_sum;  // (T, H): 1 / sum of exp(score - largest)
};

/// Backward steps take the keys of a segment in chunks of this many tokens, and the queries too.
inline constexpr int64_t kTokensPerChunk = 256;
struct AttentionPair {
  int32_t segment;
  int32_t kv_head;
  int32_t key_chunk;
  int32_t query_chunk;
  bool first;  // of this key chunk: fill the scratch memory
  bool last;   // of this key chunk: add dk and dv to the gradients
};

/// Scratch rows of a segment: its keys, padded so that whole panels can be read and written.
inline constexpr int64_t kRowPad = 8;
inline int64_t scratch_row(const AttentionShape& shape, int64_t s) {
  return shape.start[s] + s * kRowPad;
}
inline int64_t scratch_rows(const AttentionShape& shape) {
  return scratch_row(shape, shape.segments);
}

/// Pairs that run together share neither keys nor queries, so that every gradient is the sum of
/// its pairs in the order of the calls.
struct AttentionBackward {
  AttentionInput in;
  const AttentionPair* pairs;
  int64_t count;
  const float* y;
  const float* dy;  // (T, H, Dv) contiguous
  const float* largest;
  const float* inverse_sum;
  float* keys;         // scratch (Hkv, scratch_rows, padded D), as are the next three
  float* values;       // (Hkv, scratch_rows, padded Dv)
  float* key_grads;    // (Hkv, scratch_rows, padded D)
  float* value_grads;  // (Hkv, scratch_rows, padded Dv)
  float* dq;           // strided as q, k, v; null where not wanted
  float* dk;
  float* dv;
};

/// Positions [first, last) of a segment, read for all its queries.
inline constexpr int64_t kPositionsPerSplit = 256;
struct AttentionSplit {
  int32_t segment;
  int64_t first;
  int64_t last;
  float* partial;  // (rows of all heads, partial_size)
};
/// A query's share of a split: sums of values, the query itself, largest score, sum.
inline int64_t partial_size(const AttentionShape& shape) {
  return padded_dim(shape.value_dim) + padded_dim(shape.head_dim) + kDimPad;
}

struct AttentionDecode {
  AttentionInput in;
  const AttentionSplit* splits;  // those of a segment in a row, by position
  int64_t count;
  float* y;
};

CAMBIUM_CPU_KERNEL(attention_forward, AttentionForward)
CAMBIUM_CPU_KERNEL(attention_backward, AttentionBackward)
CAMBIUM_CPU_KERNEL(attention_decode, AttentionDecode)

}  // namespace cambium
