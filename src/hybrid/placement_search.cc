#include "hybrid/placement_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>
#include <numeric>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/random.h"
#include "eval/statistics.h"

namespace cambium {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/// Measurements that the surrogate is fitted to at most.
constexpr size_t kMostFitted = 400;

// Streams of random numbers, each a name of its own beside the seed.
enum Stream : uint64_t { kStart = 1, kFront = 2, kRegret = 3 };

double expected_gain(double best, const Prediction& p, double misfit) {
  const double deviation = std::sqrt(p.deviation * p.deviation + misfit);
  const double z = (best - p.mean) / deviation;
  const double density = std::exp(-0.5 * z * z) / std::sqrt(2.0 * std::numbers::pi);
  return deviation * (z * 0.5 * std::erfc(-z / std::numbers::sqrt2) + density);
}

class Search {
 public:
  Search(const SearchOptions& options, const MeasurePlacement& measure,
         const std::function<void(int64_t, double)>& progress)
      : o_(options),
        measure_(measure),
        progress_(progress),
        shape_{options.limits.layers(), options.limits.kinds(), options.reach} {}

  SearchResult run() {
    if (placements() <= static_cast<double>(o_.evaluations)) {
      everything();
      return result();
    }
    start();
    front();
    while (!full()) {
      const int64_t before = count();
      const int64_t until =
          o_.beam > 0 ? std::min(o_.evaluations, count() + check_every()) : o_.evaluations;
      while (count() < until && by_regret()) {
      }
      while (!full() && o_.beam > 0 && beam_round()) {
      }
      if (count() == before) {
        break;  // there is nothing that has not been measured
      }
    }
    return result();
  }

 private:
  int64_t count() const { return static_cast<int64_t>(steps_.size()); }
  bool full() const { return count() >= o_.evaluations; }
  int64_t check_every() const { return std::max<int64_t>(o_.evaluations / 8, 1); }
  bool known(const Choices& choices) const { return seen_.contains(choices); }

  void add(const Choices& choices, const char* by) {
    double predicted = kNone;
    if (surrogate_) {
      predicted = surrogate_->scale().from(surrogate_->predict(choices).mean);
    }
    const Measured value = measure_(choices);
    CAMBIUM_CHECK(std::isfinite(value.value));
    seen_.insert(choices);
    steps_.push_back({choices, value, predicted, by});
    const bool within = o_.limits.allow(choices);
    if (within && (best_ < 0 || value.value < steps_[static_cast<size_t>(best_)].value.value)) {
      best_ = count() - 1;
    }
    if (progress_) {
      progress_(count(), best_ < 0 ? kNone : steps_[static_cast<size_t>(best_)].value.value);
    }
    if (std::string_view(by) != "all") {
      fit();
    }
  }

  // Strengths and scale are looked for anew when there is a quarter more to tell them by.
  void fit() {
    if (count() < 2) {
      return;
    }
    const std::vector<size_t> used = fitted_on();
    std::vector<Choices> placements;
    std::vector<double> values;
    for (const size_t i : used) {
      placements.push_back(steps_[i].choices);
      values.push_back(steps_[i].value.value);
    }
    if (surrogate_ && count() < fitted_ + std::max<int64_t>(fitted_ / 4, 4)) {
      surrogate_ = std::make_unique<Surrogate>(shape_, std::move(placements), std::move(values),
                                               surrogate_->strengths(), surrogate_->scale());
    } else {
      surrogate_ = std::make_unique<Surrogate>(shape_, std::move(placements), std::move(values));
      fitted_ = count();
    }
  }

  // All steps, or the best of them: fitting takes the third power of their number.
  std::vector<size_t> fitted_on() const {
    std::vector<size_t> order(steps_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (order.size() > kMostFitted) {
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return steps_[a].value.value < steps_[b].value.value;
      });
      order.resize(kMostFitted);
    }
    return order;
  }

  double placements() const {
    double product = 1.0;
    for (size_t l = 0; l < o_.limits.cost.size(); ++l) {
      int kinds = 0;
      for (int kind = 0; kind < shape_.kinds; ++kind) {
        kinds += possible(l, kind) ? 1 : 0;
      }
      product *= kinds;
    }
    return product;
  }

  // All placements, the last layer's kind changing first.
  void everything() {
    Choices choices(o_.limits.cost.size(), 0);
    for (;;) {
      add(choices, "all");
      size_t l = choices.size();
      for (; l > 0; --l) {
        int& kind = choices[l - 1];
        do {
          ++kind;
        } while (kind < shape_.kinds && !possible(l - 1, kind));
        if (kind < shape_.kinds) {
          break;
        }
        kind = 0;
      }
      if (l == 0) {
        return;
      }
    }
  }

