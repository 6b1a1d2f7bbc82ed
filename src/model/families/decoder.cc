// What decoders of the Llama kind spell alike.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/kept_tensors.h"

namespace cambium::config {
namespace {

/// The options of a layer's attention but for its window.
UnitSpec without_window(const LayerSpec& layer) {
  UnitSpec unit = layer.mixer() == nullptr ? UnitSpec{} : *layer.mixer();
  unit.options.set("window", int64_t{0});
  return unit;
}

LayerSpec with_bias(LayerSpec layer, bool bias) {
  if (bias) {
    layer.branches.back().units.front().options.set("bias", true);
  }
  return layer;
}

int64_t window_of(const LayerSpec& layer) {
  return layer.mixer()->options.integer("attention", "window", 0);
}

void write_windows(const ModelSpec& spec, Windows form, const char* model_type, Json& config) {
  int64_t window = 0;
  for (const LayerSpec& layer : spec.layers) {
    const int64_t own = window_of(layer);
    expect(own == 0 || window == 0 || own == window,
           "a {} config.json has one sliding window for all its layers; write the cambium layout "
           "instead",
           model_type);
    window = std::max(window, own);
  }
  const auto full = [](const LayerSpec& layer) { return window_of(layer) == 0; };
  const bool mixed = window > 0 && std::any_of(spec.layers.begin(), spec.layers.end(), full);
  expect((form != Windows::kNone || window == 0) && (form != Windows::kEverywhere || !mixed),
         "a {} config.json cannot express the windows of these layers; write the cambium layout "
         "instead",
         model_type);
  if (form == Windows::kNone) {
    return;
  }
  config["sliding_window"] = window > 0 ? Json(window) : Json();
  if (form == Windows::kByLayer) {
    config["use_sliding_window"] = window > 0;
    Json types = Json::array();
    for (const LayerSpec& layer : spec.layers) {
      types.push_back(full(layer) ? "full_attention" : "sliding_attention");
    }
    config["layer_types"] = types;
  }
}

std::vector<int64_t> read_ids(const Json& config, const char* key, int64_t vocab,
                              const std::string& where) {
  std::vector<int64_t> ids;
  const auto it = config.find(key);
  if (it == config.end() || !it->is_array()) {
    // -1 is a way to say none.
    const int64_t id = integer_or(config, key, -1, -1, kMaxVocab, where);
    return id < 0 ? ids : std::vector<int64_t>{id};
  }
  expect(it->size() <= 1000, "{}: expected at most 1000 tokens in '{}', got {}", where, key,
         it->size());
  for (const Json& id : *it) {
    ids.push_back(integer(Json{{key, id}}, key, 0, std::max(vocab, kMaxVocab), where));
  }
  return ids;
}

}  // namespace

Sizes read_sizes(const Json& config, const std::string& where) {
  Sizes sizes;
  sizes.layers = integer(config, "num_hidden_layers", 1, kMaxLayers, where);
  sizes.heads = integer(config, "num_attention_heads", 1, kMaxHeads, where);
  sizes.kv_heads = integer_or(config, "num_key_value_heads", sizes.heads, 1, kMaxHeads, where);
  const int64_t width = integer(config, "hidden_size", 1, kMaxWidth, where);
  expect(has(config, "head_dim") || width >= sizes.heads,
         "{}: expected hidden_size of at least one channel a head, got {} for {} heads", where,
         width, sizes.heads);
  sizes.head_dim = integer_or(config, "head_dim", width / sizes.heads, 1, kMaxHeadDim, where);
  return sizes;
}

ModelSpec read_model(const Json& config, const std::string& family, const std::string& where) {
  ModelSpec spec;
  spec.family = family;
  spec.vocab = integer(config, "vocab_size", 1, kMaxVocab, where);
  spec.width = integer(config, "hidden_size", 1, kMaxWidth, where);
  spec.norm.eps = static_cast<float>(
      in_range(where, "rms_norm_eps",
               real_or(config, "rms_norm_eps", absent_rms_norm_eps(config), where), 0.0, 1.0));
  const std::string act = text_or(config, "hidden_act", "silu", where);
  expect(act == "silu" || act == "swish", "{}: expected hidden_act silu, got '{}'", where, act);
  spec.tied_head = flag_or(config, "tie_word_embeddings", false, where);
  spec.max_positions = integer_or(config, "max_position_embeddings", 2048, 1, kMaxPositions, where);
  spec.bos_id = integer_or(config, "bos_token_id", -1, -1, kMaxVocab, where);
  spec.eos_ids = read_ids(config, "eos_token_id", spec.vocab, where);
  return spec;
}

ModelSpec read_decoder(const Json& config, const std::string& family, const std::string& where,
                       const DecoderTraits& traits) {
  ModelSpec spec = read_model(config, family, where);
  const Sizes sizes = read_sizes(config, where);
  const int64_t inner = integer(config, "intermediate_size", 1, kMaxInner, where);
  spec.rope = read_rope(config, sizes.head_dim, spec.max_positions, where);
  const bool attention_bias = flag_or(config, "attention_bias", false, where);
  const bool mlp_bias = flag_or(config, "mlp_bias", false, where);
  expect(!attention_bias || traits.attention_bias || traits.qkv_bias,
         "{}: 'attention_bias' is true, which {} models do not have", where, family);
  expect(!mlp_bias || traits.mlp_bias, "{}: 'mlp_bias' is true, which {} models do not have", where,
         family);
  Options attention{
      {"heads", sizes.heads}, {"kv_heads", sizes.kv_heads}, {"head_dim", sizes.head_dim}};
  const bool out_bias = attention_bias && traits.attention_bias;
  if (traits.qkv_bias || out_bias) {
    attention.set("qkv_bias", true);
  }
  if (out_bias) {
    attention.set("out_bias", true);
  }
  const LayerSpec layer =
      with_bias(decoder_layer({"attention", attention}, inner, spec.norm), mlp_bias);
  spec.layers.assign(static_cast<size_t>(sizes.layers), layer);
  return spec;
}

void set_windows(ModelSpec& spec, const Json& config, int64_t window, int64_t full_below,
                 const std::string& where) {
  std::vector<std::string> types(spec.layers.size(), "sliding_attention");
  if (has(config, "layer_types")) {
    types = texts(config, "layer_types", spec.layers.size(), where);
  } else {
    std::fill_n(types.begin(), std::min<int64_t>(full_below, std::ssize(types)), "full_attention");
  }
  for (size_t i = 0; i < types.size(); ++i) {
    expect(types[i] == "full_attention" || types[i] == "sliding_attention",
           "{}: expected full_attention or sliding_attention for layer {} in layer_types, got '{}'",
           where, i, types[i]);
    if (types[i] == "sliding_attention") {
      expect(window > 0, "{}: expected 'sliding_window' above 0 for layer {}", where, i);
      spec.layers[i].mixer()->options.set("window", window);
    }
  }
}

Json with_layer_types(Json config, int64_t every, const std::string& where) {
  if (!has(config, "layer_types")) {
    const int64_t layers = integer(config, "num_hidden_layers", 1, kMaxLayers, where);
    Json types = Json::array();
    for (int64_t i = 0; i < layers; ++i) {
      types.push_back((i + 1) % every == 0 ? "full_attention" : "sliding_attention");
    }
    config["layer_types"] = types;
  }
  return config;
}

void write_layer_types(const ModelSpec& spec, Json& config) {
  Json types = Json::array();
  Json window;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const UnitSpec* mixer = spec.layers[i].mixer();
    const int64_t own = mixer == nullptr ? 0 : mixer->options.integer("attention", "window", 0);
    expect(own == 0 || window.is_null() || window == own,
           "a {} config.json has one sliding window for all its layers, and layer {} has another; "
           "write the cambium layout instead",
           spec.family, i);
    if (own > 0) {
      window = own;
    }
    types.push_back(own > 0 ? "sliding_attention" : "full_attention");
  }
  config["sliding_window"] = window;
  config["layer_types"] = types;
}

