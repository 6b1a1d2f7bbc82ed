// The files a stage of a run leaves behind, and whether they are still what was written.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "eval/report/summary.h"

namespace cambium {

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
