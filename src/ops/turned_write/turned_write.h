// What decoding does with queries, keys and values before attention, as one piece of work: queries
// and keys are turned (ops/rope), keys and values put in their pages (ops/attention).
#pragma once

#include "ops/attention/attention.h"
#include "ops/rope/rope.h"

namespace cambium {

/// Whether the context's device computes this call so: CUDA without a tape, over segments of one
/// token each, pages that are not in f8 and pairs that are halves of a head. The numbers are those
/// of the two operations to the bit.
bool turned_write_serves(const Context& ctx, const Tensor& k, const Turns& turns,
                         const Segments& segments, const KvPages& pages);

/// q (T, H, D), k (T, Hkv, D), v (T, Hkv, Dv) -> q turned. attention() then finds the call's rows
/// written (KvPages::written).
Tensor turned_write(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Turns& turns, const Segments& segments, const KvPages& pages);

}  // namespace cambium
