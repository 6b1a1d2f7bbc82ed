#include "hybrid/relaxation.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/signals.h"
#include "nn/units/units.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

/// Of the highest price: the first.
constexpr double kFirstPrice = 0.01;
/// Gates stay between 0.05 and 0.95.
constexpr double kMaxLogit = 3.0;

/// Units end in a projection of this name (fresh_model starts them smaller by it).
bool of_output(const std::string& name) {
  return name.starts_with("o_proj.") || name.starts_with("out_proj.");
}

template <class T>
double product(const T* a, const T* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  return sum;
}

// <G, W>, in one order of sums on every device.
double along_itself(const Tensor& w) {
  if (w.dtype == Dtype::kF64) {
    return product(w.grad_ptr<double>(), w.ptr<double>(), w.numel());
  }
  const std::vector<float> values = elements_of(w.detached());
  const std::vector<float> gradient = elements_of(w.grad_tensor());
  return product(gradient.data(), values.data(), w.numel());
}

double take_along(const std::vector<Tensor>& projection) {
  double sum = 0.0;
  for (const Tensor& w : projection) {
    sum += along_itself(w);
    fill(w.grad_tensor(), 0.0);
  }
  return sum;
}

double sigmoid(double s) {
  return 1.0 / (1.0 + std::exp(-s));
}

std::vector<double> gates_of(const std::vector<double>& logits) {
  std::vector<double> gates;
  for (const double s : logits) {
    gates.push_back(sigmoid(s));
  }
  return gates;
}

class GateTrainer {
 public:
  GateTrainer(const MixerBank& bank, const RelaxationConfig& config, const DocumentSource& data,
              PartialGates& state)
      : teacher_(bank.teacher()),
        gated_(bank),
        config_(config),
        state_(state),
        packer_(data, config.train.seed, config.train.sequence_length, config.train.long_documents),
        workspace_(bank.teacher().device()),
        activations_(activations_of(config.train.precision, bank.teacher().device())),
        tape_(workspace_.host()) {
    const size_t layers = gated_.layers();
    if (state_.steps == 0) {
      state_ = {};
      state_.logits.resize(layers);
      state_.first.resize(layers);
      state_.second.resize(layers);
      state_.sums.resize(layers);
    }
    for (const std::vector<double>* of : {&state_.first, &state_.second, &state_.sums}) {
      expect(state_.logits.size() == layers && of->size() == layers,
             "expected the gates of {} layers, got {} and {}", layers, state_.logits.size(),
             of->size());
    }
    packer_.seek({.next_sample = state_.next_sample});
  }

  void step() {
    gated_.set(gates_of(state_.logits));
    std::vector<PackedSequence> sequences;
    int64_t learned = 0;
    int64_t tokens = 0;
    for (int64_t i = 0; i < config_.train.sequences_per_step; ++i) {
      sequences.push_back(packer_.next());
      learned += sequences.back().learned;
      tokens += sequences.back().batch.size();
    }
    const int64_t compared = config_.train.align.all_tokens ? tokens : learned;
    for (const PackedSequence& sequence : sequences) {
      run(sequence, 1.0 / static_cast<double>(learned), 1.0 / static_cast<double>(compared));
    }
    update(gated_.take_gradients());
    state_.next_sample = packer_.position().next_sample;
  }

 private:
  // Leaves the losses' gradients of one sequence.
  void run(const PackedSequence& sequence, double scale, double hidden_scale) {
    const WorkspaceScope scope(workspace_);
    tape_.clear();
    Context plain = workspace_.context(activations_);
    Context ctx = workspace_.context(activations_, &tape_);
    LossInputs inputs;
    inputs.teacher_hidden = teacher_.forward(plain, sequence.batch);
    inputs.teacher_head = teacher_.head().detached();
    inputs.teacher_logit_cap = teacher_.spec().logit_cap;
    ForwardOptions options;
    options.checkpoint_layers = config_.train.checkpoint_layers;
    inputs.hidden = gated_.model().forward(ctx, sequence.batch, options);
    inputs.head = gated_.model().head().detached();
    inputs.logit_cap = gated_.model().spec().logit_cap;
    inputs.labels = sequence.labels;
    inputs.scale = scale;
    head_loss(ctx, inputs, config_.train.loss);
    const AlignConfig& align = config_.train.align;
    const std::span<const int32_t> rows =
        align.all_tokens ? std::span<const int32_t>{} : std::span(sequence.labels);
    const Tensor none = plain.result_like(inputs.teacher_hidden, false);
    fill(none, 0.0);
    const double length =
        align_loss(plain, inputs.teacher_hidden, none, rows, false, 0.0) /
        static_cast<double>(rows.empty() ? sequence.batch.size() : sequence.learned);
    align_loss(ctx, inputs.hidden, inputs.teacher_hidden, rows, align.squared,
               align.weight * hidden_scale / length);
    tape_.backward(ctx);
  }

