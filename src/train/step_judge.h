// Whether a step of training may reach the weights, and what is wrong when it may not.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "model/model.h"
#include "tensor/workspace.h"
#include "train/dataset.h"

namespace cambium {

struct DivergenceConfig {
  double factor = 3.0;   // times the running median; 0 = only non-finite values stop the run
  int64_t window = 64;   // steps the median is taken over, at least 10; none is judged before
  int64_t patience = 8;  // steps in a row
};

/// Watches the losses of a run. Its state goes into checkpoints.
class StepJudge {
 public:
  /// Losses whose mean is what a run began with.
  static constexpr size_t kFirst = 5;

  struct State {
    std::vector<double> recent;  // losses, newest last
    std::vector<double> first;   // those of the first kFirst steps
    int64_t above = 0;           // steps in a row that were too high
  };

  explicit StepJudge(const DivergenceConfig& limits) : limits_(limits) {}

  /// Takes the loss of the next step. Not empty when it has been too high for too long: why.
  std::string diverged(double loss);
  /// Steps that the median is taken over.
  int64_t window() const { return std::max<int64_t>(limits_.window, 10); }
  /// Not empty where the last losses, a window full of them, lie in the median well above the first
  /// in the mean and above each of them: by how much.
  /// What a student brought along is then overwritten faster than it is taught.
  std::string risen() const;
  /// Mean of the last losses, at most ten.
  double last_loss() const;

  const State& state() const { return state_; }
  void set_state(State state) { state_ = std::move(state); }

 private:
  DivergenceConfig limits_;
  State state_;
};

/// The first place of a step where numbers are no longer finite: a parameter, a layer's mixer or
/// feed-forward, the gradients from some parameter downwards. `teacher` may be null. Activations
/// are computed in `activations`, as the step's were.
std::string find_trouble(Model& student, Model* teacher, std::span<const PackedSequence> sequences,
                         Workspace& workspace, Dtype activations);
/// "the largest gradient is that of layers.3.mixer.q_proj.weight".
std::string largest_gradient(Model& model);

}  // namespace cambium
