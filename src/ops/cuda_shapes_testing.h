// What the tests of the CUDA kernels' shapes share: operations are held to the f32 kernels of the
// CPU on the same inputs.
#pragma once

#include <numeric>
#include <string>

#include "ops/stateful_testing.h"

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
