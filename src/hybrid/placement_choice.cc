#include "hybrid/placement_choice.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <set>

#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "hybrid/placement.h"
#include "hybrid/scoring.h"

namespace cambium {
namespace {

Fingerprint question_of(const MixerBank& bank, const std::string& metric, const std::string& data,
                        Model* teacher) {
  Fingerprint f;
  f["model"] = model_digest(bank.teacher());
  if (teacher != nullptr && metric == "reverse-kl") {
    f["teacher"] = model_digest(*teacher);
  }
  f["layers"] = layer_map(bank.teacher().spec());
  f["metric"] = metric;
  f["data"] = data;
  if (bank.teacher().activations() != Dtype::kF32) {
    f["precision"] = dtype_name(bank.teacher().activations());
  }
  for (size_t k = 1; k < bank.kinds().size(); ++k) {
    f[fmt::format("kind {} {}", k, bank.kinds()[k])] = bank.digest(static_cast<int>(k));
  }
  return f;
}

size_t kind_of(const MixerBank& bank, const std::string& name, const char* option) {
  const auto it = std::find(bank.kinds().begin(), bank.kinds().end(), name);
  expect(it != bank.kinds().end(), "{}: there is no kind '{}'{}; there are {}", option, name,
         did_you_mean(name, bank.kinds()), join(bank.kinds(), ", "));
  return static_cast<size_t>(it - bank.kinds().begin());
}

PlacementLimits limits_of(const MixerBank& bank, const ChoiceOptions& o, const LayerCosts& costs,
                          double budget) {
  const auto layers = static_cast<int64_t>(bank.layers().size());
  PlacementLimits limits{costs.layers, budget - costs.rest,
                         std::vector<int64_t>(bank.kinds().size(), 0),
                         std::vector<int64_t>(bank.kinds().size(), layers),
                         std::vector<int64_t>(bank.kinds().size(), 1)};
  for (const auto& [name, count] : o.at_least) {
    limits.at_least[kind_of(bank, name, "--at-least")] = count;
  }
  for (const auto& [name, count] : o.at_most) {
    limits.at_most[kind_of(bank, name, "--at-most")] = std::min(count, layers);
  }
  for (size_t kind = 0; kind < bank.kinds().size(); ++kind) {
    const auto offered = std::count_if(
        costs.layers.begin(), costs.layers.end(),
        [kind](const std::vector<double>& layer) { return std::isfinite(layer[kind]); });
    if (costs.slow_alone(kind) && offered > 1) {
      limits.none_or_at_least[kind] = 2;
    }
  }
  for (const auto& [name, count] : o.none_or_at_least) {
    limits.none_or_at_least[kind_of(bank, name, "--none-or-at-least")] = count;
  }
  return limits;
}

int64_t place_of(const MixerBank& bank, int64_t layer) {
  return std::find(bank.layers().begin(), bank.layers().end(), layer) - bank.layers().begin();
}

/// A placement that a simpler rule chooses.
struct Rule {
  std::string name;
  Choices choices;
};

std::vector<Rule> simpler_rules(const MixerBank& bank, const ChoiceOptions& o,
                                const LayerCosts& costs, double budget, const Choices& chosen) {
  std::vector<Rule> rules;
  const auto layers = static_cast<int64_t>(bank.layers().size());
  for (int kind = 1; kind < static_cast<int>(bank.kinds().size()); ++kind) {
    const std::string& name = bank.kinds()[static_cast<size_t>(kind)];
    for (int64_t count = 0; count <= layers; ++count) {
      Choices even(static_cast<size_t>(layers), 0);
      for (const int64_t layer : place_uniform(bank.teacher().spec(), count)) {
        const int64_t place = place_of(bank, layer);
        even[static_cast<size_t>(place)] = bank.has(place, kind) ? kind : 0;
      }
      if (costs.of(even) <= budget * (1 + 1e-9)) {
        rules.push_back({"even, " + name, std::move(even)});
        break;
      }
    }
    for (const std::filesystem::path& file : o.scores) {
      const Importance importance = importance_of(file, bank.teacher().spec());
      std::vector<int64_t> order;
      for (const int64_t layer : importance.order()) {
        order.push_back(place_of(bank, layer));
      }
      if (auto choices = first_within(costs, budget, kind, order)) {
        rules.push_back({fmt::format("{} ({}), {}", file.stem().string(), importance.method, name),
                         std::move(*choices)});
      }
    }
    Choices same = chosen;
    for (size_t i = 0; i < same.size(); ++i) {
      same[i] = same[i] != 0 && bank.has(static_cast<int64_t>(i), kind) ? kind : same[i];
    }
    if (same != chosen) {
      rules.push_back({"its attention, the rest " + name, std::move(same)});
    }
  }
  return rules;
}

bool offers_windows(const MixerBank& bank) {
  for (int kind = 1; kind < static_cast<int>(bank.kinds().size()); ++kind) {
    const ModelSpec spec = bank.spec(bank.all(kind));
    for (size_t i = 0; i < bank.layers().size(); ++i) {
      const UnitSpec& mixer = *spec.layers[static_cast<size_t>(bank.layers()[i])].mixer();
      if (bank.has(static_cast<int64_t>(i), kind)) {
        if (mixer.options.integer(mixer.kind, "window", 0) > 0) {
          return true;
        }
        break;
      }
    }
  }
  return false;
}

// Windows cost no training: what other kinds have to beat with the same layers kept, whether the
// search could choose them or not.
std::optional<LoadedModel> untrained_windows(const MixerBank& bank, const Choices& chosen,
                                             int64_t window, int64_t sinks) {
  std::vector<int64_t> layers;
  for (size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] != 0) {
      layers.push_back(bank.layers()[i]);
    }
  }
  if (layers.empty() || offers_windows(bank)) {
    return std::nullopt;
  }
  return view_windows(bank.teacher(), layers, window, sinks);
}

}  // namespace

