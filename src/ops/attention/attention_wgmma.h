// Attention's backward pass by products of warpgroups (attention_backward_wgmma_cuda.cu): what it
// offers to the operation and to its tests and benchmark.
#pragma once

#include <cstdint>

#include "ops/attention/attention_kernels.h"

namespace cambium::cuda::attention {

/// False, with nothing done, where it does not serve the call: other devices, head dims other than
/// 64 and 128, soft caps, sinks, rows that do not begin at multiples of 16 bytes. Two runs give the
/// same bits.
bool backward_by_warpgroups(const Attention<bf16>& a, const Launch& on);

/// Whether the current device has what it takes of heads of so many numbers.
bool warpgroups_serve(int64_t head_dim);

/// For tests and benchmarks: calls that it served so far, and turning it off and on again.
int64_t warpgroup_calls();
void allow_warpgroups(bool allowed);

}  // namespace cambium::cuda::attention
