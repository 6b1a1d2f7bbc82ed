// Decoders of full attention whose feed-forwards are routed experts: Mixtral, Qwen3-MoE,
// MiniMax-M2.
#include <algorithm>
#include <bit>
#include <mutex>

#include "base/checked.h"
#include "base/progress.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::DecoderTraits;
using config::Json;
using config::Windows;

constexpr DecoderTraits kMixtral{.windows = Windows::kEverywhere};
constexpr DecoderTraits kQwen3Moe{.attention_bias = true, .windows = Windows::kEverywhere};
constexpr DecoderTraits kMiniMaxM2{};

/// Experts of SwiGLUs; `count` and `inner` are the keys of their number and width.
UnitSpec read_experts(const Json& config, const char* count, const char* inner, const char* router,
                      const std::string& where) {
  return {"experts",
          {{"experts", config::integer(config, count, 1, kMaxExperts, where)},
           {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
           {"inner", config::integer(config, inner, 1, kMaxInner, where)},
           {"router", std::string(router)}}};
}

void set_feed_forward(LayerSpec& layer, const UnitSpec& unit) {
  layer.branches.back().units = {unit};
}

bool has_experts(const LayerSpec& layer) {
  const UnitSpec* unit = layer.feed_forward();
  return unit != nullptr && unit->kind == "experts";
}

const Options& experts_of(const ModelSpec& spec) {
  const auto layer = std::find_if(spec.layers.begin(), spec.layers.end(), has_experts);
  expect(layer != spec.layers.end(),
         "a {} config.json needs a layer of experts; write the cambium layout instead",
         spec.family);
  return layer->feed_forward()->options;
}

/// What a decoder's configuration says of the model with a SwiGLU in the place of the experts.
Json write_dense(ModelSpec spec, const char* architecture, const char* model_type,
                 const DecoderTraits& traits) {
  int64_t inner = 1;
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* unit = layer.feed_forward();
    if (unit != nullptr && unit->kind == "swiglu") {
      inner = config::inner_of(layer);
    }
  }
  for (LayerSpec& layer : spec.layers) {
    if (has_experts(layer)) {
      set_feed_forward(layer, {"swiglu", {{"inner", inner}}});
    }
  }
  return config::write_decoder(spec, architecture, model_type, traits);
}

void write_experts(Json& config, const Options& experts, const char* count, const char* inner) {
  config[count] = experts.integer("experts", "experts");
  config["num_experts_per_tok"] = experts.integer("experts", "top");
  config[inner] = experts.integer("experts", "inner");
}

// --- Mixtral (Jiang et al. 2024, arXiv 2401.04088): experts in every layer, a softmax of the
// chosen.
ModelSpec read_mixtral(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "mixtral", where, kMixtral);
  const UnitSpec experts =
      read_experts(config, "num_local_experts", "intermediate_size", "topk_softmax", where);
  const int64_t window = config::integer_or(config, "sliding_window", 0, 1, kMaxPositions, where);
  for (LayerSpec& layer : spec.layers) {
    set_feed_forward(layer, experts);
    if (window > 0) {
      layer.mixer()->options.set("window", window);
    }
  }
  return spec;
}

std::string write_mixtral(const ModelSpec& spec) {
  Json config = write_dense(spec, "MixtralForCausalLM", "mixtral", kMixtral);
  write_experts(config, experts_of(spec), "num_local_experts", "intermediate_size");
  return config::expressed(config, spec, read_mixtral);
}

