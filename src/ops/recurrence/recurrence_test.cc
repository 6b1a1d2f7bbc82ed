#include "ops/recurrence/recurrence.h"

#include "ops/stateful_testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t key_heads, heads, key_dim, dim;
  bool per_channel = false;
  bool delta = false;
  bool weight = true;
  bool skip = false;
  double lowest_log_decay = -0.5;
};

// Inputs q, k, v, log_decay, weight, skip. Under the delta rule keys are at most of length 1, as
// its mixers make them; without that the state may grow exponentially.
StatefulCase make(const Case& c) {
  StatefulCase test;
  for (const int64_t length : c.lengths) {
    test.tokens += length;
  }
  const int64_t t = test.tokens;
  const double key = c.delta ? 1.0 / std::sqrt(static_cast<double>(c.key_dim)) : 1.0;
  test.inputs = {{{t, c.key_heads, c.key_dim}},
                 {{t, c.key_heads, c.key_dim}, -key, key},
                 {{t, c.heads, c.dim}},
                 {{t, c.heads}, c.lowest_log_decay, 0.0, true, true},
                 {{t, c.heads}, 0.0, 1.0, c.weight, true},
                 {{c.heads}, -1.0, 1.0, c.skip}};
  if (c.per_channel) {
    test.inputs[3].shape.push_back(c.key_dim);
  }
  test.of_tokens = {true, true, true, true, true, false};
  test.state_row = {c.heads, c.key_dim, c.dim};
  test.operation = [c](Context& ctx, const std::vector<Tensor>& in, const Segments& segments,
                       const Tensor& state) {
    return recurrence(ctx,
                      {.q = in[0],
                       .k = in[1],
                       .v = in[2],
                       .log_decay = in[3],
                       .weight = c.weight ? in[4] : Tensor{},
                       .delta = c.delta,
                       .skip = c.skip ? in[5] : Tensor{}},
                      segments, state);
  };
  return test;
}

std::vector<StatefulRow> rows(const std::vector<Case>& cases) {
  std::vector<StatefulRow> rows;
  for (const Case& c : cases) {
    const StatefulCase test = make(c);
    rows.push_back({c.name,
                    test,
                    c.lengths,
                    {1, 5, 16, 63, 64, 65, 100, 128, 150},
                    test.tokens * c.heads * c.key_dim * c.dim < 100000});
  }
  return rows;
}

INSTANTIATE_TEST_SUITE_P(
    Recurrence, Stateful,
    ::testing::ValuesIn(rows(
        {Case{"lightning", {5, 90, 1}, 2, 2, 16, 16, false, false, false},
         Case{"mamba2", {70, 65, 20}, 1, 4, 16, 24, false, false, true, true},
         Case{"mamba2_small", {3, 9}, 1, 2, 3, 5, false, false, true, true},
         Case{"gdn", {130, 7, 64}, 2, 2, 32, 16, false, true},
         Case{"gdn_shared_keys", {33, 100}, 2, 4, 17, 19, false, true},
         Case{"gdn_small", {7, 2}, 1, 2, 4, 3, false, true, true, true},
         Case{"kda", {66, 80}, 2, 2, 16, 16, true, true},
         Case{"kda_shared_keys", {40, 90, 3}, 1, 3, 23, 18, true, true},
         Case{"kda_small", {6, 3}, 2, 2, 3, 4, true, true},
         Case{"channel_decay", {65, 40}, 2, 2, 20, 33, true, false, true, true},
         Case{"strong_decay", {140}, 1, 2, 16, 16, false, true, true, false, -30.0},
         Case{"strong_channel_decay", {140}, 1, 2, 16, 16, true, true, true, false, -30.0},
         Case{"wide", {100}, 1, 1, 128, 128, false, true},
         Case{"wide_channel", {80}, 1, 1, 128, 64, true, true},
         Case{"wide_scan", {130, 33, 5}, 1, 2, 128, 64, false, false, true, true},
         Case{"wide_values", {70, 90}, 1, 2, 64, 128, false, false, false},
         Case{"wide_many_heads", {70}, 2, 16, 64, 128, false, true, true, true},
         Case{"wide_many_heads_channel", {70}, 2, 16, 64, 128, true, true},
         Case{"wide_strong_decay", {100}, 1, 1, 64, 64, false, true, true, false, -30.0},
         Case{"wide_strong_channel_decay", {100}, 1, 1, 64, 64, true, true, true, false, -30.0},
         Case{"wide_channel_decay", {100}, 1, 1, 128, 64, true, false, true, true, -3.0}})),
    ::testing::PrintToStringParamName());

