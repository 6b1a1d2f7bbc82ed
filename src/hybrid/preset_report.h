// What the presets of a supernet are worth, beside their teacher: the numbers of a report page.
#pragma once

#include "eval/report/summary.h"
#include "hybrid/measure.h"
#include "model/supernet.h"

namespace cambium {

struct PresetReportOptions {
  std::string name;  // of the page
  std::string command;
  std::string teacher;               // its folder, for the page
  std::vector<std::string> presets;  // these alone, in this order; empty = all
  EvaluationPlan evaluate;
};

/// Quality of one preset's hybrid, `model`, under this name.
ModelSummary measure_preset(const std::string& name, Model& model, Model& teacher,
                            const RunData& data, const EvaluationPlan& evaluate);

/// The teacher first, then each preset: quality, then the speed of all of them side by side, so
/// that they meet the same machine. Every preset is a view of the supernet's weights.
RunSummary measure_presets(LoadedModel& supernet, LoadedModel& teacher, const RunData& data,
                           const PresetReportOptions& options);

}  // namespace cambium
