#include "model/tensor_rules.h"

#include <gtest/gtest.h>

#include "model/spec.h"

namespace cambium {
namespace {

TEST(TensorRules, StarsTakeWhatTheyMatched) {
  std::vector<std::string_view> captures;
  ASSERT_TRUE(match_pattern("layers.*.mixer.*", "layers.12.mixer.q_proj.weight", &captures));
  EXPECT_EQ(captures, (std::vector<std::string_view>{"12", "q_proj.weight"}));
  EXPECT_FALSE(match_pattern("layers.*.mixer.*", "layers.12.mixer."));
  EXPECT_FALSE(match_pattern("layers.*.mixer.*", "layers.12.feed_forward.up.weight"));
  EXPECT_TRUE(match_pattern("*rotary_emb.inv_freq", "model.layers.0.rotary_emb.inv_freq"));
  EXPECT_FALSE(match_pattern("*rotary_emb.inv_freq", "model.layers.0.rotary_emb.inv_freq2"));
  EXPECT_TRUE(match_pattern("norm.weight", "norm.weight"));
  EXPECT_FALSE(match_pattern("norm.weight", "norm.weights"));
}

TEST(TensorRules, TheFirstRowIsWrittenAndAllAreRead) {
  const std::vector<TensorRule> rules = {
      {"embed.weight", "model.embed_tokens.weight"},
      {.ours = "embed.weight", .theirs = "lm_head.weight", .tied = true},
      {.ours = "layers.*.mixer.*", .theirs = "l.*.attn.*", .mixer = "attention"},
      {"layers.*.mixer.*", "l.*.mamba.*"},
      {.ours = "layers.*.feed_forward.up.*", .theirs = "l.*.gate_up.*", .part = 1, .parts = 2}};
  ModelSpec spec;
  spec.layers = {decoder_layer({"mamba"}, 4), decoder_layer({"attention"}, 4)};
  EXPECT_EQ(stored_names(rules, spec, "embed.weight").size(), 1U);
  spec.tied_head = true;
  EXPECT_EQ(stored_names(rules, spec, "embed.weight").at(1).tensor, "lm_head.weight");
  EXPECT_EQ(stored_names(rules, spec, "layers.0.mixer.D").at(0).tensor, "l.0.mamba.D");
  EXPECT_EQ(stored_names(rules, spec, "layers.1.mixer.D").at(0).tensor, "l.1.attn.D");
  const StoredName up = stored_names(rules, spec, "layers.1.feed_forward.up.weight").at(0);
  EXPECT_EQ(up.tensor, "l.1.gate_up.weight");
  EXPECT_EQ(up.part, 1);
  EXPECT_EQ(up.parts, 2);
}

}  // namespace
}  // namespace cambium
