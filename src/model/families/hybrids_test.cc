// Families that are hybrids already: what is written reads back, and what cannot be said is named.
#include <tuple>

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
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
    std::string text = read_text_file(std::string(CAMBIUM_SOURCE_DIR) + "/tests/fixtures/" +
                                      fixture + "/config.json");
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
  for (const Form& form : forms) {
    SCOPED_TRACE(form.fixture + form.edits.dump());
    Json config = config_of(form.fixture);
    config.update(form.edits);
    const ModelSpec spec = read_alone(config);
    EXPECT_TRUE(layer_map(spec).starts_with(form.map)) << layer_map(spec);
    if (spec.layers.size() != 4 || layer_map(spec).find('A') != std::string::npos) {
      EXPECT_EQ(read_alone(Json::parse(write(spec))), spec);
    } else {  // nothing says what its attention would be
      EXPECT_NE(error_of([&] { write(spec); }).find("needs a unit of kind attention"),
                std::string::npos);
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
