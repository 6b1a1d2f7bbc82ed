// The gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404): a mixer that sees a few
// tokens, between two gates of its own input,
//
//   [B, C, x] = in_proj(x)      y = out_proj(C * conv(B * x))
#include "ops/conv/conv.h"

#include "base/checked.h"
#include "nn/linear.h"
#include "nn/units/units.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {
namespace {

constexpr const char* kName = "short_conv";

class ShortConvUnit : public Unit {
 public:
  ShortConvUnit(const Options& options, int64_t width)
      : width_(width), conv_(options.size_or(kName, "conv", 3, kMaxConv, 2)) {
    options.expect_only(kName, {"conv", "bias"});
    const bool bias = options.flag(kName, "bias", false);
    in_ = Linear(width, {{"B", width}, {"C", width}, {"x", width}}, ParameterGroup::kMixer, bias);
    out_ = Linear(width, width, ParameterGroup::kMixer, bias);
    weight_ = {.shape = {width, 1, conv_},
               .group = ParameterGroup::kMixer,
               .init = {InitKind::kUniform, 0.5}};
    if (bias) {
      bias_ = {.shape = {width}, .group = ParameterGroup::kNorm};
    }
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Tensor rows = in_.forward(ctx, x);
    const Tensor gated = multiply(ctx, part(rows, in_.weight, "B"), part(rows, in_.weight, "x"));
    const Tensor y = short_conv(ctx, gated, weight_.tensor.reshape({width_, conv_}), bias_.tensor,
                                false, inputs.segments(), inputs.slot(kConv));
    return out_.forward(ctx, multiply(ctx, part(rows, in_.weight, "C"), y));
  }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"conv", {width_, conv_ - 1}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    visitor("conv.weight", weight_);
    if (!bias_.shape.empty()) {
      visitor("conv.bias", bias_);
    }
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv };

  int64_t width_, conv_;
  Linear in_, out_;
  Parameter weight_, bias_;
};

}  // namespace

std::unique_ptr<Unit> make_short_conv(const Options& options, int64_t width) {
  return std::make_unique<ShortConvUnit>(options, width);
}

}  // namespace cambium
