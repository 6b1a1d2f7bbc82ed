#include "train/optimizer.h"

#include <cmath>

#include "ops/optimizer/optimizer.h"

namespace cambium {
namespace {

OwnedTensor state_like(const Tensor& t) {
  return OwnedTensor(Dtype::kF32, std::span(t.shape.data(), static_cast<size_t>(t.rank)), false,
                     t.device);
}

}  // namespace

Optimizer::Optimizer(Model& model, const OptimizerConfig& config)
    : config_(config), scratch_(model.device()) {
  expect(config.beta1 >= 0.0 && config.beta1 < 1.0 && config.beta2 >= 0.0 && config.beta2 < 1.0,
         "the optimiser's betas must be in [0, 1), got {} and {}", config.beta1, config.beta2);
  expect(config.epsilon > 0.0, "the optimiser's epsilon must be above zero, got {}",
         config.epsilon);
  model.visit([&](const std::string& name, Parameter& p) {
    if (!p.tensor.has_grad()) {
      return;
    }
    CAMBIUM_CHECK(p.tensor.dtype == Dtype::kF32 && p.tensor.contiguous(), "{}", name);
    const GroupConfig& group = config.group(p.group);
    const bool vector = p.shape.size() < 2 || p.keep_fp32;
    const bool matrix = p.shape.size() == 2 && !p.keep_fp32;
    const bool orthogonal =
        config.kind == OptimizerKind::kMuon && matrix &&
        (p.group == ParameterGroup::kMixer || p.group == ParameterGroup::kFeedForward);
    slots_.push_back({name, p.tensor, group.rate_scale, vector ? 0.0 : group.weight_decay,
                      orthogonal, state_like(p.tensor),
                      orthogonal ? OwnedTensor() : state_like(p.tensor)});
  });
  expect(!slots_.empty(),
         "nothing is to be trained: every parameter is frozen or has a rate scale of zero");
}

double Optimizer::gradient_norm() {
  const Context ctx = scratch_.context();
  double sum = 0.0;
  for (const Slot& slot : slots_) {
    sum += sum_squares(ctx, slot.tensor.grad_tensor());
  }
  return std::sqrt(sum);
}

void Optimizer::step(double rate, double norm) {
  ++steps_;
  const double scale =
      config_.clip_norm > 0.0 && norm > config_.clip_norm ? config_.clip_norm / norm : 1.0;
  const auto t = static_cast<double>(steps_);
  const Context ctx = scratch_.context();
  for (const Slot& slot : slots_) {
    const auto slot_rate = static_cast<float>(rate * slot.rate_scale);
    if (slot.orthogonal) {
      muon_update(ctx, slot.tensor, slot.m.view,
                  {.gradient_scale = static_cast<float>(scale),
                   .rate = slot_rate,
                   .momentum = static_cast<float>(config_.momentum),
                   .weight_decay = static_cast<float>(slot.weight_decay)});
      continue;
    }
    adamw_update(ctx, slot.tensor, slot.m.view, slot.v.view,
                 {.gradient_scale = static_cast<float>(scale),
                  .rate = slot_rate,
                  .beta1 = static_cast<float>(config_.beta1),
                  .beta2 = static_cast<float>(config_.beta2),
                  .m_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta1, t))),
                  .v_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta2, t))),
                  .epsilon = static_cast<float>(config_.epsilon),
                  .weight_decay = static_cast<float>(slot.weight_decay)});
  }
}

void Optimizer::zero_gradients() {
  for (Slot& slot : slots_) {
    slot.tensor.forget_grad();
  }
}

void Optimizer::visit_state(
    const std::function<void(const std::string& name, const Tensor& state)>& visit) {
  for (Slot& slot : slots_) {
    visit(slot.name + ".m", slot.m.view);
    if (!slot.orthogonal) {
      visit(slot.name + ".v", slot.v.view);
    }
  }
}

int64_t Optimizer::state_bytes() const {
  int64_t bytes = 0;
  for (const Slot& slot : slots_) {
    bytes += slot.m.data.bytes() + slot.v.data.bytes();
  }
  return bytes;
}

int64_t Optimizer::trained_parameters() const {
  int64_t n = 0;
  for (const Slot& slot : slots_) {
    n += slot.tensor.numel();
  }
  return n;
}

}  // namespace cambium
