// One token of a recurrent mixer, from what its projections give to what its output projection
// reads. Without it that is a dozen operations a layer, each a kernel of a few microseconds: a
// small model's decoding of few sequences is made of them.
//
//   u = silu(short_conv(x))                       its rows are heads of q, k and v
//   q, k: of length one and turned, where asked   (l2_norm, rope); heads are repeated
//   d = -exp(a_log) softplus(decay + dt_bias), or bound sigmoid(exp(a_log) (decay + dt_bias))
//   w = strongest sigmoid(weight), or the step softplus(decay + dt_bias)
//   y = recurrence(q, k, v, d, w), then gated_rms_norm(y, z) of each head, or y silu(z)
//
// The formulas and their sources are those of ops/conv, norm, rope, pointwise and recurrence.
#pragma once

#include "ops/norm/norm.h"
#include "ops/rope/rope.h"
#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

struct RecurrentStepInputs {
  Tensor x;                                       // (T, C): channels of q, k and v
  Tensor conv_weight;                             // (C, taps)
  Tensor conv_bias = {};                          // (C), or undefined
  bool values_first = false;                      // x is v, k, q; else q, k, v
  int64_t q_heads = 0, k_heads = 0, v_heads = 0;  // divide H
  int64_t key_dim = 0;                            // K
  /// q and k are made of length one, q then times K^-1/2; 0: they are not.
  float unit_eps = 0.0F;
  const Turns* turns = nullptr;  // of q and k, or null
  Tensor decay = {};             // (T, H), or (T, H K): a decay of every key channel
  Tensor weight = {};            // (T, H); undefined: w is the step, softplus(decay + dt_bias)
  float strongest = 1.0F;
  Tensor a_log = {};                 // (H)
  Tensor dt_bias = {};               // as long as a row of decay
  float bound = 0.0F;                // of the log decay, below 0; 0 = none
  bool delta = false;                // the delta rule
  Tensor skip = {};                  // (H), or undefined
  Tensor z = {};                     // (T, H V)
  Tensor norm = {};                  // (H V) or (V), or undefined: y silu(z)
  GatedNormConfig norm_config = {};  // whose group is V
};

/// Whether the context's device computes this call so: CUDA (sm_90) without a tape and where
/// batches may change bits, over segments of one token each that have slots, K a multiple of 16 and
/// V of 4, both at most 128, and at most eight heads that share one of q, k or v.
bool recurrent_step_serves(const Context& ctx, const RecurrentStepInputs& inputs,
                           const Segments& segments);

/// -> y (T, H V). Every segment is one token. conv (slots, C, taps - 1) and state (slots, H, K, V),
/// fp32 (fp64 for F64 inputs). No gradient. Where a step is recorded (WorkRecorder), both states
/// may be read before the kernel that was queued last is done: it must not be one that writes them.
Tensor recurrent_step(const Context& ctx, const RecurrentStepInputs& inputs,
                      const Segments& segments, const Tensor& conv, const Tensor& state);

}  // namespace cambium
