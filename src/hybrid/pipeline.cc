#include "hybrid/pipeline.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/background.h"
#include "base/checksum.h"
#include "base/cpu.h"
#include "base/file.h"
#include "base/parallel.h"
#include "base/run_folder.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/report/curve.h"
#include "files/checksums.h"
#include "hybrid/calibrate.h"
#include "hybrid/gate.h"
#include "hybrid/measure.h"
#include "hybrid/merge.h"
#include "hybrid/mixer_bank.h"
#include "hybrid/phase_logits.h"
#include "hybrid/placement.h"
#include "hybrid/scoring.h"
#include "hybrid/sealed.h"
#include "hybrid/stage_files.h"
#include "hybrid/stage_variants.h"
#include "tensor/device_memory.h"
#include "train/train_job.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const char* device_kind(Device device) {
  return device.kind == Device::kCpu ? "cpu" : "cuda";
}

// Where training stands: what a stage passes on to those that go on from it.
struct Progressed {
  int64_t tokens = 0;
  int64_t learned = 0;
  uint64_t next_sample = 0;
};

// What a calibrated start was made by and what it found; no data where it was not calibrated.
struct CalibratedStart {
  std::optional<CalibrationData> data;
  std::vector<LayerCalibration> found;
};

class Pipeline {
 public:
  Pipeline(const HybridPlan& plan, const PipelineOptions& options, const RunFolder& folder)
      : plan_(plan),
        options_(options),
        folder_(folder),
        teacher_(load_model(plan.teacher, load_on(options.device))),
        data_(plan, load_tokenizer(plan.teacher, teacher_.model->spec().vocab)),
        variants_(plan, options, teacher_, data_, summary_) {
    check_plan(plan, teacher_.model->spec());
    for (const StagePlan& stage : plan.stages) {
      for (const Phase& phase : stage.phases) {
        std::unique_ptr<DocumentSource>& own = own_data_[{phase.on_policy.has_value(), phase.data}];
        if (!phase.data.empty() && own == nullptr) {
          own = phase.on_policy ? load_prompts(phase.data, data_.tokenizer())
                                : load_jsonl(phase.data, data_.tokenizer());
        }
      }
    }
  }

  RunSummary run();

 private:
  fs::path stage_folder(const std::string& stage) const {
    return options_.folder / "stages" / stage;
  }
  void check_inputs() const;
  ModelSummary teacher_summary();
  LoadedModel load_base(const StagePlan& stage) const;
  const ModelSummary* result_of(const std::string& stage) const;
  LoadedModel graft(Model& base, const std::vector<int64_t>& layers, const GraftOptions& options,
                    const fs::path& found_file, bool fit_next, CalibratedStart& start);
  /// A model that is to be healed, and what it views.
  struct Started {
    LoadedModel under;              // of several mixers: what the bank converts
    std::optional<MixerBank> bank;  // the new mixers
    LoadedModel student;
    CalibratedStart start;
  };
  Started start_student(const StagePlan& stage, const Placement& placement, LoadedModel base);
  ModelSummary run_stage(const StagePlan& stage);
  ModelSummary finished_stage(const StagePlan& stage);
  /// The summary and the report of what there is.
  void write_results(double seconds);
  TrainSummary run_phase(const Phase& phase, LoadedModel& student,
                         const std::vector<int64_t>& layers, const fs::path& folder, double length,
                         uint64_t first_sample);
  ModelSummary measure_attempt(const StagePlan& stage, const fs::path& dir, int64_t attempt,
                               const Progressed& at);
  std::unique_ptr<AtomicDirectory> write_attempt(Model& student, const StagePlan& stage,
                                                 int64_t attempt, const Progressed& at) const;
  FitSummary measure_fit(const StagePlan& stage, LoadedModel& student,
                         const CalibratedStart& start) const;
  ModelSummary heal(const StagePlan& stage, LoadedModel& student,
                    const std::vector<int64_t>& layers, const CalibratedStart& start);
  void add_curves(const StagePlan& stage, int64_t attempts);
  const DocumentSource& documents_of(const Phase& phase) const {
    return phase.data.empty() ? data_.train()
                              : *own_data_.at({phase.on_policy.has_value(), phase.data});
  }

  const HybridPlan& plan_;
  const PipelineOptions& options_;
  const RunFolder& folder_;
  LoadedModel teacher_;
  RunData data_;
  /// Of single phases: by whether they are prompts, and path; null where that is empty.
  std::map<std::pair<bool, std::string>, std::unique_ptr<DocumentSource>> own_data_;
  RunSummary summary_;
  StageVariants variants_;
  Background background_;  // checkpoints and models become durable there
};

