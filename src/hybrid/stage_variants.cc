#include "hybrid/stage_variants.h"

#include <optional>

#include "base/progress.h"
#include "base/signals.h"
#include "eval/throughput.h"
#include "hybrid/preset_report.h"
#include "hybrid/stage_files.h"
#include "train/train_job.h"

namespace cambium {

namespace fs = std::filesystem;

void StageVariants::add_presets(const fs::path& folder, const ModelSummary& result) {
  std::optional<LoadedModel> supernet;
  const ModelSpec spec = read_spec(folder / "model");
  for (const Preset& preset : spec.presets) {
    if (preset.active == active_units(spec)) {
      continue;
    }
    const fs::path path = folder / ("preset-" + preset.name + ".json");
    ModelSummary s;
    if (fs::exists(path)) {
      s = read_result(path);
      summarise_cache(s, Model(unwrapped(spec, preset.active)));
    } else {
      if (!supernet) {
        supernet = load_model(folder / "model", load_on(options_.device, &teacher_));
      }
      const LoadedModel view = view_hybrid(*supernet->model, preset.active);
      s = measure_preset(result.name + "/" + preset.name, *view.model, *teacher_.model, data_,
                         plan_.evaluate);
      s.dir = result.dir;
      s.from = result.from;
      s.tokens_trained = result.tokens_trained;
      s.tokens_learned = result.tokens_learned;
      s.next_sample = result.next_sample;
      s.shipped = result.shipped;
      write_result(s, path);
    }
    say_text(fmt::format("  preset {}: {}, held-out reverse KL {:.4f}", preset.name, s.map,
                         s.reverse_kl));
    presets_[summary_.models.size()] = preset.name;
    summary_.models.push_back(s);
  }
}

void StageVariants::add_baseline(const fs::path& folder, const std::string& stage) {
  ModelSpec spec = read_spec(folder / "model");
  spec = is_supernet(spec) ? unwrapped(spec, active_units(spec)) : spec;
  const std::vector<int64_t> layers = converted_layers(spec, &teacher_.model->spec());
  if (layers.empty() || !with_baseline_.insert(layers).second) {
    return;
  }
  LoadedModel model = view_windows(*teacher_.model, layers, plan_.evaluate.baseline_window,
                                   plan_.evaluate.baseline_sinks);
  const fs::path path = folder / "baseline.json";
  ModelSummary s;
  if (fs::exists(path)) {
    s = read_result(path);
    summarise_cache(s, *model.model);
  } else {
    s = measure_preset(stage + "/windows", *model.model, *teacher_.model, data_, plan_.evaluate);
    s.gate.reason = "the baseline: windows in the same layers, not trained";
    s.shipped = false;
    write_result(s, path);
  }
  say_text(
      fmt::format("  baseline {}: {}, held-out reverse KL {:.4f}", s.name, s.map, s.reverse_kl));
  baselines_[summary_.models.size()] = std::move(model);
  summary_.models.push_back(s);
}

void StageVariants::measure_speed() {
  say_text("\nmeasuring speed");
  std::map<std::string, LoadedModel> loaded;  // by folder
  std::vector<LoadedModel> views;
  std::vector<Model*> models{teacher_.model.get()};
  for (size_t i = 1; i < summary_.models.size(); ++i) {
    if (const auto baseline = baselines_.find(i); baseline != baselines_.end()) {
      models.push_back(baseline->second.model.get());
      continue;
    }
    const std::string& dir = summary_.models[i].dir;
    if (!loaded.contains(dir)) {
      loaded[dir] = load_model(options_.folder / dir, load_on(options_.device, &teacher_));
    }
    Model* model = loaded[dir].model.get();
    if (const auto preset = presets_.find(i); preset != presets_.end()) {
      views.push_back(view_hybrid(*model, find_preset(model->spec(), preset->second, dir).active));
      model = views.back().model.get();
    }
    models.push_back(model);
  }
  ThroughputConfig speed;
  speed.contexts = speed_contexts(plan_.evaluate, teacher_.model->spec());
  speed.batch = plan_.evaluate.speed_batch;
  speed.repeats = plan_.evaluate.speed_repeats;
  const StopAnywhere stop("every stage is kept");
  const auto speeds = measure_throughput(models, speed);
  for (size_t i = 0; i < models.size(); ++i) {
    summary_.models[i].speed = speeds[i];
  }
}

}  // namespace cambium
