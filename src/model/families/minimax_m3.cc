// MiniMax-M3: attention whose keys are chosen in blocks by an index from some layer on, norms whose
// weights count from one, a clamped SwiGLU in dense layers, experts and shared expert. Files with
// images are read for their text.
#include <algorithm>

#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

constexpr const char* kText = "minimax_m3_vl_text";
constexpr const char* kSparse = "minimax_m3_sparse";

/// Our options, the keys that transformers writes with what they are where nothing is said, and
/// those in the sparse_attention_config of released files.
struct IndexKey {
  const char* ours;
  const char* key;
  int64_t absent;
  const char* released;
};
constexpr IndexKey kIndexKeys[] = {
    {"index_heads", "index_n_heads", 4, "sparse_num_index_heads"},
    {"index_dim", "index_head_dim", 128, "sparse_index_dim"},
    {"index_top", "index_topk_blocks", 16, "sparse_topk_blocks"},
    {"index_size", "index_block_size", 128, "sparse_block_size"},
    {"index_local", "index_local_blocks", 1, "sparse_local_block"},
};

Json sparse_config(const Json& config, const std::string& where) {
  if (!config::has(config, "sparse_attention_config")) {
    return Json::object();
  }
  const Json& sparse = config["sparse_attention_config"];
  expect(sparse.is_object(), "{}: expected 'sparse_attention_config' to be an object", where);
  expect(
      config::flag_or(sparse, "use_sparse_attention", true, where) &&
          config::integer_or(sparse, "sparse_init_block", 0, 0, kMaxPositions, where) == 0 &&
          config::text_or(sparse, "sparse_score_type", "max", where) == "max",
      "{}: expected a sparse_attention_config with use_sparse_attention, sparse_init_block 0 and "
      "sparse_score_type max, as in every published model",
      where);
  return sparse;
}

/// Which layers are of a kind: `types` names it or `others`, `numbers` has 1 or 0; without either
/// all are as `absent` says.
std::vector<bool> layers_of_kind(const Json& config, const char* types, const char* name,
                                 const char* others, const Json& with_numbers, const char* numbers,
                                 bool absent, int64_t layers, const std::string& where) {
  std::vector<bool> of_kind(static_cast<size_t>(layers), absent);
  if (config::has(config, types)) {
    const auto said = config::texts(config, types, of_kind.size(), where);
    for (size_t i = 0; i < said.size(); ++i) {
      expect(said[i] == name || said[i] == others, "{}: expected {} or {} in {}, got '{}'", where,
             name, others, types, said[i]);
      of_kind[i] = said[i] == name;
    }
  } else if (config::has(with_numbers, numbers)) {
    const Json& said = with_numbers[numbers];
    expect(said.is_array() && said.size() == of_kind.size(),
           "{}: expected the list '{}' of {} numbers, one a layer", where, numbers, layers);
    for (size_t i = 0; i < of_kind.size(); ++i) {
      of_kind[i] = config::integer(Json{{numbers, said[i]}}, numbers, 0, 1, where) == 1;
    }
  }
  return of_kind;
}

/// What published models all say alike.
void check(const Json& config, const std::string& where) {
  const std::string act = config::text_or(config, "hidden_act", "swigluoai", where);
  expect(act == "swigluoai" || act == "silu",  // which transformers writes and does not read
         "{}: expected hidden_act swigluoai, got '{}'", where, act);
  expect(config::real_or(config, "swiglu_alpha", 1.702, where) == 1.702 &&
             config::flag_or(config, "use_gemma_norm", true, where) &&
             config::flag_or(config, "use_qk_norm", true, where) &&
             config::text_or(config, "qk_norm_type", "per_head", where) == "per_head" &&
             config::text_or(config, "scoring_func", "sigmoid", where) == "sigmoid" &&
             config::flag_or(config, "use_routing_bias", true, where) &&
             config::integer_or(config, "n_shared_experts", 1, 0, kMaxExperts, where) == 1,
         "{}: expected swiglu_alpha 1.702, use_gemma_norm, use_qk_norm with qk_norm_type per_head, "
         "scoring_func sigmoid, use_routing_bias and n_shared_experts 1, as in every published "
         "model",
         where);
  expect(config::has(config, "partial_rotary_factor") || config::has(config, "rope_parameters") ||
             !config::has(config, "rotary_dim"),
         "{}: expected partial_rotary_factor beside rotary_dim, which transformers does not read",
         where);
}

