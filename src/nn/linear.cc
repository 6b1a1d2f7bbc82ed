#include "nn/linear.h"

#include <cmath>
#include <numeric>

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

Linear::Linear(int64_t in, std::vector<RowBlock> blocks, ParameterGroup group, bool with_bias)
    : Linear(in,
             std::accumulate(blocks.begin(), blocks.end(), int64_t{0},
                             [](int64_t rows, const RowBlock& b) { return rows + b.rows; }),
             group, with_bias) {
  if (with_bias) {
    bias.blocks = blocks;
  }
  weight.blocks = std::move(blocks);
}

Tensor Linear::forward(Context& ctx, const Tensor& x) const {
  return matmul(ctx, x, weight.tensor, bias.tensor);
}

Tensor Linear::forward_unread(Context& ctx, const Tensor& x) const {
  return matmul_unread(ctx, x, weight.tensor, bias.tensor);
}

std::vector<Tensor> forward_all(Context& ctx, const Tensor& x,
                                std::span<const Linear* const> linears) {
  std::vector<Affine> of;
  of.reserve(linears.size());
  for (const Linear* linear : linears) {
    of.push_back({linear->weight.tensor, linear->bias.tensor});
  }
  std::vector<Tensor> to(of.size());
  matmul_each(ctx, x, of, to);
  return to;
}

void Linear::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  visitor(prefix + ".weight", weight);
  if (!bias.shape.empty()) {
    visitor(prefix + ".bias", bias);
  }
}

}  // namespace cambium