// --- Qwen3-MoE: Qwen3's attention, whose windows are of all layers or of none; which layers have
// experts is said by a list and a step.
ModelSpec read_qwen3_moe(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "qwen3_moe", where, kQwen3Moe);
  // What transformers saves says the number in Mixtral's word.
  const char* number =
      config::has(config, "num_local_experts") ? "num_local_experts" : "num_experts";
  const auto count = std::ssize(spec.layers);
  std::vector<bool> dense(spec.layers.size(), false);
  if (const auto it = config.find("mlp_only_layers"); it != config.end() && !it->is_null()) {
    expect(it->is_array(), "{}: expected 'mlp_only_layers' to be a list of layers", where);
    for (const Json& index : *it) {
      const int64_t i =
          config::integer(Json{{"mlp_only_layers", index}}, "mlp_only_layers", 0, count - 1, where);
      dense[static_cast<size_t>(i)] = true;
    }
  }
  const int64_t step = config::integer_or(config, "decoder_sparse_step", 1, 1, kMaxLayers, where);
  const double eps = config::real_or(config, "rms_norm_eps", 1e-6, where);
  for (int64_t i = 0; i < count; ++i) {
    LayerSpec& layer = spec.layers[static_cast<size_t>(i)];
    layer.mixer()->options.set("qk_norm_eps", eps);
    if (!dense[static_cast<size_t>(i)] && (i + 1) % step == 0) {
      UnitSpec experts = read_experts(config, number, "moe_intermediate_size", "softmax", where);
      experts.options.set("renormalise", config::flag_or(config, "norm_topk_prob", false, where));
      set_feed_forward(layer, experts);
    }
  }
  if (config::flag_or(config, "use_sliding_window", false, where)) {
    const int64_t absent = config.contains("sliding_window") ? 0 : 4096;
    const int64_t window =
        config::integer_or(config, "sliding_window", absent, 1, kMaxPositions, where);
    for (LayerSpec& layer : spec.layers) {
      if (window > 0) {
        layer.mixer()->options.set("window", window);
      }
    }
  }
  return spec;
}

std::string write_qwen3_moe(const ModelSpec& spec) {
  Json config = write_dense(spec, "Qwen3MoeForCausalLM", "qwen3_moe", kQwen3Moe);
  if (const UnitSpec* unit = config::find_unit(spec, "experts"); unit != nullptr) {
    write_experts(config, unit->options, "num_experts", "moe_intermediate_size");
    config["norm_topk_prob"] = unit->options.flag("experts", "renormalise", false);
  }
  config["use_sliding_window"] = !config["sliding_window"].is_null();
  config["decoder_sparse_step"] = 1;
  config["mlp_only_layers"] = Json::array();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (!has_experts(spec.layers[i])) {
      config["mlp_only_layers"].push_back(i);
    }
  }
  return config::expressed(config, spec, read_qwen3_moe);
}

// --- MiniMax-M2: a norm of q and k over their whole width, a partial rotation, sigmoid scores with
// a bias of the choice.
ModelSpec read_minimax_m2(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "minimax_m2", where, kMiniMaxM2);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope.dim =
      config::integer_or(config, "rotary_dim", sizes.head_dim, 2, sizes.head_dim, where);
  const std::string norm = config::text_or(config, "qk_norm_type", "per_layer", where);
  const std::string score = config::text_or(config, "scoring_func", "sigmoid", where);
  expect(config::flag_or(config, "use_qk_norm", true, where) && norm == "per_layer" &&
             score == "sigmoid" &&
             config::integer_or(config, "shared_intermediate_size", 0, 0, kMaxInner, where) == 0,
         "{}: expected use_qk_norm with qk_norm_type per_layer, scoring_func sigmoid and no shared "
         "expert, as in every published model",
         where);
  const Json kinds = config.value("attn_type_list", Json::array());
  expect(std::all_of(kinds.begin(), kinds.end(), [](const Json& kind) { return kind == 1; }),
         "{}: expected attn_type_list to name full attention (1) alone, got {}", where,
         kinds.dump());
  UnitSpec experts =
      read_experts(config, "num_local_experts", "intermediate_size", score.c_str(), where);
  experts.options.set("router_bias", config::flag_or(config, "use_routing_bias", true, where));
  experts.options.set("renormalise", true);
  const double eps = config::real_or(config, "rms_norm_eps", 1e-6, where);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("qk_norm_eps", eps);
    layer.mixer()->options.set("qk_norm_over", std::string("width"));
    set_feed_forward(layer, experts);
  }
  return spec;
}

