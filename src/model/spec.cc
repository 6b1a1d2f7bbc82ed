#include "model/spec.h"

#include <algorithm>
#include <array>

#include "base/file.h"
#include "base/text.h"
#include "files/checksums.h"
#include "files/safetensors.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/kept_tensors.h"
#include "model/supernet.h"
#include "nn/units/units.h"

namespace cambium {

namespace {

/// None where the teacher has no such layer.
std::vector<UnitSpec> mixers_of(const ModelSpec& teacher, size_t layer) {
  return layer < teacher.layers.size() ? teacher.layers[layer].all_mixers()
                                       : std::vector<UnitSpec>{};
}

}  // namespace

std::string unit_prefix(int64_t layer, const UnitSpec& unit) {
  return "layers." + std::to_string(layer) + "." + unit_name(unit) + ".";
}

std::vector<int64_t> converted_layers(const ModelSpec& spec, const ModelSpec* teacher) {
  std::vector<int64_t> converted;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const bool other = teacher != nullptr ? layer.all_mixers() != mixers_of(*teacher, i)
                                          : layer.removed() || (layer.mixer() != nullptr &&
                                                                !is_attention(*layer.mixer()));
    if (other) {
      converted.push_back(static_cast<int64_t>(i));
    }
  }
  return converted;
}

std::vector<std::string> converted_mixers(const ModelSpec& spec, const ModelSpec& teacher) {
  std::vector<std::string> prefixes;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const std::vector<UnitSpec> old = mixers_of(teacher, i);
    for (const UnitSpec& mixer : spec.layers[i].all_mixers()) {
      if (std::find(old.begin(), old.end(), mixer) == old.end()) {
        prefixes.push_back(unit_prefix(static_cast<int64_t>(i), mixer));
      }
    }
  }
  return prefixes;
}

std::vector<std::string> attention_mixers(const ModelSpec& spec) {
  std::vector<std::string> prefixes;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (const UnitSpec& mixer : spec.layers[i].mixers()) {
      if (is_attention(mixer)) {
        prefixes.push_back(unit_prefix(static_cast<int64_t>(i), mixer));
      }
    }
  }
  return prefixes;
}

bool starts_with_one(const std::string& name, const std::vector<std::string>& prefixes) {
  return std::any_of(prefixes.begin(), prefixes.end(),
                     [&](const std::string& prefix) { return name.starts_with(prefix); });
}

std::string layer_map(const ModelSpec& spec) {
  std::string map;
  for (const LayerSpec& layer : spec.layers) {
    std::string letters;
    for (const UnitSpec& mixer : layer.mixers()) {
      letters += find_unit_kind(mixer.kind).letter;
    }
    if (letters.empty()) {
      const UnitSpec* unit = layer.feed_forward();
      letters = unit == nullptr ? '-' : find_unit_kind(unit->kind).letter;
    }
    map += letters.size() == 1 ? letters : "(" + letters + ")";
  }
  return map;
}

std::string layer_kind(const LayerSpec& layer) {
  const UnitSpec* mixer = layer.mixer();
  const UnitSpec* unit = mixer != nullptr ? mixer : layer.feed_forward();
  return unit == nullptr ? "removed" : unit->kind;
}

bool expresses(const Family& family, const ModelSpec& spec) {
  ModelSpec as = spec;
  as.family = family.name;
  try {
    return family.read_config(family.write_config(as), family.name) == as;
  } catch (const Error&) {
    return false;
  }
}

std::string fitting_family(const ModelSpec& spec) {
  return expresses(find_family(spec.family), spec) ? spec.family : "cambium";
}

namespace {

/// Sizes that the tensors say and released configurations do not: they hold "auto" or a number that
/// was not used.
void take_sizes(ModelSpec& spec, const Family& family, const SafeTensors& file) {
  for (const SizeRule& rule : family.sizes) {
    for (size_t i = 0; i < spec.layers.size(); ++i) {
      if (!spec.layers[i].mixes_by(rule.mixer)) {
        continue;
      }
      const std::string ours = "layers." + std::to_string(i) + "." + rule.parameter;
      const TensorEntry* entry = file.find(family.tensor_name(spec, ours));
      if (entry != nullptr && entry->shape.size() == 2) {
        spec.layers[i].mixer()->options.set(rule.option, entry->shape[0]);
      }
    }
  }
}

/// What the headers of the weights say; nothing where none lie beside the configuration.
void take_from_weights(ModelSpec& spec, const KeptSpec& kept, const Family& family,
                       const std::filesystem::path& dir) {
  const bool keeps = !family.mtp.tensors.empty() && !kept.family.empty();
  if ((family.sizes.empty() && !keeps) ||
      (!std::filesystem::exists(dir / "model.safetensors") &&
       !std::filesystem::exists(dir / "model.safetensors.index.json"))) {
    return;
  }
  const auto file = std::make_shared<const SafeTensors>(
      SafeTensors::open(dir.string(), SafeTensors::Check::kHeader));
  take_sizes(spec, family, *file);
  if (keeps) {
    take_kept(spec, kept, family, file);
  }
}

/// Sizes that do not go together are an Error with the file and the layer.
void expect_possible(const ModelSpec& spec, const std::string& path) {
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (const BranchSpec& branch : spec.layers[i].branches) {
      for (const UnitSpec& unit : branch.units) {
        try {
          make_unit(unit, spec.width);
        } catch (const Error& error) {
          fail("{}: layer {}: {}", path, i, error.what());
        }
      }
    }
  }
}

}  // namespace

static ModelSpec read_whole_spec(const std::filesystem::path& dir) {
  const bool folder = !std::filesystem::is_regular_file(dir);
  const std::string path = (folder ? dir / "config.json" : dir).string();
  if (folder) {
    verify_listed(dir.string(), std::array{"config.json"});
  }
  const std::string text = read_text_file(path);
  const config::Json json = config::parse(text, path);
  if (folder) {  // a configuration alone describes a model whatever its weights are
    config::refuse_quantised(json, path);
  }
  const auto it = json.find("model_type");
  expect(it != json.end() && it->is_string(), "{}: expected the string 'model_type'", path);
  const std::string type = it->get<std::string>();
  const std::string refusal = why_refused(type);
  expect(refusal.empty(), "{}: models of model_type '{}' are not supported: {}", path, type,
         refusal);
  std::vector<std::string> known;
  for (const Family& family : families()) {
    for (const std::string& candidate : family.model_types) {
      if (candidate == type) {
        ModelSpec spec = family.read_config(text, path);
        if (folder) {
          take_from_weights(spec, read_kept(json, family, path), family, dir);
        }
        expect_possible(spec, path);
        return spec;
      }
      known.push_back(candidate);
    }
  }
  fail("{}: unknown model_type '{}'{}; this build reads {}", path, type, did_you_mean(type, known),
       join(known, ", "));
}

ModelSpec read_spec(const std::filesystem::path& dir, const std::string& preset) {
  const ModelSpec spec = read_whole_spec(dir);
  return preset.empty() ? spec : unwrapped(spec, find_preset(spec, preset, dir.string()).active);
}

}  // namespace cambium
