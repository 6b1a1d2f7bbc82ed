// Llama, Mistral, Ministral, Qwen2 and Qwen3: decoder layers with grouped-query attention. They
// differ in biases, sliding windows and the norm of q and k per head (Qwen3).
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::DecoderTraits;
using config::Windows;

constexpr DecoderTraits kLlama{.attention_bias = true, .mlp_bias = true};
constexpr DecoderTraits kMistral{.windows = Windows::kEverywhere};
constexpr DecoderTraits kMinistral{.windows = Windows::kByLayer};
constexpr DecoderTraits kQwen2{.qkv_bias = true, .windows = Windows::kByLayer};
constexpr DecoderTraits kQwen3{.attention_bias = true, .windows = Windows::kByLayer};

int64_t window_or(const config::Json& config, int64_t absent, const std::string& where) {
  return config::integer_or(config, "sliding_window", absent, 1, kMaxPositions, where);
}

ModelSpec read_llama(const std::string& text, const std::string& where) {
  return config::read_decoder(config::parse(text, where), "llama", where, kLlama);
}

std::string write_llama(const ModelSpec& spec) {
  return config::write_decoder(spec, "LlamaForCausalLM", "llama", kLlama).dump(1);
}

ModelSpec read_mistral(const std::string& text, const std::string& where) {
  const config::Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "mistral", where, kMistral);
  // Where the key is absent transformers' MistralConfig has its own default; null means no window.
  const int64_t window = window_or(config, config.contains("sliding_window") ? 0 : 4096, where);
  for (LayerSpec& layer : spec.layers) {
    if (window > 0) {
      layer.mixer()->options.set("window", window);
    }
  }
  return spec;
}

std::string write_mistral(const ModelSpec& spec) {
  return config::write_decoder(spec, "MistralForCausalLM", "mistral", kMistral).dump(1);
}

ModelSpec read_ministral(const std::string& text, const std::string& where) {
  const config::Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "ministral", where, kMinistral);
  const int64_t window = window_or(config, config.contains("sliding_window") ? 0 : 4096, where);
  const int64_t all = window > 0 ? 0 : kMaxLayers;
  config::set_windows(spec, config, window, all, where);
  return spec;
}

std::string write_ministral(const ModelSpec& spec) {
  return config::write_decoder(spec, "MinistralForCausalLM", "ministral", kMinistral).dump(1);
}

/// The windows of Qwen's configurations: only where use_sliding_window says so, and then from layer
/// max_window_layers on; a list of layer_types wins.
void set_qwen_windows(ModelSpec& spec, const config::Json& config, const std::string& where) {
  const bool used = config::flag_or(config, "use_sliding_window", false, where);
  const int64_t window = used ? window_or(config, 4096, where) : 0;
  const int64_t full_below =
      used ? config::integer_or(config, "max_window_layers", 28, 0, kMaxLayers, where) : kMaxLayers;
  config::set_windows(spec, config, window, full_below, where);
}

ModelSpec read_qwen2(const std::string& text, const std::string& where) {
  const config::Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "qwen2", where, kQwen2);
  set_qwen_windows(spec, config, where);
  return spec;
}

std::string write_qwen2(const ModelSpec& spec) {
  return config::write_decoder(spec, "Qwen2ForCausalLM", "qwen2", kQwen2).dump(1);
}

ModelSpec read_qwen3(const std::string& text, const std::string& where) {
  config::Json config = config::parse(text, where);
  if (!config::has(config, "head_dim")) {
    config["head_dim"] = 128;  // the default of transformers' Qwen3Config
  }
  ModelSpec spec = config::read_decoder(config, "qwen3", where, kQwen3);
  const double eps = config::real_or(config, "rms_norm_eps", 1e-6, where);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("qk_norm_eps", eps);
  }
  set_qwen_windows(spec, config, where);
  return spec;
}

std::string write_qwen3(const ModelSpec& spec) {
  return config::write_decoder(spec, "Qwen3ForCausalLM", "qwen3", kQwen3).dump(1);
}

Family dense(const char* name, ModelSpec (*read)(const std::string& text, const std::string& where),
             std::string (*write)(const ModelSpec& spec)) {
  return {name, {name}, read, write, config::decoder_tensors(), config::decoder_ignored()};
}

}  // namespace

std::vector<Family> dense_families() {
  return {dense("llama", read_llama, write_llama), dense("mistral", read_mistral, write_mistral),
          dense("ministral", read_ministral, write_ministral),
          dense("qwen2", read_qwen2, write_qwen2), dense("qwen3", read_qwen3, write_qwen3)};
}

}  // namespace cambium
