// Families of experts behind linear, latent or gated attention: MiniMax-M1, DeepSeek-V3 and V3.2,
// Kimi-Linear. Described by their config.json; their tensors have no rules yet.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

std::string or_softmax(const Json& config, const char* key, const std::string& where) {
  return config::text_or(config, key, "softmax", where);
}

ModelSpec read_minimax_m1(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "minimax_m1", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope.theta = config::real_or(config, "rope_theta", 1e6, where);
  spec.rope.dim =
      config::integer_or(config, "rotary_dim", sizes.head_dim, 2, sizes.head_dim, where);
  expect(config::flag_or(config, "postnorm", false, where) &&
             config::integer_or(config, "shared_intermediate_size", 0, 0, kMaxInner, where) == 0,
         "{}: expected postnorm true and no shared expert, as in every published model", where);
  const auto branch = [&](const UnitSpec& unit, const std::string& kind) {
    const auto factor = [&](const char* which) {
      const std::string key = "layernorm_" + kind + "_" + which;
      return static_cast<float>(config::real_or(config, key.c_str(), 1.0, where));
    };
    BranchSpec made{.norm = spec.norm, .units = {unit}, .keep = factor("alpha")};
    made.units.front().out = factor("beta");
    made.residual_normed = true;
    return made;
  };
  const BranchSpec experts =
      branch({"experts",
              {{"experts", config::integer(config, "num_local_experts", 1, kMaxExperts, where)},
               {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
               {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
               {"router", std::string("softmax")},
               {"renormalise", true}}},
             "mlp");
  const auto kinds = config.find("attn_type_list");
  expect(kinds != config.end() && kinds->is_array() && std::ssize(*kinds) == sizes.layers,
         "{}: expected the list 'attn_type_list' of {} numbers, one a layer", where, sizes.layers);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    const Json& entry = (*kinds)[static_cast<size_t>(i)];
    const bool full =
        config::integer(Json{{"attn_type_list", entry}}, "attn_type_list", 0, 1, where) == 1;
    const UnitSpec unit = full ? UnitSpec{"attention",
                                          {{"heads", sizes.heads},
                                           {"kv_heads", sizes.kv_heads},
                                           {"head_dim", sizes.head_dim}}}
                               : UnitSpec{"lightning",
                                          {{"heads", sizes.heads},
                                           {"head_dim", sizes.head_dim},
                                           {"rows_by_head", true},
                                           {"layer_of_slopes", i},
                                           {"layers", sizes.layers}}};
    spec.layers.push_back({{branch(unit, full ? "full_attention" : "linear_attention"), experts}});
  }
  return spec;
}

/// The attention on latents of DeepSeek-V2 and later.
UnitSpec latent_attention(const Json& config, int64_t heads, const std::string& where) {
  UnitSpec unit{"latent_attention",
                {{"heads", heads},
                 {"q_rank", config::integer_or(config, "q_lora_rank", 0, 1, kMaxWidth, where)},
                 {"kv_rank", config::integer(config, "kv_lora_rank", 1, kMaxWidth, where)},
                 {"nope_dim", config::integer(config, "qk_nope_head_dim", 1, kMaxHeadDim, where)},
                 {"rope_dim", config::integer(config, "qk_rope_head_dim", 2, kMaxHeadDim, where)},
                 {"value_dim", config::integer(config, "v_head_dim", 1, kMaxHeadDim, where)}}};
  if (config::has(config, "index_n_heads")) {
    for (const auto& [ours, key] : {std::pair{"index_heads", "index_n_heads"},
                                    {"index_dim", "index_head_dim"},
                                    {"index_top", "index_topk"}}) {
      unit.options.set(ours, config::integer(config, key, 1, kMaxPositions, where));
    }
  }
  return unit;
}

/// Layers of one mixer each; dense below first_k_dense_replace, then experts.
void add_layers(ModelSpec& spec, const Json& config, const std::vector<UnitSpec>& mixers,
                const UnitSpec& experts, const std::string& where) {
  const int64_t dense =
      config::integer_or(config, "first_k_dense_replace", 0, 0, kMaxLayers, where);
  expect(config::integer_or(config, "moe_layer_freq", 1, 1, kMaxLayers, where) == 1,
         "{}: expected moe_layer_freq 1, as in every published model", where);
  const UnitSpec swiglu{
      "swiglu", {{"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)}}};
  for (size_t i = 0; i < mixers.size(); ++i) {
    const bool is_dense = static_cast<int64_t>(i) < dense;
    spec.layers.push_back({{{.norm = spec.norm, .units = {mixers[i]}},
                            {.norm = spec.norm, .units = {is_dense ? swiglu : experts}}}});
  }
}

ModelSpec read_deepseek(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "deepseek_v3", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  const UnitSpec mixer = latent_attention(config, sizes.heads, where);
  spec.rope = config::read_rope(config, mixer.options.integer("latent_attention", "rope_dim"),
                                spec.max_positions, where);
  const int64_t inner = config::integer(config, "moe_intermediate_size", 1, kMaxInner, where);
  const int64_t shared = config::integer_or(config, "n_shared_experts", 0, 0, kMaxHeads, where);
  const UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "n_routed_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", inner},
       {"router", or_softmax(config, "scoring_func", where)},
       {"router_bias", config::text_or(config, "topk_method", "noaux_tc", where) == "noaux_tc"},
       {"groups", config::integer_or(config, "n_group", 1, 1, kMaxExperts, where)},
       {"group_top", config::integer_or(config, "topk_group", 1, 1, kMaxExperts, where)},
       {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
       {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)},
       {"shared", checked_product(where, "shared channels", {inner, shared}, kMaxInner)}}};
  add_layers(spec, config, std::vector<UnitSpec>(static_cast<size_t>(sizes.layers), mixer), experts,
             where);
  return spec;
}

ModelSpec read_kimi_linear(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "kimi_linear", where);
  spec.max_positions =
      config::integer_or(config, "model_max_length", spec.max_positions, 1, kMaxPositions, where);
  const config::Sizes sizes = config::read_sizes(config, where);
  UnitSpec latent = latent_attention(config, sizes.heads, where);
  spec.rope.dim = latent.options.integer("latent_attention", "rope_dim");
  latent.options.set("rope", !config::flag_or(config, "mla_use_nope", false, where));
  const auto it = config.find("linear_attn_config");
  expect(it != config.end() && it->is_object(), "{}: expected the object 'linear_attn_config'",
         where);
  const std::string inside = where + ": linear_attn_config";
  const UnitSpec delta{
      "kimi_delta",
      {{"heads", config::integer(*it, "num_heads", 1, kMaxHeads, inside)},
       {"head_dim", config::integer(*it, "head_dim", 1, kMaxHeadDim, inside)},
       {"conv", config::integer_or(*it, "short_conv_kernel_size", 4, 2, 64, inside)}}};
  std::vector<UnitSpec> mixers(static_cast<size_t>(sizes.layers), delta);
  const auto full = it->find("full_attn_layers");
  expect(full != it->end() && full->is_array(), "{}: expected the list 'full_attn_layers'", inside);
  for (const Json& index : *full) {  // counted from 1
    const int64_t i = config::integer(Json{{"full_attn_layers", index}}, "full_attn_layers", 1,
                                      sizes.layers, inside);
    mixers[static_cast<size_t>(i - 1)] = latent;
  }
  const int64_t inner = config::integer(config, "moe_intermediate_size", 1, kMaxInner, where);
  const int64_t shared = config::integer_or(config, "num_shared_experts", 0, 0, kMaxHeads, where);
  const UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "num_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_token", 1, kMaxExperts, where)},
       {"inner", inner},
       {"router", or_softmax(config, "moe_router_activation_func", where)},
       {"router_bias", true},
       {"groups", config::integer_or(config, "num_expert_group", 1, 1, kMaxExperts, where)},
       {"group_top", config::integer_or(config, "topk_group", 1, 1, kMaxExperts, where)},
       {"renormalise", config::flag_or(config, "moe_renormalize", true, where)},
       {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)},
       {"shared", checked_product(where, "shared channels", {inner, shared}, kMaxInner)}}};
  add_layers(spec, config, mixers, experts, where);
  return spec;
}

}  // namespace

Family minimax_m1_family() {
  return config::described_family("minimax_m1", {"minimax_m1", "minimax_text_01"}, read_minimax_m1);
}

Family deepseek_family() {
  return config::described_family("deepseek_v3", {"deepseek_v3", "deepseek_v32"}, read_deepseek);
}

Family kimi_linear_family() {
  return config::described_family("kimi_linear", {"kimi_linear"}, read_kimi_linear);
}

}  // namespace cambium
