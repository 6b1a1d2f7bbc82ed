// Families whose units are not all built are data all the same: their published configurations
// become specs that are built, counted and printed, and refused by name where they would run.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/test_paths.h"
#include "base/testing.h"
#include "model/families/testing.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Json;
using testing::read_alone;

/// Of a cache in bf16.
int64_t token_bytes(const Model& model) {
  int64_t bytes = 0;
  for (const StateLayout& layout : model.state_layouts()) {
    for (const Part& part : layout.pages) {
      bytes += 2 * std::accumulate(part.shape.begin(), part.shape.end(), int64_t{1},
                                   std::multiplies<>());
    }
  }
  return bytes;
}

struct Published {
  const char* name;
  Json config;
  double parameters;  // 0.1 % is allowed
  const char* map;    // begins so
  int64_t token_bytes;
  const char* missing;  // a part of the refusal; empty = it runs
};

const Json kMinimax = [] {
  Json config = {{"model_type", "minimax_m1"},
                 {"hidden_size", 6144},
                 {"num_hidden_layers", 80},
                 {"num_attention_heads", 64},
                 {"num_key_value_heads", 8},
                 {"head_dim", 128},
                 {"intermediate_size", 9216},
                 {"num_local_experts", 32},
                 {"num_experts_per_tok", 2},
                 {"postnorm", true},
                 {"shared_intermediate_size", 0},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000000},
                 {"rotary_dim", 64},
                 {"vocab_size", 200064},
                 {"max_position_embeddings", 10240000},
                 {"auto_map", {{"AutoConfig", "configuration_minimax_m1.MiniMaxM1Config"}}}};
  for (const char* kind : {"linear_attention", "full_attention", "mlp"}) {
    config[std::string("layernorm_") + kind + "_alpha"] = 3.5565588200778455;
    config[std::string("layernorm_") + kind + "_beta"] = 1.0;
  }
  for (int i = 0; i < 80; ++i) {
    config["attn_type_list"].push_back(i % 8 == 7 ? 1 : 0);
  }
  return config;
}();

const Json kNemotron9b = {
    {"model_type", "nemotron_h"},
    {"hidden_size", 4480},
    {"num_hidden_layers", 56},
    {"hybrid_override_pattern", "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"},
    {"intermediate_size", 15680},
    {"num_attention_heads", 40},
    {"num_key_value_heads", 8},
    {"head_dim", 128},
    {"mamba_num_heads", 128},
    {"mamba_head_dim", 80},
    {"n_groups", 8},
    {"ssm_state_size", 128},
    {"conv_kernel", 4},
    {"layer_norm_epsilon", 1e-5},
    {"mlp_hidden_act", "relu2"},
    {"vocab_size", 131072},
    {"max_position_embeddings", 131072}};

const Json kQwen3Next = {{"model_type", "qwen3_next"},
                         {"hidden_size", 2048},
                         {"num_hidden_layers", 48},
                         {"full_attention_interval", 4},
                         {"num_attention_heads", 16},
                         {"num_key_value_heads", 2},
                         {"head_dim", 256},
                         {"partial_rotary_factor", 0.25},
                         {"rope_theta", 10000000},
                         {"linear_num_key_heads", 16},
                         {"linear_num_value_heads", 32},
                         {"linear_key_head_dim", 128},
                         {"linear_value_head_dim", 128},
                         {"linear_conv_kernel_dim", 4},
                         {"num_experts", 512},
                         {"num_experts_per_tok", 10},
                         {"moe_intermediate_size", 512},
                         {"shared_expert_intermediate_size", 512},
                         {"rms_norm_eps", 1e-6},
                         {"vocab_size", 151936},
                         {"max_position_embeddings", 262144}};

const Json kDeepseekV3 = {{"model_type", "deepseek_v3"},
                          {"hidden_size", 7168},
                          {"num_hidden_layers", 61},
                          {"num_attention_heads", 128},
                          {"num_key_value_heads", 128},
                          {"q_lora_rank", 1536},
                          {"kv_lora_rank", 512},
                          {"qk_nope_head_dim", 128},
                          {"qk_rope_head_dim", 64},
                          {"v_head_dim", 128},
                          {"intermediate_size", 18432},
                          {"moe_intermediate_size", 2048},
                          {"first_k_dense_replace", 3},
                          {"n_routed_experts", 256},
                          {"n_shared_experts", 1},
                          {"num_experts_per_tok", 8},
                          {"n_group", 8},
                          {"topk_group", 4},
                          {"topk_method", "noaux_tc"},
                          {"scoring_func", "sigmoid"},
                          {"norm_topk_prob", true},
                          {"routed_scaling_factor", 2.5},
                          {"rms_norm_eps", 1e-6},
                          {"rope_theta", 10000},
                          {"rope_scaling",
                           {{"type", "yarn"},
                            {"factor", 40},
                            {"mscale", 1.0},
                            {"mscale_all_dim", 1.0},
                            {"original_max_position_embeddings", 4096}}},
                          {"vocab_size", 129280},
                          {"max_position_embeddings", 163840}};

