// Families by what their attention has besides: gates, sinks' scores, scaled queries; composite
// configurations.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "model/families/testing.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Json;
using testing::read_alone;

Json fixture(const std::string& name) {
  return Json::parse(
      read_text_file(std::string(kSourceDir) + "/tests/fixtures/" + name + "/config.json"));
}

/// The part of a configuration that describes the text model.
Json& text_of(Json& config) {
  return config.contains("text_config") ? config["text_config"] : config;
}

struct Case {
  const char* fixture;
  void (*change)(Json& text);
};

TEST(AttentionFamilies, WhatIsWrittenReadsBack) {
  const std::vector<Case> cases = {
      {"ministral3", [](Json&) {}},
      {"ministral3", [](Json& text) { text["sliding_window"] = 9; }},
      {"qwen3_5", [](Json&) {}},
      {"qwen3_5",
       [](Json& text) {
         text["attn_output_gate"] = false;
         text["attention_bias"] = true;
         text["output_gate_type"] = "sigmoid";
       }},
      {"qwen3_5_text", [](Json& text) { text.erase("layer_types"); }},
      {"qwen3_5_moe", [](Json& text) { text["norm_topk_prob"] = false; }},
      {"qwen3_next", [](Json& text) { text["output_gate_type"] = "swish"; }},
      {"gpt_oss", [](Json& text) { text.erase("layer_types"); }},
      {"gpt_oss", [](Json& text) { text["attention_bias"] = false; }},
      {"minimax_m3", [](Json&) {}},
      {"minimax_m3",
       [](Json& text) {
         text["moe_layer_freq"] = {0, 0, 0};
       }},
      {"minimax_m3", [](Json& text) { text.erase("sparse_attention_config"); }},
      {"minimax_m3", [](Json& text) { text["sparse_attention_config"]["sparse_local_block"] = 3; }},
  };
  for (const Case& c : cases) {
    Json config = fixture(c.fixture);
    c.change(text_of(config));
    const ModelSpec spec = read_alone(config);
    const std::string written = find_family(spec.family).write_config(spec);
    EXPECT_EQ(read_alone(Json::parse(written)), spec) << written;
  }
}

TEST(AttentionFamilies, AreReadAsTheyAreMeant) {
  Json config = fixture("qwen3_5");
  EXPECT_FALSE(read_alone(config).tied_head);
  config["tie_word_embeddings"] = true;  // the outer one counts
  EXPECT_TRUE(read_alone(config).tied_head);
  text_of(config)["output_gate_type"] = "sigmoid";
  EXPECT_EQ(read_alone(config).layers[0].mixer()->options.text("", "out_gate"), "sigmoid");
  config = fixture("gpt_oss");
  config.erase("layer_types");
  EXPECT_EQ(read_alone(config).layers[0].mixer()->options.integer("", "window", 0), 32);
  EXPECT_EQ(read_alone(config).layers[1].mixer()->options.integer("", "window", 0), 0);
  EXPECT_EQ(read_alone(fixture("ministral3")).rope.query_beta, 0.1);
}

TEST(AttentionFamilies, WhatIsNotKnownIsRefusedByName) {
  const auto message = [](const char* name, void (*change)(Json & config)) {
    Json config = fixture(name);
    change(config);
    return error_of([&] { read_alone(config); });
  };
  EXPECT_NE(message("qwen3_5", [](Json& c) { c["text_config"]["output_gate_type"] = "tanh"; })
                .find("expected output_gate_type silu, swish or sigmoid, got 'tanh'"),
            std::string::npos);
  EXPECT_NE(message("qwen3_5", [](Json& c) { c.erase("text_config"); })
                .find("expected the object 'text_config'"),
            std::string::npos);
  EXPECT_NE(message("qwen3_5_text", [](Json& c) { c["layer_types"][0] = "conv"; })
                .find("expected full_attention or linear_attention in layer_types, got 'conv'"),
            std::string::npos);
  EXPECT_NE(message("ministral3", [](Json& c) { c["text_config"]["model_type"] = "gemma"; })
                .find("expected a text_config of model_type ministral3 or mistral, got 'gemma'"),
            std::string::npos);
  const auto m3 = [&](void (*change)(Json & text), const char* expected) {
    Json config = fixture("minimax_m3");
    change(config);
    EXPECT_NE(error_of([&] { read_alone(config); }).find(expected), std::string::npos)
        << error_of([&] { read_alone(config); });
  };
  m3([](Json& c) { c["sparse_attention_config"]["sparse_init_block"] = 1; },
     "expected a sparse_attention_config with use_sparse_attention, sparse_init_block 0 and");
  m3([](Json& c) { c["sparse_attention_config"]["sparse_num_index_heads"] = 4; },
     "expected as many heads of the index as num_key_value_heads=2, got 4");
  m3([](Json& c) { c["sparse_attention_config"]["sparse_index_dim"] = 6; },
     "expected heads of the index with the 8 channels that turn, got 6");
  m3(
      [](Json& c) {
        c["sparse_attention_config"]["sparse_attention_freq"] = {0, 1};
      },
      "expected the list 'sparse_attention_freq' of 3 numbers, one a layer");
  m3(
      [](Json& c) {
        c["layer_types"] = {"full_attention", "sliding_attention", "full_attention"};
      },
      "expected minimax_m3_sparse or full_attention in layer_types, got 'sliding_attention'");
  m3([](Json& c) { c["hidden_act"] = "gelu"; }, "expected hidden_act swigluoai, got 'gelu'");
  m3([](Json& c) { c.erase("partial_rotary_factor"); },
     "expected partial_rotary_factor beside rotary_dim, which transformers does not read");
  m3([](Json& c) { c["use_gemma_norm"] = false; }, "expected swiglu_alpha 1.702, use_gemma_norm");
  ModelSpec spec = read_alone(fixture("qwen3_5"));
  spec.layers[1].mixer()->options.set("key_dim", int64_t{8});
  EXPECT_NE(error_of([&] {
              find_family("qwen3_5").write_config(spec);
            }).find("a qwen3_5 config.json cannot express layer 1 (gated_delta_net)"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
