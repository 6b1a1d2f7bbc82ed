// A feed-forward of two matrices: down(f(up x)), f element by element (ops/activation).
#include "base/checked.h"
#include "nn/linear.h"
#include "nn/units/units.h"
#include "ops/activation/activation.h"

namespace cambium {
namespace {

constexpr const char* kName = "feed_forward";
constexpr const char* kXielu = "xielu";  // the one function with parameters of its own
// What every published model with xIELU has.
constexpr float kXieluBeta = 0.5F;
constexpr float kXieluEps = -1e-6F;

class FeedForwardUnit : public Unit {
 public:
  FeedForwardUnit(const Options& options, int64_t width) {
    options.expect_only(kName, {"inner", "activation", "bias"});
    const int64_t inner = options.size(kName, "inner", kMaxInner);
    const bool bias = options.flag(kName, "bias", false);
    const std::string& name = options.text(kName, "activation");
    up_ = Linear(width, inner, ParameterGroup::kFeedForward, bias);
    down_ = Linear(inner, width, ParameterGroup::kFeedForward, bias);
    if (name == kXielu) {
      // As the paper starts: p = 0.8, and n = 0.8 with beta's 0.5 in it.
      alpha_p_ = number(0.20338);
      alpha_n_ = number(-1.05023);
    } else {
      activation_ = find_activation(name);
    }
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Tensor rows = up_.forward(ctx, x);
    const Tensor inner = alpha_p_.shape.empty() ? activation(ctx, rows, activation_)
                                                : xielu(ctx, rows, alpha_p_.tensor, alpha_n_.tensor,
                                                        kXieluBeta, kXieluEps);
    return inputs.unread ? down_.forward_unread(ctx, inner) : down_.forward(ctx, inner);
  }

  void visit(const ParameterVisitor& visitor) override {
    up_.visit("up", visitor);
    down_.visit("down", visitor);
    if (!alpha_p_.shape.empty()) {
      visitor("alpha_p", alpha_p_);
      visitor("alpha_n", alpha_n_);
    }
  }

 private:
  static Parameter number(double start) {
    return {.shape = {1},
            .group = ParameterGroup::kNorm,
            .init = {InitKind::kConstant, start},
            .keep_fp32 = true};
  }

  ActivationKind activation_ = ActivationKind::kSilu;
  Linear up_, down_;
  Parameter alpha_p_, alpha_n_;  // no shape = the function has none
};

}  // namespace

std::unique_ptr<Unit> make_feed_forward(const Options& options, int64_t width) {
  return std::make_unique<FeedForwardUnit>(options, width);
}

}  // namespace cambium
