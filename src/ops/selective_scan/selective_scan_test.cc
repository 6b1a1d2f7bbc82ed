#include "ops/selective_scan/selective_scan.h"

#include "ops/stateful_testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t channels, states, b_groups, c_groups;
  GateActivation gate = GateActivation::kSilu;
};

// Inputs u, dt, b, c, z, a_log, d, dt_bias.
StatefulCase make(const Case& c) {
  StatefulCase test;
  for (const int64_t length : c.lengths) {
    test.tokens += length;
  }
  const int64_t t = test.tokens;
  const double last = std::log(static_cast<double>(c.states) + 1);
  test.inputs = {{{t, c.channels}},
                 {{t, c.channels}},
                 {{t, c.b_groups, c.states}},
                 {{t, c.c_groups, c.states}},
                 {{t, c.channels}},
                 {{c.channels, c.states}, -1.0, last, true, true},
                 {{c.channels}},
                 {{c.channels}, -4.0, 1.0}};
  test.of_tokens = {true, true, true, true, true, false, false, false};
  test.state_row = {c.channels, c.states};
  test.operation = [gate = c.gate](Context& ctx, const std::vector<Tensor>& in,
                                   const Segments& segments, const Tensor& state) {
    return selective_scan(ctx, {in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], gate},
                          segments, state);
  };
  return test;
}

std::vector<StatefulRow> rows(const std::vector<Case>& cases) {
  std::vector<StatefulRow> rows;
  for (const Case& c : cases) {
    const StatefulCase test = make(c);
    rows.push_back({c.name, test, c.lengths, {1, 2, 15, 16, 17, 31, 32, 33, 64, 65}, true});
  }
  return rows;
}

INSTANTIATE_TEST_SUITE_P(
    SelectiveScan, Stateful,
    ::testing::ValuesIn(
        rows({Case{"one", {1}, 1, 1, 1, 1}, Case{"h1", {70, 5, 33}, 64, 16, 1, 4},
              Case{"h1_shared", {20, 17}, 64, 16, 2, 4}, Case{"eight_states", {40, 3}, 32, 8, 2, 4},
              Case{"wide_groups", {35}, 48, 24, 1, 2}, Case{"mamba1", {18, 50}, 37, 16, 1, 1},
              Case{"odd", {9, 14}, 21, 5, 3, 7}, Case{"group_per_channel", {33}, 6, 3, 2, 6},
              Case{"h1_sigmoid", {70, 5, 33}, 64, 16, 1, 4, GateActivation::kSigmoid},
              Case{"odd_sigmoid", {9, 14}, 21, 5, 3, 7, GateActivation::kSigmoid}})),
    ::testing::PrintToStringParamName());

// Long sequences with steps at their ends: no NaN, and the kernels still follow the definition.
TEST(SelectiveScanExtremes, LongSequencesAndStepsAtTheirEnds) {
  const Case c{"", {4000}, 16, 16, 1, 1};
  const StatefulCase test = make(c);
  auto values = draw(test.inputs);
  const double steps[] = {-1e4, 1e4, -80.0, 80.0, 19.9, 20.1, 0.0, 3e3};
  for (size_t i = 0; i < values[1].size(); ++i) {
    if (i % 11 < 2) {
      values[1][i] = steps[(i / 11) % 8];
    }
  }
  // Huge steps write huge states: keep the inputs there small.
  for (size_t i = 0; i < values[0].size(); ++i) {
    if (values[1][i] > 10.0) {
      values[0][i] /= values[1][i];
    }
  }
  const OwnedSegments segments = packed_segments(c.lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return test.operation(ctx, in, segments.view(), {});
  };
  const testing::Run exact = run_operation<double>(operation, test.inputs, values, true, true);
  for_each_isa([&] {
    const testing::Run run = run_operation<float>(operation, test.inputs, values, false, true);
    EXPECT_LE(relative_error(run.output, exact.output), 1e-4);
    for (size_t i = 0; i < run.grads.size(); ++i) {
      EXPECT_LE(relative_error(run.grads[i], exact.grads[i]), 1e-3) << "gradient of input " << i;
    }
  });
}

TEST(SelectiveScanViews, ColumnsOfAFusedProjection) {
  const OwnedSegments segments = packed_segments({4, 30});
  const std::vector<Input> inputs = {
      {{34, 200}}, {{32, 16}, -1.0, 2.0, true, true}, {{32}}, {{32}, -3.0, 0.0}};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    const auto part = [&](int64_t begin, int64_t size) { return in[0].slice(1, begin, size); };
    return selective_scan(ctx,
                          {.u = part(0, 32),
                           .dt = part(32, 32),
                           .b = part(64, 16).split_last(1, 16),
                           .c = part(80, 32).split_last(2, 16),
                           .z = part(112, 32),
                           .a_log = in[1],
                           .d = in[2],
                           .dt_bias = in[3]},
                          segments.view());
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

TEST(SelectiveScanErrors, NameWhatIsWrong) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const OwnedSegments segments{{0, 6}, {0}, {}};
  const SelectiveScanInputs good{.u = tensor({6, 8}),
                                 .dt = tensor({6, 8}),
                                 .b = tensor({6, 1, 4}),
                                 .c = tensor({6, 2, 4}),
                                 .z = tensor({6, 8}),
                                 .a_log = tensor({8, 4}),
                                 .d = tensor({8}),
                                 .dt_bias = tensor({8})};
  const auto message = [&](auto change) {
    SelectiveScanInputs in = good;
    change(in);
    return error_of([&] { selective_scan(ctx, in, segments.view()); });
  };
  EXPECT_EQ(message([&](auto& in) {
              in.z = tensor({6, 7});
            }),
            "[selective_scan] expected z shaped like u f32 (6, 8), got f32 (6, 7)");
  EXPECT_EQ(
      message([&](auto& in) {
        in.b = tensor({6, 1, 5});
      }),
      "[selective_scan] expected b f32 (6, groups, 4) with groups together, got f32 (6, 1, 5)");
  EXPECT_EQ(message([&](auto& in) {
              in.c = tensor({6, 3, 4});
            }),
            "[selective_scan] expected a number of c groups that divides 8 channels, got 3");
  EXPECT_EQ(message([&](auto& in) {
              in.a_log = tensor({7, 4});
            }),
            "[selective_scan] expected a_log f32 (8, N), got f32 (7, 4)");
  EXPECT_EQ(message([&](auto& in) { in.dt_bias = tensor({4}); }),
            "[selective_scan] expected dt_bias f32 (8), got f32 (4)");
  EXPECT_EQ(error_of([&] {
              const OwnedSegments slots{{0, 6}, {0}, {0}};
              selective_scan(ctx, good, slots.view(), tensor({1, 4, 8}));
            }),
            "[selective_scan] expected a contiguous state f32 (1, 8, 4), got f32 (1, 4, 8)");
}

}  // namespace
}  // namespace cambium
