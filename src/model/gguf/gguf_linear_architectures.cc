// Architectures of linear attention beside attention: gated DeltaNet and lightning.
#include <algorithm>

#include "base/error.h"
#include "model/gguf/gguf_parts.h"

namespace cambium {
namespace {

using namespace gguf;

// --- Gated DeltaNet: Qwen3-Next and Qwen3.5.
constexpr const char* kDeltaNet = "gated_delta_net";

/// Whether each layer attends, in models where each `every`th does: a list, or that number.
std::vector<bool> read_full_layers(Keys& keys, const GgufJson& config, int64_t every) {
  const int64_t layers = whole(config, "num_hidden_layers");
  const auto listed = keys.by_layer("attention.recurrent_layers", layers);
  every = std::max<int64_t>(keys.size("full_attention_interval").value_or(every), 1);
  std::vector<bool> full;
  for (int64_t i = 0; i < layers; ++i) {
    full.push_back(listed ? (*listed)[static_cast<size_t>(i)] == 0 : (i + 1) % every == 0);
  }
  return full;
}
void write_full_layers(const ModelSpec& spec, GgufHead& head) {
  const auto attends = [](const LayerSpec& layer) { return layer.mixes_by("attention"); };
  const auto first = std::find_if(spec.layers.begin(), spec.layers.end(), attends);
  const int64_t every = first - spec.layers.begin() + 1;
  GgufValue::List recurrent;
  bool regular = true;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const bool full = attends(spec.layers[i]);
    recurrent.emplace_back().value = !full;
    regular = regular && full == ((static_cast<int64_t>(i) + 1) % every == 0);
  }
  if (regular) {
    head.size("full_attention_interval", every);
  } else {  // what newer versions of llama.cpp read
    head.put("attention.recurrent_layers", std::move(recurrent));
  }
}

void read_delta(Keys& keys, GgufJson& config) {
  read_inner(keys, config, "linear_num_value_heads", "linear_value_head_dim");
  for (const bool full : read_full_layers(keys, config, 4)) {
    config["layer_types"].push_back(full ? "full_attention" : "linear_attention");
  }
}
void write_delta(const ModelSpec& spec, const GgufJson& /*config*/, GgufHead& head) {
  const Options& o = unit_of(spec, kDeltaNet).options;
  const int64_t key = o.integer(kDeltaNet, "key_dim");
  const int64_t value = o.integer(kDeltaNet, "value_dim");
  expect(key == value,
         "a {} model cannot be written as GGUF: llama.cpp keeps states of {} x {} for each head, "
         "and this one's are {} x {}",
         spec.family, value, value, key, value);
  head.size("ssm.inner_size", o.integer(kDeltaNet, "heads") * value);
  write_full_layers(spec, head);
}
constexpr GgufPart kDelta{read_delta, write_delta};

std::vector<Rule> delta_keys(bool experts) {
  std::vector<Rule> keys = {{"ssm.time_step_rank", "linear_num_value_heads", kSize, true},
                            {"ssm.group_count", "linear_num_key_heads", kSize, true},
                            {"ssm.state_size", "linear_key_head_dim", kSize, true},
                            {"ssm.conv_kernel", "linear_conv_kernel_dim", kSize, true},
                            {"attention.head_count_kv", "num_key_value_heads"}};
  if (experts) {
    keys.insert(keys.end(), {{"expert_count", "num_experts", kSize, true},
                             {"expert_used_count", "num_experts_per_tok", kSize, true},
                             {"expert_feed_forward_length", "moe_intermediate_size", kSize, true},
                             {"expert_shared_feed_forward_length",
                              "shared_expert_intermediate_size", kSize, true}});
  } else {
    keys.push_back({"feed_forward_length", "intermediate_size", kSize, true});
  }
  return attention_keys(std::move(keys));
}

/// Rows of the one projection, which begins with q, k and v.
Rules delta_tensors(Rules more) {
  more.insert(more.end(),
              {{.theirs = "blk.*.attn_qkv.weight",
                .mixer = kDeltaNet,
                .rows = {"layers.*.mixer.in_proj.weight:q", "layers.*.mixer.in_proj.weight:k",
                         "layers.*.mixer.in_proj.weight:v"}},
               {.theirs = "blk.*.attn_gate.weight",
                .mixer = kDeltaNet,
                .rows = {"layers.*.mixer.in_proj.weight:z"}},
               {.theirs = "blk.*.ssm_conv1d.weight",
                .mixer = kDeltaNet,
                .rows = {"layers.*.mixer.conv1d.weight:q", "layers.*.mixer.conv1d.weight:k",
                         "layers.*.mixer.conv1d.weight:v"}},
               {"layers.*.mixer.dt_bias", "blk.*.ssm_dt.bias", kDeltaNet},
               {"layers.*.mixer.A_log", "blk.*.ssm_a", kDeltaNet},
               {"layers.*.mixer.norm.weight", "blk.*.ssm_norm.weight", kDeltaNet},
               {"layers.*.mixer.out_proj.weight", "blk.*.ssm_out.weight", kDeltaNet},
               {"layers.*.post_norm.weight", "blk.*.post_attention_norm.weight"}});
  return decoder_tensors(std::move(more));
}

GgufArchitecture qwen3next() {
  return {.name = "qwen3next",
          .families = {"qwen3_next"},
          .keys = delta_keys(true),
          .tensors = delta_tensors({{.theirs = "blk.*.ssm_ba.weight",
                                     .mixer = kDeltaNet,
                                     .rows = {"layers.*.mixer.ba_proj.weight:beta",
                                              "layers.*.mixer.ba_proj.weight:decay"},
                                     .groups = "k_heads"}}),
          .parts = {kHeadDim, kDelta},
          .config = {{"norm_topk_prob", true}},
          .shapes = {{"blk.*.ssm_conv1d.weight", GgufShape::kSqueezed}},
          .values = {{"blk.*.ssm_a", GgufValues::kMinusExp},
                     {"blk.*.attn_norm.weight", GgufValues::kPlusOne},
                     {"blk.*.post_attention_norm.weight", GgufValues::kPlusOne},
                     {"blk.*.attn_q_norm.weight", GgufValues::kPlusOne},
                     {"blk.*.attn_k_norm.weight", GgufValues::kPlusOne},
                     {"output_norm.weight", GgufValues::kPlusOne}}};
}

/// The axes of images, which turn text alike: pairs of rotary channels by thirds.
void read_sections(Keys& keys, GgufJson& /*config*/) {
  keys.by_layer("rope.dimension_sections", 4);
}
void write_sections(const ModelSpec& spec, const GgufJson& /*config*/, GgufHead& head) {
  const int64_t count = spec.rope.dim / 2;
  head.sizes("rope.dimension_sections", {(count + 2) / 3, (count + 1) / 3, count / 3, 0});
}
constexpr GgufPart kSections{read_sections, write_sections};

/// llama.cpp lets value heads take turns over the key heads, where ours share one by neighbours.
GgufArchitecture qwen35() {
  GgufArchitecture row = qwen3next();
  row.name = "qwen35";
  row.families = {"qwen3_5_text", "qwen3_5"};
  row.keys = delta_keys(false);
  row.tensors = delta_tensors({{.theirs = "blk.*.ssm_beta.weight",
                                .mixer = kDeltaNet,
                                .rows = {"layers.*.mixer.ba_proj.weight:beta"}},
                               {.theirs = "blk.*.ssm_alpha.weight",
                                .mixer = kDeltaNet,
                                .rows = {"layers.*.mixer.ba_proj.weight:decay"}}});
  row.parts.push_back(kSections);
  row.config = GgufJson::object();
  for (const char* rows : {"in_proj.weight:v", "in_proj.weight:z", "ba_proj.weight:beta",
                           "ba_proj.weight:decay", "conv1d.weight:v", "A_log", "dt_bias"}) {
    static std::deque<std::string> names;  // orders hold views
    row.orders.push_back({names.emplace_back(std::string("layers.*.mixer.") + rows),
                          GgufOrder::kTiled, "heads", "k_heads"});
  }
  row.orders.push_back({"layers.*.mixer.out_proj.weight", GgufOrder::kTiledIn, "heads", "k_heads"});
  return row;
}

GgufArchitecture qwen35moe() {
  GgufArchitecture row = qwen35();
  row.name = "qwen35moe";
  row.families = {"qwen3_5_moe_text", "qwen3_5_moe"};
  row.keys = delta_keys(true);
  row.config = {{"norm_topk_prob", true}};
  return row;
}

// --- MiniMax-01 and M1: lightning attention, residuals from the normed stream by one factor.
constexpr const char* kBranches[] = {"layernorm_full_attention", "layernorm_linear_attention",
                                     "layernorm_mlp"};

void read_minimax(Keys& keys, GgufJson& config) {
  const auto factor = keys.positive("residual_scale");
  expect(factor.has_value(), "{}: the key '{}' is missing", keys.path(),
         keys.named("residual_scale"));
  for (const char* branch : kBranches) {
    config[std::string(branch) + "_alpha"] = *factor;
    config[std::string(branch) + "_beta"] = 1.0;
  }
  for (const bool full : read_full_layers(keys, config, 8)) {
    config["attn_type_list"].push_back(full ? 1 : 0);
  }
}
void write_minimax(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  head.number("residual_scale", config.at("layernorm_mlp_alpha").get<double>());
  write_full_layers(spec, head);
}
constexpr GgufPart kMiniMax{read_minimax, write_minimax};

GgufArchitecture minimax_01() {
  constexpr const char* kLightning = "lightning";
  return {.name = "minimax-01",
          .families = {"minimax_m1", "minimax"},
          .keys = decoder_keys({{"expert_count", "num_local_experts", kSize, true},
                                {"expert_used_count", "num_experts_per_tok", kSize, true}}),
          .tensors = decoder_tensors(
              {{"layers.*.mixer.qkv_proj.weight", "blk.*.attn_qkv.weight", kLightning},
               {"layers.*.mixer.gate_proj.weight", "blk.*.attn_gate.weight", kLightning},
               {"layers.*.mixer.norm.weight", "blk.*.attn_norm_2.weight", kLightning},
               {"layers.*.mixer.out_proj.weight", "blk.*.attn_output.weight", kLightning}}),
          .rope = {.dims = "rotary_dim"},
          .parts = {kHeadDim, kMiniMax},
          // Without, rotary_dim is passed over.
          .config = {{"auto_map", {{"AutoModelForCausalLM", "MiniMaxM1ForCausalLM"}}}}};
}

}  // namespace

std::vector<GgufArchitecture> gguf_linear_architectures() {
  return {qwen3next(), qwen35(), qwen35moe(), minimax_01()};
}

}  // namespace cambium
