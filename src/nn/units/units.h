// The units of this build, one file each; registry.cc holds their table.
#pragma once

#include "nn/unit.h"

namespace cambium {

/// Softmax attention: heads, kv_heads, head_dim; window (0 = full), rope (default true),
/// qk_norm_eps (0 = no norm of q and k), qkv_bias and out_bias (default false).
std::unique_ptr<Unit> make_attention(const Options& options, int64_t width);
/// Attention that must have a window.
std::unique_ptr<Unit> make_sliding_window(const Options& options, int64_t width);
/// Apriel-H1's grouped Mamba: inner, xb, state, dt_rank, conv, repeat_before_conv.
std::unique_ptr<Unit> make_mamba(const Options& options, int64_t width);
/// Mamba-2: heads, head_dim, state, x_heads, b_heads, c_heads, conv, norm_group.
std::unique_ptr<Unit> make_mamba2(const Options& options, int64_t width);
/// Gated DeltaNet: heads, q_heads, k_heads, v_heads, key_dim, value_dim, conv, rope.
std::unique_ptr<Unit> make_gated_delta_net(const Options& options, int64_t width);
/// SwiGLU feed-forward: inner; bias (of all three projections, default false).
std::unique_ptr<Unit> make_swiglu(const Options& options, int64_t width);

}  // namespace cambium
