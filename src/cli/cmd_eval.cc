// eval: how good a model is, and how sure that is.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/cached_losses.h"
#include "eval/http_post.h"
#include "eval/likelihood.h"
#include "eval/mt_bench.h"
#include "eval/problem_source.h"
#include "eval/problems/long_context.h"
#include "eval/quality.h"
#include "eval/score_report.h"
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
  std::string words = "plain", by, shots_data, against, judge, judge_model = "judge";
  std::vector<std::string> set;
  std::vector<int64_t> lengths;
  int64_t count = 100, seed = 1, batch = 32, max_new_tokens = 256, max_tokens = 512;
  int64_t samples = 1, top_k = 0, shots = 0, depths = 5;
  double temperature = 0.0, top_p = 1.0;
  CacheOption cache{""};
  EngineOptions engine;
  DeviceOption device;
  PresetOption preset;
  bool chat = false, json = false, ungraded = false, rotations = false;

  /// In results.
  std::string model_name() const {
    return preset.name.empty() ? model : fmt::format("{} ({})", model, preset.name);
  }

  /// The judge is an address, not a folder.
  bool judged_elsewhere() const { return judge.find("://") != std::string::npos; }
  bool is_long() const { return is_long_task(task); }
  bool has_options() const {
    for (const char* name : {"gpqa", "arc", "hellaswag", "mmlu", "choices"}) {
      if (task == name) {
        return true;
      }
    }
    return false;
  }
  bool by_likelihood() const { return has_options() && by != "generation" && answers.empty(); }
  PromptWords prompt_words() const {
    return words == "harness" ? PromptWords::kHarness : PromptWords::kPlain;
  }
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
  const std::vector<LossSums> each =
      cached ? measure_cached(documents, model, teacher.model.get(), a.cache.values())
             : documents.measure(model, teacher.model.get(), "documents");
  return text_json(documents, each, tokenizer, teacher.model != nullptr,
                   cached ? a.cache.name : "none");
}

// How the answers came to be and how fast: everything needed to ask again.
Json answers_json(const EvalArgs& a, const Task& task, const Answers& answers) {
  return {{"task", task.name},
          {"model", a.model_name()},
          {"data", a.data},
          {"problems", task.examples.size()},
          {"prompt", a.chat                 ? "chat template"
                     : a.words == "harness" ? "as lm-evaluation-harness asks"
                                            : "question and a new line"},
          {"shots", a.shots},
          {"samples", a.samples},
          {"extraction", a.extract},
          {"max_new_tokens", a.max_new_tokens},
          {"temperature", a.temperature},
          {"top_p", a.top_p},
          {"top_k", a.top_k},
          {"seed", a.seed},
          {"batch", a.batch},
          {"cache", dtype_name(a.cache.values())},
          {"prompt_tokens", answers.prompt_tokens},
          {"tokens", answers.tokens},
          {"seconds", answers.seconds},
          {"tokens_per_second", answers.tokens_per_second()}};
}

// `settings`: what was asked, and how.
void report_scores(const EvalArgs& a, const Task& task, const AccuracyResult& result,
                   Json settings) {
  ScoreReport report{task.name, std::ssize(task.examples), &result};
  report.seconds = settings.contains("seconds") ? settings["seconds"].get<double>() : 0.0;
  report.against = a.against;
  if (a.is_long()) {
    report.grid = {a.lengths, a.depths, a.count * a.samples};
  }
  if (a.json) {
    settings.update(score_json(report));
    fmt::print("{}\n", settings.dump(1));
  } else {
    fmt::print("{}", score_text(report));
  }
}

