// The search for a placement from end to end: costs measured, placements measured and searched, the
// chosen one measured on other documents beside those that simpler rules choose at the same budget.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "hybrid/placement_file.h"
#include "hybrid/placement_judge.h"

namespace cambium {

struct ChoiceOptions {
  std::string metric = "reverse-kl";  // one of placement_metrics()
  CostConfig cost;
  /// What a model may cost, of what the teacher costs; 0 = `budget`.
  double share = 0.0;
  double budget = 0.0;  // in the cost's unit, of the whole model
  /// Layers that a kind gets, by its name; of none_or_at_least, if it gets any. A kind of which a
  /// single layer costs more time than its share (LayerCosts::slow_alone) gets none or two.
  std::map<std::string, int64_t> at_least, at_most, none_or_at_least;
  int64_t evaluations = 200;
  int64_t reach = 1;
  int64_t beam = 4;
  uint64_t seed = 1;
  /// Files of `cambium score` of the teacher whose placements are compared with the chosen one.
  std::vector<std::filesystem::path> scores;
  std::filesystem::path trace;  // empty = nothing is kept
  bool fresh = false;
  std::string label = "place";  // of the progress lines
  std::string command;          // for the file
};

/// `choosing` decides; `reported` (of nothing: no report) is what the chosen and the compared
/// placements are measured on after it. Error where the budget cannot be kept or a kind is not
/// known.
ChosenPlacement choose_placement(const MixerBank& bank, const ChoiceOptions& options,
                                 const JudgeData& choosing, const JudgeData& reported);

/// {"attention=4", ...} as numbers of layers by kind. Error, by the option, for anything else.
std::map<std::string, int64_t> parse_layer_counts(const char* option,
                                                  const std::vector<std::string>& texts);

/// The most attention that the budget allows where `order` (places of open layers) is converted to
/// `kind` from its front on; null where all of it does not get there.
std::optional<Choices> first_within(const LayerCosts& costs, double budget, int kind,
                                    const std::vector<int64_t>& order);

}  // namespace cambium
