// What can be known of a plan before any work.
#include <algorithm>
#include <map>
#include <set>

#include "base/file.h"
#include "base/text.h"
#include "eval/likelihood.h"
#include "eval/tasks.h"
#include "hybrid/plan.h"
#include "model/supernet.h"
#include "text/tokenizer.h"
#include "train/router_check.h"

namespace cambium {
namespace {

void check_layer_list(const StagePlan& stage, const char* what, const std::vector<int64_t>& list,
                      int64_t layers) {
  std::set<int64_t> seen;
  for (const int64_t layer : list) {
    expect(layer >= 0 && layer < layers,
           "stage {}: {}: layer {} does not exist: the teacher has layers 0 to {}", stage.name,
           what, layer, layers - 1);
    expect(seen.insert(layer).second, "stage {}: {}: layer {} is given twice", stage.name, what,
           layer);
  }
}

}  // namespace

void check_can_be_saved(const ModelSpec& spec, const std::string& where) {
  const Family& family = find_family(spec.family);
  ModelSpec back;
  try {
    back = family.read_config(family.write_config(spec), "config.json");
  } catch (const Error& e) {
    fail("{}: its hybrid could not be saved: {}", where, e.what());
  }
  expect(back.layers == spec.layers && back.width == spec.width && back.vocab == spec.vocab,
         "{}: its hybrid could not be saved: the layout of {} cannot express all of its layers{}",
         where, spec.family, spec.family == "cambium" ? "" : "; without faithful another can");
}

void check_plan(const HybridPlan& plan, const ModelSpec& teacher) {
  const auto layers = static_cast<int64_t>(teacher.layers.size());
  std::map<std::string, ModelSpec> results{{"", teacher}};
  for (const StagePlan& stage : plan.stages) {
    check_stage_name(stage.name, "stage " + std::to_string(results.size()));
    expect(stage.layers <= layers, "stage {}: {} layers are to be converted, the teacher has {}",
           stage.name, stage.layers, layers);
    expect(!results.contains(stage.name), "two stages are named '{}'", stage.name);
    check_layer_list(stage, "list", stage.place.list, layers);
    for (const Phase& phase : stage.phases) {
      check_layer_list(stage, (phase.name + ".align").c_str(), phase.config.align.layers, layers);
      expect_routers(teacher, phase.config.router,
                     fmt::format("stage {}: {}", stage.name, phase.name));
    }
    const ModelSpec& base = results.at(stage.from);
    for (const int64_t layer : attention_layers(base)) {
      const auto at = static_cast<size_t>(layer);
      std::vector<GraftOptions> grafts = stage.kinds();
      grafts.insert(grafts.end(), stage.beside.begin(), stage.beside.end());
      for (const GraftOptions& graft : grafts) {
        make_unit(graft_spec(*teacher.layers[at].mixer(), teacher.width, graft), teacher.width);
      }
    }
    std::vector<int64_t> chosen = stage.list;
    if (stage.place.method != "list") {
      const std::vector<int64_t> open = attention_layers(base);
      const int64_t added = plan.layers_added(stage);
      if (added != 0 && stage.from.empty()) {
        open_layers(base);  // what it says where the teacher has none
      }
      expect(added <= std::ssize(open),
             "stage {}: {} more layers are to be converted, {} still have attention", stage.name,
             added, open.size());
      chosen = likely_layers(stage, base, added);
    }
    ModelSpec spec = base;
    const std::vector<GraftOptions> kinds = stage.kinds();
    for (size_t k = 0; k < kinds.size(); ++k) {
      const std::vector<int64_t> these = every_nth(chosen, k, kinds.size());
      spec = these.empty() ? spec : convert_spec(spec, teacher, these, kinds[k]);
    }
    if (stage.makes_supernet()) {
      ModelSpec choosing = base;
      for (const int64_t layer : chosen) {
        add_choice(choosing, layer, {*base.layers[static_cast<size_t>(layer)].mixer()}, 0);
      }
    }
    check_can_be_saved(spec, "stage " + stage.name);
    if (plan.evaluate.baseline_window > 0 && !chosen.empty()) {
      convert_spec(teacher, teacher, chosen, plan.evaluate.baseline());
    }
    results[stage.name] = spec;
  }
  for (const int64_t context : plan.evaluate.contexts) {
    expect(teacher.max_positions <= 0 || context <= teacher.max_positions,
           "[evaluate] contexts: expected at most the teacher's {} positions, got {}",
           teacher.max_positions, context);
  }
  for (const int64_t tokens : plan.evaluate.long_texts.grid.lengths) {
    expect(teacher.max_positions <= 0 || tokens + kLongRoom <= teacher.max_positions,
           "[evaluate.long] tokens: expected at most {}, the teacher's {} positions less {} for "
           "template and answer, got {}",
           teacher.max_positions - kLongRoom, teacher.max_positions, kLongRoom, tokens);
  }
}

std::vector<int64_t> likely_layers(const StagePlan& stage, const ModelSpec& base, int64_t count) {
  std::vector<int64_t> layers = attention_layers(base);
  int64_t most = std::ssize(layers);
  if (count == kAnyLayers) {
    const auto kept = stage.place.choice().at_least;
    const auto attention = kept.find(kAttentionKind);
    most -= attention == kept.end() ? 0 : attention->second;
  } else {
    most = std::min(most, count);
  }
  layers.resize(static_cast<size_t>(std::max<int64_t>(most, 0)));
  return layers;
}

std::vector<int64_t> every_nth(const std::vector<int64_t>& layers, size_t first, size_t step) {
  std::vector<int64_t> these;
  for (size_t i = first; i < layers.size(); i += step) {
    these.push_back(layers[i]);
  }
  return these;
}

bool asks_by_template(const EvaluationPlan& plan, const Tokenizer& tokenizer, bool foreign) {
  return plan.ask == Ask::kTemplate ||
         (plan.ask == Ask::kAuto && foreign && tokenizer.has_chat_template());
}

ProblemSpec at_length(ProblemSpec problems, int64_t characters) {
  problems.retrieval.min_chars = static_cast<int>(characters);
  problems.retrieval.max_chars = static_cast<int>(characters);
  return problems;
}

std::vector<int64_t> speed_contexts(const EvaluationPlan& evaluate, const ModelSpec& teacher) {
  if (!evaluate.contexts.empty()) {
    return evaluate.contexts;
  }
  std::vector<int64_t> contexts;
  for (const int64_t context : {512, 4096}) {
    if (contexts.empty() || teacher.max_positions <= 0 || context <= teacher.max_positions) {
      contexts.push_back(context);
    }
  }
  return contexts;
}

void check_plan_inputs(const HybridPlan& plan, std::vector<std::string>* missing) {
  const auto there = [&](const std::filesystem::path& path, const std::string& key) {
    if (missing != nullptr && !std::filesystem::exists(path)) {
      missing->push_back(fmt::format("{} ({})", path.string(), key));
      return false;
    }
    return true;
  };
  std::unique_ptr<Tokenizer> tokenizer;
  if (there(plan.teacher / "tokenizer.json", "the teacher's tokenizer")) {
    check_tokenizer_files(plan.teacher);
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(plan.teacher.string()));
    expect(plan.evaluate.ask != Ask::kTemplate || tokenizer->has_chat_template(),
           "[evaluate] ask = \"template\": the tokenizer of {} has no chat template",
           plan.teacher.string());
    const bool foreign = !plan.evaluate.task.empty() || !plan.evaluate.long_texts.tasks.empty();
    if (asks_by_template(plan.evaluate, *tokenizer, foreign)) {
      tokenizer->expect_chat("[evaluate] ask: " + plan.teacher.string(),
                             "ask = \"plain\" does without it");
    }
  }
  std::map<std::string, std::string> files{{plan.data.train, "data.train"},
                                           {plan.data.valid, "data.valid"}};
  for (const StagePlan& stage : plan.stages) {
    if (stage.place.measures()) {
      files.emplace(stage.place.data, fmt::format("stage {}: place.data", stage.name));
    }
    for (const Phase& phase : stage.phases) {
      files.emplace(phase.data, fmt::format("stage {}: {}.{}", stage.name, phase.name,
                                            phase.on_policy ? "prompts" : "data"));
    }
  }
  for (const auto& [path, key] : files) {
    if (!path.empty() && there(path, key)) {
      expect(std::filesystem::is_regular_file(path), "{} = {}: expected a file of JSON lines", key,
             path);
      const MappedFile readable(path);
      expect(!readable.bytes().empty(), "{} = {}: the file is empty", key, path);
    }
  }
  if (!plan.evaluate.task.empty() && there(plan.evaluate.task_path, "evaluate.task_path")) {
    const Task task =
        load_task(plan.evaluate.task, plan.evaluate.task_path, plan.evaluate.problems);
    const auto stage = std::find_if(plan.stages.begin(), plan.stages.end(),
                                    [](const StagePlan& s) { return s.gate.max_sticky > 0.0; });
    expect(stage == plan.stages.end() || rotatable(task),
           "stage {}: max_sticky needs questions with as many options each; task '{}' has other "
           "ones",
           stage == plan.stages.end() ? "" : stage->name, plan.evaluate.task);
  }
}

}  // namespace cambium