std::string write_minimax_m2(const ModelSpec& spec) {
  Json config = write_dense(spec, "MiniMaxM2ForCausalLM", "minimax_m2", kMiniMaxM2);
  const Options& experts = experts_of(spec);
  write_experts(config, experts, "num_local_experts", "intermediate_size");
  config["rotary_dim"] = spec.rope.dim;
  config["use_qk_norm"] = true;
  config["qk_norm_type"] = "per_layer";
  config["scoring_func"] = "sigmoid";
  config["use_routing_bias"] = experts.flag("experts", "router_bias", false);
  config["attn_type_list"] = std::vector<int>(spec.layers.size(), 1);
  return config::expressed(config, spec, read_minimax_m2);
}

/// The names of Mixtral's and MiniMax's experts.
std::vector<TensorRule> block_sparse_tensors() {
  return config::decoder_tensors({
      {"layers.*.feed_forward.router.weight", "model.layers.*.block_sparse_moe.gate.weight"},
      {"layers.*.feed_forward.router.bias",
       "model.layers.*.block_sparse_moe.e_score_correction_bias"},
      {"layers.*.feed_forward.experts.gate.*", "model.layers.*.block_sparse_moe.experts.#.w1.*"},
      {"layers.*.feed_forward.experts.up.*", "model.layers.*.block_sparse_moe.experts.#.w3.*"},
      {"layers.*.feed_forward.experts.down.*", "model.layers.*.block_sparse_moe.experts.#.w2.*"},
      {"layers.*.mixer.gate_proj.*", "model.layers.*.self_attn.output_gate.*"},
  });
}

// --- MiniMax-01 and M1 (arXiv 2501.08313, 2506.13585): lightning attention with a layer of full
// attention in eight, residuals from the normed stream. transformers' own files (model_type
// minimax) say the same in other words.

/// The words of the two spellings: of full attention, of lightning attention, of the feed-forward,
/// and the ends of a branch's two factors.
struct MiniMaxWords {
  const char *full, *linear, *experts, *keep, *out;
};
constexpr MiniMaxWords kM1{"layernorm_full_attention", "layernorm_linear_attention",
                           "layernorm_mlp", "_alpha", "_beta"};
constexpr MiniMaxWords kLibrary{"full_attn", "linear_attn", "mlp", "_alpha_factor", "_beta_factor"};

BranchSpec minimax_branch(const ModelSpec& spec, const UnitSpec& unit, const char* word,
                          const MiniMaxWords& words, const Json& config, const std::string& where) {
  const auto factor = [&](const char* end) {
    const std::string key = std::string(word) + end;
    return static_cast<float>(config::real_or(config, key.c_str(), 1.0, where));
  };
  BranchSpec made{.norm = spec.norm, .units = {unit}, .keep = factor(words.keep)};
  made.units.front().out = factor(words.out);
  made.residual_normed = true;
  return made;
}

/// Whether it is run by the code that published checkpoints name, not by transformers' own class.
bool has_own_code(const Json& config) {
  return config::has(config, "auto_map");
}

/// Lightning attention. The two codes decay alike where the number of heads is a power of two.
UnitSpec minimax_lightning(const Json& config, const config::Sizes& sizes, int64_t layer) {
  UnitSpec unit{"lightning",
                {{"heads", sizes.heads},
                 {"head_dim", sizes.head_dim},
                 {"rows_by_head", true},
                 {"layer_of_slopes", layer},
                 {"layers", sizes.layers}}};
  if (!has_own_code(config) && !std::has_single_bit(static_cast<uint64_t>(sizes.heads))) {
    unit.options.set("geometric_slopes", true);
  }
  return unit;
}

/// Whether each layer is full attention.
std::vector<bool> full_layers(const Json& config, int64_t layers, const std::string& where) {
  std::vector<bool> full;
  if (config::has(config, "layer_types")) {
    for (const std::string& type :
         config::texts(config, "layer_types", static_cast<size_t>(layers), where)) {
      expect(type == "full_attention" || type == "linear_attention",
             "{}: expected full_attention or linear_attention in layer_types, got '{}'", where,
             type);
      full.push_back(type == "full_attention");
    }
    return full;
  }
  const auto kinds = config.find("attn_type_list");
  expect(kinds != config.end() && kinds->is_array() && std::ssize(*kinds) == layers,
         "{}: expected the list 'attn_type_list' of {} numbers, one a layer", where, layers);
  for (const Json& entry : *kinds) {
    full.push_back(
        config::integer(Json{{"attn_type_list", entry}}, "attn_type_list", 0, 1, where) == 1);
  }
  return full;
}

