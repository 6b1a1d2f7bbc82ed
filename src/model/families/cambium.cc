// Cambium's own layout: config.json lists every layer, and tensors carry our names under "model.".
// A layer of a mixer and a SwiGLU is {"mixer", "options", "intermediate_size"}; any other is
// {"branches": [{"norm", "norm_eps", "out_norm", "out_norm_eps", "active", "keep",
// "residual_normed", "units": [{"kind", "options", "out", "name"}]}], "rope"}, where what is absent
// is as in BranchSpec, and the norm as in the model. "rope" of a layer counts the model's
// rotations: 0 is the one that rope_dim, rope_theta and rope_scaling say, and "more_ropes" lists
// others by the same keys. The presets of a supernet are "presets": [{"name", "mixers": [the label
// of the mixer of each layer that has a choice, "" of any other]}]. By auto_map transformers finds
// the code that travels with it (model/transformers/).
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/supernet.h"
#include "model/transformers/code.h"

namespace cambium {
namespace {

using config::Json;

/// What configurations call the mixer of a layer that has none.
constexpr const char* kNoMixer = "identity";

Json write_options(const Options& options) {
  Json json = Json::object();
  for (const auto& [key, value] : options.values()) {
    std::visit([&, k = key](const auto& v) { json[k] = v; }, value);
  }
  return json;
}

Options read_options(const Json& json, const std::string& where) {
  expect(json.is_object(), "{}: expected an object", where);
  Options options;
  for (const auto& [key, value] : json.items()) {
    if (value.is_boolean()) {
      options.set(key, value.get<bool>());
    } else if (value.is_number_integer()) {
      options.set(key, value.get<int64_t>());
    } else if (value.is_number()) {
      options.set(key, value.get<double>());
    } else if (value.is_string()) {
      options.set(key, value.get<std::string>());
    } else {
      const auto number = [](const Json& v) { return v.is_number(); };
      expect(value.is_array() && std::all_of(value.begin(), value.end(), number),
             "{}: expected '{}' to be a number, a string, true, false or a list of numbers", where,
             key);
      options.set(key, value.get<std::vector<double>>());
    }
  }
  return options;
}

float factor_or(const Json& json, const char* key, double fallback, const std::string& where) {
  return static_cast<float>(config::real_or(json, key, fallback, where));
}

/// The list `key` of objects, each with its place for errors.
template <class Read>
void each(const Json& json, const char* key, const std::string& where, const Read& read) {
  const auto it = json.find(key);
  expect(it != json.end() && it->is_array(), "{}: expected the list '{}'", where, key);
  for (size_t i = 0; i < it->size(); ++i) {
    const std::string inside = fmt::format("{}.{}[{}]", where, key, i);
    expect((*it)[i].is_object(), "{}: expected an object", inside);
    read((*it)[i], inside);
  }
}

BranchSpec read_branch(const Json& json, const NormSpec& norm, const std::string& where) {
  BranchSpec branch;
  branch.norm.kind =
      find_norm_kind(config::text_or(json, "norm", norm_kind_name(norm.kind), where));
  branch.norm.eps = factor_or(json, "norm_eps", norm.eps, where);
  branch.out_norm.kind = find_norm_kind(config::text_or(json, "out_norm", "none", where));
  branch.out_norm.eps = factor_or(json, "out_norm_eps", NormSpec{}.eps, where);
  branch.active = static_cast<int>(config::integer_or(json, "active", -1, -1, kMaxHeads, where));
  branch.beside = static_cast<int>(config::integer_or(json, "beside", 0, 0, kMaxHeads, where));
  branch.keep = factor_or(json, "keep", 1.0, where);
  branch.residual_normed = config::flag_or(json, "residual_normed", false, where);
  each(json, "units", where, [&](const Json& unit, const std::string& inside) {
    branch.units.push_back({config::text_or(unit, "kind", "", inside),
                            read_options(unit.value("options", Json::object()), inside),
                            factor_or(unit, "out", 1.0, inside),
                            config::text_or(unit, "name", "", inside)});
    find_unit_kind(branch.units.back().kind);
  });
  expect(branch.active < static_cast<int>(branch.units.size()),
         "{}: expected 'active' below {}, the number of its units, got {}", where,
         branch.units.size(), branch.active);
  expect(branch.beside == 0 || (branch.active >= 0 && branch.active + branch.beside <
                                                          static_cast<int>(branch.units.size())),
         "{}: expected 'beside' to count units that stand after a choice, of which one is active, "
         "got {}",
         where, branch.beside);
  return branch;
}

/// A layer as every checkpoint before branches has it: a mixer and the size of a SwiGLU. "identity"
/// is a branch without units.
LayerSpec read_plain_layer(const Json& json, const NormSpec& norm, const std::string& where) {
  expect(json.contains("mixer") && json["mixer"].is_string(),
         "{}: expected an object with the string 'mixer'", where);
  if (config::flag_or(json, "removed", false, where)) {
    return {};
  }
  const int64_t inner = config::integer(json, "intermediate_size", 1, kMaxInner, where);
  const std::string mixer = json["mixer"].get<std::string>();
  const Options options = read_options(json.value("options", Json::object()), where + ".options");
  if (mixer == kNoMixer) {
    LayerSpec layer = decoder_layer({"swiglu"}, inner, norm);
    layer.branches.front().units.clear();
    return layer;
  }
  find_unit_kind(mixer);
  return decoder_layer({mixer, options}, inner, norm);
}

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  // A copy: what is added to config below moves its values.
  const Json layers = config.value("layers", Json());
  expect(layers.is_array() && !layers.empty(), "{}: expected the list 'layers'", where);
  const int64_t head_dim = config::integer(config, "rope_dim", 0, kMaxHeadDim, where);
  // What the shared reader asks for and this layout says per layer.
  config["num_attention_heads"] = 1;
  config["head_dim"] = head_dim;
  config["intermediate_size"] = 1;
  config["num_hidden_layers"] = layers.size();
  ModelSpec spec = config::read_decoder(config, "cambium", where);
  spec.norm.kind = find_norm_kind(config::text_or(config, "norm", "rms", where));
  spec.embedding_scale = factor_or(config, "embedding_scale", 1.0, where);
  spec.logit_scale = factor_or(config, "logit_scale", 1.0, where);
  spec.logit_cap = static_cast<float>(
      in_range(where, "logit_cap", config::real_or(config, "logit_cap", 0.0, where), 0.0, 1e9));
  if (config.contains("more_ropes")) {
    each(config, "more_ropes", where, [&](const Json& rope, const std::string& inside) {
      const int64_t dim = config::integer(rope, "rope_dim", 0, kMaxHeadDim, inside);
      spec.more_ropes.push_back(config::read_rope(rope, dim, spec.max_positions, inside));
    });
  }
  spec.layers.clear();
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string inside = fmt::format("{}: layers[{}]", where, i);
    expect(layers[i].is_object(), "{}: expected an object with the string 'mixer'", inside);
    LayerSpec& layer = spec.layers.emplace_back();
    if (!layers[i].contains("branches")) {
      layer = read_plain_layer(layers[i], spec.norm, inside);
      continue;
    }
    each(layers[i], "branches", inside, [&](const Json& branch, const std::string& place) {
      layer.branches.push_back(read_branch(branch, spec.norm, place));
    });
    layer.rope = static_cast<int>(
        config::integer_or(layers[i], "rope", 0, 0, std::ssize(spec.more_ropes), inside));
  }
  if (config.contains("presets")) {
    each(config, "presets", where, [&](const Json& preset, const std::string& inside) {
      const std::vector<std::string> labels =
          config::texts(preset, "mixers", layers.size(), inside);
      put_preset(spec, {config::text_or(preset, "name", "", inside),
                        units_of_labels(spec, labels, inside)});
    });
  }
  return spec;
}

