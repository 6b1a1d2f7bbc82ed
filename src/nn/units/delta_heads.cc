#include "nn/units/delta_heads.h"

#include <cmath>

#include "base/checked.h"
#include "nn/units/units.h"
#include "ops/conv/conv.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/rope/rope.h"

namespace cambium {
namespace {

constexpr float kL2Eps = 1e-6F;

}  // namespace

DeltaHeads::DeltaHeads(const Options& options, const char* owner, int64_t key_dim,
                       int64_t value_dim)
    : heads_(options.size(owner, "heads", kMaxHeads)),
      q_heads_(options.size_or(owner, "q_heads", heads_, kMaxHeads, 1)),
      k_heads_(options.size_or(owner, "k_heads", q_heads_, kMaxHeads, 1)),
      v_heads_(options.size_or(owner, "v_heads", heads_, kMaxHeads, 1)),
      key_dim_(key_dim),
      value_dim_(value_dim),
      conv_(options.size_or(owner, "conv", 4, kMaxConv, 2)),
      rope_(options.flag(owner, "rope", false)),
      strongest_(options.flag(owner, "allow_neg_eigval", false) ? 2.0F : 1.0F) {
  for (const int64_t part : {q_heads_, k_heads_, v_heads_}) {
    expect(heads_ % part == 0,
           "{}: expected q_heads, k_heads and v_heads to divide heads={}, got {}, {} and {}", owner,
           heads_, q_heads_, k_heads_, v_heads_);
  }
  const std::vector<RowBlock> blocks = {
      {"q", q_heads_ * key_dim_}, {"k", k_heads_ * key_dim_}, {"v", v_heads_ * value_dim_}};
  weight_ = {.shape = {channels(), 1, conv_},
             .group = ParameterGroup::kMixer,
             .init = {InitKind::kUniform, 0.5},
             .blocks = blocks};
  if (options.flag(owner, "conv_bias", false)) {
    bias_ = {.shape = {channels()}, .group = ParameterGroup::kNorm, .blocks = blocks};
  }
}

std::vector<std::string> DeltaHeads::known(std::initializer_list<const char*> more) {
  std::vector<std::string> names = {"heads", "q_heads",   "k_heads", "v_heads",
                                    "conv",  "conv_bias", "rope",    "allow_neg_eigval"};
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

DeltaHeads::Heads DeltaHeads::forward(Context& ctx, const Tensor& rows, const UnitInputs& inputs,
                                      const Tensor& state) const {
  const Tensor weight = weight_.tensor.reshape({channels(), conv_});
  const Tensor qkv = short_conv(ctx, rows, weight, bias_.tensor, true, inputs.segments(), state);
  Tensor q = part(qkv, weight_, "q").split_last(q_heads_, key_dim_);
  Tensor k = part(qkv, weight_, "k").split_last(k_heads_, key_dim_);
  Tensor v = part(qkv, weight_, "v").split_last(v_heads_, value_dim_);
  q = l2_norm(ctx, q, kL2Eps, 1.0F / std::sqrt(static_cast<float>(key_dim_)));
  k = l2_norm(ctx, k, kL2Eps, 1.0F);
  if (rope_) {
    q = rope(ctx, q, *inputs.rope);
    k = rope(ctx, k, *inputs.rope);
  }
  if (q_heads_ != k_heads_) {
    q = q_heads_ == heads_ ? q : repeat_heads(ctx, q, heads_ / q_heads_);
    k = k_heads_ == heads_ ? k : repeat_heads(ctx, k, heads_ / k_heads_);
  }
  if (v_heads_ != heads_) {
    v = repeat_heads(ctx, v, heads_ / v_heads_);
  }
  return {q, k, v};
}

RecurrentStepInputs DeltaHeads::step_inputs(const Tensor& rows, const UnitInputs& inputs) const {
  return {.x = rows,
          .conv_weight = weight_.tensor.reshape({channels(), conv_}),
          .conv_bias = bias_.tensor,
          .q_heads = q_heads_,
          .k_heads = k_heads_,
          .v_heads = v_heads_,
          .key_dim = key_dim_,
          .unit_eps = kL2Eps,
          .turns = rope_ ? inputs.rope : nullptr,
          .strongest = strongest_,
          .delta = true};
}

Tensor DeltaHeads::write_strength(Context& ctx, const Tensor& raw) const {
  return sigmoid(ctx, raw, strongest_);
}

void DeltaHeads::visit(const ParameterVisitor& visitor) {
  visitor("conv1d.weight", weight_);
  if (!bias_.shape.empty()) {
    visitor("conv1d.bias", bias_);
  }
}

}  // namespace cambium
