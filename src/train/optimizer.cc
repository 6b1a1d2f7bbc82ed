#include "train/optimizer.h"

#include <cmath>
#include <cstring>

#include "base/parallel.h"
#include "ops/matmul/matmul.h"
#include "train/optimizer_kernels.h"

namespace cambium {
namespace {

OwnedTensor state_like(const Tensor& t) {
  return OwnedTensor(Dtype::kF32, std::span(t.shape.data(), static_cast<size_t>(t.rank)));
}

}  // namespace

Optimizer::Optimizer(Model& model, const OptimizerConfig& config) : config_(config) {
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

double Optimizer::gradient_norm() const {
  std::vector<double> sums(slots_.size());
  parallel_for(static_cast<int64_t>(slots_.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& t = slots_[static_cast<size_t>(i)].tensor;
      sum_squares(SumSquares{t.numel(), t.grad_ptr<float>(), &sums[static_cast<size_t>(i)]});
    }
  });
  double sum = 0.0;
  for (const double s : sums) {
    sum += s;
  }
  return std::sqrt(sum);
}

void Optimizer::step(double rate, double norm) {
  ++steps_;
  const double scale =
      config_.clip_norm > 0.0 && norm > config_.clip_norm ? config_.clip_norm / norm : 1.0;
  const auto t = static_cast<double>(steps_);
  AdamwUpdate update{};
  update.gradient_scale = static_cast<float>(scale);
  update.beta1 = static_cast<float>(config_.beta1);
  update.beta2 = static_cast<float>(config_.beta2);
  update.m_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta1, t)));
  update.v_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta2, t)));
  update.epsilon = static_cast<float>(config_.epsilon);
  for (Slot& slot : slots_) {
    if (slot.orthogonal) {
      muon_update(slot, rate * slot.rate_scale, scale);
      continue;
    }
    update.n = slot.tensor.numel();
    update.p = slot.tensor.ptr<float>();
    update.g = slot.tensor.grad_ptr<float>();
    update.m = slot.m.view.ptr<float>();
    update.v = slot.v.view.ptr<float>();
    update.rate = static_cast<float>(rate * slot.rate_scale);
    update.weight_decay = static_cast<float>(slot.weight_decay);
    adamw_update(update);
  }
}

// Momentum (Nesterov), then the nearest half-orthogonal matrix by five steps of the quintic
// Newton-Schulz iteration X <- a X + (b A + c A A) X, A = X X^T; scaled so that an update's root
// mean square is that of AdamW (0.2), which lets both share a learning rate.
void Optimizer::muon_update(Slot& slot, double rate, double gradient_scale) {
  const int64_t n = slot.tensor.numel();
  const int64_t rows = slot.tensor.dim(0);
  const int64_t columns = slot.tensor.dim(1);
  const bool wide = rows <= columns;
  const int64_t small = wide ? rows : columns;
  const int64_t large = wide ? columns : rows;
  const ArenaScope scope(scratch_);
  const Context ctx{.arena = &scratch_};
  float* p = slot.tensor.ptr<float>();
  float* g = slot.tensor.grad_ptr<float>();
  float* m = slot.m.view.ptr<float>();
  Tensor x = scratch_.empty(Dtype::kF32, {small, large});
  Tensor next = scratch_.empty(Dtype::kF32, {small, large});
  const Tensor a = scratch_.empty(Dtype::kF32, {small, small});
  const Tensor b = scratch_.empty(Dtype::kF32, {small, small});
  const auto momentum = static_cast<float>(config_.momentum);
  const auto scale = static_cast<float>(gradient_scale);
  double square = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const float gradient = g[i] * scale;
      m[i] = momentum * m[i] + (1.0F - momentum) * gradient;
      const float u = momentum * m[i] + (1.0F - momentum) * gradient;
      x.ptr<float>()[wide ? i : c * rows + r] = u;
      square += static_cast<double>(u) * static_cast<double>(u);
    }
  }
  const auto normalise = static_cast<float>(1.0 / (std::sqrt(square) + 1e-12));
  for (int64_t i = 0; i < n; ++i) {
    x.ptr<float>()[i] *= normalise;
  }
  constexpr float kA = 3.4445F;
  constexpr float kB = -4.7750F;
  constexpr float kC = 2.0315F;
  for (int round = 0; round < 5; ++round) {
    matmul_into(ctx, a, x, x);
    matmul_into(ctx, b, a, a);  // a is symmetric
    float* bp = b.ptr<float>();
    const float* ap = a.ptr<float>();
    for (int64_t i = 0; i < small * small; ++i) {
      bp[i] = kB * ap[i] + kC * bp[i];
    }
    for (int64_t i = 0; i < small; ++i) {
      bp[i * small + i] += kA;
    }
    matmul_grad_input(ctx, next, b, x, false);
    std::swap(x, next);
  }
  const auto keep = static_cast<float>(1.0 - rate * slot.weight_decay);
  const auto factor = static_cast<float>(rate * 0.2 * std::sqrt(static_cast<double>(large)));
  const float* xp = x.ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      p[i] = p[i] * keep - factor * xp[wide ? i : c * rows + r];
      g[i] = 0.0F;
    }
  }
}

void Optimizer::zero_gradients() {
  for (Slot& slot : slots_) {
    std::memset(slot.tensor.grad, 0, static_cast<size_t>(slot.tensor.bytes()));
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
