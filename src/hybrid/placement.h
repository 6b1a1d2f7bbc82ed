// Which layers get the new mixer.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "hybrid/measure.h"
#include "serve/cache_plan.h"

namespace cambium {

/// The `count` layers of lowest score, in layer order. Error when fewer were scored. Scoring what
/// is left after each stage with MMR and taking the lowest few is the H1 way of growing a hybrid.
std::vector<int64_t> place_lowest(const Importance& importance, int64_t count);

/// `count` of the layers that still have attention, spread evenly over the depth of the model.
std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count);

/// Chooses `count` of layers, which are in order; Error where there are fewer.
using LayerChooser =
    std::function<std::vector<int64_t>(const std::vector<int64_t>& layers, int64_t count)>;
std::vector<int64_t> spread_evenly(const std::vector<int64_t>& layers, int64_t count);
/// By score, as place_lowest.
LayerChooser lowest_of(Importance importance);

/// The layers that have a mixer, or had one that was removed.
int64_t layers_with_mixer(const ModelSpec& spec);
/// How many more layers must be converted until `fraction` of those with a mixer are (rounded to
/// nearest), as if the teacher had nothing but attention.
int64_t layers_to_convert(const ModelSpec& spec, double fraction);

/// The fewest attention layers that `choose` names whose conversion makes the cache, its keys and
/// values kept as `values`, take at most this many bytes a token for as long as a sequence lives.
/// It chooses among the layers that take some: those behind a window do not. Error where it cannot
/// be.
std::vector<int64_t> place_for_cache(const ModelSpec& spec, int64_t bytes_per_token, Dtype values,
                                     const LayerChooser& choose);

/// What a file of `cambium score` says. Error when it is unfinished, or its scores are of a model
/// with other layers than `spec`.
Importance importance_of(const std::filesystem::path& scores, const ModelSpec& spec);

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
