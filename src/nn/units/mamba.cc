// Apriel-H1's mixer: a Mamba-1 scan whose x, B and C come from the value, key and query sides of an
// attention layer (Wang et al. 2024, arXiv 2408.15237). B and x have the width of the key-value
// heads and are repeated to all heads; heads are as wide as the state. The bias of dt_proj enters
// twice, once through the projection and once in the scan: the released weights were trained so.
// Where the attention's output had a gate, z is that gate, whose sigmoid it keeps.
#include "base/checked.h"
#include "nn/linear.h"
#include "nn/units/units.h"
#include "ops/conv/conv.h"
#include "ops/pointwise/pointwise.h"
#include "ops/scan_step/scan_step.h"
#include "ops/selective_scan/selective_scan.h"

namespace cambium {
namespace {

constexpr const char* kName = "mamba";

class MambaUnit : public Unit {
 public:
  MambaUnit(const Options& options, int64_t width)
      : inner_(options.size(kName, "inner", kMaxInner)),
        xb_(options.size(kName, "xb", kMaxInner)),
        state_(options.size(kName, "state", kMaxHeadDim)),
        conv_(options.size_or(kName, "conv", 4, kMaxConv, 2)),
        repeat_before_conv_(options.flag(kName, "repeat_before_conv", true)),
        gate_(out_gate(options, kName)) {
    options.expect_only(kName, {"inner", "xb", "state", "dt_rank", "conv", "repeat_before_conv",
                                "conv_bias", "in_bias", "out_bias", "out_gate"});
    const int64_t rank = options.size(kName, "dt_rank", kMaxWidth);
    expect(
        xb_ % state_ == 0 && inner_ % xb_ == 0,
        "mamba: expected state to divide xb, and xb to divide inner, got state={} xb={} inner={}",
        state_, xb_, inner_);
    in_ = Linear(width, {{"z", inner_}, {"x", xb_}, {"B", xb_}, {"C", inner_}},
                 ParameterGroup::kMixer, options.flag(kName, "in_bias", false));
    dt_in_ = Linear(width, rank, ParameterGroup::kMixer);
    dt_ = Linear(rank, inner_, ParameterGroup::kMixer, true);
    dt_.bias.init = {InitKind::kStepBias};
    out_ = Linear(inner_, width, ParameterGroup::kMixer, options.flag(kName, "out_bias", false));
    const int64_t channels = repeat_before_conv_ ? inner_ : xb_;
    conv_weight_ = {.shape = {channels, 1, conv_},
                    .group = ParameterGroup::kMixer,
                    .init = {InitKind::kUniform, 0.5}};
    if (options.flag(kName, "conv_bias", true)) {
      conv_bias_ = {.shape = {channels}, .group = ParameterGroup::kNorm};
    }
    a_log_ = {.shape = {inner_, state_},
              .group = ParameterGroup::kNorm,
              .init = {InitKind::kLogRange},
              .keep_fp32 = true};
    d_ = {.shape = {inner_},
          .group = ParameterGroup::kNorm,
          .init = {InitKind::kOnes},
          .keep_fp32 = true};
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    const int64_t repeat = inner_ / xb_;
    const auto [zxbc, low_rank] = forward_each(ctx, x, in_, dt_in_);
    const Tensor z = part(zxbc, in_.weight, "z");
    const Tensor groups = part(zxbc, in_.weight, "x").split_last(xb_ / state_, state_);
    const Tensor b = part(zxbc, in_.weight, "B").split_last(xb_ / state_, state_);
    const Tensor c = part(zxbc, in_.weight, "C").split_last(inner_ / state_, state_);
    const Tensor dt = dt_.forward(ctx, low_rank);
    const Tensor weight = conv_weight_.tensor.reshape({conv_weight_.shape[0], conv_});
    SelectiveScanInputs scan = {{}, dt, b, c, z, a_log_.tensor, d_.tensor, dt_.bias.tensor, gate_};
    const ScanStepInputs token = {part(zxbc, in_.weight, "x"), weight, conv_bias_.tensor, scan};
    if (repeat_before_conv_ && scan_step_serves(ctx, token, segments)) {
      return out_.forward(ctx,
                          scan_step(ctx, token, segments, inputs.slot(kConv), inputs.slot(kScan)));
    }
    const Tensor x_heads = repeat_before_conv_ ? repeat_heads(ctx, groups, repeat) : groups;
    scan.u = short_conv(ctx, x_heads.merge_last(), weight, conv_bias_.tensor, true, segments,
                        inputs.slot(kConv));
    if (!repeat_before_conv_) {
      scan.u = repeat_heads(ctx, scan.u.split_last(xb_ / state_, state_), repeat).merge_last();
    }
    return out_.forward(ctx, selective_scan(ctx, scan, segments, inputs.slot(kScan)));
  }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"conv", {conv_weight_.shape[0], conv_ - 1}}, {"scan", {inner_, state_}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    dt_in_.visit("dt_in_proj", visitor);
    dt_.visit("dt_proj", visitor);
    visitor("conv1d.weight", conv_weight_);
    if (!conv_bias_.shape.empty()) {
      visitor("conv1d.bias", conv_bias_);
    }
    visitor("A_log", a_log_);
    visitor("D", d_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kScan };

  int64_t inner_, xb_, state_, conv_;
  bool repeat_before_conv_;
  GateActivation gate_;
  Linear in_, dt_in_, dt_, out_;
  Parameter conv_weight_, conv_bias_, a_log_, d_;
};

}  // namespace

std::unique_ptr<Unit> make_mamba(const Options& options, int64_t width) {
  return std::make_unique<MambaUnit>(options, width);
}

}  // namespace cambium
