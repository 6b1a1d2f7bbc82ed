// What one forward call runs over: packed tokens and the sequences they belong to.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "ops/segment_plans.h"
#include "ops/segments.h"

namespace cambium {

/// Tokens of one or more sequences in a row. It owns the lists that Segments points into and what
/// operations work out of them, and must outlive the tape of a forward call that uses it.
class Batch {
 public:
  /// Adds a piece of a sequence whose first token stands at `position`; `slot` is the sequence's
  /// state slot, or -1 without state. `length` is that of the whole sequence, which some rotations
  /// depend on (ops/rope/rope.h) and every piece of a sequence says alike; 0 = it ends here. A
  /// token -1 - i is the i-th of ForwardOptions::newest.
  void add(std::span<const int32_t> tokens, int64_t position = 0, int64_t slot = -1,
           int64_t length = 0);
  void clear();
  /// Forgets what operations worked out of it: their memory is a step's.
  void forget_plans() { plans_->clear(); }

  std::span<const int32_t> tokens() const { return tokens_; }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  Segments segments() const { return {starts_, positions_, slots_, plans_.get()}; }
  /// (S) tokens of the sequence that each segment belongs to.
  std::span<const int32_t> lengths() const { return lengths_; }
  /// Row of the last token of segment s.
  int64_t last_row(int64_t s) const { return starts_[static_cast<size_t>(s) + 1] - 1; }
  /// One more than the largest absolute position.
  int64_t positions_end() const { return positions_end_; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<int32_t> starts_{0};
  std::vector<int32_t> positions_;
  std::vector<int32_t> slots_;
  std::vector<int32_t> lengths_;
  int64_t positions_end_ = 0;
  std::unique_ptr<SegmentPlans> plans_ = std::make_unique<SegmentPlans>();
};

}  // namespace cambium
