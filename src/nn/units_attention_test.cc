// Attention, with a window and over latents.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"
#include "nn/testing_units.h"
#include "nn/units/units.h"
#include "tensor/copy.h"

namespace cambium {

std::vector<testing::UnitCase> testing::attention_cases() {
  const Options attention = {
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{6}}};
  const std::map<std::string, std::vector<int64_t>> plain = {{"q_proj.weight", {24, 12}},
                                                             {"k_proj.weight", {12, 12}},
                                                             {"v_proj.weight", {12, 12}},
                                                             {"o_proj.weight", {12, 24}}};
  const Options latent = {{"heads", int64_t{3}},
                          {"kv_rank", int64_t{8}},
                          {"nope_dim", int64_t{5}},
                          {"rope_dim", int64_t{6}},
                          {"value_dim", int64_t{4}}};
  auto normed = plain;
  normed.insert({{"q_norm.weight", {6}}, {"k_norm.weight", {6}}});
  auto indexed = normed;
  indexed.insert({{"indexer.q_proj.weight", {16, 12}},
                  {"indexer.k_proj.weight", {8, 12}},
                  {"indexer.q_norm.weight", {8}},
                  {"indexer.k_norm.weight", {8}}});
  auto normed_width = plain;
  normed_width.insert({{"q_norm.weight", {24}},
                       {"q_norm.bias", {24}},
                       {"k_norm.weight", {12}},
                       {"k_norm.bias", {12}}});
  auto gated = plain;
  gated["q_proj.weight"] = {48, 12};
  auto gated_and_cooled = gated;
  gated_and_cooled.insert({{"temperature", {4}}, {"q_norm.weight", {6}}, {"k_norm.weight", {6}}});
  auto cooled = plain;
  cooled["temperature"] = {2};
  auto with_sinks = plain;
  with_sinks["sinks"] = {4};
  auto biased = plain;
  biased.insert(
      {{"q_proj.bias", {24}}, {"k_proj.bias", {12}}, {"v_proj.bias", {12}}, {"o_proj.bias", {12}}});
  return {
      {"attention", {"attention", attention}, plain},
      {"attention without rope", {"attention", with(attention, {{"rope", false}})}, plain},
      {"attention with scales",
       {"attention", with(attention, {{"scale", 0.2}, {"key_scale", 0.7}})},
       plain},
      {"attention with norms of q and k",
       {"attention", with(attention, {{"qk_norm_eps", 1e-6}})},
       normed},
      {"attention with zero-centred norms",
       {"attention", with(attention, {{"qk_norm_eps", 1e-6}, {"qk_norm", "zero_centred"}})},
       normed},
      {"attention with norms over the width",
       {"attention",
        with(attention, {{"qk_norm_eps", 1e-6}, {"qk_norm_over", "width"}, {"qk_norm", "layer"}})},
       normed_width},
      {"attention with biases",
       {"attention", with(attention, {{"qkv_bias", true}, {"out_bias", true}})},
       biased},
      {"attention with an output gate", {"attention", with(attention, {{"gate", true}})}, gated},
      {"attention with a soft cap", {"attention", with(attention, {{"softcap", 0.3}})}, plain},
      {"attention with sinks' scores",
       {"attention", with(attention, {{"sink_logits", true}})},
       with_sinks},
      {"attention with a temperature of its queries, beside norms and a gate",
       {"attention",
        with(attention, {{"temperature", "query"}, {"qk_norm_eps", 1e-6}, {"gate", true}})},
       gated_and_cooled},
      {"attention with a temperature of its keys",
       {"attention", with(attention, {{"temperature", "key"}, {"rope", false}})},
       cooled},
      {"sliding window with everything",
       {"sliding_window", with(attention, {{"window", int64_t{5}},
                                           {"sinks", int64_t{2}},
                                           {"softcap", 0.5},
                                           {"sink_logits", true}})},
       with_sinks},
      {"attention with an output gate, without rope",
       {"attention", with(attention, {{"gate", true}, {"rope", false}})},
       gated},
      {"sliding window", {"sliding_window", with(attention, {{"window", int64_t{5}}})}, plain},
      {"sliding window with sinks",
       {"sliding_window", with(attention, {{"window", int64_t{5}}, {"sinks", int64_t{2}}})},
       plain},
      {"latent attention",
       {"latent_attention", latent},
       {{"q_proj.weight", {33, 12}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"o_proj.weight", {12, 12}}}},
      {"latent attention with an index, a gate and a latent of queries",
       {"latent_attention", with(latent, {{"q_rank", int64_t{10}},
                                          {"gate", true},
                                          {"scale", 0.4},
                                          {"index_heads", int64_t{2}},
                                          {"index_dim", int64_t{7}},
                                          {"index_top", int64_t{6}}})},
       {{"q_a_proj.weight", {10, 12}},
        {"q_a_norm.weight", {10}},
        {"q_b_proj.weight", {33, 10}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"indexer.q_proj.weight", {14, 10}},
        {"indexer.k_proj.weight", {7, 12}},
        {"indexer.k_norm.weight", {7}},
        {"indexer.k_norm.bias", {7}},
        {"indexer.weights_proj.weight", {2, 12}},
        {"gate_proj.weight", {3, 12}},
        {"o_proj.weight", {12, 12}}}},
      {"latent attention with pools of an index",
       {"latent_attention", with(latent, {{"q_rank", int64_t{10}},
                                          {"index_heads", int64_t{2}},
                                          {"index_dim", int64_t{7}},
                                          {"index_of", "pools"},
                                          {"index_top", int64_t{2}},
                                          {"index_size", int64_t{3}}})},
       {{"q_a_proj.weight", {10, 12}},
        {"q_a_norm.weight", {10}},
        {"q_b_proj.weight", {33, 10}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"indexer.q_proj.weight", {14, 10}},
        {"indexer.k_proj.weight", {7, 12}},
        {"indexer.k_norm.weight", {7}},
        {"indexer.k_norm.bias", {7}},
        {"indexer.weights_proj.weight", {2, 12}},
        {"o_proj.weight", {12, 12}}}},
      {"attention to blocks that an index chooses",
       {"attention", with(attention, {{"qk_norm_eps", 1e-5},
                                      {"index_heads", int64_t{2}},
                                      {"index_dim", int64_t{8}},
                                      {"index_top", int64_t{3}},
                                      {"index_size", int64_t{4}},
                                      {"index_local", int64_t{2}}})},
       indexed},
      {"attention to tokens that an index chooses",
       {"attention", with(attention, {{"qk_norm_eps", 1e-5},
                                      {"index_heads", int64_t{2}},
                                      {"index_dim", int64_t{8}},
                                      {"index_of", "tokens"},
                                      {"index_top", int64_t{5}}})},
       indexed},
      {"attention to pools that an index chooses",
       {"attention", with(attention, {{"qk_norm_eps", 1e-5},
                                      {"index_heads", int64_t{2}},
                                      {"index_dim", int64_t{8}},
                                      {"index_of", "pools"},
                                      {"index_top", int64_t{2}},
                                      {"index_size", int64_t{4}}})},
       indexed},
      {"sliding window on latents",
       {"sliding_window", with(latent, {{"window", int64_t{5}}})},
       {{"q_proj.weight", {33, 12}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"o_proj.weight", {12, 12}}}},
      {"sliding window on latents with sinks, a gate and a latent of queries",
       {"sliding_window", with(latent, {{"window", int64_t{4}},
                                        {"sinks", int64_t{2}},
                                        {"q_rank", int64_t{10}},
                                        {"gate", true}})},
       {{"q_a_proj.weight", {10, 12}},
        {"q_a_norm.weight", {10}},
        {"q_b_proj.weight", {33, 10}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"gate_proj.weight", {3, 12}},
        {"o_proj.weight", {12, 12}}}},
  };
}

