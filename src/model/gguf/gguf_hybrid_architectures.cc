// Architectures of several kinds of mixers, and those of latent attention.
#include <algorithm>

#include "base/error.h"
#include "model/gguf/gguf_parts.h"

namespace cambium {
namespace {

using gguf::attention_keys;
using gguf::decoder_keys;
using gguf::decoder_tensors;
using gguf::kHeadDim;
using gguf::unit_of;
using Keys = GgufArchitectureKeys;
using Rule = GgufKeyRule;
using Rules = std::vector<TensorRule>;
constexpr Rule::Kind kSize = Rule::kSize;
constexpr Rule::Kind kNumber = Rule::kNumber;
constexpr Rule::Kind kFlag = Rule::kFlag;

int64_t whole(const GgufJson& config, const char* key) {
  return config.at(key).get<int64_t>();
}

bool has_unit(const ModelSpec& spec, std::string_view kind) {
  return std::any_of(spec.layers.begin(), spec.layers.end(), [&](const LayerSpec& layer) {
    return std::any_of(layer.branches.begin(), layer.branches.end(), [&](const BranchSpec& branch) {
      return std::any_of(branch.units.begin(), branch.units.end(),
                         [&](const UnitSpec& unit) { return unit.kind == kind; });
    });
  });
}
bool with_experts(const ModelSpec& spec) {
  return has_unit(spec, "experts");
}
bool without_experts(const ModelSpec& spec) {
  return !with_experts(spec);
}

bool in_file(Keys& keys, int64_t layer, const char* tensor) {
  return keys.gguf().find(fmt::format("blk.{}.{}", layer, tensor)) != nullptr;
}

/// A number a layer that must be there.
std::vector<int64_t> by_layer(Keys& keys, const char* key, const GgufJson& config) {
  const auto values = keys.by_layer(key, whole(config, "num_hidden_layers"));
  expect(values.has_value(), "{}: the key '{}' is missing", keys.path(), keys.named(key));
  return *values;
}

void write_kv_heads(const ModelSpec& spec, GgufHead& head, std::string_view kind, int64_t heads) {
  std::vector<int64_t> values;
  for (const LayerSpec& layer : spec.layers) {
    values.push_back(layer.mixes_by(kind) ? heads : 0);
  }
  head.sizes("attention.head_count_kv", values);
}

// --- Mamba-2.
Rules mamba2_tensors(const std::string& ours, Rules more = {}) {
  static std::deque<std::string> names;  // rules hold views
  const auto name = [&](const char* end) {
    return names.emplace_back("layers.*." + ours + "." + end).c_str();
  };
  const Rules own = {{name("in_proj.weight"), "blk.*.ssm_in.weight", "mamba2"},
                     {name("conv1d.*"), "blk.*.ssm_conv1d.*", "mamba2"},
                     {name("dt_bias"), "blk.*.ssm_dt.bias", "mamba2"},
                     {name("A_log"), "blk.*.ssm_a", "mamba2"},
                     {name("D"), "blk.*.ssm_d", "mamba2"},
                     {name("norm.weight"), "blk.*.ssm_norm.weight", "mamba2"},
                     {name("out_proj.weight"), "blk.*.ssm_out.weight", "mamba2"}};
  more.insert(more.begin(), own.begin(), own.end());
  return decoder_tensors(std::move(more));
}

const std::vector<GgufShape> kMamba2Shapes = {{"blk.*.ssm_conv1d.weight", GgufShape::kSqueezed},
                                              {"blk.*.ssm_a", GgufShape::kColumn},
                                              {"blk.*.ssm_d", GgufShape::kColumn},
                                              {"blk.*.ssm_norm.weight", GgufShape::kByGroup}};
const std::vector<GgufValues> kDecay = {{"blk.*.ssm_a", GgufValues::kMinusExp}};

std::vector<Rule> mamba2_keys(const char* heads, const char* state, const char* groups,
                              const char* conv) {
  return {{"ssm.time_step_rank", heads, kSize, true},
          {"ssm.state_size", state, kSize, true},
          {"ssm.group_count", groups, kSize, true},
          {"ssm.conv_kernel", conv, kSize, true}};
}

/// Channels of a head, of which the file says the sum.
void read_inner(Keys& keys, GgufJson& config, const char* heads, const char* dim) {
  const int64_t inner = keys.need("ssm.inner_size");
  const int64_t count = whole(config, heads);
  expect(inner % count == 0, "{}: '{}' is {}, which {} heads do not divide", keys.path(),
         keys.named("ssm.inner_size"), inner, count);
  config[dim] = inner / count;
}
void read_mamba_inner(Keys& keys, GgufJson& config) {
  read_inner(keys, config, "mamba_n_heads", "mamba_d_head");
}
void write_mamba_inner(const ModelSpec& spec, const GgufJson& /*config*/, GgufHead& head) {
  const Options& o = unit_of(spec, "mamba2").options;
  head.size("ssm.inner_size", o.integer("mamba2", "heads") * o.integer("mamba2", "head_dim"));
}
constexpr GgufPart kMambaInner{read_mamba_inner, write_mamba_inner};

/// llama.cpp norms each group of B and C, these families all channels.
void write_one_group(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_mamba_inner(spec, config, head);
  const Options& o = unit_of(spec, "mamba2").options;
  expect(o.integer("mamba2", "b_heads") == 1 &&
             2 * spec.width == o.integer("mamba2", "heads") * o.integer("mamba2", "head_dim"),
         "a {} model cannot be written as GGUF: llama.cpp runs those with one group of B and C and "
         "twice the width inside, and this one has {} groups and {} channels for {}",
         spec.family, o.integer("mamba2", "b_heads"),
         o.integer("mamba2", "heads") * o.integer("mamba2", "head_dim"), spec.width);
}
constexpr GgufPart kOneGroup{read_mamba_inner, write_one_group};

/// Granite's feed-forward: a dense one, or experts beside a shared one.
void read_granite(Keys& keys, GgufJson& config) {
  const int64_t experts = keys.size("expert_count").value_or(0);
  const int64_t top = keys.size("expert_used_count").value_or(0);
  const int64_t shared = keys.size("expert_shared_feed_forward_length").value_or(0);
  config["num_local_experts"] = experts;
  config["num_experts_per_tok"] = top;
  config["shared_intermediate_size"] = experts > 0 ? shared : whole(config, "intermediate_size");
  // Whether attention turns.
  config["position_embedding_type"] =
      keys.flag("rope.scaling.finetuned").value_or(true) ? "rope" : "nope";
}
void write_granite(const ModelSpec& /*spec*/, const GgufJson& config, GgufHead& head) {
  if (whole(config, "num_local_experts") > 0) {
    head.size("expert_count", whole(config, "num_local_experts"));
    head.size("expert_used_count", whole(config, "num_experts_per_tok"));
    head.size("expert_shared_feed_forward_length", whole(config, "shared_intermediate_size"));
  }
  head.flag("rope.scaling.finetuned", config.at("position_embedding_type") == "rope");
}
constexpr GgufPart kGranite{read_granite, write_granite};

bool has_granite_factors(Keys& keys) {
  return keys.has("logit_scale");
}

GgufArchitecture granite_hybrid() {
  std::vector<Rule> keys = gguf::granite_keys();
  const std::vector<Rule> mamba =
      mamba2_keys("mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv");
  keys.insert(keys.end(), mamba.begin(), mamba.end());
  keys.push_back({.key = "feed_forward_length", .config = "intermediate_size", .required = true});
  return {.name = "granitehybrid",
          .families = {"granite_hybrid"},
          .keys = attention_keys(std::move(keys)),
          .tensors = mamba2_tensors("mixer"),
          .parts = {gguf::kMambaLayers, kHeadDim, kOneGroup, kGranite},
          .orders = gguf::pairs(),
          .shapes = kMamba2Shapes,
          .values = kDecay,
          .fits = has_granite_factors};
}

void read_bamba(Keys& keys, GgufJson& config) {
  config["attn_layer_indices"] = GgufJson::array();
  for (size_t i = 0; i < config.at("layer_types").size(); ++i) {
    if (config["layer_types"][i] == "attention") {
      config["attn_layer_indices"].push_back(i);
    }
  }
  expect(keys.flag("rope.scaling.finetuned").value_or(true),
         "{}: '{}' is false, which no model without factors has", keys.path(),
         keys.named("rope.scaling.finetuned"));
}
void write_bamba(const ModelSpec& /*spec*/, const GgufJson& /*config*/, GgufHead& head) {
  head.flag("rope.scaling.finetuned", true);
}
constexpr GgufPart kBamba{read_bamba, write_bamba};

GgufArchitecture bamba() {
  GgufArchitecture row = granite_hybrid();
  row.families = {"bamba"};
  row.keys.erase(std::remove_if(row.keys.begin(), row.keys.end(),
                                [](const Rule& rule) {
                                  return rule.kind == kNumber && rule.config != "rms_norm_eps";
                                }),
                 row.keys.end());
  row.parts = {gguf::kMambaLayers, kHeadDim, kOneGroup, kBamba};
  row.fits = nullptr;
  return row;
}

// --- Falcon-H1, whose factors llama.cpp has in the weights.
void read_falcon(Keys& keys, GgufJson& config) {
  config["mamba_rms_norm"] = in_file(keys, 0, "ssm_norm.weight");
}
void write_falcon(const ModelSpec& /*spec*/, const GgufJson& /*config*/, GgufHead& /*head*/) {}
constexpr GgufPart kFalcon{read_falcon, write_falcon};

GgufFactors fold_falcon(ModelSpec& spec) {
  GgufFactors factors;
  factors["embed.weight"] = spec.embedding_scale;
  factors["head.weight"] = spec.logit_scale;
  expect(!spec.tied_head || spec.embedding_scale == spec.logit_scale,
         "a {} model whose head is its embedding, with other factors, cannot be written as GGUF",
         spec.family);
  spec.embedding_scale = spec.logit_scale = 1.0F;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const auto factor = [&](const char* name, double by) {
      factors[fmt::format("layers.{}.{}", i, name)] = static_cast<float>(by);
    };
    for (BranchSpec& branch : spec.layers[i].branches) {
      for (UnitSpec& unit : branch.units) {
        Options& o = unit.options;
        if (unit.kind == "mamba2") {
          const double in = o.real("mamba2", "in_scale", 1.0);
          const std::vector<double> rows = o.reals("mamba2", "row_scales");
          constexpr const char* kBlocks[] = {"z", "x", "B", "C", "dt"};
          for (size_t block = 0; block < std::size(kBlocks); ++block) {
            factor(fmt::format("mamba.in_proj.weight:{}", kBlocks[block]).c_str(),
                   in * (rows.empty() ? 1.0 : rows.at(block)));
          }
          factor("mamba.out_proj.weight", unit.out);
          o.set("in_scale", 1.0);
          o.set("row_scales", std::vector<double>(5, 1.0));
        } else if (unit.kind == "attention") {
          factor("self_attn.k_proj.weight", o.real("attention", "key_scale", 1.0));
          factor("self_attn.o_proj.weight", unit.out);
          o.set("key_scale", 1.0);
        } else {
          factor("feed_forward.gate.weight", o.real("swiglu", "gate_scale", 1.0));
          factor("feed_forward.down.weight", unit.out);
          o.set("gate_scale", 1.0);
        }
        unit.out = 1.0F;
      }
    }
  }
  return factors;
}

GgufArchitecture falcon_h1() {
  return {
      .name = "falcon-h1",
      .families = {"falcon_h1"},
      .keys = decoder_keys(
          mamba2_keys("mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv")),
      .tensors = mamba2_tensors("mamba", {{"layers.*.self_attn.o_proj.*", "blk.*.attn_output.*"},
                                          {"layers.*.self_attn.q_proj.*", "blk.*.attn_q.*"},
                                          {"layers.*.self_attn.k_proj.*", "blk.*.attn_k.*"},
                                          {"layers.*.self_attn.v_proj.*", "blk.*.attn_v.*"},
                                          {"layers.*.post_norm.weight", "blk.*.ffn_norm"}}),
      .parts = {kHeadDim, kMambaInner, kFalcon},
      .shapes = kMamba2Shapes,
      .values = kDecay,
      .fold = fold_falcon};
}

// --- Nemotron-H: one unit a layer.
void read_nemotron(Keys& keys, GgufJson& config) {
  read_inner(keys, config, "mamba_num_heads", "mamba_head_dim");
  const std::vector<int64_t> heads = by_layer(keys, "attention.head_count_kv", config);
  const std::vector<int64_t> inner = by_layer(keys, "feed_forward_length", config);
  std::string pattern;
  int64_t dense = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    const bool experts = in_file(keys, static_cast<int64_t>(i), "ffn_gate_inp.weight");
    pattern += heads[i] > 0 ? '*' : experts ? 'E' : inner[i] > 0 ? '-' : 'M';
    if (pattern.back() == '-') {
      expect(dense == 0 || dense == inner[i],
             "{}: '{}' has feed-forwards of different widths, which cannot be imported",
             keys.path(), keys.named("feed_forward_length"));
      dense = inner[i];
    }
  }
  config["hybrid_override_pattern"] = pattern;
  config["num_key_value_heads"] = *std::max_element(heads.begin(), heads.end());
  if (dense > 0) {
    config["intermediate_size"] = dense;
  }
  const auto eps = keys.number("attention.layer_norm_epsilon");
  expect(eps.has_value(), "{}: the key '{}' is missing", keys.path(),
         keys.named("attention.layer_norm_epsilon"));
  config["layer_norm_epsilon"] = config.value("rms_norm_eps", *eps);
  config["rms_norm_eps"] = config["layer_norm_epsilon"];
}
void write_nemotron(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_mamba_inner(spec, config, head);
  write_kv_heads(spec, head, "attention", whole(config, "num_key_value_heads"));
  std::vector<int64_t> inner;
  for (const LayerSpec& layer : spec.layers) {
    inner.push_back(layer.feed_forward() == nullptr
                        ? 0
                        : layer.feed_forward()->options.integer("feed-forward", "inner"));
  }
  head.sizes("feed_forward_length", inner);
  head.number("attention.layer_norm_epsilon", config.at("layer_norm_epsilon").get<double>());
}
constexpr GgufPart kNemotron{read_nemotron, write_nemotron};

