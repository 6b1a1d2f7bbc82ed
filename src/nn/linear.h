// A linear layer.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "nn/parameter.h"
#include "ops/matmul/matmul.h"
#include "tensor/context.h"

namespace cambium {

/// y = x weight^T + bias, weight (out, in) as in checkpoints.
struct Linear {
  Linear() = default;
  /// Starts uniform in +-1/sqrt(in), bias zero.
  Linear(int64_t in, int64_t out, ParameterGroup group, bool with_bias = false);
  /// The same with named blocks of output rows.
  Linear(int64_t in, std::vector<RowBlock> blocks, ParameterGroup group, bool with_bias = false);
  Tensor forward(Context& ctx, const Tensor& x) const;
  /// The same where nothing reads the values of the result: only its backward step is recorded.
  Tensor forward_unread(Context& ctx, const Tensor& x) const;
  /// Visits prefix + ".weight" and, if there is one, prefix + ".bias".
  void visit(const std::string& prefix, const ParameterVisitor& visitor);

  Parameter weight;
  Parameter bias;  // no shape = none
};

/// What each of some layers gives for one x, for example q, k and v: one piece of work instead of
/// several. The weights stay tensors of their own.
template <class... Linears>
std::array<Tensor, sizeof...(Linears)> forward_each(Context& ctx, const Tensor& x,
                                                    const Linears&... linears) {
  return matmul_each<sizeof...(Linears)>(ctx, x,
                                         {{{linears.weight.tensor, linears.bias.tensor}...}});
}

/// The same for as many as there are.
std::vector<Tensor> forward_all(Context& ctx, const Tensor& x,
                                std::span<const Linear* const> linears);

}  // namespace cambium
