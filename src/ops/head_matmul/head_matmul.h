// Products in which every head has a weight of its own. Latent attention's queries and values go
// through them where its keys stay latents (DeepSeek-AI 2024, arXiv 2405.04434, "absorbed").
#pragma once

#include "tensor/context.h"

namespace cambium {

/// y[t, h, n] = sum over k of x[t, h, k] weight[h, n, k].   x (T, H, K), weight (H, N, K), its rows
/// contiguous and evenly spaced in a head -> (T, H, N). The weight has the type of x's sums, or is
/// bf16, and then without a gradient. Backward adds to the gradients of both.
Tensor head_matmul(Context& ctx, const Tensor& x, const Tensor& weight);
/// y[t, h, k] = sum over n of x[t, h, n] weight[h, n, k].   x (T, H, N) -> (T, H, K)
Tensor head_matmul_transposed(Context& ctx, const Tensor& x, const Tensor& weight);

}  // namespace cambium
