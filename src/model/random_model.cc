#include "model/random_model.h"

#include <algorithm>

namespace cambium {
namespace {

constexpr int64_t kDistinct = int64_t{1} << 20;  // numbers drawn for one parameter

}  // namespace

LoadedModel random_model(const ModelSpec& spec, MatrixStorage storage, uint64_t seed) {
  LoadedModel made{{}, std::make_unique<Model>(spec), {}};
  made.weights.allocate(*made.model, nullptr, storage);
  made.model->visit([&](const std::string& name, Parameter& p) {
    Parameter drawn = p;
    if (p.numel() > kDistinct) {
      drawn.shape = {kDistinct};
    }
    const OwnedTensor values(Dtype::kF32, drawn.shape);
    drawn.tensor = values.view;
    initialise(drawn, name, seed);
    const Tensor flat = p.tensor.reshape({p.numel()});
    const Tensor from = drawn.tensor.reshape({drawn.numel()});
    for (int64_t at = 0; at < p.numel(); at += kDistinct) {
      const int64_t count = std::min(kDistinct, p.numel() - at);
      copy_values(flat.slice(0, at, count), from.slice(0, 0, count));
    }
  });
  return made;
}

}  // namespace cambium