Rules nemotron_tensors() {
  return mamba2_tensors(
      "mixer", {{"layers.*.feed_forward.latent_in.weight", "blk.*.ffn_latent_down.weight"},
                {"layers.*.feed_forward.latent_out.weight", "blk.*.ffn_latent_up.weight"}});
}

GgufArchitecture nemotron_h() {
  std::vector<Rule> keys =
      attention_keys(mamba2_keys("mamba_num_heads", "ssm_state_size", "n_groups", "conv_kernel"));
  for (Rule& rule : keys) {
    rule.required = rule.required && rule.config != "rms_norm_eps";
  }
  return {.name = "nemotron_h",
          .families = {"nemotron_h"},
          .keys = keys,
          .tensors = nemotron_tensors(),
          .rope = {.turns = false},
          .parts = {kHeadDim, kNemotron},
          .shapes = kMamba2Shapes,
          .values = kDecay,
          .holds = without_experts};
}

GgufArchitecture nemotron_h_moe() {
  GgufArchitecture row = nemotron_h();
  row.name = "nemotron_h_moe";
  const std::vector<Rule> experts = {
      {"expert_count", "n_routed_experts", kSize, true},
      {"expert_used_count", "num_experts_per_tok", kSize, true},
      {"expert_feed_forward_length", "moe_intermediate_size", kSize, true},
      {"expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"},
      {"expert_shared_count", "n_shared_experts"},
      {"expert_group_count", "n_group"},
      {"expert_group_used_count", "topk_group"},
      {"expert_weights_norm", "norm_topk_prob", kFlag},
      {"expert_weights_scale", "routed_scaling_factor", kNumber},
      {"moe_latent_size", "moe_latent_size"}};
  row.keys.insert(row.keys.end(), experts.begin(), experts.end());
  row.holds = with_experts;
  return row;
}

