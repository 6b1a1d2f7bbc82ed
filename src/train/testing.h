// What the tests of training share: small models, a tokenizer of bytes and a toy task.
#pragma once

#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "base/random.h"
#include "model/weights.h"
#include "tensor/copy.h"
#include "text/tokenizer_train.h"
#include "train/dataset.h"
#include "train/trainer.h"

namespace cambium::testing {

inline UnitSpec attention_mixer() {
  return {"attention", {{"heads", int64_t{2}}, {"kv_heads", int64_t{1}}, {"head_dim", int64_t{8}}}};
}

/// A model of 16 channels over 24 tokens with these mixers.
inline ModelSpec tiny_spec(const std::vector<UnitSpec>& mixers) {
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 24;
  spec.width = 16;
  spec.tied_head = true;
  spec.max_positions = 256;
  spec.rope.dim = 8;
  spec.eos_ids = {1};
  for (const UnitSpec& mixer : mixers) {
    spec.layers.push_back(decoder_layer(mixer, 24));
  }
  return spec;
}

inline ModelSpec tiny_attention(int layers) {
  return tiny_spec(std::vector<UnitSpec>(static_cast<size_t>(layers), attention_mixer()));
}

/// As many layers of attention whose feed-forwards are four experts with so many to a token.
inline ModelSpec tiny_experts(int layers, const Options& router = {{"router", "softmax"}},
                              int64_t top = 1) {
  ModelSpec spec = tiny_attention(layers);
  for (LayerSpec& layer : spec.layers) {
    UnitSpec& unit = layer.branches[1].units[0];
    unit = {"experts", {{"experts", int64_t{4}}, {"top", top}, {"inner", int64_t{12}}}};
    for (const auto& [key, value] : router.values()) {
      unit.options.set(key, value);
    }
  }
  return spec;
}

/// One layer of every kind of mixer.
inline ModelSpec every_mixer() {
  UnitSpec window = attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{3});
  return tiny_spec(
      {attention_mixer(),
       window,
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{2}}}},
       {"mamba2",
        {{"heads", int64_t{2}},
         {"head_dim", int64_t{8}},
         {"state", int64_t{4}},
         {"b_heads", int64_t{1}}}},
       {"gated_delta_net",
        {{"heads", int64_t{2}}, {"key_dim", int64_t{4}}, {"value_dim", int64_t{8}}}},
       {"kimi_delta", {{"heads", int64_t{2}}, {"head_dim", int64_t{8}}}},
       {"lightning", {{"heads", int64_t{2}}, {"kv_heads", int64_t{1}}, {"head_dim", int64_t{8}}}}});
}

inline constexpr const char* kChatTemplate =
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}";

/// 261 tokens: one a byte, and those of the template. "<|stop|>" ends a document.
inline Tokenizer byte_tokenizer(const std::string& chat_template = kChatTemplate) {
  const std::vector<std::string> special = {"<|stop|>", "<|end|>", "<|system|>", "<|user|>",
                                            "<|assistant|>"};
  const TokenizerFiles files = train_tokenizer({}, 256 + 5, special, chat_template);
  return Tokenizer::parse(files.tokenizer_json, files.config_json);
}

/// Document i: 2 to 4 symbols, a separator, the same symbols again, the end. The copy is learned.
inline std::unique_ptr<DocumentSource> copy_task(uint64_t seed = 7) {
  return generated_source(
      [seed](uint64_t index) {
        Rng rng(seed, index);
        std::vector<int32_t> symbols;
        for (int64_t n = rng.between(2, 4); n > 0; --n) {
          symbols.push_back(static_cast<int32_t>(rng.between(3, 23)));
        }
        Document document;
        document.append(symbols, false);
        document.append({2}, false);
        document.append(symbols, true);
        document.append({1}, true);
        return document;
      },
      "copy task " + std::to_string(seed));
}

inline TrainConfig tiny_config(int64_t steps) {
  TrainConfig config;
  config.steps = steps;
  config.sequence_length = 48;
  config.sequences_per_step = 2;
  config.schedule = {.peak = 1e-2, .warmup_steps = 2, .decay = Decay::kCosine, .final_ratio = 0.1};
  return config;
}

/// Of a model on any device.
inline std::vector<float> all_weights(Model& model) {
  std::vector<float> values;
  model.visit([&](const std::string&, Parameter& p) {
    const std::vector<float> w = elements_of(p.tensor);
    values.insert(values.end(), w.begin(), w.end());
  });
  return values;
}

/// Empty where the parameter has no gradient.
inline std::vector<float> all_gradients(Model& model) {
  std::vector<float> values;
  model.visit([&](const std::string&, Parameter& p) {
    if (p.tensor.has_grad()) {
      const float* g = p.tensor.grad_ptr<float>();
      values.insert(values.end(), g, g + p.numel());
    }
  });
  return values;
}

/// The log without what says how fast it went.
inline std::vector<std::string> curve(const std::string& folder) {
  std::vector<std::string> lines;
  std::ifstream file(folder + "/log.jsonl");
  for (std::string line; std::getline(file, line);) {
    nlohmann::json json = nlohmann::json::parse(line);
    if (json["event"] == "matrix peak") {
      continue;
    }
    for (const char* name : {"seconds", "tokens_per_second", "matrix_peak_share", "device_bytes"}) {
      json.erase(name);
    }
    lines.push_back(json.dump());
  }
  return lines;
}

}  // namespace cambium::testing
