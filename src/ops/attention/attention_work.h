// How attention's work is cut for the CPU kernels (attention_cpu_plan.cc cuts it).
#pragma once

#include "ops/attention/attention_kernels.h"

namespace cambium {

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

struct AttentionBlocks {
  Attention<float> in;
  const AttentionBlock* blocks;
  int64_t count;
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

/// Pairs that run together share neither keys nor queries, so that every gradient is the sum of its
/// pairs in the order of the calls.
struct AttentionPairs {
  Attention<float> in;
  const AttentionPair* pairs;
  int64_t count;
  float* keys;         // scratch (Hkv, scratch_rows, padded D), as are the next three
  float* values;       // (Hkv, scratch_rows, padded Dv)
  float* key_grads;    // (Hkv, scratch_rows, padded D)
  float* value_grads;  // (Hkv, scratch_rows, padded Dv)
};

/// Positions [first, last) of a segment, within one of AttentionShape::key_ranges and read for all
/// its queries.
inline constexpr int64_t kPositionsPerSplit = 256;
struct AttentionSplit {
  int32_t segment;
  int64_t first;
  int64_t last;
  int64_t partial;  // its rows of AttentionSplits::partials begin here: (tokens, H)
};
/// A query's share of a split: sums of values, the query itself, largest score, sum.
inline int64_t partial_size(const AttentionShape& shape) {
  return padded_dim(shape.value_dim) + padded_dim(shape.head_dim) + kDimPad;
}

struct AttentionSplits {
  Attention<float> in;
  const AttentionSplit* splits;  // those of a segment in a row, by position
  int64_t count;
  float* partials;  // (rows, partial_size) scratch
};

CAMBIUM_CPU_KERNEL(attention_blocks, AttentionBlocks)
CAMBIUM_CPU_KERNEL(attention_splits, AttentionSplits)
CAMBIUM_CPU_KERNEL(attention_pairs, AttentionPairs)
/// Of sink_logits alone: the sum over tokens of -p delta, p the sink's probability.
CAMBIUM_CPU_KERNEL(attention_sink_grads, Attention<float>)

}  // namespace cambium
