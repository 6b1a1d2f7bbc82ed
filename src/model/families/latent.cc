// Families of latent attention before routed experts: DeepSeek-V3 and V3.2, Kimi-K2, Kimi-Linear
// and Ling 3 (bailing_hybrid), the last two with Kimi Delta Attention in most of their layers.
#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

constexpr const char* kLatent = "latent_attention";
constexpr const char* kDelta = "kimi_delta";

/// 0.1 m ln s + 1, whose square multiplies the scores under yarn (mscale_all_dim).
double score_factor(double s, double m) {
  const double root = s <= 1.0 ? 1.0 : 0.1 * m * std::log(s) + 1.0;
  return root * root;
}

double plain_scale(const Options& latent) {
  return 1.0 / std::sqrt(static_cast<double>(latent.integer(kLatent, "nope_dim") +
                                             latent.integer(kLatent, "rope_dim")));
}

/// mscale_all_dim of a rope_scaling of yarn; 0 = scores are as they are.
double read_score_scale(const Json& config, const std::string& where) {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const auto it = config.find(key); it != config.end() && it->is_object()) {
      return config::real_or(*it, "mscale_all_dim", 0.0, where);
    }
  }
  return 0.0;
}

/// The mixer and, in the spec, the model's rotation.
UnitSpec read_latent(ModelSpec& spec, const Json& config, const std::string& where) {
  const int64_t heads = config::integer(config, "num_attention_heads", 1, kMaxHeads, where);
  expect(!config::flag_or(config, "attention_bias", false, where),
         "{}: 'attention_bias' is true, which no published {} model has", where, spec.family);
  UnitSpec unit{kLatent,
                {{"heads", heads},
                 {"q_rank", config::integer_or(config, "q_lora_rank", 0, 0, kMaxWidth, where)},
                 {"kv_rank", config::integer(config, "kv_lora_rank", 1, kMaxWidth, where)},
                 {"nope_dim", config::integer(config, "qk_nope_head_dim", 1, kMaxHeadDim, where)},
                 {"rope_dim", config::integer(config, "qk_rope_head_dim", 2, kMaxHeadDim, where)},
                 {"value_dim", config::integer(config, "v_head_dim", 1, kMaxHeadDim, where)}}};
  spec.rope = config::read_rope(config, unit.options.integer(kLatent, "rope_dim"),
                                spec.max_positions, where);
  spec.rope.interleaved = config::flag_or(config, "rope_interleave", true, where);
  const double all = read_score_scale(config, where);
  if (spec.rope.scaling != RopeScaling::kNone && all != 0.0) {
    unit.options.set("scale", plain_scale(unit.options) * score_factor(spec.rope.factor, all));
  }
  return unit;
}

void write_latent(const ModelSpec& spec, const UnitSpec& unit, Json& config) {
  const Options& o = unit.options;
  config["num_attention_heads"] = o.integer(kLatent, "heads");
  config["num_key_value_heads"] = o.integer(kLatent, "heads");
  const int64_t q_rank = o.integer(kLatent, "q_rank", 0);
  config["q_lora_rank"] = q_rank > 0 ? Json(q_rank) : Json();
  config["kv_lora_rank"] = o.integer(kLatent, "kv_rank");
  config["qk_nope_head_dim"] = o.integer(kLatent, "nope_dim");
  config["qk_rope_head_dim"] = o.integer(kLatent, "rope_dim");
  config["v_head_dim"] = o.integer(kLatent, "value_dim");
  config["rope_interleave"] = spec.rope.interleaved;
  if (o.has("scale") && spec.rope.scaling != RopeScaling::kNone) {
    const double root = std::sqrt(o.real(kLatent, "scale", 0.0) / plain_scale(o));
    const double all = (root - 1.0) / (0.1 * std::log(spec.rope.factor));
    // Published values have few digits, which the root does not give back to the last.
    config["rope_scaling"]["mscale_all_dim"] = std::round(all * 1e6) / 1e6;
  }
}

