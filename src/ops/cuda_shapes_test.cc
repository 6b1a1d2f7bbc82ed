// Shapes past every boundary of the CUDA kernels, where the definition would take too long: they
// are held to the f32 kernels of the CPU, which are tested against it, on the same inputs.
#include "ops/conv/conv.h"
#include "ops/cuda_shapes_testing.h"
#include "ops/embedding/embedding.h"
#include "ops/matmul/matmul.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence_testing.h"
#include "ops/rope/rope.h"
#include "ops/selective_scan/selective_scan.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

// --- Operations over segments.

/// A stateful operation over `tokens`, without its segments.
struct Mixer {
  const char* name;
  StatefulCase (*make)(int64_t tokens);
};

std::ostream& operator<<(std::ostream& out, const Mixer& m) {
  return out << m.name;
}

StatefulCase scan(int64_t tokens, int64_t channels, int64_t states, int64_t b_groups = 1,
                  int64_t c_groups = 2, GateActivation gate = GateActivation::kSilu) {
  StatefulCase test;
  test.tokens = tokens;
  test.inputs = {{{tokens, channels}},
                 {{tokens, channels}},
                 {{tokens, b_groups, states}},
                 {{tokens, c_groups, states}},
                 {{tokens, channels}},
                 {{channels, states}, -1.0, 2.0, true, true},
                 {{channels}},
                 {{channels}, -4.0, 1.0}};
  test.of_tokens = {true, true, true, true, true, false, false, false};
  test.state_row = {channels, states};
  test.operation = [=](Context& ctx, const In& in, const Segments& segments, const Tensor& state) {
    return selective_scan(ctx, {in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], gate},
                          segments, state);
  };
  return test;
}

StatefulCase sigmoid_scan(int64_t tokens, int64_t channels, int64_t c_groups) {
  return scan(tokens, channels, 16, 1, c_groups, GateActivation::kSigmoid);
}

StatefulCase conv(int64_t tokens, int64_t channels) {
  StatefulCase test;
  test.tokens = tokens;
  test.inputs = {{{tokens, channels}}, {{channels, 4}, -1.0, 1.0, true, true}, {{channels}}};
  test.of_tokens = {true, false, false};
  test.state_row = {channels, 3};
  test.operation = [](Context& ctx, const In& in, const Segments& segments, const Tensor& state) {
    return short_conv(ctx, in[0], in[1], in[2], true, segments, state);
  };
  return test;
}

void expect_packed_matches_cpu(const StatefulCase& test, const std::vector<int64_t>& lengths) {
  const OwnedSegments segments = packed_segments(lengths);
  expect_cuda_matches_cpu(
      [&](Context& ctx, const In& in) { return test.operation(ctx, in, segments.view(), {}); },
      test.inputs, true);
}

class CudaSegments : public CudaShapes, public ::testing::WithParamInterface<Mixer> {};

// Nothing, one token, around a chunk, and many chunks with one token more, packed together.
TEST_P(CudaSegments, EveryLengthTogether) {
  const std::vector<int64_t> lengths{0, 1, 63, 64, 65, 4097, 0};
  const StatefulCase test = GetParam().make(sum(lengths));
  expect_packed_matches_cpu(test, lengths);
  expect_state_matches_cpu(test, lengths);
}

constexpr Heads kHeads{1, 2, 64, 64};
constexpr Heads kOddHeads{2, 2, 20, 33};
constexpr Heads kNanoHeads{1, 2, 128, 80};

