// Every unit that runs: the fast kernels against the definition in double precision, a sequence in
// pieces against the whole, parameters, sizes that must be refused.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"

namespace cambium {
namespace {

constexpr int64_t kWidth = 12;
constexpr int64_t kTokens = 21;

struct Case {
  const char* name;
  UnitSpec spec;
  std::map<std::string, std::vector<int64_t>> parameters;
};

Options with(Options options, std::initializer_list<std::pair<std::string, OptionValue>> more) {
  for (const auto& [key, value] : more) {
    options.set(key, value);
  }
  return options;
}

std::vector<Case> cases() {
  const Options attention = {
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{6}}};
  const std::map<std::string, std::vector<int64_t>> plain = {{"q_proj.weight", {24, 12}},
                                                             {"k_proj.weight", {12, 12}},
                                                             {"v_proj.weight", {12, 12}},
                                                             {"o_proj.weight", {12, 24}}};
  auto normed = plain;
  normed.insert({{"q_norm.weight", {6}}, {"k_norm.weight", {6}}});
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
      {"attention with biases",
       {"attention", with(attention, {{"qkv_bias", true}, {"out_bias", true}})},
       biased},
      {"sliding window", {"sliding_window", with(attention, {{"window", int64_t{5}}})}, plain},
      {"sliding window with sinks",
       {"sliding_window", with(attention, {{"window", int64_t{5}}, {"sinks", int64_t{2}}})},
       plain},
      {"mamba",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}}}},
       {{"in_proj.weight", {48, 12}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {16, 1, 4}},
        {"conv1d.bias", {16}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}}}},
      {"mamba that convolves before it repeats, without bias",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}},
         {"repeat_before_conv", false},
         {"conv_bias", false}}},
       {{"in_proj.weight", {48, 12}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {8, 1, 4}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}}}},
      {"mamba2",
       {"mamba2",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"state", int64_t{5}},
         {"x_heads", int64_t{2}},
         {"b_heads", int64_t{2}},
         {"c_heads", int64_t{4}},
         {"norm_group", int64_t{6}}}},
       {{"in_proj.weight", {24 + 12 + 10 + 20 + 4, 12}},
        {"conv1d.weight", {42, 1, 4}},
        {"conv1d.bias", {42}},
        {"dt_bias", {4}},
        {"A_log", {4}},
        {"D", {4}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}}}},
      {"gated delta net",
       {"gated_delta_net",
        {{"heads", int64_t{4}},
         {"q_heads", int64_t{2}},
         {"k_heads", int64_t{2}},
         {"key_dim", int64_t{6}},
         {"value_dim", int64_t{5}},
         {"rope", true}}},
       {{"in_proj.weight", {12 + 12 + 20 + 20, 12}},
        {"ba_proj.weight", {8, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"A_log", {4}},
        {"dt_bias", {4}},
        {"norm.weight", {5}},
        {"out_proj.weight", {12, 20}}}},
      {"mamba with biases of its projections",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}},
         {"in_bias", true},
         {"out_bias", true}}},
       {{"in_proj.weight", {48, 12}},
        {"in_proj.bias", {48}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {16, 1, 4}},
        {"conv1d.bias", {16}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}},
        {"out_proj.bias", {12}}}},
      {"mamba2 with a bias of its output",
       {"mamba2",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"state", int64_t{5}},
         {"b_heads", int64_t{2}},
         {"norm_group", int64_t{6}},
         {"out_bias", true}}},
       {{"in_proj.weight", {24 + 24 + 10 + 10 + 4, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"conv1d.bias", {44}},
        {"dt_bias", {4}},
        {"A_log", {4}},
        {"D", {4}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}},
        {"out_proj.bias", {12}}}},
      {"gated delta net with biases",
       {"gated_delta_net",
        {{"heads", int64_t{4}},
         {"q_heads", int64_t{2}},
         {"k_heads", int64_t{2}},
         {"key_dim", int64_t{6}},
         {"value_dim", int64_t{5}},
         {"rope", true},
         {"conv_bias", true},
         {"out_bias", true}}},
       {{"in_proj.weight", {12 + 12 + 20 + 20, 12}},
        {"ba_proj.weight", {8, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"conv1d.bias", {44}},
        {"A_log", {4}},
        {"dt_bias", {4}},
        {"norm.weight", {5}},
        {"out_proj.weight", {12, 20}},
        {"out_proj.bias", {12}}}},
      {"swiglu",
       {"swiglu", {{"inner", int64_t{20}}, {"gate_scale", 0.6}, {"bias", true}}},
       {{"gate.weight", {20, 12}},
        {"up.weight", {20, 12}},
        {"down.weight", {12, 20}},
        {"gate.bias", {20}},
        {"up.bias", {20}},
        {"down.bias", {12}}}},
  };
}

Tensor run(Context& ctx, Unit& unit, const Tensor& x, const Batch& batch, RopeTable& rope,
           const UnitState* state = nullptr) {
  rope.ensure(batch.positions_end());
  const Turns turns = rope.turns(ctx, batch.segments(), batch.lengths());
  return unit.forward(ctx, x, {&batch, &turns, state});
}