// --- Jamba.
GgufJson every(const std::vector<bool>& marked) {
  const auto first = std::find(marked.begin(), marked.end(), true);
  const auto second = first == marked.end() ? first : std::find(first + 1, marked.end(), true);
  const auto count = static_cast<int64_t>(marked.size());
  return {{"offset", first - marked.begin()},
          {"period", second == marked.end() ? count + 1 : second - first}};
}

void read_jamba(Keys& keys, GgufJson& config) {
  const std::vector<int64_t> heads = by_layer(keys, "attention.head_count_kv", config);
  std::vector<bool> attends;
  std::vector<bool> sparse;
  for (size_t i = 0; i < heads.size(); ++i) {
    attends.push_back(heads[i] > 0);
    sparse.push_back(in_file(keys, static_cast<int64_t>(i), "ffn_gate_inp.weight"));
  }
  const GgufJson attention = every(attends);
  const GgufJson experts = every(sparse);
  config["num_key_value_heads"] = *std::max_element(heads.begin(), heads.end());
  config["attn_layer_period"] = attention["period"];
  config["attn_layer_offset"] = attention["offset"];
  config["expert_layer_period"] = experts["period"];
  config["expert_layer_offset"] = experts["offset"];
  const int64_t inner = keys.need("ssm.inner_size");
  const int64_t width = whole(config, "hidden_size");
  expect(inner % width == 0, "{}: '{}' is {}, which is no multiple of {}", keys.path(),
         keys.named("ssm.inner_size"), inner, width);
  config["mamba_expand"] = inner / width;
}
void write_jamba(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_kv_heads(spec, head, "attention", whole(config, "num_key_value_heads"));
  const int64_t inner = unit_of(spec, "mamba1").options.integer("mamba1", "inner");
  expect(inner == 2 * spec.width,
         "a {} model cannot be written as GGUF: llama.cpp runs those with twice the width inside, "
         "and this one has {} channels for {}",
         spec.family, inner, spec.width);
  head.size("ssm.inner_size", inner);
}
constexpr GgufPart kJamba{read_jamba, write_jamba};

