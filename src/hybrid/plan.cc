#include "hybrid/plan.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/file.h"
#include "base/text.h"
#include "hybrid/calibrate.h"
#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

// Bounds that no run meets and that keep products of them far from the end of int64_t.
constexpr int64_t kMaxCount = 100'000'000;
constexpr int64_t kMaxTokens = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1'000'000;
// Of a plan that does not say by how many documents starts are calibrated.
constexpr int64_t kCalibrateDocuments = 64;

// Names come from files: what a terminal would act on is shown as '?'.
std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c >= 0 && (c < ' ' || c == 127); }, '?');
  return text.substr(0, 100);
}

std::string choice(const PlanTable& table, const std::string& key,
                   const std::vector<std::string>& known) {
  const std::string value = table.get_string(key, known[0]);
  expect(std::find(known.begin(), known.end(), value) != known.end(),
         "{}: {}: expected one of {}, got '{}'{}", table.where(), key, join(known, ", "), value,
         did_you_mean(value, known));
  return value;
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

EvaluationPlan read_evaluation(const PlanTable& table, const DataPlan& data) {
  EvaluationPlan e;
  e.retrieval_spec = data.problems.retrieval;
  read_fields(e, table);
  if (!table.has("problems") && e.task.empty() && !data.train.empty()) {
    e.problems = 0;
  }
  ProblemSpec retrieval = data.problems;
  retrieval.retrieval = e.retrieval_spec;
  retrieval.validate();
  expect(e.retrieval_lengths.empty() || e.retrieval > 0,
         "{}: retrieval_lengths does nothing without 'retrieval', the texts of each length",
         table.where());
  for (const int64_t length : e.retrieval_lengths) {
    at_length(retrieval, length).validate();
  }
  const LongPlan& l = e.long_texts;
  expect(l.tasks.empty() == l.grid.lengths.empty(),
         "{}: expected 'tasks' and 'tokens' together in [evaluate.long]: what is asked, and in "
         "texts of how many tokens",
         table.where());
  for (const std::string& task : l.tasks) {
    expect(is_long_task(task), "{}: expected tasks of [evaluate.long] among {}, got '{}'",
           table.where(), join(long_task_names(), ", "), printable(task));
  }
  expect(e.held_out_documents > 0 && e.held_out_tokens > 1, "{}: expected counts above 0",
         table.where());
  expect(e.task.empty() || !e.task_path.empty(), "{}: expected 'task_path', the file of task '{}'",
         table.where(), e.task);
  expect(!e.task.empty() || e.task_path.empty(), "{}: expected 'task', what '{}' is", table.where(),
         e.task_path);
  return e;
}

GraftOptions read_graft(const PlanTable& table, GraftOptions graft) {
  if (table.has("mixer") && table.get_string("mixer") != graft.mixer) {
    // Another mixer than the plan's: the options of that one do not come along.
    graft = {.mixer = graft.mixer, .from_attention = graft.from_attention};
  }
  read_fields(graft, table);
  return graft;
}

bool can_be_calibrated(const GraftOptions& graft) {
  return graft.from_attention && !graft.faithful && find_graft(graft.mixer).calibrate != nullptr;
}

GatePlan read_gate(const PlanTable& table, GatePlan gate) {
  read_fields(gate, table);
  return gate;
}

// The phases a stage can have, in their order, with the loss each has unless the plan says
// otherwise.
std::vector<Phase> known_phases(const OptimizerConfig& optimizer, uint64_t seed) {
  TrainConfig config;
  config.loss = {};
  config.optimizer = optimizer;
  config.seed = seed;
  Phase align{"align", config, true, true};
  align.config.objective = Objective::kAlign;
  Phase distill{"distill", config, true, false};
  distill.config.loss.reverse_kl = 1.0F;
  Phase sft{"sft", config, false, false};
  sft.config.loss.cross_entropy = 1.0F;
  Phase on_policy{"on_policy", config, true, false};
  on_policy.config.loss = on_policy_loss();
  on_policy.on_policy.emplace();
  return {align, distill, sft, on_policy};
}

// Phase `defaults` as table [name] of a stage has it; `own` = that table itself, not its defaults.
Phase read_phase(const PlanTable& table, const Phase& defaults, bool own) {
  Phase phase = defaults;
  const bool stores = phase.teacher && !phase.on_policy;
  if (stores && phase.name != "align") {
    read_fields(phase.logits, table.table("logits"));
  }
  phase.config = read_train_config(table, defaults.config, true);
  phase.data = table.get_string(phase.on_policy ? "prompts" : "data", defaults.data);
  if (phase.on_policy) {
    read_fields(*phase.on_policy, table);
  }
  const TrainConfig& c = phase.config;
  if (!own || !c.has_length()) {
    return phase;
  }
  const bool kl = c.loss.forward_kl != 0.0F || c.loss.reverse_kl != 0.0F;
  if (!phase.logits.file.empty()) {
    expect(c.objective == Objective::kEndToEnd && c.align.layers.empty(),
           "{}: stored logits are what the teacher says at its head; alignment needs the teacher",
           table.where());
    expect(c.loss.temperature == 1.0F,
           "{}: stored logits are those at temperature 1, got {}; leave it out", table.where(),
           c.loss.temperature);
    expect(kl, "{}: stored logits do nothing without a KL", table.where());
  } else {
    expect(!table.has("logits"), "{}: expected 'file', where the logits are kept",
           table.table("logits").where());
  }
  if (!phase.teacher) {
    expect(c.objective == Objective::kEndToEnd && !kl && c.align.layers.empty(),
           "{}: this phase learns from the data alone; KL and alignment belong to a phase with a "
           "teacher (distill)",
           table.where());
    expect(c.loss.cross_entropy != 0.0F, "{}: expected a cross_entropy above 0", table.where());
  } else if (phase.on_policy) {
    check_on_policy(c, table.where());
  } else if (c.objective == Objective::kAlign) {
    expect(!table.has("loss"),
           "{}: objective align has no loss at the head; leave [loss] out, or give objective = "
           "\"end_to_end\"",
           table.where());
    expect(!table.has("train"),
           "{}: objective align trains the converted mixers; leave 'train' out", table.where());
    expect(!c.freeze_attention,
           "{}: objective align trains the converted mixers; leave 'freeze_attention' out",
           table.where());
  } else {
    expect(kl || c.loss.cross_entropy != 0.0F || !c.align.layers.empty(),
           "{}: every loss has weight zero; give cross_entropy, forward_kl or reverse_kl a weight",
           table.where());
  }
  return phase;
}

MergePlan read_merge(const PlanTable& table) {
  MergePlan merge;
  merge.with = table.get_string_list("with");
  merge.weights = table.get_real_list("weights");
  expect(merge.weights.empty() || merge.weights.size() == merge.with.size() + 1,
         "{}: expected {} 'weights', the stage's own and one for each of 'with', got {}",
         table.where(), merge.with.size() + 1, merge.weights.size());
  double sum = 0.0;
  for (const double w : merge.weights) {
    expect(std::isfinite(w) && w >= 0.0, "{}: expected 'weights' of at least 0, got {}",
           table.where(), w);
    sum += w;
  }
  expect(merge.weights.empty() || sum > 0.0, "{}: expected a weight above 0", table.where());
  return merge;
}

// The defaults that tables outside the stages give.
struct Defaults {
  GraftOptions graft;
  TrainConfig plain;  // of probes, where nothing else is said
  PlacePlan place;
  GatePlan gate;
  std::vector<Phase> phases;
};

const StagePlan* find_stage(const std::vector<StagePlan>& stages, const std::string& name) {
  const auto it = std::find_if(stages.begin(), stages.end(),
                               [&](const StagePlan& s) { return s.name == name; });
  return it == stages.end() ? nullptr : &*it;
}

// The layers of method "list": a list of the stage's own is taken whole; of a list for all stages
// each takes the next ones.
void read_list(const PlanTable& entry, StagePlan& stage, const HybridPlan& plan, int64_t before) {
  const bool own = entry.table("place").has("list");
  expect(!stage.place.list.empty(), "{}: expected 'list', the layers to convert",
         entry.table("place").where());
  std::set<int64_t> gone;
  for (const StagePlan* s = find_stage(plan.stages, stage.from); s != nullptr;
       s = find_stage(plan.stages, s->from)) {
    gone.insert(s->list.begin(), s->list.end());
  }
  for (const int64_t layer : stage.place.list) {
    if (own || !gone.contains(layer)) {
      stage.list.push_back(layer);
    }
  }
  if (!entry.has("layers")) {
    stage.layers = before + static_cast<int64_t>(stage.list.size());
  }
  const auto count = static_cast<size_t>(std::max<int64_t>(stage.layers - before, 0));
  expect(own ? stage.list.size() == count : stage.list.size() >= count,
         "{}: the list has {} layers to convert, 'layers' asks for {} more", entry.where(),
         stage.list.size(), count);
  stage.list.resize(count);
}

void read_base(const PlanTable& entry, StagePlan& stage, const HybridPlan& plan) {
  stage.branch = entry.get_bool("branch", false);
  for (const StagePlan& earlier : plan.stages) {
    stage.from = earlier.branch ? stage.from : earlier.name;
  }
  if (entry.has("from")) {
    stage.from = entry.get_string("from");
    expect(find_stage(plan.stages, stage.from) != nullptr, "{}: from = \"{}\" is no earlier stage",
           entry.where(), stage.from);
  }
}

// What a search says of kinds, against the mixers there are.
void check_kinds(const StagePlan& stage, const std::string& where) {
  if (stage.place.method != "search") {
    return;
  }
  std::vector<std::string> names = {kAttentionKind};
  for (const GraftOptions& kind : stage.kinds()) {
    expect(std::find(names.begin(), names.end(), kind.mixer) == names.end(),
           "{}: mixers: {} is given twice, or is the stage's own", where, kind.mixer);
    names.push_back(kind.mixer);
  }
  const ChoiceOptions choice = stage.place.choice();
  for (const auto& [key, counts] :
       {std::pair("at_least", choice.at_least), std::pair("at_most", choice.at_most),
        std::pair("none_or_at_least", choice.none_or_at_least)}) {
    for (const auto& [name, count] : counts) {
      expect(std::find(names.begin(), names.end(), name) != names.end(),
             "{}: {}: there is no kind '{}'{}; there are {}", where, key, name,
             did_you_mean(name, names), join(names, ", "));
      expect(name != kAttentionKind || stage.layers == kAnyLayers,
             "{}: {}: how many layers keep attention follows from 'layers'; leave one of the two "
             "out",
             where, key);
    }
  }
}

void check_stage(const PlanTable& entry, const StagePlan& stage, const HybridPlan& plan,
                 int64_t before) {
  const std::string where = entry.where();
  const PlacePlan& place = stage.place;
  expect(place.metric != "accuracy" || !place.asks() || plan.evaluate.problems > 0,
         "{}: metric accuracy needs problems to answer: give [evaluate] 'task' and 'task_path'",
         where);
  const bool retrieves = plan.evaluate.retrieval > 0 || !plan.evaluate.long_texts.tasks.empty();
  expect(place.metric != "retrieval" || !place.asks() || retrieves,
         "{}: metric retrieval needs texts: give [evaluate] 'retrieval', or [evaluate.long] "
         "'tasks'",
         where);
  expect(!place.trains() || place.probe.has_length(), "{}: {} needs [place.probe] 'steps' above 0",
         where, place.method);
  expect(stage.gate.min_accuracy_kept == 0.0 || plan.evaluate.problems > 0,
         "{}: a gate on accuracy needs problems: give [evaluate] 'task' and 'task_path'", where);
  expect(stage.gate.min_retrieval_kept == 0.0 || retrieves,
         "{}: a gate on retrieval needs texts: give [evaluate] 'retrieval', or [evaluate.long] "
         "'tasks'",
         where);
  expect(stage.gate.max_answer_length_ratio == 0.0 || plan.evaluate.problems > 0,
         "{}: a gate on the length of answers needs problems: give [evaluate] 'task' and "
         "'task_path'",
         where);
  expect(stage.gate.max_sticky == 0.0 || !plan.evaluate.task.empty(),
         "{}: max_sticky needs questions with options: give [evaluate] 'task' and 'task_path'",
         where);
  for (const std::string& key : entry.table("place").keys()) {
    expect(place_uses(place, key), "{}: '{}' does nothing with method \"{}\"{}",
           entry.table("place").where(), key, place.method,
           place.method == "search" ? " without a budget or with this cost"
           : place.measures()       ? " and this metric"
                                    : "");
  }
  check_kinds(stage, entry.table("place").where());
  // A stage that only trains on must say from where.
  const bool trains_on = entry.has("from") || stage.branch;
  const bool converts = plan.layers_added(stage) != 0;
  expect(stage.layers == kAnyLayers ? converts || trains_on
                                    : stage.layers >= before && (converts || trains_on),
         "{}: expected 'layers' to grow from stage to stage, got {} after {}", where, stage.layers,
         before);
  expect(converts || !stage.phases.empty() || !stage.merge.with.empty(),
         "{}: converts nothing, trains nothing and merges nothing", where);
  const StagePlan* base = find_stage(plan.stages, stage.from);
  expect(
      base == nullptr || !base->makes_supernet(),
      "{}: goes on from stage {}, which makes a supernet; give a supernet's stage branch = true, "
      "or put it last",
      where, stage.from);
  expect(
      !stage.makes_supernet() || (converts && stage.merge.with.empty()),
      "{}: graft.beside makes a supernet of the layers that are converted: expected more layers, "
      "and no merge",
      where);
  for (const std::string& name : stage.merge.with) {
    const StagePlan* other = find_stage(plan.stages, name);
    expect(other != nullptr, "{}: merge.with: \"{}\" is no earlier stage", where, name);
    expect(other->layers == stage.layers && !converts &&
               (other->name == stage.from || other->from == stage.from),
           "{}: merge.with: \"{}\" has not the same converted layers; a merge is of models that "
           "were trained on from one conversion",
           where, name);
  }
}

// The mixers of a stage: one, a supernet's, or those that its search chooses among. Where the plan
// does not say by how many documents starts are calibrated (`calibrates`), those that can be are.
void read_kinds(const PlanTable& entry, GraftOptions graft, bool calibrates, StagePlan& stage) {
  const std::string where = entry.where() + " graft";
  const bool searches = stage.place.method == "search" && !stage.place.mixers.empty();
  const bool supernet = !graft.beside.empty();
  expect(!searches || !supernet,
         "{}: place.mixers are what a search chooses among, graft.beside makes a supernet; a "
         "supernet's own mixers are placed by `cambium place`: leave one of the two out",
         entry.where());
  if (calibrates && !supernet && !searches && can_be_calibrated(graft)) {
    graft.calibrate = kCalibrateDocuments;
  }
  if (searches) {
    graft.beside = stage.place.mixers;
  }
  std::vector<GraftOptions> all = grafts_of(graft, where);
  for (GraftOptions& kind : all) {
    if (calibrates && searches && can_be_calibrated(kind)) {
      kind.calibrate = kCalibrateDocuments;
    }
  }
  stage.graft = all.front();
  all.erase(all.begin());
  (searches ? stage.others : stage.beside) = std::move(all);
}

// How many layers are converted after the stage.
void read_count(const PlanTable& entry, StagePlan& stage, int64_t before) {
  if (before == kAnyLayers) {
    expect(!entry.has("layers"),
           "{}: goes on from stage {}, whose search chooses how many layers are converted; it can "
           "train on: leave 'layers' out",
           entry.where(), stage.from);
    stage.layers = kAnyLayers;
    return;
  }
  if (stage.place.method == "search" && stage.place.bounds_layers() && !entry.has("layers")) {
    stage.layers = kAnyLayers;
    return;
  }
  expect(entry.has("layers") || stage.place.method == "list",
         "{}: expected 'layers', how many are converted after the stage{}", entry.where(),
         stage.place.method == "search" ? ", or a budget in [place]" : "");
  stage.layers = entry.get_int("layers", before);
  expect(stage.layers >= 0 && stage.layers <= kMaxLayers,
         "{}: 'layers' must be a whole number from 0 to {}, got {}", entry.where(), kMaxLayers,
         stage.layers);
}

StagePlan read_stage(const PlanTable& table, const PlanTable& entry, const Defaults& defaults,
                     const HybridPlan& plan) {
  StagePlan stage;
  GraftOptions graft = read_graft(entry.table("graft"), defaults.graft);
  stage.place = read_place(entry.table("place"), defaults.place, defaults.plain);
  const bool calibrates =
      !table.table("graft").has("calibrate") && !entry.table("graft").has("calibrate");
  read_kinds(entry, graft, calibrates, stage);
  read_base(entry, stage, plan);
  const int64_t before = plan.layers_before(stage);
  read_count(entry, stage, before);
  if (stage.place.method == "list") {
    read_list(entry, stage, plan, before);
  }
  const bool any = stage.layers == kAnyLayers;
  stage.name = entry.get_string("name", any ? "search" : std::to_string(stage.layers));
  check_stage_name(stage.name, entry.where());
  stage.gate = read_gate(entry.table("gate"), defaults.gate);
  stage.merge = read_merge(entry.table("merge"));
  int64_t fit = 0;
  for (const GraftOptions& kind : stage.kinds()) {
    fit = std::max(fit, kind.fit_steps());
  }
  if (fit > 0 && plan.layers_added(stage) != 0) {
    stage.phases.push_back({"fit", fit_config(fit, {}, plan.seed), true, true});
  }
  for (const Phase& known : defaults.phases) {
    const bool own = entry.has(known.name);
    if (own || table.has(known.name)) {
      Phase phase = read_phase(entry.table(known.name), known, own);
      expect(phase.logits.file.empty() || phase.logits.documents > 0 || !phase.data.empty() ||
                 !plan.data.train.empty(),
             "{}: generated problems never end: expected 'documents', how many are stored",
             entry.table(known.name).table("logits").where());
      if (phase.config.has_length()) {
        stage.phases.push_back(std::move(phase));
      }
    }
  }
  check_stage(entry, stage, plan, before);
  expect(find_stage(plan.stages, stage.name) == nullptr, "{}: two stages are named '{}'",
         entry.where(), stage.name);
  return stage;
}

}  // namespace