namespace {

using testing::kWidth;
using testing::with;

// Prompts that begin in a call are expanded, and the sequences beside them are not.
TEST(Units, LatentAttentionGivesEachSequenceTheSameBesideOthers) {
  const Options latent = {{"heads", int64_t{3}},
                          {"kv_rank", int64_t{8}},
                          {"nope_dim", int64_t{5}},
                          {"rope_dim", int64_t{6}},
                          {"value_dim", int64_t{4}}};
  const std::vector<int64_t> lengths = {1, 7, 4, 2, 6};
  const std::vector<int64_t> behind = {5, 0, 0, 3, 0};
  for (const UnitSpec& spec :
       {UnitSpec{"latent_attention", latent},
        UnitSpec{"sliding_window", with(latent, {{"window", int64_t{3}}})}}) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const auto unit = make_unit(spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF32);
    const testing::State all(unit->state_layout(), 8, 5);
    Batch together;
    std::vector<double> alone;
    std::vector<OwnedTensor> inputs;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const testing::State own(unit->state_layout(), 8);
      const auto seed = static_cast<uint64_t>(s);
      const OwnedTensor before = testing::random_rows(8, kWidth, Dtype::kF32, 30 + seed);
      inputs.push_back(testing::random_rows(lengths[s], kWidth, Dtype::kF32, 50 + seed));
      for (const UnitState& state : {own.view(), all.view(static_cast<int64_t>(s))}) {
        if (behind[s] > 0) {
          testing::run(ctx, *unit, before.view.slice(0, 0, behind[s]),
                       testing::piece(behind[s], 0, 0), rope, &state);
        }
      }
      const UnitState state = own.view();
      const auto y = testing::values_of(testing::run(
          ctx, *unit, inputs.back().view, testing::piece(lengths[s], behind[s], 0), rope, &state));
      alone.insert(alone.end(), y.begin(), y.end());
      together.add(std::vector<int32_t>(static_cast<size_t>(lengths[s])), behind[s], 0);
    }
    const OwnedTensor x(Dtype::kF32, {together.size(), kWidth});
    for (int64_t s = 0, t = 0; s < std::ssize(lengths); t += lengths[static_cast<size_t>(s++)]) {
      const OwnedTensor& from = inputs[static_cast<size_t>(s)];
      copy(x.view.slice(0, t, from.view.dim(0)), from.view);
    }
    const UnitState state = all.view();
    EXPECT_EQ(testing::values_of(testing::run(ctx, *unit, x.view, together, rope, &state)), alone)
        << spec.kind;
  }
}

