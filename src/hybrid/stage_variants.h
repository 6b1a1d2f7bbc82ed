// What a run measures beside the models of its stages, and how fast all of them are.
#pragma once

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "hybrid/measure.h"
#include "hybrid/pipeline.h"

namespace cambium {

/// Adds to `summary`, whose first model is the teacher. A variant's numbers are kept in its stage's
/// folder and measured once. What it is made with must outlive it.
class StageVariants {
 public:
  StageVariants(const HybridPlan& plan, const PipelineOptions& options, const LoadedModel& teacher,
                const RunData& data, RunSummary& summary)
      : plan_(plan), options_(options), teacher_(teacher), data_(data), summary_(summary) {}

  /// The presets of the supernet in `folder`/model but for the active one, which `result` is of.
  void add_presets(const std::filesystem::path& folder, const ModelSummary& result);
  /// What the stage's layers are worth without any training: the teacher with windows in them. Once
  /// for the same layers.
  void add_baseline(const std::filesystem::path& folder, const std::string& stage);
  /// Side by side, so that every model meets the same machine.
  void measure_speed();

 private:
  const HybridPlan& plan_;
  const PipelineOptions& options_;
  const LoadedModel& teacher_;
  const RunData& data_;
  RunSummary& summary_;
  /// Of the summary's models, by their place: the preset of a supernet that one is.
  std::map<size_t, std::string> presets_;
  /// Of the same: the baselines, and the layers that have one.
  std::map<size_t, LoadedModel> baselines_;
  std::set<std::vector<int64_t>> with_baseline_;
};

}  // namespace cambium