std::map<std::string, int64_t> parse_layer_counts(const char* option,
                                                  const std::vector<std::string>& texts) {
  std::map<std::string, int64_t> counts;
  for (const std::string& text : texts) {
    const size_t at = text.rfind('=');
    int64_t count = -1;
    if (at != std::string::npos && at > 0 && at + 1 < text.size() && text.size() - at < 9 &&
        text.find_first_not_of("0123456789", at + 1) == std::string::npos) {
      count = std::stoll(text.substr(at + 1));
    }
    expect(count >= 0, "{}: expected KIND=LAYERS, such as attention=5, got '{}'", option, text);
    expect(counts.emplace(text.substr(0, at), count).second, "{}: {} is given twice", option,
           text.substr(0, at));
  }
  return counts;
}

std::optional<Choices> first_within(const LayerCosts& costs, double budget, int kind,
                                    const std::vector<int64_t>& order) {
  Choices choices(costs.layers.size(), 0);
  for (size_t i = 0; costs.of(choices) > budget * (1 + 1e-9); ++i) {
    if (i == order.size()) {
      return std::nullopt;
    }
    const auto place = static_cast<size_t>(order[i]);
    if (std::isfinite(costs.layers[place][static_cast<size_t>(kind)])) {
      choices[place] = kind;
    }
  }
  return choices;
}

