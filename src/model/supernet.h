// A supernet: a model in which layers hold several mixers with shared norms and feed-forward
// (LayerSpec::choice), of which one runs. Its presets are placements with names: one checkpoint,
// several speeds. A hybrid of it, "unwrapped", is a plain model of one mixer a layer, whose
// parameters are views of the supernet's.
#pragma once

#include <functional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "model/weights.h"

namespace cambium {

/// Puts the units in the place of the layer's mixer, as a choice of which `active` runs; what
/// stands beside it (Falcon-H1's Mamba-2) runs with any of them. The first keeps the mixer's name.
/// Error where the mixer is not the first unit of its branch.
void add_choice(ModelSpec& spec, int64_t layer, std::vector<UnitSpec> units, int active);
/// Whether a layer has a choice.
bool is_supernet(const ModelSpec& spec);
/// What people call a mixer of a choice: its name without the "mixer_" that tells it from other
/// units, or its kind where the name is of no such form.
std::string mixer_label(const UnitSpec& unit);
/// UnitSpec::name of a mixer that joins a choice under this label.
std::string mixer_unit_name(const std::string& label);
/// The labels of all choices, in the order of layers and units, each once.
std::vector<std::string> mixer_labels(const ModelSpec& spec);
/// The layers that have a choice.
std::vector<int64_t> choice_layers(const ModelSpec& spec);

/// Of each layer: the unit of its choice that runs, -1 where there is none.
using ActiveUnits = std::vector<int>;
ActiveUnits active_units(const ModelSpec& spec);
/// The mixer of this label in each choice that has it, elsewhere the first.
ActiveUnits uniform_units(const ModelSpec& spec, const std::string& label);
/// The label that runs in each layer; "" where there is no choice.
std::vector<std::string> active_labels(const ModelSpec& spec, std::span<const int> active);
/// The reverse. Error that names `where` for a label that a layer does not have.
ActiveUnits units_of_labels(const ModelSpec& spec, std::span<const std::string> labels,
                            const std::string& where);

/// The units that do not run: what their parameters' names begin with, without the last dot.
std::set<std::string> resting_units(const ModelSpec& spec);
/// "layers.3.mixer" of "layers.3.mixer.q_proj.weight": a layer's unit or norm; else the name.
std::string unit_of(const std::string& parameter);

/// Error, with the presets that there are, where there is none of this name.
const Preset& find_preset(const ModelSpec& spec, const std::string& name, const std::string& where);
/// Adds the preset, or replaces the one of its name. Error for a name that is not letters, digits,
/// '.', '_' and '-'.
void put_preset(ModelSpec& spec, Preset preset);

/// The plain hybrid: one mixer in the place of each choice, and no presets.
ModelSpec unwrapped(const ModelSpec& supernet, std::span<const int> active);
/// What the parameter `name` of that hybrid is called in the supernet.
std::string supernet_name(const ModelSpec& supernet, std::span<const int> active,
                          const std::string& name);
/// The supernet with the mixers alone that its presets use. Error where it has none.
ModelSpec thinned(const ModelSpec& supernet, const std::string& where);

/// A model all of whose parameters are views: `find` gives the tensor of each, which must outlive
/// it. Its activations are those of `like`.
LoadedModel view_model(const ModelSpec& spec, const Model& like,
                       const std::function<Tensor(const std::string& name)>& find);
/// The tensors of a model by name, without gradients.
std::map<std::string, Tensor> tensors_of(Model& model);
/// The unwrapped hybrid of a supernet that is in memory: views, no copies.
LoadedModel view_hybrid(Model& supernet, std::span<const int> active);

}  // namespace cambium
