// Families of Mamba-2 and attention: Nemotron-H (one unit a layer), Falcon-H1 (both side by side),
// Granite 4 hybrid and Bamba (one or the other, then a feed-forward).

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

/// A Mamba-2 of `heads` x `dim` channels whose norm goes by groups.
UnitSpec mamba2(int64_t heads, int64_t dim, int64_t state, int64_t groups, int64_t conv,
                int64_t norm_groups, double eps, const std::string& where) {
  expect(
      heads % groups == 0 && (heads * dim) % norm_groups == 0,
      "{}: expected the groups of Mamba-2 to divide its heads and channels, got {} and {} groups "
      "for {} heads of {}",
      where, groups, norm_groups, heads, dim);
  return {"mamba2",
          {{"heads", heads},
           {"head_dim", dim},
           {"state", state},
           {"b_heads", groups},
           {"conv", conv},
           {"norm_group", heads * dim / norm_groups},
           {"norm_eps", eps}}};
}

/// The keys of Granite, Bamba and Falcon-H1.
UnitSpec read_mamba2(const Json& config, double eps, bool norm_by_groups,
                     const std::string& where) {
  const int64_t groups = config::integer_or(config, "mamba_n_groups", 1, 1, kMaxHeads, where);
  expect(config::flag_or(config, "mamba_conv_bias", true, where) &&
             !config::flag_or(config, "mamba_proj_bias", false, where),
         "{}: expected mamba_conv_bias true and mamba_proj_bias false", where);
  return mamba2(config::integer(config, "mamba_n_heads", 1, kMaxHeads, where),
                config::integer(config, "mamba_d_head", 1, kMaxHeadDim, where),
                config::integer(config, "mamba_d_state", 1, kMaxHeadDim, where), groups,
                config::integer_or(config, "mamba_d_conv", 4, 2, 64, where),
                norm_by_groups ? groups : 1, eps, where);
}

UnitSpec attention(const config::Sizes& sizes) {
  return {"attention",
          {{"heads", sizes.heads}, {"kv_heads", sizes.kv_heads}, {"head_dim", sizes.head_dim}}};
}

void refuse_biases(const Json& config, std::initializer_list<const char*> keys,
                   const std::string& where) {
  for (const char* key : keys) {
    expect(!config::flag_or(config, key, false, where), "{}: '{}' is true, which is not supported",
           where, key);
  }
}

float real(const Json& config, const char* key, double fallback, const std::string& where) {
  return static_cast<float>(config::real_or(config, key, fallback, where));
}

