#include "hybrid/measure.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>

#include "base/checked.h"
#include "base/cpu.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/likelihood.h"
#include "eval/quality.h"
#include "eval/verify.h"
#include "serve/cache_plan.h"
#include "tensor/device_memory.h"

namespace cambium {
namespace {

// A cache is tried on the beginnings of a few texts: longer ones would take logits of many
// gigabytes at large vocabularies, and these cross the borders of pages, chunks and pieces.
constexpr int64_t kCachedTexts = 2;
constexpr int64_t kCachedTokens = 160;
// KL of what rounding alone makes different: fixtures in f32 stay below 1e-10, in bf16 below 2e-3.
constexpr double kCachedLimitF32 = 1e-5;
constexpr double kCachedLimitBF16 = 1e-2;

// Long texts are answered so many at once: a cache of as many as of short ones would not fit.
constexpr int64_t kLongBatch = 16;

AccuracyResult accuracy(Model& model, const Task& task, const RunData& data,
                        const AccuracyConfig& config, const std::string& label) {
  if (task.examples.empty()) {
    return {};
  }
  Progress progress(label, task.examples.size(), {.unit = "problems"});
  const AccuracyResult result =
      evaluate_accuracy(model, data.tokenizer(), task, config, [&](int64_t done) {
        stop_point();
        progress.update(static_cast<uint64_t>(done));
      });
  progress.finish(fmt::format("{} of {} right", result.summary.correct, result.summary.total));
  return result;
}

AccuracySummary stickiness(Model& model, const RunData& data, const std::string& label) {
  const ChoiceConfig config{.rotations = true};
  const auto turns = static_cast<uint64_t>(rotations_of(data.task(), config));
  Progress progress(label, data.task().examples.size() * turns * turns, {.unit = "answers"});
  const ChoiceSummary summary =
      summarise_choices(evaluate_choices(model, data.tokenizer(), data.task(), config,
                                         [&](int64_t done) {
                                           stop_point();
                                           progress.update(static_cast<uint64_t>(done));
                                         }),
                        rotations_of(data.task(), config));
  progress.finish(fmt::format("{} of {} the same letter in all rotations", summary.sticky.correct,
                              summary.sticky.total));
  return summary.sticky;
}

double cached_kl(Model& model, const HeldOut& documents, const std::string& label) {
  std::vector<std::vector<int32_t>> texts;
  for (const PackedSequence& group : documents.groups()) {
    const Segments segments = group.batch.segments();
    for (int64_t s = 0; s < segments.count() && std::ssize(texts) < kCachedTexts; ++s) {
      const auto begin = group.batch.tokens().begin() + segments.start[static_cast<size_t>(s)];
      texts.emplace_back(begin, begin + std::min(segments.length(s), kCachedTokens));
    }
  }
  double worst = 0.0;
  for (const VerifyRow& row : verify_cached(model, texts, {}, label).rows) {
    worst = larger_error(worst, row.kl);
  }
  return std::isfinite(worst) ? std::max(worst, 0.0) : std::numeric_limits<double>::max();
}

struct Shares {
  int64_t reported = 0;
  int64_t selection = 0;
};

// How `size` (0 = without end) things are shared out; never one to both sides.
Shares share(int64_t size, int64_t reported, int64_t selection, const std::string& path,
             const char* what) {
  if (size <= 0 || reported + selection <= size) {
    return {reported, selection};
  }
  if (selection == 0) {
    return {size, 0};
  }
  expect(size >= 2, "{}: expected at least 2 {}: some to choose by and others to report", path,
         what);
  const double part = static_cast<double>(selection) / static_cast<double>(reported + selection);
  const auto chosen = static_cast<int64_t>(std::llround(part * static_cast<double>(size)));
  const int64_t some = std::clamp<int64_t>(chosen, 1, size - 1);
  return {size - some, some};
}

}  // namespace

SelectionSizes selection_sizes(const HybridPlan& plan) {
  SelectionSizes sizes;
  for (const StagePlan& stage : plan.stages) {
    const bool measures = stage.place.measures() && stage.place.data.empty();
    if (measures || stage.gate.retries > 0) {
      sizes.documents = std::max(sizes.documents, stage.place.documents);
    }
    if (stage.place.asks() && stage.place.metric == "accuracy") {
      const int64_t problems = stage.place.problems;
      sizes.problems = std::max(sizes.problems, problems > 0 ? problems : plan.evaluate.problems);
    }
  }
  return sizes;
}

RunData::RunData(const DataPlan& d, const EvaluationPlan& e, uint64_t seed, Tokenizer tokenizer,
                 const SelectionSizes& selection)
    : tokenizer_(std::move(tokenizer)), held_out_tokens_(e.held_out_tokens), selection_(selection) {
  if (d.train.empty()) {
    train_ = problem_source(tokenizer_, d.problems, Split::kTrain, seed);
    valid_ = problem_source(tokenizer_, d.problems, Split::kValid, seed);
  } else {
    train_ = load_jsonl(d.train, tokenizer_);
    valid_ = load_jsonl(d.valid, tokenizer_);
  }
  const Shares documents =
      share(valid_->size(), e.held_out_documents, selection.documents, d.valid, "documents");
  reported_documents_ = documents.reported;
  selection_.documents = documents.selection;
  held_out_ = std::make_unique<HeldOut>(*valid_, reported_documents_, e.held_out_tokens);
  if (!e.task.empty()) {
    const int64_t wanted = e.problems > 0 ? e.problems + selection.problems : 0;
    Task all = load_task(e.task, e.task_path, wanted);
    const auto size = static_cast<int64_t>(all.examples.size());
    const Shares problems = share(size, e.problems > 0 ? e.problems : size, selection.problems,
                                  e.task_path, "problems");
    selection_.problems = problems.selection;
    const auto border = all.examples.begin() + static_cast<ptrdiff_t>(problems.reported);
    selection_task_ = {all.name, all.form, {border, all.examples.end()}};
    all.examples.erase(border, all.examples.end());
    task_ = std::move(all);
  } else if (e.problems > 0) {
    task_ = problem_task(d.problems, ProblemKind::kWord, Split::kTest, seed, e.problems);
    selection_task_ = problem_task(d.problems, ProblemKind::kWord, Split::kTest, seed,
                                   selection.problems, e.problems);
  }
  if (e.retrieval > 0) {
    ProblemSpec spec = d.problems;
    spec.retrieval = e.retrieval_spec;
    retrieval_ = problem_task(spec, ProblemKind::kRetrieval, Split::kTest, seed, e.retrieval);
    more_retrieval_ = [spec, seed, reported = e.retrieval](int64_t problems) {
      return problem_task(spec, ProblemKind::kRetrieval, Split::kTest, seed,
                          problems > 0 ? problems : reported, reported);
    };
    for (const int64_t characters : e.retrieval_lengths) {
      retrieval_at_.push_back({fmt::format("retrieval of {} characters", characters),
                               problem_task(at_length(spec, characters), ProblemKind::kRetrieval,
                                            Split::kTest, seed, e.retrieval)});
    }
  }
  const LongPlan& l = e.long_texts;
  if (e.retrieval == 0 && !l.tasks.empty()) {
    more_retrieval_ = [l, seed, words = tokenizer_](int64_t problems) {
      LongGrid grid = l.grid;
      if (problems > 0) {
        grid.answers = answers_of_cells(grid, l.tasks.size(), problems);
      }
      return long_tasks(l.tasks, grid, choosing_seed(seed), words);
    };
  }
  for (const std::string& name : l.tasks) {
    for (const int64_t tokens : l.grid.lengths) {
      LongGrid grid = l.grid;
      grid.lengths = {tokens};
      retrieval_at_.push_back({fmt::format("{} of {} tokens", name, tokens),
                               long_task(name, grid, seed, tokenizer_), true});
    }
  }
}

RunData::RunData(const HybridPlan& plan, Tokenizer tokenizer)
    : RunData(plan.data, plan.evaluate, plan.seed, std::move(tokenizer), selection_sizes(plan)) {
  for (const StagePlan& stage : plan.stages) {
    const std::string& file = stage.place.data;
    if (stage.place.measures() && !file.empty() && !selection_files_.contains(file)) {
      selection_files_[file] = load_jsonl(file, tokenizer_);
    }
  }
}

HeldOut RunData::selection_documents(int64_t documents, const std::string& file) const {
  if (!file.empty()) {
    return {*selection_files_.at(file), documents, held_out_tokens_};
  }
  return {*valid_, std::min(documents, selection_.documents), held_out_tokens_,
          reported_documents_};
}

Task RunData::selection_problems(int64_t problems) const {
  Task task = selection_task_;
  task.examples.resize(std::min(task.examples.size(), static_cast<size_t>(problems)));
  return task;
}

Task RunData::selection_retrieval(int64_t problems) const {
  return more_retrieval_ ? more_retrieval_(problems) : Task{};
}

AccuracyConfig RunData::selection_retrieval_answers(const EvaluationPlan& plan) const {
  return plan.retrieval > 0 ? answers(plan) : long_answers(plan);
}

AccuracyConfig RunData::answers(const EvaluationPlan& plan) const {
  AccuracyConfig config;
  config.max_new_tokens = plan.max_new_tokens;
  config.batch = plan.batch;
  config.chat = asks_by_template(plan, tokenizer_, !plan.task.empty());
  return config;
}

AccuracyConfig RunData::long_answers(const EvaluationPlan& plan) const {
  AccuracyConfig config;
  config.max_new_tokens = kLongAnswerTokens;
  config.batch = std::min(plan.batch, kLongBatch);
  config.chat = asks_by_template(plan, tokenizer_, true);
  return config;
}

void summarise_cache(ModelSummary& summary, const Model& model, Dtype values) {
  CacheConfig config;
  config.values = values;
  const CachePlan cache(model, config);
  summary.cache_bytes_per_token = cache.lasting_bytes_per_token();
  summary.state_bytes_per_sequence = cache.fixed_bytes();
}

ModelSummary summarise_spec(const std::string& name, Model& model, const ModelSpec* teacher,
                            Dtype values) {
  ModelSummary s;
  s.name = name;
  s.map = layer_map(model.spec());
  for (const LayerSpec& layer : model.spec().layers) {
    ++s.mixers[layer_kind(layer)];
  }
  s.converted = static_cast<int64_t>(converted_layers(model.spec(), teacher).size());
  s.parameters = model.parameter_count();
  summarise_cache(s, model, values);
  return s;
}

void measure_quality(ModelSummary& summary, Model& model, Model& teacher, const RunData& data,
                     const EvaluationPlan& plan) {
  const StopAnywhere stop("what was trained and measured before is kept; go on with --resume");
  const LossSums sums =
      total(data.held_out().measure(model, &teacher, summary.name + ": held out"));
  const auto tokens = static_cast<double>(std::max<int64_t>(sums.tokens, 1));
  summary.reverse_kl = sums.reverse_kl / tokens;
  summary.nll = sums.cross_entropy / tokens;
  summary.agreement = static_cast<double>(sums.agreement) / tokens;
  const AccuracyConfig config = data.answers(plan);
  const AccuracyResult answers =
      accuracy(model, data.task(), data, config, summary.name + ": problems");
  summary.accuracy = answers.summary;
  summary.answer_tokens = answers.mean_tokens();
  summary.retrieval =
      accuracy(model, data.retrieval(), data, config, summary.name + ": retrieval").summary;
  for (const RunData::Retrieval& r : data.retrieval_at()) {
    const AccuracyConfig how = r.long_texts ? data.long_answers(plan) : config;
    const std::string label = summary.name + ": " + r.what;
    summary.retrieval_at.push_back({r.what, accuracy(model, r.task, data, how, label).summary});
  }
  if (rotatable(data.task())) {
    summary.sticky = stickiness(model, data, summary.name + ": rotations");
  }
  summary.cached_kl = cached_kl(model, data.held_out(), summary.name + ": through a cache");
  summary.cached_limit = model.activations() == Dtype::kF32 ? kCachedLimitF32 : kCachedLimitBF16;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm tm{};
  gmtime_r(&now, &tm);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &tm);
  return text;
}

