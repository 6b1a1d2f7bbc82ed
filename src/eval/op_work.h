// What a call of a kernel must at least move and compute, read off its arguments.
#pragma once

#include <string>
#include <vector>

#include "eval/step_cost.h"
#include "ops/op_timer.h"

namespace cambium {

struct OpWork {
  /// "128 x 4096 -> 1024 + 1024"; with the kernel's name it tells the calls of a step apart.
  std::string shape;
  /// Where the weights that it reads begin.
  std::vector<const void*> weights;
  /// Inputs once, results once, states read and written. Operations are those of products: two for
  /// each number of a weight and row, of a key or value and query that meet, of a state and token.
  StepCost cost;
};

/// Of a forward kernel that serving calls; an empty shape of one that is not known.
OpWork work_of(const OpCall& call);

}  // namespace cambium
