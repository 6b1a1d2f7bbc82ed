// Routed experts beside shared ones (Shazeer et al. 2017, arXiv 1701.06538; Dai et al. 2024, arXiv
// 2401.06066): y = up(sum over the chosen of weight * expert(down x)) + shared(x), where down and
// up are there with `latent` alone (Nemotron-3) and a shared expert may have a gate of its own
// (Qwen). ops/experts/experts.h has the routing.
#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "nn/linear.h"
#include "nn/router_tap.h"
#include "nn/units/units.h"
#include "ops/activation/activation.h"
#include "ops/experts/experts.h"
#include "ops/pointwise/pointwise.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

constexpr const char* kName = "experts";
constexpr auto kGroup = ParameterGroup::kFeedForward;

/// What stands between the matrices of an expert.
struct Inside {
  ActivationKind kind = ActivationKind::kSilu;
  bool gated = false;
  float limit = 0.0F;  // of swiglu_clamped; 0 = none

  /// What experts_hidden does from the tokens.
  bool in_hidden() const { return gated && (limit > 0.0F || kind == ActivationKind::kSilu); }

  Tensor operator()(Context& ctx, const Tensor& gate, const Tensor& up) const {
    if (limit > 0.0F) {
      return clamped_swiglu(ctx, gate, up, limit);
    }
    return gated ? gated_activation(ctx, gate, up, kind) : activation(ctx, up, kind);
  }
};

Inside read_inside(const Options& options) {
  const std::string name = options.text(kName, "activation", "swiglu");
  if (name == "swiglu") {
    return {.gated = true};
  }
  if (name == "clamped_swiglu") {
    return {.gated = true,
            .limit = static_cast<float>(
                in_range(kName, "limit", options.real(kName, "limit", 7.0), 1e-3, 1e6))};
  }
  return {.kind = find_activation(name)};
}

RouterConfig read_router(const Options& options) {
  const std::string name = options.text(kName, "router");
  expect(name == "softmax" || name == "topk_softmax" || name == "sigmoid",
         "experts: expected router softmax, topk_softmax or sigmoid, got '{}'", name);
  const int64_t groups = options.size_or(kName, "groups", 1, kMaxExperts, 1);
  const auto number = [&](const char* key, double fallback) {
    return static_cast<float>(in_range(kName, key, options.real(kName, key, fallback), 0.0, 1e6));
  };
  // A softmax over the chosen logits is one over all, divided by its sum over the chosen.
  return {.score = name == "sigmoid" ? RouterScore::kSigmoid : RouterScore::kSoftmax,
          .top = options.size(kName, "top", kMaxExperts),
          .renormalise = name == "topk_softmax" || options.flag(kName, "renormalise", false),
          .eps = number("renormalise_eps", 0.0),
          .scale = number("scale", 1.0),
          .groups = groups,
          .group_top = options.size_or(kName, "group_top", groups, kMaxExperts, 1)};
}

/// Starts the backward steps of the router's own losses, and says what they are.
void train_router(Context& ctx, const Tensor& logits, const Routing& routing, RouterScore score,
                  const RouterTap& tap) {
  const Tensor losses = router_losses(ctx, logits, routing, score);
  const ExpertLists& lists = routing.lists;
  copy(tap.losses, losses);
  const int64_t starts = lists.experts + 1;
  copy(tap.starts, Tensor::of(Dtype::kI32, logits.device, {&starts, 1}, lists.start));
  if (!losses.has_grad()) {
    return;
  }
  const auto tokens = static_cast<double>(std::max(lists.tokens, int64_t{1}));
  ctx.record({}, [losses, balance = tap.balance / tokens, z = tap.z / tokens](const Context&) {
    const bool first = losses.takes_grad();
    CAMBIUM_CHECK(first, "{}", losses);
    fill(losses.grad_tensor().slice(0, 0, 1), balance);
    fill(losses.grad_tensor().slice(0, 1, 1), z);
  });
}

/// A matrix for each of the experts, of which a token meets `used`.
struct StackedLinear {
  StackedLinear() = default;
  StackedLinear(int64_t experts, int64_t used, int64_t in, int64_t out, bool with_bias) {
    weight.shape = {experts, out, in};
    weight.group = kGroup;
    weight.init = {InitKind::kUniform, 1.0 / std::sqrt(static_cast<double>(in))};
    weight.used = used;
    if (with_bias) {
      bias = {.shape = {experts, out}, .group = ParameterGroup::kNorm, .keep_fp32 = true};
    }
  }
  Tensor forward(Context& ctx, const Tensor& rows, const Routing& routing) const {
    return experts_matmul(ctx, rows, weight.tensor, bias.tensor, routing);
  }
  void visit(const std::string& prefix, const ParameterVisitor& visitor) {
    visitor(prefix + ".weight", weight);
    if (!bias.shape.empty()) {
      visitor(prefix + ".bias", bias);
    }
  }

  Parameter weight;
  Parameter bias;  // no shape = none
};