// A run goes on only over what it began with.
void Pipeline::check_inputs() const {
  Json inputs;
  inputs["device"] = device_kind(options_.device);
  inputs["teacher"] = model_digest(*teacher_.model);
  inputs["tokenizer"] = checksum_text(data_.tokenizer().fingerprint());
  inputs["tokenizer's rules"] = checksum_text(data_.tokenizer().rules_fingerprint());
  inputs["training data"] = data_.train().fingerprint();
  inputs["held-out data"] = data_.held_out().fingerprint();
  if (data_.selection().documents > 0) {
    inputs["selection data"] = data_.selection_documents(data_.selection().documents).fingerprint();
  }
  for (const auto& [path, documents] : data_.selection_files()) {
    inputs["selection data of " + path] = documents->fingerprint();
  }
  for (const auto& [key, documents] : own_data_) {
    if (documents != nullptr) {
      inputs[(key.first ? "prompts of " : "data of ") + key.second] = documents->fingerprint();
    }
  }
  expect_begun_with(options_.folder, inputs);
}

ModelSummary Pipeline::teacher_summary() {
  const fs::path path = options_.folder / "teacher.json";
  if (fs::exists(path)) {
    ModelSummary kept = read_result(path);
    summarise_cache(kept, *teacher_.model);  // counted as it is served today
    return kept;
  }
  ModelSummary s = summarise_spec("teacher", *teacher_.model, &teacher_.model->spec());
  s.dir = plan_.teacher.string();
  measure_quality(s, *teacher_.model, *teacher_.model, data_, plan_.evaluate);
  s.gate = {true, 0, "the teacher"};
  write_result(s, path);
  return s;
}

const ModelSummary* Pipeline::result_of(const std::string& stage) const {
  for (size_t i = 1; i < summary_.models.size(); ++i) {
    if (summary_.models[i].name == stage) {
      return &summary_.models[i];
    }
  }
  return nullptr;
}

LoadedModel Pipeline::load_base(const StagePlan& stage) const {
  const ModelSummary* base = result_of(stage.from);
  return load_model(base == nullptr ? plan_.teacher : options_.folder / base->dir,
                    load_on(options_.device, &teacher_));
}

TrainSummary Pipeline::run_phase(const Phase& phase, LoadedModel& student,
                                 const std::vector<int64_t>& layers, const fs::path& folder,
                                 double length, uint64_t first_sample) {
  TrainConfig config = phase.config;
  config.scale_length(length);
  config.folder = (folder / phase.name).string();
  config.background = &background_;
  config.resume = true;
  config.label = phase.name;
  config.first_sample = first_sample;
  const ModelSpec& spec = student.model->spec();
  config.converted = converted_mixers(spec, teacher_.model->spec());
  if (is_supernet(spec) && config.supernet.sampling == PlacementSampling::kNone) {
    config.supernet.sampling = PlacementSampling::kUniform;
  }
  if (config.objective == Objective::kAlign && config.align.layers.empty()) {
    config.align.layers = layers.empty() ? converted_layers(spec, &teacher_.model->spec()) : layers;
  }
  if (phase.on_policy) {
    return run_on_policy(student, config, *phase.on_policy, documents_of(phase), data_.tokenizer(),
                         *teacher_.model);
  }
  std::unique_ptr<StoredLogits> logits;
  if (!phase.logits.file.empty()) {
    logits =
        phase_logits(phase, *teacher_.model, plan_.teacher, documents_of(phase), data_.tokenizer());
    config.logits = logits.get();
  }
  Trainer trainer(*student.model, student.weights, config, documents_of(phase),
                  phase.teacher && !logits ? teacher_.model.get() : nullptr);
  return trainer.run();
}

