// Mixers that end in one projection of what their heads give: before it, the heads of two of them
// can be mixed (nn/units/parallel.cc).
#pragma once

#include <span>
#include <vector>

#include "nn/linear.h"
#include "nn/unit.h"
#include "ops/attention/attention.h"

namespace cambium {

class HeadMixer : public Unit {
 public:
  /// The layers that read x before anything else is known: they can be computed as one piece of
  /// work, with those of another mixer of the same x beside them.
  std::span<const Linear* const> reads() const { return reads_; }
  /// x (T, C) and what reads() give for it -> (T, H * D): what is projected.
  virtual Tensor heads(Context& ctx, const Tensor& x, std::span<const Tensor> rows,
                       const UnitInputs& inputs) = 0;
  Tensor heads(Context& ctx, const Tensor& x, const UnitInputs& inputs) {
    return heads(ctx, x, forward_all(ctx, x, reads()), inputs);
  }
  virtual int64_t head_count() const = 0;
  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) final {
    return project(ctx, heads(ctx, x, inputs));
  }
  /// (T, H * D) -> (T, C)
  Tensor project(Context& ctx, const Tensor& y) const { return out_.forward(ctx, y); }
  /// H * D
  int64_t inner() const { return out_.weight.shape[1]; }

 protected:
  Linear out_;
  std::vector<const Linear*> reads_;  // members of the mixer, which stays where it was made
};

/// Attention whose scores can be looked at.
class ScoredMixer : public HeadMixer {
 public:
  /// What scores are made of, rotated: score(t, s) = q[t] . k[s] scale.
  struct Scored {
    Tensor q;  // (T, H, D)
    Tensor k;  // (T, Hkv, D)
  };
  /// Of x (T, C); without a cache.
  virtual Scored scored(Context& ctx, const Tensor& x, const UnitInputs& inputs) = 0;
  /// How scores become probabilities.
  virtual AttentionConfig config() const = 0;
};

}  // namespace cambium