/// How a family spells what its experts are.
struct ExpertKeys {
  const char* experts;
  const char* top;
  const char* shared;
  const char* groups;
  const char* scoring;
  const char* renormalise;
};
constexpr ExpertKeys kDeepseek{"n_routed_experts", "num_experts_per_tok", "n_shared_experts",
                               "n_group",          "scoring_func",        "norm_topk_prob"};
constexpr ExpertKeys kKimi{"num_experts",      "num_experts_per_token",      "num_shared_experts",
                           "num_expert_group", "moe_router_activation_func", "moe_renormalize"};
constexpr ExpertKeys kBailing{"num_experts", "num_experts_per_tok", "num_shared_experts",
                              "n_group",     "score_function",      "norm_topk_prob"};
/// As transformers saves them.
constexpr ExpertKeys kSavedBailing{"num_experts",        "num_experts_per_token",
                                   "num_shared_experts", "num_expert_group",
                                   "score_function",     "moe_renormalize"};

/// Layers below this one have a feed-forward without experts.
int64_t first_of_experts(const Json& config, const std::string& where) {
  return config::integer_or(config, "first_k_dense_replace", 0, 0, kMaxLayers, where);
}

/// Of a model of so many layers; of no kind where none of them has experts.
UnitSpec read_experts(const Json& config, const ExpertKeys& keys, int64_t layers,
                      const std::string& where) {
  if (first_of_experts(config, where) >= layers) {
    return {};
  }
  const int64_t inner = config::integer(config, "moe_intermediate_size", 1, kMaxInner, where);
  const int64_t shared = config::integer_or(config, keys.shared, 0, 0, kMaxHeads, where);
  const std::string scoring = config::text_or(config, keys.scoring, "sigmoid", where);
  expect(scoring == "sigmoid", "{}: expected '{}' sigmoid, as in every published model, got '{}'",
         where, keys.scoring, scoring);
  return {"experts",
          {{"experts", config::integer(config, keys.experts, 1, kMaxExperts, where)},
           {"top", config::integer(config, keys.top, 1, kMaxExperts, where)},
           {"inner", inner},
           {"router", scoring},
           {"router_bias", true},
           {"groups", config::integer_or(config, keys.groups, 1, 1, kMaxExperts, where)},
           {"group_top", config::integer_or(config, "topk_group", 1, 1, kMaxExperts, where)},
           {"renormalise", config::flag_or(config, keys.renormalise, true, where)},
           {"renormalise_eps", 1e-20},
           {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)},
           {"shared", checked_product(where, "shared channels", {inner, shared}, kMaxInner)}}};
}

void write_experts(const UnitSpec& unit, const ExpertKeys& keys, Json& config) {
  const Options& o = unit.options;
  const int64_t inner = o.integer("experts", "inner");
  const int64_t shared = o.integer("experts", "shared", 0);
  config["moe_intermediate_size"] = inner;
  config[keys.experts] = o.integer("experts", "experts");
  config[keys.top] = o.integer("experts", "top");
  config[keys.shared] = shared / inner;
  config[keys.groups] = o.integer("experts", "groups", 1);
  config["topk_group"] = o.integer("experts", "group_top", 1);
  config[keys.scoring] = o.text("experts", "router");
  config[keys.renormalise] = o.flag("experts", "renormalise", false);
  config["routed_scaling_factor"] = o.real("experts", "scale", 1.0);
}

