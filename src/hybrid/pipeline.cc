#include "hybrid/pipeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/checksum.h"
#include "base/cpu.h"
#include "base/file.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/text.h"
#include "eval/throughput.h"
#include "hybrid/measure.h"
#include "hybrid/placement.h"
#include "hybrid/scoring.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm tm{};
  gmtime_r(&now, &tm);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &tm);
  return text;
}

std::string machine_name() {
  return fmt::format("{} threads, {}", num_threads(), cpu_isa_name(cpu_isa()));
}

// A stage's result is a summary of one model; it is kept in the summary's own form.
void write_result(const ModelSummary& model, const fs::path& path) {
  RunSummary one;
  one.models.push_back(model);
  write_summary(one, path);
}

ModelSummary read_result(const fs::path& path) {
  return read_summary(path).models.at(0);
}

// Means of neighbours, so that at most `most` values are left.
std::vector<double> thin(const std::vector<double>& values, size_t most = 120) {
  const size_t width = std::max<size_t>(1, (values.size() + most - 1) / most);
  std::vector<double> means;
  for (size_t i = 0; i + width <= values.size(); i += width) {
    means.push_back(std::accumulate(values.begin() + static_cast<std::ptrdiff_t>(i),
                                    values.begin() + static_cast<std::ptrdiff_t>(i + width), 0.0) /
                    static_cast<double>(width));
  }
  return means;
}

// What the logs of a stage's phase say, one attempt after the other.
CurveSummary read_curve(const fs::path& stage_folder, const std::string& stage,
                        const std::string& phase, int64_t attempts) {
  CurveSummary curve{stage, phase, {}, {}, {}};
  double sum = 0.0;
  for (int64_t attempt = 1; attempt <= attempts; ++attempt) {
    const fs::path log = stage_folder / fmt::format("attempt-{}", attempt) / phase / "log.jsonl";
    if (!fs::exists(log)) {
      continue;
    }
    for (const std::string& line : split(read_text_file(log.string()), '\n')) {
      const Json json = Json::parse(line, nullptr, false);
      if (json.is_object() && json.value("event", "") == "step" && json["loss"].is_number()) {
        sum += json.value("tokens", 0.0);
        curve.loss.push_back(json["loss"]);
        curve.reverse_kl.push_back(json.value("reverse_kl", 0.0));
        curve.tokens.push_back(sum);
      }
    }
  }
  curve.tokens = thin(curve.tokens);
  curve.loss = thin(curve.loss);
  curve.reverse_kl = thin(curve.reverse_kl);
  return curve;
}

class Pipeline {
 public:
  Pipeline(const HybridPlan& plan, const PipelineOptions& options)
      : plan_(plan),
        options_(options),
        teacher_(load_model(plan.teacher)),
        data_(plan, Tokenizer::load(plan.teacher)) {
    check_plan(plan, teacher_.model->spec());
    expect(data_.tokenizer().vocab_size() <= teacher_.model->spec().vocab,
           "{}: the tokenizer has {} tokens, the model only {}; they do not belong together",
           plan.teacher.string(), data_.tokenizer().vocab_size(), teacher_.model->spec().vocab);
  }

  RunSummary run();

 private:
  struct StageState {
    Model* base;         // the last good hybrid, or the teacher
    LoadedModel hybrid;  // owns the base after the first stage
    int64_t tokens = 0;  // trained so far
  };

  ModelSummary teacher_summary();
  ModelSummary run_stage(const StagePlan& stage, StageState& state);
  std::vector<int64_t> place(const StagePlan& stage, Model& base, const fs::path& folder);
  int64_t run_phase(const char* name, TrainConfig config, LoadedModel& student,
                    const std::vector<int64_t>& layers, const fs::path& folder, double steps_scale);
  GateSummary judge(const StagePlan& stage, const ModelSummary& model) const;
  void say(const std::string& text) const { std::fprintf(stderr, "%s\n", text.c_str()); }