const Json kDeepseekV32 = [] {
  Json config = kDeepseekV3;
  config["model_type"] = "deepseek_v32";
  config["index_n_heads"] = 64;
  config["index_head_dim"] = 128;
  config["index_topk"] = 2048;
  config["quantization_config"] = {{"quant_method", "fp8"}};
  return config;
}();

const Json kMinimaxM3 = [] {
  std::vector<int> from_the_fourth(60, 1);
  std::fill_n(from_the_fourth.begin(), 3, 0);
  Json text = {{"hidden_size", 6144},
               {"num_hidden_layers", 60},
               {"num_attention_heads", 64},
               {"num_key_value_heads", 4},
               {"head_dim", 128},
               {"rotary_dim", 64},
               {"partial_rotary_factor", 0.5},
               {"intermediate_size", 3072},
               {"dense_intermediate_size", 12288},
               {"shared_intermediate_size", 3072},
               {"num_local_experts", 128},
               {"num_experts_per_tok", 4},
               {"moe_layer_freq", from_the_fourth},
               {"hidden_act", "swigluoai"},
               {"vocab_size", 200064},
               {"max_position_embeddings", 524288},
               {"sparse_attention_config",
                {{"use_sparse_attention", true},
                 {"sparse_index_dim", 128},
                 {"sparse_num_index_heads", 4},
                 {"sparse_topk_blocks", 16},
                 {"sparse_block_size", 128},
                 {"sparse_local_block", 1},
                 {"sparse_attention_freq", from_the_fourth}}}};
  return Json{{"model_type", "minimax_m3_vl"}, {"text_config", std::move(text)}};
}();

const Json kKimi = {{"model_type", "kimi_linear"},
                    {"hidden_size", 2304},
                    {"num_hidden_layers", 27},
                    {"linear_attn_config",
                     {{"full_attn_layers", {4, 8, 12, 16, 20, 24, 27}},
                      {"num_heads", 32},
                      {"head_dim", 128},
                      {"short_conv_kernel_size", 4}}},
                    {"num_attention_heads", 32},
                    {"num_key_value_heads", 32},
                    {"q_lora_rank", nullptr},
                    {"kv_lora_rank", 512},
                    {"qk_nope_head_dim", 128},
                    {"qk_rope_head_dim", 64},
                    {"v_head_dim", 128},
                    {"mla_use_nope", true},
                    {"intermediate_size", 9216},
                    {"moe_intermediate_size", 1024},
                    {"num_experts", 256},
                    {"num_experts_per_token", 8},
                    {"num_shared_experts", 1},
                    {"first_k_dense_replace", 1},
                    {"moe_router_activation_func", "sigmoid"},
                    {"routed_scaling_factor", 2.446},
                    {"rms_norm_eps", 1e-5},
                    {"vocab_size", 163840},
                    {"model_max_length", 1048576}};

const Json kFalcon34b = {{"model_type", "falcon_h1"},
                         {"hidden_size", 5120},
                         {"intermediate_size", 21504},
                         {"num_hidden_layers", 72},
                         {"num_attention_heads", 20},
                         {"num_key_value_heads", 4},
                         {"head_dim", 128},
                         {"mamba_n_heads", 32},
                         {"mamba_d_head", 128},
                         {"mamba_d_state", 256},
                         {"mamba_n_groups", 2},
                         {"mamba_rms_norm", true},
                         {"vocab_size", 261120},
                         {"rope_theta", 1e11},
                         {"key_multiplier", 0.011048543456039804},
                         {"ssm_multipliers", {0.35, 0.25, 0.18, 0.5, 0.35}},
                         {"mlp_multipliers", {0.1767766952966369, 0.011160714285714284}},
                         {"max_position_embeddings", 262144}};

