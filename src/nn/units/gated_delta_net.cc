// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a learned decay. q, k
// and v each have their own number of heads, repeated to `heads`, so that it can take the place of
// attention with grouped key-value heads. With `rope`, q and k are rotated like the attention's
// they came from.
#include "base/checked.h"
#include "nn/linear.h"
#include "nn/norm.h"
#include "nn/units/units.h"
#include "ops/conv/conv.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"
#include "ops/rope/rope.h"

#include <cmath>

namespace cambium {
namespace {

constexpr const char* kName = "gated_delta_net";
constexpr float kL2Eps = 1e-6F;

class GatedDeltaNetUnit : public Unit {
 public:
  GatedDeltaNetUnit(const Options& options, int64_t width)
      : heads_(options.size(kName, "heads", kMaxHeads)),
        q_heads_(options.size_or(kName, "q_heads", heads_, kMaxHeads, 1)),
        k_heads_(options.size_or(kName, "k_heads", q_heads_, kMaxHeads, 1)),
        v_heads_(options.size_or(kName, "v_heads", heads_, kMaxHeads, 1)),
        key_dim_(options.size(kName, "key_dim", kMaxHeadDim)),
        value_dim_(options.size(kName, "value_dim", kMaxHeadDim)),
        conv_(options.size_or(kName, "conv", 4, kMaxConv, 2)),
        rope_(options.flag(kName, "rope", false)),
        norm_eps_(static_cast<float>(options.real(kName, "norm_eps", 1e-6))) {
    options.expect_only(kName, {"heads", "q_heads", "k_heads", "v_heads", "key_dim", "value_dim",
                                "conv", "conv_bias", "rope", "norm_eps", "out_bias"});
    for (const int64_t part : {q_heads_, k_heads_, v_heads_}) {
      expect(
          heads_ % part == 0,
          "gated_delta_net: expected q_heads, k_heads and v_heads to divide heads={}, got {}, {} "
          "and {}",
          heads_, q_heads_, k_heads_, v_heads_);
    }
    const std::vector<RowBlock> convolved = {
        {"q", q_heads_ * key_dim_}, {"k", k_heads_ * key_dim_}, {"v", v_heads_ * value_dim_}};
    in_ = Linear(width, {convolved[0], convolved[1], convolved[2], {"z", inner()}},
                 ParameterGroup::kMixer);
    ba_ = Linear(width, {{"beta", heads_}, {"decay", heads_}}, ParameterGroup::kMixer);
    out_ = Linear(inner(), width, ParameterGroup::kMixer, options.flag(kName, "out_bias", false));
    conv_weight_ = {.shape = {channels(), 1, conv_},
                    .group = ParameterGroup::kMixer,
                    .init = {InitKind::kUniform, 0.5},
                    .blocks = convolved};
    if (options.flag(kName, "conv_bias", false)) {
      conv_bias_ = {.shape = {channels()}, .group = ParameterGroup::kNorm, .blocks = convolved};
    }
    a_log_ = {.shape = {heads_},
              .group = ParameterGroup::kNorm,
              .init = {InitKind::kLogUniform},
              .keep_fp32 = true};
    dt_bias_ = {.shape = {heads_},
                .group = ParameterGroup::kNorm,
                .init = {InitKind::kStepBias},
                .keep_fp32 = true};
    norm_ = norm_weight(value_dim_);
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    const auto [rows, ba] = forward_each(ctx, x, in_, ba_);
    const Tensor z = part(rows, in_.weight, "z");
    const Tensor weight = conv_weight_.tensor.reshape({channels(), conv_});
    const Tensor qkv = short_conv(ctx, part(rows, in_.weight, "q", "v"), weight, conv_bias_.tensor,
                                  true, segments, inputs.slot(kConv));
    Tensor q = part(qkv, conv_weight_, "q").split_last(q_heads_, key_dim_);
    Tensor k = part(qkv, conv_weight_, "k").split_last(k_heads_, key_dim_);
    Tensor v = part(qkv, conv_weight_, "v").split_last(v_heads_, value_dim_);
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
    const Tensor beta = sigmoid(ctx, part(ba, ba_.weight, "beta"));
    const Tensor step =
        step_size(ctx, part(ba, ba_.weight, "decay"), dt_bias_.tensor, 0.0F, INFINITY);
    const Tensor decay = log_decay(ctx, step, a_log_.tensor);
    const Tensor y =
        recurrence(ctx, {q, k, v, decay, beta, true, {}}, segments, inputs.slot(kState));
    const GatedNormConfig norm{norm_eps_, value_dim_, GateOrder::kNormFirst, GateActivation::kSilu};
    return out_.forward(ctx, gated_rms_norm(ctx, y.merge_last(), z, norm_.tensor, norm));
  }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"conv", {channels(), conv_ - 1}}, {"state", {heads_, key_dim_, value_dim_}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    ba_.visit("ba_proj", visitor);
    visitor("conv1d.weight", conv_weight_);
    if (!conv_bias_.shape.empty()) {
      visitor("conv1d.bias", conv_bias_);
    }
    visitor("A_log", a_log_);
    visitor("dt_bias", dt_bias_);
    visitor("norm.weight", norm_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kState };

  int64_t inner() const { return heads_ * value_dim_; }
  int64_t channels() const { return (q_heads_ + k_heads_) * key_dim_ + v_heads_ * value_dim_; }

  int64_t heads_, q_heads_, k_heads_, v_heads_, key_dim_, value_dim_, conv_;
  bool rope_;
  float norm_eps_;
  Linear in_, ba_, out_;
  Parameter conv_weight_, conv_bias_, a_log_, dt_bias_, norm_;
};

}  // namespace

std::unique_ptr<Unit> make_gated_delta_net(const Options& options, int64_t width) {
  return std::make_unique<GatedDeltaNetUnit>(options, width);
}

}  // namespace cambium