  const HybridPlan& plan_;
  const PipelineOptions& options_;
  LoadedModel teacher_;
  RunData data_;
  ModelSummary teacher_result_;
  RunSummary summary_;
};

ModelSummary Pipeline::teacher_summary() {
  const fs::path path = options_.folder / "teacher.json";
  if (fs::exists(path)) {
    return read_result(path);
  }
  ModelSummary s = summarise_spec("teacher", *teacher_.model);
  s.dir = plan_.teacher.string();
  measure_quality(s, *teacher_.model, *teacher_.model, data_, plan_.evaluate);
  s.gate = {true, 0, "the teacher"};
  write_result(s, path);
  return s;
}

std::vector<int64_t> Pipeline::place(const StagePlan& stage, Model& base, const fs::path& folder) {
  const int64_t count = stage.layers - converted_layers(base.spec());
  const std::vector<int64_t> open = attention_layers(base.spec());
  expect(count > 0 && count <= static_cast<int64_t>(open.size()),
         "stage {}: {} more layers are to be converted, {} still have attention", stage.name, count,
         open.size());
  const PlacePlan& place = stage.place;
  ImportanceSummary shown{"stage " + stage.name, place.method, "", {}, {}};
  shown.scores.assign(base.spec().layers.size(), NAN);
  shown.converted.assign(base.spec().layers.size(), false);
  std::vector<int64_t> chosen;
  if (place.method == "list") {
    chosen = place.list;
  } else if (place.method == "uniform") {
    chosen = place_uniform(base.spec(), count);
  } else {
    ScoreOptions options;
    options.method = parse_score_method(place.method);
    options.metric = place.metric;
    options.graft = stage.graft;
    options.probe = place.probe;
    options.seed = plan_.seed;
    options.label = fmt::format("stage {}: {}", stage.name, place.method);
    const HeldOut documents(data_.valid(), place.documents, plan_.evaluate.held_out_tokens);
    ScoreData scored;
    scored.tokenizer = &data_.tokenizer();
    scored.train = &data_.train();
    scored.documents = &documents;
    scored.problems = &data_.task();
    scored.answers.max_new_tokens = plan_.evaluate.max_new_tokens;
    scored.answers.batch = plan_.evaluate.batch;
    const Importance importance =
        score_importance(base, *teacher_.model, options, scored, folder / "scores.json");
    shown.metric = score_heading(importance.metric);
    for (const LayerScore& score : importance.layers) {
      shown.scores[static_cast<size_t>(score.layer)] = score.score;
    }
    chosen = place_lowest(importance, count);
  }
  for (const int64_t layer : chosen) {
    shown.converted[static_cast<size_t>(layer)] = true;
  }
  if (!shown.metric.empty()) {
    summary_.importance.push_back(shown);
  }
  return chosen;
}

int64_t Pipeline::run_phase(const char* name, TrainConfig config, LoadedModel& student,
                            const std::vector<int64_t>& layers, const fs::path& folder,
                            double steps_scale) {
  config.scale_length(steps_scale);
  config.folder = (folder / name).string();
  config.resume = true;
  config.label = std::string(name);
  if (config.objective == Objective::kAlign && config.align.layers.empty()) {
    config.align.layers = layers;
  }
  Model* teacher = std::string(name) == "sft" ? nullptr : teacher_.model.get();
  Trainer trainer(*student.model, student.weights, config, data_.train(), teacher);
  return trainer.run().tokens;
}

