#include "hybrid/placement.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/json.h"
#include "base/json_fields.h"
#include "base/progress.h"
#include "hybrid/calibrate.h"
#include "hybrid/placement_choice.h"
#include "hybrid/scoring.h"
#include "hybrid/sealed.h"

namespace cambium {

std::vector<int64_t> place_lowest(const Importance& importance, int64_t count) {
  const auto scored = static_cast<int64_t>(importance.layers.size());
  expect(count >= 0 && count <= scored, "{} layers are to be converted, but only {} were scored",
         count, scored);
  std::vector<int64_t> chosen = importance.order();
  chosen.resize(static_cast<size_t>(count));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

std::vector<int64_t> spread_evenly(const std::vector<int64_t>& layers, int64_t count) {
  const int64_t n = std::ssize(layers);
  expect(count >= 0 && count <= n,
         "{} layers are to be converted, but only {} still have attention", count, n);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) {
    chosen.push_back(layers[static_cast<size_t>((2 * i + 1) * n / (2 * count))]);
  }
  return chosen;
}

std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count) {
  return spread_evenly(attention_layers(spec), count);
}

LayerChooser lowest_of(Importance importance) {
  return [importance = std::move(importance)](const std::vector<int64_t>& layers, int64_t count) {
    Importance among = importance;
    std::erase_if(among.layers, [&](const LayerScore& score) {
      return std::find(layers.begin(), layers.end(), score.layer) == layers.end();
    });
    return place_lowest(among, count);
  };
}

int64_t layers_with_mixer(const ModelSpec& spec) {
  return std::count_if(spec.layers.begin(), spec.layers.end(), [](const LayerSpec& layer) {
    return layer.removed() || layer.mixer() != nullptr;
  });
}

int64_t layers_to_convert(const ModelSpec& spec, double fraction) {
  expect(fraction >= 0.0 && fraction <= 1.0, "expected a fraction from 0 to 1, got {}", fraction);
  const auto target =
      static_cast<int64_t>(std::lround(fraction * static_cast<double>(layers_with_mixer(spec))));
  return std::max<int64_t>(0, target - std::ssize(converted_layers(spec)));
}

std::vector<int64_t> place_for_cache(const ModelSpec& spec, int64_t bytes_per_token, Dtype values,
                                     const LayerChooser& choose) {
  const Model model(spec);
  CacheConfig config;
  config.values = values;
  const CachePlan cache(model, config);
  const auto bytes_of_layer = [&](int64_t layer) {
    return cache.layers()[static_cast<size_t>(layer)].per_token;
  };
  std::vector<int64_t> open = attention_layers(spec);
  std::erase_if(open, [&](int64_t layer) { return bytes_of_layer(layer) == 0; });
  int64_t left = 0;
  for (int64_t count = 0; count <= std::ssize(open); ++count) {
    const std::vector<int64_t> layers = choose(open, count);
    left = cache.lasting_bytes_per_token();
    for (const int64_t layer : layers) {
      left -= bytes_of_layer(layer);
    }
    if (left <= bytes_per_token) {
      return layers;
    }
  }
  fail(
      "a cache of {} bytes a token cannot be reached: {} remain with every attention layer "
      "converted",
      bytes_per_token, left);
}

Importance importance_of(const std::filesystem::path& scores, const ModelSpec& spec) {
  Importance importance = read_importance(scores);
  expect(importance.unscored.empty(), "{} is not finished: {} layers are still to be scored",
         scores.string(), importance.unscored.size());
  const auto of = importance.fingerprint.find("layers");
  expect(of == importance.fingerprint.end() || of->second == layer_map(spec),
         "{} holds scores of another model: its layers are {}, the model's are {}", scores.string(),
         of->second, layer_map(spec));
  const std::vector<int64_t> open = attention_layers(spec);
  for (const LayerScore& score : importance.layers) {
    expect(std::find(open.begin(), open.end(), score.layer) != open.end(),
           "{} has a score of layer {}, which is no attention layer of the model ({})",
           scores.string(), score.layer, layer_map(spec));
  }
  return importance;
}

