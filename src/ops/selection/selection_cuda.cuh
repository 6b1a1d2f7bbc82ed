// What the CUDA kernels of the choice share.
#pragma once

#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/selection/selection_kernels.h"

namespace cambium::cuda::selection {

/// Scores of tokens [first, first + count) of a call: those of list l of token first + i in row
/// i lists + l, `capacity` apart. What is no candidate is left as it is, and so is all of a token
/// that looks at everything.
struct Scores {
  int64_t first, count, capacity;
  float* rows;
};

/// Of blocks, pools, and lists by head (selection_pieces_cuda.cu).
template <class T>
void score_pieces(const ChooseTokens<T>& a, const attention::Layout& layout,
                  const latent::Tokens& tokens, const Scores& scores, const Launch& on);

/// The same on tensor cores; false where that does not suit
/// (selection_pieces_mma_cuda.cu).
bool score_pieces_on_tensor_cores(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                                  const latent::Tokens& tokens, const Scores& scores,
                                  const Launch& on);

/// Of tokens, on tensor cores; false where the sizes do not suit (selection_mma_cuda.cu).
bool score_on_tensor_cores(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                           const latent::Tokens& tokens, const Scores& scores, const Launch& on);

/// The same by warpgroups; false where the device has none, or the index too many heads
/// (selection_wgmma_cuda.cu).
bool score_by_warpgroups(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                         const latent::Tokens& tokens, const Scores& scores, const Launch& on);

}  // namespace cambium::cuda::selection
