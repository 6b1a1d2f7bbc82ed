#include <cstdio>
#include <optional>

#include "base/background.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problem_source.h"
#include "eval/quality.h"
#include "text/tokenizer_train.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct TrainArgs {
  std::string plan, output, model;
  std::vector<std::string> set;
  int64_t stop_after = 0;
  DeviceOption device;
  StorageOption storage;
  bool resume = false, supernet = false;
};

struct TokenizerPlan {
  std::string path;  // of an existing one; empty = trained on the first problems
  int64_t vocabulary = 512;
  int64_t samples = 2000;
  std::string chat_template;
};

/// What a plan has beside [model], [train] and [data.problems].
struct JobPlan {
  uint64_t seed = 1;
  std::string output = "out/train";
  std::string data;
  int64_t learn_whole_every = 0;
  TokenizerPlan tokenizer;
};

void visit_fields(JobPlan& plan, FieldVisitor& visit) {
  visit({"seed", "of weights, generated problems and the order of the data"}, plan.seed,
        ints_from(0));
  visit({"output", "run folder"}, plan.output);
  visit.table({"data"}, [&] {
    visit({"train", "a file of JSON lines; empty = generated problems"}, plan.data);
    visit({"learn_whole_every", "every so manieth problem is learned with its question; 0 = none"},
          plan.learn_whole_every, ints_from(0));
  });
  visit.table({"tokenizer"}, [&] {
    visit({"path", "folder of an existing tokenizer"}, plan.tokenizer.path);
    visit({"vocabulary", "tokens of one trained on the problems"}, plan.tokenizer.vocabulary,
          ints_from(257, int64_t{1} << 24));
    visit({"samples", "problems it is trained on"}, plan.tokenizer.samples,
          ints_from(1, 100'000'000));
    visit({"chat_template", "of the trained tokenizer"}, plan.tokenizer.chat_template);
  });
}

/// The files of a tokenizer trained on the first problems.
TokenizerFiles tokenizer_of(const TokenizerPlan& plan, const ProblemSpec& problems, uint64_t seed) {
  std::vector<std::string> texts;
  for (int64_t i = 0; i < plan.samples; ++i) {
    const Problem p = make_problem(problems, Split::kTrain, seed, static_cast<uint64_t>(i));
    texts.push_back(p.question + "\n");
    texts.push_back(p.answer);
  }
  return train_tokenizer(texts, plan.vocabulary, {"<|end|>"}, plan.chat_template);
}

void write_tokenizer(const TokenizerFiles& files, const std::filesystem::path& folder) {
  make_folder(folder.string());
  write_file_atomically((folder / "tokenizer_config.json").string(), files.config_json);
  write_file_atomically((folder / "tokenizer.json").string(), files.tokenizer_json);
}