namespace {

// How the report tells of a choice: by the scores of a scored stage, if it has any.
ImportanceSummary shown_placement(const StagePlan& stage, const ModelSpec& teacher,
                                  const std::vector<int64_t>& layers, const std::string& data,
                                  const std::filesystem::path& folder) {
  ImportanceSummary shown{"stage " + stage.name, stage.place.method, "", {}, {}, data};
  shown.scores.assign(teacher.layers.size(), NAN);
  shown.converted.assign(teacher.layers.size(), false);
  if (!stage.place.scores() || layers.empty()) {
    return shown;
  }
  const Importance importance = read_importance(folder / "scores.json");
  shown.metric = score_heading(importance.metric);
  for (const LayerScore& score : importance.layers) {
    expect(score.layer < static_cast<int64_t>(shown.scores.size()),
           "{} has a score of layer {}; the model has {} layers", (folder / "scores.json").string(),
           score.layer, shown.scores.size());
    shown.scores[static_cast<size_t>(score.layer)] = score.score;
  }
  for (const int64_t layer : layers) {
    shown.converted.at(static_cast<size_t>(layer)) = true;
  }
  return shown;
}

/// What a stage's choice looks at; none of it is reported.
struct StageData {
  std::unique_ptr<HeldOut> documents;
  Task problems;
  AccuracyConfig answers;
  std::string described;
};

StageData choosing_data(const HybridPlan& plan, const PlacePlan& place, const RunData& data) {
  StageData chosen;
  chosen.documents =
      std::make_unique<HeldOut>(data.selection_documents(place.documents, place.data));
  chosen.described = fmt::format("{} documents{}", chosen.documents->documents(),
                                 place.data.empty() ? "" : " of " + place.data);
  if (place.asks()) {
    const bool retrieval = place.metric == "retrieval";
    chosen.problems =
        retrieval
            ? data.selection_retrieval(place.problems)
            : data.selection_problems(place.problems > 0 ? place.problems : plan.evaluate.problems);
    chosen.answers =
        retrieval ? data.selection_retrieval_answers(plan.evaluate) : data.answers(plan.evaluate);
    if (place.max_new_tokens > 0) {
      chosen.answers.max_new_tokens = place.max_new_tokens;
    }
    const bool alone = place.method == "search";
    chosen.described =
        fmt::format("{} {}{}", chosen.problems.examples.size(), retrieval ? "texts" : "problems",
                    alone ? "" : fmt::format(", equal shares by {}", chosen.described));
  }
  chosen.described += place.data.empty() ? ", none of those that are reported" : "";
  return chosen;
}

/// What a stage's choice is made from.
struct Choosing {
  const HybridPlan& plan;
  const StagePlan& stage;
  Model& base;
  Model& teacher;
  const RunData& data;
  uint64_t first_sample;
  std::string label;
};

// A trial: all attention that is left in the base, converted to each of the kinds and aligned as
// the stage's own will be.
MixerBank trial_bank(const Choosing& c, const std::vector<GraftOptions>& kinds) {
  const std::vector<int64_t> open = attention_layers(c.base.spec());
  MixerBank bank(c.base);
  for (const GraftOptions& kind : kinds) {
    std::optional<CalibrationData> calibration;
    if (kind.calibrate > 0) {
      calibration.emplace(c.data.train(), c.data.valid(), false, kind);
    }
    std::vector<LayerCalibration> found;
    LoadedModel trial = convert(c.base, c.teacher, open, kind, c.plan.seed, true,
                                calibration ? &*calibration : nullptr, &found);
    if (const Phase* align = c.stage.phase("align"); align != nullptr) {
      align_mixers(trial, c.teacher, open, align->config, c.data.train(), c.first_sample,
                   kinds.size() == 1 ? c.label : fmt::format("{}: {}", c.label, kind.mixer));
    }
    bank.add(kind.mixer, std::move(trial), "stage " + c.stage.name);
  }
  return bank;
}

// The search for the kinds and layers that do the least harm, within the stage's number of layers
// and its budget.
Placement search_layers(const Choosing& c, int64_t count, const StageData& chosen_by,
                        const std::filesystem::path& folder) {
  const MixerBank bank = trial_bank(c, c.stage.kinds());
  ChoiceOptions options = c.stage.place.choice();
  if (count != kAnyLayers) {
    const int64_t kept = std::ssize(bank.layers()) - count;
    options.at_least[kAttentionKind] = kept;
    options.at_most[kAttentionKind] = kept;
  }
  options.seed = c.plan.seed;
  options.trace = folder / "search.json";
  options.label = c.label;
  const JudgeData choosing{chosen_by.documents.get(), &chosen_by.problems, &c.data.tokenizer(),
                           chosen_by.answers, &c.teacher};
  const ChosenPlacement chosen = choose_placement(bank, options, choosing, {});
  write_placement(chosen, folder / "chosen.json");
  if (c.stage.place.has_budget()) {
    say_text(
        fmt::format("  chosen at {:.1f} % of the cost of what it starts from ({}, {} tokens "
                    "of context; the budget is {:.1f} %)",
                    100 * chosen.costs.of(chosen.choices) / chosen.costs.teacher(),
                    cost_unit(chosen.costs.kind), options.cost.context,
                    100 * chosen.budget / chosen.costs.teacher()));
  }
  Placement placement;
  for (size_t i = 0; i < chosen.choices.size(); ++i) {
    if (chosen.choices[i] != 0) {
      placement.layers.push_back(bank.layers()[i]);
      placement.kinds.push_back(static_cast<size_t>(chosen.choices[i]) - 1);
    }
  }
  expect(!placement.layers.empty(),
         "stage {}: the search converts nothing: all attention is within its budget", c.stage.name);
  return placement;
}

ScoreOptions score_options(const Choosing& c) {
  const PlacePlan& place = c.stage.place;
  ScoreOptions options;
  options.method = parse_score_method(place.method);
  options.metric = place.trains() ? ScoreOptions{}.metric : place.metric;
  options.graft =
      place.method != "window-swap"
          ? c.stage.graft
          : GraftOptions{.mixer = "sliding_window", .window = place.window, .sinks = place.sinks};
  options.probe = place.probe;
  options.probe.first_sample = c.first_sample;
  options.price = place.price;
  options.seed = c.plan.seed;
  options.label = c.label;
  return options;
}

Importance score_layers(const Choosing& c, const StageData& chosen_by,
                        const std::filesystem::path& folder) {
  const PlacePlan& place = c.stage.place;
  std::optional<MixerBank> bank;
  if (place.tries()) {
    bank.emplace(trial_bank(c, {c.stage.graft}));
  }
  std::shared_ptr<DocumentSource> mixed;
  if (place.method == "gates") {
    mixed = with_retrieval(c.data.shared_train(), c.data.tokenizer(), place.retrieval_share,
                           place.retrieval_chars, c.plan.seed);
  }
  const ScoreData scored{&c.data.tokenizer(),       mixed ? mixed.get() : &c.data.train(),
                         chosen_by.documents.get(), &chosen_by.problems,
                         chosen_by.answers,         bank ? &*bank : nullptr};
  return score_importance(c.base, c.teacher, score_options(c), scored, folder / "scores.json");
}

}  // namespace