// The attempt's model, which has no name yet.
std::unique_ptr<AtomicDirectory> Pipeline::write_attempt(Model& student, const StagePlan& stage,
                                                         int64_t attempt,
                                                         const Progressed& at) const {
  const fs::path dir = stage_folder(stage.name) / "model";
  SaveOptions options;
  options.tokenizer_from = plan_.teacher;
  options.storage = plan_.storage;
  options.replace = true;
  Json provenance = {{"plan", plan_.name},
                     {"stage", stage.name},
                     {"attempt", attempt},
                     {"from", stage.from.empty() ? "the teacher" : stage.from},
                     {"teacher", plan_.teacher.string()},
                     {"tokens", at.tokens}};
  if (!stage.merge.with.empty()) {
    provenance["merged with"] = stage.merge.with;
    provenance["weights"] = stage.merge.weights;
  }
  options.files["provenance.json"] = provenance.dump(1) + "\n";
  if (stage.merge.with.empty()) {
    return write_model(student, dir, options);
  }
  std::vector<LoadedModel> others;
  std::vector<Model*> models{&student};
  for (const std::string& name : stage.merge.with) {
    const ModelSummary* other = result_of(name);
    expect(other != nullptr, "stage {}: the run has no stage {} to merge with", stage.name, name);
    others.push_back(load_model(options_.folder / other->dir));
    models.push_back(others.back().model.get());
  }
  const LoadedModel merged = merge_models(models, stage.merge.weights);
  return write_model(*merged.model, dir, options);
}

// Measures what was written: what the gate sees is what is shipped. The model takes the stage's
// name when it is better than the attempts before, by documents that are not reported.
ModelSummary Pipeline::measure_attempt(const StagePlan& stage, const fs::path& dir, int64_t attempt,
                                       const Progressed& at) {
  const LoadedModel saved = load_model(dir, load_on(options_.device, &teacher_));
  ModelSummary s = summarise_spec(stage.name, *saved.model, &teacher_.model->spec());
  measure_quality(s, *saved.model, *teacher_.model, data_, plan_.evaluate);
  s.gate = judge_gate(stage.gate, s, summary_.models[0]);
  s.gate.attempts = attempt;
  s.gate.kept = attempt;
  s.tokens_trained = at.tokens;
  s.tokens_learned = at.learned;
  s.next_sample = at.next_sample;
  s.checksums = file_digest(dir / "checksums.json");
  if (stage.gate.retries > 0) {
    const HeldOut documents = data_.selection_documents(stage.place.documents);
    const LossSums sums = total(documents.measure(*saved.model, teacher_.model.get()));
    s.selection_reverse_kl =
        sums.reverse_kl / static_cast<double>(std::max<int64_t>(sums.tokens, 1));
  }
  return s;
}

bool better(const ModelSummary& a, const ModelSummary& b) {
  return a.gate.passed != b.gate.passed ? a.gate.passed
                                        : a.selection_reverse_kl < b.selection_reverse_kl;
}

// What the fit made of a calibrated start; it is added to the stage's calibration.json.
FitSummary Pipeline::measure_fit(const StagePlan& stage, LoadedModel& student,
                                 const CalibratedStart& start) const {
  std::vector<int64_t> layers;  // that were calibrated
  for (const LayerCalibration& layer : start.found) {
    layers.push_back(layer.layer);
  }
  student.weights.set_trainable(*student.model, nullptr);
  const std::vector<MixerAgreement> fitted =
      measure_mixers(*student.model, *teacher_.model, layers, start.data->checked);
  write_sealed(stage_folder(stage.name) / "calibration.json",
               calibration_json(start.found, fitted));
  say_text(describe_calibration(start.found, fitted));
  FitSummary fit{std::ssize(layers)};
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerCalibration& layer = start.found[i];
    fit.before += (layer.half_lives.empty() ? layer.start : layer.calibrated).explained;
    fit.after += fitted[i].explained;
  }
  fit.before /= static_cast<double>(fit.layers);
  fit.after /= static_cast<double>(fit.layers);
  return fit;
}

