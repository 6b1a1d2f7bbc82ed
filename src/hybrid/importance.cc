#include "hybrid/importance.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "base/text.h"
#include "hybrid/sealed.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

Importance parse_importance(const JsonFields& json, bool old_fingerprint) {
  Importance importance{json.text("method"), json.text("metric"), {}, {}};
  if (old_fingerprint) {
    importance.fingerprint["written by"] = "an earlier version, which did not say what was scored";
  } else {
    importance.fingerprint = json.texts_by_name("fingerprint");
  }
  for (const JsonFields& entry : json.objects("layers")) {
    importance.layers.push_back({entry.whole("layer", 0, kMaxLayers), entry.real("score"),
                                 entry.real("seconds"),
                                 entry.has("tie") ? entry.real("tie") : 0.0});
  }
  if (json.has("partial")) {
    for (const JsonFields& entry : json.objects("partial")) {
      PartialScore p;
      p.layer = entry.whole("layer", 0, kMaxLayers);
      p.groups = entry.whole("groups");
      p.sums.tokens = entry.whole("tokens");
      p.sums.cross_entropy = entry.real("cross_entropy");
      p.sums.reverse_kl = entry.real("reverse_kl");
      p.seconds = entry.real("seconds");
      importance.partial.push_back(p);
    }
  }
  if (json.has("gates")) {
    const JsonFields gates = json.object("gates");
    PartialGates& g = importance.gates;
    g.steps = gates.whole("steps");
    g.next_sample = gates.unsigned_whole("next_sample");
    g.logits = gates.reals("logits");
    g.first = gates.reals("first");
    g.second = gates.reals("second");
    g.sums = gates.reals("sums");
    g.seconds = gates.real("seconds");
  }
  if (json.has("unscored")) {
    importance.unscored = json.wholes("unscored", 0, kMaxLayers);
  }
  return importance;
}

}  // namespace

std::string differences(const Fingerprint& stored, const Fingerprint& ours) {
  std::string text;
  Fingerprint all = stored;
  all.insert(ours.begin(), ours.end());
  for (const auto& [name, ignored] : all) {
    const auto a = stored.find(name);
    const auto b = ours.find(name);
    const std::string before = a == stored.end() ? "(nothing)" : a->second;
    const std::string now = b == ours.end() ? "(nothing)" : b->second;
    if (before != now) {
      text += fmt::format("\n  {}: {} in the file, {} now", name, before, now);
    }
  }
  return text;
}

const std::vector<std::string>& score_method_names() {
  static const std::vector<std::string> names = {"leave-mixer-out", "leave-block-out", "mmr",
                                                 "window-swap",     "restore-one",     "gates"};
  return names;
}

const char* score_method_name(ScoreMethod method) {
  return score_method_names()[static_cast<size_t>(method)].c_str();
}

ScoreMethod parse_score_method(const std::string& name) {
  for (size_t i = 0; i < score_method_names().size(); ++i) {
    if (score_method_names()[i] == name) {
      return static_cast<ScoreMethod>(i);
    }
  }
  fail("unknown score method '{}'{}; known: {}", name, did_you_mean(name, score_method_names()),
       join(score_method_names(), ", "));
}

std::string score_heading(const std::string& metric) {
  return metric == "accuracy" || metric == "retrieval" ? "wrong answers, share of the problems"
         : metric == "nll"                             ? "negative log-likelihood, nats a token"
         : metric == "reverse-kl"                      ? "reverse KL, nats a token"
                                                       : metric;
}

std::vector<int64_t> Importance::order() const {
  std::vector<LayerScore> sorted = layers;
  std::stable_sort(sorted.begin(), sorted.end(), [](const LayerScore& a, const LayerScore& b) {
    return std::tie(a.score, a.tie, a.layer) < std::tie(b.score, b.tie, b.layer);
  });
  std::vector<int64_t> order;
  for (const LayerScore& s : sorted) {
    order.push_back(s.layer);
  }
  return order;
}

Importance read_importance(const std::filesystem::path& path) {
  std::string text = read_text_file(path.string());
  if (is_sealed(text)) {
    text = unseal(text, path.string());
  }
  const auto root = parse_json<nlohmann::json>(text, path.string());
  const JsonFields json(root,
                        path.string() + ": expected the layer scores that `cambium score` writes");
  Importance importance =
      parse_importance(json, root.contains("fingerprint") && root["fingerprint"].is_string());
  std::set<int64_t> seen;
  for (const LayerScore& score : importance.layers) {
    expect(seen.insert(score.layer).second, "{}: layer {} has two scores", path.string(),
           score.layer);
  }
  return importance;
}

