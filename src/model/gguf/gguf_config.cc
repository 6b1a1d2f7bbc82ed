#include "model/gguf/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "base/error.h"
#include "base/json.h"

namespace cambium {
namespace {

// Divisors are stored as fp32 and parameters are short decimals.
constexpr double kTolerance = 1e-3;

/// Rotations per token of frequency i.
double turns(double theta, int64_t i, int64_t count) {
  return std::pow(theta, -static_cast<double>(i) / static_cast<double>(count)) /
         (2 * std::numbers::pi);
}

double rounded_if_near(double value) {
  const double whole = std::round(value);
  return std::abs(value - whole) < kTolerance * std::max(1.0, std::abs(whole)) ? whole : value;
}

/// The shortest decimal that gives the same float: 1e-05 and not 9.999999747378752e-06.
double shortest(double value) {
  return std::stod(fmt::format("{}", static_cast<float>(value)));
}

bool gives(const Llama3Rope& parameters, std::span<const float> divisors, double theta) {
  const auto count = static_cast<int64_t>(divisors.size());
  for (int64_t i = 0; i < count; ++i) {
    const double wanted = divisors[static_cast<size_t>(i)];
    if (!(std::abs(llama3_divisor(parameters, theta, i, count) - wanted) <= kTolerance * wanted)) {
      return false;
    }
  }
  return true;
}

using Json = nlohmann::ordered_json;

Json llama3_json(const Llama3Rope& rope) {
  return {{"rope_type", "llama3"},
          {"factor", rope.factor},
          {"low_freq_factor", rope.low_freq_factor},
          {"high_freq_factor", rope.high_freq_factor},
          {"original_max_position_embeddings", static_cast<int64_t>(rope.original_length)}};
}

std::vector<float> rope_tensor(const Gguf& gguf, const GgufTensor& tensor, int64_t count) {
  expect(tensor.type == GgufType::kF32 && tensor.shape == std::vector<int64_t>{count},
         "{}: expected {} to be F32 ({}), half of a head", gguf.path(), tensor.name, count);
  std::vector<float> values(static_cast<size_t>(count));
  dequantise_rows(tensor, 0, 1, values);
  for (const float value : values) {
    expect(std::isfinite(value) && value > 0, "{}: {}: {} is no divisor of a frequency",
           gguf.path(), tensor.name, value);
  }
  return values;
}

/// What config.json says of the rotary frequencies' stretch; null = nothing.
Json read_rope_scaling(const Gguf& gguf, const GgufLlamaConfig& config) {
  const auto key = [&](const char* name) { return config.architecture + ".rope." + name; };
  const std::string kind = gguf.text(key("scaling.type")).value_or("none");
  const int64_t count = config.head_dim / 2;
  const auto positive = [&](const std::string& name) {
    const std::optional<double> value = gguf.number(name);
    expect(!value || *value > 0, "{}: '{}' is {}, expected more than 0", gguf.path(), name,
           value.value_or(0));
    return value;
  };
  // An older key for linear scaling.
  const auto factor = positive(key("scaling.factor"));
  const auto linear = positive(key("scale_linear"));
  const auto original = gguf.integer(key("scaling.original_context_length"));
  expect(!original || *original > 0, "{}: '{}' is {}, expected more than 0", gguf.path(),
         key("scaling.original_context_length"), original.value_or(0));
  const auto attention = positive(key("scaling.attn_factor"));
  const GgufTensor* freqs = gguf.find("rope_freqs.weight");
  const GgufTensor* longs = gguf.find("rope_factors_long.weight");
  const GgufTensor* shorts = gguf.find("rope_factors_short.weight");
  expect((freqs != nullptr) + (longs != nullptr || shorts != nullptr || kind == "longrope") +
                 (kind == "linear" || kind == "yarn" || linear.value_or(1) != 1) <=
             1,
         "{}: the rotary frequencies are stretched in more than one way ('{}' is '{}')",
         gguf.path(), key("scaling.type"), kind);
  if (freqs != nullptr) {
    try {
      const auto rope = recover_llama3_rope(rope_tensor(gguf, *freqs, count), config.rope_theta);
      return rope ? llama3_json(*rope) : Json();
    } catch (const Error& error) {
      fail("{}: rope_freqs.weight: {}", gguf.path(), error.what());
    }
  }
  if (longs != nullptr || shorts != nullptr || kind == "longrope") {
    expect(longs != nullptr && shorts != nullptr && original.has_value(),
           "{}: LongRoPE needs rope_factors_long.weight, rope_factors_short.weight and '{}'",
           gguf.path(), key("scaling.original_context_length"));
    Json rope = {{"rope_type", "longrope"},
                 {"long_factor", rope_tensor(gguf, *longs, count)},
                 {"short_factor", rope_tensor(gguf, *shorts, count)},
                 {"original_max_position_embeddings", *original}};
    if (attention) {
      rope["attention_factor"] = shortest(*attention);
    }
    return rope;
  }
  if (kind == "linear" || (kind == "none" && linear.value_or(1) != 1)) {
    const double by = factor.value_or(linear.value_or(1));
    return by == 1 ? Json() : Json{{"rope_type", "linear"}, {"factor", shortest(by)}};
  }
  if (kind == "yarn") {
    expect(factor && original, "{}: YaRN needs '{}' and '{}'", gguf.path(), key("scaling.factor"),
           key("scaling.original_context_length"));
    Json rope = {{"rope_type", "yarn"},
                 {"factor", shortest(*factor)},
                 {"original_max_position_embeddings", *original}};
    // llama.cpp multiplies what the factor gives anyway, 0.1 ln(factor) + 1, by attn_factor.
    if (const double by = attention.value_or(1); by != 1) {
      rope["attention_factor"] = by * (0.1 * std::log(*factor) + 1);
    }
    if (const auto fast = positive(key("scaling.yarn_beta_fast"))) {
      rope["beta_fast"] = shortest(*fast);
    }
    if (const auto slow = positive(key("scaling.yarn_beta_slow"))) {
      rope["beta_slow"] = shortest(*slow);
    }
    return rope;
  }
  expect(kind == "none",
         "{}: '{}' is '{}', which cannot be imported; expected none, linear, yarn or longrope "
         "(Llama 3's own stretch is stored as rope_freqs.weight)",
         gguf.path(), key("scaling.type"), kind);
  return {};
}

/// Keys of the architecture that say nothing else than what is read below, or nothing about the
/// maths. Any other key may change what the model computes: it is refused by name.
void refuse_unknown_keys(const Gguf& gguf, const std::string& architecture) {
  static const std::set<std::string, std::less<>> kKnown = {"block_count",
                                                            "context_length",
                                                            "embedding_length",
                                                            "feed_forward_length",
                                                            "vocab_size",
                                                            "tensor_data_layout",
                                                            "attention.head_count",
                                                            "attention.head_count_kv",
                                                            "attention.layer_norm_rms_epsilon",
                                                            "attention.key_length",
                                                            "attention.value_length",
                                                            "attention.sliding_window",
                                                            "attention.causal",
                                                            "rope.dimension_count",
                                                            "rope.freq_base",
                                                            "rope.scale_linear",
                                                            "rope.scaling.type",
                                                            "rope.scaling.factor",
                                                            "rope.scaling.original_context_length",
                                                            "rope.scaling.attn_factor",
                                                            "rope.scaling.finetuned",
                                                            "rope.scaling.yarn_beta_fast",
                                                            "rope.scaling.yarn_beta_slow",
                                                            "expert_count",
                                                            "expert_used_count"};
  const std::string prefix = architecture + ".";
  for (const auto& [key, value] : gguf.metadata()) {
    if (key.starts_with(prefix)) {
      expect(kKnown.contains(key.substr(prefix.size())),
             "{}: the key '{}' may change what the model computes and is not understood here",
             gguf.path(), key);
    }
  }
  expect(gguf.flag(prefix + "attention.causal").value_or(true),
         "{}: '{}attention.causal' is false: this model does not generate text", gguf.path(),
         prefix);
}

struct Architecture {
  const char* name;
  const char* model_type;
  bool neighbouring_pairs;
};

// Which architectures hold rotary pairs as neighbours: llama_model_rope_type in llama.cpp.
constexpr Architecture kArchitectures[] = {{"llama", "llama", true},
                                           {"mistral3", "mistral", true},
                                           {"qwen2", "qwen2", false},
                                           {"qwen3", "qwen3", false}};

const Architecture* find_architecture(const std::string& name) {
  const auto* row = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                                 [&](const Architecture& a) { return name == a.name; });
  return row == std::end(kArchitectures) ? nullptr : row;
}

}  // namespace