// Sources of the counts. MiniMax-M1: total_size 912,210,767,872 bytes of bf16 in its
// model.safetensors.index.json. DeepSeek-V3: 671B of its report (arXiv 2412.19437), without the
// layer that predicts one token more; V3.2 adds the indexer, 13,959,424 a layer by its
// inference/model.py. MiniMax-M3: the parameters of transformers' class for its text. The others
// are added up by hand from the shapes of the tensors in their checkpoints, and agree with the
// roundings of their model cards: Nemotron Nano 9B v2 8.89B, Falcon-H1-34B 33.6B,
// Kimi-Linear-48B 49.1B, Qwen3-Next-80B (without MTP) 79.7B.
const std::vector<Published>& published() {
  static const std::vector<Published> table = {
      {"minimax_m1", kMinimax, 912210767872.0 / 2, "NNNNNNNANNNNNNNA", 10 * 2 * 8 * 128 * 2, ""},
      {"nemotron_nano_9b_v2", kNemotron9b, 8888227328.0, "2f2f2f22f2f2f2Af", 4 * 2 * 8 * 128 * 2,
       ""},
      {"qwen3_next_80b", kQwen3Next, 79674391296.0, "GGGAGGGA", 12 * 2 * 2 * 256 * 2, ""},
      {"deepseek_v3", kDeepseekV3, 671.03e9, "LLLL", 61 * (512 + 64) * 2, ""},
      {"deepseek_v32", kDeepseekV32, 671.03e9 + 61 * 13959424.0, "LLLL", 61 * (512 + 64 + 128) * 2,
       ""},
      {"minimax_m3", kMinimaxM3, 426174572928.0, "AAAA", (60 * 2 * 4 + 57) * 128 * 2, ""},
      {"kimi_linear_48b", kKimi, 49122681728.0, "KKKLKKKL", 7 * (512 + 64) * 2, ""},
      {"falcon_h1_34b", kFalcon34b, 33642516224.0, "(A2)(A2)", 72 * 2 * 4 * 128 * 2, ""}};
  return table;
}

class PublishedModel : public ::testing::TestWithParam<Published> {};

TEST_P(PublishedModel, IsBuiltCountedPrintedAndRefusedByName) {
  const Published& p = GetParam();
  const ModelSpec spec = read_alone(p.config);
  Model model(spec);
  EXPECT_NEAR(static_cast<double>(model.parameter_count()) / p.parameters, 1, 1e-3)
      << model.parameter_count();
  EXPECT_TRUE(layer_map(spec).starts_with(p.map)) << layer_map(spec);
  EXPECT_EQ(token_bytes(model), p.token_bytes);
  if (*p.missing == '\0') {
    model.expect_runs();
    return;
  }
  const std::string refusal = error_of([&] { model.expect_runs(); });
  EXPECT_NE(refusal.find(p.missing), std::string::npos) << refusal;
}

INSTANTIATE_TEST_SUITE_P(Families, PublishedModel, ::testing::ValuesIn(published()),
                         [](const auto& info) { return info.param.name; });

// The shapes that bench/true_size.py and bench/torch_train.py measure. To the parameter for
// Nemotron-Nano-9B-v2, Qwen3-8B, Qwen3-32B, Qwen2.5-32B, Falcon-H1-34B, Llama-3.1-70B and
// Llama-3.2-1B as their model cards count them; the others as this tree counts what `published`
// above holds them to, without multi-token heads.
TEST(TrueSizePlans, HaveThePublishedParameters) {
  const std::pair<const char*, int64_t> kPlans[] = {
      {"nemotron-nano-9b-v2", 8888227328}, {"qwen3-8b", 8190735360},
      {"falcon-h1-34b", 33642516224},      {"qwen2.5-32b", 32763876352},
      {"qwen3-32b", 32762123264},          {"qwen3-next-80b", 79674391296},
      {"kimi-linear-48b", 49122681728},    {"deepseek-v3.2", 671877944064},
      {"minimax-m1", 456089655296},        {"nemotron-h-47b", 46791554816},
      {"llama-3.1-70b", 70553706496},      {"llama-3.2-1b", 1235814400}};
  for (const auto& [name, parameters] : kPlans) {
    Model model(read_spec(std::string(kSourceDir) + "/plans/true-size/" + name));
    EXPECT_EQ(model.parameter_count(), parameters) << name;
    model.expect_runs();
  }
}

// Small configurations counted by transformers (5.17 to 5.24), to the parameter.
struct Counted {
  const char* name;
  Json config;
  int64_t parameters;
};

