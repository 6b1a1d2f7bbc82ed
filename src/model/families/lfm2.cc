// LFM2 (arXiv 2511.23404): gated short convolutions, with grouped-query attention in some layers; a
// feed-forward in each, of experts in the LFM2-MoE models.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

namespace cambium {
namespace {

using config::Json;

/// block_ff_dim is not the width, unless block_auto_adjust_ff_dim is off: two thirds of it, times a
/// factor, each cut to a whole number, and rounded up.
int64_t dense_inner(const Json& config, const std::string& where) {
  const char* key = config::has(config, "block_ff_dim") ? "block_ff_dim" : "intermediate_size";
  const int64_t inner = config::integer(config, key, 1, kMaxInner, where);
  if (!config::flag_or(config, "block_auto_adjust_ff_dim", true, where)) {
    return inner;
  }
  const int64_t multiple =
      config::integer_or(config, "block_multiple_of", 256, 1, kMaxInner, where);
  const double factor =
      in_range(where, "block_ffn_dim_multiplier",
               config::real_or(config, "block_ffn_dim_multiplier", 1.0, where), 1e-3, 1e3);
  const int64_t two_thirds = 2 * inner / 3;
  const auto cut = static_cast<int64_t>(factor * static_cast<double>(two_thirds));
  return in_range(where, key, (cut + multiple - 1) / multiple * multiple, 1, kMaxInner);
}

std::vector<std::string> kinds_of(const Json& config, int64_t layers, const std::string& where) {
  const auto count = static_cast<size_t>(layers);
  if (config::has(config, "layer_types")) {
    return config::texts(config, "layer_types", count, where);
  }
  const auto it = config.find("full_attn_idxs");
  expect(it != config.end() && it->is_array(),
         "{}: expected the list 'layer_types' or 'full_attn_idxs'", where);
  std::vector<std::string> kinds(count, "conv");
  for (const Json& index : *it) {
    kinds[static_cast<size_t>(config::integer(Json{{"full_attn_idxs", index}}, "full_attn_idxs", 0,
                                              layers - 1, where))] = "full_attention";
  }
  return kinds;
}

UnitSpec read_experts(const Json& config, const std::string& where) {
  return {"experts",
          {{"experts", config::integer(config, "num_experts", 1, kMaxExperts, where)},
           {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
           {"inner", config::integer(config, "moe_intermediate_size", 1, kMaxInner, where)},
           {"router", std::string("sigmoid")},
           {"router_bias", config::flag_or(config, "use_expert_bias", true, where)},
           {"renormalise", config::flag_or(config, "norm_topk_prob", true, where)},
           {"renormalise_eps", 1e-6},
           {"scale", config::real_or(config, "routed_scaling_factor", 1.0, where)}}};
}

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  const bool sparse = config::text_or(config, "model_type", "lfm2", where) == "lfm2_moe";
  config["rms_norm_eps"] = config::real_or(config, "norm_eps", 1e-5, where);
  ModelSpec spec = config::read_model(config, "lfm2", where);
  spec.tied_head = config::flag_or(
      config, "tie_embedding", config::flag_or(config, "tie_word_embeddings", true, where), where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  UnitSpec attends = config::attention_of(sizes);
  attends.options.set("qk_norm_eps", static_cast<double>(spec.norm.eps));
  const UnitSpec conv{"short_conv",
                      {{"conv", config::integer_or(config, "conv_L_cache", 3, 2, 64, where)},
                       {"bias", config::flag_or(config, "conv_bias", false, where)}}};
  const int64_t dense_layers =
      sparse ? config::integer_or(config, "num_dense_layers", 0, 0, sizes.layers, where)
             : sizes.layers;
  UnitSpec dense{"swiglu", {}};
  if (dense_layers > 0) {
    dense.options.set("inner",
                      sparse ? config::integer(config, "intermediate_size", 1, kMaxInner, where)
                             : dense_inner(config, where));
  }
  const UnitSpec experts = sparse ? read_experts(config, where) : UnitSpec{};
  for (const std::string& kind : kinds_of(config, sizes.layers, where)) {
    expect(kind == "conv" || kind == "full_attention",
           "{}: expected conv or full_attention in layer_types, got '{}'", where, kind);
    spec.layers.push_back(
        {{{.norm = spec.norm, .units = {kind == "conv" ? conv : attends}},
          {.norm = spec.norm,
           .units = {std::ssize(spec.layers) < dense_layers ? dense : experts}}}});
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  const UnitSpec* experts = config::find_unit(spec, "experts");
  Json config = experts == nullptr ? config::begin_config(spec, "Lfm2ForCausalLM", "lfm2")
                                   : config::begin_config(spec, "Lfm2MoeForCausalLM", "lfm2_moe");
  config["norm_eps"] = config["rms_norm_eps"];
  config.erase("rms_norm_eps");
  config["tie_embedding"] = spec.tied_head;
  int64_t dense_layers = 0;
  config["layer_types"] = Json::array();
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* feed_forward = layer.feed_forward();
    dense_layers += feed_forward != nullptr && feed_forward->kind == "swiglu" ? 1 : 0;
    config["layer_types"].push_back(layer.mixes_by("attention") ? "full_attention" : "conv");
  }
  if (const UnitSpec* dense = config::find_unit(spec, "swiglu"); dense != nullptr) {
    config["intermediate_size"] = dense->options.integer("swiglu", "inner");
    config["block_auto_adjust_ff_dim"] = false;
  }
  if (experts != nullptr) {
    const Options& options = experts->options;
    config["num_dense_layers"] = dense_layers;
    config["num_experts"] = options.integer("experts", "experts");
    config["num_experts_per_tok"] = options.integer("experts", "top");
    config["moe_intermediate_size"] = options.integer("experts", "inner");
    config["use_expert_bias"] = options.flag("experts", "router_bias", false);
    config["norm_topk_prob"] = options.flag("experts", "renormalise", false);
    config["routed_scaling_factor"] = options.real("experts", "scale", 1.0);
  }
  config::write_attention(config, config::mixer_or_small(spec, "attention").options);
  const Options conv = config::mixer_or_small(spec, "short_conv").options;
  config["conv_L_cache"] = conv.integer("short_conv", "conv");
  config["conv_bias"] = conv.flag("short_conv", "bias", false);
  return config::expressed(config, spec, read);
}

}  // namespace

std::vector<Family> lfm2_families() {
  return {
      {"lfm2",
       {"lfm2", "lfm2_moe"},
       read,
       write,
       config::decoder_tensors({
           {"norm.*", "model.embedding_norm.*"},
           {"layers.*.input_norm.*", "model.layers.*.operator_norm.*"},
           {"layers.*.post_norm.*", "model.layers.*.ffn_norm.*"},
           {"layers.*.feed_forward.gate.*", "model.layers.*.feed_forward.w1.*"},
           {"layers.*.feed_forward.up.*", "model.layers.*.feed_forward.w3.*"},
           {"layers.*.feed_forward.down.*", "model.layers.*.feed_forward.w2.*"},
           {"layers.*.feed_forward.router.weight", "model.layers.*.feed_forward.gate.weight"},
           {"layers.*.feed_forward.router.bias", "model.layers.*.feed_forward.expert_bias"},
           {"layers.*.feed_forward.experts.gate.*", "model.layers.*.feed_forward.experts.#.w1.*"},
           {"layers.*.feed_forward.experts.up.*", "model.layers.*.feed_forward.experts.#.w3.*"},
           {"layers.*.feed_forward.experts.down.*", "model.layers.*.feed_forward.experts.#.w2.*"},
           {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.conv.*", .mixer = "short_conv"},
           {"layers.*.mixer.o_proj.*", "model.layers.*.self_attn.out_proj.*"},
           {"layers.*.mixer.q_norm.*", "model.layers.*.self_attn.q_layernorm.*"},
           {"layers.*.mixer.k_norm.*", "model.layers.*.self_attn.k_layernorm.*"},
       }),
       config::decoder_ignored()}};
}

}  // namespace cambium
