// Inputs for tests that call an operation several times.
#pragma once

#include "ops/testing.h"

namespace cambium::testing {

/// The values of inputs in f32 on a device, without gradients.
struct HeldInputs {
  HeldInputs(const std::vector<Input>& inputs, const std::vector<std::vector<double>>& values,
             Device device = {}) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      owned.emplace_back(Dtype::kF32, std::span<const int64_t>(inputs[i].shape), false, device);
      put(owned.back().view, values[i]);
      tensors.push_back(owned.back().view);
    }
  }

  std::vector<OwnedTensor> owned;
  std::vector<Tensor> tensors;
};

}  // namespace cambium::testing
