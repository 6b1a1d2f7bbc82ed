// Normalisations over the last axis. All sums in fp32 (fp64 for F64 tensors).
#pragma once

#include "tensor/context.h"

namespace cambium {

/// y = x * rsqrt(mean(x^2) + eps) * weight.   x (T, ..., C) with rows, weight (C) -> (T, ..., C)
/// Zhang & Sennrich 2019, arXiv 1910.07467. Weight has the dtype of x. A zero-centred weight counts
/// from one: y = ... * (1 + weight), as Gemma and Qwen3-Next hold theirs.
Tensor rms_norm(Context& ctx, const Tensor& x, const Tensor& weight, float eps,
                bool zero_centred = false);

/// A residual stream and the norm that reads it, in one pass over the stream: stream = keep stream
/// + out y in place, and the result is the stream's rms_norm. stream (T, C) contiguous, of the type
/// of y's sums (fp32 beside bf16: no rounding from layer to layer); where keep is 0 what it held is
/// not read. y (T, C) with rows. Without a weight the result is the stream itself, in y's type.
/// Without a tape.
Tensor add_rms_norm(const Context& ctx, const Tensor& stream, float keep, const Tensor& y,
                    float out, const Tensor& weight, float eps, bool zero_centred = false);
/// The same into x (T, C) contiguous of the caller's, or nowhere where x is undefined.
void add_rms_norm_into(const Context& ctx, const Tensor& x, const Tensor& stream, float keep,
                       const Tensor& y, float out, const Tensor& weight, float eps,
                       bool zero_centred = false);

/// The same with the stream's layer_norm.
void add_layer_norm_into(const Context& ctx, const Tensor& x, const Tensor& stream, float keep,
                         const Tensor& y, float out, const Tensor& weight, const Tensor& bias,
                         float eps);

/// y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * weight + bias; bias may be undefined.
/// x (T, ..., C) with rows, weight, bias (C) -> (T, ..., C).   Ba et al. 2016, arXiv 1607.06450.
Tensor layer_norm(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  float eps);

enum class GateOrder { kGateFirst, kNormFirst };
enum class GateActivation { kSilu, kSigmoid };

struct GatedNormConfig {
  float eps = 1e-5F;
  /// The mean is taken over contiguous groups of this many channels; it divides C.
  int64_t group = 0;
  GateOrder order = GateOrder::kGateFirst;
  GateActivation activation = GateActivation::kSilu;
};

/// The norm after a recurrent mixer. x, gate (T, C) -> (T, C); weight (C), or (group) shared by
/// groups.
///   gate first: y = RMS_group(x * act(gate)) * weight        (Mamba-2)
///   norm first: y = RMS_group(x) * weight * act(gate)         (Gated DeltaNet, KDA)
Tensor gated_rms_norm(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& weight,
                      const GatedNormConfig& config);

/// y = scale * x * rsqrt(sum(x^2) + eps), per row of the last axis.   x (..., D) -> (..., D)
Tensor l2_norm(Context& ctx, const Tensor& x, float eps, float scale);

}  // namespace cambium
