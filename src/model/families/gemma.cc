// Gemma 2 and 3: norms before and after every unit, weights that count from one, GeGLU, embeddings
// times the root of the width. Gemma 2 caps scores and logits; Gemma 3 norms q and k instead, and
// its windowed layers turn by a base of their own. Gemma 3 with images is read for its text.
#include <cmath>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

constexpr const char* kGelu = "gelu_pytorch_tanh";

/// What the two differ in, and transformers' defaults where a key is absent.
struct Gemma {
  const char* family;
  const char* architecture;
  const char* model_type;
  double score_cap, logit_cap;
  int64_t pattern;  // each so manieth layer is full
  bool third;
};
constexpr Gemma kGemma2{"gemma2", "Gemma2ForCausalLM", "gemma2", 50.0, 30.0, 2, false};
constexpr Gemma kGemma3{"gemma3", "Gemma3ForCausalLM", "gemma3_text", 0.0, 0.0, 6, true};

double cap(const Json& config, const char* key, double absent, const std::string& where) {
  const double value = config::real_or(config, key, config.contains(key) ? 0.0 : absent, where);
  return in_range(where, key, value, 0.0, 1e6);
}

ModelSpec read_gemma(Json config, const Gemma& gemma, const std::string& where) {
  const std::string act =
      config::text_or(config, "hidden_activation",
                      config::text_or(config, "hidden_act", kGelu, where).c_str(), where);
  expect(act == kGelu, "{}: expected hidden_activation {}, got '{}'", where, kGelu, act);
  expect(!config::flag_or(config, "use_bidirectional_attention", false, where),
         "{}: 'use_bidirectional_attention' is true; tokens that see later ones are not supported",
         where);
  config.erase("hidden_act");
  if (!config::has(config, "tie_word_embeddings")) {
    config["tie_word_embeddings"] = true;
  }
  if (gemma.third && !config::has(config, "rope_theta")) {
    config["rope_theta"] = 1e6;  // of a text_config too, which may name no model_type
  }
  const auto [full, local] = config::split_ropes(config);
  ModelSpec spec = config::read_decoder(full, gemma.family, where);
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.embedding_scale = std::sqrt(static_cast<float>(spec.width));
  spec.norm.kind = NormKind::kZeroCentred;
  spec.logit_cap =
      static_cast<float>(cap(config, "final_logit_softcapping", gemma.logit_cap, where));
  const double scalar = config::real_or(config, "query_pre_attn_scalar", 256.0, where);
  Options& attention = spec.layers.front().mixer()->options;
  attention.set("scale",
                1.0 / std::sqrt(in_range(where, "query_pre_attn_scalar", scalar, 1e-6, 1e9)));
  if (const double scores = cap(config, "attn_logit_softcapping", gemma.score_cap, where);
      scores > 0.0) {
    attention.set("softcap", scores);
  }
  if (gemma.third) {
    attention.set("qk_norm_eps", config::shortest(spec.norm.eps));
    attention.set("qk_norm", norm_kind_name(NormKind::kZeroCentred));
    spec.more_ropes.push_back(
        local
            ? config::read_rope(*local, sizes.head_dim, spec.max_positions, where)
            : config::read_rope(
                  {{"rope_theta", config::real_or(config, "rope_local_base_freq", 10000.0, where)}},
                  sizes.head_dim, spec.max_positions, where));
  }
  LayerSpec layer = spec.layers.front();
  for (BranchSpec& branch : layer.branches) {
    branch.norm = branch.out_norm = spec.norm;
  }
  layer.branches.back().units.front().options.set("activation", "gelu_tanh");
  spec.layers.assign(spec.layers.size(), layer);
  const int64_t pattern =
      config::integer_or(config, "sliding_window_pattern", gemma.pattern, 1, kMaxLayers, where);
  config::set_windows(spec, config::with_layer_types(config, pattern, where),
                      config::integer_or(config, "sliding_window", 4096, 1, kMaxPositions, where),
                      0, where);
  for (LayerSpec& each : spec.layers) {
    each.rope = gemma.third && each.mixer()->options.has("window") ? 1 : 0;
  }
  return spec;
}