// Questions with options by likelihood.
int eval_choices(const EvalArgs& a, Model& model, const Tokenizer& tokenizer, const Task& task,
                 std::vector<Example> shots) {
  const ChoiceConfig config{a.chat, a.rotations, std::move(shots)};
  const int64_t turns = rotations_of(task, config);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  int64_t all = 0;
  for (const Example& example : task.examples) {
    all += std::ssize(example.choice.options) * turns;
  }
  Progress progress(a.task, static_cast<uint64_t>(all), {.unit = "options"});
  const std::vector<ChoiceResult> results =
      evaluate_choices(model, tokenizer, task, config,
                       [&](int64_t done) { progress.update(static_cast<uint64_t>(done)); });
  progress.finish("");
  if (output) {
    std::string lines;
    for (size_t i = 0; i < results.size(); ++i) {
      const Example& example = task.examples[i / static_cast<size_t>(turns)];
      const Json line = {{"question", example.choice.stem},
                         {"expected", choice_letter(results[i].correct)},
                         {"given", choice_letter(results[i].chosen)},
                         {"correct", results[i].chosen == results[i].correct},
                         {"sample", static_cast<int64_t>(i) % turns},
                         {"log_probabilities", results[i].log_probabilities}};
      lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    }
    output->write(lines);
  }
  const ChoiceSummary s = summarise_choices(results, turns);
  Json json = {{"task", task.name},  {"model", a.model_name()},           {"data", a.data},
               {"by", "likelihood"}, {"questions", task.examples.size()}, {"rotations", turns},
               {"shots", a.shots}};
  if (a.json) {
    json.update(choices_json(s, turns));
    fmt::print("{}\n", json.dump(1));
  } else {
    fmt::print("{}", choices_text(s, turns, task.name, task.examples.size()));
  }
  return 0;
}

// The judge is a checkpoint folder or an address.
MtResult judged_here_or_there(const EvalArgs& a, const MtBench& bench,
                              std::vector<MtAnswer> answers) {
  if (a.judged_elsewhere()) {
    const char* key = std::getenv("CAMBIUM_JUDGE_KEY");
    constexpr double kSeconds = 600;  // a judge on a busy server may take minutes
    return judge_mt_bench(
        bench, std::move(answers),
        ask_address(a.judge, a.judge_model, key == nullptr ? "" : key, a.max_new_tokens, kSeconds));
  }
  LoadedModel judge =
      load_model(a.judge, {.storage = MatrixStorage::kStored, .device = a.device.device()});
  const Tokenizer words = Tokenizer::load(a.judge);
  words.expect_chat(a.judge, "a judge needs one");
  EngineConfig judging;
  judging.max_sequences = a.batch;
  return judge_mt_bench(bench, std::move(answers),
                        ask_model(*judge.model, words, judging, a.max_new_tokens, 0));
}

int judge_answers(const EvalArgs& a, const MtBench& bench, const std::vector<MtAnswer>& answers,
                  ResultFile* output) {
  std::string kept = "nothing is written";
  if (output != nullptr && a.answers.empty()) {  // whatever becomes of the judge
    output->write(mt_bench_lines(answers));
    kept = fmt::format(
        "the answers are kept in {}; --answers {} in the model's place has them "
        "judged",
        a.output, a.output);
  }
  const StopAnywhere stop(kept);
  MtResult result;
  try {
    result = judged_here_or_there(a, bench, answers);
  } catch (const Error& error) {
    fail("{}\n{}", error.what(), kept);
  }
  if (output != nullptr) {
    write_file_atomically(a.output, mt_bench_lines(result.answers));
  }
  expect(result.unrated < std::ssize(result.answers),
         "the judge gave no rating ([[1]] to [[10]]) to any of {} answers; the first judgement: {}",
         result.answers.size(), shortened(result.answers.front().judgement));
  if (a.json) {
    Json json = {{"task", a.task},
                 {"model", a.answers.empty() ? a.model_name() : a.answers},
                 {"judge", a.judge},
                 {"judge_model", a.judge_model}};
    json.update(mt_bench_json(result));
    fmt::print("{}\n", json.dump(1));
  } else {
    fmt::print("{}", mt_bench_text(result));
  }
  return 0;
}

