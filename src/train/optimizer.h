// The policy of the optimiser over the parameters of a model that have a gradient: which update,
// rate and decay each gets (ops/optimizer has the updates). What is kept of each is F32 on its
// device, or as OptimizerConfig says; a frozen parameter has none.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/model.h"
#include "tensor/workspace.h"

namespace cambium {

struct GroupConfig {
  double rate_scale = 1.0;  // of the schedule's rate; 0 freezes the group
  double weight_decay = 0.0;
};

/// Muon takes the matrices of mixers and feed-forwards; everything else stays with AdamW.
enum class OptimizerKind { kAdamW, kMuon };

/// How AdamW's moments are kept; Muon's momentum is F32.
enum class OptimizerState {
  kF32,
  kBF16,  // rounded stochastically, by numbers that the step and the parameter's name decide
};

struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double clip_norm = 1.0;  // 0 = no clipping
  double momentum = 0.95;  // Muon
  OptimizerState state = OptimizerState::kF32;
  /// State lies in pinned memory of the host, where a GPU reads and writes it across the bus.
  bool offload = false;
  /// By ParameterGroup. Vectors (biases, A_log, D, dt_bias) never decay, whatever their group.
  std::array<GroupConfig, kParameterGroups> groups = {GroupConfig{1.0, 0.1}, GroupConfig{1.0, 0.1},
                                                      GroupConfig{1.0, 0.0}, GroupConfig{1.0, 0.0}};
  /// Times the rate that its group gives a parameter of a converted mixer, which has more to learn
  /// than what the teacher has too.
  double converted_rate_scale = 1.0;

  GroupConfig& group(ParameterGroup g) { return groups[static_cast<size_t>(g)]; }
  const GroupConfig& group(ParameterGroup g) const { return groups[static_cast<size_t>(g)]; }
};

/// What AdamW keeps of a parameter's element.
int64_t optimizer_state_bytes(const OptimizerConfig& config);

class Optimizer {
 public:
  /// Takes the parameters of `model` that have gradients now; they must keep their memory.
  /// `converted`: what the names of converted mixers' parameters begin with.
  Optimizer(Model& model, const OptimizerConfig& config,
            const std::vector<std::string>& converted = {});

  /// Parameters of these names rest until the next call: they have no gradients, and step() neither
  /// changes them nor what is kept of them. Each is corrected for the steps it took part in.
  void rest(const std::function<bool(const std::string& name)>& rests);
  /// As step() counts one.
  void count_step();
  /// Global norm of the gradients, in double precision and a fixed order. The device is waited for
  /// once.
  double gradient_norm();
  /// One update at `rate` with gradients clipped to the configured norm, given their `norm`; then
  /// the gradients hold nothing (Tensor::forget_grad).
  void step(double rate, double norm);
  void zero_gradients();

  /// Visits what must be kept to go on: names such as "layers.0.mixer.q_proj.weight.m".
  void visit_state(const std::function<void(const std::string& name, const Tensor& state)>& visit);
  int64_t steps_taken() const { return steps_; }
  /// By every parameter.
  void set_steps_taken(int64_t steps);

  int64_t state_bytes() const;
  int64_t trained_parameters() const;

 private:
  /// Muon's part of step().
  void step_matrices(const Context& ctx, double rate, double gradient_scale);

  struct Slot {
    std::string name;
    Tensor tensor;
    double rate_scale;
    double weight_decay;
    bool orthogonal;  // Muon's
    uint64_t stream;  // of the rounding, from the name
    OwnedTensor m;
    OwnedTensor v;      // no memory where orthogonal
    int64_t steps = 0;  // that it took part in
    bool rests = false;
  };

  OptimizerConfig config_;
  std::vector<Slot> slots_;
  Workspace scratch_;
  int64_t steps_ = 0;
};

}  // namespace cambium
