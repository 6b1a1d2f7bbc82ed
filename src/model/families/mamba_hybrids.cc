// Families of Mamba-2 and attention: Nemotron-H (one unit a layer), Falcon-H1 (both side by side),
// Granite 4 hybrid and Bamba (one or the other, then a feed-forward).
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

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

/// Error where the step of the recurrence is held within limits: kernels and released models have
/// none, which is said as infinity (here null, or an object in what transformers saves).
void refuse_step_limits(const Json& config, const std::string& where) {
  const auto it = config.find("time_step_limit");
  expect(it == config.end() || it->is_null() ||
             (it->is_array() && it->size() == 2 && it->at(0) == 0 && !it->at(1).is_number()),
         "{}: expected 'time_step_limit' from 0 to infinity, got {}", where,
         it == config.end() ? "" : it->dump());
}

/// The keys of Granite, Bamba and Falcon-H1.
UnitSpec read_mamba2(const Json& config, double eps, bool norm_by_groups,
                     const std::string& where) {
  refuse_step_limits(config, where);
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

void write_mamba2(Json& config, const Options& mamba) {
  config["mamba_n_heads"] = mamba.integer("mamba2", "heads");
  config["mamba_d_head"] = mamba.integer("mamba2", "head_dim");
  config["mamba_d_state"] = mamba.integer("mamba2", "state");
  config["mamba_n_groups"] = mamba.integer("mamba2", "b_heads");
  config["mamba_d_conv"] = mamba.integer("mamba2", "conv");
  config["mamba_conv_bias"] = true;
  config["mamba_proj_bias"] = false;
}

float real(const Json& config, const char* key, double fallback, const std::string& where) {
  return static_cast<float>(config::real_or(config, key, fallback, where));
}

UnitSpec nemotron_experts(const Json& config, const std::string& where) {
  const int64_t shared =
      config::integer_or(config, "n_shared_experts", 0, 0, kMaxExperts, where) > 0
          ? config::integer(config, "moe_shared_expert_intermediate_size", 1, kMaxInner, where)
          : 0;
  UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "n_routed_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", config::integer(config, "moe_intermediate_size", 1, kMaxInner, where)},
       {"router", std::string("sigmoid")},
       {"router_bias", true},
       {"groups", config::integer_or(config, "n_group", 1, 1, kMaxExperts, where)},
       {"group_top", config::integer_or(config, "topk_group", 1, 1, kMaxExperts, where)},
       {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
       {"renormalise_eps", 1e-20},
       {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)},
       {"shared", shared},
       {"activation", config::text_or(config, "mlp_hidden_act", "relu2", where)}}};
  if (config::has(config, "moe_latent_size")) {
    experts.options.set("latent", config::integer(config, "moe_latent_size", 1, kMaxWidth, where));
  }
  return experts;
}

void write_nemotron_experts(Json& config, const Options& experts) {
  const int64_t shared = experts.integer("experts", "shared", 0);
  config["n_routed_experts"] = experts.integer("experts", "experts");
  config["num_experts_per_tok"] = experts.integer("experts", "top");
  config["moe_intermediate_size"] = experts.integer("experts", "inner");
  config["n_group"] = experts.integer("experts", "groups", 1);
  config["topk_group"] = experts.integer("experts", "group_top", 1);
  config["norm_topk_prob"] = experts.flag("experts", "renormalise", false);
  config["routed_scaling_factor"] = experts.real("experts", "scale", 1.0);
  config["n_shared_experts"] = shared > 0 ? 1 : 0;
  config["moe_shared_expert_intermediate_size"] = shared;
  config["mlp_hidden_act"] = experts.text("experts", "activation", "relu2");
  if (const int64_t latent = experts.integer("experts", "latent", 0); latent > 0) {
    config["moe_latent_size"] = latent;
  }
}

