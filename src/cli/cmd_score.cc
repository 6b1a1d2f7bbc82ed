// score and place: which layers need their attention least.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/progress.h"
#include "base/text.h"
#include "cli/commands.h"
#include "hybrid/measure.h"
#include "hybrid/pipeline.h"
#include "hybrid/placement.h"

namespace cambium {
namespace {

struct ScoreArgs {
  std::string model, teacher, data, output = "scores.json", method = "leave-mixer-out",
                                    metric = "reverse-kl", task, task_path;
  GraftOptions graft;
  int64_t documents = 32, max_tokens = 512, steps = 100, sequence = 1024, problems = 100, seed = 1;
  int64_t max_new_tokens = 256;
  double rate = 3e-4;
};

HybridPlan data_plan(const ScoreArgs& args) {
  HybridPlan plan;
  plan.seed = static_cast<uint64_t>(args.seed);
  plan.data.train = args.data;
  plan.data.valid = args.data;
  plan.evaluate.held_out_documents = args.documents;
  plan.evaluate.held_out_tokens = args.max_tokens;
  plan.evaluate.task = args.task;
  plan.evaluate.task_path = args.task_path;
  plan.evaluate.problems = args.metric == "accuracy" ? args.problems : 0;
  plan.evaluate.max_new_tokens = args.max_new_tokens;
  return plan;
}

int run_score(const ScoreArgs& args) {
  const ScoreMethod method = parse_score_method(args.method);
  const std::vector<std::string> metrics = {"reverse-kl", "nll", "accuracy"};
  expect(std::find(metrics.begin(), metrics.end(), args.metric) != metrics.end(),
         "--metric: expected {}, got '{}'{}", join(metrics, ", "), args.metric,
         did_you_mean(args.metric, metrics));
  LoadedModel base = load_model(args.model, {.storage = MatrixStorage::kStored});
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, {.storage = MatrixStorage::kStored});
  }
  Model& teacher = original.model ? *original.model : *base.model;
  const HybridPlan plan = data_plan(args);
  const RunData data(plan, Tokenizer::load(args.model));
  const std::vector<int64_t> layers = attention_layers(base.model->spec());
  const std::string fingerprint = fmt::format(
      "{} {} {} {} {} {} {} {}", args.model, layer_map(base.model->spec()), args.data, args.metric,
      args.documents, args.max_tokens, args.seed,
      method == ScoreMethod::kMixerReplacement
          ? fmt::format("{} {} {} {}", args.graft.mixer, args.steps, args.sequence, args.rate)
          : "");
  Importance importance;
  if (method == ScoreMethod::kMixerReplacement) {
    TrainConfig probe;
    probe.loss = {};
    probe.loss.reverse_kl = 1.0F;
    probe.steps = args.steps;
    probe.sequence_length = args.sequence;
    probe.schedule.peak = args.rate;
    probe.schedule.decay = Decay::kConstant;
    importance = score_by_replacement(*base.model, teacher, layers, args.graft, probe, data.train(),
                                      static_cast<uint64_t>(args.seed), fingerprint, args.output);
  } else {
    Progress progress("leave one out", layers.size(), {.unit = "layers"});
    importance = score_layers(
        layers, {args.method, args.metric, fingerprint, {}},
        [&](int64_t layer) {
          const LoadedModel without =
              remove_layer(*base.model, layer, method == ScoreMethod::kLeaveBlockOut);
          return damage(*without.model, teacher, data, data.held_out(), args.metric, plan.evaluate);
        },
        args.output, [&](int64_t done) { progress.update(static_cast<uint64_t>(done)); });
    progress.finish();
  }
  write_importance(importance, args.output);
  std::printf("%5s  %s (larger = needed more)\n", "layer", importance.metric.c_str());
  for (const int64_t layer : importance.order()) {
    const auto it = std::find_if(importance.layers.begin(), importance.layers.end(),
                                 [&](const LayerScore& s) { return s.layer == layer; });
    std::printf("%5lld  %.5f\n", static_cast<long long>(layer), it->score);
  }
  std::printf("written to %s\n", args.output.c_str());
  return 0;
}

Action declare_score(Args& args) {
  auto a = std::make_shared<ScoreArgs>();
  args.positional("model", "the model whose layers are scored", &a->model);
  args.option("method", "leave-mixer-out, leave-block-out or mmr", &a->method);
  args.option("metric", "for leave-one-out: reverse-kl, nll or accuracy", &a->metric);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("documents", "documents measured a layer", &a->documents);
  args.option("max-tokens", "tokens of a document at most", &a->max_tokens);
  args.option("teacher", "the original teacher, when the model is a hybrid", &a->teacher);
  args.option("mixer", "mmr: the mixer that is tried", &a->graft.mixer);
  args.option("window", "mmr: of sliding_window", &a->graft.window);
  args.option("steps", "mmr: training steps a layer", &a->steps);
  args.option("sequence", "mmr: tokens a step", &a->sequence);
  args.option("rate", "mmr: learning rate", &a->rate);
  args.option("task", "metric accuracy: gsm8k, math500, ... (generated problems otherwise)",
              &a->task);
  args.option("task-path", "metric accuracy: the task's file", &a->task_path);
  args.option("problems", "metric accuracy: problems asked", &a->problems);
  args.option("max-new-tokens", "metric accuracy: tokens of an answer at most", &a->max_new_tokens);
  args.option("seed", "of data and of what starts at random", &a->seed);
  args.option("output,o", "file of scores; layers it already holds are not scored again",
              &a->output);
  return [a] { return run_score(*a); };
}

struct PlaceArgs {
  std::string model, scores, method = "lowest";
  int64_t count = 0, cache = 0;
  double fraction = 0.0;
};

int run_place(const PlaceArgs& args) {
  const ModelSpec spec = read_spec(args.model);
  expect((args.count > 0) + (args.fraction > 0) + (args.cache > 0) == 1,
         "expected one of --count, --fraction and --cache-per-token");
  const int64_t count = args.count > 0      ? args.count
                        : args.fraction > 0 ? layers_to_convert(spec, args.fraction)
                                            : layers_for_cache_budget(spec, args.cache, 4);
  expect(args.method == "lowest" || args.method == "uniform",
         "--method: expected lowest or uniform, got '{}'", args.method);
  expect(args.method == "uniform" || !args.scores.empty(),
         "--method lowest: expected --scores, a file of `cambium score`");
  const std::vector<int64_t> layers = args.method == "uniform"
                                          ? place_uniform(spec, count)
                                          : place_lowest(read_importance(args.scores), count);
  std::vector<std::string> names;
  for (const int64_t layer : layers) {
    names.push_back(std::to_string(layer));
  }
  std::printf("%s\n", join(names, ",").c_str());
  return 0;
}

Action declare_place(Args& args) {
  auto a = std::make_shared<PlaceArgs>();
  args.positional("model", "the model (only its config.json is read)", &a->model);
  args.option("scores", "layer scores of `cambium score`", &a->scores);
  args.option("method", "lowest (by score) or uniform (by depth)", &a->method);
  args.option("count,k", "layers to convert", &a->count);
  args.option("fraction", "share of all layers that are to be converted in the end", &a->fraction);
  args.option("cache-per-token", "bytes (fp32) the cache may take a token", &a->cache);
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
          "  cambium place models/teacher --scores scores.json --cache-per-token 2048",
          declare_place};
}

}  // namespace cambium
