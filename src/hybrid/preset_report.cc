#include "hybrid/preset_report.h"

#include <chrono>

#include "base/signals.h"
#include "eval/throughput.h"

namespace cambium {

ModelSummary measure_preset(const std::string& name, Model& model, Model& teacher,
                            const RunData& data, const EvaluationPlan& evaluate) {
  ModelSummary s = summarise_spec(name, model, &teacher.spec());
  measure_quality(s, model, teacher, data, evaluate);
  s.gate = {true, 0, "a preset of the supernet"};
  return s;
}

RunSummary measure_presets(LoadedModel& supernet, LoadedModel& teacher, const RunData& data,
                           const PresetReportOptions& options) {
  const ModelSpec& whole = supernet.model->spec();
  std::vector<Preset> presets;
  for (const std::string& name : options.presets) {
    presets.push_back(find_preset(whole, name, supernet.dir.string()));
  }
  presets = options.presets.empty() ? whole.presets : presets;
  expect(!presets.empty(),
         "{}: has no presets to report; cambium convert --add-preset NAME=PLACEMENT adds one",
         supernet.dir.string());
  const auto begin = std::chrono::steady_clock::now();
  const StopAnywhere stop("nothing is written");
  RunSummary summary;
  summary.name = options.name;
  summary.date = today();
  summary.machine = machine_name(teacher.model->device());
  summary.command = options.command;
  summary.task = describe_data(data, options.evaluate);
  std::vector<LoadedModel> views;
  std::vector<Model*> models = {teacher.model.get()};
  for (const Preset& preset : presets) {
    views.push_back(view_hybrid(*supernet.model, preset.active));
    models.push_back(views.back().model.get());
  }
  const ModelSpec& taught = teacher.model->spec();
  for (size_t i = 0; i < models.size(); ++i) {
    const bool is_teacher = i == 0;
    ModelSummary s = measure_preset(is_teacher ? "teacher" : presets[i - 1].name, *models[i],
                                    *teacher.model, data, options.evaluate);
    s.dir = is_teacher ? options.teacher : supernet.dir.string();
    s.gate.reason = is_teacher ? "the teacher" : s.gate.reason;
    summary.models.push_back(std::move(s));
  }
  ThroughputConfig speed;
  speed.contexts = speed_contexts(options.evaluate, taught);
  speed.batch = options.evaluate.speed_batch;
  speed.repeats = options.evaluate.speed_repeats;
  const auto speeds = measure_throughput(models, speed);
  for (size_t i = 0; i < models.size(); ++i) {
    summary.models[i].speed = speeds[i];
  }
  summary.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return summary;
}

}  // namespace cambium
