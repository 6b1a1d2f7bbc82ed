#include "model/families/hybrid_config.h"

#include <algorithm>

namespace cambium::config {

UnitSpec attention_of(const Sizes& sizes) {
  return {"attention",
          {{"heads", sizes.heads}, {"kv_heads", sizes.kv_heads}, {"head_dim", sizes.head_dim}}};
}

void write_attention(Json& config, const Options& attention) {
  config["num_attention_heads"] = attention.integer("attention", "heads");
  config["num_key_value_heads"] = attention.integer("attention", "kv_heads");
  config["head_dim"] = attention.integer("attention", "head_dim");
  config["attention_bias"] = false;
}

Json begin_config(const ModelSpec& spec, const char* architecture, const char* model_type) {
  Json config;
  config["architectures"] = Json::array({architecture});
  config["model_type"] = model_type;
  config.update(write_common(spec));
  return config;
}

void refuse_flags(const Json& config, std::initializer_list<const char*> keys,
                  const std::string& where) {
  for (const char* key : keys) {
    expect(!flag_or(config, key, false, where), "{}: '{}' is true, which is not supported", where,
           key);
  }
}

Every every_of(const std::vector<bool>& marked) {
  const auto first = std::find(marked.begin(), marked.end(), true);
  if (first == marked.end()) {
    return {std::ssize(marked) + 1, std::ssize(marked)};
  }
  const auto second = std::find(first + 1, marked.end(), true);
  return {second == marked.end() ? std::ssize(marked) : second - first, first - marked.begin()};
}

std::vector<TensorRule> granite_tensors(std::vector<TensorRule> more) {
  const std::vector<TensorRule> rules = {
      {.theirs = "model.layers.*.shared_mlp.input_linear.*",
       .rows = {"layers.*.feed_forward.gate.*", "layers.*.feed_forward.up.*"}},
      {"layers.*.feed_forward.down.*", "model.layers.*.shared_mlp.output_linear.*"},
      {.theirs = "model.layers.*.shared_mlp.input_linear.*",
       .rows = {"layers.*.feed_forward.shared.gate.*", "layers.*.feed_forward.shared.up.*"}},
      {"layers.*.feed_forward.shared.down.*", "model.layers.*.shared_mlp.output_linear.*"},
      {.theirs = "model.layers.*.block_sparse_moe.input_linear.*",
       .rows = {"layers.*.feed_forward.experts.gate.*", "layers.*.feed_forward.experts.up.*"},
       .stacked = true},
      {"layers.*.feed_forward.experts.down.*", "model.layers.*.block_sparse_moe.output_linear.*"},
      {"layers.*.feed_forward.router.*", "model.layers.*.block_sparse_moe.router.layer.*"},
  };
  more.insert(more.end(), rules.begin(), rules.end());
  return decoder_tensors(std::move(more));
}

std::vector<TensorRule> jamba_tensors(std::vector<TensorRule> more) {
  more.insert(more.end(),
              {{"norm.*", "model.final_layernorm.*"},
               {"layers.*.post_norm.*", "model.layers.*.pre_ff_layernorm.*"},
               {"layers.*.feed_forward.gate.*", "model.layers.*.feed_forward.gate_proj.*"},
               {"layers.*.feed_forward.up.*", "model.layers.*.feed_forward.up_proj.*"},
               {"layers.*.feed_forward.down.*", "model.layers.*.feed_forward.down_proj.*"}});
  return decoder_tensors(std::move(more));
}

}  // namespace cambium::config