Json write_attention_decoder(const ModelSpec& spec, const char* architecture,
                             const char* model_type) {
  expect(!spec.layers.empty() && spec.layers.front().mixes_by("attention") &&
             spec.layers.front().feed_forward() != nullptr &&
             spec.layers.front().feed_forward()->options.has("inner"),
         "a {} config.json cannot express layer 0 ({}); write the cambium layout instead",
         model_type, spec.layers.empty() ? "none" : layer_kind(spec.layers.front()));
  Json config;
  config["architectures"] = Json::array({architecture});
  config["model_type"] = model_type;
  config.update(write_common(spec));
  const Options& attention = spec.layers.front().mixer()->options;
  const int64_t head_dim = attention.integer("attention", "head_dim");
  config["intermediate_size"] = inner_of(spec.layers.front());
  config["num_attention_heads"] = attention.integer("attention", "heads");
  config["num_key_value_heads"] = attention.integer("attention", "kv_heads");
  config["head_dim"] = head_dim;
  if (spec.rope.dim != head_dim) {
    config["partial_rotary_factor"] = rotary_share(spec.rope.dim, head_dim);
  }
  config["torch_dtype"] = "float32";
  return config;
}

bool is_decoder_layer(const LayerSpec& layer, const NormSpec& norm) {
  const UnitSpec* mixer = layer.mixer();
  const UnitSpec* feed_forward = layer.feed_forward();
  return mixer != nullptr && feed_forward != nullptr && feed_forward->options.has("inner") &&
         layer == with_bias(decoder_layer(*mixer, inner_of(layer), norm),
                            feed_forward->options.flag("feed-forward", "bias", false));
}

