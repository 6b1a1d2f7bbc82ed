// Apriel 2 (Super Apriel, arXiv 2604.19877): each layer attention, a window, Mamba, Gated DeltaNet
// or Kimi Delta Attention, or a choice among several of them by name ("stochastic"), of which the
// main one runs. config.json has the words of Fast-LLM, by which such models are trained.
#include <algorithm>
#include <deque>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"
#include "model/supernet.h"

namespace cambium {
namespace {

using config::Json;

const Json& object_in(const Json& json, const char* key, const std::string& where) {
  const auto it = json.find(key);
  expect(it != json.end() && it->is_object(), "{}: expected the object '{}'", where, key);
  return *it;
}

/// Whether a projection has a bias: by itself, or as all of the mixer do.
bool has_bias(const Json& mixer, const char* layer, const std::string& where) {
  const bool all = config::flag_or(mixer, "add_linear_biases", false, where);
  if (!config::has(mixer, layer) || !config::has(mixer[layer], "bias")) {
    return all;
  }
  return config::flag_or(mixer[layer]["bias"], "enabled", all, where);
}

int64_t kernel_of(const Json& mixer, const std::string& where) {
  const Json& conv = object_in(mixer, "convolution_layer", where);
  const std::string act = config::text_or(conv, "activation", "silu", where);
  expect(act == "silu", "{}: expected a convolution with activation silu, got '{}'", where, act);
  return config::integer_or(conv, "kernel_size", 4, 2, 64, where);
}

UnitSpec read_attention(const Json& mixer, ModelSpec& spec, const std::string& where) {
  const int64_t heads = config::integer(mixer, "heads", 1, kMaxHeads, where);
  const int64_t head_dim = config::integer(mixer, "head_size", 1, kMaxHeadDim, where);
  expect(config::flag_or(mixer, "causal", true, where), "{}: expected causal attention", where);
  UnitSpec unit{"attention",
                {{"heads", heads},
                 {"kv_heads", config::integer_or(mixer, "head_groups", heads, 1, kMaxHeads, where)},
                 {"head_dim", head_dim}}};
  if (config::has(mixer, "window_size")) {
    unit.kind = "sliding_window";
    unit.options.set("window", config::integer(mixer, "window_size", 1, kMaxPositions, where));
  }
  const bool bias = has_bias(mixer, "query_layer", where);
  expect(
      has_bias(mixer, "key_layer", where) == bias && has_bias(mixer, "value_layer", where) == bias,
      "{}: expected biases of q, k and v, or of none of them", where);
  if (bias) {
    unit.options.set("qkv_bias", true);
  }
  if (has_bias(mixer, "dense_layer", where)) {
    unit.options.set("out_bias", true);
  }
  const Json& rotary = object_in(mixer, "rotary", where);
  const std::string type = config::text_or(rotary, "type", "default", where);
  expect(type == "mistral_1d" || type == "default",
         "{}: expected rotary of type mistral_1d or default, got '{}'", where, type);
  const RopeConfig rope =
      config::read_rope({{"rope_theta", config::real_or(rotary, "theta", 10000.0, where)}},
                        head_dim, spec.max_positions, where);
  expect(spec.rope.dim == 0 || spec.rope == rope,
         "{}: expected one rotation for all attention of the model", where);
  spec.rope = rope;
  return unit;
}

UnitSpec read_mamba(const Json& mixer, int64_t width, const std::string& where) {
  expect(!config::flag_or(mixer, "add_linear_biases", false, where) &&
             config::flag_or(mixer, "dt_proj_bias", true, where),
         "{}: expected add_linear_biases false and dt_proj_bias true", where);
  const int64_t expand = config::integer_or(mixer, "expand", 2, 1, 64, where);
  const bool automatic = !config::has(mixer, "dt_rank") || mixer["dt_rank"].is_string();
  return {"mamba",
          {{"inner", config::integer_or(mixer, "d_inner", expand * width, 1, kMaxInner, where)},
           {"xb", config::integer_or(mixer, "d_xb", width, 1, kMaxInner, where)},
           {"state", config::integer_or(mixer, "state_size", 16, 1, kMaxHeadDim, where)},
           {"dt_rank",
            automatic ? (width + 15) / 16 : config::integer(mixer, "dt_rank", 1, kMaxInner, where)},
           {"conv", config::integer_or(mixer, "d_conv", 4, 1, 64, where)},
           {"repeat_before_conv", config::flag_or(mixer, "repeat_kv_before_conv", true, where)},
           {"conv_bias", config::flag_or(mixer, "conv_bias", true, where)}}};
}

UnitSpec read_gated_delta_net(const Json& mixer, const std::string& where) {
  const int64_t heads = config::integer_or(mixer, "value_heads", 32, 1, kMaxHeads, where);
  const int64_t keys = config::integer_or(mixer, "key_heads", 8, 1, kMaxHeads, where);
  return {"gated_delta_net",
          {{"heads", heads},
           {"q_heads", keys},
           {"k_heads", keys},
           {"v_heads", heads},
           {"key_dim", config::integer_or(mixer, "key_head_dim", 64, 1, kMaxHeadDim, where)},
           {"value_dim", config::integer_or(mixer, "value_head_dim", 64, 1, kMaxHeadDim, where)},
           {"conv", kernel_of(mixer, where)},
           {"norm_eps", config::real_or(mixer, "norm_eps", 1e-5, where)}}};
}

UnitSpec read_kimi_delta(const Json& mixer, const std::string& where) {
  const Json norm = mixer.value("normalization", Json::object());
  UnitSpec unit{"kimi_delta",
                {{"heads", config::integer_or(mixer, "heads", 32, 1, kMaxHeads, where)},
                 {"head_dim", config::integer_or(mixer, "head_dim", 64, 1, kMaxHeadDim, where)},
                 {"conv", kernel_of(mixer, where)},
                 {"norm_eps", config::real_or(norm, "epsilon", 1e-5, where)}}};
  // Where nothing is said it is not Kimi's own.
  if (const std::string gate = config::text_or(norm, "activation", "silu", where);
      gate != "sigmoid") {
    unit.options.set("out_gate", gate);
  }
  return unit;
}

UnitSpec read_mixer(const Json& mixer, ModelSpec& spec, const std::string& where) {
  const std::string type = config::text_or(mixer, "type", "attention", where);
  if (type == "attention") {
    return read_attention(mixer, spec, where);
  }
  if (type == "mamba") {
    return read_mamba(mixer, spec.width, where);
  }
  if (type == "gdn") {
    return read_gated_delta_net(mixer, where);
  }
  expect(type == "kda", "{}: expected a mixer attention, mamba, gdn, kda or stochastic, got '{}'",
         where, type);
  return read_kimi_delta(mixer, where);
}

/// The mixers of a choice, in the order of the file, and the main one.
BranchSpec read_choice(const Json& mixer, ModelSpec& spec, const std::string& where) {
  const Json& mixers = object_in(mixer, "mixers", where);
  expect(!mixers.empty(), "{}: expected at least one of 'mixers'", where);
  const std::string main =
      config::text_or(mixer, "main_mixer_name", mixers.begin().key().c_str(), where);
  BranchSpec branch{.norm = spec.norm, .units = {}};
  for (const auto& [name, each] : mixers.items()) {
    expect(each.is_object() && name.find('.') == std::string::npos,
           "{}: expected mixers to be objects by names without dots, got '{}'", where, name);
    branch.active = name == main ? static_cast<int>(branch.units.size()) : branch.active;
    branch.units.push_back(read_mixer(each, spec, where + ": " + name));
    branch.units.back().name = mixer_unit_name(name);
  }
  expect(branch.active >= 0, "{}: there is no mixer '{}', the main one", where, main);
  return branch;
}

LayerSpec read_block(const Json& block, ModelSpec& spec, const std::string& where) {
  const Json& mixer = object_in(block, "mixer", where);
  const Json& mlp = object_in(block, "mlp", where);
  const Json norm = block.value("normalization", Json::object());
  expect(config::text_or(norm, "type", "rms_norm", where) == "rms_norm" &&
             config::text_or(mlp, "type", "mlp", where) == "mlp" &&
             config::flag_or(mlp, "gated", false, where) &&
             config::text_or(mlp, "activation", "silu", where) == "silu" &&
             !config::flag_or(mlp, "add_linear_biases", false, where),
         "{}: expected rms_norm and a gated mlp of silu without biases", where);
  const UnitSpec feed_forward{
      "swiglu", {{"inner", config::integer(mlp, "intermediate_size", 1, kMaxInner, where)}}};
  BranchSpec mixes{.norm = spec.norm, .units = {}};
  if (config::text_or(mixer, "type", "attention", where) == "stochastic") {
    mixes = read_choice(mixer, spec, where);
  } else {
    mixes.units = {read_mixer(mixer, spec, where)};
  }
  return {{mixes, {.norm = spec.norm, .units = {feed_forward}}}};
}

/// The layers of `decoder`; rotations of their attention become the model's.
std::vector<LayerSpec> read_layers(const Json& config, ModelSpec& spec, const std::string& where) {
  const Json& decoder = object_in(config, "decoder", where);
  const int64_t layers = config::integer(decoder, "num_blocks", 1, kMaxLayers, where);
  const std::string type = config::text_or(decoder, "type", "fixed", where);
  if (type == "fixed") {
    const LayerSpec layer =
        read_block(object_in(decoder, "block", where), spec, where + ": decoder.block");
    return std::vector<LayerSpec>(static_cast<size_t>(layers), layer);
  }
  expect(type == "pattern", "{}: expected a decoder of type fixed or pattern, got '{}'", where,
         type);
  const Json& blocks = object_in(decoder, "blocks", where);
  const auto pattern = decoder.find("pattern");
  expect(pattern != decoder.end() && pattern->is_array() && !pattern->empty(),
         "{}: expected the list 'pattern' of names of blocks", where);
  std::vector<LayerSpec> all;
  for (int64_t i = 0; i < layers; ++i) {
    const Json& name = (*pattern)[static_cast<size_t>(i) % pattern->size()];
    expect(name.is_string() && blocks.contains(name.get<std::string>()),
           "{}: expected names of 'blocks' in 'pattern', got {}", where, name.dump());
    const auto block = name.get<std::string>();
    all.push_back(
        read_block(object_in(blocks, block.c_str(), where), spec, where + ": block " + block));
  }
  return all;
}

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  const Json& head = object_in(config, "head", where);
  const Json& norm = object_in(head, "normalization", where);
  // One epsilon for all norms of the stream, whatever blocks say.
  config["rms_norm_eps"] = config::real_or(norm, "epsilon", 1e-5, where);
  config["max_position_embeddings"] =
      config::integer_or(object_in(config, "embeddings", where), "max_position_embeddings", 2048, 1,
                         kMaxPositions, where);
  ModelSpec spec = config::read_model(config, "apriel2", where);
  spec.rope.dim = 0;
  spec.layers = read_layers(config, spec, where);
  if (spec.rope.dim == 0) {
    spec.rope.dim = 2;  // no layer rotates
  }
  return spec;
}

Json write_mixer(const UnitSpec& unit, const ModelSpec& spec) {
  const Options& o = unit.options;
  const char* kind = unit.kind.c_str();
  if (unit.kind == "attention" || unit.kind == "sliding_window") {
    Json mixer{{"type", "attention"},
               {"heads", o.integer(kind, "heads")},
               {"head_groups", o.integer(kind, "kv_heads")},
               {"head_size", o.integer(kind, "head_dim")},
               {"rotary", {{"type", "mistral_1d"}, {"theta", spec.rope.theta}}},
               {"add_linear_biases", o.flag(kind, "qkv_bias", false)},
               {"dense_layer", {{"bias", {{"enabled", o.flag(kind, "out_bias", false)}}}}}};
    if (unit.kind == "sliding_window") {
      mixer["window_size"] = o.integer(kind, "window");
    }
    return mixer;
  }
  if (unit.kind == "mamba") {
    return {{"type", "mamba"},
            {"d_inner", o.integer(kind, "inner")},
            {"d_xb", o.integer(kind, "xb")},
            {"state_size", o.integer(kind, "state")},
            {"dt_rank", o.integer(kind, "dt_rank")},
            {"d_conv", o.integer(kind, "conv", 4)},
            {"repeat_kv_before_conv", o.flag(kind, "repeat_before_conv", true)},
            {"conv_bias", o.flag(kind, "conv_bias", true)},
            {"dt_proj_bias", true},
            {"add_linear_biases", false}};
  }
  const Json conv{{"kernel_size", o.integer(kind, "conv", 4)}, {"activation", "silu"}};
  if (unit.kind == "gated_delta_net") {
    return {{"type", "gdn"},
            {"value_heads", o.integer(kind, "heads")},
            {"key_heads", o.integer(kind, "k_heads", o.integer(kind, "heads"))},
            {"key_head_dim", o.integer(kind, "key_dim")},
            {"value_head_dim", o.integer(kind, "value_dim")},
            {"convolution_layer", conv},
            {"norm_eps", o.real(kind, "norm_eps", 1e-5)}};
  }
  expect(unit.kind == "kimi_delta",
         "an apriel2 config.json cannot express the mixer {}; write the cambium layout instead",
         unit.kind);
  return {{"type", "kda"},
          {"heads", o.integer(kind, "heads")},
          {"head_dim", o.integer(kind, "head_dim")},
          {"convolution_layer", conv},
          {"normalization",
           {{"epsilon", o.real(kind, "norm_eps", 1e-5)},
            {"activation", o.text(kind, "out_gate", "sigmoid")}}}};
}

Json write_block(const LayerSpec& layer, const ModelSpec& spec) {
  expect(layer.branches.size() == 2 && layer.mixer() != nullptr &&
             layer.feed_forward() != nullptr && layer.feed_forward()->kind == "swiglu",
         "an apriel2 config.json has layers of a mixer and a swiglu; write the cambium layout "
         "instead");
  Json mixer = write_mixer(*layer.mixer(), spec);
  if (const BranchSpec* choice = layer.choice(); choice != nullptr) {
    mixer = {{"type", "stochastic"},
             {"main_mixer_name", mixer_label(*layer.mixer())},
             {"sampling_strategy", "uniform"}};
    for (const UnitSpec& unit : choice->units) {
      mixer["mixers"][mixer_label(unit)] = write_mixer(unit, spec);
    }
  }
  return {{"mixer", mixer},
          {"mlp",
           {{"type", "mlp"},
            {"intermediate_size", config::inner_of(layer)},
            {"activation", "silu"},
            {"gated", true},
            {"add_linear_biases", false}}},
          {"normalization", {{"type", "rms_norm"}, {"epsilon", config::shortest(spec.norm.eps)}}}};
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"Apriel2ForCausalLM"});
  config["model_type"] = "apriel2_text";
  config.update(config::write_common(spec));
  for (const char* elsewhere : {"num_hidden_layers", "rms_norm_eps", "rope_theta",
                                "max_position_embeddings", "hidden_act"}) {
    config.erase(elsewhere);
  }
  Json decoder{{"type", "pattern"},
               {"num_blocks", spec.layers.size()},
               {"pattern", Json::array()},
               {"blocks", Json::object()}};
  for (const LayerSpec& layer : spec.layers) {
    const Json block = write_block(layer, spec);
    std::string name = "block_" + std::to_string(decoder["blocks"].size());
    for (const auto& [known, other] : decoder["blocks"].items()) {
      name = other == block ? known : name;
    }
    decoder["blocks"][name] = block;
    decoder["pattern"].push_back(name);
  }
  config["decoder"] = decoder;
  config["embeddings"] = {{"max_position_embeddings", spec.max_positions}};
  config["head"] = {
      {"normalization", {{"type", "rms_norm"}, {"epsilon", config::shortest(spec.norm.eps)}}}};
  config["torch_dtype"] = "float32";
  return config::expressed(config, spec, read);
}