  // One step of Adam on the logits.
  void update(std::vector<double> gradients) {
    const TrainConfig& c = config_.train;
    const auto step = static_cast<double>(state_.steps);
    const auto steps = static_cast<double>(c.steps);
    const double price = config_.price * std::pow(kFirstPrice, 1.0 - (step + 1.0) / steps) /
                         static_cast<double>(gradients.size());
    const double rate = learning_rate(c.schedule, step, steps);
    const double m_correction = 1.0 / (1.0 - std::pow(c.optimizer.beta1, step + 1.0));
    const double v_correction = 1.0 / (1.0 - std::pow(c.optimizer.beta2, step + 1.0));
    for (size_t i = 0; i < gradients.size(); ++i) {
      const double gate = sigmoid(state_.logits[i]);
      const double g = gradients[i] + price * gate * (1.0 - gate);
      double& m = state_.first[i];
      double& v = state_.second[i];
      m = c.optimizer.beta1 * m + (1.0 - c.optimizer.beta1) * g;
      v = c.optimizer.beta2 * v + (1.0 - c.optimizer.beta2) * g * g;
      const double move =
          rate * m * m_correction / (std::sqrt(v * v_correction) + c.optimizer.epsilon);
      state_.logits[i] = std::clamp(state_.logits[i] - move, -kMaxLogit, kMaxLogit);
      state_.sums[i] += sigmoid(state_.logits[i]);
    }
    ++state_.steps;
  }

  Model& teacher_;
  GatedMixers gated_;
  const RelaxationConfig& config_;
  PartialGates& state_;
  Packer packer_;
  Workspace workspace_;
  Dtype activations_;
  Tape tape_;
};

}  // namespace

GatedMixers::GatedMixers(const MixerBank& bank) {
  const auto norms_its_mixer = [](const BranchSpec& branch) {
    return branch.out_norm.kind != NormKind::kNone &&
           std::any_of(branch.units.begin(), branch.units.end(), [](const UnitSpec& unit) {
             return find_unit_kind(unit.kind).role == UnitRole::kMixer;
           });
  };
  for (size_t i = 0; i < bank.layers().size(); ++i) {
    const LayerSpec& layer = bank.teacher().spec().layers[static_cast<size_t>(bank.layers()[i])];
    expect(
        std::none_of(layer.branches.begin(), layer.branches.end(), norms_its_mixer),
        "gates: layer {} norms the output of its mixer, which undoes what a gate does before it; "
        "use another method, such as restore-one",
        bank.layers()[i]);
  }
  both_ = bank.build_beside(1);
  const ModelSpec& spec = both_.model->spec();
  for (const int64_t index : bank.layers()) {
    const std::vector<UnitSpec> mixers = spec.layers[static_cast<size_t>(index)].mixers();
    Layer layer;
    layer.index = index;
    for (const UnitSpec& unit : mixers) {
      if (unit.name == kBeside) {
        layer.beside = unit_name(unit);
        layer.out_beside = unit.out;
      } else if (layer.attention.empty() && is_attention(unit)) {
        layer.attention = unit_name(unit);
        layer.out_attention = unit.out;
      }
    }
    layers_.push_back(std::move(layer));
  }
  const auto projection_of = [&](const std::string& unit, const std::string& name) {
    return name.starts_with(unit) && of_output(name.substr(unit.size()));
  };
  std::vector<std::string> units;
  for (const Layer& layer : layers_) {
    for (const std::string& unit : {layer.attention, layer.beside}) {
      units.push_back(fmt::format("layers.{}.{}.", layer.index, unit));
    }
  }
  both_.weights.set_trainable(*both_.model, [&](const std::string& name, const Parameter&) {
    return std::any_of(units.begin(), units.end(),
                       [&](const std::string& unit) { return projection_of(unit, name); });
  });
  for (size_t i = 0; i < layers_.size(); ++i) {
    both_.model->visit_layer(layers_[i].index, [&](const std::string& name, Parameter& p) {
      if (projection_of(units[2 * i], name)) {
        layers_[i].of_attention.push_back(p.tensor);
      } else if (projection_of(units[2 * i + 1], name)) {
        layers_[i].of_beside.push_back(p.tensor);
      }
    });
    CAMBIUM_CHECK(!layers_[i].of_attention.empty() && !layers_[i].of_beside.empty());
  }
}

void GatedMixers::set(const std::vector<double>& gates) {
  CAMBIUM_CHECK(gates.size() == layers_.size());
  for (size_t i = 0; i < gates.size(); ++i) {
    Layer& layer = layers_[i];
    layer.gate = gates[i];
    cambium::Layer& in_model = both_.model->layer(layer.index);
    in_model.set_out(layer.attention, layer.out_attention * static_cast<float>(gates[i]));
    in_model.set_out(layer.beside, layer.out_beside * static_cast<float>(1.0 - gates[i]));
  }
}

std::vector<double> GatedMixers::take_gradients() {
  std::vector<double> gradients;
  for (const Layer& layer : layers_) {
    const double of_attention = take_along(layer.of_attention);
    const double of_beside = take_along(layer.of_beside);
    gradients.push_back((1.0 - layer.gate) * of_attention - layer.gate * of_beside);
  }
  return gradients;
}

std::vector<double> learn_gates(const MixerBank& bank, const RelaxationConfig& config,
                                const DocumentSource& data, PartialGates& state,
                                const std::function<void()>& keep) {
  GateTrainer trainer(bank, config, data, state);
  while (state.steps < config.train.steps) {
    stop_point();
    const auto begin = std::chrono::steady_clock::now();
    trainer.step();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    state.seconds += taken.count();
    keep();
  }
  std::vector<double> means;
  for (const double sum : state.sums) {
    means.push_back(sum / static_cast<double>(state.steps));
  }
  return means;
}

}  // namespace cambium
