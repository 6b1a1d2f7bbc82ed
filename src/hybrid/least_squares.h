// The least squares of a calibrated start. Sums are taken in one order, whatever the threads.
#pragma once

#include <vector>

#include "tensor/tensor.h"

namespace cambium {

/// u (C) with u.x as near to 1 as can be in the mean square over the rows x (T, C) of all `inputs`,
/// by `steps` of conjugate gradients from 0, which also keep it small. A weight row c u gives about
/// the constant c: a bias, for a projection that has none.
std::vector<float> constant_direction(const std::vector<Tensor>& inputs, int64_t steps = 16);

/// weight (N, n) += B (G + r I)^-1, r = `ridge` times the mean of G's diagonal: with gram G (n, n)
/// = sum y y^T and cross B (N, n) = sum e y^T, the change by which weight y explains most of the
/// errors e, kept near none. All F32 on the CPU, contiguous.
void add_ridge_solution(const Tensor& weight, const Tensor& gram, const Tensor& cross,
                        double ridge);

}  // namespace cambium