Json write_branch(const BranchSpec& branch, const NormSpec& norm) {
  Json json;
  if (branch.norm.kind != norm.kind) {
    json["norm"] = norm_kind_name(branch.norm.kind);
  }
  if (branch.norm.eps != norm.eps) {
    json["norm_eps"] = config::shortest(branch.norm.eps);
  }
  if (branch.out_norm.kind != NormKind::kNone) {
    json["out_norm"] = norm_kind_name(branch.out_norm.kind);
    json["out_norm_eps"] = config::shortest(branch.out_norm.eps);
  }
  if (branch.active >= 0) {
    json["active"] = branch.active;
  }
  if (branch.beside > 0) {
    json["beside"] = branch.beside;
  }
  if (branch.keep != 1.0F) {
    json["keep"] = config::shortest(branch.keep);
  }
  if (branch.residual_normed) {
    json["residual_normed"] = true;
  }
  json["units"] = Json::array();
  for (const UnitSpec& unit : branch.units) {
    Json entry = {{"kind", unit.kind}, {"options", write_options(unit.options)}};
    if (unit.out != 1.0F) {
      entry["out"] = config::shortest(unit.out);
    }
    if (!unit.name.empty()) {
      entry["name"] = unit.name;
    }
    json["units"].push_back(entry);
  }
  return json;
}

