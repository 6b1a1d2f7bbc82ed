#include "model/supernet.h"

#include <algorithm>

#include "base/text.h"

namespace cambium {
namespace {

constexpr std::string_view kPrefix = "mixer_";

const BranchSpec* choice_of(const ModelSpec& spec, size_t layer) {
  return spec.layers[layer].choice();
}

int find_label(const BranchSpec& choice, const std::string& label) {
  for (size_t i = 0; i < choice.choices(); ++i) {
    if (mixer_label(choice.units[i]) == label) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

std::span<const UnitSpec> choices_of(const BranchSpec& choice) {
  return std::span(choice.units).first(choice.choices());
}

/// The unit as a plain layer has it: under the name of the mixer that the choice began with.
UnitSpec plain_unit(const BranchSpec& choice, int active) {
  UnitSpec unit = choice.units.at(static_cast<size_t>(active));
  unit.name.clear();
  for (const UnitSpec& other : choices_of(choice)) {
    if (!other.name.starts_with(kPrefix)) {
      unit.name = other.name;
    }
  }
  return unit;
}

}  // namespace

void add_choice(ModelSpec& spec, int64_t layer, std::vector<UnitSpec> units, int active) {
  LayerSpec& edited = spec.layers[static_cast<size_t>(layer)];
  for (BranchSpec& branch : edited.branches) {
    if (branch.units.empty() || &branch.units[0] != edited.mixer()) {
      continue;
    }
    branch.beside = static_cast<int>(branch.units.size()) - 1;
    units.insert(units.end(), branch.units.begin() + 1, branch.units.end());
    branch.units = std::move(units);
    branch.active = active;
    return;
  }
  fail("layer {}: expected a branch whose first unit is a mixer; a supernet chooses in its place",
       layer);
}

bool is_supernet(const ModelSpec& spec) {
  return !choice_layers(spec).empty();
}

std::string mixer_label(const UnitSpec& unit) {
  return unit.name.starts_with(kPrefix) ? unit.name.substr(kPrefix.size()) : unit.kind;
}

std::string mixer_unit_name(const std::string& label) {
  return std::string(kPrefix) + label;
}

std::vector<std::string> mixer_labels(const ModelSpec& spec) {
  std::vector<std::string> labels;
  for (const int64_t layer : choice_layers(spec)) {
    for (const UnitSpec& unit : choices_of(*choice_of(spec, static_cast<size_t>(layer)))) {
      const std::string label = mixer_label(unit);
      if (std::find(labels.begin(), labels.end(), label) == labels.end()) {
        labels.push_back(label);
      }
    }
  }
  return labels;
}

std::vector<int64_t> choice_layers(const ModelSpec& spec) {
  std::vector<int64_t> layers;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (choice_of(spec, i) != nullptr) {
      layers.push_back(static_cast<int64_t>(i));
    }
  }
  return layers;
}

ActiveUnits active_units(const ModelSpec& spec) {
  ActiveUnits active;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const BranchSpec* choice = choice_of(spec, i);
    active.push_back(choice == nullptr ? -1 : choice->active);
  }
  return active;
}

ActiveUnits uniform_units(const ModelSpec& spec, const std::string& label) {
  ActiveUnits active;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const BranchSpec* choice = choice_of(spec, i);
    active.push_back(choice == nullptr ? -1 : std::max(0, find_label(*choice, label)));
  }
  return active;
}

std::vector<std::string> active_labels(const ModelSpec& spec, std::span<const int> active) {
  CAMBIUM_CHECK(active.size() == spec.layers.size());
  std::vector<std::string> labels;
  for (size_t i = 0; i < active.size(); ++i) {
    labels.push_back(
        active[i] < 0 ? ""
                      : mixer_label(choice_of(spec, i)->units.at(static_cast<size_t>(active[i]))));
  }
  return labels;
}

ActiveUnits units_of_labels(const ModelSpec& spec, std::span<const std::string> labels,
                            const std::string& where) {
  expect(labels.size() == spec.layers.size(), "{}: expected a mixer for each of {} layers, got {}",
         where, spec.layers.size(), labels.size());
  ActiveUnits active;
  for (size_t i = 0; i < labels.size(); ++i) {
    const BranchSpec* choice = choice_of(spec, i);
    if (choice == nullptr) {
      expect(labels[i].empty(), "{}: layer {} has one mixer: expected '', got '{}'", where, i,
             printable(labels[i]));
      active.push_back(-1);
      continue;
    }
    std::vector<std::string> known;
    for (const UnitSpec& unit : choices_of(*choice)) {
      known.push_back(mixer_label(unit));
    }
    active.push_back(find_label(*choice, labels[i]));
    expect(active.back() >= 0, "{}: layer {} has no mixer '{}'; it has {}", where, i,
           printable(labels[i]), join(known, ", "));
  }
  return active;
}

std::set<std::string> resting_units(const ModelSpec& spec) {
  std::set<std::string> resting;
  for (const int64_t layer : choice_layers(spec)) {
    const BranchSpec& choice = *choice_of(spec, static_cast<size_t>(layer));
    for (size_t i = 0; i < choice.units.size(); ++i) {
      if (!choice.runs(i)) {
        const std::string prefix = unit_prefix(layer, choice.units[i]);
        resting.insert(prefix.substr(0, prefix.size() - 1));
      }
    }
  }
  return resting;
}

