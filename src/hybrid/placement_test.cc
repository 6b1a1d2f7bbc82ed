#include "hybrid/placement.h"

#include <gmock/gmock.h>

#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/importance.h"
#include "train/testing.h"

namespace cambium {
namespace {

TEST(Placement, LowestUniformAndBudgets) {
  Importance importance{"mmr", "loss", {}, {}};
  const double scores[] = {5.0, 1.0, 3.0, 1.0, 9.0, 2.0};
  for (int64_t i = 0; i < 6; ++i) {
    importance.layers.push_back({i, scores[i], 0.0});
  }
  EXPECT_EQ(importance.order(), (std::vector<int64_t>{1, 3, 5, 2, 0, 4}));
  EXPECT_EQ(place_lowest(importance, 3), (std::vector<int64_t>{1, 3, 5}));
  EXPECT_THROW(place_lowest(importance, 7), Error);
  ModelSpec spec = testing::tiny_attention(6);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("kv_heads", int64_t{2});
  }
  EXPECT_EQ(place_uniform(spec, 3), (std::vector<int64_t>{1, 3, 5}));
  EXPECT_EQ(layers_to_convert(spec, 0.5), 3);
  // 2 kv heads x (8 + 8) values x 4 bytes = 128 bytes a token and layer.
  const auto by_cache = [](const ModelSpec& model, int64_t bytes, const LayerChooser& choose,
                           Dtype values = Dtype::kF32) {
    return place_for_cache(model, bytes, values, choose);
  };
  const LayerChooser lowest = lowest_of(importance);
  using Layers = std::vector<int64_t>;
  EXPECT_EQ(by_cache(spec, 6 * 128, lowest), Layers{});
  EXPECT_EQ(by_cache(spec, 300, lowest), (Layers{1, 2, 3, 5}));
  EXPECT_EQ(by_cache(spec, 300, spread_evenly), place_uniform(spec, 4));
  // As served, in bf16: 64.
  EXPECT_EQ(by_cache(spec, 6 * 64, lowest, Dtype::kBF16), Layers{});
  EXPECT_EQ(by_cache(spec, 300, lowest, Dtype::kBF16), (Layers{1, 3}));
  // Layers behind a window take nothing of a long text: converting them would be for nothing.
  ModelSpec windows = spec;
  for (const size_t layer : {1, 3, 5}) {
    windows.layers[layer].mixer()->options.set("window", int64_t{4});
  }
  EXPECT_EQ(by_cache(windows, 2 * 128, lowest), (Layers{2}));
  EXPECT_EQ(by_cache(windows, 2 * 128, spread_evenly), (Layers{2}));
  EXPECT_EQ(by_cache(windows, 0, lowest), (Layers{0, 2, 4}));
  std::vector<BranchSpec>& branches = windows.layers[0].branches;
  branches.erase(branches.begin());  // no mixer at all
  EXPECT_EQ(layers_with_mixer(windows), 5);
  EXPECT_EQ(layers_to_convert(windows, 1.0), 5);
  EXPECT_THAT(testing::error_of([&] {
                spread_evenly({1, 2}, 3);
              }),
              ::testing::HasSubstr("3 layers are to be converted, but only 2"));
}

TEST(Importance, ResumesPerLayerAndRefusesOtherRuns) {
  const TestFolder folder;
  const std::filesystem::path path = std::filesystem::path(folder.path()) / "scores.json";
  int calls = 0;
  const auto score = [&](int64_t layer) {
    if (calls == 2) {
      fail("killed");
    }
    ++calls;
    return static_cast<double>(10 - layer);
  };
  const Importance start{"mmr", "loss", {{"model", "one"}}, {}};
  EXPECT_THROW(score_layers({0, 1, 2, 3}, start, score, path, nullptr), Error);
  calls = 0;
  const Importance all = score_layers({0, 1, 2, 3}, start, score, path, nullptr);
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(all.order(), (std::vector<int64_t>{3, 2, 1, 0}));
  EXPECT_EQ(read_importance(path).order(), all.order());
  calls = 0;
  EXPECT_THROW(
      score_layers({0, 1, 2}, {"mmr", "loss", {{"model", "two"}}, {}}, score, path, nullptr),
      Error);
}

}  // namespace
}  // namespace cambium
