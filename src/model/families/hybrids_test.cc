// Families that are hybrids already: what is written reads back, and what cannot be said is named.
#include <tuple>

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "model/families/testing.h"
#include "model/supernet.h"
#include "model/weights.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Json;
using testing::read_alone;

Json config_of(const std::string& fixture) {
  return Json::parse([&] {
    std::string text =
        read_text_file(std::string(kSourceDir) + "/tests/fixtures/" + fixture + "/config.json");
    const size_t infinite = text.find("Infinity");
    return infinite == std::string::npos ? text : text.replace(infinite, 8, "null");
  }());
}

std::string write(const ModelSpec& spec) {
  return find_family(spec.family).write_config(spec);
}

struct Form {
  const char* fixture;
  const char* map;
  Json edits;  // keys that change
};

void expect_read_back(const std::vector<Form>& forms) {
  for (const Form& form : forms) {
    SCOPED_TRACE(form.fixture + form.edits.dump());
    Json config = config_of(form.fixture);
    config.update(form.edits);
    const ModelSpec spec = read_alone(config);
    EXPECT_TRUE(layer_map(spec).starts_with(form.map)) << layer_map(spec);
    EXPECT_EQ(read_alone(Json::parse(write(spec))), spec);
  }
}

TEST(Hybrids, WhatIsWrittenReadsBack) {
  const std::vector<Form> forms = {
      {"bamba", "22A2", {{"partial_rotary_factor", 0.25}}},
      {"bamba", "2222", {{"attn_layer_indices", Json::array()}}},
      {"granite_hybrid", "2A22", {{"position_embedding_type", "nope"}, {"logits_scaling", 7.0}}},
      {"granite_hybrid", "2A22", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}}},
      {"falcon_h1", "(A2)(A2)(A2)", {{"mamba_rms_norm", true}, {"ssm_multipliers", nullptr}}},
      {"lfm2", "CCACA", Json::object()},
      {"lfm2",
       "CCCCA",
       {{"layer_types", {"conv", "conv", "conv", "conv", "full_attention"}},
        {"tie_embedding", false},
        {"conv_bias", true}}},
      {"lfm2_moe", "CCAC", Json::object()},
      {"jamba", "11A11", Json::object()},
      {"jamba", "1111A", {{"attn_layer_period", 8}, {"attn_layer_offset", 4}, {"num_experts", 1}}},
      {"nemotron_h_moe", "2E2AE2E", Json::object()},
      {"nemotron_h_latent", "2E2AE", Json::object()},
      {"olmo_hybrid", "GGGA", Json::object()},
      {"olmo_hybrid",
       "GGGA",
       {{"rope_parameters", {{"rope_theta", nullptr}}}, {"linear_allow_neg_eigval", false}}},
      {"nemotron_h", "2f2f2Af2f2f", Json::object()},
      {"nemotron_h",
       "2fA2E",
       {{"num_hidden_layers", 5},
        {"layers_block_type", {"mamba", "mlp", "full_attention", "linear_attention", "moe"}},
        {"n_routed_experts", 8},
        {"num_experts_per_tok", 3},
        {"moe_intermediate_size", 24},
        {"n_shared_experts", 1},
        {"moe_shared_expert_intermediate_size", 40},
        {"norm_topk_prob", true}}},
  };
  expect_read_back(forms);
}

/// So many layers of one kind, by a list of words.
Json all_of(const char* word, int layers = 2) {
  return {{"num_hidden_layers", layers},
          {"layer_types", std::vector<std::string>(static_cast<size_t>(layers), word)}};
}

