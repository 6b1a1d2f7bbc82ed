// Qwen3-Next and Qwen3.5: Gated DeltaNet beside attention with an output gate, zero-centred norms.
// Qwen3-Next packs the delta rule's projections by key head, Qwen3.5 has them apart; a composite
// configuration holds the text model in text_config and its tensors under model.language_model.
#include <algorithm>

#include "base/checked.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

namespace cambium {
namespace {

using config::Json;

struct Kind {
  const char* name;  // of the family
  const char* model_type;
  const char* architecture;
  const char* text_type;  // model_type of text_config; null = the configuration is the text model's
  bool experts = false;   // in place of SwiGLU
  bool stacked = true;    // files are written with the experts of a layer in one tensor
  bool packed = false;    // the delta rule's projections lie together, by key head
  bool mrope = true;      // rotations are said of the three axes of images
};
constexpr Kind kNext{.name = "qwen3_next",
                     .model_type = "qwen3_next",
                     .architecture = "Qwen3NextForCausalLM",
                     .text_type = nullptr,
                     .experts = true,
                     .stacked = false,
                     .packed = true,
                     .mrope = false};
constexpr Kind k35{"qwen3_5", "qwen3_5", "Qwen3_5ForConditionalGeneration", "qwen3_5_text"};
constexpr Kind k35Text{"qwen3_5_text", "qwen3_5_text", "Qwen3_5ForCausalLM", nullptr};
constexpr Kind k35Moe{.name = "qwen3_5_moe",
                      .model_type = "qwen3_5_moe",
                      .architecture = "Qwen3_5MoeForConditionalGeneration",
                      .text_type = "qwen3_5_moe_text",
                      .experts = true};
constexpr Kind k35MoeText{.name = "qwen3_5_moe_text",
                          .model_type = "qwen3_5_moe_text",
                          .architecture = "Qwen3_5MoeForCausalLM",
                          .text_type = nullptr,
                          .experts = true};

UnitSpec read_delta(const Json& config, double eps, const std::string& where) {
  const int64_t heads = config::integer(config, "linear_num_value_heads", 1, kMaxHeads, where);
  const int64_t key_heads = config::integer(config, "linear_num_key_heads", 1, kMaxHeads, where);
  const std::string gate = config::text_or(config, "output_gate_type", "silu", where);
  expect(gate == "silu" || gate == "swish" || gate == "sigmoid",
         "{}: expected output_gate_type silu, swish or sigmoid, got '{}'", where, gate);
  UnitSpec unit{
      "gated_delta_net",
      {{"heads", heads},
       {"q_heads", key_heads},
       {"k_heads", key_heads},
       {"v_heads", heads},
       {"key_dim", config::integer(config, "linear_key_head_dim", 1, kMaxHeadDim, where)},
       {"value_dim", config::integer(config, "linear_value_head_dim", 1, kMaxHeadDim, where)},
       {"conv", config::integer_or(config, "linear_conv_kernel_dim", 4, 2, 64, where)},
       {"norm_eps", eps}}};
  if (gate == "sigmoid") {
    unit.options.set("out_gate", std::string("sigmoid"));
  }
  return unit;
}

UnitSpec read_attention(const Json& config, const config::Sizes& sizes, double eps,
                        const std::string& where) {
  UnitSpec unit{"attention",
                {{"heads", sizes.heads},
                 {"kv_heads", sizes.kv_heads},
                 {"head_dim", sizes.head_dim},
                 {"qk_norm", std::string("zero_centred")},
                 {"qk_norm_eps", eps}}};
  if (config::flag_or(config, "attn_output_gate", true, where)) {
    unit.options.set("gate", true);
  }
  if (config::flag_or(config, "attention_bias", false, where)) {
    unit.options.set("qkv_bias", true);
    unit.options.set("out_bias", true);
  }
  return unit;
}

UnitSpec read_experts(const Json& config, const std::string& where) {
  expect(config::integer_or(config, "decoder_sparse_step", 1, 1, kMaxLayers, where) == 1 &&
             (!config::has(config, "mlp_only_layers") || config["mlp_only_layers"].empty()),
         "{}: expected experts in every layer, as in every published model", where);
  return {
      "experts",
      {{"experts", config::integer(config, "num_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", config::integer(config, "moe_intermediate_size", 1, kMaxInner, where)},
       {"router", std::string("softmax")},
       {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
       {"shared", config::integer(config, "shared_expert_intermediate_size", 1, kMaxInner, where)},
       {"shared_gate", true}}};
}

ModelSpec read(Json config, const Kind& kind, const std::string& where) {
  if (!config::has(config, "partial_rotary_factor")) {
    config["partial_rotary_factor"] = 0.25;  // the default of transformers' configurations
  }
  ModelSpec spec = config::read_model(config, kind.name, where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.norm.kind = NormKind::kZeroCentred;
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  const double eps = config::real_or(config, "rms_norm_eps", 1e-6, where);
  const UnitSpec delta = read_delta(config, eps, where);
  const UnitSpec attends = read_attention(config, sizes, eps, where);
  const UnitSpec feed_forward =
      kind.experts
          ? read_experts(config, where)
          : UnitSpec{
                "swiglu",
                {{"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)}}};
  const int64_t every =
      config::integer_or(config, "full_attention_interval", 4, 1, kMaxLayers, where);
  std::vector<std::string> types;
  for (int64_t i = 0; i < sizes.layers; ++i) {
    types.emplace_back((i + 1) % every == 0 ? "full_attention" : "linear_attention");
  }
  if (config::has(config, "layer_types")) {
    types = config::texts(config, "layer_types", static_cast<size_t>(sizes.layers), where);
  }
  for (const std::string& type : types) {
    expect(type == "full_attention" || type == "linear_attention",
           "{}: expected full_attention or linear_attention in layer_types, got '{}'", where, type);
    spec.layers.push_back(
        {{{.norm = spec.norm, .units = {type == "full_attention" ? attends : delta}},
          {.norm = spec.norm, .units = {feed_forward}}}});
  }
  return spec;
}

template <const Kind& kKind>
ModelSpec read_kind(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  if (kKind.text_type != nullptr) {
    config = config::text_config(config, where);
  }
  return read(std::move(config), kKind, where);
}

Json write(const ModelSpec& spec, const Kind& kind) {
  Json config = config::begin_config(spec, kind.architecture,
                                     kind.text_type != nullptr ? kind.text_type : kind.model_type);
  const Options attends = config::mixer_or_small(spec, "attention").options;
  const int64_t head_dim = attends.integer("attention", "head_dim");
  config::move_rope_to_parameters(config, spec.rope, head_dim);
  // Always: a quarter where nothing is said.
  config["rope_parameters"]["partial_rotary_factor"] =
      config::rotary_share(spec.rope.dim, head_dim);
  if (kind.mrope) {
    // Thirds of the pairs, which text turns alike.
    const int64_t pairs = spec.rope.dim / 2;
    config["rope_parameters"]["mrope_interleaved"] = true;
    config["rope_parameters"]["mrope_section"] = {(pairs + 2) / 3, (pairs + 1) / 3, pairs / 3};
  }
  config::write_attention(config, attends);
  config["attention_bias"] = attends.flag("attention", "qkv_bias", false);
  config["attn_output_gate"] = attends.flag("attention", "gate", false);
  const Options delta = config::mixer_or_small(spec, "gated_delta_net").options;
  for (const auto& [theirs, ours] : {std::pair{"linear_num_value_heads", "heads"},
                                     {"linear_num_key_heads", "k_heads"},
                                     {"linear_key_head_dim", "key_dim"},
                                     {"linear_value_head_dim", "value_dim"},
                                     {"linear_conv_kernel_dim", "conv"}}) {
    config[theirs] = delta.integer("gated_delta_net", ours);
  }
  if (delta.has("out_gate")) {
    config["output_gate_type"] = delta.text("gated_delta_net", "out_gate");
  }
  for (const LayerSpec& layer : spec.layers) {
    config["layer_types"].push_back(layer.mixes_by("attention") ? "full_attention"
                                                                : "linear_attention");
  }
  if (kind.experts) {
    const Options& experts = config::first_unit(spec, "experts").options;
    config["num_experts"] = experts.integer("experts", "experts");
    config["num_experts_per_tok"] = experts.integer("experts", "top");
    config["moe_intermediate_size"] = experts.integer("experts", "inner");
    config["shared_expert_intermediate_size"] = experts.integer("experts", "shared", 0);
    config["norm_topk_prob"] = experts.flag("experts", "renormalise", false);
    config["decoder_sparse_step"] = 1;
  } else {
    config["intermediate_size"] =
        config::first_unit(spec, "swiglu").options.integer("swiglu", "inner");
  }
  config["torch_dtype"] = "float32";
  if (kind.text_type == nullptr) {
    return config;
  }
  return config::composite_config(config, kind.architecture, kind.model_type);
}

template <const Kind& kKind>
std::string write_kind(const ModelSpec& spec) {
  return config::expressed(write(spec, kKind), spec, read_kind<kKind>);
}

/// The names of a text model at the top; the projections of the delta rule come first.
std::vector<TensorRule> tensors(std::vector<TensorRule> projections, const Kind& kind) {
  std::vector<TensorRule> all = std::move(projections);
  const std::vector<TensorRule> more = {
      {.ours = "layers.*.mixer.*",
       .theirs = "model.layers.*.linear_attn.*",
       .mixer = "gated_delta_net"},
  };
  const std::vector<TensorRule> experts = {
      {"layers.*.feed_forward.router.weight", "model.layers.*.mlp.gate.weight"},
      {"layers.*.feed_forward.shared.gate.weight",
       "model.layers.*.mlp.shared_expert.gate_proj.weight"},
      {"layers.*.feed_forward.shared.up.weight", "model.layers.*.mlp.shared_expert.up_proj.weight"},
      {"layers.*.feed_forward.shared.down.weight",
       "model.layers.*.mlp.shared_expert.down_proj.weight"},
      {"layers.*.feed_forward.shared_gate.weight", "model.layers.*.mlp.shared_expert_gate.weight"},
  };
  const std::vector<TensorRule> stacks = {
      {.theirs = "model.layers.*.mlp.experts.gate_up_proj",
       .rows = {"layers.*.feed_forward.experts.gate.weight",
                "layers.*.feed_forward.experts.up.weight"},
       .stacked = true},
      {"layers.*.feed_forward.experts.down.weight", "model.layers.*.mlp.experts.down_proj"},
  };
  const std::vector<TensorRule> apart = {
      {"layers.*.feed_forward.experts.gate.weight",
       "model.layers.*.mlp.experts.#.gate_proj.weight"},
      {"layers.*.feed_forward.experts.up.weight", "model.layers.*.mlp.experts.#.up_proj.weight"},
      {"layers.*.feed_forward.experts.down.weight",
       "model.layers.*.mlp.experts.#.down_proj.weight"},
  };
  const auto add = [&](const std::vector<TensorRule>& rules) {
    all.insert(all.end(), rules.begin(), rules.end());
  };
  add(more);
  if (kind.experts) {
    add(experts);
    add(kind.stacked ? stacks : apart);
    add(kind.stacked ? apart : stacks);
  }
  return config::decoder_tensors(all);
}

std::vector<TensorRule> packed_tensors(const Kind& kind) {
  return tensors(
      {{.theirs = "model.layers.*.linear_attn.in_proj_qkvz.weight",
        .mixer = "gated_delta_net",
        .rows = {"layers.*.mixer.in_proj.weight:q", "layers.*.mixer.in_proj.weight:k",
                 "layers.*.mixer.in_proj.weight:v", "layers.*.mixer.in_proj.weight:z"},
        .groups = "k_heads"},
       {.theirs = "model.layers.*.linear_attn.in_proj_ba.weight",
        .mixer = "gated_delta_net",
        .rows = {"layers.*.mixer.ba_proj.weight:beta", "layers.*.mixer.ba_proj.weight:decay"},
        .groups = "k_heads"}},
      kind);
}

std::vector<TensorRule> separate_tensors(const Kind& kind) {
  const auto one = [](const char* theirs, std::vector<std::string_view> rows) {
    return TensorRule{.theirs = theirs, .mixer = "gated_delta_net", .rows = std::move(rows)};
  };
  return tensors(
      {one("model.layers.*.linear_attn.in_proj_qkv.weight",
           {"layers.*.mixer.in_proj.weight:q", "layers.*.mixer.in_proj.weight:k",
            "layers.*.mixer.in_proj.weight:v"}),
       one("model.layers.*.linear_attn.in_proj_z.weight", {"layers.*.mixer.in_proj.weight:z"}),
       one("model.layers.*.linear_attn.in_proj_b.weight", {"layers.*.mixer.ba_proj.weight:beta"}),
       one("model.layers.*.linear_attn.in_proj_a.weight", {"layers.*.mixer.ba_proj.weight:decay"})},
      kind);
}

/// Layers of attention, behind a projection of the token's embedding and the hidden state.
MtpRules mtp(const Kind& kind) {
  MtpRules rules{.tensors = {"mtp.*"},
                 .count = kind.packed ? "num_nextn_predict_layers" : "mtp_num_hidden_layers",
                 .otherwise = 1};
  rules.layers = [](const ModelSpec& spec, int64_t heads, const std::string& /*kinds*/) {
    const auto layer =
        std::find_if(spec.layers.begin(), spec.layers.end(),
                     [](const LayerSpec& candidate) { return candidate.mixes_by("attention"); });
    expect(layer != spec.layers.end(),
           "{}: a head that predicts more tokens has attention, and the model has none",
           spec.family);
    return std::vector<LayerSpec>(static_cast<size_t>(heads), *layer);
  };
  rules.apart = true;
  rules.own = {{"mtp.fc.weight", MtpTensor::Shape::kJoin},
               {"mtp.pre_fc_norm_embedding.weight"},
               {"mtp.pre_fc_norm_hidden.weight"},
               {"mtp.norm.weight"}};
  return rules;
}

template <const Kind& kKind>
Family family() {
  std::vector<TensorRule> rules = kKind.packed ? packed_tensors(kKind) : separate_tensors(kKind);
  std::vector<std::string> ignored = config::decoder_ignored();
  if (kKind.text_type != nullptr) {
    rules = config::tensors_under(rules, "model.", "model.language_model.");
    ignored.emplace_back("model.visual.*");
  }
  return {kKind.name, {kKind.model_type}, read_kind<kKind>, write_kind<kKind>, rules, ignored, {},
          {},         mtp(kKind)};
}

}  // namespace

std::vector<Family> qwen_hybrid_families() {
  return {family<kNext>(), family<k35>(), family<k35Text>(), family<k35Moe>(),
          family<k35MoeText>()};
}

}  // namespace cambium
