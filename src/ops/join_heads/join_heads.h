// Heads put together from parts of different origin: the keys of latent attention, whose rotated
// dims all heads share.
#pragma once

#include "tensor/context.h"

namespace cambium {

/// [a, b] a head.   a (T, H, A), b (T, H, B) or (T, 1, B), which all heads take -> (T, H, A + B).
/// Backward adds to a and b; of a shared b, the sum over the heads.
Tensor join_heads(Context& ctx, const Tensor& a, const Tensor& b);

}  // namespace cambium
