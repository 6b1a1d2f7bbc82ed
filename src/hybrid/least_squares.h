// Least squares in double precision: of small systems, of measurements, of a calibrated start. Sums
// are taken in one order, whatever the threads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tensor/tensor.h"

namespace cambium {

/// A symmetric positive definite matrix as L L', L lower triangular.
class Cholesky {
 public:
  /// `matrix` (n, n), of which the lower triangle is read. ok() is false where it is not positive
  /// definite, and nothing else may then be asked.
  Cholesky(std::vector<double> matrix, int64_t n);

  bool ok() const { return ok_; }
  /// L^-1 b: its squares add up to b' A^-1 b.
  std::vector<double> forward(std::vector<double> b) const;
  /// A^-1 b.
  std::vector<double> solve(std::vector<double> b) const;
  double log_determinant() const;

 private:
  int64_t n_;
  bool ok_ = true;
  std::vector<double> lower_;  // (n, n)
};

double dot(std::span<const double> a, std::span<const double> b);

/// The w with the least sum of (rows w - values)^2. `rows` (values.size(), unknowns). Error where
/// the rows do not tell all unknowns apart.
std::vector<double> least_squares(std::span<const double> rows, std::span<const double> values,
                                  int64_t unknowns);

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