GateSummary Pipeline::judge(const StagePlan& stage, const ModelSummary& model) const {
  GateSummary gate{true, 1, ""};
  std::vector<std::string> reasons;
  const auto rule = [&](bool holds, const std::string& text) {
    gate.passed = gate.passed && holds;
    reasons.push_back(text + (holds ? "" : ": FAILED"));
  };
  if (stage.gate.max_reverse_kl > 0.0) {
    rule(model.reverse_kl <= stage.gate.max_reverse_kl,
         fmt::format("held-out reverse KL {:.4f}, at most {:g} asked", model.reverse_kl,
                     stage.gate.max_reverse_kl));
  }
  if (stage.gate.min_accuracy_kept > 0.0 && model.accuracy.total > 0) {
    const double value =
        stage.gate.lower_bound ? model.accuracy.accuracy.low : model.accuracy.accuracy.value;
    const double kept = value / std::max(teacher_result_.accuracy.accuracy.value, 1e-9);
    rule(kept >= stage.gate.min_accuracy_kept,
         fmt::format("{} {:.1f} % [{:.1f}, {:.1f}] is {:.1f} % of the teacher's {:.1f} %, at least "
                     "{:.0f} % asked",
                     stage.gate.lower_bound ? "accuracy's lower end of" : "accuracy",
                     100 * model.accuracy.accuracy.value, 100 * model.accuracy.accuracy.low,
                     100 * model.accuracy.accuracy.high, 100 * kept,
                     100 * teacher_result_.accuracy.accuracy.value,
                     100 * stage.gate.min_accuracy_kept));
  }
  gate.reason = reasons.empty() ? "nothing was asked" : join(reasons, "; ");
  return gate;
}

ModelSummary Pipeline::run_stage(const StagePlan& stage, StageState& state) {
  const fs::path folder = options_.folder / "stages" / stage.name;
  make_folder(folder.string());
  const double begin = now_seconds();
  say(fmt::format("\nstage {}: {} of {} layers, {}", stage.name, stage.layers,
                  teacher_.model->layer_count(), stage.graft.mixer));
  const std::vector<int64_t> layers = place(stage, *state.base, folder);
  const fs::path result = folder / "result.json";
  const fs::path model_dir = folder / "model";
  if (fs::exists(result) && fs::exists(model_dir / "config.json")) {
    ModelSummary done = read_result(result);
    state.tokens = done.tokens_trained;
    state.hybrid = load_model(model_dir);
    return done;
  }
  LoadedModel student = convert(*state.base, *teacher_.model, layers, stage.graft, plan_.seed);
  write_file_atomically(
      (folder / "placement.json").string(),
      Json{{"layers", layers}, {"map", layer_map(student.model->spec())}}.dump() + "\n");
  const LossSums start = total(data_.held_out().measure(*student.model, teacher_.model.get()));
  const double start_kl =
      start.reverse_kl / static_cast<double>(std::max<int64_t>(start.tokens, 1));
  say(fmt::format("  {}  held-out reverse KL {:.4f} as converted", layer_map(student.model->spec()),
                  start_kl));
  ModelSummary s;
  for (int64_t attempt = 1; attempt <= 1 + stage.gate.retries; ++attempt) {
    // A retry goes on from where the attempt before it ended.
    const fs::path attempt_folder = folder / ("attempt-" + std::to_string(attempt));
    const double scale = attempt == 1 ? 1.0 : stage.gate.retry_steps;
    if (stage.has_align && attempt == 1) {
      state.tokens += run_phase("align", stage.align, student, layers, attempt_folder, scale);
    }
    if (stage.has_distill) {
      state.tokens += run_phase("distill", stage.distill, student, layers, attempt_folder, scale);
    }
    if (stage.has_sft) {
      state.tokens += run_phase("sft", stage.sft, student, layers, attempt_folder, scale);
    }
    student.weights.set_trainable(*student.model, nullptr);
    s = summarise_spec(stage.name, *student.model);
    measure_quality(s, *student.model, *teacher_.model, data_, plan_.evaluate);
    s.gate = judge(stage, s);
    s.gate.attempts = attempt;
    say(fmt::format("  gate {}: {}", s.gate.passed ? "passed" : "failed", s.gate.reason));
    if (s.gate.passed) {
      break;
    }
  }
  s.reverse_kl_converted = start_kl;
  s.dir = (fs::path("stages") / stage.name / "model").string();
  s.tokens_trained = state.tokens;
  s.seconds = now_seconds() - begin;
  s.shipped = s.gate.passed;
  SaveOptions save;
  save.tokenizer_from = plan_.teacher;
  save.storage = plan_.storage;
  save.replace = true;
  save.files["provenance.json"] = Json{{"plan", plan_.name},
                                       {"stage", stage.name},
                                       {"teacher", plan_.teacher.string()},
                                       {"tokens", s.tokens_trained},
                                       {"gate", s.gate.reason}}
                                      .dump(1) +
                                  "\n";
  save_model(*student.model, model_dir, save);
  write_result(s, result);
  state.hybrid = std::move(student);
  return s;
}

