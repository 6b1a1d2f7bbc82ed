// Architectures of latent attention, alone or beside Kimi Delta Attention.
#include <algorithm>

#include "base/error.h"
#include "model/gguf/gguf_parts.h"

namespace cambium {
namespace {

using namespace gguf;

// --- Latent attention. llama.cpp runs it as attention with one key head, of the latent's length.
constexpr const char* kLatent = "latent_attention";

void read_latent_sizes(Keys& keys, GgufJson& config) {
  const int64_t rope = keys.need("rope.dimension_count");
  const int64_t key = keys.need("attention.key_length_mla");
  expect(rope < key, "{}: '{}' is {}, expected less than '{}', {}", keys.path(),
         keys.named("rope.dimension_count"), rope, keys.named("attention.key_length_mla"), key);
  config["qk_rope_head_dim"] = rope;
  config["qk_nope_head_dim"] = key - rope;
  config["v_head_dim"] = keys.need("attention.value_length_mla");
  // These follow from what was read.
  for (const char* name : {"attention.key_length", "attention.value_length"}) {
    keys.size(name);
  }
}
void write_latent_sizes(const GgufJson& config, GgufHead& head) {
  const int64_t rope = whole(config, "qk_rope_head_dim");
  const int64_t rank = whole(config, "kv_lora_rank");
  head.size("attention.key_length_mla", whole(config, "qk_nope_head_dim") + rope);
  head.size("attention.value_length_mla", whole(config, "v_head_dim"));
  head.size("attention.key_length", rank + rope);
  head.size("attention.value_length", rank);
}

void read_latent(Keys& keys, GgufJson& config) {
  read_latent_sizes(keys, config);
  config["num_key_value_heads"] = config.at("num_attention_heads");
  keys.size("attention.head_count_kv");  // 1
}
void write_latent(const ModelSpec& /*spec*/, const GgufJson& config, GgufHead& head) {
  write_latent_sizes(config, head);
  head.size("attention.head_count_kv", 1);
}
constexpr GgufPart kLatentSizes{read_latent, write_latent};

/// The keys of DeepSeek's experts; their number, those of a token and the shared ones by the
/// family's names.
std::vector<Rule> latent_keys(const char* experts, const char* top, const char* shared,
                              std::vector<Rule> more) {
  more.insert(more.begin(), {{"feed_forward_length", "intermediate_size", kSize, true},
                             {"attention.q_lora_rank", "q_lora_rank"},
                             {"attention.kv_lora_rank", "kv_lora_rank", kSize, true},
                             {"leading_dense_block_count", "first_k_dense_replace"},
                             {"expert_count", experts, kSize, true},
                             {"expert_used_count", top, kSize, true},
                             {"expert_shared_count", shared},
                             {"expert_feed_forward_length", "moe_intermediate_size", kSize, true},
                             {"expert_weights_scale", "routed_scaling_factor", kNumber}});
  return attention_keys(std::move(more));
}

Rules latent_tensors(Rules more = {}) {
  more.insert(more.end(), {{"layers.*.mixer.q_a_proj.weight", "blk.*.attn_q_a.weight"},
                           {"layers.*.mixer.q_a_norm.weight", "blk.*.attn_q_a_norm.weight"},
                           {"layers.*.mixer.q_b_proj.weight", "blk.*.attn_q_b.weight"},
                           {"layers.*.mixer.kv_a_proj.weight", "blk.*.attn_kv_a_mqa.weight"},
                           {"layers.*.mixer.kv_a_norm.weight", "blk.*.attn_kv_a_norm.weight"},
                           {"layers.*.mixer.kv_b_proj.weight", "blk.*.attn_kv_b.weight"}});
  return decoder_tensors(std::move(more));
}

const std::vector<GgufOrder> kSplitLatent = {
    {"layers.*.mixer.kv_b_proj.weight", GgufOrder::kLatent, "heads"}};

GgufArchitecture deepseek2() {
  return {.name = "deepseek2",
          .families = {"deepseek_v3", "kimi_k2"},
          .keys = latent_keys("n_routed_experts", "num_experts_per_tok", "n_shared_experts",
                              {{"expert_group_count", "n_group"},
                               {"expert_group_used_count", "topk_group"},
                               {"expert_weights_norm", "norm_topk_prob", kFlag}}),
          .tensors = latent_tensors(),
          .rope = {.dims = "qk_rope_head_dim", .scales_scores = true},
          .parts = {kLatentSizes},
          .config = {{"rope_interleave", true}},
          .constants = gating(2),
          .orders = kSplitLatent};
}

GgufArchitecture deepseek32() {
  GgufArchitecture row = deepseek2();
  row.name = "deepseek32";
  row.families = {"deepseek_v32"};
  row.keys.insert(row.keys.end(), {{"attention.indexer.head_count", "index_n_heads", kSize, true},
                                   {"attention.indexer.key_length", "index_head_dim", kSize, true},
                                   {"attention.indexer.top_k", "index_topk", kSize, true}});
  row.tensors =
      latent_tensors({{"layers.*.mixer.indexer.q_proj.weight", "blk.*.indexer.attn_q_b.weight"},
                      {"layers.*.mixer.indexer.k_proj.weight", "blk.*.indexer.attn_k.weight"},
                      {"layers.*.mixer.indexer.k_norm.*", "blk.*.indexer.k_norm.*"},
                      {"layers.*.mixer.indexer.weights_proj.weight", "blk.*.indexer.proj.weight"}});
  return row;
}

// --- Kimi Delta Attention beside latent attention.
constexpr const char* kKda = "kimi_delta";

std::vector<bool> read_kda_layers(Keys& keys, GgufJson& config) {
  read_latent_sizes(keys, config);
  config["num_key_value_heads"] = config.at("num_attention_heads");
  std::vector<bool> full;
  for (const int64_t heads : by_layer(keys, "attention.head_count_kv", config)) {
    full.push_back(heads > 0);
  }
  return full;
}

void read_kimi(Keys& keys, GgufJson& config) {
  const std::vector<bool> full = read_kda_layers(keys, config);
  GgufJson inside{{"num_heads", config.at("num_attention_heads")},
                  {"head_dim", keys.need("kda.head_dim")},
                  {"short_conv_kernel_size", keys.need("ssm.conv_kernel")},
                  {"full_attn_layers", GgufJson::array()},
                  {"kda_layers", GgufJson::array()}};
  for (size_t i = 0; i < full.size(); ++i) {
    inside[full[i] ? "full_attn_layers" : "kda_layers"].push_back(i + 1);
  }
  config["linear_attn_config"] = inside;
}
void write_kda(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_latent_sizes(config, head);
  write_kv_heads(spec, head, kLatent, 1);
  const Options& o = unit_of(spec, kKda).options;
  head.size("kda.head_dim", o.integer(kKda, "head_dim"));
  head.size("ssm.conv_kernel", o.integer(kKda, "conv", 4));
}
constexpr GgufPart kKimi{read_kimi, write_kda};

Rules kda_tensors(Rules more) {
  for (const char* part : {"q", "k", "v"}) {
    static std::deque<std::string> names;  // rules hold views
    const auto name = [&](std::string text) -> const char* {
      return names.emplace_back(std::move(text)).c_str();
    };
    more.push_back({name(fmt::format("layers.*.mixer.in_proj.weight:{}", part)),
                    fmt::format("blk.*.attn_{}.weight", part), kKda});
    more.push_back({name(fmt::format("layers.*.mixer.conv1d.weight:{}", part)),
                    fmt::format("blk.*.ssm_conv1d_{}.weight", part), kKda});
  }
  more.insert(more.end(), {{"layers.*.mixer.A_log", "blk.*.ssm_a", kKda},
                           {"layers.*.mixer.dt_bias", "blk.*.ssm_dt.bias", kKda},
                           {"layers.*.mixer.beta_proj.weight", "blk.*.ssm_beta.weight", kKda},
                           {"layers.*.mixer.norm.weight", "blk.*.ssm_norm.weight", kKda},
                           {"layers.*.mixer.out_proj.weight", "blk.*.attn_output.weight", kKda}});
  return latent_tensors(std::move(more));
}

GgufArchitecture kimi_linear() {
  std::vector<Rule> keys = latent_keys(
      "num_experts", "num_experts_per_token", "num_shared_experts",
      {{"expert_group_count", "num_expert_group"}, {"expert_group_used_count", "topk_group"}});
  for (Rule& rule : keys) {
    rule.config = rule.config == "max_position_embeddings" ? "model_max_length" : rule.config;
  }
  return {.name = "kimi-linear",
          .families = {"kimi_linear"},
          .keys = keys,
          .tensors = kda_tensors({{"layers.*.mixer.decay_a_proj.weight", "blk.*.ssm_f_a.weight"},
                                  {"layers.*.mixer.decay_b_proj.weight", "blk.*.ssm_f_b.weight"},
                                  {"layers.*.mixer.gate_a_proj.weight", "blk.*.ssm_g_a.weight"},
                                  {"layers.*.mixer.gate_b_proj.weight", "blk.*.ssm_g_b.weight"}}),
          .rope = {.dims = "qk_rope_head_dim"},
          .parts = {kKimi},
          .config = {{"mla_use_nope", true},
                     {"moe_renormalize", true},
                     {"rope_interleave", true},
                     {"moe_layer_freq", 1}},
          .constants = gating(2),
          .orders = kSplitLatent,
          .shapes = {{"blk.*.ssm_a", GgufShape::kColumn}},
          .values = {{"blk.*.ssm_a", GgufValues::kMinusExp}}};
}

void read_bailing(Keys& keys, GgufJson& config) {
  const std::vector<bool> full = read_kda_layers(keys, config);
  const auto first = std::find(full.begin(), full.end(), true) - full.begin();
  const int64_t group = first + 1;
  for (size_t i = 0; i < full.size(); ++i) {
    expect(full[i] == ((static_cast<int64_t>(i) + 1) % group == 0),
           "{}: '{}': expected latent attention in each layer {} and no other, layer {} has it not "
           "so",
           keys.path(), keys.named("attention.head_count_kv"), group, i);
  }
  config["layer_group_size"] = group;
  config["head_dim"] = keys.need("kda.head_dim");
  config["short_conv_kernel_size"] = keys.need("ssm.conv_kernel");
  expect(keys.flag("kda.safe_gate").value_or(true), "{}: '{}' is false, which cannot be imported",
         keys.path(), keys.named("kda.safe_gate"));
  config["kda_safe_gate"] = true;
}
void write_bailing(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_kda(spec, config, head);
  head.flag("kda.safe_gate", config.at("kda_safe_gate").get<bool>());
}
constexpr GgufPart kBailing{read_bailing, write_bailing};

GgufArchitecture bailingmoe3() {
  return {
      .name = "bailingmoe3",
      .families = {"bailing_hybrid"},
      .keys =
          latent_keys("num_experts", "num_experts_per_tok", "num_shared_experts",
                      {{"expert_group_count", "n_group"},
                       {"expert_group_used_count", "topk_group"},
                       {"expert_weights_norm", "norm_topk_prob", kFlag},
                       {"expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"},
                       {"kda.gate_lower_bound", "kda_lower_bound", kNumber, true}}),
      .tensors = kda_tensors({{"layers.*.mixer.decay_proj.weight", "blk.*.ssm_f_a.weight", kKda},
                              {"layers.*.mixer.gate_proj.weight", "blk.*.ssm_g_a.weight", kKda},
                              {"layers.*.mixer.gate_proj.weight", "blk.*.attn_gate.weight"}}),
      .rope = {.dims = "qk_rope_head_dim"},
      .parts = {kBailing},
      .config = {{"rope_interleave", true}, {"no_kda_lora", true}},
      .constants = gating(2),
      .orders = kSplitLatent,
      .shapes = {{"blk.*.ssm_a", GgufShape::kColumn}},
      .values = {{"blk.*.ssm_a", GgufValues::kExp}}};
}

}  // namespace

std::vector<GgufArchitecture> gguf_latent_architectures() {
  return {deepseek2(), deepseek32(), kimi_linear(), bailingmoe3()};
}

}  // namespace cambium
