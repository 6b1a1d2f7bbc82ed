// Measuring models for gates, scores and the report, all of them by the same data and engine.
#pragma once

#include <functional>
#include <map>
#include <memory>

#include "eval/problem_source.h"
#include "eval/quality.h"
#include "eval/report/summary.h"
#include "hybrid/plan.h"
#include "serve/cache_plan.h"
#include "train/held_out.h"

namespace cambium {

/// What is kept apart for choosing: layers, and the best of several attempts.
struct SelectionSizes {
  int64_t documents = 0;
  int64_t problems = 0;
};

/// What the stages of a plan choose by.
SelectionSizes selection_sizes(const HybridPlan& plan);

/// The data of a run: what is trained on, what is held out, what is asked. Documents and problems
/// that choose are never among those that are reported. Where a file has too few for both, either
/// side gets its share.
class RunData {
 public:
  RunData(const DataPlan& data, const EvaluationPlan& evaluate, uint64_t seed, Tokenizer tokenizer,
          const SelectionSizes& selection = {});
  RunData(const HybridPlan& plan, Tokenizer tokenizer);

  const DocumentSource& train() const { return *train_; }
  const std::shared_ptr<DocumentSource>& shared_train() const { return train_; }
  const DocumentSource& valid() const { return *valid_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  /// The documents that are reported.
  const HeldOut& held_out() const { return *held_out_; }
  /// Test problems that are reported; no examples where the plan asks none.
  const Task& task() const { return task_; }
  const Task& retrieval() const { return retrieval_; }
  /// Retrieval of one kind and length.
  struct Retrieval {
    std::string what;  // as in ModelSummary
    Task task;
    bool long_texts = false;  // of [evaluate.long]
  };
  const std::vector<Retrieval>& retrieval_at() const { return retrieval_at_; }

  /// So many of the documents and problems that choose, or as many as there are. `file` (empty =
  /// the validation data): one of those that stages choose by, from its first document on.
  HeldOut selection_documents(int64_t documents, const std::string& file = "") const;
  Task selection_problems(int64_t problems) const;
  /// Retrieval that is not reported: of [evaluate] `retrieval`, or where the plan has none of
  /// [evaluate.long], in its lengths; about so many, and 0 = as many as are reported.
  Task selection_retrieval(int64_t problems) const;
  AccuracyConfig selection_retrieval_answers(const EvaluationPlan& plan) const;
  /// The files that stages choose by, and their documents.
  const std::map<std::string, std::unique_ptr<DocumentSource>>& selection_files() const {
    return selection_files_;
  }
  /// How many of each there are.
  const SelectionSizes& selection() const { return selection_; }

  /// How problems are asked, and long texts.
  AccuracyConfig answers(const EvaluationPlan& plan) const;
  AccuracyConfig long_answers(const EvaluationPlan& plan) const;

 private:
  Tokenizer tokenizer_;
  int64_t held_out_tokens_;
  SelectionSizes selection_;
  int64_t reported_documents_ = 0;
  std::shared_ptr<DocumentSource> train_, valid_;
  std::map<std::string, std::unique_ptr<DocumentSource>> selection_files_;
  std::unique_ptr<HeldOut> held_out_;
  Task task_, retrieval_, selection_task_;
  std::vector<Retrieval> retrieval_at_;
  std::function<Task(int64_t problems)> more_retrieval_;
};

/// Name, layers, parameters, cache: what the spec alone says. Converted layers are those that
/// differ from the teacher's; without a teacher, those without attention. Cache as served, its keys
/// and values kept as `values`.
ModelSummary summarise_spec(const std::string& name, Model& model,
                            const ModelSpec* teacher = nullptr,
                            Dtype values = CacheConfig{}.values);
/// The cache alone, for a summary that was written when other types were served.
void summarise_cache(ModelSummary& summary, const Model& model,
                     Dtype values = CacheConfig{}.values);

/// Fills in accuracy, length of answers, retrieval, stickiness of letters, what a cache changes,
/// and the held-out numbers against `teacher` (which may be the model itself).
void measure_quality(ModelSummary& summary, Model& model, Model& teacher, const RunData& data,
                     const EvaluationPlan& plan);

/// What the numbers are of, in words, for a report.
std::string describe_data(const RunData& data, const EvaluationPlan& plan);
/// "2026-11-29 08:05 UTC".
std::string today();
/// The GPU's name, or threads and instruction set of the CPU.
std::string machine_name(Device device);

/// What leave-one-out scores, by its definition (hybrid/scoring.h has a quicker way): larger =
/// worse than `teacher`.
double damage(Model& model, Model& teacher, const RunData& data, const HeldOut& documents,
              const std::string& metric, const EvaluationPlan& plan);

}  // namespace cambium
