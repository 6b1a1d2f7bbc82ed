// The definition is what the operations it stands for give in turn; the CUDA kernel is held to it.
#include "ops/recurrent_step/recurrent_step.h"

#include "ops/conv/conv.h"
#include "ops/cuda_shapes_testing.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  int64_t heads, q_heads, k_heads, v_heads, key_dim, dim;
  int64_t taps = 4;
  bool conv_bias = true;
  bool unit = true;  // q and k of length one, as the delta rule has them
  int64_t rope = 0;  // dims that turn
  bool interleaved = false;
  bool per_channel = false;
  float bound = 0.0F;
  float strongest = 1.0F;
  bool mamba = false;  // no delta rule, w the step, values first, a skip
  bool normed = true;
  bool own_weights = false;  // of the norm, each head
  GateOrder order = GateOrder::kNormFirst;
  GateActivation activation = GateActivation::kSilu;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

constexpr int64_t kSlots = 7;
constexpr int64_t kBeforeZ = 3;  // columns: rows of a projection begin anywhere

OwnedSegments five_tokens() {
  return {{0, 1, 2, 3, 4, 5}, {0, 7, 64, 0, 200}, {4, 1, 6, 0, 2}};
}

enum Drawn { kX, kConvWeight, kConvBias, kDecay, kWeight, kALog, kDtBias, kSkip, kZ, kNorm };

std::vector<Input> inputs_of(const Case& c) {
  const int64_t tokens = 5;
  const int64_t channels = (c.q_heads + c.k_heads) * c.key_dim + c.v_heads * c.dim;
  const int64_t decays = c.per_channel ? c.heads * c.key_dim : c.heads;
  return {{{tokens, channels}},
          {{channels, c.taps}, -1.0, 1.0, true, true},
          {{channels}},
          {{tokens, decays}},
          {{tokens, c.heads}},
          {{c.heads}, -1.0, 1.0},
          {{decays}, -3.0, 0.0},
          {{c.heads}},
          {{tokens, kBeforeZ + c.heads * c.dim}, -2.0, 2.0},
          {{c.own_weights ? c.heads * c.dim : c.dim}, 0.5, 1.5}};
}

RecurrentStepInputs step_of(const Case& c, const In& in, const Turns* turns) {
  return {.x = in[kX],
          .conv_weight = in[kConvWeight],
          .conv_bias = c.conv_bias ? in[kConvBias] : Tensor{},
          .values_first = c.mamba,
          .q_heads = c.q_heads,
          .k_heads = c.k_heads,
          .v_heads = c.v_heads,
          .key_dim = c.key_dim,
          .unit_eps = c.unit ? 1e-6F : 0.0F,
          .turns = turns,
          .decay = in[kDecay],
          .weight = c.mamba ? Tensor{} : in[kWeight],
          .strongest = c.strongest,
          .a_log = in[kALog],
          .dt_bias = in[kDtBias],
          .bound = c.bound,
          .delta = !c.mamba,
          .skip = c.mamba ? in[kSkip] : Tensor{},
          .z = in[kZ].slice(1, kBeforeZ, c.heads * c.dim),
          .norm = c.normed ? in[kNorm] : Tensor{},
          .norm_config = {1e-5F, c.dim, c.order, c.activation}};
}

