// A supernet's presets: views, unwrapped hybrids, thin supernets, and what their files say.
#include "model/supernet.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "files/golden.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;
using testing::error_of;

constexpr const char* kDelta = "gated_delta_net";
constexpr const char* kWindow = "sliding_window";

/// Layers 0 and 2 choose among attention, a delta net and a window; layer 1 is attention alone.
ModelSpec small_supernet() {
  const UnitSpec attention{"attention", {{"heads", 2}, {"kv_heads", 1}, {"head_dim", 8}}};
  UnitSpec window = attention;
  window.kind = kWindow;
  window.name = mixer_unit_name(kWindow);
  window.options.set("window", int64_t{3});
  const UnitSpec delta{
      kDelta, {{"heads", 2}, {"key_dim", 8}, {"value_dim", 8}}, 1.0F, mixer_unit_name(kDelta)};
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 24;
  spec.width = 16;
  spec.tied_head = true;
  spec.max_positions = 256;
  spec.rope.dim = 8;
  for (int i = 0; i < 3; ++i) {
    LayerSpec layer = decoder_layer(attention, 24);
    if (i != 1) {
      layer.branches.front().units = {attention, delta, window};
      layer.branches.front().active = 0;
    }
    spec.layers.push_back(layer);
  }
  put_preset(spec, {"fast", {1, -1, 1}});
  put_preset(spec, {"middle", {0, -1, 1}});
  return spec;
}

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 10, 3, 7, 12});
  const Tensor logits = model.logits(ctx, model.forward(ctx, batch));
  return {logits.ptr<float>(), logits.ptr<float>() + logits.numel()};
}

class Supernets : public ::testing::Test {
 protected:
  Supernets() { save_model(*whole_.model, dir(), {}); }

  std::string dir() const { return folder_.at("supernet"); }

  const TestFolder folder_;
  const LoadedModel whole_ = fresh_model(small_supernet(), 3);
};

TEST_F(Supernets, ComesBackWithItsPresets) {
  LoadedModel loaded = load_model(dir());
  EXPECT_EQ(loaded.model->spec(), whole_.model->spec());
  EXPECT_EQ(logits_of(*loaded.model), logits_of(*whole_.model));
  const Json config = Json::parse(read_text_file(dir() + "/config.json"));
  EXPECT_EQ(config["presets"][1],
            (Json{{"name", "middle"}, {"mixers", {"attention", "", kDelta}}}));
}

// The three ways to a preset give the same bits: the units made active, a view, a load of its own.
TEST_F(Supernets, EveryWayToAPresetGivesTheSameBits) {
  Model& whole = *whole_.model;
  const std::vector<float> attention = logits_of(whole);
  for (const Preset& preset : whole.spec().presets) {
    LoadedModel view = view_hybrid(whole, preset.active);
    LoadedModel alone = load_model(dir(), {.preset = preset.name});
    EXPECT_FALSE(is_supernet(view.model->spec()));
    EXPECT_EQ(alone.model->spec(), view.model->spec());
    const std::vector<float> logits = logits_of(*view.model);
    EXPECT_NE(logits, attention);
    EXPECT_EQ(logits_of(*alone.model), logits);
    whole.activate(preset.active);
    EXPECT_EQ(layer_map(whole.spec()), layer_map(view.model->spec()));
    EXPECT_EQ(whole.state_layouts().size(), view.model->state_layouts().size());
    EXPECT_EQ(logits_of(whole), logits);
    whole.activate(std::vector<int>{0, -1, 0});
    EXPECT_EQ(logits_of(whole), attention);
  }
}

TEST_F(Supernets, AnUnwrappedPresetIsAPlainCheckpoint) {
  LoadedModel preset = load_model(dir(), {.storage = MatrixStorage::kStored, .preset = "middle"});
  save_model(*preset.model, folder_.at("plain"), {});
  LoadedModel plain = load_model(folder_.at("plain"));
  EXPECT_EQ(layer_map(plain.model->spec()), "AAG");
  EXPECT_EQ(logits_of(*plain.model), logits_of(*preset.model));
  const SafeTensors file = SafeTensors::open(folder_.at("plain"));
  EXPECT_NE(file.find("model.layers.2.mixer.in_proj.weight"), nullptr);
  // What a preset shares with another model is held once.
  LoadedModel sharing = load_model(dir(), {.share = &plain, .preset = "middle"});
  EXPECT_EQ(sharing.weights.bytes(), 0);
}

