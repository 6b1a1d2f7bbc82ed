// The heads of the mixers that write by the delta rule (Gated DeltaNet, Kimi Delta): a short
// convolution of q, k and v, q and k of length one, and heads repeated where they are shared.
#pragma once

#include "nn/unit.h"
#include "ops/recurrent_step/recurrent_step.h"

namespace cambium {

/// q, k and v each have their own number of heads, repeated to `heads`, so that a mixer can take
/// the place of attention with grouped key-value heads. With `rope`, q and k are rotated like the
/// attention's they came from.
class DeltaHeads {
 public:
  struct Heads {
    Tensor q, k;  // (T, Hk, K), Hk divides heads; q times K^-1/2
    Tensor v;     // (T, heads, V)
  };

  DeltaHeads() = default;
  /// Reads heads, q_heads, k_heads, v_heads, conv, conv_bias, rope and allow_neg_eigval of the unit
  /// `owner`.
  DeltaHeads(const Options& options, const char* owner, int64_t key_dim, int64_t value_dim);
  /// The options it reads and `more`.
  static std::vector<std::string> known(std::initializer_list<const char*> more);

  int64_t heads() const { return heads_; }
  int64_t key_dim() const { return key_dim_; }
  int64_t value_dim() const { return value_dim_; }
  /// Channels of all values.
  int64_t inner() const { return heads_ * value_dim_; }
  /// How much of a token is written: raw (T, heads) -> (T, heads), in (0, 1), or in (0, 2) where
  /// the state's eigenvalues may be negative.
  Tensor write_strength(Context& ctx, const Tensor& raw) const;
  /// Rows "q", "k" and "v" of the projection.
  const std::vector<RowBlock>& blocks() const { return weight_.blocks; }
  /// rows (T, channels of the blocks), what the projection gives; `state` is that of conv_part().
  Heads forward(Context& ctx, const Tensor& rows, const UnitInputs& inputs,
                const Tensor& state) const;
  /// What of a recurrent_step() is theirs, with rows as above.
  RecurrentStepInputs step_inputs(const Tensor& rows, const UnitInputs& inputs) const;
  /// What a sequence keeps: the convolution's last inputs, and the recurrence's state.
  Part conv_part() const { return {"conv", {channels(), conv_ - 1}}; }
  Part state_part() const { return {"state", {heads_, key_dim_, value_dim_}}; }
  /// Visits conv1d.weight and conv1d.bias.
  void visit(const ParameterVisitor& visitor);

 private:
  int64_t channels() const { return (q_heads_ + k_heads_) * key_dim_ + v_heads_ * value_dim_; }

  int64_t heads_ = 0, q_heads_ = 0, k_heads_ = 0, v_heads_ = 0, key_dim_ = 0, value_dim_ = 0;
  int64_t conv_ = 0;
  bool rope_ = false;
  float strongest_ = 1.0F;
  Parameter weight_, bias_;  // of the convolution
};

}  // namespace cambium
