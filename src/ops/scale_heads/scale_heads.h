// Heads times a factor each: the temperature of an attention's scores, which is a factor of its
// queries or keys. A learned one of each key head is in ZAYA1 (arXiv 2511.17127).
#pragma once

#include "tensor/context.h"

namespace cambium {

/// y[t, h] = factor[h] x[t, h].   x (T, H, D), factor (H) in the type of sums -> (T, H, D).
/// Backward adds to both; of the factor, the sum over tokens and channels.
Tensor scale_heads(Context& ctx, const Tensor& x, const Tensor& factor);

}  // namespace cambium
