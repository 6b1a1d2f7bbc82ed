// score and place: which layers need their attention least.
#include <algorithm>
#include <cstdio>

#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/measure.h"
#include "hybrid/placement.h"
#include "hybrid/scoring.h"

namespace cambium {
namespace {

struct ScoreArgs {
  std::string model, teacher, data, output = "scores.json", method = "leave-mixer-out",
                                    metric = "reverse-kl", task, task_path;
  // Of some methods and metrics only; as they are here where they were not given.
  std::string mixer;
  int64_t window = -1, steps = -1, sequence = -1, problems = -1, max_new_tokens = -1;
  double rate = -1.0;
  int64_t documents = 32, max_tokens = 512, seed = 1;
  DeviceOption device;
  bool fresh = false;
};

void refuse(bool given, const char* option, const char* what) {
  expect(!given, "{} belongs to {}", option, what);
}

template <class T>
void take(T given, T* value) {
  *value = given < 0 ? *value : given;
}

void check_applies(const ScoreArgs& args, bool probes) {
  if (!probes) {
    const char* const what = "--method mmr";
    refuse(!args.mixer.empty(), "--mixer", what);
    refuse(args.window >= 0, "--window", what);
    refuse(args.steps >= 0, "--steps", what);
    refuse(args.sequence >= 0, "--sequence", what);
    refuse(args.rate >= 0, "--rate", what);
    refuse(!args.teacher.empty() && args.metric == "nll", "--teacher",
           "the metrics reverse-kl and accuracy and to --method mmr");
  }
  if (probes || args.metric != "accuracy") {
    const char* const what = "--metric accuracy of leave-one-out";
    refuse(!args.task.empty(), "--task", what);
    refuse(!args.task_path.empty(), "--task-path", what);
    refuse(args.problems >= 0, "--problems", what);
    refuse(args.max_new_tokens >= 0, "--max-new-tokens", what);
  }
  refuse(probes && args.metric != "reverse-kl", "--metric", "leave-one-out");
  expect(args.task.empty() == args.task_path.empty(), "expected both --task and --task-path");
}

ScoreOptions score_options(const ScoreArgs& args, ScoreMethod method) {
  ScoreOptions options;
  options.method = method;
  options.metric = args.metric;
  options.seed = static_cast<uint64_t>(args.seed);
  options.fresh = args.fresh;
  options.label = args.method;
  options.graft.mixer = args.mixer.empty() ? options.graft.mixer : args.mixer;
  take(args.window, &options.graft.window);
  TrainConfig& probe = options.probe;
  probe.loss = {};
  probe.loss.reverse_kl = 1.0F;
  probe.steps = 100;
  probe.sequence_length = 1024;
  probe.schedule.peak = 3e-4;
  probe.schedule.decay = Decay::kConstant;
  probe.seed = options.seed;
  take(args.steps, &probe.steps);
  take(args.sequence, &probe.sequence_length);
  take(args.rate, &probe.schedule.peak);
  check_fields(options.graft, "score");
  check_graft_options(options.graft, "score");
  check_fields(probe, "score");
  return options;
}

int run_score(const ScoreArgs& args) {
  const ScoreMethod method = parse_score_method(args.method);
  const bool probes = method == ScoreMethod::kMixerReplacement;
  check_applies(args, probes);
  const ScoreOptions options = score_options(args, method);
  check_scores_path(args.output);
  const StopAnywhere stop("nothing is scored");
  const LoadOptions load{.storage = MatrixStorage::kStored, .device = args.device.device()};
  LoadedModel base = load_model(args.model, load);
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, load);
  }
  Model& teacher = original.model ? *original.model : *base.model;

  DataPlan files;
  files.train = args.data;
  files.valid = args.data;
  EvaluationPlan evaluate;
  evaluate.held_out_documents = args.documents;
  evaluate.held_out_tokens = args.max_tokens;
  evaluate.task = args.task;
  evaluate.task_path = args.task_path;
  evaluate.problems = args.metric != "accuracy" ? 0 : args.problems < 0 ? 100 : args.problems;
  take(args.max_new_tokens, &evaluate.max_new_tokens);
  check_fields(evaluate, "score");
  expect(args.metric != "accuracy" || evaluate.problems > 0, "--problems: expected at least 1");
  const RunData data(files, evaluate, options.seed, Tokenizer::load(args.model));
  ScoreData scored;
  scored.tokenizer = &data.tokenizer();
  scored.train = &data.train();
  scored.documents = &data.held_out();
  scored.problems = &data.task();
  scored.answers = data.answers(evaluate);
  const Importance importance =
      score_importance(*base.model, teacher, options, scored, args.output);
  fmt::print("layer  {} (larger = needed more)\n", score_heading(importance.metric));
  for (const int64_t layer : importance.order()) {
    const auto it = std::find_if(importance.layers.begin(), importance.layers.end(),
                                 [&](const LayerScore& s) { return s.layer == layer; });
    fmt::print("{:5}  {:.5f}\n", layer, it->score);
  }
  fmt::print("written to {}\n", args.output);
  return 0;
}

