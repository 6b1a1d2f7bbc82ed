// The norms of a model as data, and the one way a norm's parameter is declared.
#pragma once

#include "nn/parameter.h"
#include "tensor/context.h"

namespace cambium {

enum class NormKind : uint8_t {
  kRms,          // x rsqrt(mean(x^2) + eps) weight
  kZeroCentred,  // the same with 1 + weight in place of weight (Qwen3-Next)
  kLayer,        // (x - mean) rsqrt(variance + eps) weight + bias
  kNone,         // x itself, no parameters
};
/// "rms", "zero_centred", "layer", "none": the words of configurations and of the option `qk_norm`.
const char* norm_kind_name(NormKind kind);
/// Error that lists the kinds when there is none of this name.
NormKind find_norm_kind(const std::string& name);

struct NormSpec {
  NormKind kind = NormKind::kRms;
  float eps = 1e-5F;
  friend bool operator==(const NormSpec&, const NormSpec&) = default;
};

/// The weight of an RMS norm over `channels`: it starts at one and has no weight decay of matrices.
Parameter norm_weight(int64_t channels);

/// A norm over the last axis.
struct Norm {
  Norm() : Norm({NormKind::kNone}, 0) {}
  Norm(const NormSpec& spec, int64_t channels);
  /// x (T, ..., C) -> the same shape.
  Tensor forward(Context& ctx, const Tensor& x) const;
  /// Visits prefix + ".weight" and, of a layer norm, prefix + ".bias".
  void visit(const std::string& prefix, const ParameterVisitor& visitor);

  NormSpec spec;
  Parameter weight, bias;
};

}  // namespace cambium
