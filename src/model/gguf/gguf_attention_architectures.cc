// Architectures of attention alone: Llama's kind, Gemma, Phi, OLMo, Granite, and those with
// experts.
#include <algorithm>

#include "base/error.h"
#include "model/gguf/gguf_parts.h"

namespace cambium {
namespace {

using namespace gguf;

bool has_experts(Keys& keys) {
  return keys.size("expert_count").value_or(0) > 0;
}
bool has_window(Keys& keys) {
  return keys.size("attention.sliding_window").value_or(0) > 0;
}
/// A llama with biases on q, k and v alone computes what a qwen2 does.
bool has_input_biases(Keys& keys) {
  const auto there = [&](const char* name) { return keys.gguf().find(name) != nullptr; };
  return there("blk.0.attn_q.bias") && !there("blk.0.attn_output.bias") &&
         !there("blk.0.ffn_down.bias");
}
bool scales_queries(Keys& keys) {
  return keys.has("attention.temperature_scale");
}

/// Of rows that import alone: the family has an architecture of its own.
bool never(const ModelSpec& /*spec*/) {
  return false;
}

/// Keys that older files have without experts.
void read_no_experts(Keys& keys, GgufJson& /*config*/) {
  expect(
      keys.size("expert_count").value_or(0) == 0 && keys.size("expert_used_count").value_or(0) == 0,
      "{}: this model has experts ('{}'), which are not expected in one of its architecture",
      keys.path(), keys.named("expert_count"));
}
constexpr GgufPart kNoExperts{read_no_experts, write_nothing};

std::vector<Rule> expert_keys(const char* count) {
  return {{.key = "expert_count", .config = count, .required = true},
          {.key = "expert_used_count", .config = "num_experts_per_tok", .required = true}};
}
/// With experts of a size of their own. Not required where `feed_forward_length` says it too.
std::vector<Rule> expert_keys(const char* count, const char* inner, bool required = true) {
  std::vector<Rule> keys = expert_keys(count);
  keys.push_back({.key = "expert_feed_forward_length", .config = inner, .required = required});
  return keys;
}

/// llama.cpp scales scores by the head, and by the width's share in the largest model.
template <int64_t kLargest>
void read_gemma_scale(Keys& keys, GgufJson& config) {
  const bool largest = keys.need("block_count") == kLargest;
  config["query_pre_attn_scalar"] = largest ? config.at("hidden_size").get<int64_t>() /
                                                  config.at("num_attention_heads").get<int64_t>()
                                            : config.at("head_dim").get<int64_t>();
}
template <int64_t kLargest>
constexpr GgufPart kGemmaScale{read_gemma_scale<kLargest>, write_nothing};

GgufArchitecture llama() {
  return {.name = "llama",
          .families = {"llama"},
          .keys = decoder_keys(),
          .tensors = decoder_tensors(),
          .parts = {kHeadDim, kBiases, kNoExperts},
          .orders = pairs()};
}

/// What Hugging Face calls mistral; llama.cpp does not look at the window.
GgufArchitecture mistral() {
  GgufArchitecture row = llama();
  row.families = {"mistral"};
  row.keys = decoder_keys(
      {{.key = "attention.sliding_window", .config = "sliding_window", .written = false}});
  row.parts = {kHeadDim, kNoExperts};
  row.config = {{"sliding_window", nullptr}};
  row.fits = has_window;
  return row;
}

GgufArchitecture mixtral() {
  GgufArchitecture row = mistral();
  row.families = {"mixtral"};
  const std::vector<Rule> experts = expert_keys("num_local_experts");
  row.keys.insert(row.keys.end(), experts.begin(), experts.end());
  row.parts = {kHeadDim};
  row.fits = has_experts;
  return row;
}

/// Ministral 3, whose queries are scaled by their positions; and Mistral Small 3.
GgufArchitecture mistral3() {
  GgufArchitecture row = llama();
  row.name = "mistral3";
  row.families = {"ministral3", "mistral3"};
  row.parts = {kHeadDim, kNoExperts};
  row.fits = scales_queries;
  return row;
}

GgufArchitecture qwen2(const char* name) {
  GgufArchitecture row = llama();
  row.name = name;
  row.families = {"qwen2"};
  row.parts = {kHeadDim, kNoExperts};
  row.config = {{"use_sliding_window", false}};
  if (row.name == "qwen2") {
    row.orders.clear();
  } else {
    row.fits = has_input_biases;
    row.holds = never;
  }
  return row;
}

GgufArchitecture qwen3() {
  GgufArchitecture row = qwen2("qwen2");
  row.name = "qwen3";
  row.families = {"qwen3"};
  row.config["attention_bias"] = false;
  return row;
}

GgufArchitecture qwen3moe() {
  GgufArchitecture row = qwen3();
  row.name = "qwen3moe";
  row.families = {"qwen3_moe"};
  row.keys = decoder_keys(expert_keys("num_experts", "moe_intermediate_size"));
  row.parts = {kHeadDim};
  row.config.update({{"norm_topk_prob", true},
                     {"decoder_sparse_step", 1},
                     {"mlp_only_layers", GgufJson::array()}});
  return row;
}

std::vector<TensorRule> sandwich_tensors() {
  return decoder_tensors({{"layers.*.out_norm_1.weight", "blk.*.post_attention_norm.weight"},
                          {"layers.*.out_norm_2.weight", "blk.*.post_ffw_norm.weight"}});
}

GgufArchitecture gemma2() {
  return {.name = "gemma2",
          .families = {"gemma2"},
          .keys = decoder_keys({{"attn_logit_softcapping", "attn_logit_softcapping", kNumber},
                                {"final_logit_softcapping", "final_logit_softcapping", kNumber}}),
          .tensors = sandwich_tensors(),
          .parts = {kHeadDim, kWindows2, kGemmaScale<46>},
          .config = {{"tie_word_embeddings", true}},
          .values = {{"*norm.weight", GgufValues::kPlusOne}}};
}

GgufArchitecture gemma3() {
  GgufArchitecture row = gemma2();
  row.name = "gemma3";
  row.families = {"gemma3"};
  row.keys = decoder_keys({{"final_logit_softcapping", "final_logit_softcapping", kNumber},
                           {"rope.freq_base_swa", "rope_local_base_freq", kNumber}});
  row.parts = {kHeadDim, kWindows6, kGemmaScale<62>};
  row.config = GgufJson::object();
  return row;
}

GgufArchitecture phi3() {
  return {.name = "phi3",
          .families = {"phi3"},
          .keys = decoder_keys(
              {{.key = "attention.sliding_window", .config = "sliding_window", .written = false}}),
          .tensors = decoder_tensors(
              {{.theirs = "blk.*.attn_qkv.weight",
                .rows = {"layers.*.mixer.q_proj.weight", "layers.*.mixer.k_proj.weight",
                         "layers.*.mixer.v_proj.weight"}},
               {.theirs = "blk.*.ffn_up.weight",
                .rows = {"layers.*.feed_forward.gate.weight", "layers.*.feed_forward.up.weight"}}}),
          .parts = {kHeadDim},
          .config = {{"sliding_window", nullptr}}};
}

GgufArchitecture olmo2() {
  return {.name = "olmo2",
          .families = {"olmo2"},
          .keys = decoder_keys(),
          .tensors = sandwich_tensors(),
          .parts = {kHeadDim},
          .config = {{"attention_bias", false}}};
}

GgufArchitecture olmo3() {
  GgufArchitecture row = olmo2();
  row.families = {"olmo3"};
  row.parts.push_back(kWindows4);
  row.fits = has_window;
  return row;
}

/// Granite 4's models without a recurrence and without experts are Granites.
bool granite_holds(const ModelSpec& spec) {
  return std::all_of(spec.layers.begin(), spec.layers.end(), [](const LayerSpec& layer) {
    return layer.mixes_by("attention") && layer.mixer()->options.flag("attention", "rope", true) &&
           layer.feed_forward() != nullptr && layer.feed_forward()->kind == "swiglu";
  });
}

GgufArchitecture granite() {
  GgufArchitecture row = llama();
  row.name = "granite";
  row.families = {"granite", "granite_hybrid"};
  row.keys = decoder_keys(granite_keys());
  row.holds = granite_holds;
  return row;
}

GgufArchitecture granitemoe() {
  GgufArchitecture row = granite();
  row.name = "granitemoe";
  row.families = {"granite_moe"};
  std::vector<Rule> keys = granite_keys();
  const std::vector<Rule> experts = expert_keys("num_local_experts");
  keys.insert(keys.end(), experts.begin(), experts.end());
  keys.push_back({"expert_shared_feed_forward_length", "shared_intermediate_size"});
  row.keys = decoder_keys(std::move(keys));
  row.parts = {kHeadDim};
  row.config = {{"model_type", "granitemoeshared"}, {"attention_bias", false}};
  row.holds = nullptr;
  return row;
}

GgufArchitecture apertus() {
  GgufArchitecture row = qwen2("qwen2");
  row.name = "apertus";
  row.families = {"apertus"};
  row.parts = {kHeadDim};
  row.config = {{"attention_bias", false}, {"mlp_bias", false}};
  row.numbers = {{"xielu.alpha_n", "layers.*.feed_forward.alpha_n"},
                 {"xielu.alpha_p", "layers.*.feed_forward.alpha_p"},
                 {"xielu.beta", {}, 0.5},
                 {"xielu.eps", {}, -1e-6}};
  return row;
}

GgufArchitecture smollm3() {
  GgufArchitecture row = llama();
  row.name = "smollm3";
  row.families = {"smollm3"};
  row.parts = {kHeadDim};
  row.config = {{"no_rope_layer_interval", 4}, {"attention_bias", false}, {"mlp_bias", false}};
  return row;
}

GgufArchitecture minimax_m2() {
  return {.name = "minimax-m2",
          .families = {"minimax_m2"},
          .keys = decoder_keys(expert_keys("num_local_experts", "intermediate_size", false)),
          .tensors = decoder_tensors(),
          .rope = {.dims = "rotary_dim"},
          .parts = {kHeadDim},
          .config = {{"use_routing_bias", true}, {"use_qk_norm", true}},
          .constants = gating(2)};
}

GgufArchitecture gpt_oss() {
  return {
      .name = "gpt-oss",
      .families = {"gpt_oss"},
      .keys = decoder_keys(expert_keys("num_local_experts", "intermediate_size", false)),
      .tensors = decoder_tensors({{"layers.*.post_norm.weight", "blk.*.post_attention_norm.weight"},
                                  {"layers.*.feed_forward.router.bias", "blk.*.ffn_gate_inp.bias"},
                                  {"layers.*.mixer.sinks", "blk.*.attn_sinks.weight"}}),
      .rope = {.truncate = false},
      .parts = {kHeadDim, kWindows2},
      .config = {{"attention_bias", true}, {"swiglu_limit", 7.0}}};
}

}  // namespace

std::vector<GgufArchitecture> gguf_attention_architectures() {
  GgufArchitecture small3 = mistral3();
  small3.families = {"mistral"};
  small3.config = {{"sliding_window", nullptr}};
  small3.fits = nullptr;
  return {mixtral(), qwen2("llama"), mistral(), llama(),   mistral3(),   small3,   qwen2("qwen2"),
          qwen3(),   qwen3moe(),     gemma2(),  gemma3(),  phi3(),       olmo3(),  olmo2(),
          granite(), granitemoe(),   smollm3(), apertus(), minimax_m2(), gpt_oss()};
}

}  // namespace cambium
