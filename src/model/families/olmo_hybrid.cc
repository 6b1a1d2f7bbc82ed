// OLMo Hybrid: Gated DeltaNet before whose branches a norm stands, and attention, often without
// positions, whose branches are normed after, as OLMo 2's.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

namespace cambium {
namespace {

using config::Json;

ModelSpec read(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "olmo_hybrid", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  config::refuse_flags(config, {"attention_bias"}, where);
  // Models without positions say {"rope_theta": null}; where nothing is said there are some.
  const auto parameters = config.find("rope_parameters");
  const bool rotates = parameters == config.end() || !parameters->is_object() ||
                       !parameters->contains("rope_theta") ||
                       config::has(*parameters, "rope_theta");
  if (rotates) {
    spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  } else {
    spec.rope.dim = sizes.head_dim;
  }
  UnitSpec attends = config::attention_of(sizes);
  attends.options.set("rope", rotates);
  attends.options.set("qk_norm_eps", static_cast<double>(spec.norm.eps));
  attends.options.set("qk_norm_over", std::string("width"));
  const int64_t heads =
      config::integer_or(config, "linear_num_value_heads", sizes.heads, 1, kMaxHeads, where);
  const int64_t key_heads =
      config::integer_or(config, "linear_num_key_heads", heads, 1, kMaxHeads, where);
  const int64_t key_dim =
      config::integer_or(config, "linear_key_head_dim",
                         std::max<int64_t>(1, 3 * spec.width / (4 * heads)), 1, kMaxHeadDim, where);
  const UnitSpec delta{
      "gated_delta_net",
      {{"heads", heads},
       {"q_heads", key_heads},
       {"k_heads", key_heads},
       {"key_dim", key_dim},
       {"value_dim",
        config::integer_or(config, "linear_value_head_dim", 2 * key_dim, 1, kMaxHeadDim, where)},
       {"conv", config::integer_or(config, "linear_conv_kernel_dim", 4, 2, 64, where)},
       {"norm_eps", 1e-5},  // whatever rms_norm_eps is
       {"allow_neg_eigval", config::flag_or(config, "linear_allow_neg_eigval", true, where)}}};
  const UnitSpec feed_forward{
      "swiglu", {{"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)}}};
  const auto before = [&](const UnitSpec& unit) {
    return BranchSpec{.norm = spec.norm, .units = {unit}};
  };
  const auto after = [&](const UnitSpec& unit) {
    return BranchSpec{.norm = {NormKind::kNone}, .units = {unit}, .out_norm = spec.norm};
  };
  for (const std::string& type :
       config::texts(config, "layer_types", static_cast<size_t>(sizes.layers), where)) {
    expect(type == "linear_attention" || type == "full_attention",
           "{}: expected linear_attention or full_attention in layer_types, got '{}'", where, type);
    spec.layers.push_back(type == "linear_attention"
                              ? LayerSpec{{before(delta), before(feed_forward)}}
                              : LayerSpec{{after(attends), after(feed_forward)}});
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "OlmoHybridForCausalLM", "olmo_hybrid");
  const Options attends = config::mixer_or_small(spec, "attention").options;
  const Options delta = config::mixer_or_small(spec, "gated_delta_net").options;
  config["intermediate_size"] =
      config::first_unit(spec, "swiglu").options.integer("swiglu", "inner");
  config::write_attention(config, attends);
  if (!attends.flag("attention", "rope", true)) {
    config.erase("rope_theta");
    config["rope_parameters"] = {{"rope_theta", nullptr}};
  }
  config["layer_types"] = Json::array();
  for (const LayerSpec& layer : spec.layers) {
    config["layer_types"].push_back(layer.mixes_by("attention") ? "full_attention"
                                                                : "linear_attention");
  }
  config["linear_num_value_heads"] = delta.integer("gated_delta_net", "heads");
  config["linear_num_key_heads"] = delta.integer("gated_delta_net", "k_heads");
  config["linear_key_head_dim"] = delta.integer("gated_delta_net", "key_dim");
  config["linear_value_head_dim"] = delta.integer("gated_delta_net", "value_dim");
  config["linear_conv_kernel_dim"] = delta.integer("gated_delta_net", "conv");
  config["linear_allow_neg_eigval"] = delta.flag("gated_delta_net", "allow_neg_eigval", false);
  return config::expressed(config, spec, read);
}

/// A tensor that is rows of one of our parameters, in layers of the delta rule.
TensorRule rows(const char* theirs, std::string_view ours) {
  return {.theirs = theirs, .mixer = "gated_delta_net", .rows = {ours}};
}

Family olmo_hybrid_family() {
  constexpr std::string_view kDelta = "gated_delta_net";
  return {"olmo_hybrid",
          {"olmo_hybrid"},
          read,
          write,
          config::decoder_tensors({
              {"layers.*.input_norm.*", "model.layers.*.attention_layer_norm.*"},
              {"layers.*.post_norm.*", "model.layers.*.feedforward_layer_norm.*"},
              {"layers.*.out_norm_1.*", "model.layers.*.post_attention_layernorm.*"},
              // What transformers calls it when it saves.
              {"layers.*.out_norm_1.*", "model.layers.*.feedforward_layer_norm.*"},
              {"layers.*.out_norm_2.*", "model.layers.*.post_feedforward_layernorm.*"},
              rows("model.layers.*.linear_attn.q_proj.*", "layers.*.mixer.in_proj.*:q"),
              rows("model.layers.*.linear_attn.k_proj.*", "layers.*.mixer.in_proj.*:k"),
              rows("model.layers.*.linear_attn.v_proj.*", "layers.*.mixer.in_proj.*:v"),
              rows("model.layers.*.linear_attn.g_proj.*", "layers.*.mixer.in_proj.*:z"),
              rows("model.layers.*.linear_attn.b_proj.*", "layers.*.mixer.ba_proj.*:beta"),
              rows("model.layers.*.linear_attn.a_proj.*", "layers.*.mixer.ba_proj.*:decay"),
              rows("model.layers.*.linear_attn.q_conv1d.*", "layers.*.mixer.conv1d.*:q"),
              rows("model.layers.*.linear_attn.k_conv1d.*", "layers.*.mixer.conv1d.*:k"),
              rows("model.layers.*.linear_attn.v_conv1d.*", "layers.*.mixer.conv1d.*:v"),
              {"layers.*.mixer.norm.*", "model.layers.*.linear_attn.o_norm.*", kDelta},
              {"layers.*.mixer.out_proj.*", "model.layers.*.linear_attn.o_proj.*", kDelta},
              {"layers.*.mixer.*", "model.layers.*.linear_attn.*", kDelta},
          }),
          config::decoder_ignored()};
}

}  // namespace

std::vector<Family> olmo_hybrid_families() {
  return {olmo_hybrid_family()};
}

}  // namespace cambium
