#include "hybrid/mixer_bank.h"

#include <algorithm>

#include "base/checksum.h"
#include "base/text.h"
#include "hybrid/graft.h"
#include "hybrid/importance.h"
#include "hybrid/plan.h"
#include "nn/units/units.h"
#include "tensor/copy.h"
#include "train/checkpoint.h"

namespace cambium {
namespace {

constexpr std::string_view kDigits = "0123456789abcdefghijklmnopqrstuvwxyz";

/// Whether `other` is the layer but for its mixer.
bool differs_by_mixer(LayerSpec layer, const LayerSpec& other) {
  if (other.mixer() != nullptr) {
    *layer.mixer() = *other.mixer();
  }
  return layer == other;
}

}  // namespace

std::string placement_text(const Choices& choices) {
  std::string text;
  for (const int kind : choices) {
    text += kDigits[static_cast<size_t>(kind)];
  }
  return text;
}

Choices parse_placement(const std::string& text, size_t layers, size_t kinds,
                        const std::string& where) {
  expect(text.size() == layers, "{}: expected a kind for each of {} layers, got '{}'", where,
         layers, text);
  Choices choices;
  for (const char c : text) {
    const size_t kind = kDigits.find(c);
    expect(kind < kinds, "{}: expected kinds from 0 to {}, got '{}'", where, kDigits[kinds - 1],
           text);
    choices.push_back(static_cast<int>(kind));
  }
  return choices;
}

LoadedModel load_bank(const LoadedModel& teacher, const std::filesystem::path& dir) {
  LoadOptions load{.storage = MatrixStorage::kStored, .device = teacher.model->device()};
  load.share = &teacher;
  return load_model(dir, load);
}

MixerBank::MixerBank(Model& teacher)
    : teacher_(teacher),
      layers_(open_layers(teacher.spec())),
      kinds_{kAttentionKind},
      digests_{""},
      sources_{""},
      tensors_{tensors_of(teacher)} {}

void MixerBank::add(const std::string& kind, LoadedModel model, const std::string& where) {
  const std::string at = fmt::format("bank {}={}", kind, where);
  check_stage_name(kind, at);
  expect(std::find(kinds_.begin(), kinds_.end(), kind) == kinds_.end(), "{}: {} is {}", at, kind,
         kind == kAttentionKind ? "what the teacher itself brings; name the bank's mixers otherwise"
                                : "given twice");
  expect(kinds_.size() < kDigits.size(), "{}: expected at most {} kinds", at, kDigits.size());
  const ModelSpec& spec = model.model->spec();
  const ModelSpec& ours = teacher().spec();
  expect(spec.layers.size() == ours.layers.size() && spec.width == ours.width &&
             spec.vocab == ours.vocab,
         "{}: was not made from this teacher: it has {} layers, width {} and a vocabulary of {}, "
         "the teacher {}, {} and {}",
         at, spec.layers.size(), spec.width, spec.vocab, ours.layers.size(), ours.width,
         ours.vocab);
  std::vector<std::string> prefixes;
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    const bool open = std::find(layers_.begin(), layers_.end(), layer) != layers_.end();
    const bool same = spec.layers[l] == ours.layers[l];
    expect(same || (open && differs_by_mixer(ours.layers[l], spec.layers[l])),
           "{}: layer {} differs from the teacher's in more than its mixer; a bank is the teacher "
           "with other mixers in place of attention",
           at, layer);
    if (!same) {
      prefixes.push_back(unit_prefix(layer, *spec.layers[l].mixer()));
    }
  }
  expect(!prefixes.empty(),
         "{}: all of its attention is the teacher's; expected a conversion of its layers, as "
         "`cambium convert` writes it",
         at);
  Checksum sum;
  std::map<std::string, Tensor> mixers;
  const std::string config = find_family("cambium").write_config(spec);
  sum.update(std::as_bytes(std::span(config)));
  model.model->visit([&](const std::string& name, Parameter& p) {
    if (std::any_of(prefixes.begin(), prefixes.end(),
                    [&](const std::string& prefix) { return name.starts_with(prefix); })) {
      mixers[name] = p.tensor.detached();
      sum.update(std::as_bytes(std::span(name)));
      read_in_pieces(p.tensor, p.tensor.dtype,
                     [&](std::span<const std::byte> bytes) { sum.update(bytes); });
      return;
    }
    const Tensor& old = tensors_[0].at(name);
    expect(p.tensor.data == old.data || same_elements(p.tensor, old),
           "{}: {} is not the teacher's: its hybrids would not be of one model; train the bank's "
           "mixers alone (distill --objective align)",
           at, name);
  });
  kinds_.push_back(kind);
  digests_.push_back(checksum_text(sum.digest()));
  sources_.push_back(where);
  tensors_.push_back(std::move(mixers));
  banks_.push_back(std::move(model));
}

