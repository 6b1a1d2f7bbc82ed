#include "ops/attention/attention.h"

#include <numeric>

#include "base/checked.h"
#include "base/parallel.h"
#include "base/testing.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::for_each_isa;
using testing::Input;
using testing::relative_error;

/// Segments of the given lengths, all from position 0 or from the given ones.
struct Packing {
  explicit Packing(const std::vector<int32_t>& lengths, std::vector<int32_t> positions = {})
      : position(std::move(positions)) {
    for (const int32_t n : lengths) {
      start.push_back(start.back() + n);
    }
    position.resize(lengths.size());
  }
  Segments segments() const { return {.start = start, .position = position, .slot = {}}; }
  std::vector<int32_t> start = {0};
  std::vector<int32_t> position;
};

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, dim, value_dim, window;
  double range = 1.0;
  int64_t sinks = 0;
  float softcap = 0.0F;
  bool sink_logits = false;
};

int64_t tokens(const std::vector<int32_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

std::vector<Input> inputs_of(const Case& c) {
  const int64_t t = tokens(c.lengths);
  std::vector<Input> inputs = {{{t, c.heads, c.dim}, -c.range, c.range},
                               {{t, c.kv_heads, c.dim}, -c.range, c.range},
                               {{t, c.kv_heads, c.value_dim}}};
  if (c.sink_logits) {
    inputs.push_back({{c.heads}, -2, 4});
  }
  return inputs;
}

std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (const int32_t length : c.lengths) {
    out << length << "_";
  }
  out << "tokens_" << c.heads << "_on_" << c.kv_heads << "_heads_of_" << c.dim;
  if (c.value_dim != c.dim) {
    out << "_and_" << c.value_dim;
  }
  if (c.window > 0) {
    out << "_window_" << c.window;
  }
  if (c.sinks > 0) {
    out << "_sinks_" << c.sinks;
  }
  if (c.softcap > 0) {
    out << "_cap_" << static_cast<int>(100 * c.softcap);
  }
  if (c.sink_logits) {
    out << "_logits";
  }
  return out;
}

class AttentionCases : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionCases, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Case& c = GetParam();
  const Packing packing(c.lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(),
                     {.scale = 1.0F / std::sqrt(static_cast<float>(c.dim)),
                      .window = c.window,
                      .sinks = c.sinks,
                      .softcap = c.softcap,
                      .sink_logits = c.sink_logits ? in[3] : Tensor{}});
  };
  if (tokens(c.lengths) <= 50) {
    expect_gradients_match_differences(operation, inputs_of(c), 1e-6, 12);
  }
  expect_kernels_match_reference(operation, inputs_of(c));
}

// A window of 1 and a first token have probability 1 and gradient 0, of which only rounding is
// left; other rows of the same cases hide that.
INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionCases,
    ::testing::Values(Case{{2}, 1, 1, 4, 4, 0}, Case{{5}, 4, 2, 8, 8, 0},
                      Case{{9, 1, 0, 7}, 3, 1, 5, 3, 0}, Case{{12, 20}, 4, 2, 16, 16, 6},
                      Case{{33}, 6, 2, 7, 11, 2}, Case{{70, 131, 40}, 4, 2, 16, 16, 0},
                      Case{{100, 41}, 9, 3, 64, 64, 0}, Case{{129, 65}, 2, 2, 24, 40, 50},
                      Case{{20}, 16, 1, 128, 128, 0}, Case{{6}, 1, 1, 256, 256, 0},
                      Case{{70, 9}, 2, 2, 192, 128, 0}, Case{{600, 30, 257}, 1, 1, 8, 8, 0},
                      Case{{700}, 2, 1, 4, 6, 300}, Case{{530}, 1, 1, 16, 4, 7},
                      Case{{1, 63, 0, 65}, 8, 2, 64, 64, 0}, Case{{130, 64}, 3, 1, 64, 64, 40},
                      Case{{1, 63, 0, 65}, 8, 2, 128, 128, 0}),
    ::testing::PrintToStringParamName());