// Without norms a temperature is a factor of rows.
TEST(Units, ATemperatureIsAFactorOfAHeadsScores) {
  const Options plain = {{"heads", int64_t{4}},
                         {"kv_heads", int64_t{2}},
                         {"head_dim", int64_t{6}},
                         {"qkv_bias", true}};
  for (const std::string of : {"query", "key"}) {
    const auto unit = make_unit({"attention", with(plain, {{"temperature", of}})}, kWidth);
    const testing::Memory memory(*unit, Dtype::kF64);
    const auto without = make_unit({"attention", plain}, kWidth);
    const testing::Memory memory_without(*without, Dtype::kF64);
    const std::vector<double> factors =
        of == "query" ? std::vector{0.5, 1.5, -1.0, 3.0} : std::vector{0.25, 2.0};
    std::map<std::string, std::vector<double>> values;
    unit->visit([&](const std::string& name, Parameter& p) {
      if (name == "temperature") {
        std::copy(factors.begin(), factors.end(), p.tensor.ptr<double>());
      }
      values[name] = testing::values_of(p.tensor);
    });
    without->visit([&](const std::string& name, Parameter& p) {
      std::vector<double> v = values.at(name);
      for (size_t i = 0; name.starts_with(of == "query" ? "q_" : "k_") && i < v.size(); ++i) {
        v[i] *= factors[i * factors.size() / v.size()];
      }
      std::copy(v.begin(), v.end(), p.tensor.ptr<double>());
    });
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const OwnedTensor x = testing::random_rows(9, kWidth, Dtype::kF64);
    const auto run = [&](Unit& one) {
      return testing::values_of(testing::run(ctx, one, x.view, testing::piece(9), rope));
    };
    EXPECT_LT(testing::largest_difference(run(*unit), run(*without)), 1e-13) << of;
  }
  EXPECT_EQ(testing::error_of([&] {
              make_unit({"attention", with(plain, {{"temperature", "value"}})}, kWidth);
            }),
            "attention: expected temperature to be query or key, got 'value'");
}

TEST(Units, LatentAttentionKeepsItsLatentAndSaysWhatItCannotBe) {
  const Options options = {{"heads", int64_t{2}},
                           {"kv_rank", int64_t{8}},
                           {"nope_dim", int64_t{4}},
                           {"rope_dim", int64_t{2}},
                           {"value_dim", int64_t{4}}};
  EXPECT_EQ(make_unit({"latent_attention", options}, kWidth)->state_layout().bytes_per_token(),
            (8 + 2) * 4);
  const auto error = [&](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::error_of([&] { make_unit({"latent_attention", with(options, more)}, kWidth); });
  };
  EXPECT_EQ(error({{"rope_dim", int64_t{3}}}),
            "latent_attention: expected an even rope_dim, got 3");
  EXPECT_EQ(error({{"kv_rank", int64_t{1024}}}),
            "latent_attention: expected kv_rank and rope_dim of at most 1024 together, got 1024 "
            "and 2");
  EXPECT_EQ(
      error({{"index_heads", int64_t{2}}, {"index_dim", int64_t{4}}, {"index_top", int64_t{5}}}),
      "latent_attention: the index of keys reads the query's latent; give q_rank");
}

TEST(AttentionIndexErrors, NameWhatCame) {
  const Options options = {{"heads", int64_t{4}},     {"kv_heads", int64_t{2}},
                           {"head_dim", int64_t{4}},  {"index_heads", int64_t{2}},
                           {"index_dim", int64_t{4}}, {"index_top", int64_t{3}},
                           {"index_size", int64_t{8}}};
  EXPECT_EQ(make_unit({"attention", options}, kWidth)->state_layout().bytes_per_token(),
            (2 * 2 * 4 + 4) * 4);
  const auto error = [&](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::error_of([&] { make_unit({"attention", with(options, more)}, kWidth); });
  };
  EXPECT_EQ(error({{"index_heads", int64_t{4}}}),
            "attention: expected an index_heads for each of kv_heads=2, whose keys it chooses, got "
            "4");
  EXPECT_EQ(error({{"index_of", "pages"}}),
            "attention: expected index_of to be tokens, blocks or pools, got 'pages'");
  EXPECT_EQ(error({{"index_of", "tokens"}}),
            "attention: index_size is of blocks and pools, and tokens are chosen; give index_of");
  EXPECT_EQ(error({{"index_of", "pools"}, {"index_local", int64_t{1}}}),
            "attention: index_local is of blocks, and pools are chosen; leave it out");
  EXPECT_EQ(error({{"index_local", int64_t{4}}}),
            "attention: expected index_local of at most index_top=3, got 4");
  EXPECT_EQ(error({{"window", int64_t{5}}}),
            "attention: expected no window, softcap or sink_logits beside an index, which chooses "
            "what is looked at");
}

}  // namespace
}  // namespace cambium
