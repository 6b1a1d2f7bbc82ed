// Apriel-H1: Mistral layers, some of which have a grouped Mamba in place of attention ("m2" in
// hybrid_block_layout; "t" is attention, "i" a removed layer).
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

UnitSpec read_mamba(const Json& config, int64_t width, const std::string& where) {
  const auto it = config.find("ssm_cfg");
  expect(it != config.end() && it->is_object(),
         "{}: expected the object 'ssm_cfg' for the m2 layers of hybrid_block_layout", where);
  const Json& ssm = *it;
  const std::string inside = where + ": ssm_cfg";
  const int64_t inner = config::integer(ssm, "d_inner", 1, kMaxInner, inside);
  int64_t rank = (width + 15) / 16;  // "auto"
  if (const auto r = ssm.find("dt_rank"); r != ssm.end() && r->is_number_integer()) {
    rank = config::integer(ssm, "dt_rank", 1, kMaxInner, inside);
  }
  expect(!config::flag_or(ssm, "bias", false, inside),
         "{}: 'bias' is true; biases of the projections are not supported", inside);
  return {"mamba",
          {{"inner", inner},
           {"xb", config::integer_or(ssm, "d_xb", width, 1, kMaxInner, inside)},
           {"state", config::integer(ssm, "d_state", 1, kMaxHeadDim, inside)},
           {"dt_rank", rank},
           {"conv", config::integer_or(ssm, "d_conv", 4, 1, 64, inside)},
           {"repeat_before_conv", config::flag_or(ssm, "repeat_kv_before_conv", true, inside)},
           {"conv_bias", config::flag_or(ssm, "conv_bias", true, inside)}}};
}

ModelSpec read(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "apriel_h", where);
  const auto layout = config.find("hybrid_block_layout");
  expect(layout != config.end() && layout->is_array(),
         "{}: expected the list 'hybrid_block_layout' with a code for each layer", where);
  expect(layout->size() == spec.layers.size(),
         "{}: expected {} codes in hybrid_block_layout (num_hidden_layers), got {}", where,
         spec.layers.size(), layout->size());
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const std::string code = (*layout)[i].is_string() ? (*layout)[i].get<std::string>() : "";
    if (code == "m2") {
      *spec.layers[i].mixer() = read_mamba(config, spec.width, where);
    } else if (code == "i") {
      spec.layers[i] = {};
    } else {
      expect(code == "t",
             "{}: expected code t, m2 or i for layer {} in hybrid_block_layout, got {}", where, i,
             (*layout)[i].dump());
      const int64_t window =
          config::integer_or(config, "sliding_window", 0, 1, kMaxPositions, where);
      if (window > 0) {
        spec.layers[i].mixer()->options.set("window", window);
      }
    }
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"AprielHForCausalLM"});
  config["model_type"] = "apriel_h";
  config.update(config::write_common(spec));
  Json layout = Json::array();
  const LayerSpec* attention = nullptr;
  const LayerSpec* mamba = nullptr;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const LayerSpec*& first = layer.mixes_by("mamba") ? mamba : attention;
    if (layer.removed()) {
      layout.push_back("i");
      continue;
    }
    expect((layer.mixes_by("attention") || layer.mixes_by("mamba")) &&
               config::is_decoder_layer(layer, spec.norm),
           "an apriel_h config.json cannot express layer {} ({}); write the cambium layout instead",
           i, layer_kind(layer));
    first = first == nullptr ? &layer : first;
    expect(layer == *first,
           "an apriel_h config.json needs equal layers of a kind; layer {} differs", i);
    layout.push_back(layer.mixes_by("mamba") ? "m2" : "t");
  }
  expect(attention != nullptr, "an apriel_h config.json needs at least one attention layer");
  const Options& mixer = attention->mixer()->options;
  config["intermediate_size"] = config::inner_of(*attention);
  config["num_attention_heads"] = mixer.integer("attention", "heads");
  config["num_key_value_heads"] = mixer.integer("attention", "kv_heads");
  config["head_dim"] = mixer.integer("attention", "head_dim");
  const int64_t window = mixer.integer("attention", "window", 0);
  config["sliding_window"] = window > 0 ? Json(window) : Json();
  config["hybrid_block_layout"] = layout;
  if (mamba != nullptr) {
    const Options& m = mamba->mixer()->options;
    config["ssm_cfg"] = {{"d_state", m.integer("mamba", "state")},
                         {"d_xb", m.integer("mamba", "xb")},
                         {"d_inner", m.integer("mamba", "inner")},
                         {"expand", 1},
                         {"d_conv", m.integer("mamba", "conv", 4)},
                         {"conv_bias", m.flag("mamba", "conv_bias", true)},
                         {"bias", false},
                         {"dt_rank", m.integer("mamba", "dt_rank")},
                         {"dt_proj_bias", true},
                         {"repeat_kv_before_conv", m.flag("mamba", "repeat_before_conv", true)}};
  }
  config["torch_dtype"] = "float32";
  return config.dump(1);
}

}  // namespace

std::vector<Family> apriel_h_families() {
  return {
      {"apriel_h",
       {"apriel_h", "apriel_ssm_thinker_hybrid", "apriel_hybrid_ssm"},
       read,
       write,
       config::decoder_tensors(
           {{.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mixer.*", .mixer = "mamba"}}),
       config::decoder_ignored(),
       {{"mamba", "dt_rank", "mixer.dt_in_proj.weight"}}}};
}

}  // namespace cambium
