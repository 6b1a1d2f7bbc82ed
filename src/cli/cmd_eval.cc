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
#include "eval/problem_source.h"
#include "eval/quality.h"
#include "model/weights.h"
#include "train/held_out.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

/// Problems or documents that are asked for.
constexpr int64_t kMost = 10'000'000;

struct EvalArgs {
  std::string model, task = "problems", data, teacher, output;
  std::vector<std::string> set;
  int64_t count = 100, seed = 1, batch = 32, max_new_tokens = 256, max_tokens = 512;
  double temperature = 0.0;
  DeviceOption device;
  bool chat = false, json = false;
};

Json eval_text(const EvalArgs& a, Model& model, const Tokenizer& tokenizer) {
  const auto source = load_jsonl(a.data, tokenizer);
  const HeldOut documents(*source, a.count, a.max_tokens);
  LoadedModel teacher;
  if (!a.teacher.empty()) {
    teacher =
        load_model(a.teacher, {.storage = MatrixStorage::kStored, .device = a.device.device()});
  }
  const LossSums sums = total(documents.measure(model, teacher.model.get()));
  const auto tokens = static_cast<double>(sums.tokens);
  Json json = {{"task", "text"},
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

// How the answers came to be and how many are right: everything needed to ask again.
Json accuracy_json(const EvalArgs& a, const Task& task, const AccuracySummary& s) {
  return {{"task", task.name},
          {"model", a.model},
          {"data", a.data},
          {"problems", s.total},
          {"prompt", a.chat ? "chat template" : "question and a new line"},
          {"max_new_tokens", a.max_new_tokens},
          {"temperature", a.temperature},
          {"seed", a.seed},
          {"correct", s.correct},
          {"total", s.total},
          {"accuracy", s.accuracy.value},
          {"low", s.accuracy.low},
          {"high", s.accuracy.high},
          {"interval", "Wilson, 95 %"}};
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
}

int run_eval(const EvalArgs& a) {
  check_applies(a);
  const StopAnywhere stop("nothing is written: answers are graded when all came");
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
  Task task;
  if (a.task == "problems" || a.task == "retrieval") {
    PlanTable table = PlanTable::parse("", "--set");
    table.set_all(a.set);
    const ProblemSpec spec = read_problem_spec(table);
    table.expect_all_used();
    task = problem_task(spec, a.task == "problems" ? ProblemKind::kWord : ProblemKind::kRetrieval,
                        Split::kTest, static_cast<uint64_t>(a.seed), a.count);
  } else {
    task = load_task(a.task, a.data, a.count);
  }
  AccuracyConfig config;
  config.batch = a.batch;
  config.max_new_tokens = a.max_new_tokens;
  config.chat = a.chat;
  config.temperature = a.temperature;
  config.seed = static_cast<uint64_t>(a.seed);
  std::unique_ptr<ResultFile> answers;
  if (!a.output.empty()) {
    answers = std::make_unique<ResultFile>(a.output);
  }
  Progress progress(a.task, task.examples.size(), {.unit = "problems"});
  const AccuracyResult result =
      evaluate_accuracy(*loaded.model, tokenizer, task, config, [&](int64_t done) {
        stop_point();
        progress.update(static_cast<uint64_t>(done));
      });
  progress.finish();
  if (answers) {
    answers->write(example_lines(result.examples));
  }
  const AccuracySummary& s = result.summary;
  if (a.json) {
    fmt::print("{}\n", accuracy_json(a, task, s).dump(1));
  } else {
    fmt::print("{}: {} of {} right, {:.1f} % [{:.1f}, {:.1f}] (95 %)\n", task.name, s.correct,
               s.total, 100 * s.accuracy.value, 100 * s.accuracy.low, 100 * s.accuracy.high);
  }
  return 0;
}

Action declare_eval(Args& args) {
  auto a = std::make_shared<EvalArgs>();
  args.positional("model", "checkpoint folder", &a->model);
  std::vector<std::string> tasks = {"problems", "retrieval", "text"};
  tasks.insert(tasks.end(), task_forms().begin(), task_forms().end());
  args.choice("task", "", tasks, &a->task);
  args.option("data,d,task-path", "the benchmark's file, or documents for --task text", &a->data);
  args.option("count,n", "problems or documents (from the start)", &a->count, {1, kMost});
  args.option("seed", "of generated problems and of sampling", &a->seed);
  args.option("set", "generated problems: word.max_steps=3, ...", &a->set);
  args.option("teacher", "--task text: also the KL divergence to this model", &a->teacher);
  args.option("max-new-tokens", "tokens of an answer at most", &a->max_new_tokens,
              {1, kMaxPositions});
  args.option("max-tokens", "--task text: tokens of a document at most", &a->max_tokens,
              {2, kMaxPositions});
  args.option("temperature", "0 = greedy", &a->temperature);
  args.option("batch", "problems at once", &a->batch, {1, 4096});
  args.option("output,o", "file for every question, response and grade, or the losses", &a->output);
  a->device.declare(args);
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
          "  cambium eval HYBRID --task text --data text.jsonl --teacher TEACHER",
          declare_eval};
}

Command report_command() {
  return {"report", "draws a run's report page again from its summary.json",
          "  cambium report out/demo", declare_report};
}

}  // namespace cambium
