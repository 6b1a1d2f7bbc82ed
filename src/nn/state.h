// What a sequence keeps for a unit between forward calls, and how a unit finds it.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "nn/batch.h"
#include "tensor/tensor.h"

namespace cambium {

struct RouterTap;
struct Turns;

/// One array of a unit's state. Units name their parts by an enum whose values are the places in
/// StateLayout::pages or ::slots.
struct Part {
  std::string name;
  std::vector<int64_t> shape;  // of one token in pages, of one sequence in slots
  Dtype dtype = Dtype::kF32;
  int64_t bytes() const;
};

/// What a unit keeps for a sequence: pages that grow with its tokens (keys and values, latents,
/// index keys), and slots of fixed size (recurrent states, convolution tails).
struct StateLayout {
  std::vector<Part> pages;
  std::vector<Part> slots;
  int64_t window = 0;  // pages further back than this many tokens are given back; 0 = none are
  int64_t sinks = 0;   // but those of the first tokens are kept

  /// Most tokens that stay in reach; 0 = all.
  int64_t most_tokens() const { return window == 0 ? 0 : window + sinks; }

  bool empty() const { return pages.empty() && slots.empty(); }
  /// Bytes a token adds while it is in reach.
  int64_t bytes_per_token() const;
  /// Bytes a sequence takes in slots whatever its length.
  int64_t bytes_per_sequence() const;
  /// The same with pages in this type. In f8 rows (last axes) have scales in bf16: a part more for
  /// each of the pages, after them and in their order.
  StateLayout kept_in(Dtype values) const;
};

/// A unit's state for one batch, as its cache lays it out: tensors in the order of the layout,
/// pages (pages, page_size, part...) and slots (slots, part...), and where the batch's segments
/// find their pages (KvPages says how).
struct UnitState {
  std::span<const Tensor> pages;
  std::span<const Tensor> slots;
  std::span<const int32_t> table;  // (S, pages_per_segment)
  int64_t pages_per_segment = 0;
};

/// What a unit sees of the forward call it is part of.
struct UnitInputs {
  const Batch* batch = nullptr;
  const Turns* rope = nullptr;
  const UnitState* state = nullptr;  // null in training
  /// The unit is run again for its backward steps: nothing reads the values of its result.
  bool unread = false;
  /// Names the stream that a unit draws from while it is trained (base/random.h); 0 = nothing is
  /// drawn.
  uint64_t noise = 0;
  RouterTap* router = nullptr;  // null: routers are trained by the model's losses alone

  Segments segments() const {
    Segments s = batch->segments();
    if (state == nullptr) {
      s.slot = {};
    }
    return s;
  }
  /// A part of the state by the unit's enum; undefined in training.
  template <class Part>
  Tensor page(Part part) const {
    return state == nullptr ? Tensor{} : state->pages[static_cast<size_t>(part)];
  }
  template <class Part>
  Tensor slot(Part part) const {
    return state == nullptr ? Tensor{} : state->slots[static_cast<size_t>(part)];
  }
};

}  // namespace cambium
