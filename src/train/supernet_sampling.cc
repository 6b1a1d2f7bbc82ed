#include "train/supernet_sampling.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>

#include "base/random.h"
#include "base/text.h"

namespace cambium {
namespace {

/// Keeps the draws apart from others of the same seed.
constexpr uint64_t kStream = 0x5075706572'6e6574;

double weight_of(const std::string& text, const std::string& where) {
  size_t end = 0;
  double weight = -1.0;
  try {
    weight = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  expect(end > 0 && end == text.size() && std::isfinite(weight) && weight >= 0.0,
         "supernet.weights: expected MIXER=NUMBER of at least 0, got '{}'", printable(where));
  return weight;
}

/// The index of one of `weights`, by its share of their sum, which is above 0.
size_t pick(Rng& rng, const std::vector<double>& weights) {
  double left = rng.uniform() * std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t last = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] > 0.0) {
      last = i;
      if (left < weights[i]) {
        return i;
      }
      left -= weights[i];
    }
  }
  return last;  // where rounding left a little
}

/// Numbers of at least 0 that add up to `total`, every such list equally likely: the gaps between
/// `parts` - 1 bars among total + parts - 1 places.
std::vector<int64_t> composition(Rng& rng, int64_t total, int64_t parts) {
  std::vector<int64_t> places(static_cast<size_t>(total + parts - 1));
  std::iota(places.begin(), places.end(), 0);
  rng.shuffle(std::span(places));
  places.resize(static_cast<size_t>(parts - 1));
  std::sort(places.begin(), places.end());
  std::vector<int64_t> counts;
  int64_t begin = 0;
  for (const int64_t bar : places) {
    counts.push_back(bar - begin);
    begin = bar + 1;
  }
  counts.push_back(total + parts - 1 - begin);
  return counts;
}

}  // namespace

void visit_fields(SupernetConfig& config, FieldVisitor& visit) {
  visit({"sampling",
         "which mixers of a supernet run in a step: of each layer any, any by weights, random "
         "counts of each, or a preset"},
        config.sampling,
        {{"none", PlacementSampling::kNone},
         {"uniform", PlacementSampling::kUniform},
         {"weighted", PlacementSampling::kWeighted},
         {"composition", PlacementSampling::kComposition},
         {"presets", PlacementSampling::kPresets}});
  visit({"weights", "weighted: [\"MIXER=NUMBER\"]; 1 where a mixer is not named"}, config.weights);
}

PlacementSampler::PlacementSampler(const ModelSpec& supernet, const SupernetConfig& config,
                                   uint64_t seed)
    : sampling_(config.sampling), seed_(mix_seed(seed, kStream)), labels_(mixer_labels(supernet)) {
  expect(config.sampling != PlacementSampling::kNone,
         "the student is a supernet: expected supernet.sampling to say which of its mixers run in "
         "a step ({}), or one of its presets as the student",
         join(labels_, ", "));
  expect(is_supernet(supernet),
         "supernet.sampling draws among the mixers of a supernet, and the student is a plain model "
         "({}); cambium convert --supernet makes one",
         layer_map(supernet));
  for (size_t layer = 0; layer < supernet.layers.size(); ++layer) {
    std::vector<int>& units = units_.emplace_back();
    const BranchSpec* choice = supernet.layers[layer].choice();
    for (const std::string& label : labels_) {
      units.push_back(-1);
      for (size_t i = 0; choice != nullptr && i < choice->choices(); ++i) {
        units.back() = mixer_label(choice->units[i]) == label ? static_cast<int>(i) : units.back();
      }
    }
  }
  weights_.assign(labels_.size(), 1.0);
  expect(config.weights.empty() || sampling_ == PlacementSampling::kWeighted,
         "supernet.weights belong to supernet.sampling = \"weighted\"");
  for (const std::string& text : config.weights) {
    const std::string label = text.substr(0, text.find('='));
    const auto it = std::find(labels_.begin(), labels_.end(), label);
    expect(it != labels_.end(), "supernet.weights: the supernet has no mixer '{}'{}; it has {}",
           printable(label), did_you_mean(label, labels_), join(labels_, ", "));
    weights_[static_cast<size_t>(it - labels_.begin())] =
        weight_of(text.substr(std::min(text.size(), label.size() + 1)), text);
  }
  for (size_t layer = 0; layer < units_.size(); ++layer) {
    double sum = 0.0;
    for (size_t i = 0; i < labels_.size(); ++i) {
      sum += units_[layer][i] >= 0 ? weights_[i] : 0.0;
    }
    expect(sum > 0.0 || supernet.layers[layer].choice() == nullptr,
           "supernet.weights: none of the mixers of layer {} has a weight above 0", layer);
  }
  for (const Preset& preset : supernet.presets) {
    presets_.push_back(preset.active);
  }
  expect(sampling_ != PlacementSampling::kPresets || !presets_.empty(),
         "supernet.sampling = \"presets\": the supernet has no presets");
}

ActiveUnits PlacementSampler::draw(int64_t step) const {
  Rng rng(seed_, static_cast<uint64_t>(step));
  if (sampling_ == PlacementSampling::kPresets) {
    return rng.pick(presets_);
  }
  std::vector<size_t> order;  // by composition: the label of each choice
  if (sampling_ == PlacementSampling::kComposition) {
    const auto choices = std::count_if(units_.begin(), units_.end(), [](const auto& units) {
      return std::any_of(units.begin(), units.end(), [](int unit) { return unit >= 0; });
    });
    const std::vector<int64_t> counts =
        composition(rng, choices, static_cast<int64_t>(labels_.size()));
    for (size_t label = 0; label < counts.size(); ++label) {
      order.insert(order.end(), static_cast<size_t>(counts[label]), label);
    }
    rng.shuffle(std::span(order));
  }
  ActiveUnits active;
  size_t place = 0;
  for (const std::vector<int>& units : units_) {
    std::vector<double> weights;
    for (size_t i = 0; i < units.size(); ++i) {
      weights.push_back(units[i] >= 0 ? weights_[i] : 0.0);
    }
    if (std::all_of(weights.begin(), weights.end(), [](double w) { return w == 0.0; })) {
      active.push_back(-1);
      continue;
    }
    // A layer that lacks the mixer of its turn draws among those it has.
    const size_t turn = place < order.size() ? order[place++] : labels_.size();
    active.push_back(turn < labels_.size() && units[turn] >= 0 ? units[turn]
                                                               : units[pick(rng, weights)]);
  }
  return active;
}

}  // namespace cambium
