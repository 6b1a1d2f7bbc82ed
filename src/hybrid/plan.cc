#include "hybrid/plan.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/file.h"
#include "base/text.h"
#include "hybrid/placement.h"

namespace cambium {
namespace {

const std::vector<std::string>& place_methods() {
  static const std::vector<std::string> names = {"leave-mixer-out", "leave-block-out", "mmr",
                                                 "uniform", "list"};
  return names;
}

void one_of(const std::string& value, const std::vector<std::string>& known,
            const std::string& where) {
  expect(std::find(known.begin(), known.end(), value) != known.end(),
         "{}: expected one of {}, got '{}'{}", where, join(known, ", "), value,
         did_you_mean(value, known));
}

DataPlan read_data(const PlanTable& table) {
  DataPlan data;
  data.train = table.get_string("train", "");
  data.valid = table.get_string("valid", "");
  expect(data.train.empty() == data.valid.empty(),
         "{}: expected both 'train' and 'valid' (files of JSON lines), or neither for generated "
         "problems",
         table.where());
  data.problems = read_problem_spec(table.table("problems"));
  return data;
}

RetrievalSpec read_retrieval(const PlanTable& table, RetrievalSpec spec) {
  spec.min_chars = static_cast<int>(table.get_int("min_chars", spec.min_chars));
  spec.max_chars = static_cast<int>(table.get_int("max_chars", spec.max_chars));
  spec.min_facts = static_cast<int>(table.get_int("min_facts", spec.min_facts));
  spec.max_facts = static_cast<int>(table.get_int("max_facts", spec.max_facts));
  spec.questions = static_cast<int>(table.get_int("questions", spec.questions));
  spec.digits = static_cast<int>(table.get_int("digits", spec.digits));
  return spec;
}

EvaluationPlan read_evaluation(const PlanTable& table, const DataPlan& data) {
  EvaluationPlan e;
  e.held_out_documents = table.get_int("held_out_documents", e.held_out_documents);
  e.held_out_tokens = table.get_int("held_out_tokens", e.held_out_tokens);
  e.task = table.get_string("task", "");
  e.task_path = table.get_string("task_path", "");
  const bool generated = data.train.empty();
  e.problems = table.get_int("problems", generated || !e.task.empty() ? e.problems : 0);
  e.retrieval = table.get_int("retrieval", e.retrieval);
  e.max_new_tokens = table.get_int("max_new_tokens", e.max_new_tokens);
  e.batch = table.get_int("batch", e.batch);
  e.contexts = table.get_int_list("contexts");
  if (e.contexts.empty()) {
    e.contexts = {512, 4096};
  }
  e.speed_batch = table.get_int("speed_batch", e.speed_batch);
  e.speed_repeats = table.get_int("speed_repeats", e.speed_repeats);
  e.retrieval_spec = read_retrieval(table.table("retrieval_text"), data.problems.retrieval);
  expect(e.held_out_documents > 0 && e.held_out_tokens > 1 && e.problems >= 0 && e.retrieval >= 0 &&
             e.batch > 0 && e.max_new_tokens > 0 && e.speed_batch > 0 && e.speed_repeats > 0,
         "{}: expected counts above 0", table.where());
  expect(e.task.empty() || !e.task_path.empty(), "{}: expected 'task_path', the file of task '{}'",
         table.where(), e.task);
  return e;
}

GraftOptions read_graft(const PlanTable& table, GraftOptions graft) {
  if (table.has("mixer") && table.get_string("mixer") != graft.mixer) {
    // Another mixer than the plan's: the options of that one do not come along.
    graft = {.mixer = graft.mixer, .from_attention = graft.from_attention};
  }
  read_fields(graft, table);
  check_graft(graft);
  return graft;
}

PlacePlan read_place(const PlanTable& table, PlacePlan place) {
  place.method = table.get_string("method", place.method);
  one_of(place.method, place_methods(), table.where() + ": method");
  place.metric = table.get_string("metric", place.metric);
  one_of(place.metric, {"reverse-kl", "nll", "accuracy"}, table.where() + ": metric");
  place.documents = table.get_int("documents", place.documents);
  place.list = table.get_int_list("list");
  if (place.method == "mmr") {
    place.probe = read_train_config(table.table("probe"), place.probe, true);
  }
  expect(place.method != "list" || !place.list.empty(),
         "{}: expected 'list', the layers to convert", table.where());
  return place;
}

GatePlan read_gate(const PlanTable& table, GatePlan gate) {
  gate.max_reverse_kl = table.get_real("max_reverse_kl", gate.max_reverse_kl);
  gate.min_accuracy_kept = table.get_real("min_accuracy_kept", gate.min_accuracy_kept);
  gate.lower_bound = table.get_bool("lower_bound", gate.lower_bound);
  gate.retries = table.get_int("retries", gate.retries);
  gate.retry_steps = table.get_real("retry_steps", gate.retry_steps);
  expect(gate.max_reverse_kl >= 0 && gate.min_accuracy_kept >= 0 && gate.retries >= 0 &&
             gate.retry_steps > 0,
         "{}: expected values of at least 0", table.where());
  return gate;
}

// The loss each phase has unless the plan says otherwise.
TrainConfig phase_defaults(const char* phase) {
  TrainConfig config;
  config.loss = {};
  const std::string name = phase;
  if (name == "align") {
    config.objective = Objective::kAlign;
  } else if (name == "sft") {
    config.loss.cross_entropy = 1.0F;
  } else {
    config.loss.reverse_kl = 1.0F;
  }
  return config;
}

int64_t stage_layers(const PlanTable& stage, const PlacePlan& place, int64_t before) {
  if (stage.has("layers")) {
    return stage.get_int("layers");
  }
  expect(!place.list.empty(), "{}: expected 'layers', how many are converted after the stage",
         stage.where());
  return before + static_cast<int64_t>(place.list.size());
}

}  // namespace

void visit_fields(GraftOptions& graft, FieldVisitor& visit) {
  enum class Init { kAttention, kRandom };
  Init init = graft.from_attention ? Init::kAttention : Init::kRandom;
  visit({"mixer", "what takes the place of attention"}, graft.mixer);
  visit({"window", "sliding_window: tokens; 0 = 128"}, graft.window, ints_from(0, 1 << 30));
  visit({"state", "mamba: numbers a channel; 0 = 16, or what divides the head"}, graft.state,
        ints_from(0, 1 << 20));
  visit({"faithful", "the released layouts to the row"}, graft.faithful);
  visit({"init", "what the new mixers start from"}, init,
        {{"attention", Init::kAttention}, {"random", Init::kRandom}});
  graft.from_attention = init == Init::kAttention;
}

ProblemSpec read_problem_spec(const PlanTable& plan) {
  ProblemSpec spec;
  spec.retrieval_share = plan.get_real("retrieval_share", spec.retrieval_share);
  const PlanTable word = plan.table("word");
  spec.word.min_steps = static_cast<int>(word.get_int("min_steps", spec.word.min_steps));
  spec.word.max_steps = static_cast<int>(word.get_int("max_steps", spec.word.max_steps));
  spec.word.distractors = static_cast<int>(word.get_int("distractors", spec.word.distractors));
  spec.word.hard = word.get_real("hard", spec.word.hard);
  spec.word.shuffle = word.get_real("shuffle", spec.word.shuffle);
  spec.word.lookback = word.get_real("lookback", spec.word.lookback);
  spec.word.max_number = static_cast<int>(word.get_int("max_number", spec.word.max_number));
  spec.word.max_value = static_cast<int>(word.get_int("max_value", spec.word.max_value));
  spec.word.max_factor = static_cast<int>(word.get_int("max_factor", spec.word.max_factor));
  spec.retrieval = read_retrieval(plan.table("retrieval"), spec.retrieval);
  spec.validate();
  return spec;
}

HybridPlan read_hybrid_plan(const std::filesystem::path& path, const std::string& teacher,
                            const std::vector<std::string>& overrides) {
  PlanTable table = PlanTable::read(path.string());
  table.set_all(overrides);
  HybridPlan plan;
  plan.name = table.get_string("name", path.stem().string());
  plan.teacher = table.get_string("teacher", "");
  if (!teacher.empty()) {
    plan.teacher = teacher;
  }
  expect(!plan.teacher.empty(), "{}: expected 'teacher', the folder of the full-attention model",
         path.string());
  plan.seed = static_cast<uint64_t>(table.get_int("seed", 1));
  const std::string failure = table.get_string("after_failed_gate", "stop");
  one_of(failure, {"stop", "continue"}, path.string() + ": after_failed_gate");
  plan.stop_at_failure = failure == "stop";
  const std::string storage = table.get_string("storage", "f32");
  one_of(storage, {"f32", "bf16"}, path.string() + ": storage");
  plan.storage = storage == "bf16" ? MatrixStorage::kBF16 : MatrixStorage::kF32;
  plan.data = read_data(table.table("data"));
  plan.evaluate = read_evaluation(table.table("evaluate"), plan.data);

  // Tables of the plan itself are the defaults of every stage.
  const GraftOptions graft = read_graft(table.table("graft"), {});
  PlacePlan place;
  place.probe = phase_defaults("distill");
  place = read_place(table.table("place"), place);
  const GatePlan gate = read_gate(table.table("gate"), {});
  std::map<std::string, TrainConfig> phases;
  for (const char* phase : {"align", "distill", "sft"}) {
    phases[phase] = phase_defaults(phase);
    if (table.has(phase)) {
      phases[phase] = read_train_config(table.table(phase), phases[phase], true);
    }
  }
  int64_t before = 0;
  for (const PlanTable& entry : table.tables("stage")) {
    StagePlan stage;
    stage.graft = read_graft(entry.table("graft"), graft);
    stage.place = read_place(entry.table("place"), place);
    stage.layers = stage_layers(entry, stage.place, before);
    stage.name = entry.get_string("name", std::to_string(stage.layers));
    stage.gate = read_gate(entry.table("gate"), gate);
    const auto phase = [&](const char* name, TrainConfig& config) {
      const bool given = entry.has(name) || table.has(name);
      config = read_train_config(entry.table(name), phases[name], true);
      return given && config.has_length();
    };
    stage.has_align = phase("align", stage.align);
    stage.has_distill = phase("distill", stage.distill);
    stage.has_sft = phase("sft", stage.sft);
    const bool scored = stage.place.method.starts_with("leave");
    expect(!scored || stage.place.metric != "accuracy" || plan.evaluate.problems > 0,
           "{}: metric accuracy needs problems to answer: give [evaluate] 'task' and 'task_path'",
           entry.where());
    expect(stage.place.method != "mmr" || stage.place.probe.has_length(),
           "{}: mmr needs [place.probe] 'steps' above 0", entry.where());
    expect(stage.gate.min_accuracy_kept == 0.0 || plan.evaluate.problems > 0,
           "{}: a gate on accuracy needs problems: give [evaluate] 'task' and 'task_path'",
           entry.where());
    expect(stage.layers > before,
           "{}: expected 'layers' to grow from stage to stage, got {} after {}", entry.where(),
           stage.layers, before);
    before = stage.layers;
    plan.stages.push_back(std::move(stage));
  }
  expect(!plan.stages.empty(), "{}: expected at least one [[stage]]", path.string());
  table.expect_all_used();
  plan.text = table.to_text();
  return plan;
}

void check_plan(const HybridPlan& plan, const ModelSpec& teacher) {
  const auto layers = static_cast<int64_t>(teacher.layers.size());
  std::set<std::string> names;
  for (const StagePlan& stage : plan.stages) {
    expect(stage.layers <= layers, "stage {}: {} layers are to be converted, the teacher has {}",
           stage.name, stage.layers, layers);
    expect(names.insert(stage.name).second, "two stages are named '{}'", stage.name);
    for (const int64_t layer : stage.place.list) {
      expect(layer >= 0 && layer < layers,
             "stage {}: layer {} does not exist: the teacher has layers 0 to {}", stage.name, layer,
             layers - 1);
    }
    for (const LayerSpec& layer : teacher.layers) {
      make_unit(graft_spec(*layer.mixer(), teacher.width, stage.graft), teacher.width);
    }
  }
}

}  // namespace cambium
