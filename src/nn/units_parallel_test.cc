// A window of attention beside a recurrence.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"
#include "nn/testing_units.h"
#include "nn/units/units.h"

namespace cambium {

std::vector<testing::UnitCase> testing::parallel_cases() {
  const Options attention = {
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{6}}};
  return {
      {"a window beside mamba2",
       {"parallel", with(attention, {{"window", int64_t{5}},
                                     {"recurrent", "mamba2"},
                                     {"recurrent.heads", int64_t{4}},
                                     {"recurrent.head_dim", int64_t{6}},
                                     {"recurrent.state", int64_t{5}},
                                     {"recurrent.b_heads", int64_t{2}},
                                     {"recurrent.norm_group", int64_t{6}},
                                     {"out_bias", true}})},
       {{"q_proj.weight", {24, 12}},
        {"k_proj.weight", {12, 12}},
        {"v_proj.weight", {12, 12}},
        {"o_proj.weight", {12, 24}},
        {"o_proj.bias", {12}},
        {"gate_proj.weight", {4, 12}},
        {"gate_proj.bias", {4}},
        {"recurrent.in_proj.weight", {24 + 24 + 10 + 10 + 4, 12}},
        {"recurrent.conv1d.weight", {44, 1, 4}},
        {"recurrent.conv1d.bias", {44}},
        {"recurrent.dt_bias", {4}},
        {"recurrent.A_log", {4}},
        {"recurrent.D", {4}},
        {"recurrent.norm.weight", {24}}}},
      {"a window beside lightning",
       {"parallel", with(attention, {{"window", int64_t{5}},
                                     {"sinks", int64_t{2}},
                                     {"window_dropout", 0.5},
                                     {"recurrent", "lightning"},
                                     {"recurrent.heads", int64_t{4}},
                                     {"recurrent.head_dim", int64_t{6}},
                                     {"recurrent.rope", true}})},
       {{"q_proj.weight", {24, 12}},
        {"k_proj.weight", {12, 12}},
        {"v_proj.weight", {12, 12}},
        {"o_proj.weight", {12, 24}},
        {"gate_proj.weight", {4, 12}},
        {"gate_proj.bias", {4}},
        {"recurrent.qkv_proj.weight", {72, 12}},
        {"recurrent.gate_proj.weight", {24, 12}},
        {"recurrent.norm.weight", {24}}}},
      // The window has a gate_proj of its own.
      {"a window on gated latents beside lightning",
       {"parallel",
        {{"heads", int64_t{3}},
         {"kv_rank", int64_t{8}},
         {"nope_dim", int64_t{5}},
         {"rope_dim", int64_t{6}},
         {"value_dim", int64_t{4}},
         {"gate", true},
         {"window", int64_t{5}},
         {"recurrent", "lightning"},
         {"recurrent.heads", int64_t{3}},
         {"recurrent.head_dim", int64_t{6}},
         {"recurrent.value_dim", int64_t{4}}}},
       {{"q_proj.weight", {33, 12}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"gate_proj.weight", {3, 12}},
        {"o_proj.weight", {12, 12}},
        {"mix_proj.weight", {3, 12}},
        {"mix_proj.bias", {3}},
        {"recurrent.qkv_proj.weight", {48, 12}},
        {"recurrent.gate_proj.weight", {12, 12}},
        {"recurrent.norm.weight", {12}}}},
  };
}

