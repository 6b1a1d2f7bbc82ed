// Heads times a factor each: the temperature of an attention's scores, which is a factor of its
// queries or keys. Learned ones: of each key head in ZAYA1 (Figliolia et al. 2025, arXiv
// 2510.04476), of each query head in Swin V2 (Liu et al. 2021, arXiv 2111.09883).
#pragma once

#include "tensor/context.h"

namespace cambium {

/// y[t, h] = factor[h] x[t, h].   x (T, H, D), factor (H) in the type of sums -> (T, H, D).
/// Backward adds to both; of the factor, the sum over tokens and channels.
Tensor scale_heads(Context& ctx, const Tensor& x, const Tensor& factor);

}  // namespace cambium