/// The channels of a head that turn: their own code turns `rotary_dim` of them, and transformers'
/// class knows no such key.
int64_t turned_channels(const Json& config, int64_t head_dim, const std::string& where) {
  const int64_t said = config::integer_or(config, "rotary_dim", head_dim, 2, head_dim, where);
  if (has_own_code(config) || said == head_dim) {
    return said;
  }
  static std::once_flag once;
  std::call_once(once, [&] {
    note(
        "{}: 'rotary_dim' is {}, and without an auto_map, which names the code that reads it, all "
        "{} channels of a head turn, as in transformers",
        where, said, head_dim);
  });
  return head_dim;
}

ModelSpec read_minimax_words(const Json& config, const char* family, const MiniMaxWords& words,
                             const std::string& where) {
  ModelSpec spec = config::read_model(config, family, where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  spec.rope.dim = turned_channels(config, sizes.head_dim, where);
  expect(
      !config::has(config, "sliding_window") && config::flag_or(config, "postnorm", true, where) &&
          config::integer_or(config, "shared_intermediate_size", 0, 0, kMaxInner, where) == 0,
      "{}: expected no sliding_window, postnorm true and no shared expert, as in every published "
      "model",
      where);
  const UnitSpec experts =
      read_experts(config, "num_local_experts", "intermediate_size", "topk_softmax", where);
  const std::vector<bool> full = full_layers(config, sizes.layers, where);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    const bool is_full = full[static_cast<size_t>(i)];
    const UnitSpec unit = is_full ? UnitSpec{"attention",
                                             {{"heads", sizes.heads},
                                              {"kv_heads", sizes.kv_heads},
                                              {"head_dim", sizes.head_dim}}}
                                  : minimax_lightning(config, sizes, i);
    spec.layers.push_back(
        {{minimax_branch(spec, unit, is_full ? words.full : words.linear, words, config, where),
          minimax_branch(spec, experts, words.experts, words, config, where)}});
  }
  return spec;
}

Json write_minimax_words(const ModelSpec& spec, const MiniMaxWords& words) {
  Json config = config::write_common(spec);
  const Options* attention = nullptr;
  for (const LayerSpec& layer : spec.layers) {
    if (layer.mixer() == nullptr || layer.branches.size() != 2) {
      continue;  // expressed() names it
    }
    const bool is_full = layer.mixes_by("attention");
    attention = is_full || attention == nullptr ? &layer.mixer()->options : attention;
    for (const auto& [branch, word] :
         {std::pair{&layer.branches[0], is_full ? words.full : words.linear},
          std::pair{&layer.branches[1], words.experts}}) {
      config[std::string(word) + words.keep] = config::shortest(branch->keep);
      config[std::string(word) + words.out] =
          config::shortest(branch->units.empty() ? 1.0F : branch->units.front().out);
    }
  }
  expect(attention != nullptr,
         "a {} config.json needs a layer with a mixer; write the cambium layout instead",
         spec.family);
  const int64_t heads = attention->integer("attention", "heads");
  config["num_attention_heads"] = heads;
  config["num_key_value_heads"] = attention->integer("attention", "kv_heads", heads);
  config["head_dim"] = attention->integer("attention", "head_dim");
  write_experts(config, experts_of(spec), "num_local_experts", "intermediate_size");
  config["torch_dtype"] = "float32";
  return config;
}

ModelSpec read_minimax_m1(const std::string& text, const std::string& where) {
  return read_minimax_words(config::parse(text, where), "minimax_m1", kM1, where);
}

ModelSpec read_minimax(const std::string& text, const std::string& where) {
  return read_minimax_words(config::parse(text, where), "minimax", kLibrary, where);
}

