// Training curves from the logs of a run.
#pragma once

#include "eval/report/summary.h"

namespace cambium {

/// What the logs (log.jsonl) of a phase's attempts say, one after the other, thinned for drawing.
/// Logs that are not there are passed over.
CurveSummary read_curve(const std::string& stage, const std::string& phase,
                        const std::vector<std::filesystem::path>& logs);

}  // namespace cambium