GgufArchitecture jamba() {
  return {.name = "jamba",
          .families = {"jamba"},
          .keys = attention_keys({{"feed_forward_length", "intermediate_size", kSize, true},
                                  {"ssm.state_size", "mamba_d_state", kSize, true},
                                  {"ssm.conv_kernel", "mamba_d_conv", kSize, true},
                                  {"ssm.time_step_rank", "mamba_dt_rank", kSize, true},
                                  {"expert_count", "num_experts", kSize, true},
                                  {"expert_used_count", "num_experts_per_tok", kSize, true}}),
          .tensors = decoder_tensors({{"layers.*.mixer.in_proj.weight", "blk.*.ssm_in.weight"},
                                      {"layers.*.mixer.conv1d.*", "blk.*.ssm_conv1d.*"},
                                      {"layers.*.mixer.x_proj.weight", "blk.*.ssm_x.weight"},
                                      {"layers.*.mixer.dt_norm.weight", "blk.*.ssm_dt_norm.weight"},
                                      {"layers.*.mixer.b_norm.weight", "blk.*.ssm_b_norm.weight"},
                                      {"layers.*.mixer.c_norm.weight", "blk.*.ssm_c_norm.weight"},
                                      {"layers.*.mixer.dt_proj.*", "blk.*.ssm_dt.*"},
                                      {"layers.*.mixer.A_log", "blk.*.ssm_a"},
                                      {"layers.*.mixer.D", "blk.*.ssm_d"},
                                      {"layers.*.mixer.out_proj.weight", "blk.*.ssm_out.weight"}}),
          .rope = {.turns = false},
          .parts = {kHeadDim, kJamba},
          .shapes = {{"blk.*.ssm_conv1d.weight", GgufShape::kSqueezed}},
          .values = kDecay,
          .holds = with_experts};
}

