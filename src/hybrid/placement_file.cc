#include "hybrid/placement_file.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"
#include "hybrid/scoring.h"
#include "hybrid/sealed.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

Json measured_json(const Measured& m) {
  const auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); };
  return {{"value", number(m.value)}, {"low", number(m.low)}, {"high", number(m.high)}};
}

Measured read_measured(const JsonFields& json) {
  return {json.real("value"), json.real("low"), json.real("high")};
}

// The root outlives what reads it.
struct OurFile {
  nlohmann::json root;
  std::string where;

  OurFile(const std::filesystem::path& path, const char* what)
      : root(parse_json<nlohmann::json>(read_sealed(path), path.string())), where(path.string()) {
    expect(root.is_object() && root.contains("file") && root["file"].is_string() &&
               root["file"].get<std::string>() == what,
           "{}: expected {} as `cambium place --method search` writes it", where, what);
  }
  JsonFields fields() const { return {root, where}; }
};

Json kinds_json(const std::vector<PlacedKind>& kinds) {
  Json json = Json::array();
  for (const PlacedKind& kind : kinds) {
    json.push_back({{"name", kind.name}, {"bank", kind.source}, {"mixers", kind.digest}});
  }
  return json;
}

}  // namespace

void check_placement_path(const std::filesystem::path& path, const char* what) {
  if (std::filesystem::exists(path)) {
    expect(std::filesystem::is_regular_file(path), "{} is not a file; choose another output",
           path.string());
    const OurFile ours(path, what);
  }
  const AtomicFile writable(path.string());
}

PlacementTrace::PlacementTrace(Fingerprint question, std::vector<std::string> kinds, size_t layers,
                               std::filesystem::path path, bool fresh)
    : question_(std::move(question)),
      kinds_(std::move(kinds)),
      layers_(layers),
      path_(std::move(path)) {
  if (path_.empty()) {
    return;
  }
  check_placement_path(path_, kTraceFile);
  if (std::filesystem::exists(path_) && !fresh) {
    read();
  }
  save();
}

void PlacementTrace::read() {
  const OurFile file(path_, kTraceFile);
  const JsonFields json = file.fields();
  const Fingerprint stored = json.texts_by_name("fingerprint");
  expect(stored == question_,
         "{} holds placements of another question:{}\nwrite to another file, or start anew with "
         "--fresh",
         path_.string(), differences(stored, question_));
  for (const JsonFields& entry : json.objects("costs")) {
    LayerCosts costs = read_costs(entry);
    expect(costs.kinds == kinds_ && costs.layers.size() == layers_,
           "{}: expected costs of {} kinds in {} layers", entry.where(), kinds_.size(), layers_);
    costs_.push_back(std::move(costs));
  }
  for (const JsonFields& entry : json.objects("evaluations")) {
    Choices choices =
        parse_placement(entry.text("placement"), layers_, kinds_.size(), entry.where());
    expect(places_.emplace(choices, entries_.size()).second, "{}: {} stands there twice",
           entry.where(), entry.text("placement"));
    entries_.push_back({std::move(choices), read_measured(entry), entry.real("seconds")});
  }
}

void PlacementTrace::save() const {
  if (path_.empty()) {
    return;
  }
  Json json{{"file", kTraceFile},
            {"fingerprint", question_},
            {"costs", Json::array()},
            {"evaluations", Json::array()}};
  for (const LayerCosts& costs : costs_) {
    json["costs"].push_back(costs_json(costs));
  }
  for (const Entry& entry : entries_) {
    Json row{{"placement", placement_text(entry.choices)}};
    row.update(measured_json(entry.value));
    row["seconds"] = entry.seconds;
    json["evaluations"].push_back(std::move(row));
  }
  write_sealed(path_, json.dump(1) + "\n");
}

const Measured* PlacementTrace::find(const Choices& choices) const {
  const auto it = places_.find(choices);
  return it == places_.end() ? nullptr : &entries_[it->second].value;
}

void PlacementTrace::add(const Choices& choices, const Measured& value, double seconds) {
  CAMBIUM_CHECK(places_.emplace(choices, entries_.size()).second);
  entries_.push_back({choices, value, seconds});
  save();
}

const LayerCosts* PlacementTrace::find_costs(CostKind kind, const Fingerprint& question) const {
  for (const LayerCosts& costs : costs_) {
    if (costs.kind == kind && costs.question == question) {
      return &costs;
    }
  }
  return nullptr;
}

void PlacementTrace::add(LayerCosts costs) {
  costs_.push_back(std::move(costs));
  save();
}

