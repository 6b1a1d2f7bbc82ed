// What the tests of the CUDA kernels' shapes share: operations are held to the f32 kernels of the
// CPU on the same inputs.
#pragma once

#include <numeric>
#include <string>

#include "ops/stateful_testing.h"
#include "tensor/workspace.h"

namespace cambium::testing {

using In = std::vector<Tensor>;

inline constexpr Dtype kTypes[] = {Dtype::kF32, Dtype::kBF16};
/// Of f32: both sides round, and sums over long sequences go in other orders.
inline constexpr double kForward = 2e-5;
inline constexpr double kBackward = 2e-4;

inline double forward_tolerance(Dtype type) {
  return type == Dtype::kBF16 ? kNarrowForward : kForward;
}
inline double backward_tolerance(Dtype type) {
  return type == Dtype::kBF16 ? kNarrowBackward : kBackward;
}

/// Values of the inputs as a run with such activations holds them.
inline std::vector<std::vector<double>> draw_as(Dtype type, const std::vector<Input>& inputs) {
  auto values = draw(inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    values[i] = as_stored(std::move(values[i]), inputs[i].dtype(type));
  }
  return values;
}

inline void expect_cuda_matches_cpu(const Operation& operation, const std::vector<Input>& inputs,
                                    bool with_grad) {
  for (const Dtype type : kTypes) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const auto values = draw_as(type, inputs);
    const testing::Run exact =
        run_operation<float>(operation, inputs, values, false, with_grad, type == Dtype::kBF16);
    const testing::Run run = run_on_cuda(operation, inputs, values, type, with_grad);
    EXPECT_LE(norm_error(run.output, exact.output), forward_tolerance(type));
    for (size_t i = 0; i < run.grads.size(); ++i) {
      EXPECT_LE(norm_error(run.grads[i], exact.grads[i], kNarrowFloor), backward_tolerance(type))
          << "gradient of input " << i;
    }
  }
}

struct StateRun {
  std::vector<double> output, state;
};

/// One call over segments that go on from `state` (slots, ...), on either device.
inline StateRun run_with_state(const StatefulCase& test,
                               const std::vector<std::vector<double>>& values,
                               const OwnedSegments& segments, const std::vector<double>& state,
                               Device device, Dtype type, bool batch_invariant = false) {
  Workspace workspace(device);
  const WorkspaceScope scope(workspace);
  Context ctx = workspace.context(type);
  ctx.batch_invariant = batch_invariant;
  std::vector<OwnedTensor> owned;
  In tensors;
  for (size_t i = 0; i < values.size(); ++i) {
    owned.emplace_back(device.kind == Device::kCpu ? Dtype::kF32 : test.inputs[i].dtype(type),
                       std::span<const int64_t>(test.inputs[i].shape), false, device);
    put(owned.back().view, values[i]);
    tensors.push_back(owned.back().view);
  }
  std::vector<int64_t> shape = test.state_row;
  const int64_t row =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  shape.insert(shape.begin(), static_cast<int64_t>(state.size()) / row);
  const OwnedTensor slots(Dtype::kF32, std::span<const int64_t>(shape), false, device);
  put(slots.view, state);
  const Tensor y = test.operation(ctx, tensors, segments.view(), slots.view);
  return {take(y), take(slots.view)};
}

/// Segments of these lengths, every other one in the middle of its sequence, or none, whose slots
/// stand in another order among a few that nobody uses.
inline void expect_state_matches_cpu(const StatefulCase& test, const std::vector<int64_t>& lengths,
                                     bool continues = true) {
  OwnedSegments segments = packed_segments(lengths);
  const auto count = static_cast<int32_t>(lengths.size());
  for (int32_t s = 0; s < count; ++s) {
    segments.position[static_cast<size_t>(s)] = continues && s % 2 == 0 ? 64 * (s + 1) + s % 5 : 0;
    segments.slot.push_back(count + 2 - s);
  }
  Input state{test.state_row, -0.5, 0.5};
  state.shape.insert(state.shape.begin(), count + 4);
  const auto before = draw({state}, 3)[0];
  for (const Dtype type : kTypes) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const auto values = draw_as(type, test.inputs);
    const StateRun exact = run_with_state(test, values, segments, before, {}, Dtype::kF32);
    const StateRun run = run_with_state(test, values, segments, before, Device::kCuda, type);
    EXPECT_LE(norm_error(run.output, exact.output), forward_tolerance(type));
    EXPECT_LE(norm_error(run.state, exact.state), forward_tolerance(type)) << "state";
    const size_t row = before.size() / static_cast<size_t>(count + 4);
    for (const size_t unused : {0, 1, 2, count + 3}) {
      EXPECT_TRUE(std::equal(before.begin() + static_cast<ptrdiff_t>(unused * row),
                             before.begin() + static_cast<ptrdiff_t>((unused + 1) * row),
                             run.state.begin() + static_cast<ptrdiff_t>(unused * row)))
          << "slot " << unused << " is nobody's";
    }
  }
}

class CudaShapes : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!on_cuda()) {
      GTEST_SKIP() << why_no_cuda();
    }
  }
};

inline int64_t sum(const std::vector<int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

/// By the dim of a head.
class CudaHeadDims : public CudaShapes, public ::testing::WithParamInterface<int64_t> {};

}  // namespace cambium::testing
