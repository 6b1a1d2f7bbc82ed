// eval, bench and report: how good, how fast, and the page that shows both.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "eval/problem_source.h"
#include "eval/quality.h"
#include "eval/throughput.h"
#include "model/random_model.h"
#include "model/weights.h"
#include "train/held_out.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

struct EvalArgs {
  std::string model, task = "problems", data, teacher, output;
  std::vector<std::string> set;
  int64_t count = 100, seed = 1, batch = 32, max_new_tokens = 256, max_tokens = 512;
  double temperature = 0.0;
  bool chat = false, json = false;
};

Json eval_text(const EvalArgs& a, Model& model, const Tokenizer& tokenizer) {
  expect(!a.data.empty(), "--task text: expected --data, a file of JSON lines");
  const auto source = load_jsonl(a.data, tokenizer);
  const HeldOut documents(*source, a.count, a.max_tokens);
  LoadedModel teacher;
  if (!a.teacher.empty()) {
    teacher = load_model(a.teacher);
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

int run_eval(const EvalArgs& a) {
  LoadedModel loaded = load_model(a.model);
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  if (a.task == "text") {
    std::printf("%s\n", eval_text(a, *loaded.model, tokenizer).dump(1).c_str());
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
    expect(!a.data.empty(), "--task {}: expected --data, the task's file", a.task);
    task = load_task(a.task, a.data, a.count);
  }
  AccuracyConfig config;
  config.batch = a.batch;
  config.max_new_tokens = a.max_new_tokens;
  config.chat = a.chat;
  config.temperature = a.temperature;
  config.seed = static_cast<uint64_t>(a.seed);
  Progress progress(a.task, task.examples.size(), {.unit = "problems"});
  const AccuracyResult result =
      evaluate_accuracy(*loaded.model, tokenizer, task, config,
                        [&](int64_t done) { progress.update(static_cast<uint64_t>(done)); });
  progress.finish();
  if (!a.output.empty()) {
    write_file_atomically(a.output, example_lines(result.examples));
  }
  const AccuracySummary& s = result.summary;
  if (a.json) {
    std::printf("%s\n", Json({{"task", task.name},
                              {"correct", s.correct},
                              {"total", s.total},
                              {"accuracy", s.accuracy.value},
                              {"low", s.accuracy.low},
                              {"high", s.accuracy.high}})
                            .dump(1)
                            .c_str());
  } else {
    std::printf("%s: %lld of %lld right, %.1f %% [%.1f, %.1f] (95 %%)\n", task.name.c_str(),
                static_cast<long long>(s.correct), static_cast<long long>(s.total),
                100 * s.accuracy.value, 100 * s.accuracy.low, 100 * s.accuracy.high);
  }
  return 0;
}

Action declare_eval(Args& args) {
  auto a = std::make_shared<EvalArgs>();
  args.positional("model", "checkpoint folder", &a->model);
  args.option("task",
              "problems, retrieval, text, gsm8k, math500, aime, svamp, mawps, asdiv or mbpp",
              &a->task);
  args.option("data,d", "the benchmark's file, or documents for --task text", &a->data);
  args.option("count,n", "problems or documents (from the start)", &a->count);
  args.option("seed", "of generated problems and of sampling", &a->seed);
  args.option("set", "generated problems: word.max_steps=3, ...", &a->set);
  args.option("teacher", "--task text: also the KL divergence to this model", &a->teacher);
  args.option("max-new-tokens", "tokens of an answer at most", &a->max_new_tokens);
  args.option("max-tokens", "--task text: tokens of a document at most", &a->max_tokens);
  args.option("temperature", "0 = greedy", &a->temperature);
  args.option("batch", "problems at once", &a->batch);
  args.option("output,o", "file for every question, response and grade", &a->output);
  args.flag("chat", "ask through the chat template", &a->chat);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run_eval(*a); };
}

struct BenchArgs {
  std::vector<std::string> models, random;
  std::vector<int64_t> contexts;
  std::string storage = "f32";
  int64_t batch = 1, decode = 32, repeats = 5;
  bool json = false;
};

int run_bench(const BenchArgs& a) {
  expect(a.storage == "f32" || a.storage == "bf16", "--storage: expected f32 or bf16, got '{}'",
         a.storage);
  LoadOptions load;
  load.storage = a.storage == "bf16" ? MatrixStorage::kBF16 : MatrixStorage::kF32;
  expect(!a.models.empty() || !a.random.empty(),
         "bench: expected a checkpoint folder, or --random-weights with a configuration");
  std::vector<LoadedModel> loaded;
  std::vector<Model*> models;
  std::vector<std::string> names = a.models;
  for (const std::string& dir : a.models) {
    loaded.push_back(load_model(dir, load));
  }
  for (const std::string& config : a.random) {
    loaded.push_back(random_model(read_spec(config), load.storage, 1));
    names.push_back(config + " (random weights)");
  }
  for (LoadedModel& m : loaded) {
    models.push_back(m.model.get());
  }
  ThroughputConfig config;
  config.contexts = a.contexts.empty() ? std::vector<int64_t>{512, 4096} : a.contexts;
  config.batch = a.batch;
  config.decode_tokens = a.decode;
  config.repeats = a.repeats;
  const auto speeds = measure_throughput(models, config);
  Json json = Json::array();
  if (!a.json) {
    std::printf("%-28s %8s %6s %24s %24s %14s %14s\n", "model", "context", "batch",
                "prefill tok/s [range]", "decode tok/s [range]", "CPU ms prefill",
                "a token decode");
  }
  for (size_t i = 0; i < models.size(); ++i) {
    for (const SpeedSummary& s : speeds[i]) {
      if (a.json) {
        json.push_back(
            {{"model", names[i]},
             {"context", s.context},
             {"batch", s.batch},
             {"prefill", {s.prefill.value, s.prefill.low, s.prefill.high}},
             {"decode", {s.decode.value, s.decode.low, s.decode.high}},
             {"prefill_cpu_ms", {s.prefill_cpu.value, s.prefill_cpu.low, s.prefill_cpu.high}},
             {"decode_cpu_ms", {s.decode_cpu.value, s.decode_cpu.low, s.decode_cpu.high}}});
      } else {
        std::printf(
            "%-28s %8lld %6lld %24s %24s %14.3f %14.3f\n", names[i].c_str(),
            static_cast<long long>(s.context), static_cast<long long>(s.batch),
            fmt::format("{:.0f} [{:.0f}, {:.0f}]", s.prefill.value, s.prefill.low, s.prefill.high)
                .c_str(),
            fmt::format("{:.1f} [{:.1f}, {:.1f}]", s.decode.value, s.decode.low, s.decode.high)
                .c_str(),
            s.prefill_cpu.value, s.decode_cpu.value);
      }
    }
  }
  if (a.json) {
    std::printf("%s\n", json.dump(1).c_str());
  }
  return 0;
}

Action declare_bench(Args& args) {
  auto a = std::make_shared<BenchArgs>();
  args.positionals("models", "checkpoint folders, measured in turns", &a->models, false);
  args.option("random-weights", "config.json, or its folder: a model of its sizes, made-up numbers",
              &a->random);
  args.option("contexts", "tokens before the measured ones (512,4096)", &a->contexts);
  args.option("batch", "sequences at once", &a->batch);
  args.option("decode", "tokens decoded", &a->decode);
  args.option("repeats", "rounds; the median and the range are printed", &a->repeats);
  args.option("storage", "f32 or bf16", &a->storage);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run_bench(*a); };
}

struct ReportArgs {
  std::string run, output;
};

int run_report(const ReportArgs& a) {
  const RunSummary summary = read_summary(std::filesystem::path(a.run) / "summary.json");
  const std::string folder = a.output.empty() ? a.run : a.output;
  make_folder(folder);
  write_report(summary, folder);
  std::printf("%s/report.html\n", folder.c_str());
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

Command bench_command() {
  return {"bench", "prefill and decode speed of one or more models, side by side",
          "  cambium bench models/teacher out/demo/stages/60/model --contexts 512,8192\n"
          "  cambium bench --random-weights plans/apriel-15b --storage bf16 --contexts 16",
          declare_bench};
}

Command report_command() {
  return {"report", "draws a run's report page again from its summary.json",
          "  cambium report out/demo", declare_report};
}

}  // namespace cambium
