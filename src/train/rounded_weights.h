// The trained matrices of a model rounded to bf16 once a step. Without them every product rounds
// its matrix for itself: forward and backward, for each sequence of the step.
#pragma once

#include <vector>

#include "model/model.h"
#include "tensor/arena.h"

namespace cambium {

class RoundedWeights {
 public:
  /// Of nothing: to use it changes nothing.
  RoundedWeights() = default;
  /// Memory for those matrices of `model` that have a gradient, 2 bytes a number. `model` must
  /// outlive it.
  explicit RoundedWeights(Model& model);
  int64_t bytes() const;

  /// While it lives, products of bf16 read the values that the matrices had when it was made.
  class Use {
   public:
    explicit Use(const RoundedWeights& weights);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    const RoundedWeights& weights_;
  };

 private:
  struct Kept {
    Parameter* parameter;
    OwnedTensor rounded;
  };
  std::vector<Kept> kept_;
};

}  // namespace cambium
