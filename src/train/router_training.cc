#include "train/router_training.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "tensor/copy.h"
#include "train/router_check.h"

namespace cambium {

int64_t RouterTrainer::Router::rows() const {
  return std::accumulate(load.begin(), load.end(), int64_t{0});
}

void visit_fields(RouterTraining& config, FieldVisitor& visit) {
  visit({"balance", "weight of the routers' balancing loss; 0 = none"}, config.balance,
        reals_from(0.0, 1e6));
  visit({"z", "weight of the routers' z-loss; 0 = none"}, config.z, reals_from(0.0, 1e6));
  visit({"bias_rate", "what routers' choice biases move by in a step; 0 = they stay"},
        config.bias_rate, reals_from(0.0, 1e3));
}

namespace {

/// The layer's routed experts, or null.
const UnitSpec* experts_of(const LayerSpec& layer) {
  const UnitSpec* unit = layer.feed_forward();
  return unit != nullptr && unit->kind == "experts" ? unit : nullptr;
}

bool has_choice_bias(const UnitSpec& experts) {
  return experts.options.flag("experts", "router_bias", false);
}

}  // namespace

void expect_routers(const ModelSpec& spec, const RouterTraining& config, const std::string& where) {
  bool any = false;
  bool moves = false;
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* unit = experts_of(layer);
    any = any || unit != nullptr;
    moves = moves || (unit != nullptr && has_choice_bias(*unit));
  }
  expect(any || !config.on(),
         "{}: router: expected a model with routed experts, got {} without any; leave router out",
         where, layer_map(spec));
  expect(moves || config.bias_rate == 0.0,
         "{}: router: bias_rate moves choice biases, which no router of the model has; use balance",
         where);
}

RouterTrainer::RouterTrainer(Model& model, const RouterTraining& config, const std::string& where)
    : config_(config), taps_(static_cast<size_t>(model.layer_count())) {
  expect_routers(model.spec(), config, where);
  bool trains = false;
  for (int64_t i = 0; i < model.layer_count(); ++i) {
    const UnitSpec* unit = experts_of(model.spec().layers[static_cast<size_t>(i)]);
    if (unit == nullptr) {
      continue;
    }
    Router& router =
        routers_.emplace_back(Router{i, unit->options.integer("experts", "experts"), nullptr, {}});
    router.load.resize(static_cast<size_t>(router.experts));
    const std::string prefix = unit_prefix(i, *unit) + "router.";
    model.visit_layer(i, [&](const std::string& name, Parameter& p) {
      trains = trains || (name == prefix + "weight" && p.tensor.has_grad());
      if (config.bias_rate > 0.0 && name == prefix + "bias" && p.tensor.has_grad() &&
          has_choice_bias(*unit)) {
        router.bias = &p;
      }
    });
  }
  expect(trains,
         "{}: router: no router is trained, so its losses have nothing to change; train "
         "everything, or leave router out",
         where);
}

std::span<RouterTap> RouterTrainer::taps(const Context& ctx, int64_t tokens, double share) {
  share_ = share;
  for (const Router& router : routers_) {
    RouterTap& tap = taps_[static_cast<size_t>(router.layer)];
    tap.balance = config_.balance * share;
    tap.z = config_.z * share;
    tap.losses = Tensor::of(ctx.shared_scratch<double>(2 * tokens), {2, tokens});
    tap.starts = Tensor::of(ctx.shared_scratch<int32_t>(router.experts + 1), {router.experts + 1});
  }
  return taps_;
}

void RouterTrainer::note_call(const Context& ctx) {
  ctx.synchronize();
  for (Router& router : routers_) {
    const RouterTap& tap = taps_[static_cast<size_t>(router.layer)];
    const int64_t tokens = tap.losses.dim(1);
    const auto* losses = tap.losses.ptr<double>();
    const double scale = share_ / static_cast<double>(tokens);
    seen_.balance += scale * std::accumulate(losses, losses + tokens, 0.0);
    seen_.z += scale * std::accumulate(losses + tokens, losses + 2 * tokens, 0.0);
    const auto* starts = tap.starts.ptr<int32_t>();
    for (int64_t e = 0; e < router.experts; ++e) {
      router.load[static_cast<size_t>(e)] += starts[e + 1] - starts[e];
    }
  }
}

RouterReport RouterTrainer::report() const {
  RouterReport report = seen_;
  report.loss = config_.balance * seen_.balance + config_.z * seen_.z;
  for (const Router& router : routers_) {
    const int64_t most = *std::max_element(router.load.begin(), router.load.end());
    report.load += static_cast<double>(most * router.experts) /
                   static_cast<double>(std::max(router.rows(), int64_t{1}));
  }
  const auto routers = static_cast<double>(routers_.size());
  report.balance /= routers;
  report.z /= routers;
  report.load /= routers;
  return report;
}

void RouterTrainer::end_step() {
  for (Router& router : routers_) {
    if (router.bias != nullptr) {
      std::vector<float> bias = elements_of(router.bias->tensor);
      for (size_t e = 0; e < bias.size(); ++e) {
        const int64_t over = router.load[e] * router.experts - router.rows();
        const double sign = static_cast<double>(over > 0) - static_cast<double>(over < 0);
        bias[e] -= static_cast<float>(config_.bias_rate * sign);
      }
      copy(router.bias->tensor, Tensor::of(bias.data(), {router.experts}));
    }
    std::fill(router.load.begin(), router.load.end(), 0);
  }
  seen_ = {};
}

}  // namespace cambium