ModelSummary Pipeline::heal(const StagePlan& stage, LoadedModel& student,
                            const std::vector<int64_t>& layers, const CalibratedStart& start) {
  const fs::path folder = stage_folder(stage.name);
  Progressed at;
  if (const ModelSummary* base = result_of(stage.from)) {
    at = {base->tokens_trained, base->tokens_learned, base->next_sample};
  }
  ModelSummary best;
  FitSummary fit;
  int64_t attempts = 0;
  std::map<std::string, uint64_t> own_next;  // in the files of single phases
  for (int64_t attempt = 1; attempt <= 1 + stage.gate.retries; ++attempt) {
    // A retry goes on from where the attempt before it ended, in the weights and in the data.
    const fs::path attempt_folder = folder / ("attempt-" + std::to_string(attempt));
    bool trained = false;
    for (const Phase& phase : stage.phases) {
      if (!phase.once || attempt == 1) {
        uint64_t& next = phase.data.empty() ? at.next_sample : own_next[phase.data];
        const TrainSummary t = run_phase(phase, student, layers, attempt_folder,
                                         attempt == 1 ? 1.0 : stage.gate.retry_steps, next);
        at.tokens += t.tokens;
        at.learned += t.learned;
        next = t.data.next_sample;
        trained = true;
        if (phase.name == "fit" && start.data) {
          fit = measure_fit(stage, student, start);
        }
      }
    }
    if (attempt > 1 && !trained) {
      break;  // the same model again
    }
    student.weights.set_trainable(*student.model, nullptr);
    make_folder(attempt_folder.string());
    ModelSummary s;
    if (fs::exists(attempt_folder / "result.json")) {
      s = read_result(attempt_folder / "result.json");
      summarise_cache(s, *student.model);
    } else {
      expect_only_written((folder / "model").string());
      const std::shared_ptr<AtomicDirectory> written =
          write_attempt(*student.model, stage, attempt, at);
      background_.run([written] { written->sync(); });
      s = measure_attempt(stage, written->path(), attempt, at);
      background_.wait();  // for the phases' checkpoints too
      if (attempt == 1 || better(s, best)) {
        expect_only_written((folder / "model").string());
        written->commit();
      }
      write_result(s, attempt_folder / "result.json");
    }
    say_text(fmt::format("  gate {}: {}", s.gate.passed ? "passed" : "failed", s.gate.reason));
    attempts = attempt;
    if (attempt == 1 || better(s, best)) {
      best = s;
    }
    if (s.gate.passed) {
      break;
    }
  }
  best.gate.attempts = attempts;
  best.fit = fit;
  // What was spent, whichever attempt is kept; the next stage sees none of it again.
  best.tokens_trained = at.tokens;
  best.tokens_learned = at.learned;
  best.next_sample = at.next_sample;
  if (best.gate.kept != attempts) {
    say_text(fmt::format("  attempt {} of {} was the best and is kept", best.gate.kept, attempts));
  }
  verify_model(folder / "model", best.checksums);
  return best;
}

// What a stage that is done left behind, checked.
ModelSummary Pipeline::finished_stage(const StagePlan& stage) {
  const fs::path folder = stage_folder(stage.name);
  ModelSummary done = read_result(folder / "result.json");
  verify_stage_files(folder);
  verify_model(folder / "model", done.checksums);
  summarise_cache(done, Model(read_spec(folder / "model")));
  const ImportanceSummary shown = kept_placement(stage, teacher_.model->spec(), folder).shown;
  if (!shown.metric.empty()) {
    summary_.importance.push_back(shown);
  }
  return done;
}

// `base` with new mixers in these layers, all else views of it. What a calibration found is in
// `found_file`.
LoadedModel Pipeline::graft(Model& base, const std::vector<int64_t>& layers,
                            const GraftOptions& options, const fs::path& found_file, bool fit_next,
                            CalibratedStart& start) {
  if (options.calibrate > 0) {
    start.data.emplace(data_.train(), data_.valid(), false, options);
  }
  LoadedModel hybrid = convert(base, *teacher_.model, layers, options, plan_.seed, true,
                               start.data ? &*start.data : nullptr, &start.found);
  if (start.data) {
    write_sealed(found_file, calibration_json(start.found, {}));
    if (!fit_next) {  // else the table comes with the fit's column
      say_text(describe_calibration(start.found, {}));
    }
  }
  return hybrid;
}