// Sinks beside the window and behind it, more than the window, more than the sequence, in more than
// one chunk of the backward pass, and up to one key before the window.
INSTANTIATE_TEST_SUITE_P(
    Sinks, AttentionCases,
    ::testing::Values(Case{{12, 20}, 4, 2, 16, 16, 6, 1.0, 3}, Case{{33}, 6, 2, 7, 11, 2, 1.0, 5},
                      Case{{9, 1, 0, 7}, 3, 1, 5, 3, 4, 1.0, 20}, Case{{40}, 2, 1, 8, 8, 1, 1.0, 1},
                      Case{{129, 65}, 2, 2, 24, 40, 50, 1.0, 64},
                      Case{{700}, 2, 1, 4, 6, 300, 1.0, 10}, Case{{530}, 1, 1, 16, 4, 7, 1.0, 70},
                      Case{{900}, 1, 1, 8, 8, 20, 1.0, 300}),
    ::testing::PrintToStringParamName());

// Scores far beyond the cap and far below it.
INSTANTIATE_TEST_SUITE_P(SoftCap, AttentionCases,
                         ::testing::Values(Case{{5}, 4, 2, 8, 8, 0, 1.0, 0, 0.5F},
                                           Case{{12, 20}, 4, 2, 16, 16, 6, 2.0, 0, 0.7F},
                                           Case{{9, 1, 0, 7}, 3, 1, 5, 3, 4, 1.0, 20, 0.3F},
                                           Case{{33}, 6, 2, 7, 11, 2, 3.0, 5, 2.0F},
                                           Case{{129, 65}, 2, 2, 24, 40, 50, 1.0, 64, 0.2F},
                                           Case{{100, 41}, 9, 3, 64, 64, 0, 2.0, 0, 50.0F},
                                           Case{{20}, 16, 1, 128, 128, 0, 2.0, 0, 1.0F},
                                           Case{{20}, 2, 1, 256, 256, 0, 2.0, 0, 1.0F},
                                           Case{{600, 30, 257}, 1, 1, 8, 8, 0, 4.0, 0, 3.0F}),
                         ::testing::PrintToStringParamName());

// Sinks with a score and without a value, alone and with everything else.
INSTANTIATE_TEST_SUITE_P(SinkLogits, AttentionCases,
                         ::testing::Values(Case{{5}, 4, 2, 8, 8, 0, 1.0, 0, 0.0F, true},
                                           Case{{12, 20}, 4, 2, 16, 16, 6, 1.0, 0, 0.0F, true},
                                           Case{{9, 1, 0, 7}, 3, 1, 5, 3, 4, 1.0, 20, 0.0F, true},
                                           Case{{33}, 6, 2, 7, 11, 2, 1.0, 5, 0.4F, true},
                                           Case{{129, 65}, 2, 2, 24, 40, 50, 1.0, 64, 0.0F, true},
                                           Case{{100, 41}, 9, 3, 64, 64, 0, 1.0, 0, 0.0F, true},
                                           Case{{20}, 16, 1, 128, 128, 0, 1.0, 0, 0.6F, true},
                                           Case{{40}, 2, 1, 256, 256, 9, 1.0, 0, 0.0F, true},
                                           Case{{600, 30, 257}, 1, 1, 8, 8, 0, 1.0, 0, 0.0F, true},
                                           Case{{530}, 1, 1, 16, 4, 7, 1.0, 70, 1.5F, true}),
                         ::testing::PrintToStringParamName());

// A sink of a large score takes nearly all, one of a small score nothing.
TEST(AttentionSinkLogits, TakeTheirShareOfTheSoftmax) {
  const Case shape = {{30}, 2, 1, 8, 8, 0};
  const Packing packing(shape.lengths);
  const auto values = testing::draw(inputs_of(shape));
  const auto run = [&](float logit) {
    std::vector<double> logits = {logit, -1e30};
    const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
      return attention(ctx, in[0], in[1], in[2], packing.segments(),
                       {.scale = 0.3F,
                        .sink_logits = logit == 0.0F ? Tensor{} : Tensor::of(logits.data(), {2})});
    };
    return testing::run_operation<double>(operation, inputs_of(shape), values, true, false).output;
  };
  const std::vector<double> without = run(0.0F);
  const std::vector<double> with = run(50.0F);
  for (size_t i = 0; i < without.size(); ++i) {
    EXPECT_NEAR(with[i], i / 8 % 2 == 0 ? 0.0 : without[i], 1e-12) << i;
  }
}

