// Mamba-2 (Dao & Gu 2024, arXiv 2405.21060). x, B and C each have their own number of heads,
// repeated to `heads`: equal b_heads and c_heads are the published layer's groups; fewer x_heads
// and b_heads than c_heads take the place of an attention layer's grouped key-value heads. The
// published norm is of the gated heads; where the attention's output had a gate of its own, that
// comes after the norm, which would take its size away.
#include <cmath>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/conv/conv.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"
#include "ops/recurrent_step/recurrent_step.h"

namespace cambium {
namespace {

constexpr const char* kName = "mamba2";

class Mamba2Unit : public HeadMixer {
 public:
  Mamba2Unit(const Options& options, int64_t width)
      : heads_(options.size(kName, "heads", kMaxHeads)),
        head_dim_(options.size(kName, "head_dim", kMaxHeadDim)),
        state_(options.size(kName, "state", kMaxHeadDim)),
        x_heads_(options.size_or(kName, "x_heads", heads_, kMaxHeads, 1)),
        b_heads_(options.size(kName, "b_heads", kMaxHeads)),
        c_heads_(options.size_or(kName, "c_heads", b_heads_, kMaxHeads, 1)),
        conv_(options.size_or(kName, "conv", 4, kMaxConv, 2)),
        norm_group_(options.size_or(kName, "norm_group", heads_ * head_dim_, kMaxElements, 1)),
        norm_eps_(static_cast<float>(options.real(kName, "norm_eps", 1e-5))),
        has_norm_(options.flag(kName, "norm", true)),
        gate_(out_gate(options, kName)),
        order_(options.flag(kName, "norm_first", false) ? GateOrder::kNormFirst
                                                        : GateOrder::kGateFirst) {
    options.expect_only(kName, {"heads", "head_dim", "state", "x_heads", "b_heads", "c_heads",
                                "conv", "norm", "norm_group", "norm_eps", "norm_first", "in_scale",
                                "row_scales", "out_bias", "out_gate"});
    for (const int64_t part : {x_heads_, b_heads_, c_heads_}) {
      expect(heads_ % part == 0,
             "mamba2: expected x_heads, b_heads and c_heads to divide heads={}, got {}, {} and {}",
             heads_, x_heads_, b_heads_, c_heads_);
    }
    expect(inner() % norm_group_ == 0, "mamba2: expected norm_group to divide {} channels, got {}",
           inner(), norm_group_);
    expect(has_norm_ || (gate_ == GateActivation::kSilu && order_ == GateOrder::kGateFirst),
           "mamba2: expected out_gate silu and no norm_first where it has no norm");
    const std::vector<RowBlock> convolved = {
        {"x", x_heads_ * head_dim_}, {"B", b_heads_ * state_}, {"C", c_heads_ * state_}};
    in_ = Linear(width, {{"z", inner()}, convolved[0], convolved[1], convolved[2], {"dt", heads_}},
                 ParameterGroup::kMixer);
    reads_ = {&in_};
    read_scales(options);
    out_ = Linear(inner(), width, ParameterGroup::kMixer, options.flag(kName, "out_bias", false));
    conv_weight_ = {.shape = {channels(), 1, conv_},
                    .group = ParameterGroup::kMixer,
                    .init = {InitKind::kUniform, 0.5},
                    .blocks = convolved};
    conv_bias_ = {.shape = {channels()}, .group = ParameterGroup::kNorm, .blocks = convolved};
    dt_bias_ = {.shape = {heads_},
                .group = ParameterGroup::kNorm,
                .init = {InitKind::kStepBias},
                .keep_fp32 = true};
    a_log_ = {.shape = {heads_},
              .group = ParameterGroup::kNorm,
              .init = {InitKind::kLogUniform},
              .keep_fp32 = true};
    d_ = {.shape = {heads_},
          .group = ParameterGroup::kNorm,
          .init = {InitKind::kOnes},
          .keep_fp32 = true};
    if (has_norm_) {
      norm_ = norm_weight(inner());
    }
  }