/// Layers of one mixer each; dense below first_k_dense_replace, then experts.
void add_layers(ModelSpec& spec, const Json& config, const std::vector<UnitSpec>& mixers,
                const UnitSpec& experts, const std::string& where) {
  const int64_t dense = first_of_experts(config, where);
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

/// What read_model and add_layers read. Whether that is all of the spec is for who reads it back.
Json write_layers(const ModelSpec& spec, const char* architecture, const ExpertKeys& keys) {
  const auto is_experts = [](const LayerSpec& layer) {
    return layer.feed_forward() != nullptr && layer.feed_forward()->kind == "experts";
  };
  const auto first = std::find_if(spec.layers.begin(), spec.layers.end(), is_experts);
  expect(std::all_of(first, spec.layers.end(), is_experts),
         "a {} config.json has experts in all layers from one on; write the cambium layout instead",
         spec.family);
  Json config;
  config["architectures"] = Json::array({architecture});
  config["model_type"] = spec.family;
  config.update(config::write_common(spec));
  config["first_k_dense_replace"] = first - spec.layers.begin();
  config["moe_layer_freq"] = 1;
  config["intermediate_size"] = config::inner_of(spec.layers.front());
  if (first != spec.layers.end()) {
    write_experts(*first->feed_forward(), keys, config);
  }
  write_latent(spec, config::mixer_or_small(spec, kLatent), config);
  config["torch_dtype"] = "float32";
  return config;
}

// --- DeepSeek-V3, V3.2 and Kimi-K2.
constexpr const char* kIndexKeys[][2] = {
    {"index_heads", "index_n_heads"}, {"index_dim", "index_head_dim"}, {"index_top", "index_topk"}};

ModelSpec read_deepseek(const char* family, const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, family, where);
  const int64_t layers = config::integer(config, "num_hidden_layers", 1, kMaxLayers, where);
  UnitSpec mixer = read_latent(spec, config, where);
  if (config::has(config, "index_n_heads")) {
    for (const auto& [ours, key] : kIndexKeys) {
      mixer.options.set(ours, config::integer(config, key, 1, kMaxPositions, where));
    }
    if (config::flag_or(config, "indexer_rope_interleave", false, where)) {
      mixer.options.set("index_interleaved", true);
    }
  }
  const std::string method = config::text_or(config, "topk_method", "noaux_tc", where);
  expect(method == "noaux_tc", "{}: expected topk_method noaux_tc, got '{}'", where, method);
  add_layers(spec, config, std::vector<UnitSpec>(static_cast<size_t>(layers), mixer),
             read_experts(config, kDeepseek, layers, where), where);
  return spec;
}

std::string write_deepseek(const ModelSpec& spec) {
  const bool sparse = spec.family == "deepseek_v32";
  Json config =
      write_layers(spec, sparse ? "DeepseekV32ForCausalLM" : "DeepseekV3ForCausalLM", kDeepseek);
  config["topk_method"] = "noaux_tc";
  const Options mixer = config::mixer_or_small(spec, kLatent).options;
  if (mixer.has("index_heads")) {
    for (const auto& [ours, key] : kIndexKeys) {
      config[key] = mixer.integer(kLatent, ours);
    }
    config["indexer_rope_interleave"] = mixer.flag(kLatent, "index_interleaved", false);
  }
  return config.dump(1);
}

std::vector<TensorRule> deepseek_tensors() {
  return config::decoder_tensors({
      {"layers.*.mixer.q_a_norm.*", "model.layers.*.self_attn.q_a_layernorm.*"},
      {"layers.*.mixer.kv_a_norm.*", "model.layers.*.self_attn.kv_a_layernorm.*"},
      {"layers.*.mixer.kv_a_proj.*", "model.layers.*.self_attn.kv_a_proj_with_mqa.*"},
      {"layers.*.mixer.indexer.q_proj.*", "model.layers.*.self_attn.indexer.wq_b.*"},
      {"layers.*.mixer.indexer.k_proj.*", "model.layers.*.self_attn.indexer.wk.*"},
      {"layers.*.feed_forward.router.weight", "model.layers.*.mlp.gate.weight"},
      {"layers.*.feed_forward.router.bias", "model.layers.*.mlp.gate.e_score_correction_bias"},
      {"layers.*.feed_forward.experts.gate.*", "model.layers.*.mlp.experts.#.gate_proj.*"},
      {"layers.*.feed_forward.experts.up.*", "model.layers.*.mlp.experts.#.up_proj.*"},
      {"layers.*.feed_forward.experts.down.*", "model.layers.*.mlp.experts.#.down_proj.*"},
      {"layers.*.feed_forward.shared.*.weight", "model.layers.*.mlp.shared_experts.*_proj.weight"},
  });
}

