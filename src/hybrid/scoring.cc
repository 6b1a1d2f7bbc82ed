#include "hybrid/scoring.h"

#include <algorithm>
#include <chrono>

#include "base/checksum.h"
#include "base/progress.h"
#include "base/signals.h"
#include "eval/problem_source.h"
#include "hybrid/placement_judge.h"
#include "hybrid/plan.h"
#include "hybrid/relaxation.h"
#include "tensor/copy.h"
#include "train/layer_walk.h"

namespace cambium {
namespace {

constexpr const char* kKept =
    "the layers scored so far are kept; the same command goes on with the others";
constexpr const char* kGatesKept =
    "the gates as they are so far are kept; the same command goes on with them";

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// Reads documents to train on, not held-out ones.
bool trains(ScoreMethod method) {
  return method == ScoreMethod::kMixerReplacement || method == ScoreMethod::kGates;
}

/// Asks of a student with every layer converted.
bool has_student(ScoreMethod method) {
  return method == ScoreMethod::kRestoreOne || method == ScoreMethod::kGates;
}

// All that decides the scores, and nothing else.
Fingerprint fingerprint_of(Model& base, Model& teacher, const ScoreOptions& o,
                           const ScoreData& data) {
  Fingerprint f;
  f["layers"] = layer_map(base.spec());
  f["model"] = model_digest(base);
  const Dtype activations =
      trains(o.method) ? activations_of(o.probe.precision, base.device()) : base.activations();
  if (activations != Dtype::kF32) {
    f["precision"] = dtype_name(activations);
  }
  if (o.metric != "nll" || trains(o.method)) {
    f["teacher"] = model_digest(teacher);
  }
  if (has_student(o.method)) {
    f["student"] = data.bank->digest(1);
  }
  if (trains(o.method)) {
    f["data"] = data.train->fingerprint();
    for (const auto& [name, value] : fingerprint_fields(o.probe)) {
      f["probe " + name] = value;
    }
  }
  if (o.method == ScoreMethod::kGates) {
    f["price"] = fmt::format("{}", o.price);
    return f;
  }
  if (o.method == ScoreMethod::kMixerReplacement) {
    f["seed"] = fmt::format("{}", o.seed);
    for (const auto& [name, value] : fingerprint_fields(o.graft)) {
      f["graft " + name] = value;
    }
    if (!o.graft.rope) {
      f["graft rope"] = "false";
    }
    if (o.graft.sink_logits) {
      f["graft sink_logits"] = "true";
    }
    return f;
  }
  f["data"] = data.documents->fingerprint();
  if (o.method == ScoreMethod::kWindowSwap) {
    f["window"] = fmt::format("{}", o.graft.window);
    f["sinks"] = fmt::format("{}", o.graft.sinks);
  }
  if (metric_asks(o.metric)) {
    f["problems"] = digest(*data.problems);
    f["answers"] = fmt::format("at most {} tokens, {}, {} at once", data.answers.max_new_tokens,
                               data.answers.chat ? "chat template" : "plain", data.answers.batch);
    f["tokenizer"] = checksum_text(data.tokenizer->fingerprint());
    f["tokenizer's rules"] = checksum_text(data.tokenizer->rules_fingerprint());
  }
  return f;
}

double mean(const LossSums& sums, bool kl) {
  return (kl ? sums.reverse_kl : sums.cross_entropy) /
         static_cast<double>(std::max<int64_t>(sums.tokens, 1));
}

/// Models that are one but for a layer, and how their damage becomes that layer's score.
struct Variants {
  Model& common;
  std::function<LoadedModel(int64_t layer)> make;
  double from = 0.0;
  double sign = 1.0;