INSTANTIATE_TEST_SUITE_P(
    Lengths, CudaSegments,
    ::testing::Values(
        Mixer{"lightning", [](int64_t t) { return lightning(t, kHeads); }},
        Mixer{"mamba2", [](int64_t t) { return mamba2(t, kHeads); }},
        Mixer{"mamba2_odd", [](int64_t t) { return mamba2(t, kOddHeads); }},
        Mixer{"mamba2_80_columns", [](int64_t t) { return mamba2(t, kNanoHeads); }},
        Mixer{"gated_delta_net", [](int64_t t) { return gated_delta_net(t, kHeads); }},
        Mixer{"gated_delta_net_odd", [](int64_t t) { return gated_delta_net(t, kOddHeads); }},
        Mixer{"kimi_delta", [](int64_t t) { return kimi_delta(t, kHeads); }},
        Mixer{"kimi_delta_odd", [](int64_t t) { return kimi_delta(t, kOddHeads); }},
        Mixer{"selective_scan", [](int64_t t) { return scan(t, 20, 16); }},
        Mixer{"selective_scan_tiles", [](int64_t t) { return scan(t, 64, 16, 1, 4); }},
        Mixer{"selective_scan_tiles_8", [](int64_t t) { return scan(t, 32, 16, 4, 4); }},
        Mixer{"selective_scan_sigmoid", [](int64_t t) { return sigmoid_scan(t, 20, 2); }},
        Mixer{"selective_scan_tiles_sigmoid", [](int64_t t) { return sigmoid_scan(t, 64, 4); }},
        Mixer{"conv", [](int64_t t) { return conv(t, 40); }},
        Mixer{"conv_odd", [](int64_t t) { return conv(t, 5); }}),
    ::testing::PrintToStringParamName());

// The tiles of the scan: many short sequences, none of a whole tile, in units of several.
TEST_F(CudaShapes, SelectiveScanOverManyShortSegments) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < 900; ++s) {
    lengths.push_back(s * 7 % 41);
  }
  const StatefulCase test = scan(sum(lengths), 64, 16, 2, 4);
  expect_packed_matches_cpu(test, lengths);
  expect_state_matches_cpu(test, lengths);
}

// More channels than fill a large GPU, so that no sequence is cut: more tiles than a block has room
// for, and sequences that end in either half of one.
TEST_F(CudaShapes, SelectiveScanOfManyChannels) {
  const std::vector<int64_t> lengths{430, 33, 0, 16, 49};
  const StatefulCase test = scan(sum(lengths), 4096, 16, 64, 256);
  expect_packed_matches_cpu(test, lengths);
  expect_state_matches_cpu(test, lengths);
}

// Steps after which nothing is left of a state, beside steps of nothing.
TEST_F(CudaShapes, SelectiveScanOfExtremeSteps) {
  const std::vector<int64_t> lengths{40, 100};
  StatefulCase test = scan(sum(lengths), 64, 16, 1, 4);
  test.inputs[1].lo = -200.0;
  test.inputs[1].hi = 200.0;
  expect_state_matches_cpu(test, lengths);
}

// Gradients that are one memory get what both inputs add.
TEST_F(CudaShapes, SelectiveScanOfOneTensorTwice) {
  const StatefulCase test = scan(100, 64, 16, 2, 2);
  const OwnedSegments segments = packed_segments({60, 40});
  expect_cuda_matches_cpu(
      [&](Context& ctx, const In& in) {
        return selective_scan(ctx, {in[0], in[1], in[2], in[2], in[0], in[5], in[6], in[7]},
                              segments.view());
      },
      test.inputs, true);
}

TEST_F(CudaShapes, SelectiveScanTwiceGivesTheSameBits) {
  const std::vector<int64_t> lengths{300, 1, 77};
  const StatefulCase test = scan(sum(lengths), 128, 16, 1, 8);
  const OwnedSegments segments = packed_segments(lengths);
  const Operation operation = [&](Context& ctx, const In& in) {
    return test.operation(ctx, in, segments.view(), {});
  };
  for (const Dtype type : kTypes) {
    const auto values = draw_as(type, test.inputs);
    const testing::Run one = run_on_cuda(operation, test.inputs, values, type, true);
    const testing::Run two = run_on_cuda(operation, test.inputs, values, type, true);
    EXPECT_EQ(one.output, two.output);
    EXPECT_EQ(one.grads, two.grads);
  }
}

/// Numbers [first, first + count) of rows of `row` numbers.
std::vector<double> rows_of(const std::vector<double>& all, int64_t row, int64_t first,
                            int64_t count) {
  return {all.begin() + first * row, all.begin() + (first + count) * row};
}

