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
  const auto kept = [&](const AccuracySummary& now, const AccuracySummary& before,
                        const std::string& what) {
    if (asked.min_retrieval_kept > 0.0 && now.total > 0) {
      const double value = asked.lower_bound ? now.accuracy.low : now.accuracy.value;
      const double share = value / std::max(before.accuracy.value, 1e-9);
      rule(share >= asked.min_retrieval_kept,
           fmt::format("{}{} {:.1f} % is {:.1f} % of the teacher's {:.1f} %, at least {:.0f} % "
                       "asked",
                       what, asked.lower_bound ? ", lower end," : "", 100 * value, 100 * share,
                       100 * before.accuracy.value, 100 * asked.min_retrieval_kept));
    }
  };
  kept(model.retrieval, teacher.retrieval, "retrieval");
  for (const RetrievalAt& at : model.retrieval_at) {
    const AccuracySummary* before = find_retrieval(teacher, at.what);
    if (before == nullptr) {
      continue;
    }
    if (before->correct > 0) {
      kept(at.found, *before, at.what);
    } else if (asked.min_retrieval_kept > 0.0) {
      reasons.push_back(at.what + " is not asked for: the teacher has none right");
    }
  }
  if (asked.max_answer_length_ratio > 0.0 && teacher.answer_tokens > 0.0) {
    const double ratio = model.answer_tokens / teacher.answer_tokens;
    rule(ratio <= asked.max_answer_length_ratio,
         fmt::format("answers of {:.1f} tokens are {:.2f} times the teacher's {:.1f}, at most {:g} "
                     "times asked",
                     model.answer_tokens, ratio, teacher.answer_tokens,
                     asked.max_answer_length_ratio));
  }
  if (asked.max_sticky > 0.0 && model.sticky.total > 0) {
    rule(model.sticky.accuracy.value <= asked.max_sticky,
         fmt::format("{:.1f} % of the questions with the same letter in all rotations of their "
                     "options (the teacher {:.1f} %), at most {:.1f} % asked",
                     100 * model.sticky.accuracy.value, 100 * teacher.sticky.accuracy.value,
                     100 * asked.max_sticky));
  }
  if (asked.cached_equals_uncached && model.cached_kl >= 0.0) {
    rule(model.cached_kl <= model.cached_limit,
         fmt::format("KL between texts read without and through a cache {:.1e}, at most {:g} asked",
                     model.cached_kl, model.cached_limit));
  }
  gate.reason = reasons.empty() ? "nothing was asked" : join(reasons, "; ");
  return gate;
}

}  // namespace cambium
