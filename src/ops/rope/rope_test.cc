#include "ops/rope/rope.h"

#include <numbers>

#include "base/testing.h"
#include "ops/pointwise/pointwise.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;

// Three sequences of 1, 4 and 2 tokens that stand at positions 0, 37 and 500.
const std::vector<int32_t> kStart{0, 1, 5, 7};
const std::vector<int32_t> kPosition{0, 37, 500};
const Segments kSegments{kStart, kPosition, {}};

struct Case {
  const char* name;
  RopeConfig config;
  int64_t heads, channels;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

class Rope : public ::testing::TestWithParam<Case> {};

TEST_P(Rope, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Case& c = GetParam();
  RopeTable table(c.config);
  table.ensure(502);
  const auto whole = [&](Context& ctx, const std::vector<Tensor>& in) {
    return rope(ctx, in[0], table.turns(ctx, kSegments));
  };
  expect_gradients_match_differences(whole, {{{7, c.heads, c.channels}}});
  expect_kernels_match_reference(whole, {{{7, c.heads, c.channels}}});
  // The keys of a fused projection.
  const int64_t width = c.heads * c.channels;
  const auto slice = [&](Context& ctx, const std::vector<Tensor>& in) {
    return rope(ctx, in[0].slice(1, 5, width).split_last(c.heads, c.channels),
                table.turns(ctx, kSegments));
  };
  expect_gradients_match_differences(slice, {{{7, width + 9}}});
  expect_kernels_match_reference(slice, {{{7, width + 9}}});
  // Queries and keys as one piece of work; keys of other heads.
  const auto both = [&](Context& ctx, const std::vector<Tensor>& in) {
    const auto [q, k] = rope(ctx, in[0], in[1], table.turns(ctx, kSegments));
    return add(ctx, q, repeat_heads(ctx, k, c.heads));
  };
  expect_gradients_match_differences(both, {{{7, c.heads, c.channels}}, {{7, 1, c.channels}}});
  expect_kernels_match_reference(both, {{{7, c.heads, c.channels}}, {{7, 1, c.channels}}});
  // A gradient that the second turn sets and the first adds to.
  const auto meet = [&](Context& ctx, const std::vector<Tensor>& in) {
    const Turns turns = table.turns(ctx, kSegments);
    return add(ctx, rope(ctx, in[0], turns), rope(ctx, rope(ctx, in[0], turns), turns));
  };
  expect_gradients_match_differences(meet, {{{7, c.heads, c.channels}}});
  expect_kernels_match_reference(meet, {{{7, c.heads, c.channels}}});
}

INSTANTIATE_TEST_SUITE_P(
    Configs, Rope,
    ::testing::Values(
        Case{"whole_head", {.dim = 64}, 3, 64}, Case{"small", {.dim = 6}, 2, 6},
        Case{"part_of_the_head", {.dim = 20}, 2, 33},
        Case{"interleaved", {.dim = 24, .interleaved = true}, 3, 24},
        Case{"interleaved_part_with_query_scale",
             {.dim = 10, .original_length = 20, .interleaved = true, .query_beta = 0.3},
             2,
             33},
        Case{"query_scale", {.dim = 16, .original_length = 20, .query_beta = 0.1}, 2, 32},
        Case{"llama3",
             {.theta = 500000,
              .dim = 16,
              .scaling = RopeScaling::kLlama3,
              .factor = 8,
              .original_length = 64},
             1,
             16},
        Case{"yarn",
             {.dim = 16,
              .scaling = RopeScaling::kYarn,
              .factor = 8,
              .original_length = 64,
              .attention_factor = 1.2},
             2,
             16},
        Case{"dynamic",
             {.dim = 8, .scaling = RopeScaling::kDynamic, .factor = 2, .original_length = 100},
             2,
             8},
        Case{"longrope",
             {.dim = 6,
              .scaling = RopeScaling::kLongRope,
              .original_length = 100,
              .attention_factor = 1.1,
              .short_factors = {1, 1.5, 2},
              .long_factors = {1, 3, 9}},
             1,
             8}),
    ::testing::PrintToStringParamName());

/// A token at position 3 with the head (1, 0, 0, 2), turned.
std::vector<double> turned(const RopeConfig& config) {
  RopeTable table(config);
  table.ensure(4);
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<double> x{1, 0, 0, 2};
  const std::vector<int32_t> start{0, 1};
  const std::vector<int32_t> position{3};
  const Tensor y =
      rope(ctx, Tensor::of(x.data(), {1, 1, 4}), table.turns(ctx, {start, position, {}}));
  return {y.ptr<double>(), y.ptr<double>() + 4};
}

TEST(RopeAngles, PairsTurnByPositionTimesFrequency) {
  const std::vector<double> y = turned({.theta = 100, .dim = 4});
  // (x0, x2) turns by 3 * 1, (x1, x3) by 3 * 100^(-1/2).
  const double expected[] = {std::cos(3.0), -2 * std::sin(0.3), std::sin(3.0), 2 * std::cos(0.3)};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(y[i], expected[i], 1e-6);
  }
}