RunSummary Pipeline::run() {
  const double begin = now_seconds();
  summary_.name = plan_.name;
  summary_.date = today();
  summary_.machine = machine_name();
  summary_.command = options_.command;
  summary_.plan = plan_.text;
  summary_.task = fmt::format(
      "Accuracy: {} held-out problems answered by greedy generation{}. Held-out KL and NLL: {} "
      "completion tokens.",
      data_.task().examples.size(),
      data_.retrieval().examples.empty()
          ? std::string()
          : fmt::format("; retrieval: {} texts of {} to {} characters",
                        data_.retrieval().examples.size(), plan_.evaluate.retrieval_spec.min_chars,
                        plan_.evaluate.retrieval_spec.max_chars),
      data_.held_out().labels());
  teacher_result_ = teacher_summary();
  say(fmt::format("teacher: {} layers, accuracy {:.1f} %, retrieval {:.1f} %",
                  teacher_.model->layer_count(), 100 * teacher_result_.accuracy.accuracy.value,
                  100 * teacher_result_.retrieval.accuracy.value));
  summary_.models.push_back(teacher_result_);
  StageState state{teacher_.model.get(), {}, 0};
  for (const StagePlan& stage : plan_.stages) {
    ModelSummary s = run_stage(stage, state);
    state.base = state.hybrid.model.get();
    summary_.models.push_back(s);
    const fs::path folder = options_.folder / "stages" / stage.name;
    for (const char* phase : {"align", "distill", "sft"}) {
      CurveSummary curve = read_curve(folder, stage.name, phase, s.gate.attempts);
      if (!curve.loss.empty()) {
        summary_.curves.push_back(std::move(curve));
      }
    }
    if (!s.gate.passed && plan_.stop_at_failure) {
      say(fmt::format("stage {} did not pass its gate; the run ends and ships what was good before",
                      stage.name));
      break;
    }
  }
  // Speed last and side by side, so that every model meets the same machine.
  say("\nmeasuring speed");
  std::vector<LoadedModel> loaded;
  std::vector<Model*> models{teacher_.model.get()};
  for (size_t i = 1; i < summary_.models.size(); ++i) {
    loaded.push_back(load_model(options_.folder / summary_.models[i].dir));
  }
  for (LoadedModel& m : loaded) {
    models.push_back(m.model.get());
  }
  ThroughputConfig speed;
  speed.contexts = plan_.evaluate.contexts;
  speed.batch = plan_.evaluate.speed_batch;
  speed.repeats = plan_.evaluate.speed_repeats;
  const auto speeds = measure_throughput(models, speed);
  for (size_t i = 0; i < models.size(); ++i) {
    summary_.models[i].speed = speeds[i];
  }
  summary_.seconds = now_seconds() - begin;
  write_summary(summary_, options_.folder / "summary.json");
  write_report(summary_, options_.folder);
  return summary_;
}

}  // namespace

RunSummary run_pipeline(const HybridPlan& plan, const PipelineOptions& options) {
  const fs::path plan_path = options.folder / "plan.toml";
  if (fs::exists(plan_path)) {
    expect(options.resume, "{} holds a run already; go on with --resume, or choose another folder",
           options.folder.string());
    expect(read_text_file(plan_path.string()) == plan.text,
           "{} was started with another plan; compare it with {}, or choose another folder",
           options.folder.string(), plan_path.string());
  }
  Pipeline pipeline(plan, options);
  make_folder(options.folder.string());
  write_file_atomically(plan_path.string(), plan.text);
  return pipeline.run();
}

}  // namespace cambium
