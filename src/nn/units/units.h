// The units of this build, one file each; registry.cc holds their table.
#pragma once

#include "nn/unit.h"
#include "ops/norm/norm.h"

namespace cambium {

/// Taps of a short convolution.
inline constexpr int64_t kMaxConv = 64;

/// The option out_gate, of the z that a mixer's output is multiplied by: "silu", the default, or
/// "sigmoid".
GateActivation out_gate(const Options& options, const char* owner);

/// Softmax attention: heads, kv_heads, head_dim; window (0 = full), rope (default true), scale of
/// the scores (default head_dim^-1/2), key_scale (1), qk_norm_eps (0 = no norm of q and k) and
/// qk_norm ("rms", "zero_centred" or "layer") over each "head" or all the "width" (qk_norm_over,
/// "head"), qkv_bias and out_bias (false), gate (false: a sigmoid gate of
/// the heads' results before out_proj; in q_proj the rows of a head are its query's, then its
/// gate's), softcap of the scores (0 = none), sink_logits (false: a learned score of each head that
/// joins the softmax and has no value), temperature ("query" or "key": a learned factor of the
/// scores of each query head or of those that share a key head, at its queries or keys; none unless
/// given); index_heads (0 = no index, else kv_heads) of index_dim, index_top of `index_of`
/// ("blocks"; "tokens", "pools") of index_size tokens each, index_local (1): what each head of keys
/// is looked at (nn/units/indexer.h).
std::unique_ptr<Unit> make_attention(const Options& options, int64_t width);
/// Whether it is attention to everything before a token, in whose place other mixers can stand:
/// attention or latent_attention.
bool is_attention(const UnitSpec& unit);
/// Attention that must have a window; sinks (0): the first tokens, which stay visible behind it.
/// With kv_rank it is latent attention, whose options it then takes but those of an index.
std::unique_ptr<Unit> make_sliding_window(const Options& options, int64_t width);
/// Apriel-H1's grouped Mamba: inner, xb, state, dt_rank, conv, repeat_before_conv, conv_bias
/// (default true), in_bias and out_bias (false), out_gate ("silu" or "sigmoid").
std::unique_ptr<Unit> make_mamba(const Options& options, int64_t width);
/// Mamba-1: inner, state, dt_rank, conv, conv_bias (default true), norm_eps of dt, B and C (0 =
/// they have no norms).
std::unique_ptr<Unit> make_mamba1(const Options& options, int64_t width);
/// LFM2's gated short convolution: conv (3), bias (of its projections too, default false).
std::unique_ptr<Unit> make_short_conv(const Options& options, int64_t width);
/// Mamba-2: heads, head_dim, state, x_heads, b_heads, c_heads, conv, norm (default true),
/// norm_group, norm_eps, out_bias (false); of the norm, out_gate ("silu" or "sigmoid") and
/// norm_first (false: it norms what was gated); in_scale of its input and row_scales of z, x, B, C
/// and dt (Falcon-H1).
std::unique_ptr<Unit> make_mamba2(const Options& options, int64_t width);
/// Gated DeltaNet: heads, q_heads, k_heads, v_heads, key_dim, value_dim, conv, rope, norm_eps;
/// out_gate ("silu" or "sigmoid"), allow_neg_eigval (false: how much of the new is written lies in
/// (0, 1); true: in (0, 2)), conv_bias and out_bias (false).
std::unique_ptr<Unit> make_gated_delta_net(const Options& options, int64_t width);
/// Kimi Delta Attention: heads, q_heads, k_heads, v_heads, head_dim, value_dim (default head_dim),
/// conv, rope, norm_eps; gate_rank (default head_dim; 0 = full) of the decay and of the output
/// gate; decay ("softplus", or "sigmoid", which stays above lower_bound, -5 by default);
/// allow_neg_eigval, conv_bias and out_bias (false).
std::unique_ptr<Unit> make_kimi_delta(const Options& options, int64_t width);
/// Lightning attention: heads, kv_heads, head_dim, value_dim (default head_dim); layer_of_slopes of
/// `layers` (0 = the slopes of no layer), silu (of q, k and v, default true), rope (false), qk_norm
/// and qk_norm_eps as attention's, norm_group (default all channels) and norm_eps of the output's
/// norm; rows_by_head (false: rows of qkv_proj are q, k, v; true: those of a head stand together,
/// as in MiniMax's checkpoints); qkv_bias and out_bias (false).
std::unique_ptr<Unit> make_lightning(const Options& options, int64_t width);
/// A window of attention beside a recurrence: the options of sliding_window; recurrent
/// (gated_delta_net, kimi_delta, mamba2 or lightning) and "recurrent." before each of its options;
/// window_dropout (0: share of documents that train without their window).
std::unique_ptr<Unit> make_parallel(const Options& options, int64_t width);
/// The recurrence in the options of a parallel unit.
UnitSpec recurrent_part(const Options& parallel);
/// What the projection of its mixing gate is called.
const char* parallel_gate(const Options& parallel);
/// Gated feed-forward: inner; activation ("silu": SwiGLU, "gelu_tanh": GeGLU, "gelu", "relu2", or
/// "clamped_swiglu" with its limit, 7),
/// bias (of all three projections, default false), gate_scale (1).
std::unique_ptr<Unit> make_swiglu(const Options& options, int64_t width);
/// down(activation(up x)): inner, activation ("relu2", "gelu", "gelu_tanh", "silu", or "xielu" with
/// its two learned numbers), bias (false).
std::unique_ptr<Unit> make_feed_forward(const Options& options, int64_t width);
/// Mixture of experts: experts, top, inner; router ("softmax", "topk_softmax" of the chosen,
/// "sigmoid"), router_bias (of the choice alone), groups and group_top (1), renormalise (false),
/// renormalise_eps (0), scale (1); shared (inner of the shared expert, 0 = none), shared_gate;
/// activation ("swiglu", "clamped_swiglu" with its limit, 7, or of two matrices: "relu2" and the
/// like); bias (false: of the router's logits and of the experts' matrices); latent (0 = none: the
/// narrower width that the routed experts work in).
std::unique_ptr<Unit> make_experts(const Options& options, int64_t width);

/// Attention on a latent of keys and values (MLA): heads, q_rank (0 = full), kv_rank, nope_dim,
/// rope_dim, value_dim, rope (default true), scale of the scores (default (nope_dim +
/// rope_dim)^-1/2), norm_eps (1e-6) of the latents' norms, gate (false: a sigmoid factor of each
/// head's result); index_heads, index_dim, index_top (DSA) of `index_of` ("tokens"; "blocks",
/// "pools"), index_size and index_local (nn/units/indexer.h), and index_interleaved (false: the
/// pairs of its rotation).
std::unique_ptr<Unit> make_latent_attention(const Options& options, int64_t width);
/// The same as a sliding_window: window and sinks, and no index.
std::unique_ptr<Unit> make_latent_window(const Options& options, int64_t width);

}  // namespace cambium