UnitSpec nemotron_experts(const Json& config, const std::string& where) {
  const int64_t shared =
      config::integer_or(config, "n_shared_experts", 0, 0, kMaxExperts, where) > 0
          ? config::integer(config, "moe_shared_expert_intermediate_size", 1, kMaxInner, where)
          : 0;
  expect(!config::has(config, "moe_latent_size"),
         "{}: 'moe_latent_size' puts the experts behind a narrower width, which is not supported",
         where);
  return {"experts",
          {{"experts", config::integer(config, "n_routed_experts", 1, kMaxExperts, where)},
           {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
           {"inner", config::integer(config, "moe_intermediate_size", 1, kMaxInner, where)},
           {"router", std::string("sigmoid")},
           {"router_bias", true},
           {"groups", config::integer_or(config, "n_group", 1, 1, kMaxExperts, where)},
           {"group_top", config::integer_or(config, "topk_group", 1, 1, kMaxExperts, where)},
           {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
           {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)},
           {"shared", shared},
           {"activation", std::string("relu2")}}};
}

ModelSpec read_nemotron_h(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "nemotron_h", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.norm.eps = real(config, "layer_norm_epsilon", spec.norm.eps, where);
  spec.rope.dim = sizes.head_dim;  // no layer rotates
  refuse_biases(config, {"use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias"}, where);
  const std::string pattern = config::text_or(config, "hybrid_override_pattern", "", where);
  expect(std::ssize(pattern) == sizes.layers,
         "{}: expected {} letters in hybrid_override_pattern (num_hidden_layers), got {}", where,
         sizes.layers, pattern.size());
  UnitSpec attends = attention(sizes);
  attends.options.set("rope", false);
  const int64_t groups = config::integer(config, "n_groups", 1, kMaxHeads, where);
  const UnitSpec mamba = mamba2(config::integer(config, "mamba_num_heads", 1, kMaxHeads, where),
                                config::integer(config, "mamba_head_dim", 1, kMaxHeadDim, where),
                                config::integer(config, "ssm_state_size", 1, kMaxHeadDim, where),
                                groups, config::integer_or(config, "conv_kernel", 4, 2, 64, where),
                                groups, spec.norm.eps, where);
  for (size_t i = 0; i < pattern.size(); ++i) {
    UnitSpec unit;
    switch (pattern[i]) {
      case 'M':
        unit = mamba;
        break;
      case '*':
        unit = attends;
        break;
      case '-':
        unit = {"feed_forward",
                {{"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
                 {"activation", config::text_or(config, "mlp_hidden_act", "relu2", where)}}};
        break;
      case 'E':
        unit = nemotron_experts(config, where);
        break;
      default:
        fail("{}: expected M, *, - or E for layer {} in hybrid_override_pattern, got '{}'", where,
             i, pattern[i]);
    }
    spec.layers.push_back({{{.norm = spec.norm, .units = {unit}}}});
  }
  return spec;
}

std::vector<double> multipliers(const Json& config, const char* key, size_t count,
                                const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return std::vector<double>(count, 1.0);
  }
  expect(it->is_array() && it->size() == count, "{}: expected '{}' to be a list of {} numbers",
         where, key, count);
  std::vector<double> list;
  for (const Json& entry : *it) {
    list.push_back(config::real_or(Json{{key, entry}}, key, 1.0, where));
  }
  return list;
}

ModelSpec read_falcon_h1(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "falcon_h1", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  spec.embedding_scale = real(config, "embedding_multiplier", 1.0, where);
  spec.logit_scale = real(config, "lm_head_multiplier", 1.0, where);
  refuse_biases(config, {"attention_bias", "mlp_bias", "projectors_bias"}, where);
  UnitSpec mamba = read_mamba2(config, spec.norm.eps, true, where);
  mamba.name = "mamba";
  mamba.out = real(config, "ssm_out_multiplier", 1.0, where);
  mamba.options.set("norm", config::flag_or(config, "mamba_rms_norm", false, where));
  mamba.options.set("in_scale", config::real_or(config, "ssm_in_multiplier", 1.0, where));
  mamba.options.set("row_scales", multipliers(config, "ssm_multipliers", 5, where));
  expect(real(config, "attention_in_multiplier", 1.0, where) == 1.0F,
         "{}: expected attention_in_multiplier 1, as in every published model", where);
  expect(!config::flag_or(config, "mamba_norm_before_gate", false, where),
         "{}: expected mamba_norm_before_gate false, as in every published model", where);
  UnitSpec attends = attention(sizes);
  attends.name = "self_attn";
  attends.out = real(config, "attention_out_multiplier", 1.0, where);
  attends.options.set("key_scale", config::real_or(config, "key_multiplier", 1.0, where));
  const std::vector<double> mlp = multipliers(config, "mlp_multipliers", 2, where);
  const UnitSpec feed_forward{
      "swiglu",
      {{"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
       {"gate_scale", mlp[0]}},
      static_cast<float>(mlp[1])};
  spec.layers.assign(static_cast<size_t>(sizes.layers),
                     {{{.norm = spec.norm, .units = {mamba, attends}},
                       {.norm = spec.norm, .units = {feed_forward}}}});
  return spec;
}

ModelSpec read_granite_hybrid(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "granite_hybrid", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  spec.embedding_scale = real(config, "embedding_multiplier", 1.0, where);
  spec.logit_scale = 1.0F / real(config, "logits_scaling", 1.0, where);
  refuse_biases(config, {"attention_bias"}, where);
  const float residual = real(config, "residual_multiplier", 1.0, where);
  UnitSpec attends = attention(sizes);
  attends.options.set("scale", config::real_or(config, "attention_multiplier", 1.0, where));
  attends.options.set("rope",
                      config::text_or(config, "position_embedding_type", "nope", where) == "rope");
  UnitSpec mamba = read_mamba2(config, spec.norm.eps, false, where);
  const int64_t experts = config::integer_or(config, "num_local_experts", 0, 0, kMaxExperts, where);
  const int64_t shared = config::integer(config, "shared_intermediate_size", 1, kMaxInner, where);
  UnitSpec feed_forward{"swiglu", {{"inner", shared}}};
  if (experts > 0) {
    feed_forward = {"experts",
                    {{"experts", experts},
                     {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
                     {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
                     {"router", std::string("softmax of the chosen")},
                     {"shared", shared}}};
  }
  attends.out = mamba.out = feed_forward.out = residual;
  for (const std::string& type :
       config::texts(config, "layer_types", static_cast<size_t>(sizes.layers), where)) {
    expect(type == "mamba" || type == "attention",
           "{}: expected mamba or attention in layer_types, got '{}'", where, type);
    spec.layers.push_back({{{.norm = spec.norm, .units = {type == "mamba" ? mamba : attends}},
                            {.norm = spec.norm, .units = {feed_forward}}}});
  }
  return spec;
}

ModelSpec read_bamba(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "bamba", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  Json rope = config;
  if (!config::has(rope, "partial_rotary_factor")) {
    rope["partial_rotary_factor"] = 0.5;  // the default of transformers' BambaConfig
  }
  spec.rope = config::read_rope(rope, sizes.head_dim, spec.max_positions, where);
  refuse_biases(config, {"attention_bias", "mlp_bias"}, where);
  const UnitSpec mamba = read_mamba2(config, spec.norm.eps, false, where);
  const int64_t inner = config::integer(config, "intermediate_size", 1, kMaxInner, where);
  spec.layers.assign(static_cast<size_t>(sizes.layers), decoder_layer(mamba, inner, spec.norm));
  const auto it = config.find("attn_layer_indices");
  expect(it != config.end() && it->is_array(), "{}: expected the list 'attn_layer_indices'", where);
  for (const Json& index : *it) {
    const int64_t i = config::integer(Json{{"attn_layer_indices", index}}, "attn_layer_indices", 0,
                                      sizes.layers - 1, where);
    spec.layers[static_cast<size_t>(i)] = decoder_layer(attention(sizes), inner, spec.norm);
  }
  return spec;
}

}  // namespace

Family nemotron_h_family() {
  return config::described_family("nemotron_h", {"nemotron_h"}, read_nemotron_h);
}

Family falcon_h1_family() {
  return config::described_family("falcon_h1", {"falcon_h1"}, read_falcon_h1);
}

Family granite_hybrid_family() {
  return {"granite_hybrid",
          {"granitemoehybrid"},
          read_granite_hybrid,
          config::not_written,
          config::decoder_tensors({
              {.theirs = "model.layers.*.shared_mlp.input_linear.*",
               .rows = {"layers.*.feed_forward.gate.*", "layers.*.feed_forward.up.*"}},
              {"layers.*.feed_forward.down.*", "model.layers.*.shared_mlp.output_linear.*"},
              {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mamba.*", .mixer = "mamba2"},
          }),
          config::decoder_ignored()};
}

Family bamba_family() {
  return {"bamba",
          {"bamba"},
          read_bamba,
          config::not_written,
          config::decoder_tensors({
              {"norm.*", "model.final_layernorm.*"},
              {"layers.*.post_norm.*", "model.layers.*.pre_ff_layernorm.*"},
              {"layers.*.feed_forward.gate.*", "model.layers.*.feed_forward.gate_proj.*"},
              {"layers.*.feed_forward.up.*", "model.layers.*.feed_forward.up_proj.*"},
              {"layers.*.feed_forward.down.*", "model.layers.*.feed_forward.down_proj.*"},
              {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mamba.*", .mixer = "mamba2"},
          }),
          config::decoder_ignored()};
}

}  // namespace cambium
