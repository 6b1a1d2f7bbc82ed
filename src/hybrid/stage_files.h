// The folder of a run, the files its stages leave behind, and whether they are still what was
// written.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "base/run_folder.h"
#include "eval/report/summary.h"
#include "hybrid/plan.h"

namespace cambium {

/// Error when `folder` cannot be the folder of a run of this plan: it holds another run, or one
/// that is not to be resumed, or cannot be written. Changes nothing.
void check_run_folder(const std::filesystem::path& folder, const HybridPlan& plan, bool resume);
RunFolder open_run_folder(const std::filesystem::path& folder, bool resume);
/// Writes inputs.json of a run that begins, a text for each of its inputs; Error that names the
/// input where one that goes on began with another.
void expect_begun_with(const std::filesystem::path& folder, const nlohmann::ordered_json& inputs);

/// What was measured of one model, in the form of a run's summary.
void write_result(const ModelSummary& model, const std::filesystem::path& path);
ModelSummary read_result(const std::filesystem::path& path);

std::string file_digest(const std::filesystem::path& path);

/// The digests of a finished stage's files but for its models, which have checksums of their own.
std::map<std::string, std::string> stage_files(const std::filesystem::path& folder);
/// Error that names the file unless all that `folder`/files.json lists are as they were.
void verify_stage_files(const std::filesystem::path& folder);

/// Every file of a stage's model, and that it is the model that was measured: `checksums` is the
/// digest of its checksums.json.
void verify_model(const std::filesystem::path& dir, const std::string& checksums);

}  // namespace cambium
