// Cache: the state that a model keeps for its sequences. Of each unit, the parts that grow with the
// tokens live in pages that are taken as a sequence grows and, behind a window and its sinks, given
// back; the parts of fixed size live in one slot a sequence. What is given back is filled with NaN,
// so that whatever still read it would show.
#pragma once

#include <span>
#include <vector>

#include "serve/cache_plan.h"
#include "tensor/arena.h"

namespace cambium {

class Cache {
 public:
  /// Error when memory_bytes does not hold a single sequence.
  explicit Cache(const Model& model, const CacheConfig& config = {});

  /// Error when a sequence of `tokens` tokens could never fit, even alone.
  void expect_fits(int64_t tokens) const;
  /// Opens a sequence and sets memory aside for its first `tokens` tokens. Returns its slot
  /// (Batch::add), or -1 while there is no room. Error when it could never fit.
  int64_t open(int64_t tokens);
  /// Sets memory aside for the first `tokens` tokens of an open sequence; false, and nothing
  /// changes, while there is no room.
  bool extend(int64_t slot, int64_t tokens);
  /// Gives slot and pages back.
  void close(int64_t slot);
  /// Pages and slots for a batch of open sequences, one UnitState for each of Model::state_layouts,
  /// valid until the next call. At most one segment a sequence, of at most piece_tokens.
  std::span<const UnitState> prepare(const Batch& batch);

  const CachePlan& plan() const { return plan_; }
  /// Sequences that can be open at once; fewer than asked for if memory is short.
  int64_t capacity() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t open_sequences() const { return open_; }
  /// Pages that open sequences hold, over all groups.
  int64_t pages_in_use() const;
  /// Sets all that the cache holds to zeros: for those who measure and need no text.
  void clear();
  /// Entries of all page tables of the largest batch.
  int64_t table_entries() const;
  /// Bytes allocated by now.
  int64_t bytes() const;

 private:
  struct Group {
    PageGroup plan;
    int64_t limit = 0;      // pages there may ever be
    int64_t set_aside = 0;  // pages promised to open sequences
    int64_t pages = 0;      // pages there are
    std::vector<int32_t> free;
    std::vector<int32_t> table;  // (S, pages_per_segment) of the batch
    int64_t pages_per_segment = 0;
  };
  /// A unit's state: the memory, and the tensors that units see.
  struct Unit {
    std::vector<OwnedTensor> pages, slots;
    std::vector<Tensor> page_views, slot_views;
  };
  struct Sequence {
    bool open = false;
    int64_t tokens = 0;                       // that memory is set aside for
    std::vector<std::vector<int32_t>> pages;  // by group; -1 = not held
  };

  void divide_memory();
  int32_t take_page(Group& group);
  void give_back(Group& group, int32_t page);
  void grow(Group& group);
  void reach(Group& group, std::vector<int32_t>& pages, int64_t begin, int64_t end);
  Unit& unit(int64_t place) { return units_[static_cast<size_t>(place)]; }
  void poison_slot(int64_t slot);

  CachePlan plan_;
  Device device_;
  std::vector<Group> groups_;
  std::vector<Sequence> sequences_;  // by slot
  std::vector<Unit> units_;          // as CachePlan::layouts
  std::vector<UnitState> states_;    // as CachePlan::layouts
  int64_t open_ = 0;
};

}  // namespace cambium
