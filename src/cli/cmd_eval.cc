// eval and report: how good, and the page that shows it.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/cached_losses.h"
#include "eval/problem_source.h"
#include "eval/quality.h"
#include "model/weights.h"
#include "serve/memory_plan.h"
#include "train/held_out.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

/// Problems or documents that are asked for.
constexpr int64_t kMost = 10'000'000;

struct EvalArgs {
  std::string model, task = "problems", data, teacher, output, answers, extract = "own";
  std::vector<std::string> set;
  int64_t count = 100, seed = 1, batch = 32, max_new_tokens = 256, max_tokens = 512;
  double temperature = 0.0;
  CacheOption cache{""};
  DeviceOption device;
  bool chat = false, json = false, ungraded = false;
};

Json eval_text(const EvalArgs& a, Model& model, const Tokenizer& tokenizer) {
  const auto source = load_jsonl(a.data, tokenizer);
  const HeldOut documents(*source, a.count, a.max_tokens);
  LoadedModel teacher;
  if (!a.teacher.empty()) {
    teacher =
        load_model(a.teacher, {.storage = MatrixStorage::kStored, .device = a.device.device()});
  }
  const bool cached = !a.cache.name.empty();
  const LossSums sums =
      total(cached ? measure_cached(documents, model, teacher.model.get(), a.cache.values())
                   : documents.measure(model, teacher.model.get()));
  const auto tokens = static_cast<double>(sums.tokens);
  Json json = {{"task", "text"},
               {"cache", cached ? a.cache.name : "none"},
               {"documents", documents.documents()},
               {"tokens", sums.tokens},
               {"nll", sums.cross_entropy / tokens},
               {"perplexity", std::exp(sums.cross_entropy / tokens)},
               {"token_accuracy", static_cast<double>(sums.correct) / tokens}};
  if (teacher.model) {
    json["reverse_kl"] = sums.reverse_kl / tokens;
    json["forward_kl"] = sums.forward_kl / tokens;
    json["agreement"] = static_cast<double>(sums.agreement) / tokens;
  }
  return json;
}

// How the answers came to be and how fast: everything needed to ask again.
Json answers_json(const EvalArgs& a, const Task& task, const Answers& answers) {
  return {{"task", task.name},
          {"model", a.model},
          {"data", a.data},
          {"problems", task.examples.size()},
          {"prompt", a.chat ? "chat template" : "question and a new line"},
          {"max_new_tokens", a.max_new_tokens},
          {"temperature", a.temperature},
          {"seed", a.seed},
          {"batch", a.batch},
          {"cache", dtype_name(a.cache.values())},
          {"prompt_tokens", answers.prompt_tokens},
          {"tokens", answers.tokens},
          {"seconds", answers.seconds},
          {"tokens_per_second", answers.tokens_per_second()}};
}

void report_accuracy(const EvalArgs& a, const Task& task, const AccuracyResult& result, Json json) {
  const AccuracySummary& s = result.summary;
  if (a.json) {
    json.update({{"correct", s.correct},
                 {"total", s.total},
                 {"unanswered", result.unanswered},
                 {"accuracy", s.accuracy.value},
                 {"low", s.accuracy.low},
                 {"high", s.accuracy.high},
                 {"interval", "Wilson, 95 %"}});
    fmt::print("{}\n", json.dump(1));
    return;
  }
  fmt::print(
      "{}: {} of {} right, {:.1f} % [{:.1f}, {:.1f}] (95 %){}\n", task.name, s.correct, s.total,
      100 * s.accuracy.value, 100 * s.accuracy.low, 100 * s.accuracy.high,
      result.unanswered == 0 ? "" : fmt::format("; {} not answered: too long", result.unanswered));
}

