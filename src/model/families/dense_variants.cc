// Llama with something of its own: Phi-3 and 4 (fused projections, longrope, rotations of a part of
// the head), Granite (factors of embeddings, scores, branches and logits), SmolLM3 (layers that do
// not turn), Apertus (xIELU, norms of q and k).
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

namespace cambium {
namespace {

using config::DecoderTraits;
using config::Json;

constexpr DecoderTraits kBiases{.attention_bias = true, .mlp_bias = true};

void write_biases(const ModelSpec& spec, Json& config) {
  const LayerSpec& first = spec.layers.front();
  config["attention_bias"] = first.mixer()->options.flag("attention", "out_bias", false);
  config["mlp_bias"] = first.feed_forward()->options.flag("feed-forward", "bias", false);
}

ModelSpec read_phi3(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  if (const auto it = config.find("rope_scaling"); it != config.end() && it->is_object()) {
    // Older files call longrope by the names of other kinds.
    for (const char* key : {"type", "rope_type"}) {
      if (it->contains("long_factor") && config::text_or(*it, key, "", where) == "yarn") {
        (*it)[key] = "longrope";
      }
    }
  }
  ModelSpec spec = config::read_decoder(config, "phi3", where);
  const int64_t window = config::integer_or(config, "sliding_window", 0, 1, kMaxPositions, where);
  for (LayerSpec& layer : spec.layers) {
    if (window > 0) {
      layer.mixer()->options.set("window", window);
    }
  }
  return spec;
}

std::string write_phi3(const ModelSpec& spec) {
  Json config = config::write_attention_decoder(spec, "Phi3ForCausalLM", "phi3");
  const Options& attention = spec.layers.front().mixer()->options;
  const int64_t window = attention.integer("attention", "window", 0);
  config["sliding_window"] = window > 0 ? Json(window) : Json();
  if (spec.rope.scaling == RopeScaling::kLongRope) {
    config["original_max_position_embeddings"] = spec.rope.original_length;
    config["rope_scaling"]["type"] = "longrope";  // what its first readers look for
  }
  return config::expressed(config, spec, read_phi3);
}

ModelSpec read_granite(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "granite", where, kBiases);
  const auto factor = [&](const char* key) {
    return in_range(where, key, config::real_or(config, key, 1.0, where), 1e-9, 1e9);
  };
  spec.embedding_scale = static_cast<float>(factor("embedding_multiplier"));
  spec.logit_scale = 1.0F / static_cast<float>(factor("logits_scaling"));
  const double scores = factor("attention_multiplier");
  const auto residual = static_cast<float>(factor("residual_multiplier"));
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("scale", scores);
    for (BranchSpec& branch : layer.branches) {
      branch.units.front().out = residual;
    }
  }
  return spec;
}

std::string write_granite(const ModelSpec& spec) {
  Json config = config::write_attention_decoder(spec, "GraniteForCausalLM", "granite");
  write_biases(spec, config);
  const UnitSpec& attention = *spec.layers.front().mixer();
  config["embedding_multiplier"] = config::shortest(spec.embedding_scale);
  config["logits_scaling"] = config::shortest(1.0F / spec.logit_scale);
  config["attention_multiplier"] = attention.options.real("attention", "scale", 1.0);
  config["residual_multiplier"] = config::shortest(attention.out);
  return config::expressed(config, spec, read_granite);
}

// --- Granite 3 with experts: a softmax of the chosen in each layer, in granitemoeshared beside one
// that all tokens take.
ModelSpec read_granite_moe(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = read_granite(text, where);
  spec.family = "granite_moe";
  const int64_t shared =
      config::text_or(config, "model_type", "", where) == "granitemoeshared"
          ? config::integer_or(config, "shared_intermediate_size", 0, 0, kMaxInner, where)
          : 0;
  UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "num_local_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
       {"router", std::string("topk_softmax")}}};
  if (shared > 0) {
    experts.options.set("shared", shared);
  }
  expect(!config::flag_or(config, "mlp_bias", false, where),
         "{}: 'mlp_bias' is true, which models with experts do not have", where);
  for (LayerSpec& layer : spec.layers) {
    UnitSpec& unit = layer.branches.back().units.front();
    experts.out = unit.out;
    unit = experts;
  }
  return spec;
}

std::string write_granite_moe(const ModelSpec& spec) {
  const Options experts = config::first_unit(spec, "experts").options;
  const UnitSpec dense{"swiglu", {{"inner", experts.integer("experts", "inner")}}};
  ModelSpec granite = spec;
  granite.family = "granite";
  for (LayerSpec& layer : granite.layers) {
    for (BranchSpec& branch : layer.branches) {
      for (UnitSpec& unit : branch.units) {
        if (unit.kind == "experts") {
          unit = {dense.kind, dense.options, unit.out};
        }
      }
    }
  }
  Json config = Json::parse(write_granite(granite));
  const int64_t shared = experts.integer("experts", "shared", 0);
  config["architectures"] =
      Json::array({shared > 0 ? "GraniteMoeSharedForCausalLM" : "GraniteMoeForCausalLM"});
  config["model_type"] = shared > 0 ? "granitemoeshared" : "granitemoe";
  config.erase("mlp_bias");
  config["num_local_experts"] = experts.integer("experts", "experts");
  config["num_experts_per_tok"] = experts.integer("experts", "top");
  if (shared > 0) {
    config["shared_intermediate_size"] = shared;
  }
  return config::expressed(config, spec, read_granite_moe);
}