/// A letter a layer: M Mamba-2, * attention, - feed-forward, E experts. Newer files have words.
std::string nemotron_pattern(const Json& config, int64_t layers, const std::string& where) {
  if (!config::has(config, "layers_block_type")) {
    const std::string pattern = config::text_or(config, "hybrid_override_pattern", "", where);
    expect(std::ssize(pattern) == layers,
           "{}: expected {} letters in hybrid_override_pattern (num_hidden_layers), got {}", where,
           layers, pattern.size());
    return pattern;
  }
  constexpr std::pair<const char*, char> kWords[] = {
      {"mamba", 'M'}, {"attention", '*'},        {"mlp", '-'},
      {"moe", 'E'},   {"linear_attention", 'M'}, {"full_attention", '*'}};
  std::string pattern;
  for (const std::string& word :
       config::texts(config, "layers_block_type", static_cast<size_t>(layers), where)) {
    const auto* known = std::find_if(std::begin(kWords), std::end(kWords),
                                     [&](const auto& row) { return word == row.first; });
    expect(known != std::end(kWords),
           "{}: expected mamba, attention, mlp or moe in layers_block_type, got '{}'", where, word);
    pattern += known->second;
  }
  return pattern;
}

ModelSpec read_nemotron_h(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  refuse_step_limits(config, where);
  if (const auto words = config.find("layers_block_type");
      !config::has(config, "num_hidden_layers") && words != config.end() && words->is_array()) {
    config["num_hidden_layers"] = words->size();  // transformers saves the list alone
  }
  ModelSpec spec = config::read_model(config, "nemotron_h", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.norm.eps = real(config, "layer_norm_epsilon",
                       config::has(config, "rms_norm_eps") ? spec.norm.eps : 1e-5F, where);
  spec.rope.dim = sizes.head_dim;  // no layer rotates
  config::refuse_flags(config, {"use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias"},
                       where);
  const std::string pattern = nemotron_pattern(config, sizes.layers, where);
  UnitSpec attends = config::attention_of(sizes);
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

std::string write_nemotron_h(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "NemotronHForCausalLM", "nemotron_h");
  config["layer_norm_epsilon"] = config["rms_norm_eps"];
  std::string pattern;
  for (const LayerSpec& layer : spec.layers) {
    const std::string kind = layer_kind(layer);
    pattern += kind == "mamba2" ? 'M' : kind == "attention" ? '*' : kind == "experts" ? 'E' : '-';
  }
  config["hybrid_override_pattern"] = pattern;
  config::write_attention(config, config::mixer_or_small(spec, "attention").options);
  const Options mamba = config::mixer_or_small(spec, "mamba2").options;
  config["mamba_num_heads"] = mamba.integer("mamba2", "heads");
  config["mamba_head_dim"] = mamba.integer("mamba2", "head_dim");
  config["ssm_state_size"] = mamba.integer("mamba2", "state");
  config["n_groups"] = mamba.integer("mamba2", "b_heads");
  config["conv_kernel"] = mamba.integer("mamba2", "conv");
  config["use_conv_bias"] = true;
  if (const UnitSpec* dense = config::find_unit(spec, "feed_forward"); dense != nullptr) {
    config["intermediate_size"] = dense->options.integer("feed_forward", "inner");
    config["mlp_hidden_act"] = dense->options.text("feed_forward", "activation");
  }
  if (const UnitSpec* experts = config::find_unit(spec, "experts"); experts != nullptr) {
    write_nemotron_experts(config, experts->options);
  }
  return config::expressed(config, spec, read_nemotron_h);
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
  config::refuse_flags(config, {"attention_bias", "mlp_bias", "projectors_bias"}, where);
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
  UnitSpec attends = config::attention_of(sizes);
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
                     // Attention first: it is what a conversion replaces.
                     {{{.norm = spec.norm, .units = {attends, mamba}},
                       {.norm = spec.norm, .units = {feed_forward}}}});
  return spec;
}