// Angle per position of pair i, read back from the table at position 1.
double frequency(const RopeTable& table, int64_t i) {
  return std::atan2(table.sin(1)[i], table.cos(1)[i]);
}

TEST(RopeAngles, InterleavedPairsAreNeighbours) {
  const std::vector<double> y = turned({.theta = 100, .dim = 4, .interleaved = true});
  const double expected[] = {std::cos(3.0), std::sin(3.0), -2 * std::sin(0.3), 2 * std::cos(0.3)};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(y[i], expected[i], 1e-6);
  }
}

TEST(RopeQueries, AreScaledByWholeOriginalLengthsBehindThem) {
  RopeTable table({.dim = 2, .original_length = 10, .query_beta = 0.5});
  table.ensure(41);
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<int32_t> start{0, 1, 2, 3};
  const std::vector<int32_t> position{9, 10, 40};
  std::vector<double> ones(9, 1.0);  // the third number of a head is not turned
  const Tensor x = Tensor::of(ones.data(), {3, 1, 3});
  const auto [q, k] = rope(ctx, x, x, table.turns(ctx, {start, position, {}}));
  const double expected[] = {1.0, 1.0 + 0.5 * std::log(2.0), 1.0 + 0.5 * std::log(5.0)};
  for (int64_t t = 0; t < 3; ++t) {
    EXPECT_NEAR(q.ptr<double>()[t * 3 + 2], expected[t], 1e-12);
    EXPECT_EQ(k.ptr<double>()[t * 3 + 2], 1.0);
  }
}

TEST(RopeAngles, Llama3StretchesLongWavesOnly) {
  const RopeConfig plain{.theta = 500000, .dim = 128};
  RopeConfig scaled = plain;
  scaled.scaling = RopeScaling::kLlama3;
  scaled.factor = 32;
  RopeTable before(plain);
  RopeTable after(scaled);
  before.ensure(2);
  after.ensure(2);
  int mixed = 0;
  for (int64_t i = 0; i < 64; ++i) {
    const double wave = 2 * std::numbers::pi / frequency(before, i);
    const double ratio = frequency(before, i) / frequency(after, i);
    if (wave < 8192.0 / 4) {
      EXPECT_NEAR(ratio, 1, 1e-6) << i;
    } else if (wave > 8192.0) {
      EXPECT_NEAR(ratio, 32, 1e-5) << i;
    } else {
      const double smooth = (8192 / wave - 1) / (4 - 1);
      EXPECT_NEAR(1 / ratio, (1 - smooth) / 32 + smooth, 1e-6) << i;
      ++mixed;
    }
  }
  EXPECT_GT(mixed, 0);
}

TEST(RopeTables, GrowAndKeepTheirRows) {
  RopeTable table({.dim = 8});
  EXPECT_EQ(table.positions(), 0);
  table.ensure(10);
  const float* row = table.sin(9);
  const std::vector<float> before(row, row + 4);
  table.ensure(1000);
  EXPECT_GE(table.positions(), 1000);
  EXPECT_EQ(table.sin(9), row);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), row));
  table.ensure(3);
  EXPECT_GE(table.positions(), 1000);
}

