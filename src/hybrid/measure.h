// Measuring models for gates, scores and the report, all of them by the same data and engine.
#pragma once

#include <functional>
#include <memory>

#include "eval/problem_source.h"
#include "eval/report/summary.h"
#include "hybrid/plan.h"
#include "train/held_out.h"

namespace cambium {

/// The data of a plan: what is trained on, what is held out, what is asked.
class RunData {
 public:
  RunData(const HybridPlan& plan, Tokenizer tokenizer);
  const DocumentSource& train() const { return *train_; }
  const DocumentSource& valid() const { return *valid_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  const HeldOut& held_out() const { return *held_out_; }
  /// Test problems; no examples where the plan asks none.
  const Task& task() const { return task_; }
  const Task& retrieval() const { return retrieval_; }

 private:
  Tokenizer tokenizer_;
  std::unique_ptr<DocumentSource> train_, valid_;
  std::unique_ptr<HeldOut> held_out_;
  Task task_, retrieval_;
};

/// Name, layers, parameters, cache: what the spec alone says.
ModelSummary summarise_spec(const std::string& name, Model& model);

/// Fills in accuracy, retrieval, and the held-out numbers against `teacher` (which may be the model
/// itself).
void measure_quality(ModelSummary& summary, Model& model, Model& teacher, const RunData& data,
                     const EvaluationPlan& plan);

/// What leave-one-out scores: larger = worse than `teacher`.
double damage(Model& model, Model& teacher, const RunData& data, const HeldOut& documents,
              const std::string& metric, const EvaluationPlan& plan);

}  // namespace cambium