// Head dims of 96 and 80, states of 256 keys, shared keys, more heads than share a block's gates,
// and decays about as strong as what CUDA still factors within 16 tokens.
INSTANTIATE_TEST_SUITE_P(
    RecurrenceInChunks, Stateful,
    ::testing::ValuesIn(
        rows({Case{"kda_of_96", {70, 33}, 1, 2, 64, 96, true, true},
              Case{"mamba2_of_96", {130}, 1, 2, 96, 64, false, false, true, true},
              Case{"mamba2_many_heads", {90}, 1, 20, 64, 64, false, false, true, true},
              Case{"mamba2_shared_keys", {100, 33}, 2, 8, 128, 64, false, false, true, true},
              Case{"mamba2_of_80", {70, 1, 65}, 1, 2, 128, 80, false, false, true, true},
              Case{"mamba2_of_112", {70, 33}, 1, 2, 64, 112, false, false, true, true},
              Case{"mamba2_of_256_keys", {100, 1, 33}, 1, 2, 256, 128, false, false, true, true},
              Case{"gdn_of_256_keys", {70, 33}, 1, 2, 256, 64, false, true},
              Case{"gdn_of_64", {70, 33, 200}, 1, 3, 64, 64, false, true},
              Case{"channel_decay_shared_keys", {100}, 1, 2, 64, 64, true, false, true, true},
              Case{"medium_channel_decay", {100}, 1, 1, 64, 64, true, true, true, false, -6.0},
              Case{"strong_channel_decay", {100}, 1, 2, 64, 64, true, true, true, false, -30.0}})),
    ::testing::PrintToStringParamName());

// Long sequences with gates at their ends: no NaN, and the kernels still follow the definition.
TEST(RecurrenceExtremes, LongSequencesAndGatesAtTheirEnds) {
  for (const bool per_channel : {false, true}) {
    for (const bool delta : {false, true}) {
      const Case c{"", {3000}, 1, 2, 16, 16, per_channel, delta};
      const StatefulCase test = make(c);
      auto values = draw(test.inputs);
      const double decays[] = {-1e4, 0.0, -1e-6, -0.01, -88.0, -INFINITY, -0.1, 0.0};
      const double weights[] = {0.0, 1.0, 0.5, 1.0, 1.0};
      for (size_t i = 0; i < values[3].size(); ++i) {
        if (i % 7 < 3) {
          values[3][i] = decays[(i / 7) % 8];
        }
        // A stretch without any decay.
        if (i > values[3].size() / 2) {
          values[3][i] *= 1e-3;
        }
      }
      for (size_t i = 0; i < values[4].size(); ++i) {
        values[4][i] = weights[i % 5];
      }
      const OwnedSegments segments = packed_segments(c.lengths);
      const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
        return test.operation(ctx, in, segments.view(), {});
      };
      const testing::Run exact = run_operation<double>(operation, test.inputs, values, true, true);
      for_each_isa([&] {
        const testing::Run run = run_operation<float>(operation, test.inputs, values, false, true);
        EXPECT_LE(relative_error(run.output, exact.output), 1e-4);
        for (size_t i = 0; i < 5; ++i) {
          EXPECT_LE(relative_error(run.grads[i], exact.grads[i]), 1e-3)
              << "gradient of input " << i;
        }
      });
    }
  }
}