Json write_layer(const LayerSpec& layer, const NormSpec& norm) {
  if (layer.removed()) {
    return {{"mixer", kNoMixer},
            {"options", Json::object()},
            {"intermediate_size", 0},
            {"removed", true}};
  }
  // Without biases in the feed-forward and a name of the mixer's own, which that form has no place
  // for.
  const UnitSpec* mixer = layer.mixer();
  if (config::is_decoder_layer(layer, norm) &&
      layer == decoder_layer({mixer->kind, mixer->options}, config::inner_of(layer), norm)) {
    return {{"mixer", layer.mixer()->kind},
            {"options", write_options(layer.mixer()->options)},
            {"intermediate_size", config::inner_of(layer)}};
  }
  Json json;
  for (const BranchSpec& branch : layer.branches) {
    json["branches"].push_back(write_branch(branch, norm));
  }
  if (layer.rope > 0) {
    json["rope"] = layer.rope;
  }
  return json;
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"CambiumForCausalLM"});
  config["model_type"] = "cambium";
  config["auto_map"] = {{"AutoConfig", "configuration_cambium.CambiumConfig"},
                        {"AutoModel", "modeling_cambium.CambiumModel"},
                        {"AutoModelForCausalLM", "modeling_cambium.CambiumForCausalLM"}};
  config.update(config::write_common(spec));
  if (spec.norm.kind != NormKind::kRms) {
    config["norm"] = norm_kind_name(spec.norm.kind);
  }
  if (spec.embedding_scale != 1.0F) {
    config["embedding_scale"] = config::shortest(spec.embedding_scale);
  }
  if (spec.logit_scale != 1.0F) {
    config["logit_scale"] = config::shortest(spec.logit_scale);
  }
  if (spec.logit_cap > 0.0F) {
    config["logit_cap"] = config::shortest(spec.logit_cap);
  }
  config["rope_dim"] = spec.rope.dim;
  for (const RopeConfig& rope : spec.more_ropes) {
    Json& entry =
        config["more_ropes"].emplace_back(Json{{"rope_dim", rope.dim}, {"rope_theta", rope.theta}});
    if (rope.scaling != RopeScaling::kNone) {
      entry["rope_scaling"] = config::write_rope_scaling(rope);
    }
    if (rope.interleaved) {
      entry["rope_interleave"] = true;
    }
  }
  Json layers = Json::array();
  for (const LayerSpec& layer : spec.layers) {
    layers.push_back(write_layer(layer, spec.norm));
  }
  config["layers"] = layers;
  for (const Preset& preset : spec.presets) {
    config["presets"].push_back(
        {{"name", preset.name}, {"mixers", active_labels(spec, preset.active)}});
  }
  return config.dump(1);
}

Family cambium_family() {
  std::vector<TensorRule> tensors =
      config::decoder_tensors({{"layers.*.mixer.*", "model.layers.*.mixer.*"},
                               {"layers.*.feed_forward.alpha_p", "model.layers.*.mlp.alpha_p"},
                               {"layers.*.feed_forward.alpha_n", "model.layers.*.mlp.alpha_n"}});
  tensors.push_back({"*", "model.*"});  // units with names of their own
  return {.name = "cambium",
          .model_types = {"cambium"},
          .read_config = read,
          .write_config = write,
          .tensors = tensors,
          .ignored = config::decoder_ignored(),
          .mtp = {.tensors = {"kept.*"}},
          .code = {{"configuration_cambium.py", configuration_cambium_py},
                   {"feed_forwards_cambium.py", feed_forwards_cambium_py},
                   {"mixers_cambium.py", mixers_cambium_py},
                   {"modeling_cambium.py", modeling_cambium_py},
                   {"sequences_cambium.py", sequences_cambium_py}}};
}

}  // namespace

std::vector<Family> cambium_families() {
  return {cambium_family()};
}

}  // namespace cambium
