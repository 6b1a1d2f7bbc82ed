// Llama, Mistral and Qwen3: equal decoder layers with grouped-query attention. They differ in the
// sliding window (Mistral) and the norm of q and k per head (Qwen3).
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

void set_everywhere(ModelSpec& spec, const char* key, const OptionValue& value) {
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set(key, value);
  }
}

std::string attention_names(const ModelSpec& /*spec*/, const std::string& ours) {
  return config::decoder_tensor_name(ours, "self_attn.");
}

ModelSpec read_llama(const std::string& text, const std::string& where) {
  return config::read_decoder(config::parse(text, where), "llama", where);
}

std::string write_llama(const ModelSpec& spec) {
  return config::write_decoder(spec, "LlamaForCausalLM", "llama").dump(1);
}

ModelSpec read_mistral(const std::string& text, const std::string& where) {
  const config::Json config = config::parse(text, where);
  ModelSpec spec = config::read_decoder(config, "mistral", where);
  // Where the key is absent transformers' MistralConfig has its own default; null means no window.
  const int64_t absent = config.contains("sliding_window") ? 0 : 4096;
  if (const int64_t window = config::integer_or(config, "sliding_window", absent, where);
      window > 0) {
    set_everywhere(spec, "window", window);
  }
  return spec;
}

std::string write_mistral(const ModelSpec& spec) {
  return config::write_decoder(spec, "MistralForCausalLM", "mistral").dump(1);
}

ModelSpec read_qwen3(const std::string& text, const std::string& where) {
  config::Json config = config::parse(text, where);
  if (!config.contains("head_dim")) {
    config["head_dim"] = 128;  // the default of transformers' Qwen3Config
  }
  ModelSpec spec = config::read_decoder(config, "qwen3", where);
  expect(!config::flag_or(config, "use_sliding_window", false, where),
         "{}: use_sliding_window is true, which is not supported for qwen3", where);
  set_everywhere(spec, "qk_norm_eps", config::real_or(config, "rms_norm_eps", 1e-6, where));
  return spec;
}

std::string write_qwen3(const ModelSpec& spec) {
  return config::write_decoder(spec, "Qwen3ForCausalLM", "qwen3").dump(1);
}

}  // namespace

Family llama_family() {
  return {"llama", {"llama"}, read_llama, write_llama, attention_names};
}

Family mistral_family() {
  return {"mistral", {"mistral"}, read_mistral, write_mistral, attention_names};
}

Family qwen3_family() {
  return {"qwen3", {"qwen3"}, read_qwen3, write_qwen3, attention_names};
}

}  // namespace cambium