std::string write_falcon_h1(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "FalconH1ForCausalLM", "falcon_h1");
  const UnitSpec& mamba = config::first_unit(spec, "mamba2");
  const UnitSpec& attends = config::first_unit(spec, "attention");
  const UnitSpec& feed_forward = config::first_unit(spec, "swiglu");
  config["intermediate_size"] = feed_forward.options.integer("swiglu", "inner");
  config::write_attention(config, attends.options);
  write_mamba2(config, mamba.options);
  config["mamba_d_ssm"] =
      mamba.options.integer("mamba2", "heads") * mamba.options.integer("mamba2", "head_dim");
  config["mamba_rms_norm"] = mamba.options.flag("mamba2", "norm", true);
  config["mamba_norm_before_gate"] = false;
  config["embedding_multiplier"] = config::shortest(spec.embedding_scale);
  config["lm_head_multiplier"] = config::shortest(spec.logit_scale);
  config["attention_in_multiplier"] = 1.0;
  config["attention_out_multiplier"] = config::shortest(attends.out);
  config["key_multiplier"] = attends.options.real("attention", "key_scale", 1.0);
  config["ssm_in_multiplier"] = mamba.options.real("mamba2", "in_scale", 1.0);
  config["ssm_multipliers"] = mamba.options.reals("mamba2", "row_scales");
  config["ssm_out_multiplier"] = config::shortest(mamba.out);
  config["mlp_multipliers"] = {feed_forward.options.real("swiglu", "gate_scale", 1.0),
                               config::shortest(feed_forward.out)};
  return config::expressed(config, spec, read_falcon_h1);
}