// The stage's base with new mixers as its placement has them.
Pipeline::Started Pipeline::start_student(const StagePlan& stage, const Placement& placement,
                                          LoadedModel base) {
  const fs::path folder = stage_folder(stage.name);
  const fs::path found_file = folder / "calibration.json";
  // The table of a calibration comes with the fit's column where that is measured.
  const bool fits = stage.phase("fit") != nullptr && !stage.makes_supernet();
  Started s;
  const auto add = [&](const GraftOptions& options, const std::vector<int64_t>& layers,
                       const fs::path& file, CalibratedStart& start) {
    if (!layers.empty()) {
      s.bank->add(options.mixer, graft(*s.under.model, layers, options, file, fits, start), "");
    }
  };
  const auto own_file = [&](const GraftOptions& options) {
    return folder / ("calibration-" + options.mixer + ".json");
  };
  if (stage.makes_supernet()) {
    s.under = std::move(base);
    s.bank.emplace(*s.under.model);
    std::vector<GraftOptions> all = {stage.graft};
    all.insert(all.end(), stage.beside.begin(), stage.beside.end());
    for (const GraftOptions& options : all) {
      CalibratedStart own;
      add(options, placement.layers, &options == &all[0] ? found_file : own_file(options), own);
    }
    s.student = s.bank->supernet([&](ModelSpec& spec) {
      for (const std::string& mixer : s.bank->kinds()) {
        put_preset(spec, {mixer, uniform_units(spec, mixer)});
      }
      const ActiveUnits active = uniform_units(spec, stage.graft.mixer);
      for (const int64_t layer : choice_layers(spec)) {
        const auto at = static_cast<size_t>(layer);
        spec.layers[at].choice()->active = active[at];
      }
    });
  } else if (!stage.others.empty() && !placement.layers.empty()) {
    s.under = std::move(base);
    s.bank.emplace(*s.under.model);
    const std::vector<GraftOptions> kinds = stage.kinds();
    Choices choices(s.bank->layers().size(), 0);
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      CalibratedStart own;
      add(kinds[kind], placement.of(kind), own_file(kinds[kind]), own);
      if (own.data) {
        s.start.data.emplace(std::move(*own.data));
      }
      s.start.found.insert(s.start.found.end(), own.found.begin(), own.found.end());
      for (const int64_t layer : placement.of(kind)) {
        const auto at = std::find(s.bank->layers().begin(), s.bank->layers().end(), layer);
        choices[static_cast<size_t>(at - s.bank->layers().begin())] =
            static_cast<int>(s.bank->kinds().size()) - 1;
      }
    }
    std::sort(s.start.found.begin(), s.start.found.end(),
              [](const auto& a, const auto& b) { return a.layer < b.layer; });
    s.student = s.bank->build(choices);
  } else if (!placement.layers.empty()) {
    LoadedModel hybrid =
        graft(*base.model, placement.layers, stage.graft, found_file, fits, s.start);
    hybrid.weights.take_over(*hybrid.model, std::move(base.weights));
    s.student = std::move(hybrid);
  } else {
    s.student = std::move(base);
  }
  return s;
}

ModelSummary Pipeline::run_stage(const StagePlan& stage) {
  const fs::path folder = stage_folder(stage.name);
  make_folder(folder.string());
  std::vector<std::string> mixers;
  for (const GraftOptions& kind : stage.kinds()) {
    mixers.push_back(kind.mixer);
  }
  const std::string count = stage.layers == kAnyLayers ? "some" : std::to_string(stage.layers);
  say_text(fmt::format("\nstage {}: {} of {} layers, {}{}", stage.name, count,
                       teacher_.model->layer_count(), join(mixers, " or "),
                       stage.from.empty() ? "" : ", from " + stage.from));
  if (fs::exists(folder / "result.json")) {
    return finished_stage(stage);
  }
  const double begin = now_seconds();
  LoadedModel base = load_base(stage);
  const ModelSummary* before = result_of(stage.from);
  const Placement placement =
      fs::exists(folder / "placement.json")
          ? kept_placement(stage, teacher_.model->spec(), folder)
          : place_stage(plan_, stage, plan_.layers_added(stage), *base.model, *teacher_.model,
                        data_, before == nullptr ? 0 : before->next_sample, folder);
  Started started = start_student(stage, placement, std::move(base));
  LoadedModel& student = started.student;
  const std::string map = layer_map(student.model->spec());
  keep_placement(placement, stage, map, folder);
  const LossSums converted = total(data_.held_out().measure(
      *student.model, teacher_.model.get(), stage.name + " as converted: held out"));
  const double start_kl =
      converted.reverse_kl / static_cast<double>(std::max<int64_t>(converted.tokens, 1));
  say_text(fmt::format("  {}  held-out reverse KL {:.4f} as converted", map, start_kl));
  ModelSummary s = heal(stage, student, placement.layers, started.start);
  s.reverse_kl_converted = start_kl;
  s.from = stage.from;
  s.dir = (fs::path("stages") / stage.name / "model").string();
  s.seconds = now_seconds() - begin;
  s.shipped = s.gate.passed;
  folder_.expect_present();
  write_sealed(folder / "files.json", Json{{"files", stage_files(folder)}}.dump(1) + "\n");
  write_result(s, folder / "result.json");
  if (!placement.shown.metric.empty()) {
    summary_.importance.push_back(placement.shown);
  }
  return s;
}