// --- Kimi Delta Attention in some layers.
ModelSpec read_kimi_linear(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "kimi_linear", where);
  spec.max_positions =
      config::integer_or(config, "model_max_length", spec.max_positions, 1, kMaxPositions, where);
  const int64_t layers = config::integer(config, "num_hidden_layers", 1, kMaxLayers, where);
  UnitSpec latent = read_latent(spec, config, where);
  latent.options.set("rope", !config::flag_or(config, "mla_use_nope", false, where));
  const auto it = config.find("linear_attn_config");
  expect(it != config.end() && it->is_object(), "{}: expected the object 'linear_attn_config'",
         where);
  const std::string inside = where + ": linear_attn_config";
  const UnitSpec delta{
      kDelta,
      {{"heads", config::integer(*it, "num_heads", 1, kMaxHeads, inside)},
       {"head_dim", config::integer(*it, "head_dim", 1, kMaxHeadDim, inside)},
       {"conv", config::integer_or(*it, "short_conv_kernel_size", 4, 2, 64, inside)},
       {"norm_eps", config::shortest(spec.norm.eps)}}};
  std::vector<UnitSpec> mixers(static_cast<size_t>(layers), delta);
  const auto full = it->find("full_attn_layers");
  expect(full != it->end() && full->is_array(), "{}: expected the list 'full_attn_layers'", inside);
  for (const Json& index : *full) {  // counted from 1
    const int64_t i =
        config::integer(Json{{"full_attn_layers", index}}, "full_attn_layers", 1, layers, inside);
    mixers[static_cast<size_t>(i - 1)] = latent;
  }
  add_layers(spec, config, mixers, read_experts(config, kKimi, layers, where), where);
  return spec;
}

std::string write_kimi_linear(const ModelSpec& spec) {
  Json config = write_layers(spec, "KimiLinearForCausalLM", kKimi);
  config.erase("max_position_embeddings");
  config["model_max_length"] = spec.max_positions;
  config["mla_use_nope"] =
      !config::mixer_or_small(spec, kLatent).options.flag(kLatent, "rope", true);
  config["use_grouped_topk"] = true;
  Json full = Json::array();
  Json linear = Json::array();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    (spec.layers[i].mixes_by(kLatent) ? full : linear).push_back(i + 1);
  }
  const Options delta = config::mixer_or_small(spec, kDelta).options;
  config["linear_attn_config"] = {{"full_attn_layers", full},
                                  {"kda_layers", linear},
                                  {"num_heads", delta.integer(kDelta, "heads")},
                                  {"head_dim", delta.integer(kDelta, "head_dim")},
                                  {"short_conv_kernel_size", delta.integer(kDelta, "conv", 4)}};
  return config.dump(1);
}

