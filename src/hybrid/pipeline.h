// The whole graft by a plan: score, place, convert, heal in gated stages, measure, report.
//
// A run folder holds plan.toml, teacher.json, stages/NAME/ (scores.json, placement.json,
// attempt-K/{align,distill,sft}/, model/, result.json), summary.json, report.html and frontier.svg.
// Every one of them appears whole: a run that was killed goes on from what is there.
#pragma once

#include <filesystem>

#include "eval/report/summary.h"
#include "hybrid/plan.h"

namespace cambium {

struct PipelineOptions {
  std::filesystem::path folder;
  bool resume = false;
  std::string command;  // as typed, for the report
};

/// Runs the plan; returns what summary.json holds. Error when the folder holds another plan's run,
/// or a run and `resume` is false.
RunSummary run_pipeline(const HybridPlan& plan, const PipelineOptions& options);

/// Scores layers by MMR: each of `layers` of `base` swapped alone for the plan's mixer and trained
/// for the probe's steps; the loss of its last steps. Lower = easier to replace.
Importance score_by_replacement(Model& base, Model& teacher, const std::vector<int64_t>& layers,
                                const GraftOptions& graft, const TrainConfig& probe,
                                const DocumentSource& data, uint64_t seed,
                                const std::string& fingerprint, const std::filesystem::path& path);

}  // namespace cambium
