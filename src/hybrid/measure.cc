#include "hybrid/measure.h"

#include "base/progress.h"
#include "eval/quality.h"
#include "serve/cache_plan.h"

namespace cambium {
namespace {

AccuracySummary accuracy(Model& model, const Task& task, const RunData& data,
                         const EvaluationPlan& plan, const std::string& label) {
  if (task.examples.empty()) {
    return {};
  }
  Progress progress(label, task.examples.size(), {.unit = "problems"});
  AccuracyConfig config;
  config.max_new_tokens = plan.max_new_tokens;
  config.batch = plan.batch;
  const AccuracyResult result =
      evaluate_accuracy(model, data.tokenizer(), task, config,
                        [&](int64_t done) { progress.update(static_cast<uint64_t>(done)); });
  progress.finish(fmt::format("{} of {} right", result.summary.correct, result.summary.total));
  return result.summary;
}

}  // namespace

RunData::RunData(const HybridPlan& plan, Tokenizer tokenizer) : tokenizer_(std::move(tokenizer)) {
  const DataPlan& d = plan.data;
  if (d.train.empty()) {
    train_ = problem_source(tokenizer_, d.problems, Split::kTrain, plan.seed);
    valid_ = problem_source(tokenizer_, d.problems, Split::kValid, plan.seed);
  } else {
    train_ = load_jsonl(d.train, tokenizer_);
    valid_ = load_jsonl(d.valid, tokenizer_);
  }
  const EvaluationPlan& e = plan.evaluate;
  held_out_ = std::make_unique<HeldOut>(*valid_, e.held_out_documents, e.held_out_tokens);
  if (!e.task.empty()) {
    task_ = load_task(e.task, e.task_path, e.problems);
  } else if (e.problems > 0) {
    task_ = problem_task(d.problems, ProblemKind::kWord, Split::kTest, plan.seed, e.problems);
  }
  if (e.retrieval > 0) {
    ProblemSpec spec = d.problems;
    spec.retrieval = e.retrieval_spec;
    retrieval_ = problem_task(spec, ProblemKind::kRetrieval, Split::kTest, plan.seed, e.retrieval);
  }
}

ModelSummary summarise_spec(const std::string& name, Model& model) {
  ModelSummary s;
  s.name = name;
  s.map = layer_map(model.spec());
  for (const LayerSpec& layer : model.spec().layers) {
    ++s.mixers[layer_kind(layer)];
  }
  s.converted = converted_layers(model.spec());
  s.parameters = model.parameter_count();
  const CachePlan cache(model, {});
  s.cache_bytes_per_token = cache.lasting_bytes_per_token();
  s.state_bytes_per_sequence = cache.fixed_bytes();
  return s;
}

void measure_quality(ModelSummary& summary, Model& model, Model& teacher, const RunData& data,
                     const EvaluationPlan& plan) {
  const LossSums sums = total(data.held_out().measure(model, &teacher));
  const auto tokens = static_cast<double>(std::max<int64_t>(sums.tokens, 1));
  summary.reverse_kl = sums.reverse_kl / tokens;
  summary.nll = sums.cross_entropy / tokens;
  summary.agreement = static_cast<double>(sums.agreement) / tokens;
  summary.accuracy = accuracy(model, data.task(), data, plan, summary.name + ": problems");
  summary.retrieval = accuracy(model, data.retrieval(), data, plan, summary.name + ": retrieval");
}

double damage(Model& model, Model& teacher, const RunData& data, const HeldOut& documents,
              const std::string& metric, const EvaluationPlan& plan) {
  if (metric == "accuracy") {
    AccuracyConfig config;
    config.max_new_tokens = plan.max_new_tokens;
    config.batch = plan.batch;
    expect(!data.task().examples.empty(),
           "metric accuracy: the plan's [evaluate] asks no problems");
    return 1.0 -
           evaluate_accuracy(model, data.tokenizer(), data.task(), config).summary.accuracy.value;
  }
  const bool kl = metric == "reverse-kl";
  const LossSums sums = total(documents.measure(model, kl ? &teacher : nullptr));
  return (kl ? sums.reverse_kl : sums.cross_entropy) /
         static_cast<double>(std::max<int64_t>(sums.tokens, 1));
}

}  // namespace cambium