class CudaBatchInvariant : public CudaShapes, public ::testing::WithParamInterface<Mixer> {};

// Single tokens, a few and pieces of prompts in one call: every segment's results and state are the
// bits that it gets by itself.
TEST_P(CudaBatchInvariant, ASegmentIsTheSameBesideOthers) {
  const std::vector<int64_t> lengths{1, 70, 1, 5, 300, 1, 33, 8, 1, 0, 9, 64, 2, 31, 32, 1};
  const auto count = static_cast<int64_t>(lengths.size());
  const StatefulCase test = GetParam().make(sum(lengths));
  OwnedSegments segments = packed_segments(lengths);
  for (int64_t s = 0; s < count; ++s) {
    segments.position[static_cast<size_t>(s)] = static_cast<int32_t>(s % 3 == 0 ? 0 : 61 * s);
    segments.slot.push_back(static_cast<int32_t>(count - 1 - s));
  }
  Input state{test.state_row, -0.5, 0.5};
  state.shape.insert(state.shape.begin(), count);
  const auto before = draw({state}, 3)[0];
  const auto state_row = static_cast<int64_t>(before.size()) / count;
  for (const Dtype type : kTypes) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const auto values = draw_as(type, test.inputs);
    const StateRun exact = run_with_state(test, values, segments, before, {}, Dtype::kF32);
    const StateRun together =
        run_with_state(test, values, segments, before, Device::kCuda, type, true);
    EXPECT_LE(norm_error(together.output, exact.output), forward_tolerance(type));
    EXPECT_LE(norm_error(together.state, exact.state), forward_tolerance(type)) << "state";
    for (int64_t s = 0; s < count; ++s) {
      const int64_t length = lengths[static_cast<size_t>(s)];
      const int64_t begin = segments.start[static_cast<size_t>(s)];
      const StatefulCase one = GetParam().make(length);
      std::vector<std::vector<double>> own;
      for (size_t i = 0; i < values.size(); ++i) {
        const auto row = static_cast<int64_t>(values[i].size()) / test.tokens;
        own.push_back(test.of_tokens[i] ? rows_of(values[i], row, begin, length) : values[i]);
      }
      const OwnedSegments alone{{0, static_cast<int32_t>(length)},
                                {segments.position[static_cast<size_t>(s)]},
                                {segments.slot[static_cast<size_t>(s)]}};
      const StateRun run = run_with_state(one, own, alone, before, Device::kCuda, type, true);
      const auto row = static_cast<int64_t>(together.output.size()) / test.tokens;
      EXPECT_EQ(run.output, rows_of(together.output, row, begin, length)) << "segment " << s;
      const int64_t slot = count - 1 - s;
      if (length > 0) {
        EXPECT_EQ(rows_of(run.state, state_row, slot, 1),
                  rows_of(together.state, state_row, slot, 1))
            << "state of segment " << s;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Mixers, CudaBatchInvariant,
    ::testing::Values(
        Mixer{"lightning", [](int64_t t) { return lightning(t, kHeads); }},
        Mixer{"mamba2", [](int64_t t) { return mamba2(t, kHeads); }},
        Mixer{"mamba2_80_columns", [](int64_t t) { return mamba2(t, kNanoHeads); }},
        Mixer{"gated_delta_net", [](int64_t t) { return gated_delta_net(t, kHeads); }},
        Mixer{"gated_delta_net_odd", [](int64_t t) { return gated_delta_net(t, kOddHeads); }},
        Mixer{"kimi_delta", [](int64_t t) { return kimi_delta(t, kHeads); }},
        Mixer{"selective_scan", [](int64_t t) { return scan(t, 64, 16); }},
        Mixer{"selective_scan_odd", [](int64_t t) { return scan(t, 20, 16); }},
        Mixer{"selective_scan_of_few_states", [](int64_t t) { return scan(t, 20, 5); }},
        Mixer{"conv", [](int64_t t) { return conv(t, 40); }},
        Mixer{"conv_odd", [](int64_t t) { return conv(t, 5); }}),
    ::testing::PrintToStringParamName());

class CudaManySegments : public CudaShapes, public ::testing::WithParamInterface<Mixer> {};

// More sequences of one token than a grid is high.
TEST_P(CudaManySegments, OfOneToken) {
  const std::vector<int64_t> lengths(70000, 1);
  const StatefulCase test = GetParam().make(70000);
  expect_packed_matches_cpu(test, lengths);
  expect_state_matches_cpu(test, lengths);
}

INSTANTIATE_TEST_SUITE_P(
    Steps, CudaManySegments,
    ::testing::Values(Mixer{"lightning",
                            [](int64_t t) {
                              return lightning(t, {1, 1, 4, 4});
                            }},
                      Mixer{"gated_delta_net",
                            [](int64_t t) {
                              return gated_delta_net(t, {1, 1, 4, 4});
                            }},
                      Mixer{"kimi_delta",
                            [](int64_t t) {
                              return kimi_delta(t, {1, 1, 4, 4});
                            }},
                      Mixer{"selective_scan", [](int64_t t) { return scan(t, 2, 4); }},
                      Mixer{"selective_scan_16", [](int64_t t) { return scan(t, 12, 16); }},
                      Mixer{"selective_scan_sigmoid",
                            [](int64_t t) { return sigmoid_scan(t, 12, 2); }},
                      Mixer{"conv", [](int64_t t) { return conv(t, 3); }}),
    ::testing::PrintToStringParamName());

class CudaTokens : public CudaShapes, public ::testing::WithParamInterface<Mixer> {};

// Decoding with the heads of real models: one token or none, new sequences and old, beside none and
// beside one of a few tokens.
TEST_P(CudaTokens, OfRealHeads) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < 37; ++s) {
    lengths.push_back(s % 5 == 2 ? 0 : 1);
  }
  expect_state_matches_cpu(GetParam().make(sum(lengths)), lengths);
  lengths.push_back(6);
  expect_state_matches_cpu(GetParam().make(sum(lengths)), lengths);
}