int64_t inner_of(const LayerSpec& layer) {
  return layer.feed_forward()->options.integer("feed-forward", "inner");
}

const UnitSpec* find_unit(const ModelSpec& spec, std::string_view kind) {
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      const auto unit = std::find_if(branch.units.begin(), branch.units.end(),
                                     [&](const UnitSpec& one) { return one.kind == kind; });
      if (unit != branch.units.end()) {
        return &*unit;
      }
    }
  }
  return nullptr;
}

const UnitSpec& first_unit(const ModelSpec& spec, std::string_view kind) {
  const UnitSpec* unit = find_unit(spec, kind);
  expect(unit != nullptr,
         "a {} config.json needs a unit of kind {}; write the cambium layout instead", spec.family,
         kind);
  return *unit;
}

UnitSpec mixer_or_small(const ModelSpec& spec, std::string_view kind) {
  if (const UnitSpec* unit = find_unit(spec, kind); unit != nullptr) {
    return *unit;
  }
  const int64_t one = 1;
  const int64_t few = 8;
  const int64_t turned = std::max(spec.rope.dim, int64_t{2});
  const int64_t inner = 2 * spec.width;  // what transformers asks of Mamba's channels
  const std::pair<const char*, Options> known[] = {
      {"attention", {{"heads", one}, {"kv_heads", one}, {"head_dim", turned}}},
      {"latent_attention",
       {{"heads", one},
        {"kv_rank", few},
        {"nope_dim", few},
        {"rope_dim", turned},
        {"value_dim", few}}},
      {"gated_delta_net",
       {{"heads", one}, {"k_heads", one}, {"key_dim", few}, {"value_dim", few}, {"conv", few / 2}}},
      {"kimi_delta", {{"heads", one}, {"head_dim", few}, {"conv", few / 2}}},
      {"mamba1", {{"inner", inner}, {"state", few}, {"dt_rank", few}, {"conv", few / 2}}},
      {"mamba2",
       {{"heads", inner / 2},
        {"head_dim", int64_t{2}},
        {"state", few},
        {"b_heads", one},
        {"conv", few / 2}}},
      {"short_conv", {{"conv", few / 2}}},
  };
  const auto* row = std::find_if(std::begin(known), std::end(known),
                                 [&](const auto& each) { return each.first == kind; });
  CAMBIUM_CHECK(row != std::end(known), "no family writes sizes of {}", kind);
  return {row->first, row->second};
}

double shortest(float x) {
  return std::stod(fmt::format("{}", x));
}

Json write_common(const ModelSpec& spec) {
  Json config;
  write_kept(config, spec);
  config["vocab_size"] = spec.vocab;
  config["hidden_size"] = spec.width;
  config["num_hidden_layers"] = spec.layers.size();
  config["rms_norm_eps"] = shortest(spec.norm.eps);
  config["rope_theta"] = spec.rope.theta;
  if (spec.rope.scaling != RopeScaling::kNone) {
    config["rope_scaling"] = write_rope_scaling(spec.rope);
  }
  if (spec.rope.interleaved) {
    config["rope_interleave"] = true;
  }
  config["max_position_embeddings"] = spec.max_positions;
  config["tie_word_embeddings"] = spec.tied_head;
  if (spec.bos_id >= 0) {
    config["bos_token_id"] = spec.bos_id;
  }
  if (spec.eos_ids.size() == 1) {
    config["eos_token_id"] = spec.eos_ids[0];
  } else if (!spec.eos_ids.empty()) {
    config["eos_token_id"] = spec.eos_ids;
  }
  // Else that of the class, which may be beyond the vocabulary.
  config["pad_token_id"] = nullptr;
  config["hidden_act"] = "silu";
  return config;
}

