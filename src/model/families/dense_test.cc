#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/testing.h"
#include "model/families/testing.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Json;
using testing::read;
using testing::tiny;

std::string windows(const ModelSpec& spec) {
  std::string text;
  for (const LayerSpec& layer : spec.layers) {
    text += std::to_string(layer.mixer()->options.integer("attention", "window", 0)) + " ";
  }
  return text;
}

TEST(DenseFamilies, WindowsOfQwenCountOnlyWhereTheyAreUsed) {
  Json config = tiny("qwen2");
  config["sliding_window"] = 5;
  config["max_window_layers"] = 1;
  EXPECT_EQ(windows(read(config)), "0 0 0 ");
  config["use_sliding_window"] = true;
  EXPECT_EQ(windows(read(config)), "0 5 5 ");
  config["layer_types"] = {"sliding_attention", "full_attention", "sliding_attention"};
  EXPECT_EQ(windows(read(config)), "5 0 5 ");
  config["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_THROW(read(config), Error);
  config["layer_types"] = {"sliding_attention", "full_attention", "chunked_attention"};
  EXPECT_THROW(read(config), Error);
}

TEST(DenseFamilies, WhatIsWrittenReadsBack) {
  for (const char* type : {"llama", "mistral", "ministral", "qwen2", "qwen3"}) {
    Json config = tiny(type);
    const std::string kind = type;
    if (kind == "llama") {
      config["attention_bias"] = true;
      config["mlp_bias"] = true;
    }
    if (kind == "qwen3") {
      config["attention_bias"] = true;
    }
    if (kind != "llama") {
      config["sliding_window"] = 7;
    }
    if (kind == "qwen2" || kind == "qwen3") {
      config["use_sliding_window"] = true;
      config["max_window_layers"] = 2;
    }
    config["rope_scaling"] = {
        {"type", "yarn"},    {"factor", 4.0}, {"original_max_position_embeddings", 64},
        {"beta_fast", 16.0}, {"mscale", 0.7}, {"mscale_all_dim", 0.9}};
    const ModelSpec spec = read(config);
    const ModelSpec again = read(find_family(spec.family).write_config(spec));
    EXPECT_EQ(again, spec) << type;
    EXPECT_EQ(again.rope.attention_factor, spec.rope.attention_factor);
    EXPECT_NE(spec.rope.attention_factor, 1.0);
  }
}

TEST(DenseFamilies, BiasesAreWhereTheFamilyHasThem) {
  const auto biases = [](const Json& config) {
    Model model(read(config));
    std::string names;
    model.visit_layer(0, [&](const std::string& name, Parameter&) {
      names += name.ends_with(".bias") ? name.substr(9) + " " : "";
    });
    return names;
  };
  Json config = tiny("llama");
  EXPECT_EQ(biases(config), "");
  config["attention_bias"] = true;
  EXPECT_EQ(biases(config),
            "mixer.q_proj.bias mixer.k_proj.bias mixer.v_proj.bias mixer.o_proj.bias ");
  config["attention_bias"] = false;
  config["mlp_bias"] = true;
  EXPECT_EQ(biases(config), "feed_forward.gate.bias feed_forward.up.bias feed_forward.down.bias ");
  EXPECT_EQ(biases(tiny("qwen2")), "mixer.q_proj.bias mixer.k_proj.bias mixer.v_proj.bias ");
  config = tiny("mistral");
  config["attention_bias"] = true;
  EXPECT_NE(error_of([&] { read(config); }).find("'attention_bias' is true"), std::string::npos);
}

TEST(DenseFamilies, SizesAreBoundedBeforeTheyAreMultiplied) {
  const int64_t wraps = (int64_t{1} << 62) + 4;  // times head_dim 4 gives 16
  for (const char* key :
       {"num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
        "hidden_size", "intermediate_size", "max_position_embeddings"}) {
    for (const Json& value : {Json(wraps), Json(uint64_t{1} << 63), Json(0), Json(-1), Json(2.5),
                              Json("8"), Json(true)}) {
      Json config = tiny("llama");
      config[key] = value;
      const std::string message = error_of([&] { read(config); });
      EXPECT_NE(message.find("'" + std::string(key) + "'"), std::string::npos) << message;
    }
  }
}

TEST(DenseFamilies, NumbersAreFinite) {
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    for (const char* value : {"1e999", "-1", "\"x\""}) {
      std::string text = tiny("llama").dump();
      text.insert(text.size() - 1, std::string(", \"") + key + "\": " + value);
      if (std::string(key) == "rms_norm_eps") {
        Json config = tiny("llama");
        config.erase("rms_norm_eps");
        text = config.dump();
        text.insert(text.size() - 1, std::string(", \"rms_norm_eps\": ") + value);
      }
      EXPECT_THROW(read(text), Error) << key << " " << value;
    }
  }
}

