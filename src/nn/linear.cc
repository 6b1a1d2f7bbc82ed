#include "nn/linear.h"

#include <cmath>

#include "ops/matmul/matmul.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {

Linear::Linear(int64_t in, int64_t out, ParameterGroup group, bool with_bias) {
  weight.shape = {out, in};
  weight.group = group;
  weight.init = {InitKind::kUniform, 1.0 / std::sqrt(static_cast<double>(in))};
  if (with_bias) {
    bias.shape = {out};
    bias.group = ParameterGroup::kNorm;
  }
}

Tensor Linear::forward(Context& ctx, const Tensor& x) const {
  return matmul(ctx, x, weight.tensor, bias.tensor);
}

void Linear::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  visitor(prefix + ".weight", weight);
  if (!bias.shape.empty()) {
    visitor(prefix + ".bias", bias);
  }
}

FeedForward::FeedForward(int64_t width, int64_t inner)
    : gate(width, inner, ParameterGroup::kFeedForward),
      up(width, inner, ParameterGroup::kFeedForward),
      down(inner, width, ParameterGroup::kFeedForward) {}

Tensor FeedForward::forward(Context& ctx, const Tensor& x) const {
  return down.forward(ctx, swiglu(ctx, gate.forward(ctx, x), up.forward(ctx, x)));
}

void FeedForward::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  gate.visit(prefix + ".gate", visitor);
  up.visit(prefix + ".up", visitor);
  down.visit(prefix + ".down", visitor);
}

}  // namespace cambium