// --- LFM2.
std::vector<Rule> lfm2_keys(std::vector<Rule> more) {
  more.push_back({"feed_forward_length", "intermediate_size", kSize, true});
  more.push_back({"shortconv.l_cache", "conv_L_cache", kSize, true});
  std::vector<Rule> keys = attention_keys(std::move(more));
  for (Rule& rule : keys) {
    rule.config = rule.config == "rms_norm_eps" ? "norm_eps" : rule.config;
  }
  return keys;
}

GgufArchitecture lfm2() {
  return {.name = "lfm2",
          .families = {"lfm2"},
          .keys = lfm2_keys({}),
          .tensors = decoder_tensors({{"norm.weight", "token_embd_norm.weight"},
                                      {.ours = "layers.*.mixer.conv.weight",
                                       .theirs = "blk.*.shortconv.conv.weight",
                                       .mixer = "short_conv"},
                                      {.ours = "layers.*.mixer.in_proj.weight",
                                       .theirs = "blk.*.shortconv.in_proj.weight",
                                       .mixer = "short_conv"},
                                      {.ours = "layers.*.mixer.out_proj.weight",
                                       .theirs = "blk.*.shortconv.out_proj.weight",
                                       .mixer = "short_conv"}}),
          .parts = {gguf::kConvLayers, kHeadDim},
          .config = {{"conv_bias", false}, {"block_auto_adjust_ff_dim", false}},
          .shapes = {{"blk.*.shortconv.conv.weight", GgufShape::kSqueezed}},
          .holds = without_experts};
}