// A configuration gives the sizes of every kind of its family, and a model may have one kind alone:
// all layers of Granite 4 Micro attend.
TEST(Hybrids, OfOneKindAloneReadBack) {
  const auto kimi = [](const std::vector<int>& full, const std::vector<int>& linear) {
    return Json{{"num_hidden_layers", 2},
                {"linear_attn_config",
                 {{"full_attn_layers", full},
                  {"kda_layers", linear},
                  {"num_heads", 3},
                  {"head_dim", 8},
                  {"short_conv_kernel_size", 4}}}};
  };
  const auto pattern = [](const char* letters, int layers) {
    return Json{{"hybrid_override_pattern", letters}, {"num_hidden_layers", layers}};
  };
  Json dense_granite = all_of("attention");
  dense_granite["num_local_experts"] = 0;
  const std::vector<Form> forms = {
      {"granite_hybrid", "AA", all_of("attention")},
      {"granite_hybrid", "AA", dense_granite},
      {"granite_hybrid", "22", all_of("mamba")},
      {"bamba", "AAAA", {{"attn_layer_indices", {0, 1, 2, 3}}}},
      {"nemotron_h_moe", "2E", pattern("ME", 2)},
      {"nemotron_h_moe", "A", pattern("*", 1)},
      {"nemotron_h_moe", "E", pattern("E", 1)},
      {"jamba",
       "11",
       {{"num_hidden_layers", 2}, {"attn_layer_period", 8}, {"attn_layer_offset", 4}}},
      {"jamba",
       "AA",
       {{"num_hidden_layers", 2}, {"attn_layer_period", 1}, {"attn_layer_offset", 0}}},
      {"lfm2", "CC", all_of("conv")},
      {"lfm2", "AA", all_of("full_attention")},
      {"qwen3_next", "GG", all_of("linear_attention")},
      {"qwen3_next", "AA", all_of("full_attention")},
      {"qwen3_5_text", "GG", all_of("linear_attention")},
      {"olmo_hybrid", "GG", all_of("linear_attention")},
      {"olmo_hybrid", "AA", all_of("full_attention")},
      {"kimi_linear", "", kimi({1, 2}, {})},
      {"kimi_linear", "KK", kimi({}, {1, 2})},
      {"bailing_hybrid", "", {{"num_hidden_layers", 2}, {"layer_group_size", 1}}},
      {"bailing_hybrid", "KK", {{"num_hidden_layers", 2}, {"layer_group_size", 4}}},
  };
  expect_read_back(forms);
}

// And families of experts may have them in no layer, or in every one.
TEST(Hybrids, NoLayerOrEachHasExperts) {
  const std::vector<Form> forms = {
      {"deepseek_v3", "", {{"first_k_dense_replace", 9}}},
      {"deepseek_v32", "", {{"first_k_dense_replace", 9}}},
      {"kimi_linear", "", {{"first_k_dense_replace", 9}}},
      {"bailing_hybrid", "", {{"first_k_dense_replace", 9}}},
      {"qwen3_moe", "", {{"num_hidden_layers", 2}, {"mlp_only_layers", {0, 1}}}},
      {"lfm2_moe", "", {{"num_dense_layers", 4}}},
  };
  for (const Form& form : forms) {
    SCOPED_TRACE(form.fixture);
    Json config = config_of(form.fixture);
    config.update(form.edits);
    const ModelSpec spec = read_alone(config);
    for (const LayerSpec& layer : spec.layers) {
      EXPECT_EQ(layer.feed_forward()->kind, "swiglu");
    }
    EXPECT_EQ(read_alone(Json::parse(write(spec))), spec);
  }
  Json config = config_of("lfm2_moe");
  config["num_dense_layers"] = 0;
  config.erase("intermediate_size");
  const ModelSpec spec = read_alone(config);
  EXPECT_EQ(spec.layers.front().feed_forward()->kind, "experts");
  EXPECT_EQ(read_alone(Json::parse(write(spec))), spec);
}

// 30 / 44 of a head of 44 is a little less than 30 channels; a whole head turns where nothing else
// would be read.
TEST(Hybrids, PartsOfAHeadThatTurnReadBack) {
  for (const char* fixture : {"bamba", "qwen3_next", "qwen3_5_text", "phi3"}) {
    for (const double share : {1.0, 30.5 / 44.0, 0.25}) {
      SCOPED_TRACE(fixture + std::to_string(share));
      Json config = config_of(fixture);
      config["head_dim"] = 44;
      config["partial_rotary_factor"] = share;
      config.erase("rope_parameters");
      const ModelSpec spec = read_alone(config);
      EXPECT_EQ(spec.rope.dim, static_cast<int64_t>(44 * share));
      EXPECT_EQ(read_alone(Json::parse(write(spec))).rope.dim, spec.rope.dim);
    }
  }
}