void write_importance(const Importance& importance, const std::filesystem::path& path) {
  Json json;
  json["method"] = importance.method;
  json["metric"] = importance.metric;
  json["fingerprint"] = importance.fingerprint;
  json["layers"] = Json::array();
  for (const LayerScore& s : importance.layers) {
    json["layers"].push_back(
        {{"layer", s.layer}, {"score", s.score}, {"tie", s.tie}, {"seconds", s.seconds}});
  }
  if (!importance.partial.empty()) {
    json["partial"] = Json::array();
    for (const PartialScore& p : importance.partial) {
      json["partial"].push_back({{"layer", p.layer},
                                 {"groups", p.groups},
                                 {"tokens", p.sums.tokens},
                                 {"cross_entropy", p.sums.cross_entropy},
                                 {"reverse_kl", p.sums.reverse_kl},
                                 {"seconds", p.seconds}});
    }
  }
  if (const PartialGates& g = importance.gates; !g.logits.empty()) {
    json["gates"] = {{"steps", g.steps},    {"next_sample", g.next_sample}, {"logits", g.logits},
                     {"first", g.first},    {"second", g.second},           {"sums", g.sums},
                     {"seconds", g.seconds}};
  }
  if (!importance.unscored.empty()) {
    json["unscored"] = importance.unscored;
  }
  json["order"] = importance.order();
  write_sealed(path, json.dump(1) + "\n");
}

void check_scores_path(const std::filesystem::path& path) {
  if (std::filesystem::exists(path)) {
    expect(std::filesystem::is_regular_file(path), "{} is not a file; choose another output",
           path.string());
    read_importance(path);
  }
  const AtomicFile writable(path.string());
}

ScoreFile::ScoreFile(Importance start, const std::vector<int64_t>& layers,
                     std::filesystem::path path, bool fresh)
    : scores_(std::move(start)), path_(std::move(path)) {
  if (!path_.empty()) {
    check_scores_path(path_);
    if (std::filesystem::exists(path_) && !fresh) {
      Importance earlier = read_importance(path_);
      Fingerprint stored = earlier.fingerprint;
      Fingerprint ours = scores_.fingerprint;
      stored.insert({{"method", earlier.method}, {"metric", earlier.metric}});
      ours.insert({{"method", scores_.method}, {"metric", scores_.metric}});
      expect(stored == ours,
             "{} holds scores of something else:{}\nwrite to another file, or start anew with "
             "--fresh",
             path_.string(), differences(stored, ours));
      scores_.layers = std::move(earlier.layers);
      scores_.partial = std::move(earlier.partial);
      scores_.gates = std::move(earlier.gates);
    }
  }
  const auto wanted = [&](int64_t layer) {
    return std::find(layers.begin(), layers.end(), layer) != layers.end();
  };
  std::erase_if(scores_.layers, [&](const LayerScore& s) { return !wanted(s.layer); });
  std::erase_if(scores_.partial, [&](const PartialScore& p) { return !wanted(p.layer); });
  for (const int64_t layer : layers) {
    if (!has(layer)) {
      scores_.unscored.push_back(layer);
    }
  }
  save();
}

bool ScoreFile::has(int64_t layer) const {
  return std::any_of(scores_.layers.begin(), scores_.layers.end(),
                     [&](const LayerScore& s) { return s.layer == layer; });
}

PartialScore& ScoreFile::partial(int64_t layer) {
  for (PartialScore& p : scores_.partial) {
    if (p.layer == layer) {
      return p;
    }
  }
  scores_.partial.push_back({layer, 0, {}, 0.0});
  return scores_.partial.back();
}

void ScoreFile::add(const LayerScore& score) {
  std::erase_if(scores_.partial, [&](const PartialScore& p) { return p.layer == score.layer; });
  std::erase(scores_.unscored, score.layer);
  scores_.layers.push_back(score);
  std::sort(scores_.layers.begin(), scores_.layers.end(),
            [](const LayerScore& a, const LayerScore& b) { return a.layer < b.layer; });
  if (scores_.unscored.empty()) {
    scores_.gates = {};
  }
  save();
}

void ScoreFile::save() const {
  if (!path_.empty()) {
    write_importance(scores_, path_);
  }
}

Importance score_layers(const std::vector<int64_t>& layers, Importance start,
                        const std::function<double(int64_t layer)>& score,
                        const std::filesystem::path& path,
                        const std::function<void(int64_t done)>& progress, bool fresh) {
  ScoreFile file(std::move(start), layers, path, fresh);
  int64_t done = 0;
  for (const int64_t layer : layers) {
    if (!file.has(layer)) {
      const auto begin = std::chrono::steady_clock::now();
      const double value = score(layer);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      file.add({layer, value, taken.count()});
    }
    if (progress) {
      progress(++done);
    }
  }
  return file.scores();
}

std::vector<int64_t> attention_layers(const ModelSpec& spec) {
  std::vector<int64_t> layers;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const UnitSpec* mixer = spec.layers[i].mixer();
    if (mixer != nullptr && is_attention(*mixer)) {
      layers.push_back(static_cast<int64_t>(i));
    }
  }
  return layers;
}

std::vector<int64_t> open_layers(const ModelSpec& spec) {
  std::vector<int64_t> layers = attention_layers(spec);
  std::set<std::string> kinds;
  for (const LayerSpec& layer : spec.layers) {
    for (const UnitSpec& mixer : layer.mixers()) {
      kinds.insert(mixer.kind);
    }
  }
  expect(!layers.empty(),
         "the model has no attention layer that could be replaced: its layers are {}, their mixers "
         "{}; choose a model that has attention",
         layer_map(spec), fmt::join(kinds, ", "));
  return layers;
}

}  // namespace cambium
