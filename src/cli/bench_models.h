// What the kinds of bench share: which models, how they are kept, and what the machine can do.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/options.h"
#include "eval/step_cost.h"
#include "model/weights.h"

namespace cambium {

struct ModelsOption {
  std::vector<std::string> models, presets, random;
  std::string storage = "stored";
  CacheOption cache;
  DeviceOption device;
  bool json = false;

  void declare(Args& args);
  /// How many there are; Error where there is none.
  size_t count() const;
  const std::string& path(size_t i) const;
  /// Of the supernet at path(i); empty = none.
  const std::string& preset(size_t i) const;
  std::string name(size_t i) const;
  LoadedModel load(size_t i) const;

 private:
  size_t stored() const { return models.size() * std::max<size_t>(presets.size(), 1); }
};

/// Says so where a model's logits were not numbers: what was measured may then not be what a sound
/// model takes.
void note_unless_finite(const std::string& model, bool finite);

nlohmann::ordered_json limits_json(const MachineLimits& limits);
void print_limits(const std::string& model, const MachineLimits& limits);

}  // namespace cambium
