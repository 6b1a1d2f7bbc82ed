// The definition is what the operations it stands for give in turn; the CUDA kernel is held to it.
#include "ops/scan_step/scan_step.h"

#include "ops/conv/conv.h"
#include "ops/cuda_shapes_testing.h"
#include "ops/pointwise/pointwise.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  int64_t groups;  // of x and B
  int64_t repeat;
  int64_t states = 16;
  int64_t taps = 4;
  bool conv_bias = true;
  GateActivation gate = GateActivation::kSilu;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

constexpr int64_t kSlots = 7;

OwnedSegments five_tokens() {
  return {{0, 1, 2, 3, 4, 5}, {0, 7, 64, 0, 200}, {4, 1, 6, 0, 2}};
}

std::vector<Input> inputs_of(const Case& c) {
  const int64_t tokens = 5;
  const int64_t d = c.groups * c.repeat * c.states;
  return {{{tokens, c.groups * c.states}},
          {{d, c.taps}, -1.0, 1.0, true, true},
          {{d}},
          {{tokens, d}},
          {{tokens, c.groups, c.states}},
          {{tokens, c.groups * c.repeat, c.states}},
          {{tokens, d}, -2.0, 2.0},
          {{d, c.states}, -1.0, 2.0, true, true},
          {{d}},
          {{d}, -4.0, 1.0}};
}

ScanStepInputs step_of(const Case& c, const In& in) {
  return {in[0],
          in[1],
          c.conv_bias ? in[2] : Tensor{},
          {{}, in[3], in[4], in[5], in[6], in[7], in[8], in[9], c.gate}};
}

/// The same by the operations it stands for.
Tensor in_turn(Context& ctx, const Case& c, const ScanStepInputs& in, const Segments& segments,
               const Tensor& conv, const Tensor& state) {
  SelectiveScanInputs scan = in.scan;
  const Tensor u = repeat_heads(ctx, in.x.split_last(c.groups, c.states), c.repeat).merge_last();
  scan.u = short_conv(ctx, u, in.conv_weight, in.conv_bias, true, segments, conv);
  return selective_scan(ctx, scan, segments, state);
}

struct StepRun {
  std::vector<double> y, conv, state;
};

StepRun run(const Case& c, const std::vector<std::vector<double>>& values, Device device,
            Dtype type, bool whole) {
  Workspace workspace(device);
  const WorkspaceScope scope(workspace);
  Context ctx = workspace.context(type);
  const std::vector<Input> inputs = inputs_of(c);
  std::vector<OwnedTensor> owned;
  In in;
  for (size_t i = 0; i < inputs.size(); ++i) {
    owned.emplace_back(inputs[i].dtype(type), std::span<const int64_t>(inputs[i].shape), false,
                       device);
    put(owned.back().view, values[i]);
    in.push_back(owned.back().view);
  }
  const auto draw_state = [&](std::initializer_list<int64_t> shape, uint64_t seed) {
    OwnedTensor t(sum_dtype(type), shape, false, device);
    put(t.view, draw({{std::vector<int64_t>(shape), -0.5, 0.5}}, seed)[0]);
    return t;
  };
  const int64_t d = in[3].dim(1);
  const OwnedTensor conv = draw_state({kSlots, d, c.taps - 1}, 3);
  const OwnedTensor state = draw_state({kSlots, d, c.states}, 4);
  const OwnedSegments segments = five_tokens();
  const ScanStepInputs step = step_of(c, in);
  EXPECT_EQ(scan_step_serves(ctx, step, segments.view()),
            device.kind == Device::kCuda && c.states == 16);
  const Tensor y = whole ? scan_step(ctx, step, segments.view(), conv.view, state.view)
                         : in_turn(ctx, c, step, segments.view(), conv.view, state.view);
  return {take(y), take(conv.view), take(state.view)};
}

void expect_like(const StepRun& one, const StepRun& exact, double tolerance) {
  EXPECT_LE(norm_error(one.y, exact.y), tolerance);
  EXPECT_LE(norm_error(one.conv, exact.conv), tolerance) << "the convolution's state";
  EXPECT_LE(norm_error(one.state, exact.state), tolerance) << "the scan's state";
}

class ScanStepOf : public ::testing::TestWithParam<Case> {};

TEST_P(ScanStepOf, IsItsOperationsInTurn) {
  const auto values = draw(inputs_of(GetParam()));
  expect_like(run(GetParam(), values, {}, Dtype::kF64, true),
              run(GetParam(), values, {}, Dtype::kF64, false), 1e-12);
}

TEST_P(ScanStepOf, KernelsMatchDefinition) {
  const Case& c = GetParam();
  const auto values = draw(inputs_of(c));
  expect_like(run(c, values, {}, Dtype::kF32, true), run(c, values, {}, Dtype::kF64, true),
              kForward);
  for (const Dtype type : kTypes) {
    if (!on_cuda() || c.states != 16) {
      return;
    }
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const auto stored = draw_as(type, inputs_of(c));
    expect_like(run(c, stored, Device::kCuda, type, true), run(c, stored, {}, Dtype::kF64, true),
                forward_tolerance(type));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ScanStepOf,
    ::testing::Values(Case{"of_attention", 8, 7}, Case{"alone", 1, 1},
                      Case{"three_taps", 2, 3, 16, 3, false}, Case{"two_taps", 5, 1, 16, 2},
                      Case{"sigmoid", 2, 3, 16, 4, true, GateActivation::kSigmoid},
                      Case{"few_states", 2, 2, 4}),
    ::testing::PrintToStringParamName());

TEST(ScanStep, NamesWhatIsWrong) {
  const Case c{"", 2, 2};
  const auto message = [&](const std::function<void(ScanStepInputs&)>& change,
                           OwnedSegments segments = five_tokens()) {
    Arena arena;
    const Context ctx{.arena = &arena};
    In in;
    for (const Input& input : inputs_of(c)) {
      in.push_back(arena.empty(Dtype::kF32, input.shape));
    }
    const Tensor conv = arena.empty(Dtype::kF32, {kSlots, 64, 3});
    const Tensor state = arena.empty(Dtype::kF32, {kSlots, 64, 16});
    ScanStepInputs step = step_of(c, in);
    change(step);
    return error_of([&] { scan_step(ctx, step, segments.view(), conv, state); });
  };
  EXPECT_EQ(message([](auto& in) { in.x = in.x.slice(1, 0, 20); }),
            "[scan_step] expected heads of 16 channels in x that make up 64 when repeated, got f32 "
            "(5, 20)");
  EXPECT_EQ(message([](auto& in) { in.scan.z = in.x; }),
            "[scan_step] expected z and dt f32 (5, d), got f32 (5, 32) and f32 (5, 64)");
  EXPECT_EQ(message([](auto& in) { in.conv_weight = in.scan.a_log.slice(0, 0, 32); }),
            "[scan_step] expected conv_weight f32 (64, taps), got f32 (32, 16)");
  EXPECT_EQ(message([](auto&) {}, {{0, 2, 5}, {0, 1}, {0, 1}}),
            "[scan_step] expected states and segments of one token");
}

}  // namespace
}  // namespace cambium
