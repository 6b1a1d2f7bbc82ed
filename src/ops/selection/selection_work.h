// How the choice's work is cut for the CPU (selection_cpu_plan.cc cuts it).
#pragma once

#include "ops/selection/selection_kernels.h"

namespace cambium {

/// Tokens whose scores are held at a time.
inline constexpr int64_t kTokensScored = 64;

/// Tokens [first, last) of a segment.
struct ChoosePiece {
  ChooseTokens<float> in;
  int64_t segment;
  int64_t first;
  int64_t last;
  float* scores;    // (last - first, room) scratch: (lists, longest), then a number of each head
  int64_t longest;  // candidates
  int64_t room;
};
CAMBIUM_CPU_KERNEL(choose_piece, ChoosePiece)

}  // namespace cambium
