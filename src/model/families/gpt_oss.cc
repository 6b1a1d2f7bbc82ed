// gpt-oss: attention with a sink's score a head and biases everywhere, windows in every second
// layer, experts whose SwiGLU is clamped.
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "gpt_oss", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  config::set_absent_scaling(config, {{"rope_type", "yarn"},  // transformers' GptOssConfig
                                      {"factor", 32.0},
                                      {"original_max_position_embeddings", 4096},
                                      {"truncate", false}});
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  expect(config::real_or(config, "swiglu_alpha", 1.702, where) == 1.702,
         "{}: expected swiglu_alpha 1.702, as in every published model", where);
  const bool bias = config::flag_or(config, "attention_bias", true, where);
  const UnitSpec attends{"attention",
                         {{"heads", sizes.heads},
                          {"kv_heads", sizes.kv_heads},
                          {"head_dim", sizes.head_dim},
                          {"qkv_bias", bias},
                          {"out_bias", bias},
                          {"sink_logits", true}}};
  const UnitSpec experts{
      "experts",
      {{"experts", config::integer(config, "num_local_experts", 1, kMaxExperts, where)},
       {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
       {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
       {"router", std::string("topk_softmax")},
       {"bias", true},
       {"activation", std::string("clamped_swiglu")},
       {"limit", config::real_or(config, "swiglu_limit", 7.0, where)}}};
  spec.layers.assign(
      static_cast<size_t>(sizes.layers),
      {{{.norm = spec.norm, .units = {attends}}, {.norm = spec.norm, .units = {experts}}}});
  if (!config::has(config, "layer_types")) {
    for (int64_t i = 0; i < sizes.layers; ++i) {
      config["layer_types"].push_back(i % 2 == 0 ? "sliding_attention" : "full_attention");
    }
  }
  config::set_windows(spec, config,
                      config::integer_or(config, "sliding_window", 128, 1, kMaxPositions, where), 0,
                      where);
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"GptOssForCausalLM"});
  config["model_type"] = "gpt_oss";
  config.update(config::write_common(spec));
  config::set_absent_scaling(config, nullptr);
  const Options& attends = config::first_unit(spec, "attention").options;
  config["num_attention_heads"] = attends.integer("attention", "heads");
  config["num_key_value_heads"] = attends.integer("attention", "kv_heads");
  config["head_dim"] = attends.integer("attention", "head_dim");
  config["attention_bias"] = attends.flag("attention", "qkv_bias", false);
  for (const LayerSpec& layer : spec.layers) {
    const int64_t window =
        layer.mixes_by("attention") ? layer.mixer()->options.integer("attention", "window", 0) : 0;
    config["layer_types"].push_back(window > 0 ? "sliding_attention" : "full_attention");
    if (window > 0) {
      config["sliding_window"] = window;
    }
  }
  const Options& experts = config::first_unit(spec, "experts").options;
  config["num_local_experts"] = experts.integer("experts", "experts");
  config["num_experts_per_tok"] = experts.integer("experts", "top");
  config["intermediate_size"] = experts.integer("experts", "inner");
  config["swiglu_limit"] = experts.real("experts", "limit", 7.0);
  config["torch_dtype"] = "float32";
  return config::expressed(config, spec, read);
}

Family gpt_oss_family() {
  // x W with the columns of gate and up taking turns.
  const std::vector<TensorRule> tensors = config::decoder_tensors({
      {.theirs = "model.layers.*.mlp.experts.gate_up_proj",
       .rows = {"layers.*.feed_forward.experts.gate.weight",
                "layers.*.feed_forward.experts.up.weight"},
       .groups = kEveryRow,
       .stacked = true,
       .transposed = true},
      {.theirs = "model.layers.*.mlp.experts.gate_up_proj_bias",
       .rows = {"layers.*.feed_forward.experts.gate.bias", "layers.*.feed_forward.experts.up.bias"},
       .groups = kEveryRow,
       .stacked = true},
      {.ours = "layers.*.feed_forward.experts.down.weight",
       .theirs = "model.layers.*.mlp.experts.down_proj",
       .stacked = true,
       .transposed = true},
      // Released files are MXFP4, whose rows are not turned.
      {.theirs = "model.layers.*.mlp.experts.gate_up_proj_blocks",
       .rows = {"layers.*.feed_forward.experts.gate.weight",
                "layers.*.feed_forward.experts.up.weight"},
       .groups = kEveryRow,
       .stacked = true},
      {.ours = "layers.*.feed_forward.experts.down.weight",
       .theirs = "model.layers.*.mlp.experts.down_proj_blocks",
       .stacked = true},
      {"layers.*.feed_forward.experts.down.bias", "model.layers.*.mlp.experts.down_proj_bias"},
      {"layers.*.feed_forward.router.*", "model.layers.*.mlp.router.*"},
  });
  return {"gpt_oss", {"gpt_oss"}, read, write, tensors, config::decoder_ignored()};
}

}  // namespace

std::vector<Family> gpt_oss_families() {
  return {gpt_oss_family()};
}

}  // namespace cambium
