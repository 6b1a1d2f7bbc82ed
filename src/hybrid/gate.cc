#include "hybrid/gate.h"

#include <algorithm>

#include "base/text.h"

namespace cambium {

GateSummary judge_gate(const GatePlan& asked, const ModelSummary& model,
                       const ModelSummary& teacher) {
  GateSummary gate{true, 1, ""};
  std::vector<std::string> reasons;
  const auto rule = [&](bool holds, const std::string& text) {
    gate.passed = gate.passed && holds;
    reasons.push_back(text + (holds ? "" : ": FAILED"));
  };
  if (asked.max_reverse_kl > 0.0) {
    rule(model.reverse_kl <= asked.max_reverse_kl,
         fmt::format("held-out reverse KL {:.4f}, at most {:g} asked", model.reverse_kl,
                     asked.max_reverse_kl));
  }
  if (asked.min_accuracy_kept > 0.0 && model.accuracy.total > 0) {
    const double value =
        asked.lower_bound ? model.accuracy.accuracy.low : model.accuracy.accuracy.value;
    const double kept = value / std::max(teacher.accuracy.accuracy.value, 1e-9);
    rule(kept >= asked.min_accuracy_kept,
         fmt::format("{} {:.1f} % [{:.1f}, {:.1f}] is {:.1f} % of the teacher's {:.1f} %, at least "
                     "{:.0f} % asked",
                     asked.lower_bound ? "accuracy's lower end of" : "accuracy",
                     100 * model.accuracy.accuracy.value, 100 * model.accuracy.accuracy.low,
                     100 * model.accuracy.accuracy.high, 100 * kept,
                     100 * teacher.accuracy.accuracy.value, 100 * asked.min_accuracy_kept));
  }
  gate.reason = reasons.empty() ? "nothing was asked" : join(reasons, "; ");
  return gate;
}

}  // namespace cambium