TEST(Hybrids, WhatAFamilyCannotExpressIsNamed) {
  ModelSpec spec = read_alone(config_of("granite_hybrid"));
  const UnitSpec delta{"gated_delta_net",
                       {{"heads", int64_t{4}}, {"key_dim", int64_t{8}}, {"value_dim", int64_t{8}}}};
  *spec.layers[2].mixer() = delta;
  EXPECT_NE(error_of([&] { write(spec); }).find("cannot express layer 2 (gated_delta_net)"),
            std::string::npos);
  spec = read_alone(config_of("falcon_h1"));
  spec.layers[1].branches[0].units[1].out = 0.5F;
  EXPECT_NE(error_of([&] { write(spec); }).find("cannot express layer 1 (attention)"),
            std::string::npos);
  spec = read_alone(config_of("bamba"));
  spec.embedding_scale = 2.0F;
  EXPECT_NE(error_of([&] { write(spec); }).find("cannot express what surrounds the layers"),
            std::string::npos);
}

TEST(Hybrids, SuperAprielIsASupernet) {
  const Json config = config_of("apriel2");
  const ModelSpec spec = read_alone(config);
  EXPECT_EQ(layer_map(spec), "AWGKMK");
  EXPECT_EQ(mixer_labels(spec),
            (std::vector<std::string>{"attention", "sliding_window", "gdn", "kda"}));
  EXPECT_EQ(active_units(spec), (ActiveUnits{-1, 1, 2, 3, -1, -1}));
  EXPECT_EQ(layer_map(unwrapped(spec, uniform_units(spec, "attention"))), "AAAAMK");
  EXPECT_EQ(spec.layers[2].choice()->units[1].options.integer("", "window"), 24);
  // Kimi's gate where the file says it, Fast-LLM's own where it says nothing.
  EXPECT_FALSE(spec.layers[3].mixer()->options.has("out_gate"));
  EXPECT_EQ(spec.layers[5].mixer()->options.text("", "out_gate"), "silu");
  EXPECT_EQ(read_alone(Json::parse(write(spec))), spec);
  const auto error_with = [&](const char* path, const Json& value) {
    Json edited = config;
    edited[Json::json_pointer(path)] = value;
    return error_of([&] { read_alone(edited); });
  };
  const std::string blocks = "/decoder/blocks";
  for (const auto& [path, value, message] :
       {std::tuple<std::string, Json, std::string>{"/decoder/type", "tree", "fixed or pattern"},
        {"/decoder/pattern/0", "none", "expected names of 'blocks' in 'pattern', got \"none\""},
        {blocks + "/gdn/mixer/main_mixer_name", "mamba", "there is no mixer 'mamba'"},
        {blocks + "/mamba/mixer/type", "s4", "expected a mixer attention, mamba, gdn, kda"},
        {blocks + "/mamba/mlp/gated", false, "expected rms_norm and a gated mlp"},
        {blocks + "/attn/mixer/rotary/theta", 5000.0, "expected one rotation"},
        {blocks + "/attn/mixer/key_layer/bias/enabled", true, "biases of q, k and v"}}) {
    EXPECT_NE(error_with(path.c_str(), value).find(message), std::string::npos) << path;
  }
  Json unturned = config;
  unturned["decoder"]["pattern"] = {"mamba", "plain_kda"};
  ModelSpec recurrent = read_alone(unturned);
  EXPECT_EQ(layer_map(recurrent), "MKMKMK");
  EXPECT_EQ(read_alone(Json::parse(write(recurrent))), recurrent);
  const LoadedModel runs = fresh_model(recurrent, 1);
  ModelSpec with_preset = spec;
  put_preset(with_preset, {"fast", uniform_units(spec, "gdn")});
  EXPECT_NE(error_of([&] { write(with_preset); }).find("cannot express what surrounds the layers"),
            std::string::npos);
}