  double score(double damage) const { return from + sign * damage; }
};

// Measures every layer's variant in turn, over as many documents at once as memory holds: `file`
// has the sums of all layers in `partial` afterwards, or passes them to `done` as soon as they are
// whole.
void walk_documents(const Variants& variants, Model* teacher, const std::vector<int64_t>& layers,
                    const ScoreOptions& o, const HeldOut& documents, ScoreFile& file,
                    const std::function<void(const PartialScore&)>& done) {
  LayerWalk walk(documents, variants.common, teacher, o.stored_bytes);
  const int64_t groups = walk.groups();
  for (;;) {
    // From the group that the layer furthest behind comes to next, up to the next one's.
    int64_t first = groups;
    for (const int64_t layer : layers) {
      first = std::min(first, file.has(layer) ? groups : file.partial(layer).groups);
    }
    if (first == groups) {
      return;
    }
    int64_t limit = groups;
    for (const int64_t layer : layers) {
      const int64_t at = file.has(layer) ? groups : file.partial(layer).groups;
      limit = at > first ? std::min(limit, at) : limit;
    }
    const int64_t end = walk.load(first, limit);
    for (const int64_t layer : layers) {
      if (file.has(layer) || file.partial(layer).groups != first) {
        continue;
      }
      stop_point();
      const Stopwatch watch;
      walk.advance(layer);
      const LoadedModel variant = variants.make(layer);
      PartialScore& score = file.partial(layer);
      for (const LossSums& sums : walk.measure(*variant.model)) {
        score.sums += sums;
      }
      score.groups = end;
      score.seconds += watch.seconds();
      if (end == groups && done) {
        done(score);
      } else {
        file.save();
      }
    }
  }
}

double wrong_answers(Model& model, const ScoreData& data) {
  return 1.0 - evaluate_accuracy(model, *data.tokenizer, *data.problems, data.answers, [](int64_t) {
                 stop_point();
               }).summary.accuracy.value;
}

Importance score_variants(const Variants& variants, Model& teacher, const ScoreOptions& o,
                          const ScoreData& data, ScoreFile& file,
                          const std::vector<int64_t>& layers) {
  const bool kl = o.metric != "nll";
  Progress progress(o.label, layers.size(), {.unit = "layers"});
  const auto tell = [&] { progress.update(static_cast<uint64_t>(file.scores().layers.size())); };
  std::function<void(const PartialScore&)> done;
  if (!metric_asks(o.metric)) {
    done = [&](const PartialScore& p) {
      file.add({p.layer, variants.score(mean(p.sums, kl)), p.seconds});
      tell();
    };
  }
  walk_documents(variants, kl ? &teacher : nullptr, layers, o, *data.documents, file, done);
  for (const int64_t layer : layers) {
    if (file.has(layer)) {
      continue;
    }
    const Stopwatch watch;
    const LoadedModel variant = variants.make(layer);
    const double wrong = wrong_answers(*variant.model, data);
    const PartialScore& p = file.partial(layer);
    file.add({layer, variants.score(wrong), p.seconds + watch.seconds(),
              variants.sign * mean(p.sums, true)});
    tell();
  }
  progress.finish();
  return file.scores();
}

// The student with all but one layer converted, against itself.
Importance restore_one(Model& teacher, const ScoreOptions& o, const ScoreData& data,
                       ScoreFile& file, const std::vector<int64_t>& layers) {
  const MixerBank& bank = *data.bank;
  const LoadedModel student = bank.build(bank.all(1));
  const bool kl = o.metric != "nll";
  const double damage =
      metric_asks(o.metric)
          ? wrong_answers(*student.model, data)
          : mean(total(data.documents->measure(*student.model, kl ? &teacher : nullptr)), kl);
  const auto make = [&](int64_t layer) {
    Choices choices = bank.all(1);
    const auto place = std::find(bank.layers().begin(), bank.layers().end(), layer);
    choices[static_cast<size_t>(place - bank.layers().begin())] = 0;
    return bank.build(choices);
  };
  return score_variants({*student.model, make, damage, -1.0}, teacher, o, data, file, layers);
}

// Trains the mixers of `layers` alone; the losses of the steps.
std::vector<double> train_mixers(LoadedModel& student, Model& teacher,
                                 const std::vector<int64_t>& layers, TrainConfig config,
                                 const DocumentSource& data,
                                 const std::function<void(int64_t)>& progress) {
  std::vector<std::string> prefixes;
  for (const int64_t layer : layers) {
    const UnitSpec& mixer = *student.model->spec().layers[static_cast<size_t>(layer)].mixer();
    prefixes.push_back(unit_prefix(layer, mixer));
  }
  config.folder.clear();
  config.trainable = [&prefixes](const std::string& name, const Parameter&) {
    return std::any_of(prefixes.begin(), prefixes.end(),
                       [&](const std::string& prefix) { return name.starts_with(prefix); });
  };
  if (config.objective == Objective::kAlign) {
    config.align.layers = layers;
  }
  Trainer trainer(*student.model, student.weights, config, data, &teacher);
  std::vector<double> losses;
  while (!trainer.finished()) {
    stop_point();
    losses.push_back(trainer.step().loss);
    if (progress) {
      progress(static_cast<int64_t>(losses.size()));
    }
  }
  return losses;
}

double replace_mixer(Model& base, Model& teacher, int64_t layer, const ScoreOptions& o,
                     const DocumentSource& data) {
  LoadedModel student = convert(base, teacher, {layer}, o.graft, o.seed, true);
  const std::vector<double> losses = train_mixers(student, teacher, {layer}, o.probe, data, {});
  const size_t last = std::clamp<size_t>(losses.size() / 2, 1, 10);
  double sum = 0.0;
  for (size_t i = losses.size() - last; i < losses.size(); ++i) {
    sum += losses[i];
  }
  return sum / static_cast<double>(last);
}

Importance relax(const ScoreOptions& o, const ScoreData& data, ScoreFile& file) {
  const std::vector<int64_t>& layers = data.bank->layers();
  if (std::all_of(layers.begin(), layers.end(), [&](int64_t layer) { return file.has(layer); })) {
    return file.scores();
  }
  PartialGates& state = file.gates();
  Progress progress(o.label, static_cast<uint64_t>(o.probe.steps), {.unit = "steps"});
  const std::vector<double> gates =
      learn_gates(*data.bank, {o.probe, o.price}, *data.train, state, [&] {
        progress.update(static_cast<uint64_t>(state.steps));
        file.save();
      });
  progress.finish();
  const double seconds = state.seconds / static_cast<double>(layers.size());
  const std::vector<double> logits = state.logits;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (!file.has(layers[i])) {
      file.add({layers[i], gates[i], seconds, logits[i]});
    }
  }
  return file.scores();
}

}  // namespace