class ExpertsUnit : public Unit {
 public:
  ExpertsUnit(const Options& options, int64_t width)
      : inside_(read_inside(options)), config_(read_router(options)) {
    options.expect_only(kName, {"experts", "top", "inner", "router", "router_bias", "groups",
                                "group_top", "renormalise", "renormalise_eps", "scale", "shared",
                                "shared_gate", "activation", "limit", "bias", "latent"});
    const int64_t experts = options.size(kName, "experts", kMaxExperts);
    const int64_t inner = options.size(kName, "inner", kMaxInner);
    const int64_t latent = options.size_or(kName, "latent", 0, kMaxWidth);
    const int64_t top = config_.top;
    expect(top <= experts, "experts: expected top of at most {} experts, got {}", experts, top);
    expect(experts % config_.groups == 0 && config_.group_top <= config_.groups &&
               top <= experts / config_.groups * config_.group_top,
           "experts: expected groups that divide {} experts, of which group_top hold the top {}, "
           "got {} groups and group_top {}",
           experts, top, config_.groups, config_.group_top);
    const bool bias = options.flag(kName, "bias", false);
    chooses_by_bias_ = options.flag(kName, "router_bias", false);
    expect(!bias || !chooses_by_bias_,
           "experts: expected one bias of the router, of its logits (bias) or of its choice "
           "(router_bias)");
    router_ = Linear(width, experts, kGroup, bias || chooses_by_bias_);
    router_.bias.keep_fp32 = true;
    const int64_t in = latent > 0 ? latent : width;
    if (latent > 0) {
      latent_in_ = Linear(width, latent, kGroup);
      latent_out_ = Linear(latent, width, kGroup);
    }
    if (inside_.gated) {
      gate_ = StackedLinear(experts, top, in, inner, bias);
    }
    up_ = StackedLinear(experts, top, in, inner, bias);
    down_ = StackedLinear(experts, top, inner, in, bias);
    if (const int64_t shared = options.size_or(kName, "shared", 0, kMaxInner); shared > 0) {
      if (inside_.gated) {
        shared_gate_proj_ = Linear(width, shared, kGroup);
      }
      shared_up_ = Linear(width, shared, kGroup);
      shared_down_ = Linear(shared, width, kGroup);
    }
    if (options.flag(kName, "shared_gate", false)) {
      expect(has_shared(), "experts: expected a shared expert, whose gate shared_gate is");
      shared_gate_ = Linear(width, 1, kGroup);
    }
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Tensor& bias = router_.bias.tensor;
    // Rounded to bf16 they would choose otherwise now and then.
    const Tensor logits =
        matmul_unrounded(ctx, x, router_.weight.tensor, chooses_by_bias_ ? Tensor{} : bias);
    const Routing routing = route(ctx, logits, chooses_by_bias_ ? bias : Tensor{}, config_);
    if (inputs.router != nullptr && ctx.tape != nullptr) {
      train_router(ctx, logits, routing, config_.score, *inputs.router);
    }
    const bool has_latent = !latent_in_.weight.shape.empty();
    const Tensor hidden = hidden_of(ctx, has_latent ? latent_in_.forward(ctx, x) : x, routing);
    const Tensor rows = down_.forward(ctx, hidden, routing);
    if (has_shared() && !has_latent && combine_with_serves(ctx, rows)) {
      const Tensor gate = has_shared_gate() ? shared_gate_.forward(ctx, x) : Tensor{};
      return combine_with(ctx, rows, routing, shared(ctx, x), gate);
    }
    Tensor y = combine(ctx, rows, routing);
    if (has_latent) {
      y = latent_out_.forward(ctx, y);
    }
    return has_shared() ? add(ctx, y, gated(ctx, x, shared(ctx, x))) : y;
  }

  void visit(const ParameterVisitor& visitor) override {
    router_.visit("router", visitor);
    const auto visit_some = [&](auto& linear, const std::string& name) {
      if (!linear.weight.shape.empty()) {
        linear.visit(name, visitor);
      }
    };
    visit_some(latent_in_, "latent_in");
    visit_some(gate_, "experts.gate");
    visit_some(up_, "experts.up");
    visit_some(down_, "experts.down");
    visit_some(latent_out_, "latent_out");
    visit_some(shared_gate_proj_, "shared.gate");
    visit_some(shared_up_, "shared.up");
    visit_some(shared_down_, "shared.down");
    visit_some(shared_gate_, "shared_gate");
  }

 private:
  bool has_shared() const { return !shared_up_.weight.shape.empty(); }
  bool has_shared_gate() const { return !shared_gate_.weight.shape.empty(); }

  Tensor hidden_of(Context& ctx, const Tensor& x, const Routing& routing) const {
    if (inside_.in_hidden() &&
        experts_hidden_serves(ctx, x, gate_.weight.tensor, up_.weight.tensor)) {
      return experts_hidden(ctx, x, gate_.weight.tensor, gate_.bias.tensor, up_.weight.tensor,
                            up_.bias.tensor, inside_.limit, routing);
    }
    const Tensor rows = dispatch(ctx, x, routing);
    const Tensor gate = inside_.gated ? gate_.forward(ctx, rows, routing) : Tensor{};
    return inside_(ctx, gate, up_.forward(ctx, rows, routing));
  }

  Tensor shared(Context& ctx, const Tensor& x) const {
    Tensor gate;
    Tensor up;
    if (inside_.gated) {
      const auto both = forward_each(ctx, x, shared_gate_proj_, shared_up_);
      gate = both[0];
      up = both[1];
    } else {
      up = shared_up_.forward(ctx, x);
    }
    return shared_down_.forward(ctx, inside_(ctx, gate, up));
  }

  /// sigmoid(gate x) y, a router of one expert, or y.
  Tensor gated(Context& ctx, const Tensor& x, const Tensor& y) const {
    if (!has_shared_gate()) {
      return y;
    }
    const Tensor logits = shared_gate_.forward(ctx, x);
    return combine(ctx, y, route(ctx, logits, {}, {.score = RouterScore::kSigmoid}));
  }

  Inside inside_;
  RouterConfig config_;
  bool chooses_by_bias_ = false;
  Linear router_, latent_in_, latent_out_;
  StackedLinear gate_, up_, down_;
  Linear shared_gate_proj_, shared_up_, shared_down_, shared_gate_;
};

}  // namespace

std::unique_ptr<Unit> make_experts(const Options& options, int64_t width) {
  return std::make_unique<ExpertsUnit>(options, width);
}

}  // namespace cambium
