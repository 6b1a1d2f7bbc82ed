// One token of Apriel-H1's Mamba, from what its projections give to what its output projection
// reads, as one piece of work: without it heads are repeated, convolved and scanned by an operation
// each (ops/pointwise, ops/conv, ops/selective_scan, which have the formulas).
#pragma once

#include "ops/selective_scan/selective_scan.h"

namespace cambium {

struct ScanStepInputs {
  Tensor x;                  // (T, groups of N channels): u before it is repeated and convolved
  Tensor conv_weight;        // (d, taps)
  Tensor conv_bias;          // (d), or undefined
  SelectiveScanInputs scan;  // but for u: silu(short_conv(repeat_heads(x)))
};

/// Whether the context's device computes this call so: CUDA without a tape and where batches may
/// change bits, over segments of one token each that have slots, N = 16 and at most four taps.
bool scan_step_serves(const Context& ctx, const ScanStepInputs& inputs, const Segments& segments);

/// -> y (T, d). Every segment is one token. conv (slots, d, taps - 1) and state (slots, d, N), fp32
/// (fp64 for F64 inputs). No gradient. Where a step is recorded (WorkRecorder), both states may be
/// read before the kernel that was queued last is done: it must not be one that writes them.
Tensor scan_step(const Context& ctx, const ScanStepInputs& inputs, const Segments& segments,
                 const Tensor& conv, const Tensor& state);

}  // namespace cambium
