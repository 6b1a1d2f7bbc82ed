// Every unit that runs: the fast kernels against the definition in double precision, a sequence in
// pieces against the whole, parameters, sizes that must be refused.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"
#include "nn/testing_units.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

using testing::kTokens;
using testing::kWidth;
using testing::with;

std::vector<testing::UnitCase> cases() {
  std::vector<testing::UnitCase> all = testing::attention_cases();
  for (const auto& more :
       {testing::recurrent_cases(), testing::parallel_cases(), testing::feed_forward_cases()}) {
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

TEST(Units, FastKernelsMeetTheDefinition) {
  for (const testing::UnitCase& c : cases()) {
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
      results[form] = testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
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
  for (const testing::UnitCase& c : cases()) {
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
    const std::vector<double> with_bias =
        testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
    std::vector<double> bias;
    unit->visit([&](const std::string& name, Parameter& p) {
      if (name == "o_proj.bias" || name == "out_proj.bias") {
        bias = testing::values_of(p.tensor);
        std::fill_n(p.tensor.ptr<double>(), p.numel(), 0.0);
      }
    });
    const std::vector<double> without =
        testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
    ASSERT_EQ(bias.size(), static_cast<size_t>(kWidth)) << c.name;
    for (size_t i = 0; i < without.size(); ++i) {
      EXPECT_NEAR(with_bias[i], without[i] + bias[i % bias.size()], 1e-12) << c.name;
    }
  }
  EXPECT_EQ(biased, 7);
}

TEST(Units, PiecesOfASequenceGiveWhatTheWholeGives) {
  const std::vector<std::vector<int64_t>> splits = {
      {21}, {1, 20}, {13, 8}, {5, 1, 9, 1, 1, 4}, std::vector<int64_t>(21, 1)};
  for (const testing::UnitCase& c : cases()) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const auto unit = make_unit(c.spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF32);
    const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF32);
    const std::vector<double> whole =
        testing::values_of(testing::run(ctx, *unit, x.view, testing::piece(kTokens), rope));
    for (const std::vector<int64_t>& split : splits) {
      const testing::State memory_of_state(unit->state_layout(), kTokens);
      const UnitState state = memory_of_state.view();
      std::vector<double> joined;
      int64_t position = 0;
      for (const int64_t tokens : split) {
        const Batch batch = testing::piece(tokens, position, 1);
        const std::vector<double> rows = testing::values_of(
            testing::run(ctx, *unit, x.view.slice(0, position, tokens), batch, rope, &state));
        joined.insert(joined.end(), rows.begin(), rows.end());
        position += tokens;
      }
      EXPECT_LT(testing::largest_difference(joined, whole), 2e-5) << c.name << ", " << split.size();
    }
  }
}

TEST(Units, ParametersHaveTheirNamesShapesAndBlocks) {
  for (const testing::UnitCase& c : cases()) {
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

TEST(Units, MatricesStartAsLinearsDo) {
  const std::vector<UnitSpec> specs = {
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
        {"index_dim", int64_t{4}},
        {"index_top", int64_t{5}}}},
      {"lightning", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}}}};
  for (const UnitSpec& spec : specs) {
    make_unit(spec, kWidth)->visit([&](const std::string& name, Parameter& p) {
      const std::string which = spec.kind + " " + name;
      if (name.ends_with("norm.weight")) {
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
  for (const testing::UnitCase& c : cases()) {
    for (const auto& [key, value] : c.spec.options.values()) {
      if (!std::holds_alternative<int64_t>(value)) {
        continue;
      }
      for (const int64_t hostile : {wrap, int64_t{1} << 62, int64_t{-1}, INT64_MIN, INT64_MAX}) {
        UnitSpec spec = c.spec;
        spec.options.set(key, hostile);
        // A mixer inside another names its own option.
        const std::string own = key.substr(key.rfind('.') + 1);
        EXPECT_NE(error_of(spec).find("'" + own + "'"), std::string::npos)
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

TEST(Units, OptionsAreEqualInWhateverOrderTheyWereSet) {
  const Options options{{"heads", int64_t{2}}, {"window", int64_t{5}}};
  EXPECT_EQ(options, (Options{{"window", int64_t{5}}, {"heads", int64_t{2}}}));
  EXPECT_NE(options, (Options{{"heads", int64_t{2}}, {"window", int64_t{6}}}));
  EXPECT_NE(options, (Options{{"heads", int64_t{2}}, {"window", 5.0}}));
  EXPECT_NE(options, (Options{{"heads", int64_t{2}}, {"sinks", int64_t{5}}}));
  EXPECT_NE(options, (Options{{"heads", int64_t{2}}}));
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

TEST(Units, GatesThatAMixerHasNotAreNamed) {
  const Options mamba2{{"heads", int64_t{2}},
                       {"head_dim", int64_t{4}},
                       {"state", int64_t{4}},
                       {"b_heads", int64_t{2}}};
  EXPECT_EQ(error_of({"mamba2", with(mamba2, {{"out_gate", "tanh"}})}),
            "mamba2: expected out_gate to be silu or sigmoid, got 'tanh'");
  for (const auto& [key, value] :
       {std::pair<const char*, OptionValue>{"out_gate", "sigmoid"}, {"norm_first", true}}) {
    EXPECT_EQ(error_of({"mamba2", with(mamba2, {{"norm", false}, {key, value}})}),
              "mamba2: expected out_gate silu and no norm_first where it has no norm");
  }
}

}  // namespace
}  // namespace cambium