/// The names of a layer's mixer, which stands alone or in a choice.
void add_mixer_tensors(std::vector<TensorRule>& rules, const std::string& ours,
                       const std::string& theirs) {
  static std::deque<std::string> names;  // rules point at names that live as long as the program
  const auto add = [&](const char* kind, const std::string& mine, const std::string& stored) {
    rules.push_back({.ours = names.emplace_back(ours + mine).c_str(),
                     .theirs = theirs + stored,
                     .mixer = kind});
  };
  for (const char* part : {"q", "k", "v"}) {
    const std::string p = part;
    add("kimi_delta", "in_proj.weight:" + p, p + "_proj.weight");
    add("kimi_delta", "conv1d.weight:" + p, p + "_conv.weight");
  }
  add("kimi_delta", "decay_*", "f_*");
  add("kimi_delta", "gate_*", "g_*");
  add("kimi_delta", "out_proj.*", "o_proj.*");
  add("gated_delta_net", "in_proj.*", "in_proj_qkvz.*");
  add("gated_delta_net", "ba_proj.*", "in_proj_ba.*");
  add("gated_delta_net", "conv1d.*", "convolution.*");
  for (const char* kind :
       {"kimi_delta", "gated_delta_net", "mamba", "attention", "sliding_window"}) {
    add(kind, "*", "*");
  }
}

}  // namespace

std::vector<Family> apriel2_families() {
  std::vector<TensorRule> rules;
  add_mixer_tensors(rules, "layers.*.mixer.", "model.decoder.blocks.*.mixer.");
  add_mixer_tensors(rules, "layers.*.mixer_*.", "model.decoder.blocks.*.mixer.mixers.*.");
  const std::vector<TensorRule> common =
      config::tensors_under(config::decoder_tensors(), "model.layers.", "model.decoder.blocks.");
  rules.insert(rules.end(), common.begin(), common.end());
  std::vector<std::string> ignored = config::decoder_ignored();
  ignored.emplace_back("model.vision_encoder.*");
  return {{"apriel2", {"apriel2", "apriel2_text"}, read, write, rules, ignored}};
}

}  // namespace cambium
