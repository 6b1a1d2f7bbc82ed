// The best placement that a budget allows, where quality is the surrogate's sum over neighbours.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "hybrid/surrogate.h"

namespace cambium {

/// What a placement may be.
struct PlacementLimits {
  std::vector<std::vector<double>> cost;  // (L, M), from 0; infinite = no such mixer in that layer
  double budget = 0.0;                    // of the sum
  std::vector<int64_t> at_least;          // of each kind (M)
  std::vector<int64_t> at_most;
  /// Of each kind, the fewest layers where it has any at all (M); empty = 1 of each.
  std::vector<int64_t> none_or_at_least = {};

  /// The fewest layers that a kind of which there are so many may have in the end.
  int64_t fewest(size_t kind, int64_t count) const;
  int64_t layers() const { return static_cast<int64_t>(cost.size()); }
  int64_t kinds() const { return static_cast<int64_t>(at_most.size()); }
  double cost_of(const Choices& choices) const;
  bool allow(const Choices& choices) const;
};

/// One point of the front.
struct Optimum {
  Choices choices;
  double cost = 0.0;
  double value = 0.0;
};

/// The placements of least value for each cost within the budget: those that no cheaper one beats,
/// the cheapest first. Empty where the limits allow none. Exact: a dynamic programme over the
/// layers whose states are the kinds of the last R layers and the counts that limits are about, and
/// which keeps of each state what is not beaten in both cost and value. Costs nearer than a
/// millionth of the budget count as equal.
std::vector<Optimum> placement_front(const Energy& energy, const PlacementLimits& limits);

/// The last of the front.
std::optional<Choices> best_placement(const Energy& energy, const PlacementLimits& limits);

/// The cheapest placement whose counts the limits allow, whatever the budget; null where none is.
std::optional<Choices> cheapest_placement(const PlacementLimits& limits);

}  // namespace cambium
