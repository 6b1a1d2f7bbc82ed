// What an optimiser does to the elements of a parameter; train/optimizer.h decides to which
// parameters, with which rates. Nothing here is recorded on a tape.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/optimizer/optimizer_config.h"
#include "tensor/context.h"

namespace cambium {

/// p, m and v contiguous, of one shape; p has a gradient, which stays as it is.
void adamw_update(const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v,
                  const AdamwConfig& config);

/// The same with m and v in bf16, rounded stochastically by numbers drawn from `key`: another one
/// for each update of each parameter, the same where an update is to be repeated.
void adamw_update_narrow(const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v,
                         const AdamwConfig& config, uint64_t key);

/// A parameter and its momentum: (R, C) contiguous, f32; p has a gradient, which is zero after an
/// update.
struct MuonMatrix {
  Tensor p, m;
};
/// Matrices of one shape, each updated by itself: a GPU takes their products together. Holds two
/// copies of all of them meanwhile.
void muon_update(const Context& ctx, std::span<const MuonMatrix> matrices,
                 const MuonConfig& config);
inline void muon_update(const Context& ctx, const Tensor& p, const Tensor& m,
                        const MuonConfig& config) {
  const MuonMatrix matrix{p, m};
  muon_update(ctx, std::span(&matrix, 1), config);
}

/// Sum of the squares of a contiguous tensor, in a fixed order and double precision across blocks.
double sum_squares(const Context& ctx, const Tensor& x);

/// The same of each of several tensors, of one device, which is waited for once.
std::vector<double> sums_of_squares(const Context& ctx, std::span<const Tensor> tensors);

/// Whether a contiguous tensor has neither NaN nor infinity.
bool all_finite(const Context& ctx, const Tensor& x);

}  // namespace cambium
