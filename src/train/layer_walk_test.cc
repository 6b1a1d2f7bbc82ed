#include "train/layer_walk.h"

#include <gtest/gtest.h>

#include "train/testing.h"

namespace cambium {
namespace {

/// Layers below `layer` are base's own; the others are another model's.
LoadedModel changed_from(Model& base, int64_t layer, uint64_t seed) {
  LoadedModel model = fresh_model(base.spec(), seed, 0.3);
  std::map<std::string, Tensor> from;
  base.visit([&](const std::string& name, Parameter& p) { from[name] = p.tensor; });
  model.model->visit([&](const std::string& name, Parameter& p) {
    bool below = name == "embed.weight";
    for (int64_t i = 0; i < layer; ++i) {
      below = below || name.starts_with("layers." + std::to_string(i) + ".");
    }
    if (below) {
      copy_values(p.tensor, from.at(name));
    }
  });
  return model;
}

bool same(const LossSums& a, const LossSums& b) {
  return a.cross_entropy == b.cross_entropy && a.reverse_kl == b.reverse_kl &&
         a.forward_kl == b.forward_kl && a.tokens == b.tokens && a.agreement == b.agreement &&
         a.correct == b.correct;
}

TEST(LayerWalk, GivesTheNumbersOfWholeForwardsBitForBit) {
  const UnitSpec mamba = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
  const UnitSpec attention = testing::attention_mixer();
  LoadedModel base =
      fresh_model(testing::tiny_spec({attention, mamba, attention, attention}), 1, 0.3);
  LoadedModel teacher = fresh_model(testing::tiny_attention(3), 2, 0.3);
  const HeldOut held_out(*testing::copy_task(), 900, 48);
  ASSERT_GT(held_out.groups().size(), 3U);
  for (const bool taught : {true, false}) {
    Model* by = taught ? teacher.model.get() : nullptr;
    // Room for all documents, and for one group at a time.
    for (const int64_t bytes : {int64_t{1} << 30, int64_t{1}}) {
      LayerWalk walk(held_out, *base.model, by, bytes);
      std::vector<std::vector<LossSums>> walked(5);
      int64_t loads = 0;
      for (int64_t first = 0; first < walk.groups(); ++loads) {
        first = walk.load(first, walk.groups());
        for (int64_t layer = 0; layer <= 4; layer += layer == 0 ? 2 : 1) {
          walk.advance(layer);
          LoadedModel model = changed_from(*base.model, layer, 9);
          for (const LossSums& s : walk.measure(*model.model)) {
            walked[static_cast<size_t>(layer)].push_back(s);
          }
        }
      }
      EXPECT_EQ(loads, bytes == 1 ? walk.groups() : 1);
      for (const int64_t layer : {0, 2, 3, 4}) {
        LoadedModel model = changed_from(*base.model, layer, 9);
        const std::vector<LossSums> whole = held_out.measure(*model.model, by);
        const std::vector<LossSums>& ours = walked[static_cast<size_t>(layer)];
        ASSERT_EQ(ours.size(), whole.size());
        for (size_t i = 0; i < whole.size(); ++i) {
          EXPECT_TRUE(same(ours[i], whole[i])) << "layer " << layer << " document " << i;
        }
      }
    }
  }
}

TEST(LayerWalk, ShowsWhatMixersReadAndGive) {
  LoadedModel base = fresh_model(testing::tiny_attention(3), 1, 0.3);
  const HeldOut held_out(*testing::copy_task(), 20, 48);
  LayerWalk walk(held_out, *base.model, nullptr, int64_t{1} << 30);
  walk.load(0, walk.groups());
  Workspace workspace;
  for (const int64_t layer : {0, 2}) {
    walk.advance(layer);
    int64_t groups = 0;
    walk.pass([&](const PackedSequence& group, const MixerTap& tap) {
      std::vector<MixerTap> taps(3);
      Context ctx = workspace.context();
      base.model->forward(ctx, group.batch, {.taps = taps});
      EXPECT_EQ(elements_of(tap.input), elements_of(taps[static_cast<size_t>(layer)].input));
      EXPECT_EQ(elements_of(tap.output), elements_of(taps[static_cast<size_t>(layer)].output));
      ++groups;
    });
    EXPECT_EQ(groups, walk.groups());
  }
}

TEST(HeldOut, FingerprintIsOfTheContents) {
  const auto print = [](uint64_t seed, int64_t documents, int64_t tokens) {
    return HeldOut(*testing::copy_task(seed), documents, tokens).fingerprint();
  };
  EXPECT_EQ(print(7, 5, 48), print(7, 5, 48));
  EXPECT_NE(print(7, 5, 48), print(8, 5, 48));
  EXPECT_NE(print(7, 5, 48), print(7, 6, 48));
  EXPECT_NE(print(7, 5, 48), print(7, 5, 6));
}

}  // namespace
}  // namespace cambium