GgufArchitecture lfm2moe() {
  GgufArchitecture row = lfm2();
  row.name = "lfm2moe";
  row.keys = lfm2_keys({{"leading_dense_block_count", "num_dense_layers"},
                        {"expert_count", "num_experts", kSize, true},
                        {"expert_used_count", "num_experts_per_tok", kSize, true},
                        {"expert_feed_forward_length", "moe_intermediate_size", kSize, true}});
  row.config.update(
      {{"model_type", "lfm2_moe"}, {"use_expert_bias", true}, {"norm_topk_prob", true}});
  row.constants = gguf::gating(2);
  row.holds = with_experts;
  return row;
}

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
          .parts = {kHeadDim, kMiniMax}};
}

// --- Latent attention. llama.cpp runs it as attention with one key head, of the latent's length.
constexpr const char* kLatent = "latent_attention";

void read_latent_sizes(Keys& keys, GgufJson& config) {
  const int64_t rope = keys.need("rope.dimension_count");
  const int64_t key = keys.need("attention.key_length_mla");
  expect(rope < key, "{}: '{}' is {}, expected less than '{}', {}", keys.path(),
         keys.named("rope.dimension_count"), rope, keys.named("attention.key_length_mla"), key);
  config["qk_rope_head_dim"] = rope;
  config["qk_nope_head_dim"] = key - rope;
  config["v_head_dim"] = keys.need("attention.value_length_mla");
  // These follow from what was read.
  for (const char* name : {"attention.key_length", "attention.value_length"}) {
    keys.size(name);
  }
}
void write_latent_sizes(const GgufJson& config, GgufHead& head) {
  const int64_t rope = whole(config, "qk_rope_head_dim");
  const int64_t rank = whole(config, "kv_lora_rank");
  head.size("attention.key_length_mla", whole(config, "qk_nope_head_dim") + rope);
  head.size("attention.value_length_mla", whole(config, "v_head_dim"));
  head.size("attention.key_length", rank + rope);
  head.size("attention.value_length", rank);
}

void read_latent(Keys& keys, GgufJson& config) {
  read_latent_sizes(keys, config);
  config["num_key_value_heads"] = config.at("num_attention_heads");
  keys.size("attention.head_count_kv");  // 1
}
void write_latent(const ModelSpec& /*spec*/, const GgufJson& config, GgufHead& head) {
  write_latent_sizes(config, head);
  head.size("attention.head_count_kv", 1);
}
constexpr GgufPart kLatentSizes{read_latent, write_latent};

/// The keys of DeepSeek's experts; their number, those of a token and the shared ones by the
/// family's names.
std::vector<Rule> latent_keys(const char* experts, const char* top, const char* shared,
                              std::vector<Rule> more) {
  more.insert(more.begin(), {{"feed_forward_length", "intermediate_size", kSize, true},
                             {"attention.q_lora_rank", "q_lora_rank"},
                             {"attention.kv_lora_rank", "kv_lora_rank", kSize, true},
                             {"leading_dense_block_count", "first_k_dense_replace"},
                             {"expert_count", experts, kSize, true},
                             {"expert_used_count", top, kSize, true},
                             {"expert_shared_count", shared},
                             {"expert_feed_forward_length", "moe_intermediate_size", kSize, true},
                             {"expert_weights_scale", "routed_scaling_factor", kNumber}});
  return attention_keys(std::move(more));
}

Rules latent_tensors(Rules more = {}) {
  more.insert(more.end(), {{"layers.*.mixer.q_a_proj.weight", "blk.*.attn_q_a.weight"},
                           {"layers.*.mixer.q_a_norm.weight", "blk.*.attn_q_a_norm.weight"},
                           {"layers.*.mixer.q_b_proj.weight", "blk.*.attn_q_b.weight"},
                           {"layers.*.mixer.kv_a_proj.weight", "blk.*.attn_kv_a_mqa.weight"},
                           {"layers.*.mixer.kv_a_norm.weight", "blk.*.attn_kv_a_norm.weight"},
                           {"layers.*.mixer.kv_b_proj.weight", "blk.*.attn_kv_b.weight"}});
  return decoder_tensors(std::move(more));
}

const std::vector<GgufOrder> kSplitLatent = {
    {"layers.*.mixer.kv_b_proj.weight", GgufOrder::kLatent, "heads"}};