INSTANTIATE_TEST_SUITE_P(Heads, CudaTokens,
                         ::testing::Values(Mixer{"lightning",
                                                 [](int64_t t) {
                                                   return lightning(t, {2, 2, 128, 64});
                                                 }},
                                           Mixer{"mamba2_shared_keys",
                                                 [](int64_t t) {
                                                   return mamba2(t, {1, 4, 128, 64});
                                                 }},
                                           Mixer{"gated_delta_net",
                                                 [](int64_t t) {
                                                   return gated_delta_net(t, {2, 4, 128, 128});
                                                 }},
                                           Mixer{"gated_delta_net_wide_values",
                                                 [](int64_t t) {
                                                   return gated_delta_net(t, {1, 2, 64, 256});
                                                 }},
                                           Mixer{"kimi_delta",
                                                 [](int64_t t) {
                                                   return kimi_delta(t, {3, 3, 128, 128});
                                                 }}),
                         ::testing::PrintToStringParamName());

TEST_P(CudaHeadDims, OfRecurrences) {
  const int64_t dim = GetParam();
  const std::vector<int64_t> lengths{130, 1, 65};
  for (const auto make : {lightning, mamba2, gated_delta_net, kimi_delta}) {
    const StatefulCase test = make(sum(lengths), {1, 2, dim, dim});
    expect_packed_matches_cpu(test, lengths);
    expect_state_matches_cpu(test, lengths);
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, CudaHeadDims, ::testing::Values(64, 96, 128, 256),
                         ::testing::PrintToStringParamName());

// --- A segment of more tokens than a grid is high, twice over and one more.

constexpr int64_t kLong = 2 * 65536 + 1;

struct LongCase {
  const char* name;
  std::vector<Input> inputs;
  Operation operation;
};

std::ostream& operator<<(std::ostream& out, const LongCase& c) {
  return out << c.name;
}

class CudaLongSegment : public CudaShapes, public ::testing::WithParamInterface<LongCase> {};

TEST_P(CudaLongSegment, MatchesCpu) {
  expect_cuda_matches_cpu(GetParam().operation, GetParam().inputs, true);
}

INSTANTIATE_TEST_SUITE_P(
    Tokens, CudaLongSegment,
    ::testing::Values(
        LongCase{"rms_norm",
                 {{{kLong, 8}}, {{8}}},
                 [](Context& c, const In& in) { return rms_norm(c, in[0], in[1], 1e-5F); }},
        LongCase{"rms_norm_of_heads",
                 {{{kLong, 2, 3}}, {{3}}},
                 [](Context& c, const In& in) { return rms_norm(c, in[0], in[1], 1e-5F, true); }},
        LongCase{
            "layer_norm",
            {{{kLong, 5}}, {{5}}, {{5}}},
            [](Context& c, const In& in) { return layer_norm(c, in[0], in[1], in[2], 1e-2F); }},
        LongCase{"gated_rms_norm",
                 {{{kLong, 8}}, {{kLong, 8}}, {{8}}},
                 [](Context& c, const In& in) {
                   return gated_rms_norm(c, in[0], in[1], in[2], {.group = 4});
                 }},
        LongCase{"gated_rms_norm_of_wide_groups",
                 {{{2049, 2560}}, {{2049, 2560}}, {{2560}}},
                 [](Context& c, const In& in) {
                   return gated_rms_norm(c, in[0], in[1], in[2], {.group = 1280});
                 }},
        LongCase{"gated_rms_norm_after",
                 {{{kLong, 6}}, {{kLong, 6}}, {{3}}},
                 [](Context& c, const In& in) {
                   return gated_rms_norm(c, in[0], in[1], in[2],
                                         {.group = 3, .order = GateOrder::kNormFirst});
                 }},
        LongCase{"l2_norm",
                 {{{kLong, 2, 4}}},
                 [](Context& c, const In& in) { return l2_norm(c, in[0], 1e-3F, 0.5F); }},
        LongCase{"add",
                 {{{kLong, 8}}, {{kLong, 8}}},
                 [](Context& c, const In& in) { return add(c, in[0], in[1]); }},
        LongCase{"add_scaled",
                 {{{kLong, 5}}, {{kLong, 5}}},
                 [](Context& c, const In& in) { return add_scaled(c, 0.5F, in[0], 2.0F, in[1]); }},
        LongCase{"swiglu_of_a_projection",
                 {{{kLong, 10}}},
                 [](Context& c, const In& in) {
                   return swiglu(c, in[0].slice(1, 0, 5), in[0].slice(1, 5, 5));
                 }},
        LongCase{"sigmoid",
                 {{{kLong, 8}, -4, 4}},
                 [](Context& c, const In& in) { return sigmoid(c, in[0]); }},
        LongCase{"step_size",
                 {{{kLong, 3}, -3, 3}, {{3}}},
                 [](Context& c, const In& in) { return step_size(c, in[0], in[1], 0.0F, 1e9F); }},
        LongCase{"log_decay",
                 {{{kLong, 3}, 0, 2}, {{3}}},
                 [](Context& c, const In& in) { return log_decay(c, in[0], in[1]); }},
        LongCase{"repeat_heads",
                 {{{kLong, 2, 3}}},
                 [](Context& c, const In& in) { return repeat_heads(c, in[0], 2); }},
        LongCase{"matmul",
                 {{{kLong, 8}}, {{3, 8}, -1.0, 1.0, true, true}, {{3}}},
                 [](Context& c, const In& in) { return matmul(c, in[0], in[1], in[2]); }}),
    ::testing::PrintToStringParamName());

TEST_F(CudaShapes, RopeOverALongSegment) {
  RopeTable table({.dim = 6});
  table.ensure(kLong);
  const OwnedSegments segments = packed_segments({kLong});
  expect_cuda_matches_cpu(
      [&](Context& ctx, const In& in) {
        return rope(ctx, in[0], table.turns(ctx, segments.view()));
      },
      {{{kLong, 1, 8}}}, true);
}

// So many pieces of heads that a thread takes four heads, of which the last are fewer; whole heads
// and parts of them, queries that are scaled, keys of one head, and heads of a wider row.
TEST_F(CudaShapes, RopeOfManyHeads) {
  constexpr int64_t kTokens = 9400, kHeads = 7;
  const OwnedSegments segments = packed_segments({5000, 0, 1, 4399});
  RopeTable table({.dim = 64, .original_length = 1000, .query_beta = 0.1});
  table.ensure(kTokens);
  for (const int64_t channels : {64, 96}) {
    SCOPED_TRACE(channels);
    expect_cuda_matches_cpu(
        [&](Context& ctx, const In& in) {
          const auto [q, k] = rope(ctx, in[0], in[1], table.turns(ctx, segments.view()));
          return add(ctx, q, repeat_heads(ctx, k, kHeads));
        },
        {{{kTokens, kHeads, channels}}, {{kTokens, 1, channels}}}, true);
    const int64_t width = kHeads * channels;
    expect_cuda_matches_cpu(
        [&](Context& ctx, const In& in) {
          return rope(ctx, in[0].slice(1, 8, width).split_last(kHeads, channels),
                      table.turns(ctx, segments.view()));
        },
        {{{kTokens, width + 16}}}, true);
  }
}

// Runs of several lengths, whose ends are those of segments, or one more or less.
TEST_F(CudaShapes, ConvOfRunsOfEveryLength) {
  for (const int64_t channels : {8, 4096, 12288}) {
    SCOPED_TRACE(channels);
    const std::vector<int64_t> lengths{1, 15, 16, 0, 17, 63, 64, 65, 2, 257};
    for (const bool continues : {true, false}) {
      expect_state_matches_cpu(conv(sum(lengths), channels), lengths, continues);
      expect_state_matches_cpu(conv(1000, channels), {1000}, continues);
    }
    expect_packed_matches_cpu(conv(sum(lengths), channels), lengths);
  }
}

TEST_F(CudaShapes, EmbeddingOfALongSegment) {
  std::vector<int32_t> tokens(kLong);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int32_t>(i * i % 101);
  }
  expect_cuda_matches_cpu([&](Context& ctx, const In& in) { return embedding(ctx, in[0], tokens); },
                          {{{101, 8}, -1.0, 1.0, true, true}}, true);
}