TEST(AttentionSinks, NothingBetweenThemAndTheWindowIsRead) {
  const Case shape = {{400}, 2, 1, 8, 8, 30, 1.0, 5};
  const Packing packing(shape.lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(),
                     {.scale = 0.3F, .window = shape.window, .sinks = shape.sinks});
  };
  auto values = testing::draw(inputs_of(shape));
  const auto run = [&] {
    return testing::run_operation<float>(operation, inputs_of(shape), values, false, false).output;
  };
  const std::vector<double> before = run();
  for (size_t i = 0; i < 8; ++i) {
    values[1][static_cast<size_t>(5 * 8) + i] += 3.0;   // the first key that is no sink
    values[2][static_cast<size_t>(5 * 8) + i] += 3.0;   // and its value
    values[2][static_cast<size_t>(4 * 8) + i] += 1e-3;  // the last that is one
  }
  const std::vector<double> after = run();
  const auto moved = [&](int64_t token) {
    double most = 0.0;
    for (int64_t i = token * 16; i < (token + 1) * 16; ++i) {
      const auto at = static_cast<size_t>(i);
      most = larger_error(most, std::abs(after[at] - before[at]));
    }
    return most;
  };
  EXPECT_EQ(moved(3), 0.0);
  EXPECT_GT(moved(34), 1e-3);  // the last token with the key in its window
  for (const int64_t token : {35, 36, 200, 399}) {
    EXPECT_GT(moved(token), 0.0) << token;
    EXPECT_LT(moved(token), 1e-3) << token;
  }
}

TEST(AttentionViews, ValuesBesidePartsOfKeysInEachHead) {
  const Packing packing({19, 30});
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    const Tensor both = in[1].split_last(3, 24);  // of keys 8, of values 16
    return attention(ctx, in[0], both.slice(2, 0, 8), both.slice(2, 8, 16), packing.segments(),
                     {.scale = 0.4F});
  };
  const std::vector<Input> inputs = {{{49, 3, 8}}, {{49, 72}}};
  expect_gradients_match_differences(operation, inputs, 1e-6, 12);
  expect_kernels_match_reference(operation, inputs);
}

TEST(AttentionViews, HeadsOfAFusedProjection) {
  // q, k and v are column slices of one tensor, and so are their gradients.
  const Packing packing({19, 30});
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    const Tensor q = in[0].slice(1, 0, 32).split_last(4, 8);
    const Tensor k = in[0].slice(1, 32, 16).split_last(2, 8);
    const Tensor v = in[0].slice(1, 48, 20).split_last(2, 10);
    return attention(ctx, q, k, v, packing.segments(), {.scale = 0.4F});
  };
  const std::vector<Input> inputs = {{{49, 70}}};
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

TEST(AttentionGradients, FrozenInputsAreLeftOut) {
  const Packing packing({21});
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(), {.scale = 0.4F});
  };
  for (size_t wanted = 0; wanted < 3; ++wanted) {
    std::vector<Input> inputs = inputs_of({{21}, 4, 2, 8, 8, 0});
    for (size_t i = 0; i < 3; ++i) {
      inputs[i].differentiable = i == wanted;
    }
    expect_kernels_match_reference(operation, inputs);
  }
}

TEST(AttentionExtremes, LargeLogitsGiveNoNan) {
  const Packing packing({90, 40});
  const Case shape = {{90, 40}, 4, 2, 16, 16, 0, 1e4};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(), {.scale = 1e3F});
  };
  const auto values = testing::draw(inputs_of(shape));
  const auto exact =
      testing::run_operation<double>(operation, inputs_of(shape), values, true, false);
  for_each_isa([&] {
    const auto run =
        testing::run_operation<float>(operation, inputs_of(shape), values, false, true);
    EXPECT_LE(relative_error(run.output, exact.output), 1e-5);
    for (const auto& grad : run.grads) {
      EXPECT_TRUE(std::all_of(grad.begin(), grad.end(), [](double x) { return std::isfinite(x); }));
    }
  });
}

TEST(AttentionExtremes, ANanIsNotSwallowed) {
  const Packing packing({40});
  const Case shape = {{40}, 2, 1, 8, 8, 0};
  auto values = testing::draw(inputs_of(shape));
  values[1][0] = NAN;  // a key of token 0, which every token sees
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(), {});
  };
  for_each_isa([&] {
    const auto run =
        testing::run_operation<float>(operation, inputs_of(shape), values, false, false);
    EXPECT_TRUE(
        std::all_of(run.output.begin(), run.output.end(), [](double x) { return std::isnan(x); }));
  });
}

std::vector<double> row_range(const std::vector<double>& all, int64_t first, int64_t count,
                              int64_t row) {
  return {all.begin() + first * row, all.begin() + (first + count) * row};
}

