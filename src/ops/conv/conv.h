// Causal depthwise convolution over a few tokens.
#pragma once

#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

/// y_t[c] = act(bias[c] + sum_j weight[c, j] x_{t-K+1+j}[c]); the last tap meets the current token
/// and tokens before the sequence are zero. x (T, C) row-contiguous, weight (C, K), bias (C) or
/// undefined -> (T, C); act is SiLU if `silu`. state (slots, C, K - 1), fp32
/// (fp64 for F64), or undefined: the last K - 1 inputs of each sequence, oldest first. No gradient
/// flows through the state.
Tensor short_conv(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  bool silu, const Segments& segments, const Tensor& state = {});

}  // namespace cambium
