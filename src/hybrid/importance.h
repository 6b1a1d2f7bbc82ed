// How much a model needs each layer's attention.
//
// Leave-one-out: what is lost when the mixer, or the whole layer, is taken out, without any
// training. MMR (mixer replacement, Apriel-H1): swap the layer alone, distil for a few steps, read
// the loss. It asks what heals, where leave-one-out asks what hurts, and is run again on each
// hybrid.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "model/model.h"

namespace cambium {

enum class ScoreMethod { kLeaveMixerOut, kLeaveBlockOut, kMixerReplacement };
const char* score_method_name(ScoreMethod method);
/// Of "leave-mixer-out", "leave-block-out", "mmr"; Error with the nearest otherwise.
ScoreMethod parse_score_method(const std::string& name);

struct LayerScore {
  int64_t layer = 0;
  /// Larger = the layer's attention is needed more.
  double score = 0.0;
  double seconds = 0.0;
};

struct Importance {
  std::string method;
  std::string metric;
  /// What was scored: model, data and settings, in the caller's words. Results of another do not
  /// mix.
  std::string fingerprint;
  std::vector<LayerScore> layers;  // in layer order

  /// Layers by score, the least needed first; equal scores by layer.
  std::vector<int64_t> order() const;
};

Importance read_importance(const std::filesystem::path& path);
void write_importance(const Importance& importance, const std::filesystem::path& path);

/// Scores `layers` one after another with `score(layer)`. With a path, the results so far are
/// written after each layer, and layers an earlier run with the same fingerprint has scored are
/// taken from it. `progress` is told how many are done.
Importance score_layers(const std::vector<int64_t>& layers, Importance start,
                        const std::function<double(int64_t layer)>& score,
                        const std::filesystem::path& path,
                        const std::function<void(int64_t done)>& progress);

/// Layers of `spec` that still have attention.
std::vector<int64_t> attention_layers(const ModelSpec& spec);

}  // namespace cambium
