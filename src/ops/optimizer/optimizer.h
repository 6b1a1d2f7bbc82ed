// What an optimiser does to the elements of a parameter; train/optimizer.h decides to which
// parameters, with which rates. Nothing here is recorded on a tape.
#pragma once

#include "ops/optimizer/optimizer_config.h"
#include "tensor/context.h"

namespace cambium {

/// p, m and v contiguous, of one shape; p has a gradient, which is zero afterwards.
void adamw_update(const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v,
                  const AdamwConfig& config);

/// p and m (R, C) contiguous, f32; p has a gradient, which is zero afterwards.
void muon_update(const Context& ctx, const Tensor& p, const Tensor& m, const MuonConfig& config);

/// Sum of the squares of a contiguous tensor, in a fixed order and double precision across blocks.
double sum_squares(const Context& ctx, const Tensor& x);

/// Whether a contiguous tensor has neither NaN nor infinity.
bool all_finite(const Context& ctx, const Tensor& x);

}  // namespace cambium
