#include "ops/rope/rope.h"

#include <numbers>

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
    return rope(ctx, in[0], kSegments, table);
  };
  expect_gradients_match_differences(whole, {{{7, c.heads, c.channels}}});
  expect_kernels_match_reference(whole, {{{7, c.heads, c.channels}}});
  // The keys of a fused projection.
  const int64_t width = c.heads * c.channels;
  const auto slice = [&](Context& ctx, const std::vector<Tensor>& in) {
    return rope(ctx, in[0].slice(1, 5, width).split_last(c.heads, c.channels), kSegments, table);
  };
  expect_gradients_match_differences(slice, {{{7, width + 9}}});
  expect_kernels_match_reference(slice, {{{7, width + 9}}});
}

INSTANTIATE_TEST_SUITE_P(
    Configs, Rope,
    ::testing::Values(
        Case{"whole_head", {.dim = 64}, 3, 64}, Case{"small", {.dim = 6}, 2, 6},
        Case{"part_of_the_head", {.dim = 20}, 2, 33},
        Case{"llama3", {.theta = 500000, .dim = 16, .factor = 8, .original_length = 64}, 1, 16}),
    ::testing::PrintToStringParamName());

TEST(RopeAngles, PairsTurnByPositionTimesFrequency) {
  RopeTable table({.theta = 100, .dim = 4});
  table.ensure(4);
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<double> x{1, 0, 0, 2};
  const std::vector<int32_t> start{0, 1};
  const std::vector<int32_t> position{3};
  const Tensor y = rope(ctx, Tensor::of(x.data(), {1, 1, 4}), {start, position, {}}, table);
  // (x0, x2) turns by 3 * 1, (x1, x3) by 3 * 100^(-1/2).
  const double expected[] = {std::cos(3.0), -2 * std::sin(0.3), std::sin(3.0), 2 * std::cos(0.3)};
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(y.ptr<double>()[i], expected[i], 1e-6);
  }
}

// Angle per position of pair i, read back from the table at position 1.
double frequency(const RopeTable& table, int64_t i) {
  const int64_t at = table.config().dim / 2 + i;
  return std::atan2(table.sin(Dtype::kF64).ptr<double>()[at],
                    table.cos(Dtype::kF64).ptr<double>()[at]);
}

TEST(RopeAngles, Llama3StretchesLongWavesOnly) {
  const RopeConfig plain{.theta = 500000, .dim = 128};
  RopeConfig scaled = plain;
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
  const auto before = testing::to_doubles(table.sin(Dtype::kF32), table.sin(Dtype::kF32).data);
  table.ensure(1000);
  EXPECT_GE(table.positions(), 1000);
  const auto after = testing::to_doubles(table.sin(Dtype::kF32), table.sin(Dtype::kF32).data);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), after.begin()));
  table.ensure(3);
  EXPECT_GE(table.positions(), 1000);
}

TEST(RopeErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  RopeTable table({.dim = 8});
  table.ensure(64);
  const auto message = [&](std::initializer_list<int64_t> shape, const Segments& segments) {
    try {
      rope(ctx, arena.empty(Dtype::kF32, shape), segments, table);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message({7, 1, 6}, kSegments),
            "[rope] expected heads of at least 8 dims (the rotated ones), got f32 (7, 1, 6)");
  EXPECT_EQ(message({6, 1, 8}, kSegments),
            "[rope] expected 7 tokens (those of the segments), got f32 (6, 1, 8)");
  EXPECT_EQ(message({7, 1, 8}, kSegments),
            "[rope] expected positions in [0, 64) (the table), got [500, 502) in segment 2");
  EXPECT_EQ(message({7, 8}, kSegments),
            "[rope] expected x (T, H, D) f32 or f64 with contiguous heads, got f32 (7, 8)");
  EXPECT_THROW(RopeTable({.dim = 7}), Error);
  EXPECT_THROW(RopeTable({.dim = 0}), Error);
  EXPECT_THROW(RopeTable({.dim = 8, .factor = 8, .low_freq_factor = 4}), Error);
}

}  // namespace
}  // namespace cambium