const std::vector<Counted>& counted() {
  static const std::vector<Counted> table = {
      {"nemotron_h",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "nemotron_h",
"hybrid_override_pattern": "M-M-M*-M-M-", "num_hidden_layers": 11, "hidden_size":
64, "intermediate_size": 160, "num_attention_heads": 4, "attention_head_dim": 32,
"head_dim": 32, "num_key_value_heads": 2, "attention_bias": false,
"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
"conv_kernel": 4, "use_bias": false, "use_conv_bias": true, "mamba_proj_bias":
false, "mamba_hidden_act": "silu", "mlp_bias": false, "mlp_hidden_act": "relu2",
"layer_norm_epsilon": 1e-05, "rms_norm_eps": 1e-05, "max_position_embeddings": 512})"),
       328376},
      {"nemotron_h_moe",
       Json::parse(R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "nemotron_h",
"hybrid_override_pattern": "MEM*EME", "num_hidden_layers": 7, "hidden_size": 64,
"intermediate_size": 48, "num_attention_heads": 4, "head_dim": 32,
"num_key_value_heads": 2, "attention_bias": false, "mamba_num_heads": 8,
"mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
"mamba_ssm_cache_dtype": "float32", "use_bias": false, "use_conv_bias": true,
"mamba_proj_bias": false, "mamba_hidden_act": "silu", "mlp_bias": false,
"mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-05, "norm_eps": 1e-05,
"max_position_embeddings": 512, "moe_intermediate_size": 40,
"moe_shared_expert_intermediate_size": 80, "n_group": 1, "topk_group": 1,
"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": true,
"num_experts_per_tok": 3, "routed_scaling_factor": 2.5, "partial_rotary_factor":
1.0, "rope_theta": 10000, "sliding_window": null})"),
       320264},
      {"falcon_h1",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "falcon_h1",
"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act":
"silu", "rms_norm_eps": 1e-05, "mamba_conv_bias": true, "mamba_d_conv": 4,
"mamba_d_head": 16, "mamba_d_ssm": 96, "mamba_d_state": 32, "mamba_expand": 2,
"mamba_n_groups": 2, "mamba_n_heads": 6, "mamba_norm_before_gate": false,
"mamba_proj_bias": false, "mamba_rms_norm": false, "mamba_use_mlp": true,
"projectors_bias": false, "rope_theta": 100000000000.0, "rope_scaling": null,
"attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
"embedding_multiplier": 5.65, "key_multiplier": 0.39, "lm_head_multiplier": 0.019,
"mlp_multipliers": [0.88, 0.58], "ssm_in_multiplier": 1.25, "ssm_multipliers":
[0.35, 0.25, 0.35, 0.5, 0.31], "ssm_out_multiplier": 0.7, "max_position_embeddings":
512})"),
       244630},
      {"minimax_m1",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "minimax_m1",
"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
"rms_norm_eps": 1e-05, "num_local_experts": 4, "num_experts_per_tok": 2,
"max_position_embeddings": 512, "sliding_window": null, "head_dim": 16,
"rope_theta": 10000000, "rotary_dim": 8, "postnorm": true,
"shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "attn_type_list": [0,
0, 0, 0, 0, 0, 0, 1], "layernorm_full_attention_alpha": 3.5565588200778455,
"layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_alpha":
3.5565588200778455, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha":
3.5565588200778455, "layernorm_mlp_beta": 1.0})"),
       798208},
      {"qwen3_next",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "qwen3_next",
"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
"full_attention_interval": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
"head_dim": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000000,
"rope_scaling": null, "attention_bias": false, "hidden_act": "silu", "rms_norm_eps":
1e-06, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32,
"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 32,
"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": true,
"shared_expert_intermediate_size": 48, "max_position_embeddings": 512})"),
       408312},
      {"deepseek_v3",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "deepseek_v3",
"hidden_size": 64, "intermediate_size": 112, "moe_intermediate_size": 32,
"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1,
"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
"q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24,
"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group":
4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
"norm_topk_prob": true, "routed_scaling_factor": 2.5, "hidden_act": "silu",
"rms_norm_eps": 1e-06, "attention_bias": false, "rope_theta": 10000, "rope_scaling":
{"beta_fast": 32, "beta_slow": 1, "factor": 4.0, "mscale": 1.0, "mscale_all_dim":
1.0, "original_max_position_embeddings": 128, "type": "yarn"},
"max_position_embeddings": 512})"),
       343424},
      {"deepseek_v32",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "deepseek_v32",
"hidden_size": 64, "intermediate_size": 112, "moe_intermediate_size": 32,
"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1,
"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
"q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24,
"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group":
4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
"norm_topk_prob": true, "routed_scaling_factor": 2.5, "hidden_act": "silu",
"rms_norm_eps": 1e-06, "attention_bias": false, "index_topk": 16, "index_head_dim":
32, "index_n_heads": 16, "rope_theta": 10000, "rope_scaling": {"beta_fast": 32,
"beta_slow": 1, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
"original_max_position_embeddings": 128, "type": "yarn"}, "max_position_embeddings":
512})"),
       454272},
      {"kimi_linear",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "kimi_linear",
"hidden_size": 64, "intermediate_size": 112, "moe_intermediate_size": 32,
"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1,
"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "kv_lora_rank":
32, "q_lora_rank": null, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
"v_head_dim": 16, "mla_use_nope": true, "num_experts": 8, "num_experts_per_token":
3, "num_shared_experts": 1, "moe_renormalize": true, "moe_router_activation_func":
"sigmoid", "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": true,
"routed_scaling_factor": 2.446, "hidden_act": "silu", "rms_norm_eps": 1e-05,
"rope_theta": 10000.0, "rope_scaling": null, "linear_attn_config":
{"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 4,
"short_conv_kernel_size": 4}, "model_max_length": 512})"),
       320348},
      {"granite_hybrid",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "granitemoehybrid",
"hidden_size": 64, "intermediate_size": 64, "shared_intermediate_size": 128,
"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
"layer_types": ["mamba", "attention", "mamba", "mamba"], "position_embedding_type":
"rope", "hidden_act": "silu", "rms_norm_eps": 1e-05, "num_local_experts": 0,
"num_experts_per_tok": 0, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups":
1, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias":
true, "mamba_proj_bias": false, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
"residual_multiplier": 0.22, "attention_multiplier": 0.0625, "rope_theta": 10000.0,
"attention_bias": false, "max_position_embeddings": 512})"),
       251208},
      {"bamba",
       Json::parse(
           R"({"vocab_size": 384, "tie_word_embeddings": false, "model_type": "bamba",
"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [2],
"hidden_act": "silu", "rms_norm_eps": 1e-05, "mamba_n_heads": 8, "mamba_d_head": 16,
"mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
"mamba_conv_bias": true, "mamba_proj_bias": false, "rope_theta": 10000.0,
"max_position_embeddings": 512})"),
       251208},
  };
  return table;
}