Action declare_score(Args& args) {
  auto a = std::make_shared<ScoreArgs>();
  args.positional("model", "the model whose layers are scored", &a->model);
  args.choice("method", "", {"leave-mixer-out", "leave-block-out", "mmr"}, &a->method);
  args.choice("metric", "for leave-one-out", {"reverse-kl", "nll", "accuracy"}, &a->metric);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("documents", "documents measured a layer", &a->documents, {1});
  args.option("max-tokens", "tokens of a document at most", &a->max_tokens, {1});
  args.option("teacher", "the original teacher, when the model is a hybrid", &a->teacher);
  args.choice("mixer", "mmr: the mixer that is tried (mamba otherwise)", graft_mixers(), &a->mixer);
  args.option("window", "mmr: of sliding_window and parallel (128 otherwise)", &a->window);
  args.option("steps", "mmr: training steps a layer (100 otherwise)", &a->steps);
  args.option("sequence", "mmr: tokens a step (1024 otherwise)", &a->sequence);
  args.option("rate", "mmr: learning rate (3e-4 otherwise)", &a->rate);
  args.choice("task", "metric accuracy (generated problems otherwise)", task_forms(), &a->task);
  args.option("task-path", "metric accuracy: the task's file", &a->task_path);
  args.option("problems", "metric accuracy: problems asked (100 otherwise)", &a->problems);
  args.option("max-new-tokens", "metric accuracy: tokens of an answer at most (256 otherwise)",
              &a->max_new_tokens);
  args.option("seed", "of data and of what starts at random", &a->seed);
  args.option("output,o", "file of scores; goes on with what it holds of the same question",
              &a->output);
  a->device.declare(args);
  args.flag("fresh", "start anew where the file holds scores of something else", &a->fresh);
  return [a] { return run_score(*a); };
}

struct PlaceArgs {
  std::string model, scores, method = "lowest";
  int64_t count = 0, cache = 0;
  double fraction = 0.0;
  CacheOption values;
};

int run_place(const PlaceArgs& args) {
  const ModelSpec spec = read_spec(args.model);
  expect((args.count > 0) + (args.fraction > 0) + (args.cache > 0) == 1,
         "expected one of --count, --fraction and --cache-per-token");
  refuse(args.values.name != "bf16" && args.cache == 0, "--cache", "--cache-per-token");
  const int64_t count = args.count > 0 ? args.count
                        : args.fraction > 0
                            ? layers_to_convert(spec, args.fraction)
                            : layers_for_cache_budget(spec, args.cache, args.values.values());
  expect(args.method == "uniform" || !args.scores.empty(),
         "--method lowest: expected --scores, a file of `cambium score`");
  std::vector<int64_t> layers;
  if (args.method == "uniform") {
    refuse(!args.scores.empty(), "--scores", "--method lowest");
    layers = place_uniform(spec, count);
  } else {
    layers = place_by_file(args.scores, spec, count);
  }
  std::vector<std::string> names;
  for (const int64_t layer : layers) {
    names.push_back(std::to_string(layer));
  }
  fmt::print("{}\n", join(names, ","));
  return 0;
}

Action declare_place(Args& args) {
  auto a = std::make_shared<PlaceArgs>();
  args.positional("model", "the model (only its config.json is read)", &a->model);
  args.option("scores", "layer scores of `cambium score`", &a->scores);
  args.choice("method", "by score, or by depth", {"lowest", "uniform"}, &a->method);
  args.option("count,k", "layers to convert", &a->count);
  args.option("fraction", "share of all layers that are to be converted in the end", &a->fraction,
              {0.0, 1.0});
  args.option("cache-per-token", "bytes the cache may take a token", &a->cache);
  a->values.declare(args);
  return [a] { return run_place(*a); };
}

}  // namespace

Command score_command() {
  return {"score", "scores how much a model needs each layer's attention",
          "  cambium score models/teacher -o scores.json\n"
          "  cambium score MODEL --data text.jsonl --method leave-block-out --metric nll\n"
          "  cambium score HYBRID --teacher MODEL --method mmr --mixer mamba --steps 100",
          declare_score};
}

Command place_command() {
  return {"place", "chooses the layers to convert, by score or evenly",
          "  cambium place models/teacher --scores scores.json --count 10\n"
          "  cambium place models/teacher --method uniform --fraction 0.6\n"
          "  cambium place models/teacher --scores scores.json --cache-per-token 1024",
          declare_place};
}

}  // namespace cambium
