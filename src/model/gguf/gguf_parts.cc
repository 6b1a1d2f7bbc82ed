#include "model/gguf/gguf_parts.h"

#include <algorithm>

#include "base/error.h"

namespace cambium::gguf {
namespace {

/// A list of words, one a layer.
template <class Word>
GgufJson words(int64_t layers, Word word) {
  GgufJson list = GgufJson::array();
  for (int64_t i = 0; i < layers; ++i) {
    list.push_back(word(i));
  }
  return list;
}

void read_head_dim(GgufArchitectureKeys& keys, GgufJson& config) {
  const int64_t heads = config.at("num_attention_heads").get<int64_t>();
  const int64_t width = config.at("hidden_size").get<int64_t>();
  if (!keys.has("attention.key_length")) {
    expect(width % heads == 0, "{}: {} channels cannot be cut into {} heads", keys.path(), width,
           heads);
  }
  const int64_t dim =
      keys.has("attention.key_length") ? keys.need("attention.key_length") : width / heads;
  expect(keys.size("attention.value_length").value_or(dim) == dim,
         "{}: keys and values of different lengths cannot be imported", keys.path());
  config["head_dim"] = dim;
}

void write_head_dim(const ModelSpec& /*spec*/, const GgufJson& config, GgufHead& head) {
  const int64_t dim = config.contains("head_dim")
                          ? config.at("head_dim").get<int64_t>()
                          : config.at("hidden_size").get<int64_t>() /
                                config.at("num_attention_heads").get<int64_t>();
  head.size("attention.key_length", dim);
  head.size("attention.value_length", dim);
}

void read_biases(GgufArchitectureKeys& keys, GgufJson& config) {
  config["attention_bias"] = keys.gguf().find("blk.0.attn_output.bias") != nullptr;
  config["mlp_bias"] = keys.gguf().find("blk.0.ffn_down.bias") != nullptr;
}

constexpr const char* kWindow = "attention.sliding_window";
constexpr const char* kPattern = "attention.sliding_window_pattern";

template <int64_t kPeriod>
void read_windows(GgufArchitectureKeys& keys, GgufJson& config) {
  const int64_t layers = whole(config, "num_hidden_layers");
  const int64_t window = keys.size(kWindow).value_or(0);
  std::vector<bool> windowed(static_cast<size_t>(layers));
  const auto it = keys.gguf().metadata().find(keys.named(kPattern));
  const bool list = it != keys.gguf().metadata().end() &&
                    std::holds_alternative<GgufValue::List>(it->second.value);
  if (list) {
    const auto& items = std::get<GgufValue::List>(it->second.value);
    expect(std::ssize(items) == layers, "{}: '{}' has {} entries for {} layers", keys.path(),
           keys.named(kPattern), items.size(), layers);
    keys.has(kPattern);
    for (size_t i = 0; i < windowed.size(); ++i) {
      const bool* flag = std::get_if<bool>(&items[i].value);
      expect(flag != nullptr, "{}: '{}' should be a list of flags", keys.path(),
             keys.named(kPattern));
      windowed[i] = *flag;
    }
  } else {
    const int64_t period = keys.size(kPattern).value_or(kPeriod);
    for (int64_t i = 0; i < layers; ++i) {
      windowed[static_cast<size_t>(i)] = period == 0 || (i + 1) % period != 0;
    }
  }
  config["sliding_window"] = window > 0 ? GgufJson(window) : GgufJson();
  config["layer_types"] = words(layers, [&](int64_t i) {
    return window > 0 && windowed[static_cast<size_t>(i)] ? "sliding_attention" : "full_attention";
  });
}

template <int64_t kPeriod>
void write_windows(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  if (!config.contains("sliding_window") || config["sliding_window"].is_null()) {
    return;
  }
  head.size(kWindow, config["sliding_window"].get<int64_t>());
  GgufValue::List windowed;
  bool regular = true;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const bool has = spec.layers[i].mixer()->options.integer("attention", "window", 0) > 0;
    regular = regular && has == ((static_cast<int64_t>(i) + 1) % kPeriod != 0);
    windowed.emplace_back().value = has;
  }
  if (!regular) {  // a list is what newer versions of llama.cpp read
    head.put(kPattern, std::move(windowed));
  }
}

template <int64_t kPeriod>
constexpr GgufPart kWindowsOf{read_windows<kPeriod>, write_windows<kPeriod>};

/// config.json's word for a layer that attends, and for one that does not.
struct Words {
  const char* attends;
  const char* other;
};
constexpr Words kMamba{"attention", "mamba"};
constexpr Words kConv{"full_attention", "conv"};

template <const Words& kWords>
void read_layers(GgufArchitectureKeys& keys, GgufJson& config) {
  const std::vector<int64_t> heads = by_layer(keys, "attention.head_count_kv", config);
  config["num_key_value_heads"] = *std::max_element(heads.begin(), heads.end());
  config["layer_types"] = words(std::ssize(heads), [&](int64_t i) {
    return heads[static_cast<size_t>(i)] > 0 ? kWords.attends : kWords.other;
  });
}

void write_layers(const ModelSpec& spec, const GgufJson& config, GgufHead& head) {
  write_kv_heads(spec, head, "attention", whole(config, "num_key_value_heads"));
}

}  // namespace

void write_nothing(const ModelSpec& /*spec*/, const GgufJson& /*config*/, GgufHead& /*head*/) {}

