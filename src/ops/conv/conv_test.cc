#include "ops/conv/conv.h"

#include "ops/stateful_testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  std::vector<int64_t> lengths;
  int64_t channels, taps;
  bool bias, silu;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (const int64_t length : c.lengths) {
    out << length << "_";
  }
  return out << "tokens_" << c.channels << "_channels_" << c.taps << "_taps"
             << (c.bias ? "_bias" : "") << (c.silu ? "_silu" : "");
}

StatefulCase make(const Case& c) {
  StatefulCase test;
  for (const int64_t length : c.lengths) {
    test.tokens += length;
  }
  test.inputs = {
      {{test.tokens, c.channels}}, {{c.channels, c.taps}, -1.0, 1.0, true, true}, {{c.channels}}};
  test.of_tokens = {true, false, false};
  test.state_row = {c.channels, c.taps - 1};
  test.operation = [c](Context& ctx, const std::vector<Tensor>& in, const Segments& segments,
                       const Tensor& state) {
    return short_conv(ctx, in[0], in[1], c.bias ? in[2] : Tensor{}, c.silu, segments, state);
  };
  return test;
}

class ShortConv : public ::testing::TestWithParam<Case> {};

TEST_P(ShortConv, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const StatefulCase test = make(GetParam());
  const OwnedSegments segments = packed_segments(GetParam().lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return test.operation(ctx, in, segments.view(), {});
  };
  expect_gradients_match_differences(operation, test.inputs);
  expect_kernels_match_reference(operation, test.inputs);
}

TEST_P(ShortConv, PackedEqualsSeparate) {
  const StatefulCase test = make(GetParam());
  for_each_isa([&] { expect_packed_equals_separate<float>(test, GetParam().lengths, 1e-5); });
  expect_packed_equals_separate<double>(test, GetParam().lengths, 1e-12);
}

TEST_P(ShortConv, AnySplitAgrees) {
  const StatefulCase test = make(GetParam());
  std::vector<std::vector<int64_t>> cuts;
  for (int64_t t = 1; t < test.tokens && t < 12; ++t) {
    cuts.push_back({t});
  }
  if (test.tokens > 5) {
    cuts.push_back({2, 3, 5});
  }
  if (test.tokens > 60) {
    cuts.push_back({1, 31, 60});
  }
  // To the bit: few and many rows are summed in the same order.
  for_each_isa([&] { expect_splits_agree<float>(test, cuts, 0.0); });
  expect_splits_agree<double>(test, cuts, 1e-12);
}

TEST_P(ShortConv, AnyNumberOfThreadsAgrees) {
  expect_threads_agree(make(GetParam()), GetParam().lengths);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ShortConv,
    ::testing::Values(Case{{1}, 1, 4, true, true}, Case{{3, 1, 9}, 5, 4, true, true},
                      Case{{2, 7}, 16, 3, false, true}, Case{{70, 33}, 67, 4, true, false},
                      Case{{6, 8}, 40, 7, true, true}, Case{{5}, 8, 1, false, false},
                      Case{{0, 40, 0}, 32, 2, true, true}),
    ::testing::PrintToStringParamName());

TEST(ShortConvViews, ColumnsOfAFusedProjection) {
  const OwnedSegments segments = packed_segments({4, 3});
  const std::vector<Input> inputs = {{{7, 96}}, {{32, 4}, -1.0, 1.0, true, true}, {{32}}};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return short_conv(ctx, in[0].slice(1, 48, 32), in[1], in[2], true, segments.view());
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

// A tape with state: the state in the slot is an input without gradient, kept for the backward step
// although the call overwrites it.
TEST(ShortConvState, BackwardUsesTheStateBeforeTheCall) {
  constexpr int64_t kChannels = 5;
  const OwnedSegments whole{{0, 6}, {0}, {}};
  const OwnedSegments rest{{0, 4}, {2}, {0}};
  const std::vector<Input> inputs = {
      {{6, kChannels}}, {{kChannels, 4}, -1.0, 1.0, true, true}, {{kChannels}}};
  const auto values = draw(inputs);
  const testing::Run expected = run_operation<double>(
      [&](Context& ctx, const std::vector<Tensor>& in) {
        // Only the last four rows count.
        const Tensor y = short_conv(ctx, in[0], in[1], in[2], true, whole.view());
        return y.slice(0, 2, 4);
      },
      inputs, values, true, true);
  for_each_isa([&] {
    const testing::Run run = run_operation<float>(
        [&](Context& ctx, const std::vector<Tensor>& in) {
          const Tensor state = ctx.arena->empty(Dtype::kF32, {1, kChannels, 3});
          for (int64_t c = 0; c < kChannels; ++c) {
            for (int64_t j = 0; j < 3; ++j) {
              state.ptr<float>()[c * 3 + j] =
                  j == 0 ? 0.0F : in[0].ptr<float>()[(j - 1) * kChannels + c];
            }
          }
          return short_conv(ctx, in[0].slice(0, 2, 4), in[1], in[2], true, rest.view(), state);
        },
        inputs, values, false, true);
    EXPECT_LE(relative_error(run.output, expected.output), 1e-5);
    EXPECT_LE(relative_error(run.grads[1], expected.grads[1]), 1e-5);
    EXPECT_LE(relative_error(run.grads[2], expected.grads[2]), 1e-5);
  });
}

TEST(ShortConvErrors, NameWhatIsWrong) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = arena.empty(Dtype::kF32, {4, 8});
  const Tensor w = arena.empty(Dtype::kF32, {8, 4});
  const OwnedSegments segments{{0, 4}, {0}, {0}};
  EXPECT_EQ(error_of([&] {
              short_conv(ctx, x, arena.empty(Dtype::kF32, {7, 4}), {}, true, segments.view());
            }),
            "[short_conv] expected weight f32 (8, K), got f32 (7, 4)");
  EXPECT_EQ(error_of([&] {
              short_conv(ctx, x, w, arena.empty(Dtype::kF32, {4}), true, segments.view());
            }),
            "[short_conv] expected bias f32 (8), got f32 (4)");
  EXPECT_EQ(error_of([&] {
              short_conv(ctx, x, w, {}, true, segments.view(), arena.empty(Dtype::kF32, {2, 8, 4}));
            }),
            "[short_conv] expected a contiguous state f32 (2, 8, 3), got f32 (2, 8, 4)");
  const Tensor state = arena.empty(Dtype::kF32, {2, 8, 3});
  const OwnedSegments far{{0, 4}, {0}, {2}};
  EXPECT_EQ(error_of([&] { short_conv(ctx, x, w, {}, true, far.view(), state); }),
            "[short_conv] expected state slots below 2, got 2");
  const OwnedSegments later{{0, 4}, {9}, {}};
  EXPECT_EQ(error_of([&] { short_conv(ctx, x, w, {}, true, later.view()); }),
            "[short_conv] segment 0 stands at position 9, but no state of the tokens before it was "
            "given");
  const OwnedSegments few{{0, 3}, {0}, {}};
  EXPECT_EQ(error_of([&] { short_conv(ctx, x, w, {}, true, few.view()); }),
            "[short_conv] expected segments whose starts rise from 0 to 4 tokens, got 1 segments "
            "of 3 tokens");
}

}  // namespace
}  // namespace cambium