// Options that the task at hand would not read are refused, never dropped.
void check_applies(const EvalArgs& a) {
  const bool text = a.task == "text";
  const bool generated = a.task == "problems" || a.task == "retrieval";
  expect(generated || !a.data.empty(), "--task {}: expected --data, {}", a.task,
         text ? "a file of JSON lines" : "the task's file");
  expect(!generated || a.data.empty(),
         "--task {}: its problems are generated; --data belongs to "
         "text and the benchmarks",
         a.task);
  expect(generated || a.set.empty(),
         "--set belongs to generated problems (--task problems or "
         "retrieval)");
  expect(text || a.teacher.empty(), "--teacher belongs to --task text");
  expect(!text || !a.chat, "--chat belongs to tasks that are answered, not to --task text");
  expect(!text || (a.answers.empty() && !a.ungraded),
         "{} belongs to tasks that are answered, not to --task text",
         a.ungraded ? "--ungraded" : "--answers");
  expect(a.model.empty() != a.answers.empty(),
         "eval: expected a checkpoint folder or --answers FILE, got {}",
         a.model.empty() ? "neither" : "both");
  expect(a.answers.empty() || !(a.chat || a.ungraded),
         "--{} belongs to a model that is asked, not to --answers", a.chat ? "chat" : "ungraded");
  expect(a.answers.empty() || a.cache.name.empty(),
         "--cache belongs to a model that is asked, not to --answers");
  expect(!a.ungraded || !a.output.empty(),
         "--ungraded: expected --output, the file that is to be graded with --answers");
}

Task task_of(const EvalArgs& a) {
  if (a.task != "problems" && a.task != "retrieval") {
    Task task = load_task(a.task, a.data, a.count, static_cast<uint64_t>(a.seed));
    task.extraction = parse_extraction(a.extract, task.form);
    return task;
  }
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(a.set);
  const ProblemSpec spec = read_problem_spec(table);
  table.expect_all_used();
  return problem_task(spec, a.task == "problems" ? ProblemKind::kWord : ProblemKind::kRetrieval,
                      Split::kTest, static_cast<uint64_t>(a.seed), a.count);
}

// Answers that a model gave before, perhaps on another machine.
int grade_file(const EvalArgs& a) {
  const StopAnywhere stop("nothing is written");
  const Task task = task_of(a);
  const std::vector<Response> responses = read_responses(a.answers, task);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  const AccuracyResult result = grade_responses(task, responses);
  if (output) {
    output->write(example_lines(result.examples));
  }
  report_accuracy(a, task, result, {{"task", task.name}, {"answers", a.answers}, {"data", a.data}});
  return 0;
}

int run_eval(const EvalArgs& a) {
  check_applies(a);
  if (!a.answers.empty()) {
    return grade_file(a);
  }
  const StopAnywhere stop("nothing is written: answers are graded when all came");
  EngineConfig engine;
  engine.max_sequences = a.batch;
  engine.cache_values = a.cache.values();
  if (a.task != "text") {
    engine = planned_engine(a.model, MatrixStorage::kStored, a.device.device(), engine);
  }
  LoadedModel loaded =
      load_model(a.model, {.storage = MatrixStorage::kStored, .device = a.device.device()});
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  if (a.chat) {
    tokenizer.expect_chat(a.model, "leave --chat away");
  }
  if (a.task == "text") {
    ResultFile results(a.output);
    results.write(eval_text(a, *loaded.model, tokenizer).dump(1) + "\n");
    return 0;
  }
  const Task task = task_of(a);
  if (!a.ungraded) {
    expect_gradable(task);  // a machine that cannot run programs safely says so now
  }
  AccuracyConfig config;
  config.batch = std::min(a.batch, engine.max_sequences);
  config.engine = engine;
  config.max_new_tokens = a.max_new_tokens;
  config.chat = a.chat;
  config.temperature = a.temperature;
  config.seed = static_cast<uint64_t>(a.seed);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  Progress progress(a.task, task.examples.size(), {.unit = "problems"});
  const Answers answers =
      answer_examples(*loaded.model, tokenizer, task, config, [&](int64_t done) {
        stop_point();
        progress.update(static_cast<uint64_t>(done));
      });
  progress.finish(
      fmt::format("{} tokens, {:.0f} tokens/s", answers.tokens, answers.tokens_per_second()));
  const Json json = answers_json(a, task, answers);
  if (a.ungraded) {
    output->write(ungraded_lines(task, answers.responses));
    fmt::print("{}\n", a.json ? json.dump(1)
                              : fmt::format("{}: {} answers, not graded, in {}", task.name,
                                            answers.responses.size(), a.output));
    return 0;
  }
  const AccuracyResult result = grade_responses(task, answers.responses);
  if (output) {
    output->write(example_lines(result.examples));
  }
  report_accuracy(a, task, result, json);
  return 0;
}