GgufArchitecture deepseek2() {
  return {.name = "deepseek2",
          .families = {"deepseek_v3", "kimi_k2"},
          .keys = latent_keys("n_routed_experts", "num_experts_per_tok", "n_shared_experts",
                              {{"expert_group_count", "n_group"},
                               {"expert_group_used_count", "topk_group"},
                               {"expert_weights_norm", "norm_topk_prob", kFlag}}),
          .tensors = latent_tensors(),
          .rope = {.dims = "qk_rope_head_dim", .scales_scores = true},
          .parts = {kLatentSizes},
          .config = {{"rope_interleave", true}},
          .constants = gguf::gating(2),
          .orders = kSplitLatent};
}

GgufArchitecture deepseek32() {
  GgufArchitecture row = deepseek2();
  row.name = "deepseek32";
  row.families = {"deepseek_v32"};
  row.keys.insert(row.keys.end(), {{"attention.indexer.head_count", "index_n_heads", kSize, true},
                                   {"attention.indexer.key_length", "index_head_dim", kSize, true},
                                   {"attention.indexer.top_k", "index_topk", kSize, true}});
  row.tensors =
      latent_tensors({{"layers.*.mixer.indexer.q_proj.weight", "blk.*.indexer.attn_q_b.weight"},
                      {"layers.*.mixer.indexer.k_proj.weight", "blk.*.indexer.attn_k.weight"},
                      {"layers.*.mixer.indexer.k_norm.*", "blk.*.indexer.k_norm.*"},
                      {"layers.*.mixer.indexer.weights_proj.weight", "blk.*.indexer.proj.weight"}});
  return row;
}

// --- Kimi Delta Attention beside latent attention.
constexpr const char* kKda = "kimi_delta";

std::vector<bool> read_kda_layers(Keys& keys, GgufJson& config) {
  read_latent_sizes(keys, config);
  config["num_key_value_heads"] = config.at("num_attention_heads");
  std::vector<bool> full;
  for (const int64_t heads : by_layer(keys, "attention.head_count_kv", config)) {
    full.push_back(heads > 0);
  }
  return full;
}

void read_kimi(Keys& keys, GgufJson& config) {
  const std::vector<bool> full = read_kda_layers(keys, config);
  GgufJson inside{{"num_heads", config.at("num_attention_heads")},
                  {"head_dim", keys.need("kda.head_dim")},
                  {"short_conv_kernel_size", keys.need("ssm.conv_kernel")},
                  {"full_attn_layers", GgufJson::array()},
                  {"kda_layers", GgufJson::array()}};
  for (size_t i = 0; i < full.size(); ++i) {
    inside[full[i] ? "full_attn_layers" : "kda_layers"].push_back(i + 1);
  }
  config["linear_attn_config"] = inside;
}
void write_kda(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_latent_sizes(config, head);
  write_kv_heads(spec, head, kLatent, 1);
  const Options& o = unit_of(spec, kKda).options;
  head.size("kda.head_dim", o.integer(kKda, "head_dim"));
  head.size("ssm.conv_kernel", o.integer(kKda, "conv", 4));
}
constexpr GgufPart kKimi{read_kimi, write_kda};

Rules kda_tensors(Rules more) {
  for (const char* part : {"q", "k", "v"}) {
    static std::deque<std::string> names;  // rules hold views
    const auto name = [&](std::string text) -> const char* {
      return names.emplace_back(std::move(text)).c_str();
    };
    more.push_back({name(fmt::format("layers.*.mixer.in_proj.weight:{}", part)),
                    fmt::format("blk.*.attn_{}.weight", part), kKda});
    more.push_back({name(fmt::format("layers.*.mixer.conv1d.weight:{}", part)),
                    fmt::format("blk.*.ssm_conv1d_{}.weight", part), kKda});
  }
  more.insert(more.end(), {{"layers.*.mixer.A_log", "blk.*.ssm_a", kKda},
                           {"layers.*.mixer.dt_bias", "blk.*.ssm_dt.bias", kKda},
                           {"layers.*.mixer.beta_proj.weight", "blk.*.ssm_beta.weight", kKda},
                           {"layers.*.mixer.norm.weight", "blk.*.ssm_norm.weight", kKda},
                           {"layers.*.mixer.out_proj.weight", "blk.*.attn_output.weight", kKda}});
  return latent_tensors(std::move(more));
}