/// The same by the operations it stands for.
Tensor in_turn(Context& ctx, const RecurrentStepInputs& in, const Segments& segments,
               const Tensor& conv, const Tensor& state) {
  const int64_t heads = in.a_log.dim(0);
  const int64_t dim = in.z.dim(1) / heads;
  const Tensor u = short_conv(ctx, in.x, in.conv_weight, in.conv_bias, true, segments, conv);
  int64_t from = 0;
  const auto next = [&](int64_t count, int64_t width) {
    const Tensor part = u.slice(1, from, count * width).split_last(count, width);
    from += count * width;
    return part;
  };
  Tensor q, k, v;
  if (in.values_first) {
    v = next(in.v_heads, dim);
    k = next(in.k_heads, in.key_dim);
    q = next(in.q_heads, in.key_dim);
  } else {
    q = next(in.q_heads, in.key_dim);
    k = next(in.k_heads, in.key_dim);
    v = next(in.v_heads, dim);
  }
  if (in.unit_eps > 0.0F) {
    q = l2_norm(ctx, q, in.unit_eps, 1.0F / std::sqrt(static_cast<float>(in.key_dim)));
    k = l2_norm(ctx, k, in.unit_eps, 1.0F);
  }
  if (in.turns != nullptr) {
    q = rope(ctx, q, *in.turns);
    k = rope(ctx, k, *in.turns);
  }
  q = repeat_heads(ctx, q, heads / in.q_heads);
  k = repeat_heads(ctx, k, heads / in.k_heads);
  v = repeat_heads(ctx, v, heads / in.v_heads);
  const int64_t decays = in.decay.dim(1);
  const Tensor rate =
      repeat_heads(ctx, in.a_log.reshape({1, heads, 1}), decays / heads).reshape({decays});
  const Tensor step =
      in.bound < 0.0F ? Tensor{} : step_size(ctx, in.decay, in.dt_bias, 0.0F, INFINITY);
  Tensor decay = in.bound < 0.0F ? bounded_decay(ctx, in.decay, in.dt_bias, rate, in.bound)
                                 : log_decay(ctx, step, rate);
  if (decays != heads) {
    decay = decay.split_last(heads, in.key_dim);
  }
  const Tensor y =
      recurrence(ctx,
                 {.q = q,
                  .k = k,
                  .v = v,
                  .log_decay = decay,
                  .weight = in.weight.defined() ? sigmoid(ctx, in.weight, in.strongest) : step,
                  .delta = in.delta,
                  .skip = in.skip},
                 segments, state)
          .merge_last();
  return in.norm.defined() ? gated_rms_norm(ctx, y, in.z, in.norm, in.norm_config)
                           : swiglu(ctx, in.z, y);
}

struct StepRun {
  std::vector<double> y, conv, state;
};

StepRun run(const Case& c, const std::vector<std::vector<double>>& values, Device device,
            Dtype type, bool whole) {
  Workspace workspace(device);
  const WorkspaceScope scope(workspace);
  Context ctx = workspace.context(type);
  const Dtype sums = sum_dtype(type);
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
    OwnedTensor t(sums, shape, false, device);
    put(t.view, draw({{std::vector<int64_t>(shape), -0.5, 0.5}}, seed)[0]);
    return t;
  };
  const OwnedTensor conv = draw_state({kSlots, in[kX].dim(1), c.taps - 1}, 3);
  const OwnedTensor state = draw_state({kSlots, c.heads, c.key_dim, c.dim}, 4);
  const OwnedSegments segments = five_tokens();
  RopeTable table({.dim = std::max<int64_t>(c.rope, 2), .interleaved = c.interleaved});
  table.ensure(256);
  const Turns turns = table.turns(ctx, segments.view());
  const RecurrentStepInputs step = step_of(c, in, c.rope > 0 ? &turns : nullptr);
  if (device.kind == Device::kCuda && whole) {
    EXPECT_TRUE(recurrent_step_serves(ctx, step, segments.view()));
  }
  const Tensor y = whole ? recurrent_step(ctx, step, segments.view(), conv.view, state.view)
                         : in_turn(ctx, step, segments.view(), conv.view, state.view);
  return {take(y), take(conv.view), take(state.view)};
}

class RecurrentStepOf : public ::testing::TestWithParam<Case> {};

TEST_P(RecurrentStepOf, IsItsOperationsInTurn) {
  const Case& c = GetParam();
  const auto values = draw(inputs_of(c));
  const StepRun whole = run(c, values, {}, Dtype::kF64, true);
  const StepRun turns = run(c, values, {}, Dtype::kF64, false);
  EXPECT_LE(norm_error(whole.y, turns.y), 1e-12);
  EXPECT_LE(norm_error(whole.conv, turns.conv), 1e-12);
  EXPECT_LE(norm_error(whole.state, turns.state), 1e-12);
}