ModelSpec read_granite_hybrid(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "granite_hybrid", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  spec.embedding_scale = real(config, "embedding_multiplier", 1.0, where);
  spec.logit_scale = 1.0F / real(config, "logits_scaling", 1.0, where);
  config::refuse_flags(config, {"attention_bias"}, where);
  const float residual = real(config, "residual_multiplier", 1.0, where);
  UnitSpec attends = config::attention_of(sizes);
  attends.options.set("scale", config::real_or(config, "attention_multiplier", 1.0, where));
  if (config::text_or(config, "position_embedding_type", "nope", where) != "rope") {
    attends.options.set("rope", false);
  }
  UnitSpec mamba = read_mamba2(config, spec.norm.eps, false, where);
  const int64_t experts = config::integer_or(config, "num_local_experts", 0, 0, kMaxExperts, where);
  const int64_t shared = config::integer(config, "shared_intermediate_size", 1, kMaxInner, where);
  UnitSpec feed_forward{"swiglu", {{"inner", shared}}};
  if (experts > 0) {
    feed_forward = {"experts",
                    {{"experts", experts},
                     {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
                     {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
                     {"router", std::string("topk_softmax")},
                     {"shared", shared}}};
  }
  attends.out = mamba.out = feed_forward.out = residual;
  for (const std::string& type :
       config::texts(config, "layer_types", static_cast<size_t>(sizes.layers), where)) {
    // transformers saves the longer words.
    const bool is_mamba = type == "mamba" || type == "linear_attention";
    expect(is_mamba || type == "attention" || type == "full_attention",
           "{}: expected mamba or attention in layer_types, got '{}'", where, type);
    spec.layers.push_back({{{.norm = spec.norm, .units = {is_mamba ? mamba : attends}},
                            {.norm = spec.norm, .units = {feed_forward}}}});
  }
  return spec;
}

std::string write_granite_hybrid(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "GraniteMoeHybridForCausalLM", "granitemoehybrid");
  const UnitSpec attends = config::mixer_or_small(spec, "attention");
  if (const UnitSpec* experts = config::find_unit(spec, "experts"); experts != nullptr) {
    config["num_local_experts"] = experts->options.integer("experts", "experts");
    config["num_experts_per_tok"] = experts->options.integer("experts", "top");
    config["intermediate_size"] = experts->options.integer("experts", "inner");
    config["shared_intermediate_size"] = experts->options.integer("experts", "shared", 0);
  } else {
    const int64_t inner = config::first_unit(spec, "swiglu").options.integer("swiglu", "inner");
    config["num_local_experts"] = 0;
    config["num_experts_per_tok"] = 0;
    config["intermediate_size"] = inner;
    config["shared_intermediate_size"] = inner;
  }
  config["layer_types"] = Json::array();
  for (const LayerSpec& layer : spec.layers) {
    config["layer_types"].push_back(layer.mixes_by("attention") ? "attention" : "mamba");
  }
  config::write_attention(config, attends.options);
  write_mamba2(config, config::mixer_or_small(spec, "mamba2").options);
  config["position_embedding_type"] =
      attends.options.flag("attention", "rope", true) ? "rope" : "nope";
  config["attention_multiplier"] = attends.options.real("attention", "scale", 1.0);
  config["embedding_multiplier"] = config::shortest(spec.embedding_scale);
  config["logits_scaling"] = config::shortest(1.0F / spec.logit_scale);
  const UnitSpec* mixer = spec.layers.front().mixer();  // all units have one factor
  config["residual_multiplier"] = config::shortest(mixer == nullptr ? 1.0F : mixer->out);
  return config::expressed(config, spec, read_granite_hybrid);
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
  config::refuse_flags(config, {"attention_bias", "mlp_bias"}, where);
  const UnitSpec mamba = read_mamba2(config, spec.norm.eps, false, where);
  const int64_t inner = config::integer(config, "intermediate_size", 1, kMaxInner, where);
  spec.layers.assign(static_cast<size_t>(sizes.layers), decoder_layer(mamba, inner, spec.norm));
  const auto it = config.find("attn_layer_indices");
  expect(it != config.end() && it->is_array(), "{}: expected the list 'attn_layer_indices'", where);
  for (const Json& index : *it) {
    const int64_t i = config::integer(Json{{"attn_layer_indices", index}}, "attn_layer_indices", 0,
                                      sizes.layers - 1, where);
    spec.layers[static_cast<size_t>(i)] =
        decoder_layer(config::attention_of(sizes), inner, spec.norm);
  }
  return spec;
}

std::string write_bamba(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "BambaForCausalLM", "bamba");
  const Options attends = config::mixer_or_small(spec, "attention").options;
  config["attn_layer_indices"] = Json::array();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (spec.layers[i].mixes_by("attention")) {
      config["attn_layer_indices"].push_back(i);
    }
  }
  config["intermediate_size"] =
      config::first_unit(spec, "swiglu").options.integer("swiglu", "inner");
  config::write_attention(config, attends);
  write_mamba2(config, config::mixer_or_small(spec, "mamba2").options);
  config["partial_rotary_factor"] =
      config::rotary_share(spec.rope.dim, attends.integer("attention", "head_dim"));
  return config::expressed(config, spec, read_bamba);
}

/// NVIDIA's names, and those of transformers, which saves `model.` in place of `backbone.`.
std::vector<TensorRule> nemotron_tensors() {
  static const std::pair<const char*, std::string> kNames[] = {
      {"embed.weight", "embeddings.weight"},
      {"norm.*", "norm_f.*"},
      {"layers.*.input_norm.*", "layers.*.norm.*"},
      {"layers.*.feed_forward.up.*", "layers.*.mixer.up_proj.*"},
      {"layers.*.feed_forward.down.*", "layers.*.mixer.down_proj.*"},
      {"layers.*.feed_forward.router.weight", "layers.*.mixer.gate.weight"},
      {"layers.*.feed_forward.router.bias", "layers.*.mixer.gate.e_score_correction_bias"},
      {"layers.*.feed_forward.experts.up.*", "layers.*.mixer.experts.#.up_proj.*"},
      {"layers.*.feed_forward.experts.down.*", "layers.*.mixer.experts.#.down_proj.*"},
      {"layers.*.feed_forward.shared.up.*", "layers.*.mixer.shared_experts.up_proj.*"},
      {"layers.*.feed_forward.shared.down.*", "layers.*.mixer.shared_experts.down_proj.*"},
      {"layers.*.feed_forward.latent_in.*", "layers.*.mixer.fc1_latent_proj.*"},
      {"layers.*.feed_forward.latent_out.*", "layers.*.mixer.fc2_latent_proj.*"},
      {"layers.*.mixer.*", "layers.*.mixer.*"}};
  static const auto kWith = [](const std::string& prefix) {
    std::vector<std::string> names;
    for (const auto& [ours, theirs] : kNames) {
      names.push_back(prefix + theirs);
    }
    return names;
  };
  static const std::vector<std::string> kPrefixed[] = {kWith("backbone."), kWith("model.")};
  std::vector<TensorRule> rules = {{"head.weight", "lm_head.weight"}};
  for (const std::vector<std::string>& names : kPrefixed) {
    for (size_t i = 0; i < names.size(); ++i) {
      rules.push_back({.ours = kNames[i].first, .theirs = names[i].c_str()});
    }
  }
  return rules;
}