std::string digest(const Task& task) {
  Checksum sum;
  for (const Example& e : task.examples) {
    for (const std::string& text : {e.question, e.answer}) {
      sum.update(std::as_bytes(std::span(text)));
      sum.update(std::as_bytes(std::span("\0", 1)));
    }
  }
  return fmt::format("{} of {} ({})", task.examples.size(), task.name, checksum_text(sum.digest()));
}

std::string model_digest(Model& model) {
  Checksum sum;
  const std::string config = find_family("cambium").write_config(model.spec());
  sum.update(std::as_bytes(std::span(config)));
  model.visit([&](const std::string& name, Parameter& p) {
    sum.update(std::as_bytes(std::span(name)));
    read_in_pieces(p.tensor, p.tensor.dtype,
                   [&](std::span<const std::byte> bytes) { sum.update(bytes); });
  });
  return checksum_text(sum.digest());
}

TrainConfig gate_probe(uint64_t seed) {
  TrainConfig probe;
  probe.loss = {};
  probe.loss.reverse_kl = 1.0F;
  probe.steps = 150;
  probe.sequence_length = 1024;
  probe.schedule.peak = 0.2;
  probe.schedule.decay = Decay::kConstant;
  probe.align.all_tokens = true;
  probe.seed = seed;
  return probe;
}