/// 1 where a layer turns, as config.json says it.
std::vector<bool> turning_layers(const Json& config, size_t layers, const std::string& where) {
  std::vector<bool> turns(layers);
  const auto it = config.find("no_rope_layers");
  if (it == config.end() || it->is_null()) {
    const int64_t interval =
        config::integer_or(config, "no_rope_layer_interval", 4, 1, kMaxLayers, where);
    for (size_t i = 0; i < layers; ++i) {
      turns[i] = static_cast<int64_t>(i + 1) % interval != 0;
    }
    return turns;
  }
  expect(it->is_array() && it->size() == layers,
         "{}: expected the list 'no_rope_layers' of {} numbers, one a layer", where, layers);
  for (size_t i = 0; i < layers; ++i) {
    turns[i] =
        config::integer(Json{{"no_rope_layers", (*it)[i]}}, "no_rope_layers", 0, 1, where) == 1;
  }
  return turns;
}

ModelSpec read_smollm3(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  if (!config::has(config, "tie_word_embeddings")) {
    config["tie_word_embeddings"] = true;  // the default of transformers' SmolLM3Config
  }
  ModelSpec spec = config::read_decoder(config, "smollm3", where, kBiases);
  const bool windowed = config::flag_or(config, "use_sliding_window", false, where);
  config::set_windows(
      spec, config,
      windowed ? config::integer_or(config, "sliding_window", 0, 1, kMaxPositions, where) : 0,
      kMaxLayers, where);
  const std::vector<bool> turns = turning_layers(config, spec.layers.size(), where);
  for (size_t i = 0; i < turns.size(); ++i) {
    if (!turns[i]) {
      spec.layers[i].mixer()->options.set("rope", false);
    }
  }
  return spec;
}

std::string write_smollm3(const ModelSpec& spec) {
  Json config = config::write_attention_decoder(spec, "SmolLM3ForCausalLM", "smollm3");
  write_biases(spec, config);
  config::write_layer_types(spec, config);
  config["use_sliding_window"] = !config["sliding_window"].is_null();
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* attention = layer.mixer();
    config["no_rope_layers"].push_back(
        attention != nullptr && attention->options.flag("attention", "rope", true) ? 1 : 0);
  }
  return config::expressed(config, spec, read_smollm3);
}

ModelSpec read_apertus(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  const std::string act = config::text_or(config, "hidden_act", "xielu", where);
  expect(act == "xielu", "{}: expected hidden_act xielu, got '{}'", where, act);
  config.erase("hidden_act");
  config::set_absent_scaling(config, {{"rope_type", "llama3"},  // transformers' ApertusConfig
                                      {"factor", 8.0},
                                      {"low_freq_factor", 1.0},
                                      {"high_freq_factor", 4.0},
                                      {"original_max_position_embeddings", 8192}});
  expect(config::flag_or(config, "qk_norm", true, where) &&
             !config::flag_or(config, "post_norm", false, where),
         "{}: expected qk_norm true and post_norm false, as in every published model", where);
  ModelSpec spec = config::read_decoder(config, "apertus", where, kBiases);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("qk_norm_eps", config::shortest(spec.norm.eps));
    UnitSpec& feed_forward = layer.branches.back().units.front();
    feed_forward.kind = "feed_forward";
    feed_forward.options.set("activation", "xielu");
  }
  return spec;
}

std::string write_apertus(const ModelSpec& spec) {
  Json config = config::write_attention_decoder(spec, "ApertusForCausalLM", "apertus");
  write_biases(spec, config);
  config["hidden_act"] = "xielu";
  config::set_absent_scaling(config, nullptr);
  config["qk_norm"] = true;
  config["post_norm"] = false;
  return config::expressed(config, spec, read_apertus);
}

Family phi3_family() {
  return {"phi3",
          {"phi3"},
          read_phi3,
          write_phi3,
          config::decoder_tensors(
              {{.theirs = "model.layers.*.self_attn.qkv_proj.*",
                .rows = {"layers.*.mixer.q_proj.*", "layers.*.mixer.k_proj.*",
                         "layers.*.mixer.v_proj.*"}},
               {.theirs = "model.layers.*.mlp.gate_up_proj.*",
                .rows = {"layers.*.feed_forward.gate.*", "layers.*.feed_forward.up.*"}}}),
          config::decoder_ignored()};
}

Family granite_family() {
  return {"granite",
          {"granite"},
          read_granite,
          write_granite,
          config::decoder_tensors(),
          config::decoder_ignored()};
}

Family granite_moe_family() {
  return {"granite_moe",     {"granitemoe", "granitemoeshared"}, read_granite_moe,
          write_granite_moe, config::granite_tensors(),          config::decoder_ignored()};
}

Family smollm3_family() {
  return {"smollm3",
          {"smollm3"},
          read_smollm3,
          write_smollm3,
          config::decoder_tensors(),
          config::decoder_ignored()};
}

Family apertus_family() {
  Family family{"apertus",
                {"apertus"},
                read_apertus,
                write_apertus,
                config::decoder_tensors(
                    {{"layers.*.input_norm.*", "model.layers.*.attention_layernorm.*"},
                     {"layers.*.post_norm.*", "model.layers.*.feedforward_layernorm.*"},
                     {"layers.*.feed_forward.alpha_p", "model.layers.*.mlp.act_fn.alpha_p"},
                     {"layers.*.feed_forward.alpha_n", "model.layers.*.mlp.act_fn.alpha_n"}}),
                config::decoder_ignored()};
  family.constants = {{"layers.*.feed_forward.alpha_p", "model.layers.*.mlp.act_fn.beta", 0.5},
                      {"layers.*.feed_forward.alpha_p", "model.layers.*.mlp.act_fn.eps", -1e-6}};
  return family;
}

}  // namespace

std::vector<Family> dense_variant_families() {
  return {phi3_family(), granite_family(), granite_moe_family(), smollm3_family(),
          apertus_family()};
}

}  // namespace cambium
