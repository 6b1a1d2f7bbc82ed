// Training of a supernet: each step draws which mixer of every choice runs (model/supernet.h), from
// the seed and the step's number alone, so that runs that are resumed, and every rank of one, draw
// the same. Uniform draws are those of Super Apriel (arXiv 2604.19877); so are random compositions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/fields.h"
#include "model/supernet.h"

namespace cambium {

enum class PlacementSampling {
  kNone,         // the student is no supernet
  kUniform,      // each layer draws among its mixers
  kWeighted,     // the same, by weights of the mixers
  kComposition,  // how many layers each mixer gets, every way to divide them equally likely, then
                 // which they are
  kPresets,      // one of the presets
};

struct SupernetConfig {
  PlacementSampling sampling = PlacementSampling::kNone;
  /// Of kWeighted: "LABEL=NUMBER"; 1 for a mixer that is not named.
  std::vector<std::string> weights;
};

void visit_fields(SupernetConfig& config, FieldVisitor& visit);

class PlacementSampler {
 public:
  /// Error where the supernet and the configuration do not go together.
  PlacementSampler(const ModelSpec& supernet, const SupernetConfig& config, uint64_t seed);
  /// What runs in step `step`.
  ActiveUnits draw(int64_t step) const;

 private:
  PlacementSampling sampling_;
  uint64_t seed_;
  std::vector<std::string> labels_;
  std::vector<std::vector<int>> units_;  // of each layer, by label: the unit; -1 where it has none
  std::vector<double> weights_;          // by label
  std::vector<ActiveUnits> presets_;
};

}  // namespace cambium
