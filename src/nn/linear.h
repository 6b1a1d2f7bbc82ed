// A linear layer and the SwiGLU feed-forward made of three.
#pragma once

#include "nn/parameter.h"
#include "tensor/context.h"

namespace cambium {

/// y = x weight^T + bias, weight (out, in) as in checkpoints.
struct Linear {
  Linear() = default;
  /// Starts uniform in +-1/sqrt(in), bias zero.
  Linear(int64_t in, int64_t out, ParameterGroup group, bool with_bias = false);
  Tensor forward(Context& ctx, const Tensor& x) const;
  /// Visits prefix + ".weight" and, if there is one, prefix + ".bias".
  void visit(const std::string& prefix, const ParameterVisitor& visitor);

  Parameter weight;
  Parameter bias;  // no shape = none
};

/// down(silu(gate x) * up x)
struct FeedForward {
  FeedForward() = default;
  FeedForward(int64_t width, int64_t inner);
  Tensor forward(Context& ctx, const Tensor& x) const;
  void visit(const std::string& prefix, const ParameterVisitor& visitor);

  Linear gate, up, down;
};

}  // namespace cambium
