// What one forward call runs over: packed tokens and the sequences they belong to.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/segments.h"

namespace cambium {

class RopeTable;

/// Tokens of one or more sequences in a row. It owns the lists that Segments points into and must
/// outlive the tape of a forward call that uses it.
class Batch {
 public:
  /// Adds a piece of a sequence whose first token stands at `position`; `slot` is the sequence's
  /// state slot, or -1 without state.
  void add(std::span<const int32_t> tokens, int64_t position = 0, int64_t slot = -1);
  void clear();

  std::span<const int32_t> tokens() const { return tokens_; }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  Segments segments() const { return {starts_, positions_, slots_}; }
  /// Row of the last token of segment s.
  int64_t last_row(int64_t s) const { return starts_[static_cast<size_t>(s) + 1] - 1; }
  /// One more than the largest absolute position.
  int64_t positions_end() const { return positions_end_; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<int32_t> starts_{0};
  std::vector<int32_t> positions_;
  std::vector<int32_t> slots_;
  int64_t positions_end_ = 0;
};

/// A piece of state that a sequence keeps for a layer at a fixed size, fp32.
struct SlotPart {
  std::string name;
  std::vector<int64_t> shape;
  int64_t numel() const;
};

/// What a layer keeps for a sequence: pages that grow with its tokens, and slots of fixed size.
struct StateLayout {
  int64_t kv_heads = 0;  // 0 = no pages
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t window = 0;  // pages further back than this many tokens are given back; 0 = none are
  std::vector<SlotPart> slots;

  /// Bytes a token adds while it is in reach, at `value_bytes` a number.
  int64_t bytes_per_token(int64_t value_bytes) const {
    return kv_heads * (key_dim + value_dim) * value_bytes;
  }
  /// Bytes a sequence takes whatever its length.
  int64_t bytes_per_sequence() const;
};

/// A layer's state for one batch, as its cache lays it out: pages ready for the batch's segments
/// and slot tensors (slots, ...) in the order of StateLayout::slots.
struct LayerState {
  KvPages pages;
  std::span<const Tensor> slots;
  const KvPages* pages_or_null() const { return pages.keys.defined() ? &pages : nullptr; }
  Tensor slot(size_t i) const { return slots[i]; }
};

/// What a layer sees of the call it is part of.
struct ForwardInputs {
  const Batch* batch = nullptr;
  const RopeTable* rope = nullptr;
  const LayerState* state = nullptr;  // null in training

  Segments segments() const {
    Segments s = batch->segments();
    if (state == nullptr) {
      s.slot = {};
    }
    return s;
  }
  Tensor slot(size_t i) const { return state == nullptr ? Tensor{} : state->slot(i); }
};

}  // namespace cambium