bool neighbouring_pairs(const std::string& architecture) {
  const Architecture* row = find_architecture(architecture);
  CAMBIUM_CHECK(row != nullptr, "{}", architecture);
  return row->neighbouring_pairs;
}

double llama3_divisor(const Llama3Rope& parameters, double theta, int64_t i, int64_t count) {
  const double cycles = parameters.original_length * turns(theta, i, count);
  if (cycles < parameters.low_freq_factor) {
    return parameters.factor;
  }
  if (cycles > parameters.high_freq_factor) {
    return 1;
  }
  const double smooth = (cycles - parameters.low_freq_factor) /
                        (parameters.high_freq_factor - parameters.low_freq_factor);
  return 1 / ((1 - smooth) / parameters.factor + smooth);
}

// Between its two thresholds llama3 scaling divides frequency f by d with
//   1/d = (1 - s)/factor + s,   s = (L f - low) / (high - low) = A f - B     (f in turns per
//   token).
// So s follows from d, and A and B from a line through the points (f, s). L, low and high appear
// only as A = L / (high - low) and B = low / (high - low): one of them is free.
std::optional<Llama3Rope> recover_llama3_rope(std::span<const float> divisors, double theta) {
  for (const float divisor : divisors) {
    expect(std::isfinite(divisor) && divisor > 0, "{} is no divisor of a frequency", divisor);
  }
  const auto close = [](double a, double b) { return std::abs(a - b) <= kTolerance * b; };
  Llama3Rope parameters;
  parameters.factor = divisors.empty() ? 1 : *std::max_element(divisors.begin(), divisors.end());
  if (close(parameters.factor, 1)) {
    return std::nullopt;
  }
  parameters.factor = rounded_if_near(parameters.factor);

  double n = 0, sum_f = 0, sum_s = 0, sum_ff = 0, sum_fs = 0;
  const auto count = static_cast<int64_t>(divisors.size());
  for (int64_t i = 0; i < count; ++i) {
    const double divisor = divisors[static_cast<size_t>(i)];
    if (close(divisor, 1) || close(divisor, parameters.factor)) {
      continue;
    }
    const double f = turns(theta, i, count);
    const double s = (1 / divisor - 1 / parameters.factor) / (1 - 1 / parameters.factor);
    n += 1;
    sum_f += f;
    sum_s += s;
    sum_ff += f * f;
    sum_fs += f * s;
  }
  if (n >= 2) {
    const double a = (n * sum_fs - sum_f * sum_s) / (n * sum_ff - sum_f * sum_f);
    const double b = (a * sum_f - sum_s) / n;
    const double width = parameters.original_length / a;
    parameters.low_freq_factor = rounded_if_near(b * width);
    parameters.high_freq_factor = rounded_if_near(b * width + width);
  }
  expect(
      gives(parameters, divisors, theta),
      "these divisors of the rotary frequencies are not of Llama 3's kind, and no other kind can "
      "be imported");
  return parameters;
}

