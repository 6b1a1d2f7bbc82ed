// The feed-forward of Llama and most decoders since: down(f(gate x) * up x), f = silu unless said
// otherwise (Shazeer 2020, arXiv 2002.05202).
#include "base/checked.h"
#include "nn/linear.h"
#include "nn/units/units.h"
#include "ops/activation/activation.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {
namespace {

constexpr const char* kName = "swiglu";

class SwigluUnit : public Unit {
 public:
  SwigluUnit(const Options& options, int64_t width) {
    options.expect_only(kName, {"inner", "activation", "limit", "bias", "gate_scale"});
    const int64_t inner = options.size(kName, "inner", kMaxInner);
    gate_scale_ = static_cast<float>(
        in_range(kName, "gate_scale", options.real(kName, "gate_scale", 1.0), -1e6, 1e6));
    const std::string activation = options.text(kName, "activation", "silu");
    if (activation == "clamped_swiglu") {
      limit_ = static_cast<float>(
          in_range(kName, "limit", options.real(kName, "limit", 7.0), 1e-3, 1e6));
    } else {
      activation_ = find_activation(activation);
    }
    const bool bias = options.flag(kName, "bias", false);
    gate_ = Linear(width, inner, ParameterGroup::kFeedForward, bias);
    up_ = Linear(width, inner, ParameterGroup::kFeedForward, bias);
    down_ = Linear(inner, width, ParameterGroup::kFeedForward, bias);
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    auto [gate, up] = forward_each(ctx, x, gate_, up_);
    if (gate_scale_ != 1.0F) {
      gate = add_scaled(ctx, gate_scale_, gate, 0.0F, gate);
    }
    const Tensor inner = limit_ > 0.0F ? clamped_swiglu(ctx, gate, up, limit_)
                                       : gated_activation(ctx, gate, up, activation_);
    return inputs.unread ? down_.forward_unread(ctx, inner) : down_.forward(ctx, inner);
  }

  void visit(const ParameterVisitor& visitor) override {
    gate_.visit("gate", visitor);
    up_.visit("up", visitor);
    down_.visit("down", visitor);
  }

 private:
  float gate_scale_ = 1.0F;
  float limit_ = 0.0F;  // of clamped_swiglu; 0 = activation_
  ActivationKind activation_ = ActivationKind::kSilu;
  Linear gate_, up_, down_;
};

}  // namespace

std::unique_ptr<Unit> make_swiglu(const Options& options, int64_t width) {
  return std::make_unique<SwigluUnit>(options, width);
}

}  // namespace cambium
