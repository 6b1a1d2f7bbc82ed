#include "nn/norm.h"

#include "base/text.h"
#include "ops/norm/norm.h"

namespace cambium {
namespace {

constexpr const char* kNames[] = {"rms", "zero_centred", "layer", "none"};

}  // namespace

const char* norm_kind_name(NormKind kind) {
  return kNames[static_cast<int>(kind)];
}

NormKind find_norm_kind(const std::string& name) {
  std::vector<std::string> names;
  for (const char* known : kNames) {
    if (name == known) {
      return static_cast<NormKind>(names.size());
    }
    names.emplace_back(known);
  }
  fail("unknown norm '{}'{}; known norms: {}", name, did_you_mean(name, names), join(names, ", "));
}

Parameter norm_weight(int64_t channels) {
  return {.shape = {channels}, .group = ParameterGroup::kNorm, .init = {InitKind::kOnes}};
}

Norm::Norm(const NormSpec& kind, int64_t channels) : spec(kind) {
  if (spec.kind == NormKind::kNone) {
    return;
  }
  weight = norm_weight(channels);
  if (spec.kind == NormKind::kZeroCentred) {
    weight.init = {InitKind::kZeros};
  }
  if (spec.kind == NormKind::kLayer) {
    bias = {.shape = {channels}, .group = ParameterGroup::kNorm};
  }
}

Tensor Norm::forward(Context& ctx, const Tensor& x) const {
  if (spec.kind == NormKind::kNone) {
    return x;
  }
  if (spec.kind == NormKind::kLayer) {
    return layer_norm(ctx, x, weight.tensor, bias.tensor, spec.eps);
  }
  return rms_norm(ctx, x, weight.tensor, spec.eps, spec.kind == NormKind::kZeroCentred);
}

void Norm::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  if (!weight.shape.empty()) {
    visitor(prefix + ".weight", weight);
  }
  if (!bias.shape.empty()) {
    visitor(prefix + ".bias", bias);
  }
}

}  // namespace cambium