  bool possible(size_t layer, int kind) const {
    return std::isfinite(o_.limits.cost[layer][static_cast<size_t>(kind)]);
  }

  void start() {
    const auto layers = static_cast<size_t>(shape_.layers);
    for (int kind = 0; kind < shape_.kinds && !full(); ++kind) {
      Choices one(layers, 0);
      for (size_t l = 0; l < layers; ++l) {
        one[l] = possible(l, kind) ? kind : 0;
      }
      if (!known(one)) {
        add(one, "start");
      }
    }
    const int64_t wanted = std::max<int64_t>(o_.evaluations / 4, 2);
    for (uint64_t i = 0; count() < wanted && !full() && i < 20 * static_cast<uint64_t>(wanted);
         ++i) {
      Rng rng(o_.seed, mix_seed(kStart, i));
      const Choices choices = random_counts(rng);
      if (!known(choices)) {
        add(choices, "start");
      }
    }
  }

  // Counts of the kinds uniform over all compositions, then shuffled.
  Choices random_counts(Rng& rng) const {
    std::vector<int64_t> bars;
    for (int64_t k = 1; k < shape_.kinds; ++k) {
      bars.push_back(rng.below(shape_.layers + 1));
    }
    std::sort(bars.begin(), bars.end());
    Choices choices;
    int kind = 0;
    for (int64_t l = 0; l < shape_.layers; ++l) {
      while (kind < static_cast<int>(bars.size()) && bars[static_cast<size_t>(kind)] <= l) {
        ++kind;
      }
      choices.push_back(kind);
    }
    rng.shuffle(std::span(choices));
    for (size_t l = 0; l < choices.size(); ++l) {
      choices[l] = possible(l, choices[l]) ? choices[l] : 0;
    }
    return choices;
  }

  void front() {
    const int64_t wanted = std::max<int64_t>(o_.evaluations / 2, 3);
    for (uint64_t i = 0; count() < wanted && !full() && i < 4 * static_cast<uint64_t>(wanted);
         ++i) {
      Rng rng(o_.seed, mix_seed(kFront, i));
      const auto choices = best_placement(surrogate_->draw(rng), o_.limits);
      if (choices && !known(*choices)) {
        add(*choices, "front");
      }
    }
  }

  // The best measured within the limits, at most `most`.
  std::vector<Choices> leaders(size_t most) const {
    std::vector<const SearchStep*> within;
    for (const SearchStep& step : steps_) {
      if (o_.limits.allow(step.choices)) {
        within.push_back(&step);
      }
    }
    std::stable_sort(within.begin(), within.end(), [](const SearchStep* a, const SearchStep* b) {
      return a->value.value < b->value.value;
    });
    std::vector<Choices> out;
    for (size_t i = 0; i < std::min(most, within.size()); ++i) {
      out.push_back(within[i]->choices);
    }
    return out;
  }

  void add_neighbours(const Choices& of, std::set<Choices>& to) const {
    const auto offer = [&](const Choices& c) {
      if (!known(c) && o_.limits.allow(c)) {
        to.insert(c);
      }
    };
    for (size_t l = 0; l < of.size(); ++l) {
      Choices changed = of;
      for (int kind = 0; kind < shape_.kinds; ++kind) {
        changed[l] = kind;
        offer(changed);
      }
      for (size_t k = 0; k < l; ++k) {
        if (of[k] != of[l]) {
          Choices swapped = of;
          std::swap(swapped[k], swapped[l]);
          offer(swapped);
        }
      }
    }
  }

  double best_scaled() const {
    return best_ < 0 ? std::numeric_limits<double>::infinity()
                     : surrogate_->scale().to(steps_[static_cast<size_t>(best_)].value.value);
  }