std::shared_ptr<DocumentSource> with_retrieval(std::shared_ptr<DocumentSource> documents,
                                               const Tokenizer& tokenizer, double share,
                                               int64_t chars, uint64_t seed) {
  std::vector<std::shared_ptr<DocumentSource>> sources;
  std::vector<double> weights;
  if (share < 1.0) {
    sources.push_back(std::move(documents));
    weights.push_back(1.0 - share);
  }
  if (share > 0.0) {
    ProblemSpec problems;
    problems.retrieval_share = 1.0;
    if (chars > 0) {
      problems.retrieval.max_chars = static_cast<int>(chars);
      problems.retrieval.min_chars = problems.retrieval.max_chars / 4;
    }
    sources.push_back(problem_source(tokenizer, problems, Split::kTrain, seed));
    weights.push_back(share);
  }
  return mixed_source(std::move(sources), std::move(weights), seed);
}

void align_mixers(LoadedModel& student, Model& teacher, const std::vector<int64_t>& layers,
                  TrainConfig config, const DocumentSource& data, uint64_t first_sample,
                  const std::string& label) {
  const StopAnywhere stop("nothing is kept of the alignment before a search");
  config.first_sample = first_sample;
  Progress progress(label + ": align", static_cast<uint64_t>(config.least_steps()),
                    {.unit = "steps"});
  train_mixers(student, teacher, layers, std::move(config), data,
               [&](int64_t steps) { progress.update(static_cast<uint64_t>(steps)); });
  progress.finish();
}

Importance score_importance(Model& base, Model& teacher, const ScoreOptions& options,
                            const ScoreData& data, const std::filesystem::path& path) {
  const bool relaxes = options.method == ScoreMethod::kGates;
  const StopAnywhere stop(relaxes ? kGatesKept : kKept);
  const bool probes = options.method == ScoreMethod::kMixerReplacement;
  expect(!probes || options.probe.has_length(), "mmr: expected steps (or tokens) above 0");
  expect(!relaxes || options.probe.steps > 0, "gates: expected steps above 0");
  expect(trains(options.method) || !metric_asks(options.metric) ||
             (data.problems != nullptr && !data.problems->examples.empty()),
         "metric {}: there are no problems to be asked", options.metric);
  const bool restores = options.method == ScoreMethod::kRestoreOne;
  expect(!has_student(options.method) || (data.bank != nullptr && data.bank->kinds().size() == 2),
         "{}: expected the student with every layer converted", score_method_name(options.method));
  if (has_student(options.method)) {
    data.bank->expect_everywhere(1, score_method_name(options.method));
  }
  const std::vector<int64_t> layers = open_layers(base.spec());
  ScoreFile file({score_method_name(options.method),
                  probes    ? "loss after the probe"
                  : relaxes ? "mean opening of the gate of attention"
                            : options.metric,
                  fingerprint_of(base, teacher, options, data),
                  {}},
                 layers, path, options.fresh);
  if (relaxes) {
    return relax(options, data, file);
  }
  if (restores) {
    return restore_one(teacher, options, data, file, layers);
  }
  if (!probes) {
    const auto make = [&](int64_t layer) {
      return options.method == ScoreMethod::kWindowSwap
                 ? view_windows(base, {layer}, options.graft.window, options.graft.sinks)
                 : remove_layer(base, layer, options.method == ScoreMethod::kLeaveBlockOut);
    };
    return score_variants({base, make}, teacher, options, data, file, layers);
  }
  Progress progress(options.label, layers.size(), {.unit = "layers"});
  for (const int64_t layer : layers) {
    if (!file.has(layer)) {
      const Stopwatch watch;
      const double loss = replace_mixer(base, teacher, layer, options, *data.train);
      file.add({layer, loss, watch.seconds()});
    }
    progress.update(static_cast<uint64_t>(file.scores().layers.size()));
  }
  progress.finish();
  return file.scores();
}

}  // namespace cambium
