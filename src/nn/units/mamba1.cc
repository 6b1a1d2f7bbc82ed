// Mamba-1 (Gu & Dao 2023, arXiv 2312.00752): a channel's step and the B and C that all channels
// share come from what was convolved. Jamba (arXiv 2403.19887) norms the three before they are
// used.
#include "base/checked.h"
#include "nn/linear.h"
#include "nn/norm.h"
#include "nn/units/units.h"
#include "ops/conv/conv.h"
#include "ops/selective_scan/selective_scan.h"

namespace cambium {
namespace {

constexpr const char* kName = "mamba1";

class Mamba1Unit : public Unit {
 public:
  Mamba1Unit(const Options& options, int64_t width)
      : inner_(options.size(kName, "inner", kMaxInner)),
        state_(options.size(kName, "state", kMaxHeadDim)),
        conv_(options.size_or(kName, "conv", 4, kMaxConv, 2)) {
    options.expect_only(kName, {"inner", "state", "dt_rank", "conv", "conv_bias", "norm_eps"});
    const int64_t rank = options.size(kName, "dt_rank", kMaxWidth);
    in_ = Linear(width, {{"x", inner_}, {"z", inner_}}, ParameterGroup::kMixer);
    x_ = Linear(inner_, {{"dt", rank}, {"B", state_}, {"C", state_}}, ParameterGroup::kMixer);
    dt_ = Linear(rank, inner_, ParameterGroup::kMixer);
    out_ = Linear(inner_, width, ParameterGroup::kMixer);
    if (const double eps = options.real(kName, "norm_eps", 0.0); eps > 0.0) {
      const NormSpec norm{NormKind::kRms,
                          static_cast<float>(in_range(kName, "norm_eps", eps, 0.0, 1.0))};
      dt_norm_ = Norm(norm, rank);
      b_norm_ = c_norm_ = Norm(norm, state_);
    }
    conv_weight_ = {.shape = {inner_, 1, conv_},
                    .group = ParameterGroup::kMixer,
                    .init = {InitKind::kUniform, 0.5}};
    if (options.flag(kName, "conv_bias", true)) {
      conv_bias_ = {.shape = {inner_}, .group = ParameterGroup::kNorm};
    }
    dt_bias_ = {.shape = {inner_}, .group = ParameterGroup::kNorm, .init = {InitKind::kStepBias}};
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
    const Tensor xz = in_.forward(ctx, x);
    const Tensor u =
        short_conv(ctx, part(xz, in_.weight, "x"), conv_weight_.tensor.reshape({inner_, conv_}),
                   conv_bias_.tensor, true, segments, inputs.slot(kConv));
    const Tensor rows = x_.forward(ctx, u);
    const Tensor dt = dt_.forward(ctx, dt_norm_.forward(ctx, part(rows, x_.weight, "dt")));
    const Tensor b = b_norm_.forward(ctx, part(rows, x_.weight, "B")).split_last(1, state_);
    const Tensor c = c_norm_.forward(ctx, part(rows, x_.weight, "C")).split_last(1, state_);
    const Tensor y = selective_scan(
        ctx, {u, dt, b, c, part(xz, in_.weight, "z"), a_log_.tensor, d_.tensor, dt_bias_.tensor},
        segments, inputs.slot(kScan));
    return out_.forward(ctx, y);
  }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"conv", {inner_, conv_ - 1}}, {"scan", {inner_, state_}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    visitor("conv1d.weight", conv_weight_);
    if (!conv_bias_.shape.empty()) {
      visitor("conv1d.bias", conv_bias_);
    }
    x_.visit("x_proj", visitor);
    dt_norm_.visit("dt_norm", visitor);
    b_norm_.visit("b_norm", visitor);
    c_norm_.visit("c_norm", visitor);
    dt_.visit("dt_proj", visitor);
    visitor("dt_proj.bias", dt_bias_);
    visitor("A_log", a_log_);
    visitor("D", d_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kScan };

  int64_t inner_, state_, conv_;
  Linear in_, x_, dt_, out_;
  Norm dt_norm_, b_norm_, c_norm_;  // none where norm_eps is 0
  Parameter conv_weight_, conv_bias_, dt_bias_, a_log_, d_;
};

}  // namespace

std::unique_ptr<Unit> make_mamba1(const Options& options, int64_t width) {
  return std::make_unique<Mamba1Unit>(options, width);
}

}  // namespace cambium