std::vector<TensorRule> kimi_linear_tensors() {
  std::vector<TensorRule> rules = config::decoder_tensors({
      {"layers.*.mixer.in_proj.weight:q", "model.layers.*.self_attn.q_proj.weight", kDelta},
      {"layers.*.mixer.in_proj.weight:k", "model.layers.*.self_attn.k_proj.weight", kDelta},
      {"layers.*.mixer.in_proj.weight:v", "model.layers.*.self_attn.v_proj.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:q", "model.layers.*.self_attn.q_conv1d.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:k", "model.layers.*.self_attn.k_conv1d.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:v", "model.layers.*.self_attn.v_conv1d.weight", kDelta},
      {.ours = "layers.*.mixer.A_log",
       .theirs = "model.layers.*.self_attn.A_log",
       .mixer = kDelta,
       .ones_before = 2,
       .ones_after = 1},
      {"layers.*.mixer.decay_*", "model.layers.*.self_attn.f_*", kDelta},
      {"layers.*.mixer.gate_*", "model.layers.*.self_attn.g_*", kDelta},
      {"layers.*.mixer.beta_proj.*", "model.layers.*.self_attn.b_proj.*", kDelta},
      {"layers.*.mixer.norm.*", "model.layers.*.self_attn.o_norm.*", kDelta},
      {"layers.*.mixer.out_proj.*", "model.layers.*.self_attn.o_proj.*", kDelta},
      {"layers.*.mixer.kv_a_norm.*", "model.layers.*.self_attn.kv_a_layernorm.*"},
      {"layers.*.mixer.q_a_norm.*", "model.layers.*.self_attn.q_a_layernorm.*"},
      {"layers.*.mixer.kv_a_proj.*", "model.layers.*.self_attn.kv_a_proj_with_mqa.*"},
      {"layers.*.feed_forward.router.weight", "model.layers.*.block_sparse_moe.gate.weight"},
      {"layers.*.feed_forward.router.bias",
       "model.layers.*.block_sparse_moe.gate.e_score_correction_bias"},
      {"layers.*.feed_forward.experts.gate.*", "model.layers.*.block_sparse_moe.experts.#.w1.*"},
      {"layers.*.feed_forward.experts.up.*", "model.layers.*.block_sparse_moe.experts.#.w3.*"},
      {"layers.*.feed_forward.experts.down.*", "model.layers.*.block_sparse_moe.experts.#.w2.*"},
      {"layers.*.feed_forward.shared.*.weight",
       "model.layers.*.block_sparse_moe.shared_experts.*_proj.weight"},
  });
  // transformers saves dense layers under the name of those with experts.
  rules.push_back({"layers.*.feed_forward.gate.*", "model.layers.*.block_sparse_moe.gate_proj.*"});
  rules.push_back({"layers.*.feed_forward.up.*", "model.layers.*.block_sparse_moe.up_proj.*"});
  rules.push_back({"layers.*.feed_forward.down.*", "model.layers.*.block_sparse_moe.down_proj.*"});
  return rules;
}

// --- Ling 3.
ModelSpec read_bailing(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  const bool saved = config::has(config, "num_experts_per_token");
  if (saved && !config::has(config, "max_position_embeddings")) {
    config["max_position_embeddings"] = config.value("model_max_length", Json());
  }
  if (config::has(config, "architectures") && config["architectures"].is_array()) {
    for (const Json& name : config["architectures"]) {
      const std::string architecture = name.is_string() ? name.get<std::string>() : "";
      expect(architecture.find("V2_5") == std::string::npos,
             "{}: {} (Ling and Ring 2.5) is another model of the same model_type, with lightning "
             "attention, which this build does not read",
             where, architecture);
    }
  }
  ModelSpec spec = config::read_model(config, "bailing_hybrid", where);
  const int64_t layers = config::integer(config, "num_hidden_layers", 1, kMaxLayers, where);
  UnitSpec latent = read_latent(spec, config, where);
  const std::string gate =
      config::text_or(config, "gated_attention_proj_granularity_type", "head_wise", where);
  expect(gate == "head_wise",
         "{}: expected gated_attention_proj_granularity_type head_wise, got '{}'", where, gate);
  latent.options.set("gate", true);
  const std::string linear = config::text_or(config, "linear_attention", "kda", where);
  expect(linear == "kda", "{}: expected linear_attention kda, got '{}'", where, linear);
  for (const char* key : {"use_bias", "use_qkv_bias"}) {
    expect(!config::flag_or(config, key, false, where),
           "{}: '{}' is true, which no published bailing_hybrid model has", where, key);
  }
  for (const char* key : {"expert_swiglu_limit_list", "share_expert_swiglu_limit_list"}) {
    expect(!config::has(config, key),
           "{}: '{}' limits what is inside experts layer by layer, which is not supported", where,
           key);
  }
  // What transformers saves as head_dim is the part of a head that turns.
  const char* size = config::has(config, "linear_head_dim") ? "linear_head_dim" : "head_dim";
  const int64_t dim = config::integer(config, size, 1, kMaxHeadDim, where);
  UnitSpec delta{
      kDelta,
      {{"heads", latent.options.integer(kLatent, "heads")},
       {"head_dim", dim},
       {"conv", config::integer_or(config, "short_conv_kernel_size", 4, 2, 64, where)},
       {"gate_rank", config::flag_or(config, "no_kda_lora", true, where) ? int64_t{0} : dim},
       {"norm_eps", config::real_or(config, "rms_norm_eps", 1e-6, where)}}};
  if (config::flag_or(config, "kda_safe_gate", true, where)) {
    delta.options.set("decay", "sigmoid");
    delta.options.set("lower_bound", config::real_or(config, "kda_lower_bound", -5.0, where));
  }
  const int64_t group = config::integer(config, "layer_group_size", 1, kMaxLayers, where);
  std::vector<UnitSpec> mixers;
  for (int64_t i = 0; i < layers; ++i) {
    mixers.push_back((i + 1) % group == 0 ? latent : delta);
  }
  UnitSpec experts = read_experts(config, saved ? kSavedBailing : kBailing, layers, where);
  expect(config::flag_or(config, "moe_router_enable_expert_bias", true, where),
         "{}: expected moe_router_enable_expert_bias true, as in every published model", where);
  if (experts.options.integer("experts", "shared", 0) > 0) {
    experts.options.set(
        "shared", checked_product(where, "shared channels",
                                  {config::integer_or(config, "moe_shared_expert_intermediate_size",
                                                      experts.options.integer("experts", "inner"),
                                                      1, kMaxInner, where),
                                   config::integer(config, kBailing.shared, 1, kMaxHeads, where)},
                                  kMaxInner));
  }
  add_layers(spec, config, mixers, experts, where);
  return spec;
}