  Tensor heads(Context& ctx, const Tensor& /*x*/, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    Tensor rows = read[0];
    if (!scales_.empty()) {
      rows = scale_blocks(ctx, rows, scales_);
    }
    const Tensor z = part(rows, in_.weight, "z");
    const Tensor raw_dt = part(rows, in_.weight, "dt");
    const Tensor weight = conv_weight_.tensor.reshape({channels(), conv_});
    const Tensor raw_xbc = part(rows, in_.weight, "x", "C");
    const GatedNormConfig norm{norm_eps_, norm_group_, order_, gate_};
    const RecurrentStepInputs token = {.x = raw_xbc,
                                       .conv_weight = weight,
                                       .conv_bias = conv_bias_.tensor,
                                       .values_first = true,
                                       .q_heads = c_heads_,
                                       .k_heads = b_heads_,
                                       .v_heads = x_heads_,
                                       .key_dim = state_,
                                       .decay = raw_dt,
                                       .a_log = a_log_.tensor,
                                       .dt_bias = dt_bias_.tensor,
                                       .skip = d_.tensor,
                                       .z = z,
                                       .norm = norm_.tensor,
                                       .norm_config = norm};
    if (recurrent_step_serves(ctx, token, segments)) {
      return recurrent_step(ctx, token, segments, inputs.slot(kConv), inputs.slot(kState));
    }
    const Tensor xbc =
        short_conv(ctx, raw_xbc, weight, conv_bias_.tensor, true, segments, inputs.slot(kConv));
    Tensor v = part(xbc, conv_weight_, "x").split_last(x_heads_, head_dim_);
    Tensor b = part(xbc, conv_weight_, "B").split_last(b_heads_, state_);
    Tensor c = part(xbc, conv_weight_, "C").split_last(c_heads_, state_);
    if (x_heads_ != heads_) {
      v = repeat_heads(ctx, v, heads_ / x_heads_);
    }
    if (b_heads_ != c_heads_) {
      b = repeat_heads(ctx, b, heads_ / b_heads_);
      c = c_heads_ == heads_ ? c : repeat_heads(ctx, c, heads_ / c_heads_);
    }
    // time_step_limit is [0, inf] in every published checkpoint.
    const Tensor dt = step_size(ctx, raw_dt, dt_bias_.tensor, 0.0F, INFINITY);
    const Tensor decay = log_decay(ctx, dt, a_log_.tensor);
    const Tensor y =
        recurrence(ctx, {c, b, v, decay, dt, false, d_.tensor}, segments, inputs.slot(kState));
    if (!has_norm_) {
      return swiglu(ctx, z, y.merge_last());
    }
    return gated_rms_norm(ctx, y.merge_last(), z, norm_.tensor, norm);
  }

  int64_t head_count() const override { return heads_; }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"conv", {channels(), conv_ - 1}}, {"state", {heads_, state_, head_dim_}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    visitor("conv1d.weight", conv_weight_);
    visitor("conv1d.bias", conv_bias_);
    visitor("dt_bias", dt_bias_);
    visitor("A_log", a_log_);
    visitor("D", d_);
    if (has_norm_) {
      visitor("norm.weight", norm_);
    }
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kState };

  int64_t inner() const { return heads_ * head_dim_; }
  int64_t channels() const { return x_heads_ * head_dim_ + (b_heads_ + c_heads_) * state_; }

  /// A factor of the input is one of all rows.
  void read_scales(const Options& options) {
    const double all = options.real(kName, "in_scale", 1.0);
    const std::vector<double> scales = options.reals(kName, "row_scales");
    const std::vector<RowBlock>& blocks = in_.weight.blocks;
    expect(scales.empty() || scales.size() == blocks.size(),
           "mamba2: expected row_scales to be five numbers, of z, x, B, C and dt");
    for (size_t i = 0; i < blocks.size() && (all != 1.0 || !scales.empty()); ++i) {
      scales_.push_back({blocks[i].rows, scales.empty() ? all : all * scales[i]});
    }
  }

  int64_t heads_, head_dim_, state_, x_heads_, b_heads_, c_heads_, conv_, norm_group_;
  float norm_eps_;
  bool has_norm_;
  GateActivation gate_;
  GateOrder order_;
  Linear in_;
  std::vector<ColumnBlock> scales_;  // of what in_proj gives; empty = none
  Parameter conv_weight_, conv_bias_, dt_bias_, a_log_, d_, norm_;
};

}  // namespace

std::unique_ptr<Unit> make_mamba2(const Options& options, int64_t width) {
  return std::make_unique<Mamba2Unit>(options, width);
}

}  // namespace cambium
