// Jamba (arXiv 2403.19887): Mamba-1 with norms of its step, B and C; attention without positions
// and experts each in every so many layers, freely combined.
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/families/hybrid_config.h"

namespace cambium {
namespace {

using config::Every;
using config::Json;

Every read_every(const Json& config, const char* period_key, const char* offset_key, int64_t period,
                 int64_t offset, const std::string& where) {
  Every every;
  every.period = config::integer_or(config, period_key, period, 1, kMaxLayers, where);
  every.offset = config::integer_or(config, offset_key, offset, 0, kMaxLayers, where);
  expect(every.offset < every.period, "{}: expected '{}' below '{}', got {} and {}", where,
         offset_key, period_key, every.offset, every.period);
  return every;
}

ModelSpec read(const std::string& text, const std::string& where) {
  const Json config = config::parse(text, where);
  ModelSpec spec = config::read_model(config, "jamba", where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope.dim = sizes.head_dim;  // no layer rotates
  config::refuse_flags(config, {"mamba_proj_bias"}, where);
  expect(!config::has(config, "sliding_window"),
         "{}: 'sliding_window' is given, which is not supported in jamba models", where);
  UnitSpec attends = config::attention_of(sizes);
  attends.options.set("rope", false);
  const int64_t expand = config::integer_or(config, "mamba_expand", 2, 1, 64, where);
  const bool automatic = config.contains("mamba_dt_rank") && config["mamba_dt_rank"].is_string();
  const int64_t rank = automatic ? (spec.width + 15) / 16
                                 : config::integer_or(config, "mamba_dt_rank",
                                                      (spec.width + 15) / 16, 1, kMaxWidth, where);
  const UnitSpec mamba{
      "mamba1",
      {{"inner", checked_product(where, "mamba_expand", {expand, spec.width}, kMaxInner)},
       {"state", config::integer_or(config, "mamba_d_state", 16, 1, kMaxHeadDim, where)},
       {"dt_rank", rank},
       {"conv", config::integer_or(config, "mamba_d_conv", 4, 2, 64, where)},
       {"conv_bias", config::flag_or(config, "mamba_conv_bias", true, where)},
       {"norm_eps", static_cast<double>(spec.norm.eps)}}};
  const int64_t inner = config::integer(config, "intermediate_size", 1, kMaxInner, where);
  const UnitSpec dense{"swiglu", {{"inner", inner}}};
  const int64_t count = config::integer_or(config, "num_experts", 16, 1, kMaxExperts, where);
  const UnitSpec experts{
      "experts",
      {{"experts", count},
       {"top", config::integer_or(config, "num_experts_per_tok", 2, 1, kMaxExperts, where)},
       {"inner", inner},
       {"router", std::string("softmax")},
       {"renormalise", false}}};
  const Every attention = read_every(config, "attn_layer_period", "attn_layer_offset", 8, 4, where);
  const Every sparse =
      read_every(config, "expert_layer_period", "expert_layer_offset", 2, 1, where);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    spec.layers.push_back(
        {{{.norm = spec.norm, .units = {attention.has(i) ? attends : mamba}},
          {.norm = spec.norm, .units = {count > 1 && sparse.has(i) ? experts : dense}}}});
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config = config::begin_config(spec, "JambaForCausalLM", "jamba");
  std::vector<bool> attends;
  std::vector<bool> sparse;
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* feed_forward = layer.feed_forward();
    attends.push_back(layer.mixes_by("attention"));
    sparse.push_back(feed_forward != nullptr && feed_forward->kind == "experts");
  }
  const Every attention = config::every_of(attends);
  const Every experts = config::every_of(sparse);
  config["attn_layer_period"] = attention.period;
  config["attn_layer_offset"] = attention.offset;
  config["expert_layer_period"] = experts.period;
  config["expert_layer_offset"] = experts.offset;
  config["num_experts"] = 1;
  config["num_experts_per_tok"] = 1;
  config["intermediate_size"] = config::inner_of(spec.layers.front());
  if (const UnitSpec* unit = config::find_unit(spec, "experts"); unit != nullptr) {
    config["num_experts"] = unit->options.integer("experts", "experts");
    config["num_experts_per_tok"] = unit->options.integer("experts", "top");
  }
  config::write_attention(config, config::mixer_or_small(spec, "attention").options);
  const Options mamba = config::mixer_or_small(spec, "mamba1").options;
  config["mamba_expand"] = mamba.integer("mamba1", "inner") / spec.width;
  config["mamba_d_state"] = mamba.integer("mamba1", "state");
  config["mamba_dt_rank"] = mamba.integer("mamba1", "dt_rank");
  config["mamba_d_conv"] = mamba.integer("mamba1", "conv");
  config["mamba_conv_bias"] = mamba.flag("mamba1", "conv_bias", true);
  config["mamba_proj_bias"] = false;
  return config::expressed(config, spec, read);
}

}  // namespace

std::vector<Family> jamba_families() {
  return {{"jamba",
           {"jamba"},
           read,
           write,
           config::jamba_tensors({
               {"layers.*.feed_forward.router.*", "model.layers.*.feed_forward.router.*"},
               {"layers.*.feed_forward.experts.gate.*",
                "model.layers.*.feed_forward.experts.#.gate_proj.*"},
               {"layers.*.feed_forward.experts.up.*",
                "model.layers.*.feed_forward.experts.#.up_proj.*"},
               {"layers.*.feed_forward.experts.down.*",
                "model.layers.*.feed_forward.experts.#.down_proj.*"},
               {"layers.*.mixer.dt_norm.*", "model.layers.*.mamba.dt_layernorm.*"},
               {"layers.*.mixer.b_norm.*", "model.layers.*.mamba.b_layernorm.*"},
               {"layers.*.mixer.c_norm.*", "model.layers.*.mamba.c_layernorm.*"},
               {.ours = "layers.*.mixer.*", .theirs = "model.layers.*.mamba.*", .mixer = "mamba1"},
           }),
           config::decoder_ignored()}};
}

}  // namespace cambium
