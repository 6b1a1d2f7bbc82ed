// The search for the placement that loses least within a budget: measure a few placements, fit the
// surrogate, measure where it expects most, and so on.
//
//   1. a quarter at random: how many layers get each kind is uniform, which layers is shuffled;
//      with the models of one kind alone
//   2. a quarter near the front: the optimum, within the limits, of a draw from the posterior each
//   3. the rest by regret: of the optima of the mean and of draws and of the neighbours of the best
//      ones found (one layer's kind changed, or those of two layers exchanged), the placement whose
//      measurement is expected to lower the best value most
//   4. after every eighth, a check by real measurements: beam search from the best ones found over
//      their neighbours, until a round finds nothing better
//
// Where there are no more placements than evaluations, all are measured instead.
//
// What is measured next follows from the options and the values alone, so that a search whose
// values are kept goes on as if it had never stopped.
#pragma once

#include <functional>
#include <string>

#include "eval/report/summary.h"
#include "hybrid/placement_optimum.h"
#include "hybrid/surrogate.h"

namespace cambium {

struct SearchOptions {
  PlacementLimits limits;
  int64_t reach = 1;
  int64_t evaluations = 200;  // placements measured
  int64_t draws = 16;         // from the posterior, for each placement by regret
  int64_t beam = 4;           // 0 = no check by beam search
  uint64_t seed = 1;
};

/// A measured placement. Smaller = better.
struct SearchStep {
  Choices choices;
  Measured value;
  double predicted = 0.0;  // before it was measured; NaN where nothing was
  std::string by;          // "start", "front", "regret", "beam" or "all"
};

struct SearchResult {
  std::vector<SearchStep> steps;
  size_t best = 0;             // the step of least value within the limits
  Measured predicted;          // of the best by the others' values, with its 95 % interval
  std::vector<Optimum> front;  // predicted, on the surrogate's scale given back as values
  Strengths strengths;
  bool log_scale = false;
  /// Rank correlation of values and what the others say of them, of the better half.
  double rank = 0.0;
};

using MeasurePlacement = std::function<Measured(const Choices& choices)>;

/// Error where no placement is within the limits, saying the least that one costs.
/// `progress` is told how many are measured and the best value within the limits.
SearchResult search_placement(const SearchOptions& options, const MeasurePlacement& measure,
                              const std::function<void(int64_t done, double best)>& progress = {});

}  // namespace cambium