Action declare_eval(Args& args) {
  auto a = std::make_shared<EvalArgs>();
  args.positional("model", "checkpoint folder", &a->model, false);
  std::vector<std::string> tasks = {"problems", "retrieval", "text"};
  tasks.insert(tasks.end(), task_forms().begin(), task_forms().end());
  args.choice("task", "", tasks, &a->task);
  args.option("data,d,task-path", "the benchmark's file, or documents for --task text", &a->data);
  args.option("count,n", "problems or documents (from the start)", &a->count, {1, kMost});
  args.option("seed", "of generated problems and of sampling", &a->seed);
  args.option("set", "generated problems: word.max_steps=3, ...", &a->set);
  args.option("teacher", "--task text: also the KL divergence to this model", &a->teacher);
  args.choice("extract",
              "how an answer is found and compared: own, or as lm-evaluation-harness does it "
              "(gsm8k strict or flexible, hendrycks_math, minerva_math)",
              extraction_names(), &a->extract);
  args.option("max-new-tokens", "tokens of an answer at most", &a->max_new_tokens,
              {1, kMaxPositions});
  args.option("max-tokens", "--task text: tokens of a document at most", &a->max_tokens,
              {2, kMaxPositions});
  args.option("temperature", "0 = greedy", &a->temperature);
  args.option("batch", "problems at once", &a->batch, {1, 4096});
  args.option("output,o", "file for every question, response and grade, or the losses", &a->output);
  a->cache.declare(args);
  a->device.declare(args);
  args.option("answers", "grade the answers in this file (of --output) instead of asking a model",
              &a->answers);
  args.flag("ungraded", "only write the answers: another machine grades them", &a->ungraded);
  args.flag("chat", "ask through the chat template", &a->chat);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run_eval(*a); };
}

struct ReportArgs {
  std::string run, output;
};

int run_report(const ReportArgs& a) {
  const RunSummary summary = read_summary(std::filesystem::path(a.run) / "summary.json");
  const std::string folder = a.output.empty() ? a.run : a.output;
  make_folder(folder);
  write_report(summary, folder);
  fmt::print("{}/report.html\n", folder);
  return 0;
}

Action declare_report(Args& args) {
  auto a = std::make_shared<ReportArgs>();
  args.positional("run", "run folder of `cambium hybridize`", &a->run);
  args.option("output,o", "folder of report.html and frontier.svg (RUN otherwise)", &a->output);
  return [a] { return run_report(*a); };
}

}  // namespace

Command eval_command() {
  return {"eval", "task accuracy by generation, or the losses on text",
          "  cambium eval models/teacher --task problems -n 200\n"
          "  cambium eval DIR --task gsm8k --data gsm8k/test.jsonl --chat -o answers.jsonl\n"
          "  cambium eval DIR --task mbpp --data mbpp.json --chat --ungraded -o answers.jsonl\n"
          "  cambium eval --task mbpp --data mbpp.json --answers answers.jsonl\n"
          "  cambium eval HYBRID --task text --data text.jsonl --teacher TEACHER\n"
          "  cambium eval DIR --task text --data text.jsonl --teacher DIR --cache f8",
          declare_eval};
}

Command report_command() {
  return {"report", "draws a run's report page again from its summary.json",
          "  cambium report out/demo", declare_report};
}

}  // namespace cambium
