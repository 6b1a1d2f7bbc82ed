#include "hybrid/importance.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/text.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

const std::vector<std::string>& method_names() {
  static const std::vector<std::string> names = {"leave-mixer-out", "leave-block-out", "mmr"};
  return names;
}

}  // namespace

const char* score_method_name(ScoreMethod method) {
  return method_names()[static_cast<size_t>(method)].c_str();
}

ScoreMethod parse_score_method(const std::string& name) {
  for (size_t i = 0; i < method_names().size(); ++i) {
    if (method_names()[i] == name) {
      return static_cast<ScoreMethod>(i);
    }
  }
  fail("unknown score method '{}'{}; known: {}", name, did_you_mean(name, method_names()),
       join(method_names(), ", "));
}

std::vector<int64_t> Importance::order() const {
  std::vector<LayerScore> sorted = layers;
  std::stable_sort(sorted.begin(), sorted.end(), [](const LayerScore& a, const LayerScore& b) {
    return a.score != b.score ? a.score < b.score : a.layer < b.layer;
  });
  std::vector<int64_t> order;
  for (const LayerScore& s : sorted) {
    order.push_back(s.layer);
  }
  return order;
}

Importance read_importance(const std::filesystem::path& path) {
  const std::string text = read_text_file(path.string());
  try {
    const Json json = Json::parse(text);
    Importance importance{json.at("method"), json.at("metric"), json.at("fingerprint"), {}};
    for (const Json& entry : json.at("layers")) {
      importance.layers.push_back({entry.at("layer"), entry.at("score"), entry.at("seconds")});
    }
    return importance;
  } catch (const nlohmann::json::exception& e) {
    fail("{}: expected the layer scores that `cambium score` writes: {}", path.string(), e.what());
  }
}

void write_importance(const Importance& importance, const std::filesystem::path& path) {
  Json json;
  json["method"] = importance.method;
  json["metric"] = importance.metric;
  json["fingerprint"] = importance.fingerprint;
  json["layers"] = Json::array();
  for (const LayerScore& s : importance.layers) {
    json["layers"].push_back({{"layer", s.layer}, {"score", s.score}, {"seconds", s.seconds}});
  }
  json["order"] = importance.order();
  write_file_atomically(path.string(), json.dump(1) + "\n");
}

Importance score_layers(const std::vector<int64_t>& layers, Importance start,
                        const std::function<double(int64_t layer)>& score,
                        const std::filesystem::path& path,
                        const std::function<void(int64_t done)>& progress) {
  std::vector<LayerScore> known;
  if (!path.empty() && std::filesystem::exists(path)) {
    const Importance earlier = read_importance(path);
    if (earlier.fingerprint == start.fingerprint && earlier.method == start.method) {
      known = earlier.layers;
    }
  }
  for (const int64_t layer : layers) {
    const auto it = std::find_if(known.begin(), known.end(),
                                 [&](const LayerScore& s) { return s.layer == layer; });
    if (it != known.end()) {
      start.layers.push_back(*it);
    } else {
      const auto begin = std::chrono::steady_clock::now();
      const double value = score(layer);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      start.layers.push_back({layer, value, taken.count()});
      if (!path.empty()) {
        write_importance(start, path);
      }
    }
    if (progress) {
      progress(static_cast<int64_t>(start.layers.size()));
    }
  }
  return start;
}

std::vector<int64_t> attention_layers(const ModelSpec& spec) {
  std::vector<int64_t> layers;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (spec.layers[i].mixes_by("attention")) {
      layers.push_back(static_cast<int64_t>(i));
    }
  }
  return layers;
}

}  // namespace cambium
