// What the indexes of attention units share: how much of what a token chooses, and where the keys
// of the index go. Which queries and keys an index has is its unit's.
#pragma once

#include "nn/unit.h"
#include "ops/selection/selection.h"

namespace cambium {

/// The names of the options that read_selection reads.
inline const std::vector<std::string>& selection_options() {
  static const std::vector<std::string> names = {"index_top", "index_of", "index_size",
                                                 "index_local"};
  return names;
}

/// index_top, of `index_of` ("tokens", "blocks" or "pools"; a unit's own where it is not said), of
/// index_size tokens each; index_local (1) of the blocks that are always chosen.
Selection read_selection(const Options& options, const char* owner, const char* of);

/// Writes the keys of the index k (T, 1, D) to their pages, where there is state (`pages` and, of
/// f8, `scales`), and chooses by q (T, H, D) and weight (T, H) or nothing. No choice where every
/// token looks at all before it.
ChosenTokens choose_by_index(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& weight,
                             const UnitInputs& inputs, const Selection& selection,
                             const Tensor& pages, const Tensor& scales);

/// Neighbours among the call's tokens that all look at everything before them, or all choose: as
/// segments of their own.
struct AttendingRun {
  bool all;
  int64_t segment;  // the first of the call's whose tokens these are; the others follow
  int64_t token;    // the first of the call's
  std::vector<int32_t> start, position;

  Segments segments() const { return {start, position, {}}; }
};
std::vector<AttendingRun> attending_runs(const Segments& segments, const Selection& selection);

/// Whether every token of the call looks at all before it.
bool looks_at_all(const UnitInputs& inputs, const Selection& selection);

}  // namespace cambium