TEST(AttentionPacking, SegmentsEqualSeparateSequencesBitForBit) {
  const std::vector<int32_t> lengths = {37, 1, 300, 64};
  const Case all = {lengths, 4, 2, 16, 16, 0};
  const auto values = testing::draw(inputs_of(all));
  const auto run = [](const std::vector<int32_t>& n, const std::vector<std::vector<double>>& x) {
    const Packing packing(n);
    return testing::run_operation<float>(
        [&](Context& ctx, const std::vector<Tensor>& in) {
          return attention(ctx, in[0], in[1], in[2], packing.segments(), {.scale = 0.25F});
        },
        inputs_of({n, 4, 2, 16, 16, 0}), x, false, false);
  };
  for_each_isa([&] {
    const auto packed = run(lengths, values);
    int64_t first = 0;
    for (const int32_t n : lengths) {
      const auto alone =
          run({n}, {row_range(values[0], first, n, 64), row_range(values[1], first, n, 32),
                    row_range(values[2], first, n, 32)});
      EXPECT_EQ(alone.output, row_range(packed.output, first, n, 64));
      first += n;
    }
  });
}

TEST(AttentionThreads, ResultsDoNotDependOnTheirNumber) {
  const Packing packing({700, 90});
  const Case shape = {{700, 90}, 3, 1, 16, 16, 0};
  const auto values = testing::draw(inputs_of(shape));
  const auto run = [&] {
    return testing::run_operation<float>(
        [&](Context& ctx, const std::vector<Tensor>& in) {
          return attention(ctx, in[0], in[1], in[2], packing.segments(), {.scale = 0.25F});
        },
        inputs_of(shape), values, false, true);
  };
  const int before = num_threads();
  set_num_threads(1);
  const auto one = run();
  set_num_threads(5);
  const auto five = run();
  set_num_threads(before);
  EXPECT_EQ(one.output, five.output);
  EXPECT_EQ(one.grads, five.grads);
}

TEST(AttentionErrors, NameWhatWasExpected) {
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena};
  const Packing packing({4});
  const auto f32 = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const Tensor q = f32({4, 4, 8});
  const Tensor k = f32({4, 2, 8});
  const auto message = [&](const Tensor& a, const Tensor& b, const Tensor& c,
                           const Segments& segments, const AttentionConfig& config) {
    return testing::message_of([&] { attention(ctx, a, b, c, segments, config); });
  };
  EXPECT_EQ(message(q, k, k, packing.segments(), {}), "no error");
  EXPECT_EQ(message(q, f32({4, 3, 8}), f32({4, 3, 8}), packing.segments(), {}),
            "[attention] expected query heads a multiple of key-value heads, got 4 and 3");
  EXPECT_EQ(message(q, f32({4, 2, 6}), k, packing.segments(), {}),
            "[attention] expected k f32 (4, Hkv, 8) beside q f32 (4, 4, 8), got f32 (4, 2, 6)");
  EXPECT_EQ(message(q, k, f32({4, 4, 8}), packing.segments(), {}),
            "[attention] expected v f32 (4, 2, Dv) beside k f32 (4, 2, 8), got f32 (4, 4, 8)");
  EXPECT_EQ(message(q, k, k, Packing({3}).segments(), {}),
            "[attention] expected segments over 4 tokens, got 3");
  EXPECT_EQ(message(q, k, k, packing.segments(), {.window = -1}),
            "[attention] expected a window of at least 1 (0 = none), got -1");
  EXPECT_EQ(message(q, k, k, packing.segments(), {.window = 2, .sinks = -1}),
            "[attention] expected sinks of at least 0 and none without a window, got -1 and a "
            "window of 2");
  EXPECT_EQ(message(q, k, k, packing.segments(), {.sinks = 3}),
            "[attention] expected sinks of at least 0 and none without a window, got 3 and a "
            "window of 0");
  EXPECT_EQ(message(q, k, k, packing.segments(), {.softcap = -1.0F}),
            "[attention] expected a softcap above 0 (0 = none), got -1");
  EXPECT_EQ(message(q, k, k, packing.segments(), {.sink_logits = f32({2})}),
            "[attention] expected sink_logits f32 (4), got f32 (2)");
  EXPECT_EQ(message(f32({4, 1, 300}), f32({4, 1, 300}), f32({4, 1, 8}), packing.segments(), {}),
            "[attention] expected head dims up to 256, got 300 and 8");
}

}  // namespace
}  // namespace cambium
