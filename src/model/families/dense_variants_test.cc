// Gemma, OLMo, Phi-3, Granite, SmolLM3 and Apertus: defaults, older and newer spellings, what is
// refused. Their numbers are checked by the fixtures (tests/eval/parity_test.cc).
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "model/families/testing.h"
#include "model/weights.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using testing::error_of;
using testing::Json;
using testing::read;
using testing::tiny;

/// Of each layer: F full or W windowed, and the rotation it turns by (- for none).
std::string layers(const ModelSpec& spec) {
  std::string text;
  for (const LayerSpec& layer : spec.layers) {
    const Options& o = layer.mixer()->options;
    text += o.integer("attention", "window", 0) > 0 ? 'W' : 'F';
    text += o.flag("attention", "rope", true) ? std::to_string(layer.rope) : "-";
  }
  return text;
}

TEST(DenseVariants, WhatIsNotSaidIsAsInTransformers) {
  struct Case {
    const char* type;
    double theta;
    float eps;
  };
  for (const Case& c :
       {Case{"llama", 1e4, 1e-6F}, Case{"olmo2", 1e4, 1e-5F}, Case{"olmo3", 5e5, 1e-5F},
        Case{"phi3", 1e4, 1e-5F}, Case{"smollm3", 2e6, 1e-6F}, Case{"gemma3_text", 1e6, 1e-6F},
        Case{"apertus", 1.2e7, 1e-5F}}) {
    Json config = tiny(c.type);
    config.erase("rms_norm_eps");
    const ModelSpec spec = read(config);
    EXPECT_EQ(spec.rope.theta, c.theta) << c.type;
    EXPECT_EQ(spec.norm.eps, c.eps) << c.type;
    config["rope_theta"] = 777.0;
    config["rms_norm_eps"] = 1e-3;
    EXPECT_EQ(read(config).rope.theta, 777.0) << c.type;
    EXPECT_EQ(read(config).norm.eps, 1e-3F) << c.type;
  }
  // Apertus turns by llama3's rule where nothing is said, and plainly where null is.
  Json config = tiny("apertus");
  EXPECT_EQ(read(config).rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(read(config).rope.factor, 8.0);
  config["rope_scaling"] = nullptr;
  const ModelSpec plain = read(config);
  EXPECT_EQ(plain.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(read(find_family("apertus").write_config(plain)), plain);
}

TEST(DenseVariants, LayersFollowTheFamilysDefaultOrItsList) {
  struct Case {
    const char* type;
    Json more;
    const char* expected;
  };
  const Json scaled = {{"rope_type", "linear"}, {"factor", 2.0}};
  const std::vector<Case> cases = {
      {"gemma2", {}, "W0F0W0F0"},
      {"gemma3_text", {{"sliding_window_pattern", 3}}, "W1W1F0W1"},
      {"gemma3_text", {}, "W1W1W1W1"},
      {"olmo2", {}, "F0F0F0F0"},
      {"olmo3", {}, "W0W0W0F0"},
      {"olmo3", {{"rope_scaling", scaled}}, "W1W1W1F0"},
      {"olmo3",
       {{"rope_scaling", scaled},
        {"layer_types",
         {"full_attention", "sliding_attention", "full_attention", "full_attention"}}},
       "F0W1F0F0"},
      {"phi3", {{"sliding_window", nullptr}}, "F0F0F0F0"},
      {"phi3", {{"sliding_window", 9}}, "W0W0W0W0"},
      {"smollm3", {}, "F0F0F0F-"},
      {"smollm3", {{"no_rope_layers", {0, 1, 0, 1}}}, "F-F0F-F0"},
      {"smollm3", {{"no_rope_layer_interval", 2}}, "F0F-F0F-"},
      {"granite", {}, "F0F0F0F0"},
      {"apertus", {}, "F0F0F0F0"}};
  for (const Case& c : cases) {
    Json config = tiny(c.type, 4);
    config.update(c.more.is_null() ? Json::object() : c.more);
    const ModelSpec spec = read(config);
    EXPECT_EQ(layers(spec), c.expected) << config.dump();
    EXPECT_TRUE(expresses(find_family(spec.family), spec)) << config.dump();
    EXPECT_TRUE(expresses(find_family("cambium"), spec)) << config.dump();
  }
}

TEST(DenseVariants, CapsAreDefaultsWhereTheKeyIsAbsentAndNoneWhereItIsNull) {
  const auto caps = [](const Json& config) {
    const ModelSpec spec = read(config);
    return std::pair(spec.logit_cap,
                     spec.layers[0].mixer()->options.real("attention", "softcap", 0.0));
  };
  Json config = tiny("gemma2");
  EXPECT_EQ(caps(config), std::pair(30.0F, 50.0));
  config["final_logit_softcapping"] = nullptr;
  config["attn_logit_softcapping"] = 7.0;
  EXPECT_EQ(caps(config), std::pair(0.0F, 7.0));
  EXPECT_EQ(caps(tiny("gemma3_text")), std::pair(0.0F, 0.0));
}

TEST(DenseVariants, NewerFilesSayRotationsByKindOfLayer) {
  Json old_file = tiny("gemma3_text");
  old_file["rope_theta"] = 5e5;
  old_file["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  old_file["rope_local_base_freq"] = 2e4;
  Json new_file = tiny("gemma3_text");
  new_file["rope_parameters"] = {
      {"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 5e5}}},
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 2e4}}}};
  EXPECT_EQ(read(new_file), read(old_file));
  EXPECT_EQ(read(new_file).more_ropes.at(0).theta, 2e4);
  Json llama = tiny("llama");
  llama["rope_parameters"] = new_file["rope_parameters"];
  EXPECT_NE(error_of([&] { read(llama); }).find("rotations by kind of layer"), std::string::npos);
}

TEST(DenseVariants, LongropeHasOlderNames) {
  Json config = tiny("phi3");
  config["original_max_position_embeddings"] = 64;
  const std::vector<double> four = {1.0, 1.5, 2.0, 2.5};
  for (const char* name : {"longrope", "su", "yarn"}) {
    config["rope_scaling"] = {{"type", name}, {"short_factor", four}, {"long_factor", four}};
    const ModelSpec spec = read(config);
    EXPECT_EQ(spec.rope.scaling, RopeScaling::kLongRope) << name;
    EXPECT_EQ(spec.rope.factor, 4.0);
    EXPECT_TRUE(expresses(find_family("phi3"), spec)) << name;
  }
}

TEST(DenseVariants, WhatIsNotSupportedIsNamed) {
  const auto refusal = [](const char* type, const char* key, const Json& value) {
    Json config = tiny(type, 4);
    config[key] = value;
    return error_of([&] { read(config); });
  };
  EXPECT_NE(refusal("gemma3_text", "use_bidirectional_attention", true).find("later ones"),
            std::string::npos);
  EXPECT_NE(refusal("gemma2", "hidden_activation", "gelu").find("gelu_pytorch_tanh, got 'gelu'"),
            std::string::npos);
  EXPECT_NE(refusal("apertus", "hidden_act", "silu").find("xielu, got 'silu'"), std::string::npos);
  EXPECT_NE(refusal("apertus", "qk_norm", false).find("qk_norm true"), std::string::npos);
  EXPECT_NE(refusal("smollm3", "no_rope_layers", {1, 0}).find("list 'no_rope_layers' of 4"),
            std::string::npos);
  EXPECT_NE(refusal("granite", "logits_scaling", 0.0).find("'logits_scaling'"), std::string::npos);
}

/// The fixture's tensors under other names, beside one that is not the text's.
void write_composite(const std::string& to, const SafeTensors& from, const std::string& prefix,
                     size_t cut) {
  std::vector<TensorSource> sources;
  for (const TensorEntry& entry : from.tensors()) {
    sources.push_back(TensorSource::from_memory(prefix + entry.name.substr(cut), entry.dtype,
                                                entry.shape, entry.data));
  }
  const float pixel = 1.0F;
  sources.push_back(
      TensorSource::from_memory("vision_tower.patch.weight", StoredType::kF32, {1}, &pixel));
  write_safetensors(to + "/model.safetensors", std::move(sources));
}

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 100, 3});
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