Json write_decoder(const ModelSpec& spec, const char* architecture, const char* model_type,
                   const DecoderTraits& traits) {
  const LayerSpec& first = spec.layers.front();
  const UnitSpec plain = without_window(first);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    expect(layer.mixes_by("attention") && is_decoder_layer(layer, spec.norm) &&
               without_window(layer) == plain && *layer.feed_forward() == *first.feed_forward(),
           "a {} config.json cannot express layer {} ({}); write the cambium layout instead",
           model_type, i, layer_kind(layer));
  }
  Json config;
  config["architectures"] = Json::array({architecture});
  config["model_type"] = model_type;
  config.update(write_common(spec));
  const Options& mixer = first.mixer()->options;
  config["intermediate_size"] = inner_of(first);
  config["num_attention_heads"] = mixer.integer("attention", "heads");
  config["num_key_value_heads"] = mixer.integer("attention", "kv_heads");
  config["head_dim"] = mixer.integer("attention", "head_dim");
  const bool qkv = mixer.flag("attention", "qkv_bias", false);
  const bool out = mixer.flag("attention", "out_bias", false);
  const bool inner = first.feed_forward()->options.flag("swiglu", "bias", false);
  expect(qkv == (traits.qkv_bias || out) && (!out || traits.attention_bias) &&
             (!inner || traits.mlp_bias),
         "a {} config.json cannot express these biases; write the cambium layout instead",
         model_type);
  if (traits.attention_bias) {
    config["attention_bias"] = out;
  }
  if (traits.mlp_bias) {
    config["mlp_bias"] = inner;
  }
  write_windows(spec, traits.windows, model_type, config);
  config["torch_dtype"] = "float32";
  return config;
}

std::vector<TensorRule> decoder_tensors(std::vector<TensorRule> more) {
  const std::vector<TensorRule> common = {
      {"embed.weight", "model.embed_tokens.weight"},
      {.ours = "embed.weight", .theirs = "lm_head.weight", .tied = true},
      {"head.weight", "lm_head.weight"},
      {"norm.*", "model.norm.*"},
      {"layers.*.input_norm.*", "model.layers.*.input_layernorm.*"},
      {"layers.*.post_norm.*", "model.layers.*.post_attention_layernorm.*"},
      {"layers.*.feed_forward.gate.*", "model.layers.*.mlp.gate_proj.*"},
      {"layers.*.feed_forward.up.*", "model.layers.*.mlp.up_proj.*"},
      {"layers.*.feed_forward.down.*", "model.layers.*.mlp.down_proj.*"},
      {"layers.*.mixer.*", "model.layers.*.self_attn.*"},
  };
  more.insert(more.end(), common.begin(), common.end());
  return more;
}

std::vector<TensorRule> composite_tensors(const std::vector<TensorRule>& text) {
  std::vector<TensorRule> rules = text;
  for (const TensorRule& row : text) {
    TensorRule& released = rules.emplace_back(row);
    released.theirs = "language_model." + row.theirs;
    if (row.theirs.starts_with("model.")) {
      TensorRule& newer = rules.emplace_back(row);
      newer.theirs = "model.language_model." + row.theirs.substr(6);
    }
  }
  return rules;
}

std::vector<std::string> decoder_ignored() {
  return {"*rotary_emb.inv_freq"};
}

std::string expressed(const Json& config, const ModelSpec& spec,
                      ModelSpec (*read)(const std::string& text, const std::string& where)) {
  const std::string text = config.dump(1);
  const ModelSpec again = read(text, spec.family + " config.json");
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    expect(i < again.layers.size() && again.layers[i] == spec.layers[i],
           "a {} config.json cannot express layer {} ({}); write the cambium layout instead",
           spec.family, i, layer_kind(spec.layers[i]));
  }
  expect(again == spec,
         "a {} config.json cannot express what surrounds the layers of this model; write the "
         "cambium layout instead",
         spec.family);
  return text;
}

}  // namespace cambium::config