TEST(Units, FastKernelsMeetTheDefinition) {
  for (const Case& c : cases()) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    std::vector<double> results[3];
    for (const int form : {0, 1, 2}) {
      const Dtype dtype = form == 2 ? Dtype::kF64 : Dtype::kF32;
      const auto unit = make_unit(c.spec, kWidth);
      const testing::Memory memory(*unit, dtype);
      const OwnedTensor x = testing::random_rows(kTokens, kWidth, dtype);
      ctx.reference = form == 1;
      results[form] = testing::values_of(run(ctx, *unit, x.view, batch, rope));
    }
    EXPECT_LT(testing::largest_difference(results[0], results[2]), 2e-5) << c.name;
    EXPECT_LT(testing::largest_difference(results[1], results[2]), 2e-5) << c.name;
    EXPECT_GT(testing::largest_difference(results[2], std::vector<double>(results[2].size())), 1e-3)
        << c.name;
  }
}

// A bias of the output is what the unit gives above what it gives without.
TEST(Units, TheBiasOfTheOutputIsAdded) {
  int biased = 0;
  for (const Case& c : cases()) {
    if (!c.spec.options.flag(c.name, "out_bias", false)) {
      continue;
    }
    ++biased;
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    const auto unit = make_unit(c.spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF64);
    const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF64);
    const std::vector<double> with_bias = testing::values_of(run(ctx, *unit, x.view, batch, rope));
    std::vector<double> bias;
    unit->visit([&](const std::string& name, Parameter& p) {
      if (name == "o_proj.bias" || name == "out_proj.bias") {
        bias = testing::values_of(p.tensor);
        std::fill_n(p.tensor.ptr<double>(), p.numel(), 0.0);
      }
    });
    const std::vector<double> without = testing::values_of(run(ctx, *unit, x.view, batch, rope));
    ASSERT_EQ(bias.size(), static_cast<size_t>(kWidth)) << c.name;
    for (size_t i = 0; i < without.size(); ++i) {
      EXPECT_NEAR(with_bias[i], without[i] + bias[i % bias.size()], 1e-12) << c.name;
    }
  }
  EXPECT_EQ(biased, 4);
}

TEST(Units, PiecesOfASequenceGiveWhatTheWholeGives) {
  const std::vector<std::vector<int64_t>> splits = {
      {21}, {1, 20}, {13, 8}, {5, 1, 9, 1, 1, 4}, std::vector<int64_t>(21, 1)};
  for (const Case& c : cases()) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const auto unit = make_unit(c.spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF32);
    const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF32);
    const std::vector<double> whole =
        testing::values_of(run(ctx, *unit, x.view, testing::piece(kTokens), rope));
    for (const std::vector<int64_t>& split : splits) {
      const testing::State memory_of_state(unit->state_layout(), kTokens);
      const UnitState state = memory_of_state.view();
      std::vector<double> joined;
      int64_t position = 0;
      for (const int64_t tokens : split) {
        const Batch batch = testing::piece(tokens, position, 1);
        const std::vector<double> rows = testing::values_of(
            run(ctx, *unit, x.view.slice(0, position, tokens), batch, rope, &state));
        joined.insert(joined.end(), rows.begin(), rows.end());
        position += tokens;
      }
      EXPECT_LT(testing::largest_difference(joined, whole), 2e-5) << c.name << ", " << split.size();
    }
  }
}

TEST(Units, ParametersHaveTheirNamesShapesAndBlocks) {
  for (const Case& c : cases()) {
    const auto unit = make_unit(c.spec, kWidth);
    std::map<std::string, std::vector<int64_t>> found;
    unit->visit([&](const std::string& name, Parameter& p) {
      EXPECT_TRUE(found.emplace(name, p.shape).second) << name;
      int64_t rows = 0;
      for (const RowBlock& block : p.blocks) {
        EXPECT_EQ(rows_of(p, block.name).begin, rows) << c.name << " " << name << " " << block.name;
        rows += block.rows;
      }
      EXPECT_TRUE(p.blocks.empty() || rows == p.shape[0]) << c.name << " " << name;
    });
    EXPECT_EQ(found, c.parameters) << c.name;
  }
}

TEST(Units, TheirLettersAndNamesDiffer) {
  std::map<char, int> letters;
  std::map<std::string, int> names;
  for (const UnitKind& kind : unit_kinds()) {
    EXPECT_EQ(letters[kind.letter]++, 0) << kind.letter;
    EXPECT_EQ(names[kind.name]++, 0) << kind.name;
    EXPECT_NE(kind.letter, '-');
  }
}