GgufLlamaConfig read_llama_config(const Gguf& gguf) {
  const std::string& path = gguf.path();
  const std::string architecture = gguf.text("general.architecture").value_or("(none)");
  const Architecture* row = find_architecture(architecture);
  expect(row != nullptr,
         "{}: the architecture is '{}'; only 'llama' (Llama, Mistral, SmolLM and their like), "
         "'mistral3', 'qwen2' and 'qwen3' can be imported",
         path, architecture);
  refuse_unknown_keys(gguf, architecture);
  const auto named = [&](const char* key) { return architecture + "." + key; };
  const auto size = [&](const char* name) {
    const std::string key = named(name);
    const std::optional<int64_t> value = gguf.integer(key);
    expect(value.has_value(), "{}: the key '{}' is missing", path, key);
    expect(*value > 0 && *value <= int64_t{1} << 31, "{}: '{}' is {}, which is no size", path, key,
           *value);
    return *value;
  };
  GgufLlamaConfig config;
  config.architecture = architecture;
  config.model_type = row->model_type;
  config.neighbouring_pairs = row->neighbouring_pairs;
  config.layers = size("block_count");
  expect(config.layers <= static_cast<int64_t>(gguf.tensors().size()),
         "{}: '{}' is {}, but there are only {} tensors", path, named("block_count"), config.layers,
         gguf.tensors().size());
  config.hidden = size("embedding_length");
  config.intermediate = size("feed_forward_length");
  config.heads = size("attention.head_count");
  const auto size_or = [&](const char* key, int64_t otherwise) {
    return gguf.metadata().contains(named(key)) ? size(key) : otherwise;
  };
  config.kv_heads = size_or("attention.head_count_kv", config.heads);
  config.context = size_or("context_length", 2048);
  expect(config.heads % config.kv_heads == 0,
         "{}: {} query heads cannot be shared among {} key heads", path, config.heads,
         config.kv_heads);
  if (!gguf.metadata().contains(named("attention.key_length"))) {
    expect(config.hidden % config.heads == 0, "{}: {} channels cannot be cut into {} heads", path,
           config.hidden, config.heads);
  }
  config.head_dim = size_or("attention.key_length", config.hidden / config.heads);
  expect(size_or("attention.value_length", config.head_dim) == config.head_dim,
         "{}: keys and values of different lengths cannot be imported", path);
  expect(config.head_dim % 2 == 0 &&
             size_or("rope.dimension_count", config.head_dim) == config.head_dim,
         "{}: '{}' must be the {} channels of a head", path, named("rope.dimension_count"),
         config.head_dim);
  expect(gguf.integer(named("expert_count")).value_or(0) == 0,
         "{}: this model has experts ('{}'), which cannot be imported", path,
         named("expert_count"));

  const GgufTensor* embedding = gguf.find("token_embd.weight");
  expect(embedding != nullptr && embedding->shape.size() == 2,
         "{}: the matrix token_embd.weight is missing", path);
  config.vocabulary = embedding->shape[0];
  config.tied = gguf.find("output.weight") == nullptr;
  config.rms_eps = shortest(gguf.number(named("attention.layer_norm_rms_epsilon")).value_or(1e-5));
  expect(config.rms_eps > 0 && config.rms_eps < 1, "{}: '{}' is {}, expected above 0 and below 1",
         path, named("attention.layer_norm_rms_epsilon"), config.rms_eps);
  config.rope_theta = shortest(gguf.number(named("rope.freq_base")).value_or(10000));
  expect(config.rope_theta > 1, "{}: '{}' is {}, expected more than 1", path,
         named("rope.freq_base"), config.rope_theta);
  if (const Json rope = read_rope_scaling(gguf, config); !rope.is_null()) {
    config.rope_scaling = rope.dump();
  }
  config.sliding_window = size_or("attention.sliding_window", 0);
  config.qkv_bias = gguf.find("blk.0.attn_q.bias") != nullptr;
  config.output_bias = gguf.find("blk.0.attn_output.bias") != nullptr;
  config.mlp_bias = gguf.find("blk.0.ffn_down.bias") != nullptr;
  config.qk_norm = gguf.find("blk.0.attn_q_norm.weight") != nullptr;
  // A llama with biases on q, k and v alone computes what qwen2 computes; one with a window is what
  // Hugging Face calls mistral.
  if (config.model_type == "llama" && config.qkv_bias && !config.output_bias && !config.mlp_bias) {
    config.model_type = "qwen2";
  }
  if (config.model_type == "llama" && config.sliding_window > 0) {
    config.model_type = "mistral";
  }
  const bool llama = config.model_type == "llama";
  const bool qwen2 = config.model_type == "qwen2";
  expect(
      qwen2 ? config.qkv_bias && !config.output_bias && !config.mlp_bias
            : llama || (!config.qkv_bias && !config.output_bias && !config.mlp_bias),
      "{}: a {} model with these biases (attention {}, its output {}, feed-forward {}) cannot be "
      "imported",
      path, config.model_type, config.qkv_bias, config.output_bias, config.mlp_bias);
  expect(!llama || config.qkv_bias == config.output_bias,
         "{}: a llama model with biases on only a part of attention and on the feed-forward cannot "
         "be imported",
         path);
  expect(config.qk_norm == (config.model_type == "qwen3"),
         "{}: norms of queries and keys are expected in qwen3 models and no others", path);
  config.bos = gguf.integer("tokenizer.ggml.bos_token_id");
  config.eos = gguf.integer("tokenizer.ggml.eos_token_id");
  return config;
}

