// What a plan says of the choice of layers: [place], of the plan and of a stage.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/fields.h"
#include "hybrid/placement_choice.h"
#include "train/train_plan.h"

namespace cambium {

struct PlacePlan {
  /// leave-mixer-out, leave-block-out, window-swap, restore-one, gates, mmr, search, uniform, or
  /// list.
  std::string method = "leave-mixer-out";
  std::string metric = "reverse-kl";  // or nll, accuracy, retrieval
  std::string data;                   // documents that choose; empty = of [data] valid
  int64_t documents = 32;             // that choose
  int64_t problems = 0;               // accuracy, retrieval; 0 = as many as are reported
  int64_t max_new_tokens = 0;         // of their answers; 0 = as in the evaluation
  TrainConfig probe;                  // mmr, gates
  std::vector<int64_t> list;

  int64_t window = 0, sinks = 0;  // window-swap; no window = the graft's usual one
  double price = 10.0;            // gates, as RelaxationConfig's
  double retrieval_share = 0.5;   // gates: of generated retrieval among the documents
  int64_t retrieval_chars = 0;    // gates: its longest text; 0 = the usual ones

  /// search: mixers that a layer may get beside attention and the stage's own.
  std::vector<std::string> mixers;
  int64_t evaluations = 200, reach = 1, beam = 4;
  CostConfig cost{.kind = CostKind::kDecode};
  /// What a model may cost, at most one of them: a share of what the model the stage starts from
  /// costs, its inverse, or a cost in its unit. None: the number of layers is all the budget.
  double budget = 0.0, speedup = 0.0, budget_cost = 0.0;
  std::vector<std::string> at_least, at_most, none_or_at_least;  // "KIND=LAYERS"

  /// Layers have scores.
  bool scores() const { return measures_layers() || trains(); }
  /// Trains to score, on training documents.
  bool trains() const { return method == "mmr" || method == "gates"; }
  /// Measures models on documents or problems that choose.
  bool measures() const { return measures_layers() || method == "search"; }
  bool asks() const { return measures() && metric_asks(metric); }
  /// Compares with a trial in which all attention that is left is converted and aligned.
  bool tries() const { return method == "search" || method == "restore-one" || method == "gates"; }
  bool has_budget() const { return budget > 0.0 || speedup > 0.0 || budget_cost > 0.0; }
  /// A search that may leave any number of layers as they are: something else bounds it.
  bool bounds_layers() const { return has_budget() || !at_most.empty(); }
  /// What a search takes of it.
  ChoiceOptions choice() const;

 private:
  bool measures_layers() const {
    return method.starts_with("leave") || method == "window-swap" || method == "restore-one";
  }
};

void visit_fields(PlacePlan& place, FieldVisitor& visit);

/// The table over `place`, what the tables around it say. `plain` is what probes train by where
/// nothing else is said; one that `place` has for another method does not come along.
PlacePlan read_place(const PlanTable& table, PlacePlan place, const TrainConfig& plain);

/// Whether a key of [place] says anything there.
bool place_uses(const PlacePlan& place, const std::string& key);

}  // namespace cambium