ChosenPlacement choose_placement(const MixerBank& bank, const ChoiceOptions& o,
                                 const JudgeData& choosing, const JudgeData& reported) {
  const StopAnywhere stop(
      o.trace.empty()
          ? "nothing is chosen"
          : "the placements measured so far are kept; the same command goes on with the others");
  expect((o.share > 0.0) + (o.budget > 0.0) == 1,
         "search: expected one budget: a share of the teacher's cost, or a cost");
  PlacementJudge judge(bank.teacher(), o.metric, choosing);
  PlacementTrace trace(question_of(bank, o.metric, judge.fingerprint(), choosing.teacher),
                       bank.kinds(), bank.layers().size(), o.trace, o.fresh);
  const Fingerprint asked = cost_question(bank, o.cost);
  if (trace.find_costs(o.cost.kind, asked) == nullptr) {
    if (o.cost.kind != CostKind::kCache) {
      say("{}: measuring what a layer of each kind costs ({}, {} tokens of context)", o.label,
          cost_unit(o.cost.kind), o.cost.context);
    }
    LayerCosts measured = measure_layer_costs(bank, o.cost);
    trace.add(std::move(measured));
  }
  const LayerCosts& costs = *trace.find_costs(o.cost.kind, asked);

  ChosenPlacement chosen;
  chosen.teacher = model_digest(bank.teacher());
  chosen.map = layer_map(bank.teacher().spec());
  chosen.layers = bank.layers();
  for (size_t k = 0; k < bank.kinds().size(); ++k) {
    chosen.kinds.push_back(
        {bank.kinds()[k], bank.source(static_cast<int>(k)), bank.digest(static_cast<int>(k))});
  }
  chosen.metric = o.metric;
  chosen.costs = costs;
  chosen.budget = o.share > 0.0 ? o.share * costs.teacher() : o.budget;
  expect(chosen.budget > costs.rest,
         "search: the budget cannot be kept: a model may cost {:.6g} {}, and what no placement "
         "changes costs {:.6g} of the teacher's {:.6g}",
         chosen.budget, cost_unit(costs.kind), costs.rest, costs.teacher());
  chosen.command = o.command;
  SearchOptions search;
  search.limits = limits_of(bank, o, costs, chosen.budget);
  search.evaluations = o.evaluations;
  search.reach = o.reach;
  search.beam = o.beam;
  search.seed = o.seed;
  chosen.options = {{"evaluations", fmt::format("{}", o.evaluations)},
                    {"reach", fmt::format("{}", o.reach)},
                    {"beam", fmt::format("{}", o.beam)},
                    {"seed", fmt::format("{}", o.seed)}};

  Progress progress(o.label, static_cast<uint64_t>(o.evaluations), {.unit = "placements"});
  const auto measure = [&](const Choices& choices) {
    if (const Measured* known = trace.find(choices)) {
      return *known;
    }
    const auto begin = std::chrono::steady_clock::now();
    const LoadedModel model = bank.build(choices);
    const Measured value = judge.judge(*model.model).mean();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    trace.add(choices, value, taken.count());
    return value;
  };
  chosen.search = search_placement(search, measure, [&](int64_t done, double best) {
    progress.update(static_cast<uint64_t>(done),
                    std::isfinite(best) ? fmt::format("best {:.5g}", best) : "");
  });
  const SearchStep& best = chosen.search.steps[chosen.search.best];
  chosen.choices = best.choices;
  chosen.measured = best.value;
  chosen.chosen_on = judge.fingerprint();
  progress.finish(fmt::format("best {:.5g}", best.value.value));

  if (reported.documents == nullptr && reported.problems == nullptr) {
    return chosen;
  }
  PlacementJudge other(bank.teacher(), o.metric, reported);
  chosen.reported_on = other.fingerprint();
  const auto losses = [&](const Choices& choices) {
    const LoadedModel model = bank.build(choices);
    return other.judge(*model.model);
  };
  const Losses ours = losses(chosen.choices);
  chosen.reported = ours.mean();
  for (Rule& rule : simpler_rules(bank, o, costs, chosen.budget, chosen.choices)) {
    const Losses theirs = losses(rule.choices);
    const double share = costs.of(rule.choices) / costs.teacher();
    chosen.compared.push_back(
        {rule.name, std::move(rule.choices), share, theirs.mean(), difference(theirs, ours)});
  }
  constexpr int64_t kWindow = 128;
  constexpr int64_t kSinks = 4;
  if (const auto model = untrained_windows(bank, chosen.choices, kWindow, kSinks)) {
    const Losses theirs = other.judge(*model->model);
    chosen.compared.push_back({fmt::format("its attention, the rest windows of {}", kWindow),
                               {},
                               std::numeric_limits<double>::quiet_NaN(),
                               theirs.mean(),
                               difference(theirs, ours)});
  }
  return chosen;
}

}  // namespace cambium
