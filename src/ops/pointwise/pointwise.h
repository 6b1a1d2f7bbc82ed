// Element by element operations. All inputs row-contiguous, of one shape unless said otherwise.
#pragma once

#include <span>

#include "tensor/context.h"

namespace cambium {

/// a + b
Tensor add(Context& ctx, const Tensor& a, const Tensor& b);
/// a x + b y: a residual stream with its scales. With a = b = 1 the numbers are those of add().
Tensor add_scaled(Context& ctx, float a, const Tensor& x, float b, const Tensor& y);
/// a * b
Tensor multiply(Context& ctx, const Tensor& a, const Tensor& b);
/// Neighbouring columns and their factor.
struct ColumnBlock {
  int64_t columns = 0;
  double factor = 1.0;
};
/// Each block of columns of x times its factor: x (T, C) -> (T, C). At most 8 blocks, which make up
/// the C columns in order.
Tensor scale_blocks(Context& ctx, const Tensor& x, std::span<const ColumnBlock> blocks);
/// silu(gate) * up, the inside of a SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202).
Tensor swiglu(Context& ctx, const Tensor& gate, const Tensor& up);
/// sigmoid(gate) * x: a gate of every number.
Tensor sigmoid_gate(Context& ctx, const Tensor& gate, const Tensor& x);
/// x / (1 + exp(-x))
Tensor silu(Context& ctx, const Tensor& x);
/// scale / (1 + exp(-x))
Tensor sigmoid(Context& ctx, const Tensor& x, float scale = 1.0F);

/// The step sizes of Mamba-2: dt = clamp(softplus(raw + bias), lo, hi).   raw (T, H), bias (H) ->
/// (T, H) softplus(x) is x itself above 20. No gradient passes where the clamp acts.
Tensor step_size(Context& ctx, const Tensor& raw, const Tensor& bias, float lo, float hi);
/// Log decay -exp(a_log) * x.   x (T, H), a_log (H) -> (T, H). Mamba-2 passes its step sizes.
Tensor log_decay(Context& ctx, const Tensor& x, const Tensor& a_log);
/// Log decay that stays above `bound` < 0: bound * sigmoid(exp(a_log) * (x + bias)).   x (T, H),
/// bias, a_log (H) -> (T, H). Kimi Delta's second form, whose chunks need no care for what decays
/// to nothing.
Tensor bounded_decay(Context& ctx, const Tensor& x, const Tensor& bias, const Tensor& a_log,
                     float bound);

/// Repeats heads: x (T, G, N) -> (T, G * times, N), each head `times` times in a row (group-query
/// order: output head h is input head h / times). Backward sums the copies.
Tensor repeat_heads(Context& ctx, const Tensor& x, int64_t times);

/// y = s a + (1 - s) b with s = sigmoid(gate) of each head: a, b (T, H * D), gate (T, H) -> (T, H *
/// D). `closed` (T), bytes where the kernels find them, or null: s is 0 where a token's is not 0,
/// and its gate gets no gradient.
Tensor mix_heads(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& gate,
                 const uint8_t* closed = nullptr);

}  // namespace cambium