bool MixerBank::has(int64_t place, int kind) const {
  const auto layer = static_cast<size_t>(layers_[static_cast<size_t>(place)]);
  return kind == 0 || !(banks_[static_cast<size_t>(kind) - 1].model->spec().layers[layer] ==
                        teacher().spec().layers[layer]);
}

void MixerBank::expect_everywhere(int kind, const std::string& who) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    expect(has(static_cast<int64_t>(i), kind),
           "{}: layer {} of {} has attention still; expected the student with every layer "
           "converted",
           who, layers_[i], source(kind));
  }
}

ModelSpec MixerBank::spec(const Choices& choices) const {
  CAMBIUM_CHECK(choices.size() == layers_.size());
  ModelSpec spec = teacher().spec();
  for (size_t i = 0; i < choices.size(); ++i) {
    const auto layer = static_cast<size_t>(layers_[i]);
    if (choices[i] != 0) {
      spec.family = "cambium";
    }
    if (choices[i] < 0) {
      take_mixer_out(spec.layers[layer]);
    } else if (choices[i] > 0) {
      *spec.layers[layer].mixer() =
          *banks_[static_cast<size_t>(choices[i]) - 1].model->spec().layers[layer].mixer();
    }
  }
  return spec;
}

LoadedModel MixerBank::build(const Choices& choices) const {
  const ModelSpec hybrid = spec(choices);
  std::map<std::string, int> kinds;  // of the mixers that are not the teacher's, by unit
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] > 0) {
      kinds[unit_of(unit_prefix(
          layers_[i], *hybrid.layers[static_cast<size_t>(layers_[i])].mixer()))] = choices[i];
    }
  }
  return view_model(hybrid, teacher(), [&](const std::string& name) {
    const auto it = kinds.find(unit_of(name));
    return tensors_[it == kinds.end() ? 0 : static_cast<size_t>(it->second)].at(name);
  });
}

LoadedModel MixerBank::supernet(const std::function<void(ModelSpec& spec)>& edit) const {
  ModelSpec spec = teacher().spec();
  spec.family = "cambium";
  std::map<std::string, std::pair<size_t, std::string>> from;  // of a unit: kind, its unit there
  for (size_t place = 0; place < layers_.size(); ++place) {
    const int64_t layer = layers_[place];
    std::vector<UnitSpec> units = {*spec.layers[static_cast<size_t>(layer)].mixer()};
    const std::string plain = unit_of(unit_prefix(layer, units[0]));
    for (size_t kind = 1; kind < kinds_.size(); ++kind) {
      if (has(static_cast<int64_t>(place), static_cast<int>(kind))) {
        UnitSpec unit = *banks_[kind - 1].model->spec().layers[static_cast<size_t>(layer)].mixer();
        unit.name = mixer_unit_name(kinds_[kind]);
        from[unit_of(unit_prefix(layer, unit))] = {kind, plain};
        units.push_back(unit);
      }
    }
    if (units.size() > 1) {
      add_choice(spec, layer, std::move(units), 0);
    }
  }
  if (edit) {
    edit(spec);
  }
  return view_model(spec, teacher(), [&](const std::string& name) {
    const std::string unit = unit_of(name);
    const auto it = from.find(unit);
    return it == from.end()
               ? tensors_[0].at(name)
               : tensors_[it->second.first].at(it->second.second + name.substr(unit.size()));
  });
}