int run(const TrainArgs& args) {
  PlanTable plan = PlanTable::read(args.plan);
  plan.set_all(args.set);
  JobPlan job;
  read_fields(job, plan);
  const std::filesystem::path folder = args.output.empty() ? job.output : args.output;
  const uint64_t seed = job.seed;
  const ProblemSpec problems = read_problem_spec(plan.table("data").table("problems"));
  const PlanTable model_table = plan.table("model");
  ModelPlan shape;
  if (args.model.empty()) {
    shape = read_model_plan(model_table);
  } else {
    read_fields(shape, model_table);  // not used, but checked
  }
  const StopSignals signals;
  TrainConfig defaults;
  defaults.seed = seed;
  defaults.supernet.sampling =
      args.supernet ? PlacementSampling::kUniform : PlacementSampling::kNone;
  TrainConfig config = read_train_config(plan.table("train"), defaults);
  plan.expect_all_used();
  const Device device = args.device.device();
  const Dtype activations = activations_of(config.precision, device);
  config.folder = folder.string();
  config.resume = args.resume;
  config.run_folder = claim_training_folder(folder, args.resume, {"model", "tokenizer"});
  Background background;
  config.background = &background;
  std::optional<StopAnywhere> stop("the run has not begun");
  // Of the model, of an existing folder, or trained here; a resumed run finds that in its folder.
  const std::string& given = !args.model.empty() ? args.model : job.tokenizer.path;
  const std::filesystem::path tokenizer_dir =
      given.empty() ? folder / "tokenizer" : std::filesystem::path(given);
  if (!given.empty()) {
    check_tokenizer_files(given);
  }
  std::optional<TokenizerFiles> made;
  if (given.empty() && !std::filesystem::exists(tokenizer_dir / "tokenizer.json")) {
    made = tokenizer_of(job.tokenizer, problems, seed);
  }
  const Tokenizer tokenizer = made ? Tokenizer::parse(made->tokenizer_json, made->config_json)
                                   : Tokenizer::load(tokenizer_dir);
  LoadedModel model = args.model.empty()
                          ? fresh_model(model_spec(shape, tokenizer), seed, shape.init_std)
                          : load_model(args.model, load_on(device));
  model.weights.move_to(*model.model, device);
  const std::shared_ptr<DocumentSource> source =
      job.data.empty()
          ? problem_source(tokenizer, problems, Split::kTrain, seed, job.learn_whole_every)
          : load_jsonl(job.data, tokenizer);
  Trainer trainer(*model.model, model.weights, config, *source);
  if (made) {  // only now: a plan, model or data at fault leaves nothing behind
    write_tokenizer(*made, tokenizer_dir);
  }
  say("training {} parameters for {}{}; log in {}/log.jsonl", model.model->parameter_count(),
      config.tokens > 0 ? fmt::format("{} tokens", config.tokens)
                        : fmt::format("{} steps", config.steps),
      device.kind == Device::kCpu
          ? std::string()
          : fmt::format(" on {}, activations in {}", device.describe(), dtype_name(activations)),
      folder.string());
  stop.reset();  // from here on the trainer keeps what it has
  int64_t taken = 0;
  const TrainSummary summary = trainer.run(
      [&](const StepReport&) { return args.stop_after == 0 || ++taken < args.stop_after; });
  if (!trainer.finished()) {
    std::printf("stopped after step %lld; go on with --resume\n",
                static_cast<long long>(trainer.next_step()));
    return 0;
  }
  const std::string tokenizer_from =
      std::filesystem::exists(tokenizer_dir / "tokenizer.json") ? tokenizer_dir.string() : "";
  config.run_folder->expect_present();
  save_trained(*model.model, model.weights, folder / "model", tokenizer_from,
               {{"command", "cambium train " + args.plan},
                {"seed", seed},
                {"steps", summary.steps},
                {"tokens", summary.tokens},
                {"learned", summary.learned}},
               args.storage.storage());
  background.wait();
  fmt::print("{} tokens ({} of them learned) in {:.0f} s, last loss {:.4f}\nmodel in {}/model\n",
             summary.tokens, summary.learned, summary.seconds, summary.last_loss, folder.string());
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<TrainArgs>();
  args.positional("plan", "the plan: a TOML file with [model], [tokenizer], [data] and [train]",
                  &a->plan);
  args.option("output,o", "run folder (the plan's 'output' otherwise)", &a->output);
  args.option("model,m", "fine-tune this checkpoint instead of starting from [model]", &a->model);
  args.option("set", "change a key of the plan: key=value, may be repeated", &a->set);
  args.option("stop-after", "stop (with a checkpoint) after so many steps; 0 = run to the end",
              &a->stop_after);
  a->device.declare(args);
  args.flag("supernet",
            "the model is a supernet: each step draws the mixers that run (as "
            "train.supernet.sampling says, otherwise uniform)",
            &a->supernet);
  a->storage.declare(args);
  args.flag("resume", "go on from the newest checkpoint of the folder", &a->resume);
  return [a] { return run(*a); };
}

}  // namespace

Command train_command() {
  static const std::string examples =
      "  cambium train plans/teacher.toml -o out/teacher\n"
      "  cambium train plans/teacher.toml -o out/teacher --resume\n"
      "  cambium train plan.toml --model DIR --set train.schedule.rate=1e-5\n"
      "Keys of [train], for the plan and --set:\n" +
      fields_help(list_fields<TrainConfig>(), "train.");
  return {"train", "trains a model from scratch, or fine-tunes one, by a plan", examples.c_str(),
          declare};
}

}  // namespace cambium
