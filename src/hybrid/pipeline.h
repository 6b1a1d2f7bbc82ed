// The whole graft by a plan: score, place, convert, heal in gated stages, measure, report.
//
// A run folder holds plan.toml, inputs.json, teacher.json, stages/NAME/ (scores.json or search.json
// and chosen.json, placement.json, attempt-K/{align,distill,sft}/, attempt-K/result.json, model/,
// files.json, result.json, of a supernet preset-NAME.json, baseline.json), summary.json,
// report.html, frontier.svg and .csv. Every one of them appears whole: a run that was killed goes
// on from what is there, and refuses what is not as it was written.
#pragma once

#include <filesystem>

#include "eval/report/summary.h"
#include "hybrid/plan.h"

namespace cambium {

struct PipelineOptions {
  std::filesystem::path folder;
  bool resume = false;
  std::string command;  // as typed, for the report
  Device device;        // where models are trained and measured
};

/// Runs the plan; returns what summary.json holds. Error when the folder holds another plan's run,
/// or a run and `resume` is false.
RunSummary run_pipeline(const HybridPlan& plan, const PipelineOptions& options);

}  // namespace cambium
