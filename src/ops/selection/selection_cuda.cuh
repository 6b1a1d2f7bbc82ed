// What the CUDA kernels of the choice share.
#pragma once

#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/selection/selection_kernels.h"

namespace cambium::cuda::selection {

/// Scores of tokens [first, first + count) of a call: those of token first + i in row i, `capacity`
/// apart; positions after a token's own are left as they are, and so is all of a token that looks
/// at everything.
struct Scores {
  int64_t first, count, capacity;
  float* rows;
};

/// On tensor cores; false where the sizes do not suit (selection_mma_cuda.cu).
bool score_on_tensor_cores(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                           const latent::Tokens& tokens, const Scores& scores, const Launch& on);

/// The same by warpgroups; false where the device has none, or the index too many heads
/// (selection_wgmma_cuda.cu).
bool score_by_warpgroups(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                         const latent::Tokens& tokens, const Scores& scores, const Launch& on);

}  // namespace cambium::cuda::selection