TEST_P(RecurrentStepOf, KernelsMatchDefinition) {
  const Case& c = GetParam();
  const auto expect_like = [](const StepRun& one, const StepRun& exact, double tolerance) {
    EXPECT_LE(norm_error(one.y, exact.y), tolerance);
    EXPECT_LE(norm_error(one.conv, exact.conv), tolerance) << "the convolution's state";
    EXPECT_LE(norm_error(one.state, exact.state), tolerance) << "the recurrence's state";
  };
  const auto values = draw(inputs_of(c));
  const StepRun exact = run(c, values, {}, Dtype::kF64, true);
  expect_like(run(c, values, {}, Dtype::kF32, true), exact, kForward);
  for (const Dtype type : kTypes) {
    if (!on_cuda()) {
      return;
    }
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const auto stored = draw_as(type, inputs_of(c));
    const StepRun here = run(c, stored, {}, Dtype::kF64, true);
    const StepRun there = run(c, stored, Device::kCuda, type, true);
    expect_like(there, here, forward_tolerance(type));
    const StepRun again = run(c, stored, Device::kCuda, type, true);
    EXPECT_EQ(again.y, there.y) << "two runs differ";
    EXPECT_EQ(again.state, there.state) << "two runs differ";
    EXPECT_EQ(again.conv, there.conv) << "two runs differ";
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, RecurrentStepOf,
                         ::testing::Values(Case{.name = "gated_delta_net_of_attention",
                                                .heads = 14,
                                                .q_heads = 14,
                                                .k_heads = 2,
                                                .v_heads = 2,
                                                .key_dim = 64,
                                                .dim = 64,
                                                .rope = 64},
                                           Case{.name = "gated_delta_net_wide",
                                                .heads = 8,
                                                .q_heads = 2,
                                                .k_heads = 2,
                                                .v_heads = 8,
                                                .key_dim = 128,
                                                .dim = 128,
                                                .conv_bias = false,
                                                .activation = GateActivation::kSigmoid},
                                           Case{.name = "gated_delta_net_own_heads",
                                                .heads = 3,
                                                .q_heads = 3,
                                                .k_heads = 3,
                                                .v_heads = 3,
                                                .key_dim = 128,
                                                .dim = 64,
                                                .strongest = 2.0F,
                                                .own_weights = true},
                                           Case{.name = "shared_by_different_numbers",
                                                .heads = 6,
                                                .q_heads = 3,
                                                .k_heads = 2,
                                                .v_heads = 6,
                                                .key_dim = 48,
                                                .dim = 20,
                                                .taps = 3,
                                                .rope = 16,
                                                .interleaved = true},
                                           Case{.name = "smallest",
                                                .heads = 1,
                                                .q_heads = 1,
                                                .k_heads = 1,
                                                .v_heads = 1,
                                                .key_dim = 16,
                                                .dim = 4,
                                                .taps = 2},
                                           Case{.name = "more_heads_than_at_once",
                                                .heads = 54,
                                                .q_heads = 54,
                                                .k_heads = 18,
                                                .v_heads = 18,
                                                .key_dim = 128,
                                                .dim = 128,
                                                .rope = 128,
                                                .own_weights = true},
                                           Case{.name = "more_heads_of_kimi_delta_than_at_once",
                                                .heads = 54,
                                                .q_heads = 54,
                                                .k_heads = 54,
                                                .v_heads = 54,
                                                .key_dim = 128,
                                                .dim = 128,
                                                .per_channel = true,
                                                .order = GateOrder::kGateFirst,
                                                .activation = GateActivation::kSigmoid},
                                           Case{.name = "kimi_delta_of_attention",
                                                .heads = 14,
                                                .q_heads = 14,
                                                .k_heads = 2,
                                                .v_heads = 2,
                                                .key_dim = 64,
                                                .dim = 64,
                                                .rope = 64,
                                                .per_channel = true,
                                                .activation = GateActivation::kSigmoid},
                                           Case{.name = "kimi_delta_bounded",
                                                .heads = 4,
                                                .q_heads = 4,
                                                .k_heads = 4,
                                                .v_heads = 4,
                                                .key_dim = 128,
                                                .dim = 128,
                                                .per_channel = true,
                                                .bound = -5.0F,
                                                .activation = GateActivation::kSigmoid},
                                           Case{.name = "mamba2_of_attention",
                                                .heads = 14,
                                                .q_heads = 14,
                                                .k_heads = 2,
                                                .v_heads = 2,
                                                .key_dim = 64,
                                                .dim = 64,
                                                .unit = false,
                                                .mamba = true,
                                                .own_weights = true,
                                                .order = GateOrder::kGateFirst},
                                           Case{.name = "mamba2_groups",
                                                .heads = 16,
                                                .q_heads = 2,
                                                .k_heads = 2,
                                                .v_heads = 16,
                                                .key_dim = 128,
                                                .dim = 64,
                                                .unit = false,
                                                .mamba = true,
                                                .normed = false}),
                         ::testing::PrintToStringParamName());

// What the kernel does not compute goes operation by operation.
TEST(RecurrentStep, ServesOnlyWhereItsKernelDoes) {
  const Case c{
      .name = "", .heads = 2, .q_heads = 2, .k_heads = 1, .v_heads = 1, .key_dim = 64, .dim = 64};
  const auto serves = [&](Device device, const Case& of, const OwnedSegments& segments,
                          bool batch_invariant, bool taped) {
    Arena arena;
    Tape tape(arena);
    Context ctx{
        .arena = &arena, .tape = taped ? &tape : nullptr, .batch_invariant = batch_invariant};
    In in;
    for (const Input& input : inputs_of(of)) {
      in.push_back(Tensor::of(Dtype::kF32, device, input.shape, nullptr));
    }
    return recurrent_step_serves(ctx, step_of(of, in, nullptr), segments.view());
  };
  const OwnedSegments tokens = five_tokens();
  EXPECT_FALSE(serves({}, c, tokens, false, false)) << "on the CPU";
  EXPECT_FALSE(serves(Device::kMeta, c, tokens, false, false)) << "nowhere";
  if (!on_cuda()) {
    return;
  }
  EXPECT_TRUE(serves(Device::kCuda, c, tokens, false, false));
  EXPECT_FALSE(serves(Device::kCuda, c, tokens, true, false)) << "with the same bits in any batch";
  EXPECT_FALSE(serves(Device::kCuda, c, tokens, false, true)) << "with a tape";
  EXPECT_FALSE(serves(Device::kCuda, c, {{0, 3, 4, 5}, {0, 1, 2}, {0, 1, 2}}, false, false))
      << "beside a prompt";
  EXPECT_FALSE(serves(Device::kCuda, c, {{0, 1, 2, 3, 4, 5}, {0, 0, 0, 0, 0}, {}}, false, false))
      << "without states";
  Case wide = c;
  wide.key_dim = 144;
  EXPECT_FALSE(serves(Device::kCuda, wide, tokens, false, false)) << "of wide keys";
  Case shared = c;
  shared.heads = 16;
  EXPECT_FALSE(serves(Device::kCuda, shared, tokens, false, false)) << "with keys that all share";
}

TEST(RecurrentStep, NamesWhatIsWrong) {
  const Case c{
      .name = "", .heads = 2, .q_heads = 2, .k_heads = 1, .v_heads = 1, .key_dim = 16, .dim = 4};
  const auto message = [&](const std::function<void(RecurrentStepInputs&)>& change,
                           OwnedSegments segments = five_tokens()) {
    Arena arena;
    const Context ctx{.arena = &arena};
    In in;
    for (const Input& input : inputs_of(c)) {
      in.push_back(arena.empty(Dtype::kF32, input.shape));
    }
    const Tensor conv = arena.empty(Dtype::kF32, {kSlots, in[kX].dim(1), 3});
    const Tensor state = arena.empty(Dtype::kF32, {kSlots, 2, 16, 4});
    RecurrentStepInputs step = step_of(c, in, nullptr);
    change(step);
    return error_of([&] { recurrent_step(ctx, step, segments.view(), conv, state); });
  };
  EXPECT_EQ(message([](auto& in) { in.q_heads = 3; }),
            "[recurrent_step] expected heads of q, k and v that divide 2, got 3, 1 and 1");
  EXPECT_EQ(message([](auto& in) { in.v_heads = 2; }),
            "[recurrent_step] expected x (T, 56): 2 + 1 heads of 16 and 2 of 4, got f32 (5, 52)");
  EXPECT_EQ(message([](auto& in) { in.decay = in.z; }),
            "[recurrent_step] expected decay f32 (5, 2), got f32 (5, 8)");
  EXPECT_EQ(message([](auto& in) { in.norm_config.group = 8; }),
            "[recurrent_step] expected a norm of each head, groups of 4, got 8");
  EXPECT_EQ(message([](auto& in) {
              in.weight = {};
              in.bound = -1.0F;
            }),
            "[recurrent_step] expected a weight beside decays of channels or with a bound, got "
            "none");
  EXPECT_EQ(message([](auto&) {}, {{0, 2, 5}, {0, 1}, {0, 1}}),
            "[recurrent_step] expected states and segments of one token");
}

}  // namespace
}  // namespace cambium
