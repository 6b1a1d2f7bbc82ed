// What a sequence keeps for a unit between forward calls, and how a unit finds it.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "nn/batch.h"
#include "ops/attention/attention.h"

namespace cambium {

struct Turns;

/// A piece of state that a sequence keeps for a unit at a fixed size, fp32.
struct SlotPart {
  std::string name;
  std::vector<int64_t> shape;
  int64_t numel() const;
};

/// What a unit keeps for a sequence: pages that grow with its tokens, and slots of fixed size.
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

/// A unit's state for one batch, as its cache lays it out: pages ready for the batch's segments
/// and slot tensors (slots, ...) in the order of StateLayout::slots.
struct UnitState {
  KvPages pages;
  std::span<const Tensor> slots;
  const KvPages* pages_or_null() const { return pages.keys.defined() ? &pages : nullptr; }
  Tensor slot(size_t i) const { return slots[i]; }
};

/// What a unit sees of the forward call it is part of.
struct UnitInputs {
  const Batch* batch = nullptr;
  const Turns* rope = nullptr;
  const UnitState* state = nullptr;  // null in training

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