std::string llama_config_json(const GgufLlamaConfig& config, const std::string& dtype) {
  const std::map<std::string, std::string> classes = {{"llama", "LlamaForCausalLM"},
                                                      {"mistral", "MistralForCausalLM"},
                                                      {"qwen2", "Qwen2ForCausalLM"},
                                                      {"qwen3", "Qwen3ForCausalLM"}};
  Json root = {
      {"architectures", {classes.at(config.model_type)}},
      {"model_type", config.model_type},
      {"vocab_size", config.vocabulary},
      {"hidden_size", config.hidden},
      {"intermediate_size", config.intermediate},
      {"num_hidden_layers", config.layers},
      {"num_attention_heads", config.heads},
      {"num_key_value_heads", config.kv_heads},
      {"head_dim", config.head_dim},
      {"hidden_act", "silu"},
      {"max_position_embeddings", config.context},
      {"rms_norm_eps", config.rms_eps},
      {"rope_theta", config.rope_theta},
      {"rope_scaling", config.rope_scaling.empty()
                           ? Json()
                           : parse_json<Json>(config.rope_scaling, "rope_scaling")},
  };
  if (config.model_type == "llama") {
    root["attention_bias"] = config.qkv_bias;
    root["mlp_bias"] = config.mlp_bias;
  } else if (config.model_type == "qwen3") {
    root["attention_bias"] = false;
  }
  if (config.model_type == "mistral") {
    root["sliding_window"] = config.sliding_window > 0 ? Json(config.sliding_window) : Json();
  } else if (config.sliding_window > 0) {
    root["use_sliding_window"] = true;
    root["sliding_window"] = config.sliding_window;
    root["max_window_layers"] = 0;
  } else if (config.model_type != "llama") {
    root["use_sliding_window"] = false;
  }
  root["tie_word_embeddings"] = config.tied;
  root["torch_dtype"] = dtype;
  if (config.bos) {
    root["bos_token_id"] = *config.bos;
  }
  if (config.eos) {
    root["eos_token_id"] = *config.eos;
  }
  return root.dump(2) + "\n";
}

}  // namespace cambium