class CudaLongSequence : public CudaShapes, public ::testing::WithParamInterface<Mixer> {};

TEST_P(CudaLongSequence, MatchesCpu) {
  expect_packed_matches_cpu(GetParam().make(kLong), {kLong});
}

INSTANTIATE_TEST_SUITE_P(Tokens, CudaLongSequence,
                         ::testing::Values(Mixer{"mamba2",
                                                 [](int64_t t) {
                                                   return mamba2(t, {1, 1, 64, 64});
                                                 }},
                                           Mixer{"gated_delta_net",
                                                 [](int64_t t) {
                                                   return gated_delta_net(t, {1, 1, 64, 64});
                                                 }},
                                           Mixer{"gated_delta_net_odd",
                                                 [](int64_t t) {
                                                   return gated_delta_net(t, {1, 1, 20, 33});
                                                 }},
                                           Mixer{"kimi_delta",
                                                 [](int64_t t) {
                                                   return kimi_delta(t, {1, 1, 64, 64});
                                                 }},
                                           Mixer{"selective_scan",
                                                 [](int64_t t) { return scan(t, 3, 4, 1, 1); }},
                                           Mixer{"selective_scan_tiles",
                                                 [](int64_t t) { return scan(t, 32, 16, 4, 4); }},
                                           Mixer{"conv", [](int64_t t) { return conv(t, 5); }}),
                         ::testing::PrintToStringParamName());

TEST_F(CudaShapes, ConvKeepsTheEndOfALongSegment) {
  expect_state_matches_cpu(conv(kLong, 8), {kLong});
}

}  // namespace
}  // namespace cambium