namespace {

using testing::kTokens;
using testing::kWidth;
using testing::with;

/// A window of 5 tokens beside Gated DeltaNet, of which each has its say.
UnitSpec window_and_delta(double dropout) {
  return {"parallel",
          {{"heads", int64_t{4}},
           {"kv_heads", int64_t{2}},
           {"head_dim", int64_t{6}},
           {"window", int64_t{5}},
           {"window_dropout", dropout},
           {"recurrent", "gated_delta_net"},
           {"recurrent.heads", int64_t{4}},
           {"recurrent.key_dim", int64_t{6}},
           {"recurrent.value_dim", int64_t{6}}}};
}

/// Fills the gate's bias; its weights become zero.
void set_gate(Unit& unit, float bias) {
  unit.visit([&](const std::string& name, Parameter& p) {
    if (name.starts_with("gate_proj.")) {
      std::fill_n(p.tensor.ptr<float>(), p.numel(), name == "gate_proj.bias" ? bias : 0.0F);
    }
  });
}

// With its gate open to one side, the pair gives what that side gives alone.
TEST(Units, AGateChoosesBetweenAWindowAndARecurrence) {
  RopeTable rope({.dim = 6});
  Arena arena;
  Context ctx{.arena = &arena};
  const auto pair = make_unit(window_and_delta(0.0), kWidth);
  const testing::Memory memory(*pair, Dtype::kF32);
  const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF32);
  const Batch batch = testing::piece(kTokens);
  for (const bool near : {false, true}) {
    UnitSpec spec{"sliding_window",
                  {{"heads", int64_t{4}},
                   {"kv_heads", int64_t{2}},
                   {"head_dim", int64_t{6}},
                   {"window", int64_t{5}}}};
    if (!near) {
      spec = recurrent_part(window_and_delta(0.0).options);
    }
    const auto alone = make_unit(spec, kWidth);
    const std::string prefix = near ? "" : "recurrent.";
    alone->visit([&](const std::string& name, Parameter& p) {
      p.tensor =
          memory.tensors().at(name == "out_proj.weight" ? "o_proj.weight" : prefix + name).view;
    });
    set_gate(*pair, near ? 40.0F : -100.0F);
    EXPECT_LT(testing::largest_difference(
                  testing::values_of(testing::run(ctx, *pair, x.view, batch, rope)),
                  testing::values_of(testing::run(ctx, *alone, x.view, batch, rope))),
              1e-6)
        << near;
  }
}

// While a unit is trained its documents go without their window by the noise alone.
TEST(Units, WindowsAreDroppedByDocumentAndByNoise) {
  constexpr int64_t kDocuments = 40;
  RopeTable rope({.dim = 6});
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  for (int64_t s = 0; s < kDocuments; ++s) {
    batch.add(std::vector<int32_t>(3, 0));
  }
  rope.ensure(batch.positions_end());
  const Turns turns = rope.turns(ctx, batch.segments(), batch.lengths());
  const auto unit = make_unit(window_and_delta(0.25), kWidth);
  const testing::Memory memory(*unit, Dtype::kF32);
  const OwnedTensor x = testing::random_rows(3 * kDocuments, kWidth, Dtype::kF32);
  set_gate(*unit, 1.0F);
  const auto with_noise = [&](uint64_t noise) {
    UnitInputs inputs{&batch, &turns, nullptr};
    inputs.noise = noise;
    return testing::values_of(unit->forward(ctx, x.view, inputs));
  };
  const std::vector<double> whole = with_noise(0);
  const std::vector<double> some = with_noise(7);
  EXPECT_EQ(some, with_noise(7));
  EXPECT_NE(some, with_noise(8));
  set_gate(*unit, -100.0F);
  const std::vector<double> without = with_noise(0);
  int dropped = 0;
  for (int64_t s = 0; s < kDocuments; ++s) {
    const auto first = static_cast<size_t>(s * 3 * kWidth);
    const auto same = [&](const std::vector<double>& other) {
      return std::equal(some.begin() + static_cast<int64_t>(first),
                        some.begin() + static_cast<int64_t>(first) + 3 * kWidth,
                        other.begin() + static_cast<int64_t>(first));
    };
    EXPECT_NE(same(whole), same(without)) << s;
    dropped += same(without) ? 1 : 0;
  }
  EXPECT_GT(dropped, 3);
  EXPECT_LT(dropped, 20);
}

TEST(Units, PairsThatCannotBeMixedAreNamed) {
  const auto message = [](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::message_of([&] {
      make_unit({"parallel", with(window_and_delta(0.0).options, more)}, kWidth);
    });
  };
  const std::pair<std::string, const char*> cases[] = {
      {message({{"recurrent", "attention"}}), "attention"},
      {message({{"recurrent", "mamba"}}), "mamba"},
      {message({{"recurrent", "swiglu"}}), "swiglu"},
      {message({{"recurrent.heads", int64_t{2}}}), "heads of one number and size, got 4 in 24"},
      {message({{"recurrent.value_dim", int64_t{4}}}), "heads of one number and size"},
      {message({{"recurrent.valu_dim", int64_t{4}}}), "'valu_dim'"},
      {message({{"window_dropout", 1.5}}), "'window_dropout'"},
      {message({{"widow", int64_t{4}}}), "'widow'"}};
  for (const auto& [found, expected] : cases) {
    EXPECT_NE(found.find(expected), std::string::npos) << found;
  }
  EXPECT_EQ(message({}), "no error");
}

}  // namespace
}  // namespace cambium
