// Whether a stage's model is good enough.
#pragma once

#include "eval/report/summary.h"
#include "hybrid/plan.h"

namespace cambium {

/// Judges a measured model against what was asked, relative to the measured teacher.
GateSummary judge_gate(const GatePlan& gate, const ModelSummary& model,
                       const ModelSummary& teacher);

}  // namespace cambium
