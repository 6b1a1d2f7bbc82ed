// Families of experts behind linear or gated attention: MiniMax-M1 and Qwen3-Next. Described by
// their config.json; their tensors have no rules yet.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

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

ModelSpec read_qwen3_next(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "qwen3_next", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.norm.kind = NormKind::kZeroCentred;
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  const double eps = config::real_or(config, "rms_norm_eps", 1e-6, where);
  const int64_t heads = config::integer(config, "linear_num_value_heads", 1, kMaxHeads, where);
  const int64_t key_heads = config::integer(config, "linear_num_key_heads", 1, kMaxHeads, where);
  const UnitSpec delta{
      "gated_delta_net",
      {{"heads", heads},
       {"q_heads", key_heads},
       {"k_heads", key_heads},
       {"v_heads", heads},
       {"key_dim", config::integer(config, "linear_key_head_dim", 1, kMaxHeadDim, where)},
       {"value_dim", config::integer(config, "linear_value_head_dim", 1, kMaxHeadDim, where)},
       {"conv", config::integer_or(config, "linear_conv_kernel_dim", 4, 2, 64, where)}}};
  const UnitSpec attends{"attention",
                         {{"heads", sizes.heads},
                          {"kv_heads", sizes.kv_heads},
                          {"head_dim", sizes.head_dim},
                          {"gate", true},
                          {"qk_norm", std::string("zero_centred")},
                          {"qk_norm_eps", eps}}};
  expect(config::integer_or(config, "decoder_sparse_step", 1, 1, kMaxLayers, where) == 1 &&
             (!config::has(config, "mlp_only_layers") || config["mlp_only_layers"].empty()),
         "{}: expected experts in every layer, as in every published model", where);
  const UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "num_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", config::integer(config, "moe_intermediate_size", 1, kMaxInner, where)},
       {"router", std::string("softmax")},
       {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
       {"shared", config::integer(config, "shared_expert_intermediate_size", 1, kMaxInner, where)},
       {"shared_gate", true}}};
  const int64_t every =
      config::integer_or(config, "full_attention_interval", 4, 1, kMaxLayers, where);
  std::vector<std::string> types;
  if (config::has(config, "layer_types")) {
    types = config::texts(config, "layer_types", static_cast<size_t>(sizes.layers), where);
  }
  for (int64_t i = 0; i < sizes.layers; ++i) {
    const bool full =
        types.empty() ? (i + 1) % every == 0 : types[static_cast<size_t>(i)] == "full_attention";
    spec.layers.push_back({{{.norm = spec.norm, .units = {full ? attends : delta}},
                            {.norm = spec.norm, .units = {experts}}}});
  }
  return spec;
}

}  // namespace

Family minimax_m1_family() {
  return config::described_family("minimax_m1", {"minimax_m1", "minimax_text_01"}, read_minimax_m1);
}

Family qwen3_next_family() {
  return config::described_family("qwen3_next", {"qwen3_next"}, read_qwen3_next);
}

}  // namespace cambium