int eval_mt_bench(const EvalArgs& a, Model& model, const Tokenizer& tokenizer,
                  EngineConfig engine) {
  const MtBench bench = load_mt_bench(a.data, a.count);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  engine.max_sequences = std::min(a.batch, engine.max_sequences);
  const std::vector<MtAnswer> answers = answer_mt_bench(
      bench, ask_model(model, tokenizer, engine, a.max_new_tokens, static_cast<uint64_t>(a.seed)));
  if (a.ungraded) {
    output->write(mt_bench_lines(answers));
    fmt::print("mt-bench: {} answers, not judged, in {}\n", answers.size(), a.output);
    return 0;
  }
  return judge_answers(a, bench, answers, output.get());
}

int judge_file(const EvalArgs& a) {
  const MtBench bench = load_mt_bench(a.data, a.count);
  const std::vector<MtAnswer> answers = read_mt_answers(a.answers, bench);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  return judge_answers(a, bench, answers, output.get());
}

// Options that the task at hand would not read are refused, never dropped.
void check_applies(const EvalArgs& a) {
  const bool text = a.task == "text";
  const bool generated = a.task == "problems" || a.task == "retrieval" || a.is_long();
  expect(generated || !a.data.empty(), "--task {}: expected --data, {}", a.task,
         text ? "a file of JSON lines" : "the task's file");
  expect(!generated || a.data.empty(),
         "--task {}: its problems are generated; --data belongs to "
         "text and the benchmarks",
         a.task);
  expect((generated && !a.is_long()) || a.set.empty(),
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
  expect((a.answers.empty() && !text && !a.by_likelihood()) || !a.engine.given(),
         "--cache-memory, --admission and --deterministic belong to a model that answers in words");
  expect(a.is_long() || a.lengths.empty(), "--length belongs to --task {}",
         join(long_task_names(), ", "));
  expect(a.answers.empty() || !a.is_long(),
         "--task {}: its problems are made for a model's tokenizer; ask the model", a.task);
  expect(!a.rotations || a.by_likelihood(),
         "--rotations belongs to questions with options, asked by likelihood");
  expect(a.by.empty() || a.has_options(),
         "--by belongs to questions with options (gpqa, arc, hellaswag, mmlu, choices)");
  expect(!a.by_likelihood() || (a.samples == 1 && !a.ungraded && a.against.empty()),
         "--samples, --ungraded and --against belong to answers in words: add --by generation");
  expect(a.samples == 1 || a.temperature > 0,
         "--samples {}: greedy answers are all the same; add --temperature 0.6", a.samples);
  expect(
      (a.shots == 0) == a.shots_data.empty(),
      "expected --shots K and --shots-data FILE together, the examples and where they come from");
  expect(!text || (a.against.empty() && a.shots == 0), "--{} belongs to tasks that are answered",
         a.shots > 0 ? "shots" : "against");
  const bool mt = a.task == "mt-bench";
  expect(!mt || a.ungraded || !a.judge.empty(),
         "--task mt-bench: expected --judge, an address or a checkpoint, or --ungraded");
  expect(!mt || !a.ungraded || a.judge.empty(),
         "--ungraded: answers are only written; leave --judge to the command with --answers");
  if (mt && a.judged_elsewhere()) {
    parse_chat_address(a.judge);  // wrong ones are said before anything is asked
  } else if (mt && !a.judge.empty()) {
    read_spec(a.judge);
  }
  expect(mt || a.judge.empty(), "--judge belongs to --task mt-bench");
  expect(!mt || (a.against.empty() && a.samples == 1 && a.shots == 0 && a.temperature == 0.0),
         "--task mt-bench asks each question once, at its category's temperature: leave "
         "--against, --samples, --shots and --temperature away");
  expect(!a.ungraded || !a.output.empty(),
         "--ungraded: expected --output, the file that is to be graded with --answers");
}

std::vector<Example> shots_of(const EvalArgs& a, const Task& task) {
  if (a.shots == 0) {
    return {};
  }
  Task shots = load_task(a.task, a.shots_data, a.shots, static_cast<uint64_t>(a.seed));
  expect(std::ssize(shots.examples) == a.shots, "{}: expected {} examples for --shots, got {}",
         a.shots_data, a.shots, shots.examples.size());
  for (const Example& example : task.examples) {
    for (const Example& shot : shots.examples) {
      expect(example.question != shot.question,
             "{}: '{}' is also asked: worked examples must not come from the test's own questions",
             a.shots_data, shortened(shot.question, 60));
    }
  }
  return shots.examples;
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
  report_scores(a, task, result, {{"task", task.name}, {"answers", a.answers}, {"data", a.data}});
  return 0;
}

int run_eval(EvalArgs a) {
  if (a.is_long() && a.lengths.empty()) {
    a.lengths = {4096};
  }
  check_applies(a);
  if (!a.answers.empty()) {
    return a.task == "mt-bench" ? judge_file(a) : grade_file(a);
  }
  const StopAnywhere stop("nothing is written: answers are graded when all came");
  EngineConfig engine;
  engine.max_sequences = a.batch;
  engine.cache_values = a.cache.values();
  a.engine.apply(engine);
  if (a.task != "text" && !a.by_likelihood()) {
    engine =
        planned_engine(a.model, MatrixStorage::kStored, a.device.device(), engine, a.preset.name);
  }
  LoadedModel loaded = load_model(
      a.model,
      {.storage = MatrixStorage::kStored, .device = a.device.device(), .preset = a.preset.name});
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  if (a.task == "mt-bench") {
    tokenizer.expect_chat(a.model, "mt-bench asks in turns");
    return eval_mt_bench(a, *loaded.model, tokenizer, engine);
  }
  if (a.chat) {
    tokenizer.expect_chat(a.model, "leave --chat away");
  }
  if (a.task == "text") {
    ResultFile results(a.output);
    results.write(eval_text(a, *loaded.model, tokenizer).dump(1) + "\n");
    return 0;
  }
  const auto seed = static_cast<uint64_t>(a.seed);
  // All lengths and depths as one task, so that the engine is asked once.
  const Task task =
      a.is_long() ? long_task(a.task, {a.lengths, a.depths, a.count}, seed, tokenizer) : task_of(a);
  if (a.by_likelihood()) {
    return eval_choices(a, *loaded.model, tokenizer, task, shots_of(a, task));
  }
  if (!a.ungraded) {
    expect_gradable(task);  // a machine that cannot run programs safely says so now
  }
  AccuracyConfig config;
  config.batch = std::min(a.batch, engine.max_sequences);
  config.engine = engine;
  config.max_new_tokens = a.max_new_tokens;
  config.chat = a.chat;
  config.words = a.prompt_words();
  config.shots = shots_of(a, task);
  config.temperature = a.temperature;
  config.top_p = a.top_p;
  config.top_k = a.top_k;
  config.samples = a.samples;
  config.seed = static_cast<uint64_t>(a.seed);
  std::unique_ptr<ResultFile> output;
  if (!a.output.empty()) {
    output = std::make_unique<ResultFile>(a.output);
  }
  Progress progress(a.task, task.examples.size() * static_cast<size_t>(a.samples),
                    {.unit = "answers"});
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
  report_scores(a, task, result, json);
  return 0;
}

Action declare_eval(Args& args) {
  auto a = std::make_shared<EvalArgs>();
  args.positional("model", "checkpoint folder", &a->model, false);
  std::vector<std::string> tasks = {"problems", "retrieval", "text"};
  tasks.insert(tasks.end(), long_task_names().begin(), long_task_names().end());
  tasks.insert(tasks.end(), task_forms().begin(), task_forms().end());
  tasks.push_back("mt-bench");
  args.choice("task", "", tasks, &a->task);
  args.option("data,d,task-path",
              "the benchmark's file (mt-bench: folder), or documents for --task text", &a->data);
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
  args.option("top-p", "sampling: the likeliest tokens that make up this share (1 = all)",
              &a->top_p, reals_from(0.0, 1.0));
  args.option("top-k", "sampling: among the k likeliest tokens (0 = all)", &a->top_k);
  args.option("samples", "answers to each problem; the score is the mean of all (pass@1)",
              &a->samples, {1, 10'000});
  args.option("shots", "worked examples before each question", &a->shots, {0, 1000});
  args.option("shots-data", "their file, of the task's form: the first K of it", &a->shots_data);
  args.choice("words",
              "how a model without chat template is asked: plain (the question and a new line), "
              "harness (as lm-evaluation-harness asks)",
              {"plain", "harness"}, &a->words);
  args.choice("by",
              "questions with options: likelihood (which option is likeliest; acc and acc_norm), "
              "generation (an answer in words)",
              {"likelihood", "generation"}, &a->by);
  args.flag("rotations",
            "questions with options: every order of them by turning; says how sticky letters are",
            &a->rotations);
  args.option("length", "passkey, keyvalue, variables: tokens of a question (1024,8192,...)",
              &a->lengths, {16, kMaxPositions});
  args.option("depths", "and places in it, even from the start to the end; -n problems at each",
              &a->depths, {1, 100});
  args.option("against", "compare with the graded answers in this file (of --output), in pairs",
              &a->against);
  args.option(
      "judge",
      "mt-bench: https://HOST/v1 or http://HOST:PORT/v1 of an OpenAI-compatible server (its "
      "key in CAMBIUM_JUDGE_KEY), or a checkpoint folder",
      &a->judge);
  args.option("judge-model", "the judge's name on that server", &a->judge_model);
  args.option("batch", "problems at once", &a->batch, {1, 4096});
  args.option("output,o", "file for every question, response and grade, or the losses", &a->output);
  a->cache.declare(args);
  a->engine.declare(args);
  a->preset.declare(args);
  a->device.declare(args);
  args.option("answers", "grade the answers in this file (of --output) instead of asking a model",
              &a->answers);
  args.flag("ungraded", "only write the answers: another machine grades them", &a->ungraded);
  args.flag("chat", "ask through the chat template", &a->chat);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run_eval(*a); };
}

}  // namespace

Command eval_command() {
  return {"eval", "task accuracy by generation, or the losses on text",
          "  cambium eval models/teacher --task problems -n 200\n"
          "  cambium eval DIR --task gsm8k --data gsm8k/test.jsonl --chat -o answers.jsonl\n"
          "  cambium eval DIR --task mbpp --data mbpp.json --chat --ungraded -o answers.jsonl\n"
          "  cambium eval --task mbpp --data mbpp.json --answers answers.jsonl\n"
          "  cambium eval DIR --task gsm8k --data test.jsonl --words harness --shots 5 "
          "--shots-data train.jsonl --extract strict\n"
          "  cambium eval DIR --task aime --data aime24.jsonl --chat --samples 16 "
          "--temperature 0.6 --top-p 0.95 --max-new-tokens 32768\n"
          "  cambium eval HYBRID --task math500 --data test.jsonl --chat --against teacher.jsonl\n"
          "  cambium eval DIR --task mmlu --data mmlu.jsonl --rotations\n"
          "  cambium eval DIR --task gpqa --data gpqa_diamond.csv --chat --by generation\n"
          "  cambium eval DIR --task mt-bench --data mt_bench --judge http://127.0.0.1:8000/v1 "
          "--max-new-tokens 1024\n"
          "  cambium eval DIR --task mt-bench --data mt_bench --ungraded -o answers.jsonl\n"
          "  cambium eval --task mt-bench --data mt_bench --answers answers.jsonl "
          "--judge https://HOST/v1 --judge-model NAME\n"
          "  cambium eval DIR --task passkey --length 1024,4096,16384 --depths 5 -n 10\n"
          "  cambium eval HYBRID --task text --data text.jsonl --teacher TEACHER\n"
          "  cambium eval DIR --task text --data text.jsonl --teacher DIR --cache f8",
          declare_eval};
}

}  // namespace cambium
