// Cambium's own layout: config.json lists every layer with its mixer and the mixer's options, and
// tensors carry our names under "model.". Any mixer may stand in any layer.
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

Json write_options(const Options& options) {
  Json json = Json::object();
  for (const auto& [key, value] : options.values()) {
    std::visit([&, k = key](const auto& v) { json[k] = v; }, value);
  }
  return json;
}

Options read_options(const Json& json, const std::string& where) {
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
      fail("{}: expected '{}' to be a number, a string, true or false, got {}", where, key,
           value.dump());
    }
  }
  return options;
}

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  // A copy: what is added to config below moves its values.
  const Json layers = config.value("layers", Json());
  expect(layers.is_array() && !layers.empty(), "{}: expected the list 'layers'", where);
  const int64_t head_dim = config::integer(config, "rope_dim", where);
  // What the shared reader asks for and this layout says per layer.
  config["num_attention_heads"] = 1;
  config["head_dim"] = head_dim;
  config["intermediate_size"] = 1;
  config["num_hidden_layers"] = layers.size();
  ModelSpec spec = config::read_decoder(config, "cambium", where);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const Json& layer = layers[i];
    const std::string inside = fmt::format("{}: layers[{}]", where, i);
    expect(layer.is_object() && layer.contains("mixer") && layer["mixer"].is_string(),
           "{}: expected an object with the string 'mixer'", inside);
    const bool removed = config::flag_or(layer, "removed", false, inside);
    spec.layers[i] = {
        .mixer = {layer["mixer"].get<std::string>(),
                  read_options(layer.value("options", Json::object()), inside + ".options")},
        .ff_inner = config::integer_or(layer, "intermediate_size", 0, inside),
        .removed = removed};
    find_mixer_kind(spec.layers[i].mixer.kind);
    expect(removed || spec.layers[i].ff_inner > 0, "{}: expected intermediate_size > 0", inside);
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"CambiumForCausalLM"});
  config["model_type"] = "cambium";
  config.update(config::write_common(spec));
  config["rope_dim"] = spec.rope.dim;
  Json layers = Json::array();
  for (const LayerSpec& layer : spec.layers) {
    Json entry;
    entry["mixer"] = layer.mixer.kind;
    entry["options"] = write_options(layer.mixer.options);
    entry["intermediate_size"] = layer.ff_inner;
    if (layer.removed) {
      entry["removed"] = true;
    }
    layers.push_back(entry);
  }
  config["layers"] = layers;
  return config.dump(1);
}

std::string tensor_name(const ModelSpec& /*spec*/, const std::string& ours) {
  return config::decoder_tensor_name(ours, "mixer.");
}

}  // namespace

Family cambium_family() {
  return {"cambium", {"cambium"}, read, write, tensor_name};
}

}  // namespace cambium
