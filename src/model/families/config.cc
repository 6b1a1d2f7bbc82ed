#include "model/families/config.h"

#include <algorithm>

#include "base/error.h"

namespace cambium::config {

Json parse(const std::string& text, const std::string& where) {
  try {
    Json json = Json::parse(text);
    expect(json.is_object(), "{}: expected a JSON object", where);
    return json;
  } catch (const nlohmann::json::exception& e) {
    fail("{}: not valid JSON: {}", where, e.what());
  }
}

int64_t integer(const Json& config, const char* key, const std::string& where) {
  const auto it = config.find(key);
  expect(it != config.end(), "{}: expected the key '{}', which is missing", where, key);
  expect(it->is_number_integer(), "{}: expected '{}' to be a whole number, got {}", where, key,
         it->dump());
  return it->get<int64_t>();
}

int64_t integer_or(const Json& config, const char* key, int64_t fallback,
                   const std::string& where) {
  const auto it = config.find(key);
  return it == config.end() || it->is_null() ? fallback : integer(config, key, where);
}

double real_or(const Json& config, const char* key, double fallback, const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return fallback;
  }
  expect(it->is_number(), "{}: expected '{}' to be a number, got {}", where, key, it->dump());
  return it->get<double>();
}

bool flag_or(const Json& config, const char* key, bool fallback, const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return fallback;
  }
  expect(it->is_boolean(), "{}: expected '{}' to be true or false, got {}", where, key, it->dump());
  return it->get<bool>();
}

namespace {

RopeConfig read_rope(const Json& config, int64_t head_dim, const std::string& where) {
  RopeConfig rope;
  rope.dim = head_dim;
  rope.theta = real_or(config, "rope_theta", 10000.0, where);
  Json scaling;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const auto it = config.find(key);
    if (it != config.end() && it->is_object()) {
      scaling = *it;
      rope.theta = real_or(scaling, "rope_theta", rope.theta, where);
      break;
    }
  }
  if (!scaling.is_object()) {
    return rope;
  }
  std::string type = "default";
  for (const char* key : {"type", "rope_type"}) {
    if (const auto it = scaling.find(key); it != scaling.end() && it->is_string()) {
      type = it->get<std::string>();
    }
  }
  if (type == "default") {
    return rope;
  }
  expect(type == "llama3",
         "{}: expected rope scaling of type default or llama3, got '{}', which is not supported",
         where, type);
  rope.factor = real_or(scaling, "factor", 8.0, where);
  rope.low_freq_factor = real_or(scaling, "low_freq_factor", 1.0, where);
  rope.high_freq_factor = real_or(scaling, "high_freq_factor", 4.0, where);
  rope.original_length = integer_or(scaling, "original_max_position_embeddings", 8192, where);
  expect(rope.factor > 0 && rope.high_freq_factor > rope.low_freq_factor,
         "{}: expected rope factor > 0 and high_freq_factor > low_freq_factor", where);
  return rope;
}

}  // namespace

