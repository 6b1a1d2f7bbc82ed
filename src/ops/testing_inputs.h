// Inputs for tests that call an operation several times.
#pragma once

#include "ops/testing.h"

namespace cambium::testing {

/// The values of inputs on a device, in f32 unless said otherwise, without gradients.
struct HeldInputs {
  HeldInputs(const std::vector<Input>& inputs, const std::vector<std::vector<double>>& values,
             Device device = {}, Dtype dtype = Dtype::kF32) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      owned.emplace_back(dtype, std::span<const int64_t>(inputs[i].shape), false, device);
      put(owned.back().view, values[i]);
      tensors.push_back(owned.back().view);
    }
  }

  std::vector<OwnedTensor> owned;
  std::vector<Tensor> tensors;
};

}  // namespace cambium::testing
