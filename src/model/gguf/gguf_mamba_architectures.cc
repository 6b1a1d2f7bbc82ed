// Architectures of state spaces or short convolutions beside attention.
#include <algorithm>

#include "base/error.h"
#include "model/gguf/gguf_parts.h"

namespace cambium {
namespace {

using namespace gguf;

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
  std::vector<Rule> keys = granite_keys();
  const std::vector<Rule> mamba =
      mamba2_keys("mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv");
  keys.insert(keys.end(), mamba.begin(), mamba.end());
  keys.push_back({.key = "feed_forward_length", .config = "intermediate_size", .required = true});
  return {.name = "granitehybrid",
          .families = {"granite_hybrid"},
          .keys = attention_keys(std::move(keys)),
          .tensors = mamba2_tensors("mixer"),
          .parts = {kMambaLayers, kHeadDim, kOneGroup, kGranite},
          .orders = pairs(),
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
  row.parts = {kMambaLayers, kHeadDim, kOneGroup, kBamba};
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
          .parts = {kConvLayers, kHeadDim},
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
  row.constants = gating(2);
  row.holds = with_experts;
  return row;
}

}  // namespace

std::vector<GgufArchitecture> gguf_mamba_architectures() {
  return {granite_hybrid(), bamba(), falcon_h1(), nemotron_h(),
          nemotron_h_moe(), jamba(), lfm2(),      lfm2moe()};
}

}  // namespace cambium