const Phase* StagePlan::phase(const std::string& phase_name) const {
  for (const Phase& p : phases) {
    if (p.name == phase_name) {
      return &p;
    }
  }
  return nullptr;
}

std::vector<GraftOptions> StagePlan::kinds() const {
  std::vector<GraftOptions> all = {graft};
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

int64_t HybridPlan::layers_added(const StagePlan& stage) const {
  const int64_t before = layers_before(stage);
  return stage.layers == before       ? 0
         : stage.layers == kAnyLayers ? kAnyLayers
                                      : stage.layers - before;
}

int64_t HybridPlan::layers_before(const StagePlan& stage) const {
  const StagePlan* base = find_stage(stages, stage.from);
  return base == nullptr ? 0 : base->layers;
}

void visit_fields(GraftOptions& graft, FieldVisitor& visit) {
  enum class Init { kAttention, kRandom };
  Init init = graft.from_attention ? Init::kAttention : Init::kRandom;
  visit({"mixer", "what takes the place of attention"}, graft.mixer);
  visit({"beside", "a supernet: mixers that each layer may choose beside attention and it", nullptr,
         false},
        graft.beside);
  visit({"window", "sliding_window and parallel: tokens; 0 = 128"}, graft.window,
        ints_from(0, 1 << 30));
  visit({"sinks", "sliding_window and parallel: first tokens that stay visible"}, graft.sinks,
        ints_from(0, 1 << 30));
  visit({"sink_logits",
         "sliding_window and parallel: each head gets a sink's learned score without a value",
         nullptr, false},
        graft.sink_logits);
  visit({"recurrent", "parallel: the mixer beside the window"}, graft.recurrent);
  visit({"window_dropout", "parallel: share of documents trained without their window"},
        graft.window_dropout, reals_from(0.0, 1.0));
  visit({"window_share", "parallel: share of the window in the output at the start"},
        graft.window_share, reals_from(0.0, 1.0));
  visit({"state", "mamba: numbers a channel; 0 = 16, or what divides the head"}, graft.state,
        ints_from(0, 1 << 20));
  visit({"faithful", "the released layouts to the row"}, graft.faithful);
  visit({"init", "what the new mixers start from"}, init,
        {{"attention", Init::kAttention}, {"random", Init::kRandom}});
  graft.from_attention = init == Init::kAttention;
  // Probes of mmr start without these: they stand in no fingerprint of scores.
  visit({"rope", "gated_delta_net: q and k turn by position as the attention's", nullptr, false},
        graft.rope);
  visit({"calibrate", "documents that the start is calibrated by; 0 = it is not; 64 unless given",
         nullptr, false},
        graft.calibrate, ints_from(0, kMaxCount));
  visit({"calibrate_tokens", "of each of them at most", nullptr, false}, graft.calibrate_tokens,
        ints_from(2, kMaxTokens));
  visit(
      {"fit", "steps of fitting the new mixers to their attention; -1 = 300 with calibrate, else 0",
       nullptr, false},
      graft.fit, ints_from(-1, kMaxCount));
}

void visit_fields(LogitsPlan& logits, FieldVisitor& visit) {
  visit({"file", "where they are kept; made where it is not there"}, logits.file);
  visit({"top_k", "tokens kept of each distribution, beside what all others come to"}, logits.top_k,
        ints_from(1, kMaxTokens));
  visit({"documents", "the first so many of the phase's; 0 = all of its file"}, logits.documents,
        ints_from(0, kMaxCount));
}

void visit_fields(EvaluationPlan& e, FieldVisitor& visit) {
  visit({"held_out_documents", "documents whose losses are reported"}, e.held_out_documents,
        ints_from(1, kMaxCount));
  visit({"held_out_tokens", "tokens of a document at most"}, e.held_out_tokens,
        ints_from(2, kMaxTokens));
  visit({"task", "a benchmark: gsm8k, math500, ...; empty = generated problems"}, e.task);
  visit({"task_path", "its file"}, e.task_path);
  visit({"problems", "problems that are answered; 0 = none"}, e.problems, ints_from(0, kMaxCount));
  visit({"ask", "auto = a benchmark through the chat template where the tokenizer has one"}, e.ask,
        {{"auto", Ask::kAuto}, {"template", Ask::kTemplate}, {"plain", Ask::kPlain}});
  visit({"retrieval", "generated retrieval problems that are answered"}, e.retrieval,
        ints_from(0, kMaxCount));
  visit({"max_new_tokens", "tokens of an answer at most"}, e.max_new_tokens,
        ints_from(1, kMaxTokens));
  visit({"batch", "answers generated at once"}, e.batch, ints_from(1, 1 << 20));
  visit({"contexts", "tokens at which speed is measured; 512 and 4096 unless given"}, e.contexts,
        ints_from(1, kMaxTokens));
  visit({"speed_batch", "sequences at once in speeds"}, e.speed_batch, ints_from(1, 1 << 20));
  visit({"speed_repeats", "speeds are the median of so many"}, e.speed_repeats,
        ints_from(1, 100'000));
  visit({"retrieval_lengths", "texts of so many characters are asked too, 'retrieval' of each"},
        e.retrieval_lengths, ints_from(100, kMaxCount));
  visit(
      {"baseline_window", "tokens of windows in a stage's layers, untrained, beside it; 0 = none"},
      e.baseline_window, ints_from(0, 1 << 30));
  visit({"baseline_sinks", "first tokens that those windows see too"}, e.baseline_sinks,
        ints_from(0, 1 << 30));
  visit.table({"long", "retrieval from long texts that any model can be asked"}, [&] {
    LongPlan& l = e.long_texts;
    visit({"tasks", "passkey, keyvalue, variables"}, l.tasks);
    visit({"tokens", "lengths of the texts, question and all"}, l.grid.lengths,
          ints_from(1, kMaxTokens));
    visit({"depths", "places of what is asked, from the start to the end"}, l.grid.depths,
          ints_from(1, 1000));
    visit({"texts", "at each place of each length"}, l.grid.answers, ints_from(1, kMaxCount));
  });
  visit.table({"retrieval_text", "as [data.problems.retrieval], for the retrieval that is asked"},
              [&] { visit_fields(e.retrieval_spec, visit); });
}

void visit_fields(GatePlan& g, FieldVisitor& visit) {
  visit({"max_reverse_kl", "held-out, nats a token; 0 = not asked"}, g.max_reverse_kl,
        reals_from(0.0, 1e6));
  visit({"min_accuracy_kept", "of the teacher's; 0 = not asked"}, g.min_accuracy_kept,
        reals_from(0.0, 1e6));
  visit({"min_retrieval_kept", "of the teacher's, at each length; 0 = not asked"},
        g.min_retrieval_kept, reals_from(0.0, 1e6));
  visit({"max_answer_length_ratio", "mean tokens of an answer over the teacher's; 0 = not asked"},
        g.max_answer_length_ratio, reals_from(0.0, 1e6));
  visit({"max_sticky", "share of questions with one letter in all rotations; 0 = not asked"},
        g.max_sticky, reals_from(0.0, 1.0));
  visit({"cached_equals_uncached", "texts read through a cache, in pieces, are the same"},
        g.cached_equals_uncached);
  visit({"lower_bound", "the lower end of the interval must pass"}, g.lower_bound);
  visit({"retries", "further attempts; the best one is kept"}, g.retries, ints_from(0, 1000));
  visit({"retry_steps", "length of a retry, times the stage's"}, g.retry_steps,
        reals_above(0.0, 1e6));
}

void check_stage_name(const std::string& name, const std::string& where) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  expect(!name.empty() && name.size() <= 100 && name != "." && name != ".." &&
             std::all_of(name.begin(), name.end(), plain),
         "{}: the name of a stage is the name of its folder: expected at most 100 letters, digits, "
         "'.', '_' and '-', got '{}'",
         where, printable(name));
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
  const int64_t seed = table.get_int("seed", 1);
  expect(seed >= 0, "{}: seed must be a whole number from 0, got {}", path.string(), seed);
  plan.seed = static_cast<uint64_t>(seed);
  plan.stop_at_failure = choice(table, "after_failed_gate", {"stop", "continue"}) == "stop";
  plan.storage = choice(table, "storage", {"f32", "bf16"}) == "bf16" ? MatrixStorage::kBF16
                                                                     : MatrixStorage::kF32;
  plan.data = read_data(table.table("data"));
  plan.evaluate = read_evaluation(table.table("evaluate"), plan.data);

  // Tables of the plan itself are the defaults of every stage.
  OptimizerConfig optimizer;
  read_fields(optimizer, table.table("optimizer"));
  Defaults defaults;
  defaults.graft = read_graft(table.table("graft"), {});
  defaults.phases = known_phases(optimizer, plan.seed);
  defaults.plain = defaults.phases[1].config;
  defaults.place.probe = defaults.plain;
  defaults.place = read_place(table.table("place"), defaults.place, defaults.plain);
  defaults.gate = read_gate(table.table("gate"), {});
  for (Phase& phase : defaults.phases) {
    phase = read_phase(table.table(phase.name), phase, table.has(phase.name));
  }
  for (const PlanTable& entry : table.tables("stage")) {
    plan.stages.push_back(read_stage(table, entry, defaults, plan));
  }
  expect(!plan.stages.empty(), "{}: expected at least one [[stage]]", path.string());
  for (const std::string& key : table.table("place").keys()) {
    expect(std::any_of(plan.stages.begin(), plan.stages.end(),
                       [&](const StagePlan& s) { return place_uses(s.place, key); }),
           "{}: '{}' does nothing with any stage's method", table.table("place").where(), key);
  }
  table.expect_all_used();
  plan.text = table.to_text();
  return plan;
}

}  // namespace cambium