std::vector<int64_t> Placement::of(size_t kind) const {
  std::vector<int64_t> these;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (kinds[i] == kind) {
      these.push_back(layers[i]);
    }
  }
  return these;
}

Placement place_stage(const HybridPlan& plan, const StagePlan& stage, int64_t count, Model& base,
                      Model& teacher, const RunData& data, uint64_t first_sample,
                      const std::filesystem::path& folder) {
  const size_t open = attention_layers(base.spec()).size();
  expect(count <= static_cast<int64_t>(open),
         "stage {}: {} more layers are to be converted, {} still have attention", stage.name, count,
         open);
  const PlacePlan& place = stage.place;
  Placement placement;
  std::string scored_on;
  if (count == 0) {
    // Trains on what it starts from.
  } else if (place.method == "list") {
    placement.layers = stage.list;
  } else if (place.method == "uniform") {
    placement.layers = place_uniform(base.spec(), count);
  } else {
    const Choosing choosing{plan,
                            stage,
                            base,
                            teacher,
                            data,
                            first_sample,
                            fmt::format("stage {}: {}", stage.name, place.method)};
    const StageData chosen_by = place.measures() ? choosing_data(plan, place, data) : StageData{};
    scored_on = place.measures() ? chosen_by.described : "training documents";
    if (place.method == "search") {
      placement = search_layers(choosing, count, chosen_by, folder);
    } else {
      placement.layers = place_lowest(score_layers(choosing, chosen_by, folder), count);
    }
  }
  placement.kinds.resize(placement.layers.size(), 0);
  placement.shown = shown_placement(stage, teacher.spec(), placement.layers, scored_on, folder);
  return placement;
}

void keep_placement(const Placement& placement, const StagePlan& stage, const std::string& map,
                    const std::filesystem::path& folder) {
  nlohmann::ordered_json json{
      {"layers", placement.layers}, {"map", map}, {"data", placement.shown.data}};
  if (!stage.others.empty()) {
    json["kinds"] = placement.kinds;
  }
  write_sealed(folder / "placement.json", json.dump(1) + "\n");
}

Placement kept_placement(const StagePlan& stage, const ModelSpec& teacher,
                         const std::filesystem::path& folder) {
  const std::string path = (folder / "placement.json").string();
  const auto root = parse_json<nlohmann::json>(read_sealed(path), path);
  const JsonFields kept(root, path);
  Placement placement;
  placement.layers = kept.wholes("layers", 0, std::ssize(teacher.layers) - 1);
  placement.kinds.resize(placement.layers.size(), 0);
  if (!stage.others.empty()) {
    const std::vector<int64_t> kinds = kept.wholes("kinds", 0, std::ssize(stage.others));
    expect(kinds.size() == placement.layers.size(), "{}: expected a kind for each of {} layers",
           path, placement.layers.size());
    placement.kinds.assign(kinds.begin(), kinds.end());
  }
  placement.shown = shown_placement(stage, teacher, placement.layers, kept.text("data"), folder);
  return placement;
}

}  // namespace cambium