UnitSpec read_attention(const ModelSpec& spec, const config::Sizes& sizes, const Json& config,
                        const std::string& where) {
  return {"attention",
          {{"heads", sizes.heads},
           {"kv_heads", sizes.kv_heads},
           {"head_dim", sizes.head_dim},
           {"qk_norm", std::string(norm_kind_name(spec.norm.kind))},
           {"qk_norm_eps", config::real_or(config, "rms_norm_eps", 1e-6, where)}}};
}

void add_index(UnitSpec& attention, const RopeConfig& rope, const Json& config, const Json& sparse,
               const std::string& where) {
  for (const IndexKey& key : kIndexKeys) {
    const int64_t said = config::integer_or(config, key.key, key.absent, 1, kMaxPositions, where);
    attention.options.set(key.ours,
                          config::integer_or(sparse, key.released, said, 1, kMaxPositions, where));
  }
  const Options& o = attention.options;
  expect(o.integer("index", "index_heads") == o.integer("index", "kv_heads"),
         "{}: expected as many heads of the index as num_key_value_heads={}, got {}", where,
         o.integer("index", "kv_heads"), o.integer("index", "index_heads"));
  expect(o.integer("index", "index_dim") >= rope.dim,
         "{}: expected heads of the index with the {} channels that turn, got {}", where, rope.dim,
         o.integer("index", "index_dim"));
}

UnitSpec read_experts(const Json& config, double limit, const std::string& where) {
  return {"experts",
          {{"experts", config::integer(config, "num_local_experts", 1, kMaxExperts, where)},
           {"top", config::integer(config, "num_experts_per_tok", 1, kMaxExperts, where)},
           {"inner", config::integer(config, "intermediate_size", 1, kMaxInner, where)},
           {"router", std::string("sigmoid")},
           {"router_bias", true},
           {"renormalise", true},
           {"scale", config::real_or(config, "routed_scaling_factor", 2.0, where)},
           {"shared",
            config::integer_or(config, "shared_intermediate_size", 3072, 1, kMaxInner, where)},
           {"activation", std::string("clamped_swiglu")},
           {"limit", limit}}};
}

ModelSpec read(const std::string& text, const std::string& where) {
  Json config = config::parse(text, where);
  if (config::has(config, "text_config")) {
    config = config::text_config(config, where);
  }
  config["model_type"] = kText;  // which that of a text_config need not be
  check(config, where);
  config.erase("hidden_act");
  ModelSpec spec = config::read_model(config, "minimax_m3", where);
  spec.norm.kind = NormKind::kZeroCentred;
  const config::Sizes sizes = config::read_sizes(config, where);
  spec.rope = config::read_rope(config, sizes.head_dim, spec.max_positions, where);
  const Json sparse = sparse_config(config, where);
  const std::vector<bool> chooses =
      layers_of_kind(config, "layer_types", kSparse, "full_attention", sparse,
                     "sparse_attention_freq", false, sizes.layers, where);
  const std::vector<bool> routes =
      layers_of_kind(config, "mlp_layer_types", "sparse", "dense", config, "moe_layer_freq", true,
                     sizes.layers, where);
  const double limit = config::real_or(config, "swiglu_limit", 7.0, where);
  const UnitSpec full = read_attention(spec, sizes, config, where);
  UnitSpec chosen = full;
  if (std::find(chooses.begin(), chooses.end(), true) != chooses.end()) {
    add_index(chosen, spec.rope, config, sparse, where);
  }
  for (size_t i = 0; i < chooses.size(); ++i) {
    UnitSpec feed_forward;
    if (routes[i]) {
      feed_forward = read_experts(config, limit, where);
    } else {
      feed_forward = {"swiglu",
                      {{"inner", config::integer_or(config, "dense_intermediate_size", 12288, 1,
                                                    kMaxInner, where)},
                       {"activation", std::string("clamped_swiglu")},
                       {"limit", limit}}};
    }
    spec.layers.push_back({{{.norm = spec.norm, .units = {chooses[i] ? chosen : full}},
                            {.norm = spec.norm, .units = {feed_forward}}}});
  }
  return spec;
}

