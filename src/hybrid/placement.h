// Which layers get the new mixer.
#pragma once

#include <cstdint>
#include <vector>

#include "hybrid/measure.h"
#include "serve/cache_plan.h"

namespace cambium {

/// The `count` layers of lowest score, in layer order. Error when fewer were scored. Scoring what
/// is left after each stage with MMR and taking the lowest few is the H1 way of growing a hybrid.
std::vector<int64_t> place_lowest(const Importance& importance, int64_t count);

/// `count` of the layers that still have attention, spread evenly over the depth of the model.
std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count);

/// How many more layers must be converted until `fraction` of all layers are (rounded to nearest);
/// without the teacher, as if it had nothing but attention.
int64_t layers_to_convert(const ModelSpec& spec, double fraction,
                          const ModelSpec* teacher = nullptr);

/// How many of the attention layers must go until the cache, its keys and values kept as `values`,
/// takes at most this many bytes a token for as long as a sequence lives.
int64_t layers_for_cache_budget(const ModelSpec& spec, int64_t bytes_per_token,
                                Dtype values = CacheConfig{}.values);

/// The `count` lowest of a file of `cambium score`. Error when it is unfinished, or its scores are
/// of a model with other layers than `spec`.
std::vector<int64_t> place_by_file(const std::filesystem::path& scores, const ModelSpec& spec,
                                   int64_t count);

/// Which layers a stage of a plan converts, and how the report tells of it.
struct Placement {
  std::vector<int64_t> layers;
  std::vector<size_t> kinds;  // of each layer: which of the stage's kinds() it gets
  ImportanceSummary shown;    // without a metric where nothing was scored

  /// The layers that get a kind.
  std::vector<int64_t> of(size_t kind) const;
};

/// Chooses `count` of the layers of `base`, as the stage says (kAnyLayers: as many as its search
/// takes); scores are kept in `folder`/scores.json, what a search measured in search.json and what
/// it chose, costs and budget with it, in chosen.json. Probes and trials begin at `first_sample` of
/// the data.
Placement place_stage(const HybridPlan& plan, const StagePlan& stage, int64_t count, Model& base,
                      Model& teacher, const RunData& data, uint64_t first_sample,
                      const std::filesystem::path& folder);

/// `folder`/placement.json, by which a stage that was stopped goes on and a finished one is told
/// of. `map` is the hybrid's.
void keep_placement(const Placement& placement, const StagePlan& stage, const std::string& map,
                    const std::filesystem::path& folder);
Placement kept_placement(const StagePlan& stage, const ModelSpec& teacher,
                         const std::filesystem::path& folder);

}  // namespace cambium
