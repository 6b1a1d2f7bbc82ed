#include "train/rounded_weights.h"

#include "tensor/copy.h"

namespace cambium {

RoundedWeights::RoundedWeights(Model& model) {
  model.visit([&](const std::string& /*name*/, Parameter& p) {
    if (p.is_matrix() && p.tensor.has_grad() && p.tensor.dtype == Dtype::kF32) {
      kept_.push_back({&p, OwnedTensor(Dtype::kBF16, p.shape, false, p.tensor.device)});
    }
  });
}

int64_t RoundedWeights::bytes() const {
  int64_t bytes = 0;
  for (const Kept& kept : kept_) {
    bytes += kept.rounded.data.bytes();
  }
  return bytes;
}

RoundedWeights::Use::Use(const RoundedWeights& weights) : weights_(weights) {
  for (const Kept& kept : weights_.kept_) {
    copy(kept.rounded.view, kept.parameter->tensor);
    kept.parameter->tensor.rounded = kept.rounded.view.data;
  }
}

RoundedWeights::Use::~Use() {
  for (const Kept& kept : weights_.kept_) {
    kept.parameter->tensor.rounded = nullptr;
  }
}

}  // namespace cambium