TEST(DenseVariants, Gemma3WithImagesIsReadForItsText) {
  const std::string dir = std::string(kSourceDir) + "/tests/fixtures/gemma3";
  const LoadedModel text = load_model(dir);
  const SafeTensors file = SafeTensors::open(dir);
  const Json inner = Json::parse(read_text_file(dir + "/config.json"));
  const TestFolder folder;
  write_file_atomically(
      folder.at("config.json"),
      Json{{"model_type", "gemma3"}, {"text_config", inner}, {"vision_config", Json::object()}}
          .dump());
  for (const auto& [prefix, cut] :
       {std::pair("language_model.model.", 6), {"model.language_model.", 6}}) {
    write_composite(folder.path(), file, prefix, static_cast<size_t>(cut));
    const LoadedModel composite = load_model(folder.path());
    EXPECT_EQ(composite.model->spec(), text.model->spec()) << prefix;
    EXPECT_EQ(logits_of(*composite.model), logits_of(*text.model)) << prefix;
  }
}

TEST(DenseVariants, AConstantOfAnotherValueIsRefused) {
  const std::string dir = std::string(kSourceDir) + "/tests/fixtures/apertus";
  const SafeTensors file = SafeTensors::open(dir);
  const TestFolder folder;
  write_file_atomically(folder.at("config.json"), read_text_file(dir + "/config.json"));
  const float other = 0.25F;
  std::vector<TensorSource> sources;
  for (const TensorEntry& entry : file.tensors()) {
    const bool changed = entry.name == "model.layers.1.mlp.act_fn.beta";
    sources.push_back(
        TensorSource::from_memory(entry.name, changed ? StoredType::kF32 : entry.dtype, entry.shape,
                                  changed ? static_cast<const void*>(&other) : entry.data));
  }
  write_safetensors(folder.at("model.safetensors"), std::move(sources));
  EXPECT_NE(error_of([&] {
              load_model(folder.path());
            }).find("model.layers.1.mlp.act_fn.beta () is expected to be 0.5"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