TEST(Units, WhatIsOnlyDeclaredIsCountedAndRefusedByName) {
  const UnitSpec experts{"experts",
                         {{"experts", int64_t{8}},
                          {"top", int64_t{2}},
                          {"inner", int64_t{16}},
                          {"router", "sigmoid"},
                          {"shared", int64_t{4}}}};
  const auto unit = make_unit(experts, kWidth);
  int64_t count = 0;
  unit->visit([&](const std::string&, Parameter& p) { count += p.numel(); });
  EXPECT_EQ(count, 8 * 12 + 8 * 3 * 16 * 12 + 3 * 4 * 12);
  EXPECT_EQ(unit->missing(), "experts");
  const auto latent = make_unit({"latent_attention",
                                 {{"heads", int64_t{2}},
                                  {"kv_rank", int64_t{8}},
                                  {"nope_dim", int64_t{4}},
                                  {"rope_dim", int64_t{2}},
                                  {"value_dim", int64_t{4}}}},
                                kWidth);
  EXPECT_EQ(latent->state_layout().bytes_per_token(), (8 + 2) * 4);
  LayerSpec layer{{{.units = {experts}}, {.units = {{"swiglu", {{"inner", int64_t{8}}}}}}}};
  layer.branches[0].units[0].name = "first";
  LayerSpec twice = layer;
  twice.branches[1].units[0] = experts;
  EXPECT_EQ(Layer(layer, kWidth).missing(), std::vector<std::string>{"experts"});
  EXPECT_EQ(Layer(twice, kWidth).missing(), std::vector<std::string>{"experts"});
}

TEST(Units, WhatIsOnlyDeclaredStartsAsItsLikeDoes) {
  const std::vector<UnitSpec> declared = {
      {"feed_forward", {{"inner", int64_t{16}}, {"activation", "relu2"}, {"bias", true}}},
      {"experts",
       {{"experts", int64_t{8}},
        {"top", int64_t{2}},
        {"inner", int64_t{16}},
        {"router", "sigmoid"},
        {"router_bias", true},
        {"shared", int64_t{4}}}},
      {"latent_attention",
       {{"heads", int64_t{2}},
        {"q_rank", int64_t{6}},
        {"kv_rank", int64_t{8}},
        {"nope_dim", int64_t{4}},
        {"rope_dim", int64_t{2}},
        {"value_dim", int64_t{4}},
        {"index_heads", int64_t{2}},
        {"index_dim", int64_t{4}}}},
      {"lightning", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}}},
      {"kimi_delta", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}}}};
  for (const UnitSpec& spec : declared) {
    make_unit(spec, kWidth)->visit([&](const std::string& name, Parameter& p) {
      const std::string which = spec.kind + " " + name;
      if (name == "A_log" || name == "dt_bias") {
        EXPECT_EQ(p.init.kind, name == "A_log" ? InitKind::kLogUniform : InitKind::kStepBias);
        EXPECT_TRUE(p.keep_fp32) << which;
      } else if (name.ends_with("norm.weight")) {
        EXPECT_EQ(p.init.kind, InitKind::kOnes) << which;
      } else if (name.ends_with("bias")) {
        EXPECT_EQ(p.init.kind, InitKind::kZeros) << which;
      } else {
        EXPECT_EQ(p.init.kind, InitKind::kUniform) << which;
        EXPECT_EQ(p.init.scale, 1.0 / std::sqrt(static_cast<double>(p.shape.back()))) << which;
      }
    });
  }
}

std::string error_of(const UnitSpec& spec, int64_t width = kWidth) {
  return testing::message_of([&] { Layer({{{.units = {spec}}}}, width); });
}

// Counts that would wrap when they are multiplied are refused by the name of their key.
TEST(Units, HostileSizesAreNamed) {
  const int64_t wrap = (int64_t{1} << 62) + 4;
  for (const Case& c : cases()) {
    for (const auto& [key, value] : c.spec.options.values()) {
      if (!std::holds_alternative<int64_t>(value)) {
        continue;
      }
      for (const int64_t hostile : {wrap, int64_t{1} << 62, int64_t{-1}, INT64_MIN, INT64_MAX}) {
        UnitSpec spec = c.spec;
        spec.options.set(key, hostile);
        EXPECT_NE(error_of(spec).find("'" + key + "'"), std::string::npos)
            << c.name << " " << key << " " << hostile << ": " << error_of(spec);
      }
    }
  }
  const UnitSpec experts{"experts",
                         {{"experts", int64_t{1} << 16},
                          {"top", int64_t{2}},
                          {"inner", int64_t{1} << 24},
                          {"router", "softmax"}}};
  EXPECT_NE(error_of(experts, 4096).find("experts.gate.weight"), std::string::npos);
}

TEST(Units, UnknownKindsAndOptionsAreNamed) {
  EXPECT_NE(error_of({"swigul", {}}).find("unknown unit 'swigul'; did you mean 'swiglu'?"),
            std::string::npos);
  EXPECT_NE(error_of({"swiglu", {{"inner", int64_t{4}}, {"iner", int64_t{4}}}}).find("'iner'"),
            std::string::npos);
  // Sinks are the window's mixer's alone: no family's configuration could say them.
  const Options full{{"heads", int64_t{2}}, {"head_dim", int64_t{4}}, {"window", int64_t{5}}};
  const Options sinks = with(full, {{"sinks", int64_t{2}}});
  EXPECT_EQ(error_of({"sliding_window", sinks}), "no error");
  EXPECT_NE(error_of({"attention", sinks}).find("'sinks'"), std::string::npos);
  EXPECT_NE(error_of({"swiglu", {{"inner", "many"}}}).find("'inner' to be a whole number"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