// By transformers' modeling_rope_utils (numpy, float64): d = 8, theta = 10000.
TEST(RopeScalings, HaveTheFrequenciesOfTheirFormulas) {
  const auto expect = [](const RopeConfig& config, int64_t length,
                         const std::vector<double>& expected) {
    const std::vector<float> got = rope_frequencies(config, length);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_NEAR(got[i] / expected[i], 1, 2e-6) << i;
    }
  };
  RopeConfig config{.dim = 8, .scaling = RopeScaling::kLinear, .factor = 4, .original_length = 64};
  expect(config, 1000, {0.25, 0.025, 0.0025, 0.00025});
  config.scaling = RopeScaling::kDynamic;
  expect(config, 64, {1, 0.1, 0.01, 0.001});
  // theta (4 * 128 / 64 - 3)^(8 / 6)
  const double theta = 10000 * std::pow(5.0, 8.0 / 6.0);
  expect(config, 128, {1, std::pow(theta, -0.25), std::pow(theta, -0.5), std::pow(theta, -0.75)});
  config.scaling = RopeScaling::kLongRope;
  config.short_factors = {1, 2, 4, 5};
  config.long_factors = {2, 4, 8, 10};
  expect(config, 64, {1, 0.05, 0.0025, 0.0002});
  expect(config, 65, {0.5, 0.025, 0.00125, 0.0001});
  // dims of 32 turns and of 1 turn in 64 tokens: -0.497 and 1.008, as whole dims 0 and 2.
  config.scaling = RopeScaling::kYarn;
  expect(config, 1000, {1, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4});
  config.truncate = false;
  const double high = 8 * std::log(64 / (2 * std::numbers::pi)) / (2 * std::log(10000.0));
  const double ramp = 1 / high;
  expect(config, 1000,
         {1, 0.1 * (1 - std::min(ramp, 1.0)) + 0.1 / 4 * std::min(ramp, 1.0), 0.01 / 4, 0.001 / 4});
}

TEST(RopeScalings, GoByTheLengthOfTheWholeSequenceInEveryPiece) {
  RopeTable table({.dim = 6,
                   .scaling = RopeScaling::kLongRope,
                   .original_length = 10,
                   .short_factors = {1, 1, 1},
                   .long_factors = {2, 2, 2}});
  table.ensure(64);
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<int32_t> start{0, 2, 3};
  const std::vector<int32_t> position{0, 8};
  const std::vector<int32_t> lengths{12, 9};
  const Turns turns = table.turns(ctx, {start, position, {}}, lengths);
  EXPECT_FLOAT_EQ(turns.cos[3], std::cos(0.5F));  // token 1 at position 1 of a long sequence
  EXPECT_FLOAT_EQ(turns.cos[6], std::cos(8.0F));  // token 2 at position 8 of a short one
}

TEST(RopeErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  RopeTable small({.dim = 8});
  small.ensure(64);
  RopeTable table({.dim = 8});
  table.ensure(502);
  const auto message = [&](std::initializer_list<int64_t> shape, const Segments& segments,
                           bool beyond = false) {
    return testing::message_of([&] {
      if (beyond) {
        small.turns(ctx, segments);
      }
      rope(ctx, arena.empty(Dtype::kF32, shape), table.turns(ctx, segments));
    });
  };
  EXPECT_EQ(message({7, 1, 6}, kSegments),
            "[rope] expected heads of at least 8 dims (the rotated ones), got f32 (7, 1, 6)");
  EXPECT_EQ(message({6, 1, 8}, kSegments),
            "[rope] expected 7 tokens (those of the segments), got f32 (6, 1, 8)");
  EXPECT_EQ(message({7, 1, 8}, kSegments, true),
            "[rope] expected positions in [0, 64) (the table), got [500, 502) in segment 2");
  EXPECT_EQ(message({7, 8}, kSegments),
            "[rope] expected x (T, H, D) f32 or f64 with contiguous heads, got f32 (7, 8)");
  EXPECT_THROW(RopeTable({.dim = 7}), Error);
  EXPECT_THROW(RopeTable({.dim = 0}), Error);
  EXPECT_THROW(
      RopeTable({.dim = 8, .scaling = RopeScaling::kLlama3, .factor = 8, .low_freq_factor = 4}),
      Error);
  EXPECT_THROW(RopeTable({.dim = 8, .scaling = RopeScaling::kLongRope, .short_factors = {1}}),
               Error);
  EXPECT_THROW(RopeTable({.dim = 2, .scaling = RopeScaling::kDynamic, .factor = 2}), Error);
}

}  // namespace
}  // namespace cambium
