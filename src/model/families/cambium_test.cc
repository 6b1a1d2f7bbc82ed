#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "files/checksums.h"
#include "model/spec.h"
#include "model/weights.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

// However many other keys there are, and in whatever place `layers` stands.
TEST(CambiumFamily, ReadsItsLayersAmongAnyNumberOfOtherKeys) {
  const Json attention = {{"mixer", "attention"},
                          {"options", {{"heads", 2}, {"kv_heads", 1}, {"head_dim", 4}}},
                          {"intermediate_size", 12}};
  const Json window = {
      {"mixer", "sliding_window"},
      {"options", {{"heads", 2}, {"kv_heads", 1}, {"head_dim", 4}, {"window", 5}, {"sinks", 3}}},
      {"intermediate_size", 16}};
  const TestFolder folder;
  for (int more = 0; more < 40; ++more) {
    Json config = {{"model_type", "cambium"},
                   {"vocab_size", 30},
                   {"hidden_size", 8},
                   {"rope_dim", 4},
                   {"layers", {attention, window, attention}}};
    for (int i = 0; i < more; ++i) {
      config["other_" + std::to_string(i)] = i;
    }
    write_file_atomically(folder.at("config.json"), config.dump());
    const ModelSpec spec = read_spec(folder.path());
    ASSERT_EQ(layer_map(spec), "AWA") << more;
    EXPECT_EQ(spec.layers[1].feed_forward()->options.integer("swiglu", "inner"), 16);
    EXPECT_EQ(spec.layers[1].mixer()->options.integer("window", "window"), 5);
    EXPECT_EQ(spec.layers[1].mixer()->options.integer("window", "sinks"), 3);
  }
}

// The short form of a layer has a place for neither: such layers are written by branches.
TEST(CambiumFamily, BiasesOfTheFeedForwardAndNamesOfMixersAreKept) {
  const Family& family = find_family("llama");
  ModelSpec spec = family.read_config(Json({{"model_type", "llama"},
                                            {"vocab_size", 30},
                                            {"hidden_size", 8},
                                            {"intermediate_size", 12},
                                            {"num_hidden_layers", 3},
                                            {"num_attention_heads", 2},
                                            {"num_key_value_heads", 1},
                                            {"max_position_embeddings", 64},
                                            {"attention_bias", true},
                                            {"mlp_bias", true}})
                                          .dump(),
                                      "here");
  ASSERT_TRUE(spec.layers[0].feed_forward()->options.flag("swiglu", "bias", false));
  spec.layers[1].mixer()->name = "mixer_of_old";
  spec.family = "cambium";
  const Family& own = find_family("cambium");
  const ModelSpec back = own.read_config(own.write_config(spec), "here");
  EXPECT_EQ(back.layers, spec.layers);
}

// transformers finds its code by auto_map, and every file of it is what stands in the repository.
TEST(CambiumFamily, TravelsWithItsCode) {
  const std::string source = std::string(kSourceDir) + "/src/model/transformers";
  ModelSpec spec = read_spec(std::string(kSourceDir) + "/tests/fixtures/llama");
  spec.family = "cambium";
  const TestFolder folder;
  const LoadedModel made = fresh_model(spec, 1);
  save_model(*made.model, folder.at("m"), {});
  const auto sums = read_checksums(folder.at("m"));
  ASSERT_TRUE(sums.has_value());
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(source)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".py")) {
      EXPECT_EQ(read_text_file(folder.at("m") + "/" + name), read_text_file(entry.path().string()));
      EXPECT_TRUE(sums->contains(name)) << name;
      ++files;
    }
  }
  EXPECT_EQ(files, find_family("cambium").code.size());
  const auto config = nlohmann::json::parse(read_text_file(folder.at("m") + "/config.json"));
  for (const auto& [name, place] : config.at("auto_map").items()) {
    const std::string text = place.get<std::string>();
    const size_t dot = text.find('.');
    const std::string code = read_text_file(source + "/" + text.substr(0, dot) + ".py");
    EXPECT_NE(code.find("class " + text.substr(dot + 1) + "("), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace cambium
