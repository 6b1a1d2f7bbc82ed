// The recurrence behind most linear mixers. Per value head, state S (K, V), fp32:
//
//   S_t = (I - b_t k_t k_t') D_t S_{t-1} + w_t k_t v_t'          y_t = S_t' q_t  (+ skip v_t)
//
//   mixer            decay D_t                          b_t    w_t
//   Lightning        constant per head                  0      1
//   Mamba-2          scalar per head and token          0      dt
//   Gated DeltaNet   scalar per head and token          beta   beta
//   Kimi Delta       per key channel and token          beta   beta
//
// Dao & Gu 2024 (arXiv 2405.21060), Yang et al. 2024 (arXiv 2412.06464), Kimi 2025 (arXiv
// 2510.26692).
#pragma once

#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

struct RecurrenceInputs {
  Tensor q;            // (T, Hk, K) read by value head h at key head h / (Hv / Hk)
  Tensor k;            // (T, Hk, K)
  Tensor v;            // (T, Hv, V)
  Tensor log_decay;    // log D_t <= 0: (T, Hv), or (T, Hv, K) per key channel
  Tensor weight = {};  // (T, Hv): w_t; undefined = 1
  bool delta = false;  // b_t = w_t instead of 0 (needs weight)
  Tensor skip = {};    // (Hv): y += skip[h] v; undefined = none
};

/// Chunks are cut at multiples of a divisor of this in absolute position, so that a sequence gives
/// the same states however it was split into calls at multiples of this: the same bits, but in
/// calls on a GPU that are not batch-invariant, which may walk a sequence in pieces.
inline constexpr int64_t kRecurrenceChunk = 64;

/// -> y (T, Hv, V). Heads and head dims of every input are contiguous together, rows evenly spaced.
/// state (slots, Hv, K, V), fp32 (fp64 for F64 inputs), or undefined. Short segments run token by
/// token, long ones chunk by chunk; both are the same function up to rounding.
Tensor recurrence(Context& ctx, const RecurrenceInputs& inputs, const Segments& segments,
                  const Tensor& state = {});

}  // namespace cambium
