// Private to operations on two inputs.
#pragma once

namespace cambium {

/// Of y = f(a, b): the gradients that a backward kernel sets (on CUDA alone): what is in them is
/// not read. The others are added to.
struct PairSets {
  bool a = false, b = false;
};

}  // namespace cambium
