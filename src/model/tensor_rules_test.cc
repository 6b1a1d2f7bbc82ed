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
      {"layers.*.mixer.*", "l.*.mamba.*"}};
  ModelSpec spec;
  spec.layers = {decoder_layer({"mamba"}, 4), decoder_layer({"attention"}, 4)};
  EXPECT_EQ(stored_names(rules, spec, "embed.weight").size(), 1U);
  spec.tied_head = true;
  EXPECT_EQ(stored_names(rules, spec, "embed.weight").at(1), "lm_head.weight");
  EXPECT_EQ(stored_names(rules, spec, "layers.0.mixer.D").at(0), "l.0.mamba.D");
  EXPECT_EQ(stored_names(rules, spec, "layers.1.mixer.D").at(0), "l.1.attn.D");
}

/// For every element of `ours`, in order, the place in its stored tensor: "tensor:place".
std::vector<std::string> places(const StoredForm& form, int64_t count) {
  std::vector<std::string> result(static_cast<size_t>(count));
  for (const StoredPiece& piece : form) {
    std::vector<std::pair<int64_t, int64_t>> at = {{piece.ours, piece.theirs}};
    for (const PieceLoop& loop : piece.loops) {
      std::vector<std::pair<int64_t, int64_t>> more;
      for (const auto& [ours, theirs] : at) {
        for (int64_t i = 0; i < loop.count; ++i) {
          more.emplace_back(ours + i * loop.ours, theirs + i * loop.theirs);
        }
      }
      at = more;
    }
    for (const auto& [ours, theirs] : at) {
      std::string& place = result.at(static_cast<size_t>(ours));
      EXPECT_TRUE(place.empty()) << place;
      place = piece.tensor + ":" + std::to_string(theirs);
    }
  }
  return result;
}

struct FormCase {
  const char* what;
  TensorRule rule;
  std::map<std::string, Parameter> parameters;
  const char* ours;
  std::vector<int64_t> shape;       // of the stored tensor
  std::vector<std::string> places;  // of the parameter's elements
};

TEST(TensorRules, RowsOfAFusedTensorGoToTheirParameters) {
  const std::string unit = "layers.0.mixer.";
  const std::map<std::string, Parameter> qkv = {{unit + "q.weight", {.shape = {2, 2}}},
                                                {unit + "k.weight", {.shape = {1, 2}}}};
  const TensorRule joined{.theirs = "t.*.*", .rows = {"layers.*.mixer.q.*", "layers.*.mixer.k.*"}};
  TensorRule by_head = joined;
  by_head.groups = "heads";
  TensorRule turns = joined;
  turns.groups = kEveryRow;
  TensorRule turned = turns;
  turned.transposed = true;
  turned.stacked = true;
  TensorRule numbered{.ours = "layers.*.mixer.e", .theirs = "t.*.#"};
  const TensorRule blocks{.theirs = "t.*.conv",
                          .rows = {"layers.*.mixer.c:x", "layers.*.mixer.c:B"}};
  const std::vector<FormCase> cases = {
      {"unequal parts",
       joined,
       qkv,
       "layers.0.mixer.k.weight",
       {3, 2},
       {"t.0.weight:4", "t.0.weight:5"}},
      {"by head",
       by_head,
       {{unit + "q.w", {.shape = {4}}}, {unit + "k.w", {.shape = {2}}}},
       "layers.0.mixer.q.w",
       {6},
       {"t.0.w:0", "t.0.w:1", "t.0.w:3", "t.0.w:4"}},
      {"even and odd",
       turns,
       {{unit + "q.w", {.shape = {2}}}, {unit + "k.w", {.shape = {2}}}},
       "layers.0.mixer.k.w",
       {4},
       {"t.0.w:1", "t.0.w:3"}},
      {"a stack, turned",
       turned,
       {{unit + "q.w", {.shape = {2, 1, 2}}}, {unit + "k.w", {.shape = {2, 1, 2}}}},
       "layers.0.mixer.k.w",
       {2, 2, 2},
       {"t.0.w:1", "t.0.w:3", "t.0.w:5", "t.0.w:7"}},
      {"a tensor an entry",
       numbered,
       {{unit + "e", {.shape = {2, 1, 2}}}},
       "layers.0.mixer.e",
       {1, 2},
       {"t.0.0:0", "t.0.0:1", "t.0.1:0", "t.0.1:1"}},
      {"row blocks",
       blocks,
       {{unit + "c", {.shape = {3, 1}, .blocks = {{"B", 2}, {"x", 1}}}}},
       "layers.0.mixer.c",
       {3, 1},
       {"t.0.conv:1", "t.0.conv:2", "t.0.conv:0"}},
  };
  ModelSpec spec;
  spec.layers = {decoder_layer({"attention", {{"heads", int64_t{2}}}}, 4)};
  for (const FormCase& c : cases) {
    SCOPED_TRACE(c.what);
    ParametersByName parameters;
    for (const auto& [name, parameter] : c.parameters) {
      parameters[name] = &parameter;
    }
    const StoredForm form = stored_forms({c.rule}, spec, parameters, c.ours).front();
    EXPECT_EQ(form.front().shape, c.shape);
    EXPECT_EQ(places(form, parameters.at(c.ours)->numel()), c.places);
  }
}

}  // namespace
}  // namespace cambium
