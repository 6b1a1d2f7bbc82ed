// The Mamba-1 selective scan: a state of N numbers for each channel (Gu & Dao 2023, arXiv
// 2312.00752).
//
//   delta_t = softplus(dt_t + dt_bias)                         A = -exp(a_log)
//   h_t[c, n] = exp(delta_t[c] A[c, n]) h_{t-1}[c, n] + delta_t[c] B_t[b(c), n] u_t[c]
//   y_t[c] = (sum_n C_t[g(c), n] h_t[c, n] + D[c] u_t[c]) * act(z_t[c])
//
// B and C may be shared by groups of channels, each its own number of groups: b(c) = c / (d / Gb),
// g(c) = c / (d / Gc). act is SiLU, or sigmoid where attention with such a gate was replaced.
#pragma once

#include "ops/norm/norm.h"
#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

struct SelectiveScanInputs {
  Tensor u;        // (T, d)
  Tensor dt;       // (T, d) raw step
  Tensor b;        // (T, Gb, N)
  Tensor c;        // (T, Gc, N)
  Tensor z;        // (T, d) gate
  Tensor a_log;    // (d, N)
  Tensor d;        // (d) skip
  Tensor dt_bias;  // (d)
  GateActivation gate = GateActivation::kSilu;
};

/// -> (T, d). All inputs row-contiguous. state (slots, d, N), fp32 (fp64 for F64), or undefined.
Tensor selective_scan(Context& ctx, const SelectiveScanInputs& inputs, const Segments& segments,
                      const Tensor& state = {});

}  // namespace cambium
