#include "model/gguf/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "base/error.h"

namespace cambium {
namespace {

// Divisors are stored as fp32 and parameters are short decimals.
constexpr double kTolerance = 1e-3;

/// Rotations per token of frequency i.
double turns(double theta, std::int64_t i, std::int64_t count) {
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
  const auto count = static_cast<std::int64_t>(divisors.size());
  for (std::int64_t i = 0; i < count; ++i) {
    const double wanted = divisors[static_cast<std::size_t>(i)];
    if (!(std::abs(llama3_divisor(parameters, theta, i, count) - wanted) <= kTolerance * wanted)) {
      return false;
    }
  }
  return true;
}

std::optional<Llama3Rope> read_rope_scaling(const Gguf& gguf, const GgufLlamaConfig& config) {
  const std::string kind = gguf.text("llama.rope.scaling.type").value_or("none");
  expect(
      kind == "none",
      "{}: 'llama.rope.scaling.type' is '{}', which cannot be imported; expected none (Llama 3's "
      "own stretch is stored as rope_freqs.weight)",
      gguf.path(), kind);
  const GgufTensor* freqs = gguf.find("rope_freqs.weight");
  if (freqs == nullptr) return std::nullopt;
  const std::int64_t count = config.head_dim / 2;
  expect(freqs->type == GgufType::kF32 && freqs->shape == std::vector<std::int64_t>{count},
         "{}: expected rope_freqs.weight to be F32 ({}), half of a head", gguf.path(), count);
  std::vector<float> divisors(static_cast<std::size_t>(count));
  dequantise_rows(*freqs, 0, 1, divisors);
  try {
    return recover_llama3_rope(divisors, config.rope_theta);
  } catch (const Error& error) {
    fail("{}: rope_freqs.weight: {}", gguf.path(), error.what());
  }
}

}  // namespace

double llama3_divisor(const Llama3Rope& parameters, double theta, std::int64_t i,
                      std::int64_t count) {
  const double cycles = parameters.original_length * turns(theta, i, count);
  if (cycles < parameters.low_freq_factor) return parameters.factor;
  if (cycles > parameters.high_freq_factor) return 1;
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
  if (close(parameters.factor, 1)) return std::nullopt;
  parameters.factor = rounded_if_near(parameters.factor);

  double n = 0, sum_f = 0, sum_s = 0, sum_ff = 0, sum_fs = 0;
  const auto count = static_cast<std::int64_t>(divisors.size());
  for (std::int64_t i = 0; i < count; ++i) {
    const double divisor = divisors[static_cast<std::size_t>(i)];
    if (close(divisor, 1) || close(divisor, parameters.factor)) continue;
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
  expect(
      architecture == "llama",
      "{}: the architecture is '{}'; only 'llama' (Llama, Mistral, SmolLM and their like) can be "
      "imported",
      path, architecture);
  const auto size = [&](const char* key) {
    const std::optional<std::int64_t> value = gguf.integer(key);
    expect(value.has_value(), "{}: the key '{}' is missing", path, key);
    expect(*value > 0 && *value <= std::int64_t{1} << 31, "{}: '{}' is {}, which is no size", path,
           key, *value);
    return *value;
  };
  GgufLlamaConfig config;
  config.layers = size("llama.block_count");
  expect(config.layers <= static_cast<std::int64_t>(gguf.tensors().size()),
         "{}: 'llama.block_count' is {}, but there are only {} tensors", path, config.layers,
         gguf.tensors().size());
  config.hidden = size("llama.embedding_length");
  config.intermediate = size("llama.feed_forward_length");
  config.heads = size("llama.attention.head_count");
  const auto size_or = [&](const char* key, std::int64_t otherwise) {
    return gguf.metadata().contains(key) ? size(key) : otherwise;
  };
  config.kv_heads = size_or("llama.attention.head_count_kv", config.heads);
  config.context = size_or("llama.context_length", 2048);
  expect(config.heads % config.kv_heads == 0,
         "{}: {} query heads cannot be shared among {} key heads", path, config.heads,
         config.kv_heads);
  if (!gguf.metadata().contains("llama.attention.key_length")) {
    expect(config.hidden % config.heads == 0, "{}: {} channels cannot be cut into {} heads", path,
           config.hidden, config.heads);
  }
  config.head_dim = size_or("llama.attention.key_length", config.hidden / config.heads);
  expect(size_or("llama.attention.value_length", config.head_dim) == config.head_dim,
         "{}: keys and values of different lengths cannot be imported", path);
  expect(config.head_dim % 2 == 0 &&
             size_or("llama.rope.dimension_count", config.head_dim) == config.head_dim,
         "{}: 'llama.rope.dimension_count' must be the {} channels of a head", path,
         config.head_dim);
  expect(gguf.integer("llama.expert_count").value_or(0) == 0,
         "{}: this model has experts ('llama.expert_count'), which cannot be imported", path);

  const GgufTensor* embedding = gguf.find("token_embd.weight");
  expect(embedding != nullptr && embedding->shape.size() == 2,
         "{}: the matrix token_embd.weight is missing", path);
  config.vocabulary = embedding->shape[0];
  config.tied = gguf.find("output.weight") == nullptr;
  config.rms_eps = shortest(gguf.number("llama.attention.layer_norm_rms_epsilon").value_or(1e-5));
  config.rope_theta = shortest(gguf.number("llama.rope.freq_base").value_or(10000));
  expect(config.rope_theta > 1, "{}: 'llama.rope.freq_base' is {}, expected more than 1", path,
         config.rope_theta);
  config.rope_scaling = read_rope_scaling(gguf, config);
  config.bos = gguf.integer("tokenizer.ggml.bos_token_id");
  config.eos = gguf.integer("tokenizer.ggml.eos_token_id");
  return config;
}

std::string llama_config_json(const GgufLlamaConfig& config, const std::string& dtype) {
  nlohmann::ordered_json root = {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", "llama"},
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
      {"rope_scaling", nullptr},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"tie_word_embeddings", config.tied},
      {"torch_dtype", dtype},
  };
  if (config.rope_scaling) {
    root["rope_scaling"] = {
        {"rope_type", "llama3"},
        {"factor", config.rope_scaling->factor},
        {"low_freq_factor", config.rope_scaling->low_freq_factor},
        {"high_freq_factor", config.rope_scaling->high_freq_factor},
        {"original_max_position_embeddings",
         static_cast<std::int64_t>(config.rope_scaling->original_length)},
    };
  }
  if (config.bos) root["bos_token_id"] = *config.bos;
  if (config.eos) root["eos_token_id"] = *config.eos;
  return root.dump(2) + "\n";
}

}  // namespace cambium
