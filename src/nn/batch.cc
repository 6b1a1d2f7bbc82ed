#include "nn/batch.h"

#include <algorithm>

namespace cambium {

void Batch::add(std::span<const int32_t> tokens, int64_t position, int64_t slot, int64_t length) {
  CAMBIUM_CHECK(!tokens.empty(), "a segment has at least one token");
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  starts_.push_back(static_cast<int32_t>(tokens_.size()));
  positions_.push_back(static_cast<int32_t>(position));
  slots_.push_back(static_cast<int32_t>(slot));
  const int64_t end = position + static_cast<int64_t>(tokens.size());
  lengths_.push_back(static_cast<int32_t>(length > 0 ? length : end));
  positions_end_ = std::max(positions_end_, end);
  plans_->clear();
}

void Batch::clear() {
  tokens_.clear();
  starts_.assign(1, 0);
  positions_.clear();
  slots_.clear();
  lengths_.clear();
  positions_end_ = 0;
  plans_->clear();
}

}  // namespace cambium
