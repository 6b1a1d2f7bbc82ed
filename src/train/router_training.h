// What keeps the experts of routed feed-forwards in use while a model is trained.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/fields.h"
#include "model/model.h"

namespace cambium {

/// Off unless a weight is given.
struct RouterTraining {
  /// Weights of the balancing loss and the z-loss (ops/experts/experts.h) of each layer's router:
  /// means over a step's tokens, loads by packed sequence, added up over the layers.
  double balance = 0.0;
  double z = 0.0;
  /// What a router's choice bias moves by after each step, up for experts that got less than their
  /// share and down for those that got more (Wang et al. 2024, arXiv 2408.15664; gamma of
  /// DeepSeek-V3).
  double bias_rate = 0.0;

  bool on() const { return balance > 0.0 || z > 0.0 || bias_rate > 0.0; }
  friend bool operator==(const RouterTraining&, const RouterTraining&) = default;
};
void visit_fields(RouterTraining& config, FieldVisitor& visit);

/// Of a step: means over its layers with routers.
struct RouterReport {
  double loss = 0.0;     // what is added to the step's loss
  double balance = 0.0;  // 1 = all experts get as much
  double z = 0.0;
  double load = 0.0;  // of the expert that gets most, in shares; 1 = all get as much
};

class RouterTrainer {
 public:
  /// Error that begins with `where`: the model has no routers, none of them is trained, or none has
  /// a choice bias that could move. What is trained has been chosen.
  RouterTrainer(Model& model, const RouterTraining& config, const std::string& where);

  /// For a call of so many tokens, which are this share of the step's. They and their memory last
  /// until the workspace's scope ends.
  std::span<RouterTap> taps(const Context& ctx, int64_t tokens, double share);
  /// Takes what was seen of the call, when its backward steps are done.
  void note_call(const Context& ctx);
  /// What was seen since the last step.
  RouterReport report() const;
  /// Moves the choice biases by what was seen, and forgets it.
  void end_step();

 private:
  struct Router {
    int64_t layer;
    int64_t experts;
    Parameter* bias;            // that moves; null = none
    std::vector<int64_t> load;  // of a step

    int64_t rows() const;
  };

  RouterTraining config_;
  std::vector<Router> routers_;
  std::vector<RouterTap> taps_;  // one per layer
  double share_ = 0.0;           // of the call
  RouterReport seen_;            // sums over calls and routers
};

}  // namespace cambium