TEST_F(Supernets, AThinOneKeepsWhatPresetsUse) {
  const ModelSpec thin = thinned(whole_.model->spec(), "here");
  const auto labels_in = [&](size_t layer) {
    std::vector<std::string> labels;
    for (const UnitSpec& unit : thin.layers[layer].choice()->units) {
      labels.push_back(mixer_label(unit));
    }
    return labels;
  };
  EXPECT_EQ(labels_in(0), (std::vector<std::string>{"attention", kDelta}));
  EXPECT_EQ(labels_in(2), (std::vector<std::string>{kDelta}));
  const std::map<std::string, Tensor> tensors = tensors_of(*whole_.model);
  LoadedModel view =
      view_model(thin, *whole_.model, [&](const std::string& name) { return tensors.at(name); });
  save_model(*view.model, folder_.at("thin"), {});
  for (const Preset& preset : thin.presets) {
    LoadedModel from_thin = load_model(folder_.at("thin"), {.preset = preset.name});
    LoadedModel from_whole = load_model(dir(), {.preset = preset.name});
    EXPECT_EQ(from_thin.model->spec(), from_whole.model->spec());
    EXPECT_EQ(logits_of(*from_thin.model), logits_of(*from_whole.model)) << preset.name;
  }
  EXPECT_LT(weight_sizes(folder_.at("thin"), MatrixStorage::kF32).bytes,
            weight_sizes(dir(), MatrixStorage::kF32).bytes);
  EXPECT_EQ(weight_sizes(folder_.at("thin"), MatrixStorage::kF32, "fast").bytes,
            weight_sizes(dir(), MatrixStorage::kF32, "fast").bytes);
}

TEST_F(Supernets, LoadingChecksTheGoldenPromptOfEveryPreset) {
  auto golden = read_golden(dir());
  ASSERT_TRUE(golden.has_value());
  EXPECT_EQ(golden->presets.size(), 2U);
  golden->presets["middle"][0] += 1.0F;
  write_golden(dir(), *golden);
  std::filesystem::remove(dir() + "/checksums.json");
  EXPECT_NE(error_of([&] { load_model(dir()); }).find("preset middle: the golden prompt's logits"),
            std::string::npos);
  load_model(dir(), {.preset = "fast"});
  EXPECT_THROW(load_model(dir(), {.preset = "middle"}), Error);
  golden->presets.erase("middle");
  write_golden(dir(), *golden);
  std::filesystem::remove(dir() + "/checksums.json");
  EXPECT_NE(error_of([&] { load_model(dir()); }).find("has no logits of preset middle"),
            std::string::npos);
}

TEST_F(Supernets, WrongPresetsAreNamed) {
  EXPECT_NE(error_of([&] {
              read_spec(dir(), "fsat");
            }).find("has no preset 'fsat'; did you mean 'fast'?; it has fast, middle"),
            std::string::npos)
      << error_of([&] { read_spec(dir(), "fsat"); });
  ModelSpec plain = unwrapped(whole_.model->spec(), whole_.model->spec().presets[0].active);
  EXPECT_NE(error_of([&] { find_preset(plain, "fast", "it"); }).find("it: is no supernet"),
            std::string::npos);
  EXPECT_NE(error_of([&] { thinned(plain, "it"); }).find("it has no presets"), std::string::npos);
  EXPECT_NE(error_of([&] { put_preset(plain, {"a/b", {}}); }).find("got 'a/b'"), std::string::npos);

  const Json good = Json::parse(read_text_file(dir() + "/config.json"));
  struct Row {
    const char* pointer;
    Json value;
    const char* message;
  };
  const Row rows[] = {
      {"/presets/0/mixers/0", "mamba", "layer 0 has no mixer 'mamba'; it has attention, gated"},
      {"/presets/0/mixers/1", "attention", "layer 1 has one mixer: expected ''"},
      {"/presets/0/mixers", Json::array({"attention"}), "'mixers' of 3 strings"},
      {"/presets/0/name", "", "1 to 100 letters"},
      {"/presets", 5, "expected the list 'presets'"},
      {"/layers/0/branches/0/active", 3, "expected 'active' below 3"},
  };
  for (const Row& row : rows) {
    Json config = good;
    config[Json::json_pointer(row.pointer)] = row.value;
    write_file_atomically(folder_.at("odd.json"), config.dump());
    EXPECT_NE(error_of([&] { read_spec(folder_.at("odd.json")); }).find(row.message),
              std::string::npos)
        << error_of([&] { read_spec(folder_.at("odd.json")); });
  }
}

}  // namespace
}  // namespace cambium