GgufArchitecture kimi_linear() {
  std::vector<Rule> keys = latent_keys(
      "num_experts", "num_experts_per_token", "num_shared_experts",
      {{"expert_group_count", "num_expert_group"}, {"expert_group_used_count", "topk_group"}});
  for (Rule& rule : keys) {
    rule.config = rule.config == "max_position_embeddings" ? "model_max_length" : rule.config;
  }
  return {.name = "kimi-linear",
          .families = {"kimi_linear"},
          .keys = keys,
          .tensors = kda_tensors({{"layers.*.mixer.decay_a_proj.weight", "blk.*.ssm_f_a.weight"},
                                  {"layers.*.mixer.decay_b_proj.weight", "blk.*.ssm_f_b.weight"},
                                  {"layers.*.mixer.gate_a_proj.weight", "blk.*.ssm_g_a.weight"},
                                  {"layers.*.mixer.gate_b_proj.weight", "blk.*.ssm_g_b.weight"}}),
          .rope = {.dims = "qk_rope_head_dim"},
          .parts = {kKimi},
          .config = {{"mla_use_nope", true},
                     {"moe_renormalize", true},
                     {"rope_interleave", true},
                     {"moe_layer_freq", 1}},
          .constants = gguf::gating(2),
          .orders = kSplitLatent,
          .shapes = {{"blk.*.ssm_a", GgufShape::kColumn}},
          .values = kDecay};
}

void read_bailing(Keys& keys, GgufJson& config) {
  const std::vector<bool> full = read_kda_layers(keys, config);
  const auto first = std::find(full.begin(), full.end(), true) - full.begin();
  const int64_t group = first + 1;
  for (size_t i = 0; i < full.size(); ++i) {
    expect(full[i] == ((static_cast<int64_t>(i) + 1) % group == 0),
           "{}: '{}': expected latent attention in each layer {} and no other, layer {} has it not "
           "so",
           keys.path(), keys.named("attention.head_count_kv"), group, i);
  }
  config["layer_group_size"] = group;
  config["head_dim"] = keys.need("kda.head_dim");
  config["short_conv_kernel_size"] = keys.need("ssm.conv_kernel");
  expect(keys.flag("kda.safe_gate").value_or(true), "{}: '{}' is false, which cannot be imported",
         keys.path(), keys.named("kda.safe_gate"));
  config["kda_safe_gate"] = true;
}
void write_bailing(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_kda(spec, config, head);
  head.flag("kda.safe_gate", config.at("kda_safe_gate").get<bool>());
}
constexpr GgufPart kBailing{read_bailing, write_bailing};

GgufArchitecture bailingmoe3() {
  return {
      .name = "bailingmoe3",
      .families = {"bailing_hybrid"},
      .keys =
          latent_keys("num_experts", "num_experts_per_tok", "num_shared_experts",
                      {{"expert_group_count", "n_group"},
                       {"expert_group_used_count", "topk_group"},
                       {"expert_weights_norm", "norm_topk_prob", kFlag},
                       {"expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"},
                       {"kda.gate_lower_bound", "kda_lower_bound", kNumber, true}}),
      .tensors = kda_tensors({{"layers.*.mixer.decay_proj.weight", "blk.*.ssm_f_a.weight", kKda},
                              {"layers.*.mixer.gate_proj.weight", "blk.*.ssm_g_a.weight", kKda},
                              {"layers.*.mixer.gate_proj.weight", "blk.*.attn_gate.weight"}}),
      .rope = {.dims = "qk_rope_head_dim"},
      .parts = {kBailing},
      .config = {{"rope_interleave", true}, {"no_kda_lora", true}},
      .constants = gguf::gating(2),
      .orders = kSplitLatent,
      .shapes = {{"blk.*.ssm_a", GgufShape::kColumn}},
      .values = {{"blk.*.ssm_a", GgufValues::kExp}}};
}

}  // namespace

std::vector<GgufArchitecture> gguf_hybrid_architectures() {
  return {granite_hybrid(), bamba(),      falcon_h1(),   nemotron_h(),
          nemotron_h_moe(), jamba(),      lfm2(),        lfm2moe(),
          qwen3next(),      qwen35(),     qwen35moe(),   minimax_01(),
          deepseek2(),      deepseek32(), kimi_linear(), bailingmoe3()};
}

}  // namespace cambium