void Pipeline::add_curves(const StagePlan& stage, int64_t attempts) {
  for (const Phase& phase : stage.phases) {
    std::vector<fs::path> logs;
    for (int64_t attempt = 1; attempt <= attempts; ++attempt) {
      logs.push_back(stage_folder(stage.name) / fmt::format("attempt-{}", attempt) / phase.name /
                     "log.jsonl");
    }
    CurveSummary curve = read_curve(stage.name, phase.name, logs);
    if (!curve.loss.empty()) {
      summary_.curves.push_back(std::move(curve));
    }
  }
}

RunSummary Pipeline::run() {
  const double begin = now_seconds();
  check_inputs();
  summary_.name = plan_.name;
  summary_.date = today();
  summary_.machine = machine_name(options_.device);
  summary_.command = options_.command;
  summary_.plan = plan_.text;
  summary_.task = describe_data(data_, plan_.evaluate);
  say_text(summary_.task);
  const ModelSummary teacher = teacher_summary();
  const auto share = [](const char* of, const AccuracySummary& answers) {
    return answers.total == 0 ? std::string()
                              : fmt::format(", {} {:.1f} %", of, 100 * answers.accuracy.value);
  };
  say_text(fmt::format("teacher: {} layers{}{}", teacher_.model->layer_count(),
                       share("accuracy", teacher.accuracy),
                       share("retrieval", overall_retrieval(teacher))));
  if (teacher.accuracy.total > 0 && teacher.accuracy.correct == 0) {
    note(
        "the teacher has none of {} answers right, so that no hybrid can keep its accuracy: see "
        "how it is asked ([evaluate] ask, max_new_tokens), or whether it knows the task",
        teacher.accuracy.total);
  }
  summary_.models.push_back(teacher);
  // Until the end there is what was measured so far, but never in the place of a whole run's.
  const bool has_ended = fs::exists(options_.folder / "frontier.svg");
  for (const StagePlan& stage : plan_.stages) {
    const auto unusable = [&](const std::string& name) {
      const ModelSummary* other = result_of(name);
      return other == nullptr || (plan_.stop_at_failure && !other->gate.passed);
    };
    if ((!stage.from.empty() && unusable(stage.from)) ||
        std::any_of(stage.merge.with.begin(), stage.merge.with.end(), unusable)) {
      say_text(
          fmt::format("\nstage {} is left out: it goes on from a stage that did not pass its gate",
                      stage.name));
      continue;
    }
    const ModelSummary s = run_stage(stage);
    add_curves(stage, s.gate.attempts);
    summary_.models.push_back(s);
    if (stage.makes_supernet()) {
      variants_.add_presets(stage_folder(stage.name), s);
    }
    if (plan_.evaluate.baseline_window > 0) {
      variants_.add_baseline(stage_folder(stage.name), stage.name);
    }
    if (!has_ended) {
      write_results(now_seconds() - begin);
    }
    if (!s.gate.passed && plan_.stop_at_failure && !stage.branch) {
      say_text(
          fmt::format("stage {} did not pass its gate; the run ends and ships what was good before",
                      stage.name));
      break;
    }
  }
  variants_.measure_speed();
  write_results(now_seconds() - begin);
  return summary_;
}

void Pipeline::write_results(double seconds) {
  summary_.seconds = seconds;
  folder_.expect_present();
  write_summary(summary_, options_.folder / "summary.json");
  write_report(summary_, options_.folder);
}

}  // namespace

RunSummary run_pipeline(const HybridPlan& plan, const PipelineOptions& options) {
  check_run_folder(options.folder, plan, options.resume);
  check_plan_inputs(plan);
  check_plan(plan, read_spec(plan.teacher));
  for (const StagePlan& stage : plan.stages) {
    activations_of(stage.place.probe.precision, options.device);
    for (const Phase& phase : stage.phases) {
      activations_of(phase.config.precision, options.device);
    }
  }
  const RunFolder folder = open_run_folder(options.folder, options.resume);
  std::optional<StopAnywhere> stop("nothing has begun");
  Pipeline pipeline(plan, options, folder);
  stop.reset();  // what follows keeps what it has
  write_file_atomically((options.folder / "plan.toml").string(), plan.text);
  try {
    return pipeline.run();
  } catch (const Interrupted& e) {
    throw Interrupted(e.signal(),
                      fmt::format("{}\nwhat is done is kept in {}; the same command goes on with "
                                  "--resume",
                                  e.what(), options.folder.string()));
  }
}

}  // namespace cambium