  // False where there is no candidate that has not been measured.
  bool by_regret() {
    std::set<Choices> candidates;
    const auto offer = [&](const Energy& energy) {
      if (const auto c = best_placement(energy, o_.limits); c && !known(*c)) {
        candidates.insert(*c);
      }
    };
    offer(surrogate_->mean());
    for (int64_t i = 0; i < o_.draws; ++i) {
      Rng rng(o_.seed, mix_seed(kRegret, static_cast<uint64_t>(count() * o_.draws + i)));
      offer(surrogate_->draw(rng));
    }
    for (const Choices& leader : leaders(2)) {
      add_neighbours(leader, candidates);
    }
    const Choices* chosen = nullptr;
    double most = -1.0;
    const double misfit = surrogate_->strengths().noise * surrogate_->strengths().single;
    for (const Choices& candidate : candidates) {
      const Prediction p = surrogate_->predict(candidate);
      const double gain = best_ < 0 ? -p.mean : expected_gain(best_scaled(), p, misfit);
      if (chosen == nullptr || gain > most) {
        chosen = &candidate;
        most = gain;
      }
    }
    if (chosen == nullptr) {
      return false;
    }
    add(*chosen, "regret");
    return true;
  }

  // Measures the neighbours of the leaders that are predicted best. True if one is better than all
  // before.
  bool beam_round() {
    std::set<Choices> candidates;
    for (const Choices& leader : leaders(static_cast<size_t>(o_.beam))) {
      add_neighbours(leader, candidates);
    }
    std::vector<std::pair<double, Choices>> ordered;
    for (const Choices& candidate : candidates) {
      ordered.emplace_back(surrogate_->predict(candidate).mean, candidate);
    }
    std::sort(ordered.begin(), ordered.end());
    const int64_t before = best_;
    for (size_t i = 0; i < std::min<size_t>(ordered.size(), static_cast<size_t>(o_.beam)); ++i) {
      if (full()) {
        break;
      }
      add(ordered[i].second, "beam");
    }
    return best_ != before;
  }

  SearchResult result() {
    CAMBIUM_CHECK(best_ >= 0);
    if (!surrogate_) {
      fit();
    }
    SearchResult r;
    r.best = static_cast<size_t>(best_);
    std::vector<Choices> others;
    std::vector<double> values;
    for (const size_t i : fitted_on()) {
      if (i != r.best) {
        others.push_back(steps_[i].choices);
        values.push_back(steps_[i].value.value);
      }
    }
    r.strengths = surrogate_->strengths();
    r.log_scale = surrogate_->scale().log;
    r.rank = surrogate_->left_out_rank(0.5);
    const ValueScale& scale = surrogate_->scale();
    r.predicted = {kNone, kNone, kNone};
    if (others.size() >= 2) {
      const Surrogate without(shape_, std::move(others), std::move(values), r.strengths, scale);
      const Prediction p = without.predict(steps_[r.best].choices);
      const double half =
          kZ95 * std::sqrt(p.deviation * p.deviation + r.strengths.noise * r.strengths.single);
      r.predicted = {scale.from(p.mean), scale.from(p.mean - half), scale.from(p.mean + half)};
    }
    PlacementLimits free = o_.limits;
    free.budget = std::numeric_limits<double>::infinity();
    r.front = placement_front(surrogate_->mean(), free);
    for (Optimum& optimum : r.front) {
      optimum.value = scale.from(optimum.value);
    }
    r.steps = std::move(steps_);
    return r;
  }

  const SearchOptions& o_;
  const MeasurePlacement& measure_;
  const std::function<void(int64_t, double)>& progress_;
  SurrogateShape shape_;
  std::vector<SearchStep> steps_;
  std::set<Choices> seen_;
  int64_t best_ = -1;
  int64_t fitted_ = 0;
  std::unique_ptr<Surrogate> surrogate_;
};

}  // namespace

SearchResult search_placement(const SearchOptions& options, const MeasurePlacement& measure,
                              const std::function<void(int64_t, double)>& progress) {
  const PlacementLimits& limits = options.limits;
  const int64_t least = limits.kinds() + 2;
  expect(options.evaluations >= least,
         "search: expected at least {} evaluations for {} kinds of mixers, got {}", least,
         limits.kinds(), options.evaluations);
  expect(limits.kinds() >= 2, "search: expected at least one kind of mixer beside attention");
  const auto cheapest = cheapest_placement(limits);
  expect(cheapest.has_value(),
         "search: no placement has as many layers of each kind as --at-least and --at-most ask: "
         "there are {} open layers",
         limits.layers());
  expect(
      limits.allow(*cheapest),
      "search: the budget cannot be kept: the open layers may cost {:.6g}, and the cheapest "
      "placement allowed costs {:.6g}; give a larger budget, a cheaper kind of mixer, or a lower "
      "--at-least",
      limits.budget, limits.cost_of(*cheapest));
  return Search(options, measure, progress).run();
}

}  // namespace cambium
