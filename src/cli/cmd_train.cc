#include <cstdio>

#include "base/file.h"
#include "cli/commands.h"
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
  bool resume = false;
};

// The tokenizer a plan asks for: a folder's, or one trained on the first problems. Leaves its files
// in `folder` either way.
Tokenizer prepare_tokenizer(const PlanTable& table, const ProblemSpec& problems, uint64_t seed,
                            const std::filesystem::path& folder) {
  const std::string from = table.get_string("path", "");
  const int64_t vocabulary = table.get_int("vocabulary", 512);
  const int64_t samples = table.get_int("samples", 2000);
  const std::string chat_template = table.get_string("chat_template", "");
  if (!from.empty()) {
    return Tokenizer::load(from);
  }
  if (!std::filesystem::exists(folder / "tokenizer.json")) {
    std::vector<std::string> texts;
    for (int64_t i = 0; i < samples; ++i) {
      const Problem p = make_problem(problems, Split::kTrain, seed, static_cast<uint64_t>(i));
      texts.push_back(p.question + "\n");
      texts.push_back(p.answer);
    }
    const TokenizerFiles files = train_tokenizer(texts, vocabulary, {"<|end|>"}, chat_template);
    make_folder(folder.string());
    write_file_atomically((folder / "tokenizer_config.json").string(), files.config_json);
    write_file_atomically((folder / "tokenizer.json").string(), files.tokenizer_json);
  }
  return Tokenizer::load(folder);
}

int run(const TrainArgs& args) {
  PlanTable plan = PlanTable::read(args.plan);
  plan.set_all(args.set);
  const std::filesystem::path folder =
      args.output.empty() ? plan.get_string("output", "out/train") : args.output;
  plan.get_string("output", "");
  const auto seed = static_cast<uint64_t>(plan.get_int("seed", 1));
  const PlanTable data = plan.table("data");
  const std::string path = data.get_string("train", "");
  const ProblemSpec problems = read_problem_spec(data.table("problems"));
  const int64_t whole_every = data.get_int("learn_whole_every", 0);
  expect(args.resume || !std::filesystem::exists(folder / "log.jsonl"),
         "{} holds a run already; go on with --resume, or choose another folder with --output",
         folder.string());
  make_folder(folder.string());
  const std::filesystem::path tokenizer_dir =
      !args.model.empty() ? std::filesystem::path(args.model) : folder / "tokenizer";
  const PlanTable tokenizer_plan = plan.table("tokenizer");
  const Tokenizer tokenizer =
      !args.model.empty() ? Tokenizer::load(args.model)
                          : prepare_tokenizer(tokenizer_plan, problems, seed, tokenizer_dir);
  LoadedModel model;
  const PlanTable model_plan = plan.table("model");
  if (!args.model.empty()) {
    model = load_model(args.model);
  } else {
    const ModelPlan shape = read_model_plan(model_plan, tokenizer);
    model = fresh_model(shape.spec, seed, shape.init_std);
  }
  const std::shared_ptr<DocumentSource> source =
      path.empty() ? problem_source(tokenizer, problems, Split::kTrain, seed, whole_every)
                   : load_jsonl(path, tokenizer);
  TrainConfig defaults;
  defaults.seed = seed;
  TrainConfig config = read_train_config(plan.table("train"), defaults);
  plan.expect_all_used();
  config.folder = folder.string();
  config.resume = args.resume;
  Trainer trainer(*model.model, model.weights, config, *source);
  std::fprintf(stderr, "training %lld parameters for %lld steps; log in %s/log.jsonl\n",
               static_cast<long long>(model.model->parameter_count()),
               static_cast<long long>(config.steps), folder.c_str());
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
  save_trained(*model.model, folder / "model", tokenizer_from,
               fmt::format("{{\"command\": \"cambium train {}\", \"seed\": {}, \"steps\": {}, "
                           "\"tokens\": {}}}\n",
                           args.plan, seed, summary.steps, summary.tokens));
  std::printf("%lld tokens in %.0f s, last loss %.4f\nmodel in %s/model\n",
              static_cast<long long>(summary.tokens), summary.seconds, summary.last_loss,
              folder.c_str());
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