std::string write_bailing(const ModelSpec& spec) {
  Json config = write_layers(spec, "BailingMoeV3ForCausalLM", kBailing);
  const Options o = config::mixer_or_small(spec, kDelta).options;
  const Options& experts = spec.layers.back().feed_forward()->options;
  config["head_dim"] = o.integer(kDelta, "head_dim");
  config["short_conv_kernel_size"] = o.integer(kDelta, "conv", 4);
  config["no_kda_lora"] = o.integer(kDelta, "gate_rank", -1) == 0;
  config["kda_safe_gate"] = o.has("lower_bound");
  if (o.has("lower_bound")) {
    config["kda_lower_bound"] = o.real(kDelta, "lower_bound", 0.0);
  }
  const auto latent = std::find_if(spec.layers.begin(), spec.layers.end(),
                                   [](const LayerSpec& layer) { return layer.mixes_by(kLatent); });
  config["layer_group_size"] = latent - spec.layers.begin() + 1;
  if (latent == spec.layers.end()) {
    config["num_attention_heads"] = config["num_key_value_heads"] = o.integer(kDelta, "heads");
  }
  config["linear_attention"] = "kda";
  config["gated_attention_proj_granularity_type"] = "head_wise";
  config["use_bias"] = false;
  config["use_qkv_bias"] = false;
  config["moe_router_enable_expert_bias"] = true;
  const int64_t shared = experts.integer("experts", "shared", 0);
  config[kBailing.shared] = shared > 0 ? 1 : 0;
  config["moe_shared_expert_intermediate_size"] = shared;
  return config.dump(1);
}