const GgufPart kHeadDim{read_head_dim, write_head_dim};
const GgufPart kBiases{read_biases, write_nothing};
const GgufPart kWindows2 = kWindowsOf<2>;
const GgufPart kWindows4 = kWindowsOf<4>;
const GgufPart kWindows6 = kWindowsOf<6>;
const GgufPart kMambaLayers{read_layers<kMamba>, write_layers};
const GgufPart kConvLayers{read_layers<kConv>, write_layers};

std::vector<TensorRule> decoder_tensors(std::vector<TensorRule> more) {
  const std::vector<TensorRule> common = {
      {"embed.weight", "token_embd.weight"},
      {"head.weight", "output.weight"},
      {"norm.weight", "output_norm.weight"},
      {"layers.*.input_norm.weight", "blk.*.attn_norm.weight"},
      {"layers.*.post_norm.weight", "blk.*.ffn_norm.weight"},
      {"layers.*.mixer.q_proj.*", "blk.*.attn_q.*"},
      {"layers.*.mixer.k_proj.*", "blk.*.attn_k.*"},
      {"layers.*.mixer.v_proj.*", "blk.*.attn_v.*"},
      {"layers.*.mixer.o_proj.*", "blk.*.attn_output.*"},
      {"layers.*.mixer.q_norm.weight", "blk.*.attn_q_norm.weight"},
      {"layers.*.mixer.k_norm.weight", "blk.*.attn_k_norm.weight"},
      {"layers.*.feed_forward.gate.*", "blk.*.ffn_gate.*"},
      {"layers.*.feed_forward.up.*", "blk.*.ffn_up.*"},
      {"layers.*.feed_forward.down.*", "blk.*.ffn_down.*"},
      {"layers.*.feed_forward.router.weight", "blk.*.ffn_gate_inp.weight"},
      {"layers.*.feed_forward.router.bias", "blk.*.exp_probs_b.bias"},
      {"layers.*.feed_forward.experts.gate.*", "blk.*.ffn_gate_exps.*"},
      {"layers.*.feed_forward.experts.up.*", "blk.*.ffn_up_exps.*"},
      {"layers.*.feed_forward.experts.down.*", "blk.*.ffn_down_exps.*"},
      {"layers.*.feed_forward.shared.gate.weight", "blk.*.ffn_gate_shexp.weight"},
      {"layers.*.feed_forward.shared.up.weight", "blk.*.ffn_up_shexp.weight"},
      {"layers.*.feed_forward.shared.down.weight", "blk.*.ffn_down_shexp.weight"},
      {"layers.*.feed_forward.shared_gate.weight", "blk.*.ffn_gate_inp_shexp.weight"},
  };
  more.insert(more.end(), common.begin(), common.end());
  return more;
}

std::vector<GgufKeyRule> attention_keys(std::vector<GgufKeyRule> more) {
  const std::vector<GgufKeyRule> common = {
      {.key = "block_count", .config = "num_hidden_layers", .required = true},
      {.key = "embedding_length", .config = "hidden_size", .required = true},
      {.key = "context_length", .config = "max_position_embeddings"},
      {.key = "attention.head_count", .config = "num_attention_heads", .required = true},
      {.key = "attention.layer_norm_rms_epsilon",
       .config = "rms_norm_eps",
       .kind = GgufKeyRule::kNumber,
       .required = true},
  };
  more.insert(more.begin(), common.begin(), common.end());
  return more;
}

std::vector<GgufKeyRule> decoder_keys(std::vector<GgufKeyRule> more) {
  more.insert(more.begin(),
              {{.key = "attention.head_count_kv", .config = "num_key_value_heads"},
               {.key = "feed_forward_length", .config = "intermediate_size", .required = true}});
  return attention_keys(std::move(more));
}

std::vector<GgufKeyRule> granite_keys() {
  return {{"logit_scale", "logits_scaling", GgufKeyRule::kNumber},
          {"residual_scale", "residual_multiplier", GgufKeyRule::kNumber},
          {"embedding_scale", "embedding_multiplier", GgufKeyRule::kNumber},
          {"attention.scale", "attention_multiplier", GgufKeyRule::kNumber}};
}

std::vector<GgufOrder> pairs() {
  return {{"layers.*.mixer.q_proj.*", GgufOrder::kPairs, "heads"},
          {"layers.*.mixer.k_proj.*", GgufOrder::kPairs, "kv_heads"}};
}

std::map<std::string, uint64_t> gating(uint64_t function) {
  return {{"expert_gating_func", function}};
}

int64_t whole(const GgufJson& config, const char* key) {
  return config.at(key).get<int64_t>();
}

std::vector<int64_t> by_layer(GgufArchitectureKeys& keys, const char* key, const GgufJson& config) {
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

void read_inner(GgufArchitectureKeys& keys, GgufJson& config, const char* heads, const char* dim) {
  const int64_t inner = keys.need("ssm.inner_size");
  const int64_t count = whole(config, heads);
  expect(inner % count == 0, "{}: '{}' is {}, which {} heads do not divide", keys.path(),
         keys.named("ssm.inner_size"), inner, count);
  config[dim] = inner / count;
}
const UnitSpec& unit_of(const ModelSpec& spec, std::string_view kind) {
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      for (const UnitSpec& unit : branch.units) {
        if (unit.kind == kind) {
          return unit;
        }
      }
    }
  }
  fail("a {} model without a unit of kind {} cannot be written as GGUF", spec.family, kind);
}

}  // namespace cambium::gguf