std::string write(const ModelSpec& spec) {
  Json config;
  config["architectures"] = Json::array({"MiniMaxM3VLForCausalLM"});
  config["model_type"] = kText;
  config.update(config::write_common(spec));
  const Options& attention = config::first_unit(spec, "attention").options;
  const int64_t head_dim = attention.integer("attention", "head_dim");
  config["num_attention_heads"] = attention.integer("attention", "heads");
  config["num_key_value_heads"] = attention.integer("attention", "kv_heads");
  config["head_dim"] = head_dim;
  config["rotary_dim"] = spec.rope.dim;
  config["partial_rotary_factor"] = config::rotary_share(spec.rope.dim, head_dim);
  double limit = 7.0;
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* mixer = layer.mixer();
    const bool chooses = mixer != nullptr && mixer->options.has("index_heads");
    config["layer_types"].push_back(chooses ? kSparse : "full_attention");
    for (const IndexKey& key : kIndexKeys) {
      if (chooses) {
        config[key.key] = mixer->options.integer("attention", key.ours, key.absent);
      }
    }
    const UnitSpec* unit = layer.feed_forward();
    const bool routes = unit != nullptr && unit->kind == "experts";
    config["mlp_layer_types"].push_back(routes ? "sparse" : "dense");
    if (unit != nullptr && unit->kind == "swiglu") {
      config["dense_intermediate_size"] = config::inner_of(layer);
    }
    limit = unit != nullptr ? unit->options.real(unit->kind, "limit", limit) : limit;
  }
  config["swiglu_limit"] = limit;
  config["swiglu_alpha"] = 1.702;
  if (const UnitSpec* unit = config::find_unit(spec, "experts"); unit != nullptr) {
    const Options& experts = unit->options;
    config["num_local_experts"] = experts.integer("experts", "experts");
    config["num_experts_per_tok"] = experts.integer("experts", "top");
    config["intermediate_size"] = experts.integer("experts", "inner");
    config["shared_intermediate_size"] = experts.integer("experts", "shared", 0);
    config["routed_scaling_factor"] = experts.real("experts", "scale", 1.0);
  }
  config["torch_dtype"] = "float32";
  return config::expressed(config, spec, read);
}

/// The names of transformers' text model first, then those of released files.
std::vector<TensorRule> tensors() {
  const auto gate_and_up = [](const char* theirs, const char* gate, const char* up, bool stacked) {
    return TensorRule{.theirs = theirs, .rows = {gate, up}, .stacked = stacked};
  };
  std::vector<TensorRule> rules = config::decoder_tensors({
      {"layers.*.feed_forward.router.weight", "model.layers.*.mlp.gate.weight"},
      {"layers.*.feed_forward.router.bias", "model.layers.*.mlp.gate.e_score_correction_bias"},
      gate_and_up("model.layers.*.mlp.experts.gate_up_proj",
                  "layers.*.feed_forward.experts.gate.weight",
                  "layers.*.feed_forward.experts.up.weight", true),
      {.ours = "layers.*.feed_forward.experts.down.weight",
       .theirs = "model.layers.*.mlp.experts.down_proj",
       .stacked = true},
      gate_and_up("model.layers.*.mlp.shared_experts.gate_up_proj.weight",
                  "layers.*.feed_forward.shared.gate.weight",
                  "layers.*.feed_forward.shared.up.weight", false),
      {"layers.*.feed_forward.shared.down.weight",
       "model.layers.*.mlp.shared_experts.down_proj.weight"},
      gate_and_up("model.layers.*.mlp.gate_up_proj.weight", "layers.*.feed_forward.gate.weight",
                  "layers.*.feed_forward.up.weight", false),
  });
  const std::vector<TensorRule> released = {
      {"layers.*.feed_forward.router.weight", "model.layers.*.block_sparse_moe.gate.weight"},
      {"layers.*.feed_forward.router.bias",
       "model.layers.*.block_sparse_moe.e_score_correction_bias"},
      {"layers.*.feed_forward.experts.gate.*", "model.layers.*.block_sparse_moe.experts.#.w1.*"},
      {"layers.*.feed_forward.experts.up.*", "model.layers.*.block_sparse_moe.experts.#.w3.*"},
      {"layers.*.feed_forward.experts.down.*", "model.layers.*.block_sparse_moe.experts.#.w2.*"},
      {"layers.*.feed_forward.shared.*.weight",
       "model.layers.*.block_sparse_moe.shared_experts.*_proj.weight"},
      {"layers.*.mixer.indexer.*", "model.layers.*.self_attn.index_*"},
  };
  rules.insert(rules.end(), released.begin(), released.end());
  return config::composite_tensors(rules);
}

}  // namespace

std::vector<Family> minimax_m3_families() {
  std::vector<std::string> ignored = config::decoder_ignored();
  for (const char* images : {"vision_tower.*", "multi_modal_projector.*", "patch_merge_mlp.*",
                             "model.vision_tower.*", "model.multi_modal_projector.*"}) {
    ignored.emplace_back(images);
  }
  return {{"minimax_m3", {kText, "minimax_m3_vl"}, read, write, tensors(), ignored}};
}

}  // namespace cambium
