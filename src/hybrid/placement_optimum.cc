#include "hybrid/placement_optimum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/error.h"

namespace cambium {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The best way found to a state at one cost.
struct Label {
  double cost = 0.0;
  double value = 0.0;
  int kind = 0;       // of the layer just placed
  size_t before = 0;  // the label it came from, in the layer before
};

/// Kinds of the last R layers, the latest last, then the counts that matter.
using State = std::vector<int64_t>;

// Costs are sums in any order, so a budget met exactly must not be missed by rounding.
double slack(double budget) {
  return std::isfinite(budget) ? 1e-9 * std::abs(budget) : 0.0;
}

void keep_unbeaten(std::vector<Label>& labels, double grain) {
  std::sort(labels.begin(), labels.end(), [](const Label& a, const Label& b) {
    return a.cost != b.cost ? a.cost < b.cost : a.value < b.value;
  });
  std::vector<Label> kept;
  for (const Label& label : labels) {
    if (kept.empty() || label.value < kept.back().value) {
      if (!kept.empty() && label.cost - kept.back().cost <= grain && grain > 0.0) {
        kept.back() = label;
      } else {
        kept.push_back(label);
      }
    }
  }
  labels = std::move(kept);
}

}  // namespace

double PlacementLimits::cost_of(const Choices& choices) const {
  double sum = 0.0;
  for (size_t l = 0; l < cost.size(); ++l) {
    sum += cost[l][static_cast<size_t>(choices[l])];
  }
  return sum;
}

int64_t PlacementLimits::fewest(size_t kind, int64_t count) const {
  const bool any = count > 0 && !none_or_at_least.empty();
  return std::max(at_least[kind], any ? none_or_at_least[kind] : 0);
}

bool PlacementLimits::allow(const Choices& choices) const {
  std::vector<int64_t> counts(at_most.size(), 0);
  for (const int kind : choices) {
    ++counts[static_cast<size_t>(kind)];
  }
  for (size_t m = 0; m < counts.size(); ++m) {
    if (counts[m] < fewest(m, counts[m]) || counts[m] > at_most[m]) {
      return false;
    }
  }
  return cost_of(choices) <= budget + slack(budget);
}

std::vector<Optimum> placement_front(const Energy& energy, const PlacementLimits& limits) {
  const int64_t layers = limits.layers();
  const int64_t kinds = limits.kinds();
  CAMBIUM_CHECK(energy.shape.layers == layers && energy.shape.kinds == kinds);
  const int64_t reach = energy.shape.reach;
  // Kinds whose counts limits are about; a count stops where more of it changes nothing.
  std::vector<size_t> counted;
  std::vector<int64_t> ceiling;
  for (size_t m = 0; m < static_cast<size_t>(kinds); ++m) {
    const int64_t fewest = limits.fewest(m, 1);
    if (limits.at_least[m] > 0 || fewest > 1 || limits.at_most[m] < layers) {
      counted.push_back(m);
      ceiling.push_back(limits.at_most[m] < layers ? limits.at_most[m] + 1 : fewest);
    }
  }
  // The least that the layers from l on cost.
  std::vector<double> rest(static_cast<size_t>(layers) + 1, 0.0);
  for (size_t l = static_cast<size_t>(layers); l-- > 0;) {
    rest[l] = rest[l + 1] + *std::min_element(limits.cost[l].begin(), limits.cost[l].end());
  }
  const double most = limits.budget + slack(limits.budget);
  const double grain = std::isfinite(limits.budget) ? 1e-6 * limits.budget : 0.0;

  std::vector<std::vector<Label>> taken(static_cast<size_t>(layers));
  std::map<State, std::vector<Label>> now;
  now[State(counted.size(), 0)] = {{0.0, energy.constant, 0, 0}};
  std::vector<size_t> starts;  // where each state's labels begin in the layer before
  for (int64_t l = 0; l < layers; ++l) {
    const auto layer = static_cast<size_t>(l);
    std::map<State, std::vector<Label>> next;
    const int64_t seen = std::min(l, reach);
    size_t from = 0;
    for (const auto& [state, labels] : now) {
      for (int kind = 0; kind < kinds; ++kind) {
        const double cost = limits.cost[layer][static_cast<size_t>(kind)];
        if (cost == kInfinity) {
          continue;
        }
        double value = energy.h(l, kind);
        for (int64_t r = 1; r <= seen; ++r) {
          value += energy.j(r, l - r, static_cast<int>(state[static_cast<size_t>(seen - r)]), kind);
        }
        State to(state.begin() + (seen == reach && reach > 0 ? 1 : 0), state.begin() + seen);
        if (reach > 0) {
          to.push_back(kind);
        }
        bool within = true;
        int64_t missing = 0;
        for (size_t c = 0; c < counted.size(); ++c) {
          int64_t count = state[static_cast<size_t>(seen) + c];
          count = std::min(count + (counted[c] == static_cast<size_t>(kind) ? 1 : 0), ceiling[c]);
          within = within && count <= limits.at_most[counted[c]];
          missing += std::max<int64_t>(limits.fewest(counted[c], count) - count, 0);
          to.push_back(count);
        }
        if (!within || missing > layers - l - 1) {
          continue;
        }
        std::vector<Label>& into = next[to];
        for (size_t i = 0; i < labels.size(); ++i) {
          if (labels[i].cost + cost + rest[layer + 1] <= most) {
            into.push_back({labels[i].cost + cost, labels[i].value + value, kind, from + i});
          }
        }
      }
      from += labels.size();
    }
    for (auto& [state, labels] : next) {
      keep_unbeaten(labels, grain / static_cast<double>(layers));
      taken[layer].insert(taken[layer].end(), labels.begin(), labels.end());
    }
    now = std::move(next);
  }
  // The ends of all states together.
  std::vector<Label> ends;
  if (layers > 0) {
    const std::vector<Label>& last = taken.back();
    for (size_t i = 0; i < last.size(); ++i) {
      ends.push_back({last[i].cost, last[i].value, last[i].kind, i});
    }
  }
  keep_unbeaten(ends, 0.0);
  std::vector<Optimum> front;
  for (const Label& end : ends) {
    Optimum optimum{Choices(static_cast<size_t>(layers), 0), end.cost, end.value};
    size_t at = end.before;
    for (size_t l = static_cast<size_t>(layers); l-- > 0;) {
      optimum.choices[l] = taken[l][at].kind;
      at = taken[l][at].before;
    }
    front.push_back(std::move(optimum));
  }
  return front;
}

std::optional<Choices> best_placement(const Energy& energy, const PlacementLimits& limits) {
  std::vector<Optimum> front = placement_front(energy, limits);
  return front.empty() ? std::nullopt : std::optional(std::move(front.back().choices));
}

std::optional<Choices> cheapest_placement(const PlacementLimits& limits) {
  PlacementLimits free = limits;
  free.budget = kInfinity;
  std::vector<Optimum> front = placement_front(Energy({limits.layers(), limits.kinds(), 0}), free);
  // All values are equal, so that the front is its cheapest end.
  return front.empty() ? std::nullopt : std::optional(std::move(front.front().choices));
}

}  // namespace cambium