class CountedModel : public ::testing::TestWithParam<Counted> {};

TEST_P(CountedModel, HasTheParametersOfItsReference) {
  Model model(read_alone(GetParam().config));
  int64_t counted = 0;
  model.visit([&](const std::string& name, Parameter& p) {
    // The bias of a router's choice is a buffer of the reference, which it does not count.
    counted += name.ends_with("router.bias") ? 0 : p.numel();
  });
  EXPECT_EQ(counted, GetParam().parameters);
}

INSTANTIATE_TEST_SUITE_P(Families, CountedModel, ::testing::ValuesIn(counted()),
                         [](const auto& info) { return info.param.name; });

// Four mixers a layer of which one runs, as in a supernet from which placements are drawn.
TEST(Supernet, KeepsEveryMixerAndRunsOne) {
  const UnitSpec attention{
      "attention", {{"heads", 4}, {"kv_heads", 2}, {"head_dim", 8}}, 1, "full"};
  UnitSpec window = attention;
  window.kind = "sliding_window";
  window.name = "window";
  window.options.set("window", int64_t{16});
  const UnitSpec delta{
      "gated_delta_net", {{"heads", 4}, {"key_dim", 8}, {"value_dim", 8}}, 1, "gdn"};
  const UnitSpec kda{"kimi_delta", {{"heads", 4}, {"head_dim", 8}}, 1, "kda"};
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 64;
  spec.width = 32;
  spec.tied_head = true;
  spec.max_positions = 256;
  spec.rope.dim = 8;
  for (int active = 0; active < 4; ++active) {
    LayerSpec layer = decoder_layer(attention, 48);
    layer.branches.front().units = {attention, window, delta, kda};
    layer.branches.front().active = active;
    spec.layers.push_back(layer);
  }
  EXPECT_EQ(layer_map(spec), "AWGK");
  Model model(spec);
  model.expect_runs();
  int64_t first = -1;
  for (int64_t i = 0; i < 4; ++i) {
    int64_t parameters = 0;
    model.visit_layer(i, [&](const std::string&, Parameter& p) { parameters += p.numel(); });
    first = i == 0 ? parameters : first;
    EXPECT_EQ(parameters, first) << i;
  }
  const Family& cambium = find_family("cambium");
  EXPECT_TRUE(expresses(cambium, spec));
}

}  // namespace
}  // namespace cambium