TEST(DenseFamilies, DeepNestingIsAnError) {
  std::string text = tiny("llama").dump();
  text.insert(text.size() - 1,
              ", \"deep\": " + std::string(100000, '[') + std::string(100000, ']'));
  EXPECT_NE(error_of([&] { read(text); }).find("levels"), std::string::npos);
}

TEST(DenseFamilies, QuantisedCheckpointsAreRefusedByTheirConfiguration) {
  Json config = tiny("llama");
  config["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}};
  const std::string message = error_of([&] { read(config); });
  EXPECT_NE(message.find("quantised (gptq, 4 bits)"), std::string::npos) << message;
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {64, 64}}};
  EXPECT_NE(
      error_of([&] { read(config); }).find("weight_block_size [128, 128], got e4m3 and [64,64]"),
      std::string::npos);
  config["quantization_config"]["weight_block_size"] = {128, 128};
  read(config);
  config["quantization_config"] = {{"quant_method", "mxfp4"}};
  read(config);
}

TEST(RopeConfigs, AreReadInEverySpelling) {
  const auto rope = [](const Json& scaling) {
    Json config = tiny("llama");
    config["rope_parameters"] = scaling;
    return read(config).rope;
  };
  EXPECT_EQ(rope({{"rope_type", "linear"}, {"factor", 3.0}}).scaling, RopeScaling::kLinear);
  const RopeConfig dynamic = rope({{"type", "dynamic"}, {"factor", 3.0}, {"rope_theta", 500.0}});
  EXPECT_EQ(dynamic.scaling, RopeScaling::kDynamic);
  EXPECT_EQ(dynamic.original_length, 256);
  EXPECT_EQ(dynamic.theta, 500.0);
  const RopeConfig yarn = rope({{"type", "yarn"}, {"original_max_position_embeddings", 64}});
  EXPECT_EQ(yarn.factor, 4.0);
  EXPECT_DOUBLE_EQ(yarn.attention_factor, 0.1 * std::log(4.0) + 1);
  const std::vector<double> four(4, 2.0);
  const RopeConfig longrope = rope({{"rope_type", "su"},
                                    {"original_max_position_embeddings", 64},
                                    {"short_factor", four},
                                    {"long_factor", four}});
  EXPECT_DOUBLE_EQ(longrope.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(64.0)));
  for (const Json& bad : std::vector<Json>{
           {{"rope_type", "linear"}},
           {{"rope_type", "linear"}, {"factor", 0.0}},
           {{"rope_type", "unknown"}, {"factor", 2.0}},
           {{"rope_type", "yarn"}, {"type", "linear"}, {"factor", 2.0}},
           {{"rope_type", "yarn"}, {"factor", 2.0}, {"llama_4_scaling_beta", -0.1}},
           {{"rope_type", "default"}, {"llama_4_scaling_beta", 0.1}},
           {{"rope_type", "longrope"}, {"short_factor", {1.0}}, {"long_factor", {1.0}}}}) {
    EXPECT_THROW(rope(bad), Error) << bad.dump();
  }
}

}  // namespace
}  // namespace cambium
