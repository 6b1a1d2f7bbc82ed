#include "train/optimizer.h"

#include <cmath>
#include <map>
#include <numeric>
#include <tuple>

#include "base/checksum.h"
#include "base/random.h"
#include "model/spec.h"
#include "ops/optimizer/optimizer.h"

namespace cambium {
namespace {

OwnedTensor state_like(const Tensor& t, Dtype dtype, bool offload) {
  const std::span shape(t.shape.data(), static_cast<size_t>(t.rank));
  if (!offload || t.device.kind == Device::kCpu) {
    return OwnedTensor(dtype, shape, false, t.device);
  }
  OwnedTensor state;
  const int64_t bytes = t.numel() * dtype_size(dtype);
  state.data = Buffer::pinned(bytes, t.device);
  fill_memory(state.data.data(), t.device, 0, bytes);
  state.view = Tensor::of(dtype, t.device, shape, state.data.data());
  return state;
}

/// A matrix as it is; of a stack, each.
template <class F>
void for_each_matrix(const Tensor& p, const Tensor& m, const F& f) {
  if (p.rank == 2) {
    return f(p, m);
  }
  for (int64_t i = 0; i < p.dim(0); ++i) {
    const auto matrix = [i](const Tensor& stack) {
      return stack.slice(0, i, 1).reshape({stack.dim(1), stack.dim(2)});
    };
    f(matrix(p), matrix(m));
  }
}

}  // namespace

Optimizer::Optimizer(Model& model, const OptimizerConfig& config,
                     const std::vector<std::string>& converted)
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
    const double rate_scale =
        group.rate_scale * (starts_with_one(name, converted) ? config.converted_rate_scale : 1.0);
    const bool vector = p.shape.size() < 2 || p.keep_fp32;
    const bool orthogonal =
        config.kind == OptimizerKind::kMuon && p.is_matrix() &&
        (p.group == ParameterGroup::kMixer || p.group == ParameterGroup::kFeedForward);
    const bool narrow = config.state == OptimizerState::kBF16 && !orthogonal;
    const auto state = [&] {
      return state_like(p.tensor, narrow ? Dtype::kBF16 : Dtype::kF32, config.offload);
    };
    slots_.push_back({name, p.tensor, rate_scale, vector ? 0.0 : group.weight_decay, orthogonal,
                      checksum(std::as_bytes(std::span(name))), state(),
                      orthogonal ? OwnedTensor() : state()});
  });
  expect(!slots_.empty(),
         "nothing is to be trained: every parameter is frozen or has a rate scale of zero");
}

void Optimizer::rest(const std::function<bool(const std::string& name)>& rests) {
  for (Slot& slot : slots_) {
    slot.rests = rests(slot.name);
  }
}

void Optimizer::count_step() {
  ++steps_;
  for (Slot& slot : slots_) {
    slot.steps += slot.rests ? 0 : 1;
  }
}

void Optimizer::set_steps_taken(int64_t steps) {
  steps_ = steps;
  for (Slot& slot : slots_) {
    slot.steps = steps;
  }
}

double Optimizer::gradient_norm() {
  std::vector<Tensor> gradients;
  for (const Slot& slot : slots_) {
    if (!slot.rests) {
      gradients.push_back(slot.tensor.grad_tensor());
    }
  }
  const std::vector<double> sums = sums_of_squares(scratch_.context(), gradients);
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

void Optimizer::step(double rate, double norm) {
  count_step();
  const double scale =
      config_.clip_norm > 0.0 && norm > config_.clip_norm ? config_.clip_norm / norm : 1.0;
  const Context ctx = scratch_.context();
  step_matrices(ctx, rate, scale);
  for (const Slot& slot : slots_) {
    if (slot.rests || slot.orthogonal) {
      continue;
    }
    const auto t = static_cast<double>(slot.steps);
    const AdamwConfig update = {
        .gradient_scale = static_cast<float>(scale),
        .rate = static_cast<float>(rate * slot.rate_scale),
        .beta1 = static_cast<float>(config_.beta1),
        .beta2 = static_cast<float>(config_.beta2),
        .m_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta1, t))),
        .v_correction = static_cast<float>(1.0 / (1.0 - std::pow(config_.beta2, t))),
        .epsilon = static_cast<float>(config_.epsilon),
        .weight_decay = static_cast<float>(slot.weight_decay)};
    if (slot.m.view.dtype == Dtype::kBF16) {
      const uint64_t key = mix_seed(slot.stream, static_cast<uint64_t>(steps_));
      adamw_update_narrow(ctx, slot.tensor, slot.m.view, slot.v.view, update, key);
    } else {
      adamw_update(ctx, slot.tensor, slot.m.view, slot.v.view, update);
    }
    slot.tensor.forget_grad();  // the first to write it in the next step sets it
  }
}

// Matrices of one shape, rate and decay go together, as many as the limit of memory lets: a GPU is
// not filled by the products of a small one. The CPU is, and keeps one in its caches.
void Optimizer::step_matrices(const Context& ctx, double rate, double gradient_scale) {
  constexpr int64_t kMostBytes = int64_t{64} << 20;  // of the copies that products read
  const bool together = ctx.device().kind == Device::kCuda;
  using Kind = std::tuple<int64_t, int64_t, double, double>;
  std::map<Kind, std::vector<MuonMatrix>> waiting;
  const auto update = [&](const Kind& kind, std::vector<MuonMatrix>& matrices) {
    const auto& [rows, columns, rate_scale, weight_decay] = kind;
    muon_update(ctx, matrices,
                {.gradient_scale = static_cast<float>(gradient_scale),
                 .rate = static_cast<float>(rate * rate_scale),
                 .momentum = static_cast<float>(config_.momentum),
                 .weight_decay = static_cast<float>(weight_decay)});
    matrices.clear();
  };
  for (const Slot& slot : slots_) {
    if (slot.rests || !slot.orthogonal) {
      continue;
    }
    for_each_matrix(slot.tensor, slot.m.view, [&](const Tensor& p, const Tensor& m) {
      const Kind kind{p.dim(0), p.dim(1), slot.rate_scale, slot.weight_decay};
      std::vector<MuonMatrix>& matrices = waiting[kind];
      matrices.push_back({p, m});
      const auto count = static_cast<int64_t>(matrices.size());
      if (!together || (count + 1) * p.bytes() > kMostBytes) {
        update(kind, matrices);
      }
    });
  }
  for (auto& [kind, matrices] : waiting) {
    if (!matrices.empty()) {
      update(kind, matrices);
    }
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

int64_t optimizer_state_bytes(const OptimizerConfig& config) {
  return config.state == OptimizerState::kBF16 ? 4 : 8;
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
