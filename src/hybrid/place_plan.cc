#include "hybrid/place_plan.h"

#include <algorithm>
#include <limits>
#include <set>

#include "hybrid/scoring.h"

namespace cambium {
namespace {

// Bounds that no run meets and that keep products of them far from the end of int64_t.
constexpr int64_t kMaxCount = 100'000'000;
constexpr int64_t kMaxTokens = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1'000'000;

// The keys of a search, and among them those that say what a budget is of.
const std::set<std::string>& search_keys() {
  static const std::set<std::string> keys = {
      "mixers",  "evaluations", "reach",    "beam",    "budget",
      "speedup", "budget_cost", "at_least", "at_most", "none_or_at_least"};
  return keys;
}

const std::set<std::string>& cost_keys() {
  static const std::set<std::string> keys = {"cost", "context", "batch", "repeats", "cache"};
  return keys;
}

}  // namespace

void visit_fields(PlacePlan& p, FieldVisitor& visit) {
  visit({"method", "how the layers to convert are chosen"}, p.method,
        {"leave-mixer-out", "leave-block-out", "window-swap", "restore-one", "gates", "mmr",
         "search", "uniform", "list"});
  visit({"metric", "of what measures: all but mmr, gates, uniform and list"}, p.metric,
        {"reverse-kl", "nll", "accuracy", "retrieval"});
  visit({"data", "documents that choose, the teacher's traces for example; [data] valid's else"},
        p.data);
  visit({"documents", "documents that are measured; none of those that are reported"}, p.documents,
        ints_from(1, kMaxCount));
  visit({"problems", "accuracy and retrieval: asked, none of the reported; 0 = as many"},
        p.problems, ints_from(0, kMaxCount));
  visit({"max_new_tokens", "accuracy and retrieval: tokens of an answer; 0 = as [evaluate] says"},
        p.max_new_tokens, ints_from(0, kMaxTokens));
  visit({"window", "window-swap: tokens; 0 = 128"}, p.window, ints_from(0, 1 << 30));
  visit({"sinks", "window-swap: first tokens that stay visible"}, p.sinks, ints_from(0, 1 << 30));
  visit({"price", "gates: highest price of attention in all layers, nats a token"}, p.price,
        reals_above(0.0, 1e6));
  visit({"retrieval_share", "gates: of generated retrieval among documents"}, p.retrieval_share,
        reals_from(0.0, 1.0));
  visit({"retrieval_chars", "gates: longest text of it; 0 = 600"}, p.retrieval_chars,
        ints_from(0, kMaxCount));
  visit({"mixers", "search: what a layer may get beside attention and the stage's mixer"},
        p.mixers);
  visit({"evaluations", "search: placements measured"}, p.evaluations, ints_from(4, kMaxCount));
  visit({"reach", "search: layers apart that may act on each other"}, p.reach, ints_from(0, 8));
  visit({"beam", "search: width of the check by beam search; 0 = none"}, p.beam,
        ints_from(0, 1000));
  visit({"budget", "search: share of the cost of the model it starts from"}, p.budget,
        reals_from(0.0, 1.0));
  visit({"speedup", "search: the same as its inverse"}, p.speedup, reals_from(0.0, 1e6));
  visit({"budget_cost", "search: in the cost's unit, ms or bytes of a sequence"}, p.budget_cost,
        reals_from(0.0, 1e18));
  visit({"cost", "search: what is budgeted, measured on the run's device"}, p.cost.kind,
        {{"decode", CostKind::kDecode},
         {"prefill", CostKind::kPrefill},
         {"cache", CostKind::kCache}});
  visit({"context", "search: tokens at which it is measured"}, p.cost.context,
        ints_from(1, kMaxTokens));
  visit({"batch", "search: sequences at once, of times"}, p.cost.batch, ints_from(1, 4096));
  visit({"repeats", "search: rounds of timing"}, p.cost.repeats, ints_from(1, 10'000));
  visit({"cache", "search: how keys and values are kept"}, p.cost.values,
        {{"bf16", Dtype::kBF16}, {"f32", Dtype::kF32}, {"f8", Dtype::kF8E4M3}});
  visit({"at_most", "search: [\"KIND=LAYERS\"], such as attention=4"}, p.at_most);
  visit({"at_least", "search: the same from below"}, p.at_least);
  visit({"none_or_at_least", "search: the same where there are any"}, p.none_or_at_least);
  visit({"list", "method list: the layers"}, p.list, ints_from(0, kMaxLayers));
}

PlacePlan read_place(const PlanTable& table, PlacePlan place, const TrainConfig& plain) {
  const bool gates = place.method == "gates";
  read_fields(place, table);
  if ((place.method == "gates") != gates) {
    place.probe = gates ? plain : gate_probe(plain.seed);
  }
  place.probe = read_train_config(table.table("probe"), place.probe, true);
  const std::string where = table.where();
  expect((place.budget > 0.0) + (place.speedup > 0.0) + (place.budget_cost > 0.0) <= 1,
         "{}: expected one of 'budget', 'speedup' and 'budget_cost'", where);
  expect(place.speedup == 0.0 || place.speedup >= 1.0,
         "{}: expected a 'speedup' of at least 1, got {}", where, place.speedup);
  return place;
}

bool place_uses(const PlacePlan& place, const std::string& key) {
  const bool search = place.method == "search";
  const bool cached = place.cost.kind == CostKind::kCache;
  return key == "method"                                   ? true
         : key == "list"                                   ? place.method == "list"
         : key == "probe"                                  ? place.trains()
         : key == "problems" || key == "max_new_tokens"    ? place.asks()
         : key == "window" || key == "sinks"               ? place.method == "window-swap"
         : key == "price" || key.starts_with("retrieval_") ? place.method == "gates"
         : search_keys().contains(key)                     ? search
         : cost_keys().contains(key)
             ? search && place.has_budget() && !(cached && (key == "batch" || key == "repeats"))
             : place.measures();
}

ChoiceOptions PlacePlan::choice() const {
  ChoiceOptions o;
  o.metric = metric;
  // With a number of layers alone each placement costs what the others do.
  o.cost = has_budget() ? cost : CostConfig{};
  o.share = speedup > 0.0 ? 1.0 / speedup : budget;
  o.budget = has_budget() ? budget_cost : std::numeric_limits<double>::infinity();
  o.at_least = parse_layer_counts("at_least", at_least);
  o.at_most = parse_layer_counts("at_most", at_most);
  o.none_or_at_least = parse_layer_counts("none_or_at_least", none_or_at_least);
  o.evaluations = evaluations;
  o.reach = reach;
  o.beam = beam;
  return o;
}

}  // namespace cambium