std::vector<TensorRule> bailing_tensors() {
  std::vector<TensorRule> own = {
      {"embed.weight", "model.word_embeddings.weight"},
      {"layers.*.mixer.in_proj.weight:q", "model.layers.*.attention.q_proj.weight", kDelta},
      {"layers.*.mixer.in_proj.weight:k", "model.layers.*.attention.k_proj.weight", kDelta},
      {"layers.*.mixer.in_proj.weight:v", "model.layers.*.attention.v_proj.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:q", "model.layers.*.attention.q_conv1d.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:k", "model.layers.*.attention.k_conv1d.weight", kDelta},
      {"layers.*.mixer.conv1d.weight:v", "model.layers.*.attention.v_conv1d.weight", kDelta},
      {"layers.*.mixer.decay_*", "model.layers.*.attention.f_*", kDelta},
      {"layers.*.mixer.gate_*", "model.layers.*.attention.g_*", kDelta},
      {"layers.*.mixer.beta_proj.*", "model.layers.*.attention.b_proj.*", kDelta},
      {"layers.*.mixer.norm.*", "model.layers.*.attention.o_norm.*", kDelta},
      {"layers.*.mixer.out_proj.*", "model.layers.*.attention.o_proj.*", kDelta},
      {"layers.*.mixer.out_proj.*", "model.layers.*.attention.dense.*", kDelta},  // transformers'
      {"layers.*.mixer.q_a_norm.*", "model.layers.*.attention.q_a_layernorm.*"},
      {"layers.*.mixer.kv_a_norm.*", "model.layers.*.attention.kv_a_layernorm.*"},
      {"layers.*.mixer.kv_a_proj.*", "model.layers.*.attention.kv_a_proj_with_mqa.*"},
      {"layers.*.mixer.gate_proj.*", "model.layers.*.attention.g_proj.*"},
      {"layers.*.mixer.o_proj.*", "model.layers.*.attention.dense.*"},
      {"layers.*.mixer.*", "model.layers.*.attention.*"},
      {"layers.*.feed_forward.router.bias", "model.layers.*.mlp.gate.expert_bias"},
  };
  const std::vector<TensorRule> experts = deepseek_tensors();
  own.insert(own.end(), experts.begin(), experts.end());
  return own;
}

/// Heads that predict a token more are layers after the model's own.
MtpRules layers_after() {
  return {.tensors = {"model.layers.#.*"}};
}

/// Those of DeepSeek: a layer as the last one, behind a projection of the token's embedding and
/// the hidden state; its embedding and output head are copies of the model's.
MtpRules deepseek_mtp() {
  using Shape = MtpTensor::Shape;
  constexpr auto kFirst = MtpTensor::Place::kFirst;
  MtpRules rules = layers_after();
  rules.layers = [](const ModelSpec& spec, int64_t heads, const std::string& /*kinds*/) {
    return std::vector<LayerSpec>(static_cast<size_t>(heads), spec.layers.back());
  };
  rules.own = {{"model.layers.#.enorm.weight"},
               {"model.layers.#.hnorm.weight"},
               {"model.layers.#.eh_proj.weight", Shape::kJoin},
               {"model.layers.#.shared_head.norm.weight"},
               {"model.layers.#.embed_tokens.weight", Shape::kTokens, kFirst, true},
               {"model.layers.#.shared_head.head.weight", Shape::kTokens, kFirst, true}};
  return rules;
}

/// Of DeepSeek's kind, by the name that its config.json gives as model_type.
template <const char* kFamily>
Family deepseek() {
  return {kFamily,
          {kFamily},
          [](const std::string& text, const std::string& where) {
            return read_deepseek(kFamily, text, where);
          },
          write_deepseek,
          deepseek_tensors(),
          config::decoder_ignored(),
          {},
          {},
          deepseek_mtp()};
}

constexpr char kV3[] = "deepseek_v3";
constexpr char kV32[] = "deepseek_v32";
constexpr char kK2[] = "kimi_k2";

Family kimi_linear_family() {
  return {"kimi_linear",
          {"kimi_linear"},
          read_kimi_linear,
          write_kimi_linear,
          kimi_linear_tensors(),
          config::decoder_ignored(),
          {},
          {},
          layers_after()};
}

Family bailing_hybrid_family() {
  return {"bailing_hybrid",  {"bailing_hybrid"},        read_bailing, write_bailing,
          bailing_tensors(), config::decoder_ignored(), {},           {},
          layers_after()};
}

}  // namespace

std::vector<Family> latent_families() {
  return {deepseek<kV3>(), kimi_linear_family(), deepseek<kV32>(), deepseek<kK2>(),
          bailing_hybrid_family()};
}

}  // namespace cambium
