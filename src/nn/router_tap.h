// What a router is trained by beside the losses of its model, and what is seen of it.
#pragma once

#include "tensor/tensor.h"

namespace cambium {

/// Of a call with a tape; memory of the host, which a router fills in.
struct RouterTap {
  /// Weights of the means of router_losses (ops/experts/experts.h) in what is differentiated.
  double balance = 0.0;
  double z = 0.0;
  Tensor losses;  // (2, T) f64: those of the tokens
  Tensor starts;  // (E + 1) i32: ExpertLists::start
};

}  // namespace cambium