LoadedModel MixerBank::build_beside(int kind) const {
  ModelSpec spec = teacher().spec();
  spec.family = "cambium";
  std::map<std::string, std::string> from;  // of a unit beside attention: its unit in the bank
  for (size_t place = 0; place < layers_.size(); ++place) {
    CAMBIUM_CHECK(has(static_cast<int64_t>(place), kind));
    const int64_t layer = layers_[place];
    UnitSpec mixer = *banks_[static_cast<size_t>(kind) - 1]
                          .model->spec()
                          .layers[static_cast<size_t>(layer)]
                          .mixer();
    const std::string plain = unit_of(unit_prefix(layer, mixer));
    mixer.name = kBeside;
    from[unit_of(unit_prefix(layer, mixer))] = plain;
    for (BranchSpec& branch : spec.layers[static_cast<size_t>(layer)].branches) {
      const auto attention = std::find_if(branch.units.begin(), branch.units.end(), is_attention);
      if (attention != branch.units.end()) {
        branch.units.insert(attention + 1, std::move(mixer));
        break;
      }
    }
  }
  return view_model(spec, teacher(), [&](const std::string& name) {
    const std::string unit = unit_of(name);
    const auto it = from.find(unit);
    return it == from.end()
               ? tensors_[0].at(name)
               : tensors_[static_cast<size_t>(kind)].at(it->second + name.substr(unit.size()));
  });
}

std::string attention_label(const ModelSpec& supernet) {
  for (const int64_t layer : choice_layers(supernet)) {
    const BranchSpec& choice = *supernet.layers[static_cast<size_t>(layer)].choice();
    for (size_t unit = 0; unit < choice.choices(); ++unit) {
      if (is_attention(choice.units[unit])) {
        return mixer_label(choice.units[unit]);
      }
    }
  }
  return kAttentionKind;
}

LoadedModel attention_of(Model& supernet, const std::string& where) {
  expect(is_supernet(supernet.spec()), "{}: expected a supernet, got a plain model ({})", where,
         layer_map(supernet.spec()));
  return view_hybrid(supernet, uniform_units(supernet.spec(), attention_label(supernet.spec())));
}

MixerBank bank_of(Model& supernet, LoadedModel& teacher, const std::string& where) {
  MixerBank bank(*teacher.model);
  const std::string attention = attention_label(supernet.spec());
  for (const std::string& label : mixer_labels(supernet.spec())) {
    if (label != attention) {
      bank.add(label, view_hybrid(supernet, uniform_units(supernet.spec(), label)), where);
    }
  }
  return bank;
}

LoadedModel add_mixer(Model& supernet, Model& conversion, const std::vector<int64_t>& layers,
                      const std::string& label, const std::function<void(ModelSpec& spec)>& edit) {
  ModelSpec spec = supernet.spec();
  std::map<std::string, std::string> from;  // of a new unit: its unit in the conversion
  for (const int64_t layer : layers) {
    const auto at = static_cast<size_t>(layer);
    BranchSpec* choice = spec.layers[at].choice();
    expect(choice != nullptr, "layer {} has no choice that a mixer could join", layer);
    for (size_t unit = 0; unit < choice->choices(); ++unit) {
      expect(mixer_label(choice->units[unit]) != label,
             "layer {} has a mixer '{}' already; give the new one a name: NAME={}", layer, label,
             choice->units[unit].kind);
    }
    UnitSpec unit = *conversion.spec().layers[at].mixer();
    const std::string plain = unit_of(unit_prefix(layer, unit));
    unit.name = mixer_unit_name(label);
    from[unit_of(unit_prefix(layer, unit))] = plain;
    choice->units.insert(choice->units.begin() + static_cast<int64_t>(choice->choices()),
                         std::move(unit));
  }
  if (edit) {
    edit(spec);
  }
  spec.family = fitting_family(spec);
  const std::map<std::string, Tensor> ours = tensors_of(supernet);
  const std::map<std::string, Tensor> theirs = tensors_of(conversion);
  return view_model(spec, supernet, [&](const std::string& name) {
    const std::string unit = unit_of(name);
    const auto it = from.find(unit);
    return it == from.end() ? ours.at(name) : theirs.at(it->second + name.substr(unit.size()));
  });
}

Choices MixerBank::all(int kind) const {
  Choices choices;
  for (size_t i = 0; i < layers_.size(); ++i) {
    choices.push_back(kind > 0 && !has(static_cast<int64_t>(i), kind) ? 0 : kind);
  }
  return choices;
}

}  // namespace cambium