void write_placement(const ChosenPlacement& p, const std::filesystem::path& path) {
  Json json{{"file", kPlacementFile},
            {"teacher", p.teacher},
            {"map", p.map},
            {"kinds", kinds_json(p.kinds)},
            {"open_layers", p.layers},
            {"placement", placement_text(p.choices)},
            {"layers", Json::array()}};
  for (size_t i = 0; i < p.layers.size(); ++i) {
    json["layers"].push_back(
        {{"layer", p.layers[i]}, {"mixer", p.kinds[static_cast<size_t>(p.choices[i])].name}});
  }
  const double whole = p.costs.teacher();
  json["metric"] = p.metric;
  json["measured"] = measured_json(p.measured);
  json["measured"]["on"] = p.chosen_on;
  json["reported"] = measured_json(p.reported);
  json["reported"]["on"] = p.reported_on;
  json["predicted"] = measured_json(p.search.predicted);
  json["cost"] = {{"value", p.costs.of(p.choices)},
                  {"teacher", whole},
                  {"share", p.costs.of(p.choices) / whole},
                  {"budget", p.budget},
                  {"measured", costs_json(p.costs)}};
  json["options"] = p.options;
  json["command"] = p.command;
  json["surrogate"] = {
      {"scale", p.search.log_scale ? "log" : "plain"},
      {"single", p.search.strengths.single},
      {"pair", p.search.strengths.pair},
      {"noise", p.search.strengths.noise},
      {"rank_left_out", std::isfinite(p.search.rank) ? Json(p.search.rank) : Json(nullptr)}};
  json["compared"] = Json::array();
  for (const ComparedPlacement& c : p.compared) {
    Json row{{"name", c.name},
             {"placement", placement_text(c.choices)},
             {"share", std::isfinite(c.cost) ? Json(c.cost) : Json(nullptr)}};
    row.update(measured_json(c.value));
    row["behind"] = measured_json(c.behind);
    json["compared"].push_back(std::move(row));
  }
  json["front"] = Json::array();
  for (const Optimum& optimum : p.search.front) {
    json["front"].push_back({{"placement", placement_text(optimum.choices)},
                             {"share", (p.costs.rest + optimum.cost) / whole},
                             {"predicted", optimum.value}});
  }
  json["evaluations"] = Json::array();
  for (const SearchStep& step : p.search.steps) {
    Json row{{"placement", placement_text(step.choices)}, {"by", step.by}};
    row.update(measured_json(step.value));
    row["predicted"] = std::isfinite(step.predicted) ? Json(step.predicted) : Json(nullptr);
    row["share"] = p.costs.of(step.choices) / whole;
    json["evaluations"].push_back(std::move(row));
  }
  write_sealed(path, json.dump(1) + "\n");
}

PlacementRecipe read_placement(const std::filesystem::path& path) {
  const OurFile file(path, kPlacementFile);
  const JsonFields json = file.fields();
  PlacementRecipe recipe;
  recipe.teacher = json.text("teacher");
  recipe.layers = json.wholes("open_layers", 0, kMaxLayers - 1);
  for (const JsonFields& kind : json.objects("kinds")) {
    recipe.kinds.push_back({kind.text("name"), kind.text("bank"), kind.text("mixers")});
  }
  expect(!recipe.kinds.empty() && recipe.kinds.front().name == kAttentionKind,
         "{}: expected {} as the first kind", path.string(), kAttentionKind);
  recipe.choices = parse_placement(json.text("placement"), recipe.layers.size(),
                                   recipe.kinds.size(), path.string());
  return recipe;
}

std::pair<std::string, std::string> parse_bank(const std::string& text) {
  const size_t at = text.find('=');
  expect(at != std::string::npos && at > 0 && at + 1 < text.size(),
         "--bank: expected KIND=DIR, a name and the folder of a converted model, got '{}'", text);
  return {text.substr(0, at), text.substr(at + 1)};
}

MixerBank bank_for(const PlacementRecipe& recipe, LoadedModel& teacher,
                   const std::vector<std::string>& given, const std::string& where) {
  expect(model_digest(*teacher.model) == recipe.teacher,
         "{} was searched for another teacher: its configuration or weights differ", where);
  std::map<std::string, std::string> folders;
  for (const std::string& text : given) {
    const std::pair<std::string, std::string> bank = parse_bank(text);
    expect(std::any_of(recipe.kinds.begin(), recipe.kinds.end(),
                       [&](const PlacedKind& k) { return k.name == bank.first; }),
           "--bank {}: {} places no such kind", text, where);
    folders.insert_or_assign(bank.first, bank.second);
  }
  MixerBank bank(*teacher.model);
  expect(bank.layers() == recipe.layers, "{}: its open layers are not the teacher's", where);
  for (size_t k = 1; k < recipe.kinds.size(); ++k) {
    const PlacedKind& kind = recipe.kinds[k];
    const auto it = folders.find(kind.name);
    const std::string& dir = it == folders.end() ? kind.source : it->second;
    bank.add(kind.name, load_bank(teacher, dir), dir);
    expect(bank.digest(static_cast<int>(k)) == kind.digest,
           "bank {}={}: its mixers are not those that {} was searched with", kind.name,
           bank.source(static_cast<int>(k)), where);
  }
  for (size_t i = 0; i < recipe.choices.size(); ++i) {
    expect(bank.has(static_cast<int64_t>(i), recipe.choices[i]),
           "{}: layer {} is to have {}, which its bank has not there", where, recipe.layers[i],
           recipe.kinds[static_cast<size_t>(recipe.choices[i])].name);
  }
  return bank;
}

}  // namespace cambium