std::string write_minimax_m1(const ModelSpec& spec) {
  Json config = write_minimax_words(spec, kM1);
  config["architectures"] = Json::array({"MiniMaxM1ForCausalLM"});
  config["model_type"] = "minimax_m1";
  config["rotary_dim"] = spec.rope.dim;
  const bool alibi =
      std::any_of(spec.layers.begin(), spec.layers.end(), [](const LayerSpec& layer) {
        return layer.mixes_by("lightning") &&
               !layer.mixer()->options.flag("lightning", "geometric_slopes", false) &&
               !std::has_single_bit(
                   static_cast<uint64_t>(layer.mixer()->options.integer("lightning", "heads")));
      });
  if (spec.rope.dim < config["head_dim"] || alibi) {
    const std::string code = "MiniMaxAI/MiniMax-M1-40k--";
    config["auto_map"] = {
        {"AutoConfig", code + "configuration_minimax_m1.MiniMaxM1Config"},
        {"AutoModelForCausalLM", code + "modeling_minimax_m1.MiniMaxM1ForCausalLM"}};
  }
  config["postnorm"] = true;
  config["shared_intermediate_size"] = 0;
  for (const LayerSpec& layer : spec.layers) {
    config["attn_type_list"].push_back(layer.mixes_by("attention") ? 1 : 0);
  }
  return config::expressed(config, spec, read_minimax_m1);
}

std::string write_minimax(const ModelSpec& spec) {
  Json config = write_minimax_words(spec, kLibrary);
  config["architectures"] = Json::array({"MiniMaxForCausalLM"});
  config["model_type"] = "minimax";
  for (const LayerSpec& layer : spec.layers) {
    config["layer_types"].push_back(layer.mixes_by("attention") ? "full_attention"
                                                                : "linear_attention");
  }
  return config::expressed(config, spec, read_minimax);
}

Family mixtral_family() {
  return {"mixtral",
          {"mixtral"},
          read_mixtral,
          write_mixtral,
          block_sparse_tensors(),
          config::decoder_ignored()};
}

Family minimax_m2_family() {
  return {"minimax_m2",     {"minimax_m2"},         read_minimax_m2,
          write_minimax_m2, block_sparse_tensors(), config::decoder_ignored()};
}

Family minimax_m1_family() {
  return {"minimax_m1",           {"minimax_m1", "minimax_text_01"},
          read_minimax_m1,        write_minimax_m1,
          block_sparse_tensors(), config::decoder_ignored()};
}

Family minimax_family() {
  std::vector<std::string> ignored = config::decoder_ignored();
  // transformers saves what follows from the sizes.
  for (const char* decay : {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}) {
    ignored.push_back(std::string("*.self_attn.") + decay);
  }
  return {"minimax", {"minimax"}, read_minimax, write_minimax, block_sparse_tensors(), ignored};
}

Family qwen3_moe_family() {
  // The library's own files since version 5 have stacks.
  return {"qwen3_moe",
          {"qwen3_moe"},
          read_qwen3_moe,
          write_qwen3_moe,
          config::decoder_tensors({
              {"layers.*.feed_forward.router.weight", "model.layers.*.mlp.gate.weight"},
              {"layers.*.feed_forward.experts.gate.*", "model.layers.*.mlp.experts.#.gate_proj.*"},
              {"layers.*.feed_forward.experts.up.*", "model.layers.*.mlp.experts.#.up_proj.*"},
              {"layers.*.feed_forward.experts.down.*", "model.layers.*.mlp.experts.#.down_proj.*"},
              {.theirs = "model.layers.*.mlp.experts.gate_up_proj",
               .rows = {"layers.*.feed_forward.experts.gate.weight",
                        "layers.*.feed_forward.experts.up.weight"},
               .stacked = true},
              {.ours = "layers.*.feed_forward.experts.down.weight",
               .theirs = "model.layers.*.mlp.experts.down_proj",
               .stacked = true},
          }),
          config::decoder_ignored()};
}

}  // namespace

std::vector<Family> expert_families() {
  return {minimax_m1_family(), mixtral_family(), qwen3_moe_family(), minimax_family(),
          minimax_m2_family()};
}

}  // namespace cambium