// Gradients where segments continue sequences whose states were kept: from anywhere in a chunk.
TEST(RecurrenceContinued, GradientsStartFromTheKeptStates) {
  for (const Case& c : {Case{"", {9, 70, 40}, 1, 2, 5, 6, false, true},
                        Case{"", {40, 70, 1, 90}, 1, 2, 64, 64, false, true},
                        Case{"", {40, 70, 1, 90}, 1, 2, 64, 64, true, true},
                        Case{"", {90, 40}, 2, 2, 64, 128, false, false}}) {
    const StatefulCase test = make(c);
    OwnedSegments segments = packed_segments(c.lengths);
    segments.position = {70, 0, 64, 31};
    segments.position.resize(c.lengths.size());
    const auto rows = static_cast<int64_t>(c.lengths.size());
    for (int64_t row = rows; row-- > 0;) {
      segments.slot.push_back(static_cast<int32_t>(row));
    }
    const std::vector<double> before =
        draw({{{rows, c.heads, c.key_dim, c.dim}, -1.0, 1.0}}, 5).front();
    const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
      const Tensor state =
          ctx.arena->empty(sum_dtype(in[2].dtype), {rows, c.heads, c.key_dim, c.dim});
      put(state, before);
      return test.operation(ctx, in, segments.view(), state);
    };
    if (c.key_dim < 16) {
      expect_gradients_match_differences(operation, test.inputs, 1e-6, 12);
    }
    expect_kernels_match_reference(operation, test.inputs);
  }
}

TEST(RecurrenceViews, ColumnsOfAFusedProjection) {
  const OwnedSegments segments = packed_segments({4, 30});
  const std::vector<Input> inputs = {{{34, 100}}, {{34, 6}, -1.0, 0.0, true, true}};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    const auto part = [&](int64_t begin, int64_t heads, int64_t dim) {
      return in[0].slice(1, begin, heads * dim).split_last(heads, dim);
    };
    return recurrence(ctx,
                      {.q = part(0, 1, 16),
                       .k = part(16, 1, 16),
                       .v = part(32, 2, 20),
                       .log_decay = in[1].slice(1, 2, 2),
                       .weight = in[1].slice(1, 4, 2)},
                      segments.view());
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

TEST(RecurrenceErrors, NameWhatIsWrong) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const OwnedSegments segments{{0, 6}, {0}, {}};
  const RecurrenceInputs good{.q = tensor({6, 2, 8}),
                              .k = tensor({6, 2, 8}),
                              .v = tensor({6, 4, 5}),
                              .log_decay = tensor({6, 4})};
  const auto message = [&](auto change) {
    RecurrenceInputs in = good;
    change(in);
    return error_of([&] { recurrence(ctx, in, segments.view()); });
  };
  EXPECT_EQ(message([&](auto& in) {
              in.k = tensor({6, 2, 7});
            }),
            "[recurrence] expected k shaped like q f32 (6, 2, 8), got f32 (6, 2, 7)");
  EXPECT_EQ(message([&](auto& in) {
              in.v = tensor({6, 3, 5});
            }),
            "[recurrence] expected a number of key heads that divides 3 value heads, got 2");
  EXPECT_EQ(message([&](auto& in) {
              in.log_decay = tensor({6, 4, 5});
            }),
            "[recurrence] expected log_decay f32 (6, 4) or (6, 4, 8), got f32 (6, 4, 5)");
  EXPECT_EQ(message([&](auto& in) { in.delta = true; }),
            "[recurrence] the delta rule needs a weight (its beta), got none");
  EXPECT_EQ(message([&](auto& in) {
              in.weight = tensor({6, 2});
            }),
            "[recurrence] expected weight f32 (6, 4), got f32 (6, 2)");
  EXPECT_EQ(message([&](auto& in) { in.skip = tensor({2}); }),
            "[recurrence] expected skip f32 (4), got f32 (2)");
  EXPECT_EQ(message([&](auto& in) {
              in.q = tensor({6, 2, 16}).slice(2, 0, 8);
            }),
            "[recurrence] expected q f32 (6, Hk, K) with heads together, got f32 (6, 2, 8)");
  EXPECT_EQ(error_of([&] {
              const OwnedSegments slots{{0, 6}, {0}, {0}};
              recurrence(ctx, good, slots.view(), tensor({1, 4, 5, 8}));
            }),
            "[recurrence] expected a contiguous state f32 (1, 4, 8, 5), got f32 (1, 4, 5, 8)");
}

}  // namespace
}  // namespace cambium
