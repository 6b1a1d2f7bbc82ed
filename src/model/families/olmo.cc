// OLMo 2 and 3: no norm before a unit but one after it, and norms of q and k over all heads. OLMo 3
// has windows, whose layers turn without the scaling of the others.
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

constexpr config::DecoderTraits kOlmo{.attention_bias = true};

ModelSpec read_olmo(const Json& config, const char* family, const std::string& where) {
  ModelSpec spec = config::read_decoder(config, family, where, kOlmo);
  for (LayerSpec& layer : spec.layers) {
    for (BranchSpec& branch : layer.branches) {
      branch.norm = {NormKind::kNone};
      branch.out_norm = spec.norm;
    }
    layer.mixer()->options.set("qk_norm_eps", config::shortest(spec.norm.eps));
    layer.mixer()->options.set("qk_norm_over", "width");
  }
  return spec;
}

ModelSpec read_olmo2(const std::string& text, const std::string& where) {
  return read_olmo(config::parse(text, where), "olmo2", where);
}

ModelSpec read_olmo3(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  const auto [full, local] = config::split_ropes(config);
  ModelSpec spec = read_olmo(full, "olmo3", where);
  config::set_windows(spec, config::with_layer_types(config, 4, where),
                      config::integer_or(config, "sliding_window", 4096, 1, kMaxPositions, where),
                      0, where);
  RopeConfig plain{.theta = spec.rope.theta, .dim = spec.rope.dim};
  if (local) {
    plain = config::read_rope(*local, spec.rope.dim, spec.max_positions, where);
  }
  if (plain == spec.rope) {
    return spec;
  }
  spec.more_ropes.push_back(plain);
  for (LayerSpec& layer : spec.layers) {
    layer.rope = layer.mixer()->options.has("window") ? 1 : 0;
  }
  return spec;
}

Json write_olmo(const ModelSpec& spec, const char* architecture, const char* model_type) {
  Json config = config::write_attention_decoder(spec, architecture, model_type);
  config["attention_bias"] =
      spec.layers.front().mixer()->options.flag("attention", "out_bias", false);
  return config;
}

std::string write_olmo2(const ModelSpec& spec) {
  return config::expressed(write_olmo(spec, "Olmo2ForCausalLM", "olmo2"), spec, read_olmo2);
}

std::string write_olmo3(const ModelSpec& spec) {
  Json config = write_olmo(spec, "Olmo3ForCausalLM", "olmo3");
  config::write_layer_types(spec, config);
  return config::expressed(config, spec, read_olmo3);
}

Family olmo(const char* name, ModelSpec (*read)(const std::string& text, const std::string& where),
            std::string (*write)(const ModelSpec& spec)) {
  return {name,
          {name},
          read,
          write,
          config::decoder_tensors(
              {{"layers.*.out_norm_1.*", "model.layers.*.post_attention_layernorm.*"},
               {"layers.*.out_norm_2.*", "model.layers.*.post_feedforward_layernorm.*"}}),
          config::decoder_ignored()};
}

}  // namespace

std::vector<Family> olmo_families() {
  return {olmo("olmo2", read_olmo2, write_olmo2), olmo("olmo3", read_olmo3, write_olmo3)};
}

}  // namespace cambium