/// A letter a layer, as of the model's own; the first of a head has the projection of the token's
/// embedding and the hidden state, the last a norm.
MtpRules nemotron_mtp() {
  using Place = MtpTensor::Place;
  using Shape = MtpTensor::Shape;
  MtpRules rules{.tensors = {"mtp.*"}};
  rules.layers = [](const ModelSpec& spec, int64_t heads, const std::string& kinds) {
    std::vector<LayerSpec> layers;
    for (int64_t head = 0; head < heads; ++head) {
      for (const char letter : kinds.empty() ? "*E" : kinds) {
        const auto layer =
            std::find_if(spec.layers.begin(), spec.layers.end(), [&](const LayerSpec& candidate) {
              const std::string kind = layer_kind(candidate);
              return kind == (letter == '*'   ? "attention"
                              : letter == 'E' ? "experts"
                              : letter == 'M' ? "mamba2"
                                              : "feed_forward");
            });
        expect(layer != spec.layers.end(),
               "nemotron_h: a head that predicts more tokens has a layer {} "
               "(mtp_hybrid_override_pattern), and the model has none like it",
               letter);
        layers.push_back(*layer);
      }
    }
    return layers;
  };
  rules.kinds_key = "mtp_hybrid_override_pattern";
  rules.apart = true;
  rules.own = {{"mtp.layers.#.enorm.weight"},
               {"mtp.layers.#.hnorm.weight"},
               {"mtp.layers.#.eh_proj.weight", Shape::kJoin},
               {"mtp.layers.#.final_layernorm.weight", Shape::kNorm, Place::kLast}};
  return rules;
}

Family nemotron_h_family() {
  return {
      "nemotron_h", {"nemotron_h"}, read_nemotron_h, write_nemotron_h, nemotron_tensors(), {}, {},
      {},           nemotron_mtp()};
}

Family falcon_h1_family() {
  return {"falcon_h1",
          {"falcon_h1"},
          read_falcon_h1,
          write_falcon_h1,
          config::jamba_tensors({
              {"layers.*.mamba.*", "model.layers.*.mamba.*"},
              {"layers.*.self_attn.*", "model.layers.*.self_attn.*"},
          }),
          config::decoder_ignored()};
}

Family granite_hybrid_family() {
  return {"granite_hybrid",
          {"granitemoehybrid"},
          read_granite_hybrid,
          write_granite_hybrid,
          config::granite_tensors({
              {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mamba.*", .mixer = "mamba2"},
          }),
          config::decoder_ignored()};
}

Family bamba_family() {
  return {"bamba",
          {"bamba"},
          read_bamba,
          write_bamba,
          config::jamba_tensors({
              {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mamba.*", .mixer = "mamba2"},
          }),
          config::decoder_ignored()};
}

}  // namespace

std::vector<Family> mamba_hybrid_families() {
  return {bamba_family(), granite_hybrid_family(), nemotron_h_family(), falcon_h1_family()};
}

}  // namespace cambium