ModelSpec read_gemma2(const std::string& text, const std::string& where) {
  return read_gemma(config::parse(text, where), kGemma2, where);
}

ModelSpec read_gemma3(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  if (const auto inner = config.find("text_config"); inner != config.end()) {
    expect(inner->is_object(), "{}: expected 'text_config' to be an object", where);
    // What such a file leaves out is as in transformers' Gemma3TextConfig.
    Json whole = {{"vocab_size", 262208},      {"hidden_size", 2304},
                  {"intermediate_size", 9216}, {"num_hidden_layers", 26},
                  {"num_attention_heads", 8},  {"num_key_value_heads", 4},
                  {"head_dim", 256},           {"max_position_embeddings", 131072}};
    for (const char* key : {"bos_token_id", "eos_token_id", "tie_word_embeddings"}) {
      if (config::has(config, key)) {
        whole[key] = config[key];
      }
    }
    whole.update(*inner);
    config = whole;
  }
  return read_gemma(config, kGemma3, where);
}

/// The number whose inverse root is the scale: whole in every published model.
Json scalar_of(double scale) {
  const double value = 1.0 / (scale * scale);
  const double whole = std::round(value);
  return std::abs(value - whole) < 1e-6 * whole ? Json(static_cast<int64_t>(whole)) : Json(value);
}

std::string write_gemma(const ModelSpec& spec, const Gemma& gemma,
                        ModelSpec (*read)(const std::string& text, const std::string& where)) {
  Json config = config::write_attention_decoder(spec, gemma.architecture, gemma.model_type);
  const Options& attention = spec.layers.front().mixer()->options;
  config["hidden_act"] = kGelu;
  config["hidden_activation"] = kGelu;
  config["query_pre_attn_scalar"] = scalar_of(attention.real("attention", "scale", 1.0));
  const double scores = attention.real("attention", "softcap", 0.0);
  config["attn_logit_softcapping"] = scores > 0.0 ? Json(scores) : Json();
  config["final_logit_softcapping"] =
      spec.logit_cap > 0.0F ? Json(config::shortest(spec.logit_cap)) : Json();
  config::write_layer_types(spec, config);
  if (gemma.third) {
    expect(spec.more_ropes.size() == 1 && spec.more_ropes[0].scaling == RopeScaling::kNone,
           "a {} config.json has one more rotation, without scaling; write the cambium layout "
           "instead",
           gemma.model_type);
    config["rope_local_base_freq"] = spec.more_ropes[0].theta;
  }
  return config::expressed(config, spec, read);
}

std::string write_gemma2(const ModelSpec& spec) {
  return write_gemma(spec, kGemma2, read_gemma2);
}
std::string write_gemma3(const ModelSpec& spec) {
  return write_gemma(spec, kGemma3, read_gemma3);
}

const std::vector<TensorRule>& gemma_tensors() {
  static const std::vector<TensorRule> rules = config::decoder_tensors(
      {{"layers.*.out_norm_1.*", "model.layers.*.post_attention_layernorm.*"},
       {"layers.*.post_norm.*", "model.layers.*.pre_feedforward_layernorm.*"},
       {"layers.*.out_norm_2.*", "model.layers.*.post_feedforward_layernorm.*"}});
  return rules;
}

Family gemma2_family() {
  return {"gemma2",     {"gemma2"},      read_gemma2,
          write_gemma2, gemma_tensors(), config::decoder_ignored()};
}

Family gemma3_family() {
  std::vector<std::string> ignored = config::decoder_ignored();
  for (const char* images : {"vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*",
                             "model.multi_modal_projector.*"}) {
    ignored.emplace_back(images);
  }
  return {"gemma3",
          {"gemma3_text", "gemma3"},
          read_gemma3,
          write_gemma3,
          config::composite_tensors(gemma_tensors()),
          ignored};
}

}  // namespace

std::vector<Family> gemma_families() {
  return {gemma2_family(), gemma3_family()};
}

}  // namespace cambium