std::string unit_of(const std::string& parameter) {
  if (!parameter.starts_with("layers.")) {
    return parameter;
  }
  const size_t layer = parameter.find('.');
  const size_t unit = parameter.find('.', layer + 1);
  return parameter.substr(0, unit == std::string::npos ? unit : parameter.find('.', unit + 1));
}

const Preset& find_preset(const ModelSpec& spec, const std::string& name,
                          const std::string& where) {
  std::vector<std::string> known;
  for (const Preset& preset : spec.presets) {
    if (preset.name == name) {
      return preset;
    }
    known.push_back(preset.name);
  }
  expect(is_supernet(spec), "{}: is no supernet and has no presets, so no preset '{}'", where,
         printable(name));
  fail("{}: has no preset '{}'{}; {}", where, printable(name), did_you_mean(name, known),
       known.empty() ? "it has none: cambium convert --add-preset NAME=PLACEMENT adds one"
                     : "it has " + join(known, ", "));
}

void put_preset(ModelSpec& spec, Preset preset) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  expect(!preset.name.empty() && preset.name.size() <= 100 &&
             std::all_of(preset.name.begin(), preset.name.end(), plain),
         "a preset's name: expected 1 to 100 letters, digits, '.', '_' and '-', got '{}'",
         printable(preset.name));
  const auto it = std::find_if(spec.presets.begin(), spec.presets.end(),
                               [&](const Preset& other) { return other.name == preset.name; });
  if (it == spec.presets.end()) {
    spec.presets.push_back(std::move(preset));
  } else {
    *it = std::move(preset);
  }
}

ModelSpec unwrapped(const ModelSpec& supernet, std::span<const int> active) {
  CAMBIUM_CHECK(active.size() == supernet.layers.size());
  ModelSpec spec = supernet;
  spec.presets.clear();
  for (size_t i = 0; i < active.size(); ++i) {
    if (BranchSpec* choice = spec.layers[i].choice(); choice != nullptr) {
      const UnitSpec chosen = plain_unit(*choice, active[i]);
      choice->units.erase(choice->units.begin(),
                          choice->units.begin() + static_cast<int64_t>(choice->choices()));
      choice->units.insert(choice->units.begin(), chosen);
      choice->active = -1;
      choice->beside = 0;
    }
  }
  return spec;
}

std::string supernet_name(const ModelSpec& supernet, std::span<const int> active,
                          const std::string& name) {
  for (size_t i = 0; i < active.size(); ++i) {
    if (active[i] < 0) {
      continue;
    }
    const BranchSpec& choice = *choice_of(supernet, i);
    const UnitSpec& unit = choice.units.at(static_cast<size_t>(active[i]));
    const std::string plain = unit_prefix(static_cast<int64_t>(i), plain_unit(choice, active[i]));
    if (name.starts_with(plain)) {
      return unit_prefix(static_cast<int64_t>(i), unit) + name.substr(plain.size());
    }
  }
  return name;
}

ModelSpec thinned(const ModelSpec& supernet, const std::string& where) {
  expect(!supernet.presets.empty(),
         "{}: a thin supernet keeps the mixers that presets use, and it has no presets", where);
  ModelSpec spec = supernet;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    BranchSpec* choice = spec.layers[i].choice();
    if (choice == nullptr) {
      continue;
    }
    std::vector<int> place(choice->choices(), -1);
    std::vector<UnitSpec> kept;
    for (size_t unit = 0; unit < place.size(); ++unit) {
      const bool used = std::any_of(
          supernet.presets.begin(), supernet.presets.end(),
          [&](const Preset& preset) { return preset.active[i] == static_cast<int>(unit); });
      if (used) {
        place[unit] = static_cast<int>(kept.size());
        kept.push_back(choice->units[unit]);
      }
    }
    kept.insert(kept.end(), choice->units.begin() + static_cast<int64_t>(choice->choices()),
                choice->units.end());
    choice->units = kept;
    choice->active = std::max(0, place[static_cast<size_t>(choice->active)]);
    for (Preset& preset : spec.presets) {
      preset.active[i] = place[static_cast<size_t>(preset.active[i])];
    }
  }
  return spec;
}

LoadedModel view_model(const ModelSpec& spec, const Model& like,
                       const std::function<Tensor(const std::string& name)>& find) {
  LoadedModel view{{}, std::make_unique<Model>(spec), {}};
  view.model->visit([&](const std::string& name, Parameter& p) {
    p.tensor = find(name).detached();
    CAMBIUM_CHECK(std::equal(p.shape.begin(), p.shape.end(), p.tensor.shape.begin(),
                             p.tensor.shape.begin() + p.tensor.rank),
                  "{}: {}", name, p.tensor);
  });
  view.model->set_activations(like.activations());
  return view;
}

std::map<std::string, Tensor> tensors_of(Model& model) {
  std::map<std::string, Tensor> tensors;
  model.visit([&](const std::string& name, Parameter& p) { tensors[name] = p.tensor.detached(); });
  return tensors;
}

LoadedModel view_hybrid(Model& supernet, std::span<const int> active) {
  const std::map<std::string, Tensor> tensors = tensors_of(supernet);
  return view_model(unwrapped(supernet.spec(), active), supernet, [&](const std::string& name) {
    return tensors.at(supernet_name(supernet.spec(), active, name));
  });
}

}  // namespace cambium