ModelSpec read_decoder(const Json& config, const std::string& family, const std::string& where) {
  ModelSpec spec;
  spec.family = family;
  spec.vocab = integer(config, "vocab_size", where);
  spec.width = integer(config, "hidden_size", where);
  spec.norm.eps = static_cast<float>(real_or(config, "rms_norm_eps", 1e-6, where));
  spec.tied_head = flag_or(config, "tie_word_embeddings", false, where);
  spec.max_positions = integer_or(config, "max_position_embeddings", 2048, where);
  spec.bos_id = integer_or(config, "bos_token_id", -1, where);
  if (const auto it = config.find("eos_token_id"); it != config.end() && it->is_array()) {
    for (const Json& id : *it) {
      expect(id.is_number_integer(), "{}: expected eos_token_id to hold whole numbers", where);
      spec.eos_ids.push_back(id.get<int64_t>());
    }
  } else if (const int64_t id = integer_or(config, "eos_token_id", -1, where); id >= 0) {
    spec.eos_ids.push_back(id);
  }
  const int64_t layers = integer(config, "num_hidden_layers", where);
  const int64_t heads = integer(config, "num_attention_heads", where);
  const int64_t kv_heads = integer_or(config, "num_key_value_heads", heads, where);
  const int64_t inner = integer(config, "intermediate_size", where);
  expect(spec.vocab > 0 && spec.width > 0 && layers > 0 && heads > 0 && kv_heads > 0 && inner > 0,
         "{}: expected vocab_size, hidden_size, num_hidden_layers, num_attention_heads, "
         "num_key_value_heads and intermediate_size above 0",
         where);
  expect(layers <= 10000, "{}: expected at most 10000 layers, got {}", where, layers);
  const int64_t head_dim = integer_or(config, "head_dim", spec.width / heads, where);
  spec.rope = read_rope(config, head_dim, where);
  if (const auto it = config.find("hidden_act"); it != config.end() && it->is_string()) {
    const auto act = it->get<std::string>();
    expect(act == "silu" || act == "swish", "{}: expected hidden_act silu, got '{}'", where, act);
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    expect(!flag_or(config, key, false, where),
           "{}: '{}' is true; biases in attention and feed-forward are not supported", where, key);
  }
  const LayerSpec layer = decoder_layer(
      {"attention", {{"heads", heads}, {"kv_heads", kv_heads}, {"head_dim", head_dim}}}, inner,
      spec.norm);
  spec.layers.assign(static_cast<size_t>(layers), layer);
  return spec;
}

bool is_decoder_layer(const LayerSpec& layer, const NormSpec& norm) {
  const UnitSpec* mixer = layer.mixer();
  const UnitSpec* feed_forward = layer.feed_forward();
  return mixer != nullptr && feed_forward != nullptr && feed_forward->options.has("inner") &&
         layer == decoder_layer(*mixer, inner_of(layer), norm);
}

int64_t inner_of(const LayerSpec& layer) {
  return layer.feed_forward()->options.integer("feed-forward", "inner");
}

double shortest(float x) {
  return std::stod(fmt::format("{}", x));
}

Json write_common(const ModelSpec& spec) {
  Json config;
  config["vocab_size"] = spec.vocab;
  config["hidden_size"] = spec.width;
  config["num_hidden_layers"] = spec.layers.size();
  config["rms_norm_eps"] = shortest(spec.norm.eps);
  config["rope_theta"] = spec.rope.theta;
  if (spec.rope.factor > 0) {
    config["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", spec.rope.factor},
                              {"low_freq_factor", spec.rope.low_freq_factor},
                              {"high_freq_factor", spec.rope.high_freq_factor},
                              {"original_max_position_embeddings", spec.rope.original_length}};
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
  config["hidden_act"] = "silu";
  return config;
}

Json write_decoder(const ModelSpec& spec, const char* architecture, const char* model_type) {
  const LayerSpec& first = spec.layers.front();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    expect(layer == first && layer.mixes_by("attention") && is_decoder_layer(layer, spec.norm),
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
  const int64_t window = mixer.integer("attention", "window", 0);
  if (window > 0) {
    config["sliding_window"] = window;
  }
  config["torch_dtype"] = "float32";
  return config;
}

int64_t layer_of(const std::string& ours) {
  constexpr std::string_view kPrefix = "layers.";
  return ours.starts_with(kPrefix) ? std::stoll(ours.substr(kPrefix.size())) : -1;
}

std::string decoder_tensor_name(const std::string& ours, const char* mixer_prefix) {
  struct Rule {
    const char* from;
    std::string to;
  };
  const Rule rules[] = {
      {".mixer.", std::string(".") + mixer_prefix},  {".input_norm.", ".input_layernorm."},
      {".post_norm.", ".post_attention_layernorm."}, {".feed_forward.gate.", ".mlp.gate_proj."},
      {".feed_forward.up.", ".mlp.up_proj."},        {".feed_forward.down.", ".mlp.down_proj."}};
  if (ours == "embed.weight") {
    return "model.embed_tokens.weight";
  }
  if (ours == "head.weight") {
    return "lm_head.weight";
  }
  for (const auto& [from, to] : rules) {
    if (const size_t at = ours.find(from); at != std::string::npos) {
      return "model." + ours.substr(0, at) + to + ours.substr(at + std::string_view(from).size());
    }
  }
  return "model." + ours;
}

}  // namespace cambium::config
