#include "hybrid/placement.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "hybrid/calibrate.h"
#include "hybrid/placement_choice.h"
#include "hybrid/scoring.h"

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

std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count) {
  const std::vector<int64_t> open = attention_layers(spec);
  const auto n = static_cast<int64_t>(open.size());
  expect(count >= 0 && count <= n,
         "{} layers are to be converted, but only {} still have attention", count, n);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) {
    chosen.push_back(open[static_cast<size_t>((2 * i + 1) * n / (2 * count))]);
  }
  return chosen;
}

int64_t layers_to_convert(const ModelSpec& spec, double fraction, const ModelSpec* teacher) {
  expect(fraction >= 0.0 && fraction <= 1.0, "expected a fraction from 0 to 1, got {}", fraction);
  const auto target =
      static_cast<int64_t>(std::lround(fraction * static_cast<double>(spec.layers.size())));
  return std::max<int64_t>(0,
                           target - static_cast<int64_t>(converted_layers(spec, teacher).size()));
}

int64_t layers_for_cache_budget(const ModelSpec& spec, int64_t bytes_per_token, Dtype values) {
  const Model model(spec);
  CacheConfig config;
  config.values = values;
  const CachePlan cache(model, config);
  int64_t total = cache.lasting_bytes_per_token();
  std::vector<int64_t> attention;
  for (const int64_t layer : attention_layers(spec)) {
    attention.push_back(cache.layers()[static_cast<size_t>(layer)].per_token);
  }
  std::sort(attention.rbegin(), attention.rend());
  int64_t count = 0;
  for (const int64_t bytes : attention) {
    if (total <= bytes_per_token) {
      break;
    }
    total -= bytes;
    ++count;
  }
  expect(total <= bytes_per_token,
         "a cache of {} bytes a token cannot be reached: {} remain with every attention layer "
         "converted",
         bytes_per_token, total);
  return count;
}

std::vector<int64_t> place_by_file(const std::filesystem::path& scores, const ModelSpec& spec,
                                   int64_t count) {
  const Importance importance = read_importance(scores);
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
  return place_lowest(importance, count);
}

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

namespace {

/// What a stage's choice looks at; none of it is reported.
struct StageData {
  std::unique_ptr<HeldOut> documents;
  Task problems;
  AccuracyConfig answers;
  std::string described;
};

StageData choosing_data(const HybridPlan& plan, const PlacePlan& place, const RunData& data) {
  StageData chosen;
  chosen.documents = std::make_unique<HeldOut>(data.selection_documents(place.documents));
  chosen.described = fmt::format("{} documents", chosen.documents->documents());
  if (place.asks()) {
    chosen.problems =
        data.selection_problems(place.problems > 0 ? place.problems : plan.evaluate.problems);
    chosen.answers = data.answers(plan.evaluate);
    if (place.max_new_tokens > 0) {
      chosen.answers.max_new_tokens = place.max_new_tokens;
    }
    const bool alone = place.method == "search";
    chosen.described =
        fmt::format("{} problems{}", chosen.problems.examples.size(),
                    alone ? "" : fmt::format(", equal shares by {}", chosen.described));
  }
  chosen.described += ", none of those that are reported";
  return chosen;
}

// A trial conversion of all attention that is left, aligned as the stage's own will be, and the
// search for the layers in which it does the least harm.
std::vector<int64_t> search_layers(const HybridPlan& plan, const StagePlan& stage, int64_t count,
                                   Model& base, Model& teacher, const RunData& data,
                                   uint64_t first_sample, const StageData& chosen_by,
                                   const std::filesystem::path& folder) {
  const std::vector<int64_t> open = attention_layers(base.spec());
  std::optional<CalibrationData> calibration;
  if (stage.graft.calibrate > 0) {
    calibration.emplace(data.train(), data.valid(), false, stage.graft);
  }
  std::vector<LayerCalibration> found;
  LoadedModel trial = convert(base, teacher, open, stage.graft, plan.seed, true,
                              calibration ? &*calibration : nullptr, &found);
  const std::string label = fmt::format("stage {}: search", stage.name);
  if (const Phase* align = stage.phase("align"); align != nullptr) {
    align_mixers(trial, teacher, open, align->config, data.train(), first_sample, label);
  }
  MixerBank bank(base);
  bank.add(stage.graft.mixer, std::move(trial), "stage " + stage.name);
  ChoiceOptions options;
  options.metric = stage.place.metric;
  // Each layer of this mixer costs the same: its number is the budget.
  options.budget = std::numeric_limits<double>::infinity();
  options.at_least[stage.graft.mixer] = count;
  options.at_most[stage.graft.mixer] = count;
  options.evaluations = stage.place.evaluations;
  options.seed = plan.seed;
  options.trace = folder / "search.json";
  options.label = label;
  JudgeData choosing{chosen_by.documents.get(), &chosen_by.problems, &data.tokenizer(),
                     chosen_by.answers, &teacher};
  const Choices choices = choose_placement(bank, options, choosing, {}).choices;
  std::vector<int64_t> layers;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] != 0) {
      layers.push_back(open[i]);
    }
  }
  return layers;
}

}  // namespace

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
    const bool trains = place.method == "mmr";
    const StageData chosen_by = trains ? StageData{} : choosing_data(plan, place, data);
    scored_on = trains ? "training documents" : chosen_by.described;
    if (place.method == "search") {
      placement.layers =
          search_layers(plan, stage, count, base, teacher, data, first_sample, chosen_by, folder);
    } else {
      ScoreOptions options;
      options.method = parse_score_method(place.method);
      options.metric = place.metric;
      options.graft = stage.graft;
      options.probe = place.probe;
      options.probe.first_sample = first_sample;
      options.seed = plan.seed;
      options.label = fmt::format("stage {}: {}", stage.name, place.method);
      const ScoreData scored{&data.tokenizer(), &data.train(), chosen_by.documents.get(),
                             &chosen_by.problems, chosen_by.answers};
      placement.layers = place_lowest(
          score_importance(base, teacher, options, scored, folder / "scores.json"), count);
    }
  }
  placement.shown = shown_placement(stage, teacher.spec(), placement.layers, scored_on, folder);
  return placement;
}

}  // namespace cambium