TEST(Hybrids, MiniMaxIsReadForTheCodeThatRunsIt) {
  struct Row {
    const char* family;
    Json edits;
    int64_t turned;
  };
  const Json own = {{"AutoModelForCausalLM", "modeling_minimax_m1.MiniMaxM1ForCausalLM"}};
  const std::vector<Row> rows = {
      {"minimax_m1", Json::object(), 16},  // the fixture's rotary_dim is 8
      {"minimax_m1", {{"auto_map", nullptr}}, 16},
      {"minimax_m1", {{"auto_map", own}}, 8},
      {"minimax_m1", {{"auto_map", own}, {"model_type", "minimax_text_01"}}, 8},
      {"minimax_m1", {{"auto_map", own}, {"rotary_dim", 16}}, 16},
      {"minimax", {{"model_type", "minimax"}, {"layer_types", Json::array()}}, 16},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.edits.dump());
    Json config = config_of("minimax_m1");
    config.update(row.edits);
    if (config.contains("layer_types")) {
      config["layer_types"] = std::vector<std::string>(8, "full_attention");
    }
    const ModelSpec spec = read_alone(config);
    EXPECT_EQ(spec.rope.dim, row.turned);
    const Json written = Json::parse(write(spec));
    EXPECT_EQ(written.contains("auto_map"), row.turned < 16);
    EXPECT_EQ(read_alone(written), spec);
  }
  // Six heads: ALiBi's rates by their own code, a geometric series by transformers'.
  Json config = config_of("minimax_m1");
  config.update({{"num_attention_heads", 6}, {"rotary_dim", 16}});
  for (const bool named : {false, true}) {
    config["auto_map"] = named ? own : Json();
    const ModelSpec six = read_alone(config);
    EXPECT_EQ(six.layers[0].mixer()->options.flag("", "geometric_slopes", false), !named);
    const Json written = Json::parse(write(six));
    EXPECT_EQ(written.contains("auto_map"), named);
    EXPECT_EQ(read_alone(written), six);
  }
  config = config_of("minimax_m1");
  config["auto_map"] = own;
  ModelSpec spec = read_alone(config);
  spec.family = "minimax";
  EXPECT_NE(error_of([&] { write(spec); }).find("cannot express what surrounds the layers"),
            std::string::npos);
}

TEST(Hybrids, OurLayoutSaysAllOfThem) {
  for (const char* fixture : {"bamba", "granite_hybrid", "falcon_h1", "nemotron_h", "lfm2",
                              "lfm2_moe", "jamba", "nemotron_h_latent", "olmo_hybrid"}) {
    EXPECT_TRUE(expresses(find_family("cambium"), read_alone(config_of(fixture)))) << fixture;
  }
}

TEST(Hybrids, WiringsThatNoSpecSaysAreRefusedByName) {
  const std::string message = error_of([] { read_alone({{"model_type", "zamba2"}}); });
  EXPECT_NE(message.find("model_type 'zamba2' are not supported: one transformer block serves"),
            std::string::npos)
      << message;
}

TEST(Hybrids, WordsAndLettersThatAreNotKnownAreNamed) {
  Json config = config_of("nemotron_h");
  config["hybrid_override_pattern"] = "M-M-M*-M-M?";
  EXPECT_NE(error_of([&] { read_alone(config); }).find("expected M, *, - or E for layer 10"),
            std::string::npos);
  config["hybrid_override_pattern"] = "M-";
  EXPECT_NE(error_of([&] { read_alone(config); }).find("expected 11 letters"), std::string::npos);
  config["layers_block_type"] = std::vector<std::string>(11, "gdn");
  EXPECT_NE(error_of([&] { read_alone(config); }).find("in layers_block_type, got 'gdn'"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
