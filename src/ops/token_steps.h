// What operations on single tokens ask before they take a call.
#pragma once

#include "ops/segments.h"

namespace cambium {

/// Every segment is one token.
inline bool single_tokens(const Segments& segments) {
  for (int64_t s = 0; s < segments.count(); ++s) {
    if (segments.length(s) != 1) {
      return false;
    }
  }
  return true;
}

/// Whether a device that may change bits with the batch decodes by kernels of its own here: CUDA,
/// no tape, and segments of one token with states.
inline bool decodes_by_steps(const Context& ctx, const Tensor& x, const Segments& segments) {
  return x.device.kind == Device::kCuda && ctx.tape == nullptr && !ctx.batch_invariant &&
         !segments.slot.empty() && single_tokens(segments);
}

}  // namespace cambium