std::string machine_name(Device device) {
  if (device.kind == Device::kCuda) {
    return cuda_device_info(device).name;
  }
  return fmt::format("{} threads, {}", num_threads(), cpu_isa_name(cpu_isa()));
}

std::string describe_data(const RunData& data, const EvaluationPlan& plan) {
  std::string text = fmt::format(
      "Accuracy: {} held-out {} answered by greedy generation{}{}{}. Held-out KL and NLL: {} "
      "completion tokens of {} documents.",
      data.task().examples.size(),
      plan.task.empty() ? "problems" : fmt::format("questions of {}", plan.task),
      data.answers(plan).chat ? " through the chat template" : "",
      data.retrieval().examples.empty()
          ? std::string()
          : fmt::format("; retrieval: {} texts of {} to {} characters",
                        data.retrieval().examples.size(), plan.retrieval_spec.min_chars,
                        plan.retrieval_spec.max_chars),
      plan.long_texts.tasks.empty()
          ? std::string()
          : fmt::format("; {}: {} texts of each of {} tokens", join(plan.long_texts.tasks, ", "),
                        plan.long_texts.grid.depths * plan.long_texts.grid.answers,
                        fmt::join(plan.long_texts.grid.lengths, ", ")),
      data.held_out().labels(), data.held_out().documents());
  const SelectionSizes& selection = data.selection();
  if (selection.documents > 0) {
    text += fmt::format(" Chosen by others: {} documents{}.", selection.documents,
                        selection.problems > 0 ? fmt::format(" and {} problems", selection.problems)
                                               : std::string());
  }
  return text;
}

double damage(Model& model, Model& teacher, const RunData& data, const HeldOut& documents,
              const std::string& metric, const EvaluationPlan& plan) {
  if (metric == "accuracy") {
    expect(!data.task().examples.empty(),
           "metric accuracy: the plan's [evaluate] asks no problems");
    return 1.0 - evaluate_accuracy(model, data.tokenizer(), data.task(), data.answers(plan))
                     .summary.accuracy.value;
  }
  const bool kl = metric == "reverse-kl";
  const LossSums sums = total(documents.measure(model, kl ? &teacher : nullptr));
  return (kl ? sums.reverse_kl : sums.cross_entropy) /
         static_cast<double>(std::max<int64_t>(sums.tokens, 1));
}

}  // namespace cambium
